//! Walks the flow tables: removes flows that are over, and counts the others.

use std::{
    collections::{BTreeSet, HashMap},
    time::Duration,
};

use anyhow::{Context as _, Result};
use aya::maps::{HashMap as BpfMap, MapData, MapError};
use breaker_common::{Flow, FlowKey, FlowKind, PROTO_UDP, Reverse, ReverseKey, TICK_SHIFT, V4, V6, flow_path, seen};
use breaker_core::{
    datapath::{Destination, FlowTables, Sweep},
    model::ServiceName,
};

use super::{
    maps::{
        Maps,
        family::{FamilyMaps, IpFamily, protocol},
        is_not_found,
    },
    sizes::Sizes,
};
use crate::clock;

/// How long the entries of a finished connection stay at least, because its last segments may be sent again.
const LINGER: Duration = Duration::from_secs(10);
/// How long they stay while the table is at most half full: as long as the backend may be in TIME-WAIT (Linux: 60 s,
/// `TCP_TIMEWAIT_LEN`). Meanwhile a connection to another frontend with the same ports gets another source port.
const TIME_WAIT: Duration = Duration::from_secs(60);
/// How long a SYN without an answer is remembered. Linux gives up after 127 s (`tcp_syn_retries = 6`).
const UNANSWERED: Duration = Duration::from_secs(130);
/// How long a flow of datagrams is remembered without a packet: before and after its first answer. The times are
/// those of conntrack (`nf_conntrack_udp_timeout`, `nf_conntrack_udp_timeout_stream`).
const DATAGRAM: [Duration; 2] = [Duration::from_secs(30), Duration::from_secs(120)];

/// Result of a sweep.
#[derive(Default)]
pub(super) struct Found {
    pub sweep: Sweep,
    /// Backends whose packets need translation: a live flow was redirected to them, or had its source port changed.
    pub redirected_to: BTreeSet<Destination>,
    /// Backends that any of the remaining entries names.
    pub all_to: BTreeSet<Destination>,
    /// Whether a flow uses the fast path, which bypasses the host network stack.
    pub fast_path_in_use: bool,
}

/// Walks the tables of both IP families. See [`breaker_core::datapath::Datapath::sweep`].
pub(super) fn sweep(maps: &mut Maps, names: &HashMap<u32, ServiceName>, idle: Option<Duration>) -> Result<Found> {
    let mut found = Found::default();
    found.sweep.tables =
        [sweep_family::<V4>(maps, names, idle, &mut found)?, sweep_family::<V6>(maps, names, idle, &mut found)?];
    let percent = (found.sweep.established() * 100).div_ceil(maps.sizes.flows.max(1) as usize);
    found.sweep.pressure_percent = u8::try_from(percent.min(100)).unwrap_or(100);
    maps.crowded = percent > 50;
    Ok(found)
}

