//! A datapath that only remembers, and fails when told to: for tests of everything above it.

use std::{
    collections::{BTreeMap, BTreeSet},
    time::Duration,
};

use breaker_common::{LimitCounters, PassReason, ServiceCounters};

use super::{
    Adopted, Datapath, DatapathError, Destination, FlowView, LimitReport, PacketEvent, Sweep, plan::ServicePlan,
};
use crate::model::ServiceName;

/// See the module.
#[derive(Debug, Default)]
pub struct FakeDatapath {
    /// Plans that are in force.
    pub applied: BTreeMap<ServiceName, ServicePlan>,
    /// Every successful write, in order.
    pub log: Vec<ServicePlan>,
    /// How many of the next writes fail.
    pub failures: usize,
    /// What [`Datapath::adopt`] returns.
    pub left_behind: Vec<Adopted>,
    /// What [`Datapath::sweep`] finds alive.
    pub alive: BTreeMap<ServiceName, usize>,
    /// Backends that flows go to.
    pub flows_to: BTreeSet<Destination>,
    /// How often the heart beat.
    pub beats: usize,
    /// What limits did, by service.
    pub limited: BTreeMap<ServiceName, LimitCounters>,
    /// Services whose primary was at a limit.
    pub overflowed: BTreeSet<ServiceName>,
}

impl FakeDatapath {
    fn may_fail(&mut self) -> Result<(), DatapathError> {
        if self.failures == 0 {
            return Ok(());
        }
        self.failures -= 1;
        Err(DatapathError("the fake was told to fail".into()))
    }
}

impl Datapath for FakeDatapath {
    fn adopt(&mut self) -> Result<Vec<Adopted>, DatapathError> {
        Ok(self.left_behind.clone())
    }

    fn apply(&mut self, plan: &ServicePlan) -> Result<(), DatapathError> {
        self.may_fail()?;
        self.applied.insert(plan.name.clone(), plan.clone());
        self.log.push(plan.clone());
        Ok(())
    }

    fn remove(&mut self, name: &ServiceName) -> Result<(), DatapathError> {
        self.may_fail()?;
        self.applied.remove(name);
        Ok(())
    }

    fn beat(&mut self, _lease: Duration, _unix_ns: u64) {
        self.beats += 1;
    }

    fn counters(&self, _name: &ServiceName) -> Result<ServiceCounters, DatapathError> {
        Ok(ServiceCounters::default())
    }

    fn limits(&self, name: &ServiceName, _clients: usize) -> Result<LimitReport, DatapathError> {
        Ok(LimitReport { counters: self.limited.get(name).copied().unwrap_or_default(), ..LimitReport::default() })
    }

    fn reasons(&self) -> Result<Vec<(PassReason, u64)>, DatapathError> {
        Ok(Vec::new())
    }

    fn sweep(&mut self, _idle: Option<Duration>) -> Result<Sweep, DatapathError> {
        Ok(Sweep {
            redirected: self.alive.clone(),
            entries: self.alive.values().sum(),
            overflowed: self.overflowed.clone(),
            ..Sweep::default()
        })
    }

    fn cut(&mut self, _name: &ServiceName, doomed: &dyn Fn(Destination) -> bool) -> Result<usize, DatapathError> {
        self.may_fail()?;
        let before = self.flows_to.len();
        self.flows_to.retain(|backend| !doomed(*backend));
        Ok(before - self.flows_to.len())
    }

    fn is_near(&self, _destination: Destination) -> bool {
        false
    }

    fn flows(&self, _name: &ServiceName, _limit: usize) -> Result<Vec<FlowView>, DatapathError> {
        Ok(Vec::new())
    }

    fn events(&mut self) -> Vec<PacketEvent> {
        Vec::new()
    }
}
