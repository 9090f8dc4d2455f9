//! Services in iptables as kube-proxy 1.34 writes them, and flannel's rules beside them. This includes the masquerade
//! marks, and the rule that drops packets in conntrack state INVALID: translations at a wrong hook run into it.

use std::{
    fmt::Write as _,
    net::{Ipv4Addr, SocketAddrV4},
};

use anyhow::Result;

use super::netns::NetNs;

/// A Service of type ClusterIP.
#[derive(Clone, Debug)]
pub struct Service {
    /// Name, which becomes part of chain names and comments.
    pub name: String,
    /// Cluster IP and port.
    pub vip: SocketAddrV4,
    /// Endpoints.
    pub endpoints: Vec<SocketAddrV4>,
    /// Protocols of the port: `tcp`, `udp`.
    pub protocols: &'static [&'static str],
}

/// Subnet of the lab's cluster IPs.
pub const VIPS: &str = "10.43.0.0/24";

const PODS: &str = "10.42.0.0/16";

/// Adds the chains and rules that do not depend on Services.
///
/// # Errors
/// Fails if iptables-restore fails; the error contains its output.
pub fn base(ns: &NetNs) -> Result<()> {
    ns.iptables_restore(&format!(
        "*nat
:KUBE-SERVICES - [0:0]
:KUBE-POSTROUTING - [0:0]
:KUBE-MARK-MASQ - [0:0]
:FLANNEL-POSTRTG - [0:0]
-A PREROUTING -m comment --comment \"kubernetes service portals\" -j KUBE-SERVICES
-A OUTPUT -m comment --comment \"kubernetes service portals\" -j KUBE-SERVICES
-A POSTROUTING -m comment --comment \"kubernetes postrouting rules\" -j KUBE-POSTROUTING
-A POSTROUTING -m comment --comment \"flanneld masq\" -j FLANNEL-POSTRTG
-A KUBE-MARK-MASQ -j MARK --set-xmark 0x4000/0x4000
-A KUBE-POSTROUTING -m mark ! --mark 0x4000/0x4000 -j RETURN
-A KUBE-POSTROUTING -j MARK --set-xmark 0x4000/0x0
-A KUBE-POSTROUTING -m comment --comment \"kubernetes service traffic requiring SNAT\" -j MASQUERADE --random-fully
-A FLANNEL-POSTRTG -s {PODS} -d {PODS} -j RETURN
-A FLANNEL-POSTRTG -s {PODS} ! -d 224.0.0.0/4 -j MASQUERADE --random-fully
COMMIT
*filter
:KUBE-FORWARD - [0:0]
:FLANNEL-FWD - [0:0]
-A FORWARD -m comment --comment \"kubernetes forwarding rules\" -j KUBE-FORWARD
-A FORWARD -m comment --comment \"flanneld forward\" -j FLANNEL-FWD
-A KUBE-FORWARD -m conntrack --ctstate INVALID -j DROP
-A KUBE-FORWARD -m comment --comment \"kubernetes forwarding rules\" -m mark --mark 0x4000/0x4000 -j ACCEPT
-A KUBE-FORWARD -m conntrack --ctstate RELATED,ESTABLISHED -j ACCEPT
-A FLANNEL-FWD -s {PODS} -j ACCEPT
-A FLANNEL-FWD -d {PODS} -j ACCEPT
COMMIT
"
    ))
}

/// Adds a Service's chains and rules.
///
/// # Errors
/// Fails if iptables-restore fails; the error contains its output.
pub fn add_service(ns: &NetNs, service: &Service) -> Result<()> {
    service.protocols.iter().try_for_each(|protocol| ns.iptables_restore(&rules(service, protocol)))
}

/// A Service's rules for one protocol. Like kube-proxy, each port and protocol has chains of its own.
fn rules(service: &Service, protocol: &str) -> String {
    let name = &format!("{}{}", service.name, if protocol == "tcp" { "" } else { protocol });
    let chain = format!("KUBE-SVC-{}", tag(name));
    let (ip, port) = (service.vip.ip(), service.vip.port());
    let mut rules = format!("*nat\n:{chain} - [0:0]\n");
    for endpoint in &service.endpoints {
        let _ = writeln!(rules, ":{} - [0:0]", sep(name, endpoint));
    }
    let _ = writeln!(
        rules,
        "-A KUBE-SERVICES -d {ip}/32 -p {protocol} -m comment --comment \"default/{name} cluster IP\" -m {protocol} --dport {port} -j {chain}\n\
         -A {chain} ! -s {PODS} -d {ip}/32 -p {protocol} -m comment --comment \"default/{name} cluster IP\" -m {protocol} --dport {port} -j KUBE-MARK-MASQ"
    );
    let count = service.endpoints.len();
    for (i, endpoint) in service.endpoints.iter().enumerate() {
        let left = count - i;
        let pick = if left > 1 {
            #[expect(clippy::cast_precision_loss, reason = "a handful of endpoints")]
            let probability = 1.0 / left as f64;
            format!("-m statistic --mode random --probability {probability:.11} ")
        } else {
            String::new()
        };
        let sep = sep(name, endpoint);
        let _ = writeln!(
            rules,
            "-A {chain} {pick}-j {sep}\n-A {sep} -s {}/32 -j KUBE-MARK-MASQ\n-A {sep} -p {protocol} -m {protocol} -j DNAT --to-destination {endpoint}",
            endpoint.ip()
        );
    }
    rules.push_str("COMMIT\n");
    rules
}

/// End of a chain's name. kube-proxy uses 16 characters of a hash; the lab uses the Service's name, which is readable.
fn tag(name: &str) -> String {
    let mut tag: String = name.to_uppercase().chars().filter(char::is_ascii_alphanumeric).collect();
    tag.truncate(16);
    tag
}

fn sep(name: &str, endpoint: &SocketAddrV4) -> String {
    let ip = u32::from(*endpoint.ip());
    let mut name = tag(name);
    // A chain's name has at most 28 characters.
    name.drain(..name.len().saturating_sub(6));
    format!("KUBE-SEP-{name}{ip:08X}{:04X}", endpoint.port())
}

/// Cluster IP and port of the lab's Service number `index`: 10.43.0.(10 + `index`), port 8080.
#[must_use]
pub fn vip(index: u8) -> SocketAddrV4 {
    SocketAddrV4::new(Ipv4Addr::new(10, 43, 0, 10 + index), 8080)
}
