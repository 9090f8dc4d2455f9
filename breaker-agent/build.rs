//! Builds the BPF programs, so that a plain `cargo build` embeds them.

use ebpf_builder::Package;

fn main() -> anyhow::Result<()> {
    let object = ebpf_builder::build_for_script(Package::Breaker)?;
    println!("cargo::rustc-env=BREAKER_OBJECT={}", object.display());
    Ok(())
}
