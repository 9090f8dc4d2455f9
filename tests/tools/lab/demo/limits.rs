//! Shows limits: a rate limit on the primary, and a failover to a backup that has a rate limit.

use breaker_common::BreakerState;
use std::{
    thread::sleep,
    time::{Duration, Instant},
};

use anyhow::{Context as _, Result};
use breaker_api::limits::LimitsStatus;
use breaker_tests::lab::{
    client::{Outcome, Plan, Record},
    service::Fault,
    stage::{Checks, Lab, SERVICE},
    wait_for,
};
use serde::Serialize;

use super::Printer;

/// Duration of each part, in seconds.
const SECONDS: u32 = 4;
/// New connections per second that the clients attempt.
const ASKED: u32 = 200;

/// Result of one part.
#[derive(Debug, Serialize)]
#[serde(rename_all = "camelCase")]
pub(super) struct Part {
    /// The limits in the configuration.
    limits: &'static str,
    /// Duration in milliseconds.
    millis: u128,
    /// New connections that the clients attempted.
    asked: usize,
    /// Requests that the limited tier answered.
    answered: usize,
    /// Connections that the limit allows in that time: rate × time + burst.
    allowed: f64,
    /// Connections that were refused.
    refused: usize,
    /// Requests with any other outcome.
    others: usize,
}

/// Runs both parts.
pub(super) fn play(lab: &mut Lab, teller: &mut Printer) -> Result<Vec<Part>> {
    teller.say(&format!("\nNow limits, with {ASKED} new connections a second:"));
    let (primary, backup) = (lab.primary.address().to_string(), lab.backup.address().to_string());
    let limits = "limits: {newConnectionsPerSecond: 50, burst: 10}";
    teller.say(&format!("\n{}: the primary admits 50 a second, with bursts of 10", teller.bold(limits)));
    configure(lab, limits, |limits| !limits.primary.limits.is_empty())?;
    let first = part(lab, teller, limits, (50.0, 10.0), &primary)?;
    let limits = "limits: {backup: {newConnectionsPerSecond: 80, burst: 10}}";
    teller.say(&format!(
        "\n{}: the primary's process is killed, and the backup could not take all of its traffic",
        teller.bold(limits)
    ));
    configure(lab, limits, |limits| !limits.backup.limits.is_empty())?;
    lab.primary.inject(Fault::Kill)?;
    lab.agent.wait_state(SERVICE, BreakerState::Open, Duration::from_secs(20))?;
    let second = part(lab, teller, limits, (80.0, 10.0), &backup)?;
    lab.primary.heal(Fault::Kill)?;
    lab.agent.wait_state(SERVICE, BreakerState::Closed, Duration::from_secs(20))?;
    Ok(vec![first, second])
}

/// Configures limits, and waits until the agent has put them in force.
fn configure(lab: &Lab, limits: &str, in_force: fn(&LimitsStatus) -> bool) -> Result<()> {
    const LONG: Duration = Duration::from_secs(10);
    lab.configure(Checks::Fast, &format!("    {limits}\n"))?;
    lab.agent.wait_reload(LONG)?;
    wait_for("the limits to be in force", LONG, || {
        let service = lab.agent.service(SERVICE);
        service.is_ok_and(|service| service.limits.as_ref().is_some_and(in_force))
    })
}

/// Runs clients for a while, and prints the outcomes second by second.
fn part(lab: &Lab, teller: &Printer, limits: &'static str, (rate, burst): (f64, f64), tier: &str) -> Result<Part> {
    let load = lab.load(Plan { per_second: ASKED, keep_alive: 0, ..Plan::usual(lab.vip) })?;
    let started = Instant::now();
    teller.say("     second   answered   refused");
    for second in 1..=SECONDS {
        sleep((started + Duration::from_secs(1) * second).saturating_duration_since(Instant::now()));
        let from = started + Duration::from_secs(1) * (second - 1);
        let records = load.records();
        let told: Vec<&Record> =
            records.iter().filter(|r| r.at >= from && r.at < from + Duration::from_secs(1)).collect();
        let answered = told.iter().filter(|r| r.outcome.pod() == Some(tier)).count();
        let refused = told.iter().filter(|r| r.outcome == Outcome::Refused).count();
        teller.say(&format!("     {second:>6}   {answered:>8}   {refused:>7}"));
    }
    let records = load.stop()?;
    let last = records.last().context("no request was recorded")?;
    let took = last.at.duration_since(records[0].at);
    let answered = records.iter().filter(|r| r.outcome.pod() == Some(tier)).count();
    let refused = records.iter().filter(|r| r.outcome == Outcome::Refused).count();
    let part = Part {
        limits,
        millis: took.as_millis(),
        asked: records.len(),
        answered,
        allowed: rate * took.as_secs_f64() + burst,
        refused,
        others: records.len() - answered - refused,
    };
    teller.say(&format!(
        "  {} of {} answered in {:.1} s; the limit allows {:.0}; connections over the limit are refused at once",
        part.answered,
        part.asked,
        took.as_secs_f64(),
        part.allowed
    ));
    Ok(part)
}
