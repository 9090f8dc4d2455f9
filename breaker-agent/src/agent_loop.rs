//! The agent's main loop. It reads the clock, receives signals and all other inputs, and passes them to the engine.

use std::{collections::BTreeMap, os::fd::OwnedFd, sync::Arc, time::Duration};

use breaker_api::{
    events::EventLine,
    status::{AgentStatus, DatapathStatus, Restored, SuspendedPath},
};
use breaker_core::{
    engine::{
        CommandError, Engine,
        journal::{EntryKind, Level, LogLine},
        snapshot::ServiceSnapshot,
    },
    model::Service,
    probe::Target,
    time::Now,
};
use tokio::{
    io::unix::AsyncFd,
    sync::{mpsc, watch},
};

use crate::{
    check::{Checkers, Known, reports::Inbox},
    clock::{self, Clock},
    command::{Command, ReadyCheck},
    config::{AgentConfig, ConfigError},
    datapath::{
        KernelDatapath, interfaces::InterfaceChange, masquerade, neighbors::LocalPods, preflight, return_paths,
    },
    heartbeat::{self, Lease},
    interfaces::{Interfaces, Outcome},
    logging::Incidents,
    metrics::{
        self, Instruments, Snapshot,
        snapshot::{DatapathInfo, MapFill},
    },
    process,
    resets::{self, Resets},
    signals::Signals,
    source::{
        file::FileSource,
        kube::{Access, KubeSource, NodeState, Update},
    },
    systemd::ServiceManager,
    view,
    web::Listeners,
};

/// Longest interval between two ticks of the engine. A tick also reads the ring buffer, so events are read at least
/// this often even if no wake-up arrives.
const EVENT_POLL: Duration = Duration::from_millis(500);
/// Shortest interval between two ticks that are due because time passed.
const MIN_TICK: Duration = Duration::from_millis(20);
/// Shortest interval between two reports of this node's state to the Kubernetes source.
const MIN_REPORT_INTERVAL: Duration = Duration::from_millis(100);

/// The inputs of the main loop.
pub struct Inputs {
    /// Results of probes.
    pub reports: Inbox,
    /// Requests of the control socket and of kubelet.
    pub commands: mpsc::Receiver<Command>,
    /// Changes of the node's interfaces.
    pub interfaces: mpsc::Receiver<InterfaceChange>,
    /// What the thread that attaches programs has done.
    pub attached: mpsc::UnboundedReceiver<Outcome>,
    /// Outcomes for established connections when breakers opened.
    pub resets: mpsc::UnboundedReceiver<resets::Report>,
    /// Pods of this node, as each search finds them.
    pub pods: mpsc::Receiver<LocalPods>,
    /// Becomes readable when the programs have urgent events.
    pub events: AsyncFd<OwnedFd>,
    /// Where the services are configured.
    pub source: Source,
    /// The operator's signals.
    pub signals: Signals,
}

/// The source of the services.
pub enum Source {
    /// A file.
    File(FileSource),
    /// The Kubernetes API.
    Kubernetes(Box<KubeSource>),
}

/// An event from a source.
enum SourceEvent {
    /// The file changed and must be read again.
    FileChanged,
    /// Kubernetes has a new configuration.
    Update(Arc<Update>),
}

impl Source {
    /// Waits for the next change. This method is cancel safe.
    async fn changed(&mut self) -> SourceEvent {
        match self {
            Self::File(file) => {
                file.changed().await;
                SourceEvent::FileChanged
            }
            Self::Kubernetes(kube) => SourceEvent::Update(kube.changed().await),
        }
    }
}

