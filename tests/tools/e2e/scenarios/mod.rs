//! The list of scenarios. Every scenario starts from the lab as `k8s/lab` defines it, with the breaker
//! closed.

mod chart;
mod choices;
mod dashboard;
mod disturbances;
mod matrix;
mod objects;
mod people;
mod setup;
mod traffic;

pub use objects::{manifest_of_many, many_programmed};
pub use setup::{install, restore_lab, uninstall};

use std::time::Duration;

use anyhow::{Context as _, Result, bail};

use crate::{
    cluster::{Cluster, NAMESPACE},
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

fn needs_nodes(cluster: &Cluster) -> Option<&'static str> {
    cluster.hooks.on_node.is_none().then_some("no --on-node")
}

fn needs_helm(cluster: &Cluster) -> Option<&'static str> {
    if cluster.hooks.helm.is_empty() { Some("no --helm") } else { needs_nodes(cluster) }
}

fn needs_lan_and_nodes(cluster: &Cluster) -> Option<&'static str> {
    needs_lan(cluster).or_else(|| needs_nodes(cluster))
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
    Scenario { name: "lab", skip: always, play: traffic::lab },
    Scenario { name: "lab-from-lan", skip: needs_lan, play: traffic::lab_from_lan },
    Scenario { name: "families-and-datagrams", skip: always, play: traffic::families_and_datagrams },
    Scenario { name: "kube-proxy-choices", skip: needs_nodes, play: choices::kube_proxy_choices },
    Scenario { name: "opening-widens-nothing", skip: needs_lan, play: matrix::opening_widens_nothing },
    Scenario { name: "applied-in-every-way", skip: always, play: objects::applied_in_every_way },
    Scenario { name: "local-backups", skip: needs_lan, play: traffic::local_backups },
    Scenario { name: "people-and-their-rights", skip: always, play: people::people },
    Scenario { name: "dashboard", skip: always, play: dashboard::dashboard },
    Scenario { name: "refused-by-kubectl", skip: always, play: objects::refused_by_kubectl },
    Scenario { name: "edit-override-delete", skip: always, play: objects::edit_override_delete },
    Scenario { name: "waiting-clients", skip: needs_lan_and_nodes, play: disturbances::waiting_clients },
    Scenario { name: "primary-pods-deleted", skip: always, play: disturbances::primary_pods_deleted },
    Scenario { name: "primary-scaled-to-0", skip: always, play: disturbances::primary_scaled_to_0 },
    Scenario { name: "rolling-updates", skip: always, play: disturbances::rolling_updates },
    Scenario { name: "agent-killed-and-rolled", skip: always, play: disturbances::agent_killed_and_rolled },
    Scenario { name: "cross-namespace", skip: always, play: objects::cross_namespace },
    Scenario { name: "annotations", skip: always, play: objects::annotations },
    Scenario { name: "limits", skip: always, play: objects::limits },
    Scenario { name: "two-for-one-service", skip: always, play: objects::two_for_one_service },
    Scenario { name: "two-hundred-at-once", skip: always, play: objects::two_hundred_at_once },
    Scenario { name: "api-server-away", skip: needs_api, play: disturbances::api_server_away },
    Scenario { name: "chart", skip: needs_helm, play: chart::chart },
    Scenario { name: "node-powered-off", skip: needs_power, play: disturbances::node_powered_off },
];

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
