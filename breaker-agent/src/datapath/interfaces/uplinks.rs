//! Which interfaces lead to the network: those of default routes.

use std::{
    collections::BTreeSet,
    net::{Ipv4Addr, Ipv6Addr},
};

use futures_util::TryStreamExt as _;
use rtnetlink::{
    Handle, RouteMessageBuilder,
    packet_route::{
        AddressFamily,
        route::{RouteAttribute, RouteMessage, RouteType},
    },
};

/// The interfaces of all default routes in this network namespace: IPv4 and IPv6, in every routing table, with all of
/// their next hops. It is kept up to date by the kernel's messages: a node may have too many routes to read them often.
#[derive(Debug, Default)]
pub(super) struct Uplinks(BTreeSet<(DefaultRoute, u32)>);

/// The identity of a default route. A route that replaces it has the same identity.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
struct DefaultRoute {
    is_v4: bool,
    table: u32,
    metric: u32,
}

impl Uplinks {
    /// Reads the routes. If the kernel does not answer, logs a warning and returns no interface.
    pub(super) async fn read(handle: &Handle) -> Self {
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

    pub(super) fn contains(&self, index: u32) -> bool {
        self.0.iter().any(|(_, uplink)| *uplink == index)
    }

    /// Adds the interfaces of a route if it is a default route. Returns whether one of them is new. `replaces`: the
    /// route takes the place of another one.
    pub(super) fn add(&mut self, route: &RouteMessage, replaces: bool) -> bool {
        let Some((id, indices)) = default_route(route) else { return false };
        let news = indices.iter().any(|index| !self.contains(*index));
        if replaces {
            self.0.retain(|(known, _)| *known != id);
        }
        self.0.extend(indices.into_iter().map(|index| (id, index)));
        news
    }

    /// Forgets an interface that is gone: the kernel sends no message about the IPv4 routes that end with it.
    pub(super) fn forget(&mut self, index: u32) {
        self.0.retain(|(_, uplink)| *uplink != index);
    }

    pub(super) fn remove(&mut self, route: &RouteMessage) {
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
impl Uplinks {
    /// Uplinks of one default route each.
    pub(super) fn of(indices: &[u32]) -> Self {
        let route = |metric| DefaultRoute { is_v4: true, table: 254, metric };
        Self(indices.iter().map(|index| (route(*index), *index)).collect())
    }
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
