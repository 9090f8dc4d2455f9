//! XDP on uplinks: in the driver's native mode, or not at all. What it does not get to do, tc does.
//!
//! The kernel's generic mode is no gain over tc, and copies packets. An interface has one program; where somebody else's is
//! there already, it stays.

use std::path::Path;

use anyhow::{Context as _, Result, bail};
use aya::{
    Ebpf,
    programs::{ProgramError, Xdp, XdpMode, xdp::XdpLink},
};

use super::links;
use crate::config::XdpPolicy;

const PROGRAM: &str = "breaker_xdp";

/// Loads the program.
pub(super) fn load(programs: &mut Ebpf) -> Result<()> {
    program(programs)?.load().with_context(|| format!("load the program {PROGRAM} into the kernel"))
}

/// Puts the program on an uplink, or a new one behind the link that is there. `virtual_`: the interface is a veth.
///
/// # Errors
/// Why not, for people: tc does its work then.
pub(super) fn attach(programs: &mut Ebpf, index: u32, virtual_: bool, policy: XdpPolicy, pin: &Path) -> Result<()> {
    if policy == XdpPolicy::Off {
        return links::unpin(pin);
    }
    if virtual_ && policy == XdpPolicy::Auto {
        bail!("a veth: XDP there would turn segmentation offload off");
    }
    links::attach(
        program(programs)?,
        pin,
        |program, link| {
            let id = program.attach_to_link(XdpLink::try_from(link)?)?;
            Ok(program.take_link(id)?.try_into()?)
        },
        |program| {
            let id = program.attach_to_if_index(index, XdpMode::Driver).map_err(why)?;
            program.take_link(id)?.try_into().context("needs kernel 5.9 (links for XDP)")
        },
    )
}

fn why(error: ProgramError) -> anyhow::Error {
    let number = match &error {
        ProgramError::SyscallError(error) => error.io_error.raw_os_error(),
        _ => None,
    };
    match number {
        Some(libc::EBUSY) => anyhow::anyhow!("another XDP program is there"),
        Some(libc::EOPNOTSUPP) => anyhow::anyhow!("its driver has no native XDP"),
        _ => anyhow::Error::new(error).context("the driver refused (its MTU or its queues may be at fault)"),
    }
}

fn program(programs: &mut Ebpf) -> Result<&mut Xdp> {
    let program = programs.program_mut(PROGRAM).with_context(|| format!("the object has no program {PROGRAM}"))?;
    program.try_into().with_context(|| format!("{PROGRAM} is no XDP program"))
}
