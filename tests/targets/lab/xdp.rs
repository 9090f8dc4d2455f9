//! XDP on an uplink, in the driver's native mode (veths have one).

use anyhow::Result;
use breaker_common::BreakerState;
use breaker_tests::lab::{
    client::{Outcome, ask_once},
    service::Fault,
    stage::{Checks, Lab, SERVICE},
    wait_for,
};

use crate::{LONG, netfilter, third_party::native_xdp, wait_all_up};

/// A lab whose primary and backup are down, so that connections are refused; external clients have a route to it.
fn lab_with_all_down(xdp: &str) -> Result<Lab> {
    let mut lab = Lab::new(Checks::Fast)?;
    let lan = lab.world.lan();
    lan.ip(&["route", "add", &lab.vip.ip().to_string(), "via", &lab.world.node(0).address().to_string()])?;
    let services = lab.services(Checks::Fast, "    whenAllUnhealthy: Reject\n");
    lab.agent.write_config(&format!("  uplinks: true\n  xdp: {xdp}\n"), &services)?;
    lab.agent.start()?;
    wait_all_up(&lab)?;
    lab.primary.inject(Fault::Kill)?;
    lab.backup.inject(Fault::Kill)?;
    lab.agent.wait_state(SERVICE, BreakerState::Open, LONG)?;
    Ok(lab)
}

fn said(lab: &Lab) -> Result<String> {
    let xdp = lab.agent.status()?.datapath.xdp;
    Ok(xdp.get("eth0").cloned().unwrap_or_default())
}

fn link(lab: &Lab) -> Result<String> {
    lab.world.node(0).ns().output("ip", &["link", "show", "dev", "eth0"])
}

fn is_refused(lab: &Lab) -> Result<()> {
    wait_for("a refusal", LONG, || ask_once(lab.world.lan(), lab.vip).is_ok_and(|outcome| outcome == Outcome::Refused))
}

#[test]
fn the_driver_refuses_and_nothing_is_left_behind() -> Result<()> {
    let mut lab = lab_with_all_down("Native")?;
    // A veth accepts what its peer sends back by XDP only if it has an XDP program too (drivers/net/veth.c,
    // `veth_xdp_flush`). A physical link has no such condition.
    let _peer = native_xdp(lab.world.lan(), "node1")?;
    assert_eq!(said(&lab)?, "native");
    assert!(link(&lab)?.contains("xdp") && !link(&lab)?.contains("xdpgeneric"), "{}", link(&lab)?);
    is_refused(&lab)?;
    // The host network stack sees none of these packets: netfilter's first hook counts none.
    let node = lab.world.node(0).ns().clone();
    netfilter::count(&node, &["-d", &lab.vip.ip().to_string()])?;
    let before = lab.agent.service(SERVICE)?.counters.rejected;
    for _ in 0..5 {
        assert_eq!(ask_once(lab.world.lan(), lab.vip)?, Outcome::Refused);
    }
    assert!(lab.agent.service(SERVICE)?.counters.rejected >= before + 5);
    assert_eq!(netfilter::counted(&node)?, 0, "packets in the host stack");
    // A new agent takes over, and the primary recovers: XDP passes the packets that are not refused.
    lab.agent.kill()?;
    lab.agent.start()?;
    assert_eq!(said(&lab)?, "native");
    lab.primary.heal(Fault::Kill)?;
    let primary = lab.primary.address().to_string();
    wait_for("the primary's answer", LONG, || {
        ask_once(lab.world.lan(), lab.vip).is_ok_and(|outcome| outcome.pod() == Some(&primary))
    })?;
    lab.agent.stop()?;
    assert!(lab.agent.cli(&["cleanup"])?.status.success());
    wait_for("the kernel to detach the program", LONG, || link(&lab).is_ok_and(|link| !link.contains("xdp")))
}

/// Where XDP cannot be attached, the tc program refuses the packets, and the status gives the reason.
#[test]
fn where_it_cannot_be_tc_refuses() -> Result<()> {
    let lab = lab_with_all_down("Auto")?;
    assert!(said(&lab)?.contains("tc alone: a veth"), "{}", said(&lab)?);
    is_refused(&lab)?;
    drop(lab);
    let mut lab = Lab::new(Checks::Fast)?;
    let _third_party = native_xdp(lab.world.node(0).ns(), "eth0")?;
    let before = link(&lab)?;
    lab.agent.write_config("  uplinks: true\n  xdp: Native\n", &lab.services(Checks::Fast, ""))?;
    lab.agent.start()?;
    assert!(said(&lab)?.contains("another XDP program"), "{}", said(&lab)?);
    assert_eq!(link(&lab)?, before);
    Ok(())
}
