//! Limits on real connections: compared with nftables and HAProxy, across the agent's death, and after clients
//! vanished.

use breaker_common::BreakerState;
use std::{
    io::{Read as _, Write as _},
    net::{SocketAddr, SocketAddrV4, TcpStream},
    process::{Command, Stdio},
    thread::sleep,
    time::{Duration, Instant},
};

use anyhow::{Context as _, Result, ensure};
use breaker_api::limits::LimitsStatus;
use breaker_tests::{
    lab::{
        client::Plan,
        netns::{self, NetNs},
        stage::{Checks, Lab, SERVICE},
        wait_for,
    },
    process::KilledOnDrop,
};

use crate::{LONG, start_healthy_lab, wait_all_up};

/// Connects from a network namespace, `times` times in sequence. Returns the connections that were not refused.
fn connect(from: &NetNs, target: SocketAddrV4, times: usize) -> Result<Vec<TcpStream>> {
    from.enter(move || {
        let connect = |_| TcpStream::connect_timeout(&SocketAddr::V4(target), Duration::from_secs(5)).ok();
        (0..times).filter_map(connect).collect()
    })
}

fn limits(lab: &Lab) -> Result<LimitsStatus> {
    lab.agent.service(SERVICE)?.limits.context("the service has no limits")
}

/// Counted connections to the primary; `u32::MAX` if the agent does not report them.
fn counted(lab: &Lab) -> u32 {
    limits(lab).map_or(u32::MAX, |limits| limits.primary.concurrent)
}

/// How many connections a limiter admits, from a full bucket: of a hundred in a row, of the hundred that follow 0.35
/// s later, and of a steady stream for three seconds.
#[derive(Clone, Copy, Debug)]
struct Admitted {
    at_once: usize,
    later: usize,
    steadily: usize,
}

fn hundred_clients(from: &NetNs, target: SocketAddrV4) -> Result<Admitted> {
    // A proxy accepts a connection before it refuses it: only a response shows that the connection was admitted.
    let answered = move |_: &usize| -> bool {
        let ask = || -> std::io::Result<usize> {
            let mut stream = TcpStream::connect_timeout(&SocketAddr::V4(target), Duration::from_secs(5))?;
            stream.set_read_timeout(Some(Duration::from_secs(5)))?;
            write!(stream, "GET / HTTP/1.1\r\nHost: lab\r\nConnection: close\r\n\r\n")?;
            stream.read(&mut [0; 512])
        };
        ask().is_ok_and(|bytes| bytes > 0)
    };
    from.enter(move || {
        let at_once = (0..100).filter(answered).count();
        sleep(Duration::from_millis(350));
        let later = (0..100).filter(answered).count();
        sleep(Duration::from_millis(1500));
        let (started, mut steadily) = (Instant::now(), 0);
        while started.elapsed() < Duration::from_secs(3) {
            steadily += usize::from(answered(&0));
            sleep(Duration::from_millis(10));
        }
        Admitted { at_once, later, steadily }
    })
}

/// HAProxy in the backup's pod, with the common recipe for a rate limit.
fn haproxy(lab: &Lab) -> Result<(KilledOnDrop, SocketAddrV4)> {
    let address = SocketAddrV4::new(lab.backup.pod.address, 8081);
    let config = lab.world.dir().join("limits.cfg");
    let text = format!(
        "global\n  maxconn 1000\ndefaults\n  mode tcp\n  timeout connect 1s\n  timeout client 60s\n  timeout server 60s\n\
         listen limited\n  bind :8081\n  stick-table type ip size 1k expire 30s store conn_rate(1s)\n  \
         tcp-request connection track-sc0 src\n  tcp-request connection reject if {{ sc0_conn_rate gt 10 }}\n  \
         server dummy {}\n",
        lab.backup.address()
    );
    std::fs::write(&config, text).context("write limits.cfg")?;
    let mut command = lab.backup.pod.ns.command("haproxy");
    let child = command.arg("-f").arg(&config).stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::null()).spawn();
    let child = KilledOnDrop(child.context("start haproxy")?);
    let listens = || lab.backup.pod.ns.output("ss", &["-Htln", "sport", "=", ":8081"]).is_ok_and(|out| !out.is_empty());
    wait_for("haproxy to listen", LONG, listens)?;
    Ok((child, address))
}

