//! breaker's node agent.
//!
//! ```text
//! source (file) ──▶ config ──▶ model ─┐
//! check (probes) ──▶ health ──────────┼─▶ agent::engine ──▶ datapath::plan ──▶ datapath::kernel ──▶ maps
//! control (CLI) ──────────────────────┘     │    ▲
//!                                           ▼    │
//!                                     breaker, pool, maglev      (pure: no clock, no socket, no map)
//! ```
//!
//! Who may know whom: `breaker`, `health`, `limits`, `pool`, `maglev` and `model` know core and std only; only `datapath` uses
//! aya, only `check` opens probe sockets, only `agent::run` reads the clock.

pub mod agent;
pub mod breaker;
pub mod check;
pub mod cli;
pub mod config;
pub mod control;
pub mod datapath;
pub mod health;
pub mod limits;
pub mod maglev;
pub mod model;
pub mod pool;
pub mod preflight;
pub mod source;

/// Chooses the TLS implementation of the whole process; more than once is fine.
pub fn install_crypto() {
    // It fails only if one is installed already.
    let _ = rustls::crypto::ring::default_provider().install_default();
}
