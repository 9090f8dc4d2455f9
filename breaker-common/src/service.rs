//! Services: endpoints, routes, tables, switches, records, backends.

use crate::{BreakerState, NONE, StateReason};

/// Address, port and protocol of an endpoint (frontend or backend): key of `ENDPOINTS4` and `ENDPOINTS6`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[repr(C)]
pub struct EndpointKey<A> {
    /// Address, wire order.
    pub addr: A,
    /// Port, wire order.
    pub port: [u8; 2],
    /// IP protocol number.
    pub proto: u8,
    /// Always 0.
    pub pad: u8,
}

impl<A> EndpointKey<A> {
    /// Makes a key. `addr` and `port` are in wire order.
    #[inline(always)]
    #[must_use]
    pub const fn new(addr: A, port: [u8; 2], proto: u8) -> Self {
        Self { addr, port, proto, pad: 0 }
    }
}

/// Role of an address and port: value of `ENDPOINTS4` and `ENDPOINTS6`. It may be a frontend and a backend at once.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(C)]
pub struct EndpointRole {
    /// Index of the service that this is a frontend of, or [`NONE`].
    pub service: u32,
    /// Index of the frontend's [`Route`]. Meaningless if `service` is [`NONE`].
    pub route: u32,
    /// Id of the backend (of the same IP family) that this is, or [`NONE`].
    pub backend: u32,
}

impl EndpointRole {
    /// Neither frontend nor backend.
    pub const NOTHING: Self = Self { service: NONE, route: NONE, backend: NONE };
}

/// Selection tables for new connections to a frontend: value of `ROUTES`. A service has one route for each group of
/// frontends of one IP family and protocol that lead to the same backend addresses.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(C)]
pub struct Route {
    /// By buffer ([`switch_flags::BUFFER`]) and tier (0 = primary, 1 = backup). Each element is the reference of a
    /// selection table in `SLOTS` ([`TableRef`]). If all slots of the table would be equal, no table exists and the
    /// element is [`crate::SLOT_PASSTHROUGH`], [`crate::SLOT_REJECT`], or [`crate::SINGLE_BACKEND`] combined with a
    /// backend id.
    pub tables: [[u32; 2]; 2],
    /// Bits of [`route_flags`].
    pub flags: u32,
}

impl Route {
    /// Leaves every connection to kube-proxy.
    pub const NOTHING: Self = Self { tables: [[crate::SLOT_PASSTHROUGH; 2]; 2], flags: 0 };
}

/// Number of slots in one [`Table`]. A power of two, so that a mask proves to the verifier that an index is in bounds.
pub const TABLE_LEN: u32 = 64;

/// A part of a selection table: value of `SLOTS`. The smallest tables have one part.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(C)]
pub struct Table {
    /// Backend ids, [`crate::SLOT_PASSTHROUGH`] or [`crate::SLOT_REJECT`]. Elements beyond the table's number of slots
    /// are 0 and unused.
    pub slots: [u32; TABLE_LEN as usize],
}

/// Reference of a selection table, as a [`Route`] holds it: which table it is, and how many slots it has.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct TableRef {
    /// Number of the table, less than [`TableRef::NUMBERS`].
    pub number: u32,
    /// Position of its number of slots in [`crate::TABLE_SIZES`].
    pub size: u32,
}

impl TableRef {
    /// Number of bits of a table number in a key of `SLOTS`.
    const NUMBER_BITS: u32 = 22;

    /// Limit of table numbers.
    pub const NUMBERS: u32 = 1 << Self::NUMBER_BITS;

    /// The reference as one word, below [`crate::SINGLE_BACKEND`].
    #[inline(always)]
    #[must_use]
    pub const fn to_word(self) -> u32 {
        self.size << 28 | self.number
    }

    /// The inverse of [`TableRef::to_word`].
    #[inline(always)]
    #[must_use]
    pub const fn from_word(word: u32) -> Self {
        Self { number: word & (Self::NUMBERS - 1), size: word >> 28 & 7 }
    }

