//! Metrics for Prometheus.
//!
//! ```text
//! instruments (probes, kube, reloads) ──┐
//! the main loop ─ Snapshot ─────────────┴─▶ node, breakers ─▶ Families ─▶ text
//! ```
//!
//! Counters of connections and packets are read from the maps at each scrape, so they survive the agent. The main loop
//! only copies numbers; the text is made elsewhere. [`families`] is the list of all metrics, and docs/METRICS.md is made
//! from it.
//!
//! The text has the classic format (version 0.0.4), because every Prometheus and `promtool check metrics` read it. No
//! creation times are sent: the counters are older than the agent.

mod breakers;
mod docs;
pub mod families;
pub mod instruments;
mod node;
pub mod snapshot;
mod writer;

use breaker_core::engine::measures::Scope;

pub use docs::document;
pub use instruments::Instruments;
pub use snapshot::Snapshot;

/// How much is exported for each breaker.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Level {
    /// Every breaker.
    Node,
    /// Breakers that need attention, and the number of the others by state.
    Summary,
}

/// Number of breakers on a node above which the level is [`Level::Summary`], unless the configuration says otherwise.
pub const MANY_BREAKERS: usize = 500;

impl Level {
    /// The names of the levels.
    pub const NAMES: [(&'static str, Self); 2] = [("Node", Self::Node), ("Summary", Self::Summary)];

    /// The level of a node: as configured, otherwise by its number of breakers.
    #[must_use]
    pub const fn of(configured: Option<Self>, breakers: usize) -> Self {
        match configured {
            Some(level) => level,
            None if breakers > MANY_BREAKERS => Self::Summary,
            None => Self::Node,
        }
    }

    /// The services whose numbers the engine is asked for.
    #[must_use]
    pub const fn scope(self) -> Scope {
        match self {
            Self::Node => Scope::All,
            Self::Summary => Scope::Noteworthy,
        }
    }
}

/// The section `agent.metrics` of the configuration.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Settings {
    /// How much is exported for each breaker; `None` = by their number.
    pub level: Option<Level>,
    /// Whether each backend is exported.
    pub per_backend: bool,
    /// Backends that are exported, at most.
    pub max_backends: usize,
}

impl Default for Settings {
    fn default() -> Self {
        Self { level: None, per_backend: false, max_backends: 1000 }
    }
}

/// The media type of [`text`].
pub const CONTENT_TYPE: &str = prometheus::TEXT_FORMAT;

/// All metrics as text.
///
/// # Errors
/// A family is not valid, which is a fault of this module.
pub fn text(snapshot: &Snapshot, instruments: &Instruments) -> Result<String, prometheus::Error> {
    let mut families = writer::Families::default();
    node::write(snapshot, instruments, &mut families);
    breakers::write(snapshot, instruments, &mut families);
    instruments.collect(&mut families);
    families.into_text()
}

#[cfg(test)]
mod tests;
