//! `kubectl breaker trip` and `reset`: the override of a CircuitBreaker, in its spec or its annotations, which every
//! agent follows.

use std::time::Duration;

use anyhow::Result;
use breaker_api::crd::{
    CircuitBreaker, CircuitBreakerStatus, OVERRIDE_ANNOTATION, Override, REASON_ANNOTATION, ReportedState,
    UNTIL_ANNOTATION,
};
use jiff::Timestamp;
use kube::{
    ResourceExt as _,
    api::{Patch, PatchParams},
};
use serde_json::json;
use tokio::time::{Instant, sleep};

use super::{
    args::TripArgs,
    connection::{Connection, explain},
};
use crate::{output::out, visible::visible};

/// Name of the field manager in managedFields.
const MANAGER: &str = "kubectl-breaker";
/// How long to wait until the agents have followed.
const PATIENCE: Duration = Duration::from_secs(10);

pub(super) async fn trip(connection: &Connection, args: &TripArgs) -> Result<()> {
    let until = args.duration.map(|duration| Timestamp::now() + duration);
    let end = until.map_or_else(|| "until reset".to_owned(), |until| format!("until {until:.0}"));
    let found = connection.breaker(&args.name).await?;
    let patch = match manifest_tool(&found) {
        None => json!({
            "metadata": { "annotations": {
                REASON_ANNOTATION: args.reason, OVERRIDE_ANNOTATION: null, UNTIL_ANNOTATION: null
            } },
            "spec": { "override": Override::ForceOpen, "until": until },
        }),
        Some(tool) => {
            out(&format!("{tool} may write spec.override, so annotations force the breaker, which no manifest has\n"))?;
            json!({ "metadata": { "annotations": {
                REASON_ANNOTATION: args.reason,
                OVERRIDE_ANNOTATION: Override::ForceOpen,
                UNTIL_ANNOTATION: until,
            } } })
        }
    };
    let breaker = patched(connection, &args.name, &patch, args.dry_run).await?;
    if args.dry_run {
        let (_, namespace, name) = connection.one(&args.name);
        return out(&format!("{namespace}/{name}: would be forced open {end} (dry run)\n"));
    }
    let is_open = |status: &CircuitBreakerStatus| status.state == Some(ReportedState::Open);
    follow(connection, &args.name, breaker, &format!("forced open {end}"), is_open).await
}

pub(super) async fn reset(connection: &Connection, name: &str) -> Result<()> {
    let found = connection.breaker(name).await?;
    if let (true, Some(tool)) = (found.spec.r#override != Override::Auto, manifest_tool(&found)) {
        out(&format!("{tool} may set spec.override again: remove it from the manifest\n"))?;
    }
    let patch = json!({
        "metadata": { "annotations": { REASON_ANNOTATION: null, OVERRIDE_ANNOTATION: null, UNTIL_ANNOTATION: null } },
        "spec": { "override": Override::Auto, "until": null },
    });
    let breaker = patched(connection, name, &patch, false).await?;
    // A breaker that the end of an override closed has the reason Operator, too.
    let is_free = |status: &CircuitBreakerStatus| {
        status.state != Some(ReportedState::Open) || status.reason.as_deref() != Some("Operator")
    };
    follow(connection, name, breaker, "the checks decide again", is_free).await
}

/// The tool that applies a manifest with `spec.override`, or that may do so; `None` if nothing shows one.
fn manifest_tool(breaker: &CircuitBreaker) -> Option<String> {
    // Helm 4 and others that apply on the server: such an entry has all fields of the manifest.
    let applied = breaker.managed_fields().iter().filter(|entry| entry.operation.as_deref() == Some("Apply"));
    let specs: Vec<_> =
        applied.filter_map(|entry| Some((&entry.manager, entry.fields_v1.as_ref()?.0.pointer("/f:spec")?))).collect();
    if let Some((manager, _)) = specs.iter().find(|(_, spec)| spec.get("f:override").is_some()) {
        return Some(manager.as_ref().cloned().unwrap_or_default());
    }
    if !specs.is_empty() {
        return None;
    }
    let annotation = |name: &str| breaker.annotations().get(name);
    let applied = annotation("kubectl.kubernetes.io/last-applied-configuration");
    let applied = applied.and_then(|text| serde_json::from_str::<serde_json::Value>(text).ok());
    if applied.is_some_and(|manifest| manifest.pointer("/spec/override").is_some()) {
        return Some("kubectl apply".to_owned());
    }
    // Helm 3 leaves no trace of the fields that it writes.
    annotation("meta.helm.sh/release-name").map(|release| format!("Helm (release {release})"))
}

