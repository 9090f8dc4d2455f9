//! Reads the pinned maps without an agent.

use std::path::Path;

use anyhow::{Context as _, Result};
use aya::maps::{Map, MapData};
use breaker_common::{Heartbeat, PassReason, ServiceCounters, ServiceLimits, switch_flags};
use breaker_core::datapath::{Adopted, LimitReport};

use super::{
    apply::{adopt, record},
    maps::Maps,
    pins,
};

/// Refused clients of a service, at most.
const CLIENTS: usize = 10;

/// Content of the pinned maps, which an agent that has ended left behind or a running agent uses.
#[derive(Clone, Debug)]
pub struct PinnedState {
    /// The last heartbeat.
    pub heartbeat: Heartbeat,
    /// The services.
    pub services: Vec<MappedService>,
    /// Number of packets that failed open, by reason.
    pub reasons: Vec<(PassReason, u64)>,
}

/// A service in the pinned maps.
#[derive(Clone, Debug)]
pub struct MappedService {
    /// The service's state, as the programs see it.
    pub service: Adopted,
    /// Its counters.
    pub counters: ServiceCounters,
    /// Its limits, if it has any.
    pub limits: Option<MappedLimits>,
}

/// A service's limits in the pinned maps.
#[derive(Clone, Debug)]
pub struct MappedLimits {
    /// Limits that the programs enforce.
    pub limits: ServiceLimits,
    /// Counters of the limits, and the most refused clients.
    pub report: LimitReport,
}

/// Reads the maps that are pinned below a path; `None` if nothing is pinned there.
///
/// # Errors
/// The maps are pinned but cannot be read.
pub fn read(root: &Path) -> Result<Option<PinnedState>> {
    let path = pins::map_path(root, "HEARTBEAT");
    if !path.try_exists().with_context(|| format!("check whether {} exists", path.display()))? {
        return Ok(None);
    }
    let maps = open_pinned(root)?;
    let mut frontends = adopt::frontends(&maps)?;
    let mut services = Vec::new();
    for index in 0..maps.sizes.services {
        let record = maps.services.get(&index, 0).context("read the service records")?;
        let switch = maps.switch(index);
        let Some(mut service) = record::decode(&record, switch) else { continue };
        service.frontends =
            frontends.remove(&index).unwrap_or_default().into_iter().map(|(frontend, _)| frontend).collect();
        let limits = if switch.has(switch_flags::LIMITED) {
            Some(MappedLimits { limits: maps.limits.get(index), report: maps.limits.report(index, CLIENTS)? })
        } else {
            None
        };
        services.push(MappedService { service, counters: maps.counters(index)?, limits });
    }
    Ok(Some(PinnedState { heartbeat: maps.heartbeat(), services, reasons: maps.reasons()? }))
}

/// Opens the maps of a pin directory, without programs.
fn open_pinned(root: &Path) -> Result<Maps> {
    Maps::open(|name| pinned_map(root, name))
}

/// Opens one map of a pin directory.
pub(super) fn pinned_map(root: &Path, name: &str) -> Result<Map> {
    let data = MapData::from_pin(pins::map_path(root, name));
    let data = data.with_context(|| format!("open the pinned map {name}"))?;
    Map::from_map_data(data).with_context(|| format!("the pinned map {name}"))
}
