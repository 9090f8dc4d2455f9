//! The datapath's rules as plain Rust: what the programs are held against, packet by packet.
//!
//! Written from the design, not from the programs: no tables, no budgets, no incremental tricks. Read [`Model::pass`] from
//! top to bottom to follow a packet:
//!
//! | module | one concern |
//! |---|---|
//! | [`headers`] | bytes to addresses, ports, flags |
//! | [`service`] | where a service's new connections may go |
//! | [`flow`] | the decisions that are pinned |
//! | [`limit`] | who is admitted, and who still counts |
//! | [`answer`] | refusing and resetting |
//! | [`quote`] | what ICMP errors quote |
//! | [`fragment`] | later fragments |
//! | [`bytes`] | changing a frame, and its checksums |
//!
//! Where the design leaves a choice (which of several backups, which free source port), the model takes the one that was
//! made, if it is allowed, and holds the flow to it from then on.

pub mod answer;
pub mod bytes;
pub mod flow;
pub mod fragment;
pub mod headers;
pub mod limit;
pub mod quote;
pub mod service;

use std::{
    collections::{BTreeMap, BTreeSet},
    net::{IpAddr, SocketAddr},
};

use breaker_common::{BreakerState, DEFAULT_MASQUERADE_MARK, FlowKind, PassReason};

use bytes::{Edit, Sum, word};
use flow::{BackendSide, Book, ClientSide, Flow, LastWords};
use fragment::{Done, Notes, Way};
use headers::{Frame, Headers, Later, addresses, addresses_at, ip_sum, octets};
use limit::{Answer, BACKUP, Kind, Ledger, Over, PRIMARY};
use quote::End;
use service::{Choice, Service};

/// Where the IP header of an Ethernet frame without VLAN tags starts.
const UNTAGGED: usize = 14;

/// Where a packet passes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Hook {
    /// From a pod on this node.
    FromPod,
    /// To a pod on this node.
    ToPod,
    /// From outside, by an uplink.
    FromOutside,
    /// To outside, by an uplink.
    ToOutside,
}

/// What becomes of a packet.
#[derive(Clone, Debug)]
pub struct Outcome {
    /// Sent back out of its own interface, or into another pod's namespace; else it goes on. (A test run does not tell which.)
    pub sent_away: bool,
    /// The packet.
    pub frame: Vec<u8>,
    /// Checksums that were changed.
    pub sums: Vec<Sum>,
    /// Bits set in its mark.
    pub mark: u32,
    /// What was counted.
    pub reason: Option<PassReason>,
    /// Dropped.
    pub dropped: bool,
    /// Limits that it was over, by tier and kind; in a dry run, would have been.
    pub limited: Vec<(usize, Kind)>,
}

/// What was seen to become of it: for choices that are free.
#[derive(Clone, Copy, Debug)]
pub struct Seen<'a> {
    /// Sent back, or into a pod.
    pub sent_away: bool,
    /// The packet.
    pub frame: &'a [u8],
    /// What was counted.
    pub reason: Option<PassReason>,
    /// The limits that it was over.
    pub limited: &'a [(usize, Kind)],
    /// In a dry run: it would have been moved or refused.
    pub would_move: bool,
}

/// What the datapath knows.
#[derive(Clone, Debug, Default)]
pub struct Model {
    /// By name.
    pub services: BTreeMap<&'static str, Service>,
    /// Every address that is a backend's, with its protocol.
    pub backends: BTreeSet<(SocketAddr, u8)>,
    /// Flows.
    pub book: Book,
    /// Who was admitted.
    pub ledger: Ledger,
    notes: Notes,
    /// Backends that flows of frontends went to: only their packets are looked at.
    watched: BTreeSet<(SocketAddr, u8)>,
    /// Of them, those with flows that leave the stack out.
    watched_fast: BTreeSet<(SocketAddr, u8)>,
    /// Addresses of backends that are pods of this node.
    pub near: BTreeSet<IpAddr>,
    /// Some service has or had such flows.
    pub any_fast: bool,
    /// Backends with direct connections that had to move aside: only their connections are looked at from end to end.
    aside: BTreeSet<(SocketAddr, u8)>,
}

