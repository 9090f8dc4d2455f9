//! Fragments after the first of a packet. They have no ports, so the datapath translates them as it translated the
//! first fragment in the same direction.

use std::{collections::BTreeMap, net::IpAddr};

/// Identifies the packet that a fragment belongs to (RFC 791, section 3.2; RFC 8200, section 4.5).
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct FragmentId {
    /// Source address as received.
    pub source: IpAddr,
    /// Destination address as received.
    pub destination: IpAddr,
    /// Identification field.
    pub id: u32,
    /// IPv4: the protocol number. IPv6: the next header behind the fragment header.
    pub proto: u8,
}

/// Direction of a packet.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Way {
    /// From a client.
    There,
    /// To a client.
    Back,
}

/// Note about a translated first fragment.
#[derive(Clone, Copy, Debug)]
pub struct Done {
    /// Direction of the packet.
    pub way: Way,
    /// New address: of the destination if the packet comes from the client, else of the source.
    pub address: IpAddr,
    /// Mark that was set; 0 if none.
    pub mark: u32,
    /// The packet took the fast path. Then it was translated on the hook for clients' packets, in either direction.
    pub fast: bool,
}

impl Done {
    /// Whether the note holds on the hook for packets in this direction. A note of the fast path holds on both hooks.
    #[must_use]
    pub fn is_of(&self, way: Way) -> bool {
        self.way == way || self.fast
    }
}

/// Notes about translated first fragments.
pub type Notes = BTreeMap<FragmentId, Done>;
