//! Validates `tcpSocket` and `udp` checks: a plain connection, or a request and an answer.

use breaker_core::model::{CheckAction, Exchange, Transport};
use serde_saphyr::{Location, Spanned};

use super::{format, problems::Problems};

/// Most bytes that a check sends or expects.
const MOST_BYTES: usize = 1024;

pub(super) fn tcp_socket(problems: &mut Problems<'_>, path: &str, raw: Spanned<format::TcpSocket>) -> CheckAction {
    let field = |name: &str| format!("{path}.{name}");
    let Spanned { value: raw, referenced: at, .. } = raw;
    let port = problems.optional_port(raw.port.as_ref(), &field("port"));
    let given = [&raw.send, &raw.send_hex, &raw.expect, &raw.expect_hex];
    if given.iter().all(|text| text.is_none()) {
        let needs = |problems: &mut Problems<'_>, at: Location, name: &str| {
            problems.add(at, &field(name), "needs an exchange; allowed: together with send or expect".into());
        };
        if let Some(quit) = &raw.quit {
            needs(problems, quit.referenced, "quit");
        }
        if let Some(tls) = &raw.tls {
            needs(problems, tls.referenced, "tls");
        }
        if let Some(host) = &raw.host {
            needs(problems, host.referenced, "host");
        }
        return CheckAction::TcpSocket { port, accept: raw.accept.is_some_and(|accept| accept.value) };
    }
    if let Some(accept) = raw.accept.as_ref().filter(|accept| !accept.value) {
        let problem = "false is not allowed beside send or expect, which need the server's process; allowed: true";
        problems.add(accept.referenced, &field("accept"), problem.into());
    }
    if let Some(host) = &raw.host {
        problems.host(host, &field("host"));
        if !raw.tls.as_ref().is_some_and(|tls| tls.value) {
            problems.add(host.referenced, &field("host"), "is a name for TLS; allowed: together with tls: true".into());
        }
    }
    let host = raw.host.map(|host| host.value);
    let tls = raw.tls.is_some_and(|tls| tls.value);
    CheckAction::Exchange {
        port,
        exchange: Exchange {
            transport: if tls { Transport::Tls { host } } else { Transport::Tcp },
            send: bytes(problems, at, path, "send", (raw.send, raw.send_hex)),
            expect: bytes(problems, at, path, "expect", (raw.expect, raw.expect_hex)),
            quit: bytes(problems, at, path, "quit", (raw.quit, None)),
        },
    }
}

pub(super) fn udp(problems: &mut Problems<'_>, path: &str, raw: Spanned<format::Udp>) -> CheckAction {
    let Spanned { value: raw, referenced: at, .. } = raw;
    if raw.send.is_none() && raw.send_hex.is_none() {
        let problem = "is missing: a server answers only to a datagram; allowed: send or sendHex";
        problems.add(at, &format!("{path}.send"), problem.into());
    }
    CheckAction::Exchange {
        port: problems.optional_port(raw.port.as_ref(), &format!("{path}.port")),
        exchange: Exchange {
            transport: Transport::Udp,
            send: bytes(problems, at, path, "send", (raw.send, raw.send_hex)),
            expect: bytes(problems, at, path, "expect", (raw.expect, raw.expect_hex)),
            quit: Vec::new(),
        },
    }
}

/// Returns bytes that are given as text or as hexadecimal digits.
fn bytes(
    problems: &mut Problems<'_>,
    at: Location,
    path: &str,
    name: &str,
    (text, hex): (Option<Spanned<String>>, Option<Spanned<String>>),
) -> Vec<u8> {
    if text.is_some() && hex.is_some() {
        let problem = format!("is set together with {name}Hex; allowed: only one of the two");
        problems.add(at, &format!("{path}.{name}"), problem);
    }
    let (given, field, bytes) = match (text, hex) {
        (_, Some(hex)) => (hex.referenced, format!("{path}.{name}Hex"), from_hex(&hex.value).ok_or(hex.value)),
        (Some(text), None) => (text.referenced, format!("{path}.{name}"), Ok(text.value.into_bytes())),
        (None, None) => return Vec::new(),
    };
    match bytes {
        Ok(bytes) if bytes.len() > MOST_BYTES => {
            problems.add(given, &field, format!("has {} bytes; allowed: up to {MOST_BYTES}", bytes.len()));
            Vec::new()
        }
        Ok(bytes) if bytes.is_empty() => {
            problems.add(given, &field, "is empty; allowed: at least one byte, or leave the field out".into());
            Vec::new()
        }
        Ok(bytes) => bytes,
        Err(text) => {
            let problem = format!("{text:?} is not allowed; allowed: pairs of hexadecimal digits, like 50 49 4e 47");
            problems.add(given, &field, problem);
            Vec::new()
        }
    }
}

fn from_hex(text: &str) -> Option<Vec<u8>> {
    let digits: Vec<u32> =
        text.chars().filter(|c| !c.is_ascii_whitespace()).map(|c| c.to_digit(16)).collect::<Option<_>>()?;
    let pairs = digits.chunks(2).map(|pair| match pair {
        [high, low] => u8::try_from(high * 16 + low).ok(),
        _ => None,
    });
    pairs.collect()
}
