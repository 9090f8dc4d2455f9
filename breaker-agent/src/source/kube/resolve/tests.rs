//! Tests for every rule of resolution, with objects as the API server returns them.

use breaker_api::crd::{CircuitBreaker, ReferenceGrant};
use std::{collections::BTreeMap, path::Path, sync::Arc};

use jiff::{SignedDuration, Timestamp};
use kube::{ResourceExt as _, core::DeserializeGuard};
use serde_json::{Value, json};

use super::{LastValidSpecs, NodeView, Resolution, ResolvedBreaker, World, engine_name, resolve};
use crate::{
    config,
    source::kube::{
        hold::Held,
        intent::Key,
        objects::{EndpointSlice, Service},
        spec_policies::Policies,
    },
};
use breaker_core::model;

const NOW: i64 = 1_800_000_000;

fn now() -> Timestamp {
    Timestamp::from_second(NOW).unwrap()
}

/// A [`World`] with two Services in namespace `lab`, each with two endpoints. `with_breaker` adds a CircuitBreaker.
struct Lab(World);

impl Lab {
    fn new() -> Self {
        let mut lab = Self(World {
            node: NodeView {
                name: "node1".into(),
                addresses: vec!["192.0.2.1".parse().unwrap()],
                zone: Some("a".into()),
                ..NodeView::default()
            },
            ..World::default()
        });
        lab.service("lab", "dummy", json!({ "clusterIP": "10.43.0.1", "clusterIPs": ["10.43.0.1"], "ports": [{ "port": 8080, "protocol": "TCP" }] }), json!({}));
        lab.service("lab", "backup", json!({ "clusterIP": "10.43.0.2", "ports": [{ "port": 8080 }] }), json!({}));
        lab.slice("lab", "dummy", "", 80, json!([{ "addresses": ["10.42.0.1"] }, { "addresses": ["10.42.0.2"] }]));
        lab.slice(
            "lab",
            "backup",
            "",
            80,
            json!([{ "addresses": ["10.42.0.3"], "nodeName": "node1", "zone": "a" }, { "addresses": ["10.42.1.3"], "nodeName": "node2", "zone": "b" }]),
        );
        lab
    }

    fn with_breaker(mut self, spec: Value) -> Self {
        self.breaker("cb", 100, spec);
        self
    }

    fn service(&mut self, namespace: &str, name: &str, spec: Value, annotations: Value) -> &mut Self {
        let service: Service = serde_json::from_value(json!({
            "metadata": { "namespace": namespace, "name": name, "annotations": annotations, "creationTimestamp": "2026-01-01T00:00:00Z" },
            "spec": spec,
        }))
        .unwrap();
        self.0.services.insert(Key::new(namespace, name), Arc::new(service));
        self
    }

    fn slice(&mut self, namespace: &str, service: &str, port: &str, number: u16, endpoints: Value) -> &mut Self {
        let slice: EndpointSlice = serde_json::from_value(json!({
            "metadata": { "namespace": namespace, "name": format!("{service}-{port}") },
            "addressType": "IPv4", "ports": [{ "name": port, "port": number, "protocol": "TCP" }], "endpoints": endpoints,
        }))
        .unwrap();
        self.0.endpoints.entry(Key::new(namespace, service)).or_default().push(Arc::new(slice));
        self
    }

    fn breaker(&mut self, name: &str, age: i64, spec: Value) -> &mut Self {
        let created = Timestamp::from_second(NOW - age).unwrap();
        let breaker: CircuitBreaker = serde_json::from_value(json!({
            "apiVersion": "breaker.dev/v1alpha1", "kind": "CircuitBreaker",
            "metadata": { "namespace": "lab", "name": name, "generation": 3, "uid": name, "creationTimestamp": created.to_string() },
            "spec": spec,
        }))
        .unwrap();
        self.0.breakers.push(Arc::new(DeserializeGuard(Ok(breaker))));
        self
    }

    fn resolve(&self) -> Resolution {
        resolve(&self.0, &mut Policies::default(), &mut LastValidSpecs::new(), now(), 1000)
    }

    fn only(&self) -> ResolvedBreaker {
        let mut resolution = self.resolve();
        assert_eq!(resolution.results.len(), 1);
        resolution.results.remove(0)
    }
}

fn spec() -> Value {
    json!({ "service": { "name": "dummy" }, "backups": [{ "name": "backup" }], "check": { "httpGet": { "path": "/ready" } } })
}

fn with(change: impl FnOnce(&mut Value)) -> Value {
    let mut spec = spec();
    change(&mut spec);
    spec
}

fn refusal(result: &ResolvedBreaker) -> (&'static str, String) {
    let refusal = result.accepted.clone().and(result.resolved.clone()).unwrap_err();
    (refusal.reason, refusal.message)
}

fn addresses(tier: &model::Tier) -> Vec<String> {
    tier.backends.iter().map(|b| b.address.to_string()).collect()
}

fn frontends(service: &model::Service) -> Vec<String> {
    service.frontends.iter().map(|f| f.address.to_string()).collect()
}

#[test]
fn the_lab_means_what_the_file_for_it_means() {
    let result = Lab::new().with_breaker(spec()).only();
    assert!(result.accepted.is_ok() && result.resolved.is_ok() && !result.hold);
    let file = "services: [{name: 'lab/dummy', frontends: [{address: 10.43.0.1, port: 8080}],
        primary: {name: dummy, backends: [{address: 10.42.0.1, port: 80}, {address: 10.42.0.2, port: 80}], check: {httpGet: {path: /ready}}},
        backups: [{name: backup, backends: [{address: 10.42.0.3, port: 80}, {address: 10.42.1.3, port: 80}], check: {httpGet: {path: /ready}}}]}]";
    let mut expected = config::parse(Path::new("t"), file).unwrap().services.remove(0);
    expected.grace_period = result.ports[&8080].grace_period;
    expected.name = engine_name(&Key::new("lab", "dummy"), 8080, false);
    assert_eq!(*result.ports[&8080], expected, "an omitted field has another default than in a file");
}

