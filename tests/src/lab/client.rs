//! Clients that keep sending requests to a Service and record each one: its outcome, its duration, and the pod that
//! answered.

use std::{
    collections::BTreeMap,
    fmt, io,
    net::SocketAddrV4,
    sync::{
        Arc, Mutex, PoisonError,
        atomic::{AtomicBool, Ordering},
    },
    thread::JoinHandle,
    time::{Duration, Instant},
};

use anyhow::{Context as _, Result};
use bytes::{Buf as _, BytesMut};
use tokio::{
    io::{AsyncReadExt as _, AsyncWriteExt as _},
    net::TcpStream,
    time::{interval, sleep, timeout},
};

use super::netns::NetNs;

/// Outcome of a request, as the client sees it.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Outcome {
    /// An HTTP response: its status, and the text after `FROM` in its body, which names the pod.
    Answer(u16, String),
    /// The connection was refused.
    Refused,
    /// The connection was reset.
    Reset,
    /// The connection was closed before the response was complete.
    Closed,
    /// The connection was not established in time.
    NotConnected,
    /// The response did not arrive in time.
    NoAnswer,
    /// Any other error, as text.
    Other(String),
}

impl Outcome {
    /// The outcome that corresponds to a socket's error.
    #[must_use]
    pub fn of(error: &io::Error) -> Self {
        match error.kind() {
            io::ErrorKind::ConnectionRefused => Self::Refused,
            io::ErrorKind::ConnectionReset | io::ErrorKind::BrokenPipe => Self::Reset,
            io::ErrorKind::TimedOut => Self::NotConnected,
            io::ErrorKind::UnexpectedEof => Self::Closed,
            _ => Self::Other(error.to_string()),
        }
    }

    /// Whether it is a response with status 200, from any pod.
    #[must_use]
    pub const fn is_success(&self) -> bool {
        matches!(self, Self::Answer(200, _))
    }

    /// The pod that answered, if one did.
    #[must_use]
    pub fn pod(&self) -> Option<&str> {
        match self {
            Self::Answer(_, pod) => Some(pod),
            _ => None,
        }
    }
}

impl fmt::Display for Outcome {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Answer(status, pod) => write!(f, "{status} from {pod}"),
            Self::Refused => f.write_str("refused"),
            Self::Reset => f.write_str("reset"),
            Self::Closed => f.write_str("closed"),
            Self::NotConnected => f.write_str("not connected"),
            Self::NoAnswer => f.write_str("no answer"),
            Self::Other(error) => f.write_str(error),
        }
    }
}

/// Record of one request.
#[derive(Clone, Debug)]
pub struct Record {
    /// When the request began: for a new connection, before it was established.
    pub at: Instant,
    /// How long the request took.
    pub took: Duration,
    /// Whether the client keeps its connection for several requests.
    pub keep_alive: bool,
    /// Outcome of the request.
    pub outcome: Outcome,
}

/// Load to generate.
#[derive(Clone, Copy, Debug)]
pub struct Plan {
    /// Address and port to connect to.
    pub target: SocketAddrV4,
    /// New connections per second, with one request each. May be 0.
    pub per_second: u32,
    /// Number of clients that keep their connection; each sends a request, then pauses for 20 ms. May be 0.
    pub keep_alive: u32,
    /// Time limit of a request. On a new connection for one request it includes connecting; a keep-alive client has as
    /// much time again to connect.
    pub limit: Duration,
}

impl Plan {
    /// The usual load: 200 new connections per second, 4 clients that keep their connection, 1 s for a request.
    #[must_use]
    pub const fn usual(target: SocketAddrV4) -> Self {
        Self { target, per_second: 200, keep_alive: 4, limit: Duration::from_secs(1) }
    }
}

/// Clients that are running. Dropping it stops them.
#[derive(Debug)]
pub struct Load {
    stop: Arc<AtomicBool>,
    records: Arc<Mutex<Vec<Record>>>,
    thread: Option<JoinHandle<Result<()>>>,
}

