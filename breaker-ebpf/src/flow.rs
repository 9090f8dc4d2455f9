//! The pinned decisions for flows: a forward entry by the client's tuple, a reverse entry by the backend's.
//!
//! # Pending and established flows
//!
//! A flow that no backend has answered is *pending*. Its tables are LRU, so that a flood of connection requests
//! evicts only other requests. The client's first packet after an answer *promotes* the flow: both entries move to
//! tables that evict nothing. When these are full they take no new entry, and the flow stays pending, which works
//! as long as there is no flood.
//!
//! The forward entry is authoritative. The reverse entry is derived from it.
//!
//! # Races
//!
//! Two CPUs handle two packets of one flow at once only if the client sends its first packet again while the first
//! copy is still being processed. The later write wins in both tables, and the agent removes the reverse entry of
//! the other one. Promotion writes the new entries before it removes the old ones, so a packet in between finds one
//! of them.

use aya_ebpf::{bindings::BPF_ANY, btf_maps::PerCpuArray, macros::btf_map};
use breaker_common::{Flow, FlowKey, FlowKind, PROTO_TCP, PassReason, Reverse, ReverseKey, egress, flow_path, seen};

use crate::{
    agent, count,
    family::{Family, V6},
    parse::{Ports, Segment, flags},
    return_path, select,
};

/// Destination of a client's packets, and how they get there. Addresses and ports are in wire order.
pub struct Peer<A> {
    pub addr: A,
    pub port: [u8; 2],
    /// The client's port as the peer sees it.
    pub source_port: [u8; 2],
    /// Bits of [`flow_path`].
    pub path: u8,
    /// On the fast path, the interface of the peer (see [`egress`]); otherwise [`egress::STACK`].
    pub egress: u32,
}

impl<A: Family> Peer<A> {
    /// The backend of a flow.
    #[inline(always)]
    pub fn of(flow: &Flow<A>) -> Self {
        let fast = flow.path & flow_path::FAST != 0;
        let egress = if fast { select::interface_of(flow.backend_id, flow.backend) } else { egress::STACK };
        Self { addr: flow.backend, port: flow.backend_port, source_port: flow.source_port, path: flow.path, egress }
    }

    /// The destination of a segment, unchanged, through the stack.
    #[inline(always)]
    pub fn addressed_by(segment: &Segment<A>) -> Self {
        Self {
            addr: segment.destination,
            port: segment.ports.destination,
            source_port: segment.ports.source,
            path: 0,
            egress: egress::STACK,
        }
    }
}

/// The bytes of a [`FlowKey`] or [`ReverseKey`], with the protocol and its padding as one word. A look-up reads the
/// key in words, and the CPU stalls when one load spans several smaller stores.
#[repr(C)]
struct KeyWords<A> {
    addresses: [A; 2],
    ports: Ports,
    proto: u32,
}

impl<A: Family> KeyWords<A> {
    #[inline(always)]
    fn of(segment: &Segment<A>) -> Self {
        let proto = u32::from_ne_bytes([segment.proto, 0, 0, 0]);
        Self { addresses: [segment.source, segment.destination], ports: segment.ports, proto }
    }
}

/// The flow key of a segment from a client.
#[inline(always)]
pub fn key<A: Family>(segment: &Segment<A>) -> FlowKey<A> {
    let words = KeyWords::of(segment);
    const { assert!(size_of::<KeyWords<A>>() == size_of::<FlowKey<A>>()) };
    // SAFETY: same size and alignment, fields in the same order; any bytes are a valid value.
    unsafe { (&raw const words).cast::<FlowKey<A>>().read() }
}

/// Room for a key, which would take 40 bytes of a stack frame.
#[btf_map]
static MAPPED_KEY: PerCpuArray<FlowKey<V6>, 1> = PerCpuArray::new();

/// The same key with IPv4 addresses in their IPv4-mapped IPv6 form. It is valid until the next call on this CPU.
#[inline(always)]
pub fn mapped_key<A: Family>(key: &FlowKey<A>) -> Option<&'static FlowKey<V6>> {
    let mapped = MAPPED_KEY.get_ptr_mut(0)?;
    let value = FlowKey {
        client: key.client.mapped(),
        vip: key.vip.mapped(),
        client_port: key.client_port,
        vip_port: key.vip_port,
        proto: key.proto,
        pad: [0; 3],
    };
    // SAFETY: the kernel returned a pointer to this CPU's value; see `count::service` on preemption.
    unsafe {
        mapped.write(value);
        Some(&*mapped)
    }
}

