//! Trouble of the agent's own: it is stopped, its log cannot be written, it runs out of descriptors or ports. None of it
//! is an outage of a healthy service. Each test is named after the finding that it was made for.

use std::{
    fs::{self, File},
    io::pipe,
    net::{Ipv4Addr, SocketAddrV4},
    path::{Path, PathBuf},
    process::{Command, Stdio},
    time::Duration,
};

use anyhow::{Context as _, Result, ensure};
use breaker_api::events::EventType;
use breaker_common::BreakerState;
use breaker_tests::lab::{
    agent::Agent,
    binary,
    client::{Load, Plan, ask_once, summary},
    service::Fault,
    stage::{Checks, Lab, SERVICE},
    wait_for,
};
use rustix::process::Signal;

use crate::{LONG, start_healthy_lab, text, wait_all_up};

/// Asserts that no breaker has ever opened, and that every request was answered by the primary.
#[track_caller]
fn nothing_happened(lab: &Lab, load: Load) -> Result<()> {
    let records = load.stop()?;
    let primary = lab.primary.address().to_string();
    let wrong = records.iter().filter(|record| record.outcome.pod() != Some(primary.as_str())).count();
    ensure!(wrong == 0 && records.len() > 100, "{:?}\n{}", summary(&records), lab.agent.log());
    let transitions: Vec<_> =
        lab.agent.events()?.into_iter().filter(|event| event.kind == EventType::Transition).collect();
    ensure!(transitions.is_empty(), "{transitions:?}");
    Ok(())
}

/// Waits until the agent has made probes since the call.
fn some_probes(lab: &Lab) -> Result<()> {
    let seen =
        || lab.agent.service(SERVICE).ok().map(|service| (service.local_errors, service.tiers[0].backends[0].clone()));
    let before = seen().map(|(_, backend)| backend.check_millis);
    wait_for("another probe", LONG, || {
        seen().is_some_and(|(_, backend)| Some(backend.check_millis) != before && backend.local_errors.is_none())
    })
}

/// HARDENING L1: the reader of the log is gone when the primary fails, which is when the agent has something to write.
#[test]
fn l1_a_closed_log_pipe_does_not_end_the_agent() -> Result<()> {
    let mut lab = Lab::with(Checks::Fast, "")?;
    let (reader, writer) = pipe().context("make a pipe")?;
    lab.agent.log_to(Stdio::from(writer));
    lab.agent.start()?;
    wait_all_up(&lab)?;
    let pid = lab.agent.pid()?;
    drop(reader);
    for _ in 0..3 {
        lab.primary.inject(Fault::Kill)?;
        lab.agent.wait_state(SERVICE, BreakerState::Open, LONG)?;
        lab.primary.heal(Fault::Kill)?;
        lab.agent.wait_state(SERVICE, BreakerState::Closed, LONG)?;
    }
    let status = lab.agent.status()?;
    assert_eq!((status.pid, status.running, status.panics), (pid, true, 0));
    wait_for("the lost lines to be counted", LONG, || lab.agent.status().is_ok_and(|s| s.lost_log_lines > 3))?;
    let shown = text(&lab.agent.cli(&["status"])?.stdout);
    assert!(shown.contains("lines of the agent's log are lost"), "{shown}");
    Ok(())
}

/// HARDENING L1: the log is on a full disk. The agent starts, and does its work.
#[test]
fn l1_a_full_disk_does_not_end_the_agent() -> Result<()> {
    let mut lab = Lab::with(Checks::Fast, "")?;
    lab.agent.log_to(File::options().write(true).open("/dev/full").context("open /dev/full")?.into());
    lab.agent.start()?;
    wait_all_up(&lab)?;
    lab.primary.inject(Fault::Kill)?;
    lab.agent.wait_state(SERVICE, BreakerState::Open, LONG)?;
    lab.agent.stop()
}

