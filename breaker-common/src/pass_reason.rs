//! Why packets pass untouched.

numbered! {
    /// Why a packet passed untouched although breaker might have been responsible for it (rule "fail open"), or why
    /// the programs omitted something else.
    PassReason {
        /// The packet is shorter than its headers say.
        Truncated = 0 => "Truncated",
        /// A later fragment, which has no ports, and whose first fragment was not translated or not seen.
        Fragment = 1 => "Fragment",
        /// A frontend refers to a service that does not exist.
        UnknownService = 2 => "UnknownService",
        /// A slot refers to a backend that does not exist.
        UnknownBackend = 3 => "UnknownBackend",
        /// A flow table is full.
        FlowTableFull = 4 => "FlowTableFull",
        /// The flow needs another source port toward its backend, and no free one was found.
        NoSourcePort = 5 => "NoSourcePort",
        /// The agent's lease ran out and the service has `onAgentLoss: PassThrough`.
        AgentLost = 6 => "AgentLost",
        /// Rewriting the packet failed before anything was changed.
        RewriteFailed = 7 => "RewriteFailed",
        /// The ring buffer was full, or the CPU had sent its share of events. The event was lost; the packet was handled
        /// normally.
        EventLost = 8 => "EventLost",
        /// More or longer IPv6 extension headers than the parser walks, or a routing header with segments left.
        ExtensionHeaders = 9 => "ExtensionHeaders",
        /// SCTP is not supported: the packet is left to kube-proxy.
        Sctp = 10 => "Sctp",
        /// The full-path program that the prefilter tail-calls is missing from `PROGRAMS`.
        ProgramMissing = 11 => "ProgramMissing",
        /// A new connection to a service with limits could not be remembered: it is admitted and not counted.
        LimitTableFull = 12 => "LimitTableFull",
        /// The answer to a connection attempt that was sent to a backup was never seen on the client's interface, and
        /// the client repeated it. The way back may bypass the programs, so the attempt is left to kube-proxy.
        NoAnswerSeen = 13 => "NoAnswerSeen",
        /// The connection came in through IPsec. The answer would leave encrypted, so it could not be translated.
        Ipsec = 14 => "Ipsec",
    }
}