impl Load {
    /// Starts the clients in a network namespace.
    ///
    /// # Errors
    /// Fails if the thread cannot be started.
    pub fn start(ns: &NetNs, plan: Plan) -> Result<Self> {
        let stop = Arc::new(AtomicBool::new(false));
        let records: Arc<Mutex<Vec<Record>>> = Arc::default();
        let (s, r) = (stop.clone(), records.clone());
        let thread = ns.thread(move || {
            // A runtime with a single thread: every socket is then opened in this thread's namespace.
            if let Ok(runtime) = tokio::runtime::Builder::new_current_thread().enable_all().build() {
                runtime.block_on(drive(plan, s, r));
            }
        })?;
        Ok(Self { stop, records, thread: Some(thread) })
    }

    /// All records so far, in the order in which the requests ended.
    #[must_use]
    pub fn records(&self) -> Vec<Record> {
        self.records.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// Waits until `condition` holds for the records so far. The records are in the order in which the requests ended.
    ///
    /// # Errors
    /// Fails after `limit`; the error contains a summary of the last 200 requests.
    pub fn wait(&self, what: &str, limit: Duration, mut condition: impl FnMut(&[Record]) -> bool) -> Result<()> {
        super::wait_for(what, limit, || condition(&self.records.lock().unwrap_or_else(PoisonError::into_inner)))
            .with_context(|| format!("the last requests: {:?}", summary(self.records().iter().rev().take(200))))
    }

    /// Stops the clients and waits for the requests that are under way. Returns all records, in the order in which the
    /// requests began.
    ///
    /// # Errors
    /// Fails if the clients' thread could not enter its namespace.
    pub fn stop(mut self) -> Result<Vec<Record>> {
        self.stop.store(true, Ordering::SeqCst);
        if let Some(thread) = self.thread.take()
            && let Ok(outcome) = thread.join()
        {
            outcome?;
        }
        let mut records = self.records();
        records.sort_by_key(|record| record.at);
        Ok(records)
    }
}

impl Drop for Load {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::SeqCst);
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}

/// Sends one request on a new connection from a network namespace.
///
/// # Errors
/// Fails if the thread or its runtime cannot be started. A request that fails is an [`Outcome`], not an error.
pub fn ask_once(from: &NetNs, target: SocketAddrV4) -> Result<Outcome> {
    let outcome = from.enter(move || {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
        runtime.block_on(async {
            let mut connection = match Connection::open(target).await {
                Ok(connection) => connection,
                Err(error) => return Ok(Outcome::of(&error)),
            };
            Ok::<_, io::Error>(connection.ask(false, Duration::from_secs(5)).await)
        })
    })?;
    outcome.context("start a runtime for one request")
}

/// Number of requests by outcome.
#[must_use]
pub fn summary<'a>(records: impl IntoIterator<Item = &'a Record>) -> BTreeMap<String, usize> {
    let mut counts = BTreeMap::new();
    for record in records {
        *counts.entry(record.outcome.to_string()).or_default() += 1;
    }
    counts
}

type Records = Arc<Mutex<Vec<Record>>>;

async fn drive(plan: Plan, stop: Arc<AtomicBool>, records: Records) {
    let mut tasks = Vec::new();
    for _ in 0..plan.keep_alive {
        tasks.push(tokio::spawn(keep_asking(plan, stop.clone(), records.clone())));
    }
    if plan.per_second > 0 {
        let mut tick = interval(Duration::from_secs(1) / plan.per_second);
        while !stop.load(Ordering::SeqCst) {
            tick.tick().await;
            tasks.push(tokio::spawn(ask_new(plan, records.clone())));
            if tasks.len() > 10_000 {
                tasks.retain(|task| !task.is_finished());
            }
        }
    }
    for task in tasks {
        let _ = task.await;
    }
}

fn record(records: &Records, at: Instant, keep_alive: bool, outcome: Outcome) {
    let record = Record { at, took: at.elapsed(), keep_alive, outcome };
    records.lock().unwrap_or_else(PoisonError::into_inner).push(record);
}