impl Outcome {
    fn untouched(frame: &[u8], reason: Option<PassReason>) -> Self {
        let (sums, limited) = (Vec::new(), Vec::new());
        Self { sent_away: false, frame: frame.to_vec(), sums, mark: 0, reason, dropped: false, limited }
    }

    fn changed(edit: Edit, mark: u32) -> Self {
        Self { frame: edit.frame, sums: edit.sums, mark, ..Self::untouched(&[], None) }
    }

    fn sent_back(edit: Edit) -> Self {
        Self::changed(edit, 0).into_pod(true)
    }

    /// Into a pod's namespace, if `fast`.
    fn into_pod(self, fast: bool) -> Self {
        Self { sent_away: fast, ..self }
    }
}

impl Model {
    /// Puts a packet through a hook.
    pub fn pass(&mut self, hook: Hook, frame: &[u8], seen: Seen<'_>) -> Outcome {
        let outside = matches!(hook, Hook::FromOutside | Hook::ToOutside);
        let way = if matches!(hook, Hook::FromPod | Hook::FromOutside) { Way::There } else { Way::Back };
        match (headers::read(frame, outside), way) {
            (Frame::Other, _) => Outcome::untouched(frame, None),
            (Frame::LeftAlone(reason), _) => Outcome::untouched(frame, Some(reason)),
            (Frame::LaterFragment(later), way) => self.later_fragment(frame, way, &later),
            (Frame::Error(error), Way::There) => self.error_by_client(frame, &error, outside),
            (Frame::Error(error), Way::Back) => self.error_for_client(frame, &error, false),
            (Frame::Transport(headers), way) => {
                // Identifications get used again: what was done to an earlier packet's fragments is over.
                if let Some((id, _)) = headers.first_of
                    && self.notes.get(&id).is_some_and(|done| done.is_of(way))
                {
                    self.notes.remove(&id);
                }
                match way {
                    Way::There => self.by_client(frame, &headers, outside, seen),
                    Way::Back => self.by_backend(frame, &headers),
                }
            }
        }
    }

    fn by_client(&mut self, frame: &[u8], headers: &Headers, outside: bool, seen: Seen<'_>) -> Outcome {
        let to = headers.destination;
        let name = self.services.iter().find(|(_, s)| s.frontends.contains(&to)).map(|(name, _)| *name);
        match name {
            Some(name) => self.for_frontend(frame, headers, name, outside, seen),
            None if !outside && self.any_fast && self.watched_fast.contains(&(headers.source, headers.proto)) => {
                self.answer(frame, headers)
            }
            // Outside, connections to pods themselves are other nodes' business.
            None if !outside && self.backends.contains(&(to, headers.proto)) => self.direct(frame, headers, seen),
            None => Outcome::untouched(frame, None),
        }
    }

    fn for_frontend(
        &mut self,
        frame: &[u8],
        headers: &Headers,
        name: &'static str,
        outside: bool,
        seen: Seen<'_>,
    ) -> Outcome {
        let service = self.services[name].clone();
        let side = ClientSide::of(headers);
        if service.limits.is_some() && headers.is_tcp() && !headers.is_syn() {
            self.ledger.hear(&side, name, headers, true);
        }
        // A connection request always decides anew; a datagram does without a flow of this epoch.
        let first = if headers.is_tcp() {
            headers.is_syn()
        } else {
            !service.tracks() || self.book.go_on(&side).is_none_or(|flow| flow.epoch != service.epoch)
        };
        if first {
            return self.decide(frame, headers, name, outside, seen);
        }
        if !service.tracks() {
            return Outcome::untouched(frame, None);
        }
        let Some(flow) = self.book.go_on(&side) else {
            // Not seen from its first packet: never rewritten, only passed or, by policy, reset.
            if service.resets_primary() && !headers.is_rst() {
                return Outcome::changed(
                    answer::reset_peer(frame, headers, headers.source.port(), headers.destination),
                    0,
                );
            }
            return Outcome::untouched(frame, None);
        };
        self.book.hear_client(&side, headers);
        // A decided flow keeps its backend, unless the policy for another side says reset.
        let redirected = flow.kind == FlowKind::Redirected;
        let resets = if redirected { service.resets_backup() } else { service.resets_primary() };
        if resets && flow.epoch != service.epoch && !headers.is_rst() {
            if let Some(flow) = self.book.flows.get_mut(&side) {
                flow.client_said.rst = true;
            }
            // (The client's reset is a copy, which is not seen here.)
            let reset = answer::reset_peer(frame, headers, flow.source_port, flow.backend);
            return Outcome::changed(reset, 0).into_pod(self.goes_fast(&flow));
        }
        if redirected { self.send(frame, headers, &flow, outside) } else { Outcome::untouched(frame, None) }
    }

