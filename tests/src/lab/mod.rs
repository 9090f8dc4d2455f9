//! See the crate.

pub mod agent;
pub mod client;
pub mod kubeproxy;
pub mod netns;
pub mod service;
pub mod stage;
pub mod world;

use std::{
    path::PathBuf,
    time::{Duration, Instant},
};

use anyhow::{Context as _, Result, bail};

/// Waits until `condition` says so, looking every few milliseconds.
///
/// # Errors
/// After `limit`, with what was waited for.
pub fn wait_for(what: &str, limit: Duration, mut condition: impl FnMut() -> bool) -> Result<()> {
    let deadline = Instant::now() + limit;
    while !condition() {
        if Instant::now() > deadline {
            bail!("waited {limit:?} in vain for: {what}");
        }
        std::thread::sleep(Duration::from_millis(5));
    }
    Ok(())
}

/// Path of a binary of this workspace, beside the one that runs (tests run from a folder below it); a release build is
/// preferred where there is one, because the lab is about what users run.
///
/// # Errors
/// When nobody built it.
pub fn binary(name: &str) -> Result<PathBuf> {
    let me = std::env::current_exe().context("the path of this program")?;
    let profiles = me.ancestors().find(|dir| dir.join("release").is_dir() || dir.join("debug").is_dir());
    let profiles = profiles.context("this program is not in a target directory")?;
    for profile in ["release", "debug"] {
        let path = profiles.join(profile).join(name);
        if path.is_file() {
            return Ok(path);
        }
    }
    bail!("{name} is not built; run: cargo build --release -p breaker-agent -p breaker-tests --bins")
}
