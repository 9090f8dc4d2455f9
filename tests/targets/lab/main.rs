//! Lab tier: real sockets, veths, bridge and netfilter, and the real agent. Each test sets up a lab of its own and
//! removes it.
#![allow(clippy::unwrap_used, reason = "a test may panic")]

mod attach;
mod clients;
mod coverage;
mod failover;
mod fast_path;
mod lifecycle;
mod limits;
mod masquerade;
mod memory;
mod netfilter;
mod policy;
mod pressure;
mod resets;
mod return_path;
mod sockets;
mod surroundings;
mod third_party;
mod uplink_devices;
mod xdp;

use std::time::Duration;

use anyhow::Result;
use breaker_tests::lab::stage::{Checks, Lab};

/// Time limit for a condition: longer than it takes on a busy machine.
const LONG: Duration = Duration::from_secs(20);

/// A lab with fast checks and a running agent that has found primary and backup Up. `service` is YAML for the
/// service's entry, indented by four spaces.
fn start_healthy_lab(service: &str) -> Result<Lab> {
    let mut lab = Lab::with(Checks::Fast, service)?;
    lab.agent.start()?;
    wait_all_up(&lab)?;
    Ok(lab)
}

/// Waits until every backend is Up.
fn wait_all_up(lab: &Lab) -> Result<()> {
    lab.agent.wait_all_up(LONG)
}

fn text(output: &[u8]) -> String {
    String::from_utf8_lossy(output).into_owned()
}
