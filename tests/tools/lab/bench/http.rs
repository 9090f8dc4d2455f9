//! HTTP through the lab: breaker closed and open, compared with kube-proxy's rules alone and with HAProxy as the
//! ambassador.
//!
//! Client, servers and proxy share one CPU, so that requests per second are the inverse of the cost of the whole path.

use breaker_common::BreakerState;
use std::{
    net::SocketAddrV4,
    process::{Child, Stdio},
    time::{Duration, Instant},
};

use anyhow::{Context as _, Result};
use breaker_tests::lab::{
    client::Connection,
    kubeproxy,
    netns::{self, NetNs},
    service::ServicePod,
    stage::{Checks, Lab, entry},
    wait_for,
};

use super::{CPU, Row, pairs, pin_thread};

const SLICE: Duration = Duration::from_millis(200);

/// How clients use connections.
#[derive(Clone, Copy)]
pub(super) enum Style {
    /// Eight clients, each with one connection for all its requests.
    KeepAlive,
    /// Eight clients, with a new connection for each request.
    New,
    /// One client with one connection for all its requests.
    One,
}

impl Style {
    const fn name(self) -> &'static str {
        match self {
            Self::KeepAlive => "keep-alive",
            Self::New => "new connections",
            Self::One => "one connection",
        }
    }
}

/// HAProxy as the ambassador, in a pod of its own. Dropping it kills HAProxy.
pub(super) struct Ambassador {
    child: Child,
    /// Address and port of the proxy.
    pub address: SocketAddrV4,
}

impl Drop for Ambassador {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

impl Ambassador {
    /// Starts HAProxy in TCP mode in front of the lab's primary and backup. `check` is the rest of its `default-server`
    /// line.
    pub(super) fn start(lab: &mut Lab, check: &str) -> Result<Self> {
        Self::start_with(lab, "haproxy", check, "")
    }

    /// Like [`Ambassador::start`], in a pod named `pod`, with more lines for the section `listen`.
    pub(super) fn start_with(lab: &mut Lab, pod: &str, check: &str, more: &str) -> Result<Self> {
        let config = lab.world.dir().join(format!("{pod}.cfg"));
        let pod = lab.world.node_mut(0).add_pod(pod)?;
        let text = format!(
            "global\n  maxconn 2000\n  nbthread 1\n\
             defaults\n  mode tcp\n  timeout connect 1s\n  timeout client 60s\n  timeout server 60s\n\
             listen dummy\n  bind :8080\n  option httpchk GET /ready\n{more}  default-server {check}\n\
             \x20 server primary {} check on-marked-down shutdown-sessions\n  server backup {} check backup\n",
            lab.primary.address(),
            lab.backup.address()
        );
        std::fs::write(&config, text).context("write haproxy.cfg")?;
        let child = pod
            .ns
            .command("haproxy")
            .arg("-f")
            .arg(&config)
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .spawn()
            .context("start haproxy")?;
        let address = SocketAddrV4::new(pod.address, 8080);
        let ambassador = Self { child, address };
        wait_for("haproxy to answer", Duration::from_secs(10), || lab.ask_at(address).is_ok_and(|o| o.is_success()))?;
        Ok(ambassador)
    }

