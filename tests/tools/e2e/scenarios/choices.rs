//! Compares what breaker believes of kube-proxy with the rules that kube-proxy writes, over random Services.

use std::{collections::BTreeMap, fmt::Write as _, sync::Arc, time::Duration};

use anyhow::{Context as _, Result, bail, ensure};
use breaker_agent::source::kube::{
    endpoints::{Endpoints, Family},
    kube_proxy::{Choice, KubeProxy, Place, Policies, Way},
    objects::EndpointSlice,
};
use fastrand::Rng;
use serde_json::{Value, json};

use crate::{
    cluster::{Cluster, NAMESPACE},
    kube_proxy_rules::{Observed, Rules, ServicePort},
    wait_for,
};

/// Number of random Services.
const SERVICES: usize = 250;
/// Seed of the random Services: the same ones in every run.
const SEED: u64 = 17;
/// Label of everything that the scenario makes.
const LABEL: &str = "e2e=choices";
const ZONE: &str = "topology.kubernetes.io/zone";
const FAMILIES: [(Family, &str, &str); 2] =
    [(Family::V4, "iptables-save", "ip"), (Family::V6, "ip6tables-save", "ip6")];

pub(super) fn kube_proxy_choices(cluster: &Cluster) -> Result<String> {
    let zones = ["a", "b"];
    for (node, zone) in cluster.nodes.iter().zip(zones.into_iter().cycle()) {
        cluster.kubectl(&["label", "node", node, &format!("{ZONE}={zone}"), "--overwrite"])?;
    }
    let outcome = compare(cluster);
    let _ = cluster.lab(&["delete", "services,endpointslices", "-l", LABEL, "--wait=false"]);
    for node in &cluster.nodes {
        let _ = cluster.kubectl(&["label", "node", node, &format!("{ZONE}-")]);
    }
    outcome
}

fn compare(cluster: &Cluster) -> Result<String> {
    let mut random = Rng::with_seed(SEED);
    let items: Vec<Value> = (0..SERVICES).flat_map(|number| service(&mut random, &cluster.nodes, number)).collect();
    cluster.feed(
        &["-n", NAMESPACE, "create", "-f", "-"],
        &json!({ "apiVersion": "v1", "kind": "List", "items": items }).to_string(),
    )?;
    let services = cluster.get(NAMESPACE, "services", LABEL)?;
    let slices = slices(&cluster.get(NAMESPACE, "endpointslices", LABEL)?)?;
    let nodes = cluster.get("", "nodes", "")?;
    wait_for("the rules of every kube-proxy to be as expected", Duration::from_secs(60), || {
        let mut compared = 0;
        let mut differences = String::new();
        for node in list(&nodes) {
            let name = node["metadata"]["name"].as_str().context("a Node without a name")?;
            let version = node["status"]["nodeInfo"]["kubeletVersion"].as_str().unwrap_or_default();
            let place = Place { node: name, zone: node["metadata"]["labels"][ZONE].as_str() };
            for (family, save, table) in FAMILIES {
                let rules = rules(cluster, name, save, table)?;
                for service in list(&services) {
                    let proxy = KubeProxy::of_version(version, false);
                    compared += compare_service(service, &slices, family, place, proxy, &rules, &mut differences)?;
                }
            }
        }
        ensure!(differences.is_empty(), "{} of {compared} differ:\n{differences}", differences.lines().count());
        Ok(Some(format!("{compared} decisions for {SERVICES} Services on {} nodes", cluster.nodes.len())))
    })
}

/// Compares the decisions about one Service on one node. Returns their number; differences are added to the text.
fn compare_service(
    service: &Value,
    slices: &BTreeMap<String, Vec<Arc<EndpointSlice>>>,
    family: Family,
    place: Place<'_>,
    proxy: KubeProxy,
    rules: &Rules,
    differences: &mut String,
) -> Result<usize> {
    let name = service["metadata"]["name"].as_str().context("a Service without a name")?;
    let spec = &service["spec"];
    let ips = spec["clusterIPs"].as_array().into_iter().flatten().filter_map(|ip| ip.as_str()?.parse().ok());
    let is_v4 = family == Family::V4;
    let Some(cluster_ip) = ips.into_iter().find(|ip: &std::net::IpAddr| ip.is_ipv4() == is_v4) else { return Ok(0) };
    let port = &spec["ports"][0];
    let number = |field: &str| port[field].as_u64().and_then(|number| u16::try_from(number).ok());
    let to = ServicePort { cluster_ip, port: number("port").context("a port")?, node_port: number("nodePort") };
    let policies = Policies {
        internal_local: spec["internalTrafficPolicy"] == "Local",
        external_local: spec["externalTrafficPolicy"] == "Local",
        external: to.node_port.is_some(),
    };
    let of_service = slices.get(name).map(Vec::as_slice).unwrap_or_default();
    let endpoints = Endpoints::of(of_service, Some("web"), "TCP", family, proxy.twice(place.node));
    let choice = Choice::of(&endpoints, place, policies, proxy);
    let ways: &[Way] =
        if policies.external { &[Way::ClusterIp, Way::FromOutside, Way::FromThisNode] } else { &[Way::ClusterIp] };
    for way in ways {
        let (expected, observed) = (Observed::from(&choice.target(*way)), rules.target(*way, to));
        if expected != observed {
            writeln!(
                differences,
                "{name} on {} {family:?} {way:?}: expected {expected:?}, the rules say {observed:?}",
                place.node
            )?;
        }
    }
    Ok(ways.len())
}

