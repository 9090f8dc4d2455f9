//! tcx (kernel 6.6): one pinned link per direction.

use std::path::{Path, PathBuf};

use anyhow::Result;
use aya::programs::{
    LinkOrder, SchedClassifier, TcAttachType,
    tc::{SchedClassifierLink, TcAttachOptions},
};

use super::links::{self, HeldLinks, Placed};
use crate::datapath::{
    options::AttachOrder,
    sys::{self, TcxEntry},
};

/// Path of the pin of an interface's link. `suffix`: see [`super::DIRECTIONS`].
pub(crate) fn pin(links: &Path, index: u32, suffix: &str) -> PathBuf {
    links.join(format!("{index}_{suffix}"))
}

pub(crate) fn attach(
    program: &mut SchedClassifier,
    (index, name): (u32, &str),
    direction: TcAttachType,
    order: AttachOrder,
    pin: &Path,
    held: &mut HeldLinks,
) -> Result<Placed> {
    // The pin may be hidden, and its link in place: then another link would make the program run twice.
    if !held.has(pin) && !pin.parent().is_none_or(Path::is_dir) {
        let id = program.info().map(|info| info.id()).unwrap_or_default();
        if sys::tcx_entries(index, direction).is_ok_and(|entries| entries.iter().any(|entry| entry.program == id)) {
            return Ok(Placed::Kept);
        }
    }
    let position = match order {
        AttachOrder::First => LinkOrder::first(),
        AttachOrder::Last => LinkOrder::last(),
    };
    links::attach(
        program,
        pin,
        held,
        |link| {
            let Ok(info) = link.info() else { return false };
            let is_it = |entry: &TcxEntry| entry.link == info.id();
            // Without an answer of the kernel, the pin is believed.
            sys::tcx_entries(index, direction).map_or(true, |entries| entries.iter().any(is_it))
        },
        |program, link| {
            let id = program.attach_to_link(SchedClassifierLink::try_from(link)?)?;
            Ok(program.take_link(id)?.try_into()?)
        },
        |program| {
            let id = program.attach_with_options(name, direction, TcAttachOptions::TcxOrder(position))?;
            Ok(program.take_link(id)?.try_into()?)
        },
    )
}
