//! What cannot be reached while the breaker is closed cannot be reached while it is open, and the other way round.

use std::collections::BTreeMap;

use anyhow::{Context as _, Result, ensure};
use serde_json::{Value, json};

use crate::cluster::{Cluster, NAMESPACE};

/// Places to ask from.
const FROM: [&str; 3] = ["client", "host", "lan"];
/// Port of the Services.
const PORT: u64 = 8080;

/// Services whose frontends are of every kind: name, and the part of the spec that differs.
fn services() -> [(&'static str, Value); 3] {
    [
        ("matrix-v4", json!({ "type": "NodePort", "ipFamilyPolicy": "SingleStack" })),
        (
            "matrix-dual",
            json!({ "type": "NodePort", "ipFamilyPolicy": "PreferDualStack", "externalIPs": ["192.0.2.77"] }),
        ),
        (
            "matrix-local",
            json!({ "type": "LoadBalancer", "ipFamilyPolicy": "PreferDualStack", "externalTrafficPolicy": "Local" }),
        ),
    ]
}

pub(super) fn opening_widens_nothing(cluster: &Cluster) -> Result<String> {
    for (name, extra) in services() {
        let mut service = json!({
            "apiVersion": "v1", "kind": "Service", "metadata": { "name": name },
            "spec": { "selector": { "app": "dummy-deployment" }, "ports": [{ "port": PORT, "targetPort": 80 }] },
        });
        merge(&mut service["spec"], &extra);
        cluster.apply(&service.to_string())?;
        cluster.apply(&breaker(name, "Auto").to_string())?;
    }
    let mut asked = 0;
    for (name, _) in services() {
        cluster.wait_programmed(name)?;
        let targets = targets(cluster, name)?;
        let closed = reachable(cluster, &targets)?;
        cluster.apply(&breaker(name, "ForceOpen").to_string())?;
        cluster.wait_programmed(name)?;
        cluster.wait_state(name, "Open")?;
        let open = reachable(cluster, &targets)?;
        let differ: Vec<String> = closed
            .iter()
            .filter(|(key, reached)| open.get(*key) != Some(reached))
            .map(|(key, reached)| format!("{key}: {}", if *reached { "closed only" } else { "open only" }))
            .collect();
        ensure!(differ.is_empty(), "{name}:\n{}", differ.join("\n"));
        let reached = closed.values().filter(|reached| **reached).count();
        ensure!(reached > 0 && reached < closed.len(), "{name}: {reached} of {} are reached", closed.len());
        asked += closed.len();
    }
    for (name, _) in services() {
        cluster.lab(&["delete", &format!("cb/{name}"), &format!("svc/{name}")])?;
    }
    Ok(format!("{asked} pairs of client and address: the same closed and open"))
}

fn merge(into: &mut Value, from: &Value) {
    for (key, value) in from.as_object().into_iter().flatten() {
        into[key] = value.clone();
    }
}

fn breaker(service: &str, override_: &str) -> Value {
    json!({
        "apiVersion": "breaker.dev/v1alpha1", "kind": "CircuitBreaker", "metadata": { "name": service },
        "spec": {
            "service": { "name": service }, "backups": [{ "name": "backup-deployment" }],
            "check": { "httpGet": { "path": "/ready" } }, "override": override_,
        },
    })
}

/// Addresses and ports that may be frontends, or that must not be.
fn targets(cluster: &Cluster, name: &str) -> Result<Vec<String>> {
    let service = cluster.get(NAMESPACE, &format!("svc/{name}"), "")?;
    let texts = |value: &Value| -> Vec<String> {
        value.as_array().into_iter().flatten().filter_map(|text| Some(text.as_str()?.to_owned())).collect()
    };
    let node_port = service["spec"]["ports"][0]["nodePort"].as_u64().context("a node port")?;
    let mut targets = Vec::new();
    for ip in texts(&service["spec"]["clusterIPs"]) {
        targets.extend([(ip.clone(), PORT), (ip.clone(), PORT + 1), (ip, node_port)]);
    }
    targets.extend(texts(&service["spec"]["externalIPs"]).into_iter().map(|ip| (ip, PORT)));
    for (_, ips) in cluster.node_addresses()? {
        targets.extend(ips.into_iter().map(|ip| (ip, node_port)));
    }
    // Addresses of the clients' node that are not in its Node object. (The other node takes its neighbor's packets to such
    // an address for those of a pod, and half of them are answered past it.)
    targets.extend(["10.42.1.1", "fd42:0:0:1::1", "127.0.0.1"].map(|ip| (ip.to_owned(), node_port)));
    Ok(targets
        .into_iter()
        .map(
            |(ip, port)| {
                if ip.contains(':') { format!("http://[{ip}]:{port}/") } else { format!("http://{ip}:{port}/") }
            },
        )
        .collect())
}

/// Whether each place reaches each address.
fn reachable(cluster: &Cluster, targets: &[String]) -> Result<BTreeMap<String, bool>> {
    let mut found = BTreeMap::new();
    for from in FROM {
        for url in targets {
            let asked = match from {
                "lan" => cluster.ask_from_lan(&format!("-g '{url}'")),
                pod => cluster.lab(&["exec", pod, "--", "/dummy-service", "ask", "--timeout-millis", "1500", url]),
            };
            found.insert(format!("{from} to {url}"), asked.is_ok_and(|answer| answer.contains("SOMERESPONSE")));
        }
    }
    Ok(found)
}
