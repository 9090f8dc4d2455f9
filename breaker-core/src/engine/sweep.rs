//! The sweep: a walk through the flow tables, and the changes that follow from it. Tracking ends, services that left
//! the configuration are removed, flows to removed backends are removed, and limits that refuse are reported.

use std::{collections::BTreeSet, time::Duration};

use super::{
    Engine,
    journal::{EntryKind, Level},
    service::Lifecycle,
    tracking::{SWEEP, Tracking},
};
use crate::{
    datapath::{Datapath, Destination, Sweep},
    engine::backends::backup_addresses,
    model::{Frontend, Protocol, ServiceName},
    time::Now,
};

/// A sweep delays the next one by this many times its own duration.
const SWEEP_DELAY_FACTOR: u32 = 10;
/// An established flow without packets for this long is removed.
const IDLE: Duration = Duration::from_secs(24 * 3600);
/// From this fill level on, the tables of established flows are reported to be filling up, percent.
const CROWDED: u8 = 80;

impl Engine {
    /// Records how long the last sweep took, and delays the next one accordingly: probes and transitions get most
    /// of the main loop's time, however full the tables are.
    pub fn record_sweep_duration(&mut self, duration: Duration) {
        self.next_sweep += duration * SWEEP_DELAY_FACTOR;
    }

    pub(super) fn sweep(&mut self, now: Now, datapath: &mut dyn Datapath) {
        self.next_sweep = now.mono + SWEEP;
        // When the agent has just started, it does not know which packets passed while no agent ran. It therefore
        // removes no idle flow before it has run for `IDLE`.
        let idle = (now.mono.saturating_sub(self.started) > IDLE).then_some(IDLE);
        let found = match datapath.sweep(idle) {
            Ok(found) => found,
            Err(error) => {
                self.journal.log(now, Level::Warn, None, format!("the flow tables cannot be read: {error}"));
                return;
            }
        };
        self.report_pressure(now, &found);
        self.remove_flows_of_removed_backends(now, datapath, true);
        for (name, state) in &mut self.services {
            state.flows = found.redirected.get(name).copied().unwrap_or(0);
            // Connections over a limit of the primary went to the backup: track their flows until they have ended.
            if found.overflowed.contains(name) {
                state.sync.outdate_if(!state.tracking.is_active());
                state.tracking = Tracking::Active { since: Some(now.mono) };
            }
        }
        self.watch_limits(now, datapath);
        for name in self.finish_draining(now) {
            match datapath.remove(&name) {
                Ok(()) => drop(self.services.remove(&name)),
                Err(error) => self.journal.log(
                    now,
                    Level::Warn,
                    Some(&name),
                    format!("cannot remove the service yet, will retry: {error}"),
                ),
            }
        }
    }

    /// Reports when the tables of established flows fill up, and when they have room again.
    fn report_pressure(&mut self, now: Now, found: &Sweep) {
        self.flow_tables = found.tables;
        let crowded = found.pressure_percent >= CROWDED;
        if crowded != (self.flow_pressure >= CROWDED) {
            let message = format!(
                "the table of established flows is {} % full: {} flows (the fuller of the IPv4 and the IPv6 table){}",
                found.pressure_percent,
                found.established(),
                if crowded { "; raise agent.maxFlows to make room for more" } else { "" }
            );
            if crowded {
                self.journal.log(now, Level::Warn, None, message.as_str());
            }
            self.journal.record(now, None, EntryKind::FlowPressure, message);
        }
        self.flow_pressure = found.pressure_percent;
    }

    /// Ends the tracking of services without flows on backups. Returns the services that left and can be removed.
    fn finish_draining(&mut self, now: Now) -> Vec<ServiceName> {
        // A frontend may have moved to another service while flows of the old service live. The new service then
        // tracks them, too.
        let leaving = self.services.values().filter(|state| state.lifecycle == Lifecycle::Leaving && state.flows > 0);
        let busy: Vec<Frontend> = leaving.flat_map(|state| state.service.frontends.clone()).collect();
        let mut left = Vec::new();
        for (name, state) in &mut self.services {
            let is_leaving = state.lifecycle == Lifecycle::Leaving;
            let inherits = !is_leaving && state.service.frontends.iter().any(|frontend| busy.contains(frontend));
            if state.flows > 0 || inherits || !state.tracking.is_settled(now.mono) {
                continue;
            }
            let cleared = state.draining_frontends.clear();
            state.sync.outdate_if(cleared);
            if is_leaving || state.is_fully_closed(now) {
                state.sync.outdate_if(state.tracking.is_active());
                state.tracking = Tracking::Idle;
                // A service that leaves is closed in the maps first, and removed at a later sweep.
                if is_leaving && state.sync.is_closed_in_maps() {
                    left.push(name.clone());
                }
            }
        }
        left
    }

    /// Reports limits that refuse connections.
    fn watch_limits(&mut self, now: Now, datapath: &dyn Datapath) {
        for (name, state) in &mut self.services {
            if state.service.limits.is_none() {
                continue;
            }
            let Ok(report) = datapath.limits(name, 0) else { continue };
            let before = state.limit_watch.active().cloned();
            let message = state.limit_watch.observe(now, &report.counters);
            self.changes += u64::from(state.limit_watch.active() != before.as_ref());
            if let Some(message) = message {
                self.journal.log(now, Level::Warn, Some(name), message.as_str());
                self.journal.record(now, Some(name), EntryKind::Limited, message);
            }
        }
    }

    /// Removes the flows to backends that left the configuration, so that the next pod with such an address does not
    /// get their connections.
    ///
    /// A packet that read the old tables may pin one more flow a moment after they were replaced. The list of removed
    /// backends is therefore kept until a sweep has removed their flows once more (`final_pass`).
    ///
    /// With `final_pass`, UDP flows to a backup's backend that is Down are removed as well and decided again. UDP
    /// has no connection that this could break, and a client with a long-lived socket would otherwise stay on that
    /// backend.
    pub(super) fn remove_flows_of_removed_backends(&mut self, now: Now, datapath: &mut dyn Datapath, final_pass: bool) {
        for (name, state) in &mut self.services {
            let down = if final_pass { state.tiers.down_for_datagrams(&state.service) } else { BTreeSet::new() };
            if state.removed_backends.is_empty() && down.is_empty() {
                continue;
            }
            let known = backup_addresses(&state.service);
            let doomed = |(backend, protocol): Destination| {
                state.removed_backends.contains(backend, &known) || protocol == Protocol::Udp && down.contains(&backend)
            };
            match datapath.remove_flows(name, &doomed) {
                Ok(0) => {}
                Ok(count) => {
                    let line = format!("removed {count} flows to backends that are gone or down");
                    self.journal.log(now, Level::Info, Some(name), line);
                }
                Err(error) => {
                    let line = format!("cannot remove flows to backends that are gone: {error}");
                    self.journal.log(now, Level::Warn, Some(name), line);
                    continue;
                }
            }
            if final_pass {
                state.removed_backends.clear();
            }
        }
    }
}
