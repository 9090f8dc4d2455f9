//! The connections that were redirected to a backup and have not ended, read from the flow tables. The main loop has its own
//! descriptors of these maps, so that another thread can read them here.

use std::net::SocketAddr;

use anyhow::Result;
use aya::maps::{HashMap, MapData};
use breaker_common::{Flow, FlowKey, FlowKind, PROTO_TCP, Reverse, ReverseKey, V4, V6, seen};

use super::{
    maps::{family::IpFamily, typed},
    offline::pinned_map,
    pins::PinDir,
    sweep::has_ended,
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
    reverse: HashMap<MapData, ReverseKey<A>, Reverse<A>>,
}

impl MovedFlows {
    /// Opens the pinned tables.
    ///
    /// # Errors
    /// A table cannot be opened.
    pub fn open(pins: &PinDir) -> Result<Self> {
        Ok(Self { v4: Tables::open(pins, ["FLOWS4", "REVERSE4"])?, v6: Tables::open(pins, ["FLOWS6", "REVERSE6"])? })
    }

    /// The TCP connections that `is_wanted` selects. Takes two system calls for each flow in the tables, so it must not
    /// run in the main loop.
    pub fn find(&self, is_wanted: impl Fn(&MovedFlow) -> bool) -> Vec<MovedFlow> {
        let mut found = self.v4.find(&is_wanted);
        found.extend(self.v6.find(&is_wanted));
        found
    }
}

impl<A: IpFamily> Tables<A> {
    fn open(pins: &PinDir, [flows, reverse]: [&str; 2]) -> Result<Self> {
        let open = |name: &str| pinned_map(pins.root(), name);
        Ok(Self { flows: typed(open(flows)?, flows)?, reverse: typed(open(reverse)?, reverse)? })
    }

    fn find(&self, is_wanted: impl Fn(&MovedFlow) -> bool) -> Vec<MovedFlow> {
        // An entry that is removed during the walk is an error of that entry alone.
        let entries = self.flows.iter().flatten().filter(|(key, flow)| {
            key.proto == PROTO_TCP && flow.kind == FlowKind::Redirected as u8 && flow.seen & seen::RST == 0
        });
        let moved = entries.map(|(key, flow)| {
            let moved = MovedFlow {
                client: key.client.socket(key.client_port),
                frontend: key.vip.socket(key.vip_port),
                backend: flow.backend.socket(flow.backend_port),
                epoch: flow.epoch,
            };
            (moved, key, flow)
        });
        let wanted = moved.filter(|(moved, ..)| is_wanted(moved));
        let open = wanted.filter(|(_, key, flow)| {
            let reverse = self.reverse.get(&key.reverse_key(flow), 0).ok().filter(|reverse| reverse.belongs_to(key));
            !has_ended(flow, reverse.map_or(0, |reverse| reverse.seen))
        });
        open.map(|(moved, ..)| moved).collect()
    }
}
