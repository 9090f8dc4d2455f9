//! The TCP connections that were left to the primary, by their SYNs: the agent looks for them here when the breaker opens,
//! on nodes whose kernel does not track connections to Services (`agent.connections`). On all others, this costs nothing.

use aya_ebpf::{btf_maps::LruHashMap, macros::btf_map};
use breaker_common::{DEFAULT_SYNS, FlowKey};

use crate::{
    family::{Family, V6},
    flow,
};

/// 1 if the SYNs are noted. The loader sets it before the program is verified, so the verifier removes what is not used.
#[unsafe(no_mangle)]
static NOTE_SYNS: aya_ebpf::Global<u8> = aya_ebpf::Global::new(0);

/// The connections, with IPv4 addresses in their IPv4-mapped IPv6 form (LRU). The value has no meaning. One is removed with
/// the first FIN or RST of its client; one that its client does not end stays until it is evicted.
#[btf_map]
static SYNS: LruHashMap<FlowKey<V6>, u8, { DEFAULT_SYNS as usize }> = LruHashMap::new();

/// Whether connections are noted.
#[inline(always)]
pub fn are_noted() -> bool {
    NOTE_SYNS.load() != 0
}

/// Notes a new connection that goes to the primary.
#[inline(always)]
pub fn note<A: Family>(key: &FlowKey<A>) {
    if !are_noted() {
        return;
    }
    if let Some(key) = flow::mapped_key(key) {
        // Without memory, the connection is reset at its client's next segment only.
        let _ = SYNS.insert(key, 0, 0);
    }
}

/// Forgets a connection that was reset, or that its client ends.
#[inline(always)]
pub fn forget<A: Family>(key: &FlowKey<A>) {
    if !are_noted() {
        return;
    }
    if let Some(key) = flow::mapped_key(key) {
        let _ = SYNS.remove(key);
    }
}
