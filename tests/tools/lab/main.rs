//! The demo and the benchmarks, which `cargo xtask demo` and `cargo xtask bench` run as root.

mod bench;
mod demo;

use std::process::ExitCode;

use anyhow::{Result, ensure};
use clap::{Parser, Subcommand};

/// Demo and benchmarks in the lab.
#[derive(Parser)]
struct Cli {
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand)]
enum Command {
    /// Show the failover of a service, for several faults.
    Demo {
        /// Print one JSON object instead of the progress.
        #[arg(long)]
        json: bool,
        /// Leave the lab running afterwards.
        #[arg(long)]
        keep: bool,
    },
    /// Run the benchmarks.
    Bench {
        /// Run only the groups whose name contains this; the groups: packets, http, ways, limits, limits-packets,
        /// failover, probes, maps.
        name: Option<String>,
        /// Print the rows as a JSON list.
        #[arg(long)]
        json: bool,
    },
}

fn main() -> ExitCode {
    match execute(Cli::parse()) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("breaker-lab: {error:#}");
            ExitCode::FAILURE
        }
    }
}

fn execute(cli: Cli) -> Result<()> {
    ensure!(rustix::process::geteuid().is_root(), "run as root: the lab creates network namespaces and loads programs");
    match cli.command {
        Command::Demo { json, keep } => demo::demo(json, keep),
        Command::Bench { name, json } => bench::bench(name.as_deref(), json),
    }
}
