//! The maps that are keyed by the addresses of one IP family.

use std::{
    net::{IpAddr, SocketAddr},
    sync::atomic::Ordering,
};

use anyhow::Result;
use aya::maps::{Array, HashMap, Map, MapData};
use breaker_common::{
    Address, Backend, EndpointKey, EndpointRole, Flow, FlowKey, Fragment, FragmentKey, Reverse, ReverseKey, V4, V6,
};
use breaker_core::model::Protocol;

use super::{Maps, array, entries, mmap::SharedArray, shared, typed};

/// Name, key size and value size (in bytes) of the maps of one IP family. `names` has the order of [`V4_NAMES`].
pub(super) const fn of_family<A: Address>(names: [&'static str; 7]) -> [(&'static str, usize, usize); 7] {
    [
        (names[0], size_of::<EndpointKey<A>>(), size_of::<EndpointRole>()),
        (names[1], 4, size_of::<Backend<A>>()),
        (names[2], size_of::<FlowKey<A>>(), size_of::<Flow<A>>()),
        (names[3], size_of::<ReverseKey<A>>(), size_of::<Reverse<A>>()),
        (names[4], size_of::<FlowKey<A>>(), size_of::<Flow<A>>()),
        (names[5], size_of::<ReverseKey<A>>(), size_of::<Reverse<A>>()),
        (names[6], size_of::<FragmentKey<A>>(), size_of::<Fragment<A>>()),
    ]
}

pub(super) const V4_NAMES: [&str; 7] =
    ["ENDPOINTS4", "BACKENDS4", "FLOWS4", "REVERSE4", "PENDING4", "PENDING_REVERSE4", "FRAGMENTS4"];

pub(super) const V6_NAMES: [&str; 7] =
    ["ENDPOINTS6", "BACKENDS6", "FLOWS6", "REVERSE6", "PENDING6", "PENDING_REVERSE6", "FRAGMENTS6"];

/// An address of one IP family, and the maps of that family.
pub(crate) trait IpFamily: Address {
    fn ip(self) -> IpAddr;
    fn of(maps: &Maps) -> &FamilyMaps<Self>;
    fn of_mut(maps: &mut Maps) -> &mut FamilyMaps<Self>;

    /// Combines the address with a port in wire order.
    fn socket(self, port: [u8; 2]) -> SocketAddr {
        SocketAddr::new(self.ip(), u16::from_be_bytes(port))
    }
}

impl IpFamily for V4 {
    fn ip(self) -> IpAddr {
        IpAddr::from(self.bytes)
    }

    fn of(maps: &Maps) -> &FamilyMaps<Self> {
        &maps.v4
    }

    fn of_mut(maps: &mut Maps) -> &mut FamilyMaps<Self> {
        &mut maps.v4
    }
}

impl IpFamily for V6 {
    fn ip(self) -> IpAddr {
        IpAddr::from(self.bytes)
    }

    fn of(maps: &Maps) -> &FamilyMaps<Self> {
        &maps.v6
    }

    fn of_mut(maps: &mut Maps) -> &mut FamilyMaps<Self> {
        &mut maps.v6
    }
}

/// Returns the IP protocol number that packets and maps contain.
pub(crate) const fn number(protocol: Protocol) -> u8 {
    match protocol {
        Protocol::Tcp => breaker_common::PROTO_TCP,
        Protocol::Udp => breaker_common::PROTO_UDP,
    }
}

/// Returns the protocol with an IP protocol number; `None` if breaker does not protect it.
pub(crate) const fn protocol(number: u8) -> Option<Protocol> {
    match number {
        breaker_common::PROTO_TCP => Some(Protocol::Tcp),
        breaker_common::PROTO_UDP => Some(Protocol::Udp),
        _ => None,
    }
}

/// The maps that exist once for each IP family.
pub struct FamilyMaps<A: Address> {
    pub(crate) endpoints: HashMap<MapData, EndpointKey<A>, EndpointRole>,
    pub(crate) backends: Array<MapData, Backend<A>>,
    backend_words: SharedArray,
    pub(crate) flows: HashMap<MapData, FlowKey<A>, Flow<A, u8>>,
    pub(crate) reverse: HashMap<MapData, ReverseKey<A>, Reverse<A>>,
    pub(crate) pending: HashMap<MapData, FlowKey<A>, Flow<A, u8>>,
    pub(crate) pending_reverse: HashMap<MapData, ReverseKey<A>, Reverse<A>>,
    /// Entries that the tables of established and of pending flows have room for.
    pub(super) room: (u32, u32),
}

impl<A: Address> FamilyMaps<A> {
    pub(super) fn open(open: &mut impl FnMut(&str) -> Result<Map>, names: [&str; 7]) -> Result<Self> {
        let backends = array(open(names[1])?, names[1])?;
        let backend_words = shared(&backends, size_of::<Backend<A>>())?;
        let (flows, pending) = (open(names[2])?, open(names[4])?);
        Ok(Self {
            room: (room(&flows)?, room(&pending)?),
            endpoints: typed(open(names[0])?, names[0])?,
            backends: typed(Map::Array(backends), names[1])?,
            backend_words,
            flows: typed(flows, names[2])?,
            reverse: typed(open(names[3])?, names[3])?,
            pending: typed(pending, names[4])?,
            pending_reverse: typed(open(names[5])?, names[5])?,
        })
    }

    pub(crate) fn clear_in_use(&self, id: u32) {
        self.backend_words.store32(id, std::mem::offset_of!(Backend<A>, in_use), 0);
    }

    /// Returns the interface index of the pod that a backend is; 0 = not a known pod on this node.
    pub(crate) fn interface(&self, id: u32) -> u32 {
        self.backend_words.word32(id, std::mem::offset_of!(Backend<A>, ifindex)).load(Ordering::SeqCst)
    }

    pub(crate) fn set_interface(&self, id: u32, ifindex: u32) {
        self.backend_words.store32(id, std::mem::offset_of!(Backend<A>, ifindex), ifindex);
    }
}

/// Returns the maximum number of entries of a flow table.
fn room(map: &Map) -> Result<u32> {
    match map {
        Map::HashMap(data) | Map::LruHashMap(data) => entries(data),
        other => anyhow::bail!("a flow table has an unexpected type: {other:?}"),
    }
}
