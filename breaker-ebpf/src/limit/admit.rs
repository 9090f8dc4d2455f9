//! The decision about one new connection. It is charged to all limits of its tier or to none of them.

use breaker_common::{
    LimitKind, PassReason, ServiceLimits, TierLimits, connection_state,
    gcra::{self, Word as _},
};

use super::{
    ADMITTED, OVER, REPEATED, UnpackedRequest, client_table, connection_table,
    limiter::{
        Arrival, CONTENDED, Owner, REFUSED, breaker_count, breaker_rate, full_count_refuses, give_back, state_of,
    },
    settings::{self, tier_limits},
};
use crate::{agent, atomic, count};

/// Decides whether the limits of a connection's tier admit it, and remembers an admitted connection. Returns
/// [`ADMITTED`], [`REPEATED`], or [`OVER`] plus the number of the limit that refuses it.
#[inline(always)]
pub fn admit(request: &UnpackedRequest, limits: &ServiceLimits) -> u32 {
    let limit = tier_limits(limits, request.tier);
    let index = request.service * 2 + request.tier;
    let counts = limit.counts_connections();
    if let Some(entry) = connection_table::find(
        request.tag,
        limits.tiers[0].counts_connections() || limits.tiers[1].counts_connections(),
    ) {
        if entry.is_same_connection(request, index) {
            entry.touch(agent::tick(request.now_ns));
            settings::count(request.service, |c| &mut c.repeated);
            return REPEATED;
        }
        // The client reuses its port: the earlier connection has ended, or now belongs to the other tier.
        entry.release();
    }
    if !limit.any() {
        return ADMITTED;
    }
    let client = if limit.has_client_limits() {
        client_table::entry(client_table::tag(request.client, index, limits.hash_key), request.now_ns)
    } else {
        0
    };
    let mut contended = false;
    if let Err(kind) = take_all(request, limit, index, client, &mut contended) {
        return OVER + kind as u32;
    }
    let bits = if counts { request.bits | connection_state::COUNTED } else { request.bits };
    let remembered =
        connection_table::insert(request.tag, index, request.sequence, bits, client, agent::tick(request.now_ns));
    if !remembered && counts {
        connection_table::count_down(index, client);
    }
    let untracked = !remembered || limit.has_client_limits() && client == 0;
    if untracked {
        settings::count(request.service, |c| &mut c.untracked);
        count::reason(PassReason::LimitTableFull);
    }
    if contended {
        settings::count(request.service, |c| &mut c.contended);
    }
    ADMITTED
}

/// Takes one connection from every limit. If one limit refuses, nothing is taken from any, and the error names that
/// limit.
#[inline(always)]
fn take_all(
    request: &UnpackedRequest,
    limit: &TierLimits,
    limiter_index: u32,
    client_number: u32,
    contended: &mut bool,
) -> Result<(), LimitKind> {
    let Some((arrival, concurrent)) = state_of(Owner::Limiter(limiter_index).word()) else { return Ok(()) };
    let client = client_table::at(client_number);
    let now = request.now_ns;

    // First check all limits without taking anything, so that a refusal by one of them changes no other.
    let over = |at: &Arrival, interval: u64, tolerance: u64| {
        interval != 0 && gcra::next(at.load(), now, interval, tolerance).is_none()
    };
    let full = |at: *mut u32, most: u32| {
        // SAFETY: the pointers are to aligned 4-byte fields of map values.
        most != 0 && unsafe { atomic::load32(at) } >= most && full_count_refuses(request.holds)
    };
    if let Some(client) = client {
        if over(&Arrival(client_table::arrival(client)), limit.client_interval_ns, limit.client_tolerance_ns) {
            return Err(LimitKind::ClientNewConnections);
        }
        if full(client_table::concurrent(client), limit.client_concurrent) {
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
        let counted = breaker_count(of_client.word(), limit.client_concurrent as u64, request.holds as u64);
        if counted == REFUSED {
            refused = Some(LimitKind::ClientConcurrent);
        }
        *contended |= counted == CONTENDED;
    }
    if refused.is_none() {
        let counted = breaker_count(of_limiter.word(), limit.concurrent as u64, request.holds as u64);
        if counted == REFUSED {
            client_table::count_down(client_number);
            refused = Some(LimitKind::Concurrent);
        }
        *contended |= counted == CONTENDED;
    }
    let Some(kind) = refused else { return Ok(()) };
    give_back(of_client, client_after, limit.client_interval_ns);
    give_back(of_limiter, after, limit.interval_ns);
    Err(kind)
}
