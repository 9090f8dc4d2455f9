//! Builds and parses packets with etherparse, independently of the product's code, and runs the programs on them
//! (BPF_PROG_TEST_RUN).

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};

use anyhow::{Context as _, Result, ensure};
use aya::{
    TestRun as _,
    programs::{SchedClassifier, TestRunOptions, Xdp},
};
use breaker_agent::{
    config,
    datapath::{KernelDatapath, pins::PinDir, programs, sizes::Sizes},
};
use breaker_common::{BreakerState, StateReason};
use breaker_core::{
    datapath::Datapath as _,
    model::{Backend, Override, Service},
    plan::{Decision, ServicePlan},
};
use etherparse::{
    EtherType, Ethernet2Header, IpNumber, Ipv4Header, Ipv4Options, Ipv6Header, TcpHeader, TcpOptions, UdpHeader,
};

use rustix::{
    net::{AddressFamily, SocketType, netdevice::name_to_index, socket},
    process::getpid,
    thread::gettid,
};

use crate::lab::{netns::NetNs, world::World};

/// TCP flags: bits of byte 13 of the TCP header.
pub mod flags {
    #![allow(missing_docs, reason = "the names are those of RFC 9293, section 3.1")]
    pub const FIN: u8 = 0x01;
    pub const SYN: u8 = 0x02;
    pub const RST: u8 = 0x04;
    pub const PSH: u8 = 0x08;
    pub const ACK: u8 = 0x10;
}

/// Action `TC_ACT_UNSPEC`, which is also `TCX_NEXT`: the next program on the hook runs, then the host network stack.
pub const NEXT: u32 = u32::MAX;
/// Action `TC_ACT_REDIRECT`: the packet goes to another interface.
pub const REDIRECT: u32 = 7;

/// `XDP_PASS`: the packet continues to the host network stack.
pub const XDP_PASS: u32 = 2;
/// `XDP_TX`: the packet is sent back out of the interface that it arrived on.
pub const XDP_TX: u32 = 3;

/// A TCP segment in an Ethernet frame.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Segment {
    /// Source address and port.
    pub source: SocketAddr,
    /// Destination address and port.
    pub destination: SocketAddr,
    /// TCP flags: bits of [`flags`].
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
    /// MAC addresses: the sender's, the receiver's.
    pub macs: ([u8; 6], [u8; 6]),
}

/// MAC addresses of a packet that a pod sends: the pod's (sender) and the bridge's (receiver).
pub const MACS: ([u8; 6], [u8; 6]) = ([2, 0, 0, 0, 0, 4], [2, 0, 0, 0, 0, 1]);

