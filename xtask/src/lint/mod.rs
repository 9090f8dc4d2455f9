//! `cargo xtask lint`: formatting, clippy, and this repository's own rules (imports, portability).

mod imports;
mod portable;

use anyhow::Result;

use crate::{
    build,
    progress::step,
    run::{cargo, run},
};

/// Runs all checks.
///
/// # Errors
/// A check failed. Its output or the error names the place.
pub fn lint() -> Result<()> {
    step("check the formatting", || {
        run(cargo().args(["fmt", "--all", "--check"]))?;
        for package in ebpf_builder::Package::ALL {
            run(cargo().args(["fmt", "--check", "--manifest-path"]).arg(package.manifest()))?;
        }
        Ok(())
    })?;
    step("check the imports", imports::check)?;
    step("check that the command line builds without Linux", portable::check)?;
    build::programs()?;
    // The BPF programs are checked by a build of their own: clippy can check their target only with the source of
    // `core`.
    step("check the BPF programs", ebpf_builder::lint)?;
    step("run clippy", || {
        let clippy = |targets: &[&str]| run(cargo().arg("clippy").args(targets).args(["--", "-D", "warnings"]));
        clippy(&["--workspace", "--lib", "--bins", "--examples", "--tests"])?;
        // `--tests` leaves out targets with `test = false`, also where `--test` names them beside it.
        clippy(&["--workspace", "--test", "program", "--test", "lab"])
    })
}
