//! Death and restart of the agent, reload of its configuration, and the command line meanwhile.

use breaker_api::crd::Override;
use breaker_api::events::EventType;
use breaker_common::BreakerState;
use std::time::Duration;

use anyhow::{Context as _, Result};
use breaker_tests::lab::{
    agent::Agent,
    binary,
    client::{Load, Plan, summary},
    service::Fault,
    stage::{Checks, Lab, SERVICE},
    wait_for,
};
use rustix::process::Signal;

use crate::{LONG, start_healthy_lab, text, wait_all_up};

/// Ends the load, and asserts that `pod` answered every request.
#[track_caller]
fn none_failed(load: Load, pod: &str) {
    let records = load.stop().unwrap();
    assert!(records.len() > 200);
    let wrong: Vec<_> = records.iter().filter(|r| r.outcome.pod() != Some(pod)).collect();
    assert!(wrong.is_empty(), "{:?}", summary(&records));
}

fn some_more(load: &Load) -> Result<()> {
    let before = load.records().len();
    load.wait("more requests", LONG, |records| records.len() > before + 200)
}

#[test]
fn killed_under_load_while_open_and_adopted() -> Result<()> {
    let mut lab = start_healthy_lab("")?;
    lab.primary.inject(Fault::Kill)?;
    lab.agent.wait_state(SERVICE, BreakerState::Open, LONG)?;
    let before = lab.agent.service(SERVICE)?;
    let load = lab.load(Plan::usual(lab.vip))?;
    some_more(&load)?;
    lab.agent.kill()?;
    some_more(&load)?;

    let output = lab.agent.cli(&["status"])?;
    let shown = text(&output.stdout);
    assert!(output.status.success() && shown.contains("the agent has been gone for"), "{shown}");
    assert!(shown.contains(SERVICE) && shown.contains("Open") && shown.contains("ConnectFailed"), "{shown}");

    lab.agent.start()?;
    some_more(&load)?;
    let after = lab.agent.service(SERVICE)?;
    assert_eq!((after.state, after.epoch, after.since), (BreakerState::Open, before.epoch, before.since));
    assert_eq!(after.reason, before.reason);
    assert!(after.counters.moved > before.counters.moved, "counters continue");
    none_failed(load, &lab.backup.address().to_string());

    lab.primary.heal(Fault::Kill)?;
    lab.agent.wait_state(SERVICE, BreakerState::Closed, LONG)
}

#[test]
fn killed_under_load_while_closed() -> Result<()> {
    let mut lab = start_healthy_lab("")?;
    let load = lab.load(Plan::usual(lab.vip))?;
    some_more(&load)?;
    for _ in 0..3 {
        lab.agent.kill()?;
        some_more(&load)?;
        lab.agent.start()?;
        some_more(&load)?;
    }
    none_failed(load, &lab.primary.address().to_string());
    Ok(())
}

#[test]
fn a_graceful_end_leaves_the_datapath_and_detach_takes_it_away() -> Result<()> {
    let mut lab = start_healthy_lab("")?;
    lab.primary.inject(Fault::Kill)?;
    lab.agent.wait_state(SERVICE, BreakerState::Open, LONG)?;
    lab.agent.stop()?;
    let backup = lab.backup.address().to_string();
    assert_eq!(lab.ask()?.pod(), Some(backup.as_str()), "SIGTERM leaves the datapath in place");
    lab.agent.start_with(&["--detach"])?;
    lab.agent.stop()?;
    assert!(!lab.agent.pin_path().exists(), "the pins are removed");
    assert!(!lab.ask()?.is_success(), "packets go to the dead primary again");
    Ok(())
}

#[test]
fn a_reload_under_load() -> Result<()> {
    let mut lab = start_healthy_lab("")?;
    lab.primary.inject(Fault::Kill)?;
    lab.agent.wait_state(SERVICE, BreakerState::Open, LONG)?;
    let before = lab.agent.service(SERVICE)?;
    let load = lab.load(Plan::usual(lab.vip))?;
    some_more(&load)?;

    // An invalid file changes nothing and is reported.
    lab.agent.write_config("", "services: [{name: dummy}]\n")?;
    wait_for("the bad file to be refused", LONG, || {
        lab.agent.events().is_ok_and(|events| {
            events.iter().any(|e| e.kind == EventType::ConfigRefused && e.message.contains("lab.yaml:"))
        })
    })?;
    some_more(&load)?;
    // A valid file with another policy is applied, this time by a signal.
    lab.configure(Checks::Fast, "    onClose: Reset\n")?;
    lab.agent.signal(Signal::HUP)?;
    wait_for("the good file to be read", LONG, || {
        lab.agent.events().is_ok_and(|events| events.iter().any(|e| e.kind == EventType::Config))
    })?;
    some_more(&load)?;
    let after = lab.agent.service(SERVICE)?;
    assert_eq!((after.epoch, after.since), (before.epoch, before.since));
    none_failed(load, &lab.backup.address().to_string());
    Ok(())
}

