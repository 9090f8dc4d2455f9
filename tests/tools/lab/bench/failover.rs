//! Time from the end of a fault's injection to the first success after the last failure, compared with HAProxy with the
//! same checks.

use std::time::{Duration, Instant};

use anyhow::Result;
use breaker_tests::lab::{
    client::{Load, Plan, Record},
    kubeproxy,
    service::Fault,
    stage::{Checks, Lab},
};

use super::{Row, http::Ambassador, median, spread};

/// Outages per fault. Odd, so that the median is one of the measured values.
const TIMES: usize = 9;

pub(super) fn rows() -> Result<Vec<Row>> {
    // breaker and HAProxy each have a lab of their own; the outages take turns.
    let mut ours = Lab::new(Checks::Fast)?;
    ours.agent.start()?;
    ours.agent.wait_all_up(Duration::from_secs(10))?;
    let mut theirs = Lab::new(Checks::Fast)?;
    let proxy = Ambassador::start(&mut theirs, "inter 100 fall 3 rise 1")?;
    let vip = kubeproxy::vip(5);
    let service =
        kubeproxy::Service { name: "ambassador".into(), vip, endpoints: vec![proxy.address], protocols: &["tcp"] };
    kubeproxy::add_service(theirs.world.node(0).ns(), &service)?;
    let mut rows = Vec::new();
    for fault in Fault::ALL {
        let (mut a, mut b) = (Vec::new(), Vec::new());
        for _ in 0..TIMES {
            let target = ours.vip;
            a.push(outage(&mut ours, target, fault)?);
            b.push(outage(&mut theirs, vip, fault)?);
        }
        let pick = |outages: &[(f64, f64)], failed: bool| -> Vec<f64> {
            outages.iter().map(|o| if failed { o.1 } else { o.0 }).collect()
        };
        for (what, unit, failed) in [("recovered", "ms", false), ("failed requests", "", true)] {
            let (mine, base) = (pick(&a, failed), pick(&b, failed));
            rows.push(Row {
                name: format!("failover: {}, {what}", fault.name()),
                value: median(&mine),
                unit,
                base: format!("HAProxy, 100 ms x 3: {:.0}", median(&base)),
                ratio: Some(median(&mine) / median(&base)),
                spread: Some(spread(&mine) / median(&base)),
                aim: if failed || fault == Fault::BlackHole { "" } else { "≤ 1" },
            });
        }
    }
    Ok(rows)
}

/// Runs one outage. Returns the milliseconds until recovery, and the number of failed requests.
fn outage(lab: &mut Lab, target: std::net::SocketAddrV4, fault: Fault) -> Result<(f64, f64)> {
    const LONG: Duration = Duration::from_secs(20);
    let (primary, backup) = (lab.primary.address().to_string(), lab.backup.address().to_string());
    let load = Load::start(&lab.client.ns, Plan::usual(target))?;
    let all_from = |records: &[Record], pod: &str| {
        let new = records.iter().rev().filter(|r| !r.keep_alive).take(60);
        new.clone().count() == 60 && new.clone().all(|r| r.outcome.pod() == Some(pod))
    };
    load.wait("the primary to answer", LONG, |records| all_from(records, &primary))?;
    // The load is first answered right after a check. Without a random delay the fault would always come at the same
    // offset between two checks, and this offset would differ between breaker and HAProxy.
    std::thread::sleep(Duration::from_millis(fastrand::u64(0..100)));
    lab.primary.inject(fault)?;
    let injected = Instant::now();
    load.wait("the backup to answer", LONG, |records| all_from(records, &backup))?;
    // Requests that hang are recorded when they reach their time limit of 1 s.
    std::thread::sleep(Duration::from_millis(1200));
    lab.primary.heal(fault)?;
    let healed = Instant::now();
    load.wait("the primary to answer again", LONG, |records| all_from(records, &primary))?;
    let records = load.stop()?;
    let failed: Vec<&Record> = records.iter().filter(|r| !r.outcome.is_success() && r.at < healed).collect();
    let last = failed.iter().map(|r| r.at).max();
    let recovered = records
        .iter()
        .find(|r| r.at > injected && r.outcome.is_success() && last.is_none_or(|last| r.at > last))
        .map_or(f64::NAN, |r| (r.at - injected).as_secs_f64() * 1000.0);
    #[expect(clippy::cast_precision_loss, reason = "a few hundred")]
    Ok((recovered, failed.len() as f64))
}
