//! `kubectl breaker check`: whether the installation is sound. Each finding says what to do, and where the documents say
//! more.

use std::{
    collections::{BTreeMap, BTreeSet},
    fmt::Write as _,
    process::ExitCode,
    time::Duration,
};

use anyhow::Result;
use breaker_api::crd::{CircuitBreaker, GONE, GROUP, NodeReport, Override, ReferenceGrant, STATUS_LEASE};
use jiff::Timestamp;
use k8s_openapi::{
    api::{
        apps::v1::DaemonSet,
        authorization::v1::{ResourceAttributes, SelfSubjectAccessReview, SelfSubjectAccessReviewSpec},
        coordination::v1::Lease,
        core::v1::{Namespace, Node},
    },
    apiextensions_apiserver::pkg::apis::apiextensions::v1::CustomResourceDefinition,
};
use kube::{
    Api, CustomResourceExt as _, ResourceExt as _,
    api::{ListParams, PostParams},
};
use serde::Serialize;
use tokio::time::{Instant, sleep};

use super::{
    AGENTS, DAEMON_SET,
    args::CheckArgs,
    connection::Connection,
    overview::{Severity, severity},
};
use crate::{
    output::print_as,
    table::{GREEN, Paint, RED, YELLOW},
};

/// How old the renewal of the Lease may be.
const LEASE_AGE: Duration = Duration::from_secs(30);
/// The oldest version of Kubernetes that breaker is made for: 1.MINOR.
const OLDEST_MINOR: u32 = 28;

/// How a check came out.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
enum Verdict {
    Ok,
    Warning,
    Error,
}

/// One line of the result.
#[derive(Clone, Debug, Serialize)]
struct Finding {
    section: &'static str,
    verdict: Verdict,
    text: String,
    /// What to do.
    #[serde(skip_serializing_if = "Option::is_none")]
    remedy: Option<String>,
    /// Where the documents say more.
    #[serde(skip_serializing_if = "Option::is_none")]
    link: Option<&'static str>,
}

/// The findings so far.
#[derive(Default)]
struct Findings {
    section: &'static str,
    all: Vec<Finding>,
}

impl Findings {
    fn add(&mut self, verdict: Verdict, text: impl Into<String>, remedy: Option<String>, link: Option<&'static str>) {
        self.all.push(Finding { section: self.section, verdict, text: text.into(), remedy, link });
    }

    fn ok(&mut self, text: impl Into<String>) {
        self.add(Verdict::Ok, text, None, None);
    }

    fn warn(&mut self, text: impl Into<String>, remedy: &str, link: &'static str) {
        self.add(Verdict::Warning, text, Some(remedy.into()), Some(link));
    }

    fn error(&mut self, text: impl Into<String>, remedy: &str, link: &'static str) {
        self.add(Verdict::Error, text, Some(remedy.into()), Some(link));
    }

    /// A list that could not be read: a warning if the caller may not, otherwise an error.
    fn unreadable(&mut self, what: &str, error: &kube::Error) {
        match error {
            kube::Error::Api(status) if status.code == 403 => {
                self.warn(format!("you may not read {what}: not checked"), "ask for the right to list them", ROLES);
            }
            error => self.error(format!("{what} cannot be read: {error}"), "see the error", KUBERNETES),
        }
    }

    fn worst(&self) -> Verdict {
        let has = |verdict| self.all.iter().any(|finding| finding.verdict == verdict);
        match () {
            () if has(Verdict::Error) => Verdict::Error,
            () if has(Verdict::Warning) => Verdict::Warning,
            () => Verdict::Ok,
        }
    }
}

const KUBERNETES: &str = "docs/KUBERNETES.md";
const INSTALL: &str = "k8s/README.md";
const ROLES: &str = "docs/KUBERNETES.md#roles-for-people";

/// Runs the checks. The exit code is 1 if there is an error.
pub(super) async fn run(connection: &Connection, args: &CheckArgs) -> Result<ExitCode> {
    let end = args.wait.map(|wait| Instant::now() + wait);
    let findings = loop {
        let findings = check(connection, args.pre).await;
        let is_over = end.is_none_or(|end| Instant::now() >= end);
        if findings.worst() != Verdict::Error || is_over {
            break findings;
        }
        sleep(Duration::from_secs(1)).await;
    };
    print_as(args.output, &findings.all, || Ok(text(&findings, Paint::for_stdout())))?;
    Ok(if findings.worst() == Verdict::Error { ExitCode::FAILURE } else { ExitCode::SUCCESS })
}

