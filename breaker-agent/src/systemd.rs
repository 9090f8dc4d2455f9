//! What the agent tells systemd (sd_notify(3)): that it is ready, that its main loop runs, and a line for
//! `systemctl status`. Without systemd, nothing is sent.

use breaker_common::BreakerState;
use sd_notify::NotifyState;

/// The connection to the service manager.
#[derive(Debug)]
pub struct ServiceManager {
    is_present: bool,
    is_told_ready: bool,
    status: String,
}

impl ServiceManager {
    /// The service manager that started this process, if any.
    #[must_use]
    pub fn of_process() -> Self {
        Self { is_present: std::env::var_os("NOTIFY_SOCKET").is_some(), is_told_ready: false, status: String::new() }
    }

    /// Returns `true` if a service manager started this process. Without one, nothing needs to be reported.
    #[must_use]
    pub const fn is_present(&self) -> bool {
        self.is_present
    }

    /// Reports that the main loop runs; its watchdog expects this. `by_state`: number of services, by the number of
    /// their state.
    pub fn beat(&mut self, is_ready: bool, by_state: [u64; BreakerState::ALL.len()]) {
        let mut states = vec![NotifyState::Watchdog];
        if is_ready && !std::mem::replace(&mut self.is_told_ready, true) {
            states.push(NotifyState::Ready);
        }
        let status = status(is_ready, by_state);
        if status != self.status {
            states.push(NotifyState::Status(&status));
        }
        send(&states);
        self.status = status;
    }

    /// Reports that the agent ends.
    pub fn stopping(&self) {
        if self.is_present {
            send(&[NotifyState::Stopping]);
        }
    }
}

fn send(states: &[NotifyState<'_>]) {
    if let Err(error) = sd_notify::notify(states) {
        tracing::debug!("cannot notify the service manager: {error}");
    }
}

fn status(is_ready: bool, by_state: [u64; BreakerState::ALL.len()]) -> String {
    let [closed, open, half_open] = by_state;
    match by_state.iter().sum::<u64>() {
        _ if !is_ready => "starting".into(),
        0 => "no services".into(),
        services => format!("{services} services: {closed} closed, {open} open, {half_open} half-open"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_status_counts_the_services() {
        assert_eq!(status(false, [3, 0, 0]), "starting");
        assert_eq!(status(true, [0; 3]), "no services");
        assert_eq!(status(true, [3, 1, 0]), "4 services: 3 closed, 1 open, 0 half-open");
    }
}
