//! The command line: one binary for the agent and for looking at it.

mod cluster;
mod offline;
mod show;

use std::{
    ffi::OsString,
    io::{self, IsTerminal as _, Write as _},
    path::{Path, PathBuf},
    process::ExitCode,
    time::Duration,
};

use anyhow::{Context as _, Result, anyhow, bail};
use clap::{CommandFactory as _, Parser, Subcommand, ValueEnum};
use clap_complete::Shell;
use serde::Serialize;

use crate::{
    agent::{
        run::{self, Options, Origin},
        status::EventLine,
    },
    config::{self, Config, ConfigError, DEFAULT_PIN_PATH, DEFAULT_SOCKET},
    control::{TripBody, client::Client},
    datapath::kernel::PinDir,
    preflight::{self, Verdict},
    source::kube::{self, Place},
};
use show::Paint;

/// Keeps a Service answering when its primary fails: circuit breaking in the kernel, no proxy in the path.
#[derive(Debug, Parser)]
#[command(name = "breaker", version, about, after_help = EXAMPLES)]
struct Cli {
    /// Control socket of the agent.
    #[arg(long, global = true, env = "BREAKER_SOCKET", default_value = DEFAULT_SOCKET, value_name = "PATH")]
    socket: PathBuf,
    /// Where maps and links are pinned, for when no agent runs.
    #[arg(long, global = true, env = "BREAKER_PIN_PATH", default_value = DEFAULT_PIN_PATH, value_name = "PATH")]
    pin_path: PathBuf,
    #[command(subcommand)]
    command: Command,
}

const EXAMPLES: &str = "\
Examples:
  breaker agent --config lab.yaml            run the agent of this node (root)
  breaker status                             what people look at all day
  breaker get dummy -o yaml                  everything about one service
  breaker trip dummy --for 10m --reason \"database migration\"
  breaker reset dummy                        back to what is measured
  breaker events --follow                    what happens, as it happens
  breaker cleanup                            take everything of ours out of the kernel";

