//! The command line of the binary `breaker`: the agent, the commands that need the kernel, and the commands of
//! `breaker-cli`.

use std::{
    ffi::OsString,
    io::{self, IsTerminal as _},
    path::{Path, PathBuf},
    process::ExitCode,
};

use anyhow::{Context as _, Result, bail};
use breaker_api::{DEFAULT_PIN_PATH, preflight::Verdict};
use breaker_cli::{
    args::{Command as CliCommand, Global, TableOutput},
    run::{self, is_closed_pipe, out},
};
use clap::{CommandFactory as _, Parser, Subcommand};

use crate::{
    config::{self, Config, ConfigError},
    datapath::{cleanup, preflight},
    offline,
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
    Agent {
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
        /// Remove programs and maps when the agent ends.
        #[arg(long)]
        detach: bool,
        /// Only check the configuration, and exit.
        #[arg(long)]
        check: bool,
        /// Log level of the eBPF programs; without this option, they do not log.
        #[arg(long, value_name = "LEVEL")]
        program_log: Option<log::Level>,
    },
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

/// Exit code for invalid input, the same as clap's.
const BAD_INPUT: u8 = 2;

/// Parses the arguments and runs the command.
#[must_use]
pub fn main() -> ExitCode {
    let cli = Cli::parse_from(arguments(std::env::args_os()));
    if let Command::Agent { config, kubernetes, node_name, namespace, kubeconfig, detach, check, program_log } =
        cli.command
    {
        let identity = kubernetes.then_some((node_name, namespace, kubeconfig));
        let started = match identity {
            None => options_of_file(config.unwrap_or_default(), detach, program_log),
            Some((Some(node), namespace, kubeconfig)) if !node.is_empty() => {
                options_of_cluster(config, NodeIdentity { node, namespace, kubeconfig, room: 0 }, detach, program_log)
            }
            Some(_) => Err(vec!["--node-name is missing (in a pod, set NODE_NAME from spec.nodeName)".into()]),
        };
        return match started {
            Ok(options) if check => {
                let services = match &options.origin {
                    Origin::File { services, .. } => format!(", {} services", services.len()),
                    Origin::Kubernetes(_) => String::new(),
                };
                println!("the configuration is valid{services}");
                ExitCode::SUCCESS
            }
            Ok(options) => agent(options),
            Err(problems) => {
                for problem in problems {
                    eprintln!("{problem}");
                }
                ExitCode::from(BAD_INPUT)
            }
        };
    }
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build();
    let outcome = runtime.context("start").and_then(|runtime| runtime.block_on(execute(cli)));
    match outcome {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) if is_closed_pipe(&error) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("breaker: {error:#}");
            ExitCode::FAILURE
        }
    }
}

/// Returns the arguments for clap. kubectl runs the binary as a plugin under the name `kubectl-breaker`; under that
/// name, the command `cluster` is the default.
fn arguments(args: impl Iterator<Item = OsString>) -> Vec<OsString> {
    let args: Vec<OsString> = args.collect();
    let name = args.first().and_then(|arg| Path::new(arg).file_name()).unwrap_or_default();
    if name == "kubectl-breaker" { run::as_plugin(args.into_iter(), &Cli::command()) } else { args }
}

fn lines(errors: &[ConfigError]) -> Vec<String> {
    errors.iter().map(ToString::to_string).collect()
}

fn options_of_file(path: PathBuf, detach: bool, program_log: Option<log::Level>) -> Result<Options, Vec<String>> {
    let text = config::read(&path).map_err(|errors| lines(&errors))?;
    let Config { agent, services } = config::parse(&path, &text).map_err(|errors| lines(&errors))?;
    Ok(Options { agent, origin: Origin::File { path, text, services }, detach, program_log })
}

fn options_of_cluster(
    config: Option<PathBuf>,
    identity: NodeIdentity,
    detach: bool,
    program_log: Option<log::Level>,
) -> Result<Options, Vec<String>> {
    let (path, text) = match config {
        Some(path) => (path.clone(), config::read(&path).map_err(|errors| lines(&errors))?),
        None => (PathBuf::new(), String::new()),
    };
    let agent = config::parse_agent(&path, &text).map_err(|errors| lines(&errors))?;
    Ok(Options { agent, origin: Origin::Kubernetes(identity), detach, program_log })
}

fn agent(options: Options) -> ExitCode {
    start_log();
    if let Err(error) = preflight::require(&options.agent.pin_path) {
        eprintln!("breaker: {error:#}");
        return ExitCode::FAILURE;
    }
    let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build();
    match runtime.context("start").and_then(|runtime| runtime.block_on(start::run(options))) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("breaker: {error:#}");
            ExitCode::FAILURE
        }
    }
}

/// The default log filter. The netlink crate warns about every attribute that a newer kernel has made longer, and
/// kube's client about every failed attempt. The agent itself reports, once, if an attempt's failure has
/// consequences.
const DEFAULT_LOG: &str = "info,netlink_packet_route=error,kube_client=off";

/// Starts the log on standard error. The level comes from `BREAKER_LOG` (default: info).
fn start_log() {
    use tracing_subscriber::EnvFilter;
    let filter = EnvFilter::try_from_env("BREAKER_LOG").unwrap_or_else(|_| EnvFilter::new(DEFAULT_LOG));
    let ansi = io::stderr().is_terminal() && std::env::var_os("NO_COLOR").is_none();
    tracing_subscriber::fmt().with_env_filter(filter).with_writer(io::stderr).with_ansi(ansi).with_target(false).init();
    // The messages of the eBPF programs come through the `log` crate.
    let _ = tracing_log::LogTracer::init();
}

async fn execute(cli: Cli) -> Result<()> {
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
            Ok(())
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
            Ok(())
        }
        // `main` handles this command.
        Command::Agent { .. } => Ok(()),
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
    fn the_plugin_of_kubectl_shows_the_cluster() {
        let args = |words: &[&str]| arguments(words.iter().map(OsString::from));
        assert_eq!(
            args(&["/usr/bin/kubectl-breaker", "-n", "lab"]),
            ["/usr/bin/kubectl-breaker", "cluster", "-n", "lab"]
        );
        assert_eq!(args(&["kubectl-breaker"]), ["kubectl-breaker", "cluster"]);
        assert_eq!(args(&["kubectl-breaker", "status"]), ["kubectl-breaker", "status"]);
        assert_eq!(args(&["breaker", "-n"]), ["breaker", "-n"]);
    }
}
