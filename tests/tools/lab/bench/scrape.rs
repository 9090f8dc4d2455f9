//! What metrics cost: the time and size of a scrape, how long the main loop keeps others waiting meanwhile, and what an
//! agent takes that has nothing to do but to check.

use std::{
    fmt::Write as _,
    net::{Ipv4Addr, SocketAddrV4},
    time::{Duration, Instant},
};

use anyhow::{Context as _, Result, ensure};
use breaker_tests::lab::{
    stage::{Checks, Lab, entry},
    wait_for,
};

use super::{Row, median, spread};

const LIMIT: Duration = Duration::from_secs(120);
const TIMES: usize = 15;
/// Breakers whose checks are made every second, for the agent's idle CPU time.
const IDLE: u32 = 100;
const IDLE_TIME: Duration = Duration::from_secs(20);

pub(super) fn rows() -> Result<Vec<Row>> {
    let mut rows = scrapes(1000, "node", "≤ 50", "")?;
    rows.extend(scrapes(10_000, "", "≤ 100", "≤ 1")?);
    rows.push(idle()?);
    Ok(rows)
}

fn row(name: String, value: f64, unit: &'static str, spread: Option<f64>, aim: &'static str) -> Row {
    Row { name: format!("scrape: {name}"), value, unit, base: String::new(), ratio: None, spread, aim }
}

/// A lab whose agent protects `count` services of the same two pods, with a check every `period` seconds.
fn start(count: u32, period: u32) -> Result<Lab> {
    let mut lab = Lab::new(Checks::Default)?;
    let mut services = String::from("services:\n");
    for number in 0..count {
        let vip = SocketAddrV4::new(Ipv4Addr::from(u32::from(Ipv4Addr::new(10, 44, 0, 0)) + number), 80);
        let name = format!("s{number}");
        services += &entry(&name, vip, lab.primary.address(), lab.backup.address(), Checks::Default, "")
            .replace("httpGet: {path: /ready}", &format!("httpGet: {{path: /ready}}, periodSeconds: {period}"));
    }
    let agent = format!("  metricsListen: 127.0.0.1:9811\n  maxServices: {}\n", count.max(1024) + 64);
    lab.agent.write_config(&agent, &services)?;
    lab.agent.start()?;
    wait_for("all services", LIMIT, || {
        lab.agent.status().is_ok_and(|status| {
            status.services.len() == count as usize && status.services.iter().all(|service| service.applied.is_some())
        })
    })?;
    Ok(lab)
}

/// Scrapes an agent with `count` breakers at a level; the default one if it is empty.
fn scrapes(count: u32, level: &str, time_aim: &'static str, size_aim: &'static str) -> Result<Vec<Row>> {
    let lab = start(count, 60)?;
    let mut url = String::from("http://127.0.0.1:9811/metrics");
    if !level.is_empty() {
        let _ = write!(url, "?level={level}");
    }
    let (mut times, mut waits, mut bytes) = (Vec::new(), Vec::new(), 0.0);
    for _ in 0..TIMES {
        // A text serves others for half a second.
        std::thread::sleep(Duration::from_millis(600));
        let started = Instant::now();
        let ask = |url: &str| {
            lab.world
                .node(0)
                .ns()
                .output("curl", &["-s", "-o", "/dev/null", "-w", "%{time_total} %{size_download} %{http_code}", url])
        };
        let (answer, wait) = std::thread::scope(|scope| {
            let scrape = scope.spawn(|| ask(&url));
            // Somebody else asks the main loop in the middle of the scrape.
            std::thread::sleep(Duration::from_millis(5));
            let asked = Instant::now();
            let status = lab.agent.service("s0").map(|_| asked.elapsed().as_secs_f64() * 1e3);
            (scrape.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic)), status)
        });
        let answer = answer?;
        let mut words = answer.split(' ');
        let mut number = || -> Result<f64> { Ok(words.next().context("no word")?.parse()?) };
        let (seconds, size, status) = (number()?, number()?, number()?);
        ensure!((status - 200.0).abs() < 0.5, "{answer}");
        ensure!(started.elapsed() < LIMIT);
        times.push(seconds * 1e3);
        waits.push(wait?);
        bytes = size;
    }
    let name = match level {
        "" => format!("{count} breakers, by default"),
        level => format!("{count} breakers, level={level}"),
    };
    let slowest = waits.iter().copied().fold(0.0, f64::max);
    Ok(vec![
        row(name.clone(), median(&times), "ms", Some(spread(&times)), time_aim),
        row(format!("{name}, size"), bytes / f64::from(1 << 20), "MiB", None, size_aim),
        row(format!("{name}, the slowest other request"), slowest, "ms", None, ""),
    ])
}

/// CPU time of an agent with [`IDLE`] breakers that are checked every second, in percent of one CPU.
fn idle() -> Result<Row> {
    let lab = start(IDLE, 1)?;
    let used = || -> Result<f64> { Ok(lab.agent.status()?.process.context("no process")?.cpu_seconds) };
    std::thread::sleep(Duration::from_secs(5));
    let (before, started) = (used()?, Instant::now());
    std::thread::sleep(IDLE_TIME);
    let percent = (used()? - before) / started.elapsed().as_secs_f64() * 100.0;
    Ok(row(format!("CPU time of an agent with {IDLE} breakers, checks every second"), percent, "%", None, "≤ 0.5"))
}
