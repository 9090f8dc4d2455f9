//! Client pods that send requests continuously, and their results.

use std::{
    collections::BTreeSet,
    time::{SystemTime, UNIX_EPOCH},
};

use anyhow::{Context as _, Result, ensure};

use crate::{
    cluster::{Cluster, NAMESPACE},
    wait_for,
};

/// Milliseconds since 1970.
pub fn now() -> u128 {
    SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default().as_millis()
}

/// A pod that sends requests continuously. It is deleted when this value is dropped.
pub struct Load<'a> {
    cluster: &'a Cluster,
    name: String,
}

/// Results of a load.
#[derive(Debug)]
pub struct LoadResults {
    /// Requests that have ended.
    pub requests: Vec<Request>,
}

/// One request.
#[derive(Clone, Debug)]
pub struct Request {
    /// Start, milliseconds since 1970.
    pub at: u128,
    /// Duration, milliseconds.
    pub took: u128,
    /// Whether it was answered.
    pub ok: bool,
    /// The answer, or the error.
    pub words: String,
}

impl<'a> Load<'a> {
    /// Starts a load on a node, fifty new connections per second, and waits for its first answers.
    pub fn start(cluster: &'a Cluster, name: &str, node: &str, url: &str) -> Result<Self> {
        cluster.apply(&pod(name, node, &["load", "--every-millis", "20", "--timeout-millis", "2000", url], false))?;
        let load = Self { cluster, name: name.to_owned() };
        wait_for(&format!("answers for {name}"), std::time::Duration::from_secs(30), || {
            Ok((load.results()?.requests.iter().filter(|r| r.ok).count() > 5).then_some(()))
        })?;
        Ok(load)
    }

    /// The results so far.
    pub fn results(&self) -> Result<LoadResults> {
        let log = self.cluster.lab(&["logs", &self.name])?;
        let parse = |line: &str| {
            let mut words = line.splitn(4, ' ');
            let (at, took) = (words.next()?.parse().ok()?, words.next()?.parse().ok()?);
            let kind = words.next()?;
            let rest = words.next().unwrap_or_default();
            Some(Request {
                at,
                took,
                ok: kind == "ok",
                words: if kind == "ok" { rest.to_owned() } else { format!("{kind} {rest}") },
            })
        };
        Ok(LoadResults { requests: log.lines().filter_map(parse).collect() })
    }

    /// Waits until requests in flight have ended, and returns all results.
    pub fn end(self) -> Result<LoadResults> {
        // The pod logs a request when it ends, at the latest when it times out after 2 s.
        std::thread::sleep(std::time::Duration::from_millis(2300));
        self.results()
    }
}

impl Drop for Load<'_> {
    fn drop(&mut self) {
        let _ = self.cluster.lab(&["delete", "pod", &self.name, "--grace-period=0", "--force", "--wait=false"]);
    }
}

impl LoadResults {
    /// Failed requests that began in a span (milliseconds since 1970; `to` is not part of it).
    pub fn failed(&self, from: u128, to: u128) -> Vec<&Request> {
        self.requests.iter().filter(|r| !r.ok && r.at >= from && r.at < to).collect()
    }

    /// Milliseconds from `from` to the start of the first request since which every request that began before `to`
    /// succeeded.
    pub fn recovery(&self, from: u128, to: u128) -> Result<u128> {
        let mut span: Vec<&Request> = self.requests.iter().filter(|r| r.at >= from && r.at < to).collect();
        span.sort_by_key(|r| r.at);
        let last_bad = span.iter().rposition(|r| !r.ok);
        let first = span.get(last_bad.map_or(0, |i| i + 1)).context("no request succeeded after the last failure")?;
        Ok(first.at - from)
    }

    /// Addresses of the pods that answered the requests of a span.
    pub fn answered_by(&self, from: u128, to: u128) -> BTreeSet<String> {
        let ok = self.requests.iter().filter(|r| r.ok && r.at >= from && r.at < to);
        ok.filter_map(|r| r.words.rsplit(' ').next()?.split(':').next().map(str::to_owned)).collect()
    }

    /// Fails if a request failed. Returns the number of requests.
    pub fn none_failed(&self) -> Result<usize> {
        let failed = self.failed(0, u128::MAX);
        let first: Vec<_> = failed.iter().take(3).collect();
        ensure!(failed.is_empty(), "{} of {} requests failed: {first:?}", failed.len(), self.requests.len());
        Ok(self.requests.len())
    }
}

/// Manifest of a pod that runs the lab's image with these arguments.
pub fn pod(name: &str, node: &str, args: &[&str], host_network: bool) -> String {
    serde_json::json!({
        "apiVersion": "v1", "kind": "Pod",
        "metadata": { "name": name, "namespace": NAMESPACE, "labels": { "app": name } },
        "spec": {
            "nodeName": node, "hostNetwork": host_network, "terminationGracePeriodSeconds": 0,
            "tolerations": [{ "operator": "Exists" }],
            "containers": [{
                "name": "client", "image": "localhost:5000/dummyservice:0.1.0", "imagePullPolicy": "IfNotPresent", "args": args,
            }],
        },
    })
    .to_string()
}
