//! The commands that need no kernel, and their options.

use std::{path::PathBuf, time::Duration};

use breaker_api::DEFAULT_SOCKET;
use clap::{Args, Subcommand, ValueEnum};
use clap_complete::Shell;

pub use crate::output::{Output, TableOutput};
use crate::{cluster::args::ClusterArgs, duration};

/// Options of every command.
#[derive(Clone, Debug, Args)]
pub struct Global {
    /// Control socket of the agent.
    #[arg(long, global = true, env = "BREAKER_SOCKET", default_value = DEFAULT_SOCKET, value_name = "PATH")]
    pub socket: PathBuf,
}

/// A command.
#[derive(Clone, Debug, Subcommand)]
pub enum Command {
    /// Show every service: its state, since when, why, and its backends. Works without an agent, too.
    #[command(display_order = 2)]
    Status {
        /// Output format: a table, or the complete status as JSON or YAML.
        #[arg(short, long, default_value = "table")]
        output: TableOutput,
    },
    /// Show everything about one service.
    #[command(display_order = 3)]
    Get {
        /// The service's name.
        name: String,
        /// Output format.
        #[arg(short, long, default_value = "yaml")]
        output: Output,
    },
    /// Force a service open: its new connections go to the backup until `reset`.
    #[command(display_order = 4, after_help = "Example: breaker trip dummy --for 10m --reason \"database migration\"")]
    Trip {
        /// The service's name.
        name: String,
        /// How long the service stays forced open (30s, 10m, 1h30m); until `reset` if not given.
        #[arg(long = "for", value_name = "TIME", value_parser = duration::parse)]
        duration: Option<Duration>,
        /// Why the service is forced open; appears in the status and the events.
        #[arg(long)]
        reason: Option<String>,
    },
    /// End an override: the checks decide again, without backoff, and the breaker closes unless the primary is Down.
    #[command(display_order = 5)]
    Reset {
        /// The service's name.
        name: String,
    },
    /// Show recorded events and, with --follow, new events as they happen.
    #[command(display_order = 6)]
    Events {
        /// Continue with new events until interrupted.
        #[arg(short, long)]
        follow: bool,
        /// Output format: one line of text or one JSON object for each event.
        #[arg(short, long, default_value = "text")]
        output: EventOutput,
    },
    /// Show the connections of a service for which breaker pinned a decision, youngest first.
    #[command(display_order = 7)]
    Flows {
        /// The service's name.
        name: String,
        /// Largest number of connections to show.
        #[arg(long, default_value_t = 50)]
        limit: usize,
        /// Output format: a table, or the complete list as JSON or YAML.
        #[arg(short, long, default_value = "table")]
        output: TableOutput,
    },
    /// Show and force the CircuitBreakers of a cluster, by the Kubernetes API: the commands of `kubectl breaker`.
    #[command(display_order = 9)]
    Cluster(ClusterArgs),
    /// Print the definitions of breaker's Kubernetes types (CRDs), for kubectl apply.
    #[command(display_order = 10)]
    Crds,
    /// Announce that the agent is about to be replaced: its last decision stays in force longer than the usual lease.
    #[command(
        display_order = 11,
        after_help = "Example, before an upgrade that pulls an image: breaker handover --for 10m"
    )]
    Handover {
        /// How long the last decision stays in force (30s, 10m, 2h).
        #[arg(long = "for", value_name = "TIME", value_parser = duration::parse, default_value = "10m")]
        duration: Duration,
    },
    /// Print shell completions.
    #[command(display_order = 13, after_help = "Example: breaker completions bash > /etc/bash_completion.d/breaker")]
    Completions {
        /// The shell.
        shell: Shell,
    },
}

/// The format of events.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
#[allow(missing_docs, reason = "a documented value is a line of its own in --help")]
pub enum EventOutput {
    Text,
    Json,
}
