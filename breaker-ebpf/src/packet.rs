//! Bounds-checked access to a packet's bytes. The raw pointers of the packet path live here.
//!
//! A pointer that this module returned is void after a helper that may move the packet (`bpf_skb_change_tail`,
//! `bpf_skb_pull_data`, `bpf_l4_csum_replace`, …); the verifier refuses a program that forgets it.

use core::arch::asm;

use aya_ebpf::{
    bindings::{BPF_F_PSEUDO_HDR, bpf_adj_room_mode::BPF_ADJ_ROOM_MAC},
    helpers::{
        bpf_clone_redirect, bpf_csum_update, bpf_l4_csum_replace, bpf_redirect, bpf_redirect_neigh, bpf_redirect_peer,
        bpf_skb_adjust_room, bpf_skb_change_tail, bpf_skb_change_type, bpf_skb_pull_data, bpf_xdp_adjust_head,
        bpf_xdp_adjust_tail,
    },
    programs::{TcContext, XdpContext},
};
use breaker_common::exit;

/// A packet's bytes from its Ethernet header on, and how its length changes.
pub trait Frame {
    /// Where the linear part starts. Read anew each time: the compiler would keep 32 bits of it for another place, and make 64
    /// of them there, which to the verifier is a number and no pointer any more.
    fn data(&self) -> usize;

    /// Where the linear part ends; see [`Frame::data`].
    fn data_end(&self) -> usize;

    /// The whole length in bytes, data outside of the linear part included.
    fn len(&self) -> u32;

    /// Brings the first `len` bytes into the linear part.
    fn pull(&self, len: u32) -> Option<()>;

    /// Cuts the packet to `len` bytes.
    fn cut(&self, len: u32) -> Option<()>;

    /// Makes room between the Ethernet and the IP header. The Ethernet header must be written anew.
    fn make_room(&self, len: u32) -> Option<()>;

    /// Whether the TCP checksum at `offset` is left to the device (CHECKSUM_PARTIAL: only the pseudo header is in it). What is
    /// there is lost.
    fn is_partial(&self, offset: usize) -> Option<bool>;

    /// A pointer to a `T` at `offset` in the linear part, or `None` where it does not end there.
    #[inline(always)]
    fn at<T>(&self, offset: usize) -> Option<*mut T> {
        let mut start = self.data() + offset;
        // The compiler must not take this sum apart again: the verifier knows the bounds of the very pointer that was
        // compared, and of no other that happens to come to the same.
        // SAFETY: a register to itself. (No instruction at all would leave a line of debug information about nothing, which
        // the kernel refuses.)
        unsafe { asm!("{0} = {0}", inout(reg) start, options(pure, nomem, nostack)) };
        if start + size_of::<T>() > self.data_end() {
            return None;
        }
        Some(start as *mut T)
    }

    /// Copies a `T` out of the linear part. The compiler is told that it is aligned, and may well be wrong: it takes a byte
    /// at a time otherwise. Loads and stores in a packet need no alignment where the kernel has
    /// CONFIG_HAVE_EFFICIENT_UNALIGNED_ACCESS (x86-64, arm64, …), and elsewhere the verifier refuses them.
    #[inline(always)]
    fn read<T: Copy>(&self, offset: usize) -> Option<T> {
        // SAFETY: `at` checked the bounds; any bytes are a value; see above on alignment.
        self.at::<T>(offset).map(|p| unsafe { *p })
    }

    /// Writes a `T` into the linear part (writable: the verifier puts a prologue before such programs).
    #[inline(always)]
    fn write<T: Copy>(&self, offset: usize, value: T) -> Option<()> {
        // SAFETY: `at` checked the bounds; as for `read`.
        self.at::<T>(offset).map(|p| unsafe { *p = value })
    }
}

/// A packet on a tc hook.
pub struct Packet<'a> {
    ctx: &'a TcContext,
}

