//! The list of all metrics: name, type, labels and meaning.
//!
//! Names follow the rules that promlint checks: base units, `_total` for counters, no type in the name. No label is
//! called namespace, pod, service, node, job or instance, because Prometheus' own target labels would rename it.

/// The type of a metric.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// A number that only grows, until its source starts anew.
    Counter,
    /// A number that goes up and down.
    Gauge,
    /// Counts of observations by size.
    Histogram,
    /// The sum and the count of observations.
    Summary,
}

impl Kind {
    /// The name in the text format.
    #[must_use]
    pub const fn label(self) -> &'static str {
        match self {
            Self::Counter => "counter",
            Self::Gauge => "gauge",
            Self::Histogram => "histogram",
            Self::Summary => "summary",
        }
    }
}

/// The owner of a metric.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Owner {
    /// The node and its agent.
    Node,
    /// The agent's process; the names are those of all Prometheus clients.
    Process,
    /// One breaker.
    Breaker,
    /// One backend; only with `agent.metrics.perBackend`.
    Backend,
}

/// A metric.
#[derive(Clone, Copy, Debug)]
pub struct Family {
    /// Its name.
    pub name: &'static str,
    /// Its type.
    pub kind: Kind,
    /// Its owner.
    pub owner: Owner,
    /// The names of its labels. Those of a breaker begin with `breaker_namespace` and `breaker`.
    pub labels: &'static [&'static str],
    /// Its values and when it is present, for the document: label values, units, bounds.
    pub values: &'static str,
    /// Its meaning, in one sentence.
    pub help: &'static str,
}

macro_rules! families {
    ($($name:ident = $text:literal, $kind:ident, $owner:ident, [$($label:literal),*], $values:literal, $help:literal;)+) => {
        $(
            #[doc = $help]
            pub const $name: Family = Family {
                name: $text,
                kind: Kind::$kind,
                owner: Owner::$owner,
                labels: &[$($label),*],
                values: $values,
                help: $help,
            };
        )+

        /// Every metric, in the order in which the documents list them.
        pub const ALL: &[Family] = &[$($name,)+];
    };
}

