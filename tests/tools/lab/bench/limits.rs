//! Cost and accuracy of limits: extra nanoseconds per packet, compared with the same service without limits; requests
//! per second, compared with HAProxy and its limits; admitted connections, compared with the allowed ones; memory.

use breaker_common::BreakerState;
use std::{
    net::SocketAddrV4,
    sync::atomic::{AtomicU64, Ordering},
    time::{Duration, Instant},
};

use anyhow::{Context as _, Result};
use breaker_agent::datapath::sizes::Sizes;
use breaker_common::{BreakerState::Closed, switch_flags};
use breaker_core::{
    limits::{Rate, TierLimits},
    model::Service,
    plan::ServicePlan,
};
use breaker_tests::{
    lab::{
        kubeproxy,
        netns::NetNs,
        stage::{Checks, Lab, entry},
    },
    packets::{
        Segment, TestRig,
        flags::{ACK, SYN},
        plan_with, pod, service, vip,
    },
};

use super::{
    PAIRS, Row,
    http::{self, Ambassador, Style},
    maps, median,
    packets::{self, Bench, REPEAT},
    pairs, spread,
};

pub(super) fn rows() -> Result<Vec<Row>> {
    let mut rows = vec![memory()?];
    rows.extend(requests()?);
    rows.push(accuracy()?);
    Ok(rows)
}

/// The absence of limits: all connections are admitted.
fn no_limits() -> TierLimits {
    TierLimits::default()
}

/// A rate that no benchmark reaches.
const PLENTY: Rate = Rate { per_second: 1_000_000_000, burst: 1_000_000_000 };

fn with(name: &str, host: u8, limits: TierLimits) -> Result<Service> {
    let mut service =
        service(name, vip(host), &[pod(3, 80)], "limits: {newConnectionsPerSecond: 1, concurrentConnections: 1},")?;
    service.limits.as_mut().context("the service has no limits")?.primary = limits;
    Ok(service)
}

/// Extra nanoseconds per packet of a closed service with a limit, compared with a service without limits.
pub(super) fn packets() -> Result<Vec<Row>> {
    let sizes = Sizes { connection_buckets: 1 << 15, client_buckets: 1 << 15, ..Sizes::for_memory(1024) };
    let mut bench = Bench::with_sizes(&sizes)?;
    let plain = service("plain", vip(10), &[pod(3, 80)], "")?;
    let close = |service: &Service| plan_with(service, Closed, 1, 1000, false, &service.backups[0].backends);
    bench.rig.apply(&close(&plain))?;
    let limits = [
        ("newConnectionsPerSecond", TierLimits { rate: Some(PLENTY), ..no_limits() }),
        ("concurrentConnections", TierLimits { concurrent: Some(u32::MAX), ..no_limits() }),
        ("perClient.newConnectionsPerSecond", TierLimits { client_rate: Some(PLENTY), ..no_limits() }),
        ("perClient.concurrentConnections", TierLimits { client_concurrent: Some(u32::MAX), ..no_limits() }),
    ];
    let mut rows = Vec::new();
    for (host, (name, limits)) in (20..).zip(limits) {
        let limited = close(&with(name, host, limits)?);
        let free = ServicePlan { limits: None, flags: limited.flags & !switch_flags::LIMITED, ..limited.clone() };
        rows.push(fresh(&mut bench, format!("limits: SYN, caches cold, {name}"), (&limited, &free), (host, 10))?);
        bench.rig.apply(&limited)?;
        let mut row = |what: &str, flags, flows, vary, aim| {
            let name = format!("limits: {what}, {name}");
            difference(&mut bench, name, (host, 10), flags, flows, vary, aim)
        };
        rows.push(row("SYN, its port used again", SYN, 1, packets::NEW, "≤ 80")?);
        rows.push(row("SYN, 64k flows", SYN, 1 << 16, packets::NEW, "")?);
        if name.starts_with("perClient") {
            rows.push(row("SYN, 128 clients", SYN, 128, packets::NEW | packets::CLIENTS, "")?);
            rows.push(row("SYN, 16k clients", SYN, 1 << 14, packets::NEW | packets::CLIENTS, "")?);
        }
        rows.push(row("data", ACK, 1, 0, "0 to 1")?);
    }
    let nobody = Rate { per_second: 1, burst: 1 };
    bench.rig.apply(&close(&with("refused", 30, TierLimits { rate: Some(nobody), ..no_limits() })?))?;
    rows.push(difference(&mut bench, "limits: a SYN that is refused".into(), (30, 10), SYN, 1, packets::NEW, "")?);
    Ok(rows)
}