#[test]
fn what_refers_to_nothing_is_named() {
    type Row = (&'static str, Box<dyn Fn(&mut Lab)>, Value, &'static str);
    let rows: Vec<Row> = vec![
        ("ServiceNotFound", Box::new(|_| {}), with(|s| s["service"]["name"] = json!("nobody")), "lab/nobody"),
        ("BackupNotFound", Box::new(|_| {}), with(|s| s["backups"][0]["name"] = json!("nobody")), "lab/nobody"),
        (
            "PortNotFound",
            Box::new(|_| {}),
            with(|s| s["service"]["ports"] = json!([9090])),
            "has no port 9090; it has 8080",
        ),
        (
            "PortNotFound",
            Box::new(|_| {}),
            with(|s| s["backups"][0]["port"] = json!("http")),
            "no TCP port that matches port http",
        ),
        (
            "PortNotFound",
            Box::new(|_| {}),
            with(|s| s["check"]["httpGet"]["port"] = json!("admin")),
            "\"admin\" is not a port of Service lab/dummy",
        ),
        (
            "RefNotPermitted",
            Box::new(|_| {}),
            with(|s| s["backups"][0]["namespace"] = json!("spare")),
            "no ReferenceGrant in namespace spare",
        ),
        (
            "BackupIsPrimary",
            Box::new(|_| {}),
            with(|s| s["backups"] = json!([{ "name": "dummy", "namespace": "lab" }])),
            "its own backup",
        ),
        (
            "Headless",
            Box::new(|lab| {
                lab.service("lab", "dummy", json!({ "clusterIP": "None", "ports": [{ "port": 80 }] }), json!({}));
            }),
            spec(),
            "headless",
        ),
        (
            "ExternalName",
            Box::new(|lab| {
                lab.service("lab", "dummy", json!({ "type": "ExternalName" }), json!({}));
            }),
            spec(),
            "ExternalName",
        ),
        (
            "ProtocolNotSupported",
            Box::new(|lab| {
                lab.service(
                    "lab",
                    "dummy",
                    json!({ "clusterIP": "10.43.0.1", "ports": [{ "port": 53, "protocol": "SCTP" }] }),
                    json!({}),
                );
            }),
            spec(),
            "no TCP or UDP port",
        ),
    ];
    for (reason, change, spec, expected) in rows {
        let mut lab = Lab::new().with_breaker(spec);
        change(&mut lab);
        let result = lab.only();
        let (is, message) = refusal(&result);
        assert_eq!(is, reason, "{message}");
        assert!(message.contains(expected), "{message}");
        assert!(result.ports.is_empty() && !result.hold, "{reason}: nothing is redirected");
    }
}

#[test]
fn one_backup_that_resolves_is_enough() {
    let result =
        Lab::new().with_breaker(with(|s| s["backups"] = json!([{ "name": "nobody" }, { "name": "backup" }]))).only();
    assert_eq!(refusal(&result).0, "BackupNotFound");
    assert_eq!(result.ports[&8080].backups.len(), 1);
}

#[test]
fn a_grant_opens_another_namespace_and_only_that() {
    let grant = |namespace: &str, from: &str, name: Option<&str>| -> Arc<ReferenceGrant> {
        Arc::new(
            serde_json::from_value(json!({
                "apiVersion": "breaker.dev/v1alpha1", "kind": "ReferenceGrant", "metadata": { "namespace": namespace, "name": "g" },
                "spec": { "from": [{ "group": "breaker.dev", "kind": "CircuitBreaker", "namespace": from }], "to": [{ "kind": "Service", "name": name }] },
            }))
            .unwrap(),
        )
    };
    let rows = [
        (grant("spare", "lab", None), true),
        (grant("spare", "lab", Some("backup")), true),
        (grant("spare", "lab", Some("another")), false),
        (grant("spare", "others", None), false),
        (grant("lab", "lab", None), false),
    ];
    for (grant, permitted) in rows {
        let mut lab = Lab::new().with_breaker(with(|s| s["backups"][0]["namespace"] = json!("spare")));
        lab.service("spare", "backup", json!({ "clusterIP": "10.43.0.9", "ports": [{ "port": 8080 }] }), json!({}));
        lab.slice("spare", "backup", "", 80, json!([{ "addresses": ["10.42.0.9"] }]));
        let expected = format!("{:?}", grant.spec);
        lab.0.grants.push(grant);
        let result = lab.only();
        assert_eq!(result.resolved.is_ok(), permitted, "{expected}");
        assert_eq!(result.ports.len(), usize::from(permitted), "{expected}");
    }
}

#[test]
fn every_address_of_a_service_is_a_frontend() {
    let mut lab = Lab::new().with_breaker(spec());
    lab.0.frontends.external_ips = true;
    lab.service(
        "lab",
        "dummy",
        json!({
            "type": "LoadBalancer", "clusterIP": "10.43.0.1", "clusterIPs": ["10.43.0.1", "fd43::1"], "externalIPs": ["198.51.100.7"],
            "ports": [{ "port": 8080, "nodePort": 30080 }],
        }),
        json!({}),
    );
    let key = Key::new("lab", "dummy");
    let mut service = (*lab.0.services[&key]).clone();
    service.status = serde_json::from_value(json!({ "loadBalancer": { "ingress": [{ "ip": "203.0.113.9" }, { "ip": "203.0.113.10", "ipMode": "Proxy" }, { "hostname": "x" }] } })).unwrap();
    lab.0.services.insert(key, Arc::new(service));
    let result = lab.only();
    assert_eq!(
        frontends(&result.ports[&8080]),
        ["10.43.0.1:8080", "192.0.2.1:30080", "198.51.100.7:8080", "203.0.113.9:8080", "[fd43::1]:8080"]
    );
    let note = "not all pods of the backups can be reached from [fd43::1]:8080/TCP";
    assert!(result.notes.iter().any(|n| n == note), "{:?}", result.notes);
}

