//! The `breaker` binary: the agent and the command line.

#![forbid(unsafe_code)]

use std::process::ExitCode;

fn main() -> ExitCode {
    breaker_agent::args::main()
}
