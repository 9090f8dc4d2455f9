//! The engine on a fake datapath, with time as an argument and scripted probes.

#![allow(clippy::unwrap_used, reason = "tests")]

mod fake;
mod plan;

use std::{collections::BTreeSet, net::SocketAddr, path::Path, sync::Arc, time::Duration};

use breaker_agent::config;
use breaker_common::{BreakerState, StateReason};
use breaker_core::{
    datapath::Adopted,
    engine::{
        CommandError, Engine,
        departure::Departed,
        established::EstablishedCounts,
        journal::{Entry, EntryKind},
        snapshot::{ServiceSnapshot, Summary},
    },
    health::Health,
    model::{Backend, Frontend, Override, Protocol, Service, ServiceName, TierRole},
    plan::ServicePlan,
    probe::{CheckCode, ProbeReport, ProbeResult, Target},
    time::{Instant, Now},
};
use fake::FakeDatapath;

/// The wall clock at the start of a test, seconds since 1970.
const ORIGIN: u64 = 1_800_000_000;
const SECOND_NS: u64 = 1_000_000_000;

fn at(ms: u64) -> Now {
    Now { mono: Duration::from_millis(ms), unix_ns: ORIGIN * SECOND_NS + ms * 1_000_000 }
}

/// An engine and its datapath.
struct Harness {
    engine: Engine,
    datapath: FakeDatapath,
}

impl Harness {
    fn new(mut datapath: FakeDatapath, now: Now) -> Self {
        Self { engine: Engine::new(now, &mut datapath).unwrap(), datapath }
    }

    fn datapath(&self) -> &FakeDatapath {
        &self.datapath
    }

    fn datapath_mut(&mut self) -> &mut FakeDatapath {
        &mut self.datapath
    }

    fn configure(&mut self, now: Now, services: Vec<Service>) {
        self.engine.configure(now, services.into_iter().map(Arc::new).collect(), &mut self.datapath);
    }

    fn observe(&mut self, now: Now, report: &ProbeReport) {
        self.engine.observe(now, report, &mut self.datapath);
    }

    fn tick(&mut self, now: Now) {
        self.engine.tick(now, &mut self.datapath);
    }

    fn next_deadline(&self, now: Now) -> Instant {
        self.engine.next_deadline(now)
    }

    fn get(&self, now: Now, name: &str) -> Result<ServiceSnapshot, CommandError> {
        self.engine.snapshot(now, name, &self.datapath)
    }

    fn status(&self, now: Now) -> Vec<ServiceSnapshot> {
        self.engine.snapshots(now, &self.datapath)
    }

    fn trip(
        &mut self,
        now: Now,
        name: &str,
        duration: Option<Duration>,
        why: Option<&str>,
    ) -> Result<ServiceSnapshot, CommandError> {
        self.engine.force_open(now, name, duration, why, &mut self.datapath)
    }

    fn reset(&mut self, now: Now, name: &str) -> Result<ServiceSnapshot, CommandError> {
        self.engine.reset(now, name, &mut self.datapath)
    }

    /// The epoch that a probe which begins now carries.
    fn state_epoch(&self) -> u32 {
        self.engine.state_epoch(&ServiceName::new("dummy"))
    }

    fn events(&self, label: &str) -> Vec<&Entry> {
        self.engine.events_after(0).into_iter().filter(|event| event.kind.label() == label).collect()
    }

    fn summaries(&self) -> Vec<Summary> {
        self.engine.summaries()
    }
}

fn services(extra: &str) -> Vec<Service> {
    let text = format!(
        "services: [{{name: dummy, frontends: [{{address: 10.43.0.1, port: 80}}], {extra} \
         primary: {{backends: [{{address: 10.42.0.2, port: 80}}], check: {{tcpSocket: {{}}}}}}, \
         backups: [{{backends: [{{address: 10.42.0.3, port: 80}}], check: {{tcpSocket: {{}}}}}}]}}]"
    );
    config::parse(Path::new("t"), &text).unwrap().services
}

fn engine(extra: &str, datapath: FakeDatapath) -> Harness {
    let mut engine = Harness::new(datapath, at(0));
    engine.configure(at(0), services(extra));
    engine
}

/// The service as an earlier agent left it: open.
fn left_open() -> Adopted {
    Adopted {
        name: ServiceName::new("dummy"),
        frontends: services("")[0].frontends.clone(),
        state: Open,
        epoch: 41,
        share: 0,
        reason: StateReason::ConnectTimeout,
        since_unix_ns: (ORIGIN - 100) * SECOND_NS,
        trips: 3,
        override_: (Override::Auto, 0),
        backup: ["10.42.0.3:80".parse().unwrap()].into(),
    }
}

/// Reports one probe of the primary (tier 0) or the backup (tier 1). Rise and fall are 1, as in the lab.
fn probe(engine: &mut Harness, ms: u64, tier: usize, code: CheckCode) {
    let backend = if tier == 0 { "10.42.0.2:80" } else { "10.42.0.3:80" };
    probe_of(engine, ms, tier, backend, code);
}

/// Reports one probe of a backend.
fn probe_of(engine: &mut Harness, ms: u64, tier: usize, backend: &str, code: CheckCode) {
    let target = Target { service: ServiceName::new("dummy"), tier, backend: backend.parse().unwrap() };
    let health = if code.passes() { Health::Up } else { Health::Down };
    let result = ProbeResult { code, detail: "scripted".into(), duration: Duration::from_millis(1) };
    let began = engine.state_epoch();
    engine.observe(at(ms), &ProbeReport { target, result, health, began });
}

