//! The outcome of a probe, and the border between errors of the target and errors of this node.

use std::{
    io,
    sync::atomic::{AtomicU8, AtomicU16, Ordering},
};

use rustix::io::Errno;

use super::CheckCode;

/// The code of a probe's outcome and a description of it.
pub(super) type Outcome = (CheckCode, String);

/// How far a probe has come. If its time limit runs out, this decides the code.
#[derive(Debug, Default)]
pub(super) struct Progress {
    /// A [`Stage`] as a number; 0 = the connection is being established.
    stage: AtomicU8,
    /// Status of an HTTP answer whose body is still missing; 0 = none.
    status: AtomicU16,
}

/// A part of a probe after the connection is established.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Stage {
    /// The TLS handshake is running.
    Handshake = 1,
    /// The request was sent.
    Answer = 2,
}

impl Progress {
    pub fn reached(&self, stage: Stage) {
        self.stage.store(stage as u8, Ordering::Relaxed);
    }

    /// The status of an HTTP answer has come.
    pub fn answered(&self, status: u16) {
        self.status.store(status, Ordering::Relaxed);
    }

    /// The status of the HTTP answer, if it has come.
    pub fn status(&self) -> Option<u16> {
        Some(self.status.load(Ordering::Relaxed)).filter(|status| *status > 0)
    }

    /// The outcome of a probe whose time limit ran out.
    pub fn timed_out(&self) -> Outcome {
        match self.stage.load(Ordering::Relaxed) {
            0 => (CheckCode::L4Tout, "not connected in time".into()),
            1 => (CheckCode::L6Tout, "no TLS connection in time".into()),
            _ => (CheckCode::L7Tout, "no answer in time".into()),
        }
    }
}

/// The outcome of a probe that this node could not make.
pub(super) fn local(what: &str, error: impl Into<io::Error>) -> Outcome {
    (CheckCode::LocalError, format!("{what}: {}", error.into()))
}

/// The outcome of a system call that failed by itself, before a packet was sent. Nearly every such error comes from this
/// node. A route that rejects the destination (`unreachable`, `blackhole`) is the exception: clients of this node meet
/// it as well.
pub(super) fn refused_by_this_node(what: &str, error: Errno) -> Outcome {
    match error {
        Errno::HOSTUNREACH | Errno::INVAL | Errno::CONNREFUSED => {
            (CheckCode::L4Con, io::Error::from(error).to_string())
        }
        _ => local(what, error),
    }
}

/// The outcome of an error that a connection reports. Nearly every such error comes from the network or from the server.
/// Only lack of memory is this node's.
pub(super) fn of_connection(error: &io::Error) -> Outcome {
    match Errno::from_io_error(error) {
        Some(Errno::NOBUFS | Errno::NOMEM) => (CheckCode::LocalError, error.to_string()),
        Some(Errno::TIMEDOUT) => (CheckCode::L4Tout, error.to_string()),
        _ => (CheckCode::L4Con, error.to_string()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_this_node_refuses_is_no_failure_of_the_target() {
        let own = [
            Errno::MFILE,
            Errno::NFILE,
            Errno::NOBUFS,
            Errno::NOMEM,
            Errno::ADDRNOTAVAIL,
            Errno::ACCESS,
            Errno::PERM,
            Errno::NETDOWN,
            Errno::NETUNREACH,
            Errno::NODEV,
            Errno::AGAIN,
            Errno::AFNOSUPPORT,
        ];
        for errno in own {
            assert_eq!(refused_by_this_node("connect", errno).0, CheckCode::LocalError, "{errno}");
        }
        for errno in [Errno::HOSTUNREACH, Errno::INVAL] {
            assert_eq!(refused_by_this_node("connect", errno).0, CheckCode::L4Con, "{errno}");
        }
        let answers = [
            (Errno::CONNREFUSED, CheckCode::L4Con),
            (Errno::HOSTUNREACH, CheckCode::L4Con),
            (Errno::NETUNREACH, CheckCode::L4Con),
            (Errno::CONNRESET, CheckCode::L4Con),
            (Errno::TIMEDOUT, CheckCode::L4Tout),
            (Errno::NOBUFS, CheckCode::LocalError),
        ];
        for (errno, code) in answers {
            assert_eq!(of_connection(&errno.into()).0, code, "{errno}");
        }
    }
}
