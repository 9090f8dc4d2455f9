//! Notices when the agent itself did not run: a stopped process, a paused or suspended machine, a starved CPU. The time
//! limit of a probe counts only time in which the agent ran.

use std::{
    collections::VecDeque,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::Duration,
};

use tokio::task::JoinHandle;

use crate::clock;

/// How often the agent looks at the clock.
const INTERVAL: Duration = Duration::from_millis(20);
/// A look at the clock that is late by more than this is a stall.
const TOLERANCE: Duration = Duration::from_millis(10);
/// Number of stalls that are kept: more than a probe lasts, unless the agent hardly runs at all.
const KEPT: usize = 256;

/// The stalls of this process. Its task ends when this value is dropped.
#[derive(Debug)]
pub(super) struct Stalls {
    seen: Arc<Mutex<Seen>>,
    task: JoinHandle<()>,
}

impl Drop for Stalls {
    fn drop(&mut self) {
        self.task.abort();
    }
}

/// A time on the clock that also counts while the machine is suspended, from an arbitrary origin.
pub(super) type Moment = Duration;

/// How long the agent did not run in a certain time.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct Lost {
    /// In sum.
    pub total: Duration,
    /// At most at a time.
    pub longest: Duration,
}

impl Stalls {
    /// Starts to watch. Needs a runtime.
    pub fn watch() -> Self {
        let seen = Arc::new(Mutex::new(Seen::new(clock::boot_time())));
        let task = tokio::spawn({
            let seen = seen.clone();
            async move {
                loop {
                    tokio::time::sleep(INTERVAL).await;
                    lock(&seen).look(clock::boot_time());
                }
            }
        });
        Self { seen, task }
    }

    /// How long the agent did not run since `began`.
    pub fn since(&self, began: Moment) -> Lost {
        let mut seen = lock(&self.seen);
        // After a stall, a probe may run before the task that looks at the clock does.
        seen.look(clock::boot_time());
        seen.lost_since(began)
    }
}

fn lock(seen: &Mutex<Seen>) -> MutexGuard<'_, Seen> {
    seen.lock().unwrap_or_else(PoisonError::into_inner)
}

#[derive(Debug)]
struct Seen {
    last_look: Moment,
    /// Begin and end of each stall, oldest first.
    stalls: VecDeque<(Moment, Moment)>,
}

impl Seen {
    const fn new(now: Moment) -> Self {
        Self { last_look: now, stalls: VecDeque::new() }
    }

    fn look(&mut self, now: Moment) {
        let expected = self.last_look + INTERVAL;
        if now > expected + TOLERANCE {
            if self.stalls.len() == KEPT {
                self.stalls.pop_front();
            }
            self.stalls.push_back((expected, now));
        }
        self.last_look = self.last_look.max(now);
    }

    fn lost_since(&self, began: Moment) -> Lost {
        let parts = self.stalls.iter().rev().take_while(|(_, end)| *end > began);
        parts
            .map(|(begin, end)| *end - began.max(*begin))
            .fold(Lost::default(), |lost, part| Lost { total: lost.total + part, longest: lost.longest.max(part) })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_what_falls_into_the_probe_counts() {
        let ms = Duration::from_millis;
        let mut seen = Seen::new(ms(0));
        for now in [20, 41, 60, 2060, 2080, 2300, 2320] {
            seen.look(ms(now));
        }
        assert_eq!(seen.lost_since(ms(0)), Lost { total: ms(1980 + 200), longest: ms(1980) });
        assert_eq!(seen.lost_since(ms(1060)), Lost { total: ms(1000 + 200), longest: ms(1000) });
        assert_eq!(seen.lost_since(ms(2080)), Lost { total: ms(200), longest: ms(200) });
        assert_eq!(seen.lost_since(ms(2310)), Lost::default());
    }
}
