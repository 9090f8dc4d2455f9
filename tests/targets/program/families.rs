//! IPv6: the rules of IPv4 on IPv6 packets, and what only IPv6 has (extension headers).

use std::net::SocketAddr;

use anyhow::Result;
use breaker_agent::config;
use breaker_common::{
    BreakerState::{Closed, Open},
    PassReason,
};
use breaker_core::datapath::Datapath as _;
use breaker_tests::packets::{
    MACS, REDIRECT, Segment, TestRig,
    flags::{ACK, PSH, RST, SYN},
    plan, plan_with, pod, pod6, service, service_with, vip, vip6,
};

use super::{assert_forwarded_as, assert_untouched, flow_count, reason, with_endpoints};

fn rig6(extra: &str) -> Result<TestRig> {
    let mut rig = TestRig::new()?;
    rig.apply(&plan(&service("dummy", vip6(10), &[pod6(3, 80)], extra)?, Open, 5))?;
    Ok(rig)
}

fn syn6(port: u16) -> Segment {
    Segment { tcp_options: vec![2, 4, 5, 160], ..Segment::new(pod6(4, port), vip6(10), SYN) }
}

#[test]
fn open_translates_there_and_back_to_the_byte() -> Result<()> {
    let mut rig = rig6("")?;
    let client = pod6(4, 5000);
    assert_forwarded_as(&rig.from_pod(&syn6(5000))?, &with_endpoints(&syn6(5000), client, pod6(3, 80)));
    let answer = Segment::new(pod6(3, 80), client, SYN | ACK);
    assert_forwarded_as(&rig.to_pod(&answer)?, &with_endpoints(&answer, vip6(10), client));
    for payload in [&b"x"[..], b"GET / HTTP/1.1\r\n\r\n", &[0xff; 1001]] {
        let data = Segment::new(client, vip6(10), ACK | PSH).data(7, 8, payload);
        assert_forwarded_as(&rig.from_pod(&data)?, &with_endpoints(&data, client, pod6(3, 80)));
        let reply = Segment::new(pod6(3, 80), client, ACK | PSH).data(8, 7, payload);
        assert_forwarded_as(&rig.to_pod(&reply)?, &with_endpoints(&reply, vip6(10), client));
    }
    assert_eq!(flow_count(&mut rig), 1);
    Ok(())
}

#[test]
fn refused_and_reset_as_ipv4() -> Result<()> {
    let mut rig = TestRig::new()?;
    let service = service("dummy", vip6(10), &[pod6(3, 80)], "whenAllUnhealthy: Reject,")?;
    rig.apply(&plan_with(&service, Open, 5, 0, false, &[]))?;
    let ran = rig.from_pod(&syn6(1))?;
    let reset = Segment::read(&ran.bytes)?;
    assert_eq!(ran.action, REDIRECT);
    assert_eq!((reset.source, reset.destination, reset.flags), (vip6(10), pod6(4, 1), RST | ACK));
    assert_eq!((reset.sequence, reset.acknowledgment), (0, 1_000_001));
    assert_eq!(reset.macs, (MACS.1, MACS.0));
    // As soon as a backup is usable, connections established to the primary are reset.
    rig.apply(&plan(&service, Open, 6))?;
    let data = Segment::new(pod6(4, 2), vip6(10), ACK | PSH).data(1000, 77, b"hello");
    let onward = Segment::read(&rig.from_pod(&data)?.bytes)?;
    assert_eq!((onward.destination, onward.flags, onward.sequence), (vip6(10), RST | ACK, 1000));
    Ok(())
}

#[test]
fn one_state_for_both_families_and_all_ports() -> Result<()> {
    let mut rig = TestRig::new()?;
    let mut service = service_with("dummy", &[(vip(10), "TCP"), (vip6(10), "TCP")], &[pod(3, 80), pod6(3, 80)], "")?;
    let second = config_frontend(SocketAddr::new(vip(10).ip(), 9090));
    service.frontends.push(second);
    service
        .routes
        .push(breaker_core::model::Route { frontends: vec![second], backends: [(pod(3, 80), pod(3, 9443))].into() });
    let v4 = Segment::new(pod(4, 1), vip(10), SYN);
    let other = Segment::new(pod(4, 1), second.address, SYN);
    let mut epoch = 1;
    for state in [Closed, Open, Closed, Open] {
        epoch += 1;
        rig.apply(&plan(&service, state, epoch))?;
        let outcome = |ran: breaker_tests::packets::RunResult| Segment::read(&ran.bytes).map(|s| s.destination);
        let ends = [outcome(rig.from_pod(&v4)?)?, outcome(rig.from_pod(&syn6(1))?)?, outcome(rig.from_pod(&other)?)?];
        let expected = match state {
            Open => [pod(3, 80), pod6(3, 80), pod(3, 9443)],
            _ => [vip(10), vip6(10), second.address],
        };
        assert_eq!(ends, expected, "{state:?}");
    }
    assert_eq!(rig.datapath.counters(&service.name)?.new_backup, 6);
    Ok(())
}

fn config_frontend(address: SocketAddr) -> breaker_core::model::Frontend {
    breaker_core::model::Frontend { address, protocol: breaker_core::model::Protocol::Tcp }
}

/// The frame of an IPv6 segment with extension headers. Each header is (protocol number, bytes); the function fills
/// in its "next header" byte.
fn extended(segment: &Segment, headers: &[(u8, Vec<u8>)]) -> Vec<u8> {
    let plain = segment.bytes();
    let mut packet = plain[..54].to_vec();
    let mut chain = Vec::new();
    for (i, (_, bytes)) in headers.iter().enumerate() {
        let mut bytes = bytes.clone();
        bytes[0] = headers.get(i + 1).map_or(6, |(kind, _)| *kind);
        chain.extend(bytes);
    }
    packet[20] = headers.first().map_or(6, |(kind, _)| *kind);
    let length = u16::try_from(plain.len() - 54 + chain.len()).unwrap();
    packet[18..20].copy_from_slice(&length.to_be_bytes());
    packet.extend(chain);
    packet.extend(&plain[54..]);
    packet
}

