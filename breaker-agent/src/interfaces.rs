//! The interfaces that have breaker's programs, and the pods behind them.
//!
//! Attaching a program takes tens of milliseconds: the kernel waits until no CPU runs the old ones (`tcx_entry_sync` in
//! net/tcx.h). A thread of its own attaches ([`work`]), so that neither probes nor decisions nor the operator wait for it.

use std::{
    collections::{BTreeMap, BTreeSet, HashMap},
    sync::mpsc as blocking,
    thread,
};

use anyhow::Context as _;
use breaker_api::status::DatapathStatus;
use tokio::sync::mpsc;

use crate::{
    datapath::{
        attach::{Attached, Attacher, Placed},
        interfaces::{Interface, InterfaceChange, Side, Survey},
        neighbors::LocalPods,
        options::AttachMode,
    },
    metrics::snapshot::InterfaceCounts,
    supervise, view,
};

/// What the thread is asked to do.
#[derive(Debug)]
enum Request {
    /// Attach the programs.
    Attach(Interface),
    /// Forget an interface that is gone.
    Forget(u32),
    /// Forget all interfaces but these.
    ForgetAllBut(BTreeSet<u32>),
    /// Put back what others have taken away. `sockets`: also the programs for the node's own sockets.
    Restore {
        /// Whether to look after the programs for the node's own sockets.
        sockets: bool,
    },
}

/// What the thread has done.
#[derive(Debug)]
pub enum Outcome {
    /// The programs are attached to an interface, or the reason why not.
    Attached(Interface, Result<Attached, String>),
    /// Interfaces that got their programs back, by index, and whether the node's own sockets did.
    Restored {
        /// Interfaces that got their programs back.
        interfaces: Vec<u32>,
        /// The same for the node's own sockets; `None` if nobody asked, or nothing was missing.
        sockets: Option<Result<bool, String>>,
        /// Interfaces whose links could not be pinned.
        unpinned: BTreeSet<u32>,
    },
}

/// Does what is asked for, one request after the other, until nobody asks any more.
fn work(mut attacher: Attacher, requests: &blocking::Receiver<Request>, outcomes: &mpsc::UnboundedSender<Outcome>) {
    while let Ok(request) = requests.recv() {
        let outcome = match request {
            Request::Attach(interface) => {
                let result = supervise::contained_call(|| attacher.attach(&interface).cloned());
                let result = result.and_then(|result| result.map_err(|error| format!("{error:#}")));
                Some(Outcome::Attached(interface, result))
            }
            Request::Forget(index) => {
                attacher.forget(index);
                None
            }
            Request::ForgetAllBut(present) => {
                attacher.forget_all_but(&present);
                None
            }
            Request::Restore { sockets } => Some(restore(&mut attacher, sockets)),
        };
        if outcome.is_some_and(|outcome| outcomes.send(outcome).is_err()) {
            return;
        }
    }
}

fn restore(attacher: &mut Attacher, sockets: bool) -> Outcome {
    let all: Vec<u32> = attacher.attached().keys().copied().collect();
    let mut interfaces = Vec::new();
    for index in all {
        match attacher.restore(index) {
            Ok(Placed::Kept) => {}
            Ok(Placed::New) => interfaces.push(index),
            // It may be on its way out; its end is reported by itself.
            Err(error) => tracing::debug!(index, "cannot look after the programs: {error:#}"),
        }
    }
    let sockets = sockets.then(|| attacher.restore_sockets().map_err(|error| format!("{error:#}")));
    let unpinned = attacher.attached().iter().filter(|(_, attached)| attached.is_unpinned).map(|(index, _)| *index);
    Outcome::Restored { interfaces, sockets, unpinned: unpinned.collect() }
}

/// Attaches the programs as interfaces come and go.
#[derive(Debug)]
pub struct Interfaces {
    /// The attacher, until the thread begins.
    idle: Option<Attacher>,
    requests: blocking::Sender<Request>,
    /// What the thread will be asked, until it begins.
    requested: Option<blocking::Receiver<Request>>,
    mode: AttachMode,
    /// Interfaces that should have the programs, by index, from the latest message about each.
    wanted: BTreeMap<u32, Interface>,
    /// Interfaces with programs.
    attached: BTreeMap<u32, Attached>,
    /// Interfaces whose turn has not come yet.
    waiting: BTreeSet<u32>,
    /// Interfaces to which the programs could not be attached, by index, with the error.
    failed: BTreeMap<u32, String>,
    /// What no program sees, in words.
    notes: Vec<String>,
    /// Whether the thread was asked to put things back and has not answered.
    is_restoring: bool,
    /// Whether every interface of the start had its turn.
    is_complete: bool,
    /// Known pods on this node. `None` before the first search has ended: until then, what an earlier agent found
    /// stays in the maps.
    pods: Option<LocalPods>,
}

