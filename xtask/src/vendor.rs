//! Copies the page's code of others from npm packages into breaker-web/vendor.

use std::{fmt::Write as _, fs, io::Read as _, path::Path, process::Command};

use anyhow::{Context as _, Result, ensure};
use flate2::read::GzDecoder;
use sha2::{Digest as _, Sha256};
use tar::Archive;

use crate::{progress::step, run::output};

/// A file of a package, and its name in breaker-web/vendor.
struct Copy {
    package: &'static str,
    file: &'static str,
    name: &'static str,
}

const fn copy(package: &'static str, file: &'static str, name: &'static str) -> Copy {
    Copy { package, file, name }
}

/// htm with preact draws the page (Apache-2.0, MIT); uPlot draws charts (MIT).
const COPIES: &[Copy] = &[
    copy("htm@3.1.1", "preact/standalone.mjs", "preact.js"),
    copy("htm@3.1.1", "LICENSE", "htm.LICENSE"),
    // preact itself is inside of the file of htm.
    copy("preact@10.8.1", "LICENSE", "preact.LICENSE"),
    copy("uplot@1.6.32", "dist/uPlot.iife.min.js", "uplot.js"),
    copy("uplot@1.6.32", "dist/uPlot.min.css", "uplot.css"),
    copy("uplot@1.6.32", "LICENSE", "uplot.LICENSE"),
];

/// Writes the files and their checksums.
///
/// # Errors
/// npm is missing or cannot download a package; a package does not have the file.
pub fn vendor() -> Result<()> {
    let dir = ebpf_builder::workspace().join("breaker-web/vendor");
    let packages = ebpf_builder::workspace().join("target/tools/npm");
    fs::create_dir_all(&dir)?;
    fs::create_dir_all(&packages)?;
    let mut sums = String::new();
    for Copy { package, file, name } in COPIES {
        let content = step(&format!("copy {file} of {package}"), || read(&packages, package, file))?;
        fs::write(dir.join(name), &content).with_context(|| format!("write {name}"))?;
        let digest: String = Sha256::digest(&content).iter().map(|byte| format!("{byte:02x}")).collect();
        writeln!(sums, "{digest}  {name}")?;
    }
    fs::write(dir.join("SHA256SUMS"), sums)?;
    println!("breaker-web/vendor");
    Ok(())
}

/// Reads a file of a package, which npm downloads into `packages`.
fn read(packages: &Path, package: &str, file: &str) -> Result<Vec<u8>> {
    let archive = packages.join(format!("{}.tgz", package.replace('@', "-")));
    if !archive.is_file() {
        output(Command::new("npm").args(["pack", "--silent", package]).current_dir(packages))?;
    }
    ensure!(archive.is_file(), "npm wrote no {}", archive.display());
    let wanted = Path::new("package").join(file);
    for entry in Archive::new(GzDecoder::new(fs::File::open(&archive)?)).entries()? {
        let mut entry = entry?;
        if entry.path()? == wanted {
            let mut content = Vec::new();
            entry.read_to_end(&mut content)?;
            return Ok(content);
        }
    }
    anyhow::bail!("{package} has no file {file}")
}
