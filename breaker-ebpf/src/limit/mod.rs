//! Limits on new connections per second and on concurrent connections, per tier and per client of a tier.
//!
//! [`Request::admit`] decides about one new connection. Rates use GCRA ([`breaker_common::gcra`]). Concurrent
//! connections are counted up here and counted down where the connection ends ([`connections`]). All limits are
//! checked before anything is taken from one of them, so a connection that one limit refuses takes nothing from the
//! others.
//!
//! | module | one concern |
//! |---|---|
//! | [`bucket`] | finding and claiming the entry of a tag |
//! | [`connections`] | which connections were admitted, and which of them are counted |
//! | [`clients`] | rate and connection count per client; the clients that are refused most often |

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

/// The configured limits of each service. Written by the agent.
#[btf_map]
static LIMITS: Array<ServiceLimits, SERVICES, MMAPABLE> = Array::new();

/// Token buckets and connection counts of the limiters, two per service (see [`breaker_common::Limiter`]).
#[btf_map]
static LIMITERS: Array<Limiter, { 2 * SERVICES }, MMAPABLE> = Array::new();

#[btf_map]
static LIMIT_COUNTERS: PerCpuArray<LimitCounters, SERVICES> = PerCpuArray::new();

/// Index of the primary in [`ServiceLimits::tiers`]; also the offset of its limiter from twice the service's index.
pub const PRIMARY: u32 = 0;
/// Index of the backup; see [`PRIMARY`].
pub const BACKUP: u32 = 1;

/// Result of [`Request::admit`]: the connection is admitted.
pub const ADMITTED: u32 = 0;
/// Result of [`Request::admit`]: the connection was admitted before.
pub const REPEATED: u32 = 1;
/// Base of the results that mean "over a limit": the number of the [`LimitKind`] is added to it.
const OVER: u32 = 16;

/// Returns the number of the [`LimitKind`] that the connection is over, or `None` if `answer` means that it is
/// admitted.
#[inline(always)]
pub fn refusing_limit(answer: u32) -> Option<u32> {
    let mut answer = answer;
    // LLVM derives the range of `answer` from the code of `breaker_admit` and drops the mask below as redundant;
    // without the mask the verifier cannot prove the index to be below 4. The empty assembly hides the value from
    // LLVM.
    // SAFETY: the assembly contains no instruction.
    unsafe { asm!("/* {0} */", inout(reg) answer, options(pure, nomem, nostack)) };
    if answer >= OVER { Some((answer - OVER) & 3) } else { None }
}

/// A new connection that asks for admission.
pub struct Request {
    /// Tag of the connection.
    pub tag: u64,
    /// The client as limits identify it: see [`Family::client`](crate::family::Family::client). Zero for the
    /// processes in the host network namespace.
    pub client: V6,
    pub service: u32,
    /// The service's switch as a word (see [`Switch::to_word`]).
    pub switch: u64,
    /// [`PRIMARY`] or [`BACKUP`].
    pub tier: u32,
    /// Sequence number of the SYN as it is in memory; 0 for datagrams and sockets.
    pub number: u32,
    /// Bits of [`connection_state`] that describe the connection: `DATAGRAMS`, `SOCKET`.
    pub what: u32,
}

