//! Attaches the programs to their hooks. [`super::cleanup`] removes them again.
//!
//! * [`tcx`] (kernel 6.6): one pinned link for each direction. A restarted agent replaces the program behind the link
//!   atomically, and the link keeps its position. breaker's program comes first, unless [`AttachOrder::Last`] is
//!   configured. It returns `TCX_NEXT`, so that the programs behind it run, too.
//! * [`clsact`]: one filter for each direction on the shared qdisc, with a priority and handle of its own. A restarted
//!   agent replaces the filter in place. A cleanup removes the qdisc only if the agent created it and no other filter
//!   is left on it ([`qdisc_removal`]).
//! * [`xdp`]: one pinned link on each uplink, in the driver's native mode.
//! * [`cgroup`]: pinned links at the root of the cgroup2 tree, for the node's own sockets.

pub(super) mod cgroup;
pub(super) mod clsact;
mod links;
pub(super) mod qdisc_removal;
mod tcx;
pub(super) mod xdp;

pub use links::Placed;

use std::{
    collections::{BTreeMap, BTreeSet},
    fs,
    path::{Path, PathBuf},
};

use anyhow::{Context as _, Result};
use aya::{
    Ebpf,
    programs::{SchedClassifier, TcAttachType},
};

use super::{
    interfaces::{Interface, Side},
    options::{AttachMode, AttachOrder, XdpPolicy},
    pins::PinDir,
    sys::has_tcx,
    tail_calls::TailCalls,
};

/// The directions in the order of attaching. Egress comes first, because replies must be translated back before the
/// first request is translated.
pub(super) const DIRECTIONS: [(TcAttachType, &str); 2] = [(TcAttachType::Egress, "out"), (TcAttachType::Ingress, "in")];

/// Names of the programs for a pod's interface, in the order of attaching: egress, ingress.
pub(super) const POD_PROGRAMS: [&str; 2] = ["breaker_out", "breaker_in"];

/// Names of the programs for an uplink, in the order of attaching: egress, ingress.
pub(super) const UPLINK_PROGRAMS: [&str; 2] = ["breaker_up_out", "breaker_up"];

/// Suffix of the pin of an XDP link.
const XDP: &str = "xdp";

/// An interface that has breaker's programs.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Attached {
    /// Name of the interface when the programs were attached.
    pub name: String,
    /// What is behind the interface.
    pub side: Side,
    /// How the programs are attached.
    pub mode: AttachMode,
    /// Whether the interface is a veth.
    pub is_veth: bool,
    /// Whether XDP is attached, or why not; `None` for a pod's interface, or if XDP is off.
    pub xdp: Option<Result<(), String>>,
}

/// Attaches the programs to interfaces, and records which interfaces have them.
#[derive(Debug)]
pub struct Attacher {
    programs: Ebpf,
    tail_calls: TailCalls,
    links: PathBuf,
    clsact: PathBuf,
    mode: AttachMode,
    order: AttachOrder,
    xdp: XdpPolicy,
    attached: BTreeMap<u32, Attached>,
}

impl Attacher {
    /// Takes loaded programs, the directory for pins, and the configured options.
    #[must_use]
    pub fn new(
        programs: Ebpf,
        tail_calls: TailCalls,
        pins: &PinDir,
        mode: AttachMode,
        order: AttachOrder,
        xdp: XdpPolicy,
    ) -> Self {
        let mode = match mode {
            AttachMode::Auto if has_tcx() => AttachMode::Tcx,
            AttachMode::Auto => AttachMode::Clsact,
            chosen => chosen,
        };
        Self {
            programs,
            tail_calls,
            links: pins.links(),
            clsact: pins.clsact(),
            mode,
            order,
            xdp,
            attached: BTreeMap::new(),
        }
    }

    /// Returns how programs are attached; never [`AttachMode::Auto`].
    #[must_use]
    pub const fn mode(&self) -> AttachMode {
        self.mode
    }

    /// Returns the interfaces that have breaker's programs, by interface index.
    #[must_use]
    pub const fn attached(&self) -> &BTreeMap<u32, Attached> {
        &self.attached
    }

    /// Puts the new full-path programs into the tail-call map, so that prefilters of an earlier agent call them,
    /// too. Call it before the first [`Attacher::attach`].
    ///
    /// # Errors
    /// The kernel refused a program.
    pub fn activate(&mut self) -> Result<()> {
        self.tail_calls.install_tail_calls(&self.programs)
    }

