//! Policies, as clients experience them.

use breaker_api::status::Health;
use breaker_common::BreakerState;
use std::{
    io::{Read as _, Write as _},
    net::{SocketAddr, TcpStream},
    time::{Duration, Instant},
};

use anyhow::Result;
use breaker_tests::lab::{
    client::{Connection, Outcome, Plan},
    service::{Fault, ServicePod},
    stage::{Checks, Lab, SERVICE, frontend},
    wait_for,
};

use crate::{LONG, pressure::ask, start_healthy_lab, wait_all_up};

/// Sends two requests on one connection, with `between` in between.
fn two_requests(lab: &Lab, between: impl FnOnce() -> Result<()> + Send + 'static) -> Result<[Outcome; 2]> {
    let target = lab.vip;
    lab.client.ns.enter(move || {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
        runtime.block_on(async {
            let mut connection = Connection::open(target).await?;
            let first = connection.ask(true, Duration::from_secs(5)).await;
            between()?;
            let second = connection.ask(true, Duration::from_secs(5)).await;
            Ok([first, second])
        })
    })?
}

/// Opens the breaker by an operator's override, so that the primary is still able to answer.
fn trip(lab: &Lab) -> impl FnOnce() -> Result<()> + Send + 'static + use<> {
    operator(lab, "trip")
}

fn reset(lab: &Lab) -> impl FnOnce() -> Result<()> + Send + 'static + use<> {
    operator(lab, "reset")
}

