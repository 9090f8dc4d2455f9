//! The real datapath: programs and maps in the kernel.
//!
//! Order of writes, so that a packet at any moment sees something whole: backends before the slots that name them,
//! slots into the buffer that is not in force, the filter's bits, then the switch (one word, one store), then new frontends.
//! Taking away goes the other way round. A backend stays known while a flow to it lives.

mod attach;
mod clsact;
mod filter;
mod interfaces;
mod limits;
mod links;
mod load;
mod maps;
mod masquerade;
mod mmap;
mod neighbors;
mod offline;
mod pins;
mod places;
mod sizes;
mod sockets;
mod sweep;
mod xdp;

use std::{
    collections::{BTreeMap, BTreeSet, HashMap},
    net::SocketAddr,
    sync::atomic::Ordering,
    time::Duration,
};

use anyhow::{Context as _, Result};
use breaker_common::{
    Backend, COUNTED, EndpointKey, EndpointRole, NAME_LEN, NONE, PassReason, Route, SLOT_PASSTHROUGH, SLOT_REJECT,
    SLOTS, ServiceCounters, ServiceRecord, Switch, TABLE_OF_ONE, Table, V4, V6, route_flags, switch_flags,
};

use super::{
    Adopted, Datapath, DatapathError, Destination, FlowView, LimitReport, PacketEvent, Sweep,
    plan::{RoutePlan, ServicePlan, Slot, SlotTable},
};
use crate::{
    limits::Limits,
    model::{Frontend, Override, Protocol, ServiceName},
};

pub use attach::{Attached, Attacher, has_tcx, kernel_at_least};
use filter::{Bit, Says, bit_of};
pub use interfaces::{Interface, InterfaceChange, Side, Wanted, watch as watch_interfaces};
pub use load::{Loaded, Options as LoadOptions, TailCalls, load};
pub use maps::Maps;
use maps::{Net, number};
pub use masquerade::{install as install_masquerade_rule, remove as remove_masquerade_rule};
pub use neighbors::{Located, watch_pods};
pub use offline::{LeftLimits, Leftover, read as read_offline};
pub use pins::{Cleaned, PinDir, PinError, is_on_bpffs};
use places::Places;
pub use sizes::Sizes;
pub use sockets::cgroup_root;

/// A service that has a place in the maps.
#[derive(Debug)]
struct Installed {
    index: u32,
    routes: Vec<InstalledRoute>,
}

impl Installed {
    /// Whether the maps have these routes already.
    fn has(&self, routes: &[RoutePlan]) -> bool {
        let same = |(installed, route): (&InstalledRoute, &RoutePlan)| {
            installed.slots.as_ref() == Some(&route.slots)
                && installed.flags == flags_of(route)
                && installed.frontends == route.frontends
        };
        self.routes.len() == routes.len() && self.routes.iter().zip(routes).all(same)
    }
}

/// A route that has a place in the maps.
#[derive(Clone, Debug)]
struct InstalledRoute {
    index: u32,
    frontends: Vec<Frontend>,
    /// Bits of [`route_flags`].
    flags: u32,
    /// What the tables in force hold; `None` after adoption, when it is not known.
    slots: Option<[SlotTable; 2]>,
    /// Where they are, as the map has it.
    tables: [u32; 2],
}

/// A service whose limits are in the maps.
#[derive(Debug, Default)]
struct Limited {
    /// What is configured; `None` after adoption, when it is not known.
    limits: Option<Limits>,
    /// Frontends whose SYN, FIN and RST segments take the full path.
    counted: BTreeSet<Frontend>,
    /// Whether connections were counted.
    counts: bool,
    /// Since when every packet is seen, by [`maps::monotonic_ns`].
    census_since: Option<u64>,
}

/// See the module.
#[derive(Debug)]
pub struct KernelDatapath {
    maps: Maps,
    services: BTreeMap<ServiceName, Installed>,
    /// Backend ids.
    backends: HashMap<Destination, u32>,
    /// Backends that a service's tables name, by service.
    named: BTreeMap<ServiceName, BTreeSet<Destination>>,
    /// Frontends to which every packet counts, by service.
    watched: BTreeMap<ServiceName, BTreeSet<Frontend>>,
    /// Services with limits.
    limited: BTreeMap<ServiceName, Limited>,
    /// What the last sweep found: flows that leave the stack out, or services that have them.
    fast_before: bool,
    /// Where pods of this node are, by address.
    located: Located,
    service_places: Places,
    route_places: Places,
    table_places: Places,
    backend_places: [Places; 2],
}

impl KernelDatapath {
    /// On maps that are loaded or adopted.
    #[must_use]
    pub fn new(maps: Maps) -> Self {
        let sizes = maps.sizes;
        Self {
            maps,
            services: BTreeMap::new(),
            backends: HashMap::new(),
            named: BTreeMap::new(),
            watched: BTreeMap::new(),
            limited: BTreeMap::new(),
            fast_before: true,
            located: Located::new(),
            service_places: Places::new("services", sizes.services),
            route_places: Places::new("routes", sizes.routes),
            table_places: Places::new("selection tables", sizes.tables),
            backend_places: ["IPv4 backends", "IPv6 backends"].map(|what| Places::new(what, sizes.backends)),
        }
    }

