//! The connections that were admitted: so that a SYN that is sent again is not charged twice, and that a connection that was
//! counted is counted down once, when both ends have sent a FIN or one has sent a RST.
//!
//! What ends without such a sign, the agent takes out (`datapath/kernel/connections.rs` there).
//!
//! A connection that is not counted (there are limits on rates only) makes room for others when a bucket is full; one that is
//! counted never does.

use aya_ebpf::{Global, bindings::BPF_F_MMAPABLE, btf_maps::Array, macros::btf_map};
use breaker_common::{
    Bucket, CONNECTION_TURN, ConnectionState, DEFAULT_CONNECTION_BUCKETS, WAYS, connection_state as bits, gcra,
};

use super::{Asked, LIMITERS, bucket, clients};
use crate::{agent, atomic};

type Buckets = Bucket<ConnectionState>;

#[btf_map]
static CONNECTIONS: Array<Buckets, { DEFAULT_CONNECTION_BUCKETS as usize }, { BPF_F_MMAPABLE as usize }> = Array::new();

/// The number of buckets less 1; the loader sets it to what the map has.
#[unsafe(no_mangle)]
static CONNECTION_MASK: Global<u32> = Global::new(DEFAULT_CONNECTION_BUCKETS - 1);

/// How long a flow of datagrams is remembered without a packet, in ticks. The agent goes by the same time.
const DATAGRAMS_TICKS: u32 = 60;

/// Where a connection is remembered.
#[derive(Clone, Copy)]
pub struct Place {
    bucket: *mut Buckets,
    way: usize,
}

/// The place of a connection. `second`: it may be in the second of its buckets, where only connections that are counted are.
#[inline(always)]
pub fn find(tag: u64, second: bool) -> Option<Place> {
    at(breaker_find(tag, second as u64))
}

/// The number of a connection's place plus 1; 0: there is none. A global function, as [`super::breaker_admit`].
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

/// The place of a number.
#[inline(always)]
fn at(number: u32) -> Option<Place> {
    let (bucket, way) = bucket::of_number(number)?;
    Some(Place { bucket: CONNECTIONS.get_ptr_mut(bucket)?, way })
}

/// Remembers a connection that was admitted. False: there is no room, and nobody will count it down.
#[inline(always)]
pub fn insert(tag: u64, limiter: u32, number: u32, what: u32, client: u32, tick: u32) -> bool {
    let Some(place) = at(breaker_claim(tag, (what & bits::COUNTED != 0) as u64)) else { return false };
    let state = place.state();
    // SAFETY: the place is ours since its tag was swapped. Who finds the tag meanwhile sees an earlier connection's fields, as
    // if this one had not come yet.
    unsafe {
        let turn = atomic::load32(&raw const (*state).state) & !(CONNECTION_TURN - 1);
        (&raw mut (*state).limiter).write_volatile(limiter);
        (&raw mut (*state).number).write_volatile(number);
        (&raw mut (*state).last_tick).write_volatile(tick);
        (&raw mut (*state).client).write_volatile(client);
        (&raw mut (*state).state).write_volatile(turn.wrapping_add(CONNECTION_TURN) | what);
    }
    true
}

/// Claims a place for a tag: its number plus 1; 0: there is none. A global function, as [`super::breaker_admit`].
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
    // One that is not counted gives way, whichever.
    let uncounted = |state: *const ConnectionState| {
        // SAFETY: a state of this bucket; its fields are aligned.
        unsafe { atomic::load32(&raw const (*state).state) & bits::COUNTED == 0 }
    };
    match bucket::displace(first, tag, (tag >> 3) as usize & (WAYS - 1), uncounted) {
        Some(way) => bucket::number(buckets[0], way),
        None => 0,
    }
}

/// Takes a connection out of the counts of its limiter and its client (a place plus 1, or 0).
#[inline(always)]
pub fn count_down(limiter: u32, client: u32) {
    if let Some(limiter) = LIMITERS.get_ptr_mut(limiter) {
        // SAFETY: the kernel returned a pointer to a value of this map; the field is 4 bytes, aligned.
        unsafe { atomic::decrement(&raw mut (*limiter).concurrent) };
    }
    clients::count_down(client);
}

