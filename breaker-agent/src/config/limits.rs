//! Converts limits from the format of the file to domain types.

use std::time::Duration;

use breaker_core::limits::{CLIENT_PREFIX, IDLE, Limits, MAX_LIMIT, OnLimit, Rate, Scope, TierLimits};
use serde_saphyr::{Location, Spanned};

use super::{format, problems::Problems};

/// The limits of one tier, as written in the file.
struct Raw<'a> {
    rate: &'a Option<Spanned<f64>>,
    burst: &'a Option<Spanned<f64>>,
    concurrent: &'a Option<Spanned<f64>>,
    per_client: &'a Option<format::ClientLimits>,
    on_limit: &'a Option<Spanned<String>>,
}

/// Converts a service's limits; `None` if it has none. `has_backup`: whether the service has a backup tier.
pub(super) fn limits(
    problems: &mut Problems<'_>,
    path: &str,
    raw: Option<Spanned<format::Limits>>,
    has_backup: bool,
) -> Option<Limits> {
    let at = raw.as_ref().map(|raw| raw.referenced)?;
    let raw = raw?.value;
    let primary = Raw {
        rate: &raw.new_connections_per_second,
        burst: &raw.burst,
        concurrent: &raw.concurrent_connections,
        per_client: &raw.per_client,
        on_limit: &raw.on_limit,
    };
    let backup = raw.backup.as_ref().map(|raw| Raw {
        rate: &raw.new_connections_per_second,
        burst: &raw.burst,
        concurrent: &raw.concurrent_connections,
        per_client: &raw.per_client,
        on_limit: &raw.on_limit,
    });
    let scopes = [("Node", Scope::Node), ("Cluster", Scope::Cluster)];
    let prefix = raw.client_prefix_length.as_ref();
    let limits = Limits {
        primary: tier(problems, path, &primary),
        backup: backup.map(|backup| tier(problems, &format!("{path}.backup"), &backup)).unwrap_or_default(),
        client_prefix: problems.percent(prefix, &format!("{path}.clientPrefixLengthIPv6"), CLIENT_PREFIX, 1..=128),
        idle: Duration::from_secs(problems.number(
            raw.idle_seconds.as_ref(),
            &format!("{path}.idleSeconds"),
            IDLE.as_secs(),
            5..=86_400,
        )),
        scope: problems.word(raw.scope.as_ref(), &format!("{path}.scope"), &scopes, Scope::Node),
        nodes: 1,
    };
    if let (OnLimit::Failover, false, Some(word)) = (limits.primary.on_limit, has_backup, &raw.on_limit) {
        let problem = "\"Failover\" needs a backup; allowed: Reset, Drop, or a backup in `backups`".into();
        problems.add(word.referenced, &format!("{path}.onLimit"), problem);
    }
    if !limits.any() {
        let problem = "limits nothing; allowed: at least one of newConnectionsPerSecond and concurrentConnections, for the \
                       primary, for each client (perClient) or for the backup (backup)";
        problems.add(at, path, problem.into());
    }
    Some(limits)
}

fn tier(problems: &mut Problems<'_>, path: &str, raw: &Raw<'_>) -> TierLimits {
    let field = |name: &str| format!("{path}.{name}");
    let actions = [("Reset", OnLimit::Reset), ("Drop", OnLimit::Drop), ("Failover", OnLimit::Failover)];
    let rate = rate(problems, path, raw.rate.as_ref(), raw.burst.as_ref());
    let concurrent = whole(problems, raw.concurrent.as_ref(), &field("concurrentConnections"));
    let mut limits = TierLimits {
        rate,
        concurrent,
        client_rate: None,
        client_concurrent: None,
        on_limit: problems.word(raw.on_limit.as_ref(), &field("onLimit"), &actions, OnLimit::Reset),
    };
    if let Some(client) = raw.per_client {
        let path = field("perClient");
        let (of_rate, of_burst) = (client.new_connections_per_second.as_ref(), client.burst.as_ref());
        limits.client_rate = self::rate(problems, &path, of_rate, of_burst);
        limits.client_concurrent =
            whole(problems, client.concurrent_connections.as_ref(), &format!("{path}.concurrentConnections"));
        if let (Some(of_client), Some(of_all)) = (&mut limits.client_rate, rate) {
            let name = format!("{path}.newConnectionsPerSecond");
            at_most(problems, of_rate, &name, of_client.per_second, of_all.per_second);
            if of_burst.is_some() {
                at_most(problems, of_burst, &format!("{path}.burst"), of_client.burst, of_all.burst);
            }
            of_client.burst = of_client.burst.min(of_all.burst);
        }
        if let (Some(of_client), Some(of_all)) = (limits.client_concurrent, concurrent) {
            let (value, name) = (client.concurrent_connections.as_ref(), format!("{path}.concurrentConnections"));
            at_most(problems, value, &name, of_client, of_all);
        }
    }
    limits
}

/// Reports a limit for each client that is above the limit of all clients together: it would never have an effect.
fn at_most(problems: &mut Problems<'_>, value: Option<&Spanned<f64>>, field: &str, of_client: u32, of_all: u32) {
    if of_client > of_all {
        let at = value.map_or(Location::UNKNOWN, |value| value.referenced);
        problems.add(
            at,
            field,
            format!("{of_client} is above the limit of all clients together; allowed: 1 to {of_all}"),
        );
    }
}

fn rate(
    problems: &mut Problems<'_>,
    path: &str,
    rate: Option<&Spanned<f64>>,
    burst: Option<&Spanned<f64>>,
) -> Option<Rate> {
    let per_second = whole(problems, rate, &format!("{path}.newConnectionsPerSecond"));
    let given = whole(problems, burst, &format!("{path}.burst"));
    if let (None, Some(burst)) = (rate, burst) {
        let problem = "needs newConnectionsPerSecond: burst is how many connections may come at once".into();
        problems.add(burst.referenced, &format!("{path}.burst"), problem);
    }
    per_second.map(|per_second| Rate { per_second, burst: given.unwrap_or_else(|| Rate::default_burst(per_second)) })
}

/// Converts a value to a whole number from 1 to [`MAX_LIMIT`]. Any other value is reported and replaced by 1.
fn whole(problems: &mut Problems<'_>, value: Option<&Spanned<f64>>, field: &str) -> Option<u32> {
    let value = value?;
    let number = value.value;
    if number.fract() != 0.0 || !(1.0..=f64::from(MAX_LIMIT)).contains(&number) {
        problems.add(
            value.referenced,
            field,
            format!("{number} is not allowed; allowed: a whole number from 1 to {MAX_LIMIT}"),
        );
        return Some(1);
    }
    #[expect(clippy::cast_possible_truncation, clippy::cast_sign_loss, reason = "checked above")]
    Some(number as u32)
}
