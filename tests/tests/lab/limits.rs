//! Limits, as clients feel them: real connections, beside nftables and HAProxy, over the agent's death, and after clients that
//! vanish.

use std::{
    io::{Read as _, Write as _},
    net::{SocketAddr, SocketAddrV4, TcpStream},
    process::{Child, Command, Stdio},
    thread::sleep,
    time::{Duration, Instant},
};

use anyhow::{Context as _, Result, ensure};
use breaker_agent::agent::status::LimitsStatus;
use breaker_tests::lab::{
    client::Plan,
    netns::{self, NetNs},
    stage::{Checks, Lab, SERVICE},
    wait_for,
};

use crate::{LONG, started, wait_well};

/// Connects from a network namespace, one after the other; those that were not refused are kept.
fn connect(from: &NetNs, target: SocketAddrV4, times: usize) -> Result<Vec<TcpStream>> {
    from.enter(move || {
        let connect = |_| TcpStream::connect_timeout(&SocketAddr::V4(target), Duration::from_secs(5)).ok();
        (0..times).filter_map(connect).collect()
    })
}

fn limits(lab: &Lab) -> Result<LimitsStatus> {
    lab.agent.service(SERVICE)?.limits.context("the service has no limits")
}

/// Counted connections to the primary.
fn counted(lab: &Lab) -> u32 {
    limits(lab).map_or(u32::MAX, |limits| limits.primary.concurrent)
}

/// A peer with a limit of its own: how many of a hundred connections at once it takes, how many of the hundred that come 0.35 s
/// later, and how many of those that come all the time for three seconds, from a full bucket.
#[derive(Clone, Copy, Debug)]
struct Admitted {
    at_once: usize,
    later: usize,
    steadily: usize,
}

