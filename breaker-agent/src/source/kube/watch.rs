//! One watch on the API server: fills a store (reflector), reads long lists in pages, and restarts after every error.

use std::{
    fmt::Debug,
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    time::Duration,
};

use futures_util::StreamExt as _;
use kube::{
    Api, Resource,
    runtime::{
        WatchStreamExt as _,
        reflector::{self, ObjectRef},
        utils::Backoff as _,
        watcher,
    },
};
use serde::de::DeserializeOwned;
use tokio::{sync::Notify, task::JoinHandle};

use super::access::Access;
use crate::{
    metrics::{Instruments, instruments::WatchState},
    supervise,
};

/// Longest duration of a watch, after which it continues from the same version. A connection that died without a FIN
/// or RST (the server lost power) is noticed within this time. Shorter than the client's read timeout.
const WATCH_SECONDS: u32 = 120;

/// Number of objects per request when everything is listed.
const PAGE: u32 = 500;

/// Who is told of what a watch sees.
#[derive(Clone)]
pub(super) struct Observer {
    /// Is notified of changes.
    pub changed: Arc<Notify>,
    /// Counts restarts and complete lists.
    pub instruments: Arc<Instruments>,
    /// Knows what the API server forbids.
    pub access: Access,
}

/// Name of a running watch. When dropped, a refusal of this watch is forgotten.
struct Noted {
    access: Access,
    what: String,
}

impl Drop for Noted {
    fn drop(&mut self) {
        self.access.note(&self.what, None);
    }
}

/// A running watch and its store. Dropping it ends the watch.
pub(super) struct Watch<K: Resource<DynamicType = ()> + 'static> {
    store: reflector::Store<K>,
    ready: Arc<AtomicBool>,
    task: JoinHandle<()>,
}

impl<K: Resource<DynamicType = ()> + 'static> Drop for Watch<K> {
    fn drop(&mut self) {
        self.task.abort();
    }
}

impl<K> Watch<K>
where
    K: Resource<DynamicType = ()> + Clone + Debug + DeserializeOwned + Send + Sync + 'static,
{
    /// Starts the watch. `what` names the objects in log messages. `trim` removes fields that are not needed before an
    /// object is stored. The observer is notified when an object is deleted, when a list is complete, and when an object
    /// changes such that `matters(old, new)` returns true.
    pub(super) fn start(
        api: Api<K>,
        config: watcher::Config,
        what: String,
        observer: Observer,
        trim: impl Fn(&mut K) + Send + Sync + 'static,
        matters: impl Fn(&K, &K) -> bool + Send + Sync + 'static,
    ) -> Self {
        let (store, mut writer) = reflector::store::<K>();
        let ready = Arc::new(AtomicBool::new(false));
        let is_ready = ready.clone();
        let config = config.timeout(WATCH_SECONDS).page_size(PAGE);
        let known = store.clone();
        let Observer { changed, instruments, access } = observer;
        let mut state: WatchState = instruments.watch(&K::kind(&()));
        let noted = Noted { access, what };
        let task = tokio::spawn(async move {
            let Noted { access, what } = &noted;
            loop {
                let attempt = async {
                    let mut events = std::pin::pin!(watcher(api.clone(), config.clone()).modify(|object: &mut K| {
                        // Not `clear`, which keeps the list's memory.
                        object.meta_mut().managed_fields = None;
                        trim(object);
                    }));
                    let mut lost = false;
                    let mut backoff = Backoff::default();
                    while let Some(event) = events.next().await {
                        match event {
                            Ok(event) => {
                                // The start of a list is not yet a success.
                                let good = !matches!(event, watcher::Event::Init);
                                if good && lost {
                                    tracing::info!("the watch of {what} works again");
                                }
                                if good {
                                    access.note(what, None);
                                    lost = false;
                                    backoff.reset();
                                }
                                let whole = match &event {
                                    watcher::Event::Init | watcher::Event::InitApply(_) => false,
                                    watcher::Event::InitDone | watcher::Event::Delete(_) => true,
                                    watcher::Event::Apply(new) => {
                                        known.get(&ObjectRef::from_obj(new)).is_none_or(|old| matters(&old, new))
                                    }
                                };
                                writer.apply_watcher_event(&event);
                                if whole {
                                    state.synced();
                                    is_ready.store(true, Ordering::Release);
                                    changed.notify_one();
                                }
                            }
                            Err(error) => {
                                if !is_expired(&error) {
                                    state.restarted();
                                }
                                if let Some(words) = forbidden(&error) {
                                    access.note(what, Some(words));
                                }
                                // Logged once: the stored objects stay in use, and the watch restarts.
                                if !lost && !is_expired(&error) {
                                    lost = true;
                                    let cause = error_text(&error);
                                    tracing::warn!(
                                        "the watch of {what} fails: {cause}; the last known state stays in use"
                                    );
                                }
                                tokio::time::sleep(backoff.next().unwrap_or_default()).await;
                            }
                        }
                    }
                };
                if supervise::contained(attempt).await.is_ok() {
                    return;
                }
                supervise::pause_after_panic("a watch of the API server").await;
            }
        });
        Self { store, ready, task }
    }

    /// A handle to the store.
    pub(super) fn store(&self) -> reflector::Store<K> {
        self.store.clone()
    }

    /// All objects; `None` until the first list is complete.
    pub(super) fn get(&self) -> Option<Vec<Arc<K>>> {
        self.ready.load(Ordering::Acquire).then(|| self.store.state())
    }
}

/// An error and its causes, in one line.
pub(super) fn error_text(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut cause = error.source();
    while let Some(error) = cause {
        let more = error.to_string();
        if !text.contains(&more) {
            text = format!("{text}: {more}");
        }
        cause = error.source();
    }
    text
}

/// Whether the error is 410 Gone: the server no longer has the version from which the watch was to continue. The
/// watcher lists again; this is not a fault.
fn is_expired(error: &watcher::Error) -> bool {
    match error {
        watcher::Error::WatchError(status) => status.code == 410,
        watcher::Error::WatchFailed(kube::Error::Api(status))
        | watcher::Error::WatchStartFailed(kube::Error::Api(status)) => status.code == 410,
        _ => false,
    }
}

/// The API server's words if it forbids the agent to list or watch.
fn forbidden(error: &watcher::Error) -> Option<String> {
    let status = match error {
        watcher::Error::InitialListFailed(kube::Error::Api(status))
        | watcher::Error::WatchFailed(kube::Error::Api(status))
        | watcher::Error::WatchStartFailed(kube::Error::Api(status))
        | watcher::Error::WatchError(status) => status,
        _ => return None,
    };
    (status.code == 403).then(|| status.message.clone())
}

/// Delays after consecutive errors: 200 ms, doubled each time, at most 5 s, each multiplied by a random factor from
/// 0.5 to 1.5. Agents find a server that comes back soon, but not all at the same moment.
#[derive(Debug, Default)]
pub(super) struct Backoff {
    errors: u32,
}

impl Iterator for Backoff {
    type Item = Duration;

    fn next(&mut self) -> Option<Duration> {
        let base = Duration::from_millis(200 << self.errors.min(6)).min(Duration::from_secs(5));
        self.errors += 1;
        Some(base.mul_f64(0.5 + fastrand::f64()))
    }
}

impl kube::runtime::utils::Backoff for Backoff {
    fn reset(&mut self) {
        self.errors = 0;
    }
}

/// For [`Watch::start`]: every change of an object matters.
pub(super) const fn always<K>(_: &K, _: &K) -> bool {
    true
}
