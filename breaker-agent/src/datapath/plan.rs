//! What the datapath should be for one service: pure, from the domain and the breaker's decision.

use std::net::{IpAddr, SocketAddr, SocketAddrV4};

use breaker_common::{BreakerState, SLOTS, StateReason, switch_flags};

use crate::{
    maglev::{self, Candidate},
    model::{
        Backend, EstablishedPolicy, Frontend, Mode, OnAgentLoss, Override, Service, ServiceName, WhenAllUnhealthy,
    },
};

/// What one slot of a selection table holds.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Slot {
    /// Leave it to kube-proxy.
    PassThrough,
    /// Refuse.
    Reject,
    /// Send it there.
    Backend(SocketAddrV4),
}

/// A selection table: [`SLOTS`] places.
pub type SlotTable = Vec<Slot>;

/// The decision of a moment, as the breaker and the operator made it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Decision {
    /// The breaker's state.
    pub state: BreakerState,
    /// The primary's share, permille.
    pub share: u16,
    /// Counts the changes of state.
    pub epoch: u32,
    /// Why.
    pub reason: StateReason,
    /// Since when, nanoseconds since 1970.
    pub since_unix_ns: u64,
    /// Trips in a row.
    pub trips: u32,
    /// The operator's word and its end (nanoseconds since 1970, 0 = never).
    pub override_: (Override, u64),
    /// Whether flows on backups may be alive.
    pub draining: bool,
}

/// What the datapath should be for one service. Two equal plans need no write.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ServicePlan {
    /// The service.
    pub name: ServiceName,
    /// Where its clients connect to.
    pub frontends: Vec<Frontend>,
    /// Tables for the two tiers: primary, backup.
    pub slots: [SlotTable; 2],
    /// The decision.
    pub decision: Decision,
    /// Bits of [`switch_flags`], but for the buffer, which is the kernel's own affair.
    pub flags: u8,
    /// Connections that a half-open breaker lets through.
    pub half_open_limit: u32,
}

impl ServicePlan {
    /// Plans a service. `backup` are the backends of the tier that would take over, none if nothing is usable.
    #[must_use]
    pub fn new(service: &Service, decision: Decision, backup: &[Backend]) -> Self {
        Self {
            name: service.name.clone(),
            frontends: service.frontends.clone(),
            slots: [vec![Slot::PassThrough; SLOTS as usize], backup_slots(service, backup)],
            flags: flags(service, &decision, !backup.is_empty()),
            decision,
            half_open_limit: service.breaker.half_open_connections,
        }
    }

    /// The distinct backends that the tables name.
    #[must_use]
    pub fn backends(&self) -> Vec<SocketAddrV4> {
        let mut backends: Vec<_> = self
            .slots
            .iter()
            .flatten()
            .filter_map(|slot| match slot {
                Slot::Backend(address) => Some(*address),
                Slot::PassThrough | Slot::Reject => None,
            })
            .collect();
        backends.sort_unstable();
        backends.dedup();
        backends
    }
}

fn backup_slots(service: &Service, backup: &[Backend]) -> SlotTable {
    let candidates: Vec<Candidate> =
        backup.iter().map(|b| Candidate { key: identity(b.address), weight: b.weight }).collect();
    let nothing = match service.when_all_unhealthy {
        WhenAllUnhealthy::PassThrough => Slot::PassThrough,
        WhenAllUnhealthy::Reject => Slot::Reject,
    };
    match maglev::fill(&candidates) {
        Some(table) => table
            .iter()
            .map(|&i| match backup[i].address {
                SocketAddr::V4(address) => Slot::Backend(address),
                SocketAddr::V6(_) => nothing,
            })
            .collect(),
        None => vec![nothing; SLOTS as usize],
    }
}

/// A backend's identity in the selection, the same for ever and on every node.
fn identity(address: SocketAddr) -> u64 {
    let ip = match address.ip() {
        IpAddr::V4(ip) => u64::from(u32::from(ip)),
        #[expect(clippy::cast_possible_truncation, reason = "the lower half tells hosts apart")]
        IpAddr::V6(ip) => u128::from(ip) as u64,
    };
    (ip << 16) | u64::from(address.port())
}

