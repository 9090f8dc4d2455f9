//! Watches the node's network interfaces: by netlink messages, without polling. [`devices`] decides which of them get the
//! programs, [`uplinks`] knows the default routes.

mod devices;
mod uplinks;

use std::collections::BTreeMap;

use anyhow::{Context as _, Result};
use futures_util::{StreamExt as _, TryStreamExt as _};
use globset::Glob;
use rtnetlink::{
    Handle, MulticastGroup, new_connection, new_multicast_connection,
    packet_core::{NLM_F_REPLACE, NetlinkMessage, NetlinkPayload},
    packet_route::{AddressFamily, RouteNetlinkMessage},
};
use tokio::sync::mpsc;

use self::{
    devices::{Device, Devices},
    uplinks::Uplinks,
};

/// What is behind an interface.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Side {
    /// A pod.
    Pod,
    /// The network: external clients and other nodes.
    Uplink,
}

/// Which interfaces get the programs.
#[derive(Clone, Debug)]
pub struct Wanted {
    /// Whether host-side interfaces of pods (veth, netkit) get them.
    pub veths: bool,
    /// Whether interfaces of default routes get them.
    pub uplinks: bool,
    /// Patterns for names, or alternative names, of other interfaces that get them.
    pub globs: Vec<Glob>,
}

/// A change of an interface that gets the programs.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum InterfaceChange {
    /// The interface exists, or has changed.
    Present(Interface),
    /// The interface is gone, or gets the programs no more.
    Gone {
        /// Index of the interface.
        index: u32,
    },
    /// Messages were lost. The list is complete: all other interfaces are gone, and the listed ones may have changed.
    All(Vec<Interface>),
    /// What no program of breaker can see on this node has changed: see [`Devices::notes`].
    Notes(Vec<String>),
}

/// An interface that gets the programs.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Interface {
    /// Interface index.
    pub index: u32,
    /// Interface name.
    pub name: String,
    /// What is behind the interface.
    pub side: Side,
    /// Whether the interface is a veth.
    pub is_veth: bool,
    /// Why the programs cannot work on the interface. It then gets none.
    pub obstacle: Option<&'static str>,
    /// Why XDP cannot work on the interface.
    pub xdp_obstacle: Option<&'static str>,
}

/// The interfaces that get the programs, and what no program sees.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Survey {
    /// By index.
    pub interfaces: BTreeMap<u32, Interface>,
    /// In words, for the operator.
    pub notes: Vec<String>,
}

/// The kernel's view of the node's interfaces.
struct Watch {
    what: Wanted,
    devices: Devices,
    uplinks: Uplinks,
    /// What the receiver knows.
    told: Survey,
}

impl Watch {
    async fn read(handle: &Handle, what: Wanted) -> Result<Self> {
        let (devices, uplinks) = (read_devices(handle).await?, Uplinks::read(handle).await);
        let told = devices.survey(&what, &uplinks);
        Ok(Self { what, devices, uplinks, told })
    }

    /// Takes over a message. Returns whether anything that matters may have changed.
    fn update(&mut self, message: NetlinkMessage<RouteNetlinkMessage>) -> bool {
        let replaces = message.header.flags & NLM_F_REPLACE != 0;
        let NetlinkPayload::InnerMessage(message) = message.payload else { return false };
        match message {
            // Bridges send messages about their ports, too. A veth that leaves its bridge still exists.
            RouteNetlinkMessage::NewLink(link) if link.header.interface_family != AddressFamily::Bridge => {
                self.devices.insert(Device::of(&link));
                true
            }
            RouteNetlinkMessage::DelLink(link) if link.header.interface_family != AddressFamily::Bridge => {
                self.uplinks.forget(link.header.index);
                self.devices.remove(link.header.index);
                true
            }
            RouteNetlinkMessage::NewRoute(route) => self.uplinks.add(&route, replaces),
            // An interface without its default route keeps the programs: flows may still be alive on it.
            RouteNetlinkMessage::DelRoute(route) => {
                self.uplinks.remove(&route);
                false
            }
            _ => false,
        }
    }

