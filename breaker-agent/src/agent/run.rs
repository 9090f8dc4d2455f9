//! The loop: reads the clock, owns the sockets, and gives the engine everything that happens.

use std::{
    collections::{BTreeMap, BTreeSet, HashMap},
    os::fd::OwnedFd,
    path::PathBuf,
    sync::Arc,
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
    status::{AgentStatus, DatapathStatus, ProcessStatus},
};
use crate::{
    check::{Checkers, Report, Target},
    config::{AgentConfig, AttachMode, ConfigError, XdpPolicy},
    control::{self, Request},
    datapath::{
        Datapath as _,
        kernel::{
            Attacher, Interface, InterfaceChange, KernelDatapath, LoadOptions, Located, PinDir, Side, Sizes, Wanted,
            has_tcx, install_masquerade_rule, load, remove_masquerade_rule, watch_interfaces, watch_pods,
        },
    },
    model::Service,
    preflight,
    source::{
        file::FileSource,
        kube::{self, Facts, KubeSource, Place, Update},
    },
};

/// How often the heart beats.
const BEAT: Duration = Duration::from_secs(1);
/// How often the ring buffer is looked into without being woken.
const LOOK: Duration = Duration::from_millis(500);
/// Heartbeats between two looks for a socket load balancer.
const LOOK_AROUND: u32 = 30;
/// The least between two looks at what time alone changes.
const PAUSE: Duration = Duration::from_millis(20);

/// The least between two looks at what the others might want to know.
const TELL: Duration = Duration::from_millis(100);

/// How large the maps are to be.
fn sizes(config: &AgentConfig) -> Sizes {
    let by_memory = Sizes::default();
    let sizes =
        config.max_services.map_or(by_memory, |services| Sizes::for_services(services).with_flows(by_memory.flows));
    config.max_flows.map_or(sizes, |flows| sizes.with_flows(flows))
}

/// Where services come from.
#[derive(Clone, Debug)]
pub enum Origin {
    /// A file.
    File {
        /// Its path.
        path: PathBuf,
        /// What was in it when it was read; a difference later is a change.
        text: String,
        /// What that meant.
        services: Vec<Service>,
    },
    /// Kubernetes.
    Kubernetes(Place),
}

/// How an agent is started.
#[derive(Clone, Debug)]
pub struct Options {
    /// About the agent.
    pub agent: AgentConfig,
    /// Where services come from.
    pub origin: Origin,
    /// Take everything away at the end, instead of leaving it to the next agent.
    pub detach: bool,
    /// The programs' own log level; `None` takes the log out of them.
    pub program_log: Option<log::Level>,
}