impl Interfaces {
    /// Creates the state without any interface.
    #[must_use]
    pub fn new(attacher: Attacher) -> Self {
        let (requests, requested) = blocking::channel();
        Self {
            mode: attacher.mode(),
            idle: Some(attacher),
            requests,
            requested: Some(requested),
            wanted: BTreeMap::new(),
            attached: BTreeMap::new(),
            waiting: BTreeSet::new(),
            failed: BTreeMap::new(),
            notes: Vec::new(),
            is_restoring: false,
            is_complete: false,
            pods: None,
        }
    }

    /// Lets the programs that an earlier agent attached call this agent's full-path programs. Then begins to attach
    /// this agent's programs to the interfaces in `present`. Returns a channel of what was done. Call it once.
    ///
    /// # Errors
    /// The kernel refused a full-path program, or a thread. An interface to which the programs cannot be attached is not
    /// an error.
    pub fn begin(&mut self, present: Survey) -> anyhow::Result<mpsc::UnboundedReceiver<Outcome>> {
        let (done, outcomes) = mpsc::unbounded_channel();
        if let (Some(mut attacher), Some(requested)) = (self.idle.take(), self.requested.take()) {
            attacher.activate()?;
            thread::Builder::new()
                .name("attach".into())
                .spawn(move || work(attacher, &requested, &done))
                .context("start the thread that attaches the programs")?;
        }
        self.notes = present.notes;
        self.attach_all(present.interfaces.into_values().collect());
        self.is_complete = self.waiting.is_empty();
        Ok(outcomes)
    }

    /// Processes a change of an interface.
    pub fn change(&mut self, change: InterfaceChange) {
        match change {
            InterfaceChange::Present(interface) => self.attach(interface),
            InterfaceChange::All(present) => self.attach_all(present),
            InterfaceChange::Gone { index } => {
                self.drop_all_but(|known| known != index);
                self.ask(Request::Forget(index));
            }
            InterfaceChange::Notes(notes) => self.notes = notes,
        }
    }

    /// Processes what the thread has done. Returns what it put back: names of interfaces, or `nodeSockets`.
    pub fn done(&mut self, outcome: Outcome) -> Vec<String> {
        match outcome {
            Outcome::Attached(interface, result) => {
                let (index, name) = (interface.index, &interface.name);
                // The interface may have changed or gone meanwhile: another request is on its way then.
                if self.wanted.get(&index) != Some(&interface) {
                    return Vec::new();
                }
                self.waiting.remove(&index);
                match result {
                    Ok(attached) => {
                        tracing::debug!(interface = name, "attached the programs");
                        self.failed.remove(&index);
                        self.attached.insert(index, attached);
                    }
                    Err(error) => {
                        if self.failed.get(&index) != Some(&error) {
                            tracing::warn!(interface = name, "cannot attach the programs: {error}");
                        }
                        self.attached.remove(&index);
                        self.failed.insert(index, error);
                    }
                }
                if self.waiting.is_empty() && !std::mem::replace(&mut self.is_complete, true) {
                    tracing::info!(interfaces = self.count(), "the programs are attached");
                }
                Vec::new()
            }
            Outcome::Restored { interfaces, sockets, unpinned } => {
                self.is_restoring = false;
                for (index, attached) in &mut self.attached {
                    attached.is_unpinned = unpinned.contains(index);
                }
                let mut back: Vec<String> =
                    interfaces.iter().filter_map(|index| Some(self.wanted.get(index)?.name.clone())).collect();
                match sockets {
                    None | Some(Ok(false)) => {}
                    Some(Ok(true)) => back.push("nodeSockets".into()),
                    Some(Err(error)) => tracing::debug!("cannot look after nodeSockets: {error}"),
                }
                back
            }
        }
    }

    fn ask(&self, request: Request) {
        // The thread ends with the agent.
        let _ = self.requests.send(request);
    }

    fn attach_all(&mut self, present: Vec<Interface>) {
        let indices: BTreeSet<u32> = present.iter().map(|interface| interface.index).collect();
        self.drop_all_but(|index| indices.contains(&index));
        self.ask(Request::ForgetAllBut(indices));
        // Interfaces with programs are included: an index may belong to another interface by now.
        present.into_iter().for_each(|interface| self.attach(interface));
    }

    fn attach(&mut self, interface: Interface) {
        self.waiting.insert(interface.index);
        self.wanted.insert(interface.index, interface.clone());
        self.ask(Request::Attach(interface));
    }

    fn drop_all_but(&mut self, stays: impl Fn(u32) -> bool) {
        self.wanted.retain(|index, _| stays(*index));
        self.attached.retain(|index, _| stays(*index));
        self.failed.retain(|index, _| stays(*index));
        self.waiting.retain(|index| stays(*index));
    }

