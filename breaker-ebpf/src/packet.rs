//! Bounds-checked access to a packet's bytes. The raw pointers of the packet path live in this module.
//!
//! A pointer from this module is invalid after a helper that may move the packet (`bpf_skb_change_tail`,
//! `bpf_skb_pull_data`, `bpf_l4_csum_replace`, …). The verifier rejects a program that uses it afterwards.

use core::arch::asm;

use aya_ebpf::{
    bindings::{BPF_F_INGRESS, BPF_F_PSEUDO_HDR, bpf_adj_room_mode::BPF_ADJ_ROOM_MAC, bpf_redir_neigh, bpf_xfrm_state},
    helpers::{
        bpf_clone_redirect, bpf_csum_update, bpf_l4_csum_replace, bpf_redirect, bpf_redirect_neigh, bpf_redirect_peer,
        bpf_skb_adjust_room, bpf_skb_change_tail, bpf_skb_change_type, bpf_skb_get_xfrm_state, bpf_skb_pull_data,
        bpf_xdp_adjust_head, bpf_xdp_adjust_tail,
    },
    programs::{TcContext, XdpContext},
};
/// Access to a packet's bytes, and changes of its length. All offsets and lengths are in bytes from the Ethernet
/// header on.
pub trait Frame {
    /// Address of the start of the linear part. Volatile read: otherwise LLVM keeps the 32-bit field for a later
    /// use and extends it to 64 bits there; the verifier then sees a number instead of a packet pointer.
    fn data(&self) -> usize;

    /// Address of the end of the linear part. Volatile read, as in [`Frame::data`].
    fn data_end(&self) -> usize;

    /// Length of the whole packet in bytes, including data outside of the linear part.
    fn len(&self) -> u32;

    /// Makes the first `len` bytes of the packet linear. `None` if the kernel cannot.
    fn pull(&self, len: u32) -> Option<()>;

    /// Truncates the packet to `len` bytes. `None` if the kernel cannot.
    fn cut(&self, len: u32) -> Option<()>;

    /// Inserts `len` bytes between the Ethernet header and the IP header. The caller must rewrite the Ethernet
    /// header afterwards. `None` if the kernel cannot.
    fn make_room(&self, len: u32) -> Option<()>;

    /// Whether the TCP checksum at `offset` is partial (CHECKSUM_PARTIAL): it covers the pseudo header only, and
    /// the device adds the rest. May overwrite the checksum.
    fn probe_is_partial(&self, offset: usize) -> Option<bool>;

    /// A pointer to a `T` at `offset` in the linear part, or `None` if the `T` would reach beyond its end.
    #[inline(always)]
    fn at<T>(&self, offset: usize) -> Option<*mut T> {
        let mut start = self.data() + offset;
        // The compiler must not split this sum again: the verifier knows the bounds only of the very register that
        // is compared, not of another one with the same value.
        // SAFETY: the instruction assigns a register to itself. (Without any instruction, the debug information
        // would hold a line without code, which the kernel rejects.)
        unsafe { asm!("{0} = {0}", inout(reg) start, options(pure, nomem, nostack)) };
        if start + size_of::<T>() > self.data_end() {
            return None;
        }
        Some(start as *mut T)
    }

    /// Copies a `T` out of the linear part.
    ///
    /// The compiler assumes that the `T` is aligned, which may be false; otherwise it would read one byte at a
    /// time. Packet access needs no alignment on kernels with CONFIG_HAVE_EFFICIENT_UNALIGNED_ACCESS (x86-64,
    /// arm64, …); on other kernels the verifier rejects the program.
    #[inline(always)]
    fn read<T: Copy>(&self, offset: usize) -> Option<T> {
        // SAFETY: `at` checked the bounds; any bytes are a valid value; see above on alignment.
        self.at::<T>(offset).map(|p| unsafe { *p })
    }

    /// Writes a `T` into the linear part, which is writable: in front of programs that write, the kernel puts a
    /// prologue that makes it so.
    #[inline(always)]
    fn write<T: Copy>(&self, offset: usize, value: T) -> Option<()> {
        // SAFETY: `at` checked the bounds; see `read` on alignment.
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
        // SAFETY: the context is valid; no pointer into the packet is kept: each access gets a new one from `at`.
        let ret = unsafe { bpf_skb_pull_data(self.ctx.skb.skb, len) };
        (ret == 0).then_some(())
    }