async fn patched(
    connection: &Connection,
    name: &str,
    patch: &serde_json::Value,
    dry_run: bool,
) -> Result<CircuitBreaker> {
    let (api, namespace, name) = connection.one(name);
    let params = PatchParams { field_manager: Some(MANAGER.into()), dry_run, ..PatchParams::default() };
    let outcome = api.patch(name, &params, &Patch::Merge(patch)).await;
    outcome.map_err(|error| explain(error, &format!("change {namespace}/{name}")))
}

/// Waits until the agents have taken the change over, and reports how far they are.
async fn follow(
    connection: &Connection,
    name: &str,
    mut breaker: CircuitBreaker,
    what: &str,
    is_wanted: impl Fn(&CircuitBreakerStatus) -> bool,
) -> Result<()> {
    let generation = breaker.metadata.generation.unwrap_or_default();
    let end = Instant::now() + PATIENCE;
    while !is_followed(&breaker, generation, &is_wanted) && Instant::now() < end {
        sleep(Duration::from_millis(200)).await;
        breaker = connection.breaker(name).await?;
    }
    let status = visible(&breaker.status.clone().unwrap_or_default())?;
    let counts = &status.counts;
    let progress = if counts.nodes == 0 {
        "no agent has reported yet; is breaker running? kubectl breaker check says more".to_owned()
    } else if is_followed(&breaker, generation, &is_wanted) {
        let state = status.state.map_or("", ReportedState::label);
        format!("{state} on all of {} nodes", counts.nodes)
    } else {
        format!(
            "in force on {} of {} nodes after {} s; kubectl breaker status -o wide shows the others",
            counts.programmed,
            counts.nodes,
            PATIENCE.as_secs()
        )
    };
    let (_, namespace, name) = connection.one(name);
    out(&format!("{namespace}/{name}: {what}: {progress}\n"))
}

/// Returns `true` if every node has the generation in force, with a status that is wanted.
fn is_followed(breaker: &CircuitBreaker, generation: i64, is_wanted: &impl Fn(&CircuitBreakerStatus) -> bool) -> bool {
    breaker.status.as_ref().is_some_and(|status| {
        status.observed_generation >= generation
            && status.counts.nodes > 0
            && status.counts.programmed == status.counts.nodes
            && status.state.is_some()
            && is_wanted(status)
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn breaker(metadata: serde_json::Value) -> CircuitBreaker {
        let spec = json!({ "service": { "name": "web" }, "backups": [{ "name": "spare" }] });
        let object = json!({
            "apiVersion": "breaker.dev/v1alpha1", "kind": "CircuitBreaker", "metadata": metadata, "spec": spec,
        });
        serde_json::from_value(object).unwrap()
    }

    #[test]
    fn a_manifest_with_an_override_is_recognized() {
        let managed = |manager: &str, operation: &str, fields: serde_json::Value| json!({ "managedFields": [{ "manager": manager, "operation": operation, "fieldsV1": { "f:spec": fields } }] });
        let applied = |spec: &str| json!({ "annotations": { "kubectl.kubernetes.io/last-applied-configuration": format!("{{\"spec\":{spec}}}") } });
        let cases = [
            (json!({}), None),
            (managed("helm", "Apply", json!({ "f:override": {} })), Some("helm")),
            (managed("helm", "Apply", json!({ "f:service": {} })), None),
            // An update of another field owns defaults, too.
            (managed("kubectl-edit", "Update", json!({ "f:override": {} })), None),
            (applied("{\"override\":\"Auto\"}"), Some("kubectl apply")),
            (applied("{}"), None),
            (json!({ "annotations": { "meta.helm.sh/release-name": "shop" } }), Some("Helm (release shop)")),
        ];
        for (metadata, expected) in cases {
            assert_eq!(manifest_tool(&breaker(metadata.clone())).as_deref(), expected, "{metadata}");
        }
    }
}
