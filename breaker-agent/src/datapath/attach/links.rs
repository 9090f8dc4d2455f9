//! Pinned links, which outlive the agent.

use std::{fs, path::Path};

use anyhow::{Context as _, Result};
use aya::programs::links::{FdLink, PinnedLink};

/// What attaching a program came to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Placed {
    /// It took the place that an earlier program of breaker had.
    Kept,
    /// There was none.
    New,
}

impl Placed {
    /// New if one of the two is.
    #[must_use]
    pub const fn or(self, other: Self) -> Self {
        match self {
            Self::New => Self::New,
            Self::Kept => other,
        }
    }
}

/// Attaches a program. If a usable link is pinned at `pin`, `replace` puts the program behind that link without a gap.
/// Otherwise `attach` creates a new link, which is then pinned. Both functions return the link. Returns which of the two
/// it was.
///
/// # Errors
/// The kernel refused the program, the link or the pin.
pub(crate) fn attach<P>(
    program: &mut P,
    pin: &Path,
    replace: impl FnOnce(&mut P, FdLink) -> Result<FdLink>,
    attach: impl FnOnce(&mut P) -> Result<FdLink>,
) -> Result<Placed> {
    if pin.exists() {
        let link = PinnedLink::from_pin(pin).map_err(anyhow::Error::new);
        match link.and_then(|link| replace(program, link.into())) {
            // The pin keeps the link alive, so our descriptor can be closed.
            Ok(link) => {
                drop(link);
                return Ok(Placed::Kept);
            }
            // The link's interface is gone and another interface has its index now, so the link is attached to
            // nothing.
            Err(error) => {
                tracing::debug!(pin = %pin.display(), "the pinned link cannot be used any more: {error:#}");
                unpin(pin)?;
            }
        }
    }
    repin(attach(program)?, pin)?;
    Ok(Placed::New)
}

/// Pins a link. A link that is already pinned at the path loses its pin.
///
/// # Errors
/// The kernel refused the pin.
pub(crate) fn repin(link: FdLink, pin: &Path) -> Result<()> {
    unpin(pin)?;
    link.pin(pin).with_context(|| format!("pin {}", pin.display()))?;
    Ok(())
}

/// Removes a pin, if it exists. A link without a pin has no reference left, and the kernel detaches it.
///
/// # Errors
/// The pin cannot be removed.
pub(crate) fn unpin(pin: &Path) -> Result<()> {
    if pin.exists() {
        fs::remove_file(pin).with_context(|| format!("remove {}", pin.display()))?;
    }
    Ok(())
}
