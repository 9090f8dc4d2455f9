//! Keeps the rows of a page, and hands every change to every reader.

use std::{
    collections::{BTreeMap, BTreeSet, VecDeque},
    sync::{Arc, Mutex, MutexGuard, PoisonError},
};

use jiff::Timestamp;
use tokio::sync::{broadcast, watch};

use crate::rows::{BreakerRow, Counts, EventRow, Message, NodeRow, Scope};

/// Readers at the same time, at most.
pub const MOST_READERS: usize = 32;
/// Events that a new reader gets.
const KEPT_EVENTS: usize = 500;
/// Messages that a reader may be behind. One that is further behind begins anew.
const BACKLOG: usize = 64;

/// What a producer tells the hub.
#[derive(Debug, Default)]
pub struct Update {
    /// New and changed breakers; those that have not changed do no harm.
    pub breakers: Vec<BreakerRow>,
    /// Keys of all breakers: what is not in it is gone. `None`: nothing is gone.
    pub keep: Option<BTreeSet<String>>,
    /// Counts by [`BreakerRow::key`]; those that are not in it stay.
    pub counts: BTreeMap<String, Counts>,
    /// All nodes.
    pub nodes: Option<Vec<NodeRow>>,
    /// New events, oldest first.
    pub events: Vec<EventRow>,
    /// What the page cannot show, and why.
    pub notes: Option<Vec<String>>,
}

impl Update {
    /// An update with all breakers: the others are gone.
    #[must_use]
    pub fn of_all(breakers: Vec<BreakerRow>) -> Self {
        Self { keep: Some(breakers.iter().map(BreakerRow::key).collect()), breakers, ..Self::default() }
    }
}

/// The rows of a page, with its readers.
#[derive(Debug)]
pub struct Hub {
    scope: Scope,
    /// Another one for each hub, because ids of events begin anew with the agent.
    run: i64,
    rows: Mutex<Rows>,
    messages: broadcast::Sender<Arc<Encoded>>,
    readers: watch::Sender<usize>,
    is_complete: watch::Sender<bool>,
}

/// A message as JSON.
#[derive(Debug)]
pub(crate) struct Encoded {
    /// Run and id of the last event that the readers of this message know, for `Last-Event-ID`.
    pub id: String,
    last_event: u64,
    /// The [`Message`].
    pub json: String,
}

#[derive(Debug, Default)]
struct Rows {
    breakers: BTreeMap<String, BreakerRow>,
    counts: BTreeMap<String, Counts>,
    nodes: Vec<NodeRow>,
    events: VecDeque<EventRow>,
    notes: Vec<String>,
    at: Timestamp,
}

impl Hub {
    /// A hub without rows.
    #[must_use]
    pub fn new(scope: Scope) -> Arc<Self> {
        Arc::new(Self {
            scope,
            run: Timestamp::now().as_microsecond(),
            rows: Mutex::default(),
            messages: broadcast::channel(BACKLOG).0,
            readers: watch::channel(0).0,
            is_complete: watch::channel(false).0,
        })
    }

    /// Number of readers, for a producer that rests while there are none.
    #[must_use]
    pub fn readers(&self) -> watch::Receiver<usize> {
        self.readers.subscribe()
    }

    /// The producer rests: the rows grow old. New readers wait for [`Self::complete`].
    pub fn rest(&self) {
        self.is_complete.send_replace(false);
    }

    /// The producer has published everything at least once.
    pub fn complete(&self) {
        self.is_complete.send_replace(true);
    }

    /// Takes an update in and hands what changed to the readers. An update without a change tells them that the data is
    /// still current. `at`: when the data was current.
    pub fn publish(&self, at: Timestamp, update: Update) {
        let mut rows = self.rows();
        let message = rows.take_in(at, update);
        if self.messages.receiver_count() > 0 {
            // The lock is held, so that a reader who begins now gets this message either in its first one or after it.
            let _ = self.messages.send(Arc::new(self.encode(&message, rows.last_event())));
        }
    }

