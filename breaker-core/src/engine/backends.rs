//! The health of each backend, by tier, with the results of its checks, and the health of the tiers that follows.

use std::{collections::BTreeSet, net::SocketAddr, time::Duration};

use crate::{
    health::Health,
    model::{Backend, Protocol, Service},
    pool::{self, TierHealth},
    probe::ProbeResult,
    time::{Instant, Now, UnixNanos},
};

/// How long a backend must be without results before an event tells it.
const LOCAL_ERRORS_LAST: Duration = Duration::from_secs(10);

/// Probes in a row that had no result.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct LocalErrors {
    /// How many.
    pub count: u64,
    /// When the first of them ended.
    pub since: Now,
    /// Why the last of them had no result.
    pub detail: String,
    /// Whether an event has told it.
    pub reported: bool,
}

/// One backend and the results of its checks.
#[derive(Clone, Debug)]
pub(super) struct BackendState {
    pub backend: Backend,
    /// When it became a backend; zero if it was there when this agent first saw the service.
    pub added: Instant,
    pub health: Health,
    /// When it got its health; `None` before the first change.
    pub since_unix_ns: Option<UnixNanos>,
    /// The last probe with a result.
    pub last: Option<ProbeResult>,
    /// The probes since then, if they had no result.
    pub local_errors: Option<LocalErrors>,
}

impl BackendState {
    const fn new(backend: Backend) -> Self {
        Self {
            backend,
            added: Instant::ZERO,
            health: Health::Unknown,
            since_unix_ns: None,
            last: None,
            local_errors: None,
        }
    }

    /// Counts a probe without a result. Returns how long there have been none, once, when that is long enough to tell.
    pub fn count_local_error(&mut self, now: Now, detail: &str) -> Option<Duration> {
        let errors = self.local_errors.get_or_insert_with(|| LocalErrors {
            count: 0,
            since: now,
            detail: String::new(),
            reported: false,
        });
        errors.count += 1;
        detail.clone_into(&mut errors.detail);
        let lasting = now.mono.saturating_sub(errors.since.mono);
        let tell = !errors.reported && lasting >= LOCAL_ERRORS_LAST;
        errors.reported |= tell;
        tell.then_some(lasting)
    }

    /// Whether it was added less than the service's grace period ago.
    fn is_new(&self, now: Now, grace_period: Duration) -> bool {
        self.added > Instant::ZERO && now.mono.saturating_sub(self.added) < grace_period
    }
}

/// The backends of a service: the primary's, then each backup's.
#[derive(Debug)]
pub(super) struct Tiers {
    tiers: Vec<Vec<BackendState>>,
    /// When the grace period of the newest primary backend ends.
    pub grace_ends: Option<Instant>,
}

impl Tiers {
    /// Creates the tiers of a service that this agent sees for the first time. Backends of a backup for which
    /// `trusted` is true start Up, because an earlier agent sent connections to them.
    pub fn new(service: &Service, trusted: impl Fn(&Backend) -> bool) -> Self {
        let state = |tier: usize, backend: &Backend| BackendState {
            health: if tier > 0 && trusted(backend) { Health::Up } else { Health::Unknown },
            ..BackendState::new(*backend)
        };
        let tiers =
            service.tiers().enumerate().map(|(n, tier)| tier.backends.iter().map(|b| state(n, b)).collect()).collect();
        Self { tiers, grace_ends: None }
    }

    /// Takes over a changed service. A backend that stays in its tier keeps its health until a probe changes it,
    /// even if the check is another one. A backend that moves from one backup to another keeps its health, too.
    pub fn reconfigure(&mut self, now: Now, service: &Service) {
        let old = std::mem::take(&mut self.tiers);
        let find = |tier: &[BackendState], address: SocketAddr| {
            tier.iter().find(|state| state.backend.address == address).cloned()
        };
        let known = |index: usize, address: SocketAddr| {
            let own = old.get(index).and_then(|tier| find(tier, address));
            own.or_else(|| old.iter().skip(1).filter(|_| index > 0).find_map(|tier| find(tier, address)))
        };
        self.tiers = service
            .tiers()
            .enumerate()
            .map(|(index, tier)| {
                let state = |backend: &Backend| match known(index, backend.address) {
                    Some(state) => BackendState { backend: *backend, ..state },
                    None => BackendState { added: now.mono, ..BackendState::new(*backend) },
                };
                tier.backends.iter().map(state).collect()
            })
            .collect();
        let newest = self.tiers.first().into_iter().flatten().map(|state| state.added).max();
        self.grace_ends = newest.filter(|added| *added > Instant::ZERO).map(|added| added + service.grace_period);
    }

