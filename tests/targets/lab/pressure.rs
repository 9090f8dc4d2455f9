//! More flows than the tables hold.

use breaker_common::BreakerState;
use std::{
    io::{Read as _, Write as _},
    net::{Ipv4Addr, SocketAddr, SocketAddrV4, TcpStream},
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicUsize, Ordering},
    },
    time::{Duration, Instant},
};

use anyhow::{Context as _, Result, ensure};
use breaker_tests::{
    lab::{
        service::Fault,
        stage::{Checks, Lab, SERVICE},
        wait_for,
    },
    packets::{Segment, flags::SYN},
};
use rustix::{
    io::Errno,
    net::{AddressFamily, SendFlags, SocketType, ipproto::RAW, sendto, socket},
};

use crate::{LONG, wait_all_up};

/// Established connections.
const KEPT: usize = 1000;
/// `maxFlows`: flows that the tables of this lab hold.
const FLOWS: usize = 4096;
/// Pending flows, those that no backend has answered, have a table of their own; it has at least this many entries.
const PENDING: usize = 8192;

/// Sends connection requests from random addresses (198.18.0.0/15, RFC 2544) as fast as possible, until `over` is
/// set.
fn flood(target: SocketAddrV4, over: &AtomicBool, sent: &AtomicUsize) -> Result<()> {
    let socket = socket(AddressFamily::INET, SocketType::RAW, Some(RAW)).context("a raw socket")?;
    let to = SocketAddr::V4(SocketAddrV4::new(*target.ip(), 0));
    while !over.load(Ordering::Relaxed) {
        let source = Ipv4Addr::from(u32::from(Ipv4Addr::new(198, 18, 0, 0)) | fastrand::u32(..1 << 17));
        let source = SocketAddr::new(source.into(), fastrand::u16(1024..));
        let frame = Segment::new(source, target.into(), SYN).bytes();
        match sendto(&socket, &frame[14..], SendFlags::empty(), &to) {
            Ok(_) => sent.fetch_add(1, Ordering::Relaxed),
            Err(Errno::NOBUFS | Errno::AGAIN | Errno::PERM) => continue,
            Err(error) => return Err(error).context("send"),
        };
    }
    Ok(())
}

/// Sends one request on an established connection; returns the pod that answered.
pub fn ask(stream: &mut TcpStream) -> Result<String> {
    stream.write_all(b"GET / HTTP/1.1\r\nHost: lab\r\n\r\n").context("ask")?;
    let mut answer = Vec::new();
    let mut piece = [0; 1024];
    loop {
        let length = stream.read(&mut piece).context("read the answer")?;
        ensure!(length > 0, "the connection was closed");
        answer.extend_from_slice(&piece[..length]);
        let text = String::from_utf8_lossy(&answer).to_lowercase();
        let Some((head, body)) = text.split_once("\r\n\r\n") else { continue };
        let length = head.split("content-length: ").nth(1).and_then(|rest| rest.lines().next());
        if length.context("an answer without a length")?.parse() == Ok(body.len()) {
            return Ok(body.rsplit("from ").next().unwrap_or_default().trim().to_owned());
        }
    }
}

/// A flood of connection requests evicts other requests only; established connections are not affected.
#[test]
fn a_flood_of_connection_requests_leaves_established_flows_alone() -> Result<()> {
    let mut lab = Lab::new(Checks::Fast)?;
    lab.agent.write_config(&format!("  maxFlows: {FLOWS}\n"), &lab.services(Checks::Fast, ""))?;
    lab.agent.start()?;
    wait_all_up(&lab)?;
    lab.primary.inject(Fault::Kill)?;
    lab.agent.wait_state(SERVICE, BreakerState::Open, LONG)?;
    let backup = lab.backup.address().to_string();
    let vip = lab.vip;
    let flooder = lab.world.node_mut(0).add_pod("flooder")?;
    wait_for("the flooder's veth to have programs", LONG, || {
        lab.agent.status().is_ok_and(|s| s.datapath.interfaces.contains(&flooder.veth))
    })?;

    let connect = move |_| -> Result<TcpStream> {
        let stream = TcpStream::connect_timeout(&vip.into(), LONG)?;
        stream.set_read_timeout(Some(Duration::from_secs(10)))?;
        Ok(stream)
    };
    let mut streams: Vec<TcpStream> =
        lab.client.ns.enter(move || (0..KEPT).map(connect).collect::<Result<_>>())?.context("connect")?;
    let (over, sent) = (Arc::new(AtomicBool::new(false)), Arc::new(AtomicUsize::new(0)));
    let (o, s) = (over.clone(), sent.clone());
    let attack = std::thread::spawn(move || flooder.ns.enter(move || flood(vip, &o, &s)));
    let told = ask_all(&mut streams, &backup, &sent);
    over.store(true, Ordering::Relaxed);
    attack.join().expect("the flood does not panic")??;
    told?;
    let status = lab.agent.status()?;
    assert!(status.datapath.flow_pressure < 80, "{} %", status.datapath.flow_pressure);
    Ok(())
}

/// Sends requests on all connections again and again, until the flood has sent four times as many SYNs as the table
/// holds.
fn ask_all(streams: &mut [TcpStream], backup: &str, sent: &AtomicUsize) -> Result<()> {
    let start = Instant::now();
    let mut rounds = 0;
    while rounds < 3 || sent.load(Ordering::Relaxed) < 4 * PENDING {
        for (i, stream) in streams.iter_mut().enumerate() {
            let pod = ask(stream).with_context(|| format!("client {i} in round {rounds}"))?;
            ensure!(pod.starts_with(backup), "client {i} in round {rounds} was answered by {pod}");
        }
        rounds += 1;
        ensure!(start.elapsed() < 6 * LONG, "the flood has sent only {} SYNs", sent.load(Ordering::Relaxed));
    }
    Ok(())
}
