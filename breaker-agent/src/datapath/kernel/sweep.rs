//! Going through the flow tables: finished flows leave, the others are counted.

use std::{
    collections::{BTreeMap, BTreeSet, HashMap},
    net::{SocketAddr, SocketAddrV4},
    time::Duration,
};

use anyhow::{Context as _, Result};
use aya::maps::MapError;
use breaker_common::{Flow4, FlowKey4, FlowKind, Reverse4, ReverseKey4, tcp_seen};

use super::maps::{Maps, monotonic_ns};
use crate::{
    datapath::{FlowView, Sweep},
    model::ServiceName,
};

/// How long a finished connection's entries stay: the last segments may be sent again (RFC 9293's TIME-WAIT is longer,
/// but the peer that lost our last ACK gives up on silence as well).
const LINGER: Duration = Duration::from_secs(10);
/// How long a SYN that nobody answered is remembered: Linux gives up after 127 s (tcp_syn_retries = 6).
const UNANSWERED: Duration = Duration::from_secs(130);

/// How long a direct connection to a backend is remembered: its packets are not looked at.
const DIRECT: Duration = Duration::from_secs(300);

/// What was found.
pub(super) struct Found {
    pub sweep: Sweep,
    /// Backends that live flows are on.
    pub redirected_to: BTreeSet<SocketAddrV4>,
    /// Backends that any entry names.
    pub all_to: BTreeSet<SocketAddrV4>,
}

/// Goes through both tables. See [`crate::datapath::Datapath::sweep`].
pub(super) fn sweep(maps: &mut Maps, names: &HashMap<u32, ServiceName>, idle: Option<Duration>) -> Result<Found> {
    let now = monotonic_ns();
    let mut found = Found { sweep: Sweep::default(), redirected_to: BTreeSet::new(), all_to: BTreeSet::new() };
    let mut over = Vec::new();
    let mut claimed = BTreeSet::new();
    for entry in maps.flows.iter() {
        // An entry that left while we looked is no error, and neither is a walk that the kernel made start anew.
        let (key, flow) = match entry {
            Ok(entry) => entry,
            Err(MapError::KeyNotFound) => continue,
            Err(error) => return Err(error).context("read the flows"),
        };
        let reverse_key = reverse_key(&key, &flow);
        let redirected = flow.kind == FlowKind::Redirected as u8;
        let passed = flow.kind == FlowKind::Passed as u8;
        let theirs = if passed { None } else { maps.reverse.get(&reverse_key, 0).ok() };
        let reverse = theirs.filter(|reverse| belongs_to(reverse, &key));
        // Its reverse key was given to another flow: whoever holds it now came later, so this one has ended.
        let superseded = theirs.is_some() && reverse.is_none();
        if superseded
            || is_over(&flow, key.client_port, reverse.as_ref(), now, idle)
            || !(names.contains_key(&flow.service) || !redirected && !passed)
        {
            over.push((key, flow, (!passed).then_some(reverse_key)));
            continue;
        }
        found.sweep.entries += 1;
        if !passed {
            let backend = SocketAddrV4::new(flow.backend.into(), u16::from_be_bytes(flow.backend_port));
            found.all_to.insert(backend);
            claimed.insert(reverse_bytes(&reverse_key));
            // A direct connection needs its backend's packets looked at only if its port was changed.
            if redirected || flow.source_port != key.client_port {
                found.redirected_to.insert(backend);
            }
        }
        if redirected && let Some(name) = names.get(&flow.service) {
            *found.sweep.redirected.entry(name.clone()).or_default() += 1;
        }
    }
    for (key, flow, reverse_key) in over {
        // The walk took its time, and ports get used again: what is there now may be another connection.
        if maps.flows.get(&key, 0).ok().is_none_or(|now| now != flow) {
            continue;
        }
        ignore_missing(maps.flows.remove(&key)).context("remove a flow")?;
        if let Some(reverse_key) = reverse_key
            && maps.reverse.get(&reverse_key, 0).is_ok_and(|reverse| belongs_to(&reverse, &key))
        {
            ignore_missing(maps.reverse.remove(&reverse_key)).context("remove a reverse entry")?;
        }
    }
    remove_orphans(maps, &claimed, now)?;
    Ok(found)
}

/// Removes a service's flows to some backends.
pub(super) fn cut(maps: &mut Maps, service: u32, doomed_backend: &dyn Fn(SocketAddr) -> bool) -> Result<usize> {
    let mut doomed = Vec::new();
    for entry in maps.flows.iter() {
        let (key, flow) = match entry {
            Ok(entry) => entry,
            Err(MapError::KeyNotFound) => continue,
            Err(error) => return Err(error).context("read the flows"),
        };
        let backend = SocketAddr::from((flow.backend, u16::from_be_bytes(flow.backend_port)));
        if flow.service == service && flow.kind == FlowKind::Redirected as u8 && doomed_backend(backend) {
            doomed.push((key, flow));
        }
    }
    for (key, flow) in &doomed {
        // Ports get used again: what is there now may be a younger connection to somebody else.
        if maps.flows.get(key, 0).is_ok_and(|now| now.backend == flow.backend && now.backend_port == flow.backend_port)
        {
            ignore_missing(maps.flows.remove(key)).context("remove a flow")?;
        }
        let reverse_key = reverse_key(key, flow);
        if maps.reverse.get(&reverse_key, 0).is_ok_and(|reverse| belongs_to(&reverse, key)) {
            ignore_missing(maps.reverse.remove(&reverse_key)).context("remove a reverse entry")?;
        }
    }
    Ok(doomed.len())
}

