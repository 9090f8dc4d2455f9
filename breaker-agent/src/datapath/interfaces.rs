//! Watches the node's network interfaces: by netlink messages, without polling.

use std::{
    collections::BTreeSet,
    net::{Ipv4Addr, Ipv6Addr},
};

use anyhow::{Context as _, Result};
use futures_util::{StreamExt as _, TryStreamExt as _};
use globset::GlobSet;
use rtnetlink::{
    Handle, MulticastGroup, RouteMessageBuilder, new_multicast_connection,
    packet_core::NetlinkPayload,
    packet_route::{
        AddressFamily, RouteNetlinkMessage,
        link::{InfoKind, LinkAttribute, LinkInfo, LinkMessage},
        route::{RouteAttribute, RouteHeader, RouteMessage, RouteType},
    },
};
use tokio::sync::mpsc;

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
    /// Whether host-side veths of pods get them.
    pub veths: bool,
    /// Whether interfaces of default routes get them.
    pub uplinks: bool,
    /// Names of other interfaces that get them.
    pub globs: GlobSet,
}

/// A change of an interface that gets the programs.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum InterfaceChange {
    /// The interface exists.
    Present(Interface),
    /// The interface is gone.
    Gone {
        /// Index of the interface.
        index: u32,
    },
    /// Messages were lost. The list is complete: all other interfaces are gone, and the listed ones may have changed.
    All(Vec<Interface>),
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
}

