//! Bytes: what passes is untouched, and what is translated changes in address, port and checksums only.

use anyhow::{Context as _, Result};
use breaker_common::{
    BreakerState::{Closed, Open},
    PassReason,
};
use breaker_core::datapath::Datapath as _;
use breaker_tests::packets::{
    Segment, TestRig,
    flags::{ACK, FIN, PSH, RST, SYN},
    plan, plan_with, pod, service, vip,
};

use super::{
    BACKUP, CLIENT, assert_forwarded_as, assert_untouched, data, flow_count, reason, rig, syn, with_endpoints,
};

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
