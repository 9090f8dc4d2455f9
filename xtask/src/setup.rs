//! Installs what builds, the demo and the tests need.

use std::{
    env,
    path::Path,
    process::{Command, Stdio},
};

use anyhow::{Result, bail};
use ebpf_builder::{BPF_LINKER_VERSION, Compiler};

use crate::run::{cargo, run};

/// Programs that must be installed, each with the Debian package that contains it.
const PROGRAMS: &[(&str, &str)] = &[
    ("cc", "gcc"),
    ("ip", "iproute2"),
    ("tc", "iproute2"),
    ("iptables", "iptables"),
    ("iptables-restore", "iptables"),
    ("bpftool", "bpftool"),
    ("modprobe", "kmod"),
    ("haproxy", "haproxy"),
    ("nft", "nftables"),
    ("iperf3", "iperf3"),
    ("taskset", "util-linux"),
];

/// Programs that the lab tests need in addition: third-party clients and servers, and packet capture.
const LAB_PROGRAMS: &[(&str, &str)] = &[
    ("curl", "curl"),
    ("nghttp", "nghttp2-client"),
    ("nghttpd", "nghttp2-server"),
    ("dig", "bind9-dnsutils"),
    ("dnsmasq", "dnsmasq-base"),
    ("ethtool", "ethtool"),
    ("tcpdump", "tcpdump"),
    ("tshark", "tshark"),
];

/// Programs that the tests on other kernels need in addition.
const VM_PROGRAMS: &[(&str, &str)] = &[("qemu-system-x86_64", "qemu-system-x86"), ("depmod", "kmod"), ("awk", "mawk")];

/// Files that must exist, each with the Debian package that contains it.
const FILES: &[(&str, &str)] = &[("/usr/include/stdio.h", "libc6-dev")];

/// Debian's compiler for the BPF programs, used if rustup has none.
const DEBIAN_COMPILER: &[&str] = &["rustc-web", "rust-web-src"];

/// Installs what is missing. If nothing is missing and `talk` is set, prints a message.
///
/// # Errors
/// Something cannot be installed: root or apt-get is missing, or an installation failed. The message says what to
/// install.
pub fn setup(talk: bool) -> Result<()> {
    let mut packages = missing_packages(PROGRAMS, FILES);
    if Compiler::find().is_none() && !add_rust_src() {
        packages.extend(DEBIAN_COMPILER);
    }
    let linker_missing = ebpf_builder::find_linker().is_none();
    if packages.is_empty() && !linker_missing {
        if talk {
            println!("setup: nothing to install");
        }
        return Ok(());
    }
    if !packages.is_empty() {
        install_packages(&packages)?;
    }
    if linker_missing {
        eprintln!("setup: cargo install bpf-linker {BPF_LINKER_VERSION} (about a minute)");
        run(cargo().args(["install", "--quiet", "bpf-linker", "--version", BPF_LINKER_VERSION, "--locked"]))?;
    }
    if Compiler::find().is_none() {
        bail!("there is still no compiler for the BPF programs: install {}", DEBIAN_COMPILER.join(" and "));
    }
    eprintln!("setup: done");
    Ok(())
}

/// Installs the additional programs that the lab tests need.
///
/// # Errors
/// As for [`setup`].
pub fn setup_lab() -> Result<()> {
    install_missing(LAB_PROGRAMS)
}

/// Installs the additional programs that the tests on other kernels need.
///
/// # Errors
/// As for [`setup`].
pub fn setup_vm() -> Result<()> {
    install_missing(VM_PROGRAMS)
}

fn install_missing(programs: &Needed) -> Result<()> {
    let packages = missing_packages(programs, &[]);
    if packages.is_empty() { Ok(()) } else { install_packages(&packages) }
}

type Needed = [(&'static str, &'static str)];

fn missing_packages(programs: &Needed, files: &Needed) -> Vec<&'static str> {
    let path = env::var_os("PATH").unwrap_or_default();
    let dirs: Vec<_> = env::split_paths(&path).chain(["/usr/sbin".into(), "/sbin".into()]).collect();
    let programs = programs.iter().filter(|(program, _)| !dirs.iter().any(|dir| dir.join(program).is_file()));
    let files = files.iter().filter(|(file, _)| !Path::new(file).exists());
    let mut packages: Vec<_> = programs.chain(files).map(|(_, package)| *package).collect();
    packages.sort_unstable();
    packages.dedup();
    packages
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

fn install_packages(packages: &[&str]) -> Result<()> {
    let list = packages.join(" ");
    let by_hand = format!("run as root: apt-get install {list}");
    let id = Command::new("id").arg("-u").output();
    if !id.is_ok_and(|id| id.stdout.trim_ascii() == b"0") {
        bail!("these Debian packages are missing, and installing them needs root: {list}\n{by_hand}");
    }
    if Command::new("apt-get").arg("--version").stdout(Stdio::null()).status().is_err() {
        bail!("these Debian packages are missing, and this machine has no apt-get: {list}\ninstall their equivalents");
    }
    eprintln!("setup: apt-get install {list}");
    let apt = |args: &[&str]| {
        let mut command = Command::new("apt-get");
        command.env("DEBIAN_FRONTEND", "noninteractive").args(["-q", "-q", "-y"]).args(args);
        command.stdout(Stdio::null());
        run(&mut command)
    };
    apt(&["update"])?;
    apt(&[&["install", "--no-install-recommends"], packages].concat())
}