impl Segment {
    /// Creates a segment without payload and options, with sequence number 1,000,000 and acknowledgment number 0.
    #[must_use]
    pub const fn new(source: SocketAddr, destination: SocketAddr, flags: u8) -> Self {
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

    /// Sets the sequence number, the acknowledgment number and the payload.
    #[must_use]
    pub fn data(self, sequence: u32, acknowledgment: u32, payload: &[u8]) -> Self {
        Self { sequence, acknowledgment, payload: payload.to_vec(), ..self }
    }

    /// Builds the Ethernet frame and computes all checksums.
    #[must_use]
    pub fn bytes(&self) -> Vec<u8> {
        let mut tcp = TcpHeader::new(self.source.port(), self.destination.port(), self.sequence, 64_240);
        tcp.acknowledgment_number = self.acknowledgment;
        let has = |bit: u8| self.flags & bit != 0;
        (tcp.fin, tcp.syn, tcp.rst, tcp.psh) = (has(1), has(2), has(4), has(8));
        (tcp.ack, tcp.urg, tcp.ece, tcp.cwr) = (has(16), has(32), has(64), has(128));
        tcp.options = TcpOptions::try_from_slice(&self.tcp_options).unwrap_or_default();
        let mut rest = Vec::new();
        let length = tcp.header_len() + self.payload.len();
        let ip = Ip::new(self.source, self.destination, IpNumber::TCP, length, &self.ip_options);
        tcp.checksum = match &ip {
            Ip::V4(ip) => tcp.calc_checksum_ipv4(ip, &self.payload),
            Ip::V6(ip) => tcp.calc_checksum_ipv6(ip, &self.payload),
        }
        .unwrap_or(0);
        // Writing to a Vec cannot fail.
        let _ = tcp.write(&mut rest);
        rest.extend_from_slice(&self.payload);
        ip.frame(self.macs, &rest)
    }

    /// Parses an Ethernet frame and verifies all checksums by recomputing them.
    ///
    /// # Errors
    /// Fails if the frame is not a TCP segment, or if a checksum is wrong.
    pub fn read(bytes: &[u8]) -> Result<Self> {
        let (macs, ip, rest) = Ip::read(bytes)?;
        ensure!(ip.proto() == IpNumber::TCP, "expected TCP, got {:?}", ip.proto());
        let (tcp, payload) = TcpHeader::from_slice(rest).context("parse the TCP header")?;
        let expected = match &ip {
            Ip::V4(ip) => tcp.calc_checksum_ipv4(ip, payload),
            Ip::V6(ip) => tcp.calc_checksum_ipv6(ip, payload),
        }
        .context("compute the TCP checksum")?;
        ensure!(tcp.checksum == expected, "the TCP checksum is {:#06x}, expected {expected:#06x}", tcp.checksum);
        let (source, destination) = ip.ends();
        Ok(Self {
            source: SocketAddr::new(source, tcp.source_port),
            destination: SocketAddr::new(destination, tcp.destination_port),
            flags: rest[13],
            sequence: tcp.sequence_number,
            acknowledgment: tcp.acknowledgment_number,
            payload: payload.to_vec(),
            ip_options: ip.options(),
            tcp_options: tcp.options.to_vec(),
            macs,
        })
    }
}

/// A UDP datagram in an Ethernet frame.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Datagram {
    /// Source address and port.
    pub source: SocketAddr,
    /// Destination address and port.
    pub destination: SocketAddr,
    /// Payload.
    pub payload: Vec<u8>,
    /// The UDP checksum is zero: the sender computed none, which IPv4 allows (RFC 768).
    pub unchecked: bool,
    /// MAC addresses: the sender's, the receiver's.
    pub macs: ([u8; 6], [u8; 6]),
}

impl Datagram {
    /// Creates a datagram that will have a checksum.
    #[must_use]
    pub fn new(source: SocketAddr, destination: SocketAddr, payload: &[u8]) -> Self {
        Self { source, destination, payload: payload.to_vec(), unchecked: false, macs: MACS }
    }

    /// Builds the Ethernet frame and computes all checksums; an `unchecked` datagram gets no UDP checksum.
    #[must_use]
    pub fn bytes(&self) -> Vec<u8> {
        let (source_port, destination_port) = (self.source.port(), self.destination.port());
        let length = u16::try_from(8 + self.payload.len()).unwrap_or(u16::MAX);
        let mut udp = UdpHeader { source_port, destination_port, length, checksum: 0 };
        let ip = Ip::new(self.source, self.destination, IpNumber::UDP, usize::from(length), &[]);
        if !self.unchecked {
            udp.checksum = udp_checksum(&udp, &ip, &self.payload).unwrap_or(0);
        }
        let mut rest = udp.to_bytes().to_vec();
        rest.extend_from_slice(&self.payload);
        ip.frame(self.macs, &rest)
    }

    /// Parses an Ethernet frame and verifies all checksums by recomputing them.
    ///
    /// # Errors
    /// Fails if the frame is not a UDP datagram, or if a checksum is wrong.
    pub fn read(bytes: &[u8]) -> Result<Self> {
        let (macs, ip, rest) = Ip::read(bytes)?;
        ensure!(ip.proto() == IpNumber::UDP, "expected UDP, got {:?}", ip.proto());
        let (udp, payload) = UdpHeader::from_slice(rest).context("parse the UDP header")?;
        if udp.checksum != 0 {
            let expected = udp_checksum(&udp, &ip, payload)?;
            ensure!(udp.checksum == expected, "the UDP checksum is {:#06x}, expected {expected:#06x}", udp.checksum);
        }
        let (source, destination) = ip.ends();
        Ok(Self {
            source: SocketAddr::new(source, udp.source_port),
            destination: SocketAddr::new(destination, udp.destination_port),
            payload: payload.to_vec(),
            unchecked: udp.checksum == 0,
            macs,
        })
    }
}

fn udp_checksum(udp: &UdpHeader, ip: &Ip, payload: &[u8]) -> Result<u16> {
    let sum = match ip {
        Ip::V4(ip) => udp.calc_checksum_ipv4(ip, payload),
        Ip::V6(ip) => udp.calc_checksum_ipv6(ip, payload),
    };
    sum.context("compute the UDP checksum")
}

