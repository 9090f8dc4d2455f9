//! Everything that decides: services with their breakers and healths in, plans out to the datapath.
//!
//! The engine does no waiting and reads no clock. Every call says what time it is, and ends with the datapath brought
//! to what is desired, as far as it lets itself be brought: a write that fails is shown, counted and tried again at
//! [`Engine::next_deadline`], never forgotten.

use std::{
    collections::{BTreeMap, BTreeSet, VecDeque},
    net::SocketAddr,
    time::Duration,
};

use breaker_common::{BreakerState, SHARE_ALL};
use jiff::Timestamp;

use super::{
    limits,
    status::{Applied, BackendStatus, EventLine, ServiceStatus, Summary, TierStatus, TierSummary},
};
use crate::{
    breaker::{Breaker, Instant, Restored, Transition},
    check::{ProbeResult, Report, Target},
    datapath::{
        Adopted, Datapath, DatapathError, Destination,
        plan::{Decision, ServicePlan},
    },
    health::Health,
    model::{Backend, EstablishedPolicy, Frontend, Override, Protocol, Service, ServiceName},
    pool::{self, TierHealth},
};

/// The two clocks: one that never goes back, for deciding; the world's, for people.
#[derive(Clone, Copy, Debug)]
pub struct Now {
    /// Since an origin of the caller's choice.
    pub mono: Instant,
    /// The world's.
    pub unix: Timestamp,
}

impl Now {
    fn unix_ns(self) -> u64 {
        u64::try_from(self.unix.as_nanosecond()).unwrap_or(0)
    }
}

/// How often a failed write is tried again.
const RETRY: Duration = Duration::from_millis(200);
/// How often a ramp's share is written.
const RAMP_STEP: Duration = Duration::from_millis(100);
/// How often the flow tables are gone through while something in them matters.
const SWEEP: Duration = Duration::from_secs(2);
/// After a sweep, nothing is swept for so many times as long as it took.
const SWEEP_SHARE: u32 = 10;
/// How long an established flow without packets is kept.
const IDLE: Duration = Duration::from_secs(24 * 3600);
/// From here on the tables of established flows are told to be filling up, percent.
const CROWDED: u8 = 80;
/// Events kept for readers that come later.
const HISTORY: usize = 1000;

/// An operator's request that cannot be carried out.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum CommandError {
    /// No such service.
    #[error("there is no service {name}; there are: {known}")]
    UnknownService {
        /// What was asked for.
        name: String,
        /// What there is.
        known: String,
    },
    /// The configuration has its own override.
    #[error("the configuration says override: {wanted:?} for {name}; change it there")]
    Configured {
        /// The service.
        name: String,
        /// What the configuration wants.
        wanted: Override,
    },
    /// The maps cannot be read.
    #[error("{0}")]
    Datapath(String),
}

/// What a backend's checks said.
#[derive(Clone, Debug)]
struct BackendState {
    backend: Backend,
    /// Since when it is a backend; zero for one that was there from the start.
    born: Instant,
    health: Health,
    since: Option<Timestamp>,
    last: Option<ProbeResult>,
}

/// A service as it runs.
#[derive(Debug)]
struct Running {
    service: Service,
    breaker: Breaker,
    /// By tier: the primary, then the backups.
    tiers: Vec<Vec<BackendState>>,
    epoch: u32,
    since: Timestamp,
    message: String,
    override_until: Option<Timestamp>,
    /// What the configuration said last.
    configured_override: Override,
    /// Flows on backups at the last sweep.
    flows: usize,
    /// Whether flows on backups may be alive.
    draining: bool,
    /// When draining began to be looked for; nothing settles before two sweeps have passed.
    closed_at: Option<Instant>,
    applied: Option<ServicePlan>,
    error: Option<String>,
    failed_writes: u64,
    retry_at: Option<Instant>,
    /// Not in the configuration any more; stays until its flows have ended.
    leaving: bool,
    /// Frontends that are not configured any more, and that flows may still come to.
    lingering: Vec<Frontend>,
    /// Taken over from an earlier agent: flows to backends that are not known here are to end, whichever they were.
    only_known: bool,
    /// When the last new backend of the primary is new no longer.
    settles_at: Option<Instant>,
    /// Backends of a backup that are gone, whose flows are to go with them.
    gone: BTreeSet<SocketAddr>,
    /// The last write failed, so what is in the maps is not quite what was applied before it.
    dirty: bool,
    /// Something happened since the plan was made last: it must be made again. Most probes change nothing.
    stale: bool,
    /// Whether its limits bite.
    limits: limits::Watcher,
}

/// See the module.
#[derive(Debug)]
pub struct Engine<D> {
    datapath: D,
    services: BTreeMap<ServiceName, Running>,
    /// What an earlier agent left and no configuration has claimed yet.
    left_behind: BTreeMap<ServiceName, Adopted>,
    events: VecDeque<EventLine>,
    /// Apart, so that a busy service does not crowd out what happened to its breaker.
    packet_events: VecDeque<EventLine>,
    next_event: u64,
    next_sweep: Instant,
    started: Instant,
    flow_entries: usize,
    flow_pressure: u8,
    changes: u64,
}

