//! One agent of all writes the statuses: who that is, is kept in a Lease, as for any of Kubernetes' controllers.
//!
//! Two that believe to be it for a moment (a clock that jumps, a lost answer) do no harm: both write the same.

use std::{
    collections::BTreeMap,
    time::{Duration, Instant},
};

use jiff::Timestamp;
use k8s_openapi::{
    api::coordination::v1::{Lease, LeaseSpec},
    apimachinery::pkg::apis::meta::v1::MicroTime,
};
use kube::{
    Api, Client,
    api::{ObjectMeta, PostParams},
};

/// The Lease's name, in the agents' own namespace.
pub const NAME: &str = "breaker-status";
/// How long a holder that does not renew it is waited for.
const DURATION: Duration = Duration::from_secs(10);
/// How often the holder renews it, and how often others look.
const RENEW: Duration = Duration::from_secs(3);
/// Looks a second that all agents together take: with many nodes, each looks less often.
const LOOKS_PER_SECOND: f64 = 10.0;
/// The Lease's annotation that tells how many agents there are: whoever holds it counts them, nobody else does.
const AGENTS: &str = "breaker.dev/agents";

/// One agent's side of the election.
pub struct Election {
    api: Api<Lease>,
    me: String,
    /// What was seen last (holder and time of renewal), and since when it is unchanged by our own clock.
    seen: Option<(String, Instant)>,
    /// When we renewed it last.
    renewed: Option<Instant>,
    /// How many agents there are, by the Lease.
    agents: usize,
}

impl Election {
    /// For a node's agent.
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

    /// Whether this agent is the one.
    #[must_use]
    pub fn is_held(&self) -> bool {
        self.renewed.is_some_and(|at| at.elapsed() < DURATION)
    }

    /// How many agents there are, as the Lease had it at the last look.
    #[must_use]
    pub const fn agents(&self) -> usize {
        self.agents
    }

    /// How long to wait until the next [`Election::look`].
    #[must_use]
    pub fn pause(&self) -> Duration {
        if self.is_held() {
            return RENEW;
        }
        #[expect(clippy::cast_precision_loss, reason = "a count of agents")]
        let spread = Duration::from_secs_f64(self.agents as f64 / LOOKS_PER_SECOND);
        RENEW.max(spread).mul_f64(0.75 + 0.5 * fastrand::f64())
    }

    /// Looks at the Lease: renews it if it is ours (and tells by it of how many agents it knows), takes it if nobody has it.
    ///
    /// # Errors
    /// The API server's; whoever holds the Lease goes on holding it until it runs out.
    pub async fn look(&mut self, agents: usize) -> Result<(), kube::Error> {
        let found = self.api.get_opt(NAME).await?;
        let Some(mut lease) = found else {
            let lease = Lease {
                metadata: ObjectMeta { name: Some(NAME.into()), ..ObjectMeta::default() },
                spec: Some(self.spec(&LeaseSpec::default())),
            };
            return self.take(self.api.create(&PostParams::default(), &lease).await);
        };
        let told = |of: &BTreeMap<String, String>| of.get(AGENTS).and_then(|count| count.parse().ok());
        self.agents = lease.metadata.annotations.as_ref().and_then(told).unwrap_or_default();
        let spec = lease.spec.clone().unwrap_or_default();
        let holder = spec.holder_identity.clone().unwrap_or_default();
        let mark = format!("{holder} {:?}", spec.renew_time);
        let unchanged = match &self.seen {
            Some((seen, since)) if *seen == mark => since.elapsed(),
            _ => {
                self.seen = Some((mark, Instant::now()));
                Duration::ZERO
            }
        };
        if holder != self.me && !holder.is_empty() && unchanged < DURATION {
            self.renewed = None;
            return Ok(());
        }
        // Who has only just taken it has counted nobody yet.
        if self.is_held() && agents > 0 {
            lease.metadata.annotations.get_or_insert_default().insert(AGENTS.into(), agents.to_string());
            self.agents = agents;
        }
        // With the version that we saw: whoever was quicker wins.
        let new = Lease { metadata: lease.metadata, spec: Some(self.spec(&spec)) };
        let outcome = self.api.replace(NAME, &PostParams::default(), &new).await;
        self.take(outcome)
    }

    /// Lets go of it, so that the next one need not wait.
    pub async fn release(&mut self) {
        if !self.is_held() {
            return;
        }
        self.renewed = None;
        if let Ok(Some(lease)) = self.api.get_opt(NAME).await
            && let Some(spec) = lease.spec.clone().filter(|spec| spec.holder_identity.as_deref() == Some(&self.me))
        {
            let free = LeaseSpec { holder_identity: Some(String::new()), ..spec };
            let lease = Lease { spec: Some(free), ..lease };
            // If it fails, it runs out.
            let _ = self.api.replace(NAME, &PostParams::default(), &lease).await;
        }
    }

    fn take(&mut self, outcome: Result<Lease, kube::Error>) -> Result<(), kube::Error> {
        match outcome {
            Ok(_) => {
                self.renewed = Some(Instant::now());
                Ok(())
            }
            // Somebody else was quicker.
            Err(kube::Error::Api(status)) if status.code == 409 => {
                self.renewed = None;
                Ok(())
            }
            Err(error) => Err(error),
        }
    }

    /// The Lease as we hold it, from how it was.
    fn spec(&self, old: &LeaseSpec) -> LeaseSpec {
        let now = MicroTime(Timestamp::now());
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
