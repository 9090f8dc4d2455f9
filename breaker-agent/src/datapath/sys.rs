//! Features of the kernel, and the mount points of its file systems.

use std::{
    fs,
    os::fd::{AsRawFd as _, OwnedFd},
    path::{Path, PathBuf},
};

use anyhow::{Context as _, Result, bail, ensure};
use aya::{
    programs::{ProgramType, SchedClassifier, TcAttachType},
    sys::{BpfHelper, is_helper_supported},
};
use rustix::{
    fs::statfs,
    net::{AddressFamily, SocketType, socket},
};

/// `BPF_FS_MAGIC` (include/uapi/linux/magic.h).
const BPF_FS_MAGIC: i64 = 0xcafe_4a11;

/// Whether the kernel has tcx (Linux 6.6, commit e420bed02507). The function queries the tcx programs of the loopback
/// interface, which every network namespace has. A kernel without tcx refuses this query.
#[must_use]
pub fn has_tcx() -> bool {
    SchedClassifier::query_tcx("lo", TcAttachType::Ingress).is_ok()
}

/// Whether the kernel lets programs of a type call a helper. The kernel's version is not enough to know, because
/// distributions backport helpers.
///
/// # Errors
/// The kernel cannot be asked: the process lacks a capability.
pub fn has_helper(program_type: ProgramType, helper: BpfHelper) -> Result<bool> {
    is_helper_supported(program_type, helper).with_context(|| format!("ask the kernel for {helper:?}"))
}

/// Whether a path is on a BPF file system. If it does not exist, its closest existing parent decides.
///
/// # Errors
/// The file system of the path cannot be determined.
pub fn is_on_bpffs(path: &Path) -> Result<bool> {
    let existing = path.ancestors().find(|path| path.exists()).unwrap_or(Path::new("/"));
    let kind = statfs(existing).with_context(|| format!("find the file system of {}", existing.display()))?;
    #[allow(clippy::useless_conversion, clippy::unnecessary_cast, reason = "the field's type differs between targets")]
    let kind = kind.f_type as i64;
    Ok(kind == BPF_FS_MAGIC)
}

/// Returns the mount point of cgroup2. It is read from the mount table, because with hybrid hierarchies cgroup2 is
/// not mounted at /sys/fs/cgroup itself.
///
/// # Errors
/// cgroup2 is not mounted (the message has the command that mounts it), or the mount table cannot be read.
pub fn cgroup_root() -> Result<PathBuf> {
    // proc_pid_mountinfo(5): id, parent, device, root, mount point, options, optional fields, "-", type, …
    let mounts = fs::read_to_string("/proc/self/mountinfo").context("read /proc/self/mountinfo")?;
    let points = mounts.lines().filter_map(|line| {
        let (left, right) = line.split_once(" - ")?;
        (right.split(' ').next() == Some("cgroup2")).then(|| left.split(' ').nth(4)).flatten()
    });
    // Prefer mount points below /sys/fs/cgroup. Of several, the last one mounted hides the others.
    let (usual, others): (Vec<&str>, Vec<&str>) = points.partition(|point| point.starts_with("/sys/fs/cgroup"));
    let found = usual.last().or(others.last());
    found.map(PathBuf::from).context("cgroup2 is not mounted; mount it: mount -t cgroup2 none /sys/fs/cgroup")
}

/// Returns the cookie of this process's network namespace, which the programs compare with the cookie of a socket's
/// namespace.
///
/// # Errors
/// The kernel is older than 5.18, or does not know the socket option.
pub(super) fn netns_cookie() -> Result<u64> {
    let has_set_retval = has_helper(ProgramType::CgroupSockAddr, BpfHelper::BPF_FUNC_set_retval)?;
    ensure!(has_set_retval, "the kernel has no bpf_set_retval (Linux 5.18)");
    let socket = socket(AddressFamily::INET, SocketType::DGRAM, None).context("open a socket")?;
    cookie_of(&socket)
}

#[expect(unsafe_code, reason = "none of our dependencies supports this socket option")]
fn cookie_of(socket: &OwnedFd) -> Result<u64> {
    let mut cookie = 0_u64;
    let mut length = libc::socklen_t::try_from(size_of::<u64>()).unwrap_or(0);
    // SAFETY: the option's value is a u64 (SO_NETNS_COOKIE in net/core/sock.c), and `length` is its size.
    let outcome = unsafe {
        libc::getsockopt(
            socket.as_raw_fd(),
            libc::SOL_SOCKET,
            libc::SO_NETNS_COOKIE,
            (&raw mut cookie).cast(),
            &raw mut length,
        )
    };
    if outcome != 0 {
        bail!("read the network namespace's cookie: {}", std::io::Error::last_os_error());
    }
    Ok(cookie)
}

#[cfg(test)]
mod tests {
    #[test]
    fn this_namespace_has_a_number_and_it_stays() {
        let Ok(first) = super::netns_cookie() else { return };
        assert!(first != 0 && super::netns_cookie().unwrap() == first);
    }
}
