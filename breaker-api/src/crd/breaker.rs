//! The `CircuitBreaker` resource: what a user asks for.

use std::borrow::Cow;

use jiff::Timestamp;
use kube::{CustomResource, KubeSchema};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use super::{
    Check, CircuitBreakerStatus, Limits, MOST_BACKUPS, MOST_PORTS, OVERRIDE_ANNOTATION, Port, UNTIL_ANNOTATION,
    date_time,
};

/// The protected Service, its backups, and how the breaker decides between them.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, CustomResource, KubeSchema)]
#[kube(
    group = "breaker.dev",
    version = "v1alpha1",
    kind = "CircuitBreaker",
    namespaced,
    shortname = "cb",
    category = "breaker",
    status = "CircuitBreakerStatus",
    derive = "PartialEq",
    doc = "Keeps a Service available when its pods fail. On every node, an agent checks the pods. While they fail, \
           eBPF programs in the kernel redirect new connections to a backup; there is no proxy in the path.",
    printcolumn = r#"{"name":"Service","type":"string","jsonPath":".spec.service.name","description":"The Service that is protected."}"#,
    printcolumn = r#"{"name":"State","type":"string","jsonPath":".status.state","description":"Closed: traffic flows to the primary. Open: to the backup. HalfOpen: a few connections try the primary. The most open state of all nodes. NotProtected: the request is refused."}"#,
    printcolumn = r#"{"name":"Since","type":"date","jsonPath":".status.since","description":"How long it has been in this state."}"#,
    printcolumn = r#"{"name":"Reason","type":"string","jsonPath":".status.reason","description":"Why it is in this state."}"#,
    printcolumn = r#"{"name":"Backup","type":"string","jsonPath":".status.backup",
        "description":"The backup that takes over, and how many of its pods are Up."}"#,
    printcolumn = r#"{"name":"Share","type":"string","jsonPath":".status.share","description":"The primary's share of new connections, over all nodes."}"#,
    printcolumn = r#"{"name":"Limited","type":"string","jsonPath":".status.limited",
        "description":"New connections per minute over a limit, and the limit that is exceeded most often."}"#,
    printcolumn = r#"{"name":"Age","type":"date","jsonPath":".metadata.creationTimestamp"}"#,
    printcolumn = r#"{"name":"Open","type":"string","jsonPath":".status.open",
        "description":"Number of nodes where it is open, of the nodes that report.","priority":1}"#,
    printcolumn = r#"{"name":"Override","type":"string","jsonPath":".spec.override",
        "description":"The operator's override: Auto, ForceOpen or ForceClosed.","priority":1}"#,
    printcolumn = r#"{"name":"Mode","type":"string","jsonPath":".spec.mode",
        "description":"Enforce: decisions are carried out. DryRun: they are only shown and counted.","priority":1}"#,
    printcolumn = r#"{"name":"Message","type":"string","jsonPath":".status.message",
        "description":"Details of the reason.","priority":1}"#
)]
#[serde(rename_all = "camelCase")]
#[x_kube(
    validation = Rule::new("self.backups.all(b, has(b.__namespace__) || b.name != self.service.name)")
        .message("a Service cannot be its own backup").field_path(".backups"),
    validation = Rule::new("self.backups.all(b, self.backups.exists_one(o, o.name == b.name && (has(o.__namespace__) ? o.__namespace__ : '') == (has(b.__namespace__) ? b.__namespace__ : '')))")
        .message("a Service can be listed as a backup once only").field_path(".backups"),
    validation = Rule::new("!has(self.until) || self.override != 'Auto'")
        .message("until says when an override ends: it needs override ForceOpen or ForceClosed; without an override, remove until").field_path(".until"),
    validation = Rule::new("has(self.drainSeconds) == (self.onOpen == 'Drain' || self.onClose == 'Drain' || has(self.onBackupDown) && self.onBackupDown == 'Drain')")
        .message("drainSeconds (1 to 86400) is needed where onOpen, onClose or onBackupDown is Drain, and has no effect otherwise").field_path(".drainSeconds"),
    validation = Rule::new("self.probeFrom == 'EveryNode'")
        .message("Elected is not built yet; allowed: EveryNode").field_path(".probeFrom"),
    validation = Rule::new("!has(self.minHealthy) || has(self.check)")
        .message("minHealthy counts pods that pass a check: it needs check").field_path(".minHealthy"),
)]
pub struct CircuitBreakerSpec {
    /// The Service to protect, in the namespace of the CircuitBreaker.
    pub service: ServiceRef,
    /// The Services that take over, in order of preference.
    #[schemars(length(min = 1, max = MOST_BACKUPS))]
    pub backups: Vec<Backup>,
    /// How the pods of the primary and of the backups are checked: exactly one of httpGet, tcpSocket, grpc, dns and udp.
    /// The first three have the fields of a container's probe. Without a check, the breaker opens only when no endpoint
    /// of the primary is ready.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub check: Option<Check>,
    /// Number of the primary's pods that must be Up for the primary to be Up; 1 if not given. A number larger than
    /// the number of pods means all pods.
    #[schemars(range(min = 1, max = 10_000))]
    #[serde(skip_serializing_if = "Option::is_none")]
    pub min_healthy: Option<i32>,
    /// How the breaker changes its state. The defaults correspond to health checks of NGINX Plus: open at the first
    /// failed check, closed at the first passed check.
    #[serde(default)]
    pub breaker: Breaker,
    /// Which pods of the backup are preferred. Any: no preference. PreferSameNode: pods on the node where the
    /// connection starts or enters the cluster, then pods in its zone, then all others. PreferSameZone: pods in that
    /// node's zone, then all others.
    #[serde(default)]
    pub topology: Topology,
    /// What happens to established connections to the primary when the breaker opens. Reset: both ends get a TCP
    /// reset at once, if a backup is usable. Keep: the connections continue. Drain: they continue for drainSeconds, and those
    /// that have not ended by then are reset.
    #[serde(default = "reset")]
    pub on_open: EstablishedPolicy,
    /// How long established connections may go on where a policy is Drain. Needed there, and not allowed otherwise.
    #[schemars(range(min = 1, max = 86_400))]
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub drain_seconds: Option<i32>,
    /// With onOpen: how many clients that send nothing each node reaches in a second, after the first 200. Clients that send
    /// are reset with their next segment.
    #[schemars(range(min = 1, max = 100_000))]
    #[serde(default = "thousand")]
    pub resets_per_second: i32,
    /// What happens to established connections to the backup when the breaker closes. Keep: the connections continue
    /// until they end. Reset: both ends get a TCP reset at the next packet. Drain: after drainSeconds.
    #[serde(default = "keep")]
    pub on_close: EstablishedPolicy,
    /// What happens to established connections to a pod of a backup that is Down, while the breaker is open and another
    /// pod of a backup is usable. Keep: the connections continue. Reset: both ends get a TCP reset at the next packet.
    /// Drain: after drainSeconds. Without this field: as onOpen.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub on_backup_down: Option<EstablishedPolicy>,
    /// What happens to new connections while the breaker is open and no backup is usable. PassThrough: they go to the
    /// primary, healthy or not. Reject: they are refused at once (TCP reset; UDP: ICMP port unreachable).
    #[serde(default)]
    pub when_all_unhealthy: WhenAllUnhealthy,
    /// What the kernel programs do on a node whose agent has sent no heartbeat for longer than its lease.
    /// PassThrough: new connections go to the primary. Hold: the last decision stays in force.
    #[serde(default)]
    pub on_agent_loss: OnAgentLoss,
    /// How connections reach a backup pod on the node where they start or enter the cluster. Off: through the host
    /// network stack, like all others. PeerRedirect: directly into the pod's network namespace. That is faster, but
    /// bypasses netfilter and the NetworkPolicies that netfilter enforces.
    #[serde(default)]
    pub fast_path: FastPath,
    /// Limits on new connections per second and on concurrent connections, to the primary and to the backup, for all
    /// clients together and for each client. Without it, nothing is limited.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub limits: Option<Limits>,
    /// The operator's override, which takes precedence over the checks. Auto: no override, the checks decide.
    /// ForceOpen: traffic goes to the backup. ForceClosed: traffic goes to the primary.
    #[serde(default)]
    pub r#override: Override,
    /// When the override ends. Without it, the override holds until it is changed.
    #[schemars(schema_with = "date_time")]
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub until: Option<Timestamp>,
    /// Enforce: decisions are carried out. DryRun: decisions are only counted and shown, and no connection is moved.
    #[serde(default)]
    pub mode: Mode,
    /// Which nodes check the pods. EveryNode: each node checks for itself. Elected (a few nodes check for all) is
    /// refused, because it is not built yet.
    #[serde(default)]
    pub probe_from: ProbeFrom,
}

