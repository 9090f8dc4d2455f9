//! Options of the datapath that the configuration sets.

/// How programs are attached to tc hooks.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum AttachMode {
    /// tcx if the kernel has it, otherwise clsact.
    Auto,
    /// tcx links (from kernel 6.6 on).
    Tcx,
    /// cls_bpf filters on a clsact qdisc.
    Clsact,
}

/// Position of breaker's programs among the programs that are already on a hook.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum AttachOrder {
    /// breaker's programs get packets before all others.
    First,
    /// breaker's programs get the packets that all others let through.
    Last,
}

/// How established connections to a primary are found.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ConnectionSource {
    /// In conntrack, unless it does not have them.
    Auto,
    /// In conntrack.
    Conntrack,
    /// The programs note the SYN of each.
    Syns,
}

/// Whether uplinks get the XDP program. The kernel's generic mode is never used.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum XdpPolicy {
    /// No XDP.
    Off,
    /// XDP on interfaces whose driver has a native mode, except veths.
    Auto,
    /// XDP on interfaces whose driver has a native mode, including veths.
    Native,
}

impl XdpPolicy {
    /// The name in configuration and metrics.
    #[must_use]
    pub const fn label(self) -> &'static str {
        match self {
            Self::Off => "Off",
            Self::Auto => "Auto",
            Self::Native => "Native",
        }
    }
}
