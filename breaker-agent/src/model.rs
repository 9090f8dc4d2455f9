//! The domain: what is protected, by what, and how. Core and std only; every source (a file, later Kubernetes) ends
//! here, and nothing behind it knows where it came from.

use std::{
    collections::{BTreeMap, BTreeSet},
    fmt,
    net::SocketAddr,
    ops::RangeInclusive,
    sync::Arc,
    time::Duration,
};

use serde::Serialize;

use crate::limits::Limits;

/// A service's name, unique on a node.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize)]
#[serde(transparent)]
pub struct ServiceName(Arc<str>);

impl ServiceName {
    /// A name as it is; sources check its form.
    #[must_use]
    pub fn new(name: &str) -> Self {
        Self(name.into())
    }

    /// As text.
    #[must_use]
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

impl fmt::Display for ServiceName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}

/// Transport protocols that are protected.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize)]
pub enum Protocol {
    /// RFC 9293.
    #[serde(rename = "TCP")]
    Tcp,
    /// RFC 768.
    #[serde(rename = "UDP")]
    Udp,
}

impl Protocol {
    /// As it is written.
    #[must_use]
    pub const fn name(self) -> &'static str {
        match self {
            Self::Tcp => "TCP",
            Self::Udp => "UDP",
        }
    }
}

/// Where clients connect to: a Service's VIP, port and protocol.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize)]
pub struct Frontend {
    /// Address and port.
    pub address: SocketAddr,
    /// Protocol.
    pub protocol: Protocol,
}

impl fmt::Display for Frontend {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}/{}", self.address, self.protocol.name())
    }
}

/// Frontends from which the backends are not reached at the addresses that the tiers name them by: another port of theirs,
/// or the other IP family.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct Route {
    /// Which of the service's frontends.
    pub frontends: Vec<Frontend>,
    /// By the address that a tier names a backend by, the one that it has here. A backend that is not in it cannot be
    /// reached from these frontends.
    pub backends: BTreeMap<SocketAddr, SocketAddr>,
}

/// One destination of a tier. Its address is also its identity, and what is checked.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize)]
pub struct Backend {
    /// Address and port.
    pub address: SocketAddr,
    /// Its part of the tier's new connections, relative to the others'; at least 1.
    pub weight: u16,
}

/// A priority group: the primary, or one of the backups.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct Tier {
    /// For people.
    pub name: String,
    /// Destinations that new connections may go to. A file names at least one for a backup; a cluster may have none for
    /// a while.
    pub backends: Vec<Backend>,
    /// Destinations that get no new connections, and whose connections go on: pods that terminate, or are not ready. A
    /// destination that is in neither list any more is gone, and so are its flows: its address may be another's soon.
    pub draining: Vec<SocketAddr>,
    /// How its backends are checked; without, they count as Up.
    pub check: Option<Check>,
    /// How many backends must be Up for the tier to be Up.
    pub min_healthy: usize,
}

/// An active check, in the vocabulary of Kubernetes' probes.
#[derive(Clone, Debug, PartialEq, Eq, Hash, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct Check {
    /// What is done.
    pub action: CheckAction,
    /// From one probe to the next.
    pub period: Duration,
    /// From one probe to the next while the health is about to change, or not known yet.
    pub fast_period: Duration,
    /// How long one probe may take.
    pub timeout: Duration,
    /// Failures in a row that make Up Down.
    pub failure_threshold: u32,
    /// Passes in a row that make Down Up.
    pub success_threshold: u32,
    /// A period varies by up to this part of itself.
    pub jitter_percent: u8,
}

