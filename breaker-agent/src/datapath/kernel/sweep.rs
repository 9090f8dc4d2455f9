//! Going through the flow tables: finished flows leave, the others are counted.

use std::{
    collections::{BTreeSet, HashMap},
    time::Duration,
};

use anyhow::{Context as _, Result};
use aya::maps::{HashMap as BpfMap, MapData, MapError};
use breaker_common::{Flow, FlowKey, FlowKind, PROTO_UDP, Reverse, ReverseKey, TICK_SHIFT, V4, V6, flow_way, seen};

use super::{
    Sizes,
    maps::{FamilyMaps, Maps, Net, monotonic_ns, protocol},
};
use crate::{
    datapath::{Destination, FlowView, Sweep},
    model::ServiceName,
};

/// How long a finished connection's entries stay: the last segments may be sent again (RFC 9293's TIME-WAIT is longer,
/// but the peer that lost our last ACK gives up on silence as well).
const LINGER: Duration = Duration::from_secs(10);
/// How long a SYN that nobody answered is remembered: Linux gives up after 127 s (tcp_syn_retries = 6).
const UNANSWERED: Duration = Duration::from_secs(130);
/// How long a datagram's flow is remembered without a packet, before and after there was an answer: as conntrack does
/// (nf_conntrack_udp_timeout, nf_conntrack_udp_timeout_stream).
const DATAGRAM: [Duration; 2] = [Duration::from_secs(30), Duration::from_secs(120)];

/// What was found.
#[derive(Default)]
pub(super) struct Found {
    pub sweep: Sweep,
    /// Backends that live flows are on.
    pub redirected_to: BTreeSet<Destination>,
    /// Backends that any entry names.
    pub all_to: BTreeSet<Destination>,
    /// Whether a flow leaves the stack out.
    pub any_fast: bool,
}

/// Goes through all tables. See [`crate::datapath::Datapath::sweep`].
pub(super) fn sweep(maps: &mut Maps, names: &HashMap<u32, ServiceName>, idle: Option<Duration>) -> Result<Found> {
    let mut found = Found::default();
    sweep_family::<V4>(maps, names, idle, &mut found)?;
    sweep_family::<V6>(maps, names, idle, &mut found)?;
    let percent = (found.sweep.established * 100).div_ceil(maps.sizes.flows.max(1) as usize);
    found.sweep.pressure_percent = u8::try_from(percent.min(100)).unwrap_or(100);
    Ok(found)
}

fn sweep_family<A: Net>(
    maps: &mut Maps,
    names: &HashMap<u32, ServiceName>,
    idle: Option<Duration>,
    found: &mut Found,
) -> Result<()> {
    let now = monotonic_ns();
    let mut over = Vec::new();
    let mut claimed = BTreeSet::new();
    let mut established = 0;
    let family = A::of(maps);
    // Pending ones first: a flow that is kept meanwhile is seen twice rather than never.
    for (kept, table) in [(false, &family.pending), (true, &family.flows)] {
        for entry in walk(table, &maps.sizes) {
            let Some((key, flow)) = entry_of(entry).context("read the flows")? else { continue };
            let reverse_key = reverse_key(&key, &flow);
            let redirected = flow.kind == FlowKind::Redirected as u8;
            let passed = flow.kind == FlowKind::Passed as u8;
            let theirs = if passed { None } else { reverse_of(family, &reverse_key) };
            let reverse = theirs.filter(|reverse| belongs_to(reverse, &key));
            // Its reverse key was given to another flow: whoever holds it now came later, so this one has ended.
            let superseded = theirs.is_some() && reverse.is_none();
            if superseded
                || is_over(&key, &flow, reverse.as_ref(), now, idle)
                || !(names.contains_key(&flow.service) || !redirected && !passed)
            {
                over.push((key, flow, (!passed).then_some(reverse_key)));
                continue;
            }
            found.sweep.entries += 1;
            established += usize::from(kept);
            found.any_fast |= flow.way & flow_way::FAST != 0;
            if let (false, Some(protocol)) = (passed, protocol(key.proto)) {
                let backend = (flow.backend.socket(flow.backend_port), protocol);
                found.all_to.insert(backend);
                claimed.insert(reverse_key);
                // A direct connection needs its backend's packets looked at only if its port was changed.
                if redirected || flow.source_port != key.client_port {
                    found.redirected_to.insert(backend);
                }
            }
            if redirected && let Some(name) = names.get(&flow.service) {
                *found.sweep.redirected.entry(name.clone()).or_default() += 1;
            }
        }
    }
    found.sweep.established = found.sweep.established.max(established);
    let family = A::of_mut(maps);
    for (key, flow, reverse_key) in over {
        // The walk took its time, and ports get used again: what is there now may be another connection.
        if flow_of(family, &key).is_none_or(|now| now != flow) {
            continue;
        }
        remove_flow(family, &key)?;
        if let Some(reverse_key) = reverse_key
            && reverse_of(family, &reverse_key).is_some_and(|reverse| belongs_to(&reverse, &key))
        {
            remove_reverse(family, &reverse_key)?;
        }
    }
    remove_orphans(family, &claimed, now)
}

