//! What the page shows, as JSON. docs/PAGE.md describes the fields.

use std::collections::BTreeMap;

use breaker_api::crd::{ReportedState, WhenAllUnhealthy};
use jiff::Timestamp;
use serde::{Deserialize, Serialize};

/// What a page is about.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Scope {
    /// Whether the page shows one node or a cluster.
    pub kind: ScopeKind,
    /// The name of the node; the kubeconfig's context of the cluster.
    pub name: String,
    /// The namespace that is shown, if it is only one.
    #[serde(skip_serializing_if = "Option::is_none", default)]
    pub namespace: Option<String>,
    /// Version of the program that serves the page.
    pub version: String,
}

/// Whether a page shows one node or a cluster.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[allow(missing_docs, reason = "the names say it")]
pub enum ScopeKind {
    Node,
    Cluster,
}

/// One breaker: a line of the table.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct BreakerRow {
    /// Its namespace; empty for a service of a file.
    pub namespace: String,
    /// Its name. With Kubernetes as the source, a node knows `SERVICE:PORT`, and the cluster the name of the object; one
    /// that stands for the annotations of a Service is `svc/NAME`.
    pub name: String,
    /// Its status; in a cluster, with the most open state of all nodes.
    #[serde(flatten)]
    pub status: Status,
    /// Decisions are computed and shown, but not carried out.
    #[serde(skip_serializing_if = "std::ops::Not::not", default)]
    pub dry_run: bool,
    /// The operator's override.
    #[serde(rename = "override", skip_serializing_if = "Option::is_none", default)]
    pub override_: Option<OverrideRow>,
    /// The fate of a new connection while neither the primary nor a backup can be used.
    #[serde(skip_serializing_if = "Option::is_none", default)]
    pub when_all_unhealthy: Option<WhenAllUnhealthy>,
    /// In a cluster: the state on each node, in the order of the nodes, by its first letter; `N` where nothing is in
    /// the kernel, `?` for a node that is silent, `-` for one that does not know the breaker.
    #[serde(skip_serializing_if = "String::is_empty", default)]
    pub on_nodes: String,
    /// How soon somebody should look: the smaller, the sooner. See [`Attention`].
    pub attention: Attention,
}

/// The status of a breaker, in a cluster or on one node.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Status {
    /// The state.
    pub state: ReportedState,
    /// When the state began.
    #[serde(skip_serializing_if = "Option::is_none", default)]
    pub since: Option<Timestamp>,
    /// Why it is in this state, in one word.
    pub reason: String,
    /// Details of the reason, for people.
    pub message: String,
    /// The primary's share of new connections, permille.
    pub share: u16,
    /// The primary's backends.
    pub primary: Ups,
    /// The backends of the backup that takes over.
    pub backup: Ups,
    /// Everything that is not as it should be, worst first.
    #[serde(skip_serializing_if = "Vec::is_empty", default)]
    pub problems: Vec<Problem>,
}

impl BreakerRow {
    /// The name under which the page knows the breaker.
    #[must_use]
    pub fn key(&self) -> String {
        if self.namespace.is_empty() { self.name.clone() } else { format!("{}/{}", self.namespace, self.name) }
    }

    /// Computes [`Self::attention`] from the other fields.
    #[must_use]
    pub fn ranked(mut self) -> Self {
        let has = |severity| self.status.problems.iter().any(|problem| problem.severity == severity);
        let is_forced = self.override_.is_some();
        self.attention = match self.status.state {
            ReportedState::NotProtected => Attention::Failure,
            _ if has(Severity::Error) => Attention::Failure,
            // Nothing is redirected.
            ReportedState::Open | ReportedState::HalfOpen if self.dry_run => Attention::Warning,
            ReportedState::Open if !is_forced => Attention::Open,
            ReportedState::HalfOpen => Attention::Returning,
            ReportedState::Closed if self.status.share < 1000 && !is_forced => Attention::Returning,
            _ if is_forced => Attention::Forced,
            ReportedState::Unknown | ReportedState::NotProgrammed => Attention::Warning,
            _ if has(Severity::Warning) => Attention::Warning,
            ReportedState::Open | ReportedState::Closed => Attention::None,
        };
        self
    }
}

/// How soon somebody should look at a breaker.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
pub enum Attention {
    /// Something that was asked for is not carried out.
    Failure,
    /// The primary failed, and the backup has the traffic.
    Open,
    /// The primary gets a part of the traffic.
    Returning,
    /// An operator forces the state.
    Forced,
    /// Something is not as it should be, and the traffic does not suffer.
    Warning,
    /// All is well.
    #[default]
    None,
}

/// An operator's override.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct OverrideRow {
    /// `ForceOpen` or `ForceClosed`.
    pub mode: String,
    /// When it ends; absent if it does not.
    #[serde(skip_serializing_if = "Option::is_none", default)]
    pub until: Option<Timestamp>,
    /// Why, in the words of whoever set it.
    #[serde(skip_serializing_if = "Option::is_none", default)]
    pub reason: Option<String>,
}

