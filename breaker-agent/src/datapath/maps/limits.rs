//! The maps of limits: the configured limits, the counters of refused connections, and the most refused clients.

use std::{
    collections::HashMap,
    hash::{BuildHasher as _, Hasher as _, RandomState},
    mem::offset_of,
    net::IpAddr,
    sync::atomic::{AtomicU32, Ordering},
};

use anyhow::{Context as _, Result};
use aya::maps::{self, Map, MapData};
use breaker_common::{
    Bucket, ClientState, ConnectionState, LIMITED_CLIENTS, LIMITED_WINDOW_SHIFT, LimitCounters, LimitedClient, Limiter,
    ServiceLimits, limit_flags,
};
use breaker_core::{
    datapath::{LimitReport, RefusedClient},
    model::TierRole,
};

use super::{add_entry, array, entries, entry_or_default, mmap::SharedArray, remove_entry, shared, typed};
use crate::clock;

pub(super) type Connections = Bucket<ConnectionState>;
pub(super) type Clients = Bucket<ClientState>;

/// The open maps of limits.
pub(crate) struct LimitMaps {
    pub(super) limits: SharedArray,
    pub(super) limiters: SharedArray,
    pub(super) connections: SharedArray,
    pub(super) clients: SharedArray,
    pub(super) limited: SharedArray,
    pub(super) counters: maps::HashMap<MapData, u32, LimitCounters>,
    /// Number of buckets in `CONNECTIONS`.
    pub connection_buckets: u32,
    /// Number of buckets in `CLIENTS`.
    pub client_buckets: u32,
    /// By how much a limiter's count differed from the entries in `CONNECTIONS` at the last sweep, by limiter.
    /// Limiters whose count was right are absent.
    pub(super) drift: HashMap<u32, i64>,
}

