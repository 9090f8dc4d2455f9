//! `cargo xtask test vm`: the program tier on other kernels than this machine's.
//!
//! Debian's kernels are unpacked (not installed) into `target/vm`, booted by qemu under software emulation, and find as
//! their whole world an initramfs with the test binary in it. What the guest says on its serial console is shown; its last
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

use crate::run::{cargo, output};
use initramfs::Initramfs;
pub use kernel::Kernel;

/// What the guest runs first.
const INIT: &str = include_str!("init.sh");
/// What its last line begins with, before the tests' exit status. `init.sh` writes it.
const MARKER: &str = "breaker-vm: exit ";
/// How long a kernel may take for everything: minutes are usual, and many more where others are at work on the machine.
const DEADLINE: Duration = Duration::from_secs(2400);
/// All that qemu can, but for cmpxchg16b: kernel 6.12's allocator uses it, and finds its lists broken within seconds under
/// the emulation of qemu 7.2, Debian 12's. Without it, it takes a lock.
const CPU: &str = "max,cx16=off";
/// Guest's memory: the tests make maps as for a node with 1 GiB, two at a time.
const MEMORY: &str = "2G";

/// What the rigs of the tests call on the way (`tests/src/lab`), and `init.sh`.
const PROGRAMS: &[&str] =
    &["sh", "awk", "cat", "ip", "modprobe", "mount", "nsenter", "rm", "setsid", "sleep", "umount", "xargs"];

/// Modules that the rigs need: a bridge that netfilter sees, and pods' interfaces.
const MODULES: &[&str] = &["kernel/net", "kernel/lib", "kernel/drivers/net/veth.ko"];

/// Runs the program tier on these kernels, one after the other.
///
/// # Errors
/// The kernels that failed, after all had their turn; or what could not be built, had or started.
pub fn test(kernels: &[Kernel], filter: Option<&str>) -> Result<()> {
    ensure!(cfg!(target_arch = "x86_64"), "the kernel matrix is for x86-64: qemu's machine and Debian's kernels are");
    let binary = test_binary("program")?;
    let mut failed = Vec::new();
    for kernel in kernels {
        let started = Instant::now();
        println!("kernel {kernel}");
        match run_on(*kernel, &binary, filter) {
            Ok(()) => println!("kernel {kernel}: passed in {} s\n", started.elapsed().as_secs()),
            Err(error) => {
                eprintln!("kernel {kernel}: {error:#}\n");
                failed.push(kernel.to_string());
            }
        }
    }
    ensure!(failed.is_empty(), "the program tier failed on kernel {}", failed.join(" and "));
    Ok(())
}

fn run_on(kernel: Kernel, binary: &Path, filter: Option<&str>) -> Result<()> {
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
    files.add_file("program", binary)?;
    files.add_bytes("init", INIT.as_bytes(), 0o755);
    files.add_bytes("filter", filter.unwrap_or_default().as_bytes(), 0o644);
    let initramfs = dir.join("initramfs.cpio");
    fs::write(&initramfs, files.finish()).with_context(|| format!("write {}", initramfs.display()))?;
    boot(&image.vmlinuz, &initramfs)
}

/// Builds a test binary of `breaker-tests`, and says where it is.
fn test_binary(name: &str) -> Result<PathBuf> {
    let mut command = cargo();
    command.args(["test", "--quiet", "--no-run", "--message-format", "json-render-diagnostics"]);
    let messages = output(command.args(["-p", "breaker-tests", "--test", name]))?;
    let mut executables = messages.split(|byte| *byte == b'\n').filter_map(|line| {
        let message: serde_json::Value = serde_json::from_slice(line).ok()?;
        let is_it = message["target"]["name"] == name && message["profile"]["test"] == true;
        is_it.then(|| message["executable"].as_str().map(PathBuf::from)).flatten()
    });
    executables.next().with_context(|| format!("cargo built no test binary {name}"))
}

/// Boots a kernel, shows what it says, and waits for its end.
///
/// # Errors
/// Tests that failed, a guest that ended without a word about them (a panic, say), or that did not end in time.
fn boot(vmlinuz: &Path, initramfs: &Path) -> Result<()> {
    let mut qemu = Command::new("qemu-system-x86_64")
        // Without KVM, also where there is one: the same everywhere. A machine without disk, network and screen.
        .args(["-accel", "tcg", "-cpu", CPU, "-smp", "2", "-m", MEMORY])
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
