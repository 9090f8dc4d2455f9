//! Numbers that the agent counts itself, where they arise: probes, the API server, reloads. They begin at 0 when the
//! agent starts.

use std::{sync::Arc, time::Duration};

use breaker_core::model::{CheckAction, TierRole};
use prometheus::{
    Histogram, HistogramOpts, HistogramVec, IntCounter, IntCounterVec, IntGauge, IntGaugeVec, Opts, core::Collector,
};

use super::{
    families::{self, Family},
    writer::Families,
};

/// Upper bounds of [`families::CHECK_DURATION`], in seconds.
const DURATIONS: [f64; 6] = [0.001, 0.005, 0.025, 0.1, 0.5, 2.0];
/// Upper bounds of [`families::CHECK_LATENESS`], in seconds.
const LATENESS: [f64; 7] = [0.001, 0.005, 0.02, 0.1, 0.5, 2.0, 10.0];

/// An object that the agent writes to the API server.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum KubeObject {
    /// The status of a CircuitBreaker.
    Status,
    /// This node's NodeReport.
    Report,
    /// An Event.
    Event,
    /// The Lease of the status writer.
    Lease,
}

/// Outcome of a write to the API server.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum WriteResult {
    /// It was accepted.
    Ok,
    /// The object was changed meanwhile, or existed already.
    Conflict,
    /// It failed.
    Error,
}

impl KubeObject {
    const ALL: [Self; 4] = [Self::Status, Self::Report, Self::Event, Self::Lease];

    const fn label(self) -> &'static str {
        match self {
            Self::Status => "Status",
            Self::Report => "Report",
            Self::Event => "Event",
            Self::Lease => "Lease",
        }
    }
}

impl WriteResult {
    const ALL: [Self; 3] = [Self::Ok, Self::Conflict, Self::Error];

    const fn label(self) -> &'static str {
        match self {
            Self::Ok => "Ok",
            Self::Conflict => "Conflict",
            Self::Error => "Error",
        }
    }
}

/// The counters and histograms of this agent.
#[derive(Debug)]
pub struct Instruments {
    config_reloads: IntCounterVec,
    config_last_success: IntGauge,
    status_writer: IntGauge,
    kube_writes: IntCounterVec,
    kube_watch_restarts: IntCounterVec,
    /// Number of watches without a complete list, by resource.
    kube_unsynced: IntGaugeVec,
    check_duration: HistogramVec,
    check_lateness: Histogram,
    series_dropped: IntCounter,
}

fn opts(family: &Family) -> Opts {
    Opts::new(family.name, family.help)
}

impl Instruments {
    /// Creates the instruments.
    ///
    /// # Errors
    /// A name in [`families`] is not valid.
    pub fn new() -> Result<Arc<Self>, prometheus::Error> {
        let counters = |family: &Family| IntCounterVec::new(opts(family), family.labels);
        let instruments = Self {
            config_reloads: counters(&families::CONFIG_RELOADS)?,
            config_last_success: IntGauge::with_opts(opts(&families::CONFIG_LAST_SUCCESS))?,
            status_writer: IntGauge::with_opts(opts(&families::STATUS_WRITER))?,
            kube_writes: counters(&families::KUBE_WRITES)?,
            kube_watch_restarts: counters(&families::KUBE_WATCH_RESTARTS)?,
            kube_unsynced: IntGaugeVec::new(opts(&families::KUBE_SYNCED), families::KUBE_SYNCED.labels)?,
            check_duration: HistogramVec::new(
                HistogramOpts::from(opts(&families::CHECK_DURATION)).buckets(DURATIONS.to_vec()),
                families::CHECK_DURATION.labels,
            )?,
            check_lateness: Histogram::with_opts(
                HistogramOpts::from(opts(&families::CHECK_LATENESS)).buckets(LATENESS.to_vec()),
            )?,
            series_dropped: IntCounter::with_opts(opts(&families::SERIES_DROPPED))?,
        };
        // A counter that appears with its first event shows no increase: it begins at 0.
        for result in ["Accepted", "Refused"] {
            instruments.config_reloads.with_label_values(&[result]);
        }
        Ok(Arc::new(instruments))
    }

    /// Shows the counters of writes to the API server, from 0 on.
    pub fn expect_kube(&self) {
        for object in KubeObject::ALL {
            for result in WriteResult::ALL {
                self.kube_writes.with_label_values(&[object.label(), result.label()]);
            }
        }
    }

