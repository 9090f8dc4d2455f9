//! A rate limit in one 64-bit word: the generic cell rate algorithm (GCRA; ITU-T I.371, annex A).
//!
//! The word is the *theoretical arrival time* (TAT) in nanoseconds: the time at which the token bucket will be full
//! again. A connection is admitted if the TAT is at most `tolerance` ahead of now; it then moves the TAT `interval`
//! further ahead. So a full bucket admits `1 + tolerance / interval` connections at once, the bucket refills
//! continuously, and a refused connection changes nothing.
//!
//! All CPUs share the word. [`take`] loads it first, so a refusal needs no write, and then tries a compare-and-swap
//! at most [`TRIES`] times. If every attempt loses its race, the connection is admitted without being charged and
//! counted as contended: a refusal might hit a connection that the limit allows.

/// Maximum number of compare-and-swap attempts. Measured on 16 CPUs that decide as fast as they can: where the limit
/// refuses connections, fewer than 0.0001 % of the decisions need more attempts; where it admits all of them,
/// 0.06 %.
pub const TRIES: usize = 8;

/// Margin in nanoseconds for detecting a stale TAT. A TAT that is further ahead than `tolerance + interval + STALE`
/// cannot come from the current limit, only from an earlier, lower one; the bucket then counts as full. The margin
/// is larger than the difference between the clocks of two CPUs.
pub const STALE: u64 = 1_000_000_000;

/// A 64-bit word that several CPUs change concurrently.
pub trait Word {
    /// Reads the word.
    fn load(&self) -> u64;
    /// Stores `new` if the word equals `old`. Returns whether the word was stored.
    fn compare_exchange(&self, old: u64, new: u64) -> bool;
}

/// Outcome of [`take`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Taken {
    /// Admitted. The word changed from the first value to the second.
    Admitted(u64, u64),
    /// Over the limit. The word is unchanged.
    Refused,
    /// Admitted but not charged: every compare-and-swap lost its race.
    Contended,
}

/// Returns the theoretical arrival time after one more connection at `now`, or `None` if that connection is over the
/// limit.
///
/// All arguments are in nanoseconds. `interval` is the time for one connection, at least 1.
#[inline(always)]
#[must_use]
pub const fn next(arrival: u64, now: u64, interval: u64, tolerance: u64) -> Option<u64> {
    let ahead = arrival.saturating_sub(now);
    if ahead > tolerance {
        return if ahead > tolerance.saturating_add(interval).saturating_add(STALE) {
            Some(now + interval)
        } else {
            None
        };
    }
    Some(now + ahead + interval)
}

/// Takes one connection out of the bucket. Arguments as for [`next`].
#[inline(always)]
pub fn take(word: &impl Word, now: u64, interval: u64, tolerance: u64) -> Taken {
    for _ in 0..TRIES {
        let arrival = word.load();
        let Some(next) = next(arrival, now, interval, tolerance) else { return Taken::Refused };
        if word.compare_exchange(arrival, next) {
            return Taken::Admitted(arrival, next);
        }
    }
    Taken::Contended
}

/// Undoes [`take`], for a connection that another limit refuses. If another CPU has changed the word in between, the
/// token is lost, so that never more connections are admitted than the limit allows.
#[inline(always)]
pub fn give_back(word: &impl Word, taken: Taken) {
    if let Taken::Admitted(before, after) = taken {
        let _ = word.compare_exchange(after, before);
    }
}

/// Interval in nanoseconds of a rate that `nodes` nodes share equally. It is rounded up, so that the rate is never
/// exceeded. If `per_second` or `nodes` is 0, 1 is used instead.
#[must_use]
pub const fn interval(per_second: u32, nodes: u32) -> u64 {
    let (rate, nodes) = (if per_second == 0 { 1 } else { per_second }, if nodes == 0 { 1 } else { nodes });
    (1_000_000_000 * nodes as u64).div_ceil(rate as u64)
}

/// Tolerance in nanoseconds that admits `burst` connections at once. If `burst` is 0, 1 is used instead.
#[must_use]
pub const fn tolerance(burst: u32, interval: u64) -> u64 {
    (burst as u64).saturating_sub(1).saturating_mul(interval)
}