#[test]
fn a_second_agent_names_the_first() -> Result<()> {
    let lab = start_healthy_lab("")?;
    let other = tempfile::tempdir()?;
    let mut second = Agent::new(lab.world.node(0).ns(), other.path(), lab.agent.pin_path());
    second.write_config("", &lab.services(Checks::Fast, ""))?;
    let error = format!("{:#}", second.start().unwrap_err());
    assert!(error.contains(&format!("(pid {})", lab.agent.pid()?)), "{error}");
    assert!(lab.ask()?.is_success());
    Ok(())
}

/// TRIALS A10: in a rollout with maxSurge, the new agent of a node waits for the end of the old one.
#[test]
fn a_second_agent_of_a_cluster_waits_for_the_first() -> Result<()> {
    let lab = start_healthy_lab("")?;
    let (log, config) = (lab.world.dir().join("second.log"), lab.world.dir().join("second.yaml"));
    let pins = lab.agent.pin_path().display();
    std::fs::write(&config, format!("agent: {{pinPath: {pins}, socket: {pins}.sock}}\n"))?;
    let mut second = lab.world.node(0).ns().command(binary("breaker")?);
    let second = second.args(["agent", "--kubernetes", "--node-name", "node1", "--config"]).arg(&config);
    let mut second = second.stderr(std::fs::File::create(&log)?).spawn()?;
    let waits = || std::fs::read_to_string(&log).unwrap_or_default().contains("waiting for its end");
    wait_for("the second agent to wait", LONG, waits)?;
    assert!(lab.ask()?.is_success());
    let id = i32::try_from(second.id()).ok().and_then(rustix::process::Pid::from_raw).context("its id")?;
    rustix::process::kill_process(id, Signal::TERM)?;
    assert!(second.wait()?.success(), "{}", std::fs::read_to_string(&log)?);
    Ok(())
}

/// Maps keep the size that they were created with, whatever a later configuration says; everything else works.
#[test]
fn other_sizes_wait_for_a_cleanup() -> Result<()> {
    let mut lab = Lab::new(Checks::Fast)?;
    lab.agent.write_config("  maxServices: 4096\n  maxFlows: 65536\n", &lab.services(Checks::Fast, ""))?;
    lab.agent.start()?;
    wait_all_up(&lab)?;
    lab.primary.inject(Fault::Kill)?;
    lab.agent.wait_state(SERVICE, BreakerState::Open, LONG)?;
    for (services, flows) in [(16, 1024), (16_384, 1_048_576)] {
        lab.agent.stop()?;
        lab.agent.write_config(
            &format!("  maxServices: {services}\n  maxFlows: {flows}\n"),
            &lab.services(Checks::Fast, ""),
        )?;
        lab.agent.start()?;
        lab.agent.wait_state(SERVICE, BreakerState::Open, LONG)?;
        assert_eq!(lab.ask()?.pod(), Some(lab.backup.address().to_string().as_str()));
    }
    Ok(())
}

#[test]
fn pins_that_are_not_whole_or_of_another_version_are_refused_with_the_remedy() -> Result<()> {
    let mut lab = start_healthy_lab("")?;
    lab.agent.stop()?;
    let maps = lab.agent.pinned("maps");
    std::fs::remove_file(maps.join("FLOWS4"))?;
    let error = format!("{:#}", lab.agent.start().unwrap_err());
    assert!(error.contains("FLOWS4") && error.contains("breaker cleanup --pin-path"), "{error}");

    assert!(lab.agent.cli(&["cleanup"])?.status.success());
    std::fs::create_dir_all(lab.agent.pin_path().join("v0/maps"))?;
    let error = format!("{:#}", lab.agent.start().unwrap_err());
    assert!(error.contains("another version (v0") && error.contains("breaker cleanup"), "{error}");

    assert!(lab.agent.cli(&["cleanup"])?.status.success());
    lab.agent.start()?;
    wait_all_up(&lab)
}

