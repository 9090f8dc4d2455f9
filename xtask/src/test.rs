//! Runs the tests, tier by tier.

use std::process::Command;

use anyhow::Result;
use clap::{Subcommand, ValueEnum as _};
use ebpf_builder::Package;

use crate::{
    build, page,
    progress::step,
    run::{cargo, run},
    setup, vm,
};

/// The tier to run, with its options.
#[derive(clap::Args)]
#[command(args_conflicts_with_subcommands = true)]
pub struct Args {
    /// The tier to run. Without it: unit, program and lab.
    #[command(subcommand)]
    tier: Option<Tier>,
    #[command(flatten)]
    filter: Filter,
}

#[derive(clap::Args)]
struct Filter {
    /// Run only tests whose name contains this text.
    #[arg(long, value_name = "TEXT")]
    filter: Option<String>,
}

#[derive(Subcommand)]
enum Tier {
    /// All tests that do not need root.
    Unit(Filter),
    /// The BPF programs in the running kernel, packet by packet (needs root).
    Program(Filter),
    /// The whole agent with real sockets in network namespaces (needs root).
    Lab(Filter),
    /// Send random packets through the BPF programs and through a model of their rules, and compare the results
    /// (needs root). A small fixed part of this test belongs to the tier program.
    Fuzz {
        /// Number of packet sequences.
        #[arg(long, default_value_t = 50_000)]
        cases: u64,
        /// Seed of the random generator. The same seed produces the same sequences.
        #[arg(long, default_value_t = 1)]
        seed: u64,
    },
    /// The live page in a real browser, with Node.js. Its pictures go to target/page; with BREAKER_UPDATE=1 also to
    /// docs/images.
    Page(Filter),
    /// The tiers program and lab on other kernels under qemu.
    Vm {
        #[command(flatten)]
        filter: Filter,
        /// Run on this kernel only; may be given several times.
        #[arg(long)]
        kernel: Vec<vm::Kernel>,
        /// Run only this tier in the guest.
        #[arg(long)]
        tier: Option<vm::Guest>,
        /// Number of the guest's CPUs. One thread of this machine emulates all of them.
        #[arg(long, default_value_t = 2, value_parser = clap::value_parser!(u8).range(1..=128))]
        cpus: u8,
    },
}

/// Runs the tests that `args` select.
///
/// # Errors
/// A test failed, or something could not be built or installed.
pub fn test(args: Args) -> Result<()> {
    match args.tier {
        None => {
            let filter = args.filter;
            unit(&filter)?;
            program(&filter)?;
            lab(&filter)
        }
        Some(Tier::Unit(filter)) => unit(&filter),
        Some(Tier::Program(filter)) => program(&filter),
        Some(Tier::Lab(filter)) => lab(&filter),
        Some(Tier::Fuzz { cases, seed }) => fuzz(cases, seed),
        Some(Tier::Page(filter)) => page::test(filter.filter.as_deref()),
        Some(Tier::Vm { filter, kernel, tier, cpus }) => {
            let guests = tier.as_ref().map_or(vm::Guest::value_variants(), std::slice::from_ref);
            setup::setup_vm()?;
            if guests.contains(&vm::Guest::Lab) {
                setup::setup_lab()?;
            }
            let all = vm::Kernel::value_variants();
            vm::test(if kernel.is_empty() { all } else { &kernel }, guests, cpus, filter.filter.as_deref())
        }
    }
}

fn unit(filter: &Filter) -> Result<()> {
    setup::setup_prometheus();
    build::programs()?;
    let test = ["test", "--workspace"];
    step("build the tests without root", || run(cargo().args(test).arg("--no-run")))?;
    let helm = Command::new("helm").arg("version").output().is_ok_and(|output| output.status.success());
    println!("k8s/chart is rendered by {}", if helm { "helm" } else { "gtmpl, because helm is not in PATH" });
    step("run the tests without root", || run(cargo().args(test).arg("--quiet").args(&filter.filter)))
}

fn program(filter: &Filter) -> Result<()> {
    build::programs()?;
    root("program", filter)
}

fn lab(filter: &Filter) -> Result<()> {
    setup::setup_lab()?;
    build::binaries()?;
    root("lab", filter)
}

/// Builds and runs one test target of `breaker-tests`, one test at a time: these tests measure outcomes under load,
/// and two cores are not enough for two of them.
fn root(target: &str, filter: &Filter) -> Result<()> {
    third_party()?;
    let test = ["test", "--workspace", "--test", target];
    step(&format!("build the tests of the tier {target}"), || run(cargo().args(test).arg("--no-run")))?;
    step(&format!("run the tier {target}"), || {
        run(cargo().args(test).arg("--").args(&filter.filter).args(["--test-threads", "1"]))
    })
}

/// Runs the differential test only. It is optimized, because the model and the generator take most of the time.
fn fuzz(cases: u64, seed: u64) -> Result<()> {
    build::programs()?;
    third_party()?;
    let test = ["test", "--release", "--workspace", "--test", "program"];
    step("build the differential test", || run(cargo().args(test).arg("--no-run")))?;
    step(&format!("run {cases} sequences of packets with seed {seed}"), || {
        run(cargo()
            .args(test)
            .args(["--quiet", "--", "differential", "--nocapture"])
            .env("BREAKER_FUZZ_CASES", cases.to_string())
            .env("BREAKER_FUZZ_SEED", seed.to_string()))
    })
}

/// Builds the stand-ins for other vendors' BPF programs, for the reason given at [`build::programs`].
fn third_party() -> Result<()> {
    step("build the third-party BPF programs of the tests", || ebpf_builder::build(Package::ThirdParty, true).map(drop))
}
