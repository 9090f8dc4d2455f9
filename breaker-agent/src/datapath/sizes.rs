//! Sizes of the maps. Where the configuration does not set them, they follow from the node's memory.

/// Entries in a bucket of connections or clients.
#[expect(clippy::cast_possible_truncation, reason = "the value is 8")]
const WAYS: u32 = breaker_common::WAYS as u32;

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
    /// Sizes for a node with this much memory, in MiB. With 16 GiB or more: 16,384 services, 131,072 backends,
    /// 262,144 flows. The maps take about 2 MiB for each GiB of memory at once; flows and endpoints take memory
    /// only while they exist.
    #[must_use]
    pub fn for_memory(mebibytes: u64) -> Self {
        let mebibytes = u32::try_from(mebibytes).unwrap_or(u32::MAX);
        let services = mebibytes.clamp(1024, 16_384).next_power_of_two();
        Self::for_services(services).with_flows((services.saturating_mul(16)).max(65_536))
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
        let pending = (flows / 2).clamp(8192, 131_072);
        Self { flows, pending, connection_buckets: buckets, client_buckets: buckets, ..self }
    }

    /// Sizes of the maps that exist once for each IP family, by map name without the family's digit.
    pub(super) fn by_name(&self) -> [(&'static str, u32); 6] {
        [
            ("ENDPOINTS", self.backends.saturating_add(self.routes)),
            ("BACKENDS", self.backends),
            ("FLOWS", self.flows),
            ("REVERSE", self.flows),
            ("PENDING", self.pending),
            ("PENDING_REVERSE", self.pending),
        ]
    }

    /// Sizes of the maps that both IP families share, by map name.
    pub(super) fn shared(&self) -> [(&'static str, u32); 11] {
        [
            ("LIMITS", self.services),
            ("LIMITERS", self.services.saturating_mul(2)),
            ("LIMIT_COUNTERS", self.services),
            ("CONNECTIONS", self.connection_buckets),
            ("CLIENTS", self.client_buckets),
            ("SWITCHES", self.services),
            ("SERVICES", self.services),
            ("RUNTIME", self.services),
            ("COUNTERS", self.services),
            ("ROUTES", self.routes),
            ("SLOTS", self.tables),
        ]
    }
}

impl Default for Sizes {
    fn default() -> Self {
        Self::for_memory(node_memory())
    }
}

/// Returns the node's memory in MiB (proc_meminfo(5), `MemTotal`); 1024 if it cannot be read.
fn node_memory() -> u64 {
    let text = std::fs::read_to_string("/proc/meminfo").unwrap_or_default();
    let total = text.lines().find_map(|line| line.strip_prefix("MemTotal:"));
    let kibibytes = total.and_then(|rest| rest.split_whitespace().next()?.parse::<u64>().ok());
    kibibytes.map_or(1024, |kibibytes| kibibytes / 1024)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_larger_node_holds_more_up_to_a_limit() {
        let small = Sizes::for_memory(512);
        assert_eq!((small.services, small.flows, small.pending), (1024, 65_536, 32_768));
        let large = Sizes::for_memory(16 * 1024);
        assert_eq!((large.services, large.backends, large.flows), (16_384, 131_072, 262_144));
        assert_eq!((small.connection_buckets * WAYS, large.client_buckets * WAYS), (16_384, 65_536));
        assert_eq!(Sizes::for_memory(u64::MAX), large);
    }
}
