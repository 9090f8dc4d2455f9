//! Packets that ICMP errors quote. An error quotes the packet as the datapath translated it. The datapath translates
//! the quote back and adjusts the checksums in the quote and over it, so that the receiver recognizes its own packet.

use std::net::{IpAddr, SocketAddr};

use super::{
    bytes::{Edit, word},
    headers::{Headers, addresses, addresses_at, ip_sum, octets, proto, transport_sum},
};

/// A quoted packet.
#[derive(Clone, Copy, Debug)]
pub struct Quote {
    /// Source address and port.
    pub source: SocketAddr,
    /// Destination address and port.
    pub destination: SocketAddr,
    /// Protocol number.
    pub proto: u8,
    l3: usize,
    l4: usize,
}

/// The end of a packet whose address is translated.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum End {
    /// The packet's source.
    Source,
    /// The packet's destination.
    Destination,
}

/// Reads the packet that an ICMP error quotes: a TCP or UDP packet, or the first fragment of one, with its ports. Bytes
/// after the error's own end do not belong to the quote. Returns `None` for any other quote.
#[must_use]
pub fn read(frame: &[u8], error: &Headers) -> Option<Quote> {
    let (l3, v4) = (error.l4 + 8, error.is_v4());
    let quoted = &frame[..error.end];
    let shortest = if v4 { 20 } else { 40 };
    if quoted.len() < l3 + shortest || quoted[l3] >> 4 != if v4 { 4 } else { 6 } {
        return None;
    }
    let (length, proto) = if v4 { (usize::from(quoted[l3] & 15) * 4, quoted[l3 + 9]) } else { (40, quoted[l3 + 6]) };
    let later = v4 && word(quoted, l3 + 6) & 0x1fff != 0;
    let l4 = l3 + length;
    if later || length < shortest || !matches!(proto, proto::TCP | proto::UDP) || quoted.len() < l4 + 4 {
        return None;
    }
    let (source, destination) = addresses(quoted, l3, v4);
    let (source, destination) =
        (SocketAddr::new(source, word(quoted, l4)), SocketAddr::new(destination, word(quoted, l4 + 2)));
    Some(Quote { source, destination, proto, l3, l4 })
}

/// Translates an ICMP error: in the quote, the address and port of `end` become `to`, and the other end's port becomes
/// `other_port`. The error's own address at the opposite end is translated too, if it equals the quoted address.
#[must_use]
pub fn translate(frame: &[u8], error: &Headers, quote: &Quote, end: End, to: SocketAddr, other_port: u16) -> Edit {
    let v4 = error.is_v4();
    let mut edit = Edit::new(frame);
    let transport = transport_sum(quote.proto, quote.l4);
    // The quote may end before TCP's checksum.
    let transport = (transport.at + 2 <= error.end).then_some(transport);
    let own = v4.then_some(ip_sum(quote.l3));
    let under: Vec<_> = own.into_iter().chain(transport).collect();
    let ([source_at, destination_at], _) = addresses_at(v4);
    let (old, at, ports_at) = match end {
        End::Source => (quote.source, source_at, [0, 2]),
        End::Destination => (quote.destination, destination_at, [2, 0]),
    };
    edit.replace(quote.l3 + at, &octets(to.ip()), &under);
    let transport: Vec<_> = transport.into_iter().collect();
    edit.replace(quote.l4 + ports_at[0], &to.port().to_be_bytes(), &transport);
    edit.replace(quote.l4 + ports_at[1], &other_port.to_be_bytes(), &transport);
    let icmp = transport_sum(error.proto, error.l4);
    let (before, after) = (frame[error.l4 + 8..].to_vec(), edit.frame[error.l4 + 8..].to_vec());
    edit.adjust(icmp, &before, &after);
    let (outer, outer_at): (IpAddr, usize) = match end {
        End::Source => (error.destination.ip(), destination_at),
        End::Destination => (error.source.ip(), source_at),
    };
    if outer == old.ip() {
        let over = if v4 { ip_sum(error.l3) } else { icmp };
        edit.replace(error.l3 + outer_at, &octets(to.ip()), &[over]);
    }
    edit
}
