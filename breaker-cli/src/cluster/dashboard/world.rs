//! What the API server says: three watches, with the caller's rights.

use std::{
    collections::{BTreeMap, BTreeSet},
    fmt::Debug,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::Duration,
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
use tokio::{sync::Notify, time::Instant};

use super::super::{connection::Connection, events};

/// Events that wait for their publication, at most.
const MOST_EVENTS: usize = 500;
/// How long the reason of a failed watch is shown. A watch that fails tries again sooner, and one that works again says
/// nothing until something changes.
const SHOWN: Duration = Duration::from_secs(60);
/// The watches.
const WATCHES: [&str; 3] = ["CircuitBreakers", "NodeReports", "Events"];

/// What the watches know.
pub(super) struct World {
    /// The CircuitBreakers of the namespace that is meant.
    pub breakers: Store<CircuitBreaker>,
    /// The reports of all nodes.
    pub reports: Store<NodeReport>,
    /// The namespace that is meant; `None` = all.
    pub namespace: Option<String>,
    state: Mutex<State>,
    /// Something changed.
    pub changed: Notify,
}

#[derive(Default)]
struct State {
    /// When each Event happened last, by uid.
    seen: BTreeMap<String, Timestamp>,
    events: Vec<Event>,
    /// What cannot be watched, why, and since when.
    problems: BTreeMap<&'static str, (String, Instant)>,
    /// The watches that have delivered their first list, or have failed.
    ready: BTreeSet<&'static str>,
}

/// Starts the watches.
pub(super) fn watch(connection: &Connection) -> Arc<World> {
    let (breakers, breakers_in) = reflector::store();
    let (reports, reports_in) = reflector::store();
    let world = Arc::new(World {
        breakers,
        reports,
        namespace: connection.namespace.clone(),
        state: Mutex::default(),
        changed: Notify::new(),
    });
    let [breakers, reports, events] = WATCHES;
    let api = connection.api::<CircuitBreaker>();
    tokio::spawn(follow(world.clone(), breakers, api, move |api| {
        reflector::reflector(breakers_in, watcher(api, watcher::Config::default()))
    }));
    let api = Api::<NodeReport>::all(connection.client.clone());
    tokio::spawn(follow(world.clone(), reports, api, move |api| {
        reflector::reflector(reports_in, watcher(api, watcher::Config::default()))
    }));
    let taker = world.clone();
    tokio::spawn(follow(world.clone(), events, connection.api::<Event>(), move |api| {
        let ours = watcher::Config::default().fields(&format!("reportingComponent={GROUP}"));
        watcher(api, ours).inspect(move |event| match event {
            Ok(watcher::Event::Apply(event) | watcher::Event::InitApply(event)) => taker.take_event(event),
            Ok(watcher::Event::Delete(event)) => taker.forget_event(event),
            Ok(watcher::Event::Init | watcher::Event::InitDone) | Err(_) => {}
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
        if matches!(event, Ok(watcher::Event::Init | watcher::Event::InitApply(_))) {
            continue;
        }
        world.state().ready.insert(what);
        match event {
            Ok(_) => {
                world.state().problems.remove(what);
                world.changed.notify_one();
            }
            // Only an answer of the API server is news; without one, the page shows how old its data is.
            Err(error) => {
                world.state().problems.insert(what, (words(what, &error), Instant::now()));
                if is_answer(&error) {
                    world.changed.notify_one();
                }
            }
        }
    }
}

/// Whether the API server has answered, and refused.
fn is_answer(error: &watcher::Error) -> bool {
    let refused = |error: &kube::Error| matches!(error, kube::Error::Api(_));
    match error {
        watcher::Error::InitialListFailed(error) | watcher::Error::WatchStartFailed(error) => refused(error),
        watcher::Error::WatchError(_) => true,
        _ => false,
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
        state.events.push(event.clone());
        if state.events.len() > 2 * MOST_EVENTS {
            // The first list comes in the order of names.
            state.events.sort_by_key(events::last);
            let over = state.events.len() - MOST_EVENTS;
            state.events.drain(..over);
        }
    }

    fn forget_event(&self, event: &Event) {
        self.state().seen.remove(event.metadata.uid.as_deref().unwrap_or_default());
    }

    /// Whether everything that can be listed has been listed.
    pub fn is_complete(&self) -> bool {
        self.state().ready.len() == WATCHES.len()
    }

    /// The Events since the last call, oldest first.
    pub fn take_events(&self) -> Vec<Event> {
        let mut events = std::mem::take(&mut self.state().events);
        events.sort_by_key(events::last);
        events
    }

    /// What the page cannot show, and why.
    pub fn problems(&self) -> Vec<String> {
        let mut state = self.state();
        state.problems.retain(|_, (_, since)| since.elapsed() < SHOWN);
        state.problems.values().map(|(why, _)| why.clone()).collect()
    }
}
