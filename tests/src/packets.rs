//! Packets, built and read by etherparse, independently of our own code; and the programs to put them through
//! (BPF_PROG_TEST_RUN).

use std::net::{Ipv4Addr, SocketAddrV4};

use anyhow::{Context as _, Result, ensure};
use aya::{
    TestRun as _,
    programs::{SchedClassifier, TestRunOptions},
};
use breaker_agent::{
    config,
    datapath::{
        Datapath as _,
        kernel::{KernelDatapath, PinDir, load},
        plan::{Decision, ServicePlan},
    },
    model::{Backend, Override, Service},
};
use breaker_common::{BreakerState, StateReason};
use etherparse::{EtherType, Ethernet2Header, IpNumber, Ipv4Header, Ipv4Options, TcpHeader, TcpOptions};

use crate::lab::world::World;

/// TCP flags, as in byte 13.
pub mod flags {
    #![allow(missing_docs, reason = "RFC 9293, section 3.1")]
    pub const FIN: u8 = 0x01;
    pub const SYN: u8 = 0x02;
    pub const RST: u8 = 0x04;
    pub const PSH: u8 = 0x08;
    pub const ACK: u8 = 0x10;
}

/// What to do with a packet: `TC_ACT_UNSPEC`, which is also `TCX_NEXT`.
pub const NEXT: u32 = u32::MAX;
/// `TC_ACT_REDIRECT`.
pub const REDIRECT: u32 = 7;

/// A TCP segment in an Ethernet frame.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Segment {
    /// From.
    pub source: SocketAddrV4,
    /// To.
    pub destination: SocketAddrV4,
    /// Bits of [`flags`].
    pub flags: u8,
    /// Sequence number.
    pub sequence: u32,
    /// Acknowledgment number.
    pub acknowledgment: u32,
    /// Payload.
    pub payload: Vec<u8>,
    /// IP options, a multiple of four bytes.
    pub ip_options: Vec<u8>,
    /// TCP options, a multiple of four bytes.
    pub tcp_options: Vec<u8>,
    /// Sender's and receiver's MAC addresses.
    pub macs: ([u8; 6], [u8; 6]),
}

/// Client's side of a veth, and the bridge's.
pub const MACS: ([u8; 6], [u8; 6]) = ([2, 0, 0, 0, 0, 4], [2, 0, 0, 0, 0, 1]);

impl Segment {
    /// A segment without payload and options.
    #[must_use]
    pub const fn new(source: SocketAddrV4, destination: SocketAddrV4, flags: u8) -> Self {
        Self {
            source,
            destination,
            flags,
            sequence: 1_000_000,
            acknowledgment: 0,
            payload: Vec::new(),
            ip_options: Vec::new(),
            tcp_options: Vec::new(),
            macs: MACS,
        }
    }

    /// With a payload and numbers.
    #[must_use]
    pub fn data(self, sequence: u32, acknowledgment: u32, payload: &[u8]) -> Self {
        Self { sequence, acknowledgment, payload: payload.to_vec(), ..self }
    }

    /// As bytes, checksums and all.
    #[must_use]
    pub fn bytes(&self) -> Vec<u8> {
        let mut tcp = TcpHeader::new(self.source.port(), self.destination.port(), self.sequence, 64_240);
        tcp.acknowledgment_number = self.acknowledgment;
        let has = |bit: u8| self.flags & bit != 0;
        (tcp.fin, tcp.syn, tcp.rst, tcp.psh) = (has(1), has(2), has(4), has(8));
        (tcp.ack, tcp.urg, tcp.ece, tcp.cwr) = (has(16), has(32), has(64), has(128));
        tcp.options = TcpOptions::try_from_slice(&self.tcp_options).unwrap_or_default();
        let length = u16::try_from(tcp.header_len() + self.payload.len()).unwrap_or(u16::MAX);
        let (source, destination) = (self.source.ip().octets(), self.destination.ip().octets());
        let mut ip = Ipv4Header::new(length, 64, IpNumber::TCP, source, destination).unwrap_or_default();
        ip.options = Ipv4Options::try_from(&*self.ip_options).unwrap_or_default();
        let _ = ip.set_payload_len(usize::from(length));
        ip.dont_fragment = true;
        ip.identification = 4711;
        ip.header_checksum = ip.calc_header_checksum();
        tcp.checksum = tcp.calc_checksum_ipv4(&ip, &self.payload).unwrap_or(0);
        let eth = Ethernet2Header { source: self.macs.0, destination: self.macs.1, ether_type: EtherType::IPV4 };
        // Writing to a Vec does not fail.
        let mut bytes = Vec::new();
        let _ = eth.write(&mut bytes);
        let _ = ip.write_raw(&mut bytes);
        let _ = tcp.write(&mut bytes);
        bytes.extend_from_slice(&self.payload);
        bytes
    }

