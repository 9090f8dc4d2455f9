//! Looks after the established connections of a tier that a service has left: of the primary when the breaker opened, of
//! the backup when it closed, and of a backup's backend that is Down. Counts them, and reaches them where they are to be
//! reset.
//!
//! The programs reset a connection at its client's next segment, and a client that waits for an answer sends none. So the
//! agent pokes each client, whose kernel then answers, and the answer is reset.
//!
//! A thread of its own looks for the connections and pokes them, at the service's pace: neither may delay the main loop.

mod established;
mod pace;

use std::{
    collections::{BTreeMap, HashSet},
    net::{IpAddr, SocketAddr},
    sync::{Arc, Mutex},
    time::Duration,
};

use anyhow::{Result, anyhow};
use breaker_common::PokeOutcome;
use breaker_core::{
    engine::{
        departure::{Departed, Departure},
        established::EstablishedCounts,
    },
    model::ServiceName,
};
use tokio::{
    sync::mpsc,
    task::{AbortHandle, spawn_blocking, yield_now},
    time::{Instant, sleep_until},
};

use self::{established::Established, pace::Pace};
use crate::{
    clock,
    datapath::{moved_flows::MovedFlows, neighbors, poke::Poker, sock_destroy, syns::Syns},
    supervise::TaskThread,
};

/// How often a client is poked, at most. A kernel answers only one unexpected segment of a connection in
/// `net.ipv4.tcp_invalid_ratelimit` (500 ms), so the answer to the first poke may be missing.
const ROUNDS: usize = 3;
/// Time between two pokes of one client, at least.
const REPEAT: Duration = Duration::from_millis(550);
/// How often the connections that go on are counted. All services are counted in the same moment, from one reading.
const COUNT: Duration = Duration::from_secs(10);

/// Pokes without a pause, after which other services have their turn.
const TURN: usize = 32;
/// Pokes a second for all services together: a third of a CPU. Thousands of services may open in one moment.
const NODE_PER_SECOND: u32 = 10_000;

/// What is known of the established connections of a tier that a service has left.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Report {
    /// The service.
    pub service: ServiceName,
    /// The numbers.
    pub counts: EstablishedCounts,
    /// Set in the report after the resets.
    pub ended: Option<Ended>,
}

/// The end of resets.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Ended {
    /// How long they took.
    pub took: Duration,
    /// Those of the unreached connections that belong to the node's own processes.
    pub local: usize,
    /// Why they ended early.
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
    poker: Arc<Mutex<Poker>>,
    established: Arc<Mutex<Established>>,
    /// The pace of the node, for all services together.
    pace: Arc<Mutex<Pace>>,
    began: Instant,
}

impl Means {
    /// The next moment of counting.
    fn next_count(&self) -> Instant {
        let now = clock::instant();
        let counts = (now - self.began).as_nanos() / COUNT.as_nanos() + 1;
        self.began + COUNT * u32::try_from(counts).unwrap_or(u32::MAX)
    }
}

/// Connections that are looked for and poked until this is dropped, also where the task is aborted.
struct Reaching<'a> {
    departure: &'a Departure,
    means: &'a Means,
    poked: HashSet<Connection>,
}

impl<'a> Reaching<'a> {
    fn begin(departure: &'a Departure, means: &'a Means) -> Self {
        if let Ok(mut established) = means.established.lock() {
            established.begin(&departure.frontends);
        }
        Self { departure, means, poked: HashSet::new() }
    }

    fn look(&self) -> Result<HashSet<Connection>> {
        let mut established = self.means.established.lock().map_err(|_| anyhow!("an earlier look failed"))?;
        established.look(self.departure)
    }

    /// Forgets a connection to a primary that its client does not have.
    fn forget(&self, connection: Connection) -> Result<()> {
        let mut established = self.means.established.lock().map_err(|_| anyhow!("an earlier look failed"))?;
        established.forget(connection)
    }

    fn poke(&mut self, connection: Connection) -> Result<PokeOutcome> {
        self.poked.insert(connection);
        let mut poker = self.means.poker.lock().map_err(|_| anyhow!("an earlier poke failed"))?;
        poker.poke(connection.client, connection.frontend)
    }

