//! Random sequences of steps: packets, and decisions of the agent. Addresses and ports come from a small pool, so
//! that flows often collide.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};

use breaker_common::BreakerState;
use breaker_tests::{
    model::{
        Hook,
        flow::Book,
        limit::{Limits, Over, TierLimits},
    },
    packets::{pod, pod6, vip, vip6},
};
use proptest::prelude::*;

use super::packet::{self, Body, Ends, Extension, FragmentPart, Malformation, Shape, Transport};

/// One step of a sequence.
#[derive(Clone, Debug)]
pub enum Step {
    /// The agent applies a decision for a service.
    Decide(Decision),
    /// A packet passes a hook.
    Packet { hook: Hook, from_to: FromTo, shape: Shape },
    /// An ICMP error passes a hook.
    Error { hook: Hook, about: About, kind: usize, quoted: usize, shape: Shape },
}

/// A decision of the agent, and the configuration of the service.
#[derive(Clone, Debug)]
pub struct Decision {
    /// Index of the service: 0 or 1.
    pub service: usize,
    pub state: BreakerState,
    pub share: u16,
    pub draining: bool,
    /// How many of the service's backups are usable; each counts in both IP families.
    pub usable: usize,
    pub dry_run: bool,
    pub reset_on_open: bool,
    pub reset_on_close: bool,
    pub reset_on_backup_down: bool,
    pub reject: bool,
    pub half_open_limit: u32,
    /// The primary accepts connections.
    pub primary_accepts: bool,
    /// `fastPath: PeerRedirect`.
    pub fast: bool,
    /// External clients keep their address (`externalTrafficPolicy: Local`).
    pub keeps_client: bool,
    /// The agent knows the service's backups as pods on this node.
    pub near: bool,
    /// Keep the current epoch if the state stays the same, as a step of the ramp or a change of backups does.
    pub in_epoch: bool,
    /// Limits of the primary and of the backup.
    pub limits: Option<Limits>,
}

/// Source and destination of a packet.
#[derive(Clone, Copy, Debug)]
pub enum FromTo {
    /// From a client to a frontend.
    Frontend { client: usize, port: u16, vip: usize, v6: bool, udp: bool },
    /// From a client straight to a backend.
    Backend { client: usize, port: u16, backend: usize, v6: bool, udp: bool },
    /// From a backend to a client.
    Client { backend: usize, client: usize, port: u16, v6: bool, udp: bool },
    /// Between addresses that have no role.
    Others { v6: bool, udp: bool },
    /// From the client to the frontend of the n-th flow in the flow table.
    Flow(usize),
    /// From the backend to the client of the n-th reverse entry.
    Reply(usize),
}

/// The packet that an ICMP error quotes.
#[derive(Clone, Copy, Debug)]
pub enum About {
    /// A packet to the backend of the n-th flow; the error comes from the backend or from a router.
    ToBackend { flow: usize, from_backend: bool },
    /// A packet to the client of the n-th flow; the error comes from the client.
    ToClient { flow: usize },
    /// A packet between addresses that have no role.
    Others { v6: bool },
}

pub const SERVICES: [&str; 2] = ["one", "two"];
/// Last byte of the addresses of each service's backups; each backup has an IPv4 and an IPv6 address.
pub const BACKUPS: [&[u8]; 2] = [&[3, 5], &[3]];
/// Last byte of the clients' pod addresses (3 is also a backup). 0 stands for an external client.
const CLIENTS: [u8; 4] = [4, 6, 3, 0];
const PORTS: [u16; 3] = [5000, 5001, 80];

pub fn frontend(service: usize, v6: bool) -> SocketAddr {
    let host = 10 + u8::try_from(service).unwrap();
    if v6 { vip6(host) } else { vip(host) }
}

pub fn backend(host: u8, v6: bool) -> SocketAddr {
    if v6 { pod6(host, 80) } else { pod(host, 80) }
}

fn client(index: usize, port: u16, v6: bool) -> SocketAddr {
    match (CLIENTS[index], v6) {
        (0, false) => SocketAddr::new(IpAddr::V4(Ipv4Addr::new(198, 51, 100, 9)), port),
        (0, true) => SocketAddr::new(IpAddr::V6(Ipv6Addr::new(0x2001, 0xdb8, 0, 0, 0, 0, 0, 9)), port),
        (host, false) => pod(host, port),
        (host, true) => pod6(host, port),
    }
}