    /// Reads a frame, and checks both checksums by computing them anew.
    ///
    /// # Errors
    /// Not a TCP segment, or a wrong checksum.
    pub fn read(bytes: &[u8]) -> Result<Self> {
        let (eth, rest) = Ethernet2Header::from_slice(bytes).context("Ethernet")?;
        let (ip, rest) = Ipv4Header::from_slice(rest).context("IPv4")?;
        ensure!(ip.header_checksum == ip.calc_header_checksum(), "the IP checksum is wrong: {ip:?}");
        let length = ip.payload_len().context("the total length is too short")?;
        ensure!(rest.len() == usize::from(length), "{} bytes after the IP header, which says {length}", rest.len());
        let (tcp, payload) = TcpHeader::from_slice(rest).context("TCP")?;
        let expected = tcp.calc_checksum_ipv4(&ip, payload).context("checksum")?;
        ensure!(tcp.checksum == expected, "the TCP checksum is {:#06x} instead of {expected:#06x}", tcp.checksum);
        Ok(Self {
            source: SocketAddrV4::new(ip.source.into(), tcp.source_port),
            destination: SocketAddrV4::new(ip.destination.into(), tcp.destination_port),
            flags: bytes[14 + ip.header_len() + 13],
            sequence: tcp.sequence_number,
            acknowledgment: tcp.acknowledgment_number,
            payload: payload.to_vec(),
            ip_options: ip.options.to_vec(),
            tcp_options: tcp.options.to_vec(),
            macs: (eth.source, eth.destination),
        })
    }
}

/// What became of a packet.
#[derive(Clone, Debug)]
pub struct Ran {
    /// The action.
    pub action: u32,
    /// The packet as it left.
    pub bytes: Vec<u8>,
    /// Its mark.
    pub mark: u32,
}

/// The programs and their maps, on a BPF file system of their own.
#[derive(Debug)]
pub struct Rig {
    /// The datapath, to be told plans.
    pub datapath: KernelDatapath,
    programs: aya::Ebpf,
    _pins: PinDir,
    _world: World,
}

/// Offset of `mark` in `struct __sk_buff`.
const SKB_MARK: usize = 8;
const SKB_SIZE: usize = 192;

impl Rig {
    /// Loads the programs.
    ///
    /// # Errors
    /// No root, or what the kernel said.
    pub fn new() -> Result<Self> {
        Self::with_flows(breaker_common::DEFAULT_MAX_FLOWS)
    }

    /// Loads the programs, with flow tables of a size.
    ///
    /// # Errors
    /// As for [`Rig::new`].
    pub fn with_flows(max_flows: u32) -> Result<Self> {
        let world = World::new(0)?;
        let pins = PinDir::open(&world.bpffs().join("rig"))?;
        let loaded = load(&pins, max_flows, breaker_common::DEFAULT_MASQUERADE_MARK, None)?;
        let mut datapath = KernelDatapath::new(loaded.maps);
        datapath.beat(std::time::Duration::ZERO, 0);
        Ok(Self { datapath, programs: loaded.programs, _pins: pins, _world: world })
    }

    /// Puts a packet through a program.
    ///
    /// # Errors
    /// What the kernel said.
    pub fn run(&mut self, program: &str, packet: &[u8]) -> Result<Ran> {
        self.repeat(program, packet, 1).map(|(ran, _)| ran)
    }

