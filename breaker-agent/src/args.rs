//! The command line of the binary `breaker`: the agent, the commands that need the kernel, and the commands of
//! `breaker-cli`.

use std::{
    ffi::OsString,
    net::SocketAddr,
    path::{Path, PathBuf},
    process::ExitCode,
};

use anyhow::{Context as _, Result, bail};
use breaker_api::{DEFAULT_PIN_PATH, preflight::Verdict};
use breaker_cli::{
    args::{Command as CliCommand, Global, TableOutput},
    run::{self, complain, exit_code, out},
};
use clap::{ArgMatches, Args, CommandFactory as _, FromArgMatches as _, Parser, Subcommand, parser::ValueSource};

use crate::{
    config::{self, AgentConfig, Config, ConfigError, FrontendRules},
    datapath::{cleanup, preflight},
    logging::{Incidents, Log},
    offline,
    signals::Signals,
    source::kube::NodeIdentity,
    start::{self, Options, Origin},
};

/// Keeps a Service answering when its primary fails: a circuit breaker in the kernel, without a proxy in the path.
#[derive(Debug, Parser)]
#[command(name = "breaker", version, about, after_help = EXAMPLES)]
struct Cli {
    #[command(flatten)]
    global: Global,
    /// Directory where maps and links are pinned, for commands that work without an agent.
    #[arg(long, global = true, env = "BREAKER_PIN_PATH", default_value = DEFAULT_PIN_PATH, value_name = "PATH")]
    pin_path: PathBuf,
    #[command(subcommand)]
    command: Command,
}

const EXAMPLES: &str = "\
Examples:
  breaker agent --config lab.yaml            run the agent of this node (root)
  breaker status                             show all services
  breaker get dummy -o yaml                  show everything about one service
  breaker trip dummy --for 10m --reason \"database migration\"
  breaker reset dummy                        remove the override
  breaker events --follow                    show events as they happen
  breaker cleanup                            remove all programs and maps of breaker";

#[derive(Debug, Subcommand)]
enum Command {
    /// Run the agent of this node.
    #[command(
        display_order = 1,
        after_help = "\
The file is read again on SIGHUP and when it changes. A file with errors is logged and changes nothing.
SIGTERM leaves the datapath in place for the next agent; established connections are not interrupted."
    )]
    Agent(AgentArgs),
    #[command(flatten)]
    Cli(CliCommand),
    /// Check whether this machine can run the datapath. Every problem comes with a remedy.
    #[command(display_order = 8)]
    Preflight {
        /// Output format.
        #[arg(short, long, default_value = "table")]
        output: TableOutput,
    },
    /// Remove programs, links and maps of every version of breaker. Refuses while an agent runs.
    #[command(display_order = 12)]
    Cleanup {
        /// After the removal, wait for SIGTERM instead of exiting: for a DaemonSet that cleans every node.
        #[arg(long)]
        wait: bool,
    },
}

#[derive(Debug, Args)]
struct AgentArgs {
    /// Configuration file, see docs/CONFIGURATION.md. With --kubernetes, only its section `agent` is used.
    #[arg(long, value_name = "FILE", required_unless_present = "kubernetes")]
    config: Option<PathBuf>,
    /// Read the services from Kubernetes: CircuitBreakers and annotated Services.
    #[arg(long)]
    kubernetes: bool,
    /// Name of this Node.
    #[arg(long, env = "NODE_NAME", requires = "kubernetes", value_name = "NAME")]
    node_name: Option<String>,
    /// Namespace of the agents. A Lease in it says which agent writes the statuses.
    #[arg(long, env = "POD_NAMESPACE", default_value = "breaker-system", value_name = "NAME")]
    namespace: String,
    /// Kubeconfig for the API server; default: KUBECONFIG, ~/.kube/config or the pod's service account.
    #[arg(long, requires = "kubernetes", value_name = "FILE")]
    kubeconfig: Option<PathBuf>,
    /// Serve metrics at this address, in addition to agent.listen; takes precedence over agent.metricsListen. Allowed:
    /// ADDRESS:PORT; an IPv6 address needs no brackets.
    #[arg(long, value_name = "ADDRESS:PORT", value_parser = socket_address)]
    metrics_listen: Option<SocketAddr>,
    /// Remove programs and maps when the agent ends.
    #[arg(long)]
    detach: bool,
    /// Only check the configuration, and exit.
    #[arg(long)]
    check: bool,
    /// Log level of the eBPF programs; without this option, they do not log.
    #[arg(long, value_name = "LEVEL")]
    program_log: Option<log::Level>,
}

