//! Finds NetworkPolicies that keep the primary's clients from a backup. A NetworkPolicy is applied to the translated
//! destination. So a redirected connection must be allowed to its new destination, even if it was allowed to the
//! primary.
//!
//! The agent knows pods by the labels that their Service selects, and namespaces by their names. It does not know the
//! clients. So this module compares policies: every client that may reach the primary must be able to reach the
//! backup. If a rule cannot be decided, the connection counts as allowed, because a false warning is worse than none.

use std::{
    collections::{BTreeMap, HashMap},
    net::SocketAddr,
    sync::Arc,
};

use ipnet::IpNet;
use k8s_openapi::{
    api::networking::v1::{NetworkPolicy, NetworkPolicyPeer, NetworkPolicyPort, NetworkPolicySpec},
    apimachinery::pkg::{apis::meta::v1::LabelSelector, util::intstr::IntOrString},
};
use kube::ResourceExt as _;

/// All policies, by namespace.
pub type ByNamespace = HashMap<String, Vec<Arc<NetworkPolicy>>>;

/// Groups policies by namespace.
#[must_use]
pub fn by_namespace(policies: Vec<Arc<NetworkPolicy>>) -> ByNamespace {
    let mut sorted = ByNamespace::new();
    for policy in policies {
        sorted.entry(policy.namespace().unwrap_or_default()).or_default().push(policy);
    }
    sorted
}

/// The pods of a Service, for one protocol.
#[derive(Clone, Copy, Debug)]
pub struct Pods<'a> {
    /// Name of the Service, for messages.
    pub name: &'a str,
    /// Its namespace.
    pub namespace: &'a str,
    /// The labels that all its pods have: the Service's selector.
    pub labels: &'a BTreeMap<String, String>,
    /// `TCP` or `UDP`.
    pub protocol: &'a str,
    /// Addresses and ports of the pods.
    pub addresses: &'a [SocketAddr],
}

/// Answer to a question about pods that are known only in part.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
enum Known {
    No,
    Maybe,
    Yes,
}

impl Known {
    const fn from(holds: bool) -> Self {
        if holds { Self::Yes } else { Self::No }
    }
}

/// Names the policies that keep the primary's clients from the backup, as a message; `None` if no such policy is
/// known.
#[must_use]
pub fn obstacle(policies: &ByNamespace, primary: &Pods<'_>, backup: &Pods<'_>) -> Option<String> {
    ingress(policies, primary, backup).or_else(|| egress(policies, primary, backup))
}

/// Checks the ingress policies of the backup's pods: they must admit everybody whom the primary's policies admit.
fn ingress(policies: &ByNamespace, primary: &Pods<'_>, backup: &Pods<'_>) -> Option<String> {
    let guards = guards(policies, backup);
    if guards.is_empty() {
        return None;
    }
    let admitted = admitted(&guards, backup);
    if admitted.iter().any(|peer| peer.is_none_or(is_everybody)) {
        return None;
    }
    let names: Vec<String> = guards.iter().map(|policy| full_name(policy)).collect();
    let (names, to) = (names.join(", "), format!("{}'s pods", backup.name));
    let primary_guards = self::guards(policies, primary);
    let wanted = self::admitted(&primary_guards, primary);
    if primary_guards.is_empty() || wanted.iter().any(|peer| peer.is_none_or(is_everybody)) {
        return Some(format!("NetworkPolicy {names} admits to {to} only some clients, but the primary admits all"));
    }
    // A peer without a namespaceSelector selects pods of the policy's own namespace.
    let own = |peer: &NetworkPolicyPeer| peer.ip_block.is_none() && peer.namespace_selector.is_none();
    let same_namespace = primary.namespace == backup.namespace;
    let lets_in =
        |peer: &Option<&NetworkPolicyPeer>| admitted.contains(peer) && (same_namespace || !peer.is_some_and(own));
    (!wanted.iter().all(lets_in))
        .then(|| format!("NetworkPolicy {names} does not admit to {to} every client that the primary admits"))
}

