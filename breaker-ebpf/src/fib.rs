//! Looks up the node's routes (FIB, forwarding information base).

use aya_ebpf::{
    bindings::{BPF_FIB_LKUP_RET_NO_NEIGH, BPF_FIB_LKUP_RET_SUCCESS, bpf_fib_lookup as Lookup},
    helpers::bpf_fib_lookup,
};
use breaker_common::{FlowKey, PROTO_TCP};

use crate::{family::Family, packet::Packet};

/// Whether the node's routes send replies to a client out of the interface on which its packet came in. If not,
/// only the network stack knows the path back: policy routing, tunnels. A neighbor whose MAC address is not known yet is
/// no obstacle: the kernel resolves it when the reply is sent. Stores the next hop in `next_hop`: of several, another
/// look-up might name another one.
///
/// BPF subprogram (not inlined), for a stack frame of its own: see [`crate::hook::from_client`].
#[inline(never)]
pub fn reply_leaves_by_ingress_if<A: Family>(packet: &Packet<'_>, key: &FlowKey<A>, next_hop: &mut A) -> bool {
    let here = packet.ifindex();
    // SAFETY: the struct holds only integers, for which zero is a valid value.
    let mut lookup: Lookup = unsafe { core::mem::zeroed() };
    lookup.l4_protocol = key.proto;
    lookup.ifindex = here;
    A::fill_fib_lookup(&mut lookup, key.vip, key.client);
    // SAFETY: the context is valid for the run of the program; `lookup` is valid and has the length that is passed.
    let outcome =
        unsafe { bpf_fib_lookup(packet.context().skb.skb.cast(), &raw mut lookup, size_of::<Lookup>() as i32, 0) };
    let found = outcome == BPF_FIB_LKUP_RET_SUCCESS as i64 || outcome == BPF_FIB_LKUP_RET_NO_NEIGH as i64;
    let Some(gateway) = A::next_hop_of(&lookup).filter(|_| found && lookup.ifindex == here) else { return false };
    *next_hop = gateway;
    true
}

/// The way to a destination.
#[derive(Clone, Copy)]
pub struct Hop {
    /// Index of the interface.
    pub interface: u32,
    /// MAC addresses of the interface and of the next hop.
    pub sender: [u8; 6],
    pub receiver: [u8; 6],
}

/// Looks up the route of a TCP segment. Returns the kernel's outcome (`BPF_FIB_LKUP_RET_*`); the hop is valid on success.
#[inline(always)]
pub fn route<A: Family>(packet: &Packet<'_>, source: A, destination: A) -> (i64, Hop) {
    // SAFETY: the struct holds only integers, for which zero is a valid value.
    let mut lookup: Lookup = unsafe { core::mem::zeroed() };
    lookup.l4_protocol = PROTO_TCP;
    lookup.ifindex = packet.ifindex();
    A::fill_fib_lookup(&mut lookup, source, destination);
    // SAFETY: as above.
    let outcome =
        unsafe { bpf_fib_lookup(packet.context().skb.skb.cast(), &raw mut lookup, size_of::<Lookup>() as i32, 0) };
    (outcome, Hop { interface: lookup.ifindex, sender: lookup.smac, receiver: lookup.dmac })
}
