//! docs/METRICS.md, made from the list of metrics. `cargo xtask docs` writes the file, and a test finds a stale one.

use super::families::{ALL, Family, Owner};

const INTRODUCTION: &str = include_str!("introduction.md");

/// The content of docs/METRICS.md.
#[must_use]
pub fn document() -> String {
    let sections = [
        (Owner::Node, "## The node and its agent"),
        (Owner::Process, "## The process"),
        (Owner::Breaker, "## Each breaker"),
        (Owner::Backend, "## Each backend"),
    ];
    let mut text = INTRODUCTION.to_owned();
    for (owner, title) in sections {
        text.push_str(&format!("\n{title}\n\n| name | type | labels | meaning |\n|---|---|---|---|\n"));
        ALL.iter().filter(|family| family.owner == owner).for_each(|family| text.push_str(&row(family)));
    }
    text
}

fn row(family: &Family) -> String {
    let own = family.labels.iter().filter(|label| !["breaker_namespace", "breaker"].contains(*label));
    let labels = own.map(|label| format!("`{label}`")).collect::<Vec<_>>().join(", ");
    let values = if family.values.is_empty() { String::new() } else { format!(" ({})", family.values) };
    format!("| `{}` | {} | {labels} | {}{values} |\n", family.name, family.kind.label(), family.help)
}