fn list(objects: &Value) -> &[Value] {
    objects["items"].as_array().map(Vec::as_slice).unwrap_or_default()
}

/// EndpointSlices by Service.
fn slices(found: &Value) -> Result<BTreeMap<String, Vec<Arc<EndpointSlice>>>> {
    let mut slices: BTreeMap<String, Vec<Arc<EndpointSlice>>> = BTreeMap::new();
    for slice in list(found) {
        let service = slice["metadata"]["labels"]["kubernetes.io/service-name"].as_str().context("no Service")?;
        slices.entry(service.to_owned()).or_default().push(Arc::new(serde_json::from_value(slice.clone())?));
    }
    Ok(slices)
}

/// The rules of kube-proxy on a node, in whichever mode it runs.
fn rules(cluster: &Cluster, node: &str, save: &str, table: &str) -> Result<Rules> {
    let nftables = cluster.on_node(node, &format!("nft list table {table} kube-proxy 2>/dev/null || true"))?;
    if !nftables.is_empty() {
        return Ok(Rules::of_nftables(&nftables));
    }
    let text = cluster.on_node(node, save)?;
    if !text.contains("KUBE-SERVICES") {
        bail!("{node} has no rules of kube-proxy");
    }
    Ok(Rules::of_iptables(&text))
}

/// A random Service with its EndpointSlices.
fn service(random: &mut Rng, nodes: &[String], number: usize) -> Vec<Value> {
    let name = format!("choice-{number}");
    let labels = json!({ "e2e": "choices", "kubernetes.io/service-name": name });
    let local = |random: &mut Rng| if random.u8(..10) < 4 { "Local" } else { "Cluster" };
    let family_policy = ["SingleStack", "PreferDualStack", "PreferDualStack"][random.usize(..3)];
    let mut spec = json!({
        "type": "ClusterIP",
        "ports": [{ "name": "web", "port": 80 }],
        "ipFamilyPolicy": family_policy,
        "internalTrafficPolicy": local(random),
        "publishNotReadyAddresses": random.u8(..10) == 0,
        "sessionAffinity": if random.u8(..10) < 2 { "ClientIP" } else { "None" },
    });
    if random.bool() {
        spec["type"] = "NodePort".into();
        spec["externalTrafficPolicy"] = local(random).into();
    }
    if random.bool() {
        spec["trafficDistribution"] = ["PreferClose", "PreferSameZone", "PreferSameNode"][random.usize(..3)].into();
    }
    let mut items = vec![json!({
        "apiVersion": "v1", "kind": "Service",
        "metadata": { "name": name, "labels": { "e2e": "choices" } }, "spec": spec,
    })];
    // Hints count only if every ready endpoint has one, so most Services have them everywhere or nowhere.
    let hints = random.u8(..4);
    for (kind, prefix) in [("IPv4", "10.42.200."), ("IPv6", "fd42:0:0:200::")] {
        for part in 0..random.usize(..3) {
            let endpoints: Vec<Value> =
                (0..random.usize(1..5)).map(|_| endpoint(random, nodes, prefix, hints)).collect();
            // Kubernetes refuses an address that a slice has twice.
            let mut seen = Vec::new();
            let endpoints: Vec<Value> = endpoints
                .into_iter()
                .filter(|endpoint| {
                    let fresh = !seen.contains(&endpoint["addresses"]);
                    seen.push(endpoint["addresses"].clone());
                    fresh
                })
                .collect();
            let port = if random.u8(..10) == 0 { "other" } else { "web" };
            items.push(json!({
                "apiVersion": "discovery.k8s.io/v1", "kind": "EndpointSlice", "addressType": kind,
                "metadata": { "name": format!("{name}-{}-{part}", kind.to_lowercase()), "labels": labels },
                "ports": [{ "name": port, "port": 8000 + part, "protocol": "TCP" }],
                "endpoints": endpoints,
            }));
        }
    }
    items
}

/// A random endpoint. `hints`: 0 and 1 = none, 2 = for zones, 3 = for nodes and zones, now and then missing.
fn endpoint(random: &mut Rng, nodes: &[String], prefix: &str, hints: u8) -> Value {
    let node = random.choice(nodes).cloned().unwrap_or_default();
    let conditions = match random.u8(..8) {
        0 => json!({ "ready": false, "serving": true, "terminating": true }),
        1 => json!({ "ready": false, "serving": false, "terminating": true }),
        2 => json!({ "ready": false, "serving": false, "terminating": false }),
        3 => json!({}),
        _ => json!({ "ready": true, "serving": true, "terminating": false }),
    };
    let mut endpoint = json!({ "addresses": [format!("{prefix}{}", random.u8(1..30))], "conditions": conditions });
    if random.u8(..10) > 0 {
        endpoint["nodeName"] = node.as_str().into();
        endpoint["zone"] = ["a", "b"][random.usize(..2)].into();
    }
    if hints >= 2 && random.u8(..12) > 0 {
        let zone = ["a", "b", "c"][random.usize(..3)];
        endpoint["hints"] = json!({ "forZones": [{ "name": zone }] });
        if hints == 3 {
            endpoint["hints"]["forNodes"] = json!([{ "name": node }]);
        }
    }
    endpoint
}
