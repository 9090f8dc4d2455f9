//! Nodes like those of k3s: a bridge `cni0` (hairpin, MTU 1450, bridge-nf-call-iptables), pods behind veths whose host
//! sides are named `veth` and eight hex digits, and flannel's VXLAN between nodes (IPv4 only; IPv6 works within a node
//! and on the network of the nodes).
//!
//! A world is removed when it is dropped. If its process is interrupted or killed, a shell process that waits for the
//! end of a pipe removes it. Several worlds can exist at once and do not see each other.

use std::{
    net::{Ipv4Addr, Ipv6Addr},
    path::{Path, PathBuf},
    process::{Child, Command, Stdio},
    sync::atomic::{AtomicU32, Ordering},
};

use anyhow::{Context as _, Result};

use super::netns::{NetNs, run};

/// A set of nodes and the network that connects them.
#[derive(Debug)]
pub struct World {
    id: String,
    dir: PathBuf,
    lan: NetNs,
    nodes: Vec<Node>,
    /// Shell process that removes the world when its standard input ends; `None` if the world is to stay.
    janitor: Option<Child>,
}

/// A node: a network namespace and its pods.
#[derive(Debug)]
pub struct Node {
    world: String,
    number: u8,
    ns: NetNs,
    pods: u8,
}

/// A pod: a network namespace behind a veth.
#[derive(Clone, Debug)]
pub struct Pod {
    /// Network namespace of the pod.
    pub ns: NetNs,
    /// IPv4 address.
    pub address: Ipv4Addr,
    /// IPv6 address.
    pub address6: Ipv6Addr,
    /// Name of the veth's host side, which is in the node's namespace.
    pub veth: String,
}

static COUNTER: AtomicU32 = AtomicU32::new(0);

impl World {
    /// Creates a world with `nodes` nodes (0 to 9).
    ///
    /// # Errors
    /// Fails without root, or if a program is missing (`cargo xtask setup` installs them).
    pub fn new(nodes: u8) -> Result<Self> {
        load_br_netfilter()?;
        let id = format!("brk{}x{}", std::process::id(), COUNTER.fetch_add(1, Ordering::Relaxed));
        let dir = PathBuf::from("/run/breaker-lab").join(&id);
        let janitor = start_janitor(&id, &dir).context("start the process that cleans up")?;
        std::fs::create_dir_all(dir.join("bpf")).with_context(|| format!("create {} (root?)", dir.display()))?;
        run(Command::new("mount").args(["-t", "bpf", "bpf"]).arg(dir.join("bpf"))).context("mount a bpffs (root?)")?;
        let lan = NetNs::create(&format!("{id}-lan"))?;
        lan.ip(&["link", "add", "br0", "type", "bridge"])?;
        lan.ip(&["addr", "add", "172.31.0.1/24", "dev", "br0"])?;
        lan.ip(&["addr", "add", "fd31::1/64", "dev", "br0", "nodad"])?;
        lan.ip(&["link", "set", "br0", "up"])?;
        let mut world = Self { id, dir, lan, nodes: Vec::new(), janitor: Some(janitor) };
        for number in 1..=nodes {
            let node = Node::new(&world.id, number, nodes, &world.lan)?;
            world.nodes.push(node);
        }
        Ok(world)
    }

    /// Identifier of the world; the names of its network namespaces begin with it.
    #[must_use]
    pub fn id(&self) -> &str {
        &self.id
    }

    /// Directory for the world's files; removed with the world.
    #[must_use]
    pub fn dir(&self) -> &Path {
        &self.dir
    }

    /// Mount point of the world's own BPF file system.
    #[must_use]
    pub fn bpffs(&self) -> PathBuf {
        self.dir.join("bpf")
    }

    /// Namespace of the network that connects the nodes. Clients outside of the cluster run there.
    #[must_use]
    pub const fn lan(&self) -> &NetNs {
        &self.lan
    }

