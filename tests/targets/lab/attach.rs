//! Attaching to interfaces that come, change and go; and the complete removal of the agent's programs.

use std::fs;

use anyhow::{Context as _, Result};
use aya::programs::{SchedClassifier, TcAttachType};
use breaker_agent::datapath::sys::has_tcx;
use breaker_common::BreakerState;
use breaker_tests::lab::{
    client::Plan,
    service::Fault,
    stage::{Checks, Lab, SERVICE},
    wait_for,
};

use crate::{LONG, start_healthy_lab, text, wait_all_up};

#[test]
fn pods_that_come_later_are_found_and_gone_ones_forgotten() -> Result<()> {
    let mut lab = start_healthy_lab("")?;
    lab.primary.inject(Fault::Kill)?;
    lab.agent.wait_state(SERVICE, BreakerState::Open, LONG)?;
    let interfaces = || lab.agent.status().map(|s| s.datapath.interfaces).unwrap_or_default();
    assert_eq!(interfaces().len(), 3);
    let late = lab.world.node_mut(0).add_pod("late")?;
    wait_for("the late pod's veth to have programs", LONG, || {
        lab.agent.status().is_ok_and(|s| s.datapath.interfaces.contains(&late.veth))
    })?;
    let first = std::mem::replace(&mut lab.client, late.clone());
    assert_eq!(lab.ask()?.pod(), Some(lab.backup.address().to_string().as_str()));
    lab.client = first;
    lab.world.node_mut(0).remove_pod(&late)?;
    wait_for("the agent to forget the removed veth", LONG, || {
        lab.agent.status().is_ok_and(|s| s.datapath.interfaces.len() == 3 && s.datapath.failed_interfaces.is_empty())
    })?;
    let links = std::fs::read_dir(lab.agent.pinned("links"))?.count();
    let of_pods = if has_tcx() { 6 } else { 0 };
    assert_eq!(links, of_pods + 9, "two links for each of three pods, and nine for the sockets of the node");
    Ok(())
}

/// Kernels before 6.6 have no tcx. Filters on a clsact qdisc do the same, and survive a restart of the agent.
#[test]
fn clsact_works_as_tcx_does() -> Result<()> {
    let mut lab = Lab::new(Checks::Fast)?;
    lab.agent.write_config("  attach: Clsact\n", &lab.services(Checks::Fast, ""))?;
    lab.agent.start()?;
    wait_all_up(&lab)?;
    lab.primary.inject(Fault::Kill)?;
    lab.agent.wait_state(SERVICE, BreakerState::Open, LONG)?;
    let load = lab.load(Plan::usual(lab.vip))?;
    load.wait("requests", LONG, |records| records.len() > 200)?;
    lab.agent.kill()?;
    lab.agent.start()?;
    load.wait("more requests", LONG, |records| records.len() > 600)?;
    let records = load.stop()?;
    let backup = lab.backup.address().to_string();
    assert!(
        records.iter().all(|r| r.outcome.pod() == Some(&backup)),
        "{:?}",
        breaker_tests::lab::client::summary(&records)
    );
    let filters = || lab.world.node(0).ns().output("tc", &["filter", "show", "dev", &lab.client.veth, "ingress"]);
    assert_eq!(filters()?.matches("handle 0xb4ea").count(), 1, "the restart must replace it: {}", filters()?);
    lab.agent.stop()?;
    assert!(lab.agent.cli(&["cleanup"])?.status.success());
    let qdiscs = lab.world.node(0).ns().output("tc", &["qdisc", "show"])?;
    assert!(!qdiscs.contains("clsact"), "{qdiscs}");
    Ok(())
}