impl Frame for Packet<'_> {
    #[inline(always)]
    fn data(&self) -> usize {
        // SAFETY: the context is valid for the run of the program.
        unsafe { (&raw const (*self.ctx.skb.skb).data).read_volatile() as usize }
    }

    #[inline(always)]
    fn data_end(&self) -> usize {
        // SAFETY: as above.
        unsafe { (&raw const (*self.ctx.skb.skb).data_end).read_volatile() as usize }
    }

    #[inline(always)]
    fn len(&self) -> u32 {
        self.ctx.len()
    }

    #[inline(always)]
    fn pull(&self, len: u32) -> Option<()> {
        // SAFETY: the context is valid; pointers into the packet are made anew by `at`.
        let ret = unsafe { bpf_skb_pull_data(self.ctx.skb.skb, len) };
        (ret == 0).then_some(())
    }

    #[inline(always)]
    fn cut(&self, len: u32) -> Option<()> {
        // SAFETY: as for `pull`.
        let ret = unsafe { bpf_skb_change_tail(self.ctx.skb.skb, len, 0) };
        (ret == 0).then_some(())
    }

    #[inline(always)]
    fn make_room(&self, len: u32) -> Option<()> {
        // SAFETY: as for `pull`.
        let ret = unsafe { bpf_skb_adjust_room(self.ctx.skb.skb, len as i32, BPF_ADJ_ROOM_MAC, 0) };
        (ret == 0).then_some(())
    }

    /// A program cannot ask, but the helper for a changed port knows: it leaves a partial checksum alone and changes any other.
    #[inline(always)]
    fn is_partial(&self, offset: usize) -> Option<bool> {
        const PROBE: [u8; 2] = [0x12, 0x34];
        self.write(offset, PROBE)?;
        self.payload_changed(offset, [0, 0], [0, 1])?;
        Some(self.read::<[u8; 2]>(offset)? == PROBE)
    }
}

impl<'a> Packet<'a> {
    #[inline(always)]
    pub fn new(ctx: &'a TcContext) -> Self {
        Self { ctx }
    }

    /// The context, for what wants one.
    #[inline(always)]
    pub fn context(&self) -> &TcContext {
        self.ctx
    }

    /// Index of the interface that the hook is on.
    #[inline(always)]
    pub fn ifindex(&self) -> u32 {
        // SAFETY: the context is valid for the run of the program.
        unsafe { (*self.ctx.skb.skb).ifindex }
    }

    /// Sets a bit of the packet's mark, and leaves the others to their owners.
    #[inline(always)]
    pub fn add_mark(&self, bits: u32) {
        // SAFETY: the context is valid for the run of the program.
        let mark = unsafe { (*self.ctx.skb.skb).mark };
        self.ctx.set_mark(mark | bits);
    }

    /// Tells the TCP or UDP checksum at `offset` that the pseudo header changed by `difference` (see
    /// [`crate::family::Family::difference`]). The helper knows whether the checksum is complete, or left to the device
    /// (CHECKSUM_PARTIAL: only the pseudo header is in it), or whether the device's own sum must follow
    /// (CHECKSUM_COMPLETE).
    #[inline(always)]
    pub fn pseudo_changed(&self, offset: usize, difference: u32) -> Option<()> {
        // SAFETY: as for `pull`.
        let ret = unsafe {
            bpf_l4_csum_replace(self.ctx.skb.skb, offset as u32, 0, difference as u64, BPF_F_PSEUDO_HDR as u64)
        };
        (ret == 0).then_some(())
    }

    /// Adds to the device's own sum over the packet (CHECKSUM_COMPLETE), where it made one. IPv6 has no header checksum
    /// that would make up for a changed address, and [`Packet::pseudo_changed`] reckons with one (kernel commit
    /// ead7f9b8de65 has the story).
    #[inline(always)]
    pub fn sum_changed(&self, difference: u32) {
        // SAFETY: as for `pull`. It fails where there is no such sum, and then there is nothing to do.
        let _ = unsafe { bpf_csum_update(self.ctx.skb.skb, difference) };
    }

