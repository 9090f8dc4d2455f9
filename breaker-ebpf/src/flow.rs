//! The pinned decisions: a forward entry by the client's view, a reverse entry by the backend's.
//!
//! The forward entry is the truth. The reverse one is derived from it and made again when it is found missing (both
//! tables are LRU, so either may lose an entry to newer ones when they are full).
//!
//! Races: two CPUs may handle two packets of one flow at once only if the client sends a SYN again while the first is
//! still under way; the later write wins in both tables, and a reverse entry of the loser's is removed by userspace.

use aya_ebpf::{
    bindings::{BPF_ANY, BPF_NOEXIST},
    btf_maps::LruHashMap,
    macros::btf_map,
};
use breaker_common::{
    Backend4, DEFAULT_MAX_FLOWS, Flow4, FlowKey4, FlowKind, NONE, PROTO_TCP, PassReason, Reverse4, ReverseKey4,
    tcp_seen,
};

use crate::{
    agent,
    parse::{Segment, flags},
};

/// By the client's view.
#[btf_map]
static FLOWS4: LruHashMap<FlowKey4, Flow4, { DEFAULT_MAX_FLOWS as usize }> = LruHashMap::new();

/// By the backend's view.
#[btf_map]
static REVERSE4: LruHashMap<ReverseKey4, Reverse4, { DEFAULT_MAX_FLOWS as usize }> = LruHashMap::new();

/// How many source ports are tried for a flow whose own is taken.
const PORT_TRIES: u16 = 16;
/// First port to try: below are the privileged ones (RFC 6335, section 6).
const PORT_FIRST: u16 = 1024;

/// The key of a segment that a client sends.
#[inline(always)]
pub fn key(segment: &Segment) -> FlowKey4 {
    FlowKey4 {
        client: segment.source,
        vip: segment.destination,
        client_port: segment.source_port,
        vip_port: segment.destination_port,
        proto: PROTO_TCP,
        pad: [0; 3],
    }
}

/// The key of a segment that a backend sends.
#[inline(always)]
pub fn reverse_key(segment: &Segment) -> ReverseKey4 {
    ReverseKey4 {
        backend: segment.source,
        client: segment.destination,
        backend_port: segment.source_port,
        client_port: segment.destination_port,
        proto: PROTO_TCP,
        pad: [0; 3],
    }
}

/// The reverse key that belongs to a flow.
#[inline(always)]
fn reverse_key_of(key: &FlowKey4, flow: &Flow4) -> ReverseKey4 {
    ReverseKey4 {
        backend: flow.backend,
        client: key.client,
        backend_port: flow.backend_port,
        client_port: flow.source_port,
        proto: PROTO_TCP,
        pad: [0; 3],
    }
}

#[inline(always)]
fn reverse_of(key: &FlowKey4, flow: &Flow4) -> Reverse4 {
    Reverse4 {
        vip: key.vip,
        vip_port: key.vip_port,
        client_port: key.client_port,
        service: flow.service,
        tcp_seen: 0,
        pad: [0; 3],
        last_seen_ns: flow.last_seen_ns,
    }
}

/// Whether a reverse entry is this flow's.
#[inline(always)]
fn belongs_to(reverse: &Reverse4, key: &FlowKey4) -> bool {
    reverse.vip == key.vip && reverse.vip_port == key.vip_port && reverse.client_port == key.client_port
}

/// The decision for a flow, in place.
#[inline(always)]
pub fn find(key: &FlowKey4) -> Option<&'static mut Flow4> {
    // SAFETY: the kernel keeps the memory of an entry alive for the run of the program, even if it is evicted (LRU
    // entries are preallocated and may be reused meanwhile: the worst case is one packet of a dying entry translated
    // by the fields of its successor, in a table that overflows, within the microsecond between here and the rewrite).
    FLOWS4.get_ptr_mut(key).map(|flow| unsafe { &mut *flow })
}

/// The translation of a reply, in place.
#[inline(always)]
pub fn find_reverse(key: &ReverseKey4) -> Option<&'static mut Reverse4> {
    // SAFETY: as for `find`.
    REVERSE4.get_ptr_mut(key).map(|reverse| unsafe { &mut *reverse })
}

/// Notes a client's packet; true when the agent's heart has beaten since its last one.
#[inline(always)]
pub fn touch(flow: &mut Flow4, segment: &Segment) -> bool {
    flow.tcp_seen |= seen(segment.flags);
    let beat = agent::beat_ns();
    let first_of_beat = flow.last_seen_ns != beat;
    if first_of_beat {
        flow.last_seen_ns = beat;
    }
    first_of_beat
}

/// Notes a backend's packet.
#[inline(always)]
pub fn touch_reverse(reverse: &mut Reverse4, segment: &Segment) {
    reverse.tcp_seen |= seen(segment.flags);
    let beat = agent::beat_ns();
    if reverse.last_seen_ns != beat {
        reverse.last_seen_ns = beat;
    }
}

#[inline(always)]
fn seen(bits: u8) -> u8 {
    let mut seen = 0;
    if bits & flags::FIN != 0 {
        seen |= tcp_seen::FIN;
    }
    if bits & flags::RST != 0 {
        seen |= tcp_seen::RST;
    }
    if bits & (flags::SYN | flags::ACK) == flags::SYN | flags::ACK {
        seen |= tcp_seen::SYN_ACK;
    }
    seen
}

/// Makes a flow's reverse entry again if it is gone.
#[inline(always)]
pub fn keep_reverse(key: &FlowKey4, flow: &Flow4) {
    // An entry that is there stays as it is: what was seen of the backend's packets is in it. Of one that was lost we know
    // that the backend had answered, or the client would not go on.
    let reverse = Reverse4 { tcp_seen: tcp_seen::SYN_ACK, ..reverse_of(key, flow) };
    let _ = REVERSE4.insert(reverse_key_of(key, flow), reverse, BPF_NOEXIST as u64);
}

