//! The node's network devices, and which of them get the programs.

use std::collections::BTreeMap;

use rtnetlink::packet_route::link::{InfoKind, LinkAttribute, LinkInfo, LinkLayerType, LinkMessage, Prop};

use super::{Interface, Side, Survey, Wanted, uplinks::Uplinks};

/// A network device, as far as it matters here.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(super) struct Device {
    pub index: u32,
    pub name: String,
    alternative_names: Vec<String>,
    kind: Kind,
    /// Whether its frames have an Ethernet header.
    has_ethernet: bool,
    /// Whether its peer or lower device is in another network namespace.
    is_peer_elsewhere: bool,
    /// Index of the device below it, in this network namespace.
    lower: Option<u32>,
    /// Index of the bridge, bond or VRF that it belongs to.
    master: Option<u32>,
    /// Number of SR-IOV virtual functions.
    virtual_functions: u32,
}

/// The kinds of devices that are treated differently.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
enum Kind {
    #[default]
    Other,
    Veth,
    Netkit,
    Bridge,
    Vlan,
    /// macvlan, macvtap or ipvlan.
    Shared,
}

impl Device {
    /// Reads a message about a device.
    pub fn of(message: &LinkMessage) -> Self {
        let has_ethernet = matches!(message.header.link_layer_type, LinkLayerType::Ether | LinkLayerType::Loopback);
        let mut device = Self { index: message.header.index, has_ethernet, ..Self::default() };
        for attribute in &message.attributes {
            match attribute {
                LinkAttribute::IfName(name) => device.name.clone_from(name),
                LinkAttribute::PropList(properties) => {
                    device.alternative_names.extend(properties.iter().filter_map(|property| match property {
                        Prop::AltIfName(name) => Some(name.clone()),
                        _ => None,
                    }));
                }
                LinkAttribute::LinkInfo(infos) => {
                    for info in infos {
                        if let LinkInfo::Kind(kind) = info {
                            device.kind = Kind::of(kind);
                        }
                    }
                }
                LinkAttribute::LinkNetNsId(_) => device.is_peer_elsewhere = true,
                LinkAttribute::Link(index) => device.lower = Some(*index),
                LinkAttribute::Controller(index) => device.master = Some(*index).filter(|index| *index != 0),
                LinkAttribute::NumVf(number) => device.virtual_functions = *number,
                _ => {}
            }
        }
        device
    }

    /// All names of the device.
    fn names(&self) -> impl Iterator<Item = &str> {
        std::iter::once(&self.name).chain(&self.alternative_names).map(String::as_str)
    }

    /// Whether it is one end of a pair of devices whose other end is in another network namespace.
    const fn leads_elsewhere(&self) -> bool {
        matches!(self.kind, Kind::Veth | Kind::Netkit) && self.is_peer_elsewhere
    }
}

impl Kind {
    const fn of(kind: &InfoKind) -> Self {
        match kind {
            InfoKind::Veth => Self::Veth,
            InfoKind::Netkit => Self::Netkit,
            InfoKind::Bridge => Self::Bridge,
            InfoKind::Vlan => Self::Vlan,
            InfoKind::MacVlan | InfoKind::MacVtap | InfoKind::IpVlan => Self::Shared,
            _ => Self::Other,
        }
    }
}

const NO_ETHERNET: &str = "its packets have no Ethernet header, which the programs need; clients that come in on this \
                           interface are not redirected";
const VLAN_ABOVE: &str = "a VLAN is above it: the driver takes the tag off, so an answer would leave untagged";

/// All devices of this network namespace.
#[derive(Debug, Default)]
pub(super) struct Devices(BTreeMap<u32, Device>);

impl Devices {
    pub fn insert(&mut self, device: Device) {
        self.0.insert(device.index, device);
    }

    pub fn remove(&mut self, index: u32) {
        self.0.remove(&index);
    }

    pub fn get(&self, index: u32) -> Option<&Device> {
        self.0.get(&index)
    }

    /// Ports of a bridge that lead to the network and not to a pod.
    fn network_ports(&self, bridge: u32) -> impl Iterator<Item = &Device> {
        self.0.values().filter(move |port| port.master == Some(bridge) && !port.leads_elsewhere())
    }

