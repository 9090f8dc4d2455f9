//! The command line of `kubectl breaker`.

use std::{path::PathBuf, time::Duration};

use clap::{Args, Subcommand, ValueEnum};

use crate::{
    duration,
    output::{Output, TableOutput},
};

/// Options and command.
#[derive(Clone, Debug, Args)]
#[command(
    args_conflicts_with_subcommands = false,
    after_help = "\
Examples:
  kubectl breaker                          show the breakers of the current namespace
  kubectl breaker -A -w                    show those of all namespaces, and every change
  kubectl breaker status -o wide           show each node's view
  kubectl breaker trip web --for 10m --reason \"database migration\"
  kubectl breaker reset web
  kubectl breaker events web -w
  kubectl breaker dashboard -A             show a live page in the browser
  kubectl breaker check                    find what is wrong with the installation

Exit codes: 0 success; 1 an error, or `check` found a problem; 2 invalid arguments."
)]
pub struct ClusterArgs {
    /// How the API server is reached.
    #[command(flatten)]
    pub connection: ConnectionArgs,
    /// What to do; without a command: `status`.
    #[command(subcommand)]
    pub command: Option<ClusterCommand>,
}

/// How the API server is reached, as whom, and which namespace is meant: kubectl's options.
#[derive(Clone, Debug, Default, Args)]
pub struct ConnectionArgs {
    /// Kubeconfig file; KUBECONFIG, ~/.kube/config or the pod's service account if not given.
    #[arg(long, global = true, value_name = "FILE")]
    pub kubeconfig: Option<PathBuf>,
    /// Context of the kubeconfig; its current one if not given.
    #[arg(long, global = true, value_name = "NAME")]
    pub context: Option<String>,
    /// Namespace; that of the context if not given.
    #[arg(short, long, global = true, value_name = "NAME")]
    pub namespace: Option<String>,
    /// All namespaces.
    #[arg(short = 'A', long, global = true, conflicts_with = "namespace")]
    pub all_namespaces: bool,
    /// User to impersonate.
    #[arg(long = "as", global = true, value_name = "USER")]
    pub user: Option<String>,
    /// Group to impersonate; may be given several times.
    #[arg(long = "as-group", global = true, value_name = "GROUP", requires = "user")]
    pub groups: Vec<String>,
}

/// A command.
#[derive(Clone, Debug, Subcommand)]
pub enum ClusterCommand {
    /// Show a line for each breaker, and below a line for each problem.
    Status(StatusArgs),
    /// Show everything about one breaker, with every node's view.
    Get(GetArgs),
    /// Force a breaker open on all nodes: new connections go to the backup until `reset`. Sets spec.override, or
    /// annotations if a manifest may have it.
    #[command(after_help = "Example: kubectl breaker trip web --for 10m --reason \"database migration\"")]
    Trip(TripArgs),
    /// End an override: the checks decide again. Sets spec.override to Auto, and removes the annotations of `trip`.
    Reset {
        /// The CircuitBreaker's name.
        name: String,
    },
    /// Show Events about breakers, oldest first.
    Events(EventsArgs),
    /// Show the connections of a breaker for which the agents pinned a decision. Needs the right to exec into the agents'
    /// pods.
    Flows(FlowsArgs),
    /// Serve the live page for the cluster on a loopback address, with your own rights, until interrupted.
    #[command(after_help = "Example: kubectl breaker dashboard -A")]
    Dashboard(DashboardArgs),
    /// Check the installation: a line for each finding, with what to do.
    Check(CheckArgs),
    /// Stop the agents, remove what they left in every node's kernel, and say so in every status. CircuitBreakers and
    /// their definition stay.
    Uninstall(UninstallArgs),
    /// Complete a command line, for kubectl: see `completions` in docs/KUBERNETES.md.
    #[command(name = "__complete", hide = true)]
    Complete {
        /// The words so far; the last one is being completed.
        #[arg(trailing_var_arg = true, allow_hyphen_values = true)]
        words: Vec<String>,
    },
}