/// Starts to watch the interfaces. Returns those that exist already, and a channel of all later changes. A change
/// may repeat a state that the caller already knows.
///
/// # Errors
/// The netlink socket cannot be opened, or the list of interfaces cannot be read.
pub async fn watch(what: Wanted) -> Result<(Vec<Interface>, mpsc::Receiver<InterfaceChange>)> {
    // A default route makes an interface an uplink, and may be added after the interface.
    const LINKS: MulticastGroup = MulticastGroup::Link;
    const ROUTES: [MulticastGroup; 3] = [LINKS, MulticastGroup::Ipv4Route, MulticastGroup::Ipv6Route];
    let groups: &[MulticastGroup] = if what.uplinks { &ROUTES } else { &[LINKS] };
    // Subscribe before reading the list: a change in between is then reported twice rather than never.
    let (connection, handle, mut messages) = new_multicast_connection(groups).context("open a netlink socket")?;
    tokio::spawn(connection);
    let present = list(&handle, &what).await?;
    let (sender, receiver) = mpsc::channel(1024);
    tokio::spawn(async move {
        while let Some((message, _)) = messages.next().await {
            let changes = match message.payload {
                NetlinkPayload::InnerMessage(RouteNetlinkMessage::NewLink(message)) => {
                    let uplinks = uplinks(&handle).await;
                    wanted(&message, &what, &uplinks).map(InterfaceChange::Present).into_iter().collect()
                }
                NetlinkPayload::InnerMessage(RouteNetlinkMessage::DelLink(message))
                    if message.header.interface_family != AddressFamily::Bridge =>
                {
                    vec![InterfaceChange::Gone { index: message.header.index }]
                }
                NetlinkPayload::InnerMessage(RouteNetlinkMessage::NewRoute(message))
                    if message.header.destination_prefix_length == 0 =>
                {
                    list_or_warn(list(&handle, &what).await).into_iter().map(InterfaceChange::Present).collect()
                }
                // The socket's receive buffer overflowed and messages are lost: read the whole list again.
                NetlinkPayload::Overrun(_) => match list(&handle, &what).await {
                    Ok(all) => vec![InterfaceChange::All(all)],
                    error => list_or_warn(error).into_iter().map(InterfaceChange::Present).collect(),
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

async fn list(handle: &Handle, what: &Wanted) -> Result<Vec<Interface>> {
    let uplinks = uplinks(handle).await;
    let links = handle.link().get().execute();
    links
        .try_filter_map(|message| std::future::ready(Ok(wanted(&message, what, &uplinks))))
        .try_collect()
        .await
        .context("list the interfaces")
}

/// Like [`default_route_interfaces`]. If the kernel does not answer, logs a warning and returns no interface.
async fn uplinks(handle: &Handle) -> BTreeSet<u32> {
    default_route_interfaces(handle).await.unwrap_or_else(|error| {
        tracing::warn!("cannot list the default routes, uplinks may be missed: {error:#}");
        BTreeSet::new()
    })
}

fn list_or_warn(outcome: Result<Vec<Interface>>) -> Vec<Interface> {
    outcome.unwrap_or_else(|error| {
        tracing::warn!("cannot list the network interfaces, changes may be missed: {error:#}");
        Vec::new()
    })
}

/// Returns the interface if it gets the programs: a host-side veth (its peer is in another network namespace), an
/// uplink, or one that is configured by name.
fn wanted(message: &LinkMessage, what: &Wanted, uplinks: &BTreeSet<u32>) -> Option<Interface> {
    // Bridges send messages about their ports, too. A veth that leaves its bridge still exists.
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
    // If the node is a container, its uplink is a veth with a peer elsewhere, too, but there is no pod behind it.
    let is_uplink = uplinks.contains(&message.header.index);
    let pod = veth && peer_elsewhere && !is_uplink;
    let chosen = what.globs.is_match(&name) || if pod { what.veths } else { what.uplinks && is_uplink };
    let side = if pod { Side::Pod } else { Side::Uplink };
    chosen.then_some(Interface { index: message.header.index, name, side, is_veth: veth })
}

/// Returns the indices of the interfaces of all default routes in this network namespace, IPv4 and IPv6. Of IPv4,
/// only the main table counts: other tables are for policy routing.
async fn default_route_interfaces(handle: &Handle) -> Result<BTreeSet<u32>> {
    let v4 = RouteMessageBuilder::<Ipv4Addr>::new().build();
    let v6 = RouteMessageBuilder::<Ipv6Addr>::new().build();
    let mut indices = BTreeSet::new();
    for request in [v4, v6] {
        let mut routes = handle.route().get(request).execute();
        while let Some(route) = routes.try_next().await.context("list the routes")? {
            indices.extend(interfaces_of_default_route(&route));
        }
    }
    Ok(indices)
}

/// Returns the interfaces of a route if it is a default route: one, or those of its next hops.
fn interfaces_of_default_route(route: &RouteMessage) -> Vec<u32> {
    let header = &route.header;
    let is_v4 = header.address_family == AddressFamily::Inet;
    if header.destination_prefix_length != 0
        || header.kind != RouteType::Unicast
        || is_v4 && header.table != RouteHeader::RT_TABLE_MAIN
    {
        return Vec::new();
    }
    let indices = |attribute: &RouteAttribute| match attribute {
        RouteAttribute::Oif(index) => vec![*index],
        RouteAttribute::MultiPath(hops) => hops.iter().map(|hop| hop.interface_index).collect(),
        _ => Vec::new(),
    };
    route.attributes.iter().flat_map(indices).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use rtnetlink::packet_route::route::RouteNextHop;

    fn route(family: AddressFamily, prefix: u8, kind: RouteType, attributes: Vec<RouteAttribute>) -> RouteMessage {
        let mut route = RouteMessage::default();
        route.header.address_family = family;
        route.header.destination_prefix_length = prefix;
        route.header.kind = kind;
        route.header.table = RouteHeader::RT_TABLE_MAIN;
        route.attributes = attributes;
        route
    }

    #[test]
    fn default_routes_are_told_from_others() {
        use AddressFamily::{Inet, Inet6};
        let oif = || vec![RouteAttribute::Oif(7)];
        assert_eq!(interfaces_of_default_route(&route(Inet, 0, RouteType::Unicast, oif())), [7]);
        assert_eq!(interfaces_of_default_route(&route(Inet6, 0, RouteType::Unicast, oif())), [7]);
        assert!(interfaces_of_default_route(&route(Inet, 24, RouteType::Unicast, oif())).is_empty());
        assert!(interfaces_of_default_route(&route(Inet6, 0, RouteType::Unreachable, oif())).is_empty());
        let mut of_another_table = route(Inet, 0, RouteType::Unicast, oif());
        of_another_table.header.table = 100;
        assert!(interfaces_of_default_route(&of_another_table).is_empty());
        let hop = |index| {
            let mut hop = RouteNextHop::default();
            hop.interface_index = index;
            hop
        };
        let hops = vec![RouteAttribute::MultiPath(vec![hop(3), hop(5)])];
        assert_eq!(interfaces_of_default_route(&route(Inet, 0, RouteType::Unicast, hops)), [3, 5]);
    }
}
