//! The benchmark's rows that need a cluster.

use std::{
    process::{Command, Stdio},
    time::{Duration, Instant},
};

use anyhow::{Context as _, Result, bail};
use breaker_agent::process;

use crate::{
    cluster::{Cluster, NAMESPACE, SYSTEM},
    load::{Load, now},
    row, scenarios, wait_for,
};

pub fn all(cluster: &Cluster) -> Result<()> {
    for round in 0..3 {
        scenarios::restore_lab(cluster)?;
        programmed(cluster, round)?;
        failover(cluster, round, "3 s x 1 (the lab's)", None)?;
        failover(
            cluster,
            round,
            "100 ms x 3",
            Some(r#"{"spec":{"check":{"periodSeconds":null,"periodMillis":100,"failureThreshold":3}}}"#),
        )?;
    }
    // Back to the lab's own checks.
    scenarios::restore_lab(cluster)?;
    idle(cluster)
}

/// Time from `kubectl apply` until every node has programmed the object.
fn programmed(cluster: &Cluster, round: usize) -> Result<()> {
    cluster.lab(&["delete", "cb", "dummy"])?;
    let started = Instant::now();
    cluster.lab(&["apply", "-f", "k8s/lab/circuitbreaker.yaml"])?;
    cluster.wait_programmed("dummy")?;
    row(
        "apply to Programmed",
        started.elapsed().as_secs_f64() * 1000.0,
        "ms",
        &format!("round {round}, kubectl's own time included"),
    );
    Ok(())
}

/// Time from the fake error to the first answer of the backup since which every request succeeds.
fn failover(cluster: &Cluster, round: usize, checks: &str, patch: Option<&str>) -> Result<()> {
    if let Some(patch) = patch {
        cluster.lab(&["patch", "cb", "dummy", "--type=merge", "-p", patch])?;
        cluster.wait_programmed("dummy")?;
    }
    cluster.wait_state("dummy", "Closed")?;
    let service = cluster.get(NAMESPACE, "svc/dummy-deployment", "")?;
    let ip = service["spec"]["clusterIP"].as_str().context("no clusterIP")?;
    let load = Load::start(cluster, "load", &cluster.nodes[0], &format!("http://{ip}:8080/"))?;
    cluster.fake_error("dummy-deployment", true)?;
    let injected = now();
    cluster.wait_state("dummy", "Open")?;
    std::thread::sleep(Duration::from_secs(3));
    let results = load.end()?;
    let took = results.recovery(injected, now() - 2500)?;
    row(&format!("fake error to backup, checks {checks}"), took as f64, "ms", &format!("round {round}"));
    cluster.fake_error("dummy-deployment", false)?;
    cluster.wait_state("dummy", "Closed")
}

/// Memory and CPU of idle agents, with 1, 100 and 1,000 services.
fn idle(cluster: &Cluster) -> Result<()> {
    let mut there = 0;
    for services in [1_usize, 100, 1000] {
        // One service is the lab's.
        let more = services - 1 - there;
        for start in (there..there + more).step_by(100) {
            let count = 100.min(there + more - start);
            cluster.feed(&["-n", NAMESPACE, "create", "-f", "-"], &scenarios::manifest_of_many(count, start))?;
        }
        there += more;
        if there > 0 {
            let started = Instant::now();
            wait_for("all services to be programmed", Duration::from_secs(180), || {
                let done = scenarios::many_programmed(cluster)?;
                if done == there { Ok(Some(())) } else { bail!("{done} of {there}") }
            })?;
            row(
                &format!("{services} services, last created to all Programmed"),
                started.elapsed().as_secs_f64(),
                "s",
                "",
            );
        }
        std::thread::sleep(Duration::from_secs(10));
        for node in &cluster.nodes {
            let (cpu, memory) = usage(cluster, node)?;
            row(&format!("{services} services idle, checks every 3 s, agent's CPU"), cpu, "% of a core", node);
            row(&format!("{services} services idle, agent's memory"), memory, "MiB", node);
        }
    }
    cluster.lab(&["delete", "cb,svc", "-l", "many=yes", "--wait=false"])?;
    for services in [1, 100, 1000] {
        let Some((cpu, memory)) = ambassador(services)? else {
            println!("haproxy is not on the PATH: its rows are left out");
            break;
        };
        row(
            &format!("{services} services idle, HAProxy's CPU"),
            cpu,
            "% of a core",
            "one process, checks shared as breaker shares them",
        );
        row(&format!("{services} services idle, HAProxy's memory"), memory, "MiB", "on this machine, not in a pod");
    }
    Ok(())
}

/// CPU (percent of a core) and memory (MiB) of HAProxy as an ambassador for `services` services, on the loopback
/// interface of this machine. Each service has a primary and a backup and tracks one set of checks, as breaker shares
/// the checks of services on the same pods. None if haproxy is not on the PATH.
fn ambassador(services: usize) -> Result<Option<(f64, f64)>> {
    const DUMMY: &str = "127.0.0.1:18080";
    let own = std::env::current_exe().context("find the path of this program")?;
    let dummy = own.with_file_name("dummy-service");
    let dir = tempfile::tempdir().context("make a directory")?;
    let file = dir.path().join("haproxy.cfg");
    let mut text = String::from(
        "global\n  maxconn 4000\n  nbthread 1\ndefaults\n  mode http\n  timeout connect 1s\n  timeout client 10s\n  timeout server 10s\n\
         backend pods\n  option httpchk GET /ready\n  default-server check inter 3s fall 1 rise 1\n",
    );
    for server in ["p1", "p2", "b1", "b2"] {
        text.push_str(&format!("  server {server} {DUMMY}\n"));
    }
    for i in 0..services {
        text.push_str(&format!(
            "listen s{i}\n  bind 127.0.0.1:{}\n  server p1 {DUMMY} track pods/p1\n  server p2 {DUMMY} track pods/p2\n  \
             server b1 {DUMMY} track pods/b1 backup\n  server b2 {DUMMY} track pods/b2 backup\n",
            20_000 + i
        ));
    }
    std::fs::write(&file, text).context("write haproxy's configuration")?;
    let quiet =
        |command: &mut Command| command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::null()).spawn();
    let mut backend = quiet(Command::new(dummy).args(["--listen", DUMMY])).context("start the dummy service")?;
    let proxy = quiet(Command::new("haproxy").arg("-db").arg("-f").arg(&file));
    let outcome = match proxy {
        Err(_) => Ok(None),
        Ok(mut proxy) => {
            std::thread::sleep(Duration::from_secs(5));
            let look = || process::of(proxy.id()).context("haproxy has ended");
            let outcome = look().and_then(|before| {
                let start = Instant::now();
                std::thread::sleep(Duration::from_secs(20));
                let after = look()?;
                let cpu = (after.cpu_seconds - before.cpu_seconds) / start.elapsed().as_secs_f64() * 100.0;
                let bytes = u32::try_from(after.resident_bytes / 1024).unwrap_or(u32::MAX);
                Ok(Some((cpu, f64::from(bytes) / 1024.0)))
            });
            let _ = proxy.kill();
            let _ = proxy.wait();
            outcome
        }
    };
    let _ = backend.kill();
    let _ = backend.wait();
    outcome
}

/// CPU (percent of a core, over 20 seconds) and resident memory (MiB), as the agent's status shows them.
fn usage(cluster: &Cluster, node: &str) -> Result<(f64, f64)> {
    let name = &cluster.agent_on(node)?;
    let look = || -> Result<(f64, f64, Instant)> {
        let text = cluster.kubectl(&["-n", SYSTEM, "exec", name, "--", "/breaker", "status", "-o", "json"])?;
        let status: serde_json::Value = serde_json::from_str(&text)?;
        let number =
            |field: &str| status["process"][field].as_f64().with_context(|| format!("status has no process.{field}"));
        Ok((number("cpuSeconds")?, number("residentBytes")?, Instant::now()))
    };
    let (before, _, start) = look()?;
    std::thread::sleep(Duration::from_secs(20));
    let (after, memory, end) = look()?;
    Ok(((after - before) / (end - start).as_secs_f64() * 100.0, memory / 1_048_576.0))
}
