use super::*;
use crate::model::FailureWindow;
use proptest::prelude::*;

const SECOND: Duration = Duration::from_secs(1);

/// The policy that the defaults give: the behaviour of NGINX Plus.
fn plain() -> BreakerPolicy {
    BreakerPolicy {
        open: Duration::ZERO,
        max_open: SECOND * 300,
        jitter_percent: 0,
        decay: SECOND * 60,
        half_open_connections: 0,
        half_open_timeout: SECOND * 10,
        half_open_passes: 2,
        ramp: Duration::ZERO,
        ramp_start: 100,
        window: None,
    }
}

fn breaker(policy: BreakerPolicy) -> Breaker {
    Breaker::new(policy, 7, Duration::ZERO)
}

fn at(seconds: u64) -> Instant {
    SECOND * u32::try_from(seconds).unwrap()
}

fn down(b: &mut Breaker, now: Instant) -> Option<(BreakerState, StateReason)> {
    b.observe(now, false, TierHealth::Down, StateReason::HttpStatus).map(|t| (t.to, t.reason))
}

fn up(b: &mut Breaker, now: Instant) -> Option<(BreakerState, StateReason)> {
    b.observe(now, true, TierHealth::Up, StateReason::Initial).map(|t| (t.to, t.reason))
}

use BreakerState::{Closed, HalfOpen, Open};

#[test]
fn the_lab_opens_on_the_first_failure_and_closes_on_the_first_pass() {
    let mut b = breaker(plain());
    assert_eq!(up(&mut b, at(0)), None);
    assert_eq!(down(&mut b, at(3)), Some((Open, StateReason::HttpStatus)));
    assert_eq!(b.share(at(3)), 0);
    assert_eq!(down(&mut b, at(6)), None);
    assert_eq!(up(&mut b, at(9)), Some((Closed, StateReason::Recovered)));
    assert_eq!(b.share(at(9)), 1000);
}

#[test]
fn open_time_grows_with_trips_in_a_row_to_its_cap_and_decays() {
    let mut b = breaker(BreakerPolicy { open: SECOND * 10, max_open: SECOND * 25, ..plain() });
    let mut now = at(0);
    for expected in [10, 20, 25, 25] {
        down(&mut b, now);
        assert_eq!(b.next_deadline(), None, "the primary is Down, so time alone changes nothing");
        assert_eq!(up(&mut b, now + at(expected - 1)), None, "not before the open time is over");
        assert_eq!(b.next_deadline(), Some(now + at(expected)));
        now += at(expected);
        assert_eq!(b.tick(now).map(|t| t.to), Some(Closed));
    }
    assert_eq!(b.trips(), 4);
    b.tick(now + at(121));
    assert_eq!(b.trips(), 2, "one trip is forgotten per minute");
    b.reset(now + at(121));
    assert_eq!(b.trips(), 0);
}

#[test]
fn half_open_closes_after_enough_passes() {
    let mut b = breaker(BreakerPolicy { half_open_connections: 5, ..plain() });
    down(&mut b, at(0));
    assert_eq!(up(&mut b, at(3)), Some((HalfOpen, StateReason::OpenTimeOver)));
    assert_eq!(b.share(at(3)), 0);
    assert_eq!(up(&mut b, at(4)), None);
    assert_eq!(up(&mut b, at(5)), Some((Closed, StateReason::TrialPassed)));
}

#[test]
fn half_open_falls_back_on_a_failure_and_ends_without_traffic() {
    let mut b = breaker(BreakerPolicy { half_open_connections: 5, half_open_passes: 100, ..plain() });
    down(&mut b, at(0));
    up(&mut b, at(3));
    assert_eq!(down(&mut b, at(4)), Some((Open, StateReason::HttpStatus)));
    up(&mut b, at(5));
    assert_eq!(b.state(), HalfOpen);
    assert_eq!(b.tick(at(14)), None);
    assert_eq!(b.tick(at(15)).map(|t| (t.to, t.reason)), Some((Closed, StateReason::TrialPassed)));
}

