//! Program tier: runs each eBPF program in the kernel (BPF_PROG_TEST_RUN) on one packet at a time, and checks the
//! verdict, the resulting packet and the effect on the maps.
#![allow(clippy::unwrap_used, reason = "a test may panic")]

mod datagrams;
mod differential;
mod errors;
mod families;
mod fast_path;
mod filter;
mod limits;
mod verifier;
mod xdp;

use anyhow::{Context as _, Result};
use breaker_agent::datapath::sizes::Sizes;
use breaker_common::{
    BreakerState::{Closed, HalfOpen, Open},
    PassReason,
};
use breaker_core::datapath::Datapath as _;
use breaker_tests::packets::{
    NEXT, REDIRECT, RunResult, Segment, TestRig,
    flags::{ACK, FIN, PSH, RST, SYN},
    plan, plan_with, pod, service, vip,
};

const CLIENT: u8 = 4;
const BACKUP: u8 = 3;

fn syn(port: u16) -> Segment {
    Segment { tcp_options: vec![2, 4, 5, 180, 1, 1, 4, 2], ..Segment::new(pod(CLIENT, port), vip(10), SYN) }
}

fn data(port: u16) -> Segment {
    Segment::new(pod(CLIENT, port), vip(10), ACK | PSH).data(1_000_001, 77, b"GET / HTTP/1.1\r\n\r\n")
}

/// A rig with one service in `state`: VIP 10.43.0.10:8080, backup 10.42.0.3:80. `extra` is YAML for the service's
/// entry.
fn rig(state: breaker_common::BreakerState, extra: &str) -> Result<TestRig> {
    let mut rig = TestRig::new()?;
    rig.apply(&plan(&service("dummy", vip(10), &[pod(BACKUP, 80)], extra)?, state, 5))?;
    Ok(rig)
}

#[track_caller]
fn assert_untouched(ran: &RunResult, packet: &[u8], why: &str) {
    assert_eq!(ran.action, NEXT, "{why}");
    assert_eq!(ran.bytes, packet, "{why}");
    assert_eq!(ran.mark, 0, "{why}");
}

/// The same segment with another source and destination.
fn with_endpoints(segment: &Segment, source: std::net::SocketAddr, destination: std::net::SocketAddr) -> Segment {
    Segment { source, destination, ..segment.clone() }
}

#[track_caller]
fn assert_forwarded_as(ran: &RunResult, expected: &Segment) {
    assert_eq!(ran.action, NEXT);
    assert_eq!(Segment::read(&ran.bytes).unwrap(), *expected);
}

fn flow_count(rig: &mut TestRig) -> usize {
    rig.datapath.sweep(None).unwrap().entries
}

fn reason(rig: &TestRig, reason: PassReason) -> u64 {
    rig.datapath.reasons().unwrap().into_iter().find(|(r, _)| *r == reason).map_or(0, |(_, n)| n)
}

#[test]
fn what_is_not_ours_goes_on_untouched() -> Result<()> {
    let mut rig = rig(Open, "")?;
    let base = syn(1).bytes();
    let with = |offset: usize, bytes: &[u8]| {
        let mut packet = base.clone();
        packet[offset..offset + bytes.len()].copy_from_slice(bytes);
        packet
    };
    let rows: Vec<(&str, Vec<u8>)> = vec![
        ("another address", with_endpoints(&syn(1), pod(CLIENT, 1), pod(9, 8080)).bytes()),
        (
            "another port of the VIP",
            with_endpoints(&syn(1), pod(CLIENT, 1), std::net::SocketAddr::new(vip(10).ip(), 81)).bytes(),
        ),
        ("UDP", with(23, &[17])),
        ("ICMP", with(23, &[1])),
        ("SCTP", with(23, &[132])),
        ("IPv6", with(12, &[0x86, 0xdd])),
        ("ARP", with(12, &[0x08, 0x06])),
        ("802.1Q", with(12, &[0x81, 0x00])),
        ("IP version 6 in an IPv4 frame", with(14, &[0x65])),
        ("a header length of 4 words", with(14, &[0x44])),
        ("a later fragment", with(20, &[0x00, 0x10])),
        ("a total length without a TCP header", with(16, &[0, 39])),
    ];
    for (why, packet) in rows {
        for program in ["breaker_in", "breaker_out"] {
            assert_untouched(&rig.run(program, &packet)?, &packet, why);
        }
    }
    assert_eq!(flow_count(&mut rig), 0);
    assert!(reason(&rig, PassReason::Fragment) >= 2 && reason(&rig, PassReason::Truncated) >= 4);
    assert_eq!(reason(&rig, PassReason::Sctp), 2);
    Ok(())
}

#[test]
fn truncated_packets_of_every_length_fail_open() -> Result<()> {
    let mut rig = rig(Open, "")?;
    let whole = syn(1).bytes();
    // The kernel itself refuses to run a program on an IPv4 frame without an IP header.
    for length in 34..14 + 20 + 20 {
        let packet = &whole[..length];
        assert_untouched(&rig.run("breaker_in", packet)?, packet, &format!("{length} bytes"));
    }
    assert_eq!(flow_count(&mut rig), 0);
    Ok(())
}

