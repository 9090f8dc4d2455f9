//! Clients of the lab, in the same image as the service: one request, or one after the other until told to end.

use std::{
    io::{Read as _, Write as _},
    net::{SocketAddr, TcpStream, UdpSocket},
    time::{Duration, Instant, SystemTime, UNIX_EPOCH},
};

use anyhow::{Context as _, Result, bail};

/// What to ask.
#[derive(Clone, Debug)]
pub struct Target {
    address: SocketAddr,
    path: String,
    datagrams: bool,
}

impl Target {
    /// From `http://ADDRESS:PORT/PATH` or `udp://ADDRESS:PORT`.
    pub fn parse(url: &str) -> Result<Self> {
        let datagrams = url.starts_with("udp://");
        let rest = url.strip_prefix("http://").or_else(|| url.strip_prefix("udp://")).with_context(|| {
            format!("{url:?} is not allowed; allowed: http://ADDRESS:PORT/PATH, udp://ADDRESS:PORT")
        })?;
        let slash = rest.find('/').unwrap_or(rest.len());
        let (authority, path) = rest.split_at(slash);
        let with_port = if authority.rsplit(']').next().is_some_and(|end| end.contains(':')) {
            authority.to_owned()
        } else {
            format!("{authority}:80")
        };
        let address = with_port.parse().with_context(|| format!("{authority:?} is no address and port"))?;
        Ok(Self { address, datagrams, path: if path.is_empty() { "/".into() } else { path.to_owned() } })
    }
}

/// A socket for datagrams to a target.
fn socket_to(target: &Target) -> Result<UdpSocket> {
    let socket = UdpSocket::bind(if target.address.is_ipv4() { "0.0.0.0:0" } else { "[::]:0" }).context("bind")?;
    socket.connect(target.address).context("connect")?;
    Ok(socket)
}

/// A datagram there, and the next one back.
fn exchange(socket: &UdpSocket, timeout: Duration) -> Result<String> {
    socket.set_read_timeout(Some(timeout))?;
    socket.send(b"?").context("send")?;
    let mut buffer = [0; 1500];
    let length = socket.recv(&mut buffer).context("receive")?;
    Ok(String::from_utf8_lossy(&buffer[..length]).into_owned())
}

/// One request on a connection of its own; the status and the body.
pub fn ask(target: &Target, method: &str, timeout: Duration) -> Result<(u16, String)> {
    if target.datagrams {
        return Ok((200, exchange(&socket_to(target)?, timeout)?));
    }
    let started = Instant::now();
    let left = || timeout.saturating_sub(started.elapsed()).max(Duration::from_millis(1));
    let mut stream = TcpStream::connect_timeout(&target.address, left()).context("connect")?;
    stream.set_write_timeout(Some(left()))?;
    let host = target.address;
    write!(
        stream,
        "{method} {} HTTP/1.1\r\nHost: {host}\r\nConnection: close\r\nContent-Length: 0\r\n\r\n",
        target.path
    )
    .context("write")?;
    let mut answer = Vec::new();
    let mut buffer = [0; 4096];
    loop {
        stream.set_read_timeout(Some(left()))?;
        match stream.read(&mut buffer).context("read")? {
            0 => break,
            n => answer.extend_from_slice(&buffer[..n]),
        }
        if started.elapsed() > timeout {
            bail!("no answer in time");
        }
    }
    let text = String::from_utf8_lossy(&answer);
    let (head, body) = text.split_once("\r\n\r\n").context("an answer without an end of its head")?;
    let status = head.split(' ').nth(1).and_then(|word| word.parse().ok()).context("an answer without a status")?;
    Ok((status, body.to_owned()))
}

/// Asks again and again, each time on a new connection, and prints a line for each: when (ms since 1970), how long it took
/// (ms), `ok` or what was wrong, and who answered.
pub fn keep_asking(target: &Target, every: Duration, timeout: Duration) -> Result<()> {
    let start = Instant::now();
    let mut number = 0_u32;
    let socket = if target.datagrams { Some(socket_to(target)?) } else { None };
    while let Some(socket) = &socket {
        std::thread::sleep((every * number).saturating_sub(start.elapsed()));
        number += 1;
        let at = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default().as_millis();
        let began = Instant::now();
        let outcome = exchange(socket, timeout);
        let took = began.elapsed().as_millis();
        match outcome {
            Ok(body) => println!("{at} {took} ok {body}"),
            Err(error) => println!("{at} {took} failed {}", format!("{error:#}").replace('\n', " ")),
        }
    }
    loop {
        let due = every * number;
        std::thread::sleep(due.saturating_sub(start.elapsed()));
        number += 1;
        let target = target.clone();
        // A request that hangs does not hold up the next.
        std::thread::spawn(move || {
            let at = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default().as_millis();
            let began = Instant::now();
            let outcome = ask(&target, "GET", timeout);
            let took = began.elapsed().as_millis();
            match outcome {
                Ok((200, body)) => println!("{at} {took} ok {body}"),
                Ok((status, body)) => println!("{at} {took} status-{status} {body}"),
                Err(error) => println!("{at} {took} failed {}", format!("{error:#}").replace('\n', " ")),
            }
        });
    }
}
