//! The lab that the story is about: a node, a primary and a backup behind Services, a client pod, an agent.

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

/// How often the primary and the backup are checked.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Checks {
    /// The lab's: every 3 s, one failure is down, one pass is up.
    Default,
    /// Every 100 ms, three failures are down, one pass is up, 100 ms for an answer.
    Fast,
}

impl Checks {
    /// For people and JSON.
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

/// The service's name in the agent.
pub const SERVICE: &str = "dummy";

/// The lab.
#[derive(Debug)]
pub struct Lab {
    /// The agent under test.
    pub agent: Agent,
    /// The client's pod.
    pub client: Pod,
    /// The primary.
    pub primary: ServicePod,
    /// The backup.
    pub backup: ServicePod,
    /// Where clients connect to.
    pub vip: SocketAddrV4,
    /// Everything beneath; last, so that it goes last.
    pub world: World,
}

impl Lab {
    /// Sets the lab up on one node; the agent is configured, but not started.
    ///
    /// # Errors
    /// No root, or a missing program (`cargo xtask setup`).
    pub fn new(checks: Checks) -> Result<Self> {
        Self::with(checks, "")
    }

    /// As [`Lab::new`], with more lines for the service (four spaces deep).
    ///
    /// # Errors
    /// As there.
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

    /// Writes the agent's configuration.
    ///
    /// # Errors
    /// No place to write to.
    pub fn configure(&self, checks: Checks, service: &str) -> Result<()> {
        self.agent.write_config("", &self.services(checks, service))
    }

    /// The services' part of the configuration.
    #[must_use]
    pub fn services(&self, checks: Checks, service: &str) -> String {
        format!(
            "services:\n{}",
            entry(SERVICE, self.vip, self.primary.address(), self.backup.address(), checks, service)
        )
    }

    /// As [`Lab::services`], by these frontends instead of the VIP, each as it stands in a list.
    #[must_use]
    pub fn services_by(&self, checks: Checks, service: &str, frontends: &[String]) -> String {
        let listed = |frontend: &String| format!("      - {frontend}\n");
        let vip = listed(&frontend(self.vip));
        self.services(checks, service).replacen(&vip, &frontends.iter().map(listed).collect::<String>(), 1)
    }

    /// Starts clients in the client's pod.
    ///
    /// # Errors
    /// No thread.
    pub fn load(&self, plan: Plan) -> Result<Load> {
        Load::start(&self.client.ns, plan)
    }

    /// Asks the Service once from the client's pod, on a new connection.
    ///
    /// # Errors
    /// No thread.
    pub fn ask(&self) -> Result<Outcome> {
        self.ask_at(self.vip)
    }

    /// Asks any address once from the client's pod, on a new connection.
    ///
    /// # Errors
    /// No thread.
    pub fn ask_at(&self, target: SocketAddrV4) -> Result<Outcome> {
        super::client::ask_once(&self.client.ns, target)
    }

    /// Plays one fault under load, from well to well.
    ///
    /// # Errors
    /// Something that did not happen in time.
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
            // The keep-alive clients too: everybody has moved.
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
        self.agent.wait_state(SERVICE, "Open", limit)?;
        watch(Moment::Open(&load));
        let opened = Instant::now();
        load.wait("the backup to answer everybody", limit, |records| from(records, &backup, opened))?;
        watch(Moment::OnBackup(&load));
        let healing = Instant::now();
        self.primary.heal(fault)?;
        let healed = Instant::now();
        self.agent.wait_state(SERVICE, "Closed", limit)?;
        watch(Moment::Closed(&load));
        let closed = Instant::now();
        load.wait("the primary to answer again", limit, |records| {
            let new: Vec<_> = records.iter().filter(|r| !r.keep_alive && r.at >= closed).collect();
            new.len() >= 40 && new.iter().rev().take(20).all(|r| r.outcome.pod() == Some(&primary))
        })?;
        watch(Moment::Back(&load));
        let records = load.stop()?;
        let transitions = self.agent.events()?.into_iter().filter(|e| e.id > events_before && e.kind == "Transition");
        let times = Times { injecting, injected, opened, healing, healed, closed };
        Ok(Play::judge(fault, checks, &records, &times, &primary, &backup, transitions.map(Into::into).collect()))
    }
}

