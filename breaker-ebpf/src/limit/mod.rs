//! Limits on new connections per second and on concurrent connections, per tier and per client of a tier.
//!
//! [`Request::admit`] decides about one new connection. Rates use GCRA ([`breaker_common::gcra`]). Concurrent
//! connections are counted up here and counted down where the connection ends ([`connection_table`]). All limits are
//! checked before anything is taken from one of them, so a connection that one limit refuses takes nothing from the
//! others.
//!
//! | module | one concern |
//! |---|---|
//! | [`settings`] | the configured limits and the counters |
//! | [`limiter`] | token buckets and connection counts |
//! | [`admit`] | the decision about one new connection |
//! | [`bucket`] | finding and claiming the entry of a tag |
//! | [`connection_table`] | which connections were admitted, and which of them are counted |
//! | [`client_table`] | rate and connection count per client; the clients that are refused most often |

mod admit;
mod bucket;
mod client_table;
pub mod connection_table;
pub mod limiter;
pub mod settings;

use core::arch::asm;

use aya_ebpf::helpers::generated::bpf_ktime_get_ns;
use breaker_common::{ServiceLimits, Switch, switch_flags};

use crate::{agent, family::V6};
use settings::{limits_of, tier_limits};

/// Result of [`Request::admit`]: the connection is admitted.
pub const ADMITTED: u32 = 0;
/// Result of [`Request::admit`]: the connection was admitted before.
pub const REPEATED: u32 = 1;
/// Base of the results that mean "over a limit": the number of the [`breaker_common::LimitKind`] is added to it.
const OVER: u32 = 16;

/// Returns the number of the [`breaker_common::LimitKind`] that the connection is over, or `None` if `answer` means
/// that it is admitted.
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
    /// The client as limits identify it: see [`crate::wire::Wire::client`]. Zero for the processes in the host network
    /// namespace.
    pub client: V6,
    pub service: u32,
    /// The service's switch as a word (see [`Switch::to_word`]).
    pub switch: u64,
    /// [`settings::PRIMARY`] or [`settings::BACKUP`].
    pub tier: u32,
    /// Sequence number of the SYN as it is in memory; 0 for datagrams and sockets.
    pub sequence: u32,
    /// Bits of [`breaker_common::connection_state`] that describe the connection: `DATAGRAMS`, `SOCKET`.
    pub bits: u32,
}

impl Request {
    /// Decides whether the connection is admitted. Returns [`ADMITTED`], [`REPEATED`], or a number that
    /// [`refusing_limit`] decodes.
    #[inline(always)]
    pub fn admit(&self) -> u32 {
        let [a, b, c, d] = self.client.in_words();
        let holds = Switch::from_word(self.switch).has(switch_flags::HOLD) as u64;
        let packed = self.service as u64 | (self.tier as u64) << 32 | (self.bits as u64) << 40 | holds << 48;
        let words = |high: u32, low: u32| (high as u64) << 32 | low as u64;
        let answer = breaker_admit(self.tag, words(a, b), words(c, d), packed, self.sequence as u64);
        if answer >= OVER {
            client_table::record_refused(self.client, self.service, self.tier);
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
pub extern "C" fn breaker_admit(tag: u64, client_high: u64, client_low: u64, packed: u64, sequence: u64) -> u32 {
    let client = [(client_high >> 32) as u32, client_high as u32, (client_low >> 32) as u32, client_low as u32];
    let Some(limits) = limits_of(packed as u32) else { return ADMITTED };
    let now_ns = now_for(limits, (packed >> 32) as u32 & 1);
    let request = UnpackedRequest {
        tag,
        client: V6::from_words(client),
        service: packed as u32,
        tier: (packed >> 32) as u32 & 1,
        bits: (packed >> 40) as u32 & 0xff,
        sequence: sequence as u32,
        now_ns,
        holds: packed >> 48 != 0,
    };
    admit::admit(&request, limits)
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
    bits: u32,
    sequence: u32,
    now_ns: u64,
    /// The service has `onAgentLoss: Hold`.
    holds: bool,
}

/// Current time in nanoseconds from the precise clock, fine enough for a rate of a million connections per second.
/// (`bpf_ktime_get_coarse_ns` advances every 1 to 10 ms.)
#[inline(always)]
fn now_ns() -> u64 {
    // SAFETY: the helper takes no arguments and has no side effects.
    unsafe { bpf_ktime_get_ns() }
}