/// An options extension header of `units` × 8 bytes, filled with padding.
fn padding(units: usize) -> Vec<u8> {
    let mut bytes = vec![0; units * 8];
    bytes[1] = u8::try_from(units - 1).unwrap();
    // A PadN option fills the rest (RFC 8200, section 4.2).
    bytes[2] = 1;
    bytes[3] = u8::try_from(units * 8 - 4).unwrap_or(0);
    bytes
}

#[test]
fn extension_headers_are_walked_within_a_bound() -> Result<()> {
    let atomic_fragment = vec![0, 0, 0, 0, 1, 2, 3, 4];
    let routed = |left: u8| vec![0, 0, 4, left, 0, 0, 0, 0];
    // A header: its protocol number and its bytes.
    type Header = (u8, Vec<u8>);
    let rows: Vec<(&str, Vec<Header>, bool)> = vec![
        ("none", vec![], true),
        ("hop by hop", vec![(0, padding(1))], true),
        ("destination options", vec![(60, padding(4))], true),
        ("a fragment header of an atomic fragment (RFC 6946)", vec![(44, atomic_fragment)], true),
        ("a routing header with no segments left", vec![(43, routed(0))], true),
        (
            "an authentication header",
            vec![(51, vec![0, 4, 0, 0, 0, 0, 0, 1, 0, 0, 0, 1, 9, 9, 9, 9, 9, 9, 9, 9, 9, 9, 9, 9])],
            true,
        ),
        (
            "six headers",
            vec![
                (0, padding(1)),
                (60, padding(1)),
                (43, routed(0)),
                (60, padding(2)),
                (60, padding(1)),
                (60, padding(1)),
            ],
            true,
        ),
        ("seven headers", vec![(60, padding(1)); 7], false),
        ("headers of more than 256 bytes", vec![(60, padding(33))], false),
        ("a routing header with a segment left", vec![(43, routed(1))], false),
    ];
    for (what, headers, walked) in rows {
        let mut rig = rig6("")?;
        let packet = extended(&syn6(5000), &headers);
        let ran = rig.raw_from_pod(&packet)?;
        if walked {
            // The translated packet must be the same packet built for the backup: only address, port and checksum
            // differ.
            let expected = extended(&with_endpoints(&syn6(5000), pod6(4, 5000), pod6(3, 80)), &headers);
            assert_eq!(ran.bytes, expected, "{what}");
        } else {
            assert_untouched(&ran, &packet, what);
            assert_eq!(reason(&rig, PassReason::ExtensionHeaders), 1, "{what}");
        }
    }
    Ok(())
}

#[test]
fn truncated_packets_of_every_length_fail_open() -> Result<()> {
    let mut rig = rig6("")?;
    let whole = extended(&syn6(1), &[(0, padding(1)), (60, padding(2))]);
    // The kernel itself refuses to run a program on an IPv6 frame without an IP header.
    for length in 54..whole.len() - 4 {
        let packet = &whole[..length];
        assert_untouched(&rig.raw_from_pod(packet)?, packet, &format!("{length} bytes"));
    }
    assert_eq!(flow_count(&mut rig), 0);
    Ok(())
}

#[test]
fn vlan_tags_on_an_uplink_are_stepped_over() -> Result<()> {
    for tags in [&[0x8100_u16][..], &[0x88a8, 0x8100]] {
        for (client, vip, backend) in [(pod(9, 7), vip(10), pod(3, 80)), (pod6(9, 7), vip6(10), pod6(3, 80))] {
            let mut rig = TestRig::new()?;
            rig.apply(&plan(&service("dummy", vip, &[backend], "")?, Open, 5))?;
            let tagged = |segment: &Segment| {
                let plain = segment.bytes();
                let mut packet = plain[..12].to_vec();
                for tag in tags {
                    packet.extend(tag.to_be_bytes());
                    packet.extend(100_u16.to_be_bytes());
                }
                packet.extend(&plain[12..]);
                packet
            };
            let syn = Segment::new(client, vip, SYN);
            let ran = rig.run("breaker_up", &tagged(&syn))?;
            assert_eq!(ran.bytes, tagged(&with_endpoints(&syn, client, backend)), "{tags:x?} {client}");
            assert_eq!(ran.mark, breaker_common::DEFAULT_MASQUERADE_MARK);
            let reply = Segment::new(backend, client, SYN | ACK);
            let ran = rig.run("breaker_up_out", &tagged(&reply))?;
            assert_eq!(ran.bytes, tagged(&with_endpoints(&reply, vip, client)), "{tags:x?} {client}");
        }
    }
    Ok(())
}

#[test]
fn a_name_for_both_families_is_read() {
    let text = "services: [{name: s, frontends: [{address: 10.43.0.1, port: 53, protocol: UDP}, {address: 'fd43::1', port: 53, protocol: UDP}], \
                primary: {backends: [{address: 'fd42::2', port: 53}]}, backups: [{backends: [{address: 10.42.0.3, port: 53}, {address: 'fd42::3', port: 53}]}]}]";
    let config = config::parse(std::path::Path::new("t"), text).unwrap();
    let shown: Vec<String> = config.services[0].frontends.iter().map(ToString::to_string).collect();
    assert_eq!(shown, ["10.43.0.1:53/UDP", "[fd43::1]:53/UDP"]);
}
