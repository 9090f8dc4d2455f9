//! The pinned decisions, by the client's tuple and by the backend's.

use std::{collections::BTreeMap, net::SocketAddr};

use breaker_common::FlowKind;

use super::headers::{Headers, proto};

/// The client's tuple: a connection as its client sees it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct ClientSide {
    /// The client.
    pub client: SocketAddr,
    /// The address and port that the client connects to.
    pub to: SocketAddr,
    /// Protocol number.
    pub proto: u8,
}

/// The backend's tuple: a connection as its backend sees it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct BackendSide {
    /// The backend.
    pub backend: SocketAddr,
    /// The client, with the source port that the backend sees.
    pub client: SocketAddr,
    /// Protocol number.
    pub proto: u8,
}

/// Which of FIN and RST one side of a connection has sent.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct LastWords {
    /// A FIN was seen.
    pub fin: bool,
    /// A RST was seen.
    pub rst: bool,
}

impl LastWords {
    /// Records a packet.
    fn hear(&mut self, headers: &Headers) {
        self.fin |= headers.flags & 1 != 0;
        self.rst |= headers.is_rst();
    }

    /// Records a client's packet. A packet after a RST shows that the RST was not accepted: its record is cleared.
    fn hear_again(&mut self, headers: &Headers) {
        self.rst = false;
        self.hear(headers);
    }
}

/// A pinned decision.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Flow {
    /// Kind of the decision.
    pub kind: FlowKind,
    /// The backend; the client's own destination if the packets are not translated.
    pub backend: SocketAddr,
    /// The client's source port, as the backend sees it.
    pub source_port: u16,
    /// Epoch of the service when the decision was made; 0 for a direct connection.
    pub epoch: u32,
    /// Sequence number of the SYN; 0 for datagrams.
    pub sequence: u32,
    /// The client sent a packet after an answer: the flow is in the tables that evict nothing.
    pub established: bool,
    /// Which of FIN and RST the client has sent.
    pub client_said: LastWords,
    /// The flow takes the fast path.
    pub fast: bool,
    /// The client is outside, and its address is not masqueraded.
    pub keeps_client: bool,
}

/// What was known about a flow that a first packet replaces.
#[derive(Clone, Copy, Debug, Default)]
pub struct Forgotten {
    /// It was for the same SYN, which the client has repeated.
    pub same_syn: bool,
    /// It was decided in the same epoch.
    pub same_epoch: bool,
    /// It was redirected, and no answer was seen.
    pub unanswered: bool,
}

/// Reverse entry: how a backend's packets are translated for the client.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct WayBack {
    /// The flow that the entry belongs to.
    pub owner: ClientSide,
    /// The backend has answered with something other than a RST.
    pub answered: bool,
    /// Which of FIN and RST the backend has sent.
    pub backend_said: LastWords,
    /// The flow takes the fast path.
    pub fast: bool,
}

/// All flows and their reverse entries.
#[derive(Clone, Debug, Default)]
pub struct Book {
    /// Flows by the client's tuple.
    pub flows: BTreeMap<ClientSide, Flow>,
    /// Reverse entries by the backend's tuple. Two flows never share one.
    pub ways_back: BTreeMap<BackendSide, WayBack>,
}

impl ClientSide {
    /// The key of a packet that a client sends.
    #[must_use]
    pub const fn of(headers: &Headers) -> Self {
        Self { client: headers.source, to: headers.destination, proto: headers.proto }
    }
}

impl BackendSide {
    /// The key of a packet that a backend sends.
    #[must_use]
    pub const fn of(headers: &Headers) -> Self {
        Self { backend: headers.source, client: headers.destination, proto: headers.proto }
    }
}

impl Book {
    /// The key under which the backend sees a flow.
    fn backend_side(side: &ClientSide, flow: &Flow) -> BackendSide {
        let client = SocketAddr::new(side.client.ip(), flow.source_port);
        BackendSide { backend: flow.backend, client, proto: side.proto }
    }

    /// The reverse entry of a flow, unless another flow has taken it over.
    fn way_back(&mut self, side: &ClientSide) -> Option<&mut WayBack> {
        let flow = self.flows.get(side).filter(|flow| flow.kind != FlowKind::Passed)?;
        self.ways_back.get_mut(&Self::backend_side(side, flow)).filter(|way| way.owner == *side)
    }

