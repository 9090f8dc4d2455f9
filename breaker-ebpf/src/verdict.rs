//! What becomes of a packet.

use aya_ebpf::bindings::TC_ACT_UNSPEC;
use breaker_common::PassReason;

use crate::count;

/// The end of a packet's way through a function of the hook.
pub enum Verdict {
    /// On to the next program on the hook, then the stack: untouched, or rewritten. Never a final OK, so that
    /// whoever is behind us still runs (TCX_NEXT has the number of TC_ACT_UNSPEC, include/uapi/linux/bpf.h).
    Next,
    /// Goes where `bpf_redirect` said; carries the helper's return value.
    Redirect(i32),
    /// Settled already, by another function.
    Settled(i32),
    /// Not settled: the next function of the hook takes over.
    Then(Step),
}

/// What a packet needs next. The numbers are none of the kernel's actions (include/uapi/linux/pkt_cls.h).
#[derive(Clone, Copy)]
#[repr(i32)]
pub enum Step {
    /// It is the first of its flow: decide.
    Decide = 0x1001,
    /// Translate it as was decided.
    Translate = 0x1002,
    /// Refuse it.
    Refuse = 0x1003,
    /// Reset its connection at both ends.
    Reset = 0x1004,
    /// It is an ICMP error: translate what it quotes.
    Error = 0x1005,
    /// It goes to a backend's own address.
    Direct = 0x1006,
    /// It may be a backend's answer that leaves the stack out.
    Answer = 0x1007,
    /// It is an ICMP error, and not about what a backend sent: maybe about what it got past the stack.
    AnswerError = 0x1008,
    /// It is the first of its flow, and its service has limits: ask whether it is admitted.
    Admit = 0x1009,
    /// As `Admit`, for the backup: the primary is at a limit, and connections over it go there.
    AdmitToBackup = 0x100a,
    /// Carry out what was decided for it.
    CarryOut = 0x100b,
}

/// Turns the outcome of a hook into the action that the kernel wants. An error is never the packet's fault: it goes
/// on as it came, and the reason is counted (fail open).
#[inline(always)]
pub fn settle(outcome: Result<Verdict, PassReason>) -> i32 {
    match outcome {
        Ok(Verdict::Next) => TC_ACT_UNSPEC,
        Ok(Verdict::Redirect(action) | Verdict::Settled(action)) => action,
        Ok(Verdict::Then(step)) => step as i32,
        Err(reason) => {
            count::reason(reason);
            TC_ACT_UNSPEC
        }
    }
}
