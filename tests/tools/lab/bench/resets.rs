//! Established connections when a breaker opens: how soon they are reset, and what that costs.

use std::{
    io::{Read as _, Write as _},
    net::{SocketAddr, TcpStream},
    path::Path,
    process::Stdio,
    thread::sleep,
    time::{Duration, Instant},
};

use anyhow::{Context as _, Result, ensure};
use breaker_agent::process;
use breaker_api::events::EventType;
use breaker_common::BreakerState;
use breaker_tests::lab::{
    stage::{Checks, Lab, SERVICE},
    wait_for,
};
use rustix::process::{Resource, Rlimit, Signal, getrlimit, setrlimit};

use super::{Row, http::Ambassador, median};

const LONG: Duration = Duration::from_secs(60);
/// Established connections of the service.
const MANY: usize = 10_000;
/// Clients that wait for a primary that hangs, and how often that is measured.
const WAITING: usize = 8;
const TIMES: usize = 5;
/// Entries in the connection tracking, of which a service's are looked for. By default, a node with 4 GiB has room for 262,144.
const TRACKED: usize = 100_000;
/// Connections that are reset without a pause (docs/KUBERNETES.md).
const AT_ONCE: usize = 200;

pub(super) fn rows() -> Result<Vec<Row>> {
    // Both ends of each connection are files of this process and of its child.
    let most = getrlimit(Resource::Nofile).maximum;
    setrlimit(Resource::Nofile, Rlimit { current: most, maximum: most }).context("raise the number of open files")?;
    let mut rows = vec![waiting()?];
    rows.extend(apache_bench()?);
    rows.push(look()?);
    let planned = (MANY - AT_ONCE) as f64 / 1000.0;
    let (took, cpu) = many(1000)?;
    rows.push(row("10,000 at 1,000 a second", took, "s", Some((planned, "planned")), "0.9 to 1.1"));
    rows.push(row("10,000 at 1,000 a second, the agent's CPU time", cpu, "% CPU", None, "≤ 8"));
    let (took, _) = many(100_000)?;
    rows.push(row("10,000 without a pace", took, "s", None, "≤ 1.5"));
    Ok(rows)
}

fn row(name: &str, value: f64, unit: &'static str, base: Option<(f64, &str)>, aim: &'static str) -> Row {
    Row {
        name: format!("resets: {name}"),
        value,
        unit,
        base: base.map_or_else(String::new, |(base, what)| format!("{what}: {base:.1}")),
        ratio: base.map(|(base, _)| value / base),
        spread: None,
        aim,
    }
}

/// Eight clients have sent a request to a primary that hangs. Milliseconds from the opening to the reset of the last one.
fn waiting() -> Result<Row> {
    let mut times = Vec::new();
    for _ in 0..TIMES {
        let lab = start(1000)?;
        let mut streams = connect(&lab, WAITING)?;
        lab.primary.signal(Signal::STOP)?;
        for stream in &mut streams {
            stream.write_all(b"GET / HTTP/1.1\r\nHost: lab\r\n\r\n")?;
        }
        all_reset(&mut streams)?;
        let end = jiff::Timestamp::now();
        let opened = lab.agent.events()?.into_iter().find(|event| event.to == Some(BreakerState::Open));
        let opened = opened.context("the breaker did not open")?.at;
        times.push(end.duration_since(opened).as_secs_f64() * 1000.0);
        lab.primary.signal(Signal::CONT)?;
    }
    Ok(row("8 that wait, the last one", median(&times), "ms", None, "≤ 50"))
}

/// `ab` with eight connections, while the primary hangs: its failed requests with breaker, and with HAProxy in its place,
/// both with the same checks.
fn apache_bench() -> Result<[Row; 2]> {
    let mut failed = [Vec::new(), Vec::new()];
    let mut longest = [Vec::new(), Vec::new()];
    for _ in 0..TIMES {
        for (index, by_proxy) in [(0, false), (1, true)] {
            let mut lab = Lab::new(Checks::Fast)?;
            let proxy = if by_proxy {
                Some(Ambassador::start(&mut lab, "inter 100ms fall 3 rise 1")?)
            } else {
                lab.agent.start()?;
                lab.agent.wait_all_up(LONG)?;
                None
            };
            let target = proxy.as_ref().map_or(lab.vip, |proxy| proxy.address);
            let mut command = lab.client.ns.command("ab");
            // A time-out longer than the run: only a reset ends a request that waits.
            command.args(["-c", "8", "-t", "3", "-n", "10000000", "-s", "30", "-r", &format!("http://{target}/")]);
            let client = command.stdout(Stdio::piped()).stderr(Stdio::null()).spawn().context("start ab")?;
            sleep(Duration::from_secs(1));
            lab.primary.signal(Signal::STOP)?;
            let output = client.wait_with_output().context("run ab")?;
            lab.primary.signal(Signal::CONT)?;
            let text = String::from_utf8_lossy(&output.stdout);
            failed[index].push(lost(&text)?);
            longest[index].push(number(&text, " 100%")?);
        }
    }
    let [ours, theirs] = failed.each_ref().map(|failed| median(failed));
    let [our_longest, their_longest] = longest.each_ref().map(|longest| median(longest));
    let proxy = "HAProxy, shutdown-sessions";
    let requests = Row {
        ratio: None,
        ..row("ab -c 8, failed requests", ours, "requests", Some((theirs, proxy)), "≤ HAProxy's")
    };
    Ok([requests, row("ab -c 8, the longest request", our_longest, "ms", Some((their_longest, proxy)), "")])
}