    /// Whether the programs on the devices below see the device's packets. The packet would be decided twice if it had
    /// programs itself.
    pub fn is_covered_below(&self, device: &Device) -> bool {
        device.kind == Kind::Bridge && self.network_ports(device.index).next().is_some()
    }

    /// Decides which devices get the programs.
    pub fn survey(&self, what: &Wanted, uplinks: &Uplinks) -> Survey {
        let globs: Vec<_> = what.globs.iter().map(globset::Glob::compile_matcher).collect();
        let is_named = |device: &Device| device.names().any(|name| globs.iter().any(|glob| glob.is_match(name)));
        // If the node is a container, its uplink is a veth with a peer elsewhere, too, but there is no pod behind it.
        let is_pod = |device: &Device| device.leads_elsewhere() && !uplinks.contains(device.index);
        let is_uplink =
            |device: &Device| !is_pod(device) && (is_named(device) || what.uplinks && uplinks.contains(device.index));
        let mut chosen: BTreeMap<u32, Side> = BTreeMap::new();
        for device in self.0.values() {
            if is_pod(device) {
                if what.veths || is_named(device) {
                    chosen.insert(device.index, Side::Pod);
                }
            } else if is_uplink(device) {
                // net.bridge.bridge-nf-call-iptables: netfilter translates at the port, before the bridge's own programs.
                if self.is_covered_below(device) {
                    chosen.extend(self.network_ports(device.index).map(|port| (port.index, Side::Uplink)));
                } else {
                    chosen.insert(device.index, Side::Uplink);
                }
            }
        }
        // The device below a VLAN sees its packets, too.
        let below = |device: &Device| (device.kind == Kind::Vlan).then_some(device.lower).flatten();
        let doubled: Vec<u32> = chosen
            .keys()
            .filter_map(|index| self.0.get(index))
            .filter(|device| below(device).is_some_and(|lower| chosen.contains_key(&lower)))
            .map(|device| device.index)
            .collect();
        chosen.retain(|index, _| !doubled.contains(index));
        let has_vlan = |index: u32| self.0.values().any(|device| below(device) == Some(index));
        let interface = |(index, side): (u32, Side)| {
            let device = self.0.get(&index)?;
            let interface = Interface {
                index,
                name: device.name.clone(),
                side,
                is_veth: device.kind == Kind::Veth,
                obstacle: (!device.has_ethernet).then_some(NO_ETHERNET),
                xdp_obstacle: (side == Side::Uplink && has_vlan(index)).then_some(VLAN_ABOVE),
            };
            Some((index, interface))
        };
        Survey { interfaces: chosen.into_iter().filter_map(interface).collect(), notes: self.notes(what) }
    }

