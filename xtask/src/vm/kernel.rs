//! Downloads Debian's kernels from the archive that this machine's apt is configured for. They are unpacked, not
//! installed.

use std::{
    fmt, fs,
    path::{Path, PathBuf},
    process::{Command, Stdio},
};

use anyhow::{Context as _, Result, ensure};
use clap::ValueEnum;

use crate::run::{output, run};

/// Metapackage that depends on the newest kernel of its suite. The cloud flavour has drivers for virtual machines
/// only.
const PACKAGE: &str = "linux-image-cloud-amd64";
/// Debian release whose kernel versions [`Kernel`] lists.
const RELEASE: &str = "bookworm";
/// Path of Debian's archive keys.
const KEYRING: &str = "/usr/share/keyrings/debian-archive-keyring.gpg";

/// A kernel that the tests run on.
#[derive(Clone, Copy, Debug, ValueEnum, PartialEq, Eq)]
pub enum Kernel {
    /// The kernel of Debian 12. It has no tcx.
    #[value(name = "6.1")]
    V6_1,
    /// The kernel of Debian 12's backports and of Debian 13.
    #[value(name = "6.12")]
    V6_12,
}

/// An unpacked kernel.
pub struct Image {
    pub vmlinuz: PathBuf,
    /// Path of `lib/modules/<version>`.
    pub modules: PathBuf,
}

impl fmt::Display for Kernel {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::V6_1 => "6.1",
            Self::V6_12 => "6.12",
        })
    }
}

impl Kernel {
    /// Suite of the Debian archive that has this kernel.
    fn suite(self) -> String {
        match self {
            Self::V6_1 => RELEASE.to_owned(),
            Self::V6_12 => format!("{RELEASE}-backports"),
        }
    }

    /// Returns the kernel in `dir`, and downloads and unpacks it first if necessary. (To update to a newer one,
    /// remove `dir`.)
    ///
    /// # Errors
    /// apt has no such suite, or an apt command failed.
    pub fn fetch(self, dir: &Path) -> Result<Image> {
        let root = dir.join("root");
        if let Ok(image) = image(&root) {
            return Ok(image);
        }
        let apt = Apt::new(self, dir)?;
        run(apt.get().arg("update"))?;
        let depends = output(Command::new("apt-cache").args(apt.options()).args(["depends", PACKAGE]))?;
        let depends = String::from_utf8_lossy(&depends).into_owned();
        let package = depends
            .lines()
            .find_map(|line| line.trim().strip_prefix("Depends: linux-image-"))
            .with_context(|| format!("{PACKAGE} does not depend on a kernel package: {depends:?}"))?;
        let package = format!("linux-image-{package}");
        println!("  apt-get download {package}");
        // Unpack into a temporary directory and rename it, so that `root` is complete if it exists. Remove the
        // remains of an interrupted attempt first.
        let fresh = dir.join("fresh");
        for old in [&fresh, &root] {
            if old.exists() {
                fs::remove_dir_all(old).with_context(|| format!("remove {}", old.display()))?;
            }
        }
        fs::create_dir(&fresh).with_context(|| format!("make {}", fresh.display()))?;
        run(apt.get().args(["download", &package]).current_dir(&fresh))?;
        let archive = only(&fresh, |name| name.ends_with(".deb"))?;
        let unpacked = fresh.join("root");
        run(Command::new("dpkg-deb").arg("-x").args([&archive, &unpacked]))?;
        fs::rename(&unpacked, &root).with_context(|| format!("rename {}", unpacked.display()))?;
        fs::remove_dir_all(&fresh).with_context(|| format!("remove {}", fresh.display()))?;
        image(&root)
    }
}

fn image(root: &Path) -> Result<Image> {
    Ok(Image {
        vmlinuz: only(&root.join("boot"), |name| name.starts_with("vmlinuz-"))?,
        modules: only(&root.join("lib/modules"), |_| true)?,
    })
}

/// Path of the only entry of a directory whose name satisfies `is_it`.
fn only(dir: &Path, is_it: impl Fn(&str) -> bool) -> Result<PathBuf> {
    let entries = fs::read_dir(dir).with_context(|| format!("read {}", dir.display()))?;
    let names = entries.filter_map(|entry| entry.ok()?.file_name().into_string().ok());
    let found: Vec<String> = names.filter(|name| is_it(name)).collect();
    ensure!(found.len() == 1, "{} should contain exactly one matching entry; found: {found:?}", dir.display());
    Ok(dir.join(&found[0]))
}

/// An apt with its own sources, package lists and cache; those of this machine are not changed.
struct Apt {
    options: Vec<String>,
}

impl Apt {
    fn new(kernel: Kernel, dir: &Path) -> Result<Self> {
        let state = dir.join("apt");
        for sub in ["lists/partial", "cache/archives/partial"] {
            let sub = state.join(sub);
            fs::create_dir_all(&sub).with_context(|| format!("make {}", sub.display()))?;
        }
        let signed = if Path::new(KEYRING).exists() { format!("[signed-by={KEYRING}] ") } else { String::new() };
        let source = format!("deb {signed}{} {} main\n", mirror()?, kernel.suite());
        let sources = state.join("sources.list");
        fs::write(&sources, source).with_context(|| format!("write {}", sources.display()))?;
        let own = |key: &str, path: &Path| format!("{key}={}", path.display());
        let options = [
            own("Dir::Etc::sourcelist", &sources),
            "Dir::Etc::sourceparts=/dev/null".to_owned(),
            own("Dir::State::Lists", &state.join("lists")),
            own("Dir::Cache", &state.join("cache")),
            // apt's unprivileged download user may not write into this directory.
            "APT::Sandbox::User=root".to_owned(),
        ];
        Ok(Self { options: options.into_iter().flat_map(|option| ["-o".to_owned(), option]).collect() })
    }

    fn options(&self) -> &[String] {
        &self.options
    }

    fn get(&self) -> Command {
        let mut command = Command::new("apt-get");
        command.args(["-q", "-q"]).args(&self.options).stdout(Stdio::null());
        command
    }
}

/// URL of the archive from which this machine's apt gets the release.
fn mirror() -> Result<String> {
    let mut command = Command::new("apt-get");
    command.args(["indextargets", "--format", "$(CODENAME) $(REPO_URI)", "Created-By: Packages"]);
    let targets = output(&mut command)?;
    let targets = String::from_utf8_lossy(&targets).into_owned();
    let mirror = targets.lines().find_map(|line| line.strip_prefix(RELEASE)?.strip_prefix(' '));
    mirror.map(ToOwned::to_owned).with_context(|| {
        format!("apt is not configured for Debian {RELEASE}, whose kernels these tests use: run them on Debian 12")
    })
}
