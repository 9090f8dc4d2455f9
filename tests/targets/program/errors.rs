//! ICMP errors about translated packets, and later fragments of translated packets.

use std::net::SocketAddr;

use anyhow::Result;
use breaker_common::{
    BreakerState::{Closed, Open},
    PassReason,
};
use breaker_core::datapath::Datapath as _;
use breaker_tests::packets::{
    Datagram, Ip, MACS, Segment, TestRig,
    flags::{ACK, RST, SYN},
    icmp_is_valid, plan, pod, pod6, service_with, vip, vip6,
};
use etherparse::IpNumber;

use super::{assert_untouched, live_flows, reason, with_endpoints};

/// Client, VIP, backup and router, for each IP family.
const FAMILIES: [(SocketAddr, SocketAddr, SocketAddr, SocketAddr); 2] =
    [(pod(4, 5000), vip(10), pod(3, 80), pod(200, 0)), (pod6(4, 5000), vip6(10), pod6(3, 80), pod6(200, 0))];

fn rig(vip: SocketAddr, backup: SocketAddr) -> Result<TestRig> {
    let mut rig = TestRig::new()?;
    rig.apply(&plan(&service_with("dummy", &[(vip, "TCP"), (vip, "UDP")], &[backup], "")?, Open, 5))?;
    Ok(rig)
}

/// An ICMP "fragmentation needed" (IPv4) or "packet too big" (IPv6) error as a frame. It quotes the first `quoted`
/// bytes of the IP packet in the frame `about`.
fn too_big(from: SocketAddr, to: SocketAddr, about: &[u8], quoted: usize) -> Vec<u8> {
    let quote = &about[14..(14 + quoted).min(about.len())];
    let v4 = from.is_ipv4();
    let mut icmp = if v4 { vec![3, 4, 0, 0, 0, 0, 5, 0] } else { vec![2, 0, 0, 0, 0, 0, 5, 0] };
    icmp.extend(quote);
    let proto = if v4 { IpNumber::ICMP } else { IpNumber::IPV6_ICMP };
    let ip = Ip::new(from, to, proto, icmp.len(), &[]);
    let pseudo = match &ip {
        Ip::V4(_) => Vec::new(),
        Ip::V6(ip) => {
            let mut bytes = [ip.source, ip.destination].concat();
            bytes.extend(u32::try_from(icmp.len()).unwrap().to_be_bytes());
            bytes.extend([0, 0, 0, 58]);
            bytes
        }
    };
    let sum: u32 = pseudo
        .chunks(2)
        .chain(icmp.chunks(2))
        .map(|c| u32::from(u16::from_be_bytes([c[0], c.get(1).copied().unwrap_or(0)])))
        .sum();
    let folded = (sum & 0xffff) + (sum >> 16);
    let check = !u16::try_from((folded & 0xffff) + (folded >> 16)).unwrap();
    icmp[2..4].copy_from_slice(&check.to_be_bytes());
    ip.frame(MACS, &icmp)
}

/// Source and destination of the ICMP error in `frame`, and the bytes that it quotes. Fails if a checksum is wrong.
fn read(frame: &[u8]) -> Result<((std::net::IpAddr, std::net::IpAddr), Vec<u8>)> {
    let (_, ip, rest) = Ip::read(frame)?;
    anyhow::ensure!(icmp_is_valid(&ip, rest), "wrong ICMP checksum");
    Ok((ip.ends(), rest[8..].to_vec()))
}

#[test]
fn the_client_knows_its_packet_in_an_error_about_it() -> Result<()> {
    for (client, vip, backup, router) in FAMILIES {
        let mut rig = rig(vip, backup)?;
        let segment = Segment::new(client, vip, SYN);
        let datagram = Datagram::new(client, vip, b"a question of some length");
        for (sent, whole) in
            [(segment.bytes(), 60), (datagram.bytes(), 60), (segment.bytes(), 28), (datagram.bytes(), 28)]
        {
            let quoted = if vip.is_ipv4() { whole } else { whole + 20 };
            let translated = rig.raw_from_pod(&sent)?.bytes;
            for from in [router, backup] {
                let ran = rig.raw_to_pod(&too_big(from, client, &translated, quoted))?;
                let ((source, destination), quote) = read(&ran.bytes)?;
                let expected = &sent[14..(14 + quoted).min(sent.len())];
                assert_eq!(quote, expected, "{from} {quoted}");
                // An error from the backup comes from the VIP in the client's view; a router's address stays as it
                // is.
                assert_eq!(source, if from == backup { vip.ip() } else { router.ip() });
                assert_eq!(destination, client.ip());
            }
        }
        let name = breaker_core::model::ServiceName::new("dummy");
        assert_eq!(rig.datapath.counters(&name)?.icmp_errors, 8);
    }
    Ok(())
}

