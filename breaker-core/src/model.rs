//! The domain types: which services are protected, by which backends, and under which rules. They are plain data.
//! Every source (a file, Kubernetes) converts its configuration to these types, and the code that uses them does
//! not know the source.

use std::{
    collections::{BTreeMap, BTreeSet},
    fmt,
    net::{IpAddr, SocketAddr},
    ops::RangeInclusive,
    sync::Arc,
    time::Duration,
};

use crate::limits::Limits;

/// The name of a service, unique on a node.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct ServiceName(Arc<str>);

impl ServiceName {
    /// Takes the name as it is. The sources check its form.
    #[must_use]
    pub fn new(name: &str) -> Self {
        Self(name.into())
    }

    /// The name as text.
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

/// The transport protocols that can be protected.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Protocol {
    /// TCP (RFC 9293).
    Tcp,
    /// UDP (RFC 768).
    Udp,
}

impl Protocol {
    /// The protocol's name in configuration and output.
    #[must_use]
    pub const fn name(self) -> &'static str {
        match self {
            Self::Tcp => "TCP",
            Self::Udp => "UDP",
        }
    }
}

/// An address, port and protocol that clients connect to: the VIP of a Service.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Frontend {
    /// Address and port.
    pub address: SocketAddr,
    /// The protocol.
    pub protocol: Protocol,
}

impl fmt::Display for Frontend {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}/{}", self.address, self.protocol.name())
    }
}

/// Frontends from which the backends are reached at other addresses than those in the tiers: at another port, or in
/// the other IP family.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Route {
    /// The frontends of the service that this route is for.
    pub frontends: Vec<Frontend>,
    /// The address of each backend on this route, by its address in the tier. A backend that is missing here cannot
    /// be reached from these frontends.
    pub backends: BTreeMap<SocketAddr, SocketAddr>,
}

/// One destination of a tier. Its address is also its identity, and the destination of its probes unless the check
/// names another port.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Backend {
    /// Address and port.
    pub address: SocketAddr,
    /// Share of the tier's new connections, relative to the other weights; at least 1.
    pub weight: u16,
}

/// A priority group: the primary, or one of the backups.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Tier {
    /// The tier's name, for people.
    pub name: String,
    /// Destinations that may get new connections. In a file, a backup has at least one; in a cluster, a tier may
    /// have none for a while.
    pub backends: Vec<Backend>,
    /// Destinations that get no new connections, but keep the connections they have: pods that terminate or are not
    /// ready. When a destination is in neither list any more, its flows are removed, because another pod may soon
    /// get its address.
    pub draining: Vec<SocketAddr>,
    /// How the backends are checked; without a check they count as Up.
    pub check: Option<Check>,
    /// Where the check's port is not the same at every backend: the port, by the backend's address.
    pub check_ports: BTreeMap<SocketAddr, u16>,
    /// How many backends must be Up for the tier to be Up.
    pub min_healthy: usize,
}

/// What a tier is for.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum TierRole {
    /// The service's own backends.
    Primary,
    /// Backends that take over.
    Backup,
}

impl TierRole {
    /// The role of a tier by its position: the primary comes first, then the backups.
    #[must_use]
    pub const fn of(index: usize) -> Self {
        if index == 0 { Self::Primary } else { Self::Backup }
    }

    /// The name of the role in configuration and output.
    #[must_use]
    pub const fn label(self) -> &'static str {
        match self {
            Self::Primary => "primary",
            Self::Backup => "backup",
        }
    }
}

/// A health check. The fields are named after those of Kubernetes probes.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct Check {
    /// What a probe does.
    pub action: CheckAction,
    /// Interval between the starts of two probes.
    pub period: Duration,
    /// The interval while the health is unknown or about to change.
    pub fast_period: Duration,
    /// Time limit of one probe.
    pub timeout: Duration,
    /// Number of failures in a row that change Up to Down.
    pub failure_threshold: u32,
    /// Number of passes in a row that change Down to Up.
    pub success_threshold: u32,
    /// Jitter: each interval is shorter or longer by up to this percentage.
    pub jitter_percent: u8,
}

