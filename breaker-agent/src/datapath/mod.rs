//! The datapath: the eBPF programs and maps of this node. Only this module uses aya.
//!
//! | module | one concern |
//! |---|---|
//! | [`options`] | the options that the configuration sets: attach mode, order, XDP |
//! | [`sizes`] | the sizes of the maps |
//! | [`preflight`] | checks whether a machine can run the datapath |
//! | [`sys`] | the kernel's features, and the mount points of its file systems |
//! | [`pins`] | the pin directory: adopted, created or refused; one agent at a time |
//! | [`programs`] | loading the programs on the maps |
//! | [`tail_calls`] | the map of the full-path programs |
//! | [`attach`] | attaching programs to interfaces, cgroups and drivers |
//! | [`maps`] | the maps, typed |
//! | [`apply`] | writing a plan to the maps, in an order in which every packet sees a consistent state |
//! | [`sweep`] | walking the flow tables: removing finished flows, counting live ones |
//! | [`conntrack`], [`syns`] | the connections to primaries: as the kernel tracks them, or as the programs noted them |
//! | [`moved_flows`] | the connections that were redirected to a backup |
//! | [`poke`], [`sock_destroy`] | making a client answer that waits; closing a connection of a process |
//! | [`return_paths`] | interfaces on which answers of backups are not seen |
//! | [`flow_list`] | the flows of one service, for people |
//! | [`interfaces`], [`neighbors`] | the node's interfaces, and the pods behind them |
//! | [`masquerade`] | the nftables rule for the masquerade mark |
//! | [`offline`] | reading the maps without an agent |
//! | [`cleanup`] | removing everything that an agent left |

pub mod apply;
pub mod attach;
pub mod cleanup;
pub mod conntrack;
pub mod flow_list;
pub mod interfaces;
pub mod maps;
pub mod masquerade;
pub mod memory;
pub mod moved_flows;
pub mod neighbors;
pub mod offline;
pub mod options;
pub mod pins;
pub mod poke;
pub mod preflight;
pub mod programs;
pub mod return_paths;
pub mod sizes;
pub mod sock_destroy;
pub mod sweep;
pub mod syns;
pub mod sys;
mod tail_calls;

use std::{
    collections::{BTreeMap, BTreeSet, HashMap},
    time::Duration,
};

use breaker_common::{DownBackendKey, PassReason, ServiceCounters, switch_flags};
use breaker_core::{
    datapath::{
        Adopted, Datapath, DatapathError, Destination, FlowSnapshot, FlowTables, LimitReport, PacketEvent, Sweep,
    },
    model::{Frontend, ServiceName},
    plan::ServicePlan,
};

use self::{
    apply::{Installed, Limited},
    maps::{Maps, index_allocator::IndexAllocator},
    neighbors::LocalPods,
    return_paths::ReturnPaths,
    sizes::Sizes,
};

/// The datapath on BPF programs and maps in the kernel.
#[derive(Debug)]
pub struct KernelDatapath {
    maps: Maps,
    services: BTreeMap<ServiceName, Installed>,
    /// Backend ids, by destination.
    backends: HashMap<Destination, u32>,
    /// Backends in a service's tables, by service.
    table_backends: BTreeMap<ServiceName, BTreeSet<Destination>>,
    /// Frontends that have the all-packets bit ([`maps::filter::FilterBit::AllPackets`]) in the filter, by service.
    full_path_frontends: BTreeMap<ServiceName, BTreeSet<Frontend>>,
    /// Services with limits.
    limited: BTreeMap<ServiceName, Limited>,
    /// Whether the last sweep found a flow on the fast path (which bypasses the host network stack) or a service that
    /// allows it, or whether such a service was applied since.
    fast_path_seen: bool,
    /// Interface index of each pod on this node, by the pod's address.
    local_pods: LocalPods,
    return_paths: ReturnPaths,
    /// The content of `DOWN_BACKENDS`.
    down_backends: BTreeSet<DownBackendKey>,
    service_indices: IndexAllocator,
    route_indices: IndexAllocator,
    table_indices: IndexAllocator,
    backend_ids: [IndexAllocator; 2],
}

impl KernelDatapath {
    /// Creates the datapath on maps that are already loaded or adopted.
    #[must_use]
    pub fn new(maps: Maps) -> Self {
        let sizes = maps.sizes;
        Self {
            maps,
            services: BTreeMap::new(),
            backends: HashMap::new(),
            table_backends: BTreeMap::new(),
            full_path_frontends: BTreeMap::new(),
            limited: BTreeMap::new(),
            fast_path_seen: true,
            local_pods: LocalPods::new(),
            return_paths: ReturnPaths::default(),
            down_backends: BTreeSet::new(),
            service_indices: IndexAllocator::new("services", sizes.services),
            route_indices: IndexAllocator::new("routes", sizes.routes),
            table_indices: IndexAllocator::new("selection tables", sizes.tables),
            backend_ids: ["IPv4 backends", "IPv6 backends"].map(|what| IndexAllocator::new(what, sizes.backends)),
        }
    }

    /// Returns the sizes of the maps.
    #[must_use]
    pub const fn sizes(&self) -> &Sizes {
        &self.maps.sizes
    }

    /// Whether a service allows the fast path, which bypasses the host network stack, or a flow still uses it.
    #[must_use]
    pub fn fast_path_in_use(&self) -> bool {
        self.maps.fast_path_in_use()
    }

