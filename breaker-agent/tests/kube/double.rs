//! A test double of the Kubernetes API server. It lists, watches, creates, patches and applies as far as the agent
//! needs, and injects faults on demand. It knows no schemas: it returns objects as they were sent.

use std::{
    collections::BTreeMap,
    convert::Infallible,
    sync::{Arc, Mutex},
    time::Duration,
};

use axum::{
    Router,
    body::{Body, Bytes},
    extract::State,
    http::{HeaderMap, Method, StatusCode, Uri, header},
    response::{IntoResponse, Response},
};
use futures_util::stream;
use serde_json::{Value, json};
use tokio::{net::TcpListener, sync::watch, time::Instant};

/// A fault that the double injects.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Fault {
    /// No fault.
    None,
    /// Every request is answered with this HTTP status.
    Status(u16),
    /// Every request is answered with text that is not JSON.
    Garbage,
    /// Every watch ends at once with 410 Gone.
    Gone,
    /// Every stream ends in the middle of an object.
    Cut,
    /// Connections are accepted, but requests are not answered.
    Silent,
    /// Every answer is delayed by 300 ms.
    Slow,
    /// Watches end with 410 Gone, and lists come from a replica that is this many changes behind.
    Stale(u64),
}

/// The identity of an object: plural, namespace, name.
type Place = (String, String, String);

struct Inner {
    objects: BTreeMap<Place, Value>,
    /// All changes, in order: version, type of the watch event, identity, object.
    history: Vec<(u64, &'static str, Place, Value)>,
    version: u64,
    fault: Fault,
    /// Method and path of every write request.
    writes: Vec<(String, String)>,
    lists: usize,
}

impl Inner {
    /// The objects as they were `behind` changes ago, and the version of that time.
    fn some_time_ago(&self, behind: u64) -> (u64, BTreeMap<Place, Value>) {
        let version = self.version - behind;
        let mut objects = BTreeMap::new();
        for (_, kind, place, object) in self.history.iter().filter(|(at, ..)| *at <= version) {
            match *kind {
                "DELETED" => objects.remove(place),
                _ => objects.insert(place.clone(), object.clone()),
            };
        }
        (version, objects)
    }
}

/// The test double.
#[derive(Clone)]
pub struct Double {
    inner: Arc<Mutex<Inner>>,
    changed: watch::Sender<u64>,
    url: String,
}

impl Double {
    pub async fn start() -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let url = format!("http://{}", listener.local_addr().unwrap());
        let inner = Inner {
            objects: BTreeMap::new(),
            history: Vec::new(),
            version: 100,
            fault: Fault::None,
            writes: Vec::new(),
            lists: 0,
        };
        let double = Self { inner: Arc::new(Mutex::new(inner)), changed: watch::channel(0).0, url };
        let app = Router::new().fallback(answer).with_state(double.clone());
        tokio::spawn(async move { axum::serve(listener, app).await.unwrap() });
        double
    }

    pub fn client(&self) -> kube::Client {
        breaker_cli::install_crypto();
        let config = kube::Config::new(self.url.parse().unwrap());
        breaker_agent::source::kube::client_of(config).unwrap()
    }

    /// Injects a fault from now on, also into open streams.
    pub fn fault(&self, fault: Fault) {
        self.lock().fault = fault;
        self.wake();
    }

    /// Creates or replaces an object, as its owner would.
    pub fn put(&self, plural: &str, mut object: Value) {
        let place = place_of(plural, &object);
        let mut inner = self.lock();
        inner.version += 1;
        object["metadata"]["resourceVersion"] = json!(inner.version.to_string());
        let known = inner.objects.get(&place);
        let kind = if known.is_some() { "MODIFIED" } else { "ADDED" };
        if object["metadata"]["creationTimestamp"].is_null() {
            object["metadata"]["creationTimestamp"] = json!("2026-01-01T00:00:00Z");
        }
        if object["metadata"]["uid"].is_null() {
            object["metadata"]["uid"] = json!(format!("{place:?}"));
        }
        let entry = (inner.version, kind, place.clone(), object.clone());
        inner.history.push(entry);
        inner.objects.insert(place, object);
        drop(inner);
        self.wake();
    }

    pub fn delete(&self, plural: &str, namespace: &str, name: &str) {
        let place = (plural.to_owned(), namespace.to_owned(), name.to_owned());
        let mut inner = self.lock();
        let mut object = inner.objects.remove(&place).unwrap();
        inner.version += 1;
        object["metadata"]["resourceVersion"] = json!(inner.version.to_string());
        let entry = (inner.version, "DELETED", place, object);
        inner.history.push(entry);
        drop(inner);
        self.wake();
    }

    /// Deletes the history, so that a watch from an earlier version gets 410 Gone.
    pub fn forget(&self) {
        let mut inner = self.lock();
        inner.history.clear();
        inner.version += 1000;
    }

    pub fn get(&self, plural: &str, namespace: &str, name: &str) -> Option<Value> {
        self.lock().objects.get(&(plural.to_owned(), namespace.to_owned(), name.to_owned())).cloned()
    }

