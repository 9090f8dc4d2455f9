//! The filter and the prefilter: which packets take the full path behind the tail call.

use std::net::SocketAddr;

use anyhow::{Result, ensure};
use aya::maps::{Array, Map, MapData, ProgramArray};
use breaker_common::{FilterWords, PROTO_TCP, TcHook, V4, filter_bit};
use breaker_core::model::{Route, Service};

use super::*;
use breaker_tests::packets::service_with;

/// Filter bits (frontend, all packets) of an endpoint without a role: every packet passes the prefilter.
const NOTHING: (bool, bool) = (false, false);
/// Only packets that may start a flow take the full path.
const FIRST: (bool, bool) = (true, false);
/// All packets take the full path, which looks for their flow before it looks up the endpoint.
const EVERY: (bool, bool) = (true, true);
/// A backend: all packets take the full path, which looks up the endpoint before it looks for a flow.
const BACKEND: (bool, bool) = (false, true);

/// The filter's two bits for an IPv4 address and port under TCP: (frontend, all packets).
fn filter_bits(rig: &TestRig, of: SocketAddr) -> Result<(bool, bool)> {
    let SocketAddr::V4(v4) = of else { anyhow::bail!("{of} is not IPv4") };
    let filter: Array<_, FilterWords> = Map::Array(MapData::from_pin(rig.map("FILTER"))?).try_into()?;
    let (word, bit) = filter_bit(V4::new(v4.ip().octets()), v4.port().to_be_bytes(), PROTO_TCP);
    let words = filter.get(&word, 0)?;
    Ok((words.frontend & bit != 0, words.all_packets & bit != 0))
}

#[test]
fn of_an_idle_service_only_first_packets_take_the_full_path() -> Result<()> {
    let mut rig = TestRig::new()?;
    let (frontend, backup) = (vip(10), pod(BACKUP, 80));
    let service = service("dummy", frontend, &[backup], "")?;
    let backends = service.backups[0].backends.clone();
    let idle_plan = |epoch| plan_with(&service, Closed, epoch, 1000, false, &backends);
    assert_eq!((filter_bits(&rig, frontend)?, filter_bits(&rig, backup)?), (NOTHING, NOTHING));
    let steps = [
        (idle_plan(1), FIRST, "new"),
        (plan(&service, Open, 2), EVERY, "open"),
        (plan(&service, Closed, 3), EVERY, "closed, with flows on the backup"),
        (idle_plan(3), FIRST, "closed, no flows left"),
        (plan(&service, HalfOpen, 4), EVERY, "half-open"),
    ];
    for (plan, expected, when) in steps {
        rig.apply(&plan)?;
        assert_eq!((filter_bits(&rig, frontend)?, filter_bits(&rig, backup)?), (expected, BACKEND), "{when}");
        let before = filter_bits(&rig, frontend)?;
        rig.restart()?;
        assert_eq!(
            (filter_bits(&rig, frontend)?, filter_bits(&rig, backup)?),
            (before, BACKEND),
            "{when}, after a restart"
        );
    }
    rig.datapath.remove(&service.name)?;
    rig.datapath.sweep(None)?;
    assert_eq!((filter_bits(&rig, frontend)?, filter_bits(&rig, backup)?), (NOTHING, NOTHING), "removed");
    Ok(())
}

/// Adding or removing one frontend of a service does not touch the bits of the others. An address that is a frontend
/// and a backend has both bits.
#[test]
fn frontends_come_and_go() -> Result<()> {
    let mut rig = TestRig::new()?;
    let backup = pod(BACKUP, 80);
    let with = |frontends: &[SocketAddr]| {
        let frontends: Vec<_> = frontends.iter().map(|frontend| (*frontend, "TCP")).collect();
        service_with("dummy", &frontends, &[backup], "")
    };
    rig.apply(&plan(&with(&[vip(10), vip(11)])?, Open, 1))?;
    rig.apply(&plan(&with(&[vip(11), vip(12)])?, Open, 1))?;
    let all = [vip(10), vip(11), vip(12)].map(|frontend| filter_bits(&rig, frontend));
    // A removed frontend keeps its all-packets bit while the service exists, because its flows may live on. Its
    // frontend bit is cleared: another service may own the address by now.
    ensure!(all.into_iter().collect::<Result<Vec<_>>>()? == [BACKEND, EVERY, EVERY]);
    let chained = service("chained", backup, &[pod(5, 80)], "")?;
    rig.apply(&plan_with(&chained, Closed, 1, 1000, false, &chained.backups[0].backends))?;
    assert_eq!(filter_bits(&rig, backup)?, EVERY);
    rig.datapath.remove(&chained.name)?;
    assert_eq!(filter_bits(&rig, backup)?, BACKEND);
    Ok(())
}

/// If the full-path program is missing, the prefilter passes the packet untouched and counts the reason.
#[test]
fn without_the_second_program_packets_go_on() -> Result<()> {
    let mut rig = rig(Open, "")?;
    let mut programs: ProgramArray<_> = Map::ProgramArray(MapData::from_pin(rig.map("PROGRAMS"))?).try_into()?;
    programs.clear_index(&(TcHook::PodIn as u32))?;
    assert_untouched(&rig.from_pod(&syn(1))?, &syn(1).bytes(), "no program to tail-call");
    assert_eq!(reason(&rig, PassReason::ProgramMissing), 1);
    // A new agent puts the program back.
    rig.restart()?;
    assert_forwarded_as(&rig.from_pod(&syn(2))?, &with_endpoints(&syn(2), pod(CLIENT, 2), pod(BACKUP, 80)));
    Ok(())
}

/// A service was renamed while no agent ran. The leftover service has the old frontends but no routes of its own;
/// applying and removing it must not take the frontends from the renamed service.
#[test]
fn what_is_left_of_a_service_takes_no_frontend_back() -> Result<()> {
    let mut rig = TestRig::new()?;
    let (one, other) = (vip(10), SocketAddr::new(vip(11).ip(), 9090));
    let (backup, second) = (pod(BACKUP, 80), pod(BACKUP, 90));
    let named = |name: &str| -> Result<Service> {
        let mut service = service_with(name, &[(one, "TCP"), (other, "TCP")], &[backup], "")?;
        let frontends = service.frontends.iter().filter(|frontend| frontend.address == other).copied().collect();
        service.routes.push(Route { frontends, backends: [(backup, second)].into() });
        Ok(service)
    };
    rig.apply(&plan(&named("before")?, Open, 1))?;
    rig.restart()?;
    rig.apply(&plan(&named("after")?, Open, 2))?;
    let before = named("before")?;
    let left = Service { frontends: before.frontends, ..Service::empty(before.name.clone()) };
    rig.apply(&plan_with(&left, Closed, 2, 1000, true, &[]))?;
    rig.datapath.remove(&before.name)?;
    for (port, frontend, backend) in [(1, one, backup), (2, other, second)] {
        let segment = Segment { destination: frontend, ..syn(port) };
        assert_forwarded_as(&rig.from_pod(&segment)?, &with_endpoints(&segment, pod(CLIENT, port), backend));
    }
    Ok(())
}
