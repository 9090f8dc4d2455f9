//! Made-up breakers, nodes and events. The same numbers give the same data, except for its times.

use std::collections::BTreeMap;

use breaker_api::crd::{ReportedState, WhenAllUnhealthy};
use breaker_web::rows::{
    BreakerRow, CommandLine, ConditionRow, Counts, Detail, EventRow, NodeDetail, NodeRow, OverrideRow, Problem, Scope,
    ScopeKind, Severity, Status, Ups,
};
use fastrand::Rng;
use jiff::{Timestamp, ToSpan as _};
use serde_json::{Value, json};

/// How much of everything.
#[derive(Clone, Copy)]
pub struct Shape {
    pub breakers: usize,
    pub nodes: usize,
}

pub struct Data {
    shape: Shape,
    breakers: Vec<BreakerRow>,
    counts: BTreeMap<String, Counts>,
    begin: Timestamp,
    random: Rng,
    last_event: u64,
}

const NAMES: [&str; 6] = ["checkout", "catalog", "search", "payments", "sessions", "images"];
const NAMESPACES: [&str; 3] = ["shop", "media", "internal"];
const FAILURE: &str = "all 3 backends are Down; 10.42.1.17:8080: L4CON connection refused";

impl Data {
    pub fn new(shape: Shape) -> Self {
        let begin = Timestamp::now();
        let mut data = Self {
            shape,
            breakers: Vec::new(),
            counts: BTreeMap::new(),
            begin,
            random: Rng::with_seed(7),
            last_event: 0,
        };
        data.breakers = (0..shape.breakers).map(|index| data.row(index)).collect();
        data
    }

    pub fn scope(&self) -> Scope {
        let is_node = self.shape.nodes == 1;
        Scope {
            kind: if is_node { ScopeKind::Node } else { ScopeKind::Cluster },
            name: if is_node { "node-0" } else { "production" }.into(),
            namespace: None,
            version: "0.1.0".into(),
        }
    }

    fn row(&self, index: usize) -> BreakerRow {
        let name = NAMES[index % NAMES.len()];
        let number = index / NAMES.len();
        let status = Status {
            state: ReportedState::Closed,
            since: Some(self.begin - 30.hours()),
            reason: "Recovered".into(),
            message: "2 of 2 backends are Up".into(),
            share: 1000,
            primary: Ups { up: 2, total: 2 },
            backup: Ups { up: 2, total: 2 },
            problems: Vec::new(),
        };
        let row = BreakerRow {
            namespace: NAMESPACES[index % NAMESPACES.len()].into(),
            name: if number == 0 { name.into() } else { format!("{name}-{number}") },
            status: match index {
                0 => self.opened(status),
                1 => Status {
                    state: ReportedState::HalfOpen,
                    since: Some(self.begin - 4.seconds()),
                    reason: "OpenTimeOver".into(),
                    message: "3 trial connections".into(),
                    share: 0,
                    ..status
                },
                2 => Status {
                    state: ReportedState::Open,
                    since: Some(self.begin - 11.minutes()),
                    reason: "Operator".into(),
                    message: String::new(),
                    share: 0,
                    ..status
                },
                3 => Status {
                    state: ReportedState::NotProtected,
                    since: None,
                    reason: "BackupNotFound".into(),
                    message: String::new(),
                    problems: vec![Problem::error(
                        "ResolvedRefs=False (BackupNotFound): there is no Service payments-backup",
                    )],
                    backup: Ups::default(),
                    ..status
                },
                _ => status,
            },
            override_: (index == 2).then(|| OverrideRow {
                mode: "ForceOpen".into(),
                until: Some(self.begin + 19.minutes()),
                reason: Some("database migration".into()),
            }),
            when_all_unhealthy: Some(WhenAllUnhealthy::PassThrough),
            ..BreakerRow::default()
        };
        self.on_nodes(row).ranked()
    }

    fn opened(&self, status: Status) -> Status {
        Status {
            state: ReportedState::Open,
            since: Some(self.begin - 95.seconds()),
            reason: "ConnectFailed".into(),
            message: FAILURE.into(),
            share: 0,
            primary: Ups { up: 0, total: 3 },
            backup: Ups { up: 4, total: 4 },
            ..status
        }
    }

    fn on_nodes(&self, row: BreakerRow) -> BreakerRow {
        if self.shape.nodes == 1 {
            return row;
        }
        let letter = |node: usize| match row.status.state {
            _ if node % 50 == 2 => '?',
            ReportedState::Open => 'O',
            ReportedState::HalfOpen => 'H',
            ReportedState::NotProtected => '-',
            _ => 'C',
        };
        BreakerRow { on_nodes: (0..self.shape.nodes).map(letter).collect(), ..row }
    }

    pub fn breakers(&self) -> &[BreakerRow] {
        &self.breakers
    }

    /// The second before `now` passes.
    pub fn advance(&mut self, now: Timestamp) {
        for row in &self.breakers {
            let counts = self.counts.entry(row.key()).or_default();
            let new = 20 + self.random.u64(0..15);
            match row.status.state {
                _ if row.status.since.is_some_and(|since| now < since) => counts.primary += new,
                ReportedState::Open => {
                    counts.backup += new;
                    counts.flows = new * 3;
                }
                ReportedState::HalfOpen => {
                    counts.primary += 3;
                    counts.backup += new;
                    counts.rejected += 1;
                }
                _ => counts.primary += new,
            }
        }
    }

    pub fn counts(&self) -> BTreeMap<String, Counts> {
        self.counts.clone()
    }