    /// How large the maps are.
    #[must_use]
    pub const fn sizes(&self) -> &Sizes {
        &self.maps.sizes
    }

    /// Whether flows may leave the stack out, or still do.
    #[must_use]
    pub fn any_fast(&self) -> bool {
        self.maps.any_fast()
    }

    /// Takes in where the node's pods are: host-side interfaces with our programs, by the pods' addresses.
    pub fn locate(&mut self, pods: Located) {
        self.located = pods;
        for ((address, _), id) in &self.backends {
            let ifindex = self.where_is(*address);
            if self.interface(*address, *id) != ifindex {
                match address {
                    SocketAddr::V4(_) => self.maps.v4.set_interface(*id, ifindex),
                    SocketAddr::V6(_) => self.maps.v6.set_interface(*id, ifindex),
                }
            }
        }
    }

    /// The interface of the pod that has an address; 0 = none that is known.
    fn where_is(&self, address: SocketAddr) -> u32 {
        self.located.get(&address.ip()).copied().unwrap_or(0)
    }

    /// The interface of the pod that a backend is, as the programs know it; 0 = none.
    fn interface(&self, address: SocketAddr, id: u32) -> u32 {
        match address {
            SocketAddr::V4(_) => self.maps.v4.interface(id),
            SocketAddr::V6(_) => self.maps.v6.interface(id),
        }
    }

    fn backend_places(&mut self, address: SocketAddr) -> &mut Places {
        &mut self.backend_places[usize::from(address.is_ipv6())]
    }

    /// The id of a backend; a new one gets its entries first.
    fn backend_id(&mut self, destination: Destination) -> Result<u32> {
        if let Some(id) = self.backends.get(&destination) {
            return Ok(*id);
        }
        let id = self.backend_places(destination.0).take()?;
        let written = match destination.0 {
            SocketAddr::V4(v4) => self.write_backend(V4::new(v4.ip().octets()), destination, id),
            SocketAddr::V6(v6) => self.write_backend(V6::new(v6.ip().octets()), destination, id),
        };
        if let Err(error) = written {
            self.backend_places(destination.0).give_back(id);
            return Err(error);
        }
        self.backends.insert(destination, id);
        Ok(id)
    }

    fn write_backend<A: Net>(&mut self, addr: A, (address, protocol): Destination, id: u32) -> Result<()> {
        let port = address.port().to_be_bytes();
        let ifindex = self.where_is(address);
        let backend = Backend { addr, port, proto: number(protocol), pad: 0, in_use: 0, ifindex };
        A::of_mut(&mut self.maps).backends.set(id, backend, 0).with_context(|| format!("write backend {address}"))?;
        let written = self.change_role((address, protocol), |role| role.backend = id);
        if written.is_err() {
            // An agent that adopts it would take it for whole.
            self.clear_backend::<A>((address, protocol), id)?;
        }
        written
    }

    /// Forgets a backend that no table names and no flow uses.
    fn retire(&mut self, destination: Destination, id: u32) -> Result<()> {
        self.change_role(destination, |role| role.backend = NONE)?;
        match destination.0 {
            SocketAddr::V4(_) => self.clear_backend::<V4>(destination, id)?,
            SocketAddr::V6(_) => self.clear_backend::<V6>(destination, id)?,
        }
        self.backends.remove(&destination);
        self.backend_places(destination.0).give_back(id);
        Ok(())
    }

    fn clear_backend<A: Net>(&mut self, (address, _): Destination, id: u32) -> Result<()> {
        let nobody = Backend { addr: A::ZERO, port: [0; 2], proto: 0, pad: 0, in_use: 0, ifindex: 0 };
        A::of_mut(&mut self.maps).backends.set(id, nobody, 0).with_context(|| format!("clear backend {address}"))
    }

    /// Changes what an address is to the programs; an entry that is nothing any more goes.
    fn change_role(&mut self, at: Destination, change: impl FnOnce(&mut EndpointRole)) -> Result<()> {
        match at.0 {
            SocketAddr::V4(v4) => self.change_role_of(V4::new(v4.ip().octets()), at, change),
            SocketAddr::V6(v6) => self.change_role_of(V6::new(v6.ip().octets()), at, change),
        }
    }