/// The state of the main loop.
pub struct Agent {
    /// The clocks.
    pub clock: Clock,
    /// Makes the decisions.
    pub engine: Engine,
    /// The programs and maps.
    pub datapath: KernelDatapath,
    /// The interfaces with programs.
    pub interfaces: Interfaces,
    /// The running checks.
    pub checkers: Checkers,
    /// Counters of lost log lines and of panics.
    pub incidents: Incidents,
    /// The numbers that the agent counts itself.
    pub instruments: Arc<Instruments>,
    /// The TCP listeners for health and metrics.
    pub listeners: Listeners,
    /// The service manager that started the agent, if any.
    pub service_manager: ServiceManager,
    /// The resources that the API server refuses to the agent; `None` if the services come from a file.
    pub access: Option<Access>,
    /// Id of the latest event, for readers that wait.
    pub latest_event: watch::Sender<u64>,
    /// The section `agent` of the configuration, as it was at the start.
    pub config: AgentConfig,
    /// How long the programs trust the agent.
    pub lease: Lease,
    /// Number of configured services; `None` until the source has delivered a configuration.
    pub service_count: Option<usize>,
    /// The last update from Kubernetes.
    pub update: Arc<Update>,
    /// What others took away and the agent put back: names of interfaces, `nodeSockets`, or `masqueradeRule`.
    pub restored: BTreeMap<String, Restored>,
    /// Reaches clients that wait when a breaker opens. The error says why that is not possible.
    pub resets: Result<Resets, String>,
    /// The engine's revision when `resets` was last told.
    pub resets_told: u64,
    /// The protection of the node's own sockets. The error says why there is none.
    pub sockets: Result<(), String>,
    /// breaker's own rule for the masquerade mark. The error says why it is not installed.
    pub masquerade_rule: Result<(), String>,
    /// A socket load balancer on this node that hides VIPs from the programs, if there is one.
    pub incompatible: Option<String>,
    /// Programs of another datapath that may deliver answers past breaker's, if there are any.
    pub bypass: Option<String>,
    /// Switches the search for pods on (true) and off.
    pub pods_wanted: watch::Sender<bool>,
    /// Whether a service needs to know which backends are pods on this node.
    pub needs_local_pods: bool,
    /// Something changed that other nodes should know.
    pub unreported: bool,
    /// The engine's count of changes at the last report.
    pub reported_changes: u64,
    /// When the last report was made.
    pub reported_at: Duration,
}

impl Agent {
    /// Runs until SIGTERM or SIGINT.
    pub async fn run(&mut self, mut inputs: Inputs) {
        let mut heartbeat = tokio::time::interval(heartbeat::INTERVAL);
        let mut last_tick = self.clock.now().mono;
        loop {
            // The deadline counts from the last tick, not from now: other inputs, however many, do not postpone it.
            let now = self.clock.now();
            let mut due = self.engine.next_deadline(now).clamp(last_tick + MIN_TICK, last_tick + EVENT_POLL);
            if self.unreported && self.update.synced {
                due = due.min((self.reported_at + MIN_REPORT_INTERVAL).max(last_tick + MIN_TICK));
            }
            let due = self.clock.instant_of(due);
            tokio::select! {
                hangup = inputs.signals.next_is_hangup() => match &inputs.source {
                    _ if !hangup => break,
                    Source::File(file) => self.reload(file, "SIGHUP"),
                    Source::Kubernetes(_) => {}
                },
                event = inputs.source.changed() => match (event, &inputs.source) {
                    (SourceEvent::FileChanged, Source::File(file)) => self.reload(file, "the file changed"),
                    (SourceEvent::Update(update), _) => self.update(update),
                    (SourceEvent::FileChanged, Source::Kubernetes(_)) => {}
                },
                _ = heartbeat.tick() => {
                    self.heartbeat();
                    if self.service_manager.is_present() {
                        self.service_manager.beat(self.is_ready(), self.engine.by_state());
                    }
                }
                reports = inputs.reports.recv() => {
                    for report in &reports {
                        self.engine.observe(self.clock.now(), report, &mut self.datapath);
                    }
                }
                Some(command) = inputs.commands.recv() => self.answer(command),
                Some(change) = inputs.interfaces.recv() => {
                    self.unreported = true;
                    self.interfaces.change(change);
                    self.set_local_pods();
                }
                Some(outcome) = inputs.attached.recv() => {
                    self.unreported = true;
                    let back = self.interfaces.done(outcome);
                    self.report_restored(back);
                    self.set_local_pods();
                }
                Some(report) = inputs.resets.recv() => self.note_established(&report),
                Some(pods) = inputs.pods.recv() => {
                    self.interfaces.add_pods(pods);
                    self.set_local_pods();
                }
                ready = inputs.events.readable() => {
                    if let Ok(mut ready) = ready {
                        ready.clear_ready();
                    }
                    self.tick();
                }
                () = tokio::time::sleep_until(due) => {
                    last_tick = self.clock.now().mono;
                    self.tick();
                }
            }
            for (service, epoch) in self.engine.take_transitions() {
                self.checkers.begin_epoch(&service, epoch);
            }
            self.follow_departures();
            self.engine.take_log().iter().for_each(log);
            let latest = self.engine.last_event();
            self.latest_event.send_if_modified(|id| std::mem::replace(id, latest) != latest);
            if let Source::Kubernetes(kube) = &inputs.source {
                self.publish_node_state(kube);
            }
        }
        self.service_manager.stopping();
        if let Source::Kubernetes(kube) = &inputs.source {
            kube.shutdown().await;
        }
    }

