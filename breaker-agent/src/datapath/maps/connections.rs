//! Connections that count against limits. The agent reads the connections that the programs counted, and takes those
//! that ended without a FIN or RST out of the counts.
//!
//! | connection | counts until |
//! |---|---|
//! | closed with both FINs or a RST | the program sees the last of them |
//! | whose SYN was not answered | [`UNANSWERED`] after its last SYN |
//! | with one FIN only (half-closed) | [`HALF_CLOSED`] after that FIN |
//! | of datagrams | [`DATAGRAMS`] after the client's last datagram |
//! | without packets | its service's `idle` time has passed in a census |
//! | of a process of the node | its socket is closed |
//!
//! Packets of an established connection do not take the full path, so the programs do not note them. While a limit
//! is nearly reached ([`is_near`]), the agent makes them take the full path (a *census*). A census tells a
//! connection that is in use from one whose client has vanished.

use std::{
    collections::{BTreeMap, HashMap, HashSet},
    mem::offset_of,
    sync::atomic::{AtomicU32, AtomicU64, Ordering},
    time::Duration,
};

use breaker_common::{ClientState, ConnectionState, ServiceLimits, TICK_SHIFT, WAYS, connection_state as bits};

use super::limits::{Clients, Connections, LimitMaps};
use crate::clock;

/// How long a connection counts after a SYN without an answer. Linux waits at most 64 s after a SYN before it sends
/// the next one or gives up (`tcp_syn_retries = 6`).
pub const UNANSWERED: Duration = Duration::from_secs(75);

/// How long a half-closed connection counts: as long as in conntrack (`nf_conntrack_tcp_timeout_fin_wait`).
pub const HALF_CLOSED: Duration = Duration::from_secs(120);

/// How long a flow of datagrams counts without a datagram. The programs use the same time (`limit/connections.rs`
/// there).
pub const DATAGRAMS: Duration = Duration::from_secs(60);

/// How long the connection of a socket of the node counts if the program did not see the socket's close.
const SOCKET: Duration = Duration::from_secs(24 * 3600);

/// How long an admitted connection that is not counted is remembered, so that a repeated SYN is recognized. Linux
/// gives up a connection attempt after 127 s (`tcp_syn_retries = 6`).
const REMEMBERED: Duration = Duration::from_secs(130);

/// How long a connection is kept whose service has no limits any more.
const LEFTOVER: Duration = Duration::from_secs(10);

/// Input of a sweep for one service.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Rule {
    /// How long an established connection may be without packets; `None` until all packets have been seen for that
    /// long.
    pub idle: Option<Duration>,
}

/// Result of a sweep for one service.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Use {
    /// Whether a limit on concurrent connections is nearly reached.
    pub near: bool,
    /// Whether new connections went from the primary to the backup because of a limit.
    pub overflowed: bool,
}

/// Whether a count has reached 80 % of its limit. A limit of 0 means that there is none, and is never near.
const fn is_near(count: u32, limit: u32) -> bool {
    limit != 0 && count as u64 * 5 >= limit as u64 * 4
}

/// A connection as the agent reads it from `CONNECTIONS`.
struct Seen {
    limiter: u32,
    state: u32,
    client: u32,
    age: Duration,
}

impl Seen {
    /// Whether the connection has ended, as far as the agent can know.
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
    fn entries(&self) -> u32 {
        self.connection_buckets * WAYS as u32
    }

    fn tag(&self, entry: u32) -> &AtomicU64 {
        self.connections.word(entry / WAYS as u32, (entry as usize % WAYS) * 8)
    }

    fn field(&self, entry: u32, offset: usize) -> &AtomicU32 {
        let state = offset_of!(Connections, states) + (entry as usize % WAYS) * size_of::<ConnectionState>();
        self.connections.word32(entry / WAYS as u32, state + offset)
    }

