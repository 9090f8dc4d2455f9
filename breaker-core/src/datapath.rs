//! The interface between the engine and the datapath: the trait that the agent implements with eBPF maps, and the
//! values that cross it.

use std::{
    collections::{BTreeMap, BTreeSet},
    error::Error,
    fmt,
    net::SocketAddr,
    time::Duration,
};

use breaker_common::{BreakerState, EventKind, FlowKind, LimitCounters, ServiceCounters, StateReason};

use crate::{
    model::{Frontend, Override, Protocol, ServiceName, TierRole},
    plan::ServicePlan,
    time::UnixNanos,
};

/// A backend as packets know it: its address and port, and the protocol.
pub type Destination = (SocketAddr, Protocol);

/// A datapath operation that failed. The text names the map or program, and the kernel's error.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct DatapathError(pub String);

impl fmt::Display for DatapathError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

impl Error for DatapathError {}

/// A service as an earlier agent left it in the maps.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Adopted {
    /// Name of the service.
    pub name: ServiceName,
    /// Its frontends.
    pub frontends: Vec<Frontend>,
    /// Backends in the selection tables of the backup tier.
    pub backup: BTreeSet<SocketAddr>,
    /// Breaker state that the programs act on.
    pub state: BreakerState,
    /// Epoch of the service.
    pub epoch: u32,
    /// Share of new flows that goes to the primary, in permille.
    pub share: u16,
    /// Reason for the state.
    pub reason: StateReason,
    /// When it entered its state.
    pub since_unix_ns: UnixNanos,
    /// Number of trips in a row.
    pub trips: u32,
    /// The operator's override and when it ends (0 = never).
    pub override_: (Override, UnixNanos),
}

/// One flow, as the flow tables have it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct FlowSnapshot {
    /// The client's address and port.
    pub client: SocketAddr,
    /// The frontend that it connected to.
    pub frontend: SocketAddr,
    /// The backend that it goes to.
    pub backend: SocketAddr,
    /// Its protocol.
    pub protocol: Protocol,
    /// Source port toward the backend. It differs from the client's own port if that port was taken there.
    pub source_port: u16,
    /// Decision that is pinned for the flow.
    pub kind: FlowKind,
    /// The epoch of the decision.
    pub epoch: u32,
    /// How its packets are delivered.
    pub path: FlowPath,
    /// Time since the decision.
    pub age: Duration,
    /// How far the connection has come.
    pub phase: FlowPhase,
}

/// How the packets of a flow are delivered.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum FlowPath {
    /// Through the host network stack.
    Stack,
    /// By the fast path, into the backup's veth.
    Veth,
}

/// How far the connection of a flow has come.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum FlowPhase {
    /// It was left to kube-proxy; the programs do not see its answers.
    Passed,
    /// The backend has not answered yet.
    Unanswered,
    /// Both sides have sent.
    Established,
    /// One side has closed.
    Closing,
    /// Both sides have closed, or one was reset.
    Ended,
}

/// Something that the programs did, as the ring buffer carries it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PacketEvent {
    /// Service that the event belongs to.
    pub service: ServiceName,
    /// What happened.
    pub kind: EventKind,
    /// The epoch in which it happened.
    pub epoch: u32,
    /// The connection's client.
    pub client: SocketAddr,
    /// The frontend that it connected to.
    pub frontend: SocketAddr,
    /// The backend that it was sent to, if any.
    pub backend: Option<SocketAddr>,
}

/// A client whose new connections limits refuse.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct RefusedClient {
    /// Its address, or the IPv6 network that counts as one client, like `fd42::/64`; `None` for the node's own
    /// processes.
    pub client: Option<String>,
    /// The tier whose limit refused it.
    pub tier: TierRole,
    /// New connections over a limit in the last minute; an estimate where many clients are refused.
    pub refused: u64,
}