async fn check(connection: &Connection, pre: bool) -> Findings {
    let mut findings = Findings { section: "API server", all: Vec::new() };
    if !api_server(connection, &mut findings).await {
        return findings;
    }
    if pre {
        findings.section = "before the installation";
        before(connection, &mut findings).await;
        return findings;
    }
    findings.section = "installation";
    definitions(connection, &mut findings).await;
    daemon_set(connection, &mut findings).await;
    lease(connection, &mut findings).await;
    findings.section = "nodes";
    nodes(connection, &mut findings).await;
    findings.section = "your rights";
    rights(connection, &mut findings).await;
    findings.section = "breakers";
    breakers(connection, &mut findings).await;
    findings
}

/// Returns whether the API server answers.
async fn api_server(connection: &Connection, findings: &mut Findings) -> bool {
    let version = match connection.client.apiserver_version().await {
        Ok(version) => version,
        Err(error) => {
            findings.error(
                format!("the API server does not answer: {error}"),
                "look at the kubeconfig, the context and the network",
                KUBERNETES,
            );
            return false;
        }
    };
    let minor: u32 = version.minor.chars().take_while(char::is_ascii_digit).collect::<String>().parse().unwrap_or(0);
    if version.major == "1" && minor < OLDEST_MINOR {
        let text = format!("Kubernetes {} is older than 1.{OLDEST_MINOR}", version.git_version);
        findings.error(text, "upgrade the cluster", INSTALL);
    } else {
        findings.ok(format!("the API server answers: {}", version.git_version));
    }
    true
}

/// What an installation needs.
async fn before(connection: &Connection, findings: &mut Findings) {
    let wanted = [
        ("apiextensions.k8s.io", "customresourcedefinitions", None),
        ("rbac.authorization.k8s.io", "clusterroles", None),
        ("rbac.authorization.k8s.io", "clusterrolebindings", None),
        ("", "namespaces", None),
        ("apps", "daemonsets", Some(AGENTS)),
        ("", "configmaps", Some(AGENTS)),
    ];
    for (group, resource, namespace) in wanted {
        match may(connection, "create", group, resource, "", namespace).await {
            Ok(true) => findings.ok(format!("you may create {resource}")),
            Ok(false) => {
                findings.error(format!("you may not create {resource}"), "install as a cluster admin", INSTALL);
            }
            Err(error) => findings.unreadable("your rights", &error),
        }
    }
    match Api::<Namespace>::all(connection.client.clone()).get_opt(AGENTS).await {
        Ok(Some(namespace)) => {
            let level = namespace.labels().get("pod-security.kubernetes.io/enforce").map(String::as_str);
            if matches!(level, Some("privileged") | None) {
                findings.ok("the namespace breaker-system admits privileged pods, unless an admission plugin does not");
            } else {
                findings.error(
                    format!("the namespace breaker-system enforces {}", level.unwrap_or_default()),
                    "kubectl label namespace breaker-system pod-security.kubernetes.io/enforce=privileged --overwrite",
                    INSTALL,
                );
            }
        }
        Ok(None) => findings.ok("the namespace breaker-system does not exist yet"),
        Err(error) => findings.unreadable("namespaces", &error),
    }
    let list = match Api::<Node>::all(connection.client.clone()).list(&ListParams::default()).await {
        Ok(list) => list,
        Err(error) => return findings.unreadable("Nodes", &error),
    };
    for node in list {
        let name = node.name_any();
        let Some(info) = node.status.and_then(|status| status.node_info) else { continue };
        let mut numbers = info.kernel_version.split(['.', '-']).map_while(|part| part.parse::<u32>().ok());
        let kernel = (numbers.next().unwrap_or(0), numbers.next().unwrap_or(0));
        if info.operating_system != "linux" {
            findings.warn(format!("{name} runs {}: no agent runs there", info.operating_system), "nothing", INSTALL);
        } else if kernel < (5, 12) {
            findings.error(
                format!("{name} has kernel {}, and breaker needs 5.12", info.kernel_version),
                "upgrade the node, or keep the DaemonSet off it with nodeSelector",
                "docs/ARCHITECTURE.md#kernels",
            );
        } else if !["amd64", "arm64"].contains(&info.architecture.as_str()) {
            findings.warn(format!("{name} is {}: no image is built for it", info.architecture), "build one", INSTALL);
        } else {
            findings
                .ok(format!("{name} has kernel {}; `breaker preflight` on the node says more", info.kernel_version));
        }
    }
}

