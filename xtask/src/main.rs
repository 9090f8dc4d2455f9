//! `cargo xtask`: the development tasks of this repository, one subcommand each.

#![forbid(unsafe_code)]

mod build;
mod crds;
mod docs;
mod image;
mod lint;
mod page;
mod progress;
mod run;
mod setup;
mod test;
mod vendor;
mod vm;

use std::process::ExitCode;

use anyhow::Result;
use clap::{Parser, Subcommand};
use ebpf_builder::Package;

use progress::step;
use run::run;

/// breaker's development tasks: build, lint, test, images, demo and benchmarks.
#[derive(Parser)]
#[command(bin_name = "cargo xtask", version, about)]
struct Cli {
    #[command(subcommand)]
    task: Task,
}

#[derive(Subcommand)]
enum Task {
    /// Install what builds, the demo and the tests need: Debian packages with apt-get, bpf-linker with cargo.
    Setup {
        /// Also build Helm 3 and 4 with Go, for `cargo xtask e2e`, which then tries the chart with them.
        #[arg(long)]
        helm: bool,
    },
    /// Build the BPF programs (building the agent does this by itself).
    BuildEbpf {
        /// Build optimized programs, as embedded in the agent.
        #[arg(long)]
        release: bool,
    },
    /// Check formatting, run clippy with warnings as errors (also on the BPF programs), check the imports, and check
    /// that the command line builds for other systems than Linux.
    Lint,
    /// Run tests: one tier, or the tiers unit, program and lab in this order.
    Test(test::Args),
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
    /// Generate docs/METRICS.md from the agent's list of metrics.
    Docs,
    /// Copy the code of others that the page uses from npm packages into breaker-web/vendor.
    Vendor,
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
        /// probes, scale, maps, node, scrape, resets. `page` measures the live page; a run without a name leaves it out.
        name: Option<String>,
        /// Print the results as a JSON list.
        #[arg(long)]
        json: bool,
    },
}

fn main() -> ExitCode {
    match execute(Cli::parse().task) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("xtask: {error:#}");
            ExitCode::FAILURE
        }
    }
}

fn execute(task: Task) -> Result<()> {
    setup::setup()?;
    match task {
        Task::Setup { helm } => {
            setup::setup_lab()?;
            if helm {
                setup::setup_helm()?;
            }
            println!("setup: everything is installed");
            Ok(())
        }
        Task::BuildEbpf { release } => {
            println!("{}", ebpf_builder::build(Package::Breaker, release)?.display());
            Ok(())
        }
        Task::Lint => lint::lint(),
        Task::Test(args) => test::test(args),
        Task::Image { push, tag } => image::image(&tag, push.as_deref()),
        Task::Crdgen => crds::generate(),
        Task::Docs => docs::generate(),
        Task::Vendor => vendor::vendor(),
        Task::Demo { json, keep } => lab("demo", [json.then_some("--json"), keep.then_some("--keep")]),
        Task::E2e { args } => {
            image::image(env!("CARGO_PKG_VERSION"), None)?;
            let mut e2e = build::tool("breaker-e2e")?;
            step("run the end-to-end scenarios", || run(e2e.args(args)))
        }
        Task::Bench { name: Some(name), .. } if name == "page" => page::bench(),
        Task::Bench { name, json } => {
            setup::setup_bench().and_then(|()| lab("bench", [name.as_deref(), json.then_some("--json")]))
        }
    }
}

/// Runs a subcommand of the lab tool.
fn lab(subcommand: &str, args: [Option<&str>; 2]) -> Result<()> {
    setup::setup_lab()?;
    build::binaries()?;
    let mut lab = build::tool("breaker-lab")?;
    step(&format!("run the {subcommand}"), || run(lab.arg(subcommand).args(args.iter().flatten())))
}
