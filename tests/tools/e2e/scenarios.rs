//! The scenarios, one function each. Every scenario starts from the lab as `k8s/lab` defines it, with the breaker
//! closed.

use std::{path::Path, thread::sleep, time::Duration};

use anyhow::{Context as _, Result, bail, ensure};
use serde_json::json;

use crate::{
    cluster::{Cluster, NAMESPACE, SYSTEM, shell},
    load::{Load, now, pod},
    wait_for,
};

pub struct Scenario {
    pub name: &'static str,
    /// The reason why this cluster cannot play it.
    pub skip: fn(&Cluster) -> Option<&'static str>,
    /// Plays it, and returns a summary.
    pub play: fn(&Cluster) -> Result<String>,
}

const fn always(_: &Cluster) -> Option<&'static str> {
    None
}

fn needs_lan(cluster: &Cluster) -> Option<&'static str> {
    cluster.hooks.lan.is_none().then_some("no --lan")
}

fn needs_power(cluster: &Cluster) -> Option<&'static str> {
    match (&cluster.hooks.node, cluster.nodes.len()) {
        (None, _) => Some("no --stop-node and --start-node"),
        (Some(_), 0..=1) => Some("needs at least two nodes"),
        _ => None,
    }
}

fn needs_api(cluster: &Cluster) -> Option<&'static str> {
    cluster.hooks.api.is_none().then_some("no --stop-api and --start-api")
}

pub const ALL: &[Scenario] = &[
    Scenario { name: "lab", skip: always, play: lab },
    Scenario { name: "lab-from-lan", skip: needs_lan, play: lab_from_lan },
    Scenario { name: "families-and-datagrams", skip: always, play: families_and_datagrams },
    Scenario { name: "near-backups", skip: needs_lan, play: near_backups },
    Scenario { name: "refused-by-kubectl", skip: always, play: refused_by_kubectl },
    Scenario { name: "edit-override-delete", skip: always, play: edit_override_delete },
    Scenario { name: "primary-pods-deleted", skip: always, play: primary_pods_deleted },
    Scenario { name: "primary-scaled-to-0", skip: always, play: primary_scaled_to_0 },
    Scenario { name: "rolling-updates", skip: always, play: rolling_updates },
    Scenario { name: "agent-killed-and-rolled", skip: always, play: agent_killed_and_rolled },
    Scenario { name: "cross-namespace", skip: always, play: cross_namespace },
    Scenario { name: "annotations", skip: always, play: annotations },
    Scenario { name: "limits", skip: always, play: limits },
    Scenario { name: "two-for-one-service", skip: always, play: two_for_one_service },
    Scenario { name: "two-hundred-at-once", skip: always, play: two_hundred_at_once },
    Scenario { name: "api-server-away", skip: needs_api, play: api_server_away },
    Scenario { name: "node-powered-off", skip: needs_power, play: node_powered_off },
];

/// Loads the images, and installs breaker and the lab.
pub fn install(cluster: &Cluster, dist: &Path) -> Result<()> {
    for archive in ["breaker.tar", "dummyservice.tar"] {
        let path = dist.join(archive);
        ensure!(path.is_file(), "{} does not exist; run: cargo xtask image", path.display());
        shell(&cluster.hooks.load_image.replace("{}", &path.display().to_string()))?;
    }
    // CRDs first: the dry run of the other manifests needs them.
    cluster.kubectl(&["apply", "-f", "k8s/base/namespace.yaml", "-f", "k8s/base/crds.yaml"])?;
    cluster.kubectl(&["wait", "--for=condition=Established", "crd/circuitbreakers.breaker.dev", "--timeout=20s"])?;
    for dir in ["k8s/base", "k8s/lab"] {
        cluster.kubectl(&["apply", "--dry-run=server", "-k", dir])?;
    }
    cluster.feed(&["apply", "--dry-run=server", "-f", "-"], &cleanup_job(&cluster.nodes[0])?)?;
    cluster.kubectl(&["apply", "-k", "k8s/base"])?;
    cluster.kubectl(&["-n", SYSTEM, "rollout", "status", "ds/breaker-agent", "--timeout=60s"])?;
    let namespace = json!({ "apiVersion": "v1", "kind": "Namespace", "metadata": { "name": NAMESPACE } });
    cluster.feed(&["apply", "-f", "-"], &namespace.to_string())?;
    for (name, host) in [("client", false), ("host", true)] {
        cluster.apply(&pod(name, &cluster.nodes[0], &["wait"], host))?;
    }
    lab_up(cluster)
}

fn lab_up(cluster: &Cluster) -> Result<()> {
    cluster.lab(&["apply", "-k", "k8s/lab"])?;
    for app in ["dummy-deployment", "backup-deployment"] {
        cluster.lab(&["rollout", "status", &format!("deployment/{app}"), "--timeout=60s"])?;
    }
    cluster.lab(&["wait", "--for=condition=Ready", "pod/client", "pod/host", "--timeout=30s"])?;
    cluster.wait_programmed("dummy")
}

