//! The journal: events with ids, which readers can fetch later, and lines for the agent's log.

use std::collections::{BTreeMap, VecDeque};

use breaker_common::EventKind;

use super::flood::FloodGuard;
use crate::{
    breaker::Transition,
    model::ServiceName,
    time::{Now, UnixNanos},
};

/// Number of events that are kept, separately for events of the programs and for all others.
const HISTORY: usize = 1000;

/// What an entry is about.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum EntryKind {
    /// A breaker changed its state.
    Transition(Transition),
    /// A backend's health changed.
    Health,
    /// Probes have had no result for some time, or have results again.
    LocalError,
    /// Events of a service were left out, because there were too many.
    LeftOut,
    /// A limit refuses new connections.
    Limited,
    /// A write to the maps failed.
    WriteFailed,
    /// A write to the maps succeeded after failed ones.
    WriteRecovered,
    /// The tables of established flows fill up, or have room again.
    FlowPressure,
    /// The agent put back a part of the datapath that somebody else had taken away.
    Restored,
    /// A service's new connections on an interface are left to kube-proxy, because no answers of its backup were seen
    /// there, or are redirected again.
    ReturnPath,
    /// The established connections to a primary were reset when its breaker opened; how many.
    Resets,
    /// The configuration was read again.
    Config,
    /// A configuration was refused.
    ConfigRefused,
    /// The programs reported something.
    Packet(EventKind),
}

impl EntryKind {
    /// The name for logs and JSON.
    #[must_use]
    pub const fn label(self) -> &'static str {
        match self {
            Self::Transition(_) => "Transition",
            Self::Health => "Health",
            Self::LocalError => "LocalError",
            Self::LeftOut => "LeftOut",
            Self::Limited => "Limited",
            Self::WriteFailed => "WriteFailed",
            Self::WriteRecovered => "WriteRecovered",
            Self::FlowPressure => "FlowPressure",
            Self::Restored => "Restored",
            Self::ReturnPath => "ReturnPath",
            Self::Resets => "Resets",
            Self::Config => "Config",
            Self::ConfigRefused => "ConfigRefused",
            Self::Packet(kind) => kind.label(),
        }
    }
}

/// One event.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Entry {
    /// Counts up from 1; gaps are events that a slow reader missed.
    pub id: u64,
    /// When it happened.
    pub unix_ns: UnixNanos,
    /// The service; `None` for an event that is not about one.
    pub service: Option<ServiceName>,
    /// What it is about.
    pub kind: EntryKind,
    /// The event in words.
    pub message: String,
}

/// How important a line of the log is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Level {
    /// Something went well, or as planned.
    Info,
    /// Something is wrong and breaker deals with it.
    Warn,
    /// Something is wrong and an operator should act.
    Error,
}

/// One line for the agent's log. The engine has no logger: the loop takes the lines and writes them.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct LogLine {
    /// How important it is.
    pub level: Level,
    /// The service; `None` for a line that is not about one.
    pub service: Option<ServiceName>,
    /// The transition that the line is about, with the epoch that began with it.
    pub transition: Option<(Transition, u32)>,
    /// The line in words.
    pub message: String,
}

/// The events of a node.
#[derive(Debug)]
pub(super) struct Journal {
    events: Events,
    /// Events of the programs, kept apart: a service with much traffic would displace the events of its breaker.
    packet_events: Events,
    next_id: u64,
    log: Vec<LogLine>,
    event_guard: FloodGuard,
    log_guard: FloodGuard,
}

/// The last [`HISTORY`] events. When it is full, the service with the most events loses its oldest one.
#[derive(Debug)]
struct Events {
    entries: VecDeque<Entry>,
    by_service: BTreeMap<Option<ServiceName>, usize>,
}

impl Events {
    const fn new() -> Self {
        Self { entries: VecDeque::new(), by_service: BTreeMap::new() }
    }

    fn push(&mut self, entry: Entry) {
        *self.by_service.entry(entry.service.clone()).or_default() += 1;
        self.entries.push_back(entry);
        if self.entries.len() <= HISTORY {
            return;
        }
        let most = self.by_service.iter().max_by_key(|(_, count)| **count).map(|(service, _)| service.clone());
        let oldest = self.entries.iter().position(|entry| Some(&entry.service) == most.as_ref());
        let Some(gone) = oldest.and_then(|index| self.entries.remove(index)) else { return };
        if let Some(count) = self.by_service.get_mut(&gone.service) {
            *count -= 1;
            if *count == 0 {
                self.by_service.remove(&gone.service);
            }
        }
    }
}

