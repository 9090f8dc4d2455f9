//! The desired content of the maps for one service. Pure: it follows from the domain model and the breaker's
//! decision alone.

use std::{
    collections::BTreeSet,
    net::{IpAddr, SocketAddr},
};

use breaker_common::{BreakerState, StateReason, switch_flags};

use crate::{
    limits::Limits,
    maglev::{self, Candidate},
    model::{
        Backend, EstablishedPolicy, FastPath, Frontend, Mode, OnAgentLoss, Override, Protocol, Service, ServiceName,
        WhenAllUnhealthy,
    },
};

/// Content of one slot of a selection table.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Slot {
    /// Leave the connection to kube-proxy.
    PassThrough,
    /// Refuse the connection.
    Reject,
    /// Send the connection to this backend.
    Backend(SocketAddr),
}

/// A selection table. It is kept as the list of backends and expanded to slots only when it is written, because the list
/// is about 1 % of the table's size.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum SlotTable {
    /// All slots have the same content.
    All(Slot),
    /// Two or more backends, which get slots in proportion to their weights. The list is sorted by address.
    Balanced(Vec<Backend>),
}

impl SlotTable {
    /// Returns the content of the table's slots: as many as one of [`breaker_common::TABLE_SIZES`].
    #[must_use]
    pub fn slots(&self) -> Vec<Slot> {
        let backends = match self {
            Self::All(slot) => return vec![*slot; breaker_common::TABLE_SIZES[0] as usize],
            Self::Balanced(backends) => backends,
        };
        let candidate = |b: &Backend| Candidate { key: identity(b.address), weight: b.weight };
        let candidates: Vec<Candidate> = backends.iter().map(candidate).collect();
        let table = maglev::fill(&candidates, maglev::size_for(&candidates));
        table.into_iter().map(|i| Slot::Backend(backends[i].address)).collect()
    }

    /// Returns the backends in the table.
    fn backends(&self) -> Vec<SocketAddr> {
        match self {
            Self::All(Slot::Backend(address)) => vec![*address],
            Self::All(Slot::PassThrough | Slot::Reject) => Vec::new(),
            Self::Balanced(backends) => backends.iter().map(|b| b.address).collect(),
        }
    }
}

/// A group of frontends of one IP family and protocol that share their selection tables.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct RoutePlan {
    /// Frontends of the group.
    pub frontends: Vec<Frontend>,
    /// Protocol of all frontends of the group.
    pub protocol: Protocol,
    /// One table for each tier: primary, backup.
    pub slots: [SlotTable; 2],
    /// Whether external clients keep their source address toward backends on this node.
    pub keep_client: bool,
}

impl RoutePlan {
    /// Returns the backends in the tables.
    pub fn backends(&self) -> impl Iterator<Item = SocketAddr> + '_ {
        self.slots.iter().flat_map(SlotTable::backends)
    }
}

/// The current decision about a service, as the breaker and the operator made it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Decision {
    /// State of the breaker.
    pub state: BreakerState,
    /// Share of new flows that goes to the primary, in permille.
    pub share: u16,
    /// Counter of decisions; every change of state raises it.
    pub epoch: u32,
    /// Reason for the state.
    pub reason: StateReason,
    /// Time at which the service entered the state, in nanoseconds since 1970.
    pub since_unix_ns: u64,
    /// Number of trips in a row.
    pub trips: u32,
    /// Operator override, and the time at which it ends, in nanoseconds since 1970 (0 = never).
    pub override_: (Override, u64),
    /// Whether flows on a backup may still be alive.
    pub draining: bool,
    /// Whether the time is over that the policy `Drain` gives to established flows; `true` where no policy is `Drain`.
    pub drained: bool,
}