/// Sends one request on a new connection.
async fn ask_new(plan: Plan, records: Records) {
    let at = Instant::now();
    let outcome = match connect(plan, plan.limit).await {
        Ok(mut connection) => {
            let left = plan.limit.saturating_sub(at.elapsed());
            connection.ask(false, left).await
        }
        Err(outcome) => outcome,
    };
    record(&records, at, false, outcome);
}

/// Sends one request after the other on one connection, and opens a new connection after a failure.
async fn keep_asking(plan: Plan, stop: Arc<AtomicBool>, records: Records) {
    const PAUSE: Duration = Duration::from_millis(20);
    let mut connection = None;
    while !stop.load(Ordering::SeqCst) {
        let at = Instant::now();
        let mut current = match connection.take() {
            Some(current) => current,
            None => match connect(plan, plan.limit).await {
                Ok(new) => new,
                Err(outcome) => {
                    record(&records, at, true, outcome);
                    sleep(PAUSE).await;
                    continue;
                }
            },
        };
        let outcome = current.ask(true, plan.limit).await;
        if outcome.is_success() {
            connection = Some(current);
        }
        record(&records, at, true, outcome);
        sleep(PAUSE).await;
    }
}

async fn connect(plan: Plan, limit: Duration) -> Result<Connection, Outcome> {
    match timeout(limit, TcpStream::connect(plan.target)).await {
        Ok(Ok(stream)) => {
            let _ = stream.set_nodelay(true);
            Ok(Connection { stream, buffer: BytesMut::with_capacity(1024), target: plan.target })
        }
        Ok(Err(error)) => Err(Outcome::of(&error)),
        Err(_) => Err(Outcome::NotConnected),
    }
}

/// An HTTP/1.1 connection for requests `GET /`.
#[derive(Debug)]
pub struct Connection {
    stream: TcpStream,
    buffer: BytesMut,
    target: SocketAddrV4,
}

impl Connection {
    /// Connects, without a time limit.
    ///
    /// # Errors
    /// Returns the socket's error.
    pub async fn open(target: SocketAddrV4) -> io::Result<Self> {
        let stream = TcpStream::connect(target).await?;
        stream.set_nodelay(true)?;
        Ok(Self { stream, buffer: BytesMut::with_capacity(1024), target })
    }

    /// Sends one request and reads the response. If `keep_alive` is false, the request asks the server to close the
    /// connection afterwards.
    pub async fn ask(&mut self, keep_alive: bool, limit: Duration) -> Outcome {
        match timeout(limit, self.exchange(keep_alive)).await {
            Ok(Ok(outcome)) => outcome,
            Ok(Err(error)) => Outcome::of(&error),
            Err(_) => Outcome::NoAnswer,
        }
    }

    async fn exchange(&mut self, keep_alive: bool) -> io::Result<Outcome> {
        let connection = if keep_alive { "keep-alive" } else { "close" };
        let request = format!("GET / HTTP/1.1\r\nhost: {}\r\nconnection: {connection}\r\n\r\n", self.target);
        self.stream.write_all(request.as_bytes()).await?;
        loop {
            if let Some((outcome, length)) = parse(&self.buffer) {
                self.buffer.advance(length);
                return Ok(outcome);
            }
            if self.stream.read_buf(&mut self.buffer).await? == 0 {
                return Ok(Outcome::Closed);
            }
        }
    }
}

/// Parses a complete response at the start of a buffer, and returns its length in bytes; `None` if it is not complete.
fn parse(buffer: &[u8]) -> Option<(Outcome, usize)> {
    let end = buffer.windows(4).position(|window| window == b"\r\n\r\n")? + 4;
    let head = std::str::from_utf8(&buffer[..end]).ok()?;
    let status = head.split(' ').nth(1)?.parse().ok()?;
    let length = head.lines().find_map(|line| {
        let (name, value) = line.split_once(':')?;
        name.eq_ignore_ascii_case("content-length").then(|| value.trim().parse::<usize>().ok())?
    })?;
    let body = buffer.get(end..end + length)?;
    let body = String::from_utf8_lossy(body);
    let pod = body.rsplit("FROM ").next().unwrap_or_default().to_owned();
    Some((Outcome::Answer(status, pod), end + length))
}
