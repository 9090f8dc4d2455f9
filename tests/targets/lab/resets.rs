//! Resets of established connections reach both ends, whatever segment the client sends next (RESETS.md, FAULT 1), and
//! clients that send nothing (RESETS.md, S1 to S5).

use std::{
    io::{ErrorKind, Read as _, Write as _},
    net::{Ipv4Addr, SocketAddr, SocketAddrV4, TcpStream},
    time::Duration,
};

use anyhow::{Result, ensure};
use breaker_api::events::EventType;
use breaker_common::BreakerState;
use breaker_tests::lab::{
    netns::NetNs,
    service::ServicePod,
    stage::{Checks, Lab, SERVICE, frontend},
    wait_for,
};
use rustix::{
    net::sockopt::{set_socket_keepalive, set_tcp_keepidle},
    process::Signal,
};

use crate::{LONG, pressure::ask, start_healthy_lab, wait_all_up};

/// Connects from a namespace to the service and sends one request.
fn connected(lab: &Lab, ns: &NetNs) -> Result<TcpStream> {
    let target = SocketAddr::V4(lab.vip);
    let mut stream = ns.enter(move || TcpStream::connect_timeout(&target, LONG))??;
    stream.set_read_timeout(Some(LONG))?;
    ask(&mut stream)?;
    Ok(stream)
}

/// Connects, and lets the client's kernel send a keepalive probe after each second without data.
fn with_keepalive(lab: &Lab, ns: &NetNs) -> Result<TcpStream> {
    let stream = connected(lab, ns)?;
    set_socket_keepalive(&stream, true)?;
    set_tcp_keepidle(&stream, Duration::from_secs(1))?;
    Ok(stream)
}

/// Waits until a pod has no established connection with an address.
fn wait_closed(pod: &ServicePod, address: &str) -> Result<()> {
    wait_for("the server's end of the connection to close", LONG, || {
        pod.pod.ns.output("ss", &["-Htn", "state", "established"]).is_ok_and(|sockets| !sockets.contains(address))
    })
}

/// Waits until the node's conntrack has no established connection to the VIP. Without /proc/net/nf_conntrack, nothing is
/// checked.
fn wait_forgotten(lab: &Lab) -> Result<()> {
    let node = lab.world.node(0).ns();
    let vip = format!("dst={} ", lab.vip.ip());
    wait_for("conntrack to see the end", LONG, || {
        node.output("cat", &["/proc/net/nf_conntrack"])
            .map_or(true, |entries| !entries.lines().any(|entry| entry.contains("ESTABLISHED") && entry.contains(&vip)))
    })
}

/// Opens the breaker as an operator does.
fn trip(lab: &Lab) -> Result<()> {
    lab.agent.cli(&["trip", SERVICE])?;
    lab.agent.wait_state(SERVICE, BreakerState::Open, LONG)
}

/// Starts the agent also for clients outside. Returns the namespace of such clients.
fn start_for_outside(lab: &mut Lab, services: &str) -> Result<NetNs> {
    let lan = lab.world.lan().clone();
    lan.ip(&["route", "add", "10.43.0.0/24", "via", "172.31.0.11"])?;
    lab.agent.write_config("  uplinks: true\n", services)?;
    lab.agent.start()?;
    wait_all_up(lab)?;
    Ok(lan)
}

/// Stops the primary, sends a request on each connection, and waits until the checks have opened the breaker.
fn hang_until_open(lab: &Lab, streams: &mut [TcpStream]) -> Result<()> {
    lab.primary.signal(Signal::STOP)?;
    for stream in streams {
        stream.write_all(b"GET / HTTP/1.1\r\nHost: lab\r\n\r\n")?;
    }
    lab.agent.wait_state(SERVICE, BreakerState::Open, LONG)
}

fn is_reset(stream: &mut TcpStream) -> Result<()> {
    ends_by(stream, ErrorKind::ConnectionReset)
}

/// Reads until the connection ends, by this error.
fn ends_by(stream: &mut TcpStream, kind: ErrorKind) -> Result<()> {
    let end = stream.read(&mut [0; 64]);
    ensure!(end.as_ref().is_err_and(|error| error.kind() == kind), "{end:?}");
    Ok(())
}

