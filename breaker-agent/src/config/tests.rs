//! Tests of the configuration file: defaults, refused input, and the comparison with docs/CONFIGURATION.md.

use super::*;
use breaker_core::model::{CheckAction, EstablishedPolicy};

const GOOD: &str = "\
services:
  - name: dummy
    frontends:
      - {address: 10.43.0.10, port: 8080}
    primary:
      backends:
        - {address: 10.42.0.2, port: 80}
      check:
        httpGet: {path: /ready}
    backups:
      - backends:
          - {address: 10.42.0.3, port: 80}
";

fn errors(text: &str) -> Vec<String> {
    parse(Path::new("lab.yaml"), text).unwrap_err().iter().map(ToString::to_string).collect()
}

#[test]
fn the_defaults_are_the_labs() {
    let config = parse(Path::new("lab.yaml"), GOOD).unwrap();
    let service = &config.services[0];
    let check = service.primary.check.as_ref().unwrap();
    assert_eq!((check.period, check.timeout), (Duration::from_secs(3), Duration::from_secs(1)));
    assert_eq!((check.failure_threshold, check.success_threshold), (1, 1));
    let CheckAction::HttpGet { get, .. } = &check.action else { panic!("{check:?}") };
    assert_eq!(get.expected_statuses, [200..=399]);
    assert_eq!(service.breaker.half_open_connections, 0);
    assert_eq!((service.on_open, service.on_close), (EstablishedPolicy::Reset, EstablishedPolicy::Keep));
}

