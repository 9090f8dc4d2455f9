use std::{
    collections::{BTreeMap, BTreeSet},
    time::Duration,
};

use breaker_api::status::ProcessStatus;
use breaker_common::{BreakerState, LimitCounters, PassReason, ServiceCounters, StateReason};
use breaker_core::{
    datapath::LimitReport,
    engine::{
        measures::{BackendMeasures, HealthCounts, ServiceMeasures},
        tally::{ProbeTally, Tally},
    },
    limits::{Limits, OnLimit, Rate, Scope, TierLimits},
    model::{
        CheckAction, DnsQuestion, DnsRecord, Exchange, FastPath, HttpGet, Mode, Override, ServiceName, TierRole,
        Transport,
    },
    probe::{CheckCode, ProbeLoad},
};

use super::{
    families::{ALL, Kind, Owner},
    instruments::KubeObject,
    snapshot::{DatapathInfo, InterfaceCounts, MapFill, ProcessNumbers},
    *,
};

/// The snapshot of an agent without services, with every series of the node.
fn snapshot() -> Snapshot {
    let map = |name| MapFill { name, entries: 1, max_entries: 2 };
    let maps = ["SERVICES", "ROUTES", "SLOTS", "BACKENDS4", "BACKENDS6", "PENDING4", "FLOWS4", "PENDING6", "FLOWS6"];
    Snapshot {
        settings: Settings { per_backend: true, ..Settings::default() },
        level: Level::Node,
        is_kubernetes: true,
        is_ready: true,
        lease: Duration::from_secs(60),
        heartbeat_unix_ns: 1_764_000_000_123_456_789,
        listeners: vec![("Local", true), ("Metrics", false)],
        panics: 0,
        lost_log_lines: 0,
        process: Some(ProcessNumbers {
            usage: ProcessStatus { cpu_seconds: 1.5, resident_bytes: 4096 },
            virtual_bytes: 8192,
            open_fds: 10,
            max_fds: 100,
            threads: 4,
            start_time: 1_764_000_000.25,
        }),
        interfaces: [InterfaceCounts { attached: 2, failed: 1 }; 2],
        suspended: 0,
        restored: 0,
        datapath: DatapathInfo { attach: "Tcx", xdp: "Off", node_sockets: true, masquerade_rule: false },
        reasons: vec![(PassReason::Fragment, 3)],
        maps: maps.map(map).to_vec(),
        flows: [[1, 2], [3, 4]],
        probes: ProbeLoad::default(),
        by_state: [1, 0, 0],
        services: Vec::new(),
    }
}

/// Instruments that have seen everything that they can see.
fn instruments() -> std::sync::Arc<Instruments> {
    let instruments = Instruments::new().unwrap();
    instruments.expect_kube();
    instruments.count_kube_write(KubeObject::Lease, instruments::WriteResult::Error);
    for resource in
        ["CircuitBreaker", "ReferenceGrant", "Service", "Node", "NetworkPolicy", "EndpointSlice", "NodeReport"]
    {
        instruments.watch(resource).synced();
    }
    let get = HttpGet {
        path: "/".into(),
        https: false,
        host: None,
        headers: Vec::new(),
        expected_statuses: Vec::new(),
        body_contains: None,
    };
    let exchange = Exchange { transport: Transport::Tcp, send: Vec::new(), expect: Vec::new(), quit: Vec::new() };
    let question = DnsQuestion { name: "a.".into(), record: DnsRecord::A, rcode: None, expected_addresses: Vec::new() };
    let actions = [
        CheckAction::HttpGet { port: None, get },
        CheckAction::TcpSocket { port: None, accept: false },
        CheckAction::Exchange { port: None, exchange },
        CheckAction::Dns { port: None, question },
        CheckAction::Grpc { port: None, service: String::new() },
    ];
    for action in &actions {
        instruments.observe_check(action, [TierRole::Primary, TierRole::Backup], Duration::from_millis(3));
    }
    instruments
}

