//! The established connections of a tier that a service has left: of the primary when the breaker opened, of the backup when
//! it closed, and of a backup's backend that is Down. They are counted and, where the policy says so, reset.
//!
//! The programs reset a connection at its client's next segment, and a client that waits for an answer sends none. So the
//! agent pokes each client, whose kernel then answers, and the answer is reset.
//!
//! A thread of its own finds the connections and pokes their clients, at the service's pace: neither may delay the main loop.

mod established;
mod pace;

use std::{
    collections::{BTreeMap, HashSet},
    net::{IpAddr, SocketAddr},
    sync::{
        Arc, Mutex, MutexGuard, PoisonError,
        atomic::{AtomicBool, Ordering},
    },
    time::Duration,
};

use anyhow::Result;
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

/// The agent's knowledge of the established connections of a tier that a service has left.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Report {
    /// The service.
    pub service: ServiceName,
    /// The numbers.
    pub counts: EstablishedCounts,
    /// Set in the report at the end of the resets.
    pub ended: Option<Ended>,
}

/// The end of resets.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Ended {
    /// How long they took.
    pub took: Duration,
    /// Those of the unreached connections that belong to the node's own processes.
    pub local: usize,
    /// Whether they were broken off, because the service returned or its configuration changed.
    pub broken_off: bool,
    /// The first error.
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
struct Shared {
    poker: Arc<Mutex<Poker>>,
    established: Arc<Mutex<Established>>,
    /// The pace of the node, for all services together.
    pace: Arc<Mutex<Pace>>,
    began: Instant,
}

/// Locks a mutex. After a panic of another job, what it protects is still whole.
fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Shared {
    /// The next moment of counting.
    fn next_count(&self) -> Instant {
        let now = clock::instant();
        let counts = (now - self.began).as_nanos() / COUNT.as_nanos() + 1;
        self.began + COUNT * u32::try_from(counts).unwrap_or(u32::MAX)
    }
}

/// The thread, and what it does now.
#[derive(Debug)]
pub struct Resets {
    tasks: TaskThread,
    shared: Shared,
    reports: mpsc::UnboundedSender<Report>,
    /// The departures that have, or had, a job, by service and by whether it is the primary that was left.
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
        let shared = Shared {
            poker: Arc::new(Mutex::new(poker)),
            established: Arc::new(Mutex::new(Established::new(flows, syns))),
            pace: Arc::new(Mutex::new(Pace::steady(NODE_PER_SECOND, now))),
            began: now,
        };
        Ok(Self { tasks, shared, reports, begun: BTreeMap::new(), has_followed: false })
    }

    /// Begins with the tiers that were left, and ends with those that are not in `departures` any more. One is begun once,
    /// and again when the tier was left anew or the configuration changed.
    pub fn follow(&mut self, departures: Vec<Departure>) {
        let mut ended = std::mem::take(&mut self.begun);
        // Of a service that is open already when the agent starts, connections of the node's own processes may be from after
        // the opening: they were left to the primary. (Those of pods have a pinned decision then, so a poke does them no harm.)
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
            let mut job = Job::new(departure.clone(), closes_sockets, self.shared.clone(), self.reports.clone());
            let task = self.tasks.handle().spawn(async move { job.run().await });
            self.begun.insert(key, (departure, task.abort_handle()));
        }
        ended.into_values().for_each(|(_, task)| task.abort());
    }
}

/// The established connections of one departure. When it is dropped, which is also where its task is aborted, it ends its
/// pokes and reports what it has reached.
struct Job {
    departure: Departure,
    /// Whether connections of the node's own processes are closed.
    closes_sockets: bool,
    shared: Shared,
    reports: mpsc::UnboundedSender<Report>,
    /// When the shared state knew the service's addresses; `None` before.
    since: Option<Instant>,
    /// Tells a thread that closes sockets to stop.
    is_over: Arc<AtomicBool>,
    poked: HashSet<Connection>,
    counts: EstablishedCounts,
    resets: Option<Resetting>,
}

/// Resets under way.
struct Resetting {
    began: Instant,
    local: usize,
    error: Option<String>,
}

