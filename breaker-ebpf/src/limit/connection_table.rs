//! The admitted connections. They are remembered so that a retransmitted SYN is not charged twice, and so that a
//! counted connection is counted down exactly once: when both ends have sent a FIN or either end has sent a RST.
//!
//! The agent removes connections that end without FIN or RST (`datapath/maps/connections.rs` in breaker-agent).
//!
//! When a bucket is full, an entry that is not counted (its tier has rate limits only) may be replaced by a new one.
//! A counted connection is never replaced.

use aya_ebpf::{Global, bindings::BPF_F_MMAPABLE, btf_maps::Array, macros::btf_map};
use breaker_common::{
    Bucket, ConnectionState, DEFAULT_CONNECTION_BUCKETS, ENTRY_GENERATION, WAYS, connection_state as bits, gcra,
};

use super::{UnpackedRequest, bucket, client_table, limiter::LIMITERS};
use crate::{agent, atomic};

type Buckets = Bucket<ConnectionState>;

#[btf_map]
static CONNECTIONS: Array<Buckets, { DEFAULT_CONNECTION_BUCKETS as usize }, { BPF_F_MMAPABLE as usize }> = Array::new();

/// Number of buckets minus 1. The loader sets it to match the size of the map.
#[unsafe(no_mangle)]
static CONNECTION_MASK: Global<u32> = Global::new(DEFAULT_CONNECTION_BUCKETS - 1);

/// How long a flow of datagrams without packets is remembered, in ticks (60 ticks are 64 s). The agent removes it
/// after 60 s.
const DATAGRAMS_TICKS: i32 = 60;

/// The entry of a connection.
#[derive(Clone, Copy)]
pub struct ConnectionEntry {
    bucket: *mut Buckets,
    way: usize,
    /// The tag that the entry had when it was found.
    tag: u64,
}

/// Finds the entry of a connection. `second`: whether to search the second bucket too, which holds counted
/// connections only.
#[inline(always)]
pub fn find(tag: u64, second: bool) -> Option<ConnectionEntry> {
    at(breaker_find(tag, second as u64), tag)
}

/// Returns the number of a connection's entry, or 0 if there is none. A global function: see
/// [`super::breaker_admit`].
#[unsafe(no_mangle)]
#[inline(never)]
pub extern "C" fn breaker_find(tag: u64, second: u64) -> u32 {
    let buckets = bucket::of_tag(tag, CONNECTION_MASK.load());
    if let Some(way) = CONNECTIONS.get_ptr_mut(buckets[0]).and_then(|bucket| bucket::find(bucket, tag)) {
        return bucket::number(buckets[0], way);
    }
    if second != 0
        && let Some(way) = CONNECTIONS.get_ptr_mut(buckets[1]).and_then(|bucket| bucket::find(bucket, tag))
    {
        return bucket::number(buckets[1], way);
    }
    0
}

/// Returns the entry with a number; `None` for 0.
#[inline(always)]
fn at(number: u32, tag: u64) -> Option<ConnectionEntry> {
    let (bucket, way) = bucket::of_number(number)?;
    Some(ConnectionEntry { bucket: CONNECTIONS.get_ptr_mut(bucket)?, way, tag })
}

/// Remembers an admitted connection. Returns false if no entry could be claimed; the caller must then undo the
/// counting, because nothing will count the connection down later.
#[inline(always)]
pub fn insert(tag: u64, limiter: u32, sequence: u32, connection_bits: u32, client: u32, tick: u32) -> bool {
    let Some(entry) = at(breaker_claim(tag, (connection_bits & bits::COUNTED != 0) as u64), tag) else { return false };
    let state = entry.state();
    // SAFETY: this CPU owns the entry since it swapped the tag in. A CPU that finds the tag before the fields are
    // written sees the fields of an earlier connection and treats this one as not yet there.
    unsafe {
        let generation = atomic::load32(&raw const (*state).state) & !(ENTRY_GENERATION - 1);
        (&raw mut (*state).limiter).write_volatile(limiter);
        (&raw mut (*state).number).write_volatile(sequence);
        (&raw mut (*state).last_seen_tick).write_volatile(tick);
        (&raw mut (*state).client).write_volatile(client);
        (&raw mut (*state).state).write_volatile(generation.wrapping_add(ENTRY_GENERATION) | connection_bits);
    }
    true
}

/// Claims an entry for a tag. Returns its number, or 0 if none is available. A global function: see
/// [`super::breaker_admit`].
#[unsafe(no_mangle)]
#[inline(never)]
pub extern "C" fn breaker_claim(tag: u64, counted: u64) -> u32 {
    let buckets = bucket::of_tag(tag, CONNECTION_MASK.load());
    let Some(first) = CONNECTIONS.get_ptr_mut(buckets[0]) else { return 0 };
    if let Some(way) = bucket::claim(first, tag) {
        return bucket::number(buckets[0], way);
    }
    if counted != 0
        && let Some(way) = CONNECTIONS.get_ptr_mut(buckets[1]).and_then(|second| bucket::claim(second, tag))
    {
        return bucket::number(buckets[1], way);
    }
    // No entry is free: replace a connection in the first bucket that is not counted, starting at an entry that the
    // tag selects.
    let uncounted = |state: *const ConnectionState| {
        // SAFETY: the state is in this bucket, and its fields are aligned.
        unsafe { atomic::load32(&raw const (*state).state) & bits::COUNTED == 0 }
    };
    match bucket::take_over(first, tag, (tag >> 3) as usize & (WAYS - 1), uncounted) {
        Some(way) => bucket::number(buckets[0], way),
        None => 0,
    }
}

