//! Builds the BPF programs that the tests load: breaker's, and stand-ins for other vendors'.

use ebpf_builder::Package;

fn main() -> anyhow::Result<()> {
    let breaker = ebpf_builder::build_for_script(Package::Breaker)?;
    println!("cargo::rustc-env=BREAKER_OBJECT={}", breaker.display());
    let third_party = ebpf_builder::build_for_script(Package::ThirdParty)?;
    println!("cargo::rustc-env=THIRD_PARTY_OBJECT={}", third_party.display());
    Ok(())
}
