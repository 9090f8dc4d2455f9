//! `cargo xtask test vm`: runs the tiers program and lab on other kernels than this machine's.
//!
//! Debian's kernels are unpacked (not installed) into `target/vm` and booted by qemu in software emulation. The
//! guest's only file system is an initramfs that contains the test binaries and what they need. Its serial console
//! is shown, and the last line on it has the exit status of the tests. The guest mounts nothing of the host and has
//! no network.

mod initramfs;
mod kernel;

use std::{
    fs,
    io::{BufRead as _, BufReader},
    path::{Path, PathBuf},
    process::{Command, Stdio},
    sync::mpsc::{RecvTimeoutError, channel},
    thread,
    time::{Duration, Instant},
};

use anyhow::{Context as _, Result, bail, ensure};
use clap::ValueEnum;

use crate::{
    build,
    progress::step,
    run::{cargo, output},
};
use initramfs::Initramfs;
pub use kernel::Kernel;

/// The guest's first process.
const INIT: &str = include_str!("init.sh");
/// Start of the guest's last line; the exit status of the tests follows it. `init.sh` writes it.
const MARKER: &str = "breaker-vm: exit ";
/// Maximum run time of one kernel. Minutes are usual, but a busy machine takes much longer.
const DEADLINE: Duration = Duration::from_secs(5400);
/// All CPU features that qemu emulates, except cmpxchg16b. The memory allocator of kernel 6.12 uses that instruction
/// and reports corrupt lists within seconds under qemu 7.2 (Debian 12). Without the instruction it uses a lock.
const CPU: &str = "max,cx16=off";
/// Emulates all CPUs on one host thread. With two threads, the guest sometimes executes an instruction that its
/// kernel has only half replaced (a jump label, such as the hook that tcx enables), and dies with `Oops: int3`.
const ACCELERATOR: &str = "tcg,thread=single";
/// Memory of the guest. The tests create maps sized for a node with 1 GiB, two sets at a time, and all files are in
/// memory too.
const MEMORY: &str = "3G";

/// Programs that the test code (`tests/src/lab`) and `init.sh` call.
const PROGRAMS: &[&str] =
    &["sh", "awk", "cat", "ip", "modprobe", "mount", "nsenter", "rm", "setsid", "sleep", "umount", "xargs"];

/// Programs that the lab tests call in addition.
const LAB_PROGRAMS: &[&str] = &[
    "bandwidth",
    "bash",
    "bpftool",
    "bridge",
    "curl",
    "dig",
    "dnsmasq",
    "ethtool",
    "haproxy",
    "ip6tables",
    "iperf3",
    "iptables",
    "iptables-restore",
    "iptables-save",
    "nghttp",
    "nghttpd",
    "nft",
    "ss",
    "tc",
    "tcpdump",
    "tshark",
];

/// Contents of /etc/passwd and /etc/group: users and groups that the lab's programs switch to or look up.
const USERS: &str = "root:x:0:0::/:/bin/sh\ntcpdump:x:100:100::/:/bin/sh\nnobody:x:65534:65534::/:/bin/sh\n";
const GROUPS: &str = "root:x:0:\ntcpdump:x:100:\nnogroup:x:65534:\n";

/// Kernel modules that the tests need: bridge, netfilter and VLANs, veth for pods' interfaces, tun, ciphers for IPsec, vxlan
/// for flannel's tunnel, bonds, and ifb for the bandwidth plugin.
const MODULES: &[&str] = &[
    "kernel/net",
    "kernel/lib",
    "kernel/crypto",
    "kernel/drivers/net/veth.ko",
    "kernel/drivers/net/tun.ko",
    "kernel/drivers/net/vxlan",
    "kernel/drivers/net/bonding",
    "kernel/drivers/net/ifb.ko",
];

/// A tier that runs in the guest.
#[derive(Clone, Copy, Debug, ValueEnum, PartialEq, Eq)]
pub enum Guest {
    /// The BPF programs, packet by packet.
    Program,
    /// The whole agent with real sockets.
    Lab,
}

impl Guest {
    const fn name(self) -> &'static str {
        match self {
            Self::Program => "program",
            Self::Lab => "lab",
        }
    }
}

/// Runs the tiers on each of the kernels, one after the other, in a guest with this number of CPUs.
///
/// # Errors
/// Tests failed (the message names the kernels; the remaining kernels run first), or something could not be built,
/// downloaded or started.
pub fn test(kernels: &[Kernel], tiers: &[Guest], cpus: u8, filter: Option<&str>) -> Result<()> {
    ensure!(cfg!(target_arch = "x86_64"), "the tests on other kernels run on x86-64 machines only");
    build::programs()?;
    let build = || tiers.iter().map(|tier| Tests::build(*tier)).collect::<Result<_>>();
    let tests: Vec<Tests> = step("build what runs in the guest", build)?;
    let mut failed = Vec::new();
    for kernel in kernels {
        if let Err(error) = step(&format!("run the tests on kernel {kernel}"), || run_on(*kernel, &tests, cpus, filter))
        {
            eprintln!("kernel {kernel}: {error:#}");
            failed.push(kernel.to_string());
        }
    }
    ensure!(failed.is_empty(), "tests failed on kernel {}", failed.join(" and "));
    Ok(())
}

/// The binaries of a tier.
struct Tests {
    tier: Guest,
    binary: PathBuf,
    /// Binaries that the tests start, by name.
    starts: Vec<(&'static str, PathBuf)>,
}

impl Tests {
    fn build(tier: Guest) -> Result<Self> {
        let mut starts = Vec::new();
        if tier == Guest::Lab {
            for (package, name) in [("breaker-agent", "breaker"), ("dummy-service", "dummy-service")] {
                starts.push((name, built(&["build", "--release", "-p", package, "--bin", name], name, false)?));
            }
        }
        let binary = built(&["test", "--no-run", "-p", "breaker-tests", "--test", tier.name()], tier.name(), true)?;
        Ok(Self { tier, binary, starts })
    }