/// Cleanup leaves a clsact qdisc that existed before the agent.
#[test]
fn somebody_elses_qdisc_stays() -> Result<()> {
    let mut lab = Lab::new(Checks::Fast)?;
    lab.agent.write_config("  attach: Clsact\n", &lab.services(Checks::Fast, ""))?;
    lab.world.node(0).ns().output("tc", &["qdisc", "add", "dev", &lab.client.veth, "clsact"])?;
    lab.agent.start()?;
    lab.agent.stop()?;
    assert!(lab.agent.cli(&["cleanup"])?.status.success());
    let qdiscs = lab.world.node(0).ns().output("tc", &["qdisc", "show"])?;
    assert_eq!(qdiscs.matches("clsact").count(), 1, "{qdiscs}");
    Ok(())
}

#[test]
fn clean_removal_leaves_nothing() -> Result<()> {
    let mut lab = start_healthy_lab("")?;
    let refused = lab.agent.cli(&["cleanup"])?;
    assert!(text(&refused.stderr).contains("another agent is running"), "{}", text(&refused.stderr));
    lab.agent.stop()?;
    let veth = lab.client.veth.clone();
    let programs = || -> Result<usize> {
        let node = lab.world.node(0).ns();
        if !has_tcx() {
            return Ok(node.output("tc", &["filter", "show", "dev", &veth, "ingress"])?.matches("0xb4ea").count());
        }
        let veth = veth.clone();
        Ok(node.enter(move || SchedClassifier::query_tcx(&veth, TcAttachType::Ingress))??.1.len())
    };
    assert_eq!(programs()?, 1);
    let cleaned = lab.agent.cli(&["cleanup"])?;
    assert!(text(&cleaned.stdout).starts_with("removed 15 links and 35 maps"), "{}", text(&cleaned.stdout));
    wait_for("the kernel to detach the programs", LONG, || programs().is_ok_and(|count| count == 0))?;
    assert!(!lab.world.node(0).ns().output("tc", &["qdisc", "show"])?.contains("clsact"));
    assert!(!lab.agent.pin_path().exists());
    assert!(lab.ask()?.is_success());
    Ok(())
}

/// The maps are an interface: bpftool shows field names, enum labels, and addresses in wire order.
#[test]
fn bpftool_shows_names() -> Result<()> {
    let mut lab = start_healthy_lab("")?;
    lab.primary.inject(Fault::FakeError)?;
    lab.agent.wait_state(SERVICE, BreakerState::Open, LONG)?;
    lab.ask()?;
    let dump = |map: &str| {
        let path = lab.agent.pinned("maps").join(map);
        lab.world.node(0).ns().output("bpftool", &["map", "dump", "pinned", &path.display().to_string()])
    };
    let switches = dump("SWITCHES")?;
    assert!(switches.contains("\"state\": \"Open\""), "{}", &switches[..400]);
    assert!(dump("SERVICES")?.contains("\"reason\": \"HttpStatus\""));
    let flows = dump("FLOWS4")?;
    let client = lab.client.address.octets().map(|b| b.to_string()).join(",");
    assert!(flows.contains("\"kind\": \"Redirected\"") && flows.replace([' ', '\n'], "").contains(&client), "{flows}");
    Ok(())
}

#[test]
fn two_labs_at_once_do_not_see_each_other() -> Result<()> {
    let mut first = start_healthy_lab("")?;
    let second = start_healthy_lab("")?;
    first.primary.inject(Fault::Kill)?;
    first.agent.wait_state(SERVICE, BreakerState::Open, LONG)?;
    assert_eq!(second.agent.service(SERVICE)?.state, BreakerState::Closed);
    assert_eq!(second.ask()?.pod(), Some(second.primary.address().to_string().as_str()));
    Ok(())
}

/// `agent.interfaces` attaches the programs to interfaces that are not pods' veths.
#[test]
fn interfaces_by_glob() -> Result<()> {
    let mut lab = Lab::new(Checks::Fast)?;
    lab.agent.write_config("  veths: false\n  interfaces: ['uplink*']\n", &lab.services(Checks::Fast, ""))?;
    lab.agent.start()?;
    let interfaces = || lab.agent.status().map(|status| status.datapath.interfaces).unwrap_or_default();
    assert!(interfaces().is_empty());
    lab.world.node(0).ns().ip(&["link", "add", "uplink0", "type", "veth", "peer", "name", "other0"])?;
    wait_for("uplink0 to have programs", LONG, || interfaces() == ["uplink0"])
}

