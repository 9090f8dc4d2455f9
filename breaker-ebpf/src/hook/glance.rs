//! The first look at a packet, on every hook of tc: by its two ends alone. Most packets' way ends here; the others go on in
//! [`super::tc`], which is a program of its own, behind a tail call.
//!
//! Because that one writes into packets, and this one does not: before a program that does, the kernel puts a call that makes the
//! packet writable (`bpf_unclone_prologue` in net/core/filter.c), and nearly everything that TCP sends is a clone. On a closed
//! service's packets it cost more than all that we do with them.

use aya_ebpf::{btf_maps::ProgramArray, macros::btf_map, programs::TcContext};
use breaker_common::{PassReason, Place};

use super::by_family;
use crate::{
    agent, endpoint,
    family::{Family, V4, V6},
    packet::Packet,
    parse,
    verdict::{self, Verdict},
};

/// The programs that look closer, by [`Place`].
#[btf_map]
static PROGRAMS: ProgramArray<{ Place::ALL.len() }> = ProgramArray::new();

/// A packet that a client sends. `OUTSIDE`: by an uplink.
#[inline(always)]
pub fn sent<const OUTSIDE: bool>(ctx: &TcContext, place: Place) -> i32 {
    by_family::<OUTSIDE>(
        ctx,
        |packet, l3| onward(ctx, place, sent_counts::<V4, OUTSIDE>(packet, l3)),
        |packet, l3| onward(ctx, place, sent_counts::<V6, OUTSIDE>(packet, l3)),
    )
}

/// A packet that a client gets.
#[inline(always)]
pub fn got<const OUTSIDE: bool>(ctx: &TcContext, place: Place) -> i32 {
    by_family::<OUTSIDE>(
        ctx,
        |packet, l3| onward(ctx, place, got_counts::<V4>(packet, l3)),
        |packet, l3| onward(ctx, place, got_counts::<V6>(packet, l3)),
    )
}

/// What cannot be seen at a glance counts.
#[inline(always)]
fn sent_counts<A: Family, const OUTSIDE: bool>(packet: &Packet<'_>, l3: usize) -> bool {
    let Some(ends) = parse::glance::<A>(packet, l3) else { return true };
    let to = endpoint::guess(ends.destination, ends.ports.destination, ends.proto);
    let closes = || ends.ends() && endpoint::is_counted(ends.destination, ends.ports.destination);
    if OUTSIDE {
        // What goes to a backend's own address is other nodes' business.
        return to.frontend && (to.counts(ends.may_begin) || closes());
    }
    // It may be a backend's answer that leaves the stack out.
    let answers = || agent::any_fast() && endpoint::guess(ends.source, ends.ports.source, ends.proto).every;
    to.counts(ends.may_begin) || closes() || answers()
}

#[inline(always)]
fn got_counts<A: Family>(packet: &Packet<'_>, l3: usize) -> bool {
    let Some(ends) = parse::glance::<A>(packet, l3) else { return true };
    endpoint::guess(ends.source, ends.ports.source, ends.proto).every
        || ends.is_control() && endpoint::is_counted(ends.source, ends.ports.source)
}

/// On to the next program on the hook, or to the one that looks closer.
#[inline(always)]
fn onward(ctx: &TcContext, place: Place, counts: bool) -> i32 {
    if !counts {
        return verdict::settle(Ok(Verdict::Next));
    }
    // SAFETY: nothing is left to be done here, and nothing to be dropped.
    unsafe { PROGRAMS.tail_call(ctx, place as u32) };
    // It came back: there is none, which cannot be while the agent's pins are whole.
    verdict::settle(Err(PassReason::ProgramMissing))
}
