//! Reads the flow tables into plain values that tests can compare.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};

use anyhow::{Context as _, Result, ensure};
use aya::{
    Pod,
    maps::{HashMap, Map, MapData, MapError},
};
use breaker_common::{
    Address, Flow, FlowKey, FlowKind, Fragment, FragmentKey, Reverse, ReverseKey, Table, V4, V6, flow_path, seen,
};

use crate::{
    model::flow::{self, BackendSide, Book, ClientSide, LastWords, WayBack},
    packets::TestRig,
};

/// The flow tables of a rig, opened for reading and clearing.
#[derive(Debug)]
pub struct Tables {
    v4: Family<V4>,
    v6: Family<V6>,
}

#[derive(Debug)]
struct Family<A: Address> {
    flows: [HashMap<MapData, FlowKey<A>, Flow<A, u8>>; 2],
    ways_back: [HashMap<MapData, ReverseKey<A>, Reverse<A>>; 2],
    fragments: HashMap<MapData, FragmentKey<A>, Fragment<A>>,
}

/// Conversion of a map's address to the standard library's types.
trait Ip: Address {
    fn ip(self) -> IpAddr;

    fn socket(self, port: [u8; 2]) -> SocketAddr {
        SocketAddr::new(self.ip(), u16::from_be_bytes(port))
    }
}

impl Ip for V4 {
    fn ip(self) -> IpAddr {
        Ipv4Addr::from(self.bytes).into()
    }
}

impl Ip for V6 {
    fn ip(self) -> IpAddr {
        Ipv6Addr::from(self.bytes).into()
    }
}

impl Tables {
    /// Opens the flow tables of a rig.
    ///
    /// # Errors
    /// Fails if a map is not pinned.
    pub fn open(rig: &TestRig) -> Result<Self> {
        Ok(Self { v4: Family::open(rig, 4)?, v6: Family::open(rig, 6)? })
    }

    /// Reads all entries, pending and established.
    ///
    /// # Errors
    /// Fails if an entry cannot be read, or if a flow is in both the pending and the established table.
    pub fn read(&self) -> Result<Book> {
        let mut book = Book::default();
        self.v4.read(&mut book)?;
        self.v6.read(&mut book)?;
        Ok(book)
    }

    /// Removes all entries, the notes about fragments included.
    ///
    /// # Errors
    /// Fails if the kernel refuses a removal.
    pub fn clear(&mut self) -> Result<()> {
        self.v4.clear()?;
        self.v6.clear()
    }
}

/// Number of selection tables' parts in the pinned map `SLOTS`.
///
/// # Errors
/// Fails if the map cannot be opened.
pub fn entries(map: &std::path::Path) -> Result<usize> {
    let map: HashMap<MapData, u32, Table> = Map::from_map_data(MapData::from_pin(map)?)?.try_into()?;
    Ok(map.keys().count())
}

impl<A: Ip> Family<A> {
    fn open(rig: &TestRig, version: u8) -> Result<Self> {
        let name = |base: &str| format!("{base}{version}");
        Ok(Self {
            flows: [open(rig, &name("FLOWS"))?, open(rig, &name("PENDING"))?],
            ways_back: [open(rig, &name("REVERSE"))?, open(rig, &name("PENDING_REVERSE"))?],
            fragments: open(rig, &name("FRAGMENTS"))?,
        })
    }

    fn read(&self, book: &mut Book) -> Result<()> {
        let last_words = |bits: u8| LastWords { fin: bits & seen::FIN != 0, rst: bits & seen::RST != 0 };
        for (table, established) in self.flows.iter().zip([true, false]) {
            for entry in table.iter() {
                let (key, value) = entry.context("read the flows")?;
                let side = ClientSide {
                    client: key.client.socket(key.client_port),
                    to: key.vip.socket(key.vip_port),
                    proto: key.proto,
                };
                let flow = flow::Flow {
                    kind: FlowKind::try_from(value.kind).ok().context("unknown kind of flow")?,
                    backend: value.backend.socket(value.backend_port),
                    source_port: u16::from_be_bytes(value.source_port),
                    epoch: value.epoch,
                    sequence: u32::from_be_bytes(value.sequence),
                    established,
                    client_said: last_words(value.seen),
                    fast: value.path & flow_path::FAST != 0,
                    keeps_client: value.path & flow_path::KEEP_CLIENT != 0,
                };
                ensure!(book.flows.insert(side, flow).is_none(), "{side:?} is both pending and established");
            }
        }
        for entry in self.ways_back.iter().flat_map(HashMap::iter) {
            let (key, value) = entry.context("read the reverse entries")?;
            let client = key.client.ip();
            let side = BackendSide {
                backend: key.backend.socket(key.backend_port),
                client: key.client.socket(key.client_port),
                proto: key.proto,
            };
            let owner = ClientSide {
                client: SocketAddr::new(client, u16::from_be_bytes(value.client_port)),
                to: value.vip.socket(value.vip_port),
                proto: key.proto,
            };
            let answered = value.seen & seen::ANSWERED != 0;
            let way = WayBack { owner, answered, backend_said: last_words(value.seen), fast: value.egress != 0 };
            ensure!(book.ways_back.insert(side, way).is_none(), "{side:?} is both pending and established");
        }
        Ok(())
    }

    fn clear(&mut self) -> Result<()> {
        self.flows.iter_mut().try_for_each(clear)?;
        self.ways_back.iter_mut().try_for_each(clear)?;
        clear(&mut self.fragments)
    }
}

fn open<K: Pod, V: Pod>(rig: &TestRig, name: &str) -> Result<HashMap<MapData, K, V>> {
    let data = MapData::from_pin(rig.map(name)).with_context(|| format!("open {name}"))?;
    Ok(HashMap::try_from(Map::from_map_data(data)?)?)
}

fn clear<K: Pod, V: Pod>(table: &mut HashMap<MapData, K, V>) -> Result<()> {
    let keys = table.keys().collect::<Result<Vec<K>, MapError>>()?;
    keys.iter().try_for_each(|key| Ok(table.remove(key)?))
}
