//! `cargo xtask`: the development tasks of this repository, one subcommand each.

#![forbid(unsafe_code)]

mod image;
mod run;
mod setup;
mod vm;

use std::process::ExitCode;

use anyhow::{Context as _, Result, ensure};
use clap::{Parser, Subcommand, ValueEnum};

use run::{cargo, run};

/// breaker's development tasks: build, lint, test, images, demo and benchmarks.
#[derive(Parser)]
#[command(bin_name = "cargo xtask", version, about)]
struct Cli {
    #[command(subcommand)]
    command: Task,
}

#[derive(Subcommand)]
enum Task {
    /// Install what builds, the demo and the tests need: Debian packages with apt-get, bpf-linker with cargo.
    Setup,
    /// Build the BPF programs (building the agent does this by itself).
    BuildEbpf {
        /// Build optimized programs, as embedded in the agent.
        #[arg(long)]
        release: bool,
    },
    /// Check formatting and run clippy with warnings as errors, including the BPF programs.
    Lint,
    /// Run all tests except the tiers fuzz and vm: first those without root, then those that use the running kernel.
    Test {
        /// Run only this tier.
        tier: Option<Tier>,
        /// Run only tests whose name contains this text.
        #[arg(long)]
        filter: Option<String>,
        /// Tier fuzz only: number of packet sequences.
        #[arg(long, default_value_t = 50_000)]
        cases: u64,
        /// Tier fuzz only: seed of the random generator. The same seed produces the same sequences.
        #[arg(long, default_value_t = 1)]
        seed: u64,
        /// Tier vm only: run on this kernel only; may be given several times.
        #[arg(long)]
        kernel: Vec<vm::Kernel>,
        /// Tier vm only: run only this tier in the guest.
        #[arg(long = "tier", value_name = "TIER")]
        guest: Option<vm::Guest>,
    },
    /// Build container images of the agent and of the dummy service into dist/, without a container engine. Each
    /// archive is an OCI image layout and a docker archive at the same time.
    Image {
        /// Also push the images to this registry, over plain HTTP.
        #[arg(long, value_name = "HOST:PORT")]
        push: Option<String>,
        /// Tag of the images.
        #[arg(long, default_value = env!("CARGO_PKG_VERSION"))]
        tag: String,
    },
    /// Generate the CustomResourceDefinitions in k8s/ from the Rust types.
    Crdgen,
    /// Run the demo: a service fails over in the kernel and recovers (needs root).
    Demo {
        /// Print one JSON object instead of text.
        #[arg(long)]
        json: bool,
        /// Keep the lab running afterwards, and print how to inspect it.
        #[arg(long)]
        keep: bool,
    },
    /// Install breaker and the lab on a cluster of yours, run the end-to-end scenarios, and remove everything again.
    #[command(after_help = "\
The options whose value is CMD take a command for `sh -c`, in which {} stands for an archive or a node. Scenarios that \
need a command that was not given are skipped.")]
    E2e {
        /// Arguments for the end-to-end test program: see `cargo xtask e2e -- --help`.
        #[arg(trailing_var_arg = true, allow_hyphen_values = true)]
        args: Vec<String>,
    },
    /// Run benchmarks. They report ratios between alternatives that run side by side (needs root).
    Bench {
        /// Run only the groups whose name contains this: packets, http, ways, limits, limits-packets, failover,
        /// probes, maps.
        name: Option<String>,
        /// Print the results as a JSON list.
        #[arg(long)]
        json: bool,
    },
}

/// A tier of tests.
#[derive(Clone, Copy, ValueEnum, PartialEq, Eq)]
enum Tier {
    /// All tests that do not need root.
    Unit,
    /// The BPF programs in the running kernel, packet by packet (needs root).
    Program,
    /// The whole agent with real sockets in network namespaces (needs root).
    Lab,
    /// Random packets through the BPF programs and through a model of their rules (needs root). A small fixed part
    /// of it belongs to the tier program.
    Fuzz,
    /// The tiers program and lab on other kernels under qemu. Not run without naming it.
    Vm,
}

fn main() -> ExitCode {
    match execute(Cli::parse().command) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("xtask: {error:#}");
            ExitCode::FAILURE
        }
    }
}

