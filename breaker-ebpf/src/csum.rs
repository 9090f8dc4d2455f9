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

/// The sum of four bytes' two words.
#[inline(always)]
pub fn words4(bytes: [u8; 4]) -> u64 {
    u16::from_be_bytes([bytes[0], bytes[1]]) as u64 + u16::from_be_bytes([bytes[2], bytes[3]]) as u64
}

/// The sum of the TCP pseudo header (RFC 9293, section 3.1): addresses, protocol, segment length in bytes.
#[inline(always)]
pub fn pseudo4(source: [u8; 4], destination: [u8; 4], proto: u8, length: u16) -> u64 {
    words4(source) + words4(destination) + proto as u64 + length as u64
}

/// The kernel's `csum_add`: a 32-bit sum, the carry added back in.
#[inline(always)]
fn add32(a: u32, b: u32) -> u32 {
    let sum = a.wrapping_add(b);
    sum.wrapping_add((sum < b) as u32)
}

/// The kernel's `~csum_fold`.
#[inline(always)]
fn fold32(sum: u32) -> u16 {
    let sum = (sum & 0xffff) + (sum >> 16);
    ((sum & 0xffff) + (sum >> 16)) as u16
}

/// What `inet_proto_csum_replace4` (net/core/utils.c) makes of a complete checksum when an address of the pseudo header
/// changes; bit by bit, in native byte order of wire words.
#[inline(always)]
pub fn complete_after(check: u16, from: u32, to: u32) -> u16 {
    !fold32(add32(add32(!(check as u32), !from), to))
}

/// The same for a partial one (CHECKSUM_PARTIAL), which holds the plain sum of the pseudo header.
#[inline(always)]
pub fn partial_after(check: u16, from: u32, to: u32) -> u16 {
    fold32(add32(add32(check as u32, !from), to))
}
