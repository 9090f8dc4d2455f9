//! Clients of tiers with per-client limits, and the list of the clients that are refused most often.

use aya_ebpf::{Global, bindings::BPF_F_MMAPABLE, btf_maps::Array, macros::btf_map};
use breaker_common::{
    Address as _, Bucket, ClientState, DEFAULT_CLIENT_BUCKETS, LIMITED_CLIENTS, LIMITED_WINDOW_SHIFT, LimitedClient,
    WAYS, hash,
};

use super::{bucket, settings};
use crate::{agent, atomic, family::V6};

type Buckets = Bucket<ClientState>;

const MMAPABLE: usize = BPF_F_MMAPABLE as usize;

#[btf_map]
static CLIENTS: Array<Buckets, { DEFAULT_CLIENT_BUCKETS as usize }, MMAPABLE> = Array::new();

/// Number of buckets minus 1. The loader sets it to match the size of the map.
#[unsafe(no_mangle)]
static CLIENT_MASK: Global<u32> = Global::new(DEFAULT_CLIENT_BUCKETS - 1);

/// The clients that are refused most often. The programs write entries as words ([`Entry`]); the map's type has the
/// address as bytes, which are easier to read in a dump.
#[btf_map]
static LIMITED: Array<LimitedClient, { LIMITED_CLIENTS as usize }, MMAPABLE> = Array::new();

/// Tag of a client of a limiter. `key` is the service's [`hash_key`](breaker_common::ServiceLimits::hash_key).
#[inline(always)]
pub fn tag(client: V6, limiter: u32, key: u64) -> u64 {
    let [a, b, c, d] = client.in_words();
    hash::tag(((a as u64) << 32) | b as u64, ((c as u64) << 32) | d as u64, limiter as u64, key)
}

/// Returns the number of a client's entry, and creates the entry if there is none. Returns 0 if every entry of its
/// two buckets belongs to a client that has connections or whose token bucket is not full.
#[inline(always)]
pub fn entry(tag: u64, now_ns: u64) -> u32 {
    breaker_client(tag, now_ns)
}

/// Implements [`entry`]. A global function: see [`super::breaker_admit`].
#[unsafe(no_mangle)]
#[inline(never)]
pub extern "C" fn breaker_client(tag: u64, now_ns: u64) -> u32 {
    let buckets = bucket::of_tag(tag, CLIENT_MASK.load());
    for index in buckets {
        if let Some(way) = CLIENTS.get_ptr_mut(index).and_then(|bucket| bucket::find(bucket, tag)) {
            return bucket::number(index, way);
        }
    }
    for index in buckets {
        let Some(bucket) = CLIENTS.get_ptr_mut(index) else { return 0 };
        if let Some(way) = bucket::claim(bucket, tag).or_else(|| replace(bucket, tag, now_ns)) {
            return bucket::number(index, way);
        }
    }
    0
}

/// Takes over the entry of a client without connections and with a full token bucket. A new client starts in exactly
/// that state, so the entry needs no reset. (If two CPUs claim one entry for two clients before the first client is
/// counted, the two clients share the entry for that connection.)
#[inline(always)]
fn replace(bucket: *mut Buckets, tag: u64, now_ns: u64) -> Option<usize> {
    bucket::take_over(bucket, tag, 0, |state| {
        // SAFETY: the state is in this bucket, and its fields are aligned.
        let (arrival, concurrent) =
            unsafe { (atomic::load(&raw const (*state).arrival_ns), atomic::load32(&raw const (*state).concurrent)) };
        arrival <= now_ns && concurrent == 0
    })
}

/// Returns the client with an entry number; `None` for 0.
#[inline(always)]
pub fn at(number: u32) -> Option<*mut ClientState> {
    let (bucket, way) = bucket::of_number(number)?;
    let bucket = CLIENTS.get_ptr_mut(bucket)?;
    // SAFETY: the bucket is a value of the map, and the index is masked to be in bounds.
    Some(unsafe { &raw mut (*bucket).states[way & (WAYS - 1)] })
}

/// Pointer to a client's theoretical arrival time.
#[inline(always)]
pub fn arrival(client: *mut ClientState) -> *mut u64 {
    // SAFETY: the caller got the client from `at`.
    unsafe { &raw mut (*client).arrival_ns }
}

/// Pointer to a client's connection count.
#[inline(always)]
pub fn concurrent(client: *mut ClientState) -> *mut u32 {
    // SAFETY: as in `arrival`.
    unsafe { &raw mut (*client).concurrent }
}

/// Decrements a client's connection count.
#[inline(always)]
pub fn decrement(client: *mut ClientState) {
    // SAFETY: as in `arrival`; the field is 4 bytes, aligned, and changed by atomics only.
    unsafe { atomic::decrement(concurrent(client)) };
}

/// Decrements the connection count of the client with an entry number. Does nothing for 0.
#[inline(always)]
pub fn count_down(number: u32) {
    if let Some(client) = at(number) {
        decrement(client);
    }
}

/// Records in `LIMITED` that a client was refused. Two CPUs that write at once may lose one of the two refusals,
/// which is acceptable because the list is for display only.
#[inline(always)]
pub fn record_refused(client: V6, service: u32, tier: u32) {
    let [a, b, c, d] = client.in_words();
    let words = |high: u32, low: u32| (high as u64) << 32 | low as u64;
    let _ = breaker_refused(words(a, b), words(c, d), (service * 2 + tier) as u64);
}

/// Implements [`record_refused`]. A global function: see [`super::breaker_admit`]. Global functions must return a
/// number, so the result is always 0.
#[unsafe(no_mangle)]
#[inline(never)]
pub extern "C" fn breaker_refused(client_high: u64, client_low: u64, limiter: u64) -> u32 {
    let words = [(client_high >> 32) as u32, client_high as u32, (client_low >> 32) as u32, client_low as u32];
    let (client, limiter) = (V6::from_words(words), limiter as u32);
    let now_ns = agent::now_ns();
    let Some(limits) = settings::limits_of(limiter / 2) else { return 0 };
    let first = (tag(client, limiter, limits.hash_key) >> 20) as u32 & (LIMITED_CLIENTS - LIMITED_WAYS);
    let window = (now_ns >> LIMITED_WINDOW_SHIFT) as u32;
    for way in 0..LIMITED_WAYS {
        let Some(entry) = LIMITED.get_ptr_mut(first + way) else { return 0 };
        // SAFETY: the kernel returned a pointer to a value of this map, which has the size, alignment and fields of
        // `Entry`.
        let entry = unsafe { &mut *entry.cast::<Entry>() };
        if entry.window != window {
            entry.before = if entry.window.wrapping_add(1) == window { entry.count } else { 0 };
            entry.count = 0;
            entry.window = window;
        }
        if entry.limiter == limiter + 1 && entry.client == client {
            entry.count = entry.count.saturating_add(1);
            return 0;
        }
        if entry.count == 0 {
            *entry = Entry { client, limiter: limiter + 1, window, count: 1, before: 0 };
            return 0;
        }
        // Other clients occupy all entries: decrement the last one until it can be taken over.
        if way == LIMITED_WAYS - 1 {
            entry.count -= 1;
        }
    }
    0
}

/// Number of consecutive entries of `LIMITED` that a client may be in.
const LIMITED_WAYS: u32 = 4;

/// A [`LimitedClient`] whose address is stored as words.
#[repr(C)]
struct Entry {
    client: V6,
    limiter: u32,
    window: u32,
    count: u32,
    before: u32,
}

const _: () = assert!(size_of::<Entry>() == size_of::<LimitedClient>() && V6::VERSION == 6);
