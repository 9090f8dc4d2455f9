//! The pin directory: `<pinPath>/v<ABI>/{maps,links,clsact}`.
//!
//! An agent adopts the directory if every map is there and has the right sizes, and creates it if there is none. Maps
//! that an interrupted first start left are removed. Any other state is refused and stays unchanged. One agent at a
//! time holds the lock on the directory.

use std::{
    fs,
    os::fd::OwnedFd,
    path::{Path, PathBuf},
};

use anyhow::{Context as _, Result};
use aya::maps::MapInfo;
use breaker_common::ABI_VERSION;
use rustix::{
    fs::{FlockOperation, Mode, OFlags, flock, open},
    io::Errno,
};

use super::{
    maps::{Maps, pinned},
    sys::is_on_bpffs,
};

/// Why a pin directory cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum PinError {
    /// The path is not on a BPF file system.
    #[error("{path} is not on a BPF file system; mount one: mount -t bpf bpf /sys/fs/bpf")]
    NotBpffs {
        /// The configured path.
        path: PathBuf,
    },
    /// Another agent holds the lock.
    #[error("another agent is running on {path} (pid {pid}); only one agent can use a pin path")]
    Busy {
        /// The configured path.
        path: PathBuf,
        /// Process id of that agent; 0 if it is not known.
        pid: u32,
    },
    /// An agent of another version created the pins.
    #[error(
        "{path} holds pins of another version ({found}; this agent's is v{ABI_VERSION}); run the agent that created \
         them, or remove them with: breaker cleanup --pin-path {path}"
    )]
    OtherVersion {
        /// The configured path.
        path: PathBuf,
        /// The other version.
        found: String,
    },
    /// Pins are missing, or a map has other sizes.
    #[error("{path} is incomplete or damaged: {problem}; remove it with: breaker cleanup --pin-path {root}")]
    Broken {
        /// The directory of this version.
        path: PathBuf,
        /// The configured path.
        root: PathBuf,
        /// What is wrong.
        problem: String,
    },
    /// Any other error.
    #[error(transparent)]
    Other(#[from] anyhow::Error),
}

/// A pin directory that this process has locked.
#[derive(Debug)]
pub struct PinDir {
    root: PathBuf,
    _lock: OwnedFd,
    /// Whether the maps existed when the directory was opened.
    adopted: bool,
}

impl PinDir {
    /// Opens the directory below `root`, or creates it, and locks it.
    ///
    /// # Errors
    /// See [`PinError`]. Pins that can be in use are unchanged then.
    pub fn open(root: &Path) -> Result<Self, PinError> {
        require_bpffs(root)?;
        let lock = lock(root)?;
        if let Some(found) = versions(root).into_iter().find(|v| *v != version_name()) {
            return Err(PinError::OtherVersion { path: root.to_owned(), found });
        }
        let adopted = check_whole(root)?;
        for sub in ["maps", "links", "clsact"] {
            let dir = version_dir(root).join(sub);
            fs::create_dir_all(&dir).with_context(|| format!("create {}", dir.display()))?;
        }
        Ok(Self { root: root.to_owned(), _lock: lock, adopted })
    }

    /// The configured pin path.
    pub(super) fn root(&self) -> &Path {
        &self.root
    }

    /// Whether the directory had the maps of an earlier agent.
    #[must_use]
    pub const fn adopted(&self) -> bool {
        self.adopted
    }

    /// Returns the path of a map's pin.
    #[must_use]
    pub fn map(&self, name: &str) -> PathBuf {
        map_path(&self.root, name)
    }

    /// Returns the directory of the links' pins.
    #[must_use]
    pub fn links(&self) -> PathBuf {
        version_dir(&self.root).join("links")
    }

    /// Returns the directory of the markers for clsact qdiscs that an agent created.
    #[must_use]
    pub fn clsact(&self) -> PathBuf {
        version_dir(&self.root).join("clsact")
    }
}