impl FromTo {
    fn focused(self, v6: bool, udp: bool) -> Self {
        match self {
            Self::Frontend { vip, .. } => Self::Frontend { client: 0, port: PORTS[0], vip, v6, udp },
            Self::Backend { backend, .. } => Self::Backend { client: 0, port: PORTS[0], backend, v6, udp },
            Self::Client { backend, .. } => Self::Client { backend, client: 0, port: PORTS[0], v6, udp },
            other => other,
        }
    }

    /// The addresses and ports. `book` has the flows that exist.
    pub fn ends(self, book: &Book) -> Ends {
        let ends = |source, destination, udp| Ends { source, destination, udp };
        match self {
            Self::Frontend { client: who, port, vip, v6, udp } => ends(client(who, port, v6), frontend(vip, v6), udp),
            Self::Backend { client: who, port, backend: host, v6, udp } => {
                ends(client(who, port, v6), backend(BACKUPS[0][host], v6), udp)
            }
            Self::Client { backend: host, client: who, port, v6, udp } => {
                ends(backend(BACKUPS[0][host], v6), client(who, port, v6), udp)
            }
            Self::Others { v6, udp } if v6 => ends(pod6(77, 1), pod6(78, 2), udp),
            Self::Others { udp, .. } => ends(pod(77, 1), pod(78, 2), udp),
            Self::Flow(n) => {
                let flows: Vec<_> = book.flows.keys().collect();
                match flows.get(n % flows.len().max(1)) {
                    Some(side) => ends(side.client, side.to, side.proto == 17),
                    None => ends(client(0, PORTS[0], false), frontend(0, false), false),
                }
            }
            Self::Reply(n) => {
                let ways: Vec<_> = book.ways_back.keys().collect();
                match ways.get(n % ways.len().max(1)) {
                    Some(side) => ends(side.backend, side.client, side.proto == 17),
                    None => ends(backend(3, false), client(0, PORTS[0], false), false),
                }
            }
        }
    }
}

impl Step {
    /// The hook that the packet passes, and its frame. None for a decision.
    pub fn frame(&self, book: &Book) -> Option<(Hook, Vec<u8>)> {
        match self {
            Self::Decide(_) => None,
            Self::Packet { hook, from_to, shape } => Some((*hook, packet::frame(shape, &from_to.ends(book)))),
            Self::Error { hook, about, kind, quoted, shape } => {
                let (inner, sender) = about.ends(book);
                let receiver = inner.source;
                let outer = Ends { source: sender, destination: receiver, udp: false };
                let whole = Shape {
                    piece: FragmentPart::Whole,
                    tags: 0,
                    lie: Malformation { length: 0, cut: 0, padding: 0 },
                    ..shape.clone()
                };
                let kinds = if receiver.is_ipv4() { [3, 4, 11, 12, 8] } else { [1, 2, 3, 4, 128] };
                let plain = Shape { extensions: Vec::new(), ..whole };
                Some((*hook, packet::error(shape, &outer, kinds[*kind], &packet::frame(&plain, &inner), *quoted)))
            }
        }
    }
}

impl About {
    /// Source and destination of the quoted packet, and the sender of the error.
    fn ends(self, book: &Book) -> (Ends, SocketAddr) {
        match self {
            Self::ToBackend { flow, from_backend } => {
                let reply = FromTo::Reply(flow).ends(book);
                let there = Ends { source: reply.destination, destination: reply.source, udp: reply.udp };
                let router = if reply.source.is_ipv4() { pod(200, 0) } else { pod6(200, 0) };
                (there, if from_backend { reply.source } else { router })
            }
            Self::ToClient { flow } => {
                let there = FromTo::Flow(flow).ends(book);
                (Ends { source: there.destination, destination: there.source, udp: there.udp }, there.source)
            }
            Self::Others { v6 } => {
                let ends = FromTo::Others { v6, udp: true }.ends(book);
                (ends, ends.destination)
            }
        }
    }
}

/// Sequences of fewer than `most` steps. Half of them have only one client, one IP family and one protocol, so that
/// flows collide even more often.
pub fn sequences(most: usize) -> impl Strategy<Value = Vec<Step>> {
    let focus = prop::option::of((any::<bool>(), any::<bool>()));
    (focus, prop::collection::vec(step(), 1..most)).prop_map(|(focus, mut steps)| {
        for step in &mut steps {
            if let (Step::Packet { from_to, .. }, Some((v6, udp))) = (step, focus) {
                *from_to = from_to.focused(v6, udp);
            }
        }
        steps
    })
}

