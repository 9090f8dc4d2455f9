//! CPU time and memory of a process, and how the agent gives memory back.

use breaker_api::status::ProcessStatus;
use procfs::process::Process;

/// CPU time and memory of this process; `None` where /proc cannot be read.
#[must_use]
pub fn own() -> Option<ProcessStatus> {
    of(std::process::id())
}

/// CPU time and memory of a process, from /proc/PID/stat (proc_pid_stat(5): utime and stime in ticks, rss in pages);
/// `None` where that file cannot be read.
#[must_use]
pub fn of(pid: u32) -> Option<ProcessStatus> {
    let stat = Process::new(i32::try_from(pid).ok()?).ok()?.stat().ok()?;
    let ticks = u32::try_from(stat.utime + stat.stime).ok()?;
    let per_second = u32::try_from(procfs::ticks_per_second()).ok()?;
    Some(ProcessStatus {
        cpu_seconds: f64::from(ticks) / f64::from(per_second),
        resident_bytes: stat.rss * procfs::page_size(),
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
