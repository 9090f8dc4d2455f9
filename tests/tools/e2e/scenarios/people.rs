//! What people may do, with the roles and the admission policies, and how `kubectl breaker` tells them.

use std::time::Duration;

use anyhow::{Context as _, Result, bail, ensure};
use serde_json::Value;

use crate::{
    cluster::{Cluster, NAMESPACE, Said},
    wait_for,
};

const LONG: Duration = Duration::from_secs(40);

/// Bindings in the lab's namespace: each user has one of the cluster's own roles, and `deployer` may change Services only.
const BINDINGS: &str = r#"
{apiVersion: rbac.authorization.k8s.io/v1, kind: RoleBinding, metadata: {name: viewer},
 roleRef: {apiGroup: rbac.authorization.k8s.io, kind: ClusterRole, name: view},
 subjects: [{apiGroup: rbac.authorization.k8s.io, kind: User, name: viewer}]}
---
{apiVersion: rbac.authorization.k8s.io/v1, kind: RoleBinding, metadata: {name: editor},
 roleRef: {apiGroup: rbac.authorization.k8s.io, kind: ClusterRole, name: edit},
 subjects: [{apiGroup: rbac.authorization.k8s.io, kind: User, name: editor}]}
---
{apiVersion: rbac.authorization.k8s.io/v1, kind: RoleBinding, metadata: {name: owner},
 roleRef: {apiGroup: rbac.authorization.k8s.io, kind: ClusterRole, name: admin},
 subjects: [{apiGroup: rbac.authorization.k8s.io, kind: User, name: owner}]}
---
{apiVersion: rbac.authorization.k8s.io/v1, kind: Role, metadata: {name: deployer},
 rules: [{apiGroups: [""], resources: [services], verbs: [get, patch, update]}]}
---
{apiVersion: rbac.authorization.k8s.io/v1, kind: RoleBinding, metadata: {name: deployer},
 roleRef: {apiGroup: rbac.authorization.k8s.io, kind: Role, name: deployer},
 subjects: [{apiGroup: rbac.authorization.k8s.io, kind: User, name: deployer}]}
"#;

/// Runs `kubectl breaker` as a user, in the lab's namespace.
fn plugin_as(cluster: &Cluster, user: &str, args: &[&str]) -> Result<Said> {
    cluster.plugin(&[&["-n", NAMESPACE, "--as", user], args].concat())
}

/// Patches an object of the lab as a user. The error is what kubectl says.
fn patch_as(cluster: &Cluster, user: &str, object: &str, patch: &str) -> Result<()> {
    let said = cluster.lab(&["patch", object, "--as", user, "--type=merge", "-p", patch]);
    said.map(drop)
}

/// Fails unless an action was refused with all of these words.
fn refused(outcome: Result<impl Sized>, words: &[&str]) -> Result<()> {
    let Err(error) = outcome else { bail!("it was allowed; expected: {words:?}") };
    let text = format!("{error:#}");
    ensure!(words.iter().all(|word| text.contains(word)), "{text}; expected: {words:?}");
    Ok(())
}

pub(super) fn people(cluster: &Cluster) -> Result<String> {
    let policies = ebpf_builder::workspace().join("k8s/admission");
    let policies = policies.to_str().context("a path in UTF-8")?;
    cluster.kubectl(&["apply", "-k", policies])?;
    cluster.apply(BINDINGS)?;
    let outcome = with_policies(cluster);
    cluster.kubectl(&["delete", "-k", policies])?;
    for name in ["viewer", "editor", "owner", "deployer"] {
        cluster.lab(&["delete", "rolebinding", name])?;
    }
    cluster.lab(&["delete", "role", "deployer"])?;
    outcome
}

