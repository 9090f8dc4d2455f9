//! Memory: what the kernel takes for the maps, what this machine has, and the sizes that follow.

use std::path::Path;

use super::{
    maps::pinned,
    sizes::{self, Sizes},
};

/// Names of the LRU maps, without the digit of the IP family. Their entries exist from the start.
const LRU: [&str; 4] = ["PENDING", "PENDING_REVERSE", "FRAGMENTS", "SOCKETS"];
/// Names of the hashes, without the digit of the IP family. Their entries take memory only while they exist.
const HASHES: [&str; 8] =
    ["ENDPOINTS", "FLOWS", "REVERSE", "SLOTS", "MORE_COUNTERS", "LIMIT_COUNTERS", "RETURN_PATHS", "DOWN_BACKENDS"];
/// Maps whose size depends on nothing (`EVENTS`, `FILTER`, `LIMITED` and smaller ones), the programs' log and the programs.
const OTHER: u64 = 4 << 20;

/// Memory in bytes.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct MapMemory {
    /// From the creation of the maps on.
    pub at_once: u64,
    /// With every entry in use.
    pub when_full: u64,
}

impl MapMemory {
    /// Memory of maps with these sizes on a machine with this number of possible CPUs.
    #[must_use]
    pub fn of(sizes: &Sizes, cpus: u32) -> Self {
        let maps = pinned().filter_map(|(name, key, value)| {
            let entries = sizes.entries_of(name, cpus)?;
            Some(of_map(name.trim_end_matches(['4', '6']), key, value, entries.into(), cpus.into()))
        });
        maps.fold(Self { at_once: OTHER, when_full: OTHER }, |sum, map| Self {
            at_once: sum.at_once + map.at_once,
            when_full: sum.when_full + map.when_full,
        })
    }
}

/// Memory of one map, by the rules of the kernel (kernel/bpf/arraymap.c, hashtab.c and memalloc.c, version 6.12).
fn of_map(name: &str, key: usize, value: usize, entries: u64, cpus: u64) -> MapMemory {
    let round = |bytes: usize| bytes.next_multiple_of(8) as u64;
    // The head of an entry is 48 bytes long. The array of buckets has a power of two of elements of 16 bytes.
    let (element, buckets) = (48 + round(key) + round(value), entries.next_power_of_two() * 16);
    let of_array = |bytes| MapMemory { at_once: bytes, when_full: bytes };
    if LRU.contains(&name) {
        of_array(buckets + entries * element)
    } else if HASHES.contains(&name) {
        // The allocator keeps a few entries ready for each CPU, and prefixes each with a pointer.
        let slab = of_slab(element + 8);
        let ready = (cpus * 4).min(entries) * slab;
        MapMemory { at_once: buckets + ready, when_full: buckets + ready + entries * slab }
    } else {
        of_array(entries * round(value) * if name == "COUNTERS" { cpus } else { 1 })
    }
}

/// Bytes of the slab object that an allocation of `bytes` takes (kernel, mm/slab_common.c, `kmalloc_info`).
fn of_slab(bytes: u64) -> u64 {
    match bytes {
        ..=64 => bytes.next_multiple_of(8).next_power_of_two(),
        65..=96 => 96,
        129..=192 => 192,
        _ => bytes.next_power_of_two(),
    }
}

/// Returns the sizes for this machine and this process's memory limit.
#[must_use]
pub fn default_sizes() -> Sizes {
    fitting(node_memory(), own_memory_limit(), possible_cpus())
}

/// Returns [`Sizes::for_memory`], or smaller ones for an agent whose cgroup may use `limit` MiB, on a machine with this number of possible
/// CPUs. The kernel charges the maps to the cgroup: when they are full, they leave the agent a quarter of the limit.
/// Tables for fewer than 256 services are of no use, so a limit that is too low for these is exceeded.
fn fitting(node: u64, limit: Option<u64>, cpus: u32) -> Sizes {
    let wanted = Sizes::for_memory(node);
    let Some(limit) = limit else { return wanted };
    let smaller = |sizes: &Sizes| {
        let services = (sizes.services > 256).then_some(sizes.services / 2)?;
        Some(Sizes::for_services(services).with_flows(sizes.flows.min(sizes::flows_of(services))))
    };
    let mut all = std::iter::successors(Some(wanted), smaller).peekable();
    while let Some(sizes) = all.next() {
        if MapMemory::of(&sizes, cpus).when_full <= (limit << 20) / 4 * 3 || all.peek().is_none() {
            return sizes;
        }
    }
    wanted
}

