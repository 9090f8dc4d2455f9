//! XDP on an uplink: the program answers packets that must be refused with the same bytes as the tc program, and
//! passes all others untouched.

use std::net::SocketAddr;

use anyhow::Result;
use breaker_common::BreakerState::{Closed, HalfOpen, Open};
use breaker_core::datapath::Datapath as _;
use breaker_tests::packets::{
    Datagram, Segment, TestRig, XDP_PASS, XDP_TX,
    flags::{ACK, RST, SYN},
    plan, plan_with, pod, pod6, service_with, vip, vip6,
};

/// Client, VIP and backup of each IP family.
const FAMILIES: [(SocketAddr, SocketAddr, SocketAddr); 2] =
    [(pod(4, 40_000), vip(10), pod(3, 80)), (pod6(4, 40_000), vip6(10), pod6(3, 80))];

#[test]
fn what_is_refused_is_answered_as_tc_answers_it() -> Result<()> {
    for (client, vip, backup) in FAMILIES {
        let mut rig = TestRig::new()?;
        let service = service_with("dummy", &[(vip, "TCP"), (vip, "UDP")], &[backup], "whenAllUnhealthy: Reject,")?;
        rig.apply(&plan_with(&service, Open, 2, 0, false, &[]))?;
        let syn = Segment { tcp_options: vec![2, 4, 5, 180, 1, 1, 4, 2], ..Segment::new(client, vip, SYN) };
        let fast_open = Segment { sequence: u32::MAX, payload: b"fast open".to_vec(), ..syn.clone() };
        let datagrams = [&b""[..], b"question", &[7; 900]].map(|payload| Datagram::new(client, vip, payload).bytes());
        for packet in [syn.bytes(), fast_open.bytes()].into_iter().chain(datagrams) {
            let (action, answer) = rig.run_xdp(&packet)?;
            let by_tc = rig.run("breaker_up", &packet)?;
            assert_eq!(action, XDP_TX);
            assert_eq!(answer, by_tc.bytes);
        }
        // Every packet was refused twice.
        assert_eq!(rig.datapath.counters(&service.name)?.rejected, 10);
    }
    Ok(())
}

#[test]
fn all_else_goes_on_untouched() -> Result<()> {
    for (client, vip, backup) in FAMILIES {
        let service = |extra: &str| service_with("dummy", &[(vip, "TCP"), (vip, "UDP")], &[backup], extra);
        let reject = service("whenAllUnhealthy: Reject,")?;
        let dry = service("whenAllUnhealthy: Reject, mode: DryRun,")?;
        let refusing = plan_with(&reject, Open, 2, 0, false, &[]);
        let syn = Segment::new(client, vip, SYN).bytes();
        let datagram = Datagram::new(client, vip, b"question").bytes();
        let other = Segment::new(client, SocketAddr::new(vip.ip(), 81), SYN).bytes();
        let rows = vec![
            ("closed", plan(&reject, Closed, 2), syn.clone()),
            ("half-open", plan_with(&reject, HalfOpen, 2, 0, true, &[]), syn.clone()),
            ("a backup is usable", plan(&reject, Open, 2), syn.clone()),
            ("a datagram, a backup is usable", plan(&reject, Open, 2), datagram),
            ("passed by policy", plan_with(&service("")?, Open, 2, 0, false, &[]), syn.clone()),
            ("a dry run", plan_with(&dry, Open, 2, 0, false, &[]), syn.clone()),
            ("another port", refusing.clone(), other),
            ("a segment of a connection", refusing.clone(), Segment::new(client, vip, ACK).bytes()),
            ("a reset", refusing.clone(), Segment::new(client, vip, RST).bytes()),
        ];
        for (why, plan, packet) in rows {
            let mut rig = TestRig::new()?;
            rig.apply(&plan)?;
            assert_eq!(rig.run_xdp(&packet)?, (XDP_PASS, packet), "{why}");
        }
        // Truncated frames, of every length that the kernel runs a program on.
        let mut rig = TestRig::new()?;
        rig.apply(&refusing)?;
        for length in 14..syn.len() {
            assert_eq!(rig.run_xdp(&syn[..length])?, (XDP_PASS, syn[..length].to_vec()), "{length} bytes");
        }
    }
    Ok(())
}

/// A datagram of a known flow is left to tc.
#[test]
fn a_flow_that_is_known_is_tcs() -> Result<()> {
    let (client, vip, backup) = FAMILIES[0];
    let service = service_with("dummy", &[(vip, "UDP")], &[backup], "whenAllUnhealthy: Reject,")?;
    let mut rig = TestRig::new()?;
    rig.apply(&plan(&service, Open, 2))?;
    let datagram = Datagram::new(client, vip, b"question").bytes();
    rig.run("breaker_up", &datagram)?;
    rig.apply(&plan_with(&service, Open, 3, 0, true, &[]))?;
    assert_eq!(rig.run_xdp(&datagram)?, (XDP_PASS, datagram));
    Ok(())
}
