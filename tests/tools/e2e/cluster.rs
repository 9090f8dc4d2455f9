//! Access to the cluster under test: kubectl, and the commands given as options.

use std::{
    io::Write as _,
    path::{Path, PathBuf},
    process::{Command, Stdio},
    time::Duration,
};

use anyhow::{Context as _, Result, bail};
use serde_json::Value;

use breaker_tests::lab::binary;

use crate::wait_for;

/// Namespace of the lab.
pub const NAMESPACE: &str = "breaker-e2e";
/// Namespace of breaker.
pub const SYSTEM: &str = "breaker-system";

/// Commands for actions that kubectl cannot carry out; `None` for commands that were not given.
pub struct Hooks {
    pub load_image: String,
    pub lan: Option<String>,
    pub on_node: Option<String>,
    pub node: Option<(String, String)>,
    pub api: Option<(String, String)>,
    pub helm: Vec<PathBuf>,
}

/// What a program said, on standard output and standard error.
pub struct Said {
    pub success: bool,
    pub text: String,
}

impl Said {
    /// Runs a program to its end.
    pub fn by(command: &mut Command) -> Result<Self> {
        let output = command.output().with_context(|| format!("start {}", command.get_program().display()))?;
        let text = String::from_utf8_lossy(&output.stdout) + String::from_utf8_lossy(&output.stderr);
        Ok(Self { success: output.status.success(), text: text.into_owned() })
    }
}

pub struct Cluster {
    kubeconfig: PathBuf,
    pub hooks: Hooks,
    pub nodes: Vec<String>,
}

impl Cluster {
    pub fn new(kubeconfig: PathBuf, hooks: Hooks) -> Result<Self> {
        if Command::new("kubectl")
            .arg("version")
            .arg("--client")
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .status()
            .is_err()
        {
            bail!("kubectl is not on the PATH; install k3s, or kubectl from kubernetes.io");
        }
        let mut cluster = Self { kubeconfig, hooks, nodes: Vec::new() };
        let nodes = cluster.get("", "nodes", "")?;
        let names = nodes["items"].as_array().into_iter().flatten().filter_map(|n| n["metadata"]["name"].as_str());
        cluster.nodes = names.map(str::to_owned).collect();
        cluster.nodes.sort();
        Ok(cluster)
    }

    pub fn kubeconfig(&self) -> &Path {
        &self.kubeconfig
    }

    fn command(&self, args: &[&str]) -> Command {
        let mut command = Command::new("kubectl");
        command.env("KUBECONFIG", &self.kubeconfig).arg("--request-timeout=20s").args(args);
        command
    }

    /// Runs kubectl, and returns its standard output.
    pub fn kubectl(&self, args: &[&str]) -> Result<String> {
        let output = self.command(args).stdin(Stdio::null()).output().context("start kubectl")?;
        if !output.status.success() {
            bail!("kubectl {}: {}", args.join(" "), String::from_utf8_lossy(&output.stderr).trim());
        }
        Ok(String::from_utf8_lossy(&output.stdout).into_owned())
    }

    /// A command that runs `kubectl breaker`.
    pub fn plugin_command(&self, args: &[&str]) -> Result<Command> {
        let mut command = Command::new(binary("breaker")?);
        command.env("KUBECONFIG", &self.kubeconfig).env("NO_COLOR", "1").stdin(Stdio::null()).arg("cluster").args(args);
        Ok(command)
    }

    /// Runs `kubectl breaker`.
    pub fn plugin(&self, args: &[&str]) -> Result<Said> {
        Said::by(&mut self.plugin_command(args)?)
    }

    /// Waits until the current version of the agent runs on all nodes.
    pub fn wait_agents(&self) -> Result<()> {
        self.kubectl(&["-n", SYSTEM, "rollout", "status", "ds/breaker-agent", "--timeout=60s"]).map(drop)
    }

    /// Runs kubectl in the lab's namespace.
    pub fn lab(&self, args: &[&str]) -> Result<String> {
        self.kubectl(&[&["-n", NAMESPACE], args].concat())
    }

    /// Runs kubectl with a manifest on its standard input.
    pub fn feed(&self, args: &[&str], manifest: &str) -> Result<String> {
        let mut child = self
            .command(args)
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()
            .context("start kubectl")?;
        child.stdin.take().context("kubectl's standard input")?.write_all(manifest.as_bytes())?;
        let output = child.wait_with_output()?;
        if !output.status.success() {
            bail!("kubectl {}: {}", args.join(" "), String::from_utf8_lossy(&output.stderr).trim());
        }
        Ok(String::from_utf8_lossy(&output.stdout).into_owned())
    }

    /// Applies a manifest in the lab's namespace.
    pub fn apply(&self, manifest: &str) -> Result<()> {
        self.feed(&["-n", NAMESPACE, "apply", "-f", "-"], manifest).map(drop)
    }

