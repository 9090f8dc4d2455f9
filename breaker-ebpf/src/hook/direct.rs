//! A client's direct connections to a backend, outside of any Service.

use breaker_common::{FlowKind, NONE, PassReason, backend_use, egress};

use crate::{
    agent,
    family::Family,
    flow, fragment, nat,
    packet::Packet,
    parse::Segment,
    pin::{self, ReplyPath},
    select,
    verdict::{self, Verdict},
};

/// Handles a packet of a client's direct connection to a backend. It is tracked only so that its reverse key never
/// equals that of a flow to a frontend: the later one of the two gets another source port.
#[inline(never)]
pub(super) fn to_backend_directly<A: Family>(packet: &Packet<'_>, segment: &Segment<A>, id: u32) -> i32 {
    verdict::into_action(try_to_backend_directly(packet, segment, id))
}

#[inline(always)]
fn try_to_backend_directly<A: Family>(
    packet: &Packet<'_>,
    segment: &Segment<A>,
    id: u32,
) -> Result<Verdict, PassReason> {
    let in_use = select::backend_in_use::<A>(id);
    // A datagram does not show whether it is the first of its flow. It matters only if the backend has other
    // tracked flows.
    if !segment.is_tcp() && in_use == 0 {
        return Ok(Verdict::Next);
    }
    let key = flow::key(segment);
    // While no direct connection to this backend has a changed port, only SYN, FIN and RST matter: FIN and RST free
    // the reverse key.
    if segment.is_tcp() && !segment.is_syn() && in_use & backend_use::DIRECT == 0 && !segment.is_fin_or_rst() {
        return Ok(Verdict::Next);
    }
    let known = if segment.is_syn() { None } else { flow::find_or_promote(&key) };
    let source_port = match known {
        Some(flow) => {
            flow::touch(flow, segment);
            flow.source_port
        }
        None if segment.is_tcp() && !segment.is_syn() => return Ok(Verdict::Next),
        None => {
            flow::remove(&key, segment.sequence, 0);
            let backend = select::backend(id).ok_or(PassReason::UnknownBackend)?;
            let mut flow = pin::passed(&key, NONE, 0, segment.sequence, agent::now_ns());
            pin::lead_to(&mut flow, backend, id, FlowKind::Direct);
            pin::pin(&key, &mut flow, &ReplyPath::through_stack(packet.ifindex()))?;
            if flow.source_port != key.client_port {
                select::mark_in_use::<A>(id, backend_use::DIRECT);
            }
            flow.source_port
        }
    };
    if source_port != key.client_port {
        fragment::note_to_backend(segment, &key.vip, 0, egress::STACK);
        nat::to_backend(packet, segment, key.vip, key.vip_port, source_port)?;
    }
    Ok(Verdict::Next)
}
