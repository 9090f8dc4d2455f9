//! Features and numbers of the kernel, and the mount points of its file systems.

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

/// Number of an address family in netlink messages (`AF_INET`, `AF_INET6`).
pub(super) fn family(is_ipv4: bool) -> u8 {
    u8::try_from(if is_ipv4 { libc::AF_INET } else { libc::AF_INET6 }).unwrap_or_default()
}

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

/// A program on a tcx hook of an interface: ids of the program and of its link.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct TcxEntry {
    /// Id of the program.
    pub program: u32,
    /// Id of the link; 0 if it was attached without one.
    pub link: u32,
}

/// Programs on one hook that are read at most. Linux allows 63 (`BPF_MPROG_MAX` in include/linux/bpf_mprog.h).
const MOST_PROGRAMS: usize = 64;

/// The attributes of `BPF_PROG_QUERY` (`union bpf_attr`, member `query`, in linux/bpf.h).
#[repr(C)]
struct ProgramQuery {
    target_ifindex: u32,
    attach_type: u32,
    query_flags: u32,
    attach_flags: u32,
    program_ids: u64,
    count: u32,
    pad: u32,
    program_attach_flags: u64,
    link_ids: u64,
    link_attach_flags: u64,
    revision: u64,
}

/// Returns the programs on a tcx hook of an interface in this network namespace, in the order in which they run. Asks for
/// ids only, which needs no more than `CAP_NET_ADMIN`.
///
/// # Errors
/// The kernel has no tcx, or the interface is gone.
#[expect(unsafe_code, reason = "none of our dependencies returns the ids of links")]
pub fn tcx_entries(index: u32, direction: TcAttachType) -> Result<Vec<TcxEntry>> {
    /// `BPF_PROG_QUERY` in `enum bpf_cmd`.
    const PROGRAM_QUERY: libc::c_int = 16;
    // `BPF_TCX_INGRESS` and `BPF_TCX_EGRESS` in `enum bpf_attach_type`.
    let attach_type = match direction {
        TcAttachType::Ingress => 46,
        TcAttachType::Egress => 47,
        TcAttachType::Custom(_) => bail!("not a tcx hook"),
    };
    let (mut programs, mut links) = ([0_u32; MOST_PROGRAMS], [0_u32; MOST_PROGRAMS]);
    let mut query = ProgramQuery {
        target_ifindex: index,
        attach_type,
        query_flags: 0,
        attach_flags: 0,
        program_ids: programs.as_mut_ptr() as u64,
        count: u32::try_from(MOST_PROGRAMS).unwrap_or(0),
        pad: 0,
        program_attach_flags: 0,
        link_ids: links.as_mut_ptr() as u64,
        link_attach_flags: 0,
        revision: 0,
    };
    // SAFETY: the attributes have the length that is passed; the kernel writes at most `count` ids to each array.
    let outcome = unsafe { libc::syscall(libc::SYS_bpf, PROGRAM_QUERY, &raw mut query, size_of::<ProgramQuery>()) };
    if outcome != 0 {
        return Err(std::io::Error::last_os_error()).context("query the programs of an interface");
    }
    let entries = programs.iter().zip(&links).take(query.count as usize);
    Ok(entries.map(|(program, link)| TcxEntry { program: *program, link: *link }).collect())
}

#[cfg(test)]
mod tests {
    #[test]
    fn this_namespace_has_a_number_and_it_stays() {
        let Ok(first) = super::netns_cookie() else { return };
        assert!(first != 0 && super::netns_cookie().unwrap() == first);
    }
}
