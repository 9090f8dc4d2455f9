//! Limits: which first packets are admitted, what happens to the others, and when a connection ceases to count.

use std::net::{IpAddr, Ipv6Addr, SocketAddr};

use anyhow::Result;
use breaker_common::{
    BreakerState,
    BreakerState::{Closed, HalfOpen, Open},
};
use breaker_core::{
    datapath::{Datapath as _, LimitReport},
    limits::Scope,
    model::{Service, ServiceName},
};
use breaker_tests::packets::{
    DROP, Datagram, Ip, NEXT, REDIRECT, RunResult, Segment, TestRig,
    flags::{ACK, FIN, PSH, RST, SYN},
    plan, plan_with, pod, pod6, service, service_with, vip, vip6,
};

use super::{BACKUP, CLIENT, assert_untouched};

/// How many nodes share a limit of 1 per second: on this node a token comes back after an hour, longer than any test
/// runs.
const NODES: u32 = 3600;

/// A service whose tokens do not come back while a test runs. In `limits`, `@N` stands for N on this node.
fn limited(limits: &str) -> Result<Service> {
    share_by_nodes(service("dummy", vip(10), &[pod(BACKUP, 80)], &expand_limits(limits))?)
}

/// Replaces each `@N` by N × [`NODES`].
fn expand_limits(limits: &str) -> String {
    let mut text = String::new();
    let mut parts = limits.split('@');
    text.push_str(parts.next().unwrap_or_default());
    for part in parts {
        let digits = part.bytes().take_while(u8::is_ascii_digit).count();
        let number: u32 = part[..digits].parse().unwrap();
        text.push_str(&format!("{}{}", number * NODES, &part[digits..]));
    }
    text
}

/// Divides the service's limits by [`NODES`], as `scope: Cluster` does.
fn share_by_nodes(mut service: Service) -> Result<Service> {
    let limits = service.limits.as_mut().unwrap();
    (limits.scope, limits.nodes) = (Scope::Cluster, NODES);
    Ok(service)
}

fn rig(service: &Service, state: BreakerState) -> Result<TestRig> {
    let mut rig = TestRig::new()?;
    rig.apply(&plan_in_state(service, state, 5))?;
    Ok(rig)
}

/// A plan for a service in a state. The plan for a closed breaker has no flows to drain.
fn plan_in_state(service: &Service, state: BreakerState, epoch: u32) -> breaker_core::plan::ServicePlan {
    match state {
        Closed => plan_with(service, Closed, epoch, 1000, false, &service.backups[0].backends),
        _ => plan(service, state, epoch),
    }
}

fn report(rig: &TestRig) -> LimitReport {
    report_of(rig, "dummy")
}

fn report_of(rig: &TestRig, name: &str) -> LimitReport {
    rig.datapath.limits(&ServiceName::new(name), 10).unwrap()
}

/// A connection request from a client's port.
fn syn(client: SocketAddr, vip: SocketAddr) -> Segment {
    Segment { sequence: 7 * u32::from(client.port()), ..Segment::new(client, vip, SYN) }
}

/// A later segment of a connection, from either end: ACK and `flags`.
fn later(client: SocketAddr, vip: SocketAddr, flags: u8) -> Segment {
    Segment::new(client, vip, flags | ACK).data(2_000_001, 77, b"")
}

/// What the program did with a connection request.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum RequestOutcome {
    Passed,
    Moved,
    Refused,
    Dropped,
}

#[track_caller]
fn request_outcome(ran: &RunResult, sent: &Segment) -> RequestOutcome {
    match ran.action {
        DROP => RequestOutcome::Dropped,
        NEXT if ran.bytes == sent.bytes() => RequestOutcome::Passed,
        NEXT => RequestOutcome::Moved,
        REDIRECT => {
            let reset = Segment::read(&ran.bytes).unwrap();
            assert_eq!((reset.source, reset.destination), (sent.destination, sent.source));
            assert_eq!((reset.flags, reset.acknowledgment), (RST | ACK, sent.sequence.wrapping_add(1)));
            RequestOutcome::Refused
        }
        other => panic!("action {other}"),
    }
}

