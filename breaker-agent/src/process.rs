//! CPU time and memory of a process, and how the agent gives memory back.

use breaker_api::status::ProcessStatus;
use procfs::process::{LimitValue, Process, Stat};

use crate::metrics::snapshot::ProcessNumbers;

/// CPU time and memory of this process; `None` where /proc cannot be read.
#[must_use]
pub fn own() -> Option<ProcessStatus> {
    of(std::process::id())
}

/// CPU time and memory of a process, from /proc/PID/stat (proc_pid_stat(5): utime and stime in ticks, rss in pages);
/// `None` where that file cannot be read.
#[must_use]
pub fn of(pid: u32) -> Option<ProcessStatus> {
    usage(&Process::new(i32::try_from(pid).ok()?).ok()?.stat().ok()?)
}

fn usage(stat: &Stat) -> Option<ProcessStatus> {
    Some(ProcessStatus {
        cpu_seconds: seconds(stat.utime + stat.stime)?,
        resident_bytes: stat.rss * procfs::page_size(),
    })
}

/// A time in clock ticks, in seconds.
fn seconds(ticks: u64) -> Option<f64> {
    let per_second = u32::try_from(procfs::ticks_per_second()).ok()?;
    Some(f64::from(u32::try_from(ticks).ok()?) / f64::from(per_second))
}

/// The numbers of this process for metrics; `None` where /proc cannot be read.
#[must_use]
pub fn numbers() -> Option<ProcessNumbers> {
    let process = Process::myself().ok()?;
    let (stat, limits) = (process.stat().ok()?, process.limits().ok()?);
    let max_fds = match limits.max_open_files.soft_limit {
        LimitValue::Value(limit) => limit,
        LimitValue::Unlimited => u64::MAX,
    };
    let boot = u32::try_from(procfs::boot_time_secs().ok()?).ok()?;
    Some(ProcessNumbers {
        usage: usage(&stat)?,
        virtual_bytes: stat.vsize,
        open_fds: process.fd_count().ok()? as u64,
        max_fds,
        threads: u64::try_from(stat.num_threads).ok()?,
        start_time: f64::from(boot) + seconds(stat.starttime)?,
    })
}

/// Lets the allocator give large blocks back to the system as soon as they are free (mallopt(3), `M_MMAP_THRESHOLD`).
/// Otherwise the memory that the start needs once, to load the programs, stays with the process: 18 MiB.
#[expect(unsafe_code, reason = "none of our dependencies sets an option of malloc")]
pub fn give_back_large_blocks() {
    const LARGE: i32 = 64 * 1024;
    // SAFETY: the function changes an option of the allocator, takes its lock, and has no other requirement.
    unsafe { libc::mallopt(libc::M_MMAP_THRESHOLD, LARGE) };
}

#[cfg(test)]
mod tests {
    #[test]
    fn this_process_takes_memory() {
        assert!(super::own().is_some_and(|process| process.resident_bytes > 100_000 && process.cpu_seconds >= 0.0));
        assert!(super::of(u32::MAX).is_none());
    }
}
