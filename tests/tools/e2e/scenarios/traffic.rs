//! Scenarios of traffic: clients everywhere, families, protocols, paths.

use std::time::Duration;

use anyhow::{Context as _, Result, bail, ensure};
use serde_json::json;

use super::{answered_by, ips, vip};
use crate::{
    cluster::{Cluster, NAMESPACE, SYSTEM},
    load::{Load, now},
    wait_for,
};

/// Failover and return with the check settings of NGINX Plus: from a pod, from the node through the load balancer's
/// port, and from the node to the VIP itself, which passes no veth.
pub(super) fn lab(cluster: &Cluster) -> Result<String> {
    let (primary, backup) = (ips(cluster, "dummy-deployment")?, ips(cluster, "backup-deployment")?);
    let url = vip(cluster, "dummy-deployment")?;
    let from_pod = || cluster.ask("client", &url);
    let from_node = || cluster.ask("host", "http://127.0.0.1:8080/");
    let by_socket = || cluster.ask("host", &url);
    answered_by("the primary's answer to a pod", &primary, from_pod)?;
    answered_by("the primary's answer to the node", &primary, from_node)?;
    answered_by("the primary's answer to the node by the VIP", &primary, by_socket)?;
    cluster.fake_error("dummy-deployment", true)?;
    answered_by("the backup's answer to a pod", &backup, from_pod)?;
    answered_by("the backup's answer to the node", &backup, from_node)?;
    answered_by("the backup's answer to the node by the VIP", &backup, by_socket)?;
    cluster.wait_state("dummy", "Open")?;
    cluster.wait_event("CircuitBreaker", "dummy", "Opened")?;
    cluster.wait_condition("dummy", "Degraded", "True", "TrafficOnBackup")?;
    // The state is Open as soon as one node is open. SHARE is the primary's part of the connections of all nodes.
    wait_for("kubectl get cb to show the open breaker", Duration::from_secs(20), || {
        let table = cluster.lab(&["get", "cb", "dummy"])?;
        let words = ["SERVICE", "STATE", "SINCE", "REASON", "BACKUP", "SHARE", "AGE", "Open", "2/2", " 0%"];
        match words.iter().find(|word| !table.contains(*word)) {
            Some(word) => bail!("no {word} in\n{table}"),
            None => Ok(Some(())),
        }
    })?;
    let plugin = cluster.plugin(&["-A", "status", "-o", "wide"])?.text;
    for word in cluster.nodes.iter().map(String::as_str).chain(["dummy", "Open"]) {
        ensure!(plugin.contains(word), "kubectl breaker does not show {word}:\n{plugin}");
    }
    cluster.fake_error("dummy-deployment", false)?;
    answered_by("the primary's answer to a pod again", &primary, from_pod)?;
    answered_by("the primary's answer to the node again", &primary, from_node)?;
    answered_by("the primary's answer to the node by the VIP again", &primary, by_socket)?;
    cluster.wait_state("dummy", "Closed")?;
    cluster.wait_event("CircuitBreaker", "dummy", "Closed")?;
    Ok("from a pod and from the node: primary, backup, primary".into())
}

pub(super) fn lab_from_lan(cluster: &Cluster) -> Result<String> {
    let (primary, backup) = (ips(cluster, "dummy-deployment")?, ips(cluster, "backup-deployment")?);
    let nodes: Vec<String> =
        cluster.node_addresses()?.into_iter().filter_map(|(_, ips)| ips.into_iter().next()).collect();
    let service = cluster.get(NAMESPACE, "svc/dummy-deployment", "")?;
    let node_port = service["spec"]["ports"][0]["nodePort"].as_i64().context("no nodePort")?;
    let everywhere = |pods: &[String], who: &str| -> Result<()> {
        for node in &nodes {
            for port in [8080, node_port] {
                let url = format!("http://{node}:{port}/");
                answered_by(&format!("{who}'s answer by {url}"), pods, || cluster.ask_from_lan(&url))?;
            }
        }
        Ok(())
    };
    everywhere(&primary, "the primary")?;
    cluster.fake_error("dummy-deployment", true)?;
    everywhere(&backup, "the backup")?;
    cluster.fake_error("dummy-deployment", false)?;
    everywhere(&primary, "the primary")?;
    Ok(format!("by port 8080 and NodePort {node_port} of {} nodes: primary, backup, primary", nodes.len()))
}

