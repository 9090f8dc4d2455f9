//! Failover to the backup and return to the primary, under load.

use anyhow::Result;
use breaker_common::BreakerState;
use breaker_tests::lab::{
    client::Plan,
    kubeproxy,
    service::{Fault, ServicePod},
    stage::{Checks, Lab, SERVICE, entry},
};

use crate::{LONG, start_healthy_lab, wait_all_up};

/// Plays one fault under load. `reasons`: the trip reasons that are allowed.
fn play_and_check(fault: Fault, reasons: &[&str]) -> Result<()> {
    let mut lab = start_healthy_lab("")?;
    let play = lab.play(fault, Checks::Fast, Plan::usual(lab.vip), |_| ())?;
    assert_eq!(play.wrong_answers, 0, "{play:#?}");
    let steps: Vec<_> = play.transitions.iter().map(|s| (s.from.as_str(), s.to.as_str())).collect();
    assert_eq!(steps, [("Closed", "Open"), ("Open", "Closed")]);
    let [why, recovered] = [0, 1].map(|step| play.transitions[step].reason.as_str());
    assert!(reasons.contains(&why) && recovered == "Recovered", "{why}, {recovered}");
    // The outage explains every failed request; the return to the primary fails none.
    let service = lab.agent.service(SERVICE)?;
    assert!(service.counters.moved > 0);
    assert_eq!(service.counters.failed_open, 0);
    Ok(())
}

#[test]
fn a_service_that_says_it_is_busy() -> Result<()> {
    play_and_check(Fault::FakeError, &["HttpStatus"])
}

#[test]
fn a_process_that_is_killed() -> Result<()> {
    play_and_check(Fault::Kill, &["ConnectFailed"])
}

#[test]
fn a_black_hole() -> Result<()> {
    // A probe that has connected before the fault times out while it waits for the response.
    play_and_check(Fault::BlackHole, &["ConnectTimeout", "ResponseTimeout"])
}

/// The lab's default checks, as in NGINX Plus: every 3 s; one failure is Down, one success is Up.
#[test]
fn the_labs_defaults() -> Result<()> {
    let mut lab = Lab::new(Checks::Default)?;
    lab.agent.start()?;
    wait_all_up(&lab)?;
    let play = lab.play(Fault::FakeError, Checks::Default, Plan::usual(lab.vip), |_| ())?;
    assert_eq!(play.wrong_answers, 0, "{play:#?}");
    Ok(())
}

/// The responses of the dummy service, byte for byte.
#[test]
fn the_dummy_service_is_the_labs() -> Result<()> {
    let mut lab = Lab::new(Checks::Default)?;
    let at = |service: &ServicePod| service.ask("GET", "/");
    assert_eq!(at(&lab.primary)?, (200, "SOMERESPONSE FROM 127.0.0.1:80".into()));
    assert_eq!(lab.primary.ask("GET", "/ready")?, (200, "OK FROM 127.0.0.1:80".into()));
    lab.primary.inject(Fault::FakeError)?;
    assert_eq!(lab.primary.ask("GET", "/alive")?, (200, "OK".into()));
    assert_eq!(lab.primary.ask("GET", "/ready")?, (503, "BUSY FROM 127.0.0.1:80".into()));
    // A request for `/` hangs, and blocks no other request.
    assert!(lab.primary.ask("GET", "/").is_err());
    lab.primary.heal(Fault::FakeError)?;
    assert_eq!(at(&lab.primary)?.0, 200);
    Ok(())
}

