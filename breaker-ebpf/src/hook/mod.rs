//! The hooks, each as a packet travels through it.

pub mod sock;
pub mod tc;
pub mod xdp;