/// Sends a connection request from each of a client's `ports` through a program.
fn requests(
    rig: &mut TestRig,
    program: &str,
    client: IpAddr,
    vip: SocketAddr,
    ports: std::ops::Range<u16>,
) -> Vec<RequestOutcome> {
    ports
        .map(|port| {
            let segment = syn(SocketAddr::new(client, port), vip);
            request_outcome(&rig.run(program, &segment.bytes()).unwrap(), &segment)
        })
        .collect()
}

use RequestOutcome::{Dropped, Moved, Passed, Refused};

/// IPv4 and IPv6, from pods and from outside, closed and open: the burst is admitted, the rest gets what `onLimit`
/// says.
#[test]
fn a_burst_passes_and_what_is_over_it_is_refused() -> Result<()> {
    type Vip = fn(u8) -> SocketAddr;
    let families: [(IpAddr, Vip, SocketAddr, &str); 2] = [
        (pod(CLIENT, 0).ip(), vip, pod(BACKUP, 80), "10.42.0.4"),
        (pod6(CLIENT, 0).ip(), vip6, pod6(BACKUP, 80), "fd42::/64"),
    ];
    let rows: &[(&str, BreakerState, RequestOutcome, RequestOutcome)] = &[
        ("limits: {newConnectionsPerSecond: 1, burst: @3},", Closed, Passed, Refused),
        ("limits: {newConnectionsPerSecond: 1, burst: @3, onLimit: Drop},", Closed, Passed, Dropped),
        ("limits: {newConnectionsPerSecond: 1, burst: @3, onLimit: Failover},", Closed, Passed, Moved),
        ("limits: {concurrentConnections: @3},", Closed, Passed, Refused),
        ("limits: {perClient: {newConnectionsPerSecond: 1, burst: @3}},", Closed, Passed, Refused),
        ("limits: {perClient: {concurrentConnections: @3}, onLimit: Failover},", Closed, Passed, Moved),
        ("limits: {backup: {newConnectionsPerSecond: 1, burst: @3}},", Open, Moved, Refused),
        ("limits: {backup: {newConnectionsPerSecond: 1, burst: @3, onLimit: Drop}},", Open, Moved, Dropped),
        ("limits: {backup: {concurrentConnections: @3, onLimit: Failover}},", Open, Moved, Refused),
        ("fastPath: PeerRedirect, limits: {newConnectionsPerSecond: 1, burst: @3},", Closed, Passed, Refused),
    ];
    let mut rig = TestRig::new()?;
    let mut hosts = 10..;
    for (client, vip, backup, shown) in families {
        for (limits, state, within, over) in rows {
            for program in ["breaker_in", "breaker_up"] {
                let host = hosts.next().unwrap();
                let (vip, name) = (vip(host), format!("service-{host}"));
                let service = share_by_nodes(service(&name, vip, &[backup], &expand_limits(limits))?)?;
                rig.apply(&plan_in_state(&service, *state, 5))?;
                let report = |rig: &TestRig| report_of(rig, &name);
                let became = requests(&mut rig, program, client, vip, 1..7);
                let expected = [[*within; 3], [*over; 3]].concat();
                assert_eq!(became, expected, "{limits} {state:?} {program} {vip}");
                let tier = usize::from(*state == Open);
                let limited = report(&rig).counters.limited;
                assert_eq!((limited[tier].iter().sum::<u64>(), limited[1 - tier]), (3, [0; 4]), "{limits}");
                let clients = report(&rig).clients;
                let first = (clients[0].client.as_deref(), clients[0].refused, clients.len());
                assert_eq!(first, (Some(shown), 3, 1), "{limits}");
            }
        }
    }
    Ok(())
}

