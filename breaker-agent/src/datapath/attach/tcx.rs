//! tcx (kernel 6.6): one pinned link per direction.

use std::path::Path;

use anyhow::Result;
use aya::programs::{
    LinkOrder, SchedClassifier, TcAttachType,
    tc::{SchedClassifierLink, TcAttachOptions},
};

use super::links::{self, Placed};
use crate::datapath::options::AttachOrder;

pub(crate) fn attach(
    program: &mut SchedClassifier,
    name: &str,
    direction: TcAttachType,
    order: AttachOrder,
    pin: &Path,
) -> Result<Placed> {
    let position = match order {
        AttachOrder::First => LinkOrder::first(),
        AttachOrder::Last => LinkOrder::last(),
    };
    links::attach(
        program,
        pin,
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
