//! Headers to a tuple: Ethernet, IPv4, TCP. Everything else is not ours (yet) and goes on untouched.

use breaker_common::{PROTO_TCP, PassReason};
use network_types::{
    eth::{EthHdr, EtherType},
    ip::Ipv4Hdr,
    tcp::TcpHdr,
};

use crate::packet::Packet;

/// TCP flags as they stand in byte 13 of the header (RFC 9293, section 3.1).
pub mod flags {
    pub const FIN: u8 = 0x01;
    pub const SYN: u8 = 0x02;
    pub const RST: u8 = 0x04;
    pub const ACK: u8 = 0x10;
}

/// What we know of a segment after parsing. Addresses and ports in wire order, offsets from the Ethernet header.
#[derive(Clone, Copy)]
pub struct Segment {
    pub source: [u8; 4],
    pub destination: [u8; 4],
    pub source_port: [u8; 2],
    pub destination_port: [u8; 2],
    /// Where the TCP header starts: 34 without IP options.
    pub l4: usize,
    pub flags: u8,
}

impl Segment {
    /// A place to parse into.
    #[inline(always)]
    pub fn empty() -> Self {
        Self { source: [0; 4], destination: [0; 4], source_port: [0; 2], destination_port: [0; 2], l4: 0, flags: 0 }
    }

    /// A connection request: SYN without ACK. (With RST or FIN beside it, it is none: hosts drop those.)
    #[inline(always)]
    pub fn is_syn(&self) -> bool {
        self.flags & (flags::SYN | flags::ACK | flags::RST | flags::FIN) == flags::SYN
    }

    /// The sender's last word, or nearly: FIN or RST.
    #[inline(always)]
    pub fn ends(&self) -> bool {
        self.flags & (flags::FIN | flags::RST) != 0
    }

    #[inline(always)]
    pub fn is_rst(&self) -> bool {
        self.flags & flags::RST != 0
    }
}

/// Where the IPv4 header starts.
pub const L3: usize = EthHdr::LEN;
/// Longest headers that we look at: Ethernet, IPv4 and TCP, each IP and TCP with all options.
const LONGEST: u32 = (EthHdr::LEN + 60 + 60) as u32;

/// Parses a packet into `segment`. `Ok(false)`: not IPv4 or not TCP, nothing to count.
///
/// The caller brings the place because a value that some paths leave undefined ends up as a register that the verifier
/// refuses to see spilled.
///
/// # Errors
/// [`PassReason::Truncated`] and [`PassReason::Fragment`].
#[inline(always)]
pub fn ipv4_tcp(packet: &Packet<'_>, segment: &mut Segment) -> Result<bool, PassReason> {
    match linear(packet, segment) {
        // The headers may lie outside of the linear part: fetch them, once.
        Err(PassReason::Truncated) => {
            let want = if packet.len() < LONGEST { packet.len() } else { LONGEST };
            packet.pull(want).ok_or(PassReason::Truncated)?;
            linear(packet, segment)
        }
        outcome => outcome,
    }
}

#[inline(always)]
fn linear(packet: &Packet<'_>, segment: &mut Segment) -> Result<bool, PassReason> {
    let Some(eth) = packet.read::<EthHdr>(0) else { return Err(PassReason::Truncated) };
    if eth.ether_type != EtherType::Ipv4 as u16 {
        return Ok(false);
    }
    let Some(ip) = packet.at::<Ipv4Hdr>(L3) else { return Err(PassReason::Truncated) };
    // SAFETY: `at` checked the bounds; the header is bytes only, so any alignment and any value will do.
    let ip = unsafe { &*ip };
    if ip.proto != PROTO_TCP {
        return Ok(false);
    }
    // More fragments, or an offset: RFC 791 section 3.1.
    if u16::from_be_bytes(ip.frags) & 0x3fff != 0 {
        return Err(PassReason::Fragment);
    }
    // Length of the header in bytes; the mask tells the verifier that it is 60 at the most.
    let ihl = ((ip.vihl & 0x0f) as usize * 4) & 0x3c;
    if ip.vihl >> 4 != 4 || ihl < Ipv4Hdr::LEN {
        return Err(PassReason::Truncated);
    }
    // A total length that ends before the ports: what follows is padding, not a header.
    if (u16::from_be_bytes(ip.tot_len) as usize) < ihl + TcpHdr::LEN {
        return Err(PassReason::Truncated);
    }
    let l4 = L3 + ihl;
    let Some(tcp) = packet.at::<[u8; TcpHdr::LEN]>(l4) else { return Err(PassReason::Truncated) };
    // SAFETY: as above.
    let tcp = unsafe { &*tcp };
    *segment = Segment {
        source: ip.src_addr,
        destination: ip.dst_addr,
        source_port: [tcp[0], tcp[1]],
        destination_port: [tcp[2], tcp[3]],
        l4,
        flags: tcp[13],
    };
    Ok(true)
}