/// Checks the egress policies of clients: pods that may connect to the primary must be able to connect to the backup.
fn egress(policies: &ByNamespace, primary: &Pods<'_>, backup: &Pods<'_>) -> Option<String> {
    for (namespace, policies) in policies {
        let ways_out: Vec<(&Arc<NetworkPolicy>, &NetworkPolicySpec)> = policies
            .iter()
            .filter_map(|policy| Some((policy, policy.spec.as_ref()?)))
            .filter(|(_, spec)| is_of_type(spec, "Egress"))
            .collect();
        let lets_out = |spec: &NetworkPolicySpec, pods: &Pods<'_>| {
            let rules = spec.egress.iter().flatten();
            let rule = rules.map(|rule| {
                let to = rule.to.iter().flatten().map(|peer| is_peer(peer, namespace, pods)).max();
                to.unwrap_or(Known::Yes).min(is_port(rule.ports.as_deref(), pods))
            });
            rule.max().unwrap_or(Known::No)
        };
        for (policy, spec) in &ways_out {
            if lets_out(spec, primary) != Known::Yes {
                continue;
            }
            // Policies are additive: another policy that selects all of these pods may allow the backup.
            let others = ways_out.iter().filter(|(_, other)| is_wider(selector(other), selector(spec)));
            if others.map(|(_, other)| lets_out(other, backup)).max() == Some(Known::No) {
                return Some(format!(
                    "NetworkPolicy {} allows its pods to connect to the primary, but not to {}'s pods",
                    full_name(policy),
                    backup.name
                ));
            }
        }
    }
    None
}

fn full_name(policy: &NetworkPolicy) -> String {
    format!("{}/{}", policy.namespace().unwrap_or_default(), policy.name_any())
}

/// The ingress policies that certainly select the pods.
fn guards<'a>(policies: &'a ByNamespace, pods: &Pods<'_>) -> Vec<&'a Arc<NetworkPolicy>> {
    let of_namespace = policies.get(pods.namespace).into_iter().flatten();
    let holds = |policy: &&Arc<NetworkPolicy>| {
        policy
            .spec
            .as_ref()
            .is_some_and(|spec| is_of_type(spec, "Ingress") && selects(selector(spec), pods.labels) == Known::Yes)
    };
    of_namespace.filter(holds).collect()
}

/// The peers that policies admit to the pods' port; `None` stands for everybody.
fn admitted<'a>(guards: &[&'a Arc<NetworkPolicy>], pods: &Pods<'_>) -> Vec<Option<&'a NetworkPolicyPeer>> {
    let rules = guards.iter().filter_map(|policy| policy.spec.as_ref()?.ingress.as_ref()).flatten();
    rules
        .filter(|rule| is_port(rule.ports.as_deref(), pods) != Known::No)
        .flat_map(|rule| match rule.from.as_deref() {
            None | Some([]) => vec![None],
            Some(peers) => peers.iter().map(Some).collect(),
        })
        .collect()
}

/// Whether a policy is of a type. Without `policyTypes`, the API's default applies (NetworkPolicySpec.policyTypes).
fn is_of_type(spec: &NetworkPolicySpec, wanted: &str) -> bool {
    match spec.policy_types.as_deref() {
        None | Some([]) => wanted == "Ingress" || spec.egress.is_some(),
        Some(types) => types.iter().any(|type_| type_ == wanted),
    }
}

/// Whether a peer is all pods of all namespaces, or all addresses of an IP family.
fn is_everybody(peer: &NetworkPolicyPeer) -> bool {
    match &peer.ip_block {
        Some(block) => {
            block.cidr.parse::<IpNet>().is_ok_and(|net| net.prefix_len() == 0)
                && block.except.as_ref().is_none_or(Vec::is_empty)
        }
        None => {
            peer.namespace_selector.as_ref().is_some_and(is_empty) && peer.pod_selector.as_ref().is_none_or(is_empty)
        }
    }
}

fn selector(spec: &NetworkPolicySpec) -> Option<&LabelSelector> {
    spec.pod_selector.as_ref()
}

fn is_empty(selector: &LabelSelector) -> bool {
    selector.match_labels.as_ref().is_none_or(BTreeMap::is_empty)
        && selector.match_expressions.as_ref().is_none_or(Vec::is_empty)
}

/// Whether `wide` selects everything that `narrow` selects; false if that cannot be decided.
fn is_wider(wide: Option<&LabelSelector>, narrow: Option<&LabelSelector>) -> bool {
    let Some(wide) = wide else { return true };
    let narrow_labels = narrow.and_then(|narrow| narrow.match_labels.as_ref());
    let labels =
        wide.match_labels.iter().flatten().all(|(key, value)| narrow_labels.and_then(|l| l.get(key)) == Some(value));
    let narrow_expressions = narrow.and_then(|narrow| narrow.match_expressions.as_ref());
    labels
        && wide
            .match_expressions
            .iter()
            .flatten()
            .all(|wanted| narrow_expressions.is_some_and(|expressions| expressions.contains(wanted)))
}

