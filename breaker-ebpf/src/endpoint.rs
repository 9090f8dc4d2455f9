//! What an address is to us: the one look-up that every packet pays.

use breaker_common::{EndpointKey, EndpointRole, NONE};

use crate::family::Family;

/// The role of an address and port (wire order) under a protocol, if it has one.
#[inline(always)]
pub fn find<A: Family>(addr: A, port: [u8; 2], proto: u8) -> Option<EndpointRole> {
    let key = EndpointKey::new(addr, port, proto);
    // SAFETY: the value is copied out at once. An entry that is replaced meanwhile shows its old or its new fields:
    // both index existing places, and the next packet sees the new ones.
    unsafe { A::endpoints().get(key) }.copied()
}

/// The index behind a field of a role.
#[inline(always)]
pub fn index(field: u32) -> Option<u32> {
    if field == NONE { None } else { Some(field) }
}
