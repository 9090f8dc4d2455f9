//! What the API server refuses to let this agent read: its role is missing or was removed, for example by an uninstall
//! that left the DaemonSet.

use std::{
    collections::BTreeMap,
    sync::{Arc, Mutex, PoisonError},
};

/// Refused resources, shared by the watches of an agent.
#[derive(Clone, Debug, Default)]
pub struct Access {
    refused: Arc<Mutex<BTreeMap<String, String>>>,
}

impl Access {
    /// Notes the outcome of a request about `what`: the API server's words if it was forbidden.
    pub(super) fn note(&self, what: &str, forbidden: Option<String>) {
        let mut refused = self.refused.lock().unwrap_or_else(PoisonError::into_inner);
        match forbidden {
            Some(words) => drop(refused.insert(what.to_owned(), words)),
            None => drop(refused.remove(what)),
        }
    }

    /// What is refused, in words; `None` if nothing is.
    #[must_use]
    pub fn problem(&self) -> Option<String> {
        let refused = self.refused.lock().unwrap_or_else(PoisonError::into_inner);
        let (what, words) = refused.iter().next()?;
        let more = match refused.len() - 1 {
            0 => String::new(),
            more => format!(", and {more} more"),
        };
        Some(format!("the API server forbids the agent to watch {what}{more}; apply its ClusterRole: {words}"))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_problem_ends_with_the_refusal() {
        let access = Access::default();
        assert_eq!(access.problem(), None);
        access.note("Services", Some("services is forbidden".into()));
        access.note("CircuitBreakers", Some("circuitbreakers is forbidden".into()));
        let problem = access.problem().unwrap_or_default();
        assert!(
            problem.contains("watch CircuitBreakers, and 1 more; apply its ClusterRole: circuitbreakers"),
            "{problem}"
        );
        access.note("CircuitBreakers", None);
        access.note("Services", None);
        assert_eq!(access.problem(), None);
    }
}
