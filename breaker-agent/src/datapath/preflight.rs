//! Checks whether this machine can run the datapath, before anything is loaded. Every problem comes with a remedy.

use std::{fs, path::Path};

use anyhow::Result;
use aya::{
    programs::{ProgramType, loaded_programs},
    sys::{BpfHelper, is_program_supported},
};
use breaker_api::preflight::{Finding, Verdict};
use rustix::thread::{CapabilitySet, capabilities};

use super::{
    conntrack,
    interfaces::{self, Side, Wanted},
    sys::{has_helper, has_tcx, is_on_bpffs},
};

/// The newest helpers that every program needs. Each text names a needed feature of the same kernel version.
const HELPERS: [(BpfHelper, &str); 2] = [
    (BpfHelper::BPF_FUNC_ktime_get_coarse_ns, "the coarse clock, Linux 5.11"),
    (BpfHelper::BPF_FUNC_check_mtu, "BPF atomics, Linux 5.12"),
];

/// Tests everything and returns all findings. `pin_path` is where maps and links will be pinned.
#[must_use]
pub fn check_all(pin_path: &Path) -> Vec<Finding> {
    vec![
        kernel(),
        attach(),
        tc_programs(),
        caps(),
        bpffs(pin_path),
        btf(),
        bridge(),
        socket_lb(),
        datapath(),
        connections(),
        coverage(),
    ]
}

/// Fails if the agent cannot run on this machine.
///
/// # Errors
/// All findings that keep the agent from running, each with its remedy.
pub fn require(pin_path: &Path) -> Result<()> {
    let bad: Vec<String> = check_all(pin_path)
        .into_iter()
        .filter(|finding| finding.verdict == Verdict::Bad)
        .map(|finding| format!("{}: {}; {}", finding.name, finding.found, finding.remedy))
        .collect();
    anyhow::ensure!(bad.is_empty(), "this machine cannot run the datapath:\n  {}", bad.join("\n  "));
    Ok(())
}

fn good(name: &'static str, found: impl Into<String>) -> Finding {
    Finding { name: name.into(), verdict: Verdict::Good, found: found.into(), remedy: String::new() }
}

fn finding(name: &'static str, verdict: Verdict, found: impl Into<String>, remedy: impl Into<String>) -> Finding {
    Finding { name: name.into(), verdict, found: found.into(), remedy: remedy.into() }
}

fn release() -> String {
    rustix::system::uname().release().to_string_lossy().into_owned()
}

fn kernel() -> Finding {
    for (helper, what) in HELPERS {
        match has_helper(ProgramType::SchedClassifier, helper) {
            Ok(true) => {}
            Ok(false) => {
                let found = format!("{} has no {helper:?} ({what})", release());
                return finding("kernel", Verdict::Bad, found, "run a kernel of at least 5.12");
            }
            Err(error) => {
                let found = format!("{} cannot be asked what it supports: {error:#}", release());
                return finding("kernel", Verdict::Worse, found, "run as root to find out");
            }
        }
    }
    good("kernel", release())
}

fn attach() -> Finding {
    if has_tcx() { good("attach", "tcx links") } else { good("attach", "clsact filters (tcx needs kernel 6.6)") }
}

fn tc_programs() -> Finding {
    match is_program_supported(ProgramType::SchedClassifier) {
        Ok(true) => good("tc programs", "the kernel can load them"),
        Ok(false) => finding(
            "tc programs",
            Verdict::Bad,
            "the kernel does not support them",
            "run a kernel with CONFIG_BPF_SYSCALL and CONFIG_NET_CLS_ACT",
        ),
        Err(error) => finding(
            "tc programs",
            Verdict::Bad,
            format!("the kernel refused to load one: {error}"),
            "see capabilities below; a kernel in lockdown mode refuses them, too",
        ),
    }
}

fn caps() -> Finding {
    const NAME: &str = "capabilities";
    let Ok(sets) = capabilities(None) else {
        return finding(NAME, Verdict::Bad, "cannot be read", "run as root");
    };
    let has = |wanted: CapabilitySet| sets.effective.contains(wanted);
    // CAP_SYS_ADMIN includes CAP_BPF and CAP_PERFMON (capabilities(7)).
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
        return good("bpffs", format!("{} is on a BPF file system", pin_path.display()));
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
        return good("BTF", "the kernel has type information");
    }
    finding(
        "BTF",
        Verdict::Worse,
        "the kernel has no type information",
        "bpftool shows map values as bytes; with CONFIG_DEBUG_INFO_BTF in the kernel it shows names",
    )
}

/// Prefixes of the program names of a socket load balancer. Such a load balancer (Cilium's kube-proxy replacement)
/// translates Services' addresses in connect(2), so that packets never carry them. Program names in the kernel have
/// up to 15 bytes (bpf(2), `BPF_OBJ_NAME_LEN`).
const SOCKET_LB: &[&str] = &["cil_sock4_conn", "cil_sock6_conn", "sock4_connect", "sock6_connect"];

/// Returns a message if another program on this machine hides Services' addresses from packets.
#[must_use]
pub fn socket_load_balancer() -> Option<String> {
    let found = loaded_program(CGROUP_SOCK_ADDR, SOCKET_LB)?;
    Some(format!(
        "the program {found} translates Services' addresses in connect(2), so packets do not carry them and are not \
         redirected; with Cilium, set socketLB.hostNamespaceOnly=true to exclude pods from it (breaker cannot see \
         whether it is set)"
    ))
}

