//! The maps, typed. Names are those of the programs' statics, and of the pins.

use std::{
    collections::HashMap as StdHashMap,
    net::{IpAddr, SocketAddr},
    os::fd::{AsFd as _, AsRawFd as _, BorrowedFd, OwnedFd},
    sync::atomic::Ordering,
    time::Duration,
};

use anyhow::{Context as _, Result};
use aya::maps::{Array, HashMap, Map, MapData, PerCpuArray, PerCpuValues, RingBuf};
use breaker_common::{
    ABI_VERSION, Address, Backend, EndpointKey, EndpointRole, Event, FilterWords, Flow, FlowKey, Fragment, FragmentKey,
    Heartbeat, PassReason, Reverse, ReverseKey, Route, ServiceCounters, ServiceRecord, SocketKey, SocketOrigin, Switch,
    Table, V4, V6,
};
use rustix::time::{ClockId, clock_gettime};
use tokio::io::{Interest, unix::AsyncFd};

use super::{
    filter::{Bit, Filter, bit_of, said_of},
    limits::LimitMaps,
    mmap::SharedArray,
    sizes::Sizes,
};
use crate::{
    datapath::PacketEvent,
    model::{Protocol, ServiceName},
};

const fn of_family<A: Address>(names: [&'static str; 7]) -> [(&'static str, usize, usize); 7] {
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

const V4_NAMES: [&str; 7] =
    ["ENDPOINTS4", "BACKENDS4", "FLOWS4", "REVERSE4", "PENDING4", "PENDING_REVERSE4", "FRAGMENTS4"];
const V6_NAMES: [&str; 7] =
    ["ENDPOINTS6", "BACKENDS6", "FLOWS6", "REVERSE6", "PENDING6", "PENDING_REVERSE6", "FRAGMENTS6"];

const SHARED: [(&str, usize, usize); 12] = [
    ("FILTER", 4, size_of::<FilterWords>()),
    ("SOCKETS", size_of::<SocketKey>(), size_of::<SocketOrigin>()),
    ("SWITCHES", 4, size_of::<Switch>()),
    ("SERVICES", 4, size_of::<ServiceRecord>()),
    ("ROUTES", 4, size_of::<Route>()),
    ("RUNTIME", 4, 8),
    ("SLOTS", 4, size_of::<Table>()),
    ("PROGRAMS", 4, 4),
    ("HEARTBEAT", 4, size_of::<Heartbeat>()),
    ("COUNTERS", 4, size_of::<ServiceCounters>()),
    ("REASONS", 4, 8),
    ("EVENTS", 0, 0),
];

/// Every map's name, and the sizes of its keys and values: what a pin must look like to be adopted.
pub(super) fn pinned() -> impl Iterator<Item = (&'static str, usize, usize)> {
    SHARED.into_iter().chain(LimitMaps::SIZES).chain(of_family::<V4>(V4_NAMES)).chain(of_family::<V6>(V6_NAMES))
}

/// A family's addresses, as userspace handles them.
pub(super) trait Net: Address {
    fn ip(self) -> IpAddr;
    fn of(maps: &Maps) -> &FamilyMaps<Self>;
    fn of_mut(maps: &mut Maps) -> &mut FamilyMaps<Self>;

    /// With a port in wire order.
    fn socket(self, port: [u8; 2]) -> SocketAddr {
        SocketAddr::new(self.ip(), u16::from_be_bytes(port))
    }
}

impl Net for V4 {
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

impl Net for V6 {
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

/// The protocol's number in packets and maps.
pub(super) const fn number(protocol: Protocol) -> u8 {
    match protocol {
        Protocol::Tcp => breaker_common::PROTO_TCP,
        Protocol::Udp => breaker_common::PROTO_UDP,
    }
}

/// The reverse of [`number`].
pub(super) const fn protocol(number: u8) -> Option<Protocol> {
    match number {
        breaker_common::PROTO_TCP => Some(Protocol::Tcp),
        breaker_common::PROTO_UDP => Some(Protocol::Udp),
        _ => None,
    }
}

/// The maps that are keyed by one family's addresses.
pub struct FamilyMaps<A: Address> {
    pub(super) endpoints: HashMap<MapData, EndpointKey<A>, EndpointRole>,
    pub(super) backends: Array<MapData, Backend<A>>,
    backend_words: SharedArray,
    pub(super) flows: HashMap<MapData, FlowKey<A>, Flow<A, u8>>,
    pub(super) reverse: HashMap<MapData, ReverseKey<A>, Reverse<A>>,
    pub(super) pending: HashMap<MapData, FlowKey<A>, Flow<A, u8>>,
    pub(super) pending_reverse: HashMap<MapData, ReverseKey<A>, Reverse<A>>,
    room: (u32, u32),
}

impl<A: Address> FamilyMaps<A> {
    fn open(open: &mut impl FnMut(&str) -> Result<Map>, names: [&str; 7]) -> Result<Self> {
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

    pub(super) fn clear_in_use(&self, id: u32) {
        self.backend_words.store32(id, std::mem::offset_of!(Backend<A>, in_use), 0);
    }

    /// The interface of the pod that a backend is; 0 = none that is known.
    pub(super) fn interface(&self, id: u32) -> u32 {
        self.backend_words.word32(id, std::mem::offset_of!(Backend<A>, ifindex)).load(Ordering::SeqCst)
    }

    pub(super) fn set_interface(&self, id: u32, ifindex: u32) {
        self.backend_words.store32(id, std::mem::offset_of!(Backend<A>, ifindex), ifindex);
    }
}

/// All maps of the datapath, open.
pub struct Maps {
    pub(super) v4: FamilyMaps<V4>,
    pub(super) v6: FamilyMaps<V6>,
    pub(super) services: Array<MapData, ServiceRecord<u8>>,
    records: SharedArray,
    pub(super) routes: Array<MapData, Route>,
    pub(super) slots: Array<MapData, Table>,
    pub(super) filter: Filter,
    pub(super) limits: LimitMaps,
    /// As they are, which may differ from what is configured: maps of an earlier agent keep their sizes.
    pub(super) sizes: Sizes,
    counters: PerCpuArray<MapData, ServiceCounters>,
    reasons: PerCpuArray<MapData, u64>,
    events: RingBuf<MapData>,
    switches: SharedArray,
    heartbeat: SharedArray,
}

impl std::fmt::Debug for Maps {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Maps").finish_non_exhaustive()
    }
}

pub(super) fn typed<T: TryFrom<Map, Error = aya::maps::MapError>>(map: Map, name: &str) -> Result<T> {
    T::try_from(map).with_context(|| format!("the map {name} is of another type"))
}

pub(super) fn array(map: Map, name: &str) -> Result<MapData> {
    match map {
        Map::Array(data) => Ok(data),
        other => anyhow::bail!("the map {name} is no array: {other:?}"),
    }
}

/// How many entries a table of flows may have.
fn room(map: &Map) -> Result<u32> {
    match map {
        Map::HashMap(data) | Map::LruHashMap(data) => entries(data),
        other => anyhow::bail!("a table of flows is of another type: {other:?}"),
    }
}

pub(super) fn entries(map: &MapData) -> Result<u32> {
    Ok(map.info().context("ask for a map's size")?.max_entries())
}

pub(super) fn shared(map: &MapData, value_size: usize) -> Result<SharedArray> {
    SharedArray::new(map.fd().as_fd(), value_size, entries(map)?)
}

impl Maps {
    /// Opens every map through `open`, which knows where a map of that name is.
    ///
    /// # Errors
    /// A map that is missing, of another type, or cannot be mapped into memory.
    pub fn open(mut open: impl FnMut(&str) -> Result<Map>) -> Result<Self> {
        let switches = array(open("SWITCHES")?, "SWITCHES")?;
        let heartbeat = array(open("HEARTBEAT")?, "HEARTBEAT")?;
        let services = array(open("SERVICES")?, "SERVICES")?;
        let routes = array(open("ROUTES")?, "ROUTES")?;
        let slots = array(open("SLOTS")?, "SLOTS")?;
        let v4 = FamilyMaps::<V4>::open(&mut open, V4_NAMES)?;
        let v6 = FamilyMaps::<V6>::open(&mut open, V6_NAMES)?;
        let limits = LimitMaps::open(&mut open)?;
        let sizes = Sizes {
            services: entries(&switches)?,
            routes: entries(&routes)?,
            tables: entries(&slots)?,
            backends: v4.backends.len(),
            flows: v4.room.0,
            pending: v4.room.1,
            connection_buckets: limits.connection_buckets,
            client_buckets: limits.client_buckets,
        };
        Ok(Self {
            v4,
            v6,
            records: shared(&services, size_of::<ServiceRecord<u8>>())?,
            services: typed(Map::Array(services), "SERVICES")?,
            routes: typed(Map::Array(routes), "ROUTES")?,
            slots: typed(Map::Array(slots), "SLOTS")?,
            filter: Filter::new(shared(&array(open("FILTER")?, "FILTER")?, size_of::<FilterWords>())?),
            limits,
            sizes,
            counters: typed(open("COUNTERS")?, "COUNTERS")?,
            reasons: typed(open("REASONS")?, "REASONS")?,
            events: typed(open("EVENTS")?, "EVENTS")?,
            switches: shared(&switches, size_of::<Switch>())?,
            heartbeat: shared(&heartbeat, size_of::<Heartbeat>())?,
        })
    }

    /// Tells the filter of the endpoints that are there.
    pub(super) fn adopt_filter(&mut self) -> Result<()> {
        fn roles<A: Net>(maps: &Maps) -> Result<Vec<(Bit, EndpointRole)>> {
            let entries = A::of(maps).endpoints.iter();
            entries.map(|entry| entry.map(|(key, role)| (bit_of(&key), role)).context("read the endpoints")).collect()
        }
        for (bit, role) in [roles::<V4>(self)?, roles::<V6>(self)?].concat() {
            for says in said_of(&role) {
                self.filter.add(says, bit);
            }
        }
        Ok(())
    }

    /// A service's switch.
    #[must_use]
    pub fn switch(&self, index: u32) -> Switch<u8> {
        Switch::from_word(self.switches.word(index, 0).load(Ordering::SeqCst))
    }

    /// Throws a service's switch: one store.
    pub fn set_switch(&self, index: u32, switch: Switch<u8>) {
        self.switches.store(index, 0, switch.to_word());
    }

    /// Writes a service's record. Not at once: what the programs read of it are words of their own, and an agent that reads the
    /// rest comes after this one.
    pub(super) fn set_record(&self, index: u32, record: &ServiceRecord<u8>) {
        self.records.write(index, record);
    }

    pub(super) fn beat(&self, lease: Duration, unix_ns: u64) {
        let lease = u64::try_from(lease.as_nanos()).unwrap_or(u64::MAX);
        let abi = u64::from(ABI_VERSION) << 32 | u64::from(std::process::id());
        #[cfg(target_endian = "big")]
        let abi = abi.rotate_left(32);
        self.heartbeat.store(0, std::mem::offset_of!(Heartbeat, lease_ns), lease);
        self.heartbeat.store(0, std::mem::offset_of!(Heartbeat, beat_unix_ns), unix_ns);
        self.heartbeat.store(0, std::mem::offset_of!(Heartbeat, pid), abi);
        self.heartbeat.store(0, std::mem::offset_of!(Heartbeat, beat_ns), monotonic_ns());
    }

    /// The last sign of life.
    #[must_use]
    pub fn heartbeat(&self) -> Heartbeat {
        let word = |offset| self.heartbeat.word(0, offset).load(Ordering::SeqCst);
        let ids = word(std::mem::offset_of!(Heartbeat, pid)).to_ne_bytes();
        Heartbeat {
            beat_ns: word(std::mem::offset_of!(Heartbeat, beat_ns)),
            lease_ns: word(std::mem::offset_of!(Heartbeat, lease_ns)),
            beat_unix_ns: word(std::mem::offset_of!(Heartbeat, beat_unix_ns)),
            pid: u32::from_ne_bytes([ids[0], ids[1], ids[2], ids[3]]),
            abi_version: u32::from_ne_bytes([ids[4], ids[5], ids[6], ids[7]]),
            fast: u32::from(self.any_fast()),
            counts_sockets: self
                .heartbeat
                .word32(0, std::mem::offset_of!(Heartbeat, counts_sockets))
                .load(Ordering::SeqCst),
        }
    }

    /// Whether the programs look for flows that leave the stack out.
    pub(super) fn any_fast(&self) -> bool {
        self.heartbeat.word32(0, std::mem::offset_of!(Heartbeat, fast)).load(Ordering::SeqCst) != 0
    }

    /// Tells the programs to look for flows that leave the stack out.
    pub(super) fn set_any_fast(&self, any: bool) {
        self.heartbeat.store32(0, std::mem::offset_of!(Heartbeat, fast), u32::from(any));
    }

    /// Tells the programs whether the end of the node's own sockets matters.
    pub(super) fn set_counts_sockets(&self, any: bool) {
        self.heartbeat.store32(0, std::mem::offset_of!(Heartbeat, counts_sockets), u32::from(any));
    }

    /// A service's counters over all CPUs.
    ///
    /// # Errors
    /// A map that cannot be read.
    pub fn counters(&self, index: u32) -> Result<ServiceCounters> {
        let per_cpu = self.counters.get(&index, 0).context("read the counters")?;
        Ok(per_cpu.iter().fold(ServiceCounters::default(), add))
    }

    pub(super) fn clear_counters(&mut self, index: u32) -> Result<()> {
        let cpus = self.counters.get(&index, 0).context("read the counters")?.len();
        let zeros = PerCpuValues::try_from(vec![ServiceCounters::default(); cpus]).context("clear the counters")?;
        self.counters.set(index, zeros, 0).context("clear the counters")
    }

    /// What failed open, over all CPUs.
    ///
    /// # Errors
    /// A map that cannot be read.
    pub fn reasons(&self) -> Result<Vec<(PassReason, u64)>> {
        let mut reasons = Vec::new();
        for &reason in PassReason::ALL {
            let count: u64 = self.reasons.get(&u32::from(reason as u8), 0).context("read the reasons")?.iter().sum();
            if count > 0 {
                reasons.push((reason, count));
            }
        }
        Ok(reasons)
    }

    /// Becomes readable when there is urgent news in the ring buffer.
    ///
    /// # Errors
    /// No file descriptor left, or no runtime to watch it.
    #[expect(unsafe_code, reason = "aya lends the descriptor as a number, and tokio wants a promise about it")]
    pub fn events_ready(&self) -> Result<AsyncFd<OwnedFd>> {
        // SAFETY: the ring lives in `self`, so the descriptor is open for this call.
        let fd = unsafe { BorrowedFd::borrow_raw(self.events.as_raw_fd()) };
        let fd = fd.try_clone_to_owned().context("duplicate the ring's descriptor")?;
        // SAFETY: an owned descriptor stays the same and open until it is dropped.
        unsafe { AsyncFd::register_with_interest(fd, Interest::READABLE) }.context("watch the ring")
    }

    pub(super) fn events(&mut self, names: &StdHashMap<u32, ServiceName>) -> Vec<PacketEvent> {
        /// Per call, so that a flood of events does not hold up the loop.
        const MOST: usize = 8192;
        let mut events = Vec::new();
        while events.len() < MOST {
            let Some(item) = self.events.next() else { break };
            let Some((service, event)) = decode(&item) else { continue };
            let Some(service) = names.get(&service).cloned() else { continue };
            events.push(PacketEvent { service, ..event });
        }
        events
    }
}

/// Reads an event's bytes; `None` for one of another size or with a number we do not know.
fn decode(bytes: &[u8]) -> Option<(u32, PacketEvent)> {
    use std::mem::offset_of;
    type Raw = Event<u8, u8>;
    if bytes.len() < size_of::<Raw>() {
        return None;
    }
    let four = |at: usize| <[u8; 4]>::try_from(&bytes[at..at + 4]).unwrap_or_default();
    let two = |at: usize| <[u8; 2]>::try_from(&bytes[at..at + 2]).unwrap_or_default();
    let ip = |at: usize| IpAddr::from(<[u8; 16]>::try_from(&bytes[at..at + 16]).unwrap_or_default()).to_canonical();
    let socket = |addr: usize, port: usize| SocketAddr::new(ip(addr), u16::from_be_bytes(two(port)));
    let backend = socket(offset_of!(Raw, backend), offset_of!(Raw, backend_port));
    let event = PacketEvent {
        service: ServiceName::new(""),
        kind: bytes[offset_of!(Raw, kind)].try_into().ok()?,
        epoch: u32::from_ne_bytes(four(offset_of!(Raw, epoch))),
        client: socket(offset_of!(Raw, client), offset_of!(Raw, client_port)),
        frontend: socket(offset_of!(Raw, vip), offset_of!(Raw, vip_port)),
        backend: (!backend.ip().is_unspecified()).then_some(backend),
    };
    Some((u32::from_ne_bytes(four(offset_of!(Raw, service))), event))
}

fn add(a: ServiceCounters, b: &ServiceCounters) -> ServiceCounters {
    ServiceCounters {
        new_primary: a.new_primary + b.new_primary,
        new_backup: a.new_backup + b.new_backup,
        rejected: a.rejected + b.rejected,
        half_open: a.half_open + b.half_open,
        resets: a.resets + b.resets,
        translated: a.translated + b.translated,
        icmp_errors: a.icmp_errors + b.icmp_errors,
        port_changed: a.port_changed + b.port_changed,
        hairpin: a.hairpin + b.hairpin,
        dry_run: a.dry_run + b.dry_run,
        agent_lost: a.agent_lost + b.agent_lost,
        failed_open: a.failed_open + b.failed_open,
    }
}

/// The clock of the programs (`bpf_ktime_get_coarse_ns`).
#[must_use]
pub fn monotonic_ns() -> u64 {
    let now = clock_gettime(ClockId::Monotonic);
    u64::try_from(now.tv_sec).unwrap_or(0) * 1_000_000_000 + u64::try_from(now.tv_nsec).unwrap_or(0)
}