/// What a probe does.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub enum CheckAction {
    /// An HTTP GET request. It passes if the status is expected and the body contains the given text, if any.
    HttpGet {
        /// The port, if it differs from the backend's.
        port: Option<u16>,
        /// The request.
        get: HttpGet,
    },
    /// A TCP connection. It passes if it is established.
    TcpSocket {
        /// The port, if it differs from the backend's.
        port: Option<u16>,
        /// Whether the connection is completed, so that the server's process accepts it. Otherwise the agent resets it
        /// before it is complete, and the process never sees it.
        accept: bool,
    },
    /// A request and an answer in a protocol of the user's choice.
    Exchange {
        /// The port, if it differs from the backend's.
        port: Option<u16>,
        /// The request.
        exchange: Exchange,
    },
    /// A DNS question over UDP.
    Dns {
        /// The port, if it differs from the backend's.
        port: Option<u16>,
        /// The question.
        question: DnsQuestion,
    },
    /// The gRPC health checking protocol v1.
    Grpc {
        /// The port, if it differs from the backend's.
        port: Option<u16>,
        /// Name of the gRPC service that is asked about; empty for the server as a whole.
        service: String,
    },
}

impl CheckAction {
    /// Sets the port of the check.
    pub const fn set_port(&mut self, number: u16) {
        match self {
            Self::HttpGet { port, .. }
            | Self::TcpSocket { port, .. }
            | Self::Exchange { port, .. }
            | Self::Dns { port, .. }
            | Self::Grpc { port, .. } => *port = Some(number),
        }
    }
}

impl Tier {
    /// The check of one of the tier's backends.
    pub fn check_of(&self, backend: SocketAddr) -> Option<Check> {
        let mut check = self.check.clone()?;
        if let Some(port) = self.check_ports.get(&backend) {
            check.action.set_port(*port);
        }
        Some(check)
    }
}

/// An HTTP GET request, and what is expected of the answer.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct HttpGet {
    /// The path, with a leading slash.
    pub path: String,
    /// Whether to use TLS. The certificate is not verified, as in kubelet's probes.
    pub https: bool,
    /// Host header and SNI; the backend's address if not set.
    pub host: Option<String>,
    /// Additional headers: name and value.
    pub headers: Vec<(String, String)>,
    /// Status codes that pass.
    pub expected_statuses: Vec<RangeInclusive<u16>>,
    /// Text that the first 64 KiB of the body must contain.
    pub body_contains: Option<String>,
}

/// A request and an answer. It passes if the answer contains the expected bytes.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct Exchange {
    /// What carries the bytes.
    pub transport: Transport,
    /// What the probe sends first. If it is empty, the server speaks first.
    pub send: Vec<u8>,
    /// What the answer must contain. If it is empty, any answer passes.
    pub expect: Vec<u8>,
    /// What the probe sends after the answer, before it closes the connection.
    pub quit: Vec<u8>,
}

/// What carries the bytes of an exchange.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub enum Transport {
    /// A TCP connection.
    Tcp,
    /// TLS on a TCP connection, with the server name that is sent (SNI), if any. The certificate is not verified.
    Tls {
        /// The server name.
        host: Option<String>,
    },
    /// Datagrams.
    Udp,
}

/// A DNS question. It passes if the response code and the addresses match.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct DnsQuestion {
    /// The name to ask for, absolute.
    pub name: String,
    /// The type of record to ask for.
    pub record: DnsRecord,
    /// The response code that passes; `None`: any.
    pub rcode: Option<DnsRcode>,
    /// Addresses that must all be in the answer.
    pub expected_addresses: Vec<IpAddr>,
}

/// A type of DNS record (RFC 1035, section 3.2.2; RFC 3596 for AAAA; RFC 2782 for SRV).
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[allow(missing_docs, reason = "the names are the RFCs'")]
pub enum DnsRecord {
    A,
    Aaaa,
    Cname,
    Mx,
    Ns,
    Ptr,
    Soa,
    Srv,
    Txt,
}

/// A response code of DNS (RFC 1035, section 4.1.1).
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum DnsRcode {
    /// The name exists.
    NoError,
    /// The server cannot find out.
    ServFail,
    /// The name does not exist.
    NxDomain,
    /// The server does not answer this client.
    Refused,
}

/// What happens to a tier's established flows when a change of state sends new connections to another tier.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum EstablishedPolicy {
    /// They continue until they end.
    Keep,
    /// They are reset at both ends. UDP has no reset: UDP flows are decided anew.
    Reset,
    /// They continue for [`Service::drain`]; those that have not ended by then are reset.
    Drain,
}

/// What a new connection gets while the breaker is open and no backup is usable.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum WhenAllUnhealthy {
    /// It goes to the primary, although the primary has failed.
    PassThrough,
    /// It is refused at once: TCP reset, or ICMP "port unreachable" for UDP.
    Reject,
}

