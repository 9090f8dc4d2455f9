//! What becomes of a packet.

use aya_ebpf::bindings::TC_ACT_UNSPEC;
use breaker_common::PassReason;

use crate::count;

/// The end of a packet's way through our hook.
pub enum Verdict {
    /// On to the next program on the hook, then the stack: untouched, or rewritten. Never a final OK, so that
    /// whoever is behind us still runs (TCX_NEXT has the number of TC_ACT_UNSPEC, include/uapi/linux/bpf.h).
    Next,
    /// Goes where `bpf_redirect` said; carries the helper's return value.
    Redirect(i32),
}

/// Turns the outcome of a hook into the action that the kernel wants. An error is never the packet's fault: it goes
/// on as it came, and the reason is counted (fail open).
#[inline(always)]
pub fn settle(outcome: Result<Verdict, PassReason>) -> i32 {
    match outcome {
        Ok(Verdict::Next) => TC_ACT_UNSPEC,
        Ok(Verdict::Redirect(action)) => action,
        Err(reason) => {
            count::reason(reason);
            TC_ACT_UNSPEC
        }
    }
}