/// Adds an nftables rule to the backup's pod, which limits new connections to port 80.
fn nftables(lab: &Lab) -> Result<()> {
    let rules = "table inet limited {\n  chain input {\n    type filter hook input priority 0;\n    \
                 tcp dport 80 ct state new limit rate over 10/second burst 5 packets reject with tcp reset\n  }\n}\n";
    let file = lab.world.dir().join("limited.nft");
    std::fs::write(&file, rules).context("write limited.nft")?;
    netns::run(lab.backup.pod.ns.command("nft").arg("-f").arg(&file))
}

/// Checks the table of other limiters in docs/LIMITS.md: rate and burst mean the same to breaker as to nftables, and
/// HAProxy's recipe locks out a client that keeps trying.
#[test]
fn a_hundred_clients_at_once_beside_nftables_and_haproxy() -> Result<()> {
    // The agent is stopped before nftables is measured: the rule would count probes too.
    let mut lab = Lab::with(Checks::Default, "    limits: {newConnectionsPerSecond: 10, burst: 5}\n")?;
    lab.agent.start()?;
    wait_all_up(&lab)?;
    let ours = hundred_clients(&lab.client.ns, lab.vip)?;
    let shown = limits(&lab)?;
    lab.agent.stop()?;
    netns::run(
        Command::new(breaker_tests::lab::binary("breaker")?).arg("cleanup").arg("--pin-path").arg(lab.agent.pin_path()),
    )?;
    let (_proxy, proxy) = haproxy(&lab)?;
    let haproxy = hundred_clients(&lab.client.ns, proxy)?;
    nftables(&lab)?;
    let nftables = hundred_clients(&lab.client.ns, lab.backup.address())?;
    let all = format!("breaker {ours:?}, nftables {nftables:?}, HAProxy {haproxy:?}");
    eprintln!("{all}");
    // A hundred refusals take milliseconds, on a slow machine tens of them; a token may come back meanwhile.
    let near = |ours: usize, theirs: usize, by: usize| ours.abs_diff(theirs) <= by;
    ensure!((5..=7).contains(&ours.at_once) && near(ours.at_once, nftables.at_once, 2), "{all}");
    ensure!((3..=5).contains(&ours.later) && near(ours.later, nftables.later, 2), "{all}");
    ensure!((33..=36).contains(&ours.steadily) && near(ours.steadily, nftables.steadily, 2), "{all}");
    ensure!(haproxy.steadily < ours.steadily / 2, "HAProxy locks out a client that keeps trying: {all}");
    let refused = shown.primary.limited.get("newConnectionsPerSecond").copied().unwrap_or_default();
    ensure!(refused > 180, "{shown:?}");
    let client = &shown.limited_clients[0];
    assert_eq!(client.client, Some(lab.client.address.to_string()));
    ensure!(client.refused <= refused && client.refused >= refused / 2, "{shown:?}");
    Ok(())
}

