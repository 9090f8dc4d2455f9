//! Tests the live page in a real browser, with tools from npm.

use std::{path::Path, process::Command};

use anyhow::Result;

use crate::{build, progress::step, run::run, setup};

/// Runs the tests of the page. Where there is no browser or no Node.js and they cannot be installed, says so and succeeds.
///
/// # Errors
/// A test failed, or something could not be built or downloaded.
pub fn test(filter: Option<&str>) -> Result<()> {
    let browser = match setup::setup_page() {
        Ok(browser) => browser,
        Err(error) => {
            println!("the tests of the page are skipped: {error:#}");
            return Ok(());
        }
    };
    let dir = ebpf_builder::workspace().join("tests/page");
    if !is_current(&dir) {
        step("install the tools of the page's tests with npm", || {
            run(Command::new("npm").args(["ci", "--silent", "--no-audit", "--no-fund"]).current_dir(&dir))
        })?;
    }
    let server = build::example("page")?;
    step("run the tests of the page", || {
        let mut node = Command::new("node");
        node.args(["--test", "--test-reporter=spec", "--test-concurrency=1"]).current_dir(&dir);
        node.args(filter.map(|filter| format!("--test-name-pattern={filter}")));
        run(node.arg(".").env("BREAKER_PAGE", server).env("BREAKER_BROWSER", browser))
    })
}

/// Whether npm has installed what the lock file says: it keeps a copy of the file.
fn is_current(dir: &Path) -> bool {
    let time = |file: &str| dir.join(file).metadata().and_then(|metadata| metadata.modified());
    matches!((time("node_modules/.package-lock.json"), time("package-lock.json")), (Ok(copy), Ok(lock)) if copy >= lock)
}
