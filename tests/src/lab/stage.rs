//! The complete lab: a node, a primary and a backup behind Services, a client pod and an agent.

use breaker_api::events::EventType;
use breaker_common::BreakerState;
use breaker_common::StateReason;
use std::{
    fmt::Write as _,
    net::SocketAddrV4,
    time::{Duration, Instant},
};

use anyhow::Result;
use serde::Serialize;

use super::{
    agent::Agent,
    client::{Load, Outcome, Plan, Record},
    kubeproxy,
    service::{Fault, ServicePod},
    world::{Pod, World},
};

/// Interval and thresholds of the checks of the primary and the backup.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Checks {
    /// Every 3 s; one failure means Down, one success means Up. These are the defaults of a check.
    Default,
    /// Every 100 ms, with a timeout of 100 ms; three failures mean Down, one success means Up.
    Fast,
}

impl Checks {
    /// Short description, for output and JSON.
    #[must_use]
    pub const fn name(self) -> &'static str {
        match self {
            Self::Default => "3 s x 1",
            Self::Fast => "100 ms x 3",
        }
    }

    fn yaml(self) -> &'static str {
        match self {
            Self::Default => "{httpGet: {path: /ready}}",
            Self::Fast => {
                "{httpGet: {path: /ready}, periodMillis: 100, timeoutMillis: 100, failureThreshold: 3, successThreshold: 1}"
            }
        }
    }
}

/// Name of the lab's service in the agent's configuration.
pub const SERVICE: &str = "dummy";

/// A node with a primary, a backup, a client and an agent.
#[derive(Debug)]
pub struct Lab {
    /// The agent under test.
    pub agent: Agent,
    /// The pod that clients run in.
    pub client: Pod,
    /// The pod of the primary.
    pub primary: ServicePod,
    /// The pod of the backup.
    pub backup: ServicePod,
    /// Cluster IP and port that clients connect to.
    pub vip: SocketAddrV4,
    /// Nodes and pods. The last field, so that it is dropped last.
    pub world: World,
}

impl Lab {
    /// Sets the lab up on one node and writes the agent's configuration; does not start the agent.
    ///
    /// # Errors
    /// Fails without root, or if a program is missing (`cargo xtask setup` installs them).
    pub fn new(checks: Checks) -> Result<Self> {
        Self::with(checks, "")
    }

    /// Like [`Lab::new`], with more lines for the service's configuration (indented by four spaces).
    ///
    /// # Errors
    /// As for [`Lab::new`].
    pub fn with(checks: Checks, service: &str) -> Result<Self> {
        let mut world = World::new(1)?;
        kubeproxy::base(world.node(0).ns())?;
        let primary = ServicePod::start(world.node_mut(0), "dummy")?;
        let backup = ServicePod::start(world.node_mut(0), "backup")?;
        let client = world.node_mut(0).add_pod("client")?;
        let vip = kubeproxy::vip(0);
        let services = [("dummy", vip, &primary), ("backup", kubeproxy::vip(1), &backup)];
        for (name, vip, pod) in services {
            let service =
                kubeproxy::Service { name: name.into(), vip, endpoints: vec![pod.address()], protocols: &["tcp"] };
            kubeproxy::add_service(world.node(0).ns(), &service)?;
        }
        let agent = Agent::new(world.node(0).ns(), world.dir(), &world.bpffs().join("breaker"));
        let lab = Self { agent, client, primary, backup, vip, world };
        lab.configure(checks, service)?;
        Ok(lab)
    }

    /// Writes the agent's configuration. `service` is more lines for the service, indented by four spaces.
    ///
    /// # Errors
    /// Fails if the file cannot be written.
    pub fn configure(&self, checks: Checks, service: &str) -> Result<()> {
        self.agent.write_config("", &self.services(checks, service))
    }

    /// The part of the configuration that describes the services.
    #[must_use]
    pub fn services(&self, checks: Checks, service: &str) -> String {
        format!(
            "services:\n{}",
            entry(SERVICE, self.vip, self.primary.address(), self.backup.address(), checks, service)
        )
    }

    /// Like [`Lab::services`], with other frontends instead of the VIP, each as a YAML list element: see [`frontend`].
    #[must_use]
    pub fn services_by(&self, checks: Checks, service: &str, frontends: &[String]) -> String {
        let listed = |frontend: &String| format!("      - {frontend}\n");
        let vip = listed(&frontend(self.vip));
        self.services(checks, service).replacen(&vip, &frontends.iter().map(listed).collect::<String>(), 1)
    }

    /// Starts clients in the client pod.
    ///
    /// # Errors
    /// Fails if the thread cannot be started.
    pub fn load(&self, plan: Plan) -> Result<Load> {
        Load::start(&self.client.ns, plan)
    }

    /// Sends one request to the Service from the client pod, on a new connection.
    ///
    /// # Errors
    /// Fails if the thread or its runtime cannot be started. A request that fails is an [`Outcome`], not an error.
    pub fn ask(&self) -> Result<Outcome> {
        self.ask_at(self.vip)
    }