    /// What no program of breaker sees on this node, in words: pods without a host side, patterns without a device.
    fn notes(&self, what: &Wanted) -> Vec<String> {
        let mut notes = Vec::new();
        for glob in &what.globs {
            let matcher = glob.compile_matcher();
            if !self.0.values().any(|device| device.names().any(|name| matcher.is_match(name))) {
                notes.push(format!("agent.interfaces: no interface matches {}", glob.glob()));
            }
        }
        let shared: Vec<&str> =
            self.0.values().filter(|device| device.kind == Kind::Shared).map(|device| device.name.as_str()).collect();
        if !shared.is_empty() {
            notes.push(format!(
                "macvlan or ipvlan devices exist ({}): connections of pods behind such devices pass no interface of the \
                 node, so they are not redirected",
                shared.join(", ")
            ));
        }
        for device in self.0.values().filter(|device| device.virtual_functions > 0) {
            notes.push(format!(
                "{} has {} SR-IOV virtual functions: connections of pods behind them pass no interface of the node, so \
                 they are not redirected",
                device.name, device.virtual_functions
            ));
        }
        notes
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use globset::Glob;

    fn device(index: u32, name: &str, kind: Kind) -> Device {
        Device { index, name: name.into(), kind, has_ethernet: true, ..Device::default() }
    }

    fn pod(index: u32, kind: Kind) -> Device {
        Device { is_peer_elsewhere: true, ..device(index, &format!("pod{index}"), kind) }
    }

    fn survey(devices: Vec<Device>, uplinks: &[u32], globs: &[&str]) -> Survey {
        let mut all = Devices::default();
        devices.into_iter().for_each(|device| all.insert(device));
        let globs = globs.iter().map(|glob| Glob::new(glob).unwrap()).collect();
        all.survey(&Wanted { veths: true, uplinks: true, globs }, &Uplinks::of(uplinks))
    }

    fn sides(survey: &Survey) -> Vec<(u32, Side)> {
        survey.interfaces.values().map(|interface| (interface.index, interface.side)).collect()
    }

    /// TRIALS C2.
    #[test]
    fn pods_are_behind_veths_and_netkits() {
        use Kind::{Netkit, Other, Veth};
        let here = device(4, "veth-here", Veth);
        let found =
            survey(vec![pod(1, Veth), pod(2, Netkit), device(3, "eth0", Other), here, pod(5, Veth)], &[3, 5], &[]);
        assert_eq!(sides(&found), [(1, Side::Pod), (2, Side::Pod), (3, Side::Uplink), (5, Side::Uplink)]);
        let named = survey(vec![pod(2, Netkit)], &[], &["pod*"]);
        assert_eq!(sides(&named), [(2, Side::Pod)], "a pod is a pod, also if it is named");
    }

    /// TRIALS C1.
    #[test]
    fn a_device_without_an_ethernet_header_has_an_obstacle() {
        let tunnel = Device { has_ethernet: false, ..device(7, "wg0", Kind::Other) };
        assert_eq!(survey(vec![tunnel], &[7], &[]).interfaces[&7].obstacle, Some(NO_ETHERNET));
    }

    /// TRIALS C3.
    #[test]
    fn the_ports_of_a_bridge_stand_for_an_uplink() {
        let port = |index, name| Device { master: Some(1), ..device(index, name, Kind::Other) };
        let of_pod = Device { master: Some(1), ..pod(4, Kind::Veth) };
        let bridge = || device(1, "br0", Kind::Bridge);
        let found = survey(vec![bridge(), port(2, "eth0"), port(3, "tap0"), of_pod], &[1], &[]);
        assert_eq!(sides(&found), [(2, Side::Uplink), (3, Side::Uplink), (4, Side::Pod)]);
        assert_eq!(sides(&survey(vec![bridge()], &[1], &[])), [(1, Side::Uplink)]);
    }

    /// TRIALS B6: two programs must not decide about one packet.
    #[test]
    fn a_vlan_and_the_device_below_it() {
        let vlan = || Device { lower: Some(1), ..device(2, "eth0.5", Kind::Vlan) };
        let both = survey(vec![device(1, "eth0", Kind::Other), vlan()], &[1, 2], &[]);
        assert_eq!(sides(&both), [(1, Side::Uplink)]);
        assert_eq!(both.interfaces[&1].xdp_obstacle, Some(VLAN_ABOVE));
        let upper = survey(vec![device(1, "eth0", Kind::Other), vlan()], &[2], &[]);
        assert_eq!(sides(&upper), [(2, Side::Uplink)]);
        assert_eq!(upper.interfaces[&2].xdp_obstacle, None);
    }

    /// TRIALS C4.
    #[test]
    fn names_patterns_and_what_nobody_sees() {
        let other_name = Device { alternative_names: vec!["enp3s0".into()], ..device(1, "eth0", Kind::Other) };
        let shared = device(2, "mac0", Kind::Shared);
        let functions = Device { virtual_functions: 4, ..device(3, "eth1", Kind::Other) };
        let found = survey(vec![other_name, shared, functions], &[], &["enp*", "wlan*"]);
        assert_eq!(sides(&found), [(1, Side::Uplink)]);
        let notes = found.notes.join("\n");
        assert!(notes.contains("no interface matches wlan*") && !notes.contains("enp*"), "{notes}");
        assert!(notes.contains("(mac0)") && notes.contains("eth1 has 4 SR-IOV"), "{notes}");
    }
}