fn sweep_family<A: IpFamily>(
    maps: &mut Maps,
    names: &HashMap<u32, ServiceName>,
    idle: Option<Duration>,
    found: &mut Found,
) -> Result<FlowTables> {
    let now = clock::monotonic_ns();
    let mut over = Vec::new();
    let mut claimed = BTreeSet::new();
    let mut tables = FlowTables::default();
    // The tables at the last sweep: nobody knows how full they are before the walk.
    let linger = if maps.crowded { LINGER } else { TIME_WAIT };
    let family = A::of(maps);
    // Pending flows first: a flow that is promoted meanwhile is then seen twice rather than never.
    for (kept, table) in [(false, &family.pending), (true, &family.flows)] {
        for entry in walk(table, &maps.sizes) {
            let Some((key, flow)) = entry_of(entry).context("read the flows")? else { continue };
            let reverse_key = key.reverse_key(&flow);
            let redirected = flow.kind == FlowKind::Redirected as u8;
            let passed = flow.kind == FlowKind::Passed as u8;
            let theirs = if passed { None } else { reverse_of(family, &reverse_key) };
            let reverse = theirs.filter(|reverse| reverse.belongs_to(&key));
            // Another flow has the reverse key now. It came later, so this flow has ended.
            let superseded = theirs.is_some() && reverse.is_none();
            if superseded
                || is_over(&key, &flow, reverse.as_ref(), now, idle, linger)
                || !(names.contains_key(&flow.service) || !redirected && !passed)
            {
                over.push((key, flow, (!passed).then_some(reverse_key)));
                continue;
            }
            tables.entries[usize::from(kept)] += 1;
            let backend = protocol(key.proto).map(|protocol| (flow.backend.socket(flow.backend_port), protocol));
            if let Some(backend) = backend.filter(|_| !passed) {
                found.all_to.insert(backend);
                claimed.insert(reverse_key);
            }
            // A connection that is over keeps its reverse key only: none of its segments is expected any more.
            if is_over(&key, &flow, reverse.as_ref(), now, idle, LINGER) {
                continue;
            }
            tables.live[usize::from(kept)] += 1;
            found.fast_path_in_use |= flow.path & flow_path::FAST != 0;
            if let Some(backend) = backend.filter(|_| !passed) {
                // The packets of a direct connection's backend need translation only if the source port was changed.
                if redirected || flow.source_port != key.client_port {
                    found.redirected_to.insert(backend);
                }
            }
            if redirected && let Some(name) = names.get(&flow.service) {
                *found.sweep.redirected.entry(name.clone()).or_default() += 1;
            }
        }
    }
    let family = A::of_mut(maps);
    for (key, flow, reverse_key) in over {
        // The walk took some time, and ports are used again: the entry may belong to another connection now.
        if flow_of(family, &key).is_none_or(|now| now != flow) {
            continue;
        }
        remove_flow(family, &key)?;
        if let Some(reverse_key) = reverse_key
            && reverse_of(family, &reverse_key).is_some_and(|reverse| reverse.belongs_to(&key))
        {
            remove_reverse(family, &reverse_key)?;
        }
    }
    remove_orphans(family, &claimed, now)?;
    Ok(tables)
}

/// Removes a service's flows to the backends for which `doomed` returns true. Returns the number of these flows.
pub(super) fn remove_flows(maps: &mut Maps, service: u32, doomed: &dyn Fn(Destination) -> bool) -> Result<usize> {
    Ok(remove_flows_of_family::<V4>(maps, service, doomed)? + remove_flows_of_family::<V6>(maps, service, doomed)?)
}

fn remove_flows_of_family<A: IpFamily>(
    maps: &mut Maps,
    service: u32,
    doomed_backend: &dyn Fn(Destination) -> bool,
) -> Result<usize> {
    let mut doomed = Vec::new();
    let family = A::of_mut(maps);
    for table in [&family.flows, &family.pending] {
        for entry in table.iter() {
            let Some((key, flow)) = entry_of(entry).context("read the flows")? else { continue };
            let Some(protocol) = protocol(key.proto) else { continue };
            let backend = (flow.backend.socket(flow.backend_port), protocol);
            if flow.service == service && flow.kind == FlowKind::Redirected as u8 && doomed_backend(backend) {
                doomed.push((key, flow));
            }
        }
    }
    for (key, flow) in &doomed {
        // Ports are used again: the entry may belong to a newer connection to another backend now.
        if flow_of(family, key).is_some_and(|now| now.backend == flow.backend && now.backend_port == flow.backend_port)
        {
            remove_flow(family, key)?;
        }
        let reverse_key = key.reverse_key(flow);
        if reverse_of(family, &reverse_key).is_some_and(|reverse| reverse.belongs_to(key)) {
            remove_reverse(family, &reverse_key)?;
        }
    }
    Ok(doomed.len())
}

/// Removes reverse entries that no forward entry refers to. Such an entry is left when two CPUs decide the first
/// packet of a flow at once, or when a table evicts the forward entry.
fn remove_orphans<A: IpFamily>(family: &mut FamilyMaps<A>, claimed: &BTreeSet<ReverseKey<A>>, now: u64) -> Result<()> {
    let mut orphans = Vec::new();
    for table in [&family.reverse, &family.pending_reverse] {
        for entry in table.iter() {
            let Some((key, reverse)) = entry_of(entry).context("read the reverse entries")? else { continue };
            // A recent entry may belong to a flow that came during the walk.
            if !claimed.contains(&key) && age(now, reverse.last_seen_tick) > LINGER {
                orphans.push(key);
            }
        }
    }
    orphans.iter().try_for_each(|key| remove_reverse(family, key))
}

