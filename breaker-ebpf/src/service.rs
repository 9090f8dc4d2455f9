//! A service's switch (which way connections go), its record and what the programs keep for it.

use aya_ebpf::{bindings::BPF_F_MMAPABLE, btf_maps::Array, macros::btf_map};
use breaker_common::{DEFAULT_SERVICES, ServiceRecord, ServiceRuntime, Switch, switch_flags};

use crate::{atomic, limit};

const SERVICES_LEN: usize = DEFAULT_SERVICES as usize;
const MMAPABLE: usize = BPF_F_MMAPABLE as usize;

/// One word a service; the agent maps it into its memory and stores whole words.
#[btf_map]
static SWITCHES: Array<Switch, SERVICES_LEN, MMAPABLE> = Array::new();

/// Names, reasons and times: for restarts and for people. In the agent's memory, too: a flip writes it.
#[btf_map]
static SERVICES: Array<ServiceRecord, SERVICES_LEN, MMAPABLE> = Array::new();

/// Written by the programs only.
#[btf_map]
static RUNTIME: Array<ServiceRuntime, SERVICES_LEN> = Array::new();

/// How often a compare-and-swap is tried before the caller takes the safe way out.
const TRIES: usize = 4;

/// A service's switch, read as one word.
#[inline(always)]
pub fn switch(service: u32) -> Option<Switch<u8>> {
    let word = SWITCHES.get_ptr(service)?.cast::<u64>();
    // SAFETY: the kernel returned a pointer to a value of this map, 8 bytes and aligned.
    Some(Switch::from_word(unsafe { atomic::load(word) }))
}

/// Whether a service may have flows that the tables must be asked for.
#[inline(always)]
pub fn tracks(service: u32, switch: &Switch<u8>) -> bool {
    switch.has(switch_flags::TRACK) || switch.has(switch_flags::LIMITED) && limit::has_overflowed(service)
}

/// A service's record.
#[inline(always)]
pub fn record(service: u32) -> Option<&'static ServiceRecord> {
    SERVICES.get(service)
}

/// The packed form of [`ServiceRuntime`].
#[inline(always)]
fn pack(epoch: u32, taken: u32) -> u64 {
    let (e, t) = (epoch.to_ne_bytes(), taken.to_ne_bytes());
    u64::from_ne_bytes([e[0], e[1], e[2], e[3], t[0], t[1], t[2], t[3]])
}

#[inline(always)]
fn unpack(word: u64) -> (u32, u32) {
    let b = word.to_ne_bytes();
    (u32::from_ne_bytes([b[0], b[1], b[2], b[3]]), u32::from_ne_bytes([b[4], b[5], b[6], b[7]]))
}

/// Notes that the programs met `epoch`; true for the one packet that was first.
#[inline(always)]
pub fn adopt(service: u32, epoch: u32) -> bool {
    let Some(runtime) = RUNTIME.get_ptr_mut(service) else { return false };
    let at = runtime.cast::<u64>();
    // SAFETY: the kernel returned a pointer to a value of this map, 8 bytes and aligned; only these two functions
    // touch it.
    let word = unsafe { atomic::load(at) };
    // SAFETY: as above.
    unpack(word).0 != epoch && unsafe { atomic::compare_exchange(at, word, pack(epoch, 0)) }
}

/// Takes one of the connections that a half-open breaker lets through to the primary.
///
/// Exactly `limit` are given out per epoch: a packet that loses every race gets none, which is the safe side.
#[inline(always)]
pub fn take_half_open(service: u32, epoch: u32, limit: u32) -> bool {
    let Some(runtime) = RUNTIME.get_ptr_mut(service) else { return false };
    let at = runtime.cast::<u64>();
    for _ in 0..TRIES {
        // SAFETY: see `adopt`.
        let word = unsafe { atomic::load(at) };
        let (seen, taken) = unpack(word);
        let taken = if seen == epoch { taken } else { 0 };
        if taken >= limit {
            return false;
        }
        // SAFETY: see `adopt`.
        if unsafe { atomic::compare_exchange(at, word, pack(epoch, taken + 1)) } {
            return true;
        }
    }
    false
}

/// Gives back one of the connections that [`take_half_open`] took, for one that a limit keeps from the primary. One that loses
/// every race stays taken, which is the safe side.
#[inline(always)]
pub fn give_back_half_open(service: u32, epoch: u32) {
    let Some(runtime) = RUNTIME.get_ptr_mut(service) else { return };
    let at = runtime.cast::<u64>();
    for _ in 0..TRIES {
        // SAFETY: see `adopt`.
        let word = unsafe { atomic::load(at) };
        let (seen, taken) = unpack(word);
        if seen != epoch || taken == 0 {
            return;
        }
        // SAFETY: see `adopt`.
        if unsafe { atomic::compare_exchange(at, word, pack(epoch, taken - 1)) } {
            return;
        }
    }
}
