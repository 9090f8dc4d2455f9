//! Commands of an operator to the engine.

use std::{error::Error, fmt, time::Duration};

use super::{Engine, service::ServiceState, snapshot::ServiceSnapshot};
use crate::{
    datapath::{Datapath, DatapathError, FlowSnapshot},
    model::{Override, ServiceName},
    time::{Now, later},
};

/// A request that cannot be carried out.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum CommandError {
    /// There is no such service.
    UnknownService {
        /// The name in the request.
        name: String,
        /// The names of the configured services.
        known: String,
    },
    /// The configuration has an override of its own.
    Configured {
        /// The service.
        name: String,
        /// The configuration's override.
        wanted: Override,
    },
    /// The maps cannot be read.
    Datapath(DatapathError),
}

impl fmt::Display for CommandError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::UnknownService { name, known } => write!(f, "there is no service {name}; there are: {known}"),
            Self::Configured { name, wanted } => {
                write!(f, "the configuration sets override: {} for {name}; change it there", wanted.label())
            }
            Self::Datapath(error) => error.fmt(f),
        }
    }
}

impl Error for CommandError {}

impl Engine {
    /// Forces a service open, for `duration` or until [`Engine::reset`]. `why` appears in the status and the events.
    ///
    /// # Errors
    /// No such service; a service whose configuration has an override.
    pub fn force_open(
        &mut self,
        now: Now,
        name: &str,
        duration: Option<Duration>,
        why: Option<&str>,
        datapath: &mut dyn Datapath,
    ) -> Result<ServiceSnapshot, CommandError> {
        let name = self.find_without_override(name)?;
        let message = why.map_or_else(
            || "forced open by the operator".to_owned(),
            |why| format!("forced open by the operator: {why}"),
        );
        if let Some(state) = self.services.get_mut(&name) {
            state.operator.until_unix_ns = duration.and_then(|duration| later(now.unix_ns, duration));
            state.sync.outdate();
        }
        self.react(now, &name, &message, |breaker, _| breaker.set_override(now.mono, Override::ForceOpen, false));
        if let Some(state) = self.services.get_mut(&name) {
            state.message = message;
        }
        self.apply(now, &name, datapath);
        self.snapshot(now, name.as_str(), datapath)
    }

    /// Ends an operator's override and restarts the breaker: without backoff, and closed unless the primary is Down.
    ///
    /// # Errors
    /// As for [`Engine::force_open`].
    pub fn reset(
        &mut self,
        now: Now,
        name: &str,
        datapath: &mut dyn Datapath,
    ) -> Result<ServiceSnapshot, CommandError> {
        let name = self.find_without_override(name)?;
        if let Some(state) = self.services.get_mut(&name) {
            state.operator.until_unix_ns = None;
            state.sync.outdate();
        }
        self.react(now, &name, "reset by the operator", |breaker, _| breaker.reset(now.mono));
        self.apply(now, &name, datapath);
        self.snapshot(now, name.as_str(), datapath)
    }

    /// Returns a snapshot of one service.
    ///
    /// # Errors
    /// No such service.
    pub fn snapshot(&self, now: Now, name: &str, datapath: &dyn Datapath) -> Result<ServiceSnapshot, CommandError> {
        self.find(name).map(|state| state.snapshot(now, datapath))
    }

    /// A service's flows, youngest first, up to `limit`.
    ///
    /// # Errors
    /// No such service; maps that cannot be read.
    pub fn flows(&self, name: &str, limit: usize, datapath: &dyn Datapath) -> Result<Vec<FlowSnapshot>, CommandError> {
        let name = &self.find(name)?.service.name;
        datapath.flows(name, limit).map_err(CommandError::Datapath)
    }

    fn find(&self, name: &str) -> Result<&ServiceState, CommandError> {
        let state = self.services.get(&ServiceName::new(name)).filter(|state| state.is_configured());
        state.ok_or_else(|| {
            let configured = self.services.iter().filter(|(_, state)| state.is_configured());
            let known: Vec<&str> = configured.map(|(name, _)| name.as_str()).collect();
            CommandError::UnknownService { name: name.to_owned(), known: known.join(", ") }
        })
    }

    /// Finds a service that an operator may force: its configuration sets no override.
    fn find_without_override(&self, name: &str) -> Result<ServiceName, CommandError> {
        let service = &self.find(name)?.service;
        match service.override_ {
            Override::Auto => Ok(service.name.clone()),
            wanted => Err(CommandError::Configured { name: name.to_owned(), wanted }),
        }
    }
}