    /// Number of slots.
    #[inline(always)]
    #[must_use]
    pub const fn slots(self) -> u32 {
        // Not an index into `TABLE_SIZES`: the programs would read it from memory.
        match self.size {
            0 => crate::TABLE_SIZES[0],
            1 => crate::TABLE_SIZES[1],
            2 => crate::TABLE_SIZES[2],
            3 => crate::TABLE_SIZES[3],
            _ => crate::TABLE_SIZES[4],
        }
    }

    /// Number of parts.
    #[inline(always)]
    #[must_use]
    pub const fn parts(self) -> u32 {
        self.slots().div_ceil(TABLE_LEN)
    }

    /// Key of one of the table's parts in `SLOTS`: at most 256 parts.
    #[inline(always)]
    #[must_use]
    pub const fn key(self, part: u32) -> u32 {
        part << Self::NUMBER_BITS | self.number
    }
}

/// Bits of [`Route::flags`].
pub mod route_flags {
    /// An external client keeps its address toward a backend on this node (`externalTrafficPolicy: Local`).
    pub const KEEP_CLIENT: u32 = 1;
}

/// Current decision for a service: value of `SWITCHES`.
///
/// It is read and written as one aligned 64-bit word, so that state, share, policies, buffer and epoch change
/// together. `S` is [`BreakerState`] in the programs and `u8` in userspace.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(C, align(8))]
pub struct Switch<S = BreakerState> {
    /// Number of the current decision. A flow stores the epoch in which it was decided.
    pub epoch: u32,
    /// Share of new flows that go to the primary, in permille (see [`crate::SHARE_ALL`]).
    pub share: u16,
    /// State of the breaker.
    pub state: S,
    /// Bits of [`switch_flags`].
    pub flags: u8,
}

/// Bits of [`Switch::flags`].
pub mod switch_flags {
    /// The service may have entries in the flow tables, so all its packets take the full path. While this is clear,
    /// packets of established connections pass at the prefilter.
    pub const TRACK: u8 = 1;
    /// Reset established flows on the primary that were decided in an older epoch or whose SYN the programs did not
    /// see (`onOpen: Reset`).
    pub const RESET_PRIMARY: u8 = 1 << 1;
    /// Closed: reset established flows on a backup that were decided in an older epoch (`onClose: Reset`). In the other
    /// states: reset those to the backends in `DOWN_BACKENDS` (`onBackupDown: Reset`).
    pub const RESET_BACKUP: u8 = 1 << 2;
    /// Dry run: decide and count, but rewrite no packet.
    pub const DRY_RUN: u8 = 1 << 3;
    /// The last decision stays in force after the agent's lease has run out (`onAgentLoss: Hold`).
    pub const HOLD: u8 = 1 << 4;
    /// Which of the two buffers of [`super::Route::tables`] is in force. The agent writes the other one.
    pub const BUFFER: u8 = 1 << 5;
    /// New flows to a backup pod on this node take the fast path, which bypasses the host network stack
    /// (`fastPath: PeerRedirect`).
    pub const FAST: u8 = 1 << 6;
    /// The service has limits; see [`crate::ServiceLimits`].
    pub const LIMITED: u8 = 1 << 7;
}

impl<S> Switch<S> {
    /// Returns whether a bit of [`switch_flags`] is set.
    #[inline(always)]
    #[must_use]
    pub const fn has(&self, flag: u8) -> bool {
        self.flags & flag != 0
    }

    /// Index of the buffer of [`Route::tables`] that is in force: 0 or 1.
    #[inline(always)]
    #[must_use]
    pub const fn buffer(&self) -> u32 {
        if self.has(switch_flags::BUFFER) { 1 } else { 0 }
    }
}

impl Switch<u8> {
    /// Packs the fields into the word that the map holds, in native byte order (the programs and the agent run on
    /// one machine).
    #[must_use]
    pub const fn to_word(self) -> u64 {
        let e = self.epoch.to_ne_bytes();
        let s = self.share.to_ne_bytes();
        u64::from_ne_bytes([e[0], e[1], e[2], e[3], s[0], s[1], self.state, self.flags])
    }

