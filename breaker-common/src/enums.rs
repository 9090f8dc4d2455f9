//! Enums whose numbers are stored in maps and events.

numbered! {
    /// State of a breaker. Closed means that traffic flows to the primary.
    BreakerState {
        /// New connections go to the primary.
        Closed = 0 => "Closed",
        /// New connections go to the backup.
        Open = 1 => "Open",
        /// New connections go to the backup, except for a limited number of trial connections to the primary.
        HalfOpen = 2 => "HalfOpen",
    }
}

numbered! {
    /// Why a breaker is in its state. Where HAProxy has a name for the check result, it is given in parentheses.
    StateReason {
        /// The breaker has not changed its state yet.
        Initial = 0 => "Initial",
        /// A probe got an HTTP status outside the expected range (L7STS).
        HttpStatus = 1 => "HttpStatus",
        /// A probe was connected but got no answer in time (L7TOUT).
        ResponseTimeout = 2 => "ResponseTimeout",
        /// A probe got an invalid answer: malformed, or with a body that does not match (L7RSP).
        BadResponse = 3 => "BadResponse",
        /// A probe's connection was refused or reset (L4CON).
        ConnectFailed = 4 => "ConnectFailed",
        /// A probe's connection attempt was not answered in time (L4TOUT).
        ConnectTimeout = 5 => "ConnectTimeout",
        /// A probe's TLS handshake failed (L6RSP).
        TlsFailed = 6 => "TlsFailed",
        /// The rate of failed observations in the window reached the configured threshold.
        FailureRate = 7 => "FailureRate",
        /// The primary has no endpoints.
        NoEndpoints = 8 => "NoEndpoints",
        /// An operator set an override.
        Operator = 9 => "Operator",
        /// The primary passes its checks again.
        Recovered = 10 => "Recovered",
        /// The open time is over: the breaker lets trial connections reach the primary.
        OpenTimeOver = 11 => "OpenTimeOver",
        /// The half-open trial succeeded.
        TrialPassed = 12 => "TrialPassed",
        /// The time limit of an operator's override ran out.
        OverrideExpired = 13 => "OverrideExpired",
    }
}

impl StateReason {
    /// Whether a breaker opens for this reason because of a failure of the primary.
    #[must_use]
    pub const fn is_failure(self) -> bool {
        match self {
            Self::HttpStatus
            | Self::ResponseTimeout
            | Self::BadResponse
            | Self::ConnectFailed
            | Self::ConnectTimeout
            | Self::TlsFailed
            | Self::FailureRate
            | Self::NoEndpoints => true,
            Self::Initial
            | Self::Operator
            | Self::Recovered
            | Self::OpenTimeOver
            | Self::TrialPassed
            | Self::OverrideExpired => false,
        }
    }
}

numbered! {
    /// Decision that is pinned for a flow.
    FlowKind {
        /// Left to kube-proxy.
        Passed = 0 => "Passed",
        /// Sent to one of breaker's backends.
        Redirected = 1 => "Redirected",
        /// A client's own connection to a backend's address. It is recorded so that no other flow uses its reverse
        /// key.
        Direct = 2 => "Direct",
    }
}

numbered! {
    /// Kind of an event in the ring buffer.
    EventKind {
        /// The programs saw the first packet of the service's new epoch.
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
    /// The outcome of a poke: the return value of the program `breaker_poke`.
    PokeOutcome {
        /// Four segments were sent.
        Sent = 0 => "Sent",
        /// The MAC address of the next hop is not known.
        NoNeighbor = 1 => "NoNeighbor",
        /// The client's address is one of this node's.
        Local = 2 => "Local",
        /// The node has no route to the client, or none that a program can use.
        NoRoute = 3 => "NoRoute",
        /// The device did not take the segments, or the frame is malformed.
        Failed = 4 => "Failed",
    }
}

numbered! {
    /// The tc hook that a program is attached to. The number is the key in `PROGRAMS`.
    TcHook {
        /// tc ingress on the host side of a pod's veth: packets that the pod sends.
        PodIn = 0 => "PodIn",
        /// tc egress on the host side of a pod's veth: packets that the pod receives.
        PodOut = 1 => "PodOut",
        /// tc ingress on an uplink.
        UplinkIn = 2 => "UplinkIn",
        /// tc egress on an uplink.
        UplinkOut = 3 => "UplinkOut",
    }
}

numbered! {
    /// Limit that refused a new connection. The number is the index in the arrays of [`crate::LimitCounters`].
    LimitKind {
        /// New connections per second, all clients together.
        NewConnections = 0 => "newConnectionsPerSecond",
        /// New connections per second of one client.
        ClientNewConnections = 1 => "perClient.newConnectionsPerSecond",
        /// Concurrent connections, all clients together.
        Concurrent = 2 => "concurrentConnections",
        /// Concurrent connections of one client.
        ClientConcurrent = 3 => "perClient.concurrentConnections",
    }
}

numbered! {
    /// What happens to a new connection that is over a limit.
    LimitAction {
        /// The client gets a TCP reset or, for UDP, an ICMP "port unreachable" error. A process in the host network
        /// namespace gets `ECONNREFUSED`.
        Reset = 0 => "Reset",
        /// The packet is dropped. A process in the host network namespace gets `ECONNREFUSED`.
        Drop = 1 => "Drop",
        /// The connection goes to the backup. In the backup's own limits, and where no backup is usable: as `Reset`.
        Failover = 2 => "Failover",
    }
}
