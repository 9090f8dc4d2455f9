//! The rules of the datapath in plain Rust. Tests run the programs and this model on the same packets and compare them.
//!
//! The model is written from the design, not from the programs: it has no bounded tables, no budget of instructions and
//! no incremental tricks. Read [`Model::pass`] from top to bottom to follow a packet:
//!
//! | module | one concern |
//! |---|---|
//! | [`headers`] | parsing a frame: addresses, ports, flags |
//! | [`service`] | where a service's new connections may go |
//! | [`flow`] | the pinned decisions |
//! | [`limit`] | which connections are admitted, and which are counted |
//! | [`answer`] | refusing and resetting |
//! | [`quote`] | the packets that ICMP errors quote |
//! | [`fragment`] | fragments other than the first of a packet |
//! | [`bytes`] | changing a frame and its checksums |
//!
//! Where the design leaves a choice (which of several backups, which free source port), the model accepts the choice
//! that the programs made, if it is allowed, and expects the flow to keep it.

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
use flow::{BackendSide, Book, ClientSide, Flow, Forgotten, LastWords};
use fragment::{Done, Notes, Way};
use headers::{Frame, Headers, Later, addresses, addresses_at, ip_sum, octets};
use limit::{Answer, BACKUP, Kind, Ledger, Over, PRIMARY};
use quote::End;
use service::{Choice, Service};

/// Offset of the IP header in an Ethernet frame without VLAN tags.
const UNTAGGED: usize = 14;

/// A hook that a packet passes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Hook {
    /// A pod on this node sends the packet.
    FromPod,
    /// The packet goes to a pod on this node.
    ToPod,
    /// The packet enters the node by an uplink.
    FromOutside,
    /// The packet leaves the node by an uplink.
    ToOutside,
}

/// What the datapath must do with a packet.
#[derive(Clone, Debug)]
pub struct Outcome {
    /// Redirected: back out of the interface that the packet came by, or into a pod's namespace. If false, the packet
    /// continues on its path. (A test run does not show where a redirect leads.)
    pub sent_away: bool,
    /// The packet as it leaves the hook.
    pub frame: Vec<u8>,
    /// Checksums that were changed.
    pub sums: Vec<Sum>,
    /// Bits that are set in the packet's mark.
    pub mark: u32,
    /// Reason that is counted, if the packet passes untouched for one.
    pub reason: Option<PassReason>,
    /// The packet is dropped.
    pub dropped: bool,
    /// Tier and kind of each limit that the packet exceeded. In a dry run: that it would have exceeded.
    pub limited: Vec<(usize, Kind)>,
}

/// What the programs did with the packet. The model reads it only where the design leaves a choice.
#[derive(Clone, Copy, Debug)]
pub struct Seen<'a> {
    /// The packet was redirected: sent back, or into a pod's namespace.
    pub sent_away: bool,
    /// The packet as it left the programs.
    pub frame: &'a [u8],
    /// Pass reason that was counted.
    pub reason: Option<PassReason>,
    /// Tier and kind of each limit that was counted as exceeded.
    pub limited: &'a [(usize, Kind)],
    /// Dry run only: the programs counted that they would have moved or refused the packet.
    pub would_move: bool,
}

/// State of the datapath.
#[derive(Clone, Debug, Default)]
pub struct Model {
    /// Services by name.
    pub services: BTreeMap<&'static str, Service>,
    /// Address and protocol number of every backend.
    pub backends: BTreeSet<(SocketAddr, u8)>,
    /// Pinned flows.
    pub book: Book,
    /// Admitted connections.
    pub ledger: Ledger,
    notes: Notes,
    /// Backends that received flows of a frontend. Only packets from these need a look-up in the flow tables.
    watched: BTreeSet<(SocketAddr, u8)>,
    /// Of these, the backends that received flows on the fast path.
    watched_fast: BTreeSet<(SocketAddr, u8)>,
    /// Addresses of backends that are pods on this node.
    pub near: BTreeSet<IpAddr>,
    /// Some service has, or had, `fastPath: PeerRedirect`.
    pub any_fast: bool,
    /// Answers that were seen, and attempts that were repeated without one, by service.
    pub return_paths: BTreeMap<&'static str, (u32, u32)>,
    /// Backends that have a direct connection with a changed source port. All packets of direct connections to them are
    /// inspected; of other direct connections, only SYN, FIN and RST are.
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

    /// Redirects the packet into a pod's namespace if `fast`.
    fn into_pod(self, fast: bool) -> Self {
        Self { sent_away: fast, ..self }
    }
}

