//! The configuration file as a source of services. The agent reads it at start, on SIGHUP, and when it changes.

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

use crate::{
    clock,
    config::{self, Config, ConfigError},
};

/// How long the file must be unchanged before it is read again: an editor writes in several steps, and kubelet
/// updates a mounted ConfigMap by swapping symbolic links.
const QUIET: Duration = Duration::from_millis(100);

/// Watches a configuration file.
#[derive(Debug)]
pub struct FileSource {
    path: PathBuf,
    changes: mpsc::Receiver<()>,
    last: Option<String>,
    /// When the file will have been unchanged for `QUIET`; `None` while no change is pending.
    quiet_at: Option<Instant>,
    _watcher: RecommendedWatcher,
}

impl FileSource {
    /// Starts to watch the directory of a file (not the file itself, which may be replaced by another file of that
    /// name).
    ///
    /// `last` is the content that the caller has already read. [`FileSource::changed`] reports a change since then at
    /// once.
    ///
    /// # Errors
    /// The directory cannot be watched with inotify.
    pub fn watch(path: &Path, last: String) -> Result<Self> {
        let path = std::path::absolute(path).context("make the path of the configuration file absolute")?;
        let (sender, changes) = mpsc::channel(1);
        let mut watcher = notify::recommended_watcher(move |event: notify::Result<notify::Event>| {
            if event.is_ok_and(|event| !event.kind.is_access()) {
                // One pending notification is enough, however many changes there were.
                let _ = sender.try_send(());
            }
        })
        .context("open inotify")?;
        // Watch the file's directory and, if the file is a symbolic link, the directory of its target.
        let real = std::fs::canonicalize(&path).unwrap_or_else(|_| path.clone());
        for dir in [path.parent(), real.parent()].into_iter().flatten() {
            watcher.watch(dir, RecursiveMode::NonRecursive).with_context(|| format!("watch {}", dir.display()))?;
        }
        let quiet_at = Some(clock::instant() + QUIET);
        Ok(Self { path, changes, last: Some(last), quiet_at, _watcher: watcher })
    }

    /// Waits until the file's content has changed. A file that can no longer be read counts as changed once. Safe to
    /// cancel.
    pub async fn changed(&mut self) {
        loop {
            // The pending change is stored in `self`, so that a caller that drops this future loses nothing.
            let quiet_at = match self.quiet_at {
                Some(at) => at,
                None => {
                    if self.changes.recv().await.is_none() {
                        std::future::pending::<()>().await;
                    }
                    *self.quiet_at.insert(clock::instant() + QUIET)
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

    /// Reads and validates the file.
    ///
    /// # Errors
    /// All problems of the file, not only the first one.
    pub fn load(&self) -> Result<Config, Vec<ConfigError>> {
        config::load(&self.path)
    }
}
