//! Nodes without kube-proxy: what needs the masquerade mark has breaker's own rule for it.

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
    text, wait_well,
};

/// Takes everything of kube-proxy's and flannel's away.
fn no_kube_proxy(node: &NetNs) -> Result<()> {
    for table in ["nat", "filter"] {
        for what in ["-F", "-X"] {
            node.output("iptables", &["-w", "-t", table, what])?;
        }
    }
    ensure!(!node.output("iptables-save", &[])?.contains("KUBE"), "rules are left");
    Ok(())
}

/// The lab's service, by an address of the node's, too.
fn services(lab: &Lab, outside: SocketAddrV4) -> String {
    lab.services_by(Checks::Fast, "    override: ForceOpen\n", &[lab.vip, outside].map(frontend))
}

/// The lab without kube-proxy, its backup in force; and where clients outside come in.
fn staged() -> Result<(Lab, SocketAddrV4)> {
    let mut lab = Lab::new(Checks::Fast)?;
    let node = lab.world.node(0);
    no_kube_proxy(node.ns())?;
    let outside = SocketAddrV4::new(node.address(), 30080);
    lab.agent.write_config("  uplinks: true\n", &services(&lab, outside))?;
    lab.agent.start()?;
    wait_well(&lab)?;
    Ok((lab, outside))
}

/// Clients outside, a pod, and a pod that is its own backup; and what is left when breaker has gone.
#[test]
fn without_kube_proxy_the_backup_answers_everybody() -> Result<()> {
    let (mut lab, outside) = staged()?;
    let backup = lab.backup.address().to_string();
    assert_eq!(lab.agent.status()?.datapath.masquerade_rule, None);
    // The backup sees the node's own address on its bridge.
    let masqueraded = ["-s", "10.42.1.1", "-d", &lab.backup.address().ip().to_string(), "-p", "tcp", "--syn"];
    count(&lab.backup.pod.ns, &masqueraded)?;
    let before = counted(&lab.backup.pod.ns)?;
    for _ in 0..5 {
        assert_eq!(ask_once(lab.world.lan(), outside)?.pod(), Some(backup.as_str()));
    }
    // (Its probes come from there as well.)
    wait_for("masqueraded requests", LONG, || counted(&lab.backup.pod.ns).is_ok_and(|now| now >= before + 5))?;
    assert_eq!(lab.ask()?.pod(), Some(backup.as_str()));
    lab.client = lab.backup.pod.clone();
    assert_eq!(lab.ask()?.pod(), Some(backup.as_str()), "its own backup");
    assert!(lab.agent.service("dummy")?.counters.hairpin > 0);
    lab.agent.stop()?;
    assert_eq!(lab.ask()?.pod(), Some(backup.as_str()), "the rule stays with the last decision");
    let cleaned = text(&lab.agent.cli(&["cleanup"])?.stdout);
    assert!(cleaned.contains("32 maps") && cleaned.contains("and the rule for the masquerade mark"), "{cleaned}");
    let again = text(&lab.agent.cli(&["cleanup"])?.stdout);
    assert!(!again.contains("masquerade"), "{again}");
    Ok(())
}

/// Switched off, there is none, also where there was one.
#[test]
fn the_rule_is_there_only_if_it_is_wanted() -> Result<()> {
    let (mut lab, outside) = staged()?;
    lab.client = lab.backup.pod.clone();
    assert!(lab.ask()?.is_success());
    lab.agent.stop()?;
    let services = services(&lab, outside);
    lab.agent.write_config("  uplinks: true\n  masqueradeRule: false\n", &services)?;
    lab.agent.start()?;
    wait_well(&lab)?;
    assert_eq!(lab.agent.status()?.datapath.masquerade_rule.as_deref(), Some("switched off"));
    let asked = lab.client.ns.output("curl", &["-sS", "--max-time", "2", &format!("http://{}/", lab.vip)]);
    assert!(asked.is_err(), "a pod does not take packets from itself");
    Ok(())
}
