//! The agent under test: the real binary in a node's network namespace.

use breaker_api::events::EventType;
use breaker_api::status::Health;
use breaker_common::BreakerState;
use std::{
    fs::{self, File},
    path::{Path, PathBuf},
    process::{Child, Command, Output, Stdio},
    time::Duration,
};

use anyhow::{Context as _, Result, bail};
use breaker_api::{
    events::EventLine,
    status::{AgentStatus, ServiceStatus},
};
use breaker_cli::client::Client;
use rustix::process::{Pid, Signal, kill_process};

use super::{binary, netns::NetNs, wait_for};

/// An agent and its files. The agent may be running or not; dropping it kills the process.
#[derive(Debug)]
pub struct Agent {
    ns: NetNs,
    dir: PathBuf,
    pin_path: PathBuf,
    process: Option<Child>,
    /// A command that runs the agent, with its arguments; empty = none.
    launcher: Vec<String>,
    /// Where the next start writes the log, instead of to the file.
    log: Option<Stdio>,
}

impl Agent {
    /// Describes an agent without starting it. Its configuration, control socket and log go into `dir`.
    #[must_use]
    pub fn new(ns: &NetNs, dir: &Path, pin_path: &Path) -> Self {
        Self {
            ns: ns.clone(),
            dir: dir.to_owned(),
            pin_path: pin_path.to_owned(),
            process: None,
            launcher: Vec::new(),
            log: None,
        }
    }

    /// Lets a command run the agent, like `prlimit --nofile=128`.
    pub fn launch_by(&mut self, command: &[&str]) {
        self.launcher = command.iter().map(|word| (*word).to_owned()).collect();
    }

    /// Sends the log of the next start elsewhere than to the file.
    pub fn log_to(&mut self, log: Stdio) {
        self.log = Some(log);
    }

    /// Path of the control socket.
    #[must_use]
    pub fn socket(&self) -> PathBuf {
        self.dir.join("breaker.sock")
    }

    /// Path of the configuration file.
    #[must_use]
    pub fn config(&self) -> PathBuf {
        self.dir.join("lab.yaml")
    }

    /// Directory of one kind of pins: `maps` or `links`.
    #[must_use]
    pub fn pinned(&self, kind: &str) -> PathBuf {
        self.pin_path().join(format!("v{}", breaker_common::ABI_VERSION)).join(kind)
    }

    /// Directory that contains all pins.
    #[must_use]
    pub fn pin_path(&self) -> &Path {
        &self.pin_path
    }

    /// Content of the log so far; empty if there is none.
    #[must_use]
    pub fn log(&self) -> String {
        fs::read_to_string(self.dir.join("agent.log")).unwrap_or_default()
    }

    /// Writes the configuration file: a section `agent` with the paths and the lines of `agent`, then `services`. The
    /// file is replaced by a rename, so that the agent never reads a part of it.
    ///
    /// # Errors
    /// Fails if the file cannot be written.
    pub fn write_config(&self, agent: &str, services: &str) -> Result<()> {
        let text = format!(
            "agent:\n  pinPath: {}\n  socket: {}\n{agent}{services}",
            self.pin_path.display(),
            self.socket().display()
        );
        let temporary = self.dir.join(".lab.yaml.new");
        fs::write(&temporary, text).context("write the configuration")?;
        fs::rename(&temporary, self.config()).context("replace the configuration")
    }

    /// Starts the agent and waits until it answers on its socket and the interfaces have its programs.
    ///
    /// # Errors
    /// Fails if the agent exits or does not answer within 120 s; the error contains its log.
    pub fn start(&mut self) -> Result<()> {
        self.start_with(&[])
    }

    /// Like [`Agent::start`], with more arguments for the agent.
    ///
    /// # Errors
    /// Fails if the agent exits or does not answer within 120 s; the error contains its log.
    pub fn start_with(&mut self, args: &[&str]) -> Result<()> {
        self.start_then(args, |_| Ok(()))
    }

    /// Like [`Agent::start_with`]. `meanwhile` gets the process id as soon as the process exists.
    ///
    /// # Errors
    /// As for [`Agent::start_with`], or an error of `meanwhile`.
    pub fn start_then(&mut self, args: &[&str], meanwhile: impl FnOnce(u32) -> Result<()>) -> Result<()> {
        let file =
            File::options().create(true).append(true).open(self.dir.join("agent.log")).context("open the log")?;
        let mut words = self.launcher.iter().map(Into::into).chain([binary("breaker")?.into_os_string()]);
        let mut command = self.ns.command(words.next().context("a program")?);
        let child = command
            .args(words)
            .args(["agent", "--config"])
            .arg(self.config())
            .args(args)
            .env("BREAKER_LOG", "info,breaker_agent=debug,netlink_packet_route=error")
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(self.log.take().unwrap_or_else(|| file.into()))
            .spawn()
            .context("start the agent")?;
        let child = self.process.insert(child);
        meanwhile(child.id())?;
        let mut ended = None;
        let client = Agent::new(&self.ns, &self.dir, &self.pin_path);
        let outcome = wait_for("the agent to be ready", Duration::from_secs(120), || {
            ended = child.try_wait().ok().flatten();
            ended.is_some() || client.status().is_ok_and(|status| status.datapath.waiting_interfaces.is_empty())
        });
        outcome.with_context(|| format!("the agent's log:\n{}", self.log()))?;
        match ended {
            Some(status) => bail!("the agent exited with {status}; its log:\n{}", self.log()),
            None => Ok(()),
        }
    }

