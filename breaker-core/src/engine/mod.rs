//! The engine joins the decisions about all services. Configuration, probe results and time go in; plans go out to
//! the datapath.
//!
//! The engine does not wait and reads no clock: every call takes the time and the datapath as arguments. At its
//! end, a call writes each changed plan to the datapath. A write that fails is shown, counted and tried again at
//! [`Engine::next_deadline`].
//!
//! | module | one concern |
//! |---|---|
//! | [`service`] | one service at run time: lifecycle, epoch, override, plan |
//! | [`backends`] | the health of each backend |
//! | [`applied_plan`] | desired and applied plan, retries |
//! | [`tracking`] | flows that outlive the decision that made them |
//! | [`sweep`] | the walk through the flow tables, and the changes that follow from it |
//! | [`limit_watch`] | when limits begin and cease to refuse connections |
//! | [`commands`] | commands of an operator |
//! | [`journal`] | events with ids, lines for the log |
//! | [`flood`] | how much one service can write to the journal |
//! | [`snapshot`] | read-only views |
//! | [`tally`], [`measures`] | counts since the agent started; views for metrics |

mod applied_plan;
mod backends;
mod commands;
pub mod departure;
pub mod established;
mod flood;
pub mod journal;
pub mod limit_watch;
pub mod measures;
mod service;
pub mod snapshot;
mod sweep;
pub mod tally;
mod tracking;

use std::{
    collections::{BTreeMap, BTreeSet},
    fmt::Display,
    ops::Bound,
    sync::Arc,
    time::Duration,
};

use breaker_common::{BreakerState, EventKind, SHARE_ALL};

pub use backends::LocalErrors;
pub use commands::CommandError;
use journal::{Entry, EntryKind, Journal, Level, LogLine};
use service::{Lifecycle, OverrideChange, ServiceState};
use snapshot::{ServiceSnapshot, Summary};
use tracking::SWEEP;

use crate::{
    breaker::{Breaker, Transition},
    datapath::{Adopted, Datapath, DatapathError, FlowTables},
    health::Health,
    model::{Frontend, Override, Service, ServiceName},
    pool::TierHealth,
    probe::{ProbeReport, ProbeResult, Target},
    time::{Instant, Now, elapsed},
};

/// How often the share is written during a ramp.
const RAMP_STEP: Duration = Duration::from_millis(100);

/// All protected services of a node.
#[derive(Debug)]
pub struct Engine {
    services: BTreeMap<ServiceName, ServiceState>,
    /// Services that an earlier agent left in the maps and that no configuration has claimed yet.
    adopted: BTreeMap<ServiceName, Adopted>,
    journal: Journal,
    next_sweep: Instant,
    started: Instant,
    flow_tables: [FlowTables; 2],
    flow_pressure: u8,
    changes: u64,
    revision: u64,
    transitions: Vec<(ServiceName, u32)>,
}

impl Engine {
    /// Reads what an earlier agent left in the datapath, and changes nothing yet.
    ///
    /// # Errors
    /// The maps cannot be read.
    pub fn new(now: Now, datapath: &mut dyn Datapath) -> Result<Self, DatapathError> {
        let adopted = datapath.adopt()?.into_iter().map(|adopted| (adopted.name.clone(), adopted)).collect();
        Ok(Self {
            services: BTreeMap::new(),
            adopted,
            journal: Journal::new(),
            next_sweep: now.mono + SWEEP,
            started: now.mono,
            flow_tables: [FlowTables::default(); 2],
            flow_pressure: 0,
            changes: 0,
            revision: 0,
            transitions: Vec::new(),
        })
    }

    /// Entries in the flow tables at the last sweep, without those that only keep their ports.
    pub fn flow_entries(&self) -> usize {
        self.flow_tables.iter().flat_map(|tables| tables.live).sum()
    }

    /// The flow tables of IPv4 and IPv6 at the last sweep.
    pub const fn flow_tables(&self) -> [FlowTables; 2] {
        self.flow_tables
    }

    /// Fill level of the fuller table of established flows (IPv4 or IPv6) at the last sweep, in percent.
    pub const fn flow_pressure(&self) -> u8 {
        self.flow_pressure
    }