#[test]
fn a_request_that_is_sent_again_takes_no_second_token() -> Result<()> {
    let limits = "limits: {newConnectionsPerSecond: 1, burst: @2, concurrentConnections: @2},";
    let mut rig = rig(&limited(limits)?, Closed)?;
    let segment = syn(pod(CLIENT, 1), vip(10));
    for _ in 0..5 {
        assert_untouched(&rig.from_pod(&segment)?, &segment.bytes(), "the same SYN");
    }
    assert_eq!((report(&rig).counters.repeated, report(&rig).concurrent), (4, [1, 0]));
    // The client uses its port again: another sequence number is another connection, and the first one has ended.
    let again = Segment { sequence: 99, ..segment };
    assert_untouched(&rig.from_pod(&again)?, &again.bytes(), "another connection");
    assert_eq!(report(&rig).concurrent, [1, 0]);
    let third = syn(pod(CLIENT, 2), vip(10));
    assert_eq!(request_outcome(&rig.from_pod(&third)?, &third), Refused, "both tokens are used");
    Ok(())
}

/// A connection that one limit refuses takes nothing from the other limits.
#[test]
fn a_refused_connection_costs_nothing() -> Result<()> {
    let limits = "limits: {newConnectionsPerSecond: 1, burst: @5, concurrentConnections: @5, \
                  perClient: {newConnectionsPerSecond: 1, burst: @2, concurrentConnections: @2}},";
    let mut rig = rig(&limited(limits)?, Closed)?;
    let first = requests(&mut rig, "breaker_in", pod(CLIENT, 0).ip(), vip(10), 1..100);
    assert_eq!(first.iter().filter(|became| **became == Passed).count(), 2);
    let second = requests(&mut rig, "breaker_in", pod(5, 0).ip(), vip(10), 1..100);
    assert_eq!(second.iter().filter(|became| **became == Passed).count(), 2, "the second client's own limit");
    let third = requests(&mut rig, "breaker_in", pod(6, 0).ip(), vip(10), 1..100);
    assert_eq!(third.iter().filter(|became| **became == Passed).count(), 1, "the service's last token");
    assert_eq!(report(&rig).concurrent, [5, 0]);
    // The third client still has a token, but the service has none: its 98 refusals count for the service's limit.
    assert_eq!(report(&rig).counters.limited[0], [98, 97 + 97, 0, 0]);
    Ok(())
}

#[test]
fn clients_of_one_prefix_are_one_client() -> Result<()> {
    let host = |prefix: u16, host: u16| IpAddr::V6(Ipv6Addr::new(0xfd42, 0, 0, prefix, 0, 0, 0, host));
    let backups = [pod6(BACKUP, 80)];
    for (length, expected) in [("", [Refused, Passed]), ("clientPrefixLengthIPv6: 128,", [Passed, Passed])] {
        let text =
            expand_limits(&format!("limits: {{{length} perClient: {{newConnectionsPerSecond: 1, burst: @1}}}},"));
        let mut rig = rig(&share_by_nodes(service("dummy", vip6(10), &backups, &text)?)?, Closed)?;
        let mut one = |client| requests(&mut rig, "breaker_up", client, vip6(10), 1..2)[0];
        assert_eq!(one(host(1, 1)), Passed);
        assert_eq!([one(host(1, 2)), one(host(2, 2))], expected, "{length}");
    }
    Ok(())
}

