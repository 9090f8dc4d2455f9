//! breaker's command line. It queries an agent over its control socket, and a cluster over the Kubernetes API.
//!
//! The crate builds on Linux, macOS and Windows. The binary `breaker` of a node adds the commands that need the kernel:
//! `agent`, `preflight` and `cleanup`.
//!
//! | module | one concern |
//! |---|---|
//! | [`args`] | the commands and their options |
//! | [`run`] | executes a command |
//! | [`client`] | the client's side of the control socket |
//! | [`kubernetes`] | configuration of the client for the API server |
//! | [`overview`] | breaker's objects in a cluster, read once |
//! | [`duration`] | times as people write them |
//! | `show`, `cluster`, `table` | text output |

// They panic where the output cannot be written.
#![warn(clippy::print_stdout, clippy::print_stderr)]
#![forbid(unsafe_code)]

pub mod args;
pub mod client;
mod cluster;
pub mod duration;
pub mod kubernetes;
pub mod overview;
pub mod run;
mod show;
mod table;
mod visible;

/// Chooses the TLS implementation of the whole process; calling it again does nothing.
pub fn install_crypto() {
    // It fails only if one is installed already.
    let _ = rustls::crypto::ring::default_provider().install_default();
}
