//! The metrics of the node, its agent and the process.

use breaker_common::{ABI_VERSION, BreakerState, PassReason};

use super::{Instruments, Level, Snapshot, families as f, snapshot::ProcessNumbers, writer::Families};

/// Revision of the source; unknown unless the build says it.
const REVISION: Option<&str> = option_env!("BREAKER_REVISION");

pub(super) fn write(snapshot: &Snapshot, instruments: &Instruments, to: &mut Families) {
    let abi = ABI_VERSION.to_string();
    to.flag(&f::BUILD_INFO, &[env!("CARGO_PKG_VERSION"), REVISION.unwrap_or("unknown"), &abi], true);
    to.flag(&f::AGENT_READY, &[], snapshot.is_ready);
    to.flag(&f::STATUS_WRITER, &[], instruments.is_status_writer());
    to.add(&f::LEASE, &[], snapshot.lease.as_secs_f64());
    to.time(&f::HEARTBEAT, &[], snapshot.heartbeat_unix_ns);
    for (listener, up) in &snapshot.listeners {
        to.flag(&f::LISTENER_UP, &[listener], *up);
    }
    to.count(&f::PANICS, &[], snapshot.panics);
    to.count(&f::LOST_LOG_LINES, &[], snapshot.lost_log_lines);
    for (resource, synced) in instruments.synced() {
        to.flag(&f::KUBE_SYNCED, &[&resource], synced);
    }
    datapath(snapshot, to);
    to.count(&f::CHECKS_WAITING, &[], snapshot.probes.waiting);
    for (state, count) in BreakerState::ALL.iter().zip(snapshot.by_state) {
        to.count(&f::BREAKERS, &[state.label()], count);
    }
    to.flag(&f::SUMMARIZED, &[], snapshot.level == Level::Summary);
    if let Some(numbers) = &snapshot.process {
        process(numbers, to);
    }
}

fn datapath(snapshot: &Snapshot, to: &mut Families) {
    for (side, counts) in ["Pod", "Uplink"].iter().zip(&snapshot.interfaces) {
        to.count(&f::INTERFACES, &[side, "Attached"], counts.attached);
        to.count(&f::INTERFACES, &[side, "Failed"], counts.failed);
    }
    to.count(&f::SUSPENDED, &[], snapshot.suspended as u64);
    to.count(&f::RESTORED, &[], snapshot.restored);
    let info = &snapshot.datapath;
    let switch = |on: bool| if on { "On" } else { "Off" };
    let labels = [info.attach, info.xdp, switch(info.node_sockets), switch(info.masquerade_rule)];
    to.flag(&f::DATAPATH_INFO, &labels, true);
    let packets = |reason: PassReason| {
        snapshot.reasons.iter().find(|(found, _)| *found == reason).map_or(0, |(_, packets)| *packets)
    };
    // Every reason from 0 on: an alert on a counter that appears with its first event would not fire.
    for &reason in PassReason::ALL.iter().filter(|reason| **reason != PassReason::EventLost) {
        to.count(&f::FAILED_OPEN_PACKETS, &[reason.label()], packets(reason));
    }
    to.count(&f::EVENTS_LOST, &[], packets(PassReason::EventLost));
    for map in &snapshot.maps {
        to.count(&f::MAP_ENTRIES, &[map.name], map.entries);
        to.count(&f::MAP_MAX_ENTRIES, &[map.name], map.max_entries);
    }
    for (family, counts) in ["4", "6"].iter().zip(&snapshot.flows) {
        for (phase, count) in ["Pending", "Established"].iter().zip(counts) {
            to.count(&f::FLOWS, &[family, phase], *count as u64);
        }
    }
}

fn process(numbers: &ProcessNumbers, to: &mut Families) {
    to.add(&f::PROCESS_CPU, &[], numbers.usage.cpu_seconds);
    to.count(&f::PROCESS_RESIDENT, &[], numbers.usage.resident_bytes);
    to.count(&f::PROCESS_VIRTUAL, &[], numbers.virtual_bytes);
    to.count(&f::PROCESS_OPEN_FDS, &[], numbers.open_fds);
    to.count(&f::PROCESS_MAX_FDS, &[], numbers.max_fds);
    to.count(&f::PROCESS_THREADS, &[], numbers.threads);
    to.add(&f::PROCESS_START, &[], numbers.start_time);
}
