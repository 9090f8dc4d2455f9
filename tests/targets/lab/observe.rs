//! What others see of the agent: metrics, health, and the service manager.

use std::{os::unix::net::UnixDatagram, time::Duration};

use anyhow::{Context as _, Result, ensure};
use breaker_common::BreakerState;
use breaker_tests::{
    lab::{
        client::Plan,
        service::Fault,
        stage::{Checks, Lab, SERVICE},
        wait_for,
    },
    prometheus,
};
use rustix::process::Signal;

use crate::{LONG, text, wait_all_up};

const LISTEN: &str = "127.0.0.1:9810";
const METRICS: &str = "0.0.0.0:9811";

/// A lab whose agent serves metrics; it is not started.
fn observed_lab(agent: &str) -> Result<Lab> {
    let lab = Lab::new(Checks::Fast)?;
    let agent = format!("  listen: {LISTEN}\n  metricsListen: {METRICS}\n{agent}");
    lab.agent.write_config(&agent, &lab.services(Checks::Fast, ""))?;
    Ok(lab)
}

/// Asks the agent from its node. Returns the status and the body.
fn get(lab: &Lab, path: &str) -> Result<(u16, String)> {
    let url = format!("http://{path}");
    let output =
        lab.world.node(0).ns().output("curl", &["-s", "--max-time", "5", "-w", "\n%{http_code}", url.as_str()])?;
    let (body, status) = output.trim_end().rsplit_once('\n').context("no status")?;
    Ok((status.parse()?, body.to_owned()))
}

fn scrape(lab: &Lab) -> Result<String> {
    let (status, body) = get(lab, "127.0.0.1:9811/metrics")?;
    ensure!(status == 200, "{status}: {body}");
    Ok(body + "\n")
}

/// The value of a series, by the text before it.
fn value(scrape: &str, series: &str) -> Option<f64> {
    scrape.lines().find_map(|line| line.strip_prefix(series)?.trim().parse().ok())
}

fn of_service(name: &str, label: &str) -> String {
    let label = if label.is_empty() { String::new() } else { format!(",{label}") };
    format!("{name}{{breaker_namespace=\"\",breaker=\"{SERVICE}\"{label}}}")
}

#[test]
fn counters_of_connections_survive_a_killed_agent() -> Result<()> {
    let mut lab = observed_lab("")?;
    lab.agent.start()?;
    wait_all_up(&lab)?;
    if let Some(promtool) = prometheus::program("promtool") {
        prometheus::check_metrics(&promtool, &scrape(&lab)?)?;
    }
    lab.primary.inject(Fault::Kill)?;
    lab.agent.wait_state(SERVICE, BreakerState::Open, LONG)?;
    let load = lab.load(Plan::usual(lab.vip))?;
    load.wait("requests", LONG, |records| records.len() > 100)?;
    drop(load.stop()?);
    let before = scrape(&lab)?;
    let moved = of_service("breaker_connections_total", "decision=\"Backup\"");
    let translated = of_service("breaker_translated_packets_total", "");
    assert!(value(&before, &moved).is_some_and(|count| count > 10.0), "{before}");
    for (series, expected) in [
        (of_service("breaker_state", "state=\"Open\""), 1.0),
        (of_service("breaker_state", "state=\"Closed\""), 0.0),
        (of_service("breaker_transitions_total", "to=\"Open\""), 1.0),
        (of_service("breaker_trips_total", "reason=\"ConnectFailed\""), 1.0),
        (of_service("breaker_tier_backends", "role=\"primary\",health=\"Down\""), 1.0),
        (of_service("breaker_tier_backends", "role=\"backup\",health=\"Up\""), 1.0),
        (of_service("breaker_primary_share_ratio", ""), 0.0),
        (of_service("breaker_applied", ""), 1.0),
        ("breaker_agent_ready".into(), 1.0),
        ("breaker_breakers{state=\"Open\"}".into(), 1.0),
        ("breaker_listener_up{listener=\"Metrics\"}".into(), 1.0),
        ("breaker_failed_open_packets_total{reason=\"FlowTableFull\"}".into(), 0.0),
    ] {
        assert_eq!(value(&before, &series), Some(expected), "{series}\n{before}");
    }
    if let Some(promtool) = prometheus::program("promtool") {
        prometheus::check_metrics(&promtool, &before)?;
    }
    lab.agent.kill()?;
    lab.agent.start()?;
    let after = scrape(&lab)?;
    for series in [&moved, &translated] {
        assert!(value(&after, series) >= value(&before, series), "{series}\n{after}");
    }
    // The number of transitions is the agent's own, and starts anew.
    assert_eq!(value(&after, &of_service("breaker_transitions_total", "to=\"Open\"")), Some(0.0));
    Ok(())
}