/// All ports in both families form one service. Each of its pods is identified by one address.
#[test]
fn both_families_and_all_ports_have_one_state() {
    let mut lab = Lab::new().with_breaker(spec());
    let ports = json!([{ "name": "dns", "port": 53, "protocol": "UDP" }, { "name": "http", "port": 8080 }]);
    let dual = |ips: [&str; 2]| json!({ "clusterIP": ips[0], "clusterIPs": ips, "ports": ports });
    lab.0.endpoints.clear();
    for (name, ips, pods) in [
        ("dummy", ["10.43.0.1", "fd43::1"], ["10.42.0.1", "fd42::1"]),
        ("backup", ["10.43.0.2", "fd43::2"], ["10.42.0.3", "fd42::3"]),
    ] {
        lab.service("lab", name, dual(ips), json!({}));
        for (family, pod) in ["IPv4", "IPv6"].into_iter().zip(pods) {
            let slice: EndpointSlice = serde_json::from_value(json!({
                "metadata": { "namespace": "lab", "name": format!("{name}-{family}") }, "addressType": family,
                "ports": [{ "name": "dns", "port": 5353, "protocol": "UDP" }, { "name": "http", "port": 80, "protocol": "TCP" }],
                "endpoints": [{ "addresses": [pod], "targetRef": { "uid": name } }],
            }))
            .unwrap();
            lab.0.endpoints.entry(Key::new("lab", name)).or_default().push(Arc::new(slice));
        }
    }
    let result = lab.only();
    assert_eq!((result.resolved.clone(), result.notes.clone()), (Ok(()), vec![]));
    assert_eq!(result.ports.len(), 1);
    let service = &result.ports[&8080];
    assert_eq!(
        frontends(service),
        ["10.43.0.1:8080", "[fd43::1]:8080", "10.43.0.1:53", "[fd43::1]:53"],
        "the checked port comes first"
    );
    assert_eq!(addresses(&service.primary), ["10.42.0.1:80"]);
    assert_eq!(addresses(&service.backups[0]), ["10.42.0.3:80"]);
    let reached: Vec<String> = service
        .frontends
        .iter()
        .map(|f| service.reach(f, "10.42.0.3:80".parse().unwrap()).unwrap().to_string())
        .collect();
    assert_eq!(reached, ["10.42.0.3:80", "[fd42::3]:80", "10.42.0.3:5353", "[fd42::3]:5353"]);
}

/// F7: with a backup of the other family only, an open breaker moves nothing, and nobody is told.
#[test]
fn a_family_without_a_backup_is_named() {
    let mut lab = Lab::new().with_breaker(spec());
    lab.0.endpoints.clear();
    let mut slice = |name: &str, family: &str, address: &str| {
        let slice: EndpointSlice = serde_json::from_value(json!({
            "metadata": { "namespace": "lab", "name": format!("{name}-{family}") }, "addressType": family,
            "ports": [{ "name": "", "port": 80, "protocol": "TCP" }],
            "endpoints": [{ "addresses": [address], "targetRef": { "uid": name } }],
        }))
        .unwrap();
        lab.0.endpoints.entry(Key::new("lab", name)).or_default().push(Arc::new(slice));
    };
    slice("dummy", "IPv4", "10.42.0.1");
    slice("dummy", "IPv6", "fd42::1");
    slice("backup", "IPv6", "fd42::3");
    let backup = json!({ "clusterIP": "fd43::2", "ports": [{ "port": 80 }] });
    lab.service("lab", "backup", backup, json!({}));
    let of_dummy = |ips: &[&str]| json!({ "clusterIP": ips[0], "clusterIPs": ips, "ports": [{ "port": 80 }] });

    // A Service of one family, whose only backup has the other one.
    lab.service("lab", "dummy", of_dummy(&["10.43.0.1"]), json!({}));
    let refused = lab.only().reachable.unwrap_err();
    let message = "no pod of a backup has an IPv4 address, so connections to 10.43.0.1:80/TCP are not moved";
    assert_eq!((refused.reason, refused.message.as_str()), ("NoBackupInFamily", message));

    // A Service of both families: the other family is served.
    lab.service("lab", "dummy", of_dummy(&["10.43.0.1", "fd43::1"]), json!({}));
    let result = lab.only();
    assert_eq!(result.reachable.unwrap_err().message, message);
    let service = &result.ports[&80];
    let backup = service.backups[0].backends[0].address;
    let reached = |f: &model::Frontend| service.reach(f, backup).map(|address| address.to_string());
    let reached: Vec<Option<String>> = service.frontends.iter().map(reached).collect();
    assert_eq!(reached, [Some("[fd42::3]:80".into()), None]);
}

/// G3: a window that can never trip.
#[test]
fn a_window_that_the_primary_cannot_fill_is_named() {
    let window = json!({ "lengthMillis": 10_000, "minimumVolume": 20 });
    let result = Lab::new().with_breaker(with(|s| s["breaker"] = json!({ "window": window }))).only();
    let note =
        "breaker.window cannot trip: with 2 primary pod(s) it holds at most 8 observations, and minimumVolume is 20";
    assert_eq!(result.notes, [note]);
    let without_check = with(|s| {
        s["breaker"] = json!({ "window": window });
        s.as_object_mut().unwrap().remove("check");
    });
    let (reason, message) = refusal(&Lab::new().with_breaker(without_check).only());
    assert_eq!(reason, "Invalid");
    assert!(message.contains("breaker.window: needs a check of the primary"), "{message}");
}

#[test]
fn a_check_of_datagrams_only_must_say_its_port() {
    let udp = json!({ "clusterIP": "10.43.0.1", "ports": [{ "port": 53, "protocol": "UDP" }] });
    let mut lab = Lab::new().with_breaker(spec());
    lab.service("lab", "dummy", udp.clone(), json!({}));
    assert_eq!(refusal(&lab.only()).0, "Invalid");
    let mut lab = Lab::new().with_breaker(with(|s| s["check"]["httpGet"]["port"] = json!(8080)));
    lab.service("lab", "dummy", udp, json!({}));
    // The spec is valid, but the backup has no UDP port here.
    assert_eq!(refusal(&lab.only()).0, "PortNotFound");
}

