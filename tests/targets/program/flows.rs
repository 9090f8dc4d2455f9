//! Flows: which packet decides, whose reverse key it is, and when an entry goes.

use anyhow::Result;
use breaker_agent::datapath::sizes::Sizes;
use breaker_common::{
    BreakerState::{Closed, Open},
    PassReason,
};
use breaker_core::datapath::Datapath as _;
use breaker_tests::packets::{
    Segment, TestRig,
    flags::{ACK, FIN, RST, SYN},
    plan, pod, service, vip,
};

use super::{
    BACKUP, CLIENT, assert_forwarded_as, assert_untouched, data, flow_count, live_flows, reason, rig, syn,
    with_endpoints,
};

#[test]
fn of_all_flags_only_a_plain_syn_decides() -> Result<()> {
    let mut rig = rig(Open, "onOpen: Keep,")?;
    for flags in 0..=255u8 {
        let segment = Segment::new(pod(CLIENT, 1000 + u16::from(flags)), vip(10), flags);
        let ran = rig.from_pod(&segment)?;
        if flags & (SYN | ACK | RST | FIN) == SYN {
            assert_ne!(ran.bytes, segment.bytes(), "flags {flags:#04x}");
        } else {
            assert_untouched(&ran, &segment.bytes(), &format!("flags {flags:#04x}, never seen from its SYN"));
        }
    }
    Ok(())
}

#[test]
fn a_syn_is_decided_anew_at_its_retransmission() -> Result<()> {
    let mut rig = rig(Closed, "")?;
    let service = service("dummy", vip(10), &[pod(BACKUP, 80)], "")?;
    assert_untouched(&rig.from_pod(&syn(1))?, &syn(1).bytes(), "closed");
    rig.apply(&plan(&service, Open, 6))?;
    assert_forwarded_as(&rig.from_pod(&syn(1))?, &with_endpoints(&syn(1), pod(CLIENT, 1), pod(BACKUP, 80)));
    rig.apply(&plan(&service, Closed, 7))?;
    assert_untouched(&rig.from_pod(&syn(1))?, &syn(1).bytes(), "closed again");
    assert_untouched(&rig.from_pod(&data(1))?, &data(1).bytes(), "the flow follows its SYN");
    assert_eq!(flow_count(&mut rig), 0);
    Ok(())
}

#[test]
fn a_port_that_is_used_again_gets_a_new_decision() -> Result<()> {
    let mut rig = rig(Open, "")?;
    rig.from_pod(&syn(1))?;
    let other = service("dummy", vip(10), &[pod(9, 81)], "")?;
    rig.apply(&plan(&other, Open, 6))?;
    assert_forwarded_as(&rig.from_pod(&data(1))?, &with_endpoints(&data(1), pod(CLIENT, 1), pod(BACKUP, 80)));
    assert_forwarded_as(&rig.from_pod(&syn(1))?, &with_endpoints(&syn(1), pod(CLIENT, 1), pod(9, 81)));
    assert_forwarded_as(&rig.from_pod(&data(1))?, &with_endpoints(&data(1), pod(CLIENT, 1), pod(9, 81)));
    let late = Segment::new(pod(BACKUP, 80), pod(CLIENT, 1), ACK);
    assert_untouched(&rig.to_pod(&late)?, &late.bytes(), "a late packet of the old backend belongs to no flow");
    let reply = Segment::new(pod(9, 81), pod(CLIENT, 1), SYN | ACK);
    assert_forwarded_as(&rig.to_pod(&reply)?, &with_endpoints(&reply, vip(10), pod(CLIENT, 1)));
    assert_eq!(flow_count(&mut rig), 1);
    Ok(())
}