/// Restores the lab to its manifests, with the breaker closed and both Services healthy.
pub fn fresh(cluster: &Cluster) -> Result<()> {
    cluster.kubectl(&["wait", "--for=condition=Ready", "nodes", "--all", "--timeout=90s"])?;
    cluster.lab(&["delete", "pod", "saboteur", "--ignore-not-found", "--wait=false"])?;
    let breakers = cluster.get(NAMESPACE, "cb", "")?;
    for breaker in breakers["items"].as_array().into_iter().flatten() {
        let name = breaker["metadata"]["name"].as_str().unwrap_or_default();
        if name != "dummy" {
            cluster.lab(&["delete", "cb", name])?;
        }
    }
    for app in ["dummy-deployment", "backup-deployment"] {
        cluster.lab(&[
            "annotate",
            "svc",
            app,
            "breaker.dev/backup-",
            "breaker.dev/check-",
            "breaker.dev/period-millis-",
            "breaker.dev/limit-",
            "breaker.dev/limit-burst-",
        ])?;
    }
    // An apply would leave fields that a scenario patched as they are.
    cluster.lab(&["delete", "cb", "dummy", "--ignore-not-found"])?;
    lab_up(cluster)?;
    cluster.fake_error("dummy-deployment", false)?;
    cluster.fake_error("backup-deployment", false)?;
    wait_for("dummy to be Closed", Duration::from_secs(60), || {
        let state = cluster.breaker("dummy")?["status"]["state"].as_str().unwrap_or_default().to_owned();
        if state == "Closed" {
            return Ok(Some(()));
        }
        // A pod may have missed the request, or was switched on again since: repeat the request, and report it.
        let mut said = Vec::new();
        for ip in ips(cluster, "dummy-deployment")? {
            if let Err(error) = cluster.ask("client", &format!("http://{ip}/ready")) {
                eprintln!("{ip} is not healthy yet: {error:#}");
                said.push(ip);
            }
        }
        if !said.is_empty() {
            cluster.fake_error("dummy-deployment", false)?;
        }
        bail!("the state is {state:?}; not healthy: {said:?}")
    })?;
    cluster.wait_condition("dummy", "Degraded", "False", "")
}

/// Patch: a probe every 100 ms; three failures are Down.
const QUICK: &str = r#"{"spec":{"check":{"periodSeconds":null,"periodMillis":100,"failureThreshold":3}}}"#;

fn patch(cluster: &Cluster, patch: &str) -> Result<()> {
    cluster.lab(&["patch", "cb", "dummy", "--type=merge", "-p", patch])?;
    cluster.wait_programmed("dummy")
}

fn vip(cluster: &Cluster, service: &str) -> Result<String> {
    let service = cluster.get(NAMESPACE, &format!("svc/{service}"), "")?;
    let ip = service["spec"]["clusterIP"].as_str().context("no clusterIP")?;
    Ok(format!("http://{ip}:{}/", service["spec"]["ports"][0]["port"]))
}

fn ips(cluster: &Cluster, app: &str) -> Result<Vec<String>> {
    Ok(cluster.pods(app)?.into_iter().map(|pod| pod.ip).collect())
}

/// Repeats a request until one of these pods answers it.
fn answered_by(what: &str, pods: &[String], ask: impl Fn() -> Result<String>) -> Result<()> {
    wait_for(what, Duration::from_secs(30), || {
        let answer = ask()?;
        if pods.iter().any(|ip| answer.contains(&format!("FROM {ip}:"))) { Ok(Some(())) } else { bail!("{answer}") }
    })
}

/// Failover and return with the check settings of NGINX Plus: from a pod, from the node through the load balancer's
/// port, and from the node to the VIP itself, which passes no veth.
fn lab(cluster: &Cluster) -> Result<String> {
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
    // The state is Open as soon as one node is open. SHARE is what all nodes together send to the primary.
    wait_for("kubectl get cb to show the open breaker", Duration::from_secs(20), || {
        let table = cluster.lab(&["get", "cb", "dummy"])?;
        let words = ["SERVICE", "STATE", "SINCE", "REASON", "BACKUP", "SHARE", "AGE", "Open", "2/2", " 0%"];
        match words.iter().find(|word| !table.contains(*word)) {
            Some(word) => bail!("no {word} in\n{table}"),
            None => Ok(Some(())),
        }
    })?;
    let plugin = cluster.plugin()?;
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

fn lab_from_lan(cluster: &Cluster) -> Result<String> {
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
fn families_and_datagrams(cluster: &Cluster) -> Result<String> {
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
        let by = socket.told()?.answered_by(from, now());
        Ok((!by.is_empty() && by.iter().all(|ip| backup.contains(ip))).then_some(()))
    })?;
    cluster.fake_error("dummy-deployment", false)?;
    all("the primary", &primary)?;
    let from = now();
    wait_for("the socket's datagrams to be answered by the primary", Duration::from_secs(10), || {
        let by = socket.told()?.answered_by(from, now());
        Ok((!by.is_empty() && by.iter().all(|ip| primary.contains(ip))).then_some(()))
    })?;
    drop(socket);
    cluster.lab(&["delete", "cb/dual", "svc/dual", "svc/dual-backup"])?;
    Ok(format!("{}: primary, backup, primary; a socket's datagrams move too", urls.join(", ")))
}