    pub(super) fn pin(&self) -> Result<()> {
        pin_process(self.child.id())
    }
}

pub(super) fn rows() -> Result<Vec<Row>> {
    // Without breaker: a Service with kube-proxy's rules alone, and one in front of an ambassador.
    let mut plain = Lab::new(Checks::Default)?;
    let proxy = Ambassador::start(&mut plain, "inter 3s fall 1 rise 1")?;
    let proxy_vip = kubeproxy::vip(5);
    let service = kubeproxy::Service {
        name: "ambassador".into(),
        vip: proxy_vip,
        endpoints: vec![proxy.address],
        protocols: &["tcp"],
    };
    kubeproxy::add_service(plain.world.node(0).ns(), &service)?;
    proxy.pin()?;
    // With breaker: one closed service, and two that are open because nothing has the address of their primary.
    let mut lab = Lab::new(Checks::Default)?;
    let open_vip = kubeproxy::vip(3);
    let nobody = SocketAddrV4::new(std::net::Ipv4Addr::new(10, 42, 1, 250), 80);
    let fast_vip = kubeproxy::vip(4);
    let open = entry("open", open_vip, nobody, lab.backup.address(), Checks::Default, "");
    let fast = "    fastPath: PeerRedirect\n";
    let fast = entry("fast", fast_vip, nobody, lab.backup.address(), Checks::Default, fast);
    lab.agent.write_config("  uplinks: true\n", &format!("{}{open}{fast}", lab.services(Checks::Default, "")))?;
    lab.agent.start()?;
    lab.agent.wait_state("open", BreakerState::Open, Duration::from_secs(20))?;
    wait_for("the fast service to be open, with its backup known as local", Duration::from_secs(20), || {
        lab.agent.service("fast").is_ok_and(|s| s.state == BreakerState::Open && s.tiers[1].backends[0].local)
    })?;
    for lab in [&plain, &lab] {
        settle(lab)?;
        // Route a client outside to the VIPs by the node.
        let node = lab.world.node(0).address().to_string();
        lab.world.lan().ip(&["route", "add", kubeproxy::VIPS, "via", &node])?;
    }
    let mut rows = Vec::new();
    for style in [Style::KeepAlive, Style::New, Style::One] {
        let kube = || slice(&plain.client.ns, plain.vip, style);
        let closed = || slice(&lab.client.ns, lab.vip, style);
        let open = || slice(&lab.client.ns, open_vip, style);
        let fast = || slice(&lab.client.ns, fast_vip, style);
        let haproxy = || slice(&plain.client.ns, proxy_vip, style);
        let aims = |keep_alive, new| match style {
            Style::KeepAlive => keep_alive,
            Style::New => new,
            Style::One => "",
        };
        rows.push(compare("closed", style, "kube-proxy alone", aims("≥ 0.97", "≥ 0.95"), closed, kube)?);
        rows.push(compare("open", style, "kube-proxy alone", "≥ 0.92", open, kube)?);
        rows.push(compare("open", style, "HAProxy, mode tcp", aims("≥ 1.4", "≥ 1.2"), open, haproxy)?);
        rows.push(compare("open, PeerRedirect", style, "kube-proxy alone", "≥ 1.2", fast, kube)?);
        rows.push(compare("open, PeerRedirect", style, "HAProxy, mode tcp", aims("≥ 2", "≥ 1.6"), fast, haproxy)?);
        let kube = || slice(plain.world.lan(), plain.vip, style);
        let closed = || slice(lab.world.lan(), lab.vip, style);
        let open = || slice(lab.world.lan(), open_vip, style);
        let fast = || slice(lab.world.lan(), fast_vip, style);
        rows.push(compare("from outside, closed", style, "kube-proxy alone", "", closed, kube)?);
        rows.push(compare("from outside, open", style, "kube-proxy alone", "", open, kube)?);
        rows.push(compare("from outside, open, PeerRedirect", style, "kube-proxy alone", "", fast, kube)?);
    }
    Ok(rows)
}

/// Pins the servers to the shared CPU, and turns TIME_WAIT sockets off, so that ports are free again at once: see
/// docs/BENCHMARKS.md.
pub(super) fn settle(lab: &Lab) -> Result<()> {
    for pod in [&lab.primary, &lab.backup] {
        pin_service(pod)?;
        pod.pod.ns.sysctl(&["net.ipv4.tcp_max_tw_buckets=0"])?;
    }
    for client in [&lab.client.ns, lab.world.lan()] {
        client.sysctl(&["net.ipv4.tcp_max_tw_buckets=0"])?;
    }
    Ok(())
}

fn pin_process(pid: u32) -> Result<()> {
    netns::run(std::process::Command::new("taskset").args(["-a", "-c", "-p", &CPU.to_string(), &pid.to_string()]))
}

fn pin_service(service: &ServicePod) -> Result<()> {
    pin_process(service.pid().context("the service is not running")?)
}

fn compare(
    what: &str,
    style: Style,
    base: &str,
    aim: &'static str,
    ours: impl Fn() -> Result<f64>,
    theirs: impl Fn() -> Result<f64>,
) -> Result<Row> {
    pairs(format!("http: {what}, {}", style.name()), "req/s", base, aim, ours, theirs)
}

/// Requests per second during one slice, from a client's namespace.
pub(super) fn slice(client: &NetNs, target: SocketAddrV4, style: Style) -> Result<f64> {
    client.enter(move || -> Result<f64> {
        pin_thread()?;
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().context("build a runtime")?;
        runtime.block_on(async move {
            let clients = if matches!(style, Style::One) { 1 } else { 8 };
            let new = matches!(style, Style::New);
            let started = Instant::now();
            let tasks: Vec<_> = (0..clients).map(|_| tokio::spawn(ask_until(target, new, started + SLICE))).collect();
            let mut count = 0.0;
            for task in tasks {
                count += task.await.context("wait for a client")??;
            }
            Ok(count / started.elapsed().as_secs_f64())
        })
    })?
}

async fn ask_until(target: SocketAddrV4, new: bool, end: Instant) -> Result<f64> {
    const LIMIT: Duration = Duration::from_secs(5);
    let mut count = 0.0;
    let mut connection = None;
    while Instant::now() < end {
        let mut current = match connection.take() {
            Some(current) => current,
            None => Connection::open(target).await.with_context(|| format!("connect to {target}"))?,
        };
        let outcome = current.ask(!new, LIMIT).await;
        anyhow::ensure!(outcome.is_success(), "{target}: {outcome}");
        count += 1.0;
        if !new {
            connection = Some(current);
        }
    }
    Ok(count)
}
