//! Health checks. One execution of a check is a probe. Only this module opens probe sockets.
//!
//! A probe goes from the node directly to the address of a backend. The programs do not redirect it, because they
//! redirect only connections to addresses of frontends.
//!
//! | module | one concern |
//! |---|---|
//! | [`schedule`] | when each probe is made |
//! | [`reports`] | the way of results to the main loop |
//! | [`capacity`] | how many probes at the same time |
//! | [`stalls`] | when the agent itself did not run |
//! | [`outcome`] | errors of the target, and errors of this node |
//! | [`connect`], [`tls`] | connections, and how they end |
//! | [`tcp`], [`http`] ([`http1`], [`http2`], [`http_message`]), [`grpc`], [`exchange`], [`dns`] | one kind of check each |

mod capacity;
mod connect;
mod dns;
mod exchange;
mod grpc;
mod http;
mod http1;
mod http2;
mod http_message;
mod outcome;
pub mod reports;
mod schedule;
mod stalls;
mod tcp;
mod tls;

use std::{net::SocketAddr, pin::pin, sync::Arc, time::Duration};

use breaker_core::{
    model::{Check, CheckAction},
    probe::{CheckCode, ProbeLoad, ProbeResult},
};
use tokio::time::timeout_at;

use crate::{clock, supervise};
use capacity::Capacity;
use outcome::{Outcome, Progress, local};
use stalls::{Lost, Stalls};

pub use schedule::{Checkers, Known};

/// Executes probes. All probes share its TLS configuration and its capacity.
#[derive(Clone, Debug)]
pub struct Prober {
    tls: tls::Tls,
    capacity: Capacity,
    stalls: Arc<Stalls>,
}

/// How often the time limit of one probe is extended, because the agent did not run.
const EXTENSIONS: u32 = 10;

impl Prober {
    /// Makes a prober. Raises this process's limit of descriptors, and needs a runtime.
    #[must_use]
    pub fn start() -> Self {
        Self { tls: tls::Tls::new(), capacity: Capacity::of_process(), stalls: Arc::new(Stalls::watch()) }
    }

    /// The same prober, for another thread: it notices when that one does not run. Needs the thread's runtime.
    fn for_this_thread(&self) -> Self {
        Self { stalls: Arc::new(Stalls::watch()), ..self.clone() }
    }

    /// How busy the probes are.
    #[must_use]
    pub fn load(&self) -> ProbeLoad {
        self.capacity.load()
    }

    /// Counts a probe as late if it starts long after it was due.
    fn note_start(&self, late: Duration) {
        self.capacity.count_late(late);
    }

    /// Probes a backend once, when it is the probe's turn. The time limit counts time in which the agent ran.
    pub async fn probe(&self, check: &Check, backend: SocketAddr) -> ProbeResult {
        let Some(_turn) = self.capacity.turn().await else {
            let (code, detail) = (CheckCode::LocalError, "the agent ends".into());
            return ProbeResult { code, detail, duration: Duration::ZERO };
        };
        let (started, began) = (clock::stopwatch(), clock::boot_time());
        let progress = Progress::default();
        let attempt = self.attempt(check, backend, &progress);
        let outcome = match self.within_limit(check.timeout, attempt).await {
            Some(outcome) => outcome,
            None => match &check.action {
                CheckAction::HttpGet { get, .. } => http::timed_out(get, &progress),
                _ => progress.timed_out(),
            },
        };
        let (code, detail) = self.judge(outcome, began, check.timeout);
        if !code.is_result() {
            self.capacity.count_local_error();
        }
        ProbeResult { code, detail, duration: clock::since(started) }
    }

    /// Waits for the outcome of a probe; `None` if the time limit runs out. A panic is no outcome of the target.
    async fn within_limit(&self, limit: Duration, attempt: impl Future<Output = Outcome>) -> Option<Outcome> {
        let began = clock::boot_time();
        let mut attempt = pin!(supervise::contained(attempt));
        let mut deadline = clock::instant() + limit;
        for _ in 0..EXTENSIONS {
            // The attempt reads an answer that has arrived before the time limit is checked.
            match timeout_at(deadline, &mut attempt).await {
                Ok(Ok(outcome)) => return Some(outcome),
                Ok(Err(panic)) => return Some(local("a fault in breaker", std::io::Error::other(panic))),
                Err(_) => {
                    let ran = (clock::boot_time() - began).saturating_sub(self.stalls.since(began).total);
                    let left = limit.saturating_sub(ran);
                    if left < Duration::from_millis(1) {
                        break;
                    }
                    deadline = clock::instant() + left;
                }
            }
        }
        None
    }

    /// Takes away a failure that may come from a stall of the agent: meanwhile a server may have given up.
    fn judge(&self, (code, detail): Outcome, began: Duration, limit: Duration) -> Outcome {
        if code.passes() || !code.is_result() {
            return (code, detail);
        }
        let Lost { longest, .. } = self.stalls.since(began);
        if longest < limit / 2 {
            return (code, detail);
        }
        let late = format!("the agent did not run for {} ms during the probe", longest.as_millis());
        (CheckCode::LocalError, format!("{late}, which then ended with {}: {detail}", code.label()))
    }

    async fn attempt(&self, check: &Check, backend: SocketAddr, progress: &Progress) -> Outcome {
        let at = |port: Option<u16>| SocketAddr::new(backend.ip(), port.unwrap_or(backend.port()));
        // The larger ones live on the heap, and only while they run: a task waits most of the time, and there may be
        // thousands.
        match &check.action {
            CheckAction::TcpSocket { port, accept } => tcp::probe(at(*port), *accept).await,
            CheckAction::Exchange { port, exchange } => {
                Box::pin(exchange::probe(at(*port), exchange, &self.tls, progress)).await
            }
            CheckAction::Dns { port, question } => Box::pin(dns::probe(at(*port), question, progress)).await,
            CheckAction::Grpc { port, service } => Box::pin(grpc::probe(at(*port), service, progress)).await,
            CheckAction::HttpGet { port, get } => Box::pin(http::probe(at(*port), get, &self.tls, progress)).await,
        }
    }
}

#[cfg(test)]
mod tests;
