//! Nanoseconds per packet in the program (BPF_PROG_TEST_RUN). The cost of an empty program behind the same wrapper is
//! subtracted.

use std::net::{IpAddr, SocketAddr};

use anyhow::{Context as _, Result};
use aya::{
    Ebpf, TestRun as _,
    maps::{MapData, PerCpuArray, PerCpuValues, ProgramArray},
    programs::{SchedClassifier, TestRunOptions},
    util::nr_cpus,
};
use breaker_agent::datapath::sizes::Sizes;
use breaker_common::BreakerState::{Closed, Open};
use breaker_tests::packets::{
    Segment, TestRig,
    flags::{ACK, SYN},
    plan, plan_with, pod, pod6, service, vip, vip6,
};

use super::{Row, median, spread};

static THIRD_PARTY: &[u8] = aya::include_bytes_aligned!(env!("THIRD_PARTY_OBJECT"));

const PAIRS: usize = 21;
pub(super) const REPEAT: u32 = 100_000;
const MANY: u32 = 65_536;

/// Value of the wrapper's map `TEMPLATE`; has the layout of `Template` in tests/third-party/src/main.rs.
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
// SAFETY: the struct has only integers and no padding, so any bytes are a value.
unsafe impl aya::Pod for Template {}

/// Bit of `vary`: every packet has another TCP sequence number, so that every SYN is a new connection.
pub(super) const NEW: u8 = 1;
/// Bit of `vary`: every flow has another client address.
pub(super) const CLIENTS: u8 = 2;

/// The programs, and the wrapper that sends packets through them.
pub(super) struct Bench {
    /// The programs and their maps.
    pub rig: TestRig,
    third_party: Ebpf,
    measured: ProgramArray<MapData>,
    template: PerCpuArray<MapData, Template>,
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

    /// Loads the programs, with maps of these sizes.
    pub(super) fn with_sizes(sizes: &Sizes) -> Result<Self> {
        let rig = TestRig::with_sizes(sizes)?;
        let mut third_party = Ebpf::load(THIRD_PARTY).context("load the wrapper")?;
        for name in ["wrap", "empty"] {
            let program: &mut SchedClassifier = third_party.program_mut(name).context(name)?.try_into()?;
            program.load()?;
        }
        let measured = third_party.take_map("MEASURED").context("the wrapper has no map MEASURED")?.try_into()?;
        let template = third_party.take_map("TEMPLATE").context("the wrapper has no map TEMPLATE")?.try_into()?;
        Ok(Self { rig, third_party, measured, template })
    }

    /// The rows of one IP family.
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

    /// Makes the wrapper rewrite each packet to the next of `flows` flows that resemble `segment`. `flows` is a power
    /// of two, at most 2^17. `vary`: bits [`NEW`] and [`CLIENTS`].
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
        let template = Template { ends, flags: segment.flags, version, vary, pad: 0, flows, next: 0 };
        let cpus = nr_cpus().map_err(|(file, error)| anyhow::Error::new(error).context(file))?;
        Ok(self.template.set(0, PerCpuValues::try_from(vec![template; cpus])?, 0)?)
    }

    /// Nanoseconds per packet in the wrapper and the program behind it: `breaker_in` if `ours`, else the empty program.
    pub(super) fn time(&mut self, ours: bool, packet: &[u8], repeat: u32) -> Result<f64> {
        self.choose(ours.then_some("breaker_in"))?;
        run(self.wrapper()?, packet, repeat)
    }

    /// Puts a program behind the wrapper: one of breaker's, or the empty one.
    pub(super) fn choose(&mut self, ours: Option<&str>) -> Result<()> {
        let program: &SchedClassifier = match ours {
            Some(name) => self.rig.program(name)?,
            None => self.third_party.program("empty").context("no program named empty")?.try_into()?,
        };
        Ok(self.measured.set(0, program.fd()?, 0)?)
    }

    /// The wrapper.
    pub(super) fn wrapper(&self) -> Result<&SchedClassifier> {
        Ok(self.third_party.program("wrap").context("no program named wrap")?.try_into()?)
    }

    /// Opens all flows that the wrapper cycles through and has the backup answer them, so that they are promoted to the
    /// established tables.
    pub(super) fn establish(
        &mut self,
        client: SocketAddr,
        vip: SocketAddr,
        backup: SocketAddr,
        flows: u32,
    ) -> Result<()> {
        // One after the other: the table of flows without an answer holds fewer than that.
        for flow in 0..flows {
            let mut ip = client.ip();
            let part = u8::try_from(flow >> 15).unwrap_or(u8::MAX);
            match &mut ip {
                IpAddr::V4(ip) => *ip = (u32::from(*ip) + u32::from(part)).into(),
                IpAddr::V6(ip) => *ip = (u128::from(*ip) + u128::from(part)).into(),
            }
            let client = SocketAddr::new(ip, 1024 + u16::try_from(flow & 0x7fff).unwrap_or(0));
            self.rig.from_pod(&Segment::new(client, vip, SYN))?;
            self.rig.to_pod(&Segment::new(backup, client, SYN | ACK))?;
            self.rig.from_pod(&Segment::new(client, vip, ACK))?;
        }
        Ok(())
    }

    fn row(&mut self, name: &str, segment: &Segment, flows: u32, aim: &'static str) -> Result<Row> {
        // Every SYN is a new connection. A repeated one that has no answer would be a case of its own.
        self.prepare(segment, flows, if segment.flags == SYN { NEW } else { 0 })?;
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

/// Nanoseconds per packet in the wrapper and the program behind it, on the CPU of the calling thread.
pub(super) fn run(wrapper: &SchedClassifier, packet: &[u8], repeat: u32) -> Result<f64> {
    let result = wrapper.test_run(TestRunOptions { data_in: Some(packet), repeat, ..TestRunOptions::new() })?;
    Ok(result.duration.as_secs_f64() * 1e9)
}