/// HARDENING L1: nobody reads the log, and the pipe is full. The loop does not wait for it.
#[test]
fn l1_a_log_that_nobody_reads_does_not_stop_the_agent() -> Result<()> {
    let mut lab = Lab::with(Checks::Fast, "")?;
    let (reader, writer) = pipe().context("make a pipe")?;
    rustix::pipe::fcntl_setpipe_size(&writer, 4096).context("make the pipe small")?;
    lab.agent.log_to(Stdio::from(writer));
    lab.agent.start()?;
    wait_all_up(&lab)?;
    for _ in 0..10 {
        lab.primary.inject(Fault::Kill)?;
        lab.agent.wait_state(SERVICE, BreakerState::Open, LONG)?;
        lab.primary.heal(Fault::Kill)?;
        lab.agent.wait_state(SERVICE, BreakerState::Closed, LONG)?;
    }
    drop(reader);
    Ok(())
}

/// HARDENING L1: commands whose output nobody reads, or that cannot be written.
#[test]
fn l1_the_command_line_ends_quietly_on_a_closed_pipe() -> Result<()> {
    let lab = start_healthy_lab("")?;
    let breaker = binary("breaker")?;
    let run = |line: &str| -> Result<(i32, String)> {
        let script = line
            .replace("BREAKER", &breaker.display().to_string())
            .replace("SOCKET", &lab.agent.socket().display().to_string())
            .replace("CONFIG", &lab.agent.config().display().to_string());
        let output = Command::new("bash").args(["-c", &script]).output().context("run bash")?;
        Ok((output.status.code().unwrap_or(-1), text(&output.stderr)))
    };
    for command in
        ["BREAKER status --socket SOCKET", "BREAKER agent --config CONFIG --check", "BREAKER completions bash"]
    {
        let (code, errors) = run(&format!("{command} | true; exit ${{PIPESTATUS[0]}}"))?;
        assert_eq!((code, errors.as_str()), (0, ""), "{command} | true");
        let (code, errors) = run(&format!("{command} > /dev/full"))?;
        assert!(code == 1 && errors.contains("write to standard output: No space left"), "{command}: {code} {errors}");
    }
    assert_eq!(run("BREAKER agent --config /nonexistent --check 2> /dev/full")?.0, 2);
    assert_eq!(run("BREAKER status --socket /nonexistent --pin-path /nonexistent 2> /dev/full")?.0, 1);
    Ok(())
}

/// TRIALS G1: from the moment at which the agent listens for signals, early in its start, SIGHUP does not end it.
#[test]
fn g1_sighup_while_the_agent_starts() -> Result<()> {
    let mut lab = Lab::with(Checks::Fast, "")?;
    // Many services make the start long.
    let mut services = lab.services(Checks::Fast, "");
    for n in 0..2000_u32 {
        let (a, b) = (n / 250, n % 250);
        services.push_str(&format!(
            "  - {{name: more-{n}, frontends: [{{address: 10.44.{a}.{b}, port: 80}}], primary: {{backends: []}}, \
             backups: [{{backends: [{{address: 10.42.9.9, port: 80}}]}}]}}\n"
        ));
    }
    lab.agent.write_config("  maxServices: 4096\n", &services)?;
    lab.agent.start_then(&[], |pid| {
        let catches = || {
            let status = fs::read_to_string(format!("/proc/{pid}/status")).unwrap_or_default();
            let caught = status.lines().find_map(|line| line.strip_prefix("SigCgt:"));
            caught.and_then(|mask| u64::from_str_radix(mask.trim(), 16).ok()).is_some_and(|mask| mask & 1 == 1)
        };
        wait_for("the agent to listen for SIGHUP", LONG, catches)?;
        // The rest of the start takes longer than these signals.
        for _ in 0..50 {
            let id = i32::try_from(pid).ok().and_then(rustix::process::Pid::from_raw).context("a process id")?;
            rustix::process::kill_process(id, Signal::HUP).context("send SIGHUP")?;
            std::thread::sleep(Duration::from_millis(2));
        }
        Ok(())
    })?;
    let reloaded = |event: &breaker_api::events::EventLine| event.kind == EventType::Config;
    wait_for("the signals to be heard", LONG, || lab.agent.events().is_ok_and(|events| events.iter().any(reloaded)))
}

/// HARDENING L3: a stopped process, as a paused machine is to it. Its probes wait for an answer that has come.
#[test]
fn l3_a_paused_agent_trips_nothing() -> Result<()> {
    let lab = start_healthy_lab("")?;
    let load = lab.load(Plan::usual(lab.vip))?;
    for pause in [2000, 2000, 500, 20_000, 50, 300] {
        lab.agent.signal(Signal::STOP)?;
        std::thread::sleep(Duration::from_millis(pause));
        lab.agent.signal(Signal::CONT)?;
        some_probes(&lab)?;
    }
    nothing_happened(&lab, load)
}

