//! A request for protection, in either of its two forms: a CircuitBreaker, or annotations on a Service.

use std::{collections::BTreeMap, fmt, sync::Arc};

use breaker_api::crd::{CircuitBreaker, CircuitBreakerSpec, OwnerKind, REASON_ANNOTATION};
use jiff::Timestamp;
use kube::ResourceExt as _;

use super::{annotations, objects::Service, text::short};

/// Namespace and name of an object.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Key {
    /// The namespace.
    pub namespace: String,
    /// The name.
    pub name: String,
}

impl Key {
    /// Makes a key from a namespace and a name.
    #[must_use]
    pub fn new(namespace: &str, name: &str) -> Self {
        Self { namespace: namespace.to_owned(), name: name.to_owned() }
    }

    /// The key of an object.
    pub fn of(object: &impl kube::ResourceExt) -> Self {
        Self { namespace: object.namespace().unwrap_or_default(), name: object.name_any() }
    }
}

impl fmt::Display for Key {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}/{}", self.namespace, self.name)
    }
}

/// The object that requests protection.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Owner {
    /// Its kind.
    pub kind: OwnerKind,
    /// Its namespace and name.
    pub key: Key,
}

impl fmt::Display for Owner {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} {}", self.kind.label(), self.key)
    }
}

/// A request for protection.
#[derive(Clone, Debug)]
pub struct Intent {
    /// The object that makes the request.
    pub owner: Owner,
    /// Its uid.
    pub uid: String,
    /// Generation of the spec; 0 for annotations, which have no generation.
    pub generation: i64,
    /// When the object was created: of two requests for one Service, the older one wins.
    pub created: Option<Timestamp>,
    /// The Service to protect.
    pub service: Key,
    /// Why the breaker is forced, in the operator's words; may be empty.
    pub override_reason: String,
    /// A part of the request that is not carried out, in words for people.
    pub note: Option<String>,
    /// The requested spec, or the error in the annotations.
    pub spec: Result<Arc<CircuitBreakerSpec>, String>,
}

/// The request of a CircuitBreaker at the time `now`.
#[must_use]
pub fn of_breaker(breaker: &CircuitBreaker, now: Timestamp) -> Intent {
    let key = Key::of(breaker);
    // Nobody validates annotations. A wrong one must not make the breaker invalid, which would end the protection.
    let (spec, note) = match breaker.spec_in_force(now) {
        Ok(spec) => (spec.into_owned(), None),
        Err(error) => (breaker.spec.clone(), Some(error)),
    };
    Intent {
        service: Key::new(&key.namespace, &breaker.spec.service.name),
        owner: Owner { kind: OwnerKind::CircuitBreaker, key },
        uid: breaker.uid().unwrap_or_default(),
        generation: breaker.metadata.generation.unwrap_or_default(),
        created: breaker.metadata.creation_timestamp.as_ref().map(|time| time.0),
        override_reason: override_reason(breaker.annotations()),
        note,
        spec: Ok(Arc::new(spec)),
    }
}

/// The request of a Service's annotations; `None` if it has no annotation of breaker.
#[must_use]
pub fn of_service(service: &Service) -> Option<Intent> {
    let spec = annotations::spec(&service.name_any(), service.annotations())?;
    let key = Key::of(service);
    Some(Intent {
        service: key.clone(),
        owner: Owner { kind: OwnerKind::Service, key },
        uid: service.uid().unwrap_or_default(),
        generation: 0,
        created: service.metadata.creation_timestamp.as_ref().map(|time| time.0),
        override_reason: override_reason(service.annotations()),
        note: None,
        spec: spec.map(Arc::new),
    })
}

/// The operator's reason for an override, cut to a length that a status and an Event can hold.
fn override_reason(annotations: &BTreeMap<String, String>) -> String {
    annotations.get(REASON_ANNOTATION).map(|reason| short(reason.trim())).unwrap_or_default()
}
