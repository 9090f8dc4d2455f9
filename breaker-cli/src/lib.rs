//! breaker's command line. It queries an agent over its control socket, and a cluster over the Kubernetes API.
//!
//! The crate builds on Linux, macOS and Windows. The binary `breaker` of a node adds the commands that need the kernel:
//! `agent`, `preflight` and `cleanup`.
//!
//! | module | one concern |
//! |---|---|
//! | [`args`] | the commands and their options |
//! | [`run`] | executes a command |
//! | [`client`] | the client's side of the control socket |
//! | [`cluster`] | `kubectl breaker`: a whole cluster, by the API server |
//! | [`duration`] | times as people write them |
//! | `output`, `show`, `table`, `visible` | standard output and its formats; text |

// They panic where the output cannot be written.
#![warn(clippy::print_stdout, clippy::print_stderr)]
#![forbid(unsafe_code)]

use std::{ffi::OsString, process::ExitCode};

use clap::Parser;

use cluster::args::ClusterArgs;

pub mod args;
pub mod client;
pub mod cluster;
pub mod duration;
mod output;
pub mod run;
mod show;
mod table;
mod visible;

/// Chooses the TLS implementation of the whole process; calling it again does nothing.
pub fn install_crypto() {
    // It fails only if one is installed already.
    let _ = rustls::crypto::ring::default_provider().install_default();
}

/// The command line of `kubectl breaker`.
#[derive(Debug, Parser)]
#[command(name = "kubectl-breaker", bin_name = "kubectl breaker", version, about = PLUGIN)]
struct Plugin {
    #[command(flatten)]
    args: ClusterArgs,
}

const PLUGIN: &str = "Shows what breaker does in a cluster, and forces breakers open.";

/// Runs `kubectl breaker`. `args`: the process' arguments, with its name.
pub async fn plugin(args: impl Iterator<Item = OsString>) -> ExitCode {
    let plugin = Plugin::parse_from(args);
    run::exit_code("kubectl breaker", cluster::run(plugin.args).await)
}

#[cfg(test)]
mod tests {
    use super::*;
    use clap::CommandFactory as _;

    #[test]
    fn the_command_line_holds_together() {
        Plugin::command().debug_assert();
    }
}
