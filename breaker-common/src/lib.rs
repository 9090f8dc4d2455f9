//! The contract between the programs in the kernel and the agent: what stands in the maps, byte for byte.
//!
//! Nothing here computes anything. Both sides import it, so that neither can drift; `bpftool map dump` prints
//! these names, so they are chosen for the operator who reads them at night.
//!
//! Conventions, all pinned by the tests at the end of [`layout`]:
//! * addresses and ports are byte arrays in wire order (RFC 791: most significant byte first);
//! * times are nanoseconds and end in `_ns`; `CLOCK_MONOTONIC` unless the name says `unix`;
//! * there is no implicit padding: a hole has a field called `pad`, always zero;
//! * enums keep their numbers for ever; a number that is retired is not used again.
//!
//! Where a value holds an enum, its type has a parameter: the programs instantiate it with the enum (so that the
//! type information names it), userspace with the plain integer, and converts with `try_from`, because the kernel
//! does not promise that a byte read from a map is a variant.

#![no_std]

mod enums;
mod layout;
#[cfg(feature = "user")]
mod user;

pub use enums::{BreakerState, EventKind, FlowKind, PassReason, StateReason, UnknownNumber};
pub use layout::*;

/// Version of everything in this crate. Pins live below a directory named after it (`v1`), so that an agent never
/// adopts maps of another layout.
pub const ABI_VERSION: u32 = 1;

/// How many services one node can protect.
pub const MAX_SERVICES: u32 = 1024;
/// How many backends (address, port, protocol) one node can know at once, those that drain included.
pub const MAX_BACKENDS: u32 = 16_384;
/// How many frontends and backends together.
pub const MAX_ENDPOINTS: u32 = 32_768;
/// Default size of each of the two flow tables.
pub const DEFAULT_MAX_FLOWS: u32 = 65_536;

/// Places in one selection table. A prime, as Maglev wants (Eisenbud et al., NSDI 2016, section 3.4); 251 gives a
/// weight a resolution of 0.4 % in 1 KiB a table.
pub const SLOTS: u32 = 251;
/// Selection tables of one service: two tiers in two buffers.
pub const TABLES_PER_SERVICE: u32 = 4;

/// Slot content: leave the connection to kube-proxy.
pub const SLOT_PASSTHROUGH: u32 = u32::MAX;
/// Slot content: refuse the connection, so that the client knows at once.
pub const SLOT_REJECT: u32 = u32::MAX - 1;
/// "No such index" in [`EndpointRole`] and [`Flow4`].
pub const NONE: u32 = u32::MAX;

/// The whole of the traffic, in the unit of [`Switch::share`].
pub const SHARE_ALL: u16 = 1000;

/// kube-proxy's masquerade mark: `1 << masqueradeBit`, where the bit is 14 by default (its `--masquerade-bit`).
pub const DEFAULT_MASQUERADE_MARK: u32 = 0x4000;

/// Index of a selection table in the map `SLOTS`, in slots.
///
/// `buffer` and `tier` are 0 or 1; tier 0 is the primary.
#[inline(always)]
#[must_use]
pub const fn slot_table_start(service: u32, buffer: u32, tier: u32) -> u32 {
    (service * TABLES_PER_SERVICE + buffer * 2 + tier) * SLOTS
}