#[cfg(test)]
mod tests {
    extern crate std;

    use super::*;
    use core::{
        cell::{Cell, RefCell},
        sync::atomic::{AtomicU64, Ordering},
    };
    use std::{thread, vec, vec::Vec};

    impl Word for Cell<u64> {
        fn load(&self) -> u64 {
            self.get()
        }
        fn compare_exchange(&self, old: u64, new: u64) -> bool {
            self.get() == old && {
                self.set(new);
                true
            }
        }
    }

    impl Word for AtomicU64 {
        fn load(&self) -> u64 {
            self.load(Ordering::SeqCst)
        }
        fn compare_exchange(&self, old: u64, new: u64) -> bool {
            self.compare_exchange(old, new, Ordering::SeqCst, Ordering::SeqCst).is_ok()
        }
    }

    const SECOND: u64 = 1_000_000_000;

    fn admitted(word: &impl Word, now: u64, interval: u64, burst: u32) -> bool {
        take(word, now, interval, tolerance(burst, interval)) != Taken::Refused
    }

    /// A burst of five at ten connections per second.
    #[test]
    fn a_burst_passes_at_once_and_the_bucket_refills_continuously() {
        let (word, interval) = (Cell::new(0), interval(10, 1));
        let at = |ms: u64| 1000 * SECOND + ms * 1_000_000;
        let passed = |now, of: u32| (0..of).filter(|_| admitted(&word, now, interval, 5)).count();
        assert_eq!(passed(at(0), 100), 5, "from a full bucket");
        assert_eq!(passed(at(99), 100), 0);
        assert_eq!(passed(at(100), 100), 1);
        assert_eq!(passed(at(350), 100), 2, "no fixed window whose boundary admits more");
        assert_eq!(passed(at(60_000), 100), 5, "never more than the burst, however long the pause");
    }

    #[test]
    fn a_burst_of_one_admits_one_in_each_interval() {
        let (word, interval) = (Cell::new(0), interval(1000, 1));
        let passed = (0..10_000).filter(|ms| admitted(&word, SECOND + ms * 100_000, interval, 1)).count();
        assert_eq!(passed, 1000);
    }

    /// A TAT that a limit of one connection per minute left does not block a limit of a thousand per second.
    #[test]
    fn a_limit_that_was_raised_holds_at_once() {
        let word = Cell::new(0);
        let slow = interval(1, 60);
        while admitted(&word, SECOND, slow, 10) {}
        assert!(admitted(&word, SECOND, interval(1000, 1), 1));
        assert!(!admitted(&word, SECOND, interval(1000, 1), 1));
    }

    #[test]
    fn intervals_are_rounded_up_and_shared_by_nodes() {
        assert_eq!((interval(3, 1), interval(1_000_000, 1), interval(100, 3)), (333_333_334, 1000, 30_000_000));
        assert_eq!((tolerance(1, 10), tolerance(5, 10), tolerance(0, 10)), (0, 40, 0));
    }

    #[test]
    fn a_token_is_given_back_unless_somebody_came_between() {
        let word = Cell::new(0);
        let first = take(&word, SECOND, 10, 40);
        give_back(&word, first);
        assert_eq!(word.get(), 0);
        let first = take(&word, SECOND, 10, 40);
        let _ = take(&word, SECOND, 10, 40);
        give_back(&word, first);
        assert_eq!(word.get(), SECOND + 20);
    }

    /// An exact model of a token bucket: it fills continuously up to `burst` connections, and a connection passes if
    /// the bucket holds at least one whole token. `level` counts in units of 1/`interval` of a connection, so
    /// nothing is rounded.
    struct Bucket {
        level: u64,
        at: u64,
        interval: u64,
        burst: u64,
    }

    impl Bucket {
        fn admits(&mut self, now: u64) -> bool {
            self.level = (self.level + (now - self.at)).min(self.burst * self.interval);
            self.at = now;
            let admits = self.level >= self.interval;
            self.level -= if admits { self.interval } else { 0 };
            admits
        }
    }