fn version_name() -> String {
    format!("v{ABI_VERSION}")
}

fn version_dir(root: &Path) -> PathBuf {
    root.join(version_name())
}

pub(super) fn map_path(root: &Path, name: &str) -> PathBuf {
    version_dir(root).join("maps").join(name)
}

fn require_bpffs(root: &Path) -> Result<(), PinError> {
    if is_on_bpffs(root)? { Ok(()) } else { Err(PinError::NotBpffs { path: root.to_owned() }) }
}

/// Locks an existing pin path, for a cleanup.
pub(super) fn lock_existing(root: &Path) -> Result<OwnedFd, PinError> {
    require_bpffs(root)?;
    lock(root)
}

/// Locks the directory: flock on its own descriptor, because bpffs has no regular files. The lock ends with the
/// process.
fn lock(root: &Path) -> Result<OwnedFd, PinError> {
    fs::create_dir_all(root).with_context(|| format!("create {}", root.display()))?;
    let dir = open(root, OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC, Mode::empty())
        .with_context(|| format!("open {}", root.display()))?;
    match flock(&dir, FlockOperation::NonBlockingLockExclusive) {
        Ok(()) => Ok(dir),
        Err(Errno::WOULDBLOCK) => {
            let pid = Maps::pinned_heartbeat(&map_path(root, "HEARTBEAT")).map_or(0, |heartbeat| heartbeat.pid);
            Err(PinError::Busy { path: root.to_owned(), pid })
        }
        Err(error) => Err(anyhow::Error::new(error).context(format!("lock {}", root.display())).into()),
    }
}

pub(super) fn versions(root: &Path) -> Vec<String> {
    let Ok(entries) = fs::read_dir(root) else { return Vec::new() };
    let names = entries.filter_map(|e| Some(e.ok()?.file_name().to_string_lossy().into_owned()));
    // Only names that breaker uses: others may have pins in the same directory.
    names
        .filter(|name| name.strip_prefix('v').is_some_and(|v| !v.is_empty() && v.bytes().all(|b| b.is_ascii_digit())))
        .collect()
}

/// Returns whether all maps are there (true), or none (false). Maps of a first start that was interrupted are
/// removed.
fn check_whole(root: &Path) -> Result<bool, PinError> {
    let broken = |problem: String| PinError::Broken { path: version_dir(root), root: root.to_owned(), problem };
    let missing: Vec<&str> = pinned().map(|(name, ..)| name).filter(|name| !map_path(root, name).exists()).collect();
    if missing.len() == pinned().count() {
        let links = fs::read_dir(version_dir(root).join("links")).is_ok_and(|mut links| links.next().is_some());
        return if links { Err(broken("there are links, but no maps".into())) } else { Ok(false) };
    }
    let in_use =
        |sub: &str| fs::read_dir(version_dir(root).join(sub)).is_ok_and(|mut entries| entries.next().is_some());
    if !missing.is_empty() && !in_use("links") && !in_use("clsact") {
        // A first start was interrupted. Without a link or a clsact marker, no program can be using these maps.
        tracing::warn!("{} has some maps and no links: removing them to start anew", version_dir(root).display());
        for (name, ..) in pinned() {
            let _ = fs::remove_file(map_path(root, name));
        }
        return Ok(false);
    }
    if !missing.is_empty() {
        return Err(broken(format!("these maps are missing: {}", missing.join(", "))));
    }
    for (name, key, value) in pinned() {
        let info = MapInfo::from_pin(map_path(root, name))
            .map_err(|error| broken(format!("the map {name} cannot be opened: {error}")))?;
        let found = (info.key_size() as usize, info.value_size() as usize);
        if key > 0 && found != (key, value) {
            return Err(broken(format!(
                "the map {name} has keys and values of {}+{} bytes, not {key}+{value}",
                found.0, found.1
            )));
        }
    }
    Ok(true)
}