/// Whether the definitions are there, and have every field that this program knows.
async fn definitions(connection: &Connection, findings: &mut Findings) {
    let api: Api<CustomResourceDefinition> = Api::all(connection.client.clone());
    for known in [CircuitBreaker::crd(), NodeReport::crd(), ReferenceGrant::crd()] {
        let name = known.name_any();
        match api.get_opt(&name).await {
            Ok(None) => findings.error(
                format!("there is no CustomResourceDefinition {name}"),
                "kubectl apply -f k8s/base/crds.yaml",
                INSTALL,
            ),
            Ok(Some(found)) => {
                let missing: Vec<String> = fields(&known).difference(&fields(&found)).cloned().collect();
                if missing.is_empty() {
                    findings.ok(format!("the CustomResourceDefinition {name} is there"));
                } else {
                    findings.warn(
                        format!("{name} is older than this program: it lacks {}", missing.join(", ")),
                        "upgrade the definitions: kubectl apply --server-side -f k8s/base/crds.yaml",
                        INSTALL,
                    );
                }
            }
            Err(error) => findings.unreadable("CustomResourceDefinitions", &error),
        }
    }
}

/// The fields of a definition's spec and status.
fn fields(crd: &CustomResourceDefinition) -> BTreeSet<String> {
    let json = serde_json::to_value(crd).unwrap_or_default();
    let mut found = BTreeSet::new();
    for part in ["spec", "status"] {
        let at = format!("/spec/versions/0/schema/openAPIV3Schema/properties/{part}/properties");
        let properties = json.pointer(&at).and_then(serde_json::Value::as_object);
        found.extend(properties.into_iter().flat_map(|fields| fields.keys()).map(|field| format!("{part}.{field}")));
    }
    found
}

async fn daemon_set(connection: &Connection, findings: &mut Findings) {
    let api: Api<DaemonSet> = Api::namespaced(connection.client.clone(), AGENTS);
    let status = match api.get_opt(DAEMON_SET).await {
        Ok(Some(daemon_set)) => daemon_set.status.unwrap_or_default(),
        Ok(None) => {
            return findings.error(
                "there is no DaemonSet breaker-agent in breaker-system",
                "install breaker: kubectl apply -k k8s/base, or the chart",
                INSTALL,
            );
        }
        Err(error) => return findings.unreadable("the DaemonSet", &error),
    };
    let (wanted, ready, updated) =
        (status.desired_number_scheduled, status.number_ready, status.updated_number_scheduled.unwrap_or_default());
    if wanted == 0 {
        findings.error("the DaemonSet selects no node", "look at its nodeSelector and tolerations", INSTALL);
    } else if ready < wanted {
        findings.error(
            format!("{ready} of {wanted} agents are ready"),
            "kubectl -n breaker-system get pods -o wide; /readyz?verbose says what an agent waits for",
            "docs/TROUBLESHOOTING.md#breakeragentdown",
        );
    } else {
        findings.ok(format!("all of {wanted} agents are ready"));
    }
    if updated < wanted {
        findings.warn(
            format!("{updated} of {wanted} agents have the current template"),
            "a rollout is on its way; one node that is not ready can hold it",
            "docs/TROUBLESHOOTING.md#breakerversionskew",
        );
    }
}

/// Whether an agent writes the statuses.
async fn lease(connection: &Connection, findings: &mut Findings) {
    let api: Api<Lease> = Api::namespaced(connection.client.clone(), AGENTS);
    match api.get_opt(STATUS_LEASE).await {
        Ok(lease) => {
            let spec = lease.and_then(|lease| lease.spec).unwrap_or_default();
            let holder = spec.holder_identity.unwrap_or_default();
            let age = spec.renew_time.map(|at| Timestamp::now().duration_since(at.0));
            let is_fresh = age.is_some_and(|age| age.unsigned_abs() < LEASE_AGE);
            if !holder.is_empty() && is_fresh {
                findings.ok(format!("the agent on {holder} writes the statuses"));
            } else {
                findings.error(
                    "no agent writes the statuses",
                    "look at the agents' logs: none can renew the Lease breaker-status",
                    "docs/TROUBLESHOOTING.md#breakerreportsfailing",
                );
            }
        }
        Err(error) => findings.unreadable("the Lease of the status writer", &error),
    }
}

