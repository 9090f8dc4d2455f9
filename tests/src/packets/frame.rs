//! Builds and parses Ethernet frames with etherparse, independently of the product's code.

use std::net::{IpAddr, SocketAddr};

use anyhow::{Context as _, Result, ensure};
use etherparse::{
    EtherType, Ethernet2Header, IpNumber, Ipv4Header, Ipv4Options, Ipv6Header, TcpHeader, TcpOptions, UdpHeader,
};

/// TCP flags: bits of byte 13 of the TCP header.
pub mod flags {
    #![allow(missing_docs, reason = "the names are those of RFC 9293, section 3.1")]
    pub const FIN: u8 = 0x01;
    pub const SYN: u8 = 0x02;
    pub const RST: u8 = 0x04;
    pub const PSH: u8 = 0x08;
    pub const ACK: u8 = 0x10;
}

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
        ensure!(rest.len() == usize::from(length), "{} bytes follow the IP header, not {length}", rest.len());
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
