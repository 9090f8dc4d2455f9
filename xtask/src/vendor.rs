//! Copies the page's code of others from npm packages into breaker-web/vendor.

use std::{fmt::Write as _, fs, io::Read as _, path::Path, process::Command};

use anyhow::{Context as _, Result, ensure};
use flate2::read::GzDecoder;
use tar::Archive;

use crate::{image, progress::step, run::output};

/// Each file: its package, its path there, and its name in breaker-web/vendor. htm with preact draws the page (Apache-2.0,
/// MIT); uPlot draws charts (MIT).
const COPIES: &[[&str; 3]] = &[
    ["htm@3.1.1", "preact/standalone.mjs", "preact.js"],
    ["htm@3.1.1", "LICENSE", "htm.LICENSE"],
    // preact itself is inside of the file of htm.
    ["preact@10.8.1", "LICENSE", "preact.LICENSE"],
    ["uplot@1.6.32", "dist/uPlot.iife.min.js", "uplot.js"],
    ["uplot@1.6.32", "dist/uPlot.min.css", "uplot.css"],
    ["uplot@1.6.32", "LICENSE", "uplot.LICENSE"],
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
    for [package, file, name] in COPIES {
        let content = step(&format!("copy {file} of {package}"), || read(&packages, package, file))?;
        fs::write(dir.join(name), &content).with_context(|| format!("write {name}"))?;
        writeln!(sums, "{}  {name}", image::digest(&content))?;
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
