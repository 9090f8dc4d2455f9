//! The choices of kube-proxy's own code, as a table, and properties of the function.

use std::{collections::BTreeSet, sync::Arc};

use proptest::prelude::*;
use serde_json::{Value, json};

use super::*;
use crate::source::kube::{
    endpoints::{Family, Twice},
    objects::EndpointSlice,
};

const CASES: &str = include_str!("kube_proxy_cases.txt");

/// One row of the table.
struct Case {
    name: &'static str,
    service: &'static str,
    slices: Vec<Arc<EndpointSlice>>,
    proxies: Vec<KubeProxy>,
    /// Cluster IP, from outside, from this node.
    expected: [&'static str; 3],
    health: &'static str,
}

fn cases() -> Vec<Case> {
    let rows = CASES.lines().filter(|line| !line.starts_with('#'));
    rows.map(|line| {
        let fields: Vec<&str> = line.split(" | ").collect();
        let [name, _, service, endpoints, versions, cluster, outside, here, health] = fields[..] else {
            panic!("not nine fields: {line}")
        };
        let minors: &[u32] = match versions {
            "old" => &[34, 35],
            "new" => &[36, 37, 0],
            _ => &[34, 35, 36, 37, 0],
        };
        let proxies = minors.iter().map(|minor| KubeProxy { minor: *minor, ipvs: false }).collect();
        let expected = [cluster, outside, here].map(str::trim);
        Case { name, service, slices: slices(endpoints), proxies, expected, health }
    })
    .collect()
}

fn slices(text: &str) -> Vec<Arc<EndpointSlice>> {
    let numbered = text.split(" // ").enumerate();
    numbered.map(|(number, text)| Arc::new(serde_json::from_value(slice(number, text)).unwrap())).collect()
}

/// A slice like `[s2 port q=81] {udp} 1@n2/a RSt z:a; 2@n3/b RSt`, as Kubernetes writes it.
fn slice(number: usize, text: &str) -> Value {
    let (head, rest) = text.strip_prefix('[').and_then(|rest| rest.split_once(']')).unwrap_or(("s1 port p=80", text));
    let (_, port) = head.split_once(" port ").unwrap();
    let (port_name, port_number) = port.split_once('=').unwrap();
    let has = |flag: &str| rest.contains(flag);
    let mut port = json!({ "name": port_name, "port": port_number.parse::<u16>().unwrap(), "protocol": "TCP" });
    if has("{noport}") {
        port.as_object_mut().unwrap().remove("port");
    }
    if has("{noname}") {
        port.as_object_mut().unwrap().remove("name");
    }
    if has("{udp}") {
        port["protocol"] = "UDP".into();
    }
    let family = match () {
        () if has("{fqdn}") => "FQDN",
        () if has("{ipv6}") => "IPv6",
        () => "IPv4",
    };
    let endpoints: Vec<Value> =
        rest.split(';').filter(|text| text.contains('@')).map(|text| endpoint(text, rest)).collect();
    json!({ "metadata": { "name": format!("s{number}") }, "addressType": family, "ports": [port], "endpoints": endpoints })
}

fn endpoint(text: &str, slice: &str) -> Value {
    let mut words = text.split_whitespace().filter(|word| !word.starts_with('{') || *word == "{}");
    let (number, place) = words.next().unwrap().split_once('@').unwrap();
    let (node, zone) = place.split_once('/').map_or((place, None), |(node, zone)| (node, Some(zone)));
    let address = match () {
        () if slice.contains("{ipv6}") => format!("fd00::{number}"),
        () if slice.contains("{fqdn}") => format!("host{number}.example"),
        () => format!("10.1.0.{number}"),
    };
    let mut endpoint = json!({ "addresses": [address], "conditions": {} });
    if slice.contains("{twoaddr}") {
        endpoint["addresses"] = json!([address, "10.1.0.200"]);
    }
    if node != "-" {
        endpoint["nodeName"] = node.into();
    }
    if let Some(zone) = zone {
        endpoint["zone"] = zone.into();
    }
    for letter in words.next().unwrap_or_default().chars().filter(|letter| *letter != '.') {
        let name = match letter.to_ascii_lowercase() {
            'r' => "ready",
            's' => "serving",
            _ => "terminating",
        };
        endpoint["conditions"][name] = letter.is_ascii_uppercase().into();
    }
    for hint in words {
        let names = |list: &str| list.split(',').map(|name| json!({ "name": name })).collect::<Vec<_>>();
        match hint.split_once(':') {
            Some(("z", zones)) => endpoint["hints"]["forZones"] = names(zones).into(),
            Some((_, nodes)) => endpoint["hints"]["forNodes"] = names(nodes).into(),
            None => endpoint["hints"] = json!({}),
        }
    }
    endpoint
}

fn policies(service: &str) -> Policies {
    Policies {
        internal_local: service.contains("iL"),
        external_local: service.contains("eL"),
        external: !service.starts_with("CIP"),
    }
}

fn place(service: &str) -> Place<'static> {
    Place { node: "n1", zone: (!service.contains("nozone")).then_some("a") }
}

