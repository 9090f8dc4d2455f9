//! Installs what builds, the demo and the tests need.

use std::{
    env,
    process::{Command, Stdio},
};

use anyhow::{Result, bail};
use ebpf_builder::{BPF_LINKER_VERSION, Compiler};

use crate::{
    progress::step,
    run::{cargo, run},
};

/// Something that must be installed.
struct Requirement {
    /// Name of a program in `PATH`, or absolute path of a file.
    file: &'static str,
    /// Debian package that contains it.
    package: &'static str,
    /// What it is for.
    purpose: &'static str,
}

const fn requirement(file: &'static str, package: &'static str, purpose: &'static str) -> Requirement {
    Requirement { file, package, purpose }
}

/// What every build, the demo and the tier program need.
const BASE: &[Requirement] = &[
    requirement("cc", "gcc", "compiles the C code of dependencies and links the binaries"),
    requirement("/usr/include/stdio.h", "libc6-dev", "the C library's headers, for the same"),
    requirement("ip", "iproute2", "makes the lab's namespaces, interfaces and routes"),
    requirement("tc", "iproute2", "makes the lab's namespaces, interfaces and routes"),
    requirement("modprobe", "kmod", "loads the kernel modules of the lab's interfaces"),
    requirement("bpftool", "bpftool", "shows maps and programs"),
];

/// What the lab needs in addition: the demo, the benchmarks and the tier lab.
const LAB: &[Requirement] = &[
    requirement("iptables", "iptables", "kube-proxy's rules in the lab"),
    requirement("iptables-restore", "iptables", "kube-proxy's rules in the lab"),
    requirement("nft", "nftables", "kube-proxy's rules in the lab, and a peer in benchmarks"),
    requirement("haproxy", "haproxy", "a peer in tests and benchmarks"),
    requirement("iperf3", "iperf3", "measures throughput"),
    requirement("taskset", "util-linux", "binds benchmarks to a processor"),
    requirement("curl", "curl", "a client of other vendors, HTTP"),
    requirement("nghttp", "nghttp2-client", "a client of other vendors, HTTP/2"),
    requirement("nghttpd", "nghttp2-server", "a server of other vendors, HTTP/2"),
    requirement("dig", "bind9-dnsutils", "a client of other vendors, DNS"),
    requirement("dnsmasq", "dnsmasq-base", "a server of other vendors, DNS"),
    requirement("ethtool", "ethtool", "sets the offloads of the lab's interfaces"),
    requirement("tcpdump", "tcpdump", "captures packets"),
    requirement("tshark", "tshark", "checks the checksums of captured packets"),
    requirement("/usr/lib/cni/bandwidth", "containernetworking-plugins", "gives pods' interfaces qdiscs of its own"),
];

/// What the benchmarks need in addition.
const BENCH: &[Requirement] = &[
    requirement("go", "golang-go", "compiles a prober as kubelet's, a peer in the benchmark of probes"),
    requirement("ab", "apache2-utils", "the clients in the benchmark of resets"),
    requirement("conntrack", "conntrack", "fills the connection tracking in the benchmark of resets"),
];

/// What the tier vm needs in addition.
const VM: &[Requirement] = &[
    requirement("qemu-system-x86_64", "qemu-system-x86", "runs other kernels"),
    requirement("depmod", "kmod", "lists the modules of other kernels"),
    requirement("awk", "mawk", "a program of the guest"),
];

/// What the tests of the live page need in addition.
const PAGE: &[Requirement] = &[
    requirement(BROWSER, "chromium", "the browser that shows the page"),
    requirement("node", "nodejs", "drives the browser"),
    requirement("npm", "npm", "installs the tools that check the page"),
    requirement("/usr/share/fonts/truetype/dejavu/DejaVuSans.ttf", "fonts-dejavu-core", "the font of the pictures"),
];

const BROWSER: &str = "/usr/bin/chromium";

/// Debian's compiler for the BPF programs, used if rustup has none.
const DEBIAN_COMPILER: &[Requirement] = &[
    requirement("/usr/bin/rustc", "rustc-web", "compiles the BPF programs"),
    requirement("/usr/lib/rustlib", "rust-web-src", "the source of `core`, which is built for the BPF programs"),
];

/// Installs what is missing for builds.
///
/// # Errors
/// Something cannot be installed: root or apt-get is missing, or an installation failed. The message says what to
/// install.
pub fn setup() -> Result<()> {
    let mut missing = missing(BASE);
    if Compiler::find().is_none() && !add_rust_src() {
        missing.extend(DEBIAN_COMPILER);
    }
    let linker_missing = ebpf_builder::find_linker().is_none();
    install(&missing)?;
    if linker_missing {
        step(&format!("setup: install bpf-linker {BPF_LINKER_VERSION}, which links the BPF programs"), || {
            run(cargo().args(["install", "bpf-linker", "--version", BPF_LINKER_VERSION, "--locked"]))
        })?;
    }
    if Compiler::find().is_none() {
        let packages: Vec<&str> = DEBIAN_COMPILER.iter().map(|requirement| requirement.package).collect();
        bail!("there is still no compiler for the BPF programs: install {}", packages.join(" and "));
    }
    Ok(())
}

/// Installs what is missing for the lab.
///
/// # Errors
/// As for [`setup`].
pub fn setup_lab() -> Result<()> {
    install(&missing(LAB))?;
    setup_prometheus();
    Ok(())
}

/// Unpacks Debian's package of Prometheus into the target directory, unless both of its programs are there or in `PATH`.
/// It is not installed, because an installed package starts a server. Where that fails, the tests that need it are skipped.
pub fn setup_prometheus() {
    if let Err(error) = unpack_prometheus() {
        eprintln!("setup: there is no promtool, and the tests that need it are skipped: {error:#}");
    }
}

