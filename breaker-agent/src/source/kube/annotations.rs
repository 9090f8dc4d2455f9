//! Annotations `breaker.dev/…` on the protected Service: a short form of a CircuitBreaker's spec.

use std::collections::{BTreeMap, BTreeSet};

use serde_json::{Map, Value, json};

use breaker_api::crd::{CircuitBreakerSpec, MOST_BACKUPS, MOST_PORTS};

/// The common prefix of all annotations of breaker.
pub const PREFIX: &str = "breaker.dev/";

/// How the text of an annotation is converted to the value of a field.
#[derive(Clone, Copy)]
enum Form {
    Text,
    Number,
    /// New connections per second, like `100/s`.
    Rate,
}

/// Annotation (without prefix), the field of the spec that it sets (dots separate the levels), and the form of its
/// text. docs/KUBERNETES.md has the same table.
const FIELDS: &[(&str, &str, Form)] = &[
    ("period-seconds", "check.periodSeconds", Form::Number),
    ("period-millis", "check.periodMillis", Form::Number),
    ("fast-period-millis", "check.fastPeriodMillis", Form::Number),
    ("timeout-seconds", "check.timeoutSeconds", Form::Number),
    ("timeout-millis", "check.timeoutMillis", Form::Number),
    ("failure-threshold", "check.failureThreshold", Form::Number),
    ("success-threshold", "check.successThreshold", Form::Number),
    ("min-healthy", "minHealthy", Form::Number),
    ("open-millis", "breaker.openMillis", Form::Number),
    ("half-open-connections", "breaker.halfOpenConnections", Form::Number),
    ("ramp-millis", "breaker.rampMillis", Form::Number),
    ("topology", "topology", Form::Text),
    ("on-open", "onOpen", Form::Text),
    ("drain-seconds", "drainSeconds", Form::Number),
    ("resets-per-second", "resetsPerSecond", Form::Number),
    ("on-close", "onClose", Form::Text),
    ("on-backup-down", "onBackupDown", Form::Text),
    ("when-all-unhealthy", "whenAllUnhealthy", Form::Text),
    ("on-agent-loss", "onAgentLoss", Form::Text),
    ("fast-path", "fastPath", Form::Text),
    ("limit", "limits.newConnectionsPerSecond", Form::Rate),
    ("limit-burst", "limits.burst", Form::Number),
    ("limit-connections", "limits.concurrentConnections", Form::Number),
    ("limit-per-client", "limits.perClient.newConnectionsPerSecond", Form::Rate),
    ("limit-per-client-connections", "limits.perClient.concurrentConnections", Form::Number),
    ("limit-backup", "limits.backup.newConnectionsPerSecond", Form::Rate),
    ("limit-backup-burst", "limits.backup.burst", Form::Number),
    ("limit-backup-connections", "limits.backup.concurrentConnections", Form::Number),
    ("limit-scope", "limits.scope", Form::Text),
    ("on-limit", "limits.onLimit", Form::Text),
    ("override", "override", Form::Text),
    ("until", "until", Form::Text),
    ("mode", "mode", Form::Text),
];

/// Bytes of an annotation's value, at most.
const MOST_BYTES: usize = 1024;

/// Annotations with a syntax of their own.
const OWN: &[&str] = &["backup", "check", "ports", "override-reason"];

/// The spec that a Service's annotations describe; `None` if the Service has no annotation of breaker.
///
/// # Errors
/// The wrong annotation, its value, and what is allowed. Numbers out of range are found later, by the same validation
/// that configuration files go through.
pub fn spec(service: &str, annotations: &BTreeMap<String, String>) -> Option<Result<CircuitBreakerSpec, String>> {
    let ours: BTreeMap<&str, &str> =
        annotations.iter().filter_map(|(name, value)| Some((name.strip_prefix(PREFIX)?, value.trim()))).collect();
    (!ours.is_empty()).then(|| parse(service, &ours))
}

/// The names of all annotations, without the prefix.
pub fn names() -> impl Iterator<Item = &'static str> {
    OWN.iter().copied().chain(FIELDS.iter().map(|(name, ..)| *name))
}