impl CircuitBreaker {
    /// The spec, with the override of the annotations [`OVERRIDE_ANNOTATION`] and [`UNTIL_ANNOTATION`] instead of its
    /// own, until that ends. With these annotations an operator can force a breaker whose manifest has an override:
    /// tools that apply manifests leave annotations alone that they did not write.
    ///
    /// # Errors
    /// The wrong annotation, its value and what is allowed.
    pub fn spec_in_force(&self, now: Timestamp) -> Result<Cow<'_, CircuitBreakerSpec>, String> {
        let annotations = self.metadata.annotations.as_ref();
        let text = |name: &str| annotations.and_then(|all| all.get(name)).map(|text| text.trim());
        let until = match text(UNTIL_ANNOTATION) {
            None => None,
            Some(text) => Some(text.parse::<Timestamp>().map_err(|_| {
                format!(
                    "annotation {UNTIL_ANNOTATION}: {text:?} is not allowed; allowed: a time like 2026-11-29T18:00:00Z"
                )
            })?),
        };
        let forced = match text(OVERRIDE_ANNOTATION) {
            None if until.is_some() => {
                return Err(format!("annotation {UNTIL_ANNOTATION} needs {OVERRIDE_ANNOTATION}"));
            }
            None => return Ok(Cow::Borrowed(&self.spec)),
            Some(text) => {
                let all = [Override::Auto, Override::ForceOpen, Override::ForceClosed];
                all.into_iter().find(|forced| forced.label() == text).ok_or_else(|| {
                    let allowed = all.map(Override::label).join(", ");
                    format!("annotation {OVERRIDE_ANNOTATION}: {text:?} is not allowed; allowed: {allowed}")
                })?
            }
        };
        if forced == Override::Auto && until.is_some() {
            return Err(format!("annotation {UNTIL_ANNOTATION} needs {OVERRIDE_ANNOTATION} ForceOpen or ForceClosed"));
        }
        if until.is_some_and(|until| until <= now) {
            return Ok(Cow::Borrowed(&self.spec));
        }
        Ok(Cow::Owned(CircuitBreakerSpec { r#override: forced, until, ..self.spec.clone() }))
    }
}

/// A Service in the namespace of the CircuitBreaker.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct ServiceRef {
    /// Name of the Service.
    #[schemars(length(min = 1, max = 63))]
    pub name: String,
    /// Ports of the Service to protect, by name or number; all TCP and UDP ports if not given. All of them have one
    /// state and change it together.
    #[schemars(length(min = 1, max = MOST_PORTS))]
    #[serde(skip_serializing_if = "Option::is_none")]
    pub ports: Option<Vec<Port>>,
}

/// A backup: a Service that takes over when the primary fails.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, KubeSchema)]
#[serde(rename_all = "camelCase")]
pub struct Backup {
    /// Name of the Service.
    #[schemars(length(min = 1, max = 63))]
    pub name: String,
    /// Namespace of the Service, if it differs from the CircuitBreaker's. A ReferenceGrant in that namespace must
    /// allow the reference.
    #[schemars(length(min = 1, max = 63))]
    #[serde(skip_serializing_if = "Option::is_none")]
    pub namespace: Option<String>,
    /// Port of the Service, by name or number. If not given: the port with the same name as the protected port, else
    /// the port with the same number, else the only port.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub port: Option<Port>,
    /// Backups with a lower number are preferred; the position in the list, from 0, if not given. Backups of the same
    /// priority share new connections by weight.
    #[schemars(range(min = 0, max = 127))]
    #[serde(skip_serializing_if = "Option::is_none")]
    pub priority: Option<i32>,
    /// The backup's share of new connections, relative to the other backups of the same priority. The number of its
    /// pods does not matter. 1 if not given.
    #[schemars(range(min = 1, max = 100))]
    #[serde(default = "one")]
    pub weight: i32,
    /// How the backup's pods are checked; like the primary's if not given. Backups of the same priority must have the
    /// same check.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub check: Option<Check>,
}

/// How the breaker changes its state.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, KubeSchema)]
#[serde(rename_all = "camelCase")]
#[x_kube(
    validation = Rule::new("!has(self.openMillis) || self.maxOpenMillis >= self.openMillis")
        .message("maxOpenMillis must be at least openMillis").field_path(".maxOpenMillis"),
    validation = Rule::new("!has(self.window) || !has(self.openMillis) || self.openMillis >= 1")
        .message("with a window, openMillis must be at least 1: otherwise a trip by failure rate would end at once")
        .field_path(".openMillis"),
)]
pub struct Breaker {
    /// Shortest time in Open after the first trip, in milliseconds. It is multiplied by the number of consecutive
    /// trips. The default is 0 or, with a window, the length of the window.
    #[schemars(range(min = 0, max = 86_400_000))]
    #[serde(skip_serializing_if = "Option::is_none")]
    pub open_millis: Option<i32>,
    /// Upper bound of that shortest time in Open, however many consecutive trips there are, in milliseconds.
    #[schemars(range(min = 0, max = 86_400_000))]
    #[serde(default = "five_minutes")]
    pub max_open_millis: i32,
    /// Random variation of the shortest time in Open, in percent: it is up to this much shorter or longer.
    #[schemars(range(min = 0, max = 50))]
    #[serde(default)]
    pub jitter_percent: i32,
    /// Time in Closed, in milliseconds, after which the number of consecutive trips is reduced by one. 0: it returns
    /// to zero as soon as the breaker closes.
    #[schemars(range(min = 0, max = 86_400_000))]
    #[serde(default = "minute")]
    pub decay_millis: i32,
    /// Number of connections that may try the primary in HalfOpen, on each node. 0: there is no HalfOpen, and Open
    /// changes directly to Closed.
    #[schemars(range(min = 0, max = 1_000_000))]
    #[serde(default)]
    pub half_open_connections: i32,
    /// Longest time in HalfOpen, in milliseconds. Then the breaker closes, if no check has failed.
    #[schemars(range(min = 10, max = 86_400_000))]
    #[serde(default = "half_minute")]
    pub half_open_timeout_millis: i32,
    /// Number of passes of the primary's check that close a half-open breaker earlier.
    #[schemars(range(min = 1, max = 1000))]
    #[serde(default = "three")]
    pub half_open_passes: i32,
    /// Time over which the primary's share of new connections grows after the breaker closed, in milliseconds. 0: the
    /// primary gets all new connections at once.
    #[schemars(range(min = 0, max = 86_400_000))]
    #[serde(default)]
    pub ramp_millis: i32,
    /// The primary's share of new connections at the start of the ramp, in permille.
    #[schemars(range(min = 0, max = 1000))]
    #[serde(default = "hundred")]
    pub ramp_start_permille: i32,
    /// With a window, the breaker also trips when the rate of failed checks in the window is too high.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub window: Option<Window>,
}

