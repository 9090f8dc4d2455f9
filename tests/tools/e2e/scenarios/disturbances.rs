//! Scenarios of disturbances: pods, agents, nodes and the API server go away.

use std::{thread::sleep, time::Duration};

use anyhow::{Context as _, Result, bail, ensure};
use serde_json::json;

use super::{QUICK, answered_by, ips, patch, vip};
use crate::{
    cluster::{Cluster, NAMESPACE, SYSTEM, shell},
    load::{Load, now, pod},
    wait_for,
};

pub(super) fn primary_pods_deleted(cluster: &Cluster) -> Result<String> {
    patch(cluster, QUICK)?;
    let load = Load::start(cluster, "load", &cluster.nodes[0], &vip(cluster, "dummy-deployment")?)?;
    let start = now();
    cluster.lab(&["delete", "pods", "-l", "app=dummy-deployment", "--grace-period=0", "--force"])?;
    cluster.lab(&["rollout", "status", "deployment/dummy-deployment", "--timeout=60s"])?;
    cluster.wait_state("dummy", "Closed")?;
    sleep(Duration::from_secs(1));
    let results = load.end()?;
    let took = results.recovery(start, now())?;
    ensure!(took < 10_000, "recovery took {took} ms");
    Ok(format!(
        "answered again after {took} ms, {} of {} requests failed",
        results.failed(start, u128::MAX).len(),
        results.requests.len()
    ))
}