/// HARDENING L3, at the length of a machine's suspension. It takes ten minutes:
/// `cargo test -p breaker-tests --test lab -- --ignored l3`.
#[test]
#[ignore = "it takes ten minutes"]
fn l3_a_pause_of_ten_minutes_trips_nothing() -> Result<()> {
    let lab = start_healthy_lab("    onAgentLoss: Hold\n")?;
    lab.agent.signal(Signal::STOP)?;
    std::thread::sleep(Duration::from_secs(600));
    let load = lab.load(Plan::usual(lab.vip))?;
    lab.agent.signal(Signal::CONT)?;
    some_probes(&lab)?;
    std::thread::sleep(Duration::from_secs(2));
    nothing_happened(&lab, load)
}

/// HARDENING L6: the status of an agent that does not answer comes from the maps.
#[test]
fn l6_the_status_of_a_hung_agent_is_in_the_maps() -> Result<()> {
    let lab = start_healthy_lab("")?;
    lab.agent.signal(Signal::STOP)?;
    let output = lab.agent.cli(&["status"]);
    lab.agent.signal(Signal::CONT)?;
    let output = output?;
    let shown = text(&output.stdout);
    let pid = lab.agent.pid()?;
    assert!(output.status.success() && shown.contains(&format!("the agent (pid {pid}) does not answer")), "{shown}");
    assert!(shown.contains(SERVICE) && shown.contains("Closed"), "{shown}");
    Ok(())
}

/// Changes the limit of descriptors of the running agent.
fn limit_descriptors(agent: &Agent, number: usize) -> Result<()> {
    let pid = agent.pid()?;
    let output = Command::new("prlimit").args([format!("--pid={pid}"), format!("--nofile={number}:")]).output()?;
    ensure!(output.status.success(), "{}", text(&output.stderr));
    Ok(())
}

/// HARDENING L2: no descriptor is free.
#[test]
fn l2_without_descriptors_no_probe_has_a_result() -> Result<()> {
    let lab = start_healthy_lab("")?;
    let load = lab.load(Plan::usual(lab.vip))?;
    // Every descriptor below this one is in use.
    limit_descriptors(&lab.agent, 8)?;
    std::thread::sleep(Duration::from_secs(3));
    limit_descriptors(&lab.agent, 1024)?;
    some_probes(&lab)?;
    let status = lab.agent.service(SERVICE)?;
    assert!(status.local_errors > 5, "{}", status.local_errors);
    nothing_happened(&lab, load)
}

/// HARDENING L2: every local port is taken (here: the range has one, and it is in use).
#[test]
fn l2_without_local_ports_no_probe_has_a_result() -> Result<()> {
    let lab = start_healthy_lab("")?;
    let node = lab.world.node(0).ns();
    let load = lab.load(Plan::usual(lab.vip))?;
    let before = lab.agent.service(SERVICE)?.local_errors;
    // A socket that is bound to the only port takes it from every connection.
    let holder = node.enter(|| std::net::TcpListener::bind((Ipv4Addr::UNSPECIFIED, 40_001)))??;
    node.sysctl(&["net.ipv4.ip_local_port_range=40001 40001"])?;
    wait_for("probes without a port", LONG, || {
        lab.agent.service(SERVICE).is_ok_and(|service| service.local_errors > before + 10)
    })?;
    let shown = text(&lab.agent.cli(&["status"])?.stdout);
    assert!(shown.contains("LocalError") && shown.contains("Cannot assign requested address"), "{shown}");
    node.sysctl(&["net.ipv4.ip_local_port_range=32768 60999"])?;
    drop(holder);
    some_probes(&lab)?;
    nothing_happened(&lab, load)
}