/// What the programs do when the agent's lease has expired.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum OnAgentLoss {
    /// They leave new connections to the primary.
    PassThrough,
    /// They continue to apply the last decision.
    Hold,
}

/// The path that packets of a new flow take if the backup pod is on the node where they enter, from a pod or by an
/// uplink.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum FastPath {
    /// The path of all other packets: through the node's bridge, routes and netfilter.
    Off,
    /// The fast path, which bypasses the host network stack in both directions: bpf_redirect_peer into the backup's
    /// veth, and bpf_redirect_neigh out to a client outside the cluster. Netfilter does not see these packets, so
    /// NetworkPolicies that it enforces do not apply.
    PeerRedirect,
}

/// Frontends for which clients outside the cluster keep their address (Kubernetes' `externalTrafficPolicy: Local`).
/// This is not possible toward a backend on another node: its replies would not return through this node.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct KeepClient {
    /// The frontends of the service that this is for.
    pub frontends: BTreeSet<Frontend>,
    /// Backends that are known to be on this node, by their addresses in the tiers. These frontends prefer them.
    pub backends: BTreeSet<SocketAddr>,
}

/// Whether decisions are carried out.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Mode {
    /// Decisions are carried out.
    Enforce,
    /// Decisions are only counted; new connections are not changed.
    DryRun,
}

/// Operator intent, kept apart from measured health.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Override {
    /// The measurements decide.
    Auto,
    /// The breaker is open, whatever the measurements say.
    ForceOpen,
    /// The breaker is closed, whatever the measurements say.
    ForceClosed,
}

impl Override {
    /// The name of the override in configuration and output.
    #[must_use]
    pub const fn label(self) -> &'static str {
        match self {
            Self::Auto => "Auto",
            Self::ForceOpen => "ForceOpen",
            Self::ForceClosed => "ForceClosed",
        }
    }
}

/// The rules by which the breaker decides.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct BreakerPolicy {
    /// Least open time after the first trip. It is multiplied by the number of trips in a row.
    pub open: Duration,
    /// The cap of the open time.
    pub max_open: Duration,
    /// Jitter: an open time is shorter or longer by up to this percentage, but never longer than the cap.
    pub jitter_percent: u8,
    /// The number of trips in a row decreases by one for each period of this length that the breaker is closed. 0:
    /// it is forgotten at once.
    pub decay: Duration,
    /// Number of real connections that may reach the primary while half-open. 0: the breaker goes from open
    /// straight to closed.
    pub half_open_connections: u32,
    /// Longest time in half-open. Enough passed probes end it earlier.
    pub half_open_timeout: Duration,
    /// Number of passed probes of the primary that close a half-open breaker.
    pub half_open_passes: u32,
    /// How long the primary's share grows after closing. 0: the primary gets all new connections at once.
    pub ramp: Duration,
    /// The primary's share at the start of the ramp, permille.
    pub ramp_start: u16,
    /// If set, the breaker also trips at a rate of failed probes.
    pub window: Option<FailureWindow>,
}

/// A sliding window over the probes of the primary's backends.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct FailureWindow {
    /// Length of the window.
    pub length: Duration,
    /// Number of probes that the window must hold before the rate counts.
    pub minimum_volume: u32,
    /// The percentage of failed probes, at least 1, at which the breaker trips.
    pub failure_rate_percent: u8,
}

impl FailureWindow {
    /// For a window that can never trip: the number of observations that it holds at most, if each of `backends` is
    /// probed once per `period`. `None` if that is enough, or if there are no backends.
    pub fn too_few_observations(&self, period: Duration, backends: usize) -> Option<u128> {
        let period = period.as_nanos().max(1);
        // A probe at the begin and one at the end of the window count both.
        let most = (self.length.as_nanos() / period + 1).saturating_mul(backends as u128);
        (backends > 0 && u128::from(self.minimum_volume) > most).then_some(most)
    }
}

