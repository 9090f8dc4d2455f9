//! A datapath that keeps plans in memory and fails on request, for tests of everything above the datapath.

use std::{
    collections::{BTreeMap, BTreeSet},
    time::Duration,
};

use breaker_common::{LimitCounters, ServiceCounters};
use breaker_core::{
    datapath::{
        Adopted, Datapath, DatapathError, Destination, FlowSnapshot, FlowTables, LimitReport, PacketEvent, Sweep,
    },
    model::ServiceName,
    plan::ServicePlan,
};

/// An in-memory [`Datapath`] for tests.
#[derive(Debug, Default)]
pub struct FakeDatapath {
    /// Plans in force, by service.
    pub applied: BTreeMap<ServiceName, ServicePlan>,
    /// Every plan that was applied successfully, in order.
    pub log: Vec<ServicePlan>,
    /// Number of upcoming writes that fail.
    pub failures: usize,
    /// Services that [`Datapath::adopt`] returns.
    pub left_behind: Vec<Adopted>,
    /// Number of live flows that [`Datapath::sweep`] reports, by service.
    pub alive: BTreeMap<ServiceName, usize>,
    /// Backends that have flows.
    pub flows_to: BTreeSet<Destination>,
    /// Limit counters that [`Datapath::limits`] returns, by service.
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

    fn counters(&self, _name: &ServiceName) -> Result<ServiceCounters, DatapathError> {
        Ok(ServiceCounters::default())
    }

    fn limits(&self, name: &ServiceName, _clients: usize) -> Result<LimitReport, DatapathError> {
        Ok(LimitReport { counters: self.limited.get(name).copied().unwrap_or_default(), ..LimitReport::default() })
    }

    fn sweep(&mut self, _idle: Option<Duration>) -> Result<Sweep, DatapathError> {
        Ok(Sweep {
            redirected: self.alive.clone(),
            tables: [
                FlowTables { live: [0, self.alive.values().sum()], ..FlowTables::default() },
                FlowTables::default(),
            ],
            overflowed: self.overflowed.clone(),
            ..Sweep::default()
        })
    }

    fn remove_flows(
        &mut self,
        _name: &ServiceName,
        doomed: &dyn Fn(Destination) -> bool,
    ) -> Result<usize, DatapathError> {
        self.may_fail()?;
        let before = self.flows_to.len();
        self.flows_to.retain(|backend| !doomed(*backend));
        Ok(before - self.flows_to.len())
    }

    fn is_local(&self, _destination: Destination) -> bool {
        false
    }

    fn flows(&self, _name: &ServiceName, _limit: usize) -> Result<Vec<FlowSnapshot>, DatapathError> {
        Ok(Vec::new())
    }

    fn events(&mut self) -> Vec<PacketEvent> {
        Vec::new()
    }
}
