//! The established connections of services that reset them, as conntrack has them.

use std::{
    collections::{HashMap, HashSet},
    net::SocketAddr,
    time::Duration,
};

use anyhow::Result;
use tokio::time::Instant;

use super::Connection;
use crate::{
    clock,
    datapath::conntrack::{self, Connections},
};

/// From how many addresses on all entries are read at once.
const MANY: usize = 7;
/// How long all entries, once read, serve for other services: thousands may open in one moment.
const FRESH: Duration = Duration::from_millis(200);

/// The addresses of all services under way, and the last reading of all entries.
#[derive(Debug, Default)]
pub(super) struct Tracked {
    /// With the number of services under way that have the address.
    addresses: HashMap<SocketAddr, usize>,
    read: Option<(Instant, Connections)>,
}

impl Tracked {
    /// Begins to look for connections to these addresses.
    pub(super) fn begin(&mut self, addresses: &[SocketAddr]) {
        for address in addresses {
            *self.addresses.entry(*address).or_default() += 1;
        }
        // The last reading does not have them.
        self.read = None;
    }

    /// Ceases to look for connections to these addresses.
    pub(super) fn end(&mut self, addresses: &[SocketAddr]) {
        for address in addresses {
            if let Some(count) = self.addresses.get_mut(address) {
                *count -= 1;
            }
        }
        self.addresses.retain(|_, count| *count > 0);
        if self.addresses.is_empty() {
            *self = Self::default();
        }
    }

    /// The established connections to these addresses, which were begun with.
    ///
    /// # Errors
    /// The kernel refused to tell.
    pub(super) fn look(&mut self, addresses: &[SocketAddr]) -> Result<HashSet<Connection>> {
        let mut found = HashSet::new();
        if self.addresses.len() < MANY {
            for address in addresses {
                add(&mut found, *address, &conntrack::connections_to(*address)?);
            }
            return Ok(found);
        }
        let now = clock::instant();
        if self.read.as_ref().is_none_or(|(at, _)| now > *at + FRESH) {
            let all = conntrack::connections_to_any(|address| self.addresses.contains_key(&address))?;
            self.read = Some((clock::instant(), all));
        }
        if let Some((_, all)) = &self.read {
            addresses.iter().for_each(|address| add(&mut found, *address, all));
        }
        Ok(found)
    }
}

fn add(found: &mut HashSet<Connection>, frontend: SocketAddr, all: &Connections) {
    let clients = all.get(&frontend).into_iter().flatten();
    found.extend(clients.map(|client| Connection { client: *client, frontend }));
}