/// Iterates over the entries of a flow table. The kernel restarts an iteration whose current entry was removed, so
/// under a flood it would not end. It ends after twice as many entries as the tables hold.
fn walk<'a, K: aya::Pod, V: aya::Pod>(
    table: &'a BpfMap<MapData, K, V>,
    sizes: &Sizes,
) -> impl Iterator<Item = Result<(K, V), MapError>> + use<'a, K, V> {
    table.iter().take(2 * (sizes.flows + sizes.pending) as usize)
}

/// Returns `None` for an entry that was removed during the walk, or a walk that the kernel restarted: neither is an
/// error.
pub(super) fn entry_of<K, V>(entry: Result<(K, V), MapError>) -> Result<Option<(K, V)>, MapError> {
    match entry {
        Ok(entry) => Ok(Some(entry)),
        Err(MapError::KeyNotFound) => Ok(None),
        Err(error) => Err(error),
    }
}

fn flow_of<A: IpFamily>(family: &FamilyMaps<A>, key: &FlowKey<A>) -> Option<Flow<A, u8>> {
    family.flows.get(key, 0).or_else(|_| family.pending.get(key, 0)).ok()
}

pub(super) fn reverse_of<A: IpFamily>(family: &FamilyMaps<A>, key: &ReverseKey<A>) -> Option<Reverse<A>> {
    family.reverse.get(key, 0).or_else(|_| family.pending_reverse.get(key, 0)).ok()
}

fn remove_flow<A: IpFamily>(family: &mut FamilyMaps<A>, key: &FlowKey<A>) -> Result<()> {
    remove(&mut family.flows, key).and_then(|()| remove(&mut family.pending, key)).context("remove a flow")
}

fn remove_reverse<A: IpFamily>(family: &mut FamilyMaps<A>, key: &ReverseKey<A>) -> Result<()> {
    remove(&mut family.reverse, key)
        .and_then(|()| remove(&mut family.pending_reverse, key))
        .context("remove a reverse entry")
}

fn remove<K: aya::Pod, V: aya::Pod>(table: &mut BpfMap<MapData, K, V>, key: &K) -> Result<(), MapError> {
    match table.remove(key) {
        Err(error) if is_not_found(&error) => Ok(()),
        other => other,
    }
}

/// Returns the time since the end of a tick (see [`TICK_SHIFT`]); 0 if the tick has not ended.
pub(super) fn age(now_ns: u64, tick: u32) -> Duration {
    Duration::from_nanos(now_ns.saturating_sub((u64::from(tick) + 1) << TICK_SHIFT))
}

/// Whether a flow is over, so that its entries can be removed.
fn is_over<A: IpFamily>(
    key: &FlowKey<A>,
    flow: &Flow<A, u8>,
    reverse: Option<&Reverse<A>>,
    now: u64,
    idle: Option<Duration>,
    linger: Duration,
) -> bool {
    let last = flow.last_seen_tick.max(flow.created_tick).max(reverse.map_or(0, |r| r.last_seen_tick));
    let age = age(now, last);
    let back = reverse.map_or(0, |r| r.seen);
    let answered = back & seen::ANSWERED != 0;
    if key.proto == PROTO_UDP {
        return age > DATAGRAM[usize::from(answered)];
    }
    if has_ended(flow, back) {
        return age > linger;
    }
    if reverse.is_some() && !answered && flow.kind == FlowKind::Redirected as u8 {
        return age > UNANSWERED;
    }
    // The programs do not see the data packets of a direct connection. It keeps its reverse key until its end is
    // seen, `idle` has passed since the last packet that was seen, or newer flows push it out of its table.
    idle.is_some_and(|idle| age > idle)
}

/// Whether a connection was reset, or closed from both sides. `back`: bits of [`seen`] from packets of the backend, which
/// are seen of redirected flows only.
pub(super) fn has_ended<A>(flow: &Flow<A, u8>, back: u8) -> bool {
    seen::has_ended(flow.seen, back, flow.kind == FlowKind::Redirected as u8)
}
