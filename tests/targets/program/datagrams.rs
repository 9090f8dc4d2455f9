//! UDP: a flow's decision is valid for the epoch of its service; the first datagram of a new epoch is decided anew.

use std::net::SocketAddr;

use anyhow::Result;
use breaker_common::{
    BreakerState,
    BreakerState::{Closed, Open},
};
use breaker_core::{datapath::Datapath as _, model::Service};
use breaker_tests::packets::{
    Datagram, Ip, MACS, REDIRECT, RunResult, TestRig, icmp_is_valid, plan, plan_with, pod, pod6, service_with, vip,
    vip6,
};
use etherparse::IpNumber;

use super::{assert_untouched, flow_count};

/// Client, VIP and backup of each family.
const FAMILIES: [(SocketAddr, SocketAddr, SocketAddr); 2] =
    [(pod(4, 5000), vip(10), pod(3, 53)), (pod6(4, 5000), vip6(10), pod6(3, 53))];

fn dns(vip: SocketAddr, backups: &[SocketAddr], extra: &str) -> Result<Service> {
    service_with("dns", &[(vip, "UDP")], backups, extra)
}

fn rig(service: &Service, state: BreakerState) -> Result<TestRig> {
    let mut rig = TestRig::new()?;
    rig.apply(&plan(service, state, 5))?;
    Ok(rig)
}

#[track_caller]
fn assert_translated(ran: &RunResult, sent: &Datagram, source: SocketAddr, destination: SocketAddr) {
    assert_eq!(Datagram::read(&ran.bytes).unwrap(), Datagram { source, destination, ..sent.clone() });
}

#[test]
fn open_translates_there_and_back_with_checksums_and_without() -> Result<()> {
    for (client, vip, backup) in FAMILIES {
        let mut rig = rig(&dns(vip, &[backup], "")?, Open)?;
        for payload in [&b""[..], b"odd", b"even", &[0xff; 999]] {
            // RFC 8200 forbids a zero UDP checksum over IPv6; such a datagram must leave with a zero checksum too.
            for unchecked in [false, true] {
                let question = Datagram { unchecked, ..Datagram::new(client, vip, payload) };
                assert_translated(&rig.raw_from_pod(&question.bytes())?, &question, client, backup);
                let answer = Datagram { unchecked, ..Datagram::new(backup, client, payload) };
                assert_translated(&rig.raw_to_pod(&answer.bytes())?, &answer, vip, client);
            }
        }
        assert_eq!(flow_count(&mut rig), 1);
    }
    Ok(())
}

/// For one of the two-byte payloads the checksum computes to zero. UDP must send it as 0xffff (RFC 768).
#[test]
fn a_checksum_never_becomes_zero() -> Result<()> {
    for (client, vip, backup) in FAMILIES {
        let mut rig = rig(&dns(vip, &[backup], "")?, Open)?;
        for word in 0..=u16::MAX {
            // Skip payloads whose translated datagram has a checksum more than 2 away from zero: they cannot hit the
            // case.
            let question = Datagram::new(client, backup, &word.to_be_bytes());
            let bytes = question.bytes();
            let at = bytes.len() - 4;
            let check = u16::from_be_bytes([bytes[at], bytes[at + 1]]);
            if check.wrapping_add(2) > 4 {
                continue;
            }
            let question = Datagram::new(client, vip, &word.to_be_bytes());
            let ran = rig.raw_from_pod(&question.bytes())?;
            assert_translated(&ran, &question, client, backup);
            assert_ne!(&ran.bytes[at..at + 2], [0, 0], "{word}");
        }
    }
    Ok(())
}

#[test]
fn the_next_datagram_moves_when_the_epoch_changes() -> Result<()> {
    for (client, vip, backup) in FAMILIES {
        let service = dns(vip, &[backup], "")?;
        let mut rig = rig(&service, Open)?;
        let question = Datagram::new(client, vip, b"?");
        assert_translated(&rig.raw_from_pod(&question.bytes())?, &question, client, backup);
        let answer = Datagram::new(backup, client, b"!");
        assert_translated(&rig.raw_to_pod(&answer.bytes())?, &answer, vip, client);
        assert_translated(&rig.raw_from_pod(&question.bytes())?, &question, client, backup);
        // Closed, with flows to drain: the next datagram is left to kube-proxy, and the flow is removed.
        rig.apply(&plan(&service, Closed, 6))?;
        assert_untouched(&rig.raw_from_pod(&question.bytes())?, &question.bytes(), "closed");
        assert_eq!(flow_count(&mut rig), 0);
        rig.apply(&plan(&service, Open, 7))?;
        assert_translated(&rig.raw_from_pod(&question.bytes())?, &question, client, backup);
        assert_eq!(rig.datapath.counters(&service.name)?.new_backup, 2);
    }
    Ok(())
}