    /// Begins to put back programs that somebody else has taken away, and to attach those that failed. `sockets`: also
    /// the programs for the node's own sockets.
    pub fn restore(&mut self, sockets: bool) {
        if std::mem::replace(&mut self.is_restoring, true) {
            return;
        }
        let again: Vec<Interface> = self.failed.keys().filter_map(|index| self.wanted.get(index)).cloned().collect();
        for interface in again.into_iter().filter(|interface| interface.obstacle.is_none()) {
            self.ask(Request::Attach(interface));
        }
        self.ask(Request::Restore { sockets });
    }

    /// Adds pods that a search found to those that are known. A known pod keeps its interface until its address
    /// appears behind another one or the interface is gone: the kernel's neighbor tables forget a pod that the node
    /// does not talk to, and connections on the fast path, which bypass the host network stack, do not refresh
    /// them.
    pub fn add_pods(&mut self, pods: LocalPods) {
        let mut known = self.pods.take().unwrap_or_default();
        known.retain(|_, index| self.wanted.contains_key(index));
        known.extend(pods);
        self.pods = Some(known);
    }

    /// The pods behind interfaces with breaker's programs; `None` before the first search has ended. A pod behind
    /// another interface is left out: the programs would not see its replies.
    #[must_use]
    pub fn local_pods(&self) -> Option<LocalPods> {
        let ours = |index: &u32| self.attached.get(index).is_some_and(|attached| attached.interface.side == Side::Pod);
        let pods = self.pods.as_ref()?;
        Some(pods.iter().filter(|(_, index)| ours(index)).map(|(address, index)| (*address, *index)).collect())
    }

    /// How the programs are attached.
    #[must_use]
    pub const fn attach_mode(&self) -> breaker_api::crd::AttachMode {
        view::attach_mode(self.mode)
    }

    /// Number of interfaces with programs.
    #[must_use]
    pub fn count(&self) -> usize {
        self.attached.len()
    }

    /// Numbers of interfaces with programs, and of those that failed: of pods, and of uplinks.
    #[must_use]
    pub fn by_side(&self) -> [InterfaceCounts; 2] {
        let mut counts = [InterfaceCounts::default(); 2];
        for (index, interface) in &self.wanted {
            let counts = &mut counts[usize::from(interface.side == Side::Uplink)];
            counts.attached += u64::from(self.attached.contains_key(index));
            counts.failed += u64::from(self.failed.contains_key(index));
        }
        counts
    }

    /// Number of interfaces of the start that still wait for their programs; 0 from then on.
    #[must_use]
    pub fn waiting_at_start(&self) -> usize {
        if self.is_complete { 0 } else { self.waiting.len() }
    }

    /// Whether an interface is known.
    #[must_use]
    pub fn exists(&self, index: u32) -> bool {
        self.wanted.contains_key(&index)
    }

    /// The name of an interface; its index if it is gone.
    #[must_use]
    pub fn name(&self, index: u32) -> String {
        self.wanted.get(&index).map_or_else(|| format!("interface {index}"), |interface| interface.name.clone())
    }

    /// Interfaces to which the programs could not be attached, each with the error.
    #[must_use]
    pub fn failures(&self) -> Vec<String> {
        self.failed.iter().map(|(index, error)| format!("{}: {error}", self.name(*index))).collect()
    }

    /// What no program sees on this node, in words.
    #[must_use]
    pub fn notes(&self) -> Vec<String> {
        let mut notes = self.notes.clone();
        let unpinned = self.attached.iter().filter(|(_, attached)| attached.is_unpinned);
        let unpinned: Vec<String> = unpinned.map(|(index, _)| self.name(*index)).collect();
        if !unpinned.is_empty() {
            notes.push(format!(
                "the pin directory is out of reach (another file system over it?): the programs on {} end with the agent",
                unpinned.join(", ")
            ));
        }
        notes
    }

    /// The part of a status that is about interfaces; all other fields are empty.
    #[must_use]
    pub fn status(&self) -> DatapathStatus {
        let xdp = self.attached.iter().filter_map(|(index, attached)| {
            let outcome = attached.xdp.clone()?;
            let text = outcome.map_or_else(|why| format!("off, tc alone: {why}"), |()| "native".to_owned());
            Some((self.name(*index), text))
        });
        let mut other_programs: HashMap<&str, Vec<String>> = HashMap::new();
        for (index, attached) in &self.attached {
            for program in &attached.others {
                other_programs.entry(program).or_default().push(self.name(*index));
            }
        }
        DatapathStatus {
            attach: Some(self.attach_mode()),
            interfaces: self.attached.keys().map(|index| self.name(*index)).collect(),
            waiting_interfaces: self.waiting.iter().map(|index| self.name(*index)).collect(),
            failed_interfaces: self.failed.iter().map(|(index, error)| (self.name(*index), error.clone())).collect(),
            other_programs: other_programs.into_iter().map(|(name, on)| (name.to_owned(), on)).collect(),
            notes: self.notes(),
            xdp: xdp.collect(),
            ..DatapathStatus::default()
        }
    }
}