impl Journal {
    /// Creates an empty journal.
    pub const fn new() -> Self {
        Self {
            events: Events::new(),
            packet_events: Events::new(),
            next_id: 1,
            log: Vec::new(),
            event_guard: FloodGuard::new(),
            log_guard: FloodGuard::new(),
        }
    }

    /// Records an event. Beyond a certain rate, events of one service are left out ([`super::flood`]).
    pub fn record(&mut self, now: Now, service: Option<&ServiceName>, kind: EntryKind, message: String) {
        let is_packet = matches!(kind, EntryKind::Packet(_));
        if !is_packet && service.is_some_and(|service| !self.event_guard.admit(now.mono, service)) {
            return;
        }
        self.push(now, service, kind, message);
    }

    fn push(&mut self, now: Now, service: Option<&ServiceName>, kind: EntryKind, message: String) {
        let entry = Entry { id: self.next_id, unix_ns: now.unix_ns, service: service.cloned(), kind, message };
        self.next_id += 1;
        match kind {
            EntryKind::Packet(_) => self.packet_events.push(entry),
            _ => self.events.push(entry),
        }
    }

    /// Adds a line to the agent's log. Beyond a certain rate, lines of one service are left out.
    pub fn log(&mut self, now: Now, level: Level, service: Option<&ServiceName>, message: impl Into<String>) {
        self.push_line(now, LogLine { level, service: service.cloned(), transition: None, message: message.into() });
    }

    /// Adds a transition to the agent's log.
    pub fn log_transition(
        &mut self,
        now: Now,
        service: &ServiceName,
        transition: Transition,
        epoch: u32,
        message: &str,
    ) {
        let (service, transition) = (Some(service.clone()), Some((transition, epoch)));
        self.push_line(now, LogLine { level: Level::Info, service, transition, message: message.to_owned() });
    }

    fn push_line(&mut self, now: Now, line: LogLine) {
        if line.service.as_ref().is_none_or(|service| self.log_guard.admit(now.mono, service)) {
            self.log.push(line);
        }
    }

    /// Tells how much was left out, service by service, where that is due.
    pub fn summarize(&mut self, now: Now) {
        for (service, left_out) in self.event_guard.summaries(now.mono) {
            let message = format!("{} more events in {} s were left out", left_out.lines, left_out.during.as_secs());
            self.push(now, Some(&service), EntryKind::LeftOut, message);
        }
        for (service, left_out) in self.log_guard.summaries(now.mono) {
            let message = format!("{} more lines in {} s were left out", left_out.lines, left_out.during.as_secs());
            self.log.push(LogLine { level: Level::Warn, service: Some(service), transition: None, message });
        }
    }

    /// Takes the lines that were logged since the last call.
    pub fn take_log(&mut self) -> Vec<LogLine> {
        std::mem::take(&mut self.log)
    }

    /// Events after `id`, oldest first.
    pub fn after(&self, id: u64) -> Vec<&Entry> {
        let all = self.events.entries.iter().chain(&self.packet_events.entries);
        let mut events: Vec<&Entry> = all.filter(|event| event.id > id).collect();
        events.sort_by_key(|event| event.id);
        events
    }

    /// Id of the last event; 0 = none.
    pub const fn last_id(&self) -> u64 {
        self.next_id - 1
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::time::Duration;

    #[test]
    fn the_events_of_a_quiet_service_stay_when_another_flaps() {
        let mut journal = Journal::new();
        let (quiet, noisy) = (ServiceName::new("quiet"), ServiceName::new("noisy"));
        let at = |seconds: u64| Now { mono: Duration::from_secs(seconds), unix_ns: seconds };
        journal.record(at(0), Some(&quiet), EntryKind::Health, "Down".into());
        for second in 1..5000 {
            for _ in 0..3 {
                journal.record(at(second), Some(&noisy), EntryKind::Health, "flaps".into());
            }
            journal.summarize(at(second));
        }
        let events = journal.after(0);
        assert_eq!(events.len(), HISTORY);
        assert_eq!(events[0].service, Some(quiet));
        assert!(events.iter().any(|event| event.kind == EntryKind::LeftOut));
    }
}