/// The endpoints in the words of the table.
fn shown(target: &Target<'_>) -> String {
    let endpoints = match target {
        Target::Drop => return "DROP".into(),
        Target::Reject => return "REJECT".into(),
        Target::Endpoints(endpoints) => endpoints,
    };
    let mut names: Vec<(u32, u16)> = endpoints
        .iter()
        .map(|e| (e.address.ip().to_string().rsplit('.').next().unwrap().parse().unwrap(), e.address.port()))
        .collect();
    names.sort_unstable();
    let name = |(number, port): &(u32, u16)| if *port == 80 { number.to_string() } else { format!("{number}:{port}") };
    names.iter().map(name).collect::<Vec<_>>().join(",")
}

fn endpoints(case: &Case, proxy: KubeProxy) -> Endpoints {
    let port = if case.name == "S2" { "q" } else { "p" };
    Endpoints::of(&case.slices, Some(port), "TCP", Family::V4, proxy.twice("n1"))
}

#[test]
fn kube_proxys_own_code_decides_the_same() {
    let mut wrong = Vec::new();
    let cases = cases();
    let names: BTreeSet<&str> = cases.iter().map(|case| case.name).collect();
    assert_eq!(names.len(), 103);
    for case in &cases {
        for proxy in &case.proxies {
            let endpoints = endpoints(case, *proxy);
            let policies = policies(case.service);
            let choice = Choice::of(&endpoints, place(case.service), policies, *proxy);
            for (way, expected) in [Way::ClusterIp, Way::FromOutside, Way::FromThisNode].into_iter().zip(case.expected)
            {
                let got = shown(&choice.target(way));
                if expected != "n/a" && !expected.split(" or ").any(|allowed| allowed == got) {
                    wrong.push(format!("{} {proxy:?} {way:?}: {got} instead of {expected}", case.name));
                }
            }
            if let Ok(expected) = case.health.parse::<usize>() {
                let here = endpoints.all().filter(|e| e.node.as_deref() == Some("n1") && e.is_ready()).count();
                if here != expected {
                    wrong.push(format!("{}: {here} ready here instead of {expected}", case.name));
                }
            }
        }
    }
    assert!(wrong.is_empty(), "{}", wrong.join("\n"));
}

/// The rows about mode `ipvs`.
#[test]
fn ipvs_takes_the_cluster_where_nobody_is_local() {
    let rows = [("E2", "2", "2"), ("I2", "DROP", "DROP"), ("I5", "2", "2"), ("I7", "2", "2"), ("I8", "1", "1")];
    let cases = cases();
    for (name, cluster_ip, outside) in rows {
        let case = cases.iter().find(|case| case.name == name).unwrap();
        let proxy = KubeProxy { minor: 34, ipvs: true };
        let endpoints = endpoints(case, proxy);
        let choice = Choice::of(&endpoints, place(case.service), policies(case.service), proxy);
        let got = [Way::ClusterIp, Way::FromOutside].map(|way| shown(&choice.target(way)));
        assert_eq!(got, [cluster_ip, outside], "{name}");
    }
}

#[test]
fn versions_are_read_as_kubelets_write_them() {
    for (text, minor) in [("v1.34.1+k3s1", 34), ("v1.36.0-alpha.1", 36), ("v2.0.0", 0), ("", 0)] {
        assert_eq!(KubeProxy::of_version(text, false).minor, minor, "{text}");
    }
}

proptest! {
    /// The order of slices means nothing: the API server may list them in any order.
    #[test]
    fn the_order_of_slices_means_nothing(
        order in Just((0..4_usize).collect::<Vec<_>>()).prop_shuffle(),
        seeds in prop::collection::vec((1..5_u8, 0..4_u8, 0..8_u8, 0..4_u8), 12),
        minor in prop::sample::select(vec![34, 36]),
    ) {
        let text = |part: &[(u8, u8, u8, u8)]| {
            let one = |(address, node, conditions, hints): &(u8, u8, u8, u8)| {
                let letter = |bit: u8, letter: char| {
                    if conditions >> bit & 1 == 1 { letter } else { letter.to_ascii_lowercase() }
                };
                let conditions: String = [letter(0, 'R'), letter(1, 'S'), letter(2, 'T')].iter().collect();
                let hint = ["", " z:a", " h:n1", " z:b h:n2"][usize::from(*hints)];
                format!("{address}@n{node}/a {conditions}{hint}")
            };
            part.iter().map(one).collect::<Vec<_>>().join("; ")
        };
        let all = seeds.chunks(3).map(text).collect::<Vec<_>>().join(" // ");
        let slices = slices(&all);
        let shuffled: Vec<_> = order.iter().map(|i| slices[*i].clone()).collect();
        let proxy = KubeProxy { minor, ipvs: false };
        for twice in [proxy.twice("n1"), Twice::Better] {
            let of = |slices: &[Arc<EndpointSlice>]| Endpoints::of(slices, Some("p"), "TCP", Family::V4, twice);
            prop_assert_eq!(of(&slices), of(&shuffled));
        }
    }
}
