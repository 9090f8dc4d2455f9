//! Executes a command.

use std::{io, path::Path, process::ExitCode};

use anyhow::{Context as _, Result, anyhow};
use breaker_api::{BreakerState, commands::TripBody, crd, events::EventLine, preflight::Finding, status::AgentStatus};

pub use crate::output::{complain, out};
use crate::{
    args::{Command, EventOutput},
    client::Client,
    cluster,
    output::{TableOutput, print, print_as},
    show,
    table::Paint,
    visible::visible,
};

/// What a command needs from the binary that it is part of.
pub struct Context<'a> {
    /// The agent's control socket.
    pub socket: &'a Path,
    /// The binary's whole command line, for completions.
    pub command: &'a dyn Fn() -> clap::Command,
    /// Reads a status from the pinned maps, where no agent runs.
    pub offline: Option<&'a dyn Fn() -> Result<AgentStatus>>,
}

impl Context<'_> {
    /// Connects to the agent. If no agent listens, the error says how to start one.
    fn client(&self) -> Result<Client> {
        let socket = self.socket.display();
        Client::connect(self.socket)?.ok_or_else(|| {
            anyhow!(
                "no agent listens on {socket}; start one: breaker agent --config FILE (`breaker status` works without)"
            )
        })
    }

    async fn status(&self) -> Result<AgentStatus> {
        match (Client::connect(self.socket)?, self.offline) {
            (Some(client), Some(offline)) if !client.answers().await => {
                let mut status = offline()?;
                status.hung = true;
                Ok(status)
            }
            (Some(client), _) => client.status().await,
            (None, Some(offline)) => offline(),
            (None, None) => self.client()?.status().await,
        }
    }
}

/// Executes a command, with its output on standard output.
///
/// # Errors
/// The command failed; the message is meant for the user.
pub async fn run(command: Command, context: &Context<'_>) -> Result<ExitCode> {
    if let Command::Cluster(args) = command {
        return cluster::run(args).await;
    }
    run_on_node(command, context).await.map(|()| ExitCode::SUCCESS)
}

async fn run_on_node(command: Command, context: &Context<'_>) -> Result<()> {
    let paint = Paint::for_stdout();
    match command {
        Command::Status { output } => {
            let status = context.status().await?;
            print_as(output, &status, || Ok(show::status(&visible(&status)?, paint)))
        }
        Command::Get { name, output } => print(output, &context.client()?.get(&name).await?),
        Command::Trip { name, duration, reason } => {
            let body = TripBody { seconds: duration.map(|d| d.as_secs()), reason };
            let service = visible(&context.client()?.trip(&name, &body).await?)?;
            out(&show::services(std::slice::from_ref(&service), paint))
        }
        Command::Reset { name } => {
            let service = visible(&context.client()?.reset(&name).await?)?;
            out(&show::services(std::slice::from_ref(&service), paint))?;
            if service.state == BreakerState::Open {
                out("the primary is Down, so it stays open until its checks pass\n")?;
            }
            Ok(())
        }
        Command::Events { follow, output } => {
            context.client()?.events(follow, |event| event_line(output, &event, paint)).await
        }
        Command::Flows { name, limit, output } => {
            let flows = context.client()?.flows(&name, limit).await?;
            // The formats for programs list the flows alone.
            let established = match output {
                TableOutput::Table => context.client()?.get(&name).await.ok().and_then(|service| service.established),
                TableOutput::Json | TableOutput::Yaml => None,
            };
            print_as(output, &flows, || Ok(show::flows(&visible(&flows)?, established.as_ref(), paint)))
        }
        // `run` handles this command.
        Command::Cluster(_) => Ok(()),
        Command::Crds => out(&crd::definitions().context("write the definitions")?),
        Command::Handover { duration } => {
            context.client()?.handover(duration).await?;
            out(&format!("without an agent, the last decision stays in force for {} s\n", duration.as_secs()))
        }
        Command::Completions { shell } => {
            let mut script = Vec::new();
            let mut command = (context.command)();
            let name = command.get_name().to_owned();
            clap_complete::generate(shell, &mut command, name, &mut script);
            out(&String::from_utf8_lossy(&script))
        }
    }
}

/// Prints what `breaker preflight` found.
///
/// # Errors
/// A closed standard output.
pub fn print_findings(output: TableOutput, findings: &[Finding]) -> Result<()> {
    print_as(output, &findings, || Ok(show::preflight(findings, Paint::for_stdout())))
}

/// The exit code for the outcome of a command. An error is reported on standard error, in the name of `program`. If it
/// means only that the reader of the output has closed the pipe, as in `breaker events | head`, it is no error.
#[must_use]
pub fn exit_code(program: &str, outcome: Result<ExitCode>) -> ExitCode {
    match outcome {
        Err(error) if is_closed_pipe(&error) => ExitCode::SUCCESS,
        Err(error) => {
            complain(&format!("{program}: {error:#}"));
            ExitCode::FAILURE
        }
        Ok(code) => code,
    }
}

fn is_closed_pipe(error: &anyhow::Error) -> bool {
    error.downcast_ref::<io::Error>().is_some_and(|e| e.kind() == io::ErrorKind::BrokenPipe)
}

fn event_line(output: EventOutput, event: &EventLine, paint: Paint) -> Result<()> {
    let text = match output {
        EventOutput::Json => format!("{}\n", serde_json::to_string(event)?),
        EventOutput::Text => show::event(&visible(event)?, paint),
    };
    out(&text)
}