    /// Replaces the whole configuration. An unchanged service keeps everything. A changed service keeps its state,
    /// epoch and flows. A service that is no longer configured is removed once its flows have ended.
    pub fn configure(&mut self, now: Now, services: Vec<Arc<Service>>, datapath: &mut dyn Datapath) {
        self.changes += 1;
        self.revision += 1;
        let mut wanted: BTreeMap<_, _> = services.into_iter().map(|service| (service.name.clone(), service)).collect();
        for (name, state) in &mut self.services {
            match wanted.remove(name) {
                Some(service) => {
                    state.stay();
                    state.reconfigure(now, service);
                }
                None if state.lifecycle == Lifecycle::Leaving => {}
                None => state.leave(now),
            }
        }
        let configured = self.services.values().filter(|state| state.is_configured()).map(|state| &state.service);
        let claimed: BTreeSet<Frontend> =
            configured.chain(wanted.values()).flat_map(|service| &service.frontends).copied().collect();
        for state in self.services.values_mut() {
            let released = state.draining_frontends.release(&claimed);
            state.sync.outdate_if(released);
        }
        for (name, service) in wanted {
            let adopted = self.adopted.remove(&name);
            let mut state = ServiceState::new(now, service, adopted.as_ref());
            let frontends = adopted.into_iter().flat_map(|adopted| adopted.frontends);
            state.drain_frontends(frontends.filter(|frontend| !claimed.contains(frontend)).collect());
            self.services.insert(name, state);
        }
        // Services that an earlier agent left and that are not configured start to leave. Only a sweep shows
        // whether they have flows.
        for (name, adopted) in std::mem::take(&mut self.adopted) {
            self.services.insert(name, ServiceState::orphan(now, &adopted));
        }
        let configured = self.services.iter().filter(|(_, state)| state.is_configured());
        let names: Vec<ServiceName> = configured.map(|(name, _)| name.clone()).collect();
        for name in names {
            self.resolve_override(now, &name);
            self.react(now, &name, "", |breaker, health| breaker.set_primary(now.mono, health));
        }
        self.apply_all(now, datapath);
        self.remove_flows_of_removed_backends(now, datapath, false);
    }

    /// Processes the result of a probe. A result for a backend that is not configured any more is ignored. A probe
    /// without a result changes no health, and neither does one that began before the breaker's last transition.
    pub fn observe(&mut self, now: Now, report: &ProbeReport, datapath: &mut dyn Datapath) {
        let Target { service: name, tier, backend: address } = &report.target;
        let Some(state) = self.services.get_mut(name) else { return };
        let Some(backend) = state.tiers.get_mut(*tier, *address) else { return };
        let (code, detail) = (report.result.code, &report.result.detail);
        if !code.is_result() {
            state.local_errors += 1;
            if let Some(lasting) = backend.count_local_error(now, detail) {
                self.changes += 1;
                let message = format!("{address} has had no check result for {} s: {detail}", lasting.as_secs());
                self.journal.log(now, Level::Warn, Some(name), message.clone());
                self.journal.record(now, Some(name), EntryKind::LocalError, message);
            }
            return;
        }
        state.tally.count_probe(*tier, &report.result);
        let accepted = |last: &Option<ProbeResult>| last.as_ref().is_none_or(|result| result.code.is_accepted());
        let before = backend.last.replace(report.result.clone());
        state.sync.outdate_if(*tier == 0 && accepted(&before) != accepted(&backend.last));
        if backend.local_errors.take().is_some_and(|errors| errors.reported) {
            self.changes += 1;
            self.journal.record(now, Some(name), EntryKind::LocalError, format!("{address} has check results again"));
        }
        if report.began != state.state_epoch {
            return;
        }
        // A restarted check reports Unknown at first; the engine then keeps the health that it knows.
        let health = if report.health == Health::Unknown { backend.health } else { report.health };
        let flipped = backend.health != health;
        backend.health = health;
        if flipped {
            backend.since_unix_ns = Some(now.unix_ns);
            self.changes += 1;
            state.sync.outdate();
            let tier = state.service.tiers().nth(*tier).map_or("", |tier| tier.name.as_str());
            let message = format!("{tier} {address} is {}: {} {detail}", health.label(), code.label());
            self.journal.record(now, Some(name), EntryKind::Health, message);
        }
        if *tier == 0 {
            self.react(now, name, format_args!("{address} {}: {detail}", code.label()), |breaker, health| {
                breaker.observe(now.mono, code.passes(), health, code.reason())
            });
        }
        self.apply(now, name, datapath);
    }

    /// The epoch that began with the last transition of a service's breaker; 0 for a service that is not known. Each
    /// probe carries it from its begin ([`ProbeReport::began`]).
    pub fn state_epoch(&self, name: &ServiceName) -> u32 {
        self.services.get(name).map_or(0, |state| state.state_epoch)
    }

