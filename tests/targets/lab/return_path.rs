//! The safeguard: answers of the backup leave by an interface without programs, for a cause that the agent does not know
//! of. kube-proxy serves such clients well, and so the primary must.

use std::net::SocketAddr;

use anyhow::{Context as _, Result};
use aya::{
    Ebpf, EbpfLoader,
    programs::{
        LinkOrder, SchedClassifier, TcAttachType,
        tc::{NlOptions, TcAttachOptions},
    },
};
use breaker_agent::datapath::sys::has_tcx;
use breaker_api::events::EventType;
use breaker_common::BreakerState;
use breaker_tests::lab::{
    client::ask_once,
    netns::NetNs,
    service::Fault,
    stage::{Checks, Lab, SERVICE},
    wait_for,
};

use crate::{LONG, is_alive, start_healthy_lab, text, wait_all_up};

/// TRIALS B: clients outside come in on one uplink, and the node's routes send answers out of another one.
#[test]
fn answers_that_leave_by_another_interface_are_missed_and_the_client_gets_the_primary() -> Result<()> {
    let mut lab = Lab::new(Checks::Fast)?;
    let node = lab.world.node(0).ns().clone();
    let lan = lab.world.lan().clone();
    lan.ip(&["link", "add", "second", "type", "veth", "peer", "name", "eth1", "netns", node.name()])?;
    lan.ip(&["addr", "add", "172.32.0.1/24", "dev", "second"])?;
    lan.ip(&["link", "set", "second", "up"])?;
    node.ip(&["addr", "add", "172.32.0.11/24", "dev", "eth1"])?;
    node.ip(&["link", "set", "eth1", "up"])?;
    lan.ip(&["addr", "add", "192.0.2.9/32", "dev", "lo"])?;
    lan.sysctl(&[
        "net.ipv4.conf.all.rp_filter=0",
        "net.ipv4.conf.default.rp_filter=0",
        "net.ipv4.conf.br0.rp_filter=0",
    ])?;
    lan.sysctl(&["net.ipv4.conf.second.rp_filter=0"])?;
    node.sysctl(&["net.ipv4.conf.eth1.rp_filter=0"])?;
    lan.ip(&["route", "add", "10.43.0.0/24", "via", "172.31.0.11", "src", "192.0.2.9"])?;
    node.ip(&["route", "add", "192.0.2.9/32", "via", "172.32.0.1", "dev", "eth1"])?;
    // The second uplink is a veth like those of pods, so pods get no programs here.
    lab.agent.write_config("  veths: false\n  uplinks: true\n", &lab.services(Checks::Fast, ""))?;
    lab.agent.start()?;
    wait_all_up(&lab)?;
    let vip = SocketAddr::V4(lab.vip);
    assert!(is_alive(&lan, vip)?, "closed: kube-proxy serves the client");
    lab.primary.inject(Fault::FakeError)?;
    lab.agent.wait_state(SERVICE, BreakerState::Open, LONG)?;
    // The first attempt goes to the backup, and its answer is lost. The second one, after a second, goes to the primary.
    for attempt in 0..5 {
        assert!(is_alive(&lan, vip)?, "attempt {attempt}");
    }
    wait_for("the interface to be given up", LONG, || {
        lab.agent.status().is_ok_and(|status| !status.datapath.suspended.is_empty())
    })?;
    let status = lab.agent.status()?;
    let suspended = &status.datapath.suspended[0];
    assert_eq!((suspended.interface.as_str(), suspended.service.as_str()), ("eth0", SERVICE));
    assert!(
        status.datapath.reasons.get("NoAnswerSeen").is_some_and(|count| *count >= 5),
        "{:?}",
        status.datapath.reasons
    );
    let event =
        lab.agent.events()?.into_iter().find(|event| event.kind == EventType::ReturnPath).context("an event")?;
    assert!(event.message.starts_with("eth0: "), "{}", event.message);
    let shown = text(&lab.agent.cli(&["status"])?.stdout);
    assert!(shown.contains("eth0") && shown.contains("no answers"), "{shown}");
    Ok(())
}