/// The flow key of the client that a segment from a frontend goes to.
#[inline(always)]
pub fn key_of_answer<A: Family>(segment: &Segment<A>) -> FlowKey<A> {
    FlowKey {
        client: segment.destination,
        vip: segment.source,
        client_port: segment.ports.destination,
        vip_port: segment.ports.source,
        proto: segment.proto,
        pad: [0; 3],
    }
}

/// The reverse key of a segment from a backend.
#[inline(always)]
pub fn reverse_key<A: Family>(segment: &Segment<A>) -> ReverseKey<A> {
    let words = KeyWords::of(segment);
    const { assert!(size_of::<KeyWords<A>>() == size_of::<ReverseKey<A>>()) };
    // SAFETY: as in `key`.
    unsafe { (&raw const words).cast::<ReverseKey<A>>().read() }
}

#[inline(always)]
pub fn is_passed<A: Family>(flow: &Flow<A>) -> bool {
    flow.kind as u8 == FlowKind::Passed as u8
}

/// Finds the entry of a flow, established or pending. The reference is to the value in the map.
#[inline(always)]
pub fn find<A: Family>(key: &FlowKey<A>) -> Option<&'static mut Flow<A>> {
    let found = A::flows().get_ptr_mut(key).or_else(|| A::pending().get_ptr_mut(key));
    // SAFETY: the kernel keeps the memory of an entry valid for the run of the program, even if the entry is
    // removed or evicted meanwhile, but may reuse it for another entry. Worst case: one packet of the removed flow
    // is translated by the fields of the flow that took the memory, if both happen within the microsecond between
    // here and the rewrite.
    found.map(|flow| unsafe { &mut *flow })
}

/// Finds the entry of a flow for a packet that is not its first. Promotes a pending flow that a backend has answered.
/// The reference is to the value in the map.
#[inline(always)]
pub fn find_or_promote<A: Family>(key: &FlowKey<A>) -> Option<&'static mut Flow<A>> {
    if let Some(flow) = A::flows().get_ptr_mut(key) {
        // SAFETY: as in `find`.
        return Some(unsafe { &mut *flow });
    }
    promote(key);
    find(key)
}

/// Promotes a pending flow that a backend has answered: moves it to the tables that evict nothing. BPF subprogram
/// (not inlined), for a stack frame of its own: see [`crate::hook::from_client`].
#[inline(never)]
fn promote<A: Family>(key: &FlowKey<A>) {
    let Some(flow) = A::pending().get_ptr(key) else { return };
    // SAFETY: as in `find`.
    let flow = unsafe { &*flow };
    // A passed flow has no reverse entry that shows whether it was answered, so it must not take a slot for good.
    // Without a translation, it can be evicted without harm.
    if is_passed(flow) {
        return;
    }
    let reverse_key = key.reverse_key(flow);
    // A direct connection with its own port has no translation, so it can be evicted without harm.
    if flow.kind as u8 == FlowKind::Direct as u8 && flow.source_port == key.client_port {
        return;
    }
    let Some(reverse) = A::pending_reverse().get_ptr(&reverse_key) else {
        // The reverse entry was evicted, so replies would not be translated. A datagram can be decided anew.
        if key.proto != PROTO_TCP {
            let _ = A::pending().remove(key);
        }
        return;
    };
    // SAFETY: as in `find`.
    let reverse = unsafe { &*reverse };
    // If this flow has ended, another flow may have taken the reverse key, and the answer was for that one.
    if reverse.seen & seen::ANSWERED == 0 || !reverse.belongs_to(key) {
        return;
    }
    if A::reverse().insert(&reverse_key, reverse, BPF_ANY as u64).is_err() {
        return count::reason(PassReason::FlowTableFull);
    }
    if A::flows().insert(key, flow, BPF_ANY as u64).is_err() {
        let _ = A::reverse().remove(&reverse_key);
        return count::reason(PassReason::FlowTableFull);
    }
    let _ = A::pending().remove(key);
    let _ = A::pending_reverse().remove(&reverse_key);
}

