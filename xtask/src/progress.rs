//! Shows what is being done and how long it took: one line when a step begins and one when it ends. The lines go to
//! standard error, so that they do not mix with what a command prints.

use std::time::{Duration, Instant};

use anyhow::Result;

/// Runs `work` as a step and prints its name before, and its name and duration after it.
///
/// # Errors
/// Those of `work`. A failed step prints its duration too.
pub fn step<T>(name: &str, work: impl FnOnce() -> Result<T>) -> Result<T> {
    eprintln!("==> {name}");
    let started = Instant::now();
    let result = work();
    let outcome = if result.is_ok() { "done" } else { "failed" };
    eprintln!("==> {name}: {outcome} after {}", short(started.elapsed()));
    result
}

/// A duration as `950 ms`, `12 s` or `3 min 20 s`.
pub fn short(duration: Duration) -> String {
    match duration.as_secs() {
        0 => format!("{} ms", duration.as_millis()),
        seconds @ 1..=119 => format!("{seconds} s"),
        seconds => format!("{} min {} s", seconds / 60, seconds % 60),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn durations_have_one_or_two_units() {
        let cases =
            [(950, "950 ms"), (1_999, "1 s"), (119_000, "119 s"), (120_000, "2 min 0 s"), (200_500, "3 min 20 s")];
        for (millis, text) in cases {
            assert_eq!(short(Duration::from_millis(millis)), text);
        }
    }
}
