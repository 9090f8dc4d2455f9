//! The prefilter: the first program on every tc hook. It judges a packet by its source and destination alone and
//! passes most packets. The others go on to the full path ([`super::tc`]).
//!
//! The full path is a separate program, called by tail call, because it writes into packets and the prefilter does
//! not. In front of a program that writes, the kernel puts a prologue that makes the packet writable
//! (`bpf_unclone_prologue` in net/core/filter.c), and nearly every packet that TCP sends is a clone. On packets of
//! a closed service the prologue cost more than everything that breaker does with them.

use aya_ebpf::{btf_maps::ProgramArray, macros::btf_map, programs::TcContext};
use breaker_common::{PassReason, TcHook};

use super::by_family;
use crate::{
    agent, endpoint,
    family::{Family, V4, V6},
    packet::Packet,
    parse,
    verdict::{self, Verdict},
};

/// The tail-call map: hook ([`TcHook`]) → full-path program. The agent fills it.
#[btf_map]
static PROGRAMS: ProgramArray<{ TcHook::ALL.len() }> = ProgramArray::new();

/// Prefilter for a packet from a client (tc ingress). `OUTSIDE`: the hook is on an uplink.
#[inline(always)]
pub fn sent<const OUTSIDE: bool>(ctx: &TcContext, hook: TcHook) -> i32 {
    by_family::<OUTSIDE>(
        ctx,
        |packet, l3| onward(ctx, hook, sent_counts::<V4, OUTSIDE>(packet, l3)),
        |packet, l3| onward(ctx, hook, sent_counts::<V6, OUTSIDE>(packet, l3)),
    )
}

/// Prefilter for a packet to a client (tc egress). `OUTSIDE`: the hook is on an uplink.
#[inline(always)]
pub fn got<const OUTSIDE: bool>(ctx: &TcContext, hook: TcHook) -> i32 {
    by_family::<OUTSIDE>(
        ctx,
        |packet, l3| onward(ctx, hook, got_counts::<V4>(packet, l3)),
        |packet, l3| onward(ctx, hook, got_counts::<V6>(packet, l3)),
    )
}

/// Whether a packet from a client needs the full path. Packets that the prefilter cannot parse do.
#[inline(always)]
fn sent_counts<A: Family, const OUTSIDE: bool>(packet: &Packet<'_>, l3: usize) -> bool {
    let Some(ends) = parse::glance::<A>(packet, l3) else { return true };
    let to = endpoint::guess(ends.destination, ends.ports.destination, ends.proto);
    let closes = || ends.ends() && endpoint::is_counted(ends.destination, ends.ports.destination);
    if OUTSIDE {
        // On an uplink, packets to a backend's own address are left alone: they are the traffic of other nodes.
        return to.frontend && (to.counts(ends.may_begin) || closes());
    }
    // The sender may be a backend whose replies take the fast path, which bypasses the host network stack.
    let answers = || agent::any_fast() && endpoint::guess(ends.source, ends.ports.source, ends.proto).every;
    to.counts(ends.may_begin) || closes() || answers()
}

/// Whether a packet to a client needs the full path. Packets that the prefilter cannot parse do.
#[inline(always)]
fn got_counts<A: Family>(packet: &Packet<'_>, l3: usize) -> bool {
    let Some(ends) = parse::glance::<A>(packet, l3) else { return true };
    endpoint::guess(ends.source, ends.ports.source, ends.proto).every
        || ends.is_control() && endpoint::is_counted(ends.source, ends.ports.source)
}

/// Passes the packet to the next program on the hook, or tail-calls the full path if `counts` is set.
#[inline(always)]
fn onward(ctx: &TcContext, hook: TcHook, counts: bool) -> i32 {
    if !counts {
        return verdict::settle(Ok(Verdict::Next));
    }
    // SAFETY: a successful tail call does not return; this function has nothing left to do and no value to drop.
    unsafe { PROGRAMS.tail_call(ctx, hook as u32) };
    // The tail call failed: the map has no program for this hook. This cannot happen while the agent's pins are
    // intact.
    verdict::settle(Err(PassReason::ProgramMissing))
}
