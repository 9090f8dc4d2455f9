//! The control socket: a unix socket with mode 0600 that speaks HTTP with JSON bodies. It is described in
//! docs/CONTROL.md, and `breaker-cli` is its client.

mod server;

pub use server::{Socket, serve};
