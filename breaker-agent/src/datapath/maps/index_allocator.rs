//! Allocation of indices in array maps.

use anyhow::{Result, bail};

/// Allocates the indices from 0 to `size` - 1.
#[derive(Debug)]
pub(crate) struct IndexAllocator {
    what: &'static str,
    size: u32,
    taken: Vec<bool>,
    /// All indices below this one are in use.
    first: u32,
    /// Released indices in their grace period, because a packet may still use them. They are free after two calls
    /// of [`IndexAllocator::end_grace_period`].
    later: [Vec<u32>; 2],
}

impl IndexAllocator {
    /// Creates an allocator whose indices are all free. `what` names the map's entries in error messages.
    pub(crate) fn new(what: &'static str, size: u32) -> Self {
        Self { what, size, taken: vec![false; size as usize], first: 0, later: [Vec::new(), Vec::new()] }
    }

    /// Takes the lowest free index. If there is none, it takes one in its grace period.
    ///
    /// # Errors
    /// All indices are in use.
    pub(crate) fn allocate(&mut self) -> Result<u32> {
        let free = |allocator: &Self| (allocator.first..allocator.size).find(|index| !allocator.taken[*index as usize]);
        let found = free(self).or_else(|| {
            // Using an index that was released a moment ago is better than failing.
            self.end_grace_period();
            self.end_grace_period();
            free(self)
        });
        let Some(index) = found else {
            bail!(
                "all {} indices for {} are in use; raise agent.maxServices, which takes effect after breaker cleanup",
                self.size,
                self.what
            )
        };
        self.reserve(index);
        self.first = index + 1;
        Ok(index)
    }

    /// Number of indices in use, and of all indices.
    pub(crate) fn fill(&self) -> (u64, u64) {
        (self.taken.iter().filter(|taken| **taken).count() as u64, self.size.into())
    }

    /// Marks an index as in use. Does nothing if the index is not below `size`.
    pub(crate) fn reserve(&mut self, index: u32) {
        if let Some(taken) = self.taken.get_mut(index as usize) {
            *taken = true;
        }
    }

    /// Releases an index that nothing uses. It is free at once.
    pub(crate) fn release(&mut self, index: u32) {
        if let Some(taken) = self.taken.get_mut(index as usize) {
            *taken = false;
            self.first = self.first.min(index);
        }
    }

    /// Releases an index that packets may still use for a moment. It is free after two calls of
    /// [`IndexAllocator::end_grace_period`].
    pub(crate) fn release_later(&mut self, index: u32) {
        self.later[0].push(index);
    }

    /// Ends one of the two steps of the grace period: indices that were released before the previous call become free.
    /// Returns them.
    pub(crate) fn end_grace_period(&mut self) -> Vec<u32> {
        let [young, old] = &mut self.later;
        let free = std::mem::replace(old, std::mem::take(young));
        free.iter().for_each(|index| self.release(*index));
        free
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_place_is_taken_once_and_free_again_after_two_turns() {
        let mut allocator = IndexAllocator::new("things", 3);
        allocator.reserve(1);
        assert_eq!((allocator.allocate().unwrap(), allocator.allocate().unwrap()), (0, 2));
        assert!(allocator.allocate().unwrap_err().to_string().contains("all 3 indices for things are in use"));
        allocator.release_later(1);
        allocator.end_grace_period();
        allocator.release(2);
        assert_eq!(allocator.allocate().unwrap(), 2);
        allocator.end_grace_period();
        assert_eq!(allocator.allocate().unwrap(), 1);
    }

    #[test]
    fn one_that_was_given_back_a_moment_ago_is_better_than_none() {
        let mut allocator = IndexAllocator::new("things", 1);
        let only = allocator.allocate().unwrap();
        allocator.release_later(only);
        assert_eq!(allocator.allocate().unwrap(), only);
    }
}
