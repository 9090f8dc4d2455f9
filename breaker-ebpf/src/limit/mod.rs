//! Limits: new connections a second and connections at the same time, of a tier and of each of its clients.
//!
//! [`Request::admit`] decides about one new connection. Rates are GCRA ([`breaker_common::gcra`]); connections at the same time are
//! counted up here and counted down where the connection ends ([`connections`]). It looks at all limits before it takes
//! anything, so that a connection that one of them refuses costs the others nothing.
//!
//! | module | one concern |
//! |---|---|
//! | [`bucket`] | finding and claiming a place by its tag |
//! | [`connections`] | which connections are admitted, and which are counted |
//! | [`clients`] | the rate and count of each client; who is refused most often |

pub mod bucket;
pub mod clients;
pub mod connections;

use core::arch::asm;

use aya_ebpf::{
    bindings::BPF_F_MMAPABLE,
    btf_maps::{Array, PerCpuArray},
    helpers::generated::bpf_ktime_get_ns,
    macros::btf_map,
};
use breaker_common::{
    DEFAULT_SERVICES, LimitCounters, LimitKind, Limiter, PassReason, ServiceLimits, Switch, TierLimits,
    connection_state,
    gcra::{self, Taken, Word},
    switch_flags,
};

use crate::{agent, atomic, count, family::V6};

const SERVICES: usize = DEFAULT_SERVICES as usize;
const MMAPABLE: usize = BPF_F_MMAPABLE as usize;

/// What is configured.
#[btf_map]
static LIMITS: Array<ServiceLimits, SERVICES, MMAPABLE> = Array::new();

/// Buckets and counts, two for each service.
#[btf_map]
static LIMITERS: Array<Limiter, { 2 * SERVICES }, MMAPABLE> = Array::new();

#[btf_map]
static LIMIT_COUNTERS: PerCpuArray<LimitCounters, SERVICES> = PerCpuArray::new();

/// Index of a tier in [`ServiceLimits::tiers`], and its part of a limiter's index.
pub const PRIMARY: u32 = 0;
/// As [`PRIMARY`].
pub const BACKUP: u32 = 1;

/// An answer: it may go on.
pub const ADMITTED: u32 = 0;
/// An answer: its connection was admitted before.
pub const REPEATED: u32 = 1;
/// An answer: it is over the limit whose [`LimitKind`] is added.
const OVER: u32 = 16;

/// The limit that an answer says it is over.
#[inline(always)]
pub fn kind_over(answer: u32) -> Option<u32> {
    let mut answer = answer;
    // The compiler knows which answers there are, and leaves out the mask by which the verifier would know it, too.
    // SAFETY: no instruction at all.
    unsafe { asm!("/* {0} */", inout(reg) answer, options(pure, nomem, nostack)) };
    if answer >= OVER { Some((answer - OVER) & 3) } else { None }
}

/// A new connection that asks to be admitted.
pub struct Request {
    /// Of the connection.
    pub tag: u64,
    /// Its client: see [`clients::tag`].
    pub client: V6,
    pub service: u32,
    /// The service's switch, as a word.
    pub switch: u64,
    /// [`PRIMARY`] or [`BACKUP`].
    pub tier: u32,
    /// The sequence number of its SYN; 0 for datagrams.
    pub number: u32,
    /// Bits of [`connection_state`] that say what it is: `DATAGRAMS`, `SOCKET`.
    pub what: u32,
}

impl Request {
    /// Decides: [`ADMITTED`], [`REPEATED`], or over a limit ([`kind_over`]).
    #[inline(always)]
    pub fn admit(&self) -> u32 {
        let [a, b, c, d] = self.client.in_words();
        let holds = Switch::from_word(self.switch).has(switch_flags::HOLD) as u64;
        let what = self.service as u64 | (self.tier as u64) << 32 | (self.what as u64) << 40 | holds << 48;
        let words = |high: u32, low: u32| (high as u64) << 32 | low as u64;
        let answer = breaker_admit(self.tag, words(a, b), words(c, d), what, self.number as u64);
        if answer >= OVER {
            clients::note_refused(self.client, self.service, self.tier);
        }
        answer
    }
}