/// While k3s boots, a node's interfaces may be up before it has a default route. Here the route is an IPv6 one.
#[test]
fn an_uplink_is_found_when_its_default_route_comes() -> Result<()> {
    let mut lab = Lab::new(Checks::Fast)?;
    lab.agent.write_config("  veths: false\n  uplinks: true\n", &lab.services(Checks::Fast, ""))?;
    let node = lab.world.node(0).ns().clone();
    node.ip(&["route", "del", "default"])?;
    lab.agent.start()?;
    let interfaces = || lab.agent.status().map(|status| status.datapath.interfaces).unwrap_or_default();
    assert!(interfaces().is_empty());
    node.ip(&["-6", "route", "add", "default", "dev", "eth0"])?;
    wait_for("eth0 to have programs", LONG, || interfaces() == ["eth0"])
}

#[test]
fn an_interface_that_is_renamed_set_down_and_up_or_made_again_keeps_or_gets_its_programs() -> Result<()> {
    let mut lab = start_healthy_lab("")?;
    lab.primary.inject(Fault::Kill)?;
    lab.agent.wait_state(SERVICE, BreakerState::Open, LONG)?;
    let backup = lab.backup.address().to_string();
    let node = lab.world.node(0).ns().clone();
    let by_backup = |lab: &Lab, when: &str| -> Result<()> {
        let answer = lab.ask()?;
        anyhow::ensure!(answer.pod() == Some(backup.as_str()), "{when}: {answer}");
        Ok(())
    };
    let named = |lab: &Lab, name: &str| {
        lab.agent
            .status()
            .is_ok_and(|s| s.datapath.interfaces.iter().any(|n| n == name) && s.datapath.interfaces.len() == 3)
    };
    let old = lab.client.veth.clone();

    for state in ["down", "up"] {
        node.ip(&["link", "set", &old, state])?;
    }
    by_backup(&lab, "down and up")?;
    // Kernels before 6.2 refuse to rename an interface that is up.
    node.ip(&["link", "set", &old, "down"])?;
    node.ip(&["link", "set", &old, "name", "veth5eed5eed", "up"])?;
    wait_for("the status to show the new name", LONG, || named(&lab, "veth5eed5eed"))?;
    by_backup(&lab, "renamed")?;

    // Out of the namespace and back: the kernel detaches the programs from an interface that changes its namespace.
    let elsewhere = lab.world.lan().clone();
    node.ip(&["link", "set", "veth5eed5eed", "netns", elsewhere.name()])?;
    wait_for("two interfaces", LONG, || lab.agent.status().is_ok_and(|s| s.datapath.interfaces.len() == 2))?;
    elsewhere.ip(&["link", "set", "veth5eed5eed", "netns", node.name()])?;
    node.ip(&["link", "set", "veth5eed5eed", "master", "cni0", "up"])?;
    wait_for("the interface in the status again", LONG, || named(&lab, "veth5eed5eed"))?;
    by_backup(&lab, "away and back")?;

    // A new veth takes its place, with the same name and the same index.
    let text = node.output("ip", &["-o", "link", "show", "dev", "veth5eed5eed"])?;
    let index = text.split(':').next().context("no index")?.trim().to_owned();
    // The pod's end gets the old MAC address: neighbors remember it for a minute.
    let text = lab.client.ns.output("ip", &["-o", "link", "show", "dev", "eth0"])?;
    let address = text.split("link/ether ").nth(1).and_then(|rest| rest.split(' ').next()).context("no address")?;
    node.ip(&["link", "del", "veth5eed5eed"])?;
    let pod = lab.client.ns.name().to_owned();
    let veth = ["link", "add", "veth5eed5eed", "index", &index, "mtu", "1450", "type", "veth", "peer", "name", "eth0"];
    node.ip(&[&veth[..], &["mtu", "1450", "netns", &pod]].concat())?;
    node.ip(&["link", "set", "veth5eed5eed", "master", "cni0", "up"])?;
    lab.client.ns.ip(&["addr", "add", &format!("{}/24", lab.client.address), "dev", "eth0"])?;
    lab.client.ns.ip(&["link", "set", "eth0", "address", address, "up"])?;
    lab.client.ns.ip(&["route", "add", "default", "via", "10.42.1.1"])?;
    wait_for("the new veth to have programs", LONG, || {
        named(&lab, "veth5eed5eed") && lab.ask().is_ok_and(|answer| answer.pod() == Some(backup.as_str()))
    })
}

