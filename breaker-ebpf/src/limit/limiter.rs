//! Token buckets and connection counts, of limiters and of clients.

use aya_ebpf::{bindings::BPF_F_MMAPABLE, btf_maps::Array, macros::btf_map};
use breaker_common::{
    DEFAULT_SERVICES, Limiter,
    gcra::{self, Taken, Word},
};

use super::client_table;
use crate::{agent, atomic};

/// Token buckets and connection counts of the limiters, two per service (see [`breaker_common::Limiter`]).
#[btf_map]
pub(super) static LIMITERS: Array<Limiter, { 2 * DEFAULT_SERVICES as usize }, { BPF_F_MMAPABLE as usize }> =
    Array::new();

/// Records that a connection to a service's primary was sent to the backup because of a limit. From then on,
/// packets of the service are looked up in the flow tables. The agent sets [`breaker_common::switch_flags::TRACK`]
/// in its next sweep and then clears this record.
#[inline(always)]
pub fn mark_overflowed(service: u32) {
    let Some(limiter) = LIMITERS.get_ptr_mut(service * 2) else { return };
    // SAFETY: the kernel returned a pointer to a value of this map; the field is 4 bytes, aligned.
    unsafe {
        let at = &raw mut (*limiter).overflowed;
        // Read first: an unconditional write would take the cache line away from the other CPUs each time.
        if atomic::load32(at) == 0 {
            at.write_volatile(1);
        }
    }
}

/// Returns whether [`mark_overflowed`] was called since the agent last cleared the record.
#[inline(always)]
pub fn has_overflowed(service: u32) -> bool {
    let Some(limiter) = LIMITERS.get_ptr_mut(service * 2) else { return false };
    // SAFETY: as in `mark_overflowed`.
    unsafe { atomic::load32(&raw const (*limiter).overflowed) != 0 }
}

/// Pointer to a theoretical arrival time in a map value.
pub struct Arrival(pub *mut u64);

impl Word for Arrival {
    #[inline(always)]
    fn load(&self) -> u64 {
        // SAFETY: the pointer is to an aligned 8-byte field of a map value, which the programs change through this
        // type only.
        unsafe { atomic::load(self.0) }
    }

    #[inline(always)]
    fn compare_exchange(&self, old: u64, new: u64) -> bool {
        // SAFETY: as in `load`.
        unsafe { atomic::compare_exchange(self.0, old, new) }
    }
}

/// Result of [`breaker_rate`] and [`breaker_count`]: over the limit, nothing was taken.
pub const REFUSED: u64 = 0;
/// Result of [`breaker_rate`] and [`breaker_count`]: admitted, but the limit was not enforced. The rate was not
/// charged, or the count may now exceed its limit, because every compare-and-swap lost its race or because the
/// agent's lease has run out.
pub const CONTENDED: u64 = 1;
/// Result of [`breaker_count`]: counted. From [`breaker_rate`], a number above this one is the new theoretical
/// arrival time.
pub const COUNTED: u64 = 2;

/// Owner of a token bucket and a connection count: a limiter by its index, or a client by its entry number (see
/// [`super::bucket::number`]).
#[derive(Clone, Copy)]
pub enum Owner {
    Limiter(u32),
    Client(u32),
}

impl Owner {
    /// Packs the owner into 64 bits, to pass it to a global function.
    #[inline(always)]
    pub fn word(self) -> u64 {
        match self {
            Self::Limiter(index) => index as u64,
            Self::Client(number) => 1 << 32 | number as u64,
        }
    }
}

/// Returns the theoretical arrival time and the connection count of the owner that [`Owner::word`] packed.
#[inline(always)]
pub fn state_of(owner: u64) -> Option<(Arrival, *mut u32)> {
    if owner >> 32 != 0 {
        let client = client_table::at(owner as u32)?;
        return Some((Arrival(client_table::arrival(client)), client_table::concurrent(client)));
    }
    let limiter = LIMITERS.get_ptr_mut(owner as u32)?;
    // SAFETY: the kernel returned a pointer to a value of this map.
    Some(unsafe { (Arrival(&raw mut (*limiter).arrival_ns), &raw mut (*limiter).concurrent) })
}

/// Takes one connection from a rate limit. Times are in nanoseconds. A global function: see [`super::breaker_admit`].
#[unsafe(no_mangle)]
#[inline(never)]
pub extern "C" fn breaker_rate(owner: u64, now_ns: u64, interval_ns: u64, tolerance_ns: u64) -> u64 {
    let Some((arrival, _)) = state_of(owner) else { return CONTENDED };
    match gcra::take(&arrival, now_ns, interval_ns, tolerance_ns) {
        Taken::Refused => REFUSED,
        Taken::Contended => CONTENDED,
        Taken::Admitted(_, after) => after,
    }
}

/// Undoes [`breaker_rate`], whose result was `after`. The bucket is then as full as before; if it had been full, it
/// is full as of now.
#[inline(always)]
pub fn give_back(owner: Owner, after: u64, interval_ns: u64) {
    if after > COUNTED
        && let Some((arrival, _)) = state_of(owner.word())
    {
        gcra::give_back(&arrival, Taken::Admitted(after.wrapping_sub(interval_ns), after));
    }
}

/// Counts one more connection, up to `most` (0 = no limit). `holds` is 1 if the service has `onAgentLoss: Hold`. A
/// global function: see [`super::breaker_admit`].
#[unsafe(no_mangle)]
#[inline(never)]
pub extern "C" fn breaker_count(owner: u64, most: u64, holds: u64) -> u64 {
    let Some((_, at)) = state_of(owner) else { return CONTENDED };
    if most != 0 {
        for _ in 0..gcra::TRIES {
            // SAFETY: the pointer is to an aligned 4-byte field of a map value, which is changed by atomics only.
            let now = unsafe { atomic::load32(at) };
            if now as u64 >= most {
                if full_count_refuses(holds != 0) {
                    return REFUSED;
                }
                break;
            }
            // SAFETY: as for the load.
            if unsafe { atomic::compare_exchange32(at, now, now + 1) } {
                return COUNTED;
            }
        }
    }
    // SAFETY: as for the load.
    unsafe { atomic::increment(at) };
    if most == 0 { COUNTED } else { CONTENDED }
}

/// Returns whether a connection count that is at its limit refuses new connections.
///
/// The agent removes connections that ended without FIN or RST from the count. After its lease has run out the count
/// may be too high, so it refuses no connection unless the service has `onAgentLoss: Hold`.
#[inline(always)]
pub fn full_count_refuses(holds: bool) -> bool {
    holds || agent::lease_is_valid(agent::now_ns())
}
