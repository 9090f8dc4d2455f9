//! Generates documents from the code.

use anyhow::{Context as _, Result};

use crate::run::{cargo, output};

/// Writes docs/METRICS.md, as the agent's list of metrics has it.
///
/// # Errors
/// The agent cannot be built, or the file cannot be written.
pub fn generate() -> Result<()> {
    let text = output(cargo().args(["run", "-p", "breaker-agent", "--example", "metrics_document"]))?;
    let file = "docs/METRICS.md";
    let path = ebpf_builder::workspace().join(file);
    std::fs::write(&path, &text).with_context(|| format!("write {}", path.display()))?;
    println!("{file}");
    Ok(())
}
