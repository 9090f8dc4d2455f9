//! Backends on this node: the fast path, which bypasses the host network stack (`fastPath: PeerRedirect`), and
//! external clients that keep their address (`externalTrafficPolicy: Local`).

use std::{collections::HashMap, net::SocketAddr};

use anyhow::Result;
use breaker_agent::datapath::neighbors::LocalPods;
use breaker_common::BreakerState::{Closed, Open};
use breaker_core::{
    datapath::{Datapath as _, FlowPath, FlowPhase},
    model::Service,
};
use breaker_tests::packets::{
    Datagram, NEXT, REDIRECT, Segment, TestRig,
    flags::{ACK, PSH, RST, SYN},
    plan, pod, pod6, service, service_with, vip, vip6,
};

use super::{flow_count, with_endpoints};

const FAST: &str = "fastPath: PeerRedirect,";
/// kube-proxy's masquerade mark.
const MARK: u32 = 0x4000;
/// Client, VIP and backup of each IP family.
const FAMILIES: [(SocketAddr, SocketAddr, SocketAddr); 2] =
    [(pod(4, 40_000), vip(10), pod(3, 80)), (pod6(4, 40_000), vip6(10), pod6(3, 80))];

/// Tells the datapath that these pods are on this node.
fn set_local_pods(rig: &mut TestRig, pods: &[SocketAddr]) {
    rig.datapath.set_local_pods(pods.iter().map(|pod| (pod.ip(), 1)).collect::<LocalPods>());
}

fn rig(service: &Service, pods: &[SocketAddr]) -> Result<TestRig> {
    let mut rig = TestRig::new()?;
    set_local_pods(&mut rig, pods);
    rig.apply(&plan(service, Open, 5))?;
    Ok(rig)
}

/// Opens a fast-path flow with a SYN, and returns the client's address and port as the backend sees them. The port is
/// one from 1024 to 32767, which a client's kernel does not choose by default.
fn open_fast_flow(rig: &mut TestRig, client: SocketAddr, vip: SocketAddr) -> Result<SocketAddr> {
    let ran = rig.from_pod(&Segment::new(client, vip, SYN))?;
    assert_eq!((ran.action, ran.mark), (REDIRECT, 0));
    let seen = Segment::read(&ran.bytes)?.source;
    assert!(seen.ip() == client.ip() && (1024..32768).contains(&seen.port()), "{seen}");
    Ok(seen)
}

/// Each direction is translated on the sender's veth and redirected; no packet passes the egress of the client's
/// veth.
#[test]
fn a_fast_flow_goes_from_veth_to_veth_both_ways() -> Result<()> {
    for (client, vip, backup) in FAMILIES {
        let mut rig = rig(&service("dummy", vip, &[backup], FAST)?, &[backup])?;
        let seen = open_fast_flow(&mut rig, client, vip)?;
        for (flags, payload) in [(ACK, &b""[..]), (ACK | PSH, b"GET / HTTP/1.1\r\n\r\n")] {
            let there = Segment::new(client, vip, flags).data(5, 6, payload);
            let ran = rig.from_pod(&there)?;
            assert_eq!((ran.action, ran.mark), (REDIRECT, 0));
            assert_eq!(Segment::read(&ran.bytes)?, with_endpoints(&there, seen, backup));
            let back = Segment::new(backup, seen, flags | ACK).data(7, 8, payload);
            let ran = rig.from_pod(&back)?;
            assert_eq!(ran.action, REDIRECT);
            assert_eq!(Segment::read(&ran.bytes)?, with_endpoints(&back, vip, client));
        }
        let ran = rig.from_pod(&Segment::new(client, vip, ACK))?;
        assert_eq!(ran.action, REDIRECT);
        assert_eq!(flow_count(&mut rig), 1);
        let flows = rig.datapath.flows(&service("dummy", vip, &[backup], "")?.name, 9)?;
        assert_eq!((flows[0].path, flows[0].phase), (FlowPath::Veth, FlowPhase::Established));
        assert_eq!(rig.datapath.counters(&service("dummy", vip, &[backup], "")?.name)?.port_changed, 0, "no collision");
    }
    Ok(())
}