    fn tick(&mut self) {
        let now = self.clock.now();
        if self.engine.tick(now, &mut self.datapath) {
            self.engine.record_sweep_duration(self.clock.now().mono - now.mono);
        }
    }

    /// Has the established connections counted and reset of the tiers that services have left.
    fn follow_departures(&mut self) {
        let revision = self.engine.revision();
        if let Ok(resets) = &mut self.resets
            && std::mem::replace(&mut self.resets_told, revision) != revision
        {
            resets.follow(self.engine.departures());
        }
    }

    fn note_established(&mut self, report: &resets::Report) {
        let resets::Report { service, counts, ended } = report;
        self.engine.note_established(service, *counts);
        let Some(resets::Ended { took, local, broken_off, error }) = ended else { return };
        if counts.found == 0 && error.is_none() {
            return;
        }
        let mut message = format!("{}; it took {:.1} s", view::established(*counts).words(), took.as_secs_f64());
        if *local > 0 {
            message += &format!("; of the node's own processes, and not closed: {local}");
        }
        if *broken_off {
            message += "; the service returned to them, or was configured anew, before the others were reset";
        }
        if let Some(error) = error {
            message += &format!("; the others are reset at their clients' next segments only: {error}");
        }
        let level = if error.is_some() { Level::Warn } else { Level::Info };
        self.engine.note_about(self.clock.now(), level, service, EntryKind::Resets, message);
    }

    /// Publishes the state of this node through the Kubernetes source, if it changed, at most once every
    /// [`MIN_REPORT_INTERVAL`].
    fn publish_node_state(&mut self, kube: &KubeSource) {
        let changes = self.engine.changes();
        self.unreported |= changes != self.reported_changes;
        let now = self.clock.now();
        if !self.unreported || !self.update.synced || now.mono < self.reported_at + MIN_REPORT_INTERVAL {
            return;
        }
        self.unreported = false;
        self.reported_changes = changes;
        self.reported_at = now.mono;
        kube.publish_node_state(NodeState {
            update: self.update.clone(),
            summaries: self.engine.summaries(),
            attach: self.interfaces.attach_mode(),
            interfaces: self.interfaces.count(),
            failed_interfaces: self.interfaces.failures(),
            unseen: self.interfaces.notes(),
            degraded: self.degraded(),
            suspended: self.suspended(now).into_iter().fold(BTreeMap::new(), |mut by_service, path| {
                by_service.entry(path.service).or_default().push(path.interface);
                by_service
            }),
            bypass: self.bypass.clone(),
            sockets: self.sockets.clone().err(),
            incompatible: self.incompatible.clone(),
        });
    }

    /// Applies a new configuration from Kubernetes.
    fn update(&mut self, update: Arc<Update>) {
        self.unreported = true;
        let services = update.services();
        if self.service_count.is_none() {
            tracing::info!(services = services.len(), "received the first configuration from the API server");
        }
        self.update = update;
        self.configure(services);
    }

    /// Sends a heartbeat to the programs.
    pub fn heartbeat(&mut self) {
        let now = self.clock.now();
        let lease = self.lease.beat(now.mono);
        self.update_pods_wanted();
        if self.lease.is_scan_due() {
            let (incompatible, bypass) = (preflight::socket_load_balancer(), preflight::other_datapath());
            self.unreported |= (&incompatible, &bypass) != (&self.incompatible, &self.bypass);
            (self.incompatible, self.bypass) = (incompatible, bypass);
        }
        self.datapath.heartbeat(lease, now.unix_ns);
        if self.lease.is_restore_due() {
            self.restore();
            self.watch_return_paths(now);
        }
    }

