//! breaker's decision logic, without IO.
//!
//! This crate depends on std and `breaker-common` only. It reads no clock, opens no socket, knows no eBPF map and no
//! JSON: time is an argument, and effects go through [`datapath::Datapath`] or come back as values.
//!
//! ```text
//! model ─────────────▶ engine ──▶ plan ──▶ datapath::Datapath (a trait; breaker-agent implements it)
//! probe ──▶ health ──▶  │  ▲
//!                       ▼  │
//!               pool, breaker, maglev, limits
//! ```
//!
//! | module | one concern |
//! |---|---|
//! | [`model`] | a protected service: frontends, tiers, backends, checks, policies |
//! | [`limits`] | rate and connection limits, as configured and as the programs need them |
//! | [`probe`] | the result of a probe, and the backend that it is about |
//! | [`health`] | rise and fall: from single results to Up and Down |
//! | [`pool`] | whether a tier is usable, and which backup takes over |
//! | [`breaker`] | the circuit breaker: closed, open, half-open |
//! | [`maglev`] | consistent hashing: from backends to the slots of a selection table |
//! | [`plan`] | the content that the maps should have for one service |
//! | [`datapath`] | the interface through which the engine uses the maps and the programs |
//! | [`engine`] | joins all of the above: observations and time in, plans out |
//! | [`time`] | the two clocks, as values |

#![forbid(unsafe_code)]

pub mod breaker;
pub mod datapath;
pub mod engine;
pub mod health;
pub mod limits;
pub mod maglev;
pub mod model;
pub mod plan;
pub mod pool;
pub mod probe;
pub mod time;
