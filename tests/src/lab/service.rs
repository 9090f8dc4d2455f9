//! Pods that run the dummy service, and the faults that can be injected into them.

use std::{
    io::{Read as _, Write as _},
    net::{Ipv4Addr, SocketAddrV4, TcpStream},
    process::{Child, Stdio},
    time::Duration,
};

use anyhow::{Context as _, Result, bail};
use rustix::process::{Pid, Signal, kill_process};
use serde::{Deserialize, Serialize};

use super::{
    binary, wait_for,
    world::{Node, Pod},
};

/// A kind of fault.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub enum Fault {
    /// The service answers checks with 503, and requests hang.
    FakeError,
    /// The service's process is killed, so connections are refused.
    Kill,
    /// Packets to the pod are dropped, so nothing answers.
    BlackHole,
}

impl Fault {
    /// All faults, in the order in which the demo shows them.
    pub const ALL: [Self; 3] = [Self::FakeError, Self::Kill, Self::BlackHole];

    /// Name of the fault, as in JSON.
    #[must_use]
    pub const fn name(self) -> &'static str {
        match self {
            Self::FakeError => "fakeError",
            Self::Kill => "kill",
            Self::BlackHole => "blackHole",
        }
    }
}

/// TCP and UDP port of the dummy service in its pod.
pub const PORT: u16 = 80;

/// A pod with a running dummy service.
#[derive(Debug)]
pub struct ServicePod {
    /// The pod.
    pub pod: Pod,
    process: Option<Child>,
}

impl ServicePod {
    /// Adds a pod to a node and starts the service in it. Waits until the service answers.
    ///
    /// # Errors
    /// Fails if a command fails, or if the service does not answer within 10 s.
    pub fn start(node: &mut Node, name: &str) -> Result<Self> {
        let pod = node.add_pod(name)?;
        let mut service = Self { pod, process: None };
        service.run()?;
        Ok(service)
    }

    /// IPv4 address and port of the service.
    #[must_use]
    pub const fn address(&self) -> SocketAddrV4 {
        SocketAddrV4::new(self.pod.address, PORT)
    }

    /// Process id of the service; `None` after [`Fault::Kill`].
    #[must_use]
    pub fn pid(&self) -> Option<u32> {
        self.process.as_ref().map(Child::id)
    }

    fn run(&mut self) -> Result<()> {
        let child = self
            .pod
            .ns
            .command(binary("dummy-service")?)
            .args(["--listen", &format!("[::]:{PORT}")])
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .spawn()
            .context("start dummy-service")?;
        self.process = Some(child);
        wait_for("the dummy service to listen", Duration::from_secs(10), || self.ask("GET", "/alive").is_ok())
    }

    /// Sends the service a request over the pod's own loopback interface, which no program or rule affects. Returns the
    /// status and the body.
    ///
    /// # Errors
    /// Fails if the service does not accept the connection, or does not answer within 5 s.
    pub fn ask(&self, method: &str, path: &str) -> Result<(u16, String)> {
        let request =
            format!("{method} {path} HTTP/1.1\r\nhost: lab\r\nconnection: close\r\ncontent-length: 0\r\n\r\n");
        self.pod.ns.enter(move || -> Result<(u16, String)> {
            let mut stream = TcpStream::connect((Ipv4Addr::LOCALHOST, PORT))?;
            stream.set_read_timeout(Some(Duration::from_secs(5)))?;
            stream.write_all(request.as_bytes())?;
            let mut answer = String::new();
            stream.read_to_string(&mut answer)?;
            let status = answer.split(' ').nth(1).and_then(|s| s.parse().ok()).context("the answer has no status")?;
            let body = answer.split_once("\r\n\r\n").map_or("", |(_, body)| body).to_owned();
            Ok((status, body))
        })?
    }

    /// Sends the service's process a signal.
    ///
    /// # Errors
    /// Fails if the service is not running.
    pub fn signal(&self, signal: Signal) -> Result<()> {
        let process = self.process.as_ref().context("dummy-service is not running")?;
        let pid = i32::try_from(process.id()).ok().and_then(Pid::from_raw).context("invalid process id")?;
        kill_process(pid, signal).context("signal dummy-service")
    }

    /// Injects a fault.
    ///
    /// # Errors
    /// Fails if the fault cannot be injected; [`Fault::Kill`] also if the service is not running.
    pub fn inject(&mut self, fault: Fault) -> Result<()> {
        match fault {
            Fault::FakeError => self.post("/fakeerrormodeon"),
            Fault::Kill => {
                let mut process = self.process.take().context("dummy-service is not running")?;
                process.kill().context("kill dummy-service")?;
                process.wait().context("wait for dummy-service")?;
                Ok(())
            }
            // In the pod's own namespace, on all interfaces but loopback, over which the lab still reaches the service.
            Fault::BlackHole => self.drop_rule("-I"),
        }
    }

    /// Removes a fault.
    ///
    /// # Errors
    /// Fails if the fault cannot be removed, or if a restarted service does not answer within 10 s.
    pub fn heal(&mut self, fault: Fault) -> Result<()> {
        match fault {
            Fault::FakeError => self.post("/fakeerrormodeoff"),
            Fault::Kill => self.run(),
            Fault::BlackHole => self.drop_rule("-D"),
        }
    }

    fn drop_rule(&self, action: &str) -> Result<()> {
        let rule = ["-w", "-t", "raw", action, "PREROUTING", "!", "-i", "lo", "-j", "DROP"];
        self.pod.ns.output("iptables", &rule).map(drop)
    }

    fn post(&self, path: &str) -> Result<()> {
        match self.ask("POST", path)? {
            (200, _) => Ok(()),
            (status, body) => bail!("POST {path}: answered {status} {body}, expected 200"),
        }
    }
}

impl Drop for ServicePod {
    fn drop(&mut self) {
        if let Some(process) = &mut self.process {
            let _ = process.kill();
            let _ = process.wait();
        }
    }
}