    /// Stops to redirect where the answers of backups are not seen, and tries again later.
    fn watch_return_paths(&mut self, now: Now) {
        let interfaces = &self.interfaces;
        let changes = match self.datapath.watch_return_paths(now.mono, |index| interfaces.exists(index)) {
            Ok(changes) => changes,
            Err(error) => return tracing::warn!("cannot look after the return paths: {error:#}"),
        };
        for change in changes {
            let (interface, (answered, unanswered)) = (self.interfaces.name(change.interface), change.counts);
            let message = match change.suspended_for {
                Some(duration) => format!(
                    "{interface}: {unanswered} repeated connection attempts to the backup had no answer, {answered} had \
                     one; new connections are left to kube-proxy there for {} s",
                    duration.as_secs()
                ),
                None => format!("{interface}: new connections are redirected again, as a trial"),
            };
            self.engine.note_about(now, Level::Warn, &change.service, EntryKind::ReturnPath, message);
            self.unreported = true;
        }
    }

    /// Puts back what somebody else has taken away: a firewall's reload, a CNI's restart, another agent's cleanup.
    fn restore(&mut self) {
        // What is not there by the configuration, or because the kernel refused it, is not missed.
        self.interfaces.restore(self.sockets.is_ok());
        match self.masquerade_rule.is_ok().then(|| masquerade::restore(self.config.masquerade_mark)) {
            None | Some(Ok(false)) => {}
            Some(Ok(true)) => self.report_restored(vec!["masqueradeRule".into()]),
            Some(Err(error)) => tracing::debug!("cannot look after masqueradeRule: {error:#}"),
        }
    }

    /// Reports what was put back.
    fn report_restored(&mut self, back: Vec<String>) {
        let now = self.clock.now();
        let last = clock::timestamp(now.unix_ns);
        for what in &back {
            let restored = self.restored.entry(what.clone()).or_insert(Restored { count: 0, last });
            *restored = Restored { count: restored.count + 1, last };
        }
        if !back.is_empty() {
            let message = format!("somebody took away, and the agent put back: {}", back.join(", "));
            tracing::warn!("{message}");
            self.engine.note(now, EntryKind::Restored, message);
            self.unreported = true;
        }
    }

    /// Applies a configuration.
    pub fn configure(&mut self, services: Vec<Arc<Service>>) {
        if self.service_count.is_none() {
            self.instruments.note_first_configuration(clock::wall().as_second());
        }
        self.service_count = Some(services.len());
        self.needs_local_pods = services.iter().any(|service| service.needs_local_backends());
        self.update_pods_wanted();
        let targets = targets(&services);
        self.engine.configure(self.clock.now(), services, &mut self.datapath);
        let engine = &self.engine;
        self.checkers.set_targets(targets, |target| Known {
            health: engine.known_health(target),
            epoch: engine.state_epoch(&target.service),
        });
    }

    /// Switches the search for pods on while a service needs local pods or a flow may use the fast path, otherwise off.
    fn update_pods_wanted(&self) {
        let wanted = self.needs_local_pods || self.datapath.fast_path_in_use();
        self.pods_wanted.send_if_modified(|before| std::mem::replace(before, wanted) != wanted);
    }

    /// Passes the known pods of this node to the datapath.
    fn set_local_pods(&mut self) {
        if let Some(pods) = self.interfaces.local_pods() {
            self.datapath.set_local_pods(pods);
        }
    }

    fn reload(&mut self, source: &FileSource, why: &str) {
        let now = self.clock.now();
        match source.load() {
            Ok(config) => {
                if config.agent != self.config {
                    let message = "the section `agent` changed; the change takes effect at the agent's next start";
                    tracing::warn!("{message}");
                    self.engine.note(now, EntryKind::Config, message.into());
                }
                let count = config.services.len();
                self.configure(config.services.into_iter().map(Arc::new).collect());
                tracing::info!(services = count, "configuration reloaded ({why})");
                self.instruments.count_reload(true, clock::wall().as_second());
                self.engine.note(now, EntryKind::Config, format!("reloaded ({why}): {count} services"));
            }
            Err(errors) => {
                self.instruments.count_reload(false, clock::wall().as_second());
                for error in &errors {
                    tracing::error!("the new configuration is refused, the old one stays in force: {error}");
                }
                let message = errors.iter().map(ConfigError::to_string).collect::<Vec<_>>().join("; ");
                let message = format!("old configuration stays in force ({why}): {message}");
                self.engine.note(now, EntryKind::ConfigRefused, message);
            }
        }
    }

