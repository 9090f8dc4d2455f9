//! Builds the programs in `breaker-ebpf` for the kernel.
//!
//! Rust has no precompiled `core` for BPF, so the compiler must come with core's source, and building it needs
//! unstable flags. Two compilers will do: a rustup nightly with `rust-src`, or Debian's `rustc-web` with
//! `rust-web-src` (a stable compiler that is told to accept unstable flags). [`Compiler::find`] takes the first that
//! is there. Linking is bpf-linker's, which also writes the type information.

#![forbid(unsafe_code)]

use std::{
    env,
    ffi::OsString,
    path::{Path, PathBuf},
    process::Command,
};

use anyhow::{Context as _, Result, bail, ensure};

/// The version that the programs are known to link with.
pub const BPF_LINKER_VERSION: &str = "0.10.3";
/// Little-endian BPF.
pub const TARGET: &str = "bpfel-unknown-none";
/// Debian's compiler and its source.
const DEBIAN_RUSTC: &str = "/usr/bin/rustc";

/// A compiler that can build `core` for the kernel.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Compiler {
    /// A rustup toolchain, by the path of its `rustc`.
    Nightly(PathBuf),
    /// Debian's, by its path.
    Debian(PathBuf),
}

impl Compiler {
    /// The first compiler that has the source of `core`.
    #[must_use]
    pub fn find() -> Option<Self> {
        if let Some(rustc) = rustup_nightly()
            && has_core_source(&rustc)
        {
            return Some(Self::Nightly(rustc));
        }
        let debian = PathBuf::from(DEBIAN_RUSTC);
        has_core_source(&debian).then_some(Self::Debian(debian))
    }

    /// Path of the `rustc`.
    #[must_use]
    pub fn rustc(&self) -> &Path {
        match self {
            Self::Nightly(path) | Self::Debian(path) => path,
        }
    }
}

/// The `rustc` of rustup's nightly, where rustup has one.
fn rustup_nightly() -> Option<PathBuf> {
    let output = Command::new("rustup").args(["which", "--toolchain", "nightly", "rustc"]).output().ok()?;
    let path = PathBuf::from(String::from_utf8(output.stdout).ok()?.trim());
    (output.status.success() && path.is_file()).then_some(path)
}

fn has_core_source(rustc: &Path) -> bool {
    let Ok(output) = Command::new(rustc).args(["--print", "sysroot"]).output() else { return false };
    let sysroot = String::from_utf8_lossy(&output.stdout);
    output.status.success() && Path::new(sysroot.trim()).join("lib/rustlib/src/rust/library/core/src/lib.rs").is_file()
}

/// Where bpf-linker is: on the path, or where cargo installs to.
#[must_use]
pub fn find_linker() -> Option<PathBuf> {
    let cargo_bin = env::var_os("CARGO_HOME")
        .map(PathBuf::from)
        .or_else(|| env::var_os("HOME").map(|home| PathBuf::from(home).join(".cargo")))
        .map(|home| home.join("bin"));
    let path = env::var_os("PATH").unwrap_or_default();
    env::split_paths(&path).chain(cargo_bin).map(|dir| dir.join("bpf-linker")).find(|path| path.is_file())
}

/// The workspace's directory, as seen from any of its packages' build scripts and binaries.
#[must_use]
pub fn workspace() -> PathBuf {
    let here = Path::new(env!("CARGO_MANIFEST_DIR"));
    here.parent().unwrap_or(here).to_owned()
}

/// What was built.
#[derive(Clone, Debug)]
pub struct Objects {
    /// The programs for users.
    pub breaker: PathBuf,
    /// Somebody else's programs, for the tests.
    pub foreign: PathBuf,
}

/// Builds the programs; a build without changes only asks cargo.
///
/// # Errors
/// A missing compiler or linker (with what to do), or the failed command.
pub fn build(release: bool) -> Result<Objects> {
    let mut cargo = cargo("build")?;
    if release {
        cargo.arg("--release");
    }
    run(&mut cargo)?;
    let out = target_dir().join(TARGET).join(if release { "release" } else { "debug" });
    let objects = Objects { breaker: out.join("breaker"), foreign: out.join("foreign") };
    for object in [&objects.breaker, &objects.foreign] {
        ensure!(object.is_file(), "the build left no {}", object.display());
    }
    Ok(objects)
}