/// HARDENING L4: TCP connects a socket to itself, where its own port is the one that it asks for.
#[test]
fn l4_a_connection_to_itself_is_a_failure() -> Result<()> {
    let mut lab = Lab::with(Checks::Fast, "")?;
    let node = lab.world.node(0);
    node.ns().sysctl(&["net.ipv4.ip_local_port_range=40001 40001"])?;
    let at = SocketAddrV4::new(node.address(), 40_001);
    let service = |name: &str, vip: &str, check: &str| {
        format!(
            "  - {{name: {name}, frontends: [{{address: {vip}, port: 80}}], backups: [{{backends: [{{address: \
             10.42.9.9, port: 80}}]}}], primary: {{backends: [{{address: {}, port: {}}}], check: {{tcpSocket: \
             {check}, periodMillis: 50}}}}}}\n",
            at.ip(),
            at.port()
        )
    };
    let services = [service("plain", "10.43.7.1", "{}"), service("accept", "10.43.7.2", "{accept: true}")].concat();
    lab.agent.write_config("", &format!("services:\n{services}"))?;
    lab.agent.start()?;
    for name in ["plain", "accept"] {
        let detail = || lab.agent.service(name).ok()?.tiers[0].backends[0].detail.clone();
        wait_for("a connection to itself", LONG, || detail().is_some_and(|detail| detail.contains("itself")))?;
    }
    Ok(())
}

/// HARDENING L2: more backends that answer nothing than the agent has descriptors. A healthy service keeps its turn.
#[test]
fn l2_more_probes_than_the_node_can_make() -> Result<()> {
    let mut lab = Lab::with(Checks::Fast, "")?;
    let dead: Vec<String> =
        (0..250).map(|n| format!("{{address: 10.42.0.{}, port: {}}}", 200 + n % 50, 80 + n / 50)).collect();
    let services = format!(
        "{}  - {{name: dead, frontends: [{{address: 10.43.7.1, port: 80}}], backups: [{{backends: [{{address: 10.42.9.9, \
         port: 80}}]}}], primary: {{backends: [{}], check: {{tcpSocket: {{}}, periodMillis: 100, timeoutMillis: 300}}}}}}\n",
        lab.services(Checks::Fast, ""),
        dead.join(", ")
    );
    lab.agent.write_config("", &services)?;
    // Without CAP_SYS_RESOURCE the agent cannot raise its limit.
    lab.agent.launch_by(&[
        "setpriv",
        "--bounding-set",
        "-sys_resource",
        "--inh-caps",
        "-sys_resource",
        "prlimit",
        "--nofile=192:192",
    ]);
    lab.agent.start()?;
    let load = lab.load(Plan::usual(lab.vip))?;
    wait_for("probes to wait for their turn", LONG, || {
        lab.agent
            .status()
            .is_ok_and(|status| status.probes.is_some_and(|probes| probes.waiting > 0 && probes.late > 50))
    })?;
    let shown = text(&lab.agent.cli(&["status"])?.stdout);
    assert!(shown.contains("checks wait for their turn"), "{shown}");
    some_probes(&lab)?;
    let records = load.stop()?;
    let primary = lab.primary.address().to_string();
    assert!(records.iter().all(|record| record.outcome.pod() == Some(primary.as_str())), "{:?}", summary(&records));
    assert_eq!(lab.agent.service(SERVICE)?.state, BreakerState::Closed);
    Ok(())
}

/// A memory cgroup for the agent. Dropping it moves the agent out and removes it.
struct MemoryCgroup {
    dir: PathBuf,
    limit: &'static str,
    usage: &'static str,
}

impl MemoryCgroup {
    /// Moves a process into a new cgroup; `None` if this machine has no memory controller to give.
    fn of(pid: u32) -> Option<Self> {
        let (v1, v2) = (Path::new("/sys/fs/cgroup/memory"), Path::new("/sys/fs/cgroup"));
        let name = format!("breaker-test-{pid}");
        let this = if v1.is_dir() {
            Self { dir: v1.join(name), limit: "memory.limit_in_bytes", usage: "memory.usage_in_bytes" }
        } else {
            fs::write(v2.join("cgroup.subtree_control"), "+memory").ok()?;
            Self { dir: v2.join(name), limit: "memory.max", usage: "memory.current" }
        };
        fs::create_dir(&this.dir).ok()?;
        fs::write(this.dir.join("cgroup.procs"), pid.to_string()).ok()?;
        Some(this)
    }

    /// Leaves the process 1 MiB more than it uses.
    fn tighten(&self) -> Result<()> {
        let usage: u64 = fs::read_to_string(self.dir.join(self.usage))?.trim().parse()?;
        self.set((usage + (1 << 20)).to_string())
    }