    fn answer(&mut self, command: Command) {
        let now = self.clock.now();
        let status = |outcome: Result<ServiceSnapshot, CommandError>| outcome.map(view::service);
        // A failed `send` is no error: the requester may have gone away.
        match command {
            Command::Status(reply) => drop(reply.send(self.status(now))),
            Command::Agent(reply) => drop(reply.send(self.own_status(now))),
            Command::Services { after, most, reply } => {
                let services = self.engine.snapshots_after(now, &self.datapath, after.as_ref(), most);
                drop(reply.send(services.into_iter().map(view::service).collect()));
            }
            Command::Get(name, reply) => {
                drop(reply.send(status(self.engine.snapshot(now, &name, &self.datapath))));
            }
            Command::Trip { name, duration, reason, reply } => {
                let outcome = self.engine.force_open(now, &name, duration, reason.as_deref(), &mut self.datapath);
                drop(reply.send(status(outcome)));
            }
            Command::Reset(name, reply) => {
                drop(reply.send(status(self.engine.reset(now, &name, &mut self.datapath))));
            }
            Command::Flows { name, limit, reply } => {
                let flows = self.engine.flows(&name, limit, &self.datapath);
                drop(reply.send(flows.map(|flows| flows.iter().map(view::flow).collect())));
            }
            Command::Ready(reply) => drop(reply.send(self.ready_checks())),
            Command::Metrics { level, reply } => drop(reply.send(self.numbers(now, level))),
            Command::Measures { query, reply } => {
                drop(reply.send(self.engine.measures(now, &self.datapath, &query)));
            }
            Command::Handover { duration, reply } => {
                self.lease.hand_over(now.mono, duration);
                self.heartbeat();
                tracing::info!(seconds = duration.as_secs(), "about to be replaced: extended the lease");
                let _ = reply.send(());
            }
            Command::Events { after, reply } => {
                let events: Vec<EventLine> = self.engine.events_after(after).into_iter().map(view::event).collect();
                drop(reply.send(events));
            }
        }
    }

    /// The checks of the agent's readiness. A failure that a restart would not mend does not count: during a
    /// rollout, an agent that is not ready stops the replacement of the others.
    fn ready_checks(&self) -> Vec<ReadyCheck> {
        let check = |name, counts, outcome| ReadyCheck { name, outcome, counts };
        let waiting = "no configuration from the API server yet; an earlier agent's decisions stay in force";
        let programs = match self.interfaces.waiting_at_start() {
            0 => Ok(()),
            number => Err(format!("{number} interfaces wait for their programs")),
        };
        let interfaces = self.interfaces.failures();
        let unapplied = self.engine.unapplied();
        let mut checks = vec![
            check("config", true, self.service_count.map(drop).ok_or_else(|| waiting.to_owned())),
            check("programs", true, programs),
            check("interfaces", false, pass_if_empty(&interfaces, || interfaces.join("; "))),
            check(
                "writes",
                false,
                pass_if_empty(&unapplied, || format!("not in the kernel: {}", unapplied.join(", "))),
            ),
        ];
        if let Some(access) = &self.access {
            checks.push(check("kube-access", true, access.problem().map_or(Ok(()), Err)));
            let missing: Vec<String> =
                self.instruments.synced().into_iter().filter_map(|(name, synced)| (!synced).then_some(name)).collect();
            checks.push(check(
                "kube-sync",
                false,
                pass_if_empty(&missing, || format!("no list yet of: {}", missing.join(", "))),
            ));
        }
        let problems = self.listeners.problems();
        checks.push(check("listeners", false, pass_if_empty(&problems, || problems.join("; "))));
        checks
    }

    fn is_ready(&self) -> bool {
        self.ready_checks().iter().all(|check| check.outcome.is_ok() || !check.counts)
    }

    /// The numbers for a scrape of metrics.
    fn numbers(&self, now: Now, level: Option<metrics::Level>) -> Snapshot {
        let by_state = self.engine.by_state();
        let breakers = usize::try_from(by_state.iter().sum::<u64>()).unwrap_or(usize::MAX);
        let tables = self.engine.flow_tables();
        let fill = self.datapath.fill(tables).into_iter();
        Snapshot {
            settings: self.config.metrics,
            level: metrics::Level::of(level.or(self.config.metrics.level), breakers),
            is_kubernetes: self.access.is_some(),
            is_ready: self.is_ready(),
            lease: self.config.lease,
            heartbeat_unix_ns: now.unix_ns,
            listeners: self.listeners.all().into_iter().map(|(name, outcome)| (name, outcome.is_ok())).collect(),
            panics: self.incidents.panics(),
            lost_log_lines: self.incidents.lost_log_lines(),
            process: process::numbers(),
            interfaces: self.interfaces.by_side(),
            suspended: self.datapath.suspended_paths().len(),
            restored: self.restored.values().map(|restored| restored.count).sum(),
            datapath: DatapathInfo {
                attach: self.interfaces.attach_mode().label(),
                xdp: self.config.xdp.label(),
                node_sockets: self.sockets.is_ok(),
                masquerade_rule: self.masquerade_rule.is_ok(),
            },
            reasons: self.datapath.reasons().unwrap_or_default(),
            maps: fill.map(|(name, entries, max_entries)| MapFill { name, entries, max_entries }).collect(),
            flows: tables.map(|tables| tables.live),
            probes: self.checkers.load(),
            by_state,
            services: Vec::new(),
        }
    }

