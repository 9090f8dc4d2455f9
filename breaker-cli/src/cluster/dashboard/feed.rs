//! Publishes rows when something changed, and numbers once a second while somebody looks.

use std::{
    collections::{BTreeMap, BTreeSet},
    sync::Arc,
    time::Duration,
};

use breaker_web::hub::{Hub, Update};
use jiff::Timestamp;
use kube::Client;
use tokio::{
    sync::mpsc,
    task::AbortHandle,
    time::{Instant, MissedTickBehavior, interval, sleep, timeout},
};

use super::{
    agents::{AgentMessage, Agents},
    numbers::{Earlier, Numbers},
    rows,
    world::World,
};

/// How often the numbers are published, and the API server is asked whether it is there.
const SECOND: Duration = Duration::from_secs(1);
/// Changes are collected for this long.
const BATCH: Duration = Duration::from_millis(50);
/// Agents whose numbers are read, at most. More would be a connection through the API server for each node.
const MOST_AGENTS: usize = 16;
/// How often new agents are looked for, and those tried again that failed.
const SEARCH: Duration = Duration::from_secs(15);
/// The sums include the earlier counts of agents that answer within this time.
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
    /// Something changed that is shown for each node.
    has_news: bool,
    /// When the agents were first asked.
    begun: Option<Instant>,
}

/// A node, with a message of its agent or the reason why there are none.
type FromAgent = (String, Result<AgentMessage, String>);

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
        has_news: false,
        begun: None,
    };
    let mut second = interval(SECOND);
    second.set_missed_tick_behavior(MissedTickBehavior::Delay);
    let mut search = interval(SEARCH);
    search.set_missed_tick_behavior(MissedTickBehavior::Delay);
    let mut published = Published::default();
    loop {
        tokio::select! {
            () = world.changed.notified() => {
                sleep(BATCH).await;
                published.rows(&hub, &world, &followed);
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
                    published.numbers(&hub, &world, &followed);
                    followed.has_news = false;
                }
            }
        }
    }
}

/// The published data that later messages need.
#[derive(Default)]
struct Published {
    last_event: u64,
    /// The breaker of each service.
    breakers: BTreeMap<String, String>,
    rows_at: Option<Instant>,
}

impl Published {
    /// Publishes everything.
    fn rows(&mut self, hub: &Hub, world: &World, followed: &Followed) {
        if !world.is_complete() {
            return;
        }
        let now = Timestamp::now();
        let cluster = rows::Cluster::of(world, followed.fill.clone(), now);
        self.breakers = cluster.services();
        self.rows_at = Some(Instant::now());
        let events = world.take_events();
        let events = events.iter().map(|event| {
            self.last_event += 1;
            rows::event(event, self.last_event)
        });
        let update = Update {
            events: events.collect(),
            nodes: Some(cluster.nodes()),
            counts: followed.numbers.of_breakers(&self.breakers),
            notes: Some(notes(world, followed)),
            ..Update::of_all(cluster.breakers())
        };
        hub.publish(now, update);
        hub.complete();
    }

    /// Publishes the numbers; everything if that was long ago, because nodes fall silent without a change.
    fn numbers(&mut self, hub: &Hub, world: &World, followed: &Followed) {
        if self.rows_at.is_none_or(|at| at.elapsed() >= SEARCH) || followed.has_news {
            return self.rows(hub, world, followed);
        }
        let counts = followed.numbers.of_breakers(&self.breakers);
        hub.publish(Timestamp::now(), Update { counts, notes: Some(notes(world, followed)), ..Update::default() });
    }
}

/// The reasons why the page is incomplete.
fn notes(world: &World, followed: &Followed) -> Vec<String> {
    let mut notes = world.problems();
    let problems: BTreeSet<&String> = followed.problems.values().collect();
    notes.extend(problems.into_iter().map(|why| format!("connection counts are incomplete: {why}")));
    notes
}

impl Followed {
    fn take(&mut self, node: String, message: Result<AgentMessage, String>) {
        match message {
            Ok(message) => {
                let earlier = match (message.is_first, self.begun) {
                    (false, _) => Earlier::Known,
                    (true, Some(begun)) if begun.elapsed() < BEGINNING => Earlier::Added,
                    (true, _) => Earlier::LeftOut,
                };
                self.numbers.take(&node, &message.counts, earlier);
                if let Some(fill) = message.nodes.first().and_then(|node| node.fill) {
                    self.has_news |= self.fill.insert(node.clone(), fill) != Some(fill);
                }
                self.problems.remove(&node);
            }
            Err(why) => {
                self.streams.remove(&node);
                self.forget(&node);
                self.problems.insert(node, why);
            }
        }
    }

    /// Follows the agents that are not followed yet.
    async fn search(&mut self) {
        self.begun.get_or_insert_with(Instant::now);
        let nodes = match self.agents.nodes().await {
            Ok(nodes) => nodes,
            Err(error) => {
                self.problems = BTreeMap::from([(String::new(), format!("{error:#}"))]);
                return;
            }
        };
        self.problems.retain(|node, _| nodes.contains(node));
        if nodes.len() > MOST_AGENTS {
            let why = format!("they cover {MOST_AGENTS} of {} nodes", nodes.len());
            self.problems.insert(String::new(), why);
        }
        for node in nodes.into_iter().take(MOST_AGENTS) {
            if self.streams.contains_key(&node) {
                continue;
            }
            let (agents, messages, name) = (self.agents.clone(), self.messages.clone(), node.clone());
            let task = tokio::spawn(async move {
                let outcome =
                    agents.follow(&name, |message| messages.try_send((name.clone(), Ok(message))).is_ok()).await;
                let why = outcome.err().map(|error| format!("{error:#}")).unwrap_or_default();
                let _ = messages.send((name, Err(why))).await;
            });
            self.streams.insert(node, task.abort_handle());
        }
    }

    /// Ends the streams: nobody looks, so the agents need not count.
    fn stop(&mut self) {
        for (node, stream) in std::mem::take(&mut self.streams) {
            stream.abort();
            self.forget(&node);
        }
    }

    /// Drops the data of a node, because it is not current any more.
    fn forget(&mut self, node: &str) {
        self.fill.remove(node);
        self.numbers.forget(node);
        self.has_news = true;
    }
}