    /// A node by index, from 0.
    #[must_use]
    pub fn node(&self, index: usize) -> &Node {
        &self.nodes[index]
    }

    /// A node by index, from 0, to add pods to or remove pods from.
    pub fn node_mut(&mut self, index: usize) -> &mut Node {
        &mut self.nodes[index]
    }

    /// Keeps the world when it is dropped. Returns the shell command that removes it.
    pub fn keep(&mut self) -> String {
        // From now on the user removes the world.
        if let Some(mut janitor) = self.janitor.take() {
            let _ = janitor.kill();
            let _ = janitor.wait();
        }
        cleanup_script(&self.id, &self.dir)
    }
}

impl Drop for World {
    fn drop(&mut self) {
        let Some(mut janitor) = self.janitor.take() else { return };
        // The shell removes the world when its standard input ends.
        drop(janitor.stdin.take());
        let _ = janitor.wait();
    }
}

/// Loads the kernel module that passes bridged packets through netfilter. k3s nodes have it loaded.
fn load_br_netfilter() -> Result<()> {
    if Path::new("/proc/sys/net/bridge").exists() {
        return Ok(());
    }
    run(Command::new("modprobe").arg("br_netfilter"))
        .context("the lab needs the kernel module br_netfilter; load it: modprobe br_netfilter")
}

fn cleanup_script(id: &str, dir: &Path) -> String {
    format!(
        "for ns in $(ip netns list | awk '/^{id}-/{{print $1}}'); do ip netns pids $ns | xargs -r kill -9; ip netns del $ns; done; \
         umount -l {dir}/bpf; rm -rf {dir}",
        dir = dir.display()
    )
}

fn start_janitor(id: &str, dir: &Path) -> Result<Child> {
    let script = format!("cat >/dev/null; {}", cleanup_script(id, dir));
    // In a session of its own, so that an interrupt from the keyboard does not reach it.
    Command::new("setsid")
        .args(["sh", "-c", &script])
        .stdin(Stdio::piped())
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        .spawn()
        .context("start setsid sh")
}

impl Node {
    fn new(world: &str, number: u8, nodes: u8, lan: &NetNs) -> Result<Self> {
        let ns = NetNs::create(&format!("{world}-node{number}"))?;
        let port = format!("node{number}");
        lan.ip(&["link", "add", &port, "type", "veth", "peer", "name", "eth0", "netns", ns.name()])?;
        lan.ip(&["link", "set", &port, "master", "br0", "up"])?;
        ns.ip(&["addr", "add", &format!("172.31.0.1{number}/24"), "dev", "eth0"])?;
        ns.ip(&["addr", "add", &format!("fd31::1{number}/64"), "dev", "eth0", "nodad"])?;
        ns.ip(&["link", "set", "eth0", "up"])?;
        ns.ip(&["route", "add", "default", "via", "172.31.0.1"])?;
        ns.ip(&["link", "add", "cni0", "mtu", "1450", "type", "bridge"])?;
        ns.ip(&["addr", "add", &format!("10.42.{number}.1/24"), "dev", "cni0"])?;
        ns.ip(&["addr", "add", &format!("fd42:0:0:{number}::1/64"), "dev", "cni0", "nodad"])?;
        ns.ip(&["link", "set", "cni0", "up"])?;
        ns.sysctl(&[
            "net.ipv4.ip_forward=1",
            "net.ipv6.conf.all.forwarding=1",
            "net.ipv4.conf.all.rp_filter=0",
            "net.ipv4.conf.default.rp_filter=0",
            "net.bridge.bridge-nf-call-iptables=1",
        ])?;
        let node = Self { world: world.to_owned(), number, ns, pods: 0 };
        node.flannel(nodes)?;
        Ok(node)
    }