    /// Sends one request to any address from the client pod, on a new connection.
    ///
    /// # Errors
    /// Fails if the thread or its runtime cannot be started. A request that fails is an [`Outcome`], not an error.
    pub fn ask_at(&self, target: SocketAddrV4) -> Result<Outcome> {
        super::client::ask_once(&self.client.ns, target)
    }

    /// Injects one fault under load, waits for the failover, removes the fault, and waits until the primary answers new
    /// connections again. Calls `watch` at each [`Moment`].
    ///
    /// # Errors
    /// Fails if one of these steps takes longer than 20 s.
    pub fn play(
        &mut self,
        fault: Fault,
        checks: Checks,
        plan: Plan,
        mut watch: impl FnMut(Moment<'_>),
    ) -> Result<Play> {
        let (primary, backup) = (self.primary.address().to_string(), self.backup.address().to_string());
        let events_before = self.agent.events()?.last().map_or(0, |event| event.id);
        let load = self.load(plan)?;
        let limit = Duration::from_secs(20);
        let from = |records: &[Record], pod: &str, at: Instant| {
            // The keep-alive clients count, too: all clients must have moved.
            let recent: Vec<_> = records.iter().rev().take_while(|r| r.at >= at).collect();
            recent.len() >= 20 && recent.iter().rev().take(20).all(|r| r.outcome.pod() == Some(pod))
        };
        load.wait("the primary to answer", limit, |records| {
            records.len() > 40 && records.iter().rev().take(20).all(|r| r.outcome.pod() == Some(&primary))
        })?;
        watch(Moment::Well(&load));
        let injecting = Instant::now();
        self.primary.inject(fault)?;
        let injected = Instant::now();
        watch(Moment::Injected(&load));
        self.agent.wait_state(SERVICE, BreakerState::Open, limit)?;
        watch(Moment::Open(&load));
        let opened = Instant::now();
        load.wait("the backup to answer all clients", limit, |records| from(records, &backup, opened))?;
        watch(Moment::OnBackup(&load));
        let healing = Instant::now();
        self.primary.heal(fault)?;
        let healed = Instant::now();
        self.agent.wait_state(SERVICE, BreakerState::Closed, limit)?;
        watch(Moment::Closed(&load));
        let closed = Instant::now();
        load.wait("the primary to answer again", limit, |records| {
            let new: Vec<_> = records.iter().filter(|r| !r.keep_alive && r.at >= closed).collect();
            new.len() >= 40 && new.iter().rev().take(20).all(|r| r.outcome.pod() == Some(&primary))
        })?;
        watch(Moment::Back(&load));
        let records = load.stop()?;
        let transitions =
            self.agent.events()?.into_iter().filter(|e| e.id > events_before && e.kind == EventType::Transition);
        let times = Times { injecting, injected, opened, healing, healed, closed };
        Ok(Play::stop_and_check(
            fault,
            checks,
            &records,
            &times,
            &primary,
            &backup,
            transitions.map(Into::into).collect(),
        ))
    }
}

/// An address and port in YAML, as an element of a list of frontends.
#[must_use]
pub fn frontend(at: SocketAddrV4) -> String {
    format!("{{address: {}, port: {}}}", at.ip(), at.port())
}

/// The configuration of one service in YAML, as an element of `services`. `more`: more lines, indented by four spaces.
#[must_use]
pub fn entry(
    name: &str,
    vip: SocketAddrV4,
    primary: SocketAddrV4,
    backup: SocketAddrV4,
    checks: Checks,
    more: &str,
) -> String {
    let mut text = format!(
        "  - name: {name}
    frontends:
      - {}
    primary:
      name: dummy-deployment
      backends:
        - {{address: {}, port: {}}}
      check: {}
    backups:
      - name: backup-deployment
        backends:
          - {{address: {}, port: {}}}
        check: {}
",
        frontend(vip),
        primary.ip(),
        primary.port(),
        checks.yaml(),
        backup.ip(),
        backup.port(),
        checks.yaml(),
    );
    if !more.is_empty() {
        let _ = writeln!(text, "{}", more.trim_end());
    }
    text
}

/// A moment of [`Lab::play`], with the clients that are running.
#[derive(Debug)]
pub enum Moment<'a> {
    /// The primary answers all requests.
    Well(&'a Load),
    /// The fault is injected.
    Injected(&'a Load),
    /// The breaker is open.
    Open(&'a Load),
    /// The backup answers all clients.
    OnBackup(&'a Load),
    /// The breaker is closed again.
    Closed(&'a Load),
    /// The primary answers new connections again.
    Back(&'a Load),
}

#[derive(Clone, Copy, Debug)]
struct Times {
    /// Before the injection, which may take effect before it returns.
    injecting: Instant,
    injected: Instant,
    opened: Instant,
    /// Before the fault is removed, which may take effect before it returns.
    healing: Instant,
    healed: Instant,
    closed: Instant,
}

impl Times {
    fn describe(&self, record: &Record) -> String {
        let ms = |at: Instant| i128::try_from(at.saturating_duration_since(self.injected).as_millis()).unwrap_or(0);
        let kind = if record.keep_alive { "kept" } else { "new" };
        let (began, ended) = (ms(record.at), ms(record.at + record.took));
        format!(
            "{} on a {kind} connection, {began} to {ended} ms (open {}, healed {}, closed {})",
            record.outcome,
            ms(self.opened),
            ms(self.healed),
            ms(self.closed)
        )
    }
}

/// Result of [`Lab::play`].
#[derive(Clone, Debug, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct Play {
    /// The fault that was injected.
    pub fault: Fault,
    /// [`Checks::name`] of the checks.
    pub checks: &'static str,
    /// Milliseconds from the end of the injection to the first success after the last failure of the outage.
    pub recovered_ms: u128,
    /// Number of requests that did not get a 200.
    pub failed_requests: usize,
    /// Failed requests by outcome.
    pub failures: std::collections::BTreeMap<String, usize>,
    /// Number of outcomes that the fault does not explain: answers of the wrong pod, unexpected errors. Must be 0.
    pub wrong_answers: usize,
    /// Description of each of these: the outcome, and when the request began and ended, in ms after the injection.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub wrong: Vec<String>,
    /// Milliseconds from the end of the fault to the first new connection that the primary answered.
    pub back_on_primary_ms: u128,
    /// Number of all requests.
    pub requests: usize,
    /// The breaker's transitions.
    pub transitions: Vec<Step>,
}

/// A transition of the breaker.
#[derive(Clone, Debug, Serialize)]
pub struct Step {
    /// State before.
    pub from: String,
    /// State after.
    pub to: String,
    /// Reason of the transition.
    pub reason: String,
    /// Time of the transition.
    pub at: jiff::Timestamp,
}

impl From<breaker_api::events::EventLine> for Step {
    fn from(event: breaker_api::events::EventLine) -> Self {
        let state = |state: Option<BreakerState>| state.map_or("", BreakerState::label).to_owned();
        let reason = event.reason.map_or("", StateReason::label).to_owned();
        Self { from: state(event.from), to: state(event.to), reason, at: event.at }
    }
}

impl Play {
    fn stop_and_check(
        fault: Fault,
        checks: Checks,
        records: &[Record],
        times: &Times,
        primary: &str,
        backup: &str,
        transitions: Vec<Step>,
    ) -> Self {
        let after = |at: Instant| move |r: &&Record| r.at >= at;
        let failed: Vec<&Record> = records.iter().filter(|r| !r.outcome.is_success()).collect();
        // The last failure of this outage. Requests that fail after the fault was removed are counted, but not here.
        let last_failure = failed.iter().filter(|r| r.at < times.healed).map(|r| r.at).max();
        let recovered = records
            .iter()
            .filter(after(times.injected))
            .find(|r| r.outcome.is_success() && last_failure.is_none_or(|last| r.at > last))
            .map_or(Duration::MAX, |r| r.at.saturating_duration_since(times.injected));
        let back = records
            .iter()
            .filter(after(times.healed))
            .find(|r| !r.keep_alive && r.outcome.pod() == Some(primary))
            .map_or(Duration::MAX, |r| r.at.saturating_duration_since(times.healed));
        let wrong = records.iter().filter(|r| is_wrong(r, fault, times, primary, backup));
        let wrong: Vec<String> = wrong.map(|r| times.describe(r)).collect();
        Self {
            fault,
            checks: checks.name(),
            recovered_ms: recovered.as_millis(),
            failed_requests: failed.len(),
            failures: super::client::summary(failed.iter().copied()),
            wrong_answers: wrong.len(),
            wrong,
            back_on_primary_ms: back.as_millis(),
            requests: records.len(),
            transitions,
        }
    }
}

/// Tolerance around a change: a request that begins this shortly before it may be answered by either pod.
const MARGIN: Duration = Duration::from_millis(50);

fn is_wrong(record: &Record, fault: Fault, times: &Times, primary: &str, backup: &str) -> bool {
    let began = record.at;
    let ended = record.at + record.took;
    match &record.outcome {
        Outcome::Answer(200, pod) if pod == primary => {
            // The failed primary cannot answer 200, and an open breaker sends it no new connections.
            ended > times.injected + MARGIN && ended < times.healing
                || !record.keep_alive && began > times.opened + MARGIN && ended < times.healing
        }
        Outcome::Answer(200, pod) if pod == backup => {
            // The backup answered before the fault, or a new connection well after the breaker was closed again.
            ended < times.injecting || !record.keep_alive && began > times.closed + MARGIN
        }
        Outcome::Answer(503, pod) if pod == primary => fault != Fault::FakeError || began > times.healed,
        Outcome::Answer(..) | Outcome::Other(_) => true,
        // Other errors are explained by the fault if the request ended after its injection began and began before it
        // was removed.
        _ => ended < times.injecting || began > times.healed,
    }
}