#[test]
fn the_ramp_grows_from_its_start_to_everything() {
    let mut b = breaker(BreakerPolicy { ramp: SECOND * 10, ramp_start: 100, ..plain() });
    assert_eq!(b.share(at(0)), 1000, "no ramp at startup, as in HAProxy");
    down(&mut b, at(0));
    up(&mut b, at(10));
    assert_eq!([10, 15, 19, 20, 30].map(|s| b.share(at(s))), [100, 550, 910, 1000, 1000]);
    b.tick(at(20));
    assert_eq!(b.next_deadline(), None);
}

#[test]
fn one_failure_in_a_quiet_hour_does_not_break_the_rate_rule() {
    let window = FailureWindow { length: SECOND * 10, minimum_volume: 20, failure_rate_percent: 50 };
    let mut b = breaker(BreakerPolicy { window: Some(window), ..plain() });
    let mut fail = |s: u64| b.observe(at(s), false, TierHealth::Up, StateReason::HttpStatus);
    for s in 0..100 {
        assert_eq!(fail(s * 60), None);
    }
    let tripped: Vec<_> = (0..20).filter_map(|_| fail(6001)).collect();
    assert_eq!(tripped.len(), 1);
    assert_eq!((tripped[0].to, tripped[0].reason), (Open, StateReason::FailureRate));
}

#[test]
fn the_operator_beats_the_measurement_and_gives_it_back() {
    let mut b = breaker(plain());
    up(&mut b, at(0));
    assert_eq!(b.set_override(at(1), Override::ForceOpen, false).map(|t| t.reason), Some(StateReason::Operator));
    assert_eq!(up(&mut b, at(2)), None, "it stays open although the primary is Up");
    assert_eq!(
        b.set_override(at(3), Override::Auto, true).map(|t| (t.to, t.reason)),
        Some((Closed, StateReason::OverrideExpired))
    );
    b.set_override(at(4), Override::ForceClosed, false);
    assert_eq!(down(&mut b, at(5)), None, "it stays closed although the primary is Down");
    assert_eq!(b.set_override(at(6), Override::Auto, false).map(|t| t.to), Some(Open));
}

#[test]
fn a_failure_that_outlasts_the_override_becomes_the_reason() {
    type End = fn(&mut Breaker) -> Option<Transition>;
    let ends: [(&str, End); 3] = [
        ("taken back", |b| b.set_override(at(3), Override::Auto, false)),
        ("expired", |b| b.set_override(at(3), Override::Auto, true)),
        ("reset", |b| b.reset(at(3))),
    ];
    for (case, end) in ends {
        let mut b = breaker(BreakerPolicy { open: SECOND * 10, ..plain() });
        up(&mut b, at(0));
        b.set_override(at(1), Override::ForceOpen, false);
        assert_eq!(down(&mut b, at(2)), None, "{case}");
        let taken_over = Transition { from: Open, to: Open, reason: StateReason::HttpStatus };
        assert_eq!(end(&mut b), Some(taken_over), "{case}");
        assert_eq!((b.reason(), b.trips()), (StateReason::HttpStatus, 1), "{case}: it counts as a trip");
        assert_eq!(up(&mut b, at(12)), None, "{case}: the open time begins at the end of the override");
        assert_eq!(up(&mut b, at(13)), Some((Closed, StateReason::Recovered)), "{case}");
    }
}

#[test]
fn no_endpoints_open_and_unknown_ones_do_not() {
    let mut b = breaker(plain());
    assert_eq!(b.set_primary(at(0), TierHealth::Unknown), None);
    assert_eq!(b.set_primary(at(1), TierHealth::Empty).map(|t| t.reason), Some(StateReason::NoEndpoints));
    assert_eq!(b.set_primary(at(2), TierHealth::Unknown), None, "new endpoints must first pass a check");
    assert_eq!(b.set_primary(at(3), TierHealth::Up).map(|t| t.to), Some(Closed));
}

