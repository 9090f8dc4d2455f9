//! Typed access to the maps. A map has the name of its static in the programs, and its pin has the same name.

pub(crate) mod connections;
mod events;
pub(crate) mod family;
pub(crate) mod filter;
pub(crate) mod index_allocator;
pub(crate) mod limits;
mod mmap;

use std::{os::fd::AsFd as _, path::Path, sync::atomic::Ordering, time::Duration};

use anyhow::{Context as _, Result};
use aya::maps::{Array, HashMap, Map, MapData, MapError, PerCpuArray, PerCpuValues, RingBuf};
use breaker_common::{
    ABI_VERSION, DownBackendKey, EndpointRole, FilterWords, Heartbeat, PassReason, ReturnPath, ReturnPathKey, Route,
    ServiceCounters, ServiceRecord, SocketKey, SocketOrigin, Switch, Table, V4, V6,
};

use self::{
    family::{FamilyMaps, IpFamily, V4_NAMES, V6_NAMES, of_family},
    filter::{BitPosition, Filter, bits_for, position_of},
    limits::LimitMaps,
    mmap::SharedArray,
};
use super::sizes::{MORE_PARTS, Sizes};
use crate::clock;

/// Name, key size and value size (in bytes) of the maps that both IP families share, without the maps of limits.
const SHARED: [(&str, usize, usize); 15] = [
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
    ("MORE_COUNTERS", 4, size_of::<ServiceCounters>()),
    ("REASONS", 4, 8),
    ("DOWN_BACKENDS", size_of::<DownBackendKey>(), 1),
    ("RETURN_PATHS", size_of::<ReturnPathKey>(), size_of::<ReturnPath>()),
    ("EVENTS", 0, 0),
];

/// Name, key size and value size (in bytes) of every map. An agent adopts a pinned map only if its sizes are these;
/// a key size of 0 turns the comparison off.
pub(crate) fn pinned() -> impl Iterator<Item = (&'static str, usize, usize)> {
    SHARED.into_iter().chain(LimitMaps::SIZES).chain(of_family::<V4>(V4_NAMES)).chain(of_family::<V6>(V6_NAMES))
}

/// The open maps of the datapath.
pub struct Maps {
    pub(crate) v4: FamilyMaps<V4>,
    pub(crate) v6: FamilyMaps<V6>,
    pub(crate) services: Array<MapData, ServiceRecord<u8>>,
    records: SharedArray,
    pub(crate) routes: Array<MapData, Route>,
    pub(crate) slots: HashMap<MapData, u32, Table>,
    pub(crate) filter: Filter,
    pub(crate) limits: LimitMaps,
    /// The actual sizes. They may differ from the configuration, because maps of an earlier agent keep their sizes.
    pub(crate) sizes: Sizes,
    /// Counters of the services with the lowest indices, and of the others.
    counters: PerCpuArray<MapData, ServiceCounters>,
    more_counters: HashMap<MapData, u32, ServiceCounters>,
    pub(crate) return_paths: HashMap<MapData, ReturnPathKey, ReturnPath>,
    pub(crate) down_backends: HashMap<MapData, DownBackendKey, u8>,
    /// Whether the last sweep found a table of established flows more than half full.
    pub(crate) crowded: bool,
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

pub(crate) fn typed<T: TryFrom<Map, Error = aya::maps::MapError>>(map: Map, name: &str) -> Result<T> {
    T::try_from(map).with_context(|| format!("the map {name} has an unexpected type"))
}

pub(crate) fn array(map: Map, name: &str) -> Result<MapData> {
    match map {
        Map::Array(data) => Ok(data),
        other => anyhow::bail!("the map {name} is not an array: {other:?}"),
    }
}

pub(crate) fn entries(map: &MapData) -> Result<u32> {
    Ok(map.info().context("read a map's size")?.max_entries())
}

pub(crate) fn shared(map: &MapData, value_size: usize) -> Result<SharedArray> {
    SharedArray::new(map.fd().as_fd(), value_size, entries(map)?)
}

impl Maps {
    /// Opens every map. `open` returns the map with a given name.
    ///
    /// # Errors
    /// A map is missing, has an unexpected type, or cannot be mapped into memory.
    pub fn open(mut open: impl FnMut(&str) -> Result<Map>) -> Result<Self> {
        let switches = array(open("SWITCHES")?, "SWITCHES")?;
        let heartbeat = array(open("HEARTBEAT")?, "HEARTBEAT")?;
        let services = array(open("SERVICES")?, "SERVICES")?;
        let routes = array(open("ROUTES")?, "ROUTES")?;
        let slots = match open("SLOTS")? {
            Map::HashMap(data) => data,
            other => anyhow::bail!("the map SLOTS is not a hash map: {other:?}"),
        };
        let v4 = FamilyMaps::<V4>::open(&mut open, V4_NAMES)?;
        let v6 = FamilyMaps::<V6>::open(&mut open, V6_NAMES)?;
        let limits = LimitMaps::open(&mut open)?;
        let sizes = Sizes {
            services: entries(&switches)?,
            routes: entries(&routes)?,
            tables: entries(&slots)?.saturating_sub(MORE_PARTS),
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
            slots: typed(Map::HashMap(slots), "SLOTS")?,
            filter: Filter::new(shared(&array(open("FILTER")?, "FILTER")?, size_of::<FilterWords>())?),
            limits,
            sizes,
            counters: typed(open("COUNTERS")?, "COUNTERS")?,
            more_counters: typed(open("MORE_COUNTERS")?, "MORE_COUNTERS")?,
            return_paths: typed(open("RETURN_PATHS")?, "RETURN_PATHS")?,
            down_backends: typed(open("DOWN_BACKENDS")?, "DOWN_BACKENDS")?,
            crowded: false,
            reasons: typed(open("REASONS")?, "REASONS")?,
            events: typed(open("EVENTS")?, "EVENTS")?,
            switches: shared(&switches, size_of::<Switch>())?,
            heartbeat: shared(&heartbeat, size_of::<Heartbeat>())?,
        })
    }

