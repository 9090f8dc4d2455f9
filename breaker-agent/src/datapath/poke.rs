//! Pokes clients with the program `breaker_poke`, so that the kernel of a client that waits sends something.

use std::net::{IpAddr, SocketAddr};

use anyhow::{Context as _, Result, ensure};
use aya::{
    Ebpf,
    maps::{HashMap, MapData},
    programs::{SchedClassifier, TestRun as _, TestRunOptions},
};
use breaker_common::{FlowKey, PROTO_TCP, PokeOutcome, V6};
use etherparse::PacketBuilder;

use super::{maps::typed, pins::PinDir};

const PROGRAM: &str = "breaker_poke";
/// The map of the connections that are poked now.
const POKED: &str = "POKED";
/// Does not replace an entry (`BPF_NOEXIST`, bpf(2)): what a client has answered stays known.
const NO_EXIST: u64 = 1;
/// Time to live of a poke, as that of a segment from a host.
const TTL: u8 = 64;

/// The loaded program, and the connections that are poked now.
#[derive(Debug)]
pub struct Poker {
    program: SchedClassifier,
    poked: HashMap<MapData, FlowKey<V6>, u8>,
    /// The acknowledgment number of all pokes.
    number: u32,
}

impl Poker {
    /// Loads the program into the kernel. `number`: the acknowledgment number of the pokes, which all programs know.
    ///
    /// # Errors
    /// The kernel refused the program, or it cannot be pinned for a moment, which is how a program gets an owner of its
    /// own.
    pub(super) fn load(programs: &mut Ebpf, pins: &PinDir, number: u32) -> Result<Self> {
        let program: &mut SchedClassifier =
            programs.program_mut(PROGRAM).context("the BPF object has no such program")?.try_into()?;
        program.load()?;
        let path = pins.map(PROGRAM);
        // One that was left by an agent that ended in this moment.
        let _ = std::fs::remove_file(&path);
        program.pin(&path)?;
        let own = SchedClassifier::from_pin(&path);
        std::fs::remove_file(&path)?;
        let poked = programs.take_map(POKED).with_context(|| format!("the BPF object has no map {POKED}"))?;
        Ok(Self { program: own?, poked: typed(poked, POKED)?, number })
    }

    /// Pokes one client, from `frontend`.
    ///
    /// # Errors
    /// The two addresses are of different IP families, or the kernel could not run the program.
    pub fn poke(&mut self, client: SocketAddr, frontend: SocketAddr) -> Result<PokeOutcome> {
        // The map may be full. Then it stays unknown whether the client is gone.
        let _ = self.poked.insert(key(client, frontend), 0, NO_EXIST);
        let frame = frame(client, frontend, fastrand::u32(..), self.number)?;
        let options = TestRunOptions { data_in: Some(&frame), ..TestRunOptions::default() };
        let ran = self.program.test_run(options).context("run the program that pokes clients")?;
        let number = u8::try_from(ran.return_value).unwrap_or(u8::MAX);
        PokeOutcome::try_from(number).map_err(|_| anyhow::anyhow!("the program returned {}", ran.return_value))
    }

    /// Ends the pokes of a client. Returns whether it refused one: it has no such connection.
    pub fn end(&mut self, client: SocketAddr, frontend: SocketAddr) -> bool {
        let key = key(client, frontend);
        let refused = self.poked.get(&key, 0).is_ok_and(|refused| refused != 0);
        let _ = self.poked.remove(&key);
        refused
    }
}

/// The key of a connection in `POKED` and `SYNS`.
pub(super) fn key(client: SocketAddr, frontend: SocketAddr) -> FlowKey<V6> {
    let mapped = |address: SocketAddr| match address.ip() {
        IpAddr::V4(ip) => V6::new(ip.to_ipv6_mapped().octets()),
        IpAddr::V6(ip) => V6::new(ip.octets()),
    };
    FlowKey {
        client: mapped(client),
        vip: mapped(frontend),
        client_port: client.port().to_be_bytes(),
        vip_port: frontend.port().to_be_bytes(),
        proto: PROTO_TCP,
        pad: [0; 3],
    }
}

/// An Ethernet frame with a segment of ACK only, from `frontend` to `client`. The program writes the MAC addresses.
fn frame(client: SocketAddr, frontend: SocketAddr, sequence: u32, acknowledgment: u32) -> Result<Vec<u8>> {
    let link = PacketBuilder::ethernet2([0; 6], [0; 6]);
    let network = match (frontend, client) {
        (SocketAddr::V4(from), SocketAddr::V4(to)) => link.ipv4(from.ip().octets(), to.ip().octets(), TTL),
        (SocketAddr::V6(from), SocketAddr::V6(to)) => link.ipv6(from.ip().octets(), to.ip().octets(), TTL),
        _ => anyhow::bail!("{frontend} and {client} are of different IP families"),
    };
    let segment = network.tcp(frontend.port(), client.port(), sequence, 0).ack(acknowledgment);
    let mut frame = Vec::with_capacity(segment.size(0));
    segment.write(&mut frame, &[])?;
    ensure!(frame.len() == segment_size(client), "an unexpected length: {}", frame.len());
    Ok(frame)
}

const fn segment_size(client: SocketAddr) -> usize {
    14 + 20 + if client.is_ipv4() { 20 } else { 40 }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_poke_is_an_ack_without_data_and_options() {
        for (frontend, client) in [("10.43.0.10:80", "10.42.0.7:40000"), ("[fd43::a]:80", "[fd42::7]:40000")] {
            let (frontend, client): (SocketAddr, SocketAddr) = (frontend.parse().unwrap(), client.parse().unwrap());
            let frame = frame(client, frontend, 1, 2).unwrap();
            let parsed = etherparse::PacketHeaders::from_ethernet_slice(&frame).unwrap();
            let tcp = parsed.transport.unwrap().tcp().unwrap();
            assert_eq!((tcp.source_port, tcp.destination_port), (80, 40_000));
            assert_eq!((tcp.sequence_number, tcp.acknowledgment_number, tcp.header_len()), (1, 2, 20));
            assert!(tcp.ack && !tcp.syn && !tcp.rst && !tcp.fin && !tcp.psh && parsed.payload.slice().is_empty());
            if let Some(etherparse::NetHeaders::Ipv4(ip, _)) = parsed.net {
                assert!(ip.dont_fragment);
            }
        }
    }
}
