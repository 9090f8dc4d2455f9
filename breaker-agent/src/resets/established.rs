//! The established connections of the tiers that services have left: those to a primary as conntrack has them, or as the
//! programs noted them, and those to a backup as the flow tables have them.

use std::{
    collections::{HashMap, HashSet},
    net::SocketAddr,
    time::Duration,
};

use anyhow::Result;
use breaker_core::engine::departure::{Departed, Departure};
use tokio::time::Instant;

use super::Connection;
use crate::{
    clock,
    datapath::{
        conntrack::{self, Connections},
        moved_flows::{MovedFlow, MovedFlows},
        syns::Syns,
    },
};

/// From how many addresses on all entries of conntrack are read at once.
const MANY: usize = 7;
/// How long a whole table, once read, serves for other services: thousands may open in one moment.
const FRESH: Duration = Duration::from_millis(200);

/// The content of a whole table for the addresses of all services under way.
#[derive(Debug)]
struct Reading<T> {
    /// When it began.
    at: Instant,
    found: T,
}

impl<T> Reading<T> {
    /// Whether it serves for a service that began at `since`: it has the service's addresses, and is fresh.
    fn serves(&self, since: Instant) -> bool {
        self.at >= since && clock::instant() <= self.at + FRESH
    }
}

/// The addresses of all services under way, and the last readings of whole tables.
#[derive(Debug)]
pub(super) struct Established {
    /// With the number of services under way that have the address.
    addresses: HashMap<SocketAddr, usize>,
    flows: MovedFlows,
    /// The connections to primaries that the programs noted; `None` where conntrack has them.
    syns: Option<Syns>,
    tracked: Option<Reading<Connections>>,
    moved: Option<Reading<HashMap<SocketAddr, Vec<MovedFlow>>>>,
}

impl Established {
    pub(super) fn new(flows: MovedFlows, syns: Option<Syns>) -> Self {
        Self { addresses: HashMap::new(), flows, syns, tracked: None, moved: None }
    }

    /// Forgets a connection to a primary that its client no longer has.
    ///
    /// # Errors
    /// The kernel refused it.
    pub(super) fn forget(&mut self, client: SocketAddr, frontend: SocketAddr) -> Result<()> {
        match &mut self.syns {
            Some(syns) => syns.forget(client, frontend),
            None => _ = conntrack::forget(client, frontend)?,
        }
        Ok(())
    }

    /// Whether a connection is redirected to a backup.
    pub(super) fn is_moved(&self, client: SocketAddr, frontend: SocketAddr) -> bool {
        self.flows.has(client, frontend)
    }

    /// Adds the addresses of a service that begins. Returns when.
    pub(super) fn begin(&mut self, addresses: &[SocketAddr]) -> Instant {
        for address in addresses {
            *self.addresses.entry(*address).or_default() += 1;
        }
        clock::instant()
    }

    /// Removes the addresses of a service that ends.
    pub(super) fn end(&mut self, addresses: &[SocketAddr]) {
        for address in addresses {
            if let Some(count) = self.addresses.get_mut(address) {
                *count -= 1;
            }
        }
        self.addresses.retain(|_, count| *count > 0);
        if self.addresses.is_empty() {
            (self.tracked, self.moved) = (None, None);
        }
    }

    /// The connections of a tier that a service has left. It was begun with the service's addresses at `since`.
    ///
    /// # Errors
    /// The kernel refused to tell.
    pub(super) fn list(&mut self, departure: &Departure, since: Instant) -> Result<HashSet<Connection>> {
        let addresses = &departure.frontends;
        match &departure.from {
            Departed::Primary => self.tracked(addresses, since),
            // The programs reset the same ones (breaker-ebpf, `service::resets_on_backup`).
            Departed::Backup => self.moved(addresses, since, |flow| flow.epoch != departure.epoch),
            Departed::DownBackends(down) => self.moved(addresses, since, |flow| down.contains(&flow.backend)),
        }
    }

    fn tracked(&mut self, addresses: &[SocketAddr], since: Instant) -> Result<HashSet<Connection>> {
        let mut found = HashSet::new();
        if self.syns.is_none() && self.addresses.len() < MANY {
            for address in addresses {
                add(&mut found, *address, &conntrack::connections_to(*address)?);
            }
            return Ok(found);
        }
        if !self.tracked.as_ref().is_some_and(|reading| reading.serves(since)) {
            let at = clock::instant();
            let is_wanted = |address| self.addresses.contains_key(&address);
            let all = match &self.syns {
                Some(syns) => syns.connections_to_any(is_wanted)?,
                None => conntrack::connections_to_any(is_wanted)?,
            };
            self.tracked = Some(Reading { at, found: all });
        }
        if let Some(reading) = &self.tracked {
            addresses.iter().for_each(|address| add(&mut found, *address, &reading.found));
        }
        Ok(found)
    }

    fn moved(
        &mut self,
        addresses: &[SocketAddr],
        since: Instant,
        is_left: impl Fn(&MovedFlow) -> bool,
    ) -> Result<HashSet<Connection>> {
        if !self.moved.as_ref().is_some_and(|reading| reading.serves(since)) {
            let at = clock::instant();
            let mut by_frontend: HashMap<SocketAddr, Vec<MovedFlow>> = HashMap::new();
            for flow in self.flows.find(|flow| self.addresses.contains_key(&flow.frontend))? {
                by_frontend.entry(flow.frontend).or_default().push(flow);
            }
            self.moved = Some(Reading { at, found: by_frontend });
        }
        let of = |address| self.moved.as_ref().and_then(|reading| reading.found.get(address));
        let flows = addresses.iter().filter_map(of);
        let left = flows.flatten().filter(|flow| is_left(flow));
        Ok(left.map(|flow| Connection { client: flow.client, frontend: flow.frontend }).collect())
    }
}

fn add(found: &mut HashSet<Connection>, frontend: SocketAddr, all: &Connections) {
    let clients = all.get(&frontend).into_iter().flatten();
    found.extend(clients.map(|client| Connection { client: *client, frontend }));
}