    /// Does everything that is due at `now`. Returns whether the flow tables were swept; the caller then reports
    /// how long the call took ([`Engine::record_sweep_duration`]).
    pub fn tick(&mut self, now: Now, datapath: &mut dyn Datapath) -> bool {
        let names: Vec<ServiceName> = self.services.keys().cloned().collect();
        for name in &names {
            self.resolve_override(now, name);
            self.react(now, name, "", |breaker, _| breaker.tick(now.mono));
            if self.services.get_mut(name).is_some_and(|state| state.tiers.grace_period_ended(now)) {
                self.react(now, name, "", |breaker, health| breaker.set_primary(now.mono, health));
            }
        }
        let sweep = now.mono >= self.next_sweep;
        if sweep {
            self.sweep(now, datapath);
        }
        self.apply_all(now, datapath);
        self.read_events(now, datapath);
        self.journal.summarize(now);
        sweep
    }

    /// When [`Engine::tick`] must be called next. The time may be in the past.
    pub fn next_deadline(&self, now: Now) -> Instant {
        let all = self.services.values().filter_map(|state| next_deadline(state, now));
        all.fold(self.next_sweep, Instant::min)
    }

    /// Every configured service, by name.
    pub fn snapshots(&self, now: Now, datapath: &dyn Datapath) -> Vec<ServiceSnapshot> {
        self.snapshots_after(now, datapath, None, usize::MAX)
    }

    /// Configured services by name: those after `after`, at most `most`. A caller that wants all of them asks again, so
    /// that other work of the main loop need not wait for thousands.
    pub fn snapshots_after(
        &self,
        now: Now,
        datapath: &dyn Datapath,
        after: Option<&ServiceName>,
        most: usize,
    ) -> Vec<ServiceSnapshot> {
        self.configured_after(after).take(most).map(|state| state.snapshot(now, datapath)).collect()
    }

    /// The configured services whose names come after `after`.
    fn configured_after(&self, after: Option<&ServiceName>) -> impl Iterator<Item = &ServiceState> {
        let first = after.map_or(Bound::Unbounded, Bound::Excluded);
        let services = self.services.range::<ServiceName, _>((first, Bound::Unbounded)).map(|(_, state)| state);
        services.filter(|state| state.is_configured())
    }

    /// Every configured service in short, by name.
    pub fn summaries(&self) -> Vec<Summary> {
        self.services.values().filter(|state| state.is_configured()).map(ServiceState::summary).collect()
    }

    /// The names of the configured services whose wanted plan is not in the datapath.
    pub fn unapplied(&self) -> Vec<String> {
        let services = self.services.values().filter(|state| state.is_configured() && !state.sync.is_in_force());
        services.map(|state| state.service.name.to_string()).collect()
    }

    /// A counter of configurations and of attempts to write a plan: it increases whenever [`Engine::departures`] may have
    /// changed.
    pub const fn revision(&self) -> u64 {
        self.revision
    }

    /// A counter that increases whenever [`Engine::summaries`] may have changed.
    pub const fn changes(&self) -> u64 {
        self.changes
    }

    /// The health with which a check of this backend starts. A primary backend of unknown health counts as Down if
    /// the breaker is open without an override: it was Down for an earlier agent, and must reach the rise
    /// threshold.
    pub fn known_health(&self, target: &Target) -> Health {
        let Some(state) = self.services.get(&target.service) else { return Health::Unknown };
        let health = state.tiers.get(target.tier, target.backend).map_or(Health::Unknown, |backend| backend.health);
        let open = state.breaker.state() == BreakerState::Open && state.breaker.operator() == Override::Auto;
        if health == Health::Unknown && target.tier == 0 && open { Health::Down } else { health }
    }

    /// Events with an id greater than `id`, oldest first.
    pub fn events_after(&self, id: u64) -> Vec<&Entry> {
        self.journal.after(id)
    }

    /// The id of the latest event; 0 if there is none.
    pub const fn last_event(&self) -> u64 {
        self.journal.last_id()
    }

    /// Takes the lines for the agent's log since the last call.
    pub fn take_log(&mut self) -> Vec<LogLine> {
        self.journal.take_log()
    }

    /// Takes the services whose breakers made a transition since the last call, with the epochs that began, in order.
    pub fn take_transitions(&mut self) -> Vec<(ServiceName, u32)> {
        std::mem::take(&mut self.transitions)
    }

    /// Records an event that is not about one service.
    pub fn note(&mut self, now: Now, kind: EntryKind, message: String) {
        self.journal.record(now, None, kind, message);
    }

    /// Records an event about one service, and logs it.
    pub fn note_about(&mut self, now: Now, level: Level, name: &ServiceName, kind: EntryKind, message: String) {
        self.journal.log(now, level, Some(name), message.clone());
        self.journal.record(now, Some(name), kind, message);
        self.changes += 1;
    }

