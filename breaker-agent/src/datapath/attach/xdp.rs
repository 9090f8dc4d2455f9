//! XDP on uplinks, in the driver's native mode only. tc handles all packets that XDP does not handle.
//!
//! The kernel's generic mode is not used: it has no advantage over tc, and copies packets. An interface can have
//! one XDP program. If another program is attached, it stays.

use std::path::Path;

use anyhow::{Context as _, Result, bail};
use aya::{
    Ebpf,
    programs::{ProgramError, Xdp, XdpMode, xdp::XdpLink},
};

use super::links::{self, HeldLinks, Placed};
use crate::datapath::{interfaces::Interface, options::XdpPolicy};

/// The program for packets in one or several buffers (kernel 5.18): drivers need it for an MTU of more than about 3,500
/// bytes. Then the one for kernels before.
const PROGRAMS: [&str; 2] = ["breaker_xdp_fr", "breaker_xdp"];

/// Loads the first XDP program that the kernel takes.
pub(crate) fn load(programs: &mut Ebpf) -> Result<()> {
    let mut outcome = Ok(());
    for name in PROGRAMS {
        outcome = program(programs, name)?.load().with_context(|| format!("load the program {name} into the kernel"));
        if outcome.is_ok() {
            break;
        }
    }
    outcome
}

/// Attaches the program to an uplink, or replaces the program behind the pinned link. With [`XdpPolicy::Off`] it
/// removes that link.
///
/// # Errors
/// The reason why XDP is not attached, for the operator. tc then handles all packets.
pub(crate) fn attach(
    programs: &mut Ebpf,
    interface: &Interface,
    policy: XdpPolicy,
    pin: &Path,
    held: &mut HeldLinks,
) -> Result<Placed> {
    if policy == XdpPolicy::Off {
        links::unpin(pin)?;
        return Ok(Placed::Kept);
    }
    if let Some(obstacle) = interface.xdp_obstacle {
        links::unpin(pin)?;
        held.forget(pin);
        bail!("{obstacle}");
    }
    if interface.is_veth && policy == XdpPolicy::Auto {
        bail!("a veth: native XDP would turn its segmentation offload off");
    }
    let name = loaded(programs)?;
    links::attach(
        program(programs, name)?,
        pin,
        held,
        |_| true,
        |program, link| {
            let id = program.attach_to_link(XdpLink::try_from(link)?)?;
            Ok(program.take_link(id)?.try_into()?)
        },
        |program| {
            let id = program.attach_to_if_index(interface.index, XdpMode::Driver).map_err(why)?;
            program.take_link(id)?.try_into().context("needs kernel 5.9 (XDP links)")
        },
    )
}

/// Translates the kernel's error to a reason for the operator.
fn why(error: ProgramError) -> anyhow::Error {
    let number = match &error {
        ProgramError::SyscallError(error) => error.io_error.raw_os_error(),
        _ => None,
    };
    match number {
        Some(libc::EBUSY) => anyhow::anyhow!("another XDP program is attached"),
        Some(libc::EOPNOTSUPP) => anyhow::anyhow!("the driver does not support native XDP"),
        _ => anyhow::Error::new(error).context("the driver refused the program (check the MTU and number of queues)"),
    }
}

/// The name of the program that [`load`] loaded.
fn loaded(programs: &mut Ebpf) -> Result<&'static str> {
    for name in PROGRAMS {
        if program(programs, name)?.fd().is_ok() {
            return Ok(name);
        }
    }
    bail!("no XDP program is loaded")
}

fn program<'a>(programs: &'a mut Ebpf, name: &str) -> Result<&'a mut Xdp> {
    let program = programs.program_mut(name).with_context(|| format!("the BPF object has no program {name}"))?;
    program.try_into().with_context(|| format!("{name} is not an XDP program"))
}