fn parse(service: &str, ours: &BTreeMap<&str, &str>) -> Result<CircuitBreakerSpec, String> {
    if let Some(unknown) = ours.keys().find(|name| !names().any(|known| known == **name)) {
        let known: Vec<&str> = names().collect();
        let nearest = known.iter().max_by(|a, b| likeness(a, unknown).total_cmp(&likeness(b, unknown)));
        let hint = nearest.filter(|name| likeness(name, unknown) > 0.8).map(|name| format!(" (is {name} meant?)"));
        let hint = hint.unwrap_or_default();
        return Err(format!("annotation {PREFIX}{unknown} is not known{hint}; allowed: {}", known.join(", ")));
    }
    if let Some((name, value)) = ours.iter().find(|(_, value)| value.len() > MOST_BYTES) {
        let length = value.len();
        return Err(format!("annotation {PREFIX}{name} has {length} bytes; allowed: up to {MOST_BYTES}"));
    }
    let backup = ours
        .get("backup")
        .ok_or_else(|| format!("annotation {PREFIX}backup is missing: it names the Service that takes over"))?;
    let backups = backup.split(',').map(|entry| backup_of(entry.trim(), service)).collect::<Result<Vec<_>, _>>()?;
    at_most("backup", backups.len(), MOST_BACKUPS)?;
    let mut seen = BTreeSet::new();
    if let Some(twice) = backups.iter().find(|b| !seen.insert((b["namespace"].as_str(), b["name"].as_str()))) {
        let name = twice["name"].as_str().unwrap_or_default();
        return Err(format!("annotation {PREFIX}backup: {name:?} is there twice; allowed: each Service once"));
    }
    let mut spec = json!({ "service": { "name": service }, "backups": backups });
    if let Some(check) = ours.get("check") {
        spec["check"] = check_of(check)?;
    }
    if let Some(ports) = ours.get("ports") {
        at_most("ports", ports.split(',').count(), MOST_PORTS)?;
        spec["service"]["ports"] = ports.split(',').map(|port| port_of(port.trim())).collect();
    }
    for (name, field, form) in FIELDS {
        let Some(text) = ours.get(name) else { continue };
        let value = match form {
            Form::Text => json!(text),
            Form::Number => {
                let number: i32 = text
                    .parse()
                    .map_err(|_| format!("annotation {PREFIX}{name}: {text:?} is not allowed; allowed: a number"))?;
                json!(number)
            }
            Form::Rate => {
                let number = text.strip_suffix("/s").and_then(|number| number.trim().parse::<i32>().ok());
                let number = number.ok_or_else(|| {
                    format!(
                        "annotation {PREFIX}{name}: {text:?} is not allowed; allowed: new connections a second, like 100/s"
                    )
                })?;
                json!(number)
            }
        };
        if field.starts_with("check.") && !ours.contains_key("check") {
            return Err(format!("annotation {PREFIX}{name} needs {PREFIX}check, which configures the health check"));
        }
        put(&mut spec, field, value);
    }
    serde_json::from_value(spec)
        .map_err(|error| culprit(ours).unwrap_or_else(|| format!("annotations {PREFIX}*: {error}")))
}

fn at_most(name: &str, count: usize, most: usize) -> Result<(), String> {
    if count > most {
        return Err(format!("annotation {PREFIX}{name} has {count} entries; allowed: up to {most}"));
    }
    Ok(())
}

/// How alike two words are, from 0 to 1.
fn likeness(one: &str, other: &str) -> f64 {
    strsim::jaro_winkler(one, other)
}

/// Describes the annotation whose value a spec cannot have. Each is tried alone.
fn culprit(ours: &BTreeMap<&str, &str>) -> Option<String> {
    FIELDS.iter().filter(|(_, _, form)| matches!(form, Form::Text)).find_map(|(name, field, _)| {
        let text = ours.get(name)?;
        let mut spec = json!({ "service": { "name": "a" }, "backups": [{ "name": "b" }] });
        put(&mut spec, field, json!(text));
        let error = serde_json::from_value::<CircuitBreakerSpec>(spec).err()?.to_string();
        let allowed = error.split_once("expected one of ").or_else(|| error.split_once("expected "));
        let allowed = allowed.map_or(error.as_str(), |(_, allowed)| allowed).replace('`', "").replace(" or ", ", ");
        Some(format!("annotation {PREFIX}{name}: {text:?} is not allowed; allowed: {allowed}"))
    })
}

/// A message about a spec, with the names of annotations in place of the fields that they set.
#[must_use]
pub fn in_words_of_annotations(message: &str) -> String {
    // The annotations set the same check for the primary and every backup, so its problems are found several times.
    let mut problems: Vec<&str> = message.split("; spec.").collect();
    problems.retain(|problem| !problem.starts_with("backups["));
    let mut message = problems.join("; spec.");
    for (name, field, _) in FIELDS {
        for path in [format!("spec.primary.{field}: "), format!("spec.{field}: ")] {
            message = message.replace(&path, &format!("annotation {PREFIX}{name}: "));
        }
    }
    message
}

/// Sets a field of the spec, and makes the objects on the path to it.
fn put(spec: &mut Value, field: &str, value: Value) {
    let mut place = spec;
    for part in field.split('.') {
        if !place.is_object() {
            *place = Value::Object(Map::new());
        }
        place = &mut place[part];
    }
    *place = value;
}

