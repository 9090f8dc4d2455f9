//! Later fragments have no ports: what was done to the first one is done to them, on the same way.

use std::{collections::BTreeMap, net::IpAddr};

/// Which packet a fragment is of (RFC 791, section 3.2; RFC 8200, section 4.5).
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct FragmentId {
    /// From, as it came.
    pub source: IpAddr,
    /// To, as it came.
    pub destination: IpAddr,
    /// Identification.
    pub id: u32,
    /// Protocol, or the next header behind the fragment header.
    pub proto: u8,
}

/// Which way a packet goes.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Way {
    /// From a client.
    There,
    /// To a client.
    Back,
}

/// What was done to a first fragment.
#[derive(Clone, Copy, Debug)]
pub struct Done {
    /// On which way.
    pub way: Way,
    /// Its other end's address: what it was replaced by.
    pub address: IpAddr,
    /// The mark that was set.
    pub mark: u32,
    /// It left the stack out: then it was translated where clients' packets are, whichever way it goes.
    pub fast: bool,
}

impl Done {
    /// Whether it was done where packets go this way.
    #[must_use]
    pub fn is_of(&self, way: Way) -> bool {
        self.way == way || self.fast
    }
}

/// First fragments that were translated.
pub type Notes = BTreeMap<FragmentId, Done>;
