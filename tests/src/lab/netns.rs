//! Network namespaces; commands and threads that run in them.

use std::{
    fs::File,
    path::PathBuf,
    process::{Command, Stdio},
    thread::{self, JoinHandle},
};

use anyhow::{Context as _, Result, bail};
use rustix::thread::{LinkNameSpaceType, move_into_link_name_space};

/// A named network namespace. Dropping it does not delete the namespace: [`super::world::World`] does that.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct NetNs {
    name: String,
}

impl NetNs {
    /// Creates a namespace and brings its loopback interface up.
    ///
    /// # Errors
    /// Fails without root, or if the name exists.
    pub fn create(name: &str) -> Result<Self> {
        let ns = Self { name: name.to_owned() };
        run(Command::new("ip").args(["netns", "add", name]))?;
        ns.ip(&["link", "set", "lo", "up"])?;
        Ok(ns)
    }

    /// Name of the namespace.
    #[must_use]
    pub fn name(&self) -> &str {
        &self.name
    }

    /// Path of the file that represents the namespace (ip-netns(8)).
    #[must_use]
    pub fn path(&self) -> PathBuf {
        PathBuf::from("/run/netns").join(&self.name)
    }

    /// Creates a command that runs in the namespace. (nsenter keeps mounts such as bpffs, which `ip netns exec` hides.)
    #[must_use]
    pub fn command(&self, program: impl AsRef<std::ffi::OsStr>) -> Command {
        let mut command = Command::new("nsenter");
        command.arg(format!("--net={}", self.path().display())).arg("--").arg(program);
        command
    }

    /// Runs `ip` with these arguments in the namespace.
    ///
    /// # Errors
    /// Fails if the command fails; the error contains the command and its output.
    pub fn ip(&self, args: &[&str]) -> Result<()> {
        run(Command::new("ip").args(["-n", &self.name]).args(args))
    }

    /// Runs a program in the namespace and waits for it. Returns its standard output.
    ///
    /// # Errors
    /// Fails if the program fails; the error contains the command and its output.
    pub fn output(&self, program: &str, args: &[&str]) -> Result<String> {
        output(self.command(program).args(args))
    }

    /// Sets sysctls in the namespace. Each setting is `name=value`.
    ///
    /// # Errors
    /// Fails if a sysctl cannot be set.
    pub fn sysctl(&self, settings: &[&str]) -> Result<()> {
        for setting in settings {
            let (name, value) = setting.split_once('=').context("a sysctl setting must be name=value")?;
            let file = format!("/proc/sys/{}", name.replace('.', "/"));
            // /proc/sys/net shows the values of the namespace of the process that opens it.
            run(self.command("sh").args(["-c", &format!("echo {value} > {file}")]))?;
        }
        Ok(())
    }

    /// Runs many commands of ip(8), one on each line, in one process.
    ///
    /// # Errors
    /// Fails if the file for the commands cannot be written, or if a command fails.
    pub fn ip_batch(&self, commands: &str) -> Result<()> {
        let file = tempfile::NamedTempFile::new().context("make a file for the commands")?;
        std::fs::write(file.path(), commands).context("write the commands")?;
        self.ip(&["-batch", &file.path().display().to_string()])
    }

    /// Adds rules by `iptables-restore` in the namespace, without flushing the rules that exist.
    ///
    /// # Errors
    /// Fails if the command fails; the error contains its output and the rules.
    pub fn iptables_restore(&self, rules: &str) -> Result<()> {
        use std::io::Write as _;
        let mut child = self
            .command("iptables-restore")
            .args(["-w", "--noflush"])
            .stdin(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()
            .context("start iptables-restore")?;
        child.stdin.take().context("no stdin pipe")?.write_all(rules.as_bytes()).context("write the rules")?;
        let output = child.wait_with_output().context("wait for iptables-restore")?;
        if !output.status.success() {
            bail!("iptables-restore: {}\n{rules}", String::from_utf8_lossy(&output.stderr).trim());
        }
        Ok(())
    }

    /// Moves the calling thread into the namespace, for the rest of the thread's life.
    ///
    /// # Errors
    /// Fails without root, or if the namespace does not exist.
    pub fn settle(&self) -> Result<()> {
        let ns = File::open(self.path()).with_context(|| format!("open {}", self.path().display()))?;
        move_into_link_name_space(std::os::fd::AsFd::as_fd(&ns), Some(LinkNameSpaceType::Network))
            .context("enter the network namespace")
    }

    /// Starts a thread that runs `work` in the namespace.
    ///
    /// # Errors
    /// Fails if the thread cannot be started. The thread returns an error if it cannot enter the namespace.
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

    /// Runs `work` in the namespace, on a thread of its own, and waits for the result. A panic of `work` is passed on.
    ///
    /// # Errors
    /// Fails if the thread cannot be started or cannot enter the namespace.
    pub fn enter<T: Send + 'static>(&self, work: impl FnOnce() -> T + Send + 'static) -> Result<T> {
        match self.thread(work)?.join() {
            Ok(outcome) => outcome,
            Err(panic) => std::panic::resume_unwind(panic),
        }
    }
}

/// Runs a command and waits for it.
///
/// # Errors
/// Fails if the command cannot be started or fails; the error contains the command and its standard error.
pub fn run(command: &mut Command) -> Result<()> {
    output(command).map(drop)
}

/// Runs a command and waits for it. Returns its standard output.
///
/// # Errors
/// Fails if the command cannot be started or fails; the error contains the command and its standard error.
pub fn output(command: &mut Command) -> Result<String> {
    let output = command.output().with_context(|| format!("start {command:?}"))?;
    if !output.status.success() {
        bail!("command failed ({}): {command:?}: {}", output.status, String::from_utf8_lossy(&output.stderr).trim());
    }
    Ok(String::from_utf8_lossy(&output.stdout).into_owned())
}