    /// Ends all pokes, and returns the connections that their clients do not have.
    fn end_pokes(&mut self) -> HashSet<Connection> {
        let Ok(mut poker) = self.means.poker.lock() else { return HashSet::new() };
        self.poked.drain().filter(|connection| poker.end(connection.client, connection.frontend)).collect()
    }
}

impl Drop for Reaching<'_> {
    fn drop(&mut self) {
        self.end_pokes();
        if let Ok(mut established) = self.means.established.lock() {
            established.end(&self.departure.frontends);
        }
    }
}

/// The thread, and what it does now.
#[derive(Debug)]
pub struct Resets {
    tasks: TaskThread,
    means: Means,
    reports: mpsc::UnboundedSender<Report>,
    /// The departures that are, or were, looked after, by service and by whether it is the primary that was left.
    begun: BTreeMap<(ServiceName, bool), (Departure, AbortHandle)>,
    /// `true` after the first call of [`Resets::follow`].
    has_followed: bool,
}

impl Resets {
    /// Starts the thread. Its reports go to `reports`. `syns`: the connections to primaries that the programs noted, if the
    /// kernel does not track them.
    ///
    /// # Errors
    /// The thread cannot be started.
    pub fn start(
        poker: Poker,
        flows: MovedFlows,
        syns: Option<Syns>,
        reports: mpsc::UnboundedSender<Report>,
    ) -> Result<Self> {
        let tasks = TaskThread::start("resets")?;
        let now = clock::instant();
        let means = Means {
            poker: Arc::new(Mutex::new(poker)),
            established: Arc::new(Mutex::new(Established::new(flows, syns))),
            pace: Arc::new(Mutex::new(Pace::steady(NODE_PER_SECOND, now))),
            began: now,
        };
        Ok(Self { tasks, means, reports, begun: BTreeMap::new(), has_followed: false })
    }

    /// Begins with the tiers that were left, and ends with those that are not in `departures` any more. One is begun once,
    /// and again when the tier was left anew or the configuration changed.
    pub fn follow(&mut self, departures: Vec<Departure>) {
        let mut ended = std::mem::take(&mut self.begun);
        // A service that is open already when the agent starts may have connections of the node's own processes that were
        // left to the primary since. (Those of pods have a pinned decision then, so a poke does them no harm.)
        let closes_sockets = std::mem::replace(&mut self.has_followed, true);
        for departure in departures {
            let key = (departure.service.clone(), departure.from == Departed::Primary);
            if let Some((begun, task)) = ended.remove(&key) {
                if begun == departure {
                    self.begun.insert(key, (begun, task));
                    continue;
                }
                task.abort();
            }
            let job = Job {
                departure: departure.clone(),
                closes_sockets,
                means: self.means.clone(),
                reports: self.reports.clone(),
            };
            let task = self.tasks.handle().spawn(async move { job.run().await });
            self.begun.insert(key, (departure, task.abort_handle()));
        }
        ended.into_values().for_each(|(_, task)| task.abort());
    }
}

/// Looks after one departure.
struct Job {
    departure: Departure,
    /// Whether connections of the node's own processes are closed.
    closes_sockets: bool,
    means: Means,
    reports: mpsc::UnboundedSender<Report>,
}

impl Job {
    /// Resets the connections if they are to be reset, and counts those to a primary until none is left.
    async fn run(self) {
        let mut reaching = Reaching::begin(&self.departure, &self.means);
        let mut counts = EstablishedCounts {
            tier: self.departure.from.tier(),
            found: 0,
            reset: 0,
            gone: 0,
            unreached: 0,
            left: 0,
            is_resetting: false,
        };
        if let Some(per_second) = self.departure.resets_per_second {
            let started = clock::instant();
            let outcome = self.reset_all(&mut reaching, per_second, &mut counts).await;
            counts.is_resetting = false;
            let (local, error) = match outcome {
                Ok(local) => (local, None),
                Err(error) => (0, Some(format!("{error:#}"))),
            };
            self.report(counts, Some(Ended { took: clock::instant() - started, local, error }));
        } else if let Ok(found) = reaching.look() {
            (counts.found, counts.left) = (found.len(), found.len());
            self.report(counts, None);
        }
        while self.departure.from == Departed::Primary && counts.left > 0 {
            sleep_until(self.means.next_count()).await;
            let Ok(left) = reaching.look() else { continue };
            if std::mem::replace(&mut counts.left, left.len()) != left.len() {
                self.report(counts, None);
            }
        }
    }