/// Parses one backup: `name`, `name:port`, `namespace/name` or `namespace/name:port`.
fn backup_of(text: &str, service: &str) -> Result<Value, String> {
    let refuse = |why: &str| {
        Err(format!("annotation {PREFIX}backup: {text:?} {why}; allowed: [NAMESPACE/]NAME[:PORT], separated by commas"))
    };
    let (rest, port) = text.split_once(':').map_or((text, None), |(rest, port)| (rest, Some(port)));
    let (namespace, name) = rest.split_once('/').map_or((None, rest), |(namespace, name)| (Some(namespace), name));
    let label = |text: &str| {
        !text.is_empty()
            && text.len() <= 63
            && text.bytes().all(|b| b.is_ascii_lowercase() || b.is_ascii_digit() || b == b'-')
    };
    if !label(name) || namespace.is_some_and(|n| !label(n)) || port == Some("") {
        return refuse("is not allowed");
    }
    if namespace.is_none() && name == service {
        return refuse("is the Service itself");
    }
    let mut backup = json!({ "name": name });
    if let Some(namespace) = namespace {
        backup["namespace"] = json!(namespace);
    }
    if let Some(port) = port {
        backup["port"] = port_of(port);
    }
    Ok(backup)
}

/// A port: a number, or else a name.
fn port_of(text: &str) -> Value {
    text.parse::<i32>().map_or_else(|_| json!(text), |number| json!(number))
}