/// Reverse entries that no forward entry claims: left by a SYN that was decided twice at once, or by an eviction.
fn remove_orphans(maps: &mut Maps, claimed: &BTreeSet<[u8; 16]>, now: u64) -> Result<()> {
    let mut orphans = Vec::new();
    for entry in maps.reverse.iter() {
        let (key, reverse) = match entry {
            Ok(entry) => entry,
            Err(MapError::KeyNotFound) => continue,
            Err(error) => return Err(error).context("read the reverse entries"),
        };
        // A young one may belong to a flow that came while we looked.
        if !claimed.contains(&reverse_bytes(&key)) && age(now, reverse.last_seen_ns) > LINGER {
            orphans.push(key);
        }
    }
    for key in orphans {
        ignore_missing(maps.reverse.remove(&key)).context("remove a reverse entry")?;
    }
    Ok(())
}

fn ignore_missing(outcome: Result<(), MapError>) -> Result<(), MapError> {
    match outcome {
        Err(MapError::KeyNotFound) => Ok(()),
        Err(MapError::SyscallError(error)) if error.io_error.kind() == std::io::ErrorKind::NotFound => Ok(()),
        other => other,
    }
}

fn reverse_key(key: &FlowKey4, flow: &Flow4<u8>) -> ReverseKey4 {
    ReverseKey4 {
        backend: flow.backend,
        client: key.client,
        backend_port: flow.backend_port,
        client_port: flow.source_port,
        proto: key.proto,
        pad: [0; 3],
    }
}

fn reverse_bytes(key: &ReverseKey4) -> [u8; 16] {
    let mut bytes = [0; 16];
    bytes[..4].copy_from_slice(&key.backend);
    bytes[4..8].copy_from_slice(&key.client);
    bytes[8..10].copy_from_slice(&key.backend_port);
    bytes[10..12].copy_from_slice(&key.client_port);
    bytes[12] = key.proto;
    bytes
}

/// Whether a reverse entry is this flow's.
fn belongs_to(reverse: &Reverse4, key: &FlowKey4) -> bool {
    reverse.vip == key.vip && reverse.vip_port == key.vip_port && reverse.client_port == key.client_port
}

fn age(now: u64, then: u64) -> Duration {
    Duration::from_nanos(now.saturating_sub(then))
}

/// Whether a flow's entries may go.
fn is_over(
    flow: &Flow4<u8>,
    client_port: [u8; 2],
    reverse: Option<&Reverse4>,
    now: u64,
    idle: Option<Duration>,
) -> bool {
    let last = flow.last_seen_ns.max(flow.created_ns).max(reverse.map_or(0, |r| r.last_seen_ns));
    let age = age(now, last);
    let back = reverse.map_or(0, |r| r.tcp_seen);
    if ended(flow.tcp_seen, back, flow.kind) {
        return age > LINGER;
    }
    let unanswered = reverse.is_some() && back & tcp_seen::SYN_ACK == 0 && flow.kind == FlowKind::Redirected as u8;
    if unanswered {
        return age > UNANSWERED;
    }
    // A direct connection whose port was left alone is noted only so that nobody takes its reverse key.
    if flow.kind == FlowKind::Direct as u8 && flow.source_port == client_port {
        return age > DIRECT;
    }
    idle.is_some_and(|idle| age > idle)
}

/// Reset, or closed from both sides. Of a passed flow only one side is seen.
fn ended(forward: u8, back: u8, kind: u8) -> bool {
    let fin = forward & tcp_seen::FIN != 0;
    (forward | back) & tcp_seen::RST != 0 || fin && (back & tcp_seen::FIN != 0 || kind != FlowKind::Redirected as u8)
}

/// The flows of a service, youngest first.
pub(super) fn list(maps: &Maps, service: u32, limit: usize) -> Result<Vec<FlowView>> {
    let now = monotonic_ns();
    let mut by_age: BTreeMap<(u64, Vec<u8>), FlowView> = BTreeMap::new();
    for entry in maps.flows.iter() {
        let Ok((key, flow)) = entry else { continue };
        if flow.service != service {
            continue;
        }
        let reverse = maps.reverse.get(&reverse_key(&key, &flow), 0).ok().filter(|r| belongs_to(r, &key));
        let back = reverse.map_or(0, |r| r.tcp_seen);
        let passed = flow.kind == FlowKind::Passed as u8;
        let socket = |addr: [u8; 4], port: [u8; 2]| SocketAddr::from((addr, u16::from_be_bytes(port)));
        let Ok(kind) = FlowKind::try_from(flow.kind) else { continue };
        let view = FlowView {
            client: socket(key.client, key.client_port),
            frontend: socket(key.vip, key.vip_port),
            backend: socket(flow.backend, flow.backend_port),
            source_port: u16::from_be_bytes(flow.source_port),
            kind,
            epoch: flow.epoch,
            age_seconds: age(now, flow.created_ns).as_secs(),
            phase: if ended(flow.tcp_seen, back, flow.kind) {
                "ended"
            } else if passed {
                "passed"
            } else if back & tcp_seen::SYN_ACK == 0 {
                "unanswered"
            } else if (flow.tcp_seen | back) & tcp_seen::FIN != 0 {
                "closing"
            } else {
                "established"
            },
        };
        by_age.insert((now.saturating_sub(flow.created_ns), reverse_bytes(&reverse_key(&key, &flow)).to_vec()), view);
        if by_age.len() > limit {
            by_age.pop_last();
        }
    }
    Ok(by_age.into_values().collect())
}