impl Model {
    /// Processes a packet at a hook and updates the state. `seen` is what the programs did with the same packet.
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
                // Senders reuse identifications: drop the note about an earlier packet's fragments.
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
            // On an uplink, packets to a pod's own address are left alone: they come from other nodes (mostly probes).
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
        // A SYN always makes a new decision; a datagram makes one if it has no flow of the current epoch.
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
            // The flow was not seen from its first packet: it is never rewritten, only passed or, by policy, reset.
            if service.resets_primary() && !headers.is_rst() {
                return Outcome::changed(
                    answer::reset_peer(frame, headers, headers.source.port(), headers.destination),
                    0,
                );
            }
            return Outcome::untouched(frame, None);
        };
        self.book.hear_client(&side, headers);
        // A flow keeps its backend, unless the policy for flows of its tier is Reset.
        let redirected = flow.kind == FlowKind::Redirected;
        let resets = if redirected {
            service.resets_backup(flow.backend, flow.epoch)
        } else {
            service.resets_primary() && flow.epoch != service.epoch
        };
        if resets && !headers.is_rst() {
            if let Some(flow) = self.book.flows.get_mut(&side) {
                flow.client_said.rst = true;
            }
            // The client's reset is a copy of the packet, which a test run does not show.
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
        // Closed and idle: no choice is made and no flow is pinned; only admitted connections are recorded.
        let settled = !service.tracks() && !service.dry_run;
        let number = if headers.is_tcp() { sequence(frame, headers) } else { 0 };
        let mut earlier = Forgotten::default();
        if service.tracks() {
            earlier = self.book.forget(&side, number, service.epoch);
        }
        // A repeated SYN is no new trial.
        let repeated = earlier.same_syn && earlier.same_epoch;
        let (mut choices, trial) =
            if settled { (vec![Choice::Primary], false) } else { service.choices(headers.destination, repeated) };
        let mut reason = None;
        if earlier.same_syn && earlier.unanswered && choices.iter().any(|choice| matches!(choice, Choice::Backup(_))) {
            // Which of several choices the programs made shows only if they did not count the attempt.
            let made = choice_made(headers, seen, service.fast);
            if matches!(made, Choice::Backup(_)) || seen.reason == Some(PassReason::NoAnswerSeen) || choices.len() == 1
            {
                let (answered, unanswered) = self.return_paths.entry(name).or_default();
                *unanswered += 1;
                if *unanswered * 4 > *answered && service.primary_accepts {
                    reason = Some(PassReason::NoAnswerSeen);
                    choices = vec![Choice::Primary];
                }
            }
        }
        let mut over = None;
        let mut failed_over = false;
        if let Some(limits) = service.limits {
            // If a limit refused the first choice, the packet does not show that choice, but the limits' counters do.
            let first = match seen.limited.first() {
                Some((PRIMARY, _)) => Choice::Primary,
                Some(_) => choices.iter().copied().find(|c| matches!(c, Choice::Backup(_))).unwrap_or(choices[0]),
                None => Self::chosen(headers, seen, service, &choices),
            };
            let tier = if first == Choice::Primary { PRIMARY } else { BACKUP };
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
            return Outcome { limited, ..Outcome::untouched(frame, reason) };
        }
        let choices = if failed_over { service.backups_for(headers.destination) } else { choices };
        let outcome = match over {
            Some(Over::Drop) => Outcome { dropped: true, ..Outcome::untouched(frame, None) },
            Some(_) => refuse(frame, headers),
            None => self.carry_out(frame, headers, name, outside, seen, &choices),
        };
        Outcome { limited, reason: reason.or(outcome.reason), ..outcome }
    }

    /// The choice that the programs made among `choices`; the first one if they made none of these.
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
        // A client outside behind a VLAN tag gets no fast path: by the routes, it is behind another interface.
        let untagged = headers.l3 == UNTAGGED;
        let (fast, keeps_client) = (service.fast && (!outside || untagged), service.keeps_client && outside);
        let made = choice_made(headers, seen, fast);
        let choice = if choices.contains(&made) { made } else { choices[0] };
        let flow = Flow {
            kind: FlowKind::Passed,
            backend: headers.destination,
            source_port: headers.source.port(),
            epoch: service.epoch,
            sequence: if headers.is_tcp() { sequence(frame, headers) } else { 0 },
            established: false,
            client_said: LastWords::default(),
            fast: false,
            keeps_client: false,
        };
        match choice {
            Choice::Primary => {
                // While the breaker is not closed, connections that are left to the primary are pinned, to distinguish
                // them from older connections. A datagram is pinned only if it tries the primary (half-open).
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
                // The path of a flow is decided once, with its first packet.
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

    /// Sends a client's packet to its flow's backend. Sets the masquerade mark where the replies would otherwise not
    /// return to this node: for a client outside (unless its flow keeps its address or takes the fast path), and for a
    /// pod that is its own backup.
    fn send(&mut self, frame: &[u8], headers: &Headers, flow: &Flow, outside: bool) -> Outcome {
        let masquerade = outside && !flow.keeps_client && !flow.fast || headers.source.ip() == flow.backend.ip();
        let mark = if masquerade { DEFAULT_MASQUERADE_MARK } else { 0 };
        let fast = self.goes_fast(flow);
        self.note(headers, Way::There, flow.backend.ip(), mark, fast);
        let edit = translate(frame, headers, End::Destination, flow.backend, flow.source_port);
        Outcome::changed(edit, mark).into_pod(fast)
    }

    /// Whether a packet takes the fast path: its flow does, and its backend is still known to be on this node.
    fn goes_fast(&self, flow: &Flow) -> bool {
        flow.fast && self.near.contains(&flow.backend.ip())
    }

    /// Handles a client's own connection to a backend. The connection is recorded only so that it never shares a
    /// reverse key with a flow of a frontend: the later of the two gets another source port.
    fn direct(&mut self, frame: &[u8], headers: &Headers, seen: Seen<'_>) -> Outcome {
        let (side, backend) = (ClientSide::of(headers), (headers.destination, headers.proto));
        let aside = self.aside.contains(&backend);
        if headers.is_tcp() {
            // While no source port was changed, only the beginning and the end of a connection matter.
            if !headers.is_syn() && !headers.ends() && !aside {
                return Outcome::untouched(frame, None);
            }
        } else if !aside && !self.watched.contains(&backend) {
            // A datagram does not show whether it is the first of its flow. It matters only if the backend also
            // receives flows of a frontend.
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
                let number = if headers.is_tcp() { sequence(frame, headers) } else { 0 };
                self.book.forget(&side, number, 0);
                let flow = Flow {
                    kind: FlowKind::Direct,
                    backend: headers.destination,
                    source_port: headers.source.port(),
                    epoch: 0,
                    sequence: number,
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

    /// Handles a packet on its path to the client. The source of a backend's packet becomes the address that the client
    /// talks to.
    fn by_backend(&mut self, frame: &[u8], headers: &Headers) -> Outcome {
        // The source is a frontend: kube-proxy has already translated the primary's reply.
        let of = self.services.iter().find(|(_, s)| s.frontends.contains(&headers.source));
        // The client would take an answer of the primary, although its connection goes to a backup by now.
        let side = ClientSide { client: headers.destination, to: headers.source, proto: headers.proto };
        if of.is_some() && headers.is_syn_ack() && self.book.awaits_answer(&side) {
            return Outcome { dropped: true, ..Outcome::untouched(frame, None) };
        }
        if let Some((name, service)) = of
            && headers.is_tcp()
            && service.limits.as_ref().is_some_and(limit::counts)
        {
            self.ledger.hear(&side, name, headers, false);
        }
        if !self.looks_at(headers.source, headers.proto) {
            return Outcome::untouched(frame, None);
        }
        self.back(frame, headers, false)
    }

    /// Handles a backend's packet on the backend's own interface: it goes to the client at once if its flow takes the
    /// fast path.
    fn answer(&mut self, frame: &[u8], headers: &Headers) -> Outcome {
        if !self.book.ways_back.get(&BackendSide::of(headers)).is_some_and(|way| way.fast) {
            return Outcome::untouched(frame, None);
        }
        self.back(frame, headers, true)
    }

    fn back(&mut self, frame: &[u8], headers: &Headers, fast: bool) -> Outcome {
        let Some((owner, is_first)) = self.book.hear_backend(headers) else { return Outcome::untouched(frame, None) };
        let redirected = self.book.flows.get(&owner).is_some_and(|flow| flow.kind == FlowKind::Redirected);
        let of = self.services.iter().find(|(_, s)| s.frontends.contains(&owner.to));
        if let Some((name, _)) = of.filter(|_| is_first && redirected) {
            self.return_paths.entry(name).or_default().0 += 1;
        }
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

    /// Handles an ICMP error from a router or a backend about a client's packet. The error quotes the packet as it was
    /// sent to the backend. `fast`: the error arrives on the backend's own interface, where only flows on the fast path
    /// are handled.
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

    /// Handles an ICMP error from a client about a backend's packet. The error quotes the packet as the client got it.
    fn error_by_client(&self, frame: &[u8], error: &Headers, outside: bool) -> Outcome {
        let Some(quote) = quote::read(frame, error) else { return Outcome::untouched(frame, None) };
        if !self.services.values().any(|s| s.frontends.contains(&quote.source)) {
            // The quoted packet is not from a frontend: the sender may be a backend that got it on the fast path.
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

/// Replaces the address and port of one end and the port of the other end, and adjusts the checksums.
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

/// The choice that the programs made, read from what they did. `fast`: a redirect may also lead into a pod.
fn choice_made(headers: &Headers, seen: Seen<'_>, fast: bool) -> Choice {
    let refused = seen.sent_away && {
        let (_, destination) = addresses(seen.frame, headers.l3, headers.is_v4());
        !fast || destination == headers.source.ip()
    };
    // `RewriteFailed`: the programs chose to refuse the packet, could not build the answer, and passed it.
    if refused || seen.reason == Some(PassReason::RewriteFailed) {
        return Choice::Refuse;
    }
    let (_, destination) = addresses(seen.frame, headers.l3, headers.is_v4());
    let destination = SocketAddr::new(destination, word(seen.frame, headers.l4 + 2));
    if destination == headers.destination { Choice::Primary } else { Choice::Backup(destination) }
}

/// The source port that the programs gave a packet.
fn port_chosen(headers: &Headers, seen: Seen<'_>) -> u16 {
    word(seen.frame, headers.l4)
}
