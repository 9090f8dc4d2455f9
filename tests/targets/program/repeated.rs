//! Repeated connection attempts: what is no new connection, whose answer counts, and what happens if no answer is seen.

use anyhow::Result;
use breaker_common::{
    BreakerState::{Closed, HalfOpen, Open},
    PassReason,
};
use breaker_core::datapath::Datapath as _;
use breaker_tests::packets::{
    DROP, Segment, TestRig,
    flags::{ACK, FIN, RST, SYN},
    plan, pod, service, vip,
};

use super::{BACKUP, CLIENT, assert_forwarded_as, assert_untouched, data, reason, rig, syn, with_endpoints};

fn to_backup(port: u16) -> Segment {
    with_endpoints(&syn(port), pod(CLIENT, port), pod(BACKUP, 80))
}

fn syn_ack(from: std::net::SocketAddr, port: u16) -> Segment {
    Segment::new(from, pod(CLIENT, port), SYN | ACK).data(500, 1_000_001, b"")
}

/// TRIALS E1: while half-open, a repeated SYN takes no second permit. It moves to the backup, and the answer that the
/// primary sends once more does not reach the client.
#[test]
fn a_repeated_syn_is_no_new_trial() -> Result<()> {
    let mut rig = TestRig::new()?;
    let service = service("dummy", vip(10), &[pod(BACKUP, 80)], "breaker: {halfOpenConnections: 2},")?;
    rig.apply(&plan(&service, HalfOpen, 3))?;
    assert_untouched(&rig.from_pod(&syn(1))?, &syn(1).bytes(), "the first trial");
    assert_forwarded_as(&rig.from_pod(&syn(1))?, &to_backup(1));
    assert_untouched(&rig.from_pod(&syn(2))?, &syn(2).bytes(), "the second trial is still there");
    assert_forwarded_as(&rig.from_pod(&syn(3))?, &to_backup(3));
    let other = Segment { sequence: 7, ..syn(2) };
    assert_forwarded_as(&rig.from_pod(&other)?, &with_endpoints(&other, pod(CLIENT, 2), pod(BACKUP, 80)));
    // The primary's answer to the first trial is late. kube-proxy has translated it.
    assert_eq!(rig.to_pod(&syn_ack(vip(10), 1))?.action, DROP);
    let answer = syn_ack(pod(BACKUP, 80), 1);
    assert_forwarded_as(&rig.to_pod(&answer)?, &with_endpoints(&answer, vip(10), pod(CLIENT, 1)));
    // From now on the flow has its answer: a segment from the frontend may have been translated by another program.
    let late = syn_ack(vip(10), 1);
    assert_untouched(&rig.to_pod(&late)?, &late.bytes(), "answered");
    let counters = rig.datapath.counters(&service.name)?;
    assert_eq!((counters.half_open, counters.late_answers), (2, 1));
    Ok(())
}

/// TRIALS E1: the breaker opens while the primary's answer is under way.
#[test]
fn an_answer_of_the_primary_after_the_client_moved_is_dropped() -> Result<()> {
    let mut rig = rig(Closed, "")?;
    rig.from_pod(&syn(1))?;
    rig.apply(&plan(&service("dummy", vip(10), &[pod(BACKUP, 80)], "")?, Open, 6))?;
    let late = syn_ack(vip(10), 1);
    assert_untouched(&rig.to_pod(&late)?, &late.bytes(), "the client has not moved");
    assert_forwarded_as(&rig.from_pod(&syn(1))?, &to_backup(1));
    assert_eq!(rig.to_pod(&late)?.action, DROP);
    let data = Segment::new(vip(10), pod(CLIENT, 1), ACK);
    assert_untouched(&rig.to_pod(&data)?, &data.bytes(), "only the answer to a SYN is dropped");
    Ok(())
}