impl<D: Datapath> Engine<D> {
    /// Starts on a datapath: what is in it is read before anything is changed.
    ///
    /// # Errors
    /// Maps that cannot be read.
    pub fn new(mut datapath: D, now: Now) -> Result<Self, DatapathError> {
        let left_behind = datapath.adopt()?.into_iter().map(|a| (a.name.clone(), a)).collect();
        Ok(Self {
            datapath,
            services: BTreeMap::new(),
            left_behind,
            events: VecDeque::new(),
            packet_events: VecDeque::new(),
            next_event: 1,
            next_sweep: now.mono + SWEEP,
            started: now.mono,
            flow_entries: 0,
            flow_pressure: 0,
            changes: 0,
        })
    }

    /// The datapath, to look at.
    pub const fn datapath(&self) -> &D {
        &self.datapath
    }

    /// The datapath, for what is not the engine's: its sign of life.
    pub const fn datapath_mut(&mut self) -> &mut D {
        &mut self.datapath
    }

    /// Entries in the flow table at the last sweep.
    pub const fn flow_entries(&self) -> usize {
        self.flow_entries
    }

    /// How full the tables of established flows were at the last sweep, percent.
    pub const fn flow_pressure(&self) -> u8 {
        self.flow_pressure
    }

    /// Takes in a whole configuration: services that did not change keep everything, changed ones keep state, epoch
    /// and flows, gone ones leave when their flows have ended.
    pub fn configure(&mut self, now: Now, services: Vec<Service>) {
        self.changes += 1;
        let mut wanted: BTreeMap<ServiceName, Service> = services.into_iter().map(|s| (s.name.clone(), s)).collect();
        for (name, running) in &mut self.services {
            match wanted.remove(name) {
                Some(service) => {
                    running.stale |= running.leaving;
                    running.leaving = false;
                    running.reconfigure(now, service);
                }
                None if running.leaving => {}
                None => {
                    running.leaving = true;
                    running.stale = true;
                    running.new_epoch();
                    running.closed_at = Some(now.mono);
                    running.draining = true;
                }
            }
        }
        let claimed: BTreeSet<Frontend> = self
            .services
            .values()
            .filter(|running| !running.leaving)
            .flat_map(|running| &running.service.frontends)
            .chain(wanted.values().flat_map(|service| &service.frontends))
            .copied()
            .collect();
        for running in self.services.values_mut() {
            let before = running.lingering.len();
            running.lingering.retain(|frontend| !claimed.contains(frontend));
            running.stale |= running.lingering.len() != before;
        }
        for (name, service) in wanted {
            let adopted = self.left_behind.remove(&name);
            let mut running = Running::new(now, service, adopted.as_ref());
            let frontends = adopted.into_iter().flat_map(|adopted| adopted.frontends);
            running.linger(frontends.filter(|frontend| !claimed.contains(frontend)).collect());
            self.services.insert(name, running);
        }
        // What no configuration wants any more and an earlier agent left goes, unless flows hang on it; those were
        // told apart by the sweep only, so it waits for one.
        for (name, adopted) in std::mem::take(&mut self.left_behind) {
            let mut running = Running::orphan(now, &adopted);
            running.leaving = true;
            running.stale = true;
            running.new_epoch();
            self.services.insert(name, running);
        }
        let staying = self.services.iter().filter(|(_, running)| !running.leaving);
        let names: Vec<ServiceName> = staying.map(|(name, _)| name.clone()).collect();
        for name in names {
            self.settle_override(now, &name);
            self.react(now, &name, |breaker, running_health| breaker.set_primary(now.mono, running_health));
        }
        self.apply_all(now);
        self.cut_gone(false);
    }

    /// Takes in a probe's result. One about something that is not configured any more is ignored.
    pub fn report(&mut self, now: Now, report: &Report) {
        let name = &report.target.service;
        let Some(running) = self.services.get_mut(name) else { return };
        let Some(backend) = running
            .tiers
            .get_mut(report.target.tier)
            .and_then(|tier| tier.iter_mut().find(|b| b.backend.address == report.target.backend))
        else {
            return;
        };
        // A check that starts anew does not know yet what an earlier one knew.
        let health = if report.health == Health::Unknown { backend.health } else { report.health };
        let flipped = backend.health != health;
        backend.health = health;
        backend.last = Some(report.result.clone());
        self.changes += u64::from(flipped);
        running.stale |= flipped;
        if flipped {
            backend.since = Some(now.unix);
            let (code, detail) = (report.result.code.label(), &report.result.detail);
            let tier = running.service.tiers().nth(report.target.tier).map_or("", |tier| tier.name.as_str());
            let message = format!("{tier} {} is {health:?}: {code} {detail}", report.target.backend);
            self.record(now, name, "Health", message);
        }
        let name = name.clone();
        if report.target.tier == 0 {
            let pass = report.result.code.passes();
            let reason = report.result.code.reason();
            let words = format!("{} {}: {}", report.target.backend, report.result.code.label(), report.result.detail);
            self.react_with(now, &name, &words, |breaker, health| breaker.observe(now.mono, pass, health, reason));
        }
        self.apply(now, &name);
    }

    /// Lets time pass.
    pub fn tick(&mut self, now: Now) {
        let names: Vec<ServiceName> = self.services.keys().cloned().collect();
        for name in &names {
            self.settle_override(now, name);
            self.react(now, name, |breaker, _| breaker.tick(now.mono));
            if self.services.get_mut(name).is_some_and(|running| running.has_settled(now)) {
                self.react(now, name, |breaker, health| breaker.set_primary(now.mono, health));
            }
        }
        if now.mono >= self.next_sweep {
            self.sweep(now);
        }
        self.apply_all(now);
        self.read_events(now);
    }