    /// A small pseudo-random generator (xorshift64*, Vigna 2016), which saves the crate a dependency.
    fn numbers(mut state: u64) -> impl FnMut(u64) -> u64 {
        move |below| {
            state ^= state >> 12;
            state ^= state << 25;
            state ^= state >> 27;
            (state.wrapping_mul(0x2545_f491_4f6c_dd1d) >> 33) % below
        }
    }

    #[test]
    fn any_sequence_of_arrivals_agrees_with_a_token_bucket() {
        for seed in 1..2000 {
            let mut number = numbers(seed);
            let (interval, burst) = (1 + number(1000), 1 + number(20));
            let mut now = SECOND;
            let mut bucket = Bucket { level: burst * interval, at: now, interval, burst };
            let word = Cell::new(0);
            for step in 0..500 {
                now += number(interval * 2);
                let burst = u32::try_from(burst).unwrap();
                assert_eq!(admitted(&word, now, interval, burst), bucket.admits(now), "seed {seed} step {step}");
            }
        }
    }

    /// A word that other CPUs change between the load and the compare-and-swap, at scripted times.
    struct Raced<'a> {
        word: &'a Cell<u64>,
        others: RefCell<Vec<u64>>,
        interval: u64,
        tolerance: u64,
    }

    impl Word for Raced<'_> {
        fn load(&self) -> u64 {
            let seen = self.word.get();
            if let Some(now) = self.others.borrow_mut().pop() {
                let _ = take(self.word, now, self.interval, self.tolerance);
            }
            seen
        }
        fn compare_exchange(&self, old: u64, new: u64) -> bool {
            Word::compare_exchange(self.word, old, new)
        }
    }

    /// Whatever happens between load and compare-and-swap, charged connections never exceed time / interval + burst.
    #[test]
    fn no_interleaving_admits_more_than_the_limit() {
        for seed in 1..3000 {
            let mut number = numbers(seed);
            let (interval, burst) = (1 + number(100), 1 + u32::try_from(number(10)).unwrap());
            let tolerance = tolerance(burst, interval);
            let (word, start) = (Cell::new(0), SECOND);
            let mut now = start;
            for _ in 0..200 {
                now += number(interval);
                let others = vec![now; usize::try_from(number(12)).unwrap()];
                let raced = Raced { word: &word, others: RefCell::new(others), interval, tolerance };
                let _ = take(&raced, now, interval, tolerance);
                // Each charge moves the word ahead by one interval, and the first one starts no earlier than `start`.
                let charged = (word.get() - start) / interval;
                assert!(charged <= (now - start) / interval + u64::from(burst), "seed {seed}: {charged}");
            }
        }
    }

    /// Real threads decide on one word as fast as they can: the limit holds, and hardly any of it stays unused.
    #[test]
    fn threads_share_a_word_exactly() {
        let (interval, burst, threads, decisions) = (50, 100, 4_u64, 100_000_u64);
        let word = AtomicU64::new(0);
        let clock = AtomicU64::new(SECOND);
        let counts: Vec<(u64, u64)> = thread::scope(|scope| {
            let run = || {
                let (mut charged, mut contended) = (0, 0);
                for _ in 0..decisions {
                    // All threads share one clock that advances with every decision. The load is ten times the limit.
                    let now = clock.fetch_add(5, Ordering::SeqCst);
                    match take(&word, now, interval, tolerance(burst, interval)) {
                        Taken::Admitted(..) => charged += 1,
                        Taken::Contended => contended += 1,
                        Taken::Refused => {}
                    }
                }
                (charged, contended)
            };
            let started: Vec<_> = (0..threads).map(|_| scope.spawn(run)).collect();
            started.into_iter().map(|thread| thread.join().unwrap()).collect()
        });
        let (charged, contended) = counts.iter().fold((0, 0), |sum, count| (sum.0 + count.0, sum.1 + count.1));
        let allowed = threads * decisions * 5 / interval + u64::from(burst);
        assert!(charged <= allowed, "{charged} of {allowed}");
        assert!((charged + contended) * 100 >= allowed * 99, "{charged} and {contended} of {allowed}");
    }
}