/// The safeguard: where no answer is ever seen, a repeated attempt is left to the primary, if that one accepts.
#[test]
fn an_attempt_without_an_answer_is_left_to_a_primary_that_accepts() -> Result<()> {
    for accepts in [true, false] {
        let mut rig = TestRig::new()?;
        let service = service("dummy", vip(10), &[pod(BACKUP, 80)], "")?;
        let mut plan = plan(&service, Open, 3);
        plan.primary_accepts = accepts;
        rig.apply(&plan)?;
        assert_forwarded_as(&rig.from_pod(&syn(1))?, &to_backup(1));
        let second = rig.from_pod(&syn(1))?;
        if !accepts {
            assert_forwarded_as(&second, &to_backup(1));
            assert_eq!(reason(&rig, PassReason::NoAnswerSeen), 0);
            continue;
        }
        assert_untouched(&second, &syn(1).bytes(), "repeated, and no answer was seen");
        assert_eq!(reason(&rig, PassReason::NoAnswerSeen), 1);
        // Its next segments stay with the decision; if the primary does not answer either, the backup is tried again.
        assert_untouched(&rig.from_pod(&data(1))?, &data(1).bytes(), "decided");
        assert_forwarded_as(&rig.from_pod(&syn(1))?, &to_backup(1));
        // A lost packet is no reason where answers are seen.
        for port in 2..20 {
            rig.from_pod(&syn(port))?;
            rig.to_pod(&syn_ack(pod(BACKUP, 80), port))?;
        }
        rig.from_pod(&syn(50))?;
        assert_forwarded_as(&rig.from_pod(&syn(50))?, &to_backup(50));
    }
    Ok(())
}

/// The agent suspends an interface on which missing answers are the rule, and tries again later.
#[test]
fn where_answers_are_never_seen_nothing_is_redirected() -> Result<()> {
    use std::time::Duration;
    let mut rig = TestRig::new()?;
    let service = service("dummy", vip(10), &[pod(BACKUP, 80)], "")?;
    rig.apply(&plan(&service, Open, 3))?;
    for port in 1..=5 {
        rig.from_pod(&syn(port))?;
        rig.from_pod(&syn(port))?;
    }
    let now = Duration::from_secs(1000);
    let changes = rig.datapath.watch_return_paths(now, |_| true)?;
    assert_eq!((changes.len(), changes[0].counts), (1, (0, 5)), "{changes:?}");
    assert_eq!(changes[0].suspended_for, Some(Duration::from_secs(60)));
    assert_eq!(rig.datapath.suspended_paths().len(), 1);
    assert_untouched(&rig.from_pod(&syn(9))?, &syn(9).bytes(), "suspended");
    assert_eq!(reason(&rig, PassReason::NoAnswerSeen), 1);
    // A client that is reset would come back to the primary, too.
    assert_untouched(&rig.from_pod(&data(8))?, &data(8).bytes(), "a connection from before the opening");
    let changes = rig.datapath.watch_return_paths(now + Duration::from_secs(60), |_| true)?;
    assert_eq!(changes[0].suspended_for, None, "a trial");
    assert_eq!(Segment::read(&rig.from_pod(&data(8))?.bytes)?.flags & RST, RST);
    assert_forwarded_as(&rig.from_pod(&syn(9))?, &to_backup(9));
    assert!(rig.datapath.watch_return_paths(now, |_| false)?.is_empty(), "the interface is gone");
    assert!(rig.datapath.suspended_paths().is_empty());
    Ok(())
}

/// TRIALS E4: a connection that was closed keeps its reverse key, because the backup may be in TIME-WAIT. A connection to
/// another frontend gets another source port.
#[test]
fn a_closed_connection_keeps_its_port_from_other_frontends() -> Result<()> {
    let mut rig = rig(Open, "")?;
    rig.apply(&plan(&service("other", vip(11), &[pod(BACKUP, 80)], "")?, Open, 5))?;
    rig.from_pod(&syn(1))?;
    rig.to_pod(&syn_ack(pod(BACKUP, 80), 1))?;
    rig.from_pod(&Segment { flags: FIN | ACK, ..data(1) })?;
    rig.to_pod(&Segment::new(pod(BACKUP, 80), pod(CLIENT, 1), FIN | ACK))?;
    let again = Segment { destination: vip(11), sequence: 9, ..syn(1) };
    let there = Segment::read(&rig.from_pod(&again)?.bytes)?;
    assert_eq!(there.destination, pod(BACKUP, 80));
    assert_ne!(there.source, pod(CLIENT, 1));
    // The same frontend may use the port again: the numbers of the connection go on.
    let same = Segment { sequence: 2_000_000, ..syn(1) };
    assert_forwarded_as(&rig.from_pod(&same)?, &with_endpoints(&same, pod(CLIENT, 1), pod(BACKUP, 80)));
    Ok(())
}
