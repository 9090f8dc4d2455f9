//! Keeps the rows of the page current while somebody looks, and asks nothing of the main loop otherwise.

use std::{collections::BTreeSet, sync::Arc, time::Duration};

use breaker_api::{events::EventLine, status::ServiceStatus};
use breaker_core::model::ServiceName;
use breaker_web::hub::{Breakers, Hub, Update};
use tokio::{
    sync::{mpsc, watch},
    time::{MissedTickBehavior, interval, sleep},
};

use super::{super::ask, rows};
use crate::{clock, command::Command};

/// Time between two requests for a part of the services, in which the main loop does its own work.
const TURN: Duration = Duration::from_millis(100);
/// All services are read once in this many turns, or in as many as they need.
const CYCLE: u32 = 10;
/// Services that the main loop describes at once.
const PART: usize = 100;
/// Services of a burst of events that are read at once. The next cycle reads the others.
const MOST_AT_ONCE: usize = 50;

struct Feed {
    hub: Arc<Hub>,
    node: String,
    commands: mpsc::Sender<Command>,
    /// The services that this cycle has read so far.
    read: Vec<ServiceStatus>,
    /// Where the next part begins.
    after: Option<ServiceName>,
    /// Id of the last event that was read.
    last_event: u64,
}

/// Runs for as long as the hub exists.
pub(super) async fn run(
    hub: Arc<Hub>,
    node: String,
    commands: mpsc::Sender<Command>,
    mut latest: watch::Receiver<u64>,
) {
    let mut readers = hub.readers();
    let mut feed = Feed { hub, node, commands, read: Vec::new(), after: None, last_event: 0 };
    loop {
        feed.hub.rest();
        if readers.wait_for(|readers| *readers > 0).await.is_err() {
            return;
        }
        feed.publish_events().await;
        let mut turn = interval(TURN);
        turn.set_missed_tick_behavior(MissedTickBehavior::Delay);
        let (mut used, mut rest) = (0, 0);
        while *readers.borrow_and_update() > 0 {
            tokio::select! {
                _ = turn.tick() => {
                    if rest > 0 {
                        rest -= 1;
                        continue;
                    }
                    used += 1;
                    if feed.read_part().await {
                        rest = CYCLE.saturating_sub(used);
                        used = 0;
                    }
                }
                changed = latest.changed() => {
                    if changed.is_err() {
                        return;
                    }
                    feed.publish_events().await;
                    // Under load, events come by the hundred.
                    sleep(TURN).await;
                }
            }
        }
        feed.begin_cycle();
    }
}

impl Feed {
    fn begin_cycle(&mut self) {
        self.read.clear();
        self.after = None;
    }

    /// Reads the next part, and publishes all rows after the last one. Returns whether it was the last one. If the main
    /// loop does not answer, nothing is published: the page then shows how old its data is.
    async fn read_part(&mut self) -> bool {
        let after = self.after.take();
        let part = ask(&self.commands, |reply| Command::Services { after, most: PART, reply }).await;
        let Some(part) = part else {
            self.begin_cycle();
            return true;
        };
        let is_last = part.len() < PART;
        self.after = part.last().map(|service| ServiceName::new(&service.name));
        self.read.extend(part);
        if is_last {
            self.publish_all().await;
            self.begin_cycle();
        }
        is_last
    }

    async fn publish_all(&mut self) {
        let Some(agent) = ask(&self.commands, Command::Agent).await else { return };
        let breakers = self.read.iter().map(|service| rows::breaker(service, &agent.datapath.suspended)).collect();
        let update = Update {
            breakers: Some(Breakers::All(breakers)),
            counts: self.read.iter().map(|service| (service.name.clone(), rows::counts(service))).collect(),
            nodes: Some(vec![rows::node(&self.node, &agent, &self.read)]),
            ..Update::default()
        };
        self.hub.publish(clock::wall(), update);
        self.hub.complete();
    }

    /// Publishes new events, and the rows that they are about.
    async fn publish_events(&mut self) {
        let after = self.last_event;
        let Some(events) = ask(&self.commands, |reply| Command::Events { after, reply }).await else { return };
        self.last_event = events.last().map_or(after, |event| event.id);
        let events: Vec<EventLine> = events.into_iter().filter(rows::is_public).collect();
        if events.is_empty() {
            return;
        }
        let names: BTreeSet<&str> = events.iter().map(|event| event.service.as_str()).collect();
        let mut breakers = Vec::new();
        for name in names.into_iter().take(MOST_AT_ONCE).map(str::to_owned) {
            if let Some(Ok(service)) = ask(&self.commands, |reply| Command::Get(name, reply)).await {
                breakers.push(rows::breaker(&service, &[]));
            }
        }
        let update = Update {
            breakers: Some(Breakers::Some(breakers)),
            events: events.iter().map(rows::event).collect(),
            ..Update::default()
        };
        self.hub.publish(clock::wall(), update);
    }
}