/// An idle connection whose next segment is a keepalive probe, from a pod and from outside. Its number is one too low.
#[test]
fn f1_a_keepalive_probe_resets_the_primarys_end() -> Result<()> {
    let mut lab = Lab::new(Checks::Fast)?;
    let services = lab.services(Checks::Fast, "");
    let lan = start_for_outside(&mut lab, &services)?;
    let mut pod = with_keepalive(&lab, &lab.client.ns)?;
    let mut outside = with_keepalive(&lab, &lan)?;
    trip(&lab)?;
    is_reset(&mut pod)?;
    is_reset(&mut outside)?;
    wait_closed(&lab.primary, &lab.client.address.to_string())?;
    wait_forgotten(&lab)
}

/// The same at the backup, when the breaker closes, on both paths.
#[test]
fn f1_a_keepalive_probe_resets_the_backups_end() -> Result<()> {
    for path in ["", "    fastPath: PeerRedirect\n"] {
        let lab = start_healthy_lab(&format!("    onClose: Reset\n{path}"))?;
        trip(&lab)?;
        let mut stream = with_keepalive(&lab, &lab.client.ns)?;
        lab.agent.cli(&["reset", SERVICE])?;
        lab.agent.wait_state(SERVICE, BreakerState::Closed, LONG)?;
        is_reset(&mut stream)?;
        wait_closed(&lab.backup, &lab.client.address.to_string())?;
    }
    Ok(())
}

/// The client sends data again that the server has, because the server's answers are lost.
#[test]
fn f1_data_that_the_server_has_resets_its_end() -> Result<()> {
    let lab = start_healthy_lab("")?;
    let mut stream = connected(&lab, &lab.client.ns)?;
    let to_client = lab.client.address.to_string();
    lab.primary.pod.ns.output("iptables", &["-I", "OUTPUT", "-d", &to_client, "-j", "DROP"])?;
    stream.write_all(b"GET / HTTP/1.1\r\nHost: lab\r\n\r\n")?;
    trip(&lab)?;
    is_reset(&mut stream)?;
    wait_closed(&lab.primary, &to_client)?;
    wait_forgotten(&lab)
}

/// The client uploads to a server that reads nothing: its next segment is a window probe, whose number is one too low.
#[test]
fn f1_a_window_probe_resets_both_ends() -> Result<()> {
    // The checks fail, too: the breaker must not open before the window is closed.
    let lab = start_healthy_lab("    override: ForceClosed\n")?;
    // Small buffers are soon full.
    lab.primary.pod.ns.sysctl(&["net.ipv4.tcp_rmem=4096 8192 8192"])?;
    lab.client.ns.sysctl(&["net.ipv4.tcp_wmem=4096 16384 16384"])?;
    let mut stream = connected(&lab, &lab.client.ns)?;
    lab.primary.signal(Signal::STOP)?;
    stream.set_nonblocking(true)?;
    wait_for("a closed window", LONG, || {
        // As many bytes as the buffers hold. `write_all` ends with an error when they are full.
        let full = loop {
            if let Err(error) = stream.write_all(&[b'x'; 65_536]) {
                break error.kind() == ErrorKind::WouldBlock;
            }
        };
        let probes = lab.client.ns.output("ss", &["-Htno", "state", "established"]).unwrap_or_default();
        full && probes.contains("persist")
    })?;
    lab.configure(Checks::Fast, "    override: ForceOpen\n")?;
    lab.agent.wait_state(SERVICE, BreakerState::Open, LONG)?;
    wait_for(
        "the client's end to close",
        LONG,
        || matches!(stream.write(b"x"), Err(error) if error.kind() != ErrorKind::WouldBlock),
    )?;
    wait_closed(&lab.primary, &lab.client.address.to_string())?;
    wait_forgotten(&lab)
}

