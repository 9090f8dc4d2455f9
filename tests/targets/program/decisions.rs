//! Decisions: states, shares, permits, policies, the lease and dry runs.

use anyhow::{Context as _, Result};
use breaker_common::BreakerState::{Closed, HalfOpen, Open};
use breaker_core::datapath::Datapath as _;
use breaker_tests::packets::{
    DROP, NEXT, POKE_NUMBER, REDIRECT, Segment, TestRig,
    flags::{ACK, RST},
    plan, plan_with, pod, service, vip,
};

use super::{BACKUP, CLIENT, assert_forwarded_as, assert_untouched, data, flow_count, rig, syn, with_endpoints};

/// With Cilium's kube-proxy replacement, packets never carry the address of a Service. The agent must detect and
/// report it.
#[test]
fn a_socket_load_balancer_is_found() -> Result<()> {
    use breaker_agent::datapath::preflight::socket_load_balancer;
    assert_eq!(socket_load_balancer(), None);
    let mut third_party = aya::Ebpf::load(aya::include_bytes_aligned!(env!("THIRD_PARTY_OBJECT")))?;
    let program: &mut aya::programs::CgroupSockAddr =
        third_party.program_mut("cil_sock4_connect").context("cil_sock4_connect")?.try_into()?;
    program.load()?;
    let found = socket_load_balancer().context("the socket load balancer was not detected")?;
    assert!(found.contains("cil_sock4_conn") && found.contains("connect(2)"), "{found}");
    drop(third_party);
    assert_eq!(socket_load_balancer(), None);
    Ok(())
}

/// TRIALS B3: with Cilium's BPF host routing, answers enter pods past breaker's programs.
#[test]
fn another_datapath_is_found() -> Result<()> {
    use breaker_agent::datapath::preflight::other_datapath;
    assert_eq!(other_datapath(), None);
    let mut third_party = aya::Ebpf::load(aya::include_bytes_aligned!(env!("THIRD_PARTY_OBJECT")))?;
    let program: &mut aya::programs::SchedClassifier =
        third_party.program_mut("cil_from_container").context("cil_from_container")?.try_into()?;
    program.load()?;
    let found = other_datapath().context("the other datapath was not detected")?;
    assert!(found.contains("cil_from_contai") && found.contains("hostLegacyRouting"), "{found}");
    drop(third_party);
    assert_eq!(other_datapath(), None);
    Ok(())
}

#[test]
fn reject_answers_a_syn_with_the_reset_that_connect_believes() -> Result<()> {
    let mut rig = TestRig::new()?;
    let service = service("dummy", vip(10), &[pod(BACKUP, 80)], "whenAllUnhealthy: Reject,")?;
    rig.apply(&plan_with(&service, Open, 2, 0, false, &[]))?;
    for payload in [&b""[..], b"fast open"] {
        let segment = Segment { payload: payload.to_vec(), sequence: u32::MAX, ..syn(1) };
        let ran = rig.from_pod(&segment)?;
        assert_eq!(ran.action, REDIRECT);
        let reset = Segment::read(&ran.bytes)?;
        assert_eq!((reset.source, reset.destination), (vip(10), pod(CLIENT, 1)));
        assert_eq!(reset.flags, RST | ACK);
        let length = u32::try_from(payload.len())?;
        assert_eq!((reset.sequence, reset.acknowledgment), (0, length), "SYN and payload; the sequence number wraps");
        assert_eq!(reset.macs, (segment.macs.1, segment.macs.0));
        assert!(reset.payload.is_empty() && reset.tcp_options.is_empty());
    }
    assert_eq!(rig.datapath.counters(&service.name)?.rejected, 2);
    assert_eq!(flow_count(&mut rig), 0);
    Ok(())
}

#[test]
fn no_usable_backup_is_never_redirected_into() -> Result<()> {
    let mut rig = TestRig::new()?;
    let service = service("dummy", vip(10), &[pod(BACKUP, 80)], "")?;
    rig.apply(&plan_with(&service, Open, 2, 0, false, &[]))?;
    assert_untouched(&rig.from_pod(&syn(1))?, &syn(1).bytes(), "no usable backup: passed to the primary");
    assert_untouched(&rig.from_pod(&data(1))?, &data(1).bytes(), "the flow stays on the primary");
    assert_untouched(&rig.from_pod(&data(2))?, &data(2).bytes(), "no flow is reset while no backup is usable");
    Ok(())
}