    /// Puts a packet through a program many times; also tells how long one time took, nanoseconds.
    ///
    /// # Errors
    /// What the kernel said.
    pub fn repeat(&mut self, program: &str, packet: &[u8], times: u32) -> Result<(Ran, u128)> {
        let program: &SchedClassifier = self.programs.program(program).context("program")?.try_into()?;
        let mut out = vec![0; packet.len() + 256];
        let mut context = vec![0; SKB_SIZE];
        let result = program.test_run(TestRunOptions {
            data_in: Some(packet),
            data_out: Some(&mut out),
            ctx_out: Some(&mut context),
            repeat: times,
            ..TestRunOptions::new()
        })?;
        out.truncate(result.data_size_out as usize);
        let mark = <[u8; 4]>::try_from(&context[SKB_MARK..SKB_MARK + 4]).map_or(0, u32::from_ne_bytes);
        Ok((Ran { action: result.return_value, bytes: out, mark }, result.duration.as_nanos()))
    }

    /// The program itself.
    ///
    /// # Errors
    /// No such program.
    pub fn program(&self, name: &str) -> Result<&SchedClassifier> {
        Ok(self.programs.program(name).context("program")?.try_into()?)
    }

    /// What a pod sends.
    ///
    /// # Errors
    /// What the kernel said.
    pub fn from_pod(&mut self, segment: &Segment) -> Result<Ran> {
        self.run("breaker_in", &segment.bytes())
    }

    /// What a pod gets.
    ///
    /// # Errors
    /// What the kernel said.
    pub fn to_pod(&mut self, segment: &Segment) -> Result<Ran> {
        self.run("breaker_out", &segment.bytes())
    }

    /// Puts a plan into force.
    ///
    /// # Errors
    /// What the kernel said.
    pub fn apply(&mut self, plan: &ServicePlan) -> Result<()> {
        Ok(self.datapath.apply(plan)?)
    }
}

/// A service of the rig: `extra` goes into its configuration.
///
/// # Errors
/// A configuration that is wrong.
pub fn service(name: &str, vip: SocketAddrV4, backups: &[SocketAddrV4], extra: &str) -> Result<Service> {
    let backends: Vec<String> =
        backups.iter().map(|b| format!("{{address: {}, port: {}}}", b.ip(), b.port())).collect();
    let text = format!(
        "services: [{{name: {name}, frontends: [{{address: {}, port: {}}}], {extra} primary: {{backends: []}}, \
         backups: [{{backends: [{}]}}]}}]",
        vip.ip(),
        vip.port(),
        backends.join(", ")
    );
    let parsed = config::parse(std::path::Path::new("rig"), &text);
    let mut config = parsed.map_err(|errors| anyhow::anyhow!("{errors:?}"))?;
    config.services.pop().context("a service")
}

/// A plan for a service in a state.
#[must_use]
pub fn plan(service: &Service, state: BreakerState, epoch: u32) -> ServicePlan {
    let backup = service.backups[0].backends.clone();
    plan_with(service, state, epoch, if state == BreakerState::Closed { 1000 } else { 0 }, true, &backup)
}

/// A plan with everything said.
#[must_use]
pub fn plan_with(
    service: &Service,
    state: BreakerState,
    epoch: u32,
    share: u16,
    draining: bool,
    backup: &[Backend],
) -> ServicePlan {
    let decision = Decision {
        state,
        share,
        epoch,
        reason: StateReason::Operator,
        since_unix_ns: 1,
        trips: 0,
        override_: (Override::Auto, 0),
        draining,
    };
    ServicePlan::new(service, decision, backup)
}

/// An address of the rig's pods: 10.42.0.`host`.
#[must_use]
pub const fn pod(host: u8, port: u16) -> SocketAddrV4 {
    SocketAddrV4::new(Ipv4Addr::new(10, 42, 0, host), port)
}

/// A VIP of the rig: 10.43.0.`host`:8080.
#[must_use]
pub const fn vip(host: u8) -> SocketAddrV4 {
    SocketAddrV4::new(Ipv4Addr::new(10, 43, 0, host), 8080)
}
