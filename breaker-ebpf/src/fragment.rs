//! Later fragments have no ports: what was done to the first one is done to them.
//!
//! Noted is a first fragment that was translated. A later one that comes before its first, or whose note was pushed out of
//! the bounded table, goes on as it came, counted; the receiver then misses a part, and the sender sends again.

use aya_ebpf::bindings::BPF_ANY;
use breaker_common::{Fragment, FragmentKey, PassReason, exit};

use crate::{
    family::Family,
    nat::{self, End},
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

/// Notes what was done to a packet, if more of it follows; `exit`: where it went.
#[inline(always)]
pub fn note<A: Family>(segment: &Segment<A>, end: End, addr: A, mark: u32, exit: u32) {
    if segment.more != 0 {
        let value = Fragment { addr, mark, exit, end: end as u8, pad: [0; 3] };
        // A note that finds no room: the later fragments fail open.
        let _ = A::fragments().insert(key(segment), value, BPF_ANY as u64);
    }
}

/// Forgets what was done at `end` to an earlier packet of the same identification: they get used again, and a first fragment
/// that is not translated now must not have later ones that are.
#[inline(always)]
pub fn forget<A: Family>(segment: &Segment<A>, end: End) {
    if segment.more != 0 {
        forget_noted(segment, end as u8);
    }
}

/// A function to the kernel too: see [`crate::hook::tc`] on the stack.
#[inline(never)]
fn forget_noted<A: Family>(segment: &Segment<A>, end: u8) {
    let key = key(segment);
    // SAFETY: the value is read at once.
    if unsafe { A::fragments().get(&key) }.is_some_and(|first| is_of(first, end)) {
        let _ = A::fragments().remove(&key);
    }
}

/// Whether a note was made on the hook that translates at `end`. Backends' packets are translated where clients' are only if
/// they leave the stack out.
#[inline(always)]
fn is_of<A: Family>(first: &Fragment<A>, end: u8) -> bool {
    first.end == end || first.exit != exit::STACK
}

/// Does to a later fragment what was done to the first, if that was on the same hook: a backend's fragment passes the one
/// for clients on the backend's own interface, and must not be translated there, before its first one is. Returns where it
/// goes (see [`exit`]).
///
/// # Errors
/// [`PassReason::Fragment`] where nothing is noted, [`PassReason::RewriteFailed`].
#[inline(always)]
pub fn follow<A: Family>(packet: &Packet<'_>, segment: &Segment<A>, end: End) -> Result<u32, PassReason> {
    // SAFETY: the value is copied out at once.
    let found = unsafe { A::fragments().get(key(segment)) }.copied();
    let Some(first) = found.filter(|first| is_of(first, end as u8)) else { return Err(PassReason::Fragment) };
    let end = if first.end == End::Source as u8 { End::Source } else { End::Destination };
    let old = match end {
        End::Source => segment.source,
        End::Destination => segment.destination,
    };
    nat::replace_address(packet, segment.l3(), end, old, first.addr).ok_or(PassReason::RewriteFailed)?;
    if A::CHECK_AT.is_none() {
        packet.sum_changed(old.difference(first.addr));
    }
    if first.mark != 0 {
        packet.add_mark(first.mark);
    }
    Ok(first.exit)
}
