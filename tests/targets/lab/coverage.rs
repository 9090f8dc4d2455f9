//! Which interfaces are covered, which are not, and that both are said: devices of every kind.

use std::{fmt::Write as _, fs, io::Write as _, path::Path, process::Stdio};

use anyhow::{Context as _, Result};
use breaker_agent::datapath::sys::has_tcx;
use breaker_tests::lab::{
    netns::NetNs,
    stage::{Checks, Lab},
    wait_for,
    world::Pod,
};
use serde_json::json;

use crate::{LONG, start_healthy_lab, text, wait_all_up};

/// TRIALS B1: with clsact, an ingress qdisc of somebody else has the place. The pod gets no programs, and all others do.
#[test]
fn an_ingress_qdisc_leaves_no_place_for_clsact() -> Result<()> {
    let mut lab = Lab::new(Checks::Fast)?;
    let node = lab.world.node(0).ns().clone();
    let veth = lab.client.veth.clone();
    node.output("tc", &["qdisc", "add", "dev", &veth, "ingress"])?;
    lab.agent.write_config("  attach: Clsact\n", &lab.services(Checks::Fast, "    override: ForceOpen\n"))?;
    lab.agent.start()?;
    wait_all_up(&lab)?;
    let status = lab.agent.status()?.datapath;
    let why = status.failed_interfaces.get(&veth).context("a reason")?;
    assert!(why.contains("ingress") && why.contains("bandwidth"), "{why}");
    assert_eq!(status.interfaces.len(), 2, "{:?}", status.interfaces);
    let filters = node.output("tc", &["filter", "show", "dev", &veth, "ingress"])?;
    assert!(!filters.contains("breaker"), "{filters}");
    assert_eq!(lab.ask()?.pod(), Some(lab.primary.address().to_string().as_str()), "the client is left to kube-proxy");
    // The qdisc goes, and the pod gets its programs.
    node.output("tc", &["qdisc", "del", "dev", &veth, "ingress"])?;
    wait_for("the programs", LONG, || lab.ask().is_ok_and(|a| a.pod() == Some(&lab.backup.address().to_string())))
}

/// TRIALS B1: the CNI plugin bandwidth limits a pod's rates by qdiscs of its own: `tbf`, and `ingress` with a redirect to an
/// ifb device. With clsact, this pod gets no programs; with tcx, it gets them. The plugin's rules stay in both cases.
#[test]
fn the_bandwidth_plugin_keeps_its_qdiscs() -> Result<()> {
    let mut lab = Lab::with(Checks::Fast, "    override: ForceOpen\n")?;
    let node = lab.world.node(0).ns().clone();
    let veth = lab.client.veth.clone();
    run_bandwidth_plugin(&node, &lab.client)?;
    let rules = || -> Result<String> {
        let qdiscs = node.output("tc", &["qdisc", "show", "dev", &veth])?;
        let filters = node.output("tc", &["filter", "show", "dev", &veth, "ingress"])?;
        assert!(
            qdiscs.contains("tbf") && qdiscs.contains("ingress") && filters.contains("mirred"),
            "{qdiscs}{filters}"
        );
        Ok(format!("{qdiscs}{filters}"))
    };
    let before = rules()?;
    lab.agent.start()?;
    wait_all_up(&lab)?;
    let status = lab.agent.status()?.datapath;
    let why = status.failed_interfaces.get(&veth);
    if has_tcx() {
        assert_eq!(why, None);
        assert_eq!(lab.ask()?.pod(), Some(lab.backup.address().to_string().as_str()));
    } else {
        assert!(why.is_some_and(|why| why.contains("ingress") && why.contains("bandwidth")), "{why:?}");
        assert_eq!(lab.ask()?.pod(), Some(lab.primary.address().to_string().as_str()), "left to kube-proxy");
    }
    assert_eq!(rules()?, before);
    Ok(())
}

/// Runs the bandwidth plugin for a pod's interface, as a container runtime does (CNI specification 0.4.0).
fn run_bandwidth_plugin(node: &NetNs, pod: &Pod) -> Result<()> {
    let installed = Path::new("/usr/lib/cni/bandwidth");
    let program = if installed.exists() { installed } else { Path::new("bandwidth") };
    let namespace = pod.ns.path();
    let input = json!({
        "cniVersion": "0.4.0", "name": "lab", "type": "bandwidth",
        "runtimeConfig": { "bandwidth": {
            "ingressRate": 100_000_000, "ingressBurst": 10_000_000,
            "egressRate": 100_000_000, "egressBurst": 10_000_000,
        } },
        "prevResult": {
            "cniVersion": "0.4.0",
            "interfaces": [{ "name": pod.veth }, { "name": "eth0", "sandbox": namespace }],
            "ips": [{ "version": "4", "interface": 1, "address": format!("{}/24", pod.address) }],
        },
    });
    let mut plugin = node
        .command(program)
        .env("CNI_COMMAND", "ADD")
        .env("CNI_CONTAINERID", "lab")
        .env("CNI_NETNS", namespace)
        .env("CNI_IFNAME", "eth0")
        .env("CNI_PATH", "/usr/lib/cni")
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .spawn()
        .context("start the bandwidth plugin")?;
    plugin.stdin.take().context("no standard input")?.write_all(input.to_string().as_bytes())?;
    let output = plugin.wait_with_output()?;
    anyhow::ensure!(output.status.success(), "the bandwidth plugin: {}", text(&output.stdout));
    Ok(())
}

