//! The agent: one loop, in which time passes, verdicts come in and plans go out.
//!
//! [`engine`] holds everything that decides, and is told the time; [`run`] is the loop around it that reads the clock
//! and owns the sockets.

pub mod engine;
pub mod limits;
pub mod run;
pub mod status;
