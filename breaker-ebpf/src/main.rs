//! breaker's eBPF programs: the entry points, without logic.
//!
//! To follow a packet, read [`hook::prefilter`], then [`hook::from_client`] and [`hook::to_client`] (the full
//! path), each from top to bottom. [`hook::socket`] handles the sockets of the node's own processes. [`hook::xdp`]
//! refuses new connections before they reach the network stack. [`hook::poke`] makes clients answer that wait. The other
//! modules are:
//!
//! | module | concern |
//! |---|---|
//! | [`packet`] | bounds-checked access to packet bytes, checksum helpers; holds the raw pointers |
//! | [`parse`] | parses headers to a tuple |
//! | [`wire`], [`tables`] | what differs between IPv4 and IPv6: offsets and sums, and the maps |
//! | [`family`] | a family as the hooks see it: wire format, parser, maps |
//! | [`endpoint`] | the role of an address: frontend, backend or none |
//! | [`service`] | a service's switch and record, and its half-open permits |
//! | [`select`] | chooses the tier and the slot for a new connection |
//! | [`limit`] | limits on new and on concurrent connections |
//! | [`flow`], [`pin`] | the pinned decisions, forward and reverse: finding them; creating them |
//! | [`claim`] | a reverse key for each flow, and another source port if the client's is taken |
//! | [`nat`], [`icmp`], [`fragment`] | translation there and back; ICMP errors about it; later fragments (no ports) |
//! | [`reset`] | refuses new connections and datagrams, resets established connections |
//! | [`fib`] | looks up the node's routes |
//! | [`return_path`] | whether the answers of backups pass the client's interface |
//! | [`agent`] | the agent's heartbeat, and the clocks |
//! | [`count`], [`event`] | counters and events for userspace |
//! | [`verdict`] | what becomes of a packet |
//! | [`atomic`] | atomic operations on map values |

#![no_std]
#![no_main]
#![feature(asm_experimental_arch, core_intrinsics)]
#![cfg_attr(feature = "strict", deny(warnings))]
#![allow(internal_features)]

mod agent;
mod atomic;
mod claim;
mod count;
mod endpoint;
mod event;
mod family;
mod fib;
mod flow;
mod fragment;
mod hook;
mod icmp;
mod limit;
mod nat;
mod packet;
mod parse;
mod pin;
mod reset;
mod return_path;
mod select;
mod service;
mod syns;
mod tables;
mod verdict;
mod wire;

use aya_ebpf::{
    macros::{cgroup_sock, cgroup_sock_addr, classifier, xdp},
    programs::{SockAddrContext, SockContext, TcContext, XdpContext},
};
use breaker_common::TcHook;

/// Prefilter for packets from a pod: tc ingress on the host side of the pod's veth.
#[classifier]
pub fn breaker_in(ctx: TcContext) -> i32 {
    hook::prefilter::ingress::<false>(&ctx, TcHook::PodIn)
}

/// Full path of [`breaker_in`]. The prefilter tail-calls it for packets that it cannot pass.
#[classifier]
pub fn brk_in_full(ctx: TcContext) -> i32 {
    hook::from_client::from_pod(&ctx)
}

/// Prefilter for packets from external clients: tc ingress on an uplink of the node.
#[classifier]
pub fn breaker_up(ctx: TcContext) -> i32 {
    hook::prefilter::ingress::<true>(&ctx, TcHook::UplinkIn)
}

/// Full path of [`breaker_up`]. The prefilter tail-calls it for packets that it cannot pass.
#[classifier]
pub fn brk_up_full(ctx: TcContext) -> i32 {
    hook::from_client::from_uplink(&ctx)
}

/// Prefilter for packets to a pod: tc egress on the host side of the pod's veth.
#[classifier]
pub fn breaker_out(ctx: TcContext) -> i32 {
    hook::prefilter::egress::<false>(&ctx, TcHook::PodOut)
}

/// Full path of [`breaker_out`]. The prefilter tail-calls it for packets that it cannot pass.
#[classifier]
pub fn brk_out_full(ctx: TcContext) -> i32 {
    hook::to_client::to_pod(&ctx)
}

/// Prefilter for packets to external clients: tc egress on an uplink of the node.
#[classifier]
pub fn breaker_up_out(ctx: TcContext) -> i32 {
    hook::prefilter::egress::<true>(&ctx, TcHook::UplinkOut)
}

/// Full path of [`breaker_up_out`]. The prefilter tail-calls it for packets that it cannot pass.
#[classifier]
pub fn brk_up_out_full(ctx: TcContext) -> i32 {
    hook::to_client::to_uplink(&ctx)
}

/// Sends a segment that makes a client's kernel answer. Not attached: the agent runs it (BPF_PROG_RUN).
#[classifier]
pub fn breaker_poke(ctx: TcContext) -> i32 {
    hook::poke::send(&ctx)
}

/// Refuses new connections from external clients before the network stack sees them: XDP on an uplink of the node.
#[xdp]
pub fn breaker_xdp(ctx: XdpContext) -> u32 {
    hook::xdp::from_uplink(&ctx)
}

/// As [`breaker_xdp`], for packets in several buffers.
#[xdp(frags)]
pub fn breaker_xdp_fr(ctx: XdpContext) -> u32 {
    hook::xdp::from_uplink(&ctx)
}

macro_rules! sockets {
    ($($(#[$doc:meta])* $name:ident: $hook:ident => $function:ident,)+) => {
        $($(#[$doc])*
        #[cgroup_sock_addr($hook)]
        pub fn $name(ctx: SockAddrContext) -> i32 {
            hook::socket::$function(&ctx)
        })+
    };
}

sockets! {
    /// connect(2) of the node's own sockets, IPv4: replaces a frontend's address by that of the chosen backend.
    breaker_conn4: connect4 => redirect4,
    /// connect(2) of the node's own sockets, IPv6: replaces a frontend's address by that of the chosen backend.
    breaker_conn6: connect6 => redirect6,
    /// sendmsg(2) and sendto(2) with an IPv4 address: replaces a frontend's address by that of the chosen backend.
    breaker_send4: sendmsg4 => redirect4,
    /// sendmsg(2) and sendto(2) with an IPv6 address: replaces a frontend's address by that of the chosen backend.
    breaker_send6: sendmsg6 => redirect6,
    /// recvmsg(2) and recvfrom(2), IPv4: reports the frontend's address as the sender instead of the backend's.
    breaker_recv4: recvmsg4 => restore4,
    /// recvmsg(2) and recvfrom(2), IPv6: reports the frontend's address as the sender instead of the backend's.
    breaker_recv6: recvmsg6 => restore6,
    /// getpeername(2), IPv4: reports the frontend's address instead of the backend's.
    breaker_peer4: getpeername4 => restore4,
    /// getpeername(2), IPv6: reports the frontend's address instead of the backend's.
    breaker_peer6: getpeername6 => restore6,
}

/// close(2) of the node's own sockets: their connections no longer count toward the limits.
#[cgroup_sock(sock_release)]
pub fn breaker_release(ctx: SockContext) -> i32 {
    hook::socket::on_release(&ctx)
}

#[cfg(not(test))]
#[panic_handler]
fn panic(_info: &core::panic::PanicInfo<'_>) -> ! {
    loop {}
}

/// The kernel allows GPL-only helpers only in programs with a GPL-compatible license
/// (Documentation/process/license-rules.rst).
#[unsafe(link_section = "license")]
#[unsafe(no_mangle)]
static LICENSE: [u8; 4] = *b"GPL\0";