/// Requests without an answer in the report of ab, which counts a reset in three of its columns, and an end without an answer
/// in one. It leaves the line out where nothing failed.
fn lost(report: &str) -> Result<f64> {
    let Some((_, line)) = report.split_once("(Connect: ") else { return Ok(0.0) };
    let counts = line.split(')').next().unwrap_or_default().split([',', ':']).map(str::trim);
    let numbers: Vec<f64> = counts.filter_map(|word| word.parse().ok()).collect();
    let [connect, receive, length, _exceptions] = numbers[..] else { anyhow::bail!("unexpected: {line}") };
    Ok(connect + receive.max(length))
}

/// The first number behind `label` in the report of ab.
fn number(report: &str, label: &str) -> Result<f64> {
    let line = report.lines().find_map(|line| line.strip_prefix(label));
    let word =
        line.and_then(|rest| rest.split_whitespace().next()).with_context(|| format!("no {label} in {report}"))?;
    word.parse().with_context(|| format!("{label} {word}"))
}

/// Milliseconds of CPU time that the agent's thread takes to find the connections of a service among all of a node.
fn look() -> Result<Row> {
    let mut lab = Lab::with(Checks::Default, "    onOpen: Keep\n")?;
    lab.agent.start()?;
    lab.agent.wait_all_up(LONG)?;
    let node = lab.world.node(0).ns();
    let entries: String = (0..TRACKED)
        .map(|n| {
            let (client, port) = (n / 50_000 + 1, n % 50_000 + 1024);
            // The first thousand are the service's.
            let to = if n < 1000 { lab.vip.to_string() } else { format!("10.43.9.9:{}", lab.vip.port()) };
            let (ip, to_port) = to.split_once(':').unwrap_or_default();
            format!(
                "-I -p tcp --state ESTABLISHED -u ASSURED -t 600 -s 10.99.0.{client} -d {ip} --sport {port} --dport {to_port}\n"
            )
        })
        .collect();
    let file = lab.world.dir().join("conntrack");
    std::fs::write(&file, entries).context("write the entries")?;
    node.output("conntrack", &["-R", &file.to_string_lossy()])?;
    let used = || thread_cpu_ms(lab.agent.pid()?, "resets");
    let before = used()?;
    lab.agent.cli(&["trip", SERVICE])?;
    wait_for("the count of the connections", LONG, || {
        lab.agent.service(SERVICE).is_ok_and(|s| s.established.is_some_and(|counts| counts.found == 1000))
    })?;
    Ok(row("CPU time to find 1,000 among 100,000", used()? - before, "ms", None, "≤ 40"))
}

/// CPU time of a thread in milliseconds (the first field of schedstat, proc(5)).
fn thread_cpu_ms(pid: u32, name: &str) -> Result<f64> {
    let tasks = std::fs::read_dir(format!("/proc/{pid}/task")).context("list the agent's threads")?;
    let of_name = |path: &Path| std::fs::read_to_string(path.join("comm")).is_ok_and(|comm| comm.trim() == name);
    let path = tasks.flatten().map(|task| task.path()).find(|path| of_name(path)).context("no such thread")?;
    let text = std::fs::read_to_string(path.join("schedstat")).context("read schedstat")?;
    let nanoseconds: f64 = text.split_whitespace().next().context("an empty schedstat")?.parse()?;
    Ok(nanoseconds / 1e6)
}

/// Resets many idle connections. Returns the seconds until the last one was reset, and the agent's CPU time meanwhile in
/// percent of a core.
fn many(per_second: u32) -> Result<(f64, f64)> {
    let lab = start(per_second)?;
    let mut streams = connect(&lab, MANY)?;
    let late = || lab.agent.status().ok().and_then(|status| Some(status.probes?.late)).unwrap_or_default();
    let late_before = late();
    let cpu = || -> Result<f64> { Ok(process::of(lab.agent.pid()?).context("the agent's CPU time")?.cpu_seconds) };
    let (before, started) = (cpu()?, Instant::now());
    lab.agent.cli(&["trip", SERVICE])?;
    all_reset(&mut streams)?;
    let took = started.elapsed().as_secs_f64();
    let used = cpu()? - before;
    let said = lab.agent.events()?.into_iter().rfind(|event| event.kind == EventType::Resets);
    eprintln!("resets: {}", said.map(|event| event.message).unwrap_or_default());
    eprintln!("resets: checks that were late by more than 20 ms meanwhile: {}", late() - late_before);
    Ok((took, used / took * 100.0))
}

fn start(per_second: u32) -> Result<Lab> {
    let mut lab = Lab::with(Checks::Fast, &format!("    resetsPerSecond: {per_second}\n"))?;
    lab.agent.start()?;
    lab.agent.wait_all_up(LONG)?;
    Ok(lab)
}

fn connect(lab: &Lab, count: usize) -> Result<Vec<TcpStream>> {
    let target = SocketAddr::V4(lab.vip);
    lab.client.ns.sysctl(&["net.ipv4.ip_local_port_range=1024 65535"])?;
    let streams = lab.client.ns.enter(move || {
        (0..count).map(|_| TcpStream::connect_timeout(&target, LONG)).collect::<std::io::Result<Vec<_>>>()
    })?;
    let mut streams = streams.context("connect")?;
    for stream in &mut streams {
        stream.set_read_timeout(Some(LONG))?;
    }
    Ok(streams)
}

/// Waits until all connections are reset.
fn all_reset(streams: &mut [TcpStream]) -> Result<()> {
    for stream in streams {
        let end = stream.read(&mut [0; 64]);
        let is_reset = end.as_ref().is_err_and(|error| error.kind() == std::io::ErrorKind::ConnectionReset);
        ensure!(is_reset, "a connection ended otherwise: {end:?}");
    }
    Ok(())
}