impl Job {
    fn new(departure: Departure, closes_sockets: bool, shared: Shared, reports: mpsc::UnboundedSender<Report>) -> Self {
        let counts = EstablishedCounts::none_of(departure.from.tier());
        let (poked, is_over) = (HashSet::new(), Arc::default());
        Self { departure, closes_sockets, shared, reports, since: None, is_over, poked, counts, resets: None }
    }

    /// Resets the connections if they are to be reset, and counts those to a primary until none is left.
    async fn run(&mut self) {
        let since = lock(&self.shared.established).begin(&self.departure.frontends);
        self.since = Some(since);
        // Other services that were left in the same moment begin, too, and share the first reading.
        yield_now().await;
        self.resets =
            self.departure.resets_per_second.map(|_| Resetting { began: clock::instant(), local: 0, error: None });
        let mut found = self.list().await;
        self.counts.found = found.len();
        self.counts.left = found.len();
        if let Some(per_second) = self.departure.resets_per_second {
            self.counts.is_resetting = self.counts.found > 0;
            self.report(None);
            found = self.reset_all(found, per_second).await;
            self.end_resets(false);
        } else {
            self.report(None);
        }
        while self.departure.from == Departed::Primary && self.counts.left > 0 {
            sleep_until(self.shared.next_count()).await;
            let there = self.list().await;
            found.retain(|connection| there.contains(connection));
            if std::mem::replace(&mut self.counts.left, found.len()) != found.len() {
                self.report(None);
            }
        }
    }

    /// The connections that are established now. Where the kernel does not tell, it is asked again until it does.
    async fn list(&mut self) -> HashSet<Connection> {
        let mut has_warned = false;
        let since = self.since.unwrap_or_else(clock::instant);
        loop {
            let listed = lock(&self.shared.established).list(&self.departure, since);
            match listed {
                Ok(found) => return found,
                Err(error) => {
                    if !std::mem::replace(&mut has_warned, true) {
                        tracing::warn!("cannot find the connections of {}: {error:#}", self.departure.service);
                    }
                    self.note_error(&error);
                }
            }
            sleep_until(self.shared.next_count()).await;
        }
    }

    /// The receiver is gone only when the agent ends.
    fn report(&self, ended: Option<Ended>) {
        let _ = self.reports.send(Report { service: self.departure.service.clone(), counts: self.counts, ended });
    }

    fn end_resets(&mut self, broken_off: bool) {
        let Some(Resetting { began, local, error }) = self.resets.take() else { return };
        self.counts.is_resetting = false;
        self.report(Some(Ended { took: clock::instant() - began, local, broken_off, error }));
    }

    /// Pokes the clients of the connections until none is left, or each was poked [`ROUNDS`] times. Returns the connections
    /// that are left.
    async fn reset_all(&mut self, found: HashSet<Connection>, per_second: u32) -> HashSet<Connection> {
        let mut left: Vec<Connection> = found.into_iter().collect();
        // The order of the kernel's table would make the clients of one pod come together.
        fastrand::shuffle(&mut left);
        let mut pace = Pace::new(per_second, clock::instant());
        // Connections of the node's own processes that could not be closed.
        let mut local = HashSet::new();
        for _ in 0..ROUNDS {
            if left.is_empty() {
                break;
            }
            let mut unresolved: HashSet<IpAddr> = HashSet::new();
            let mut spared = HashSet::new();
            for (number, connection) in left.iter().enumerate() {
                self.wait_for_turn(&mut pace, number).await;
                match self.poke(*connection) {
                    Ok(PokeOutcome::Local) => match self.close_local(connection) {
                        Some(true) => {}
                        Some(false) => _ = local.insert(*connection),
                        None => _ = spared.insert(*connection),
                    },
                    Ok(PokeOutcome::NoNeighbor) => _ = unresolved.insert(connection.client.ip()),
                    Ok(_) => {}
                    Err(error) => self.note_error(&error),
                }
            }
            if !unresolved.is_empty()
                && let Err(error) = neighbors::resolve(&unresolved).await
            {
                self.note_error(&error);
            }
            sleep_until(clock::instant() + REPEAT).await;
            let there = self.list().await;
            self.end_pokes(|connection| !there.contains(connection));
            // Connections that may be from after the opening are not counted.
            self.counts.found -= spared.len();
            left.retain(|connection| {
                there.contains(connection) && !spared.contains(connection) && !local.contains(connection)
            });
            self.counts.left = left.len() + local.len();
            self.counts.reset = self.counts.found - self.counts.left;
            self.report(None);
        }
        let refused = self.end_pokes(|_| true);
        let (gone, silent): (Vec<_>, Vec<_>) = left.into_iter().partition(|connection| refused.contains(connection));
        self.forget(&gone);
        self.counts.gone = gone.len();
        let mut left = self.close_in_pods(silent.into_iter().collect()).await;
        if let Some(resets) = &mut self.resets {
            resets.local = local.len();
        }
        left.extend(local);
        self.counts.unreached = left.len();
        self.counts.left = left.len();
        self.counts.reset = self.counts.found - left.len() - gone.len();
        left
    }

