//! Descriptions of packets by their unusual features, made to be generated, shrunk and printed; and their encoding as
//! bytes.

use std::net::{IpAddr, SocketAddr};

use breaker_tests::model::{
    bytes::words,
    headers::{octets, proto},
};

/// A packet without addresses and ports.
#[derive(Clone, Debug)]
pub struct Shape {
    pub body: Body,
    /// IPv4 options, in 32-bit words.
    pub options: usize,
    /// IPv6 extension headers.
    pub extensions: Vec<Extension>,
    pub piece: FragmentPart,
    /// VLAN tags.
    pub tags: usize,
    pub lie: Malformation,
}

/// Source, destination, and whether the protocol is UDP (otherwise TCP).
#[derive(Clone, Copy, Debug)]
pub struct Ends {
    pub source: SocketAddr,
    pub destination: SocketAddr,
    pub udp: bool,
}

#[derive(Clone, Debug)]
pub enum Body {
    /// TCP or UDP, as [`Ends::udp`] says.
    Transport(Transport),
    /// Another protocol number, with 24 arbitrary bytes behind the IP header.
    Other(u8),
}

#[derive(Clone, Debug)]
pub struct Transport {
    /// TCP flags (byte 13 of the header).
    pub flags: u8,
    /// Added to the sequence number.
    pub sequence: u8,
    /// TCP options, in 32-bit words.
    pub options: usize,
    /// Bytes of payload.
    pub payload: usize,
    /// The payload's first two bytes, in network byte order.
    pub word: u16,
    /// UDP without a checksum.
    pub unchecked: bool,
    /// A wrong checksum.
    pub wrong: bool,
}

#[derive(Clone, Copy, Debug)]
pub enum Extension {
    /// Length in units of eight bytes.
    HopByHop(u8),
    Destination(u8),
    /// Segments left.
    Routing(u8),
    /// A fragment header on a packet that is not fragmented (an atomic fragment, RFC 6946).
    Atomic,
    /// Length in 32-bit words, minus two (RFC 4302, section 2.2).
    Authentication(u8),
}

/// Which part of an IP packet the frame carries. The number is the fragment's identification.
#[derive(Clone, Copy, Debug)]
pub enum FragmentPart {
    Whole,
    First(u8),
    Later(u8),
}

/// Differences between the lengths in the headers and the frame.
#[derive(Clone, Copy, Debug)]
pub struct Malformation {
    /// Added to the IP header's length field.
    pub length: i16,
    /// Bytes cut off the frame's end.
    pub cut: usize,
    /// Bytes of padding behind the packet.
    pub padding: usize,
}

const MACS: [u8; 12] = [2, 0, 0, 0, 0, 1, 2, 0, 0, 0, 0, 4];

/// Encodes a packet as an Ethernet frame.
pub fn frame(shape: &Shape, ends: &Ends) -> Vec<u8> {
    let (next, rest) = match &shape.body {
        Body::Transport(body) => transport(body, ends),
        Body::Other(number) => (*number, vec![7; 24]),
    };
    framed(shape, ends, next, rest)
}

/// Encodes an ICMP error that quotes the first `quoted` bytes of the IP packet in the frame `about`. `kind` is the
/// ICMP type.
pub fn error(shape: &Shape, ends: &Ends, kind: u8, about: &[u8], quoted: usize) -> Vec<u8> {
    let v4 = ends.source.is_ipv4();
    let quote = &about[14..about.len().min(14 + quoted)];
    let mut icmp = vec![kind, 1, 0, 0, 0, 0, 5, 0];
    icmp.extend(quote);
    let number = if v4 { proto::ICMP } else { proto::ICMPV6 };
    let mut sum = words(&icmp);
    if !v4 {
        sum += words(&pseudo(ends, number, icmp.len()));
    }
    put(&mut icmp, 2, complement(sum));
    framed(&Shape { piece: FragmentPart::Whole, ..shape.clone() }, ends, number, icmp)
}

fn transport(body: &Transport, ends: &Ends) -> (u8, Vec<u8>) {
    let mut bytes = [ends.source.port().to_be_bytes(), ends.destination.port().to_be_bytes()].concat();
    let mut payload: Vec<u8> = (0..body.payload).map(|i| u8::try_from(i % 251).unwrap()).collect();
    if let Some(first) = payload.get_mut(..2) {
        first.copy_from_slice(&body.word.to_be_bytes());
    }
    let (number, check_at) = if ends.udp {
        bytes.extend(u16::try_from(8 + payload.len()).unwrap().to_be_bytes());
        bytes.extend([0, 0]);
        (proto::UDP, 6)
    } else {
        bytes.extend((0xffff_fff0 + u32::from(body.sequence)).to_be_bytes());
        bytes.extend(77_u32.to_be_bytes());
        bytes.extend([u8::try_from(5 + body.options).unwrap() << 4, body.flags, 0x20, 0, 0, 0, 0, 0]);
        bytes.extend(vec![1; body.options * 4]);
        (proto::TCP, 16)
    };
    bytes.extend(payload);
    if ends.udp && body.unchecked {
        return (number, bytes);
    }
    let sum = words(&bytes) + words(&pseudo(ends, number, bytes.len()));
    let check = complement(sum) ^ if body.wrong { 0x1234 } else { 0 };
    put(&mut bytes, check_at, if ends.udp && check == 0 { 0xffff } else { check });
    (number, bytes)
}

