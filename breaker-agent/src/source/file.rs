//! A file as the source: read at start, on SIGHUP, and when it changes.

use std::{
    path::{Path, PathBuf},
    time::Duration,
};

use anyhow::{Context as _, Result};
use notify::{RecommendedWatcher, RecursiveMode, Watcher as _};
use tokio::{
    sync::mpsc,
    time::{Instant, sleep_until},
};

use crate::config::{self, Config, ConfigError};

/// Editors write in several steps, and a ConfigMap swaps links: wait until it is quiet.
const QUIET: Duration = Duration::from_millis(100);

/// Watches a configuration file.
#[derive(Debug)]
pub struct FileSource {
    path: PathBuf,
    changes: mpsc::Receiver<()>,
    last: Option<String>,
    /// When it will have been quiet long enough since the last note of a change.
    quiet_at: Option<Instant>,
    _watcher: RecommendedWatcher,
}

impl FileSource {
    /// Starts to watch a file's directory (the file itself may be replaced by another one of that name).
    ///
    /// `last` is what was read of it already: a change since then is told at once.
    ///
    /// # Errors
    /// A directory that cannot be watched.
    pub fn watch(path: &Path, last: String) -> Result<Self> {
        let path = std::path::absolute(path).context("the path of the configuration")?;
        let (sender, changes) = mpsc::channel(1);
        let mut watcher = notify::recommended_watcher(move |event: notify::Result<notify::Event>| {
            if event.is_ok_and(|event| !event.kind.is_access()) {
                // One note is enough, however much happened.
                let _ = sender.try_send(());
            }
        })
        .context("open inotify")?;
        // The file's directory, and where a link leads.
        let real = std::fs::canonicalize(&path).unwrap_or_else(|_| path.clone());
        for dir in [path.parent(), real.parent()].into_iter().flatten() {
            watcher.watch(dir, RecursiveMode::NonRecursive).with_context(|| format!("watch {}", dir.display()))?;
        }
        let quiet_at = Some(Instant::now() + QUIET);
        Ok(Self { path, changes, last: Some(last), quiet_at, _watcher: watcher })
    }

    /// Waits until the file's content has changed. Safe to cancel.
    pub async fn changed(&mut self) {
        loop {
            // What is known is kept in `self`, so that a caller that drops this future loses nothing.
            let quiet_at = match self.quiet_at {
                Some(at) => at,
                None => {
                    if self.changes.recv().await.is_none() {
                        std::future::pending::<()>().await;
                    }
                    *self.quiet_at.insert(Instant::now() + QUIET)
                }
            };
            sleep_until(quiet_at).await;
            self.quiet_at = None;
            while self.changes.try_recv().is_ok() {}
            let text = std::fs::read_to_string(&self.path).ok();
            if text != self.last {
                self.last = text;
                return;
            }
        }
    }

    /// Reads the file.
    ///
    /// # Errors
    /// Everything that is wrong with it.
    pub fn load(&self) -> Result<Config, Vec<ConfigError>> {
        config::load(&self.path)
    }
}
