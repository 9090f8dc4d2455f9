//! How many probes this process can make at the same time. Each takes a descriptor. Some descriptors are left to the rest
//! of the agent: the control socket, the API server and the maps.

use std::{
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
    time::Duration,
};

use breaker_core::probe::ProbeLoad;
use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};
use tokio::sync::{Semaphore, SemaphorePermit};

use crate::clock;

/// Descriptors that probes leave to the rest of the agent; half of the limit where that is less.
const RESERVED: u64 = 512;
/// Descriptors that they leave free at least, beside those that are open already: for the control socket and the like.
const SPARE: u64 = 48;
/// The limit of descriptors that the agent asks for, if it is allowed to.
const WANTED: u64 = 65_536;
/// Probes at the same time, however high the limit is: each takes memory.
const MOST: u64 = 16_384;
/// A probe that begins later than this is counted as late.
const LATE: Duration = Duration::from_millis(20);

/// Gives each probe its turn.
#[derive(Clone, Debug)]
pub(super) struct Capacity {
    turns: Arc<Semaphore>,
    counts: Arc<Counts>,
    most: usize,
}

#[derive(Debug, Default)]
struct Counts {
    late: AtomicU64,
    waiting: AtomicU64,
    local_errors: AtomicU64,
}

impl Capacity {
    /// Raises the limit of descriptors (`RLIMIT_NOFILE`) as far as the system allows, and derives the capacity from it.
    pub fn of_process() -> Self {
        let open = std::fs::read_dir("/proc/self/fd").map_or(0, Iterator::count);
        Self::new(most_probes(raise_limit(), u64::try_from(open).unwrap_or(u64::MAX)))
    }

    fn new(most: usize) -> Self {
        Self { turns: Arc::new(Semaphore::new(most)), counts: Arc::default(), most }
    }

    /// Waits for a turn. It ends when the permit is dropped.
    pub async fn turn(&self) -> Option<SemaphorePermit<'_>> {
        if let Ok(permit) = self.turns.try_acquire() {
            return Some(permit);
        }
        /// Counts a probe as waiting, also if it is cancelled.
        struct Waiting<'a>(&'a AtomicU64);
        impl Drop for Waiting<'_> {
            fn drop(&mut self) {
                self.0.fetch_sub(1, Ordering::Relaxed);
            }
        }
        self.counts.waiting.fetch_add(1, Ordering::Relaxed);
        let _waiting = Waiting(&self.counts.waiting);
        let began = clock::stopwatch();
        let permit = self.turns.acquire().await.ok();
        self.count_late(clock::since(began));
        permit
    }

    /// Counts a probe as late, if it begins by more than [`LATE`] later than it should.
    pub fn count_late(&self, late: Duration) {
        if late > LATE {
            self.counts.late.fetch_add(1, Ordering::Relaxed);
        }
    }

    /// Counts a probe without a result.
    pub fn count_local_error(&self) {
        self.counts.local_errors.fetch_add(1, Ordering::Relaxed);
    }

    pub fn load(&self) -> ProbeLoad {
        ProbeLoad {
            most: self.most,
            running: self.most.saturating_sub(self.turns.available_permits()),
            waiting: self.counts.waiting.load(Ordering::Relaxed),
            late: self.counts.late.load(Ordering::Relaxed),
            local_errors: self.counts.local_errors.load(Ordering::Relaxed),
        }
    }
}

/// How many probes a process can make at the same time, with a limit of descriptors of which some are `open`.
fn most_probes(limit: u64, open: u64) -> usize {
    let reserved = RESERVED.min(limit / 2).max(open.saturating_add(SPARE));
    usize::try_from(limit.saturating_sub(reserved).clamp(1, MOST)).unwrap_or(1)
}

/// Raises the limit of descriptors, and returns it.
fn raise_limit() -> u64 {
    let now = getrlimit(Resource::Nofile);
    let hard = now.maximum.unwrap_or(u64::MAX);
    let raised = |limit: u64| Rlimit { current: Some(limit), maximum: Some(limit.max(hard)) };
    // Beyond the hard limit, this needs CAP_SYS_RESOURCE.
    let wanted = hard.clamp(WANTED, 1 << 20);
    for limit in [wanted, hard.min(1 << 20)] {
        if setrlimit(Resource::Nofile, raised(limit)).is_ok() {
            return limit;
        }
    }
    now.current.unwrap_or(WANTED)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// HARDENING L2: the maps alone take more than half of a low limit.
    #[test]
    fn probes_leave_descriptors_to_the_rest() {
        let most = [(160, 90), (160, 130), (160, 200), (1024, 90), (1024, 700), (65_536, 90), (1 << 20, 90)]
            .map(|(limit, open)| most_probes(limit, open));
        assert_eq!(most, [22, 1, 1, 512, 276, 16_384, 16_384]);
    }

    #[tokio::test]
    async fn probes_beyond_the_capacity_wait_and_are_counted() {
        let capacity = Capacity::new(2);
        let first = capacity.turn().await;
        let _second = capacity.turn().await;
        assert_eq!(capacity.load(), ProbeLoad { most: 2, running: 2, ..ProbeLoad::default() });
        let waiting = tokio::spawn({
            let capacity = capacity.clone();
            async move { capacity.turn().await.is_some() }
        });
        while capacity.load().waiting == 0 {
            tokio::task::yield_now().await;
        }
        tokio::time::sleep(LATE * 2).await;
        drop(first);
        assert!(waiting.await.unwrap());
        let load = capacity.load();
        assert_eq!((load.running, load.waiting, load.late), (1, 0, 1));
    }
}
