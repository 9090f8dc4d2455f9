//! Claims reverse keys: each flow gets a key of its own, with another source port if the client's port is taken
//! toward the backend.

use aya_ebpf::bindings::{BPF_ANY, BPF_NOEXIST};
use breaker_common::{FlowKey, Reverse, ReverseKey, seen};

use crate::{
    family::Family,
    flow::{find, find_reverse, is_passed},
};

/// Number of source ports to try for a flow that needs another one than the client's.
const PORT_TRIES: u16 = 16;
/// First source port to try: the ports below are the system ports (RFC 6335, section 6), which need privileges.
pub const PORT_FIRST: u16 = 1024;
/// First port of the range from which Linux clients choose source ports by default (net.ipv4.ip_local_port_range).
pub const EPHEMERAL_FIRST: u16 = 32768;

/// Claims a flow's reverse key. Succeeds if the key is free, is the flow's own, or belongs to a flow that is gone or was
/// reset. A connection that was closed keeps its key while its entry exists: the backend may be in TIME-WAIT (RFC 9293,
/// section 3.6.1), and timestamps of a connection to another frontend may look older than those that it has seen.
#[inline(always)]
pub fn claim<A: Family>(key: &FlowKey<A>, reverse_key: &ReverseKey<A>, reverse: &Reverse<A>) -> bool {
    let kept = A::reverse().get_ptr(reverse_key).is_some();
    if !kept && A::pending_reverse().insert(reverse_key, reverse, BPF_NOEXIST as u64).is_ok() {
        return true;
    }
    let Some(other) = find_reverse(reverse_key) else {
        // The entry was removed between the two calls, or the table is full: a second attempt shows which.
        return A::pending_reverse().insert(reverse_key, reverse, BPF_NOEXIST as u64).is_ok();
    };
    if !other.belongs_to(key) && is_live(reverse_key, other) {
        return false;
    }
    if kept {
        let _ = A::reverse().remove(reverse_key);
    }
    A::pending_reverse().insert(reverse_key, reverse, BPF_ANY as u64).is_ok()
}

/// Whether the flow of a reverse entry still exists and was not reset.
#[inline(always)]
fn is_live<A: Family>(reverse_key: &ReverseKey<A>, reverse: &Reverse<A>) -> bool {
    let owner = FlowKey {
        client: reverse_key.client,
        vip: reverse.vip,
        client_port: reverse.client_port,
        vip_port: reverse.vip_port,
        proto: reverse_key.proto,
        pad: [0; 3],
    };
    find(&owner).is_some_and(|flow| {
        !is_passed(flow)
            && flow.backend == reverse_key.backend
            && flow.backend_port == reverse_key.backend_port
            && flow.source_port == reverse_key.client_port
            && (flow.seen | reverse.seen) & seen::RST == 0
    })
}

/// Claims a free source port from `first` to `last` (host byte order). Tries [`PORT_TRIES`] ports, at positions in
/// the range that depend on the client's port. Returns the port in wire order, also set in `reverse_key`; 0 = none
/// is free.
#[inline(always)]
pub fn claim_other_port<A: Family>(
    key: &FlowKey<A>,
    reverse_key: &mut ReverseKey<A>,
    reverse: &Reverse<A>,
    first: u16,
    last: u16,
) -> [u8; 2] {
    let own = u16::from_be_bytes(key.client_port);
    for step in 1..=PORT_TRIES {
        // 7919 is prime and does not divide the size of either range, so every step gives another port.
        let offset = (own.wrapping_sub(first) as u32 + step as u32 * 7919) % (last as u32 + 1 - first as u32);
        reverse_key.client_port = (first + offset as u16).to_be_bytes();
        if A::reverse().get_ptr(&*reverse_key).is_none()
            && A::pending_reverse().insert(&*reverse_key, reverse, BPF_NOEXIST as u64).is_ok()
        {
            return reverse_key.client_port;
        }
    }
    [0; 2]
}