    fn change_role_of<A: Net>(
        &mut self,
        addr: A,
        (address, protocol): Destination,
        change: impl FnOnce(&mut EndpointRole),
    ) -> Result<()> {
        let key = EndpointKey::new(addr, address.port().to_be_bytes(), number(protocol));
        let bit = bit_of(&key);
        let before = A::of(&self.maps).endpoints.get(&key, 0).unwrap_or(EndpointRole::NOTHING);
        let mut role = before;
        change(&mut role);
        if role == before {
            return Ok(());
        }
        for says in filter::said_of(&role) {
            self.maps.filter.add(says, bit);
        }
        let endpoints = &mut A::of_mut(&mut self.maps).endpoints;
        let written = if role != EndpointRole::NOTHING {
            endpoints.insert(key, role, 0).with_context(|| format!("write the endpoint {address}"))
        } else {
            match endpoints.remove(&key) {
                Err(error) if is_not_there(&error) => Ok(()),
                removed => removed.with_context(|| format!("remove the endpoint {address}")),
            }
        };
        for says in filter::said_of(if written.is_ok() { &before } else { &role }) {
            self.maps.filter.remove(says, bit);
        }
        written
    }

    /// Has every packet to a plan's frontends looked at, if the plan asks for it: before it is in force.
    fn watch_more(&mut self, plan: &ServicePlan) {
        if is_watched(plan.flags) {
            let before = self.watched.get(&plan.name).into_iter().flatten();
            self.watch(&plan.name, plan.frontends().chain(before).copied().collect());
        }
    }

    /// Has packets to a plan's frontends looked at no more, if the plan does not ask for it: when it is in force. (While it does,
    /// frontends that it lost stay as well: flows to them may be the service's, and another has the frontend.)
    fn watch_less(&mut self, plan: &ServicePlan, index: u32) {
        if is_watched(plan.flags) || self.is_in_census(&plan.name) {
            return;
        }
        self.watch(&plan.name, BTreeSet::new());
        // A program may have sent a connection to the backup, because of a limit, since the last sweep looked.
        if plan.limits.is_some() && self.has_overflowed(index) {
            self.watch(&plan.name, plan.frontends().copied().collect());
        }
    }

    fn has_overflowed(&self, index: u32) -> bool {
        self.maps.limits.overflowed(index).load(Ordering::SeqCst) != 0
    }

    fn is_in_census(&self, name: &ServiceName) -> bool {
        self.limited.get(name).is_some_and(|limited| limited.census_since.is_some())
    }

    /// Writes a plan's limits, and has the ends of connections seen if they are counted: before the plan is in force.
    fn limit_more(&mut self, plan: &ServicePlan, index: u32) {
        let Some(limits) = plan.limits else { return };
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
        self.count(&plan.name, wanted.union(&before).copied().collect());
    }

    /// Takes away what a plan's limits do not need any more: when it is in force.
    fn limit_less(&mut self, plan: &ServicePlan, index: u32) -> Result<()> {
        let Some(limits) = plan.limits else { return self.unlimit(&plan.name, index) };
        let counts = |f: &&Frontend| limits.counts() && f.protocol == Protocol::Tcp;
        if !limits.counts() && self.limited.get_mut(&plan.name).is_some_and(|l| std::mem::replace(&mut l.counts, false))
        {
            self.maps.limits.forget_connections(index);
            self.settle_sockets();
        }
        self.count(&plan.name, plan.frontends().filter(counts).copied().collect());
        Ok(())
    }

    /// Forgets a service's limits, and whom they counted.
    fn unlimit(&mut self, name: &ServiceName, index: u32) -> Result<()> {
        if !self.limited.contains_key(name) {
            return Ok(());
        }
        self.count(name, BTreeSet::new());
        self.limited.remove(name);
        self.settle_sockets();
        self.maps.limits.clear(index)
    }

    /// Tells the filter which of a service's frontends count connections.
    fn count(&mut self, name: &ServiceName, wanted: BTreeSet<Frontend>) {
        let Some(limited) = self.limited.get_mut(name) else { return };
        let before = std::mem::take(&mut limited.counted);
        for frontend in wanted.difference(&before) {
            self.maps.filter.add(Says::Frontend, counted_bit_of(frontend));
        }
        for frontend in before.difference(&wanted) {
            self.maps.filter.remove(Says::Frontend, counted_bit_of(frontend));
        }
        limited.counted = wanted;
    }

    /// Tells the programs whether anybody counts connections.
    fn settle_sockets(&self) {
        let counts = |limited: &Limited| limited.limits.is_none_or(|limits| limits.counts());
        self.maps.set_counts_sockets(self.limited.values().any(counts));
    }