/// Whether the ICMP message that follows an IP header has the right checksum (RFC 792; RFC 4443, section 2.3).
#[must_use]
pub fn icmp_is_valid(ip: &Ip, message: &[u8]) -> bool {
    match ip {
        Ip::V4(_) => {
            let sum = message
                .chunks(2)
                .fold(0_u32, |sum, c| sum + u32::from(u16::from_be_bytes([c[0], c.get(1).copied().unwrap_or(0)])));
            let folded = (sum & 0xffff) + (sum >> 16);
            (folded & 0xffff) + (folded >> 16) == 0xffff
        }
        Ip::V6(ip) => etherparse::Icmpv6Slice::from_slice(message)
            .is_ok_and(|icmp| icmp.is_checksum_valid(ip.source, ip.destination)),
    }
}

/// An IP header of either family.
#[derive(Clone, Debug)]
pub enum Ip {
    /// IPv4 (RFC 791).
    V4(Ipv4Header),
    /// IPv6 (RFC 8200), without extension headers.
    V6(Ipv6Header),
}

impl Ip {
    /// Creates a header for a payload of `length` bytes, with TTL or hop limit 64. The header is IPv4 if both addresses
    /// are. `options` are IPv4 options, a multiple of four bytes; an IPv6 header ignores them.
    #[must_use]
    pub fn new(source: SocketAddr, destination: SocketAddr, proto: IpNumber, length: usize, options: &[u8]) -> Self {
        let length = u16::try_from(length).unwrap_or(u16::MAX);
        match (source.ip(), destination.ip()) {
            (IpAddr::V4(source), IpAddr::V4(destination)) => {
                let ends = (source.octets(), destination.octets());
                let mut ip = Ipv4Header::new(length, 64, proto, ends.0, ends.1).unwrap_or_default();
                ip.options = Ipv4Options::try_from(options).unwrap_or_default();
                let _ = ip.set_payload_len(usize::from(length));
                ip.dont_fragment = true;
                ip.identification = 4711;
                ip.header_checksum = ip.calc_header_checksum();
                Self::V4(ip)
            }
            (source, destination) => {
                let octets = |ip: IpAddr| match ip {
                    IpAddr::V4(ip) => ip.to_ipv6_mapped().octets(),
                    IpAddr::V6(ip) => ip.octets(),
                };
                Self::V6(Ipv6Header {
                    payload_length: length,
                    next_header: proto,
                    hop_limit: 64,
                    source: octets(source),
                    destination: octets(destination),
                    ..Ipv6Header::default()
                })
            }
        }
    }

    /// Builds an Ethernet frame of this header and `rest`, the bytes that follow the header.
    #[must_use]
    pub fn frame(&self, macs: ([u8; 6], [u8; 6]), rest: &[u8]) -> Vec<u8> {
        let mut bytes = Vec::new();
        let ether_type = match self {
            Self::V4(_) => EtherType::IPV4,
            Self::V6(_) => EtherType::IPV6,
        };
        // Writing to a Vec cannot fail.
        let _ = Ethernet2Header { source: macs.0, destination: macs.1, ether_type }.write(&mut bytes);
        let _ = match self {
            Self::V4(ip) => ip.write_raw(&mut bytes),
            Self::V6(ip) => ip.write(&mut bytes),
        };
        bytes.extend_from_slice(rest);
        bytes
    }

    /// Parses a frame up to the end of its IP header, and verifies the header's checksum and length. Returns the MAC
    /// addresses, the IP header and the bytes that follow it.
    ///
    /// # Errors
    /// Fails if the frame is not an IP packet, or if a checksum or length is wrong.
    #[expect(clippy::type_complexity, reason = "three parts of a frame")]
    pub fn read(bytes: &[u8]) -> Result<(([u8; 6], [u8; 6]), Self, &[u8])> {
        let (eth, rest) = Ethernet2Header::from_slice(bytes).context("parse the Ethernet header")?;
        let (ip, rest, length) = if eth.ether_type == EtherType::IPV6 {
            let (ip, rest) = Ipv6Header::from_slice(rest).context("parse the IPv6 header")?;
            let length = ip.payload_length;
            (Self::V6(ip), rest, length)
        } else {
            let (ip, rest) = Ipv4Header::from_slice(rest).context("parse the IPv4 header")?;
            ensure!(ip.header_checksum == ip.calc_header_checksum(), "the IPv4 header checksum is wrong: {ip:?}");
            let length = ip.payload_len().context("the IPv4 total length is too short")?;
            (Self::V4(ip), rest, length)
        };
        ensure!(rest.len() == usize::from(length), "{} bytes follow the IP header, which says {length}", rest.len());
        Ok(((eth.source, eth.destination), ip, rest))
    }

