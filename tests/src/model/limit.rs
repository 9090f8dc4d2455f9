//! Limits: who is admitted, and who still counts. No time passes: a token that was taken does not come back.

use std::{collections::BTreeMap, net::IpAddr};

use super::{flow::ClientSide, headers::Headers};

/// The limits of a tier. `None`: there is no such limit.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct TierLimits {
    /// Connections that a full bucket lets through.
    pub burst: Option<u32>,
    /// The same for each client.
    pub client_burst: Option<u32>,
    /// Connections at the same time.
    pub concurrent: Option<u32>,
    /// The same for each client.
    pub client_concurrent: Option<u32>,
    /// What happens over a limit.
    pub over: Over,
}

/// What happens over a limit.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Over {
    /// It is refused.
    #[default]
    Reset,
    /// Its packet is dropped.
    Drop,
    /// It goes to the other tier.
    Failover,
}

/// A service's limits: the primary's, the backup's.
pub type Limits = [TierLimits; 2];

/// Index of a tier, as the counters have it.
pub const PRIMARY: usize = 0;
/// As [`PRIMARY`].
pub const BACKUP: usize = 1;

impl TierLimits {
    fn tells_clients(&self) -> bool {
        self.client_burst.is_some() || self.client_concurrent.is_some()
    }

    /// Whether connections at the same time are limited.
    #[must_use]
    pub fn counts(&self) -> bool {
        self.concurrent.is_some() || self.client_concurrent.is_some()
    }

    fn any(&self) -> bool {
        self.burst.is_some() || self.tells_clients() || self.counts()
    }
}

/// Whether a service counts connections.
#[must_use]
pub fn counts(limits: &Limits) -> bool {
    limits.iter().any(TierLimits::counts)
}

/// A limit, in the order of the counters: new connections, of one client, at the same time, of one client.
pub type Kind = usize;

/// What becomes of a request.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Answer {
    /// Admitted.
    Admitted,
    /// Its connection was admitted before.
    Repeated,
    /// Over this limit.
    Over(Kind),
}

/// A connection that was admitted.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Admitted {
    service: &'static str,
    tier: usize,
    number: u32,
    /// Part of the tier's count.
    counted: bool,
    /// Whose count it is part of, too.
    client: Option<IpAddr>,
    /// FINs that were seen: the client's, the server's.
    fins: [bool; 2],
}

/// All that was admitted.
#[derive(Clone, Debug, Default)]
pub struct Ledger {
    connections: BTreeMap<ClientSide, Admitted>,
    spent: BTreeMap<(&'static str, usize, Option<IpAddr>), u32>,
}

/// What tells clients apart: all but the host's part of an IPv6 address.
fn who(side: &ClientSide) -> IpAddr {
    match side.client.ip() {
        IpAddr::V6(ip) => IpAddr::V6((u128::from(ip) & !u128::from(u64::MAX)).into()),
        ip => ip,
    }
}

impl Ledger {
    /// How many connections of a service's tier count, of all clients or of one.
    #[must_use]
    pub fn concurrent(&self, service: &str, tier: usize, client: Option<IpAddr>) -> u32 {
        let here = self.connections.values().filter(|c| c.counted && c.service == service && c.tier == tier);
        u32::try_from(here.filter(|c| client.is_none() || c.client == client).count()).unwrap_or(u32::MAX)
    }

    /// Whether a bucket is empty. One that is emptier than it can be was emptied under another limit: it counts as full.
    fn is_empty(&mut self, key: (&'static str, usize, Option<IpAddr>), burst: Option<u32>) -> bool {
        let (Some(burst), Some(spent)) = (burst, self.spent.get_mut(&key)) else { return false };
        if *spent > burst {
            *spent = 0;
        }
        *spent >= burst
    }

    /// Asks for a connection.
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
        let client = (counted && limits.tells_clients()).then_some(client);
        self.connections.insert(side, Admitted { service, tier, number, counted, client, fins: [false; 2] });
        Answer::Admitted
    }

    /// Hears how a connection begins or ends, from its client or its server. What does not count is not followed.
    pub fn hear(&mut self, side: &ClientSide, service: &str, headers: &Headers, from_client: bool) {
        let Some(connection) = self.connections.get_mut(side).filter(|c| c.counted && c.service == service) else {
            return;
        };
        connection.fins[usize::from(!from_client)] |= headers.flags & 1 != 0;
        if headers.is_rst() || connection.fins == [true; 2] {
            self.connections.remove(side);
        }
    }

    /// Forgets a service that has no limits any more.
    pub fn forget(&mut self, service: &str) {
        self.forget_connections(service);
        self.spent.retain(|(of, ..), _| *of != service);
    }

    /// Forgets the connections of a service that does not count any more.
    pub fn forget_connections(&mut self, service: &str) {
        self.connections.retain(|_, connection| connection.service != service);
    }
}
