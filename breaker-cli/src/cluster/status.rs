//! `kubectl breaker status` and `get`.

use std::fmt::Write as _;

use anyhow::{Result, bail};
use breaker_api::crd::{CircuitBreaker, Override, ReportedState};
use futures_util::TryStreamExt as _;
use jiff::Timestamp;
use kube::{
    ResourceExt as _,
    runtime::{WatchStreamExt as _, watcher},
};

use super::{
    args::{GetArgs, StatusArgs, StatusOutput},
    connection::Connection,
    nodes,
    overview::{self, BreakerView, Overview},
};
use crate::{
    output::{Output, out, print},
    show::ago,
    table::{Cell, Paint, Table, YELLOW, plain},
    visible::visible,
};

pub(super) async fn run(connection: &Connection, args: &StatusArgs) -> Result<()> {
    if args.watch {
        if !matches!(args.output, StatusOutput::Table | StatusOutput::Name) {
            bail!("--watch: not allowed with this format; allowed: table, name");
        }
        return watch(connection, args).await;
    }
    let mut overview = overview::read(connection).await?;
    if !args.names.is_empty() {
        let known = |name: &String| overview.circuit_breakers.iter().any(|breaker| breaker.name == *name);
        if let Some(unknown) = args.names.iter().find(|name| !known(name)) {
            bail!("there is no CircuitBreaker {unknown} here; `kubectl breaker -A` shows those of all namespaces");
        }
        overview.circuit_breakers.retain(|breaker| args.names.contains(&breaker.name));
        for node in &mut overview.nodes {
            node.report.services.retain(|service| args.names.contains(&service.name));
            node.report.refused.clear();
        }
    }
    let paint = Paint::for_stdout();
    match args.output {
        StatusOutput::Table => {
            out(&table(&visible(&overview)?, connection.namespace.is_none(), args.no_headers, paint))
        }
        StatusOutput::Wide => out(&nodes::overview(&visible(&overview)?, paint)),
        StatusOutput::Json => print(Output::Json, &overview),
        StatusOutput::Yaml => print(Output::Yaml, &overview),
        StatusOutput::Name => out(&overview.circuit_breakers.iter().map(name_line).collect::<String>()),
    }
}

pub(super) async fn get(connection: &Connection, args: &GetArgs) -> Result<()> {
    let (_, namespace, name) = connection.one(&args.name);
    let breaker = connection.breaker(&args.name).await?;
    let mut overview = overview::read(connection).await?;
    overview.circuit_breakers = vec![breaker.into()];
    for node in &mut overview.nodes {
        node.report.services.retain(|service| service.namespace == namespace && service.name == name);
        node.report.refused.clear();
    }
    overview.nodes.retain(|node| !node.report.services.is_empty());
    print(args.output, &overview)
}

fn name_line(breaker: &BreakerView) -> String {
    format!("circuitbreaker.breaker.dev/{}\n", breaker.name)
}

/// Prints a line for each change, until interrupted.
async fn watch(connection: &Connection, args: &StatusArgs) -> Result<()> {
    let paint = Paint::for_stdout();
    let all = connection.namespace.is_none();
    let mut changes = std::pin::pin!(
        watcher(connection.api::<CircuitBreaker>(), watcher::Config::default()).default_backoff().applied_objects()
    );
    let mut first = !args.no_headers;
    while let Some(breaker) = changes.try_next().await? {
        if !args.names.is_empty() && !args.names.contains(&breaker.name_any()) {
            continue;
        }
        let breaker = visible(&BreakerView::from(breaker))?;
        if args.output == StatusOutput::Name {
            out(&name_line(&breaker))?;
            continue;
        }
        // A table is as wide as its widest cells, and those that follow are not known yet.
        let mut table = Table::new(if std::mem::take(&mut first) { head(all) } else { &[] });
        table.set_least_widths(if all { &[12, 16, 12, 8, 16] } else { &[16, 12, 8, 16] });
        table.row(row(&breaker, all));
        out(&table.print(paint))?;
    }
    Ok(())
}

