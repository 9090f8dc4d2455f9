//! The chart with real Helm, of every version that was given.

use std::{
    path::Path,
    process::{Command, Stdio},
    time::Duration,
};

use anyhow::{Context as _, Result, bail, ensure};

use super::vip;
use crate::{
    cluster::{Cluster, SYSTEM, Said},
    wait_for,
};

const LONG: Duration = Duration::from_secs(40);
const RELEASE: &str = "breaker";
const CHART: &str = "k8s/chart";

/// With each Helm: checks the chart, takes over the objects of `k8s/base`, changes a value, rolls back, uninstalls, and
/// installs on a clean cluster. Afterwards nothing of breaker is on a node, and `k8s/base` is installed again.
pub(super) fn chart(cluster: &Cluster) -> Result<String> {
    let outcome = cluster.hooks.helm.iter().try_for_each(|helm| {
        let version = Helm { program: helm, cluster }.run(&["version", "--short"])?;
        with(&Helm { program: helm, cluster }, version.trim().starts_with("v4"))
            .with_context(|| format!("with Helm {}", version.trim()))
    });
    let back = cluster.kubectl(&["apply", "-k", "k8s/base"]).and_then(|_| cluster.wait_agents());
    outcome.and(back)?;
    cluster.wait_programmed("dummy")?;
    Ok(format!("{} versions: taken over, changed, rolled back, uninstalled, installed", cluster.hooks.helm.len()))
}

struct Helm<'a> {
    program: &'a Path,
    cluster: &'a Cluster,
}

impl Helm<'_> {
    fn say(&self, args: &[&str]) -> Result<Said> {
        let mut command = Command::new(self.program);
        command.env("KUBECONFIG", self.cluster.kubeconfig()).args(args).stdin(Stdio::null());
        Said::by(&mut command)
    }

    fn run(&self, args: &[&str]) -> Result<String> {
        let said = self.say(args)?;
        ensure!(said.success, "helm {}: {}", args.join(" "), said.text);
        Ok(said.text)
    }

    /// Installs the chart or changes its release, and waits for the agents.
    fn upgrade(&self, args: &[&str]) -> Result<()> {
        let all = [&["upgrade", "--install", RELEASE, CHART, "-n", SYSTEM, "--wait", "--timeout=90s"], args].concat();
        self.run(&all)?;
        self.cluster.wait_agents()
    }
}

fn with(helm: &Helm<'_>, is_4: bool) -> Result<()> {
    let cluster = helm.cluster;
    helm.run(&["lint", CHART])?;
    // A typo is refused, with its name.
    for (wrong, named) in [("metrics.enabld=true", "enabld"), ("metrics.port=70000", "port")] {
        let said = helm.say(&["lint", CHART, "--set", wrong])?;
        ensure!(!said.success && said.text.contains(named), "{wrong}: {}", said.text);
    }

    // From k8s/base to the chart. The agents are the same before and after: their pods have the same template.
    cluster.kubectl(&["apply", "-k", "k8s/base"])?;
    cluster.wait_agents()?;
    let forced: &[&str] = if is_4 { &["--take-ownership", "--force-conflicts"] } else { &["--take-ownership"] };
    helm.upgrade(forced)?;
    cluster.wait_programmed("dummy")?;

    // A changed value restarts the agents, connections go on, and a rollback takes it back.
    let url = vip(cluster, "dummy-deployment")?;
    let config = || cluster.kubectl(&["-n", SYSTEM, "get", "cm/breaker-agent", "-o", "jsonpath={.data}"]);
    let pods = || cluster.kubectl(&["-n", SYSTEM, "get", "pods", "-o", "jsonpath={.items[*].metadata.uid}"]);
    let before = (config()?, pods()?);
    // Until a value changes, kubectl owns the same fields.
    let forced: &[&str] = if is_4 { &["--force-conflicts"] } else { &[] };
    helm.upgrade(&[&["--set", "metrics.enabled=true", "--set", "agent.metrics.level=Summary"], forced].concat())?;
    ensure!(config()?.contains("Summary"), "the value is not in force: {}", config()?);
    ensure!(pods()? != before.1, "the agents were not restarted");
    cluster.ask("client", &url)?;
    cluster.wait_programmed("dummy")?;
    helm.run(&["rollback", RELEASE, "-n", SYSTEM, "--wait", "--timeout=90s"])?;
    ensure!(config()? == before.0, "not as before: {}", config()?);

    gone(helm)?;
    // On a cluster without agents.
    helm.upgrade(&[])?;
    cluster.wait_programmed("dummy")?;
    gone(helm)
}

/// Uninstalls the release. No node has anything of breaker then, the statuses say that nobody protects the Services, and
/// the user's objects are still there.
fn gone(helm: &Helm<'_>) -> Result<()> {
    let cluster = helm.cluster;
    helm.run(&["uninstall", RELEASE, "-n", SYSTEM, "--wait", "--timeout=120s"])?;
    for node in &cluster.nodes {
        let left = cluster.on_node(node, "ls -d /sys/fs/bpf/breaker /run/breaker/breaker.sock 2> /dev/null; true")?;
        ensure!(left.trim().is_empty(), "left on {node}: {left}");
    }
    wait_for("the status after the uninstall", LONG, || match cluster.condition("dummy", "Programmed")? {
        (status, reason) if (status.as_str(), reason.as_str()) == ("Unknown", "NoAgents") => Ok(Some(())),
        (status, reason) => bail!("Programmed is {status} ({reason})"),
    })?;
    let left =
        cluster.kubectl(&["get", "clusterroles,clusterrolebindings,daemonsets,configmaps,jobs", "-A", "-o", "name"])?;
    let ours: Vec<&str> = left.lines().filter(|name| name.contains("breaker") && !name.contains("e2e")).collect();
    ensure!(ours.is_empty(), "left in the cluster: {ours:?}");
    Ok(())
}