#[test]
fn two_vips_with_one_backend_never_share_a_reverse_key() -> Result<()> {
    let mut rig = rig(Open, "")?;
    rig.apply(&plan(&service("other", vip(11), &[pod(BACKUP, 80)], "")?, Open, 1))?;
    let client = pod(CLIENT, 5000);
    assert_forwarded_as(&rig.from_pod(&syn(5000))?, &with_endpoints(&syn(5000), client, pod(BACKUP, 80)));
    let second = Segment { destination: vip(11), ..syn(5000) };
    let out = Segment::read(&rig.from_pod(&second)?.bytes)?;
    assert_eq!((out.destination, out.source.ip()), (pod(BACKUP, 80), client.ip()));
    assert_ne!(out.source.port(), 5000);
    // Replies to each flow are translated to its own VIP.
    let first = Segment::new(pod(BACKUP, 80), client, SYN | ACK);
    assert_forwarded_as(&rig.to_pod(&first)?, &with_endpoints(&first, vip(10), client));
    let reply = Segment::new(pod(BACKUP, 80), out.source, SYN | ACK).data(1, 2, b"x");
    assert_forwarded_as(&rig.to_pod(&reply)?, &with_endpoints(&reply, vip(11), client));
    let more = Segment { destination: vip(11), ..data(5000) };
    assert_forwarded_as(&rig.from_pod(&more)?, &with_endpoints(&more, out.source, pod(BACKUP, 80)));
    assert_eq!(rig.datapath.counters(&breaker_core::model::ServiceName::new("other"))?.port_changed, 1);
    Ok(())
}

#[test]
fn a_vip_and_the_pod_itself_never_share_a_reverse_key() -> Result<()> {
    let mut rig = rig(Open, "")?;
    let (client, backup) = (pod(CLIENT, 5000), pod(BACKUP, 80));
    // The direct connection is first: it stays untouched, and the flow through the VIP gets another source port.
    let direct = Segment::new(client, backup, SYN);
    assert_untouched(&rig.from_pod(&direct)?, &direct.bytes(), "direct");
    let out = Segment::read(&rig.from_pod(&syn(5000))?.bytes)?;
    assert_ne!(out.source.port(), 5000);
    let reply = Segment::new(backup, client, SYN | ACK);
    assert_untouched(&rig.to_pod(&reply)?, &reply.bytes(), "the direct connection's reply");
    let reply = Segment::new(backup, out.source, SYN | ACK);
    assert_forwarded_as(&rig.to_pod(&reply)?, &with_endpoints(&reply, vip(10), client));
    // The flow through the VIP is first: the direct connection gets another source port.
    let (client, direct) = (pod(CLIENT, 6000), Segment::new(pod(CLIENT, 6000), backup, SYN));
    assert_forwarded_as(&rig.from_pod(&syn(6000))?, &with_endpoints(&syn(6000), client, backup));
    let aside = Segment::read(&rig.from_pod(&direct)?.bytes)?;
    assert_eq!(aside.destination, backup);
    assert_ne!(aside.source.port(), 6000);
    let more = Segment::new(client, backup, ACK).data(1, 2, b"hello");
    assert_forwarded_as(&rig.from_pod(&more)?, &with_endpoints(&more, aside.source, backup));
    let reply = Segment::new(backup, aside.source, SYN | ACK);
    assert_forwarded_as(&rig.to_pod(&reply)?, &with_endpoints(&reply, backup, client));
    let reply = Segment::new(backup, client, SYN | ACK);
    assert_forwarded_as(&rig.to_pod(&reply)?, &with_endpoints(&reply, vip(10), client));
    Ok(())
}

#[test]
fn a_key_left_behind_by_a_finished_flow_is_free() -> Result<()> {
    let mut rig = rig(Open, "")?;
    rig.apply(&plan(&service("other", vip(11), &[pod(BACKUP, 80)], "")?, Open, 1))?;
    rig.from_pod(&syn(5000))?;
    rig.from_pod(&Segment::new(pod(CLIENT, 5000), vip(10), RST))?;
    let second = Segment { destination: vip(11), ..syn(5000) };
    assert_forwarded_as(&rig.from_pod(&second)?, &with_endpoints(&second, pod(CLIENT, 5000), pod(BACKUP, 80)));
    Ok(())
}

#[test]
fn flows_to_a_backend_that_is_gone_are_cut_and_its_packets_are_nobodys() -> Result<()> {
    let mut rig = rig(Open, "onOpen: Keep,")?;
    rig.from_pod(&syn(7100))?;
    let name = breaker_core::model::ServiceName::new("dummy");
    assert_eq!(rig.datapath.remove_flows(&name, &|(backend, _)| backend == pod(9, 80))?, 0);
    assert_eq!(rig.datapath.remove_flows(&name, &|(backend, _)| backend == pod(BACKUP, 80))?, 1);
    assert_eq!(flow_count(&mut rig), 0);
    let packet = data(7100).bytes();
    assert_untouched(&rig.run("breaker_in", &packet)?, &packet, "the flow is gone");
    let reply = Segment::new(pod(BACKUP, 80), pod(CLIENT, 7100), ACK).bytes();
    assert_untouched(&rig.run("breaker_out", &reply)?, &reply, "its reverse entry is gone too");
    Ok(())
}