#[test]
fn two_services_share_a_backup() -> Result<()> {
    let mut lab = Lab::with(Checks::Fast, "")?;
    let node = lab.world.node_mut(0);
    let mut second = ServicePod::start(node, "second")?;
    let vip = kubeproxy::vip(2);
    let service =
        kubeproxy::Service { name: "second".into(), vip, endpoints: vec![second.address()], protocols: &["tcp"] };
    kubeproxy::add_service(node.ns(), &service)?;
    let both = format!(
        "{}{}",
        lab.services(Checks::Fast, ""),
        entry("second", vip, second.address(), lab.backup.address(), Checks::Fast, "")
    );
    lab.agent.write_config("", &both)?;
    lab.agent.start()?;
    wait_all_up(&lab)?;
    let backup = lab.backup.address().to_string();
    let loads = [lab.load(Plan::usual(lab.vip))?, lab.load(Plan::usual(vip))?];
    lab.primary.inject(Fault::Kill)?;
    second.inject(Fault::FakeError)?;
    for name in [SERVICE, "second"] {
        lab.agent.wait_state(name, BreakerState::Open, LONG)?;
    }
    for load in &loads {
        load.wait("the backup to answer both", LONG, |records| {
            records.len() > 100 && records.iter().rev().take(50).all(|r| r.outcome.pod() == Some(&backup))
        })?;
    }
    // The second service returns to its primary; the first one stays on the backup.
    second.heal(Fault::FakeError)?;
    lab.agent.wait_state("second", BreakerState::Closed, LONG)?;
    let primary = second.address().to_string();
    loads[1].wait("the second service's primary to answer", LONG, |records| {
        let new = records.iter().rev().filter(|r| !r.keep_alive).take(40);
        new.clone().count() == 40 && new.clone().all(|r| r.outcome.pod() == Some(&primary))
    })?;
    let [first, _] = loads;
    let records = first.stop()?;
    assert!(records.iter().rev().take(50).all(|r| r.outcome.pod() == Some(&backup)));
    Ok(())
}

/// The backup's own pod is the client: the packet must return to the pod that sent it.
#[test]
fn hairpin() -> Result<()> {
    let mut lab = start_healthy_lab("")?;
    lab.primary.inject(Fault::Kill)?;
    lab.agent.wait_state(SERVICE, BreakerState::Open, LONG)?;
    lab.client = lab.backup.pod.clone();
    for _ in 0..20 {
        assert_eq!(lab.ask()?.pod(), Some(lab.backup.address().to_string().as_str()));
    }
    assert_eq!(lab.agent.service(SERVICE)?.counters.hairpin, 20);
    Ok(())
}

/// A backup on another node, through flannel's VXLAN.
#[test]
fn a_backup_on_another_node() -> Result<()> {
    use breaker_tests::lab::{agent::Agent, world::World};
    let mut world = World::new(2)?;
    for node in 0..2 {
        kubeproxy::base(world.node(node).ns())?;
    }
    let mut primary = ServicePod::start(world.node_mut(0), "dummy")?;
    let backup = ServicePod::start(world.node_mut(1), "backup")?;
    let client = world.node_mut(0).add_pod("client")?;
    let vip = kubeproxy::vip(0);
    let service =
        kubeproxy::Service { name: "dummy".into(), vip, endpoints: vec![primary.address()], protocols: &["tcp"] };
    kubeproxy::add_service(world.node(0).ns(), &service)?;
    let mut agent = Agent::new(world.node(0).ns(), world.dir(), &world.bpffs().join("breaker"));
    let services = entry(SERVICE, vip, primary.address(), backup.address(), Checks::Fast, "");
    agent.write_config("", &format!("services:\n{services}"))?;
    agent.start()?;
    primary.inject(Fault::Kill)?;
    agent.wait_state(SERVICE, BreakerState::Open, LONG)?;
    let load = breaker_tests::lab::client::Load::start(&client.ns, Plan::usual(vip))?;
    load.wait("answers", LONG, |records| records.len() > 200)?;
    let records = load.stop()?;
    let backup = backup.address().to_string();
    assert!(
        records.iter().skip(20).all(|r| r.outcome.pod() == Some(&backup)),
        "{:?}",
        breaker_tests::lab::client::summary(&records)
    );
    Ok(())
}
