//! Programs of somebody else, for tests: what runs before and after ours must go on running.

#![no_std]
#![no_main]
#![cfg_attr(feature = "strict", deny(warnings))]

use aya_ebpf::{
    btf_maps::{Array, ProgramArray},
    macros::{btf_map, cgroup_sock_addr, classifier, xdp},
    programs::{SockAddrContext, TcContext, XdpContext},
};

/// What was seen by [`foreign_in`] (0), [`foreign_out`] (1), [`foreign_ok`] (2), [`foreign_mark`] (3), [`foreign_drop`] (4: what it
/// dropped), [`foreign_xdp`] (5) and [`foreign_connect`] (6).
#[btf_map]
static SEEN: Array<u64, 7> = Array::new();

fn count(index: u32) {
    if let Some(seen) = SEEN.get_ptr_mut(index) {
        // SAFETY: the kernel returned a pointer to a value of this map; a lost increment is fine for a test's counter.
        unsafe { *seen += 1 };
    }
}

/// Counts and passes on.
#[classifier]
pub fn foreign_in(_ctx: TcContext) -> i32 {
    count(0);
    aya_ebpf::bindings::TC_ACT_UNSPEC
}

/// Counts and passes on.
#[classifier]
pub fn foreign_out(_ctx: TcContext) -> i32 {
    count(1);
    aya_ebpf::bindings::TC_ACT_UNSPEC
}

/// Counts and accepts: nobody behind it sees the packet.
#[classifier]
pub fn foreign_ok(_ctx: TcContext) -> i32 {
    count(2);
    aya_ebpf::bindings::TC_ACT_OK
}

/// Marks what passes, as a policy engine does.
#[classifier]
pub fn foreign_mark(ctx: TcContext) -> i32 {
    count(3);
    // SAFETY: the context is valid for the run of the program.
    let mark = unsafe { (*ctx.skb.skb).mark };
    ctx.set_mark(mark | 0x0100_0000);
    aya_ebpf::bindings::TC_ACT_UNSPEC
}

/// Drops IPv4 packets to port 9999, as a firewall does.
#[classifier]
pub fn foreign_drop(ctx: TcContext) -> i32 {
    if ctx.load::<u16>(36).is_ok_and(|port| port == 9999_u16.to_be()) {
        count(4);
        return aya_ebpf::bindings::TC_ACT_SHOT;
    }
    aya_ebpf::bindings::TC_ACT_UNSPEC
}

/// Counts and passes on.
#[xdp]
pub fn foreign_xdp(_ctx: XdpContext) -> u32 {
    count(5);
    aya_ebpf::bindings::xdp_action::XDP_PASS
}

/// Counts and lets it go on.
#[cgroup_sock_addr(connect4)]
pub fn foreign_connect(_ctx: SockAddrContext) -> i32 {
    count(6);
    1
}

/// Named as a socket load balancer's program is; does nothing.
#[cgroup_sock_addr(connect4)]
pub fn cil_sock4_connect(_ctx: SockAddrContext) -> i32 {
    1
}

/// What [`wrap`] makes a packet look like, again and again: the kernel does not restore it between the repeats of a
/// test run, and a program that rewrites would see its own output.
#[repr(C)]
struct Template {
    /// Source and destination address, source and destination port, as they follow each other on the wire: 12 bytes for
    /// IPv4, 36 for IPv6.
    ends: [u8; 36],
    /// TCP flags.
    flags: u8,
    /// 4 or 6.
    version: u8,
    /// 1: with another TCP sequence number each time. 2: every flow has a client of its own, told by the last two bytes of its
    /// address. 3: both.
    vary: u8,
    pad: u8,
    /// How many flows to take turns with; a power of two, at most 2^17.
    flows: u32,
    /// The turn.
    next: u32,
}

#[btf_map]
static TEMPLATE: Array<Template, 1> = Array::new();

/// The program that is measured, at 0.
#[btf_map]
static MEASURED: ProgramArray<1> = ProgramArray::new();

/// Restores the packet to the next flow's, and goes on to the program that is measured.
#[classifier]
pub fn wrap(ctx: TcContext) -> i32 {
    if let Some(template) = TEMPLATE.get_ptr_mut(0) {
        // SAFETY: the kernel returned a pointer to the only value of this map; one CPU runs a test.
        let template = unsafe { &mut *template };
        template.next = template.next.wrapping_add(1);
        // An odd factor visits all of a power of two, far apart.
        let flow = template.next.wrapping_mul(40_503) & template.flows.wrapping_sub(1);
        let port = (1024 + (flow & 0x7fff) as u16).to_be_bytes();
        let ends = &template.ends;
        let clients = if template.vary & 2 != 0 { flow } else { flow >> 15 };
        let number = if template.vary & 1 != 0 { template.next } else { 1 };
        if template.version == 4 {
            let source =
                [ends[0], ends[1], ends[2].wrapping_add((clients >> 8) as u8), ends[3].wrapping_add(clients as u8)];
            let rest = [ends[4], ends[5], ends[6], ends[7], port[0], port[1], ends[10], ends[11]];
            let _ = ctx.store(26, &source, 0);
            let _ = ctx.store(30, &rest, 0);
            let _ = ctx.store(38, &number, 0);
            let _ = ctx.store(47, &template.flags, 0);
        } else {
            let mut ends = *ends;
            ends[14] = ends[14].wrapping_add((clients >> 8) as u8);
            ends[15] = ends[15].wrapping_add(clients as u8);
            (ends[32], ends[33]) = (port[0], port[1]);
            let _ = ctx.store(22, &ends, 0);
            let _ = ctx.store(58, &number, 0);
            let _ = ctx.store(67, &template.flags, 0);
        }
        // It returns only if there is nothing to call.
        // SAFETY: context and map are the kernel's.
        unsafe { MEASURED.tail_call(&ctx, 0) };
    }
    aya_ebpf::bindings::TC_ACT_UNSPEC
}

/// Does nothing: what calling a program costs by itself.
#[classifier]
pub fn empty(_ctx: TcContext) -> i32 {
    aya_ebpf::bindings::TC_ACT_UNSPEC
}

#[cfg(not(test))]
#[panic_handler]
fn panic(_info: &core::panic::PanicInfo<'_>) -> ! {
    loop {}
}

/// See the other binary.
#[unsafe(link_section = "license")]
#[unsafe(no_mangle)]
static LICENSE: [u8; 4] = *b"GPL\0";
