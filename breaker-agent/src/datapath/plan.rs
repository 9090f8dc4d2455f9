//! What the datapath should be for one service: pure, from the domain and the breaker's decision.

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

/// What one slot of a selection table holds.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Slot {
    /// Leave it to kube-proxy.
    PassThrough,
    /// Refuse.
    Reject,
    /// Send it there.
    Backend(SocketAddr),
}

/// A selection table. It is filled when it is written: what it is filled from is a hundredth of it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum SlotTable {
    /// The same in every place.
    All(Slot),
    /// Two backends or more, by their weights; in the order of their addresses.
    Balanced(Vec<Backend>),
}

impl SlotTable {
    /// What is in its [`breaker_common::SLOTS`] places.
    #[must_use]
    pub fn places(&self) -> Vec<Slot> {
        let backends = match self {
            Self::All(slot) => return vec![*slot; breaker_common::SLOTS as usize],
            Self::Balanced(backends) => backends,
        };
        let candidate = |b: &Backend| Candidate { key: identity(b.address), weight: b.weight };
        let table = maglev::fill(&backends.iter().map(candidate).collect::<Vec<_>>());
        table.into_iter().flatten().map(|i| Slot::Backend(backends[i].address)).collect()
    }

    /// The backends that it names.
    fn backends(&self) -> Vec<SocketAddr> {
        match self {
            Self::All(Slot::Backend(address)) => vec![*address],
            Self::All(Slot::PassThrough | Slot::Reject) => Vec::new(),
            Self::Balanced(backends) => backends.iter().map(|b| b.address).collect(),
        }
    }
}

/// Where connections to some frontends of one family and protocol may go.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct RoutePlan {
    /// Where clients connect to.
    pub frontends: Vec<Frontend>,
    /// Of all of them.
    pub protocol: Protocol,
    /// Tables for the two tiers: primary, backup.
    pub slots: [SlotTable; 2],
    /// Whether clients outside keep their address toward backends of this node.
    pub keep_client: bool,
}

impl RoutePlan {
    /// The distinct backends that the tables name.
    pub fn backends(&self) -> impl Iterator<Item = SocketAddr> + '_ {
        self.slots.iter().flat_map(SlotTable::backends)
    }
}

/// The decision of a moment, as the breaker and the operator made it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Decision {
    /// The breaker's state.
    pub state: BreakerState,
    /// The primary's share, permille.
    pub share: u16,
    /// Counts the changes of state.
    pub epoch: u32,
    /// Why.
    pub reason: StateReason,
    /// Since when, nanoseconds since 1970.
    pub since_unix_ns: u64,
    /// Trips in a row.
    pub trips: u32,
    /// The operator's word and its end (nanoseconds since 1970, 0 = never).
    pub override_: (Override, u64),
    /// Whether flows on backups may be alive.
    pub draining: bool,
}

/// What the datapath should be for one service. Two equal plans need no write.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ServicePlan {
    /// The service.
    pub name: ServiceName,
    /// By family, protocol and what the frontends lead to.
    pub routes: Vec<RoutePlan>,
    /// The decision.
    pub decision: Decision,
    /// Bits of [`switch_flags`], but for the buffer, which is the kernel's own affair.
    pub flags: u8,
    /// Connections that a half-open breaker lets through.
    pub half_open_limit: u32,
    /// How much each tier takes.
    pub limits: Option<Limits>,
}

impl ServicePlan {
    /// Plans a service. `backup` are the backends of the tier that would take over, none if nothing is usable.
    #[must_use]
    pub fn new(service: &Service, decision: Decision, backup: &[Backend]) -> Self {
        Self {
            name: service.name.clone(),
            routes: routes(service, backup),
            flags: flags(service, &decision, !backup.is_empty()),
            decision,
            half_open_limit: service.breaker.half_open_connections,
            limits: service.limits,
        }
    }

    /// The distinct backends that the tables name.
    #[must_use]
    pub fn backends(&self) -> BTreeSet<(SocketAddr, Protocol)> {
        self.routes.iter().flat_map(|route| route.backends().map(|address| (address, route.protocol))).collect()
    }

    /// Every frontend.
    pub fn frontends(&self) -> impl Iterator<Item = &Frontend> {
        self.routes.iter().flat_map(|route| &route.frontends)
    }

