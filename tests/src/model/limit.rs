//! Limits: which connections are admitted, and which are counted. The model has no time: a token that a connection took
//! from a bucket does not come back.

use std::{collections::BTreeMap, net::IpAddr};

use super::{flow::ClientSide, headers::Headers};

/// The limits of a tier. `None` means that the tier has no such limit.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct TierLimits {
    /// New connections that a full bucket admits.
    pub burst: Option<u32>,
    /// New connections that a client's full bucket admits.
    pub client_burst: Option<u32>,
    /// Concurrent connections.
    pub concurrent: Option<u32>,
    /// Concurrent connections of one client.
    pub client_concurrent: Option<u32>,
    /// What happens to a new connection over a limit.
    pub over: Over,
}

/// What happens to a new connection over a limit.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Over {
    /// The connection is refused.
    #[default]
    Reset,
    /// The packet is dropped.
    Drop,
    /// The connection goes to the other tier; from the backup, it is refused.
    Failover,
}

/// A service's limits, by tier: index [`PRIMARY`], then [`BACKUP`].
pub type Limits = [TierLimits; 2];

/// Index of the primary tier, here and in the counters.
pub const PRIMARY: usize = 0;
/// Index of the backup tier, here and in the counters.
pub const BACKUP: usize = 1;

impl TierLimits {
    fn has_client_limits(&self) -> bool {
        self.client_burst.is_some() || self.client_concurrent.is_some()
    }

    /// Whether concurrent connections are limited.
    #[must_use]
    pub fn counts(&self) -> bool {
        self.concurrent.is_some() || self.client_concurrent.is_some()
    }

    fn any(&self) -> bool {
        self.burst.is_some() || self.has_client_limits() || self.counts()
    }
}

/// Whether a service limits concurrent connections in any tier.
#[must_use]
pub fn counts(limits: &Limits) -> bool {
    limits.iter().any(TierLimits::counts)
}

/// Kind of a limit, as an index into the counters: 0 new connections, 1 new connections of one client, 2 concurrent
/// connections, 3 concurrent connections of one client.
pub type Kind = usize;

/// The decision about a request for a connection.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Answer {
    /// The connection is admitted.
    Admitted,
    /// The connection was admitted before; this is its SYN again.
    Repeated,
    /// The connection exceeds this limit.
    Over(Kind),
}

/// A connection that was admitted.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Admitted {
    service: &'static str,
    tier: usize,
    /// Sequence number of the SYN; 0 for datagrams.
    number: u32,
    /// Whether the tier's count of concurrent connections includes it.
    counted: bool,
    /// The client whose own count includes it, too.
    client: Option<IpAddr>,
    /// Whether a FIN was seen: from the client, from the server.
    fins: [bool; 2],
}

/// All admitted connections, and the tokens that were taken from the buckets.
#[derive(Clone, Debug, Default)]
pub struct Ledger {
    connections: BTreeMap<ClientSide, Admitted>,
    spent: BTreeMap<(&'static str, usize, Option<IpAddr>), u32>,
}

/// The client that limits distinguish: an IPv4 address, or the upper 64 bits of an IPv6 address.
fn who(side: &ClientSide) -> IpAddr {
    match side.client.ip() {
        IpAddr::V6(ip) => IpAddr::V6((u128::from(ip) & !u128::from(u64::MAX)).into()),
        ip => ip,
    }
}

impl Ledger {
    /// Number of counted connections of a service's tier: of all clients if `client` is `None`, else of that client.
    #[must_use]
    pub fn concurrent(&self, service: &str, tier: usize, client: Option<IpAddr>) -> u32 {
        let here = self.connections.values().filter(|c| c.counted && c.service == service && c.tier == tier);
        u32::try_from(here.filter(|c| client.is_none() || c.client == client).count()).unwrap_or(u32::MAX)
    }

    /// Whether a bucket is empty. If more tokens were taken than `burst`, they were taken under an earlier limit with a
    /// larger burst: the bucket then counts as full.
    fn is_empty(&mut self, key: (&'static str, usize, Option<IpAddr>), burst: Option<u32>) -> bool {
        let (Some(burst), Some(spent)) = (burst, self.spent.get_mut(&key)) else { return false };
        if *spent > burst {
            *spent = 0;
        }
        *spent >= burst
    }

    /// Decides about the first packet of a connection, and records the connection if it is admitted. `number` is the
    /// sequence number of the SYN, 0 for datagrams. A limit that refuses the connection costs the other limits nothing.
    pub fn ask(
        &mut self,
        side: ClientSide,
        service: &'static str,
        tier: usize,
        limits: &TierLimits,
        number: u32,
    ) -> Answer {
        if let Some(before) = self.connections.get(&side) {
            if (before.service, before.tier, before.number) == (service, tier, number) {
                return Answer::Repeated;
            }
            self.connections.remove(&side);
        }
        if !limits.any() {
            return Answer::Admitted;
        }
        let client = who(&side);
        let (all, own) = ((service, tier, None), (service, tier, Some(client)));
        let full = |count: u32, most: Option<u32>| most.is_some_and(|most| count >= most);
        if self.is_empty(own, limits.client_burst) {
            return Answer::Over(1);
        }
        if full(self.concurrent(service, tier, Some(client)), limits.client_concurrent) {
            return Answer::Over(3);
        }
        if self.is_empty(all, limits.burst) {
            return Answer::Over(0);
        }
        if full(self.concurrent(service, tier, None), limits.concurrent) {
            return Answer::Over(2);
        }
        for (key, burst) in [(own, limits.client_burst), (all, limits.burst)] {
            if burst.is_some() {
                *self.spent.entry(key).or_default() += 1;
            }
        }
        let counted = limits.counts();
        let client = (counted && limits.has_client_limits()).then_some(client);
        self.connections.insert(side, Admitted { service, tier, number, counted, client, fins: [false; 2] });
        Answer::Admitted
    }

    /// Records a packet of a connection, from its client or its server. A RST, or a FIN from both, removes the
    /// connection. Connections that are not counted are ignored.
    pub fn hear(&mut self, side: &ClientSide, service: &str, headers: &Headers, from_client: bool) {
        let Some(connection) = self.connections.get_mut(side).filter(|c| c.counted && c.service == service) else {
            return;
        };
        connection.fins[usize::from(!from_client)] |= headers.flags & 1 != 0;
        if headers.is_rst() || connection.fins == [true; 2] {
            self.connections.remove(side);
        }
    }

    /// Forgets the connections and buckets of a service that no longer has limits.
    pub fn forget(&mut self, service: &str) {
        self.forget_connections(service);
        self.spent.retain(|(of, ..), _| *of != service);
    }

    /// Forgets the connections of a service that no longer limits concurrent connections.
    pub fn forget_connections(&mut self, service: &str) {
        self.connections.retain(|_, connection| connection.service != service);
    }
}