/// Removes a service's flows to some backends.
pub(super) fn cut(maps: &mut Maps, service: u32, doomed: &dyn Fn(Destination) -> bool) -> Result<usize> {
    Ok(cut_family::<V4>(maps, service, doomed)? + cut_family::<V6>(maps, service, doomed)?)
}

fn cut_family<A: Net>(maps: &mut Maps, service: u32, doomed_backend: &dyn Fn(Destination) -> bool) -> Result<usize> {
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
        // Ports get used again: what is there now may be a younger connection to somebody else.
        if flow_of(family, key).is_some_and(|now| now.backend == flow.backend && now.backend_port == flow.backend_port)
        {
            remove_flow(family, key)?;
        }
        let reverse_key = reverse_key(key, flow);
        if reverse_of(family, &reverse_key).is_some_and(|reverse| belongs_to(&reverse, key)) {
            remove_reverse(family, &reverse_key)?;
        }
    }
    Ok(doomed.len())
}

/// Reverse entries that no forward entry claims: left by a first packet that was decided twice at once, or by an eviction.
fn remove_orphans<A: Net>(family: &mut FamilyMaps<A>, claimed: &BTreeSet<ReverseKey<A>>, now: u64) -> Result<()> {
    let mut orphans = Vec::new();
    for table in [&family.reverse, &family.pending_reverse] {
        for entry in table.iter() {
            let Some((key, reverse)) = entry_of(entry).context("read the reverse entries")? else { continue };
            // A young one may belong to a flow that came while we looked.
            if !claimed.contains(&key) && age(now, reverse.last_seen_tick) > LINGER {
                orphans.push(key);
            }
        }
    }
    orphans.iter().try_for_each(|key| remove_reverse(family, key))
}

/// All entries of a flow table. A walk begins anew where the entry that it was at has left, so under a flood it would not end:
/// after twice what the tables hold, it does.
fn walk<'a, K: aya::Pod, V: aya::Pod>(
    table: &'a BpfMap<MapData, K, V>,
    sizes: &Sizes,
) -> impl Iterator<Item = Result<(K, V), MapError>> + use<'a, K, V> {
    table.iter().take(2 * (sizes.flows + sizes.pending) as usize)
}

/// An entry that left while we looked is no error, and neither is a walk that the kernel made start anew.
fn entry_of<K, V>(entry: Result<(K, V), MapError>) -> Result<Option<(K, V)>, MapError> {
    match entry {
        Ok(entry) => Ok(Some(entry)),
        Err(MapError::KeyNotFound) => Ok(None),
        Err(error) => Err(error),
    }
}

fn flow_of<A: Net>(family: &FamilyMaps<A>, key: &FlowKey<A>) -> Option<Flow<A, u8>> {
    family.flows.get(key, 0).or_else(|_| family.pending.get(key, 0)).ok()
}

fn reverse_of<A: Net>(family: &FamilyMaps<A>, key: &ReverseKey<A>) -> Option<Reverse<A>> {
    family.reverse.get(key, 0).or_else(|_| family.pending_reverse.get(key, 0)).ok()
}

fn remove_flow<A: Net>(family: &mut FamilyMaps<A>, key: &FlowKey<A>) -> Result<()> {
    remove(&mut family.flows, key).and_then(|()| remove(&mut family.pending, key)).context("remove a flow")
}

fn remove_reverse<A: Net>(family: &mut FamilyMaps<A>, key: &ReverseKey<A>) -> Result<()> {
    remove(&mut family.reverse, key)
        .and_then(|()| remove(&mut family.pending_reverse, key))
        .context("remove a reverse entry")
}