/// What a probe does.
#[derive(Clone, Debug, PartialEq, Eq, Hash, Serialize)]
#[serde(rename_all = "camelCase")]
pub enum CheckAction {
    /// A GET; passes by status and, if wanted, body.
    HttpGet {
        /// With a leading slash.
        path: String,
        /// Another port than the backend's.
        port: Option<u16>,
        /// Over TLS; the certificate is not verified, as kubelet does not.
        https: bool,
        /// Host header and SNI, if not the address.
        host: Option<String>,
        /// More headers.
        headers: Vec<(String, String)>,
        /// Statuses that pass.
        expected_statuses: Vec<RangeInclusive<u16>>,
        /// Text that the first 64 KiB of the body must contain.
        body_contains: Option<String>,
    },
    /// A connection.
    TcpSocket {
        /// Another port than the backend's.
        port: Option<u16>,
    },
    /// The gRPC health checking protocol v1.
    Grpc {
        /// Another port than the backend's.
        port: Option<u16>,
        /// Name of the service asked about; empty = the server as a whole.
        service: String,
    },
}

/// What happens to established flows on the side that a change of state turns away from.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
pub enum EstablishedPolicy {
    /// They go on until they end.
    Keep,
    /// They are reset at both ends, on their next packet. (Datagrams know no reset: their flows are decided anew.)
    Reset,
}

/// What new connections get when no backup can take them either.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
pub enum WhenAllUnhealthy {
    /// The primary, such as it is.
    PassThrough,
    /// A TCP reset, or an ICMP "port unreachable", at once.
    Reject,
}

/// What the programs do when the agent gives no sign of life.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
pub enum OnAgentLoss {
    /// New connections go to the primary.
    PassThrough,
    /// The last decision holds.
    Hold,
}

/// How the packets of a new flow to a backup pod of the client's own node go.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
pub enum FastPath {
    /// As all others: through the node's bridge, its routes and netfilter.
    Off,
    /// Past the stack (bpf_redirect_peer into the backup's veth, bpf_redirect_neigh out to a client outside), both ways:
    /// netfilter, and with it NetworkPolicy, does not see them.
    PeerRedirect,
}

/// Frontends whose clients outside the cluster keep their address (Kubernetes' `externalTrafficPolicy: Local`). Toward a
/// backend of another node they cannot: its replies would not come back by this node.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct KeepClient {
    /// Which of the service's frontends.
    pub frontends: BTreeSet<Frontend>,
    /// Backends that are known to be on this node, by the addresses that the tiers name them by: these are preferred.
    pub backends: BTreeSet<SocketAddr>,
}

/// Whether decisions are carried out.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
pub enum Mode {
    /// They are.
    Enforce,
    /// They are counted only.
    DryRun,
}

/// What an operator wants, apart from what is measured.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
pub enum Override {
    /// Go by what is measured.
    Auto,
    /// Open, whatever is measured.
    ForceOpen,
    /// Closed, whatever is measured.
    ForceClosed,
}

/// How the breaker decides.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct BreakerPolicy {
    /// How long the breaker stays open at least, after the first trip in a row.
    pub open: Duration,
    /// The longest that it grows to with more trips in a row.
    pub max_open: Duration,
    /// An open time varies by up to this part of itself.
    pub jitter_percent: u8,
    /// Trips in a row are forgotten one by one, each after this long without a new one.
    pub decay: Duration,
    /// Real connections that try the primary while half-open; 0 = from open straight to closed.
    pub half_open_connections: u32,
    /// How long half-open lasts at the most; it ends earlier after enough passes of the check.
    pub half_open_timeout: Duration,
    /// Passes of the primary's check that close a half-open breaker.
    pub half_open_passes: u32,
    /// How long the primary's share grows after closing; 0 = all at once.
    pub ramp: Duration,
    /// Where the ramp starts, permille.
    pub ramp_start: u16,
    /// Trips on the rate of failed observations too.
    pub window: Option<FailureWindow>,
}

/// A sliding window over the primary's observations.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct FailureWindow {
    /// How far it looks back.
    pub length: Duration,
    /// Observations that it must hold before it decides anything.
    pub minimum_volume: u32,
    /// Failures, in percent of the observations, that trip.
    pub failure_rate_percent: u8,
}

