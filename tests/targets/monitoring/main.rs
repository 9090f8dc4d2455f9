//! Tests of the alert rules and dashboards in k8s/monitoring: every query uses metrics and labels that the agent exports,
//! every alert has its cases and its section in the documents. No root, no cluster.
#![allow(clippy::unwrap_used, reason = "a test may panic")]

use std::{
    collections::{BTreeMap, BTreeSet},
    fs,
    path::PathBuf,
    process::Command,
};

use breaker_agent::metrics::families::{ALL, Kind};
use breaker_tests::prometheus;
use promql_parser::parser::{self, BinModifier, Expr, LabelModifier, VectorSelector};
use serde_json::Value;

/// Labels that Prometheus, the PodMonitor or a histogram add to every metric.
const ADDED: [&str; 4] = ["job", "instance", "node", "le"];
/// Metrics of others, with the labels that a rule may use.
const OTHERS: [(&str, &[&str]); 2] =
    [("up", &[]), ("kube_daemonset_status_number_unavailable", &["namespace", "daemonset"])];

fn monitoring() -> PathBuf {
    ebpf_builder::workspace().join("k8s/monitoring")
}

fn rules() -> Vec<Value> {
    let file: Value = serde_saphyr::from_str(&fs::read_to_string(monitoring().join("rules.yaml")).unwrap()).unwrap();
    file["groups"][0]["rules"].as_array().unwrap().clone()
}

/// The labels of a metric by the name in a query, which may have the suffix of a histogram or summary.
fn labels_of(metric: &str) -> Option<&'static [&'static str]> {
    if let Some((_, labels)) = OTHERS.iter().find(|(name, _)| *name == metric) {
        return Some(labels);
    }
    let family = ALL.iter().find(|family| {
        let suffixes: &[&str] = match family.kind {
            Kind::Histogram => &["_bucket", "_sum", "_count"],
            Kind::Summary => &["_sum", "_count"],
            Kind::Counter | Kind::Gauge => &[""],
        };
        suffixes.iter().any(|suffix| metric == format!("{}{suffix}", family.name))
    });
    family.map(|family| family.labels)
}

/// Everything that a query names.
#[derive(Debug, Default)]
struct Names {
    /// Metrics, each with the labels of its selector.
    selectors: Vec<(String, BTreeSet<String>)>,
    /// Labels by which the query groups or matches.
    groupings: BTreeSet<String>,
}

impl Names {
    fn of(query: &str) -> Self {
        let mut names = Self::default();
        names.walk(&parser::parse(query).unwrap_or_else(|error| panic!("{error}: {query}")));
        names
    }

    fn walk(&mut self, expr: &Expr) {
        match expr {
            Expr::Aggregate(aggregate) => {
                self.group(aggregate.modifier.as_ref());
                self.walk(&aggregate.expr);
            }
            Expr::Unary(unary) => self.walk(&unary.expr),
            Expr::Binary(binary) => {
                if let Some(BinModifier { matching, .. }) = &binary.modifier {
                    self.group(matching.as_ref());
                }
                self.walk(&binary.lhs);
                self.walk(&binary.rhs);
            }
            Expr::Paren(paren) => self.walk(&paren.expr),
            Expr::Subquery(subquery) => self.walk(&subquery.expr),
            Expr::VectorSelector(selector) => self.select(selector),
            Expr::MatrixSelector(matrix) => self.select(&matrix.vs),
            Expr::Call(call) => call.args.args.iter().for_each(|arg| self.walk(arg)),
            Expr::NumberLiteral(_) | Expr::StringLiteral(_) | Expr::Extension(_) => {}
        }
    }

    fn group(&mut self, modifier: Option<&LabelModifier>) {
        if let Some(LabelModifier::Include(labels) | LabelModifier::Exclude(labels)) = modifier {
            self.groupings.extend(labels.labels.iter().cloned());
        }
    }

    fn select(&mut self, selector: &VectorSelector) {
        let labels = selector.matchers.matchers.iter().map(|matcher| matcher.name.clone()).collect();
        self.selectors.push((selector.name.clone().expect("a selector without a name"), labels));
    }
}

/// Panics if a query uses a metric or a label that nobody exports.
fn check_query(at: &str, query: &str) {
    let names = Names::of(query);
    assert!(!names.selectors.is_empty(), "{at}: {query}");
    let mut known: BTreeSet<&str> = ADDED.into();
    for (metric, labels) in &names.selectors {
        let exported = labels_of(metric).unwrap_or_else(|| panic!("{at}: no metric {metric}: {query}"));
        for label in labels {
            let found = exported.contains(&label.as_str()) || ADDED.contains(&label.as_str());
            assert!(found, "{at}: {metric} has no label {label}: {query}");
        }
        known.extend(exported);
    }
    for label in &names.groupings {
        assert!(known.contains(label.as_str()), "{at}: no metric of the query has the label {label}: {query}");
    }
}