    /// Protocol number of the payload.
    #[must_use]
    pub const fn proto(&self) -> IpNumber {
        match self {
            Self::V4(ip) => ip.protocol,
            Self::V6(ip) => ip.next_header,
        }
    }

    /// Source and destination address.
    #[must_use]
    pub fn ends(&self) -> (IpAddr, IpAddr) {
        match self {
            Self::V4(ip) => (ip.source.into(), ip.destination.into()),
            Self::V6(ip) => (ip.source.into(), ip.destination.into()),
        }
    }

    fn options(&self) -> Vec<u8> {
        match self {
            Self::V4(ip) => ip.options.to_vec(),
            Self::V6(_) => Vec::new(),
        }
    }
}

/// Creates a network namespace that forwards packets and has default routes over one interface, and moves the calling
/// thread into it. Returns the namespace and the interface's index. BPF_PROG_TEST_RUN runs a program in its caller's
/// namespace, and the programs look up that namespace's routes.
fn enter_node(world: &World) -> Result<(NetNs, u32)> {
    let ns = NetNs::create(&format!("{}-rig", world.id()))?;
    ns.ip(&["link", "add", "uplink", "type", "veth", "peer", "name", "beyond"])?;
    for interface in ["uplink", "beyond"] {
        ns.ip(&["link", "set", interface, "up"])?;
    }
    for family in ["-4", "-6"] {
        ns.ip(&[family, "route", "add", "default", "dev", "uplink"])?;
    }
    ns.sysctl(&["net.ipv4.ip_forward=1", "net.ipv6.conf.all.forwarding=1"])?;
    ns.settle()?;
    let socket = socket(AddressFamily::INET, SocketType::DGRAM, None).context("open a socket")?;
    let uplink = name_to_index(&socket, "uplink").context("look up the index of the interface uplink")?;
    Ok((ns, uplink))
}

/// Result of one test run of a program.
#[derive(Clone, Debug)]
pub struct Ran {
    /// Action that the program returned.
    pub action: u32,
    /// The packet after the run.
    pub bytes: Vec<u8>,
    /// The packet's mark (`skb->mark`) after the run.
    pub mark: u32,
}

/// The programs and their maps, loaded for test runs and pinned on a BPF file system of their own.
#[derive(Debug)]
pub struct Rig {
    /// The datapath to which tests apply plans.
    pub datapath: KernelDatapath,
    programs: aya::Ebpf,
    pins: PinDir,
    node: NetNs,
    /// Index of the interface on which packets appear to arrive.
    uplink: u32,
    _world: World,
}

/// Offset of `mark` in `struct __sk_buff` (include/uapi/linux/bpf.h).
const SKB_MARK: usize = 8;
/// Offset of `ifindex` in `struct __sk_buff`.
const SKB_IFINDEX: usize = 40;
const SKB_SIZE: usize = 192;

/// Loads the programs. Uses the maps that are pinned below `pins`, and creates the ones that are missing.
fn loaded(pins: &PinDir, sizes: &Sizes) -> Result<(KernelDatapath, aya::Ebpf)> {
    let options = programs::Options {
        sizes: *sizes,
        masquerade_mark: breaker_common::DEFAULT_MASQUERADE_MARK,
        log_level: None,
        sockets: false,
        xdp: true,
    };
    let mut loaded = programs::load(pins, &options)?;
    loaded.tail_calls.install_tail_calls(&loaded.programs)?;
    loaded.xdp.map_err(anyhow::Error::msg).context("load the XDP program")?;
    let mut datapath = KernelDatapath::new(loaded.maps);
    datapath.heartbeat(std::time::Duration::ZERO, 0);
    Ok((datapath, loaded.programs))
}

impl Rig {
    /// Loads the programs, and moves the calling thread into the rig's network namespace for the rest of its life.
    ///
    /// # Errors
    /// Fails without root, and if the kernel refuses a program or map. Fails on the process's first thread: removing
    /// the namespace kills every process whose first thread is in it.
    pub fn new() -> Result<Self> {
        Self::with_sizes(&Sizes::for_memory(1024))
    }

