//! The decisions that are pinned, and whose a backend's packets are.

use std::{collections::BTreeMap, net::SocketAddr};

use breaker_common::FlowKind;

use super::headers::Headers;

/// A connection as its client sees it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct ClientSide {
    /// The client.
    pub client: SocketAddr,
    /// What it talks to.
    pub to: SocketAddr,
    /// Protocol number.
    pub proto: u8,
}

/// A connection as its backend sees it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct BackendSide {
    /// The backend.
    pub backend: SocketAddr,
    /// The client, with the port that the backend knows.
    pub client: SocketAddr,
    /// Protocol number.
    pub proto: u8,
}

/// Last words that one side said.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct LastWords {
    /// FIN.
    pub fin: bool,
    /// RST.
    pub rst: bool,
}

impl LastWords {
    /// A backend's.
    fn hear(&mut self, headers: &Headers) {
        self.fin |= headers.flags & 1 != 0;
        self.rst |= headers.is_rst();
    }

    /// A client's: what comes after a reset says that the reset was none.
    fn hear_again(&mut self, headers: &Headers) {
        self.rst = false;
        self.hear(headers);
    }
}

/// A decision.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Flow {
    /// What was decided.
    pub kind: FlowKind,
    /// Where it goes; what the client talks to, if nothing is changed.
    pub backend: SocketAddr,
    /// The client's port, as the backend sees it.
    pub source_port: u16,
    /// In which epoch of its service.
    pub epoch: u32,
    /// The client went on after an answer: nothing pushes the flow out any more.
    pub established: bool,
    /// What the client said last.
    pub client_said: LastWords,
    /// Past the stack.
    pub fast: bool,
    /// From outside, under the client's own address.
    pub keeps_client: bool,
}

/// How a backend's packets find back.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct WayBack {
    /// The flow that holds it.
    pub owner: ClientSide,
    /// The backend answered.
    pub answered: bool,
    /// What the backend said last.
    pub backend_said: LastWords,
    /// Past the stack.
    pub fast: bool,
}

/// All flows.
#[derive(Clone, Debug, Default)]
pub struct Book {
    /// By the client's view.
    pub flows: BTreeMap<ClientSide, Flow>,
    /// By the backend's view: never two flows under one.
    pub ways_back: BTreeMap<BackendSide, WayBack>,
}

impl ClientSide {
    /// Of a client's packet.
    #[must_use]
    pub const fn of(headers: &Headers) -> Self {
        Self { client: headers.source, to: headers.destination, proto: headers.proto }
    }
}

impl BackendSide {
    /// Of a backend's packet.
    #[must_use]
    pub const fn of(headers: &Headers) -> Self {
        Self { backend: headers.source, client: headers.destination, proto: headers.proto }
    }
}

impl Book {
    /// How the backend sees a flow.
    fn backend_side(side: &ClientSide, flow: &Flow) -> BackendSide {
        let client = SocketAddr::new(side.client.ip(), flow.source_port);
        BackendSide { backend: flow.backend, client, proto: side.proto }
    }

    /// A flow's way back, if it still holds it.
    fn way_back(&mut self, side: &ClientSide) -> Option<&mut WayBack> {
        let flow = self.flows.get(side).filter(|flow| flow.kind != FlowKind::Passed)?;
        self.ways_back.get_mut(&Self::backend_side(side, flow)).filter(|way| way.owner == *side)
    }

    /// Forgets a flow: a first packet decides anew.
    pub fn forget(&mut self, side: &ClientSide) {
        if self.way_back(side).is_some()
            && let Some(flow) = self.flows.get(side)
        {
            self.ways_back.remove(&Self::backend_side(side, flow));
        }
        self.flows.remove(side);
    }

    /// A client's packet that is not its first: the flow that it is of. One that was answered is established from now on; but
    /// for what has no translation to lose: what was left to the primary, and a direct connection that keeps its port.
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

    /// Notes what a client says.
    pub fn hear_client(&mut self, side: &ClientSide, headers: &Headers) {
        if let Some(flow) = self.flows.get_mut(side) {
            flow.client_said.hear_again(headers);
        }
    }

    /// Notes what a backend says, and whose it is.
    pub fn hear_backend(&mut self, headers: &Headers) -> Option<(ClientSide, WayBack)> {
        let way = self.ways_back.get_mut(&BackendSide::of(headers))?;
        way.backend_said.hear(headers);
        // All but a refusal.
        way.answered |= !headers.is_rst();
        Some((way.owner, *way))
    }

    /// Pins a decision. The client keeps its port, unless another flow that lives has it toward this backend: then it gets
    /// one that is free. Which, `chosen` says. Returns the port, or nothing if `chosen` was not free.
    pub fn pin(&mut self, side: ClientSide, mut flow: Flow, chosen: u16) -> Option<u16> {
        if flow.kind == FlowKind::Passed {
            self.flows.insert(side, flow);
            return Some(side.client.port());
        }
        // Past the stack, the port is none that the client's kernel chooses by itself: conntrack does not see to it.
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

    /// Whether another flow that lives holds a way back.
    fn is_taken(&self, backend_side: &BackendSide, by: &ClientSide) -> bool {
        let Some(way) = self.ways_back.get(backend_side).filter(|way| way.owner != *by) else { return false };
        let Some(flow) = self.flows.get(&way.owner) else { return false };
        let reset = flow.client_said.rst || way.backend_said.rst;
        // Of a direct connection the backend's packets are not always looked at.
        let closed = flow.client_said.fin && (way.backend_said.fin || flow.kind == FlowKind::Direct);
        let holds = flow.kind != FlowKind::Passed && Self::backend_side(&way.owner, flow) == *backend_side;
        holds && !reset && !closed
    }
}
