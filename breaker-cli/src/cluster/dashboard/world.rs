//! What the API server says: three watches, with the caller's rights.

use std::{
    collections::{BTreeMap, VecDeque},
    fmt::Debug,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
};

use breaker_api::crd::{CircuitBreaker, GROUP, NodeReport};
use futures_util::StreamExt as _;
use jiff::Timestamp;
use k8s_openapi::api::core::v1::Event;
use kube::{
    Api, Resource,
    runtime::{
        WatchStreamExt as _,
        reflector::{self, Store},
        watcher,
    },
};
use serde::de::DeserializeOwned;
use tokio::sync::Notify;

use super::super::{connection::Connection, events};

/// Events that wait for their publication, at most.
const MOST_EVENTS: usize = 500;

/// What the watches know.
pub(super) struct World {
    /// The CircuitBreakers of the namespace that is meant.
    pub breakers: Store<CircuitBreaker>,
    /// The reports of all nodes.
    pub reports: Store<NodeReport>,
    state: Mutex<State>,
    /// Something changed.
    pub changed: Notify,
}

#[derive(Default)]
struct State {
    /// When each Event happened last, by uid.
    seen: BTreeMap<String, Timestamp>,
    events: VecDeque<Event>,
    /// What cannot be watched, and why.
    problems: BTreeMap<&'static str, String>,
}

/// Starts the watches.
pub(super) fn watch(connection: &Connection) -> Arc<World> {
    let (breakers, breakers_in) = reflector::store();
    let (reports, reports_in) = reflector::store();
    let world = Arc::new(World { breakers, reports, state: Mutex::default(), changed: Notify::new() });
    let api = connection.api::<CircuitBreaker>();
    tokio::spawn(follow(world.clone(), "CircuitBreakers", api, move |api| {
        reflector::reflector(breakers_in, watcher(api, watcher::Config::default()))
    }));
    let api = Api::<NodeReport>::all(connection.client.clone());
    tokio::spawn(follow(world.clone(), "NodeReports", api, move |api| {
        reflector::reflector(reports_in, watcher(api, watcher::Config::default()))
    }));
    let taker = world.clone();
    tokio::spawn(follow(world.clone(), "Events", connection.api::<Event>(), move |api| {
        watcher(api, watcher::Config::default()).inspect(move |event| {
            if let Ok(watcher::Event::Apply(event) | watcher::Event::InitApply(event)) = event {
                taker.take_event(event);
            }
        })
    }));
    world
}

async fn follow<K, S>(world: Arc<World>, what: &'static str, api: Api<K>, start: impl FnOnce(Api<K>) -> S)
where
    K: Resource + Clone + DeserializeOwned + Debug + Send + 'static,
    S: futures_util::Stream<Item = watcher::Result<watcher::Event<K>>>,
{
    let mut events = std::pin::pin!(start(api).default_backoff());
    while let Some(event) = events.next().await {
        match event {
            Ok(watcher::Event::Init | watcher::Event::InitApply(_)) => continue,
            Ok(_) => drop(world.state().problems.remove(what)),
            Err(error) => drop(world.state().problems.insert(what, words(what, &error))),
        }
        world.changed.notify_one();
    }
}

/// Why a watch failed.
fn words(what: &str, error: &watcher::Error) -> String {
    let cause = match error {
        watcher::Error::InitialListFailed(error) | watcher::Error::WatchStartFailed(error) => error,
        error => return format!("{what}: {error}"),
    };
    match cause {
        kube::Error::Api(status) if status.code == 403 => format!("you may not watch {what}: they are not shown"),
        kube::Error::Api(status) if status.code == 404 => {
            format!("the cluster does not know {what}: is breaker installed? `kubectl breaker check` says more")
        }
        error => format!("{what}: {error}"),
    }
}

impl World {
    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn take_event(&self, event: &Event) {
        if event.reporting_component.as_deref() != Some(GROUP) {
            return;
        }
        let (uid, last) = (event.metadata.uid.clone().unwrap_or_default(), events::last(event));
        let mut state = self.state();
        // A watch that begins anew repeats all Events.
        if state.seen.insert(uid, last) == Some(last) {
            return;
        }
        state.events.push_back(event.clone());
        let over = state.events.len().saturating_sub(MOST_EVENTS);
        state.events.drain(..over);
    }

    /// The Events since the last call, oldest first.
    pub fn take_events(&self) -> Vec<Event> {
        let mut events: Vec<Event> = self.state().events.drain(..).collect();
        events.sort_by_key(events::last);
        events
    }

    /// What the page cannot show, and why.
    pub fn problems(&self) -> Vec<String> {
        self.state().problems.values().cloned().collect()
    }
}
