//! Processes of the node itself: their packets leave without passing a veth, so the cgroup hooks handle their
//! sockets.

use breaker_common::BreakerState;
use std::{
    io::{Read as _, Write as _},
    net::{SocketAddr, SocketAddrV4, TcpStream, UdpSocket},
    time::Duration,
};

use anyhow::Result;
use breaker_tests::lab::{
    service::Fault,
    stage::{Checks, Lab, SERVICE},
    wait_for,
};

use super::{LONG, start_healthy_lab};

/// Sends a request as a process of the node. Returns the pod that answered, and the peer's address as the socket
/// shows it.
fn ask(lab: &Lab, target: SocketAddr) -> Result<(String, SocketAddr)> {
    let asked = lab.world.node(0).ns().enter(move || {
        let mut stream = TcpStream::connect_timeout(&target, Duration::from_secs(5))?;
        stream.set_read_timeout(Some(Duration::from_secs(5)))?;
        write!(stream, "GET / HTTP/1.1\r\nHost: lab\r\nConnection: close\r\n\r\n")?;
        let peer = stream.peer_addr()?;
        let mut answer = String::new();
        stream.read_to_string(&mut answer)?;
        Ok::<_, std::io::Error>((answer.rsplit(' ').next().unwrap_or_default().trim().to_owned(), peer))
    })?;
    Ok(asked?)
}

fn mapped(address: SocketAddrV4) -> SocketAddr {
    SocketAddr::new(address.ip().to_ipv6_mapped().into(), address.port())
}

#[test]
fn a_process_of_the_node_gets_the_backup_and_sees_the_vip() -> Result<()> {
    let mut lab = start_healthy_lab("")?;
    let status = lab.agent.status()?;
    assert_eq!(status.datapath.node_sockets, None);
    // As Go and curl connect, and as Java does (an IPv6 socket and an IPv4-mapped address).
    let targets = [SocketAddr::V4(lab.vip), mapped(lab.vip)];
    let (primary, backup) = (lab.primary.address().to_string(), lab.backup.address().to_string());
    for target in targets {
        assert_eq!(ask(&lab, target)?, (primary.clone(), target));
    }
    lab.primary.inject(Fault::FakeError)?;
    lab.agent.wait_state(SERVICE, BreakerState::Open, LONG)?;
    for target in targets {
        assert_eq!(ask(&lab, target)?, (backup.clone(), target));
    }
    // The socket hooks leave a pod's sockets alone; the program on its veth redirects the flow, which is counted
    // once.
    assert_eq!(lab.ask()?.pod(), Some(backup.as_str()));
    assert_eq!(lab.agent.service(SERVICE)?.counters.moved, 3);
    lab.primary.heal(Fault::FakeError)?;
    lab.agent.wait_state(SERVICE, BreakerState::Closed, LONG)?;
    wait_for("the primary to answer the node again", LONG, || {
        ask(&lab, targets[0]).is_ok_and(|(who, _)| who == primary)
    })
}

#[test]
fn with_nowhere_to_go_a_process_is_refused_at_once() -> Result<()> {
    let mut lab = start_healthy_lab("    whenAllUnhealthy: Reject\n")?;
    lab.primary.inject(Fault::FakeError)?;
    lab.backup.inject(Fault::FakeError)?;
    lab.agent.wait_state(SERVICE, BreakerState::Open, LONG)?;
    wait_for("the connection to be refused", LONG, || {
        let error = ask(&lab, SocketAddr::V4(lab.vip)).err();
        error.is_some_and(|e| e.to_string().contains("refused"))
    })
}

#[test]
fn they_are_left_alone_where_it_is_switched_off() -> Result<()> {
    let mut lab = Lab::new(Checks::Fast)?;
    lab.agent.write_config("  nodeSockets: false\n", &lab.services(Checks::Fast, ""))?;
    lab.agent.start()?;
    lab.agent.wait_all_up(LONG)?;
    assert_eq!(lab.agent.status()?.datapath.node_sockets.as_deref(), Some("switched off"));
    assert!(!lab.agent.pinned("links").join("breaker_conn4").exists());
    Ok(())
}

/// TRIALS E5: a socket asks the VIP, and later the backup itself. The second answer comes from the backup.
#[test]
fn a_socket_that_asks_the_backup_itself_is_answered_by_it() -> Result<()> {
    const PORT: u16 = 7007;
    let mut lab = Lab::new(Checks::Fast)?;
    let backup = SocketAddr::from((lab.backup.pod.address, PORT));
    let vip = SocketAddr::from((*lab.vip.ip(), PORT));
    let services = format!(
        "services:\n  - name: echo\n    frontends: [{{address: {}, port: {PORT}, protocol: UDP}}]\n    \
         primary: {{backends: [{{address: {}, port: {PORT}}}]}}\n    \
         backups: [{{backends: [{{address: {}, port: {PORT}}}]}}]\n    override: ForceOpen\n",
        vip.ip(),
        lab.primary.pod.address,
        backup.ip()
    );
    lab.agent.write_config("", &services)?;
    lab.agent.start()?;
    let server = lab.backup.pod.ns.enter(|| UdpSocket::bind(("0.0.0.0", PORT)))??;
    std::thread::spawn(move || {
        let mut buffer = [0; 64];
        while let Ok((length, from)) = server.recv_from(&mut buffer) {
            let _ = server.send_to(&buffer[..length], from);
        }
    });
    let senders = lab.world.node(0).ns().enter(move || -> std::io::Result<Vec<SocketAddr>> {
        let socket = UdpSocket::bind("0.0.0.0:0")?;
        socket.set_read_timeout(Some(Duration::from_secs(5)))?;
        let mut senders = Vec::new();
        for target in [vip, backup, vip] {
            socket.send_to(b"ping", target)?;
            senders.push(socket.recv_from(&mut [0; 64])?.1);
        }
        Ok(senders)
    })??;
    assert_eq!(senders, [vip, backup, vip]);
    Ok(())
}
