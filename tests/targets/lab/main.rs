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
mod observe;
mod policy;
mod pressure;
mod resets;
mod return_path;
mod sockets;
mod surroundings;
mod third_party;
mod uplink_devices;
mod xdp;

use std::{
    io::{Read as _, Write as _},
    net::{SocketAddr, TcpStream},
    time::Duration,
};

use anyhow::Result;
use breaker_tests::lab::{
    netns::NetNs,
    stage::{Checks, Lab},
};

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

/// Whether a server answers a request for `/alive`, which the dummy service answers also with errors switched on.
fn is_alive(ns: &NetNs, target: SocketAddr) -> Result<bool> {
    let answer = ns.enter(move || {
        let mut stream = TcpStream::connect_timeout(&target, Duration::from_secs(10))?;
        stream.set_read_timeout(Some(Duration::from_secs(5)))?;
        write!(stream, "GET /alive HTTP/1.1\r\nHost: lab\r\nConnection: close\r\n\r\n")?;
        let mut answer = String::new();
        stream.read_to_string(&mut answer)?;
        Ok::<_, std::io::Error>(answer)
    })?;
    Ok(answer.is_ok_and(|answer| answer.contains("200 OK")))
}