/// Number of backends that can be used, of all.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Ups {
    /// Up, or without a check.
    pub up: u32,
    /// All.
    pub total: u32,
}

/// Something that is not as it should be.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Problem {
    /// How bad it is.
    pub severity: Severity,
    /// What it is.
    pub text: String,
}

impl Problem {
    /// Something that was asked for is not carried out.
    #[must_use]
    pub fn error(text: impl Into<String>) -> Self {
        Self { severity: Severity::Error, text: text.into() }
    }

    /// Something is not as it should be.
    #[must_use]
    pub fn warning(text: impl Into<String>) -> Self {
        Self { severity: Severity::Warning, text: text.into() }
    }

    /// A plan that is not in the maps.
    #[must_use]
    pub fn not_applied(error: &str) -> Self {
        Self::error(format!("not in the kernel: {error}"))
    }

    /// A limit that refuses connections.
    #[must_use]
    pub fn limited(limit: &str, per_minute: impl std::fmt::Display) -> Self {
        Self::warning(format!("{limit} refuses {per_minute} connections a minute"))
    }

    /// An interface on which connections are left to kube-proxy.
    #[must_use]
    pub fn suspended(interface: &str) -> Self {
        Self::warning(format!("{interface}: no answers of the backup were seen, so kube-proxy keeps the connections"))
    }
}

/// How bad a problem is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Severity {
    /// Something that was asked for is not carried out.
    Error,
    /// Something is not as it should be.
    Warning,
}

/// Counts of one breaker, in JSON as a list in this order.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(from = "[u64; 4]", into = "[u64; 4]")]
pub struct Counts {
    /// New connections left to the primary.
    pub primary: u64,
    /// New connections moved to a backup.
    pub backup: u64,
    /// New connections refused.
    pub rejected: u64,
    /// Live flows on a backup now.
    pub flows: u64,
}

impl From<[u64; 4]> for Counts {
    fn from([primary, backup, rejected, flows]: [u64; 4]) -> Self {
        Self { primary, backup, rejected, flows }
    }
}

impl From<Counts> for [u64; 4] {
    fn from(counts: Counts) -> Self {
        [counts.primary, counts.backup, counts.rejected, counts.flows]
    }
}

impl std::ops::AddAssign for Counts {
    fn add_assign(&mut self, other: Self) {
        self.primary += other.primary;
        self.backup += other.backup;
        self.rejected += other.rejected;
        self.flows += other.flows;
    }
}

/// One node with its agent.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct NodeRow {
    /// Its name.
    pub name: String,
    /// Version of the agent.
    pub version: String,
    /// How the programs are attached.
    pub attach: String,
    /// Number of interfaces with programs.
    pub interfaces: u32,
    /// Number of protected Services.
    pub services: u32,
    /// Number of those whose breaker is open.
    pub open: u32,
    /// Fill level of the fuller table of established flows, percent; absent if it is not known.
    #[serde(skip_serializing_if = "Option::is_none", default)]
    pub fill: Option<u8>,
    /// When the agent reported last.
    #[serde(skip_serializing_if = "Option::is_none", default)]
    pub heard: Option<Timestamp>,
    /// Whether the last report is too old, or there is no agent.
    #[serde(skip_serializing_if = "std::ops::Not::not", default)]
    pub silent: bool,
    /// What is not as it should be: interfaces without programs, and so on.
    #[serde(skip_serializing_if = "Vec::is_empty", default)]
    pub problems: Vec<Problem>,
}

/// One event.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct EventRow {
    /// Increases from event to event.
    pub id: u64,
    /// When it happened.
    pub at: Timestamp,
    /// [`BreakerRow::key`] of the breaker that it is about; empty if it is about none.
    pub breaker: String,
    /// What it is about, in one word.
    pub kind: String,
    /// A description for people.
    pub message: String,
    /// For a change of state: the state after it.
    #[serde(skip_serializing_if = "Option::is_none", default)]
    pub to: Option<ReportedState>,
    /// Whether it is a warning.
    #[serde(skip_serializing_if = "std::ops::Not::not", default)]
    pub is_warning: bool,
}

/// Everything about one breaker: the answer to `GET /v1/breakers/KEY`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Detail {
    /// Its line in the table.
    pub breaker: BreakerRow,
    /// Facts by their names: the Service, the mode, and so on.
    pub facts: Vec<(String, String)>,
    /// The conditions of a CircuitBreaker.
    pub conditions: Vec<ConditionRow>,
    /// The state on each node that knows it.
    pub nodes: Vec<NodeDetail>,
    /// Commands that show more or change something.
    pub commands: Vec<CommandLine>,
}

/// A condition of a CircuitBreaker.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct ConditionRow {
    /// Its type.
    pub name: String,
    /// `True`, `False` or `Unknown`.
    pub status: String,
    /// Why, in one word.
    pub reason: String,
    /// Why, for people.
    pub message: String,
    /// When the status changed.
    pub since: Timestamp,
    /// How bad it is; absent if all is well.
    #[serde(skip_serializing_if = "Option::is_none", default)]
    pub severity: Option<Severity>,
}

