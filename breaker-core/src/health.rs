//! Rise and fall: turns single probe results into a health that does not flap. Pure: no clock, no input or output.

/// The health of a backend.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Health {
    /// No probe has decided it yet.
    Unknown,
    /// The backend may get connections.
    Up,
    /// The backend gets no connections.
    Down,
}

impl Health {
    /// The name of the health in output.
    #[must_use]
    pub const fn label(self) -> &'static str {
        match self {
            Self::Unknown => "Unknown",
            Self::Up => "Up",
            Self::Down => "Down",
        }
    }
}

/// Counts equal results in a row. A result of the other kind restarts the count.
#[derive(Clone, Debug)]
pub struct RiseFall {
    rise: u32,
    fall: u32,
    health: Health,
    streak: u32,
}

impl RiseFall {
    /// A counter that starts with unknown health. `fall` failures in a row change Up to Down, and `rise` passes in
    /// a row change Down to Up; 0 counts as 1. From Unknown, one pass is enough for Up (as Envoy does at start),
    /// while Down needs `fall` failures.
    #[must_use]
    pub fn new(rise: u32, fall: u32) -> Self {
        Self::starting(rise, fall, Health::Unknown)
    }

    /// A counter as in [`RiseFall::new`], but with a known initial health.
    #[must_use]
    pub fn starting(rise: u32, fall: u32, health: Health) -> Self {
        Self { rise: rise.max(1), fall: fall.max(1), health, streak: 0 }
    }

    /// The current health.
    #[must_use]
    pub const fn health(&self) -> Health {
        self.health
    }

    /// Whether the health is unknown or about to change. The caller then probes at the shorter interval.
    #[must_use]
    pub const fn in_transition(&self) -> bool {
        matches!(self.health, Health::Unknown) || self.streak > 0
    }

    /// Processes a result. Returns the new health if the result changed it.
    pub fn observe(&mut self, pass: bool) -> Option<Health> {
        let (against, needed, next) = match (self.health, pass) {
            (Health::Up, false) | (Health::Unknown, false) => (true, self.fall, Health::Down),
            (Health::Down, true) => (true, self.rise, Health::Up),
            (Health::Unknown, true) => (true, 1, Health::Up),
            (Health::Up, true) | (Health::Down, false) => (false, 0, self.health),
        };
        if !against {
            self.streak = 0;
            return None;
        }
        self.streak += 1;
        if self.streak < needed {
            return None;
        }
        self.streak = 0;
        self.health = next;
        Some(next)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn nginx_defaults_flip_on_every_result() {
        let mut health = RiseFall::new(1, 1);
        assert_eq!(health.observe(true), Some(Health::Up));
        assert_eq!(health.observe(false), Some(Health::Down));
        assert_eq!(health.observe(true), Some(Health::Up));
        assert_eq!(health.observe(true), None);
    }

    #[test]
    fn a_pass_in_between_starts_the_count_anew() {
        let mut health = RiseFall::new(2, 3);
        health.observe(true);
        for _ in 0..5 {
            assert_eq!(health.observe(false), None);
            assert_eq!(health.observe(false), None);
            assert!(health.in_transition());
            assert_eq!(health.observe(true), None);
            assert!(!health.in_transition());
        }
        assert_eq!(health.health(), Health::Up);
    }

    #[test]
    fn coming_back_needs_the_rise_and_the_first_time_does_not() {
        let mut health = RiseFall::new(2, 1);
        assert!(health.in_transition());
        assert_eq!(health.observe(true), Some(Health::Up));
        assert_eq!(health.observe(false), Some(Health::Down));
        assert_eq!(health.observe(true), None);
        assert_eq!(health.observe(true), Some(Health::Up));
    }
}
