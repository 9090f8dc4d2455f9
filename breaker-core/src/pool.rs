//! Chooses the tier, and the backends in it, that take the traffic. Pure: no clock, no input or output.

use crate::{
    health::Health,
    model::{Backend, Tier},
};

/// The health of a tier's backends, in the order of [`Tier::backends`].
pub type Healths = [Health];

/// The health of a whole tier.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum TierHealth {
    /// Too few backends are Up, but those that are still unknown could make it enough.
    Unknown,
    /// At least `min_healthy` backends are Up.
    Up,
    /// Fewer than `min_healthy` backends are Up or unknown.
    Down,
    /// The tier has no backends.
    Empty,
}

/// Returns the health of a tier: Up with at least `min_healthy` backends Up, Down once the unknown ones can no
/// longer make that many. A tier without a check is Up. A `min_healthy` above the number of backends means all of
/// them; 0 counts as 1.
#[must_use]
pub fn judge(tier: &Tier, healths: &Healths) -> TierHealth {
    if tier.backends.is_empty() {
        return TierHealth::Empty;
    }
    if tier.check.is_none() {
        return TierHealth::Up;
    }
    let needed = tier.min_healthy.clamp(1, tier.backends.len());
    let up = healths.iter().filter(|h| **h == Health::Up).count();
    let unknown = healths.iter().filter(|h| **h == Health::Unknown).count();
    if up >= needed {
        TierHealth::Up
    } else if up + unknown >= needed {
        TierHealth::Unknown
    } else {
        TierHealth::Down
    }
}

/// Returns the backends that may get connections: none if the tier is not Up; otherwise those that are Up, or all
/// if the tier has no check.
#[must_use]
pub fn usable(tier: &Tier, healths: &Healths) -> Vec<Backend> {
    let enough = matches!(judge(tier, healths), TierHealth::Up);
    tier.backends
        .iter()
        .zip(healths)
        .filter(|(_, health)| enough && (tier.check.is_none() || **health == Health::Up))
        .map(|(backend, _)| *backend)
        .collect()
}

/// Returns the index of the first usable backup (0 is the first backup) and its usable backends. `None` if no
/// backup is usable: connections must then not be redirected.
#[must_use]
pub fn active_backup<'a>(backups: impl Iterator<Item = (&'a Tier, &'a Healths)>) -> Option<(usize, Vec<Backend>)> {
    backups
        .enumerate()
        .map(|(index, (tier, healths))| (index, usable(tier, healths)))
        .find(|(_, backends)| !backends.is_empty())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::model::{Check, CheckAction};
    use std::{collections::BTreeMap, time::Duration};

    fn tier(backends: usize, min_healthy: usize) -> Tier {
        let second = Duration::from_secs(1);
        Tier {
            name: "t".into(),
            backends: (0..backends)
                .map(|i| Backend { address: ([10, 0, 0, u8::try_from(i).unwrap()], 80).into(), weight: 1 })
                .collect(),
            draining: Vec::new(),
            check: Some(Check {
                action: CheckAction::TcpSocket { port: None, accept: false },
                period: second,
                fast_period: second,
                timeout: second,
                failure_threshold: 1,
                success_threshold: 1,
                jitter_percent: 0,
            }),
            check_ports: BTreeMap::new(),
            min_healthy,
        }
    }
    use Health::{Down, Unknown, Up};

    #[test]
    fn a_tier_is_down_only_when_it_cannot_be_up() {
        assert_eq!(judge(&tier(3, 2), &[Up, Up, Down]), TierHealth::Up);
        assert_eq!(judge(&tier(3, 2), &[Up, Unknown, Down]), TierHealth::Unknown);
        assert_eq!(judge(&tier(3, 2), &[Up, Down, Down]), TierHealth::Down);
        assert_eq!(judge(&tier(0, 1), &[]), TierHealth::Empty);
        assert_eq!(judge(&tier(1, 5), &[Up]), TierHealth::Up, "more than there are means all of them");
    }

    #[test]
    fn the_first_usable_backup_wins() {
        let tiers = [tier(1, 1), tier(2, 1)];
        let pick = |a: &[Health], b: &[Health]| active_backup([(&tiers[0], a), (&tiers[1], b)].into_iter());
        assert_eq!(pick(&[Up], &[Up, Up]).unwrap().0, 0);
        let (index, backends) = pick(&[Down], &[Down, Up]).unwrap();
        assert_eq!((index, backends.len()), (1, 1));
        assert_eq!(pick(&[Down], &[Unknown, Down]), None);
    }

    #[test]
    fn an_unchecked_tier_is_up() {
        let mut unchecked = tier(2, 1);
        unchecked.check = None;
        assert_eq!(usable(&unchecked, &[Unknown, Unknown]).len(), 2);
    }
}