/// Decrements the connection counts of a limiter and of a client (its entry number; 0 = no client).
#[inline(always)]
pub fn count_down(limiter: u32, client: u32) {
    if let Some(limiter) = LIMITERS.get_ptr_mut(limiter) {
        // SAFETY: the kernel returned a pointer to a value of this map; the field is 4 bytes, aligned.
        unsafe { atomic::decrement(&raw mut (*limiter).concurrent) };
    }
    client_table::count_down(client);
}

/// Records a segment that changes the state of a counted connection. `over` is true for a RST, which ends the
/// connection at once. Otherwise `bit` is [`bits::CLIENT_FIN`], [`bits::SERVER_FIN`], [`bits::ANSWERED`] or a
/// combination of these; 0 records only that the connection is alive.
#[inline(always)]
pub fn record(tag: u64, bit: u32, over: bool) {
    let _ = breaker_record(tag, bit as u64 | (over as u64) << 32);
}

/// Implements [`record`]. A global function: see [`super::breaker_admit`]. Global functions must return a number, so
/// the result is always 0.
#[unsafe(no_mangle)]
#[inline(never)]
pub extern "C" fn breaker_record(tag: u64, bit_and_reset: u64) -> u32 {
    let Some(entry) = find(tag, true) else { return 0 };
    // SAFETY: the pointer is to an aligned 4-byte field of a map value.
    if unsafe { atomic::load32(entry.state_word()) } & bits::COUNTED == 0 {
        return 0;
    }
    entry.touch(agent::tick(agent::now_ns()));
    if bit_and_reset >> 32 != 0 {
        entry.release();
        return 0;
    }
    let bit = bit_and_reset as u32;
    let at = entry.state_word();
    for _ in 0..gcra::TRIES {
        // SAFETY: as for the load above.
        let before = unsafe { atomic::load32(at) };
        let after = before | bit;
        // SAFETY: as for the load above.
        if before == after || unsafe { atomic::compare_exchange32(at, before, after) } {
            let both = bits::CLIENT_FIN | bits::SERVER_FIN;
            if after & both == both {
                entry.release();
            }
            return 0;
        }
    }
    0
}

impl ConnectionEntry {
    #[inline(always)]
    fn state(&self) -> *mut ConnectionState {
        // SAFETY: the bucket is a value of the map, and the index is masked to be in bounds.
        unsafe { &raw mut (*self.bucket).states[self.way & (WAYS - 1)] }
    }

    #[inline(always)]
    fn state_word(&self) -> *mut u32 {
        // SAFETY: as in `state`.
        unsafe { &raw mut (*self.state()).state }
    }

    /// Returns whether the request belongs to the connection in this entry: a retransmitted SYN, or a datagram of a
    /// flow that has not expired.
    #[inline(always)]
    pub fn is_same_connection(&self, request: &UnpackedRequest, limiter: u32) -> bool {
        let state = self.state();
        // SAFETY: as in `state`; the fields are aligned.
        let (of, sequence, last) = unsafe {
            (
                atomic::load32(&raw const (*state).limiter),
                atomic::load32(&raw const (*state).number),
                atomic::load32(&raw const (*state).last_seen_tick),
            )
        };
        // Signed: `request.now_ns` may be the time of the last heartbeat, which is before the last packet.
        let age = agent::tick(request.now_ns).wrapping_sub(last) as i32;
        let fresh = request.bits & bits::DATAGRAMS == 0 || age <= DATAGRAMS_TICKS;
        // For a socket in the host network namespace, each connect() is a new connection.
        let socket = request.bits & (bits::SOCKET | bits::DATAGRAMS) == bits::SOCKET;
        of == limiter && sequence == request.sequence && fresh && !socket
    }

    /// Returns whether this limiter admitted the connection in this entry.
    #[inline(always)]
    pub fn is_of(&self, limiter: u32) -> bool {
        // SAFETY: as in `is_same_connection`.
        unsafe { atomic::load32(&raw const (*self.state()).limiter) == limiter }
    }

    /// Marks the connection as alive at `tick`.
    #[inline(always)]
    pub fn touch(&self, tick: u32) {
        let state = self.state();
        // SAFETY: as in `is_same_connection`. Read first: an unconditional write would dirty the cache line for every
        // packet.
        unsafe {
            let at = &raw mut (*state).last_seen_tick;
            if atomic::load32(at) != tick {
                at.write_volatile(tick);
            }
        }
    }

    /// Frees the entry and, if the connection was counted, counts it down. If several CPUs do so at once, only the one
    /// that clears the COUNTED bit counts down and frees.
    ///
    /// The state is read before the limiter and the client: if another connection claims the entry in between, the
    /// compare-and-swap of the state fails, because a claimed entry has another generation. The entry is freed only if
    /// it still has the tag that it was found by.
    #[inline(always)]
    pub fn release(&self) {
        let (state, at) = (self.state(), self.state_word());
        // SAFETY: as in `is_same_connection`.
        let (first, limiter, client) = unsafe {
            (
                atomic::load32(at),
                atomic::load32(&raw const (*state).limiter),
                atomic::load32(&raw const (*state).client),
            )
        };
        let mut before = first;
        for _ in 0..gcra::TRIES {
            if before & bits::COUNTED == 0 {
                break;
            }
            // SAFETY: as in `is_same_connection`; the word is changed by atomics.
            if unsafe { atomic::compare_exchange32(at, before, before & !bits::COUNTED) } {
                count_down(limiter, client);
                break;
            }
            // SAFETY: as in `is_same_connection`.
            before = unsafe { atomic::load32(at) };
            if (before ^ first) >= ENTRY_GENERATION || before & bits::COUNTED == 0 {
                // Another connection has claimed the entry in the meantime, or another CPU releases it.
                return;
            }
        }
        bucket::free(self.bucket, self.way, self.tag);
    }
}
