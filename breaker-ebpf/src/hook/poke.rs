//! Pokes a client, so that its kernel answers: the answer is reset by [`super::from_client`] as any segment of an
//! established connection is. This reaches clients that wait for an answer and send nothing.
//!
//! The agent runs this program for each connection, up to three times (BPF_PROG_RUN), on a segment from the frontend to the client: ACK
//! only, without data and options. A kernel answers a segment whose numbers it does not expect with an ACK (RFC 9293,
//! section 3.10.7.4), which has the right numbers. The segment is sent four times, with each of its two numbers as given and
//! 2^31 further: of the four, one is old in both numbers, whatever those of the connection are. Only that one is sure to
//! pass a connection tracking on its way, which may drop what is too new (`nf_conntrack_tcp_be_liberal` is 0).
//!
//! A client that has no such connection answers with a reset, which is not sent on ([`note_refusal`]).

use aya_ebpf::{
    bindings::{BPF_F_NO_PREALLOC, BPF_FIB_LKUP_RET_NO_NEIGH, BPF_FIB_LKUP_RET_NOT_FWDED, BPF_FIB_LKUP_RET_SUCCESS},
    btf_maps::HashMap,
    macros::btf_map,
    programs::TcContext,
};
use breaker_common::{DEFAULT_POKED, FlowKey, PokeOutcome, csum};

use crate::{
    family::{Family, V4, V6},
    fib, flow,
    nat::TCP_CHECK,
    packet::{Frame as _, Packet},
    parse::{Segment, UNTAGGED_L3_OFFSET},
};

/// The connections whose clients are poked now, with IPv4 addresses in their IPv4-mapped IPv6 form. The agent adds and
/// removes them. The value is 1 if the client has refused a poke.
#[btf_map]
static POKED: HashMap<FlowKey<V6>, u8, { DEFAULT_POKED as usize }, { BPF_F_NO_PREALLOC as usize }> = HashMap::new();

/// Offsets of the sequence number and the acknowledgment number in a TCP header.
const SEQUENCE: usize = 4;
const ACKNOWLEDGMENT: usize = 8;

/// Sends the segment to its destination, by the node's routes. Returns a [`PokeOutcome`].
#[inline(always)]
pub fn send(ctx: &TcContext) -> i32 {
    let packet = Packet::new(ctx);
    let outcome = match packet.read::<u8>(UNTAGGED_L3_OFFSET).map(|byte| byte >> 4) {
        Some(4) => send_four::<V4>(&packet),
        Some(6) => send_four::<V6>(&packet),
        _ => None,
    };
    outcome.unwrap_or(PokeOutcome::Failed) as i32
}

#[inline(always)]
fn send_four<A: Family>(packet: &Packet<'_>) -> Option<PokeOutcome> {
    let source = packet.read::<A>(UNTAGGED_L3_OFFSET + A::SOURCE_OFFSET)?;
    let destination = packet.read::<A>(UNTAGGED_L3_OFFSET + A::DESTINATION_OFFSET)?;
    let (outcome, hop) = fib::route(packet, source, destination);
    if outcome == BPF_FIB_LKUP_RET_NO_NEIGH as i64 {
        return Some(PokeOutcome::NoNeighbor);
    }
    if outcome == BPF_FIB_LKUP_RET_NOT_FWDED as i64 {
        return Some(PokeOutcome::Local);
    }
    if outcome != BPF_FIB_LKUP_RET_SUCCESS as i64 {
        return Some(PokeOutcome::NoRoute);
    }
    packet.write(0, hop.receiver)?;
    packet.write(6, hop.sender)?;
    let l4 = UNTAGGED_L3_OFFSET + A::HEADER;
    for number in [SEQUENCE, ACKNOWLEDGMENT, SEQUENCE, ACKNOWLEDGMENT] {
        packet.send_copy(hop.interface)?;
        add_half(packet, l4, number)?;
    }
    Some(PokeOutcome::Sent)
}

/// Notes that a client refuses a poke: it has no such connection. (Or it has, and a router on the way that translates
/// addresses does not know all four segments. Then another of them has reached the client.)
#[inline(always)]
pub(super) fn note_refusal<A: Family>(segment: &Segment<A>) {
    let Some(key) = flow::mapped_key(&flow::key(segment)) else { return };
    if let Some(refused) = POKED.get_ptr_mut(key) {
        // SAFETY: the kernel returned a pointer to a value of this map. Every writer stores the same byte.
        unsafe { *refused = 1 };
    }
}

/// Adds 2^31 to a number of the TCP header.
#[inline(always)]
fn add_half(packet: &Packet<'_>, l4: usize, at: usize) -> Option<()> {
    let old = packet.read::<[u8; 2]>(l4 + at)?;
    let new = [old[0] ^ 0x80, old[1]];
    packet.write(l4 + at, new)?;
    let check = u16::from_be_bytes(packet.read::<[u8; 2]>(l4 + TCP_CHECK)?);
    let check = csum::replaced(check, csum::word(old), csum::word(new));
    packet.write(l4 + TCP_CHECK, check.to_be_bytes())
}
