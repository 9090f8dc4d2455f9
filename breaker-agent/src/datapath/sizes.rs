//! Sizes of the maps. Where the configuration does not set them, they follow from the node's memory and from the memory
//! limit of the agent's cgroup.

use std::path::Path;

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
    /// Sizes for a node with this much memory, in MiB. With 16 GiB or more: 16,384 services, 131,072 backends,
    /// 262,144 flows. The maps take about 70 MiB at once then; flows, endpoints and selection tables take memory
    /// only while they exist.
    #[must_use]
    pub fn for_memory(mebibytes: u64) -> Self {
        let mebibytes = u32::try_from(mebibytes).unwrap_or(u32::MAX);
        let services = mebibytes.clamp(1024, 16_384).next_power_of_two();
        Self::for_services(services).with_flows((services.saturating_mul(16)).max(65_536))
    }

    /// As [`Sizes::for_memory`], for an agent whose cgroup may use `limit` MiB: the kernel charges the maps to it. 256 MiB
    /// are enough for the largest of these sizes with full tables, so each MiB of the limit counts as 64 of the node.
    #[must_use]
    pub fn for_limits(node: u64, limit: Option<u64>) -> Self {
        Self::for_memory(limit.map_or(node, |limit| node.min(limit.saturating_mul(64))))
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

    /// Sizes of the maps that exist once for each IP family, by map name without the family's digit. `cpus`: possible
    /// CPUs of the machine.
    pub(super) fn by_name(&self, cpus: u32) -> [(&'static str, u32); 7] {
        let pending = with_reserve(self.pending, cpus);
        [
            ("ENDPOINTS", self.backends.saturating_add(self.routes)),
            ("BACKENDS", self.backends),
            ("FLOWS", self.flows),
            ("REVERSE", self.flows),
            ("PENDING", pending),
            ("PENDING_REVERSE", pending),
            ("FRAGMENTS", with_reserve(breaker_common::DEFAULT_FRAGMENTS, cpus)),
        ]
    }

    /// Sizes of the maps that both IP families share, by map name.
    pub(super) fn shared(&self, cpus: u32) -> [(&'static str, u32); 14] {
        [
            ("MORE_COUNTERS", self.services),
            ("RETURN_PATHS", breaker_common::DEFAULT_RETURN_PATHS),
            ("SOCKETS", with_reserve(breaker_common::DEFAULT_SOCKETS, cpus)),
            ("LIMITS", self.services),
            ("LIMITERS", self.services.saturating_mul(2)),
            ("LIMIT_COUNTERS", self.services),
            ("CONNECTIONS", self.connection_buckets),
            ("CLIENTS", self.client_buckets),
            ("SWITCHES", self.services),
            ("SERVICES", self.services),
            ("RUNTIME", self.services),
            ("COUNTERS", self.services.min(MOST_COUNTERS_BYTES / (cpus.max(1) * COUNTERS_BYTES))),
            ("ROUTES", self.routes),
            ("SLOTS", self.tables.saturating_add(MORE_PARTS)),
        ]
    }
}

/// Size of an LRU map that is to hold `wanted` entries. Each CPU takes free entries in batches of 128 (kernel,
/// bpf_lru_list.c, `LOCAL_FREE_TARGET`), and evicts when it finds none, even if other CPUs have free ones left.
fn with_reserve(wanted: u32, cpus: u32) -> u32 {
    wanted.saturating_add(cpus.saturating_mul(256))
}

impl Default for Sizes {
    fn default() -> Self {
        let limit = memory_limit(Path::new("/proc/self/cgroup"), Path::new("/sys/fs/cgroup"));
        Self::for_limits(node_memory(), limit)
    }
}

/// Returns the lowest memory limit of this process's cgroup and of those above it, in MiB; `None` if there is none.
/// `own` says which cgroup it is (cgroups(7), `/proc/PID/cgroup`), and `tree` is where the hierarchies are mounted.
fn memory_limit(own: &Path, tree: &Path) -> Option<u64> {
    let text = std::fs::read_to_string(own).unwrap_or_default();
    let lines = text.lines().filter_map(|line| {
        let (_, rest) = line.split_once(':')?;
        rest.split_once(':')
    });
    // Version 2 has one line without controllers; version 1 has one for each hierarchy.
    let places = lines.filter_map(|(controllers, path)| match controllers {
        "" => Some((tree.to_owned(), path, "memory.max")),
        _ if controllers.split(',').any(|name| name == "memory") => {
            Some((tree.join("memory"), path, "memory.limit_in_bytes"))
        }
        _ => None,
    });
    let limits = places.flat_map(|(root, path, file)| {
        let directories = Path::new(path.trim_start_matches('/')).ancestors().map(Path::to_owned).collect::<Vec<_>>();
        directories.into_iter().filter_map(move |directory| {
            let text = std::fs::read_to_string(root.join(directory).join(file)).ok()?;
            text.trim().parse::<u64>().ok().map(|bytes| bytes >> 20)
        })
    });
    limits.min()
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
        assert_eq!((small.services, small.flows, small.pending), (1024, 65_536, 8192));
        let large = Sizes::for_memory(16 * 1024);
        assert_eq!((large.services, large.backends, large.flows), (16_384, 131_072, 262_144));
        assert_eq!((small.connection_buckets * WAYS, large.client_buckets * WAYS), (16_384, 65_536));
        assert_eq!(Sizes::for_memory(u64::MAX), large);
    }

    /// TRIALS D1: the tables are charged to the agent's cgroup.
    #[test]
    fn a_limit_of_the_cgroup_bounds_the_sizes() {
        let small = Sizes::for_limits(64 * 1024, Some(64));
        assert_eq!(small, Sizes::for_memory(4096));
        assert_eq!(Sizes::for_limits(512, Some(1 << 40)), Sizes::for_memory(512));
        assert_eq!(Sizes::for_limits(512, None), Sizes::for_memory(512));
        // The limit in the manifests is enough for the largest node.
        assert_eq!(Sizes::for_limits(1 << 20, Some(256)), Sizes::for_memory(1 << 20));
        for manifest in
            [include_str!("../../../k8s/base/daemonset.yaml"), include_str!("../../../k8s/chart/values.yaml")]
        {
            assert!(manifest.contains("memory: 256Mi"));
        }
        let dir = tempfile::tempdir().unwrap();
        let file = |name: &str, text: &str| {
            let path = dir.path().join(name);
            std::fs::create_dir_all(path.parent().unwrap()).unwrap();
            std::fs::write(path, text).unwrap();
        };
        let limit = || memory_limit(&dir.path().join("self"), dir.path());
        assert_eq!(limit(), None);
        file("self", "0::/kubepods/pod1/agent\n");
        assert_eq!(limit(), None);
        file("kubepods/pod1/agent/memory.max", "max\n");
        file("kubepods/pod1/memory.max", "268435456\n");
        file("kubepods/memory.max", "8589934592\n");
        assert_eq!(limit(), Some(256));
        file("self", "4:cpu,cpuacct:/x\n3:memory:/a/b\n0::/\n");
        file("memory/a/b/memory.limit_in_bytes", "134217728\n");
        file("memory/memory.limit_in_bytes", "9223372036854771712\n");
        assert_eq!(limit(), Some(128));
    }

    /// TRIALS D2: counters take no more memory on machines with many CPUs.
    #[test]
    fn counters_take_bounded_memory_on_any_number_of_cpus() {
        for cpus in 1..=512 {
            let shared = Sizes::for_memory(512 * 1024).shared(cpus);
            let counters = shared.iter().find(|(name, _)| *name == "COUNTERS").map(|(_, entries)| *entries).unwrap();
            let bytes = u64::from(counters) * u64::from(cpus) * u64::from(COUNTERS_BYTES);
            assert!(bytes <= 8 << 20 && counters >= 100, "{cpus} CPUs: {counters} services, {bytes} bytes");
        }
    }

    /// TRIALS D3: an LRU map on a machine with many CPUs keeps what it should keep.
    #[test]
    fn many_cpus_get_their_reserve() {
        let small = Sizes::for_memory(512);
        let size = |cpus: u32, name: &str| {
            let mut all = small.by_name(cpus).into_iter().chain(small.shared(cpus));
            all.find(|(of, _)| *of == name).map(|(_, entries)| entries)
        };
        for name in ["PENDING", "PENDING_REVERSE", "FRAGMENTS", "SOCKETS"] {
            assert_eq!(size(64, name).unwrap() - size(0, name).unwrap(), 64 * 256, "{name}");
        }
        assert_eq!(size(64, "FLOWS"), size(0, "FLOWS"));
    }
}
