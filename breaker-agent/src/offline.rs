//! `breaker status` without an agent: shows the content of the pinned maps.

use std::path::Path;

use anyhow::{Context as _, Result, bail};
use breaker_api::status::{AgentStatus, Applied, DatapathStatus, ServiceStatus};
use breaker_core::model::Override;

use crate::{
    clock::timestamp,
    datapath::offline::{self, MappedService},
    view,
};

/// Builds the status from the pinned maps. Fields that the maps do not contain are empty.
///
/// # Errors
/// Nothing is pinned below the path, or the maps cannot be read.
pub fn status(pin_path: &Path, socket: &Path) -> Result<AgentStatus> {
    let maps = offline::read(pin_path).context("no agent runs, and the pinned maps cannot be read (root?)")?;
    let Some(maps) = maps else {
        bail!(
            "no agent listens on {}, and nothing is pinned below {}: breaker is not in use on this node",
            socket.display(),
            pin_path.display()
        );
    };
    Ok(AgentStatus {
        version: env!("CARGO_PKG_VERSION").into(),
        pid: maps.heartbeat.pid,
        running: false,
        hung: false,
        process: None,
        probes: None,
        lost_log_lines: 0,
        panics: 0,
        degraded: Vec::new(),
        last_beat: view::timestamp_unless_zero(maps.heartbeat.beat_unix_ns),
        lease_seconds: maps.heartbeat.lease_ns / 1_000_000_000,
        datapath: DatapathStatus {
            pin_path: pin_path.display().to_string(),
            reasons: maps.reasons.into_iter().map(|(reason, count)| (reason.label().to_owned(), count)).collect(),
            ..DatapathStatus::default()
        },
        services: maps.services.into_iter().map(service).collect(),
    })
}

fn service(MappedService { service, counters, limits }: MappedService) -> ServiceStatus {
    let applied = Applied { state: service.state, share: service.share, epoch: service.epoch };
    let (override_, until_unix_ns) = service.override_;
    ServiceStatus {
        name: service.name.to_string(),
        state: service.state,
        since: timestamp(service.since_unix_ns),
        reason: Some(service.reason),
        message: String::new(),
        share: service.share,
        epoch: service.epoch,
        trips: service.trips,
        mode: None,
        override_: view::override_(override_),
        override_until: view::timestamp_unless_zero(until_unix_ns).filter(|_| override_ != Override::Auto),
        fast_path: None,
        when_all_unhealthy: None,
        frontends: service.frontends.iter().map(ToString::to_string).collect(),
        tiers: Vec::new(),
        desired: applied.clone(),
        applied: Some(applied),
        error: None,
        failed_writes: 0,
        established: None,
        flows: 0,
        local_errors: 0,
        counters: counters.into(),
        limits: limits.map(|limits| view::limits_in_maps(&limits.limits, limits.report)),
    }
}
