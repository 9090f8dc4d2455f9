//! Converts a plan to map writes.
//!
//! # Order of writes
//!
//! A packet must see a consistent configuration at every moment. Therefore the datapath writes in this order:
//!
//! 1. backends, before the slots that name them ([`backends`]);
//! 2. slots, into the buffer that is not in force ([`routes`]);
//! 3. the bits of the filter ([`full_path`]) and the limits ([`limits`]);
//! 4. the switch ([`switch`]): one 64-bit store, which puts all of these in force;
//! 5. new frontends.
//!
//! It removes in the opposite order. A backend stays in the maps as long as a flow to it is alive.
//!
//! [`adopt`] reads the state of an earlier agent, [`record`] encodes the service's record for the next one, and
//! [`local_pods`] writes the interfaces of local backends.

pub(crate) mod adopt;
mod backends;
mod down;
mod full_path;
mod limits;
mod local_pods;
pub(crate) mod record;
mod routes;
mod switch;

use std::collections::{BTreeMap, BTreeSet};

use anyhow::Result;
use breaker_common::{EndpointRole, NONE, Route, SLOT_PASSTHROUGH, Switch};
use breaker_core::{
    limits::Limits,
    model::{Frontend, ServiceName},
    plan::{RoutePlan, ServicePlan, Slot, SlotTable},
};

use self::{full_path::is_tracking, routes::flags_of};
use super::KernelDatapath;

/// A service that is in the maps.
#[derive(Debug)]
pub(crate) struct Installed {
    pub(crate) index: u32,
    pub(crate) routes: Vec<InstalledRoute>,
}

impl Installed {
    /// Whether the maps already contain these routes.
    fn has(&self, routes: &[RoutePlan]) -> bool {
        let same = |(installed, route): (&InstalledRoute, &RoutePlan)| {
            installed.slots.as_ref() == Some(&route.slots)
                && installed.flags == flags_of(route)
                && installed.frontends == route.frontends
        };
        self.routes.len() == routes.len() && self.routes.iter().zip(routes).all(same)
    }
}

/// A route that is in the maps.
#[derive(Clone, Debug)]
pub(crate) struct InstalledRoute {
    index: u32,
    frontends: Vec<Frontend>,
    /// The route's flags: bits of [`breaker_common::route_flags`].
    flags: u32,
    /// Content of the tables in force; `None` after adoption, when it is not known.
    slots: Option<[SlotTable; 2]>,
    /// The tables in force, by tier, as encoded in [`Route::tables`].
    tables: [u32; 2],
}

/// A service whose limits are in the maps.
#[derive(Debug, Default)]
pub(crate) struct Limited {
    /// The configured limits; `None` after adoption, when they are not known.
    limits: Option<Limits>,
    /// Frontends whose SYN, FIN and RST segments take the full path.
    counted: BTreeSet<Frontend>,
    /// Whether the programs count the service's concurrent connections.
    counts: bool,
    /// Start of the current census, in which all packets take the full path, on the clock of
    /// [`clock::monotonic_ns`](crate::clock::monotonic_ns); `None` without a census.
    census_since: Option<u64>,
}

/// A plan whose tables, routes, filter bits and limits are in the maps, and which is not in force yet.
struct Staged {
    /// The service's index.
    index: u32,
    /// The routes in force.
    old: Vec<InstalledRoute>,
    /// The routes of the plan.
    new: Vec<InstalledRoute>,
    /// Whether a route changes its tables: then the plan's tables are in the other buffer.
    changed: bool,
    /// The buffer that the switch is to name.
    buffer: u32,
}

impl Staged {
    /// The route of each frontend, by index.
    fn route_of(routes: &[InstalledRoute]) -> BTreeMap<Frontend, u32> {
        routes.iter().flat_map(|route| route.frontends.iter().map(|f| (*f, route.index))).collect()
    }

    /// Routes in force that the plan does not have.
    fn leaving(&self) -> impl Iterator<Item = &InstalledRoute> {
        self.old.iter().filter(|old| !self.new.iter().any(|new| new.index == old.index))
    }
}

impl KernelDatapath {
    pub(crate) fn try_apply(&mut self, plan: &ServicePlan) -> Result<()> {
        let (index, old) = match self.services.get(&plan.name) {
            Some(installed) if installed.has(&plan.routes) => return self.apply_decision(plan, installed.index),
            Some(installed) => (installed.index, installed.routes.clone()),
            None => (self.service_indices.allocate()?, Vec::new()),
        };
        let outcome = self.apply_routes(plan, index, old);
        if outcome.is_err() && !self.services.contains_key(&plan.name) {
            self.service_indices.release(index);
        }
        outcome
    }

    /// Applies a plan in which only the decision changes; routes and tables stay.
    fn apply_decision(&mut self, plan: &ServicePlan, index: u32) -> Result<()> {
        let before = self.maps.switch(index);
        let filter_changes = self.full_path_frontends.contains_key(&plan.name) != is_tracking(plan.flags);
        if filter_changes {
            self.widen_full_path(plan);
        }
        self.write_limits(plan, index)?;
        self.add_down_backends(plan, index);
        self.commit_switch(plan, index, before.buffer());
        self.trim_down_backends(plan, index);
        if filter_changes {
            self.narrow_full_path(plan, index);
        }
        self.trim_limits(plan, index)
    }

    fn apply_routes(&mut self, plan: &ServicePlan, index: u32, old: Vec<InstalledRoute>) -> Result<()> {
        let staged = self.stage(plan, index, old)?;
        self.add_down_backends(plan, index);
        self.commit_switch(plan, index, staged.buffer);
        self.trim_down_backends(plan, index);
        // From here on the new routes are in force. If a write below fails, the engine applies the plan again.
        self.release_old_tables(&staged);
        self.move_frontends(plan, &staged)?;
        self.finish(plan, staged)
    }

