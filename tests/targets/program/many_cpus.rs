//! Tables on machines with many CPUs.

use anyhow::{Context as _, Result};
use aya::maps::{HashMap, Map, MapData};
use breaker_agent::datapath::sizes::Sizes;
use breaker_common::{BreakerState::Open, Flow, FlowKey, V4};
use breaker_tests::packets::{Segment, TestRig, flags::SYN, plan, pod, service, vip};
use rustix::thread::{CpuSet, sched_getaffinity, sched_setaffinity};

use super::BACKUP;

/// TRIALS D3: connection requests on every CPU leave the table of pending flows room for as many as its size promises.
/// An LRU map gives each CPU 128 free entries at a time.
#[test]
fn requests_on_every_cpu_evict_none_before_the_table_is_full() -> Result<()> {
    let sizes = Sizes::for_memory(1024);
    let mut rig = TestRig::with_sizes(&sizes)?;
    rig.apply(&plan(&service("dummy", vip(10), &[pod(BACKUP, 80)], "")?, Open, 2))?;
    let request = |rig: &mut TestRig, number: u32| {
        let port = 1024 + u16::try_from(number & 0x7fff).unwrap_or(0);
        let client = pod(10 + u8::try_from(number >> 15).unwrap_or(0), port);
        rig.from_pod(&Segment::new(client, vip(10), SYN)).map(|_| ())
    };
    let all = sched_getaffinity(None).context("the CPUs of this thread")?;
    for (number, cpu) in (0..).zip((0..CpuSet::MAX_CPU).filter(|cpu| all.is_set(*cpu))) {
        let mut one = CpuSet::new();
        one.set(cpu);
        sched_setaffinity(None, &one).context("move to a CPU")?;
        request(&mut rig, number)?;
    }
    for number in all.count()..sizes.pending {
        request(&mut rig, number)?;
    }
    sched_setaffinity(None, &all).context("move to any CPU")?;
    let map = Map::from_map_data(MapData::from_pin(rig.map("PENDING4")).context("open PENDING4")?)?;
    let pending = HashMap::<_, FlowKey<V4>, Flow<V4, u8>>::try_from(map)?;
    let kept = u32::try_from(pending.keys().count())?;
    assert_eq!(kept, sizes.pending, "{} CPUs", all.count());
    Ok(())
}