/// TRIALS B3: another program delivers the backup's answers straight into the client's namespace.
#[test]
fn answers_that_enter_the_pod_past_the_programs_are_missed() -> Result<()> {
    let mut lab = start_healthy_lab("")?;
    let node = lab.world.node(0).ns().clone();
    let (veth, client) = (lab.backup.pod.veth.clone(), u32::from_ne_bytes(lab.client.address.octets()));
    let shown = node.output("ip", &["-o", "link", "show", "dev", &lab.client.veth])?;
    let index: u32 = shown.split(':').next().context("no index")?.trim().parse()?;
    let _program = node.enter(move || -> Result<Ebpf> {
        let mut third_party = EbpfLoader::new()
            .override_global("PEER", &index, true)
            .override_global("PEER_ADDRESS", &client, true)
            .load(aya::include_bytes_aligned!(env!("THIRD_PARTY_OBJECT")))?;
        let program: &mut SchedClassifier = third_party.program_mut("third_peer").context("third_peer")?.try_into()?;
        program.load()?;
        let options = if has_tcx() {
            TcAttachOptions::TcxOrder(LinkOrder::first())
        } else {
            TcAttachOptions::Netlink(NlOptions { priority: 1, ..NlOptions::default() })
        };
        program.attach_with_options(&veth, TcAttachType::Ingress, options)?;
        Ok(third_party)
    })??;
    let vip = SocketAddr::V4(lab.vip);
    lab.primary.inject(Fault::FakeError)?;
    lab.agent.wait_state(SERVICE, BreakerState::Open, LONG)?;
    for attempt in 0..5 {
        assert!(is_alive(&lab.client.ns, vip)?, "attempt {attempt}");
    }
    wait_for("the interface to be given up", LONG, || {
        lab.agent.status().is_ok_and(|status| !status.datapath.suspended.is_empty())
    })?;
    let counters = lab.agent.service(SERVICE)?.counters;
    assert!(is_alive(&lab.client.ns, vip)?);
    assert_eq!(lab.agent.service(SERVICE)?.counters.moved, counters.moved, "new connections are left to kube-proxy");
    Ok(())
}

/// TRIALS B4: IPsec by policy between a client outside and the node. The programs see the client's packets decrypted, and
/// the answers leave encrypted.
#[test]
fn clients_behind_ipsec_are_left_to_kube_proxy() -> Result<()> {
    let mut lab = Lab::new(Checks::Fast)?;
    let (lan, node) = (lab.world.lan().clone(), lab.world.node(0).ns().clone());
    let (client, gateway, vips) = ("172.31.0.1", "172.31.0.11", "10.43.0.0/24");
    lan.ip(&["route", "add", vips, "via", gateway])?;
    for (ns, (from, to, spi)) in
        [&lan, &node].into_iter().flat_map(|ns| [(client, gateway, "1"), (gateway, client, "2")].map(|sa| (ns, sa)))
    {
        let association =
            ["xfrm", "state", "add", "src", from, "dst", to, "proto", "esp", "spi", spi, "mode", "tunnel"];
        let nothing = ["auth", "digest_null", "", "enc", "cipher_null", ""];
        if ns.ip(&[&association[..], &nothing[..]].concat()).is_err() {
            eprintln!("skipped: the kernel has no ciphers for IPsec");
            return Ok(());
        }
    }
    let policy = |ns: &NetNs, selector: [&str; 2], way: &str, tunnel: [&str; 2]| {
        let [from, to] = selector;
        let [outer_from, outer_to] = tunnel;
        let template = ["tmpl", "src", outer_from, "dst", outer_to, "proto", "esp", "mode", "tunnel"];
        ns.ip(&[&["xfrm", "policy", "add", "src", from, "dst", to, "dir", way][..], &template[..]].concat())
    };
    let any = "0.0.0.0/0";
    policy(&lan, ["172.31.0.1/32", vips], "out", [client, gateway])?;
    policy(&lan, [vips, "172.31.0.1/32"], "in", [gateway, client])?;
    policy(&node, ["172.31.0.1/32", any], "fwd", [client, gateway])?;
    policy(&node, [vips, "172.31.0.1/32"], "out", [gateway, client])?;
    let services = lab.services(Checks::Fast, "    override: ForceOpen\n");
    lab.agent.write_config("  veths: false\n  uplinks: true\n", &services)?;
    lab.agent.start()?;
    wait_all_up(&lab)?;
    let answer = ask_once(&lan, lab.vip)?;
    assert_eq!(answer.pod(), Some(lab.primary.address().to_string().as_str()), "{answer}");
    let reasons = lab.agent.status()?.datapath.reasons;
    assert_eq!(reasons.get("Ipsec"), Some(&1), "{reasons:?}");
    Ok(())
}
