//! Whether the answers of backups pass the client's interface, so that they are translated back.
//!
//! The agent attaches the programs only where answers should pass. This module is the safeguard against every cause that
//! it does not know of: routes, tunnels, other programs. The evidence is kept for each pair of interface and service, so
//! that a backup that does not answer affects its own service only.

use aya_ebpf::{bindings::BPF_F_NO_PREALLOC, btf_maps::HashMap, macros::btf_map};
use breaker_common::{DEFAULT_RETURN_PATHS, NONE, ReturnPath, ReturnPathKey};

use crate::atomic;

/// The evidence. When the map is full, new pairs are not observed, and their attempts are decided as if every answer
/// had been seen.
#[btf_map]
static RETURN_PATHS: HashMap<
    ReturnPathKey,
    ReturnPath,
    { DEFAULT_RETURN_PATHS as usize },
    { BPF_F_NO_PREALLOC as usize },
> = HashMap::new();

/// The evidence for a pair, created if `first` is given. The pointer is to the value in the map.
#[inline(always)]
fn find(interface: u32, service: u32, first: Option<&ReturnPath>) -> Option<*mut ReturnPath> {
    let key = ReturnPathKey { interface, service };
    let known = RETURN_PATHS.get_ptr_mut(key);
    if known.is_some() {
        return known;
    }
    // If two CPUs create the entry at once, one of the two counts is lost.
    let _ = RETURN_PATHS.insert(key, first?, 0);
    None
}

/// Whether the agent has given up an interface for a service.
#[inline(always)]
pub fn is_suspended(interface: u32, service: u32) -> bool {
    // SAFETY: the kernel keeps the entry's memory valid for the run of the program; the field is one aligned word.
    find(interface, service, None).is_some_and(|path| unsafe { (&raw const (*path).suspended).read_volatile() } != 0)
}

/// Counts the first answer to a redirected connection attempt. BPF subprogram (not inlined), for a stack frame of its
/// own: see [`crate::hook::from_client`].
#[inline(never)]
pub fn count_answer(interface: u32, service: u32) {
    if service == NONE {
        return;
    }
    let first = ReturnPath { answered: 1, unanswered: 0, suspended: 0, pad: 0 };
    let Some(path) = find(interface, service, Some(&first)) else { return };
    // SAFETY: as in `is_suspended`; the field is changed by atomic operations only.
    unsafe {
        let answered = &raw mut (*path).answered;
        // Beyond this number the cache line stays clean.
        if answered.read_volatile() < ReturnPath::ENOUGH {
            atomic::increment(answered);
        }
    }
}

/// Counts the repetition of a redirected connection attempt without an answer. Returns whether missing answers are so
/// common on the interface that the attempt should not be redirected again. BPF subprogram, as [`count_answer`].
#[inline(never)]
pub fn count_missing_answer(interface: u32, service: u32) -> bool {
    let first = ReturnPath { answered: 0, unanswered: 1, suspended: 0, pad: 0 };
    let Some(path) = find(interface, service, Some(&first)) else { return first.is_doubtful() };
    // SAFETY: as in `count_answer`.
    unsafe { atomic::increment(&raw mut (*path).unanswered) };
    // SAFETY: as in `is_suspended`. The two counts need not be of the same moment.
    unsafe { path.read_volatile() }.is_doubtful()
}