/// Exit code for invalid input, the same as clap's.
const BAD_INPUT: u8 = 2;

/// Parses the arguments and runs the command.
#[must_use]
pub fn main() -> ExitCode {
    if is_plugin(std::env::args_os().next().as_ref()) {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build();
        return match runtime {
            Ok(runtime) => runtime.block_on(breaker_cli::plugin(std::env::args_os())),
            Err(error) => exit_code("kubectl breaker", Err(error).context("start")),
        };
    }
    let matches = Cli::command().get_matches();
    let cli = Cli::from_arg_matches(&matches).unwrap_or_else(|error| error.exit());
    if let Command::Agent(args) = cli.command {
        let unused = unused_options(&matches);
        return match args.check {
            _ if !unused.is_empty() => refuse(&unused),
            true => check(args),
            false => agent(args),
        };
    }
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build();
    let outcome = runtime.context("start").and_then(|runtime| runtime.block_on(execute(cli)));
    exit_code("breaker", outcome)
}

/// Returns a problem for each option on the command line that the agent takes from its configuration instead.
fn unused_options(matches: &ArgMatches) -> Vec<String> {
    let given = |id| {
        let all = [Some(matches), matches.subcommand().map(|(_, of_agent)| of_agent)];
        all.into_iter().flatten().any(|matches| matches.value_source(id) == Some(ValueSource::CommandLine))
    };
    [("socket", "--socket", "agent.socket"), ("pin_path", "--pin-path", "agent.pinPath")]
        .into_iter()
        .filter(|(id, ..)| given(id))
        .map(|(_, option, field)| format!("{option} does not apply to the agent; set {field} in its configuration"))
        .collect()
}

/// Checks the configuration. Reports every problem.
fn check(args: AgentArgs) -> ExitCode {
    match options(args) {
        Ok(Options { origin, .. }) => {
            let services = match &origin {
                Origin::File { services, .. } => format!(", {} services", services.len()),
                Origin::Kubernetes(_) => String::new(),
            };
            exit_code("breaker", out(&format!("the configuration is valid{services}\n")).map(|()| ExitCode::SUCCESS))
        }
        Err(problems) => refuse(&problems),
    }
}

/// Runs the agent. It listens for signals first, because the rest of the start may take a while.
fn agent(args: AgentArgs) -> ExitCode {
    let runtime = match tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build() {
        Ok(runtime) => runtime,
        Err(error) => return exit_code("breaker", Err(error).context("start")),
    };
    runtime.block_on(async {
        let signals = match Signals::listen() {
            Ok(signals) => signals,
            Err(error) => return exit_code("breaker", Err(error).context("listen for signals")),
        };
        let mut options = match options(args) {
            Ok(options) => options,
            Err(problems) => return refuse(&problems),
        };
        let log = Log::start();
        options.incidents = log.incidents();
        let outcome = match preflight::require(&options.agent.pin_path) {
            Ok(()) => start::run(options, signals).await,
            error => error,
        };
        // The last lines of the log come before the error.
        drop(log);
        exit_code("breaker", outcome.map(|()| ExitCode::SUCCESS))
    })
}

fn refuse(problems: &[String]) -> ExitCode {
    for problem in problems {
        complain(problem);
    }
    ExitCode::from(BAD_INPUT)
}

fn options(args: AgentArgs) -> Result<Options, Vec<String>> {
    let AgentArgs {
        config,
        kubernetes,
        node_name,
        namespace,
        kubeconfig,
        metrics_listen,
        detach,
        program_log,
        check: _,
    } = args;
    let (mut agent, origin) = match node_name {
        _ if !kubernetes => of_file(config.unwrap_or_default())?,
        Some(node) if !node.is_empty() => {
            let frontends = FrontendRules::default();
            of_cluster(config, NodeIdentity { node, namespace, kubeconfig, room: 0, frontends })?
        }
        _ => return Err(vec!["--node-name is missing (in a pod, set NODE_NAME from spec.nodeName)".into()]),
    };
    agent.metrics_listen = metrics_listen.or(agent.metrics_listen);
    Ok(Options { agent, origin, detach, incidents: Incidents::default(), program_log })
}

