//! Third-party clients and servers, from everywhere, over both IP families: HTTP/1.1 and HTTP/2 (curl, nghttp,
//! nghttpd), DNS over UDP and TCP (dig, dnsmasq), bulk transfers in both directions (iperf3), and long streams.
//! tcpdump captures both ends, and tshark must find no bad checksum.

use breaker_common::BreakerState;
use std::{
    fmt::Write as _,
    io::{BufRead as _, BufReader, Write as _},
    net::{IpAddr, SocketAddr, TcpListener, TcpStream},
    path::{Path, PathBuf},
    process::{Command, Stdio},
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicU64, Ordering},
    },
    time::Duration,
};

use anyhow::{Context as _, Result, ensure};
use breaker_tests::{
    lab::{
        netns::NetNs,
        stage::{Checks, Lab},
        wait_for,
    },
    process::KilledOnDrop,
};
use rustix::process::{Pid, Signal, kill_process};

use crate::{
    LONG,
    netfilter::{count, counted},
};

/// A VIP of each IP family.
const VIPS: [&str; 2] = ["10.43.0.77", "fd43::77"];
const HTTP: u16 = 80;
const HTTP2: u16 = 8081;
const DNS: u16 = 53;
const IPERF: u16 = 5201;
const ECHO: u16 = 7000;

fn spawn(command: &mut Command) -> Result<KilledOnDrop> {
    let quiet = command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::null());
    quiet.spawn().map(KilledOnDrop).with_context(|| format!("start {quiet:?}"))
}

fn listens(ns: &NetNs, port: u16) -> bool {
    ns.output("ss", &["-Htln", "sport", "=", &format!(":{port}")]).is_ok_and(|sockets| !sockets.is_empty())
}

/// The configuration of a service on one port: TCP, and with `udp` UDP too. It is forced open. `more` is added to it.
fn service(lab: &Lab, port: u16, udp: bool, backups: [IpAddr; 2], more: &str) -> String {
    let mut text = format!("  - name: port-{port}\n    frontends:\n");
    for vip in VIPS {
        for protocol in ["TCP", "UDP"].into_iter().take(1 + usize::from(udp)) {
            let _ = writeln!(text, "      - {{address: '{vip}', port: {port}, protocol: {protocol}}}");
        }
    }
    let backends = |ips: [IpAddr; 2]| ips.map(|ip| format!("{{address: '{ip}', port: {port}}}")).join(", ");
    let primary = [IpAddr::V4(lab.primary.pod.address), IpAddr::V6(lab.primary.pod.address6)];
    let (primary, backups) = (backends(primary), backends(backups));
    let _ = write!(
        text,
        "    primary: {{backends: [{primary}]}}\n    backups: [{{backends: [{backups}]}}]\n    override: ForceOpen\n{more}"
    );
    text
}

/// Adds routes to the VIPs. (breaker's own rule masquerades IPv6, because the lab's kube-proxy has no rules for it.)
fn add_vip_routes(lab: &Lab) -> Result<()> {
    let (lan, node) = (lab.world.lan(), lab.world.node(0));
    lan.ip(&["route", "add", VIPS[0], "via", &node.address().to_string()])?;
    for to in [VIPS[1], "fd42::/16"] {
        lan.ip(&["-6", "route", "add", to, "via", &node.address6().to_string()])?;
    }
    // A process of the node needs a route to the VIP, or its kernel does not send a SYN. A k3s node has a default
    // route.
    node.ns().ip(&["-6", "route", "add", VIPS[1], "via", "fd31::1"])
}

/// A lab with servers of all kinds in the backup's pod. `more` is added to each service's configuration.
fn staged(services: &[(u16, bool)], more: &str) -> Result<(Lab, Vec<KilledOnDrop>)> {
    let mut lab = Lab::new(Checks::Fast)?;
    add_vip_routes(&lab)?;
    let pod = lab.backup.pod.clone();
    let backups = [IpAddr::V4(pod.address), IpAddr::V6(pod.address6)];
    let text: String = services.iter().map(|(port, udp)| service(&lab, *port, *udp, backups, more)).collect();
    lab.agent.write_config("  uplinks: true\n", &format!("services:\n{text}"))?;
    lab.agent.start()?;
    let www = lab.world.dir().join("www");
    std::fs::create_dir_all(&www)?;
    std::fs::write(www.join("who"), "the backup, by HTTP/2\n")?;
    let ns = &pod.ns;
    let servers = vec![
        spawn(ns.command("nghttpd").args(["--no-tls", "-d"]).arg(&www).arg(HTTP2.to_string()))?,
        spawn(ns.command("iperf3").args(["-s", "-p", &IPERF.to_string()]))?,
        spawn(ns.command("dnsmasq").args([
            "--keep-in-foreground",
            "--no-resolv",
            "--no-hosts",
            "--user=root",
            "--pid-file=",
            "--conf-file=/dev/null",
            "--txt-record=who.test,the backup",
        ]))?,
    ];
    for port in [HTTP2, IPERF, DNS] {
        wait_for(&format!("a server on port {port}"), LONG, || listens(ns, port))?;
    }
    Ok((lab, servers))
}

