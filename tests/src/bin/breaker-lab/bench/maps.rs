//! What changing the maps costs: a flip, and a whole new set of slots, with few and with many services.

use std::{
    net::{Ipv4Addr, SocketAddr},
    time::Instant,
};

use anyhow::Result;
use breaker_agent::{datapath::plan::ServicePlan, model::Service};
use breaker_common::BreakerState::{Closed, Open};
use breaker_tests::packets::{Rig, plan, plan_with, pod, service};

use super::{Row, median, spread};

const TIMES: u32 = 200;

/// The plan of a service for a turn.
type Flip = fn(&Service, u32) -> ServicePlan;

pub(super) fn rows() -> Result<Vec<Row>> {
    let mut few = Rig::new()?;
    let mut many = Rig::new()?;
    let services: Vec<Service> = (0..1000u16)
        .map(|n| {
            let [high, low] = n.to_be_bytes();
            let vip = SocketAddr::new(Ipv4Addr::new(10, 43, high, low).into(), 8080);
            service(&format!("s{n}"), vip, &[pod(3, 80), pod(5, 80)], "")
        })
        .collect::<Result<_>>()?;
    for (n, service) in services.iter().enumerate() {
        let plan = plan(service, Closed, 1);
        if n < 10 {
            few.apply(&plan)?;
        }
        many.apply(&plan)?;
    }
    let mut rows = Vec::new();
    let flips: [(&str, Flip); 2] = [
        ("a flip", |s, n| plan(s, if n.is_multiple_of(2) { Open } else { Closed }, n)),
        ("a flip with other slots", |s, n| {
            let backends = &s.backups[0].backends;
            plan_with(s, Open, n, 0, false, &backends[..1 + (n as usize % 2)])
        }),
    ];
    for (name, flip) in flips {
        let (mut values, mut ratios) = (Vec::new(), Vec::new());
        for n in 0..TIMES {
            let time = |rig: &mut Rig| -> Result<f64> {
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
            name: format!("maps: {name}, 1,000 services"),
            value: median(&values),
            unit: "µs",
            base: "10 services".into(),
            ratio: Some(median(&ratios)),
            spread: Some(spread(&ratios)),
            aim: "the same",
        });
    }
    Ok(rows)
}
