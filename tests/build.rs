//! Builds the programs too: the tests load them, and somebody else's beside them.

fn main() -> anyhow::Result<()> {
    let root = ebpf_builder::workspace();
    for input in ["breaker-ebpf/src", "breaker-ebpf/Cargo.toml", "breaker-ebpf/Cargo.lock", "breaker-common/src"] {
        println!("cargo::rerun-if-changed={}", root.join(input).display());
    }
    let objects = ebpf_builder::build(true)?;
    println!("cargo::rustc-env=FOREIGN_OBJECT={}", objects.foreign.display());
    Ok(())
}
