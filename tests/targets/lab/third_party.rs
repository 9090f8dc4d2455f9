//! Third-party programs on the same hooks: they keep running, before breaker's and behind them, and stay when
//! breaker's go.

use breaker_common::BreakerState;
use std::fs::File;

use anyhow::{Context as _, Result};
use aya::{
    Ebpf,
    maps::Array,
    programs::{
        CgroupAttachMode, CgroupSockAddr, LinkOrder, SchedClassifier, TcAttachType, Xdp, XdpMode,
        tc::{NlOptions, TcAttachOptions},
    },
};
use breaker_agent::datapath::sys::has_tcx;
use breaker_tests::lab::{
    client::ask_once,
    netns::NetNs,
    stage::{Checks, Lab, SERVICE},
};

use crate::{LONG, start_healthy_lab, wait_all_up};

static THIRD_PARTY: &[u8] = aya::include_bytes_aligned!(env!("THIRD_PARTY_OBJECT"));

/// Options that attach a third-party program at a position in the chain.
type Place = fn() -> TcAttachOptions;

fn before() -> TcAttachOptions {
    if has_tcx() { TcAttachOptions::TcxOrder(LinkOrder::first()) } else { filter(1) }
}

fn behind() -> TcAttachOptions {
    if has_tcx() { TcAttachOptions::TcxOrder(LinkOrder::last()) } else { filter(0xff00) }
}

/// A filter on the existing clsact qdisc. breaker's filters have a priority between 1 and 0xff00.
fn filter(priority: u16) -> TcAttachOptions {
    TcAttachOptions::Netlink(NlOptions { priority, ..NlOptions::default() })
}

/// Attaches third-party programs to the client's veth, until the returned value is dropped.
fn attach(lab: &Lab, programs: &'static [(&'static str, TcAttachType)], place: Place) -> Result<Ebpf> {
    let veth = lab.client.veth.clone();
    load(lab.world.node(0).ns(), move |third_party| {
        for (name, direction) in programs {
            let program: &mut SchedClassifier = third_party.program_mut(name).context(*name)?.try_into()?;
            program.load()?;
            program.attach_with_options(&veth, *direction, place())?;
        }
        Ok(())
    })
}

/// Loads the third-party programs in a network namespace; `attach` attaches some of them.
fn load(ns: &NetNs, attach: impl FnOnce(&mut Ebpf) -> Result<()> + Send + 'static) -> Result<Ebpf> {
    ns.enter(move || -> Result<Ebpf> {
        let mut third_party = Ebpf::load(THIRD_PARTY)?;
        attach(&mut third_party)?;
        Ok(third_party)
    })?
}

fn attach_xdp(third_party: &mut Ebpf, interface: &str, mode: XdpMode) -> Result<()> {
    let program: &mut Xdp = third_party.program_mut("third_xdp").context("third_xdp")?.try_into()?;
    program.load()?;
    program.attach(interface, mode)?;
    Ok(())
}

/// Attaches a third-party XDP program to an interface in native mode, until the returned value is dropped.
pub fn native_xdp(ns: &NetNs, interface: &'static str) -> Result<Ebpf> {
    load(ns, move |third_party| attach_xdp(third_party, interface, XdpMode::Driver))
}

/// A counter of the third-party programs.
fn seen(third_party: &mut Ebpf, index: u32) -> Result<u64> {
    let seen: Array<_, u64> = Array::try_from(third_party.map_mut("SEEN").context("SEEN")?)?;
    Ok(seen.get(&index, 0)?)
}

fn open(lab: &Lab) -> Result<()> {
    lab.agent.wait_state(SERVICE, BreakerState::Open, LONG)
}

fn answers(lab: &Lab, pod: &breaker_tests::lab::service::ServicePod) -> Result<()> {
    let answer = lab.ask()?;
    anyhow::ensure!(answer.pod() == Some(pod.address().to_string().as_str()), "{answer}");
    Ok(())
}

/// Third-party programs that pass packets on, mark them or drop some of them, before breaker's and behind them: all
/// of them work.
#[test]
fn before_and_behind_ours_both_do_their_work() -> Result<()> {
    use TcAttachType::{Egress, Ingress};
    let places: [(&str, Place); 2] = [("before", before), ("behind", behind)];
    for (place, order) in places {
        let lab = start_healthy_lab("    override: ForceOpen\n")?;
        open(&lab)?;
        let programs =
            &[("third_in", Ingress), ("third_out", Egress), ("third_mark", Ingress), ("third_drop", Ingress)];
        let mut third_party = attach(&lab, programs, order)?;
        answers(&lab, &lab.backup)?;
        assert!(
            seen(&mut third_party, 0)? > 3 && seen(&mut third_party, 1)? > 3,
            "{place}: both directions of a connection"
        );
        assert!(seen(&mut third_party, 3)? > 3, "{place}: marked");
        // A SYN that it drops gets no answer, not even a reset.
        let target = std::net::SocketAddr::from((*lab.backup.address().ip(), 9999));
        let refused = lab.client.ns.enter(move || {
            std::net::TcpStream::connect_timeout(&target, std::time::Duration::from_millis(500)).map(drop)
        })?;
        assert_eq!(refused.unwrap_err().kind(), std::io::ErrorKind::TimedOut, "{place}");
        assert!(seen(&mut third_party, 4)? > 0, "{place}: dropped");
    }
    Ok(())
}

