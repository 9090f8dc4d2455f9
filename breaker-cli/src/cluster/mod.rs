//! `kubectl breaker`, also `breaker cluster`: what breaker does in a cluster, from the API server, with the caller's own
//! rights.
//!
//! | module | one concern |
//! |---|---|
//! | [`args`] | the command line |
//! | [`connection`] | the caller's kubeconfig, context, identity and namespace |
//! | [`overview`] | CircuitBreakers and NodeReports, read once |
//! | [`status`], [`nodes`] | the tables: a line for each breaker; a line for each breaker and node |
//! | [`forced`] | `trip` and `reset` |
//! | [`events`] | Events about breakers |
//! | [`flows`] | connections, from the agents |
//! | [`dashboard`] | the live page |
//! | [`check`] | whether the installation is sound |
//! | [`uninstall`] | stops the agents and cleans every node |
//! | [`complete`] | completion of names, for kubectl |

pub mod args;
mod check;
mod complete;
pub mod connection;
mod dashboard;
mod events;
mod flows;
mod forced;
mod nodes;
pub mod overview;
mod status;
mod uninstall;

use anyhow::Result;
use std::process::ExitCode;

use self::args::{ClusterArgs, ClusterCommand};
use self::connection::Connection;

/// The namespace of the agents.
const AGENTS: &str = "breaker-system";
/// Labels of the agents' pods.
const AGENT_PODS: &str = "app.kubernetes.io/name=breaker,app.kubernetes.io/component=agent";
/// The agents' DaemonSet.
const DAEMON_SET: &str = "breaker-agent";

/// Runs a command. The exit code is 1 if `check` found a problem.
///
/// # Errors
/// The API server does not answer or refuses; there is no such breaker. The message is meant for the user.
pub async fn run(args: ClusterArgs) -> Result<ExitCode> {
    let command = args.command.unwrap_or_default();
    if let ClusterCommand::Complete { words } = &command {
        complete::run(&args.connection, words).await?;
        return Ok(ExitCode::SUCCESS);
    }
    let connection = Connection::new(&args.connection).await?;
    match command {
        ClusterCommand::Status(args) => status::run(&connection, &args).await?,
        ClusterCommand::Get(args) => status::get(&connection, &args).await?,
        ClusterCommand::Trip(args) => forced::trip(&connection, &args).await?,
        ClusterCommand::Reset { name } => forced::reset(&connection, &name).await?,
        ClusterCommand::Events(args) => events::run(&connection, &args).await?,
        ClusterCommand::Flows(args) => flows::run(&connection, &args).await?,
        ClusterCommand::Dashboard(how) => dashboard::run(&connection, &args.connection, &how).await?,
        ClusterCommand::Check(args) => return check::run(&connection, &args).await,
        ClusterCommand::Uninstall(args) => uninstall::run(&connection, &args).await?,
        ClusterCommand::Complete { .. } => {}
    }
    Ok(ExitCode::SUCCESS)
}