    /// When [`Engine::tick`] has something to do; may be in the past.
    pub fn next_deadline(&self, now: Now) -> Instant {
        let mut next = self.next_sweep;
        for running in self.services.values() {
            let ramp = (running.breaker.state() == BreakerState::Closed && running.breaker.share(now.mono) < SHARE_ALL)
                .then(|| now.mono + RAMP_STEP);
            let override_ = running
                .override_until
                .map(|until| now.mono + Duration::try_from(until.duration_since(now.unix)).unwrap_or(Duration::ZERO));
            let deadlines = [running.breaker.next_deadline(), running.retry_at, ramp, override_, running.settles_at];
            for deadline in deadlines.into_iter().flatten() {
                next = next.min(deadline);
            }
        }
        next
    }

    /// The operator forces a service open, for a while or until further notice.
    ///
    /// # Errors
    /// No such service.
    pub fn trip(
        &mut self,
        now: Now,
        name: &str,
        duration: Option<Duration>,
        why: Option<&str>,
    ) -> Result<ServiceStatus, CommandError> {
        let name = self.find_free(name)?;
        let until = duration.and_then(|d| now.unix.checked_add(d).ok());
        if let Some(running) = self.services.get_mut(&name) {
            running.override_until = until;
            running.stale = true;
        }
        let words = why.map_or_else(
            || "forced open by the operator".to_owned(),
            |why| format!("forced open by the operator: {why}"),
        );
        self.react_with(now, &name, &words, |breaker, _| breaker.set_override(now.mono, Override::ForceOpen, false));
        if let Some(running) = self.services.get_mut(&name) {
            running.message = words;
        }
        self.apply(now, &name);
        self.status_of(now, &name)
    }

    /// The operator gives a service back to the measurement, with a fresh start.
    ///
    /// # Errors
    /// No such service.
    pub fn reset(&mut self, now: Now, name: &str) -> Result<ServiceStatus, CommandError> {
        let name = self.find_free(name)?;
        if let Some(running) = self.services.get_mut(&name) {
            running.override_until = None;
            running.stale = true;
        }
        self.react_with(now, &name, "reset by the operator", |breaker, _| breaker.reset(now.mono));
        self.apply(now, &name);
        self.status_of(now, &name)
    }

    /// Every service's status, by name.
    pub fn status(&self, now: Now) -> Vec<ServiceStatus> {
        self.services.iter().filter(|(_, r)| !r.leaving).map(|(name, r)| self.show(now, name, r)).collect()
    }

    /// Every service in short, by name.
    pub fn summaries(&self) -> Vec<Summary> {
        self.services.values().filter(|running| !running.leaving).map(Running::summary).collect()
    }

    /// Counts what [`Engine::summaries`] may show differently.
    pub const fn changes(&self) -> u64 {
        self.changes
    }

    /// One service's status.
    ///
    /// # Errors
    /// No such service.
    pub fn get(&self, now: Now, name: &str) -> Result<ServiceStatus, CommandError> {
        self.status_of(now, &self.find(name)?)
    }

    /// What is known of a backend's health, for a check that starts anew. A primary that an earlier agent left open was
    /// Down, and must rise.
    pub fn known_health(&self, target: &Target) -> Health {
        let Some(running) = self.services.get(&target.service) else { return Health::Unknown };
        let mut tier = running.tiers.get(target.tier).into_iter().flatten();
        let health = tier.find(|b| b.backend.address == target.backend).map_or(Health::Unknown, |b| b.health);
        let open = running.breaker.state() == BreakerState::Open && running.breaker.operator() == Override::Auto;
        if health == Health::Unknown && target.tier == 0 && open { Health::Down } else { health }
    }

    /// A service's flows.
    ///
    /// # Errors
    /// No such service; maps that cannot be read.
    pub fn flows(&self, name: &str, limit: usize) -> Result<Vec<crate::datapath::FlowView>, CommandError> {
        let name = self.find(name)?;
        self.datapath.flows(&name, limit).map_err(|error| CommandError::Datapath(error.to_string()))
    }

    /// Events after `id`, oldest first.
    pub fn events_after(&self, id: u64) -> Vec<&EventLine> {
        let all = self.events.iter().chain(&self.packet_events);
        let mut events: Vec<&EventLine> = all.filter(|event| event.id > id).collect();
        events.sort_by_key(|event| event.id);
        events
    }

    /// Id of the last event; 0 = none.
    pub const fn last_event(&self) -> u64 {
        self.next_event - 1
    }

    /// Records something that is not about one service.
    pub fn note(&mut self, now: Now, kind: &str, message: String) {
        self.record(now, &ServiceName::new("-"), kind, message);
    }

    fn find(&self, name: &str) -> Result<ServiceName, CommandError> {
        let wanted = ServiceName::new(name);
        if self.services.get(&wanted).is_some_and(|r| !r.leaving) {
            return Ok(wanted);
        }
        let known: Vec<&str> = self.services.iter().filter(|(_, r)| !r.leaving).map(|(n, _)| n.as_str()).collect();
        Err(CommandError::UnknownService { name: name.to_owned(), known: known.join(", ") })
    }

