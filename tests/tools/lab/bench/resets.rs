//! Established connections when a breaker opens: how soon they are reset, and what that costs.

use std::{
    io::{Read as _, Write as _},
    net::{SocketAddr, TcpStream},
    time::{Duration, Instant},
};

use anyhow::{Context as _, Result, ensure};
use breaker_agent::process;
use breaker_api::events::EventType;
use breaker_common::BreakerState;
use breaker_tests::lab::stage::{Checks, Lab, SERVICE};
use rustix::process::{Resource, Rlimit, Signal, getrlimit, setrlimit};

use super::{Row, median};

const LONG: Duration = Duration::from_secs(60);
/// Established connections of the service.
const MANY: usize = 10_000;
/// Clients that wait for a primary that hangs, and how often that is measured.
const WAITING: usize = 8;
const TIMES: usize = 5;
/// Connections that are reset without a pause (docs/KUBERNETES.md).
const AT_ONCE: usize = 200;

pub(super) fn rows() -> Result<Vec<Row>> {
    // Both ends of each connection are files of this process and of its child.
    let most = getrlimit(Resource::Nofile).maximum;
    setrlimit(Resource::Nofile, Rlimit { current: most, maximum: most }).context("raise the number of open files")?;
    let mut rows = vec![waiting()?];
    let planned = (MANY - AT_ONCE) as f64 / 1000.0;
    let (took, cpu) = many(1000)?;
    rows.push(row("10,000 at 1,000 a second", took, "s", Some((planned, "planned")), "0.9 to 1.1"));
    rows.push(row("10,000 at 1,000 a second, the agent's CPU time", cpu, "% CPU", None, "≤ 8"));
    let (took, _) = many(100_000)?;
    rows.push(row("10,000 without a pace", took, "s", None, "≤ 1.5"));
    Ok(rows)
}

fn row(name: &str, value: f64, unit: &'static str, base: Option<(f64, &str)>, aim: &'static str) -> Row {
    Row {
        name: format!("resets: {name}"),
        value,
        unit,
        base: base.map_or_else(String::new, |(base, what)| format!("{what}: {base:.1}")),
        ratio: base.map(|(base, _)| value / base),
        spread: None,
        aim,
    }
}

/// Eight clients have sent a request to a primary that hangs. Milliseconds from the opening to the reset of the last one.
fn waiting() -> Result<Row> {
    let mut times = Vec::new();
    for _ in 0..TIMES {
        let lab = start(1000)?;
        let mut streams = connect(&lab, WAITING)?;
        lab.primary.signal(Signal::STOP)?;
        for stream in &mut streams {
            stream.write_all(b"GET / HTTP/1.1\r\nHost: lab\r\n\r\n")?;
        }
        all_reset(&mut streams)?;
        let end = jiff::Timestamp::now();
        let opened = lab.agent.events()?.into_iter().find(|event| event.to == Some(BreakerState::Open));
        let opened = opened.context("the breaker did not open")?.at;
        times.push(end.duration_since(opened).as_secs_f64() * 1000.0);
        lab.primary.signal(Signal::CONT)?;
    }
    Ok(row("8 that wait, the last one", median(&times), "ms", None, "≤ 50"))
}

/// Resets many idle connections. Returns the seconds until the last one was reset, and the agent's CPU time meanwhile in
/// percent of a core.
fn many(per_second: u32) -> Result<(f64, f64)> {
    let lab = start(per_second)?;
    let mut streams = connect(&lab, MANY)?;
    let cpu = || -> Result<f64> { Ok(process::of(lab.agent.pid()?).context("the agent's CPU time")?.cpu_seconds) };
    let (before, started) = (cpu()?, Instant::now());
    lab.agent.cli(&["trip", SERVICE])?;
    all_reset(&mut streams)?;
    let took = started.elapsed().as_secs_f64();
    let used = cpu()? - before;
    let said = lab.agent.events()?.into_iter().rfind(|event| event.kind == EventType::Resets);
    eprintln!("resets: {}", said.map(|event| event.message).unwrap_or_default());
    Ok((took, used / took * 100.0))
}

fn start(per_second: u32) -> Result<Lab> {
    let mut lab = Lab::with(Checks::Fast, &format!("    resetsPerSecond: {per_second}\n"))?;
    lab.agent.start()?;
    lab.agent.wait_all_up(LONG)?;
    Ok(lab)
}

fn connect(lab: &Lab, count: usize) -> Result<Vec<TcpStream>> {
    let target = SocketAddr::V4(lab.vip);
    lab.client.ns.sysctl(&["net.ipv4.ip_local_port_range=1024 65535"])?;
    let streams = lab.client.ns.enter(move || {
        (0..count).map(|_| TcpStream::connect_timeout(&target, LONG)).collect::<std::io::Result<Vec<_>>>()
    })?;
    let mut streams = streams.context("connect")?;
    for stream in &mut streams {
        stream.set_read_timeout(Some(LONG))?;
    }
    Ok(streams)
}

/// Waits until all connections are reset.
fn all_reset(streams: &mut [TcpStream]) -> Result<()> {
    for stream in streams {
        let end = stream.read(&mut [0; 64]);
        let is_reset = end.as_ref().is_err_and(|error| error.kind() == std::io::ErrorKind::ConnectionReset);
        ensure!(is_reset, "a connection ended otherwise: {end:?}");
    }
    Ok(())
}