    /// Process id of the agent.
    ///
    /// # Errors
    /// Fails if the agent is not running.
    pub fn pid(&self) -> Result<u32> {
        Ok(self.process.as_ref().context("the agent is not running")?.id())
    }

    /// Sends the agent a signal.
    ///
    /// # Errors
    /// Fails if the agent is not running.
    pub fn signal(&self, signal: Signal) -> Result<()> {
        let pid = i32::try_from(self.pid()?).ok().and_then(Pid::from_raw).context("invalid process id")?;
        kill_process(pid, signal).context("signal the agent")
    }

    /// Kills the agent with SIGKILL and waits for its end.
    ///
    /// # Errors
    /// Fails if the agent is not running.
    pub fn kill(&mut self) -> Result<()> {
        let mut process = self.process.take().context("the agent is not running")?;
        process.kill().context("kill the agent")?;
        process.wait().context("wait for the agent")?;
        Ok(())
    }

    /// Stops the agent with SIGTERM and waits for its end.
    ///
    /// # Errors
    /// Fails if the agent is not running, or if its exit status is not success; the error contains its log.
    pub fn stop(&mut self) -> Result<()> {
        self.signal(Signal::TERM)?;
        let status = self.process.take().context("the agent is not running")?.wait().context("wait for the agent")?;
        if !status.success() {
            bail!("the agent exited with {status}; its log:\n{}", self.log());
        }
        Ok(())
    }

    /// Runs the command `breaker` against this agent. Returns standard output, standard error and the exit status.
    ///
    /// # Errors
    /// Fails if the command cannot be started. A command that exits with a failure is not an error.
    pub fn cli(&self, args: &[&str]) -> Result<Output> {
        let mut command: Command = self.ns.command(binary("breaker")?);
        command.args(args).arg("--socket").arg(self.socket()).arg("--pin-path").arg(&self.pin_path);
        command.output().context("run breaker")
    }

    /// The agent's status, from its control socket.
    ///
    /// # Errors
    /// Fails if the agent does not answer.
    pub fn status(&self) -> Result<AgentStatus> {
        self.with_client(async |client| client.status().await)
    }

    /// The status of one service.
    ///
    /// # Errors
    /// Fails if the agent does not answer, or if it has no such service.
    pub fn service(&self, name: &str) -> Result<ServiceStatus> {
        self.with_client(async |client| client.get(name).await)
    }

    /// All events that the agent still has in memory, oldest first.
    ///
    /// # Errors
    /// Fails if the agent does not answer.
    pub fn events(&self) -> Result<Vec<EventLine>> {
        self.with_client(async |client| {
            let mut events = Vec::new();
            let keep = |event| {
                events.push(event);
                Ok(())
            };
            client.events(false, keep).await?;
            Ok(events)
        })
    }

    /// Waits until every backend of every service is Up.
    ///
    /// # Errors
    /// Fails after `limit`.
    pub fn wait_all_up(&self, limit: Duration) -> Result<()> {
        wait_for("every backend to be Up", limit, || {
            self.status().is_ok_and(|status| {
                let mut backends = status.services.iter().flat_map(|s| &s.tiers).flat_map(|t| &t.backends);
                backends.all(|backend| backend.health == Health::Up)
            })
        })
    }

    /// Waits until the agent has read its file again, and every backend is Up. An event `Config` of an earlier reload
    /// satisfies the first condition, too.
    ///
    /// # Errors
    /// Fails after `limit`.
    pub fn wait_reload(&self, limit: Duration) -> Result<()> {
        wait_for("the agent to reload its file", limit, || {
            self.events().is_ok_and(|events| events.iter().any(|e| e.kind == EventType::Config))
        })?;
        self.wait_all_up(limit)
    }

    /// Waits until a service is in a state and the maps contain that state: the applied plan equals the desired one.
    ///
    /// # Errors
    /// Fails after `limit`; the error contains the last status and the agent's log.
    pub fn wait_state(&self, name: &str, state: BreakerState, limit: Duration) -> Result<()> {
        let mut last = None;
        wait_for(&format!("{name} to be {}", state.label()), limit, || {
            last = self.service(name).ok();
            last.as_ref().is_some_and(|s| s.state == state && s.applied.as_ref() == Some(&s.desired))
        })
        .with_context(|| format!("last status: {last:#?}\nlog:\n{}", self.log()))
    }

    fn with_client<T>(&self, work: impl AsyncFnOnce(&Client) -> Result<T>) -> Result<T> {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().context("build a runtime")?;
        runtime.block_on(async {
            let client = Client::connect(&self.socket())?.context("no agent listens on the socket")?;
            work(&client).await
        })
    }
}

impl Drop for Agent {
    fn drop(&mut self) {
        if let Some(process) = &mut self.process {
            let _ = process.kill();
            let _ = process.wait();
        }
    }
}
