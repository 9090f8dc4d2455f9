//! Internet checksum arithmetic (RFC 1071, RFC 1624). Pure; also compiled for the host by the tests.

/// Folds a sum of 16-bit words to 16 bits, carries added back in.
#[inline(always)]
pub fn fold(sum: u64) -> u16 {
    let sum = (sum & 0xffff_ffff) + (sum >> 32);
    let sum = (sum & 0xffff) + (sum >> 16);
    let sum = (sum & 0xffff) + (sum >> 16);
    let sum = (sum & 0xffff) + (sum >> 16);
    sum as u16
}

/// RFC 1624, equation 3: the checksum after 16-bit words that summed up to `old` were replaced by ones that sum up to
/// `new`. All in host byte order of wire words (the sum does not care, RFC 1071 section 2.B).
#[inline(always)]
pub fn replaced(check: u16, old: u64, new: u64) -> u16 {
    // Subtracting in one's complement is adding the complement; `old` folded first, so that it fits.
    !fold((!check) as u64 + (!fold(old)) as u64 + new)
}

/// The same for UDP, where a checksum of zero means that there is none (RFC 768): it stays, and what would become zero is
/// written as its other representation.
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

/// The number that two bytes are.
#[inline(always)]
pub fn word(bytes: [u8; 2]) -> u64 {
    u16::from_be_bytes(bytes) as u64
}

/// The sum of four bytes' two words.
#[inline(always)]
pub fn words4(bytes: [u8; 4]) -> u64 {
    u16::from_be_bytes([bytes[0], bytes[1]]) as u64 + u16::from_be_bytes([bytes[2], bytes[3]]) as u64
}

/// The kernel's `csum_add`: a 32-bit sum, the carry added back in.
#[inline(always)]
pub fn add32(a: u32, b: u32) -> u32 {
    let sum = a.wrapping_add(b);
    sum.wrapping_add((sum < b) as u32)
}

/// The kernel's `csum_sub`.
#[inline(always)]
pub fn sub32(a: u32, b: u32) -> u32 {
    add32(a, !b)
}

/// The kernel's `~csum_fold`.
#[inline(always)]
fn fold32(sum: u32) -> u16 {
    let sum = (sum & 0xffff) + (sum >> 16);
    ((sum & 0xffff) + (sum >> 16)) as u16
}

/// What `inet_proto_csum_replace_by_diff` (net/core/utils.c) makes of a complete checksum when the pseudo header changes by
/// `difference`; bit by bit, in native byte order of wire words.
#[inline(always)]
pub fn complete_after(check: u16, difference: u32) -> u16 {
    !fold32(add32(difference, !(check as u32)))
}

/// The same for a partial one (CHECKSUM_PARTIAL), which holds the plain sum of the pseudo header.
#[inline(always)]
pub fn partial_after(check: u16, difference: u32) -> u16 {
    fold32(add32(difference, check as u32))
}

/// The sum of a pseudo header (RFC 9293, section 3.1; RFC 8200, section 8.1): the addresses' sums, protocol, length in
/// bytes of what is behind the IP header.
#[inline(always)]
pub fn pseudo(source: u64, destination: u64, proto: u8, length: u16) -> u64 {
    source + destination + proto as u64 + length as u64
}
