//! What the node's routes say (the FIB, forwarding information base).

use aya_ebpf::{
    bindings::{BPF_FIB_LKUP_RET_NO_NEIGH, BPF_FIB_LKUP_RET_SUCCESS, bpf_fib_lookup as Lookup},
    helpers::bpf_fib_lookup,
};
use breaker_common::FlowKey;

use crate::{family::Family, packet::Packet};

/// Whether answers to a client leave by the interface that its packet came in by. Where the way back is another one, only the
/// stack knows it all: policy routing, tunnels, more than one next hop. (A neighbor whose MAC address is not known yet is asked for
/// when the answer is sent.)
///
/// A function to the kernel too: see [`crate::hook::tc`] on the stack.
#[inline(never)]
pub fn leads_back<A: Family>(packet: &Packet<'_>, key: &FlowKey<A>) -> bool {
    let here = packet.ifindex();
    // SAFETY: numbers only, for which zero is a value.
    let mut lookup: Lookup = unsafe { core::mem::zeroed() };
    lookup.l4_protocol = key.proto;
    lookup.ifindex = here;
    A::look_up(&mut lookup, key.vip, key.client);
    // SAFETY: the context is valid for the run of the program, and so is the lookup, which is as long as is said.
    let outcome =
        unsafe { bpf_fib_lookup(packet.context().skb.skb.cast(), &raw mut lookup, size_of::<Lookup>() as i32, 0) };
    (outcome == BPF_FIB_LKUP_RET_SUCCESS as i64 || outcome == BPF_FIB_LKUP_RET_NO_NEIGH as i64)
        && lookup.ifindex == here
}
