//! The connections that were redirected to a backup and have not ended, read from the flow tables. The main loop has its own
//! descriptors of these maps, so that another thread can read them here.

use std::net::{IpAddr, SocketAddr};

use anyhow::{Context as _, Result};
use aya::maps::{HashMap, MapData};
use breaker_common::{Flow, FlowKey, FlowKind, PROTO_TCP, Reverse, ReverseKey, V4, V6, seen};

use super::{
    maps::{family::IpFamily, typed},
    offline::pinned_map,
    pins::PinDir,
    sweep::{entry_of, has_ended},
};

/// A redirected connection.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct MovedFlow {
    /// The client.
    pub client: SocketAddr,
    /// The frontend that it connected to.
    pub frontend: SocketAddr,
    /// The backend of the backup.
    pub backend: SocketAddr,
    /// The service's epoch when the connection was redirected.
    pub epoch: u32,
}

/// The flow tables of both IP families.
#[derive(Debug)]
pub struct MovedFlows {
    v4: Tables<V4>,
    v6: Tables<V6>,
}

#[derive(Debug)]
struct Tables<A: IpFamily> {
    flows: HashMap<MapData, FlowKey<A>, Flow<A, u8>>,
    pending: HashMap<MapData, FlowKey<A>, Flow<A, u8>>,
    reverse: HashMap<MapData, ReverseKey<A>, Reverse<A>>,
}

impl MovedFlows {
    /// Opens the pinned tables.
    ///
    /// # Errors
    /// A table cannot be opened.
    pub fn open(pins: &PinDir) -> Result<Self> {
        Ok(Self {
            v4: Tables::open(pins, ["FLOWS4", "PENDING4", "REVERSE4"])?,
            v6: Tables::open(pins, ["FLOWS6", "PENDING6", "REVERSE6"])?,
        })
    }

    /// The TCP connections that `is_wanted` selects. Takes two system calls for each flow in the tables, so it must not
    /// run in the main loop.
    ///
    /// # Errors
    /// The maps cannot be read.
    pub fn find(&self, is_wanted: impl Fn(&MovedFlow) -> bool) -> Result<Vec<MovedFlow>> {
        let mut found = self.v4.find(&is_wanted)?;
        found.extend(self.v6.find(&is_wanted)?);
        Ok(found)
    }

    /// Whether the flow tables have a TCP connection.
    pub fn has(&self, client: SocketAddr, frontend: SocketAddr) -> bool {
        let ports = (client.port().to_be_bytes(), frontend.port().to_be_bytes());
        match (client.ip(), frontend.ip()) {
            (IpAddr::V4(from), IpAddr::V4(to)) => self.v4.has(V4::new(from.octets()), V4::new(to.octets()), ports),
            (IpAddr::V6(from), IpAddr::V6(to)) => self.v6.has(V6::new(from.octets()), V6::new(to.octets()), ports),
            _ => false,
        }
    }
}

impl<A: IpFamily> Tables<A> {
    fn open(pins: &PinDir, [flows, pending, reverse]: [&str; 3]) -> Result<Self> {
        let open = |name: &str| pinned_map(pins.root(), name);
        Ok(Self {
            flows: typed(open(flows)?, flows)?,
            pending: typed(open(pending)?, pending)?,
            reverse: typed(open(reverse)?, reverse)?,
        })
    }

    fn has(&self, client: A, vip: A, (client_port, vip_port): ([u8; 2], [u8; 2])) -> bool {
        let key = FlowKey { client, vip, client_port, vip_port, proto: PROTO_TCP, pad: [0; 3] };
        self.flows.get(&key, 0).is_ok() || self.pending.get(&key, 0).is_ok()
    }

    fn find(&self, is_wanted: impl Fn(&MovedFlow) -> bool) -> Result<Vec<MovedFlow>> {
        let mut found = Vec::new();
        // Established flows, most of which a walk meets once. The kernel restarts a walk whose current entry was removed.
        for entry in self.flows.iter() {
            let Some((key, flow)) = entry_of(entry).context("read the flows")? else { continue };
            let moved = MovedFlow {
                client: key.client.socket(key.client_port),
                frontend: key.vip.socket(key.vip_port),
                backend: flow.backend.socket(flow.backend_port),
                epoch: flow.epoch,
            };
            let is_redirected = key.proto == PROTO_TCP && flow.kind == FlowKind::Redirected as u8;
            if !is_redirected || flow.seen & seen::RST != 0 || !is_wanted(&moved) {
                continue;
            }
            let reverse = self.reverse.get(&key.reverse_key(&flow), 0).ok().filter(|reverse| reverse.belongs_to(&key));
            if !has_ended(&flow, reverse.map_or(0, |reverse| reverse.seen)) {
                found.push(moved);
            }
        }
        Ok(found)
    }
}
