//! The maps that are keyed by the addresses of one family.

use aya_ebpf::{
    bindings::{BPF_F_MMAPABLE, BPF_F_NO_PREALLOC},
    btf_maps::{Array, HashMap, LruHashMap},
    macros::btf_map,
};
use breaker_common::{
    self as common, Backend, DEFAULT_BACKENDS, DEFAULT_ENDPOINTS, DEFAULT_FLOWS, DEFAULT_FRAGMENTS, DEFAULT_PENDING,
    EndpointKey, EndpointRole, Flow, FlowKey, Fragment, FragmentKey, Reverse, ReverseKey,
};

use crate::wire::{V4, V6, Wire};

const NO_PREALLOC: usize = BPF_F_NO_PREALLOC as usize;
const MMAPABLE: usize = BPF_F_MMAPABLE as usize;

/// Roles of frontends and backends by address, port and protocol.
pub type Endpoints<A> = HashMap<EndpointKey<A>, EndpointRole, { DEFAULT_ENDPOINTS as usize }, NO_PREALLOC>;
/// Backends by id.
pub type Backends<A> = Array<Backend<A>, { DEFAULT_BACKENDS as usize }, MMAPABLE>;
/// Established flows. No entry is evicted; when the map is full, it takes no new one.
pub type Flows<A> = HashMap<FlowKey<A>, Flow<A>, { DEFAULT_FLOWS as usize }, NO_PREALLOC>;
/// Reverse entries of established flows.
pub type Reverses<A> = HashMap<ReverseKey<A>, Reverse<A>, { DEFAULT_FLOWS as usize }, NO_PREALLOC>;
/// Flows that no backend has answered yet (LRU): a flood of connection requests evicts only other requests.
pub type PendingFlows<A> = LruHashMap<FlowKey<A>, Flow<A>, { DEFAULT_PENDING as usize }>;
/// Reverse entries of flows that no backend has answered yet (LRU).
pub type PendingReverses<A> = LruHashMap<ReverseKey<A>, Reverse<A>, { DEFAULT_PENDING as usize }>;
/// Translations of fragmented packets whose later fragments are still expected (LRU).
pub type Fragments<A> = LruHashMap<FragmentKey<A>, Fragment<A>, { DEFAULT_FRAGMENTS as usize }>;

#[btf_map]
static ENDPOINTS4: Endpoints<common::V4> = Endpoints::new();
#[btf_map]
static BACKENDS4: Backends<common::V4> = Backends::new();
#[btf_map]
static FLOWS4: Flows<common::V4> = Flows::new();
#[btf_map]
static REVERSE4: Reverses<common::V4> = Reverses::new();
#[btf_map]
static PENDING4: PendingFlows<common::V4> = PendingFlows::new();
#[btf_map]
static PENDING_REVERSE4: PendingReverses<common::V4> = PendingReverses::new();
#[btf_map]
static FRAGMENTS4: Fragments<common::V4> = Fragments::new();

#[btf_map]
static ENDPOINTS6: Endpoints<common::V6> = Endpoints::new();
#[btf_map]
static BACKENDS6: Backends<common::V6> = Backends::new();
#[btf_map]
static FLOWS6: Flows<common::V6> = Flows::new();
#[btf_map]
static REVERSE6: Reverses<common::V6> = Reverses::new();
#[btf_map]
static PENDING6: PendingFlows<common::V6> = PendingFlows::new();
#[btf_map]
static PENDING_REVERSE6: PendingReverses<common::V6> = PendingReverses::new();
#[btf_map]
static FRAGMENTS6: Fragments<common::V6> = Fragments::new();

/// The maps of a family.
pub trait Tables: Wire {
    fn endpoints() -> &'static Endpoints<Self>;
    fn backends() -> &'static Backends<Self>;
    fn flows() -> &'static Flows<Self>;
    fn reverse() -> &'static Reverses<Self>;
    fn pending() -> &'static PendingFlows<Self>;
    fn pending_reverse() -> &'static PendingReverses<Self>;
    fn fragments() -> &'static Fragments<Self>;
}

/// Implements [`Tables`]. The maps are declared with the address types of `breaker_common`, which bpftool prints
/// readably.
macro_rules! tables {
    ($family:ty: $($name:ident: $map:ident = $static:ident,)+) => {
        impl Tables for $family {
            $(#[inline(always)]
            fn $name() -> &'static $map<Self> {
                // SAFETY: a map's definition holds only pointers that are never followed; `Self` has the same size,
                // alignment and bytes as the map's address type.
                unsafe { &*(&raw const $static).cast() }
            })+
        }
    };
}

tables! {
    V4:
    endpoints: Endpoints = ENDPOINTS4,
    backends: Backends = BACKENDS4,
    flows: Flows = FLOWS4,
    reverse: Reverses = REVERSE4,
    pending: PendingFlows = PENDING4,
    pending_reverse: PendingReverses = PENDING_REVERSE4,
    fragments: Fragments = FRAGMENTS4,
}

tables! {
    V6:
    endpoints: Endpoints = ENDPOINTS6,
    backends: Backends = BACKENDS6,
    flows: Flows = FLOWS6,
    reverse: Reverses = REVERSE6,
    pending: PendingFlows = PENDING6,
    pending_reverse: PendingReverses = PENDING_REVERSE6,
    fragments: Fragments = FRAGMENTS6,
}