#[test]
fn closed_and_idle_is_untouched_and_leaves_no_trace() -> Result<()> {
    let mut rig = TestRig::new()?;
    let service = service("dummy", vip(10), &[pod(BACKUP, 80)], "")?;
    rig.apply(&plan_with(&service, Closed, 1, 1000, false, &service.backups[0].backends))?;
    for segment in [syn(1), data(1), Segment::new(pod(CLIENT, 1), vip(10), FIN | ACK), data(2)] {
        assert_untouched(&rig.from_pod(&segment)?, &segment.bytes(), "closed");
    }
    let reply = Segment::new(vip(10), pod(CLIENT, 1), SYN | ACK);
    assert_untouched(&rig.to_pod(&reply)?, &reply.bytes(), "kube-proxy's reply");
    assert_eq!(flow_count(&mut rig), 0);
    let counters = rig.datapath.counters(&service.name)?;
    assert_eq!((counters.new_primary, counters.new_backup, counters.translated), (1, 0, 0));
    Ok(())
}

#[test]
fn open_translates_there_and_back_to_the_byte() -> Result<()> {
    let mut rig = rig(Open, "")?;
    let (client, backup) = (pod(CLIENT, 40_000), pod(BACKUP, 80));
    assert_forwarded_as(&rig.from_pod(&syn(40_000))?, &with_endpoints(&syn(40_000), client, backup));
    let answer = Segment { tcp_options: vec![2, 4, 5, 180], ..Segment::new(backup, client, SYN | ACK) };
    assert_forwarded_as(&rig.to_pod(&answer)?, &with_endpoints(&answer, vip(10), client));
    for (flags, payload) in [(ACK, &b""[..]), (ACK | PSH, &[0xff; 1400]), (FIN | ACK, b"odd"), (RST, b"")] {
        let there = Segment::new(client, vip(10), flags).data(5, 6, payload);
        assert_forwarded_as(&rig.from_pod(&there)?, &with_endpoints(&there, client, backup));
        let back = Segment::new(backup, client, flags).data(6, 5, payload);
        assert_forwarded_as(&rig.to_pod(&back)?, &with_endpoints(&back, vip(10), client));
    }
    assert_eq!(flow_count(&mut rig), 1);
    Ok(())
}

#[test]
fn ip_options_stay_where_they_are() -> Result<()> {
    let mut rig = rig(Open, "")?;
    for words in 1..=10u8 {
        // NOPs, and an end (RFC 791, section 3.1).
        let mut options = vec![1; usize::from(words) * 4];
        *options.last_mut().context("options")? = 0;
        let port = 40_000 + u16::from(words);
        let segment = Segment { ip_options: options, ..syn(port) };
        assert_forwarded_as(&rig.from_pod(&segment)?, &with_endpoints(&segment, pod(CLIENT, port), pod(BACKUP, 80)));
    }
    Ok(())
}

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
fn hairpin_a_client_that_is_the_chosen_backup_is_masqueraded() -> Result<()> {
    let mut rig = rig(Open, "")?;
    let client = pod(BACKUP, 7000);
    for segment in [Segment::new(client, vip(10), SYN), Segment::new(client, vip(10), ACK)] {
        let ran = rig.from_pod(&segment)?;
        assert_forwarded_as(&ran, &with_endpoints(&segment, client, pod(BACKUP, 80)));
        assert_eq!(ran.mark, 0x4000);
    }
    let reply = Segment::new(pod(BACKUP, 80), client, SYN | ACK);
    assert_forwarded_as(&rig.to_pod(&reply)?, &with_endpoints(&reply, vip(10), client));
    Ok(())
}

/// The backup's replies must return to the node and the interface that the client came in by, whichever node the
/// backup is on.
#[test]
fn a_client_outside_is_masqueraded_on_its_way_to_the_backup() -> Result<()> {
    let mut rig = rig(Open, "")?;
    let client: std::net::SocketAddr = "198.51.100.9:7000".parse()?;
    for segment in [Segment::new(client, vip(10), SYN), Segment::new(client, vip(10), ACK)] {
        let ran = rig.run("breaker_up", &segment.bytes())?;
        assert_forwarded_as(&ran, &with_endpoints(&segment, client, pod(BACKUP, 80)));
        assert_eq!(ran.mark, 0x4000);
    }
    let reply = Segment::new(pod(BACKUP, 80), client, SYN | ACK);
    assert_forwarded_as(&rig.to_pod(&reply)?, &with_endpoints(&reply, vip(10), client));
    // On an uplink, connections to a pod's own address are not recorded: other nodes' probes would fill the tables.
    let before = flow_count(&mut rig);
    let direct = Segment::new(client, pod(BACKUP, 80), SYN).bytes();
    assert_untouched(&rig.run("breaker_up", &direct)?, &direct, "direct");
    assert_eq!(flow_count(&mut rig), before);
    rig.apply(&plan(&service("dummy", vip(10), &[pod(BACKUP, 80)], "")?, Closed, 6))?;
    let closed = Segment::new("198.51.100.9:7001".parse()?, vip(10), SYN).bytes();
    assert_untouched(&rig.run("breaker_up", &closed)?, &closed, "closed");
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
    assert_eq!((sweep.entries, sweep.established), (1, 1), "only the second flow is established");
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