    /// Sets the filter bits of all endpoints that are in the maps.
    pub(crate) fn adopt_filter(&mut self) -> Result<()> {
        fn roles<A: IpFamily>(maps: &Maps) -> Result<Vec<(BitPosition, EndpointRole)>> {
            let entries = A::of(maps).endpoints.iter();
            entries
                .map(|entry| entry.map(|(key, role)| (position_of(&key), role)).context("read the endpoints"))
                .collect()
        }
        for (position, role) in [roles::<V4>(self)?, roles::<V6>(self)?].concat() {
            for bit in bits_for(&role) {
                self.filter.add(bit, position);
            }
        }
        Ok(())
    }

    /// Reads a service's switch in one load.
    #[must_use]
    pub fn switch(&self, index: u32) -> Switch<u8> {
        Switch::from_word(self.switches.word(index, 0).load(Ordering::SeqCst))
    }

    /// Writes a service's switch in one store.
    pub fn set_switch(&self, index: u32, switch: Switch<u8>) {
        self.switches.store(index, 0, switch.to_word());
    }

    /// Writes a service's record, word by word. This need not be atomic: each field that the programs read is one
    /// word, and the other fields are read only by the next agent, which starts after this one has ended.
    pub(crate) fn set_record(&self, index: u32, record: &ServiceRecord<u8>) {
        self.records.write(index, record);
    }

    /// Writes the heartbeat, with the time of `CLOCK_MONOTONIC` last. `lease` is 0 if the last decision holds for
    /// ever.
    pub(crate) fn write_heartbeat(&self, lease: Duration, unix_ns: u64) {
        let lease = u64::try_from(lease.as_nanos()).unwrap_or(u64::MAX);
        let abi = u64::from(ABI_VERSION) << 32 | u64::from(std::process::id());
        #[cfg(target_endian = "big")]
        let abi = abi.rotate_left(32);
        self.heartbeat.store(0, std::mem::offset_of!(Heartbeat, lease_ns), lease);
        self.heartbeat.store(0, std::mem::offset_of!(Heartbeat, beat_unix_ns), unix_ns);
        self.heartbeat.store(0, std::mem::offset_of!(Heartbeat, pid), abi);
        self.heartbeat.store(0, std::mem::offset_of!(Heartbeat, beat_ns), clock::monotonic_ns());
    }

    /// Reads the last heartbeat of a pinned map, without opening the other maps.
    ///
    /// # Errors
    /// The map cannot be opened or read.
    pub(crate) fn pinned_heartbeat(pin: &Path) -> Result<Heartbeat> {
        let map = Map::from_map_data(MapData::from_pin(pin).context("open the pinned map HEARTBEAT")?)?;
        let heartbeats: Array<MapData, Heartbeat> = typed(map, "HEARTBEAT")?;
        heartbeats.get(&0, 0).context("read the heartbeat")
    }