fn applied(engine: &Harness) -> &ServicePlan {
    &engine.datapath().applied[&ServiceName::new("dummy")]
}

fn state(engine: &Harness) -> (BreakerState, u32) {
    (applied(engine).decision.state, applied(engine).decision.epoch)
}

use BreakerState::{Closed, HalfOpen, Open};

#[test]
fn the_lab_fails_over_and_comes_back() {
    let mut e = engine("", FakeDatapath::default());
    assert_eq!(state(&e), (Closed, 1));
    probe(&mut e, 10, 1, CheckCode::L7Ok);
    probe(&mut e, 20, 0, CheckCode::L7Ok);
    probe(&mut e, 3000, 0, CheckCode::L7Sts);
    assert_eq!(state(&e), (Open, 2));
    assert_eq!(applied(&e).backends(), [("10.42.0.3:80".parse().unwrap(), Protocol::Tcp)].into());
    assert_eq!(applied(&e).decision.reason, StateReason::HttpStatus);
    probe(&mut e, 9000, 0, CheckCode::L7Ok);
    assert_eq!(state(&e), (Closed, 3));
    let transitions = e.events("Transition");
    assert_eq!(transitions.len(), 2);
    assert!(matches!(transitions[0].kind, EntryKind::Transition(t) if t.reason == StateReason::HttpStatus));
    assert!(matches!(transitions[1].kind, EntryKind::Transition(t) if t.to == Closed));
}

#[test]
fn a_backup_that_fails_is_not_redirected_to_and_one_that_comes_back_is() {
    let mut e = engine("", FakeDatapath::default());
    probe(&mut e, 10, 0, CheckCode::L4Con);
    assert_eq!(state(&e).0, Open);
    assert!(applied(&e).backends().is_empty(), "the backup's health is unknown, so it gets nothing");
    probe(&mut e, 20, 1, CheckCode::L7Ok);
    assert_eq!(applied(&e).backends().len(), 1);
    assert_eq!(state(&e), (Open, 3), "flows that were left to the primary without a backup belong to an older epoch");
    probe(&mut e, 30, 1, CheckCode::L7Tout);
    assert!(applied(&e).backends().is_empty());
    assert_eq!(state(&e), (Open, 3), "no change of state, no new epoch");
}

/// No earlier decision for datagrams stays valid when a service leaves: its addresses may soon belong to another one.
#[test]
fn datagrams_of_a_service_that_leaves_are_decided_anew() {
    let mut e = engine("", FakeDatapath::default());
    e.configure(at(10), Vec::new());
    assert_eq!(state(&e), (Closed, 2));
    e.configure(at(20), services(""));
    let mut fewer = services("");
    let frontend = fewer[0].frontends[0];
    fewer[0].frontends.push(Frontend { protocol: Protocol::Udp, ..frontend });
    e.configure(at(30), fewer);
    assert_eq!(state(&e), (Closed, 2));
    e.configure(at(40), services(""));
    assert_eq!(state(&e), (Closed, 3), "a UDP frontend was removed");
}

#[test]
fn a_failed_write_is_counted_shown_and_tried_again() {
    let mut e = engine("", FakeDatapath::default());
    probe(&mut e, 10, 1, CheckCode::L7Ok);
    e.datapath_mut().failures = 2;
    probe(&mut e, 3000, 0, CheckCode::L7Sts);
    let status = e.get(at(3000), "dummy").unwrap();
    assert_eq!((status.desired.state, status.applied.unwrap().state), (Open, Closed));
    assert_eq!(status.failed_writes, 1);
    assert!(status.error.unwrap().contains("told to fail"));
    assert!(e.next_deadline(at(3000)) <= at(3200).mono);
    e.tick(at(3100));
    assert_eq!(state(&e).0, Closed, "not before the retry is due");
    e.tick(at(3200));
    e.tick(at(3400));
    assert_eq!(state(&e).0, Open);
    let status = e.get(at(3400), "dummy").unwrap();
    assert_eq!((status.error, status.failed_writes), (None, 2));
    let kinds: Vec<_> = e.engine.events_after(0).into_iter().map(|event| event.kind.label()).collect();
    assert_eq!(kinds.iter().filter(|k| **k == "WriteFailed").count(), 1, "reported once: {kinds:?}");
    assert!(kinds.contains(&"WriteRecovered"));
}

#[test]
fn what_is_settled_is_written_once() {
    let mut e = engine("", FakeDatapath::default());
    probe(&mut e, 10, 1, CheckCode::L7Ok);
    probe(&mut e, 20, 0, CheckCode::L7Ok);
    let writes = e.datapath().log.len();
    for i in 0..50 {
        e.tick(at(100 + i * 20));
        probe(&mut e, 110 + i * 20, 0, CheckCode::L7Ok);
    }
    assert_eq!(e.datapath().log.len(), writes);
}