    /// A service that an operator may force.
    fn find_free(&self, name: &str) -> Result<ServiceName, CommandError> {
        let name = self.find(name)?;
        match self.services.get(&name).map(|running| running.service.override_) {
            None | Some(Override::Auto) => Ok(name),
            Some(wanted) => Err(CommandError::Configured { name: name.to_string(), wanted }),
        }
    }

    fn status_of(&self, now: Now, name: &ServiceName) -> Result<ServiceStatus, CommandError> {
        let running = self.services.get(name);
        running
            .map(|running| self.show(now, name, running))
            .ok_or_else(|| CommandError::UnknownService { name: name.to_string(), known: String::new() })
    }

    /// The configuration's override, or the end of an operator's.
    fn settle_override(&mut self, now: Now, name: &ServiceName) {
        let Some(running) = self.services.get_mut(name) else { return };
        let expired = running.override_until.is_some_and(|until| until <= now.unix);
        if expired {
            running.override_until = None;
            running.stale = true;
        }
        let configured = running.service.override_;
        let current = running.breaker.operator();
        let wanted = match configured {
            // The file says nothing: an operator's word holds until it ends.
            Override::Auto if expired || running.configured_override != Override::Auto => Override::Auto,
            Override::Auto => current,
            forced => forced,
        };
        running.configured_override = configured;
        if wanted != current {
            let words = if expired { "the operator's time limit ran out" } else { "override in the configuration" };
            self.react_with(now, name, words, |breaker, _| breaker.set_override(now.mono, wanted, expired));
        }
    }

    fn react(
        &mut self,
        now: Now,
        name: &ServiceName,
        input: impl FnOnce(&mut Breaker, pool::TierHealth) -> Option<Transition>,
    ) {
        self.react_with(now, name, "", input);
    }

    /// Gives the breaker an input, and takes over what follows from it.
    fn react_with(
        &mut self,
        now: Now,
        name: &ServiceName,
        words: &str,
        input: impl FnOnce(&mut Breaker, pool::TierHealth) -> Option<Transition>,
    ) {
        let Some(running) = self.services.get_mut(name) else { return };
        let health = running.primary_health(now);
        let Some(transition) = input(&mut running.breaker, health) else { return };
        running.stale = true;
        running.new_epoch();
        running.since = now.unix;
        running.message = words.to_owned();
        running.draining = true;
        running.closed_at = (transition.to == BreakerState::Closed).then_some(now.mono);
        let (from, to, reason) = (transition.from.label(), transition.to.label(), transition.reason.label());
        let mut message = format!("{from} -> {to} ({reason})");
        if !words.is_empty() {
            message = format!("{message}: {words}");
        }
        tracing::info!(service = %name, from, to, reason, epoch = running.epoch, "{words}");
        let line = self.line(now, name, "Transition", message);
        let owned = |text: &str| Some(text.to_owned());
        keep(&mut self.events, EventLine { from: owned(from), to: owned(to), reason: owned(reason), ..line });
    }

    fn sweep(&mut self, now: Now) {
        self.next_sweep = now.mono + SWEEP;
        let began = std::time::Instant::now();
        // An agent that just started does not know which packets it missed.
        let idle = (now.mono.saturating_sub(self.started) > IDLE).then_some(IDLE);
        let found = match self.datapath.sweep(idle) {
            Ok(found) => found,
            Err(error) => {
                tracing::warn!("the flow tables cannot be read: {error}");
                return;
            }
        };
        // However full the tables are made: probes and transitions have most of the time.
        self.next_sweep += began.elapsed() * SWEEP_SHARE;
        self.flow_entries = found.entries;
        let crowded = |percent: u8| percent >= CROWDED;
        if crowded(found.pressure_percent) != crowded(self.flow_pressure) {
            let message = format!(
                "the tables of established flows are {} % full: {} flows in the fuller family's{}",
                found.pressure_percent,
                found.established,
                if crowded(found.pressure_percent) { "; agent.maxFlows makes room for more" } else { "" }
            );
            if crowded(found.pressure_percent) {
                tracing::warn!("{message}");
            }
            self.note(now, "FlowPressure", message);
        }
        self.flow_pressure = found.pressure_percent;
        self.cut_gone(true);
        let mut gone = Vec::new();
        for (name, running) in &mut self.services {
            running.flows = found.redirected.get(name).copied().unwrap_or(0);
            // Connections over a limit of the primary went to the backup: their flows are looked for until they have ended.
            if found.overflowed.contains(name) {
                running.stale |= !running.draining;
                running.draining = true;
                running.closed_at = Some(now.mono);
            }
        }
        self.watch_limits(now);
        // A frontend that changed hands while flows of its old service live: its new one must look for them, too.
        let leaving = self.services.values().filter(|running| running.leaving && running.flows > 0);
        let busy: Vec<Frontend> = leaving.flat_map(|running| running.service.frontends.clone()).collect();
        for (name, running) in &mut self.services {
            let inherits = !running.leaving && running.service.frontends.iter().any(|f| busy.contains(f));
            let settled =
                running.breaker.state() == BreakerState::Closed && running.breaker.share(now.mono) == SHARE_ALL;
            // A packet that read the old switch may pin one more flow a moment after the new one was thrown.
            let long_enough = running.closed_at.is_none_or(|at| now.mono.saturating_sub(at) >= SWEEP);
            if running.flows == 0 && !inherits && long_enough {
                running.stale |= !running.lingering.is_empty();
                running.lingering.clear();
            }
            if running.flows == 0 && !inherits && (settled || running.leaving) && long_enough {
                running.stale |= running.draining;
                running.draining = false;
                if running.leaving && running.is_told_to_be_closed() {
                    gone.push(name.clone());
                }
            }
        }
        for name in gone {
            match self.datapath.remove(&name) {
                Ok(()) => drop(self.services.remove(&name)),
                Err(error) => tracing::warn!(service = %name, "cannot be removed yet: {error}"),
            }
        }
    }

