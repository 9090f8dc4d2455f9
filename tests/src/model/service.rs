//! A protected service: the state of its breaker, and where a new connection may go.

use std::net::SocketAddr;

use breaker_common::BreakerState;

use super::limit::Limits;

/// A service: the agent's decision, and the policies from its configuration.
#[derive(Clone, Debug)]
pub struct Service {
    /// Addresses and ports that clients connect to, by TCP and UDP; one for each IP family.
    pub frontends: Vec<SocketAddr>,
    /// Usable backends of the backup, of both IP families.
    pub backups: Vec<SocketAddr>,
    /// State of the breaker.
    pub state: BreakerState,
    /// Part of new connections that goes to the primary, in permille.
    pub share: u16,
    /// Counter of decisions.
    pub epoch: u32,
    /// Flows on a backup may still exist.
    pub draining: bool,
    /// `mode: DryRun`.
    pub dry_run: bool,
    /// `onOpen: Reset`.
    pub reset_on_open: bool,
    /// `onClose: Reset`.
    pub reset_on_close: bool,
    /// Backends of the backup that are Down, and whose connections are reset (`onBackupDown: Reset`).
    pub down: Vec<SocketAddr>,
    /// `whenAllUnhealthy: Reject`.
    pub reject: bool,
    /// `fastPath: PeerRedirect`.
    pub fast: bool,
    /// `externalTrafficPolicy: Local`.
    pub keeps_client: bool,
    /// `halfOpenConnections`.
    pub half_open_limit: u32,
    /// How many of these connections were let through in this epoch.
    pub half_open_taken: u32,
    /// The primary accepts connections, although it may fail its checks.
    pub primary_accepts: bool,
    /// `limits`.
    pub limits: Option<Limits>,
    /// Connections for the primary went to the backup because of a limit: their flows must be looked up.
    pub overflowed: bool,
}

/// Where a new connection goes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Choice {
    /// The connection is left to kube-proxy.
    Primary,
    /// The connection is refused.
    Refuse,
    /// The connection is sent to this backend of the backup.
    Backup(SocketAddr),
}

impl Service {
    /// Whether the breaker is closed and the primary gets all new connections.
    const fn is_settled(&self) -> bool {
        matches!(self.state, BreakerState::Closed) && self.share >= 1000
    }

    /// Whether flows are looked up. They are not while the service is closed, with all traffic on the primary and no
    /// flows left on a backup.
    #[must_use]
    pub const fn tracks(&self) -> bool {
        self.draining || self.overflowed || !self.dry_run && !self.is_settled()
    }

    /// Whether older connections on the primary are reset: by policy, and only while there is a usable backup.
    #[must_use]
    pub fn resets_primary(&self) -> bool {
        !self.dry_run && self.state == BreakerState::Open && self.reset_on_open && !self.backups.is_empty()
    }

    /// Whether a connection on a backend of the backup is reset, by policy: older ones while the breaker is closed, and
    /// otherwise those to backends that are Down.
    #[must_use]
    pub fn resets_backup(&self, backend: SocketAddr, epoch: u32) -> bool {
        !self.dry_run
            && match self.state {
                BreakerState::Closed => self.reset_on_close && epoch != self.epoch,
                _ => self.down.contains(&backend) && !self.backups.is_empty(),
            }
    }

    /// Where a new connection to a frontend may go. While half-open, exactly `half_open_limit` connections per epoch go
    /// to the primary first; the second value is true if this connection is one of them. `repeated`: the SYN was decided
    /// in this epoch before, and is no new connection.
    pub fn choices(&mut self, frontend: SocketAddr, repeated: bool) -> (Vec<Choice>, bool) {
        if self.state == BreakerState::HalfOpen && !repeated && self.half_open_taken < self.half_open_limit {
            self.half_open_taken += 1;
            return (vec![Choice::Primary], true);
        }
        let mut choices = Vec::new();
        if self.share > 0 {
            choices.push(Choice::Primary);
        }
        if self.share < 1000 {
            let backups = self.backups_for(frontend);
            // Never redirect to an empty backup.
            match (backups.is_empty(), self.reject) {
                (false, _) => choices.extend(backups),
                (true, true) => choices.push(Choice::Refuse),
                (true, false) => choices.push(Choice::Primary),
            }
        }
        (choices, false)
    }

    /// The backups in the IP family of a frontend.
    #[must_use]
    pub fn backups_for(&self, frontend: SocketAddr) -> Vec<Choice> {
        let of_family = self.backups.iter().filter(|b| b.is_ipv4() == frontend.is_ipv4());
        of_family.map(|b| Choice::Backup(*b)).collect()
    }
}