impl LimitMaps {
    pub(crate) const SIZES: [(&'static str, usize, usize); 6] = [
        ("LIMITS", 4, size_of::<ServiceLimits>()),
        ("LIMITERS", 4, size_of::<Limiter>()),
        ("CONNECTIONS", 4, size_of::<Connections>()),
        ("CLIENTS", 4, size_of::<Clients>()),
        ("LIMITED", 4, size_of::<LimitedClient>()),
        ("LIMIT_COUNTERS", 4, size_of::<LimitCounters>()),
    ];

    pub(crate) fn open(open: &mut impl FnMut(&str) -> Result<Map>) -> Result<Self> {
        let mut map = |name: &str, size: usize| -> Result<(SharedArray, u32)> {
            let data = array(open(name)?, name)?;
            Ok((shared(&data, size)?, entries(&data)?))
        };
        let (connections, connection_buckets) = map("CONNECTIONS", size_of::<Connections>())?;
        let (clients, client_buckets) = map("CLIENTS", size_of::<Clients>())?;
        Ok(Self {
            limits: map("LIMITS", size_of::<ServiceLimits>())?.0,
            limiters: map("LIMITERS", size_of::<Limiter>())?.0,
            limited: map("LIMITED", size_of::<LimitedClient>())?.0,
            connections,
            clients,
            connection_buckets,
            client_buckets,
            counters: typed(open("LIMIT_COUNTERS")?, "LIMIT_COUNTERS")?,
            drift: HashMap::new(),
        })
    }

    /// Reads a service's limits.
    pub(crate) fn get(&self, index: u32) -> ServiceLimits {
        self.limits.read(index)
    }

    /// Writes a service's limits. The service keeps its hash key; without one it gets a random key.
    pub(crate) fn set(&self, index: u32, limits: ServiceLimits) {
        let before = self.get(index);
        let hash_key = if before.hash_key == 0 { RandomState::new().build_hasher().finish() } else { before.hash_key };
        self.limits.write(index, &ServiceLimits { hash_key, ..limits });
    }

    /// Starts or ends a service's census. During a census every packet of a client marks its connection as alive.
    pub(crate) fn set_census(&self, index: u32, on: bool) {
        let flags = if on { limit_flags::CENSUS } else { 0 };
        self.limits.store32(index, offset_of!(ServiceLimits, flags), flags);
    }

    /// Removes everything about a service from the maps: its limits, counts, connections and refused clients.
    ///
    /// # Errors
    /// A map cannot be written.
    pub(crate) fn clear(&mut self, index: u32) -> Result<()> {
        self.limits.write(index, &ServiceLimits::NONE);
        self.forget_connections(index);
        for entry in 0..LIMITED_CLIENTS {
            let limiter = self.limited.word32(entry, offset_of!(LimitedClient, limiter)).load(Ordering::SeqCst);
            if limiter != 0 && (limiter - 1) / 2 == index {
                self.limited.store32(entry, offset_of!(LimitedClient, limiter), 0);
            }
        }
        for tier in [0, 1] {
            let limiter = index * 2 + tier;
            self.limiters.write(limiter, &Limiter { arrival_ns: 0, concurrent: 0, overflowed: 0, pad: [0; 6] });
            self.drift.remove(&limiter);
        }
        remove_entry(&mut self.counters, index).context("remove the counters of limits")
    }

    /// Adds the counters of a service's limits. If it has counters already, they stay.
    pub(crate) fn add_counters(&mut self, index: u32) -> Result<()> {
        add_entry(&mut self.counters, index).context("add the counters of limits")
    }

    /// Returns the counters of a service's limits, with up to `clients` of its most refused clients.
    ///
    /// # Errors
    /// The counters cannot be read.
    pub(crate) fn report(&self, index: u32, clients: usize) -> Result<LimitReport> {
        Ok(LimitReport {
            counters: self.counters(index)?,
            concurrent: self.concurrent(index),
            clients: if clients == 0 { Vec::new() } else { self.limited_clients(index, clients) },
        })
    }

    /// Returns the number of counted connections to the primary and to the backup.
    fn concurrent(&self, index: u32) -> [u32; 2] {
        [0, 1].map(|tier| self.count(index * 2 + tier).load(Ordering::SeqCst))
    }

    pub(super) fn count(&self, limiter: u32) -> &AtomicU32 {
        self.limiters.word32(limiter, offset_of!(Limiter, concurrent))
    }

    /// Returns the overflow mark: it is 1 after new connections went from the primary to the backup because of a limit.
    /// Programs set it to 1, the agent clears it.
    pub(crate) fn overflowed(&self, index: u32) -> &AtomicU32 {
        self.limiters.word32(index * 2, offset_of!(Limiter, overflowed))
    }

    /// Returns a service's counters of limits.
    ///
    /// # Errors
    /// The counters cannot be read.
    fn counters(&self, index: u32) -> Result<LimitCounters> {
        entry_or_default(&self.counters, index).context("read the counters of limits")
    }

    /// Returns up to `most` clients of a service that had connections refused in the last minute, the most refused
    /// first.
    fn limited_clients(&self, index: u32, most: usize) -> Vec<RefusedClient> {
        let prefix: u32 = self.get(index).client_mask.bytes.iter().map(|byte| byte.count_ones()).sum();
        let named = |address: IpAddr| match address {
            IpAddr::V6(ip) if prefix < 128 => format!("{ip}/{prefix}"),
            ip => ip.to_string(),
        };
        let now = clock::monotonic_ns();
        let window = now >> LIMITED_WINDOW_SHIFT;
        // Nanoseconds that are left of the current window. The previous window counts in this proportion, so that
        // both together cover about the last minute (a window is 69 s).
        let rest = (1 << LIMITED_WINDOW_SHIFT) - (now & ((1 << LIMITED_WINDOW_SHIFT) - 1));
        let mut clients: Vec<RefusedClient> = (0..LIMITED_CLIENTS)
            .map(|entry| self.limited.read::<LimitedClient>(entry))
            .filter(|entry| entry.limiter != 0 && (entry.limiter - 1) / 2 == index)
            .filter_map(|entry| {
                let (current, before) = match window.checked_sub(u64::from(entry.window))? {
                    0 => (entry.count, entry.before),
                    1 => (0, entry.count),
                    _ => return None,
                };
                let refused = u64::from(current) + ((u64::from(before) * (rest >> 20)) >> (LIMITED_WINDOW_SHIFT - 20));
                let address = IpAddr::from(entry.client.bytes).to_canonical();
                (refused > 0).then(|| RefusedClient {
                    client: (!address.is_unspecified()).then(|| named(address)),
                    tier: TierRole::of((entry.limiter as usize - 1) % 2),
                    refused,
                })
            })
            .collect();
        clients.sort_by(|a, b| b.refused.cmp(&a.refused).then(a.client.cmp(&b.client)));
        clients.truncate(most);
        clients
    }
}