#[test]
fn the_command_line() -> Result<()> {
    let lab = start_healthy_lab("")?;
    let status = text(&lab.agent.cli(&["status"])?.stdout);
    for word in ["SERVICE", "dummy", "Closed", "dummy-deployment", "backup-deployment", "L7OK", "10.43.0.10:8080/TCP"] {
        assert!(status.contains(word), "no {word} in:\n{status}");
    }
    assert!(!status.contains('\x1b'), "no colour where there is no terminal");

    let tripped = lab.agent.cli(&["trip", SERVICE, "--for", "1s", "--reason", "a test"])?;
    assert!(text(&tripped.stdout).contains("Open (forced)"), "{}", text(&tripped.stdout));
    assert_eq!(lab.ask()?.pod(), Some(lab.backup.address().to_string().as_str()));
    let flows = text(&lab.agent.cli(&["flows", SERVICE])?.stdout);
    assert!(flows.contains("Redirected") && flows.contains(&lab.client.address.to_string()), "{flows}");
    lab.agent.wait_state(SERVICE, BreakerState::Closed, LONG)?;

    lab.agent.cli(&["trip", SERVICE])?;
    assert_eq!(lab.agent.service(SERVICE)?.override_, Override::ForceOpen);
    assert!(lab.agent.cli(&["reset", SERVICE])?.status.success());
    assert_eq!(lab.agent.service(SERVICE)?.state, BreakerState::Closed);

    let events = text(&lab.agent.cli(&["events"])?.stdout);
    assert!(events.contains("Closed -> Open (Operator): forced open by the operator: a test"), "{events}");
    assert!(events.contains("OverrideExpired"), "{events}");
    let unknown = lab.agent.cli(&["get", "nobody"])?;
    assert_eq!(text(&unknown.stderr).trim(), "breaker: there is no service nobody; there are: dummy");
    assert_eq!(unknown.status.code(), Some(1));
    let json: serde_json::Value = serde_json::from_slice(&lab.agent.cli(&["get", SERVICE, "-o", "json"])?.stdout)?;
    assert_eq!((&json["state"], &json["tiers"][0]["role"]), (&"Closed".into(), &"primary".into()));
    Ok(())
}

/// An override outlives the agent.
#[test]
fn an_override_is_adopted() -> Result<()> {
    let mut lab = start_healthy_lab("")?;
    lab.agent.cli(&["trip", SERVICE, "--for", "1h"])?;
    let until = lab.agent.service(SERVICE)?.override_until;
    lab.agent.kill()?;
    lab.agent.start()?;
    wait_all_up(&lab)?;
    let service = lab.agent.service(SERVICE)?;
    assert_eq!((service.state, service.override_), (BreakerState::Open, Override::ForceOpen));
    assert!(service.override_until.is_some() && service.override_until == until);
    Ok(())
}

#[test]
fn the_lease_runs_out() -> Result<()> {
    let mut lab = start_healthy_lab("")?;
    lab.agent.stop()?;
    lab.agent.write_config("  leaseSeconds: 2\n", &lab.services(Checks::Fast, ""))?;
    lab.primary.inject(Fault::FakeError)?;
    lab.agent.start()?;
    lab.agent.wait_state(SERVICE, BreakerState::Open, LONG)?;
    let backup = lab.backup.address().to_string();
    wait_for("the backup to answer", LONG, || lab.ask().is_ok_and(|o| o.pod() == Some(&backup)))?;
    lab.agent.kill()?;
    lab.primary.heal(Fault::FakeError)?;
    let primary = lab.primary.address().to_string();
    wait_for("the primary to answer again", Duration::from_secs(10), || {
        lab.ask().is_ok_and(|o| o.pod() == Some(&primary))
    })?;
    let shown = text(&lab.agent.cli(&["status"])?.stdout);
    assert!(shown.contains("its lease of 2 s is over"), "{shown}");
    Ok(())
}

/// A service is renamed while connections are on its backup: they continue, and the renamed service tracks them.
#[test]
fn a_rename_cuts_nobody() -> Result<()> {
    let mut lab = start_healthy_lab("")?;
    lab.primary.inject(Fault::FakeError)?;
    lab.agent.wait_state(SERVICE, BreakerState::Open, LONG)?;
    let load = lab.load(Plan { per_second: 0, ..Plan::usual(lab.vip) })?;
    some_more(&load)?;
    lab.primary.heal(Fault::FakeError)?;
    lab.agent.wait_state(SERVICE, BreakerState::Closed, LONG)?;
    let renamed = lab.services(Checks::Fast, "").replace("name: dummy\n", "name: renamed\n");
    lab.agent.write_config("", &renamed)?;
    wait_for("the new name", LONG, || lab.agent.service("renamed").is_ok_and(|s| s.applied.is_some()))?;
    // Longer than two sweeps of the flow tables take.
    for _ in 0..6 {
        some_more(&load)?;
    }
    none_failed(load, &lab.backup.address().to_string());
    Ok(())
}