    /// Sets up flannel's VXLAN interface, with the routes and neighbors of the other nodes.
    fn flannel(&self, nodes: u8) -> Result<()> {
        let number = self.number;
        let local = format!("172.31.0.1{number}");
        let vxlan = ["link", "add", "flannel.1", "type", "vxlan", "id", "1", "local", &local, "dev", "eth0"];
        self.ns.ip(&[&vxlan[..], &["dstport", "8472", "nolearning"]].concat())?;
        let mac = |n: u8| format!("02:42:0a:2a:00:0{n}");
        self.ns.ip(&["link", "set", "flannel.1", "address", &mac(number), "mtu", "1450", "up"])?;
        self.ns.ip(&["addr", "add", &format!("10.42.{number}.0/32"), "dev", "flannel.1"])?;
        for peer in (1..=nodes).filter(|peer| *peer != number) {
            let gateway = format!("10.42.{peer}.0");
            let (mac, host) = (mac(peer), format!("172.31.0.1{peer}"));
            self.ns.output("bridge", &["fdb", "add", &mac, "dev", "flannel.1", "dst", &host])?;
            self.ns.ip(&["neigh", "add", &gateway, "lladdr", &mac, "dev", "flannel.1", "nud", "permanent"])?;
            let subnet = format!("10.42.{peer}.0/24");
            self.ns.ip(&["route", "add", &subnet, "via", &gateway, "dev", "flannel.1", "onlink"])?;
        }
        Ok(())
    }

    /// Network namespace of the node.
    #[must_use]
    pub const fn ns(&self) -> &NetNs {
        &self.ns
    }

    /// IPv4 address on the network of the nodes.
    #[must_use]
    pub fn address(&self) -> Ipv4Addr {
        Ipv4Addr::new(172, 31, 0, 10 + self.number)
    }

    /// IPv6 address on the network of the nodes.
    #[must_use]
    pub fn address6(&self) -> Ipv6Addr {
        // The address is written fd31::1N with the decimal number N of the node, hence 0x10 + N.
        Ipv6Addr::new(0xfd31, 0, 0, 0, 0, 0, 0, 0x10 + u16::from(self.number))
    }

    /// Adds a pod, connected as the bridge CNI plugin does.
    ///
    /// # Errors
    /// Fails if a command fails; the error contains the command and its output.
    pub fn add_pod(&mut self, name: &str) -> Result<Pod> {
        self.pods += 1;
        let address = Ipv4Addr::new(10, 42, self.number, 1 + self.pods);
        let ns = NetNs::create(&format!("{}-{name}", self.world))?;
        let veth = format!("veth{:08x}", fastrand::u32(..));
        self.ns.ip(&[
            "link",
            "add",
            &veth,
            "mtu",
            "1450",
            "type",
            "veth",
            "peer",
            "name",
            "eth0",
            "mtu",
            "1450",
            "netns",
            ns.name(),
        ])?;
        self.ns.ip(&["link", "set", &veth, "master", "cni0", "up"])?;
        self.ns.ip(&["link", "set", &veth, "type", "bridge_slave", "hairpin", "on"])?;
        ns.ip(&["addr", "add", &format!("{address}/24"), "dev", "eth0"])?;
        let number = u16::from(self.number);
        let address6 = Ipv6Addr::new(0xfd42, 0, 0, number, 0, 0, 0, 1 + u16::from(self.pods));
        ns.ip(&["addr", "add", &format!("{address6}/64"), "dev", "eth0", "nodad"])?;
        ns.ip(&["link", "set", "eth0", "up"])?;
        ns.ip(&["route", "add", "default", "via", &format!("10.42.{number}.1")])?;
        ns.ip(&["route", "add", "default", "via", &format!("fd42:0:0:{number}::1")])?;
        Ok(Pod { ns, address, address6, veth })
    }

    /// Removes a pod's veth and namespace. The caller must stop the pod's processes first.
    ///
    /// # Errors
    /// Fails if a command fails; the error contains the command and its output.
    pub fn remove_pod(&mut self, pod: &Pod) -> Result<()> {
        self.ns.ip(&["link", "del", &pod.veth])?;
        run(Command::new("ip").args(["netns", "del", pod.ns.name()]))
    }
}