/// Backups on the node where packets arrive: external clients keep their address with `externalTrafficPolicy: Local`,
/// and with `fastPath: PeerRedirect` external clients and pods reach these backups on the fast path.
fn near_backups(cluster: &Cluster) -> Result<String> {
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
    let shown = near_backups_from_the_lan(cluster, "stack")?;
    goes_by("PeerRedirect")?;
    let said = cluster.breaker("near")?["status"]["conditions"].to_string();
    ensure!(said.contains("externalTrafficPolicy") && said.contains("NetworkPolicies"), "{said}");
    near_backups_from_the_lan(cluster, "veth")?;
    // From a pod of the first node.
    let url = vip(cluster, "near")?;
    answered_by("a backup's answer to a pod", &ips(cluster, "backup-deployment")?, || cluster.ask("client", &url))?;
    let first = &cluster.nodes[0];
    let here = cluster.pods("backup-deployment")?.iter().any(|pod| pod.node == *first);
    wait_for("a pod's flow on the fast path", Duration::from_secs(20), || {
        cluster.ask("client", &url)?;
        let shown = flows_of_near(cluster, first)?;
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
fn near_backups_from_the_lan(cluster: &Cluster, way: &str) -> Result<Vec<String>> {
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
            let flows = flows_of_near(cluster, name)?;
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

fn flows_of_near(cluster: &Cluster, node: &str) -> Result<String> {
    let agent = &cluster.agent_on(node)?;
    cluster.kubectl(&["-n", SYSTEM, "exec", agent, "--", "/breaker", "flows", &format!("{NAMESPACE}/near:8080")])
}

/// `kubectl apply` refuses invalid specs and names the field.
fn refused_by_kubectl(cluster: &Cluster) -> Result<String> {
    let good = json!({ "service": { "name": "dummy-deployment" }, "backups": [{ "name": "backup-deployment" }] });
    let with = |change: &dyn Fn(&mut serde_json::Value)| {
        let mut spec = good.clone();
        change(&mut spec);
        json!({ "apiVersion": "breaker.dev/v1alpha1", "kind": "CircuitBreaker", "metadata": { "name": "nonsense" }, "spec": spec }).to_string()
    };
    let rows: Vec<(String, &str, &str)> = vec![
        (with(&|s| s["backups"] = json!([])), "spec.backups", "at least 1"),
        (with(&|s| s["backups"][0]["name"] = json!("dummy-deployment")), "spec.backups", "cannot be its own backup"),
        (with(&|s| s["backups"] = json!([{ "name": "a" }, { "name": "a" }])), "spec.backups", "a backup once"),
        (with(&|s| s["check"] = json!({})), "spec.check", "exactly one of httpGet, tcpSocket and grpc"),
        (
            with(&|s| s["check"] = json!({ "tcpSocket": {}, "periodSeconds": 0 })),
            "spec.check.periodSeconds",
            "greater than or equal to 1",
        ),
        (
            with(&|s| s["check"] = json!({ "tcpSocket": {}, "periodSeconds": 1, "periodMillis": 100 })),
            "spec.check",
            "exclude each other",
        ),
        (with(&|s| s["check"] = json!({ "httpGet": { "path": "ready" } })), "spec.check.httpGet.path", "should match"),
        (
            with(&|s| s["override"] = json!("Open")),
            "spec.override",
            "supported values: \"Auto\", \"ForceOpen\", \"ForceClosed\"",
        ),
        (with(&|s| s["until"] = json!("2030-01-01T00:00:00Z")), "spec.until", "needs override"),
        (with(&|s| s["probeFrom"] = json!("Elected")), "spec.probeFrom", "not built yet; allowed: EveryNode"),
        (
            with(&|s| s["breaker"] = json!({ "openMillis": 10, "maxOpenMillis": 5 })),
            "spec.breaker.maxOpenMillis",
            "at least openMillis",
        ),
        (with(&|s| s["limits"] = json!({})), "spec.limits", "limits nothing"),
        (
            with(&|s| s["limits"] = json!({ "newConnectionsPerSecond": 0 })),
            "spec.limits.newConnectionsPerSecond",
            "greater than or equal to 1",
        ),
        (
            with(&|s| s["limits"] = json!({ "concurrentConnections": 0.5 })),
            "spec.limits.concurrentConnections",
            "must be of type integer",
        ),
        (with(&|s| s["limits"] = json!({ "concurrentConnections": 9, "burst": 5 })), "spec.limits.burst", "it needs"),
        (
            with(&|s| s["limits"] = json!({ "concurrentConnections": 5, "perClient": { "concurrentConnections": 6 } })),
            "spec.limits.perClient",
            "must not be above those of all clients together",
        ),
        (
            with(&|s| s["limits"] = json!({ "newConnectionsPerSecond": 9, "onLimit": "Queue" })),
            "spec.limits.onLimit",
            "supported values: \"Reset\", \"Drop\", \"Failover\"",
        ),
        (with(&|s| s["chekc"] = json!({})), "spec.chekc", "unknown field"),
        (with(&|s| s["service"]["ports"] = json!([99_999])), "spec.service.ports", "1 to 65535"),
        (with(&|s| s["service"]["ports"] = json!([""])), "spec.service.ports", "or its name"),
    ];
    let count = rows.len();
    for (manifest, field, words) in rows {
        match cluster.apply(&manifest) {
            Ok(()) => bail!("{manifest} was accepted"),
            Err(error) => {
                let text = format!("{error:#}");
                ensure!(text.contains(field) && text.contains(words), "{field} ({words}) is not in: {text}");
            }
        }
    }
    let words = cluster.kubectl(&["explain", "cb.spec.check"])?;
    let words = words.split_whitespace().collect::<Vec<_>>().join(" ");
    ensure!(words.contains("exactly one of httpGet, tcpSocket and grpc"), "kubectl explain: {words}");
    Ok(format!("{count} invalid specs refused, each by its field"))
}

fn edit_override_delete(cluster: &Cluster) -> Result<String> {
    let (primary, backup) = (ips(cluster, "dummy-deployment")?, ips(cluster, "backup-deployment")?);
    let url = vip(cluster, "dummy-deployment")?;
    let ask = || cluster.ask("client", &url);
    patch(cluster, r#"{"spec":{"override":"ForceOpen"}}"#)?;
    answered_by("the backup's answer, forced open", &backup, ask)?;
    cluster.wait_state("dummy", "Open")?;
    let until =
        wait_for("a time", Duration::from_secs(1), || Ok(Some(jiff::Timestamp::now() + Duration::from_secs(3))))?;
    patch(cluster, &json!({ "spec": { "until": until.to_string() } }).to_string())?;
    answered_by("the primary's answer after the override has expired", &primary, ask)?;
    cluster.wait_state("dummy", "Closed")?;
    patch(cluster, r#"{"spec":{"override":"Auto","until":null,"mode":"DryRun"}}"#)?;
    cluster.fake_error("dummy-deployment", true)?;
    cluster.wait_state("dummy", "Open")?;
    let dry = cluster.lab(&["exec", "client", "--", "/dummy-service", "ask", "--timeout-millis", "500", &url]);
    ensure!(dry.is_err(), "a dry run moved a connection: {dry:?}");
    patch(cluster, r#"{"spec":{"mode":"Enforce"}}"#)?;
    answered_by("the backup's answer, enforced", &backup, ask)?;
    cluster.lab(&["delete", "cb", "dummy"])?;
    wait_for("requests to fail without the breaker", Duration::from_secs(10), || {
        let answer = cluster.lab(&["exec", "client", "--", "/dummy-service", "ask", "--timeout-millis", "500", &url]);
        Ok(answer.is_err().then_some(()))
    })?;
    cluster.lab(&["apply", "-k", "k8s/lab"])?;
    answered_by("the backup's answer, with the breaker again", &backup, ask)?;
    Ok("forced, expired, dry run, enforced, deleted, created again".into())
}

fn primary_pods_deleted(cluster: &Cluster) -> Result<String> {
    patch(cluster, QUICK)?;
    let load = Load::start(cluster, "load", &cluster.nodes[0], &vip(cluster, "dummy-deployment")?)?;
    let start = now();
    cluster.lab(&["delete", "pods", "-l", "app=dummy-deployment", "--grace-period=0", "--force"])?;
    cluster.lab(&["rollout", "status", "deployment/dummy-deployment", "--timeout=60s"])?;
    cluster.wait_state("dummy", "Closed")?;
    sleep(Duration::from_secs(1));
    let told = load.end()?;
    let took = told.recovery(start, now())?;
    ensure!(took < 10_000, "recovery took {took} ms");
    Ok(format!(
        "answered again after {took} ms, {} of {} requests failed",
        told.failed(start, u128::MAX).len(),
        told.requests.len()
    ))
}

fn primary_scaled_to_0(cluster: &Cluster) -> Result<String> {
    patch(cluster, QUICK)?;
    let backup = ips(cluster, "backup-deployment")?;
    let load = Load::start(cluster, "load", &cluster.nodes[0], &vip(cluster, "dummy-deployment")?)?;
    cluster.lab(&["scale", "deployment/dummy-deployment", "--replicas=0"])?;
    cluster.wait_state("dummy", "Open")?;
    wait_for("the reason NoEndpoints", Duration::from_secs(10), || {
        let breaker = cluster.breaker("dummy")?;
        if breaker["status"]["reason"] == "NoEndpoints" {
            Ok(Some(()))
        } else {
            bail!("{}", breaker["status"]["reason"])
        }
    })
    .or_else(|_| cluster.wait_condition("dummy", "Degraded", "True", "TrafficOnBackup"))?;
    let from = now();
    sleep(Duration::from_secs(1));
    let open = load.told()?;
    let by = open.answered_by(from, now());
    ensure!(!by.is_empty() && by.iter().all(|ip| backup.contains(ip)), "answered by {by:?}");
    cluster.lab(&["scale", "deployment/dummy-deployment", "--replicas=2"])?;
    cluster.wait_state("dummy", "Closed")?;
    let told = load.end()?;
    Ok(format!(
        "open without endpoints, closed again; {} of {} requests failed",
        told.failed(0, u128::MAX).len(),
        told.requests.len()
    ))
}

/// With pods that terminate as Kubernetes recommends, a rolling update fails no request. That must hold with breaker
/// too.
fn rolling_updates(cluster: &Cluster) -> Result<String> {
    patch(cluster, QUICK)?;
    // With `onOpen: Reset`, forcing the breaker open would reset requests in flight. Only the rolling update is
    // tested here.
    patch(cluster, r#"{"spec":{"onOpen":"Keep"}}"#)?;
    let gentle = r#"{"spec":{"template":{"spec":{"containers":[{"name":"dummyservice","lifecycle":{"preStop":{"sleep":{"seconds":3}}},"readinessProbe":{"httpGet":{"path":"/alive","port":80},"periodSeconds":1}}]}}}}"#;
    for app in ["dummy-deployment", "backup-deployment"] {
        cluster.lab(&["patch", "deployment", app, "-p", gentle])?;
    }
    for app in ["dummy-deployment", "backup-deployment"] {
        cluster.lab(&["rollout", "status", &format!("deployment/{app}"), "--timeout=60s"])?;
    }
    cluster.wait_state("dummy", "Closed")?;
    let (first, last) = (&cluster.nodes[0], &cluster.nodes[cluster.nodes.len() - 1]);
    let url = vip(cluster, "dummy-deployment")?;
    let loads = [Load::start(cluster, "load", first, &url)?, Load::start(cluster, "load-2", last, &url)?];
    let roll = |app: &str| -> Result<()> {
        cluster.lab(&["rollout", "restart", &format!("deployment/{app}")])?;
        cluster.lab(&["rollout", "status", &format!("deployment/{app}"), "--timeout=60s"])?;
        // The last of the old pods terminates after its preStop sleep.
        sleep(Duration::from_secs(4));
        Ok(())
    };
    roll("dummy-deployment")?;
    patch(cluster, r#"{"spec":{"override":"ForceOpen"}}"#)?;
    roll("backup-deployment")?;
    patch(cluster, r#"{"spec":{"override":"Auto"}}"#)?;
    let mut asked = 0;
    for load in loads {
        asked += load.end()?.none_failed()?;
    }
    // Deletes the patched Deployments: the next scenario creates them anew from the lab's manifests.
    cluster.lab(&["delete", "deployment", "--all"])?;
    Ok(format!("primary closed, backup open: 0 of {asked} requests failed"))
}

fn agent_killed_and_rolled(cluster: &Cluster) -> Result<String> {
    patch(cluster, QUICK)?;
    cluster.fake_error("dummy-deployment", true)?;
    cluster.wait_state("dummy", "Open")?;
    wait_for("the breaker to be open on every node", Duration::from_secs(10), || {
        let breaker = cluster.breaker("dummy")?;
        Ok((breaker["status"]["counts"]["open"].as_u64() == Some(cluster.nodes.len() as u64)).then_some(()))
    })?;
    let url = vip(cluster, "dummy-deployment")?;
    let loads: Vec<Load<'_>> = cluster
        .nodes
        .iter()
        .enumerate()
        .map(|(i, node)| Load::start(cluster, &format!("load-{i}"), node, &url))
        .collect::<Result<_>>()?;
    cluster.kubectl(&[
        "-n",
        SYSTEM,
        "delete",
        "pods",
        "-l",
        "app.kubernetes.io/component=agent",
        "--grace-period=0",
        "--force",
    ])?;
    cluster.kubectl(&["-n", SYSTEM, "rollout", "status", "ds/breaker-agent", "--timeout=60s"])?;
    cluster.kubectl(&["-n", SYSTEM, "rollout", "restart", "ds/breaker-agent"])?;
    cluster.kubectl(&["-n", SYSTEM, "rollout", "status", "ds/breaker-agent", "--timeout=90s"])?;
    cluster.wait_programmed("dummy")?;
    let mut asked = 0;
    for load in loads {
        asked += load.end()?.none_failed()?;
    }
    let reason = cluster.breaker("dummy")?["status"]["reason"].clone();
    ensure!(reason == "HttpStatus", "the reason did not survive: {reason}");
    Ok(format!("killed everywhere, then rolled, while open: 0 of {asked} requests failed"))
}

fn cross_namespace(cluster: &Cluster) -> Result<String> {
    const OTHER: &str = "breaker-e2e-spare";
    let namespace = json!({ "apiVersion": "v1", "kind": "Namespace", "metadata": { "name": OTHER } });
    cluster.feed(&["apply", "-f", "-"], &namespace.to_string())?;
    cluster.kubectl(&["-n", OTHER, "apply", "-f", "k8s/lab/backup.yaml"])?;
    cluster.kubectl(&["-n", OTHER, "rollout", "status", "deployment/backup-deployment", "--timeout=60s"])?;
    let pods = cluster.get(OTHER, "pods", "app=backup-deployment")?;
    let spare: Vec<String> = pods["items"]
        .as_array()
        .into_iter()
        .flatten()
        .filter_map(|p| Some(p["status"]["podIP"].as_str()?.to_owned()))
        .collect();
    let url = vip(cluster, "dummy-deployment")?;
    cluster.lab(&[
        "patch",
        "cb",
        "dummy",
        "--type=merge",
        "-p",
        &json!({ "spec": { "backups": [{ "name": "backup-deployment", "namespace": OTHER }] } }).to_string(),
    ])?;
    cluster.wait_condition("dummy", "ResolvedRefs", "False", "RefNotPermitted")?;
    cluster.wait_condition("dummy", "Programmed", "False", "NotResolved")?;
    cluster.wait_event("CircuitBreaker", "dummy", "RefNotPermitted")?;
    cluster.fake_error("dummy-deployment", true)?;
    sleep(Duration::from_secs(4));
    let answer = cluster.lab(&["exec", "client", "--", "/dummy-service", "ask", "--timeout-millis", "500", &url]);
    ensure!(answer.is_err(), "redirected without a grant: {answer:?}");
    let grant = json!({
        "apiVersion": "breaker.dev/v1alpha1", "kind": "ReferenceGrant", "metadata": { "name": "lab", "namespace": OTHER },
        "spec": {
            "from": [{ "group": "breaker.dev", "kind": "CircuitBreaker", "namespace": NAMESPACE }],
            "to": [{ "group": "", "kind": "Service", "name": "backup-deployment" }],
        },
    });
    cluster.feed(&["apply", "-f", "-"], &grant.to_string())?;
    cluster.wait_condition("dummy", "ResolvedRefs", "True", "")?;
    answered_by("the spare's answer", &spare, || cluster.ask("client", &url))?;
    cluster.kubectl(&["-n", OTHER, "delete", "referencegrants.breaker.dev", "lab"])?;
    cluster.wait_condition("dummy", "ResolvedRefs", "False", "RefNotPermitted")?;
    wait_for("redirection to stop", Duration::from_secs(10), || {
        let answer = cluster.lab(&["exec", "client", "--", "/dummy-service", "ask", "--timeout-millis", "500", &url]);
        Ok(answer.is_err().then_some(()))
    })?;
    cluster.kubectl(&["delete", "namespace", OTHER, "--wait=false"])?;
    Ok("no backup without the grant, the spare with it, none after its removal".into())
}

fn annotations(cluster: &Cluster) -> Result<String> {
    let (primary, backup) = (ips(cluster, "dummy-deployment")?, ips(cluster, "backup-deployment")?);
    let url = vip(cluster, "dummy-deployment")?;
    cluster.lab(&["delete", "cb", "dummy"])?;
    let annotate =
        |pairs: &[&str]| cluster.lab(&[&["annotate", "--overwrite", "svc", "dummy-deployment"], pairs].concat());
    annotate(&["breaker.dev/backup=backup-deployment", "breaker.dev/check=/ready", "breaker.dev/period-millis=100"])?;
    wait_for("the annotated Service in the nodes' reports", Duration::from_secs(20), || {
        let reports = cluster.get("", "nodereports", "")?.to_string();
        Ok((reports.matches(r#""kind":"Service""#).count() >= cluster.nodes.len()).then_some(()))
    })?;
    answered_by("the primary's answer", &primary, || cluster.ask("client", &url))?;
    cluster.fake_error("dummy-deployment", true)?;
    answered_by("the backup's answer", &backup, || cluster.ask("client", &url))?;
    cluster.wait_event("Service", "dummy-deployment", "Opened")?;
    annotate(&["breaker.dev/period-millis=soon"])?;
    cluster.wait_event("Service", "dummy-deployment", "Invalid")?;
    answered_by("the backup's answer, in spite of an invalid annotation", &backup, || cluster.ask("client", &url))?;
    annotate(&["breaker.dev/period-millis=100"])?;
    cluster.fake_error("dummy-deployment", false)?;
    answered_by("the primary's answer again", &primary, || cluster.ask("client", &url))?;
    Ok("protected by annotations; an invalid one is reported and changes nothing".into())
}

/// Limits from a CircuitBreaker and from annotations: connections are refused, counted and shown.
fn limits(cluster: &Cluster) -> Result<String> {
    let url = vip(cluster, "dummy-deployment")?;
    // The load opens 50 connections per second. `refused`: whether more than half of those of the last 3 s failed.
    let load = Load::start(cluster, "load", &cluster.nodes[0], &url)?;
    let refused = || -> Result<bool> { Ok(load.told()?.failed(now() - 3000, now()).len() > 75) };
    ensure!(!refused()?, "requests fail although nothing is limited yet");
    let limited = json!({
        "apiVersion": "breaker.dev/v1alpha1", "kind": "CircuitBreaker", "metadata": { "name": "dummy" },
        "spec": {
            "service": { "name": "dummy-deployment" }, "backups": [{ "name": "backup-deployment" }],
            "check": { "httpGet": { "path": "/ready" } },
            "limits": { "newConnectionsPerSecond": 10, "burst": 5, "scope": "Cluster", "backup": { "newConnectionsPerSecond": 400 } },
        },
    })
    .to_string();
    cluster.apply(&limited)?;
    cluster.wait_programmed("dummy")?;
    // Applying the same manifest again, client-side and server-side, must change nothing: defaults are no difference.
    let generation =
        || -> Result<i64> { cluster.breaker("dummy")?["metadata"]["generation"].as_i64().context("generation") };
    let before = generation()?;
    cluster.apply(&limited)?;
    cluster.feed(&["-n", NAMESPACE, "apply", "--server-side", "--force-conflicts", "-f", "-"], &limited)?;
    cluster.feed(&["-n", NAMESPACE, "apply", "--server-side", "-f", "-"], &limited)?;
    ensure!(generation()? == before, "applying the same manifest changed the object");
    // Each limit is divided by the number of nodes, once the nodes know it.
    wait_for("the nodes to share the limit", Duration::from_secs(60), || {
        let nodes = i64::try_from(cluster.nodes.len())?;
        Ok((cluster.breaker("dummy")?["status"]["limitsSharedBy"].as_i64() == Some(nodes)).then_some(()))
    })?;
    wait_for("connections to be refused", Duration::from_secs(20), || Ok(refused()?.then_some(())))?;
    let shown = wait_for("the limit in the status", Duration::from_secs(20), || {
        Ok(cluster.breaker("dummy")?["status"]["limited"].as_str().map(str::to_owned))
    })?;
    ensure!(shown.ends_with("/min primary newConnectionsPerSecond"), "status.limited: {shown}");
    let table = cluster.lab(&["get", "cb", "dummy"])?;
    ensure!(table.contains("LIMITED") && table.contains("/min primary"), "{table}");
    cluster.wait_event("CircuitBreaker", "dummy", "Limited")?;
    let reports = cluster.get("", "nodereports", "")?.to_string();
    ensure!(!reports.contains("limitedClients"), "clients' addresses must stay on their node");
    cluster.lab(&["delete", "cb", "dummy"])?;
    let annotate =
        |pairs: &[&str]| cluster.lab(&[&["annotate", "--overwrite", "svc", "dummy-deployment"], pairs].concat());
    annotate(&["breaker.dev/backup=backup-deployment", "breaker.dev/limit=10/s", "breaker.dev/limit-burst=5"])?;
    sleep(Duration::from_secs(4));
    wait_for("connections to be refused by an annotation", Duration::from_secs(30), || Ok(refused()?.then_some(())))?;
    cluster.wait_event("Service", "dummy-deployment", "Limited")?;
    annotate(&["breaker.dev/limit=many"])?;
    cluster.wait_event("Service", "dummy-deployment", "Invalid")?;
    ensure!(refused()?, "an invalid annotation must change nothing");
    Ok(format!("{shown}, shared by {} nodes; annotations too; invalid ones change nothing", cluster.nodes.len()))
}

fn two_for_one_service(cluster: &Cluster) -> Result<String> {
    let second = json!({
        "apiVersion": "breaker.dev/v1alpha1", "kind": "CircuitBreaker", "metadata": { "name": "second" },
        "spec": { "service": { "name": "dummy-deployment" }, "backups": [{ "name": "backup-deployment" }], "override": "ForceOpen" },
    });
    // Creation times have a resolution of one second, and the second object must be newer.
    sleep(Duration::from_millis(1100));
    cluster.apply(&second.to_string())?;
    cluster.wait_condition("second", "Accepted", "False", "Conflicted")?;
    cluster.wait_condition("dummy", "Accepted", "True", "")?;
    let primary = ips(cluster, "dummy-deployment")?;
    let url = vip(cluster, "dummy-deployment")?;
    answered_by("the primary's answer, as the older object says", &primary, || cluster.ask("client", &url))?;
    cluster.lab(&["delete", "cb", "dummy"])?;
    cluster.wait_programmed("second")?;
    let backup = ips(cluster, "backup-deployment")?;
    answered_by("the backup's answer, as the newer object says", &backup, || cluster.ask("client", &url))?;
    Ok("the older object wins; the newer one reports the conflict, and takes over when it is alone".into())
}

/// Manifest of `count` Services and a CircuitBreaker for each, on the lab's pods. Their numbers start at `first`.
pub fn many(count: usize, first: usize) -> String {
    let mut items = Vec::new();
    for i in first..first + count {
        items.push(json!({
            "apiVersion": "v1", "kind": "Service", "metadata": { "name": format!("many-{i}"), "labels": { "many": "yes" } },
            "spec": { "selector": { "app": "dummy-deployment" }, "ports": [{ "port": 8080, "targetPort": 80 }] },
        }));
        items.push(json!({
            "apiVersion": "breaker.dev/v1alpha1", "kind": "CircuitBreaker",
            "metadata": { "name": format!("many-{i}"), "labels": { "many": "yes" } },
            "spec": {
                "service": { "name": format!("many-{i}") }, "backups": [{ "name": "backup-deployment" }],
                "check": { "httpGet": { "path": "/ready" } },
            },
        }));
    }
    json!({ "apiVersion": "v1", "kind": "List", "items": items }).to_string()
}

/// How many CircuitBreakers made by [`many`] are programmed.
pub fn many_programmed(cluster: &Cluster) -> Result<usize> {
    let breakers = cluster.get(NAMESPACE, "cb", "many=yes")?;
    let done = |b: &&serde_json::Value| {
        let conditions = b["status"]["conditions"].as_array().cloned().unwrap_or_default();
        conditions.iter().any(|c| c["type"] == "Programmed" && c["status"] == "True")
    };
    Ok(breakers["items"].as_array().into_iter().flatten().filter(done).count())
}

fn two_hundred_at_once(cluster: &Cluster) -> Result<String> {
    const COUNT: usize = 200;
    let started = std::time::Instant::now();
    // One call creates them all.
    cluster.feed(&["-n", NAMESPACE, "create", "-f", "-"], &many(COUNT, 0))?;
    let applied = started.elapsed();
    wait_for("all services to be programmed", Duration::from_secs(60), || {
        let done = many_programmed(cluster)?;
        if done == COUNT { Ok(Some(())) } else { bail!("{done} of {COUNT}") }
    })?;
    let all = started.elapsed();
    cluster.lab(&["delete", "cb,svc", "-l", "many=yes", "--wait=false"])?;
    wait_for("the nodes' reports without them", Duration::from_secs(60), || {
        let reports = cluster.get("", "nodereports", "")?.to_string();
        Ok((!reports.contains("many-")).then_some(()))
    })?;
    Ok(format!(
        "kubectl took {:.1} s, {:.1} s later all were programmed",
        applied.as_secs_f64(),
        (all - applied).as_secs_f64()
    ))
}

fn api_server_away(cluster: &Cluster) -> Result<String> {
    const AWAY: Duration = Duration::from_secs(60);
    patch(cluster, QUICK)?;
    let primary = cluster.pods("dummy-deployment")?;
    let url = vip(cluster, "dummy-deployment")?;
    // Without the API server kubectl cannot reach the pods, so this pod injects the fault by itself, 15 s after its
    // start.
    let script: Vec<String> = primary.iter().map(|pod| format!("http://{}/fakeerrormodeon", pod.ip)).collect();
    let mut args = vec!["later", "--after-millis", "15000"];
    args.extend(script.iter().map(String::as_str));
    cluster.apply(&pod("saboteur", &cluster.nodes[0], &args, false))?;
    let load = Load::start(cluster, "load", &cluster.nodes[0], &url)?;
    cluster.lab(&["wait", "--for=condition=Ready", "pod/saboteur", "--timeout=10s"])?;
    let stopped = now();
    cluster.api(false)?;
    sleep(AWAY);
    cluster.api(true)?;
    let back = now();
    cluster.wait_state("dummy", "Open")?;
    cluster.wait_event("CircuitBreaker", "dummy", "Opened")?;
    let told_after = now() - back;
    let told = load.end()?;
    let failed = told.failed(stopped, u128::MAX);
    let first = failed.iter().map(|r| r.at).min().context("nothing failed: was there a fault?")?;
    let outage = told.recovery(first, u128::MAX)?;
    let backup = ips(cluster, "backup-deployment")?;
    let by = told.answered_by(first + outage, u128::MAX);
    ensure!(!by.is_empty() && by.iter().all(|ip| backup.contains(ip)), "answered by {by:?}");
    ensure!(first < back, "the fault came after the API server was back");
    Ok(format!(
        "failed over {outage} ms after the fault, with no API server; status and Event {told_after} ms after it was back"
    ))
}

/// The primary's node loses power. One service has its backup on another node; the other has its backup on the same
/// node, and loses both. After the node has booted, its own clients fail over to the backup again.
fn node_powered_off(cluster: &Cluster) -> Result<String> {
    let (alive, dead) = (cluster.nodes[0].clone(), cluster.nodes[cluster.nodes.len() - 1].clone());
    let pin = |app: &str, node: &str| -> Result<()> {
        let patch = json!({ "spec": { "strategy": { "type": "Recreate", "rollingUpdate": null }, "template": { "spec": {
            "nodeName": node, "terminationGracePeriodSeconds": 1 } } } });
        cluster.lab(&["patch", "deployment", app, "-p", &patch.to_string()])?;
        cluster.lab(&["rollout", "status", &format!("deployment/{app}"), "--timeout=60s"]).map(drop)
    };
    pin("dummy-deployment", &dead)?;
    pin("backup-deployment", &alive)?;
    let own_backup = std::fs::read_to_string("k8s/lab/backup.yaml").context("read k8s/lab/backup.yaml")?;
    cluster.apply(&own_backup.replace("backup-deployment", "doomed-backup"))?;
    pin("doomed-backup", &dead)?;
    let service = json!({
        "apiVersion": "v1", "kind": "Service", "metadata": { "name": "doomed" },
        "spec": { "selector": { "app": "dummy-deployment" }, "ports": [{ "port": 8080, "targetPort": 80 }] },
    });
    let check =
        json!({ "httpGet": { "path": "/ready" }, "periodMillis": 200, "timeoutMillis": 500, "failureThreshold": 2 });
    let breaker = json!({
        "apiVersion": "breaker.dev/v1alpha1", "kind": "CircuitBreaker", "metadata": { "name": "doomed" },
        "spec": { "service": { "name": "doomed" }, "backups": [{ "name": "doomed-backup" }], "check": check, "whenAllUnhealthy": "Reject" },
    });
    cluster.apply(&service.to_string())?;
    cluster.apply(&breaker.to_string())?;
    let quick = json!({ "spec": { "check": { "periodSeconds": null, "timeoutSeconds": null, "periodMillis": 200, "timeoutMillis": 500, "failureThreshold": 2 } } });
    patch(cluster, &quick.to_string())?;
    cluster.wait_programmed("doomed")?;
    for name in ["dummy", "doomed"] {
        cluster.wait_state(name, "Closed")?;
    }
    let url = vip(cluster, "dummy-deployment")?;
    let load = Load::start(cluster, "load", &alive, &url)?;
    let doomed = Load::start(cluster, "doomed", &alive, &vip(cluster, "doomed")?)?;
    let off = now();
    cluster.power(&dead, false)?;
    let backup = ips(cluster, "backup-deployment")?;
    // A request that hangs is logged when it times out, after 2 s. So 5 s after the backup's first answer the log has
    // the whole outage.
    wait_for("the backup to answer", Duration::from_secs(30), || {
        let told = load.told()?;
        let by_backup = |r: &&crate::load::Request| r.ok && backup.iter().any(|ip| r.words.contains(&format!("{ip}:")));
        let first = told.requests.iter().filter(|r| r.at > off).filter(by_backup).map(|r| r.at).min();
        Ok(first.is_some_and(|first| now() > first + 5000).then_some(()))
    })?;
    let outage = load.told()?.recovery(off, u128::MAX)?;
    ensure!(outage < 15_000, "failover took {outage} ms; Kubernetes alone takes 40 s");
    wait_for("immediate refusals", Duration::from_secs(20), || {
        let told = doomed.told()?;
        let last: Vec<_> = told.requests.iter().rev().take(10).collect();
        Ok(last.iter().all(|r| !r.ok && r.words.contains("refused") && r.took < 500).then_some(()))
    })?;
    cluster.wait_condition("doomed", "Degraded", "True", "BackupUnavailable")?;
    cluster.wait_event("CircuitBreaker", "doomed", "BackupUnavailable")?;
    cluster.power(&dead, true)?;
    cluster.kubectl(&["wait", "--for=condition=Ready", &format!("node/{dead}"), "--timeout=90s"])?;
    // The kubelet of a rebooted node takes a while to start its pods.
    wait_for("both breakers to close", Duration::from_secs(240), || {
        let closed = |name| Ok::<_, anyhow::Error>(cluster.breaker(name)?["status"]["state"] == "Closed");
        Ok((closed("dummy")? && closed("doomed")?).then_some(()))
    })?;
    cluster.wait_programmed("dummy")?;
    drop((load, doomed));
    cluster.apply(&pod("newcomer", &dead, &["wait"], false))?;
    cluster.lab(&["wait", "--for=condition=Ready", "pod/newcomer", "--timeout=60s"])?;
    let primary = ips(cluster, "dummy-deployment")?;
    let from_newcomer = || cluster.ask("newcomer", &url);
    answered_by("the primary's answer to a pod of the rebooted node", &primary, from_newcomer)?;
    cluster.fake_error("dummy-deployment", true)?;
    answered_by("the backup's answer to a pod of the rebooted node", &backup, from_newcomer)?;
    cluster.lab(&["delete", "deployment", "--all"])?;
    cluster.lab(&["delete", "cb/doomed", "svc/doomed", "svc/doomed-backup"])?;
    cluster.lab(&["delete", "pod", "newcomer", "--wait=false"])?;
    Ok(format!(
        "failed over in {outage} ms; refused at once without a backup; the rebooted node's clients fail over again"
    ))
}

fn cleanup_job(node: &str) -> Result<String> {
    Ok(std::fs::read_to_string("k8s/cleanup/job.yaml").context("read k8s/cleanup/job.yaml")?.replace("NODE", node))
}

/// Uninstalls breaker as the documentation describes it.
pub fn uninstall(cluster: &Cluster) -> Result<()> {
    cluster.kubectl(&["delete", "namespace", NAMESPACE, "--ignore-not-found", "--wait=false"])?;
    cluster.kubectl(&["delete", "-k", "k8s/base", "--ignore-not-found", "--timeout=90s"])?;
    cluster.kubectl(&["create", "namespace", SYSTEM])?;
    for node in &cluster.nodes {
        cluster.feed(&["apply", "-f", "-"], &cleanup_job(node)?)?;
    }
    let label = "app.kubernetes.io/component=cleanup";
    cluster.kubectl(&["-n", SYSTEM, "wait", "--for=condition=complete", "job", "-l", label, "--timeout=60s"])?;
    for node in &cluster.nodes {
        let log = cluster.kubectl(&["-n", SYSTEM, "logs", &format!("job/breaker-cleanup-{node}")])?;
        ensure!(log.contains("removed") && !log.contains(" 0 maps"), "{node}: {log}");
    }
    cluster.kubectl(&["delete", "namespace", SYSTEM, "--timeout=60s"])?;
    wait_for("the lab's namespace to be gone", Duration::from_secs(60), || {
        Ok(cluster.kubectl(&["get", "namespace", NAMESPACE]).is_err().then_some(()))
    })
}
