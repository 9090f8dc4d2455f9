//! What somebody asks for, whichever way they said it: a CircuitBreaker, or annotations on a Service.

use std::{fmt, sync::Arc};

use jiff::Timestamp;
use kube::ResourceExt as _;

use super::{
    annotations,
    api::{CircuitBreaker, CircuitBreakerSpec},
    objects::Service,
};

/// Namespace and name.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Key {
    /// The namespace.
    pub namespace: String,
    /// The name.
    pub name: String,
}

impl Key {
    /// Of two names.
    #[must_use]
    pub fn new(namespace: &str, name: &str) -> Self {
        Self { namespace: namespace.to_owned(), name: name.to_owned() }
    }

    /// Of an object.
    pub fn of(object: &impl kube::ResourceExt) -> Self {
        Self { namespace: object.namespace().unwrap_or_default(), name: object.name_any() }
    }
}

impl fmt::Display for Key {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}/{}", self.namespace, self.name)
    }
}

/// Which kind of object asks.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum OwnerKind {
    /// A CircuitBreaker.
    CircuitBreaker,
    /// A Service with annotations.
    Service,
}

impl OwnerKind {
    /// As the API calls it.
    #[must_use]
    pub const fn label(self) -> &'static str {
        match self {
            Self::CircuitBreaker => "CircuitBreaker",
            Self::Service => "Service",
        }
    }
}

/// The object that asks.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Owner {
    /// Its kind.
    pub kind: OwnerKind,
    /// Its name.
    pub key: Key,
}

impl fmt::Display for Owner {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} {}", self.kind.label(), self.key)
    }
}

/// What an object asks for.
#[derive(Clone, Debug)]
pub struct Wish {
    /// Who asks.
    pub owner: Owner,
    /// Its uid.
    pub uid: String,
    /// The generation of the spec; 0 for annotations, which have none.
    pub generation: i64,
    /// Since when; the older one wins.
    pub created: Option<Timestamp>,
    /// The Service to protect.
    pub service: Key,
    /// What is asked for, or what is wrong with it.
    pub spec: Result<Arc<CircuitBreakerSpec>, String>,
}

/// A CircuitBreaker's wish.
#[must_use]
pub fn of_breaker(breaker: &CircuitBreaker) -> Wish {
    let key = Key::of(breaker);
    Wish {
        service: Key::new(&key.namespace, &breaker.spec.service.name),
        owner: Owner { kind: OwnerKind::CircuitBreaker, key },
        uid: breaker.uid().unwrap_or_default(),
        generation: breaker.metadata.generation.unwrap_or_default(),
        created: breaker.metadata.creation_timestamp.as_ref().map(|time| time.0),
        spec: Ok(Arc::new(breaker.spec.clone())),
    }
}

/// A Service's wish, if it has one.
#[must_use]
pub fn of_service(service: &Service) -> Option<Wish> {
    let spec = annotations::spec(&service.name_any(), service.annotations())?;
    let key = Key::of(service);
    Some(Wish {
        service: key.clone(),
        owner: Owner { kind: OwnerKind::Service, key },
        uid: service.uid().unwrap_or_default(),
        generation: 0,
        created: service.metadata.creation_timestamp.as_ref().map(|time| time.0),
        spec: spec.map(Arc::new),
    })
}
