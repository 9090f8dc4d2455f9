//! Debian's kernels, from the archive that this machine's apt is set up with. They are unpacked, not installed.

use std::{
    fmt, fs,
    path::{Path, PathBuf},
    process::{Command, Stdio},
};

use anyhow::{Context as _, Result, ensure};
use clap::ValueEnum;

use crate::run::{output, run};

/// The package that depends on the newest kernel of its suite, in the flavour with drivers for virtual machines only.
const PACKAGE: &str = "linux-image-cloud-amd64";
/// The release whose kernels we know by their numbers.
const RELEASE: &str = "bookworm";
/// Debian's keys, where Debian puts them.
const KEYRING: &str = "/usr/share/keyrings/debian-archive-keyring.gpg";

/// A kernel of the matrix.
#[derive(Clone, Copy, Debug, ValueEnum, PartialEq, Eq)]
pub enum Kernel {
    /// Debian 12's: no tcx.
    #[value(name = "6.1")]
    V6_1,
    /// The one of Debian 12's backports, and Debian 13's.
    #[value(name = "6.12")]
    V6_12,
}

/// A kernel on disk.
pub struct Image {
    pub vmlinuz: PathBuf,
    /// `lib/modules/<version>`.
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
    /// Where it is in the archive.
    fn suite(self) -> String {
        match self {
            Self::V6_1 => RELEASE.to_owned(),
            Self::V6_12 => format!("{RELEASE}-backports"),
        }
    }

    /// The kernel in `dir`; fetched and unpacked, where it is not there yet. (To have a newer one, remove `dir`.)
    ///
    /// # Errors
    /// No such archive, or what apt said.
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
            .with_context(|| format!("{PACKAGE} depends on no kernel: {depends:?}"))?;
        let package = format!("linux-image-{package}");
        println!("  apt-get download {package}");
        // Whole, or not there at all; what an earlier try left behind is in nobody's way.
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

/// The only entry of a directory with such a name.
fn only(dir: &Path, is_it: impl Fn(&str) -> bool) -> Result<PathBuf> {
    let entries = fs::read_dir(dir).with_context(|| format!("read {}", dir.display()))?;
    let names = entries.filter_map(|entry| entry.ok()?.file_name().into_string().ok());
    let found: Vec<String> = names.filter(|name| is_it(name)).collect();
    ensure!(found.len() == 1, "{} has not one such entry but {found:?}", dir.display());
    Ok(dir.join(&found[0]))
}

/// An apt with lists and sources of its own: this machine's stay as they are.
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
            // Its own user for downloads may not write here.
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

/// Where this machine's apt has the release from.
fn mirror() -> Result<String> {
    let mut command = Command::new("apt-get");
    command.args(["indextargets", "--format", "$(CODENAME) $(REPO_URI)", "Created-By: Packages"]);
    let targets = output(&mut command)?;
    let targets = String::from_utf8_lossy(&targets).into_owned();
    let mirror = targets.lines().find_map(|line| line.strip_prefix(RELEASE)?.strip_prefix(' '));
    mirror.map(ToOwned::to_owned).with_context(|| {
        format!("apt is not set up with Debian's {RELEASE}, whose kernels these are: run this on Debian 12")
    })
}