/// A breaker on one node.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct NodeDetail {
    /// The node.
    pub node: String,
    /// The names under which the node's agent knows the breaker, for `GET /v1/nodes/NODE/services/NAME`.
    pub services: Vec<String>,
    /// Its status there.
    #[serde(flatten)]
    pub status: Status,
}

/// A command to copy.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct CommandLine {
    /// What it does.
    pub purpose: String,
    /// The command.
    pub line: String,
}

impl CommandLine {
    /// A command for a POSIX shell. Words with other characters than those of names are quoted.
    #[must_use]
    pub fn new(purpose: &str, program: &str, words: &[&str]) -> Self {
        let mut line = program.to_owned();
        for word in words {
            line.push(' ');
            let is_plain = |byte: u8| byte.is_ascii_alphanumeric() || b"-_./:@=,".contains(&byte);
            if !word.is_empty() && word.bytes().all(is_plain) {
                line.push_str(word);
            } else {
                line.push_str(&format!("'{}'", word.replace('\'', r"'\''")));
            }
        }
        Self { purpose: purpose.into(), line }
    }
}

/// One message of the stream: the first has everything, the others what changed.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Message {
    /// When the data was current.
    pub at: Timestamp,
    /// The server's time; only in the first message, whose data may be old.
    #[serde(skip_serializing_if = "Option::is_none", default)]
    pub now: Option<Timestamp>,
    /// What the page is about; only in the first message, which replaces all that the page knows.
    #[serde(skip_serializing_if = "Option::is_none", default)]
    pub scope: Option<Scope>,
    /// New and changed breakers.
    #[serde(skip_serializing_if = "Vec::is_empty", default)]
    pub breakers: Vec<BreakerRow>,
    /// Keys of breakers that are gone.
    #[serde(skip_serializing_if = "Vec::is_empty", default)]
    pub removed: Vec<String>,
    /// Changed counts, by key.
    #[serde(skip_serializing_if = "BTreeMap::is_empty", default)]
    pub counts: BTreeMap<String, Counts>,
    /// All nodes, if one of them changed.
    #[serde(skip_serializing_if = "Option::is_none", default)]
    pub nodes: Option<Vec<NodeRow>>,
    /// New events, oldest first.
    #[serde(skip_serializing_if = "Vec::is_empty", default)]
    pub events: Vec<EventRow>,
    /// What the page cannot show, and why; all of it, if it changed.
    #[serde(skip_serializing_if = "Option::is_none", default)]
    pub notes: Option<Vec<String>>,
}

impl Message {
    /// A message without content: it says that the data is still current.
    #[must_use]
    pub const fn new(at: Timestamp) -> Self {
        Self {
            at,
            now: None,
            scope: None,
            breakers: Vec::new(),
            removed: Vec::new(),
            counts: BTreeMap::new(),
            nodes: None,
            events: Vec::new(),
            notes: None,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn row(state: ReportedState) -> BreakerRow {
        BreakerRow { status: Status { state, share: 1000, ..Status::default() }, ..BreakerRow::default() }
    }

    fn with(severity: Severity, mut row: BreakerRow) -> BreakerRow {
        row.status.problems.push(Problem { severity, text: String::new() });
        row
    }

    fn forced(mut row: BreakerRow) -> BreakerRow {
        row.override_ = Some(OverrideRow { mode: "ForceOpen".into(), until: None, reason: None });
        row
    }

    #[test]
    fn what_is_not_carried_out_comes_before_what_is_open_and_that_before_what_somebody_wanted() {
        let mut ramp = row(ReportedState::Closed);
        ramp.status.share = 300;
        let rows = [
            (row(ReportedState::NotProtected), Attention::Failure),
            (with(Severity::Error, row(ReportedState::Closed)), Attention::Failure),
            (with(Severity::Warning, row(ReportedState::Open)), Attention::Open),
            (row(ReportedState::HalfOpen), Attention::Returning),
            (ramp, Attention::Returning),
            (forced(row(ReportedState::Open)), Attention::Forced),
            (row(ReportedState::Unknown), Attention::Warning),
            (with(Severity::Warning, row(ReportedState::Closed)), Attention::Warning),
            (row(ReportedState::Closed), Attention::None),
            (BreakerRow { dry_run: true, ..row(ReportedState::Open) }, Attention::Warning),
        ];
        for (row, expected) in rows {
            assert_eq!(row.clone().ranked().attention, expected, "{row:?}");
        }
        assert!(Attention::Failure < Attention::Open && Attention::Open < Attention::None);
    }

    #[test]
    fn words_of_a_command_are_quoted_where_a_shell_would_change_them() {
        let line = |words: &[&str]| CommandLine::new("", "breaker", words).line;
        assert_eq!(line(&["reset", "prod/shop:80"]), "breaker reset prod/shop:80");
        assert_eq!(line(&["trip", "it's $HOME; rm"]), r"breaker trip 'it'\''s $HOME; rm'");
    }
}