families! {
    BUILD_INFO = "breaker_build_info", Gauge, Node, ["version", "revision", "abi"], "1",
        "Version of the agent, revision of its source, and version of the map layout.";
    AGENT_READY = "breaker_agent_ready", Gauge, Node, [], "0 or 1, as /readyz",
        "Whether the agent has a configuration and the programs are attached.";
    STATUS_WRITER = "breaker_agent_status_writer", Gauge, Node, [], "0 or 1; one agent of a cluster has 1",
        "Whether this agent writes the statuses of CircuitBreakers.";
    LEASE = "breaker_agent_lease_seconds", Gauge, Node, [], "0 = for ever",
        "How long the programs trust the agent's decisions after a heartbeat.";
    HEARTBEAT = "breaker_agent_heartbeat_timestamp_seconds", Gauge, Node, [], "Unix time",
        "Time of the agent's last heartbeat.";
    LISTENER_UP = "breaker_listener_up", Gauge, Node, ["listener"], "0 or 1; Local = agent.listen, Metrics = agent.metricsListen",
        "Whether the agent listens on the address of its configuration.";
    PANICS = "breaker_agent_panics_total", Counter, Node, [], "since the agent started",
        "Faults in the agent; each ended one attempt of one task.";
    LOST_LOG_LINES = "breaker_agent_lost_log_lines_total", Counter, Node, [], "since the agent started",
        "Lines of the agent's log that could not be written.";
    CONFIG_RELOADS = "breaker_config_reloads_total", Counter, Node, ["result"], "Accepted, Refused",
        "Configurations that the agent read after its start.";
    CONFIG_LAST_SUCCESS = "breaker_config_last_success_timestamp_seconds", Gauge, Node, [], "Unix time; 0 = none yet",
        "When the agent last accepted a configuration.";
    KUBE_SYNCED = "breaker_kube_synced", Gauge, Node, ["resource"], "0 or 1, for each resource that this agent watches",
        "Whether the agent has a complete list of a resource.";
    KUBE_WRITES = "breaker_kube_writes_total", Counter, Node, ["object", "result"],
        "Status, Report, Event, Lease; Ok, Conflict, Error",
        "Writes to the API server.";
    KUBE_WATCH_RESTARTS = "breaker_kube_watch_restarts_total", Counter, Node, ["resource"], "",
        "Watches on the API server that failed and were started again.";
    INTERFACES = "breaker_interfaces", Gauge, Node, ["side", "state"], "Pod, Uplink; Attached, Failed",
        "Interfaces that should have the programs.";
    SUSPENDED = "breaker_suspended_return_paths", Gauge, Node, [], "pairs of an interface and a breaker",
        "Where new connections are left to kube-proxy because no answers of backups were seen.";
    RESTORED = "breaker_datapath_restored_total", Counter, Node, [], "since the agent started",
        "Parts of the datapath that somebody took away and the agent put back.";
    DATAPATH_INFO = "breaker_datapath_info", Gauge, Node, ["attach", "xdp", "node_sockets", "masquerade_rule"], "1",
        "How the programs are attached, and which optional parts are on.";
    FAILED_OPEN_PACKETS = "breaker_failed_open_packets_total", Counter, Node, ["reason"],
        "the reasons of docs/TROUBLESHOOTING.md; since the maps were made",
        "Packets that passed untouched because of an error or an unsupported header.";
    EVENTS_LOST = "breaker_events_lost_total", Counter, Node, [], "since the maps were made",
        "Events of the programs that were lost; their packets were handled normally.";
    MAP_ENTRIES = "breaker_map_entries", Gauge, Node, ["map"], "flow tables: at the last sweep",
        "Entries in use in a map that can fill up.";
    MAP_MAX_ENTRIES = "breaker_map_max_entries", Gauge, Node, ["map"], "",
        "Entries that a map has room for.";
    FLOWS = "breaker_flows", Gauge, Node, ["family", "phase"], "4, 6; Pending, Established; at the last sweep",
        "Live flows in the tables.";
    CHECK_DURATION = "breaker_check_duration_seconds", Histogram, Node, ["type", "role"],
        "Http, Tcp, Exchange, Dns, Grpc; primary, backup; only those in use",
        "Duration of checks that had a result.";
    CHECK_LATENESS = "breaker_check_lateness_seconds", Histogram, Node, [], "",
        "How much later than planned checks began.";
    CHECKS_WAITING = "breaker_checks_waiting", Gauge, Node, [], "",
        "Checks that wait for their turn because too many others run.";
    BREAKERS = "breaker_breakers", Gauge, Node, ["state"], "Closed, Open, HalfOpen",
        "Breakers on this node.";
    SERIES_DROPPED = "breaker_series_dropped_total", Counter, Node, [], "agent.metrics.maxBackends bounds them",
        "Series of backends that were left out of a scrape.";
    SUMMARIZED = "breaker_metrics_summarized", Gauge, Node, [], "0 or 1: agent.metrics.level",
        "Whether closed breakers without news are left out.";

    PROCESS_CPU = "process_cpu_seconds_total", Counter, Process, [], "",
        "Total user and system CPU time spent in seconds.";
    PROCESS_RESIDENT = "process_resident_memory_bytes", Gauge, Process, [], "",
        "Resident memory size in bytes.";
    PROCESS_VIRTUAL = "process_virtual_memory_bytes", Gauge, Process, [], "",
        "Virtual memory size in bytes.";
    PROCESS_OPEN_FDS = "process_open_fds", Gauge, Process, [], "",
        "Number of open file descriptors.";
    PROCESS_MAX_FDS = "process_max_fds", Gauge, Process, [], "",
        "Maximum number of open file descriptors.";
    PROCESS_THREADS = "process_threads", Gauge, Process, [], "",
        "Number of OS threads in the process.";
    PROCESS_START = "process_start_time_seconds", Gauge, Process, [], "Unix time",
        "Start time of the process since unix epoch in seconds.";

    STATE = "breaker_state", Gauge, Breaker, ["breaker_namespace", "breaker", "state"], "0 or 1; Closed, Open, HalfOpen",
        "The breaker's state.";
    SHARE = "breaker_primary_share_ratio", Gauge, Breaker, ["breaker_namespace", "breaker"], "0 to 1",
        "The primary's share of new connections.";
    APPLIED = "breaker_applied", Gauge, Breaker, ["breaker_namespace", "breaker"], "0 or 1",
        "Whether the kernel has the decision that the agent wants.";
    WRITE_ERRORS = "breaker_write_errors_total", Counter, Breaker, ["breaker_namespace", "breaker"],
        "since the agent started",
        "Failed writes of a decision to the kernel.";
    TRANSITIONS = "breaker_transitions_total", Counter, Breaker, ["breaker_namespace", "breaker", "to"],
        "Closed, Open, HalfOpen; since the agent started",
        "Changes of the breaker's state.";
    TRIPS = "breaker_trips_total", Counter, Breaker, ["breaker_namespace", "breaker", "reason"],
        "the reasons of docs/TROUBLESHOOTING.md, only those seen; since the agent started",
        "Changes of the breaker's state to open, by reason.";
    LAST_TRANSITION = "breaker_last_transition_timestamp_seconds", Gauge, Breaker, ["breaker_namespace", "breaker"],
        "Unix time",
        "When the breaker entered its state.";
    OVERRIDE = "breaker_override", Gauge, Breaker, ["breaker_namespace", "breaker", "mode"],
        "1; ForceOpen, ForceClosed; only while set",
        "The override in force.";
    OVERRIDE_EXPIRY = "breaker_override_expiry_timestamp_seconds", Gauge, Breaker, ["breaker_namespace", "breaker"],
        "Unix time; only while an override with an end is set",
        "When the override ends.";
    INFO = "breaker_info", Gauge, Breaker, ["breaker_namespace", "breaker", "mode", "fast_path"],
        "1; Enforce, DryRun; Off, PeerRedirect",
        "Settings of the breaker.";
    TIER_BACKENDS = "breaker_tier_backends", Gauge, Breaker, ["breaker_namespace", "breaker", "role", "health"],
        "primary, backup (all backups together); Up, Down, Unknown with a check, Unchecked without",
        "Backends by health.";
    CONNECTIONS = "breaker_connections_total", Counter, Breaker, ["breaker_namespace", "breaker", "decision"],
        "Primary, Backup, Rejected; since the maps were made",
        "New connections that the programs decided on, by decision. Connections of a closed breaker are not seen.";
    HALF_OPEN = "breaker_half_open_connections_total", Counter, Breaker, ["breaker_namespace", "breaker"],
        "a part of Primary; not while 0",
        "New connections that were let through to the primary on trial.";
    DRY_RUN = "breaker_dry_run_connections_total", Counter, Breaker, ["breaker_namespace", "breaker"], "not while 0",
        "New connections that a dry run would have moved or refused.";
    AGENT_LOST = "breaker_agent_lost_connections_total", Counter, Breaker, ["breaker_namespace", "breaker"],
        "a part of Primary; not while 0",
        "New connections left to the primary because the agent's lease had run out.";
    FAILED_OPEN = "breaker_failed_open_connections_total", Counter, Breaker, ["breaker_namespace", "breaker"],
        "a part of Primary; not while 0",
        "New connections left to the primary because of an error in the programs.";
    PORT_CHANGED = "breaker_port_changed_connections_total", Counter, Breaker, ["breaker_namespace", "breaker"],
        "a part of Backup; not while 0",
        "New connections whose source port was changed because it was taken.";
    HAIRPIN = "breaker_hairpin_connections_total", Counter, Breaker, ["breaker_namespace", "breaker"], "not while 0",
        "New connections whose client was the selected backup itself.";
    LATE_ANSWERS = "breaker_late_answers_total", Counter, Breaker, ["breaker_namespace", "breaker"], "not while 0",
        "Answers of the primary that came after the client had been sent to a backup.";
    RESETS = "breaker_reset_segments_total", Counter, Breaker, ["breaker_namespace", "breaker"], "not while 0",
        "Segments of established connections that were answered with a reset.";
    TRANSLATED = "breaker_translated_packets_total", Counter, Breaker, ["breaker_namespace", "breaker"],
        "both directions; not while 0",
        "Packets that were translated.";
    ICMP_ERRORS = "breaker_translated_icmp_errors_total", Counter, Breaker, ["breaker_namespace", "breaker"],
        "not while 0",
        "ICMP errors about translated packets that were translated.";
    BACKUP_FLOWS = "breaker_backup_flows", Gauge, Breaker, ["breaker_namespace", "breaker"], "at the last sweep",
        "Live flows on a backup.";
    CHECKS = "breaker_checks_total", Counter, Breaker, ["breaker_namespace", "breaker", "role", "code"],
        "primary, backup; HAProxy's codes (docs/TROUBLESHOOTING.md), only those seen",
        "Checks that had a result.";
    CHECK_LOCAL_ERRORS = "breaker_check_local_errors_total", Counter, Breaker, ["breaker_namespace", "breaker"], "",
        "Checks without a result because of an error of this node.";
    CHECK_TIME = "breaker_check_time_seconds", Summary, Breaker, ["breaker_namespace", "breaker", "role"],
        "primary, backup; no quantiles; only where there is a check",
        "Duration of checks that had a result.";
    LIMITED = "breaker_limited_connections_total", Counter, Breaker, ["breaker_namespace", "breaker", "role", "limit"],
        "primary, backup; the limits that are set; since the maps were made",
        "New connections over a limit that were refused or sent to the backup.";
    LIMIT_DRY_RUN = "breaker_limit_dry_run_connections_total", Counter, Breaker,
        ["breaker_namespace", "breaker", "role", "limit"], "not while 0",
        "New connections that a dry run would have found over a limit.";
    LIMIT_FAILED_OVER = "breaker_limit_failed_over_connections_total", Counter, Breaker,
        ["breaker_namespace", "breaker"], "a part of breaker_limited_connections_total; not while 0",
        "New connections that were sent to the backup because the primary was at a limit.";
    CONCURRENT = "breaker_concurrent_connections", Gauge, Breaker, ["breaker_namespace", "breaker", "role"],
        "only with limits on concurrent connections",
        "Connections that count toward a limit.";

    BACKEND_UP = "breaker_backend_up", Gauge, Backend, ["breaker_namespace", "breaker", "role", "backend"],
        "0 or 1; primary, backup; ADDRESS:PORT",
        "Whether the backend is usable.";
    BACKEND_LAST_CHECK = "breaker_backend_last_check_seconds", Gauge, Backend,
        ["breaker_namespace", "breaker", "role", "backend"], "absent before the first check with a result",
        "Duration of the backend's last check that had a result.";
}
