//! Which interfaces there are, as they come and go: by netlink, not by polling.

use anyhow::{Context as _, Result};
use futures_util::{StreamExt as _, TryStreamExt as _};
use globset::GlobSet;
use rtnetlink::{
    Handle, MulticastGroup, new_multicast_connection,
    packet_core::NetlinkPayload,
    packet_route::{
        AddressFamily, RouteNetlinkMessage,
        link::{InfoKind, LinkAttribute, LinkInfo, LinkMessage},
    },
};
use tokio::sync::mpsc;

/// Who is behind an interface.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Side {
    /// A pod.
    Pod,
    /// The network: clients outside, and other nodes.
    Uplink,
}

/// Which interfaces get programs.
#[derive(Clone, Debug)]
pub struct Wanted {
    /// Host-side veths of pods.
    pub veths: bool,
    /// Interfaces that a default route leaves by.
    pub uplinks: bool,
    /// Others, by name.
    pub globs: GlobSet,
}

/// What happened to an interface that the programs belong on.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum InterfaceChange {
    /// It is there.
    Present {
        /// Its index.
        index: u32,
        /// Its name.
        name: String,
        /// Who is behind it.
        side: Side,
    },
    /// It is gone.
    Gone {
        /// Its index.
        index: u32,
    },
}

/// Starts to watch. Returns the interfaces that are there already, and a channel of changes from then on (a change may
/// repeat what is known).
///
/// # Errors
/// No netlink socket, or a dump that fails.
pub async fn watch(what: Wanted) -> Result<(Vec<InterfaceChange>, mpsc::Receiver<InterfaceChange>)> {
    // Subscribed before the dump: what comes in between is told twice rather than never.
    let (connection, handle, mut messages) =
        new_multicast_connection(&[MulticastGroup::Link]).context("open a netlink socket")?;
    tokio::spawn(connection);
    let wanted = move |message: &LinkMessage| wanted(message, &what);
    let present = list(&handle, &wanted).await?;
    let (sender, receiver) = mpsc::channel(1024);
    tokio::spawn(async move {
        while let Some((message, _)) = messages.next().await {
            let changes = match message.payload {
                NetlinkPayload::InnerMessage(RouteNetlinkMessage::NewLink(message)) => {
                    wanted(&message).into_iter().collect()
                }
                NetlinkPayload::InnerMessage(RouteNetlinkMessage::DelLink(message))
                    if message.header.interface_family != AddressFamily::Bridge =>
                {
                    vec![InterfaceChange::Gone { index: message.header.index }]
                }
                // The socket's buffer ran over: some messages are lost, so ask for the whole again.
                NetlinkPayload::Overrun(_) => list(&handle, &wanted).await.unwrap_or_else(|error| {
                    tracing::warn!("after an overrun: {error:#}");
                    Vec::new()
                }),
                _ => Vec::new(),
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

async fn list(
    handle: &Handle,
    wanted: &impl Fn(&LinkMessage) -> Option<InterfaceChange>,
) -> Result<Vec<InterfaceChange>> {
    handle
        .link()
        .get()
        .execute()
        .try_filter_map(|message| std::future::ready(Ok(wanted(&message))))
        .try_collect()
        .await
        .context("list the interfaces")
}

/// A host-side veth (its peer is in another network namespace), an uplink, or one that was asked for by name.
fn wanted(message: &LinkMessage, what: &Wanted) -> Option<InterfaceChange> {
    // A bridge tells of its ports, too: a veth that leaves its bridge is not gone.
    if message.header.interface_family == AddressFamily::Bridge {
        return None;
    }
    let mut name = None;
    let mut veth = false;
    let mut peer_elsewhere = false;
    for attribute in &message.attributes {
        match attribute {
            LinkAttribute::IfName(given) => name = Some(given.clone()),
            LinkAttribute::LinkInfo(infos) => {
                veth |= infos.iter().any(|info| matches!(info, LinkInfo::Kind(InfoKind::Veth)));
            }
            LinkAttribute::LinkNetNsId(_) => peer_elsewhere = true,
            _ => {}
        }
    }
    let name = name?;
    // A node in a container has a veth as its uplink; that is no pod's.
    let pod = veth && peer_elsewhere && !has_default_route(&name);
    let chosen = what.globs.is_match(&name) || if pod { what.veths } else { what.uplinks && has_default_route(&name) };
    let side = if pod { Side::Pod } else { Side::Uplink };
    chosen.then_some(InterfaceChange::Present { index: message.header.index, name, side })
}

/// Whether the node's default route leaves by an interface (proc_net(5), `route`: interface, destination, …, mask).
fn has_default_route(name: &str) -> bool {
    let routes = std::fs::read_to_string("/proc/thread-self/net/route").unwrap_or_default();
    routes.lines().skip(1).any(|line| {
        let mut fields = line.split_whitespace();
        fields.next() == Some(name) && fields.next() == Some("00000000") && fields.nth(5) == Some("00000000")
    })
}
