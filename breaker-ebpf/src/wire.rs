//! Everything that differs between IPv4 and IPv6 on the wire: where addresses are in a packet, and how they are
//! summed and hashed.

use aya_ebpf::bindings::{
    bpf_fib_lookup, bpf_fib_lookup__bindgen_ty_3, bpf_fib_lookup__bindgen_ty_4, bpf_redir_neigh,
    bpf_redir_neigh__bindgen_ty_1,
};
use breaker_common::{self as common, Address, csum};

/// Address families (include/linux/socket.h).
const AF_INET: u8 = 2;
const AF_INET6: u8 = 10;

/// An IPv4 address, read from memory as one native word. The maps declare addresses as bytes, which bpftool prints
/// readably.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
#[repr(transparent)]
pub struct V4(u32);

/// An IPv6 address, read from memory as four native words. (The compiler would split an array of bytes into pieces,
/// which do not fit on the stack.)
#[derive(Clone, Copy, Debug, Eq, PartialOrd, Ord, Hash)]
#[expect(clippy::derived_hash_with_manual_eq, reason = "`eq` compares the same words, without a branch for each")]
#[repr(transparent)]
pub struct V6([u32; 4]);

impl V4 {
    /// From a native word: the four bytes of the address as they lie in memory (wire order).
    #[inline(always)]
    pub fn from_word(word: u32) -> Self {
        Self(word)
    }

    #[inline(always)]
    pub fn word(self) -> u32 {
        self.0
    }
}

impl V6 {
    /// From native words: the bytes of the address as they lie in memory (wire order).
    #[inline(always)]
    pub fn from_words(words: [u32; 4]) -> Self {
        Self(words)
    }

    /// From bytes in wire order.
    #[inline(always)]
    pub fn from_bytes(b: [u8; 16]) -> Self {
        let word = |at: usize| u32::from_ne_bytes([b[at], b[at + 1], b[at + 2], b[at + 3]]);
        Self([word(0), word(4), word(8), word(12)])
    }

    #[inline(always)]
    pub fn in_words(self) -> [u32; 4] {
        self.0
    }

    /// The IPv4 address, if this is an IPv4-mapped address (RFC 4291, section 2.5.5.2).
    #[inline(always)]
    pub fn as_v4(self) -> Option<V4> {
        let [a, b, c, d] = self.0;
        if a | b == 0 && c == 0x0000_ffff_u32.to_be() { Some(V4(d)) } else { None }
    }
}

impl PartialEq for V6 {
    #[inline(always)]
    fn eq(&self, other: &Self) -> bool {
        let (a, b) = (self.0, other.0);
        (a[0] ^ b[0]) | (a[1] ^ b[1]) | (a[2] ^ b[2]) | (a[3] ^ b[3]) == 0
    }
}

impl Address for V4 {
    const ZERO: Self = Self(0);
    const VERSION: u8 = 4;

    #[inline(always)]
    fn folded(self) -> u64 {
        self.0 as u64
    }
}

impl Address for V6 {
    const ZERO: Self = Self([0; 4]);
    const VERSION: u8 = 6;

    #[inline(always)]
    fn folded(self) -> u64 {
        common::fold_words(self.0)
    }
}

/// An address family (IPv4 or IPv6). Offsets and lengths are in bytes.
pub trait Wire: Address {
    /// Offset of the source address in the IP header.
    const SOURCE_OFFSET: usize;
    /// Offset of the destination address in the IP header.
    const DESTINATION_OFFSET: usize;
    /// Length of the IP header without options and extension headers.
    const HEADER: usize;
    /// Offset of the checksum in the IP header, if the family has one.
    const CHECK_OFFSET: Option<usize>;
    /// Protocol number of the family's ICMP.
    const ICMP: u8;

    /// The sum of the address's 16-bit words, each read with its most significant byte first.
    fn words(self) -> u64;
    /// The difference to another address in the form that the kernel's checksum helpers take: a 32-bit one's
    /// complement sum in native byte order.
    fn csum_diff(self, to: Self) -> u32;
    /// The address as an IPv6 address; IPv4 in its mapped form (RFC 4291, section 2.5.5.2).
    fn mapped(self) -> V6;
    /// Identifies a client for limits: an IPv4 address in its mapped form, an IPv6 address with `mask` applied.
    fn client(self, mask: V6) -> V6;
    /// The address as the parameter of `bpf_redirect_neigh`.
    fn as_next_hop(self) -> bpf_redir_neigh;
    /// The next hop that a route look-up found; `None` if it has an address of the other family.
    fn next_hop_of(lookup: &bpf_fib_lookup) -> Option<Self>;
    /// Sets family and addresses in the parameters of a route look-up.
    fn fill_fib_lookup(lookup: &mut bpf_fib_lookup, source: Self, destination: Self);
}

