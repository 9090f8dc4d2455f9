//! The pin directory: `<pinPath>/v<ABI>/{maps,links,clsact}`.
//!
//! Whole or refused: an agent adopts a directory in which every map is there and has the right sizes, makes a new one
//! where there is none, and touches nothing else. One agent at a time holds the lock on it.

use std::{
    fs, io,
    os::fd::OwnedFd,
    path::{Path, PathBuf},
};

use anyhow::{Context as _, Result};
use aya::maps::MapInfo;
use breaker_common::ABI_VERSION;
use rustix::{
    fs::{FlockOperation, Mode, OFlags, flock, open, statfs},
    io::Errno,
};

use super::{attach, maps::pinned, masquerade};

/// `BPF_FS_MAGIC` (include/uapi/linux/magic.h).
const BPF_FS_MAGIC: i64 = 0xcafe_4a11;

/// Why a pin directory cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum PinError {
    /// Not a BPF file system.
    #[error("{path} is not on a BPF file system; mount one: mount -t bpf bpf /sys/fs/bpf")]
    NotBpffs {
        /// The path.
        path: PathBuf,
    },
    /// Another agent holds it.
    #[error("another agent is running on {path} (pid {pid}); only one may")]
    Busy {
        /// The path.
        path: PathBuf,
        /// Its process id.
        pid: u32,
    },
    /// Pins of another version.
    #[error(
        "{path} holds pins of another version ({found}; this agent's is v{ABI_VERSION}); run the agent that made them, \
         or take them away with: breaker cleanup --pin-path {path}"
    )]
    OtherVersion {
        /// The path.
        path: PathBuf,
        /// What is there.
        found: String,
    },
    /// Not all of it.
    #[error("{path} is not whole: {problem}; take it away with: breaker cleanup --pin-path {root}")]
    Broken {
        /// The directory.
        path: PathBuf,
        /// The configured path.
        root: PathBuf,
        /// What is wrong.
        problem: String,
    },
    /// Anything else.
    #[error(transparent)]
    Other(#[from] anyhow::Error),
}

/// A pin directory that this process holds.
#[derive(Debug)]
pub struct PinDir {
    root: PathBuf,
    _lock: OwnedFd,
    /// Whether maps were there when it was opened.
    adopted: bool,
}

/// What a cleanup took away.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Cleaned {
    /// Links and filters.
    pub links: usize,
    /// Maps.
    pub maps: usize,
    /// Whether there was a rule for the masquerade mark.
    pub masquerade_rule: bool,
}

impl PinDir {
    /// Opens or makes the directory below `root`, and locks it.
    ///
    /// # Errors
    /// See [`PinError`]; nothing was changed then.
    pub fn open(root: &Path) -> Result<Self, PinError> {
        require_bpffs(root)?;
        let lock = lock(root)?;
        if let Some(found) = versions(root).into_iter().find(|v| *v != version_name()) {
            return Err(PinError::OtherVersion { path: root.to_owned(), found });
        }
        let adopted = check_whole(root)?;
        for sub in ["maps", "links", "clsact"] {
            let dir = version_dir(root).join(sub);
            fs::create_dir_all(&dir).with_context(|| format!("make {}", dir.display()))?;
        }
        Ok(Self { root: root.to_owned(), _lock: lock, adopted })
    }

    /// Whether an earlier agent's maps are in it.
    #[must_use]
    pub const fn adopted(&self) -> bool {
        self.adopted
    }

    /// Where a map is pinned.
    #[must_use]
    pub fn map(&self, name: &str) -> PathBuf {
        map_path(&self.root, name)
    }

    /// Where links are pinned.
    #[must_use]
    pub fn links(&self) -> PathBuf {
        version_dir(&self.root).join("links")
    }

    /// Where it is noted that a clsact qdisc is ours.
    #[must_use]
    pub fn clsact(&self) -> PathBuf {
        version_dir(&self.root).join("clsact")
    }

