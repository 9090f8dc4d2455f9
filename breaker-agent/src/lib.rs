//! breaker's node agent: everything that needs Linux.
//!
//! ```text
//! source (file, kube) ──▶ config ──▶ breaker_core::model ─┐
//! check (probes) ─────────────────────────────────────────┼─▶ agent_loop ──▶ breaker_core::engine
//! control, web (CLI, kubelet, page) ──▶ command ──────────┘       │                 │ plans
//!                                                                 ▼                 ▼
//!                                  view ──▶ JSON            interfaces ──▶ datapath ──▶ programs, maps
//! ```
//!
//! | module | one concern |
//! |---|---|
//! | [`args`], [`offline`] | the command line; `breaker status` without an agent |
//! | [`start`] | puts everything together |
//! | [`agent_loop`] | the main loop |
//! | [`command`] | requests to the main loop |
//! | [`clock`] | the only place that reads clocks |
//! | [`heartbeat`] | the lease: how long the programs trust the agent |
//! | [`interfaces`] | the interfaces with programs, and the pods behind them |
//! | [`resets`] | established connections when a breaker opens: makes clients answer that wait |
//! | [`view`] | conversion of the engine's values to JSON |
//! | [`logging`], [`supervise`], [`signals`] | the log, tasks that panic, signals: nothing but the operator ends the agent |
//! | [`process`] | CPU time and memory of a process |
//! | [`config`] | the configuration file |
//! | [`source`] | where services come from: a file, or Kubernetes |
//! | [`check`] | probes |
//! | [`control`] | the control socket |
//! | [`web`], [`metrics`] | health, metrics and the live page over TCP; the numbers of a scrape |
//! | [`systemd`] | tells the service manager how the agent is |
//! | [`datapath`] | programs and maps; the only module that uses aya |
//!
//! docs/ARCHITECTURE.md lists which module may import which, and `cargo xtask lint` checks the imports.

// They panic where the output cannot be written.
#![warn(clippy::print_stdout, clippy::print_stderr)]

pub mod agent_loop;
pub mod args;
pub mod check;
pub mod clock;
pub mod command;
pub mod config;
pub mod control;
pub mod datapath;
pub mod heartbeat;
pub mod interfaces;
pub mod logging;
pub mod metrics;
pub mod offline;
pub mod process;
pub mod resets;
pub mod signals;
pub mod source;
pub mod start;
pub mod supervise;
pub mod systemd;
pub mod view;
pub mod web;