/// Builds the programs for a build script, which runs again only when something that they are made of has changed.
///
/// # Errors
/// As for [`build`].
pub fn build_for_script() -> Result<Objects> {
    for input in ["breaker-ebpf/src", "breaker-ebpf/Cargo.toml", "breaker-ebpf/Cargo.lock", "breaker-common/src"] {
        println!("cargo::rerun-if-changed={}", workspace().join(input).display());
    }
    build(true)
}

/// Builds the programs with warnings as errors. (The compiler that builds them brings no clippy that fits, where it is
/// Debian's; with a nightly, clippy runs.)
///
/// # Errors
/// As for [`build`].
pub fn lint() -> Result<()> {
    let clippy =
        matches!(Compiler::find(), Some(Compiler::Nightly(rustc)) if rustc.with_file_name("cargo-clippy").is_file());
    let mut cargo = if clippy { cargo("clippy")? } else { cargo("check")? };
    run(cargo.args(["--quiet", "--release", "--features", "strict"]))
}

fn target_dir() -> PathBuf {
    workspace().join("target/ebpf")
}

/// A cargo that compiles the programs: another target, compiler and flags than the agent's.
fn cargo(subcommand: &str) -> Result<Command> {
    let compiler = Compiler::find().context(
        "no compiler for the programs: neither a rustup nightly with rust-src nor Debian's rustc-web with rust-web-src; \
         run `cargo xtask setup`",
    )?;
    let linker = find_linker().context("bpf-linker is not installed; run `cargo xtask setup`")?;
    let outer = env::var_os("CARGO").unwrap_or_else(|| OsString::from("cargo"));
    // A nightly brings a cargo (and a clippy) of its own; Debian's compiler is driven by the one that runs us.
    let mut cargo = match &compiler {
        Compiler::Nightly(rustc) if rustc.with_file_name("cargo").is_file() => {
            let mut cargo = Command::new(rustc.with_file_name("cargo"));
            cargo.env("RUSTUP_TOOLCHAIN", "nightly").env_remove("CARGO");
            cargo
        }
        Compiler::Nightly(_) | Compiler::Debian(_) => Command::new(outer),
    };
    // What the outer cargo set for the agent's target does not hold for this one.
    for (name, _) in env::vars_os() {
        let name = name.to_string_lossy();
        let ours = ["CARGO_HOME", "CARGO_NET_OFFLINE"].contains(&&*name);
        if (name.starts_with("CARGO_") && !ours) || name.starts_with("RUSTC_") || name == "RUSTFLAGS" {
            cargo.env_remove(&*name);
        }
    }
    let flags = [
        format!("-Clinker={}", linker.display()),
        "-Clink-arg=--btf".to_owned(),
        // Otherwise each copy or fill of a few bytes, such as a key's padding, is a call of a loop over bytes.
        "-Clink-arg=--disable-expand-memcpy-in-order".to_owned(),
        // Atomics with a return value, 32-bit jumps: kernel 5.12 and later.
        "-Ctarget-cpu=v3".to_owned(),
        "-Cdebuginfo=2".to_owned(),
        // The lines that `bpftool prog dump` shows name their files; where they were built is nobody's business, and would
        // make other programs of it.
        format!("--remap-path-prefix={}=breaker", workspace().display()),
    ];
    cargo
        .current_dir(workspace().join("breaker-ebpf"))
        .env("RUSTC", compiler.rustc())
        .env("RUSTC_BOOTSTRAP", "1")
        .env("CARGO_ENCODED_RUSTFLAGS", flags.join("\x1f"))
        .args([subcommand, "--locked", "-Z", "build-std=core", "--target", TARGET, "--target-dir"])
        .arg(target_dir());
    Ok(cargo)
}

fn run(cargo: &mut Command) -> Result<()> {
    let status = cargo.status().with_context(|| format!("start {cargo:?}"))?;
    if !status.success() {
        bail!("the build of the programs failed: {cargo:?}");
    }
    Ok(())
}
