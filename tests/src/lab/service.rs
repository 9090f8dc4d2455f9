//! Pods that run the dummy service, and what can go wrong with them.

use std::{
    io::{Read as _, Write as _},
    net::{Ipv4Addr, SocketAddrV4, TcpStream},
    process::{Child, Stdio},
    time::Duration,
};

use anyhow::{Context as _, Result, bail};
use serde::{Deserialize, Serialize};

use super::{
    binary, wait_for,
    world::{Node, Pod},
};

/// A way to fail. More come here.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub enum Fault {
    /// The service says 503 to checks and hangs on requests.
    FakeError,
    /// Its process is killed: connections are refused.
    Kill,
    /// Packets to the pod are dropped: nothing answers.
    BlackHole,
}

impl Fault {
    /// All of them, in the order of the story.
    pub const ALL: [Self; 3] = [Self::FakeError, Self::Kill, Self::BlackHole];

    /// As in JSON.
    #[must_use]
    pub const fn name(self) -> &'static str {
        match self {
            Self::FakeError => "fakeError",
            Self::Kill => "kill",
            Self::BlackHole => "blackHole",
        }
    }
}

/// Port of the dummy service in its pod.
pub const PORT: u16 = 80;

/// A pod with a running dummy service.
#[derive(Debug)]
pub struct ServicePod {
    /// Its network.
    pub pod: Pod,
    process: Option<Child>,
}

impl ServicePod {
    /// Adds a pod to a node and starts the service in it.
    ///
    /// # Errors
    /// A failed command, or a service that does not come up.
    pub fn start(node: &mut Node, name: &str) -> Result<Self> {
        let pod = node.add_pod(name)?;
        let mut service = Self { pod, process: None };
        service.run()?;
        Ok(service)
    }

    /// Address and port.
    #[must_use]
    pub const fn address(&self) -> SocketAddrV4 {
        SocketAddrV4::new(self.pod.address, PORT)
    }

    /// Process id of the service, while it lives.
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

    /// Asks the service from within its own pod, past everything: status and body.
    ///
    /// # Errors
    /// No connection, or no answer.
    pub fn ask(&self, method: &str, path: &str) -> Result<(u16, String)> {
        let request =
            format!("{method} {path} HTTP/1.1\r\nhost: lab\r\nconnection: close\r\ncontent-length: 0\r\n\r\n");
        self.pod.ns.enter(move || -> Result<(u16, String)> {
            let mut stream = TcpStream::connect((Ipv4Addr::LOCALHOST, PORT))?;
            stream.set_read_timeout(Some(Duration::from_secs(5)))?;
            stream.write_all(request.as_bytes())?;
            let mut answer = String::new();
            stream.read_to_string(&mut answer)?;
            let status = answer.split(' ').nth(1).and_then(|s| s.parse().ok()).context("no status")?;
            let body = answer.split_once("\r\n\r\n").map_or("", |(_, body)| body).to_owned();
            Ok((status, body))
        })?
    }

    /// Makes it fail.
    ///
    /// # Errors
    /// A fault that could not be brought about.
    pub fn inject(&mut self, fault: Fault) -> Result<()> {
        match fault {
            Fault::FakeError => self.post("/fakeerrormodeon"),
            Fault::Kill => {
                let mut process = self.process.take().context("it is dead already")?;
                process.kill().context("kill dummy-service")?;
                process.wait().context("wait for dummy-service")?;
                Ok(())
            }
            // In the pod's own namespace, on everything but its loopback, by which we still reach it.
            Fault::BlackHole => self.drop_rule("-I"),
        }
    }

    /// Makes it well again.
    ///
    /// # Errors
    /// A fault that could not be taken back.
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
            (status, body) => bail!("POST {path} answered {status} {body}"),
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