/// A protected service.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Service {
    /// The service's name.
    pub name: ServiceName,
    /// The frontends. They share one breaker, so they change state together.
    pub frontends: Vec<Frontend>,
    /// Routes for frontends from which the backends are reached at other addresses. A frontend without a route
    /// reaches the backends at their addresses in the tiers, if they are of its IP family.
    pub routes: Vec<Route>,
    /// The tier that serves the traffic while the breaker is closed.
    pub primary: Tier,
    /// The tiers that take over, in order of preference.
    pub backups: Vec<Tier>,
    /// Grace period for a new primary backend. Within it, an Up result does not close the breaker, because
    /// kube-proxy may not have programmed the endpoint yet: it learns of endpoints when the agent does, and writes
    /// its rules a little later.
    pub grace_period: Duration,
    /// The rules by which the breaker decides.
    pub breaker: BreakerPolicy,
    /// Whether the service is so young that its primary may never have been ready. Until it has had backends, and for ten
    /// seconds after that, it is starting and has not failed.
    pub starting: bool,
    /// Whether decisions are carried out.
    pub mode: Mode,
    /// The override that the configuration sets.
    pub override_: Override,
    /// Why the configuration forces the breaker, in the operator's words; may be empty.
    pub override_reason: String,
    /// What happens to established flows to the primary when the breaker opens.
    pub on_open: EstablishedPolicy,
    /// How long established flows may go on under the policy `Drain`.
    pub drain: Duration,
    /// How many clients that send nothing are reached in a second, after the first 200, when the breaker opens.
    pub resets_per_second: u32,
    /// What happens to established flows to a backup when the breaker closes.
    pub on_close: EstablishedPolicy,
    /// What happens to established flows to a backend of a backup that is Down, while the breaker is not closed and another
    /// backend of a backup is usable.
    pub on_backup_down: EstablishedPolicy,
    /// What a new connection gets while the breaker is open and no backup is usable.
    pub when_all_unhealthy: WhenAllUnhealthy,
    /// What the programs do when the agent's lease has expired.
    pub on_agent_loss: OnAgentLoss,
    /// The path of packets to a backup pod on the same node.
    pub fast_path: FastPath,
    /// Frontends for which clients outside the cluster keep their address.
    pub keep_client: KeepClient,
    /// Limits for new and concurrent connections; `None` for no limits.
    pub limits: Option<Limits>,
}

impl Service {
    /// A service of which only the name is known, without frontends and backends. It stands for a service that an
    /// earlier agent left and that is no longer configured.
    #[must_use]
    pub fn empty(name: ServiceName) -> Self {
        let empty_tier = |name: &str| Tier {
            name: name.into(),
            backends: Vec::new(),
            draining: Vec::new(),
            check: None,
            check_ports: BTreeMap::new(),
            min_healthy: 1,
        };
        Self {
            name,
            frontends: Vec::new(),
            routes: Vec::new(),
            primary: empty_tier("primary"),
            backups: vec![empty_tier("backup")],
            grace_period: Duration::ZERO,
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
            starting: false,
            mode: Mode::Enforce,
            override_: Override::Auto,
            override_reason: String::new(),
            on_open: EstablishedPolicy::Keep,
            drain: Duration::ZERO,
            resets_per_second: 0,
            on_close: EstablishedPolicy::Keep,
            on_backup_down: EstablishedPolicy::Keep,
            when_all_unhealthy: WhenAllUnhealthy::PassThrough,
            on_agent_loss: OnAgentLoss::PassThrough,
            fast_path: FastPath::Off,
            keep_client: KeepClient::default(),
            limits: None,
        }
    }

    /// Whether the datapath must know which backends are pods on this node.
    #[must_use]
    pub fn needs_local_backends(&self) -> bool {
        self.fast_path != FastPath::Off || !self.keep_client.frontends.is_empty()
    }

    /// The address of a backend as seen from a frontend. `None` if the backend has no address on the frontend's
    /// route, or one of the other IP family.
    #[must_use]
    pub fn reach(&self, frontend: &Frontend, backend: SocketAddr) -> Option<SocketAddr> {
        let address = match self.routes.iter().find(|route| route.frontends.contains(frontend)) {
            Some(route) => *route.backends.get(&backend)?,
            None => backend,
        };
        (address.is_ipv4() == frontend.address.is_ipv4()).then_some(address)
    }

    /// All addresses of a backend: the one in its tier, and those on the routes. May contain duplicates.
    pub fn addresses(&self, backend: SocketAddr) -> impl Iterator<Item = SocketAddr> + '_ {
        let others = self.routes.iter().filter_map(move |route| route.backends.get(&backend).copied());
        std::iter::once(backend).chain(others)
    }

    /// All tiers, the primary first.
    pub fn tiers(&self) -> impl Iterator<Item = &Tier> {
        std::iter::once(&self.primary).chain(&self.backups)
    }
}