/// A backup that fails above 500 connections per second gets no more than that, of 2,000 per second in a failover.
#[test]
fn a_failover_does_not_topple_the_backup() -> Result<()> {
    const RATE: u32 = 500;
    const BURST: u32 = 50;
    let lab =
        start_healthy_lab(&format!("    limits: {{backup: {{newConnectionsPerSecond: {RATE}, burst: {BURST}}}}}\n"))?;
    let plan = Plan { target: lab.vip, per_second: 2000, keep_alive: 0, limit: Duration::from_secs(5) };
    let load = lab.load(plan)?;
    load.wait("the primary to answer", LONG, |records| records.len() > 500)?;
    let output = lab.agent.cli(&["trip", SERVICE])?;
    ensure!(output.status.success(), "{output:?}");
    sleep(Duration::from_secs(4));
    let records = load.stop()?;
    let backup = lab.backup.address().to_string();
    let admitted: Vec<Instant> =
        records.iter().filter(|record| record.outcome.pod() == Some(&backup)).map(|record| record.at).collect();
    let (first, last) = (admitted[0], *admitted.last().context("the backup got no connection")?);
    let took = last.duration_since(first).as_secs_f64();
    let allowed = f64::from(RATE) * took + f64::from(BURST);
    let asked = records.iter().filter(|record| record.at >= first && record.at <= last).count();
    let limited = limits(&lab)?;
    let all = format!("{} of {asked} in {took:.2} s, allowed {allowed:.0}: {limited:?}", admitted.len());
    eprintln!("{all}");
    #[expect(clippy::cast_precision_loss, reason = "thousands")]
    let (admitted_count, asked) = (admitted.len() as f64, asked as f64);
    // 2 % tolerance: a connection is admitted some time after its client started.
    ensure!(admitted_count <= allowed * 1.02, "{all}");
    // The lower bound holds only if the machine was fast enough to send more connections than the limit admits.
    ensure!(asked < 1.5 * allowed || admitted_count >= allowed * 0.95, "{all}");
    ensure!(limited.backup.limited.contains_key("newConnectionsPerSecond"), "{all}");
    ensure!(limited.primary.limited.is_empty(), "{all}");
    Ok(())
}

/// The programs keep counting while no agent runs, and the next agent adopts the counts.
#[test]
fn the_count_is_right_after_kill_9() -> Result<()> {
    let mut lab = start_healthy_lab("    limits: {concurrentConnections: 5}\n")?;
    let mut held = connect(&lab.client.ns, lab.vip, 7)?;
    assert_eq!((held.len(), counted(&lab)), (5, 5));
    lab.agent.kill()?;
    held.truncate(2);
    // The server closes its end once it has read the client's FIN.
    let freed =
        || connect(&lab.client.ns, lab.vip, 1).is_ok_and(|mut more| more.pop().map(|one| held.push(one)).is_some());
    let mut freed = freed;
    for _ in 0..3 {
        wait_for("a connection to be counted down without an agent", LONG, &mut freed)?;
    }
    assert!(connect(&lab.client.ns, lab.vip, 2)?.is_empty(), "the limit is five");
    lab.agent.start()?;
    wait_all_up(&lab)?;
    assert_eq!(counted(&lab), 5);
    drop(held);
    wait_for("all to be closed", LONG, || counted(&lab) == 0)?;
    Ok(())
}

/// Connections of clients that vanish without FIN or RST count until `idleSeconds` have passed; one in use keeps
/// counting.
#[test]
fn clients_that_vanish_are_taken_out_and_others_stay() -> Result<()> {
    let mut lab = start_healthy_lab("    limits: {concurrentConnections: 5, idleSeconds: 5}\n")?;
    let other = lab.world.node_mut(0).add_pod("other")?;
    let lost = connect(&lab.client.ns, lab.vip, 4)?;
    let mut used = connect(&other.ns, lab.vip, 1)?.pop().context("the fifth connection")?;
    assert_eq!((lost.len(), counted(&lab)), (4, 5));
    // No packet leaves that pod any more, not even the FINs of its sockets.
    lab.client.ns.ip(&["link", "set", "eth0", "down"])?;
    drop(lost);
    assert!(connect(&other.ns, lab.vip, 1)?.is_empty(), "vanished clients still count");
    let mut ask = || -> Result<()> {
        write!(used, "GET / HTTP/1.1\r\nHost: lab\r\n\r\n")?;
        let mut answer = [0; 512];
        ensure!(used.read(&mut answer)? > 0, "the connection that is in use has ended");
        Ok(())
    };
    wait_for("the vanished ones to be counted down", LONG + LONG, || ask().is_ok() && counted(&lab) == 1)?;
    ask()?;
    assert_eq!(connect(&other.ns, lab.vip, 6)?.len(), 4, "four more, beside the one in use");
    Ok(())
}