/// The desired content of the maps for one service. If two plans are equal, nothing needs to be written.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ServicePlan {
    /// Name of the service.
    pub name: ServiceName,
    /// Frontends, grouped by IP family, protocol, and the backend addresses that they lead to.
    pub routes: Vec<RoutePlan>,
    /// Decision that the programs act on.
    pub decision: Decision,
    /// Bits of [`switch_flags`], without `BUFFER`: the kernel datapath chooses the buffer itself.
    pub flags: u8,
    /// Number of connections that a half-open breaker admits to the primary.
    pub half_open_limit: u32,
    /// Limits of both tiers; `None` = no limits.
    pub limits: Option<Limits>,
    /// Whether the primary accepts connections, although it may fail its checks.
    pub primary_accepts: bool,
    /// Backends of the backups that are Down, and whose established flows are reset.
    pub down: BTreeSet<SocketAddr>,
}

impl ServicePlan {
    /// Plans a service. `backup` lists the backends of the backup tier that takes over; it is empty if no backup is
    /// usable.
    #[must_use]
    pub fn new(service: &Service, decision: Decision, backup: &[Backend]) -> Self {
        Self {
            name: service.name.clone(),
            routes: routes(service, backup),
            flags: flags(service, &decision, !backup.is_empty()),
            decision,
            half_open_limit: service.breaker.half_open_connections,
            limits: service.limits,
            primary_accepts: false,
            down: BTreeSet::new(),
        }
    }

    /// Has the programs reset the established flows to these backends of the backups, which are Down. The policy for
    /// closed breakers is another one, and a dry run resets nothing.
    pub fn reset_flows_to(&mut self, down: BTreeSet<SocketAddr>) {
        if self.may_reset_down_backups() && !down.is_empty() {
            self.flags |= switch_flags::RESET_BACKUP;
            self.down = down;
        }
    }

    /// Returns `true` if [`ServicePlan::reset_flows_to`] has an effect.
    #[must_use]
    pub fn may_reset_down_backups(&self) -> bool {
        self.decision.state != BreakerState::Closed && self.flags & switch_flags::DRY_RUN == 0
    }

    /// Returns the distinct backends in the tables.
    #[must_use]
    pub fn backends(&self) -> BTreeSet<(SocketAddr, Protocol)> {
        self.routes.iter().flat_map(|route| route.backends().map(|address| (address, route.protocol))).collect()
    }

    /// Returns all frontends, including those that [`ServicePlan::add_draining_frontends`] added.
    pub fn frontends(&self) -> impl Iterator<Item = &Frontend> {
        self.routes.iter().flat_map(|route| &route.frontends)
    }

    /// Adds frontends that the service no longer has. Their flows continue; their new connections are left to
    /// kube-proxy.
    pub fn add_draining_frontends(&mut self, frontends: &[Frontend]) {
        for frontend in frontends {
            let nothing = [SlotTable::All(Slot::PassThrough), SlotTable::All(Slot::PassThrough)];
            let same = |route: &&mut RoutePlan| {
                route.slots == nothing
                    && same_family_and_protocol(&route.frontends[0], frontend)
                    && !route.frontends.contains(frontend)
            };
            match self.routes.iter_mut().find(same) {
                Some(route) => route.frontends.push(*frontend),
                None => self.routes.push(RoutePlan {
                    frontends: vec![*frontend],
                    protocol: frontend.protocol,
                    slots: nothing,
                    keep_client: false,
                }),
            }
        }
    }
}

/// Whether two frontends have the same IP family and protocol.
fn same_family_and_protocol(a: &Frontend, b: &Frontend) -> bool {
    a.protocol == b.protocol && a.address.is_ipv4() == b.address.is_ipv4()
}

