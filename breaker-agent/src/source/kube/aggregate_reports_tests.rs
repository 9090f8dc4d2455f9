//! Tests of the aggregation of the nodes' reports: status, conditions and Events.

use breaker_common::StateReason;
use std::sync::Arc;

use super::{super::intent::Key, *};
use ReportedState::{Closed, Open};
use breaker_api::crd::{NodeReport, NodeReportSpec, ReportedTier};

fn at(second: i64) -> Timestamp {
    Timestamp::from_second(1_800_000_000 + second).unwrap()
}

fn result() -> ResolvedBreaker {
    ResolvedBreaker {
        owner: Owner { kind: OwnerKind::CircuitBreaker, key: Key::new("lab", "cb") },
        uid: "u".into(),
        generation: 2,
        service: Key::new("lab", "dummy"),
        accepted: Ok(()),
        resolved: Ok(()),
        reachable: Ok(()),
        ports: BTreeMap::new(),
        outside: std::collections::BTreeMap::new(),
        notes: Vec::new(),
        hold: false,
        pending: false,
        no_slice_has_the_port: false,
    }
}

fn port(state: ReportedState, since: i64) -> ReportedService {
    ReportedService {
        kind: Some(OwnerKind::CircuitBreaker),
        namespace: "lab".into(),
        name: "cb".into(),
        uid: "u".into(),
        port: 8080,
        desired_generation: 2,
        applied_generation: 2,
        state,
        since: Some(at(since)),
        reason: Some(if state == Open { StateReason::HttpStatus } else { StateReason::Initial }),
        share: if state == Open { 0 } else { 1000 },
        backups: vec![ReportedTier { name: "backup".into(), up: 2, total: 2, active: true, checking: 0 }],
        ..ReportedService::default()
    }
}

fn node(name: &str, ready: bool, services: Vec<ReportedService>) -> NodeReportView {
    NodeReportView {
        node: name.into(),
        ready,
        report: Arc::new(NodeReport::new(name, NodeReportSpec { services, ..NodeReportSpec::default() })),
    }
}

fn condition_of(status: &CircuitBreakerStatus, type_: &str) -> (String, String) {
    let found = status.conditions.iter().find(|c| c.type_ == type_).unwrap();
    (found.status.clone(), found.reason.clone())
}

fn pair(status: &str, reason: &str) -> (String, String) {
    (status.into(), reason.into())
}

#[test]
fn the_most_open_node_is_the_state_and_the_share_is_of_all() {
    let reports = [node("a", true, vec![port(Closed, 0)]), node("b", true, vec![port(Open, 5)])];
    let status = status(&result(), &NodeReports::new(&reports), None, at(9));
    assert_eq!(status.state, Some(Open));
    assert_eq!((status.share.as_deref(), status.open.as_deref()), (Some("50%"), Some("1/2")));
    assert_eq!((status.since, status.backup.as_deref()), (Some(at(5)), Some("backup 2/2")));
    assert_eq!(condition_of(&status, "Programmed"), pair("True", "Programmed"));
    assert_eq!(condition_of(&status, "Degraded"), pair("True", "TrafficOnBackup"));
}

#[test]
fn a_node_that_is_silent_counts_as_that_and_nothing_else() {
    let reports = [node("a", true, vec![port(Closed, 0)]), node("b", false, vec![port(Open, 5)])];
    let status = status(&result(), &NodeReports::new(&reports), None, at(9));
    assert_eq!((status.state, status.counts.nodes, status.counts.silent), (Some(Closed), 1, 1));
    assert_eq!(status.nodes[1].state, ReportedState::Unknown);
    assert_eq!(condition_of(&status, "Programmed"), pair("True", "Programmed"));
}

#[test]
fn programmed_means_this_generation_on_every_node() {
    let old = ReportedService { applied_generation: 1, ..port(Closed, 0) };
    let reports = [node("a", true, vec![port(Closed, 0)]), node("b", true, vec![old]), node("c", true, vec![])];
    let status = status(&result(), &NodeReports::new(&reports), None, at(9));
    assert_eq!(condition_of(&status, "Programmed"), pair("False", "Pending"));
    let message = &status.conditions.iter().find(|c| c.type_ == "Programmed").unwrap().message;
    assert_eq!(message, "on 1 of 3 nodes");
}

/// A report about an earlier object with the same name is not counted for the new object.
#[test]
fn an_object_that_is_made_again_is_another() {
    let before = ReportedService { uid: "its predecessor".into(), ..port(Open, 0) };
    let reports = [node("a", true, vec![before])];
    let status = status(&result(), &NodeReports::new(&reports), None, at(9));
    assert_eq!((status.state, status.counts.programmed), (None, 0));
}