#[test]
fn flows_are_looked_for_until_the_last_one_has_ended() {
    let mut e = engine("", FakeDatapath::default());
    probe(&mut e, 10, 1, CheckCode::L7Ok);
    probe(&mut e, 20, 0, CheckCode::L7Sts);
    e.datapath_mut().alive.insert(ServiceName::new("dummy"), 1);
    probe(&mut e, 30, 0, CheckCode::L7Ok);
    assert_eq!(state(&e).0, Closed);
    for ms in [2000, 4000, 6000] {
        e.tick(at(ms));
        assert!(applied(&e).decision.draining);
    }
    e.datapath_mut().alive.clear();
    e.tick(at(8100));
    assert!(!applied(&e).decision.draining);
    assert_eq!(applied(&e).flags, 0, "closed and idle: the prefilter passes every packet again");
}

/// `Drain`: the primary's connections go on for a time, which a trial in between does not begin anew.
#[test]
fn a_drain_ends_with_resets() {
    use breaker_common::switch_flags::RESET_PRIMARY;
    let extra = "onOpen: Drain, drainSeconds: 10, breaker: {halfOpenConnections: 1},";
    let mut e = engine(extra, FakeDatapath::default());
    probe(&mut e, 10, 1, CheckCode::L7Ok);
    probe(&mut e, 1000, 0, CheckCode::L7Sts);
    assert_eq!((state(&e).0, applied(&e).flags & RESET_PRIMARY), (Open, 0));
    let kept = e.engine.departures();
    assert_eq!((&kept[0].from, kept[0].resets_per_second), (&Departed::Primary, None));
    probe(&mut e, 5000, 0, CheckCode::L7Ok);
    assert_eq!(state(&e).0, HalfOpen);
    probe(&mut e, 6000, 0, CheckCode::L7Sts);
    assert_eq!((state(&e).0, applied(&e).flags & RESET_PRIMARY), (Open, 0));
    assert!(e.next_deadline(at(10_900)) <= at(11_000).mono);
    e.tick(at(10_999));
    assert_eq!(applied(&e).flags & RESET_PRIMARY, 0);
    e.tick(at(11_000));
    assert_eq!(applied(&e).flags & RESET_PRIMARY, RESET_PRIMARY);
    let departures = e.engine.departures();
    assert_eq!((departures.len(), departures[0].resets_per_second), (1, Some(1000)));
    assert_eq!(departures[0].frontends, ["10.43.0.1:80".parse().unwrap()]);
    probe(&mut e, 12_000, 0, CheckCode::L7Ok);
    assert!(e.engine.departures().is_empty(), "only an open breaker resets");
}

/// Resets begin with the plan in the maps, also where a backup becomes usable later, and end with the open state, also
/// where the next plan cannot be written.
#[test]
fn resets_follow_what_is_in_force() {
    let mut e = engine("", FakeDatapath::default());
    probe(&mut e, 10, 0, CheckCode::L4Con);
    assert_eq!(state(&e).0, Open);
    assert!(e.engine.departures().is_empty(), "no backup is usable");
    e.datapath_mut().failures = 1;
    probe(&mut e, 20, 1, CheckCode::L7Ok);
    assert!(e.engine.departures().is_empty(), "the write failed");
    e.tick(at(1000));
    let departures = e.engine.departures();
    assert_eq!((departures.len(), departures[0].resets_per_second), (1, Some(1000)));
    let counts = |tier| EstablishedCounts { found: 3, reset: 2, gone: 1, ..EstablishedCounts::none_of(tier) };
    e.engine.note_established(&ServiceName::new("dummy"), counts(TierRole::Backup));
    assert_eq!(e.engine.summaries()[0].established, None, "the backup was not left");
    e.engine.note_established(&ServiceName::new("dummy"), counts(TierRole::Primary));
    assert_eq!(e.engine.summaries()[0].established, Some(counts(TierRole::Primary)));
    e.datapath_mut().failures = 1;
    probe(&mut e, 2000, 0, CheckCode::L7Ok);
    assert_eq!(state(&e).0, Open, "the maps are as before");
    assert!(e.engine.departures().is_empty());
    e.tick(at(4000));
    assert!(e.engine.departures().is_empty());
    assert_eq!(e.engine.summaries()[0].established, None, "closed again");
}

/// `Drain` for the backup's connections: when the breaker closes, and when one of its pods is Down.
#[test]
fn a_drain_of_the_backup_ends_with_resets() {
    use breaker_common::switch_flags::RESET_BACKUP;
    let mut e = engine("onClose: Drain, onBackupDown: Keep, drainSeconds: 10,", FakeDatapath::default());
    probe(&mut e, 10, 1, CheckCode::L7Ok);
    probe(&mut e, 1000, 0, CheckCode::L7Sts);
    e.datapath_mut().alive.insert(ServiceName::new("dummy"), 1);
    probe(&mut e, 2000, 0, CheckCode::L7Ok);
    assert_eq!((state(&e).0, applied(&e).flags & RESET_BACKUP), (Closed, 0));
    e.tick(at(11_999));
    assert_eq!(applied(&e).flags & RESET_BACKUP, 0);
    assert!(e.engine.departures().is_empty());
    e.tick(at(12_000));
    assert_eq!(applied(&e).flags & RESET_BACKUP, RESET_BACKUP);
    let closed = e.engine.departures();
    assert_eq!((&closed[0].from, closed[0].epoch), (&Departed::Backup, applied(&e).decision.epoch));

    let two = services("onOpen: Keep, onBackupDown: Drain, drainSeconds: 10,");
    let mut two = two[0].clone();
    let mut second = two.backups[0].backends[0];
    second.address = "10.42.0.4:80".parse().unwrap();
    two.backups[0].backends.push(second);
    let mut e = Harness::new(FakeDatapath::default(), at(0));
    e.configure(at(0), vec![two]);
    probe(&mut e, 10, 1, CheckCode::L7Ok);
    probe(&mut e, 1000, 0, CheckCode::L7Sts);
    probe_of(&mut e, 1500, 1, "10.42.0.4:80", CheckCode::L7Ok);
    probe_of(&mut e, 2000, 1, "10.42.0.3:80", CheckCode::L7Sts);
    assert!(applied(&e).down.is_empty());
    e.tick(at(11_999));
    assert!(applied(&e).down.is_empty());
    assert!(e.next_deadline(at(11_999)) <= at(12_000).mono);
    e.tick(at(12_000));
    let down: BTreeSet<SocketAddr> = ["10.42.0.3:80".parse().unwrap()].into();
    assert_eq!(applied(&e).down, down);
    let departures: Vec<_> =
        e.engine.departures().into_iter().map(|left| (left.from, left.resets_per_second)).collect();
    assert_eq!(departures, [(Departed::Primary, None), (Departed::DownBackends(down), Some(1000))]);
}