    /// Unpacks a word from the map: the inverse of [`Switch::to_word`].
    #[inline(always)]
    #[must_use]
    pub const fn from_word(word: u64) -> Self {
        let b = word.to_ne_bytes();
        Self {
            epoch: u32::from_ne_bytes([b[0], b[1], b[2], b[3]]),
            share: u16::from_ne_bytes([b[4], b[5]]),
            state: b[6],
            flags: b[7],
        }
    }
}

/// Size of [`ServiceRecord::name`] in bytes. A name has at most `NAME_LEN - 1` bytes. A longer name in the
/// configuration file is rejected; a longer name from Kubernetes (namespace, name and port) is shortened and made
/// unique by a hash.
pub const NAME_LEN: usize = 128;

/// State of a service that a restarted agent needs: value of `SERVICES`.
///
/// `R` is [`StateReason`] in the programs and `u8` in userspace. An entry with an empty name is free.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(C)]
pub struct ServiceRecord<R = StateReason> {
    /// Name in UTF-8, padded with zeros.
    pub name: [u8; NAME_LEN],
    /// When the service entered its state, `CLOCK_REALTIME`.
    pub since_unix_ns: u64,
    /// When the operator's override expires, `CLOCK_REALTIME`; 0 = never.
    pub override_until_unix_ns: u64,
    /// Mixed into the flow hash, so that different services move different clients.
    pub seed: u32,
    /// Number of trial connections to the primary that a half-open breaker permits per epoch.
    pub half_open_limit: u32,
    /// Consecutive trips, for the backoff.
    pub trips: u32,
    /// Why the service is in its state.
    pub reason: R,
    /// Override: 0 = none, 1 = forced open, 2 = forced closed.
    pub override_kind: u8,
    /// 1 if the primary accepts connections as far as the checks can tell, although it may fail them; else 0. Only then
    /// is a connection attempt without an answer tried on the primary.
    pub primary_accepts: u8,
    /// Always 0.
    pub pad: u8,
}

/// State of a service that the programs maintain: value of `RUNTIME`. Both fields change by compare-and-swap as one
/// 64-bit word.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(C, align(8))]
pub struct ServiceRuntime {
    /// The latest epoch that the programs have seen.
    pub epoch: u32,
    /// Trial connections to the primary that were permitted in this epoch (state half-open).
    pub half_open_taken: u32,
}

/// A backend: value of `BACKENDS4` and `BACKENDS6`. The index is the backend id.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(C)]
pub struct Backend<A> {
    /// Address, wire order.
    pub addr: A,
    /// Port, wire order.
    pub port: [u8; 2],
    /// IP protocol number; 0 = the entry is free.
    pub proto: u8,
    /// Always 0.
    pub pad: u8,
    /// Bits of [`backend_use`]. The programs set them; the agent clears them when no flow needs them any more.
    pub in_use: u32,
    /// Index of the host-side interface of the backend's pod, if the pod is on this node and breaker's programs are
    /// attached to that interface; 0 otherwise. Written by the agent.
    pub ifindex: u32,
}

/// A backend of a service: key of `DOWN_BACKENDS`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
#[repr(C)]
pub struct DownBackendKey {
    /// Index of the service.
    pub service: u32,
    /// Id of the backend, with [`DownBackendKey::IPV6`] for an id in `BACKENDS6`.
    pub backend: u32,
}

impl DownBackendKey {
    /// Set in `backend` if the id is one of `BACKENDS6`.
    pub const IPV6: u32 = 1 << 31;
}

/// Bits of [`Backend::in_use`].
pub mod backend_use {
    /// The backend has redirected flows: its replies may need translation.
    pub const REDIRECTED: u32 = 1;
    /// Direct connections to the backend may have a translated source port.
    pub const DIRECT: u32 = 2;
    /// The backend has fast-path flows: its replies may have to be redirected straight to the client's interface.
    pub const FAST: u32 = 4;
}
