//! Network namespaces, and commands and threads in them.

use std::{
    fs::File,
    path::PathBuf,
    process::{Command, Stdio},
    thread::{self, JoinHandle},
};

use anyhow::{Context as _, Result, bail};
use rustix::thread::{LinkNameSpaceType, move_into_link_name_space};

/// A named network namespace; somebody else deletes it (see [`super::world::World`]).
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct NetNs {
    name: String,
}

impl NetNs {
    /// Makes it, with its loopback up.
    ///
    /// # Errors
    /// No root, or a name that is taken.
    pub fn create(name: &str) -> Result<Self> {
        let ns = Self { name: name.to_owned() };
        run(Command::new("ip").args(["netns", "add", name]))?;
        ns.ip(&["link", "set", "lo", "up"])?;
        Ok(ns)
    }

    /// Its name.
    #[must_use]
    pub fn name(&self) -> &str {
        &self.name
    }

    /// The file that stands for it.
    #[must_use]
    pub fn path(&self) -> PathBuf {
        PathBuf::from("/run/netns").join(&self.name)
    }

    /// A command that runs in it. (`ip netns exec` would hide mounts such as bpffs; nsenter does not.)
    #[must_use]
    pub fn command(&self, program: impl AsRef<std::ffi::OsStr>) -> Command {
        let mut command = Command::new("nsenter");
        command.arg(format!("--net={}", self.path().display())).arg("--").arg(program);
        command
    }

    /// Runs `ip` with arguments in it.
    ///
    /// # Errors
    /// The failed command, with what it said.
    pub fn ip(&self, args: &[&str]) -> Result<()> {
        run(Command::new("ip").args(["-n", &self.name]).args(args))
    }

    /// Runs a program in it to its end; returns what it printed.
    ///
    /// # Errors
    /// The failed command, with what it said.
    pub fn output(&self, program: &str, args: &[&str]) -> Result<String> {
        output(self.command(program).args(args))
    }

    /// Sets sysctls in it.
    ///
    /// # Errors
    /// The failed command.
    pub fn sysctl(&self, settings: &[&str]) -> Result<()> {
        for setting in settings {
            let (name, value) = setting.split_once('=').context("a setting is name=value")?;
            let file = format!("/proc/sys/{}", name.replace('.', "/"));
            // The directory is the namespace's of whoever opens it.
            run(self.command("sh").args(["-c", &format!("echo {value} > {file}")]))?;
        }
        Ok(())
    }

    /// Feeds rules to `iptables-restore` in it, without flushing what is there.
    ///
    /// # Errors
    /// The failed command, with what it said.
    pub fn iptables_restore(&self, rules: &str) -> Result<()> {
        use std::io::Write as _;
        let mut child = self
            .command("iptables-restore")
            .args(["-w", "--noflush"])
            .stdin(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()
            .context("start iptables-restore")?;
        child.stdin.take().context("stdin")?.write_all(rules.as_bytes()).context("write the rules")?;
        let output = child.wait_with_output().context("wait for iptables-restore")?;
        if !output.status.success() {
            bail!("iptables-restore: {}\n{rules}", String::from_utf8_lossy(&output.stderr).trim());
        }
        Ok(())
    }

    /// Puts the calling thread into it, for the rest of its life.
    ///
    /// # Errors
    /// No root.
    pub fn settle(&self) -> Result<()> {
        let ns = File::open(self.path()).with_context(|| format!("open {}", self.path().display()))?;
        move_into_link_name_space(std::os::fd::AsFd::as_fd(&ns), Some(LinkNameSpaceType::Network))
            .context("enter the network namespace")
    }

    /// Runs `work` on a thread that lives in it.
    ///
    /// # Errors
    /// No thread.
    pub fn thread<T: Send + 'static>(
        &self,
        work: impl FnOnce() -> T + Send + 'static,
    ) -> Result<JoinHandle<Result<T>>> {
        let ns = self.clone();
        thread::Builder::new()
            .name(self.name.clone())
            .spawn(move || {
                ns.settle()?;
                Ok(work())
            })
            .context("start a thread")
    }

    /// Runs `work` in it, and waits.
    ///
    /// # Errors
    /// No thread, or a panic in it.
    pub fn enter<T: Send + 'static>(&self, work: impl FnOnce() -> T + Send + 'static) -> Result<T> {
        match self.thread(work)?.join() {
            Ok(outcome) => outcome,
            Err(panic) => std::panic::resume_unwind(panic),
        }
    }
}

/// Runs a command to its end.
///
/// # Errors
/// The whole command, and what it said.
pub fn run(command: &mut Command) -> Result<()> {
    output(command).map(drop)
}

/// Runs a command to its end; returns what it printed.
///
/// # Errors
/// The whole command, and what it said.
pub fn output(command: &mut Command) -> Result<String> {
    let output = command.output().with_context(|| format!("start {command:?}"))?;
    if !output.status.success() {
        bail!("failed ({}): {command:?}: {}", output.status, String::from_utf8_lossy(&output.stderr).trim());
    }
    Ok(String::from_utf8_lossy(&output.stdout).into_owned())
}