#[derive(Debug, Subcommand)]
enum Command {
    /// Run the agent of this node.
    #[command(after_help = "\
The file is read again on SIGHUP and when it changes; a bad one changes nothing and is logged.
SIGTERM leaves the datapath in place for the next agent; established connections notice nothing.")]
    Agent {
        /// Which service is protected by which: see docs/CONFIGURATION.md. With --kubernetes, its section `agent` only.
        #[arg(long, value_name = "FILE", required_unless_present = "kubernetes")]
        config: Option<PathBuf>,
        /// Take services from Kubernetes: CircuitBreakers and annotated Services.
        #[arg(long)]
        kubernetes: bool,
        /// The Node that this is.
        #[arg(long, env = "NODE_NAME", requires = "kubernetes", value_name = "NAME")]
        node_name: Option<String>,
        /// The agents' own namespace: which of them writes the statuses is kept in a Lease there.
        #[arg(long, env = "POD_NAMESPACE", default_value = "breaker-system", value_name = "NAME")]
        namespace: String,
        /// How to reach the API server; the pod's service account without.
        #[arg(long, requires = "kubernetes", value_name = "FILE")]
        kubeconfig: Option<PathBuf>,
        /// At the end, take programs and maps away.
        #[arg(long)]
        detach: bool,
        /// Only check the file.
        #[arg(long)]
        check: bool,
        /// Let the programs log too, at this level; without, the log is taken out of them.
        #[arg(long, value_name = "LEVEL")]
        program_log: Option<log::Level>,
    },
    /// Every service: its state, since when, why, who answers. Works without an agent too.
    Status {
        /// As a table for people, or whole.
        #[arg(short, long, default_value = "table")]
        output: TableOutput,
    },
    /// One service, whole.
    Get {
        /// The service's name.
        name: String,
        /// The format.
        #[arg(short, long, default_value = "yaml")]
        output: Output,
    },
    /// Force a service open: its new connections go to the backup until `reset`.
    #[command(after_help = "Example: breaker trip dummy --for 10m --reason \"database migration\"")]
    Trip {
        /// The service's name.
        name: String,
        /// For how long (30s, 10m, 2h); without, until `reset`.
        #[arg(long = "for", value_name = "TIME", value_parser = parse_time)]
        duration: Option<Duration>,
        /// Why: shown to everybody who looks.
        #[arg(long)]
        reason: Option<String>,
    },
    /// Give a service back to the measurement: no override, no backoff, closed unless the primary is Down.
    Reset {
        /// The service's name.
        name: String,
    },
    /// What happened, and with --follow what happens.
    Events {
        /// Go on until interrupted.
        #[arg(short, long)]
        follow: bool,
        /// As lines for people, or one JSON object a line.
        #[arg(short, long, default_value = "text")]
        output: EventOutput,
    },
    /// A service's connections that were decided by us, youngest first.
    Flows {
        /// The service's name.
        name: String,
        /// How many at the most.
        #[arg(long, default_value_t = 50)]
        limit: usize,
        /// As a table for people, or whole.
        #[arg(short, long, default_value = "table")]
        output: TableOutput,
    },
    /// Can this machine run the datapath? Every finding says what to do.
    Preflight {
        /// As a table for people, or whole.
        #[arg(short, long, default_value = "table")]
        output: TableOutput,
    },
    /// Every CircuitBreaker on every node, over the Kubernetes API. As `kubectl breaker` where the binary is on the PATH as
    /// kubectl-breaker.
    Cluster {
        /// How to reach the API server; KUBECONFIG, ~/.kube/config or the pod's service account without.
        #[arg(long, value_name = "FILE")]
        kubeconfig: Option<PathBuf>,
        /// Only this namespace.
        #[arg(short, long, value_name = "NAME")]
        namespace: Option<String>,
        /// As a table for people, or whole.
        #[arg(short, long, default_value = "table")]
        output: TableOutput,
    },
    /// Print the definitions of the Kubernetes types, for kubectl apply.
    Crds,
    /// Tell the agent that it is about to be replaced: its last word holds for longer than the usual lease.
    #[command(after_help = "Example, before an upgrade that pulls an image: breaker handover --for 10m")]
    Handover {
        /// For how long (30s, 10m, 2h).
        #[arg(long = "for", value_name = "TIME", value_parser = parse_time, default_value = "10m")]
        duration: Duration,
    },
    /// Take programs, links and maps of every version away. Refuses while an agent runs.
    Cleanup {
        /// Then stay, doing nothing, until told to end: for a DaemonSet that cleans every node.
        #[arg(long)]
        wait: bool,
    },
    /// Print a shell's completions.
    #[command(after_help = "Example: breaker completions bash > /etc/bash_completion.d/breaker")]
    Completions {
        /// The shell.
        shell: Shell,
    },
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
enum TableOutput {
    Table,
    Json,
    Yaml,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
enum Output {
    Json,
    Yaml,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
enum EventOutput {
    Text,
    Json,
}

/// Exit code for input that is wrong (clap's own is the same).
const BAD_INPUT: u8 = 2;

/// Runs the command line.
#[must_use]
pub fn main() -> ExitCode {
    let cli = Cli::parse_from(as_plugin(std::env::args_os()));
    if let Command::Agent { config, kubernetes, node_name, namespace, kubeconfig, detach, check, program_log } =
        cli.command
    {
        let place = kubernetes.then_some((node_name, namespace, kubeconfig));
        let started = match place {
            None => options_of_file(config.unwrap_or_default(), detach, program_log),
            Some((Some(node), namespace, kubeconfig)) if !node.is_empty() => {
                options_of_cluster(config, Place { node, namespace, kubeconfig, room: 0 }, detach, program_log)
            }
            Some(_) => Err(vec!["--node-name is missing (in a pod: NODE_NAME from fieldRef spec.nodeName)".into()]),
        };
        return match started {
            Ok(options) if check => {
                let services = match &options.origin {
                    Origin::File { services, .. } => format!(", {} services", services.len()),
                    Origin::Kubernetes(_) => String::new(),
                };
                println!("good{services}");
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

/// `breaker events | head` is no error.
fn is_closed_pipe(error: &anyhow::Error) -> bool {
    error.downcast_ref::<io::Error>().is_some_and(|e| e.kind() == io::ErrorKind::BrokenPipe)
}

/// Called as `kubectl-breaker` (kubectl runs plugins by that name), it shows the cluster.
fn as_plugin(args: impl Iterator<Item = OsString>) -> Vec<OsString> {
    let mut args: Vec<OsString> = args.collect();
    let name = args.first().map(|arg| Path::new(arg).file_name().unwrap_or_default().to_owned());
    let own =
        |arg: &OsString| Cli::command().get_subcommands().any(|command| *arg == command.get_name()) || arg == "help";
    if name.is_some_and(|name| name == "kubectl-breaker") && !args.get(1).is_some_and(own) {
        args.insert(1, "cluster".into());
    }
    args
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
    place: Place,
    detach: bool,
    program_log: Option<log::Level>,
) -> Result<Options, Vec<String>> {
    let (path, text) = match config {
        Some(path) => (path.clone(), config::read(&path).map_err(|errors| lines(&errors))?),
        None => (PathBuf::new(), String::new()),
    };
    let agent = config::parse_agent(&path, &text).map_err(|errors| lines(&errors))?;
    Ok(Options { agent, origin: Origin::Kubernetes(place), detach, program_log })
}

fn agent(options: Options) -> ExitCode {
    start_log();
    if let Err(error) = preflight::require(&options.agent.pin_path) {
        eprintln!("breaker: {error:#}");
        return ExitCode::FAILURE;
    }
    let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build();
    match runtime.context("start").and_then(|runtime| runtime.block_on(run::run(options))) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("breaker: {error:#}");
            ExitCode::FAILURE
        }
    }
}

/// The netlink crate warns of every attribute that a newer kernel has made longer, and kube's client of every attempt that
/// fails; what comes of those we say ourselves, once.
const DEFAULT_LOG: &str = "info,netlink_packet_route=error,kube_client=off";

/// To standard error, level by `BREAKER_LOG` (info by default).
fn start_log() {
    use tracing_subscriber::EnvFilter;
    let filter = EnvFilter::try_from_env("BREAKER_LOG").unwrap_or_else(|_| EnvFilter::new(DEFAULT_LOG));
    let ansi = io::stderr().is_terminal() && std::env::var_os("NO_COLOR").is_none();
    tracing_subscriber::fmt().with_env_filter(filter).with_writer(io::stderr).with_ansi(ansi).with_target(false).init();
    // What the programs log comes through the log crate.
    let _ = tracing_log::LogTracer::init();
}

async fn execute(cli: Cli) -> Result<()> {
    let paint = Paint::for_stdout();
    let client = || -> Result<Client> {
        Client::connect(&cli.socket)?.ok_or_else(|| {
            anyhow!(
                "no agent listens on {}; start one: breaker agent --config FILE (`breaker status` works without)",
                cli.socket.display()
            )
        })
    };
    match &cli.command {
        Command::Status { output } => {
            let status = match Client::connect(&cli.socket)? {
                Some(client) => client.status().await?,
                None => offline::status(&cli.pin_path, &cli.socket)?,
            };
            match output {
                TableOutput::Table => out(&show::status(&status, paint)),
                TableOutput::Json => print(Output::Json, &status),
                TableOutput::Yaml => print(Output::Yaml, &status),
            }
        }
        Command::Get { name, output } => print(*output, &client()?.get(name).await?),
        Command::Trip { name, duration, reason } => {
            let body = TripBody { seconds: duration.map(|d| d.as_secs()), reason: reason.clone() };
            let service = client()?.trip(name, &body).await?;
            out(&show::services(std::slice::from_ref(&service), paint))
        }
        Command::Reset { name } => {
            let service = client()?.reset(name).await?;
            out(&show::services(std::slice::from_ref(&service), paint))?;
            if service.state == "Open" {
                out("the primary is Down, so it stays open until its checks pass\n")?;
            }
            Ok(())
        }
        Command::Events { follow, output } => {
            let output = *output;
            client()?.events(*follow, |event| event_line(output, &event, paint)).await
        }
        Command::Flows { name, limit, output } => {
            let flows = client()?.flows(name, *limit).await?;
            match output {
                TableOutput::Table => out(&show::flows(&flows)),
                TableOutput::Json => print(Output::Json, &flows),
                TableOutput::Yaml => print(Output::Yaml, &flows),
            }
        }
        Command::Preflight { output } => {
            let findings = preflight::look(&cli.pin_path);
            match output {
                TableOutput::Table => out(&show::preflight(&findings, paint))?,
                TableOutput::Json => print(Output::Json, &findings)?,
                TableOutput::Yaml => print(Output::Yaml, &findings)?,
            }
            if findings.iter().any(|finding| finding.verdict == Verdict::Bad) {
                bail!("this machine cannot run the datapath as it is");
            }
            Ok(())
        }
        Command::Cluster { kubeconfig, namespace, output } => {
            let client = kube::client(kubeconfig.as_deref()).await?;
            let mut overview = kube::overview::read(client).await?;
            if let Some(namespace) = namespace {
                overview.circuit_breakers.retain(|breaker| breaker.namespace == *namespace);
                for node in &mut overview.nodes {
                    node.report.services.retain(|service| service.namespace == *namespace);
                }
            }
            match output {
                TableOutput::Table => out(&cluster::overview(&overview, paint)),
                TableOutput::Json => print(Output::Json, &overview),
                TableOutput::Yaml => print(Output::Yaml, &overview),
            }
        }
        Command::Crds => out(&kube::api::definitions().context("write the definitions")?),
        Command::Handover { duration } => {
            client()?.handover(*duration).await?;
            out(&format!("without an agent, its last word holds for {} s\n", duration.as_secs()))
        }
        Command::Cleanup { wait } => {
            let cleaned = PinDir::cleanup(&cli.pin_path)?;
            out(&format!(
                "took away {} links and {} maps below {}{}\n",
                cleaned.links,
                cleaned.maps,
                cli.pin_path.display(),
                if cleaned.masquerade_rule { ", and the rule for the masquerade mark" } else { "" }
            ))?;
            if *wait {
                let mut terminate = tokio::signal::unix::signal(tokio::signal::unix::SignalKind::terminate())?;
                terminate.recv().await;
            }
            Ok(())
        }
        Command::Completions { shell } => {
            let mut script = Vec::new();
            clap_complete::generate(*shell, &mut Cli::command(), "breaker", &mut script);
            Ok(io::stdout().write_all(&script)?)
        }
        // Taken care of in `main`.
        Command::Agent { .. } => Ok(()),
    }
}

fn event_line(output: EventOutput, event: &EventLine, paint: Paint) -> Result<()> {
    let text = match output {
        EventOutput::Json => format!("{}\n", serde_json::to_string(event)?),
        EventOutput::Text => show::event(event, paint),
    };
    out(&text)?;
    Ok(io::stdout().flush()?)
}

fn out(text: &str) -> Result<()> {
    Ok(io::stdout().write_all(text.as_bytes())?)
}

fn print(output: Output, value: &impl Serialize) -> Result<()> {
    match output {
        Output::Json => out(&format!("{}\n", serde_json::to_string_pretty(value)?)),
        Output::Yaml => out(&serde_saphyr::to_string(value).context("write YAML")?),
    }
}

/// `90`, `90s`, `10m`, `2h`, `1d`.
fn parse_time(text: &str) -> Result<Duration, String> {
    let allowed = || format!("{text:?} is not allowed; allowed: a number of seconds, or like 30s, 10m, 2h, 1d");
    let (number, unit) = text.split_at(text.find(|c: char| !c.is_ascii_digit()).unwrap_or(text.len()));
    let factor = match unit {
        "" | "s" => 1,
        "m" => 60,
        "h" => 3600,
        "d" => 86_400,
        _ => return Err(allowed()),
    };
    let number: u64 = number.parse().map_err(|_| allowed())?;
    let seconds = number.checked_mul(factor).filter(|s| (1..=31_536_000).contains(s)).ok_or_else(allowed)?;
    Ok(Duration::from_secs(seconds))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_command_line_holds_together() {
        Cli::command().debug_assert();
    }

    #[test]
    fn times_are_read_as_people_write_them() {
        assert_eq!(parse_time("10m"), Ok(Duration::from_secs(600)));
        assert_eq!(parse_time("90"), Ok(Duration::from_secs(90)));
        for bad in ["", "m", "0s", "1w", "-1s", "99999999999999999999s"] {
            assert!(parse_time(bad).is_err(), "{bad}");
        }
    }
}
