//! Keeps the rows of the page current while somebody looks, and asks nothing of the main loop otherwise.

use std::{
    collections::{BTreeMap, BTreeSet},
    sync::Arc,
    time::Duration,
};

use breaker_api::{
    events::EventLine,
    status::{ServiceStatus, SuspendedPath},
};
use breaker_core::model::ServiceName;
use breaker_web::hub::{Hub, Update};
use tokio::{
    sync::{mpsc, watch},
    time::{MissedTickBehavior, interval},
};

use super::{super::ask, rows};
use crate::{clock, command::Command};

/// Time between two requests for a part of the services, in which the main loop does its own work.
pub(super) const TURN: Duration = Duration::from_millis(100);
/// All services are read once in this many turns, or in as many as they need.
const CYCLE: u32 = 10;
/// Services that the main loop describes at once.
pub(super) const PART: usize = 100;
/// Services of a burst of events that are read at once. The next cycle reads the others.
const MOST_AT_ONCE: usize = 50;

struct Feed {
    hub: Arc<Hub>,
    node: String,
    commands: mpsc::Sender<Command>,
    /// Where the next part begins.
    after: Option<ServiceName>,
    /// Names of the services that this cycle has read so far, and how many of them are open.
    read: BTreeSet<String>,
    open: usize,
    /// Interfaces on which connections are left to kube-proxy, as of the last cycle.
    suspended: Vec<SuspendedPath>,
    /// Id of the last event that was read.
    last_event: u64,
}

/// Runs until the main loop ends.
pub(super) async fn run(
    hub: Arc<Hub>,
    node: String,
    commands: mpsc::Sender<Command>,
    mut latest: watch::Receiver<u64>,
) {
    let mut readers = hub.readers();
    let (read, suspended) = (BTreeSet::new(), Vec::new());
    let mut feed = Feed { hub, node, commands, after: None, read, open: 0, suspended, last_event: 0 };
    loop {
        feed.hub.rest();
        if readers.wait_for(|readers| *readers > 0).await.is_err() {
            return;
        }
        let mut turn = interval(TURN);
        turn.set_missed_tick_behavior(MissedTickBehavior::Delay);
        // Turns that this cycle has used, and turns until the next one.
        let (mut used, mut rest) = (0, 0);
        // Events are read at once, but at most once in a turn: under load, they come by the hundred.
        let (mut has_events, mut may_read_events) = (true, true);
        while *readers.borrow_and_update() > 0 {
            if has_events && may_read_events {
                may_read_events = false;
                has_events = !feed.publish_events().await;
            }
            tokio::select! {
                _ = turn.tick() => {
                    may_read_events = true;
                    if rest > 0 {
                        rest -= 1;
                        continue;
                    }
                    used += 1;
                    if feed.publish_part().await {
                        rest = CYCLE.saturating_sub(used);
                        used = 0;
                    }
                }
                changed = latest.changed() => {
                    if changed.is_err() {
                        return;
                    }
                    has_events = true;
                }
            }
        }
        feed.begin_cycle();
    }
}

impl Feed {
    fn begin_cycle(&mut self) {
        self.after = None;
        self.read.clear();
        self.open = 0;
    }

    /// Reads and publishes the next part of the services. Returns whether it was the last one. If the main loop does not
    /// answer, nothing is published: the page then shows how old its data is.
    async fn publish_part(&mut self) -> bool {
        let after = self.after.take();
        let part = ask(&self.commands, |reply| Command::Services { after, most: PART, reply }).await;
        let Some(part) = part else {
            self.begin_cycle();
            return true;
        };
        let is_last = part.len() < PART;
        self.after = part.last().map(|service| ServiceName::new(&service.name));
        self.open += part.iter().filter(|service| rows::is_open(service)).count();
        self.read.extend(part.iter().map(|service| service.name.clone()));
        let mut update = self.update(&part);
        if is_last {
            let Some(agent) = ask(&self.commands, Command::Agent).await else { return true };
            update.nodes = Some(vec![rows::node(&self.node, &agent, self.read.len(), self.open)]);
            update.keep = Some(std::mem::take(&mut self.read));
            self.suspended = agent.datapath.suspended;
            self.begin_cycle();
        }
        self.hub.publish(clock::wall(), update);
        if is_last {
            self.hub.complete();
        }
        is_last
    }

    /// The rows and counts of some services.
    fn update(&self, services: &[ServiceStatus]) -> Update {
        let counts: BTreeMap<_, _> =
            services.iter().map(|service| (service.name.clone(), rows::counts(service))).collect();
        let breakers = services.iter().map(|service| rows::breaker(service, &self.suspended)).collect();
        Update { breakers, counts, ..Update::default() }
    }

    /// Publishes new events, and the rows that they are about. Returns whether the main loop has answered.
    async fn publish_events(&mut self) -> bool {
        let after = self.last_event;
        let Some(events) = ask(&self.commands, |reply| Command::Events { after, reply }).await else { return false };
        self.last_event = events.last().map_or(after, |event| event.id);
        let events: Vec<EventLine> = events.into_iter().filter(rows::is_public).collect();
        if events.is_empty() {
            return true;
        }
        let names: BTreeSet<&str> = events.iter().map(|event| event.service.as_str()).collect();
        let mut services = Vec::new();
        for name in names.into_iter().take(MOST_AT_ONCE).map(str::to_owned) {
            if let Some(Ok(service)) = ask(&self.commands, |reply| Command::Get(name, reply)).await {
                services.push(service);
            }
        }
        let update = Update { events: events.iter().map(rows::event).collect(), ..self.update(&services) };
        self.hub.publish(clock::wall(), update);
        true
    }
}