/// The primary does not answer, and three clients have sent a request and wait: outside, on a node, in a pod. They are told
/// when the breaker opens (RESETS S1, S2, S6).
pub(super) fn waiting_clients(cluster: &Cluster) -> Result<String> {
    patch(cluster, r#"{"spec":{"override":"ForceClosed"}}"#)?;
    let url = vip(cluster, "dummy-deployment")?;
    let service = cluster.get(NAMESPACE, "svc/dummy-deployment", "")?;
    let port = service["spec"]["ports"][0]["nodePort"].as_i64().context("no nodePort")?;
    let (_, addresses) = cluster.node_addresses()?.into_iter().next().context("a node")?;
    let outside = format!("http://{}:{port}/", addresses.first().context("the node's address")?);
    let lan = cluster.hooks.lan.as_deref().context("no --lan")?;
    // In this mode, a request waits for 30 s.
    cluster.fake_error("dummy-deployment", true)?;
    let curl = |url: &str| format!("curl -s -S -m 25 {url} 2>&1; true");
    let said = std::thread::scope(|scope| {
        let clients = [
            scope.spawn(|| shell(&format!("{lan} sh -c \"{}\"", curl(&outside)))),
            scope.spawn(|| cluster.on_node(&cluster.nodes[0], &curl(&url))),
            scope.spawn(|| {
                let ask = ["exec", "client", "--", "/dummy-service", "ask", "--timeout-millis", "18000", &url];
                Ok(cluster.lab(&ask).unwrap_or_else(|error| format!("{error:#}")))
            }),
        ];
        // Nothing shows that a client waits; a connection takes some milliseconds.
        sleep(Duration::from_secs(2));
        let opened = patch(cluster, r#"{"spec":{"override":"ForceOpen"}}"#);
        let said = clients.map(|client| client.join().unwrap_or_else(|_| bail!("a client panicked")));
        opened.map(|()| said)
    })?;
    for (who, said) in ["outside", "on a node", "in a pod"].into_iter().zip(said) {
        let said = said?;
        let told = ["reset by peer", "connection abort"].iter().any(|words| said.contains(words));
        ensure!(told, "the client {who}: {said}");
    }
    let counts = wait_for("the number of resets in the status", Duration::from_secs(20), || {
        let counts = cluster.breaker("dummy")?["status"]["established"].clone();
        let number = |name: &str| counts[name].as_i64();
        ensure!(counts["resetting"] == false && number("reset") >= Some(3) && number("left") == Some(0), "{counts}");
        Ok(Some(counts))
    })?;
    cluster.wait_event("CircuitBreaker", "dummy", "ConnectionsReset")?;
    let shown = cluster.plugin(&["status", "-n", NAMESPACE])?;
    ensure!(shown.text.contains("established connections to the primary were reset"), "{}", shown.text);
    Ok(format!("clients outside, on a node and in a pod were told when the breaker opened: {counts}"))
}

pub(super) fn primary_scaled_to_0(cluster: &Cluster) -> Result<String> {
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
    let open = load.results()?;
    let by = open.answered_by(from, now());
    ensure!(!by.is_empty() && by.iter().all(|ip| backup.contains(ip)), "answered by {by:?}");
    cluster.lab(&["scale", "deployment/dummy-deployment", "--replicas=2"])?;
    cluster.wait_state("dummy", "Closed")?;
    let results = load.end()?;
    Ok(format!(
        "open without endpoints, closed again; {} of {} requests failed",
        results.failed(0, u128::MAX).len(),
        results.requests.len()
    ))
}

/// With pods that terminate as Kubernetes recommends, a rolling update fails no request. That must hold with breaker
/// too.
pub(super) fn rolling_updates(cluster: &Cluster) -> Result<String> {
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

pub(super) fn agent_killed_and_rolled(cluster: &Cluster) -> Result<String> {
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
    cluster.wait_agents()?;
    let before = cluster.get(SYSTEM, "ds/breaker-agent", "")?["spec"]["updateStrategy"].to_string();
    let strategies = [before.as_str(), r#"{"rollingUpdate":{"maxSurge":1,"maxUnavailable":0}}"#];
    for strategy in strategies {
        let set = |strategy: &str| {
            let patch = format!(r#"{{"spec":{{"updateStrategy":{strategy}}}}}"#);
            cluster.kubectl(&["-n", SYSTEM, "patch", "ds/breaker-agent", "--type=merge", "-p", &patch])
        };
        set(strategy)?;
        cluster.kubectl(&["-n", SYSTEM, "rollout", "restart", "ds/breaker-agent"])?;
        let rolled = cluster.kubectl(&["-n", SYSTEM, "rollout", "status", "ds/breaker-agent", "--timeout=90s"]);
        set(&before)?;
        rolled.with_context(|| format!("a rollout with {strategy}"))?;
    }
    cluster.wait_programmed("dummy")?;
    let mut asked = 0;
    for load in loads {
        asked += load.end()?.none_failed()?;
    }
    let reason = cluster.breaker("dummy")?["status"]["reason"].clone();
    ensure!(reason == "HttpStatus", "the reason did not survive: {reason}");
    Ok(format!("killed everywhere, then rolled, also with maxSurge, while open: 0 of {asked} requests failed"))
}

pub(super) fn api_server_away(cluster: &Cluster) -> Result<String> {
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
    let results = load.end()?;
    let failed = results.failed(stopped, u128::MAX);
    let first = failed.iter().map(|r| r.at).min().context("nothing failed: was there a fault?")?;
    let outage = results.recovery(first, u128::MAX)?;
    let backup = ips(cluster, "backup-deployment")?;
    let by = results.answered_by(first + outage, u128::MAX);
    ensure!(!by.is_empty() && by.iter().all(|ip| backup.contains(ip)), "answered by {by:?}");
    ensure!(first < back, "the fault came after the API server was back");
    Ok(format!(
        "failed over {outage} ms after the fault, with no API server; status and Event {told_after} ms after it was back"
    ))
}

/// The primary's node loses power. One service has its backup on another node; the other has its backup on the same
/// node, and loses both. After the node has booted, its own clients fail over to the backup again.
pub(super) fn node_powered_off(cluster: &Cluster) -> Result<String> {
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
        let results = load.results()?;
        let by_backup = |r: &&crate::load::Request| r.ok && backup.iter().any(|ip| r.words.contains(&format!("{ip}:")));
        let first = results.requests.iter().filter(|r| r.at > off).filter(by_backup).map(|r| r.at).min();
        Ok(first.is_some_and(|first| now() > first + 5000).then_some(()))
    })?;
    let outage = load.results()?.recovery(off, u128::MAX)?;
    ensure!(outage < 15_000, "failover took {outage} ms; Kubernetes alone takes 40 s");
    wait_for("immediate refusals", Duration::from_secs(20), || {
        let results = doomed.results()?;
        let last: Vec<_> = results.requests.iter().rev().take(10).collect();
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