/// The primary hangs, and its clients have sent their requests and wait: those in a pod, and those outside. They send
/// nothing by themselves.
#[test]
fn clients_that_wait_are_reset_when_the_breaker_opens() -> Result<()> {
    let mut lab = Lab::new(Checks::Fast)?;
    // With many addresses, the agent reads all entries of conntrack.
    let more = (101..=108).map(|host| SocketAddrV4::new(Ipv4Addr::new(10, 43, 0, host), lab.vip.port()));
    let frontends: Vec<String> = [lab.vip].into_iter().chain(more).map(frontend).collect();
    let services = lab.services_by(Checks::Fast, "", &frontends);
    let lan = start_for_outside(&mut lab, &services)?;
    let mut waiting = Vec::new();
    for (ns, count) in [(&lab.client.ns, 20), (&lan, 10)] {
        for _ in 0..count {
            waiting.push(connected(&lab, ns)?);
        }
    }
    let mut idle = connected(&lab, &lab.client.ns)?;
    hang_until_open(&lab, &mut waiting)?;
    for stream in waiting.iter_mut().chain([&mut idle]) {
        is_reset(stream)?;
    }
    let said = wait_resets(&lab)?;
    ensure!(said.contains("31 of 31 established connections to the primary were reset"), "{said}");
    lab.primary.signal(Signal::CONT)?;
    wait_closed(&lab.primary, &lab.client.address.to_string())?;
    wait_forgotten(&lab)
}

/// `Drain`: old connections go on until the time is over, new ones go to the backup, and what is left then is reset.
#[test]
fn a_drain_ends_with_resets() -> Result<()> {
    let lab = start_healthy_lab("    onOpen: Drain\n    drainSeconds: 3\n")?;
    let (mut ended, mut left) = (connected(&lab, &lab.client.ns)?, connected(&lab, &lab.client.ns)?);
    trip(&lab)?;
    let mut new = connected(&lab, &lab.client.ns)?;
    for stream in [&mut ended, &mut left] {
        ask(stream)?;
    }
    drop(ended);
    is_reset(&mut left)?;
    let said = wait_resets(&lab)?;
    ensure!(said.contains("1 of 1 established connections"), "{said}");
    ask(&mut new)?;
    Ok(())
}

/// A connection that was made after the breaker opened is not touched, also where the agent is restarted and looks again;
/// and a client that is gone is told of.
#[test]
fn only_connections_from_before_the_opening_are_reset() -> Result<()> {
    let mut lab = start_healthy_lab("")?;
    let mut before = connected(&lab, &lab.client.ns)?;
    trip(&lab)?;
    let mut after = connected(&lab, &lab.client.ns)?;
    is_reset(&mut before)?;
    wait_resets(&lab)?;
    lab.agent.stop()?;
    lab.agent.start()?;
    lab.agent.wait_state(SERVICE, BreakerState::Open, LONG)?;
    // Longer than three rounds.
    std::thread::sleep(Duration::from_secs(2));
    ask(&mut after)?;
    Ok(())
}

/// Connections of the node's own processes are closed: as most programs make them, and with a socket for both IP families.
#[test]
fn a_process_of_the_node_is_told_at_once() -> Result<()> {
    let lab = start_healthy_lab("")?;
    let node = lab.world.node(0).ns();
    let mapped = SocketAddr::new(lab.vip.ip().to_ipv6_mapped().into(), lab.vip.port());
    let mut streams = vec![connected(&lab, node)?];
    let mut other = node.enter(move || TcpStream::connect_timeout(&mapped, LONG))??;
    other.set_read_timeout(Some(LONG))?;
    ask(&mut other)?;
    streams.push(other);
    trip(&lab)?;
    for stream in &mut streams {
        ends_by(stream, ErrorKind::ConnectionAborted)?;
    }
    let said = wait_resets(&lab)?;
    ensure!(said.contains("2 of 2 established connections"), "{said}");
    wait_forgotten(&lab)
}

/// A client's own netfilter drops what its connection tracking calls INVALID: segments with numbers that are too new. One
/// of four passes it, whatever the numbers of the connection are.
#[test]
fn clients_that_drop_invalid_segments_are_reached() -> Result<()> {
    let lab = start_healthy_lab("")?;
    let invalid = ["-A", "INPUT", "-m", "conntrack", "--ctstate", "INVALID", "-j", "DROP"];
    lab.client.ns.output("iptables", &invalid)?;
    let mut streams = (0..40).map(|_| connected(&lab, &lab.client.ns)).collect::<Result<Vec<_>>>()?;
    trip(&lab)?;
    streams.iter_mut().try_for_each(is_reset)?;
    let said = wait_resets(&lab)?;
    ensure!(said.contains("40 of 40 established connections"), "{said}");
    wait_forgotten(&lab)
}