/// Counters of a service's limits, and the clients that they refuse.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct LimitReport {
    /// Counters since the service was added to the maps.
    pub counters: LimitCounters,
    /// Number of connections that are counted now: to the primary, to the backup.
    pub concurrent: [u32; 2],
    /// Clients with the most refused connections in the last minute, highest number first.
    pub clients: Vec<RefusedClient>,
}

/// The flow tables of one IP family: of pending flows, and of established ones.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct FlowTables {
    /// Entries that remain.
    pub entries: [usize; 2],
    /// Those of them whose connection is not over.
    pub live: [usize; 2],
}

/// Result of a walk through the flow tables.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Sweep {
    /// Live flows on a backup, by service.
    pub redirected: BTreeMap<ServiceName, usize>,
    /// The flow tables of IPv4 and IPv6.
    pub tables: [FlowTables; 2],
    /// How full the fuller one of the two tables of established flows is, in percent.
    pub pressure_percent: u8,
    /// Services whose primary was at a limit since the last sweep, so that connections went to the backup while closed.
    pub overflowed: BTreeSet<ServiceName>,
}

impl Sweep {
    /// Entries in the fuller one of the two tables of established flows.
    #[must_use]
    pub fn established(&self) -> usize {
        self.tables.iter().map(|tables| tables.entries[1]).max().unwrap_or(0)
    }
}

/// Operations that the engine needs from the datapath.
pub trait Datapath {
    /// Reads what an earlier agent left. The engine calls it once, before it changes anything.
    ///
    /// # Errors
    /// Maps that cannot be read.
    fn adopt(&mut self) -> Result<Vec<Adopted>, DatapathError>;

    /// Writes a plan to the maps. The service's switch is written last, as one word. If a write fails before that,
    /// the old decision stays in force unchanged.
    ///
    /// # Errors
    /// The map write that failed; applying the same plan again is safe.
    fn apply(&mut self, plan: &ServicePlan) -> Result<(), DatapathError>;

    /// Removes a service from the maps. Its live flows would break, so the engine calls it when there are none.
    ///
    /// # Errors
    /// As for [`Datapath::apply`].
    fn remove(&mut self, name: &ServiceName) -> Result<(), DatapathError>;

    /// Returns a service's counters, summed over the CPUs.
    ///
    /// # Errors
    /// The service is not in the maps, or the maps cannot be read.
    fn counters(&self, name: &ServiceName) -> Result<ServiceCounters, DatapathError>;

    /// Returns the counters of a service's limits, with up to `clients` of the clients that they refuse.
    ///
    /// # Errors
    /// Maps that cannot be read.
    fn limits(&self, name: &ServiceName, clients: usize) -> Result<LimitReport, DatapathError>;

    /// Walks the flow tables: removes finished flows and counts live ones. `idle` is how long an established flow
    /// without packets is kept. `None` keeps all of them: an agent that has just started does not know which packets
    /// passed before.
    ///
    /// # Errors
    /// Maps that cannot be read.
    fn sweep(&mut self, idle: Option<Duration>) -> Result<Sweep, DatapathError>;

    /// Removes a service's flows to the backends for which `doomed` is true. Their packets are no longer translated.
    /// Returns the number of flows removed.
    ///
    /// # Errors
    /// Maps that cannot be read or written; flows that were removed by then stay removed.
    fn remove_flows(
        &mut self,
        name: &ServiceName,
        doomed: &dyn Fn(Destination) -> bool,
    ) -> Result<usize, DatapathError>;

    /// Whether a backend is known to be a pod of this node, which the fast path can reach.
    fn is_local(&self, destination: Destination) -> bool;

    /// The service's flows, youngest first, up to `limit`.
    ///
    /// # Errors
    /// Maps that cannot be read.
    fn flows(&self, name: &ServiceName, limit: usize) -> Result<Vec<FlowSnapshot>, DatapathError>;

    /// Events since the last call, up to a few thousand.
    fn events(&mut self) -> Vec<PacketEvent>;
}
