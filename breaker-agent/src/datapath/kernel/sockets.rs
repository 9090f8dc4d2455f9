//! The programs for sockets of the node's own: on the root of the cgroup2 tree, so that they see every process, and told
//! which network namespace is the node's.
//!
//! Links are pinned and outlive the agent. A new agent attaches its programs before it lets go of the old ones: meanwhile a
//! destination may be looked at twice, and what was replaced once is no VIP any more.

use std::{
    fs::{self, File},
    os::fd::{AsRawFd as _, OwnedFd},
    path::{Path, PathBuf},
};

use anyhow::{Context as _, Result, bail, ensure};
use aya::{
    Ebpf,
    programs::{CgroupAttachMode, CgroupSock, CgroupSockAddr, links::FdLink},
};
use rustix::net::{AddressFamily, SocketType, socket};

use super::{attach::kernel_at_least, links, pins::PinDir};

/// Names of the programs, also of their pins.
const PROGRAMS: [&str; 8] = [
    "breaker_peer4",
    "breaker_peer6",
    "breaker_recv4",
    "breaker_recv6",
    "breaker_send4",
    "breaker_send6",
    "breaker_conn4",
    "breaker_conn6",
];
/// Name of the program that sees sockets close, also of its pin.
const RELEASE: &str = "breaker_release";

/// Loads the programs: before their maps are taken from them.
///
/// # Errors
/// Why the node's own sockets cannot be seen.
pub(super) fn load(programs: &mut Ebpf) -> Result<()> {
    for name in PROGRAMS {
        program(programs, name)?.load().with_context(|| format!("load the program {name} into the kernel"))?;
    }
    release_program(programs)?.load().with_context(|| format!("load the program {RELEASE} into the kernel"))
}

/// Attaches the programs that [`load`] loaded, what answers before what asks.
///
/// # Errors
/// Why the node's own sockets cannot be seen; nothing is attached then but what was.
pub(super) fn attach(programs: &mut Ebpf, pins: &PinDir) -> Result<()> {
    let path = cgroup_root()?;
    let root = File::open(&path).with_context(|| format!("open {}", path.display()))?;
    // What counts down before what counts up.
    let release = release_program(programs)?;
    let id = release
        .attach(&root, CgroupAttachMode::Single)
        .with_context(|| format!("attach {RELEASE} to {}", path.display()))?;
    let link: FdLink = release.take_link(id)?.try_into()?;
    links::repin(link, &pins.links().join(RELEASE))?;
    for name in PROGRAMS {
        let program = program(programs, name)?;
        // A link lets others attach beside it whatever the mode says.
        let id = program
            .attach(&root, CgroupAttachMode::Single)
            .with_context(|| format!("attach {name} to {}", path.display()))?;
        let link: FdLink = program.take_link(id)?.try_into()?;
        links::repin(link, &pins.links().join(name))?;
    }
    Ok(())
}

/// Takes away what an earlier agent attached.
pub(super) fn detach(pins: &PinDir) -> Result<()> {
    // What asks before what answers.
    for name in PROGRAMS.iter().rev() {
        links::unpin(&pins.links().join(name))?;
    }
    links::unpin(&pins.links().join(RELEASE))
}

fn release_program(programs: &mut Ebpf) -> Result<&mut CgroupSock> {
    let program = programs.program_mut(RELEASE).with_context(|| format!("the object has no program {RELEASE}"))?;
    program.try_into().with_context(|| format!("{RELEASE} is no program for sockets"))
}

fn program<'a>(programs: &'a mut Ebpf, name: &str) -> Result<&'a mut CgroupSockAddr> {
    let program = programs.program_mut(name).with_context(|| format!("the object has no program {name}"))?;
    program.try_into().with_context(|| format!("{name} is no program for sockets"))
}

/// Where cgroup2 is mounted: found by its mount, because on hybrid hierarchies it is not at /sys/fs/cgroup itself.
///
/// # Errors
/// Where it is not mounted, with the command that mounts it.
pub fn cgroup_root() -> Result<PathBuf> {
    // proc_pid_mountinfo(5): id, parent, device, root, mount point, options, optional fields, "-", type, …
    let mounts = fs::read_to_string("/proc/self/mountinfo").context("read /proc/self/mountinfo")?;
    let points = mounts.lines().filter_map(|line| {
        let (left, right) = line.split_once(" - ")?;
        (right.split(' ').next() == Some("cgroup2")).then(|| left.split(' ').nth(4)).flatten()
    });
    // The last one mounted hides the others.
    let (usual, others): (Vec<&str>, Vec<&str>) = points.partition(|point| point.starts_with("/sys/fs/cgroup"));
    let found = usual.last().or(others.last());
    found.map(PathBuf::from).context("cgroup2 is not mounted; mount it: mount -t cgroup2 none /sys/fs/cgroup")
}

/// The number of this process' network namespace, as the programs see it on sockets.
///
/// # Errors
/// A kernel without such numbers.
pub(super) fn netns_cookie() -> Result<u64> {
    ensure!(kernel_at_least(5, 18), "needs kernel 5.18 (bpf_set_retval)");
    let socket = socket(AddressFamily::INET, SocketType::DGRAM, None).context("open a socket")?;
    cookie_of(&socket)
}

#[expect(unsafe_code, reason = "no crate that we have knows the option")]
fn cookie_of(socket: &OwnedFd) -> Result<u64> {
    let mut cookie = 0_u64;
    let mut length = libc::socklen_t::try_from(size_of::<u64>()).unwrap_or(0);
    // SAFETY: the option is a u64 (net/core/sock.c, SO_NETNS_COOKIE), and the length says so.
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
        bail!("ask for the network namespace's number: {}", std::io::Error::last_os_error());
    }
    Ok(cookie)
}

/// Whether a pin is one of ours here.
pub(super) fn is_pin(path: &Path) -> bool {
    path.file_name().and_then(|name| name.to_str()).is_some_and(|name| name == RELEASE || PROGRAMS.contains(&name))
}

#[cfg(test)]
mod tests {
    #[test]
    fn this_namespace_has_a_number_and_it_stays() {
        let Ok(first) = super::netns_cookie() else { return };
        assert!(first != 0 && super::netns_cookie().unwrap() == first);
    }
}