/// Prefixes of the names of tc programs that deliver packets to local pods by `bpf_redirect_peer` (Cilium's BPF host
/// routing). Such packets do not pass the hook on the host side of the pod's interface.
const OTHER_DATAPATHS: &[&str] = &["cil_from_contai", "cil_to_containe", "cil_from_netdev", "cil_lxc_policy"];

/// Returns a message if the programs of another datapath on this machine may deliver answers past breaker's.
#[must_use]
pub fn other_datapath() -> Option<String> {
    let found = loaded_program(SCHED_CLS, OTHER_DATAPATHS)?;
    Some(format!(
        "the tc program {found} belongs to Cilium: with BPF host routing, answers enter pods past breaker's programs, and \
         redirected connections of pods time out; set bpf.hostLegacyRouting=true (breaker cannot see whether it is set, and \
         stops redirecting where no answers are seen)"
    ))
}

/// Returns the name of a program in the kernel that has the type `program_type` (`enum bpf_prog_type` in linux/bpf.h)
/// and a name with one of `prefixes`.
fn loaded_program(program_type: u32, prefixes: &[&str]) -> Option<String> {
    loaded_programs().flatten().filter(|program| program.program_type() as u32 == program_type).find_map(|program| {
        let name = program.name_as_str()?;
        prefixes.iter().any(|prefix| name.starts_with(prefix)).then(|| name.to_owned())
    })
}

/// `BPF_PROG_TYPE_SCHED_CLS` in linux/bpf.h.
const SCHED_CLS: u32 = 3;

/// `BPF_PROG_TYPE_CGROUP_SOCK_ADDR` in linux/bpf.h.
const CGROUP_SOCK_ADDR: u32 = 18;

fn socket_lb() -> Finding {
    match socket_load_balancer() {
        None => good("socket LB", "none: packets carry the Services' addresses"),
        Some(found) => finding("socket LB", Verdict::Worse, found, "pods' connections are redirected only without it"),
    }
}

fn datapath() -> Finding {
    match other_datapath() {
        None => good("other datapath", "none: answers to pods pass the host side of their interfaces"),
        Some(found) => finding("other datapath", Verdict::Worse, found, "see Limits in docs/KUBERNETES.md"),
    }
}

/// Returns a message if the kernel does not track the connections to Services, so that it cannot be asked for established
/// ones.
#[must_use]
pub fn untracked_connections() -> Option<String> {
    match conntrack::translates() {
        Err(error) => Some(format!("the kernel does not tell which connections it tracks: {error:#}")),
        // A node that has just started tracks none yet.
        Ok(false) => socket_load_balancer().or_else(other_datapath).map(|found| {
            format!("the kernel tracks no connection to a Service, and another datapath is here: {found}")
        }),
        Ok(true) => None,
    }
}

fn connections() -> Finding {
    const NAME: &str = "established connections";
    match untracked_connections() {
        None => good(NAME, "found in conntrack when a breaker opens (agent.connections: Auto)"),
        Some(why) => finding(
            NAME,
            Verdict::Worse,
            format!("found by their SYNs when a breaker opens, from the agent's start on: {why}"),
            "see agent.connections in docs/CONFIGURATION.md",
        ),
    }
}

/// Which interfaces would get programs by default, and what no program sees.
fn coverage() -> Finding {
    const NAME: &str = "interfaces";
    let wanted = Wanted { veths: true, uplinks: true, globs: Vec::new() };
    // The caller may run in a tokio runtime already, where it cannot block.
    let outcome = std::thread::spawn(move || {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
        runtime.block_on(interfaces::survey(wanted))
    });
    let survey = match outcome.join() {
        Ok(Ok(survey)) => survey,
        Ok(Err(error)) => return finding(NAME, Verdict::Worse, format!("{error:#}"), "run as root to find out"),
        Err(_) => return finding(NAME, Verdict::Worse, "the search panicked", "report it as a bug"),
    };
    let of = |side: Side| survey.interfaces.values().filter(|i| i.side == side && i.obstacle.is_none()).count();
    let found = format!("{} of pods, {} of default routes", of(Side::Pod), of(Side::Uplink));
    let obstacles = survey.interfaces.values().filter_map(|i| Some(format!("{}: {}", i.name, i.obstacle?)));
    let gaps: Vec<String> = obstacles.chain(survey.notes.iter().cloned()).collect();
    if gaps.is_empty() {
        return good(NAME, found);
    }
    let remedy = "connections through the others are redirected; see Limits in docs/KUBERNETES.md";
    finding(NAME, Verdict::Worse, format!("{found}; {}", gaps.join("; ")), remedy)
}

fn bridge() -> Finding {
    match fs::read_to_string("/proc/sys/net/bridge/bridge-nf-call-iptables") {
        Ok(value) if value.trim() == "1" => good("br_netfilter", "bridged packets pass through netfilter"),
        Ok(_) => finding(
            "br_netfilter",
            Verdict::Worse,
            "bridge-nf-call-iptables is 0",
            "if the CNI uses a bridge, kube-proxy needs: sysctl net.bridge.bridge-nf-call-iptables=1",
        ),
        Err(_) => good("br_netfilter", "not loaded (not needed where pods are routed)"),
    }
}
