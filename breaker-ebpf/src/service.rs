//! A service's switch (where new connections go), its record, and the state that the programs keep for it: the
//! epoch and the half-open permits.

use aya_ebpf::{
    bindings::{BPF_F_MMAPABLE, BPF_F_NO_PREALLOC},
    btf_maps::{Array, HashMap},
    macros::btf_map,
};
use breaker_common::{
    BreakerState, DEFAULT_DOWN_BACKENDS, DEFAULT_SERVICES, DownBackendKey, Flow, ServiceRecord, ServiceRuntime, Switch,
    switch_flags,
};

use crate::{atomic, limit::limiter};

const SERVICES_LEN: usize = DEFAULT_SERVICES as usize;
const MMAPABLE: usize = BPF_F_MMAPABLE as usize;

/// The switch of each service, one word. The agent maps the array into its memory and stores whole words.
#[btf_map]
static SWITCHES: Array<Switch, SERVICES_LEN, MMAPABLE> = Array::new();

/// Names, reasons and times, for restarts of the agent and for operators. The agent maps the array into its memory,
/// too, and writes it with every change of state.
#[btf_map]
static SERVICES: Array<ServiceRecord, SERVICES_LEN, MMAPABLE> = Array::new();

/// The programs' own state of each service. Only the programs write it.
#[btf_map]
static RUNTIME: Array<ServiceRuntime, SERVICES_LEN> = Array::new();

/// The backends of each service that are Down, and whose established flows are to be reset (`onBackupDown: Reset`).
/// Written by the agent. The programs look here only if the switch says so.
#[btf_map]
static DOWN_BACKENDS: HashMap<DownBackendKey, u8, { DEFAULT_DOWN_BACKENDS as usize }, { BPF_F_NO_PREALLOC as usize }> =
    HashMap::new();

/// Number of attempts at a compare-and-swap before the caller takes the safe result.
const TRIES: usize = 4;

/// A service's switch, read as one word.
#[inline(always)]
pub fn switch(service: u32) -> Option<Switch<u8>> {
    let word = SWITCHES.get_ptr(service)?.cast::<u64>();
    // SAFETY: the kernel returned a pointer to a value of this map, which has 8 bytes and is aligned.
    Some(Switch::from_word(unsafe { atomic::load(word) }))
}

/// Whether the flow tables may hold flows of a service: the agent tracks them, or a limit has sent connections to
/// the backup.
#[inline(always)]
pub fn tracks(service: u32, switch: &Switch<u8>) -> bool {
    switch.has(switch_flags::TRACK) || switch.has(switch_flags::LIMITED) && limiter::has_overflowed(service)
}

/// Whether an established flow on a backup is to be reset. The switch has [`switch_flags::RESET_BACKUP`].
#[inline(always)]
pub fn resets_on_backup<A>(flow: &Flow<A>, switch: &Switch<u8>) -> bool {
    if switch.state == BreakerState::Closed as u8 {
        return flow.epoch != switch.epoch;
    }
    let family = if size_of::<A>() == 4 { 0 } else { DownBackendKey::IPV6 };
    let key = DownBackendKey { service: flow.service, backend: flow.backend_id | family };
    // SAFETY: the value is not read.
    unsafe { DOWN_BACKENDS.get(&key) }.is_some()
}

/// A service's record.
#[inline(always)]
pub fn record(service: u32) -> Option<&'static ServiceRecord> {
    SERVICES.get(service)
}

/// Whether the primary accepts connections as far as the agent knows, although it may fail its checks.
#[inline(always)]
pub fn primary_accepts(service: u32) -> bool {
    record(service).is_some_and(|record| record.primary_accepts != 0)
}

/// A [`ServiceRuntime`] packed into one word.
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

/// Records that the programs have seen `epoch`. Returns true for the one packet that recorded it.
#[inline(always)]
pub fn record_epoch(service: u32, epoch: u32) -> bool {
    let Some(runtime) = RUNTIME.get_ptr_mut(service) else { return false };
    let at = runtime.cast::<u64>();
    // SAFETY: the kernel returned a pointer to a value of this map, which has 8 bytes and is aligned; only the
    // functions of this module access it, by atomic operations.
    let word = unsafe { atomic::load(at) };
    // SAFETY: as above.
    unpack(word).0 != epoch && unsafe { atomic::compare_exchange(at, word, pack(epoch, 0)) }
}

/// Takes one of the permits with which a half-open breaker lets connections through to the primary. Returns whether
/// one was left.
///
/// An epoch has `limit` permits: a packet that loses every race gets none, which is the safe side.
#[inline(always)]
pub fn take_permit(service: u32, epoch: u32, limit: u32) -> bool {
    let Some(runtime) = RUNTIME.get_ptr_mut(service) else { return false };
    let at = runtime.cast::<u64>();
    for _ in 0..TRIES {
        // SAFETY: as in `record_epoch`.
        let word = unsafe { atomic::load(at) };
        let (seen, taken) = unpack(word);
        let taken = if seen == epoch { taken } else { 0 };
        if taken >= limit {
            return false;
        }
        // SAFETY: as in `record_epoch`.
        if unsafe { atomic::compare_exchange(at, word, pack(epoch, taken + 1)) } {
            return true;
        }
    }
    false
}

/// Returns a permit that [`take_permit`] took for a connection that a limit then kept from the primary. A permit
/// whose return loses every race stays taken, which is the safe side.
#[inline(always)]
pub fn return_permit(service: u32, epoch: u32) {
    let Some(runtime) = RUNTIME.get_ptr_mut(service) else { return };
    let at = runtime.cast::<u64>();
    for _ in 0..TRIES {
        // SAFETY: as in `record_epoch`.
        let word = unsafe { atomic::load(at) };
        let (seen, taken) = unpack(word);
        if seen != epoch || taken == 0 {
            return;
        }
        // SAFETY: as in `record_epoch`.
        if unsafe { atomic::compare_exchange(at, word, pack(epoch, taken - 1)) } {
            return;
        }
    }
}