    /// Takes out connections that have ended without a sign, and asks for all packets of services that are near a limit.
    /// Returns the services whose primary was at a limit.
    fn sweep_limits(&mut self) -> BTreeSet<ServiceName> {
        let now = maps::monotonic_ns();
        let mut rules = BTreeMap::new();
        for (name, limited) in &self.limited {
            let Some(installed) = self.services.get(name) else { continue };
            let seen = limited.census_since.map(|since| Duration::from_nanos(now.saturating_sub(since)));
            let idle = limited.limits.map(|limits| limits.idle);
            rules.insert(
                installed.index,
                limits::Rule { idle: idle.filter(|idle| seen.is_some_and(|seen| seen > *idle)) },
            );
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
                // The switch says so from now on. A program that sends another one there sets it again.
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
                self.watch(&name, frontends);
            } else if !is_watched(switch.flags) && !self.has_overflowed(index) {
                self.watch(&name, BTreeSet::new());
            }
        }
        overflowed
    }

    /// Tells the filter to which of a service's frontends every packet counts.
    fn watch(&mut self, name: &ServiceName, wanted: BTreeSet<Frontend>) {
        let before = self.watched.remove(name).unwrap_or_default();
        for frontend in wanted.difference(&before) {
            self.maps.filter.add(Says::Every, bit_of_frontend(frontend));
        }
        for frontend in before.difference(&wanted) {
            self.maps.filter.remove(Says::Every, bit_of_frontend(frontend));
        }
        if !wanted.is_empty() {
            self.watched.insert(name.clone(), wanted);
        }
    }

    /// Writes a selection table, and returns what a route says of it.
    fn write_table(&mut self, protocol: Protocol, table: &SlotTable) -> Result<u32> {
        let value = |slot: &Slot, datapath: &mut Self| match slot {
            Slot::PassThrough => Ok(SLOT_PASSTHROUGH),
            Slot::Reject => Ok(SLOT_REJECT),
            Slot::Backend(address) => datapath.backend_id((*address, protocol)),
        };
        let slots = match table {
            SlotTable::All(slot @ Slot::Backend(_)) => return Ok(TABLE_OF_ONE | value(slot, self)?),
            SlotTable::All(slot) => return value(slot, self),
            SlotTable::Balanced(_) => table.places(),
        };
        let mut table = Table { slots: [0; SLOTS.next_power_of_two() as usize] };
        for (place, slot) in table.slots.iter_mut().zip(&slots) {
            *place = value(slot, self)?;
        }
        let place = self.table_places.take()?;
        if let Err(error) = self.maps.slots.set(place, table, 0) {
            self.table_places.give_back(place);
            return Err(error).with_context(|| format!("write selection table {place}"));
        }
        Ok(place)
    }

    /// Gives a table's place back, if it has one. Packets that read the route before may be reading it.
    fn drop_table(&mut self, table: u32) {
        if table & TABLE_OF_ONE == 0 {
            self.table_places.give_back_later(table);
        }
    }

    /// The routes of a plan with the places that they have or get, and with their new tables written. Which of a service's
    /// routes is which goes by the frontends that it has in common with an earlier one.
    fn place_routes(&mut self, plan: &ServicePlan, old: &[InstalledRoute]) -> Result<Vec<InstalledRoute>> {
        let mut left: Vec<&InstalledRoute> = old.iter().collect();
        let mut placed = Vec::new();
        let outcome = plan.routes.iter().try_for_each(|route| {
            let same = left.iter().position(|o| o.frontends.iter().any(|f| route.frontends.contains(f)));
            let known = same.map(|at| left.swap_remove(at));
            placed.push(self.place_route(route, known)?);
            Ok(())
        });
        if let Err(error) = outcome {
            // Nothing points to what is new yet.
            for route in &placed {
                self.give_up(route, old);
            }
            return Err(error);
        }
        Ok(placed)
    }

    fn place_route(&mut self, route: &RoutePlan, known: Option<&InstalledRoute>) -> Result<InstalledRoute> {
        let mut tables = [SLOT_PASSTHROUGH; 2];
        for (tier, table) in route.slots.iter().enumerate() {
            let same = known.filter(|k| k.slots.as_ref().is_some_and(|slots| slots[tier] == *table));
            let written = match same {
                Some(known) => Ok(known.tables[tier]),
                None => self.write_table(route.protocol, table),
            };
            match written {
                Ok(start) => tables[tier] = start,
                Err(error) => {
                    if tier > 0 && known.is_none_or(|k| k.tables[0] != tables[0]) {
                        self.drop_table(tables[0]);
                    }
                    return Err(error);
                }
            }
        }
        let index = match known {
            Some(known) => known.index,
            None => self.route_places.take()?,
        };
        let frontends = route.frontends.clone();
        Ok(InstalledRoute { index, frontends, flags: flags_of(route), slots: Some(route.slots.clone()), tables })
    }

    /// Gives back the places of a route that never came into force.
    fn give_up(&mut self, route: &InstalledRoute, old: &[InstalledRoute]) {
        let known = old.iter().find(|o| o.index == route.index);
        for (tier, start) in route.tables.into_iter().enumerate() {
            if known.is_none_or(|k| k.tables[tier] != start) {
                self.drop_table(start);
            }
        }
        if known.is_none() {
            self.route_places.give_back(route.index);
        }
    }

    fn write_route(&mut self, index: u32, tables: [[u32; 2]; 2], flags: u32) -> Result<()> {
        self.maps.routes.set(index, Route { tables, flags }, 0).with_context(|| format!("write route {index}"))
    }

    fn try_apply(&mut self, plan: &ServicePlan) -> Result<()> {
        // A flip, and nothing else.
        if let Some(installed) = self.services.get(&plan.name).filter(|installed| installed.has(&plan.routes)) {
            let (index, before) = (installed.index, self.maps.switch(installed.index));
            let watch_changes = self.watched.contains_key(&plan.name) != is_watched(plan.flags);
            if watch_changes {
                self.watch_more(plan);
            }
            self.limit_more(plan, index);
            self.throw(plan, index, before.buffer());
            if watch_changes {
                self.watch_less(plan, index);
            }
            return self.limit_less(plan, index);
        }
        let (index, old) = match self.services.get(&plan.name) {
            Some(installed) => (installed.index, installed.routes.clone()),
            None => (self.service_places.take()?, Vec::new()),
        };
        let outcome = self.apply_at(plan, index, &old);
        if outcome.is_err() && !self.services.contains_key(&plan.name) {
            self.service_places.give_back(index);
        }
        outcome
    }

    /// Throws a service's switch: everything that it leads to is there.
    fn throw(&mut self, plan: &ServicePlan, index: u32, buffer: u32) {
        self.maps.set_record(index, &record(plan, index));
        let mut flags = plan.flags;
        if buffer == 1 {
            flags |= switch_flags::BUFFER;
        }
        if plan.flags & switch_flags::FAST != 0 {
            self.maps.set_any_fast(true);
            self.fast_before = true;
        }
        let decision = &plan.decision;
        let switch = Switch { epoch: decision.epoch, share: decision.share, state: decision.state as u8, flags };
        self.maps.set_switch(index, switch);
    }

    fn apply_at(&mut self, plan: &ServicePlan, index: u32, old: &[InstalledRoute]) -> Result<()> {
        let known = self.services.contains_key(&plan.name);
        let before = if known { self.maps.switch(index) } else { Switch::from_word(0) };
        let routes = self.place_routes(plan, old)?;
        let changed = routes.iter().any(|new| old.iter().any(|o| o.index == new.index && o.tables != new.tables));
        let buffer = if changed { 1 - before.buffer() } else { before.buffer() };
        for route in &routes {
            let known = old.iter().find(|o| o.index == route.index);
            if !changed && known.is_some_and(|o| (o.tables, o.flags) == (route.tables, route.flags)) {
                continue;
            }
            // What is in force stays in its buffer until the switch is thrown.
            let in_force = known.map_or(route.tables, |o| o.tables);
            let tables = if buffer == 1 { [in_force, route.tables] } else { [route.tables, in_force] };
            self.write_route(route.index, if changed { tables } else { [route.tables; 2] }, route.flags)?;
        }
        self.watch_more(plan);
        self.limit_more(plan, index);
        self.throw(plan, index, buffer);

        // From here on the new routes are in force, whatever fails below and is tried again.
        for gone in old {
            let stays = routes.iter().find(|r| r.index == gone.index);
            for (tier, start) in gone.tables.into_iter().enumerate() {
                if stays.is_none_or(|s| s.tables[tier] != start) {
                    self.drop_table(start);
                }
            }
        }
        let wanted: BTreeMap<Frontend, u32> =
            routes.iter().flat_map(|route| route.frontends.iter().map(|f| (*f, route.index))).collect();
        let had: BTreeMap<Frontend, u32> =
            old.iter().flat_map(|route| route.frontends.iter().map(|f| (*f, route.index))).collect();
        // Until their roles are written, frontends count as those of the routes that they were of, also those that leave.
        let mut installed = routes.clone();
        for route in &mut installed {
            let of = |f: &&Frontend| had.get(*f) == Some(&route.index);
            route.frontends = had.keys().filter(of).copied().collect();
        }
        let leaving: Vec<&InstalledRoute> = old.iter().filter(|o| !routes.iter().any(|r| r.index == o.index)).collect();
        installed.extend(leaving.iter().map(|route| InstalledRoute {
            slots: Some([SlotTable::All(Slot::PassThrough), SlotTable::All(Slot::PassThrough)]),
            tables: [SLOT_PASSTHROUGH; 2],
            ..(*route).clone()
        }));
        self.services.insert(plan.name.clone(), Installed { index, routes: installed });
        self.named.insert(plan.name.clone(), plan.backends());
        for (frontend, route) in wanted.iter().filter(|(f, route)| had.get(f) != Some(route)) {
            // One that was ours may be another service's by now: of a service that leaves, above all.
            let was_ours = had.contains_key(frontend);
            self.change_role((frontend.address, frontend.protocol), |role| {
                if !was_ours || role.service == index {
                    (role.service, role.route) = (index, *route);
                }
            })?;
        }
        for frontend in had.keys().filter(|f| !wanted.contains_key(f)) {
            self.change_role((frontend.address, frontend.protocol), |role| leave(role, index))?;
        }
        for route in &leaving {
            self.write_route(route.index, Route::NOTHING.tables, 0)?;
            self.route_places.give_back_later(route.index);
        }
        for route in routes.iter().filter(|_| changed) {
            self.write_route(route.index, [route.tables; 2], route.flags)?;
        }
        self.services.insert(plan.name.clone(), Installed { index, routes });
        self.watch_less(plan, index);
        self.limit_less(plan, index)
    }

    fn try_remove(&mut self, name: &ServiceName) -> Result<()> {
        let Some(installed) = self.services.get(name) else { return Ok(()) };
        let (index, routes) = (installed.index, installed.routes.clone());
        for frontend in routes.iter().flat_map(|route| &route.frontends) {
            self.change_role((frontend.address, frontend.protocol), |role| leave(role, index))?;
            // Should something fail below, and the service come back: what is gone is known to be.
            for route in self.services.get_mut(name).into_iter().flat_map(|installed| &mut installed.routes) {
                route.frontends.retain(|left| left != frontend);
            }
        }
        self.maps.set_switch(index, Switch::from_word(0));
        self.watch(name, BTreeSet::new());
        self.unlimit(name, index)?;
        self.maps.set_record(index, &record_of_nobody());
        self.maps.clear_counters(index)?;
        for route in routes {
            self.write_route(route.index, Route::NOTHING.tables, 0)?;
            self.route_places.give_back_later(route.index);
            for start in route.tables {
                self.drop_table(start);
            }
        }
        self.service_places.give_back_later(index);
        self.services.remove(name);
        self.named.remove(name);
        Ok(())
    }

    fn try_adopt(&mut self) -> Result<Vec<Adopted>> {
        self.adopt_backends::<V4>()?;
        self.adopt_backends::<V6>()?;
        self.maps.adopt_filter()?;
        // An earlier agent may have died between a backend and its role.
        for (destination, id) in self.backends.clone() {
            self.change_role(destination, |role| role.backend = id)?;
        }
        let mut frontends = frontends(&self.maps)?;
        let mut adopted = Vec::new();
        for index in 0..self.maps.sizes.services {
            let record = self.maps.services.get(&index, 0).context("read the records")?;
            let switch = self.maps.switch(index);
            let Some(mut service) = adopt_record(&record, switch) else { continue };
            self.service_places.claim(index);
            let mut routes: BTreeMap<u32, InstalledRoute> = BTreeMap::new();
            for (frontend, route) in frontends.remove(&index).unwrap_or_default() {
                service.frontends.push(frontend);
                if let Some(known) = routes.get_mut(&route) {
                    known.frontends.push(frontend);
                    continue;
                }
                self.route_places.claim(route);
                let Route { tables, flags } = self.maps.routes.get(&route, 0).context("read the routes")?;
                let in_force = tables[switch.buffer() as usize];
                for table in in_force.into_iter().filter(|table| table & TABLE_OF_ONE == 0) {
                    self.table_places.claim(table);
                }
                service.backup.extend(self.named_by(frontend.address, in_force[1])?);
                routes.insert(
                    route,
                    InstalledRoute { index: route, frontends: vec![frontend], flags, slots: None, tables: in_force },
                );
            }
            let routes = routes.into_values().collect();
            if is_watched(switch.flags) || switch.has(switch_flags::LIMITED) && self.has_overflowed(index) {
                self.watch(&service.name, service.frontends.iter().copied().collect());
            }
            if switch.has(switch_flags::LIMITED) {
                let counts = self.maps.limits.get(index).tiers.iter().any(breaker_common::TierLimits::counts);
                self.limited.insert(service.name.clone(), Limited { counts, ..Limited::default() });
                self.maps.limits.set_census(index, false);
                if counts {
                    let tcp = service.frontends.iter().filter(|frontend| frontend.protocol == Protocol::Tcp);
                    self.count(&service.name, tcp.copied().collect());
                }
            }
            self.services.insert(service.name.clone(), Installed { index, routes });
            // What its tables name is not known before the first plan; until then every backend counts as named.
            self.named.insert(service.name.clone(), self.backends.keys().copied().collect());
            adopted.push(service);
        }
        self.maps.filter.settle();
        self.settle_sockets();
        Ok(adopted)
    }

    fn adopt_backends<A: Net>(&mut self) -> Result<()> {
        for id in 0..self.maps.sizes.backends {
            let backend = A::of(&self.maps).backends.get(&id, 0).context("read the backends")?;
            if let Some(protocol) = maps::protocol(backend.proto) {
                let address = backend.addr.socket(backend.port);
                self.backend_places(address).claim(id);
                self.backends.insert((address, protocol), id);
            }
        }
        Ok(())
    }

    /// Backends that a table names, of the family of `like`.
    fn named_by(&self, like: SocketAddr, table: u32) -> Result<BTreeSet<SocketAddr>> {
        let mut ids = BTreeSet::new();
        if table & TABLE_OF_ONE == 0 {
            ids.extend(&self.maps.slots.get(&table, 0).context("read the slots")?.slots[..SLOTS as usize]);
        } else if table < SLOT_REJECT {
            ids.insert(table & !TABLE_OF_ONE);
        }
        let of_family = self.backends.iter().filter(|((address, _), _)| address.is_ipv4() == like.is_ipv4());
        Ok(of_family.filter(|(_, id)| ids.contains(id)).map(|((address, _), _)| *address).collect())
    }

    fn index(&self, name: &ServiceName) -> Result<u32, DatapathError> {
        let installed = self.services.get(name);
        installed.map(|s| s.index).ok_or_else(|| DatapathError(format!("{name} is not in the maps yet")))
    }

    /// Clears the marks of backends that no flow uses, and forgets those that no table names either.
    fn settle_backends(&mut self, in_use: &BTreeSet<Destination>, entries: &BTreeSet<Destination>) -> Result<()> {
        let named: BTreeSet<Destination> = self.named.values().flatten().copied().collect();
        // A mark is cleared only where no new flow can come: no service that looks into the tables names the backend.
        let tracked: BTreeSet<Destination> = self
            .services
            .iter()
            .filter(|(_, s)| self.maps.switch(s.index).has(switch_flags::TRACK))
            .flat_map(|(name, _)| self.named.get(name).into_iter().flatten().copied())
            .collect();
        let known: Vec<_> = self.backends.iter().map(|(destination, id)| (*destination, *id)).collect();
        for (destination, id) in known {
            if !in_use.contains(&destination) && !tracked.contains(&destination) {
                match destination.0 {
                    SocketAddr::V4(_) => self.maps.v4.clear_in_use(id),
                    SocketAddr::V6(_) => self.maps.v6.clear_in_use(id),
                }
            }
            if !named.contains(&destination) && !in_use.contains(&destination) && !entries.contains(&destination) {
                self.retire(destination, id)?;
            }
        }
        Ok(())
    }
}

