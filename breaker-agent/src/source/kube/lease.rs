//! Election of the one agent that writes the statuses. The elected agent holds a Lease, as Kubernetes' controllers
//! do.
//!
//! Two agents may believe for a moment that they hold the Lease (after a clock jump or a lost answer). That does no
//! harm, because both write the same statuses.

use std::{
    collections::BTreeMap,
    time::{Duration, Instant},
};

use breaker_api::crd::STATUS_LEASE;
use k8s_openapi::{
    api::coordination::v1::{Lease, LeaseSpec},
    apimachinery::pkg::apis::meta::v1::MicroTime,
};
use kube::{
    Api, Client,
    api::{ObjectMeta, PostParams},
};

use crate::{clock, metrics::instruments::WriteResult};

/// How long the Lease must stay unrenewed before another agent takes it.
const DURATION: Duration = Duration::from_secs(10);
/// How often the holder renews the Lease, and how often the other agents read it.
const RENEW: Duration = Duration::from_secs(3);
/// Limit on reads per second by all agents together: with many nodes, each agent reads less often.
const READS_PER_SECOND: f64 = 10.0;
/// Annotation of the Lease with the number of agents. Only the holder counts them; the others read the number here.
const AGENTS: &str = "breaker.dev/agents";

/// One agent's side of the election.
pub struct Election {
    api: Api<Lease>,
    me: String,
    /// Holder and renewal time that were read last, and when they were first seen, by this agent's own clock.
    seen: Option<(String, Instant)>,
    /// When this agent last renewed the Lease.
    renewed: Option<Instant>,
    /// Number of agents, as read from the Lease; 0 if unknown.
    agents: usize,
}

impl Election {
    /// Makes the election for the agent of a node. The Lease is in `namespace`.
    #[must_use]
    pub fn new(client: &Client, namespace: &str, node: &str) -> Self {
        Self {
            api: Api::namespaced(client.clone(), namespace),
            me: node.to_owned(),
            seen: None,
            renewed: None,
            agents: 0,
        }
    }

    /// Whether this agent holds the Lease.
    #[must_use]
    pub fn is_held(&self) -> bool {
        self.renewed.is_some_and(|at| clock::since(at) < DURATION)
    }

    /// Number of agents, as read from the Lease by the last [`Election::acquire_or_renew`]; 0 if unknown.
    #[must_use]
    pub const fn agents(&self) -> usize {
        self.agents
    }

    /// How long to wait until the next [`Election::acquire_or_renew`].
    #[must_use]
    pub fn pause(&self) -> Duration {
        if self.is_held() {
            return RENEW;
        }
        #[expect(clippy::cast_precision_loss, reason = "a count of agents")]
        let spread = Duration::from_secs_f64(self.agents as f64 / READS_PER_SECOND);
        RENEW.max(spread).mul_f64(0.75 + 0.5 * fastrand::f64())
    }

    /// Reads the Lease. Renews it if this agent holds it, and takes it if nobody holds it or its holder stopped
    /// renewing. A holder also writes `agents`, the number of agents that it counted, to the Lease; 0 is not written.
    ///
    /// Returns what became of the write; `None` if the Lease was only read.
    ///
    /// # Errors
    /// The API server's error. A holder stays the holder until the Lease expires.
    pub async fn acquire_or_renew(&mut self, agents: usize) -> Result<Option<WriteResult>, kube::Error> {
        let found = self.api.get_opt(STATUS_LEASE).await?;
        let Some(mut lease) = found else {
            let lease = Lease {
                metadata: ObjectMeta { name: Some(STATUS_LEASE.into()), ..ObjectMeta::default() },
                spec: Some(self.spec(&LeaseSpec::default())),
            };
            return self.take(self.api.create(&PostParams::default(), &lease).await);
        };
        let parse_count = |of: &BTreeMap<String, String>| of.get(AGENTS).and_then(|count| count.parse().ok());
        self.agents = lease.metadata.annotations.as_ref().and_then(parse_count).unwrap_or_default();
        let spec = lease.spec.clone().unwrap_or_default();
        let holder = spec.holder_identity.clone().unwrap_or_default();
        let mark = format!("{holder} {:?}", spec.renew_time);
        let unchanged = match &self.seen {
            Some((seen, since)) if *seen == mark => clock::since(*since),
            _ => {
                self.seen = Some((mark, clock::stopwatch()));
                Duration::ZERO
            }
        };
        if holder != self.me && !holder.is_empty() && unchanged < DURATION {
            self.renewed = None;
            return Ok(None);
        }
        // An agent that has just taken the Lease has not counted the agents yet.
        if self.is_held() && agents > 0 {
            lease.metadata.annotations.get_or_insert_default().insert(AGENTS.into(), agents.to_string());
            self.agents = agents;
        }
        // The metadata has the resourceVersion that was read: if another agent was faster, the server answers 409
        // Conflict.
        let new = Lease { metadata: lease.metadata, spec: Some(self.spec(&spec)) };
        let outcome = self.api.replace(STATUS_LEASE, &PostParams::default(), &new).await;
        self.take(outcome)
    }

    /// Releases the Lease, so that the next agent need not wait until it expires.
    pub async fn release(&mut self) {
        if !self.is_held() {
            return;
        }
        self.renewed = None;
        if let Ok(Some(lease)) = self.api.get_opt(STATUS_LEASE).await
            && let Some(spec) = lease.spec.clone().filter(|spec| spec.holder_identity.as_deref() == Some(&self.me))
        {
            let free = LeaseSpec { holder_identity: Some(String::new()), ..spec };
            let lease = Lease { spec: Some(free), ..lease };
            // If this fails, the Lease expires.
            let _ = self.api.replace(STATUS_LEASE, &PostParams::default(), &lease).await;
        }
    }

    fn take(&mut self, outcome: Result<Lease, kube::Error>) -> Result<Option<WriteResult>, kube::Error> {
        match outcome {
            Ok(_) => {
                self.renewed = Some(clock::stopwatch());
                Ok(Some(WriteResult::Ok))
            }
            // Another agent was faster.
            Err(kube::Error::Api(status)) if status.code == 409 => {
                self.renewed = None;
                Ok(Some(WriteResult::Conflict))
            }
            Err(error) => Err(error),
        }
    }

    /// The spec of the Lease with this agent as its holder. `old` is the spec before.
    fn spec(&self, old: &LeaseSpec) -> LeaseSpec {
        let now = MicroTime(clock::wall());
        let goes_on = old.holder_identity.as_ref() == Some(&self.me);
        LeaseSpec {
            holder_identity: Some(self.me.clone()),
            lease_duration_seconds: i32::try_from(DURATION.as_secs()).ok(),
            acquire_time: old.acquire_time.clone().filter(|_| goes_on).or_else(|| Some(now.clone())),
            renew_time: Some(now),
            lease_transitions: Some(match &old.holder_identity {
                Some(_) => old.lease_transitions.unwrap_or_default() + i32::from(!goes_on),
                None => 0,
            }),
            ..LeaseSpec::default()
        }
    }
}
