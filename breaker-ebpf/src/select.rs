//! Which tier and which slot a new connection gets. Userspace did the thinking: weights, health, tiers and policies
//! are resolved into what the slots hold.

use aya_ebpf::{btf_maps::Array, macros::btf_map};
use breaker_common::{
    Backend, BreakerState, DEFAULT_ROUTES, DEFAULT_TABLES, FlowKey, Route, SLOT_PASSTHROUGH, SLOT_REJECT, Switch,
    TABLE_OF_ONE, Table, backend_use, route_flags,
};

use crate::{atomic, family::Family, hash, service};

/// Selection tables; a route says which are its.
#[btf_map]
static SLOTS: Array<Table, { DEFAULT_TABLES as usize }> = Array::new();

/// Where a frontend's connections may go.
#[btf_map]
static ROUTES: Array<Route, { DEFAULT_ROUTES as usize }> = Array::new();

/// What a new connection gets: a slot's content ([`SLOT_PASSTHROUGH`], [`SLOT_REJECT`] or a backend id), and whether it is
/// one of the half-open breaker's trial connections.
#[derive(Clone, Copy)]
pub struct Choice {
    pub slot: u32,
    pub trial: bool,
}

/// Chooses for a flow.
#[inline(always)]
pub fn choose<A: Family>(service: u32, route: u32, switch: &Switch<u8>, key: &FlowKey<A>) -> Choice {
    choose_by(service, route, switch, |seed| {
        hash::flow(key.client.folded(), key.vip.folded(), key.client_port, key.vip_port, key.proto, seed)
    })
}

/// Chooses by a hash, which is made with the service's seed. A service without a record (which cannot be) is left to
/// kube-proxy.
#[inline(always)]
pub fn choose_by(service: u32, route: u32, switch: &Switch<u8>, hash: impl FnOnce(u32) -> u64) -> Choice {
    let Some(record) = service::record(service) else { return Choice { slot: SLOT_PASSTHROUGH, trial: false } };
    let hash = hash(record.seed);
    let trial = switch.state == BreakerState::HalfOpen as u8
        && service::take_half_open(service, switch.epoch, record.half_open_limit);
    let primary = trial || hash::permille(hash) < switch.share;
    Choice { slot: in_tier(route, switch, !primary, hash), trial }
}

/// What a hash gets in a tier, the primary or the backup.
#[inline(always)]
fn in_tier(route: u32, switch: &Switch<u8>, backup: bool, hash: u64) -> u32 {
    let tables = ROUTES.get(route).map_or(Route::NOTHING.tables, |route| route.tables);
    let [first, second] = if switch.buffer() == 0 { tables[0] } else { tables[1] };
    let table = if backup { second } else { first };
    // A table that holds only one thing is not there; its index says which.
    if table >= SLOT_REJECT {
        table
    } else if table & TABLE_OF_ONE != 0 {
        table & !TABLE_OF_ONE
    } else {
        let slot =
            SLOTS.get(table).and_then(|table| table.slots.get(hash::slot(hash) as usize & (table.slots.len() - 1)));
        slot.copied().unwrap_or(SLOT_PASSTHROUGH)
    }
}

/// The backend that a flow gets in the backup, whatever the state: a slot's content.
#[inline(always)]
pub fn in_backup<A: Family>(service: u32, route: u32, switch: &Switch<u8>, key: &FlowKey<A>) -> u32 {
    in_backup_by(service, route, switch, |seed| {
        hash::flow(key.client.folded(), key.vip.folded(), key.client_port, key.vip_port, key.proto, seed)
    })
}

/// As [`in_backup`], by a hash that is made with the service's seed.
#[inline(always)]
pub fn in_backup_by(service: u32, route: u32, switch: &Switch<u8>, hash: impl FnOnce(u32) -> u64) -> u32 {
    let Some(record) = service::record(service) else { return SLOT_PASSTHROUGH };
    in_tier(route, switch, true, hash(record.seed))
}

/// Whether a client outside keeps its address on a route, toward a backend of this node.
#[inline(always)]
pub fn keeps_client(route: u32) -> bool {
    ROUTES.get(route).is_some_and(|route| route.flags & route_flags::KEEP_CLIENT != 0)
}

/// A backend by id.
#[inline(always)]
pub fn backend<A: Family>(id: u32) -> Option<&'static Backend<A>> {
    A::backends().get(id).filter(|backend| backend.proto != 0)
}

/// Index of a backend's interface, if it is on this node, and still the one with this address; 0 otherwise.
#[inline(always)]
pub fn interface_of<A: Family>(id: u32, addr: A) -> u32 {
    A::backends().get(id).filter(|backend| backend.addr == addr).map_or(0, |backend| backend.ifindex)
}

/// Whether packets of a backend need a look into the flow tables: bits of [`backend_use`].
#[inline(always)]
pub fn backend_in_use<A: Family>(id: u32) -> u32 {
    A::backends().get(id).map_or(0, |backend| backend.in_use)
}

/// Notes that a backend's packets need a look into the flow tables from now on.
#[inline(always)]
pub fn mark_in_use<A: Family>(id: u32, bits: u32) {
    debug_assert!(bits & !(backend_use::REDIRECTED | backend_use::DIRECT | backend_use::FAST) == 0);
    let Some(backend) = A::backends().get_ptr_mut(id) else { return };
    // SAFETY: the kernel returned a pointer to a value of this map; the field is 4 bytes, aligned.
    unsafe {
        let at = &raw mut (*backend).in_use;
        // Reading first keeps the cache line shared once the bit is set.
        if at.read_volatile() & bits != bits {
            atomic::or(at, bits);
        }
    }
}
