//! Builds the programs too: the tests load them, and somebody else's beside them.

fn main() -> anyhow::Result<()> {
    let objects = ebpf_builder::build_for_script()?;
    println!("cargo::rustc-env=BREAKER_OBJECT={}", objects.breaker.display());
    println!("cargo::rustc-env=FOREIGN_OBJECT={}", objects.foreign.display());
    Ok(())
}