    /// A reader that knows the events up to those of `last_id`, the id of a message. `None`: there are too many readers.
    pub(crate) fn read(self: &Arc<Self>, last_id: &str) -> Option<Reader> {
        let known = last_id.split_once('-').filter(|(run, _)| run.parse() == Ok(self.run));
        let last_event = known.and_then(|(_, id)| id.parse().ok()).unwrap_or(0);
        let mut admitted = false;
        self.readers.send_modify(|readers| {
            admitted = *readers < MOST_READERS;
            *readers += usize::from(admitted);
        });
        admitted.then(|| Reader {
            hub: self.clone(),
            messages: None,
            is_complete: self.is_complete.subscribe(),
            last_event,
        })
    }

    fn encode(&self, message: &Message, last_event: u64) -> Encoded {
        // A message consists of strings, numbers and times only, so this cannot fail.
        let json = serde_json::to_string(message).unwrap_or_default();
        Encoded { id: format!("{}-{last_event}", self.run), last_event, json }
    }

    fn rows(&self) -> MutexGuard<'_, Rows> {
        self.rows.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Rows {
    fn take_in(&mut self, at: Timestamp, update: Update) -> Message {
        self.at = at;
        let mut message = Message::new(at);
        if let Some(keep) = update.keep {
            message.removed = self.breakers.keys().filter(|key| !keep.contains(*key)).cloned().collect();
            message.removed.iter().for_each(|key| self.forget(key));
        }
        for row in update.breakers {
            let key = row.key();
            if self.breakers.get(&key) != Some(&row) {
                self.breakers.insert(key, row.clone());
                message.breakers.push(row);
            }
        }
        for (key, counts) in update.counts {
            if self.counts.get(&key) != Some(&counts) {
                self.counts.insert(key.clone(), counts);
                message.counts.insert(key, counts);
            }
        }
        message.nodes = update.nodes.filter(|nodes| *nodes != self.nodes);
        if let Some(nodes) = &message.nodes {
            self.nodes.clone_from(nodes);
        }
        message.notes = update.notes.filter(|notes| *notes != self.notes);
        if let Some(notes) = &message.notes {
            self.notes.clone_from(notes);
        }
        self.events.extend(update.events.iter().cloned());
        self.events.drain(..self.events.len().saturating_sub(KEPT_EVENTS));
        message.events = update.events;
        message
    }

    /// Id of the last event; 0 if there was none.
    fn last_event(&self) -> u64 {
        self.events.back().map_or(0, |event| event.id)
    }

    fn forget(&mut self, key: &str) {
        self.breakers.remove(key);
        self.counts.remove(key);
    }

    /// Everything, for a reader that knows the events up to `last_event`.
    fn all(&self, scope: &Scope, last_event: u64) -> Message {
        Message {
            at: self.at,
            now: Some(Timestamp::now()),
            scope: Some(scope.clone()),
            breakers: self.breakers.values().cloned().collect(),
            removed: Vec::new(),
            counts: self.counts.clone(),
            nodes: Some(self.nodes.clone()),
            events: self.events.iter().filter(|event| event.id > last_event).cloned().collect(),
            notes: Some(self.notes.clone()),
        }
    }
}

/// One reader of a hub.
pub(crate) struct Reader {
    hub: Arc<Hub>,
    /// `None` before the first message.
    messages: Option<broadcast::Receiver<Arc<Encoded>>>,
    is_complete: watch::Receiver<bool>,
    last_event: u64,
}

impl Reader {
    /// Waits for the next message. `None`: the hub is gone.
    pub async fn next(&mut self) -> Option<Arc<Encoded>> {
        if let Some(messages) = &mut self.messages {
            match messages.recv().await {
                Ok(message) => {
                    self.last_event = message.last_event;
                    return Some(message);
                }
                Err(broadcast::error::RecvError::Closed) => return None,
                // It was too slow, and begins anew.
                Err(broadcast::error::RecvError::Lagged(_)) => self.messages = None,
            }
        }
        self.is_complete.wait_for(|is_complete| *is_complete).await.ok()?;
        let rows = self.hub.rows();
        self.messages = Some(self.hub.messages.subscribe());
        let first = self.hub.encode(&rows.all(&self.hub.scope, self.last_event), rows.last_event());
        drop(rows);
        self.last_event = first.last_event;
        Some(Arc::new(first))
    }
}

impl Drop for Reader {
    fn drop(&mut self) {
        self.hub.readers.send_modify(|readers| *readers -= 1);
    }
}

#[cfg(test)]
mod tests {
    use breaker_api::crd::ReportedState;

