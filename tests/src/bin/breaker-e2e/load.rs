//! Clients that keep asking, and what they were told.

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

/// A pod that keeps asking.
pub struct Load<'a> {
    cluster: &'a Cluster,
    name: String,
}

/// What a load was told.
#[derive(Debug)]
pub struct Told {
    /// Start (ms since 1970), duration (ms), whether it was answered, by whom or why not.
    pub requests: Vec<Request>,
}

#[derive(Clone, Debug)]
pub struct Request {
    pub at: u128,
    pub took: u128,
    pub ok: bool,
    pub words: String,
}

impl<'a> Load<'a> {
    /// Starts one on a node, fifty new connections a second.
    pub fn start(cluster: &'a Cluster, name: &str, node: &str, url: &str) -> Result<Self> {
        cluster.apply(&pod(name, node, &["load", "--every-millis", "20", "--timeout-millis", "2000", url], false))?;
        let load = Self { cluster, name: name.to_owned() };
        wait_for(&format!("answers for {name}"), std::time::Duration::from_secs(30), || {
            Ok((load.told()?.requests.iter().filter(|r| r.ok).count() > 5).then_some(()))
        })?;
        Ok(load)
    }

    /// What it was told so far.
    pub fn told(&self) -> Result<Told> {
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
        Ok(Told { requests: log.lines().filter_map(parse).collect() })
    }

    /// Ends it; what it was told.
    pub fn end(self) -> Result<Told> {
        // Whatever is under way gets its answer first, or none: a line is printed at a request's end.
        std::thread::sleep(std::time::Duration::from_millis(2300));
        self.told()
    }
}

impl Drop for Load<'_> {
    fn drop(&mut self) {
        let _ = self.cluster.lab(&["delete", "pod", &self.name, "--grace-period=0", "--force", "--wait=false"]);
    }
}

impl Told {
    /// Requests that began in a span and were not answered.
    pub fn failed(&self, from: u128, to: u128) -> Vec<&Request> {
        self.requests.iter().filter(|r| !r.ok && r.at >= from && r.at < to).collect()
    }

    /// From a moment to the start of the first answered request after which all were answered, up to `to`, ms.
    pub fn recovery(&self, from: u128, to: u128) -> Result<u128> {
        let mut span: Vec<&Request> = self.requests.iter().filter(|r| r.at >= from && r.at < to).collect();
        span.sort_by_key(|r| r.at);
        let last_bad = span.iter().rposition(|r| !r.ok);
        let first = span.get(last_bad.map_or(0, |i| i + 1)).context("no request was answered at the end")?;
        Ok(first.at - from)
    }

    /// Who answered in a span.
    pub fn answered_by(&self, from: u128, to: u128) -> BTreeSet<String> {
        let ok = self.requests.iter().filter(|r| r.ok && r.at >= from && r.at < to);
        ok.filter_map(|r| r.words.rsplit(' ').next()?.split(':').next().map(str::to_owned)).collect()
    }

    /// All were answered.
    pub fn none_failed(&self) -> Result<usize> {
        let failed = self.failed(0, u128::MAX);
        let first: Vec<_> = failed.iter().take(3).collect();
        ensure!(failed.is_empty(), "{} of {} requests failed: {first:?}", failed.len(), self.requests.len());
        Ok(self.requests.len())
    }
}

/// A pod with the lab's image.
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