/// Each row: what both ends send after the request, and whether the connection still counts.
#[test]
fn a_connection_counts_until_both_have_closed_it_or_one_has_reset_it() -> Result<()> {
    type Sends = (bool, u8);
    let (client, server) = (|flags| (true, flags), |flags| (false, flags));
    let rows: &[(&str, &[Sends], u32)] = &[
        ("nothing", &[], 1),
        ("the server's answer", &[server(SYN), client(0), client(PSH)], 1),
        ("the client's FIN", &[server(SYN), client(FIN)], 1),
        ("the server's FIN", &[server(SYN), server(FIN)], 1),
        ("the client's FIN, twice", &[client(FIN), client(FIN)], 1),
        ("both FINs", &[server(SYN), client(FIN), server(FIN)], 0),
        ("both FINs, the server first", &[server(SYN), server(FIN | PSH), client(FIN)], 0),
        ("a refusal", &[server(RST)], 0),
        ("the client's reset", &[server(SYN), client(RST)], 0),
        ("the server's reset after a FIN", &[client(FIN), server(RST)], 0),
        ("a reset, twice", &[client(RST), client(RST), server(RST)], 0),
    ];
    for (program_in, program_out) in [("breaker_in", "breaker_out"), ("breaker_up", "breaker_up_out")] {
        // A closed breaker leaves the connection to the primary (tier 0), an open one sends it to the backup (tier
        // 1).
        for (state, tier) in [(Closed, 0), (Open, 1)] {
            let mut rig =
                rig(&limited("limits: {concurrentConnections: @9, backup: {concurrentConnections: @9}},")?, state)?;
            for (port, (what, sends, counts)) in (1..).zip(rows) {
                let before = report(&rig).concurrent[tier];
                let here = pod(CLIENT, port);
                rig.run(program_in, &syn(here, vip(10)).bytes())?;
                assert_eq!(report(&rig).concurrent[tier], before + 1, "{what}");
                let there = if state == Open { pod(BACKUP, 80) } else { vip(10) };
                for (from_client, flags) in *sends {
                    let ran = if *from_client {
                        rig.run(program_in, &later(here, vip(10), *flags).bytes())?
                    } else {
                        rig.run(program_out, &later(there, here, *flags).bytes())?
                    };
                    assert_eq!(ran.action, NEXT, "{what}");
                }
                assert_eq!(report(&rig).concurrent[tier], before + counts, "{what} {state:?} {program_in}");
            }
        }
    }
    Ok(())
}

/// Nine connections are counted and end again, in each of 50 rounds: no count leaks.
#[test]
fn ended_connections_are_counted_down() -> Result<()> {
    let mut rig =
        rig(&limited("limits: {concurrentConnections: @9, perClient: {concurrentConnections: @9}},")?, Closed)?;
    for round in 0..50 {
        let became = requests(&mut rig, "breaker_in", pod(CLIENT, 0).ip(), vip(10), 1..11);
        assert_eq!(became, [vec![Passed; 9], vec![Refused]].concat(), "{round}");
        for port in 1..10 {
            rig.from_pod(&later(pod(CLIENT, port), vip(10), RST))?;
        }
        assert_eq!(report(&rig).concurrent, [0, 0]);
    }
    Ok(())
}

/// Data packets of a closed service with limits do not take the full path: only SYN, FIN and RST do.
#[test]
fn data_of_a_closed_service_is_not_seen() -> Result<()> {
    let limits = "limits: {newConnectionsPerSecond: 1, burst: @1, concurrentConnections: @1},";
    let mut rig = rig(&limited(limits)?, Closed)?;
    let first = syn(pod(CLIENT, 1), vip(10));
    assert_untouched(&rig.from_pod(&first)?, &first.bytes(), "admitted");
    for port in [1, 2] {
        for flags in [0, PSH] {
            let data = later(pod(CLIENT, port), vip(10), flags);
            assert_untouched(&rig.from_pod(&data)?, &data.bytes(), "data of a known or an unknown connection");
        }
    }
    // No packet was passed for a counted reason.
    let counted = rig.datapath.reasons()?;
    assert!(counted.is_empty(), "{counted:?}");
    Ok(())
}