#[test]
fn ports_are_found_by_name_by_number_or_by_being_the_only_one() {
    let mut lab = Lab::new().with_breaker(with(|s| s["check"]["httpGet"]["port"] = json!("admin")));
    lab.service("lab", "dummy", json!({ "clusterIP": "10.43.0.1", "ports": [{ "name": "http", "port": 8080 }, { "name": "admin", "port": 9000 }] }), json!({}));
    lab.0.endpoints.remove(&Key::new("lab", "dummy"));
    lab.slice("lab", "dummy", "http", 80, json!([{ "addresses": ["10.42.0.1"] }]));
    lab.slice("lab", "dummy", "admin", 9001, json!([{ "addresses": ["10.42.0.1"] }]));
    lab.service(
        "lab",
        "backup",
        json!({ "clusterIP": "10.43.0.2", "ports": [{ "name": "admin", "port": 1 }, { "name": "http", "port": 2 }] }),
        json!({}),
    );
    lab.0.endpoints.remove(&Key::new("lab", "backup"));
    lab.slice("lab", "backup", "http", 81, json!([{ "addresses": ["10.42.0.3"] }]));
    lab.slice("lab", "backup", "admin", 9002, json!([{ "addresses": ["10.42.0.3"] }]));
    let result = lab.only();
    assert_eq!(result.resolved, Ok(()));
    assert_eq!(result.ports.keys().copied().collect::<Vec<_>>(), [8080], "one state, under its first port");
    let service = &result.ports[&8080];
    assert_eq!(addresses(&service.primary), ["10.42.0.1:80"]);
    assert_eq!(addresses(&service.backups[0]), ["10.42.0.3:81"]);
    let admin = service.frontends.iter().find(|f| f.address.port() == 9000).unwrap();
    assert_eq!(service.reach(admin, "10.42.0.3:81".parse().unwrap()), "10.42.0.3:9002".parse().ok());
    // A port name in a check is translated to the pods' port number, for each tier separately.
    let port = |tier: &model::Tier| match &tier.check.as_ref().unwrap().action {
        model::CheckAction::HttpGet { port, .. } => *port,
        _ => None,
    };
    assert_eq!(port(&service.primary), Some(9001));
    assert_eq!(port(&service.backups[0]), Some(9002));
}

#[test]
fn the_older_one_wins_and_a_circuit_breaker_goes_before_annotations() {
    let mut lab = Lab::new();
    lab.breaker("young", 10, spec()).breaker("old", 100, spec());
    lab.service(
        "lab",
        "dummy",
        json!({ "clusterIP": "10.43.0.1", "ports": [{ "port": 8080 }] }),
        json!({ "breaker.dev/backup": "backup" }),
    );
    let resolution = lab.resolve();
    let names: Vec<(&str, bool)> =
        resolution.results.iter().map(|s| (s.owner.key.name.as_str(), s.accepted.is_ok())).collect();
    assert_eq!(names, [("old", true), ("young", false), ("dummy", false)]);
    let expected: Vec<String> = resolution.results[1..].iter().map(|s| refusal(s).1).collect();
    assert!(expected[0].contains("already protected by CircuitBreaker lab/old, which is older"), "{expected:?}");
    assert!(expected[1].contains("which takes precedence over annotations"), "{expected:?}");
}

#[test]
fn annotations_are_a_spec_too_and_a_bad_one_holds_what_is() {
    let annotated = |period: &str| {
        let mut lab = Lab::new();
        lab.service(
            "lab",
            "dummy",
            json!({ "clusterIP": "10.43.0.1", "ports": [{ "port": 8080 }] }),
            json!({ "breaker.dev/backup": "backup", "breaker.dev/check": "/ready", "breaker.dev/period-seconds": period }),
        );
        lab.only()
    };
    let good = annotated("3");
    assert_eq!(good.ports[&8080], Lab::new().with_breaker(spec()).only().ports[&8080]);
    for (bad, expected) in
        [("0", "annotation breaker.dev/period-seconds: 0 is not allowed; allowed: 1 to 86400"), ("soon", "\"soon\"")]
    {
        let result = annotated(bad);
        assert!(result.hold);
        let (reason, message) = refusal(&result);
        assert!(reason == "Invalid" && message.contains(expected), "{message}");
    }
}

#[test]
fn what_is_not_known_yet_changes_nothing() {
    let mut lab = Lab::new().with_breaker(spec());
    lab.0.endpoints.remove(&Key::new("lab", "backup"));
    let resolution = lab.resolve();
    assert!(resolution.results[0].hold && resolution.results[0].pending);
    assert!(resolution.wanted.contains(&Key::new("lab", "backup")));
}

#[test]
fn near_pods_come_first_if_asked() {
    let tiers = |topology: &str| -> Vec<(String, Vec<String>)> {
        let result = Lab::new().with_breaker(with(|s| s["topology"] = json!(topology))).only();
        result.ports[&8080].backups.iter().map(|tier| (tier.name.clone(), addresses(tier))).collect()
    };
    let row = |name: &str, address: &str| (name.to_owned(), vec![address.to_owned()]);
    assert_eq!(tiers("Any").len(), 1);
    assert_eq!(tiers("PreferSameNode"), [row("backup (same node)", "10.42.0.3:80"), row("backup", "10.42.1.3:80")]);
    assert_eq!(tiers("PreferSameZone"), [row("backup (same zone)", "10.42.0.3:80"), row("backup", "10.42.1.3:80")]);
}

/// TRIALS A8: a slice keeps the zone that the pod's Node had, whatever its label says now.
#[test]
fn zones_are_those_of_the_nodes() {
    let mut lab = Lab::new().with_breaker(with(|s| s["topology"] = json!("PreferSameZone")));
    let near = |lab: &Lab| {
        let result = lab.resolve().results.remove(0);
        (addresses(&result.ports[&8080].backups[0]), result.notes)
    };
    let zones = |of: &[(&str, &str)]| Some(of.iter().map(|(node, zone)| ((*node).into(), (*zone).into())).collect());
    assert!(lab.resolve().needs_zones);
    lab.0.node.zone = Some("b".into());
    let both = vec!["10.42.0.3:80".to_owned(), "10.42.1.3:80".to_owned()];
    assert_eq!(near(&lab), (both, vec![]), "not known yet: this Node's own label, and the slice's");
    lab.0.zones = zones(&[("node1", "c"), ("node2", "b")]);
    assert_eq!(near(&lab).0, ["10.42.1.3:80"]);
    lab.0.zones = zones(&[]);
    let (_, notes) = near(&lab);
    assert!(notes[0].contains("PreferSameZone has no effect on backup"), "{notes:?}");
}

