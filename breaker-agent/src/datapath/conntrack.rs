//! The connections that the kernel tracks (nf_conntrack), by netlink. kube-proxy translates with its help, so it knows every
//! connection through a Service's address, also those that the programs have not seen from their SYN.

use std::{
    collections::{HashMap, HashSet},
    net::{IpAddr, SocketAddr},
};

use anyhow::{Context as _, Result};
use netlink_bindings::conntrack::{IterableConntrackAttrs, Nfgenmsg, OpGetDump, Request};
use netlink_socket2::NetlinkSocket;

use super::sys;

/// State of an established connection (`TCP_CONNTRACK_ESTABLISHED`, include/uapi/linux/netfilter/nf_conntrack_tcp.h).
const ESTABLISHED: u8 = 3;
/// The fields of the original direction that the kernel compares: address and port of the destination, and the protocol
/// (`CTA_FILTER_FLAG`, net/netfilter/nf_internals.h).
const DESTINATION: u32 = 1 << 1 | 1 << 3 | 1 << 5;

/// Clients by the address that they connected to.
pub type Connections = HashMap<SocketAddr, HashSet<SocketAddr>>;

/// The established TCP connections to one address. The kernel selects the entries; with 100,000 others, a call takes
/// about 30 ms of CPU time, so it must not run in the main loop.
///
/// # Errors
/// The kernel refused the request: it has no conntrack, or the agent lacks CAP_NET_ADMIN.
pub fn connections_to(address: SocketAddr) -> Result<Connections> {
    let tcp = u8::try_from(libc::IPPROTO_TCP).unwrap_or_default();
    let mut request = Request::new().op_get_dump(&of_family(address.is_ipv4()));
    let tuple = request.encode().nested_tuple_orig().nested_tuple_ip();
    let tuple = match address.ip() {
        IpAddr::V4(ip) => tuple.push_ip_v4_dst(ip),
        IpAddr::V6(ip) => tuple.push_ip_v6_dst(ip),
    };
    let tuple = tuple.end_nested().nested_tuple_proto().push_proto_num(tcp).push_proto_dst_port(address.port());
    let filter = tuple.end_nested().end_nested().nested_filter().push_orig_flags(DESTINATION).push_reply_flags(0);
    filter.end_nested();
    let mut found = Connections::new();
    read(&request, |to| to == address, &mut found)?;
    Ok(found)
}

/// The established TCP connections to any of many addresses. The kernel returns all entries of both IP families; that is
/// cheaper than asking for more than some seven addresses.
///
/// # Errors
/// As for [`connections_to`].
pub fn connections_to_any(is_wanted: impl Fn(SocketAddr) -> bool) -> Result<Connections> {
    let mut found = Connections::new();
    for is_ipv4 in [true, false] {
        read(&Request::new().op_get_dump(&of_family(is_ipv4)), &is_wanted, &mut found)?;
    }
    Ok(found)
}

fn of_family(is_ipv4: bool) -> Nfgenmsg {
    Nfgenmsg { nfgen_family: sys::family(is_ipv4), ..Nfgenmsg::default() }
}

fn read(request: &OpGetDump<'_>, is_wanted: impl Fn(SocketAddr) -> bool, found: &mut Connections) -> Result<()> {
    let mut socket = NetlinkSocket::new();
    let mut replies = socket.request(request).context("ask for tracked connections (conntrack)")?;
    while let Some((_, entry)) = replies.recv().transpose().context("read tracked connections (conntrack)")? {
        if let Some((client, to)) = established(&entry)
            && is_wanted(to)
        {
            found.entry(to).or_default().insert(client);
        }
    }
    Ok(())
}

/// Client and original destination of an entry, if it is an established TCP connection in the default zone.
fn established(entry: &IterableConntrackAttrs<'_>) -> Option<(SocketAddr, SocketAddr)> {
    if entry.get_protoinfo().ok()?.get_protoinfo_tcp().ok()?.get_tcp_state().ok()? != ESTABLISHED {
        return None;
    }
    if entry.get_zone().is_ok_and(|zone| zone != 0) {
        return None;
    }
    let tuple = entry.get_tuple_orig().ok()?;
    let (ip, ports) = (tuple.get_tuple_ip().ok()?, tuple.get_tuple_proto().ok()?);
    let (source, destination): (IpAddr, IpAddr) = match (ip.get_ip_v4_src(), ip.get_ip_v4_dst()) {
        (Ok(source), Ok(destination)) => (source.into(), destination.into()),
        _ => (ip.get_ip_v6_src().ok()?.into(), ip.get_ip_v6_dst().ok()?.into()),
    };
    let (from, to) = (ports.get_proto_src_port().ok()?, ports.get_proto_dst_port().ok()?);
    Some((SocketAddr::new(source, from), SocketAddr::new(destination, to)))
}
