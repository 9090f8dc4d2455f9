//! The prefilter: the first program on every tc hook. It decides by a packet's source and destination alone and
//! passes most packets. The others go on to the full path ([`super::from_client`], [`super::to_client`]).
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
    parse, syns,
    verdict::{self, Verdict},
};

/// The tail-call map: hook ([`TcHook`]) → full-path program. The agent fills it.
#[btf_map]
static PROGRAMS: ProgramArray<{ TcHook::ALL.len() }> = ProgramArray::new();

/// Prefilter for a packet from a client (tc ingress). `UPLINK`: the hook is on an uplink.
#[inline(always)]
pub fn ingress<const UPLINK: bool>(ctx: &TcContext, hook: TcHook) -> i32 {
    by_family::<UPLINK>(
        ctx,
        |packet, l3| tail_call(ctx, hook, from_client_needs_full_path::<V4, UPLINK>(packet, l3)),
        |packet, l3| tail_call(ctx, hook, from_client_needs_full_path::<V6, UPLINK>(packet, l3)),
    )
}

/// Prefilter for a packet to a client (tc egress). `UPLINK`: the hook is on an uplink.
#[inline(always)]
pub fn egress<const UPLINK: bool>(ctx: &TcContext, hook: TcHook) -> i32 {
    by_family::<UPLINK>(
        ctx,
        |packet, l3| tail_call(ctx, hook, to_client_needs_full_path::<V4>(packet, l3)),
        |packet, l3| tail_call(ctx, hook, to_client_needs_full_path::<V6>(packet, l3)),
    )
}

/// Whether a packet from a client needs the full path. Packets that the prefilter cannot parse do.
#[inline(always)]
fn from_client_needs_full_path<A: Family, const UPLINK: bool>(packet: &Packet<'_>, l3: usize) -> bool {
    let Some(tuple) = parse::peek::<A>(packet, l3) else { return true };
    let to = endpoint::filter_match(tuple.destination, tuple.ports.destination, tuple.proto);
    let closes = || {
        tuple.is_fin_or_rst()
            && (endpoint::may_count_connections(tuple.destination, tuple.ports.destination)
                || syns::are_noted() && to.frontend)
    };
    if UPLINK {
        // On an uplink, packets to a backend's own address are left alone: they are the traffic of other nodes.
        return to.frontend && (to.matches(tuple.may_start_flow) || closes());
    }
    // The sender may be a backend whose replies take the fast path, which bypasses the host network stack.
    let answers = || {
        agent::fast_path_in_use() && endpoint::filter_match(tuple.source, tuple.ports.source, tuple.proto).all_packets
    };
    to.matches(tuple.may_start_flow) || closes() || answers()
}

/// Whether a packet to a client needs the full path. Packets that the prefilter cannot parse do.
#[inline(always)]
fn to_client_needs_full_path<A: Family>(packet: &Packet<'_>, l3: usize) -> bool {
    let Some(tuple) = parse::peek::<A>(packet, l3) else { return true };
    endpoint::filter_match(tuple.source, tuple.ports.source, tuple.proto).all_packets
        || tuple.is_control() && endpoint::may_count_connections(tuple.source, tuple.ports.source)
}

/// Passes the packet to the next program on the hook, or tail-calls the full path if `needs_full_path` is set.
#[inline(always)]
fn tail_call(ctx: &TcContext, hook: TcHook, needs_full_path: bool) -> i32 {
    if !needs_full_path {
        return verdict::into_action(Ok(Verdict::Next));
    }
    // SAFETY: a successful tail call does not return; this function has nothing left to do and no value to drop.
    unsafe { PROGRAMS.tail_call(ctx, hook as u32) };
    // The tail call failed: the map has no program for this hook. This cannot happen while the agent's pins are
    // intact.
    verdict::into_action(Err(PassReason::ProgramMissing))
}
