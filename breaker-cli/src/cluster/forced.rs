//! `kubectl breaker trip` and `reset`: the override in the spec of a CircuitBreaker, which every agent follows.

use std::time::Duration;

use anyhow::Result;
use breaker_api::crd::{CircuitBreaker, Override, REASON_ANNOTATION, ReportedState};
use jiff::Timestamp;
use kube::api::{Patch, PatchParams};
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
    let patch = json!({
        "metadata": { "annotations": { REASON_ANNOTATION: args.reason } },
        "spec": { "override": Override::ForceOpen, "until": until },
    });
    let breaker = patched(connection, &args.name, &patch).await?;
    let end = until.map_or_else(|| "until reset".to_owned(), |until| format!("until {until:.0}"));
    follow(connection, &args.name, breaker, &format!("forced open {end}"), |state| state == ReportedState::Open).await
}

pub(super) async fn reset(connection: &Connection, name: &str) -> Result<()> {
    let patch = json!({
        "metadata": { "annotations": { REASON_ANNOTATION: null } },
        "spec": { "override": Override::Auto, "until": null },
    });
    let breaker = patched(connection, name, &patch).await?;
    follow(connection, name, breaker, "the checks decide again", |_| true).await
}

async fn patched(connection: &Connection, name: &str, patch: &serde_json::Value) -> Result<CircuitBreaker> {
    let (api, namespace, name) = connection.one(name);
    let params = PatchParams { field_manager: Some(MANAGER.into()), ..PatchParams::default() };
    let outcome = api.patch(name, &params, &Patch::Merge(patch)).await;
    outcome.map_err(|error| explain(error, &format!("change {namespace}/{name}")))
}

/// Waits until the agents have taken the change over, and reports how far they are.
async fn follow(
    connection: &Connection,
    name: &str,
    mut breaker: CircuitBreaker,
    what: &str,
    is_wanted: impl Fn(ReportedState) -> bool,
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

/// Whether every node has the generation in force, with a state that is wanted.
fn is_followed(breaker: &CircuitBreaker, generation: i64, is_wanted: &impl Fn(ReportedState) -> bool) -> bool {
    breaker.status.as_ref().is_some_and(|status| {
        status.observed_generation >= generation
            && status.counts.nodes > 0
            && status.counts.programmed == status.counts.nodes
            && status.state.is_some_and(is_wanted)
    })
}
