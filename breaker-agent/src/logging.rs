//! The agent's log, on standard error. A thread of its own writes the lines: a reader that is slow, hung or gone, or a
//! full disk, never holds up the agent and never ends it. What could not be written is counted.

use std::{
    io::{self, IsTerminal as _, Write},
    sync::atomic::{AtomicU64, Ordering},
};

use tracing_appender::non_blocking::{ErrorCounter, NonBlocking, NonBlockingBuilder, WorkerGuard};
use tracing_subscriber::EnvFilter;

/// The default log filter. The netlink crate warns about every attribute that a newer kernel has made longer, and
/// kube's client about every failed attempt. The agent itself reports, once, if an attempt's failure has
/// consequences.
const DEFAULT_FILTER: &str = "info,netlink_packet_route=error,kube_client=off";
/// Number of lines that wait for a slow reader. Later lines are dropped and counted.
const QUEUE: usize = 8192;

/// Lines that the operating system refused to take.
static REFUSED: AtomicU64 = AtomicU64::new(0);
/// Panics of any task or thread.
static PANICS: AtomicU64 = AtomicU64::new(0);

/// The running log. When dropped, the lines that wait are written, unless that takes longer than a second.
#[derive(Debug)]
pub struct Log {
    dropped: ErrorCounter,
    _writer: WorkerGuard,
}

/// What went wrong in this process without ending it, since its start.
#[derive(Clone, Debug, Default)]
pub struct Incidents {
    dropped: Option<ErrorCounter>,
}

impl Incidents {
    /// Number of log lines that were lost: the log could not be written, or its reader was too slow.
    #[must_use]
    pub fn lost_log_lines(&self) -> u64 {
        let dropped = self.dropped.as_ref().map_or(0, ErrorCounter::dropped_lines);
        REFUSED.load(Ordering::Relaxed) + u64::try_from(dropped).unwrap_or(u64::MAX)
    }

    /// Number of panics. Each ended one attempt of one task.
    #[must_use]
    pub fn panics(&self) -> u64 {
        PANICS.load(Ordering::Relaxed)
    }
}

impl Log {
    /// Starts the log. The level comes from `BREAKER_LOG` (default: info). Panics are logged and counted, too.
    #[must_use]
    pub fn start() -> Self {
        let filter = EnvFilter::try_from_env("BREAKER_LOG").unwrap_or_else(|_| EnvFilter::new(DEFAULT_FILTER));
        let ansi = io::stderr().is_terminal() && std::env::var_os("NO_COLOR").is_none();
        let (writer, guard) = queue(Tolerant(io::stderr()));
        let dropped = writer.error_counter();
        tracing_subscriber::fmt().with_env_filter(filter).with_writer(writer).with_ansi(ansi).with_target(false).init();
        // The messages of the eBPF programs come through the `log` crate.
        let _ = tracing_log::LogTracer::init();
        std::panic::set_hook(Box::new(|panic| {
            PANICS.fetch_add(1, Ordering::Relaxed);
            let at = panic.location().map_or_else(|| "an unknown place".into(), ToString::to_string);
            let message = panic.payload_as_str().unwrap_or("without a message");
            tracing::error!("a fault in breaker, please report it: panic at {at}: {message}");
        }));
        Self { dropped, _writer: guard }
    }

    /// A handle to the counters.
    #[must_use]
    pub fn incidents(&self) -> Incidents {
        Incidents { dropped: Some(self.dropped.clone()) }
    }
}

fn queue(writer: impl Write + Send + 'static) -> (NonBlocking, WorkerGuard) {
    NonBlockingBuilder::default().lossy(true).buffered_lines_limit(QUEUE).thread_name("log").finish(writer)
}

/// A writer that never fails: what the writer below it refuses is counted.
struct Tolerant<W>(W);

impl<W: Write> Write for Tolerant<W> {
    fn write(&mut self, line: &[u8]) -> io::Result<usize> {
        if self.0.write_all(line).is_err() {
            REFUSED.fetch_add(1, Ordering::Relaxed);
        }
        Ok(line.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        let _ = self.0.flush();
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::mpsc;

    /// A disk that is full, or a pipe whose reader has gone.
    struct Refusing;

    impl Write for Refusing {
        fn write(&mut self, _: &[u8]) -> io::Result<usize> {
            Err(io::ErrorKind::StorageFull.into())
        }

        fn flush(&mut self) -> io::Result<()> {
            Err(io::ErrorKind::BrokenPipe.into())
        }
    }

    #[test]
    fn a_line_that_cannot_be_written_is_counted() {
        let before = REFUSED.load(Ordering::Relaxed);
        let mut writer = Tolerant(Refusing);
        assert!(writer.write_all(b"line\n").is_ok() && writer.flush().is_ok());
        assert_eq!(REFUSED.load(Ordering::Relaxed), before + 1);
    }

    #[test]
    fn a_reader_that_reads_nothing_holds_up_nobody() {
        /// A pipe that is full until the test ends.
        struct Hung(mpsc::Receiver<()>);
        impl Write for Hung {
            fn write(&mut self, line: &[u8]) -> io::Result<usize> {
                let _ = self.0.recv();
                Ok(line.len())
            }

            fn flush(&mut self) -> io::Result<()> {
                Ok(())
            }
        }
        let (release, held) = mpsc::channel();
        let (mut writer, guard) = queue(Hung(held));
        for _ in 0..QUEUE + 100 {
            assert!(writer.write_all(b"line\n").is_ok());
        }
        assert!(writer.error_counter().dropped_lines() >= 90, "{}", writer.error_counter().dropped_lines());
        drop(release);
        drop(guard);
    }
}