#[test]
fn backups_of_one_priority_share_by_weight_whatever_the_number_of_their_pods() {
    let mut lab = Lab::new().with_breaker(with(|s| {
        s["backups"] = json!([{ "name": "backup", "weight": 1, "priority": 5 }, { "name": "spare", "weight": 3, "priority": 5 }, { "name": "last", "priority": 9 }]);
    }));
    lab.service("lab", "spare", json!({ "clusterIP": "10.43.0.3", "ports": [{ "port": 8080 }] }), json!({}));
    lab.slice("lab", "spare", "", 80, json!([{ "addresses": ["10.42.0.5"] }]));
    lab.service("lab", "last", json!({ "clusterIP": "10.43.0.4", "ports": [{ "port": 8080 }] }), json!({}));
    lab.slice("lab", "last", "", 80, json!([]));
    let result = lab.only();
    let service = &result.ports[&8080];
    let names: Vec<&str> = service.backups.iter().map(|tier| tier.name.as_str()).collect();
    assert_eq!(names, ["backup+spare", "last"]);
    let weights: Vec<u16> = service.backups[0].backends.iter().map(|b| b.weight).collect();
    // The two pods of `backup` share weight 1 and the only pod of `spare` has weight 3, so each of the two gets a
    // sixth of the third one's part.
    assert_eq!(weights, [166, 166, 1000]);
    assert!(service.backups[1].backends.is_empty(), "a backup without pods stays a tier");
}

#[test]
fn a_pod_of_the_primary_is_no_backup() {
    let mut lab = Lab::new().with_breaker(spec());
    lab.slice("lab", "backup", "", 80, json!([{ "addresses": ["10.42.0.1"] }]));
    let result = lab.only();
    assert_eq!(addresses(&result.ports[&8080].backups[0]), ["10.42.0.3:80", "10.42.1.3:80"]);
    assert!(result.notes.iter().any(|note| note.contains("not used as backup")), "{:?}", result.notes);
}

#[test]
fn pods_that_end_keep_their_connections() {
    let mut lab = Lab::new().with_breaker(spec());
    lab.slice(
        "lab",
        "backup",
        "",
        80,
        json!([{ "addresses": ["10.42.0.7"], "conditions": { "ready": false, "serving": true, "terminating": true } }]),
    );
    let tier = lab.only().ports[&8080].backups[0].clone();
    assert_eq!(addresses(&tier), ["10.42.0.3:80", "10.42.1.3:80"]);
    assert_eq!(tier.draining, ["10.42.0.7:80".parse().unwrap()]);
}

#[test]
fn an_override_ends_by_itself() {
    let forced = |until: i64| {
        with(|s| {
            s["override"] = json!("ForceOpen");
            s["until"] = json!(Timestamp::from_second(NOW + until).unwrap().to_string());
        })
    };
    let resolution = Lab::new().with_breaker(forced(60)).resolve();
    assert_eq!(resolution.results[0].ports[&8080].override_, model::Override::ForceOpen);
    assert_eq!(resolution.next, Some(Timestamp::from_second(NOW + 60).unwrap()));
    let resolution = Lab::new().with_breaker(forced(0)).resolve();
    assert_eq!(resolution.results[0].ports[&8080].override_, model::Override::Auto);
    assert_eq!(resolution.next, None);
}

/// TRIALS J6: annotations, which no manifest owns, force a breaker until they end.
#[test]
fn annotations_of_a_breaker_override_its_spec() {
    let of = |until: i64| {
        let mut lab = Lab::new().with_breaker(spec());
        let until = Timestamp::from_second(NOW + until).unwrap().to_string();
        let breaker = Arc::make_mut(&mut lab.0.breakers[0]).0.as_mut().unwrap();
        let annotations = [("breaker.dev/override", "ForceOpen"), ("breaker.dev/until", &until)];
        breaker.annotations_mut().extend(annotations.map(|(name, text)| (name.to_owned(), text.to_owned())));
        let resolution = lab.resolve();
        (resolution.results[0].ports[&8080].override_, resolution.next)
    };
    assert_eq!(of(60), (model::Override::ForceOpen, Some(Timestamp::from_second(NOW + 60).unwrap())));
    assert_eq!(of(0), (model::Override::Auto, None));
    let mut lab = Lab::new().with_breaker(spec());
    let breaker = Arc::make_mut(&mut lab.0.breakers[0]).0.as_mut().unwrap();
    breaker.annotations_mut().insert("breaker.dev/override".into(), "open".into());
    let result = lab.only();
    assert!(result.accepted.is_ok() && result.ports[&8080].override_ == model::Override::Auto);
    assert!(
        result.notes.iter().any(|n| n.contains("breaker.dev/override: \"open\" is not allowed")),
        "{:?}",
        result.notes
    );
}

/// HARDENING S2: an address belongs to its Service, whatever other Services say.
#[test]
fn an_address_belongs_to_its_service() {
    // The victim is protected by annotations, or not at all; the other one by an older CircuitBreaker.
    let annotated = json!({ "breaker.dev/backup": "backup", "breaker.dev/override": "ForceClosed" });
    for annotations in [json!({}), annotated] {
        let mut lab = Lab::new();
        lab.0.frontends.external_ips = true;
        let victim = json!({ "clusterIP": "10.43.0.10", "ports": [{ "port": 8080 }] });
        lab.service("victim", "dns", victim, annotations.clone());
        lab.service("victim", "backup", json!({ "clusterIP": "10.43.0.11", "ports": [{ "port": 8080 }] }), json!({}));
        for service in ["dns", "backup"] {
            lab.slice("victim", service, "", 80, json!([{ "addresses": ["10.42.0.9"] }]));
        }
        let taken = ["10.43.0.10", "192.0.2.1", "127.0.0.1", "224.0.0.1", "198.51.100.7"];
        let other = json!({ "clusterIP": "10.43.0.5", "externalIPs": taken, "ports": [{ "port": 8080 }] });
        lab.service("lab", "other", other, json!({}));
        lab.slice("lab", "other", "", 80, json!([{ "addresses": ["10.42.0.6"] }]));
        lab.breaker("other", 50, with(|s| s["service"]["name"] = json!("other")));
        let resolution = lab.resolve();
        let result = &resolution.results[0];
        assert_eq!(frontends(&result.ports[&8080]), ["10.43.0.5:8080", "198.51.100.7:8080"]);
        assert_eq!(refusal(result).0, "FrontendNotOwned");
        if annotations.as_object().is_some_and(|annotations| !annotations.is_empty()) {
            assert_eq!(frontends(&resolution.results[1].ports[&8080]), ["10.43.0.10:8080"]);
        }
        lab.0.frontends.external_ips = false;
        let result = &lab.resolve().results[0];
        assert_eq!(frontends(&result.ports[&8080]), ["10.43.0.5:8080"]);
        assert!(result.notes[0].contains("agent.externalIPs"), "{:?}", result.notes);
    }
}