/// Each row: a text in the good file, its replacement, and a part of the message that must follow.
#[test]
fn bad_input_is_refused_with_file_line_field_value_and_what_is_allowed() {
    let rows: &[(&str, &str, &str)] = &[
        ("port: 8080", "port: 0", "lab.yaml:4: services[0].frontends[0].port: 0 is not allowed; allowed: 1 to 65535"),
        ("port: 8080", "port: 65536", "lab.yaml:4: services[0].frontends[0].port: 65536 is not allowed"),
        ("10.43.0.10", "vip", "lab.yaml:4: services[0].frontends[0].address: \"vip\" is not an IP address; allowed"),
        (
            "10.43.0.10",
            "'fe80::1'",
            "lab.yaml:4: services[0].frontends[0].address: \"fe80::1\" is not a host's address",
        ),
        ("10.43.0.10", "'::ffff:10.0.0.1'", "lab.yaml:4: services[0].frontends[0].address: \"::ffff:10.0.0.1\" is not"),
        (
            "10.43.0.10",
            "'ff02::1'",
            "lab.yaml:4: services[0].frontends[0].address: \"ff02::1\" is not a host's address",
        ),
        ("name: dummy", "name: 'a b'", "lab.yaml:2: services[0].name: \"a b\" is not allowed; allowed"),
        ("{path: /ready}", "{path: ready}", "lab.yaml:9: services[0].primary.check.httpGet.path: \"ready\" is not"),
        (
            "      check:\n",
            "      check:\n        periodSeconds: 0\n",
            "lab.yaml:9: services[0].primary.check.periodSeconds: 0 is not allowed; allowed: 1 to 86400",
        ),
        (
            "      check:\n",
            "      check:\n        tcpSocket: {}\n",
            "services[0].primary.check: has 2 actions; allowed: exactly one of httpGet, tcpSocket, grpc",
        ),
        ("10.42.0.3", "10.42.0.2", "lab.yaml:12: services[0].backups[0].backends[0]: 10.42.0.2:80 is a backend of the"),
        (
            "10.42.0.3, port: 80",
            "10.43.0.10, port: 8080",
            "services[0].backups[0].backends[0]: 10.43.0.10:8080 is a frontend of this service",
        ),
        (
            "    primary:\n",
            "    onOpen: Close\n    primary:\n",
            "lab.yaml:5: services[0].onOpen: \"Close\" is not allowed; allowed: Keep, Reset, Drain",
        ),
        (
            "    primary:\n",
            "    onClose: Drain\n    primary:\n",
            "services[0].drainSeconds: is missing, and onClose is Drain; allowed: 1 to 86400",
        ),
        (
            "    primary:\n",
            "    onOpen: Drain\n    drainSeconds: 86401\n    primary:\n",
            "lab.yaml:6: services[0].drainSeconds: 86401 is not allowed; allowed: 1 to 86400",
        ),
        (
            "    primary:\n",
            "    drainSeconds: 10\n    primary:\n",
            "lab.yaml:5: services[0].drainSeconds: has no effect: neither onOpen, onClose nor onBackupDown is Drain",
        ),
        (
            "    primary:\n",
            "    resetsPerSecond: 0\n    primary:\n",
            "lab.yaml:5: services[0].resetsPerSecond: 0 is not allowed; allowed: 1 to 100000",
        ),
        (
            "    primary:\n",
            "    limits: {newConnectionsPerSecond: 0}\n    primary:\n",
            "lab.yaml:5: services[0].limits.newConnectionsPerSecond: 0 is not allowed; allowed: a whole number from 1 to 1000000",
        ),
        (
            "    primary:\n",
            "    limits: {backup: {newConnectionsPerSecond: -5}}\n    primary:\n",
            "lab.yaml:5: services[0].limits.backup.newConnectionsPerSecond: -5 is not allowed; allowed: a whole number",
        ),
        (
            "    primary:\n",
            "    limits: {newConnectionsPerSecond: 0.5}\n    primary:\n",
            "services[0].limits.newConnectionsPerSecond: 0.5 is not allowed; allowed: a whole number",
        ),
        (
            "    primary:\n",
            "    limits: {perClient: {concurrentConnections: 1e12}}\n    primary:\n",
            "services[0].limits.perClient.concurrentConnections: 1000000000000 is not allowed; allowed: a whole number",
        ),
        (
            "    primary:\n",
            "    limits: {newConnectionsPerSecond: 10, burst: 0}\n    primary:\n",
            "services[0].limits.burst: 0 is not allowed; allowed: a whole number from 1",
        ),
        (
            "    primary:\n",
            "    limits: {burst: 10}\n    primary:\n",
            "services[0].limits.burst: needs newConnectionsPerSecond: burst is how many connections may come at once",
        ),
        (
            "    primary:\n",
            "    limits: {newConnectionsPerSecond: 10, perClient: {newConnectionsPerSecond: 11}}\n    primary:\n",
            "services[0].limits.perClient.newConnectionsPerSecond: 11 is above the limit of all clients together; allowed: 1 to 10",
        ),
        (
            "    primary:\n",
            "    limits: {backup: {concurrentConnections: 10, perClient: {concurrentConnections: 11}}}\n    primary:\n",
            "services[0].limits.backup.perClient.concurrentConnections: 11 is above the limit of all clients together",
        ),
        (
            "    primary:\n",
            "    limits: {newConnectionsPerSecond: 10, onLimit: Queue}\n    primary:\n",
            "services[0].limits.onLimit: \"Queue\" is not allowed; allowed: Reset, Drop, Failover",
        ),
        (
            "    primary:\n",
            "    limits: {}\n    primary:\n",
            "services[0].limits: limits nothing; allowed: at least one of",
        ),
        (
            "{path: /ready}",
            "{path: /ready, expectedStatuses: '200-'}",
            "services[0].primary.check.httpGet.expectedStatuses: \"200-\" is not allowed; allowed: statuses",
        ),
        (
            "{path: /ready}",
            "{path: '/a#b'}",
            "check.httpGet.path: \"/a#b\" is not allowed: it has '#', which a request cannot carry; allowed: ",
        ),
        ("{path: /ready}", "{path: '/a%2'}", "is not allowed: it has a '%' without two hexadecimal digits"),
        ("{path: /ready}", "{path: '/a\\b'}", "it has '\\\\', which a request cannot carry"),
        (
            "{path: /ready}",
            "{host: a.test, httpHeaders: [{name: hOst, value: b}]}",
            "httpHeaders[0].name: \"hOst\" is not allowed beside `host`",
        ),
        (
            "{path: /ready}",
            "{httpHeaders: [{name: Transfer-Encoding, value: chunked}]}",
            "httpHeaders[0].name: \"Transfer-Encoding\" is not allowed, because a GET request has no body",
        ),
        ("{path: /ready}", "{host: 'a@b'}", "check.httpGet.host: \"a@b\" is not allowed; allowed: a host name"),
        (
            "httpGet: {path: /ready}",
            "tcpSocket: {sendHex: 'abc', expect: x}",
            "check.tcpSocket.sendHex: \"abc\" is not allowed; allowed: pairs of hexadecimal digits",
        ),
        (
            "httpGet: {path: /ready}",
            "tcpSocket: {send: a, sendHex: '61'}",
            "check.tcpSocket.send: is set together with sendHex; allowed: only one of the two",
        ),
        (
            "httpGet: {path: /ready}",
            "tcpSocket: {tls: true}",
            "check.tcpSocket.tls: needs an exchange; allowed: together",
        ),
        (
            "httpGet: {path: /ready}",
            "tcpSocket: {send: a, accept: false}",
            "check.tcpSocket.accept: false is not allowed beside send or expect",
        ),
        (
            "httpGet: {path: /ready}",
            "tcpSocket: {send: ''}",
            "check.tcpSocket.send: is empty; allowed: at least one byte",
        ),
        (
            "httpGet: {path: /ready}",
            "udp: {expect: x}",
            "check.udp.send: is missing: a server answers only to a datagram",
        ),
        ("httpGet: {path: /ready}", "dns: {name: 'a b'}", "check.dns.name: \"a b\" is not a name; allowed: labels"),
        (
            "httpGet: {path: /ready}",
            "dns: {name: a.test, expectedAddresses: ['::1']}",
            "check.dns.expectedAddresses[0]: \"::1\" is not allowed; allowed: an address of the type asked for",
        ),
        // G3: a window that can never trip.
        (
            "    primary:\n",
            "    breaker: {window: {}}\n    primary:\n",
            "breaker.window.minimumVolume: 20 is not allowed: 1 backend(s), checked every 3s, give at most 4 observations in 10s",
        ),
        // F7: nowhere to go for one of the two families.
        (
            "port: 8080}",
            "port: 8080}\n      - {address: 'fd43::10', port: 8080}",
            "backups: have no IPv6 backend for the frontend [fd43::10]:8080; allowed: at least one",
        ),
        (
            "services:\n",
            "agent: {pinPath: pins}\nservices:\n",
            "agent.pinPath: \"pins\" is not allowed; allowed: an abs",
        ),
    ];
    for (from, to, expected) in rows {
        let text = GOOD.replacen(from, to, 1);
        assert_ne!(text, GOOD, "{from:?} is not in the good file");
        let errors = errors(&text);
        assert!(errors.iter().any(|e| e.contains(expected)), "{to:?} gave {errors:#?}, expected {expected:?}");
    }
}

