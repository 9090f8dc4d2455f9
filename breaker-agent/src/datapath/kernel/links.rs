//! Links that outlive the agent by their pins.

use std::{fs, path::Path};

use anyhow::{Context as _, Result};
use aya::programs::links::{FdLink, PinnedLink};

/// Puts a program where it belongs: behind the link that is pinned, without a gap, or, where there is none that is of any use,
/// by a new one. `replace` and `attach` return the link.
///
/// # Errors
/// What the kernel said.
pub(super) fn attach<P>(
    program: &mut P,
    pin: &Path,
    replace: impl FnOnce(&mut P, FdLink) -> Result<FdLink>,
    attach: impl FnOnce(&mut P) -> Result<FdLink>,
) -> Result<()> {
    if pin.exists() {
        let link = PinnedLink::from_pin(pin).map_err(anyhow::Error::new);
        match link.and_then(|link| replace(program, link.into())) {
            // The pin keeps it; ours is only a descriptor.
            Ok(link) => {
                drop(link);
                return Ok(());
            }
            // The interface that it was for is gone, and another one has its index now: the link hangs in the air.
            Err(error) => {
                tracing::debug!(pin = %pin.display(), "the pinned link is of no use any more: {error:#}");
                unpin(pin)?;
            }
        }
    }
    repin(attach(program)?, pin)
}

/// Pins a link, in the place of one that may be pinned there.
///
/// # Errors
/// What the kernel said.
pub(super) fn repin(link: FdLink, pin: &Path) -> Result<()> {
    unpin(pin)?;
    link.pin(pin).with_context(|| format!("pin {}", pin.display()))?;
    Ok(())
}

/// Takes a pin away, if it is there; without it a link has no reference left, and the kernel detaches it.
///
/// # Errors
/// What the kernel said.
pub(super) fn unpin(pin: &Path) -> Result<()> {
    if pin.exists() {
        fs::remove_file(pin).with_context(|| format!("remove {}", pin.display()))?;
    }
    Ok(())
}
