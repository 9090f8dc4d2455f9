//! Attaching to interfaces, and leaving them as they were.
//!
//! tcx (kernel 6.6): a link per direction, pinned; a restarted agent swaps the program behind the link at once, where it
//! stands. Ours comes first, unless it is to be last, and returns "next", so that everybody behind it runs.
//!
//! clsact: a filter per direction with a priority and handle of its own on the shared qdisc; a restarted agent
//! replaces it in place. The qdisc is removed only if we made it and nobody else's filter is left on it.

use std::{
    collections::{BTreeMap, BTreeSet},
    fs,
    path::{Path, PathBuf},
};

use anyhow::{Context as _, Result, anyhow};
use aya::{
    Ebpf,
    programs::{
        LinkOrder, SchedClassifier, TcAttachType,
        tc::{self, NlOptions, SchedClassifierLink, TcAttachOptions, TcHandle},
    },
    util::KernelVersion,
};
use rustix::net::{AddressFamily, SocketType, netdevice::name_to_index, socket};
use serde::Serialize;

use super::{
    clsact,
    interfaces::{Interface, Side},
    links,
    load::{POD_PROGRAMS, TailCalls, UPLINK_PROGRAMS},
    pins::PinDir,
    sockets, xdp,
};
use crate::config::{AttachMode, AttachOrder, XdpPolicy};

/// Priority of our clsact filters: early, but not the very first numbers that others are fond of; or behind those that the
/// kernel gives (from 0xc000 on downward).
const fn priority(order: AttachOrder) -> u16 {
    match order {
        AttachOrder::First => 0x00b4,
        AttachOrder::Last => 0xffb4,
    }
}

/// Handle of our clsact filters: how we find them again.
const HANDLE: TcHandle = TcHandle::new(0, 0xb4ea);

/// In the order of attaching: nothing may be translated on its way there before its way back is.
const DIRECTIONS: [(TcAttachType, &str); 2] = [(TcAttachType::Egress, "out"), (TcAttachType::Ingress, "in")];

/// What the pin of an XDP link ends in.
const XDP: &str = "xdp";

/// An interface with our programs.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Attached {
    /// Its name when we attached.
    pub name: String,
    /// Whose.
    pub side: Side,
    /// How.
    pub mode: AttachMode,
    /// Whether an uplink has XDP, too, or why not; `None` where it is not wanted.
    pub xdp: Option<Result<(), String>>,
}

/// Attaches programs to interfaces.
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
    /// With loaded programs; the rest as configured.
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

    /// How programs are attached: never `Auto`.
    #[must_use]
    pub const fn mode(&self) -> AttachMode {
        self.mode
    }

    /// Interfaces with our programs, by index.
    #[must_use]
    pub const fn attached(&self) -> &BTreeMap<u32, Attached> {
        &self.attached
    }

    /// Lets the programs that an earlier agent attached call ours; before the first is attached.
    ///
    /// # Errors
    /// What the kernel said.
    pub fn begin(&mut self) -> Result<()> {
        self.tail_calls.lead_to(&self.programs)
    }

    /// Puts the programs on both directions of an interface; on one that has them already, the new ones replace the
    /// old without a gap.
    ///
    /// # Errors
    /// What the kernel said; the interface may have gone meanwhile.
    pub fn attach(&mut self, Interface { index, name, side, is_veth }: &Interface) -> Result<()> {
        let (index, side) = (*index, *side);
        let programs = match side {
            Side::Pod => POD_PROGRAMS,
            Side::Uplink => UPLINK_PROGRAMS,
        };
        for ((direction, suffix), program_name) in DIRECTIONS.into_iter().zip(programs) {
            let program: &mut SchedClassifier = self
                .programs
                .program_mut(program_name)
                .with_context(|| format!("the object has no program {program_name}"))?
                .try_into()
                .with_context(|| format!("{program_name} is no tc program"))?;
            match self.mode {
                AttachMode::Clsact => attach_clsact(program, name, index, direction, self.order, &self.clsact),
                AttachMode::Tcx | AttachMode::Auto => {
                    attach_tcx(program, name, direction, self.order, &self.links.join(format!("{index}_{suffix}")))
                }
            }
            .with_context(|| format!("attach {program_name} to {name}"))?;
        }
        let xdp = (side == Side::Uplink).then(|| {
            let pin = self.links.join(format!("{index}_{XDP}"));
            xdp::attach(&mut self.programs, index, *is_veth, self.xdp, &pin).map_err(|error| format!("{error:#}"))
        });
        if let Some(Err(why)) = &xdp {
            tracing::info!(interface = name, "tc alone, no XDP: {why}");
        }
        let xdp = xdp.filter(|_| self.xdp != XdpPolicy::Off);
        self.attached.insert(index, Attached { name: name.clone(), side, mode: self.mode, xdp });
        Ok(())
    }

    /// Forgets an interface that is gone.
    pub fn forget(&mut self, index: u32) -> Option<Attached> {
        for suffix in DIRECTIONS.map(|(_, suffix)| suffix).into_iter().chain([XDP]) {
            let _ = fs::remove_file(self.links.join(format!("{index}_{suffix}")));
        }
        let _ = fs::remove_dir(self.clsact.join(index.to_string()));
        self.attached.remove(&index)
    }

    /// Forgets interfaces that went while no agent ran, or unheard.
    pub fn forget_all_but(&mut self, present: &BTreeSet<u32>) {
        let pinned = pinned_indices(&self.links).into_iter().chain(pinned_indices(&self.clsact));
        let known: BTreeSet<u32> = pinned.chain(self.attached.keys().copied()).collect();
        for index in known.difference(present) {
            self.forget(*index);
        }
    }
}

