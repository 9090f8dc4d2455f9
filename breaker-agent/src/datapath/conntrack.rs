//! The connections that the kernel tracks (nf_conntrack), by netlink. kube-proxy translates with its help, so it knows every
//! connection through a Service's address, also those that the programs have not seen from their SYN.

use std::{
    collections::{HashMap, HashSet},
    net::{IpAddr, SocketAddr},
};

use anyhow::{Context as _, Result};
use breaker_common::PROTO_TCP;
use netlink_bindings::{
    conntrack::{IterableConntrackAttrs, Nfgenmsg, OpGetDo, OpGetDump, Request},
    traits::{NetlinkRequest, Protocol},
};
use netlink_socket2::NetlinkSocket;

use super::sys;

/// States of a connection that at least one side may still send data on (`TCP_CONNTRACK_ESTABLISHED`, `_FIN_WAIT` and
/// `_CLOSE_WAIT`, include/uapi/linux/netfilter/nf_conntrack_tcp.h). A client that has closed its own direction waits for
/// the rest of an answer.
const OPEN: [u8; 3] = [3, 4, 5];
/// The fields of the original direction that the kernel compares: address and port of the destination, and the protocol
/// (`CTA_FILTER_FLAG`, net/netfilter/nf_internals.h).
const DESTINATION: u32 = 1 << 1 | 1 << 3 | 1 << 5;

/// Request to delete an entry: `IPCTNL_MSG_CT_DELETE` of `NFNL_SUBSYS_CTNETLINK`
/// (include/uapi/linux/netfilter/nfnetlink_conntrack.h).
const DELETE: u16 = 1 << 8 | 2;

/// `IPS_DST_NAT` (include/uapi/linux/netfilter/nf_conntrack_common.h).
const DESTINATION_TRANSLATED: u32 = 1 << 5;

/// Clients by the address that they connected to.
pub type Connections = HashMap<SocketAddr, HashSet<SocketAddr>>;

/// Whether the kernel tracks a connection that it translates, as every connection to a Service that kube-proxy serves.
///
/// # Errors
/// The kernel has no conntrack, or the agent lacks CAP_NET_ADMIN.
pub fn translates() -> Result<bool> {
    let is_translated = |entry: &IterableConntrackAttrs<'_>| {
        entry.get_status().is_ok_and(|status| status & DESTINATION_TRANSLATED != 0)
    };
    Ok(any(&all_of_family(true), is_translated)? || any(&all_of_family(false), is_translated)?)
}

/// The TCP connections to one address that have not ended. The kernel selects the entries; with 100,000 others, a call takes
/// about 30 ms of CPU time, so it must not run in the main loop.
///
/// # Errors
/// The kernel refused the request: it has no conntrack, or the agent lacks CAP_NET_ADMIN.
pub fn connections_to(address: SocketAddr) -> Result<Connections> {
    let mut request = Request::new().op_get_dump(&of_family(address.is_ipv4()));
    let tuple = request.encode().nested_tuple_orig().nested_tuple_ip();
    let tuple = match address.ip() {
        IpAddr::V4(ip) => tuple.push_ip_v4_dst(ip),
        IpAddr::V6(ip) => tuple.push_ip_v6_dst(ip),
    };
    let tuple = tuple.end_nested().nested_tuple_proto().push_proto_num(PROTO_TCP).push_proto_dst_port(address.port());
    let filter = tuple.end_nested().end_nested().nested_filter().push_orig_flags(DESTINATION).push_reply_flags(0);
    filter.end_nested();
    let mut found = Connections::new();
    read(&request, |to| to == address, &mut found)?;
    Ok(found)
}

/// The TCP connections to any of many addresses that have not ended. The kernel returns all entries of both IP families; that is
/// cheaper than asking for more than some seven addresses.
///
/// # Errors
/// As for [`connections_to`].
pub fn connections_to_any(is_wanted: impl Fn(SocketAddr) -> bool) -> Result<Connections> {
    let mut found = Connections::new();
    for is_ipv4 in [true, false] {
        read(&all_of_family(is_ipv4), &is_wanted, &mut found)?;
    }
    Ok(found)
}