    pub fn all(&self, plural: &str) -> Vec<Value> {
        self.lock().objects.iter().filter(|(place, _)| place.0 == plural).map(|(_, object)| object.clone()).collect()
    }

    /// Number of writes so far whose path contains `text`.
    pub fn writes(&self, text: &str) -> usize {
        self.lock().writes.iter().filter(|(_, path)| path.contains(text)).count()
    }

    pub fn lists(&self) -> usize {
        self.lock().lists
    }

    async fn waits_while(&self, fault: Fault) {
        let mut changed = self.changed.subscribe();
        while self.lock().fault == fault {
            let _ = changed.changed().await;
        }
    }

    fn lock(&self) -> std::sync::MutexGuard<'_, Inner> {
        self.inner.lock().unwrap()
    }

    fn wake(&self) {
        self.changed.send_modify(|n| *n += 1);
    }
}

fn place_of(plural: &str, object: &Value) -> Place {
    let text = |field: &str| object["metadata"][field].as_str().unwrap_or_default().to_owned();
    (plural.to_owned(), text("namespace"), text("name"))
}

struct Target {
    plural: String,
    namespace: Option<String>,
    name: Option<String>,
    query: BTreeMap<String, String>,
}

fn parse(uri: &Uri) -> Target {
    let mut parts: Vec<&str> = uri.path().split('/').filter(|part| !part.is_empty()).collect();
    // /api/v1/… or /apis/GROUP/VERSION/…
    parts.drain(..if parts.first() == Some(&"api") { 2 } else { 3 });
    let namespace = (parts.first() == Some(&"namespaces") && parts.len() > 2).then(|| {
        let namespace = parts[1].to_owned();
        parts.drain(..2);
        namespace
    });
    let query = uri.query().unwrap_or_default().split('&').filter_map(|pair| pair.split_once('='));
    let decode = |text: &str| {
        let text = text.replace('+', " ");
        let mut bytes = Vec::new();
        let mut rest = text.as_bytes();
        while let Some((&byte, after)) = rest.split_first() {
            if byte == b'%' {
                bytes.push(u8::from_str_radix(std::str::from_utf8(&after[..2]).unwrap(), 16).unwrap());
                rest = &after[2..];
            } else {
                bytes.push(byte);
                rest = after;
            }
        }
        String::from_utf8(bytes).unwrap()
    };
    Target {
        plural: parts[0].to_owned(),
        namespace,
        name: parts.get(1).map(|name| (*name).to_owned()),
        query: query.map(|(k, v)| (decode(k), decode(v))).collect(),
    }
}

impl Target {
    fn matches(&self, place: &Place, object: &Value) -> bool {
        let selected = self.query.get("labelSelector").is_none_or(|selector| {
            let label = |key: &str| object["metadata"]["labels"][key].as_str().map(str::to_owned);
            match selector.split_once(" in (") {
                Some((key, names)) => {
                    label(key).is_some_and(|v| names.trim_end_matches(')').split(',').any(|n| n == v))
                }
                None => label(selector).is_some(),
            }
        });
        let field = self.query.get("fieldSelector").is_none_or(|selector| {
            let (path, value) = selector.split_once('=').unwrap();
            let pointer = format!("/{}", path.replace('.', "/"));
            object.pointer(&pointer).and_then(Value::as_str) == Some(value)
        });
        place.0 == self.plural && self.namespace.as_ref().is_none_or(|n| *n == place.1) && selected && field
    }

    fn place(&self) -> Place {
        (self.plural.clone(), self.namespace.clone().unwrap_or_default(), self.name.clone().unwrap_or_default())
    }
}

fn status(code: u16, reason: &str) -> Response {
    let body = json!({ "kind": "Status", "apiVersion": "v1", "status": "Failure", "message": reason, "reason": reason, "code": code });
    let code = StatusCode::from_u16(code).unwrap();
    (code, [(header::CONTENT_TYPE, "application/json")], body.to_string()).into_response()
}

fn good(object: &Value) -> Response {
    ([(header::CONTENT_TYPE, "application/json")], object.to_string()).into_response()
}

