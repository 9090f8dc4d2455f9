//! What can be seen without an agent: the pinned maps.

use std::path::Path;

use anyhow::{Context as _, Result};
use breaker_common::{Heartbeat, PassReason, ServiceCounters, ServiceLimits, switch_flags};

use super::{adopt_record, load, maps::monotonic_ns, pins};
use crate::{
    agent::limits::CLIENTS,
    datapath::{Adopted, LimitReport},
};

/// What an agent left, or what it is doing.
#[derive(Clone, Debug)]
pub struct Leftover {
    /// Its last sign of life.
    pub heartbeat: Heartbeat,
    /// How long ago that was, nanoseconds.
    pub silent_ns: u64,
    /// The services as the programs act on them, with their counters.
    pub services: Vec<(Adopted, ServiceCounters, Option<LeftLimits>)>,
    /// What failed open.
    pub reasons: Vec<(PassReason, u64)>,
}

/// Limits as an agent left them.
#[derive(Clone, Debug)]
pub struct LeftLimits {
    /// What the programs enforce.
    pub limits: ServiceLimits,
    /// What they did.
    pub report: LimitReport,
}

/// Reads the maps below a pin path; `None` where nothing is pinned.
///
/// # Errors
/// Maps that are there and cannot be read.
pub fn read(root: &Path) -> Result<Option<Leftover>> {
    let path = pins::map_path(root, "HEARTBEAT");
    if !path.try_exists().with_context(|| format!("look at {}", path.display()))? {
        return Ok(None);
    }
    let maps = load::open_pinned(|name| pins::map_path(root, name))?;
    let heartbeat = maps.heartbeat();
    let mut frontends = super::frontends(&maps)?;
    let mut services = Vec::new();
    for index in 0..maps.sizes.services {
        let record = maps.services.get(&index, 0).context("read the records")?;
        if let Some(mut service) = adopt_record(&record, maps.switch(index)) {
            let of = frontends.remove(&index).unwrap_or_default();
            service.frontends = of.into_iter().map(|(frontend, _)| frontend).collect();
            let limits = &maps.limits;
            let left = if maps.switch(index).has(switch_flags::LIMITED) {
                Some(LeftLimits { limits: limits.get(index), report: limits.report(index, CLIENTS)? })
            } else {
                None
            };
            services.push((service, maps.counters(index)?, left));
        }
    }
    Ok(Some(Leftover {
        heartbeat,
        silent_ns: monotonic_ns().saturating_sub(heartbeat.beat_ns),
        services,
        reasons: maps.reasons()?,
    }))
}
