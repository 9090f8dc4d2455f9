//! The findings of `breaker preflight` about a machine.

use serde::{Deserialize, Serialize};

/// Result of one test of the machine.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Finding {
    /// Its name.
    pub name: String,
    /// How bad the finding is.
    pub verdict: Verdict,
    /// What was found.
    pub found: String,
    /// What to do about it; empty if nothing needs to be done.
    pub remedy: String,
}

/// Severity of a finding.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Verdict {
    /// Everything is as it should be.
    Good,
    /// The agent runs, without one of its functions.
    Worse,
    /// The agent cannot run.
    Bad,
}
