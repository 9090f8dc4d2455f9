//! The maps of limits: what is configured goes in, what the programs counted comes out, and connections that ended without a
//! sign are taken out of the count.
//!
//! | a connection | counts until |
//! |---|---|
//! | with both FINs or a RST | the program that sees the last of them |
//! | whose SYN was never answered | [`UNANSWERED`] after its last SYN |
//! | with one FIN only (half-closed) | [`HALF_CLOSED`] after that FIN |
//! | of datagrams | [`DATAGRAMS`] after the client's last one |
//! | without packets | its service's `idle`, from when the limit was nearly reached |
//! | of a process of the node | its socket is closed |
//!
//! Packets of an established connection are not seen. Only while a limit is nearly reached ([`is_near`]) does the agent ask
//! for them (a *census*), so that a connection whose client has vanished is told from one that is in use.

use std::{
    collections::{BTreeMap, HashMap, HashSet},
    hash::{BuildHasher as _, Hasher as _, RandomState},
    mem::offset_of,
    net::IpAddr,
    sync::atomic::{AtomicU32, AtomicU64, Ordering},
    time::Duration,
};

use anyhow::{Context as _, Result};
use aya::maps::{Map, MapData, PerCpuArray, PerCpuValues};
use breaker_common::{
    Bucket, ClientState, ConnectionState, LIMITED_CLIENTS, LIMITED_WINDOW_SHIFT, LimitCounters, LimitedClient, Limiter,
    ServiceLimits, TICK_SHIFT, WAYS, connection_state as bits, limit_flags,
};

use super::{
    maps::{array, entries, monotonic_ns, shared, typed},
    mmap::SharedArray,
};
use crate::datapath::{LimitReport, LimitedClientView};

/// The longest time between two SYNs of one connection attempt is 64 s (Linux, `tcp_syn_retries = 6`).
pub const UNANSWERED: Duration = Duration::from_secs(75);
/// As conntrack's `nf_conntrack_tcp_timeout_fin_wait`.
pub const HALF_CLOSED: Duration = Duration::from_secs(120);
/// The programs go by the same time (`limit/connections.rs` there).
pub const DATAGRAMS: Duration = Duration::from_secs(60);
/// How long a socket of the node's own is believed to be open without its end being seen.
const SOCKET: Duration = Duration::from_secs(24 * 3600);
/// How long an admitted connection that is not counted is remembered: Linux sends its last SYN after 127 s at the most.
const REMEMBERED: Duration = Duration::from_secs(130);

/// How long a connection of a service that has no limits any more stays.
const LEFTOVER: Duration = Duration::from_secs(10);

type Connections = Bucket<ConnectionState>;
type Clients = Bucket<ClientState>;

/// The maps of limits, open.
pub(super) struct LimitMaps {
    limits: SharedArray,
    limiters: SharedArray,
    connections: SharedArray,
    clients: SharedArray,
    limited: SharedArray,
    counters: PerCpuArray<MapData, LimitCounters>,
    /// Numbers of buckets.
    pub connection_buckets: u32,
    pub client_buckets: u32,
    /// By how much counts differed from the places at the last sweep.
    drift: HashMap<u32, i64>,
}

/// What a sweep needs to know of a service.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct Rule {
    /// How long a connection may be without packets, if all of its packets were seen for as long as that.
    pub idle: Option<Duration>,
}

/// What a sweep found of a service.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct Use {
    /// Whether a limit on connections at the same time is nearly reached.
    pub near: bool,
    /// Whether connections of the primary went to the backup because of a limit.
    pub overflowed: bool,
}

/// True when a count has reached 80 % of its limit. A limit of 0 is none.
const fn is_near(count: u32, limit: u32) -> bool {
    limit != 0 && count as u64 * 5 >= limit as u64 * 4
}

/// A connection that a sweep looks at.
struct Seen {
    limiter: u32,
    state: u32,
    client: u32,
    age: Duration,
}