/// The client of a tracked connection is gone: the agent says so, and the client's answers to the pokes do not travel on.
#[test]
fn a_client_that_is_gone_is_told_of() -> Result<()> {
    let lab = start_healthy_lab("")?;
    let (client, node) = (&lab.client.ns, lab.world.node(0).ns());
    end_unheard(&lab, connected(&lab, client)?)?;
    let vip = lab.vip.ip().to_string();
    let resets = ["-d", &vip, "-p", "tcp", "--tcp-flags", "RST", "RST"];
    node.output("iptables", &[&["-t", "mangle", "-I", "PREROUTING"], resets.as_slice()].concat())?;
    trip(&lab)?;
    let said = wait_resets(&lab)?;
    ensure!(said.contains("0 of 1") && said.contains("gone before: 1"), "{said}");
    wait_forgotten(&lab)?;
    let seen = node.output("iptables", &["-t", "mangle", "-nvxL", "PREROUTING"])?;
    let counted = seen.lines().nth(2).and_then(|line| line.split_whitespace().next()).unwrap_or_default().to_owned();
    ensure!(counted == "0", "resets went on: {seen}");
    Ok(())
}

/// Clients of the backup that wait are reset, too: when the breaker closes, and when their pod of the backup is Down.
#[test]
fn clients_of_the_backup_that_wait_are_reset() -> Result<()> {
    ["", "    fastPath: PeerRedirect\n"].into_iter().try_for_each(clients_of_the_backup)
}

fn clients_of_the_backup(path: &str) -> Result<()> {
    let mut lab = Lab::new(Checks::Fast)?;
    let second = ServicePod::start(lab.world.node_mut(0), "second")?;
    let more = format!(
        "      - backends: [{}]\n        check: {{httpGet: {{path: /ready}}}}\n    onClose: Reset\n{path}",
        frontend(second.address())
    );
    let services = lab.services(Checks::Fast, &more);
    let lan = start_for_outside(&mut lab, &services)?;
    for (fault, reports) in [("closed", 1), ("down", 2)] {
        trip(&lab)?;
        let mut streams = Vec::new();
        for ns in [&lab.client.ns, &lan] {
            streams.push(connected(&lab, ns)?);
        }
        ensure!(streams.iter_mut().all(|stream| ask(stream).is_ok_and(|pod| pod == lab.backup.address().to_string())));
        match fault {
            "closed" => lab.agent.cli(&["reset", SERVICE]).map(|_| ())?,
            _ => lab.backup.signal(Signal::STOP)?,
        }
        streams.iter_mut().try_for_each(is_reset)?;
        wait_for("a report for each fault", LONG, || all_resets(&lab).len() == reports)?;
        let said = wait_resets(&lab)?;
        ensure!(said.contains("2 of 2 established connections to the backup were reset"), "{fault}: {said}");
    }
    lab.backup.signal(Signal::CONT)?;
    wait_closed(&lab.backup, &lab.client.address.to_string())
}

/// The client does not answer pokes: its end is closed in its pod, which tells the primary.
#[test]
fn a_client_that_does_not_answer_is_closed_in_its_pod() -> Result<()> {
    let lab = start_healthy_lab("")?;
    let mut stream = connected(&lab, &lab.client.ns)?;
    // A namespace is found by its processes.
    let mut process = lab.client.ns.command("sleep").arg("60").spawn()?;
    let vip = lab.vip.ip().to_string();
    let pokes = ["-p", "tcp", "-s", &vip, "--tcp-flags", "ALL", "ACK", "-m", "length", "--length", "40"];
    lab.client.ns.output("iptables", &[&["-I", "INPUT"], &pokes[..], &["-j", "DROP"]].concat())?;
    trip(&lab)?;
    let end = ends_by(&mut stream, ErrorKind::ConnectionAborted);
    process.kill()?;
    process.wait()?;
    end?;
    let said = wait_resets(&lab)?;
    ensure!(said.contains("1 of 1 established connections"), "{said}");
    wait_closed(&lab.primary, &lab.client.address.to_string())?;
    wait_forgotten(&lab)
}

