//! Running commands, with the command in the error.

use std::process::{Command, Stdio};

use anyhow::{Context as _, Result, bail};

/// The cargo that runs us, in the workspace's directory.
pub fn cargo() -> Command {
    let mut command = Command::new(std::env::var_os("CARGO").unwrap_or_else(|| "cargo".into()));
    command.current_dir(ebpf_builder::workspace());
    command
}

/// Runs a command to its end.
///
/// # Errors
/// When it cannot start or fails; the message has the whole command.
pub fn run(command: &mut Command) -> Result<()> {
    let status = command.status().with_context(|| format!("start {command:?}"))?;
    if !status.success() {
        bail!("failed ({status}): {command:?}");
    }
    Ok(())
}

/// Runs a command to its end and returns what it printed.
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