/// A protected service.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct Service {
    /// Its name.
    pub name: ServiceName,
    /// Where its clients connect to. They all have one state, and flip together.
    pub frontends: Vec<Frontend>,
    /// For frontends that lead to other addresses of the backends; one that is in none leads to those of its family that
    /// the tiers name.
    pub routes: Vec<Route>,
    /// What it runs on.
    pub primary: Tier,
    /// What takes over, in order of preference.
    pub backups: Vec<Tier>,
    /// How long whoever is in charge while it is closed needs to hear of a new backend of the primary: that long, its being Up
    /// does not close the breaker. kube-proxy learns of endpoints when we do, and writes its rules a little later.
    pub settle: Duration,
    /// How it is decided.
    pub breaker: BreakerPolicy,
    /// Whether it is carried out.
    pub mode: Mode,
    /// What the configuration wants, apart from what is measured.
    pub override_: Override,
    /// Established flows on the primary when it opens.
    pub on_open: EstablishedPolicy,
    /// Established flows on a backup when it closes.
    pub on_close: EstablishedPolicy,
    /// When no backup is usable.
    pub when_all_unhealthy: WhenAllUnhealthy,
    /// When the agent is gone.
    pub on_agent_loss: OnAgentLoss,
    /// Between pods of one node.
    pub fast_path: FastPath,
    /// For clients outside.
    pub keep_client: KeepClient,
    /// How much each tier takes; `None`: all of it.
    pub limits: Option<Limits>,
}

impl Service {
    /// A service that nothing is known of but its name: what is left when its configuration is gone.
    #[must_use]
    pub fn nothing(name: ServiceName) -> Self {
        let nobody = |name: &str| Tier {
            name: name.into(),
            backends: Vec::new(),
            draining: Vec::new(),
            check: None,
            min_healthy: 1,
        };
        Self {
            name,
            frontends: Vec::new(),
            routes: Vec::new(),
            primary: nobody("primary"),
            backups: vec![nobody("backup")],
            settle: Duration::ZERO,
            breaker: BreakerPolicy {
                open: Duration::ZERO,
                max_open: Duration::ZERO,
                jitter_percent: 0,
                decay: Duration::ZERO,
                half_open_connections: 0,
                half_open_timeout: Duration::ZERO,
                half_open_passes: 1,
                ramp: Duration::ZERO,
                ramp_start: 0,
                window: None,
            },
            mode: Mode::Enforce,
            override_: Override::Auto,
            on_open: EstablishedPolicy::Keep,
            on_close: EstablishedPolicy::Keep,
            when_all_unhealthy: WhenAllUnhealthy::PassThrough,
            on_agent_loss: OnAgentLoss::PassThrough,
            fast_path: FastPath::Off,
            keep_client: KeepClient::default(),
            limits: None,
        }
    }

    /// Whether it matters which backends are pods of this node.
    #[must_use]
    pub fn wants_near(&self) -> bool {
        self.fast_path != FastPath::Off || !self.keep_client.frontends.is_empty()
    }

    /// Where a backend is reached from a frontend, if it is.
    #[must_use]
    pub fn reach(&self, frontend: &Frontend, backend: SocketAddr) -> Option<SocketAddr> {
        let address = match self.routes.iter().find(|route| route.frontends.contains(frontend)) {
            Some(route) => *route.backends.get(&backend)?,
            None => backend,
        };
        (address.is_ipv4() == frontend.address.is_ipv4()).then_some(address)
    }

    /// All addresses of a backend: its own, and those that routes give it.
    pub fn addresses(&self, backend: SocketAddr) -> impl Iterator<Item = SocketAddr> + '_ {
        let others = self.routes.iter().filter_map(move |route| route.backends.get(&backend).copied());
        std::iter::once(backend).chain(others)
    }

    /// Every tier, the primary first.
    pub fn tiers(&self) -> impl Iterator<Item = &Tier> {
        std::iter::once(&self.primary).chain(&self.backups)
    }
}
