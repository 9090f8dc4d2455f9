//! Chooses the tier and the slot for a new connection. The agent has already resolved weights, health, tiers and
//! policies into the contents of the slots.

use aya_ebpf::{
    bindings::BPF_F_NO_PREALLOC,
    btf_maps::{Array, HashMap},
    macros::btf_map,
};
use breaker_common::{
    Backend, BreakerState, DEFAULT_ROUTES, DEFAULT_TABLES, FlowKey, Route, SINGLE_BACKEND, SLOT_PASSTHROUGH,
    SLOT_REJECT, Switch, TABLE_LEN, Table, TableRef, backend_use, hash, route_flags,
};

use crate::{atomic, endpoint, family::Family, service};

/// Parts of selection tables. A route holds the references of its tables ([`TableRef`]). Most services have one backend
/// and no table, so a table takes memory only while it exists.
#[btf_map]
static SLOTS: HashMap<u32, Table, { DEFAULT_TABLES as usize }, { BPF_F_NO_PREALLOC as usize }> = HashMap::new();

/// The route of each frontend: where its connections may go.
#[btf_map]
static ROUTES: Array<Route, { DEFAULT_ROUTES as usize }> = Array::new();

/// The choice for a new connection: the content of a slot ([`SLOT_PASSTHROUGH`], [`SLOT_REJECT`] or a backend id),
/// and whether the connection holds one of the half-open breaker's permits.
#[derive(Clone, Copy)]
pub struct Choice {
    pub slot: u32,
    pub permit: bool,
}

/// Chooses tier and slot for a flow. Takes a permit if the breaker is half-open and one is left, unless `repeated`: a SYN
/// that was decided in this epoch already is no new trial.
#[inline(always)]
pub fn choose<A: Family>(service: u32, route: u32, switch: &Switch<u8>, key: &FlowKey<A>, repeated: bool) -> Choice {
    choose_with_hash(service, route, switch, repeated, |seed| {
        hash::flow(key.client.folded(), key.vip.folded(), key.client_port, key.vip_port, key.proto, seed)
    })
}

/// As [`choose`], with a hash that `hash` computes from the service's seed. A service without a record, which
/// cannot occur, is left to kube-proxy.
#[inline(always)]
pub fn choose_with_hash(
    service: u32,
    route: u32,
    switch: &Switch<u8>,
    repeated: bool,
    hash: impl FnOnce(u32) -> u64,
) -> Choice {
    let Some(record) = service::record(service) else { return Choice { slot: SLOT_PASSTHROUGH, permit: false } };
    let hash = hash(record.seed);
    let permit = switch.state == BreakerState::HalfOpen as u8
        && !repeated
        && service::take_permit(service, switch.epoch, record.half_open_limit);
    let primary = permit || hash::permille(hash) < switch.share;
    Choice { slot: slot_in_tier(route, switch, !primary, hash), permit }
}

/// The content of a hash's slot in the primary or the backup tier of a route.
#[inline(always)]
fn slot_in_tier(route: u32, switch: &Switch<u8>, backup: bool, hash: u64) -> u32 {
    let tables = ROUTES.get(route).map_or(Route::NOTHING.tables, |route| route.tables);
    let [first, second] = if switch.buffer() == 0 { tables[0] } else { tables[1] };
    let table = if backup { second } else { first };
    // A table with a single content does not exist; the route holds that content in place of the table's index.
    if table >= SLOT_REJECT {
        table
    } else if table & SINGLE_BACKEND != 0 {
        table & !SINGLE_BACKEND
    } else {
        let table = TableRef::from_word(table);
        let slot = hash::slot(hash, table.slots());
        // SAFETY: the agent never changes a table that a route names, and keeps the table for a while after.
        let part = unsafe { SLOTS.get(table.key(slot / TABLE_LEN)) };
        let slot = part.and_then(|part| part.slots.get((slot % TABLE_LEN) as usize));
        slot.copied().unwrap_or(SLOT_PASSTHROUGH)
    }
}

/// The content of a flow's slot in the backup tier, whatever the breaker's state.
#[inline(always)]
pub fn backup_slot<A: Family>(service: u32, route: u32, switch: &Switch<u8>, key: &FlowKey<A>) -> u32 {
    backup_slot_with_hash(service, route, switch, |seed| {
        hash::flow(key.client.folded(), key.vip.folded(), key.client_port, key.vip_port, key.proto, seed)
    })
}

/// As [`backup_slot`], with a hash that `hash` computes from the service's seed.
#[inline(always)]
pub fn backup_slot_with_hash(service: u32, route: u32, switch: &Switch<u8>, hash: impl FnOnce(u32) -> u64) -> u32 {
    let Some(record) = service::record(service) else { return SLOT_PASSTHROUGH };
    slot_in_tier(route, switch, true, hash(record.seed))
}

/// Whether external clients of a route keep their address toward backends on this node.
#[inline(always)]
pub fn keeps_client(route: u32) -> bool {
    ROUTES.get(route).is_some_and(|route| route.flags & route_flags::KEEP_CLIENT != 0)
}

/// The backend with an id, if there is one.
#[inline(always)]
pub fn backend<A: Family>(id: u32) -> Option<&'static Backend<A>> {
    A::backends().get(id).filter(|backend| backend.proto != 0)
}

/// Index of a backend's interface; 0 if the backend is not on this node, or if the id now belongs to another address.
#[inline(always)]
pub fn interface_of<A: Family>(id: u32, addr: A) -> u32 {
    A::backends().get(id).filter(|backend| backend.addr == addr).map_or(0, |backend| backend.ifindex)
}

/// How a backend is used: bits of [`backend_use`]. If 0, its packets need no look-up in the flow tables.
#[inline(always)]
pub fn backend_in_use<A: Family>(id: u32) -> u32 {
    A::backends().get(id).map_or(0, |backend| backend.in_use)
}

/// Sets bits of [`backend_use`]: from now on the backend's packets are looked up in the flow tables.
#[inline(always)]
pub fn mark_in_use<A: Family>(id: u32, bits: u32) {
    debug_assert!(bits & !(backend_use::REDIRECTED | backend_use::DIRECT | backend_use::FAST) == 0);
    let Some(backend) = A::backends().get_ptr_mut(id) else { return };
    // SAFETY: the kernel returned a pointer to a value of this map; the field has 4 bytes and is aligned.
    unsafe {
        let at = &raw mut (*backend).in_use;
        // Writing only on a change keeps the cache line shared between CPUs once the bit is set.
        if at.read_volatile() & bits != bits {
            atomic::or(at, bits);
        }
    }
}

/// How an address is used as a backend: bits of [`backend_use`]. If 0, its packets need no look-up in the flow
/// tables.
#[inline(always)]
pub fn backend_uses<A: Family>(addr: A, port: [u8; 2], proto: u8) -> u32 {
    if !endpoint::filter_match(addr, port, proto).all_packets {
        return 0;
    }
    let backend = endpoint::look_up(addr, port, proto).and_then(|role| endpoint::index(role.backend));
    backend.map_or(0, backend_in_use::<A>)
}
