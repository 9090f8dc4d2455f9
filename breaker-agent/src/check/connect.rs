//! Opens connections for probes, and decides how they end.

use std::{
    net::SocketAddr,
    os::fd::{AsFd, OwnedFd},
    time::Duration,
};

use rustix::{
    event::{PollFd, PollFlags, Timespec, poll},
    net::{
        AddressFamily, Protocol, SocketFlags, SocketType, connect as connect_socket, getsockname, ipproto, socket_with,
        sockopt::{set_socket_linger, set_tcp_quickack, socket_error},
    },
};
use tokio::net::{TcpStream, UdpSocket};

use super::{
    CheckCode,
    outcome::{Outcome, local, of_connection, refused_by_this_node},
};

/// How a connection ends when it is dropped.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum End {
    /// With a FIN, as usual. The prober's side stays in TIME_WAIT for a minute.
    Fin,
    /// With a reset (`SO_LINGER` of zero): nothing stays, neither here nor at the server.
    Reset,
    /// With a reset that comes before the handshake is complete. `TCP_QUICKACK` is off before `connect()`, so the kernel
    /// delays the third packet of the handshake, and the reset takes its place. The server's process never sees the
    /// connection. HAProxy's plain check does the same.
    BeforeAccept,
}

/// Opens a TCP connection.
///
/// # Errors
/// The outcome of the probe, if there is no connection.
pub(super) async fn tcp(at: SocketAddr, end: End) -> Result<Connection, Outcome> {
    let socket = open(at, SocketType::STREAM, ipproto::TCP)?;
    // Both options only change how the connection ends. A kernel that refuses them is no reason to fail the probe.
    if end != End::Fin {
        let _ = set_socket_linger(&socket, Some(Duration::ZERO));
    }
    if end == End::BeforeAccept {
        let _ = set_tcp_quickack(&socket, false);
    }
    match connect_socket(&socket, &at) {
        Ok(()) | Err(rustix::io::Errno::INPROGRESS) => {}
        Err(error) => return Err(refused_by_this_node("connect", error)),
    }
    // To a pod of this node, the handshake is over by now: the reactor need not know of the socket.
    let mut ready = [PollFd::new(&socket, PollFlags::OUT)];
    if poll(&mut ready, Some(&Timespec::default())).is_ok_and(|ready| ready > 0) {
        connected(&socket, at)?;
        return Ok(Connection::Ready(socket));
    }
    let stream = watch(socket)?;
    stream.writable().await.map_err(|error| of_connection(&error))?;
    connected(&stream, at)?;
    Ok(Connection::Watched(stream))
}

/// A connection. Only one that is read or written has to be watched by the reactor.
#[derive(Debug)]
pub(super) enum Connection {
    Ready(OwnedFd),
    Watched(TcpStream),
}

impl Connection {
    /// The connection as a stream.
    ///
    /// # Errors
    /// The outcome of the probe, if this node cannot watch the socket.
    pub fn stream(self) -> Result<TcpStream, Outcome> {
        match self {
            Self::Ready(socket) => watch(socket),
            Self::Watched(stream) => Ok(stream),
        }
    }
}

fn watch(socket: OwnedFd) -> Result<TcpStream, Outcome> {
    TcpStream::from_std(socket.into()).map_err(|error| local("watch a socket", error))
}

/// Checks a socket that has left the handshake.
///
/// # Errors
/// The outcome of the probe, if there is no connection.
fn connected(socket: &impl AsFd, at: SocketAddr) -> Result<(), Outcome> {
    match socket_error(socket) {
        Ok(Ok(())) => {}
        Ok(Err(error)) | Err(error) => return Err(of_connection(&error.into())),
    }
    // Where nobody listens on a local port, TCP may connect a socket to itself (RFC 9293, figure 8: simultaneous open).
    let own = getsockname(socket).ok().and_then(|own| SocketAddr::try_from(own).ok());
    if own == Some(at) {
        // Its TIME_WAIT would keep the port from the next probe.
        let _ = set_socket_linger(socket, Some(Duration::ZERO));
        return Err((CheckCode::L4Con, "connected to itself: nobody listens on this port".into()));
    }
    Ok(())
}

/// Opens a UDP socket that exchanges datagrams with one address only, and gets its ICMP errors.
///
/// # Errors
/// The outcome of the probe, if this node refuses it.
pub(super) fn udp(at: SocketAddr) -> Result<UdpSocket, Outcome> {
    let socket = open(at, SocketType::DGRAM, ipproto::UDP)?;
    connect_socket(&socket, &at).map_err(|error| refused_by_this_node("connect", error))?;
    UdpSocket::from_std(socket.into()).map_err(|error| local("watch a socket", error))
}

/// Opens a socket of the address's family.
fn open(at: SocketAddr, kind: SocketType, protocol: Protocol) -> Result<OwnedFd, Outcome> {
    let family = match at {
        SocketAddr::V4(_) => AddressFamily::INET,
        SocketAddr::V6(_) => AddressFamily::INET6,
    };
    let flags = SocketFlags::NONBLOCK | SocketFlags::CLOEXEC;
    socket_with(family, kind, flags, Some(protocol)).map_err(|error| refused_by_this_node("open a socket", error))
}
