//! Real sockets, veths, bridge and netfilter, the real agent: one lab a test, gone when it ends.
#![allow(clippy::unwrap_used, reason = "a test may panic")]

mod attach;
mod clients;
mod failover;
mod foreign;
mod lifecycle;
mod limits;
mod masquerade;
mod near;
mod netfilter;
mod policy;
mod pressure;
mod sockets;
mod xdp;

use std::time::Duration;

use anyhow::Result;
use breaker_tests::lab::stage::{Checks, Lab};

/// Longer than anything takes on a busy machine.
const LONG: Duration = Duration::from_secs(20);

/// A lab with fast checks and a running agent that has seen both sides well.
fn started(service: &str) -> Result<Lab> {
    let mut lab = Lab::with(Checks::Fast, service)?;
    lab.agent.start()?;
    wait_well(&lab)?;
    Ok(lab)
}

/// Waits until every backend is Up.
fn wait_well(lab: &Lab) -> Result<()> {
    lab.agent.wait_well(LONG)
}

fn text(output: &[u8]) -> String {
    String::from_utf8_lossy(output).into_owned()
}