impl Datapath for KernelDatapath {
    fn adopt(&mut self) -> Result<Vec<Adopted>, DatapathError> {
        Ok(self.try_adopt()?)
    }

    fn apply(&mut self, plan: &ServicePlan) -> Result<(), DatapathError> {
        Ok(self.try_apply(plan)?)
    }

    fn remove(&mut self, name: &ServiceName) -> Result<(), DatapathError> {
        Ok(self.try_remove(name)?)
    }

    fn beat(&mut self, lease: Duration, unix_ns: u64) {
        self.maps.beat(lease, unix_ns);
        // No program runs as long as that.
        for places in [&mut self.service_places, &mut self.route_places, &mut self.table_places] {
            places.turn();
        }
    }

    fn counters(&self, name: &ServiceName) -> Result<ServiceCounters, DatapathError> {
        let index = self.index(name)?;
        Ok(self.maps.counters(index)?)
    }

    fn limits(&self, name: &ServiceName, clients: usize) -> Result<LimitReport, DatapathError> {
        let index = self.index(name)?;
        Ok(self.maps.limits.report(index, clients)?)
    }

    fn reasons(&self) -> Result<Vec<(PassReason, u64)>, DatapathError> {
        Ok(self.maps.reasons()?)
    }

    fn sweep(&mut self, idle: Option<Duration>) -> Result<Sweep, DatapathError> {
        let names: HashMap<u32, ServiceName> = self.services.iter().map(|(n, s)| (s.index, n.clone())).collect();
        let found = sweep::sweep(&mut self.maps, &names, idle)?;
        self.settle_backends(&found.redirected_to, &found.all_to)?;
        // By the switches themselves: after a restart they are all that is known.
        let fast = |s: &Installed| self.maps.switch(s.index).has(switch_flags::FAST);
        let any_fast = found.any_fast || self.services.values().any(fast);
        // Cleared when two sweeps in a row agree: the walk may miss a flow that is moved between the tables meanwhile.
        if any_fast || !std::mem::replace(&mut self.fast_before, any_fast) {
            self.maps.set_any_fast(any_fast);
        }
        self.fast_before |= any_fast;
        Ok(Sweep { overflowed: self.sweep_limits(), ..found.sweep })
    }

