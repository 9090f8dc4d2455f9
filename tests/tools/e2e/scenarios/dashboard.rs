//! The live page of `kubectl breaker dashboard`, as a browser asks for it.

use std::{
    collections::BTreeMap,
    io::{BufRead as _, BufReader},
    process::Stdio,
    sync::mpsc,
    thread,
    time::Duration,
};

use anyhow::{Context as _, Result, ensure};
use breaker_tests::process::KilledOnDrop;
use serde_json::Value;

use super::vip;
use crate::{
    cluster::{Cluster, NAMESPACE},
    wait_for,
};

const LONG: Duration = Duration::from_secs(40);
const BREAKER: &str = "breaker-e2e/dummy";

/// A dashboard that runs, with the content of its stream. Dropping it ends the process.
struct Dashboard {
    _process: KilledOnDrop,
    address: String,
    token: String,
    lines: mpsc::Receiver<String>,
    breakers: BTreeMap<String, Value>,
    counts: BTreeMap<String, Value>,
    nodes: Vec<Value>,
    events: Vec<Value>,
    notes: Vec<Value>,
}

impl Dashboard {
    fn start(cluster: &Cluster, args: &[&str]) -> Result<Self> {
        let mut process = cluster.plugin_command(&[args, &["dashboard"]].concat())?;
        let mut process = KilledOnDrop(process.stdout(Stdio::piped()).spawn().context("start the dashboard")?);
        let mut line = String::new();
        BufReader::new(process.0.stdout.take().context("no output")?).read_line(&mut line)?;
        let (address, token) = line.trim().split_once("/#token=").context(line.clone())?;
        let (address, token) = (address.to_owned(), token.to_owned());
        let (sender, lines) = mpsc::channel();
        let stream = ureq::get(format!("{address}/v1/stream")).header("authorization", format!("Bearer {token}"));
        let body = stream.call().context("open the stream")?.into_body();
        thread::spawn(move || {
            let lines = BufReader::new(body.into_reader()).lines().map_while(Result::ok);
            let _ = lines
                .filter_map(|line| Some(line.strip_prefix("data: ")?.to_owned()))
                .all(|line| sender.send(line).is_ok());
        });
        Ok(Self {
            _process: process,
            address,
            token,
            lines,
            breakers: BTreeMap::new(),
            counts: BTreeMap::new(),
            nodes: Vec::new(),
            events: Vec::new(),
            notes: Vec::new(),
        })
    }

    /// Takes in what the stream has said meanwhile.
    fn update(&mut self) -> Result<()> {
        for line in self.lines.try_iter() {
            let message: Value = serde_json::from_str(&line).context(line.clone())?;
            let list = |field: &str| message[field].as_array().cloned();
            for row in list("breakers").into_iter().flatten() {
                let key = format!("{}/{}", row["namespace"].as_str().unwrap_or(""), row["name"].as_str().unwrap_or(""));
                self.breakers.insert(key, row);
            }
            for (key, counts) in message["counts"].as_object().into_iter().flatten() {
                self.counts.insert(key.clone(), counts.clone());
            }
            self.nodes = list("nodes").unwrap_or_else(|| self.nodes.clone());
            self.notes = list("notes").unwrap_or_else(|| self.notes.clone());
            self.events.extend(list("events").into_iter().flatten());
        }
        Ok(())
    }

    /// Waits until the stream has said something.
    fn wait(&mut self, what: &str, is_said: impl Fn(&Self) -> bool) -> Result<()> {
        let outcome = wait_for(what, LONG, || {
            self.update()?;
            Ok(is_said(self).then_some(()))
        });
        outcome.with_context(|| {
            format!("the stream said {:?}, {:?}, {:?}, {:?}", self.breakers, self.counts, self.nodes, self.notes)
        })
    }

    /// The status and body of an answer.
    fn get(&self, path: &str, headers: &[(&str, &str)]) -> Result<(u16, String)> {
        let agent: ureq::Agent = ureq::Agent::config_builder().http_status_as_error(false).build().into();
        let request = agent.get(format!("{}{path}", self.address));
        let request = headers.iter().fold(request, |request, (name, value)| request.header(*name, *value));
        let mut response = request.call()?;
        Ok((response.status().as_u16(), response.body_mut().read_to_string()?))
    }

    fn get_json(&self, path: &str) -> Result<Value> {
        let (status, body) = self.get(path, &[("authorization", &format!("Bearer {}", self.token))])?;
        ensure!(status == 200, "{path}: {status} {body}");
        Ok(serde_json::from_str(&body)?)
    }

    fn state(&self) -> Option<&str> {
        self.breakers.get(BREAKER)?["state"].as_str()
    }
}