/// Runs an agent until it is told to end.
///
/// # Errors
/// What kept it from starting; nothing of an earlier agent's was changed then.
pub async fn run(options: Options) -> Result<()> {
    crate::install_crypto();
    let config = options.agent;
    anyhow::ensure!(
        config.attach != AttachMode::Tcx || has_tcx(),
        "agent.attach: Tcx needs kernel 6.6; allowed here: Auto, Clsact"
    );
    let pins = PinDir::open(&config.pin_path)?;
    let adopted = pins.adopted();
    let loaded = load(
        &pins,
        &LoadOptions {
            sizes: sizes(&config),
            masquerade_mark: config.masquerade_mark,
            log_level: options.program_log,
            sockets: config.node_sockets,
            xdp: config.xdp != XdpPolicy::Off,
        },
    )?;
    let xdp = match &loaded.xdp {
        Ok(()) => config.xdp,
        Err(why) => {
            tracing::warn!("no XDP, tc does its work: {why}");
            XdpPolicy::Off
        }
    };
    if let (true, Err(why)) = (config.node_sockets, &loaded.sockets) {
        tracing::warn!("the node's own processes are not protected: {why}");
    }
    let sockets = loaded.sockets.clone();
    if let Some(logger) = loaded.logger {
        carry_log(logger);
    }
    let events = loaded.maps.events_ready()?;
    let attacher = Attacher::new(loaded.programs, loaded.tail_calls, &pins, config.attach, config.attach_order, xdp);
    let clock = Clock::new();
    let engine = Engine::new(KernelDatapath::new(loaded.maps), clock.now())?;
    let (reports_in, reports) = mpsc::channel(4096);
    let (requests_in, requests) = mpsc::channel(64);
    let (latest_event, latest_event_out) = watch::channel(0);
    let _socket = control::serve(&config.socket, requests_in.clone(), latest_event_out)?;
    if let Some(address) = config.listen {
        control::health::serve(address, requests_in).await?;
    }
    let (source, services) = match options.origin {
        Origin::File { path, text, services } => (Source::File(FileSource::watch(&path, text)?), Some(services)),
        Origin::Kubernetes(mut place) => {
            // Some are left for those that leave.
            place.room = (engine.datapath().sizes().services as usize).saturating_sub(16).max(1);
            let client = kube::client(place.kubeconfig.as_deref()).await?;
            (Source::Kubernetes(Box::new(KubeSource::start(&client, &place))), None)
        }
    };

    let (near_wanted, near_wanted_out) = watch::channel(false);
    let pods = watch_pods(near_wanted_out)?;
    let mut agent = Agent {
        clock,
        engine,
        attacher,
        failed_interfaces: BTreeMap::new(),
        names: HashMap::new(),
        checkers: Checkers::new(reports_in),
        latest_event,
        config: config.clone(),
        service_count: None,
        update: Arc::default(),
        sockets,
        masquerade_rule: masquerade_rule(&config),
        incompatible: preflight::socket_load_balancer(),
        near_wanted,
        near: false,
        pods: None,
        beats: 0,
        handover: None,
        unreported: true,
        reported_changes: 0,
        reported_at: Duration::ZERO,
    };
    // Alive first, then the decisions, then the programs that act on them. What an earlier agent left goes on until the
    // source has said what is wanted.
    agent.beat();
    if let Some(services) = services {
        agent.configure(services);
    }
    let wanted = Wanted { veths: config.veths, uplinks: config.uplinks, globs: config.interfaces.clone() };
    let (present, interfaces) = watch_interfaces(wanted).await.context("watch the interfaces")?;
    agent.attacher.begin()?;
    agent.attach_all(present);
    let pid = std::process::id();
    let mode = agent.attacher.mode();
    let count = agent.attacher.attached().len();
    tracing::info!(pid, adopted, attach = ?mode, interfaces = count, services = agent.service_count, "ready");
    agent.run(Inputs { reports, requests, interfaces, pods, events, source }).await?;
    if options.detach {
        drop(agent);
        let cleaned = pins.remove()?;
        tracing::info!(links = cleaned.links, maps = cleaned.maps, "took the datapath away");
    } else {
        tracing::info!("the datapath stays as it is; the next agent takes it over");
    }
    Ok(())
}

/// A rule of our own for the masquerade mark. Where there is a kube-proxy, nobody misses it.
fn masquerade_rule(config: &AgentConfig) -> Result<(), String> {
    let outcome = if config.masquerade_rule {
        install_masquerade_rule(config.masquerade_mark)
    } else {
        remove_masquerade_rule().and_then(|_| Err(anyhow::anyhow!("switched off")))
    };
    outcome.map_err(|error| {
        let why = format!("{error:#}");
        tracing::info!("no rule of our own for the masquerade mark, kube-proxy's is needed: {why}");
        why
    })
}

/// Everything that can happen.
struct Inputs {
    reports: mpsc::Receiver<Report>,
    requests: mpsc::Receiver<Request>,
    interfaces: mpsc::Receiver<InterfaceChange>,
    pods: mpsc::Receiver<Located>,
    events: AsyncFd<OwnedFd>,
    source: Source,
}

/// A source of services.
enum Source {
    File(FileSource),
    Kubernetes(Box<KubeSource>),
}

/// What a source said.
enum News {
    /// Look at the file.
    File,
    /// This is wanted.
    Update(Arc<Update>),
}