    fn set(&self, limit: String) -> Result<()> {
        fs::write(self.dir.join(self.limit), limit).context("set the limit of a memory cgroup")
    }

    fn loosen(&self) -> Result<()> {
        self.set("9000000000".into())
    }
}

impl Drop for MemoryCgroup {
    fn drop(&mut self) {
        let parent = self.dir.parent().unwrap_or(Path::new("/"));
        for pid in fs::read_to_string(self.dir.join("cgroup.procs")).unwrap_or_default().lines() {
            let _ = fs::write(parent.join("cgroup.procs"), pid);
        }
        let _ = fs::remove_dir(&self.dir);
    }
}

/// Runs a command in the agent's mount namespace, which the agent has for itself.
fn in_mounts_of(agent: &Agent, command: &[&str]) -> Result<()> {
    let output =
        Command::new("nsenter").args(["--mount", "--target", &agent.pid()?.to_string()]).args(command).output()?;
    ensure!(output.status.success(), "{command:?}: {}", text(&output.stderr));
    Ok(())
}

/// One small fault of the agent's surroundings, for some milliseconds.
fn small_fault(agent: &Agent, lab: &Lab, memory: Option<&MemoryCgroup>, number: u32) -> Result<()> {
    let pause = || std::thread::sleep(Duration::from_millis(60));
    let node = lab.world.node(0).ns();
    match number % 10 {
        0 => {
            agent.signal(Signal::STOP)?;
            pause();
            agent.signal(Signal::CONT)
        }
        1 => {
            limit_descriptors(agent, 8)?;
            pause();
            limit_descriptors(agent, 4096)
        }
        2 => {
            node.sysctl(&["net.ipv4.ip_local_port_range=40001 40001"])?;
            pause();
            node.sysctl(&["net.ipv4.ip_local_port_range=32768 60999"])
        }
        3 => {
            let (one, other) = (format!("veth{number}"), format!("peer{number}"));
            node.ip(&["link", "add", &one, "type", "veth", "peer", "name", &other])?;
            pause();
            node.ip(&["link", "del", &one])
        }
        4 => agent.signal(Signal::HUP),
        5 => {
            // A client of the control socket that says nothing, and one that goes in the middle.
            let silent = std::os::unix::net::UnixStream::connect(agent.socket())?;
            let half = std::os::unix::net::UnixStream::connect(agent.socket())?;
            std::io::Write::write_all(&mut &half, b"GET /v1/status HTTP/1.1\r\nHo")?;
            pause();
            drop((silent, half));
            Ok(())
        }
        6 => {
            if let Some(memory) = memory {
                memory.tighten()?;
                pause();
                memory.loosen()?;
            }
            Ok(())
        }
        7 => {
            in_mounts_of(agent, &["mount", "--bind", "/dev/null", "/etc/resolv.conf"])?;
            pause();
            in_mounts_of(agent, &["umount", "/etc/resolv.conf"])
        }
        8 => {
            in_mounts_of(agent, &["mount", "-o", "remount,bind,ro", "/proc"])?;
            in_mounts_of(agent, &["mount", "-o", "remount,bind,ro", "/sys"])?;
            pause();
            in_mounts_of(agent, &["mount", "-o", "remount,bind,rw", "/sys"])?;
            in_mounts_of(agent, &["mount", "-o", "remount,bind,rw", "/proc"])
        }
        _ => {
            // The pins are out of reach; the programs and maps stay in use.
            let pins = lab.world.bpffs().display().to_string();
            in_mounts_of(agent, &["mount", "-t", "tmpfs", "none", &pins])?;
            pause();
            in_mounts_of(agent, &["umount", &pins])
        }
    }
}

/// 300 small faults under load: no healthy service opens, and no request fails.
#[test]
fn three_hundred_small_faults() -> Result<()> {
    let mut lab = Lab::with(Checks::Fast, "")?;
    // The agent has mounts of its own, and its log goes to a reader that leaves in the middle.
    lab.agent.launch_by(&["unshare", "--mount", "--propagation", "private"]);
    let (reader, writer) = pipe().context("make a pipe")?;
    lab.agent.log_to(Stdio::from(writer));
    lab.agent.start()?;
    wait_all_up(&lab)?;
    let memory = MemoryCgroup::of(lab.agent.pid()?);
    let mut reader = Some(reader);
    let load = lab.load(Plan::usual(lab.vip))?;
    for number in 0..300 {
        small_fault(&lab.agent, &lab, memory.as_ref(), number).with_context(|| format!("fault {number}"))?;
        if number == 150 {
            reader.take();
        }
    }
    some_probes(&lab)?;
    let status = lab.agent.status()?;
    assert_eq!((status.panics, status.lost_log_lines > 0), (0, true));
    nothing_happened(&lab, load)
}