/// Processes of the node and external clients are limited as pods are.
#[test]
fn all_kinds_of_clients_are_limited() -> Result<()> {
    let mut lab = Lab::new(Checks::Fast)?;
    let services =
        lab.services(Checks::Fast, "    limits: {concurrentConnections: 3, perClient: {concurrentConnections: 2}}\n");
    lab.agent.write_config("  uplinks: true\n", &services)?;
    let (lan, node) = (lab.world.lan(), lab.world.node(0));
    lan.ip(&["route", "add", breaker_tests::lab::kubeproxy::VIPS, "via", &node.address().to_string()])?;
    lab.agent.start()?;
    wait_all_up(&lab)?;
    let (lan, node) = (lab.world.lan().clone(), lab.world.node(0).ns().clone());
    for (who, from) in [("outside", &lan), ("node", &node), ("pod", &lab.client.ns)] {
        let held = connect(from, lab.vip, 4)?;
        assert_eq!((held.len(), counted(&lab)), (2, 2), "{who}: the client's own limit");
        drop(held);
        wait_for(&format!("{who}: its connections to be closed"), LONG, || counted(&lab) == 0)?;
    }
    // The service's limit, for all clients together.
    let held = (connect(&lan, lab.vip, 2)?, connect(&node, lab.vip, 2)?, connect(&lab.client.ns, lab.vip, 2)?);
    assert_eq!((held.0.len(), held.1.len(), held.2.len()), (2, 1, 0));
    let shown = limits(&lab)?;
    assert!(shown.primary.limited.contains_key("concurrentConnections"), "{shown:?}");
    assert!(shown.limited_clients.iter().any(|client| client.client.is_none()), "the node itself: {shown:?}");
    // The kernel closes the sockets of a killed process.
    drop(held);
    let vip = lab.vip.to_string();
    let (host, port) = vip.split_once(':').context("a port")?;
    let script = format!("exec 3<>/dev/tcp/{host}/{port}; read -r forever <&3");
    let mut child = node.command("bash").args(["-c", &script]).spawn().context("start bash")?;
    wait_for("the process to be connected", LONG, || counted(&lab) == 1)?;
    child.kill()?;
    child.wait()?;
    wait_for("its connection to be counted down", LONG, || counted(&lab) == 0)
}

/// While the breaker is closed, connections over the primary's limit go to the backup. When they have ended, no flow
/// is left.
#[test]
fn a_primary_at_its_limit_overflows_to_the_backup() -> Result<()> {
    let lab = start_healthy_lab("    limits: {concurrentConnections: 2, onLimit: Failover}\n")?;
    let (primary, backup) = (lab.primary.address().to_string(), lab.backup.address().to_string());
    let held = connect(&lab.client.ns, lab.vip, 2)?;
    let overflowed = connect(&lab.client.ns, lab.vip, 1)?;
    assert_eq!((held.len(), overflowed.len()), (2, 1));
    let answered = |mut stream: &TcpStream| -> Result<String> {
        stream.set_read_timeout(Some(Duration::from_secs(5)))?;
        write!(stream, "GET / HTTP/1.1\r\nHost: lab\r\n\r\n")?;
        let mut answer = [0; 512];
        let length = stream.read(&mut answer)?;
        Ok(String::from_utf8_lossy(&answer[..length]).into_owned())
    };
    for _ in 0..3 {
        for stream in &held {
            assert!(answered(stream)?.contains(&primary));
        }
        assert!(answered(&overflowed[0])?.contains(&backup));
        // All rounds together take longer than two sweeps: the connection must not notice that the agent starts to
        // track it.
        sleep(Duration::from_millis(1500));
    }
    let service = lab.agent.service(SERVICE)?;
    assert_eq!((service.state, service.flows), (BreakerState::Closed, 1));
    assert_eq!(limits(&lab)?.failed_over, 1);
    drop((held, overflowed));
    wait_for("all to be closed", LONG, || {
        let flows = lab.agent.service(SERVICE).map_or(usize::MAX, |service| service.flows);
        counted(&lab) == 0 && flows == 0
    })?;
    assert!(lab.ask()?.pod() == Some(&primary));
    Ok(())
}
