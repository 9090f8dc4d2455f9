//! A large node: how soon new pods have programs, with many interfaces, many routes and changes of the default route.

use std::{
    fmt::Write as _,
    sync::atomic::{AtomicBool, Ordering},
    time::{Duration, Instant},
};

use anyhow::Result;
use breaker_tests::lab::{
    agent::Agent,
    stage::{Checks, Lab},
    wait_for,
};

use super::{Row, median, spread};

const VETHS: usize = 1000;
const ROUTES: u32 = 100_000;
/// New pods, and changes of the default route.
const PODS: usize = 10;
const LIMIT: Duration = Duration::from_secs(300);

pub(super) fn rows() -> Result<Vec<Row>> {
    let mut lab = Lab::new(Checks::Default)?;
    lab.agent.start()?;
    let alone = new_pods(&lab, "a", |_| Ok(()))?;
    let started = Instant::now();
    add_veths(&lab, VETHS)?;
    let attached = started.elapsed().as_secs_f64();
    add_routes(&lab)?;
    let over = AtomicBool::new(false);
    let (crowded, slowest) = std::thread::scope(|scope| -> Result<_> {
        let watcher = scope.spawn(|| slowest_status(&lab.agent, &over));
        let crowded = new_pods(&lab, "b", |number| change_default_route(&lab, number));
        over.store(true, Ordering::SeqCst);
        let slowest = watcher.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic))?;
        Ok((crowded?, slowest))
    })?;
    let row = |name: &str, value, unit, base: String, spread, aim| Row {
        name: format!("node: {name}"),
        value,
        unit,
        base,
        ratio: None,
        spread,
        aim,
    };
    let base = format!("without them: {:.0} ms", median(&alone));
    Ok(vec![
        row("1,000 new veths have programs", attached, "s", String::new(), None, ""),
        row(
            "a new pod, 1,000 veths, 100,000 routes",
            median(&crowded),
            "ms",
            base,
            Some(spread(&crowded)),
            "≤ 1 s more",
        ),
        row("the slowest status meanwhile", slowest, "ms", String::new(), None, "≤ 100"),
    ])
}

/// Adds one end of a veth after another to the node, and returns how many milliseconds each was without programs.
fn new_pods(lab: &Lab, prefix: &str, before: impl Fn(usize) -> Result<()>) -> Result<Vec<f64>> {
    let mut times = Vec::new();
    for number in 0..PODS {
        before(number)?;
        let name = format!("veth{prefix}{number:07x}");
        let started = Instant::now();
        let peer = format!("p{prefix}{number}");
        let lan = lab.world.lan().name();
        lab.world.node(0).ns().ip(&["link", "add", &name, "type", "veth", "peer", "name", &peer, "netns", lan])?;
        wait_for("programs", LIMIT, || {
            lab.agent.status().is_ok_and(|status| status.datapath.interfaces.contains(&name))
        })?;
        times.push(started.elapsed().as_secs_f64() * 1e3);
    }
    Ok(times)
}

/// Adds veths all at once and waits until they have programs.
fn add_veths(lab: &Lab, number: usize) -> Result<()> {
    let before = lab.agent.status()?.datapath.interfaces.len();
    let mut batch = String::new();
    for n in 0..number {
        let lan = lab.world.lan().name();
        writeln!(batch, "link add vethm{n:07x} type veth peer name m{n} netns {lan}")?;
    }
    lab.world.node(0).ns().ip_batch(&batch)?;
    wait_for("programs", LIMIT, || {
        lab.agent.status().is_ok_and(|status| status.datapath.interfaces.len() >= before + number)
    })
}

/// Routes of 172.16.0.0/12, as a node of a large cluster has them.
fn add_routes(lab: &Lab) -> Result<()> {
    let mut batch = String::new();
    for n in 0..ROUTES {
        let [.., a, b, c] = n.to_be_bytes();
        writeln!(batch, "route add blackhole 172.{}.{b}.{c}/32", 16 + a)?;
    }
    lab.world.node(0).ns().ip_batch(&batch)
}

/// Replaces the default route: the metric alternates.
fn change_default_route(lab: &Lab, number: usize) -> Result<()> {
    let ns = lab.world.node(0).ns();
    let (new, old) = if number.is_multiple_of(2) { ("500", "501") } else { ("501", "500") };
    ns.ip(&["route", "replace", "default", "dev", "lo", "metric", new])?;
    if number > 0 { ns.ip(&["route", "del", "default", "dev", "lo", "metric", old]) } else { Ok(()) }
}

/// Asks for the status again and again. Returns the longest time that an answer took, in milliseconds.
fn slowest_status(agent: &Agent, over: &AtomicBool) -> Result<f64> {
    let mut slowest = 0_f64;
    while !over.load(Ordering::SeqCst) {
        let started = Instant::now();
        agent.status()?;
        slowest = slowest.max(started.elapsed().as_secs_f64() * 1e3);
        std::thread::sleep(Duration::from_millis(5));
    }
    Ok(slowest)
}