#[test]
fn opening_resets_what_is_on_the_primary_and_nothing_else() -> Result<()> {
    let mut rig = rig(Open, "")?;
    // A flow not seen from its SYN is older than the agent. The packet becomes the reset to the peer; the reset to
    // the client left as a clone.
    let segment = data(1);
    let ran = rig.from_pod(&segment)?;
    assert_eq!(ran.action, NEXT);
    let reset = Segment::read(&ran.bytes)?;
    assert_eq!((reset.source, reset.destination), (pod(CLIENT, 1), vip(10)));
    assert_eq!((reset.flags, reset.sequence, reset.acknowledgment), (RST | ACK, segment.sequence, 77));
    assert!(reset.payload.is_empty());
    assert_eq!(reset.macs, segment.macs);
    // A reset is never answered with a reset.
    let rst = Segment::new(pod(CLIENT, 2), vip(10), RST | ACK);
    assert_untouched(&rig.from_pod(&rst)?, &rst.bytes(), "RST");
    // A flow decided in the current epoch is not reset.
    rig.from_pod(&syn(3))?;
    assert_forwarded_as(&rig.from_pod(&data(3))?, &with_endpoints(&data(3), pod(CLIENT, 3), pod(BACKUP, 80)));
    let counters = rig.datapath.counters(&breaker_core::model::ServiceName::new("dummy"))?;
    assert_eq!(counters.resets, 1);
    Ok(())
}

/// A client without the connection answers a poke with a reset that has the poke's number. It does not travel on; every
/// other reset does.
#[test]
fn only_the_answers_to_pokes_are_dropped() -> Result<()> {
    let reset = |port, flags, sequence| Segment { sequence, ..Segment::new(pod(CLIENT, port), vip(10), flags) };
    let mut open = rig(Open, "")?;
    for number in [POKE_NUMBER, POKE_NUMBER ^ 1 << 31] {
        assert_eq!(open.from_pod(&reset(1, RST, number))?.action, DROP);
        let with_ack = reset(1, RST | ACK, number);
        assert_untouched(&open.from_pod(&with_ack)?, &with_ack.bytes(), "a reset with ACK");
    }
    let other = reset(1, RST, POKE_NUMBER + 1);
    assert_untouched(&open.from_pod(&other)?, &other.bytes(), "another number");
    for (state, policy) in [(Open, "onOpen: Keep,"), (Closed, "")] {
        let mut rig = rig(state, policy)?;
        let answer = reset(1, RST, POKE_NUMBER);
        assert_untouched(&rig.from_pod(&answer)?, &answer.bytes(), "nothing is poked");
    }
    Ok(())
}

#[test]
fn closing_keeps_flows_on_the_backup_or_resets_them() -> Result<()> {
    for (policy, kept) in [("onClose: Keep,", true), ("onClose: Reset,", false)] {
        let mut rig = rig(Open, policy)?;
        rig.from_pod(&syn(1))?;
        rig.apply(&plan(&service("dummy", vip(10), &[pod(BACKUP, 80)], policy)?, Closed, 6))?;
        let ran = rig.from_pod(&data(1))?;
        let out = Segment::read(&ran.bytes)?;
        assert_eq!(out.destination, pod(BACKUP, 80));
        assert_eq!(out.flags & RST == 0, kept, "{policy}");
        let reply = Segment::new(pod(BACKUP, 80), pod(CLIENT, 1), ACK);
        assert_forwarded_as(&rig.to_pod(&reply)?, &with_endpoints(&reply, vip(10), pod(CLIENT, 1)));
        assert_untouched(&rig.from_pod(&syn(2))?, &syn(2).bytes(), "closed");
    }
    Ok(())
}