/// An address as the host of a URL: IPv6 in brackets.
fn in_url(ip: &str) -> String {
    if ip.contains(':') { format!("[{ip}]") } else { ip.to_owned() }
}

/// Sends all kinds of requests from one client to one VIP; the backup must answer them.
fn ask_everything(ns: &NetNs, vip: &str, backup: IpAddr, interface: &str) -> Result<()> {
    let said = |program: &str, args: &[&str]| ns.output(program, args).with_context(|| format!("{program} {args:?}"));
    let url = |port: u16, path: &str| format!("http://{}:{port}{path}", in_url(vip));
    let curl = ["-sS", "--max-time", "5", "--interface", interface];
    let answer = said("curl", &[&curl[..], &[&url(HTTP, "/")]].concat())?;
    ensure!(answer.contains(&backup.to_string()), "HTTP/1.1: {answer}");
    let answer = said("curl", &[&curl[..], &["--http2-prior-knowledge", &url(HTTP2, "/who")]].concat())?;
    ensure!(answer.contains("by HTTP/2"), "HTTP/2: {answer}");
    // Five requests at the same time on one connection.
    let answer = said("nghttp", &["-t", "5", "-m", "5", &url(HTTP2, "/who")])?;
    ensure!(answer.matches("by HTTP/2").count() == 5, "HTTP/2: {answer}");
    let server = format!("@{vip}");
    let question = ["+short", "+time=2", "+tries=1", &server, "who.test", "TXT"];
    for more in ["+notcp", "+tcp"] {
        let answer = said("dig", &[&question[..], &[more]].concat())?;
        ensure!(answer.trim() == "\"the backup\"", "dig {more}: {answer}");
    }
    let port = IPERF.to_string();
    // iperf3 ends when its sender has handed over the last byte, and does not count what the receiver has not yet read.
    // Small socket buffers keep that part small.
    let tcp = ["-n", "2M", "-w", "64K"];
    for (more, least) in [
        (&tcp[..], 1_500_000),
        (&[&tcp[..], &["-R"]].concat(), 1_500_000),
        (&["-u", "-b", "10M", "-n", "500K"], 400_000),
    ] {
        let report = said("iperf3", &[&["-c", vip, "-p", &port, "-J", "--connect-timeout", "3000"], more].concat())?;
        let report: serde_json::Value = serde_json::from_str(&report)?;
        let bytes = report["end"]["sum_received"]["bytes"].as_u64().or(report["end"]["sum"]["bytes"].as_u64());
        ensure!(bytes.unwrap_or(0) > least, "iperf3 {more:?}: {}", report["end"]);
        let lost = report["end"]["sum"]["lost_percent"].as_f64().unwrap_or(0.0);
        ensure!(lost < 10.0, "iperf3 {more:?}: {lost} % lost");
    }
    Ok(())
}

/// A tcpdump capture on a namespace's `eth0`.
struct Capture {
    tcpdump: KilledOnDrop,
    file: PathBuf,
}

impl Capture {
    fn start(ns: &NetNs, dir: &Path, name: &str) -> Result<Self> {
        let file = dir.join(format!("{name}.pcap"));
        let mut command = ns.command("tcpdump");
        command.args(["-i", "eth0", "-n", "-U", "--immediate-mode", "-B", "65536", "-w"]).arg(&file);
        let tcpdump = spawn(&mut command)?;
        // tcpdump writes the file's header, 24 bytes, when it starts to capture.
        wait_for("tcpdump", LONG, || std::fs::metadata(&file).is_ok_and(|data| data.len() >= 24))?;
        Ok(Self { tcpdump, file })
    }