/// A frame may be longer than its IP packet. Padding behind an ICMP error is neither in its checksum nor part of the
/// quote.
#[test]
fn padding_behind_an_error_is_no_quote() -> Result<()> {
    for (client, vip, backup, router) in FAMILIES {
        let mut rig = rig(vip, backup)?;
        let sent = Segment::new(client, vip, SYN).bytes();
        let translated = rig.raw_from_pod(&sent)?.bytes;
        let header = if vip.is_ipv4() { 20 } else { 40 };
        // The quote ends after eight bytes of TCP; padding lies where the quoted TCP checksum would be.
        let error = too_big(router, client, &translated, header + 8);
        let mut padded = error.clone();
        padded.extend([0xaa; 40]);
        let out = rig.raw_to_pod(&padded)?.bytes;
        assert_eq!(out[error.len()..], [0xaa; 40]);
        assert_eq!(read(&out[..error.len()])?.1, &sent[14..14 + header + 8]);
        // The quote ends before the ports.
        let mut padded = too_big(router, client, &translated, header);
        padded.extend(&translated[14 + header..]);
        assert_untouched(&rig.raw_to_pod(&padded)?, &padded, "the bytes in place of the ports are padding");
    }
    Ok(())
}

#[test]
fn the_backend_knows_its_packet_in_a_clients_error() -> Result<()> {
    for (client, vip, backup, _) in FAMILIES {
        let mut rig = rig(vip, backup)?;
        rig.raw_from_pod(&Datagram::new(client, vip, b"?").bytes())?;
        let answer = Datagram::new(backup, client, b"an answer that nobody waits for").bytes();
        let got = rig.raw_to_pod(&answer)?.bytes;
        let ran = rig.raw_from_pod(&too_big(client, vip, &got, 48))?;
        let (ends, quote) = read(&ran.bytes)?;
        assert_eq!(ends, (client.ip(), backup.ip()));
        assert_eq!(quote, &answer[14..(14 + 48).min(answer.len())]);
    }
    Ok(())
}

#[test]
fn errors_about_others_are_untouched() -> Result<()> {
    for (client, vip, backup, router) in FAMILIES {
        let mut rig = rig(vip, backup)?;
        rig.raw_from_pod(&Datagram::new(client, vip, b"?").bytes())?;
        let other = SocketAddr::new(client.ip(), 5001);
        let about = |from, to| Datagram::new(from, to, b"something").bytes();
        for packet in [
            too_big(router, client, &about(other, backup), 48),
            too_big(router, client, &about(client, router), 48),
            // A quote that ends before the ports.
            too_big(router, client, &about(client, backup), if vip.is_ipv4() { 22 } else { 42 }),
        ] {
            assert_untouched(&rig.raw_to_pod(&packet)?, &packet, "the error is about no flow of ours");
        }
        let echo = {
            let mut packet = too_big(client, vip, &about(client, vip), 40);
            packet[if vip.is_ipv4() { 34 } else { 54 }] = if vip.is_ipv4() { 8 } else { 128 };
            packet
        };
        assert_untouched(&rig.raw_from_pod(&echo)?, &echo, "an echo request");
    }
    Ok(())
}