#[test]
fn over_a_limit_connections_go_to_the_backup_and_stay_there() -> Result<()> {
    let service =
        limited("limits: {concurrentConnections: @1, onLimit: Failover, backup: {concurrentConnections: @2}},")?;
    let mut rig = rig(&service, Closed)?;
    let became = requests(&mut rig, "breaker_in", pod(CLIENT, 0).ip(), vip(10), 1..5);
    assert_eq!(became, [Passed, Moved, Moved, Refused], "the backup has its own limits");
    assert_eq!((report(&rig).concurrent, report(&rig).counters.failed_over), ([1, 2], 3));
    let assert_overflow_works = |rig: &mut TestRig| {
        let data = later(pod(CLIENT, 2), vip(10), PSH);
        let ran = rig.from_pod(&data).unwrap();
        assert_eq!(Segment::read(&ran.bytes).unwrap(), Segment { destination: pod(BACKUP, 80), ..data });
        let answer = later(pod(BACKUP, 80), pod(CLIENT, 2), PSH);
        let ran = rig.to_pod(&answer).unwrap();
        assert_eq!(Segment::read(&ran.bytes).unwrap(), Segment { source: vip(10), ..answer });
    };
    // The flow works at once, before the agent knows of it; then with the switch that tracks flows, as the agent
    // writes it; and after the agent has cleared the overflow mark.
    assert_overflow_works(&mut rig);
    assert!(rig.datapath.sweep(None)?.overflowed.contains(&service.name));
    rig.apply(&plan_with(&service, Closed, 5, 1000, true, &service.backups[0].backends))?;
    assert!(rig.datapath.sweep(None)?.overflowed.contains(&service.name));
    assert!(rig.datapath.sweep(None)?.overflowed.is_empty(), "no connection overflowed since the last sweep");
    assert_overflow_works(&mut rig);
    // Connections to the primary are left alone.
    let data = later(pod(CLIENT, 1), vip(10), PSH);
    assert_untouched(&rig.from_pod(&data)?, &data.bytes(), "on the primary");
    // After the last overflowed connection has ended, data packets do not take the full path any more.
    for port in [2, 3] {
        rig.from_pod(&later(pod(CLIENT, port), vip(10), FIN))?;
        rig.to_pod(&later(pod(BACKUP, 80), pod(CLIENT, port), FIN))?;
    }
    assert_eq!(report(&rig).concurrent, [1, 0]);
    rig.apply(&plan_in_state(&service, Closed, 5))?;
    let late = later(pod(CLIENT, 2), vip(10), PSH);
    assert_untouched(&rig.from_pod(&late)?, &late.bytes(), "closed, no flows left");
    // Another overflow right after: the program sets the mark and the filter's bit again.
    let fourth = syn(pod(CLIENT, 4), vip(10));
    assert_eq!(self::request_outcome(&rig.from_pod(&fourth)?, &fourth), Moved);
    assert!(rig.datapath.sweep(None)?.overflowed.contains(&service.name));
    Ok(())
}

#[test]
fn failover_with_no_usable_backup_refuses() -> Result<()> {
    let service = limited("limits: {concurrentConnections: @1, onLimit: Failover},")?;
    let mut rig = TestRig::new()?;
    rig.apply(&plan_with(&service, Closed, 5, 1000, false, &[]))?;
    assert_eq!(requests(&mut rig, "breaker_in", pod(CLIENT, 0).ip(), vip(10), 1..4), [Passed, Refused, Refused]);
    assert_eq!(report(&rig).counters.failed_over, 0);
    Ok(())
}

/// A half-open permit is given back if the primary's limit refuses its connection: the next connection can take it.
#[test]
fn a_permit_of_a_refused_connection_is_given_back() -> Result<()> {
    let text = expand_limits("breaker: {halfOpenConnections: 2}, limits: {concurrentConnections: @1},");
    let service = share_by_nodes(service("dummy", vip(10), &[pod(BACKUP, 80)], &text)?)?;
    let mut rig = rig(&service, HalfOpen)?;
    let first = syn(pod(CLIENT, 1), vip(10));
    assert_eq!(request_outcome(&rig.from_pod(&first)?, &first), Passed);
    let second = syn(pod(CLIENT, 2), vip(10));
    assert_eq!(request_outcome(&rig.from_pod(&second)?, &second), Refused);
    rig.from_pod(&later(pod(CLIENT, 1), vip(10), RST))?;
    let third = syn(pod(CLIENT, 3), vip(10));
    assert_eq!(request_outcome(&rig.from_pod(&third)?, &third), Passed, "the second of two permits");
    let fourth = syn(pod(CLIENT, 4), vip(10));
    assert_eq!(request_outcome(&rig.from_pod(&fourth)?, &fourth), Moved, "no permit is left");
    assert_eq!(rig.datapath.counters(&service.name)?.half_open, 2);
    Ok(())
}

