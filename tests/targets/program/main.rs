//! Program tier: runs each eBPF program in the kernel (BPF_PROG_TEST_RUN) on one packet at a time, and checks the
//! verdict, the resulting packet and the effect on the maps.
#![allow(clippy::unwrap_used, reason = "a test may panic")]

mod datagrams;
mod decisions;
mod differential;
mod errors;
mod families;
mod fast_path;
mod filter;
mod flows;
mod footprint;
mod limits;
mod many_cpus;
mod repeated;
mod selection;
mod translation;
mod verifier;
mod xdp;

use anyhow::Result;
use breaker_common::{
    BreakerState::{Closed, HalfOpen, Open},
    PassReason,
};
use breaker_core::datapath::{Datapath as _, Sweep};
use breaker_tests::packets::{
    NEXT, RunResult, Segment, TestRig,
    flags::{ACK, PSH, SYN},
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

/// Number of flows whose connection is not over, in the tables of both families.
fn live_flows(sweep: &Sweep) -> usize {
    sweep.tables.iter().flat_map(|tables| tables.live).sum()
}

fn flow_count(rig: &mut TestRig) -> usize {
    live_flows(&rig.datapath.sweep(None).unwrap())
}

fn reason(rig: &TestRig, reason: PassReason) -> u64 {
    rig.datapath.reasons().unwrap().into_iter().find(|(r, _)| *r == reason).map_or(0, |(_, n)| n)
}
