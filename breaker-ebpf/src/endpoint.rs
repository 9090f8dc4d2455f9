//! What an address is to us: the one look-up that every packet pays.

use aya_ebpf::{btf_maps::HashMap, macros::btf_map};
use breaker_common::{EndpointKey4, EndpointRole, MAX_ENDPOINTS, NONE, PROTO_TCP};

/// Frontends and backends by address, port and protocol.
#[btf_map]
static ENDPOINTS4: HashMap<EndpointKey4, EndpointRole, { MAX_ENDPOINTS as usize }> = HashMap::new();

/// The role of an address and TCP port (wire order), if it has one.
#[inline(always)]
pub fn find(addr: [u8; 4], port: [u8; 2]) -> Option<EndpointRole> {
    let key = EndpointKey4::new(addr, port, PROTO_TCP);
    // SAFETY: the value is copied out at once. An entry that is replaced meanwhile shows its old or its new fields:
    // both index existing places, and the next packet sees the new ones.
    unsafe { ENDPOINTS4.get(key) }.copied()
}

/// The index behind a field of a role.
#[inline(always)]
pub fn index(field: u32) -> Option<u32> {
    if field == NONE { None } else { Some(field) }
}