/// A third-party program that ends the chain: behind breaker's it gets all packets. Before breaker's it hides them,
/// and the primary gets them (fail open).
#[test]
fn one_that_ends_the_chain() -> Result<()> {
    let lab = start_healthy_lab("    override: ForceOpen\n")?;
    open(&lab)?;
    let mut behind = attach(&lab, &[("third_ok", TcAttachType::Ingress)], behind)?;
    answers(&lab, &lab.backup)?;
    assert!(seen(&mut behind, 2)? > 3);
    drop(behind);
    let _before = attach(&lab, &[("third_ok", TcAttachType::Ingress)], before)?;
    answers(&lab, &lab.primary)
}

/// `agent.attachOrder: Last` attaches breaker's programs behind those that are already there.
#[test]
fn the_order_can_be_chosen() -> Result<()> {
    for (order, reached) in [("First", true), ("Last", false)] {
        for attach_mode in ["Tcx", "Clsact"].into_iter().filter(|mode| *mode == "Clsact" || has_tcx()) {
            let mut lab = Lab::new(Checks::Fast)?;
            lab.agent.write_config(
                &format!("  attach: {attach_mode}\n  attachOrder: {order}\n"),
                &lab.services(Checks::Fast, "    override: ForceOpen\n"),
            )?;
            // This program ends the chain: breaker's programs behind it see no packets.
            let place: Place = if attach_mode == "Tcx" {
                before
            } else {
                lab.world.node(0).ns().output("tc", &["qdisc", "add", "dev", &lab.client.veth, "clsact"])?;
                || TcAttachOptions::Netlink(NlOptions::default())
            };
            let _before = attach(&lab, &[("third_ok", TcAttachType::Ingress)], place)?;
            lab.agent.start()?;
            wait_all_up(&lab)?;
            open(&lab)?;
            answers(&lab, if reached { &lab.backup } else { &lab.primary })
                .with_context(|| format!("{order}, {attach_mode}"))?;
        }
    }
    Ok(())
}

/// A third-party XDP program on the uplink and one on connect(2) keep running, and stay when breaker's programs go.
#[test]
fn xdp_and_cgroup_programs_stay_as_they_were() -> Result<()> {
    let mut lab = Lab::new(Checks::Fast)?;
    lab.agent.write_config("  uplinks: true\n", &lab.services(Checks::Fast, "    override: ForceOpen\n"))?;
    let mut third_party = load(lab.world.node(0).ns(), |third_party| {
        attach_xdp(third_party, "eth0", XdpMode::Skb)?;
        let program: &mut CgroupSockAddr =
            third_party.program_mut("third_connect").context("third_connect")?.try_into()?;
        program.load()?;
        program.attach(File::open(breaker_agent::datapath::sys::cgroup_root()?)?, CgroupAttachMode::Single)?;
        Ok(())
    })?;
    let before = lab.world.node(0).ns().output("ip", &["link", "show", "dev", "eth0"])?;
    assert!(before.contains("xdp"), "{before}");
    lab.agent.start()?;
    wait_all_up(&lab)?;
    open(&lab)?;
    // A client outside, by a route to the Service's address, and a process of the node.
    let lan = lab.world.lan().clone();
    let via = lab.world.node(0).address().to_string();
    lan.ip(&["route", "add", &format!("{}/32", lab.vip.ip()), "via", &via])?;
    for (who, ns) in [("outside", &lan), ("the node", lab.world.node(0).ns())] {
        let answer = ask_once(ns, lab.vip)?;
        assert_eq!(answer.pod(), Some(lab.backup.address().to_string().as_str()), "{who}: {answer}");
    }
    let counts = (seen(&mut third_party, 5)?, seen(&mut third_party, 6)?);
    assert!(counts.0 > 3 && counts.1 > 0, "{counts:?}");
    lab.agent.stop()?;
    assert!(lab.agent.cli(&["cleanup"])?.status.success());
    assert_eq!(lab.world.node(0).ns().output("ip", &["link", "show", "dev", "eth0"])?, before);
    let answer = ask_once(&lan, lab.vip)?;
    assert_eq!(answer.pod(), Some(lab.primary.address().to_string().as_str()), "{answer}");
    assert!(seen(&mut third_party, 5)? > counts.0 && seen(&mut third_party, 6)? >= counts.1);
    Ok(())
}
