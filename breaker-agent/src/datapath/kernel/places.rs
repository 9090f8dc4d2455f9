//! Places in a map that are numbered: which are free.

use anyhow::{Result, bail};

/// Numbers from 0 on.
#[derive(Debug)]
pub(super) struct Places {
    what: &'static str,
    size: u32,
    taken: Vec<bool>,
    /// Below it all are taken.
    first: u32,
    /// Given back, and perhaps still looked at by a packet: free after two turns.
    later: [Vec<u32>; 2],
}

impl Places {
    /// All free. `what` names them in errors.
    pub(super) fn new(what: &'static str, size: u32) -> Self {
        Self { what, size, taken: vec![false; size as usize], first: 0, later: [Vec::new(), Vec::new()] }
    }

    /// The first free one.
    ///
    /// # Errors
    /// All are taken.
    pub(super) fn take(&mut self) -> Result<u32> {
        let free = |places: &Self| (places.first..places.size).find(|place| !places.taken[*place as usize]);
        let found = free(self).or_else(|| {
            // Rather one that was given back a moment ago than none.
            self.turn();
            self.turn();
            free(self)
        });
        let Some(place) = found else {
            bail!("all {} places for {} are taken; agent.maxServices makes room for more", self.size, self.what)
        };
        self.claim(place);
        self.first = place + 1;
        Ok(place)
    }

    /// Takes a certain one.
    pub(super) fn claim(&mut self, place: u32) {
        if let Some(taken) = self.taken.get_mut(place as usize) {
            *taken = true;
        }
    }

    /// Gives one back that nothing looks at.
    pub(super) fn give_back(&mut self, place: u32) {
        if let Some(taken) = self.taken.get_mut(place as usize) {
            *taken = false;
            self.first = self.first.min(place);
        }
    }

    /// Gives one back that packets may look at for a moment.
    pub(super) fn give_back_later(&mut self, place: u32) {
        self.later[0].push(place);
    }

    /// Lets time pass.
    pub(super) fn turn(&mut self) {
        let [young, old] = &mut self.later;
        for place in std::mem::replace(old, std::mem::take(young)) {
            self.give_back(place);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_place_is_taken_once_and_free_again_after_two_turns() {
        let mut places = Places::new("things", 3);
        places.claim(1);
        assert_eq!((places.take().unwrap(), places.take().unwrap()), (0, 2));
        assert!(places.take().unwrap_err().to_string().contains("all 3 places for things are taken"));
        places.give_back_later(1);
        places.turn();
        places.give_back(2);
        assert_eq!(places.take().unwrap(), 2);
        places.turn();
        assert_eq!(places.take().unwrap(), 1);
    }

    #[test]
    fn one_that_was_given_back_a_moment_ago_is_better_than_none() {
        let mut places = Places::new("things", 1);
        let only = places.take().unwrap();
        places.give_back_later(only);
        assert_eq!(places.take().unwrap(), only);
    }
}
