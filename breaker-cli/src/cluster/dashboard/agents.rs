//! Requests to the agents. They listen on loopback addresses of their nodes; the API server carries the connections there
//! (`pods/portforward`), if the caller has the right.

use std::{collections::BTreeMap, sync::Arc, time::Duration};

use anyhow::{Context as _, Result, anyhow, bail};
use breaker_web::rows::Counts;
use bytes::Bytes;
use http_body_util::{BodyExt as _, Empty};
use hyper::{
    Request, Response, StatusCode,
    body::Incoming,
    client::conn::http1::{SendRequest, handshake},
    header,
};
use hyper_util::rt::TokioIo;
use k8s_openapi::{api::core::v1::Pod, apimachinery::pkg::util::intstr::IntOrString};
use kube::{Api, Client, ResourceExt as _, api::ListParams, client::UpgradeConnectionError};
use serde::{Deserialize, Deserializer, de::IgnoredAny};
use tokio::{
    sync::Mutex,
    time::{Instant, timeout, timeout_at},
};

use super::super::{AGENT_PODS, AGENTS, connection::explain};

/// The port of agents whose readiness probe names none.
const PORT: u16 = 9810;
/// Time limit for a connection and for an answer.
const TIMEOUT: Duration = Duration::from_secs(5);
/// An agent whose stream says nothing for this long is gone, or its main loop hangs. It sends a message each second.
const SILENCE: Duration = Duration::from_secs(10);

/// The part of a message that the dashboard uses. An agent of another version may say more.
#[derive(Debug, Deserialize)]
pub(super) struct AgentMessage {
    /// True for the first message of a stream.
    #[serde(rename = "scope", deserialize_with = "is_there", default)]
    pub is_first: bool,
    /// Changed counts, by the name of the service.
    #[serde(default)]
    pub counts: BTreeMap<String, Counts>,
    /// The node itself.
    #[serde(default)]
    pub nodes: Vec<AgentNode>,
}

/// The part of a node's row that the dashboard uses.
#[derive(Debug, Deserialize)]
pub(super) struct AgentNode {
    /// Fill level of the fuller flow table, in percent.
    #[serde(default)]
    pub fill: Option<u8>,
}

fn is_there<'de, D: Deserializer<'de>>(deserializer: D) -> Result<bool, D::Error> {
    IgnoredAny::deserialize(deserializer).map(|_| true)
}

/// The agents of the cluster.
pub(super) struct Agents {
    client: Client,
    /// The agents' pods by node, read when they are first needed and after a failure.
    pods: Mutex<BTreeMap<String, AgentPod>>,
    /// Open connections for single requests, by node.
    connections: Mutex<BTreeMap<String, SendRequest<Empty<Bytes>>>>,
}

#[derive(Clone)]
struct AgentPod {
    name: String,
    port: u16,
}

impl Agents {
    pub fn new(client: Client) -> Arc<Self> {
        Arc::new(Self { client, pods: Mutex::default(), connections: Mutex::default() })
    }

    /// The nodes with an agent.
    ///
    /// # Errors
    /// The caller may not list the agents' pods.
    pub async fn nodes(&self) -> Result<Vec<String>> {
        let all = ListParams::default().labels(AGENT_PODS);
        let list = timeout(TIMEOUT, async { self.api().list(&all).await }).await.context("list the agents' pods")?;
        let list = list.map_err(|error| match error {
            kube::Error::Api(status) if status.code == 403 => anyhow!("you may not list pods in {AGENTS}"),
            error => explain(error, "list the agents' pods in breaker-system"),
        })?;
        let found: BTreeMap<String, AgentPod> = list
            .items
            .into_iter()
            .filter_map(|pod| {
                let node = pod.spec.as_ref()?.node_name.clone()?;
                Some((node, AgentPod { name: pod.name_any(), port: port(&pod) }))
            })
            .collect();
        let nodes = found.keys().cloned().collect();
        *self.pods.lock().await = found;
        Ok(nodes)
    }

    fn api(&self) -> Api<Pod> {
        Api::namespaced(self.client.clone(), AGENTS)
    }