/// HARDENING S2: who does nothing with a frontend takes it from nobody.
#[test]
fn a_frontend_belongs_to_one_service_and_a_node_has_room_for_so_many() {
    let mut lab = Lab::new().with_breaker(with(|s| s["mode"] = json!("DryRun")));
    lab.0.frontends.external_ips = true;
    for (name, ip) in [("dummy", "10.43.0.1"), ("other", "10.43.0.5")] {
        let spec = json!({ "clusterIP": ip, "externalIPs": ["198.51.100.7"], "ports": [{ "port": 8080 }] });
        lab.service("lab", name, spec, json!({}));
    }
    lab.slice("lab", "other", "", 80, json!([{ "addresses": ["10.42.0.6"] }]));
    lab.breaker("other", 50, with(|s| s["service"]["name"] = json!("other")));
    let of = |resolution: &Resolution| -> Vec<Vec<String>> {
        resolution
            .results
            .iter()
            .map(|result| result.ports.values().flat_map(|service| frontends(service)).collect())
            .collect()
    };
    let resolution = lab.resolve();
    assert_eq!(of(&resolution), [vec!["10.43.0.1:8080"], vec!["10.43.0.5:8080", "198.51.100.7:8080"]]);
    assert!(resolution.results[0].notes[0].contains("198.51.100.7:8080"), "{:?}", resolution.results[0].notes);
    let full = resolve(&lab.0, &mut Policies::default(), &mut LastValidSpecs::new(), now(), 1);
    assert!(full.results[0].accepted.is_ok());
    assert_eq!(refusal(&full.results[1]).0, "TooMany");
    assert_eq!(of(&full), [vec!["10.43.0.1:8080", "198.51.100.7:8080"], vec![]]);
}

#[test]
fn names_fit_and_differ() {
    let long = "n".repeat(63);
    let (a, b) = (
        engine_name(&Key::new(&long, &"s".repeat(63)), 65535, false),
        engine_name(&Key::new(&long, &format!("{}t", "s".repeat(62))), 65535, false),
    );
    assert!(a.as_str().len() < breaker_common::NAME_LEN && a != b, "{a} {b}");
    assert_eq!(engine_name(&Key::new("lab", "dummy"), 8080, false).as_str(), "lab/dummy:8080");
}

#[test]
fn a_wrong_spec_leaves_the_last_good_one_in_force_on_the_pods_of_now() {
    let annotated = |lab: &mut Lab, check: &str| {
        lab.service(
            "lab",
            "dummy",
            json!({ "clusterIP": "10.43.0.1", "ports": [{ "port": 8080 }] }),
            json!({ "breaker.dev/backup": "backup", "breaker.dev/check": check }),
        );
    };
    let mut good = LastValidSpecs::new();
    let mut lab = Lab::new();
    annotated(&mut lab, "/ready");
    let first = resolve(&lab.0, &mut Policies::default(), &mut good, now(), 1000);
    annotated(&mut lab, "ready");
    lab.0.endpoints.insert(Key::new("lab", "dummy"), Vec::new());
    lab.slice("lab", "dummy", "", 80, json!([{ "addresses": ["10.42.0.8"] }]));
    for _ in 0..2 {
        let second = resolve(&lab.0, &mut Policies::default(), &mut good, now(), 1000);
        let result = &second.results[0];
        assert!(result.hold && result.accepted.is_err() && !result.pending);
        assert_eq!(addresses(&result.ports[&8080].primary), ["10.42.0.8:80"]);
        assert_eq!(result.ports[&8080].primary.check, first.results[0].ports[&8080].primary.check);
        assert_eq!(second.wanted, first.wanted);
    }
}

#[test]
fn a_service_without_pods_keeps_its_protection_also_with_a_named_port() {
    let mut lab = Lab::new().with_breaker(with(|s| s["check"]["httpGet"]["port"] = json!("admin")));
    for name in ["dummy", "backup"] {
        lab.0.endpoints.remove(&Key::new("lab", name));
        lab.slice("lab", name, "", 80, json!([]));
    }
    let result = lab.only();
    assert_eq!(result.resolved, Ok(()));
    assert!(result.ports[&8080].primary.backends.is_empty(), "the primary has no backend, which opens the breaker");
}

#[test]
fn a_port_that_cannot_be_backed_up_leaves_the_others_alone() {
    let mut lab = Lab::new().with_breaker(spec());
    lab.service(
        "lab",
        "dummy",
        json!({ "clusterIP": "10.43.0.1", "ports": [{ "name": "odd", "port": 1 }, { "name": "http", "port": 8080 }] }),
        json!({}),
    );
    lab.slice("lab", "dummy", "http", 80, json!([{ "addresses": ["10.42.0.1"] }]));
    lab.service(
        "lab",
        "backup",
        json!({ "clusterIP": "10.43.0.2", "ports": [{ "name": "a", "port": 2 }, { "name": "http", "port": 3 }] }),
        json!({}),
    );
    lab.slice("lab", "backup", "http", 80, json!([{ "addresses": ["10.42.0.3"] }]));
    let result = lab.only();
    assert_eq!(refusal(&result).0, "PortNotFound");
    assert_eq!(result.ports.keys().copied().collect::<Vec<_>>(), [8080]);
}

