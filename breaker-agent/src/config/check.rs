//! Validates a health check.

use std::{net::IpAddr, ops::RangeInclusive, time::Duration};

use breaker_core::model::{Check, CheckAction, DnsQuestion, DnsRcode, DnsRecord, HttpGet};
use serde_saphyr::{Location, Spanned};

use super::{
    exchange, format,
    problems::{DAY, Problems},
};

pub(super) fn check(problems: &mut Problems<'_>, path: &str, raw: format::Check) -> Check {
    let field = |name: &str| format!("{path}.{name}");
    let given = [
        raw.http_get.as_ref().map(|a| a.referenced),
        raw.tcp_socket.as_ref().map(|a| a.referenced),
        raw.grpc.as_ref().map(|a| a.referenced),
        raw.dns.as_ref().map(|a| a.referenced),
        raw.udp.as_ref().map(|a| a.referenced),
    ];
    let actions: Vec<Location> = given.into_iter().flatten().collect();
    if actions.len() != 1 {
        let at = actions.get(1).copied().unwrap_or(Location::UNKNOWN);
        let problem =
            format!("has {} actions; allowed: exactly one of httpGet, tcpSocket, grpc, dns, udp", actions.len());
        problems.add(at, path, problem);
    }
    let action = if let Some(http) = raw.http_get {
        http_get(problems, &field("httpGet"), http.value)
    } else if let Some(grpc) = raw.grpc {
        CheckAction::Grpc {
            port: problems.optional_port(grpc.value.port.as_ref(), &field("grpc.port")),
            service: grpc.value.service.unwrap_or_default(),
        }
    } else if let Some(dns) = raw.dns {
        dns_question(problems, &field("dns"), dns.value)
    } else if let Some(udp) = raw.udp {
        exchange::udp(problems, &field("udp"), udp)
    } else if let Some(tcp) = raw.tcp_socket {
        exchange::tcp_socket(problems, &field("tcpSocket"), tcp)
    } else {
        CheckAction::TcpSocket { port: None, accept: false }
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
    if let Some(given) = &raw.path {
        request_target(problems, &field("path"), given);
    }
    for (i, header) in raw.http_headers.iter().enumerate() {
        self::header(problems, &field(&format!("httpHeaders[{i}]")), header, raw.host.is_some());
    }
    if let Some(host) = &raw.host {
        problems.host(host, &field("host"));
    }
    let https = problems.word(raw.scheme.as_ref(), &field("scheme"), &[("HTTP", false), ("HTTPS", true)], false);
    CheckAction::HttpGet {
        port: problems.optional_port(raw.port.as_ref(), &field("port")),
        get: HttpGet {
            path: raw.path.map_or_else(|| "/".into(), |path| path.value),
            https,
            host: raw.host.map(|host| host.value),
            headers: raw.http_headers.into_iter().map(|h| (h.name.value, h.value.value)).collect(),
            expected_statuses: raw
                .expected_statuses
                .map_or_else(|| vec![200..=399], |given| statuses(problems, &field("expectedStatuses"), &given)),
            body_contains: raw.body_contains,
        },
    }
}

/// Checks a path. It goes on the wire as it is written, so it may contain only what a request target may (RFC 9112,
/// section 3.2.1; RFC 3986, section 3.3), and the brackets that many queries have.
fn request_target(problems: &mut Problems<'_>, field: &str, given: &Spanned<String>) {
    let allowed = |c: u8| c.is_ascii_alphanumeric() || b"-._~!$&'()*+,;=:@/?%[]".contains(&c);
    let path = given.value.as_bytes();
    let wrong = path.iter().position(|c| !allowed(*c));
    let percent = path.iter().enumerate().find(|(i, c)| {
        let digit = |n: usize| path.get(i + n).is_some_and(u8::is_ascii_hexdigit);
        **c == b'%' && !(digit(1) && digit(2))
    });
    let why = if path.first() != Some(&b'/') {
        "it does not start with '/'".to_owned()
    } else if let Some(at) = wrong {
        format!("it has {:?}, which a request cannot carry", given.value[at..].chars().next().unwrap_or_default())
    } else if percent.is_some() {
        "it has a '%' without two hexadecimal digits".to_owned()
    } else {
        return;
    };
    let problem = format!(
        "{:?} is not allowed: {why}; allowed: a path that starts with '/', with letters, digits, -._~!$&'()*+,;=:@/?[] and %XX",
        given.value
    );
    problems.add(given.referenced, field, problem);
}

/// Checks a header of the request. Those that say where the request ends are the agent's own.
fn header(problems: &mut Problems<'_>, path: &str, header: &format::Header, has_host: bool) {
    let name = header.name.value.as_str();
    if name.parse::<http::HeaderName>().is_err() {
        let problem = format!("{name:?} is not a header name; allowed: a token (RFC 9110, section 5.1)");
        problems.add(header.name.referenced, &format!("{path}.name"), problem);
    }
    if ["content-length", "transfer-encoding"].iter().any(|other| name.eq_ignore_ascii_case(other)) {
        let problem = format!("{name:?} is not allowed, because a GET request has no body; allowed: any other header");
        problems.add(header.name.referenced, &format!("{path}.name"), problem);
    }
    if has_host && name.eq_ignore_ascii_case("host") {
        let problem = format!("{name:?} is not allowed beside `host`, which sets this header; allowed: one of the two");
        problems.add(header.name.referenced, &format!("{path}.name"), problem);
    }
    let visible = |c: char| c == '\t' || (' '..='~').contains(&c);
    if !header.value.value.chars().all(visible) {
        let problem = format!("{:?} is not a header value; allowed: visible ASCII characters", header.value.value);
        problems.add(header.value.referenced, &format!("{path}.value"), problem);
    }
}

fn dns_question(problems: &mut Problems<'_>, path: &str, raw: format::Dns) -> CheckAction {
    let field = |name: &str| format!("{path}.{name}");
    let label = |label: &str| {
        let allowed = |c: u8| c.is_ascii_alphanumeric() || b"-_".contains(&c);
        (1..=63).contains(&label.len()) && label.bytes().all(allowed)
    };
    let name = raw.name.value.strip_suffix('.').unwrap_or(&raw.name.value);
    if name.len() > 253 || !(raw.name.value == "." || name.split('.').all(label)) {
        let problem =
            format!("{:?} is not a name; allowed: labels of letters, digits, '-' and '_', with dots", raw.name.value);
        problems.add(raw.name.referenced, &field("name"), problem);
    }
    let records = [
        ("A", DnsRecord::A),
        ("AAAA", DnsRecord::Aaaa),
        ("CNAME", DnsRecord::Cname),
        ("MX", DnsRecord::Mx),
        ("NS", DnsRecord::Ns),
        ("PTR", DnsRecord::Ptr),
        ("SOA", DnsRecord::Soa),
        ("SRV", DnsRecord::Srv),
        ("TXT", DnsRecord::Txt),
    ];
    let rcodes = [
        ("NOERROR", Some(DnsRcode::NoError)),
        ("SERVFAIL", Some(DnsRcode::ServFail)),
        ("NXDOMAIN", Some(DnsRcode::NxDomain)),
        ("REFUSED", Some(DnsRcode::Refused)),
        ("ANY", None),
    ];
    let record = problems.word(raw.record.as_ref(), &field("type"), &records, DnsRecord::A);
    let mut expected_addresses = Vec::new();
    for (i, given) in raw.expected_addresses.iter().enumerate() {
        match given.value.parse::<IpAddr>() {
            Ok(ip) if (ip.is_ipv4() && record == DnsRecord::A) || (ip.is_ipv6() && record == DnsRecord::Aaaa) => {
                expected_addresses.push(ip);
            }
            _ => {
                let problem = format!("{:?} is not allowed; allowed: an address of the type asked for", given.value);
                problems.add(given.referenced, &field(&format!("expectedAddresses[{i}]")), problem);
            }
        }
    }
    CheckAction::Dns {
        port: problems.optional_port(raw.port.as_ref(), &field("port")),
        question: DnsQuestion {
            name: format!("{}.", name.trim_end_matches('.')),
            record,
            rcode: problems.word(raw.rcode.as_ref(), &field("rcode"), &rcodes, Some(DnsRcode::NoError)),
            expected_addresses,
        },
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