    /// Takes everything of ours away: links first, so that no program runs on maps that are half gone.
    ///
    /// # Errors
    /// What could not be removed.
    pub fn remove(self) -> Result<Cleaned> {
        remove_all(&self.root)
    }

    /// Takes everything of ours away, of whatever version, whole or not; refuses while an agent runs.
    ///
    /// # Errors
    /// A running agent, or what could not be removed.
    pub fn cleanup(root: &Path) -> Result<Cleaned, PinError> {
        if !root.try_exists().with_context(|| format!("look at {} (root?)", root.display()))? {
            return Ok(Cleaned::default());
        }
        require_bpffs(root)?;
        let _lock = lock(root)?;
        Ok(remove_all(root)?)
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

/// Whether a path, or what there is of it, is on a BPF file system.
///
/// # Errors
/// A path that cannot be looked at.
pub fn is_on_bpffs(path: &Path) -> Result<bool> {
    let existing = path.ancestors().find(|path| path.exists()).unwrap_or(Path::new("/"));
    let kind = statfs(existing).with_context(|| format!("look at {}", existing.display()))?;
    #[allow(clippy::useless_conversion, clippy::unnecessary_cast, reason = "the field's type differs between targets")]
    let kind = kind.f_type as i64;
    Ok(kind == BPF_FS_MAGIC)
}

/// Locks the directory itself (flock on its descriptor): bpffs has no files, and the lock ends with the process.
fn lock(root: &Path) -> Result<OwnedFd, PinError> {
    fs::create_dir_all(root).with_context(|| format!("make {}", root.display()))?;
    let dir = open(root, OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC, Mode::empty())
        .with_context(|| format!("open {}", root.display()))?;
    match flock(&dir, FlockOperation::NonBlockingLockExclusive) {
        Ok(()) => Ok(dir),
        Err(Errno::WOULDBLOCK) => {
            let pid = super::offline::read(root).ok().flatten().map_or(0, |left| left.heartbeat.pid);
            Err(PinError::Busy { path: root.to_owned(), pid })
        }
        Err(error) => Err(anyhow::Error::new(error).context(format!("lock {}", root.display())).into()),
    }
}

fn versions(root: &Path) -> Vec<String> {
    let Ok(entries) = fs::read_dir(root) else { return Vec::new() };
    let names = entries.filter_map(|e| Some(e.ok()?.file_name().to_string_lossy().into_owned()));
    // Only what can be ours: others may pin beside us.
    names
        .filter(|name| name.strip_prefix('v').is_some_and(|v| !v.is_empty() && v.bytes().all(|b| b.is_ascii_digit())))
        .collect()
}

/// Whether all maps are there (true), or none (false).
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
        // A first start that did not get to its end: no program can be running on these.
        tracing::warn!("{} holds some of the maps and no links: starting anew", version_dir(root).display());
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
                "the map {name} has keys and values of {}+{} bytes instead of {key}+{value}",
                found.0, found.1
            )));
        }
    }
    Ok(true)
}

fn remove_all(root: &Path) -> Result<Cleaned> {
    let mut cleaned = Cleaned::default();
    for version in versions(root) {
        let dir = root.join(&version);
        cleaned.links += attach::detach_all(&dir.join("links"), &dir.join("clsact"))?;
        if let Ok(maps) = fs::read_dir(dir.join("maps")) {
            for map in maps.flatten() {
                fs::remove_file(map.path()).with_context(|| format!("remove {}", map.path().display()))?;
                cleaned.maps += 1;
            }
        }
        for sub in ["maps", "links", "clsact"] {
            remove_dir(&dir.join(sub))?;
        }
        remove_dir(&dir)?;
    }
    // Others may be in it, or it is the file system's root.
    let _ = fs::remove_dir(root);
    // Last: it does no harm by itself.
    cleaned.masquerade_rule = masquerade::remove()?;
    Ok(cleaned)
}

fn remove_dir(dir: &Path) -> Result<()> {
    match fs::remove_dir(dir) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => {
            Err(error).with_context(|| format!("remove {} (is something else in it?)", dir.display()))
        }
        _ => Ok(()),
    }
}
