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
    packet_core::{NLM_F_REPLACE, NetlinkPayload},
    packet_route::{
        AddressFamily, RouteNetlinkMessage,
        link::{InfoKind, LinkAttribute, LinkInfo, LinkMessage},
        route::{RouteAttribute, RouteMessage, RouteType},
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
    // A default route makes an interface an uplink, and may be added after the interface. This also tells whether a veth
    // leads to a pod, so it matters where uplinks get no programs, too.
    let groups = &[MulticastGroup::Link, MulticastGroup::Ipv4Route, MulticastGroup::Ipv6Route];
    // Subscribe before reading the list: a change in between is then reported twice rather than never.
    let (connection, handle, mut messages) = new_multicast_connection(groups).context("open a netlink socket")?;
    tokio::spawn(connection);
    let mut uplinks = Uplinks::read(&handle).await;
    let present = list(&handle, &what, &uplinks).await?;
    let (sender, receiver) = mpsc::channel(1024);
    tokio::spawn(async move {
        while let Some((message, _)) = messages.next().await {
            let replaces = message.header.flags & NLM_F_REPLACE != 0;
            let changes = match message.payload {
                NetlinkPayload::InnerMessage(RouteNetlinkMessage::NewLink(message)) => {
                    wanted(&message, &what, &uplinks).map(InterfaceChange::Present).into_iter().collect()
                }
                NetlinkPayload::InnerMessage(RouteNetlinkMessage::DelLink(message))
                    if message.header.interface_family != AddressFamily::Bridge =>
                {
                    let index = message.header.index;
                    // The kernel sends no message about the IPv4 routes that end with an interface.
                    uplinks.0.retain(|(_, uplink)| *uplink != index);
                    vec![InterfaceChange::Gone { index }]
                }
                NetlinkPayload::InnerMessage(RouteNetlinkMessage::NewRoute(route)) if uplinks.add(&route, replaces) => {
                    let all = list(&handle, &what, &uplinks).await;
                    list_or_warn(all).into_iter().map(InterfaceChange::Present).collect()
                }
                NetlinkPayload::InnerMessage(RouteNetlinkMessage::DelRoute(route)) => {
                    uplinks.remove(&route);
                    Vec::new()
                }
                // The socket's receive buffer overflowed and messages are lost: read everything again.
                NetlinkPayload::Overrun(_) => {
                    uplinks = Uplinks::read(&handle).await;
                    match list(&handle, &what, &uplinks).await {
                        Ok(all) => vec![InterfaceChange::All(all)],
                        error => list_or_warn(error).into_iter().map(InterfaceChange::Present).collect(),
                    }
                }
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

async fn list(handle: &Handle, what: &Wanted, uplinks: &Uplinks) -> Result<Vec<Interface>> {
    let links = handle.link().get().execute();
    links
        .try_filter_map(|message| std::future::ready(Ok(wanted(&message, what, uplinks))))
        .try_collect()
        .await
        .context("list the interfaces")
}

fn list_or_warn(outcome: Result<Vec<Interface>>) -> Vec<Interface> {
    outcome.unwrap_or_else(|error| {
        tracing::warn!("cannot list the network interfaces, changes may be missed: {error:#}");
        Vec::new()
    })
}

/// Returns the interface if it gets the programs: a host-side veth (its peer is in another network namespace), an
/// uplink, or one that is configured by name.
fn wanted(message: &LinkMessage, what: &Wanted, uplinks: &Uplinks) -> Option<Interface> {
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
    let is_uplink = uplinks.contains(message.header.index);
    let pod = veth && peer_elsewhere && !is_uplink;
    let chosen = what.globs.is_match(&name) || if pod { what.veths } else { what.uplinks && is_uplink };
    let side = if pod { Side::Pod } else { Side::Uplink };
    chosen.then_some(Interface { index: message.header.index, name, side, is_veth: veth })
}

/// The interfaces of all default routes in this network namespace: IPv4 and IPv6, in every routing table, with all of
/// their next hops. It is kept up to date by the kernel's messages: a node may have too many routes to read them often.
#[derive(Debug, Default)]
struct Uplinks(BTreeSet<(DefaultRoute, u32)>);

/// The identity of a default route. A route that replaces it has the same identity.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
struct DefaultRoute {
    is_v4: bool,
    table: u32,
    metric: u32,
}

impl Uplinks {
    /// Reads the routes. If the kernel does not answer, logs a warning and returns no interface.
    async fn read(handle: &Handle) -> Self {
        let mut uplinks = Self::default();
        let v4 = RouteMessageBuilder::<Ipv4Addr>::new().build();
        let v6 = RouteMessageBuilder::<Ipv6Addr>::new().build();
        for request in [v4, v6] {
            let mut routes = handle.route().get(request).execute();
            loop {
                match routes.try_next().await {
                    Ok(Some(route)) => drop(uplinks.add(&route, false)),
                    Ok(None) => break,
                    Err(error) => {
                        tracing::warn!("cannot list the default routes, uplinks may be missed: {error:#}");
                        break;
                    }
                }
            }
        }
        uplinks
    }

    fn contains(&self, index: u32) -> bool {
        self.0.iter().any(|(_, uplink)| *uplink == index)
    }

    /// Adds the interfaces of a route if it is a default route. Returns whether one of them is new. `replaces`: the
    /// route takes the place of another one.
    fn add(&mut self, route: &RouteMessage, replaces: bool) -> bool {
        let Some((id, indices)) = default_route(route) else { return false };
        let news = indices.iter().any(|index| !self.contains(*index));
        if replaces {
            self.0.retain(|(known, _)| *known != id);
        }
        self.0.extend(indices.into_iter().map(|index| (id, index)));
        news
    }

    fn remove(&mut self, route: &RouteMessage) {
        let Some((id, indices)) = default_route(route) else { return };
        self.0.retain(|(known, index)| *known != id || !indices.contains(index));
    }
}

/// Returns the identity and the interfaces of a route if it is a default route: one interface, or those of its next
/// hops.
fn default_route(route: &RouteMessage) -> Option<(DefaultRoute, Vec<u32>)> {
    let header = &route.header;
    if header.destination_prefix_length != 0 || header.kind != RouteType::Unicast {
        return None;
    }
    let is_v4 = header.address_family == AddressFamily::Inet;
    let mut id = DefaultRoute { is_v4, table: header.table.into(), metric: 0 };
    let mut indices = Vec::new();
    for attribute in &route.attributes {
        match attribute {
            RouteAttribute::Oif(index) => indices.push(*index),
            RouteAttribute::MultiPath(hops) => indices.extend(hops.iter().map(|hop| hop.interface_index)),
            RouteAttribute::Table(table) => id.table = *table,
            RouteAttribute::Priority(metric) => id.metric = *metric,
            _ => {}
        }
    }
    Some((id, indices))
}

#[cfg(test)]
mod tests {
    use super::*;
    use rtnetlink::packet_route::route::{RouteHeader, RouteNextHop};

    fn route(family: AddressFamily, prefix: u8, kind: RouteType, attributes: Vec<RouteAttribute>) -> RouteMessage {
        let mut route = RouteMessage::default();
        route.header.address_family = family;
        route.header.destination_prefix_length = prefix;
        route.header.kind = kind;
        route.header.table = RouteHeader::RT_TABLE_MAIN;
        route.attributes = attributes;
        route
    }

    fn default_of(indices: &[u32]) -> RouteMessage {
        let hop = |index: &u32| {
            let mut hop = RouteNextHop::default();
            hop.interface_index = *index;
            hop
        };
        let attributes = match indices {
            [index] => vec![RouteAttribute::Oif(*index)],
            several => vec![RouteAttribute::MultiPath(several.iter().map(hop).collect())],
        };
        route(AddressFamily::Inet, 0, RouteType::Unicast, attributes)
    }

    #[test]
    fn default_routes_are_told_from_others() {
        use AddressFamily::{Inet, Inet6};
        let oif = || vec![RouteAttribute::Oif(7)];
        let indices = |route: RouteMessage| default_route(&route).map(|(_, indices)| indices);
        assert_eq!(indices(route(Inet, 0, RouteType::Unicast, oif())), Some(vec![7]));
        assert_eq!(indices(route(Inet6, 0, RouteType::Unicast, oif())), Some(vec![7]));
        assert_eq!(indices(route(Inet, 24, RouteType::Unicast, oif())), None);
        assert_eq!(indices(route(Inet6, 0, RouteType::Unreachable, oif())), None);
        assert_eq!(indices(default_of(&[3, 5])), Some(vec![3, 5]));
    }

    /// TRIALS B2: all next hops, in every table, also after a change.
    #[test]
    fn uplinks_follow_the_routes() {
        let mut uplinks = Uplinks::default();
        let are = |uplinks: &Uplinks| (1..10).filter(|index| uplinks.contains(*index)).collect::<Vec<u32>>();
        assert!(uplinks.add(&default_of(&[3, 5]), false));
        assert!(!uplinks.add(&default_of(&[5]), false), "nothing new");
        let mut of_a_vrf = default_of(&[7]);
        of_a_vrf.attributes.push(RouteAttribute::Table(1000));
        assert!(uplinks.add(&of_a_vrf, false));
        assert_eq!(are(&uplinks), [3, 5, 7]);
        assert!(uplinks.add(&default_of(&[4]), true), "it replaces the one of its table");
        assert_eq!(are(&uplinks), [4, 7]);
        uplinks.remove(&of_a_vrf);
        assert_eq!(are(&uplinks), [4]);
    }
}