    /// Adds the binaries where the tests expect them: in one directory, with a subdirectory per cargo profile.
    fn add_to(&self, files: &mut Initramfs) -> Result<()> {
        files.add_file(&format!("breaker/tests/{}", self.tier.name()), &self.binary)?;
        for (name, path) in &self.starts {
            files.add_file(&format!("breaker/release/{name}"), path)?;
        }
        if self.tier == Guest::Lab {
            for name in LAB_PROGRAMS {
                files.add_program(name)?;
            }
            files.add_folder(&iptables_extensions()?)?;
            files.add_bytes("etc/passwd", USERS.as_bytes(), 0o644)?;
            files.add_bytes("etc/group", GROUPS.as_bytes(), 0o644)?;
        }
        Ok(())
    }
}

/// Directory with the extensions of iptables (matches and targets).
fn iptables_extensions() -> Result<PathBuf> {
    let mut places =
        ["/usr/lib/x86_64-linux-gnu/xtables", "/usr/lib64/xtables", "/usr/lib/xtables"].iter().map(PathBuf::from);
    places.find(|path| path.is_dir()).context("the directory of iptables' extensions (xtables) was not found")
}

fn run_on(kernel: Kernel, tests: &[Tests], cpus: u8, filter: Option<&str>) -> Result<()> {
    let dir = ebpf_builder::workspace().join("target/vm").join(kernel.to_string());
    let image = kernel.fetch(&dir)?;
    let mut files = Initramfs::new()?;
    for name in PROGRAMS {
        files.add_program(name)?;
    }
    for path in MODULES {
        files.add_tree(&image.modules, path)?;
    }
    files.add_modules_index(&image.modules, &dir)?;
    for tests in tests {
        tests.add_to(&mut files)?;
    }
    let tiers: Vec<&str> = tests.iter().map(|tests| tests.tier.name()).collect();
    files.add_bytes("tiers", tiers.join(" ").as_bytes(), 0o644)?;
    files.add_bytes("init", INIT.as_bytes(), 0o755)?;
    files.add_bytes("filter", filter.unwrap_or_default().as_bytes(), 0o644)?;
    let initramfs = dir.join("initramfs.cpio");
    fs::write(&initramfs, files.finish()?).with_context(|| format!("write {}", initramfs.display()))?;
    boot(&image.vmlinuz, &initramfs, cpus)
}

/// Builds a binary and returns its path. `test`: whether it is a test binary.
fn built(args: &[&str], name: &str, test: bool) -> Result<PathBuf> {
    let mut command = cargo();
    command.args(args).args(["--message-format", "json-render-diagnostics"]);
    let messages = output(&mut command)?;
    let mut executables = messages.split(|byte| *byte == b'\n').filter_map(|line| {
        let message: serde_json::Value = serde_json::from_slice(line).ok()?;
        let is_it = message["target"]["name"] == name && message["profile"]["test"] == test;
        is_it.then(|| message["executable"].as_str().map(PathBuf::from)).flatten()
    });
    executables.next().with_context(|| format!("cargo built no binary {name}"))
}

/// Boots a kernel, shows its console, and waits for its end.
///
/// # Errors
/// The tests failed, or the guest ended without reporting their status (because of a panic, for example) or did not
/// end in time.
fn boot(vmlinuz: &Path, initramfs: &Path, cpus: u8) -> Result<()> {
    let mut qemu = Command::new("qemu-system-x86_64")
        // Without KVM, even where it is available, so that runs are the same everywhere. No disk, no network, no
        // screen.
        .args(["-accel", ACCELERATOR, "-cpu", CPU, "-smp", &cpus.to_string(), "-m", MEMORY])
        .args(["-nodefaults", "-display", "none", "-serial", "stdio", "-no-reboot"])
        .arg("-kernel")
        .arg(vmlinuz)
        .arg("-initrd")
        .arg(initramfs)
        // An oops counts as a failure too: it panics, which reboots at once, and with -no-reboot qemu then ends.
        .args(["-append", "console=ttyS0 quiet oops=panic panic=-1"])
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .spawn()
        .context("start qemu-system-x86_64")?;
    let console = BufReader::new(qemu.stdout.take().context("qemu's standard output is not available")?);
    let (sender, lines) = channel();
    thread::spawn(move || {
        for line in console.split(b'\n').map_while(Result::ok) {
            if sender.send(String::from_utf8_lossy(&line).trim_end().to_owned()).is_err() {
                return;
            }
        }
    });
    let until = Instant::now() + DEADLINE;
    let mut outcome = None;
    let ended = loop {
        match lines.recv_timeout(until.saturating_duration_since(Instant::now())) {
            Ok(line) => match line.split_once(MARKER) {
                Some((_, status)) => outcome = Some(status.to_owned()),
                None => println!("  {line}"),
            },
            Err(RecvTimeoutError::Disconnected) => break true,
            Err(RecvTimeoutError::Timeout) => break false,
        }
    };
    if !ended {
        let _ = qemu.kill();
    }
    qemu.wait().context("wait for qemu")?;
    match outcome.as_deref() {
        Some("0") => Ok(()),
        Some(status) => bail!("tests failed (exit status {status})"),
        None if ended => bail!("the guest ended without reporting the status of the tests"),
        None => bail!("the guest did not end within {} s", DEADLINE.as_secs()),
    }
}
