//! Sends a packet on: through the network stack, or by a redirect that bypasses it.

use aya_ebpf::bindings::TC_ACT_UNSPEC;
use breaker_common::{PassReason, egress};

use crate::{family::Family, fragment, nat::Side, packet::Packet, parse::Segment, verdict::Verdict};

/// The verdict for a packet that goes to `egress` (see [`egress`]): the network stack, or an interface. `next_hop` is
/// used for an uplink only.
#[inline(always)]
pub(super) fn forward_to<A: Family>(packet: &Packet<'_>, egress: u32, next_hop: A) -> Verdict {
    // One variant for all cases: for a variant without a value, LLVM may leave a packet pointer in the register of the
    // value, and the verifier rejects the arithmetic on it that follows.
    Verdict::Final(if egress == egress::STACK {
        TC_ACT_UNSPEC
    } else if egress & egress::NEIGHBOR != 0 {
        packet.redirect_to_neighbor(egress & !egress::NEIGHBOR, &next_hop.as_next_hop())
    } else {
        packet.redirect_to_peer(egress)
    })
}

/// Translates a later fragment, which has no ports, as its first fragment was translated.
#[inline(always)]
pub(super) fn follow<A: Family>(packet: &Packet<'_>, segment: &Segment<A>, side: Side) -> Result<Verdict, PassReason> {
    let first = fragment::follow(packet, segment, side)?;
    Ok(forward_to(packet, first.egress, first.next_hop))
}
