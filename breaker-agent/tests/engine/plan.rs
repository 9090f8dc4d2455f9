//! Plans: what the maps should have, from the configuration and the breaker's decision.

use std::{collections::BTreeSet, net::SocketAddr, path::Path};

use breaker_agent::config;
use breaker_common::{BreakerState, StateReason, TABLE_SIZES, switch_flags};
use breaker_core::{
    model::{Backend, Frontend, Override, Protocol, Route, Service},
    plan::{Decision, ServicePlan, Slot, SlotTable},
};

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
        drained: true,
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

/// TRIALS E3: flows to backends that are Down are reset while the breaker is not closed, and not by a dry run.
#[test]
fn flows_to_backends_that_are_down_are_reset_unless_closed_or_dry() {
    let down: BTreeSet<SocketAddr> = ["10.42.0.9:80".parse().unwrap()].into();
    for (extra, state, resets) in [
        ("", BreakerState::Open, true),
        ("", BreakerState::HalfOpen, true),
        ("", BreakerState::Closed, false),
        ("mode: DryRun,", BreakerState::Open, false),
    ] {
        let service = service(extra);
        let mut plan = ServicePlan::new(&service, decision(state, 0, false), &service.backups[0].backends);
        plan.reset_flows_to(down.clone());
        assert_eq!((plan.flags & RESET_BACKUP != 0, !plan.down.is_empty()), (resets, resets), "{extra} {state:?}");
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
    assert_eq!(plan.routes[0].slots[1].slots().len(), TABLE_SIZES[0] as usize);
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
    let route = |frontend, to: &str| Route { frontends: vec![frontend], backends: [(own, address(to))].into() };
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
    // A backend without an address in the route cannot be reached from its frontends.
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
    // If a local backend is known, only local backends are used; otherwise all of them.
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
    assert_eq!(plan.routes[1].slots[1], to(&[far.address]), "a backend on another node is better than none");
}

#[test]
fn what_lingers_is_left_to_kube_proxy() {
    let service = service("");
    let mut plan = ServicePlan::new(&service, decision(BreakerState::Open, 0, false), &service.backups[0].backends);
    let old = ["10.43.0.7:80", "10.43.0.8:80", "[fd43::7]:80"]
        .map(|text| Frontend { address: address(text), protocol: Protocol::Tcp });
    plan.add_draining_frontends(&old);
    assert_eq!(plan.routes.iter().map(|r| r.frontends.len()).collect::<Vec<_>>(), [1, 2, 1]);
    assert_eq!(plan.routes[1].slots[1], SlotTable::All(Slot::PassThrough));
    assert_eq!(plan.frontends().count(), 4);
}