async fn nodes(connection: &Connection, findings: &mut Findings) {
    let reports = match Api::<NodeReport>::all(connection.client.clone()).list(&ListParams::default()).await {
        Ok(reports) => reports.items,
        Err(error) => return findings.unreadable("NodeReports", &error),
    };
    if reports.is_empty() {
        return findings.error("no node reports", "look at the DaemonSet and the agents' logs", KUBERNETES);
    }
    let mut versions: BTreeMap<String, Vec<String>> = BTreeMap::new();
    let before = findings.all.len();
    for report in &reports {
        let (node, agent) = (report.name_any(), &report.spec.agent);
        versions.entry(agent.version.clone()).or_default().push(node.clone());
        let age = agent.reported_at.map(|at| Timestamp::now().duration_since(at));
        if age.is_none_or(|age| age > GONE) {
            findings.error(
                format!("{node}: the agent has not reported for more than 15 minutes"),
                "look at its pod and its log",
                "docs/TROUBLESHOOTING.md#breakeragentdown",
            );
        }
        for interface in &agent.failed_interfaces {
            findings.error(
                format!("{node}: no programs on {interface}"),
                "clients behind it are not protected; `breaker preflight` on the node says more",
                "docs/TROUBLESHOOTING.md#breakerinterfacenotattached",
            );
        }
        if let Some(why) = &agent.incompatible {
            findings.error(
                format!("{node}: {why}"),
                "switch the socket load balancer off for Services that breaker protects",
                "docs/KUBERNETES.md",
            );
        }
        for why in &agent.degraded {
            findings.warn(format!("{node}: {why}"), "see the text", "docs/TROUBLESHOOTING.md#breakerdegraded");
        }
        let notes = [agent.bypass.as_deref(), agent.node_sockets.as_deref()];
        for why in notes.into_iter().flatten().chain(agent.unseen.iter().map(String::as_str)) {
            findings.warn(
                format!("{node}: {why}"),
                "see the text",
                "docs/CONFIGURATION.md#where-programs-are-attached",
            );
        }
    }
    if findings.all.len() == before {
        findings.ok(format!("all of {} nodes have reported, and have no problem", reports.len()));
    }
    let own = env!("CARGO_PKG_VERSION");
    if versions.len() > 1 {
        let list = versions.iter().map(|(version, nodes)| format!("{version} on {}", nodes.len()));
        findings.warn(
            format!("agents of several versions run: {}", list.collect::<Vec<_>>().join(", ")),
            "wait for the rollout: kubectl -n breaker-system rollout status ds/breaker-agent",
            "docs/TROUBLESHOOTING.md#breakerversionskew",
        );
    } else if let Some(version) = versions.keys().next().filter(|version| *version != own) {
        findings.warn(
            format!("the agents have version {version}, and this program has {own}"),
            "use the program of the agents' version",
            KUBERNETES,
        );
    }
}

async fn rights(connection: &Connection, findings: &mut Findings) {
    let namespace = connection.namespace.as_deref();
    let place = namespace.map_or_else(|| "in all namespaces".to_owned(), |name| format!("in namespace {name}"));
    let wanted = [
        ("list", "circuitbreakers", "", namespace, "see breakers"),
        ("patch", "circuitbreakers", "", namespace, "change breakers"),
        ("update", "circuitbreakers", "override", namespace, "force breakers"),
        ("list", "nodereports", "", None, "see each node's view"),
    ];
    for (verb, resource, subresource, namespace, what) in wanted {
        let place = if namespace.is_none() && resource == "nodereports" { "" } else { place.as_str() };
        match may(connection, verb, GROUP, resource, subresource, namespace).await {
            Ok(true) => findings.ok(format!("you may {what} {place}").trim_end().to_owned()),
            Ok(false) => findings.warn(
                format!("you may not {what} {place}").trim_end().to_owned(),
                "ask for the role breaker-view or breaker-edit",
                ROLES,
            ),
            Err(error) => findings.unreadable("your rights", &error),
        }
    }
}

/// Whether the caller may do something (`kubectl auth can-i`).
async fn may(
    connection: &Connection,
    verb: &str,
    group: &str,
    resource: &str,
    subresource: &str,
    namespace: Option<&str>,
) -> Result<bool, kube::Error> {
    let review = SelfSubjectAccessReview {
        spec: SelfSubjectAccessReviewSpec {
            resource_attributes: Some(ResourceAttributes {
                group: Some(group.into()),
                resource: Some(resource.into()),
                subresource: Some(subresource.into()).filter(|name: &String| !name.is_empty()),
                verb: Some(verb.into()),
                namespace: namespace.map(str::to_owned),
                ..ResourceAttributes::default()
            }),
            ..SelfSubjectAccessReviewSpec::default()
        },
        ..SelfSubjectAccessReview::default()
    };
    let api: Api<SelfSubjectAccessReview> = Api::all(connection.client.clone());
    Ok(api.create(&PostParams::default(), &review).await?.status.is_some_and(|status| status.allowed))
}

