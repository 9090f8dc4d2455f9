//! Builds the BPF programs in `breaker-ebpf`, and those of the tests in `tests/third-party`.
//!
//! Rust ships no precompiled `core` for BPF targets. The compiler must therefore come with the source of `core`, and
//! building that needs unstable flags. Two compilers are supported: a rustup nightly with `rust-src`, and Debian's
//! `rustc-web` with `rust-web-src`, a stable compiler that `RUSTC_BOOTSTRAP` makes accept unstable flags.
//! [`Compiler::find`] returns the first one that is installed. bpf-linker links the programs and writes BTF, their
//! type information.

#![forbid(unsafe_code)]

use std::{
    env,
    ffi::OsString,
    fs,
    path::{Path, PathBuf},
    process::Command,
};

use anyhow::{Context as _, Result, ensure};
use object::{
    build::elf::{Builder, SectionData},
    elf::SHT_STRTAB,
};

/// Version of bpf-linker that the programs are tested with.
pub const BPF_LINKER_VERSION: &str = "0.10.3";
/// Rust target: little-endian BPF.
pub const TARGET: &str = "bpfel-unknown-none";
/// Path of Debian's compiler.
const DEBIAN_RUSTC: &str = "/usr/bin/rustc";

/// A compiler that can build `core` for BPF.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Compiler {
    /// The nightly toolchain of rustup; the path is that of its `rustc`.
    Nightly(PathBuf),
    /// Debian's compiler; the path is that of its `rustc`.
    Debian(PathBuf),
}

impl Compiler {
    /// Returns the first compiler that comes with the source of `core`; `None` if there is none.
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

/// Path of the `rustc` of rustup's nightly toolchain, if that is installed.
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

/// Finds bpf-linker in `PATH` or in the directory that cargo installs binaries to.
#[must_use]
pub fn find_linker() -> Option<PathBuf> {
    let cargo_bin = env::var_os("CARGO_HOME")
        .map(PathBuf::from)
        .or_else(|| env::var_os("HOME").map(|home| PathBuf::from(home).join(".cargo")))
        .map(|home| home.join("bin"));
    let path = env::var_os("PATH").unwrap_or_default();
    env::split_paths(&path).chain(cargo_bin).map(|dir| dir.join("bpf-linker")).find(|path| path.is_file())
}

/// Directory of the workspace. Works for build scripts and binaries of all its packages.
#[must_use]
pub fn workspace() -> PathBuf {
    let here = Path::new(env!("CARGO_MANIFEST_DIR"));
    here.parent().unwrap_or(here).to_owned()
}

/// A package of BPF programs. Each is a cargo workspace of its own.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Package {
    /// breaker's own programs.
    Breaker,
    /// Stand-ins for other vendors' programs, for the tests.
    ThirdParty,
}

impl Package {
    /// All packages.
    pub const ALL: [Self; 2] = [Self::Breaker, Self::ThirdParty];

    /// The package's directory, below that of the workspace.
    const fn dir(self) -> &'static str {
        match self {
            Self::Breaker => "breaker-ebpf",
            Self::ThirdParty => "tests/third-party",
        }
    }

    /// Path of the package's manifest.
    #[must_use]
    pub fn manifest(self) -> PathBuf {
        workspace().join(self.dir()).join("Cargo.toml")
    }

    /// The name of the object file that it builds.
    const fn object(self) -> &'static str {
        match self {
            Self::Breaker => "breaker",
            Self::ThirdParty => "third-party",
        }
    }
}

/// Builds a package and returns its object file. If nothing has changed, cargo builds nothing.
///
/// # Errors
/// A compiler or linker is missing (the message says how to install it), or the build command failed.
pub fn build(package: Package, release: bool) -> Result<PathBuf> {
    let mut cargo = cargo(package, "build")?;
    if release {
        cargo.arg("--release");
    }
    run(&mut cargo)?;
    let object = target_dir().join(TARGET).join(if release { "release" } else { "debug" }).join(package.object());
    ensure!(object.is_file(), "the build of the programs did not produce {}", object.display());
    Ok(object)
}

/// Builds a package in a build script, and makes cargo rerun the script only when one of its inputs changes. The
/// returned object file has no DWARF sections.
///
/// # Errors
/// As for [`build`]. The object file cannot be read or written.
pub fn build_for_script(package: Package) -> Result<PathBuf> {
    let dir = package.dir();
    let own = ["src", "Cargo.toml", "Cargo.lock"].map(|input| format!("{dir}/{input}"));
    for input in own.into_iter().chain(["breaker-common/src".to_owned()]) {
        println!("cargo::rerun-if-changed={}", workspace().join(input).display());
    }
    let out = env::var_os("OUT_DIR").context("OUT_DIR is not set: this is no build script")?;
    let built = build(package, true)?;
    let stripped = Path::new(&out).join(format!("{}.o", package.object()));
    strip_dwarf(&built, &stripped).with_context(|| format!("strip {}", built.display()))?;
    Ok(stripped)
}

