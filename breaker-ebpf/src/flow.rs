//! The pinned decisions: a forward entry by the client's view, a reverse entry by the backend's.
//!
//! Two classes. A flow that no backend has answered yet is *pending*: its tables are LRU, so that a flood of connection
//! requests pushes out other requests and nothing else. With the client's first packet after an answer it is *kept*: moved
//! to tables that push nothing out, and that let nothing new in when they are full (then it stays pending, which works as
//! long as there is no flood).
//!
//! The forward entry is the truth; the reverse one is derived from it.
//!
//! Races: two CPUs may handle two packets of one flow at once only if the client sends its first packet again while the
//! first is still under way; the later write wins in both tables, and a reverse entry of the loser's is removed by
//! userspace. Keeping a flow writes the new entries before it removes the old ones: a packet meanwhile finds one of them.

use aya_ebpf::bindings::{BPF_ANY, BPF_NOEXIST};
use breaker_common::{
    Backend, Flow, FlowKey, FlowKind, NONE, PROTO_TCP, PassReason, Reverse, ReverseKey, exit, flow_way, seen,
};

use crate::{
    agent, count,
    family::Family,
    parse::{Ports, Segment, flags},
    select,
};

/// How many source ports are tried for a flow whose own is taken.
const PORT_TRIES: u16 = 16;
/// First port to try: below are the privileged ones (RFC 6335, section 6).
const PORT_FIRST: u16 = 1024;
/// Where the ports begin that clients connect from by themselves (net.ipv4.ip_local_port_range).
const EPHEMERAL_FIRST: u16 = 32768;

/// Where a client's packets go.
pub struct Peer<A> {
    pub addr: A,
    pub port: [u8; 2],
    /// The client's port as the peer knows it.
    pub source_port: [u8; 2],
    /// Bits of [`flow_way`].
    pub way: u8,
    /// Its interface, where packets go there at once: see [`exit`].
    pub exit: u32,
}

impl<A: Family> Peer<A> {
    /// The peer of a flow.
    #[inline(always)]
    pub fn of(flow: &Flow<A>) -> Self {
        let fast = flow.way & flow_way::FAST != 0;
        let exit = if fast { select::interface_of(flow.backend_id, flow.backend) } else { exit::STACK };
        Self { addr: flow.backend, port: flow.backend_port, source_port: flow.source_port, way: flow.way, exit }
    }

    /// What a segment is addressed to, as it is.
    #[inline(always)]
    pub fn addressed_by(segment: &Segment<A>) -> Self {
        Self {
            addr: segment.destination,
            port: segment.ports.destination,
            source_port: segment.ports.source,
            way: 0,
            exit: exit::STACK,
        }
    }
}

/// The bytes of a [`FlowKey`] or [`ReverseKey`], with the protocol and what fills it up as one word: a look-up reads words, and
/// has to wait for bytes that were stored one by one.
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

/// The key of a segment that a client sends.
#[inline(always)]
pub fn key<A: Family>(segment: &Segment<A>) -> FlowKey<A> {
    let words = KeyWords::of(segment);
    const { assert!(size_of::<KeyWords<A>>() == size_of::<FlowKey<A>>()) };
    // SAFETY: the same size and alignment, the fields in the same order; any bytes are a value.
    unsafe { (&raw const words).cast::<FlowKey<A>>().read() }
}

/// The key of a segment that a backend sends.
#[inline(always)]
pub fn reverse_key<A: Family>(segment: &Segment<A>) -> ReverseKey<A> {
    let words = KeyWords::of(segment);
    const { assert!(size_of::<KeyWords<A>>() == size_of::<ReverseKey<A>>()) };
    // SAFETY: as for `key`.
    unsafe { (&raw const words).cast::<ReverseKey<A>>().read() }
}

/// The reverse key that belongs to a flow.
#[inline(always)]
fn reverse_key_of<A: Family>(key: &FlowKey<A>, flow: &Flow<A>) -> ReverseKey<A> {
    ReverseKey {
        backend: flow.backend,
        client: key.client,
        backend_port: flow.backend_port,
        client_port: flow.source_port,
        proto: key.proto,
        pad: [0; 3],
    }
}

