//! Limits on the tc hooks: admits or refuses the first packet of a flow, and records the segments that start and end
//! counted connections.
//!
//! For a service that is closed and idle (no tracked flows) and has limits, SYNs and all datagrams ask for admission
//! here. If it counts connections, its FIN and RST segments are recorded too. Its data packets pass at the
//! prefilter.

use aya_ebpf::bindings::TC_ACT_SHOT;
use breaker_common::{
    BreakerState, EventKind, FlowKey, LimitAction, PROTO_TCP, PassReason, Reverse, SLOT_PASSTHROUGH, SLOT_REJECT,
    ServiceLimits, Switch, connection_state, hash, limit_flags, switch_flags,
};

use super::context::PacketContext;
use crate::{
    count, endpoint, event,
    family::{Family, V6},
    flow,
    limit::{
        self, Request, connection_table, limiter,
        settings::{self, BACKUP, PRIMARY},
    },
    parse::{Segment, flags},
    return_path, select, service, syns,
    verdict::{self, Stage, Verdict},
};

/// Asks whether a limit admits the first packet of a flow to the tier that was selected for it (`context.slot`). A BPF
/// subprogram (not inlined), because of the stack limit: see [`super::from_client`].
#[inline(never)]
pub fn admit<A: Family>(segment: &Segment<A>, context: &mut PacketContext<A>, to_backup: bool) -> i32 {
    verdict::into_action(try_admit(segment, context, to_backup))
}

#[inline(always)]
fn try_admit<A: Family>(
    segment: &Segment<A>,
    context: &mut PacketContext<A>,
    to_backup: bool,
) -> Result<Verdict, PassReason> {
    let service = context.service;
    let switch = Switch::from_word(context.switch);
    let limits = settings::limits_of(service).ok_or(PassReason::UnknownService)?;
    let key = flow::key(segment);
    let tier = if to_backup || context.slot != SLOT_PASSTHROUGH { BACKUP } else { PRIMARY };
    let request = Request {
        tag: tag(&key, limits),
        client: client(key.client, limits),
        service,
        switch: context.switch,
        tier,
        sequence: u32::from_ne_bytes(segment.sequence),
        bits: if segment.is_tcp() { 0 } else { connection_state::DATAGRAMS },
    };
    let answer = request.admit();
    let dry_run = switch.has(switch_flags::DRY_RUN);
    let Some(kind) = limit::refusing_limit(answer) else {
        if needs_no_flow(context, &switch) {
            // A datagram of a flow that was admitted before is not a new connection.
            if segment.is_tcp() || answer != limit::REPEATED {
                count::service(service, |c| &mut c.new_primary);
            }
            if segment.is_tcp() {
                syns::note(&key);
            }
            return Ok(Verdict::Next);
        }
        return Ok(Verdict::Continue(Stage::Apply));
    };
    if dry_run {
        settings::count(service, |c| settings::counter_of(&mut c.dry_run, tier, kind));
        return Ok(Verdict::Continue(Stage::Apply));
    }
    let action = settings::tier_limits(limits, tier).action;
    settings::count(service, |c| settings::counter_of(&mut c.limited, tier, kind));
    if context.permit != 0 {
        service::return_permit(service, switch.epoch);
        context.permit = 0;
    }
    if tier == PRIMARY && action == LimitAction::Failover as u32 && !return_path::is_suspended(context.ingress, service)
    {
        let slot = select::backup_slot(service, context.route, &switch, &key);
        if slot < SLOT_REJECT {
            context.slot = slot;
            settings::count(service, |c| &mut c.failed_over);
            limiter::mark_overflowed(service);
            endpoint::set_all_packets_bit(key.vip, key.vip_port, key.proto);
            return Ok(Verdict::Continue(Stage::AdmitToBackup));
        }
    }
    if action == LimitAction::Drop as u32 {
        return Ok(Verdict::Final(TC_ACT_SHOT));
    }
    Ok(Verdict::Continue(Stage::Refuse))
}