/// tcx came with 6.6 (kernel commit e420bed02507).
#[must_use]
pub fn has_tcx() -> bool {
    kernel_at_least(6, 6)
}

/// Whether the running kernel is of this version or later.
#[must_use]
pub fn kernel_at_least(major: u8, minor: u8) -> bool {
    KernelVersion::current().is_ok_and(|version| version >= KernelVersion::new(major, minor, 0))
}

fn attach_tcx(
    program: &mut SchedClassifier,
    name: &str,
    direction: TcAttachType,
    order: AttachOrder,
    pin: &Path,
) -> Result<()> {
    let place = match order {
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
            let id = program.attach_with_options(name, direction, TcAttachOptions::TcxOrder(place))?;
            Ok(program.take_link(id)?.try_into()?)
        },
    )
}

fn attach_clsact(
    program: &mut SchedClassifier,
    name: &str,
    index: u32,
    direction: TcAttachType,
    order: AttachOrder,
    markers: &Path,
) -> Result<()> {
    // A directory is the only thing that bpffs lets us leave as a note.
    let marker = markers.join(index.to_string());
    match tc::qdisc_add_clsact(name) {
        Ok(()) => fs::create_dir_all(&marker).with_context(|| format!("make {}", marker.display()))?,
        // Somebody's, or ours from before.
        Err(error) if format!("{error:?}").contains("EEXIST") || already_there(&error) => {}
        Err(error) => return Err(anyhow!(error).context("add a clsact qdisc")),
    }
    // It stays where an earlier agent put it, as a tcx link does.
    let replaced = [AttachOrder::First, AttachOrder::Last].into_iter().find_map(|order| {
        let existing = SchedClassifierLink::attached(name, direction, priority(order), HANDLE, None).ok()?;
        program.attach_to_link(existing).ok()
    });
    let id = match replaced {
        Some(id) => id,
        None => program.attach_with_options(
            name,
            direction,
            TcAttachOptions::Netlink(NlOptions { priority: priority(order), handle: HANDLE, classid: None }),
        )?,
    };
    // The filter stays when we end; a link that is dropped would take it away.
    std::mem::forget(program.take_link(id)?);
    Ok(())
}

fn already_there(error: &tc::TcError) -> bool {
    let mut source: Option<&dyn std::error::Error> = Some(error);
    while let Some(cause) = source {
        if let Some(io) = cause.downcast_ref::<std::io::Error>() {
            return io.kind() == std::io::ErrorKind::AlreadyExists;
        }
        source = cause.source();
    }
    error.to_string().contains("exists")
}

/// Takes all links and filters of a pin directory away; returns how many.
pub(super) fn detach_all(links: &Path, markers: &Path) -> Result<usize> {
    let mut count = 0;
    let mut paths = Vec::new();
    if let Ok(entries) = fs::read_dir(links) {
        for entry in entries.flatten() {
            paths.push(entry.path());
        }
        // The way there first ("in" before "out"), for the reason above; sockets before both, what asks before what answers.
        paths.sort_by_key(|path| {
            let name = path.to_string_lossy().into_owned();
            (
                !sockets::is_pin(path),
                !(name.ends_with("_in") || name.ends_with("_xdp") || name.contains("_conn") || name.contains("_send")),
            )
        });
        for path in paths {
            // Without its pin a link has no reference left, and the kernel detaches it.
            fs::remove_file(&path).with_context(|| format!("remove {}", path.display()))?;
            count += 1;
        }
    }
    for (index, name) in interfaces()? {
        let ours = DIRECTIONS.into_iter().zip(POD_PROGRAMS).chain(DIRECTIONS.into_iter().zip(UPLINK_PROGRAMS));
        for ((direction, _), program) in ours.rev() {
            if tc::qdisc_detach_program(&name, direction, program).is_ok() {
                count += 1;
            }
        }
        let marker = markers.join(index.to_string());
        if marker.exists() {
            clsact::remove_if_empty(index).with_context(|| {
                format!("the clsact qdisc on {name} is ours; to remove it by hand: tc qdisc del dev {name} clsact")
            })?;
        }
    }
    if let Ok(entries) = fs::read_dir(markers) {
        for entry in entries.flatten() {
            fs::remove_dir(entry.path()).with_context(|| format!("remove {}", entry.path().display()))?;
        }
    }
    Ok(count)
}

/// The interfaces of this network namespace.
fn interfaces() -> Result<Vec<(u32, String)>> {
    let text = fs::read_to_string("/proc/thread-self/net/dev").context("read /proc/thread-self/net/dev")?;
    let socket = socket(AddressFamily::INET, SocketType::DGRAM, None).context("open a socket")?;
    let names = text.lines().skip(2).filter_map(|line| Some(line.split_once(':')?.0.trim().to_owned()));
    Ok(names.filter_map(|name| Some((name_to_index(&socket, &name).ok()?, name))).collect())
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