    /// Tells the TCP or UDP checksum at `offset` that two bytes under it changed (a port).
    #[inline(always)]
    pub fn payload_changed(&self, offset: usize, from: [u8; 2], to: [u8; 2]) -> Option<()> {
        let (from, to) = (u16::from_ne_bytes(from) as u64, u16::from_ne_bytes(to) as u64);
        // SAFETY: as for `pull`.
        let ret = unsafe { bpf_l4_csum_replace(self.ctx.skb.skb, offset as u32, from, to, 2) };
        (ret == 0).then_some(())
    }

    /// Sends the packet out of its own interface; the value is the verdict for the kernel.
    #[inline(always)]
    pub fn send_back(&self) -> i32 {
        // SAFETY: no pointer is passed.
        unsafe { bpf_redirect(self.ifindex(), 0) as i32 }
    }

    /// Sends the packet past the stack: out of an interface, to the neighbor that the routes name (the kernel writes its MAC
    /// address), or into the network namespace behind a veth, as if it had come in there. The value is the verdict for the
    /// kernel. (A frame that goes into a namespace is for the node's or the bridge's address; that a pod's stack takes it goes by
    /// the packet's type, which kernels before 6.15 leave as it is.)
    #[inline(always)]
    pub fn send_by(&self, exit: u32) -> i32 {
        const PACKET_HOST: u32 = 0;
        // SAFETY: the context is valid; pointers into the packet are not used any more; no parameters say: look up the neighbor.
        unsafe {
            if exit & exit::NEIGHBOR != 0 {
                return bpf_redirect_neigh(exit & !exit::NEIGHBOR, core::ptr::null_mut(), 0, 0) as i32;
            }
            bpf_skb_change_type(self.ctx.skb.skb, PACKET_HOST);
            bpf_redirect_peer(exit, 0) as i32
        }
    }

    /// Sends a copy of the packet out of its own interface.
    #[inline(always)]
    pub fn send_copy_back(&self) -> Option<()> {
        // SAFETY: as for `pull`.
        let ret = unsafe { bpf_clone_redirect(self.ctx.skb.skb, self.ifindex(), 0) };
        (ret == 0).then_some(())
    }
}

/// A packet as the driver got it, before the stack. On a veth its checksum may be a partial one, and nothing says so; what is
/// written here is whole.
pub struct WirePacket<'a> {
    ctx: &'a XdpContext,
}

impl<'a> WirePacket<'a> {
    #[inline(always)]
    pub fn new(ctx: &'a XdpContext) -> Self {
        Self { ctx }
    }
}

impl Frame for WirePacket<'_> {
    #[inline(always)]
    fn data(&self) -> usize {
        // SAFETY: the context is valid for the run of the program.
        unsafe { (&raw const (*self.ctx.ctx).data).read_volatile() as usize }
    }

    #[inline(always)]
    fn data_end(&self) -> usize {
        // SAFETY: as above.
        unsafe { (&raw const (*self.ctx.ctx).data_end).read_volatile() as usize }
    }

    #[inline(always)]
    fn len(&self) -> u32 {
        let mut length = self.data_end();
        // In the machine's own words: the compiler would do it with halves of the pointers, which the verifier forbids.
        // SAFETY: registers only.
        unsafe { asm!("{0} -= {1}", inout(reg) length, in(reg) self.data(), options(pure, nomem, nostack)) };
        length as u32
    }

    /// All of it is linear.
    #[inline(always)]
    fn pull(&self, _len: u32) -> Option<()> {
        None
    }

    #[inline(always)]
    fn cut(&self, len: u32) -> Option<()> {
        let by = len as i32 - self.len() as i32;
        // SAFETY: the context is valid; pointers into the packet are made anew by `at`.
        (unsafe { bpf_xdp_adjust_tail(self.ctx.ctx, by) } == 0).then_some(())
    }

    /// At the front: what is behind stays where it is.
    #[inline(always)]
    fn make_room(&self, len: u32) -> Option<()> {
        // SAFETY: as for `cut`.
        (unsafe { bpf_xdp_adjust_head(self.ctx.ctx, -(len as i32)) } == 0).then_some(())
    }

    #[inline(always)]
    fn is_partial(&self, _offset: usize) -> Option<bool> {
        Some(false)
    }
}