    /// Ends the capture. Returns a line for each packet with a bad checksum, and the number of all packets.
    fn stop_and_check(mut self) -> Result<(String, usize)> {
        let id = Pid::from_raw(i32::try_from(self.tcpdump.0.id())?).context("a process id")?;
        kill_process(id, Signal::INT)?;
        self.tcpdump.0.wait()?;
        let read = |filter: &str| {
            let mut command = Command::new("tshark");
            command.arg("-r").arg(&self.file).args(["-n", "-Y", filter]);
            for option in ["ip.check_checksum", "tcp.check_checksum", "udp.check_checksum"] {
                command.args(["-o", &format!("{option}:TRUE")]);
            }
            breaker_tests::lab::netns::output(&mut command)
        };
        let all = read("tcp || udp || icmp || icmpv6")?.lines().count();
        let bad = |protocol: &str| format!("{protocol}.checksum.status == \"Bad\"");
        // The kernel itself writes a checksum of zero as 0xffff (`CSUM_MANGLED_0` in `skb_checksum_help`). Both mean
        // the same, but tshark calls 0xffff bad for TCP.
        let own = format!("({} && tcp.checksum != 0xffff)", bad("tcp"));
        // An ICMP message may quote only a part of a packet, so the checksum in the quote cannot be verified.
        let quoted = format!("({} || {}) && !icmp && !icmpv6", own, bad("udp"));
        let bad = format!("{} || {} || {} || ({quoted})", bad("ip"), bad("icmp"), bad("icmpv6"));
        Ok((read(&bad)?, all))
    }
}

/// Switches checksum offload off: the kernel completes every checksum before a capture sees the packet.
fn no_offload(lab: &Lab) -> Result<()> {
    let pods = [&lab.client.ns, &lab.backup.pod.ns];
    for ns in pods.into_iter().chain([lab.world.node(0).ns(), lab.world.lan()]) {
        let links = ns.output("ip", &["-o", "link"])?;
        for name in links.lines().filter_map(|line| line.split(": ").nth(1)?.split('@').next()) {
            // Not every interface has this feature.
            let _ = ns.output("ethtool", &["-K", name, "tx", "off"]);
        }
    }
    Ok(())
}

/// A client's name, its network namespace, and the interface that it sends by.
type Client<'a> = (&'a str, &'a NetNs, &'a str);

