//! `breaker status` without an agent: what the pinned maps say.

use std::path::Path;

use anyhow::{Context as _, Result, bail};
use breaker_common::ServiceCounters;
use jiff::Timestamp;

use crate::{
    agent::{
        limits,
        status::{AgentStatus, Applied, DatapathStatus, ServiceStatus},
    },
    datapath::{Adopted, kernel},
    model::Override,
};

/// The status as far as the maps know it.
pub(super) fn status(pin_path: &Path, socket: &Path) -> Result<AgentStatus> {
    let left = kernel::read_offline(pin_path).context("no agent runs, and the pinned maps cannot be read (root?)")?;
    let Some(left) = left else {
        bail!(
            "no agent listens on {}, and nothing is pinned below {}: breaker is not in use on this node",
            socket.display(),
            pin_path.display()
        );
    };
    let unix = |ns: u64| Timestamp::from_nanosecond(i128::from(ns)).ok().filter(|_| ns > 0);
    let services =
        left.services.into_iter().map(|(service, counters, limits)| show(&service, counters, limits)).collect();
    Ok(AgentStatus {
        version: env!("CARGO_PKG_VERSION").into(),
        pid: left.heartbeat.pid,
        running: false,
        process: None,
        last_beat: unix(left.heartbeat.beat_unix_ns),
        lease_seconds: left.heartbeat.lease_ns / 1_000_000_000,
        datapath: DatapathStatus {
            pin_path: pin_path.display().to_string(),
            reasons: left.reasons.into_iter().map(|(reason, count)| (reason.label().to_owned(), count)).collect(),
            ..DatapathStatus::default()
        },
        services,
    })
}

fn show(service: &Adopted, counters: ServiceCounters, limits: Option<kernel::LeftLimits>) -> ServiceStatus {
    let unix = |ns: u64| Timestamp::from_nanosecond(i128::from(ns)).unwrap_or_default();
    let applied = Applied { state: service.state.label().into(), share: service.share, epoch: service.epoch };
    ServiceStatus {
        name: service.name.to_string(),
        state: service.state.label().into(),
        since: unix(service.since_unix_ns),
        reason: service.reason.label().into(),
        message: String::new(),
        share: service.share,
        epoch: service.epoch,
        trips: service.trips,
        mode: String::new(),
        override_: format!("{:?}", service.override_.0),
        override_until: (service.override_.0 != Override::Auto && service.override_.1 > 0)
            .then(|| unix(service.override_.1)),
        fast_path: String::new(),
        frontends: service.frontends.iter().map(ToString::to_string).collect(),
        tiers: Vec::new(),
        desired: applied.clone(),
        applied: Some(applied),
        error: None,
        failed_writes: 0,
        flows: 0,
        counters: counters.into(),
        limits: limits.map(|left| limits::show_left(&left.limits, left.report)),
    }
}
