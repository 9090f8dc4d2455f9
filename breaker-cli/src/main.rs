//! The binary `kubectl-breaker`: the command line without the commands that need a node.

#![forbid(unsafe_code)]

use std::process::ExitCode;

use breaker_cli::{
    args::{Command, Global},
    run::{self, Context},
};
use clap::{CommandFactory as _, Parser};

/// Shows what breaker does in a cluster, and on this node.
#[derive(Debug, Parser)]
#[command(name = "kubectl-breaker", version, about)]
struct Cli {
    #[command(flatten)]
    global: Global,
    #[command(subcommand)]
    command: Command,
}

#[tokio::main(flavor = "current_thread")]
async fn main() -> ExitCode {
    let cli = Cli::parse_from(run::as_plugin(std::env::args_os(), &Cli::command()));
    let context = Context { socket: &cli.global.socket, command: &Cli::command, offline: None };
    run::exit_code("kubectl-breaker", run::run(cli.command, &context).await)
}