fn unpack_prometheus() -> Result<()> {
    let dir = ebpf_builder::workspace().join("target/tools/prometheus");
    let is_here = |program: &&str| dir.join("usr/bin").join(program).is_file() || is_installed(program);
    if ["prometheus", "promtool"].iter().all(is_here) {
        return Ok(());
    }
    step("setup: unpack Debian's package of Prometheus, which checks metrics and alerts", || {
        std::fs::create_dir_all(&dir)?;
        let download = || run(Command::new("apt-get").args(["-q", "-q", "download", "prometheus"]).current_dir(&dir));
        // The lists of packages may be missing.
        download().or_else(|_| apt_get(&["update"]).and_then(|()| download()))?;
        let package = std::fs::read_dir(&dir)?
            .filter_map(|entry| Some(entry.ok()?.path()))
            .find(|path| path.extension().is_some_and(|extension| extension == "deb"));
        let Some(package) = package else { bail!("apt-get downloaded no package into {}", dir.display()) };
        run(Command::new("dpkg-deb").arg("-x").arg(&package).arg(&dir))?;
        Ok(std::fs::remove_file(package)?)
    })
}

/// The versions of Helm with which the chart is tried: name of the program, its package, its version.
const HELM: [(&str, &str, &str); 2] =
    [("helm3", "helm.sh/helm/v3/cmd/helm", "v3.19.0"), ("helm4", "helm.sh/helm/v4/cmd/helm", "v4.3.1")];

/// Builds Helm 3 and 4 with Go into the target directory, unless they are there.
///
/// # Errors
/// Go is missing, or cannot build them.
pub fn setup_helm() -> Result<()> {
    let dir = ebpf_builder::workspace().join("target/tools/helm");
    for (name, package, version) in HELM {
        let program = dir.join(name);
        if program.is_file() {
            continue;
        }
        step(&format!("setup: build Helm {version}, which installs the chart"), || {
            let built = dir.join(version);
            run(Command::new("go").args(["install", &format!("{package}@{version}")]).env("GOBIN", &built))?;
            std::fs::rename(built.join("helm"), &program)?;
            Ok(std::fs::remove_dir(built)?)
        })?;
    }
    println!("setup: Helm for cargo xtask e2e: --helm {0}/helm3 --helm {0}/helm4", dir.display());
    Ok(())
}

/// Installs what is missing for the benchmarks.
///
/// # Errors
/// As for [`setup`].
pub fn setup_bench() -> Result<()> {
    install(&missing(BENCH))
}

/// Installs what is missing for the tests on other kernels.
///
/// # Errors
/// As for [`setup`].
pub fn setup_vm() -> Result<()> {
    install(&missing(VM))
}

/// Installs what is missing for the tests of the live page. Returns the path of the browser.
///
/// # Errors
/// As for [`setup`].
pub fn setup_page() -> Result<&'static str> {
    install(&missing(PAGE))?;
    Ok(BROWSER)
}

fn missing(requirements: &'static [Requirement]) -> Vec<&'static Requirement> {
    requirements.iter().filter(|requirement| !is_installed(requirement.file)).collect()
}

/// Whether a program is in `PATH` or a system directory, or an absolute path exists.
fn is_installed(file: &str) -> bool {
    let path = env::var_os("PATH").unwrap_or_default();
    let mut dirs = env::split_paths(&path).chain(["/usr/sbin".into(), "/sbin".into()]);
    // Joining an absolute path to a directory gives the absolute path.
    dirs.any(|dir| dir.join(file).exists())
}

/// Adds the source of `core` to rustup's nightly toolchain if that lacks it. Returns whether a compiler is available
/// now; a failure is no error, because Debian's compiler can be installed instead.
fn add_rust_src() -> bool {
    let Ok(output) = Command::new("rustup").args(["toolchain", "list"]).output() else { return false };
    if !String::from_utf8_lossy(&output.stdout).contains("nightly") {
        return false;
    }
    let added = Command::new("rustup")
        .args(["component", "add", "rust-src", "--toolchain", "nightly"])
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        .status();
    added.is_ok_and(|status| status.success()) && Compiler::find().is_some()
}

/// Installs the packages of what is missing.
fn install(missing: &[&Requirement]) -> Result<()> {
    let mut packages: Vec<&str> = missing.iter().map(|requirement| requirement.package).collect();
    packages.sort_unstable();
    packages.dedup();
    if packages.is_empty() {
        return Ok(());
    }
    let list = packages.join(" ");
    let id = Command::new("id").arg("-u").output();
    if !id.is_ok_and(|id| id.stdout.trim_ascii() == b"0") {
        bail!(
            "these Debian packages are missing, and installing them needs root: {list}\n\
             run as root: apt-get install {list}"
        );
    }
    if Command::new("apt-get").arg("--version").stdout(Stdio::null()).status().is_err() {
        bail!("these Debian packages are missing, and this machine has no apt-get: {list}\ninstall their equivalents");
    }
    step(&format!("setup: install {} Debian packages", packages.len()), || {
        for requirement in missing {
            eprintln!("      {}: {} ({})", requirement.package, requirement.file, requirement.purpose);
        }
        apt_get(&["update"])?;
        apt_get(&[&["install", "--no-install-recommends"], packages.as_slice()].concat())
    })
}

fn apt_get(args: &[&str]) -> Result<()> {
    let mut command = Command::new("apt-get");
    command.env("DEBIAN_FRONTEND", "noninteractive").args(["-q", "-q", "-y"]).args(args);
    run(command.stdout(Stdio::null()))
}