    /// Tells of limits that bite.
    fn watch_limits(&mut self, now: Now) {
        let mut told = Vec::new();
        for (name, running) in &mut self.services {
            if running.service.limits.is_none() {
                continue;
            }
            let Ok(report) = self.datapath.limits(name, 0) else { continue };
            let before = running.limits.biting().cloned();
            let words = running.limits.look(now.mono, now.unix, &report.counters);
            self.changes += u64::from(running.limits.biting() != before.as_ref());
            told.extend(words.map(|words| (name.clone(), words)));
        }
        for (name, words) in told {
            tracing::warn!(service = %name, "{words}");
            self.record(now, &name, "Limited", words);
        }
    }

    /// Ends the flows to backends that are gone: whoever gets their addresses next must not get their connections.
    ///
    /// A packet that read the old tables may pin one more flow a moment after they were replaced, so the list is kept
    /// until a sweep has looked again (`last`).
    ///
    /// Datagrams know no connection that could break: those to a backup's backend that is down are decided anew, too, at every
    /// sweep. A client whose socket lives for long would stay there else.
    fn cut_gone(&mut self, last: bool) {
        for (name, running) in &mut self.services {
            let down = if last { running.down_for_datagrams() } else { BTreeSet::new() };
            if !running.only_known && running.gone.is_empty() && down.is_empty() {
                continue;
            }
            let known = known_backends(&running.service);
            let doomed = |(backend, protocol): Destination| {
                running.gone.contains(&backend)
                    || running.only_known && !known.contains(&backend)
                    || protocol == Protocol::Udp && down.contains(&backend)
            };
            match self.datapath.cut(name, &doomed) {
                Ok(0) => {}
                Ok(cut) => tracing::info!(service = %name, cut, "flows ended with the pods that they went to"),
                Err(error) => {
                    tracing::warn!(service = %name, "flows to pods that are gone stay for now: {error}");
                    continue;
                }
            }
            if last {
                running.gone.clear();
                running.only_known = false;
            }
        }
    }

    fn read_events(&mut self, now: Now) {
        for event in self.datapath.events() {
            let to = event.backend.map_or_else(String::new, |backend| format!(" to {backend}"));
            let message = match event.kind {
                breaker_common::EventKind::StateAdopted => format!("the programs act on epoch {}", event.epoch),
                _ => format!("{} -> {}{to}", event.client, event.frontend),
            };
            let line = self.line(now, &event.service, event.kind.label(), message);
            keep(&mut self.packet_events, line);
        }
    }

    fn apply_all(&mut self, now: Now) {
        // Who gets a frontend before who loses it: one that changes hands is somebody's at any moment.
        let (gaining, others): (Vec<_>, Vec<_>) = self.services.iter().partition(|(_, r)| r.gains_frontends());
        let names: Vec<ServiceName> = gaining.into_iter().chain(others).map(|(name, _)| name.clone()).collect();
        for name in names {
            self.apply(now, &name);
        }
    }

    /// Brings the datapath to what is desired for one service, if it is not there already.
    fn apply(&mut self, now: Now, name: &ServiceName) {
        let Some(running) = self.services.get_mut(name) else { return };
        if !running.stale && !running.share_moved(now) {
            return;
        }
        let mut plan = running.plan(now);
        if running.outdates(&plan) {
            running.new_epoch();
            plan = running.plan(now);
        }
        if running.applied.as_ref() == Some(&plan) && !running.dirty {
            running.error = None;
            running.retry_at = None;
            running.stale = false;
            return;
        }
        if running.retry_at.is_some_and(|at| now.mono < at) {
            return;
        }
        self.changes += 1;
        match self.datapath.apply(&plan) {
            Ok(()) => {
                running.applied = Some(plan);
                running.dirty = false;
                running.stale = false;
                running.retry_at = None;
                if running.error.take().is_some() {
                    self.record(now, name, "WriteRecovered", "the datapath is what it should be again".into());
                }
            }
            Err(error) => {
                let first = running.error.is_none();
                running.error = Some(error.to_string());
                running.failed_writes += 1;
                running.dirty = true;
                running.retry_at = Some(now.mono + RETRY);
                if first {
                    tracing::error!(service = %name, "the datapath could not be changed, trying again: {error}");
                    self.record(now, name, "WriteFailed", error.to_string());
                }
            }
        }
    }

    fn record(&mut self, now: Now, service: &ServiceName, kind: &str, message: String) {
        let line = self.line(now, service, kind, message);
        keep(&mut self.events, line);
    }

