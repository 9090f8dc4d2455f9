//! Clients outside that come in by other devices than a plain uplink: a VLAN, a bond. A device that the kernel does
//! not know is left out.

use std::net::SocketAddr;

use anyhow::Result;
use breaker_tests::lab::{
    netns::NetNs,
    stage::{Checks, Lab, SERVICE},
};

use crate::{is_alive, wait_all_up};

/// Address of the client.
const CLIENT: &str = "192.0.2.9";
/// Addresses of the two ends of the link between the client's namespace and the node.
const FAR: &str = "172.33.0.1";
const NEAR: &str = "172.33.0.11";
/// The configuration of the agent. The second uplink is a veth like those of pods, so pods get no programs.
const AGENT: &str = "  veths: false\n  uplinks: true\n";

/// A lab with more links between the client's namespace and the node. The client's ends are named `far0`, `far1`, …, and
/// the node's `near0`, `near1`, …
fn lab_with_links(links: usize) -> Result<(Lab, NetNs, NetNs)> {
    let lab = Lab::new(Checks::Fast)?;
    let (lan, node) = (lab.world.lan().clone(), lab.world.node(0).ns().clone());
    for link in 0..links {
        let (far, near) = (format!("far{link}"), format!("near{link}"));
        lan.ip(&["link", "add", &far, "type", "veth", "peer", "name", &near, "netns", node.name()])?;
    }
    lan.ip(&["addr", "add", &format!("{CLIENT}/32"), "dev", "lo"])?;
    Ok((lab, lan, node))
}

/// Gives the ends of the way between client and node their addresses, and the client a route to the VIPs.
fn connect(lan: &NetNs, far: &str, node: &NetNs, near: &str) -> Result<()> {
    for (ns, device, address) in [(lan, far, FAR), (node, near, NEAR)] {
        ns.ip(&["addr", "add", &format!("{address}/24"), "dev", device])?;
        ns.ip(&["link", "set", device, "up"])?;
    }
    lan.ip(&["route", "add", "10.43.0.0/24", "via", NEAR, "src", CLIENT])
}

/// Gives the node a default route that makes a device an uplink, and a route to the client.
fn add_routes(node: &NetNs, device: &str) -> Result<()> {
    for (to, metric) in [("default", "900"), (CLIENT, "0")] {
        node.ip(&["route", "add", to, "via", FAR, "dev", device, "metric", metric])?;
    }
    Ok(())
}

/// kube-proxy serves the client while the breaker is closed, and the backup while it is open, on both paths.
fn is_served_on_every_path(lab: &mut Lab, lan: &NetNs) -> Result<()> {
    let vip = SocketAddr::V4(lab.vip);
    lab.agent.write_config(AGENT, &lab.services(Checks::Fast, ""))?;
    lab.agent.start()?;
    wait_all_up(lab)?;
    assert!(is_alive(lan, vip)?, "closed: kube-proxy serves the client");
    for path in ["", "    fastPath: PeerRedirect\n"] {
        lab.agent.stop()?;
        let services = lab.services(Checks::Fast, &format!("    override: ForceOpen\n{path}"));
        lab.agent.write_config(AGENT, &services)?;
        lab.agent.start()?;
        wait_all_up(lab)?;
        let before = lab.agent.service(SERVICE)?.counters.moved;
        for attempt in 0..5 {
            assert!(is_alive(lan, vip)?, "open, {path:?}, {attempt}: {:?}", lab.agent.status()?.datapath);
        }
        let now = lab.agent.service(SERVICE)?.counters.moved;
        assert_eq!(now - before, 5, "{path:?}: {:?}", lab.agent.status()?.datapath);
    }
    Ok(())
}

/// Whether the kernel has this type of device. `add` is the rest of `ip link add`.
fn can_add(ns: &NetNs, add: &[&str]) -> bool {
    let added = ns.ip(&[&["link", "add"], add].concat()).is_ok();
    if !added {
        eprintln!("skipped: the kernel cannot add {}", add.join(" "));
    }
    added
}

/// TRIALS B6: a VLAN on the uplink.
#[test]
fn clients_behind_a_vlan_are_served() -> Result<()> {
    let (mut lab, lan, node) = lab_with_links(1)?;
    if !can_add(&lan, &["link", "far0", "name", "far0.10", "type", "vlan", "id", "10"]) {
        return Ok(());
    }
    node.ip(&["link", "add", "link", "near0", "name", "near0.10", "type", "vlan", "id", "10"])?;
    lan.ip(&["link", "set", "far0", "up"])?;
    node.ip(&["link", "set", "near0", "up"])?;
    connect(&lan, "far0.10", &node, "near0.10")?;
    add_routes(&node, "near0.10")?;
    is_served_on_every_path(&mut lab, &lan)
}

/// A bond of two devices is the uplink.
#[test]
fn clients_behind_a_bond_are_served() -> Result<()> {
    let (mut lab, lan, node) = lab_with_links(2)?;
    for (ns, end) in [(&lan, "far"), (&node, "near")] {
        if !can_add(ns, &["bond0", "type", "bond", "mode", "balance-rr"]) {
            return Ok(());
        }
        for port in ["0", "1"] {
            ns.ip(&["link", "set", &format!("{end}{port}"), "master", "bond0"])?;
        }
    }
    connect(&lan, "bond0", &node, "bond0")?;
    add_routes(&node, "bond0")?;
    is_served_on_every_path(&mut lab, &lan)
}
