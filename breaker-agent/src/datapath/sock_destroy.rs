//! Closes connections of processes (SOCK_DESTROY, as `ss --kill` does). A poke does not reach those of the node's own
//! processes, which are behind no interface, and some clients do not answer one.

use std::{
    collections::{HashMap, HashSet},
    fs::File,
    net::{IpAddr, SocketAddr, UdpSocket},
    os::{fd::AsFd as _, unix::fs::MetadataExt as _},
    path::Path,
    sync::atomic::{AtomicBool, Ordering},
    thread,
};

use anyhow::{Context as _, Result};
use netlink_bindings::{
    inet_diag::ReqV2,
    traits::{NetlinkRequest, Protocol},
};
use netlink_socket2::NetlinkSocket;
use rustix::thread::{LinkNameSpaceType, move_into_link_name_space};

use super::sys;

/// Requests (include/uapi/linux/sock_diag.h): a socket by its addresses, and its end.
const BY_ADDRESSES: u16 = 20;
const DESTROY: u16 = 21;
/// The socket is identified by its addresses alone (`INET_DIAG_NOCOOKIE`, include/uapi/linux/inet_diag.h).
const NO_COOKIE: [u8; 8] = [0xff; 8];
/// State of a listening socket (`TCP_LISTEN`, include/net/tcp_states.h).
const LISTEN: u8 = 10;

/// Closes the TCP connection of this network namespace with these addresses. Its process sees ECONNABORTED, and the peer
/// gets a reset. Returns whether there was one.
///
/// # Errors
/// The kernel refused it: it was built without `CONFIG_INET_DIAG_DESTROY`, or the agent lacks CAP_NET_ADMIN.
pub fn close(own: SocketAddr, peer: SocketAddr) -> Result<bool> {
    let mut request = ReqV2::new();
    request.family = sys::family(own.is_ipv4());
    request.protocol = u8::try_from(libc::IPPROTO_TCP).unwrap_or_default();
    request.states = u32::MAX;
    request.sockid.set_sport(own.port());
    request.sockid.set_dport(peer.port());
    request.sockid.src = words(own.ip());
    request.sockid.dst = words(peer.ip());
    request.sockid.cookie = NO_COOKIE;
    // Where there is no such connection, the kernel finds a socket that listens on the port.
    let mut socket = NetlinkSocket::new();
    let find = Diag { kind: BY_ADDRESSES, flags: 0, request: request.clone() };
    let found = match socket.request(&find).and_then(|mut reply| Ok(reply.recv_one()?)) {
        Ok(found) => found,
        Err(error) if error.raw_os_error() == Some(libc::ENOENT) => return Ok(false),
        Err(error) => return Err(error).context("look for a socket (SOCK_DIAG_BY_FAMILY)"),
    };
    if found.state == LISTEN || found.peer_port != peer.port() {
        return Ok(false);
    }
    request.sockid.cookie = found.cookie;
    let flags = u16::try_from(libc::NLM_F_ACK).unwrap_or_default();
    let outcome = socket.request(&Diag { kind: DESTROY, flags, request }).and_then(|mut reply| Ok(reply.recv_ack()?));
    match outcome {
        Ok(()) => Ok(true),
        Err(error) if error.raw_os_error() == Some(libc::ENOENT) => Ok(false),
        Err(error) => Err(error).context("close a socket (SOCK_DESTROY)"),
    }
}

/// Closes connections of processes in other network namespaces of this machine, which are found by their processes in
/// /proc. Returns those that were closed: none, without CAP_SYS_ADMIN, or where /proc shows the agent's own processes only.
///
/// Takes some system calls for each namespace and client, and a thread of its own. Stops when `is_over` is set.
#[must_use]
pub fn close_in_pods(
    connections: &[(SocketAddr, SocketAddr)],
    is_over: &AtomicBool,
) -> HashSet<(SocketAddr, SocketAddr)> {
    let mut by_client: HashMap<IpAddr, Vec<(SocketAddr, SocketAddr)>> = HashMap::new();
    for (client, peer) in connections {
        by_client.entry(client.ip()).or_default().push((*client, *peer));
    }
    thread::scope(|scope| {
        // A thread that entered a namespace stays there until it ends.
        let closing = scope.spawn(|| {
            let mut closed = HashSet::new();
            for namespace in network_namespaces() {
                if is_over.load(Ordering::Relaxed) {
                    break;
                }
                if move_into_link_name_space(namespace.as_fd(), Some(LinkNameSpaceType::Network)).is_err() {
                    continue;
                }
                // An address that cannot be bound is not of this namespace.
                let here = by_client.iter().filter(|(ip, _)| UdpSocket::bind((**ip, 0)).is_ok());
                let ends = here.flat_map(|(_, ends)| ends);
                closed.extend(ends.filter(|(client, peer)| close(*client, *peer).unwrap_or(false)));
            }
            closed
        });
        closing.join().unwrap_or_default()
    })
}

/// The network namespaces of all processes that /proc shows, each once, without the own one.
fn network_namespaces() -> impl Iterator<Item = File> {
    let identity = |path: &Path| std::fs::metadata(path).map(|found| (found.dev(), found.ino())).ok();
    let mut known: HashSet<(u64, u64)> = identity(Path::new("/proc/self/ns/net")).into_iter().collect();
    let processes = std::fs::read_dir("/proc").into_iter().flatten().flatten();
    let paths = processes.map(|process| process.path().join("ns/net"));
    paths.filter(move |path| identity(path).is_some_and(|id| known.insert(id))).flat_map(File::open)
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

/// A request about one socket, which the bindings do not have.
struct Diag {
    kind: u16,
    flags: u16,
    request: ReqV2,
}

/// The kernel's description of a socket (`struct inet_diag_msg`, include/uapi/linux/inet_diag.h).
#[derive(Clone, Copy, Debug, Default)]
struct Found {
    state: u8,
    peer_port: u16,
    cookie: [u8; 8],
}

impl NetlinkRequest for Diag {
    fn protocol(&self) -> Protocol {
        let protonum = u16::try_from(libc::NETLINK_SOCK_DIAG).unwrap_or_default();
        Protocol::Raw { protonum, request_type: self.kind }
    }

    fn flags(&self) -> u16 {
        self.flags
    }

    fn payload(&self) -> &[u8] {
        self.request.as_slice()
    }

    type ReplyType<'buf> = Found;

    fn decode_reply(message: &[u8]) -> Found {
        let bytes = |at: usize| message.get(at..at + 2).and_then(|bytes| <[u8; 2]>::try_from(bytes).ok());
        let cookie = message.get(44..52).and_then(|bytes| <[u8; 8]>::try_from(bytes).ok());
        Found {
            state: message.get(1).copied().unwrap_or(LISTEN),
            peer_port: bytes(6).map(u16::from_be_bytes).unwrap_or_default(),
            cookie: cookie.unwrap_or(NO_COOKIE),
        }
    }
}