/// A limit sent connections to the backup while the breaker is closed: their flows are tracked until they have ended.
#[test]
fn what_a_limit_sent_to_the_backup_is_looked_for() {
    use breaker_common::switch_flags::TRACK;
    let name = ServiceName::new("dummy");
    let mut e = engine("limits: {concurrentConnections: 1, onLimit: Failover},", FakeDatapath::default());
    e.tick(at(3000));
    e.tick(at(6000));
    assert_eq!(applied(&e).flags & TRACK, 0, "closed and idle");
    e.datapath_mut().overflowed.insert(name.clone());
    e.datapath_mut().alive.insert(name.clone(), 1);
    e.tick(at(9000));
    assert_eq!((state(&e).0, applied(&e).flags & TRACK), (Closed, TRACK));
    e.datapath_mut().overflowed.clear();
    e.tick(at(12_000));
    assert_eq!(applied(&e).flags & TRACK, TRACK, "a flow is alive");
    e.datapath_mut().alive.clear();
    e.tick(at(15_000));
    assert_eq!(applied(&e).flags & TRACK, 0);
}

#[test]
fn a_limit_that_bites_is_an_event_and_part_of_the_summary() {
    let name = ServiceName::new("dummy");
    let mut e = engine("limits: {newConnectionsPerSecond: 10},", FakeDatapath::default());
    e.tick(at(3000));
    let changes = e.engine.changes();
    let counters = breaker_common::LimitCounters { limited: [[7, 0, 0, 0], [0; 4]], ..Default::default() };
    e.datapath_mut().limited.insert(name, counters);
    e.tick(at(6000));
    let told = e.events("Limited");
    assert_eq!(told.len(), 1);
    assert!(told[0].message.starts_with("primary newConnectionsPerSecond is reached: 7"), "{}", told[0].message);
    assert!(
        e.engine.changes() > changes && e.summaries()[0].limited.as_ref().is_some_and(|limit| limit.per_minute == 7)
    );
    e.tick(at(9000));
    assert_eq!(e.events("Limited").len(), 1, "once a minute");
}

#[test]
fn a_reload_keeps_what_did_not_change() {
    let mut e = engine("", FakeDatapath::default());
    probe(&mut e, 10, 1, CheckCode::L7Ok);
    probe(&mut e, 20, 0, CheckCode::L7Sts);
    let before = e.get(at(30), "dummy").unwrap();
    e.configure(at(1000), services(""));
    let after = e.get(at(1000), "dummy").unwrap();
    assert_eq!((after.epoch, after.since_unix_ns, after.state), (before.epoch, before.since_unix_ns, before.state));
    assert_eq!(after.tiers[1].backends[0].health, Some(Health::Up));
    e.configure(at(2000), services("whenAllUnhealthy: Reject,"));
    assert_eq!(state(&e), (Open, 2), "a changed policy is no change of state");
}

#[test]
fn a_service_that_goes_waits_for_its_flows() {
    let mut e = engine("", FakeDatapath::default());
    probe(&mut e, 10, 1, CheckCode::L7Ok);
    probe(&mut e, 20, 0, CheckCode::L7Sts);
    e.datapath_mut().alive.insert(ServiceName::new("dummy"), 3);
    e.configure(at(1000), Vec::new());
    assert_eq!(state(&e).0, Closed);
    assert!(applied(&e).decision.draining && applied(&e).frontends().count() > 0);
    assert!(e.status(at(1000)).is_empty());
    e.tick(at(4000));
    assert!(!e.datapath().applied.is_empty());
    e.datapath_mut().alive.clear();
    for ms in [7000, 10_000, 13_000] {
        e.tick(at(ms));
    }
    assert!(e.datapath().applied.is_empty());
}

