//! What others see of the agent: metrics, health, and the service manager.

use std::{fs, os::unix::net::UnixDatagram, time::Duration};

use anyhow::{Context as _, Result, ensure};
use breaker_common::BreakerState;
use breaker_tests::{
    lab::{
        agent::Agent,
        client::{Load, Plan},
        kubeproxy,
        netns::NetNs,
        service::{Fault, ServicePod},
        stage::{Checks, Lab, SERVICE, entry},
        wait_for,
        world::World,
    },
    process::KilledOnDrop,
    prometheus::{self, Server},
};
use rustix::process::Signal;
use serde_json::Value;

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

/// The live page: at the loopback address alone, current, and without addresses of clients.
#[test]
fn the_page_shows_a_failover_and_no_clients() -> Result<()> {
    let mut lab = observed_lab("")?;
    let limits = "    limits: {perClient: {newConnectionsPerSecond: 1}}\n";
    let agent = format!("  listen: {LISTEN}\n  metricsListen: {METRICS}\n");
    lab.agent.write_config(&agent, &lab.services(Checks::Fast, limits))?;
    lab.agent.start()?;
    wait_all_up(&lab)?;
    let (status, page) = get(&lab, "127.0.0.1:9810/")?;
    assert!(status == 200 && page.contains("<title>breaker</title>"), "{status} {page}");
    assert_eq!(get(&lab, "127.0.0.1:9811/")?.0, 404, "the address for metrics has no page");
    let ns = lab.world.node(0).ns();
    let host = "Host: breaker.example.com";
    let refused =
        ns.output("curl", &["-s", "-o", "/dev/null", "-w", "%{http_code}", "-H", host, "http://127.0.0.1:9810/"])?;
    assert_eq!(refused, "421", "a name that somebody else may own");

    let file = lab.world.dir().join("stream");
    let mut curl = ns.command("curl");
    let curl = curl.args(["-s", "-N", "http://127.0.0.1:9810/v1/stream"]).stdout(fs::File::create(&file)?).spawn()?;
    let curl = KilledOnDrop(curl);
    let messages = || -> Vec<Value> {
        let text = fs::read_to_string(&file).unwrap_or_default();
        let complete = text.rsplit_once('\n').map_or("", |(complete, _)| complete);
        complete.lines().filter_map(|line| serde_json::from_str(line.strip_prefix("data: ")?).ok()).collect()
    };
    let last_state = || {
        let rows = messages().into_iter().filter_map(|message| message["breakers"].as_array().cloned()).flatten();
        rows.filter_map(|row| Some(row["state"].as_str()?.to_owned())).next_back()
    };
    wait_for("the closed breaker", LONG, || last_state().as_deref() == Some("Closed"))?;
    let load = lab.load(Plan::usual(lab.vip))?;
    load.wait("requests", LONG, |records| records.len() > 30)?;
    lab.primary.inject(Fault::Kill)?;
    wait_for("the open breaker", LONG, || last_state().as_deref() == Some("Open"))?;
    wait_for("the event", LONG, || {
        messages()
            .iter()
            .any(|message| message["events"].as_array().is_some_and(|e| e.iter().any(|e| e["to"] == "Open")))
    })?;
    wait_for("a connection on the backup", LONG, || {
        messages().iter().any(|message| message["counts"][SERVICE][1].as_u64().is_some_and(|moved| moved > 0))
    })?;
    drop(load.stop()?);
    let (status, detail) = get(&lab, &format!("127.0.0.1:9810/v1/breakers/{SERVICE}"))?;
    assert!(status == 200 && detail.contains(&format!("breaker trip {SERVICE} --for 10m")), "{status} {detail}");

    // The socket, which only root may use, shows the clients; the page's data does not.
    let client = lab.client.address.to_string();
    let refused = || {
        lab.agent.service(SERVICE).is_ok_and(|service| {
            service
                .limits
                .is_some_and(|limits| limits.limited_clients.iter().any(|c| c.client.as_ref() == Some(&client)))
        })
    };
    assert!(refused(), "{:?}", lab.agent.service(SERVICE)?.limits);
    assert!(lab.agent.events()?.iter().any(|event| event.message.contains(&client)), "{:?}", lab.agent.events()?);
    for path in ["status", &format!("services/{SERVICE}"), "events", &format!("breakers/{SERVICE}")] {
        let (status, body) = get(&lab, &format!("127.0.0.1:9810/v1/{path}"))?;
        assert!(
            status == 200 && !body.contains(&format!("\"{client}")) && !body.contains(&format!("{client}:")),
            "{path}: {body}"
        );
    }
    let stream = fs::read_to_string(&file)?;
    assert!(!stream.contains(&client), "{stream}");
    drop(curl);
    Ok(())
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

/// The answer of Prometheus' API (version 1) in a node's namespace. `path`: with its query, encoded.
fn api(ns: &NetNs, path: &str) -> Result<Value> {
    let url = format!("http://127.0.0.1:9090/api/v1/{path}");
    Ok(serde_json::from_str(&ns.output("curl", &["-s", "--max-time", "5", &url])?)?)
}

/// The value of a query with one result; `None` while there is none.
fn query(ns: &NetNs, query: &str) -> Option<f64> {
    let encoded: String = query.bytes().map(|byte| format!("%{byte:02x}")).collect();
    let answer = api(ns, &format!("query?query={encoded}")).ok()?;
    answer.pointer("/data/result/0/value/1")?.as_str()?.parse().ok()
}

/// The state of an alert: `inactive`, `pending` or `firing`.
fn alert_state(ns: &NetNs, name: &str) -> Option<String> {
    let answer = api(ns, "rules").ok()?;
    let rules = answer.pointer("/data/groups/0/rules")?.as_array()?.clone();
    let rule = rules.into_iter().find(|rule| rule["name"] == name)?;
    Some(rule["state"].as_str()?.to_owned())
}

/// A real Prometheus scrapes the agents of two nodes through a failover: states, rates, alerts, and an agent that is
/// killed in the middle of it.
#[test]
fn prometheus_follows_a_failover_on_two_nodes() -> Result<()> {
    let Some(server) = prometheus::program("prometheus") else {
        println!("skipped: there is no prometheus; cargo xtask setup unpacks it");
        return Ok(());
    };
    let mut world = World::new(2)?;
    for node in 0..2 {
        kubeproxy::base(world.node(node).ns())?;
    }
    let mut primary = ServicePod::start(world.node_mut(0), "dummy")?;
    let backup = ServicePod::start(world.node_mut(1), "backup")?;
    let vip = kubeproxy::vip(0);
    let service =
        kubeproxy::Service { name: "dummy".into(), vip, endpoints: vec![primary.address()], protocols: &["tcp"] };
    let entry = entry(SERVICE, vip, primary.address(), backup.address(), Checks::Fast, "");
    let (mut agents, mut clients, mut targets) = (Vec::new(), Vec::new(), String::new());
    for node in 0..2 {
        kubeproxy::add_service(world.node(node).ns(), &service)?;
        let dir = world.dir().join(format!("agent{node}"));
        fs::create_dir(&dir)?;
        let mut agent = Agent::new(world.node(node).ns(), &dir, &world.bpffs().join(format!("breaker{node}")));
        agent.write_config(&format!("  metricsListen: {METRICS}\n"), &format!("services:\n{entry}"))?;
        agent.start()?;
        agents.push(agent);
        clients.push(world.node_mut(node).add_pod(&format!("client{node}"))?);
        let address = world.node(node).address();
        targets += &format!("      - {{targets: ['{address}:9811'], labels: {{node: node{node}}}}}\n");
    }
    let config = world.dir().join("prometheus.yaml");
    let rules = ebpf_builder::workspace().join("k8s/monitoring/rules.yaml");
    let text = format!(
        "global: {{scrape_interval: 1s, evaluation_interval: 1s}}\nrule_files: ['{}']\nscrape_configs:\n  - job_name: \
         breaker-agent\n    static_configs:\n{targets}",
        rules.display()
    );
    fs::write(&config, text)?;
    let ns = world.node(0).ns().clone();
    let _server = Server::start(ns.command(&server), &config, &world.dir().join("prometheus"), "127.0.0.1:9090")?;
    // Prometheus takes a while to start on a busy machine.
    let wait = |what: &str, value: f64| {
        wait_for(what, 3 * LONG, || query(&ns, what) == Some(value))
            .with_context(|| format!("{what} is {:?}", query(&ns, what)))
    };
    wait("sum(breaker_agent_ready)", 2.0)?;
    wait("sum(breaker_breakers{state=\"Closed\"})", 2.0)?;
    primary.inject(Fault::Kill)?;
    wait("sum(breaker_state{state=\"Open\"})", 2.0)?;
    let loads = clients.iter().map(|client| Load::start(&client.ns, Plan::usual(vip))).collect::<Result<Vec<_>>>()?;
    let moved = "breaker_connections_total{decision=\"Backup\"}";
    wait_for("a rate of moved connections on both nodes", LONG, || {
        query(&ns, &format!("min(rate({moved}[5s]))")).is_some_and(|rate| rate > 5.0)
    })?;
    wait_for("the alert", LONG, || alert_state(&ns, "BreakerTrafficOnBackup").as_deref() == Some("pending"))?;
    assert_eq!(alert_state(&ns, "BreakerBackupUnavailable").as_deref(), Some("inactive"));
    agents[1].kill()?;
    wait("sum(up)", 1.0)?;
    agents[1].start()?;
    wait("sum(up)", 2.0)?;
    wait_for("samples of the new agent", LONG, || {
        query(&ns, &format!("min(rate({moved}[5s]))")).is_some_and(|rate| rate > 5.0)
    })?;
    // What the kernel counts continues, so Prometheus sees no counter that begins anew.
    wait(&format!("max(resets({moved}[2m]))"), 0.0)?;
    primary.heal(Fault::Kill)?;
    wait("sum(breaker_state{state=\"Closed\"})", 2.0)?;
    wait_for("the end of the alert", LONG, || {
        alert_state(&ns, "BreakerTrafficOnBackup").as_deref() == Some("inactive")
    })?;
    loads.into_iter().try_for_each(|load| load.stop().map(drop))
}
