//! The datapath: carries out plans, and tells what the programs did. Only this module knows maps and programs.
//!
//! [`plan`] says what should be, from domain types, without knowing the kernel; [`kernel`] makes it so; [`fake`]
//! pretends to, for tests of everything above.

pub mod fake;
pub mod kernel;
pub mod plan;

use std::{
    borrow::Cow,
    collections::{BTreeMap, BTreeSet},
    net::SocketAddr,
    time::Duration,
};

use breaker_common::{BreakerState, EventKind, FlowKind, LimitCounters, PassReason, ServiceCounters, StateReason};
use serde::{Deserialize, Serialize};

use crate::model::{Frontend, Override, Protocol, ServiceName};
use plan::ServicePlan;

/// A backend as packets know it.
pub type Destination = (SocketAddr, Protocol);

/// What the datapath could not do. The text names the map or program and the kernel's answer.
#[derive(Debug, thiserror::Error)]
#[error("{0}")]
pub struct DatapathError(pub String);

impl From<anyhow::Error> for DatapathError {
    fn from(error: anyhow::Error) -> Self {
        Self(format!("{error:#}"))
    }
}

/// A service as an earlier agent left it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Adopted {
    /// Its name.
    pub name: ServiceName,
    /// Where its clients connect to.
    pub frontends: Vec<Frontend>,
    /// Backends that its backup table names.
    pub backup: BTreeSet<SocketAddr>,
    /// The state that the programs act on.
    pub state: BreakerState,
    /// Its epoch.
    pub epoch: u32,
    /// The primary's share, permille.
    pub share: u16,
    /// Why it is in its state.
    pub reason: StateReason,
    /// Since when, nanoseconds since 1970.
    pub since_unix_ns: u64,
    /// Trips in a row.
    pub trips: u32,
    /// An operator's word and when it ends (nanoseconds since 1970, 0 = never).
    pub override_: (Override, u64),
}

/// A flow for people.
#[derive(Clone, Debug, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct FlowView {
    /// Client.
    pub client: SocketAddr,
    /// What it connected to.
    pub frontend: SocketAddr,
    /// Where it goes.
    pub backend: SocketAddr,
    /// Under which protocol.
    pub protocol: Protocol,
    /// The client's port toward the backend.
    pub source_port: u16,
    /// What was decided.
    #[serde(serialize_with = "kind_label")]
    pub kind: FlowKind,
    /// In which epoch.
    pub epoch: u32,
    /// How its packets go: `stack`, or `veth`: past the stack, into the backup's veth.
    pub way: &'static str,
    /// How long ago, seconds.
    pub age_seconds: u64,
    /// Whether the backend answered, and whether it is over.
    pub phase: &'static str,
}

fn kind_label<S: serde::Serializer>(kind: &FlowKind, s: S) -> Result<S::Ok, S::Error> {
    s.serialize_str(kind.label())
}

/// What the programs tell as it happens.
#[derive(Clone, Debug, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct PacketEvent {
    /// The service.
    pub service: ServiceName,
    /// What happened.
    #[serde(serialize_with = "event_label")]
    pub kind: EventKind,
    /// In which epoch.
    pub epoch: u32,
    /// Whose connection.
    pub client: SocketAddr,
    /// To what.
    pub frontend: SocketAddr,
    /// Where it went, if anywhere.
    pub backend: Option<SocketAddr>,
}

fn event_label<S: serde::Serializer>(kind: &EventKind, s: S) -> Result<S::Ok, S::Error> {
    s.serialize_str(kind.label())
}

/// A client that limits refuse, for people.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct LimitedClientView {
    /// Its address, or the IPv6 network that counts as one client, like `fd42::/64`; absent for the node's own processes.
    pub client: Option<String>,
    /// `primary` or `backup`.
    pub tier: Cow<'static, str>,
    /// New connections of the last minute that were over a limit; about, where many clients are refused.
    pub refused: u64,
}

/// What limits did for a service.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct LimitReport {
    /// Since the service is in the maps.
    pub counters: LimitCounters,
    /// Connections that are counted now: to the primary, to the backup.
    pub concurrent: [u32; 2],
    /// The clients that were refused most often in the last minute, most first.
    pub clients: Vec<LimitedClientView>,
}

/// What a look through the flow tables found.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Sweep {
    /// Flows on a backup that live, by service.
    pub redirected: BTreeMap<ServiceName, usize>,
    /// Entries in the forward tables, finished ones removed.
    pub entries: usize,
    /// Those of them that nothing pushes out, in the fuller one of the two families' tables.
    pub established: usize,
    /// How full that table is.
    pub pressure_percent: u8,
    /// Services whose primary was at a limit, so that connections went to the backup while it is closed.
    pub overflowed: BTreeSet<ServiceName>,
}

/// What the engine needs of the datapath.
pub trait Datapath {
    /// What an earlier agent left; asked once, before anything is changed.
    ///
    /// # Errors
    /// Maps that cannot be read.
    fn adopt(&mut self) -> Result<Vec<Adopted>, DatapathError>;

    /// Makes a plan true. The switch is thrown last and at once; a failure before it leaves the old decision whole.
    ///
    /// # Errors
    /// The map write that failed; applying the same plan again is safe.
    fn apply(&mut self, plan: &ServicePlan) -> Result<(), DatapathError>;

    /// Takes a service away; flows of it that live would be cut, so it is asked for when none is left.
    ///
    /// # Errors
    /// As for [`Datapath::apply`].
    fn remove(&mut self, name: &ServiceName) -> Result<(), DatapathError>;

    /// Renews the lease.
    fn beat(&mut self, lease: Duration, unix_ns: u64);

    /// A service's counters, summed over the CPUs.
    ///
    /// # Errors
    /// Maps that cannot be read.
    fn counters(&self, name: &ServiceName) -> Result<ServiceCounters, DatapathError>;

    /// What limits did for a service, with up to `clients` of its clients.
    ///
    /// # Errors
    /// Maps that cannot be read.
    fn limits(&self, name: &ServiceName, clients: usize) -> Result<LimitReport, DatapathError>;

    /// Packets that failed open, by reason; only reasons that happened.
    ///
    /// # Errors
    /// Maps that cannot be read.
    fn reasons(&self) -> Result<Vec<(PassReason, u64)>, DatapathError>;

    /// Looks through the flow tables: removes what is over, and counts what lives. `idle` is how long a flow without
    /// packets is kept; `None` keeps it (the agent just started and does not know what it missed).
    ///
    /// # Errors
    /// Maps that cannot be read.
    fn sweep(&mut self, idle: Option<Duration>) -> Result<Sweep, DatapathError>;

    /// Ends a service's flows to the backends that are `doomed`: no packet of theirs is translated any more. Returns how many there were.
    ///
    /// # Errors
    /// Maps that cannot be read or written; what was done by then stays done.
    fn cut(&mut self, name: &ServiceName, doomed: &dyn Fn(Destination) -> bool) -> Result<usize, DatapathError>;

    /// Whether a backend is a pod of this node that flows may reach past the stack.
    fn is_near(&self, destination: Destination) -> bool;

    /// The service's flows, up to `limit`.
    ///
    /// # Errors
    /// Maps that cannot be read.
    fn flows(&self, name: &ServiceName, limit: usize) -> Result<Vec<FlowView>, DatapathError>;

    /// Events since the last call, up to some thousand.
    fn events(&mut self) -> Vec<PacketEvent>;
}
