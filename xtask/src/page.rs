//! Tests and measures the live page in a real browser, with tools from npm.

use std::{path::Path, process::Command};

use anyhow::Result;

use crate::{build, progress::step, run::run, setup};

/// Runs the tests of the page. Where there is no browser or no Node.js and they cannot be installed, says so and succeeds.
///
/// # Errors
/// A test failed, or something could not be built or downloaded.
pub fn test(filter: Option<&str>) -> Result<()> {
    match setup::setup_page() {
        Ok(browser) => {
            let filter = filter.map(|filter| format!("--test-name-pattern={filter}"));
            let options = ["--test", "--test-reporter=spec", "--test-concurrency=1"];
            let args: Vec<&str> = options.into_iter().chain(filter.as_deref()).chain(["."]).collect();
            node("run the tests of the page", browser, &args)
        }
        Err(error) => {
            println!("the tests of the page are skipped: {error:#}");
            Ok(())
        }
    }
}

/// Measures the page.
///
/// # Errors
/// Something could not be installed, built or downloaded.
pub fn bench() -> Result<()> {
    node("measure the page", setup::setup_page()?, &["bench.mjs"])
}

/// Runs Node.js in tests/page, with the server of made-up data.
fn node(what: &str, browser: &str, args: &[&str]) -> Result<()> {
    let dir = ebpf_builder::workspace().join("tests/page");
    if !is_current(&dir) {
        step("install the tools of the page's tests with npm", || {
            run(Command::new("npm").args(["ci", "--silent", "--no-audit", "--no-fund"]).current_dir(&dir))
        })?;
    }
    let server = build::example("page")?;
    step(what, || {
        let mut node = Command::new("node");
        run(node.args(args).current_dir(&dir).env("BREAKER_PAGE", server).env("BREAKER_BROWSER", browser))
    })
}

/// Whether npm has installed what the lock file says: it keeps a copy of the file.
fn is_current(dir: &Path) -> bool {
    let time = |file: &str| dir.join(file).metadata().and_then(|metadata| metadata.modified());
    matches!((time("node_modules/.package-lock.json"), time("package-lock.json")), (Ok(copy), Ok(lock)) if copy >= lock)
}
