//! Finds the interface of each pod on this node, for the fast path (which bypasses the host network stack) and for
//! clients that keep their address. The sources are the kernel's neighbor tables and the forwarding tables of
//! bridges.
//!
//! A pod appears in these tables when the node has exchanged packets with it, as the probes of the agent and of
//! kubelet do. A pod that does not appear is not treated as local: its flows go through the host network stack, as
//! all others do.

use std::{
    collections::{BTreeMap, HashMap, HashSet},
    net::{IpAddr, Ipv4Addr, Ipv6Addr},
    time::Duration,
};

use anyhow::{Context as _, Result};
use futures_util::TryStreamExt as _;
use rtnetlink::{
    Handle, RouteMessageBuilder, new_connection,
    packet_route::{
        AddressFamily,
        neighbour::{NeighbourAddress, NeighbourAttribute, NeighbourFlags, NeighbourMessage, NeighbourState},
        route::{RouteAddress, RouteAttribute},
    },
};
use tokio::sync::{mpsc, watch};

/// Interval between two reads of the tables. The kernel sends notifications, too, but one for every entry that it
/// confirms again, and processing those is more work than reading the tables.
const INTERVAL: Duration = Duration::from_secs(1);

/// Interface index of each pod, by the pod's address.
pub type LocalPods = HashMap<IpAddr, u32>;

/// Reads the tables periodically while `wanted` is true. The channel receives a result only if it differs from the
/// one before.
///
/// # Errors
/// The netlink socket cannot be opened.
pub fn watch_pods(mut wanted: watch::Receiver<bool>) -> Result<mpsc::Receiver<LocalPods>> {
    let (connection, handle, _) = new_connection().context("open a netlink socket")?;
    tokio::spawn(connection);
    let (sender, receiver) = mpsc::channel(1);
    tokio::spawn(async move {
        let mut last = None;
        while wanted.wait_for(|wanted| *wanted).await.is_ok() {
            match read_tables(&handle).await {
                Ok(found) if last.as_ref() == Some(&found) => {}
                Ok(found) => {
                    last = Some(found.clone());
                    if sender.send(found).await.is_err() {
                        return;
                    }
                }
                Err(error) => tracing::warn!("cannot find the interfaces of this node's pods: {error:#}"),
            }
            tokio::time::sleep(INTERVAL).await;
        }
    });
    Ok(receiver)
}

async fn read_tables(handle: &Handle) -> Result<LocalPods> {
    let mut neighbors = dump(handle, AddressFamily::Inet).await?;
    neighbors.extend(dump(handle, AddressFamily::Inet6).await?);
    Ok(locate(&neighbors, &dump(handle, AddressFamily::Bridge).await?))
}

async fn dump(handle: &Handle, family: AddressFamily) -> Result<Vec<NeighbourMessage>> {
    let mut request = handle.neighbours().get();
    request.message_mut().header.family = family;
    request.execute().try_collect().await.with_context(|| format!("list the neighbors ({family:?})"))
}

/// Has the kernel find out the link-layer addresses of these hosts, or of the routers to them. Returns before it has.
///
/// # Errors
/// The netlink socket cannot be opened. A host without a route is left out.
pub async fn resolve(hosts: &HashSet<IpAddr>) -> Result<()> {
    let (connection, handle, _) = new_connection().context("open a netlink socket")?;
    let connection = tokio::spawn(connection);
    for host in hosts {
        let to = match host {
            IpAddr::V4(ip) => RouteMessageBuilder::<Ipv4Addr>::new().destination_prefix(*ip, 32).build(),
            IpAddr::V6(ip) => RouteMessageBuilder::<Ipv6Addr>::new().destination_prefix(*ip, 128).build(),
        };
        let Ok(Some(route)) = handle.route().get(to).execute().try_next().await else { continue };
        let (mut interface, mut next) = (None, *host);
        for attribute in route.attributes {
            match attribute {
                RouteAttribute::Oif(index) => interface = Some(index),
                RouteAttribute::Gateway(RouteAddress::Inet(ip)) => next = ip.into(),
                RouteAttribute::Gateway(RouteAddress::Inet6(ip)) => next = ip.into(),
                _ => {}
            }
        }
        if let Some(interface) = interface {
            let request = handle.neighbours().add(interface, next).state(NeighbourState::None);
            // An entry that exists is used all the same.
            let _ = request.flags(NeighbourFlags::Use).execute().await;
        }
    }
    connection.abort();
    Ok(())
}

