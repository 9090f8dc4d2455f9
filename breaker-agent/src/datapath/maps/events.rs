//! The ring buffer with the events of the programs.

use std::{
    collections::HashMap,
    net::{IpAddr, SocketAddr},
    os::fd::{AsRawFd as _, BorrowedFd, OwnedFd},
};

use anyhow::{Context as _, Result};
use breaker_common::Event;
use breaker_core::{datapath::PacketEvent, model::ServiceName};
use tokio::io::{Interest, unix::AsyncFd};

use super::Maps;

impl Maps {
    /// Returns a descriptor that becomes readable when the programs send an urgent event to the ring buffer.
    ///
    /// # Errors
    /// No file descriptor is left, or there is no tokio runtime to watch it.
    #[expect(unsafe_code, reason = "aya returns a raw descriptor, and registering one with tokio is unsafe")]
    pub fn events_ready(&self) -> Result<AsyncFd<OwnedFd>> {
        // SAFETY: `self` owns the ring buffer, so its descriptor is open during this call.
        let fd = unsafe { BorrowedFd::borrow_raw(self.events.as_raw_fd()) };
        let fd = fd.try_clone_to_owned().context("duplicate the ring's descriptor")?;
        // SAFETY: an owned descriptor stays open and does not change until it is dropped.
        unsafe { AsyncFd::register_with_interest(fd, Interest::READABLE) }.context("watch the ring")
    }

    pub(crate) fn events(&mut self, names: &HashMap<u32, ServiceName>) -> Vec<PacketEvent> {
        /// Limit per call, so that a flood of events does not block the agent's loop.
        const MOST: usize = 8192;
        let mut events = Vec::new();
        while events.len() < MOST {
            let Some(item) = self.events.next() else { break };
            let Some((service, event)) = decode(&item) else { continue };
            let Some(service) = names.get(&service).cloned() else { continue };
            events.push(PacketEvent { service, ..event });
        }
        events
    }
}

/// Decodes an event from the ring buffer; `None` if it is too short or has an unknown enum number.
fn decode(bytes: &[u8]) -> Option<(u32, PacketEvent)> {
    use std::mem::offset_of;
    type Raw = Event<u8, u8>;
    if bytes.len() < size_of::<Raw>() {
        return None;
    }
    let four = |at: usize| <[u8; 4]>::try_from(&bytes[at..at + 4]).unwrap_or_default();
    let two = |at: usize| <[u8; 2]>::try_from(&bytes[at..at + 2]).unwrap_or_default();
    let ip = |at: usize| IpAddr::from(<[u8; 16]>::try_from(&bytes[at..at + 16]).unwrap_or_default()).to_canonical();
    let socket = |addr: usize, port: usize| SocketAddr::new(ip(addr), u16::from_be_bytes(two(port)));
    let backend = socket(offset_of!(Raw, backend), offset_of!(Raw, backend_port));
    let event = PacketEvent {
        service: ServiceName::new(""),
        kind: bytes[offset_of!(Raw, kind)].try_into().ok()?,
        epoch: u32::from_ne_bytes(four(offset_of!(Raw, epoch))),
        client: socket(offset_of!(Raw, client), offset_of!(Raw, client_port)),
        frontend: socket(offset_of!(Raw, vip), offset_of!(Raw, vip_port)),
        backend: (!backend.ip().is_unspecified()).then_some(backend),
    };
    Some((u32::from_ne_bytes(four(offset_of!(Raw, service))), event))
}