    /// Like [`Rig::new`], with maps of these sizes.
    ///
    /// # Errors
    /// As for [`Rig::new`].
    pub fn with_sizes(sizes: &Sizes) -> Result<Self> {
        ensure!(gettid() != getpid(), "create a rig on another thread than the process's first one");
        let world = World::new(0)?;
        let (node, uplink) = enter_node(&world)?;
        let pins = PinDir::open(&world.bpffs().join("rig"))?;
        let (datapath, programs) = loaded(&pins, sizes)?;
        Ok(Self { datapath, programs, pins, node, uplink, _world: world })
    }

    /// Simulates a restart of the agent: reloads the programs on the pinned maps, and adopts the maps' content.
    ///
    /// # Errors
    /// Fails if the kernel refuses a program, or if the maps cannot be adopted.
    pub fn restart(&mut self) -> Result<()> {
        (self.datapath, self.programs) = loaded(&self.pins, &Sizes::for_memory(1024))?;
        self.datapath.adopt()?;
        Ok(())
    }

    /// Runs a program of tc once on a packet.
    ///
    /// # Errors
    /// Fails if there is no such program, or if the kernel refuses the run.
    pub fn run(&mut self, program: &str, packet: &[u8]) -> Result<Ran> {
        self.repeat(program, packet, 1).map(|(ran, _)| ran)
    }

    /// Runs a program of tc on a packet `times` times. Returns the result of the last run, and the average duration of
    /// one run in nanoseconds.
    ///
    /// # Errors
    /// Fails if there is no such program, or if the kernel refuses the run.
    pub fn repeat(&mut self, program: &str, packet: &[u8], times: u32) -> Result<(Ran, u128)> {
        let program: &SchedClassifier = self.programs.program(program).context("no such program")?.try_into()?;
        let mut out = vec![0; packet.len() + 256];
        let mut came_by = vec![0; SKB_SIZE];
        came_by[SKB_IFINDEX..SKB_IFINDEX + 4].copy_from_slice(&self.uplink.to_ne_bytes());
        let mut context = vec![0; SKB_SIZE];
        let result = program.test_run(TestRunOptions {
            data_in: Some(packet),
            data_out: Some(&mut out),
            ctx_in: Some(&came_by),
            ctx_out: Some(&mut context),
            repeat: times,
            ..TestRunOptions::new()
        })?;
        out.truncate(result.data_size_out as usize);
        let mark = <[u8; 4]>::try_from(&context[SKB_MARK..SKB_MARK + 4]).map_or(0, u32::from_ne_bytes);
        Ok((Ran { action: result.return_value, bytes: out, mark }, result.duration.as_nanos()))
    }

    /// Runs the XDP program on a packet. Returns the action (an `xdp_action`) and the packet after the run.
    ///
    /// # Errors
    /// Fails if the kernel refuses the run.
    pub fn run_xdp(&mut self, packet: &[u8]) -> Result<(u32, Vec<u8>)> {
        let program: &Xdp = self.programs.program("breaker_xdp").context("no program breaker_xdp")?.try_into()?;
        let mut out = vec![0; packet.len() + 256];
        let options = TestRunOptions { data_in: Some(packet), data_out: Some(&mut out), ..TestRunOptions::new() };
        let result = program.test_run(options)?;
        out.truncate(result.data_size_out as usize);
        Ok((result.return_value, out))
    }

    /// The network namespace that the programs run in.
    #[must_use]
    pub const fn node(&self) -> &NetNs {
        &self.node
    }

    /// Path of a pinned map.
    #[must_use]
    pub fn map(&self, name: &str) -> std::path::PathBuf {
        self.pins.map(name)
    }

    /// A loaded program of tc.
    ///
    /// # Errors
    /// Fails if there is no such program.
    pub fn program(&self, name: &str) -> Result<&SchedClassifier> {
        Ok(self.programs.program(name).context("no such program")?.try_into()?)
    }

    /// Runs `breaker_in` on a segment that a pod sends.
    ///
    /// # Errors
    /// Fails if the kernel refuses the run.
    pub fn from_pod(&mut self, segment: &Segment) -> Result<Ran> {
        self.run("breaker_in", &segment.bytes())
    }