    /// The receiver is gone only when the agent ends.
    fn report(&self, counts: EstablishedCounts, ended: Option<Ended>) {
        let _ = self.reports.send(Report { service: self.departure.service.clone(), counts, ended });
    }

    /// Pokes the clients of the connections until none is left, or each was poked [`ROUNDS`] times. Returns how many
    /// connections of the node's own processes could not be closed.
    async fn reset_all(
        &self,
        reaching: &mut Reaching<'_>,
        per_second: u32,
        counts: &mut EstablishedCounts,
    ) -> Result<usize> {
        let mut left: Vec<Connection> = reaching.look()?.into_iter().collect();
        // The order of the kernel's table would make the clients of one pod come together.
        fastrand::shuffle(&mut left);
        (counts.found, counts.left, counts.is_resetting) = (left.len(), left.len(), !left.is_empty());
        self.report(*counts, None);
        let mut pace = Pace::new(per_second, clock::instant());
        let mut local = HashSet::new();
        for _ in 0..ROUNDS {
            if left.is_empty() {
                break;
            }
            let mut unresolved: HashSet<IpAddr> = HashSet::new();
            for (number, connection) in left.iter().enumerate() {
                self.wait_for_turn(&mut pace, number).await;
                let Connection { client, frontend } = *connection;
                match reaching.poke(*connection)? {
                    PokeOutcome::Local if !self.close_local(client, frontend) => _ = local.insert(*connection),
                    PokeOutcome::NoNeighbor => _ = unresolved.insert(client.ip()),
                    _ => {}
                }
            }
            if !unresolved.is_empty()
                && let Err(error) = neighbors::resolve(&unresolved).await
            {
                tracing::warn!("clients without a neighbor entry are not reached: {error:#}");
            }
            sleep_until(clock::instant() + REPEAT).await;
            let there = reaching.look()?;
            left.retain(|connection| there.contains(connection) && !local.contains(connection));
            (counts.left, counts.reset) = (left.len() + local.len(), counts.found - left.len() - local.len());
            self.report(*counts, None);
        }
        self.end_rest(left, reaching, counts).await;
        counts.unreached += local.len();
        counts.left = counts.unreached;
        counts.reset = counts.found - counts.unreached - counts.gone;
        Ok(local.len())
    }

    async fn wait_for_turn(&self, pace: &mut Pace, number: usize) {
        let now = clock::instant();
        let of_node = self.means.pace.lock().map_or(now, |mut pace| pace.next(now));
        let due = pace.next(now).max(of_node);
        if due > now {
            sleep_until(due).await;
        } else if number.is_multiple_of(TURN) {
            yield_now().await;
        }
    }

    fn close_local(&self, client: SocketAddr, frontend: SocketAddr) -> bool {
        self.closes_sockets && sock_destroy::close(client, frontend).unwrap_or(false)
    }

    /// Ends what the pokes did not: entries of clients that no longer have the connection, and sockets in pods.
    async fn end_rest(&self, left: Vec<Connection>, reaching: &mut Reaching<'_>, counts: &mut EstablishedCounts) {
        let refused = reaching.end_pokes();
        let (gone, silent): (Vec<_>, Vec<_>) = left.into_iter().partition(|connection| refused.contains(connection));
        counts.gone = gone.len();
        if self.departure.from == Departed::Primary {
            for connection in gone {
                if let Err(error) = reaching.forget(connection) {
                    tracing::debug!("the entry of {} stays: {error:#}", connection.client);
                }
            }
        }
        counts.unreached = silent.len();
        if silent.is_empty() {
            return;
        }
        let ends: Vec<_> = silent.iter().map(|connection| (connection.client, connection.frontend)).collect();
        let closed = spawn_blocking(move || sock_destroy::close_in_pods(&ends)).await.unwrap_or_default();
        counts.unreached -= closed.len();
    }
}
