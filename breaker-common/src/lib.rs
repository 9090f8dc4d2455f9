//! The contract between the programs in the kernel and the agent: what stands in the maps, byte for byte.
//!
//! Both sides import it, so that neither can drift; `bpftool map dump` prints these names, so they are chosen for the
//! operator who reads them at night. Two things are computed here, because both sides must agree on them: the place of an
//! endpoint's bit ([`filter_bit`]), and a rate limit ([`gcra`]).
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
pub mod gcra;
mod layout;
mod limits;
#[cfg(feature = "user")]
mod user;

pub use enums::{
    BreakerState, EventKind, FlowKind, LimitAction, LimitKind, PassReason, Place, StateReason, UnknownNumber,
};
pub use layout::*;
pub use limits::*;

/// Version of everything in this crate. Pins live below a directory named after it (`v7`), so that an agent never
/// adopts maps of another layout.
pub const ABI_VERSION: u32 = 7;

/// How many services one node can protect, where the agent does not choose another size when it makes the maps. The same
/// holds for the other `DEFAULT_`s.
pub const DEFAULT_SERVICES: u32 = 1024;
/// How many frontends' routes.
pub const DEFAULT_ROUTES: u32 = 4096;
/// How many selection tables.
pub const DEFAULT_TABLES: u32 = 2048;
/// How many backends (address, port, protocol) of a family, those that drain included.
pub const DEFAULT_BACKENDS: u32 = 16_384;
/// How many frontends and backends of a family together.
pub const DEFAULT_ENDPOINTS: u32 = 32_768;
/// How many established flows of a family.
pub const DEFAULT_FLOWS: u32 = 65_536;
/// How many flows of a family that no backend has answered yet; the oldest make room.
pub const DEFAULT_PENDING: u32 = 32_768;
/// 64-bit words of `FILTER`, a power of two: 128 KiB. With a thousand endpoints one in a thousand of other packets is looked up
/// for nothing, with a hundred thousand one in ten.
pub const FILTER_WORDS: u32 = 1 << 14;
/// How many fragmented packets of a family under way; the oldest make room.
pub const DEFAULT_FRAGMENTS: u32 = 4096;

/// How many sockets of the node's own are remembered that were sent to a backup; the oldest make room.
pub const DEFAULT_SOCKETS: u32 = 16_384;

/// How many connections to services with limits are remembered, in buckets of [`WAYS`].
pub const DEFAULT_CONNECTION_BUCKETS: u32 = 2048;
/// How many clients of services with limits per client are remembered, in buckets of [`WAYS`].
pub const DEFAULT_CLIENT_BUCKETS: u32 = 2048;
/// How many clients are remembered as refused most often; a power of two.
pub const LIMITED_CLIENTS: u32 = 4096;

/// Places in one selection table. A prime, as Maglev wants (Eisenbud et al., NSDI 2016, section 3.4); 251 gives a
/// weight a resolution of 0.4 % in 1 KiB a table.
pub const SLOTS: u32 = 251;
/// In place of a selection table's index, for one that holds a single backend: this bit and the backend's id. There is no
/// table then. (The two numbers below, which have this bit too, stand for themselves.)
pub const TABLE_OF_ONE: u32 = 1 << 31;
/// Slot content: leave the connection to kube-proxy.
pub const SLOT_PASSTHROUGH: u32 = u32::MAX;
/// Slot content: refuse the connection, so that the client knows at once.
pub const SLOT_REJECT: u32 = u32::MAX - 1;
/// "No such index" in [`EndpointRole`] and [`Flow`].
pub const NONE: u32 = u32::MAX;

/// The whole of the traffic, in the unit of [`Switch::share`].
pub const SHARE_ALL: u16 = 1000;

/// kube-proxy's masquerade mark: `1 << masqueradeBit`, where the bit is 14 by default (its `--masquerade-bit`).
pub const DEFAULT_MASQUERADE_MARK: u32 = 0x4000;
