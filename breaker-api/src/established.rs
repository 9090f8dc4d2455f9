//! The connections that were established when a service left a tier.

use std::fmt::Write as _;

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use crate::tier::TierRole;

/// The connections that were established when the service left a tier: the primary when the breaker opened, the backup
/// when it closed, or backends of the backup that are Down.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase", default)]
pub struct EstablishedCounts {
    /// The tier: primary or backup.
    #[schemars(with = "String")]
    #[serde(with = "crate::text::or_empty")]
    pub tier: Option<TierRole>,
    /// Connections that were found.
    pub found: i64,
    /// Those of them that were reset.
    pub reset: i64,
    /// Those of them whose clients no longer had them.
    pub gone: i64,
    /// Those of them that could not be reset.
    pub unreached: i64,
    /// Those of them that are established now. For the primary, this is counted every 10 seconds.
    pub left: i64,
    /// Whether connections are being reset.
    pub resetting: bool,
}

impl EstablishedCounts {
    /// Adds the numbers of another node for the same tier.
    #[must_use]
    pub const fn plus(self, other: &Self) -> Self {
        Self {
            tier: self.tier,
            found: self.found.saturating_add(other.found),
            reset: self.reset.saturating_add(other.reset),
            gone: self.gone.saturating_add(other.gone),
            unreached: self.unreached.saturating_add(other.unreached),
            left: self.left.saturating_add(other.left),
            resetting: self.resetting || other.resetting,
        }
    }

    /// The numbers in words: what became of the connections, and how many there still are.
    #[must_use]
    pub fn words(&self) -> String {
        let tier = self.tier.map_or("tier", TierRole::label);
        let Self { found, reset, gone, unreached, left, resetting, .. } = self;
        if !resetting && reset + gone + unreached == 0 {
            return format!("{left} of {found} established connections to the {tier} go on");
        }
        let progress = if *resetting { "are reset so far" } else { "were reset" };
        let mut words = format!("{reset} of {found} established connections to the {tier} {progress}");
        for (what, count) in [("gone before", gone), ("not reached", unreached), ("left", left)] {
            if *count > 0 {
                let _ = write!(words, "; {what}: {count}");
            }
        }
        words
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn words_say_what_became_of_the_connections() {
        let kept =
            EstablishedCounts { tier: Some(TierRole::Primary), found: 4, left: 3, ..EstablishedCounts::default() };
        assert_eq!(kept.words(), "3 of 4 established connections to the primary go on");
        let reset = EstablishedCounts { reset: 2, gone: 1, unreached: 1, left: 1, ..kept };
        assert_eq!(
            reset.words(),
            "2 of 4 established connections to the primary were reset; gone before: 1; not reached: 1; left: 1"
        );
        let both = reset.clone().plus(&EstablishedCounts { resetting: true, ..reset });
        assert!(both.words().starts_with("4 of 8 established connections to the primary are reset so far"));
    }
}