#[test]
fn half_open_lets_exactly_its_number_through() -> Result<()> {
    let mut rig = TestRig::new()?;
    let service = service("dummy", vip(10), &[pod(BACKUP, 80)], "breaker: {halfOpenConnections: 7},")?;
    for epoch in [3, 4] {
        rig.apply(&plan(&service, HalfOpen, epoch))?;
        let mut passed = 0;
        for port in 1..=200 {
            passed += usize::from(rig.from_pod(&syn(port))?.bytes == syn(port).bytes());
        }
        assert_eq!(passed, 7, "epoch {epoch}");
    }
    // Connections with a half-open permit have a pinned decision: they stay, and a later opening resets them.
    rig.apply(&plan(&service, HalfOpen, 5))?;
    rig.from_pod(&syn(1))?;
    assert_untouched(&rig.from_pod(&data(1))?, &data(1).bytes(), "a connection with a permit");
    rig.apply(&plan(&service, Open, 6))?;
    assert_eq!(Segment::read(&rig.from_pod(&data(1))?.bytes)?.flags, RST | ACK);
    Ok(())
}

#[test]
fn a_share_moves_its_part_and_each_hash_at_most_once() -> Result<()> {
    let mut rig = TestRig::new()?;
    let service = service("dummy", vip(10), &[pod(BACKUP, 80)], "")?;
    let backup = service.backups[0].backends.clone();
    let mut before: Option<Vec<bool>> = None;
    for share in [0, 100, 400, 700, 1000] {
        rig.apply(&plan_with(&service, Closed, 9, share, true, &backup))?;
        let on_primary: Vec<bool> =
            (1..=1000).map(|port| Ok(rig.from_pod(&syn(port))?.bytes == syn(port).bytes())).collect::<Result<_>>()?;
        let count = on_primary.iter().filter(|p| **p).count();
        assert!(count.abs_diff(usize::from(share)) < 60, "{count} of 1000 at {share}");
        if let Some(before) = before {
            assert!(
                before.iter().zip(&on_primary).all(|(b, now)| !b || *now),
                "a client that had moved to the primary went back to the backup"
            );
        }
        before = Some(on_primary);
    }
    Ok(())
}

#[test]
fn without_a_heartbeat_new_connections_go_to_the_primary_and_flows_stay() -> Result<()> {
    for (policy, passes) in [("onAgentLoss: PassThrough,", true), ("onAgentLoss: Hold,", false)] {
        let mut rig = rig(Open, policy)?;
        rig.from_pod(&syn(1))?;
        rig.datapath.heartbeat(std::time::Duration::from_nanos(1), 0);
        std::thread::sleep(std::time::Duration::from_millis(20));
        let ran = rig.from_pod(&syn(2))?;
        assert_eq!(ran.bytes == syn(2).bytes(), passes, "{policy}");
        assert_forwarded_as(&rig.from_pod(&data(1))?, &with_endpoints(&data(1), pod(CLIENT, 1), pod(BACKUP, 80)));
        if passes {
            assert_untouched(&rig.from_pod(&data(3))?, &data(3).bytes(), "no reset once the lease has expired");
            rig.datapath.heartbeat(std::time::Duration::ZERO, 0);
            assert_untouched(
                &rig.from_pod(&data(2))?,
                &data(2).bytes(),
                "a flow passed without an agent has a decision too",
            );
        }
    }
    Ok(())
}

#[test]
fn a_dry_run_counts_and_changes_nothing() -> Result<()> {
    let mut rig = TestRig::new()?;
    let service = service("dummy", vip(10), &[pod(BACKUP, 80)], "mode: DryRun,")?;
    rig.apply(&plan_with(&service, Open, 2, 0, false, &service.backups[0].backends))?;
    for segment in [syn(1), data(1), data(2)] {
        assert_untouched(&rig.from_pod(&segment)?, &segment.bytes(), "dry run");
    }
    let counters = rig.datapath.counters(&service.name)?;
    assert_eq!((counters.dry_run, counters.new_backup, counters.resets), (1, 0, 0));
    assert_eq!(flow_count(&mut rig), 0);
    Ok(())
}

#[test]
fn events_tell_what_happened_once() -> Result<()> {
    let mut rig = rig(Open, "")?;
    rig.from_pod(&syn(1))?;
    rig.from_pod(&syn(2))?;
    let kinds: Vec<&str> = rig.datapath.events().iter().map(|event| event.kind.label()).collect();
    assert_eq!(kinds, ["StateAdopted", "FlowMoved", "FlowMoved"]);
    Ok(())
}