/// Joins the neighbor tables and the forwarding tables. An address is behind the interface of its neighbor entry or, if
/// that interface is a bridge, behind the bridge port that has the entry's MAC address.
fn locate(neighbors: &[NeighbourMessage], forwarding: &[NeighbourMessage]) -> LocalPods {
    let mac = |message: &NeighbourMessage| {
        message.attributes.iter().find_map(|attribute| match attribute {
            NeighbourAttribute::LinkLayerAddress(mac) => Some(mac.clone()),
            _ => None,
        })
    };
    let bridge = |message: &NeighbourMessage| {
        message.attributes.iter().find_map(|attribute| match attribute {
            NeighbourAttribute::Controller(index) => Some(*index),
            _ => None,
        })
    };
    let mut ports: BTreeMap<(u32, Vec<u8>), u32> = BTreeMap::new();
    let mut bridges: Vec<u32> = Vec::new();
    for entry in forwarding {
        if let (Some(bridge), Some(mac)) = (bridge(entry), mac(entry)) {
            bridges.push(bridge);
            ports.insert((bridge, mac), entry.header.ifindex);
        }
    }
    let mut located = LocalPods::new();
    let mut alone: HashMap<(u32, bool), usize> = HashMap::new();
    for entry in neighbors {
        use NeighbourState::{Failed, Incomplete, None as NoState};
        let address = entry.attributes.iter().find_map(|attribute| match attribute {
            NeighbourAttribute::Destination(NeighbourAddress::Inet(ip)) => Some(IpAddr::V4(*ip)),
            NeighbourAttribute::Destination(NeighbourAddress::Inet6(ip)) => Some(IpAddr::V6(*ip)),
            _ => None,
        });
        // Skip link-local addresses, which every interface has, and the multicast groups that the node has joined.
        let link_local = |ip: &IpAddr| matches!(ip, IpAddr::V6(ip) if ip.is_unicast_link_local());
        let address = address.filter(|ip| !ip.is_multicast() && !link_local(ip));
        let (Some(address), Some(mac)) = (address, mac(entry)) else { continue };
        if matches!(entry.header.state, Failed | Incomplete | NoState) {
            continue;
        }
        let on = entry.header.ifindex;
        if let Some(port) = ports.get(&(on, mac)) {
            located.insert(address, *port);
        } else if !bridges.contains(&on) {
            located.insert(address, on);
            *alone.entry((on, address.is_ipv4())).or_default() += 1;
        }
    }
    // Behind a pod's own interface is one address of each IP family. An interface with more addresses leads to a
    // network.
    located.retain(|address, on| alone.get(&(*on, address.is_ipv4())).is_none_or(|count| *count == 1));
    located
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::net::{Ipv4Addr, Ipv6Addr};

    fn entry(
        family: AddressFamily,
        index: u32,
        state: NeighbourState,
        attributes: Vec<NeighbourAttribute>,
    ) -> NeighbourMessage {
        let mut message = NeighbourMessage::default();
        (message.header.family, message.header.ifindex, message.header.state) = (family, index, state);
        message.attributes = attributes;
        message
    }

    #[test]
    fn a_pod_is_behind_its_veth_or_its_bridge_port() {
        use NeighbourAttribute::{Controller, Destination, LinkLayerAddress};
        use NeighbourState::{Failed, Noarp, Permanent, Reachable, Stale};
        let v4 = |last: u8| Destination(NeighbourAddress::Inet(Ipv4Addr::new(10, 42, 0, last)));
        let v6 = Destination(NeighbourAddress::Inet6(Ipv6Addr::LOCALHOST));
        let group = |last: u16| Destination(NeighbourAddress::Inet6(Ipv6Addr::new(0xff02, 0, 0, 0, 0, 0, 0, last)));
        let mac = |last: u8| LinkLayerAddress(vec![2, 0, 0, 0, 0, last]);
        let (cni0, uplink, veth) = (3, 2, 9);
        let neighbors = [
            entry(AddressFamily::Inet, cni0, Reachable, vec![v4(2), mac(2)]),
            entry(AddressFamily::Inet, cni0, Failed, vec![v4(3), mac(3)]),
            // A silent pod, whose MAC address the bridge has forgotten.
            entry(AddressFamily::Inet, cni0, Stale, vec![v4(4), mac(4)]),
            // A routed pod, behind an interface of its own.
            entry(AddressFamily::Inet, veth, Stale, vec![v4(5), mac(5)]),
            entry(AddressFamily::Inet6, cni0, Reachable, vec![v6, mac(2)]),
            entry(AddressFamily::Inet, uplink, Reachable, vec![v4(6), mac(6)]),
            // Multicast groups of the bridge port itself.
            entry(AddressFamily::Inet6, 5, Noarp, vec![group(2), mac(1)]),
            entry(AddressFamily::Inet6, 5, Noarp, vec![group(16), mac(1)]),
        ];
        let forwarding = [
            entry(AddressFamily::Bridge, 5, Reachable, vec![mac(2), Controller(cni0)]),
            entry(AddressFamily::Bridge, 6, Reachable, vec![mac(3), Controller(cni0)]),
            entry(AddressFamily::Bridge, 7, Permanent, vec![mac(5)]),
        ];
        let ip = |last: u8| IpAddr::from([10, 42, 0, last]);
        let expected =
            LocalPods::from([(ip(2), 5), (ip(5), veth), (IpAddr::V6(Ipv6Addr::LOCALHOST), 5), (ip(6), uplink)]);
        assert_eq!(locate(&neighbors, &forwarding), expected);
    }
}
