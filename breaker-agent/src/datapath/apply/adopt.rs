//! Reads the state that an earlier agent left in the maps.

use std::{
    collections::{BTreeMap, BTreeSet, HashMap},
    net::SocketAddr,
};

use anyhow::{Context as _, Result};
use breaker_common::{NONE, Route, SINGLE_BACKEND, SLOT_REJECT, TABLE_LEN, TableRef, V4, V6, switch_flags};
use breaker_core::{
    datapath::Adopted,
    model::{Frontend, Protocol},
};

use super::{Installed, InstalledRoute, Limited, full_path::is_tracking, record};
use crate::datapath::{
    KernelDatapath,
    maps::{
        Maps,
        family::{self, IpFamily},
    },
};

impl KernelDatapath {
    pub(crate) fn try_adopt(&mut self) -> Result<Vec<Adopted>> {
        self.adopt_backends::<V4>()?;
        self.adopt_backends::<V6>()?;
        self.maps.adopt_filter()?;
        self.adopt_down_backends();
        // An earlier agent may have died after it wrote a backend and before it wrote the backend's role.
        for (destination, id) in self.backends.clone() {
            self.update_role(destination, |role| role.backend = id)?;
        }
        let mut frontends = frontends(&self.maps)?;
        let mut adopted = Vec::new();
        for index in 0..self.maps.sizes.services {
            let record = self.maps.services.get(&index, 0).context("read the records")?;
            let switch = self.maps.switch(index);
            let Some(mut service) = record::decode(&record, switch) else { continue };
            self.service_indices.reserve(index);
            self.maps.add_counters(index)?;
            let mut routes: BTreeMap<u32, InstalledRoute> = BTreeMap::new();
            for (frontend, route) in frontends.remove(&index).unwrap_or_default() {
                service.frontends.push(frontend);
                if let Some(known) = routes.get_mut(&route) {
                    known.frontends.push(frontend);
                    continue;
                }
                self.route_indices.reserve(route);
                let Route { tables, flags } = self.maps.routes.get(&route, 0).context("read the routes")?;
                let in_force = tables[switch.buffer() as usize];
                for table in in_force.into_iter().filter(|table| table & SINGLE_BACKEND == 0) {
                    self.table_indices.reserve(TableRef::from_word(table).number);
                }
                service.backup.extend(self.backends_in(frontend.address, in_force[1])?);
                routes.insert(
                    route,
                    InstalledRoute { index: route, frontends: vec![frontend], flags, slots: None, tables: in_force },
                );
            }
            let routes = routes.into_values().collect();
            if is_tracking(switch.flags) || switch.has(switch_flags::LIMITED) && self.has_overflowed(index) {
                self.set_full_path(&service.name, service.frontends.iter().copied().collect());
            }
            if switch.has(switch_flags::LIMITED) {
                self.maps.limits.add_counters(index)?;
                let counts =
                    self.maps.limits.get(index).tiers.iter().any(breaker_common::TierLimits::counts_connections);
                self.limited.insert(service.name.clone(), Limited { counts, ..Limited::default() });
                self.maps.limits.set_census(index, false);
                if counts {
                    let tcp = service.frontends.iter().filter(|frontend| frontend.protocol == Protocol::Tcp);
                    self.set_counted_frontends(&service.name, tcp.copied().collect());
                }
            }
            self.services.insert(service.name.clone(), Installed { index, routes });
            // Before the first plan it is not known which backends the tables name, so every backend counts as named.
            self.table_backends.insert(service.name.clone(), self.backends.keys().copied().collect());
            adopted.push(service);
        }
        self.maps.filter.rebuild();
        self.update_socket_counting();
        Ok(adopted)
    }

    pub(crate) fn adopt_backends<A: IpFamily>(&mut self) -> Result<()> {
        for id in 0..self.maps.sizes.backends {
            let backend = A::of(&self.maps).backends.get(&id, 0).context("read the backends")?;
            if let Some(protocol) = family::protocol(backend.proto) {
                let address = backend.addr.socket(backend.port);
                self.backend_ids(address).reserve(id);
                self.backends.insert((address, protocol), id);
            }
        }
        Ok(())
    }

    /// Returns the backends in a table (a value of [`Route::tables`]) that have the same IP family as `like`.
    pub(crate) fn backends_in(&self, like: SocketAddr, table: u32) -> Result<BTreeSet<SocketAddr>> {
        let mut ids = BTreeSet::new();
        if table & SINGLE_BACKEND == 0 {
            let table = TableRef::from_word(table);
            for part in 0..table.parts() {
                let used = (table.slots() - part * TABLE_LEN).min(TABLE_LEN) as usize;
                ids.extend(&self.maps.slots.get(&table.key(part), 0).context("read the slots")?.slots[..used]);
            }
        } else if table < SLOT_REJECT {
            ids.insert(table & !SINGLE_BACKEND);
        }
        let of_family = self.backends.iter().filter(|((address, _), _)| address.is_ipv4() == like.is_ipv4());
        Ok(of_family.filter(|(_, id)| ids.contains(id)).map(|((address, _), _)| *address).collect())
    }
}

/// Returns all frontends with the index of their route, by service index.
pub(crate) fn frontends(maps: &Maps) -> Result<HashMap<u32, Vec<(Frontend, u32)>>> {
    pub(crate) fn of<A: IpFamily>(maps: &Maps, frontends: &mut HashMap<u32, Vec<(Frontend, u32)>>) -> Result<()> {
        for entry in A::of(maps).endpoints.iter() {
            let (key, role) = entry.context("read the endpoints")?;
            if let (false, Some(protocol)) = (role.service == NONE, family::protocol(key.proto)) {
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