/// Whether a selector selects pods that have at least these labels.
fn selects(selector: Option<&LabelSelector>, labels: &BTreeMap<String, String>) -> Known {
    let Some(selector) = selector else { return Known::Yes };
    let by_label = selector.match_labels.iter().flatten().map(|(key, value)| match labels.get(key) {
        Some(is) => Known::from(is == value),
        None => Known::Maybe,
    });
    let by_expression = selector.match_expressions.iter().flatten().map(|wanted| {
        let Some(is) = labels.get(&wanted.key) else { return Known::Maybe };
        let among = || wanted.values.iter().flatten().any(|value| value == is);
        match wanted.operator.as_str() {
            "In" => Known::from(among()),
            "NotIn" => Known::from(!among()),
            "Exists" => Known::Yes,
            "DoesNotExist" => Known::No,
            _ => Known::Maybe,
        }
    });
    by_label.chain(by_expression).min().unwrap_or(Known::Yes)
}

/// Whether pods match a peer of a policy in `namespace`.
fn is_peer(peer: &NetworkPolicyPeer, namespace: &str, pods: &Pods<'_>) -> Known {
    if let Some(block) = &peer.ip_block {
        let Ok(net) = block.cidr.parse::<IpNet>() else { return Known::Maybe };
        let except: Vec<IpNet> = block.except.iter().flatten().filter_map(|net| net.parse().ok()).collect();
        let inside = |address: &SocketAddr| {
            net.contains(&address.ip()) && !except.iter().any(|except| except.contains(&address.ip()))
        };
        return Known::from(pods.addresses.iter().all(inside));
    }
    let in_namespace = match &peer.namespace_selector {
        None => Known::from(pods.namespace == namespace),
        // The API server sets the name of each namespace as its label.
        Some(selector) => {
            let name = ("kubernetes.io/metadata.name".to_owned(), pods.namespace.to_owned());
            selects(Some(selector), &BTreeMap::from([name]))
        }
    };
    in_namespace.min(selects(peer.pod_selector.as_ref(), pods.labels))
}

