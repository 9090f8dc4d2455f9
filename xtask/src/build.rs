//! Builds what several tasks need. Cargo shows its own progress.

use std::process::Command;

use anyhow::Result;
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
        run(cargo().args(["build", "--release", "-p", "breaker-agent", "-p", "dummy-service", "--bins"]))
    })
}

/// Builds a tool of `tests/tools` and returns the command that runs it.
///
/// # Errors
/// The build failed.
pub fn tool(name: &str) -> Result<Command> {
    step(&format!("build {name}"), || run(cargo().args(["build", "--release", "-p", "breaker-tests", "--bin", name])))?;
    let mut command = cargo();
    command.args(["run", "--quiet", "--release", "-p", "breaker-tests", "--bin", name, "--"]);
    Ok(command)
}