    /// Applies the configuration's override, and ends an operator's override whose time limit ran out.
    fn resolve_override(&mut self, now: Now, name: &ServiceName) {
        let Some(state) = self.services.get_mut(name) else { return };
        let Some(OverrideChange { wanted, expired }) = state.override_change(now) else { return };
        let reason = state.service.override_reason.clone();
        let message = match wanted {
            _ if expired => "the operator override expired".to_owned(),
            Override::ForceOpen | Override::ForceClosed if !reason.is_empty() => reason,
            _ => "the configured override changed".to_owned(),
        };
        self.react(now, name, message, |breaker, _| breaker.set_override(now.mono, wanted, expired));
    }

    /// Gives the breaker an input and carries out the transition that follows, if any. `message`: details of its
    /// reason.
    fn react(
        &mut self,
        now: Now,
        name: &ServiceName,
        message: impl Display,
        input: impl FnOnce(&mut Breaker, TierHealth) -> Option<Transition>,
    ) {
        let Some(state) = self.services.get_mut(name) else { return };
        let health = state.primary_health(now);
        let Some(transition) = input(&mut state.breaker, health) else { return };
        let message = message.to_string();
        state.enter(now, transition, &message);
        self.transitions.push((name.clone(), state.epoch));
        self.journal.log_transition(now, name, transition, state.epoch, &message);
        let (from, to, reason) = (transition.from.label(), transition.to.label(), transition.reason.label());
        let text = match message.as_str() {
            "" => format!("{from} -> {to} ({reason})"),
            message => format!("{from} -> {to} ({reason}): {message}"),
        };
        self.journal.record(now, Some(name), EntryKind::Transition(transition), text);
    }

    fn read_events(&mut self, now: Now, datapath: &mut dyn Datapath) {
        for event in datapath.events() {
            let to = event.backend.map_or_else(String::new, |backend| format!(" to {backend}"));
            let message = match event.kind {
                EventKind::StateAdopted => format!("the programs now use epoch {}", event.epoch),
                EventKind::FlowMoved | EventKind::Rejected | EventKind::FlowReset => {
                    format!("{} -> {}{to}", event.client, event.frontend)
                }
            };
            self.journal.record(now, Some(&event.service), EntryKind::Packet(event.kind), message);
        }
    }

    fn apply_all(&mut self, now: Now, datapath: &mut dyn Datapath) {
        // Services that gain frontends are written first. A frontend that moves from one service to another then
        // always belongs to one of them.
        let (gaining, others): (Vec<_>, Vec<_>) = self.services.iter().partition(|(_, state)| state.gains_frontends());
        let names: Vec<ServiceName> = gaining.into_iter().chain(others).map(|(name, _)| name.clone()).collect();
        for name in names {
            self.apply(now, &name, datapath);
        }
    }

    /// Writes the plan of one service to the datapath, unless the maps already match it or a retry is not due yet.
    fn apply(&mut self, now: Now, name: &ServiceName, datapath: &mut dyn Datapath) {
        let Some(state) = self.services.get_mut(name) else { return };
        if !state.sync.needs_plan(|applied| state.has_aged(now, applied)) {
            return;
        }
        let mut plan = state.plan(now);
        if state.sync.needs_new_epoch(&plan) {
            state.new_epoch();
            plan = state.plan(now);
        }
        if !state.sync.needs_write(now.mono, &plan) {
            return;
        }
        self.changes += 1;
        self.revision += 1;
        match datapath.apply(&plan) {
            Ok(()) => {
                if state.sync.succeeded(plan) {
                    let message = "the datapath matches the plan again".into();
                    self.journal.record(now, Some(name), EntryKind::WriteRecovered, message);
                }
            }
            Err(error) => {
                if state.sync.failed(now.mono, error.to_string()) {
                    let line = format!("cannot write the plan to the datapath, will retry: {error}");
                    self.journal.log(now, Level::Error, Some(name), line);
                    self.journal.record(now, Some(name), EntryKind::WriteFailed, error.to_string());
                }
            }
        }
    }
}

fn next_deadline(state: &ServiceState, now: Now) -> Option<Instant> {
    let closed = state.breaker.state() == BreakerState::Closed;
    let ramp = (closed && state.breaker.share(now.mono) < SHARE_ALL).then(|| now.mono + RAMP_STEP);
    let override_ = state.operator.until_unix_ns.map(|until| now.mono + elapsed(now.unix_ns, until));
    let drain = state.drain_ends(now);
    let deadlines =
        [state.breaker.next_deadline(), state.sync.retry_at(), ramp, override_, state.tiers.grace_ends, drain];
    deadlines.into_iter().flatten().min()
}
