//! What a build, the demo and the tests need, installed once.

use std::{
    env,
    path::Path,
    process::{Command, Stdio},
};

use anyhow::{Result, bail};
use ebpf_builder::{BPF_LINKER_VERSION, Compiler};

use crate::run::{cargo, run};

/// A program that must be there, and the Debian package that brings it.
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

/// What the lab's tests need beside that: clients and servers of other people's, and eyes.
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

/// What the tests on other kernels need beside that.
const VM_PROGRAMS: &[(&str, &str)] = &[("qemu-system-x86_64", "qemu-system-x86"), ("depmod", "kmod"), ("awk", "mawk")];

/// A file that must be there, and the Debian package that brings it.
const FILES: &[(&str, &str)] = &[("/usr/include/stdio.h", "libc6-dev")];

/// Debian's compiler for the programs, where rustup has none.
const DEBIAN_COMPILER: &[&str] = &["rustc-web", "rust-web-src"];

/// Installs what is missing; says so when there is nothing to do, if `talk`.
///
/// # Errors
/// With exactly what to install, where we can't: no root, no apt-get, or a failed installation.
pub fn setup(talk: bool) -> Result<()> {
    let mut packages = missing_packages(PROGRAMS, FILES);
    if Compiler::find().is_none() && !add_rust_src() {
        packages.extend(DEBIAN_COMPILER);
    }
    let linker_missing = ebpf_builder::find_linker().is_none();
    if packages.is_empty() && !linker_missing {
        if talk {
            println!("setup: everything is there");
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
        bail!("still no compiler for the programs: install {} by hand", DEBIAN_COMPILER.join(" and "));
    }
    eprintln!("setup: done");
    Ok(())
}

/// Installs what only the lab's tests need.
///
/// # Errors
/// As for [`setup`].
pub fn setup_lab() -> Result<()> {
    install_missing(LAB_PROGRAMS)
}

/// Installs what only the tests on other kernels need.
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

/// Asks rustup for core's source, where there is a nightly without it. It is no error if it can't be had.
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
    let by_hand = format!("as root: apt-get install {list}");
    let id = Command::new("id").arg("-u").output();
    if !id.is_ok_and(|id| id.stdout.trim_ascii() == b"0") {
        bail!("these Debian packages are missing, and only root can install them: {list}\n{by_hand}");
    }
    if Command::new("apt-get").arg("--version").stdout(Stdio::null()).status().is_err() {
        bail!(
            "these Debian packages are missing, and this machine has no apt-get: {list}\ninstall what brings the same"
        );
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