    /// Asks the agent of a node. Returns the status and the body.
    ///
    /// # Errors
    /// There is no agent, it does not answer, or the caller has no right to reach it.
    pub async fn get(&self, node: &str, path: &str) -> Result<(StatusCode, Bytes)> {
        let answer = async {
            let open = self.connections.lock().await.remove(node).filter(|connection| !connection.is_closed());
            let mut connection = match open {
                Some(connection) => connection,
                None => self.connect(node).await?,
            };
            let response = send(&mut connection, path).await?;
            let status = response.status();
            let body = response.into_body().collect().await.context("read the agent's answer")?.to_bytes();
            self.connections.lock().await.insert(node.to_owned(), connection);
            Ok((status, body))
        };
        match timeout(TIMEOUT, answer).await {
            Ok(answer) => answer,
            Err(_) => bail!("the agent on {node} does not answer"),
        }
    }

    /// Follows the stream of a node's agent and hands over every message, until `take` returns false.
    ///
    /// # Errors
    /// As for [`Self::get`]; the stream ended, or said nothing for ten seconds.
    pub async fn follow(&self, node: &str, mut take: impl FnMut(AgentMessage) -> bool) -> Result<()> {
        let begin = async {
            let mut connection = self.connect(node).await?;
            let response = send(&mut connection, "/v1/stream").await?;
            // The connection lives as long as its body is read.
            Ok::<_, anyhow::Error>((connection, response))
        };
        let (_connection, response) = timeout(TIMEOUT, begin).await.context("the agent does not answer")??;
        if response.status() != StatusCode::OK {
            bail!("the agent answered {}", response.status());
        }
        let mut body = response.into_body();
        let mut text = Vec::new();
        let mut deadline = Instant::now() + SILENCE;
        loop {
            let frame = timeout_at(deadline, body.frame()).await.context("the agent says nothing")?;
            let frame = frame.context("the agent ended the stream")??;
            text.extend_from_slice(frame.data_ref().map(Bytes::as_ref).unwrap_or_default());
            while let Some(end) = text.iter().position(|byte| *byte == b'\n') {
                let line: Vec<u8> = text.drain(..=end).collect();
                // Comments keep the connection open and are no sign of the main loop.
                let Some(json) = line.strip_prefix(b"data:") else { continue };
                deadline = Instant::now() + SILENCE;
                if !take(serde_json::from_slice(json).context("read a message of the agent")?) {
                    bail!("its messages come faster than they are read");
                }
            }
        }
    }

    async fn connect(&self, node: &str) -> Result<SendRequest<Empty<Bytes>>> {
        let known = self.pods.lock().await.get(node).cloned();
        let pod = match known {
            Some(pod) => pod,
            None => {
                self.nodes().await?;
                let found = self.pods.lock().await.get(node).cloned();
                found.with_context(|| format!("there is no agent on {node}"))?
            }
        };
        let forward = self.api().portforward(&pod.name, &[pod.port]).await;
        let mut forward = match forward {
            Ok(forward) => forward,
            Err(error) => {
                // The pod may have been replaced.
                self.pods.lock().await.remove(node);
                return Err(refusal(error));
            }
        };
        let stream = forward.take_stream(pod.port).context("connect to the agent")?;
        let (sender, connection) = handshake(TokioIo::new(stream)).await.context("connect to the agent")?;
        tokio::spawn(async move {
            // The connection ends with its last request; the forwarding must live until then.
            let _ = connection.await;
            forward.abort();
        });
        Ok(sender)
    }
}

/// Why the API server does not forward a connection.
fn refusal(error: kube::Error) -> anyhow::Error {
    let is_forbidden = match &error {
        kube::Error::Api(status) => status.code == 403,
        kube::Error::UpgradeConnection(UpgradeConnectionError::ProtocolSwitch(status)) => status.as_u16() == 403,
        _ => false,
    };
    if is_forbidden {
        anyhow!("you may not reach the agents (get and create pods/portforward in {AGENTS})")
    } else {
        explain(error, "reach the agent")
    }
}

async fn send(connection: &mut SendRequest<Empty<Bytes>>, path: &str) -> Result<Response<Incoming>> {
    let request = Request::get(path).header(header::HOST, "127.0.0.1").body(Empty::new())?;
    connection.send_request(request).await.context("ask the agent")
}

/// The port on which an agent answers kubelet, and everybody else on its node.
fn port(pod: &Pod) -> u16 {
    let containers = pod.spec.iter().flat_map(|spec| &spec.containers);
    let probes = containers.filter_map(|container| container.readiness_probe.as_ref()?.http_get.as_ref());
    let ports = probes.filter_map(|probe| match probe.port {
        IntOrString::Int(port) => u16::try_from(port).ok(),
        IntOrString::String(_) => None,
    });
    ports.into_iter().next().unwrap_or(PORT)
}
