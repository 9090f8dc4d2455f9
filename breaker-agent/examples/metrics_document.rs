//! Prints docs/METRICS.md, for `cargo xtask docs`.

use std::io::Write as _;

fn main() -> std::io::Result<()> {
    std::io::stdout().write_all(breaker_agent::metrics::document().as_bytes())
}
