//! The context of a packet from a client.

use crate::flow::Peer;

/// Context of a packet from a client, which the stages hand to each other.
pub struct PacketContext<A> {
    pub service: u32,
    pub route: u32,
    /// Id of the backend, if the packet is for a backend's own address; [`breaker_common::NONE`] otherwise.
    pub backend: u32,
    /// The decision for the first packet of a flow: the content of a slot.
    pub slot: u32,
    /// 1 if the connection holds one of the half-open breaker's permits, else 0.
    pub permit: u32,
    /// Index of the interface on which the packet came in.
    pub ingress: u32,
    /// Time of the decision, ns of `CLOCK_MONOTONIC`.
    pub now_ns: u64,
    /// The service's switch, packed into one word (`Switch::to_word` in [`breaker_common`]).
    pub switch: u64,
    /// Destination of the packet: the backend, or the other end of a connection that is reset.
    pub peer: Peer<A>,
}
