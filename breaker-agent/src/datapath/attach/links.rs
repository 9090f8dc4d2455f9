//! Pinned links, which outlive the agent.

use std::{
    collections::BTreeMap,
    fs,
    path::{Path, PathBuf},
};

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

/// Links that could not be pinned: the pin directory is out of reach. They last as long as the agent, which tries again
/// to pin them.
#[derive(Debug, Default)]
pub(crate) struct HeldLinks(BTreeMap<PathBuf, FdLink>);

impl HeldLinks {
    /// Whether the link that belongs to a pin is held.
    pub(crate) fn has(&self, pin: &Path) -> bool {
        self.0.contains_key(pin)
    }

    /// Forgets a link. The kernel detaches it.
    pub(crate) fn forget(&mut self, pin: &Path) {
        self.0.remove(pin);
    }

    /// Pins a link, or holds it if the kernel refuses the pin.
    fn pin(&mut self, link: FdLink, pin: &Path) -> Result<()> {
        // `FdLink::pin` closes the link when it fails, so the usual cause is looked for before: another file system is
        // mounted over the pin directory.
        if pin.parent().is_none_or(Path::is_dir) {
            return repin(link, pin);
        }
        tracing::debug!(pin = %pin.display(), "the pin directory is out of reach, the link is held");
        self.0.insert(pin.to_owned(), link);
        Ok(())
    }
}

/// Attaches a program. If a usable link is pinned at `pin`, `replace` puts the program behind that link without a gap.
/// `is_in_place` says whether a pinned link is still where it should be: a device may have moved to another network
/// namespace with its link. Otherwise `attach` creates a new link, which is then pinned. Returns which of the two it was.
///
/// # Errors
/// The kernel refused the program or the link.
pub(crate) fn attach<P>(
    program: &mut P,
    pin: &Path,
    held: &mut HeldLinks,
    is_in_place: impl FnOnce(&FdLink) -> bool,
    replace: impl FnOnce(&mut P, FdLink) -> Result<FdLink>,
    attach: impl FnOnce(&mut P) -> Result<FdLink>,
) -> Result<Placed> {
    if let Some(link) = held.0.remove(pin) {
        if is_in_place(&link) {
            held.pin(link, pin)?;
            return Ok(Placed::Kept);
        }
    } else if pin.exists() {
        let link = PinnedLink::from_pin(pin).map_err(anyhow::Error::new);
        let link = link.map(FdLink::from).and_then(|link| {
            anyhow::ensure!(is_in_place(&link), "the link is not on the interface");
            Ok(link)
        });
        match link.and_then(|link| replace(program, link)) {
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
    held.pin(attach(program)?, pin)?;
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