/// Finds the translation of a backend's reply, established or pending. The reference is to the value in the map.
#[inline(always)]
pub fn find_reverse<A: Family>(key: &ReverseKey<A>) -> Option<&'static mut Reverse<A>> {
    let found = A::reverse().get_ptr_mut(key).or_else(|| A::pending_reverse().get_ptr_mut(key));
    // SAFETY: as in `find`.
    found.map(|reverse| unsafe { &mut *reverse })
}

/// Records a packet from the client. A packet after an RST clears the RST again: it had a wrong sequence number, or
/// someone else sent it.
#[inline(always)]
pub fn touch<A: Family>(flow: &mut Flow<A>, segment: &Segment<A>) {
    let seen = flow.seen & !seen::RST | ended_by(segment);
    // Writing only on a change keeps the cache line clean for most packets.
    if flow.seen != seen {
        flow.seen = seen;
    }
    let beat = agent::heartbeat_tick();
    if flow.last_seen_tick != beat {
        flow.last_seen_tick = beat;
    }
}

/// Records a packet from the backend. Every packet without RST is an answer: to a SYN on a live connection the
/// backend sends a mere ACK (RFC 9293, section 3.10.7.4).
#[inline(always)]
pub fn touch_reverse<A: Family>(reverse: &mut Reverse<A>, segment: &Segment<A>) {
    let answers = segment.flags & flags::RST == 0;
    let seen = reverse.seen | ended_by(segment) | if answers { seen::ANSWERED } else { 0 };
    if reverse.seen != seen {
        if seen & !reverse.seen & seen::ANSWERED != 0 {
            return_path::count_answer(reverse.ingress, reverse.service);
        }
        reverse.seen = seen;
    }
    let beat = agent::heartbeat_tick();
    if reverse.last_seen_tick != beat {
        reverse.last_seen_tick = beat;
    }
}

/// Bits of [`seen`] for the FIN and RST of a segment.
#[inline(always)]
fn ended_by<A: Family>(segment: &Segment<A>) -> u8 {
    let mut bits = 0;
    if segment.flags & flags::FIN != 0 {
        bits |= seen::FIN;
    }
    if segment.flags & flags::RST != 0 {
        bits |= seen::RST;
    }
    bits
}

/// What [`remove`] found out about the decision that it removed: bits.
pub mod removed {
    /// It was for the same SYN, which the client has repeated.
    pub const SAME_SYN: u32 = 1;
    /// It was made in the given epoch.
    pub const SAME_EPOCH: u32 = 2;
    /// It redirected the flow, and no answer of the backend was seen.
    pub const UNANSWERED: u32 = 4;
}

/// Removes the decision for an earlier connection with the same tuple, because a first packet is decided anew. Returns
/// bits of [`removed`]. `sequence`: that of the SYN, wire order. BPF subprogram (not inlined), for a stack frame of its
/// own.
#[inline(never)]
pub fn remove<A: Family>(key: &FlowKey<A>, sequence: [u8; 4], epoch: u32) -> u32 {
    let Some(old) = find(key) else { return 0 };
    let mut bits = 0;
    if key.proto == PROTO_TCP && old.sequence == sequence {
        bits |= removed::SAME_SYN;
    }
    if old.epoch == epoch {
        bits |= removed::SAME_EPOCH;
    }
    if !is_passed(old) {
        let reverse_key = key.reverse_key(old);
        if let Some(reverse) = find_reverse(&reverse_key).filter(|reverse| reverse.belongs_to(key)) {
            if old.kind as u8 == FlowKind::Redirected as u8 && reverse.seen & seen::ANSWERED == 0 {
                bits |= removed::UNANSWERED;
            }
            let _ = A::reverse().remove(&reverse_key);
            let _ = A::pending_reverse().remove(&reverse_key);
        }
    }
    let _ = A::flows().remove(key);
    let _ = A::pending().remove(key);
    bits
}

/// Whether a SYN-ACK from a frontend to a client contradicts the client's flow: the flow was redirected, and its backend
/// has not answered. BPF subprogram, as [`remove`].
#[inline(never)]
pub fn awaits_other_answer<A: Family>(segment: &Segment<A>) -> bool {
    let key = key_of_answer(segment);
    let Some(flow) = find(&key) else { return false };
    flow.kind as u8 == FlowKind::Redirected as u8
        && find_reverse(&key.reverse_key(flow)).is_some_and(|reverse| reverse.seen & seen::ANSWERED == 0)
}
