//! Removes everything that an agent left in the kernel.

use std::{fs, io, path::Path};

use anyhow::{Context as _, Result};
use rustix::net::{AddressFamily, SocketType, netdevice::name_to_index, socket};

use super::{
    attach::{cgroup, clsact},
    masquerade,
    pins::{self, PinDir, PinError},
};

/// What a cleanup removed.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Cleaned {
    /// Number of links and filters.
    pub links: usize,
    /// Number of maps.
    pub maps: usize,
    /// Whether the nftables rule for the masquerade mark existed.
    pub masquerade_rule: bool,
}

impl PinDir {
    /// Removes everything that breaker created. Links go first, so that no program runs while its maps are being
    /// removed.
    ///
    /// # Errors
    /// The first object that could not be removed.
    pub fn remove(self) -> Result<Cleaned> {
        remove_all(self.root())
    }
}

/// Removes everything that breaker created below `root`: of any version, complete or not. Does nothing if
/// `root` does not exist.
///
/// # Errors
/// An agent is running, or an object could not be removed.
pub fn cleanup(root: &Path) -> Result<Cleaned, PinError> {
    if !root.try_exists().with_context(|| format!("check whether {} exists (root?)", root.display()))? {
        return Ok(Cleaned::default());
    }
    let _lock = pins::lock_existing(root)?;
    Ok(remove_all(root)?)
}

fn remove_all(root: &Path) -> Result<Cleaned> {
    let mut cleaned = Cleaned::default();
    for version in pins::versions(root) {
        let dir = root.join(&version);
        cleaned.links += detach_all(&dir.join("links"), &dir.join("clsact"))?;
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
    // This fails if others have pins in the directory, or if it is the root of the file system.
    let _ = fs::remove_dir(root);
    // The rule goes last, because it does no harm by itself.
    cleaned.masquerade_rule = masquerade::remove()?;
    Ok(cleaned)
}

fn remove_dir(dir: &Path) -> Result<()> {
    match fs::remove_dir(dir) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => {
            Err(error).with_context(|| format!("remove {} (does it contain something else?)", dir.display()))
        }
        _ => Ok(()),
    }
}

/// Removes all pinned links and all of breaker's filters in this network namespace. Returns their number.
fn detach_all(links: &Path, markers: &Path) -> Result<usize> {
    let mut count = 0;
    let mut paths = Vec::new();
    if let Ok(entries) = fs::read_dir(links) {
        for entry in entries.flatten() {
            paths.push(entry.path());
        }
        // Requests before replies ("in" before "out"), the opposite of `DIRECTIONS`. Socket programs go before
        // both; among them, those for connect and sendmsg go before those for getpeername and recvmsg.
        paths.sort_by_key(|path| {
            let name = path.file_name().unwrap_or_default().to_string_lossy().into_owned();
            (
                !cgroup::is_pin(path),
                !(name.ends_with("_in") || name.ends_with("_xdp") || name.contains("_conn") || name.contains("_send")),
            )
        });
        for path in paths {
            // The pin is the link's last reference. Without it the kernel detaches the link.
            fs::remove_file(&path).with_context(|| format!("remove {}", path.display()))?;
            count += 1;
        }
    }
    for (index, name) in interfaces()? {
        count += clsact::detach(index, &name, markers)?;
    }
    // Markers of interfaces that no longer exist.
    if let Ok(entries) = fs::read_dir(markers) {
        for entry in entries.flatten() {
            fs::remove_dir(entry.path()).with_context(|| format!("remove {}", entry.path().display()))?;
        }
    }
    Ok(count)
}

/// Returns index and name of every interface in this network namespace.
fn interfaces() -> Result<Vec<(u32, String)>> {
    let text = fs::read_to_string("/proc/thread-self/net/dev").context("read /proc/thread-self/net/dev")?;
    let socket = socket(AddressFamily::INET, SocketType::DGRAM, None).context("open a socket")?;
    let names = text.lines().skip(2).filter_map(|line| Some(line.split_once(':')?.0.trim().to_owned()));
    Ok(names.filter_map(|name| Some((name_to_index(&socket, &name).ok()?, name))).collect())
}
