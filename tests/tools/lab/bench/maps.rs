//! Cost of changes to the maps with few and with many services: a change of state, a change of state with a new
//! selection table, and a change of state of all services. Also the memory of the maps.

use std::{
    net::{Ipv4Addr, SocketAddr},
    os::fd::{AsFd as _, AsRawFd as _},
    time::Instant,
};

use anyhow::{Context as _, Result};
use aya::maps::MapData;
use breaker_agent::datapath::sizes::Sizes;
use breaker_common::BreakerState::{Closed, Open};
use breaker_core::{model::Service, plan::ServicePlan};
use breaker_tests::packets::{
    Segment, TestRig,
    flags::{ACK, SYN},
    plan, plan_with, pod, service, vip,
};

use super::{Row, median, spread};

const TIMES: u32 = 200;
const FEW: u32 = 10;
const MANY: u32 = 10_000;
/// Backends of each service.
const BACKENDS: u32 = 10;
const FLOWS: u32 = 1 << 18;

/// Creates the plan of a service for an epoch.
type Flip = fn(&Service, u32) -> ServicePlan;

pub(super) fn rows() -> Result<Vec<Row>> {
    let sizes = Sizes { backends: MANY * BACKENDS, tables: MANY + 16, ..Sizes::for_services(MANY) };
    let mut few = TestRig::with_sizes(&sizes)?;
    let mut many = TestRig::with_sizes(&sizes)?;
    let address = |first: u8, n: u32, port: u16| {
        let [_, a, b, c] = n.to_be_bytes();
        SocketAddr::new(Ipv4Addr::new(first, a, b, c).into(), port)
    };
    let services: Vec<Service> = (0..MANY)
        .map(|n| {
            let backends: Vec<_> = (0..BACKENDS).map(|b| address(11, n * BACKENDS + b, 80)).collect();
            service(&format!("s{n}"), address(12, n, 8080), &backends, "")
        })
        .collect::<Result<_>>()?;
    for (n, service) in (0..).zip(&services) {
        let plan = plan(service, Closed, 1);
        if n < FEW {
            few.apply(&plan)?;
        }
        many.apply(&plan)?;
    }
    let mut rows = Vec::new();
    let flips: [(&str, Flip); 2] = [
        ("a flip", |s, n| plan(s, if n.is_multiple_of(2) { Open } else { Closed }, n)),
        ("a flip with other slots", |s, n| {
            let backends = &s.backups[0].backends;
            plan_with(s, Open, n, 0, false, &backends[..9 + (n as usize % 2)])
        }),
    ];
    for (name, flip) in flips {
        let (mut values, mut ratios) = (Vec::new(), Vec::new());
        for n in 0..TIMES {
            let time = |rig: &mut TestRig| -> Result<f64> {
                let plan = flip(&services[5], n + 2);
                let started = Instant::now();
                rig.apply(&plan)?;
                Ok(started.elapsed().as_secs_f64() * 1e6)
            };
            let (a, b) = (time(&mut many)?, time(&mut few)?);
            values.push(a);
            ratios.push(a / b);
        }
        rows.push(Row {
            name: format!("maps: {name}, 10,000 services"),
            value: median(&values),
            unit: "µs",
            base: "10 services".into(),
            ratio: Some(median(&ratios)),
            spread: Some(spread(&ratios)),
            aim: "the same",
        });
    }
    rows.push(all_flips(&mut many, &services)?);
    rows.push(memory_of("10,000 services, 100,000 backends", &many, SERVICE_MAPS, "≤ 20")?);
    drop((few, many));
    let mut rig = TestRig::with_sizes(&Sizes::for_memory(1024).with_flows(FLOWS))?;
    establish(&mut rig, FLOWS)?;
    rows.push(memory_of("256k flows", &rig, &["FLOWS4", "REVERSE4"], "≤ 64")?);
    Ok(rows)
}

/// Time to change the state of every service once, in milliseconds.
fn all_flips(rig: &mut TestRig, services: &[Service]) -> Result<Row> {
    let mut values = Vec::new();
    for turn in 0..10 {
        let state = if turn % 2 == 0 { Open } else { Closed };
        let plans: Vec<_> = services.iter().map(|service| plan(service, state, 1000 + turn)).collect();
        let started = Instant::now();
        plans.iter().try_for_each(|plan| rig.apply(plan))?;
        values.push(started.elapsed().as_secs_f64() * 1e3);
    }
    Ok(Row {
        name: "maps: 10,000 flips".into(),
        value: median(&values),
        unit: "ms",
        base: String::new(),
        ratio: None,
        spread: Some(spread(&values)),
        aim: "≤ 20",
    })
}

const SERVICE_MAPS: &[&str] =
    &["SWITCHES", "SERVICES", "ROUTES", "RUNTIME", "SLOTS", "COUNTERS", "ENDPOINTS4", "BACKENDS4"];

/// Memory of maps by the kernel's account: `memlock` in /proc/PID/fdinfo. From kernel 6.4 on it covers the entries that
/// exist, before that the entries that the map may hold.
pub(super) fn memory_of(what: &str, rig: &TestRig, maps: &[&str], aim: &'static str) -> Result<Row> {
    let mut bytes = 0.0;
    for name in maps {
        let map = MapData::from_pin(rig.map(name)).with_context(|| format!("open {name}"))?;
        let fd = map.fd().as_fd().as_raw_fd();
        let info = std::fs::read_to_string(format!("/proc/self/fdinfo/{fd}")).context("read a map's fdinfo")?;
        let line = info.lines().find_map(|line| line.strip_prefix("memlock:")).context("no memlock in fdinfo")?;
        bytes += line.trim().parse::<f64>().context("parse memlock in fdinfo")?;
    }
    Ok(Row {
        name: format!("maps: memory of {what}"),
        value: bytes / 1e6,
        unit: "MB",
        base: String::new(),
        ratio: None,
        spread: None,
        aim,
    })
}

/// Opens `flows` connections that the backup answers, so that they are promoted to the established tables.
fn establish(rig: &mut TestRig, flows: u32) -> Result<()> {
    let (vip, backup) = (vip(10), pod(3, 80));
    rig.apply(&plan(&service("dummy", vip, &[backup], "")?, Open, 2))?;
    for flow in 0..flows {
        let port = 1024 + u16::try_from(flow & 0x7fff).unwrap_or(0);
        let client = pod(10 + u8::try_from(flow >> 15).unwrap_or(0), port);
        rig.from_pod(&Segment::new(client, vip, SYN))?;
        rig.to_pod(&Segment::new(backup, client, SYN | ACK))?;
        rig.from_pod(&Segment::new(client, vip, ACK))?;
    }
    Ok(())
}
