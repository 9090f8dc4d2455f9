//! Tests of the Kubernetes source against a test double of the API server. They need neither a cluster nor root.

#![allow(clippy::disallowed_methods, clippy::unwrap_used, reason = "tests")]

mod double;

use std::{collections::BTreeMap, future::Future, sync::Arc, time::Duration};

use breaker_agent::config::FrontendRules;
use breaker_agent::metrics::Instruments;
use breaker_agent::source::kube::{KubeSource, NodeIdentity, NodeState, Update};
use breaker_api::crd::AttachMode;
use breaker_common::{
    BreakerState::{self, Closed, Open},
    StateReason,
};
use breaker_core::{
    engine::snapshot::{AppliedSummary, Summary, TierSummary},
    model::ServiceName,
};
use double::{Double, Fault};
use serde_json::{Value, json};

const LIMIT: Duration = Duration::from_secs(30);

fn service(name: &str, ip: &str) -> Value {
    json!({ "apiVersion": "v1", "kind": "Service", "metadata": { "namespace": "lab", "name": name }, "spec": { "clusterIP": ip, "ports": [{ "port": 8080 }] } })
}

fn slice(service: &str, addresses: &[&str]) -> Value {
    let endpoints: Vec<Value> = addresses.iter().map(|a| json!({ "addresses": [a] })).collect();
    json!({
        "apiVersion": "discovery.k8s.io/v1", "kind": "EndpointSlice", "addressType": "IPv4",
        "metadata": { "namespace": "lab", "name": format!("{service}-1"), "labels": { "kubernetes.io/service-name": service } },
        "ports": [{ "name": "", "port": 80, "protocol": "TCP" }], "endpoints": endpoints,
    })
}

fn breaker(generation: i64) -> Value {
    json!({
        "apiVersion": "breaker.dev/v1alpha1", "kind": "CircuitBreaker",
        "metadata": { "namespace": "lab", "name": "cb", "generation": generation },
        "spec": { "service": { "name": "dummy" }, "backups": [{ "name": "backup" }], "check": { "httpGet": { "path": "/ready" } } },
    })
}

fn node(ready: &str) -> Value {
    json!({ "apiVersion": "v1", "kind": "Node", "metadata": { "name": "node1" }, "status": { "conditions": [{ "type": "Ready", "status": ready }] } })
}

async fn lab() -> Double {
    let double = Double::start().await;
    double.put("nodes", node("True"));
    double.put("services", service("dummy", "10.43.0.1"));
    double.put("services", service("backup", "10.43.0.2"));
    double.put("endpointslices", slice("dummy", &["10.42.0.1"]));
    double.put("endpointslices", slice("backup", &["10.42.0.3"]));
    // No CircuitBreaker refers to this Service.
    double.put("endpointslices", slice("other", &["10.42.0.9"]));
    double.put("circuitbreakers", breaker(1));
    double
}

fn source(double: &Double) -> KubeSource {
    let place = NodeIdentity {
        node: "node1".into(),
        namespace: "breaker-system".into(),
        kubeconfig: None,
        room: 1000,
        frontends: FrontendRules { external_ips: true, ..FrontendRules::default() },
    };
    KubeSource::start(&double.client(), &place, &Instruments::new().unwrap())
}

async fn within<T>(what: &str, future: impl Future<Output = T>) -> T {
    tokio::time::timeout(LIMIT, future).await.unwrap_or_else(|_| panic!("timed out waiting for {what}"))
}

/// Waits for an update for which `good` returns true.
async fn update(source: &mut KubeSource, what: &str, mut good: impl FnMut(&Update) -> bool) -> Arc<Update> {
    within(what, async {
        loop {
            let update = source.changed().await;
            if good(&update) {
                return update;
            }
        }
    })
    .await
}

