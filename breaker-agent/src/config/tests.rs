use super::*;
use crate::model::{CheckAction, EstablishedPolicy};

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
    let CheckAction::HttpGet { expected_statuses, .. } = &check.action else { panic!("{check:?}") };
    assert_eq!(expected_statuses, &[200..=399]);
    assert_eq!(service.breaker.half_open_connections, 0);
    assert_eq!((service.on_open, service.on_close), (EstablishedPolicy::Reset, EstablishedPolicy::Keep));
}

/// Every row: what is written instead of what, and what the message must say.
#[test]
fn bad_input_is_refused_with_file_line_field_value_and_what_is_allowed() {
    let rows: &[(&str, &str, &str)] = &[
        ("port: 8080", "port: 0", "lab.yaml:4: services[0].frontends[0].port: 0 is not allowed; allowed: 1 to 65535"),
        ("port: 8080", "port: 65536", "lab.yaml:4: services[0].frontends[0].port: 65536 is not allowed"),
        ("10.43.0.10", "vip", "lab.yaml:4: services[0].frontends[0].address: \"vip\" is no IP address; allowed"),
        ("10.43.0.10", "'fd43::1'", "lab.yaml:4: services[0].frontends[0].address: \"fd43::1\" is IPv6"),
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
            "    onOpen: Drain\n    primary:\n",
            "lab.yaml:5: services[0].onOpen: \"Drain\" is not allowed; allowed: Keep, Reset",
        ),
        (
            "{path: /ready}",
            "{path: /ready, expectedStatuses: '200-'}",
            "services[0].primary.check.httpGet.expectedStatuses: \"200-\" is not allowed; allowed: statuses",
        ),
        ("services:\n", "agent: {pinPath: pins}\nservices:\n", "agent.pinPath: \"pins\" is not allowed; allowed: an abs"),
    ];
    for (from, to, expected) in rows {
        let text = GOOD.replacen(from, to, 1);
        assert_ne!(text, GOOD, "{from:?} is not in the good file");
        let errors = errors(&text);
        assert!(errors.iter().any(|e| e.contains(expected)), "{to:?} gave {errors:#?}, expected {expected:?}");
    }
}

#[test]
fn an_unknown_field_names_itself_its_line_and_the_known_ones() {
    let errors = errors(&GOOD.replace("httpGet", "httpget"));
    assert_eq!(errors.len(), 1);
    assert!(errors[0].starts_with("lab.yaml:9:"), "{errors:?}");
    assert!(errors[0].contains("httpget") && errors[0].contains("httpGet"), "{errors:?}");
}

#[test]
fn duplicates_name_both_places() {
    let twice = format!("{GOOD}{}", GOOD.trim_start_matches("services:\n"));
    let errors = errors(&twice);
    assert!(errors[0].contains("lab.yaml:13: services[1].name: \"dummy\" is taken by the service in line 2"), "{errors:?}");
    assert!(
        errors[1].contains("services[1].frontends[0]: 10.43.0.10:8080/TCP is a frontend of dummy already (line 4)"),
        "{errors:?}"
    );
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
