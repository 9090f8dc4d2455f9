//! The interfaces that have breaker's programs, and the pods behind them.

use std::collections::{BTreeMap, BTreeSet, HashMap};

use breaker_api::status::DatapathStatus;

use crate::{
    datapath::{
        attach::{Attacher, Placed},
        interfaces::{Interface, InterfaceChange, Side},
        neighbors::LocalPods,
    },
    view,
};

/// Attaches the programs as interfaces come and go.
#[derive(Debug)]
pub struct Interfaces {
    attacher: Attacher,
    /// Interfaces to which the programs could not be attached, by index: name and error.
    failed: BTreeMap<u32, (String, String)>,
    /// Names of the interfaces by index, from the latest message about each.
    names: HashMap<u32, String>,
    /// Known pods on this node. `None` before the first search has ended: until then, what an earlier agent found
    /// stays in the maps.
    pods: Option<LocalPods>,
}

impl Interfaces {
    /// Creates the state without any interface.
    #[must_use]
    pub fn new(attacher: Attacher) -> Self {
        Self { attacher, failed: BTreeMap::new(), names: HashMap::new(), pods: None }
    }

    /// Lets the programs that an earlier agent attached call this agent's full-path programs. Then attaches this
    /// agent's programs to the interfaces in `present`.
    ///
    /// # Errors
    /// The kernel refused a full-path program. An interface to which the programs cannot be attached is not an error.
    pub fn activate(&mut self, present: Vec<Interface>) -> anyhow::Result<()> {
        self.attacher.activate()?;
        self.attach_all(present);
        Ok(())
    }

    /// Processes a change of an interface.
    pub fn change(&mut self, change: InterfaceChange) {
        match change {
            InterfaceChange::Present(interface) => match self.attacher.attached().get(&interface.index) {
                // A veth becomes an uplink when a default route is added that leaves by it.
                Some(attached) if attached.side == interface.side => {
                    self.names.insert(interface.index, interface.name);
                }
                _ => self.attach(interface),
            },
            InterfaceChange::All(present) => self.attach_all(present),
            InterfaceChange::Gone { index } => {
                self.names.remove(&index);
                self.failed.remove(&index);
                if let Some(gone) = self.attacher.forget(index) {
                    tracing::debug!(interface = gone.name, "the interface is gone");
                }
            }
        }
    }

    fn attach_all(&mut self, present: Vec<Interface>) {
        let indices: BTreeSet<u32> = present.iter().map(|interface| interface.index).collect();
        self.attacher.forget_all_but(&indices);
        self.names.retain(|index, _| indices.contains(index));
        self.failed.retain(|index, _| indices.contains(index));
        // Interfaces with programs are included: an index may belong to another interface by now.
        present.into_iter().for_each(|interface| self.attach(interface));
    }

    fn attach(&mut self, interface: Interface) {
        let outcome = self.attacher.attach(&interface);
        let Interface { index, name, .. } = interface;
        self.names.insert(index, name.clone());
        match outcome {
            Ok(()) => {
                tracing::debug!(interface = name, "attached the programs");
                self.failed.remove(&index);
            }
            Err(error) => {
                tracing::warn!(interface = name, "cannot attach the programs: {error:#}");
                self.failed.insert(index, (name, format!("{error:#}")));
            }
        }
    }

    /// Puts back programs that somebody else has taken away. Returns the names of the interfaces that got them back.
    pub fn restore(&mut self) -> Vec<String> {
        let attached = self.attacher.attached().iter();
        let all: Vec<(u32, String)> = attached
            .map(|(index, attached)| (*index, self.names.get(index).unwrap_or(&attached.name).clone()))
            .collect();
        let mut back = Vec::new();
        for (index, name) in all {
            match self.attacher.restore(index, &name) {
                Ok(Placed::Kept) => {}
                Ok(Placed::New) => back.push(name),
                // It may be on its way out; its end is reported by itself.
                Err(error) => tracing::debug!(interface = name, "cannot look after the programs: {error:#}"),
            }
        }
        back
    }

    /// Attaches the programs for the node's own sockets again, if somebody has taken them away. Returns whether they were
    /// gone.
    ///
    /// # Errors
    /// The kernel refused a program, or the pins are out of reach.
    pub fn restore_sockets(&mut self) -> anyhow::Result<bool> {
        self.attacher.restore_sockets()
    }

    /// Adds pods that a search found to those that are known. A known pod keeps its interface until its address
    /// appears behind another one or the interface is gone: the kernel's neighbor tables forget a pod that the node
    /// does not talk to, and connections on the fast path, which bypass the host network stack, do not refresh
    /// them.
    pub fn add_pods(&mut self, pods: LocalPods) {
        let mut known = self.pods.take().unwrap_or_default();
        known.retain(|_, index| self.names.contains_key(index));
        known.extend(pods);
        self.pods = Some(known);
    }

    /// The pods behind interfaces with breaker's programs; `None` before the first search has ended. A pod behind
    /// another interface is left out: the programs would not see its replies.
    #[must_use]
    pub fn local_pods(&self) -> Option<LocalPods> {
        let attached = self.attacher.attached();
        let ours = |index: &u32| attached.get(index).is_some_and(|attached| attached.side == Side::Pod);
        let pods = self.pods.as_ref()?;
        Some(pods.iter().filter(|(_, index)| ours(index)).map(|(address, index)| (*address, *index)).collect())
    }

    /// How the programs are attached.
    #[must_use]
    pub const fn attach_mode(&self) -> breaker_api::crd::AttachMode {
        view::attach_mode(self.attacher.mode())
    }

    /// Number of interfaces with programs.
    #[must_use]
    pub fn count(&self) -> usize {
        self.attacher.attached().len()
    }

    /// Interfaces to which the programs could not be attached, each with the error.
    #[must_use]
    pub fn failures(&self) -> Vec<String> {
        self.failed.values().map(|(name, error)| format!("{name}: {error}")).collect()
    }

    /// The part of a status that is about interfaces; all other fields are empty.
    #[must_use]
    pub fn status(&self) -> DatapathStatus {
        let name_of = |index: &u32, then: &str| self.names.get(index).cloned().unwrap_or_else(|| then.to_owned());
        let attached = self.attacher.attached();
        let xdp = attached.iter().filter_map(|(index, attached)| {
            let outcome = attached.xdp.clone()?;
            let text = outcome.map_or_else(|why| format!("off, tc alone: {why}"), |()| "native".to_owned());
            Some((name_of(index, &attached.name), text))
        });
        DatapathStatus {
            attach: Some(self.attach_mode()),
            interfaces: attached.iter().map(|(index, attached)| name_of(index, &attached.name)).collect(),
            failed_interfaces: self.failed.values().cloned().collect(),
            xdp: xdp.collect(),
            ..DatapathStatus::default()
        }
    }
}
