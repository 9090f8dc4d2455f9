//! Nodes as k3s lays them out: a bridge `cni0` (hairpin, MTU 1450, bridge-nf-call-iptables), pods behind veths whose
//! host sides are named `veth` and eight hex digits, flannel's VXLAN between nodes (IPv4; IPv6 is there within a node and on
//! the nodes' network).
//!
//! A world goes away when it is dropped; when its process dies without (interrupted, killed), a little shell that
//! waits for that on a pipe cleans up. Two worlds at once do not see each other.

use std::{
    net::{Ipv4Addr, Ipv6Addr},
    path::{Path, PathBuf},
    process::{Child, Command, Stdio},
    sync::atomic::{AtomicU32, Ordering},
};

use anyhow::{Context as _, Result};

use super::netns::{NetNs, run};

/// A machine full of nodes.
#[derive(Debug)]
pub struct World {
    id: String,
    dir: PathBuf,
    lan: NetNs,
    nodes: Vec<Node>,
    /// Cleans up when its standard input ends.
    janitor: Option<Child>,
}

/// A node: its network, and its pods.
#[derive(Debug)]
pub struct Node {
    world: String,
    number: u8,
    ns: NetNs,
    pods: u8,
}

/// A pod's network.
#[derive(Clone, Debug)]
pub struct Pod {
    /// Its namespace.
    pub ns: NetNs,
    /// Its address.
    pub address: Ipv4Addr,
    /// Its IPv6 address.
    pub address6: Ipv6Addr,
    /// Host side of its veth, in the node's namespace.
    pub veth: String,
}

static COUNTER: AtomicU32 = AtomicU32::new(0);

impl World {
    /// Makes a world with `nodes` nodes (1 to 9).
    ///
    /// # Errors
    /// No root, or a missing program (`cargo xtask setup`).
    pub fn new(nodes: u8) -> Result<Self> {
        load_br_netfilter()?;
        let id = format!("brk{}x{}", std::process::id(), COUNTER.fetch_add(1, Ordering::Relaxed));
        let dir = PathBuf::from("/run/breaker-lab").join(&id);
        let janitor = start_janitor(&id, &dir).context("start the janitor")?;
        std::fs::create_dir_all(dir.join("bpf")).with_context(|| format!("make {} (root?)", dir.display()))?;
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

    /// What the names of its network namespaces begin with.
    #[must_use]
    pub fn id(&self) -> &str {
        &self.id
    }

    /// A directory of its own, gone with it.
    #[must_use]
    pub fn dir(&self) -> &Path {
        &self.dir
    }

    /// Where its own BPF file system is.
    #[must_use]
    pub fn bpffs(&self) -> PathBuf {
        self.dir.join("bpf")
    }

    /// The network that the nodes are on: an outside client's place.
    #[must_use]
    pub const fn lan(&self) -> &NetNs {
        &self.lan
    }

    /// A node by index, from 0.
    #[must_use]
    pub fn node(&self, index: usize) -> &Node {
        &self.nodes[index]
    }

    /// A node by index, from 0, to add pods to.
    pub fn node_mut(&mut self, index: usize) -> &mut Node {
        &mut self.nodes[index]
    }

    /// Leaves it up when it is dropped; returns the command that takes it away.
    pub fn keep(&mut self) -> String {
        // Its work is the user's now.
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
        // End of its standard input is its sign.
        drop(janitor.stdin.take());
        let _ = janitor.wait();
    }
}

/// Bridged packets pass netfilter only with this module; on a k3s node it is loaded.
fn load_br_netfilter() -> Result<()> {
    if Path::new("/proc/sys/net/bridge").exists() {
        return Ok(());
    }
    run(Command::new("modprobe").arg("br_netfilter"))
        .context("the lab needs the kernel module br_netfilter: modprobe br_netfilter")
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
    // A session of its own, so that an interrupt from the keyboard does not reach it.
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

    /// As flannel's vxlan backend sets a node up.
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

    /// Its network.
    #[must_use]
    pub const fn ns(&self) -> &NetNs {
        &self.ns
    }

    /// Its address on the nodes' network.
    #[must_use]
    pub fn address(&self) -> Ipv4Addr {
        Ipv4Addr::new(172, 31, 0, 10 + self.number)
    }

    /// Its IPv6 address there.
    #[must_use]
    pub fn address6(&self) -> Ipv6Addr {
        // fd31::11, as it is written: the digits of the node's number.
        Ipv6Addr::new(0xfd31, 0, 0, 0, 0, 0, 0, 0x10 + u16::from(self.number))
    }

    /// Adds a pod, as the bridge CNI plugin does.
    ///
    /// # Errors
    /// A failed command.
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

    /// Takes a pod away, as kubelet does: its processes are ended by whoever started them.
    ///
    /// # Errors
    /// A failed command.
    pub fn remove_pod(&mut self, pod: &Pod) -> Result<()> {
        self.ns.ip(&["link", "del", &pod.veth])?;
        run(Command::new("ip").args(["netns", "del", pod.ns.name()]))
    }
}
