//! Limits on sockets in the host network namespace: admits or refuses a connection or datagram before there is a
//! packet.

use breaker_common::{Address as _, LimitAction, PROTO_TCP, Switch, connection_state, hash, switch_flags};

use crate::{
    family::V6,
    limit::{Request, connection_table, refusing_limit, settings},
};

/// A socket's connection or datagram that asks its service's limits for admission.
pub(super) struct SocketRequest {
    pub(super) service: u32,
    pub(super) switch: u64,
    pub(super) cookie: u64,
    /// Folded to 64 bits: see [`breaker_common::Address::folded`].
    pub(super) vip: u64,
    pub(super) port: [u8; 2],
    pub(super) proto: u8,
}

/// Decision of the limits.
pub(super) enum Over {
    /// Admitted.
    No,
    /// Over a limit of this tier.
    Refused(u32),
}

/// Asks the limits of a tier for admission, and counts the request if it is over a limit. In a dry run nothing is
/// refused.
#[inline(always)]
pub(super) fn ask(request: &SocketRequest, backup: bool) -> Over {
    let tier = if backup { settings::BACKUP } else { settings::PRIMARY };
    let tcp = request.proto == PROTO_TCP;
    let question = Request {
        // A TCP connection's tag depends on the socket alone, because that is all that is known when the socket is
        // closed.
        tag: if tcp { tag_of(request.cookie) } else { tag_of_flow(request) },
        // All processes in the host network namespace count as one client.
        client: V6::ZERO,
        service: request.service,
        switch: request.switch,
        tier,
        sequence: 0,
        bits: connection_state::SOCKET | if tcp { 0 } else { connection_state::DATAGRAMS },
    };
    let Some(kind) = refusing_limit(question.admit()) else { return Over::No };
    let dry_run = Switch::from_word(request.switch).has(switch_flags::DRY_RUN);
    settings::count(request.service, |c| {
        settings::counter_of(if dry_run { &mut c.dry_run } else { &mut c.limited }, tier, kind)
    });
    if dry_run { Over::No } else { Over::Refused(tier) }
}

/// Returns whether the backup admitted this flow of datagrams.
#[inline(always)]
pub(super) fn is_at_backup(request: &SocketRequest) -> bool {
    let entry = connection_table::find(tag_of_flow(request), true);
    entry.is_some_and(|entry| entry.is_of(request.service * 2 + settings::BACKUP))
}

/// Tag of a socket's flow of datagrams to one address and port.
#[inline(always)]
fn tag_of_flow(request: &SocketRequest) -> u64 {
    let rest = (u16::from_ne_bytes(request.port) as u64) << 16 | request.proto as u64;
    hash::tag(request.cookie, request.vip, rest, 0)
}

/// Returns whether connections over the primary's limits go to the backup (`onLimit: Failover`).
#[inline(always)]
pub(super) fn fails_over(service: u32) -> bool {
    settings::limits_of(service).is_some_and(|limits| limits.tiers[0].action == LimitAction::Failover as u32)
}

/// Tag of a socket's TCP connection.
#[inline(always)]
pub(super) fn tag_of(cookie: u64) -> u64 {
    hash::tag(cookie, 0, PROTO_TCP as u64, 0)
}
