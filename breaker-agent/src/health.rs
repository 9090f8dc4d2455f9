//! Rise and fall: from single results to a health that does not flicker. Core only.

use serde::Serialize;

/// A backend's health.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
pub enum Health {
    /// Not checked yet.
    Unknown,
    /// Usable.
    Up,
    /// Not usable.
    Down,
}

/// Counts results in a row; a result of the other kind starts the count anew.
#[derive(Clone, Debug)]
pub struct RiseFall {
    rise: u32,
    fall: u32,
    health: Health,
    streak: u32,
}

impl RiseFall {
    /// `fall` failures in a row make Up Down, `rise` passes in a row make Down Up; 0 counts as 1. While the health is
    /// unknown one pass is enough (as Envoy does at start), failures need `fall`.
    #[must_use]
    pub fn new(rise: u32, fall: u32) -> Self {
        Self::starting(rise, fall, Health::Unknown)
    }

    /// As [`RiseFall::new`], where the health is known from before.
    #[must_use]
    pub fn starting(rise: u32, fall: u32, health: Health) -> Self {
        Self { rise: rise.max(1), fall: fall.max(1), health, streak: 0 }
    }

    /// The health by now.
    #[must_use]
    pub const fn health(&self) -> Health {
        self.health
    }

    /// Whether a change is under way: the next results matter, so look more often.
    #[must_use]
    pub const fn in_transition(&self) -> bool {
        matches!(self.health, Health::Unknown) || self.streak > 0
    }

    /// Takes in a result; returns the new health if it changed.
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