fn step() -> impl Strategy<Value = Step> {
    prop_oneof![
        3 => decision().prop_map(Step::Decide),
        14 => packet(),
        2 => error(),
    ]
}

fn decision() -> impl Strategy<Value = Decision> {
    let state = prop_oneof![Just(BreakerState::Open), Just(BreakerState::Closed), Just(BreakerState::HalfOpen)];
    let rare = || prop::bool::weighted(0.1);
    let of = (
        0..2_usize,
        state,
        prop_oneof![3 => Just(0_u16), 1 => Just(400)],
        any::<bool>(),
        prop_oneof![4 => Just(2_usize), 1 => 0..2_usize],
    );
    let policy = (rare(), any::<[bool; 3]>(), any::<bool>(), 0..3_u32, any::<bool>());
    let near = (any::<bool>(), any::<bool>(), prop::bool::weighted(0.8), any::<bool>());
    let limits = prop::option::of([tier_limits(), tier_limits()]);
    (of, policy, near, limits).prop_map(|((service, state, share, draining, usable), policy, near, limits)| {
        let (fast, keeps_client, near, primary_accepts) = near;
        let (dry_run, [reset_on_open, reset_on_close, reset_on_backup_down], reject, half_open_limit, in_epoch) =
            policy;
        // A closed breaker sends all connections to the primary, or ramps up to that.
        let share = if state == BreakerState::Closed && share == 0 { 1000 } else { share };
        Decision {
            service,
            state,
            share,
            draining,
            usable,
            dry_run,
            reset_on_open,
            reset_on_close,
            reset_on_backup_down,
            reject,
            half_open_limit,
            primary_accepts,
            fast,
            keeps_client,
            near,
            in_epoch,
            limits,
        }
    })
}

/// Limits so low that a sequence reaches them.
fn tier_limits() -> impl Strategy<Value = TierLimits> {
    let limit = || prop::option::weighted(0.4, 1..4_u32);
    let over = prop_oneof![Just(Over::Reset), Just(Over::Drop), Just(Over::Failover)];
    (limit(), limit(), limit(), limit(), over).prop_map(|(burst, client_burst, concurrent, client_concurrent, over)| {
        TierLimits { burst, client_burst, concurrent, client_concurrent, over }
    })
}

fn packet() -> impl Strategy<Value = Step> {
    let (client, port) = (0..CLIENTS.len(), prop::sample::select(&PORTS[..]));
    let to_frontend = (client.clone(), port.clone(), 0..2_usize, any::<bool>(), any::<bool>())
        .prop_map(|(client, port, vip, v6, udp)| FromTo::Frontend { client, port, vip, v6, udp });
    let to_backend = (client.clone(), port.clone(), 0..2_usize, any::<bool>(), any::<bool>())
        .prop_map(|(client, port, backend, v6, udp)| FromTo::Backend { client, port, backend, v6, udp });
    let to_client = (0..2_usize, client, port, any::<bool>(), any::<bool>())
        .prop_map(|(backend, client, port, v6, udp)| FromTo::Client { backend, client, port, v6, udp });
    let others = (any::<bool>(), any::<bool>()).prop_map(|(v6, udp)| FromTo::Others { v6, udp });
    let opening = (prop_oneof![4 => to_frontend, 2 => to_backend, 1 => to_client, 1 => others], hook(), shape(2))
        .prop_map(|(from_to, hook, shape)| Step::Packet { hook: hook.unwrap_or(natural(&from_to)), from_to, shape });
    let going_on =
        (prop_oneof![(0..40_usize).prop_map(FromTo::Flow), (0..40_usize).prop_map(FromTo::Reply)], hook(), shape(16))
            .prop_map(|(from_to, hook, shape)| Step::Packet {
                hook: hook.unwrap_or(natural(&from_to)),
                from_to,
                shape,
            });
    prop_oneof![2 => opening, 3 => going_on]
}

/// The hook where such a packet is expected.
fn natural(from_to: &FromTo) -> Hook {
    match from_to {
        FromTo::Client { .. } | FromTo::Reply(_) => Hook::ToPod,
        _ => Hook::FromPod,
    }
}