pub(super) fn dashboard(cluster: &Cluster) -> Result<String> {
    let mut admin = Dashboard::start(cluster, &["-n", NAMESPACE])?;
    let nodes = cluster.nodes.len();

    // Others on this machine get the page's files and nothing else, and other sites not even those.
    let (status, page) = admin.get("/", &[])?;
    ensure!(status == 200 && page.contains("<title>breaker</title>"), "{status} {page}");
    let (status, said) = admin.get("/v1/breakers/breaker-e2e%2Fdummy", &[])?;
    ensure!(status == 401 && said.contains("its end is the token"), "{status} {said}");
    let wrong = ("authorization", "Bearer 00000000000000000000000000000000");
    ensure!(admin.get("/v1/stream", &[wrong])?.0 == 401, "a wrong token");
    ensure!(admin.get("/", &[("host", "breaker.example.com")])?.0 == 421, "a name that somebody else may own");

    // The state on every node, and numbers of connections from the agents themselves.
    admin.wait("the breaker on every node", |page| {
        page.breakers.get(BREAKER).is_some_and(|row| row["onNodes"] == "C".repeat(nodes).as_str())
            && page.nodes.len() == nodes
    })?;
    admin.wait("the numbers of all agents", |page| page.nodes.iter().all(|node| node["fill"].is_u64()))?;
    ensure!(admin.notes.is_empty(), "{:?}", admin.notes);
    let url = vip(cluster, "dummy-deployment")?;
    let primary = |page: &Dashboard| page.counts.get(BREAKER).map_or(0, |counts| counts[0].as_u64().unwrap_or(0));
    admin.update()?;
    let before = primary(&admin);
    cluster.ask("client", &url)?;
    admin.wait("a new connection", |page| primary(page) > before)?;

    // A failover, while the page is open.
    let said = cluster.plugin(&["-n", NAMESPACE, "trip", "dummy", "--for", "10m", "--reason", "rehearsal"])?;
    ensure!(said.success, "{}", said.text);
    admin.wait("the open breaker", |page| page.state() == Some("Open"))?;
    admin.wait("the override", |page| page.breakers[BREAKER]["override"]["reason"] == "rehearsal")?;
    admin.wait("the Event", |page| {
        page.events.iter().any(|event| event["to"] == "Open" && event["breaker"] == BREAKER)
    })?;
    let backup = |page: &Dashboard| page.counts.get(BREAKER).map_or(0, |counts| counts[1].as_u64().unwrap_or(0));
    let before = backup(&admin);
    cluster.ask("client", &url)?;
    admin.wait("a moved connection", |page| backup(page) > before)?;
    let detail = admin.get_json("/v1/breakers/breaker-e2e%2Fdummy")?;
    let commands = detail["commands"].to_string();
    ensure!(
        commands.contains("-n breaker-e2e trip dummy") && commands.contains("-n breaker-e2e reset dummy"),
        "{commands}"
    );
    let node = &detail["nodes"][0];
    let (node, service) = (node["node"].as_str().unwrap_or(""), node["services"][0].as_str().unwrap_or(""));
    let service = admin.get_json(&format!("/v1/nodes/{node}/services/{}", service.replace('/', "%2F")))?;
    let tiers = service["tiers"].as_array().context("no tiers")?;
    ensure!(tiers.iter().flat_map(|tier| tier["backends"].as_array()).flatten().count() >= 2, "{service}");

    // A viewer of the namespace sees the same, but not what needs other rights, and is told so.
    cluster.apply(VIEWER)?;
    let mut viewer = Dashboard::start(cluster, &["-n", NAMESPACE, "--as", "watcher"])?;
    viewer.wait("the viewer's breaker", |page| page.state() == Some("Open"))?;
    viewer.wait("the notes", |page| page.notes.len() >= 2)?;
    let notes = format!("{:?}", viewer.notes);
    ensure!(notes.contains("you may not watch NodeReports") && notes.contains("you may not list pods"), "{notes}");
    drop(viewer);
    cluster.lab(&["delete", "rolebinding", "watcher"])?;

    let said = cluster.plugin(&["-n", NAMESPACE, "reset", "dummy"])?;
    ensure!(said.success, "{}", said.text);
    admin.wait("the closed breaker", |page| page.state() == Some("Closed"))?;
    Ok(format!("the page showed the failover and {} events; a viewer was told what is missing", admin.events.len()))
}

const VIEWER: &str = r#"
{apiVersion: rbac.authorization.k8s.io/v1, kind: RoleBinding, metadata: {name: watcher},
 roleRef: {apiGroup: rbac.authorization.k8s.io, kind: ClusterRole, name: view},
 subjects: [{apiGroup: rbac.authorization.k8s.io, kind: User, name: watcher}]}
"#;
