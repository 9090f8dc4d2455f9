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
use serde::Serialize;
use tokio::sync::mpsc;

/// Who is behind an interface.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
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
    Present(Interface),
    /// It is gone.
    Gone {
        /// Its index.
        index: u32,
    },
    /// Some words were lost: these are there, and no others; whatever was known of them may have changed.
    All(Vec<Interface>),
}

/// An interface that the programs belong on.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Interface {
    /// Its index.
    pub index: u32,
    /// Its name.
    pub name: String,
    /// Who is behind it.
    pub side: Side,
    /// Whether it is a veth.
    pub is_veth: bool,
}

/// Starts to watch. Returns the interfaces that are there already, and a channel of changes from then on (a change may
/// repeat what is known).
///
/// # Errors
/// No netlink socket, or a dump that fails.
pub async fn watch(what: Wanted) -> Result<(Vec<Interface>, mpsc::Receiver<InterfaceChange>)> {
    // Default routes make an uplink, and may come later than their interface.
    const LINKS: MulticastGroup = MulticastGroup::Link;
    const ROUTES: [MulticastGroup; 3] = [LINKS, MulticastGroup::Ipv4Route, MulticastGroup::Ipv6Route];
    let groups: &[MulticastGroup] = if what.uplinks { &ROUTES } else { &[LINKS] };
    // Subscribed before the dump: what comes in between is told twice rather than never.
    let (connection, handle, mut messages) = new_multicast_connection(groups).context("open a netlink socket")?;
    tokio::spawn(connection);
    let wanted = move |message: &LinkMessage| wanted(message, &what);
    let present = list(&handle, &wanted).await?;
    let (sender, receiver) = mpsc::channel(1024);
    tokio::spawn(async move {
        while let Some((message, _)) = messages.next().await {
            let changes = match message.payload {
                NetlinkPayload::InnerMessage(RouteNetlinkMessage::NewLink(message)) => {
                    wanted(&message).map(InterfaceChange::Present).into_iter().collect()
                }
                NetlinkPayload::InnerMessage(RouteNetlinkMessage::DelLink(message))
                    if message.header.interface_family != AddressFamily::Bridge =>
                {
                    vec![InterfaceChange::Gone { index: message.header.index }]
                }
                NetlinkPayload::InnerMessage(RouteNetlinkMessage::NewRoute(message))
                    if message.header.destination_prefix_length == 0 =>
                {
                    asked(list(&handle, &wanted).await).into_iter().map(InterfaceChange::Present).collect()
                }
                // The socket's buffer ran over: some messages are lost, so ask for the whole again.
                NetlinkPayload::Overrun(_) => match list(&handle, &wanted).await {
                    Ok(all) => vec![InterfaceChange::All(all)],
                    error => asked(error).into_iter().map(InterfaceChange::Present).collect(),
                },
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

async fn list(handle: &Handle, wanted: &impl Fn(&LinkMessage) -> Option<Interface>) -> Result<Vec<Interface>> {
    handle
        .link()
        .get()
        .execute()
        .try_filter_map(|message| std::future::ready(Ok(wanted(&message))))
        .try_collect()
        .await
        .context("list the interfaces")
}

fn asked(outcome: Result<Vec<Interface>>) -> Vec<Interface> {
    outcome.unwrap_or_else(|error| {
        tracing::warn!("what interfaces there are is not known: {error:#}");
        Vec::new()
    })
}

/// A host-side veth (its peer is in another network namespace), an uplink, or one that was asked for by name.
fn wanted(message: &LinkMessage, what: &Wanted) -> Option<Interface> {
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
    chosen.then_some(Interface { index: message.header.index, name, side, is_veth: veth })
}

/// Whether a default route of the node's, of either family, leaves by an interface.
fn has_default_route(name: &str) -> bool {
    let read = |file: &str| std::fs::read_to_string(format!("/proc/thread-self/net/{file}")).unwrap_or_default();
    default_routes_v4(&read("route")).any(|by| by == name)
        || default_routes_v6(&read("ipv6_route")).any(|by| by == name)
}

/// Interfaces of default routes in /proc/net/route (interface, destination, gateway, flags, …, mask, …; the kernel's
/// net/ipv4/fib_trie.c, `fib_route_seq_show`).
fn default_routes_v4(routes: &str) -> impl Iterator<Item = &str> {
    routes.lines().skip(1).filter_map(|line| {
        let fields: Vec<&str> = line.split_whitespace().collect();
        (fields.get(1) == Some(&"00000000") && fields.get(7) == Some(&"00000000")).then(|| fields[0])
    })
}

/// Interfaces of default routes in /proc/net/ipv6_route (destination, its prefix, …, interface; net/ipv6/route.c,
/// `rt6_info_route`). Where there is no IPv6 route, one to nowhere stands there in lo's name.
fn default_routes_v6(routes: &str) -> impl Iterator<Item = &str> {
    routes.lines().filter_map(|line| {
        let fields: Vec<&str> = line.split_whitespace().collect();
        let everywhere = fields.first()?.bytes().all(|digit| digit == b'0') && fields.get(1) == Some(&"00");
        fields.get(9).copied().filter(|name| everywhere && *name != "lo")
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn default_routes_are_told_from_others() {
        let v4 = "Iface\tDestination\tGateway \tFlags\tRefCnt\tUse\tMetric\tMask\t\tMTU\tWindow\tIRTT\n\
            eth0\t00000000\t01001FAC\t0003\t0\t0\t0\t00000000\t0\t0\t0\n\
            cni0\t00012A0A\t00000000\t0001\t0\t0\t0\t00FFFFFF\t0\t0\t0\n\
            tun0\t00000000\t00000000\t0001\t0\t0\t0\t00000080\t0\t0\t0\n";
        assert_eq!(default_routes_v4(v4).collect::<Vec<_>>(), ["eth0"]);
        let nowhere = "00000000000000000000000000000000";
        let ula = "fd310000000000000000000000000000";
        let line = |to: &str, prefix: &str, name: &str| {
            format!("{to} {prefix} {nowhere} 00 {nowhere} 00000400 00000001 00000000 00000003 {name:>8}\n")
        };
        let v6 = line(ula, "40", "cni0") + &line(nowhere, "00", "eth1") + &line(nowhere, "00", "lo");
        assert_eq!(default_routes_v6(&v6).collect::<Vec<_>>(), ["eth1"]);
    }
}
