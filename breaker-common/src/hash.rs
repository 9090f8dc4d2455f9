//! The flow hash: it places a client connection among the shares and the slots. Pure functions, which the tests also
//! compile for the host.

/// Hashes a flow and a service's seed to 64 bits (MurmurHash3's finalizer, applied twice). `client`, `vip`:
/// addresses folded to 64 bits ([`crate::Address::folded`]). Ports are in wire order.
#[inline(always)]
pub fn flow(client: u64, vip: u64, client_port: [u8; 2], vip_port: [u8; 2], proto: u8, seed: u32) -> u64 {
    // IPv4 addresses have 32 bits each, so no bits are lost here.
    let addresses = client.rotate_left(32) ^ vip;
    let ports = ((u16::from_ne_bytes(client_port) as u64) << 48) | ((u16::from_ne_bytes(vip_port) as u64) << 32);
    mix(mix(addresses ^ ports) ^ ports ^ seed as u64 ^ ((proto as u64) << 56))
}

/// Hashes up to 192 bits with a key to a tag. A tag is never 0, which marks a free slot in a
/// [`crate::Bucket`].
#[inline(always)]
pub fn tag(a: u64, b: u64, c: u64, key: u64) -> u64 {
    // 2^64 divided by the golden ratio, odd. The multiplication keeps inputs that differ only in `b` from colliding
    // with inputs that differ only in `c`.
    mix(mix(a ^ key) ^ b.wrapping_mul(0x9e37_79b9_7f4a_7c15) ^ c) | 1
}

#[inline(always)]
fn mix(mut h: u64) -> u64 {
    h ^= h >> 33;
    h = h.wrapping_mul(0xff51_afd7_ed55_8ccd);
    h ^= h >> 33;
    h = h.wrapping_mul(0xc4ce_b9fe_1a85_ec53);
    h ^ (h >> 33)
}

/// A hash's position among the shares: 0..1000, from the upper half of the hash.
#[inline(always)]
pub fn permille(hash: u64) -> u16 {
    (((hash >> 32) * 1000) >> 32) as u16
}

/// A hash's slot in a table with `slots` slots: less than `slots`, from the lower half of the hash.
#[inline(always)]
pub fn slot(hash: u64, slots: u32) -> u32 {
    (((hash & 0xffff_ffff) * slots as u64) >> 32) as u32
}