    /// Removes a flow and its reverse entry, before a first packet makes a new decision. `sequence` and `epoch`: of that
    /// packet.
    pub fn forget(&mut self, side: &ClientSide, sequence: u32, epoch: u32) -> Forgotten {
        let same = |flow: &&Flow| side.proto == proto::TCP && flow.sequence == sequence;
        let flow = self.flows.get(side).copied();
        let forgotten = Forgotten {
            same_syn: flow.as_ref().filter(same).is_some(),
            same_epoch: flow.is_some_and(|flow| flow.epoch == epoch),
            unanswered: flow.is_some_and(|flow| flow.kind == FlowKind::Redirected)
                && self.way_back(side).is_some_and(|way| !way.answered),
        };
        if self.way_back(side).is_some()
            && let Some(flow) = self.flows.get(side)
        {
            self.ways_back.remove(&Self::backend_side(side, flow));
        }
        self.flows.remove(side);
        forgotten
    }

    /// Whether a flow was redirected, and its backend has not answered yet.
    pub fn awaits_answer(&mut self, side: &ClientSide) -> bool {
        self.flows.get(side).is_some_and(|flow| flow.kind == FlowKind::Redirected)
            && self.way_back(side).is_some_and(|way| !way.answered)
    }

    /// The flow of a client's packet that is not its first. Promotes the flow to established if the backend has
    /// answered, except for flows that have no translation to lose: flows that were left to the primary, and direct
    /// connections that keep their source port.
    pub fn go_on(&mut self, side: &ClientSide) -> Option<Flow> {
        let answered = self.way_back(side).is_some_and(|way| way.answered);
        let flow = self.flows.get_mut(side)?;
        flow.established |= match flow.kind {
            FlowKind::Passed => false,
            FlowKind::Redirected => answered,
            FlowKind::Direct => answered && flow.source_port != side.client.port(),
        };
        Some(*flow)
    }

    /// Records a client's packet for its flow.
    pub fn hear_client(&mut self, side: &ClientSide, headers: &Headers) {
        if let Some(flow) = self.flows.get_mut(side) {
            flow.client_said.hear_again(headers);
        }
    }

    /// Records a backend's packet. Returns the flow that it belongs to, and whether this is the first answer.
    pub fn hear_backend(&mut self, headers: &Headers) -> Option<(ClientSide, bool)> {
        let way = self.ways_back.get_mut(&BackendSide::of(headers))?;
        way.backend_said.hear(headers);
        // A RST is a refusal, not an answer.
        let is_first = !way.answered && !headers.is_rst();
        way.answered |= is_first;
        Some((way.owner, is_first))
    }

    /// Pins a decision. The client keeps its source port, unless another live flow has this port toward this backend;
    /// then the flow gets `chosen`, the port that the programs picked. Returns the source port, or `None` if `chosen`
    /// is not allowed or not free.
    pub fn pin(&mut self, side: ClientSide, mut flow: Flow, chosen: u16) -> Option<u16> {
        if flow.kind == FlowKind::Passed {
            self.flows.insert(side, flow);
            return Some(side.client.port());
        }
        // On the fast path the port is always one that the client's kernel does not pick by itself (below 32768),
        // because conntrack does not see the flow and cannot prevent two connections from sharing a port.
        if flow.fast || self.is_taken(&Self::backend_side(&side, &flow), &side) {
            flow.source_port = chosen;
            if chosen < 1024 || flow.fast && chosen >= 32768 || self.is_taken(&Self::backend_side(&side, &flow), &side)
            {
                return None;
            }
        }
        let way = WayBack { owner: side, answered: false, backend_said: LastWords::default(), fast: flow.fast };
        self.ways_back.insert(Self::backend_side(&side, &flow), way);
        self.flows.insert(side, flow);
        Some(flow.source_port)
    }

    /// Whether another flow holds a reverse key. One that was closed does, too, while its entry exists: the backend may
    /// be in TIME-WAIT.
    fn is_taken(&self, backend_side: &BackendSide, by: &ClientSide) -> bool {
        let Some(way) = self.ways_back.get(backend_side).filter(|way| way.owner != *by) else { return false };
        let Some(flow) = self.flows.get(&way.owner) else { return false };
        let reset = flow.client_said.rst || way.backend_said.rst;
        let holds = flow.kind != FlowKind::Passed && Self::backend_side(&way.owner, flow) == *backend_side;
        holds && !reset
    }
}