/// The two fragments of a datagram, as frames; the first carries `first` bytes of the IP payload.
fn fragments(datagram: &Datagram, first: usize) -> [Vec<u8>; 2] {
    let whole = datagram.bytes();
    let piece = |range: std::ops::Range<usize>, offset: usize, more: bool| {
        let v4 = datagram.source.is_ipv4();
        let header = if v4 { 34 } else { 54 };
        let body = &whole[header + range.start..header + range.end];
        let mut packet = whole[..header].to_vec();
        let field = u16::try_from(offset).unwrap() | if v4 { 0x2000 * u16::from(more) } else { u16::from(more) };
        if v4 {
            packet[16..18].copy_from_slice(&u16::try_from(20 + body.len()).unwrap().to_be_bytes());
            let field = (field & 0x2000) | ((field & 0x1fff) / 8);
            packet[20..22].copy_from_slice(&field.to_be_bytes());
            packet[24..26].copy_from_slice(&[0, 0]);
            let (ip, _) = etherparse::Ipv4Header::from_slice(&packet[14..]).unwrap();
            packet[24..26].copy_from_slice(&ip.calc_header_checksum().to_be_bytes());
        } else {
            packet[18..20].copy_from_slice(&u16::try_from(8 + body.len()).unwrap().to_be_bytes());
            packet[20] = 44;
            packet.extend([17, 0]);
            packet.extend(field.to_be_bytes());
            packet.extend([0, 1, 2, 3]);
        }
        packet.extend(body);
        packet
    };
    let length = whole.len() - if datagram.source.is_ipv4() { 34 } else { 54 };
    [piece(0..first, 0, true), piece(first..length, first, false)]
}

#[test]
fn later_fragments_follow_their_first() -> Result<()> {
    for (client, vip, backup, _) in FAMILIES {
        let mut rig = rig(vip, backup)?;
        let question = Datagram::new(client, vip, &[5; 200]);
        let [first, second] = fragments(&question, 64);
        assert_untouched(&rig.raw_from_pod(&second)?, &second, "a later fragment before its first");
        assert_eq!(reason(&rig, PassReason::Fragment), 1);
        let [expected_first, expected_second] = fragments(&Datagram { destination: backup, ..question.clone() }, 64);
        assert_eq!(rig.raw_from_pod(&first)?.bytes, expected_first);
        assert_eq!(rig.raw_from_pod(&second)?.bytes, expected_second);
        // The answer's fragments.
        let answer = Datagram::new(backup, client, &[6; 200]);
        let [first, second] = fragments(&answer, 128);
        let [expected_first, expected_second] = fragments(&Datagram { source: vip, ..answer }, 128);
        assert_eq!(rig.raw_to_pod(&first)?.bytes, expected_first);
        assert_eq!(rig.raw_to_pod(&second)?.bytes, expected_second);
    }
    Ok(())
}

/// A later fragment from a backend first passes the backend's own interface. It is translated on the hook that
/// translated its first fragment and not before; otherwise netfilter in between would see fragments of two different
/// packets.
#[test]
fn a_fragment_follows_its_first_on_the_same_way_only() -> Result<()> {
    for (client, vip, backup, _) in FAMILIES {
        let mut rig = rig(vip, backup)?;
        rig.raw_from_pod(&Datagram::new(client, vip, b"?").bytes())?;
        let answer = Datagram::new(backup, client, &[6; 200]);
        let [first, second] = fragments(&answer, 128);
        rig.raw_to_pod(&first)?;
        assert_untouched(&rig.raw_from_pod(&second)?, &second, "on the backend's own veth");
        let [_, expected] = fragments(&Datagram { source: vip, ..answer }, 128);
        assert_eq!(rig.raw_to_pod(&second)?.bytes, expected);
    }
    Ok(())
}

/// IP identifications repeat, after 65,536 datagrams at the latest. The note about an earlier first fragment must not
/// apply.
#[test]
fn an_identification_that_is_used_again_is_another_packet() -> Result<()> {
    for (client, vip, backup, _) in FAMILIES {
        let mut rig = rig(vip, backup)?;
        let [first, second] = fragments(&Datagram::new(client, vip, &[5; 200]), 64);
        assert_ne!(rig.raw_from_pod(&first)?.bytes, first);
        assert_ne!(rig.raw_from_pod(&second)?.bytes, second);
        rig.apply(&plan(&service_with("dummy", &[(vip, "TCP"), (vip, "UDP")], &[backup], "")?, Closed, 6))?;
        assert_untouched(&rig.raw_from_pod(&first)?, &first, "closed");
        assert_untouched(&rig.raw_from_pod(&second)?, &second, "untouched like its first fragment");
    }
    Ok(())
}

