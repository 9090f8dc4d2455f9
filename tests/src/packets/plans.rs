//! Services and plans for the tests of the programs.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};

use anyhow::{Context as _, Result};
use breaker_agent::config;
use breaker_common::{BreakerState, StateReason};
use breaker_core::{
    model::{Backend, Override, Service},
    plan::{Decision, ServicePlan},
};

/// Creates a service with one TCP frontend. `extra` is YAML (flow style, ending in a comma) that is inserted into the
/// service's configuration; it may be empty.
///
/// # Errors
/// Fails if the configuration is invalid.
pub fn service(name: &str, vip: SocketAddr, backups: &[SocketAddr], extra: &str) -> Result<Service> {
    service_with(name, &[(vip, "TCP")], backups, extra)
}

/// Like [`service`], with several frontends, each with its protocol (`TCP` or `UDP`).
///
/// # Errors
/// Fails if the configuration is invalid.
pub fn service_with(
    name: &str,
    frontends: &[(SocketAddr, &str)],
    backups: &[SocketAddr],
    extra: &str,
) -> Result<Service> {
    let place = |a: &SocketAddr| format!("address: \"{}\", port: {}", a.ip(), a.port());
    let backends: Vec<String> = backups.iter().map(|b| format!("{{{}}}", place(b))).collect();
    let frontends: Vec<String> =
        frontends.iter().map(|(f, protocol)| format!("{{{}, protocol: {protocol}}}", place(f))).collect();
    let text = format!(
        "services: [{{name: {name}, frontends: [{}], {extra} primary: {{backends: []}}, backups: [{{backends: [{}]}}]}}]",
        frontends.join(", "),
        backends.join(", ")
    );
    let parsed = config::parse(std::path::Path::new("rig"), &text);
    let mut config = parsed.map_err(|errors| anyhow::anyhow!("{errors:?}"))?;
    config.services.pop().context("the configuration contains no service")
}

/// Creates the plan of a service in a state, with all its backends of the backup usable and with `draining` set. The
/// primary gets all new flows if the state is closed, and none otherwise.
#[must_use]
pub fn plan(service: &Service, state: BreakerState, epoch: u32) -> ServicePlan {
    let backup = service.backups[0].backends.clone();
    plan_with(service, state, epoch, if state == BreakerState::Closed { 1000 } else { 0 }, true, &backup)
}

/// Creates a plan from explicit values. `share` is the part of new flows that the primary gets, in permille; `draining`
/// means that flows on a backup may still exist; `backup` lists the usable backends of the backup.
#[must_use]
pub fn plan_with(
    service: &Service,
    state: BreakerState,
    epoch: u32,
    share: u16,
    draining: bool,
    backup: &[Backend],
) -> ServicePlan {
    let decision = Decision {
        state,
        share,
        epoch,
        reason: StateReason::Operator,
        since_unix_ns: 1,
        trips: 0,
        override_: (Override::Auto, 0),
        draining,
        drained: true,
    };
    ServicePlan::new(service, decision, backup)
}

/// IPv4 address of a pod of the rig: 10.42.0.`host`.
#[must_use]
pub const fn pod(host: u8, port: u16) -> SocketAddr {
    SocketAddr::new(IpAddr::V4(Ipv4Addr::new(10, 42, 0, host)), port)
}

/// IPv4 VIP of the rig: 10.43.0.`host`, port 8080.
#[must_use]
pub const fn vip(host: u8) -> SocketAddr {
    SocketAddr::new(IpAddr::V4(Ipv4Addr::new(10, 43, 0, host)), 8080)
}

/// IPv6 address of a pod of the rig: fd42::`host`.
#[must_use]
pub const fn pod6(host: u8, port: u16) -> SocketAddr {
    SocketAddr::new(IpAddr::V6(Ipv6Addr::new(0xfd42, 0, 0, 0, 0, 0, 0, host as u16)), port)
}

/// IPv6 VIP of the rig: fd43::`host`, port 8080.
#[must_use]
pub const fn vip6(host: u8) -> SocketAddr {
    SocketAddr::new(IpAddr::V6(Ipv6Addr::new(0xfd43, 0, 0, 0, 0, 0, 0, host as u16)), 8080)
}