/// Forgets what was decided for an earlier connection with the same addresses and ports: a SYN decides anew.
#[inline(always)]
pub fn forget(key: &FlowKey4) {
    if let Some(old) = find(key) {
        if old.kind as u8 != FlowKind::Passed as u8 {
            let reverse_key = reverse_key_of(key, old);
            if find_reverse(&reverse_key).is_some_and(|reverse| belongs_to(reverse, key)) {
                let _ = REVERSE4.remove(reverse_key);
            }
        }
        let _ = FLOWS4.remove(key);
    }
}

/// Pins "left to kube-proxy".
///
/// # Errors
/// [`PassReason::FlowTableFull`].
#[inline(always)]
pub fn pin_passed(key: &FlowKey4, service: u32, epoch: u32, now_ns: u64) -> Result<(), PassReason> {
    let flow = Flow4 {
        backend: key.vip,
        backend_port: key.vip_port,
        source_port: key.client_port,
        service,
        backend_id: NONE,
        epoch,
        kind: FlowKind::Passed,
        tcp_seen: 0,
        pad: 0,
        created_ns: now_ns,
        last_seen_ns: agent::beat_ns(),
    };
    FLOWS4.insert(key, flow, BPF_ANY as u64).map_err(|_| PassReason::FlowTableFull)
}

/// Pins a flow to a backend in both tables, under a reverse key that is its own: where the client's port is taken
/// toward this backend by another flow that lives, it gets another one, as conntrack does.
///
/// `flow` says where to; its source port is what the pinning came to.
///
/// # Errors
/// [`PassReason::NoSourcePort`], [`PassReason::FlowTableFull`]: nothing is left behind.
#[inline(always)]
pub fn pin(key: &FlowKey4, flow: &mut Flow4) -> Result<(), PassReason> {
    if !claim(key, flow) {
        flow.source_port = claim_other_port(key, flow);
        if flow.source_port == [0; 2] {
            return Err(PassReason::NoSourcePort);
        }
    }
    if FLOWS4.insert(key, *flow, BPF_ANY as u64).is_err() {
        let _ = REVERSE4.remove(reverse_key_of(key, flow));
        return Err(PassReason::FlowTableFull);
    }
    Ok(())
}

/// A flow to a backend, as decided now.
#[inline(always)]
pub fn to(
    backend: &Backend4,
    key: &FlowKey4,
    kind: FlowKind,
    service: u32,
    backend_id: u32,
    epoch: u32,
    now_ns: u64,
) -> Flow4 {
    Flow4 {
        backend: backend.addr,
        backend_port: backend.port,
        source_port: key.client_port,
        service,
        backend_id,
        epoch,
        kind,
        tcp_seen: 0,
        pad: 0,
        created_ns: now_ns,
        last_seen_ns: agent::beat_ns(),
    }
}

/// Takes the flow's reverse key, if it is free, its own, or left behind by a flow that is gone.
#[inline(always)]
fn claim(key: &FlowKey4, flow: &Flow4) -> bool {
    let reverse_key = reverse_key_of(key, flow);
    let reverse = reverse_of(key, flow);
    if REVERSE4.insert(reverse_key, reverse, BPF_NOEXIST as u64).is_ok() {
        return true;
    }
    let Some(other) = find_reverse(&reverse_key) else {
        // Gone between the two calls, or the table is full: the second try tells.
        return REVERSE4.insert(reverse_key, reverse, BPF_NOEXIST as u64).is_ok();
    };
    if !belongs_to(other, key) {
        let owner = FlowKey4 {
            client: key.client,
            vip: other.vip,
            client_port: other.client_port,
            vip_port: other.vip_port,
            proto: PROTO_TCP,
            pad: [0; 3],
        };
        let lives = find(&owner).is_some_and(|f| {
            f.kind as u8 != FlowKind::Passed as u8 && reverse_key_of(&owner, f) == reverse_key && !ended(f, other)
        });
        if lives {
            return false;
        }
    }
    REVERSE4.insert(reverse_key, reverse, BPF_ANY as u64).is_ok()
}

/// Whether a connection is over: reset, or closed from both sides.
#[inline(always)]
fn ended(flow: &Flow4, reverse: &Reverse4) -> bool {
    let direct = flow.kind as u8 == FlowKind::Direct as u8;
    (flow.tcp_seen | reverse.tcp_seen) & tcp_seen::RST != 0
        || flow.tcp_seen & tcp_seen::FIN != 0 && (direct || reverse.tcp_seen & tcp_seen::FIN != 0)
}

/// Looks for a free source port, a few steps around the range from a place that depends on the flow; 0 = none.
#[inline(always)]
fn claim_other_port(key: &FlowKey4, flow: &Flow4) -> [u8; 2] {
    let own = u16::from_be_bytes(key.client_port);
    let reverse = reverse_of(key, flow);
    for step in 1..=PORT_TRIES {
        // 7919 is prime and coprime to the size of the range: the steps do not meet.
        let place = (own.wrapping_sub(PORT_FIRST) as u32 + step as u32 * 7919) % (65536 - PORT_FIRST as u32);
        let port = (PORT_FIRST + place as u16).to_be_bytes();
        let mut reverse_key = reverse_key_of(key, flow);
        reverse_key.client_port = port;
        if REVERSE4.insert(reverse_key, reverse, BPF_NOEXIST as u64).is_ok() {
            return port;
        }
    }
    [0; 2]
}
