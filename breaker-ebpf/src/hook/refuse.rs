//! Refuses a new connection or datagram, and resets an established connection.

use aya_ebpf::bindings::TC_ACT_SHOT;
use breaker_common::{EventKind, Switch};

use super::{context::PacketContext, forward::forward_to_backend, poke};
use crate::{
    count, event,
    family::Family,
    flow,
    packet::Packet,
    parse::Segment,
    reset, syns,
    verdict::{self, Verdict},
};

/// Resets the segment's connection at both ends. A reset is the answer to a poke ([`super::poke`]), and is dropped.
#[inline(never)]
pub(super) fn reset_both<A: Family>(packet: &Packet<'_>, segment: &Segment<A>, context: &PacketContext<A>) -> i32 {
    if segment.is_rst() {
        poke::note_refusal(segment);
        return TC_ACT_SHOT;
    }
    count::service(context.service, |c| &mut c.resets);
    let (switch, key) = (Switch::from_word(context.switch), flow::key(segment));
    syns::forget(&key);
    event::send(EventKind::FlowReset, context.service, &switch, &key, None);
    verdict::into_action(
        reset::both_ends(packet, segment, &context.peer).map(|()| forward_to_backend(packet, context.peer.egress)),
    )
}

#[inline(never)]
pub(super) fn refuse_segment<A: Family>(packet: &Packet<'_>, segment: &Segment<A>) -> i32 {
    verdict::into_action(reset::refuse_segment(packet, segment).map(|()| Verdict::Redirect(packet.redirect_back())))
}

#[inline(never)]
pub(super) fn refuse_datagram<A: Family>(packet: &Packet<'_>, segment: &Segment<A>) -> i32 {
    verdict::into_action(reset::refuse_datagram(packet, segment).map(|()| Verdict::Redirect(packet.redirect_back())))
}