/// A dual-stack Service with a TCP and a UDP port: both IP families and both ports fail over together.
pub(super) fn families_and_datagrams(cluster: &Cluster) -> Result<String> {
    for (name, app) in [("dual", "dummy-deployment"), ("dual-backup", "backup-deployment")] {
        let service = json!({
            "apiVersion": "v1", "kind": "Service", "metadata": { "name": name },
            "spec": {
                "type": "NodePort", "ipFamilyPolicy": "PreferDualStack", "selector": { "app": app },
                "ports": [
                    { "name": "http", "port": 8080, "targetPort": 80 },
                    { "name": "datagrams", "port": 5353, "targetPort": 80, "protocol": "UDP" },
                ],
            },
        });
        cluster.apply(&service.to_string())?;
    }
    let breaker = json!({
        "apiVersion": "breaker.dev/v1alpha1", "kind": "CircuitBreaker", "metadata": { "name": "dual" },
        "spec": {
            "service": { "name": "dual" }, "backups": [{ "name": "dual-backup" }],
            "check": { "httpGet": { "path": "/ready" }, "periodMillis": 100, "failureThreshold": 3 },
        },
    });
    cluster.apply(&breaker.to_string())?;
    cluster.wait_programmed("dual")?;
    cluster.wait_state("dual", "Closed")?;
    let addresses = |app: &str| -> Result<Vec<String>> {
        let shown = |ip: String| if ip.contains(':') { format!("[{ip}]") } else { ip };
        Ok(cluster.pods(app)?.into_iter().flat_map(|pod| pod.ips).map(shown).collect())
    };
    let (primary, backup) = (addresses("dummy-deployment")?, addresses("backup-deployment")?);
    let service = cluster.get(NAMESPACE, "svc/dual", "")?;
    let vips: Vec<String> = service["spec"]["clusterIPs"]
        .as_array()
        .into_iter()
        .flatten()
        .filter_map(|ip| ip.as_str())
        .map(|ip| if ip.contains(':') { format!("[{ip}]") } else { ip.to_owned() })
        .collect();
    let urls: Vec<String> =
        vips.iter().flat_map(|vip| [format!("http://{vip}:8080/"), format!("udp://{vip}:5353")]).collect();
    let all = |who: &str, pods: &[String]| -> Result<()> {
        for url in &urls {
            answered_by(&format!("{who}'s answer by {url}"), pods, || cluster.ask("client", url))?;
        }
        Ok(())
    };
    all("the primary", &primary)?;
    // One socket sends all the time. kube-proxy alone would leave it on the old pod for as long as it sends.
    let socket = Load::start(cluster, "load", &cluster.nodes[0], &urls[1])?;
    cluster.fake_error("dummy-deployment", true)?;
    all("the backup", &backup)?;
    let from = now();
    wait_for("the socket's datagrams to be answered by the backup", Duration::from_secs(10), || {
        let by = socket.results()?.answered_by(from, now());
        Ok((!by.is_empty() && by.iter().all(|ip| backup.contains(ip))).then_some(()))
    })?;
    cluster.fake_error("dummy-deployment", false)?;
    all("the primary", &primary)?;
    let from = now();
    wait_for("the socket's datagrams to be answered by the primary", Duration::from_secs(10), || {
        let by = socket.results()?.answered_by(from, now());
        Ok((!by.is_empty() && by.iter().all(|ip| primary.contains(ip))).then_some(()))
    })?;
    drop(socket);
    cluster.lab(&["delete", "cb/dual", "svc/dual", "svc/dual-backup"])?;
    Ok(format!("{}: primary, backup, primary; a socket's datagrams move too", urls.join(", ")))
}

