//! What checks cost: the prober's CPU time and memory, and what the server's side is left with. breaker, HAProxy and a
//! prober as the kubelet has it make the same checks, one after the other.

use std::{
    fmt::Write as _,
    net::SocketAddrV4,
    process::{Command, Stdio},
    time::{Duration, Instant},
};

use anyhow::{Context as _, Result, ensure};
use breaker_api::status::Health;
use breaker_tests::{
    lab::{
        agent::Agent,
        netns::NetNs,
        stage::{Checks, Lab},
        wait_for,
    },
    process::KilledOnDrop,
};

use super::Row;

/// Checks in each comparison, each made every 100 ms.
const CHECKS: u16 = 100;
/// How long each prober is measured.
const FOR: Duration = Duration::from_secs(5);
/// Backends that are checked each second.
const MANY: u32 = 10_000;

/// What a check does.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Kind {
    Http,
    Tcp,
}

impl Kind {
    const fn name(self) -> &'static str {
        match self {
            Self::Http => "HTTP check",
            Self::Tcp => "TCP check",
        }
    }
}

pub(super) fn rows() -> Result<Vec<Row>> {
    let mut rows = Vec::new();
    for (kind, aim) in [(Kind::Http, "≤ 80 µs"), (Kind::Tcp, "≤ 25 µs")] {
        let ours = breaker(kind)?;
        let haproxy = haproxy(kind)?;
        let kubelet = kubelet(kind)?;
        for (base, theirs) in [("HAProxy", haproxy), ("a prober as kubelet's", kubelet)] {
            rows.push(Row {
                name: format!("probes: CPU time for one {}", kind.name()),
                value: ours.cpu_micros,
                unit: "µs",
                base: format!("{base}: {:.0} µs", theirs.cpu_micros),
                ratio: Some(ours.cpu_micros / theirs.cpu_micros),
                spread: None,
                aim,
            });
        }
        let left = |what: &str, pick: fn(&Cost) -> f64| Row {
            name: format!("probes: {what} for 1,000 {}s", kind.name()),
            value: pick(&ours),
            unit: "",
            base: format!("HAProxy {:.0}, as kubelet's {:.0}", pick(&haproxy), pick(&kubelet)),
            ratio: None,
            spread: None,
            aim: "",
        };
        rows.push(left("accepted connections", |cost| cost.accepted));
        rows.push(left("TIME_WAIT", |cost| cost.time_wait));
        rows.push(left("conntrack entries after 12 s", |cost| cost.conntrack));
        if kind == Kind::Http {
            let name = "memory without tables, at 1,000 HTTP checks a second";
            rows.push(alone(name, ours.memory_mib - ours.tables_mib, "MiB", "≤ 25"));
            rows.push(alone("tables in the agent's memory", ours.tables_mib, "MiB", ""));
        }
    }
    rows.extend(many()?);
    Ok(rows)
}

fn alone(name: &str, value: f64, unit: &'static str, aim: &'static str) -> Row {
    Row { name: format!("probes: {name}"), value, unit, base: String::new(), ratio: None, spread: None, aim }
}

/// What a prober costs, for each probe or for a thousand of them.
#[derive(Clone, Copy, Debug)]
struct Cost {
    cpu_micros: f64,
    memory_mib: f64,
    tables_mib: f64,
    accepted: f64,
    time_wait: f64,
    conntrack: f64,
}

fn breaker(kind: Kind) -> Result<Cost> {
    let mut lab = Lab::new(Checks::Fast)?;
    let backend = lab.primary.address();
    let mut text = String::from("services:\n");
    for n in 0..CHECKS {
        // The checks differ, because the agent makes equal checks of a backend only once.
        let action = match kind {
            Kind::Http => "httpGet: {path: /ready}".to_owned(),
            Kind::Tcp => "tcpSocket: {}".to_owned(),
        };
        text.push_str(&service(
            n.into(),
            backend,
            &format!("{action}, periodMillis: 100, timeoutMillis: {}", 1000 + n),
        ));
    }
    lab.agent.write_config("", &text)?;
    lab.agent.start()?;
    wait_for("every primary to be Up", Duration::from_secs(20), || all_up(&lab.agent))?;
    let mut cost = measure(&lab, lab.agent.pid()?)?;
    lab.agent.stop()?;
    cost.conntrack = conntrack_left(&lab)?;
    Ok(cost)
}

/// Whether each service's primary has only backends that are Up.
fn all_up(agent: &Agent) -> bool {
    agent.status().is_ok_and(|status| {
        let mut primaries = status.services.iter().filter_map(|service| service.tiers.first());
        primaries.all(|tier| tier.backends.iter().all(|backend| backend.health == Health::Up))
    })
}