#[test]
fn a_load_balancer_with_source_ranges_is_left_to_netfilter() {
    let mut lab = Lab::new().with_breaker(spec());
    lab.service(
        "lab",
        "dummy",
        json!({ "clusterIP": "10.43.0.1", "loadBalancerSourceRanges": ["192.0.2.0/24"], "ports": [{ "port": 8080 }] }),
        json!({}),
    );
    let key = Key::new("lab", "dummy");
    let mut service = (*lab.0.services[&key]).clone();
    service.status =
        serde_json::from_value(json!({ "loadBalancer": { "ingress": [{ "ip": "203.0.113.9" }] } })).unwrap();
    lab.0.services.insert(key, Arc::new(service));
    let result = lab.only();
    assert_eq!(frontends(&result.ports[&8080]), ["10.43.0.1:8080"]);
    assert!(result.notes.iter().any(|note| note.contains("loadBalancerSourceRanges")), "{:?}", result.notes);
}

#[test]
fn external_traffic_policy_local_is_about_the_ways_in_from_outside() {
    let mut lab = Lab::new().with_breaker(spec());
    lab.0.frontends.external_ips = true;
    lab.service(
        "lab",
        "dummy",
        json!({ "clusterIP": "10.43.0.1", "externalTrafficPolicy": "Local", "externalIPs": ["198.51.100.7"],
                "ports": [{ "port": 8080, "nodePort": 30080 }] }),
        json!({}),
    );
    let result = lab.only();
    let inside = &result.ports[&8080];
    assert_eq!((frontends(inside), inside.keep_client.frontends.len()), (vec!["10.43.0.1:8080".to_owned()], 0));
    let service = &result.outside[&8080];
    assert_eq!(service.name.as_str(), "lab/dummy:8080/outside");
    assert_eq!(frontends(service), ["192.0.2.1:30080", "198.51.100.7:8080"]);
    assert_eq!(service.keep_client.frontends, service.frontends.iter().copied().collect());
    let here: Vec<String> = service.keep_client.backends.iter().map(ToString::to_string).collect();
    assert_eq!(here, ["10.42.0.3:80"], "the backup's pod on this node");
    assert!(result.notes.iter().any(|note| note.contains("externalTrafficPolicy")), "{:?}", result.notes);
}

/// TRIALS A2: the breaker judges the endpoints that kube-proxy uses on this node, for each way in.
#[test]
fn the_endpoints_that_kube_proxy_uses_here_decide() {
    let endpoint = |address: &str, node: &str| json!({ "addresses": [address], "nodeName": node, "zone": "a", "hints": { "forNodes": [{ "name": node }] } });
    let of = |spec: Value, nodes: [&str; 2]| {
        let mut lab = Lab::new().with_breaker(self::spec());
        let mut service = json!({ "clusterIP": "10.43.0.1", "ports": [{ "port": 8080, "nodePort": 30080 }] });
        service.as_object_mut().unwrap().extend(spec.as_object().unwrap().clone());
        lab.service("lab", "dummy", service, json!({}));
        lab.0.endpoints.remove(&Key::new("lab", "dummy"));
        let [first, second] = nodes;
        lab.slice("lab", "dummy", "", 80, json!([endpoint("10.42.0.1", first), endpoint("10.42.0.2", second)]));
        let result = lab.only();
        let primary =
            |services: &BTreeMap<i32, Arc<model::Service>>| services.get(&8080).map(|s| addresses(&s.primary));
        (primary(&result.ports), primary(&result.outside))
    };
    let both = || Some(vec!["10.42.0.1:80".to_owned(), "10.42.0.2:80".to_owned()]);
    let first = || Some(vec!["10.42.0.1:80".to_owned()]);
    let nobody = || Some(Vec::new());
    // Hints for this node, as trafficDistribution: PreferSameNode makes them.
    assert_eq!(of(json!({}), ["node1", "node2"]), (first(), None));
    assert_eq!(of(json!({}), ["node2", "node3"]), (both(), None));
    let [inside, outside] = ["internalTrafficPolicy", "externalTrafficPolicy"].map(|policy| json!({ policy: "Local" }));
    assert_eq!(of(inside.clone(), ["node1", "node2"]), (first(), first()));
    assert_eq!(of(inside, ["node2", "node3"]), (nobody(), both()), "clients of this node time out");
    assert_eq!(of(outside.clone(), ["node1", "node2"]), (first(), first()));
    assert_eq!(of(outside, ["node2", "node3"]), (both(), both()), "nobody is sent to this node");
}

/// TRIALS A1: a named port may have another number at each pod, for example during a rollout.
#[test]
fn each_pod_is_checked_at_its_own_port() {
    let mut lab = Lab::new().with_breaker(with(|s| s["check"]["httpGet"]["port"] = json!("admin")));
    lab.0.endpoints.clear();
    for service in ["dummy", "backup"] {
        for (number, admin) in [(1, 9001), (2, 9002)] {
            let slice: EndpointSlice = serde_json::from_value(json!({
                "metadata": { "namespace": "lab", "name": format!("{service}-{number}") }, "addressType": "IPv4",
                "ports": [{ "name": "", "port": 80 }, { "name": "admin", "port": admin }],
                "endpoints": [{ "addresses": [format!("10.42.{}.{number}", service.len())] }],
            }))
            .unwrap();
            lab.0.endpoints.entry(Key::new("lab", service)).or_default().push(Arc::new(slice));
        }
    }
    let ports = |result: &ResolvedBreaker| -> Vec<Option<u16>> {
        let service = &result.ports[&8080];
        let tiers = service.tiers().flat_map(|tier| tier.backends.iter().map(move |b| tier.check_of(b.address)));
        tiers
            .map(|check| match check.unwrap().action {
                model::CheckAction::HttpGet { port, .. } => port,
                _ => None,
            })
            .collect()
    };
    let expected = [9001, 9002, 9001, 9002].map(Some);
    assert_eq!(ports(&lab.only()), expected);
    let first = lab.only().ports;
    lab.0.endpoints.values_mut().for_each(|slices| slices.reverse());
    assert_eq!(lab.only().ports, first, "the order of slices");
}

