//! How large the maps are: by the node's memory, where the configuration does not say.

/// Places in a bucket.
#[expect(clippy::cast_possible_truncation, reason = "eight")]
const WAYS: u32 = breaker_common::WAYS as u32;

/// How many of each a node can hold. What is keyed by addresses is so large for each family.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Sizes {
    /// Services.
    pub services: u32,
    /// Routes: a service has one for each family, protocol and port.
    pub routes: u32,
    /// Selection tables; a service needs one for each route with two backends or more, and a second while they change.
    pub tables: u32,
    /// Backends.
    pub backends: u32,
    /// Established flows.
    pub flows: u32,
    /// Flows that were not answered yet.
    pub pending: u32,
    /// Buckets for connections to services with limits; a power of two.
    pub connection_buckets: u32,
    /// Buckets for clients of services with limits for each client; a power of two.
    pub client_buckets: u32,
}

impl Sizes {
    /// For a node with this much memory, in MiB. At 16 GiB: 16,384 services, 131,072 backends, 262,144 flows; what is taken
    /// up at once is some 2 MiB for every GiB, flows and endpoints cost when they are there.
    #[must_use]
    pub fn for_memory(mebibytes: u64) -> Self {
        let mebibytes = u32::try_from(mebibytes).unwrap_or(u32::MAX);
        let services = mebibytes.clamp(1024, 16_384).next_power_of_two();
        Self::for_services(services).with_flows((services.saturating_mul(16)).max(65_536))
    }

    /// For so many services, with what they usually have.
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

    /// For so many established flows.
    #[must_use]
    pub fn with_flows(self, flows: u32) -> Self {
        // A place for every fourth flow: limits are for some services, and full tables fail open.
        let buckets = (flows / 4 / WAYS).clamp(1024, 1 << 16).next_power_of_two();
        let pending = (flows / 2).clamp(8192, 131_072);
        Self { flows, pending, connection_buckets: buckets, client_buckets: buckets, ..self }
    }

    /// The sizes of maps by their names, without the family's number.
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

    /// The sizes of maps that are there once.
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

/// The node's memory in MiB (proc_meminfo(5), `MemTotal`); 1 GiB where it cannot be read.
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
