//! Closes connections of the node's own processes (SOCK_DESTROY, as `ss --kill` does). A poke does not reach them: they are
//! behind no interface.

use std::net::{IpAddr, SocketAddr};

use anyhow::{Context as _, Result};
use netlink_bindings::{
    inet_diag::ReqV2,
    traits::{NetlinkRequest, Protocol},
};
use netlink_socket2::NetlinkSocket;

/// include/uapi/linux/sock_diag.h.
const SOCK_DESTROY: u16 = 21;
/// The socket is identified by its addresses alone (`INET_DIAG_NOCOOKIE`, include/uapi/linux/inet_diag.h).
const NO_COOKIE: [u8; 8] = [0xff; 8];

/// Closes the TCP socket of this network namespace with these addresses. Its process sees ECONNABORTED, and the peer gets a
/// reset. Returns whether there was one.
///
/// # Errors
/// The kernel refused it: it was built without `CONFIG_INET_DIAG_DESTROY`, or the agent lacks CAP_NET_ADMIN.
pub fn close(own: SocketAddr, peer: SocketAddr) -> Result<bool> {
    let mut request = ReqV2::new();
    request.family = u8::try_from(if own.is_ipv4() { libc::AF_INET } else { libc::AF_INET6 }).unwrap_or_default();
    request.protocol = u8::try_from(libc::IPPROTO_TCP).unwrap_or_default();
    request.states = u32::MAX;
    request.sockid.set_sport(own.port());
    request.sockid.set_dport(peer.port());
    request.sockid.src = words(own.ip());
    request.sockid.dst = words(peer.ip());
    request.sockid.cookie = NO_COOKIE;
    let mut socket = NetlinkSocket::new();
    let outcome = socket.request(&Destroy(request));
    match outcome.and_then(|mut reply| Ok(reply.recv_ack()?)) {
        Ok(()) => Ok(true),
        Err(error) if error.raw_os_error() == Some(libc::ENOENT) => Ok(false),
        Err(error) => Err(error).context("close a socket (SOCK_DESTROY)"),
    }
}

/// An address in the field of a request: 16 bytes in wire order, of which IPv4 uses the first four.
fn words(ip: IpAddr) -> [u8; 16] {
    match ip {
        IpAddr::V4(ip) => {
            let mut words = [0; 16];
            words[..4].copy_from_slice(&ip.octets());
            words
        }
        IpAddr::V6(ip) => ip.octets(),
    }
}

/// The request, which the bindings do not have.
struct Destroy(ReqV2);

impl NetlinkRequest for Destroy {
    fn protocol(&self) -> Protocol {
        let protonum = u16::try_from(libc::NETLINK_SOCK_DIAG).unwrap_or_default();
        Protocol::Raw { protonum, request_type: SOCK_DESTROY }
    }

    fn flags(&self) -> u16 {
        u16::try_from(libc::NLM_F_ACK).unwrap_or_default()
    }

    fn payload(&self) -> &[u8] {
        self.0.as_slice()
    }

    type ReplyType<'buf> = ();

    fn decode_reply(_: &[u8]) {}
}