    /// Every tier, the primary first.
    pub fn iter(&self) -> impl Iterator<Item = &[BackendState]> {
        self.tiers.iter().map(Vec::as_slice)
    }

    /// One backend; `tier` 0 is the primary.
    pub fn get(&self, tier: usize, address: SocketAddr) -> Option<&BackendState> {
        self.tiers.get(tier)?.iter().find(|state| state.backend.address == address)
    }

    /// One backend, to change.
    pub fn get_mut(&mut self, tier: usize, address: SocketAddr) -> Option<&mut BackendState> {
        self.tiers.get_mut(tier)?.iter_mut().find(|state| state.backend.address == address)
    }

    /// The health of a tier's backends, in the order of the configuration.
    pub fn healths(&self, tier: usize) -> Vec<Health> {
        self.tiers.get(tier).map(|tier| tier.iter().map(|state| state.health).collect()).unwrap_or_default()
    }

    /// The first usable backup and its usable backends; 0 is the first backup.
    pub fn active_backup(&self, service: &Service) -> Option<(usize, Vec<Backend>)> {
        let healths: Vec<Vec<Health>> = (1..self.tiers.len()).map(|tier| self.healths(tier)).collect();
        pool::active_backup(service.backups.iter().zip(healths.iter().map(Vec::as_slice)))
    }

    /// The primary's health as it counts for the breaker: an Up of a backend in its grace period counts as Unknown.
    pub fn primary_health(&self, now: Now, service: &Service) -> TierHealth {
        let primary = &service.primary;
        let tier = self.tiers.first().map(Vec::as_slice).unwrap_or_default();
        let is_new = |state: &BackendState| state.is_new(now, service.grace_period);
        let counted = |state: &BackendState| match state.health {
            Health::Up if is_new(state) => Health::Unknown,
            health => health,
        };
        let judged = pool::judge(primary, &tier.iter().map(counted).collect::<Vec<_>>());
        // A tier without a check counts as Up once enough backends are out of their grace period.
        let old = tier.iter().filter(|state| !is_new(state)).count();
        let needed = primary.min_healthy.clamp(1, tier.len().max(1));
        if judged == TierHealth::Up && primary.check.is_none() && old < needed {
            return TierHealth::Unknown;
        }
        judged
    }

    /// Whether a backend of the primary accepts connections as far as its checks tell. A backend without a result may.
    pub fn primary_accepts(&self) -> bool {
        let accepts = |state: &BackendState| state.last.as_ref().is_none_or(|result| result.code.is_accepted());
        self.tiers.first().is_some_and(|primary| primary.iter().any(accepts))
    }

    /// Whether the newest primary backend's grace period has ended since the last call.
    pub fn grace_period_ended(&mut self, now: Now) -> bool {
        self.grace_ends.take_if(|at| *at <= now.mono).is_some()
    }

    /// All addresses of the backups' backends that are Down. Empty for a service without UDP frontends.
    pub fn down_for_datagrams(&self, service: &Service) -> BTreeSet<SocketAddr> {
        if service.frontends.iter().any(|frontend| frontend.protocol == Protocol::Udp) {
            self.down_backups(service, UnixNanos::MAX)
        } else {
            BTreeSet::new()
        }
    }

    /// All addresses of the backups' backends that are Down, and have been since `before` at the latest.
    pub fn down_backups(&self, service: &Service, before: UnixNanos) -> BTreeSet<SocketAddr> {
        let down = self.tiers.iter().skip(1).flatten().filter(|state| state.health == Health::Down);
        let long = down.filter(|state| state.since_unix_ns.is_none_or(|since| since <= before));
        long.flat_map(|state| service.addresses(state.backend.address)).collect()
    }

    /// Since when each of the backups' backends is Down that is.
    pub fn down_since(&self) -> impl Iterator<Item = UnixNanos> {
        let down = self.tiers.iter().skip(1).flatten().filter(|state| state.health == Health::Down);
        down.filter_map(|state| state.since_unix_ns)
    }
}

/// All addresses of the backups' backends, including those that drain.
pub(super) fn backup_addresses(service: &Service) -> BTreeSet<SocketAddr> {
    let tiers = service.backups.iter();
    let own = tiers.flat_map(|tier| tier.backends.iter().map(|b| b.address).chain(tier.draining.iter().copied()));
    own.flat_map(|backend| service.addresses(backend)).collect()
}
