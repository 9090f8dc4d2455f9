//! The metrics of each breaker and, if asked for, of each backend.

use breaker_common::{BreakerState, LimitKind, SHARE_ALL};
use breaker_core::{
    engine::measures::{BackendMeasures, HealthCounts, ServiceMeasures},
    limits::TierLimits,
    model::{FastPath, Mode, Override, TierRole},
};

use super::{
    Instruments, Snapshot,
    families::{self as f, Family},
    writer::Families,
};

const ROLES: [TierRole; 2] = [TierRole::Primary, TierRole::Backup];

pub(super) fn write(snapshot: &Snapshot, instruments: &Instruments, to: &mut Families) {
    let mut room = snapshot.settings.max_backends;
    for service in &snapshot.services {
        let name = service.name.as_str();
        let (namespace, breaker) =
            if snapshot.is_kubernetes { name.split_once('/').unwrap_or(("", name)) } else { ("", name) };
        let mut breaker = Breaker { namespace, breaker, to };
        breaker.decision(service);
        breaker.health(service);
        breaker.connections(service);
        breaker.limits(service);
        let shown = service.each_backend.len().min(room);
        room -= shown;
        service.each_backend.iter().take(shown).for_each(|backend| breaker.backend(backend));
        instruments.count_dropped_series(2 * (service.each_backend.len() - shown));
    }
}

/// Writes the samples of one breaker.
struct Breaker<'a> {
    namespace: &'a str,
    breaker: &'a str,
    to: &'a mut Families,
}