/// See [`Request::admit`], whose fields these are. A global function: the verifier looks at it once, and not again for every
/// way that leads here. Such a function takes numbers only (Documentation/bpf/btf.rst; `btf_prepare_func_args` in
/// kernel/bpf/btf.c).
#[unsafe(no_mangle)]
#[inline(never)]
pub extern "C" fn breaker_admit(tag: u64, client_high: u64, client_low: u64, what: u64, number: u64) -> u32 {
    let client = [(client_high >> 32) as u32, client_high as u32, (client_low >> 32) as u32, client_low as u32];
    let Some(limits) = of(what as u32) else { return ADMITTED };
    let now_ns = now_for(limits, (what >> 32) as u32 & 1);
    let asked = Asked {
        tag,
        client: V6::from_words(client),
        service: what as u32,
        tier: (what >> 32) as u32 & 1,
        what: (what >> 40) as u32 & 0xff,
        number: number as u32,
        now_ns,
        holds: what >> 48 != 0,
    };
    admit(&asked, limits)
}

/// Now, by the clock that a tier's limits need. The fine one costs twice as much as the coarse one, which moves every 1 to 10
/// ms: enough where the bucket holds what comes in that time many times over. Without a rate, the agent's heartbeat will do.
#[inline(always)]
fn now_for(limits: &ServiceLimits, tier: u32) -> u64 {
    const COARSE_ENOUGH: u64 = 100_000_000;
    let limit = of_tier(limits, tier);
    let fine = |interval: u64, tolerance: u64| interval != 0 && tolerance < COARSE_ENOUGH;
    if fine(limit.interval_ns, limit.tolerance_ns) || fine(limit.client_interval_ns, limit.client_tolerance_ns) {
        now_ns()
    } else if limit.interval_ns | limit.client_interval_ns != 0 {
        agent::now_ns()
    } else {
        agent::beat_ns()
    }
}

/// A [`Request`], and when it came.
pub struct Asked {
    tag: u64,
    client: V6,
    service: u32,
    tier: u32,
    what: u32,
    number: u32,
    now_ns: u64,
    /// The service's `onAgentLoss` says that the last decision holds.
    holds: bool,
}

/// Now, by a clock that is fine enough for a million connections a second (`bpf_ktime_get_coarse_ns` moves every 1 to 10 ms).
#[inline(always)]
fn now_ns() -> u64 {
    // SAFETY: no arguments, no side effects.
    unsafe { bpf_ktime_get_ns() }
}

/// A service's limits.
#[inline(always)]
pub fn of(service: u32) -> Option<&'static ServiceLimits> {
    LIMITS.get(service)
}

/// A tier's limits.
#[inline(always)]
pub fn of_tier(limits: &ServiceLimits, tier: u32) -> &TierLimits {
    if tier == PRIMARY { &limits.tiers[0] } else { &limits.tiers[1] }
}

/// Changes a service's counters.
#[inline(always)]
pub fn counters(service: u32, change: impl FnOnce(&mut LimitCounters)) {
    if let Some(counters) = LIMIT_COUNTERS.get_ptr_mut(service) {
        // SAFETY: the kernel returned a pointer to this CPU's value; see `count::service`.
        change(unsafe { &mut *counters });
    }
}

/// The counter of a tier and a kind of limit.
#[inline(always)]
pub fn of_kind(counters: &mut [[u64; 4]; 2], tier: u32, kind: u32) -> &mut u64 {
    let tier = if tier == PRIMARY { &mut counters[0] } else { &mut counters[1] };
    &mut tier[kind as usize & 3]
}

/// Notes that connections of a service's primary went to the backup because of a limit: from here on its flows are looked
/// for. The agent takes over with the next sweep, and clears this when the last of those flows has ended.
#[inline(always)]
pub fn mark_overflowed(service: u32) {
    let Some(limiter) = LIMITERS.get_ptr_mut(service * 2) else { return };
    // SAFETY: the kernel returned a pointer to a value of this map; the field is 4 bytes, aligned.
    unsafe {
        let at = &raw mut (*limiter).overflowed;
        // Reading first keeps the cache line shared.
        if atomic::load32(at) == 0 {
            at.write_volatile(1);
        }
    }
}

/// Whether a service may have flows on the backup because of a limit.
#[inline(always)]
pub fn has_overflowed(service: u32) -> bool {
    let Some(limiter) = LIMITERS.get_ptr_mut(service * 2) else { return false };
    // SAFETY: as above.
    unsafe { atomic::load32(&raw const (*limiter).overflowed) != 0 }
}

/// A theoretical arrival time in a map.
struct Arrival(*mut u64);

impl Word for Arrival {
    #[inline(always)]
    fn load(&self) -> u64 {
        // SAFETY: the field of a map's value, 8 bytes and aligned, that only this type touches.
        unsafe { atomic::load(self.0) }
    }