    /// Interfaces on which new connections of a service are left to kube-proxy for now.
    fn suspended(&self, now: Now) -> Vec<SuspendedPath> {
        let paths = self.datapath.suspended_paths().into_iter();
        let view = |path: return_paths::SuspendedPath| {
            let left = path.until.saturating_sub(now.mono);
            SuspendedPath {
                interface: self.interfaces.name(path.interface),
                service: path.service.to_string(),
                until: clock::timestamp(now.unix_ns + u64::try_from(left.as_nanos()).unwrap_or(0)),
            }
        };
        paths.map(view).collect()
    }

    /// The functions that an error takes from the agent, in words.
    fn degraded(&self) -> Vec<String> {
        let access = self.access.as_ref().and_then(Access::problem);
        self.listeners.problems().into_iter().chain(access).collect()
    }

    fn status(&self, now: Now) -> AgentStatus {
        let services = self.engine.snapshots(now, &self.datapath).into_iter().map(view::service).collect();
        AgentStatus { services, ..self.own_status(now) }
    }

    /// The status without services.
    fn own_status(&self, now: Now) -> AgentStatus {
        let reasons = self.datapath.reasons().unwrap_or_default();
        AgentStatus {
            version: env!("CARGO_PKG_VERSION").into(),
            pid: std::process::id(),
            running: true,
            hung: false,
            process: process::own(),
            probes: Some(view::probes(self.checkers.load())),
            lost_log_lines: self.incidents.lost_log_lines(),
            panics: self.incidents.panics(),
            degraded: self.degraded(),
            last_beat: Some(clock::timestamp(now.unix_ns)),
            lease_seconds: self.config.lease.as_secs(),
            datapath: DatapathStatus {
                pin_path: self.config.pin_path.display().to_string(),
                restored: self.restored.clone(),
                suspended: self.suspended(now),
                node_sockets: self.sockets.clone().err(),
                masquerade_rule: self.masquerade_rule.clone().err(),
                flow_entries: self.engine.flow_entries(),
                flow_pressure: self.engine.flow_pressure(),
                reasons: reasons.into_iter().map(|(reason, count)| (reason.label().to_owned(), count)).collect(),
                ..self.interfaces.status()
            },
            services: Vec::new(),
        }
    }
}

/// The outcome of a check: it passes if there are no problems; otherwise `words` says what is wrong.
fn pass_if_empty(problems: &[String], words: impl FnOnce() -> String) -> Result<(), String> {
    if problems.is_empty() { Ok(()) } else { Err(words()) }
}

/// Every backend that has a check, with the check.
fn targets(services: &[Arc<Service>]) -> BTreeMap<Target, breaker_core::model::Check> {
    let mut targets = BTreeMap::new();
    for service in services {
        for (number, tier) in service.tiers().enumerate() {
            for backend in &tier.backends {
                let Some(check) = tier.check_of(backend.address) else { break };
                let target = Target { service: service.name.clone(), tier: number, backend: backend.address };
                targets.insert(target, check);
            }
        }
    }
    targets
}

/// Writes a line of the engine to the agent's log.
fn log(line: &LogLine) {
    let service = line.service.as_ref().map(ToString::to_string);
    let message = &line.message;
    if let Some((transition, epoch)) = &line.transition {
        let (from, to, reason) = (transition.from.label(), transition.to.label(), transition.reason.label());
        tracing::info!(service, from, to, reason, epoch, "{message}");
        return;
    }
    match line.level {
        Level::Info => tracing::info!(service, "{message}"),
        Level::Warn => tracing::warn!(service, "{message}"),
        Level::Error => tracing::error!(service, "{message}"),
    }
}