/// A client has closed its own direction and waits for the answer of a primary that hangs.
#[test]
fn a_client_that_has_sent_its_end_is_reset() -> Result<()> {
    let lab = start_healthy_lab("")?;
    // Conntrack takes a FIN that is sent twice for those of both sides, and calls the connection TIME_WAIT.
    lab.client.ns.sysctl(&["net.ipv4.tcp_early_retrans=0"])?;
    let mut stream = connected(&lab, &lab.client.ns)?;
    lab.primary.signal(Signal::STOP)?;
    stream.write_all(b"GET / HTTP/1.1\r\nHost: lab\r\n\r\n")?;
    stream.shutdown(std::net::Shutdown::Write)?;
    lab.agent.wait_state(SERVICE, BreakerState::Open, LONG)?;
    is_reset(&mut stream)?;
    lab.primary.signal(Signal::CONT)?;
    wait_forgotten(&lab)
}

/// The node has forgotten the client's link-layer address: the agent has the kernel find it out.
#[test]
fn a_client_without_a_neighbor_entry_is_reset() -> Result<()> {
    let lab = start_healthy_lab("")?;
    let mut stream = connected(&lab, &lab.client.ns)?;
    lab.world.node(0).ns().ip(&["neigh", "flush", "dev", "cni0"])?;
    trip(&lab)?;
    is_reset(&mut stream)?;
    wait_forgotten(&lab)
}

/// Clients behind a router that masquerades them and drops what it calls INVALID.
#[test]
fn clients_behind_a_router_that_masquerades_are_reset() -> Result<()> {
    let mut lab = Lab::new(Checks::Fast)?;
    let services = lab.services(Checks::Fast, "");
    let lan = start_for_outside(&mut lab, &services)?;
    let home = NetNs::create(&format!("{}-home", lab.world.id()))?;
    lan.ip(&["link", "add", "home", "type", "veth", "peer", "name", "eth0", "netns", home.name()])?;
    lan.ip(&["addr", "add", "192.168.7.1/24", "dev", "home"])?;
    lan.ip(&["link", "set", "home", "up"])?;
    home.ip(&["addr", "add", "192.168.7.2/24", "dev", "eth0"])?;
    home.ip(&["link", "set", "eth0", "up"])?;
    home.ip(&["route", "add", "default", "via", "192.168.7.1"])?;
    lan.sysctl(&["net.ipv4.ip_forward=1"])?;
    lan.iptables_restore(
        "*nat\n-A POSTROUTING -s 192.168.7.0/24 -j MASQUERADE\nCOMMIT\n*filter\n-A FORWARD -m conntrack --ctstate \
         INVALID -j DROP\n-A INPUT -m conntrack --ctstate INVALID -j DROP\nCOMMIT\n",
    )?;
    let mut streams = (0..30).map(|_| connected(&lab, &home)).collect::<Result<Vec<_>>>()?;
    hang_until_open(&lab, &mut streams)?;
    streams.iter_mut().try_for_each(is_reset)?;
    let said = wait_resets(&lab)?;
    ensure!(said.contains("30 of 30 established connections"), "{said}");
    lab.primary.signal(Signal::CONT)?;
    wait_forgotten(&lab)
}

/// Where the kernel does not track connections to Services, the programs have noted their SYNs. Those that their clients
/// ended are forgotten; one whose end was lost is told from the others by the answer.
#[test]
fn connections_are_found_by_their_syns() -> Result<()> {
    for limits in ["", "    limits: {concurrentConnections: 1000}\n"] {
        let mut lab = Lab::new(Checks::Fast)?;
        lab.agent.write_config("  connections: Syns\n", &lab.services(Checks::Fast, limits))?;
        lab.agent.start()?;
        wait_all_up(&lab)?;
        let mut streams = (0..5).map(|_| connected(&lab, &lab.client.ns)).collect::<Result<Vec<_>>>()?;
        streams.truncate(3);
        if let Some(lost) = streams.pop() {
            end_unheard(&lab, lost)?;
        }
        trip(&lab)?;
        streams.iter_mut().try_for_each(is_reset)?;
        let said = wait_resets(&lab)?;
        ensure!(said.contains("2 of 3 established connections") && said.contains("gone before: 1"), "{said}");
        // Nothing of these is noted any more.
        let mut again = connected(&lab, &lab.client.ns)?;
        lab.agent.cli(&["reset", SERVICE])?;
        lab.agent.wait_state(SERVICE, BreakerState::Closed, LONG)?;
        trip(&lab)?;
        ask(&mut again)?;
        std::thread::sleep(Duration::from_millis(300));
        ensure!(all_resets(&lab).len() == 1, "{:?}", all_resets(&lab));
    }
    Ok(())
}