    fn decide(
        &mut self,
        frame: &[u8],
        headers: &Headers,
        name: &'static str,
        outside: bool,
        seen: Seen<'_>,
    ) -> Outcome {
        let Some(service) = self.services.get_mut(name) else { return Outcome::untouched(frame, None) };
        let side = ClientSide::of(headers);
        let mut limited = Vec::new();
        // Closed and settled: nothing is decided, nothing is noted, but who is admitted.
        let settled = !service.tracks() && !service.dry_run;
        if service.tracks() {
            self.book.forget(&side);
        }
        let (choices, trial) =
            if settled { (vec![Choice::Primary], false) } else { service.choices(headers.destination) };
        let mut over = None;
        let mut failed_over = false;
        if let Some(limits) = service.limits {
            // A choice that a limit undid is not seen in what became of the packet.
            let first = match seen.limited.first() {
                Some((PRIMARY, _)) => Choice::Primary,
                Some(_) => choices.iter().copied().find(|c| matches!(c, Choice::Backup(_))).unwrap_or(choices[0]),
                None => Self::chosen(headers, seen, service, &choices),
            };
            let tier = if first == Choice::Primary { PRIMARY } else { BACKUP };
            let number = if headers.is_tcp() { sequence(frame, headers) } else { 0 };
            if first != Choice::Refuse
                && let Answer::Over(kind) = self.ledger.ask(side, name, tier, &limits[tier], number)
            {
                limited.push((tier, kind));
                if !service.dry_run {
                    if trial {
                        service.half_open_taken -= 1;
                    }
                    over = Some(limits[tier].over);
                    let backups = service.backups_for(headers.destination);
                    if tier == PRIMARY && over == Some(Over::Failover) && !backups.is_empty() {
                        (over, failed_over, service.overflowed) = (None, true, true);
                        if let Answer::Over(kind) = self.ledger.ask(side, name, BACKUP, &limits[BACKUP], number) {
                            limited.push((BACKUP, kind));
                            over = Some(limits[BACKUP].over);
                        }
                    }
                }
            }
        }
        if settled && !failed_over && over.is_none() || service.dry_run {
            return Outcome { limited, ..Outcome::untouched(frame, None) };
        }
        let choices = if failed_over { service.backups_for(headers.destination) } else { choices };
        let outcome = match over {
            Some(Over::Drop) => Outcome { dropped: true, ..Outcome::untouched(frame, None) },
            Some(_) => refuse(frame, headers),
            None => self.carry_out(frame, headers, name, outside, seen, &choices),
        };
        Outcome { limited, ..outcome }
    }

    /// Which of its choices a packet was seen to get.
    fn chosen(headers: &Headers, seen: Seen<'_>, service: &Service, choices: &[Choice]) -> Choice {
        if service.dry_run {
            let elsewhere = choices.iter().find(|choice| (**choice != Choice::Primary) == seen.would_move);
            return elsewhere.copied().unwrap_or(choices[0]);
        }
        let made = choice_made(headers, seen, service.fast);
        if choices.contains(&made) { made } else { choices[0] }
    }