/// One service whose primary is `backend`, with a check in YAML's flow style.
fn service(n: u32, backend: SocketAddrV4, check: &str) -> String {
    let [_, a, b, c] = n.to_be_bytes();
    format!(
        "  - {{name: s{n}, frontends: [{{address: 10.{}.{b}.{c}, port: 80}}], primary: {{backends: [{{address: {}, port: \
         {}}}], check: {{{check}}}}}, backups: [{{backends: [{{address: 10.42.9.9, port: 80}}]}}]}}\n",
        200 + a,
        backend.ip(),
        backend.port()
    )
}

fn haproxy(kind: Kind) -> Result<Cost> {
    let lab = Lab::new(Checks::Fast)?;
    let mut text = String::from(
        "global\n  nbthread 1\ndefaults\n  mode tcp\n  timeout connect 1s\n  timeout check 1s\n  timeout client 60s\n  \
         timeout server 60s\nlisten all\n  bind 127.0.0.1:8099\n",
    );
    if kind == Kind::Http {
        text.push_str("  option httpchk GET /ready\n");
    }
    for n in 0..CHECKS {
        let _ = writeln!(text, "  server s{n} {} check inter 100", lab.primary.address());
    }
    let config = lab.world.dir().join("haproxy.cfg");
    std::fs::write(&config, text).context("write haproxy.cfg")?;
    let mut command = lab.world.node(0).ns().command("haproxy");
    peer(&lab, command.arg("-db").arg("-f").arg(&config))
}

fn kubelet(kind: Kind) -> Result<Cost> {
    let lab = Lab::new(Checks::Fast)?;
    let source = concat!(env!("CARGO_MANIFEST_DIR"), "/tools/lab/bench/kubelet.go");
    let program = lab.world.dir().join("kubelet");
    let built = Command::new("go").arg("build").arg("-o").arg(&program).arg(source).status().context("run go")?;
    ensure!(built.success(), "go build failed: {built}");
    let mut command = lab.world.node(0).ns().command(&program);
    command.arg(if kind == Kind::Http { "http" } else { "tcp" }).arg("100");
    let address = lab.primary.address().to_string();
    command.args(std::iter::repeat_n(&address, CHECKS.into()));
    peer(&lab, &mut command)
}

fn peer(lab: &Lab, command: &mut Command) -> Result<Cost> {
    let null = || Stdio::null();
    let peer = KilledOnDrop(command.stdin(null()).stdout(null()).stderr(null()).spawn().context("start a peer")?);
    std::thread::sleep(Duration::from_secs(1));
    let mut cost = measure(lab, peer.0.id())?;
    drop(peer);
    cost.conntrack = conntrack_left(lab)?;
    Ok(cost)
}

/// Measures a prober that makes 1,000 probes a second, except for what is left in connection tracking.
fn measure(lab: &Lab, pid: u32) -> Result<Cost> {
    let pod = &lab.primary.pod.ns;
    let accepted_before = accepted(pod)?;
    let (before, started) = (cpu_seconds(pid)?, Instant::now());
    std::thread::sleep(FOR);
    let (used, seconds) = (cpu_seconds(pid)? - before, started.elapsed().as_secs_f64());
    let accepted = accepted(pod)? - accepted_before;
    let (memory_mib, tables_mib) = (resident_mib(pid)?, tables_mib(pid)?);
    let time_wait = |ns: &NetNs| ns.output("ss", &["-Htan", "state", "time-wait"]).map(|text| text.lines().count());
    let time_wait = time_wait(lab.world.node(0).ns())? + time_wait(pod)?;
    let probes = seconds * f64::from(CHECKS) * 10.0;
    // TIME_WAIT lasts for 60 s: the sockets of the warm-up are still there, and their number is small.
    let time_wait = f64::from(u32::try_from(time_wait)?) * 1000.0 / probes;
    Ok(Cost {
        cpu_micros: used / probes * 1e6,
        memory_mib,
        tables_mib,
        accepted: accepted * 1000.0 / probes,
        time_wait,
        conntrack: 0.0,
    })
}

/// Entries of connection tracking on the node 12 s after the last probe, for each 1,000 probes.
fn conntrack_left(lab: &Lab) -> Result<f64> {
    std::thread::sleep(Duration::from_secs(12));
    // nf_conntrack_count still counts entries that have ended and were not yet collected; the list leaves them out.
    let list = lab.world.node(0).ns().output("cat", &["/proc/net/nf_conntrack"])?;
    let count = f64::from(u32::try_from(list.lines().count())?);
    Ok(count * 1000.0 / (FOR.as_secs_f64() * f64::from(CHECKS) * 10.0))
}