impl Default for ClusterCommand {
    fn default() -> Self {
        Self::Status(StatusArgs::default())
    }
}

/// Arguments of `status`.
#[derive(Clone, Debug, Default, Args)]
pub struct StatusArgs {
    /// Names of CircuitBreakers; all if none is given.
    pub names: Vec<String>,
    /// Output format: a table, a table with each node's view, the complete objects, or names.
    #[arg(short, long, default_value = "table")]
    pub output: StatusOutput,
    /// Do not print headings.
    #[arg(long)]
    pub no_headers: bool,
    /// Go on with a line for each change until interrupted. Allowed with the formats table and name.
    #[arg(short, long)]
    pub watch: bool,
}

/// Format of `status`.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, ValueEnum)]
#[allow(missing_docs, reason = "a documented value is a line of its own in --help")]
pub enum StatusOutput {
    #[default]
    Table,
    Wide,
    Json,
    Yaml,
    Name,
}

/// Arguments of `get`.
#[derive(Clone, Debug, Args)]
pub struct GetArgs {
    /// The CircuitBreaker's name.
    pub name: String,
    /// Output format.
    #[arg(short, long, default_value = "yaml")]
    pub output: Output,
}

/// Arguments of `trip`.
#[derive(Clone, Debug, Args)]
pub struct TripArgs {
    /// The CircuitBreaker's name.
    pub name: String,
    /// How long the breaker stays forced open (30s, 10m, 1h30m); until `reset` if not given.
    #[arg(long = "for", value_name = "TIME", value_parser = duration::parse)]
    pub duration: Option<Duration>,
    /// Why; appears in the status, the Events and the dashboard.
    #[arg(long)]
    pub reason: Option<String>,
    /// Change nothing: only ask the API server whether it would accept the change.
    #[arg(long)]
    pub dry_run: bool,
}

/// Arguments of `events`.
#[derive(Clone, Debug, Args)]
pub struct EventsArgs {
    /// The CircuitBreaker's or Service's name; all if not given.
    pub name: Option<String>,
    /// Go on with new Events until interrupted.
    #[arg(short, long)]
    pub watch: bool,
    /// Output format: a table, or the complete list as JSON or YAML.
    #[arg(short, long, default_value = "table")]
    pub output: TableOutput,
}

/// Arguments of `flows`.
#[derive(Clone, Debug, Args)]
pub struct FlowsArgs {
    /// The CircuitBreaker's name.
    pub name: String,
    /// Ask the agent of this node only.
    #[arg(long, value_name = "NAME")]
    pub node: Option<String>,
    /// Largest number of connections to show for each node.
    #[arg(long, default_value_t = 50)]
    pub limit: usize,
    /// Output format: a table, or the complete list as JSON or YAML.
    #[arg(short, long, default_value = "table")]
    pub output: TableOutput,
}

/// Arguments of `dashboard`.
#[derive(Clone, Debug, Args)]
pub struct DashboardArgs {
    /// Port to listen on; 0 = any that is free.
    #[arg(long, value_name = "PORT", default_value_t = 0)]
    pub port: u16,
}

/// Arguments of `uninstall`.
#[derive(Clone, Debug, Args)]
pub struct UninstallArgs {
    /// Image that cleans the nodes; that of the agents if not given.
    #[arg(long, value_name = "REFERENCE")]
    pub image: Option<String>,
    /// How long to wait for the nodes.
    #[arg(long, value_name = "TIME", value_parser = duration::parse, default_value = "2m")]
    pub timeout: Duration,
}

/// Arguments of `check`.
#[derive(Clone, Debug, Args)]
pub struct CheckArgs {
    /// Check only what is needed before an installation.
    #[arg(long)]
    pub pre: bool,
    /// Check again until no problem is left, for at most this time.
    #[arg(long, value_name = "TIME", value_parser = duration::parse)]
    pub wait: Option<Duration>,
    /// Output format: a table, or the complete list as JSON or YAML.
    #[arg(short, long, default_value = "table")]
    pub output: TableOutput,
}