#[test]
fn a_restored_breaker_goes_on_where_it_was() {
    let policy = BreakerPolicy { open: SECOND * 60, ..plain() };
    let was = Restored { state: Open, reason: StateReason::ConnectFailed, age: SECOND * 50, trips: 1 };
    let mut b = Breaker::restore(policy, 1, at(100), was);
    assert_eq!((b.state(), b.reason()), (Open, StateReason::ConnectFailed));
    assert_eq!(up(&mut b, at(109)), None);
    assert_eq!(up(&mut b, at(110)), Some((Closed, StateReason::Recovered)));
}

#[derive(Clone, Debug)]
enum Input {
    Observe(bool, TierHealth),
    Primary(TierHealth),
    Tick,
    Override(Override),
    Reset,
}

fn any_health() -> impl Strategy<Value = TierHealth> {
    prop_oneof![Just(TierHealth::Up), Just(TierHealth::Down), Just(TierHealth::Unknown), Just(TierHealth::Empty)]
}

fn any_input() -> impl Strategy<Value = Input> {
    prop_oneof![
        (any::<bool>(), any_health()).prop_map(|(pass, health)| Input::Observe(pass, health)),
        any_health().prop_map(Input::Primary),
        Just(Input::Tick),
        prop_oneof![Just(Override::Auto), Just(Override::ForceOpen), Just(Override::ForceClosed)]
            .prop_map(Input::Override),
        Just(Input::Reset),
    ]
}

proptest! {
    /// Checks the invariants after every step of any sequence of inputs at any times.
    #[test]
    fn invariants(
        steps in prop::collection::vec((0u64..40_000, any_input()), 1..200),
        open_s in 0u64..20, connections in 0u32..5, ramp_s in 0u64..20, jitter in 0u8..=50,
    ) {
        let policy = BreakerPolicy {
            open: at(open_s), max_open: at(60), jitter_percent: jitter, half_open_connections: connections,
            ramp: at(ramp_s), ..plain()
        };
        let mut b = breaker(policy.clone());
        let mut now = at(0);
        for (ms, input) in steps {
            now += Duration::from_millis(ms);
            let before = (b.state(), b.reason());
            let transition = match input {
                Input::Observe(pass, health) => b.observe(now, pass, health, StateReason::HttpStatus),
                Input::Primary(health) => b.set_primary(now, health),
                Input::Tick => b.tick(now),
                Input::Override(wanted) => b.set_override(now, wanted, false),
                Input::Reset => b.reset(now),
            };
            // A transition is returned when the state changes, and it names the old and the new state. The only one
            // between equal states is that of an operator's open breaker to one that is open because of a failure.
            prop_assert_eq!(transition.map_or(before.0, |t| t.from), before.0);
            prop_assert_eq!(transition.map_or(before.0, |t| t.to), b.state());
            prop_assert!(transition.is_none_or(|t| t.reason == b.reason()));
            let takes_over = |to, reason: StateReason| to == Open && !before.1.is_failure() && reason.is_failure();
            prop_assert!(transition.is_none_or(|t| t.from != t.to || takes_over(t.to, t.reason)));
            // While open or half-open, the hash gives the primary no share.
            let share = b.share(now);
            prop_assert!(share <= 1000 && (b.state() == Closed || share == 0));
            // The override holds.
            match b.operator() {
                Override::ForceOpen => prop_assert_eq!(b.state(), Open),
                Override::ForceClosed => prop_assert_eq!(b.state(), Closed),
                Override::Auto => {}
            }
            // Without an override, the breaker is never closed or half-open while the primary is Down or empty.
            let bad = matches!(b.primary(), TierHealth::Down | TierHealth::Empty);
            prop_assert!(!(bad && b.state() != Open && b.operator() == Override::Auto));
            // The failure that keeps it open then is named, also after an override.
            prop_assert!(!(bad && b.operator() == Override::Auto && !b.reason().is_failure()));
            // Without half-open connections, the breaker is never half-open.
            prop_assert!(connections > 0 || b.state() != HalfOpen);
            // A deadline is never further away than the cap of the open time, and half-open always has one.
            if let Some(deadline) = b.next_deadline() {
                prop_assert!(deadline <= now + at(61));
            } else {
                prop_assert!(b.state() != HalfOpen);
            }
        }
    }
}