fn text(value: &Value) -> &str {
    value.as_str().unwrap_or_else(|| panic!("no text: {value}"))
}

#[test]
fn every_alert_asks_for_what_is_exported_and_leads_to_its_section() {
    let document = include_str!("../../../docs/TROUBLESHOOTING.md");
    for rule in rules() {
        let name = text(&rule["alert"]);
        check_query(name, text(&rule["expr"]));
        let annotations = &rule["annotations"];
        assert!(!text(&annotations["summary"]).is_empty() && !text(&annotations["description"]).is_empty(), "{name}");
        assert_eq!(text(&annotations["runbook_url"]), format!("docs/TROUBLESHOOTING.md#{}", name.to_lowercase()));
        assert!(document.contains(&format!("\n### `{name}`\n")), "docs/TROUBLESHOOTING.md has no section for {name}");
        assert!(["warning", "critical"].contains(&text(&rule["labels"]["severity"])), "{name}");
    }
}

#[test]
fn every_alert_has_a_case_in_which_it_fires_and_one_in_which_it_is_silent() {
    let file: Value =
        serde_saphyr::from_str(&fs::read_to_string(monitoring().join("rules_test.yaml")).unwrap()).unwrap();
    let (mut fires, mut silent): (BTreeMap<&str, usize>, BTreeMap<&str, usize>) = Default::default();
    for case in file["tests"].as_array().unwrap() {
        let name = text(&case["name"]).split(':').next().unwrap();
        for expected in case["promql_expr_test"].as_array().into_iter().flatten() {
            let fired = !expected["exp_samples"].as_array().unwrap().is_empty();
            *if fired { &mut fires } else { &mut silent }.entry(name).or_default() += 1;
        }
    }
    for rule in rules() {
        let name = text(&rule["alert"]);
        assert!(fires.contains_key(name) && silent.contains_key(name), "{name}");
    }
}

#[test]
fn promtool_finds_no_fault_in_the_alerts() {
    let Some(promtool) = prometheus::program("promtool") else {
        println!("skipped: there is no promtool; cargo xtask setup unpacks it");
        return;
    };
    for args in [["check", "rules", "rules.yaml"], ["test", "rules", "rules_test.yaml"]] {
        let output = Command::new(&promtool).args(args).current_dir(monitoring()).output().unwrap();
        let text = String::from_utf8_lossy(&output.stdout) + String::from_utf8_lossy(&output.stderr);
        assert!(output.status.success(), "{args:?}: {text}");
    }
}

#[test]
fn every_panel_asks_for_what_is_exported_and_says_what_it_shows() {
    let mut uids = BTreeSet::new();
    for entry in fs::read_dir(monitoring().join("dashboards")).unwrap() {
        let path = entry.unwrap().path();
        let dashboard: Value = serde_json::from_str(&fs::read_to_string(&path).unwrap()).unwrap();
        let title = text(&dashboard["title"]);
        assert!(uids.insert(text(&dashboard["uid"]).to_owned()), "{title}");
        assert_eq!(dashboard["editable"], Value::Bool(false), "{title}");
        let variables: Vec<&str> =
            dashboard["templating"]["list"].as_array().unwrap().iter().map(|v| text(&v["name"])).collect();
        assert!(
            ["datasource", "job", "instance"].iter().all(|name| variables.contains(name)),
            "{title}: {variables:?}"
        );
        for panel in dashboard["panels"].as_array().unwrap().iter().filter(|panel| panel["type"] != "row") {
            let at = format!("{title}: {}", text(&panel["title"]));
            assert!(!text(&panel["description"]).is_empty(), "{at}");
            assert!(!text(&panel["fieldConfig"]["defaults"]["unit"]).is_empty(), "{at}");
            assert_eq!(text(&panel["datasource"]["uid"]), "${datasource}", "{at}");
            for target in panel["targets"].as_array().unwrap() {
                let query = text(&target["expr"]);
                assert!(query.contains("job=~\"$job\", instance=~\"$instance\""), "{at}: {query}");
                check_query(&at, &query.replace("$__rate_interval", "5m"));
            }
        }
    }
    assert_eq!(uids.len(), 3);
}

#[test]
fn a_query_for_what_nobody_exports_is_found() {
    let refused = |query: &'static str| std::panic::catch_unwind(|| check_query("test", query)).is_err();
    assert!(refused("breaker_stat"));
    assert!(refused("breaker_state{namespace=\"a\"}"));
    assert!(refused("sum by (pod) (breaker_state)"));
    assert!(refused("breaker_check_time_seconds"));
    assert!(!refused("sum by (breaker) (rate(breaker_check_time_seconds_sum{role=\"primary\"}[5m]))"));
}
