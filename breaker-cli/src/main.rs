//! The binary `kubectl-breaker`: the plugin for kubectl.

#![forbid(unsafe_code)]

use std::process::ExitCode;

#[tokio::main(flavor = "current_thread")]
async fn main() -> ExitCode {
    breaker_cli::plugin(std::env::args_os()).await
}