    fn carry_out(
        &mut self,
        frame: &[u8],
        headers: &Headers,
        name: &'static str,
        outside: bool,
        seen: Seen<'_>,
        choices: &[Choice],
    ) -> Outcome {
        let service = self.services[name].clone();
        let side = ClientSide::of(headers);
        // A client outside that is behind a VLAN tag is behind another interface than the one that the routes name.
        let untagged = headers.l3 == UNTAGGED;
        let (fast, keeps_client) = (service.fast && (!outside || untagged), service.keeps_client && outside);
        let made = choice_made(headers, seen, fast);
        let choice = if choices.contains(&made) { made } else { choices[0] };
        let flow = Flow {
            kind: FlowKind::Passed,
            backend: headers.destination,
            source_port: headers.source.port(),
            epoch: service.epoch,
            established: false,
            client_said: LastWords::default(),
            fast: false,
            keeps_client: false,
        };
        match choice {
            Choice::Primary => {
                // While it is not closed, who is on the primary by decision is told from who was there before. A datagram need
                // not be, but for one that tries the primary.
                let pins = match service.state {
                    BreakerState::Closed => false,
                    BreakerState::Open => headers.is_tcp(),
                    BreakerState::HalfOpen => true,
                };
                if pins {
                    let _ = self.book.pin(side, flow, 0);
                }
                Outcome::untouched(frame, None)
            }
            Choice::Refuse => refuse(frame, headers),
            Choice::Backup(backend) => {
                // How it goes is decided once.
                let near = self.near.contains(&backend.ip()) && headers.source.ip() != backend.ip();
                let (fast, keeps_client) = (fast && near, keeps_client && near && !fast);
                let flow = Flow { kind: FlowKind::Redirected, backend, fast, keeps_client, ..flow };
                let Some(source_port) = self.book.pin(side, flow, port_chosen(headers, seen)) else {
                    return Outcome::untouched(frame, Some(PassReason::NoSourcePort));
                };
                self.watched.insert((backend, headers.proto));
                if fast {
                    self.watched_fast.insert((backend, headers.proto));
                }
                self.send(frame, headers, &Flow { source_port, ..flow }, outside)
            }
        }
    }

    /// Sends a client's packet to its flow's backend. Where the replies would not come back to us, netfilter is told to
    /// masquerade: a client outside, but for one that keeps its address, and a pod that is its own backup.
    fn send(&mut self, frame: &[u8], headers: &Headers, flow: &Flow, outside: bool) -> Outcome {
        let masquerade = outside && !flow.keeps_client && !flow.fast || headers.source.ip() == flow.backend.ip();
        let mark = if masquerade { DEFAULT_MASQUERADE_MARK } else { 0 };
        let fast = self.goes_fast(flow);
        self.note(headers, Way::There, flow.backend.ip(), mark, fast);
        let edit = translate(frame, headers, End::Destination, flow.backend, flow.source_port);
        Outcome::changed(edit, mark).into_pod(fast)
    }

    /// A flow that leaves the stack out does so as long as its backend is known to be near.
    fn goes_fast(&self, flow: &Flow) -> bool {
        flow.fast && self.near.contains(&flow.backend.ip())
    }

    /// A client's own connection to a backend: noted, so that it never shares a way back with a flow of a frontend. Whoever
    /// comes second gets another source port.
    fn direct(&mut self, frame: &[u8], headers: &Headers, seen: Seen<'_>) -> Outcome {
        let (side, backend) = (ClientSide::of(headers), (headers.destination, headers.proto));
        let aside = self.aside.contains(&backend);
        if headers.is_tcp() {
            // Without a changed port, only beginning and end matter.
            if !headers.is_syn() && !headers.ends() && !aside {
                return Outcome::untouched(frame, None);
            }
        } else if !aside && !self.watched.contains(&backend) {
            // A datagram does not say that it is the first; it matters only where flows of a frontend come, too.
            return Outcome::untouched(frame, None);
        }
        let known = if headers.is_syn() { None } else { self.book.go_on(&side) };
        let source_port = match known {
            Some(flow) => {
                self.book.hear_client(&side, headers);
                flow.source_port
            }
            None if headers.is_tcp() && !headers.is_syn() => return Outcome::untouched(frame, None),
            None => {
                self.book.forget(&side);
                let flow = Flow {
                    kind: FlowKind::Direct,
                    backend: headers.destination,
                    source_port: headers.source.port(),
                    epoch: 0,
                    established: false,
                    client_said: LastWords::default(),
                    fast: false,
                    keeps_client: false,
                };
                let Some(port) = self.book.pin(side, flow, port_chosen(headers, seen)) else {
                    return Outcome::untouched(frame, Some(PassReason::NoSourcePort));
                };
                port
            }
        };
        if source_port == headers.source.port() {
            return Outcome::untouched(frame, None);
        }
        self.aside.insert(backend);
        self.note(headers, Way::There, headers.destination.ip(), 0, false);
        Outcome::changed(translate(frame, headers, End::Destination, headers.destination, source_port), 0)
    }

