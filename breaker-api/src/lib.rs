//! The public JSON and YAML of breaker, as serde types: requests and answers of the control socket, and the
//! Kubernetes resources.
//!
//! | module | one concern |
//! |---|---|
//! | [`status`] | `GET /v1/status` and `GET /v1/services/NAME` |
//! | [`limits`] | the part of a status that is about limits |
//! | [`events`] | `GET /v1/events` |
//! | [`flows`] | `GET /v1/services/NAME/flows` |
//! | [`established`] | the connections that were established when a service left a tier |
//! | [`commands`] | bodies of requests, and the body of an error |
//! | [`preflight`] | the findings of `breaker preflight` |
//! | [`tier`] | the two roles of a tier |
//! | [`crd`] | `CircuitBreaker`, `NodeReport`, `ReferenceGrant` |
//!
//! States, reasons and codes are enums. Their names in JSON are written next to each variant, so that a renamed variant
//! does not change the JSON.

#![forbid(unsafe_code)]

/// Enums that the maps and the JSON share; in JSON they are written by their labels.
pub use breaker_common::{BreakerState, FlowKind, PassReason, StateReason};

pub mod commands;
pub mod crd;
pub mod established;
pub mod events;
pub mod flows;
pub mod limits;
pub mod preflight;
pub mod status;
mod text;
pub mod tier;

/// Default path of the control socket.
pub const DEFAULT_SOCKET: &str = "/run/breaker/breaker.sock";
/// Default directory for pinned maps and links.
pub const DEFAULT_PIN_PATH: &str = "/sys/fs/bpf/breaker";
