//! Publishes rows when something changed, and numbers once a second while somebody looks.

use std::{
    collections::{BTreeMap, BTreeSet},
    sync::Arc,
    time::Duration,
};

use breaker_web::{
    hub::{Breakers, Hub, Update},
    rows::Message,
};
use jiff::Timestamp;
use kube::Client;
use tokio::{
    sync::mpsc,
    task::AbortHandle,
    time::{Instant, MissedTickBehavior, interval, sleep, timeout},
};

use super::{agents::Agents, numbers::Numbers, rows, world::World};

/// How often the numbers are published, and the API server is asked whether it is there.
const SECOND: Duration = Duration::from_secs(1);
/// Changes are collected for this long.
const BATCH: Duration = Duration::from_millis(50);
/// Agents whose numbers are read, at most. More would be a connection through the API server for each node.
const MOST_AGENTS: usize = 16;
/// How often new agents are looked for, and those tried again that failed.
const SEARCH: Duration = Duration::from_secs(15);
/// What the agents that answer within this time have counted before belongs to the sums.
const BEGINNING: Duration = Duration::from_secs(8);

/// The agents' part of the page.
struct Followed {
    agents: Arc<Agents>,
    numbers: Numbers,
    streams: BTreeMap<String, AbortHandle>,
    fill: BTreeMap<String, u8>,
    /// Why numbers are missing.
    problems: BTreeMap<String, String>,
    messages: mpsc::Sender<FromAgent>,
    begun: Instant,
}

/// What comes from a node's agent: a message, or why there are none.
type FromAgent = (String, Result<Box<Message>, String>);

/// Runs for as long as the program does.
pub(super) async fn run(hub: Arc<Hub>, client: Client, world: Arc<World>, agents: Arc<Agents>) {
    let mut readers = hub.readers();
    let (messages, mut from_agents) = mpsc::channel(64);
    let mut followed = Followed {
        agents,
        numbers: Numbers::default(),
        streams: BTreeMap::new(),
        fill: BTreeMap::new(),
        problems: BTreeMap::new(),
        messages,
        begun: Instant::now(),
    };
    let mut second = interval(SECOND);
    second.set_missed_tick_behavior(MissedTickBehavior::Delay);
    let mut search = interval(SEARCH);
    let mut last_event = 0;
    loop {
        tokio::select! {
            () = world.changed.notified() => {
                sleep(BATCH).await;
                publish_rows(&hub, &world, &followed, &mut last_event);
            }
            Some((node, message)) = from_agents.recv() => followed.take(node, message),
            _ = search.tick() => {
                if *readers.borrow_and_update() > 0 {
                    followed.search().await;
                } else {
                    followed.stop();
                }
            }
            _ = second.tick() => {
                if *readers.borrow_and_update() == 0 {
                    continue;
                }
                if followed.streams.is_empty() && followed.problems.is_empty() {
                    followed.search().await;
                }
                // A watch does not tell whether the API server is still there.
                if matches!(timeout(SECOND, client.apiserver_version()).await, Ok(Ok(_))) {
                    publish_rows(&hub, &world, &followed, &mut last_event);
                }
            }
        }
    }
}

fn publish_rows(hub: &Hub, world: &World, followed: &Followed, last_event: &mut u64) {
    let now = Timestamp::now();
    let cluster = rows::Cluster::of(world, followed.fill.clone(), now);
    let mut notes = world.problems();
    let problems: BTreeSet<&String> = followed.problems.values().collect();
    notes.extend(problems.into_iter().map(|why| format!("numbers of connections are missing: {why}")));
    let events = world.take_events();
    let update = Update {
        counts: followed.numbers.of_breakers(&cluster.services()),
        nodes: Some(cluster.nodes()),
        breakers: Some(Breakers::All(cluster.breakers())),
        events: events
            .iter()
            .map(|event| {
                *last_event += 1;
                rows::event(event, *last_event)
            })
            .collect(),
        notes: Some(notes),
    };
    hub.publish(now, update);
    hub.complete();
}

impl Followed {
    fn take(&mut self, node: String, message: Result<Box<Message>, String>) {
        match message {
            Ok(message) => {
                let is_beginning = self.begun.elapsed() < BEGINNING;
                self.numbers.take(&node, &message.counts, is_beginning);
                if let Some(fill) = message.nodes.as_ref().and_then(|nodes| nodes.first()?.fill) {
                    self.fill.insert(node.clone(), fill);
                }
                self.problems.remove(&node);
            }
            Err(why) => {
                self.streams.remove(&node);
                self.fill.remove(&node);
                self.problems.insert(node, why);
            }
        }
    }

    /// Follows the agents that are not followed yet.
    async fn search(&mut self) {
        let nodes = match self.agents.nodes().await {
            Ok(nodes) => nodes,
            Err(error) => {
                self.problems = BTreeMap::from([(String::new(), format!("{error:#}"))]);
                return;
            }
        };
        self.problems.retain(|node, _| nodes.contains(node));
        if nodes.len() > MOST_AGENTS {
            let why = format!("there are {} nodes, and the numbers of {MOST_AGENTS} are summed", nodes.len());
            self.problems.insert(String::new(), why);
        }
        for node in nodes.into_iter().take(MOST_AGENTS) {
            if self.streams.contains_key(&node) {
                continue;
            }
            let (agents, messages, name) = (self.agents.clone(), self.messages.clone(), node.clone());
            let task = tokio::spawn(async move {
                let outcome = agents
                    .follow(&name, |message| {
                        // If the feed is behind, the next message has newer counts of most services.
                        let _ = messages.try_send((name.clone(), Ok(Box::new(message))));
                    })
                    .await;
                let why = outcome.err().map(|error| format!("{error:#}")).unwrap_or_default();
                let _ = messages.send((name, Err(why))).await;
            });
            self.streams.insert(node, task.abort_handle());
        }
    }

    /// Nobody looks: the agents need not count.
    fn stop(&mut self) {
        std::mem::take(&mut self.streams).into_values().for_each(|stream| stream.abort());
    }
}
