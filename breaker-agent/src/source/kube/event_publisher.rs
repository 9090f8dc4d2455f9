//! Publishes Kubernetes Events about CircuitBreakers and Services.

use breaker_api::crd::{GROUP, OwnerKind};
use k8s_openapi::{
    api::{core::v1::ObjectReference, events::v1},
    apimachinery::pkg::apis::meta::v1::{MicroTime, ObjectMeta},
};
use kube::{
    Api, Client,
    api::PostParams,
    runtime::events::{Event, EventType, Recorder, Reporter},
};

use super::{aggregate_reports::EventRecord, resolve::ResolvedBreaker};
use crate::clock;

/// Maximum length of an object's name (Kubernetes, "Object Names and IDs", DNS subdomain names).
const LONGEST_NAME: usize = 253;
/// Length of the rest of an Event's name, behind the object's name: a dot, and nanoseconds in hexadecimal notation.
const SUFFIX: usize = 17;

/// The client that publishes Events.
pub(super) struct EventPublisher {
    client: Client,
    recorder: Recorder,
    reporter: Reporter,
}

impl EventPublisher {
    /// A publisher that reports as this node's agent.
    pub(super) fn new(client: Client, node: String) -> Self {
        let reporter = Reporter { controller: GROUP.into(), instance: Some(node) };
        Self { recorder: Recorder::new(client.clone(), reporter.clone()), client, reporter }
    }

    /// Publishes one Event. `why` is the reason of the state.
    ///
    /// # Errors
    /// The API server refused it.
    pub(super) async fn publish(
        &self,
        result: &ResolvedBreaker,
        why: &str,
        record: &EventRecord,
    ) -> Result<(), kube::Error> {
        let (api_version, kind) = match result.owner.kind {
            OwnerKind::CircuitBreaker => (format!("{GROUP}/v1alpha1"), "CircuitBreaker"),
            OwnerKind::Service => ("v1".to_owned(), "Service"),
        };
        let about = ObjectReference {
            api_version: Some(api_version),
            kind: Some(kind.into()),
            namespace: Some(result.owner.key.namespace.clone()),
            name: Some(result.owner.key.name.clone()),
            uid: Some(result.uid.clone()),
            ..ObjectReference::default()
        };
        let event = Event {
            type_: if record.warning { EventType::Warning } else { EventType::Normal },
            reason: record.reason.clone(),
            // The API accepts up to 1024 bytes.
            note: Some(record.note.chars().take(900).collect()),
            // The reason of the state makes the Event differ from an earlier one with another cause. Otherwise the
            // Recorder would count up the earlier Event, which keeps its first note.
            action: why.to_owned(),
            secondary: None,
        };
        // The Recorder's Events begin with the whole name of the object. The API server refuses them if they get too long.
        if result.owner.key.name.len() + SUFFIX > LONGEST_NAME {
            return self.publish_shortened(event, about).await;
        }
        let new_recorder = || Recorder::new(self.client.clone(), self.reporter.clone());
        if !record.counted {
            return new_recorder().publish(&event, &about).await;
        }
        match self.recorder.publish(&event, &about).await {
            // The Event that the Recorder wanted to count up was deleted meanwhile. A new Recorder creates a new Event.
            Err(kube::Error::Api(status)) if status.code == 404 => new_recorder().publish(&event, &about).await,
            outcome => outcome,
        }
    }

    /// Publishes an Event about an object with a very long name, under a shortened name. It is not counted up.
    async fn publish_shortened(&self, event: Event, about: ObjectReference) -> Result<(), kube::Error> {
        let now = clock::wall();
        let namespace = about.namespace.clone().unwrap_or_default();
        let kind = match event.type_ {
            EventType::Normal => "Normal",
            EventType::Warning => "Warning",
        };
        let shortened = v1::Event {
            metadata: ObjectMeta {
                name: Some(event_name(about.name.as_deref().unwrap_or_default(), now.as_nanosecond())),
                namespace: Some(namespace.clone()),
                ..ObjectMeta::default()
            },
            action: Some(event.action),
            event_time: Some(MicroTime(now)),
            note: event.note,
            reason: Some(event.reason),
            regarding: Some(about),
            reporting_controller: Some(self.reporter.controller.clone()),
            reporting_instance: self.reporter.instance.clone(),
            type_: Some(kind.to_owned()),
            ..v1::Event::default()
        };
        let api: Api<v1::Event> = Api::namespaced(self.client.clone(), &namespace);
        api.create(&PostParams::default(), &shortened).await.map(|_| ())
    }
}

/// Name of an Event about an object: the start of the object's name, and the time.
fn event_name(object: &str, nanoseconds: i128) -> String {
    let start = object.get(..LONGEST_NAME - SUFFIX).unwrap_or(object);
    // Each part between dots ends with a letter or a digit.
    format!("{}.{nanoseconds:x}", start.trim_end_matches(['-', '.']))
}

#[cfg(test)]
mod tests {
    use super::*;

    /// TRIALS A11: an Event about an object with the longest name has a name that the API server accepts.
    #[test]
    fn the_names_of_events_are_never_too_long() {
        let now = clock::wall().as_nanosecond();
        for object in ["a", &"a".repeat(253), &format!("{}-.{}", "a".repeat(235), "b".repeat(16)), &"a-".repeat(126)] {
            let name = event_name(object, now);
            let (start, _) = name.rsplit_once('.').unwrap();
            assert!(name.len() <= LONGEST_NAME && start.ends_with('a'), "{name}");
        }
        assert_eq!(event_name("a", 255), "a.ff");
    }
}