    /// Runs `breaker_out` on a segment that goes to a pod.
    ///
    /// # Errors
    /// Fails if the kernel refuses the run.
    pub fn to_pod(&mut self, segment: &Segment) -> Result<Ran> {
        self.run("breaker_out", &segment.bytes())
    }

    /// Runs `breaker_in` on any frame that a pod sends.
    ///
    /// # Errors
    /// Fails if the kernel refuses the run.
    pub fn raw_from_pod(&mut self, packet: &[u8]) -> Result<Ran> {
        self.run("breaker_in", packet)
    }

    /// Runs `breaker_out` on any frame that goes to a pod.
    ///
    /// # Errors
    /// Fails if the kernel refuses the run.
    pub fn raw_to_pod(&mut self, packet: &[u8]) -> Result<Ran> {
        self.run("breaker_out", packet)
    }

    /// Writes a plan into the maps.
    ///
    /// # Errors
    /// Fails if the kernel refuses a write.
    pub fn apply(&mut self, plan: &ServicePlan) -> Result<()> {
        Ok(self.datapath.apply(plan)?)
    }
}

/// Creates a service with one TCP frontend. `extra` is YAML (flow style, ending in a comma) that is inserted into the
/// service's configuration; it may be empty.
///
/// # Errors
/// Fails if the configuration is invalid.
pub fn service(name: &str, vip: SocketAddr, backups: &[SocketAddr], extra: &str) -> Result<Service> {
    service_with(name, &[(vip, "TCP")], backups, extra)
}

/// Like [`service`], with several frontends, each with its protocol (`TCP` or `UDP`).
///
/// # Errors
/// Fails if the configuration is invalid.
pub fn service_with(
    name: &str,
    frontends: &[(SocketAddr, &str)],
    backups: &[SocketAddr],
    extra: &str,
) -> Result<Service> {
    let place = |a: &SocketAddr| format!("address: \"{}\", port: {}", a.ip(), a.port());
    let backends: Vec<String> = backups.iter().map(|b| format!("{{{}}}", place(b))).collect();
    let frontends: Vec<String> =
        frontends.iter().map(|(f, protocol)| format!("{{{}, protocol: {protocol}}}", place(f))).collect();
    let text = format!(
        "services: [{{name: {name}, frontends: [{}], {extra} primary: {{backends: []}}, backups: [{{backends: [{}]}}]}}]",
        frontends.join(", "),
        backends.join(", ")
    );
    let parsed = config::parse(std::path::Path::new("rig"), &text);
    let mut config = parsed.map_err(|errors| anyhow::anyhow!("{errors:?}"))?;
    config.services.pop().context("the configuration contains no service")
}

/// Creates the plan of a service in a state, with all its backends of the backup usable and with `draining` set. The
/// primary gets all new flows if the state is closed, and none otherwise.
#[must_use]
pub fn plan(service: &Service, state: BreakerState, epoch: u32) -> ServicePlan {
    let backup = service.backups[0].backends.clone();
    plan_with(service, state, epoch, if state == BreakerState::Closed { 1000 } else { 0 }, true, &backup)
}

/// Creates a plan from explicit values. `share` is the part of new flows that the primary gets, in permille; `draining`
/// means that flows on a backup may still exist; `backup` lists the usable backends of the backup.
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

/// IPv4 address of a pod of the rig: 10.42.0.`host`.
#[must_use]
pub const fn pod(host: u8, port: u16) -> SocketAddr {
    SocketAddr::new(IpAddr::V4(Ipv4Addr::new(10, 42, 0, host)), port)
}

/// IPv4 VIP of the rig: 10.43.0.`host`, port 8080.
#[must_use]
pub const fn vip(host: u8) -> SocketAddr {
    SocketAddr::new(IpAddr::V4(Ipv4Addr::new(10, 43, 0, host)), 8080)
}

/// IPv6 address of a pod of the rig: fd42::`host`.
#[must_use]
pub const fn pod6(host: u8, port: u16) -> SocketAddr {
    SocketAddr::new(IpAddr::V6(Ipv6Addr::new(0xfd42, 0, 0, 0, 0, 0, 0, host as u16)), port)
}

/// IPv6 VIP of the rig: fd43::`host`, port 8080.
#[must_use]
pub const fn vip6(host: u8) -> SocketAddr {
    SocketAddr::new(IpAddr::V6(Ipv6Addr::new(0xfd43, 0, 0, 0, 0, 0, 0, host as u16)), 8080)
}