#[test]
fn ports_of_a_node_are_shown_as_one() {
    let second = ReportedService { port: 8443, ..port(Open, 7) };
    let reports = [node("a", true, vec![port(Closed, 0), second])];
    let status = status(&result(), &NodeReports::new(&reports), None, at(9));
    assert_eq!(status.state, Some(Open));
    assert_eq!(status.nodes[0].ports.len(), 2);
}

#[test]
fn the_object_stays_small_however_many_nodes_there_are() {
    let mut reports: Vec<NodeReportView> =
        (0..2000).map(|i| node(&format!("node{i:04}"), true, vec![port(Closed, 0)])).collect();
    reports[1234] = node("node1234", true, vec![ReportedService { message: "x".repeat(5000), ..port(Open, 5) }]);
    let status = status(&result(), &NodeReports::new(&reports), None, at(9));
    assert_eq!((status.counts.nodes, status.counts.open, status.nodes.len()), (2000, 1, MOST_NODES));
    assert!(status.nodes.iter().any(|n| n.node == "node1234"), "the node that differs must be listed");
    let size = serde_json::to_string(&status).unwrap().len();
    assert!(size < 20 * 1024, "{size}");
}

#[test]
fn what_did_not_change_keeps_its_time_and_is_no_event() {
    let closed = [node("a", true, vec![port(Closed, 0)])];
    let open = [node("a", true, vec![port(Open, 5)])];
    let first = status(&result(), &NodeReports::new(&closed), None, at(1));
    let again = status(&result(), &NodeReports::new(&closed), Some(&first), at(50));
    assert_eq!(first, again, "without a change the status must be equal, so that it is not written again");
    assert!(event_records(Some(&first), &again).is_empty());
    let opened = status(&result(), &NodeReports::new(&open), Some(&again), at(60));
    let reasons: Vec<String> = event_records(Some(&again), &opened).into_iter().map(|h| h.reason).collect();
    assert_eq!(reasons, ["Opened"]);
    // An Event that is counted up keeps its first note, and an operator's words are in the note.
    let by_operator = CircuitBreakerStatus { reason: Some("Operator".into()), ..opened.clone() };
    let counted = [&opened, &by_operator].map(|status| event_records(Some(&again), status)[0].counted);
    assert_eq!(counted, [true, false]);
    let time =
        |s: &CircuitBreakerStatus, t: &str| s.conditions.iter().find(|c| c.type_ == t).unwrap().last_transition_time.0;
    assert_eq!((time(&opened, "Accepted"), time(&opened, "Degraded")), (at(1), at(60)));
    let closed_again = status(&result(), &NodeReports::new(&closed), Some(&opened), at(70));
    let told = event_records(Some(&opened), &closed_again);
    assert_eq!(told.iter().map(|h| (h.reason.as_str(), h.warning)).collect::<Vec<_>>(), [("Closed", false)]);
}

/// RESETS: the nodes' numbers are added up, and told when the last node has ended.
#[test]
fn resets_are_an_event_when_no_node_resets_any_more() {
    let counts = |reset: i64, left: i64, resetting: bool| EstablishedCounts {
        tier: Some(TierRole::Primary),
        found: 5,
        reset,
        left,
        resetting,
        ..EstablishedCounts::default()
    };
    let open = |counts| ReportedService { established: Some(counts), ..port(Open, 5) };
    let of = |a, b, old: Option<&CircuitBreakerStatus>| {
        let reports = [node("a", true, vec![open(a)]), node("b", true, vec![open(b)])];
        status(&result(), &NodeReports::new(&reports), old, at(9))
    };
    let during = of(counts(5, 0, false), counts(2, 3, true), None);
    let ended = of(counts(5, 0, false), counts(5, 0, false), Some(&during));
    let counted_again = of(counts(5, 0, false), counts(5, 1, false), Some(&ended));
    assert_eq!(ended.established, Some(EstablishedCounts { found: 10, ..counts(10, 0, false) }));
    assert_eq!(ended.nodes[1].established, Some(counts(5, 0, false)));
    let notes = |old: &CircuitBreakerStatus, new: &CircuitBreakerStatus| -> Vec<String> {
        event_records(Some(old), new).into_iter().map(|event| event.note).collect()
    };
    assert_eq!(notes(&during, &during), [""; 0]);
    assert_eq!(notes(&during, &ended), ["10 of 10 established connections to the primary were reset"]);
    assert_eq!(notes(&ended, &counted_again), [""; 0]);
    let reports = [node("a", true, vec![open(counts(5, 0, false))]), node("b", true, vec![port(Closed, 8)])];
    let returning = status(&result(), &NodeReports::new(&reports), Some(&ended), at(10));
    assert!(!notes(&ended, &returning).iter().any(|note| note.contains("established")), "a node has returned");
}