/// HARDENING F5: what the parser refuses has a field, a value, and what is allowed.
#[test]
fn a_wrong_type_is_named_with_its_field_and_value() {
    let rows = [
        (
            "port: 8080",
            "port: 8e3",
            "lab.yaml:4: services[0].frontends[0].port: \"8e3\" is not allowed; allowed: a whole number, 0 or more",
        ),
        (
            "port: 8080",
            "port: -1",
            "lab.yaml:4: services[0].frontends[0].port: \"-1\" is not allowed; allowed: a whole number",
        ),
        ("port: 8080", "port: [1]", "lab.yaml:4: services[0].frontends[0].port: \"[1\" is not allowed; allowed: "),
        (
            "      check:\n",
            "      check:\n        periodSeconds: 3s\n",
            "services[0].primary.check.periodSeconds: \"3s\" is not allowed",
        ),
        (
            "services:\n",
            "agent: {veths: perhaps}\nservices:\n",
            "agent.veths: \"perhaps\" is not allowed; allowed: true or false",
        ),
        ("    primary:\n", "    onOpn: Keep\n    primary:\n", "services[0].onOpn: is not known; allowed: "),
        ("name: dummy", "nmae: dummy", "services[0].nmae: is not known; allowed: "),
        (
            "    primary:\n",
            "    onOpen: Keep\n    onOpen: Reset\n    primary:\n",
            "services[0].onOpen: is given twice; allowed: once",
        ),
        ("services:\n", "services: 7\nservice:\n", "lab.yaml:1: services: \"7\" is not allowed; allowed: a list"),
    ];
    let mut wrong = Vec::new();
    for (from, to, expected) in rows {
        let text = GOOD.replacen(from, to, 1);
        assert_ne!(text, GOOD, "{from:?} is not in the good file");
        let errors = errors(&text);
        if !errors.iter().any(|error| error.contains(expected)) {
            wrong.push(format!("{to:?} gave {errors:#?}, expected {expected:?}"));
        }
    }
    assert!(wrong.is_empty(), "{}", wrong.join("\n"));
}