impl Wire for V4 {
    const SOURCE_OFFSET: usize = 12;
    const DESTINATION_OFFSET: usize = 16;
    const HEADER: usize = 20;
    const CHECK_OFFSET: Option<usize> = Some(10);
    const ICMP: u8 = 1;

    #[inline(always)]
    fn words(self) -> u64 {
        csum::words4(self.0.to_ne_bytes())
    }

    #[inline(always)]
    fn csum_diff(self, to: Self) -> u32 {
        csum::sub32(to.0, self.0)
    }

    #[inline(always)]
    fn mapped(self) -> V6 {
        V6([0, 0, 0x0000_ffff_u32.to_be(), self.0])
    }

    #[inline(always)]
    fn client(self, _mask: V6) -> V6 {
        self.mapped()
    }

    #[inline(always)]
    fn as_next_hop(self) -> bpf_redir_neigh {
        // The whole union must be written: the helper reads all of it.
        let ipv6_nh = [self.0, 0, 0, 0];
        bpf_redir_neigh { nh_family: AF_INET as u32, __bindgen_anon_1: bpf_redir_neigh__bindgen_ty_1 { ipv6_nh } }
    }

    #[inline(always)]
    fn next_hop_of(lookup: &bpf_fib_lookup) -> Option<Self> {
        // SAFETY: the kernel wrote an address of the family that it names.
        (lookup.family == AF_INET).then_some(Self(unsafe { lookup.__bindgen_anon_4.ipv4_dst }))
    }

    #[inline(always)]
    fn fill_fib_lookup(lookup: &mut bpf_fib_lookup, source: Self, destination: Self) {
        lookup.family = AF_INET;
        lookup.__bindgen_anon_3 = bpf_fib_lookup__bindgen_ty_3 { ipv4_src: source.0 };
        lookup.__bindgen_anon_4 = bpf_fib_lookup__bindgen_ty_4 { ipv4_dst: destination.0 };
    }
}

impl Wire for V6 {
    const SOURCE_OFFSET: usize = 8;
    const DESTINATION_OFFSET: usize = 24;
    const HEADER: usize = 40;
    const CHECK_OFFSET: Option<usize> = None;
    const ICMP: u8 = 58;

    #[inline(always)]
    fn words(self) -> u64 {
        // On a little-endian CPU the sum of the native half-words is the wire-order sum with its bytes swapped (RFC
        // 1071, section 2.B).
        let sum: u64 = self.0.into_iter().map(|word| (word & 0xffff) as u64 + (word >> 16) as u64).sum();
        u16::from_be(csum::fold(sum)) as u64
    }

    #[inline(always)]
    fn csum_diff(self, to: Self) -> u32 {
        let (from, to) = (self.0, to.0);
        let mut sum = 0;
        for i in 0..4 {
            sum = csum::add32(sum, csum::sub32(to[i], from[i]));
        }
        sum
    }

    #[inline(always)]
    fn mapped(self) -> V6 {
        self
    }

    #[inline(always)]
    fn client(self, mask: V6) -> V6 {
        let (words, mask) = (self.0, mask.0);
        V6([words[0] & mask[0], words[1] & mask[1], words[2] & mask[2], words[3] & mask[3]])
    }

    #[inline(always)]
    fn as_next_hop(self) -> bpf_redir_neigh {
        let ipv6_nh = self.0;
        bpf_redir_neigh { nh_family: AF_INET6 as u32, __bindgen_anon_1: bpf_redir_neigh__bindgen_ty_1 { ipv6_nh } }
    }

    #[inline(always)]
    fn next_hop_of(lookup: &bpf_fib_lookup) -> Option<Self> {
        // SAFETY: as for IPv4.
        (lookup.family == AF_INET6).then_some(Self(unsafe { lookup.__bindgen_anon_4.ipv6_dst }))
    }

    #[inline(always)]
    fn fill_fib_lookup(lookup: &mut bpf_fib_lookup, source: Self, destination: Self) {
        lookup.family = AF_INET6;
        lookup.__bindgen_anon_3 = bpf_fib_lookup__bindgen_ty_3 { ipv6_src: source.0 };
        lookup.__bindgen_anon_4 = bpf_fib_lookup__bindgen_ty_4 { ipv6_dst: destination.0 };
    }
}