/// TRIALS A2: a pod that is known to be Down still gets connections while the breaker is closed.
#[test]
fn a_primary_that_is_partly_down_is_told() {
    let primary = |up, checking| ReportedService {
        primary: ReportedTier { name: "dummy".into(), up, total: 2, active: true, checking },
        ..port(Closed, 0)
    };
    let told = |service: ReportedService| {
        condition_of(&status(&result(), &NodeReports::new(&[node("a", true, vec![service])]), None, at(1)), "Degraded")
    };
    assert_eq!(told(primary(2, 0)), pair("False", "Whole"));
    assert_eq!(told(primary(1, 1)), pair("False", "Whole"), "its first check is not over");
    assert_eq!(told(primary(1, 0)), pair("True", "PrimaryPartlyDown"));
}

#[test]
fn a_backup_that_is_lost_and_found_is_told() {
    let lost = ReportedService {
        backups: vec![ReportedTier { name: "backup".into(), up: 0, total: 2, active: false, checking: 0 }],
        ..port(Closed, 0)
    };
    let good = status(&result(), &NodeReports::new(&[node("a", true, vec![port(Closed, 0)])]), None, at(1));
    let bad = status(&result(), &NodeReports::new(&[node("a", true, vec![lost])]), Some(&good), at(2));
    assert_eq!(condition_of(&bad, "Degraded"), pair("True", "BackupUnavailable"));
    assert_eq!(bad.backup.as_deref(), Some("backup 0/2"));
    let reasons = |a: &CircuitBreakerStatus, b: &CircuitBreakerStatus| -> Vec<String> {
        event_records(Some(a), b).into_iter().map(|h| h.reason).collect()
    };
    assert_eq!(reasons(&good, &bad), ["BackupUnavailable"]);
    assert_eq!(reasons(&bad, &good), ["BackupAvailable"]);
}

#[test]
fn a_refusal_is_a_condition_and_an_event_also_for_a_new_object() {
    let mut refused = result();
    refused.resolved = Err(Refusal { reason: "RefNotPermitted", message: "no grant".into() });
    let status = status(&refused, &NodeReports::new(&[node("a", true, vec![])]), None, at(1));
    assert_eq!(condition_of(&status, "ResolvedRefs"), pair("False", "RefNotPermitted"));
    assert_eq!(condition_of(&status, "Programmed"), pair("False", "NotResolved"));
    // TRIALS A7: the row says so.
    assert_eq!(condition_of(&status, "Degraded"), pair("True", "NotProtected"));
    let row = (status.state, status.reason.as_deref(), status.message.as_deref());
    assert_eq!(row, (Some(ReportedState::NotProtected), Some("RefNotPermitted"), Some("no grant")));
    assert_eq!(event_records(None, &status).into_iter().map(|h| h.reason).collect::<Vec<_>>(), ["RefNotPermitted"]);
}

/// TRIALS J1: tools that wait (kstatus) see that nodes lag, that a request is refused, and when all of it is done. An open
/// breaker is done.
#[test]
fn tools_that_wait_see_how_far_the_nodes_are() {
    let progress = |result: &ResolvedBreaker, reports: &[NodeReportView]| {
        let status = status(result, &NodeReports::new(reports), None, at(9));
        let conditions = ["Reconciling", "Stalled"].map(|type_| condition_of(&status, type_).0);
        (status.observed_generation, conditions.map(|status| status == "True"))
    };
    let behind = ReportedService { desired_generation: 1, applied_generation: 1, ..port(Closed, 0) };
    let unwritten = ReportedService { applied_generation: 1, ..port(Closed, 0) };
    let rows = [
        ("no agent", vec![], (0, [true, false])),
        ("a node without a report about it", vec![node("a", true, vec![])], (0, [true, false])),
        (
            "a node has the spec before",
            vec![node("a", true, vec![port(Closed, 0)]), node("b", true, vec![behind])],
            (1, [true, false]),
        ),
        ("a node has not written it", vec![node("a", true, vec![unwritten])], (2, [true, false])),
        ("closed", vec![node("a", true, vec![port(Closed, 0)])], (2, [false, false])),
        ("open", vec![node("a", true, vec![port(Open, 5)])], (2, [false, false])),
    ];
    for (what, reports, expected) in rows {
        assert_eq!(progress(&result(), &reports), expected, "{what}");
    }
    let mut refused = result();
    refused.accepted = Err(Refusal { reason: "Conflicted", message: "another one".into() });
    assert_eq!(progress(&refused, &[node("a", true, vec![])]), (2, [false, true]));
}