    /// A line with the next id.
    fn line(&mut self, now: Now, service: &ServiceName, kind: &str, message: String) -> EventLine {
        let id = self.next_event;
        self.next_event += 1;
        EventLine {
            id,
            at: now.unix,
            service: service.to_string(),
            kind: kind.to_owned(),
            message,
            from: None,
            to: None,
            reason: None,
        }
    }

    /// Whether a backend is known to be a pod of this node.
    fn is_near(&self, service: &Service, backend: SocketAddr) -> bool {
        let protocols = || service.frontends.iter().map(|frontend| frontend.protocol);
        service.wants_near()
            && service.addresses(backend).any(|address| protocols().any(|p| self.datapath.is_near((address, p))))
    }

    fn show(&self, now: Now, name: &ServiceName, running: &Running) -> ServiceStatus {
        let breaker = &running.breaker;
        let desired = running.plan(now);
        let active_backup = running.active_backup().map(|(index, _)| index + 1);
        let closed = breaker.state() == BreakerState::Closed;
        let tiers = running
            .service
            .tiers()
            .zip(&running.tiers)
            .enumerate()
            .map(|(index, (tier, backends))| TierStatus {
                name: tier.name.clone(),
                role: if index == 0 { "primary" } else { "backup" }.into(),
                active: if index == 0 { closed } else { !closed && active_backup == Some(index) },
                backends: backends
                    .iter()
                    .map(|b| b.show(tier.check.is_some(), self.is_near(&running.service, b.backend.address)))
                    .collect(),
            })
            .collect();
        ServiceStatus {
            name: name.to_string(),
            state: breaker.state().label().into(),
            since: running.since,
            reason: breaker.reason().label().into(),
            message: running.message.clone(),
            share: breaker.share(now.mono),
            epoch: running.epoch,
            trips: breaker.trips(),
            mode: format!("{:?}", running.service.mode),
            override_: format!("{:?}", breaker.operator()),
            override_until: running.override_until,
            fast_path: format!("{:?}", running.service.fast_path),
            frontends: running.service.frontends.iter().map(ToString::to_string).collect(),
            tiers,
            desired: shown(&desired),
            applied: running.applied.as_ref().map(shown),
            error: running.error.clone(),
            failed_writes: running.failed_writes,
            flows: running.flows,
            counters: self.datapath.counters(name).unwrap_or_default().into(),
            limits: running.service.limits.map(|configured| {
                let report = self.datapath.limits(name, limits::CLIENTS).unwrap_or_default();
                limits::show(&configured, report, running.limits.biting().cloned())
            }),
        }
    }
}

fn keep(events: &mut VecDeque<EventLine>, line: EventLine) {
    events.push_back(line);
    if events.len() > HISTORY {
        events.pop_front();
    }
}

fn shown(plan: &ServicePlan) -> Applied {
    Applied { state: plan.decision.state.label().into(), share: plan.decision.share, epoch: plan.decision.epoch }
}

impl BackendState {
    const fn new(backend: Backend) -> Self {
        Self { backend, born: Instant::ZERO, health: Health::Unknown, since: None, last: None }
    }

    fn show(&self, checked: bool, near: bool) -> BackendStatus {
        BackendStatus {
            address: self.backend.address,
            health: if checked { format!("{:?}", self.health) } else { "Unchecked".into() },
            since: self.since,
            last_check: self.last.as_ref().map(|last| last.code.label().into()),
            detail: self.last.as_ref().map(|last| last.detail.clone()),
            check_millis: self.last.as_ref().map(|last| (last.duration.as_secs_f64() * 100_000.0).round() / 100.0),
            weight: self.backend.weight,
            near,
        }
    }
}

impl Running {
    /// What is decided from now on is told from what was decided before: flows of datagrams are decided anew, and the policy for
    /// established connections on the side that they are not wanted on holds for those of before.
    const fn new_epoch(&mut self) {
        self.epoch = self.epoch.wrapping_add(1);
    }

    /// Whether a plan makes decisions of the same state outdated: with a backup again, those that went to the primary for want
    /// of one; at the end of a ramp, those that went to the backup for its sake.
    fn outdates(&self, plan: &ServicePlan) -> bool {
        let Some(before) = self.applied.as_ref().filter(|before| before.decision.epoch == plan.decision.epoch) else {
            return false;
        };
        match plan.decision.state {
            BreakerState::Closed => before.decision.share < SHARE_ALL && plan.decision.share >= SHARE_ALL,
            BreakerState::Open => before.backends().is_empty() && !plan.backends().is_empty(),
            // An epoch has a number of trials; it must not have it twice.
            BreakerState::HalfOpen => false,
        }
    }

    /// Whether the datapath is to hear of more frontends.
    fn gains_frontends(&self) -> bool {
        let known = |frontend| self.applied.as_ref().is_some_and(|plan| plan.frontends().any(|f| f == frontend));
        self.stale && !self.leaving && !self.service.frontends.iter().all(known)
    }

    /// Backends of the backups that are down, where datagrams may go to them.
    fn down_for_datagrams(&self) -> BTreeSet<SocketAddr> {
        if !self.service.frontends.iter().any(|frontend| frontend.protocol == Protocol::Udp) {
            return BTreeSet::new();
        }
        let down = self.tiers.iter().skip(1).flatten().filter(|backend| backend.health == Health::Down);
        down.flat_map(|state| self.service.addresses(state.backend.address)).collect()
    }