impl Seen {
    /// Whether it has ended, by all that can be known.
    fn is_over(&self, rule: Rule) -> bool {
        let has = |bit| self.state & bit != 0;
        let limit = if !has(bits::COUNTED) && !has(bits::DATAGRAMS) {
            REMEMBERED
        } else if has(bits::DATAGRAMS) {
            DATAGRAMS
        } else if has(bits::SOCKET) {
            SOCKET
        } else if has(bits::CLIENT_FIN | bits::SERVER_FIN) {
            HALF_CLOSED
        } else if !has(bits::ANSWERED) {
            UNANSWERED
        } else {
            match rule.idle {
                Some(idle) => idle,
                None => return false,
            }
        };
        self.age > limit
    }
}

impl LimitMaps {
    pub(super) const SIZES: [(&'static str, usize, usize); 6] = [
        ("LIMITS", 4, size_of::<ServiceLimits>()),
        ("LIMITERS", 4, size_of::<Limiter>()),
        ("CONNECTIONS", 4, size_of::<Connections>()),
        ("CLIENTS", 4, size_of::<Clients>()),
        ("LIMITED", 4, size_of::<LimitedClient>()),
        ("LIMIT_COUNTERS", 4, size_of::<LimitCounters>()),
    ];

    pub(super) fn open(open: &mut impl FnMut(&str) -> Result<Map>) -> Result<Self> {
        let mut map = |name: &str, size: usize| -> Result<(SharedArray, u32)> {
            let data = array(open(name)?, name)?;
            Ok((shared(&data, size)?, entries(&data)?))
        };
        let (connections, connection_buckets) = map("CONNECTIONS", size_of::<Connections>())?;
        let (clients, client_buckets) = map("CLIENTS", size_of::<Clients>())?;
        Ok(Self {
            limits: map("LIMITS", size_of::<ServiceLimits>())?.0,
            limiters: map("LIMITERS", size_of::<Limiter>())?.0,
            limited: map("LIMITED", size_of::<LimitedClient>())?.0,
            connections,
            clients,
            connection_buckets,
            client_buckets,
            counters: typed(open("LIMIT_COUNTERS")?, "LIMIT_COUNTERS")?,
            drift: HashMap::new(),
        })
    }

    /// What is configured for a service.
    pub(super) fn get(&self, index: u32) -> ServiceLimits {
        self.limits.read(index)
    }

    /// Configures a service's limits. It keeps its key; one that has none gets one.
    pub(super) fn set(&self, index: u32, limits: ServiceLimits) {
        let before = self.get(index);
        let hash_key = if before.hash_key == 0 { RandomState::new().build_hasher().finish() } else { before.hash_key };
        self.limits.write(index, &ServiceLimits { hash_key, ..limits });
    }

    /// Switches a service's census on or off: while it is on, every packet of a client marks its connection as alive.
    pub(super) fn set_census(&self, index: u32, on: bool) {
        let flags = if on { limit_flags::CENSUS } else { 0 };
        self.limits.store32(index, offset_of!(ServiceLimits, flags), flags);
    }

    /// Forgets all that is known of a service: its limits, its counts, its connections.
    ///
    /// # Errors
    /// A map that cannot be written.
    pub(super) fn clear(&mut self, index: u32) -> Result<()> {
        self.limits.write(index, &ServiceLimits::NONE);
        self.forget_connections(index);
        for place in 0..LIMITED_CLIENTS {
            let limiter = self.limited.word32(place, offset_of!(LimitedClient, limiter)).load(Ordering::SeqCst);
            if limiter != 0 && (limiter - 1) / 2 == index {
                self.limited.store32(place, offset_of!(LimitedClient, limiter), 0);
            }
        }
        for tier in [0, 1] {
            let limiter = index * 2 + tier;
            self.limiters.write(limiter, &Limiter { arrival_ns: 0, concurrent: 0, overflowed: 0, pad: [0; 6] });
            self.drift.remove(&limiter);
        }
        let cpus = self.counters.get(&index, 0).context("read the counters of limits")?.len();
        let zeros = PerCpuValues::try_from(vec![LimitCounters::default(); cpus]).context("clear them")?;
        self.counters.set(index, zeros, 0).context("clear the counters of limits")
    }

    /// Forgets a service's connections: nobody sees their ends any more.
    pub(super) fn forget_connections(&self, index: u32) {
        for place in 0..self.places() {
            if self.connection(place).is_some_and(|(_, seen)| seen.limiter / 2 == index) {
                self.release(place);
            }
        }
    }

    /// A report on a service's limits, with up to `clients` of its clients.
    ///
    /// # Errors
    /// A map that cannot be read.
    pub(super) fn report(&self, index: u32, clients: usize) -> Result<LimitReport> {
        Ok(LimitReport {
            counters: self.counters(index)?,
            concurrent: self.concurrent(index),
            clients: if clients == 0 { Vec::new() } else { self.limited_clients(index, clients) },
        })
    }

    /// Connections of the primary and of the backup that are counted.
    fn concurrent(&self, index: u32) -> [u32; 2] {
        [0, 1].map(|tier| self.count(index * 2 + tier).load(Ordering::SeqCst))
    }

    fn count(&self, limiter: u32) -> &AtomicU32 {
        self.limiters.word32(limiter, offset_of!(Limiter, concurrent))
    }

    /// Whether connections of the primary went to the backup because of a limit, since it was last cleared.
    pub(super) fn overflowed(&self, index: u32) -> &AtomicU32 {
        self.limiters.word32(index * 2, offset_of!(Limiter, overflowed))
    }

    /// What limits did, over all CPUs.
    ///
    /// # Errors
    /// A map that cannot be read.
    fn counters(&self, index: u32) -> Result<LimitCounters> {
        let per_cpu = self.counters.get(&index, 0).context("read the counters of limits")?;
        let mut sum = LimitCounters::default();
        for one in per_cpu.iter() {
            for (tier, kind) in [0, 1].into_iter().flat_map(|tier| (0..4).map(move |kind| (tier, kind))) {
                sum.limited[tier][kind] += one.limited[tier][kind];
                sum.dry_run[tier][kind] += one.dry_run[tier][kind];
            }
            sum.failed_over += one.failed_over;
            sum.contended += one.contended;
            sum.repeated += one.repeated;
            sum.untracked += one.untracked;
        }
        Ok(sum)
    }

    /// The clients of a service that were refused most often in the last minute, most first, `most` of them.
    fn limited_clients(&self, index: u32, most: usize) -> Vec<LimitedClientView> {
        let prefix: u32 = self.get(index).client_mask.bytes.iter().map(|byte| byte.count_ones()).sum();
        let named = |address: IpAddr| match address {
            IpAddr::V6(ip) if prefix < 128 => format!("{ip}/{prefix}"),
            ip => ip.to_string(),
        };
        let now = monotonic_ns();
        let window = now >> LIMITED_WINDOW_SHIFT;
        // What part of the window before is still in the last minute.
        let rest = (1 << LIMITED_WINDOW_SHIFT) - (now & ((1 << LIMITED_WINDOW_SHIFT) - 1));
        let mut clients: Vec<LimitedClientView> = (0..LIMITED_CLIENTS)
            .map(|place| self.limited.read::<LimitedClient>(place))
            .filter(|entry| entry.limiter != 0 && (entry.limiter - 1) / 2 == index)
            .filter_map(|entry| {
                let (current, before) = match window.checked_sub(u64::from(entry.window))? {
                    0 => (entry.count, entry.before),
                    1 => (0, entry.count),
                    _ => return None,
                };
                let refused = u64::from(current) + ((u64::from(before) * (rest >> 20)) >> (LIMITED_WINDOW_SHIFT - 20));
                let address = IpAddr::from(entry.client.bytes).to_canonical();
                (refused > 0).then(|| LimitedClientView {
                    client: (!address.is_unspecified()).then(|| named(address)),
                    tier: if (entry.limiter - 1) % 2 == 0 { "primary" } else { "backup" }.into(),
                    refused,
                })
            })
            .collect();
        clients.sort_by(|a, b| b.refused.cmp(&a.refused).then(a.client.cmp(&b.client)));
        clients.truncate(most);
        clients
    }

    fn places(&self) -> u32 {
        self.connection_buckets * WAYS as u32
    }

    fn tag(&self, place: u32) -> &AtomicU64 {
        self.connections.word(place / WAYS as u32, (place as usize % WAYS) * 8)
    }

    fn field(&self, place: u32, offset: usize) -> &AtomicU32 {
        let state = offset_of!(Connections, states) + (place as usize % WAYS) * size_of::<ConnectionState>();
        self.connections.word32(place / WAYS as u32, state + offset)
    }

    fn client(&self, number: u32) -> &AtomicU32 {
        let place = number - 1;
        let state = offset_of!(Clients, states) + (place as usize % WAYS) * size_of::<ClientState>();
        self.clients.word32(place / WAYS as u32, state + offset_of!(ClientState, concurrent))
    }

    /// The connection in a place, and its tag.
    fn connection(&self, place: u32) -> Option<(u64, Seen)> {
        let tag = self.tag(place).load(Ordering::SeqCst);
        if tag == 0 {
            return None;
        }
        let field = |offset| self.field(place, offset).load(Ordering::SeqCst);
        let last = u64::from(field(offset_of!(ConnectionState, last_tick)));
        let seen = Seen {
            limiter: field(offset_of!(ConnectionState, limiter)),
            state: field(offset_of!(ConnectionState, state)),
            client: field(offset_of!(ConnectionState, client)),
            age: Duration::from_nanos(monotonic_ns().saturating_sub((last + 1) << TICK_SHIFT)),
        };
        Some((tag, seen))
    }

    /// Frees a place, and counts its connection down if it was counted: as the programs do (`Place::release` there).
    fn release(&self, place: u32) {
        let Some((tag, seen)) = self.connection(place) else { return };
        if seen.state & bits::COUNTED != 0 {
            let state = self.field(place, offset_of!(ConnectionState, state));
            let after = seen.state & !bits::COUNTED;
            if state.compare_exchange(seen.state, after, Ordering::SeqCst, Ordering::SeqCst).is_err() {
                return;
            }
            self.count(seen.limiter).fetch_sub(1, Ordering::SeqCst);
            if seen.client != 0 {
                self.client(seen.client).fetch_sub(1, Ordering::SeqCst);
            }
        }
        let _ = self.tag(place).compare_exchange(tag, 0, Ordering::SeqCst, Ordering::SeqCst);
    }

    /// Goes through all connections of services with limits (`rules`, by index): takes out those that have ended, and says how
    /// near the limits are.
    pub(super) fn sweep(&mut self, rules: &BTreeMap<u32, Rule>) -> BTreeMap<u32, Use> {
        if rules.is_empty() {
            self.drift.clear();
            return BTreeMap::new();
        }
        let limits: HashMap<u32, ServiceLimits> = rules.keys().map(|index| (*index, self.get(*index))).collect();
        let before: HashMap<u32, u32> = rules
            .keys()
            .flat_map(|index| [index * 2, index * 2 + 1])
            .map(|limiter| (limiter, self.count(limiter).load(Ordering::SeqCst)))
            .collect();
        let mut counted: HashMap<u32, i64> = HashMap::new();
        let mut near: HashSet<u32> = HashSet::new();
        for place in 0..self.places() {
            let Some((_, seen)) = self.connection(place) else { continue };
            let index = seen.limiter / 2;
            // Of a service without limits, none is left but what a packet under way has put there.
            let is_over = rules.get(&index).map_or(seen.age > LEFTOVER, |rule| seen.is_over(*rule));
            if is_over {
                self.release(place);
                continue;
            }
            if seen.state & bits::COUNTED == 0 {
                continue;
            }
            *counted.entry(seen.limiter).or_default() += 1;
            let limit = limits.get(&index).map_or(0, |l| l.tiers[seen.limiter as usize % 2].client_concurrent);
            if seen.client != 0 && is_near(self.client(seen.client).load(Ordering::SeqCst), limit) {
                near.insert(index);
            }
        }
        self.mend(&before, &counted);
        rules
            .keys()
            .map(|index| {
                let limits = limits.get(index).map(|limits| limits.tiers).unwrap_or_default();
                let full = |tier: u32| {
                    is_near(self.count(index * 2 + tier).load(Ordering::SeqCst), limits[tier as usize].concurrent)
                };
                let overflowed = self.overflowed(*index).load(Ordering::SeqCst) != 0;
                (*index, Use { near: near.contains(index) || full(0) || full(1), overflowed })
            })
            .collect()
    }

    /// Mends counts that do not agree with the places: by as much as they differed in two sweeps in a row, and only where
    /// nothing came or went meanwhile. (Nothing is known that makes them differ.)
    fn mend(&mut self, before: &HashMap<u32, u32>, counted: &HashMap<u32, i64>) {
        let mut drift = HashMap::new();
        for (limiter, count) in before {
            if self.count(*limiter).load(Ordering::SeqCst) != *count {
                continue;
            }
            let difference = i64::from(*count) - counted.get(limiter).copied().unwrap_or_default();
            if difference == 0 {
                continue;
            }
            if self.drift.get(limiter) != Some(&difference) {
                drift.insert(*limiter, difference);
                continue;
            }
            tracing::warn!("limiter {limiter} counts {difference} connections that are not there: mended");
            let mended = u32::try_from(i64::from(*count) - difference).unwrap_or(0);
            let _ = self.count(*limiter).compare_exchange(*count, mended, Ordering::SeqCst, Ordering::SeqCst);
        }
        self.drift = drift;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn how_long_a_connection_counts_depends_on_what_was_seen_of_it() {
        let idle = Duration::from_secs(900);
        let rows: &[(&str, u32, Option<Duration>, Option<u64>)] = &[
            ("unanswered", bits::COUNTED, None, Some(75)),
            ("established, and its packets are not seen", bits::COUNTED | bits::ANSWERED, None, None),
            ("established, and its packets are seen", bits::COUNTED | bits::ANSWERED, Some(idle), Some(900)),
            ("half-closed by the client", bits::COUNTED | bits::ANSWERED | bits::CLIENT_FIN, None, Some(120)),
            ("half-closed by the server", bits::COUNTED | bits::ANSWERED | bits::SERVER_FIN, None, Some(120)),
            ("datagrams", bits::COUNTED | bits::DATAGRAMS, None, Some(60)),
            ("datagrams that are not counted", bits::DATAGRAMS, None, Some(60)),
            ("a socket of the node", bits::COUNTED | bits::SOCKET, Some(idle), Some(86_400)),
            ("not counted", 0, None, Some(130)),
        ];
        for (what, state, idle, expected) in rows {
            let over = |seconds| {
                let age = Duration::from_secs(seconds);
                Seen { limiter: 0, state: *state, client: 0, age }.is_over(Rule { idle: *idle })
            };
            match expected {
                Some(seconds) => assert_eq!((over(*seconds), over(seconds + 1)), (false, true), "{what}"),
                None => assert!(!over(1_000_000), "{what}"),
            }
        }
    }

    #[test]
    fn four_fifths_of_a_limit_are_near() {
        assert_eq!([79, 80].map(|count| is_near(count, 100)), [false, true]);
        assert!(is_near(1, 1) && !is_near(0, 1) && !is_near(1_000_000, 0));
    }
}
