//! BPF programs that stand in for third-party programs in tests and benchmarks. Such programs must keep running
//! before and after breaker's own on the same hook.

#![no_std]
#![no_main]
#![cfg_attr(feature = "strict", deny(warnings))]

use aya_ebpf::{
    btf_maps::{Array, PerCpuArray, ProgramArray},
    macros::{btf_map, cgroup_sock_addr, classifier, xdp},
    programs::{SockAddrContext, TcContext, XdpContext},
};

/// Number of packets seen, by program: [`third_in`] (0), [`third_out`] (1), [`third_ok`] (2), [`third_mark`]
/// (3), [`third_drop`] (4, dropped packets only), [`third_xdp`] (5). Index 6 counts connect(2) calls
/// ([`third_connect`]).
#[btf_map]
static SEEN: Array<u64, 7> = Array::new();

fn count(index: u32) {
    if let Some(seen) = SEEN.get_ptr_mut(index) {
        // SAFETY: the kernel returned a pointer to a value of this map. A lost increment does not matter in a test.
        unsafe { *seen += 1 };
    }
}

/// Counts the packet and continues with the next program.
#[classifier]
pub fn third_in(_ctx: TcContext) -> i32 {
    count(0);
    aya_ebpf::bindings::TC_ACT_UNSPEC
}

/// Counts the packet and continues with the next program.
#[classifier]
pub fn third_out(_ctx: TcContext) -> i32 {
    count(1);
    aya_ebpf::bindings::TC_ACT_UNSPEC
}

/// Counts and accepts the packet: later programs on the hook do not see it.
#[classifier]
pub fn third_ok(_ctx: TcContext) -> i32 {
    count(2);
    aya_ebpf::bindings::TC_ACT_OK
}

/// Counts and marks the packet, as a policy engine does.
#[classifier]
pub fn third_mark(ctx: TcContext) -> i32 {
    count(3);
    // SAFETY: the context is valid while the program runs.
    let mark = unsafe { (*ctx.skb.skb).mark };
    ctx.set_mark(mark | 0x0100_0000);
    aya_ebpf::bindings::TC_ACT_UNSPEC
}

/// Counts and drops IPv4 packets to port 9999, as a firewall does.
#[classifier]
pub fn third_drop(ctx: TcContext) -> i32 {
    if ctx.load::<u16>(36).is_ok_and(|port| port == 9999_u16.to_be()) {
        count(4);
        return aya_ebpf::bindings::TC_ACT_SHOT;
    }
    aya_ebpf::bindings::TC_ACT_UNSPEC
}

/// Counts the packet and passes it.
#[xdp]
pub fn third_xdp(_ctx: XdpContext) -> u32 {
    count(5);
    aya_ebpf::bindings::xdp_action::XDP_PASS
}

/// Counts the connect(2) call and lets it proceed.
#[cgroup_sock_addr(connect4)]
pub fn third_connect(_ctx: SockAddrContext) -> i32 {
    count(6);
    1
}

/// Has the name of the program of a third-party socket load balancer (Cilium's), and does nothing.
#[cgroup_sock_addr(connect4)]
pub fn cil_sock4_connect(_ctx: SockAddrContext) -> i32 {
    1
}

/// Has the name of a program of Cilium's datapath, and passes every packet.
#[classifier]
pub fn cil_from_container(_ctx: TcContext) -> i32 {
    aya_ebpf::bindings::TC_ACT_UNSPEC
}

/// Interface into whose peer [`third_peer`] delivers. The loader sets it.
#[unsafe(no_mangle)]
static PEER: aya_ebpf::Global<u32> = aya_ebpf::Global::new(0);
/// IPv4 address, wire order, whose packets [`third_peer`] delivers. The loader sets it.
#[unsafe(no_mangle)]
static PEER_ADDRESS: aya_ebpf::Global<u32> = aya_ebpf::Global::new(0);

/// Delivers packets to one pod straight into its network namespace, as Cilium's BPF host routing does.
#[classifier]
pub fn third_peer(ctx: TcContext) -> i32 {
    let is_ipv4 = ctx.load::<u16>(12).is_ok_and(|kind| kind == 0x0800_u16.to_be());
    if !is_ipv4 || ctx.load::<u32>(30).is_ok_and(|destination| destination != PEER_ADDRESS.load()) {
        return aya_ebpf::bindings::TC_ACT_UNSPEC;
    }
    // SAFETY: no pointer is passed.
    unsafe { aya_ebpf::helpers::bpf_redirect_peer(PEER.load(), 0) as i32 }
}

/// Header fields that [`wrap`] writes into the packet before each run. `BPF_PROG_TEST_RUN` does not restore the
/// packet between repetitions, so a program that rewrites packets would otherwise get its own output as input.
#[repr(C)]
struct Template {
    /// Source address, destination address, source port and destination port, in wire order and without gaps: 12
    /// bytes for IPv4, 36 for IPv6.
    ends: [u8; 36],
    /// TCP flags.
    flags: u8,
    /// IP version: 4 or 6.
    version: u8,
    /// Bit 0: use another TCP sequence number each time. Bit 1: give every flow its own client, by varying the last
    /// two bytes of the source address.
    vary: u8,
    pad: u8,
    /// Number of flows to cycle through; a power of two, at most 2^17.
    flows: u32,
    /// Number of runs so far.
    next: u32,
}

#[btf_map]
static TEMPLATE: PerCpuArray<Template, 1> = PerCpuArray::new();

/// The program under measurement, at index 0.
#[btf_map]
static MEASURED: ProgramArray<1> = ProgramArray::new();

/// Writes the headers of the next flow into the packet and tail-calls the program under measurement.
#[classifier]
pub fn wrap(ctx: TcContext) -> i32 {
    if let Some(template) = TEMPLATE.get_ptr_mut(0) {
        // SAFETY: the kernel returned a pointer to this CPU's value, and a test runs on one CPU.
        let template = unsafe { &mut *template };
        template.next = template.next.wrapping_add(1);
        // Multiplication by an odd number permutes the numbers below a power of two and spreads consecutive ones.
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
        // The tail call returns only if `MEASURED` is empty.
        // SAFETY: the context and the map are provided by the kernel.
        unsafe { MEASURED.tail_call(&ctx, 0) };
    }
    aya_ebpf::bindings::TC_ACT_UNSPEC
}

/// Does nothing. Its run time is the cost of calling a program.
#[classifier]
pub fn empty(_ctx: TcContext) -> i32 {
    aya_ebpf::bindings::TC_ACT_UNSPEC
}

#[cfg(not(test))]
#[panic_handler]
fn panic(_info: &core::panic::PanicInfo<'_>) -> ! {
    loop {}
}

/// The kernel provides GPL-only helpers to GPL programs only; see breaker-ebpf/src/main.rs.
#[unsafe(link_section = "license")]
#[unsafe(no_mangle)]
static LICENSE: [u8; 4] = *b"GPL\0";