#[test]
fn a_dry_run_counts_and_refuses_nobody() -> Result<()> {
    for state in [Closed, Open] {
        let text =
            "mode: DryRun, limits: {concurrentConnections: @1, backup: {newConnectionsPerSecond: 1, burst: @1}},";
        let mut rig = rig(&limited(text)?, state)?;
        assert_eq!(requests(&mut rig, "breaker_in", pod(CLIENT, 0).ip(), vip(10), 1..5), [Passed; 4]);
        let counters = report(&rig).counters;
        assert_eq!(counters.limited, [[0; 4]; 2]);
        let expected = if state == Open { [[0; 4], [3, 0, 0, 0]] } else { [[0, 0, 3, 0], [0; 4]] };
        assert_eq!(counters.dry_run, expected);
    }
    Ok(())
}

/// A flow of datagrams takes one token. A datagram over the limit is answered with an ICMP error, or dropped.
#[test]
fn flows_of_datagrams_are_limited() -> Result<()> {
    for (limits, over) in [("", REDIRECT), ("onLimit: Drop,", DROP)] {
        let text = expand_limits(&format!("limits: {{{limits} newConnectionsPerSecond: 1, burst: @2}},"));
        let service = share_by_nodes(service_with("dummy", &[(vip(10), "UDP")], &[pod(BACKUP, 53)], &text)?)?;
        let mut rig = rig(&service, Closed)?;
        for round in 0..4 {
            for port in [1, 2] {
                let question = Datagram::new(pod(CLIENT, port), vip(10), b"again").bytes();
                assert_untouched(&rig.raw_from_pod(&question)?, &question, &format!("round {round}"));
            }
            let question = Datagram::new(pod(CLIENT, 3), vip(10), b"third").bytes();
            let ran = rig.raw_from_pod(&question)?;
            assert_eq!(ran.action, over);
            if over == REDIRECT {
                let (_, ip, _) = Ip::read(&ran.bytes)?;
                assert_eq!((ip.proto().0, ip.ends()), (1, (vip(10).ip(), pod(CLIENT, 0).ip())));
            }
        }
        assert_eq!(rig.datapath.counters(&service.name)?.new_primary, 2);
        assert_eq!((report(&rig).counters.repeated, report(&rig).counters.limited[0]), (6, [4, 0, 0, 0]));
    }
    Ok(())
}

/// A flow of datagrams stays known when its limits change from a rate, which reads the clock, to a count, which reads
/// the time of the last heartbeat: that time may be before the flow's last datagram.
#[test]
fn a_flow_of_datagrams_is_known_by_an_older_clock_too() -> Result<()> {
    let service = |limits: &str| {
        let text = expand_limits(&format!("limits: {{{limits}}},"));
        share_by_nodes(service_with("dummy", &[(vip(10), "UDP")], &[pod(BACKUP, 53)], &text)?)
    };
    let mut rig = rig(&service("newConnectionsPerSecond: 1, burst: @2")?, Closed)?;
    // The heartbeat is as old as the rig. Times of flows are counted in ticks of 2^30 ns.
    std::thread::sleep(std::time::Duration::from_nanos(1 << breaker_common::TICK_SHIFT));
    let question = Datagram::new(pod(CLIENT, 1), vip(10), b"again").bytes();
    assert_untouched(&rig.raw_from_pod(&question)?, &question, "the first of its flow");
    rig.apply(&plan_in_state(&service("concurrentConnections: @2")?, Closed, 6))?;
    assert_untouched(&rig.raw_from_pod(&question)?, &question, "the same flow");
    assert_eq!(report(&rig).counters.repeated, 1);
    Ok(())
}