#[test]
fn an_earlier_agents_work_is_adopted_before_anything_changes() {
    let left = left_open();
    let other = Adopted { name: ServiceName::new("forgotten"), ..left.clone() };
    let mut e = engine("", FakeDatapath { left_behind: vec![left, other], ..FakeDatapath::default() });
    let status = e.get(at(0), "dummy").unwrap();
    assert_eq!((status.state, status.epoch, status.reason), (Open, 41, StateReason::ConnectTimeout));
    assert_eq!(status.since_unix_ns, (ORIGIN - 100) * SECOND_NS);
    assert_eq!(status.trips, 3);
    assert_eq!(state(&e), (Open, 41));
    assert_eq!(applied(&e).backends().len(), 1, "the backup keeps the traffic before its first probe");
    assert_eq!(e.status(at(0)).len(), 1, "a service that is not configured any more is not shown");
    for ms in [3000, 6000, 9000] {
        e.tick(at(ms));
    }
    assert!(!e.datapath().applied.contains_key(&ServiceName::new("forgotten")));
    probe(&mut e, 9500, 0, CheckCode::L7Ok);
    assert_eq!(state(&e), (Closed, 42));
}

#[test]
fn connections_to_a_frontend_that_went_while_no_agent_looked_end_in_peace() {
    let gone = Frontend { address: "10.43.0.77:8080".parse().unwrap(), protocol: Protocol::Tcp };
    let mut left = Adopted { backup: BTreeSet::new(), ..left_open() };
    left.frontends.push(gone);
    let alive = [(ServiceName::new("dummy"), 1)].into();
    let mut e = engine("", FakeDatapath { left_behind: vec![left], alive, ..FakeDatapath::default() });
    for ms in [2000, 4000, 6000] {
        e.tick(at(ms));
        assert!(applied(&e).frontends().any(|frontend| *frontend == gone), "{ms}");
    }
    e.datapath_mut().alive.clear();
    e.tick(at(8100));
    assert!(!applied(&e).frontends().any(|frontend| *frontend == gone));
}

#[test]
fn the_operator_trips_for_a_while_and_resets() {
    let mut e = engine("", FakeDatapath::default());
    probe(&mut e, 10, 1, CheckCode::L7Ok);
    probe(&mut e, 20, 0, CheckCode::L7Ok);
    let status = e.trip(at(1000), "dummy", Some(Duration::from_secs(60)), Some("migration")).unwrap();
    assert_eq!((status.state, status.override_), (Open, Override::ForceOpen));
    assert!(status.message.contains("migration"));
    probe(&mut e, 2000, 0, CheckCode::L7Ok);
    assert_eq!(state(&e).0, Open);
    e.tick(at(61_000));
    assert_eq!(state(&e).0, Closed);
    e.trip(at(62_000), "dummy", None, None).unwrap();
    let status = e.reset(at(63_000), "dummy").unwrap();
    assert_eq!((status.state, status.override_), (Closed, Override::Auto));
    let error = e.trip(at(64_000), "dumy", None, None).unwrap_err();
    assert_eq!(error.to_string(), "there is no service dumy; there are: dummy");
}

#[test]
fn a_ramp_is_written_step_by_step() {
    let mut e = engine("breaker: {rampMillis: 1000, rampStartPermille: 100},", FakeDatapath::default());
    probe(&mut e, 10, 1, CheckCode::L7Ok);
    probe(&mut e, 20, 0, CheckCode::L7Sts);
    probe(&mut e, 1000, 0, CheckCode::L7Ok);
    assert_eq!((applied(&e).decision.share, state(&e)), (100, (Closed, 3)));
    let mut shares = Vec::new();
    for ms in (1100..=2100).step_by(100) {
        e.tick(at(ms));
        shares.push(applied(&e).decision.share);
    }
    assert!(shares.is_sorted() && shares[0] == 190 && *shares.last().unwrap() == 1000, "{shares:?}");
    assert_eq!(state(&e), (Closed, 4), "flows that the ramp sent to the backup belong to an older epoch");
}

#[test]
fn a_configured_override_is_the_configurations() {
    let mut e = engine("override: ForceClosed,", FakeDatapath::default());
    let error = e.trip(at(10), "dummy", None, None).unwrap_err();
    assert_eq!(error.to_string(), "the configuration sets override: ForceClosed for dummy; change it there");
    probe(&mut e, 20, 0, CheckCode::L4Con);
    assert_eq!(state(&e).0, Closed);
    assert_eq!(applied(&e).decision.override_.0, Override::Auto, "the maps store operator overrides only");
    e.configure(at(30), services(""));
    assert_eq!(state(&e).0, Open, "the measurements decide again");
}

#[test]
fn an_override_that_ended_while_nobody_looked_waits_for_the_checks() {
    let left = Adopted {
        epoch: 7,
        reason: StateReason::Operator,
        trips: 0,
        override_: (Override::ForceOpen, (ORIGIN - 1) * SECOND_NS),
        ..left_open()
    };
    let mut e = engine("", FakeDatapath { left_behind: vec![left], ..FakeDatapath::default() });
    assert_eq!(state(&e), (Open, 7), "nothing is known of the primary yet");
    probe(&mut e, 10, 0, CheckCode::L7Ok);
    assert_eq!(state(&e), (Closed, 8));
}

