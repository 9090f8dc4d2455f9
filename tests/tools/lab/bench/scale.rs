//! Packets per second on 1, 2, 4 … CPUs at once. Rows that share nothing between CPUs grow with their number.

use std::sync::Barrier;

use anyhow::{Context as _, Result};
use aya::programs::SchedClassifier;
use breaker_agent::datapath::sizes::Sizes;
use breaker_common::BreakerState::{Closed, Open};
use breaker_tests::packets::{
    Segment,
    flags::{ACK, SYN},
    plan, plan_with, pod, service, vip,
};
use rustix::thread::{CpuSet, sched_setaffinity};

use super::{
    Row, median,
    packets::{Bench, NEW, REPEAT, run},
    spread,
};

const FLOWS: u32 = 65_536;
const ROUNDS: usize = 9;

pub(super) fn rows() -> Result<Vec<Row>> {
    let mut bench = Bench::with_sizes(&Sizes::for_memory(1024).with_flows(4 * FLOWS))?;
    let plain = service("dummy", vip(10), &[pod(3, 80)], "")?;
    bench.rig.apply(&plan_with(&plain, Closed, 1, 1000, false, &plain.backups[0].backends))?;
    let to_vip = |flags| Segment::new(pod(4, 1024), vip(10), flags);
    let mut rows = measure(&mut bench, "closed", "breaker_in", &to_vip(ACK), 0)?;
    bench.rig.apply(&plan(&plain, Open, 2))?;
    bench.establish(pod(4, 1024), vip(10), pod(3, 80), FLOWS)?;
    rows.extend(measure(&mut bench, "established", "breaker_in", &to_vip(ACK), 0)?);
    // The wrapper varies the source port, so all replies are those of one flow.
    let reply = Segment::new(pod(3, 80), pod(4, 1024), ACK);
    rows.extend(measure(&mut bench, "reply", "breaker_out", &reply, 0)?);
    rows.extend(measure(&mut bench, "new", "breaker_in", &to_vip(SYN), NEW)?);
    Ok(rows)
}

/// One row for each number of CPUs, with the factor to one CPU.
fn measure(bench: &mut Bench, name: &str, program: &str, segment: &Segment, vary: u8) -> Result<Vec<Row>> {
    let flows = if program == "breaker_out" { 1 } else { FLOWS };
    bench.prepare(segment, flows, vary)?;
    bench.choose(Some(program))?;
    let packet = segment.bytes();
    let most = std::thread::available_parallelism().context("the number of CPUs")?.get();
    let mut rows = Vec::new();
    let mut alone = Vec::new();
    for cpus in std::iter::successors(Some(1), |cpus| Some(cpus * 2)).take_while(|cpus| *cpus <= most) {
        let rates: Vec<f64> = (0..ROUNDS).map(|_| rate(bench.wrapper()?, &packet, cpus)).collect::<Result<_>>()?;
        if cpus == 1 {
            alone.clone_from(&rates);
        }
        let factors: Vec<f64> = rates.iter().zip(&alone).map(|(rate, alone)| rate / alone).collect();
        rows.push(Row {
            name: format!("scale: {name}, {cpus} CPUs"),
            value: median(&rates) / 1e6,
            unit: "Mpps",
            base: "1 CPU".into(),
            ratio: Some(median(&factors)),
            spread: Some(spread(&factors)),
            aim: "",
        });
    }
    Ok(rows)
}

/// Packets per second of all CPUs together.
fn rate(wrapper: &SchedClassifier, packet: &[u8], cpus: usize) -> Result<f64> {
    let start = Barrier::new(cpus);
    let one = |cpu: usize| -> Result<f64> {
        let mut only = CpuSet::new();
        only.set(cpu);
        sched_setaffinity(None, &only).context("pin a thread")?;
        start.wait();
        Ok(1e9 / run(wrapper, packet, REPEAT)?)
    };
    std::thread::scope(|scope| {
        let one = &one;
        let threads: Vec<_> = (0..cpus).map(|cpu| scope.spawn(move || one(cpu))).collect();
        threads.into_iter().map(|thread| thread.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic))).sum()
    })
}
