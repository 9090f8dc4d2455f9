//! Runs commands. An error contains the whole command.

use std::process::{Command, Stdio};

use anyhow::{Context as _, Result, bail};

/// The cargo that runs this program, with the workspace as its working directory.
///
/// `cargo run` sets variables about xtask's own package. They are removed: build scripts of dependencies depend on the same
/// names, and everything above them would be built anew whenever cargo runs by hand and through xtask in turn.
pub fn cargo() -> Command {
    let mut command = Command::new(std::env::var_os("CARGO").unwrap_or_else(|| "cargo".into()));
    command.current_dir(ebpf_builder::workspace());
    for (name, _) in std::env::vars_os() {
        let text = name.to_string_lossy();
        if text.starts_with("CARGO_PKG_") || text.starts_with("CARGO_MANIFEST_") {
            command.env_remove(&name);
        }
    }
    command
}

/// Runs a command and waits for it to end.
///
/// # Errors
/// The command cannot be started or fails. The message contains the whole command.
pub fn run(command: &mut Command) -> Result<()> {
    let status = command.status().with_context(|| format!("start {command:?}"))?;
    if !status.success() {
        bail!("failed ({status}): {command:?}");
    }
    Ok(())
}

/// Runs a command, waits for it to end, and returns its standard output.
///
/// # Errors
/// As for [`run`].
pub fn output(command: &mut Command) -> Result<Vec<u8>> {
    let output = command.stderr(Stdio::inherit()).output().with_context(|| format!("start {command:?}"))?;
    if !output.status.success() {
        bail!("failed ({}): {command:?}", output.status);
    }
    Ok(output.stdout)
}
