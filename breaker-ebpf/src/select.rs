//! Which tier and which slot a new connection gets. Userspace did the thinking: weights, health, tiers and policies
//! are resolved into what the slots hold.

use aya_ebpf::{bindings::BPF_F_MMAPABLE, btf_maps::Array, macros::btf_map};
use breaker_common::{
    Backend4, BreakerState, FlowKey4, MAX_BACKENDS, MAX_SERVICES, SLOT_PASSTHROUGH, SLOTS, Switch, TABLES_PER_SERVICE,
    backend_use, slot_table_start,
};

use crate::{atomic, hash, service};

const SLOTS_LEN: usize = (MAX_SERVICES * TABLES_PER_SERVICE * SLOTS) as usize;

/// Selection tables, one after the other: see `slot_table_start`.
#[btf_map(name = "SLOTS")]
static SLOT_TABLES: Array<u32, SLOTS_LEN> = Array::new();

/// Destinations by id.
#[btf_map]
static BACKENDS4: Array<Backend4, { MAX_BACKENDS as usize }, { BPF_F_MMAPABLE as usize }> = Array::new();

/// What a new connection gets: a slot's content ([`SLOT_PASSTHROUGH`], [`breaker_common::SLOT_REJECT`] or a backend id), and whether it
/// is one of the half-open breaker's trial connections.
#[derive(Clone, Copy)]
pub struct Choice {
    pub slot: u32,
    pub trial: bool,
}

/// Chooses for a flow. A service without a record (which cannot be) is left to kube-proxy.
#[inline(always)]
pub fn choose(service: u32, switch: &Switch<u8>, key: &FlowKey4) -> Choice {
    let Some(record) = service::record(service) else { return Choice { slot: SLOT_PASSTHROUGH, trial: false } };
    let hash = hash::flow4(key, record.seed);
    let trial = switch.state == BreakerState::HalfOpen as u8
        && service::take_half_open(service, switch.epoch, record.half_open_limit);
    let tier = if trial || hash::permille(hash) < switch.share { 0 } else { 1 };
    let index = slot_table_start(service, switch.buffer(), tier) + hash::slot(hash);
    Choice { slot: SLOT_TABLES.get(index).map_or(SLOT_PASSTHROUGH, |slot| *slot), trial }
}

/// A backend by id.
#[inline(always)]
pub fn backend(id: u32) -> Option<&'static Backend4> {
    BACKENDS4.get(id).filter(|backend| backend.proto != 0)
}

/// Whether packets of a backend need a look into the flow tables: bits of [`backend_use`].
#[inline(always)]
pub fn backend_in_use(id: u32) -> u32 {
    BACKENDS4.get(id).map_or(0, |backend| backend.in_use)
}

/// Notes that a backend's packets need a look into the flow tables from now on.
#[inline(always)]
pub fn mark_in_use(id: u32, bits: u32) {
    debug_assert!(bits & !(backend_use::REDIRECTED | backend_use::DIRECT) == 0);
    let Some(backend) = BACKENDS4.get_ptr_mut(id) else { return };
    // SAFETY: the kernel returned a pointer to a value of this map; the field is 4 bytes, aligned.
    unsafe {
        let at = &raw mut (*backend).in_use;
        // Reading first keeps the cache line shared once the bit is set.
        if at.read_volatile() & bits != bits {
            atomic::or(at, bits);
        }
    }
}
