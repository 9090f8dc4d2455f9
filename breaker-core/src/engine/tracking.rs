//! Flows that outlive the decision that made them: whether the programs must look for flows of a service on its
//! backups, and which flows end when their backend is removed.

use std::{collections::BTreeSet, net::SocketAddr, time::Duration};

use crate::{model::Frontend, time::Instant};

/// Shortest time from one sweep of the flow tables to the next.
pub(super) const SWEEP: Duration = Duration::from_secs(2);

/// Whether flows on backups may be alive.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Tracking {
    /// No: established connections of a closed service pass the prefilter.
    Idle,
    /// Possibly: the programs look up all packets to the service's frontends.
    Active {
        /// When the latest event happened that may have left flows on backups; `None` after a transition to open or
        /// half-open.
        since: Option<Instant>,
    },
}

impl Tracking {
    /// Whether flows on backups may be alive.
    pub const fn is_active(self) -> bool {
        matches!(self, Self::Active { .. })
    }

    /// Whether a sweep at `now` sees all flows that the latest event left behind. A packet that read the old switch
    /// may pin one more flow a moment after the new switch was written, so the first sweep period after the event
    /// does not count.
    pub fn is_settled(self, now: Instant) -> bool {
        match self {
            Self::Idle | Self::Active { since: None } => true,
            Self::Active { since: Some(since) } => now.saturating_sub(since) >= SWEEP,
        }
    }
}

/// Backends that left the configuration. Their flows are removed, because another pod may soon get their addresses.
#[derive(Debug)]
pub(super) struct RemovedBackends {
    addresses: BTreeSet<SocketAddr>,
    scope: Scope,
}

/// Which flows are removed besides those to the listed addresses.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Scope {
    /// None.
    Listed,
    /// Flows to any address that the configuration does not name: an earlier agent may have known backends that this
    /// agent never saw.
    Unknown,
}

impl RemovedBackends {
    /// Creates an empty list. `adopted`: flows of an earlier agent to backends that are not configured are removed,
    /// too.
    pub const fn new(adopted: bool) -> Self {
        Self { addresses: BTreeSet::new(), scope: if adopted { Scope::Unknown } else { Scope::Listed } }
    }

    /// Records a change of the backups' addresses.
    pub fn update(&mut self, before: &BTreeSet<SocketAddr>, after: &BTreeSet<SocketAddr>) {
        self.addresses.extend(before.difference(after));
        self.addresses.retain(|address| !after.contains(address));
    }

    /// Whether there are no flows to remove.
    pub fn is_empty(&self) -> bool {
        self.addresses.is_empty() && self.scope == Scope::Listed
    }

    /// Whether flows to `backend` are to be removed; `known` are the configured addresses.
    pub fn contains(&self, backend: SocketAddr, known: &BTreeSet<SocketAddr>) -> bool {
        self.addresses.contains(&backend) || self.scope == Scope::Unknown && !known.contains(&backend)
    }

    /// Forgets all, after a sweep has removed their flows a last time.
    pub fn clear(&mut self) {
        self.addresses.clear();
        self.scope = Scope::Listed;
    }
}

/// Frontends that are not configured any more. Their connections continue until they end.
#[derive(Debug, Default)]
pub(super) struct DrainingFrontends(Vec<Frontend>);

impl DrainingFrontends {
    /// Adds frontends of an earlier configuration, without those that `configured` has.
    pub fn add(&mut self, before: Vec<Frontend>, configured: &[Frontend]) {
        self.0.extend(before);
        self.0.retain(|frontend| !configured.contains(frontend));
    }

    /// Drops the frontends that are in `claimed`. Returns whether there were any.
    pub fn release(&mut self, claimed: &BTreeSet<Frontend>) -> bool {
        let before = self.0.len();
        self.0.retain(|frontend| !claimed.contains(frontend));
        self.0.len() != before
    }

    /// Drops all frontends. The caller has found that no flow is left. Returns whether there were any.
    pub fn clear(&mut self) -> bool {
        !std::mem::take(&mut self.0).is_empty()
    }

    /// The frontends.
    pub fn as_slice(&self) -> &[Frontend] {
        &self.0
    }
}