#[inline(always)]
fn reverse_of<A: Family>(key: &FlowKey<A>, flow: &Flow<A>, exit: u32) -> Reverse<A> {
    Reverse {
        vip: key.vip,
        vip_port: key.vip_port,
        client_port: key.client_port,
        service: flow.service,
        seen: 0,
        pad: [0; 3],
        last_seen_tick: flow.last_seen_tick,
        exit,
    }
}

/// Whether a reverse entry is this flow's.
#[inline(always)]
fn belongs_to<A: Family>(reverse: &Reverse<A>, key: &FlowKey<A>) -> bool {
    reverse.vip == key.vip && reverse.vip_port == key.vip_port && reverse.client_port == key.client_port
}

#[inline(always)]
fn is_passed<A: Family>(flow: &Flow<A>) -> bool {
    flow.kind as u8 == FlowKind::Passed as u8
}

/// The decision for a flow, in place.
#[inline(always)]
pub fn find<A: Family>(key: &FlowKey<A>) -> Option<&'static mut Flow<A>> {
    let found = A::flows().get_ptr_mut(key).or_else(|| A::pending().get_ptr_mut(key));
    // SAFETY: the kernel keeps the memory of an entry alive for the run of the program, even if it is removed or evicted
    // (freed after a grace period, or preallocated and reused meanwhile: the worst case is one packet of a dying entry
    // translated by the fields of its successor, in a table that overflows, within the microsecond between here and the
    // rewrite).
    found.map(|flow| unsafe { &mut *flow })
}

/// The decision for a flow that goes on, in place. A pending one that was answered is kept from now on.
#[inline(always)]
pub fn find_going_on<A: Family>(key: &FlowKey<A>) -> Option<&'static mut Flow<A>> {
    if let Some(flow) = A::flows().get_ptr_mut(key) {
        // SAFETY: as for `find`.
        return Some(unsafe { &mut *flow });
    }
    keep(key);
    find(key)
}

