//! Later fragments of a translated packet: they have no ports, so they are translated as their first fragment was.
//!
//! A first fragment that is translated leaves an entry. A later fragment that arrives before the first, or whose
//! entry was evicted from the bounded table, passes unchanged and is counted. The receiver then cannot reassemble
//! the packet, and the sender has to retransmit it.

use aya_ebpf::bindings::BPF_ANY;
use breaker_common::{Fragment, FragmentKey, PassReason, Reverse, egress};

use crate::{
    family::Family,
    nat::{self, Side},
    packet::Packet,
    parse::Segment,
};

#[inline(always)]
fn key<A: Family>(segment: &Segment<A>) -> FragmentKey<A> {
    FragmentKey {
        source: segment.source,
        destination: segment.destination,
        id: segment.fragment_id,
        proto: segment.fragment_proto,
        pad: [0; 3],
    }
}

/// Records the translation of a client's packet if later fragments follow. `addr`: the new destination. `mark`: bits set
/// in the packet's mark. `egress`: where the packet went, see [`egress`].
#[inline(always)]
pub fn note_to_backend<A: Family>(segment: &Segment<A>, addr: &A, mark: u32, egress: u32) {
    if segment.more_fragments != 0 {
        store_to_backend(segment, addr, mark, egress);
    }
}

/// Records the translation of a backend's packet if later fragments follow. `egress`: as in [`note_to_backend`].
#[inline(always)]
pub fn note_to_client<A: Family>(segment: &Segment<A>, reverse: &Reverse<A>, egress: u32) {
    if segment.more_fragments != 0 {
        store_to_client(segment, reverse, egress);
    }
}

/// BPF subprogram (not inlined), for a stack frame of its own: see [`crate::hook::from_client`].
#[inline(never)]
fn store_to_backend<A: Family>(segment: &Segment<A>, addr: &A, mark: u32, egress: u32) {
    store(segment, Side::Destination, *addr, mark, egress, A::ZERO);
}

/// BPF subprogram, as [`store_to_backend`].
#[inline(never)]
fn store_to_client<A: Family>(segment: &Segment<A>, reverse: &Reverse<A>, egress: u32) {
    store(segment, Side::Source, reverse.vip, 0, egress, reverse.next_hop);
}

/// If the entry cannot be stored, the later fragments pass unchanged.
#[inline(always)]
fn store<A: Family>(segment: &Segment<A>, end: Side, addr: A, mark: u32, egress: u32, next_hop: A) {
    let value = Fragment { addr, mark, egress, next_hop, end: end as u8, pad: [0; 3] };
    let _ = A::fragments().insert(key(segment), value, BPF_ANY as u64);
}

/// Removes the entry for an earlier packet with the same identification that was translated at `end`.
/// Identifications are reused, and later fragments must not be translated if their first fragment is not.
#[inline(always)]
pub fn remove_stale<A: Family>(segment: &Segment<A>, end: Side) {
    if segment.more_fragments != 0 {
        forget_noted(segment, end as u8);
    }
}

/// BPF subprogram (not inlined), for a stack frame of its own: see [`crate::hook::from_client`].
#[inline(never)]
fn forget_noted<A: Family>(segment: &Segment<A>, end: u8) {
    let key = key(segment);
    // SAFETY: the value is read at once and not kept.
    if unsafe { A::fragments().get(&key) }.is_some_and(|first| is_of(first, end)) {
        let _ = A::fragments().remove(&key);
    }
}

/// Whether the hook that translates at `end` made this entry. On the fast path, the hook for clients' packets
/// translates backends' packets, too, so such an entry matches either end.
#[inline(always)]
fn is_of<A: Family>(first: &Fragment<A>, end: u8) -> bool {
    first.end == end || first.egress != egress::STACK
}

/// Translates a later fragment as its first fragment was translated, if that happened on the same hook. A backend's
/// fragment also passes the hook for clients' packets, on the backend's own veth; there it must not be translated
/// before its first fragment is. Returns the entry, which says where the fragment goes.
///
/// # Errors
/// [`PassReason::Fragment`] if there is no entry, [`PassReason::RewriteFailed`].
#[inline(always)]
pub fn follow<A: Family>(
    packet: &Packet<'_>,
    segment: &Segment<A>,
    end: Side,
) -> Result<&'static Fragment<A>, PassReason> {
    // SAFETY: as in `flow::find`.
    let found = unsafe { A::fragments().get(key(segment)) };
    let Some(first) = found.filter(|first| is_of(first, end as u8)) else { return Err(PassReason::Fragment) };
    let end = if first.end == Side::Source as u8 { Side::Source } else { Side::Destination };
    let old = match end {
        Side::Source => segment.source,
        Side::Destination => segment.destination,
    };
    nat::replace_address(packet, segment.l3(), end, old, first.addr).ok_or(PassReason::RewriteFailed)?;
    if A::CHECK_OFFSET.is_none() {
        packet.update_complete_csum(old.csum_diff(first.addr));
    }
    if first.mark != 0 {
        packet.add_mark(first.mark);
    }
    Ok(first)
}