/// TRIALS J5: a CircuitBreaker that is deleted while open and made again is closed, and not because of a failure.
#[test]
fn a_service_that_was_removed_while_open_begins_anew() {
    let mut e = engine("", FakeDatapath { left_behind: vec![left_open()], ..FakeDatapath::default() });
    assert_eq!(applied(&e).decision.reason, StateReason::ConnectTimeout);
    e.configure(at(10), Vec::new());
    assert_eq!((applied(&e).decision.state, applied(&e).decision.reason), (Closed, StateReason::Initial));
    // The maps of an earlier version: closed, and the reason of the trip.
    let left = Adopted { state: Closed, share: 1000, ..left_open() };
    let e = engine("", FakeDatapath { left_behind: vec![left], ..FakeDatapath::default() });
    let snapshot = e.get(at(10), "dummy").unwrap();
    assert_eq!((snapshot.state, snapshot.reason), (Closed, StateReason::Initial));
}

/// The operator's reason in the configuration is the message of the state.
#[test]
fn a_configured_override_says_why() {
    let mut e = engine("", FakeDatapath::default());
    probe(&mut e, 5, 0, CheckCode::L4Ok);
    let mut forced = services("override: ForceOpen,");
    forced[0].override_reason = "database migration".into();
    e.configure(at(10), forced);
    assert_eq!((state(&e).0, e.get(at(11), "dummy").unwrap().message.as_str()), (Open, "database migration"));
    e.configure(at(20), services(""));
    assert_eq!(e.get(at(21), "dummy").unwrap().message, "the configured override changed");
}

#[test]
fn a_rate_that_tripped_stays_tripped_for_a_while() {
    let mut e = engine("breaker: {window: {minimumVolume: 4}},", FakeDatapath::default());
    probe(&mut e, 10, 1, CheckCode::L7Ok);
    // Rise and fall keep the primary Up, but the failure rate trips the breaker.
    let target = Target { service: ServiceName::new("dummy"), tier: 0, backend: "10.42.0.2:80".parse().unwrap() };
    for ms in 1..=4 {
        let code = if ms % 2 == 0 { CheckCode::L7Sts } else { CheckCode::L7Ok };
        let result = ProbeResult { code, detail: String::new(), duration: Duration::ZERO };
        let began = e.state_epoch();
        e.observe(at(100 * ms), &ProbeReport { target: target.clone(), result, health: Health::Up, began });
    }
    assert_eq!(applied(&e).decision.reason, StateReason::FailureRate);
    e.tick(at(9000));
    assert_eq!(state(&e).0, Open, "it stays open for the length of the window");
    e.tick(at(10_500));
    assert_eq!(state(&e).0, Closed);
}

/// Addresses are reused: a pod must not receive the connections of the pod that had its address before.
#[test]
fn flows_end_with_the_pods_that_they_went_to() {
    let (stays, goes): (SocketAddr, SocketAddr) = ("10.42.0.3:80".parse().unwrap(), "10.42.0.9:80".parse().unwrap());
    let tcp = |address| (address, Protocol::Tcp);
    let with_both = |draining: bool| {
        let mut services = services("");
        let tier = &mut services[0].backups[0];
        if draining {
            tier.draining.push(goes);
        } else {
            tier.backends.push(Backend { address: goes, weight: 1 });
        }
        services
    };
    let mut e =
        Harness::new(FakeDatapath { flows_to: [stays, goes].map(tcp).into(), ..FakeDatapath::default() }, at(0));
    e.configure(at(0), with_both(false));
    e.configure(at(10), with_both(true));
    assert_eq!(e.datapath().flows_to.len(), 2, "a pod that terminates keeps its connections");
    e.configure(at(20), services(""));
    assert_eq!(e.datapath().flows_to, [tcp(stays)].into());
    // A packet that read the old tables pins one more flow shortly afterwards.
    e.datapath_mut().flows_to.insert(tcp(goes));
    e.tick(at(2_100));
    assert_eq!(e.datapath().flows_to, [tcp(stays)].into());
}

/// A connection to a backend that went down may still be answered, and would break if it were moved. A datagram has
/// nothing to lose.
#[test]
fn datagrams_leave_a_backend_of_the_backup_that_is_down() {
    let backup: SocketAddr = "10.42.0.3:80".parse().unwrap();
    let flows = [(backup, Protocol::Tcp), (backup, Protocol::Udp)];
    let mut e = Harness::new(FakeDatapath { flows_to: flows.into(), ..FakeDatapath::default() }, at(0));
    let mut services = services("");
    let frontend = services[0].frontends[0];
    services[0].frontends.push(Frontend { protocol: Protocol::Udp, ..frontend });
    e.configure(at(0), services);
    probe(&mut e, 10, 1, CheckCode::L7Ok);
    e.tick(at(2_100));
    assert_eq!(e.datapath().flows_to.len(), 2);
    for i in 0..10 {
        probe(&mut e, 2_200 + i, 1, CheckCode::L4Con);
    }
    e.tick(at(4_300));
    assert_eq!(e.datapath().flows_to, [(backup, Protocol::Tcp)].into());
}

#[test]
fn flows_to_pods_that_went_while_no_agent_looked_end_too() {
    let (stays, gone): (SocketAddr, SocketAddr) = ("10.42.0.3:80".parse().unwrap(), "10.42.0.9:80".parse().unwrap());
    let tcp = |address| (address, Protocol::Tcp);
    let mut first = engine("", FakeDatapath::default());
    probe(&mut first, 10, 1, CheckCode::L7Ok);
    let adopted = Adopted { epoch: 7, backup: [stays].into(), ..left_open() };
    let datapath =
        FakeDatapath { left_behind: vec![adopted], flows_to: [stays, gone].map(tcp).into(), ..FakeDatapath::default() };
    let e = engine("", datapath);
    assert_eq!(e.datapath().flows_to, [tcp(stays)].into());
    assert_eq!(state(&e), (Open, 7), "and nothing else changes");
}