    /// Reads the last heartbeat.
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
            fast: u32::from(self.fast_path_in_use()),
            counts_sockets: self
                .heartbeat
                .word32(0, std::mem::offset_of!(Heartbeat, counts_sockets))
                .load(Ordering::SeqCst),
        }
    }

    /// Whether the programs look for flows on the fast path, which bypasses the host network stack.
    pub(crate) fn fast_path_in_use(&self) -> bool {
        self.heartbeat.word32(0, std::mem::offset_of!(Heartbeat, fast)).load(Ordering::SeqCst) != 0
    }

    /// Sets whether the programs look for flows on the fast path.
    pub(crate) fn set_fast_path_in_use(&self, any: bool) {
        self.heartbeat.store32(0, std::mem::offset_of!(Heartbeat, fast), u32::from(any));
    }

    /// Sets whether the programs process the close of the node's own sockets.
    pub(crate) fn set_counts_sockets(&self, any: bool) {
        self.heartbeat.store32(0, std::mem::offset_of!(Heartbeat, counts_sockets), u32::from(any));
    }

    /// Returns a service's counters, summed over all CPUs.
    ///
    /// # Errors
    /// The map cannot be read.
    pub fn counters(&self, index: u32) -> Result<ServiceCounters> {
        if index >= self.counters.len() {
            return entry_or_default(&self.more_counters, index).context("read the counters");
        }
        let per_cpu = self.counters.get(&index, 0).context("read the counters")?;
        Ok(per_cpu.iter().fold(ServiceCounters::default(), add))
    }

    /// Adds a service's counters. If it has counters already, they stay.
    pub(crate) fn add_counters(&mut self, index: u32) -> Result<()> {
        if index < self.counters.len() {
            return Ok(());
        }
        add_entry(&mut self.more_counters, index).context("add the counters")
    }

    pub(crate) fn remove_counters(&mut self, index: u32) -> Result<()> {
        if index >= self.counters.len() {
            return remove_entry(&mut self.more_counters, index).context("remove the counters");
        }
        let cpus = self.counters.get(&index, 0).context("read the counters")?.len();
        let zeros = PerCpuValues::try_from(vec![ServiceCounters::default(); cpus]).context("clear the counters")?;
        self.counters.set(index, zeros, 0).context("clear the counters")
    }

    /// Returns the number of packets that failed open, by reason, summed over all CPUs. Reasons with 0 packets are
    /// left out.
    ///
    /// # Errors
    /// The map cannot be read.
    pub fn reasons(&self) -> Result<Vec<(PassReason, u64)>> {
        let mut reasons = Vec::new();
        for &reason in PassReason::ALL {
            let count: u64 =
                self.reasons.get(&u32::from(reason as u8), 0).context("read the pass reasons")?.iter().sum();
            if count > 0 {
                reasons.push((reason, count));
            }
        }
        Ok(reasons)
    }
}

/// Returns an entry of counters; zeros if there is none.
fn entry_or_default<V: aya::Pod + Default>(map: &HashMap<MapData, u32, V>, index: u32) -> Result<V> {
    match map.get(&index, 0) {
        Err(error) if is_not_found(&error) => Ok(V::default()),
        outcome => Ok(outcome?),
    }
}

/// Adds an entry of counters with zeros. An entry that exists stays.
fn add_entry<V: aya::Pod + Default>(map: &mut HashMap<MapData, u32, V>, index: u32) -> Result<()> {
    match map.insert(index, V::default(), BPF_NOEXIST) {
        Err(MapError::SyscallError(error)) if error.io_error.kind() == std::io::ErrorKind::AlreadyExists => Ok(()),
        outcome => Ok(outcome?),
    }
}

/// Removes an entry of counters. It may be gone already.
fn remove_entry<V: aya::Pod>(map: &mut HashMap<MapData, u32, V>, index: u32) -> Result<()> {
    match map.remove(&index) {
        Err(error) if !is_not_found(&error) => Err(error.into()),
        _ => Ok(()),
    }
}

/// `BPF_NOEXIST` in linux/bpf.h: create an entry, and fail if it exists.
const BPF_NOEXIST: u64 = 1;

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
        late_answers: a.late_answers + b.late_answers,
    }
}

/// Whether a map error means that the entry does not exist.
pub(crate) fn is_not_found(error: &MapError) -> bool {
    match error {
        MapError::KeyNotFound => true,
        MapError::SyscallError(error) => error.io_error.kind() == std::io::ErrorKind::NotFound,
        _ => false,
    }
}
