//! The signals that an operator sends. The agent listens for them before it does anything else: from then on, SIGHUP
//! no longer ends it, and SIGTERM during the start is not lost.

use std::io;

use tokio::signal::unix::{Signal, SignalKind, signal};

/// The signals of the agent.
#[derive(Debug)]
pub struct Signals {
    terminate: Signal,
    interrupt: Signal,
    hangup: Signal,
}

impl Signals {
    /// Starts to listen. Needs a runtime.
    ///
    /// # Errors
    /// The process has no descriptor left, or the kernel refuses the handlers.
    pub fn listen() -> io::Result<Self> {
        Ok(Self {
            terminate: signal(SignalKind::terminate())?,
            interrupt: signal(SignalKind::interrupt())?,
            hangup: signal(SignalKind::hangup())?,
        })
    }

    /// Waits for SIGTERM or SIGINT. Safe to cancel.
    pub async fn end(&mut self) {
        tokio::select! {
            _ = self.terminate.recv() => {}
            _ = self.interrupt.recv() => {}
        }
    }

    /// Waits for the next signal. Returns whether it asks to read the configuration again (SIGHUP); otherwise the agent
    /// is to end. Safe to cancel.
    pub async fn next_is_hangup(&mut self) -> bool {
        tokio::select! {
            _ = self.terminate.recv() => false,
            _ = self.interrupt.recv() => false,
            _ = self.hangup.recv() => true,
        }
    }
}