/// A tool applies a manifest with `spec.override`, on the server as Helm 4 and Flux do: an operator trips the breaker all
/// the same, the tool's next application neither fails nor takes it back, and a reset ends it (TRIALS J6).
fn beside_a_manifest(cluster: &Cluster) -> Result<()> {
    // The whole manifest: kubectl hands the fields of an earlier application on the client over to this manager.
    let manifest = std::fs::read_to_string("k8s/lab/circuitbreaker.yaml").context("read the lab's CircuitBreaker")?;
    let manifest = manifest.replace("\nspec:\n", "\nspec:\n  override: Auto\n");
    let apply = || {
        let args =
            ["-n", NAMESPACE, "apply", "--server-side", "--force-conflicts", "--field-manager=release", "-f", "-"];
        cluster.feed(&args, &manifest)
    };
    cluster.wait_state("dummy", "Closed")?;
    apply()?;
    let annotate = r#"{"metadata":{"annotations":{"breaker.dev/override":"ForceOpen"}}}"#;
    refused(patch_as(cluster, "editor", "cb/dummy", annotate), &["editor may not force a breaker"])?;
    let said = plugin_as(cluster, "owner", &["trip", "dummy", "--dry-run"])?;
    ensure!(said.success && said.text.contains("would be forced open until reset (dry run)"), "{}", said.text);
    let said = plugin_as(cluster, "owner", &["trip", "dummy", "--for", "1h"])?;
    let nodes = cluster.nodes.len();
    for words in ["release may write spec.override", &format!("Open on all of {nodes} nodes")] {
        ensure!(said.success && said.text.contains(words), "{words}: {}", said.text);
    }
    apply()?;
    let breaker = cluster.breaker("dummy")?;
    ensure!(breaker["spec"]["override"] == "Auto", "{breaker}");
    ensure!(breaker["metadata"]["annotations"]["breaker.dev/override"] == "ForceOpen", "{breaker}");
    let seen = plugin_as(cluster, "viewer", &["status"])?;
    ensure!(seen.text.contains("ForceOpen until 20"), "{}", seen.text);
    cluster.wait_state("dummy", "Open")?;
    let said = plugin_as(cluster, "owner", &["reset", "dummy"])?;
    ensure!(said.success && said.text.contains(&format!("Closed on all of {nodes} nodes")), "{}", said.text);
    Ok(())
}

