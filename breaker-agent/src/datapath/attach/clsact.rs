//! clsact (kernels before 6.6): one filter per direction on the shared qdisc.

use std::{fs, path::Path};

use anyhow::{Context as _, Result, bail};
use aya::programs::{
    SchedClassifier, TcAttachType,
    tc::{self, NlOptions, SchedClassifierLink, TcAttachOptions, TcError, TcHandle},
};

use super::{DIRECTIONS, POD_PROGRAMS, UPLINK_PROGRAMS, links::Placed, qdisc};
use crate::datapath::options::AttachOrder;

/// Priority of breaker's clsact filters. `First` is early, but not among the very first numbers, which others like
/// to use. `Last` is behind the priorities that the kernel assigns by itself (from 0xc000 downward).
const fn priority(order: AttachOrder) -> u16 {
    match order {
        AttachOrder::First => 0x00b4,
        AttachOrder::Last => 0xffb4,
    }
}

/// Handle of breaker's clsact filters, by which the agent finds them again.
const HANDLE: TcHandle = TcHandle::new(0, 0xb4ea);

pub(crate) fn attach(
    program: &mut SchedClassifier,
    name: &str,
    index: u32,
    direction: TcAttachType,
    order: AttachOrder,
    markers: &Path,
) -> Result<Placed> {
    // The marker records that the agent created the qdisc. It is a directory, because bpffs has no regular files.
    let marker = markers.join(index.to_string());
    match tc::qdisc_add_clsact(name) {
        Ok(()) => fs::create_dir_all(&marker).with_context(|| format!("create {}", marker.display()))?,
        // The qdisc belongs to somebody else, or an earlier agent created it. One of kind ingress has the same place, and
        // a filter for egress would end up on ingress.
        Err(TcError::NetlinkError(error)) if error.raw_os_error() == Some(libc::EEXIST) => {
            let theirs = if marker.exists() { None } else { qdisc::kind_on_ingress(index)? };
            if let Some(kind) = theirs.filter(|kind| kind != "clsact") {
                bail!(
                    "the interface has a qdisc of kind {kind} (the CNI's bandwidth plugin makes one of kind ingress), \
                     which leaves no place for clsact; kernel 6.6 and later need no qdisc"
                );
            }
        }
        Err(error) => return Err(error).context("add a clsact qdisc"),
    }
    // A filter of an earlier agent keeps its priority, as a tcx link keeps its position.
    let replaced = [AttachOrder::First, AttachOrder::Last].into_iter().find_map(|order| {
        let existing = SchedClassifierLink::attached(name, direction, priority(order), HANDLE, None).ok()?;
        program.attach_to_link(existing).ok()
    });
    let (id, placed) = match replaced {
        Some(id) => (id, Placed::Kept),
        None => (
            program.attach_with_options(
                name,
                direction,
                TcAttachOptions::Netlink(NlOptions { priority: priority(order), handle: HANDLE, classid: None }),
            )?,
            Placed::New,
        ),
    };
    // The filter must outlive the agent, but dropping the link would remove it.
    std::mem::forget(program.take_link(id)?);
    Ok(placed)
}

/// Removes breaker's filters of an interface, and the qdisc if the agent created it and it is empty. Returns the
/// number of filters removed.
///
/// # Errors
/// The qdisc or its marker cannot be removed.
pub(crate) fn detach(index: u32, name: &str, markers: &Path) -> Result<usize> {
    // Requests before replies, the opposite of `DIRECTIONS`.
    let ours = DIRECTIONS.into_iter().zip(POD_PROGRAMS).chain(DIRECTIONS.into_iter().zip(UPLINK_PROGRAMS)).rev();
    let mut removed = 0;
    for ((direction, _), program) in ours {
        // An error means that the interface has no filter with this program.
        if tc::qdisc_detach_program(name, direction, program).is_ok() {
            removed += 1;
        }
    }
    let marker = markers.join(index.to_string());
    if marker.exists() {
        qdisc::remove_if_empty(index).with_context(|| {
            format!("remove breaker's clsact qdisc on {name}; to remove it by hand: tc qdisc del dev {name} clsact")
        })?;
        fs::remove_dir(&marker).with_context(|| format!("remove {}", marker.display()))?;
    }
    Ok(removed)
}