/// HARDENING F1: the number of services is bounded by `agent.maxServices`, not by the YAML library.
#[test]
fn ten_thousand_services_are_one_valid_file() {
    let mut text = String::from("services:\n");
    for n in 0..10_000_u32 {
        let [_, a, b, c] = n.to_be_bytes();
        text.push_str(&format!(
            "- {{name: s{n}, frontends: [{{address: 10.{a}.{b}.{c}, port: 80}}], primary: {{backends: []}}, \
             backups: [{{backends: [{{address: 10.200.{b}.{c}, port: 80}}]}}]}}\n"
        ));
    }
    assert_eq!(parse(Path::new("many.yaml"), &text).map(|config| config.services.len()), Ok(10_000));
}

/// A service without a backup is refused. The problem of its limits is reported, too.
#[test]
fn failover_needs_a_backup() {
    let text = "services: [{name: s, frontends: [{address: 10.43.0.1, port: 80}], primary: {}, backups: [], \
                limits: {concurrentConnections: 1, onLimit: Failover}}]";
    let errors = errors(text);
    let expected =
        "services[0].limits.onLimit: \"Failover\" needs a backup; allowed: Reset, Drop, or a backup in `backups`";
    assert!(errors.iter().any(|error| error.contains(expected)), "{errors:?}");
}

#[test]
fn an_unknown_field_names_itself_its_line_and_the_known_ones() {
    let errors = errors(&GOOD.replace("httpGet", "httpget"));
    assert_eq!(errors.len(), 1);
    assert!(errors[0].starts_with("lab.yaml:9:"), "{errors:?}");
    assert!(errors[0].contains("httpget") && errors[0].contains("httpGet"), "{errors:?}");
}

/// TRIALS C4: no program sees packets to a loopback address; the programs for the node's own sockets see the sockets.
#[test]
fn a_loopback_frontend_needs_the_programs_for_sockets() {
    let local = GOOD.replace("10.43.0.10", "127.0.0.1");
    assert!(parse(Path::new("lab.yaml"), &local).is_ok());
    let errors = errors(&format!("agent: {{nodeSockets: false}}\n{local}"));
    assert!(
        errors[0].starts_with("lab.yaml:5: services[0].frontends[0].address: 127.0.0.1 is reached by"),
        "{errors:?}"
    );
}

#[test]
fn duplicates_name_both_places() {
    let twice = format!("{GOOD}{}", GOOD.trim_start_matches("services:\n"));
    let errors = errors(&twice);
    assert!(
        errors[0].contains("lab.yaml:13: services[1].name: \"dummy\" is already the name of the service in line 2"),
        "{errors:?}"
    );
    assert!(
        errors[1].contains("services[1].frontends[0]: 10.43.0.10:8080/TCP is already a frontend of dummy (line 4)"),
        "{errors:?}"
    );
}

#[test]
fn a_backup_is_nobodys_frontend() {
    let other = GOOD.trim_start_matches("services:\n").replace("dummy", "other").replace("10.43.0.10", "10.43.0.11");
    parse(Path::new("lab.yaml"), &format!("{GOOD}{other}")).unwrap();
    let wrong = other.replace("10.42.0.3, port: 80", "10.43.0.10, port: 8080");
    let errors = errors(&format!("{GOOD}{wrong}"));
    let expected = "services[1].backups[0].backends[0]: 10.43.0.10:8080 is dummy's frontend 10.43.0.10:8080/TCP";
    assert!(errors.iter().any(|e| e.contains(expected)), "{errors:?}");
}

#[test]
fn all_problems_come_at_once() {
    let text = GOOD.replace("port: 8080", "port: 0").replace("10.42.0.3", "nowhere");
    assert_eq!(errors(&text).len(), 2);
}

#[test]
fn a_file_that_is_not_there_is_named() {
    let errors = load(Path::new("/nowhere/lab.yaml")).unwrap_err();
    assert!(errors[0].to_string().starts_with("/nowhere/lab.yaml: cannot be read: "), "{errors:?}");
}

/// Compares docs/CONFIGURATION.md with the code: every field is documented, and the documented defaults, limits and
/// words are those of the code.
mod documented {
    use super::*;

    const DOC: &str = include_str!("../../../docs/CONFIGURATION.md");
    const FORMAT: &str = include_str!("format.rs");

    struct Field {
        section: &'static str,
        name: String,
        default: String,
        allowed: String,
    }