/// Writes an object file without its DWARF sections, which are most of it. The kernel and bpftool read source lines
/// from BTF, which bpf-linker has made from them.
fn strip_dwarf(from: &Path, to: &Path) -> Result<()> {
    let object = fs::read(from)?;
    let mut elf = Builder::read(object.as_slice())?;
    let is_dwarf = |name: &[u8]| name.starts_with(b".debug_") || name.starts_with(b".rel.debug_");
    for section in &mut elf.sections {
        section.delete = is_dwarf(&section.name);
    }
    elf.delete_orphans();
    // LLVM puts the names of sections into `.strtab`, where this writer expects only those of symbols.
    let names = elf.sections.add();
    names.name = b".shstrtab".as_slice().into();
    names.sh_type = SHT_STRTAB;
    names.data = SectionData::SectionString;
    let mut stripped = Vec::new();
    elf.write(&mut stripped)?;
    Ok(fs::write(to, stripped)?)
}

/// Checks the programs with warnings as errors: with clippy if the compiler is a nightly that has it, else with
/// `cargo check`. (Debian's compiler has no matching clippy.)
///
/// # Errors
/// As for [`build`].
pub fn lint() -> Result<()> {
    let clippy =
        matches!(Compiler::find(), Some(Compiler::Nightly(rustc)) if rustc.with_file_name("cargo-clippy").is_file());
    for package in Package::ALL {
        let mut cargo = cargo(package, if clippy { "clippy" } else { "check" })?;
        run(cargo.args(["--release", "--features", "strict"]))?;
    }
    Ok(())
}

fn target_dir() -> PathBuf {
    workspace().join("target/ebpf")
}

/// A cargo command that compiles the programs, with their own target, compiler and flags instead of the agent's.
fn cargo(package: Package, subcommand: &str) -> Result<Command> {
    let compiler = Compiler::find().context(
        "no compiler for the BPF programs: neither a rustup nightly with rust-src nor Debian's rustc-web with \
         rust-web-src is installed; run `cargo xtask setup`",
    )?;
    let linker = find_linker().context("bpf-linker is not installed; run `cargo xtask setup`")?;
    let outer = env::var_os("CARGO").unwrap_or_else(|| OsString::from("cargo"));
    // A nightly comes with its own cargo (and clippy). Debian's compiler is run by the cargo that runs this code.
    let mut cargo = match &compiler {
        Compiler::Nightly(rustc) if rustc.with_file_name("cargo").is_file() => {
            let mut cargo = Command::new(rustc.with_file_name("cargo"));
            cargo.env("RUSTUP_TOOLCHAIN", "nightly").env_remove("CARGO");
            cargo
        }
        Compiler::Nightly(_) | Compiler::Debian(_) => Command::new(outer),
    };
    // Remove what the outer cargo set for the agent's target.
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
        // Otherwise the linker turns each copy or fill of a few bytes, such as a key's padding, into a call of a
        // byte loop.
        "-Clink-arg=--disable-expand-memcpy-in-order".to_owned(),
        // 32-bit jumps and atomics that return a value. Needs kernel 5.12 or later.
        "-Ctarget-cpu=v3".to_owned(),
        "-Cdebuginfo=2".to_owned(),
        // `bpftool prog dump` shows source lines with file names. Without the mapping the objects would contain the
        // path of the build directory, and would differ between build directories.
        format!("--remap-path-prefix={}=breaker", workspace().display()),
    ];
    cargo
        .current_dir(workspace().join(package.dir()))
        .env("RUSTC", compiler.rustc())
        .env("RUSTC_BOOTSTRAP", "1")
        .env("CARGO_ENCODED_RUSTFLAGS", flags.join("\x1f"))
        .args([subcommand, "--locked", "-Z", "build-std=core", "--target", TARGET, "--target-dir"])
        .arg(target_dir());
    Ok(cargo)
}

/// Runs a command. The error names it without its environment, which is long.
fn run(cargo: &mut Command) -> Result<()> {
    let words = [cargo.get_program()].into_iter().chain(cargo.get_args()).map(|word| word.to_string_lossy());
    let shown = words.collect::<Vec<_>>().join(" ");
    let status = cargo.status().with_context(|| format!("start {shown}"))?;
    ensure!(status.success(), "the build of the BPF programs failed: {shown}");
    Ok(())
}