/// Handles a packet for a service that is closed and idle (no tracked flows) and has limits. A packet that cannot
/// start a flow passes.
#[inline(always)]
pub fn admit_to_idle_service<A: Family>(
    segment: &Segment<A>,
    context: &mut PacketContext<A>,
    switch: &Switch<u8>,
) -> Verdict {
    if !segment.may_start_flow() {
        return Verdict::Next;
    }
    if segment.is_tcp() && service::record_epoch(context.service, switch.epoch) {
        event::send(EventKind::StateAdopted, context.service, switch, &flow::key(segment), None);
    }
    context.slot = SLOT_PASSTHROUGH;
    Verdict::Continue(Stage::Admit)
}

/// Returns whether the connection goes to kube-proxy and needs no flow entry, because the service is closed and idle.
#[inline(always)]
fn needs_no_flow<A>(context: &PacketContext<A>, switch: &Switch<u8>) -> bool {
    context.slot == SLOT_PASSTHROUGH
        && switch.state == BreakerState::Closed as u8
        && !switch.has(switch_flags::TRACK)
        && !switch.has(switch_flags::DRY_RUN)
}

/// Tag of the connection with a flow key.
#[inline(always)]
fn tag<A: Family>(key: &FlowKey<A>, limits: &ServiceLimits) -> u64 {
    let ports = u32::from_ne_bytes([key.client_port[0], key.client_port[1], key.vip_port[0], key.vip_port[1]]);
    let rest = ((ports as u64) << 32) | key.proto as u64;
    hash::tag(key.client.folded(), key.vip.folded(), rest, limits.hash_key)
}

/// The client as limits identify it: an IPv4-mapped address, or the IPv6 address under the service's mask.
#[inline(always)]
fn client<A: Family>(addr: A, limits: &ServiceLimits) -> V6 {
    addr.client(V6::from_bytes(limits.client_mask.bytes))
}

/// Records a segment of a client: FIN and RST always, and during a census every segment. A BPF subprogram (not
/// inlined).
#[inline(never)]
pub fn record_client_segment<A: Family>(segment: &Segment<A>, service: u32) {
    let Some(limits) = settings::limits_of(service) else { return };
    let census = limits.flags & limit_flags::CENSUS != 0;
    if !segment.is_fin_or_rst() && !census {
        return;
    }
    let tag = tag(&flow::key(segment), limits);
    let bit = if segment.flags & flags::FIN != 0 { connection_state::CLIENT_FIN } else { 0 };
    connection_table::record(tag, bit, segment.is_rst());
}

/// Records a segment of a server whose source is the frontend's address, because kube-proxy has already translated
/// it back. A BPF subprogram (not inlined).
#[inline(never)]
pub fn record_server_segment<A: Family>(segment: &Segment<A>) {
    let role = endpoint::find(segment.source, segment.ports.source, segment.proto);
    let Some(service) = role.and_then(|role| endpoint::index(role.service)) else { return };
    let key = FlowKey {
        client: segment.destination,
        vip: segment.source,
        client_port: segment.ports.destination,
        vip_port: segment.ports.source,
        proto: PROTO_TCP,
        pad: [0; 3],
    };
    record_server_segment_of(segment, service, &key);
}

/// Records a segment that one of the backup's backends sent. A BPF subprogram (not inlined).
#[inline(never)]
pub fn record_backend_segment<A: Family>(segment: &Segment<A>, reverse: &Reverse<A>) {
    let key = FlowKey {
        client: segment.destination,
        vip: reverse.vip,
        client_port: reverse.client_port,
        vip_port: reverse.vip_port,
        proto: PROTO_TCP,
        pad: [0; 3],
    };
    record_server_segment_of(segment, reverse.service, &key);
}

#[inline(always)]
fn record_server_segment_of<A: Family>(segment: &Segment<A>, service: u32, key: &FlowKey<A>) {
    if !service::switch(service).is_some_and(|switch| switch.has(switch_flags::LIMITED)) {
        return;
    }
    let Some(limits) = settings::limits_of(service) else { return };
    let fin = if segment.flags & flags::FIN != 0 { connection_state::SERVER_FIN } else { 0 };
    let bits = connection_state::ANSWERED | fin;
    connection_table::record(tag(key, limits), bits, segment.is_rst());
}