/// Connections that a pod's processes could accept: `PassiveOpens` in /proc/net/snmp, RFC 4022.
fn accepted(ns: &NetNs) -> Result<f64> {
    let text = ns.output("cat", &["/proc/net/snmp"])?;
    let mut lines = text.lines().filter(|line| line.starts_with("Tcp:"));
    let (names, values) = (lines.next().context("Tcp: in /proc/net/snmp")?, lines.next().context("its values")?);
    let found = names.split_whitespace().zip(values.split_whitespace()).find(|(name, _)| *name == "PassiveOpens");
    found.and_then(|(_, value)| value.parse().ok()).context("PassiveOpens in /proc/net/snmp")
}

/// 10,000 backends, each checked every second. All of their addresses lead to one pod.
fn many() -> Result<Vec<Row>> {
    let mut lab = Lab::new(Checks::Fast)?;
    let pod = &lab.primary.pod;
    pod.ns.ip(&["route", "add", "local", "10.64.0.0/16", "dev", "lo"])?;
    lab.world.node(0).ns().ip(&["route", "add", "10.64.0.0/16", "via", &pod.address.to_string()])?;
    // A thousand services with ten backends each.
    let mut text = String::from("services:\n");
    for n in 0..MANY / 10 {
        let backends: Vec<String> = (0..10)
            .map(|i| {
                let [_, _, b, c] = (n * 10 + i).to_be_bytes();
                format!("{{address: 10.64.{b}.{c}, port: 80}}")
            })
            .collect();
        let _ = writeln!(
            text,
            "  - {{name: s{n}, frontends: [{{address: 10.200.{}.{}, port: 80}}], primary: {{backends: [{}], check: \
             {{tcpSocket: {{}}, periodMillis: 1000}}}}, backups: [{{backends: [{{address: 10.42.9.9, port: 80}}]}}]}}",
            n / 256,
            n % 256,
            backends.join(", ")
        );
    }
    lab.agent.write_config("  maxServices: 2048\n", &text)?;
    lab.agent.start()?;
    wait_for("every primary to be Up", Duration::from_secs(60), || all_up(&lab.agent))?;
    std::thread::sleep(Duration::from_secs(2));
    let late = |agent: &Agent| -> Result<u64> { Ok(agent.status()?.probes.context("the load of the probes")?.late) };
    let (pid, late_before) = (lab.agent.pid()?, late(&lab.agent)?);
    let (before, started) = (cpu_seconds(pid)?, Instant::now());
    std::thread::sleep(FOR);
    let used = (cpu_seconds(pid)? - before) / started.elapsed().as_secs_f64();
    let late = f64::from(u32::try_from(late(&lab.agent)? - late_before)?);
    Ok(vec![
        alone("a part of a core, 10,000 backends a second", used * 100.0, "%", "≤ 60"),
        alone("more than 20 ms late, of 10,000 a second", late / FOR.as_secs_f64(), "per s", "0"),
        alone("memory with 10,000 backends", resident_mib(pid)?, "MiB", ""),
    ])
}

fn cpu_seconds(pid: u32) -> Result<f64> {
    let stat = std::fs::read_to_string(format!("/proc/{pid}/stat")).context("read /proc/PID/stat")?;
    let fields: Vec<&str> = stat.rsplit(')').next().unwrap_or("").split_whitespace().collect();
    let ticks = |i: usize| fields.get(i).and_then(|f| f.parse::<f64>().ok()).unwrap_or(0.0);
    // proc_pid_stat(5): utime and stime are the fields 14 and 15, in ticks of 1/100 s; `fields` begins with field 3.
    Ok((ticks(11) + ticks(12)) / 100.0)
}

fn resident_mib(pid: u32) -> Result<f64> {
    let status = std::fs::read_to_string(format!("/proc/{pid}/status")).context("read /proc/PID/status")?;
    let line = status.lines().find_map(|line| line.strip_prefix("VmRSS:")).context("no VmRSS in /proc/PID/status")?;
    Ok(line.split_whitespace().next().and_then(|kib| kib.parse::<f64>().ok()).unwrap_or(0.0) / 1024.0)
}

/// Memory of the maps that a process has mapped. The kernel counts it as the process's.
fn tables_mib(pid: u32) -> Result<f64> {
    let text = std::fs::read_to_string(format!("/proc/{pid}/smaps")).context("read /proc/PID/smaps")?;
    let (mut in_map, mut kib) = (false, 0.0);
    for line in text.lines() {
        match line.strip_prefix("Rss:") {
            Some(rest) if in_map => kib += rest.trim().trim_end_matches(" kB").parse::<f64>().unwrap_or(0.0),
            Some(_) => {}
            // The line of a mapping ends with its name; the lines below it have a name and a value.
            None if line.split_whitespace().next().is_some_and(|first| !first.ends_with(':')) => {
                in_map = line.ends_with("bpf-map");
            }
            None => {}
        }
    }
    Ok(kib / 1024.0)
}