    #[inline(always)]
    fn cut(&self, len: u32) -> Option<()> {
        // SAFETY: as in `pull`.
        let ret = unsafe { bpf_skb_change_tail(self.ctx.skb.skb, len, 0) };
        (ret == 0).then_some(())
    }

    #[inline(always)]
    fn make_room(&self, len: u32) -> Option<()> {
        // SAFETY: as in `pull`.
        let ret = unsafe { bpf_skb_adjust_room(self.ctx.skb.skb, len as i32, BPF_ADJ_ROOM_MAC, 0) };
        (ret == 0).then_some(())
    }

    /// Overwrites the checksum. A program cannot read its kind, but the helper for a changed port depends on it: it
    /// leaves a partial checksum unchanged and changes any other.
    #[inline(always)]
    fn probe_is_partial(&self, offset: usize) -> Option<bool> {
        const PROBE: [u8; 2] = [0x12, 0x34];
        self.write(offset, PROBE)?;
        self.update_csum_for_port(offset, [0, 0], [0, 1])?;
        Some(self.read::<[u8; 2]>(offset)? == PROBE)
    }
}

impl<'a> Packet<'a> {
    #[inline(always)]
    pub fn new(ctx: &'a TcContext) -> Self {
        Self { ctx }
    }

    /// The context, for helpers and macros that need it.
    #[inline(always)]
    pub fn context(&self) -> &TcContext {
        self.ctx
    }

    /// Index of the interface that the hook belongs to.
    #[inline(always)]
    pub fn ifindex(&self) -> u32 {
        // SAFETY: the context is valid for the run of the program.
        unsafe { (*self.ctx.skb.skb).ifindex }
    }

    /// Sets bits in the packet's mark; the other bits keep their values.
    #[inline(always)]
    pub fn add_mark(&self, bits: u32) {
        // SAFETY: the context is valid for the run of the program.
        let mark = unsafe { (*self.ctx.skb.skb).mark };
        self.ctx.set_mark(mark | bits);
    }

    /// Updates the TCP or UDP checksum at `offset` after the pseudo header changed by `difference` (see
    /// [`crate::wire::Wire::csum_diff`]). The helper knows whether the checksum is complete or partial
    /// (CHECKSUM_PARTIAL: it covers the pseudo header only, and the device adds the rest), and whether the device's
    /// own sum over the packet must change with it (CHECKSUM_COMPLETE).
    #[inline(always)]
    pub fn update_csum_for_addr(&self, offset: usize, difference: u32) -> Option<()> {
        // SAFETY: as in `pull`.
        let ret = unsafe {
            bpf_l4_csum_replace(self.ctx.skb.skb, offset as u32, 0, difference as u64, BPF_F_PSEUDO_HDR as u64)
        };
        (ret == 0).then_some(())
    }

    /// Adds `difference` to the device's own sum over the packet (CHECKSUM_COMPLETE), if there is one. Needed for
    /// IPv6: [`Packet::update_csum_for_addr`] assumes that a header checksum makes up for the changed address, and IPv6
    /// has none (kernel commit ead7f9b8de65 explains it).
    #[inline(always)]
    pub fn update_complete_csum(&self, difference: u32) {
        // SAFETY: as in `pull`. The helper fails if the device made no sum, and then nothing needs to be done.
        let _ = unsafe { bpf_csum_update(self.ctx.skb.skb, difference) };
    }

    /// Updates the TCP or UDP checksum at `offset` after two bytes of its data changed (a port, wire order).
    #[inline(always)]
    pub fn update_csum_for_port(&self, offset: usize, from: [u8; 2], to: [u8; 2]) -> Option<()> {
        let (from, to) = (u16::from_ne_bytes(from) as u64, u16::from_ne_bytes(to) as u64);
        // SAFETY: as in `pull`.
        let ret = unsafe { bpf_l4_csum_replace(self.ctx.skb.skb, offset as u32, from, to, 2) };
        (ret == 0).then_some(())
    }

    /// Redirects the packet out of its own interface. Returns the action for the kernel.
    #[inline(always)]
    pub fn redirect_back(&self) -> i32 {
        // SAFETY: no pointer is passed.
        unsafe { bpf_redirect(self.ifindex(), 0) as i32 }
    }

    /// Redirects the packet out of an interface to a next hop, so that it bypasses the network stack. The kernel writes
    /// the MAC address. Returns the action for the kernel.
    #[inline(always)]
    pub fn redirect_to_neighbor(&self, interface: u32, next_hop: &bpf_redir_neigh) -> i32 {
        // SAFETY: the helper only reads the parameters, whose size is given.
        unsafe {
            bpf_redirect_neigh(interface, (&raw const *next_hop).cast_mut(), size_of::<bpf_redir_neigh>() as i32, 0)
                as i32
        }
    }

