//! The switch of a service: one 64-bit word that puts a plan in force. Only this file writes it for a plan.

use breaker_common::{Switch, switch_flags};
use breaker_core::plan::ServicePlan;

use super::record;
use crate::datapath::KernelDatapath;

impl KernelDatapath {
    /// Puts a plan in force: writes the service's record, and then its switch in one store. Everything that the
    /// switch leads to must already be in the maps.
    pub(crate) fn commit_switch(&mut self, plan: &ServicePlan, index: u32, buffer: u32) {
        self.maps.set_record(index, &record::of(plan, index));
        let mut flags = plan.flags;
        if buffer == 1 {
            flags |= switch_flags::BUFFER;
        }
        if plan.flags & switch_flags::FAST != 0 {
            self.maps.set_fast_path_in_use(true);
            self.fast_path_seen = true;
        }
        let decision = &plan.decision;
        let switch = Switch { epoch: decision.epoch, share: decision.share, state: decision.state as u8, flags };
        self.maps.set_switch(index, switch);
    }
}