    pub fn nodes(&self) -> Vec<NodeRow> {
        let row = |index: usize| NodeRow {
            name: format!("node-{index}"),
            version: "0.1.0".into(),
            attach: "Tcx".into(),
            interfaces: 14,
            services: u32::try_from(self.breakers.len()).unwrap_or(u32::MAX),
            open: 2,
            fill: (index % 50 != 2).then_some(3),
            heard: Some(if index % 50 == 2 { self.begin - 7.minutes() } else { Timestamp::now() }),
            silent: index % 50 == 2,
            problems: if index % 50 == 1 {
                vec![Problem {
                    severity: Severity::Error,
                    text: "not attached to eth1: File exists (os error 17)".into(),
                }]
            } else {
                Vec::new()
            },
        };
        (0..self.shape.nodes).map(row).collect()
    }

    pub fn first_events(&mut self) -> Vec<EventRow> {
        let Some(first) = self.breakers.first().map(BreakerRow::key) else { return Vec::new() };
        let rows = [
            (31 * 60, "Open", "ConnectTimeout: 10.42.1.17:8080: L4TOUT"),
            (25 * 60, "HalfOpen", "the open time is over"),
            (24 * 60, "Closed", "the trial succeeded"),
            (95, "Open", FAILURE),
        ];
        let events = rows.map(|(seconds, to, message)| {
            self.last_event += 1;
            EventRow {
                id: self.last_event,
                at: self.begin - seconds.seconds(),
                breaker: first.clone(),
                kind: "Transition".into(),
                message: message.into(),
                to: serde_json::from_value(json!(to)).ok(),
                is_warning: false,
            }
        });
        events.into()
    }

    pub fn open(&mut self, name: &str) -> Option<(BreakerRow, EventRow)> {
        let place = self.breakers.iter().position(|row| row.key() == name)?;
        let mut row = self.breakers[place].clone();
        row.status = Status { since: Some(Timestamp::now()), ..self.opened(row.status) };
        let row = self.on_nodes(row).ranked();
        self.breakers[place] = row.clone();
        self.last_event += 1;
        let event = EventRow {
            id: self.last_event,
            at: Timestamp::now(),
            breaker: name.into(),
            kind: "Transition".into(),
            message: FAILURE.into(),
            to: Some(ReportedState::Open),
            is_warning: false,
        };
        Some((row, event))
    }

    pub fn detail(&self, name: &str) -> Option<Detail> {
        let breaker = self.breakers.iter().find(|row| row.key() == name)?.clone();
        let node = |index: usize| NodeDetail {
            node: format!("node-{index}"),
            services: vec![format!("{name}:80")],
            status: Status { problems: Vec::new(), ..breaker.status.clone() },
        };
        let is_cluster = self.shape.nodes > 1;
        let condition = |name: &str, status: &str, reason: &str, severity| ConditionRow {
            name: name.into(),
            status: status.into(),
            reason: reason.into(),
            message: "on all nodes".into(),
            since: self.begin,
            severity,
        };
        let conditions = vec![
            condition("Accepted", "True", "Accepted", None),
            condition("Programmed", "True", "Programmed", None),
            condition("Degraded", "True", "BackupDown", Some(Severity::Warning)),
        ];
        let commands = [
            ("Force the breaker open for ten minutes", &["trip", name, "--for", "10m", "--reason", "why"][..]),
            ("End the override: the checks decide again", &["reset", name]),
        ];
        Some(Detail {
            facts: vec![("Service".into(), format!("{name}, port 80")), ("Mode".into(), "Enforce".into())],
            conditions: if is_cluster { conditions } else { Vec::new() },
            nodes: (0..self.shape.nodes).map(node).collect(),
            commands: commands.map(|(purpose, words)| CommandLine::new(purpose, "kubectl breaker", words)).into(),
            breaker,
        })
    }

    /// A service as an agent describes it, as far as the page reads it.
    pub fn service(&self, name: &str) -> Option<Value> {
        let key = name.strip_suffix(":80")?;
        let row = self.breakers.iter().find(|row| row.key() == key)?;
        let is_down = row.status.primary.up == 0;
        let primary: Vec<Value> = (0..row.status.primary.total)
            .map(|number| {
                json!({
                    "address": format!("10.42.1.{}:8080", 17 + number), "weight": 100,
                    "health": if is_down { "Down" } else { "Up" }, "since": row.status.since,
                    "lastCheck": if is_down { "L4CON" } else { "L7OK" },
                    "detail": if is_down { "connection refused" } else { "200 OK" },
                    "checkMillis": 0.4 + f64::from(number) / 10.0,
                })
            })
            .collect();
        let backup: Vec<Value> = (0..row.status.backup.total)
            .map(|number| {
                json!({
                    "address": format!("10.42.2.{}:8080", 40 + number), "health": "Up", "since": row.status.since,
                    "lastCheck": "L7OK", "detail": "200 OK", "checkMillis": 1.25, "weight": 100,
                })
            })
            .collect();
        Some(json!({
            "name": name,
            "tiers": [
                { "name": "primary", "role": "primary", "active": !is_down, "backends": primary },
                { "name": "backup", "role": "backup", "active": is_down, "backends": backup },
            ],
            "limits": {
                "primary": { "limits": { "newConnectionsPerSecond": 200 }, "limited": {} },
                "backup": {
                    "limits": { "newConnectionsPerSecond": 50 }, "limited": { "newConnectionsPerSecond": 1204 },
                },
            },
        }))
    }
}
