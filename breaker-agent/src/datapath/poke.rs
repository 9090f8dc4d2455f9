//! Pokes clients with the program `breaker_poke`, so that the kernel of a client that waits sends something.

use std::net::SocketAddr;

use anyhow::{Context as _, Result, ensure};
use aya::{
    Ebpf,
    programs::{SchedClassifier, TestRun as _, TestRunOptions},
};
use breaker_common::{POKE_NUMBER, PokeOutcome};
use etherparse::PacketBuilder;

use super::pins::PinDir;

const PROGRAM: &str = "breaker_poke";
/// Time to live of a poke, as that of a segment from a host.
const TTL: u8 = 64;

/// The loaded program.
#[derive(Debug)]
pub struct Poker {
    program: SchedClassifier,
}

impl Poker {
    /// Loads the program into the kernel.
    ///
    /// # Errors
    /// The kernel refused the program, or it cannot be pinned for a moment, which is how a program gets an owner of its
    /// own.
    pub(super) fn load(programs: &mut Ebpf, pins: &PinDir) -> Result<Self> {
        let program: &mut SchedClassifier =
            programs.program_mut(PROGRAM).context("the BPF object has no such program")?.try_into()?;
        program.load()?;
        let path = pins.map(PROGRAM);
        // One that was left by an agent that ended in this moment.
        let _ = std::fs::remove_file(&path);
        program.pin(&path)?;
        let own = SchedClassifier::from_pin(&path);
        std::fs::remove_file(&path)?;
        Ok(Self { program: own? })
    }

    /// Pokes one client, from `frontend`.
    ///
    /// # Errors
    /// The two addresses are of different IP families, or the kernel could not run the program.
    pub fn poke(&self, client: SocketAddr, frontend: SocketAddr) -> Result<PokeOutcome> {
        let frame = frame(client, frontend, fastrand::u32(..), POKE_NUMBER)?;
        let options = TestRunOptions { data_in: Some(&frame), ..TestRunOptions::default() };
        let ran = self.program.test_run(options).context("run the program that pokes clients")?;
        let number = u8::try_from(ran.return_value).unwrap_or(u8::MAX);
        PokeOutcome::try_from(number).map_err(|_| anyhow::anyhow!("the program returned {}", ran.return_value))
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
