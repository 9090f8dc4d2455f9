//! What becomes of a packet.

use aya_ebpf::bindings::TC_ACT_UNSPEC;
use breaker_common::PassReason;

use crate::count;

/// What becomes of a packet after one function of a hook.
pub enum Verdict {
    /// The next program on the hook runs, then the network stack. The packet is unchanged or rewritten. breaker never
    /// returns a final TC_ACT_OK, so that other programs on the hook still run (TCX_NEXT has the value of
    /// TC_ACT_UNSPEC, include/uapi/linux/bpf.h).
    Next,
    /// A redirect helper has set where the packet goes. Holds the helper's return value.
    Redirect(i32),
    /// Already decided. Holds the action, which may be the return value of another function of the hook.
    Final(i32),
    /// Not decided yet: the function for this stage continues.
    Continue(Stage),
}

/// The stage that a packet needs next. A hook's functions return it in place of a tc action, so the numbers differ
/// from all of the kernel's actions (include/uapi/linux/pkt_cls.h).
#[derive(Clone, Copy)]
#[repr(i32)]
pub enum Stage {
    /// The first packet of its flow: choose its destination.
    Decide = 0x1001,
    /// Translate the packet to the backend that was chosen.
    Translate = 0x1002,
    /// Refuse the connection or datagram.
    Refuse = 0x1003,
    /// Reset the packet's connection at both ends.
    Reset = 0x1004,
    /// An ICMP error from a client: translate the packet that it quotes.
    IcmpErrorFromClient = 0x1005,
    /// A packet to a backend's own address.
    DirectToBackend = 0x1006,
    /// Possibly a backend's reply on the fast path, which bypasses the host network stack.
    FastPathReply = 0x1007,
    /// An ICMP error that does not quote a frontend's packet. It may come from a backend and quote a packet that the
    /// backend received on the fast path.
    FastPathIcmpError = 0x1008,
    /// The first packet of a flow to a service with limits: ask whether they admit it.
    Admit = 0x1009,
    /// As `Admit`, for the backup: the primary is at a limit, and new connections over it go to the backup.
    AdmitToBackup = 0x100a,
    /// Apply the decision for the first packet of a flow.
    Apply = 0x100b,
}

/// Converts an outcome to the number that a hook's function returns: the kernel's action, or the next [`Stage`].
/// After an error the packet passes unchanged, and the reason is counted (fail open).
#[inline(always)]
pub fn into_action(outcome: Result<Verdict, PassReason>) -> i32 {
    match outcome {
        Ok(Verdict::Next) => TC_ACT_UNSPEC,
        Ok(Verdict::Redirect(action) | Verdict::Final(action)) => action,
        Ok(Verdict::Continue(step)) => step as i32,
        Err(reason) => {
            count::reason(reason);
            TC_ACT_UNSPEC
        }
    }
}
