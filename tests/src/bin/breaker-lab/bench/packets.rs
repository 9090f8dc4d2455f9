//! Nanoseconds a packet spends in the program (BPF_PROG_TEST_RUN), the cost of an empty one behind the same wrapper
//! taken off.

use std::net::{IpAddr, SocketAddr};

use anyhow::{Context as _, Result};
use aya::{
    Ebpf, TestRun as _,
    maps::{Array, MapData, ProgramArray},
    programs::{SchedClassifier, TestRunOptions},
};
use breaker_agent::datapath::kernel::Sizes;
use breaker_common::BreakerState::{Closed, Open};
use breaker_tests::packets::{
    Rig, Segment,
    flags::{ACK, SYN},
    plan, plan_with, pod, pod6, service, vip, vip6,
};

use super::{Row, median, spread};

static FOREIGN: &[u8] = aya::include_bytes_aligned!(env!("FOREIGN_OBJECT"));

const PAIRS: usize = 21;
pub(super) const REPEAT: u32 = 100_000;
const MANY: u32 = 65_536;

/// As the wrapper's map has it.
#[derive(Clone, Copy)]
#[repr(C)]
struct Template {
    ends: [u8; 36],
    flags: u8,
    version: u8,
    vary: u8,
    pad: u8,
    flows: u32,
    next: u32,
}

#[expect(unsafe_code, reason = "aya::Pod is an unsafe trait")]
// SAFETY: integers only, no padding.
unsafe impl aya::Pod for Template {}

/// With another sequence number each time: a connection of its own.
pub(super) const NEW: u8 = 1;
/// Every flow has a client of its own.
pub(super) const CLIENTS: u8 = 2;

/// The programs, and what puts packets through them.
pub(super) struct Bench {
    /// The programs.
    pub rig: Rig,
    foreign: Ebpf,
    measured: ProgramArray<MapData>,
    template: Array<MapData, Template>,
}

pub(super) fn rows() -> Result<Vec<Row>> {
    let mut bench = Bench::new()?;
    let mut rows = bench.family("", pod, vip)?;
    rows.extend(bench.family(", IPv6", pod6, vip6)?);
    Ok(rows)
}

impl Bench {
    fn new() -> Result<Self> {
        Self::with_sizes(&Sizes::for_memory(1024).with_flows(4 * MANY))
    }

    /// On maps of these sizes.
    pub(super) fn with_sizes(sizes: &Sizes) -> Result<Self> {
        let rig = Rig::with_sizes(sizes)?;
        let mut foreign = Ebpf::load(FOREIGN).context("load the wrapper")?;
        for name in ["wrap", "empty"] {
            let program: &mut SchedClassifier = foreign.program_mut(name).context(name)?.try_into()?;
            program.load()?;
        }
        let measured = foreign.take_map("MEASURED").context("MEASURED")?.try_into()?;
        let template = foreign.take_map("TEMPLATE").context("TEMPLATE")?.try_into()?;
        Ok(Self { rig, foreign, measured, template })
    }

    /// One family's rows.
    fn family(
        &mut self,
        suffix: &str,
        pod: impl Fn(u8, u16) -> SocketAddr,
        vip: impl Fn(u8) -> SocketAddr,
    ) -> Result<Vec<Row>> {
        let plain = service(&format!("dummy{}", suffix.len()), vip(10), &[pod(3, 80)], "")?;
        let closed = plan_with(&plain, Closed, 1, 1000, false, &plain.backups[0].backends);
        let client = |destination, flags| Segment::new(pod(4, 1024), destination, flags);
        let mut rows = Vec::new();
        self.rig.apply(&closed)?;
        rows.push(self.row(&format!("no service{suffix}"), &client(pod(9, 9), ACK), 1, "≤ 40")?);
        rows.push(self.row(&format!("closed{suffix}"), &client(vip(10), ACK), 1, "≤ 60")?);
        self.rig.apply(&plan(&plain, Open, 2))?;
        for (flows, count, aim) in [(1, "1 flow", "≤ 100"), (MANY, "64k flows", "≤ 330")] {
            self.establish(pod(4, 1024), vip(10), pod(3, 80), flows)?;
            rows.push(self.row(&format!("open established, {count}{suffix}"), &client(vip(10), ACK), flows, aim)?);
            rows.push(self.row(&format!("open new, {count}{suffix}"), &client(vip(10), SYN), flows, "")?);
        }
        Ok(rows)
    }