    async fn wait_for_turn(&self, pace: &mut Pace, number: usize) {
        let now = clock::instant();
        let of_node = lock(&self.shared.pace).next(now);
        let due = pace.next(now).max(of_node);
        if due > now {
            sleep_until(due).await;
        } else if number.is_multiple_of(TURN) {
            yield_now().await;
        }
    }

    fn poke(&mut self, connection: Connection) -> Result<PokeOutcome> {
        self.poked.insert(connection);
        lock(&self.shared.poker).poke(connection.client, connection.frontend)
    }

    /// Ends the pokes of some connections, and returns those of them that their clients do not have.
    fn end_pokes(&mut self, which: impl Fn(&Connection) -> bool) -> HashSet<Connection> {
        let mut poker = lock(&self.shared.poker);
        let ended = self.poked.extract_if(which);
        ended.filter(|connection| poker.end(connection.client, connection.frontend)).collect()
    }

    /// Closes a connection of one of the node's own processes. Returns whether it is closed; `None` if it is left alone,
    /// because it may be from after the opening.
    fn close_local(&mut self, Connection { client, frontend }: &Connection) -> Option<bool> {
        if !self.closes_sockets {
            return None;
        }
        match sock_destroy::close(*client, *frontend) {
            Ok(_) => Some(true),
            Err(error) => {
                self.note_error(&error);
                Some(false)
            }
        }
    }

    fn note_error(&mut self, error: &anyhow::Error) {
        if let Some(resets) = &mut self.resets {
            resets.error.get_or_insert_with(|| format!("{error:#}"));
        }
    }

    /// Deletes the entries of connections to a primary that their clients no longer have.
    fn forget(&self, gone: &[Connection]) {
        if self.departure.from != Departed::Primary {
            return;
        }
        for Connection { client, frontend } in gone {
            if let Err(error) = lock(&self.shared.established).forget(*client, *frontend) {
                tracing::debug!("the entry of {client} stays: {error:#}");
            }
        }
    }

    /// Closes connections whose clients do not answer in the clients' pods, and returns the others.
    async fn close_in_pods(&self, mut silent: HashSet<Connection>) -> HashSet<Connection> {
        // A client may have used its port again for a connection that is redirected. The kernel's entry is still the old
        // connection's.
        let is_new = |connection: &Connection| {
            self.departure.from == Departed::Primary
                && lock(&self.shared.established).is_moved(connection.client, connection.frontend)
        };
        let ends: Vec<_> =
            silent.iter().filter(|connection| !is_new(connection)).map(|end| (end.client, end.frontend)).collect();
        if ends.is_empty() {
            return silent;
        }
        let is_over = self.is_over.clone();
        let closing = spawn_blocking(move || sock_destroy::close_in_pods(&ends, &is_over));
        for (client, frontend) in closing.await.unwrap_or_default() {
            silent.remove(&Connection { client, frontend });
        }
        silent
    }
}

impl Drop for Job {
    fn drop(&mut self) {
        self.is_over.store(true, Ordering::Relaxed);
        self.end_pokes(|_| true);
        if self.since.is_some() {
            lock(&self.shared.established).end(&self.departure.frontends);
        }
        self.end_resets(true);
    }
}