fn execute(task: Task) -> Result<()> {
    match task {
        Task::Setup => setup::setup(true),
        Task::BuildEbpf { release } => {
            setup::setup(false)?;
            let objects = ebpf_builder::build(release)?;
            println!("{}", objects.breaker.display());
            Ok(())
        }
        Task::Lint => lint(),
        Task::Test { tier: Some(Tier::Fuzz), cases, seed, .. } => {
            setup::setup(false)?;
            fuzz(cases, seed)
        }
        Task::Test { tier: Some(Tier::Vm), filter, kernel, guest, .. } => {
            setup::setup(false)?;
            setup::setup_vm()?;
            let guests = guest.as_ref().map_or(vm::Guest::value_variants(), std::slice::from_ref);
            if guests.contains(&vm::Guest::Lab) {
                setup::setup_lab()?;
            }
            let all = vm::Kernel::value_variants();
            vm::test(if kernel.is_empty() { all } else { &kernel }, guests, filter.as_deref())
        }
        Task::Test { tier, filter, kernel, guest, .. } => {
            ensure!(guest.is_none(), "--tier needs the tier vm: run `cargo xtask test vm --tier lab`");
            ensure!(kernel.is_empty(), "--kernel needs the tier vm: run `cargo xtask test vm --kernel {}`", kernel[0]);
            setup::setup(false)?;
            test(tier, filter.as_deref())
        }
        Task::Image { push, tag } => {
            setup::setup(false)?;
            image::image(&tag, push.as_deref())
        }
        Task::Crdgen => crdgen(),
        Task::Demo { json, keep } => {
            setup::setup(false)?;
            let flags = [(json, "--json"), (keep, "--keep")];
            lab("demo", flags.iter().filter(|(on, _)| *on).map(|(_, flag)| *flag))
        }
        Task::E2e { args } => {
            setup::setup(false)?;
            image::image(env!("CARGO_PKG_VERSION"), None)?;
            run(cargo()
                .args(["run", "--quiet", "--release", "-p", "breaker-tests", "--bin", "breaker-e2e", "--"])
                .args(args))
        }
        Task::Bench { name, json } => {
            setup::setup(false)?;
            lab("bench", name.as_deref().into_iter().chain(json.then_some("--json")))
        }
    }
}

/// Files with the CustomResourceDefinitions. The base and the chart contain the same file.
const CRDS: [&str; 2] = ["k8s/base/crds.yaml", "k8s/chart/crds/crds.yaml"];

fn crdgen() -> Result<()> {
    setup::setup(false)?;
    let mut command = cargo();
    command.args(["run", "--quiet", "-p", "breaker-agent", "--", "crds"]);
    let text = run::output(&mut command)?;
    for file in CRDS {
        let path = ebpf_builder::workspace().join(file);
        std::fs::write(&path, &text).with_context(|| format!("write {}", path.display()))?;
        println!("{file}");
    }
    Ok(())
}

fn lint() -> Result<()> {
    setup::setup(false)?;
    run(cargo().args(["fmt", "--all", "--check"]))?;
    run(cargo().args(["fmt", "--check", "--manifest-path", "breaker-ebpf/Cargo.toml"]))?;
    // The BPF programs are checked by a build of their own: clippy can check their target only with the source of
    // `core`.
    ebpf_builder::lint()?;
    run(cargo().args(["clippy", "--quiet", "--workspace", "--all-targets", "--", "-D", "warnings"]))
}

fn test(tier: Option<Tier>, filter: Option<&str>) -> Result<()> {
    let wanted = |t| tier.is_none_or(|only| only == t);
    let filter: Vec<&str> = filter.into_iter().collect();
    if wanted(Tier::Unit) {
        run(cargo().args(["test", "--quiet", "--workspace", "--exclude", "breaker-tests"]).args(&filter))?;
        let helm = std::process::Command::new("helm").arg("version").output().is_ok_and(|o| o.status.success());
        println!("k8s/chart is rendered by {}", if helm { "helm" } else { "gtmpl, because helm is not in PATH" });
        run(cargo()
            .args(["test", "--quiet", "-p", "breaker-tests", "--lib", "--test", "unit", "--test", "manifests"])
            .args(&filter))?;
    }
    // One test at a time: these tests measure outcomes under load, and two cores are not enough for two of them.
    let root = |name: &str| {
        let mut command = cargo();
        command.args(["test", "--quiet", "-p", "breaker-tests", "--test", name, "--"]).args(&filter);
        command.args(["--test-threads", "1"]);
        command
    };
    if wanted(Tier::Program) {
        run(&mut root("program"))?;
    }
    if wanted(Tier::Lab) {
        setup::setup_lab()?;
        build_lab()?;
        run(&mut root("lab"))?;
    }
    Ok(())
}

/// Runs the differential test only. It is optimized, because the model and the generator take most of the time.
fn fuzz(cases: u64, seed: u64) -> Result<()> {
    run(cargo()
        .args(["test", "--quiet", "--release", "-p", "breaker-tests", "--test", "program", "--"])
        .args(["differential", "--nocapture"])
        .env("BREAKER_FUZZ_CASES", cases.to_string())
        .env("BREAKER_FUZZ_SEED", seed.to_string()))
}

/// Builds the binaries that the lab runs, optimized, so that tests and benchmarks run what users run.
fn build_lab() -> Result<()> {
    run(cargo().args(["build", "--quiet", "--release", "-p", "breaker-agent", "-p", "breaker-tests", "--bins"]))
}

/// Runs a subcommand of the lab binary.
fn lab<'a>(command: &str, args: impl Iterator<Item = &'a str>) -> Result<()> {
    build_lab()?;
    run(cargo()
        .args(["run", "--quiet", "--release", "-p", "breaker-tests", "--bin", "breaker-lab", "--", command])
        .args(args))
}
