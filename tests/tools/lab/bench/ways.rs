//! Cost of a packet's whole path through the lab, without HTTP: bulk transfers (iperf3) and small datagrams.
//!
//! Sender, receiver and everything between them share one CPU, so that a rate is the inverse of the path's cost.

use breaker_api::status::Health;
use std::{
    fmt::Write as _,
    net::{SocketAddrV4, UdpSocket},
    process::{Child, Stdio},
    time::{Duration, Instant},
};

use anyhow::{Context as _, Result, ensure};
use breaker_tests::lab::{
    kubeproxy,
    netns::NetNs,
    stage::{Checks, Lab},
    wait_for,
};
use serde_json::Value;

use super::{CPU, Row, pairs, pin_thread};

const SLICE: Duration = Duration::from_millis(200);
/// iperf3's own port. The datagrams use the same number.
const PORT: u16 = 5201;

/// Path between a client and a server.
#[derive(Clone, Copy)]
enum Way {
    /// A cluster IP, with kube-proxy's rules alone.
    KubeProxy,
    /// The pod's own address, over a bridge without netfilter.
    Bridge,
    /// breaker, closed.
    Closed,
    /// breaker, open, through the host network stack.
    Open,
    /// breaker, open, on the fast path: from veth to veth.
    Fast,
}

impl Way {
    const fn name(self) -> &'static str {
        match self {
            Self::KubeProxy => "kube-proxy alone",
            Self::Bridge => "a bare bridge",
            Self::Closed => "closed",
            Self::Open => "open",
            Self::Fast => "open, PeerRedirect",
        }
    }
}

/// Three labs: with breaker, with kube-proxy's rules alone, and with nothing but the bridge.
struct Ways {
    ours: Lab,
    plain: Lab,
    bare: Lab,
    servers: Vec<Child>,
    _sinks: Vec<UdpSocket>,
}

const fn vip(index: u8) -> SocketAddrV4 {
    SocketAddrV4::new(std::net::Ipv4Addr::new(10, 43, 0, index), PORT)
}

impl Ways {
    fn new() -> Result<Self> {
        let mut ours = Lab::new(Checks::Default)?;
        let plain = Lab::new(Checks::Default)?;
        let bare = Lab::new(Checks::Default)?;
        let node = bare.world.node(0).ns();
        node.sysctl(&["net.bridge.bridge-nf-call-iptables=0"])?;
        for table in ["nat", "filter"] {
            node.output("iptables", &["-t", table, "-F"])?;
        }
        let (primary, backup) = (*ours.primary.address().ip(), *ours.backup.address().ip());
        let mut services = ours.services(Checks::Default, "");
        for (way, more) in [(Way::Closed, ""), (Way::Open, FORCED), (Way::Fast, FAST)] {
            let vip = vip(way as u8);
            let protocols = &["tcp", "udp"];
            let endpoints = vec![SocketAddrV4::new(primary, PORT)];
            let service = kubeproxy::Service { name: format!("way{}", way as u8), vip, endpoints, protocols };
            kubeproxy::add_service(ours.world.node(0).ns(), &service)?;
            let _ = write!(
                services,
                "  - name: way-{}\n    frontends:\n      - {{address: {ip}, port: {PORT}}}\n      \
                 - {{address: {ip}, port: {PORT}, protocol: UDP}}\n    \
                 primary: {{backends: [{{address: {primary}, port: {PORT}}}]}}\n    \
                 backups:\n      - backends: [{{address: {backup}, port: {PORT}}}]\n        \
                 check: {{httpGet: {{port: 80, path: /ready}}}}\n{more}",
                way as u8,
                ip = vip.ip(),
            );
        }
        let endpoints = vec![SocketAddrV4::new(*plain.backup.address().ip(), PORT)];
        let (vip, protocols) = (vip(Way::KubeProxy as u8), &["tcp", "udp"]);
        let service = kubeproxy::Service { name: "way".into(), vip, endpoints, protocols };
        kubeproxy::add_service(plain.world.node(0).ns(), &service)?;
        ours.agent.write_config("", &services)?;
        ours.agent.start()?;
        wait_for("the backups to be Up, and the fast one known as local", Duration::from_secs(20), || {
            let named = |way: Way| ours.agent.service(&format!("way-{}", way as u8));
            named(Way::Open).is_ok_and(|s| s.tiers[1].backends[0].health == Health::Up)
                && named(Way::Fast).is_ok_and(|s| s.tiers[1].backends[0].local)
        })?;
        let mut servers = Vec::new();
        let mut sinks = Vec::new();
        for lab in [&ours, &plain, &bare] {
            for pod in [&lab.primary.pod, &lab.backup.pod] {
                servers.push(iperf_server(&pod.ns)?);
                sinks.push(pod.ns.enter(sink)??);
            }
        }
        Ok(Self { ours, plain, bare, servers, _sinks: sinks })
    }

    /// Namespaces of the client and of the server, and the address and port that the client connects to.
    fn ends(&self, way: Way) -> (&NetNs, &NetNs, SocketAddrV4) {
        let lab = match way {
            Way::KubeProxy => &self.plain,
            Way::Bridge => &self.bare,
            _ => &self.ours,
        };
        let target = match way {
            Way::Bridge => SocketAddrV4::new(*lab.backup.address().ip(), PORT),
            _ => vip(way as u8),
        };
        let pod = if matches!(way, Way::Closed) { &lab.primary.pod } else { &lab.backup.pod };
        (&lab.client.ns, &pod.ns, target)
    }

