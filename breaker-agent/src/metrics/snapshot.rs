//! The numbers that the main loop hands over for one scrape.

use std::time::Duration;

use breaker_api::status::ProcessStatus;
use breaker_common::{BreakerState, PassReason};
use breaker_core::{engine::measures::ServiceMeasures, probe::ProbeLoad, time::UnixNanos};

use super::{Level, Settings};

/// The state of the agent at one moment, in numbers.
#[derive(Clone, Debug)]
pub struct Snapshot {
    /// Which numbers are exported.
    pub settings: Settings,
    /// The level that is in force.
    pub level: Level,
    /// Whether services come from Kubernetes, so that their names begin with a namespace.
    pub is_kubernetes: bool,
    /// Whether the agent is ready.
    pub is_ready: bool,
    /// How long the programs trust the agent after a heartbeat.
    pub lease: Duration,
    /// When the snapshot was made, and with it about the last heartbeat.
    pub heartbeat_unix_ns: UnixNanos,
    /// Listeners by name, and whether each listens.
    pub listeners: Vec<(&'static str, bool)>,
    /// Faults in the agent.
    pub panics: u64,
    /// Lost lines of the log.
    pub lost_log_lines: u64,
    /// The process; `None` where /proc cannot be read.
    pub process: Option<ProcessNumbers>,
    /// Interfaces by side.
    pub interfaces: [InterfaceCounts; 2],
    /// Pairs of an interface and a service on which connections are left to kube-proxy.
    pub suspended: usize,
    /// Parts of the datapath that were put back.
    pub restored: u64,
    /// How the programs are attached.
    pub datapath: DatapathInfo,
    /// Packets that failed open, by reason. Reasons with 0 packets may be missing.
    pub reasons: Vec<(PassReason, u64)>,
    /// Maps that can fill up.
    pub maps: Vec<MapFill>,
    /// Live flows of each IP family: pending and established.
    pub flows: [[usize; 2]; 2],
    /// How busy the checks are.
    pub probes: ProbeLoad,
    /// Number of services, by the number of their state.
    pub by_state: [u64; BreakerState::ALL.len()],
    /// The services of [`Snapshot::level`], by name.
    pub services: Vec<ServiceMeasures>,
}

/// Interfaces that should have programs.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct InterfaceCounts {
    /// They have them.
    pub attached: u64,
    /// They do not have them, because of an error.
    pub failed: u64,
}

/// How the programs are attached, and which optional parts are on.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct DatapathInfo {
    /// The attach mode.
    pub attach: &'static str,
    /// The XDP policy that is in force.
    pub xdp: &'static str,
    /// Whether the node's own processes are protected.
    pub node_sockets: bool,
    /// Whether breaker's own masquerade rule is installed.
    pub masquerade_rule: bool,
}

/// How full a map is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct MapFill {
    /// Its name.
    pub name: &'static str,
    /// Entries in use.
    pub entries: u64,
    /// Entries that it has room for.
    pub max_entries: u64,
}

/// Numbers of the process, in the units of the metrics.
#[derive(Clone, Copy, Debug)]
pub struct ProcessNumbers {
    /// CPU time and resident memory.
    pub usage: ProcessStatus,
    /// Virtual memory in bytes.
    pub virtual_bytes: u64,
    /// Open file descriptors.
    pub open_fds: u64,
    /// The limit of file descriptors.
    pub max_fds: u64,
    /// Threads.
    pub threads: u64,
    /// Unix time of the start, in seconds.
    pub start_time: f64,
}