    fn fields() -> Vec<Field> {
        let mut section = "";
        let mut fields = Vec::new();
        for line in DOC.lines() {
            if let Some(title) = line.strip_prefix("## ") {
                section = title.trim_matches('`');
            }
            let cells: Vec<&str> = line.trim_matches('|').split(" | ").map(str::trim).collect();
            if line.starts_with("| `") && cells.len() >= 3 {
                let clean = |cell: &str| cell.trim_matches(['|', ' ']).to_owned();
                fields.push(Field {
                    section,
                    name: cells[0].trim_matches('`').to_owned(),
                    default: clean(cells[1]),
                    allowed: clean(cells[2]),
                });
            }
        }
        fields
    }

    /// A good file with one more field.
    fn with(field: &Field, value: &str) -> String {
        let leaf = |path: &str| {
            let (outer, inner) = path.split_once('.').unwrap_or(("", path));
            if outer.is_empty() { format!("{inner}: {value}") } else { format!("{outer}: {{{inner}: {value}}}") }
        };
        // These need each other.
        if value == "Drain" {
            return format!("{GOOD}    {}: Drain\n    drainSeconds: 10\n", field.name);
        }
        if field.name == "drainSeconds" {
            return format!("{GOOD}    onClose: Drain\n    drainSeconds: {value}\n");
        }
        match field.section {
            "agent" => format!("agent: {{{}}}\n{GOOD}", leaf(field.name.trim_start_matches("agent."))),
            "check" if field.name.starts_with("httpGet.") => {
                let name = field.name.trim_start_matches("httpGet.");
                GOOD.replace(
                    "{path: /ready}",
                    &format!("{{path: /ready, {name}: {value}}}").replace("path: /ready, path", "path"),
                )
            }
            // These need another field beside them.
            "check" if field.name.starts_with("dns.") => {
                let name = &field.name["dns.".len()..];
                GOOD.replace("httpGet: {path: /ready}", &format!("dns: {{name: a.test, {name}: {value}}}"))
            }
            "check" if field.name.starts_with("udp.") => {
                let name = &field.name["udp.".len()..];
                GOOD.replace("httpGet: {path: /ready}", &format!("udp: {{send: x, {name}: {value}}}"))
            }
            "check" if field.name == "tcpSocket.tls" => {
                GOOD.replace("httpGet: {path: /ready}", &format!("tcpSocket: {{send: x, tls: {value}}}"))
            }
            "check" if field.name.contains('.') => GOOD.replace("httpGet: {path: /ready}", &leaf(&field.name)),
            "check" => GOOD.replace("      check:\n", &format!("      check:\n        {}\n", leaf(&field.name))),
            "breaker" if field.name.starts_with("window.") => {
                let name = &field.name["window.".len()..];
                format!("{GOOD}    breaker: {{window: {{{}, {name}: {value}}}}}\n", beside(name))
            }
            "breaker" => format!("{GOOD}    breaker: {{{}}}\n", leaf(&field.name)),
            "limits" => {
                let (outer, name) = field.name.rsplit_once('.').unwrap_or(("", &field.name));
                let least = match name {
                    "burst" => "newConnectionsPerSecond: 1000000, ",
                    "newConnectionsPerSecond" | "concurrentConnections" | "perClient" => "",
                    _ => "concurrentConnections: 1, ",
                };
                let limits = format!("{least}{name}: {value}");
                let limits = if outer.is_empty() { limits } else { format!("{outer}: {{{limits}}}") };
                format!("{GOOD}    limits: {{{limits}}}\n")
            }
            _ => match field.name.as_str() {
                "backends[].weight" => {
                    GOOD.replace("10.42.0.3, port: 80", &format!("10.42.0.3, port: 80, weight: {value}"))
                }
                "backends[].port" => GOOD.replace("10.42.0.3, port: 80", &format!("10.42.0.3, port: {value}")),
                "frontends[].port" => GOOD.replace("8080", value),
                name if ["frontends[].protocol", "frontends[].externalTrafficPolicy"].contains(&name) => {
                    GOOD.replace("port: 8080", &format!("port: 8080, {}: {value}", &name["frontends[].".len()..]))
                }
                "primary.minHealthy" => {
                    GOOD.replace("    primary:\n", &format!("    primary:\n      minHealthy: {value}\n"))
                }
                "backups[].minHealthy" => {
                    GOOD.replace("      - backends:", &format!("      - minHealthy: {value}\n        backends:"))
                }
                name => format!("{GOOD}    {name}: {value}\n"),
            },
        }
    }

