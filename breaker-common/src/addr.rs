//! IP addresses and protocol numbers.

/// IPPROTO_TCP (RFC 9293).
pub const PROTO_TCP: u8 = 6;

/// IPPROTO_UDP (RFC 768).
pub const PROTO_UDP: u8 = 17;

/// An IP address in wire order, as a packet contains it. Every map that is keyed by addresses exists once per IP
/// family, with the family's version (4 or 6) at the end of its name.
pub trait Address: Copy + Eq + Ord + core::hash::Hash + core::fmt::Debug + 'static {
    /// The address with all bits zero.
    const ZERO: Self;
    /// IP version: 4 or 6.
    const VERSION: u8;

    /// Folds the address to 64 bits for hashing. The input is the address as 32-bit words in native byte order, so a
    /// type that stores words and a type that stores bytes give the same result.
    fn folded(self) -> u64;
}

/// Folds the four words of an IPv6 address to 64 bits; see [`Address::folded`].
#[inline(always)]
#[must_use]
pub const fn fold_words(words: [u32; 4]) -> u64 {
    let [a, b, c, d] = words;
    (((a as u64) << 32) | b as u64).wrapping_mul(GOLDEN) ^ (((c as u64) << 32) | d as u64)
}

/// 2^64 divided by the golden ratio, an odd number. Multiplication by it spreads similar values over the 64-bit
/// range (Fibonacci hashing).
pub(crate) const GOLDEN: u64 = 0x9e37_79b9_7f4a_7c15;

/// An IPv4 address in a map. Aligned to 4 bytes, because the programs access it as one 32-bit word.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
#[repr(C, align(4))]
pub struct V4 {
    /// The address in wire order.
    pub bytes: [u8; 4],
}

/// An IPv6 address in a map. Aligned to 4 bytes, because the programs access it as four 32-bit words.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
#[repr(C, align(4))]
pub struct V6 {
    /// The address in wire order.
    pub bytes: [u8; 16],
}

impl V4 {
    /// Makes an address from its bytes in wire order.
    #[inline(always)]
    #[must_use]
    pub const fn new(bytes: [u8; 4]) -> Self {
        Self { bytes }
    }
}

impl V6 {
    /// Makes an address from its bytes in wire order.
    #[inline(always)]
    #[must_use]
    pub const fn new(bytes: [u8; 16]) -> Self {
        Self { bytes }
    }
}

impl core::fmt::Debug for V4 {
    fn fmt(&self, f: &mut core::fmt::Formatter<'_>) -> core::fmt::Result {
        core::fmt::Display::fmt(&core::net::Ipv4Addr::from(self.bytes), f)
    }
}

impl core::fmt::Debug for V6 {
    fn fmt(&self, f: &mut core::fmt::Formatter<'_>) -> core::fmt::Result {
        core::fmt::Display::fmt(&core::net::Ipv6Addr::from(self.bytes), f)
    }
}

impl Address for V4 {
    const ZERO: Self = Self::new([0; 4]);
    const VERSION: u8 = 4;

    #[inline(always)]
    fn folded(self) -> u64 {
        u32::from_ne_bytes(self.bytes) as u64
    }
}

impl Address for V6 {
    const ZERO: Self = Self::new([0; 16]);
    const VERSION: u8 = 6;

    #[inline(always)]
    fn folded(self) -> u64 {
        let word = |at: usize| {
            u32::from_ne_bytes([self.bytes[at], self.bytes[at + 1], self.bytes[at + 2], self.bytes[at + 3]])
        };
        fold_words([word(0), word(4), word(8), word(12)])
    }
}
