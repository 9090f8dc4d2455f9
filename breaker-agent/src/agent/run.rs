//! The loop: reads the clock, owns the sockets, and gives the engine everything that happens.

use std::{
    collections::{BTreeMap, BTreeSet, HashMap},
    os::fd::OwnedFd,
    path::PathBuf,
    time::Duration,
};

use anyhow::{Context as _, Result};
use jiff::Timestamp;
use tokio::{
    io::unix::AsyncFd,
    signal::unix::{SignalKind, signal},
    sync::{mpsc, watch},
    time::Instant,
};

use super::{
    engine::{Engine, Now},
    status::{AgentStatus, DatapathStatus},
};
use crate::{
    check::{Checker, Prober, Report, Target},
    config::{AttachMode, Config, ConfigError},
    control::{self, Request},
    datapath::{
        Datapath as _,
        kernel::{Attacher, InterfaceChange, KernelDatapath, PinDir, has_tcx, load, watch_interfaces},
    },
    model::Service,
    source::file::FileSource,
};

/// How often the heart beats.
const BEAT: Duration = Duration::from_secs(1);
/// How often the ring buffer is looked into without being woken.
const LOOK: Duration = Duration::from_millis(500);
/// The least between two looks at what time alone changes.
const PAUSE: Duration = Duration::from_millis(20);

/// How an agent is started.
#[derive(Clone, Debug)]
pub struct Options {
    /// The configuration file.
    pub config: PathBuf,
    /// What was in it when it was read; a difference later is a change.
    pub config_text: String,
    /// Take everything away at the end, instead of leaving it to the next agent.
    pub detach: bool,
    /// The programs' own log level; `None` takes the log out of them.
    pub program_log: Option<log::Level>,
}

/// Runs an agent until it is told to end.
///
/// # Errors
/// What kept it from starting; nothing of an earlier agent's was changed then.
pub async fn run(options: Options, config: Config) -> Result<()> {
    crate::install_crypto();
    anyhow::ensure!(
        config.agent.attach != AttachMode::Tcx || has_tcx(),
        "agent.attach: Tcx needs kernel 6.6; allowed here: Auto, Clsact"
    );
    let pins = PinDir::open(&config.agent.pin_path)?;
    let adopted = pins.adopted();
    let loaded = load(&pins, config.agent.max_flows, config.agent.masquerade_mark, options.program_log)?;
    if let Some(logger) = loaded.logger {
        carry_log(logger);
    }
    let events = loaded.maps.events_ready()?;
    let attacher = Attacher::new(loaded.programs, &pins, config.agent.attach);
    let clock = Clock::new();
    let engine = Engine::new(KernelDatapath::new(loaded.maps), clock.now())?;
    let (reports_in, reports) = mpsc::channel(4096);
    let (requests_in, requests) = mpsc::channel(64);
    let (latest_event, latest_event_out) = watch::channel(0);
    let _socket = control::serve(&config.agent.socket, requests_in, latest_event_out)?;
    let source = FileSource::watch(&options.config, options.config_text)?;

    let mut agent = Agent {
        clock,
        engine,
        attacher,
        failed_interfaces: BTreeMap::new(),
        names: HashMap::new(),
        checkers: BTreeMap::new(),
        prober: Prober::default(),
        reports: reports_in,
        latest_event,
        config: config.clone(),
    };
    // Alive first, then the decisions, then the programs that act on them.
    agent.beat();
    agent.configure(config.services);
    let (present, interfaces) =
        watch_interfaces(config.agent.veths, config.agent.interfaces.clone()).await.context("watch the interfaces")?;
    agent.attach_present(present);
    let pid = std::process::id();
    let mode = agent.attacher.mode();
    let count = agent.attacher.attached().len();
    tracing::info!(pid, adopted, attach = ?mode, interfaces = count, services = agent.config.services.len(), "ready");
    agent.run(Inputs { reports, requests, interfaces, events, source }).await?;
    if options.detach {
        drop(agent);
        let cleaned = pins.remove()?;
        tracing::info!(links = cleaned.links, maps = cleaned.maps, "took the datapath away");
    } else {
        tracing::info!("the datapath stays as it is; the next agent takes it over");
    }
    Ok(())
}

