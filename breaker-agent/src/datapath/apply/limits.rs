//! Limits in the maps, and the census of connections near a limit.

use std::{
    collections::{BTreeMap, BTreeSet},
    sync::atomic::Ordering,
    time::Duration,
};

use anyhow::Result;
use breaker_common::switch_flags;
use breaker_core::{
    model::{Frontend, Protocol, ServiceName},
    plan::ServicePlan,
};

use super::{Limited, full_path::is_tracking};
use crate::{
    clock,
    datapath::{
        KernelDatapath,
        maps::{
            connections::Rule,
            filter::{FilterBit, counted_position},
        },
    },
};

impl KernelDatapath {
    /// Writes a plan's limits. If they count connections, sets the filter bits that send SYN, FIN and RST segments
    /// to the full path. Called before the plan is in force.
    pub(crate) fn write_limits(&mut self, plan: &ServicePlan, index: u32) -> Result<()> {
        let Some(limits) = plan.limits else { return Ok(()) };
        self.maps.limits.add_counters(index)?;
        let limited = self.limited.entry(plan.name.clone()).or_default();
        if limited.limits != Some(limits) {
            limited.limits = Some(limits);
            let in_census = limited.census_since.is_some();
            self.maps.limits.set(index, limits.in_kernel());
            self.maps.limits.set_census(index, in_census);
        }
        let counts = |f: &&Frontend| limits.counts() && f.protocol == Protocol::Tcp;
        let before = limited.counted.clone();
        let wanted: BTreeSet<Frontend> = plan.frontends().filter(counts).copied().collect();
        if limits.counts() {
            limited.counts = true;
            self.maps.set_counts_sockets(true);
        }
        self.set_counted_frontends(&plan.name, wanted.union(&before).copied().collect());
        Ok(())
    }

    /// Removes limits, counts and filter bits that the plan does not need. Called after the plan is in force.
    pub(crate) fn trim_limits(&mut self, plan: &ServicePlan, index: u32) -> Result<()> {
        let Some(limits) = plan.limits else { return self.remove_limits(&plan.name, index) };
        let counts = |f: &&Frontend| limits.counts() && f.protocol == Protocol::Tcp;
        if !limits.counts() && self.limited.get_mut(&plan.name).is_some_and(|l| std::mem::replace(&mut l.counts, false))
        {
            self.maps.limits.forget_connections(index);
            self.update_socket_counting();
        }
        self.set_counted_frontends(&plan.name, plan.frontends().filter(counts).copied().collect());
        Ok(())
    }

    /// Removes a service's limits, and the connections that they counted.
    pub(crate) fn remove_limits(&mut self, name: &ServiceName, index: u32) -> Result<()> {
        if !self.limited.contains_key(name) {
            return Ok(());
        }
        self.set_counted_frontends(name, BTreeSet::new());
        self.limited.remove(name);
        self.update_socket_counting();
        self.maps.limits.clear(index)
    }

    /// Sets the filter's counted-connections bits ([`breaker_common::COUNTED`]) for exactly these frontends of a
    /// service.
    pub(crate) fn set_counted_frontends(&mut self, name: &ServiceName, wanted: BTreeSet<Frontend>) {
        let Some(limited) = self.limited.get_mut(name) else { return };
        let before = std::mem::take(&mut limited.counted);
        for frontend in wanted.difference(&before) {
            self.maps.filter.add(FilterBit::Frontend, counted_position(frontend));
        }
        for frontend in before.difference(&wanted) {
            self.maps.filter.remove(FilterBit::Frontend, counted_position(frontend));
        }
        limited.counted = wanted;
    }

    /// Writes to the maps whether any service counts connections. If none does, the programs ignore closing sockets.
    pub(crate) fn update_socket_counting(&self) {
        let counts = |limited: &Limited| limited.limits.is_none_or(|limits| limits.counts());
        self.maps.set_counts_sockets(self.limited.values().any(counts));
    }

    /// Removes counted connections that ended without a FIN or RST. Starts a census for services that are near a
    /// limit, and ends it for the others. Returns the services whose primary was at a limit.
    pub(crate) fn sweep_limits(&mut self) -> BTreeSet<ServiceName> {
        let now = clock::monotonic_ns();
        let mut rules = BTreeMap::new();
        for (name, limited) in &self.limited {
            let Some(installed) = self.services.get(name) else { continue };
            let seen = limited.census_since.map(|since| Duration::from_nanos(now.saturating_sub(since)));
            let idle = limited.limits.map(|limits| limits.idle);
            rules.insert(installed.index, Rule { idle: idle.filter(|idle| seen.is_some_and(|seen| seen > *idle)) });
        }
        let found = self.maps.limits.sweep(&rules);
        let mut overflowed = BTreeSet::new();
        let names: Vec<(ServiceName, u32)> =
            self.limited.keys().filter_map(|name| Some((name.clone(), self.services.get(name)?.index))).collect();
        for (name, index) in names {
            let Some(use_) = found.get(&index) else { continue };
            let switch = self.maps.switch(index);
            if use_.overflowed {
                overflowed.insert(name.clone());
                // From now on the switch's TRACK flag has the same effect. A program that sends another connection
                // to the backup sets the mark again.
                if switch.has(switch_flags::TRACK) {
                    self.maps.limits.overflowed(index).store(0, Ordering::SeqCst);
                }
            }
            let Some(limited) = self.limited.get_mut(&name) else { continue };
            if use_.near == limited.census_since.is_some() {
                continue;
            }
            limited.census_since = use_.near.then_some(now);
            self.maps.limits.set_census(index, use_.near);
            let frontends =
                self.services.get(&name).into_iter().flat_map(|s| s.routes.iter().flat_map(|r| &r.frontends));
            let frontends: BTreeSet<Frontend> = frontends.copied().collect();
            if use_.near {
                self.set_full_path(&name, frontends);
            } else if !is_tracking(switch.flags) && !self.has_overflowed(index) {
                self.set_full_path(&name, BTreeSet::new());
            }
        }
        overflowed
    }
}