/// The program gives each fast-path flow a source port of its own, because conntrack does not see these flows. The
/// client may use the same port toward the same pod, by the pod's own address or by a Service that is not protected.
#[test]
fn a_fast_flow_has_a_port_of_its_own() -> Result<()> {
    let (client, vip, backup) = FAMILIES[0];
    let mut rig = rig(&service("dummy", vip, &[backup], FAST)?, &[backup])?;
    let seen = open_fast_flow(&mut rig, client, vip)?;
    // A connection from the same port to the pod itself goes through the host stack, and its answers stay untouched.
    let direct = Segment::new(client, backup, SYN);
    assert_eq!(rig.from_pod(&direct)?.bytes, direct.bytes());
    let answer = Segment::new(backup, client, SYN | ACK);
    let ran = rig.from_pod(&answer)?;
    assert_eq!((ran.action, ran.bytes), (NEXT, answer.bytes()));
    assert_eq!(rig.from_pod(&Segment::new(backup, seen, SYN | ACK))?.action, REDIRECT);
    // Every source port of a client is mapped to a different one.
    let mut ports: Vec<u16> = Vec::new();
    for port in 32768..33768 {
        ports.push(open_fast_flow(&mut rig, pod(5, port), vip)?.port());
    }
    ports.sort_unstable();
    ports.dedup();
    assert_eq!(ports.len(), 1000);
    Ok(())
}

/// Without the policy, or with the backup on another node, packets go through the host stack, and the reply is
/// translated on the client's veth.
#[test]
fn others_go_by_the_stack() -> Result<()> {
    for (client, vip, backup) in FAMILIES {
        for (policy, is_near) in [("", true), (FAST, false)] {
            let pods = if is_near { vec![backup] } else { Vec::new() };
            let mut rig = rig(&service("dummy", vip, &[backup], policy)?, &pods)?;
            let syn = Segment::new(client, vip, SYN);
            let ran = rig.from_pod(&syn)?;
            assert_eq!((ran.action, Segment::read(&ran.bytes)?), (NEXT, with_endpoints(&syn, client, backup)));
            let answer = Segment::new(backup, client, SYN | ACK);
            let ran = rig.from_pod(&answer)?;
            assert_eq!((ran.action, Segment::read(&ran.bytes)?), (NEXT, answer.clone()), "on the backup's own veth");
            let ran = rig.to_pod(&answer)?;
            assert_eq!((ran.action, Segment::read(&ran.bytes)?), (NEXT, with_endpoints(&answer, vip, client)));
        }
    }
    Ok(())
}

/// A flow's path is fixed by its first packet, because conntrack does not pick up a connection in the middle.
#[test]
fn a_flow_keeps_its_way() -> Result<()> {
    let (client, vip, backup) = FAMILIES[0];
    let (slow, fast) = (service("dummy", vip, &[backup], "")?, service("dummy", vip, &[backup], FAST)?);
    let data = Segment::new(client, vip, ACK | PSH).data(5, 6, b"x");
    let mut rig = rig(&fast, &[backup])?;
    let seen = open_fast_flow(&mut rig, client, vip)?;
    rig.apply(&plan(&slow, Open, 6))?;
    assert_eq!(rig.from_pod(&data)?.action, REDIRECT, "began on the fast path");
    assert_eq!(flow_count(&mut rig), 1);
    assert_eq!(flow_count(&mut rig), 1);
    assert_eq!(rig.from_pod(&Segment::new(backup, seen, ACK))?.action, REDIRECT, "answers too, after sweeps");
    let other = pod(4, 40_001);
    rig.from_pod(&Segment::new(other, vip, SYN))?;
    rig.apply(&plan(&fast, Open, 7))?;
    assert_eq!(rig.from_pod(&with_endpoints(&data, other, vip))?.action, NEXT, "began in the host stack");
    assert_eq!(rig.from_pod(&Segment::new(backup, other, ACK))?.action, NEXT);
    Ok(())
}

/// A pod drops packets that have its own address as source. Hairpin flows therefore need netfilter's masquerading,
/// which is in the host stack.
#[test]
fn hairpin_is_never_fast() -> Result<()> {
    let (_, vip, backup) = FAMILIES[0];
    let mut rig = rig(&service("dummy", vip, &[backup], FAST)?, &[backup])?;
    let ran = rig.from_pod(&Segment::new(SocketAddr::new(backup.ip(), 5000), vip, SYN))?;
    assert_eq!((ran.action, ran.mark), (NEXT, MARK));
    Ok(())
}