/// Everything that can happen.
struct Inputs {
    reports: mpsc::Receiver<Report>,
    requests: mpsc::Receiver<Request>,
    interfaces: mpsc::Receiver<InterfaceChange>,
    events: AsyncFd<OwnedFd>,
    source: FileSource,
}

struct Clock {
    origin: Instant,
}

impl Clock {
    fn new() -> Self {
        Self { origin: Instant::now() }
    }

    fn now(&self) -> Now {
        Now { mono: self.origin.elapsed(), unix: Timestamp::now() }
    }
}

struct Agent {
    clock: Clock,
    engine: Engine<KernelDatapath>,
    attacher: Attacher,
    /// By index: name and what went wrong.
    failed_interfaces: BTreeMap<u32, (String, String)>,
    /// Names of interfaces by index, as the last message said.
    names: HashMap<u32, String>,
    checkers: BTreeMap<Target, Checker>,
    prober: Prober,
    reports: mpsc::Sender<Report>,
    latest_event: watch::Sender<u64>,
    config: Config,
}

impl Agent {
    async fn run(&mut self, mut inputs: Inputs) -> Result<()> {
        let mut terminate = signal(SignalKind::terminate()).context("listen for SIGTERM")?;
        let mut interrupt = signal(SignalKind::interrupt()).context("listen for SIGINT")?;
        let mut hangup = signal(SignalKind::hangup()).context("listen for SIGHUP")?;
        let mut beat = tokio::time::interval(BEAT);
        let mut last_tick = self.clock.now().mono;
        loop {
            // Counted from the last tick, not from now: whatever else keeps the loop busy does not put it off.
            let due = self.engine.next_deadline(self.clock.now()).clamp(last_tick + PAUSE, last_tick + LOOK);
            let due = self.clock.origin + due;
            tokio::select! {
                _ = terminate.recv() => return Ok(()),
                _ = interrupt.recv() => return Ok(()),
                _ = hangup.recv() => self.reload(&inputs.source, "SIGHUP"),
                () = inputs.source.changed() => self.reload(&inputs.source, "the file changed"),
                _ = beat.tick() => self.beat(),
                Some(report) = inputs.reports.recv() => self.engine.report(self.clock.now(), &report),
                Some(request) = inputs.requests.recv() => self.answer(request),
                Some(change) = inputs.interfaces.recv() => self.interface(change),
                ready = inputs.events.readable() => {
                    if let Ok(mut ready) = ready {
                        ready.clear_ready();
                    }
                    self.engine.tick(self.clock.now());
                }
                () = tokio::time::sleep_until(due) => {
                    last_tick = self.clock.now().mono;
                    self.engine.tick(self.clock.now());
                }
            }
            let latest = self.engine.last_event();
            self.latest_event.send_if_modified(|id| std::mem::replace(id, latest) != latest);
        }
    }

    fn beat(&mut self) {
        let unix_ns = u64::try_from(Timestamp::now().as_nanosecond()).unwrap_or(0);
        let lease = self.config.agent.lease;
        self.engine.datapath_mut().beat(lease, unix_ns);
    }

    fn configure(&mut self, services: Vec<Service>) {
        self.engine.configure(self.clock.now(), services.clone());
        self.check(&services);
    }

    /// Starts checks that are new or different, ends those that are not wanted any more.
    fn check(&mut self, services: &[Service]) {
        let mut wanted = BTreeMap::new();
        for service in services {
            for (tier, (number, check)) in
                service.tiers().enumerate().filter_map(|(n, tier)| Some((tier, (n, tier.check.clone()?))))
            {
                for backend in &tier.backends {
                    let target = Target { service: service.name.clone(), tier: number, backend: backend.address };
                    wanted.insert(target, check.clone());
                }
            }
        }
        self.checkers.retain(|target, checker| wanted.get(target) == Some(checker.check()));
        for (target, check) in wanted {
            let (prober, reports) = (self.prober.clone(), self.reports.clone());
            let known = self.engine.known_health(&target);
            let start = || Checker::start(target.clone(), check, known, prober, reports);
            self.checkers.entry(target.clone()).or_insert_with(start);
        }
    }