    /// `vary`: see [`NEW`] and [`CLIENTS`].
    pub(super) fn prepare(&mut self, segment: &Segment, flows: u32, vary: u8) -> Result<()> {
        let octets = |ip: IpAddr| match ip {
            IpAddr::V4(ip) => ip.octets().to_vec(),
            IpAddr::V6(ip) => ip.octets().to_vec(),
        };
        let mut bytes = octets(segment.source.ip());
        bytes.extend(octets(segment.destination.ip()));
        bytes.extend(segment.source.port().to_be_bytes());
        bytes.extend(segment.destination.port().to_be_bytes());
        let mut ends = [0; 36];
        ends[..bytes.len()].copy_from_slice(&bytes);
        let version = if segment.source.is_ipv4() { 4 } else { 6 };
        Ok(self.template.set(0, Template { ends, flags: segment.flags, version, vary, pad: 0, flows, next: 0 }, 0)?)
    }

    /// Nanoseconds per packet through the wrapper, and ours or nothing behind it.
    pub(super) fn time(&mut self, ours: bool, packet: &[u8], repeat: u32) -> Result<f64> {
        let program: &SchedClassifier = if ours {
            self.rig.program("breaker_in")?
        } else {
            self.foreign.program("empty").context("empty")?.try_into()?
        };
        self.measured.set(0, program.fd()?, 0)?;
        let wrap: &SchedClassifier = self.foreign.program("wrap").context("wrap")?.try_into()?;
        let result = wrap.test_run(TestRunOptions { data_in: Some(packet), repeat, ..TestRunOptions::new() })?;
        Ok(result.duration.as_secs_f64() * 1e9)
    }

    /// Lets every flow that the wrapper takes turns with be established: what is not answered is kept apart.
    fn establish(&mut self, client: SocketAddr, vip: SocketAddr, backup: SocketAddr, flows: u32) -> Result<()> {
        self.prepare(&Segment::new(client, vip, SYN), flows, 0)?;
        self.time(true, &Segment::new(client, vip, SYN).bytes(), flows.max(2))?;
        for flow in 0..flows {
            let mut ip = client.ip();
            let part = u8::try_from(flow >> 15).unwrap_or(u8::MAX);
            match &mut ip {
                IpAddr::V4(ip) => *ip = (u32::from(*ip) + u32::from(part)).into(),
                IpAddr::V6(ip) => *ip = (u128::from(*ip) + u128::from(part)).into(),
            }
            let client = SocketAddr::new(ip, 1024 + u16::try_from(flow & 0x7fff).unwrap_or(0));
            self.rig.to_pod(&Segment::new(backup, client, SYN | ACK))?;
            self.rig.from_pod(&Segment::new(client, vip, ACK))?;
        }
        Ok(())
    }

    fn row(&mut self, name: &str, segment: &Segment, flows: u32, aim: &'static str) -> Result<Row> {
        self.prepare(segment, flows, 0)?;
        let packet = segment.bytes();
        self.time(true, &packet, REPEAT)?;
        let mut differences = Vec::new();
        for _ in 0..PAIRS {
            let ours = self.time(true, &packet, REPEAT)?;
            let empty = self.time(false, &packet, REPEAT)?;
            differences.push(ours - empty);
        }
        Ok(Row {
            name: format!("packets: {name}"),
            value: median(&differences),
            unit: "ns",
            base: "an empty program".into(),
            ratio: None,
            spread: Some(spread(&differences)),
            aim,
        })
    }
}