impl Breaker<'_> {
    fn add(&mut self, family: &Family, labels: &[&str], value: f64) {
        let labels = [&[self.namespace, self.breaker], labels].concat();
        self.to.add(family, &labels, value);
    }

    fn count(&mut self, family: &Family, labels: &[&str], value: u64) {
        let labels = [&[self.namespace, self.breaker], labels].concat();
        self.to.count(family, &labels, value);
    }

    fn count_unless_zero(&mut self, family: &Family, labels: &[&str], value: u64) {
        if value > 0 {
            self.count(family, labels, value);
        }
    }

    fn flag(&mut self, family: &Family, labels: &[&str], value: bool) {
        self.add(family, labels, f64::from(u8::from(value)));
    }

    fn decision(&mut self, service: &ServiceMeasures) {
        for state in BreakerState::ALL {
            self.flag(&f::STATE, &[state.label()], service.state == *state);
        }
        self.add(&f::SHARE, &[], f64::from(service.share) / f64::from(SHARE_ALL));
        self.flag(&f::APPLIED, &[], service.is_applied);
        self.count(&f::WRITE_ERRORS, &[], service.failed_writes);
        for (state, count) in BreakerState::ALL.iter().zip(service.tally.transitions) {
            self.count(&f::TRANSITIONS, &[state.label()], count);
        }
        for (reason, count) in &service.tally.trips {
            self.count(&f::TRIPS, &[reason.label()], *count);
        }
        self.to.time(&f::LAST_TRANSITION, &[self.namespace, self.breaker], service.since_unix_ns);
        let (override_, until) = service.override_;
        let mode = match override_ {
            Override::Auto => None,
            Override::ForceOpen => Some("ForceOpen"),
            Override::ForceClosed => Some("ForceClosed"),
        };
        if let Some(mode) = mode {
            self.flag(&f::OVERRIDE, &[mode], true);
            if until > 0 {
                self.to.time(&f::OVERRIDE_EXPIRY, &[self.namespace, self.breaker], until);
            }
        }
        let mode = match service.mode {
            Mode::Enforce => "Enforce",
            Mode::DryRun => "DryRun",
        };
        let fast_path = match service.fast_path {
            FastPath::Off => "Off",
            FastPath::PeerRedirect => "PeerRedirect",
        };
        self.flag(&f::INFO, &[mode, fast_path], true);
    }

    fn health(&mut self, service: &ServiceMeasures) {
        for (role, counts) in ROLES.iter().zip(service.backends) {
            let HealthCounts { up, down, unknown, unchecked } = counts;
            // A tier without backends is shown too: an alert compares its number of backends that are Up with 0.
            if up + down + unknown > 0 || unchecked == 0 {
                for (health, count) in [("Up", up), ("Down", down), ("Unknown", unknown)] {
                    self.count(&f::TIER_BACKENDS, &[role.label(), health], count);
                }
            }
            self.count_unless_zero(&f::TIER_BACKENDS, &[role.label(), "Unchecked"], unchecked);
        }
        for (role, probes) in ROLES.iter().zip(&service.tally.probes) {
            for (code, count) in &probes.by_code {
                self.count(&f::CHECKS, &[role.label(), code.label()], *count);
            }
            let count = probes.by_code.values().sum();
            if count > 0 {
                let labels = [self.namespace, self.breaker, role.label()];
                self.to.summary(&f::CHECK_TIME, &labels, count, probes.time.as_secs_f64());
            }
        }
        self.count(&f::CHECK_LOCAL_ERRORS, &[], service.local_errors);
    }

    fn connections(&mut self, service: &ServiceMeasures) {
        self.count(&f::BACKUP_FLOWS, &[], service.flows as u64);
        let Some(counters) = service.counters else { return };
        let decisions =
            [("Primary", counters.new_primary), ("Backup", counters.new_backup), ("Rejected", counters.rejected)];
        for (decision, count) in decisions {
            self.count(&f::CONNECTIONS, &[decision], count);
        }
        let others = [
            (&f::HALF_OPEN, counters.half_open),
            (&f::DRY_RUN, counters.dry_run),
            (&f::AGENT_LOST, counters.agent_lost),
            (&f::FAILED_OPEN, counters.failed_open),
            (&f::PORT_CHANGED, counters.port_changed),
            (&f::HAIRPIN, counters.hairpin),
            (&f::LATE_ANSWERS, counters.late_answers),
            (&f::RESETS, counters.resets),
            (&f::TRANSLATED, counters.translated),
            (&f::ICMP_ERRORS, counters.icmp_errors),
        ];
        for (family, count) in others {
            self.count_unless_zero(family, &[], count);
        }
    }

    fn limits(&mut self, service: &ServiceMeasures) {
        let Some((limits, report)) = &service.limits else { return };
        for (tier, (role, limits)) in ROLES.iter().zip([&limits.primary, &limits.backup]).enumerate() {
            for (number, kind) in LimitKind::ALL.iter().enumerate() {
                let limited = report.counters.limited[tier][number];
                if is_set(limits, *kind) || limited > 0 {
                    self.count(&f::LIMITED, &[role.label(), kind.label()], limited);
                }
                let dry_run = report.counters.dry_run[tier][number];
                self.count_unless_zero(&f::LIMIT_DRY_RUN, &[role.label(), kind.label()], dry_run);
            }
            if limits.concurrent.is_some() || limits.client_concurrent.is_some() {
                self.count(&f::CONCURRENT, &[role.label()], report.concurrent[tier].into());
            }
        }
        self.count_unless_zero(&f::LIMIT_FAILED_OVER, &[], report.counters.failed_over);
    }

    fn backend(&mut self, backend: &BackendMeasures) {
        let (role, address) = (backend.role.label(), backend.address.to_string());
        self.flag(&f::BACKEND_UP, &[role, &address], backend.is_up);
        if let Some(duration) = backend.last_probe {
            self.add(&f::BACKEND_LAST_CHECK, &[role, &address], duration.as_secs_f64());
        }
    }
}

const fn is_set(limits: &TierLimits, kind: LimitKind) -> bool {
    match kind {
        LimitKind::NewConnections => limits.rate.is_some(),
        LimitKind::ClientNewConnections => limits.client_rate.is_some(),
        LimitKind::Concurrent => limits.concurrent.is_some(),
        LimitKind::ClientConcurrent => limits.client_concurrent.is_some(),
    }
}