    /// Attaches the programs to both directions of an interface. If it already has breaker's programs, the new ones
    /// replace them without a gap. An uplink gets XDP as well, if configured; a failure of XDP is logged and is not
    /// an error.
    ///
    /// # Errors
    /// The kernel refused a program; the interface may be gone.
    pub fn attach(&mut self, Interface { index, name, side, is_veth }: &Interface) -> Result<()> {
        let (index, side) = (*index, *side);
        self.attach_tc(index, name, side)?;
        let xdp = (side == Side::Uplink)
            .then(|| self.attach_xdp(index, *is_veth).map(drop).map_err(|error| format!("{error:#}")));
        if let Some(Err(why)) = &xdp {
            tracing::info!(interface = name, "XDP is not attached, tc handles all packets: {why}");
        }
        let xdp = xdp.filter(|_| self.xdp != XdpPolicy::Off);
        self.attached.insert(index, Attached { name: name.clone(), side, mode: self.mode, is_veth: *is_veth, xdp });
        Ok(())
    }

    /// Looks after an interface that got programs: somebody else may have taken them away. Programs that are there stay,
    /// without a gap. Returns [`Placed::New`] if one was missing. `name` is the interface's name now.
    ///
    /// # Errors
    /// The kernel refused a program; the interface may be gone.
    pub fn restore(&mut self, index: u32, name: &str) -> Result<Placed> {
        let Some(Attached { side, is_veth, xdp, .. }) = self.attached.get(&index).cloned() else {
            return Ok(Placed::Kept);
        };
        let tc = self.attach_tc(index, name, side)?;
        let xdp = if xdp == Some(Ok(())) { self.attach_xdp(index, is_veth)? } else { Placed::Kept };
        Ok(tc.or(xdp))
    }

    /// Attaches the programs for the node's own sockets again, if they are gone. Returns whether they were.
    ///
    /// # Errors
    /// The kernel refused a program, or the pins are out of reach.
    pub fn restore_sockets(&mut self) -> Result<bool> {
        cgroup::restore(&mut self.programs, &self.links)
    }

    fn attach_tc(&mut self, index: u32, name: &str, side: Side) -> Result<Placed> {
        let programs = match side {
            Side::Pod => POD_PROGRAMS,
            Side::Uplink => UPLINK_PROGRAMS,
        };
        let mut placed = Placed::Kept;
        for ((direction, suffix), program_name) in DIRECTIONS.into_iter().zip(programs) {
            let program: &mut SchedClassifier = self
                .programs
                .program_mut(program_name)
                .with_context(|| format!("the BPF object has no program {program_name}"))?
                .try_into()
                .with_context(|| format!("{program_name} is not a tc program"))?;
            let here = match self.mode {
                AttachMode::Clsact => clsact::attach(program, name, index, direction, self.order, &self.clsact),
                AttachMode::Tcx | AttachMode::Auto => {
                    tcx::attach(program, name, direction, self.order, &self.links.join(format!("{index}_{suffix}")))
                }
            }
            .with_context(|| format!("attach {program_name} to {name}"))?;
            placed = placed.or(here);
        }
        Ok(placed)
    }

    fn attach_xdp(&mut self, index: u32, is_veth: bool) -> Result<Placed> {
        let pin = self.links.join(format!("{index}_{XDP}"));
        xdp::attach(&mut self.programs, index, is_veth, self.xdp, &pin)
    }

    /// Removes the pins of an interface that is gone. Returns its entry, if it had programs.
    pub fn forget(&mut self, index: u32) -> Option<Attached> {
        for suffix in DIRECTIONS.map(|(_, suffix)| suffix).into_iter().chain([XDP]) {
            let _ = fs::remove_file(self.links.join(format!("{index}_{suffix}")));
        }
        let _ = fs::remove_dir(self.clsact.join(index.to_string()));
        self.attached.remove(&index)
    }

    /// Removes the pins of all interfaces that are not in `present`: they went while no agent ran, or the message
    /// was lost.
    pub fn forget_all_but(&mut self, present: &BTreeSet<u32>) {
        let pinned = pinned_indices(&self.links).into_iter().chain(pinned_indices(&self.clsact));
        let known: BTreeSet<u32> = pinned.chain(self.attached.keys().copied()).collect();
        for index in known.difference(present) {
            self.forget(*index);
        }
    }
}

fn pinned_indices(dir: &Path) -> Vec<u32> {
    let Ok(entries) = fs::read_dir(dir) else { return Vec::new() };
    entries
        .flatten()
        .filter_map(|entry| {
            let name = entry.file_name();
            let name = name.to_str()?;
            name.split('_').next()?.parse().ok()
        })
        .collect()
}
