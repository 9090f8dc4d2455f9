//! Bounds-checked access to a packet's bytes. The raw pointers of the packet path live here.
//!
//! A pointer that this module returned is void after a helper that may move the packet (`bpf_skb_change_tail`,
//! `bpf_skb_pull_data`, `bpf_l4_csum_replace`, …); the verifier refuses a program that forgets it.

use aya_ebpf::{
    bindings::BPF_F_PSEUDO_HDR,
    helpers::{bpf_clone_redirect, bpf_l4_csum_replace, bpf_redirect, bpf_skb_change_tail, bpf_skb_pull_data},
    programs::TcContext,
};

/// A packet on a tc hook, from its Ethernet header on.
pub struct Packet<'a> {
    ctx: &'a TcContext,
}

impl<'a> Packet<'a> {
    #[inline(always)]
    pub fn new(ctx: &'a TcContext) -> Self {
        Self { ctx }
    }

    /// The whole length in bytes, data outside of the linear part included.
    #[inline(always)]
    pub fn len(&self) -> u32 {
        self.ctx.len()
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

    /// A pointer to a `T` at `offset` in the linear part, or `None` where it does not end there.
    #[inline(always)]
    pub fn at<T>(&self, offset: usize) -> Option<*mut T> {
        let start = self.ctx.data();
        if start + offset + size_of::<T>() > self.ctx.data_end() {
            return None;
        }
        Some((start + offset) as *mut T)
    }

    /// Copies a `T` out of the linear part.
    #[inline(always)]
    pub fn read<T: Copy>(&self, offset: usize) -> Option<T> {
        // SAFETY: `at` checked the bounds; packed and byte-array types only, the read is unaligned anyway.
        self.at::<T>(offset).map(|p| unsafe { p.read_unaligned() })
    }

    /// Writes a `T` into the linear part (writable: the verifier puts a prologue before such programs).
    #[inline(always)]
    pub fn write<T: Copy>(&self, offset: usize, value: T) -> Option<()> {
        // SAFETY: `at` checked the bounds.
        self.at::<T>(offset).map(|p| unsafe { p.write_unaligned(value) })
    }

    /// Brings the first `len` bytes into the linear part.
    #[inline(always)]
    pub fn pull(&self, len: u32) -> Option<()> {
        // SAFETY: the context is valid; pointers into the packet are made anew by `at`.
        let ret = unsafe { bpf_skb_pull_data(self.ctx.skb.skb, len) };
        (ret == 0).then_some(())
    }

    /// Cuts the packet to `len` bytes.
    #[inline(always)]
    pub fn cut(&self, len: u32) -> Option<()> {
        // SAFETY: as for `pull`.
        let ret = unsafe { bpf_skb_change_tail(self.ctx.skb.skb, len, 0) };
        (ret == 0).then_some(())
    }

    /// Tells the TCP checksum at `offset` that four bytes of the pseudo header changed (an address). The helper knows
    /// whether the checksum is complete, or left to the device (CHECKSUM_PARTIAL: only the pseudo header is in it), or
    /// whether the device's own sum must follow (CHECKSUM_COMPLETE).
    #[inline(always)]
    pub fn pseudo_changed(&self, offset: usize, from: [u8; 4], to: [u8; 4]) -> Option<()> {
        let (from, to) = (u32::from_ne_bytes(from) as u64, u32::from_ne_bytes(to) as u64);
        // SAFETY: as for `pull`.
        let ret =
            unsafe { bpf_l4_csum_replace(self.ctx.skb.skb, offset as u32, from, to, BPF_F_PSEUDO_HDR as u64 | 4) };
        (ret == 0).then_some(())
    }

    /// Tells the TCP checksum at `offset` that two bytes under it changed (a port).
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

    /// Sends a copy of the packet out of its own interface.
    #[inline(always)]
    pub fn send_copy_back(&self) -> Option<()> {
        // SAFETY: as for `pull`.
        let ret = unsafe { bpf_clone_redirect(self.ctx.skb.skb, self.ifindex(), 0) };
        (ret == 0).then_some(())
    }
}