/// A reset made from a first fragment is a complete packet: the fragment bits are cleared, so the receiver waits for
/// no rest.
#[test]
fn a_reset_made_of_a_fragment_is_whole() -> Result<()> {
    for (client, vip, backup, _) in FAMILIES {
        let mut rig = rig(vip, backup)?;
        // A segment of a flow not seen from its SYN: the program resets the connection.
        let segment = Segment::new(client, vip, ACK).data(7, 8, b"a large segment");
        let whole = segment.bytes();
        let mut first = whole.clone();
        if vip.is_ipv4() {
            first[20..22].copy_from_slice(&[0x20, 0]);
            // MF (0x2000) replaces DF (0x4000): the header's sum falls by 0x2000, so its complement rises by as much.
            let check = u16::from_be_bytes([whole[24], whole[25]]) + 0x2000;
            first[24..26].copy_from_slice(&check.to_be_bytes());
        } else {
            first.splice(54..54, [6, 0, 0, 1, 0, 0, 0, 9]);
            first[20] = 44;
            first[19] += 8;
        }
        let out = rig.raw_from_pod(&first)?.bytes;
        if vip.is_ipv4() {
            let reset = Segment::read(&out)?;
            assert_eq!((reset.flags, reset.sequence, &out[20..22]), (RST | ACK, 7, &[0, 0][..]));
        } else {
            assert_eq!((&out[54..62], out[62 + 13]), (&[6, 0, 0, 0, 0, 0, 0, 9][..], RST | ACK));
        }
    }
    Ok(())
}

/// A direct connection that got another source port is promoted to the flow tables once it is answered: if its entry
/// were evicted, the connection would go on under its original port, which belongs to another flow. A direct
/// connection that kept its port stays pending, because it loses nothing by an eviction.
#[test]
fn a_direct_connection_that_moved_aside_is_kept() -> Result<()> {
    for (client, vip, backup, _) in FAMILIES {
        let mut rig = rig(vip, backup)?;
        let [untouched, moves] = [SocketAddr::new(client.ip(), 1), client].map(|c| Segment::new(c, backup, SYN));
        rig.from_pod(&Segment::new(client, vip, SYN))?;
        for direct in [untouched, moves] {
            let source = Segment::read(&rig.from_pod(&direct)?.bytes)?.source;
            assert_eq!(source == direct.source, direct.source != client);
            rig.to_pod(&Segment::new(backup, source, SYN | ACK))?;
            rig.from_pod(&Segment { flags: ACK, ..direct })?;
        }
        let sweep = rig.datapath.sweep(None)?;
        assert_eq!((live_flows(&sweep), sweep.established()), (3, 1));
    }
    Ok(())
}

/// A flood of connection requests evicts pending flows only, never established ones.
#[test]
fn a_flood_of_requests_pushes_out_requests_only() -> Result<()> {
    use breaker_agent::datapath::sizes::Sizes;
    let (client, vip, backup, _) = FAMILIES[0];
    let mut rig = TestRig::with_sizes(&Sizes::for_memory(1024).with_flows(1024))?;
    rig.apply(&plan(&service_with("dummy", &[(vip, "TCP")], &[backup], "")?, Open, 5))?;
    let port = |n: u16| SocketAddr::new(client.ip(), 2000 + n);
    for n in 0..300 {
        rig.from_pod(&Segment::new(port(n), vip, SYN))?;
        rig.to_pod(&Segment::new(backup, port(n), SYN | ACK))?;
        rig.from_pod(&Segment::new(port(n), vip, ACK))?;
    }
    for n in 0..40_000_u16 {
        let address = std::net::Ipv4Addr::from(0x0a2a_8000 + u32::from(n));
        rig.from_pod(&Segment::new(SocketAddr::new(address.into(), 7), vip, SYN))?;
    }
    for n in 0..300 {
        let data = Segment::new(port(n), vip, ACK).data(5, 6, b"x");
        super::assert_forwarded_as(&rig.from_pod(&data)?, &with_endpoints(&data, port(n), backup));
        let reply = Segment::new(backup, port(n), ACK).data(6, 5, b"y");
        super::assert_forwarded_as(&rig.to_pod(&reply)?, &with_endpoints(&reply, vip, port(n)));
    }
    // The flow tables are full now: further flows stay in the pending tables, and are translated all the same.
    for n in 300..1300 {
        rig.from_pod(&Segment::new(port(n), vip, SYN))?;
        rig.to_pod(&Segment::new(backup, port(n), SYN | ACK))?;
        let ack = Segment::new(port(n), vip, ACK);
        super::assert_forwarded_as(&rig.from_pod(&ack)?, &with_endpoints(&ack, port(n), backup));
    }
    assert!(reason(&rig, PassReason::FlowTableFull) > 0);
    assert_eq!(rig.datapath.sweep(None)?.pressure_percent, 100);
    Ok(())
}