/// The hook of a packet; None, which is the most frequent, stands for the natural one ([`natural`]).
fn hook() -> impl Strategy<Value = Option<Hook>> {
    let any_hook = prop::sample::select(&[Hook::FromPod, Hook::ToPod, Hook::FromOutside, Hook::ToOutside][..]);
    // Answers of fast-path flows are translated at ingress on the backend's own veth.
    prop_oneof![5 => Just(None), 1 => any_hook.prop_map(Some), 1 => Just(Some(Hook::FromPod))]
}

fn error() -> impl Strategy<Value = Step> {
    let to_backend =
        (0..40_usize, any::<bool>()).prop_map(|(flow, from_backend)| About::ToBackend { flow, from_backend });
    let to_client = (0..40_usize).prop_map(|flow| About::ToClient { flow });
    let others = any::<bool>().prop_map(|v6| About::Others { v6 });
    let about = prop_oneof![4 => to_backend, 3 => to_client, 1 => others];
    let quoted = prop_oneof![Just(28_usize), Just(48), Just(60), 0..100_usize];
    (about, hook(), 0..5_usize, quoted, shape(16)).prop_map(|(about, hook, kind, quoted, shape)| {
        let natural = if matches!(about, About::ToClient { .. }) { Hook::FromPod } else { Hook::ToPod };
        Step::Error { hook: hook.unwrap_or(natural), about, kind, quoted, shape }
    })
}

/// The shape of a packet. Of `syn` + 1 TCP segments, one is a plain SYN.
fn shape(syn: u32) -> impl Strategy<Value = Shape> {
    let flags = prop_oneof![
        6 => Just(0x10_u8), 3 => Just(0x12), 1 => Just(0x11), 1 => Just(0x04), 1 => Just(0x14), 1 => any::<u8>(),
    ];
    let flags = prop_oneof![1 => Just(0x02_u8), syn => flags];
    // Most SYNs of a client and port are repetitions.
    let sequence = prop_oneof![3 => Just(0_u8), 1 => 0..3_u8];
    let flags = (flags, sequence);
    let transport = (flags, 0..4_usize, prop_oneof![0..4_usize, 0..64_usize], any::<u16>(), unlikely(), unlikely())
        .prop_map(|((flags, sequence), options, payload, word, unchecked, wrong)| Transport {
            flags,
            sequence,
            options,
            payload,
            word,
            unchecked,
            wrong,
        });
    let others = prop::sample::select(&[132_u8, 47, 1, 58, 6, 17, 59][..]);
    let body = prop_oneof![19 => transport.prop_map(Body::Transport), 1 => others.prop_map(Body::Other)];
    let options = prop_oneof![5 => Just(0), 1 => 0..=10_usize];
    let extensions = prop_oneof![5 => Just(Vec::new()), 1 => prop::collection::vec(extension(), 0..8)];
    let piece = prop_oneof![
        6 => Just(FragmentPart::Whole), 1 => (0..2_u8).prop_map(FragmentPart::First), 1 => (0..2_u8).prop_map(FragmentPart::Later),
    ];
    let tags = prop_oneof![7 => Just(0), 1 => 0..=3_usize];
    (body, options, extensions, piece, tags, lie()).prop_map(|(body, options, extensions, piece, tags, lie)| Shape {
        body,
        options,
        extensions,
        piece,
        tags,
        lie,
    })
}

fn unlikely() -> impl Strategy<Value = bool> {
    prop::bool::weighted(0.1)
}

fn extension() -> impl Strategy<Value = Extension> {
    let units = || prop_oneof![9 => 1..4_u8, 1 => 1..40_u8];
    prop_oneof![
        2 => units().prop_map(Extension::HopByHop),
        2 => units().prop_map(Extension::Destination),
        1 => prop_oneof![3 => Just(0), 1 => 0..3_u8].prop_map(Extension::Routing),
        1 => Just(Extension::Atomic),
        1 => (1..6_u8).prop_map(Extension::Authentication),
    ]
}

fn lie() -> impl Strategy<Value = Malformation> {
    let length = prop_oneof![12 => Just(0), 1 => -80..80_i16];
    let cut = prop_oneof![12 => Just(0), 1 => 0..100_usize];
    let padding = prop_oneof![12 => Just(0), 1 => 0..40_usize];
    (length, cut, padding).prop_map(|(length, cut, padding)| Malformation { length, cut, padding })
}