fn remove<K: aya::Pod, V: aya::Pod>(table: &mut BpfMap<MapData, K, V>, key: &K) -> Result<(), MapError> {
    match table.remove(key) {
        Err(error) if super::is_not_there(&error) => Ok(()),
        other => other,
    }
}

fn reverse_key<A: Net>(key: &FlowKey<A>, flow: &Flow<A, u8>) -> ReverseKey<A> {
    ReverseKey {
        backend: flow.backend,
        client: key.client,
        backend_port: flow.backend_port,
        client_port: flow.source_port,
        proto: key.proto,
        pad: [0; 3],
    }
}

/// Whether a reverse entry is this flow's.
fn belongs_to<A: Net>(reverse: &Reverse<A>, key: &FlowKey<A>) -> bool {
    reverse.vip == key.vip && reverse.vip_port == key.vip_port && reverse.client_port == key.client_port
}

/// How long ago a tick was, at least.
fn age(now_ns: u64, tick: u32) -> Duration {
    Duration::from_nanos(now_ns.saturating_sub((u64::from(tick) + 1) << TICK_SHIFT))
}

/// Whether a flow's entries may go.
fn is_over<A: Net>(
    key: &FlowKey<A>,
    flow: &Flow<A, u8>,
    reverse: Option<&Reverse<A>>,
    now: u64,
    idle: Option<Duration>,
) -> bool {
    let last = flow.last_seen_tick.max(flow.created_tick).max(reverse.map_or(0, |r| r.last_seen_tick));
    let age = age(now, last);
    let back = reverse.map_or(0, |r| r.seen);
    let answered = back & seen::ANSWERED != 0;
    if key.proto == PROTO_UDP {
        return age > DATAGRAM[usize::from(answered)];
    }
    if ended(flow.seen, back, flow.kind) {
        return age > LINGER;
    }
    if reverse.is_some() && !answered && flow.kind == FlowKind::Redirected as u8 {
        return age > UNANSWERED;
    }
    // A direct connection's packets are not looked at: nobody may take its reverse key until its end is seen, or its table
    // is full of younger ones.
    idle.is_some_and(|idle| age > idle)
}

/// Reset, or closed from both sides. Of a passed flow only one side is seen.
fn ended(forward: u8, back: u8, kind: u8) -> bool {
    let fin = forward & seen::FIN != 0;
    (forward | back) & seen::RST != 0 || fin && (back & seen::FIN != 0 || kind != FlowKind::Redirected as u8)
}

/// The flows of a service, youngest first.
pub(super) fn list(maps: &Maps, service: u32, limit: usize) -> Result<Vec<FlowView>> {
    let mut flows = list_family::<V4>(maps, service);
    flows.extend(list_family::<V6>(maps, service));
    flows.sort_by_key(|flow| (flow.age_seconds, flow.client));
    flows.truncate(limit);
    Ok(flows)
}

fn list_family<A: Net>(maps: &Maps, service: u32) -> Vec<FlowView> {
    let now = monotonic_ns();
    let family = A::of(maps);
    let entries = family.flows.iter().chain(family.pending.iter()).flatten();
    let view = |(key, flow): (FlowKey<A>, Flow<A, u8>)| {
        let reverse = reverse_of(family, &reverse_key(&key, &flow)).filter(|r| belongs_to(r, &key));
        let back = reverse.map_or(0, |r| r.seen);
        Some(FlowView {
            client: key.client.socket(key.client_port),
            frontend: key.vip.socket(key.vip_port),
            backend: flow.backend.socket(flow.backend_port),
            protocol: protocol(key.proto)?,
            source_port: u16::from_be_bytes(flow.source_port),
            kind: FlowKind::try_from(flow.kind).ok()?,
            epoch: flow.epoch,
            way: if flow.way & flow_way::FAST == 0 { "stack" } else { "veth" },
            age_seconds: age(now, flow.created_tick).as_secs(),
            phase: if ended(flow.seen, back, flow.kind) {
                "ended"
            } else if flow.kind == FlowKind::Passed as u8 {
                "passed"
            } else if back & seen::ANSWERED == 0 {
                "unanswered"
            } else if (flow.seen | back) & seen::FIN != 0 {
                "closing"
            } else {
                "established"
            },
        })
    };
    entries.filter(|(_, flow)| flow.service == service).filter_map(view).collect()
}
