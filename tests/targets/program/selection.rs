//! Selection among many backends: tables of more than one part.

use std::{
    collections::BTreeMap,
    net::{IpAddr, Ipv4Addr, SocketAddr},
};

use anyhow::Result;
use breaker_common::BreakerState::Open;
use breaker_tests::packets::{Segment, TestRig, plan, service, vip};

use super::syn;

fn backends(number: u8) -> Vec<SocketAddr> {
    let address = |block: u8, host: u8| SocketAddr::new(IpAddr::V4(Ipv4Addr::new(10, 44, block, host)), 80);
    (0..number).flat_map(|block| (0..100).map(move |host| address(block, host))).collect()
}

/// TRIALS E6: each of 300 backends gets connections, also after the agent was restarted.
#[test]
fn every_one_of_many_backends_gets_connections() -> Result<()> {
    let mut rig = TestRig::new()?;
    let all = backends(3);
    let service = service("dummy", vip(10), &all, "")?;
    rig.apply(&plan(&service, Open, 3))?;
    let choose = |rig: &mut TestRig| -> Result<BTreeMap<SocketAddr, u32>> {
        let mut chosen = BTreeMap::new();
        for port in 0..6000_u16 {
            let moved = Segment::read(&rig.from_pod(&syn(1024 + port))?.bytes)?;
            *chosen.entry(moved.destination).or_default() += 1;
        }
        Ok(chosen)
    };
    let before = choose(&mut rig)?;
    assert_eq!(before.len(), all.len(), "every backend gets connections");
    let (fewest, most) = (before.values().min().unwrap(), before.values().max().unwrap());
    assert!(*fewest >= 4 && *most <= 60, "20 on average: {fewest} to {most}");
    rig.restart()?;
    assert_eq!(choose(&mut rig)?, before);
    // With fewer backends the parts of the larger table go.
    let parts = |rig: &TestRig| breaker_tests::tables::entries(&rig.map("SLOTS"));
    assert_eq!(parts(&rig)?, 64, "4,093 slots");
    let mut smaller = service.clone();
    smaller.backups[0].backends.truncate(3);
    rig.apply(&plan(&smaller, Open, 4))?;
    for _ in 0..2 {
        rig.datapath.heartbeat(std::time::Duration::ZERO, 1);
    }
    assert_eq!(parts(&rig)?, 1);
    Ok(())
}