/// Waits until `look` returns true. It is called every 20 ms.
async fn until(what: &str, mut look: impl FnMut() -> bool) {
    within(what, async {
        while !look() {
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    })
    .await;
}

fn primary(update: &Update) -> Vec<String> {
    update.services().iter().flat_map(|s| &s.primary.backends).map(|b| b.address.to_string()).collect()
}

/// The facts that an agent would report while the whole update is in force.
fn node_state(update: &Arc<Update>, state: BreakerState) -> NodeState {
    let tier = |name: &str, active: bool| TierSummary { name: name.into(), up: 1, total: 1, checking: 0, active };
    let summary = |name: &ServiceName| Summary {
        limits_shared_by: 0,
        limited: None,
        established: None,
        name: name.clone(),
        applied: Some(AppliedSummary {
            state,
            since_unix_ns: 0,
            reason: if state == Open { StateReason::HttpStatus } else { StateReason::Initial },
            share: if state == Open { 0 } else { 1000 },
        }),
        message: String::new(),
        in_force: true,
        error: None,
        tiers: vec![tier("dummy", false), tier("backup", true)],
    };
    NodeState {
        summaries: update.services().iter().map(|s| summary(&s.name)).collect(),
        update: update.clone(),
        attach: AttachMode::Tcx,
        interfaces: 3,
        failed_interfaces: Vec::new(),
        sockets: None,
        incompatible: None,
        bypass: None,
        degraded: Vec::new(),
        unseen: Vec::new(),
        suspended: BTreeMap::new(),
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn objects_become_services_and_their_changes_follow() {
    let double = lab().await;
    let mut source = source(&double);
    let first = update(&mut source, "the lab", |_| true).await;
    // The first update is complete: no service is missing because its endpoints were not listed yet.
    assert_eq!(primary(&first), ["10.42.0.1:80"]);
    assert_eq!(first.services()[0].backups[0].backends.len(), 1);
    double.put("endpointslices", slice("dummy", &["10.42.0.1", "10.42.0.2"]));
    update(&mut source, "one more pod", |u| primary(u).len() == 2).await;
    let mut changed = breaker(2);
    changed["spec"]["mode"] = json!("DryRun");
    double.put("circuitbreakers", changed);
    update(&mut source, "the new generation", |u| u.results[0].generation == 2).await;
    double.delete("services", "lab", "dummy");
    update(&mut source, "the Service to be gone", |u| u.services().is_empty()).await;
    double.delete("circuitbreakers", "lab", "cb");
    update(&mut source, "the CircuitBreaker to be gone", |u| u.results.is_empty()).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn whatever_the_server_does_the_last_state_goes_on_and_what_was_missed_is_made_up_for() {
    for fault in
        [Fault::Gone, Fault::Cut, Fault::Status(429), Fault::Status(500), Fault::Garbage, Fault::Silent, Fault::Slow]
    {
        let double = lab().await;
        let mut source = source(&double);
        update(&mut source, "the lab", |u| primary(u).len() == 1).await;
        double.fault(fault);
        // The objects change while the source cannot learn of it; afterwards the history is deleted.
        double.put("endpointslices", slice("dummy", &["10.42.0.1", "10.42.0.2"]));
        let lists = double.lists();
        let missed = tokio::time::timeout(Duration::from_millis(600), async {
            loop {
                let update = source.changed().await;
                assert!(!update.services().is_empty(), "{fault:?}: the last state was lost");
            }
        });
        assert!(missed.await.is_err());
        if fault == Fault::Gone {
            assert!(double.lists() > lists, "the source must list again after 410 Gone");
        }
        double.forget();
        double.fault(Fault::None);
        within(&format!("{fault:?}: the change"), async {
            double.put("endpointslices", slice("dummy", &["10.42.0.1", "10.42.0.2", "10.42.0.4"]));
            loop {
                if primary(&*source.changed().await).len() == 3 {
                    return;
                }
            }
        })
        .await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_server_that_is_away_at_the_start_is_waited_for() {
    let double = lab().await;
    double.fault(Fault::Status(503));
    let mut source = source(&double);
    let early = tokio::time::timeout(Duration::from_millis(500), source.changed()).await;
    assert!(early.is_err(), "there is an update although the server never answered");
    double.fault(Fault::None);
    update(&mut source, "the lab", |u| primary(u).len() == 1).await;
}

fn condition(double: &Double, type_: &str) -> Option<(String, String)> {
    let breaker = double.get("circuitbreakers", "lab", "cb")?;
    let conditions = breaker["status"]["conditions"].as_array()?.clone();
    let found = conditions.into_iter().find(|c| c["type"] == type_)?;
    Some((found["status"].as_str()?.to_owned(), found["reason"].as_str()?.to_owned()))
}

fn is(double: &Double, type_: &str, status: &str, reason: &str) -> bool {
    condition(double, type_) == Some((status.to_owned(), reason.to_owned()))
}

fn event_reasons(double: &Double) -> Vec<String> {
    double.all("events").iter().filter_map(|e| Some(e["reason"].as_str()?.to_owned())).collect()
}

#[tokio::test(flavor = "multi_thread")]
async fn what_is_in_force_is_reported_published_and_told_once() {
    let double = lab().await;
    let mut source = source(&double);
    let lab = update(&mut source, "the lab", |u| !u.services().is_empty()).await;
    source.publish_node_state(node_state(&lab, Closed));
    until("Programmed", || is(&double, "Programmed", "True", "Programmed")).await;
    let report = double.get("nodereports", "", "node1").unwrap();
    assert_eq!(report["spec"]["services"][0]["appliedGeneration"], 1);
    let status = double.get("circuitbreakers", "lab", "cb").unwrap()["status"].clone();
    assert_eq!(
        (&status["state"], &status["share"], &status["backup"]),
        (&json!("Closed"), &json!("100%"), &json!("backup 1/1"))
    );
    assert!(
        event_reasons(&double).is_empty() || event_reasons(&double) == ["Programmed"],
        "{:?}",
        event_reasons(&double)
    );

    source.publish_node_state(node_state(&lab, Open));
    until("Opened", || event_reasons(&double).iter().any(|r| r == "Opened")).await;
    let status = double.get("circuitbreakers", "lab", "cb").unwrap()["status"].clone();
    assert_eq!((&status["state"], &status["open"], &status["share"]), (&json!("Open"), &json!("1/1"), &json!("0%")));
    assert!(is(&double, "Degraded", "True", "TrafficOnBackup"));

    // Reporting the same facts many times must not cause a write, over several rounds of the publisher.
    let (reports, statuses) = (double.writes("nodereports"), double.writes("circuitbreakers"));
    for _ in 0..60 {
        source.publish_node_state(node_state(&lab, Open));
        tokio::time::sleep(Duration::from_millis(100)).await;
    }
    assert_eq!((double.writes("nodereports"), double.writes("circuitbreakers")), (reports, statuses));
    source.shutdown().await;
    let lease = double.get("leases", "breaker-system", "breaker-status").unwrap();
    assert_eq!(lease["spec"]["holderIdentity"], "", "the next holder must not have to wait");
}

#[tokio::test(flavor = "multi_thread")]
async fn what_could_not_be_written_is_written_later() {
    let double = lab().await;
    let mut source = source(&double);
    let lab = update(&mut source, "the lab", |u| !u.services().is_empty()).await;
    source.publish_node_state(node_state(&lab, Closed));
    until("Programmed", || is(&double, "Programmed", "True", "Programmed")).await;
    double.fault(Fault::Status(500));
    source.publish_node_state(node_state(&lab, Open));
    tokio::time::sleep(Duration::from_millis(500)).await;
    // After an outage, the API server has its Nodes as not Ready at first.
    double.put("nodes", node("Unknown"));
    double.fault(Fault::None);
    until("the state reported during the outage", || {
        double.get("circuitbreakers", "lab", "cb").is_some_and(|cb| cb["status"]["state"] == "Open")
    })
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn what_is_refused_is_said_and_a_newer_one_waits() {
    let double = lab().await;
    let mut newer = breaker(1);
    newer["metadata"]["name"] = json!("newer");
    newer["metadata"]["creationTimestamp"] = json!("2026-02-01T00:00:00Z");
    double.put("circuitbreakers", newer);
    double.delete("services", "lab", "backup");
    let mut source = source(&double);
    let update = update(&mut source, "both", |u| u.results.len() == 2).await;
    assert!(update.services().is_empty());
    source.publish_node_state(node_state(&update, Closed));
    until("BackupNotFound", || is(&double, "ResolvedRefs", "False", "BackupNotFound")).await;
    until("both Events", || {
        let reasons = event_reasons(&double);
        ["BackupNotFound", "Conflicted"].iter().all(|r| reasons.iter().any(|is| is == r))
    })
    .await;
}

/// An object of a later API version, or one that passed a laxer validation, must not hide the others.
#[tokio::test(flavor = "multi_thread")]
async fn an_object_that_is_not_understood_leaves_the_others_alone() {
    let double = lab().await;
    let mut strange = breaker(1);
    strange["metadata"]["name"] = json!("strange");
    strange["spec"]["override"] = json!("SomethingNew");
    double.put("circuitbreakers", strange.clone());
    let mut source = source(&double);
    update(&mut source, "the lab", |u| primary(u).len() == 1 && u.results.len() == 1).await;
    strange["spec"]["until"] = json!("whenever");
    double.put("circuitbreakers", strange);
    // An object that could be parsed before keeps its last valid version.
    let mut newer = breaker(2);
    newer["spec"]["mode"] = json!("OfALaterVersion");
    double.put("circuitbreakers", newer);
    double.put("endpointslices", slice("dummy", &["10.42.0.1", "10.42.0.2"]));
    update(&mut source, "one more pod", |u| primary(u).len() == 2).await;
}

/// With many names, the EndpointSlices of the whole namespace are watched. Those of a Service that is referenced
/// later are in the store already, so no further event comes for them.
#[tokio::test(flavor = "multi_thread")]
async fn one_more_of_many_is_heard_without_another_event() {
    const MANY: usize = 70;
    let double = lab().await;
    let put = |i: usize| {
        double.put("services", service(&format!("many-{i}"), &format!("10.43.1.{i}")));
        double.put("endpointslices", slice(&format!("many-{i}"), &[&format!("10.42.1.{i}")]));
    };
    let wish = |i: usize| {
        let mut breaker = breaker(1);
        breaker["metadata"]["name"] = json!(format!("many-{i}"));
        breaker["spec"]["service"]["name"] = json!(format!("many-{i}"));
        double.put("circuitbreakers", breaker);
    };
    (0..=MANY).for_each(put);
    (0..MANY).for_each(wish);
    let mut source = source(&double);
    update(&mut source, "all of them", |u| u.services().len() == MANY + 1).await;
    wish(MANY);
    update(&mut source, "one more", |u| u.services().len() == MANY + 2).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_replica_that_is_behind_ends_with_the_truth() {
    let double = lab().await;
    let mut source = source(&double);
    update(&mut source, "the lab", |u| primary(u).len() == 1).await;
    double.put("endpointslices", slice("dummy", &["10.42.0.1", "10.42.0.2"]));
    update(&mut source, "one more pod", |u| primary(u).len() == 2).await;
    let lists = double.lists();
    double.fault(Fault::Stale(1));
    until("a list of an older state", || double.lists() > lists).await;
    double.put("endpointslices", slice("dummy", &["10.42.0.1", "10.42.0.2", "10.42.0.4"]));
    double.fault(Fault::None);
    update(&mut source, "the current state", |u| primary(u).len() == 3).await;
}

/// When the ClusterIP is assigned to another Service, it is no longer a frontend, unless that Service is protected,
/// too.
#[tokio::test(flavor = "multi_thread")]
async fn an_address_that_another_service_got_is_not_ours_any_more() {
    let double = lab().await;
    let mut source = source(&double);
    let frontends = |u: &Update| -> Vec<String> {
        let routes = u.services().into_iter().flat_map(|s| s.frontends.clone());
        routes.map(|frontend| frontend.address.ip().to_string()).collect()
    };
    update(&mut source, "the lab", |u| frontends(u) == ["10.43.0.1"]).await;
    double.delete("services", "lab", "dummy");
    double.put("services", service("stranger", "10.43.0.1"));
    double.put("endpointslices", slice("stranger", &["10.42.0.8"]));
    let without = update(&mut source, "no frontend", |u| frontends(u).is_empty()).await;
    assert_eq!(without.results.len(), 1, "the CircuitBreaker is still there, and reports the missing Service");
    // The Service is created again, and gets another address.
    double.put("services", service("dummy", "10.43.0.7"));
    update(&mut source, "the new address only", |u| frontends(u) == ["10.43.0.7"]).await;
}

/// A CircuitBreaker that is deleted and created again under the same name gets a status of its own, even if the
/// content is the same.
#[tokio::test(flavor = "multi_thread")]
async fn an_object_that_is_made_again_gets_its_status_again() {
    let double = lab().await;
    let mut source = source(&double);
    let lab = update(&mut source, "the lab", |u| !u.services().is_empty()).await;
    source.publish_node_state(node_state(&lab, Closed));
    until("Programmed", || is(&double, "Programmed", "True", "Programmed")).await;
    double.delete("circuitbreakers", "lab", "cb");
    let mut again = breaker(1);
    again["metadata"]["uid"] = json!("another");
    double.put("circuitbreakers", again);
    let lab = update(&mut source, "the new one", |u| u.results.iter().any(|s| s.uid == "another")).await;
    source.publish_node_state(node_state(&lab, Closed));
    until("Programmed again", || is(&double, "Programmed", "True", "Programmed")).await;
    // A foreign writer changes the status: the publisher restores it.
    let mut wrong = double.get("circuitbreakers", "lab", "cb").unwrap();
    wrong["status"]["state"] = json!("Nonsense");
    double.put("circuitbreakers", wrong);
    until("the restored status", || {
        double.get("circuitbreakers", "lab", "cb").is_some_and(|cb| cb["status"]["state"] == "Closed")
    })
    .await;
}