/// A packet that a backup pod sends as a client is not taken for an answer.
#[test]
fn a_backup_is_a_client_as_well() -> Result<()> {
    let (client, vip, backup) = FAMILIES[0];
    let mut rig = rig(&service("dummy", vip, &[backup], FAST)?, &[backup])?;
    rig.from_pod(&Segment::new(client, vip, SYN))?;
    // From the port of the backup's service, to a pod that has no flow to the backup.
    let stray = Segment::new(backup, pod(5, 40_000), SYN | ACK);
    let ran = rig.from_pod(&stray)?;
    assert_eq!((ran.action, ran.bytes), (NEXT, stray.bytes()));
    Ok(())
}

/// `onClose: Reset` resets both ends of a fast-path flow; the reset to the backup takes the fast path.
#[test]
fn resets_reach_a_fast_peer() -> Result<()> {
    let (client, vip, backup) = FAMILIES[0];
    let service = service("dummy", vip, &[backup], &format!("{FAST} onClose: Reset,"))?;
    let mut rig = rig(&service, &[backup])?;
    let seen = open_fast_flow(&mut rig, client, vip)?;
    rig.apply(&breaker_tests::packets::plan_with(&service, Closed, 6, 1000, true, &service.backups[0].backends))?;
    let ran = rig.from_pod(&Segment::new(client, vip, ACK | PSH).data(5, 6, b"x"))?;
    assert_eq!(ran.action, REDIRECT);
    let reset = Segment::read(&ran.bytes)?;
    assert_eq!((reset.source, reset.destination, reset.flags & RST), (seen, backup, RST));
    Ok(())
}

/// ICMP errors and fragments take the path of the flow that they belong to.
#[test]
fn errors_and_fragments_of_fast_datagrams() -> Result<()> {
    let (client, vip, backup) = (pod(4, 5000), vip(10), pod(3, 53));
    let service = service_with("dns", &[(vip, "UDP")], &[backup], FAST)?;
    let mut rig = rig(&service, &[backup])?;
    let question = Datagram::new(client, vip, b"question").bytes();
    let sent = rig.raw_from_pod(&question)?;
    assert_eq!(sent.action, REDIRECT);
    let seen = Datagram::read(&sent.bytes)?.source;
    // The backup's "port unreachable" quotes the packet that the backup received.
    let error = unreachable(backup, seen, &sent.bytes[14..]);
    let ran = rig.raw_from_pod(&error)?;
    assert_eq!(ran.action, REDIRECT);
    assert_eq!(ran.bytes[14 + 20 + 8..][..20 + 8], question[14..][..20 + 8], "the quote is the client's own packet");
    // The client's "port unreachable" about an answer.
    let answer = Datagram::new(backup, seen, b"answer").bytes();
    let got = rig.raw_from_pod(&answer)?;
    let ran = rig.raw_from_pod(&unreachable(client, vip, &got.bytes[14..]))?;
    assert_eq!(ran.action, REDIRECT);
    assert_eq!(ran.bytes[14 + 20 + 8..][..20 + 8], answer[14..][..20 + 8]);
    // Fragments in both directions.
    for (packet, from, to) in [(&question, client, backup), (&answer, vip, client)] {
        let [first, second] = fragments(packet);
        assert_eq!(rig.raw_from_pod(&first)?.action, REDIRECT);
        let ran = rig.raw_from_pod(&second)?;
        assert_eq!(ran.action, REDIRECT);
        let ends = (ran.bytes[26..30].to_vec(), ran.bytes[30..34].to_vec());
        assert_eq!(ends, (octets(from), octets(to)));
    }
    Ok(())
}