/// Notes a segment that ends a connection that is counted, or begins to: `over` for a RST, else the FIN of [`bits::CLIENT_FIN`] or
/// [`bits::SERVER_FIN`], or [`bits::ANSWERED`].
#[inline(always)]
pub fn note(tag: u64, bit: u32, over: bool) {
    let _ = breaker_note(tag, bit as u64 | (over as u64) << 32);
}

/// See [`note`]. A global function, as [`super::breaker_admit`]; one must return a number.
#[unsafe(no_mangle)]
#[inline(never)]
pub extern "C" fn breaker_note(tag: u64, what: u64) -> u32 {
    let Some(place) = find(tag, true) else { return 0 };
    // SAFETY: the field of a map's value, 4 bytes and aligned.
    if unsafe { atomic::load32(place.state_word()) } & bits::COUNTED == 0 {
        return 0;
    }
    place.touch(agent::tick(agent::now_ns()));
    if what >> 32 != 0 {
        place.release();
        return 0;
    }
    let bit = what as u32;
    let at = place.state_word();
    for _ in 0..gcra::TRIES {
        // SAFETY: the field of a map's value, 4 bytes and aligned.
        let before = unsafe { atomic::load32(at) };
        let after = before | bit;
        // SAFETY: as above.
        if before == after || unsafe { atomic::compare_exchange32(at, before, after) } {
            let both = bits::CLIENT_FIN | bits::SERVER_FIN;
            if after & both == both {
                place.release();
            }
            return 0;
        }
    }
    0
}

impl Place {
    #[inline(always)]
    fn state(&self) -> *mut ConnectionState {
        // SAFETY: the bucket is a value of the map, and the place is inside.
        unsafe { &raw mut (*self.bucket).states[self.way & (WAYS - 1)] }
    }

    #[inline(always)]
    fn state_word(&self) -> *mut u32 {
        // SAFETY: as above.
        unsafe { &raw mut (*self.state()).state }
    }

    /// Whether a request is about the connection that is here: a SYN that is sent again, or a datagram of a flow that lives.
    #[inline(always)]
    pub fn is_again(&self, request: &Asked, limiter: u32) -> bool {
        let state = self.state();
        // SAFETY: as above; the fields are aligned.
        let (of, number, last) = unsafe {
            (
                atomic::load32(&raw const (*state).limiter),
                atomic::load32(&raw const (*state).number),
                atomic::load32(&raw const (*state).last_tick),
            )
        };
        let fresh =
            request.what & bits::DATAGRAMS == 0 || agent::tick(request.now_ns).wrapping_sub(last) <= DATAGRAMS_TICKS;
        // Each connect() of a socket of the node's own is a connection of its own.
        let socket = request.what & (bits::SOCKET | bits::DATAGRAMS) == bits::SOCKET;
        of == limiter && number == request.number && fresh && !socket
    }

    /// Whether a limiter has admitted the connection that is here.
    #[inline(always)]
    pub fn is_of(&self, limiter: u32) -> bool {
        // SAFETY: as above.
        unsafe { atomic::load32(&raw const (*self.state()).limiter) == limiter }
    }

    /// Notes a sign of life.
    #[inline(always)]
    pub fn touch(&self, tick: u32) {
        let state = self.state();
        // SAFETY: as above. Reading first keeps the cache line clean.
        unsafe {
            let at = &raw mut (*state).last_tick;
            if atomic::load32(at) != tick {
                at.write_volatile(tick);
            }
        }
    }

    /// Forgets the connection, and counts it down if it was counted. Of those who do so at once, one counts.
    #[inline(always)]
    pub fn release(&self) {
        let (state, at) = (self.state(), self.state_word());
        // SAFETY: as above.
        let (limiter, client, first) = unsafe {
            (
                atomic::load32(&raw const (*state).limiter),
                atomic::load32(&raw const (*state).client),
                atomic::load32(at),
            )
        };
        let mut before = first;
        for _ in 0..gcra::TRIES {
            if before & bits::COUNTED == 0 {
                break;
            }
            // SAFETY: as above.
            if unsafe { atomic::compare_exchange32(at, before, before & !bits::COUNTED) } {
                count_down(limiter, client);
                break;
            }
            // SAFETY: as above.
            before = unsafe { atomic::load32(at) };
            if (before ^ first) >= CONNECTION_TURN {
                // The place is another connection's by now.
                return;
            }
        }
        bucket::free(self.bucket, self.way);
    }
}