/// An address and port as they stand in a list of frontends.
#[must_use]
pub fn frontend(at: SocketAddrV4) -> String {
    format!("{{address: {}, port: {}}}", at.ip(), at.port())
}

/// The configuration of one service.
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

/// A moment of a play, with the clients at work.
#[derive(Debug)]
pub enum Moment<'a> {
    /// The primary answers.
    Well(&'a Load),
    /// The fault is there.
    Injected(&'a Load),
    /// The breaker is open.
    Open(&'a Load),
    /// Everybody is on the backup.
    OnBackup(&'a Load),
    /// The breaker is closed again.
    Closed(&'a Load),
    /// New connections are on the primary again.
    Back(&'a Load),
}

#[derive(Clone, Copy, Debug)]
struct Times {
    /// The injection begins; it may have worked before it ends.
    injecting: Instant,
    injected: Instant,
    opened: Instant,
    /// Healing begins; it may have worked before it ends.
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

/// What came of a fault.
#[derive(Clone, Debug, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct Play {
    /// Which.
    pub fault: Fault,
    /// How often was checked.
    pub checks: &'static str,
    /// From the end of the injection to the first success after which all succeed.
    pub recovered_ms: u128,
    /// Requests without a 200.
    pub failed_requests: usize,
    /// Those, by what happened to them.
    pub failures: std::collections::BTreeMap<String, usize>,
    /// Answers that were neither the right pod's nor an error that the fault explains; must be 0.
    pub wrong_answers: usize,
    /// Those, each in words: what, when it began and ended after the injection.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub wrong: Vec<String>,
    /// From the end of healing to the first new connection on the primary.
    pub back_on_primary_ms: u128,
    /// All requests.
    pub requests: usize,
    /// What the breaker did.
    pub transitions: Vec<Step>,
}

/// A transition.
#[derive(Clone, Debug, Serialize)]
pub struct Step {
    /// From.
    pub from: String,
    /// To.
    pub to: String,
    /// Why.
    pub reason: String,
    /// When.
    pub at: jiff::Timestamp,
}

impl From<breaker_agent::agent::status::EventLine> for Step {
    fn from(event: breaker_agent::agent::status::EventLine) -> Self {
        let or_empty = Option::unwrap_or_default;
        Self { from: or_empty(event.from), to: or_empty(event.to), reason: or_empty(event.reason), at: event.at }
    }
}

impl Play {
    fn judge(
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
        // The last failure of this outage; what fails after healing is counted, but is another matter.
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

/// A request that began shortly before a change may be answered by either side of it.
const MARGIN: Duration = Duration::from_millis(50);

fn is_wrong(record: &Record, fault: Fault, times: &Times, primary: &str, backup: &str) -> bool {
    let began = record.at;
    let ended = record.at + record.took;
    match &record.outcome {
        Outcome::Answer(200, pod) if pod == primary => {
            // While it fails it cannot say 200; while open nobody new is sent there.
            ended > times.injected + MARGIN && ended < times.healing
                || !record.keep_alive && began > times.opened + MARGIN && ended < times.healing
        }
        Outcome::Answer(200, pod) if pod == backup => {
            // Before there was a reason, or as a new connection long after it was closed again.
            ended < times.injecting || !record.keep_alive && began > times.closed + MARGIN
        }
        Outcome::Answer(503, pod) if pod == primary => fault != Fault::FakeError || began > times.healed,
        Outcome::Answer(..) | Outcome::Other(_) => true,
        // An error is explained by the fault from a little before it until a little after everybody has moved.
        _ => ended < times.injecting || began > times.healed,
    }
}