    /// Counts a configuration that was read again, at the Unix time `now` (seconds).
    pub fn count_reload(&self, accepted: bool, now: i64) {
        self.config_reloads.with_label_values(&[if accepted { "Accepted" } else { "Refused" }]).inc();
        if accepted {
            self.config_last_success.set(now);
        }
    }

    /// Notes the first configuration, at the Unix time `now` (seconds).
    pub fn note_first_configuration(&self, now: i64) {
        self.config_last_success.set(now);
    }

    /// Notes whether this agent writes the statuses.
    pub fn set_status_writer(&self, is_writer: bool) {
        self.status_writer.set(is_writer.into());
    }

    /// Whether this agent writes the statuses.
    #[must_use]
    pub fn is_status_writer(&self) -> bool {
        self.status_writer.get() != 0
    }

    /// Counts a write to the API server.
    pub fn count_kube_write(&self, object: KubeObject, result: WriteResult) {
        self.kube_writes.with_label_values(&[object.label(), result.label()]).inc();
    }

    /// Notes a watch that begins, without a list yet. Dropping the value ends it.
    #[must_use]
    pub fn watch(self: &Arc<Self>, resource: &str) -> WatchState {
        self.kube_watch_restarts.with_label_values(&[resource]);
        let unsynced = self.kube_unsynced.with_label_values(&[resource]);
        unsynced.inc();
        WatchState { instruments: self.clone(), resource: resource.to_owned(), unsynced: Some(unsynced) }
    }

    /// The resources that are watched, each with whether its lists are complete.
    #[must_use]
    pub fn synced(&self) -> Vec<(String, bool)> {
        let collected = self.kube_unsynced.collect().into_iter().flat_map(|mut family| family.take_metric());
        let resource = |metric: &prometheus::proto::Metric| metric.get_label().first().map(|l| l.value().to_owned());
        collected.filter_map(|metric| Some((resource(&metric)?, metric.get_gauge().get_value() == 0.0))).collect()
    }

    /// Counts the duration of a check, for each role of the backend that was checked.
    pub fn observe_check(&self, action: &CheckAction, roles: impl IntoIterator<Item = TierRole>, duration: Duration) {
        let kind = match action {
            CheckAction::HttpGet { .. } => "Http",
            CheckAction::TcpSocket { .. } => "Tcp",
            CheckAction::Exchange { .. } => "Exchange",
            CheckAction::Dns { .. } => "Dns",
            CheckAction::Grpc { .. } => "Grpc",
        };
        for role in roles {
            self.check_duration.with_label_values(&[kind, role.label()]).observe(duration.as_secs_f64());
        }
    }

    /// Counts how much later than planned a check began.
    pub fn observe_lateness(&self, late: Duration) {
        self.check_lateness.observe(late.as_secs_f64());
    }

    /// Counts series that a scrape left out.
    pub fn count_dropped_series(&self, count: usize) {
        self.series_dropped.inc_by(count as u64);
    }

    pub(super) fn collect(&self, families: &mut Families) {
        let instruments: [(&Family, &dyn Collector); 7] = [
            (&families::CONFIG_RELOADS, &self.config_reloads),
            (&families::CONFIG_LAST_SUCCESS, &self.config_last_success),
            (&families::KUBE_WRITES, &self.kube_writes),
            (&families::KUBE_WATCH_RESTARTS, &self.kube_watch_restarts),
            (&families::CHECK_DURATION, &self.check_duration),
            (&families::CHECK_LATENESS, &self.check_lateness),
            (&families::SERIES_DROPPED, &self.series_dropped),
        ];
        for (family, instrument) in instruments {
            families.collected(family, instrument.collect());
        }
    }
}

/// A running watch on the API server, as the metrics see it.
#[derive(Debug)]
pub struct WatchState {
    instruments: Arc<Instruments>,
    resource: String,
    /// The number of watches without a complete list; `None` once this one has it.
    unsynced: Option<IntGauge>,
}

impl WatchState {
    /// Notes that the list is complete.
    pub fn synced(&mut self) {
        if let Some(unsynced) = self.unsynced.take() {
            unsynced.dec();
        }
    }

    /// Counts a failure, after which the watch starts again.
    pub fn restarted(&self) {
        self.instruments.kube_watch_restarts.with_label_values(&[&self.resource]).inc();
    }
}

impl Drop for WatchState {
    fn drop(&mut self) {
        self.synced();
    }
}
