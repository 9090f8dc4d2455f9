//! Lists the flows of one service for `breaker flows`.

use anyhow::Result;
use breaker_common::{Flow, FlowKey, FlowKind, V4, V6, flow_path, seen};
use breaker_core::datapath::{FlowPath, FlowPhase, FlowSnapshot};

use super::{
    maps::{
        Maps,
        family::{IpFamily, protocol},
    },
    sweep::{age, has_ended, reverse_of},
};
use crate::clock;

/// Returns up to `limit` flows of a service, the youngest first.
pub(super) fn list(maps: &Maps, service: u32, limit: usize) -> Result<Vec<FlowSnapshot>> {
    let mut flows = list_family::<V4>(maps, service);
    flows.extend(list_family::<V6>(maps, service));
    flows.sort_by_key(|flow| (flow.age.as_secs(), flow.client));
    flows.truncate(limit);
    Ok(flows)
}

fn list_family<A: IpFamily>(maps: &Maps, service: u32) -> Vec<FlowSnapshot> {
    let now = clock::monotonic_ns();
    let family = A::of(maps);
    let entries = family.flows.iter().chain(family.pending.iter()).flatten();
    let view = |(key, flow): (FlowKey<A>, Flow<A, u8>)| {
        let reverse = reverse_of(family, &key.reverse_key(&flow)).filter(|r| r.belongs_to(&key));
        let back = reverse.map_or(0, |r| r.seen);
        Some(FlowSnapshot {
            client: key.client.socket(key.client_port),
            frontend: key.vip.socket(key.vip_port),
            backend: flow.backend.socket(flow.backend_port),
            protocol: protocol(key.proto)?,
            source_port: u16::from_be_bytes(flow.source_port),
            kind: FlowKind::try_from(flow.kind).ok()?,
            epoch: flow.epoch,
            path: if flow.path & flow_path::FAST == 0 { FlowPath::Stack } else { FlowPath::Veth },
            age: age(now, flow.created_tick),
            phase: if has_ended(&flow, back) {
                FlowPhase::Ended
            } else if flow.kind == FlowKind::Passed as u8 {
                FlowPhase::Passed
            } else if back & seen::ANSWERED == 0 {
                FlowPhase::Unanswered
            } else if (flow.seen | back) & seen::FIN != 0 {
                FlowPhase::Closing
            } else {
                FlowPhase::Established
            },
        })
    };
    entries.filter(|(_, flow)| flow.service == service).filter_map(view).collect()
}
