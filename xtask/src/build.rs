//! Builds what several tasks need. Cargo shows its own progress.

use std::{
    path::{Path, PathBuf},
    process::Command,
};

use anyhow::{Context as _, Result};
use ebpf_builder::Package;

use crate::{
    progress::step,
    run::{cargo, run},
};

/// Builds the BPF programs as they are embedded in the agent. The build of the agent would do this by itself, but
/// cargo does not show the progress of a build script.
///
/// # Errors
/// A compiler or the linker is missing, or the build failed.
pub fn programs() -> Result<()> {
    step("build the BPF programs", || ebpf_builder::build(Package::Breaker, true).map(drop))
}

/// Builds the agent and the dummy service, optimized, as they are in the images. Tests and benchmarks run them too,
/// so that they run what users run.
///
/// # Errors
/// A build failed.
pub fn binaries() -> Result<()> {
    programs()?;
    step("build the agent and the dummy service", || {
        run(cargo().args(RELEASE).args(["--bin", "breaker", "--bin", "dummy-service"]))
    })
}

/// Builds with the features that all members of the workspace need together. A selection of members would have features
/// of its own, and nearly every dependency would be built once more.
const RELEASE: [&str; 3] = ["build", "--release", "--workspace"];

/// Builds a tool of `tests/tools` and returns the command that runs it.
///
/// # Errors
/// The build failed.
pub fn tool(name: &str) -> Result<Command> {
    step(&format!("build {name}"), || run(cargo().args(RELEASE).args(["--bin", name])))?;
    Ok(Command::new(release_binaries()?.join(name)))
}

/// Builds an example and returns its path.
///
/// # Errors
/// The build failed.
pub fn example(name: &str) -> Result<PathBuf> {
    step(&format!("build the example {name}"), || run(cargo().args(RELEASE).args(["--example", name])))?;
    Ok(release_binaries()?.join("examples").join(name))
}

/// Directory of cargo's release binaries, found from the path of the running binary.
///
/// # Errors
/// The running binary is not in a target directory.
pub fn release_binaries() -> Result<PathBuf> {
    let own = std::env::current_exe().context("find the path of the running binary")?;
    let target =
        own.parent().and_then(Path::parent).context("the running binary is not in a cargo target directory")?;
    Ok(target.join("release"))
}