/// Sends all kinds of requests from each client, and captures packets in the client's and the backup's pod.
fn all_ask_everything(lab: &Lab, clients: &[Client<'_>]) -> Result<()> {
    no_offload(lab)?;
    let dir = lab.world.dir();
    let captures = [
        ("client", Capture::start(&lab.client.ns, dir, "client")?),
        ("backup", Capture::start(&lab.backup.pod.ns, dir, "backup")?),
    ];
    let backups = [IpAddr::V4(lab.backup.pod.address), IpAddr::V6(lab.backup.pod.address6)];
    for (who, ns, interface) in clients {
        for (vip, backup) in VIPS.into_iter().zip(backups) {
            ask_everything(ns, vip, backup, interface).with_context(|| format!("{who} to {vip}"))?;
        }
    }
    for (name, capture) in captures {
        let (bad, all) = capture.stop_and_check()?;
        assert!(bad.is_empty() && all > 1000, "{name}: {all} packets, bad ones:\n{bad}");
    }
    Ok(())
}

const PORTS: [(u16, bool); 4] = [(HTTP, false), (HTTP2, false), (DNS, true), (IPERF, true)];

#[test]
fn real_clients_from_everywhere_and_no_bad_checksum() -> Result<()> {
    let (lab, _servers) = staged(&PORTS, "")?;
    let node = ("the node", lab.world.node(0).ns(), "cni0");
    all_ask_everything(&lab, &[("a pod", &lab.client.ns, "eth0"), node, ("the lan", lab.world.lan(), "br0")])
}

/// The same requests on the fast path, from a pod and from outside: netfilter sees no packet between them and the
/// backup.
#[test]
fn real_clients_past_the_stack_and_no_bad_checksum() -> Result<()> {
    let (lab, _servers) = staged(&PORTS, "    fastPath: PeerRedirect\n")?;
    let node = lab.world.node(0).ns();
    // The agent reads from the neighbor table where a pod is. Without checks, the node must talk to each pod first.
    for backup in [lab.backup.pod.address.to_string(), lab.backup.pod.address6.to_string()] {
        node.output("curl", &["-sS", "--max-time", "5", &format!("http://{}/", in_url(&backup))])?;
    }
    let services = || lab.agent.status().map(|status| status.services);
    wait_for("the agent to find the backups on this node", LONG, || {
        services().is_ok_and(|all| all.iter().flat_map(|s| &s.tiers[1].backends).all(|backend| backend.local))
    })?;
    let pairs = [
        (lab.client.address.to_string(), lab.backup.pod.address.to_string()),
        ("172.31.0.1".to_owned(), lab.backup.pod.address.to_string()),
        (lab.client.address6.to_string(), lab.backup.pod.address6.to_string()),
        ("fd31::1".to_owned(), lab.backup.pod.address6.to_string()),
    ];
    for (one, other) in pairs.iter().flat_map(|(client, backup)| [(client, backup), (backup, client)]) {
        // Not ICMPv6: pods resolve each other's MAC addresses by it.
        for protocol in ["tcp", "udp"] {
            count(node, &["-p", protocol, "-s", one, "-d", other])?;
        }
    }
    all_ask_everything(&lab, &[("a pod", &lab.client.ns, "eth0"), ("the lan", lab.world.lan(), "br0")])?;
    assert_eq!(counted(node)?, 0, "packets in netfilter");
    Ok(())
}

/// TRIALS B5: two uplinks, and a default route with a next hop on each. On the fast path, an answer leaves by the uplink
/// that the client came in on, to the next hop of that uplink.
#[test]
fn answers_take_the_next_hop_of_their_uplink() -> Result<()> {
    let mut lab = Lab::new(Checks::Fast)?;
    add_vip_routes(&lab)?;
    let (lan, node) = (lab.world.lan().clone(), lab.world.node(0).ns().clone());
    lan.ip(&["link", "add", "second", "type", "veth", "peer", "name", "eth1", "netns", node.name()])?;
    lan.ip(&["addr", "add", "fd32::1/64", "dev", "second", "nodad"])?;
    lan.ip(&["link", "set", "second", "up"])?;
    node.ip(&["addr", "add", "fd32::11/64", "dev", "eth1", "nodad"])?;
    node.ip(&["link", "set", "eth1", "up"])?;
    lan.sysctl(&["net.ipv6.conf.all.forwarding=1"])?;
    let next_hops = ["nexthop", "via", "fd31::1", "dev", "eth0", "nexthop", "via", "fd32::1", "dev", "eth1"];
    node.ip(&[&["-6", "route", "add", "default"], &next_hops[..]].concat())?;
    let pod = lab.backup.pod.clone();
    let backups = [IpAddr::V4(pod.address), IpAddr::V6(pod.address6)];
    let text = service(&lab, HTTP, false, backups, "    fastPath: PeerRedirect\n");
    lab.agent.write_config("  uplinks: true\n", &format!("services:\n{text}"))?;
    lab.agent.start()?;
    node.output("curl", &["-sS", "--max-time", "5", &format!("http://[{}]/", pod.address6)])?;
    let name = format!("port-{HTTP}");
    wait_for("the agent to find the backup on this node", LONG, || {
        lab.agent.service(&name).is_ok_and(|s| s.tiers[1].backends.iter().any(|b| b.local))
    })?;
    // Eight clients, and each comes in by either uplink in turn.
    for gateway in ["fd31::11", "fd32::11"] {
        lan.ip(&["-6", "route", "replace", VIPS[1], "via", gateway])?;
        for number in 1..=8 {
            let client = format!("2001:db8::{number}");
            let _ = lan.ip(&["addr", "add", &format!("{client}/128"), "dev", "lo", "nodad"]);
            let url = format!("http://[{}]/", VIPS[1]);
            let asked = lan.output("curl", &["-sS", "--max-time", "5", "--interface", &client, &url]);
            asked.with_context(|| format!("{client} by {gateway}"))?;
        }
    }
    let flows = crate::text(&lab.agent.cli(&["flows", &name])?.stdout);
    ensure!(flows.contains(" veth "), "no flow took the fast path: {flows}");
    Ok(())
}

/// A link with a smaller MTU on the path to an external backup: the router's ICMP error reaches the client, quotes
/// the packet as the client sent it, and the transfer goes on in smaller packets.
#[test]
fn a_smaller_mtu_on_the_way_is_found() -> Result<()> {
    let mut lab = Lab::new(Checks::Fast)?;
    add_vip_routes(&lab)?;
    let (lan, node) = (lab.world.lan().clone(), lab.world.node(0).ns().clone());
    let outside: [(IpAddr, &str); 2] = [("172.31.0.50".parse()?, "/32"), ("fd31::50".parse()?, "/128")];
    for (ip, prefix) in outside {
        let address = format!("{ip}{prefix}");
        lan.ip(&["addr", "add", &address, "dev", "br0", "nodad"])?;
        node.ip(&["route", "add", &address, "dev", "eth0", "mtu", "lock", "1300"])?;
    }
    let text = service(&lab, IPERF, false, outside.map(|(ip, _)| ip), "");
    lab.agent.write_config("", &format!("services:\n{text}"))?;
    lab.agent.start()?;
    let _server = spawn(lan.command("iperf3").args(["-s", "-p", &IPERF.to_string()]))?;
    wait_for("iperf3", LONG, || listens(&lan, IPERF))?;
    for vip in VIPS {
        let known = || lab.client.ns.output("ip", &["route", "get", vip]);
        ensure!(!known()?.contains("mtu 1300"), "{}", known()?);
        let port = IPERF.to_string();
        lab.client.ns.output("iperf3", &["-c", vip, "-p", &port, "-n", "4M", "--connect-timeout", "3000"])?;
        ensure!(known()?.contains("mtu 1300"), "the client did not learn the MTU: {}", known()?);
    }
    assert!(lab.agent.service(&format!("port-{IPERF}"))?.counters.icmp_errors >= 2);
    Ok(())
}

/// Long streams in both directions survive state changes of the breaker and the agent's death.
#[test]
fn long_streams_go_on_over_flips_and_the_agents_death() -> Result<()> {
    let mut lab = Lab::new(Checks::Fast)?;
    add_vip_routes(&lab)?;
    let pod = lab.backup.pod.clone();
    let backups = [IpAddr::V4(pod.address), IpAddr::V6(pod.address6)];
    let text = service(&lab, ECHO, false, backups, "");
    lab.agent.write_config("", &format!("services:\n{text}"))?;
    lab.agent.start()?;
    let listener = pod.ns.enter(|| TcpListener::bind(("::", ECHO)))??;
    std::thread::spawn(move || {
        for stream in listener.incoming().flatten() {
            std::thread::spawn(move || echo(&stream));
        }
    });
    let streams = VIPS.map(|vip| Stream::open(&lab.client.ns, SocketAddr::new(vip.parse().unwrap(), ECHO)));
    let go_on = |when: &str| -> Result<()> {
        for stream in &streams {
            let before = stream.lines.load(Ordering::SeqCst);
            wait_for(&format!("a stream to continue: {when}"), LONG, || {
                stream.lines.load(Ordering::SeqCst) > before + 20
            })?;
        }
        Ok(())
    };
    go_on("open")?;
    lab.agent.kill()?;
    go_on("no agent")?;
    lab.agent.start()?;
    go_on("another agent")?;
    let name = format!("port-{ECHO}");
    for (word, state) in
        [("ForceClosed", BreakerState::Closed), ("ForceOpen", BreakerState::Open), ("Auto", BreakerState::Closed)]
    {
        lab.agent.write_config("", &format!("services:\n{}", text.replace("ForceOpen", word)))?;
        lab.agent.wait_state(&name, state, LONG)?;
        go_on(word)?;
    }
    for stream in streams {
        stream.end()?;
    }
    Ok(())
}

fn echo(stream: &TcpStream) -> std::io::Result<()> {
    let mut line = String::new();
    let mut reader = BufReader::new(stream);
    while reader.read_line(&mut line)? > 0 {
        let mut writer = stream;
        writer.write_all(line.as_bytes())?;
        line.clear();
    }
    Ok(())
}

/// A client that sends a line every few milliseconds and expects it back.
struct Stream {
    lines: Arc<AtomicU64>,
    stop: Arc<AtomicBool>,
    thread: std::thread::JoinHandle<Result<std::io::Result<()>>>,
}

impl Stream {
    fn open(ns: &NetNs, target: SocketAddr) -> Self {
        let (lines, stop) = (Arc::new(AtomicU64::new(0)), Arc::new(AtomicBool::new(false)));
        let (counted, stopped) = (lines.clone(), stop.clone());
        let talk = move || -> std::io::Result<()> {
            let stream = TcpStream::connect_timeout(&target, Duration::from_secs(5))?;
            stream.set_read_timeout(Some(Duration::from_secs(5)))?;
            let (mut reader, mut line) = (BufReader::new(&stream), String::new());
            while !stopped.load(Ordering::SeqCst) {
                let said = format!("line {}\n", counted.load(Ordering::SeqCst));
                (&stream).write_all(said.as_bytes())?;
                line.clear();
                reader.read_line(&mut line)?;
                if line != said {
                    return Err(std::io::Error::other(format!("received {line:?} for {said:?}")));
                }
                counted.fetch_add(1, Ordering::SeqCst);
                std::thread::sleep(Duration::from_millis(2));
            }
            Ok(())
        };
        Self { lines, stop, thread: ns.thread(talk).unwrap() }
    }

    fn end(self) -> Result<()> {
        self.stop.store(true, Ordering::SeqCst);
        Ok(self.thread.join().unwrap()??)
    }
}
