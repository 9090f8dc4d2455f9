//! The maps, typed. Names are those of the programs' statics, and of the pins.

use std::{
    collections::HashMap as StdHashMap,
    net::{SocketAddr, SocketAddrV4},
    os::fd::{AsFd as _, AsRawFd as _, BorrowedFd, OwnedFd},
    sync::atomic::Ordering,
    time::Duration,
};

use anyhow::{Context as _, Result};
use aya::maps::{Array, HashMap, Map, MapData, PerCpuArray, PerCpuValues, RingBuf};
use breaker_common::{
    ABI_VERSION, Backend4, EndpointKey4, EndpointRole, Event, Flow4, FlowKey4, Heartbeat, MAX_BACKENDS, MAX_SERVICES,
    PassReason, Reverse4, ReverseKey4, ServiceCounters, ServiceRecord, Switch,
};
use rustix::time::{ClockId, clock_gettime};
use tokio::io::{Interest, unix::AsyncFd};

use super::mmap::SharedArray;
use crate::{datapath::PacketEvent, model::ServiceName};

/// A map's name, and the sizes of its keys and values: what a pin must look like to be adopted.
pub(super) const PINNED: &[(&str, usize, usize)] = &[
    ("ENDPOINTS4", size_of::<EndpointKey4>(), size_of::<EndpointRole>()),
    ("SWITCHES", 4, size_of::<Switch>()),
    ("SERVICES", 4, size_of::<ServiceRecord>()),
    ("RUNTIME", 4, 8),
    ("SLOTS", 4, 4),
    ("BACKENDS4", 4, size_of::<Backend4>()),
    ("FLOWS4", size_of::<FlowKey4>(), size_of::<Flow4>()),
    ("REVERSE4", size_of::<ReverseKey4>(), size_of::<Reverse4>()),
    ("HEARTBEAT", 4, size_of::<Heartbeat>()),
    ("COUNTERS", 4, size_of::<ServiceCounters>()),
    ("REASONS", 4, 8),
    ("EVENTS", 0, 0),
];

/// All maps of the datapath, open.
pub struct Maps {
    pub(super) endpoints: HashMap<MapData, EndpointKey4, EndpointRole>,
    pub(super) services: Array<MapData, ServiceRecord<u8>>,
    pub(super) slots: Array<MapData, u32>,
    pub(super) backends: Array<MapData, Backend4>,
    pub(super) flows: HashMap<MapData, FlowKey4, Flow4<u8>>,
    pub(super) reverse: HashMap<MapData, ReverseKey4, Reverse4>,
    counters: PerCpuArray<MapData, ServiceCounters>,
    reasons: PerCpuArray<MapData, u64>,
    events: RingBuf<MapData>,
    switches: SharedArray,
    backend_words: SharedArray,
    heartbeat: SharedArray,
}

impl std::fmt::Debug for Maps {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Maps").finish_non_exhaustive()
    }
}

impl Maps {
    /// Opens every map through `open`, which knows where a map of that name is.
    ///
    /// # Errors
    /// A map that is missing, of another type, or cannot be mapped into memory.
    pub fn open(mut open: impl FnMut(&str) -> Result<Map>) -> Result<Self> {
        fn typed<T: TryFrom<Map, Error = aya::maps::MapError>>(map: Map, name: &str) -> Result<T> {
            T::try_from(map).with_context(|| format!("the map {name} is of another type"))
        }
        fn data(map: Map, name: &str) -> Result<MapData> {
            match map {
                Map::Array(data) => Ok(data),
                other => anyhow::bail!("the map {name} is no array: {other:?}"),
            }
        }
        let shared = |map: &MapData, size: usize, entries: u32| SharedArray::new(map.fd().as_fd(), size, entries);
        let switches = data(open("SWITCHES")?, "SWITCHES")?;
        let heartbeat = data(open("HEARTBEAT")?, "HEARTBEAT")?;
        let backends = data(open("BACKENDS4")?, "BACKENDS4")?;
        let backend_words = shared(&backends, size_of::<Backend4>(), MAX_BACKENDS)?;
        Ok(Self {
            endpoints: typed(open("ENDPOINTS4")?, "ENDPOINTS4")?,
            services: typed(open("SERVICES")?, "SERVICES")?,
            slots: typed(open("SLOTS")?, "SLOTS")?,
            backends: typed(Map::Array(backends), "BACKENDS4")?,
            flows: typed(open("FLOWS4")?, "FLOWS4")?,
            reverse: typed(open("REVERSE4")?, "REVERSE4")?,
            counters: typed(open("COUNTERS")?, "COUNTERS")?,
            reasons: typed(open("REASONS")?, "REASONS")?,
            events: typed(open("EVENTS")?, "EVENTS")?,
            switches: shared(&switches, size_of::<Switch>(), MAX_SERVICES)?,
            backend_words,
            heartbeat: shared(&heartbeat, size_of::<Heartbeat>(), 1)?,
        })
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

    pub(super) fn clear_in_use(&self, id: u32) {
        self.backend_words.store32(id, std::mem::offset_of!(Backend4, in_use), 0);
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
        }
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
    let socket =
        |addr: usize, port: usize| SocketAddr::V4(SocketAddrV4::new(four(addr).into(), u16::from_be_bytes(two(port))));
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