fn pseudo(ends: &Ends, number: u8, length: usize) -> Vec<u8> {
    let mut bytes = [octets(ends.source.ip()), octets(ends.destination.ip())].concat();
    bytes.extend([0, number]);
    bytes.extend(u16::try_from(length).unwrap().to_be_bytes());
    bytes
}

fn complement(sum: u32) -> u16 {
    !u16::try_from(sum % 65535).unwrap()
}

fn put(bytes: &mut [u8], at: usize, word: u16) {
    bytes[at..at + 2].copy_from_slice(&word.to_be_bytes());
}

fn framed(shape: &Shape, ends: &Ends, next: u8, rest: Vec<u8>) -> Vec<u8> {
    let mut frame = MACS.to_vec();
    for _ in 0..shape.tags {
        frame.extend([0x81, 0x00, 0x00, 0x64]);
    }
    let rest = if let FragmentPart::Later(_) = shape.piece { vec![0x55; 32] } else { rest };
    let packet = match (ends.source.ip(), ends.destination.ip()) {
        (IpAddr::V4(_), _) => {
            frame.extend([0x08, 0x00]);
            ipv4(shape, ends, next, &rest)
        }
        _ => {
            frame.extend([0x86, 0xdd]);
            ipv6(shape, ends, next, &rest)
        }
    };
    // The kernel itself refuses to run a program on a frame without an IP header.
    let shortest = frame.len() + if ends.source.is_ipv4() { 20 } else { 40 };
    frame.extend(packet);
    frame.truncate((frame.len() - shape.lie.cut.min(frame.len())).max(shortest));
    frame.extend(vec![0xaa; shape.lie.padding]);
    frame
}

fn lied(length: usize, lie: &Malformation) -> [u8; 2] {
    u16::try_from(length).unwrap().saturating_add_signed(lie.length).to_be_bytes()
}

fn ipv4(shape: &Shape, ends: &Ends, next: u8, rest: &[u8]) -> Vec<u8> {
    let header = 20 + shape.options * 4;
    let (id, fragment) = match shape.piece {
        FragmentPart::Whole => (4711, 0x4000_u16),
        FragmentPart::First(id) => (u16::from(id), 0x2000),
        FragmentPart::Later(id) => (u16::from(id), 8),
    };
    let mut packet = vec![0x40 | u8::try_from(header / 4).unwrap(), 0];
    packet.extend(lied(header + rest.len(), &shape.lie));
    packet.extend(id.to_be_bytes());
    packet.extend(fragment.to_be_bytes());
    packet.extend([64, next, 0, 0]);
    packet.extend(octets(ends.source.ip()));
    packet.extend(octets(ends.destination.ip()));
    packet.extend(vec![1; shape.options * 4]);
    let sum = complement(words(&packet));
    put(&mut packet, 10, sum);
    packet.extend(rest);
    packet
}

fn ipv6(shape: &Shape, ends: &Ends, next: u8, rest: &[u8]) -> Vec<u8> {
    let mut chain: Vec<(u8, Vec<u8>)> = shape.extensions.iter().map(|extension| extension.bytes()).collect();
    match shape.piece {
        FragmentPart::Whole => {}
        FragmentPart::First(id) => chain.push((proto::FRAGMENT, vec![0, 0, 0, 1, 0, 0, 0, id])),
        FragmentPart::Later(id) => chain.push((proto::FRAGMENT, vec![0, 0, 0, 64, 0, 0, 0, id])),
    }
    let numbers: Vec<u8> = chain.iter().map(|(number, _)| *number).chain([next]).collect();
    for ((_, bytes), next) in chain.iter_mut().zip(&numbers[1..]) {
        bytes[0] = *next;
    }
    let behind = [chain.into_iter().flat_map(|(_, bytes)| bytes).collect(), rest.to_vec()].concat();
    let mut packet = vec![0x60, 0, 0, 0];
    packet.extend(lied(behind.len(), &shape.lie));
    packet.extend([numbers[0], 64]);
    packet.extend(octets(ends.source.ip()));
    packet.extend(octets(ends.destination.ip()));
    packet.extend(behind);
    packet
}

impl Extension {
    /// The header's protocol number and its bytes. The "next header" byte is left zero.
    fn bytes(self) -> (u8, Vec<u8>) {
        let padded = |units: u8| {
            let mut bytes = vec![0; usize::from(units) * 8];
            bytes[1] = units - 1;
            bytes
        };
        match self {
            Self::HopByHop(units) => (proto::HOP_BY_HOP, padded(units)),
            Self::Destination(units) => (proto::DESTINATION, padded(units)),
            Self::Routing(left) => (proto::ROUTING, vec![0, 0, 4, left, 0, 0, 0, 0]),
            Self::Atomic => (proto::FRAGMENT, vec![0, 0, 0, 0, 1, 2, 3, 4]),
            Self::Authentication(words) => {
                let mut bytes = vec![9; (usize::from(words) + 2) * 4];
                bytes[1] = words;
                (proto::AUTHENTICATION, bytes)
            }
        }
    }
}
