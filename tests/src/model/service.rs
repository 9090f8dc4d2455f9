//! A protected service: where its breaker stands, and where a new connection may go.

use std::net::SocketAddr;

use breaker_common::BreakerState;

use super::limit::Limits;

/// What the agent decided for a service, with the policies that it was configured with.
#[derive(Clone, Debug)]
pub struct Service {
    /// Where its clients connect to: one address, TCP and UDP, for each family.
    pub frontends: Vec<SocketAddr>,
    /// Backups that are usable, of both families.
    pub backups: Vec<SocketAddr>,
    /// Where the breaker stands.
    pub state: BreakerState,
    /// How many of 1000 go to the primary.
    pub share: u16,
    /// Counts the changes of state.
    pub epoch: u32,
    /// Flows on a backup may be alive.
    pub draining: bool,
    /// `mode: DryRun`.
    pub dry_run: bool,
    /// `onOpen: Reset`.
    pub reset_on_open: bool,
    /// `onClose: Reset`.
    pub reset_on_close: bool,
    /// `whenAllUnhealthy: Reject`.
    pub reject: bool,
    /// `fastPath: PeerRedirect`.
    pub fast: bool,
    /// `externalTrafficPolicy: Local`.
    pub keeps_client: bool,
    /// `halfOpenConnections`.
    pub half_open_limit: u32,
    /// How many of them were let through in this epoch.
    pub half_open_taken: u32,
    /// `limits`.
    pub limits: Option<Limits>,
    /// Connections of the primary went to the backup because of a limit: their flows are looked for.
    pub overflowed: bool,
}

/// Where a new connection goes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Choice {
    /// It is left to kube-proxy.
    Primary,
    /// It is refused.
    Refuse,
    /// It is sent there.
    Backup(SocketAddr),
}

impl Service {
    /// Closed, and all of the traffic on the primary.
    const fn is_settled(&self) -> bool {
        matches!(self.state, BreakerState::Closed) && self.share >= 1000
    }

    /// Whether flows are looked for. A service that is closed, settled and drained costs nothing.
    #[must_use]
    pub const fn tracks(&self) -> bool {
        self.draining || self.overflowed || !self.dry_run && !self.is_settled()
    }

    /// Whether established connections on the primary from before are reset: by policy, and only where there is a backup.
    #[must_use]
    pub fn resets_primary(&self) -> bool {
        !self.dry_run && self.state == BreakerState::Open && self.reset_on_open && !self.backups.is_empty()
    }

    /// Whether established connections on a backup from before are reset.
    #[must_use]
    pub fn resets_backup(&self) -> bool {
        !self.dry_run && self.state == BreakerState::Closed && self.reset_on_close
    }

    /// Where a new connection to one of its frontends may go. Half-open, exactly so many go to the primary first; whether it
    /// is one of those.
    pub fn choices(&mut self, frontend: SocketAddr) -> (Vec<Choice>, bool) {
        if self.state == BreakerState::HalfOpen && self.half_open_taken < self.half_open_limit {
            self.half_open_taken += 1;
            return (vec![Choice::Primary], true);
        }
        let mut choices = Vec::new();
        if self.share > 0 {
            choices.push(Choice::Primary);
        }
        if self.share < 1000 {
            let backups = self.backups_for(frontend);
            // Never redirect into nothing.
            match (backups.is_empty(), self.reject) {
                (false, _) => choices.extend(backups),
                (true, true) => choices.push(Choice::Refuse),
                (true, false) => choices.push(Choice::Primary),
            }
        }
        (choices, false)
    }

    /// The backups that a frontend leads to.
    #[must_use]
    pub fn backups_for(&self, frontend: SocketAddr) -> Vec<Choice> {
        let of_family = self.backups.iter().filter(|b| b.is_ipv4() == frontend.is_ipv4());
        of_family.map(|b| Choice::Backup(*b)).collect()
    }
}
