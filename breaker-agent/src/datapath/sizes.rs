//! Sizes of the maps. Pure: `memory.rs` knows the machine.

/// Entries in a bucket of connections or clients.
#[expect(clippy::cast_possible_truncation, reason = "the value is 8")]
const WAYS: u32 = breaker_common::WAYS as u32;

/// Memory of the array of counters, at most: 8 MiB. All possible CPUs have counters of their own.
const MOST_COUNTERS_BYTES: u32 = 8 << 20;
#[expect(clippy::cast_possible_truncation, reason = "the value is about 100")]
const COUNTERS_BYTES: u32 = size_of::<breaker_common::ServiceCounters>() as u32;

/// Entries of `SLOTS` beyond the number of tables, for tables of more than one part.
pub(super) const MORE_PARTS: u32 = 4096;

/// Sizes of the maps, as numbers of objects. Maps with addresses exist once for each IP family, each with the full
/// size.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Sizes {
    /// Services.
    pub services: u32,
    /// Routes; a service has one for each IP family, protocol and port.
    pub routes: u32,
    /// Selection tables; a service needs one for each route with two or more backends, and a second one during a
    /// change.
    pub tables: u32,
    /// Backends of each IP family.
    pub backends: u32,
    /// Established flows of each IP family.
    pub flows: u32,
    /// Flows of each IP family that no backend has answered yet.
    pub pending: u32,
    /// Buckets for connections to services with limits; a power of two.
    pub connection_buckets: u32,
    /// Buckets for clients of services with per-client limits; a power of two.
    pub client_buckets: u32,
}

impl Sizes {
    /// Sizes for a node with this much memory, in MiB. With 16 GiB: 8,192 services, 65,536 backends, 131,072 flows. With 32
    /// GiB or more: twice as many. Flows, endpoints and selection tables take memory only while they exist.
    #[must_use]
    pub fn for_memory(mebibytes: u64) -> Self {
        let mebibytes = u32::try_from(mebibytes).unwrap_or(u32::MAX);
        let services = (mebibytes / 2).clamp(1024, 16_384).next_power_of_two();
        Self::for_services(services).with_flows(flows_of(services))
    }

    /// Sizes for this number of services, with the usual number of routes, tables and backends for each.
    #[must_use]
    pub fn for_services(services: u32) -> Self {
        let backends = services.saturating_mul(8).clamp(16_384, 1 << 20);
        Self {
            services,
            routes: services.saturating_mul(4),
            tables: services.saturating_mul(2),
            backends,
            flows: breaker_common::DEFAULT_FLOWS,
            pending: breaker_common::DEFAULT_PENDING,
            connection_buckets: breaker_common::DEFAULT_CONNECTION_BUCKETS,
            client_buckets: breaker_common::DEFAULT_CLIENT_BUCKETS,
        }
    }

    /// The same sizes, but for this number of established flows of each IP family.
    #[must_use]
    pub fn with_flows(self, flows: u32) -> Self {
        // One entry for every fourth flow: usually only some services have limits, and if the table is full,
        // connections are admitted without being counted.
        let buckets = (flows / 4 / WAYS).clamp(1024, 1 << 16).next_power_of_two();
        let pending = (flows / 8).clamp(8192, 32_768);
        Self { flows, pending, connection_buckets: buckets, client_buckets: buckets, ..self }
    }

    /// Size of the map with this name on a machine with this number of possible CPUs. `None`: the size never varies.
    pub(super) fn entries_of(&self, name: &str, cpus: u32) -> Option<u32> {
        let counters = self.services.min(MOST_COUNTERS_BYTES / (cpus.max(1) * COUNTERS_BYTES));
        Some(match name.trim_end_matches(['4', '6']) {
            // A service that has frontends of one family only has half as many.
            "ENDPOINTS" => self.backends.saturating_add(self.routes / 2),
            "BACKENDS" => self.backends,
            "FLOWS" | "REVERSE" => self.flows,
            "PENDING" | "PENDING_REVERSE" => with_reserve(self.pending, cpus),
            "FRAGMENTS" => with_reserve(breaker_common::DEFAULT_FRAGMENTS, cpus),
            "SOCKETS" => with_reserve(breaker_common::DEFAULT_SOCKETS, cpus),
            "RETURN_PATHS" => breaker_common::DEFAULT_RETURN_PATHS,
            "DOWN_BACKENDS" => breaker_common::DEFAULT_DOWN_BACKENDS,
            "SWITCHES" | "SERVICES" | "RUNTIME" | "LIMITS" | "LIMIT_COUNTERS" => self.services,
            "LIMITERS" => self.services.saturating_mul(2),
            "CONNECTIONS" => self.connection_buckets,
            "CLIENTS" => self.client_buckets,
            "COUNTERS" => counters,
            "MORE_COUNTERS" => self.services.saturating_sub(counters).max(1),
            "ROUTES" => self.routes,
            // A hash has a power of two of buckets. More entries within that number take memory only while they exist.
            "SLOTS" => self.tables.saturating_add(MORE_PARTS).next_power_of_two(),
            _ => return None,
        })
    }
}

/// Number of established flows of each IP family for a node with this number of services.
pub(super) fn flows_of(services: u32) -> u32 {
    services.saturating_mul(16).max(65_536.min(services.saturating_mul(64)))
}

/// Size of an LRU map that is to hold `wanted` entries. Each CPU takes free entries in batches of 128, and evicts when it
/// does not find so many, even if other CPUs have free ones left (kernel, kernel/bpf/bpf_lru_list.c,
/// `LOCAL_FREE_TARGET`).
pub(super) fn with_reserve(wanted: u32, cpus: u32) -> u32 {
    wanted.saturating_add(cpus.saturating_add(1).saturating_mul(128))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_larger_node_holds_more_up_to_a_limit() {
        let small = Sizes::for_memory(512);
        assert_eq!((small.services, small.flows, small.pending), (1024, 65_536, 8192));
        let usual = Sizes::for_memory(16 * 1024);
        assert_eq!((usual.services, usual.backends, usual.flows), (8192, 65_536, 131_072));
        let large = Sizes::for_memory(32 * 1024);
        assert_eq!((large.services, large.backends, large.flows), (16_384, 131_072, 262_144));
        assert_eq!((small.connection_buckets * WAYS, large.client_buckets * WAYS), (16_384, 65_536));
        assert_eq!(Sizes::for_memory(u64::MAX), large);
    }

    /// TRIALS D2: counters take no more memory on machines with many CPUs.
    #[test]
    fn counters_take_bounded_memory_on_any_number_of_cpus() {
        for cpus in 1..=512 {
            let counters = Sizes::for_memory(512 * 1024).entries_of("COUNTERS", cpus).unwrap();
            let bytes = u64::from(counters) * u64::from(cpus) * u64::from(COUNTERS_BYTES);
            assert!(bytes <= 8 << 20 && counters >= 100, "{cpus} CPUs: {counters} services, {bytes} bytes");
        }
    }

    /// TRIALS D3: an LRU map on a machine with many CPUs keeps what it should keep.
    #[test]
    fn many_cpus_get_their_reserve() {
        let small = Sizes::for_memory(512);
        let size = |cpus: u32, name: &str| small.entries_of(name, cpus);
        for name in ["PENDING", "PENDING_REVERSE", "FRAGMENTS", "SOCKETS"] {
            assert_eq!(size(64, name).unwrap() - size(0, name).unwrap(), 64 * 128, "{name}");
        }
        assert_eq!(size(64, "FLOWS"), size(0, "FLOWS"));
    }
}
