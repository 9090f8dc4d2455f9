//! Validates the breaker's policy.

use breaker_core::model::{BreakerPolicy, FailureWindow, Tier};
use serde_saphyr::Location;

use super::{
    format,
    problems::{DAY, Problems},
};

pub(super) fn breaker(problems: &mut Problems<'_>, path: &str, raw: format::Breaker) -> BreakerPolicy {
    let field = |name: &str| format!("{path}.{name}");
    // A failure rate that tripped the breaker does not tell whether the primary has recovered. With a window the
    // breaker must therefore stay open for some time: by default for the window's length, and at least 1 ms.
    let window_length = raw.window.as_ref().map(|w| w.length_millis.as_ref().map_or(10_000, |length| length.value));
    let open = problems.millis(
        raw.open_millis.as_ref(),
        &field("openMillis"),
        window_length.unwrap_or(0).min(DAY),
        u64::from(window_length.is_some()),
    );
    let max_open = problems.millis(raw.max_open_millis.as_ref(), &field("maxOpenMillis"), 300_000, 0);
    if let Some(given) = &raw.max_open_millis
        && max_open < open
    {
        let problem = format!("{} is not allowed; allowed: at least openMillis ({})", given.value, open.as_millis());
        problems.add(given.referenced, &field("maxOpenMillis"), problem);
    }
    let permille = problems.number(raw.ramp_start_permille.as_ref(), &field("rampStartPermille"), 100, 0..=1000);
    BreakerPolicy {
        open,
        max_open: max_open.max(open),
        jitter_percent: problems.percent(raw.jitter_percent.as_ref(), &field("jitterPercent"), 0, 0..=50),
        decay: problems.millis(raw.decay_millis.as_ref(), &field("decayMillis"), 60_000, 0),
        half_open_connections: problems.u32(
            raw.half_open_connections.as_ref(),
            &field("halfOpenConnections"),
            0,
            0..=1_000_000,
        ),
        half_open_timeout: problems.millis(
            raw.half_open_timeout_millis.as_ref(),
            &field("halfOpenTimeoutMillis"),
            30_000,
            10,
        ),
        half_open_passes: problems.u32(raw.half_open_passes.as_ref(), &field("halfOpenPasses"), 3, 1..=1000),
        ramp: problems.millis(raw.ramp_millis.as_ref(), &field("rampMillis"), 0, 0),
        ramp_start: u16::try_from(permille).unwrap_or(100),
        window: raw.window.map(|raw| {
            let field = |name: &str| format!("{path}.window.{name}");
            FailureWindow {
                length: problems.millis(raw.length_millis.as_ref(), &field("lengthMillis"), 10_000, 100),
                minimum_volume: problems.u32(raw.minimum_volume.as_ref(), &field("minimumVolume"), 20, 1..=10_000),
                failure_rate_percent: problems.percent(
                    raw.failure_rate_percent.as_ref(),
                    &field("failureRatePercent"),
                    50,
                    1..=100,
                ),
            }
        }),
    }
}

/// Refuses a window that can never trip: it holds one observation for each probe of each backend of the primary. While
/// the backends are not known, only a check is required.
pub(super) fn window_can_trip(
    problems: &mut Problems<'_>,
    path: &str,
    policy: &BreakerPolicy,
    primary: &Tier,
    at: Location,
) {
    let Some(window) = policy.window else { return };
    let Some(check) = &primary.check else {
        let problem = "needs a check of the primary: the window counts its probes; allowed: a primary with a check";
        problems.add(at, path, problem.into());
        return;
    };
    if let Some(most) = window.too_few_observations(check.fast_period, primary.backends.len()) {
        let problem = format!(
            "{} is not allowed: {} backend(s), checked every {:?}, give at most {most} observations in {:?}; allowed: 1 to \
             {most}, or a longer lengthMillis, or a shorter period of the check",
            window.minimum_volume,
            primary.backends.len(),
            check.fast_period,
            window.length,
        );
        problems.add(at, &format!("{path}.minimumVolume"), problem);
    }
}
