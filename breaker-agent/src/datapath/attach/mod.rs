//! Attaches the programs to their hooks. [`super::cleanup`] removes them again.
//!
//! * [`tcx`] (kernel 6.6): one pinned link for each direction. A restarted agent replaces the program behind the link
//!   atomically, and the link keeps its position. breaker's program comes first, unless [`AttachOrder::Last`] is
//!   configured. It returns `TCX_NEXT`, so that the programs behind it run, too.
//! * [`clsact`]: one filter for each direction on the shared qdisc, with a priority and handle of its own. A restarted
//!   agent replaces the filter in place. A cleanup removes the qdisc only if the agent created it and no other filter
//!   is left on it ([`qdisc`]). If the interface has a qdisc of kind ingress, there is no place for clsact.
//! * [`xdp`]: one pinned link on each uplink, in the driver's native mode.
//! * [`cgroup`]: pinned links at the root of the cgroup2 tree, for the node's own sockets.

pub(super) mod cgroup;
pub(super) mod clsact;
mod links;
pub(super) mod qdisc;
mod tcx;
pub(super) mod xdp;

use links::HeldLinks;
pub use links::Placed;

use std::{
    collections::{BTreeMap, BTreeSet},
    fs,
    path::{Path, PathBuf},
};

use anyhow::{Context as _, Result, bail};
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
    /// The interface when the programs were attached.
    pub interface: Interface,
    /// Whether the links could not be pinned: they end with the agent.
    pub is_unpinned: bool,
    /// Names of programs of others on the same hooks, as far as the kernel tells them.
    pub others: Vec<String>,
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
    held: HeldLinks,
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
            held: HeldLinks::default(),
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
    /// The programs cannot work there, or the kernel refused one; the interface may be gone.
    pub fn attach(&mut self, interface: &Interface) -> Result<&Attached> {
        let Interface { index, name, side, .. } = interface;
        if let Some(obstacle) = interface.obstacle {
            bail!("{obstacle}");
        }
        self.attach_tc(interface)?;
        self.remove_other_kind(*index, name);
        let xdp =
            (*side == Side::Uplink).then(|| self.attach_xdp(interface).map(drop).map_err(|error| format!("{error:#}")));
        if let Some(Err(why)) = &xdp {
            tracing::info!(interface = name, "XDP is not attached, tc handles all packets: {why}");
        }
        let attached = Attached {
            interface: interface.clone(),
            is_unpinned: self.is_unpinned(*index),
            others: if self.mode == AttachMode::Tcx { Self::others_on(name) } else { Vec::new() },
            xdp: xdp.filter(|_| self.xdp != XdpPolicy::Off),
        };
        Ok(self.attached.entry(*index).insert_entry(attached).into_mut())
    }

    /// Looks after an interface that got programs: somebody else may have taken them away. Programs that are there stay,
    /// without a gap. Returns [`Placed::New`] if one was missing.
    ///
    /// # Errors
    /// The kernel refused a program; the interface may be gone.
    pub fn restore(&mut self, index: u32) -> Result<Placed> {
        let Some(Attached { interface, xdp, .. }) = self.attached.get(&index).cloned() else {
            return Ok(Placed::Kept);
        };
        let tc = self.attach_tc(&interface)?;
        let xdp = if xdp == Some(Ok(())) { self.attach_xdp(&interface)? } else { Placed::Kept };
        let is_unpinned = self.is_unpinned(index);
        if let Some(attached) = self.attached.get_mut(&index) {
            attached.is_unpinned = is_unpinned;
        }
        Ok(tc.or(xdp))
    }

    /// Attaches the programs for the node's own sockets again, if they are gone. Returns whether they were.
    ///
    /// # Errors
    /// The kernel refused a program, or the pins are out of reach.
    pub fn restore_sockets(&mut self) -> Result<bool> {
        cgroup::restore(&mut self.programs, &self.links)
    }

    fn attach_tc(&mut self, Interface { index, name, side, .. }: &Interface) -> Result<Placed> {
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
                AttachMode::Clsact => clsact::attach(program, name, *index, direction, self.order, &self.clsact),
                AttachMode::Tcx | AttachMode::Auto => {
                    let pin = tcx::pin(&self.links, *index, suffix);
                    tcx::attach(program, (*index, name), direction, self.order, &pin, &mut self.held)
                }
            }
            .with_context(|| format!("attach {program_name} to {name}"))?;
            placed = placed.or(here);
        }
        Ok(placed)
    }

    /// Removes what an agent with another `agent.attach` left on the interface.
    fn remove_other_kind(&mut self, index: u32, name: &str) {
        match self.mode {
            AttachMode::Clsact => self.forget_links(index, DIRECTIONS.map(|(_, suffix)| suffix)),
            AttachMode::Tcx | AttachMode::Auto => {
                let marker = self.clsact.join(index.to_string());
                if marker.exists()
                    && let Err(error) = clsact::detach(index, name, &self.clsact)
                {
                    tracing::warn!(interface = name, "cannot remove an earlier agent's filters: {error:#}");
                }
            }
        }
    }

    fn is_unpinned(&self, index: u32) -> bool {
        DIRECTIONS.iter().any(|(_, suffix)| self.held.has(&tcx::pin(&self.links, index, suffix)))
    }

    /// Names of the programs of others on an interface, as far as this process may ask for them.
    fn others_on(name: &str) -> Vec<String> {
        let programs = DIRECTIONS.iter().filter_map(|(direction, _)| SchedClassifier::query_tcx(name, *direction).ok());
        let names: BTreeSet<String> =
            programs.flat_map(|(_, programs)| programs).filter_map(|p| p.name_as_str().map(str::to_owned)).collect();
        let ours = |name: &String| POD_PROGRAMS.iter().chain(&UPLINK_PROGRAMS).any(|ours| ours == name);
        names.into_iter().filter(|name| !ours(name)).collect()
    }

    fn attach_xdp(&mut self, interface: &Interface) -> Result<Placed> {
        let pin = tcx::pin(&self.links, interface.index, XDP);
        xdp::attach(&mut self.programs, interface, self.xdp, &pin, &mut self.held)
    }

    fn forget_links(&mut self, index: u32, suffixes: impl IntoIterator<Item = &'static str>) {
        for suffix in suffixes {
            let pin = tcx::pin(&self.links, index, suffix);
            self.held.forget(&pin);
            let _ = fs::remove_file(pin);
        }
    }

    /// Removes the pins of an interface that is gone. Returns its entry, if it had programs.
    pub fn forget(&mut self, index: u32) -> Option<Attached> {
        self.forget_links(index, DIRECTIONS.map(|(_, suffix)| suffix).into_iter().chain([XDP]));
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
