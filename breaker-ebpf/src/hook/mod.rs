//! The hooks. [`prefilter`], [`from_client`] and [`to_client`] serve tc, [`socket`] serves the cgroup hooks, [`xdp`]
//! serves XDP, [`poke`] is run by the agent; the private modules contain the stages that they share. To follow a packet,
//! read a module from top to bottom.

mod admission;
mod context;
mod direct;
mod forward;
pub mod from_client;
mod icmp_error;
mod new_flow;
pub mod poke;
pub mod prefilter;
mod refuse;
pub mod socket;
mod socket_admission;
pub mod to_client;
pub mod xdp;

use aya_ebpf::programs::TcContext;
use network_types::eth::EtherType;

use crate::{
    packet::Packet,
    parse,
    verdict::{self, Verdict},
};

/// Calls the handler for the packet's IP version with the offset of its IP header; passes all other packets.
/// `TAGGED`: the packet may carry VLAN tags, which are skipped.
#[inline(always)]
fn by_family<const TAGGED: bool>(
    ctx: &TcContext,
    v4: impl FnOnce(&Packet<'_>, usize) -> i32,
    v6: impl FnOnce(&Packet<'_>, usize) -> i32,
) -> i32 {
    let packet = Packet::new(ctx);
    let mut l3 = 0;
    match parse::network::<TAGGED>(&packet, &mut l3) {
        Some(EtherType::Ipv4) => v4(&packet, l3),
        Some(EtherType::Ipv6) => v6(&packet, l3),
        _ => verdict::into_action(Ok(Verdict::Next)),
    }
}