/// Extra nanoseconds per SYN for some thousand new connections of a service with limits. Before each round the limits
/// are removed and configured anew, so that the service knows none of the connections.
fn fresh(
    bench: &mut Bench,
    name: String,
    (limited, free): (&ServicePlan, &ServicePlan),
    (host, plain): (u8, u8),
) -> Result<Row> {
    const CONNECTIONS: u32 = 4096;
    let mut differences = Vec::new();
    for _ in 0..2 * PAIRS {
        bench.rig.apply(free)?;
        bench.rig.apply(limited)?;
        let mut time = |host: u8| -> Result<f64> {
            let segment = Segment::new(pod(4, 1024), vip(host), SYN);
            bench.prepare(&segment, CONNECTIONS, packets::NEW)?;
            bench.time(true, &segment.bytes(), CONNECTIONS)
        };
        time(plain)?;
        differences.push(time(host)? - time(plain)?);
    }
    Ok(Row {
        name,
        value: median(&differences),
        unit: "ns",
        base: "the same without limits".into(),
        ratio: None,
        spread: Some(spread(&differences)),
        aim: "",
    })
}

/// Extra nanoseconds per packet to the VIP of a service with limits, compared with one without. `vary`: see
/// [`packets::NEW`] and [`packets::CLIENTS`].
fn difference(
    bench: &mut Bench,
    name: String,
    (limited, plain): (u8, u8),
    flags: u8,
    flows: u32,
    vary: u8,
    aim: &'static str,
) -> Result<Row> {
    let time = |bench: &mut Bench, host: u8| -> Result<f64> {
        let segment = Segment::new(pod(4, 1024), vip(host), flags);
        bench.prepare(&segment, flows, vary)?;
        bench.time(true, &segment.bytes(), REPEAT)
    };
    time(bench, limited)?;
    time(bench, plain)?;
    let mut differences = Vec::new();
    for _ in 0..PAIRS {
        differences.push(time(bench, limited)? - time(bench, plain)?);
    }
    Ok(Row {
        name,
        value: median(&differences),
        unit: "ns",
        base: "the same without limits".into(),
        ratio: None,
        spread: Some(spread(&differences)),
        aim,
    })
}

/// Memory of the maps of limits, sized for 10,000 services that all have limits.
fn memory() -> Result<Row> {
    const MAPS: &[&str] = &["LIMITS", "LIMITERS", "LIMIT_COUNTERS", "CONNECTIONS", "CLIENTS", "LIMITED"];
    let rig = TestRig::with_sizes(&Sizes::for_services(10_000).with_flows(1 << 18))?;
    maps::memory_of("10,000 services with limits, 64k connections", &rig, MAPS, "")
}

