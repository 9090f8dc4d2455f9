//! Layout of the BPF maps that the agent and the BPF programs share.
//!
//! Both sides import this crate, so their view of the maps cannot diverge. `bpftool map dump` prints the names of
//! the types and fields (from BTF), so the names are chosen for an operator who reads a dump. The crate also
//! contains the two calculations that both sides must agree on: the position of an endpoint's bit in the prefilter's
//! map ([`filter_bit`]), and the rate limit ([`gcra`]).
//!
//! Conventions, checked by the tests in `layout_tests.rs`:
//! * Addresses and ports are byte arrays in wire order (RFC 791: most significant byte first).
//! * Times are nanoseconds and their names end in `_ns`. They are `CLOCK_MONOTONIC` unless the name contains `unix`.
//! * There is no implicit padding. Padding is an explicit field named `pad`, which is always zero.
//! * An enum's numbers never change. The number of a removed variant is never reused.
//!
//! A type that holds an enum takes the enum as a type parameter. The programs instantiate it with the enum, so BTF
//! names the variants. Userspace instantiates it with the plain integer and converts with `try_from`, because the
//! kernel does not guarantee that a byte read from a map is a valid variant.

#![no_std]

#[macro_use]
mod numbered;

mod addr;
pub mod csum;
mod enums;
mod filter;
mod flow;
pub mod gcra;
pub mod hash;
#[cfg(test)]
mod layout_tests;
mod limits;
mod pass_reason;
mod service;
mod telemetry;
#[cfg(feature = "user")]
mod user;

pub use addr::*;
pub use enums::{BreakerState, EventKind, FlowKind, LimitAction, LimitKind, PokeOutcome, StateReason, TcHook};
pub use filter::*;
pub use flow::*;
pub use limits::*;
pub use numbered::UnknownNumber;
pub use pass_reason::PassReason;
pub use service::*;
pub use telemetry::*;

/// Version of every layout in this crate. The pin directory is named after it (`v` and the number), so an agent
/// never adopts maps with a different layout.
pub const ABI_VERSION: u32 = 10;

/// The acknowledgment numbers of the segments that poke a client (see `breaker_poke`) have these bits at random, the same
/// for all segments of an agent; the top bit is 0 or 1. A client without such a connection answers with a RST that has this
/// sequence number (RFC 9293, section 3.5.2, rule 1), and the programs drop it: nobody else knows the connection. Any other
/// RST with this number would be lost as well, which is one in two thousand million.
pub const POKE_NUMBER_BITS: u32 = u32::MAX >> 1;

/// Default maximum number of services on one node. The agent may choose another size when it creates the maps; the
/// same holds for every other constant whose name starts with `DEFAULT_`.
pub const DEFAULT_SERVICES: u32 = 1024;
/// Default maximum number of routes (see [`Route`]).
pub const DEFAULT_ROUTES: u32 = 4096;
/// Default maximum number of selection tables (see [`Table`]).
pub const DEFAULT_TABLES: u32 = 2048;
/// Default maximum number of backends (address, port, protocol) per IP family, including backends that are draining.
pub const DEFAULT_BACKENDS: u32 = 16_384;
/// Default maximum number of endpoints (frontends and backends together) per IP family.
pub const DEFAULT_ENDPOINTS: u32 = 32_768;
/// Default maximum number of established flows per IP family.
pub const DEFAULT_FLOWS: u32 = 65_536;
/// Default maximum number of pending flows (not yet answered by a backend) per IP family. A full table evicts the
/// oldest.
pub const DEFAULT_PENDING: u32 = 32_768;
/// Number of entries of `FILTER`, a power of two. `FILTER` is two bitmaps of 2^20 bits (128 KiB) each. With 1,000
/// endpoints, about one in 1,000 other packets costs a needless lookup; with 100,000 endpoints, about one in ten.
pub const FILTER_WORDS: u32 = 1 << 14;
/// Default maximum number of fragmented packets in flight per IP family. A full table evicts the oldest.
pub const DEFAULT_FRAGMENTS: u32 = 4096;

/// Default maximum number of remembered redirects of sockets in the host network namespace. A full table evicts the
/// oldest.
pub const DEFAULT_SOCKETS: u32 = 8192;

/// Default number of buckets of `CONNECTIONS`, which remembers connections to services with limits. A bucket has
/// [`WAYS`] entries.
pub const DEFAULT_CONNECTION_BUCKETS: u32 = 2048;
/// Default number of buckets of `CLIENTS`, which remembers the clients of tiers with per-client limits. A bucket has
/// [`WAYS`] entries.
pub const DEFAULT_CLIENT_BUCKETS: u32 = 2048;
/// Number of entries of `LIMITED`, the list of the clients that limits refuse most often. A power of two.
pub const LIMITED_CLIENTS: u32 = 4096;

/// Default maximum number of entries of `DOWN_BACKENDS`: pairs of a service and a backend.
pub const DEFAULT_DOWN_BACKENDS: u32 = 16_384;

/// Default maximum number of entries of `POKED`: connections whose clients are poked at the same time. Of more, the agent
/// does not learn which clients are gone.
pub const DEFAULT_POKED: u32 = 8192;

/// Default maximum number of entries of `SYNS`: connections to primaries.
pub const DEFAULT_SYNS: u32 = 65_536;

/// Default maximum number of entries of `RETURN_PATHS`: pairs of an interface and a service.
pub const DEFAULT_RETURN_PATHS: u32 = 16_384;

/// Numbers of slots that a selection table may have. Maglev requires primes (Eisenbud et al., NSDI 2016, section 3.4).
/// 61 slots are enough for ten backends and take 256 bytes. More backends, or unequal weights, need more slots. The sizes
/// are the largest primes below 64, 256, 1,024, 4,096 and 16,384.
pub const TABLE_SIZES: [u32; 5] = [61, 251, 1021, 4093, 16_381];
/// Flag in [`Route::tables`]: all slots would hold the same backend, so no table exists and the remaining bits are
/// that backend's id. [`SLOT_PASSTHROUGH`] and [`SLOT_REJECT`] have this bit set too; test for them first.
pub const SINGLE_BACKEND: u32 = 1 << 31;
/// Slot content: leave the connection untouched, for kube-proxy.
pub const SLOT_PASSTHROUGH: u32 = u32::MAX;
/// Slot content: refuse the connection, so that the client gets an error at once.
pub const SLOT_REJECT: u32 = u32::MAX - 1;
/// "No index" in fields of [`EndpointRole`] and [`Flow`].
pub const NONE: u32 = u32::MAX;

/// Value of [`Switch::share`] that leaves all new flows to the primary. Shares are in permille.
pub const SHARE_ALL: u16 = 1000;

/// kube-proxy's masquerade mark: `1 << masqueradeBit`, where the bit is 14 by default (its `--masquerade-bit`).
pub const DEFAULT_MASQUERADE_MARK: u32 = 0x4000;