fn flags(service: &Service, decision: &Decision, backup_usable: bool) -> u8 {
    let mut flags = 0;
    let settled = decision.state == BreakerState::Closed && decision.share >= breaker_common::SHARE_ALL;
    if service.on_agent_loss == OnAgentLoss::Hold {
        flags |= switch_flags::HOLD;
    }
    if service.mode == Mode::DryRun {
        // Decided and counted, but no packet of an established flow is looked at, let alone reset; flows that were
        // moved before still end in peace.
        let tracked = if decision.draining { switch_flags::TRACK } else { 0 };
        return flags | switch_flags::DRY_RUN | tracked;
    }
    if !settled || decision.draining {
        flags |= switch_flags::TRACK;
    }
    // With nowhere to go a reset would only make a bad day worse.
    if decision.state == BreakerState::Open && service.on_open == EstablishedPolicy::Reset && backup_usable {
        flags |= switch_flags::RESET_PRIMARY;
    }
    if decision.state == BreakerState::Closed && service.on_close == EstablishedPolicy::Reset {
        flags |= switch_flags::RESET_BACKUP;
    }
    flags
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config;
    use std::path::Path;

    fn service(extra: &str) -> Service {
        let text = format!(
            "services: [{{name: s, frontends: [{{address: 10.43.0.1, port: 80}}], {extra} \
             primary: {{backends: [{{address: 10.42.0.2, port: 80}}]}}, backups: [{{backends: [{{address: 10.42.0.3, port: 80}}]}}]}}]"
        );
        config::parse(Path::new("t"), &text).unwrap().services.remove(0)
    }

    fn decision(state: BreakerState, share: u16, draining: bool) -> Decision {
        Decision {
            state,
            share,
            epoch: 1,
            reason: StateReason::Initial,
            since_unix_ns: 0,
            trips: 0,
            override_: (Override::Auto, 0),
            draining,
        }
    }

    use switch_flags::{DRY_RUN, HOLD, RESET_BACKUP, RESET_PRIMARY, TRACK};

    #[test]
    fn flags_follow_from_state_and_policy() {
        let rows: &[(&str, BreakerState, u16, bool, bool, u8)] = &[
            ("", BreakerState::Closed, 1000, false, true, 0),
            ("", BreakerState::Closed, 1000, true, true, TRACK),
            ("", BreakerState::Closed, 500, false, true, TRACK),
            ("", BreakerState::Open, 0, false, true, TRACK | RESET_PRIMARY),
            ("", BreakerState::Open, 0, false, false, TRACK),
            ("", BreakerState::HalfOpen, 0, false, true, TRACK),
            ("onOpen: Keep,", BreakerState::Open, 0, false, true, TRACK),
            ("onClose: Reset,", BreakerState::Closed, 1000, true, true, TRACK | RESET_BACKUP),
            ("onAgentLoss: Hold,", BreakerState::Closed, 1000, false, true, HOLD),
            ("mode: DryRun,", BreakerState::Open, 0, false, true, DRY_RUN),
            ("mode: DryRun,", BreakerState::Open, 0, true, true, DRY_RUN | TRACK),
        ];
        for (extra, state, share, draining, usable, expected) in rows {
            let service = service(extra);
            let backup = if *usable { service.backups[0].backends.clone() } else { vec![] };
            let plan = ServicePlan::new(&service, decision(*state, *share, *draining), &backup);
            assert_eq!(plan.flags, *expected, "{extra} {state:?} {share} {draining} {usable}");
        }
    }

    #[test]
    fn an_unusable_backup_is_never_redirected_to() {
        let pass = ServicePlan::new(&service(""), decision(BreakerState::Open, 0, false), &[]);
        assert!(pass.slots[1].iter().all(|slot| *slot == Slot::PassThrough));
        let reject = service("whenAllUnhealthy: Reject,");
        let reject = ServicePlan::new(&reject, decision(BreakerState::Open, 0, false), &[]);
        assert!(reject.slots[1].iter().all(|slot| *slot == Slot::Reject));
        assert!(reject.backends().is_empty());
    }

    #[test]
    fn slots_name_known_backends_only() {
        let service = service("");
        let plan = ServicePlan::new(&service, decision(BreakerState::Open, 0, false), &service.backups[0].backends);
        assert_eq!(plan.backends(), vec!["10.42.0.3:80".parse().unwrap()]);
        assert_eq!(plan.slots[1].len(), SLOTS as usize);
    }
}
