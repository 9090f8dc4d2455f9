//! Generates the CustomResourceDefinitions.

use anyhow::{Context as _, Result};

use crate::run::{cargo, output};

/// Writes the CustomResourceDefinitions, as the agent's binary prints them, to the base, and as a template to the chart.
///
/// # Errors
/// The agent cannot be built, or a file cannot be written.
pub fn generate() -> Result<()> {
    let text = String::from_utf8(output(cargo().args(["run", "-p", "breaker-agent", "--", "crds"]))?)?;
    for (file, text) in [("k8s/base/crds.yaml", text.clone()), ("k8s/chart/templates/crds.yaml", template(&text)?)] {
        let path = ebpf_builder::workspace().join(file);
        std::fs::write(&path, &text).with_context(|| format!("write {}", path.display()))?;
        println!("{file}");
    }
    Ok(())
}

/// The definitions as a template of the chart: an upgrade upgrades them, and an uninstall keeps them.
fn template(text: &str) -> Result<String> {
    let (head, documents) = text.split_once("---\n").context("the definitions have no documents")?;
    let kept = "metadata:\n  annotations:\n    helm.sh/resource-policy: keep\n  name:";
    let documents = documents.replace("\nmetadata:\n  name:", &format!("\n{kept}"));
    Ok(format!("{head}{{{{- if .Values.crds.install }}}}\n---\n{documents}{{{{- end }}}}\n"))
}