/// Returns the memory of full maps and the memory limit, in MiB, if the maps do not fit.
#[must_use]
pub fn over_limit(sizes: &Sizes) -> Option<(u64, u64)> {
    let full = MapMemory::of(sizes, possible_cpus()).when_full >> 20;
    own_memory_limit().filter(|limit| full > *limit).map(|limit| (full, limit))
}

/// [`memory_limit`] of this process.
fn own_memory_limit() -> Option<u64> {
    memory_limit(Path::new("/proc/self/cgroup"), Path::new("/sys/fs/cgroup"))
}

/// Returns the lowest memory limit of a process's cgroup and of those above it, in MiB; `None` if there is none. `own` says
/// which cgroup it is (cgroups(7), `/proc/PID/cgroup`), and `tree` is where the hierarchies are mounted.
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

/// Returns the number of possible CPUs; 1 if it cannot be read.
pub(super) fn possible_cpus() -> u32 {
    aya::util::nr_cpus().map_or(1, |cpus| u32::try_from(cpus).unwrap_or(1))
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

    const MIB: u64 = 1 << 20;
    /// Memory limit of the agent's container in the manifests, in MiB.
    const LIMIT: u64 = 256;

    /// TRIALS D1: on every node from 1 to 512 GiB and 1 to 512 possible CPUs, the maps leave the agent a quarter of its
    /// memory limit, also when they are full.
    #[test]
    fn full_maps_fit_into_the_limit_of_the_manifests_on_every_node() {
        for manifest in
            [include_str!("../../../k8s/base/daemonset.yaml"), include_str!("../../../k8s/chart/values.yaml")]
        {
            assert!(manifest.contains(&format!("memory: {LIMIT}Mi")));
        }
        // Sizes change at powers of two.
        for gibibytes in (0..10).map(|power| 1 << power) {
            for cpus in 1..=512 {
                let sizes = fitting(gibibytes * 1024, Some(LIMIT), cpus);
                let memory = MapMemory::of(&sizes, cpus);
                assert!(
                    memory.when_full <= LIMIT * MIB / 4 * 3,
                    "{gibibytes} GiB, {cpus} CPUs: {} MiB",
                    memory.when_full / MIB
                );
                assert!(sizes.services >= 1024 && sizes.flows >= 65_536, "{gibibytes} GiB, {cpus} CPUs: {sizes:?}");
            }
        }
    }

    /// TRIALS D1: the tables are charged to the agent's cgroup.
    #[test]
    fn a_limit_of_the_cgroup_bounds_the_sizes() {
        let sizes = |node: u64, limit: Option<u64>| {
            let sizes = fitting(node, limit, 2);
            (sizes.services, sizes.flows)
        };
        assert_eq!(sizes(64 * 1024, None), (16_384, 262_144));
        assert_eq!(sizes(64 * 1024, Some(1 << 40)), (16_384, 262_144));
        assert_eq!(sizes(64 * 1024, Some(256)), (8192, 131_072));
        assert_eq!(sizes(64 * 1024, Some(128)), (4096, 65_536));
        assert_eq!(sizes(64 * 1024, Some(1)), (256, 16_384));
        assert_eq!(sizes(512, Some(1 << 40)), (1024, 65_536));
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

    /// The table in docs/CONFIGURATION.md.
    #[test]
    fn the_documented_memory_is_right() {
        let docs = include_str!("../../../docs/CONFIGURATION.md");
        let mut missing = Vec::new();
        for (gibibytes, limit, cpus) in [
            (1, Some(256), 2),
            (4, Some(256), 4),
            (16, Some(256), 2),
            (16, Some(256), 128),
            (512, Some(256), 512),
            (64, None, 64),
        ] {
            let sizes = fitting(gibibytes * 1024, limit, cpus);
            let memory = MapMemory::of(&sizes, cpus);
            let mebibytes = |bytes: u64| bytes.div_ceil(MIB);
            let limit = limit.map_or("none".to_owned(), |limit| format!("{limit} MiB"));
            let row = format!(
                "| {gibibytes} GiB | {cpus} | {limit} | {} | {} | {} MiB | {} MiB |",
                sizes.services,
                sizes.flows,
                mebibytes(memory.at_once),
                mebibytes(memory.when_full),
            );
            if !docs.contains(&row) {
                missing.push(row);
            }
        }
        assert!(missing.is_empty(), "docs/CONFIGURATION.md lacks rows:\n{}", missing.join("\n"));
    }
}