/// Parses a check: `/path`, `:port/path`, `https://:port/path`, `tcp`, `tcp:port`, `grpc` or `grpc:port`.
fn check_of(text: &str) -> Result<Value, String> {
    let refuse = || {
        format!(
            "annotation {PREFIX}check: {text:?} is not allowed; allowed: /PATH, :PORT/PATH, https://:PORT/PATH, tcp, tcp:PORT, grpc, grpc:PORT"
        )
    };
    let with_port = |port: Option<&str>| match port {
        None => Ok(json!({})),
        Some("") => Err(refuse()),
        Some(port) => Ok(json!({ "port": port_of(port) })),
    };
    let (kind, port) = text.split_once(':').map_or((text, None), |(kind, port)| (kind, Some(port)));
    match kind {
        "tcp" => return Ok(json!({ "tcpSocket": with_port(port)? })),
        "grpc" => return Ok(json!({ "grpc": with_port(port)? })),
        _ => {}
    }
    let (scheme, rest) = match text.split_once("://") {
        Some(("http", rest)) => ("HTTP", rest),
        Some(("https", rest)) => ("HTTPS", rest),
        Some(_) => return Err(refuse()),
        None => ("HTTP", text),
    };
    let slash = rest.find('/').ok_or_else(refuse)?;
    let (authority, path) = rest.split_at(slash);
    let port = match authority.strip_prefix(':') {
        Some(port) => Some(port),
        None if authority.is_empty() => None,
        None => return Err(refuse()),
    };
    let mut get = with_port(port)?;
    get["path"] = json!(path);
    get["scheme"] = json!(scheme);
    Ok(json!({ "httpGet": get }))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parse(pairs: &[(&str, &str)]) -> Option<Result<CircuitBreakerSpec, String>> {
        let map = pairs.iter().map(|(name, value)| ((*name).to_owned(), (*value).to_owned())).collect();
        spec("dummy", &map)
    }

    #[test]
    fn a_service_without_ours_asks_for_nothing() {
        assert!(parse(&[("kubectl.kubernetes.io/last-applied-configuration", "{}")]).is_none());
    }

    #[test]
    fn annotations_say_what_a_spec_would() {
        let spec = parse(&[
            ("breaker.dev/backup", "backup-deployment, other/spare:http"),
            ("breaker.dev/check", ":8081/ready"),
            ("breaker.dev/period-millis", "100"),
            ("breaker.dev/failure-threshold", "3"),
            ("breaker.dev/on-open", "Keep"),
            ("breaker.dev/ports", "8080,web"),
            ("breaker.dev/limit", "100/s"),
            ("breaker.dev/limit-backup", "50/s"),
        ]);
        let expected: CircuitBreakerSpec = serde_json::from_value(json!({
            "service": {"name": "dummy", "ports": [8080, "web"]},
            "backups": [{"name": "backup-deployment"}, {"name": "spare", "namespace": "other", "port": "http"}],
            "check": {"httpGet": {"path": "/ready", "port": 8081}, "periodMillis": 100, "failureThreshold": 3},
            "onOpen": "Keep",
            "limits": {"newConnectionsPerSecond": 100, "backup": {"newConnectionsPerSecond": 50}},
        }))
        .unwrap();
        assert_eq!(spec, Some(Ok(expected)));
    }

    /// HARDENING S5: annotations have the bounds of the CRD.
    #[test]
    fn annotations_have_the_bounds_of_the_crd() {
        let names = |count: usize| (0..count).map(|i| format!("b{i}")).collect::<Vec<_>>().join(",");
        let rows = [
            ("breaker.dev/backup", names(9), "annotation breaker.dev/backup has 9 entries; allowed: up to 8"),
            ("breaker.dev/ports", names(17), "annotation breaker.dev/ports has 17 entries; allowed: up to 16"),
            ("breaker.dev/backup", names(300), "annotation breaker.dev/backup has 1389 bytes; allowed: up to 1024"),
            ("breaker.dev/check", "/".repeat(2000), "annotation breaker.dev/check has 2000 bytes; allowed: up to 1024"),
            (
                "breaker.dev/backup",
                "a,b:1,a:2".into(),
                "annotation breaker.dev/backup: \"a\" is there twice; allowed: each Service once",
            ),
        ];
        for (name, value, expected) in rows {
            let annotations = [("breaker.dev/backup", "spare"), (name, value.as_str())];
            assert_eq!(parse(&annotations), Some(Err(expected.into())), "{name}");
        }
        for (name, value) in [("breaker.dev/backup", names(8)), ("breaker.dev/ports", names(16))] {
            assert!(parse(&[("breaker.dev/backup", "spare"), (name, value.as_str())]).unwrap().is_ok(), "{name}");
        }
    }

    #[test]
    fn every_check_has_a_short_form() {
        let rows = [
            ("/ready", json!({"httpGet": {"path": "/ready", "scheme": "HTTP"}})),
            ("https://:8443/x", json!({"httpGet": {"path": "/x", "scheme": "HTTPS", "port": 8443}})),
            ("tcp", json!({"tcpSocket": {}})),
            ("tcp:redis", json!({"tcpSocket": {"port": "redis"}})),
            ("grpc:9000", json!({"grpc": {"port": 9000}})),
        ];
        for (text, expected) in rows {
            assert_eq!(check_of(text), Ok(expected), "{text}");
        }
    }

    #[test]
    fn what_is_wrong_is_named() {
        let rows: &[(&[(&str, &str)], &str)] = &[
            (&[("breaker.dev/check", "/ready")], "breaker.dev/backup is missing"),
            (&[("breaker.dev/backup", "dummy")], "\"dummy\" is the Service itself"),
            (&[("breaker.dev/backup", "Bad_Name")], "\"Bad_Name\" is not allowed"),
            (
                &[("breaker.dev/backup", "b"), ("breaker.dev/chekc", "/")],
                "breaker.dev/chekc is not known (is check meant?); allowed: backup",
            ),
            (
                &[("breaker.dev/backup", "b"), ("breaker.dev/check", "ready")],
                "\"ready\" is not allowed; allowed: /PATH",
            ),
            (
                &[("breaker.dev/backup", "b"), ("breaker.dev/period-millis", "fast")],
                "\"fast\" is not allowed; allowed: a number",
            ),
            (&[("breaker.dev/backup", "b"), ("breaker.dev/period-millis", "100")], "needs breaker.dev/check"),
            (
                &[("breaker.dev/backup", "b"), ("breaker.dev/mode", "Try")],
                "annotation breaker.dev/mode: \"Try\" is not allowed; allowed: Enforce, DryRun",
            ),
            (
                &[("breaker.dev/backup", "b"), ("breaker.dev/topology", "near")],
                "annotation breaker.dev/topology: \"near\" is not allowed; allowed: ",
            ),
            (
                &[("breaker.dev/backup", "b"), ("breaker.dev/until", "soon")],
                "annotation breaker.dev/until: \"soon\" is",
            ),
            (
                &[("breaker.dev/backup", "b"), ("breaker.dev/limit", "100")],
                "\"100\" is not allowed; allowed: new connections a second, like 100/s",
            ),
        ];
        for (pairs, expected) in rows {
            let error = parse(pairs).unwrap().unwrap_err();
            assert!(error.contains(expected), "{error}");
        }
    }

    #[test]
    fn a_number_out_of_range_is_named_by_its_annotation() {
        let message = "spec.primary.check.periodMillis: 5 is not allowed; allowed: 10 to 86400000; \
             spec.backups[0].check.periodMillis: 5 is not allowed; allowed: 10 to 86400000; spec.breaker.rampMillis: x";
        assert_eq!(
            in_words_of_annotations(message),
            "annotation breaker.dev/period-millis: 5 is not allowed; allowed: 10 to 86400000; annotation \
             breaker.dev/ramp-millis: x"
        );
    }

    #[test]
    fn the_documents_name_every_annotation() {
        let path = concat!(env!("CARGO_MANIFEST_DIR"), "/../docs/KUBERNETES.md");
        let text = std::fs::read_to_string(path).unwrap();
        for name in names() {
            assert!(text.contains(&format!("`breaker.dev/{name}`")), "annotation {name} is not in docs/KUBERNETES.md");
        }
    }
}
