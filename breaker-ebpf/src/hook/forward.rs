//! Sends a packet on: through the network stack, or by a redirect that bypasses it.

use breaker_common::{PassReason, egress};

use crate::{family::Family, fragment, nat::Side, packet::Packet, parse::Segment, verdict::Verdict};

/// The verdict for a packet that goes to `egress` (see [`egress`]): the network stack, or an interface.
#[inline(always)]
pub(super) fn forward_to(packet: &Packet<'_>, egress: u32) -> Verdict {
    if egress == egress::STACK { Verdict::Next } else { Verdict::Redirect(packet.redirect_to(egress)) }
}

/// Translates a later fragment, which has no ports, as its first fragment was translated.
#[inline(always)]
pub(super) fn follow<A: Family>(packet: &Packet<'_>, segment: &Segment<A>, side: Side) -> Result<Verdict, PassReason> {
    let egress = fragment::follow(packet, segment, side)?;
    Ok(forward_to(packet, egress))
}