#[test]
fn a_service_that_is_removed_and_its_backends_leave_no_entry() -> Result<()> {
    let mut rig = rig(Open, "")?;
    let name = breaker_core::model::ServiceName::new("dummy");
    rig.datapath.remove(&name)?;
    assert_untouched(&rig.from_pod(&syn(1))?, &syn(1).bytes(), "no service");
    rig.datapath.sweep(None)?;
    let direct = Segment::new(pod(CLIENT, 1), pod(BACKUP, 80), SYN);
    rig.from_pod(&direct)?;
    assert_eq!(flow_count(&mut rig), 0, "the removed service's backend has no role");
    Ok(())
}

/// When the sweep removes a finished flow whose reverse key now belongs to another flow, the other flow's reverse
/// entry stays.
#[test]
fn the_sweep_takes_nobody_elses_reverse_entry() -> Result<()> {
    let mut rig = rig(Open, "")?;
    rig.apply(&plan(&service("other", vip(11), &[pod(BACKUP, 80)], "")?, Open, 1))?;
    let client = pod(CLIENT, 5000);
    rig.from_pod(&syn(5000))?;
    rig.from_pod(&Segment::new(client, vip(10), RST))?;
    rig.from_pod(&Segment { destination: vip(11), ..syn(5000) })?;
    assert_eq!(flow_count(&mut rig), 1, "the first flow has ended, the second is alive");
    let reply = Segment::new(pod(BACKUP, 80), client, SYN | ACK);
    assert_forwarded_as(&rig.to_pod(&reply)?, &with_endpoints(&reply, vip(11), client));
    Ok(())
}

/// A late packet of a finished flow must not promote that flow when another flow, which took over its reverse key, is
/// answered.
#[test]
fn a_finished_flow_is_not_kept_by_anothers_answer() -> Result<()> {
    let mut rig = rig(Open, "")?;
    rig.apply(&plan(&service("other", vip(11), &[pod(BACKUP, 80)], "")?, Open, 1))?;
    let client = pod(CLIENT, 5000);
    let late = Segment::new(client, vip(10), RST);
    rig.from_pod(&syn(5000))?;
    rig.from_pod(&late)?;
    rig.from_pod(&Segment { destination: vip(11), ..syn(5000) })?;
    rig.to_pod(&Segment::new(pod(BACKUP, 80), client, SYN | ACK))?;
    rig.from_pod(&late)?;
    rig.from_pod(&Segment::new(client, vip(11), ACK))?;
    let sweep = rig.datapath.sweep(None)?;
    assert_eq!((live_flows(&sweep), sweep.established()), (1, 1), "only the second flow is established");
    Ok(())
}

/// A connection that failed open has a decision: its next segment is not treated as one of a connection older than
/// the agent.
#[test]
fn a_connection_that_failed_open_is_not_reset() -> Result<()> {
    let mut rig = TestRig::with_sizes(&Sizes::for_memory(1024).with_flows(1024))?;
    rig.apply(&plan(&service("dummy", vip(10), &[pod(BACKUP, 80)], "")?, Open, 5))?;
    // Flows of other VIPs occupy every source port that the program tries.
    for n in 0..40u8 {
        let name = format!("s{n}");
        rig.apply(&plan(&service(&name, vip(100 + n), &[pod(BACKUP, 80)], "")?, Open, 1))?;
        rig.from_pod(&Segment { destination: vip(100 + n), ..syn(7) })?;
    }
    let ran = rig.from_pod(&syn(7))?;
    assert_untouched(&ran, &syn(7).bytes(), "no source port is left");
    assert!(reason(&rig, PassReason::NoSourcePort) > 0);
    assert_untouched(&rig.from_pod(&data(7))?, &data(7).bytes(), "the flow stays where its SYN went");
    Ok(())
}