/// TRIALS A4: what kube-proxy does not serve is no frontend.
#[test]
fn node_ports_are_where_kube_proxy_has_them() {
    let mut lab = Lab::new().with_breaker(spec());
    lab.0.node.addresses = ["192.0.2.1", "198.51.100.1", "fd00::1"].map(|ip| ip.parse().unwrap()).into();
    let service = json!({ "clusterIP": "10.43.0.1", "ports": [{ "port": 8080, "nodePort": 30080 }] });
    lab.service("lab", "dummy", service, json!({}));
    let of = |lab: &Lab| frontends(&lab.only().ports[&8080]);
    let everywhere = ["10.43.0.1:8080", "192.0.2.1:30080", "198.51.100.1:30080"];
    assert_eq!(of(&lab), everywhere, "the Service has no IPv6");
    for (primary, networks, expected) in [
        (true, vec![], &["10.43.0.1:8080", "192.0.2.1:30080"][..]),
        (false, vec!["198.51.100.0/24"], &["10.43.0.1:8080", "198.51.100.1:30080"]),
        (true, vec!["198.51.100.0/24"], &everywhere),
        (false, vec!["203.0.113.0/24"], &["10.43.0.1:8080"]),
    ] {
        let networks = networks.into_iter().map(|network| network.parse().unwrap()).collect();
        lab.0.frontends.node_ports = config::NodePortAddresses { primary, networks };
        assert_eq!(of(&lab), expected);
    }
}

/// TRIALS A9, A11: what does not follow from the spec alone is said.
#[test]
fn what_a_service_or_a_date_takes_back_is_noted() {
    let notes = |service: Value, spec: Value| {
        let mut lab = Lab::new().with_breaker(spec);
        let mut all = json!({ "clusterIP": "10.43.0.1", "ports": [{ "port": 8080 }] });
        all.as_object_mut().unwrap().extend(service.as_object().unwrap().clone());
        lab.service("lab", "dummy", all, json!({})).only().notes.join("; ")
    };
    let no_check = with(|s| drop(s.as_object_mut().unwrap().remove("check")));
    assert!(notes(json!({ "publishNotReadyAddresses": true }), no_check).contains("publishNotReadyAddresses"));
    assert_eq!(notes(json!({ "publishNotReadyAddresses": true }), spec()), "");
    assert!(notes(json!({ "healthCheckNodePort": 30999 }), spec()).contains("healthCheckNodePort 30999"));
    let ended = with(|s| {
        s["override"] = json!("ForceOpen");
        s["until"] = json!("2020-01-01T00:00:00Z");
    });
    assert_eq!(notes(json!({}), ended), "until: the override has ended at 2020-01-01T00:00:00Z");
    let port = with(|s| s["service"]["ports"] = json!(["8080"]));
    assert_eq!(Lab::new().with_breaker(port).only().resolved, Ok(()), "digits are a number");
}

/// TRIALS A5: the address of a pod that has ended may be the backup's by now.
#[test]
fn a_pod_that_has_ended_hides_no_backup() {
    let mut lab = Lab::new().with_breaker(spec());
    lab.slice(
        "lab",
        "dummy",
        "",
        80,
        json!([{ "addresses": ["10.42.0.3"], "conditions": { "ready": false, "serving": false, "terminating": true } }]),
    );
    let result = lab.only();
    assert_eq!(addresses(&result.ports[&8080].backups[0]), ["10.42.0.3:80", "10.42.1.3:80"]);
    assert_eq!(addresses(&result.ports[&8080].primary), ["10.42.0.1:80", "10.42.0.2:80"]);
}

/// TRIALS A6: the slices follow a renamed port after a moment.
#[test]
fn a_renamed_port_is_no_failure_of_its_pods() {
    let mut lab = Lab::new().with_breaker(spec());
    let mut held = Held::default();
    let mut at = |lab: &Lab, seconds: i64| {
        let mut results = lab.resolve().results;
        let now = now().checked_add(SignedDuration::from_secs(seconds)).unwrap();
        let next = held.apply(&mut results, now).map(|next| next.duration_since(now).as_secs());
        (results[0].ports.get(&8080).map(|service| service.primary.backends.len()), results[0].hold, next)
    };
    assert_eq!(at(&lab, 0), (Some(2), false, None));
    let renamed = json!({ "clusterIP": "10.43.0.1", "ports": [{ "name": "web", "port": 8080 }] });
    lab.service("lab", "dummy", renamed, json!({}));
    assert_eq!(at(&lab, 1), (Some(2), true, Some(10)));
    assert_eq!(at(&lab, 9), (Some(2), true, Some(2)));
    assert_eq!(at(&lab, 11), (Some(0), false, None), "it was not a moment");
    lab.slice("lab", "dummy", "web", 80, json!([{ "addresses": ["10.42.0.1"] }]));
    assert_eq!(at(&lab, 12), (Some(1), false, None));
}

#[test]
fn the_fast_path_says_what_it_leaves_out() {
    let result = Lab::new().with_breaker(with(|spec| spec["fastPath"] = json!("PeerRedirect"))).only();
    assert_eq!(result.ports[&8080].fast_path, model::FastPath::PeerRedirect);
    assert!(result.notes.iter().any(|note| note.contains("NetworkPolicies")), "{:?}", result.notes);
}

#[test]
fn a_network_policy_that_keeps_clients_from_the_backup_is_told() {
    let mut lab = Lab::new().with_breaker(spec());
    for name in ["dummy", "backup"] {
        let key = Key::new("lab", name);
        let mut service = (*lab.0.services[&key]).clone();
        service.spec.selector = [("app".to_owned(), name.to_owned())].into();
        lab.0.services.insert(key, Arc::new(service));
    }
    assert_eq!(lab.only().reachable, Ok(()));
    let policy = json!({
        "metadata": { "namespace": "lab", "name": "closed" },
        "spec": { "podSelector": { "matchLabels": { "app": "backup" } }, "policyTypes": ["Ingress"] },
    });
    lab.0.policies =
        crate::source::kube::network_policy::by_namespace(vec![Arc::new(serde_json::from_value(policy).unwrap())]);
    let result = lab.only();
    let refusal = result.reachable.unwrap_err();
    assert!(refusal.reason == "NetworkPolicy" && refusal.message.contains("lab/closed"), "{refusal:?}");
    // The result is only a warning, because not everything about policies is known: the Service stays protected.
    assert!(result.accepted.is_ok() && !result.ports.is_empty());
}
