//! The flow hash: which client connection gets which share and which slot. Pure; also compiled for the host by the
//! tests.

use breaker_common::{FlowKey4, SLOTS};

/// Hashes a flow and a service's seed to 64 bits (the finalizer of MurmurHash3, twice).
#[inline(always)]
pub fn flow4(key: &FlowKey4, seed: u32) -> u64 {
    let addresses = ((u32::from_ne_bytes(key.client) as u64) << 32) | u32::from_ne_bytes(key.vip) as u64;
    let ports =
        ((u16::from_ne_bytes(key.client_port) as u64) << 48) | ((u16::from_ne_bytes(key.vip_port) as u64) << 32);
    mix(mix(addresses ^ ports) ^ ports ^ seed as u64 ^ ((key.proto as u64) << 56))
}

#[inline(always)]
fn mix(mut h: u64) -> u64 {
    h ^= h >> 33;
    h = h.wrapping_mul(0xff51_afd7_ed55_8ccd);
    h ^= h >> 33;
    h = h.wrapping_mul(0xc4ce_b9fe_1a85_ec53);
    h ^ (h >> 33)
}

/// Where a hash stands among the shares: 0..1000, from the upper half of the hash.
#[inline(always)]
pub fn permille(hash: u64) -> u16 {
    (((hash >> 32) * 1000) >> 32) as u16
}

/// The hash's slot: 0..[`SLOTS`], from the lower half.
#[inline(always)]
pub fn slot(hash: u64) -> u32 {
    (((hash & 0xffff_ffff) * SLOTS as u64) >> 32) as u32
}
