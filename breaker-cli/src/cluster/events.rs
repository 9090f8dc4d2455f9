//! `kubectl breaker events`: the Events that the agents publish about breakers. They are read by the core API, which the
//! cluster's role `view` allows; it does not allow events.k8s.io.

use anyhow::Result;
use breaker_api::crd::GROUP;
use futures_util::TryStreamExt as _;
use jiff::Timestamp;
use k8s_openapi::api::core::v1::Event;
use kube::{
    api::ListParams,
    runtime::{WatchStreamExt as _, watcher},
};

use super::{
    args::EventsArgs,
    connection::{Connection, explain},
};
use crate::{
    output::{TableOutput, out, print_as},
    show::ago,
    table::{Cell, Paint, Table, YELLOW, plain},
    visible::visible,
};

pub(super) async fn run(connection: &Connection, args: &EventsArgs) -> Result<()> {
    let api = connection.api::<Event>();
    let all = connection.namespace.is_none();
    let list = api.list(&ListParams::default()).await.map_err(|error| explain(error, "list Events"))?;
    let mut events: Vec<Event> = list.items.into_iter().filter(|event| is_ours(event, args)).collect();
    events.sort_by_key(last);
    let paint = Paint::for_stdout();
    if !args.watch {
        return print_as(args.output, &events, || Ok(text(&visible(&events)?, all, paint)));
    }
    show(&events, args.output, all, paint)?;
    let from = events.last().map(last).unwrap_or_default();
    let mut changes = std::pin::pin!(watcher(api, watcher::Config::default()).default_backoff().applied_objects());
    while let Some(event) = changes.try_next().await? {
        if is_ours(&event, args) && last(&event) > from {
            show(&[event], args.output, all, paint)?;
        }
    }
    Ok(())
}

/// Prints Events as they come: lines without headings.
fn show(events: &[Event], output: TableOutput, all: bool, paint: Paint) -> Result<()> {
    match output {
        TableOutput::Table => {
            let mut table = Table::new(&[]);
            visible(&events.to_vec())?.iter().for_each(|event| table.row(row(event, all)));
            out(&table.print(paint))
        }
        TableOutput::Json | TableOutput::Yaml => {
            events.iter().try_for_each(|event| print_as(output, event, || Ok(String::new())))
        }
    }
}

/// Whether an Event comes from breaker and is about what was asked for.
fn is_ours(event: &Event, args: &EventsArgs) -> bool {
    let name = event.involved_object.name.as_deref();
    event.reporting_component.as_deref() == Some(GROUP) && args.name.as_deref().is_none_or(|asked| name == Some(asked))
}

/// When an Event happened last. A series counts repetitions.
pub(super) fn last(event: &Event) -> Timestamp {
    let series = event.series.as_ref().and_then(|series| series.last_observed_time.as_ref()).map(|time| time.0);
    let times = [series, event.event_time.as_ref().map(|time| time.0)];
    times.into_iter().flatten().max().unwrap_or_default()
}

fn text(events: &[Event], all: bool, paint: Paint) -> String {
    if events.is_empty() {
        return "no Events; the API server keeps them for an hour, unless it is configured otherwise\n".into();
    }
    let head = ["NAMESPACE", "AGO", "NAME", "REASON", "COUNT", "NOTE"];
    let mut table = Table::new(if all { &head } else { &head[1..] });
    events.iter().for_each(|event| table.row(row(event, all)));
    table.print(paint)
}

fn row(event: &Event, all: bool) -> Vec<Cell> {
    let about = &event.involved_object;
    let count = event.series.as_ref().and_then(|series| series.count).unwrap_or(1);
    let text = |text: &Option<String>| plain(text.clone().unwrap_or_default());
    let is_warning = event.type_.as_deref() == Some("Warning");
    let mut cells = if all { vec![text(&about.namespace)] } else { Vec::new() };
    cells.extend([
        plain(ago(last(event))),
        text(&about.name),
        (event.reason.clone().unwrap_or_default(), is_warning.then_some(YELLOW)),
        plain(count.to_string()),
        text(&event.message),
    ]);
    cells
}