/// kube-proxy writes its rules for a new pod a little later than the agent hears of the pod. If the breaker closed
/// earlier, kube-proxy would have no endpoint for the connections.
#[test]
fn a_new_pod_that_is_well_closes_only_once_kube_proxy_had_its_time() {
    let with = |backends: bool| {
        let mut services = services("");
        services[0].grace_period = Duration::from_secs(2);
        if !backends {
            services[0].primary.backends.clear();
        }
        services
    };
    let mut e = Harness::new(FakeDatapath::default(), at(0));
    e.configure(at(0), with(true));
    probe(&mut e, 10, 1, CheckCode::L7Ok);
    e.configure(at(1000), with(false));
    assert_eq!(state(&e).0, Open);
    e.configure(at(5000), with(true));
    probe(&mut e, 5100, 0, CheckCode::L7Ok);
    probe(&mut e, 6900, 0, CheckCode::L7Ok);
    assert_eq!(state(&e).0, Open);
    e.tick(at(6900));
    assert_eq!((state(&e).0, e.next_deadline(at(6900))), (Open, at(7000).mono), "it does not wait for a probe");
    e.tick(at(7000));
    assert_eq!(state(&e).0, Closed);
}

/// The grace period applies to a primary without a check, too: its new endpoint counts as Up when the period is over.
#[test]
fn a_new_pod_of_an_unchecked_primary_has_to_settle_too() {
    let with = |backends: bool| {
        let mut services = services("");
        services[0].grace_period = Duration::from_secs(2);
        services[0].primary.check = None;
        if !backends {
            services[0].primary.backends.clear();
        }
        services
    };
    let mut e = Harness::new(FakeDatapath::default(), at(0));
    e.configure(at(0), with(true));
    probe(&mut e, 10, 1, CheckCode::L7Ok);
    assert_eq!(state(&e).0, Closed);
    e.configure(at(1000), with(false));
    assert_eq!(state(&e).0, Open);
    e.configure(at(5000), with(true));
    e.tick(at(6900));
    assert_eq!(state(&e).0, Open);
    e.tick(at(7000));
    assert_eq!(state(&e).0, Closed);
}

/// HARDENING L2: a probe that this node could not make says nothing about the backend.
#[test]
fn local_errors_move_nothing_and_are_told_when_they_last() {
    let mut e = engine("", FakeDatapath::default());
    probe(&mut e, 10, 1, CheckCode::L7Ok);
    probe(&mut e, 20, 0, CheckCode::L7Ok);
    for second in 1..=9 {
        probe(&mut e, second * 1000, 0, CheckCode::LocalError);
    }
    assert_eq!((state(&e).0, e.events("LocalError").len()), (Closed, 0));
    for second in 10..=20 {
        probe(&mut e, second * 1000, 0, CheckCode::LocalError);
    }
    assert_eq!(state(&e).0, Closed);
    assert_eq!(e.events("LocalError").len(), 1, "one event, however long it lasts");
    let snapshot = e.get(at(20_000), "dummy").unwrap();
    let backend = &snapshot.tiers[0].backends[0];
    assert_eq!(backend.local_errors.as_ref().map(|errors| errors.count), Some(20));
    assert_eq!(backend.last.as_ref().map(|last| last.code), Some(CheckCode::L7Ok), "the last result stays");
    assert_eq!((backend.health, snapshot.local_errors), (Some(Health::Up), 20));
    probe(&mut e, 21_000, 0, CheckCode::L7Sts);
    assert_eq!((state(&e).0, e.events("LocalError").len()), (Open, 2));
    assert_eq!(e.get(at(21_000), "dummy").unwrap().tiers[0].backends[0].local_errors, None);
}

/// TRIALS E2: a client that goes on sending datagrams returns to the first backup when that one is back.
#[test]
fn flows_do_not_stay_on_the_second_backup() {
    let mut services = services("");
    let mut spare = services[0].backups[0].clone();
    spare.name = "spare".into();
    spare.check = None;
    spare.backends[0].address = "10.42.0.4:80".parse().unwrap();
    services[0].backups.push(spare);
    let mut e = Harness::new(FakeDatapath::default(), at(0));
    e.configure(at(0), services);
    for (ms, tier, code) in [(1, 1, CheckCode::L7Ok), (2, 0, CheckCode::L7Ok), (3000, 0, CheckCode::L7Sts)] {
        probe(&mut e, ms, tier, code);
    }
    let used = |e: &Harness| {
        let plan = applied(e);
        (plan.decision.epoch, plan.backends().into_iter().map(|(address, _)| address.to_string()).collect::<Vec<_>>())
    };
    let (first, _) = used(&e);
    probe(&mut e, 4000, 1, CheckCode::L7Sts);
    let (second, backends) = used(&e);
    assert_eq!(backends, ["10.42.0.4:80"]);
    probe(&mut e, 5000, 1, CheckCode::L7Ok);
    let (third, backends) = used(&e);
    assert_eq!(backends, ["10.42.0.3:80"]);
    assert!(first < second && second < third, "{first} {second} {third}");
}

