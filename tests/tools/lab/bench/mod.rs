//! Benchmarks. Most compare two things, measured in turn in one run. The result is the median of pairs, as a ratio
//! where possible, because absolute numbers depend on the machine.

mod failover;
mod http;
mod limits;
mod maps;
mod node;
mod packets;
mod probes;
mod resets;
mod scale;
mod scrape;
mod ways;

use anyhow::{Context as _, Result, ensure};
use rustix::thread::{CpuSet, sched_setaffinity};
use serde::Serialize;

/// One line of the result.
#[derive(Clone, Debug, Serialize)]
struct Row {
    /// Name of the group and of the measurement.
    name: String,
    /// The measured value; the median of several.
    value: f64,
    /// Unit of the value.
    unit: &'static str,
    /// The alternative that the value is compared with.
    base: String,
    /// Ratio of the value to the base's value.
    ratio: Option<f64>,
    /// Half the distance between the quartiles: of the ratio, or of the value if there is no ratio.
    spread: Option<f64>,
    /// The goal for the ratio, or for the value if there is no ratio.
    aim: &'static str,
}

type Group = fn() -> Result<Vec<Row>>;

const GROUPS: &[(&str, Group)] = &[
    ("packets", packets::rows),
    ("http", http::rows),
    ("ways", ways::rows),
    ("limits", limits::rows),
    ("limits-packets", limits::packets),
    ("failover", failover::rows),
    ("probes", probes::rows),
    ("scale", scale::rows),
    ("maps", maps::rows),
    ("node", node::rows),
    ("scrape", scrape::rows),
    ("resets", resets::rows),
];

/// Runs the groups whose name contains `name`.
pub fn bench(name: Option<&str>, json: bool) -> Result<()> {
    let wanted: Vec<_> = GROUPS.iter().filter(|(group, _)| name.is_none_or(|name| group.contains(name))).collect();
    let known: Vec<&str> = GROUPS.iter().map(|(group, _)| *group).collect();
    ensure!(!wanted.is_empty(), "no group matches {name:?}; the groups are: {}", known.join(", "));
    let mut rows = Vec::new();
    for (group, run) in wanted {
        eprintln!("measuring {group} …");
        // A rig moves its thread into a network namespace, and removing that namespace kills every process whose first
        // thread is in it: so each group runs on a thread of its own.
        match std::thread::spawn(run).join() {
            Ok(measured) => rows.extend(measured?),
            Err(panic) => std::panic::resume_unwind(panic),
        }
    }
    if json {
        println!("{}", serde_json::to_string_pretty(&rows)?);
        return Ok(());
    }
    println!("{:<44} {:>10} {:<8} {:<34} {:>6} {:>7}  AIM", "NAME", "VALUE", "UNIT", "BASE", "RATIO", "SPREAD");
    for row in rows {
        let ratio = row.ratio.map_or(String::new(), |r| format!("{r:.2}"));
        let spread = row.spread.map_or(String::new(), |s| format!("±{s:.3}"));
        println!(
            "{:<44} {:>10.1} {:<8} {:<34} {ratio:>6} {spread:>7}  {}",
            row.name, row.value, row.unit, row.base, row.aim
        );
    }
    Ok(())
}

/// The CPU that all parts of a comparison share.
const CPU: usize = 1;

/// Pins the calling thread to [`CPU`].
fn pin_thread() -> Result<()> {
    let mut cpus = CpuSet::new();
    cpus.set(CPU);
    sched_setaffinity(None, &cpus).context("pin a thread")
}

/// Number of pairs in a comparison. Fewer than fourteen are not conclusive.
const PAIRS: usize = 15;

/// Measures two things in turn. The value is the median of `ours`, the ratio the median of `ours` / `theirs`.
fn pairs(
    name: String,
    unit: &'static str,
    base: &str,
    aim: &'static str,
    ours: impl Fn() -> Result<f64>,
    theirs: impl Fn() -> Result<f64>,
) -> Result<Row> {
    // Warm up: once each, not recorded.
    ours()?;
    theirs()?;
    let (mut values, mut ratios) = (Vec::new(), Vec::new());
    for pair in 0..PAIRS {
        let (a, b) = if pair % 2 == 0 {
            let a = ours()?;
            (a, theirs()?)
        } else {
            let b = theirs()?;
            (ours()?, b)
        };
        values.push(a);
        ratios.push(a / b);
    }
    let (value, ratio, spread) = (median(&values), Some(median(&ratios)), Some(spread(&ratios)));
    Ok(Row { name, value, unit, base: base.into(), ratio, spread, aim })
}

fn median(values: &[f64]) -> f64 {
    quantile(values, 0.5)
}

/// Half the distance between the quartiles.
fn spread(values: &[f64]) -> f64 {
    (quantile(values, 0.75) - quantile(values, 0.25)) / 2.0
}

fn quantile(values: &[f64], q: f64) -> f64 {
    let mut sorted = values.to_vec();
    sorted.sort_by(f64::total_cmp);
    if sorted.is_empty() {
        return f64::NAN;
    }
    #[expect(
        clippy::cast_precision_loss,
        clippy::cast_possible_truncation,
        clippy::cast_sign_loss,
        reason = "an index"
    )]
    let index = ((sorted.len() - 1) as f64 * q).round() as usize;
    sorted[index]
}