    /// Throughput of one connection, in Gbit/s.
    fn bulk(&self, way: Way) -> Result<f64> {
        let (client, _, target) = self.ends(way);
        let ip = target.ip().to_string();
        let cpu = CPU.to_string();
        let args = ["-c", &cpu, "iperf3", "-J", "-c", &ip, "-p", "5201", "-t", "1", "-O", "0"];
        let text = client.output("taskset", &args)?;
        let report: Value = serde_json::from_str(&text).context("parse the output of iperf3")?;
        let rate = report["end"]["sum_received"]["bits_per_second"].as_f64();
        Ok(rate.with_context(|| format!("iperf3 reported no rate: {}", report["error"]))? / 1e9)
    }

    /// Datagrams of 32 bytes that arrive per second. No process reads them, so that reading is not part of the cost.
    fn datagrams(&self, way: Way) -> Result<f64> {
        let (client, server, target) = self.ends(way);
        let before = arrived(server)?;
        let (sent, took) = client.enter(move || -> Result<(u64, Duration)> {
            pin_thread()?;
            let socket = UdpSocket::bind(("0.0.0.0", 0)).context("open a socket")?;
            socket.connect(target).context("connect to the server")?;
            let started = Instant::now();
            let mut sent = 0;
            while started.elapsed() < SLICE {
                for _ in 0..64 {
                    socket.send(&[0; 32]).context("send a datagram")?;
                    sent += 1;
                }
            }
            Ok((sent, started.elapsed()))
        })??;
        // The last datagrams may still be on their path.
        let mut came = 0;
        let _ = wait_for("the last datagrams", Duration::from_secs(1), || {
            came = arrived(server).map_or(0, |now| now - before);
            came >= sent
        });
        ensure!(came * 100 >= sent * 99, "{}: of {sent} datagrams only {came} arrived", way.name());
        #[expect(clippy::cast_precision_loss, reason = "far below 2^52")]
        let rate = came as f64 / took.as_secs_f64();
        Ok(rate)
    }
}

const FORCED: &str = "    override: ForceOpen\n";
const FAST: &str = "    override: ForceOpen\n    fastPath: PeerRedirect\n";

/// Opens a socket and fills its receive buffer: the kernel counts datagrams that arrive later, and drops them.
fn sink() -> std::io::Result<UdpSocket> {
    let sink = UdpSocket::bind(("0.0.0.0", PORT))?;
    let filler = UdpSocket::bind(("127.0.0.1", 0))?;
    for _ in 0..4096 {
        filler.send_to(&[0; 32], ("127.0.0.1", PORT))?;
    }
    Ok(sink)
}

fn iperf_server(ns: &NetNs) -> Result<Child> {
    let server = ns
        .command("taskset")
        .args(["-c", &CPU.to_string(), "iperf3", "-s", "-p", "5201"])
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        .spawn()
        .context("start iperf3")?;
    wait_for("iperf3 to listen", Duration::from_secs(10), || {
        ns.output("ss", &["-Htln", "sport", "=", ":5201"]).is_ok_and(|sockets| !sockets.is_empty())
    })?;
    Ok(server)
}

/// UDP datagrams that a namespace's sockets got (`InDatagrams`) or had no room for (`InErrors`), from /proc/net/snmp.
fn arrived(ns: &NetNs) -> Result<u64> {
    let text = ns.output("cat", &["/proc/net/snmp"])?;
    let line =
        text.lines().filter_map(|line| line.strip_prefix("Udp: ")).nth(1).context("no Udp: in /proc/net/snmp")?;
    let fields: Vec<u64> = line.split(' ').filter_map(|field| field.parse().ok()).collect();
    Ok(fields[0] + fields[2])
}

pub(super) fn rows() -> Result<Vec<Row>> {
    let ways = Ways::new()?;
    let mut rows = Vec::new();
    for (ours, theirs, aim) in [
        (Way::Closed, Way::KubeProxy, "≥ 0.97"),
        (Way::Open, Way::KubeProxy, "≥ 0.95"),
        (Way::Fast, Way::KubeProxy, ""),
    ] {
        let name = format!("ways: {}, bulk", ours.name());
        rows.push(pairs(name, "Gbit/s", theirs.name(), aim, || ways.bulk(ours), || ways.bulk(theirs))?);
    }
    for (ours, theirs, aim) in [
        (Way::Closed, Way::KubeProxy, "≥ 0.92"),
        (Way::Open, Way::KubeProxy, ""),
        (Way::Fast, Way::KubeProxy, "≥ 2"),
        (Way::Fast, Way::Bridge, "≥ 0.95"),
    ] {
        let name = format!("ways: {}, datagrams", ours.name());
        rows.push(pairs(name, "1/s", theirs.name(), aim, || ways.datagrams(ours), || ways.datagrams(theirs))?);
    }
    Ok(rows)
}

impl Drop for Ways {
    fn drop(&mut self) {
        for server in &mut self.servers {
            let _ = server.kill();
            let _ = server.wait();
        }
    }
}
