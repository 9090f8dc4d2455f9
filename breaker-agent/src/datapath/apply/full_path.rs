//! Which frontends have all their packets take the full path: the all-packets bits of the filter.

use std::{collections::BTreeSet, sync::atomic::Ordering};

use breaker_common::switch_flags;
use breaker_core::{
    model::{Frontend, ServiceName},
    plan::ServicePlan,
};

use crate::datapath::{
    KernelDatapath,
    maps::filter::{FilterBit, frontend_position},
};

impl KernelDatapath {
    /// Sets the all-packets bits for a plan's frontends, if the plan needs them. Called before the plan is in
    /// force. Bits that the service already has stay set.
    pub(crate) fn widen_full_path(&mut self, plan: &ServicePlan) {
        if is_tracking(plan.flags) {
            let before = self.full_path_frontends.get(&plan.name).into_iter().flatten();
            self.set_full_path(&plan.name, plan.frontends().chain(before).copied().collect());
        }
    }

    /// Clears the all-packets bits, if the plan does not need them. Called after the plan is in force.
    ///
    /// While a plan needs the bits, frontends that the service has lost keep theirs, too: another service may have
    /// such a frontend now, but flows to it may still belong to this service.
    pub(crate) fn narrow_full_path(&mut self, plan: &ServicePlan, index: u32) {
        if is_tracking(plan.flags) || self.is_in_census(&plan.name) {
            return;
        }
        self.set_full_path(&plan.name, BTreeSet::new());
        // Because of a limit, a program may have sent a connection to the backup since the last sweep. Then the
        // bits are still needed.
        if plan.limits.is_some() && self.has_overflowed(index) {
            self.set_full_path(&plan.name, plan.frontends().copied().collect());
        }
    }

    pub(crate) fn has_overflowed(&self, index: u32) -> bool {
        self.maps.limits.overflowed(index).load(Ordering::SeqCst) != 0
    }

    pub(crate) fn is_in_census(&self, name: &ServiceName) -> bool {
        self.limited.get(name).is_some_and(|limited| limited.census_since.is_some())
    }

    /// Sets the filter's all-packets bits for exactly these frontends of a service.
    pub(crate) fn set_full_path(&mut self, name: &ServiceName, wanted: BTreeSet<Frontend>) {
        let before = self.full_path_frontends.remove(name).unwrap_or_default();
        for frontend in wanted.difference(&before) {
            self.maps.filter.add(FilterBit::AllPackets, frontend_position(frontend));
        }
        for frontend in before.difference(&wanted) {
            self.maps.filter.remove(FilterBit::AllPackets, frontend_position(frontend));
        }
        if !wanted.is_empty() {
            self.full_path_frontends.insert(name.clone(), wanted);
        }
    }
}

/// Whether all packets to a service's frontends take the full path, by the bits of [`switch_flags`].
pub(crate) const fn is_tracking(flags: u8) -> bool {
    flags & switch_flags::TRACK != 0
}
