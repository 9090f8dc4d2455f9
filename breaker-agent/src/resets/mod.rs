//! Reaches the established connections of a primary whose breaker opened (`onOpen: Reset`). The programs reset a connection
//! at its client's next segment, and a client that waits for an answer sends none. So the agent pokes each client, whose
//! kernel then answers, and the answer is reset.
//!
//! A thread of its own looks for the connections and pokes them, at the service's pace: neither may delay the main loop.

mod pace;
mod tracked;

use std::{
    collections::{BTreeMap, HashSet},
    net::SocketAddr,
    sync::{Arc, Mutex},
    time::Duration,
};

use anyhow::{Result, anyhow};
use breaker_common::PokeOutcome;
use breaker_core::{engine::Resetting, model::ServiceName};
use tokio::{
    sync::mpsc,
    task::{AbortHandle, yield_now},
    time::sleep_until,
};

use self::{pace::Pace, tracked::Tracked};
use crate::{
    clock,
    datapath::{poke::Poker, sock_destroy},
    supervise::TaskThread,
};

/// How often a client is poked, at most. A kernel answers only one unexpected segment of a connection in
/// `net.ipv4.tcp_invalid_ratelimit` (500 ms), so the answer to the first poke may be missing.
const ROUNDS: usize = 3;
/// Time between two pokes of one client, at least.
const REPEAT: Duration = Duration::from_millis(550);

/// Pokes without a pause, after which other services have their turn.
const TURN: usize = 32;
/// Pokes a second for all services together: a third of a CPU. Thousands of services may open in one moment.
const NODE_PER_SECOND: u32 = 10_000;

/// The outcome for the established connections of one service.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Report {
    /// The service.
    pub service: ServiceName,
    /// Connections that were found.
    pub found: usize,
    /// Those of them that are still there: their clients do not answer, or are gone.
    pub unreached: usize,
    /// Those of them that belong to the node's own processes and could not be closed.
    pub local: usize,
    /// How long it took.
    pub took: Duration,
    /// Why it ended early.
    pub error: Option<String>,
}

/// A connection, as its client sees it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
struct Connection {
    client: SocketAddr,
    frontend: SocketAddr,
}

/// State that all services under way share. They run in one thread, so nobody waits for a lock.
#[derive(Clone, Debug)]
struct Means {
    poker: Arc<Poker>,
    tracked: Arc<Mutex<Tracked>>,
    /// The pace of the node, for all services together.
    pace: Arc<Mutex<Pace>>,
}

/// A service whose connections are looked for until this is dropped, also where its task is aborted.
struct Looking<'a> {
    service: &'a Resetting,
    means: &'a Means,
}

impl<'a> Looking<'a> {
    fn begin(service: &'a Resetting, means: &'a Means) -> Self {
        if let Ok(mut tracked) = means.tracked.lock() {
            tracked.begin(&service.frontends);
        }
        Self { service, means }
    }

    fn look(&self) -> Result<HashSet<Connection>> {
        let mut tracked = self.means.tracked.lock().map_err(|_| anyhow!("an earlier look failed"))?;
        tracked.look(&self.service.frontends)
    }
}

impl Drop for Looking<'_> {
    fn drop(&mut self) {
        if let Ok(mut tracked) = self.means.tracked.lock() {
            tracked.end(&self.service.frontends);
        }
    }
}

/// The thread that pokes, and what it does now.
#[derive(Debug)]
pub struct Resets {
    tasks: TaskThread,
    means: Means,
    reports: mpsc::UnboundedSender<Report>,
    /// The services whose connections are, or were, poked.
    begun: BTreeMap<ServiceName, (Resetting, AbortHandle)>,
    /// `true` after the first call of [`Resets::follow`].
    has_followed: bool,
}

impl Resets {
    /// Starts the thread. Its reports go to `reports`.
    ///
    /// # Errors
    /// The thread cannot be started.
    pub fn start(poker: Poker, reports: mpsc::UnboundedSender<Report>) -> Result<Self> {
        let tasks = TaskThread::start("resets")?;
        let means = Means {
            poker: Arc::new(poker),
            tracked: Arc::default(),
            pace: Arc::new(Mutex::new(Pace::steady(NODE_PER_SECOND, clock::instant()))),
        };
        Ok(Self { tasks, means, reports, begun: BTreeMap::new(), has_followed: false })
    }

    /// Begins with the services whose established connections are reset from now on, and ends with those that are not in
    /// `wanted` any more. A service is begun once, and again when it opened anew or its configuration changed.
    pub fn follow(&mut self, wanted: Vec<Resetting>) {
        let mut ended = std::mem::take(&mut self.begun);
        // A service that is open already when the agent starts may have connections of the node's own processes that were
        // left to the primary since. (Those of pods have a pinned decision then, so a poke does them no harm.)
        let closes_sockets = std::mem::replace(&mut self.has_followed, true);
        for service in wanted {
            let name = service.name.clone();
            if let Some((begun, task)) = ended.remove(&name) {
                if begun == service {
                    self.begun.insert(name, (begun, task));
                    continue;
                }
                task.abort();
            }
            let (means, reports, job) = (self.means.clone(), self.reports.clone(), service.clone());
            let task = self.tasks.handle().spawn(async move {
                // The receiver is gone only when the agent ends.
                let _ = reports.send(reach_all(job, closes_sockets, &means).await);
            });
            self.begun.insert(name, (service, task.abort_handle()));
        }
        ended.into_values().for_each(|(_, task)| task.abort());
    }
}

/// Pokes the clients of a service's connections until none is left, or each was poked [`ROUNDS`] times.
async fn reach_all(service: Resetting, closes_sockets: bool, means: &Means) -> Report {
    let started = clock::instant();
    let mut report =
        Report { service: service.name.clone(), found: 0, unreached: 0, local: 0, took: Duration::ZERO, error: None };
    if let Err(error) = rounds(&service, closes_sockets, means, &mut report).await {
        report.error = Some(format!("{error:#}"));
    }
    report.took = clock::instant() - started;
    report
}

async fn rounds(service: &Resetting, closes_sockets: bool, means: &Means, report: &mut Report) -> Result<()> {
    let looking = Looking::begin(service, means);
    let mut left: Vec<Connection> = looking.look()?.into_iter().collect();
    // The order of the kernel's table would make the clients of one pod come together.
    fastrand::shuffle(&mut left);
    report.found = left.len();
    let mut pace = Pace::new(service.per_second, clock::instant());
    let mut local = HashSet::new();
    for _ in 0..ROUNDS {
        if left.is_empty() {
            break;
        }
        for (number, connection) in left.iter().enumerate() {
            let now = clock::instant();
            let of_node = means.pace.lock().map_or(now, |mut pace| pace.next(now));
            let due = pace.next(now).max(of_node);
            if due > now {
                sleep_until(due).await;
            } else if number % TURN == 0 {
                yield_now().await;
            }
            let Connection { client, frontend } = *connection;
            if means.poker.poke(client, frontend)? == PokeOutcome::Local
                && !(closes_sockets && sock_destroy::close(client, frontend).unwrap_or(false))
            {
                local.insert(*connection);
            }
        }
        sleep_until(clock::instant() + REPEAT).await;
        let there = looking.look()?;
        left.retain(|connection| there.contains(connection) && !local.contains(connection));
        report.unreached = left.len();
    }
    report.local = local.len();
    Ok(())
}