/// Groups a service's frontends into routes. Frontends that lead to the same addresses of the same backends share a
/// route.
fn routes(service: &Service, backup: &[Backend]) -> Vec<RoutePlan> {
    let keeps = |frontend: &Frontend| service.keep_client.frontends.contains(frontend);
    let group = |frontend: &Frontend| {
        (service.routes.iter().position(|route| route.frontends.contains(frontend)), keeps(frontend))
    };
    let mut routes: Vec<((Option<usize>, bool), RoutePlan)> = Vec::new();
    for frontend in &service.frontends {
        let group = group(frontend);
        let is_local = |b: &&Backend| service.keep_client.backends.contains(&b.address);
        // If client addresses are to be kept and a usable backend is on this node, only local backends are used.
        // Without a local backend, one on another node is better than none, although it sees a masqueraded address.
        let prefers_local = group.1 && backup.iter().any(|b| is_local(&b));
        match routes
            .iter_mut()
            .find(|(of, route)| *of == group && same_family_and_protocol(&route.frontends[0], frontend))
        {
            Some((_, route)) => route.frontends.push(*frontend),
            None => {
                let reachable: Vec<Backend> = backup
                    .iter()
                    .filter(|b| !prefers_local || is_local(b))
                    .filter_map(|b| Some(Backend { address: service.reach(frontend, b.address)?, ..*b }))
                    .collect();
                let slots = [SlotTable::All(Slot::PassThrough), backup_slots(service, &reachable)];
                let (frontends, protocol) = (vec![*frontend], frontend.protocol);
                routes.push((group, RoutePlan { frontends, protocol, slots, keep_client: group.1 }));
            }
        }
    }
    routes.into_iter().map(|(_, route)| route).collect()
}

fn backup_slots(service: &Service, backup: &[Backend]) -> SlotTable {
    match backup {
        [] => SlotTable::All(match service.when_all_unhealthy {
            WhenAllUnhealthy::PassThrough => Slot::PassThrough,
            WhenAllUnhealthy::Reject => Slot::Reject,
        }),
        [only] => SlotTable::All(Slot::Backend(only.address)),
        several => {
            let mut backends = several.to_vec();
            backends.sort_unstable();
            SlotTable::Balanced(backends)
        }
    }
}

/// Identity of a backend in the selection. It depends on address and port only, so that it never changes and is the
/// same on every node.
fn identity(address: SocketAddr) -> u64 {
    let ip = match address.ip() {
        IpAddr::V4(ip) => u64::from(u32::from(ip)),
        #[expect(clippy::cast_possible_truncation, reason = "the lower half of an IPv6 address identifies the host")]
        IpAddr::V6(ip) => u128::from(ip) as u64,
    };
    (ip << 16) | u64::from(address.port())
}

fn flags(service: &Service, decision: &Decision, backup_usable: bool) -> u8 {
    let mut flags = 0;
    let settled = decision.state == BreakerState::Closed && decision.share >= breaker_common::SHARE_ALL;
    if service.on_agent_loss == OnAgentLoss::Hold {
        flags |= switch_flags::HOLD;
    }
    if service.fast_path == FastPath::PeerRedirect {
        flags |= switch_flags::FAST;
    }
    if service.limits.is_some() {
        flags |= switch_flags::LIMITED;
    }
    if service.mode == Mode::DryRun {
        // A dry run decides and counts new connections. It does not process packets of established flows, and
        // resets nothing. TRACK stays set while flows that were redirected before the dry run are alive, so that
        // they can end normally.
        let tracked = if decision.draining { switch_flags::TRACK } else { 0 };
        return flags | switch_flags::DRY_RUN | tracked;
    }
    if !settled || decision.draining {
        flags |= switch_flags::TRACK;
    }
    let resets = |policy: EstablishedPolicy| match policy {
        EstablishedPolicy::Keep => false,
        EstablishedPolicy::Reset => true,
        EstablishedPolicy::Drain => decision.drained,
    };
    // Without a usable backup, a reset would break connections that have nowhere else to go.
    if decision.state == BreakerState::Open && resets(service.on_open) && backup_usable {
        flags |= switch_flags::RESET_PRIMARY;
    }
    if decision.state == BreakerState::Closed && resets(service.on_close) {
        flags |= switch_flags::RESET_BACKUP;
    }
    flags
}