    /// Adds frontends whose flows go on, and whose new connections are left to kube-proxy.
    pub fn linger(&mut self, frontends: &[Frontend]) {
        for frontend in frontends {
            let nothing = [SlotTable::All(Slot::PassThrough), SlotTable::All(Slot::PassThrough)];
            let same = |route: &&mut RoutePlan| {
                route.slots == nothing && is_kin(&route.frontends[0], frontend) && !route.frontends.contains(frontend)
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

/// Whether two frontends are of one family and protocol.
fn is_kin(a: &Frontend, b: &Frontend) -> bool {
    a.protocol == b.protocol && a.address.is_ipv4() == b.address.is_ipv4()
}

/// Frontends that lead to the same addresses of the same backends share a route.
fn routes(service: &Service, backup: &[Backend]) -> Vec<RoutePlan> {
    let keeps = |frontend: &Frontend| service.keep_client.frontends.contains(frontend);
    let group = |frontend: &Frontend| {
        (service.routes.iter().position(|route| route.frontends.contains(frontend)), keeps(frontend))
    };
    let mut routes: Vec<((Option<usize>, bool), RoutePlan)> = Vec::new();
    for frontend in &service.frontends {
        let group = group(frontend);
        let near = |b: &&Backend| service.keep_client.backends.contains(&b.address);
        // Whoever asks for clients' addresses gets them where it can be done: a backend of another node is better than none.
        let prefers_near = group.1 && backup.iter().any(|b| near(&b));
        match routes.iter_mut().find(|(of, route)| *of == group && is_kin(&route.frontends[0], frontend)) {
            Some((_, route)) => route.frontends.push(*frontend),
            None => {
                let reachable: Vec<Backend> = backup
                    .iter()
                    .filter(|b| !prefers_near || near(b))
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

/// A backend's identity in the selection, the same for ever and on every node.
fn identity(address: SocketAddr) -> u64 {
    let ip = match address.ip() {
        IpAddr::V4(ip) => u64::from(u32::from(ip)),
        #[expect(clippy::cast_possible_truncation, reason = "the lower half tells hosts apart")]
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
        // Decided and counted, but no packet of an established flow is looked at, let alone reset; flows that were
        // moved before still end in peace.
        let tracked = if decision.draining { switch_flags::TRACK } else { 0 };
        return flags | switch_flags::DRY_RUN | tracked;
    }
    if !settled || decision.draining {
        flags |= switch_flags::TRACK;
    }
    // With nowhere to go a reset would only make a bad day worse.
    if decision.state == BreakerState::Open && service.on_open == EstablishedPolicy::Reset && backup_usable {
        flags |= switch_flags::RESET_PRIMARY;
    }
    if decision.state == BreakerState::Closed && service.on_close == EstablishedPolicy::Reset {
        flags |= switch_flags::RESET_BACKUP;
    }
    flags
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config;
    use breaker_common::SLOTS;
    use std::path::Path;

    fn service(extra: &str) -> Service {
        let text = format!(
            "services: [{{name: s, frontends: [{{address: 10.43.0.1, port: 80}}], {extra} \
             primary: {{backends: [{{address: 10.42.0.2, port: 80}}]}}, backups: [{{backends: [{{address: 10.42.0.3, port: 80}}]}}]}}]"
        );
        config::parse(Path::new("t"), &text).unwrap().services.remove(0)
    }

    fn decision(state: BreakerState, share: u16, draining: bool) -> Decision {
        Decision {
            state,
            share,
            epoch: 1,
            reason: StateReason::Initial,
            since_unix_ns: 0,
            trips: 0,
            override_: (Override::Auto, 0),
            draining,
        }
    }

    use switch_flags::{DRY_RUN, FAST, HOLD, LIMITED, RESET_BACKUP, RESET_PRIMARY, TRACK};

    #[test]
    fn flags_follow_from_state_and_policy() {
        let rows: &[(&str, BreakerState, u16, bool, bool, u8)] = &[
            ("", BreakerState::Closed, 1000, false, true, 0),
            ("", BreakerState::Closed, 1000, true, true, TRACK),
            ("", BreakerState::Closed, 500, false, true, TRACK),
            ("", BreakerState::Open, 0, false, true, TRACK | RESET_PRIMARY),
            ("", BreakerState::Open, 0, false, false, TRACK),
            ("", BreakerState::HalfOpen, 0, false, true, TRACK),
            ("onOpen: Keep,", BreakerState::Open, 0, false, true, TRACK),
            ("onClose: Reset,", BreakerState::Closed, 1000, true, true, TRACK | RESET_BACKUP),
            ("onAgentLoss: Hold,", BreakerState::Closed, 1000, false, true, HOLD),
            ("fastPath: PeerRedirect,", BreakerState::Closed, 1000, false, true, FAST),
            ("limits: {concurrentConnections: 1},", BreakerState::Closed, 1000, false, true, LIMITED),
            ("mode: DryRun,", BreakerState::Open, 0, false, true, DRY_RUN),
            ("mode: DryRun,", BreakerState::Open, 0, true, true, DRY_RUN | TRACK),
        ];
        for (extra, state, share, draining, usable, expected) in rows {
            let service = service(extra);
            let backup = if *usable { service.backups[0].backends.clone() } else { vec![] };
            let plan = ServicePlan::new(&service, decision(*state, *share, *draining), &backup);
            assert_eq!(plan.flags, *expected, "{extra} {state:?} {share} {draining} {usable}");
        }
    }

    #[test]
    fn an_unusable_backup_is_never_redirected_to() {
        let pass = ServicePlan::new(&service(""), decision(BreakerState::Open, 0, false), &[]);
        assert_eq!(pass.routes[0].slots[1], SlotTable::All(Slot::PassThrough));
        let reject = service("whenAllUnhealthy: Reject,");
        let reject = ServicePlan::new(&reject, decision(BreakerState::Open, 0, false), &[]);
        assert_eq!(reject.routes[0].slots[1], SlotTable::All(Slot::Reject));
        assert!(reject.backends().is_empty());
    }

    fn address(text: &str) -> SocketAddr {
        text.parse().unwrap()
    }

    #[test]
    fn slots_name_known_backends_only() {
        let service = service("");
        let backend = service.backups[0].backends[0];
        let two = [backend, Backend { address: address("10.42.0.4:80"), ..backend }];
        let plan = ServicePlan::new(&service, decision(BreakerState::Open, 0, false), &two);
        let expected = [address("10.42.0.3:80"), address("10.42.0.4:80")].map(|a| (a, Protocol::Tcp));
        assert_eq!(plan.backends(), expected.into());
        assert_eq!(plan.routes[0].slots[1].places().len(), SLOTS as usize);
    }

    #[test]
    fn every_frontend_leads_to_the_backends_of_its_family_and_port() {
        let mut service = service("");
        let frontend = |text: &str, protocol| Frontend { address: address(text), protocol };
        let second = frontend("10.43.0.1:443", Protocol::Tcp);
        let other_family = frontend("[fd43::1]:80", Protocol::Tcp);
        let datagrams = frontend("10.43.0.1:53", Protocol::Udp);
        service.frontends.extend([second, other_family, datagrams, frontend("10.43.0.9:80", Protocol::Tcp)]);
        let own = address("10.42.0.3:80");
        let route = |frontend, to: &str| crate::model::Route {
            frontends: vec![frontend],
            backends: [(own, address(to))].into(),
        };
        service.routes = vec![route(second, "10.42.0.3:8443"), route(other_family, "[fd42::3]:80")];
        let backup = service.backups[0].backends.clone();
        let plan = ServicePlan::new(&service, decision(BreakerState::Open, 0, false), &backup);
        let shown: Vec<_> = plan.routes.iter().map(|r| (r.frontends.len(), r.protocol, r.slots[1].clone())).collect();
        let to = |text: &str| SlotTable::All(Slot::Backend(address(text)));
        assert_eq!(
            shown,
            [
                (2, Protocol::Tcp, to("10.42.0.3:80")),
                (1, Protocol::Tcp, to("10.42.0.3:8443")),
                (1, Protocol::Tcp, to("[fd42::3]:80")),
                (1, Protocol::Udp, to("10.42.0.3:80")),
            ]
        );
        // A backend that has no address there is not reached.
        service.routes[1].backends.clear();
        let plan = ServicePlan::new(&service, decision(BreakerState::Open, 0, false), &backup);
        assert_eq!(plan.routes[2].slots[1], SlotTable::All(Slot::PassThrough));
    }

    #[test]
    fn frontends_that_keep_clients_prefer_backends_of_this_node() {
        let mut service = service("");
        let outside = Frontend { address: address("172.31.0.11:30080"), protocol: Protocol::Tcp };
        service.frontends.push(outside);
        service.keep_client.frontends.insert(outside);
        let backend = service.backups[0].backends[0];
        let far = Backend { address: address("10.42.9.4:80"), ..backend };
        let to = |addresses: &[SocketAddr]| match addresses {
            [one] => SlotTable::All(Slot::Backend(*one)),
            _ => SlotTable::Balanced(vec![backend, far]),
        };
        // Where it is known which are here, and one is; where it is not, all of them.
        for (here, expected) in
            [(vec![backend.address], vec![backend.address]), (vec![], vec![backend.address, far.address])]
        {
            service.keep_client.backends = here.into_iter().collect();
            let plan = ServicePlan::new(&service, decision(BreakerState::Open, 0, false), &[backend, far]);
            let shown: Vec<_> = plan.routes.iter().map(|r| (r.keep_client, r.slots[1].clone())).collect();
            assert_eq!(shown, [(false, to(&[backend.address, far.address])), (true, to(&expected))]);
        }
        service.keep_client.backends.insert(backend.address);
        let plan = ServicePlan::new(&service, decision(BreakerState::Open, 0, false), &[far]);
        assert_eq!(plan.routes[1].slots[1], to(&[far.address]), "one of another node is better than none");
    }

    #[test]
    fn what_lingers_is_left_to_kube_proxy() {
        let service = service("");
        let mut plan = ServicePlan::new(&service, decision(BreakerState::Open, 0, false), &service.backups[0].backends);
        let old = ["10.43.0.7:80", "10.43.0.8:80", "[fd43::7]:80"]
            .map(|text| Frontend { address: address(text), protocol: Protocol::Tcp });
        plan.linger(&old);
        assert_eq!(plan.routes.iter().map(|r| r.frontends.len()).collect::<Vec<_>>(), [1, 2, 1]);
        assert_eq!(plan.routes[1].slots[1], SlotTable::All(Slot::PassThrough));
        assert_eq!(plan.frontends().count(), 4);
    }
}