    /// A backend's packet goes back as from what the client talks to.
    fn by_backend(&mut self, frame: &[u8], headers: &Headers) -> Outcome {
        // kube-proxy has translated the primary's segment back.
        let of = self.services.iter().find(|(_, s)| s.frontends.contains(&headers.source));
        if let Some((name, service)) = of
            && headers.is_tcp()
            && service.limits.as_ref().is_some_and(limit::counts)
        {
            let side = ClientSide { client: headers.destination, to: headers.source, proto: headers.proto };
            self.ledger.hear(&side, name, headers, false);
        }
        if !self.looks_at(headers.source, headers.proto) {
            return Outcome::untouched(frame, None);
        }
        self.back(frame, headers, false)
    }

    /// On the backend's own interface: to the client at once, if the flow leaves the stack out.
    fn answer(&mut self, frame: &[u8], headers: &Headers) -> Outcome {
        if !self.book.ways_back.get(&BackendSide::of(headers)).is_some_and(|way| way.fast) {
            return Outcome::untouched(frame, None);
        }
        self.back(frame, headers, true)
    }

    fn back(&mut self, frame: &[u8], headers: &Headers, fast: bool) -> Outcome {
        let Some((owner, _)) = self.book.hear_backend(headers) else { return Outcome::untouched(frame, None) };
        let of = self.services.iter().find(|(_, s)| s.frontends.contains(&owner.to));
        if let Some((name, service)) = of
            && headers.is_tcp()
            && service.limits.is_some()
        {
            self.ledger.hear(&owner, name, headers, false);
        }
        if owner.to == headers.source && owner.client == headers.destination {
            return Outcome::untouched(frame, None);
        }
        self.note(headers, Way::Back, owner.to.ip(), 0, fast);
        Outcome::changed(translate(frame, headers, End::Source, owner.to, owner.client.port()), 0).into_pod(fast)
    }

    fn looks_at(&self, backend: SocketAddr, proto: u8) -> bool {
        self.watched.contains(&(backend, proto)) || self.aside.contains(&(backend, proto))
    }

    fn note(&mut self, headers: &Headers, way: Way, address: IpAddr, mark: u32, fast: bool) {
        if let Some((id, _)) = headers.first_of {
            self.notes.insert(id, Done { way, address, mark, fast });
        }
    }

    fn later_fragment(&self, frame: &[u8], way: Way, later: &Later) -> Outcome {
        let Some(done) = self.notes.get(&later.id).filter(|done| done.is_of(way)) else {
            return Outcome::untouched(frame, Some(PassReason::Fragment));
        };
        let v4 = done.address.is_ipv4();
        let ([source_at, destination_at], _) = addresses_at(v4);
        let at = if done.way == Way::There { destination_at } else { source_at };
        let under: &[_] = if v4 { &[ip_sum(later.l3)] } else { &[] };
        let mut edit = Edit::new(frame);
        edit.replace(later.l3 + at, &octets(done.address), under);
        Outcome::changed(edit, done.mark).into_pod(done.fast)
    }