async fn answer(State(double): State<Double>, method: Method, uri: Uri, headers: HeaderMap, body: Bytes) -> Response {
    let target = parse(&uri);
    let fault = double.lock().fault;
    match fault {
        Fault::Silent => double.waits_while(Fault::Silent).await,
        Fault::Slow => tokio::time::sleep(Duration::from_millis(300)).await,
        _ => {}
    }
    let watching = target.query.get("watch").is_some_and(|v| v == "true" || v == "1");
    match fault {
        Fault::Status(code) => return status(code, "Trouble"),
        Fault::Garbage => return (StatusCode::OK, "<html>not what you think</html>").into_response(),
        _ => {}
    }
    if watching {
        return watched(double, target);
    }
    if method == Method::GET {
        let mut inner = double.lock();
        return match &target.name {
            Some(_) => inner.objects.get(&target.place()).map_or_else(|| status(404, "NotFound"), good),
            None => {
                inner.lists += 1;
                let (version, objects) = match fault {
                    Fault::Stale(behind) => inner.some_time_ago(behind),
                    _ => (inner.version, inner.objects.clone()),
                };
                let items: Vec<&Value> = objects.iter().filter(|(p, o)| target.matches(p, o)).map(|(_, o)| o).collect();
                let list = json!({ "kind": "List", "apiVersion": "v1", "metadata": { "resourceVersion": version.to_string() }, "items": items });
                good(&list)
            }
        };
    }
    double.lock().writes.push((method.to_string(), uri.path().to_owned()));
    let sent: Value = serde_json::from_slice(&body).unwrap();
    let content = headers.get(header::CONTENT_TYPE).and_then(|v| v.to_str().ok()).unwrap_or_default().to_owned();
    let mut object = match (method.as_str(), double.get(&target.plural, &target.place().1, &target.place().2)) {
        ("POST", _) => sent,
        ("PUT", Some(old)) => {
            let version = &sent["metadata"]["resourceVersion"];
            if !version.is_null() && *version != old["metadata"]["resourceVersion"] {
                return status(409, "Conflict");
            }
            sent
        }
        ("PATCH", Some(mut old)) => {
            if content.contains("apply-patch") {
                // Server-side apply removes what the applier leaves out; the applier owns the whole status here.
                old["status"] = sent["status"].clone();
            } else {
                merge(&mut old, &sent);
            }
            old
        }
        (_, None) => return status(404, "NotFound"),
        _ => return status(405, "MethodNotAllowed"),
    };
    if let Some(namespace) = &target.namespace {
        object["metadata"]["namespace"] = json!(namespace);
    }
    double.put(&target.plural, object.clone());
    let place = place_of(&target.plural, &object);
    good(&double.get(&place.0, &place.1, &place.2).unwrap())
}

/// Applies a JSON merge patch (RFC 7396).
fn merge(target: &mut Value, patch: &Value) {
    let Some(fields) = patch.as_object() else {
        *target = patch.clone();
        return;
    };
    if !target.is_object() {
        *target = json!({});
    }
    for (name, value) in fields {
        if value.is_null() {
            target.as_object_mut().unwrap().remove(name);
        } else {
            merge(&mut target[name.as_str()], value);
        }
    }
}

fn watched(double: Double, target: Target) -> Response {
    let from: u64 = target.query.get("resourceVersion").and_then(|v| v.parse().ok()).unwrap_or_default();
    let limit: u64 = target.query.get("timeoutSeconds").and_then(|v| v.parse().ok()).unwrap_or(60);
    let changed = double.changed.subscribe();
    let end = Instant::now() + Duration::from_secs(limit);
    let start = (double, target, changed, from, false);
    let events = stream::unfold(start, move |(double, target, mut changed, at, ended)| async move {
        loop {
            if ended || Instant::now() > end {
                return None;
            }
            changed.borrow_and_update();
            let (fault, found, oldest, inner_version) = {
                let inner = double.lock();
                let found = inner
                    .history
                    .iter()
                    .find(|(v, _, place, object)| *v > at && target.matches(place, object))
                    .cloned();
                (inner.fault, found, inner.history.first().map_or(inner.version, |h| h.0), inner.version)
            };
            let state = |at, ended| (double.clone(), target_again(&target), changed.clone(), at, ended);
            // The version is from before the recorded history.
            let expired = at + 500 < oldest;
            // A replica that is behind sends 410 Gone only to a watch that is up to date. A watch that continues from
            // its older list gets all later changes.
            let behind = matches!(fault, Fault::Stale(_)) && at >= inner_version;
            if fault == Fault::Gone || behind || expired {
                let gone = json!({ "type": "ERROR", "object": { "kind": "Status", "apiVersion": "v1", "status": "Failure", "message": "too old", "reason": "Expired", "code": 410 } });
                return Some((Ok::<_, Infallible>(Bytes::from(format!("{gone}\n"))), state(at, true)));
            }
            if matches!(fault, Fault::Status(_) | Fault::Garbage) {
                return None;
            }
            if fault == Fault::Silent {
                double.waits_while(Fault::Silent).await;
                continue;
            }
            if let Some((version, kind, _, object)) = found {
                let line = format!("{}\n", json!({ "type": kind, "object": object }));
                if fault == Fault::Cut {
                    let half = line[..line.len() / 2].to_owned();
                    return Some((Ok(Bytes::from(half)), state(at, true)));
                }
                return Some((Ok(Bytes::from(line)), state(version, false)));
            }
            if fault == Fault::Cut {
                return None;
            }
            if tokio::time::timeout_at(end, changed.changed()).await.is_err() {
                return None;
            }
        }
    });
    ([(header::CONTENT_TYPE, "application/json")], Body::from_stream(events)).into_response()
}

fn target_again(target: &Target) -> Target {
    Target {
        plural: target.plural.clone(),
        namespace: target.namespace.clone(),
        name: target.name.clone(),
        query: target.query.clone(),
    }
}
