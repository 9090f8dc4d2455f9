//! The client's side of the control socket: HTTP over a unix socket, JSON bodies.

use std::{path::Path, time::Duration};

use anyhow::{Context as _, Result, bail};
use breaker_api::{
    commands::{ErrorBody, HandoverBody, TripBody},
    events::EventLine,
    flows::FlowView,
    status::{AgentStatus, ServiceStatus},
};
use bytes::BytesMut;
use percent_encoding::{AsciiSet, NON_ALPHANUMERIC, utf8_percent_encode};
use reqwest::{Client as Http, Method, Response};
use serde::{Serialize, de::DeserializeOwned};

/// A client of a running agent.
#[derive(Debug)]
pub struct Client {
    http: Http,
}

impl Client {
    /// Connects to the agent behind a control socket. Returns `None` if no agent listens there.
    ///
    /// # Errors
    /// The caller may not use the socket.
    pub fn connect(socket: &Path) -> Result<Option<Self>> {
        Ok(http(socket)?.map(|http| Self { http }))
    }

    /// Whether the agent answers at all, within a time that a user waits. A process that is stopped does not, and neither
    /// does one whose machine is overloaded.
    pub async fn answers(&self) -> bool {
        let request = self.http.get("http://breaker/v1/ping").timeout(Duration::from_millis(900));
        request.send().await.is_ok()
    }

    /// The status of the agent, the datapath and all services.
    ///
    /// # Errors
    /// The error that the agent returned, or no valid answer within 10 seconds.
    pub async fn status(&self) -> Result<AgentStatus> {
        self.call(Method::GET, "status", None::<&()>).await
    }

    /// The status of one service.
    ///
    /// # Errors
    /// See [`Client::status`].
    pub async fn get(&self, name: &str) -> Result<ServiceStatus> {
        self.call(Method::GET, &service(name), None::<&()>).await
    }

    /// Sets the operator override `ForceOpen`.
    ///
    /// # Errors
    /// See [`Client::status`].
    pub async fn trip(&self, name: &str, body: &TripBody) -> Result<ServiceStatus> {
        self.call(Method::POST, &format!("{}/trip", service(name)), Some(body)).await
    }

    /// Removes the operator override and restarts the breaker.
    ///
    /// # Errors
    /// See [`Client::status`].
    pub async fn reset(&self, name: &str) -> Result<ServiceStatus> {
        self.call(Method::POST, &format!("{}/reset", service(name)), None::<&()>).await
    }

    /// Announces that the agent is about to be replaced. Its last decision then stays in force for `duration`, even
    /// if no agent runs.
    ///
    /// # Errors
    /// See [`Client::status`].
    pub async fn handover(&self, duration: Duration) -> Result<()> {
        let body = HandoverBody { seconds: duration.as_secs() };
        self.call::<HandoverBody>(Method::POST, "handover", Some(&body)).await.map(drop)
    }

    /// A service's flows, youngest first, up to `limit`.
    ///
    /// # Errors
    /// See [`Client::status`].
    pub async fn flows(&self, name: &str, limit: usize) -> Result<Vec<FlowView>> {
        self.call(Method::GET, &format!("{}/flows?limit={limit}", service(name)), None::<&()>).await
    }

    /// Calls `each` for every recorded event; with `follow` also for new ones, until the agent ends.
    ///
    /// # Errors
    /// See [`Client::status`]; there is no time limit here. An error that `each` returns ends the function, too.
    pub async fn events(&self, follow: bool, mut each: impl FnMut(EventLine) -> Result<()>) -> Result<()> {
        let request = self.http.get(format!("http://breaker/v1/events?follow={follow}"));
        let mut response = check_status(request.send().await.context("send the request to the agent")?).await?;
        let mut buffer = BytesMut::new();
        while let Some(chunk) = response.chunk().await.context("the connection to the agent ended")? {
            buffer.extend_from_slice(&chunk);
            while let Some(end) = buffer.iter().position(|byte| *byte == b'\n') {
                let line = buffer.split_to(end + 1);
                each(serde_json::from_slice(&line).context("cannot parse an event that the agent sent")?)?;
            }
        }
        Ok(())
    }

    async fn call<T: DeserializeOwned>(
        &self,
        method: Method,
        path: &str,
        body: Option<&(impl Serialize + Sync)>,
    ) -> Result<T> {
        let mut request = self.http.request(method, format!("http://breaker/v1/{path}"));
        if let Some(body) = body {
            request = request.json(body);
        }
        let request = request.timeout(Duration::from_secs(10));
        let response = check_status(request.send().await.context("send the request to the agent")?).await?;
        response.json().await.context("cannot parse the agent's answer (does the agent have another version?)")
    }
}

/// The path of a service. The name is encoded, so that one that ends in `/flows` is not taken for a request for flows.
fn service(name: &str) -> String {
    // Everything but the unreserved characters (RFC 3986, section 2.3).
    const ENCODED: &AsciiSet = &NON_ALPHANUMERIC.remove(b'-').remove(b'.').remove(b'_').remove(b'~');
    format!("services/{}", utf8_percent_encode(name, ENCODED))
}

/// An HTTP client over the control socket; `None` where no agent listens.
#[cfg(unix)]
fn http(socket: &Path) -> Result<Option<Http>> {
    match std::os::unix::net::UnixStream::connect(socket) {
        Ok(_) => {}
        Err(error) if error.kind() == std::io::ErrorKind::PermissionDenied => {
            bail!("the control socket {} is for root only; try sudo", socket.display())
        }
        Err(_) => return Ok(None),
    }
    crate::install_crypto();
    // A client on a unix socket needs no certificates, and loading the system's would take longer than the
    // request.
    let http = Http::builder()
        .unix_socket(socket.to_owned())
        .connect_timeout(Duration::from_secs(2))
        .tls_danger_accept_invalid_certs(true)
        .build()
        .context("create the HTTP client for the control socket")?;
    Ok(Some(http))
}

/// Agents run on Linux nodes, and their control sockets are unix sockets.
#[cfg(not(unix))]
fn http(socket: &Path) -> Result<Option<Http>> {
    bail!(
        "{} is a unix socket: run this command on the node. `kubectl breaker` shows the cluster from here",
        socket.display()
    )
}

async fn check_status(response: Response) -> Result<Response> {
    if response.status().is_success() {
        return Ok(response);
    }
    let status = response.status();
    match response.json::<ErrorBody>().await {
        Ok(body) => bail!("{}", body.error),
        Err(_) => bail!("the agent answered {status}"),
    }
}