/// TRIALS C6: another `agent.attach` leaves nothing of the kind before.
#[test]
fn a_changed_kind_of_attaching_leaves_no_old_programs() -> Result<()> {
    if !has_tcx() {
        return Ok(());
    }
    let mut lab = Lab::new(Checks::Fast)?;
    let node = lab.world.node(0).ns().clone();
    let veth = lab.client.veth.clone();
    let links = |lab: &Lab| -> Result<usize> {
        let names = fs::read_dir(lab.agent.pinned("links"))?.flatten();
        Ok(names.filter(|name| name.file_name().to_string_lossy().ends_with("_in")).count())
    };
    for (kind, filters, linked) in [("Clsact", true, 0), ("Tcx", false, 3), ("Clsact", true, 0)] {
        let agent = format!("  attach: {kind}\n");
        lab.agent.write_config(&agent, &lab.services(Checks::Fast, "    override: ForceOpen\n"))?;
        lab.agent.start()?;
        wait_all_up(&lab)?;
        let shown = node.output("tc", &["filter", "show", "dev", &veth, "ingress"])?;
        assert_eq!((shown.contains("breaker_in"), links(&lab)?), (filters, linked), "{kind}: {shown}");
        assert_eq!(lab.ask()?.pod(), Some(lab.backup.address().to_string().as_str()));
        lab.agent.stop()?;
    }
    Ok(())
}

/// TRIALS C5: while no agent runs, a pod's device moves to another namespace with the pinned links, and another device gets
/// its index.
#[test]
fn a_device_that_took_a_moved_ones_index_gets_programs() -> Result<()> {
    let mut lab = start_healthy_lab("    override: ForceOpen\n")?;
    let backup = lab.backup.address().to_string();
    let node = lab.world.node(0).ns().clone();
    let veth = lab.client.veth.clone();
    let shown = node.output("ip", &["-o", "link", "show", "dev", &veth])?;
    let index = shown.split(':').next().context("no index")?.trim().to_owned();
    lab.agent.stop()?;
    node.ip(&["link", "set", &veth, "netns", lab.world.lan().name()])?;
    lab.client.ns.ip(&["link", "set", "eth0", "name", "old0"])?;
    let pair = ["link", "add", &veth, "index", &index, "mtu", "1450", "type", "veth", "peer", "name", "eth0"];
    node.ip(&[&pair[..], &["mtu", "1450", "netns", lab.client.ns.name()]].concat())?;
    node.ip(&["link", "set", &veth, "master", "cni0", "up"])?;
    lab.client.ns.ip(&["addr", "flush", "dev", "old0"])?;
    lab.client.ns.ip(&["addr", "add", &format!("{}/24", lab.client.address), "dev", "eth0"])?;
    lab.client.ns.ip(&["link", "set", "eth0", "up"])?;
    lab.client.ns.ip(&["route", "replace", "default", "via", "10.42.1.1", "dev", "eth0"])?;
    node.ip(&["neigh", "flush", "dev", "cni0"])?;
    lab.agent.start()?;
    wait_all_up(&lab)?;
    wait_for("the backup to answer", LONG, || lab.ask().is_ok_and(|answer| answer.pod() == Some(backup.as_str())))
}
