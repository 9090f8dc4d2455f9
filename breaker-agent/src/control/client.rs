//! The command line's side of the control socket.

use std::{io, path::Path, time::Duration};

use anyhow::{Context as _, Result, bail};
use bytes::BytesMut;
use reqwest::{Client as Http, Method, Response};
use serde::{Serialize, de::DeserializeOwned};

use super::{ErrorBody, HandoverBody, TripBody};
use crate::agent::status::{AgentStatus, EventLine, ServiceStatus};

/// Speaks to an agent.
#[derive(Debug)]
pub struct Client {
    http: Http,
}

impl Client {
    /// A client of the agent behind a socket; `None` where no agent listens.
    ///
    /// # Errors
    /// A socket that may not be used: whose it is.
    pub fn connect(socket: &Path) -> Result<Option<Self>> {
        match std::os::unix::net::UnixStream::connect(socket) {
            Ok(_) => {}
            Err(error) if error.kind() == io::ErrorKind::PermissionDenied => {
                bail!("the control socket {} is for root only; try sudo", socket.display())
            }
            Err(_) => return Ok(None),
        }
        crate::install_crypto();
        // A client over a unix socket needs no certificates; loading the system's would take longer than the request.
        let http = Http::builder()
            .unix_socket(socket.to_owned())
            .connect_timeout(Duration::from_secs(2))
            .tls_danger_accept_invalid_certs(true)
            .build()
            .context("set up the client")?;
        Ok(Some(Self { http }))
    }

    /// Everything.
    ///
    /// # Errors
    /// What the agent says, or that it does not answer.
    pub async fn status(&self) -> Result<AgentStatus> {
        self.call(Method::GET, "status", None::<&()>).await
    }

    /// One service.
    ///
    /// # Errors
    /// As for [`Client::status`].
    pub async fn get(&self, name: &str) -> Result<ServiceStatus> {
        self.call(Method::GET, &format!("services/{name}"), None::<&()>).await
    }

    /// Forces a service open.
    ///
    /// # Errors
    /// As for [`Client::status`].
    pub async fn trip(&self, name: &str, body: &TripBody) -> Result<ServiceStatus> {
        self.call(Method::POST, &format!("services/{name}/trip"), Some(body)).await
    }

    /// Gives a service back to the measurement.
    ///
    /// # Errors
    /// As for [`Client::status`].
    pub async fn reset(&self, name: &str) -> Result<ServiceStatus> {
        self.call(Method::POST, &format!("services/{name}/reset"), None::<&()>).await
    }

    /// Tells the agent that it is about to be replaced, and for how long its last word is to hold.
    ///
    /// # Errors
    /// As for [`Client::status`].
    pub async fn handover(&self, duration: Duration) -> Result<()> {
        let body = HandoverBody { seconds: duration.as_secs() };
        self.call::<HandoverBody>(Method::POST, "handover", Some(&body)).await.map(drop)
    }

    /// A service's flows, as JSON objects.
    ///
    /// # Errors
    /// As for [`Client::status`].
    pub async fn flows(&self, name: &str, limit: usize) -> Result<Vec<serde_json::Value>> {
        self.call(Method::GET, &format!("services/{name}/flows?limit={limit}"), None::<&()>).await
    }

    /// Events, each given to `each`; with `follow` until the agent ends.
    ///
    /// # Errors
    /// As for [`Client::status`]; an error of `each` ends it too.
    pub async fn events(&self, follow: bool, mut each: impl FnMut(EventLine) -> Result<()>) -> Result<()> {
        let request = self.http.get(format!("http://breaker/v1/events?follow={follow}"));
        let mut response = good(request.send().await.context("ask the agent")?).await?;
        let mut buffer = BytesMut::new();
        while let Some(chunk) = response.chunk().await.context("the agent ended")? {
            buffer.extend_from_slice(&chunk);
            while let Some(end) = buffer.iter().position(|byte| *byte == b'\n') {
                let line = buffer.split_to(end + 1);
                each(serde_json::from_slice(&line).context("an event that we do not understand")?)?;
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
        let response = good(request.send().await.context("ask the agent")?).await?;
        response.json().await.context("an answer that we do not understand (is the agent of another version?)")
    }
}

async fn good(response: Response) -> Result<Response> {
    if response.status().is_success() {
        return Ok(response);
    }
    let status = response.status();
    match response.json::<ErrorBody>().await {
        Ok(body) => bail!("{}", body.error),
        Err(_) => bail!("the agent answered {status}"),
    }
}
