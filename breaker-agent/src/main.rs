//! The `breaker` binary: agent and command line in one.

#![forbid(unsafe_code)]

use std::process::ExitCode;

fn main() -> ExitCode {
    breaker_agent::cli::main()
}
