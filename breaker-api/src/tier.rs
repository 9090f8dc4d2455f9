//! The two roles of a tier.

use serde::{Deserialize, Serialize};

/// What a tier is for.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum TierRole {
    /// The service's own backends.
    #[serde(rename = "primary")]
    Primary,
    /// Backends that take over.
    #[serde(rename = "backup")]
    Backup,
}

impl TierRole {
    /// The name in JSON and in output.
    #[must_use]
    pub const fn label(self) -> &'static str {
        match self {
            Self::Primary => "primary",
            Self::Backup => "backup",
        }
    }
}
