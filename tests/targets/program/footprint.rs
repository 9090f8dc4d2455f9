//! What packets write: only memory of their own CPU, as long as they decide nothing.

use std::{collections::BTreeMap, path::Path, process::Command};

use anyhow::{Context as _, Result};
use breaker_common::BreakerState::{Closed, Open};
use breaker_tests::packets::{
    Segment, TestRig,
    flags::{ACK, SYN},
    plan, pod, service, vip,
};

use super::{BACKUP, CLIENT, data, syn};

/// Maps with one value for each CPU: writing them does not slow other CPUs down.
const PER_CPU: [&str; 5] = ["COUNTERS", "REASONS", "SEGMENTS4", "SEGMENTS6", "EVENT_BUDGET"];

/// The content of every pinned map, by name, as bpftool prints it.
fn dump(rig: &TestRig) -> Result<BTreeMap<String, String>> {
    let mut maps = BTreeMap::new();
    let any = rig.map("SWITCHES");
    for entry in any.parent().context("the directory of the maps")?.read_dir()? {
        let path = entry?.path();
        let name = path.file_name().unwrap_or_default().to_string_lossy().into_owned();
        // A ring buffer and a map of programs cannot be dumped. Neither is written here.
        if name != "EVENTS" && name != "PROGRAMS" {
            maps.insert(name, content(&path)?);
        }
    }
    Ok(maps)
}

fn content(map: &Path) -> Result<String> {
    let output = Command::new("bpftool").args(["-j", "map", "dump", "pinned"]).arg(map).output().context("bpftool")?;
    anyhow::ensure!(output.status.success(), "{}: {}", map.display(), String::from_utf8_lossy(&output.stderr));
    Ok(String::from_utf8_lossy(&output.stdout).into_owned())
}

/// Names of the maps that 1,000 packets change. The first ten may set marks that stay.
fn changed_by(rig: &mut TestRig, mut packet: impl FnMut(&mut TestRig) -> Result<()>) -> Result<Vec<String>> {
    for _ in 0..10 {
        packet(rig)?;
    }
    let before = dump(rig)?;
    for _ in 0..1000 {
        packet(rig)?;
    }
    let after = dump(rig)?;
    Ok(after.into_iter().filter(|(name, now)| before.get(name) != Some(now)).map(|(name, _)| name).collect())
}

/// TRIALS D: packets of a closed service, of established flows, and their replies write per-CPU counters only.
#[test]
fn packets_without_a_decision_write_nothing_that_cpus_share() -> Result<()> {
    let mut rig = TestRig::new()?;
    let service = service("dummy", vip(10), &[pod(BACKUP, 80)], "")?;
    let shared =
        |changed: Vec<String>| changed.into_iter().filter(|name| !PER_CPU.contains(&name.as_str())).collect::<Vec<_>>();
    let none: [&str; 0] = [];
    let mut idle = plan(&service, Closed, 2);
    idle.flags = 0;
    rig.apply(&idle)?;
    let closed = changed_by(&mut rig, |rig| rig.from_pod(&data(1)).map(drop))?;
    assert_eq!(closed, none, "a data packet of a closed service");
    let closed = changed_by(&mut rig, |rig| rig.from_pod(&syn(1)).map(drop))?;
    assert_eq!(shared(closed), none, "a new connection of a closed service");
    rig.apply(&plan(&service, Open, 3))?;
    rig.from_pod(&syn(1))?;
    rig.to_pod(&Segment::new(pod(BACKUP, 80), pod(CLIENT, 1), SYN | ACK))?;
    let established = changed_by(&mut rig, |rig| rig.from_pod(&data(1)).map(drop))?;
    assert_eq!(shared(established.clone()), none, "a packet of an established flow");
    assert!(established.iter().any(|name| name == "COUNTERS"), "{established:?}");
    let reply = Segment::new(pod(BACKUP, 80), pod(CLIENT, 1), ACK);
    let replies = changed_by(&mut rig, |rig| rig.to_pod(&reply).map(drop))?;
    assert_eq!(shared(replies), none, "a reply");
    Ok(())
}