const HEAD: &[&str] =
    &["NAMESPACE", "NAME", "STATE", "SINCE", "REASON", "SHARE", "OPEN ON", "BACKUP", "OVERRIDE", "MESSAGE"];

const fn head(all_namespaces: bool) -> &'static [&'static str] {
    if all_namespaces { HEAD } else { HEAD.split_at(1).1 }
}

/// A table with a line for each breaker, and below it a line for each problem.
fn table(overview: &Overview, all_namespaces: bool, no_headers: bool, paint: Paint) -> String {
    let mut text = String::new();
    let annotated = overview.nodes.iter().flat_map(|node| &node.report.services).any(nodes::is_annotated);
    if overview.circuit_breakers.is_empty() && !annotated {
        text.push_str(if all_namespaces {
            "no Service is protected\n"
        } else {
            "no Service is protected in this namespace; -A shows all\n"
        });
    } else if !overview.circuit_breakers.is_empty() {
        let mut table = Table::new(if no_headers { &[] } else { head(all_namespaces) });
        let mut breakers: Vec<&BreakerView> = overview.circuit_breakers.iter().collect();
        breakers.sort_by_key(|breaker| (attention(breaker), breaker.namespace.clone(), breaker.name.clone()));
        breakers.iter().for_each(|breaker| table.row(row(breaker, all_namespaces)));
        text.push_str(&table.print(paint));
    }
    if annotated {
        text.push_str("Services protected by annotations are in `kubectl breaker status -o wide`\n");
    }
    for breaker in &overview.circuit_breakers {
        text.push_str(&nodes::problems(breaker, paint));
    }
    text.push_str(&nodes::problems_of_nodes(overview, paint));
    if let Some(why) = &overview.nodes_missing {
        let _ = writeln!(text, "{}", paint.with(YELLOW, &format!("without the nodes' own views: {why}")));
    }
    text
}

/// Sort key: what needs attention comes first.
fn attention(breaker: &BreakerView) -> u8 {
    let state = breaker.status.as_ref().and_then(|status| status.state);
    match state {
        Some(ReportedState::Open | ReportedState::NotProtected) => 0,
        Some(ReportedState::HalfOpen) => 1,
        _ if breaker.spec.r#override != Override::Auto => 2,
        None | Some(ReportedState::Unknown | ReportedState::NotProgrammed) => 3,
        Some(ReportedState::Closed) => 4,
    }
}

fn row(breaker: &BreakerView, all_namespaces: bool) -> Vec<Cell> {
    let status = breaker.status.clone().unwrap_or_default();
    let state = status.state.unwrap_or_default();
    let label = if status.state.is_none() { "no status yet" } else { state.label() };
    let mut cells = if all_namespaces { vec![plain(&breaker.namespace)] } else { Vec::new() };
    cells.extend([
        plain(&breaker.name),
        (label.to_owned(), Some(nodes::state_colour(state))),
        plain(status.since.map(ago).unwrap_or_default()),
        plain(status.reason.unwrap_or_default()),
        plain(status.share.unwrap_or_default()),
        plain(status.open.unwrap_or_default()),
        plain(status.backup.unwrap_or_default()),
        plain(override_text(breaker)),
        plain(breaker.override_reason.clone().filter(|_| is_forced(breaker)).or(status.message).unwrap_or_default()),
    ]);
    cells
}

fn is_forced(breaker: &BreakerView) -> bool {
    breaker.spec.r#override != Override::Auto
}

/// The override of a breaker, with its end.
fn override_text(breaker: &BreakerView) -> String {
    match (breaker.spec.r#override, breaker.spec.until) {
        (Override::Auto, _) => String::new(),
        (override_, None) => override_.label().to_owned(),
        (override_, Some(until)) if until <= Timestamp::now() => format!("{} (ended)", override_.label()),
        (override_, Some(until)) => format!("{} until {until:.0}", override_.label()),
    }
}