async fn breakers(connection: &Connection, findings: &mut Findings) {
    let list = match connection.api::<CircuitBreaker>().list(&ListParams::default()).await {
        Ok(list) => list.items,
        Err(error) => return findings.unreadable("CircuitBreakers", &error),
    };
    let before = findings.all.len();
    for breaker in &list {
        let name = format!("{}/{}", breaker.namespace().unwrap_or_default(), breaker.name_any());
        let status = breaker.status.clone().unwrap_or_default();
        if status.state.is_none() {
            findings.warn(
                format!("{name}: no agent has reported a state yet"),
                "wait, or look at the agents",
                KUBERNETES,
            );
        }
        // Programmed, or the missing state, says the same as Reconciling.
        for condition in status.conditions.iter().filter(|condition| condition.type_ != "Reconciling") {
            let text = format!("{name}: {} ({}): {}", condition.type_, condition.reason, condition.message);
            let anchor = "docs/TROUBLESHOOTING.md#conditions-and-their-reasons";
            match severity(condition) {
                Some(Severity::Warning) => findings.warn(text, "see the reason", anchor),
                Some(Severity::Error) => findings.error(text, "see the reason", anchor),
                None => {}
            }
        }
        if breaker.spec.r#override != Override::Auto && breaker.spec.until.is_none() {
            findings.warn(
                format!("{name} is forced ({}) without an end", breaker.spec.r#override.label()),
                "kubectl breaker reset, or set spec.until",
                "docs/TROUBLESHOOTING.md#breakeroverrideforgotten",
            );
        }
    }
    if findings.all.len() == before {
        findings.ok(format!("CircuitBreakers without a problem: {}", list.len()));
    }
}

fn text(findings: &Findings, paint: Paint) -> String {
    let mut text = String::new();
    let mut section = "";
    for finding in &findings.all {
        if finding.section != section {
            let gap = if section.is_empty() { "" } else { "\n" };
            section = finding.section;
            let _ = writeln!(text, "{gap}{section}\n{}", "-".repeat(section.len()));
        }
        let (mark, colour) = match finding.verdict {
            Verdict::Ok => ("ok     ", GREEN),
            Verdict::Warning => ("warning", YELLOW),
            Verdict::Error => ("error  ", RED),
        };
        let shown: String = finding.text.chars().map(|c| if c.is_control() { ' ' } else { c }).collect();
        let _ = writeln!(text, "{}  {shown}", paint.with(colour, mark));
        if let Some(remedy) = &finding.remedy {
            let _ = writeln!(text, "         {remedy}");
        }
        if let Some(link) = finding.link {
            let _ = writeln!(text, "         {link}");
        }
    }
    let count = |verdict| findings.all.iter().filter(|finding| finding.verdict == verdict).count();
    let _ = match (count(Verdict::Error), count(Verdict::Warning)) {
        (0, 0) => writeln!(text, "\nno problem found"),
        (errors, warnings) => writeln!(text, "\n{errors} errors, {warnings} warnings"),
    };
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_finding_says_what_to_do() {
        let mut findings = Findings { section: "nodes", all: Vec::new() };
        findings.ok("all of 2 nodes have reported");
        findings.error("k1: no programs on veth1: EBUSY\u{1b}[2J", "look at it", "docs/X.md#y");
        let expected = "nodes\n-----\nok       all of 2 nodes have reported\nerror    k1: no programs on veth1: EBUSY [2J\n\
                        \x20        look at it\n\x20        docs/X.md#y\n\n1 errors, 0 warnings\n";
        assert_eq!(text(&findings, Paint::plain()), expected);
        assert_eq!(findings.worst(), Verdict::Error);
    }

    #[test]
    fn an_older_definition_lacks_fields() {
        let known = CircuitBreaker::crd();
        let mut json = serde_json::to_value(&known).unwrap();
        let at = "/spec/versions/0/schema/openAPIV3Schema/properties/spec/properties";
        json.pointer_mut(at).unwrap().as_object_mut().unwrap().remove("onBackupDown");
        let old: CustomResourceDefinition = serde_json::from_value(json).unwrap();
        let missing: Vec<String> = fields(&known).difference(&fields(&old)).cloned().collect();
        assert_eq!(missing, ["spec.onBackupDown"]);
    }
}
