//! Clients of the lab, in the same image as the service: they send one request, or requests until they are stopped.

use std::{
    io::{Read as _, Write as _},
    net::{SocketAddr, TcpStream, UdpSocket},
    time::{Duration, Instant, SystemTime, UNIX_EPOCH},
};

use anyhow::{Context as _, Result, bail};

/// A parsed URL.
#[derive(Clone, Debug)]
pub struct Target {
    address: SocketAddr,
    path: String,
    datagrams: bool,
}

impl Target {
    /// Parses `http://ADDRESS:PORT/PATH` or `udp://ADDRESS:PORT`. The port defaults to 80, the path to `/`.
    pub fn parse(url: &str) -> Result<Self> {
        let datagrams = url.starts_with("udp://");
        let rest = url.strip_prefix("http://").or_else(|| url.strip_prefix("udp://")).with_context(|| {
            format!("the URL {url:?} is not allowed; allowed: http://ADDRESS:PORT/PATH, udp://ADDRESS:PORT")
        })?;
        let slash = rest.find('/').unwrap_or(rest.len());
        let (authority, path) = rest.split_at(slash);
        let with_port = if authority.rsplit(']').next().is_some_and(|end| end.contains(':')) {
            authority.to_owned()
        } else {
            format!("{authority}:80")
        };
        let address = with_port.parse().with_context(|| format!("{authority:?} is not an IP address and port"))?;
        Ok(Self { address, datagrams, path: if path.is_empty() { "/".into() } else { path.to_owned() } })
    }
}

/// Opens a UDP socket that is connected to a target.
fn socket_to(target: &Target) -> Result<UdpSocket> {
    let socket = UdpSocket::bind(if target.address.is_ipv4() { "0.0.0.0:0" } else { "[::]:0" }).context("bind")?;
    socket.connect(target.address).context("connect the socket")?;
    Ok(socket)
}

/// Sends one datagram and returns the content of the next one that arrives.
fn exchange(socket: &UdpSocket, timeout: Duration) -> Result<String> {
    socket.set_read_timeout(Some(timeout))?;
    socket.send(b"?").context("send a datagram")?;
    let mut buffer = [0; 1500];
    let length = socket.recv(&mut buffer).context("receive the answer")?;
    Ok(String::from_utf8_lossy(&buffer[..length]).into_owned())
}

/// Sends one request on a new connection. Returns the status and the body; the status of a datagram's answer is 200.
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
    .context("send the request")?;
    let mut answer = Vec::new();
    let mut buffer = [0; 4096];
    loop {
        stream.set_read_timeout(Some(left()))?;
        match stream.read(&mut buffer).context("read the answer")? {
            0 => break,
            n => answer.extend_from_slice(&buffer[..n]),
        }
        if started.elapsed() > timeout {
            bail!("no answer in time");
        }
    }
    let text = String::from_utf8_lossy(&answer);
    let (head, body) = text.split_once("\r\n\r\n").context("the answer has no end of its header")?;
    let status = head.split(' ').nth(1).and_then(|word| word.parse().ok()).context("the answer has no status")?;
    Ok((status, body.to_owned()))
}

/// Sends a request every `every`, each on a new connection (datagrams: all on one socket), until the process is
/// stopped. Prints a line for each: the time (ms since 1970), the duration (ms), `ok` or what failed, and the body of
/// the answer.
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
        // On a thread of its own, so that a request that hangs does not delay the next one.
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