    fn cut(&mut self, name: &ServiceName, doomed: &dyn Fn(Destination) -> bool) -> Result<usize, DatapathError> {
        let index = self.index(name)?;
        Ok(sweep::cut(&mut self.maps, index, doomed)?)
    }

    fn is_near(&self, destination: Destination) -> bool {
        self.backends.get(&destination).is_some_and(|id| self.interface(destination.0, *id) != 0)
    }

    fn flows(&self, name: &ServiceName, limit: usize) -> Result<Vec<FlowView>, DatapathError> {
        let index = self.index(name)?;
        Ok(sweep::list(&self.maps, index, limit)?)
    }

    fn events(&mut self) -> Vec<PacketEvent> {
        let names: HashMap<u32, ServiceName> = self.services.iter().map(|(n, s)| (s.index, n.clone())).collect();
        self.maps.events(&names)
    }
}

/// Whether there was nothing to remove.
fn is_not_there(error: &aya::maps::MapError) -> bool {
    match error {
        aya::maps::MapError::KeyNotFound => true,
        aya::maps::MapError::SyscallError(error) => error.io_error.kind() == std::io::ErrorKind::NotFound,
        _ => false,
    }
}

/// Bits of [`route_flags`].
const fn flags_of(route: &RoutePlan) -> u32 {
    if route.keep_client { route_flags::KEEP_CLIENT } else { 0 }
}