/// While no backup is usable the primary gets the datagrams; the first datagram after a backup becomes usable goes
/// there.
#[test]
fn a_client_moves_as_soon_as_there_is_a_backup() -> Result<()> {
    for (client, vip, backup) in FAMILIES {
        let service = dns(vip, &[backup], "")?;
        let mut rig = TestRig::new()?;
        let question = Datagram::new(client, vip, b"?");
        rig.apply(&plan_with(&service, Open, 5, 0, false, &[]))?;
        for _ in 0..3 {
            assert_untouched(&rig.raw_from_pod(&question.bytes())?, &question.bytes(), "no usable backup");
        }
        assert_eq!(flow_count(&mut rig), 0);
        rig.apply(&plan_with(&service, Open, 5, 0, false, &service.backups[0].backends))?;
        assert_translated(&rig.raw_from_pod(&question.bytes())?, &question, client, backup);
    }
    Ok(())
}

#[test]
fn closed_and_idle_leaves_no_trace() -> Result<()> {
    let (client, vip, backup) = FAMILIES[0];
    let service = dns(vip, &[backup], "")?;
    let mut rig = TestRig::new()?;
    rig.apply(&plan_with(&service, Closed, 1, 1000, false, &service.backups[0].backends))?;
    let question = Datagram::new(client, vip, b"?");
    assert_untouched(&rig.raw_from_pod(&question.bytes())?, &question.bytes(), "closed");
    assert_eq!(flow_count(&mut rig), 0);
    Ok(())
}

/// TCP and UDP on one port are two frontends.
#[test]
fn protocols_are_told_apart() -> Result<()> {
    let (client, vip, backup) = FAMILIES[0];
    let mut rig = rig(&service_with("dns", &[(vip, "TCP")], &[backup], "")?, Open)?;
    let question = Datagram::new(client, vip, b"?");
    assert_untouched(&rig.raw_from_pod(&question.bytes())?, &question.bytes(), "only TCP is protected");
    Ok(())
}

#[test]
fn two_vips_with_one_backend_never_share_a_reverse_key() -> Result<()> {
    for (client, first, backup) in FAMILIES {
        let second = SocketAddr::new(first.ip(), 5353);
        let mut rig = rig(&service_with("dns", &[(first, "UDP"), (second, "UDP")], &[backup], "")?, Open)?;
        let (one, two) = (Datagram::new(client, first, b"1"), Datagram::new(client, second, b"2"));
        assert_translated(&rig.raw_from_pod(&one.bytes())?, &one, client, backup);
        let source = Datagram::read(&rig.raw_from_pod(&two.bytes())?.bytes)?.source;
        assert_ne!(source, client, "the second flow needs another source port");
        for (to, vip) in [(client, first), (source, second)] {
            let answer = Datagram::new(backup, to, b"!");
            assert_translated(&rig.raw_to_pod(&answer.bytes())?, &answer, vip, client);
        }
        // A datagram to the backend's own address, from the source port that a flow already uses.
        let straight = Datagram::new(client, backup, b"3");
        let source = Datagram::read(&rig.raw_from_pod(&straight.bytes())?.bytes)?.source;
        assert_ne!(source, client);
        let answer = Datagram::new(backup, source, b"!");
        assert_translated(&rig.raw_to_pod(&answer.bytes())?, &answer, backup, client);
    }
    Ok(())
}

#[test]
fn reject_answers_with_port_unreachable() -> Result<()> {
    for (client, vip, backup) in FAMILIES {
        let mut rig = TestRig::new()?;
        rig.apply(&plan_with(&dns(vip, &[backup], "whenAllUnhealthy: Reject,")?, Open, 5, 0, false, &[]))?;
        for payload in [&b""[..], b"a question", &[7; 1400]] {
            let question = Datagram::new(client, vip, payload);
            let ran = rig.raw_from_pod(&question.bytes())?;
            assert_eq!(ran.action, REDIRECT);
            let (macs, ip, rest) = Ip::read(&ran.bytes)?;
            assert_eq!((macs, ip.ends()), ((MACS.1, MACS.0), (vip.ip(), client.ip())));
            let quoted = &question.bytes()[14..];
            let header = if vip.is_ipv4() { 20 } else { 40 };
            assert_eq!(&rest[8..], &quoted[..header + 8], "the quote");
            let (proto, code) = if vip.is_ipv4() { (IpNumber::ICMP, [3, 3]) } else { (IpNumber::IPV6_ICMP, [1, 4]) };
            assert_eq!((ip.proto(), &rest[..2]), (proto, &code[..]));
            assert!(icmp_is_valid(&ip, rest));
        }
    }
    Ok(())
}