/// TRIALS C1, C4: a device without an Ethernet header, an alternative name, and a pattern without a device.
#[test]
fn what_is_not_covered_is_named() -> Result<()> {
    let mut lab = Lab::new(Checks::Fast)?;
    let node = lab.world.node(0).ns().clone();
    node.ip(&["tuntap", "add", "dev", "tun0", "mode", "tun"])?;
    node.ip(&["link", "set", "tun0", "up"])?;
    node.ip(&["link", "add", "extra0", "type", "veth", "peer", "name", "extra1"])?;
    node.ip(&["link", "property", "add", "dev", "extra0", "altname", "enp9s0"])?;
    let agent = "  veths: false\n  interfaces: ['tun*', 'enp*', 'wlan*']\n";
    lab.agent.write_config(agent, &lab.services(Checks::Fast, ""))?;
    lab.agent.start()?;
    let status = lab.agent.status()?.datapath;
    assert_eq!(status.interfaces, ["extra0"]);
    assert!(status.failed_interfaces.get("tun0").is_some_and(|why| why.contains("Ethernet")), "{status:?}");
    assert!(status.notes.iter().any(|note| note.contains("wlan*")), "{:?}", status.notes);
    let shown = text(&lab.agent.cli(&["status"])?.stdout);
    assert!(shown.contains("wlan*") && shown.contains("tun0"), "{shown}");
    Ok(())
}

/// TRIALS C7: while many interfaces wait for their programs, the agent answers and says how many.
#[test]
fn the_agent_answers_while_many_interfaces_wait() -> Result<()> {
    const PODS: usize = 100;
    let lab = start_healthy_lab("")?;
    let node = lab.world.node(0).ns().clone();
    let lan = lab.world.lan().name().to_owned();
    let mut batch = String::new();
    for number in 0..PODS {
        writeln!(batch, "link add vethc{number:07x} type veth peer name p{number} netns {lan}")?;
    }
    node.ip_batch(&batch)?;
    let mut waiting = 0;
    wait_for("all to have programs", LONG, || {
        let Ok(status) = lab.agent.status() else { return false };
        waiting = waiting.max(status.datapath.waiting_interfaces.len());
        status.datapath.interfaces.len() == PODS + 3
    })?;
    assert!(waiting > 0, "the status said that some wait");
    Ok(())
}

/// TRIALS C2: pods behind netkit devices (Linux 6.7), also with the fast path.
#[test]
fn pods_behind_netkit_devices_are_pods() -> Result<()> {
    let mut lab = Lab::with(Checks::Fast, "    override: ForceOpen\n")?;
    let node = lab.world.node(0).ns().clone();
    let pod = lab.client.ns.clone();
    pod.ip(&["link", "set", "eth0", "down"])?;
    pod.ip(&["link", "set", "eth0", "name", "old0"])?;
    if !add_netkit(&node, "nk0", &pod, "nk1")? {
        eprintln!("skipped: the kernel has no netkit devices");
        return Ok(());
    }
    // Not of the bridge's subnet: the other pods reach it by the node's routes.
    let address = "10.42.77.4";
    node.ip(&["link", "set", "nk0", "up"])?;
    pod.ip(&["link", "set", "nk1", "name", "eth0"])?;
    pod.ip(&["addr", "flush", "dev", "old0"])?;
    pod.ip(&["addr", "add", &format!("{address}/32"), "dev", "eth0"])?;
    pod.ip(&["link", "set", "eth0", "up"])?;
    pod.ip(&["route", "replace", "default", "dev", "eth0"])?;
    node.ip(&["route", "add", &format!("{address}/32"), "dev", "nk0"])?;
    lab.agent.start()?;
    wait_all_up(&lab)?;
    let status = lab.agent.status()?.datapath;
    assert!(status.interfaces.contains(&"nk0".to_owned()), "{status:?}");
    assert_eq!(lab.ask()?.pod(), Some(lab.backup.address().to_string().as_str()));
    Ok(())
}

/// Creates a pair of netkit devices in layer 3 mode; the peer is in a pod's namespace. Returns whether the kernel can.
fn add_netkit(node: &NetNs, name: &'static str, pod: &NetNs, peer: &'static str) -> Result<bool> {
    let peer_namespace = fs::File::open(pod.path())?;
    let made = node.enter(move || -> Result<(), rtnetlink::Error> {
        let runtime = tokio::runtime::Builder::new_current_thread()
            .enable_all()
            .build()
            .map_err(|_| rtnetlink::Error::RequestFailed)?;
        runtime.block_on(async {
            let (connection, handle, _) = rtnetlink::new_connection().map_err(|_| rtnetlink::Error::RequestFailed)?;
            tokio::spawn(connection);
            let pair = rtnetlink::LinkNetkit::new(name, peer, rtnetlink::packet_route::link::NetkitMode::L3);
            handle.link().add(pair.build()).execute().await?;
            let mut found = handle.link().get().match_name(peer.to_owned()).execute();
            let link =
                futures_util::TryStreamExt::try_next(&mut found).await?.ok_or(rtnetlink::Error::RequestFailed)?;
            let moved = rtnetlink::LinkUnspec::new_with_index(link.header.index)
                .setns_by_fd(std::os::fd::AsRawFd::as_raw_fd(&peer_namespace));
            handle.link().set(moved.build()).execute().await
        })
    })?;
    match made {
        Ok(()) => Ok(true),
        Err(rtnetlink::Error::NetlinkError(error)) if error.raw_code() == -libc::EOPNOTSUPP => Ok(false),
        Err(error) => Err(error.into()),
    }
}