    /// Writes everything that the switch will lead to.
    fn stage(&mut self, plan: &ServicePlan, index: u32, old: Vec<InstalledRoute>) -> Result<Staged> {
        let known = self.services.contains_key(&plan.name);
        let before = if known { self.maps.switch(index) } else { Switch::from_word(0) };
        let new = self.stage_routes(plan, &old)?;
        let changed = new.iter().any(|new| old.iter().any(|o| o.index == new.index && o.tables != new.tables));
        let buffer = if changed { 1 - before.buffer() } else { before.buffer() };
        for route in &new {
            let known = old.iter().find(|o| o.index == route.index);
            if !changed && known.is_some_and(|o| (o.tables, o.flags) == (route.tables, route.flags)) {
                continue;
            }
            // The tables in force stay in their buffer until the switch is written.
            let in_force = known.map_or(route.tables, |o| o.tables);
            let tables = if buffer == 1 { [in_force, route.tables] } else { [route.tables, in_force] };
            self.write_route(route.index, if changed { tables } else { [route.tables; 2] }, route.flags)?;
        }
        self.maps.add_counters(index)?;
        self.widen_full_path(plan);
        self.write_limits(plan, index)?;
        Ok(Staged { index, old, new, changed, buffer })
    }

    /// Releases the tables that the switch no longer leads to.
    fn release_old_tables(&mut self, staged: &Staged) {
        for old in &staged.old {
            let stays = staged.new.iter().find(|new| new.index == old.index);
            for (tier, table) in old.tables.into_iter().enumerate() {
                if stays.is_none_or(|new| new.tables[tier] != table) {
                    self.release_table(table);
                }
            }
        }
    }

    /// Writes the roles of frontends that are new or change their route, and clears those of frontends that leave.
    fn move_frontends(&mut self, plan: &ServicePlan, staged: &Staged) -> Result<()> {
        let (wanted, had) = (Staged::route_of(&staged.new), Staged::route_of(&staged.old));
        // Until its new role is written, each frontend is recorded under its old route. That includes frontends
        // that leave.
        let mut installed = staged.new.clone();
        for route in &mut installed {
            let of = |f: &&Frontend| had.get(*f) == Some(&route.index);
            route.frontends = had.keys().filter(of).copied().collect();
        }
        installed.extend(staged.leaving().map(|route| InstalledRoute {
            slots: Some([SlotTable::All(Slot::PassThrough), SlotTable::All(Slot::PassThrough)]),
            tables: [SLOT_PASSTHROUGH; 2],
            ..route.clone()
        }));
        let index = staged.index;
        self.services.insert(plan.name.clone(), Installed { index, routes: installed });
        self.table_backends.insert(plan.name.clone(), plan.backends());
        for (frontend, route) in wanted.iter().filter(|(f, route)| had.get(f) != Some(route)) {
            // A frontend that this service had may belong to another service by now, above all when this service is
            // removed.
            let was_ours = had.contains_key(frontend);
            self.update_role((frontend.address, frontend.protocol), |role| {
                if !was_ours || role.service == index {
                    (role.service, role.route) = (index, *route);
                }
            })?;
        }
        for frontend in had.keys().filter(|f| !wanted.contains_key(f)) {
            self.update_role((frontend.address, frontend.protocol), |role| clear_frontend(role, index))?;
        }
        Ok(())
    }

    /// Clears the routes that left, and writes the tables in force into both buffers.
    fn finish(&mut self, plan: &ServicePlan, staged: Staged) -> Result<()> {
        for route in staged.leaving() {
            self.write_route(route.index, Route::NOTHING.tables, 0)?;
            self.route_indices.release_later(route.index);
        }
        for route in staged.new.iter().filter(|_| staged.changed) {
            self.write_route(route.index, [route.tables; 2], route.flags)?;
        }
        let Staged { index, new: routes, .. } = staged;
        self.services.insert(plan.name.clone(), Installed { index, routes });
        self.narrow_full_path(plan, index);
        self.trim_limits(plan, index)
    }

    pub(crate) fn try_remove(&mut self, name: &ServiceName) -> Result<()> {
        let Some(installed) = self.services.get(name) else { return Ok(()) };
        let (index, routes) = (installed.index, installed.routes.clone());
        for frontend in routes.iter().flat_map(|route| &route.frontends) {
            self.update_role((frontend.address, frontend.protocol), |role| clear_frontend(role, index))?;
            // If a later step fails and the service comes back, frontends that are already removed must not be
            // recorded.
            for route in self.services.get_mut(name).into_iter().flat_map(|installed| &mut installed.routes) {
                route.frontends.retain(|left| left != frontend);
            }
        }
        self.maps.set_switch(index, Switch::from_word(0));
        self.set_full_path(name, BTreeSet::new());
        self.remove_limits(name, index)?;
        self.maps.set_record(index, &record::EMPTY);
        self.maps.remove_counters(index)?;
        self.remove_return_paths_of(index);
        self.remove_down_backends(|key| key.service == index);
        for route in routes {
            self.write_route(route.index, Route::NOTHING.tables, 0)?;
            self.route_indices.release_later(route.index);
            for table in route.tables {
                self.release_table(table);
            }
        }
        self.service_indices.release_later(index);
        self.services.remove(name);
        self.table_backends.remove(name);
        Ok(())
    }
}

/// Removes the frontend part of a role if it belongs to this service. The frontend may already belong to another one.
fn clear_frontend(role: &mut EndpointRole, index: u32) {
    if role.service == index {
        (role.service, role.route) = (NONE, NONE);
    }
}