    /// Redirects the packet into the network namespace behind a veth, as if it had arrived there. Returns the action for
    /// the kernel.
    ///
    /// The frame is still addressed to the MAC address of the node or the bridge. The pod's stack accepts it by its
    /// packet type, which kernels before 6.15 leave unchanged, so the program sets it.
    #[inline(always)]
    pub fn redirect_to_peer(&self, interface: u32) -> i32 {
        const PACKET_HOST: u32 = 0;
        // SAFETY: the context is valid; no pointer into the packet is used afterwards.
        unsafe {
            bpf_skb_change_type(self.ctx.skb.skb, PACKET_HOST);
            bpf_redirect_peer(interface, 0) as i32
        }
    }

    /// Whether the packet was decrypted by IPsec (in whatever mode). BPF subprogram (not inlined), for a stack frame of
    /// its own: see [`crate::hook::from_client`].
    #[inline(never)]
    pub fn came_by_ipsec(&self) -> bool {
        // SAFETY: the struct holds only integers, for which zero is a valid value.
        let mut state: bpf_xfrm_state = unsafe { core::mem::zeroed() };
        let size = size_of::<bpf_xfrm_state>() as u32;
        // SAFETY: the context is valid; the kernel writes no more than `size` bytes.
        unsafe { bpf_skb_get_xfrm_state(self.ctx.skb.skb, 0, &raw mut state, size, 0) == 0 }
    }

    /// Sends a copy of the packet out of its own interface. `None` if the kernel cannot.
    #[inline(always)]
    pub fn send_copy_back(&self) -> Option<()> {
        self.send_copy(self.ifindex())
    }

    /// Sends a copy of the packet out of an interface. `None` if the kernel cannot.
    #[inline(always)]
    pub fn send_copy(&self, interface: u32) -> Option<()> {
        // SAFETY: as in `pull`.
        let ret = unsafe { bpf_clone_redirect(self.ctx.skb.skb, interface, 0) };
        (ret == 0).then_some(())
    }

    /// Has the packet's own interface receive a copy of the packet, which passes the programs of its own. `None` if the
    /// kernel cannot.
    #[inline(always)]
    pub fn receive_copy(&self) -> Option<()> {
        // SAFETY: as in `pull`.
        let ret = unsafe { bpf_clone_redirect(self.ctx.skb.skb, self.ifindex(), BPF_F_INGRESS as u64) };
        (ret == 0).then_some(())
    }
}

/// A packet in the driver, before the network stack. On a veth its checksum may be partial, and an XDP program cannot
/// find that out. Checksums that breaker writes here are complete.
pub struct XdpPacket<'a> {
    ctx: &'a XdpContext,
}

impl<'a> XdpPacket<'a> {
    #[inline(always)]
    pub fn new(ctx: &'a XdpContext) -> Self {
        Self { ctx }
    }
}

impl Frame for XdpPacket<'_> {
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
        // Subtracts by a machine instruction: the compiler would subtract 32-bit halves of the pointers, which the
        // verifier rejects.
        // SAFETY: the instruction uses registers only.
        unsafe { asm!("{0} -= {1}", inout(reg) length, in(reg) self.data(), options(pure, nomem, nostack)) };
        length as u32
    }

    /// Always `None`: an XDP packet has no bytes outside of its linear part.
    #[inline(always)]
    fn pull(&self, _len: u32) -> Option<()> {
        None
    }

    #[inline(always)]
    fn cut(&self, len: u32) -> Option<()> {
        let by = len as i32 - self.len() as i32;
        // SAFETY: the context is valid; no pointer into the packet is kept: each access gets a new one from `at`.
        (unsafe { bpf_xdp_adjust_tail(self.ctx.ctx, by) } == 0).then_some(())
    }

    /// Inserts the bytes in front of the packet: the bytes behind the Ethernet header keep their place.
    #[inline(always)]
    fn make_room(&self, len: u32) -> Option<()> {
        // SAFETY: as in `cut`.
        (unsafe { bpf_xdp_adjust_head(self.ctx.ctx, -(len as i32)) } == 0).then_some(())
    }

    /// Always `Some(false)`: the checksums that breaker writes here are complete.
    #[inline(always)]
    fn probe_is_partial(&self, _offset: usize) -> Option<bool> {
        Some(false)
    }
}
