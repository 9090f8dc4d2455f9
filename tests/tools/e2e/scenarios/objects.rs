//! Scenarios of Kubernetes objects: objects that are applied, refused, edited and deleted, and the reports about them.

use std::{thread::sleep, time::Duration};

use anyhow::{Context as _, Result, bail, ensure};
use serde_json::json;

use super::{answered_by, ips, patch, vip};
use crate::{
    cluster::{Cluster, NAMESPACE},
    load::{Load, now},
    wait_for,
};

/// TRIALS A3: `kubectl apply` client-side, then server-side, then by a second manager with the same file: no conflict, and
/// no new generation.
pub(super) fn applied_in_every_way(cluster: &Cluster) -> Result<String> {
    let samples = [
        json!({ "service": { "name": "dummy-deployment" }, "backups": [{ "name": "backup-deployment" }] }),
        json!({
            "service": { "name": "dummy-deployment", "ports": [8080] },
            "backups": [{
                "name": "backup-deployment", "weight": 3, "priority": 1,
                "check": { "httpGet": { "path": "/ready" }, "periodMillis": 500 },
            }],
            "check": { "tcpSocket": {}, "periodSeconds": 2 }, "onOpen": "Keep", "onClose": "Keep", "topology": "PreferSameNode",
            "breaker": { "openMillis": 2000, "rampMillis": 1000 }, "limits": { "newConnectionsPerSecond": 1000 },
        }),
    ];
    let delete = || cluster.lab(&["delete", "cb/dummy", "--ignore-not-found"]);
    for spec in &samples {
        delete()?;
        let object = json!({
            "apiVersion": "breaker.dev/v1alpha1", "kind": "CircuitBreaker", "metadata": { "name": "dummy" }, "spec": spec,
        });
        let text = object.to_string();
        let ways: [&[&str]; 5] = [
            &["apply", "-f", "-"],
            &["apply", "--server-side", "-f", "-"],
            &["apply", "--server-side", "--field-manager=flux", "-f", "-"],
            &["apply", "--server-side", "--field-manager=argocd", "-f", "-"],
            &["apply", "-f", "-"],
        ];
        for way in ways {
            cluster.feed(&[&["-n", NAMESPACE], way].concat(), &text).with_context(|| format!("{way:?} of {spec}"))?;
        }
        let generation = cluster.breaker("dummy")?["metadata"]["generation"].clone();
        ensure!(generation == 1, "generation {generation} after the same spec five times: {spec}");
        cluster.wait_programmed("dummy")?;
    }
    delete()?;
    Ok(format!("{} samples, client-side, server-side and by three managers: no conflict, generation 1", samples.len()))
}

/// `kubectl apply` refuses invalid specs and names the field.
pub(super) fn refused_by_kubectl(cluster: &Cluster) -> Result<String> {
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
        (with(&|s| s["check"] = json!({})), "spec.check", "exactly one of httpGet, tcpSocket, grpc, dns and udp"),
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
        (with(&|s| s["onOpen"] = json!("Drain")), "spec.drainSeconds", "is needed where onOpen"),
        (with(&|s| s["drainSeconds"] = json!(10)), "spec.drainSeconds", "has no effect otherwise"),
        (with(&|s| s["resetsPerSecond"] = json!(0)), "spec.resetsPerSecond", "greater than or equal to 1"),
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
    ensure!(words.contains("exactly one of httpGet, tcpSocket, grpc, dns and udp"), "kubectl explain: {words}");
    Ok(format!("{count} invalid specs refused, each by its field"))
}

pub(super) fn edit_override_delete(cluster: &Cluster) -> Result<String> {
    let (primary, backup) = (ips(cluster, "dummy-deployment")?, ips(cluster, "backup-deployment")?);
    let url = vip(cluster, "dummy-deployment")?;
    let ask = || cluster.ask("client", &url);
    patch(cluster, r#"{"spec":{"override":"ForceOpen"}}"#)?;
    answered_by("the backup's answer, forced open", &backup, ask)?;
    cluster.wait_state("dummy", "Open")?;
    let until = jiff::Timestamp::now() + Duration::from_secs(3);
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

pub(super) fn cross_namespace(cluster: &Cluster) -> Result<String> {
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

pub(super) fn annotations(cluster: &Cluster) -> Result<String> {
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
pub(super) fn limits(cluster: &Cluster) -> Result<String> {
    let url = vip(cluster, "dummy-deployment")?;
    // The load opens 50 connections per second. `refused`: whether more than half of those of the last 3 s failed.
    let load = Load::start(cluster, "load", &cluster.nodes[0], &url)?;
    let refused = || -> Result<bool> { Ok(load.results()?.failed(now() - 3000, now()).len() > 75) };
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

pub(super) fn two_for_one_service(cluster: &Cluster) -> Result<String> {
    // The longest name: an Event about this object has a shortened one.
    let name = format!("second-{}", "x".repeat(246));
    let second = json!({
        "apiVersion": "breaker.dev/v1alpha1", "kind": "CircuitBreaker", "metadata": { "name": name },
        "spec": { "service": { "name": "dummy-deployment" }, "backups": [{ "name": "backup-deployment" }], "override": "ForceOpen" },
    });
    // Creation times have a resolution of one second, and the second object must be newer.
    sleep(Duration::from_millis(1100));
    cluster.apply(&second.to_string())?;
    cluster.wait_condition(&name, "Accepted", "False", "Conflicted")?;
    cluster.wait_event("CircuitBreaker", &name, "Conflicted")?;
    cluster.wait_condition("dummy", "Accepted", "True", "")?;
    let primary = ips(cluster, "dummy-deployment")?;
    let url = vip(cluster, "dummy-deployment")?;
    answered_by("the primary's answer, as the older object says", &primary, || cluster.ask("client", &url))?;
    cluster.lab(&["delete", "cb", "dummy"])?;
    cluster.wait_programmed(&name)?;
    let backup = ips(cluster, "backup-deployment")?;
    answered_by("the backup's answer, as the newer object says", &backup, || cluster.ask("client", &url))?;
    Ok("the older object wins; the newer one reports the conflict, and takes over when it is alone".into())
}

/// Manifest of `count` Services and a CircuitBreaker for each, on the lab's pods. Their numbers start at `first`.
pub fn manifest_of_many(count: usize, first: usize) -> String {
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

/// Number of CircuitBreakers of [`manifest_of_many`] that are programmed.
pub fn many_programmed(cluster: &Cluster) -> Result<usize> {
    let breakers = cluster.get(NAMESPACE, "cb", "many=yes")?;
    let done = |b: &&serde_json::Value| {
        let conditions = b["status"]["conditions"].as_array().cloned().unwrap_or_default();
        conditions.iter().any(|c| c["type"] == "Programmed" && c["status"] == "True")
    };
    Ok(breakers["items"].as_array().into_iter().flatten().filter(done).count())
}

pub(super) fn two_hundred_at_once(cluster: &Cluster) -> Result<String> {
    const COUNT: usize = 200;
    let started = std::time::Instant::now();
    // One call creates them all.
    cluster.feed(&["-n", NAMESPACE, "create", "-f", "-"], &manifest_of_many(COUNT, 0))?;
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
