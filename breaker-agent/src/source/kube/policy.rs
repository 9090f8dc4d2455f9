//! A spec's policies in the domain's terms: by way of the file's own validation, so that a field means the same, has the
//! same default and is refused with the same words wherever it is written.

use std::{collections::HashMap, sync::Arc};

use serde_json::{Value, json};

use super::api::{Check, CircuitBreakerSpec, Override};
use crate::{config, model};

/// Policies that were validated before: the same text need not be read again at every change of an endpoint.
#[derive(Debug, Default)]
pub struct Policies {
    known: HashMap<String, Arc<model::Service>>,
    used: HashMap<String, Arc<model::Service>>,
}

impl Policies {
    /// Forgets what was not asked for since the last call.
    pub fn turn(&mut self) {
        self.known = std::mem::take(&mut self.used);
    }

    /// A service with everything but addresses and names: one tier for each of `backups`.
    ///
    /// # Errors
    /// What is wrong: the field, the value and what is allowed.
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
            "onClose": spec.on_close,
            "whenAllUnhealthy": spec.when_all_unhealthy,
            "onAgentLoss": spec.on_agent_loss,
            "fastPath": spec.fast_path,
        });
        if let (Some(limits), Value::Object(service)) = (&spec.limits, &mut service) {
            service.insert("limits".into(), json!(limits));
        }
        if let (Some(least), Value::Object(primary)) = (spec.min_healthy, &mut service["primary"]) {
            primary.insert("minHealthy".into(), json!(least));
        }
        let text = service.to_string();
        if let Some(known) = self.used.get(&text) {
            return Ok(known.clone());
        }
        let found = match self.known.remove(&text) {
            Some(known) => known,
            None => Arc::new(config::parse_policies(&text)?),
        };
        self.used.insert(text, found.clone());
        Ok(found)
    }
}
