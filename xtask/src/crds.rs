//! Generates the CustomResourceDefinitions.

use anyhow::{Context as _, Result};

use crate::run::{cargo, output};

/// Files with the CustomResourceDefinitions. The base and the chart contain the same file.
const FILES: [&str; 2] = ["k8s/base/crds.yaml", "k8s/chart/crds/crds.yaml"];

/// Writes the CustomResourceDefinitions, as the agent's binary prints them, to the files.
///
/// # Errors
/// The agent cannot be built, or a file cannot be written.
pub fn generate() -> Result<()> {
    let text = output(cargo().args(["run", "-p", "breaker-agent", "--", "crds"]))?;
    for file in FILES {
        let path = ebpf_builder::workspace().join(file);
        std::fs::write(&path, &text).with_context(|| format!("write {}", path.display()))?;
        println!("{file}");
    }
    Ok(())
}