/// A service that has as many series as any can have without limits.
fn full_service(name: &str) -> ServiceMeasures {
    use CheckCode::{L4Con, L4Tout, L6Rsp, L6Tout, L7Ok, L7Rsp, L7Sts, L7Tout};
    let tripping = [
        StateReason::HttpStatus,
        StateReason::ResponseTimeout,
        StateReason::BadResponse,
        StateReason::ConnectFailed,
        StateReason::ConnectTimeout,
        StateReason::TlsFailed,
        StateReason::FailureRate,
        StateReason::NoEndpoints,
        StateReason::Operator,
    ];
    let codes = [L4Con, L4Tout, L6Tout, L6Rsp, L7Ok, L7Sts, L7Tout, L7Rsp];
    let probes = ProbeTally { by_code: codes.map(|code| (code, 2)).into(), time: Duration::from_millis(1500) };
    ServiceMeasures {
        name: ServiceName::new(name),
        state: BreakerState::Open,
        share: 250,
        is_applied: true,
        failed_writes: 1,
        since_unix_ns: 1_764_000_000_000_000_000,
        override_: (Override::ForceOpen, 1_764_000_600_000_000_000),
        mode: Mode::Enforce,
        fast_path: FastPath::Off,
        // The primary is one tier, which has a check or not. Of several backups, some may have one.
        backends: [
            HealthCounts { up: 1, down: 2, unknown: 3, unchecked: 0 },
            HealthCounts { up: 1, down: 2, unknown: 3, unchecked: 1 },
        ],
        flows: 7,
        tally: Tally {
            transitions: [1, 2, 3],
            trips: tripping.map(|reason| (reason, 1)).into(),
            probes: [probes.clone(), probes],
        },
        local_errors: 4,
        counters: Some(ServiceCounters {
            new_primary: 1,
            new_backup: 1,
            rejected: 1,
            half_open: 1,
            resets: 1,
            translated: 1,
            icmp_errors: 1,
            port_changed: 1,
            hairpin: 1,
            dry_run: 1,
            agent_lost: 1,
            failed_open: 1,
            late_answers: 1,
        }),
        limits: None,
        each_backend: Vec::new(),
    }
}

fn with_limits(service: ServiceMeasures) -> ServiceMeasures {
    let rate = Some(Rate { per_second: 1, burst: 1 });
    let tier = TierLimits {
        rate,
        concurrent: Some(1),
        client_rate: rate,
        client_concurrent: Some(1),
        on_limit: OnLimit::Reset,
    };
    let limits = Limits {
        primary: tier,
        backup: tier,
        client_prefix: 64,
        idle: Duration::from_secs(1),
        scope: Scope::Node,
        nodes: 1,
    };
    let counters =
        LimitCounters { limited: [[1; 4]; 2], dry_run: [[1; 4]; 2], failed_over: 1, ..LimitCounters::default() };
    let report = LimitReport { counters, concurrent: [1, 1], clients: Vec::new() };
    ServiceMeasures { limits: Some((limits, report)), ..service }
}

fn scrape(snapshot: &Snapshot) -> String {
    text(snapshot, &instruments()).unwrap()
}

/// Number of series by owner.
fn series(text: &str) -> BTreeMap<&'static str, usize> {
    let mut counts = BTreeMap::new();
    for line in text.lines().filter(|line| !line.starts_with('#')) {
        let name = line.split(['{', ' ']).next().unwrap();
        let family = ALL.iter().find(|family| {
            let parts = match family.kind {
                Kind::Histogram => vec!["_bucket", "_sum", "_count"],
                Kind::Summary => vec!["_sum", "_count"],
                Kind::Counter | Kind::Gauge => vec![""],
            };
            parts.iter().any(|part| name == format!("{}{part}", family.name))
        });
        let owner = match family.unwrap_or_else(|| panic!("{line}")).owner {
            Owner::Node => "node",
            Owner::Process => "process",
            Owner::Breaker => "breaker",
            Owner::Backend => "backend",
        };
        *counts.entry(owner).or_default() += 1;
    }
    counts
}

#[test]
fn no_scrape_has_more_series_than_documented() {
    let mut snapshot = snapshot();
    snapshot.services = vec![full_service("shop/web")];
    let counts = series(&scrape(&snapshot));
    assert!(counts["node"] <= 190, "{counts:?}");
    assert!(counts["process"] <= 22, "{counts:?}");
    assert_eq!(counts["breaker"], 64);
    snapshot.services = vec![with_limits(full_service("shop/web"))];
    assert_eq!(series(&scrape(&snapshot))["breaker"], 64 + 19);
}

#[test]
fn the_number_of_backends_is_bounded() {
    let backend = |port| BackendMeasures {
        role: TierRole::Backup,
        address: ([10, 0, 0, 1], port).into(),
        is_up: true,
        last_probe: Some(Duration::from_millis(2)),
    };
    let mut snapshot = snapshot();
    snapshot.settings.max_backends = 5;
    let service = |name| ServiceMeasures { each_backend: (1..=4).map(backend).collect(), ..full_service(name) };
    snapshot.services = vec![service("a/a"), service("b/b")];
    let instruments = instruments();
    let text = text(&snapshot, &instruments).unwrap();
    assert_eq!(series(&text)["backend"], 10);
    assert!(text.contains("breaker_series_dropped_total 6\n"), "{text}");
    assert!(text.contains(
        "breaker_backend_up{breaker_namespace=\"a\",breaker=\"a\",role=\"backup\",backend=\"10.0.0.1:1\"} 1\n"
    ));
}

