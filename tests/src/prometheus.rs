//! The programs of Prometheus: promtool, and the server. `cargo xtask setup` unpacks Debian's package into the target
//! directory, and does not install it: an installed package starts a server.

use std::{
    io::Write as _,
    path::{Path, PathBuf},
    process::{Command, Stdio},
};

use anyhow::{Context as _, Result, ensure};

use crate::process::KilledOnDrop;

/// Path of `prometheus` or `promtool`; `None` where neither the project's copy nor one in `PATH` is at hand, as in a
/// guest with another kernel.
#[must_use]
pub fn program(name: &str) -> Option<PathBuf> {
    let own = ebpf_builder::workspace().join("target/tools/prometheus/usr/bin");
    let path = std::env::var_os("PATH").unwrap_or_default();
    let mut dirs = std::iter::once(own).chain(std::env::split_paths(&path).collect::<Vec<_>>());
    dirs.find_map(|dir| Some(dir.join(name)).filter(|file| file.is_file()))
}

/// Checks a scrape with `promtool check metrics`.
///
/// # Errors
/// promtool finds a fault; the error contains what it prints.
pub fn check_metrics(promtool: &Path, scrape: &str) -> Result<()> {
    let mut command = Command::new(promtool);
    command.args(["check", "metrics"]).stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped());
    let mut child = command.spawn().context("start promtool")?;
    child.stdin.take().context("promtool has no input")?.write_all(scrape.as_bytes())?;
    let output = child.wait_with_output()?;
    let text = [output.stdout, output.stderr].concat();
    ensure!(output.status.success() && text.is_empty(), "promtool: {}", String::from_utf8_lossy(&text));
    Ok(())
}

/// A running server. It ends when it is dropped.
#[derive(Debug)]
pub struct Server {
    _process: KilledOnDrop,
}

impl Server {
    /// Starts a server by `command`, which may enter a network namespace first.
    ///
    /// # Errors
    /// It cannot be started.
    pub fn start(mut command: Command, config: &Path, data: &Path, listen: &str) -> Result<Self> {
        command
            .arg(format!("--config.file={}", config.display()))
            .arg(format!("--storage.tsdb.path={}", data.display()))
            .arg(format!("--web.listen-address={listen}"))
            .stdout(Stdio::null())
            .stderr(Stdio::null());
        Ok(Self { _process: KilledOnDrop(command.spawn().context("start prometheus")?) })
    }
}