impl Source {
    /// Waits for something new. Safe to cancel.
    async fn changed(&mut self) -> News {
        match self {
            Self::File(file) => {
                file.changed().await;
                News::File
            }
            Self::Kubernetes(kube) => News::Update(kube.changed().await),
        }
    }
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
    checkers: Checkers,
    latest_event: watch::Sender<u64>,
    config: AgentConfig,
    /// Services that are configured; none before the source has said so.
    service_count: Option<usize>,
    /// What Kubernetes said last.
    update: Arc<Update>,
    /// Whether the node's own sockets are seen, or why not.
    sockets: Result<(), String>,
    /// Whether there is a rule of our own for the masquerade mark, or why not.
    masquerade_rule: Result<(), String>,
    /// What hides VIPs from the programs.
    incompatible: Option<String>,
    /// Whether anybody wants to know where pods are.
    near_wanted: watch::Sender<bool>,
    /// Whether a service does.
    near: bool,
    /// Where they are, as far as it is known; `None` before the first look: what an earlier agent found goes on.
    pods: Option<Located>,
    beats: u32,
    /// Until when the last word is to hold without us.
    handover: Option<Duration>,
    /// Something that others might want to know has changed.
    unreported: bool,
    reported_changes: u64,
    reported_at: Duration,
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
            let mut due = self.engine.next_deadline(self.clock.now()).clamp(last_tick + PAUSE, last_tick + LOOK);
            if self.unreported && self.update.synced {
                due = due.min((self.reported_at + TELL).max(last_tick + PAUSE));
            }
            let due = self.clock.origin + due;
            tokio::select! {
                _ = terminate.recv() => break,
                _ = interrupt.recv() => break,
                _ = hangup.recv() => if let Source::File(file) = &inputs.source {
                    self.reload(file, "SIGHUP");
                },
                news = inputs.source.changed() => match (news, &inputs.source) {
                    (News::File, Source::File(file)) => self.reload(file, "the file changed"),
                    (News::Update(update), _) => self.update(update),
                    (News::File, Source::Kubernetes(_)) => {}
                },
                _ = beat.tick() => self.beat(),
                Some(report) = inputs.reports.recv() => self.engine.report(self.clock.now(), &report),
                Some(request) = inputs.requests.recv() => self.answer(request),
                Some(change) = inputs.interfaces.recv() => {
                    self.interface(change);
                    self.locate();
                }
                Some(pods) = inputs.pods.recv() => {
                    self.found(pods);
                    self.locate();
                }
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
            if let Source::Kubernetes(kube) = &inputs.source {
                self.tell(kube);
            }
        }
        if let Source::Kubernetes(kube) = &inputs.source {
            kube.farewell().await;
        }
        Ok(())
    }

    /// Tells the other nodes what is in force here, if that changed.
    fn tell(&mut self, kube: &KubeSource) {
        let changes = self.engine.changes();
        self.unreported |= changes != self.reported_changes;
        let now = self.clock.now().mono;
        if !self.unreported || !self.update.synced || now < self.reported_at + TELL {
            return;
        }
        self.unreported = false;
        self.reported_changes = changes;
        self.reported_at = now;
        let failed = self.failed_interfaces.values();
        kube.report(Facts {
            update: self.update.clone(),
            summaries: self.engine.summaries(),
            attach: format!("{:?}", self.attacher.mode()),
            interfaces: self.attacher.attached().len(),
            failed_interfaces: failed.map(|(name, error)| format!("{name}: {error}")).collect(),
            sockets: self.sockets.clone().err(),
            incompatible: self.incompatible.clone(),
        });
    }

    /// Takes in what Kubernetes wants.
    fn update(&mut self, update: Arc<Update>) {
        self.unreported = true;
        let services = update.services();
        if self.service_count.is_none() {
            tracing::info!(services = services.len(), "heard from the API server");
        }
        self.update = update;
        self.configure(services);
    }

    fn beat(&mut self) {
        self.beats = self.beats.wrapping_add(1);
        self.want_near();
        if self.beats.is_multiple_of(LOOK_AROUND) {
            let found = preflight::socket_load_balancer();
            self.unreported |= found != self.incompatible;
            self.incompatible = found;
        }
        let unix_ns = u64::try_from(Timestamp::now().as_nanosecond()).unwrap_or(0);
        let now = self.clock.now().mono;
        let mut lease = self.config.lease;
        match self.handover {
            // Whoever said that we go was wrong, or the next one took its time: the usual lease again.
            Some(until) if until <= now => self.handover = None,
            // A lease of zero holds for ever already.
            Some(until) if !lease.is_zero() => lease = lease.max(until - now),
            _ => {}
        }
        self.engine.datapath_mut().beat(lease, unix_ns);
    }

    fn configure(&mut self, services: Vec<Service>) {
        self.service_count = Some(services.len());
        self.near = services.iter().any(Service::wants_near);
        self.want_near();
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
        let engine = &self.engine;
        self.checkers.want(wanted, |target| engine.known_health(target));
    }

    /// Pods are looked for as long as a service asks for it, or a flow goes by where they are.
    fn want_near(&mut self) {
        let wanted = self.near || self.engine.datapath().any_fast();
        self.near_wanted.send_if_modified(|before| std::mem::replace(before, wanted) != wanted);
    }

    /// A pod that was found once is where it was, until its address shows elsewhere or its interface is gone: the kernel's
    /// tables forget a pod that the node does not talk to, and connections go on that do not pass them.
    fn found(&mut self, pods: Located) {
        let mut known = self.pods.take().unwrap_or_default();
        known.retain(|_, index| self.names.contains_key(index));
        known.extend(pods);
        self.pods = Some(known);
    }

    /// Tells the programs which backends are pods of this node. One behind an interface without our programs is none: its
    /// answers would not pass us.
    fn locate(&mut self) {
        let Some(pods) = &self.pods else { return };
        let attached = self.attacher.attached();
        let ours = |index: &u32| attached.get(index).is_some_and(|attached| attached.side == Side::Pod);
        let near = pods.iter().filter(|(_, index)| ours(index)).map(|(address, index)| (*address, *index)).collect();
        self.engine.datapath_mut().locate(near);
    }

    fn reload(&mut self, source: &FileSource, why: &str) {
        let now = self.clock.now();
        match source.load() {
            Ok(config) => {
                if config.agent != self.config {
                    let message = "the section `agent` changed: that takes effect at the next start";
                    tracing::warn!("{message}");
                    self.engine.note(now, "Config", message.into());
                }
                let count = config.services.len();
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

    fn attach_all(&mut self, present: Vec<Interface>) {
        let indices: BTreeSet<u32> = present.iter().map(|interface| interface.index).collect();
        self.attacher.forget_all_but(&indices);
        self.names.retain(|index, _| indices.contains(index));
        self.failed_interfaces.retain(|index, _| indices.contains(index));
        // Also where there are programs: an index may be another interface's by now.
        present.into_iter().for_each(|interface| self.attach(interface));
    }

    fn attach(&mut self, interface: Interface) {
        let outcome = self.attacher.attach(&interface);
        let Interface { index, name, .. } = interface;
        self.names.insert(index, name.clone());
        match outcome {
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

    fn interface(&mut self, change: InterfaceChange) {
        self.unreported = true;
        match change {
            InterfaceChange::Present(interface) => match self.attacher.attached().get(&interface.index) {
                // A veth becomes an uplink when a default route is put on it.
                Some(attached) if attached.side == interface.side => {
                    self.names.insert(interface.index, interface.name);
                }
                _ => self.attach(interface),
            },
            InterfaceChange::All(present) => self.attach_all(present),
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
            Request::Ready(reply) => {
                let waiting = "the API server has not told yet what is wanted; what an earlier agent left goes on";
                drop(reply.send(self.service_count.map(drop).ok_or_else(|| waiting.to_owned())));
            }
            Request::Handover { duration, reply } => {
                self.handover = Some(now.mono + duration);
                self.beat();
                tracing::info!(seconds = duration.as_secs(), "about to be replaced: the last word holds for so long");
                let _ = reply.send(());
            }
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
            process: ProcessStatus::of_self(),
            last_beat: Some(now.unix),
            lease_seconds: self.config.lease.as_secs(),
            datapath: DatapathStatus {
                pin_path: self.config.pin_path.display().to_string(),
                attach: format!("{:?}", self.attacher.mode()),
                interfaces: self.attacher.attached().iter().map(|(i, a)| name_of(i, &a.name)).collect(),
                failed_interfaces: self.failed_interfaces.values().cloned().collect(),
                xdp: self
                    .attacher
                    .attached()
                    .iter()
                    .filter_map(|(index, attached)| {
                        let outcome = attached.xdp.clone()?;
                        let words =
                            outcome.map_or_else(|why| format!("not, tc alone: {why}"), |()| "native".to_owned());
                        Some((name_of(index, &attached.name), words))
                    })
                    .collect(),
                node_sockets: self.sockets.clone().err(),
                masquerade_rule: self.masquerade_rule.clone().err(),
                flow_entries: self.engine.flow_entries(),
                flow_pressure: self.engine.flow_pressure(),
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
