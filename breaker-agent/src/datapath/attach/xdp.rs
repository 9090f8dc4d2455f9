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

use super::links::{self, Placed};
use crate::datapath::options::XdpPolicy;

const PROGRAM: &str = "breaker_xdp";

/// Loads the XDP program into the kernel.
pub(crate) fn load(programs: &mut Ebpf) -> Result<()> {
    program(programs)?.load().with_context(|| format!("load the program {PROGRAM} into the kernel"))
}

/// Attaches the program to an uplink, or replaces the program behind the pinned link. With [`XdpPolicy::Off`] it
/// removes that link. `virtual_`: the interface is a veth.
///
/// # Errors
/// The reason why XDP is not attached, for the operator. tc then handles all packets.
pub(crate) fn attach(programs: &mut Ebpf, index: u32, virtual_: bool, policy: XdpPolicy, pin: &Path) -> Result<Placed> {
    if policy == XdpPolicy::Off {
        links::unpin(pin)?;
        return Ok(Placed::Kept);
    }
    if virtual_ && policy == XdpPolicy::Auto {
        bail!("a veth: native XDP would turn its segmentation offload off");
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

fn program(programs: &mut Ebpf) -> Result<&mut Xdp> {
    let program = programs.program_mut(PROGRAM).with_context(|| format!("the BPF object has no program {PROGRAM}"))?;
    program.try_into().with_context(|| format!("{PROGRAM} is not an XDP program"))
}