#[test]
fn the_text_says_what_the_numbers_are() {
    let mut snapshot = snapshot();
    snapshot.services = vec![full_service("shop/web:80/outside")];
    let text = scrape(&snapshot);
    let labels = "breaker_namespace=\"shop\",breaker=\"web:80/outside\"";
    for line in [
        "# TYPE breaker_state gauge".to_owned(),
        format!("breaker_state{{{labels},state=\"Open\"}} 1"),
        format!("breaker_state{{{labels},state=\"Closed\"}} 0"),
        format!("breaker_primary_share_ratio{{{labels}}} 0.25"),
        format!("breaker_transitions_total{{{labels},to=\"HalfOpen\"}} 3"),
        format!("breaker_trips_total{{{labels},reason=\"ConnectFailed\"}} 1"),
        format!("breaker_override_expiry_timestamp_seconds{{{labels}}} 1764000600"),
        format!("breaker_check_time_seconds_sum{{{labels},role=\"primary\"}} 1.5"),
        format!("breaker_check_time_seconds_count{{{labels},role=\"backup\"}} 16"),
        "breaker_agent_heartbeat_timestamp_seconds 1764000000.123".to_owned(),
        "breaker_failed_open_packets_total{reason=\"Fragment\"} 3".to_owned(),
        "breaker_failed_open_packets_total{reason=\"FlowTableFull\"} 0".to_owned(),
        "breaker_kube_synced{resource=\"Service\"} 1".to_owned(),
        "breaker_listener_up{listener=\"Metrics\"} 0".to_owned(),
        "breaker_datapath_info{attach=\"Tcx\",xdp=\"Off\",node_sockets=\"On\",masquerade_rule=\"Off\"} 1".to_owned(),
    ] {
        assert!(text.lines().any(|found| found == line), "{line}\n{text}");
    }
    snapshot.is_kubernetes = false;
    assert!(scrape(&snapshot).contains("breaker_namespace=\"\",breaker=\"shop/web:80/outside\""));
}

/// prometheus-client and others write a creation time, at which Prometheus puts a 0. The counters of the maps are older
/// than the agent: with it, `increase()` over a restart of the agent would be wrong.
#[test]
fn no_creation_times_are_sent() {
    assert!(!scrape(&snapshot()).contains("_created"));
}

#[test]
fn a_series_appears_once() {
    let mut snapshot = snapshot();
    snapshot.services = vec![with_limits(full_service("a/a")), full_service("b/b")];
    let text = scrape(&snapshot);
    let mut seen = BTreeSet::new();
    for line in text.lines().filter(|line| !line.starts_with("# HELP")) {
        let series = if line.starts_with('#') { line } else { line.rsplit_once(' ').unwrap().0 };
        assert!(seen.insert(series), "{series}");
    }
}

#[test]
fn names_and_labels_follow_the_rules() {
    let reserved = ["namespace", "pod", "service", "node", "job", "instance"];
    let mut names = BTreeSet::new();
    for family in ALL {
        assert!(names.insert(family.name), "{} is there twice", family.name);
        assert_eq!(family.kind == Kind::Counter, family.name.ends_with("_total"), "{}", family.name);
        assert!(family.labels.iter().all(|label| !reserved.contains(label)), "{}", family.name);
        assert!(family.help.ends_with('.'), "{}", family.name);
        let of_breaker = matches!(family.owner, Owner::Breaker | Owner::Backend);
        assert_eq!(of_breaker, family.labels.starts_with(&["breaker_namespace", "breaker"]), "{}", family.name);
    }
}

#[test]
fn the_document_is_up_to_date() {
    let file = concat!(env!("CARGO_MANIFEST_DIR"), "/../docs/METRICS.md");
    let found = std::fs::read_to_string(file).unwrap_or_default();
    assert!(found == document(), "docs/METRICS.md is stale; write it anew: cargo xtask docs");
}

#[test]
fn many_breakers_are_summarized() {
    assert_eq!(Level::of(None, MANY_BREAKERS), Level::Node);
    assert_eq!(Level::of(None, MANY_BREAKERS + 1), Level::Summary);
    assert_eq!(Level::of(Some(Level::Node), 10_000), Level::Node);
}
