//! breaker's programs on the packet path: entry points only.
//!
//! Read [`hook::tc`] from top to bottom to follow a packet; every step there is a module of its own:
//!
//! | module | one concern |
//! |---|---|
//! | [`packet`] | bounds-checked access to bytes, checksum helpers: the raw pointers live here |
//! | [`parse`] | headers to a tuple |
//! | [`endpoint`] | what an address is to us: frontend, backend, nothing |
//! | [`service`] | a service's switch and record |
//! | [`select`] | which tier and which slot a new connection gets |
//! | [`flow`] | the pinned decisions, forward and reverse |
//! | [`nat`] | translating there and back |
//! | [`reset`] | refusing and resetting |
//! | [`agent`] | the agent's sign of life |
//! | [`count`], [`event`] | what is told to userspace |
//! | [`verdict`] | what becomes of the packet |

#![no_std]
#![no_main]
#![feature(core_intrinsics)]
#![cfg_attr(feature = "strict", deny(warnings))]
#![allow(internal_features)]

mod agent;
mod atomic;
mod count;
mod csum;
mod endpoint;
mod event;
mod flow;
mod hash;
mod hook;
mod nat;
mod packet;
mod parse;
mod reset;
mod select;
mod service;
mod verdict;

use aya_ebpf::{macros::classifier, programs::TcContext};

/// tc ingress on the host side of a pod's veth: what the pod sends.
#[classifier]
pub fn breaker_in(ctx: TcContext) -> i32 {
    verdict::settle(hook::tc::try_from_pod(&ctx))
}

/// tc ingress on a node's uplink: what comes from outside for a Service.
#[classifier]
pub fn breaker_up(ctx: TcContext) -> i32 {
    verdict::settle(hook::tc::try_from_outside(&ctx))
}

/// tc egress on the host side of a pod's veth, and on an uplink: what the client gets.
#[classifier]
pub fn breaker_out(ctx: TcContext) -> i32 {
    verdict::settle(hook::tc::try_to_pod(&ctx))
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