    fn new(now: Now, service: Service, adopted: Option<&Adopted>) -> Self {
        let seed = service.name.as_str().bytes().fold(0xcbf2_9ce4_8422_2325, |hash: u64, byte| {
            (hash ^ u64::from(byte)).wrapping_mul(0x0000_0100_0000_01b3)
        });
        let policy = service.breaker.clone();
        let (breaker, epoch, since, until) = match adopted {
            None => (Breaker::new(policy, seed, now.mono), 1, now.unix, None),
            Some(was) => {
                let since = timestamp(was.since_unix_ns).unwrap_or(now.unix);
                let age = Duration::try_from(now.unix.duration_since(since)).unwrap_or_default();
                let restored = Restored { state: was.state, reason: was.reason, age, trips: was.trips };
                let mut breaker = Breaker::restore(policy, seed, now.mono, restored);
                // The state is restored already, so the word of the operator changes nothing now.
                let _ = breaker.set_override(now.mono, was.override_.0, false);
                let until = timestamp(was.override_.1).filter(|_| was.override_.1 > 0);
                (breaker, was.epoch, since, until)
            }
        };
        // The backends that took the traffic are taken to be well until a probe says otherwise: to send new connections
        // back to a failed primary meanwhile would be worse.
        let trusted = |tier: usize, backend: &Backend| {
            tier > 0 && adopted.is_some_and(|a| service.addresses(backend.address).any(|b| a.backup.contains(&b)))
        };
        let state = |tier: usize, backend: &Backend| BackendState {
            health: if trusted(tier, backend) { Health::Up } else { Health::Unknown },
            ..BackendState::new(*backend)
        };
        let tiers =
            service.tiers().enumerate().map(|(n, tier)| tier.backends.iter().map(|b| state(n, b)).collect()).collect();
        Self {
            configured_override: service.override_,
            breaker,
            tiers,
            epoch,
            since,
            message: if adopted.is_some() { "as an earlier agent left it".into() } else { String::new() },
            override_until: until,
            flows: 0,
            // Flows of an earlier agent's, or of a service that had these frontends before, may be alive: look once.
            draining: true,
            closed_at: Some(now.mono),
            applied: None,
            error: None,
            failed_writes: 0,
            retry_at: None,
            leaving: false,
            lingering: Vec::new(),
            settles_at: None,
            gone: BTreeSet::new(),
            only_known: adopted.is_some(),
            dirty: false,
            stale: true,
            limits: limits::Watcher::default(),
            service,
        }
    }

    /// What an earlier agent left of a service that is not configured any more.
    fn orphan(now: Now, adopted: &Adopted) -> Self {
        let service = Service { frontends: adopted.frontends.clone(), ..Service::nothing(adopted.name.clone()) };
        // Nobody knows its backends any more: its flows end in peace.
        Self { only_known: false, ..Self::new(now, service, Some(adopted)) }
    }

    fn reconfigure(&mut self, now: Now, service: Service) {
        if self.service == service {
            return;
        }
        self.stale = true;
        self.breaker.set_policy(service.breaker.clone());
        let old = std::mem::take(&mut self.tiers);
        // A backend that stays in its tier keeps its health, until a changed check says otherwise.
        self.tiers = service
            .tiers()
            .enumerate()
            .map(|(index, tier)| {
                let known = old.get(index);
                tier.backends
                    .iter()
                    .map(|backend| {
                        let same = |k: &&Vec<BackendState>| k.iter().position(|b| b.backend.address == backend.address);
                        // Preferences may move a backend from one backup tier to another: what is known of it stays.
                        let elsewhere = || old.iter().skip(1).filter(|_| index > 0).find(|k| same(k).is_some());
                        let known = known.filter(|k| same(k).is_some()).or_else(elsewhere);
                        let same = known.and_then(|k| k.iter().find(|b| b.backend.address == backend.address));
                        same.map_or_else(
                            || BackendState { born: now.mono, ..BackendState::new(*backend) },
                            |b| BackendState { backend: *backend, ..b.clone() },
                        )
                    })
                    .collect()
            })
            .collect();
        let newest = self.tiers.first().into_iter().flatten().map(|b| b.born).max();
        self.settles_at = newest.filter(|born| *born > Instant::ZERO).map(|born| born + service.settle);
        let (before, after) = (known_backends(&self.service), known_backends(&service));
        self.gone.extend(before.difference(&after));
        self.gone.retain(|address| !after.contains(address));
        // Flows that the new rules would not look for any more must still end in peace.
        self.draining = true;
        self.closed_at = Some(now.mono);
        let before = std::mem::replace(&mut self.service, service).frontends;
        self.linger(before);
    }

    /// Lets connections to frontends of before end in peace, but for those that are still there. Datagrams go to kube-proxy with
    /// the next one.
    fn linger(&mut self, before: Vec<Frontend>) {
        let gone = |frontend: &Frontend| !self.service.frontends.contains(frontend);
        if before.iter().any(|frontend| frontend.protocol == Protocol::Udp && gone(frontend)) {
            self.new_epoch();
        }
        self.lingering.extend(before);
        self.lingering.retain(|frontend| !self.service.frontends.contains(frontend));
    }

    /// Whether the primary's new backends are new no longer, since the last question.
    fn has_settled(&mut self, now: Now) -> bool {
        let settled = self.settles_at.is_some_and(|at| at <= now.mono);
        if settled {
            self.settles_at = None;
        }
        settled
    }