/// Requests per second with a new connection for each, compared with HAProxy's most similar limit.
fn requests() -> Result<Vec<Row>> {
    let rows: &[(&str, &str, &str)] = &[
        (
            "newConnectionsPerSecond",
            "    limits: {newConnectionsPerSecond: 1000000}\n",
            "  rate-limit sessions 1000000\n",
        ),
        (
            "perClient.newConnectionsPerSecond",
            "    limits: {perClient: {newConnectionsPerSecond: 1000000}}\n",
            "  stick-table type ip size 100k expire 30s store conn_rate(1s)\n  tcp-request connection track-sc0 src\n  \
             tcp-request connection reject if { sc0_conn_rate gt 1000000 }\n",
        ),
        ("concurrentConnections", "    limits: {concurrentConnections: 1000000}\n", "  maxconn 1900\n"),
    ];
    let mut lab = Lab::new(Checks::Default)?;
    let mut services = lab.services(Checks::Default, "");
    let vips: Vec<SocketAddrV4> = (10..).take(rows.len()).map(kubeproxy::vip).collect();
    for (vip, (name, limits, _)) in vips.iter().zip(rows) {
        let pods = (lab.primary.address(), lab.backup.address());
        services.push_str(&entry(name, *vip, pods.0, pods.1, Checks::Default, limits));
        let service = kubeproxy::Service {
            name: name.to_lowercase().replace('.', "-"),
            vip: *vip,
            endpoints: vec![pods.0],
            protocols: &["tcp"],
        };
        kubeproxy::add_service(lab.world.node(0).ns(), &service)?;
    }
    lab.agent.write_config("", &services)?;
    lab.agent.start()?;
    http::settle(&lab)?;
    let mut found = Vec::new();
    for (place, (vip, (name, _, haproxy))) in vips.iter().zip(rows).enumerate() {
        lab.agent.wait_state(name, BreakerState::Closed, Duration::from_secs(10))?;
        let proxy = Ambassador::start_with(&mut lab, &format!("haproxy{place}"), "inter 3s fall 1 rise 1", haproxy)?;
        proxy.pin()?;
        let proxy_vip = kubeproxy::vip(vip.ip().octets()[3].wrapping_add(40));
        let service = kubeproxy::Service {
            name: format!("proxy-{}", name.to_lowercase().replace('.', "-")),
            vip: proxy_vip,
            endpoints: vec![proxy.address],
            protocols: &["tcp"],
        };
        kubeproxy::add_service(lab.world.node(0).ns(), &service)?;
        let ours = || http::slice(&lab.client.ns, *vip, Style::New);
        let theirs = || http::slice(&lab.client.ns, proxy_vip, Style::New);
        let none = || http::slice(&lab.client.ns, lab.vip, Style::New);
        found.push(pairs(
            format!("limits: {name}, new connections"),
            "req/s",
            "HAProxy, its limit",
            "≥ 1.5",
            ours,
            theirs,
        )?);
        found.push(pairs(format!("limits: {name}, new connections"), "req/s", "without limits", "", ours, none)?);
    }
    Ok(found)
}

/// New connections per second that the limit of [`accuracy`] allows.
const RATE: u32 = 200;
/// Burst of the limit of [`accuracy`].
const BURST: u32 = 20;

/// Sixteen clients attempt ten times the limit for ten seconds. Compares the admitted connections with the allowed
/// ones: rate × time + burst.
fn accuracy() -> Result<Row> {
    let limits = format!("    limits: {{newConnectionsPerSecond: {RATE}, burst: {BURST}}}\n");
    let mut lab = Lab::with(Checks::Default, &limits)?;
    lab.agent.start()?;
    lab.agent.wait_state("dummy", BreakerState::Closed, Duration::from_secs(10))?;
    let (admitted, took) = storm(&lab.client.ns, lab.vip)?;
    #[expect(clippy::cast_precision_loss, reason = "thousands")]
    let (admitted, allowed) = (admitted as f64, f64::from(RATE) * took.as_secs_f64() + f64::from(BURST));
    Ok(Row {
        name: "limits: admitted of ten times the limit, 16 clients".into(),
        value: admitted,
        unit: "",
        base: "limit × time + burst".into(),
        ratio: Some(admitted / allowed),
        spread: None,
        aim: "0.99 to 1",
    })
}

/// Connects at ten times the limit from sixteen threads. Returns the number of admitted connections, and the duration.
fn storm(client: &NetNs, target: SocketAddrV4) -> Result<(u64, Duration)> {
    const CLIENTS: u32 = 16;
    const LENGTH: Duration = Duration::from_secs(10);
    client.enter(move || {
        let pause = Duration::from_secs(1) * CLIENTS / (10 * RATE);
        let (started, admitted) = (Instant::now(), AtomicU64::new(0));
        let connect = || {
            let mut next = started;
            while started.elapsed() < LENGTH {
                if std::net::TcpStream::connect(target).is_ok() {
                    admitted.fetch_add(1, Ordering::Relaxed);
                }
                next += pause;
                std::thread::sleep(next.saturating_duration_since(Instant::now()));
            }
        };
        std::thread::scope(|scope| {
            for _ in 0..CLIENTS {
                scope.spawn(connect);
            }
        });
        (admitted.into_inner(), started.elapsed())
    })
}