/// An external client on the fast path: its packets go from the uplink into the backup's veth, and the answers from
/// there out of the uplink. They bypass the host network stack, so the client keeps its address whatever
/// `externalTrafficPolicy` says.
#[test]
fn clients_outside_go_past_the_stack() -> Result<()> {
    let outside = |v6| if v6 { pod6(200, 40_000) } else { SocketAddr::from(([172, 31, 0, 1], 40_000)) };
    for (_, vip, backup) in FAMILIES {
        let client = outside(vip.is_ipv6());
        for local in [false, true] {
            let mut service = service("dummy", vip, &[backup], &format!("{FAST} onClose: Reset,"))?;
            if local {
                service.keep_client.frontends = service.frontends.iter().copied().collect();
            }
            let mut rig = rig(&service, &[backup])?;
            let syn = Segment::new(client, vip, SYN);
            let ran = rig.run("breaker_up", &syn.bytes())?;
            assert_eq!((ran.action, ran.mark), (REDIRECT, 0));
            let seen = Segment::read(&ran.bytes)?.source;
            assert!(seen.ip() == client.ip() && (1024..32768).contains(&seen.port()), "{seen}");
            assert_eq!(Segment::read(&ran.bytes)?, with_endpoints(&syn, seen, backup));
            for flags in [SYN | ACK, ACK | PSH] {
                let back = Segment::new(backup, seen, flags).data(7, 8, b"");
                let ran = rig.from_pod(&back)?;
                assert_eq!((ran.action, Segment::read(&ran.bytes)?), (REDIRECT, with_endpoints(&back, vip, client)));
                let there = Segment::new(client, vip, ACK | PSH).data(5, 6, b"GET / HTTP/1.1\r\n\r\n");
                let ran = rig.run("breaker_up", &there.bytes())?;
                assert_eq!(
                    (ran.action, ran.mark, Segment::read(&ran.bytes)?),
                    (REDIRECT, 0, with_endpoints(&there, seen, backup))
                );
            }
            assert_eq!((flow_count(&mut rig), rig.datapath.flows(&service.name, 9)?[0].path), (1, FlowPath::Veth));
            // `onClose: Reset` resets both ends.
            rig.apply(&breaker_tests::packets::plan_with(
                &service,
                Closed,
                6,
                1000,
                true,
                &service.backups[0].backends,
            ))?;
            let there = Segment::new(client, vip, ACK | PSH).data(5, 6, b"x");
            let ran = rig.run("breaker_up", &there.bytes())?;
            let reset = Segment::read(&ran.bytes)?;
            assert_eq!((ran.action, reset.source, reset.destination, reset.flags & RST), (REDIRECT, seen, backup, RST));
        }
    }
    Ok(())
}

/// The fast path requires that answers to an external client leave by the interface that its packets come in by.
/// Where the node's routes say otherwise, the flow goes through the host stack, which knows the path.
#[test]
fn a_client_outside_whose_way_back_is_another_goes_by_the_stack() -> Result<()> {
    let (client, vip, backup) = (SocketAddr::from(([198, 51, 100, 1], 40_000)), vip(10), pod(3, 80));
    let mut service = service("dummy", vip, &[backup], FAST)?;
    service.keep_client.frontends = service.frontends.iter().copied().collect();
    let syn = Segment::new(client, vip, SYN);
    for (why, route) in [
        ("a route by another interface", &["add", "198.51.100.0/24", "dev", "aside"][..]),
        ("an unreachable route", &["add", "unreachable", "198.51.100.0/24"]),
    ] {
        let mut rig = rig(&service, &[backup])?;
        let ns = rig.node();
        ns.ip(&["link", "add", "aside", "type", "veth", "peer", "name", "beyond2"])?;
        ns.ip(&["link", "set", "aside", "up"])?;
        ns.ip(&["link", "set", "beyond2", "up"])?;
        ns.ip(&[&["route"], route].concat())?;
        let ran = rig.run("breaker_up", &syn.bytes())?;
        assert_eq!((ran.action, ran.mark), (NEXT, 0), "{why}");
        assert_eq!(Segment::read(&ran.bytes)?, with_endpoints(&syn, client, backup), "{why}");
        let answer = Segment::new(backup, client, SYN | ACK);
        let ran = rig.run("breaker_up_out", &answer.bytes())?;
        assert_eq!(Segment::read(&ran.bytes)?, with_endpoints(&answer, vip, client), "{why}");
    }
    Ok(())
}

/// ICMP errors and fragments of external clients take the path of their flow.
#[test]
fn errors_and_fragments_of_clients_outside() -> Result<()> {
    let (client, vip, backup) = (SocketAddr::from(([172, 31, 0, 1], 5000)), vip(10), pod(3, 53));
    let mut rig = rig(&service_with("dns", &[(vip, "UDP")], &[backup], FAST)?, &[backup])?;
    let question = Datagram::new(client, vip, b"question").bytes();
    let sent = rig.run("breaker_up", &question)?;
    assert_eq!(sent.action, REDIRECT);
    let seen = Datagram::read(&sent.bytes)?.source;
    let ran = rig.raw_from_pod(&unreachable(backup, seen, &sent.bytes[14..]))?;
    assert_eq!(ran.action, REDIRECT);
    assert_eq!(ran.bytes[14 + 20 + 8..][..20 + 8], question[14..][..20 + 8], "the quote is the client's own packet");
    let answer = Datagram::new(backup, seen, b"an answer").bytes();
    let got = rig.raw_from_pod(&answer)?;
    let ran = rig.run("breaker_up", &unreachable(client, vip, &got.bytes[14..]))?;
    assert_eq!(ran.action, REDIRECT);
    assert_eq!(ran.bytes[14 + 20 + 8..][..20 + 8], answer[14..][..20 + 8]);
    for (packet, program, from, to) in [(&question, "breaker_up", client, backup), (&answer, "breaker_in", vip, client)]
    {
        for part in fragments(packet) {
            let ran = rig.run(program, &part)?;
            assert_eq!((ran.action, ran.mark), (REDIRECT, 0));
            assert_eq!((ran.bytes[26..30].to_vec(), ran.bytes[30..34].to_vec()), (octets(from), octets(to)));
        }
    }
    Ok(())
}

