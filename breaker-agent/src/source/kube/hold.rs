//! Services stay in force while the objects of the API server do not fit together yet.

use std::{collections::BTreeMap, sync::Arc};

use breaker_core::model;
use jiff::{SignedDuration, Timestamp};

use super::{intent::Owner, resolve::ResolvedBreaker};

/// How long a Service's port may have no EndpointSlice. The slices follow a change of the Service after a moment; pods
/// that have not changed are no failure meanwhile.
const NO_SLICE: SignedDuration = SignedDuration::from_secs(10);

/// The services of the last update.
#[derive(Debug, Default)]
pub struct Held {
    /// By owner: for all frontends or the cluster IPs, and for connections from outside.
    services: BTreeMap<Owner, [BTreeMap<i32, Arc<model::Service>>; 2]>,
    /// Since when no EndpointSlice has a port of the Service.
    without_slice: BTreeMap<Owner, Timestamp>,
}

impl Held {
    /// Gives each incomplete result its services of the last update, and remembers all services for the next call.
    /// Returns when to call again, if time alone changes the outcome.
    pub fn apply(&mut self, results: &mut [ResolvedBreaker], now: Timestamp) -> Option<Timestamp> {
        let mut next: Option<Timestamp> = None;
        let mut without_slice = BTreeMap::new();
        for result in &mut *results {
            let Some(before) = self.services.get(&result.owner).filter(|[all, _]| !all.is_empty()) else { continue };
            let mut waits = result.pending;
            if result.no_slice_has_the_port {
                let since = self.without_slice.get(&result.owner).copied().unwrap_or(now);
                without_slice.insert(result.owner.clone(), since);
                let until = since.checked_add(NO_SLICE).unwrap_or(now);
                if now < until {
                    waits = true;
                    result.hold = true;
                    next = Some(next.map_or(until, |next| next.min(until)));
                }
            }
            if waits {
                [result.ports, result.outside] = before.clone();
            }
        }
        self.without_slice = without_slice;
        let services = results.iter().map(|r| (r.owner.clone(), [r.ports.clone(), r.outside.clone()]));
        self.services = services.collect();
        next
    }
}