/// Whether packets that are not the first of a flow count, by bits of [`switch_flags`].
const fn is_watched(flags: u8) -> bool {
    flags & switch_flags::TRACK != 0
}

/// A frontend's bit in the filter.
fn bit_of_frontend(frontend: &Frontend) -> Bit {
    bit_under(frontend, number(frontend.protocol))
}

/// The bit in the filter that says that a frontend's service counts connections.
fn counted_bit_of(frontend: &Frontend) -> Bit {
    bit_under(frontend, number(frontend.protocol) | COUNTED)
}

fn bit_under(frontend: &Frontend, proto: u8) -> Bit {
    let port = frontend.address.port().to_be_bytes();
    match frontend.address {
        SocketAddr::V4(v4) => bit_of(&EndpointKey::new(V4::new(v4.ip().octets()), port, proto)),
        SocketAddr::V6(v6) => bit_of(&EndpointKey::new(V6::new(v6.ip().octets()), port, proto)),
    }
}

/// The address is no frontend of this service any more; it may be another's already.
fn leave(role: &mut EndpointRole, index: u32) {
    if role.service == index {
        (role.service, role.route) = (NONE, NONE);
    }
}

fn record_of_nobody() -> ServiceRecord<u8> {
    ServiceRecord {
        name: [0; NAME_LEN],
        since_unix_ns: 0,
        override_until_unix_ns: 0,
        seed: 0,
        half_open_limit: 0,
        trips: 0,
        reason: 0,
        override_kind: 0,
        pad: 0,
    }
}

