//! The numbers of established connections of a tier that a service has left.

use crate::model::TierRole;

/// The connections that were established when a service left a tier, in numbers.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct EstablishedCounts {
    /// The tier.
    pub tier: TierRole,
    /// Connections that were found.
    pub found: usize,
    /// Those of them that were reset.
    pub reset: usize,
    /// Those of them whose clients no longer have them.
    pub gone: usize,
    /// Those of them that could not be reset.
    pub unreached: usize,
    /// Those of them that are established now.
    pub left: usize,
    /// Whether connections are being reset.
    pub is_resetting: bool,
}

impl EstablishedCounts {
    /// No connections of a tier.
    #[must_use]
    pub const fn none_of(tier: TierRole) -> Self {
        Self { tier, found: 0, reset: 0, gone: 0, unreached: 0, left: 0, is_resetting: false }
    }
}
