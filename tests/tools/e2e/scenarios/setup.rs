//! Installs breaker and the lab, restores the lab between scenarios, and removes everything.

use std::{path::Path, time::Duration};

use anyhow::{Context as _, Result, bail, ensure};
use serde_json::json;

use super::ips;
use crate::{
    cluster::{Cluster, NAMESPACE, SYSTEM, shell},
    load::pod,
    wait_for,
};

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
    cluster.wait_agents()?;
    let namespace = json!({ "apiVersion": "v1", "kind": "Namespace", "metadata": { "name": NAMESPACE } });
    cluster.feed(&["apply", "-f", "-"], &namespace.to_string())?;
    for (name, host) in [("client", false), ("host", true)] {
        cluster.apply(&pod(name, &cluster.nodes[0], &["wait"], host))?;
    }
    lab_up(cluster)
}

pub(super) fn lab_up(cluster: &Cluster) -> Result<()> {
    cluster.lab(&["apply", "-k", "k8s/lab"])?;
    for app in ["dummy-deployment", "backup-deployment"] {
        cluster.lab(&["rollout", "status", &format!("deployment/{app}"), "--timeout=60s"])?;
    }
    cluster.lab(&["wait", "--for=condition=Ready", "pod/client", "pod/host", "--timeout=30s"])?;
    cluster.wait_programmed("dummy")
}

/// Restores the lab to its manifests, with the breaker closed and both Services healthy.
pub fn restore_lab(cluster: &Cluster) -> Result<()> {
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

pub(super) fn cleanup_job(node: &str) -> Result<String> {
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