impl Request {
    /// Decides whether the connection is admitted. Returns [`ADMITTED`], [`REPEATED`], or a number that
    /// [`kind_over`] decodes.
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

/// Implements [`Request::admit`]; the arguments are the packed fields of the request.
///
/// A global BPF function: the verifier verifies it once by itself, instead of once per path of every caller. All
/// arguments are scalars, which need no annotations for the verifier (Documentation/bpf/btf.rst;
/// `btf_prepare_func_args` in kernel/bpf/btf.c).
#[unsafe(no_mangle)]
#[inline(never)]
pub extern "C" fn breaker_admit(tag: u64, client_high: u64, client_low: u64, what: u64, number: u64) -> u32 {
    let client = [(client_high >> 32) as u32, client_high as u32, (client_low >> 32) as u32, client_low as u32];
    let Some(limits) = limits_of(what as u32) else { return ADMITTED };
    let now_ns = now_for(limits, (what >> 32) as u32 & 1);
    let asked = UnpackedRequest {
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

/// Current time in nanoseconds, from the cheapest clock that is precise enough for a tier's limits.
///
/// The coarse clock advances every 1 to 10 ms and costs half as much as the precise one. It is used where every
/// token bucket tolerates at least 100 ms, many times the clock's step. Without a rate limit, the time of the
/// agent's last heartbeat is enough.
#[inline(always)]
fn now_for(limits: &ServiceLimits, tier: u32) -> u64 {
    const COARSE_ENOUGH: u64 = 100_000_000;
    let limit = tier_limits(limits, tier);
    let fine = |interval: u64, tolerance: u64| interval != 0 && tolerance < COARSE_ENOUGH;
    if fine(limit.interval_ns, limit.tolerance_ns) || fine(limit.client_interval_ns, limit.client_tolerance_ns) {
        now_ns()
    } else if limit.interval_ns | limit.client_interval_ns != 0 {
        agent::now_ns()
    } else {
        agent::heartbeat_ns()
    }
}

/// An unpacked [`Request`], with the current time.
pub struct UnpackedRequest {
    tag: u64,
    client: V6,
    service: u32,
    tier: u32,
    what: u32,
    number: u32,
    now_ns: u64,
    /// The service has `onAgentLoss: Hold`.
    holds: bool,
}

/// Current time in nanoseconds from the precise clock, which can tell a million connections per second apart.
/// (`bpf_ktime_get_coarse_ns` advances every 1 to 10 ms.)
#[inline(always)]
fn now_ns() -> u64 {
    // SAFETY: the helper takes no arguments and has no side effects.
    unsafe { bpf_ktime_get_ns() }
}

/// Returns the limits of a service.
#[inline(always)]
pub fn limits_of(service: u32) -> Option<&'static ServiceLimits> {
    LIMITS.get(service)
}

/// Selects the limits of a tier: [`PRIMARY`] or [`BACKUP`].
#[inline(always)]
pub fn tier_limits(limits: &ServiceLimits, tier: u32) -> &TierLimits {
    if tier == PRIMARY { &limits.tiers[0] } else { &limits.tiers[1] }
}

/// Changes the limit counters of a service on this CPU.
#[inline(always)]
pub fn counters(service: u32, change: impl FnOnce(&mut LimitCounters)) {
    if let Some(counters) = LIMIT_COUNTERS.get_ptr_mut(service) {
        // SAFETY: the kernel returned a pointer to this CPU's value; see `count::service` on preemption.
        change(unsafe { &mut *counters });
    }
}

/// Selects the counter of a tier and of the limit with the number `kind` (a [`LimitKind`]).
#[inline(always)]
pub fn counter_of(counters: &mut [[u64; 4]; 2], tier: u32, kind: u32) -> &mut u64 {
    let tier = if tier == PRIMARY { &mut counters[0] } else { &mut counters[1] };
    &mut tier[kind as usize & 3]
}

/// Records that a connection to a service's primary was sent to the backup because of a limit. From then on, packets
/// of the service are looked up in the flow tables. The agent sets [`switch_flags::TRACK`] in its next sweep and
/// then clears this record.
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
struct Arrival(*mut u64);

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
const REFUSED: u64 = 0;
/// Result of [`breaker_rate`] and [`breaker_count`]: admitted, but the limit was not enforced. The rate was not
/// charged, or the count may now exceed its limit, because every compare-and-swap lost its race or because the agent
/// is gone.
const CONTENDED: u64 = 1;
/// Result of [`breaker_count`]: counted. From [`breaker_rate`], a number above this one is the new theoretical
/// arrival time.
const COUNTED: u64 = 2;

/// Owner of a token bucket and a connection count: a limiter by its index, or a client by its entry number (see
/// [`bucket::number`]).
#[derive(Clone, Copy)]
enum Owner {
    Limiter(u32),
    Client(u32),
}

impl Owner {
    /// Packs the owner into 64 bits, to pass it to a global function.
    #[inline(always)]
    fn word(self) -> u64 {
        match self {
            Self::Limiter(index) => index as u64,
            Self::Client(number) => 1 << 32 | number as u64,
        }
    }
}

/// Returns the theoretical arrival time and the connection count of the owner that [`Owner::word`] packed.
#[inline(always)]
fn state_of(whose: u64) -> Option<(Arrival, *mut u32)> {
    if whose >> 32 != 0 {
        let client = clients::at(whose as u32)?;
        return Some((Arrival(clients::arrival(client)), clients::concurrent(client)));
    }
    let limiter = LIMITERS.get_ptr_mut(whose as u32)?;
    // SAFETY: the kernel returned a pointer to a value of this map.
    Some(unsafe { (Arrival(&raw mut (*limiter).arrival_ns), &raw mut (*limiter).concurrent) })
}

/// Takes one connection from a rate limit. Times are in nanoseconds. A global function: see [`breaker_admit`].
#[unsafe(no_mangle)]
#[inline(never)]
pub extern "C" fn breaker_rate(whose: u64, now_ns: u64, interval_ns: u64, tolerance_ns: u64) -> u64 {
    let Some((arrival, _)) = state_of(whose) else { return CONTENDED };
    match gcra::take(&arrival, now_ns, interval_ns, tolerance_ns) {
        Taken::Refused => REFUSED,
        Taken::Contended => CONTENDED,
        Taken::Admitted(_, after) => after,
    }
}

/// Undoes [`breaker_rate`], whose result was `after`. The bucket is then as full as before; if it had been full, it
/// is full as of now.
#[inline(always)]
fn give_back(whose: Owner, after: u64, interval_ns: u64) {
    if after > COUNTED
        && let Some((arrival, _)) = state_of(whose.word())
    {
        gcra::give_back(&arrival, Taken::Admitted(after.wrapping_sub(interval_ns), after));
    }
}

/// Counts one more connection, up to `most` (0 = no limit). `holds` is 1 if the service has `onAgentLoss: Hold`. A
/// global function: see [`breaker_admit`].
#[unsafe(no_mangle)]
#[inline(never)]
pub extern "C" fn breaker_count(whose: u64, most: u64, holds: u64) -> u64 {
    let Some((_, at)) = state_of(whose) else { return CONTENDED };
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
/// may be too high, so it refuses nobody unless the service has `onAgentLoss: Hold`.
#[inline(always)]
fn full_count_refuses(holds: bool) -> bool {
    holds || agent::lease_is_valid(agent::now_ns())
}

#[inline(always)]
fn admit(asked: &UnpackedRequest, limits: &ServiceLimits) -> u32 {
    let limit = tier_limits(limits, asked.tier);
    let index = asked.service * 2 + asked.tier;
    let counts = limit.counts_connections();
    if let Some(entry) =
        connections::find(asked.tag, limits.tiers[0].counts_connections() || limits.tiers[1].counts_connections())
    {
        if entry.is_same_connection(asked, index) {
            entry.touch(agent::tick(asked.now_ns));
            counters(asked.service, |c| c.repeated += 1);
            return REPEATED;
        }
        // The client reuses its port: the earlier connection has ended, or now belongs to the other tier.
        entry.release();
    }
    if !limit.any() {
        return ADMITTED;
    }
    let client = if limit.has_client_limits() {
        clients::entry(clients::tag(asked.client, index, limits.hash_key), asked.now_ns)
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
    let untracked = !remembered || limit.has_client_limits() && client == 0;
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

/// Takes one connection from every limit. If one limit refuses, nothing is taken from any, and the error names that
/// limit.
#[inline(always)]
fn take_all(
    asked: &UnpackedRequest,
    limit: &TierLimits,
    limiter_index: u32,
    client_number: u32,
    contended: &mut bool,
) -> Result<(), LimitKind> {
    let Some((arrival, concurrent)) = state_of(Owner::Limiter(limiter_index).word()) else { return Ok(()) };
    let client = clients::at(client_number);
    let now = asked.now_ns;

    // First check all limits without taking anything, so that a refusal by one of them changes no other.
    let over = |at: &Arrival, interval: u64, tolerance: u64| {
        interval != 0 && gcra::next(at.load(), now, interval, tolerance).is_none()
    };
    // SAFETY: the pointers are to aligned 4-byte fields of map values.
    let full =
        |at: *mut u32, most: u32| most != 0 && unsafe { atomic::load32(at) } >= most && full_count_refuses(asked.holds);
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

    // Then take from each. If another CPU exhausts a later limit in between, give back what was taken from the
    // earlier ones.
    let (of_limiter, of_client) = (Owner::Limiter(limiter_index), Owner::Client(client_number));
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
    if !limit.counts_connections() {
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