/// Parses an address and a port. Kubernetes passes the node's address without brackets, also if it is IPv6.
fn socket_address(text: &str) -> Result<SocketAddr, String> {
    let parsed = text.parse().ok().or_else(|| {
        let (address, port) = text.rsplit_once(':')?;
        Some(SocketAddr::new(address.parse().ok()?, port.parse().ok()?))
    });
    parsed.ok_or_else(|| "allowed: an address and port like 192.0.2.1:9811 or [2001:db8::1]:9811".into())
}

/// Whether kubectl runs the binary as its plugin, under the name `kubectl-breaker`.
fn is_plugin(name: Option<&OsString>) -> bool {
    name.and_then(|name| Path::new(name).file_stem()).is_some_and(|name| name == "kubectl-breaker")
}

fn lines(errors: &[ConfigError]) -> Vec<String> {
    errors.iter().map(ToString::to_string).collect()
}

fn of_file(path: PathBuf) -> Result<(AgentConfig, Origin), Vec<String>> {
    let text = config::read(&path).map_err(|errors| lines(&errors))?;
    let Config { agent, services } = config::parse(&path, &text).map_err(|errors| lines(&errors))?;
    Ok((agent, Origin::File { path, text, services }))
}

fn of_cluster(config: Option<PathBuf>, mut identity: NodeIdentity) -> Result<(AgentConfig, Origin), Vec<String>> {
    let (path, text) = match config {
        Some(path) => (path.clone(), config::read(&path).map_err(|errors| lines(&errors))?),
        None => (PathBuf::new(), String::new()),
    };
    let agent = config::parse_agent(&path, &text).map_err(|errors| lines(&errors))?;
    identity.frontends.clone_from(&agent.frontends);
    Ok((agent, Origin::Kubernetes(identity)))
}

async fn execute(cli: Cli) -> Result<ExitCode> {
    let (socket, pin_path) = (&cli.global.socket, &cli.pin_path);
    match cli.command {
        Command::Cli(command) => {
            let offline = || offline::status(pin_path, socket);
            let context = run::Context { socket, command: &Cli::command, offline: Some(&offline) };
            run::run(command, &context).await
        }
        Command::Preflight { output } => {
            let findings = preflight::check_all(pin_path);
            run::print_findings(output, &findings)?;
            if findings.iter().any(|finding| finding.verdict == Verdict::Bad) {
                bail!("this machine cannot run the datapath as it is");
            }
            Ok(ExitCode::SUCCESS)
        }
        Command::Cleanup { wait } => {
            let cleaned = cleanup::cleanup(pin_path)?;
            out(&format!(
                "removed {} links and {} maps below {}{}\n",
                cleaned.links,
                cleaned.maps,
                pin_path.display(),
                if cleaned.masquerade_rule { ", and the rule for the masquerade mark" } else { "" }
            ))?;
            if wait {
                let mut terminate = tokio::signal::unix::signal(tokio::signal::unix::SignalKind::terminate())?;
                terminate.recv().await;
            }
            Ok(ExitCode::SUCCESS)
        }
        // `main` handles this command.
        Command::Agent(_) => Ok(ExitCode::SUCCESS),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_command_line_holds_together() {
        Cli::command().debug_assert();
    }

    #[test]
    fn an_ipv6_address_needs_no_brackets() {
        for text in ["[2001:db8::1]:9811", "2001:db8::1:9811"] {
            assert_eq!(socket_address(text).map(|address| address.to_string()), Ok("[2001:db8::1]:9811".into()));
        }
        assert_eq!(socket_address("192.0.2.1:9811"), Ok(([192, 0, 2, 1], 9811).into()));
        assert!(socket_address("192.0.2.1").is_err() && socket_address("localhost:1").is_err());
    }

    #[test]
    fn kubectl_runs_the_binary_as_its_plugin() {
        let is = |name: &str| is_plugin(Some(&OsString::from(name)));
        assert!(is("/usr/bin/kubectl-breaker") && is("kubectl-breaker"));
        assert!(!is("/usr/bin/breaker") && !is_plugin(None));
    }
}
