//! `cargo xtask test vm`: the tiers program and lab on other kernels than this machine's.
//!
//! Debian's kernels are unpacked (not installed) into `target/vm`, booted by qemu under software emulation, and find as
//! their whole world an initramfs with the test binaries in it. What the guest says on its serial console is shown; its last
//! line says how the tests ended. Nothing of the host is mounted, no network leads out of the guest.

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

use crate::run::{cargo, output};
use initramfs::Initramfs;
pub use kernel::Kernel;

/// What the guest runs first.
const INIT: &str = include_str!("init.sh");
/// What its last line begins with, before the tests' exit status. `init.sh` writes it.
const MARKER: &str = "breaker-vm: exit ";
/// How long a kernel may take for everything: minutes are usual, and many more where others are at work on the machine.
const DEADLINE: Duration = Duration::from_secs(5400);
/// All that qemu can, but for cmpxchg16b: kernel 6.12's allocator uses it, and finds its lists broken within seconds under
/// the emulation of qemu 7.2, Debian 12's. Without it, it takes a lock.
const CPU: &str = "max,cx16=off";
/// Two processors that take turns on one thread of the host. On two threads an instruction that the kernel replaces while it
/// runs (a jump label: the hook that tcx switches on) is now and then seen half replaced, as `Oops: int3`, which ends the guest.
const ACCELERATOR: &str = "tcg,thread=single";
const PROCESSORS: &str = "2";
/// Guest's memory: the tests make maps as for a node with 1 GiB, two at a time; and there is no other place for files.
const MEMORY: &str = "3G";

/// What the rigs of the tests call on the way (`tests/src/lab`), and `init.sh`.
const PROGRAMS: &[&str] =
    &["sh", "awk", "cat", "ip", "modprobe", "mount", "nsenter", "rm", "setsid", "sleep", "umount", "xargs"];