    fn healths(&self, tier: usize) -> Vec<Health> {
        self.tiers.get(tier).map(|tier| tier.iter().map(|b| b.health).collect()).unwrap_or_default()
    }

    fn summary(&self) -> Summary {
        let applied = self.applied.as_ref().map(|plan| &plan.decision);
        let active = self.active_backup().map(|(index, _)| index + 1);
        let tiers = self.service.tiers().enumerate().map(|(index, tier)| TierSummary {
            name: tier.name.clone(),
            up: match tier.check {
                Some(_) => self.healths(index).iter().filter(|health| **health == Health::Up).count(),
                None => tier.backends.len(),
            },
            total: tier.backends.len(),
            checking: match tier.check {
                Some(_) => self.healths(index).iter().filter(|health| **health == Health::Unknown).count(),
                None => 0,
            },
            active: active == Some(index),
        });
        Summary {
            name: self.service.name.clone(),
            state: applied.map_or("", |decision| decision.state.label()),
            since: applied.and_then(|decision| timestamp(decision.since_unix_ns)),
            reason: applied.map_or("", |decision| decision.reason.label()),
            message: self.message.clone(),
            share: applied.map_or(0, |decision| decision.share),
            in_force: applied.is_some() && self.error.is_none() && !self.dirty,
            error: self.error.clone(),
            tiers: tiers.collect(),
            limits_shared_by: self.service.limits.map_or(0, |limits| limits.shared_by()),
            limited: self.limits.biting().cloned(),
        }
    }

    /// The primary's, as it counts for the breaker: that a backend which is new is well says nothing yet.
    fn primary_health(&self, now: Now) -> TierHealth {
        let settle = self.service.settle;
        let new = |b: &BackendState| b.born > Instant::ZERO && now.mono.saturating_sub(b.born) < settle;
        let primary = &self.service.primary;
        let tier = self.tiers.first().map(Vec::as_slice).unwrap_or_default();
        let health = |b: &BackendState| if b.health == Health::Up && new(b) { Health::Unknown } else { b.health };
        let judged = pool::judge(primary, &tier.iter().map(health).collect::<Vec<_>>());
        let old = tier.iter().filter(|b| !new(b)).count();
        // Without a check all count as Up, as soon as they are no longer new.
        if judged == TierHealth::Up && primary.check.is_none() && old < primary.min_healthy.clamp(1, tier.len().max(1))
        {
            return TierHealth::Unknown;
        }
        judged
    }

    fn active_backup(&self) -> Option<(usize, Vec<Backend>)> {
        let healths: Vec<Vec<Health>> = (1..self.tiers.len()).map(|tier| self.healths(tier)).collect();
        pool::active_backup(self.service.backups.iter().zip(healths.iter().map(Vec::as_slice)))
    }

    fn plan(&self, now: Now) -> ServicePlan {
        let backup = self.active_backup().map(|(_, backends)| backends).unwrap_or_default();
        let until = self.override_until.and_then(|until| u64::try_from(until.as_nanosecond()).ok()).unwrap_or(0);
        let decision = Decision {
            state: if self.leaving { BreakerState::Closed } else { self.breaker.state() },
            share: if self.leaving { SHARE_ALL } else { self.breaker.share(now.mono) },
            epoch: self.epoch,
            reason: self.breaker.reason(),
            since_unix_ns: Now { unix: self.since, ..now }.unix_ns(),
            trips: self.breaker.trips(),
            // What the file says is read from the file again; only an operator's word must be found in the maps.
            override_: match self.service.override_ {
                Override::Auto => (self.breaker.operator(), until),
                _ => (Override::Auto, 0),
            },
            draining: self.draining,
        };
        if self.leaving {
            let service = Service { on_close: EstablishedPolicy::Keep, limits: None, ..self.service.clone() };
            return self.with_lingering(ServicePlan::new(&service, decision, &[]));
        }
        self.with_lingering(ServicePlan::new(&self.service, decision, &backup))
    }

    fn with_lingering(&self, mut plan: ServicePlan) -> ServicePlan {
        plan.linger(&self.lingering);
        plan
    }

    /// Whether time alone has moved the share: a ramp.
    fn share_moved(&self, now: Now) -> bool {
        let share = if self.leaving { SHARE_ALL } else { self.breaker.share(now.mono) };
        self.applied.as_ref().is_none_or(|plan| plan.decision.share != share)
    }

    /// Whether the programs know already that it is closed: what leaves is told first, and removed at a later sweep.
    fn is_told_to_be_closed(&self) -> bool {
        self.applied.as_ref().is_some_and(|plan| plan.decision.state == BreakerState::Closed)
    }
}

/// The backups' destinations, those that drain included.
fn known_backends(service: &Service) -> BTreeSet<SocketAddr> {
    let tiers = service.backups.iter();
    let own = tiers.flat_map(|t| t.backends.iter().map(|b| b.address).chain(t.draining.iter().copied()));
    own.flat_map(|backend| service.addresses(backend)).collect()
}

fn timestamp(unix_ns: u64) -> Option<Timestamp> {
    Timestamp::from_nanosecond(i128::from(unix_ns)).ok()
}

#[cfg(test)]
#[path = "engine_tests.rs"]
mod tests;