    /// What has changed for the receiver since the last call. An interface that has programs keeps them for as long as it
    /// exists, unless they cannot work on it any more.
    fn changes(&mut self) -> Vec<InterfaceChange> {
        let mut now = self.devices.survey(&self.what, &self.uplinks);
        for (index, before) in &self.told.interfaces {
            if let Some(device) = self.devices.get(*index)
                && !now.interfaces.contains_key(index)
                && !self.devices.is_covered_below(device)
            {
                now.interfaces.insert(*index, Interface { name: device.name.clone(), ..before.clone() });
            }
        }
        let mut changes = Vec::new();
        let gone = self.told.interfaces.keys().filter(|index| !now.interfaces.contains_key(index));
        changes.extend(gone.map(|index| InterfaceChange::Gone { index: *index }));
        let other = now.interfaces.values().filter(|new| self.told.interfaces.get(&new.index) != Some(new));
        changes.extend(other.cloned().map(InterfaceChange::Present));
        if self.told.notes != now.notes {
            changes.push(InterfaceChange::Notes(now.notes.clone()));
        }
        self.told = now;
        changes
    }
}

/// Starts to watch the interfaces. Returns those that exist already, and a channel of all later changes. A change
/// may repeat a state that the caller already knows.
///
/// # Errors
/// The netlink socket cannot be opened, or the list of interfaces cannot be read.
pub async fn watch(what: Wanted) -> Result<(Survey, mpsc::Receiver<InterfaceChange>)> {
    // A default route makes an interface an uplink, and may be added after the interface. This also tells whether a veth
    // leads to a pod, so it matters where uplinks get no programs, too.
    let groups = &[MulticastGroup::Link, MulticastGroup::Ipv4Route, MulticastGroup::Ipv6Route];
    // Subscribe before reading the list: a change in between is then reported twice rather than never.
    let (connection, handle, mut messages) = new_multicast_connection(groups).context("open a netlink socket")?;
    tokio::spawn(connection);
    let mut watch = Watch::read(&handle, what).await?;
    let present = watch.told.clone();
    let (sender, receiver) = mpsc::channel(1024);
    tokio::spawn(async move {
        while let Some((message, _)) = messages.next().await {
            // The socket's receive buffer overflowed and messages are lost: read everything again.
            let lost = matches!(message.payload, NetlinkPayload::Overrun(_));
            let changes = if lost {
                match Watch::read(&handle, watch.what.clone()).await {
                    Ok(again) => {
                        watch = again;
                        let all = watch.told.interfaces.values().cloned().collect();
                        vec![InterfaceChange::All(all), InterfaceChange::Notes(watch.told.notes.clone())]
                    }
                    Err(error) => {
                        tracing::warn!("cannot list the network interfaces, changes may be missed: {error:#}");
                        Vec::new()
                    }
                }
            } else if watch.update(message) {
                watch.changes()
            } else {
                Vec::new()
            };
            for change in changes {
                if sender.send(change).await.is_err() {
                    return;
                }
            }
        }
    });
    Ok((present, receiver))
}

/// Reads the interfaces once.
///
/// # Errors
/// The netlink socket cannot be opened, or the list of interfaces cannot be read.
pub async fn survey(what: Wanted) -> Result<Survey> {
    let (connection, handle, _) = new_connection().context("open a netlink socket")?;
    tokio::spawn(connection);
    Ok(Watch::read(&handle, what).await?.told)
}

async fn read_devices(handle: &Handle) -> Result<Devices> {
    let mut links = handle.link().get().execute();
    let mut devices = Devices::default();
    while let Some(link) = links.try_next().await.context("list the interfaces")? {
        if link.header.interface_family != AddressFamily::Bridge {
            devices.insert(Device::of(&link));
        }
    }
    Ok(devices)
}