    /// Objects as JSON. An empty namespace or selector is left out.
    pub fn get(&self, namespace: &str, what: &str, selector: &str) -> Result<Value> {
        let mut args = vec!["get", what, "-o", "json"];
        if !namespace.is_empty() {
            args.extend(["-n", namespace]);
        }
        if !selector.is_empty() {
            args.extend(["-l", selector]);
        }
        Ok(serde_json::from_str(&self.kubectl(&args)?)?)
    }

    /// A CircuitBreaker of the lab.
    pub fn breaker(&self, name: &str) -> Result<Value> {
        self.get(NAMESPACE, &format!("cb/{name}"), "")
    }

    /// Running pods of a Deployment, without those that are terminating.
    pub fn pods(&self, app: &str) -> Result<Vec<Pod>> {
        let pods = self.get(NAMESPACE, "pods", &format!("app={app}"))?;
        let found =
            pods["items"].as_array().into_iter().flatten().filter(|pod| pod["metadata"]["deletionTimestamp"].is_null());
        let pod = |pod: &Value| {
            let ips = pod["status"]["podIPs"].as_array().into_iter().flatten();
            let ips = ips.filter_map(|ip| Some(ip["ip"].as_str()?.to_owned())).collect();
            (pod["status"]["phase"] == "Running").then_some(())?;
            let node = pod["spec"]["nodeName"].as_str()?.to_owned();
            Some(Pod { ip: pod["status"]["podIP"].as_str()?.to_owned(), ips, node })
        };
        Ok(found.filter_map(pod).collect())
    }

    /// The agent's pod on a node.
    pub fn agent_on(&self, node: &str) -> Result<String> {
        let pods = self.get(SYSTEM, "pods", "app.kubernetes.io/component=agent")?;
        let on_node = |pod: &&Value| pod["spec"]["nodeName"] == *node;
        let pod = pods["items"].as_array().into_iter().flatten().find(on_node);
        let name = pod.and_then(|pod| pod["metadata"]["name"].as_str());
        Ok(name.with_context(|| format!("there is no agent on {node}"))?.to_owned())
    }

    /// The name and the internal IP addresses of every node.
    pub fn node_addresses(&self) -> Result<Vec<(String, Vec<String>)>> {
        let nodes = self.get("", "nodes", "")?;
        let addresses = |node: &Value| {
            let all = node["status"]["addresses"].as_array().into_iter().flatten();
            let internal = all.filter(|a| a["type"] == "InternalIP");
            let ips = internal.filter_map(|a| Some(a["address"].as_str()?.to_owned())).collect();
            Some((node["metadata"]["name"].as_str()?.to_owned(), ips))
        };
        Ok(nodes["items"].as_array().into_iter().flatten().filter_map(addresses).collect())
    }

    /// A condition of a CircuitBreaker: status and reason.
    pub fn condition(&self, name: &str, type_: &str) -> Result<(String, String)> {
        let breaker = self.breaker(name)?;
        let conditions = breaker["status"]["conditions"].as_array().cloned().unwrap_or_default();
        let found = conditions
            .iter()
            .find(|c| c["type"] == type_)
            .with_context(|| format!("{name} has no condition {type_} yet"))?;
        let text = |field: &str| found[field].as_str().unwrap_or_default().to_owned();
        Ok((text("status"), text("reason")))
    }

    /// Waits for a condition's status and reason (empty = any).
    pub fn wait_condition(&self, name: &str, type_: &str, status: &str, reason: &str) -> Result<()> {
        wait_for(&format!("{name}: {type_}={status} {reason}"), Duration::from_secs(40), || {
            let (is, why) = self.condition(name, type_)?;
            if is == status && (reason.is_empty() || why == reason) {
                return Ok(Some(()));
            }
            bail!("now {type_}={is} {why}")
        })
    }

    /// Waits until every node has programmed the object's current generation.
    pub fn wait_programmed(&self, name: &str) -> Result<()> {
        wait_for(&format!("{name} to be programmed everywhere"), Duration::from_secs(40), || {
            let breaker = self.breaker(name)?;
            let conditions = breaker["status"]["conditions"].as_array().cloned().unwrap_or_default();
            let done = conditions.iter().any(|c| {
                c["type"] == "Programmed"
                    && c["status"] == "True"
                    && c["observedGeneration"] == breaker["metadata"]["generation"]
            });
            let nodes = breaker["status"]["counts"]["programmed"].as_u64() == Some(self.nodes.len() as u64);
            if done && nodes { Ok(Some(())) } else { bail!("{}", breaker["status"]) }
        })
    }

    /// Waits for `status.state`, the aggregate of all nodes.
    pub fn wait_state(&self, name: &str, state: &str) -> Result<()> {
        wait_for(&format!("{name} to be {state}"), Duration::from_secs(40), || {
            let breaker = self.breaker(name)?;
            let is = breaker["status"]["state"].as_str().unwrap_or_default();
            if is == state { Ok(Some(())) } else { bail!("the state is {is:?}") }
        })
    }

