//! The record of a service in the maps, which the next agent and bpftool read.

use std::collections::BTreeSet;

use breaker_common::{NAME_LEN, ServiceRecord, Switch};
use breaker_core::{
    datapath::Adopted,
    model::{Override, ServiceName},
    plan::ServicePlan,
};

/// The record of an index without a service.
pub(crate) const EMPTY: ServiceRecord<u8> = ServiceRecord {
    name: [0; NAME_LEN],
    since_unix_ns: 0,
    override_until_unix_ns: 0,
    seed: 0,
    half_open_limit: 0,
    trips: 0,
    reason: 0,
    override_kind: 0,
    primary_accepts: 0,
    pad: 0,
};

/// The record of a service.
pub(crate) fn of(plan: &ServicePlan, index: u32) -> ServiceRecord<u8> {
    let mut name = [0; NAME_LEN];
    let bytes = plan.name.as_str().as_bytes();
    let length = bytes.len().min(NAME_LEN - 1);
    name[..length].copy_from_slice(&bytes[..length]);
    let decision = &plan.decision;
    ServiceRecord {
        name,
        since_unix_ns: decision.since_unix_ns,
        override_until_unix_ns: decision.override_.1,
        // Any number that differs between services and never changes for one service.
        seed: index.wrapping_mul(0x9e37_79b9),
        half_open_limit: plan.half_open_limit,
        trips: decision.trips,
        reason: decision.reason as u8,
        override_kind: match decision.override_.0 {
            Override::Auto => 0,
            Override::ForceOpen => 1,
            Override::ForceClosed => 2,
        },
        primary_accepts: u8::from(plan.primary_accepts),
        pad: 0,
    }
}

/// Decodes the record that an earlier agent left; `None` for a free entry, or one with unknown enum numbers.
pub(crate) fn decode(record: &ServiceRecord<u8>, switch: Switch<u8>) -> Option<Adopted> {
    let name = record.name.split(|b| *b == 0).next().filter(|name| !name.is_empty())?;
    Some(Adopted {
        name: ServiceName::new(std::str::from_utf8(name).ok()?),
        frontends: Vec::new(),
        backup: BTreeSet::new(),
        state: switch.state.try_into().ok()?,
        epoch: switch.epoch,
        share: switch.share,
        reason: record.reason.try_into().ok()?,
        since_unix_ns: record.since_unix_ns,
        trips: record.trips,
        override_: (
            match record.override_kind {
                1 => Override::ForceOpen,
                2 => Override::ForceClosed,
                _ => Override::Auto,
            },
            record.override_until_unix_ns,
        ),
    })
}