fn hundred_clients(from: &NetNs, target: SocketAddrV4) -> Result<Admitted> {
    // A proxy accepts before it refuses: only an answer tells.
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

struct HaProxy(Child);

impl Drop for HaProxy {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// HAProxy in the backup's pod, with the recipe that its users copy.
fn haproxy(lab: &Lab) -> Result<(HaProxy, SocketAddrV4)> {
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
    let child = HaProxy(child.context("start haproxy")?);
    let listens = || lab.backup.pod.ns.output("ss", &["-Htln", "sport", "=", ":8081"]).is_ok_and(|out| !out.is_empty());
    wait_for("haproxy to listen", LONG, listens)?;
    Ok((child, address))
}

/// A rule of nftables in the backup's pod, for a port of its own.
fn nftables(lab: &Lab) -> Result<()> {
    let rules = "table inet limited {\n  chain input {\n    type filter hook input priority 0;\n    \
                 tcp dport 80 ct state new limit rate over 10/second burst 5 packets reject with tcp reset\n  }\n}\n";
    let file = lab.world.dir().join("limited.nft");
    std::fs::write(&file, rules).context("write limited.nft")?;
    netns::run(lab.backup.pod.ns.command("nft").arg("-f").arg(&file))
}

/// The table of docs/LIMITS.md, in one run: breaker means by rate and burst what nftables means, and HAProxy's recipe locks out.
#[test]
fn a_hundred_clients_at_once_beside_nftables_and_haproxy() -> Result<()> {
    // Without checks: nftables would count them.
    let mut lab = Lab::with(Checks::Default, "    limits: {newConnectionsPerSecond: 10, burst: 5}\n")?;
    lab.agent.start()?;
    wait_well(&lab)?;
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
    // A hundred refusals take some milliseconds, on a slow machine tens of them: a token may come back meanwhile.
    let near = |ours: usize, theirs: usize, by: usize| ours.abs_diff(theirs) <= by;
    ensure!((5..=7).contains(&ours.at_once) && near(ours.at_once, nftables.at_once, 2), "{all}");
    ensure!((3..=5).contains(&ours.later) && near(ours.later, nftables.later, 2), "{all}");
    ensure!((33..=36).contains(&ours.steadily) && near(ours.steadily, nftables.steadily, 2), "{all}");
    ensure!(haproxy.steadily < ours.steadily / 2, "who goes on trying is locked out: {all}");
    let refused = shown.primary.limited.get("newConnectionsPerSecond").copied().unwrap_or_default();
    ensure!(refused > 180, "{shown:?}");
    let client = &shown.limited_clients[0];
    assert_eq!(client.client, Some(lab.client.address.to_string()));
    ensure!(client.refused <= refused && client.refused >= refused / 2, "{shown:?}");
    Ok(())
}

/// A backup that would topple at 500 connections a second gets no more, of two thousand a second that a failover sends it.
#[test]
fn a_failover_does_not_topple_the_backup() -> Result<()> {
    const RATE: u32 = 500;
    const BURST: u32 = 50;
    let lab = started(&format!("    limits: {{backup: {{newConnectionsPerSecond: {RATE}, burst: {BURST}}}}}\n"))?;
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
    let (first, last) = (admitted[0], *admitted.last().context("the backup had none")?);
    let took = last.duration_since(first).as_secs_f64();
    let allowed = f64::from(RATE) * took + f64::from(BURST);
    let asked = records.iter().filter(|record| record.at >= first && record.at <= last).count();
    let limited = limits(&lab)?;
    let all = format!("{} of {asked} in {took:.2} s, allowed {allowed:.0}: {limited:?}", admitted.len());
    eprintln!("{all}");
    #[expect(clippy::cast_precision_loss, reason = "thousands")]
    let (admitted_count, asked) = (admitted.len() as f64, asked as f64);
    // A connection is admitted some time after its client began.
    ensure!(admitted_count <= allowed * 1.02, "{all}");
    // A machine that is too slow to ask for that much says nothing of the lower bound.
    ensure!(asked < 1.5 * allowed || admitted_count >= allowed * 0.95, "{all}");
    ensure!(limited.backup.limited.contains_key("newConnectionsPerSecond"), "{all}");
    ensure!(limited.primary.limited.is_empty(), "{all}");
    Ok(())
}

/// Programs count on while no agent is there, and the next one finds what is.
#[test]
fn the_count_is_right_after_kill_9() -> Result<()> {
    let mut lab = started("    limits: {concurrentConnections: 5}\n")?;
    let mut held = connect(&lab.client.ns, lab.vip, 7)?;
    assert_eq!((held.len(), counted(&lab)), (5, 5));
    lab.agent.kill()?;
    held.truncate(2);
    // The server closes as well, once it has read the end.
    let freed =
        || connect(&lab.client.ns, lab.vip, 1).is_ok_and(|mut more| more.pop().map(|one| held.push(one)).is_some());
    let mut freed = freed;
    for _ in 0..3 {
        wait_for("a place to come free without an agent", LONG, &mut freed)?;
    }
    assert!(connect(&lab.client.ns, lab.vip, 2)?.is_empty(), "five are five");
    lab.agent.start()?;
    wait_well(&lab)?;
    assert_eq!(counted(&lab), 5);
    drop(held);
    wait_for("all to be closed", LONG, || counted(&lab) == 0)?;
    Ok(())
}

/// Clients that vanish without a word count until `idleSeconds` have passed; one that is in use counts on.
#[test]
fn clients_that_vanish_are_taken_out_and_others_stay() -> Result<()> {
    let mut lab = started("    limits: {concurrentConnections: 5, idleSeconds: 5}\n")?;
    let other = lab.world.node_mut(0).add_pod("other")?;
    let lost = connect(&lab.client.ns, lab.vip, 4)?;
    let mut used = connect(&other.ns, lab.vip, 1)?.pop().context("the fifth")?;
    assert_eq!((lost.len(), counted(&lab)), (4, 5));
    // Nothing comes out of that pod any more, not even the FINs of its sockets.
    lab.client.ns.ip(&["link", "set", "eth0", "down"])?;
    drop(lost);
    assert!(connect(&other.ns, lab.vip, 1)?.is_empty(), "they count still");
    let mut ask = || -> Result<()> {
        write!(used, "GET / HTTP/1.1\r\nHost: lab\r\n\r\n")?;
        let mut answer = [0; 512];
        ensure!(used.read(&mut answer)? > 0, "the connection that is in use has ended");
        Ok(())
    };
    wait_for("those that vanished to be taken out", LONG + LONG, || ask().is_ok() && counted(&lab) == 1)?;
    ask()?;
    assert_eq!(connect(&other.ns, lab.vip, 6)?.len(), 4, "four places, beside the one in use");
    Ok(())
}

/// The node's own processes and clients outside are limited as pods are.
#[test]
fn all_kinds_of_clients_are_limited() -> Result<()> {
    let mut lab = Lab::new(Checks::Fast)?;
    let services =
        lab.services(Checks::Fast, "    limits: {concurrentConnections: 3, perClient: {concurrentConnections: 2}}\n");
    lab.agent.write_config("  uplinks: true\n", &services)?;
    let (lan, node) = (lab.world.lan(), lab.world.node(0));
    lan.ip(&["route", "add", breaker_tests::lab::kubeproxy::VIPS, "via", &node.address().to_string()])?;
    lab.agent.start()?;
    wait_well(&lab)?;
    let (lan, node) = (lab.world.lan().clone(), lab.world.node(0).ns().clone());
    for (who, from) in [("outside", &lan), ("node", &node), ("pod", &lab.client.ns)] {
        let held = connect(from, lab.vip, 4)?;
        assert_eq!((held.len(), counted(&lab)), (2, 2), "{who}: its share");
        drop(held);
        wait_for(&format!("{who}: its connections to be closed"), LONG, || counted(&lab) == 0)?;
    }
    // The service's own limit, whoever comes.
    let held = (connect(&lan, lab.vip, 2)?, connect(&node, lab.vip, 2)?, connect(&lab.client.ns, lab.vip, 2)?);
    assert_eq!((held.0.len(), held.1.len(), held.2.len()), (2, 1, 0));
    let shown = limits(&lab)?;
    assert!(shown.primary.limited.contains_key("concurrentConnections"), "{shown:?}");
    assert!(shown.limited_clients.iter().any(|client| client.client.is_none()), "the node itself: {shown:?}");
    // A process that is killed closes its sockets as well.
    drop(held);
    let vip = lab.vip.to_string();
    let (host, port) = vip.split_once(':').context("a port")?;
    let script = format!("exec 3<>/dev/tcp/{host}/{port}; read -r forever <&3");
    let mut child = node.command("bash").args(["-c", &script]).spawn().context("start bash")?;
    wait_for("the process to be connected", LONG, || counted(&lab) == 1)?;
    child.kill()?;
    child.wait()?;
    wait_for("its connection to be taken out", LONG, || counted(&lab) == 0)
}

/// A primary at its limit overflows to the backup while the breaker is closed; when that is over, nothing is left of it.
#[test]
fn a_primary_at_its_limit_overflows_to_the_backup() -> Result<()> {
    let lab = started("    limits: {concurrentConnections: 2, onLimit: Failover}\n")?;
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
        // Long enough for the agent to look: the connection must not notice when it takes over.
        sleep(Duration::from_millis(1500));
    }
    let service = lab.agent.service(SERVICE)?;
    assert_eq!((service.state.as_str(), service.flows), ("Closed", 1));
    assert_eq!(limits(&lab)?.failed_over, 1);
    drop((held, overflowed));
    wait_for("all to be closed", LONG, || {
        let flows = lab.agent.service(SERVICE).map_or(usize::MAX, |service| service.flows);
        counted(&lab) == 0 && flows == 0
    })?;
    assert!(lab.ask()?.pod() == Some(&primary));
    Ok(())
}