    /// A router or backend tells a client of its packet, as it was sent to the backend. `fast`: on the backend's own interface,
    /// where only flows that leave the stack out are looked at.
    fn error_for_client(&self, frame: &[u8], error: &Headers, fast: bool) -> Outcome {
        let outcome = quote::read(frame, error).and_then(|quote| {
            let side = BackendSide { backend: quote.destination, client: quote.source, proto: quote.proto };
            let way = self.book.ways_back.get(&side).filter(|_| self.looks_at(side.backend, side.proto))?;
            if fast && !way.fast {
                return None;
            }
            let (to, port) = (way.owner.to, way.owner.client.port());
            Some(quote::translate(frame, error, &quote, End::Destination, to, port))
        });
        outcome.map_or_else(|| Outcome::untouched(frame, None), |edit| Outcome::changed(edit, 0).into_pod(fast))
    }

    /// A client tells a backend of its packet, as it was sent to the client.
    fn error_by_client(&self, frame: &[u8], error: &Headers, outside: bool) -> Outcome {
        let Some(quote) = quote::read(frame, error) else { return Outcome::untouched(frame, None) };
        if !self.services.values().any(|s| s.frontends.contains(&quote.source)) {
            // Not about what a client got: maybe a backend's word about what it got past the stack.
            let may_be = !outside && self.any_fast;
            return if may_be { self.error_for_client(frame, error, true) } else { Outcome::untouched(frame, None) };
        }
        let side = ClientSide { client: quote.destination, to: quote.source, proto: quote.proto };
        let flow = self.book.flows.get(&side).filter(|flow| flow.kind == FlowKind::Redirected);
        let Some(flow) = flow else { return Outcome::untouched(frame, None) };
        let edit = quote::translate(frame, error, &quote, End::Source, flow.backend, flow.source_port);
        Outcome::changed(edit, 0).into_pod(self.goes_fast(flow))
    }
}

/// Refuses the first packet of a flow.
fn refuse(frame: &[u8], headers: &Headers) -> Outcome {
    if headers.is_tcp() {
        return Outcome::sent_back(answer::refuse_segment(frame, headers));
    }
    answer::refuse_datagram(frame, headers)
        .map_or_else(|| Outcome::untouched(frame, Some(PassReason::RewriteFailed)), Outcome::sent_back)
}

/// A segment's sequence number.
fn sequence(frame: &[u8], headers: &Headers) -> u32 {
    u32::from(word(frame, headers.l4 + 4)) << 16 | u32::from(word(frame, headers.l4 + 6))
}

/// Replaces address and port of one end, and the port at the other: nothing else, but for the checksums.
fn translate(frame: &[u8], headers: &Headers, end: End, to: SocketAddr, other_port: u16) -> Edit {
    let ([source_at, destination_at], _) = addresses_at(headers.is_v4());
    let (address_at, ports_at) = match end {
        End::Source => (source_at, [0, 2]),
        End::Destination => (destination_at, [2, 0]),
    };
    let mut edit = Edit::new(frame);
    edit.replace(headers.l3 + address_at, &octets(to.ip()), &headers.sums_over_addresses());
    edit.replace(headers.l4 + ports_at[0], &to.port().to_be_bytes(), &[headers.sum()]);
    edit.replace(headers.l4 + ports_at[1], &other_port.to_be_bytes(), &[headers.sum()]);
    edit
}

/// Where a packet was seen to go; `fast`: into a pod, perhaps.
fn choice_made(headers: &Headers, seen: Seen<'_>, fast: bool) -> Choice {
    let refused = seen.sent_away && {
        let (_, destination) = addresses(seen.frame, headers.l3, headers.is_v4());
        !fast || destination == headers.source.ip()
    };
    // Also what could not be refused, and passed.
    if refused || seen.reason == Some(PassReason::RewriteFailed) {
        return Choice::Refuse;
    }
    let (_, destination) = addresses(seen.frame, headers.l3, headers.is_v4());
    let destination = SocketAddr::new(destination, word(seen.frame, headers.l4 + 2));
    if destination == headers.destination { Choice::Primary } else { Choice::Backup(destination) }
}

/// Which source port a packet was seen to get.
fn port_chosen(headers: &Headers, seen: Seen<'_>) -> u16 {
    word(seen.frame, headers.l4)
}