/// What the lab calls beside that.
const LAB_PROGRAMS: &[&str] = &[
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

/// Users that these programs want to be, or to know.
const USERS: &str = "root:x:0:0::/:/bin/sh\ntcpdump:x:100:100::/:/bin/sh\nnobody:x:65534:65534::/:/bin/sh\n";
const GROUPS: &str = "root:x:0:\ntcpdump:x:100:\nnogroup:x:65534:\n";

/// Modules that the rigs need: a bridge that netfilter sees, and pods' interfaces; flannel's tunnel.
const MODULES: &[&str] = &["kernel/net", "kernel/lib", "kernel/drivers/net/veth.ko", "kernel/drivers/net/vxlan"];

/// A tier that runs in the guest.
#[derive(Clone, Copy, Debug, ValueEnum, PartialEq, Eq)]
pub enum Guest {
    /// The programs, packet by packet.
    Program,
    /// Real sockets, and the real agent.
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

/// Runs tiers on these kernels, one after the other.
///
/// # Errors
/// The kernels that failed, after all had their turn; or what could not be built, had or started.
pub fn test(kernels: &[Kernel], tiers: &[Guest], filter: Option<&str>) -> Result<()> {
    ensure!(cfg!(target_arch = "x86_64"), "the kernel matrix is for x86-64: qemu's machine and Debian's kernels are");
    let tests: Vec<Tests> = tiers.iter().map(|tier| Tests::build(*tier)).collect::<Result<_>>()?;
    let mut failed = Vec::new();
    for kernel in kernels {
        let started = Instant::now();
        println!("kernel {kernel}");
        match run_on(*kernel, &tests, filter) {
            Ok(()) => println!("kernel {kernel}: passed in {} s\n", started.elapsed().as_secs()),
            Err(error) => {
                eprintln!("kernel {kernel}: {error:#}\n");
                failed.push(kernel.to_string());
            }
        }
    }
    ensure!(failed.is_empty(), "tests failed on kernel {}", failed.join(" and "));
    Ok(())
}

/// A tier's binaries.
struct Tests {
    tier: Guest,
    binary: PathBuf,
    /// What it starts itself, as they are named.
    starts: Vec<(&'static str, PathBuf)>,
}

impl Tests {
    fn build(tier: Guest) -> Result<Self> {
        let mut starts = Vec::new();
        if tier == Guest::Lab {
            for (package, name) in [("breaker-agent", "breaker"), ("breaker-tests", "dummy-service")] {
                starts.push((name, built(&["build", "--release", "-p", package, "--bin", name], name, false)?));
            }
        }
        let binary = built(&["test", "--no-run", "-p", "breaker-tests", "--test", tier.name()], tier.name(), true)?;
        Ok(Self { tier, binary, starts })
    }

    /// Puts them where the tests look for them: below one directory, with a folder for their profile.
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
            files.add_bytes("etc/passwd", USERS.as_bytes(), 0o644);
            files.add_bytes("etc/group", GROUPS.as_bytes(), 0o644);
        }
        Ok(())
    }
}

/// Where iptables has its matches and targets.
fn iptables_extensions() -> Result<PathBuf> {
    let mut places =
        ["/usr/lib/x86_64-linux-gnu/xtables", "/usr/lib64/xtables", "/usr/lib/xtables"].iter().map(PathBuf::from);
    places.find(|path| path.is_dir()).context("iptables' matches and targets (xtables) are nowhere")
}

fn run_on(kernel: Kernel, tests: &[Tests], filter: Option<&str>) -> Result<()> {
    let dir = ebpf_builder::workspace().join("target/vm").join(kernel.to_string());
    let image = kernel.fetch(&dir)?;
    let mut files = Initramfs::new();
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
    files.add_bytes("tiers", tiers.join(" ").as_bytes(), 0o644);
    files.add_bytes("init", INIT.as_bytes(), 0o755);
    files.add_bytes("filter", filter.unwrap_or_default().as_bytes(), 0o644);
    let initramfs = dir.join("initramfs.cpio");
    fs::write(&initramfs, files.finish()).with_context(|| format!("write {}", initramfs.display()))?;
    boot(&image.vmlinuz, &initramfs)
}

/// Builds a binary, of a test or not, and says where it is.
fn built(args: &[&str], name: &str, test: bool) -> Result<PathBuf> {
    let mut command = cargo();
    command.args(args).args(["--quiet", "--message-format", "json-render-diagnostics"]);
    let messages = output(&mut command)?;
    let mut executables = messages.split(|byte| *byte == b'\n').filter_map(|line| {
        let message: serde_json::Value = serde_json::from_slice(line).ok()?;
        let is_it = message["target"]["name"] == name && message["profile"]["test"] == test;
        is_it.then(|| message["executable"].as_str().map(PathBuf::from)).flatten()
    });
    executables.next().with_context(|| format!("cargo built no binary {name}"))
}

/// Boots a kernel, shows what it says, and waits for its end.
///
/// # Errors
/// Tests that failed, a guest that ended without a word about them (a panic, say), or that did not end in time.
fn boot(vmlinuz: &Path, initramfs: &Path) -> Result<()> {
    let mut qemu = Command::new("qemu-system-x86_64")
        // Without KVM, also where there is one: the same everywhere. A machine without disk, network and screen.
        .args(["-accel", ACCELERATOR, "-cpu", CPU, "-smp", PROCESSORS, "-m", MEMORY])
        .args(["-nodefaults", "-display", "none", "-serial", "stdio", "-no-reboot"])
        .arg("-kernel")
        .arg(vmlinuz)
        .arg("-initrd")
        .arg(initramfs)
        // An oops is a failure, too: it reboots at once, which ends qemu.
        .args(["-append", "console=ttyS0 quiet oops=panic panic=-1"])
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .spawn()
        .context("start qemu-system-x86_64")?;
    let console = BufReader::new(qemu.stdout.take().context("qemu has no console")?);
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
        None if ended => bail!("the guest ended without a word about the tests"),
        None => bail!("the guest did not end within {} s", DEADLINE.as_secs()),
    }
}
