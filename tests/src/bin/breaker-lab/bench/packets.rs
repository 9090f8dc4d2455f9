//! Nanoseconds a packet spends in the program (BPF_PROG_TEST_RUN), the cost of an empty one behind the same wrapper
//! taken off.

use anyhow::{Context as _, Result};
use aya::{
    Ebpf, TestRun as _,
    maps::{Array, MapData, ProgramArray},
    programs::{SchedClassifier, TestRunOptions},
};
use breaker_common::BreakerState::{Closed, Open};
use breaker_tests::packets::{
    Rig, Segment,
    flags::{ACK, SYN},
    plan, plan_with, pod, service, vip,
};

use super::{Row, median, spread};

static FOREIGN: &[u8] = aya::include_bytes_aligned!(env!("FOREIGN_OBJECT"));

const PAIRS: usize = 21;
const REPEAT: u32 = 100_000;
const MANY: u32 = 65_536;

/// As the wrapper's map has it.
#[derive(Clone, Copy)]
#[repr(C)]
struct Template {
    ends: [u8; 12],
    flags: u8,
    pad: [u8; 3],
    flows: u32,
    next: u32,
}

#[expect(unsafe_code, reason = "aya::Pod is an unsafe trait")]
// SAFETY: integers only, no padding.
unsafe impl aya::Pod for Template {}

struct Bench {
    rig: Rig,
    foreign: Ebpf,
    measured: ProgramArray<MapData>,
    template: Array<MapData, Template>,
}

pub(super) fn rows() -> Result<Vec<Row>> {
    let mut bench = Bench::new()?;
    let plain = service("dummy", vip(10), &[pod(3, 80)], "")?;
    let closed = plan_with(&plain, Closed, 1, 1000, false, &plain.backups[0].backends);
    let client = |destination, flags| Segment::new(pod(4, 1024), destination, flags);
    let mut rows = Vec::new();
    bench.rig.apply(&closed)?;
    rows.push(bench.row("no service", &client(pod(9, 9), ACK), 1, "≤ 40")?);
    rows.push(bench.row("closed", &client(vip(10), ACK), 1, "≤ 60")?);
    bench.rig.apply(&plan(&plain, Open, 2))?;
    for (flows, established, new) in [
        (1, "open established, 1 flow", "open new, 1 flow"),
        (MANY, "open established, 64k flows", "open new, 64k flows"),
    ] {
        bench.pin(&client(vip(10), SYN), flows)?;
        rows.push(bench.row(established, &client(vip(10), ACK), flows, if flows == 1 { "≤ 100" } else { "" })?);
        rows.push(bench.row(new, &client(vip(10), SYN), flows, "")?);
    }
    Ok(rows)
}

impl Bench {
    fn new() -> Result<Self> {
        let rig = Rig::with_flows(2 * MANY)?;
        let mut foreign = Ebpf::load(FOREIGN).context("load the wrapper")?;
        for name in ["wrap", "empty"] {
            let program: &mut SchedClassifier = foreign.program_mut(name).context(name)?.try_into()?;
            program.load()?;
        }
        let measured = foreign.take_map("MEASURED").context("MEASURED")?.try_into()?;
        let template = foreign.take_map("TEMPLATE").context("TEMPLATE")?.try_into()?;
        Ok(Self { rig, foreign, measured, template })
    }

    fn prepare(&mut self, segment: &Segment, flows: u32) -> Result<()> {
        let mut ends = [0; 12];
        ends[..4].copy_from_slice(&segment.source.ip().octets());
        ends[4..8].copy_from_slice(&segment.destination.ip().octets());
        ends[8..10].copy_from_slice(&segment.source.port().to_be_bytes());
        ends[10..].copy_from_slice(&segment.destination.port().to_be_bytes());
        Ok(self.template.set(0, Template { ends, flags: segment.flags, pad: [0; 3], flows, next: 0 }, 0)?)
    }

    /// Nanoseconds per packet through the wrapper, and ours or nothing behind it.
    fn time(&mut self, ours: bool, packet: &[u8], repeat: u32) -> Result<f64> {
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

    /// Decides every flow once.
    fn pin(&mut self, syn: &Segment, flows: u32) -> Result<()> {
        self.prepare(syn, flows)?;
        self.time(true, &syn.bytes(), flows.max(2)).map(drop)
    }

    fn row(&mut self, name: &str, segment: &Segment, flows: u32, aim: &'static str) -> Result<Row> {
        self.prepare(segment, flows)?;
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