fn octets(address: SocketAddr) -> Vec<u8> {
    match address {
        SocketAddr::V4(address) => address.ip().octets().to_vec(),
        SocketAddr::V6(address) => address.ip().octets().to_vec(),
    }
}

/// The frame of an ICMP "port unreachable" from `from` to `to`, which quotes the IP packet `about`.
fn unreachable(from: SocketAddr, to: SocketAddr, about: &[u8]) -> Vec<u8> {
    use etherparse::{Icmpv4Type, icmpv4::DestUnreachableHeader};
    let (SocketAddr::V4(from), SocketAddr::V4(to)) = (from, to) else { panic!("IPv4") };
    let builder = etherparse::PacketBuilder::ethernet2([2; 6], [4; 6])
        .ipv4(from.ip().octets(), to.ip().octets(), 64)
        .icmpv4(Icmpv4Type::DestinationUnreachable(DestUnreachableHeader::Port));
    let mut frame = Vec::new();
    builder.write(&mut frame, &about[..about.len().min(28)]).unwrap();
    frame
}

/// An IPv4 datagram in two fragments. The first one has the UDP header only; the second one has no ports.
fn fragments(packet: &[u8]) -> [Vec<u8>; 2] {
    let cut = |more: bool, offset: u16, payload: &[u8]| {
        let mut header = etherparse::Ipv4Header::from_slice(&packet[14..]).unwrap().0;
        header.more_fragments = more;
        header.identification = 77;
        header.dont_fragment = false;
        header.fragment_offset = offset.try_into().unwrap();
        header.set_payload_len(payload.len()).unwrap();
        header.header_checksum = header.calc_header_checksum();
        let mut frame = packet[..14].to_vec();
        header.write(&mut frame).unwrap();
        frame.extend_from_slice(payload);
        frame
    };
    let payload = &packet[34..];
    [cut(true, 0, &payload[..8]), cut(false, 1, &payload[8..])]
}

/// With `externalTrafficPolicy: Local`, an external client keeps its address toward a backend on this node.
#[test]
fn clients_outside_keep_their_address_toward_this_node() -> Result<()> {
    let (client, vip) = (SocketAddr::from(([172, 31, 0, 1], 40_000)), vip(10));
    let (here, there) = (pod(3, 80), SocketAddr::from(([10, 42, 9, 3], 80)));
    let rows: HashMap<&str, (&str, SocketAddr, u32)> = HashMap::from([
        ("Local, a pod of this node", ("Local", here, 0)),
        ("Local, a pod of another node", ("Local", there, MARK)),
        ("Cluster, a pod of this node", ("Cluster", here, MARK)),
    ]);
    for (why, (policy, backup, mark)) in rows {
        let mut service = service("dummy", vip, &[backup], "")?;
        if policy == "Local" {
            service.keep_client.frontends = service.frontends.iter().copied().collect();
        }
        let mut rig = rig(&service, &[here])?;
        let data = Segment::new(client, vip, ACK | PSH).data(5, 6, b"x");
        for segment in [Segment::new(client, vip, SYN), data] {
            let ran = rig.run("breaker_up", &segment.bytes())?;
            assert_eq!((ran.action, ran.mark), (NEXT, mark), "{why}");
            assert_eq!(Segment::read(&ran.bytes)?, with_endpoints(&segment, client, backup), "{why}");
        }
        let answer = Segment::new(backup, client, SYN | ACK);
        let ran = rig.run("breaker_up_out", &answer.bytes())?;
        assert_eq!(Segment::read(&ran.bytes)?, with_endpoints(&answer, vip, client), "{why}");
    }
    Ok(())
}