/// Deletes the entry of a TCP connection whose client no longer has it. Nothing else would for five days
/// (`nf_conntrack_tcp_timeout_established`). Returns whether there was one.
///
/// # Errors
/// The kernel refused the request.
pub fn forget(client: SocketAddr, address: SocketAddr) -> Result<bool> {
    let mut payload = Vec::new();
    let attributes = OpGetDo::encode_request(&mut payload, &of_family(address.is_ipv4()));
    let tuple = attributes.nested_tuple_orig().nested_tuple_ip();
    let tuple = match (client.ip(), address.ip()) {
        (IpAddr::V4(from), IpAddr::V4(to)) => tuple.push_ip_v4_src(from).push_ip_v4_dst(to),
        (IpAddr::V6(from), IpAddr::V6(to)) => tuple.push_ip_v6_src(from).push_ip_v6_dst(to),
        _ => anyhow::bail!("{client} and {address} are of different IP families"),
    };
    let ports = tuple.end_nested().nested_tuple_proto().push_proto_num(PROTO_TCP);
    ports.push_proto_src_port(client.port()).push_proto_dst_port(address.port()).end_nested().end_nested();
    let mut socket = NetlinkSocket::new();
    match socket.request(&Deletion { payload }).and_then(|mut reply| Ok(reply.recv_ack()?)) {
        Ok(()) => Ok(true),
        Err(error) if error.raw_os_error() == Some(libc::ENOENT) => Ok(false),
        Err(error) => Err(error).context("delete a tracked connection (conntrack)"),
    }
}

/// A request to delete an entry, which the bindings do not have.
struct Deletion {
    payload: Vec<u8>,
}

impl NetlinkRequest for Deletion {
    fn protocol(&self) -> Protocol {
        let protonum = u16::try_from(libc::NETLINK_NETFILTER).unwrap_or_default();
        Protocol::Raw { protonum, request_type: DELETE }
    }

    fn flags(&self) -> u16 {
        u16::try_from(libc::NLM_F_ACK).unwrap_or_default()
    }

    fn payload(&self) -> &[u8] {
        &self.payload
    }

    type ReplyType<'buf> = ();

    fn decode_reply(_: &[u8]) {}
}

fn of_family(is_ipv4: bool) -> Nfgenmsg {
    Nfgenmsg { nfgen_family: sys::family(is_ipv4), ..Nfgenmsg::default() }
}

/// A request for all entries of an IP family.
fn all_of_family(is_ipv4: bool) -> OpGetDump<'static> {
    Request::new().op_get_dump(&of_family(is_ipv4))
}

fn read(request: &OpGetDump<'_>, is_wanted: impl Fn(SocketAddr) -> bool, found: &mut Connections) -> Result<()> {
    any(request, |entry| {
        if let Some((client, to)) = open_connection(entry).filter(|(_, to)| is_wanted(*to)) {
            found.entry(to).or_default().insert(client);
        }
        false
    })?;
    Ok(())
}

/// Reads the entries that the kernel selects, up to the first for which `is_it` is true. Returns whether there is one.
fn any(request: &OpGetDump<'_>, mut is_it: impl FnMut(&IterableConntrackAttrs<'_>) -> bool) -> Result<bool> {
    let mut socket = NetlinkSocket::new();
    let mut replies = socket.request(request).context("ask for tracked connections (conntrack)")?;
    while let Some((_, entry)) = replies.recv().transpose().context("read tracked connections (conntrack)")? {
        if is_it(&entry) {
            return Ok(true);
        }
    }
    Ok(false)
}

/// Client and original destination of an entry, if it is a TCP connection in the default zone that has not ended.
fn open_connection(entry: &IterableConntrackAttrs<'_>) -> Option<(SocketAddr, SocketAddr)> {
    if !OPEN.contains(&entry.get_protoinfo().ok()?.get_protoinfo_tcp().ok()?.get_tcp_state().ok()?) {
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