/// TRIALS F5: a result that comes late moves nothing.
#[test]
fn a_probe_counts_only_in_the_state_in_which_it_began() {
    let extra = "breaker: {openMillis: 1000, halfOpenConnections: 5, halfOpenPasses: 2, halfOpenTimeoutMillis: 60000},";
    let mut e = engine(extra, FakeDatapath::default());
    let target = Target { service: ServiceName::new("dummy"), tier: 0, backend: "10.42.0.2:80".parse().unwrap() };
    let late = |e: &mut Harness, ms: u64, code: CheckCode, began: u32| {
        let result = ProbeResult { code, detail: "late".into(), duration: Duration::from_millis(1) };
        let health = if code.passes() { Health::Up } else { Health::Down };
        e.observe(at(ms), &ProbeReport { target: target.clone(), result, health, began });
    };
    probe(&mut e, 10, 1, CheckCode::L7Ok);
    probe(&mut e, 20, 0, CheckCode::L7Ok);
    let closed = e.state_epoch();
    probe(&mut e, 1000, 0, CheckCode::L7Sts);
    assert_eq!(state(&e).0, Open);
    // A pass that began before the breaker opened does not bring the primary back.
    late(&mut e, 3000, CheckCode::L7Ok, closed);
    assert_eq!(state(&e).0, Open);
    let open = e.state_epoch();
    probe(&mut e, 4000, 0, CheckCode::L7Ok);
    assert_eq!(state(&e).0, HalfOpen);
    // Passes that began while open are none of the two that half-open asks for; a late failure trips nothing either.
    for ms in 4001..4010 {
        late(&mut e, ms, CheckCode::L7Ok, open);
    }
    late(&mut e, 4010, CheckCode::L7Sts, open);
    assert_eq!(state(&e).0, HalfOpen);
    probe(&mut e, 5000, 0, CheckCode::L7Ok);
    assert_eq!(state(&e).0, HalfOpen);
    probe(&mut e, 6000, 0, CheckCode::L7Ok);
    assert_eq!(state(&e).0, Closed);
}

/// HARDENING L3: a step of the wall clock, in either direction, moves nothing. Only an override with an end follows it.
#[test]
fn a_step_of_the_clock_moves_nothing() {
    let mut e = engine("breaker: {openMillis: 1000},", FakeDatapath::default());
    probe(&mut e, 10, 1, CheckCode::L7Ok);
    probe(&mut e, 20, 0, CheckCode::L7Ok);
    for unix_ns in [0, 1, u64::MAX] {
        e.tick(Now { unix_ns, ..at(3000) });
        assert_eq!(state(&e).0, Closed);
    }
}

/// HARDENING L5: a breaker that flaps fills neither the log nor the events.
#[test]
fn a_flapping_breaker_writes_a_bounded_number_of_lines() {
    let mut e = engine("", FakeDatapath::default());
    probe(&mut e, 5, 1, CheckCode::L7Ok);
    let mut lines = 0;
    for step in 1..6000 {
        let code = if step % 2 == 0 { CheckCode::L7Ok } else { CheckCode::L7Sts };
        probe(&mut e, step * 10, 0, code);
        e.tick(at(step * 10));
        lines += e.engine.take_log().len();
    }
    assert!(lines < 150, "{lines} lines in a minute");
    let events = e.engine.events_after(0);
    let counted = events.iter().filter(|event| !matches!(event.kind, EntryKind::Packet(_))).count();
    assert!(counted < 150, "{counted} events in a minute");
    assert!(!e.events("LeftOut").is_empty());
}

/// HARDENING N1: a new service whose pods have never been ready is starting. It fails when it fails after that, or when
/// it has been starting for too long.
#[test]
fn a_service_that_is_starting_has_not_failed() {
    let with = |backends: bool, starting: bool| {
        let mut services = services("");
        services[0].starting = starting;
        if !backends {
            services[0].primary.backends.clear();
        }
        services
    };
    let mut e = Harness::new(FakeDatapath::default(), at(0));
    e.configure(at(0), with(false, true));
    probe(&mut e, 10, 1, CheckCode::L7Ok);
    assert_eq!(state(&e).0, Closed, "no pod yet");
    assert!(e.get(at(10), "dummy").unwrap().message.contains("starting"));
    e.configure(at(1000), with(true, true));
    probe(&mut e, 1010, 0, CheckCode::L4Con);
    assert_eq!(state(&e).0, Closed, "its process is not there yet");
    probe(&mut e, 2000, 0, CheckCode::L7Ok);
    assert_eq!(e.get(at(2000), "dummy").unwrap().message, "");
    probe(&mut e, 3000, 0, CheckCode::L4Con);
    assert_eq!(state(&e).0, Open, "it has been ready, so this is a failure");

    let mut e = Harness::new(FakeDatapath::default(), at(0));
    e.configure(at(0), with(false, true));
    e.configure(at(1000), with(false, false));
    assert_eq!((state(&e).0, applied(&e).decision.reason), (Open, StateReason::NoEndpoints), "not for ever");

    let mut e = Harness::new(FakeDatapath::default(), at(0));
    e.configure(at(0), with(false, true));
    e.configure(at(60_000), with(true, true));
    probe(&mut e, 60_010, 0, CheckCode::L4Con);
    assert_eq!(state(&e).0, Closed);
    probe(&mut e, 70_010, 0, CheckCode::L4Con);
    assert_eq!(state(&e).0, Open, "its pods are there and fail for ten seconds");
}