    #[inline(always)]
    fn compare_exchange(&self, old: u64, new: u64) -> bool {
        // SAFETY: as above.
        unsafe { atomic::compare_exchange(self.0, old, new) }
    }
}

/// An answer of [`breaker_rate`] and [`breaker_count`]: over the limit.
const REFUSED: u64 = 0;
/// An answer of both: admitted, and not charged, or beyond the limit perhaps, because every compare-and-swap lost its race.
const CONTENDED: u64 = 1;
/// An answer of [`breaker_count`]: counted. Of [`breaker_rate`], any other number is the new theoretical arrival time.
const COUNTED: u64 = 2;

/// Whose word a limit is: of a limiter by its index, or of a client by the number of its place (see [`bucket::number`]).
#[derive(Clone, Copy)]
enum Whose {
    Limiter(u32),
    Client(u32),
}

impl Whose {
    /// In 64 bits, for the global functions.
    #[inline(always)]
    fn word(self) -> u64 {
        match self {
            Self::Limiter(index) => index as u64,
            Self::Client(number) => 1 << 32 | number as u64,
        }
    }
}

/// The theoretical arrival time and the count that a [`Whose::word`] names.
#[inline(always)]
fn words_of(whose: u64) -> Option<(Arrival, *mut u32)> {
    if whose >> 32 != 0 {
        let client = clients::at(whose as u32)?;
        return Some((Arrival(clients::arrival(client)), clients::concurrent(client)));
    }
    let limiter = LIMITERS.get_ptr_mut(whose as u32)?;
    // SAFETY: the kernel returned a pointer to a value of this map.
    Some(unsafe { (Arrival(&raw mut (*limiter).arrival_ns), &raw mut (*limiter).concurrent) })
}

/// Takes one connection out of a bucket. A global function, as [`breaker_admit`].
#[unsafe(no_mangle)]
#[inline(never)]
pub extern "C" fn breaker_rate(whose: u64, now_ns: u64, interval_ns: u64, tolerance_ns: u64) -> u64 {
    let Some((arrival, _)) = words_of(whose) else { return CONTENDED };
    match gcra::take(&arrival, now_ns, interval_ns, tolerance_ns) {
        Taken::Refused => REFUSED,
        Taken::Contended => CONTENDED,
        Taken::Admitted(_, after) => after,
    }
}

/// Gives back what [`breaker_rate`] took: the bucket is as full as it was, or, if it had been full for a while, full as of now.
#[inline(always)]
fn give_back(whose: Whose, after: u64, interval_ns: u64) {
    if after > COUNTED
        && let Some((arrival, _)) = words_of(whose.word())
    {
        gcra::give_back(&arrival, Taken::Admitted(after.wrapping_sub(interval_ns), after));
    }
}

/// Counts up to `most` (0 = without end). `holds`: the service's `onAgentLoss` says that the last decision holds. A global
/// function, as [`breaker_admit`].
#[unsafe(no_mangle)]
#[inline(never)]
pub extern "C" fn breaker_count(whose: u64, most: u64, holds: u64) -> u64 {
    let Some((_, at)) = words_of(whose) else { return CONTENDED };
    if most != 0 {
        for _ in 0..gcra::TRIES {
            // SAFETY: the field of a map's value, 4 bytes and aligned, that is only changed by atomics.
            let now = unsafe { atomic::load32(at) };
            if now as u64 >= most {
                if counts_hold(holds != 0) {
                    return REFUSED;
                }
                break;
            }
            // SAFETY: as above.
            if unsafe { atomic::compare_exchange32(at, now, now + 1) } {
                return COUNTED;
            }
        }
    }
    // SAFETY: as above.
    unsafe { atomic::increment(at) };
    if most == 0 { COUNTED } else { CONTENDED }
}

/// Whether a count that is at its limit refuses. Without an agent that takes out of it what ended without a sign, nobody is
/// refused for a count, unless the last decision holds.
#[inline(always)]
fn counts_hold(holds: bool) -> bool {
    holds || agent::is_heard(agent::now_ns())
}

