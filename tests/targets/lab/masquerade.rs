//! Nodes without kube-proxy: breaker's own nftables rule masquerades packets that carry the masquerade mark.

use std::net::SocketAddrV4;

use anyhow::{Result, ensure};
use breaker_tests::lab::{
    client::ask_once,
    netns::NetNs,
    stage::{Checks, Lab, frontend},
    wait_for,
};

use crate::{
    LONG,
    netfilter::{count, counted},
    text, wait_all_up,
};

/// Removes the iptables rules of kube-proxy and flannel.
fn no_kube_proxy(node: &NetNs) -> Result<()> {
    for table in ["nat", "filter"] {
        for what in ["-F", "-X"] {
            node.output("iptables", &["-w", "-t", table, what])?;
        }
    }
    ensure!(!node.output("iptables-save", &[])?.contains("KUBE"), "kube-proxy's rules are still there");
    Ok(())
}

/// The lab's service with two frontends: the VIP, and `outside`, an address of the node.
fn services(lab: &Lab, outside: SocketAddrV4) -> String {
    lab.services_by(Checks::Fast, "    override: ForceOpen\n", &[lab.vip, outside].map(frontend))
}

/// A lab without kube-proxy, with the breaker forced open; and the frontend for external clients.
fn staged() -> Result<(Lab, SocketAddrV4)> {
    let mut lab = Lab::new(Checks::Fast)?;
    let node = lab.world.node(0);
    no_kube_proxy(node.ns())?;
    let outside = SocketAddrV4::new(node.address(), 30080);
    lab.agent.write_config("  uplinks: true\n", &services(&lab, outside))?;
    lab.agent.start()?;
    wait_all_up(&lab)?;
    Ok((lab, outside))
}

/// The backup answers external clients, a pod, and the backup's own pod. The rule outlives the agent; `cleanup`
/// removes it.
#[test]
fn without_kube_proxy_the_backup_answers_everybody() -> Result<()> {
    let (mut lab, outside) = staged()?;
    let backup = lab.backup.address().to_string();
    assert_eq!(lab.agent.status()?.datapath.masquerade_rule, None);
    // The backup sees masqueraded packets come from the node's address on the bridge.
    let masqueraded = ["-s", "10.42.1.1", "-d", &lab.backup.address().ip().to_string(), "-p", "tcp", "--syn"];
    count(&lab.backup.pod.ns, &masqueraded)?;
    let before = counted(&lab.backup.pod.ns)?;
    for _ in 0..5 {
        assert_eq!(ask_once(lab.world.lan(), outside)?.pod(), Some(backup.as_str()));
    }
    // Probes come from that address too, so there may be more.
    wait_for("masqueraded requests", LONG, || counted(&lab.backup.pod.ns).is_ok_and(|now| now >= before + 5))?;
    assert_eq!(lab.ask()?.pod(), Some(backup.as_str()));
    lab.client = lab.backup.pod.clone();
    assert_eq!(lab.ask()?.pod(), Some(backup.as_str()), "the backup's own pod");
    assert!(lab.agent.service("dummy")?.counters.hairpin > 0);
    lab.agent.stop()?;
    assert_eq!(lab.ask()?.pod(), Some(backup.as_str()), "the rule outlives the agent");
    let cleaned = text(&lab.agent.cli(&["cleanup"])?.stdout);
    assert!(cleaned.contains("35 maps") && cleaned.contains("and the rule for the masquerade mark"), "{cleaned}");
    let again = text(&lab.agent.cli(&["cleanup"])?.stdout);
    assert!(!again.contains("masquerade"), "{again}");
    Ok(())
}

/// With `masqueradeRule: false` there is no rule, even if an earlier agent had made one.
#[test]
fn the_rule_is_there_only_if_it_is_wanted() -> Result<()> {
    let (mut lab, outside) = staged()?;
    lab.client = lab.backup.pod.clone();
    assert!(lab.ask()?.is_success());
    lab.agent.stop()?;
    let services = services(&lab, outside);
    lab.agent.write_config("  uplinks: true\n  masqueradeRule: false\n", &services)?;
    lab.agent.start()?;
    wait_all_up(&lab)?;
    assert_eq!(lab.agent.status()?.datapath.masquerade_rule.as_deref(), Some("switched off"));
    let asked = lab.client.ns.output("curl", &["-sS", "--max-time", "2", &format!("http://{}/", lab.vip)]);
    assert!(asked.is_err(), "without the rule, the pod drops packets from itself");
    Ok(())
}