fn with_policies(cluster: &Cluster) -> Result<String> {
    // The API server takes a policy into use after a moment.
    let forced = r#"{"spec":{"override":"ForceOpen"}}"#;
    let denied =
        || patch_as(cluster, "editor", "cb/dummy", forced).is_err_and(|e| e.to_string().contains("breaker-override"));
    wait_for("the policy and the roles", LONG, || {
        let is_denied = denied();
        // Whoever was faster than the policy has opened the breaker.
        cluster.lab(&["patch", "cb/dummy", "--type=merge", "-p", r#"{"spec":{"override":"Auto"}}"#])?;
        Ok(is_denied.then_some(()))
    })?;
    // The status follows an override that was set before the policy was in use.
    cluster.wait_state("dummy", "Closed")?;
    cluster.wait_programmed("dummy")?;

    // A viewer sees, and may not change.
    let seen = plugin_as(cluster, "viewer", &["status"])?;
    ensure!(seen.success && seen.text.contains("dummy") && seen.text.contains("Closed"), "{}", seen.text);
    ensure!(seen.text.contains("without the nodes' own views"), "{}", seen.text);
    let said = plugin_as(cluster, "viewer", &["trip", "dummy"])?;
    ensure!(!said.success && said.text.contains("ask for the role breaker-view or breaker-edit"), "{}", said.text);

    // An editor changes, and may not force, nor bypass NetworkPolicies.
    patch_as(cluster, "editor", "cb/dummy", r#"{"spec":{"onClose":"Reset"}}"#)?;
    patch_as(cluster, "editor", "cb/dummy", r#"{"spec":{"onClose":"Keep"}}"#)?;
    let said = plugin_as(cluster, "editor", &["trip", "dummy", "--for", "1h"])?;
    let words = "editor may not force a breaker; allowed: leave them as they are, or ask for the role breaker-override";
    ensure!(!said.success && said.text.contains(words), "{}", said.text);
    let fast = r#"{"spec":{"fastPath":"PeerRedirect"}}"#;
    refused(
        patch_as(cluster, "editor", "cb/dummy", fast),
        &["spec.fastPath", "editor may not bypass NetworkPolicies"],
    )?;
    refused(patch_as(cluster, "owner", "cb/dummy", fast), &["breaker-fast-path"])?;

    // Whoever may change Services only can neither redirect nor force them.
    let annotate = |name: &str, value: &str| {
        let patch = format!(r#"{{"metadata":{{"annotations":{{"breaker.dev/{name}":"{value}"}}}}}}"#);
        patch_as(cluster, "deployer", "svc/backup-deployment", &patch)
    };
    refused(annotate("backup", "dummy-deployment"), &["breaker.dev/backup", "deployer may not redirect a Service"])?;
    refused(annotate("override", "ForceOpen"), &["breaker.dev/override", "deployer may not force a breaker"])?;
    refused(annotate("fast-path", "PeerRedirect"), &["deployer may not bypass NetworkPolicies"])?;
    patch_as(cluster, "deployer", "svc/backup-deployment", r#"{"metadata":{"annotations":{"example.com/x":"y"}}}"#)?;

    // The admin of the namespace forces, says why, and everybody sees it.
    let said = plugin_as(cluster, "owner", &["trip", "dummy", "--for", "1h", "--reason", "database migration"])?;
    let nodes = cluster.nodes.len();
    ensure!(said.success && said.text.contains(&format!("Open on all of {nodes} nodes")), "{}", said.text);
    let seen = plugin_as(cluster, "viewer", &["status"])?;
    for words in ["Open", "Operator", "ForceOpen until 20", "database migration"] {
        ensure!(seen.text.contains(words), "{words}: {}", seen.text);
    }
    wait_for("the reason in the status", LONG, || {
        let breaker = cluster.breaker("dummy")?;
        Ok(breaker["status"]["message"].as_str().is_some_and(|m| m.contains("database migration")).then_some(()))
    })?;
    wait_for("the Event", LONG, || {
        let said = plugin_as(cluster, "viewer", &["events", "dummy"])?;
        Ok((said.text.contains("Opened") && said.text.contains("database migration")).then_some(()))
    })?;
    let wide = cluster.plugin(&["-n", NAMESPACE, "status", "-o", "wide"])?;
    ensure!(cluster.nodes.iter().all(|node| wide.text.contains(node.as_str())), "{}", wide.text);
    let one: Value = serde_json::from_str(&cluster.plugin(&["-n", NAMESPACE, "get", "dummy", "-o", "json"])?.text)?;
    ensure!(one["circuitBreakers"][0]["overrideReason"] == "database migration", "{one}");
    ensure!(one["nodes"].as_array().is_some_and(|found| found.len() == nodes), "{one}");
    let flows = cluster.plugin(&["-n", NAMESPACE, "flows", "dummy"])?;
    ensure!(flows.success && cluster.nodes.iter().all(|node| flows.text.contains(node.as_str())), "{}", flows.text);
    let said = plugin_as(cluster, "owner", &["reset", "dummy"])?;
    ensure!(said.success && said.text.contains("the checks decide again"), "{}", said.text);

    beside_a_manifest(cluster)?;

    // The check of the installation, and its exit code.
    let said = cluster.plugin(&["-n", NAMESPACE, "check", "--wait", "60s"])?;
    ensure!(said.success && said.text.contains(&format!("all of {nodes} agents are ready")), "{}", said.text);
    let said = plugin_as(cluster, "viewer", &["check", "-o", "json"])?;
    let findings: Vec<Value> = serde_json::from_str(&said.text).context("the findings as JSON")?;
    ensure!(
        findings
            .iter()
            .any(|finding| finding["text"] == format!("you may not change breakers in namespace {NAMESPACE}")),
        "{}",
        said.text
    );
    let said = cluster.plugin(&["-n", NAMESPACE, "status", "nothing"])?;
    ensure!(!said.success && said.text.contains("there is no CircuitBreaker nothing here"), "{}", said.text);
    let said = cluster.plugin(&["-n", NAMESPACE, "__complete", "trip", "du"])?;
    ensure!(said.text == "dummy\n:4\n", "{}", said.text);
    Ok("a viewer, an editor, an admin of the namespace and a deployer: allowed and refused as documented".into())
}