    /// Reasons of the Events about an object.
    pub fn events(&self, kind: &str, name: &str) -> Result<Vec<String>> {
        let events = self.get(NAMESPACE, "events", "")?;
        let about = |e: &&Value| e["involvedObject"]["kind"] == kind && e["involvedObject"]["name"] == name;
        let found = events["items"].as_array().into_iter().flatten().filter(about);
        Ok(found.filter_map(|e| Some(e["reason"].as_str()?.to_owned())).collect())
    }

    /// Waits for an Event with this reason about an object.
    pub fn wait_event(&self, kind: &str, name: &str, reason: &str) -> Result<()> {
        wait_for(&format!("an Event {reason} about {kind} {name}"), Duration::from_secs(20), || {
            let found = self.events(kind, name)?;
            if found.iter().any(|r| r == reason) { Ok(Some(())) } else { bail!("found Events {found:?}") }
        })
    }

    /// Sends a request from a pod of the lab, and returns the answer. `client` is in the pod network, `host` in the
    /// node's.
    pub fn ask(&self, from: &str, url: &str) -> Result<String> {
        let answer = self.lab(&["exec", from, "--", "/dummy-service", "ask", url])?;
        Ok(answer.trim().to_owned())
    }

    /// Sends a request from outside the cluster, and returns the answer.
    pub fn ask_from_lan(&self, url: &str) -> Result<String> {
        let lan = self.hooks.lan.as_deref().context("no --lan")?;
        shell(&format!("{lan} curl -s -S -m 3 {url}"))
    }

    /// Runs a command line of the shell on a node, in its network, and returns its output.
    pub fn on_node(&self, node: &str, command: &str) -> Result<String> {
        let hook = self.hooks.on_node.as_deref().context("no --on-node")?;
        shell(&format!("{} sh -c '{command}'", hook.replace("{}", node)))
    }

    /// Switches the fake-error mode of a Deployment's pods on or off.
    pub fn fake_error(&self, app: &str, on: bool) -> Result<()> {
        let path = if on { "fakeerrormodeon" } else { "fakeerrormodeoff" };
        for pod in self.pods(app)? {
            let url = format!("http://{}/{path}", pod.ip);
            self.lab(&["exec", "client", "--", "/dummy-service", "ask", "--method", "POST", &url])?;
        }
        Ok(())
    }

    /// Powers a node on or off.
    pub fn power(&self, node: &str, on: bool) -> Result<()> {
        let (stop, start) = self.hooks.node.as_ref().context("no --stop-node")?;
        shell(&(if on { start } else { stop }).replace("{}", node)).map(drop)
    }

    /// Starts or stops the API server. After a start, waits until the server is ready.
    pub fn api(&self, on: bool) -> Result<()> {
        let (stop, start) = self.hooks.api.as_ref().context("no --stop-api")?;
        shell(if on { start } else { stop })?;
        if on {
            wait_for("the API server", Duration::from_secs(60), || {
                self.kubectl(&["get", "--raw", "/readyz"]).map(Some)
            })?;
        }
        Ok(())
    }

    /// Restarts the API server and nodes that a failed scenario may have left stopped.
    pub fn mend(&self) {
        if self.hooks.api.is_some() && self.kubectl(&["get", "--raw", "/readyz"]).is_err() {
            let _ = self.api(true);
        }
        if self.hooks.node.is_some() {
            let nodes = self.get("", "nodes", "").unwrap_or_default();
            for node in nodes["items"].as_array().into_iter().flatten() {
                let conditions = node["status"]["conditions"].as_array().cloned().unwrap_or_default();
                let ready = conditions.iter().any(|c| c["type"] == "Ready" && c["status"] == "True");
                if let (false, Some(name)) = (ready, node["metadata"]["name"].as_str()) {
                    let _ = self.power(name, true);
                }
            }
        }
    }

    /// Output of kubectl that helps to diagnose a failure.
    pub fn diagnosis(&self) -> String {
        let looks: &[&[&str]] = &[
            &["get", "cb", "-A", "-o", "wide"],
            &["get", "pods", "-A", "-o", "wide"],
            &["-n", SYSTEM, "logs", "-l", "app.kubernetes.io/component=agent", "--prefix", "--tail=25"],
        ];
        looks
            .iter()
            .map(|args| self.kubectl(args).unwrap_or_else(|error| format!("{error:#}")))
            .collect::<Vec<_>>()
            .join("\n")
    }
}

/// A pod of the lab.
#[derive(Clone, Debug)]
pub struct Pod {
    /// Its first address.
    pub ip: String,
    /// All its addresses.
    pub ips: Vec<String>,
    /// Name of the node that it runs on.
    pub node: String,
}

/// Runs a shell command, and returns its standard output.
pub fn shell(command: &str) -> Result<String> {
    let output = Command::new("sh").args(["-c", command]).stdin(Stdio::null()).output().context("start sh")?;
    if !output.status.success() {
        bail!("{command}: {}", String::from_utf8_lossy(&output.stderr).trim());
    }
    Ok(String::from_utf8_lossy(&output.stdout).trim().to_owned())
}
