//! Enums whose numbers stand in maps and events.

/// A number from a map that is no variant of the enum that belongs there.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct UnknownNumber(pub u8);

macro_rules! numbered {
    ($(#[$meta:meta])* $name:ident { $($(#[$vmeta:meta])* $variant:ident = $number:literal => $label:literal,)+ }) => {
        $(#[$meta])*
        #[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
        #[repr(u8)]
        pub enum $name { $($(#[$vmeta])* $variant = $number,)+ }

        impl $name {
            /// Every variant, in the order of their numbers.
            pub const ALL: &'static [Self] = &[$(Self::$variant,)+];

            /// The name for logs, metrics and JSON.
            #[must_use]
            pub const fn label(self) -> &'static str {
                match self { $(Self::$variant => $label,)+ }
            }
        }

        impl TryFrom<u8> for $name {
            type Error = UnknownNumber;
            fn try_from(number: u8) -> Result<Self, UnknownNumber> {
                match number { $($number => Ok(Self::$variant),)+ other => Err(UnknownNumber(other)) }
            }
        }
    };
}

numbered! {
    /// Where a breaker stands. Closed means that traffic flows to the primary.
    BreakerState {
        /// The primary has the traffic.
        Closed = 0 => "Closed",
        /// The backup has the traffic.
        Open = 1 => "Open",
        /// The backup has the traffic, but for a few connections that try the primary.
        HalfOpen = 2 => "HalfOpen",
    }
}

numbered! {
    /// Why a breaker is in the state it is in.
    StateReason {
        /// Nothing happened yet.
        Initial = 0 => "Initial",
        /// A check got a status out of the expected range (HAProxy: L7STS).
        HttpStatus = 1 => "HttpStatus",
        /// A check was connected, but had no answer in time (L7TOUT).
        ResponseTimeout = 2 => "ResponseTimeout",
        /// A check got an answer that it could not use: malformed, or a body that does not match (L7RSP).
        BadResponse = 3 => "BadResponse",
        /// A check's connection was refused or broken (L4CON).
        ConnectFailed = 4 => "ConnectFailed",
        /// A check's connection was not answered in time (L4TOUT).
        ConnectTimeout = 5 => "ConnectTimeout",
        /// A check's TLS handshake failed (L6RSP).
        TlsFailed = 6 => "TlsFailed",
        /// Too large a part of the observations in the window were failures.
        FailureRate = 7 => "FailureRate",
        /// The primary has no endpoint at all.
        NoEndpoints = 8 => "NoEndpoints",
        /// An operator said so.
        Operator = 9 => "Operator",
        /// The primary passes its checks again.
        Recovered = 10 => "Recovered",
        /// The open time is over: the primary is tried.
        OpenTimeOver = 11 => "OpenTimeOver",
        /// The trial of the half-open breaker went well.
        TrialPassed = 12 => "TrialPassed",
        /// A time limit on an operator's word ran out.
        OverrideExpired = 13 => "OverrideExpired",
    }
}

numbered! {
    /// What was decided for a flow.
    FlowKind {
        /// Left to kube-proxy.
        Passed = 0 => "Passed",
        /// Sent to a backend of ours.
        Redirected = 1 => "Redirected",
        /// A client's own connection to a backend's address; noted so that no other flow takes its reverse key.
        Direct = 2 => "Direct",
    }
}

numbered! {
    /// What an event in the ring buffer tells.
    EventKind {
        /// The programs met the service's new epoch for the first time.
        StateAdopted = 1 => "StateAdopted",
        /// A new connection was sent to a backup.
        FlowMoved = 2 => "FlowMoved",
        /// A new connection was refused.
        Rejected = 3 => "Rejected",
        /// An established connection was reset.
        FlowReset = 4 => "FlowReset",
    }
}

numbered! {
    /// Why a packet that looked like ours went on untouched (rule "fail open"), or why something was left out.
    PassReason {
        /// Shorter than its headers say.
        Truncated = 0 => "Truncated",
        /// A later fragment whose first one was not translated, or not seen: it has no ports to look at.
        Fragment = 1 => "Fragment",
        /// A frontend points to a service that is not there.
        UnknownService = 2 => "UnknownService",
        /// A slot points to a backend that is not there.
        UnknownBackend = 3 => "UnknownBackend",
        /// No room in a flow table.
        FlowTableFull = 4 => "FlowTableFull",
        /// No free source port toward the backend for a flow that needs another one.
        NoSourcePort = 5 => "NoSourcePort",
        /// The agent's lease ran out and `onAgentLoss` says PassThrough.
        AgentLost = 6 => "AgentLost",
        /// A rewrite failed before it changed anything.
        RewriteFailed = 7 => "RewriteFailed",
        /// The ring buffer was full: an event was left out, the packet was not.
        EventLost = 8 => "EventLost",
        /// More or longer IPv6 extension headers than are looked at, or a route that is not at its end.
        ExtensionHeaders = 9 => "ExtensionHeaders",
        /// SCTP, which is left to kube-proxy.
        Sctp = 10 => "Sctp",
        /// A program of ours that was to look closer is not there.
        ProgramMissing = 11 => "ProgramMissing",
        /// No room to remember a new connection of a service with limits: it is admitted and not counted.
        LimitTableFull = 12 => "LimitTableFull",
    }
}

numbered! {
    /// Where a program of tc sits: key of `PROGRAMS`.
    Place {
        /// What a pod sends.
        PodIn = 0 => "PodIn",
        /// What a pod gets.
        PodOut = 1 => "PodOut",
        /// What comes in by an uplink.
        UplinkIn = 2 => "UplinkIn",
        /// What leaves by an uplink.
        UplinkOut = 3 => "UplinkOut",
    }
}

numbered! {
    /// Which limit refused a new connection. The number is the index in [`crate::LimitCounters`].
    LimitKind {
        /// New connections a second, all clients together.
        NewConnections = 0 => "newConnectionsPerSecond",
        /// New connections a second of one client.
        ClientNewConnections = 1 => "perClient.newConnectionsPerSecond",
        /// Connections at the same time, all clients together.
        Concurrent = 2 => "concurrentConnections",
        /// Connections at the same time of one client.
        ClientConcurrent = 3 => "perClient.concurrentConnections",
    }
}

numbered! {
    /// What happens to a new connection over a limit.
    LimitAction {
        /// TCP: a reset. UDP: ICMP "port unreachable".
        Reset = 0 => "Reset",
        /// The packet is dropped.
        Drop = 1 => "Drop",
        /// The connection goes to the other tier. From the backup tier, as `Reset`.
        Failover = 2 => "Failover",
    }
}