    /// Sends a heartbeat: the programs act on decisions for `lease` from now on; zero = for ever. `unix_ns` is the wall
    /// clock.
    pub fn heartbeat(&mut self, lease: Duration, unix_ns: u64) {
        self.maps.write_heartbeat(lease, unix_ns);
        // A program runs for much less than the time between two heartbeats, so no packet can use an index any more
        // that was released before the previous heartbeat.
        self.service_indices.end_grace_period();
        self.route_indices.end_grace_period();
        for number in self.table_indices.end_grace_period() {
            self.remove_table(number);
        }
    }

    /// Returns the number of packets that failed open, by reason. Reasons with 0 packets are left out.
    ///
    /// # Errors
    /// The map cannot be read.
    pub fn reasons(&self) -> anyhow::Result<Vec<(PassReason, u64)>> {
        self.maps.reasons()
    }

    /// How full the maps are that can fill up: name, entries in use, and entries that there is room for. `flows`: the
    /// flow tables of IPv4 and IPv6 at the last sweep.
    #[must_use]
    pub fn fill(&self, flows: [FlowTables; 2]) -> Vec<(&'static str, u64, u64)> {
        let sizes = self.sizes();
        let allocated = [
            ("SERVICES", &self.service_indices),
            ("ROUTES", &self.route_indices),
            ("SLOTS", &self.table_indices),
            ("BACKENDS4", &self.backend_ids[0]),
            ("BACKENDS6", &self.backend_ids[1]),
        ];
        let allocated = allocated.into_iter().map(|(name, allocator)| {
            let (used, all) = allocator.fill();
            (name, used, all)
        });
        let [v4, v6] = flows.map(|tables| tables.entries.map(|entries| entries as u64));
        let (pending, established) = (sizes.pending.into(), sizes.flows.into());
        let swept = [
            ("PENDING4", v4[0], pending),
            ("FLOWS4", v4[1], established),
            ("PENDING6", v6[0], pending),
            ("FLOWS6", v6[1], established),
        ];
        allocated.chain(swept).collect()
    }

    fn names(&self) -> HashMap<u32, ServiceName> {
        self.services.iter().map(|(name, installed)| (installed.index, name.clone())).collect()
    }

    fn index(&self, name: &ServiceName) -> Result<u32, DatapathError> {
        let installed = self.services.get(name);
        installed.map(|s| s.index).ok_or_else(|| DatapathError(format!("{name} is not in the maps yet")))
    }
}

impl Datapath for KernelDatapath {
    fn adopt(&mut self) -> Result<Vec<Adopted>, DatapathError> {
        self.try_adopt().map_err(failed)
    }

    fn apply(&mut self, plan: &ServicePlan) -> Result<(), DatapathError> {
        self.try_apply(plan).map_err(failed)
    }

    fn remove(&mut self, name: &ServiceName) -> Result<(), DatapathError> {
        self.try_remove(name).map_err(failed)
    }

    fn counters(&self, name: &ServiceName) -> Result<ServiceCounters, DatapathError> {
        let index = self.index(name)?;
        self.maps.counters(index).map_err(failed)
    }

    fn limits(&self, name: &ServiceName, clients: usize) -> Result<LimitReport, DatapathError> {
        let index = self.index(name)?;
        self.maps.limits.report(index, clients).map_err(failed)
    }

    fn sweep(&mut self, idle: Option<Duration>) -> Result<Sweep, DatapathError> {
        let names = self.names();
        let found = sweep::sweep(&mut self.maps, &names, idle).map_err(failed)?;
        self.release_unused_backends(&found.redirected_to, &found.all_to).map_err(failed)?;
        // Read from the switches, because after a restart nothing else is known about the services.
        let fast = |s: &Installed| self.maps.switch(s.index).has(switch_flags::FAST);
        let fast_path_in_use = found.fast_path_in_use || self.services.values().any(fast);
        // Cleared only if two sweeps in a row find nothing: a walk may miss a flow that moves between the tables
        // meanwhile.
        if fast_path_in_use || !std::mem::replace(&mut self.fast_path_seen, fast_path_in_use) {
            self.maps.set_fast_path_in_use(fast_path_in_use);
        }
        self.fast_path_seen |= fast_path_in_use;
        Ok(Sweep { overflowed: self.sweep_limits(), ..found.sweep })
    }

    fn remove_flows(
        &mut self,
        name: &ServiceName,
        doomed: &dyn Fn(Destination) -> bool,
    ) -> Result<usize, DatapathError> {
        let index = self.index(name)?;
        sweep::remove_flows(&mut self.maps, index, doomed).map_err(failed)
    }

    fn is_local(&self, destination: Destination) -> bool {
        self.backends.get(&destination).is_some_and(|id| self.interface(destination.0, *id) != 0)
    }

    fn flows(&self, name: &ServiceName, limit: usize) -> Result<Vec<FlowSnapshot>, DatapathError> {
        let index = self.index(name)?;
        flow_list::list(&self.maps, index, limit).map_err(failed)
    }

    fn events(&mut self) -> Vec<PacketEvent> {
        let names = self.names();
        self.maps.events(&names)
    }
}

/// An error with its causes in one line.
fn failed(error: anyhow::Error) -> DatapathError {
    DatapathError(format!("{error:#}"))
}
