//! Sends a packet on: through the network stack, or by a redirect that bypasses it.

use aya_ebpf::bindings::TC_ACT_UNSPEC;
use breaker_common::egress;

use crate::{
    family::Family,
    fragment,
    nat::Side,
    packet::Packet,
    parse::Segment,
    verdict::{self, Verdict},
};

/// The verdict for a packet to a backend: `egress` is the network stack or a veth (see [`egress`]).
#[inline(always)]
pub(super) fn forward_to_backend(packet: &Packet<'_>, egress: u32) -> Verdict {
    // One variant for all cases: for a variant without a value, LLVM may leave a packet pointer in the register of the
    // value, and the verifier rejects the arithmetic on it that follows.
    Verdict::Final(if egress == egress::STACK { TC_ACT_UNSPEC } else { packet.redirect_to_peer(egress) })
}

/// As [`forward_to_backend`], for a packet to a client: `egress` may also be an uplink, with the next hop.
#[inline(always)]
pub(super) fn forward_to_client<A: Family>(packet: &Packet<'_>, egress: u32, next_hop: A) -> Verdict {
    if egress & egress::NEIGHBOR == 0 {
        return forward_to_backend(packet, egress);
    }
    Verdict::Final(packet.redirect_to_neighbor(egress & !egress::NEIGHBOR, &next_hop.as_next_hop()))
}

/// Translates a later fragment, which has no ports, as its first fragment was translated. BPF subprogram (not inlined),
/// for a stack frame of its own: see [`super::from_client`].
#[inline(never)]
pub(super) fn follow<A: Family>(packet: &Packet<'_>, segment: &Segment<A>, side: Side) -> i32 {
    let first = fragment::follow(packet, segment, side);
    verdict::into_action(first.map(|first| forward_to_client(packet, first.egress, first.next_hop)))
}
