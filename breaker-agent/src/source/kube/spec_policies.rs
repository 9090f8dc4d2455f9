//! Converts the policies of a spec to the domain model. It uses the validation of the configuration file, so that a
//! field has the same meaning, default and error message in both.

use std::{collections::HashMap, sync::Arc};

use breaker_api::crd::{Check, CircuitBreakerSpec, Override};
use breaker_core::model;
use serde_json::{Value, json};

use crate::config;

/// Cache of validated policies, by their JSON, so that a change of an endpoint does not cause a new validation.
#[derive(Debug, Default)]
pub struct Policies {
    known: HashMap<Value, Arc<model::Service>>,
    used: HashMap<Value, Arc<model::Service>>,
}

impl Policies {
    /// Removes the entries that were not used since the last call.
    pub fn evict_unused(&mut self) {
        self.known = std::mem::take(&mut self.used);
    }

    /// Converts the spec's policies to a service without addresses and names. `primary` is the primary's check.
    /// `backups` has one element for each backup tier: its check, if it has one.
    ///
    /// # Errors
    /// The wrong field, its value and what is allowed.
    pub fn get(
        &mut self,
        spec: &CircuitBreakerSpec,
        override_: Override,
        primary: Option<&Check>,
        backups: &[Option<&Check>],
    ) -> Result<Arc<model::Service>, String> {
        let tier = |check: Option<&Check>| match check {
            Some(check) => json!({ "backends": [], "check": check }),
            None => json!({ "backends": [] }),
        };
        let mut service = json!({
            "name": "kubernetes",
            "frontends": [],
            "primary": tier(primary),
            "backups": backups.iter().map(|check| tier(*check)).collect::<Vec<_>>(),
            "breaker": spec.breaker,
            "mode": spec.mode,
            "override": override_,
            "onOpen": spec.on_open,
            "resetsPerSecond": spec.resets_per_second,
            "onClose": spec.on_close,
            "whenAllUnhealthy": spec.when_all_unhealthy,
            "onAgentLoss": spec.on_agent_loss,
            "fastPath": spec.fast_path,
        });
        if let (Some(limits), Value::Object(service)) = (&spec.limits, &mut service) {
            service.insert("limits".into(), json!(limits));
        }
        if let (Some(seconds), Value::Object(service)) = (spec.drain_seconds, &mut service) {
            service.insert("drainSeconds".into(), json!(seconds));
        }
        if let (Some(policy), Value::Object(service)) = (spec.on_backup_down, &mut service) {
            service.insert("onBackupDown".into(), json!(policy));
        }
        if let (Some(least), Value::Object(primary)) = (spec.min_healthy, &mut service["primary"]) {
            primary.insert("minHealthy".into(), json!(least));
        }
        if let Some(known) = self.used.get(&service) {
            return Ok(known.clone());
        }
        let found = match self.known.remove(&service) {
            Some(known) => known,
            None => Arc::new(config::policies(&service)?),
        };
        self.used.insert(service, found.clone());
        Ok(found)
    }
}
