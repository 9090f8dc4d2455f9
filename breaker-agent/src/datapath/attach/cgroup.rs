//! Attaches the programs for the node's own sockets. They are attached to the root of the cgroup2 tree, so that
//! they run for every process. They find the node's sockets by the cookie of the node's network namespace, which the
//! loader writes into them (`NODE_NETNS`).
//!
//! The links are pinned and outlive the agent. A new agent attaches its programs before it detaches those of the
//! earlier agent. In between both run for a socket. That is harmless: a destination that one of them has replaced
//! is not a VIP any more, so the other leaves it alone.

use std::{fs::File, path::Path};

use anyhow::{Context as _, Result};
use aya::{
    Ebpf,
    programs::{CgroupAttachMode, CgroupSock, CgroupSockAddr, links::FdLink},
};

use super::links;
use crate::datapath::{pins::PinDir, sys::cgroup_root};

/// Names of the programs and of their pins, in the order of attaching.
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
/// Name of the program that runs when a socket is closed, and of its pin.
const RELEASE: &str = "breaker_release";

/// Loads the programs into the kernel. Call it before the maps are taken out of `programs`.
///
/// # Errors
/// The reason why the node's own sockets cannot be protected.
pub(crate) fn load(programs: &mut Ebpf) -> Result<()> {
    for name in PROGRAMS {
        program(programs, name)?.load().with_context(|| format!("load the program {name} into the kernel"))?;
    }
    release_program(programs)?.load().with_context(|| format!("load the program {RELEASE} into the kernel"))
}

/// Attaches the programs that [`load`] loaded. The programs that translate replies back (getpeername, recvmsg) come
/// before those that redirect (sendmsg, connect).
///
/// # Errors
/// The reason why the node's own sockets cannot be protected. Some programs may be attached then: call [`detach`].
pub(crate) fn attach(programs: &mut Ebpf, links: &Path) -> Result<()> {
    let path = cgroup_root()?;
    let root = File::open(&path).with_context(|| format!("open {}", path.display()))?;
    // The program that counts connections down comes before those that count up.
    let release = release_program(programs)?;
    let id = release
        .attach(&root, CgroupAttachMode::Single)
        .with_context(|| format!("attach {RELEASE} to {}", path.display()))?;
    let link: FdLink = release.take_link(id)?.try_into()?;
    links::repin(link, &links.join(RELEASE))?;
    for name in PROGRAMS {
        let program = program(programs, name)?;
        // A link allows other programs on the same hook in any mode.
        let id = program
            .attach(&root, CgroupAttachMode::Single)
            .with_context(|| format!("attach {name} to {}", path.display()))?;
        let link: FdLink = program.take_link(id)?.try_into()?;
        links::repin(link, &links.join(name))?;
    }
    Ok(())
}

/// Attaches the programs again if somebody has taken one away: a link ends with its pin. Returns whether one was gone.
///
/// # Errors
/// As [`attach`].
pub(crate) fn restore(programs: &mut Ebpf, links: &Path) -> Result<bool> {
    let gone = PROGRAMS.iter().chain([&RELEASE]).any(|name| !links.join(name).exists());
    if gone {
        attach(programs, links)?;
    }
    Ok(gone)
}

/// Detaches the programs, including those of an earlier agent.
pub(crate) fn detach(pins: &PinDir) -> Result<()> {
    // The opposite of the order of attaching: programs that redirect go first.
    for name in PROGRAMS.iter().rev() {
        links::unpin(&pins.links().join(name))?;
    }
    links::unpin(&pins.links().join(RELEASE))
}

fn release_program(programs: &mut Ebpf) -> Result<&mut CgroupSock> {
    let program = programs.program_mut(RELEASE).with_context(|| format!("the BPF object has no program {RELEASE}"))?;
    program.try_into().with_context(|| format!("{RELEASE} is not a program for sockets"))
}

fn program<'a>(programs: &'a mut Ebpf, name: &str) -> Result<&'a mut CgroupSockAddr> {
    let program = programs.program_mut(name).with_context(|| format!("the BPF object has no program {name}"))?;
    program.try_into().with_context(|| format!("{name} is not a program for socket addresses"))
}

/// Whether a path is the pin of a program for sockets.
pub(crate) fn is_pin(path: &Path) -> bool {
    path.file_name().and_then(|name| name.to_str()).is_some_and(|name| name == RELEASE || PROGRAMS.contains(&name))
}