impl Default for Breaker {
    fn default() -> Self {
        Self {
            open_millis: None,
            max_open_millis: five_minutes(),
            jitter_percent: 0,
            decay_millis: minute(),
            half_open_connections: 0,
            half_open_timeout_millis: half_minute(),
            half_open_passes: three(),
            ramp_millis: 0,
            ramp_start_permille: hundred(),
            window: None,
        }
    }
}

/// A sliding window over the results of the primary's checks.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct Window {
    /// Length of the window, in milliseconds.
    #[schemars(range(min = 100, max = 86_400_000))]
    #[serde(default = "ten_seconds")]
    pub length_millis: i32,
    /// Number of results that the window must hold before the failure rate can trip the breaker.
    #[schemars(range(min = 1, max = 10_000))]
    #[serde(default = "twenty")]
    pub minimum_volume: i32,
    /// Rate of failures among the results, in percent, from which the breaker trips.
    #[schemars(range(min = 1, max = 100))]
    #[serde(default = "fifty")]
    pub failure_rate_percent: i32,
}

words!(
    /// Which pods of the backup are preferred.
    Topology { #[default] Any, PreferSameNode, PreferSameZone }
);
words!(
    /// What happens to established connections.
    EstablishedPolicy { #[default] Keep, Reset, Drain }
);
words!(
    /// What happens to new connections when no backup is usable.
    WhenAllUnhealthy { #[default] PassThrough, Reject }
);
words!(
    /// What the kernel programs do when the agent's lease has run out.
    OnAgentLoss { #[default] PassThrough, Hold }
);
words!(
    /// How connections reach a backup pod on the same node.
    FastPath { #[default] Off, PeerRedirect }
);
words!(
    /// The operator's override.
    Override { #[default] Auto, ForceOpen, ForceClosed }
);
words!(
    /// Whether decisions are carried out.
    Mode { #[default] Enforce, DryRun }
);
words!(
    /// Which nodes check the pods.
    ProbeFrom { #[default] EveryNode, Elected }
);

const fn reset() -> EstablishedPolicy {
    EstablishedPolicy::Reset
}
const fn thousand() -> i32 {
    1000
}
const fn keep() -> EstablishedPolicy {
    EstablishedPolicy::Keep
}
const fn one() -> i32 {
    1
}
const fn three() -> i32 {
    3
}
const fn twenty() -> i32 {
    20
}
const fn fifty() -> i32 {
    50
}
const fn hundred() -> i32 {
    100
}
const fn ten_seconds() -> i32 {
    10_000
}
const fn half_minute() -> i32 {
    30_000
}
const fn minute() -> i32 {
    60_000
}
const fn five_minutes() -> i32 {
    300_000
}

#[cfg(test)]
mod tests {
    use serde_json::{Value, json};

    use super::*;

    fn breaker(annotations: &Value) -> CircuitBreaker {
        let spec = json!({
            "service": { "name": "web" }, "backups": [{ "name": "spare" }],
            "override": "ForceClosed", "until": "2026-11-29T20:00:00Z",
        });
        let metadata = json!({ "name": "web", "annotations": annotations });
        let object = json!({
            "apiVersion": "breaker.dev/v1alpha1", "kind": "CircuitBreaker", "metadata": metadata, "spec": spec,
        });
        serde_json::from_value(object).unwrap()
    }

    #[test]
    fn annotations_override_the_spec_until_they_end() {
        let at = |text: &str| text.parse::<Timestamp>().unwrap();
        let (now, until, of_spec) = (at("2026-11-29T18:00:00Z"), "2026-11-29T18:00:01Z", at("2026-11-29T20:00:00Z"));
        let cases = [
            (json!({}), (Override::ForceClosed, Some(of_spec))),
            (json!({ OVERRIDE_ANNOTATION: "ForceOpen" }), (Override::ForceOpen, None)),
            (json!({ OVERRIDE_ANNOTATION: "Auto" }), (Override::Auto, None)),
            (
                json!({ OVERRIDE_ANNOTATION: " ForceOpen ", UNTIL_ANNOTATION: until }),
                (Override::ForceOpen, Some(at(until))),
            ),
            (
                json!({ OVERRIDE_ANNOTATION: "ForceOpen", UNTIL_ANNOTATION: now.to_string() }),
                (Override::ForceClosed, Some(of_spec)),
            ),
        ];
        for (annotations, expected) in cases {
            let breaker = breaker(&annotations);
            let spec = breaker.spec_in_force(now).unwrap();
            assert_eq!((spec.r#override, spec.until), expected, "{annotations}");
        }
    }

    #[test]
    fn wrong_annotations_are_named() {
        let cases = [
            (json!({ OVERRIDE_ANNOTATION: "open" }), "\"open\" is not allowed; allowed: Auto, ForceOpen, ForceClosed"),
            (
                json!({ OVERRIDE_ANNOTATION: "ForceOpen", UNTIL_ANNOTATION: "18:00" }),
                "\"18:00\" is not allowed; allowed: a time",
            ),
            (json!({ UNTIL_ANNOTATION: "2026-11-29T20:00:00Z" }), "until needs breaker.dev/override"),
            (
                json!({ OVERRIDE_ANNOTATION: "Auto", UNTIL_ANNOTATION: "2026-11-29T20:00:00Z" }),
                "override ForceOpen or ForceClosed",
            ),
        ];
        for (annotations, expected) in cases {
            let error = breaker(&annotations).spec_in_force(Timestamp::UNIX_EPOCH).unwrap_err();
            assert!(error.contains(expected), "{annotations}: {error}");
        }
    }
}