/// HARDENING L7: what others take away comes back, and the status says that it was gone.
#[test]
fn l7_what_others_take_away_comes_back() -> Result<()> {
    let lab = start_healthy_lab("")?;
    let node = lab.world.node(0).ns();
    let interface = lab.agent.status()?.datapath.interfaces.first().context("an interface")?.clone();
    let links: Vec<_> = fs::read_dir(lab.agent.pinned("links"))?.flatten().map(|entry| entry.path()).collect();
    let tc =
        |path: &std::path::Path| path.to_string_lossy().ends_with("_in") || path.to_string_lossy().ends_with("_out");
    let socket = |path: &std::path::Path| path.to_string_lossy().contains("breaker_");
    let gone: Vec<_> = links.iter().filter(|path| tc(path) || socket(path)).collect();
    ensure!(gone.iter().any(|path| tc(path)) && gone.iter().any(|path| socket(path)), "{links:?}");
    for path in &gone {
        fs::remove_file(path).with_context(|| format!("remove {}", path.display()))?;
    }
    node.output("nft", &["flush", "ruleset"]).context("flush all rules")?;
    wait_for("all of it to be back", LONG, || gone.iter().all(|path| path.exists()))?;
    wait_for("the status to say so", LONG, || {
        lab.agent.status().is_ok_and(|status| {
            let restored = |name: &str| status.datapath.restored.get(name).is_some_and(|restored| restored.count == 1);
            restored(&interface) && restored("masqueradeRule") && restored("nodeSockets")
        })
    })?;
    let rules = node.output("nft", &["list", "table", "inet", "breaker"])?;
    assert!(rules.contains("masquerade"), "{rules}");
    let shown = text(&lab.agent.cli(&["status"])?.stdout);
    assert!(shown.contains("taken away by others and put back"), "{shown}");
    assert!(lab.agent.events()?.iter().any(|event| event.kind == EventType::Restored));
    Ok(())
}

/// TRIALS C6: another file system is mounted over the pins. A new pod gets its programs all the same, and they are pinned
/// once the pins are back.
#[test]
fn c6_hidden_pins_do_not_keep_pods_from_their_programs() -> Result<()> {
    let mut lab = Lab::with(Checks::Fast, "    override: ForceOpen\n")?;
    lab.agent.launch_by(&["unshare", "--mount", "--propagation", "private"]);
    lab.agent.start()?;
    wait_all_up(&lab)?;
    let pins = lab.world.bpffs().display().to_string();
    in_mounts_of(&lab.agent, &["mount", "-t", "tmpfs", "none", &pins])?;
    let late = lab.world.node_mut(0).add_pod("late")?;
    let backup = lab.backup.address().to_string();
    let asks = |lab: &Lab| ask_once(&late.ns, lab.vip).is_ok_and(|answer| answer.pod() == Some(backup.as_str()));
    wait_for("the late pod to be protected", LONG, || asks(&lab))?;
    wait_for("the status to say so", LONG, || {
        lab.agent.status().is_ok_and(|s| s.datapath.notes.iter().any(|note| note.contains(&late.veth)))
    })?;
    in_mounts_of(&lab.agent, &["umount", &pins])?;
    let node = lab.world.node(0).ns();
    let index = node.output("ip", &["-o", "link", "show", "dev", &late.veth])?;
    let index = index.split(':').next().context("no index")?.trim().to_owned();
    wait_for("the links to be pinned", LONG, || lab.agent.pinned("links").join(format!("{index}_in")).exists())?;
    wait_for("the status to be clean", LONG, || lab.agent.status().is_ok_and(|s| s.datapath.notes.is_empty()))?;
    lab.agent.kill()?;
    assert!(asks(&lab), "the programs outlive the agent");
    Ok(())
}