fn operator(lab: &Lab, word: &'static str) -> impl FnOnce() -> Result<()> + Send + 'static + use<> {
    let (socket, ns) = (lab.agent.socket(), lab.world.node(0).ns().clone());
    move || {
        let binary = breaker_tests::lab::binary("breaker")?;
        breaker_tests::lab::netns::run(ns.command(binary).args([word, SERVICE, "--socket"]).arg(socket))
    }
}

#[test]
fn on_open_reset_is_believed_by_the_clients_stack_and_by_the_peers() -> Result<()> {
    let lab = start_healthy_lab("")?;
    let started = Instant::now();
    let [first, second] = two_requests(&lab, trip(&lab))?;
    assert!(first.is_success());
    assert_eq!(second, Outcome::Reset);
    assert!(started.elapsed() < Duration::from_secs(5), "a reset, not a timeout");
    // The primary's end of the connection is reset too.
    let sockets = || lab.primary.pod.ns.output("ss", &["-Htn", "state", "established"]).unwrap_or_default();
    let client = lab.client.address.to_string();
    wait_for("the primary's end of the connection to close", LONG, || !sockets().contains(&client))
}

#[test]
fn on_open_keep_leaves_established_connections_alone() -> Result<()> {
    let lab = start_healthy_lab("    onOpen: Keep\n")?;
    let [first, second] = two_requests(&lab, trip(&lab))?;
    assert!(first.is_success());
    assert_eq!(first, second);
    assert_eq!(lab.ask()?.pod(), Some(lab.backup.address().to_string().as_str()), "new connections move");
    Ok(())
}

#[test]
fn on_close_keep_and_reset() -> Result<()> {
    for (policy, kept) in [("    onClose: Keep\n", true), ("    onClose: Reset\n", false)] {
        let lab = start_healthy_lab(policy)?;
        trip(&lab)()?;
        let [first, second] = two_requests(&lab, reset(&lab))?;
        assert_eq!(first.pod(), Some(lab.backup.address().to_string().as_str()));
        assert_eq!(second, if kept { first } else { Outcome::Reset });
        assert_eq!(lab.ask()?.pod(), Some(lab.primary.address().to_string().as_str()));
    }
    Ok(())
}

/// TRIALS E3: the backup in use goes Down, and another one takes over. Established connections stay or are reset by policy.
#[test]
fn on_backup_down_keep_and_reset() -> Result<()> {
    for (policy, kept) in [("", false), ("    onBackupDown: Keep\n", true), ("    onOpen: Keep\n", true)] {
        let mut lab = Lab::new(Checks::Fast)?;
        let second = ServicePod::start(lab.world.node_mut(0), "second")?;
        let tier = format!(
            "      - backends: [{}]\n        check: {{httpGet: {{path: /ready}}}}\n    override: ForceOpen\n{policy}",
            frontend(second.address())
        );
        lab.configure(Checks::Fast, &tier)?;
        lab.agent.start()?;
        wait_all_up(&lab)?;
        let target = SocketAddr::V4(lab.vip);
        let connect = move || TcpStream::connect_timeout(&target, LONG);
        let mut connection = lab.client.ns.enter(connect)??;
        connection.set_read_timeout(Some(LONG))?;
        assert_eq!(ask(&mut connection)?, lab.backup.address().to_string());
        lab.backup.inject(Fault::FakeError)?;
        wait_for("the backup to be Down", LONG, || {
            lab.agent
                .service(SERVICE)
                .is_ok_and(|s| s.tiers[1].backends[0].health == Health::Down && s.applied == Some(s.desired))
        })?;
        assert_eq!(lab.ask()?.pod(), Some(second.address().to_string().as_str()), "new connections move");
        // With errors switched on, the backup still answers.
        let asked = connection.write_all(b"GET /alive HTTP/1.1\r\nHost: lab\r\n\r\n");
        let answer = asked.and_then(|()| connection.read(&mut [0; 1024]));
        assert_eq!(answer.is_ok_and(|length| length > 0), kept, "{policy:?}");
        // The other backup stays where it is: a connection to it goes on.
        let mut other = lab.client.ns.enter(connect)??;
        assert_eq!([ask(&mut other)?, ask(&mut other)?], [second.address().to_string(), second.address().to_string()]);
    }
    Ok(())
}

#[test]
fn reject_is_felt_at_once() -> Result<()> {
    let mut lab = start_healthy_lab("    whenAllUnhealthy: Reject\n")?;
    lab.primary.inject(Fault::BlackHole)?;
    lab.backup.inject(Fault::BlackHole)?;
    lab.agent.wait_state(SERVICE, BreakerState::Open, LONG)?;
    wait_for("the backup to be Down", LONG, || {
        lab.agent
            .service(SERVICE)
            .is_ok_and(|s| s.tiers[1].backends[0].health == Health::Down && s.applied == Some(s.desired))
    })?;
    let target = lab.vip;
    let outcome = lab.client.ns.enter(move || TcpStream::connect_timeout(&target.into(), Duration::from_secs(10)))?;
    assert_eq!(outcome.unwrap_err().kind(), std::io::ErrorKind::ConnectionRefused);
    assert!(lab.agent.service(SERVICE)?.counters.rejected >= 1);
    Ok(())
}

/// Without a usable backup, all connections go to the primary, and none is reset.
#[test]
fn no_usable_backup() -> Result<()> {
    let mut lab = start_healthy_lab("")?;
    lab.backup.inject(Fault::Kill)?;
    wait_for("the backup to be Down", LONG, || {
        lab.agent.service(SERVICE).is_ok_and(|s| s.tiers[1].backends[0].health == Health::Down)
    })?;
    let [first, second] = two_requests(&lab, trip(&lab))?;
    assert!(first.is_success());
    assert_eq!(first, second);
    assert_eq!(lab.ask()?.pod(), Some(lab.primary.address().to_string().as_str()));
    // The backup recovers: new connections go there.
    lab.backup.heal(Fault::Kill)?;
    let backup = lab.backup.address().to_string();
    wait_for("the backup to answer", LONG, || lab.ask().is_ok_and(|o| o.pod() == Some(&backup)))
}

#[test]
fn half_open_tries_exactly_its_number_and_ends() -> Result<()> {
    let mut lab = start_healthy_lab(
        "    breaker: {halfOpenConnections: 5, halfOpenPasses: 1000, halfOpenTimeoutMillis: 1500}\n    onOpen: Keep\n",
    )?;
    let load = lab.load(Plan { keep_alive: 0, ..Plan::usual(lab.vip) })?;
    lab.primary.inject(Fault::FakeError)?;
    lab.agent.wait_state(SERVICE, BreakerState::Open, LONG)?;
    lab.primary.heal(Fault::FakeError)?;
    lab.agent.wait_state(SERVICE, BreakerState::HalfOpen, LONG)?;
    lab.agent.wait_state(SERVICE, BreakerState::Closed, LONG)?;
    drop(load);
    // A slow probe may have opened the breaker once more.
    let rounds = lab.agent.events()?.iter().filter(|event| event.to == Some(BreakerState::HalfOpen)).count() as u64;
    let tried = lab.agent.service(SERVICE)?.counters.half_open;
    assert!((5..=5 * rounds).contains(&tried), "{tried} in {rounds} rounds");
    Ok(())
}

#[test]
fn a_dry_run_moves_nobody() -> Result<()> {
    let lab = start_healthy_lab("    mode: DryRun\n")?;
    trip(&lab)()?;
    for _ in 0..5 {
        assert_eq!(lab.ask()?.pod(), Some(lab.primary.address().to_string().as_str()));
    }
    assert_eq!(lab.agent.service(SERVICE)?.counters.dry_run, 5);
    Ok(())
}

/// A client stuck in connect() to a black hole reaches the backup when it retransmits its SYN.
#[test]
fn a_client_stuck_in_connect_is_rescued() -> Result<()> {
    let mut lab = start_healthy_lab("")?;
    lab.primary.inject(Fault::BlackHole)?;
    let target = lab.vip;
    let stuck = lab.client.ns.thread(move || TcpStream::connect_timeout(&target.into(), Duration::from_secs(15)))?;
    lab.agent.wait_state(SERVICE, BreakerState::Open, LONG)?;
    match stuck.join() {
        Ok(outcome) => drop(outcome??),
        Err(panic) => std::panic::resume_unwind(panic),
    }
    Ok(())
}
