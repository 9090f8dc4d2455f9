//! The journal: events with ids, which readers can fetch later, and lines for the agent's log.

use std::collections::VecDeque;

use breaker_common::EventKind;

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
    /// A limit refuses new connections.
    Limited,
    /// A write to the maps failed.
    WriteFailed,
    /// A write to the maps succeeded after failed ones.
    WriteRecovered,
    /// The tables of established flows fill up, or have room again.
    FlowPressure,
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
            Self::Limited => "Limited",
            Self::WriteFailed => "WriteFailed",
            Self::WriteRecovered => "WriteRecovered",
            Self::FlowPressure => "FlowPressure",
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
    events: VecDeque<Entry>,
    /// Events of the programs, kept apart: a service with much traffic would displace the events of its breaker.
    packet_events: VecDeque<Entry>,
    next_id: u64,
    log: Vec<LogLine>,
}

impl Journal {
    /// Creates an empty journal.
    pub const fn new() -> Self {
        Self { events: VecDeque::new(), packet_events: VecDeque::new(), next_id: 1, log: Vec::new() }
    }

    /// Records an event.
    pub fn record(&mut self, now: Now, service: Option<&ServiceName>, kind: EntryKind, message: String) {
        let entry = Entry { id: self.next_id, unix_ns: now.unix_ns, service: service.cloned(), kind, message };
        self.next_id += 1;
        let events = match kind {
            EntryKind::Packet(_) => &mut self.packet_events,
            _ => &mut self.events,
        };
        events.push_back(entry);
        if events.len() > HISTORY {
            events.pop_front();
        }
    }

    /// Adds a line to the agent's log.
    pub fn log(&mut self, level: Level, service: Option<&ServiceName>, message: impl Into<String>) {
        self.log.push(LogLine { level, service: service.cloned(), transition: None, message: message.into() });
    }

    /// Adds a transition to the agent's log.
    pub fn log_transition(&mut self, service: &ServiceName, transition: Transition, epoch: u32, message: &str) {
        let (service, transition) = (Some(service.clone()), Some((transition, epoch)));
        self.log.push(LogLine { level: Level::Info, service, transition, message: message.to_owned() });
    }

    /// Takes the lines that were logged since the last call.
    pub fn take_log(&mut self) -> Vec<LogLine> {
        std::mem::take(&mut self.log)
    }

    /// Events after `id`, oldest first.
    pub fn after(&self, id: u64) -> Vec<&Entry> {
        let all = self.events.iter().chain(&self.packet_events);
        let mut events: Vec<&Entry> = all.filter(|event| event.id > id).collect();
        events.sort_by_key(|event| event.id);
        events
    }

    /// Id of the last event; 0 = none.
    pub const fn last_id(&self) -> u64 {
        self.next_id - 1
    }
}
