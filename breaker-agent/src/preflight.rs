//! What the datapath needs of a machine, looked at before anything is loaded. Every finding says what to do.

use std::{fs, path::Path};

use anyhow::Result;
use aya::{
    programs::{ProgramType, loaded_programs},
    sys::is_program_supported,
};
use rustix::thread::{CapabilitySet, capabilities};
use serde::Serialize;

use crate::datapath::kernel::{has_tcx, is_on_bpffs, kernel_at_least};

/// One thing that was looked at.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Finding {
    /// What.
    pub name: &'static str,
    /// Whether it is as it should be.
    pub verdict: Verdict,
    /// What was found.
    pub found: String,
    /// What to do about it; empty where nothing needs to be done.
    pub remedy: String,
}

/// How bad a finding is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
pub enum Verdict {
    /// As it should be.
    Good,
    /// It works, but something is lost.
    Worse,
    /// The agent cannot run.
    Bad,
}

/// First kernel with everything that the programs use: BPF atomics came with 5.12, the coarse clock with 5.11.
const OLDEST: (u8, u8) = (5, 12);

/// Looks at everything.
#[must_use]
pub fn look(pin_path: &Path) -> Vec<Finding> {
    vec![kernel(), attach(), tc_programs(), caps(), bpffs(pin_path), btf(), bridge(), socket_lb()]
}

/// The findings that keep an agent from running.
///
/// # Errors
/// All of them, each with its remedy.
pub fn require(pin_path: &Path) -> Result<()> {
    let bad: Vec<String> = look(pin_path)
        .into_iter()
        .filter(|finding| finding.verdict == Verdict::Bad)
        .map(|finding| format!("{}: {}; {}", finding.name, finding.found, finding.remedy))
        .collect();
    anyhow::ensure!(bad.is_empty(), "this machine cannot run the datapath:\n  {}", bad.join("\n  "));
    Ok(())
}

fn good(name: &'static str, found: impl Into<String>) -> Finding {
    Finding { name, verdict: Verdict::Good, found: found.into(), remedy: String::new() }
}

fn finding(name: &'static str, verdict: Verdict, found: impl Into<String>, remedy: impl Into<String>) -> Finding {
    Finding { name, verdict, found: found.into(), remedy: remedy.into() }
}

fn release() -> String {
    rustix::system::uname().release().to_string_lossy().into_owned()
}

fn kernel() -> Finding {
    if kernel_at_least(OLDEST.0, OLDEST.1) {
        return good("kernel", release());
    }
    let remedy = format!("run a kernel of at least {}.{}", OLDEST.0, OLDEST.1);
    finding("kernel", Verdict::Bad, format!("{} is too old", release()), remedy)
}

fn attach() -> Finding {
    if has_tcx() { good("attach", "tcx links") } else { good("attach", "clsact filters (tcx needs kernel 6.6)") }
}

fn tc_programs() -> Finding {
    match is_program_supported(ProgramType::SchedClassifier) {
        Ok(true) => good("tc programs", "the kernel loads them"),
        Ok(false) => finding(
            "tc programs",
            Verdict::Bad,
            "the kernel does not know them",
            "run a kernel with CONFIG_BPF_SYSCALL and CONFIG_NET_CLS_ACT",
        ),
        Err(error) => finding(
            "tc programs",
            Verdict::Bad,
            format!("the kernel loads none: {error}"),
            "see capabilities below; a kernel in lockdown refuses them too",
        ),
    }
}

fn caps() -> Finding {
    const NAME: &str = "capabilities";
    let Ok(sets) = capabilities(None) else {
        return finding(NAME, Verdict::Bad, "cannot be read", "run as root");
    };
    let has = |wanted: CapabilitySet| sets.effective.contains(wanted);
    // CAP_SYS_ADMIN stands for the finer ones (capabilities(7)).
    let admin = has(CapabilitySet::SYS_ADMIN);
    let wanted = [
        ("BPF", admin || has(CapabilitySet::BPF)),
        ("PERFMON", admin || has(CapabilitySet::PERFMON)),
        ("NET_ADMIN", has(CapabilitySet::NET_ADMIN)),
    ];
    let missing: Vec<&str> = wanted.iter().filter(|(_, has)| !has).map(|(name, _)| *name).collect();
    if missing.is_empty() {
        return good(NAME, "BPF, PERFMON, NET_ADMIN");
    }
    let missing = missing.join(", ");
    finding(
        NAME,
        Verdict::Bad,
        format!("missing: {missing}"),
        format!("run as root, or add the capabilities {missing}"),
    )
}

fn bpffs(pin_path: &Path) -> Finding {
    if is_on_bpffs(pin_path).unwrap_or(false) {
        return good("bpffs", format!("{} is on one", pin_path.display()));
    }
    finding(
        "bpffs",
        Verdict::Bad,
        format!("{} is not on a BPF file system", pin_path.display()),
        "mount one: mount -t bpf bpf /sys/fs/bpf",
    )
}

fn btf() -> Finding {
    if Path::new("/sys/kernel/btf/vmlinux").exists() {
        return good("BTF", "the kernel describes its types");
    }
    finding(
        "BTF",
        Verdict::Worse,
        "the kernel has no type information",
        "bpftool shows maps as bytes; a kernel with CONFIG_DEBUG_INFO_BTF shows names",
    )
}

/// What a socket load balancer's programs are called: Cilium's kube-proxy replacement translates Services' addresses in
/// connect(2), so packets never carry them. Names in the kernel have up to 15 bytes (bpf(2), BPF_OBJ_NAME_LEN).
const SOCKET_LB: &[&str] = &["cil_sock4_conn", "cil_sock6_conn", "sock4_connect", "sock6_connect"];

/// Another program on this machine that hides Services' addresses from packets, if there is one.
#[must_use]
pub fn socket_load_balancer() -> Option<String> {
    let programs = loaded_programs().flatten();
    let mut names = programs.filter_map(|program| {
        let connects = program.program_type() as u32 == CGROUP_SOCK_ADDR;
        connects.then(|| program.name_as_str().map(str::to_owned)).flatten()
    });
    let found = names.find(|name| SOCKET_LB.iter().any(|known| name.starts_with(known)))?;
    Some(format!(
        "the program {found} translates Services' addresses in connect(2), before there is a packet to redirect; \
         with Cilium, socketLB.hostNamespaceOnly=true leaves pods' connections alone (whether it is set cannot be told from here)"
    ))
}

/// BPF_PROG_TYPE_CGROUP_SOCK_ADDR of linux/bpf.h.
const CGROUP_SOCK_ADDR: u32 = 18;

fn socket_lb() -> Finding {
    match socket_load_balancer() {
        None => good("socket LB", "none: packets carry the Services' addresses"),
        Some(found) => finding("socket LB", Verdict::Worse, found, "without it, pods' connections are redirected"),
    }
}

fn bridge() -> Finding {
    match fs::read_to_string("/proc/sys/net/bridge/bridge-nf-call-iptables") {
        Ok(value) if value.trim() == "1" => good("br_netfilter", "bridged packets pass netfilter"),
        Ok(_) => finding(
            "br_netfilter",
            Verdict::Worse,
            "bridge-nf-call-iptables is 0",
            "on a bridge CNI kube-proxy wants: sysctl net.bridge.bridge-nf-call-iptables=1",
        ),
        Err(_) => good("br_netfilter", "not loaded (fine where pods are routed)"),
    }
}
