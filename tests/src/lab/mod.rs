//! The lab: network namespaces, nodes and pods, the agent and its clients. The crate's documentation lists the modules.

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

/// Waits until `condition` holds; checks it every 5 milliseconds.
///
/// # Errors
/// Fails after `limit`; the error contains `what`, the description of the condition.
pub fn wait_for(what: &str, limit: Duration, mut condition: impl FnMut() -> bool) -> Result<()> {
    let deadline = Instant::now() + limit;
    while !condition() {
        if Instant::now() > deadline {
            bail!("timed out after {limit:?} waiting for: {what}");
        }
        std::thread::sleep(Duration::from_millis(5));
    }
    Ok(())
}

/// Path of a binary of this workspace, in the target directory that the running program comes from. (Tests run from a
/// subdirectory of it.) A release build is preferred, because users run release builds.
///
/// # Errors
/// Fails if the binary is not built, or if the running program is not in a target directory.
pub fn binary(name: &str) -> Result<PathBuf> {
    let me = std::env::current_exe().context("find the path of this program")?;
    let profiles = me.ancestors().find(|dir| dir.join("release").is_dir() || dir.join("debug").is_dir());
    let profiles = profiles.context("this program is not in a target directory")?;
    for profile in ["release", "debug"] {
        let path = profiles.join(profile).join(name);
        if path.is_file() {
            return Ok(path);
        }
    }
    bail!("{name} is not built; run: cargo build --release -p breaker-agent -p dummy-service --bins")
}