    use super::*;
    use crate::rows::{ScopeKind, Status};

    fn hub() -> Arc<Hub> {
        Hub::new(Scope { kind: ScopeKind::Node, name: "n1".into(), namespace: None, version: "0".into() })
    }

    fn row(name: &str, state: ReportedState) -> BreakerRow {
        BreakerRow { name: name.into(), status: Status { state, ..Status::default() }, ..BreakerRow::default() }
    }

    fn event(id: u64) -> EventRow {
        EventRow {
            id,
            at: Timestamp::UNIX_EPOCH,
            breaker: "a".into(),
            kind: "Transition".into(),
            message: String::new(),
            to: None,
            is_warning: false,
        }
    }

    fn publish(hub: &Hub, update: Update) {
        hub.publish(Timestamp::UNIX_EPOCH, update);
    }

    async fn next(reader: &mut Reader) -> Message {
        serde_json::from_str(&reader.next().await.unwrap().json).unwrap()
    }

    #[tokio::test]
    async fn a_reader_gets_everything_and_then_what_changed() {
        let hub = hub();
        publish(&hub, Update::of_all(vec![row("a", ReportedState::Closed), row("b", ReportedState::Closed)]));
        hub.complete();
        let mut reader = hub.read("").unwrap();
        let first = next(&mut reader).await;
        assert_eq!((first.scope.is_some(), first.breakers.len()), (true, 2));
        publish(&hub, Update::of_all(vec![row("a", ReportedState::Open)]));
        let second = next(&mut reader).await;
        assert_eq!((second.scope, &second.breakers[..]), (None, &[row("a", ReportedState::Open)][..]));
        assert_eq!(second.removed, ["b"]);
        publish(&hub, Update::of_all(vec![row("a", ReportedState::Open)]));
        assert_eq!(next(&mut reader).await, Message::new(Timestamp::UNIX_EPOCH), "still current");
        let counts = BTreeMap::from([("a".to_owned(), Counts { primary: 7, ..Counts::default() })]);
        publish(&hub, Update { counts: counts.clone(), ..Update::default() });
        assert_eq!(next(&mut reader).await.counts, counts);
    }

    #[tokio::test]
    async fn a_reader_that_comes_back_gets_the_events_that_it_missed() {
        let hub = hub();
        hub.complete();
        publish(&hub, Update { events: vec![event(1), event(2), event(3)], ..Update::default() });
        let ids = |message: Message| message.events.iter().map(|event| event.id).collect::<Vec<_>>();
        assert_eq!(ids(next(&mut hub.read("").unwrap()).await), [1, 2, 3]);
        let known = format!("{}-2", hub.run);
        assert_eq!(ids(next(&mut hub.read(&known).unwrap()).await), [3]);
        assert_eq!(ids(next(&mut hub.read("17-2").unwrap()).await), [1, 2, 3], "the agent began anew");
    }

    #[tokio::test]
    async fn a_slow_reader_begins_anew() {
        let hub = hub();
        hub.complete();
        let mut reader = hub.read("").unwrap();
        assert!(next(&mut reader).await.scope.is_some());
        for number in 0..=BACKLOG {
            publish(&hub, Update::of_all(vec![row(&number.to_string(), ReportedState::Closed)]));
        }
        let message = next(&mut reader).await;
        assert!(message.scope.is_some());
        assert_eq!(message.breakers[0].name, BACKLOG.to_string());
    }

    #[tokio::test]
    async fn readers_are_counted_and_limited() {
        let hub = hub();
        let readers: Vec<Reader> = (0..MOST_READERS).map(|_| hub.read("").unwrap()).collect();
        assert!(hub.read("").is_none());
        assert_eq!(*hub.readers().borrow(), MOST_READERS);
        drop(readers);
        assert_eq!(*hub.readers().borrow(), 0);
    }
}