    fn client(&self, number: u32) -> &AtomicU32 {
        let entry = number - 1;
        let state = offset_of!(Clients, states) + (entry as usize % WAYS) * size_of::<ClientState>();
        self.clients.word32(entry / WAYS as u32, state + offset_of!(ClientState, concurrent))
    }

    /// Returns the connection of an entry in `CONNECTIONS`, with its tag; `None` if the entry is free.
    fn connection(&self, entry: u32) -> Option<(u64, Seen)> {
        let tag = self.tag(entry).load(Ordering::SeqCst);
        if tag == 0 {
            return None;
        }
        let field = |offset| self.field(entry, offset).load(Ordering::SeqCst);
        // First the state: see `ConnectionEntry::release` in the programs.
        let state = field(offset_of!(ConnectionState, state));
        let last = u64::from(field(offset_of!(ConnectionState, last_seen_tick)));
        let seen = Seen {
            limiter: field(offset_of!(ConnectionState, limiter)),
            state,
            client: field(offset_of!(ConnectionState, client)),
            age: Duration::from_nanos(clock::monotonic_ns().saturating_sub((last + 1) << TICK_SHIFT)),
        };
        Some((tag, seen))
    }

    /// Frees an entry, and counts its connection down if it was counted. Like the programs
    /// (`ConnectionEntry::release` there), it clears the COUNTED bit by compare-and-swap, so that only one side counts
    /// down. If the state changes meanwhile, the entry stays until the next sweep.
    fn release(&self, entry: u32) {
        let Some((tag, seen)) = self.connection(entry) else { return };
        if seen.state & bits::COUNTED != 0 {
            let state = self.field(entry, offset_of!(ConnectionState, state));
            let after = seen.state & !bits::COUNTED;
            if state.compare_exchange(seen.state, after, Ordering::SeqCst, Ordering::SeqCst).is_err() {
                return;
            }
            self.count(seen.limiter).fetch_sub(1, Ordering::SeqCst);
            if seen.client != 0 {
                self.client(seen.client).fetch_sub(1, Ordering::SeqCst);
            }
        }
        let _ = self.tag(entry).compare_exchange(tag, 0, Ordering::SeqCst, Ordering::SeqCst);
    }

    /// Walks all connections of services with limits (`rules`, by service index). Removes those that have ended,
    /// and returns how near the limits are, by service index.
    pub(crate) fn sweep(&mut self, rules: &BTreeMap<u32, Rule>) -> BTreeMap<u32, Use> {
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
        for entry in 0..self.entries() {
            let Some((_, seen)) = self.connection(entry) else { continue };
            let index = seen.limiter / 2;
            // A service without limits has no connections, except those that packets in flight have added since it
            // lost them.
            let is_over = rules.get(&index).map_or(seen.age > LEFTOVER, |rule| seen.is_over(*rule));
            if is_over {
                self.release(entry);
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
        self.correct_counts(&before, &counted);
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

    /// Corrects counts that do not agree with the entries in `CONNECTIONS`. A count is corrected only if it
    /// differed by the same amount in two sweeps in a row, and did not change during the sweep. No cause of such a
    /// difference is known.
    fn correct_counts(&mut self, before: &HashMap<u32, u32>, counted: &HashMap<u32, i64>) {
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
            tracing::warn!("the count of limiter {limiter} was wrong by {difference} connections: corrected");
            let mended = u32::try_from(i64::from(*count) - difference).unwrap_or(0);
            let _ = self.count(*limiter).compare_exchange(*count, mended, Ordering::SeqCst, Ordering::SeqCst);
        }
        self.drift = drift;
    }

    /// Removes a service's connections. It is called when the programs do not see the ends of connections any more.
    pub(crate) fn forget_connections(&self, index: u32) {
        for entry in 0..self.entries() {
            if self.connection(entry).is_some_and(|(_, seen)| seen.limiter / 2 == index) {
                self.release(entry);
            }
        }
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