    /// What the window needs beside one of its fields, to be one that can trip.
    fn beside(name: &str) -> &'static str {
        if name == "minimumVolume" { "lengthMillis: 86400000" } else { "minimumVolume: 1" }
    }

    fn accepts(text: &str) -> bool {
        parse(Path::new("t"), text).is_ok()
    }

    #[test]
    fn every_field_of_the_format_is_documented() {
        let documented: Vec<String> = fields().into_iter().map(|field| field.name).collect();
        let structural = [
            "metrics",
            "services",
            "name",
            "value",
            "window",
            "breaker",
            "primary",
            "check",
            "httpGet",
            "tcpSocket",
            "grpc",
            "dns",
            "udp",
            "agent",
            "limits",
            "backup",
        ];
        for line in FORMAT.lines().filter_map(|line| line.trim().strip_prefix("pub ")) {
            let Some((name, _)) = line.split_once(':') else { continue };
            let mut words = name.trim_end_matches('_').split('_');
            let mut camel = words.next().unwrap().to_owned();
            for word in words {
                camel.push_str(&word[..1].to_uppercase());
                camel.push_str(&word[1..]);
            }
            // The names of these fields do not follow from the Rust name.
            let camel = match camel.as_str() {
                "clientPrefixLength" => "clientPrefixLengthIPv6".to_owned(),
                "record" => "type".to_owned(),
                "externalIps" => "externalIPs".to_owned(),
                _ => camel,
            };
            let found = documented.iter().any(|d| d.rsplit('.').next() == Some(camel.as_str()));
            assert!(found || structural.contains(&camel.as_str()), "{camel} is not in docs/CONFIGURATION.md");
        }
    }

    #[test]
    fn limits_are_the_documented_ones() {
        let mut checked = 0;
        for field in fields() {
            let Some((least, most)) = field.allowed.split_once(" to ") else { continue };
            let (Ok(least), Ok(most)) = (least.parse::<u64>(), most.parse::<u64>()) else { continue };
            for (value, good) in [(least, true), (most, true), (most + 1, false)] {
                assert_eq!(accepts(&with(&field, &value.to_string())), good, "{} = {value}", field.name);
            }
            if least > 0 {
                assert!(!accepts(&with(&field, &(least - 1).to_string())), "{} = {}", field.name, least - 1);
            }
            checked += 1;
        }
        assert!(checked >= 25, "{checked} fields with limits");
    }

    #[test]
    fn words_are_the_documented_ones() {
        let mut checked = 0;
        for field in fields() {
            let words: Vec<&str> =
                field.allowed.split(", ").filter_map(|w| w.strip_prefix('`')?.strip_suffix('`')).collect();
            if words.is_empty() || words.len() != field.allowed.split(", ").count() || words.contains(&"/") {
                continue;
            }
            for word in words {
                assert!(accepts(&with(&field, word)), "{}: {word}", field.name);
            }
            assert!(!accepts(&with(&field, "Nonsense")), "{}", field.name);
            checked += 1;
        }
        assert!(checked >= 9, "{checked} fields with words");
    }

    #[test]
    fn defaults_are_the_documented_ones() {
        let mut checked = 0;
        for field in fields() {
            let Some(default) = field.default.strip_prefix('`').and_then(|d| d.strip_suffix('`')) else { continue };
            if field.name.contains("name") || field.name.ends_with("path") {
                continue;
            }
            // `window` and `limits` are off by default. The defaults of their fields hold in an empty window, or
            // beside one limit.
            let without = if field.name == "backup.onLimit" {
                format!("{GOOD}    limits: {{backup: {{concurrentConnections: 1}}}}\n")
            } else if field.section == "limits" {
                format!("{GOOD}    limits: {{concurrentConnections: 1}}\n")
            } else if field.name.starts_with("window.") {
                let name = &field.name["window.".len()..];
                format!("{GOOD}    breaker: {{window: {{{}}}}}\n", beside(name))
            } else {
                GOOD.into()
            };
            let (with, without) = (with(&field, default), without);
            let load = |text: &str| parse(Path::new("t"), text).unwrap_or_else(|e| panic!("{}: {e:?}", field.name));
            let (a, b) = (load(&with), load(&without));
            assert!(a.services == b.services && a.agent == b.agent, "{} is not {default} by default", field.name);
            checked += 1;
        }
        assert!(checked >= 30, "{checked} fields with defaults");
    }
}
