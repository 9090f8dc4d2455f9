//! Checks that the command line builds for systems other than Linux.

use std::process::{Command, Stdio};

use anyhow::{Result, bail};

use crate::run::{cargo, output, run};

const PACKAGE: &str = "breaker-cli";

/// Windows and macOS.
const TARGETS: [&str; 2] = ["x86_64-pc-windows-gnu", "aarch64-apple-darwin"];

/// Beginnings of the names of crates that build on Linux only, or that belong to the agent.
const LINUX_ONLY: [&str; 9] =
    ["aya", "breaker-agent", "breaker-ebpf", "inotify", "linux-", "netlink-", "procfs", "rtnetlink", "socket-netlink"];

/// Runs `cargo check` for each target. Where the target's standard library cannot be installed, checks only that no
/// dependency is for Linux alone.
///
/// # Errors
/// The check failed, or there is a dependency that is for Linux alone.
pub fn check() -> Result<()> {
    for target in TARGETS {
        if has_std(target) {
            // A dependency compiles C. `cargo check` does not use the result, so no C compiler for the target is
            // needed: `true` succeeds without doing anything.
            let variable = target.replace('-', "_");
            run(cargo()
                .args(["check", "-p", PACKAGE, "--target", target])
                .env(format!("CC_{variable}"), "true")
                .env(format!("AR_{variable}"), "true"))?;
        } else {
            eprintln!("rustup cannot install the standard library for {target}: only the dependencies are checked");
            check_dependencies(target)?;
        }
    }
    Ok(())
}

/// Installs the standard library for the target if necessary. Returns whether it is installed.
fn has_std(target: &str) -> bool {
    let add = Command::new("rustup").args(["target", "add", target]).stdout(Stdio::null()).status();
    add.is_ok_and(|status| status.success())
}

fn check_dependencies(target: &str) -> Result<()> {
    let tree = output(cargo().args(["tree", "-p", PACKAGE, "--target", target, "-e", "normal", "--prefix", "none"]))?;
    let tree = String::from_utf8_lossy(&tree).into_owned();
    let names = tree.lines().filter_map(|line| line.split_whitespace().next());
    let found: Vec<&str> = names.filter(|name| LINUX_ONLY.iter().any(|start| name.starts_with(start))).collect();
    if !found.is_empty() {
        bail!("{PACKAGE} has dependencies for {target} that are for Linux alone: {}", found.join(", "));
    }
    Ok(())
}