    fn reload(&mut self, source: &FileSource, why: &str) {
        let now = self.clock.now();
        match source.load() {
            Ok(config) => {
                if config.agent != self.config.agent {
                    let message = "the section `agent` changed: that takes effect at the next start";
                    tracing::warn!("{message}");
                    self.engine.note(now, "Config", message.into());
                }
                let count = config.services.len();
                self.config.services.clone_from(&config.services);
                self.configure(config.services);
                tracing::info!(services = count, "configuration read again ({why})");
                self.engine.note(now, "Config", format!("read again ({why}): {count} services"));
            }
            Err(errors) => {
                for error in &errors {
                    tracing::error!("configuration refused, nothing changed: {error}");
                }
                let message = errors.iter().map(ConfigError::to_string).collect::<Vec<_>>().join("; ");
                self.engine.note(now, "ConfigRefused", format!("nothing changed ({why}): {message}"));
            }
        }
    }

    fn attach_present(&mut self, present: Vec<InterfaceChange>) {
        let indices: BTreeSet<u32> = present
            .iter()
            .map(|change| match change {
                InterfaceChange::Present { index, .. } | InterfaceChange::Gone { index } => *index,
            })
            .collect();
        self.attacher.forget_all_but(&indices.into_iter().collect::<Vec<_>>());
        for change in present {
            self.interface(change);
        }
    }

    fn interface(&mut self, change: InterfaceChange) {
        match change {
            InterfaceChange::Present { index, name } => {
                self.names.insert(index, name.clone());
                if self.attacher.attached().contains_key(&index) {
                    return;
                }
                match self.attacher.attach(index, &name) {
                    Ok(()) => {
                        tracing::debug!(interface = name, "attached");
                        self.failed_interfaces.remove(&index);
                    }
                    Err(error) => {
                        tracing::warn!(interface = name, "not attached: {error:#}");
                        self.failed_interfaces.insert(index, (name, format!("{error:#}")));
                    }
                }
            }
            InterfaceChange::Gone { index } => {
                self.names.remove(&index);
                self.failed_interfaces.remove(&index);
                if let Some(gone) = self.attacher.forget(index) {
                    tracing::debug!(interface = gone.name, "gone");
                }
            }
        }
    }

    fn answer(&mut self, request: Request) {
        let now = self.clock.now();
        // Whoever asked may have gone; that is no error.
        match request {
            Request::Status(reply) => drop(reply.send(self.status(now))),
            Request::Get(name, reply) => drop(reply.send(self.engine.get(now, &name))),
            Request::Trip { name, duration, reason, reply } => {
                drop(reply.send(self.engine.trip(now, &name, duration, reason.as_deref())));
            }
            Request::Reset(name, reply) => drop(reply.send(self.engine.reset(now, &name))),
            Request::Flows { name, limit, reply } => drop(reply.send(self.engine.flows(&name, limit))),
            Request::Events { after, reply } => {
                drop(reply.send(self.engine.events_after(after).into_iter().cloned().collect()));
            }
        }
    }

    fn status(&self, now: Now) -> AgentStatus {
        let name_of = |index: &u32, then: &str| self.names.get(index).cloned().unwrap_or_else(|| then.to_owned());
        let reasons = self.engine.datapath().reasons().unwrap_or_default();
        AgentStatus {
            version: env!("CARGO_PKG_VERSION").into(),
            pid: std::process::id(),
            running: true,
            last_beat: Some(now.unix),
            lease_seconds: self.config.agent.lease.as_secs(),
            datapath: DatapathStatus {
                pin_path: self.config.agent.pin_path.display().to_string(),
                attach: format!("{:?}", self.attacher.mode()),
                interfaces: self.attacher.attached().iter().map(|(i, a)| name_of(i, &a.name)).collect(),
                failed_interfaces: self.failed_interfaces.values().cloned().collect(),
                flow_entries: self.engine.flow_entries(),
                reasons: reasons.into_iter().map(|(reason, count)| (reason.label().to_owned(), count)).collect(),
            },
            services: self.engine.status(now),
        }
    }
}

/// Carries what the programs log to our own log.
fn carry_log(mut logger: aya_log::EbpfLogger<&'static dyn log::Log>) {
    /// For a person who debugs; without `--program-log` this does not run.
    const EVERY: Duration = Duration::from_millis(100);
    tokio::spawn(async move {
        let mut interval = tokio::time::interval(EVERY);
        loop {
            interval.tick().await;
            logger.flush();
        }
    });
}