/// Moves a pending flow that was answered to the tables that push nothing out. A function to the kernel too: see
/// [`crate::hook::tc`] on the stack.
#[inline(never)]
fn keep<A: Family>(key: &FlowKey<A>) {
    let Some(flow) = A::pending().get_ptr(key) else { return };
    // SAFETY: as for `find`.
    let flow = unsafe { &*flow };
    // Nobody's reverse entry tells whether it was answered, so it must not take a place for good; and it has no translation
    // to lose.
    if is_passed(flow) {
        return;
    }
    let reverse_key = reverse_key_of(key, flow);
    // A direct connection whose port was left alone has no translation to lose.
    if flow.kind as u8 == FlowKind::Direct as u8 && flow.source_port == key.client_port {
        return;
    }
    let Some(reverse) = A::pending_reverse().get_ptr(&reverse_key) else {
        // Pushed out: answers would come back untranslated. A datagram can be decided anew.
        if key.proto != PROTO_TCP {
            let _ = A::pending().remove(key);
        }
        return;
    };
    // SAFETY: as for `find`.
    let reverse = unsafe { &*reverse };
    // Of a flow that has ended, another one may have the reverse key by now, and the answer.
    if reverse.seen & seen::ANSWERED == 0 || !belongs_to(reverse, key) {
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

/// The translation of a reply, in place.
#[inline(always)]
pub fn find_reverse<A: Family>(key: &ReverseKey<A>) -> Option<&'static mut Reverse<A>> {
    let found = A::reverse().get_ptr_mut(key).or_else(|| A::pending_reverse().get_ptr_mut(key));
    // SAFETY: as for `find`.
    found.map(|reverse| unsafe { &mut *reverse })
}

/// Notes a client's packet. One that comes after a reset says that the reset was none: its number was wrong, or somebody
/// else sent it.
#[inline(always)]
pub fn touch<A: Family>(flow: &mut Flow<A>, segment: &Segment<A>) {
    let seen = flow.seen & !seen::RST | ended_by(segment);
    // Reading first leaves the cache line clean, packet after packet.
    if flow.seen != seen {
        flow.seen = seen;
    }
    let beat = agent::beat_tick();
    if flow.last_seen_tick != beat {
        flow.last_seen_tick = beat;
    }
}

/// Notes a backend's packet. All but a refusal are an answer: to a SYN on a connection that lives, it is a mere ACK (RFC 9293,
/// section 3.10.7.4).
#[inline(always)]
pub fn touch_reverse<A: Family>(reverse: &mut Reverse<A>, segment: &Segment<A>) {
    let answers = segment.flags & flags::RST == 0;
    let seen = reverse.seen | ended_by(segment) | if answers { seen::ANSWERED } else { 0 };
    if reverse.seen != seen {
        reverse.seen = seen;
    }
    let beat = agent::beat_tick();
    if reverse.last_seen_tick != beat {
        reverse.last_seen_tick = beat;
    }
}

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

/// Forgets what was decided for an earlier connection with the same addresses and ports: a first packet decides anew. A
/// function to the kernel too.
#[inline(never)]
pub fn forget<A: Family>(key: &FlowKey<A>) {
    let Some(old) = find(key) else { return };
    if !is_passed(old) {
        let reverse_key = reverse_key_of(key, old);
        if find_reverse(&reverse_key).is_some_and(|reverse| belongs_to(reverse, key)) {
            let _ = A::reverse().remove(&reverse_key);
            let _ = A::pending_reverse().remove(&reverse_key);
        }
    }
    let _ = A::flows().remove(key);
    let _ = A::pending().remove(key);
}

/// Pins "left to kube-proxy".
///
/// # Errors
/// [`PassReason::FlowTableFull`].
#[inline(always)]
pub fn pin_passed<A: Family>(key: &FlowKey<A>, service: u32, epoch: u32, now_ns: u64) -> Result<(), PassReason> {
    match pin_passed_in_table(key, service, epoch, now_ns) {
        PINNED => Ok(()),
        _ => Err(PassReason::FlowTableFull),
    }
}

/// A function to the kernel too.
#[inline(never)]
fn pin_passed_in_table<A: Family>(key: &FlowKey<A>, service: u32, epoch: u32, now_ns: u64) -> u32 {
    let flow = Flow {
        backend: key.vip,
        backend_port: key.vip_port,
        source_port: key.client_port,
        service,
        backend_id: NONE,
        epoch,
        kind: FlowKind::Passed,
        seen: 0,
        way: 0,
        pad: 0,
        created_tick: agent::tick(now_ns),
        last_seen_tick: agent::beat_tick(),
    };
    if A::pending().insert(key, flow, BPF_ANY as u64).is_ok() { PINNED } else { TABLE_FULL }
}

/// Pins a flow to a backend in both tables, under a reverse key that is its own: where the client's port is taken
/// toward this backend by another flow that lives, it gets another one, as conntrack does.
///
/// conntrack does so for those that it sees. One that leaves the stack out it does not see, and the client may have the same port
/// toward the same backend by a Service that is nobody's business here: so such a flow never has a port that the client's
/// kernel would choose.
///
/// `flow` says where to; its source port is what the pinning came to. `back_by`: where replies go,
/// see [`exit`].
///
/// # Errors
/// [`PassReason::NoSourcePort`], [`PassReason::FlowTableFull`]: nothing is left behind.
#[inline(always)]
pub fn pin<A: Family>(key: &FlowKey<A>, flow: &mut Flow<A>, back_by: u32) -> Result<(), PassReason> {
    match pin_in_tables(key, flow, back_by) {
        PINNED => Ok(()),
        NO_SOURCE_PORT => Err(PassReason::NoSourcePort),
        _ => Err(PassReason::FlowTableFull),
    }
}

const PINNED: u32 = 0;
const NO_SOURCE_PORT: u32 = 1;
const TABLE_FULL: u32 = 2;

/// A function to the kernel too, which returns a number.
#[inline(never)]
fn pin_in_tables<A: Family>(key: &FlowKey<A>, flow: &mut Flow<A>, back_by: u32) -> u32 {
    let mut reverse_key = reverse_key_of(key, flow);
    let reverse = reverse_of(key, flow, back_by);
    let fast = back_by != exit::STACK;
    if fast || !claim(key, &reverse_key, &reverse) {
        let (first, last) = if fast { (PORT_FIRST, EPHEMERAL_FIRST - 1) } else { (PORT_FIRST, u16::MAX) };
        flow.source_port = claim_other_port(key, &mut reverse_key, &reverse, first, last);
        if flow.source_port == [0; 2] {
            return NO_SOURCE_PORT;
        }
    }
    if A::pending().insert(key, &*flow, BPF_ANY as u64).is_err() {
        let _ = A::pending_reverse().remove(&reverse_key);
        return TABLE_FULL;
    }
    PINNED
}

/// A flow to a backend, as decided now.
#[inline(always)]
pub fn to<A: Family>(
    backend: &Backend<A>,
    key: &FlowKey<A>,
    kind: FlowKind,
    service: u32,
    backend_id: u32,
    epoch: u32,
    now_ns: u64,
) -> Flow<A> {
    Flow {
        backend: backend.addr,
        backend_port: backend.port,
        source_port: key.client_port,
        service,
        backend_id,
        epoch,
        kind,
        seen: 0,
        way: 0,
        pad: 0,
        created_tick: agent::tick(now_ns),
        last_seen_tick: agent::beat_tick(),
    }
}

/// Takes the flow's reverse key, if it is free, its own, or left behind by a flow that is gone.
#[inline(always)]
fn claim<A: Family>(key: &FlowKey<A>, reverse_key: &ReverseKey<A>, reverse: &Reverse<A>) -> bool {
    let kept = A::reverse().get_ptr(reverse_key).is_some();
    if !kept && A::pending_reverse().insert(reverse_key, reverse, BPF_NOEXIST as u64).is_ok() {
        return true;
    }
    let Some(other) = find_reverse(reverse_key) else {
        // Gone between the two calls, or the table is full: the second try tells.
        return A::pending_reverse().insert(reverse_key, reverse, BPF_NOEXIST as u64).is_ok();
    };
    if !belongs_to(other, key) && lives(reverse_key, other) {
        return false;
    }
    if kept {
        let _ = A::reverse().remove(reverse_key);
    }
    A::pending_reverse().insert(reverse_key, reverse, BPF_ANY as u64).is_ok()
}

/// Whether the flow that a reverse entry was made for is still there, and not over.
#[inline(always)]
fn lives<A: Family>(reverse_key: &ReverseKey<A>, reverse: &Reverse<A>) -> bool {
    let owner = FlowKey {
        client: reverse_key.client,
        vip: reverse.vip,
        client_port: reverse.client_port,
        vip_port: reverse.vip_port,
        proto: reverse_key.proto,
        pad: [0; 3],
    };
    find(&owner).is_some_and(|flow| {
        !is_passed(flow)
            && flow.backend == reverse_key.backend
            && flow.backend_port == reverse_key.backend_port
            && flow.source_port == reverse_key.client_port
            && !ended(flow, reverse)
    })
}

/// Whether a connection is over: reset, or closed from both sides.
#[inline(always)]
fn ended<A: Family>(flow: &Flow<A>, reverse: &Reverse<A>) -> bool {
    let direct = flow.kind as u8 == FlowKind::Direct as u8;
    (flow.seen | reverse.seen) & seen::RST != 0
        || flow.seen & seen::FIN != 0 && (direct || reverse.seen & seen::FIN != 0)
}

/// Looks for a free source port from `first` to `last`, a few steps around the range from a place that depends on the flow;
/// 0 = none. The reverse key is the one that was taken.
#[inline(always)]
fn claim_other_port<A: Family>(
    key: &FlowKey<A>,
    reverse_key: &mut ReverseKey<A>,
    reverse: &Reverse<A>,
    first: u16,
    last: u16,
) -> [u8; 2] {
    let own = u16::from_be_bytes(key.client_port);
    for step in 1..=PORT_TRIES {
        // 7919 is prime and no divisor of the sizes of the ranges: the steps do not meet.
        let place = (own.wrapping_sub(first) as u32 + step as u32 * 7919) % (last as u32 + 1 - first as u32);
        reverse_key.client_port = (first + place as u16).to_be_bytes();
        if A::reverse().get_ptr(&*reverse_key).is_none()
            && A::pending_reverse().insert(&*reverse_key, reverse, BPF_NOEXIST as u64).is_ok()
        {
            return reverse_key.client_port;
        }
    }
    [0; 2]
}
