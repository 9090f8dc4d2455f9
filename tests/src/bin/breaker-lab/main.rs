//! The demo and the bench: what `cargo xtask demo` and `cargo xtask bench` run, as root.

mod bench;
mod demo;

use std::process::ExitCode;

use anyhow::{Result, ensure};
use clap::{Parser, Subcommand};

/// The lab, for people.
#[derive(Parser)]
struct Cli {
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand)]
enum Command {
    /// Play the story.
    Demo {
        /// Print one JSON object instead of the story.
        #[arg(long)]
        json: bool,
        /// Leave the lab up afterwards.
        #[arg(long)]
        keep: bool,
    },
    /// Measure.
    Bench {
        /// Only the groups whose name contains this: packets, http, failover, probes, maps.
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
    ensure!(rustix::process::geteuid().is_root(), "the lab needs root: it makes network namespaces and loads programs");
    match cli.command {
        Command::Demo { json, keep } => demo::demo(json, keep),
        Command::Bench { name, json } => bench::bench(name.as_deref(), json),
    }
}