/// Clients that were reset connect anew at once. The backup gets no more of them than its limit allows.
#[test]
fn clients_that_come_again_meet_the_limits_of_the_backup() -> Result<()> {
    let lab = start_healthy_lab("    limits: {backup: {concurrentConnections: 10}}\n")?;
    let mut streams = (0..40).map(|_| connected(&lab, &lab.client.ns)).collect::<Result<Vec<_>>>()?;
    trip(&lab)?;
    let target = SocketAddr::V4(lab.vip);
    let again = streams.iter_mut().map(|stream| {
        is_reset(stream)?;
        Ok(lab.client.ns.enter(move || TcpStream::connect_timeout(&target, LONG))?.ok())
    });
    let again = again.collect::<Result<Vec<_>>>()?;
    let taken = again.iter().flatten().count();
    ensure!(taken == 10, "the backup took {taken} connections");
    Ok(())
}

/// The agent is killed while it resets. The next one goes on with those that are left.
#[test]
fn a_killed_agent_goes_on_with_the_rest() -> Result<()> {
    // After the first 200, one a second.
    let mut lab = start_healthy_lab("    resetsPerSecond: 1\n")?;
    let mut streams = (0..230).map(|_| connected(&lab, &lab.client.ns)).collect::<Result<Vec<_>>>()?;
    trip(&lab)?;
    let left = |lab: &Lab| lab.agent.service(SERVICE).ok()?.established.map(|counts| counts.left);
    wait_for("the count of the connections", LONG, || left(&lab) == Some(230))?;
    let sockets = |lab: &Lab| lab.client.ns.output("ss", &["-Htn", "state", "established"]).unwrap_or_default();
    wait_for("the first resets", LONG, || (1..=30).contains(&sockets(&lab).lines().count()))?;
    lab.agent.kill()?;
    ensure!(sockets(&lab).lines().count() > 0, "all were reset before the agent was killed");
    lab.agent.start()?;
    streams.iter_mut().try_for_each(is_reset)?;
    wait_forgotten(&lab)
}

/// `Keep`: the status says how many connections are still on the primary.
#[test]
fn connections_that_go_on_are_counted() -> Result<()> {
    let lab = start_healthy_lab("    onOpen: Keep\n")?;
    let mut streams = (0..3).map(|_| connected(&lab, &lab.client.ns)).collect::<Result<Vec<_>>>()?;
    trip(&lab)?;
    let words = |lab: &Lab| lab.agent.service(SERVICE).ok()?.established.map(|counts| counts.words());
    let said = |text: &str| wait_for(text, LONG, || words(&lab).as_deref() == Some(text));
    said("3 of 3 established connections to the primary go on")?;
    ask(&mut streams[0])?;
    streams.truncate(1);
    said("1 of 3 established connections to the primary go on")?;
    let flows = String::from_utf8(lab.agent.cli(&["flows", SERVICE])?.stdout)?;
    ensure!(flows.contains("1 of 3 established connections to the primary go on"), "{flows}");
    lab.agent.cli(&["reset", SERVICE])?;
    wait_for("no number while closed", LONG, || words(&lab).is_none())
}

/// Ends a connection of the client, and nobody hears of it.
fn end_unheard(lab: &Lab, stream: TcpStream) -> Result<()> {
    let client = &lab.client.ns;
    let silent = ["OUTPUT", "-p", "tcp", "-d", &lab.vip.ip().to_string(), "-j", "DROP"];
    client.output("iptables", &[&["-I"], silent.as_slice()].concat())?;
    // With no time to linger, the kernel forgets the connection at once.
    rustix::net::sockopt::set_socket_linger(&stream, Some(Duration::ZERO))?;
    drop(stream);
    client.output("iptables", &[&["-D"], silent.as_slice()].concat())?;
    Ok(())
}

/// What the agent said became of established connections, so far.
fn all_resets(lab: &Lab) -> Vec<String> {
    let events = lab.agent.events().unwrap_or_default().into_iter();
    events.filter(|event| event.kind == EventType::Resets).map(|event| event.message).collect()
}

/// Waits until the agent says what became of the established connections. Returns what it said last.
fn wait_resets(lab: &Lab) -> Result<String> {
    wait_for("the report of resets", LONG, || !all_resets(lab).is_empty())?;
    Ok(all_resets(lab).pop().unwrap_or_default())
}