#[test]
fn a_scrape_has_the_level_that_it_asks_for() -> Result<()> {
    let mut lab = observed_lab("  metrics: {level: Summary, perBackend: true}\n")?;
    lab.agent.start()?;
    wait_all_up(&lab)?;
    let state = of_service("breaker_state", "state=\"Closed\"");
    let closed = scrape(&lab)?;
    assert_eq!((value(&closed, &state), value(&closed, "breaker_breakers{state=\"Closed\"}")), (None, Some(1.0)));
    let (_, whole) = get(&lab, "127.0.0.1:9810/metrics?level=node")?;
    assert_eq!(value(&whole, &state), Some(1.0), "{whole}");
    let backend = format!("role=\"primary\",backend=\"{}\"", lab.primary.address());
    assert_eq!(value(&whole, &of_service("breaker_backend_up", &backend)), Some(1.0), "{whole}");
    let (status, why) = get(&lab, "127.0.0.1:9810/metrics?level=all")?;
    assert_eq!((status, why.as_str()), (400, "level: \"all\" is not allowed; allowed: node, summary\n"));
    lab.primary.inject(Fault::Kill)?;
    lab.agent.wait_state(SERVICE, BreakerState::Open, LONG)?;
    wait_for("the open breaker in the summary", LONG, || {
        scrape(&lab).is_ok_and(|text| value(&text, &of_service("breaker_state", "state=\"Open\"")) == Some(1.0))
    })
}

#[test]
fn health_says_what_is_wrong() -> Result<()> {
    let mut lab = observed_lab("")?;
    lab.agent.start()?;
    assert_eq!(get(&lab, "127.0.0.1:9810/livez")?, (200, "alive\n".into()));
    assert_eq!(get(&lab, "127.0.0.1:9810/healthz")?, (200, "alive\n".into()));
    assert_eq!(get(&lab, "127.0.0.1:9810/readyz")?, (200, "ready\n".into()));
    let (status, checks) = get(&lab, "127.0.0.1:9810/readyz?verbose")?;
    let passed = "[+]config ok\n[+]programs ok\n[+]interfaces ok\n[+]writes ok\n[+]listeners ok\nreadyz check passed\n";
    assert_eq!((status, checks.as_str()), (200, passed));
    // Health is for this node only.
    assert_eq!(get(&lab, "127.0.0.1:9811/livez")?.0, 404);
    lab.agent.signal(Signal::STOP)?;
    let hung = get(&lab, "127.0.0.1:9810/livez");
    lab.agent.signal(Signal::CONT)?;
    assert!(hung.is_err(), "{hung:?}");
    Ok(())
}

/// A port in use degrades the agent and does not end it; the port is taken when it is free.
#[test]
fn an_address_in_use_is_taken_when_it_is_free() -> Result<()> {
    let mut lab = observed_lab("")?;
    let ns = lab.world.node(0).ns().clone();
    let others = ns.enter(|| ["127.0.0.1:9810", "0.0.0.0:9811"].map(std::net::TcpListener::bind))?;
    lab.agent.start()?;
    wait_all_up(&lab)?;
    let shown = text(&lab.agent.cli(&["status"])?.stdout);
    for words in ["agent.listen: cannot listen on 127.0.0.1:9810", "agent.metricsListen: cannot listen on 0.0.0.0:9811"]
    {
        assert!(shown.contains(words) && shown.contains("choose another port"), "{shown}");
    }
    drop(others);
    wait_for("both addresses to answer", LONG, || {
        scrape(&lab).is_ok() && get(&lab, "127.0.0.1:9810/readyz").is_ok_and(|(status, _)| status == 200)
    })?;
    assert!(lab.agent.status()?.degraded.is_empty());
    assert!(lab.agent.log().contains("listening on 0.0.0.0:9811 now"), "{}", lab.agent.log());
    Ok(())
}

/// sd_notify(3): systemd learns that the agent is ready, what it does, and that its main loop runs.
#[test]
fn the_service_manager_is_told() -> Result<()> {
    let mut lab = observed_lab("")?;
    let path = lab.world.dir().join("notify.sock");
    let socket = UnixDatagram::bind(&path)?;
    socket.set_read_timeout(Some(LONG))?;
    lab.agent.launch_by(&["env", &format!("NOTIFY_SOCKET={}", path.display())]);
    lab.agent.start()?;
    let receive = || -> Result<String> {
        let mut buffer = [0; 1024];
        let length = socket.recv(&mut buffer).context("no message in time")?;
        Ok(String::from_utf8_lossy(&buffer[..length]).into_owned())
    };
    let mut messages = Vec::new();
    while !messages.iter().any(|message: &String| message.contains("READY=1")) {
        messages.push(receive()?);
    }
    while !messages.iter().any(|message| message.contains("STATUS=1 services: 1 closed")) {
        messages.push(receive()?);
    }
    assert!(messages.iter().all(|message| message.contains("WATCHDOG=1")), "{messages:?}");
    // A main loop that does not run sends nothing.
    lab.agent.signal(Signal::STOP)?;
    socket.set_read_timeout(Some(Duration::from_millis(100)))?;
    while receive().is_ok() {}
    socket.set_read_timeout(Some(Duration::from_secs(3)))?;
    let stopped = receive();
    lab.agent.signal(Signal::CONT)?;
    assert!(stopped.is_err(), "{stopped:?}");
    socket.set_read_timeout(Some(LONG))?;
    assert!(receive()?.contains("WATCHDOG=1"));
    lab.agent.stop()?;
    while !receive()?.contains("STOPPING=1") {}
    Ok(())
}