fn record(plan: &ServicePlan, index: u32) -> ServiceRecord<u8> {
    let mut name = [0; NAME_LEN];
    let bytes = plan.name.as_str().as_bytes();
    let length = bytes.len().min(NAME_LEN - 1);
    name[..length].copy_from_slice(&bytes[..length]);
    let decision = &plan.decision;
    ServiceRecord {
        name,
        since_unix_ns: decision.since_unix_ns,
        override_until_unix_ns: decision.override_.1,
        // Any number that differs between services and stays the same for one.
        seed: index.wrapping_mul(0x9e37_79b9),
        half_open_limit: plan.half_open_limit,
        trips: decision.trips,
        reason: decision.reason as u8,
        override_kind: match decision.override_.0 {
            Override::Auto => 0,
            Override::ForceOpen => 1,
            Override::ForceClosed => 2,
        },
        pad: 0,
    }
}

/// Every service's frontends and their routes, by its index.
fn frontends(maps: &Maps) -> Result<HashMap<u32, Vec<(Frontend, u32)>>> {
    fn of<A: Net>(maps: &Maps, frontends: &mut HashMap<u32, Vec<(Frontend, u32)>>) -> Result<()> {
        for entry in A::of(maps).endpoints.iter() {
            let (key, role) = entry.context("read the endpoints")?;
            if let (false, Some(protocol)) = (role.service == NONE, maps::protocol(key.proto)) {
                let frontend = Frontend { address: key.addr.socket(key.port), protocol };
                frontends.entry(role.service).or_default().push((frontend, role.route));
            }
        }
        Ok(())
    }
    let mut frontends = HashMap::new();
    of::<V4>(maps, &mut frontends)?;
    of::<V6>(maps, &mut frontends)?;
    Ok(frontends)
}

/// A record as an earlier agent left it; `None` for a free place, or one with numbers that we do not know.
fn adopt_record(record: &ServiceRecord<u8>, switch: Switch<u8>) -> Option<Adopted> {
    let name = record.name.split(|b| *b == 0).next().filter(|name| !name.is_empty())?;
    Some(Adopted {
        name: ServiceName::new(std::str::from_utf8(name).ok()?),
        frontends: Vec::new(),
        backup: BTreeSet::new(),
        state: switch.state.try_into().ok()?,
        epoch: switch.epoch,
        share: switch.share,
        reason: record.reason.try_into().ok()?,
        since_unix_ns: record.since_unix_ns,
        trips: record.trips,
        override_: (
            match record.override_kind {
                1 => Override::ForceOpen,
                2 => Override::ForceClosed,
                _ => Override::Auto,
            },
            record.override_until_unix_ns,
        ),
    })
}