#[inline(always)]
fn admit(asked: &Asked, limits: &ServiceLimits) -> u32 {
    let limit = of_tier(limits, asked.tier);
    let index = asked.service * 2 + asked.tier;
    let counts = limit.counts();
    if let Some(place) = connections::find(asked.tag, limits.tiers[0].counts() || limits.tiers[1].counts()) {
        if place.is_again(asked, index) {
            place.touch(agent::tick(asked.now_ns));
            counters(asked.service, |c| c.repeated += 1);
            return REPEATED;
        }
        // The client's port was used again: its earlier connection is over, or has moved to the other tier.
        place.release();
    }
    if !limit.any() {
        return ADMITTED;
    }
    let client = if limit.tells_clients() {
        clients::place(clients::tag(asked.client, index, limits.hash_key), asked.now_ns)
    } else {
        0
    };
    let mut contended = false;
    if let Err(kind) = take_all(asked, limit, index, client, &mut contended) {
        return OVER + kind as u32;
    }
    let what = if counts { asked.what | connection_state::COUNTED } else { asked.what };
    let remembered = connections::insert(asked.tag, index, asked.number, what, client, agent::tick(asked.now_ns));
    if !remembered && counts {
        connections::count_down(index, client);
    }
    let untracked = !remembered || limit.tells_clients() && client == 0;
    if untracked {
        count::reason(PassReason::LimitTableFull);
    }
    if contended | untracked {
        counters(asked.service, |c| {
            c.contended += contended as u64;
            c.untracked += untracked as u64;
        });
    }
    ADMITTED
}

/// Takes one connection from every limit, or nothing from any: then the error is the limit that it is over.
#[inline(always)]
fn take_all(
    asked: &Asked,
    limit: &TierLimits,
    limiter_index: u32,
    client_number: u32,
    contended: &mut bool,
) -> Result<(), LimitKind> {
    let Some((arrival, concurrent)) = words_of(Whose::Limiter(limiter_index).word()) else { return Ok(()) };
    let client = clients::at(client_number);
    let now = asked.now_ns;

    // Look: what one limit refuses takes nothing from the others.
    let over = |at: &Arrival, interval: u64, tolerance: u64| {
        interval != 0 && gcra::next(at.load(), now, interval, tolerance).is_none()
    };
    // SAFETY: the fields of maps' values, 4 bytes and aligned.
    let full = |at: *mut u32, most: u32| most != 0 && unsafe { atomic::load32(at) } >= most && counts_hold(asked.holds);
    if let Some(client) = client {
        if over(&Arrival(clients::arrival(client)), limit.client_interval_ns, limit.client_tolerance_ns) {
            return Err(LimitKind::ClientNewConnections);
        }
        if full(clients::concurrent(client), limit.client_concurrent) {
            return Err(LimitKind::ClientConcurrent);
        }
    }
    if over(&arrival, limit.interval_ns, limit.tolerance_ns) {
        return Err(LimitKind::NewConnections);
    }
    if full(concurrent, limit.concurrent) {
        return Err(LimitKind::Concurrent);
    }

    // Take, and give back what was taken if another CPU was faster at the next limit.
    let (of_limiter, of_client) = (Whose::Limiter(limiter_index), Whose::Client(client_number));
    let mut client_after = CONTENDED;
    if client.is_some() && limit.client_interval_ns != 0 {
        let (interval, tolerance) = (limit.client_interval_ns, limit.client_tolerance_ns);
        client_after = breaker_rate(of_client.word(), now, interval, tolerance);
        if client_after == REFUSED {
            return Err(LimitKind::ClientNewConnections);
        }
        *contended |= client_after == CONTENDED;
    }
    let mut after = CONTENDED;
    if limit.interval_ns != 0 {
        after = breaker_rate(of_limiter.word(), now, limit.interval_ns, limit.tolerance_ns);
        if after == REFUSED {
            give_back(of_client, client_after, limit.client_interval_ns);
            return Err(LimitKind::NewConnections);
        }
        *contended |= after == CONTENDED;
    }
    if !limit.counts() {
        return Ok(());
    }
    let mut refused = None;
    if client.is_some() {
        let counted = breaker_count(of_client.word(), limit.client_concurrent as u64, asked.holds as u64);
        if counted == REFUSED {
            refused = Some(LimitKind::ClientConcurrent);
        }
        *contended |= counted == CONTENDED;
    }
    if refused.is_none() {
        let counted = breaker_count(of_limiter.word(), limit.concurrent as u64, asked.holds as u64);
        if counted == REFUSED {
            clients::count_down(client_number);
            refused = Some(LimitKind::Concurrent);
        }
        *contended |= counted == CONTENDED;
    }
    let Some(kind) = refused else { return Ok(()) };
    give_back(of_client, client_after, limit.client_interval_ns);
    give_back(of_limiter, after, limit.interval_ns);
    Err(kind)
}
