//! The connections to primaries that the programs noted by their SYNs, for nodes whose kernel does not track them.

use std::{collections::HashMap, net::SocketAddr};

use anyhow::{Context as _, Result};
use aya::{
    Ebpf,
    maps::{self, MapData},
};
use breaker_common::{FlowKey, V6};

use super::{
    conntrack::Connections,
    maps::{family::IpFamily as _, typed},
    poke::key,
    sweep::entry_of,
};

const MAP: &str = "SYNS";

/// The map of the connections. It holds some that have ended, too: the answer to a poke tells them from the others.
#[derive(Debug)]
pub struct Syns {
    map: maps::HashMap<MapData, FlowKey<V6>, u8>,
}

impl Syns {
    pub(super) fn take_from(programs: &mut Ebpf) -> Result<Self> {
        let map = programs.take_map(MAP).with_context(|| format!("the BPF object has no map {MAP}"))?;
        Ok(Self { map: typed(map, MAP)? })
    }

    /// The connections to the addresses that `is_wanted` selects.
    ///
    /// # Errors
    /// The map cannot be read.
    pub fn connections_to_any(&self, is_wanted: impl Fn(SocketAddr) -> bool) -> Result<Connections> {
        let socket = |ip: V6, port: [u8; 2]| {
            let mapped = ip.socket(port);
            SocketAddr::new(mapped.ip().to_canonical(), mapped.port())
        };
        let mut found: Connections = HashMap::new();
        for entry in self.map.iter() {
            let Some((key, _)) = entry_of(entry).context("read the connections")? else { continue };
            let to = socket(key.vip, key.vip_port);
            if is_wanted(to) {
                found.entry(to).or_default().insert(socket(key.client, key.client_port));
            }
        }
        Ok(found)
    }

    /// Forgets a connection that its client no longer has.
    pub fn forget(&mut self, client: SocketAddr, frontend: SocketAddr) {
        // The programs may have evicted it.
        let _ = self.map.remove(&key(client, frontend));
    }
}