/// Backups on the node where packets arrive: external clients keep their address with `externalTrafficPolicy: Local`,
/// and with `fastPath: PeerRedirect` external clients and pods reach these backups on the fast path.
pub(super) fn local_backups(cluster: &Cluster) -> Result<String> {
    for (name, app, policy) in [("near", "dummy-deployment", Some("Local")), ("near-backup", "backup-deployment", None)]
    {
        let mut service = json!({
            "apiVersion": "v1", "kind": "Service", "metadata": { "name": name },
            "spec": { "type": "NodePort", "selector": { "app": app }, "ports": [{ "port": 8080, "targetPort": 80 }] },
        });
        if let Some(policy) = policy {
            service["spec"]["externalTrafficPolicy"] = json!(policy);
        }
        cluster.apply(&service.to_string())?;
    }
    let goes_by = |fast_path: &str| {
        let breaker = json!({
            "apiVersion": "breaker.dev/v1alpha1", "kind": "CircuitBreaker", "metadata": { "name": "near" },
            "spec": {
                "service": { "name": "near" }, "backups": [{ "name": "near-backup" }],
                "check": { "httpGet": { "path": "/ready" }, "periodMillis": 100, "failureThreshold": 3 },
                "override": "ForceOpen", "fastPath": fast_path,
            },
        });
        cluster.apply(&breaker.to_string())?;
        cluster.wait_programmed("near")
    };
    goes_by("Off")?;
    cluster.wait_state("near", "Open")?;
    let shown = local_backups_from_the_lan(cluster, "stack")?;
    goes_by("PeerRedirect")?;
    let said = cluster.breaker("near")?["status"]["conditions"].to_string();
    ensure!(said.contains("externalTrafficPolicy") && said.contains("NetworkPolicies"), "{said}");
    local_backups_from_the_lan(cluster, "veth")?;
    // From a pod of the first node.
    let url = vip(cluster, "near")?;
    answered_by("a backup's answer to a pod", &ips(cluster, "backup-deployment")?, || cluster.ask("client", &url))?;
    let first = &cluster.nodes[0];
    let here = cluster.pods("backup-deployment")?.iter().any(|pod| pod.node == *first);
    wait_for("a pod's flow on the fast path", Duration::from_secs(20), || {
        cluster.ask("client", &url)?;
        let shown = flows_to_local_backups(cluster, first, "")?;
        if !here || shown.contains(" veth ") { Ok(Some(())) } else { bail!("{shown}") }
    })?;
    // The condition follows from the NetworkPolicy's text alone, whether or not a controller enforces it here.
    cluster.wait_condition("near", "BackupReachable", "True", "Reachable")?;
    let policy = json!({
        "apiVersion": "networking.k8s.io/v1", "kind": "NetworkPolicy", "metadata": { "name": "closed" },
        "spec": { "podSelector": { "matchLabels": { "app": "backup-deployment" } }, "policyTypes": ["Ingress"] },
    });
    cluster.apply(&policy.to_string())?;
    cluster.wait_condition("near", "BackupReachable", "False", "NetworkPolicy")?;
    cluster.lab(&["delete", "networkpolicy/closed"])?;
    cluster.wait_condition("near", "BackupReachable", "True", "Reachable")?;
    cluster.lab(&["delete", "cb/near", "svc/near", "svc/near-backup"])?;
    let fast = if here { "; from a pod too" } else { "" };
    Ok(format!(
        "from the lan by {}: clients keep their address to a local backup, by both paths{fast}",
        shown.join(", ")
    ))
}

/// Sends requests from outside to each node's own address. If the node has a backup, that backup must answer and see
/// the client's address, and `breaker flows` must show `way` as the flow's path.
pub(super) fn local_backups_from_the_lan(cluster: &Cluster, way: &str) -> Result<Vec<String>> {
    let service = cluster.get(NAMESPACE, "svc/near", "")?;
    let node_port = service["spec"]["ports"][0]["nodePort"].as_i64().context("no nodePort")?;
    let nodes = cluster.node_addresses()?;
    let backups = cluster.pods("backup-deployment")?;
    let first = backups.first().context("no backup")?;
    let pods_net = first.ip.rsplitn(3, '.').last().map(|net| format!("{net}.")).unwrap_or_default();
    let mut shown = Vec::new();
    for (name, own) in &nodes {
        let url = format!("http://{}:{node_port}/client", own.first().context("a node without an address")?);
        let here: Vec<&str> = backups.iter().filter(|pod| pod.node == *name).map(|pod| pod.ip.as_str()).collect();
        wait_for(&format!("a backup's answer by {url}, {way}"), Duration::from_secs(20), || {
            let answer = cluster.ask_from_lan(&url)?;
            let client = answer.split(' ').nth(1).unwrap_or_default();
            // A masqueraded client has an address of the node, on the nodes' network or on the pod network.
            let kept =
                !nodes.iter().any(|(_, ips)| ips.iter().any(|ip| ip == client)) && !client.starts_with(&pods_net);
            // If the node has no backup, a backup on another node answers.
            let by_a_near_one = here.iter().any(|ip| answer.contains(&format!("FROM {ip}:")));
            let flows = flows_to_local_backups(cluster, name, "/outside")?;
            let so = |line: &str| line.contains(client) && line.contains(&format!(" {way} "));
            if by_a_near_one && kept && flows.lines().any(so) || here.is_empty() && !kept {
                Ok(Some(()))
            } else {
                bail!("{answer}; backups here: {here:?}; flows:\n{flows}")
            }
        })?;
        shown.push(format!("{name} ({} backups)", here.len()));
    }
    Ok(shown)
}

/// The flows of one part of the Service: `/outside`, or nothing for the cluster IP.
pub(super) fn flows_to_local_backups(cluster: &Cluster, node: &str, part: &str) -> Result<String> {
    let agent = &cluster.agent_on(node)?;
    cluster.kubectl(&["-n", SYSTEM, "exec", agent, "--", "/breaker", "flows", &format!("{NAMESPACE}/near:8080{part}")])
}
