//! ICMP errors about translated packets, in both directions.

use breaker_common::{FlowKey, FlowKind, PassReason, ReverseKey, egress};

use super::forward::{forward_to_backend, forward_to_client};
use crate::{
    agent, count, endpoint,
    family::Family,
    flow::{self, Peer},
    icmp::{self, Quote},
    nat::Side,
    packet::Packet,
    parse::Segment,
    select,
    verdict::{self, Stage, Verdict},
};

/// Handles an ICMP error from a router or a backend to a client. It quotes the client's packet as breaker
/// translated it, so the quote is translated back. `FAST`: the error comes from the backend, on the backend's own
/// veth, and is translated only if its flow is on the fast path.
#[inline(never)]
pub(super) fn error_to_client<A: Family, const FAST: bool>(packet: &Packet<'_>, segment: &Segment<A>) -> i32 {
    verdict::into_action(try_error_to_client::<A, FAST>(packet, segment))
}

#[inline(always)]
fn try_error_to_client<A: Family, const FAST: bool>(
    packet: &Packet<'_>,
    segment: &Segment<A>,
) -> Result<Verdict, PassReason> {
    let mut quote = Quote::<A>::empty();
    if icmp::read(packet, segment, &mut quote).is_none()
        || select::backend_uses(quote.destination, quote.destination_port, quote.proto) == 0
    {
        return Ok(Verdict::Next);
    }
    let key = ReverseKey {
        backend: quote.destination,
        client: quote.source,
        backend_port: quote.destination_port,
        client_port: quote.source_port,
        proto: quote.proto,
        pad: [0; 3],
    };
    let Some(reverse) = flow::find_reverse(&key) else { return Ok(Verdict::Next) };
    let egress = if FAST { reverse.egress } else { egress::STACK };
    if FAST && egress == egress::STACK {
        return Ok(Verdict::Next);
    }
    let (service, next_hop) = (reverse.service, reverse.next_hop);
    let change = icmp::QuoteRewrite {
        end: Side::Destination,
        addr: reverse.vip,
        port: reverse.vip_port,
        other_port: reverse.client_port,
    };
    icmp::translate(packet, segment, &quote, &change)?;
    count::service(service, |c| &mut c.icmp_errors);
    Ok(forward_to_client(packet, egress, next_hop))
}

/// Handles an ICMP error from a client to a backend. It quotes the backend's packet as breaker translated it, so
/// the quote is translated back.
#[inline(never)]
pub(super) fn error_from_client<A: Family, const UPLINK: bool>(packet: &Packet<'_>, segment: &Segment<A>) -> i32 {
    verdict::into_action(try_error_from_client::<A, UPLINK>(packet, segment))
}

#[inline(always)]
fn try_error_from_client<A: Family, const UPLINK: bool>(
    packet: &Packet<'_>,
    segment: &Segment<A>,
) -> Result<Verdict, PassReason> {
    let mut quote = Quote::<A>::empty();
    if icmp::read(packet, segment, &mut quote).is_none() {
        return Ok(Verdict::Next);
    }
    let role = endpoint::find(quote.source, quote.source_port, quote.proto);
    let Some(service) = role.and_then(|role| endpoint::index(role.service)) else {
        return Ok(if !UPLINK && agent::fast_path_in_use() {
            Verdict::Continue(Stage::FastPathIcmpError)
        } else {
            Verdict::Next
        });
    };
    let key = FlowKey {
        client: quote.destination,
        vip: quote.source,
        client_port: quote.destination_port,
        vip_port: quote.source_port,
        proto: quote.proto,
        pad: [0; 3],
    };
    let Some(flow) = flow::find(&key) else { return Ok(Verdict::Next) };
    if flow.kind as u8 != FlowKind::Redirected as u8 {
        return Ok(Verdict::Next);
    }
    let change = icmp::QuoteRewrite {
        end: Side::Source,
        addr: flow.backend,
        port: flow.backend_port,
        other_port: flow.source_port,
    };
    let egress = Peer::of(flow).egress;
    icmp::translate(packet, segment, &quote, &change)?;
    count::service(service, |c| &mut c.icmp_errors);
    Ok(forward_to_backend(packet, egress))
}
