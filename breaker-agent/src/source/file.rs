//! The configuration file as a source of services. The agent reads it at start, on SIGHUP, and when it changes.

use std::{
    collections::BTreeSet,
    os::unix::fs::MetadataExt as _,
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
/// How often the file is looked at without a notification: a network file system sends none.
const POLL: Duration = Duration::from_secs(5);
/// Links that are followed, at most (the kernel's `MAXSYMLINKS`).
const MOST_LINKS: usize = 40;

/// Watches a configuration file, whatever links lead to it.
#[derive(Debug)]
pub struct FileSource {
    path: PathBuf,
    changes: mpsc::Receiver<()>,
    last: Option<String>,
    /// What the file looked like when it was last read.
    identity: Option<Identity>,
    /// When the file will have been unchanged for `QUIET`; `None` while no change is pending.
    quiet_at: Option<Instant>,
    next_poll: Instant,
    watcher: RecommendedWatcher,
    watched: BTreeSet<PathBuf>,
}

/// What a file that was not changed keeps: device, inode, length and time of the last change.
type Identity = (u64, u64, u64, i64, i64);

impl FileSource {
    /// Starts to watch the directories on the way to a file (not the file itself, which may be replaced by another file
    /// of that name).
    ///
    /// `last` is the content that the caller has already read. [`FileSource::changed`] reports a change since then at
    /// once.
    ///
    /// # Errors
    /// The directory of the file cannot be watched with inotify.
    pub fn watch(path: &Path, last: String) -> Result<Self> {
        let path = std::path::absolute(path).context("make the path of the configuration file absolute")?;
        let (sender, changes) = mpsc::channel(1);
        let watcher = notify::recommended_watcher(move |event: notify::Result<notify::Event>| {
            if event.is_ok_and(|event| !event.kind.is_access()) {
                // One pending notification is enough, however many changes there were.
                let _ = sender.try_send(());
            }
        })
        .context("open inotify")?;
        let now = clock::instant();
        let mut source = Self {
            identity: identity(&path),
            path,
            changes,
            last: Some(last),
            quiet_at: Some(now + QUIET),
            next_poll: now + POLL,
            watcher,
            watched: BTreeSet::new(),
        };
        source.follow()?;
        Ok(source)
    }

    /// Watches the directories that are on the way to the file now.
    fn follow(&mut self) -> Result<()> {
        let wanted = directories(&self.path);
        for dir in self.watched.difference(&wanted) {
            // It may be gone.
            let _ = self.watcher.unwatch(dir);
        }
        let mut watched: BTreeSet<PathBuf> = self.watched.intersection(&wanted).cloned().collect();
        let own = self.path.parent().map(Path::to_owned);
        for dir in wanted.difference(&self.watched) {
            match self.watcher.watch(dir, RecursiveMode::NonRecursive) {
                Ok(()) => drop(watched.insert(dir.clone())),
                Err(error) if Some(dir) == own.as_ref() && self.watched.is_empty() => {
                    return Err(error).with_context(|| format!("watch {}", dir.display()));
                }
                // The target of a link may be missing for a moment, and the slow look finds what no watch tells.
                Err(_) => {}
            }
        }
        self.watched = watched;
        Ok(())
    }

    /// Waits until the file's content has changed. A file that can no longer be read counts as changed once. Safe to
    /// cancel.
    pub async fn changed(&mut self) {
        loop {
            // The pending change is stored in `self`, so that a caller that drops this future loses nothing.
            let quiet_at = match self.quiet_at {
                Some(at) => at,
                None => {
                    tokio::select! {
                        Some(()) = self.changes.recv() => {}
                        () = sleep_until(self.next_poll) => {
                            self.next_poll = clock::instant() + POLL;
                            if identity(&self.path) == self.identity {
                                continue;
                            }
                        }
                    }
                    *self.quiet_at.insert(clock::instant() + QUIET)
                }
            };
            sleep_until(quiet_at).await;
            self.quiet_at = None;
            while self.changes.try_recv().is_ok() {}
            if let Err(error) = self.follow() {
                tracing::warn!("a change of the configuration file may be noticed late: {error:#}");
            }
            self.identity = identity(&self.path);
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

fn identity(path: &Path) -> Option<Identity> {
    let found = std::fs::metadata(path).ok()?;
    Some((found.dev(), found.ino(), found.size(), found.mtime(), found.mtime_nsec()))
}

/// The directories on the way to a file: its own, and that of each link that leads there.
fn directories(path: &Path) -> BTreeSet<PathBuf> {
    let mut found = BTreeSet::new();
    let mut ways = vec![path.to_owned()];
    for _ in 0..MOST_LINKS {
        let Some(way) = ways.pop() else { break };
        found.extend(way.parent().map(Path::to_owned));
        for part in way.ancestors() {
            let (Ok(target), Some(parent)) = (std::fs::read_link(part), part.parent()) else { continue };
            found.insert(parent.to_owned());
            let rest = way.strip_prefix(part).unwrap_or(Path::new(""));
            let target = parent.join(target);
            ways.push(if rest.as_os_str().is_empty() { target } else { target.join(rest) });
        }
    }
    found
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::{fs, os::unix::fs::symlink};
    use tokio::time::timeout;

    /// Longer than `QUIET` and much shorter than `POLL`.
    const SOON: Duration = Duration::from_secs(2);

    async fn notices(source: &mut FileSource) -> bool {
        timeout(SOON, source.changed()).await.is_ok()
    }

    /// HARDENING F2: releases in directories, and a link to the current one.
    #[tokio::test]
    async fn a_link_that_is_swapped_is_followed_every_time() {
        let dir = tempfile::tempdir().unwrap();
        let at = |name: &str| dir.path().join(name);
        for release in ["one", "two", "three"] {
            fs::create_dir(at(release)).unwrap();
            fs::write(at(release).join("lab.yaml"), release).unwrap();
        }
        symlink("one", at("current")).unwrap();
        let mut source = FileSource::watch(&at("current/lab.yaml"), "one".into()).unwrap();
        assert!(!notices(&mut source).await, "nothing changed");
        for release in ["two", "three"] {
            symlink(release, at("next")).unwrap();
            fs::rename(at("next"), at("current")).unwrap();
            assert!(notices(&mut source).await, "the link leads to {release} now");
            fs::write(at(release).join("lab.yaml"), format!("{release} edited")).unwrap();
            assert!(notices(&mut source).await, "an edit of {release}, behind the link");
        }
        fs::write(at("one/lab.yaml"), "one edited").unwrap();
        assert!(!notices(&mut source).await, "the first release is not current any more");
    }

    #[tokio::test]
    async fn a_change_without_a_notification_is_found_later() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("lab.yaml");
        fs::write(&path, "one").unwrap();
        let mut source = FileSource::watch(&path, "one".into()).unwrap();
        let watched = std::mem::take(&mut source.watched);
        watched.iter().for_each(|dir| source.watcher.unwatch(dir).unwrap());
        source.quiet_at = None;
        fs::write(&path, "another").unwrap();
        assert!(timeout(POLL * 2, source.changed()).await.is_ok());
    }
}
