//! Builds the programs for the kernel, so that a plain `cargo build` embeds them.

fn main() -> anyhow::Result<()> {
    let objects = ebpf_builder::build_for_script()?;
    println!("cargo::rustc-env=BREAKER_OBJECT={}", objects.breaker.display());
    Ok(())
}
