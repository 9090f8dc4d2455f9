//! Backends on the client's own node: the fast path, and external clients that keep their address.

use std::net::SocketAddrV4;

use anyhow::Result;
use breaker_tests::lab::{
    client::ask_once,
    stage::{Checks, Lab, SERVICE},
    wait_for,
};

use crate::{
    LONG,
    netfilter::{count, counted},
    start_healthy_lab, text, wait_all_up,
};

fn is_near(lab: &Lab) -> bool {
    lab.agent.service(SERVICE).is_ok_and(|service| service.tiers[1].backends[0].local)
}

/// netfilter sees no packet of requests on the fast path.
#[test]
fn from_veth_to_veth_netfilter_sees_nothing() -> Result<()> {
    let lab = start_healthy_lab("    fastPath: PeerRedirect\n    override: ForceOpen\n")?;
    wait_for("the agent to find the backup on this node", LONG, || is_near(&lab))?;
    let (client, backup) = (lab.client.address.to_string(), lab.backup.address());
    let node = lab.world.node(0).ns();
    count(node, &["-s", &client, "-d", &backup.ip().to_string()])?;
    count(node, &["-s", &backup.ip().to_string(), "-d", &client])?;
    for _ in 0..20 {
        assert_eq!(lab.ask()?.pod(), Some(backup.to_string().as_str()));
    }
    assert_eq!(counted(node)?, 0, "packets in netfilter");
    let flows = text(&lab.agent.cli(&["flows", SERVICE])?.stdout);
    assert!(flows.contains(" veth "), "{flows}");
    let shown = text(&lab.agent.cli(&["status"])?.stdout);
    assert!(shown.contains("this node") && shown.contains("NetworkPolicy"), "{shown}");
    // Without the fast path, the bridge's netfilter sees the packets.
    lab.configure(Checks::Fast, "    override: ForceOpen\n")?;
    wait_for("netfilter to see the packets", LONG, || {
        lab.ask().is_ok_and(|answer| answer.pod() == Some(backup.to_string().as_str()))
            && counted(node).is_ok_and(|packets| packets > 0)
    })
}

/// When a backup on the fast path dies, clients get the primary; when it recovers, they get the backup again.
#[test]
fn a_fast_backup_that_dies_is_left() -> Result<()> {
    use breaker_tests::lab::service::Fault;
    let mut lab = start_healthy_lab("    fastPath: PeerRedirect\n    override: ForceOpen\n")?;
    wait_for("the agent to find the backup on this node", LONG, || is_near(&lab))?;
    let (primary, backup) = (lab.primary.address().to_string(), lab.backup.address().to_string());
    assert_eq!(lab.ask()?.pod(), Some(backup.as_str()));
    lab.backup.inject(Fault::Kill)?;
    wait_for("the primary to answer", LONG, || lab.ask().is_ok_and(|answer| answer.pod() == Some(&primary)))?;
    lab.backup.heal(Fault::Kill)?;
    wait_for("the backup to answer again", LONG, || lab.ask().is_ok_and(|answer| answer.pod() == Some(&backup)))
}

/// An external client connects to an address of the node. With `Local` the backup sees the client's own address, and
/// its answers reach the client.
#[test]
fn external_traffic_policy_local_keeps_the_clients_address() -> Result<()> {
    let mut lab = Lab::new(Checks::Fast)?;
    let outside = SocketAddrV4::new(lab.world.node(0).address(), 30080);
    let backup = lab.backup.address();
    for (policy, seen) in [("Cluster", "10.42.1.1"), ("Local", "172.31.0.1")] {
        let frontend = format!("{{address: {}, port: 30080, externalTrafficPolicy: {policy}}}", outside.ip());
        let services = lab.services_by(Checks::Fast, "    override: ForceOpen\n", &[frontend]);
        lab.agent.write_config("  uplinks: true\n", &services)?;
        lab.agent.start()?;
        wait_all_up(&lab)?;
        if policy == "Local" {
            wait_for("the agent to find the backup on this node", LONG, || is_near(&lab))?;
        }
        count(&lab.backup.pod.ns, &["-s", seen, "-d", &backup.ip().to_string()])?;
        let before = counted(&lab.backup.pod.ns)?;
        let answer = ask_once(lab.world.lan(), outside)?;
        assert_eq!(answer.pod(), Some(backup.to_string().as_str()));
        assert!(counted(&lab.backup.pod.ns)? > before, "{policy}: the backup must see {seen}");
        lab.agent.stop()?;
    }
    Ok(())
}
