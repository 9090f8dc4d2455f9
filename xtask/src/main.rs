//! `cargo xtask`: everything a developer or CI does here, each by one word.

#![forbid(unsafe_code)]

mod image;
mod run;
mod setup;
mod vm;

use std::process::ExitCode;

use anyhow::{Context as _, Result, ensure};
use clap::{Parser, Subcommand, ValueEnum};

use run::{cargo, run};

/// breaker's own commands.
#[derive(Parser)]
#[command(bin_name = "cargo xtask", version, about)]
struct Cli {
    #[command(subcommand)]
    command: Task,
}

#[derive(Subcommand)]
enum Task {
    /// Install what a build, the demo and the tests need: Debian packages by apt-get, bpf-linker by cargo.
    Setup,
    /// Build the programs for the kernel (a build of the agent does this by itself).
    BuildEbpf {
        /// As the agent embeds them.
        #[arg(long)]
        release: bool,
    },
    /// Formatting and clippy, warnings as errors, the programs included.
    Lint,
    /// All tests: those without root first, then the ones in the real kernel. (Other kernels are apart: `test vm`.)
    Test {
        /// Only this tier.
        tier: Option<Tier>,
        /// Only tests whose name contains this.
        #[arg(long)]
        filter: Option<String>,
        /// Of `fuzz`: so many sequences of packets.
        #[arg(long, default_value_t = 50_000)]
        cases: u64,
        /// Of `fuzz`: where to start; the same seed makes the same sequences.
        #[arg(long, default_value_t = 1)]
        seed: u64,
        /// With the tier vm: only on this kernel; may be given several times.
        #[arg(long)]
        kernel: Vec<vm::Kernel>,
        /// With the tier vm: only this tier, in the guest.
        #[arg(long = "tier", value_name = "TIER")]
        guest: Option<vm::Guest>,
    },
    /// Build container images of the agent and the dummy service into dist/, without a container engine: each archive is
    /// an OCI image layout and a docker archive at once.
    Image {
        /// Push them to this registry, too, over plain HTTP.
        #[arg(long, value_name = "HOST:PORT")]
        push: Option<String>,
        /// The images' tag.
        #[arg(long, default_value = env!("CARGO_PKG_VERSION"))]
        tag: String,
    },
    /// Write the definitions of the Kubernetes types to k8s/, from the Rust types.
    Crdgen,
    /// Play the lab: a service fails over in the kernel and comes back.
    Demo {
        /// Print one JSON object instead of the story.
        #[arg(long)]
        json: bool,
        /// Leave the lab up afterwards, and say how to look around in it.
        #[arg(long)]
        keep: bool,
    },
    /// Play the lab and its faults on a cluster of yours, and take everything away again.
    #[command(after_help = "\
Commands run by `sh -c`; {} stands for an archive or a node. Without the optional ones, what needs them is left out.")]
    E2e {
        /// Everything else goes to the program that does it: see `cargo xtask e2e -- --help`.
        #[arg(trailing_var_arg = true, allow_hyphen_values = true)]
        args: Vec<String>,
    },
    /// Measure; ratios between things that ran side by side.
    Bench {
        /// Only the groups whose name contains this: packets, http, failover, probes, maps.
        name: Option<String>,
        /// Print the rows as a JSON list.
        #[arg(long)]
        json: bool,
    },
}

/// A tier of tests.
#[derive(Clone, Copy, ValueEnum, PartialEq, Eq)]
enum Tier {
    /// Everything that needs no root.
    Unit,
    /// The programs in the kernel, packet by packet (root).
    Program,
    /// Real sockets in network namespaces (root).
    Lab,
    /// Random packets through the programs and a model of their rules (root); a few of them are in `program`, too.
    Fuzz,
    /// The tiers program and lab on other kernels under qemu: not part of "all".
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
            ensure!(guest.is_none(), "--tier is for the tier vm only: cargo xtask test vm --tier lab");
            ensure!(kernel.is_empty(), "--kernel is for the tier vm only: cargo xtask test vm --kernel {}", kernel[0]);
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

/// Where the definitions are; base and chart have the same file.
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
    // The programs' own warnings are errors in their build; clippy knows the target only with core's source.
    ebpf_builder::lint()?;
    run(cargo().args(["clippy", "--quiet", "--workspace", "--all-targets", "--", "-D", "warnings"]))
}

fn test(tier: Option<Tier>, filter: Option<&str>) -> Result<()> {
    let wanted = |t| tier.is_none_or(|only| only == t);
    let filter: Vec<&str> = filter.into_iter().collect();
    if wanted(Tier::Unit) {
        run(cargo().args(["test", "--quiet", "--workspace", "--exclude", "breaker-tests"]).args(&filter))?;
        let helm = std::process::Command::new("helm").arg("version").output().is_ok_and(|o| o.status.success());
        println!("k8s/chart is rendered by {}", if helm { "helm" } else { "gtmpl: there is no helm on the PATH" });
        run(cargo()
            .args(["test", "--quiet", "-p", "breaker-tests", "--lib", "--test", "unit", "--test", "manifests"])
            .args(&filter))?;
    }
    // One lab at a time on two cores: these tests measure outcomes under load.
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

/// The differential test alone, optimized: most of its time is the model's and the generator's.
fn fuzz(cases: u64, seed: u64) -> Result<()> {
    run(cargo()
        .args(["test", "--quiet", "--release", "-p", "breaker-tests", "--test", "program", "--"])
        .args(["differential", "--nocapture"])
        .env("BREAKER_FUZZ_CASES", cases.to_string())
        .env("BREAKER_FUZZ_SEED", seed.to_string()))
}

/// Builds what the lab runs, for release: the stories and numbers are about what users run.
fn build_lab() -> Result<()> {
    run(cargo().args(["build", "--quiet", "--release", "-p", "breaker-agent", "-p", "breaker-tests", "--bins"]))
}

/// Runs a command of the lab binary.
fn lab<'a>(command: &str, args: impl Iterator<Item = &'a str>) -> Result<()> {
    build_lab()?;
    run(cargo()
        .args(["run", "--quiet", "--release", "-p", "breaker-tests", "--bin", "breaker-lab", "--", command])
        .args(args))
}
