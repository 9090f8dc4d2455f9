//! Internet checksum arithmetic (RFC 1071, RFC 1624). Pure functions, which the tests also compile for the host.

/// Folds a sum of 16-bit words to 16 bits; the carries are added back in.
#[inline(always)]
pub fn fold(sum: u64) -> u16 {
    let sum = (sum & 0xffff_ffff) + (sum >> 32);
    let sum = (sum & 0xffff) + (sum >> 16);
    let sum = (sum & 0xffff) + (sum >> 16);
    let sum = (sum & 0xffff) + (sum >> 16);
    sum as u16
}

/// The checksum after 16-bit words that summed up to `old` were replaced by words that sum up to `new` (RFC 1624,
/// equation 3). All values are in host byte order. The byte order does not affect the sum (RFC 1071, section 2.B).
#[inline(always)]
pub fn replaced(check: u16, old: u64, new: u64) -> u16 {
    // In one's complement, subtracting a number is adding its complement. `old` is folded first to fit into 16 bits.
    !fold((!check) as u64 + (!fold(old)) as u64 + new)
}

/// [`replaced`] for UDP, where a checksum of zero means that there is no checksum (RFC 768): zero stays zero, and a
/// result of zero becomes 0xffff, its other representation.
#[inline(always)]
pub fn replaced_udp(check: u16, old: u64, new: u64) -> u16 {
    if check == 0 {
        return 0;
    }
    match replaced(check, old, new) {
        0 => 0xffff,
        check => check,
    }
}

/// Two bytes in wire order as a number.
#[inline(always)]
pub fn word(bytes: [u8; 2]) -> u64 {
    u16::from_be_bytes(bytes) as u64
}

/// The sum of the two 16-bit words in four bytes (wire order).
#[inline(always)]
pub fn words4(bytes: [u8; 4]) -> u64 {
    u16::from_be_bytes([bytes[0], bytes[1]]) as u64 + u16::from_be_bytes([bytes[2], bytes[3]]) as u64
}

/// The kernel's `csum_add`: adds two 32-bit sums; the carry is added back in.
#[inline(always)]
pub fn add32(a: u32, b: u32) -> u32 {
    let sum = a.wrapping_add(b);
    sum.wrapping_add((sum < b) as u32)
}

/// The kernel's `csum_sub`: `a` minus `b` in one's complement.
#[inline(always)]
pub fn sub32(a: u32, b: u32) -> u32 {
    add32(a, !b)
}

/// The kernel's `~csum_fold`: a 32-bit sum folded to 16 bits.
#[inline(always)]
fn fold32(sum: u32) -> u16 {
    let sum = (sum & 0xffff) + (sum >> 16);
    ((sum & 0xffff) + (sum >> 16)) as u16
}

/// The value to which `inet_proto_csum_replace_by_diff` (net/core/utils.c) changes a complete checksum when the
/// pseudo header changes by `difference`. Exact to the bit; all values as they lie in memory (wire order, read as
/// native words).
#[inline(always)]
pub fn complete_after(check: u16, difference: u32) -> u16 {
    !fold32(add32(difference, !(check as u32)))
}

/// As [`complete_after`], for a partial checksum (CHECKSUM_PARTIAL), which holds the plain sum of the pseudo header.
#[inline(always)]
pub fn partial_after(check: u16, difference: u32) -> u16 {
    fold32(add32(difference, check as u32))
}

/// The sum of a pseudo header (RFC 9293, section 3.1; RFC 8200, section 8.1). `source`, `destination`: sums of the
/// addresses' 16-bit words. `length`: number of bytes behind the IP header.
#[inline(always)]
pub fn pseudo(source: u64, destination: u64, proto: u8, length: u16) -> u64 {
    source + destination + proto as u64 + length as u64
}
