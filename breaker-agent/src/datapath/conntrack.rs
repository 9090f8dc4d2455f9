//! The connections that the kernel tracks (nf_conntrack), by netlink. kube-proxy translates with its help, so it knows every
//! connection through a Service's address, also those that the programs have not seen from their SYN.

use std::{
    collections::HashSet,
    net::{IpAddr, SocketAddr},
};

use anyhow::{Context as _, Result};
use netlink_bindings::conntrack::{IterableConntrackAttrs, Nfgenmsg, Request};
use netlink_socket2::NetlinkSocket;

/// State of an established connection (`TCP_CONNTRACK_ESTABLISHED`, include/uapi/linux/netfilter/nf_conntrack_tcp.h).
const ESTABLISHED: u8 = 3;
/// The fields of the original direction that the kernel compares: address and port of the destination, and the protocol
/// (`CTA_FILTER_FLAG`, net/netfilter/nf_internals.h).
const DESTINATION: u32 = 1 << 1 | 1 << 3 | 1 << 5;

/// The clients that have an established TCP connection to `frontend`. The kernel selects the entries; with 100,000 of
/// others, a call takes about 30 ms of CPU time, so it must not run in the main loop.
///
/// # Errors
/// The kernel refused the request: it has no conntrack, or the agent lacks CAP_NET_ADMIN.
pub fn clients_of(frontend: SocketAddr) -> Result<HashSet<SocketAddr>> {
    let tcp = u8::try_from(libc::IPPROTO_TCP).unwrap_or_default();
    let family = u8::try_from(if frontend.is_ipv4() { libc::AF_INET } else { libc::AF_INET6 }).unwrap_or_default();
    let header = Nfgenmsg { nfgen_family: family, ..Nfgenmsg::default() };
    let mut request = Request::new().op_get_dump(&header);
    let address = request.encode().nested_tuple_orig().nested_tuple_ip();
    let tuple = match frontend.ip() {
        IpAddr::V4(ip) => address.push_ip_v4_dst(ip),
        IpAddr::V6(ip) => address.push_ip_v6_dst(ip),
    };
    let tuple = tuple.end_nested().nested_tuple_proto().push_proto_num(tcp).push_proto_dst_port(frontend.port());
    let filter = tuple.end_nested().end_nested().nested_filter().push_orig_flags(DESTINATION).push_reply_flags(0);
    filter.end_nested();
    let mut socket = NetlinkSocket::new();
    let mut replies = socket.request(&request).context("ask for tracked connections (conntrack)")?;
    let mut clients = HashSet::new();
    while let Some((_, entry)) = replies.recv().transpose().context("read tracked connections (conntrack)")? {
        if let Some((client, to)) = established(&entry)
            && to == frontend
        {
            clients.insert(client);
        }
    }
    Ok(clients)
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
