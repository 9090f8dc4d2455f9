//! Backends in the maps: their ids, their entries, their roles as endpoints.

use std::{collections::BTreeSet, net::SocketAddr};

use anyhow::{Context as _, Result};
use breaker_common::{Backend, EndpointKey, EndpointRole, NONE, V4, V6, switch_flags};
use breaker_core::datapath::Destination;

use crate::datapath::{
    KernelDatapath,
    maps::{
        family::{IpFamily, number},
        filter::{bits_for, position_of},
        index_allocator::IndexAllocator,
        is_not_found,
    },
};

impl KernelDatapath {
    pub(crate) fn backend_ids(&mut self, address: SocketAddr) -> &mut IndexAllocator {
        &mut self.backend_ids[usize::from(address.is_ipv6())]
    }

    /// Returns the id of a backend. A new backend is written to the maps first.
    pub(crate) fn backend_id(&mut self, destination: Destination) -> Result<u32> {
        if let Some(id) = self.backends.get(&destination) {
            return Ok(*id);
        }
        let id = self.backend_ids(destination.0).allocate()?;
        let written = match destination.0 {
            SocketAddr::V4(v4) => self.write_backend(V4::new(v4.ip().octets()), destination, id),
            SocketAddr::V6(v6) => self.write_backend(V6::new(v6.ip().octets()), destination, id),
        };
        if let Err(error) = written {
            self.backend_ids(destination.0).release(id);
            return Err(error);
        }
        self.backends.insert(destination, id);
        Ok(id)
    }

    pub(crate) fn write_backend<A: IpFamily>(
        &mut self,
        addr: A,
        (address, protocol): Destination,
        id: u32,
    ) -> Result<()> {
        let port = address.port().to_be_bytes();
        let ifindex = self.local_ifindex(address);
        let backend = Backend { addr, port, proto: number(protocol), pad: 0, in_use: 0, ifindex };
        A::of_mut(&mut self.maps).backends.set(id, backend, 0).with_context(|| format!("write backend {address}"))?;
        let written = self.update_role((address, protocol), |role| role.backend = id);
        if written.is_err() {
            // Undo the write: an agent that restarts would adopt the entry as a complete backend.
            self.clear_backend::<A>((address, protocol), id)?;
        }
        written
    }

    /// Removes a backend that no table names and no flow uses.
    pub(crate) fn remove_backend(&mut self, destination: Destination, id: u32) -> Result<()> {
        self.update_role(destination, |role| role.backend = NONE)?;
        match destination.0 {
            SocketAddr::V4(_) => self.clear_backend::<V4>(destination, id)?,
            SocketAddr::V6(_) => self.clear_backend::<V6>(destination, id)?,
        }
        self.backends.remove(&destination);
        self.remove_down_backends(|key| *key == super::down::key(key.service, &destination, id));
        self.backend_ids(destination.0).release(id);
        Ok(())
    }

    pub(crate) fn clear_backend<A: IpFamily>(&mut self, (address, _): Destination, id: u32) -> Result<()> {
        let nobody = Backend { addr: A::ZERO, port: [0; 2], proto: 0, pad: 0, in_use: 0, ifindex: 0 };
        A::of_mut(&mut self.maps).backends.set(id, nobody, 0).with_context(|| format!("clear backend {address}"))
    }

    /// Changes the role of an endpoint in the maps. An endpoint without a role is removed.
    pub(crate) fn update_role(&mut self, at: Destination, change: impl FnOnce(&mut EndpointRole)) -> Result<()> {
        match at.0 {
            SocketAddr::V4(v4) => self.update_role_of(V4::new(v4.ip().octets()), at, change),
            SocketAddr::V6(v6) => self.update_role_of(V6::new(v6.ip().octets()), at, change),
        }
    }

    pub(crate) fn update_role_of<A: IpFamily>(
        &mut self,
        addr: A,
        (address, protocol): Destination,
        change: impl FnOnce(&mut EndpointRole),
    ) -> Result<()> {
        let key = EndpointKey::new(addr, address.port().to_be_bytes(), number(protocol));
        let position = position_of(&key);
        let before = A::of(&self.maps).endpoints.get(&key, 0).unwrap_or(EndpointRole::NOTHING);
        let mut role = before;
        change(&mut role);
        if role == before {
            return Ok(());
        }
        for bit in bits_for(&role) {
            self.maps.filter.add(bit, position);
        }
        let endpoints = &mut A::of_mut(&mut self.maps).endpoints;
        let written = if role != EndpointRole::NOTHING {
            endpoints.insert(key, role, 0).with_context(|| format!("write the endpoint {address}"))
        } else {
            match endpoints.remove(&key) {
                Err(error) if is_not_found(&error) => Ok(()),
                removed => removed.with_context(|| format!("remove the endpoint {address}")),
            }
        };
        for bit in bits_for(if written.is_ok() { &before } else { &role }) {
            self.maps.filter.remove(bit, position);
        }
        written
    }

    /// Clears the in-use marks of backends that no flow uses, and removes those that no table names and no entry
    /// mentions.
    pub(crate) fn release_unused_backends(
        &mut self,
        in_use: &BTreeSet<Destination>,
        entries: &BTreeSet<Destination>,
    ) -> Result<()> {
        let named: BTreeSet<Destination> = self.table_backends.values().flatten().copied().collect();
        // A mark is cleared only if no new flow can come: no service with TRACK has the backend in its tables.
        let tracked: BTreeSet<Destination> = self
            .services
            .iter()
            .filter(|(_, s)| self.maps.switch(s.index).has(switch_flags::TRACK))
            .flat_map(|(name, _)| self.table_backends.get(name).into_iter().flatten().copied())
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
                self.remove_backend(destination, id)?;
            }
        }
        Ok(())
    }
}
