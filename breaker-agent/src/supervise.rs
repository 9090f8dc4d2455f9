//! Tasks that last as long as the agent. A panic ends one attempt of a task; the task starts again, and the others do
//! not notice.

use std::{any::Any, future::Future, panic::AssertUnwindSafe, time::Duration};

use anyhow::{Context as _, Result};
use futures_util::FutureExt as _;
use tokio::{
    runtime::{Builder, Handle},
    sync::oneshot,
    task::JoinHandle,
};

/// Pause before a task that panicked starts again.
const RESTART: Duration = Duration::from_secs(1);

/// A thread that runs tasks of its own, so that no other task makes them late. It ends when this value is dropped.
#[derive(Debug)]
pub struct TaskThread {
    handle: Handle,
    _end: oneshot::Sender<()>,
}

impl TaskThread {
    /// Starts a thread. `name` names it in the process list and in errors.
    ///
    /// # Errors
    /// The runtime or the thread cannot be started.
    pub fn start(name: &str) -> Result<Self> {
        let runtime = Builder::new_current_thread().enable_all().build();
        let runtime = runtime.with_context(|| format!("make a runtime for {name}"))?;
        let handle = runtime.handle().clone();
        let (end, ended) = oneshot::channel();
        std::thread::Builder::new()
            .name(name.into())
            .spawn(move || runtime.block_on(async { drop(ended.await) }))
            .with_context(|| format!("start the thread of {name}"))?;
        Ok(Self { handle, _end: end })
    }

    /// The runtime, to spawn tasks on.
    #[must_use]
    pub const fn handle(&self) -> &Handle {
        &self.handle
    }
}

/// Spawns a task that starts again after a panic. It ends when an attempt returns, or when the handle is aborted.
/// `name` names it in the log.
pub fn spawn<A: Future<Output = ()> + Send>(
    name: &'static str,
    mut attempt: impl FnMut() -> A + Send + 'static,
) -> JoinHandle<()> {
    tokio::spawn(async move {
        while contained(attempt()).await.is_err() {
            pause_after_panic(name).await;
        }
    })
}

/// Waits between a panic of a task and its next attempt. `name` names it in the log.
pub async fn pause_after_panic(name: &str) {
    tracing::error!("{name} starts again in {} s, after a panic", RESTART.as_secs());
    tokio::time::sleep(RESTART).await;
}

/// Waits for a future and contains its panics.
///
/// # Errors
/// It panicked; the error is the message.
pub async fn contained<T>(future: impl Future<Output = T>) -> Result<T, String> {
    // Whoever calls this starts anew after a panic, so that a half-changed state is not used any more.
    AssertUnwindSafe(future).catch_unwind().await.map_err(|panic| message(&*panic))
}

/// Calls a function and contains its panics.
///
/// # Errors
/// It panicked; the error is the message.
pub fn contained_call<T>(call: impl FnOnce() -> T) -> Result<T, String> {
    std::panic::catch_unwind(AssertUnwindSafe(call)).map_err(|panic| message(&*panic))
}

fn message(panic: &(dyn Any + Send)) -> String {
    let text = panic.downcast_ref::<String>().map(String::as_str).or_else(|| panic.downcast_ref::<&str>().copied());
    text.unwrap_or("panic without a message").to_owned()
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::{
        Arc,
        atomic::{AtomicU32, Ordering},
    };

    #[tokio::test(start_paused = true)]
    async fn a_task_that_panics_starts_again() {
        let attempts = Arc::new(AtomicU32::new(0));
        let counter = attempts.clone();
        let task = spawn("a test", move || {
            let attempt = counter.fetch_add(1, Ordering::Relaxed);
            async move { assert!(attempt >= 2, "attempt {attempt}") }
        });
        assert!(task.await.is_ok());
        assert_eq!(attempts.load(Ordering::Relaxed), 3);
    }

    #[tokio::test]
    async fn the_message_of_a_panic_is_kept() {
        let error = contained(async { assert_eq!(1, 2, "numbers differ") }).await.unwrap_err();
        assert!(error.contains("numbers differ"), "{error}");
        assert_eq!(contained_call(|| -> u8 { panic!("plain") }), Err("plain".into()));
        assert_eq!(contained_call(|| 7), Ok(7));
    }
}
