//! Packets, services and plans for the tests of the programs, and the test rig that runs the programs on packets.

mod frame;
mod plans;
mod rig;

pub use frame::{Datagram, Ip, MACS, Segment, flags, icmp_is_valid};
pub use plans::{plan, plan_with, pod, pod6, service, service_with, vip, vip6};
pub use rig::{DROP, NEXT, POKE_NUMBER, REDIRECT, RunResult, TestRig, XDP_PASS, XDP_TX};
