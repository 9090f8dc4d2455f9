//! Validates a health check.

use std::{ops::RangeInclusive, time::Duration};

use breaker_core::model::{Check, CheckAction};
use serde_saphyr::{Location, Spanned};

use super::{
    format,
    problems::{DAY, Problems},
};

pub(super) fn check(problems: &mut Problems<'_>, path: &str, raw: format::Check) -> Check {
    let field = |name: &str| format!("{path}.{name}");
    let given = [
        raw.http_get.as_ref().map(|a| a.referenced),
        raw.tcp_socket.as_ref().map(|a| a.referenced),
        raw.grpc.as_ref().map(|a| a.referenced),
    ];
    let actions: Vec<Location> = given.into_iter().flatten().collect();
    if actions.len() != 1 {
        let at = actions.get(1).copied().unwrap_or(Location::UNKNOWN);
        let problem = format!("has {} actions; allowed: exactly one of httpGet, tcpSocket, grpc", actions.len());
        problems.add(at, path, problem);
    }
    let action = if let Some(http) = raw.http_get {
        http_get(problems, &field("httpGet"), http.value)
    } else if let Some(grpc) = raw.grpc {
        CheckAction::Grpc {
            port: problems.optional_port(grpc.value.port.as_ref(), &field("grpc.port")),
            service: grpc.value.service.unwrap_or_default(),
        }
    } else {
        let port = raw.tcp_socket.and_then(|tcp| tcp.value.port);
        CheckAction::TcpSocket { port: problems.optional_port(port.as_ref(), &field("tcpSocket.port")) }
    };
    let period = either(problems, path, "period", (raw.period_seconds, 86_400), (raw.period_millis, DAY), 10, 3000);
    let timeout =
        either(problems, path, "timeout", (raw.timeout_seconds, 3600), (raw.timeout_millis, 3_600_000), 10, 1000);
    let fast = raw.fast_period_millis.as_ref();
    let fast_default = u64::try_from(period.as_millis()).unwrap_or(DAY);
    let fast_period = problems.millis(fast, &field("fastPeriodMillis"), fast_default, 10);
    Check {
        action,
        period,
        fast_period: fast_period.min(period),
        timeout,
        failure_threshold: problems.u32(raw.failure_threshold.as_ref(), &field("failureThreshold"), 1, 1..=1000),
        success_threshold: problems.u32(raw.success_threshold.as_ref(), &field("successThreshold"), 1, 1..=1000),
        jitter_percent: problems.percent(raw.jitter_percent.as_ref(), &field("jitterPercent"), 0, 0..=50),
    }
}

/// Returns a duration that is given in seconds or in milliseconds. Reports a problem if both are given.
fn either(
    problems: &mut Problems<'_>,
    path: &str,
    name: &str,
    (seconds, most_seconds): (Option<Spanned<u64>>, u64),
    (millis, most_millis): (Option<Spanned<u64>>, u64),
    least_millis: u64,
    default_millis: u64,
) -> Duration {
    if let (Some(seconds), Some(_)) = (&seconds, &millis) {
        let problem = format!("is set together with {name}Millis; allowed: only one of the two");
        problems.add(seconds.referenced, &format!("{path}.{name}Seconds"), problem);
    }
    if let Some(millis) = millis {
        let field = format!("{path}.{name}Millis");
        return Duration::from_millis(problems.number(
            Some(&millis),
            &field,
            default_millis,
            least_millis..=most_millis,
        ));
    }
    if let Some(seconds) = seconds {
        let field = format!("{path}.{name}Seconds");
        return Duration::from_secs(problems.number(Some(&seconds), &field, 1, 1..=most_seconds));
    }
    Duration::from_millis(default_millis)
}

fn http_get(problems: &mut Problems<'_>, path: &str, raw: format::HttpGet) -> CheckAction {
    let field = |name: &str| format!("{path}.{name}");
    if let Some(given) = &raw.path
        && !given.value.starts_with('/')
    {
        let problem = format!("{:?} is not allowed; allowed: a path that starts with '/'", given.value);
        problems.add(given.referenced, &field("path"), problem);
    }
    for (i, header) in raw.http_headers.iter().enumerate() {
        let at = field(&format!("httpHeaders[{i}]"));
        if header.name.value.parse::<http::HeaderName>().is_err() {
            let problem =
                format!("{:?} is not a header name; allowed: a token (RFC 9110, section 5.1)", header.name.value);
            problems.add(header.name.referenced, &format!("{at}.name"), problem);
        }
        if header.value.value.parse::<http::HeaderValue>().is_err() {
            let problem = format!("{:?} is not a header value; allowed: visible ASCII characters", header.value.value);
            problems.add(header.value.referenced, &format!("{at}.value"), problem);
        }
    }
    if let Some(host) = &raw.host
        && host.value.parse::<http::uri::Authority>().is_err()
    {
        let problem = format!("{:?} is not allowed; allowed: a host name, optionally with a port", host.value);
        problems.add(host.referenced, &field("host"), problem);
    }
    let https = problems.word(raw.scheme.as_ref(), &field("scheme"), &[("HTTP", false), ("HTTPS", true)], false);
    CheckAction::HttpGet {
        path: raw.path.map_or_else(|| "/".into(), |path| path.value),
        port: problems.optional_port(raw.port.as_ref(), &field("port")),
        https,
        host: raw.host.map(|host| host.value),
        headers: raw.http_headers.into_iter().map(|h| (h.name.value, h.value.value)).collect(),
        expected_statuses: raw
            .expected_statuses
            .map_or_else(|| vec![200..=399], |given| statuses(problems, &field("expectedStatuses"), &given)),
        body_contains: raw.body_contains,
    }
}

/// Parses a list of statuses and ranges, like `200-399` or `200,204,300-302`.
fn statuses(problems: &mut Problems<'_>, field: &str, given: &Spanned<String>) -> Vec<RangeInclusive<u16>> {
    let number = |text: &str| text.trim().parse::<u16>().ok().filter(|n| (100..=599).contains(n));
    let ranges: Option<Vec<_>> = given
        .value
        .split(',')
        .map(|part| {
            let (least, most) = part.split_once('-').unwrap_or((part, part));
            let range = number(least)?..=number(most)?;
            (!range.is_empty()).then_some(range)
        })
        .collect();
    ranges.unwrap_or_else(|| {
        let problem = format!(
            "{:?} is not allowed; allowed: statuses and ranges from 100 to 599, like 200-399 or 200,204",
            given.value
        );
        problems.add(given.referenced, field, problem);
        vec![200..=399]
    })
}