/// After the agent's lease has expired, rate limits still refuse, but counts do not (unless `onAgentLoss` is `Hold`):
/// no agent corrects them.
#[test]
fn without_an_agent_counts_refuse_nobody() -> Result<()> {
    let rows = [("", Passed), ("onAgentLoss: Hold,", Refused)];
    for (extra, over) in rows {
        let mut rig = rig(&limited(&format!("{extra} limits: {{concurrentConnections: @1}},"))?, Closed)?;
        rig.datapath.heartbeat(std::time::Duration::from_nanos(1), 0);
        std::thread::sleep(std::time::Duration::from_millis(20));
        let became = requests(&mut rig, "breaker_in", pod(CLIENT, 0).ip(), vip(10), 1..4);
        assert_eq!(became, [Passed, over, over], "{extra}");
        assert_eq!(report(&rig).concurrent, [if over == Passed { 3 } else { 1 }, 0], "connections still count");
    }
    let mut rig = rig(&limited("limits: {newConnectionsPerSecond: 1, burst: @1},")?, Closed)?;
    rig.datapath.heartbeat(std::time::Duration::from_nanos(1), 0);
    std::thread::sleep(std::time::Duration::from_millis(20));
    assert_eq!(requests(&mut rig, "breaker_in", pod(CLIENT, 0).ip(), vip(10), 1..3), [Passed, Refused]);
    Ok(())
}

/// Far more connections than the table has room for: all are admitted, only those in the table count, and each of
/// those is counted down once.
#[test]
fn a_full_table_admits_and_does_not_count() -> Result<()> {
    use breaker_agent::datapath::sizes::Sizes;
    let service = limited("limits: {concurrentConnections: @277},")?;
    let mut limits = service.limits.unwrap();
    limits.primary.concurrent = Some(1_000_000);
    limits.scope = Scope::Node;
    let service = Service { limits: Some(limits), ..service };
    let sizes = Sizes { connection_buckets: 16, client_buckets: 16, ..Sizes::for_memory(1024) };
    let mut rig = TestRig::with_sizes(&sizes)?;
    rig.apply(&plan_in_state(&service, Closed, 5))?;
    let became = requests(&mut rig, "breaker_in", pod(CLIENT, 0).ip(), vip(10), 1..1001);
    assert!(became.iter().all(|became| *became == Passed));
    let (counted, untracked) = (report(&rig).concurrent[0], report(&rig).counters.untracked);
    assert_eq!(u64::from(counted) + untracked, 1000);
    assert!((100..=128).contains(&counted), "{counted} of 128 entries are taken");
    for port in 1..1001 {
        rig.from_pod(&later(pod(CLIENT, port), vip(10), RST))?;
    }
    assert_eq!(report(&rig).concurrent, [0, 0]);
    Ok(())
}

/// A new agent finds counts and tokens as they were. Changed limits apply at once. Removed limits leave no state
/// behind.
#[test]
fn limits_outlive_the_agent_and_change_at_once() -> Result<()> {
    let service = limited("limits: {newConnectionsPerSecond: 1, burst: @2, concurrentConnections: @2},")?;
    let mut rig = rig(&service, Closed)?;
    assert_eq!(requests(&mut rig, "breaker_in", pod(CLIENT, 0).ip(), vip(10), 1..4), [Passed, Passed, Refused]);
    rig.restart()?;
    rig.apply(&plan_in_state(&service, Closed, 5))?;
    assert_eq!(report(&rig).concurrent, [2, 0]);
    assert_eq!(requests(&mut rig, "breaker_in", pod(CLIENT, 0).ip(), vip(10), 4..5), [Refused]);
    rig.from_pod(&later(pod(CLIENT, 1), vip(10), RST))?;
    assert_eq!(report(&rig).concurrent, [1, 0], "ends count under the new agent too");
    let mut limits = service.limits.unwrap();
    (limits.scope, limits.primary.concurrent) = (Scope::Node, None);
    limits.primary.rate = Some(breaker_core::limits::Rate { per_second: 1_000_000, burst: 4 });
    let raised = Service { limits: Some(limits), ..service.clone() };
    rig.apply(&plan_in_state(&raised, Closed, 5))?;
    assert_eq!(requests(&mut rig, "breaker_in", pod(CLIENT, 0).ip(), vip(10), 5..6), [Passed], "the new rate applies");
    let free = Service { limits: None, ..service };
    rig.apply(&plan_in_state(&free, Closed, 5))?;
    assert_eq!(requests(&mut rig, "breaker_in", pod(CLIENT, 0).ip(), vip(10), 6..60), [Passed; 54]);
    assert_eq!(report(&rig), LimitReport::default(), "no state is left");
    Ok(())
}