/// Whether the ports of a rule include the ports of the pods.
fn is_port(ports: Option<&[NetworkPolicyPort]>, pods: &Pods<'_>) -> Known {
    let ports = match ports {
        None | Some([]) => return Known::Yes,
        Some(ports) => ports.iter().filter(|port| port.protocol.as_deref().unwrap_or("TCP") == pods.protocol),
    };
    let among = |port: &NetworkPolicyPort| match &port.port {
        None => Known::Yes,
        // The name of a container port: its number is not known here.
        Some(IntOrString::String(_)) => Known::Maybe,
        Some(IntOrString::Int(first)) => {
            let range = *first..=port.end_port.unwrap_or(*first);
            Known::from(pods.addresses.iter().all(|address| range.contains(&i32::from(address.port()))))
        }
    };
    ports.map(among).max().unwrap_or(Known::No)
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::{Value, json};

    fn labels(app: &str) -> BTreeMap<String, String> {
        BTreeMap::from([("app".to_owned(), app.to_owned())])
    }

    /// The message about policies between a primary and a backup in namespace `lab`.
    fn said(policies: &[Value]) -> Option<String> {
        let policies = policies.iter().enumerate().map(|(index, spec)| {
            let (namespace, spec) = match spec.get("in") {
                Some(namespace) => (namespace.clone(), spec["spec"].clone()),
                None => (json!("lab"), spec.clone()),
            };
            let metadata = json!({ "namespace": namespace, "name": format!("p{index}") });
            Arc::new(serde_json::from_value(json!({ "metadata": metadata, "spec": spec })).unwrap())
        });
        let (primary, backup) = (labels("dummy"), labels("backup"));
        let pods = |name, labels, addresses| Pods { name, namespace: "lab", labels, protocol: "TCP", addresses };
        let addresses = ["10.42.0.2:80", "10.42.1.3:8080"].map(|text| [text.parse().unwrap()]);
        obstacle(
            &by_namespace(policies.collect()),
            &pods("dummy", &primary, &addresses[0]),
            &pods("backup", &backup, &addresses[1]),
        )
    }

    fn app(name: &str) -> Value {
        json!({ "matchLabels": { "app": name } })
    }

    #[test]
    fn policies_of_the_backup_must_let_in_whom_the_primary_has() {
        let from = |app_: &str, from: &str| json!({ "podSelector": app(app_), "ingress": [{ "from": [{ "podSelector": app(from) }] }] });
        let open = |app_: &str| json!({ "podSelector": app(app_), "ingress": [{}] });
        let rows: Vec<(&str, Vec<Value>, Option<&str>)> = vec![
            ("none", vec![], None),
            ("about others", vec![from("third", "client")], None),
            ("about the primary only", vec![from("dummy", "client")], None),
            ("the same for both", vec![from("dummy", "client"), from("backup", "client")], None),
            ("all may", vec![open("backup")], None),
            (
                "all namespaces may",
                vec![json!({ "podSelector": app("backup"), "ingress": [{ "from": [{ "namespaceSelector": {} }] }] })],
                None,
            ),
            ("some may, all have the primary", vec![from("backup", "client")], Some("lab/p0 admits to")),
            ("others may", vec![from("dummy", "client"), from("backup", "another")], Some("lab/p1 does not admit to")),
            ("denied by default", vec![json!({ "podSelector": {} }), from("dummy", "client")], Some("lab/p0 does not")),
            ("denied by default, and allowed", vec![json!({ "podSelector": {} }), open("backup")], None),
            (
                "on another port",
                vec![json!({ "podSelector": app("backup"), "ingress": [{ "ports": [{ "port": 80 }] }] })],
                Some("lab/p0"),
            ),
            (
                "on its port",
                vec![
                    json!({ "podSelector": app("backup"), "ingress": [{ "ports": [{ "port": 8000, "endPort": 8090 }] }] }),
                ],
                None,
            ),
            (
                "on a port with a name",
                vec![json!({ "podSelector": app("backup"), "ingress": [{ "ports": [{ "port": "http" }] }] })],
                None,
            ),
            ("by other labels, unknown", vec![json!({ "podSelector": { "matchLabels": { "tier": "web" } } })], None),
            ("of another namespace", vec![json!({ "in": "other", "spec": { "podSelector": {} } })], None),
            (
                "egress only",
                vec![json!({ "podSelector": app("backup"), "policyTypes": ["Egress"], "egress": [] })],
                None,
            ),
        ];
        for (why, policies, expected) in rows {
            let is = said(&policies);
            assert_eq!(is.is_some(), expected.is_some(), "{why}: {is:?}");
            assert!(expected.is_none_or(|words| is.as_ref().unwrap().contains(words)), "{why}: {is:?}");
        }
    }

    #[test]
    fn policies_of_clients_must_let_them_out_to_the_backup() {
        let to = |peer: Value| json!({ "podSelector": app("client"), "policyTypes": ["Egress"], "egress": [{ "to": [peer] }] });
        let in_other = |spec: Value| json!({ "in": "other", "spec": spec });
        let namespace = json!({ "matchLabels": { "kubernetes.io/metadata.name": "lab" } });
        let rows: Vec<(&str, Vec<Value>, bool)> = vec![
            ("to the primary", vec![to(json!({ "podSelector": app("dummy") }))], true),
            (
                "to both, by two policies",
                vec![to(json!({ "podSelector": app("dummy") })), to(json!({ "podSelector": app("backup") }))],
                false,
            ),
            ("to neither", vec![to(json!({ "podSelector": app("third") }))], false),
            ("to all of the namespace", vec![to(json!({ "podSelector": {} }))], false),
            (
                "from another namespace",
                vec![in_other(to(json!({ "namespaceSelector": namespace, "podSelector": app("dummy") })))],
                true,
            ),
            ("from another namespace, to its own", vec![in_other(to(json!({ "podSelector": app("dummy") })))], false),
            ("to the primary's addresses", vec![to(json!({ "ipBlock": { "cidr": "10.42.0.0/24" } }))], true),
            ("to all addresses", vec![to(json!({ "ipBlock": { "cidr": "10.42.0.0/16" } }))], false),
            (
                "to all but the backup's",
                vec![to(json!({ "ipBlock": { "cidr": "10.42.0.0/16", "except": ["10.42.1.0/24"] } }))],
                true,
            ),
            (
                "to the primary's port",
                vec![json!({ "podSelector": {}, "egress": [{ "ports": [{ "port": 80 }] }] })],
                true,
            ),
            (
                "all pods may",
                vec![
                    to(json!({ "podSelector": app("dummy") })),
                    json!({ "podSelector": {}, "policyTypes": ["Egress"], "egress": [{}] }),
                ],
                false,
            ),
        ];
        for (why, policies, expected) in rows {
            let is = said(&policies);
            assert_eq!(is.is_some(), expected, "{why}: {is:?}");
        }
    }
}
