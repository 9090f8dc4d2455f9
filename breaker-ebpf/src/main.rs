//! breaker's programs on the packet path: entry points only.
//!
//! Read [`hook::glance`] and [`hook::tc`] from top to bottom to follow a packet, [`hook::sock`] for sockets of the node's own,
//! [`hook::xdp`] for what never gets that far; every step there is a module of its own:
//!
//! | module | one concern |
//! |---|---|
//! | [`packet`] | bounds-checked access to bytes, checksum helpers: the raw pointers live here |
//! | [`parse`] | headers to a tuple |
//! | [`family`] | what differs between IPv4 and IPv6: offsets, sums, maps |
//! | [`endpoint`] | what an address is to us: frontend, backend, nothing |
//! | [`service`] | a service's switch and record |
//! | [`select`] | which tier and which slot a new connection gets |
//! | [`limit`] | how many new connections, and how many at the same time |
//! | [`flow`] | the pinned decisions, forward and reverse |
//! | [`nat`], [`icmp`], [`fragment`] | translating there and back; errors about it; what has no ports |
//! | [`reset`] | refusing and resetting |
//! | [`fib`] | what the node's routes say |
//! | [`agent`] | the agent's sign of life |
//! | [`count`], [`event`] | what is told to userspace |
//! | [`verdict`] | what becomes of the packet |

#![no_std]
#![no_main]
#![feature(asm_experimental_arch, core_intrinsics)]
#![cfg_attr(feature = "strict", deny(warnings))]
#![allow(internal_features)]

mod agent;
mod atomic;
mod count;
mod csum;
mod endpoint;
mod event;
mod family;
mod fib;
mod flow;
mod fragment;
mod hash;
mod hook;
mod icmp;
mod limit;
mod nat;
mod packet;
mod parse;
mod reset;
mod select;
mod service;
mod verdict;

use aya_ebpf::{
    macros::{cgroup_sock, cgroup_sock_addr, classifier, xdp},
    programs::{SockAddrContext, SockContext, TcContext, XdpContext},
};
use breaker_common::Place;

/// tc ingress on the host side of a pod's veth: what the pod sends.
#[classifier]
pub fn breaker_in(ctx: TcContext) -> i32 {
    hook::glance::sent::<false>(&ctx, Place::PodIn)
}

/// The same, for what does not go on after a glance.
#[classifier]
pub fn breaker_in_look(ctx: TcContext) -> i32 {
    hook::tc::from_pod(&ctx)
}

/// tc ingress on a node's uplink: what comes from outside for a Service.
#[classifier]
pub fn breaker_up(ctx: TcContext) -> i32 {
    hook::glance::sent::<true>(&ctx, Place::UplinkIn)
}

/// The same, for what does not go on after a glance.
#[classifier]
pub fn breaker_up_look(ctx: TcContext) -> i32 {
    hook::tc::from_outside(&ctx)
}

/// tc egress on the host side of a pod's veth: what the pod gets.
#[classifier]
pub fn breaker_out(ctx: TcContext) -> i32 {
    hook::glance::got::<false>(&ctx, Place::PodOut)
}

/// The same, for what does not go on after a glance.
#[classifier]
pub fn breaker_out_look(ctx: TcContext) -> i32 {
    hook::tc::to_pod(&ctx)
}

/// tc egress on a node's uplink: what clients outside get.
#[classifier]
pub fn breaker_up_out(ctx: TcContext) -> i32 {
    hook::glance::got::<true>(&ctx, Place::UplinkOut)
}

/// The same, for what does not go on after a glance.
#[classifier]
pub fn breaker_up_out_look(ctx: TcContext) -> i32 {
    hook::tc::to_outside(&ctx)
}

/// XDP on a node's uplink: what is refused before the stack sees it.
#[xdp]
pub fn breaker_xdp(ctx: XdpContext) -> u32 {
    hook::xdp::from_wire(&ctx)
}

macro_rules! sockets {
    ($($(#[$doc:meta])* $name:ident: $hook:ident => $function:ident,)+) => {
        $($(#[$doc])*
        #[cgroup_sock_addr($hook)]
        pub fn $name(ctx: SockAddrContext) -> i32 {
            hook::sock::$function(&ctx)
        })+
    };
}

sockets! {
    /// connect(2) of the node's own sockets, IPv4.
    breaker_conn4: connect4 => out4,
    /// The same, IPv6.
    breaker_conn6: connect6 => out6,
    /// sendmsg(2) and sendto(2) to an address.
    breaker_send4: sendmsg4 => out4,
    /// The same, IPv6.
    breaker_send6: sendmsg6 => out6,
    /// recvmsg(2) and recvfrom(2): who it came from.
    breaker_recv4: recvmsg4 => back4,
    /// The same, IPv6.
    breaker_recv6: recvmsg6 => back6,
    /// getpeername(2).
    breaker_peer4: getpeername4 => back4,
    /// The same, IPv6.
    breaker_peer6: getpeername6 => back6,
}

/// close(2) of the node's own sockets: their connections count no more.
#[cgroup_sock(sock_release)]
pub fn breaker_release(ctx: SockContext) -> i32 {
    hook::sock::released(&ctx)
}

#[cfg(not(test))]
#[panic_handler]
fn panic(_info: &core::panic::PanicInfo<'_>) -> ! {
    loop {}
}

/// The kernel lends GPL-only helpers to programs under this license only (Documentation/process/license-rules.rst).
#[unsafe(link_section = "license")]
#[unsafe(no_mangle)]
static LICENSE: [u8; 4] = *b"GPL\0";
