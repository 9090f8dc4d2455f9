//! The real datapath: programs and maps in the kernel.
//!
//! Order of writes, so that a packet at any moment sees something whole: backends before the slots that name them,
//! slots into the buffer that is not in force, then the switch (one word, one store), then new frontends. Taking away
//! goes the other way round. A backend stays known while a flow to it lives.

mod attach;
mod clsact;
mod interfaces;
mod load;
mod maps;
mod mmap;
mod offline;
mod pins;
mod sweep;

use std::{
    collections::{BTreeMap, BTreeSet, HashMap},
    net::{SocketAddr, SocketAddrV4},
    time::Duration,
};

use anyhow::{Context as _, Result, anyhow};
use breaker_common::{
    Backend4, EndpointKey4, EndpointRole, MAX_BACKENDS, MAX_SERVICES, NAME_LEN, NONE, PROTO_TCP, PassReason,
    SLOT_PASSTHROUGH, SLOT_REJECT, SLOTS, ServiceCounters, ServiceRecord, Switch, slot_table_start, switch_flags,
};

use super::{
    Adopted, Datapath, DatapathError, FlowView, PacketEvent, Sweep,
    plan::{ServicePlan, Slot, SlotTable},
};
use crate::model::{Frontend, Override, Protocol, ServiceName};

pub use attach::{Attached, Attacher, has_tcx, kernel_at_least};
pub use interfaces::{InterfaceChange, Side, Wanted, watch as watch_interfaces};
pub use load::{Loaded, load};
pub use maps::Maps;
pub use offline::{Leftover, read as read_offline};
pub use pins::{Cleaned, PinDir, PinError, is_on_bpffs};

/// A service that has a place in the maps.
#[derive(Debug)]
struct Installed {
    index: u32,
    frontends: Vec<Frontend>,
    /// What the buffer in force holds; `None` after adoption, when it is not known.
    slots: Option<[SlotTable; 2]>,
}

/// See the module.
#[derive(Debug)]
pub struct KernelDatapath {
    maps: Maps,
    services: BTreeMap<ServiceName, Installed>,
    /// Backend ids by address.
    backends: HashMap<SocketAddrV4, u32>,
    /// Backends that a service's tables name, by service.
    named: BTreeMap<ServiceName, BTreeSet<SocketAddrV4>>,
}

impl KernelDatapath {
    /// On maps that are loaded or adopted.
    #[must_use]
    pub fn new(maps: Maps) -> Self {
        Self { maps, services: BTreeMap::new(), backends: HashMap::new(), named: BTreeMap::new() }
    }

    fn free_index(&self) -> Result<u32> {
        let taken: BTreeSet<u32> = self.services.values().map(|s| s.index).collect();
        (0..MAX_SERVICES).find(|i| !taken.contains(i)).with_context(|| format!("all {MAX_SERVICES} places are taken"))
    }

    /// The id of a backend; a new one gets its entries first.
    fn backend_id(&mut self, address: SocketAddrV4) -> Result<u32> {
        if let Some(id) = self.backends.get(&address) {
            return Ok(*id);
        }
        let taken: BTreeSet<u32> = self.backends.values().copied().collect();
        let id = (0..MAX_BACKENDS).find(|i| !taken.contains(i));
        let id = id.with_context(|| format!("all {MAX_BACKENDS} backends are taken"))?;
        let backend = Backend4 {
            addr: address.ip().octets(),
            port: address.port().to_be_bytes(),
            proto: PROTO_TCP,
            pad: 0,
            in_use: 0,
            pad2: 0,
        };
        self.maps.backends.set(id, backend, 0).with_context(|| format!("write backend {address}"))?;
        let key = endpoint_key(address);
        let role = self.maps.endpoints.get(&key, 0).unwrap_or(EndpointRole::NOTHING);
        self.maps
            .endpoints
            .insert(key, EndpointRole { backend: id, ..role }, 0)
            .with_context(|| format!("write the endpoint of backend {address}"))?;
        self.backends.insert(address, id);
        Ok(id)
    }

    /// Forgets a backend that no table names and no flow uses.
    fn retire(&mut self, address: SocketAddrV4, id: u32) -> Result<()> {
        self.change_role(address, |role| role.backend = NONE)?;
        let nobody = Backend4 { addr: [0; 4], port: [0; 2], proto: 0, pad: 0, in_use: 0, pad2: 0 };
        self.maps.backends.set(id, nobody, 0).with_context(|| format!("clear backend {address}"))?;
        self.backends.remove(&address);
        Ok(())
    }

    /// Changes what an address is to the programs; an entry that is nothing any more goes.
    fn change_role(&mut self, address: SocketAddrV4, change: impl FnOnce(&mut EndpointRole)) -> Result<()> {
        let key = endpoint_key(address);
        let mut role = self.maps.endpoints.get(&key, 0).unwrap_or(EndpointRole::NOTHING);
        change(&mut role);
        if role == EndpointRole::NOTHING {
            return match self.maps.endpoints.remove(&key) {
                Ok(()) | Err(aya::maps::MapError::KeyNotFound) => Ok(()),
                Err(error) => Err(error).with_context(|| format!("remove the endpoint {address}")),
            };
        }
        self.maps.endpoints.insert(key, role, 0).with_context(|| format!("write the endpoint {address}"))
    }

    fn write_slots(&mut self, index: u32, buffer: u32, tables: &[SlotTable; 2]) -> Result<()> {
        for (tier, table) in (0u32..).zip(tables) {
            let start = slot_table_start(index, buffer, tier);
            for (offset, slot) in (0..SLOTS).zip(table) {
                let value = match slot {
                    Slot::PassThrough => SLOT_PASSTHROUGH,
                    Slot::Reject => SLOT_REJECT,
                    Slot::Backend(address) => self.backend_id(*address)?,
                };
                self.maps
                    .slots
                    .set(start + offset, value, 0)
                    .with_context(|| format!("write slot {}", start + offset))?;
            }
        }
        Ok(())
    }

    fn try_apply(&mut self, plan: &ServicePlan) -> Result<()> {
        let known = self.services.contains_key(&plan.name);
        let index = match self.services.get(&plan.name) {
            Some(installed) => installed.index,
            None => self.free_index()?,
        };
        let before = if known { self.maps.switch(index) } else { Switch::from_word(0) };

        let same_slots = self.services.get(&plan.name).and_then(|s| s.slots.as_ref()) == Some(&plan.slots);
        let buffer = if same_slots { before.buffer() } else { 1 - before.buffer() };
        if !same_slots {
            self.write_slots(index, buffer, &plan.slots)?;
        }
        self.maps.services.set(index, record(plan, index), 0).context("write the service's record")?;

        let mut flags = plan.flags;
        if buffer == 1 {
            flags |= switch_flags::BUFFER;
        }
        let decision = &plan.decision;
        let switch = Switch { epoch: decision.epoch, share: decision.share, state: decision.state as u8, flags };
        self.maps.set_switch(index, switch);

        let installed =
            self.services.entry(plan.name.clone()).or_insert(Installed { index, frontends: Vec::new(), slots: None });
        installed.slots = Some(plan.slots.clone());
        let old = installed.frontends.clone();
        for frontend in plan.frontends.iter().filter(|f| !old.contains(f)) {
            self.change_role(v4(frontend)?, |role| role.service = index)?;
        }
        for frontend in old.iter().filter(|f| !plan.frontends.contains(f)) {
            self.change_role(v4(frontend)?, |role| leave(role, index))?;
        }
        if let Some(installed) = self.services.get_mut(&plan.name) {
            installed.frontends.clone_from(&plan.frontends);
        }
        self.named.insert(plan.name.clone(), plan.backends().into_iter().collect());
        Ok(())
    }

    fn try_remove(&mut self, name: &ServiceName) -> Result<()> {
        let Some(installed) = self.services.get(name) else { return Ok(()) };
        let index = installed.index;
        for frontend in installed.frontends.clone() {
            self.change_role(v4(&frontend)?, |role| leave(role, index))?;
        }
        self.maps.set_switch(index, Switch::from_word(0));
        self.maps
            .services
            .set(index, ServiceRecord { name: [0; NAME_LEN], ..record_of_nobody() }, 0)
            .context("clear the record")?;
        self.maps.clear_counters(index)?;
        self.services.remove(name);
        self.named.remove(name);
        Ok(())
    }

    fn try_adopt(&mut self) -> Result<Vec<Adopted>> {
        for id in 0..MAX_BACKENDS {
            let backend = self.maps.backends.get(&id, 0).context("read the backends")?;
            if backend.proto != 0 {
                let address = SocketAddrV4::new(backend.addr.into(), u16::from_be_bytes(backend.port));
                self.backends.insert(address, id);
            }
        }
        let mut frontends = frontends(&self.maps)?;
        let mut adopted = Vec::new();
        for index in 0..MAX_SERVICES {
            let record = self.maps.services.get(&index, 0).context("read the records")?;
            let Some(mut service) = adopt_record(&record, self.maps.switch(index)) else { continue };
            let frontends = frontends.remove(&index).unwrap_or_default();
            service.frontends.clone_from(&frontends);
            service.backup = self.named_by(index, 1)?;
            self.services.insert(service.name.clone(), Installed { index, frontends, slots: None });
            // What its tables name is not known before the first plan; until then every backend counts as named.
            self.named.insert(service.name.clone(), self.backends.keys().copied().collect());
            adopted.push(service);
        }
        Ok(adopted)
    }

    /// Backends that a table in force names.
    fn named_by(&self, index: u32, tier: u32) -> Result<BTreeSet<SocketAddr>> {
        let by_id: HashMap<u32, SocketAddrV4> = self.backends.iter().map(|(address, id)| (*id, *address)).collect();
        let start = slot_table_start(index, self.maps.switch(index).buffer(), tier);
        let mut named = BTreeSet::new();
        for slot in start..start + SLOTS {
            let id = self.maps.slots.get(&slot, 0).context("read the slots")?;
            named.extend(by_id.get(&id).map(|address| SocketAddr::V4(*address)));
        }
        Ok(named)
    }

    fn index(&self, name: &ServiceName) -> Result<u32, DatapathError> {
        let installed = self.services.get(name);
        installed.map(|s| s.index).ok_or_else(|| DatapathError(format!("{name} is not in the maps yet")))
    }

    /// Clears the marks of backends that no flow uses, and forgets those that no table names either.
    fn settle_backends(&mut self, in_use: &BTreeSet<SocketAddrV4>, entries: &BTreeSet<SocketAddrV4>) -> Result<()> {
        let named: BTreeSet<SocketAddrV4> = self.named.values().flatten().copied().collect();
        // A mark is cleared only where no new flow can come: no service that looks into the tables names the backend.
        let tracked: BTreeSet<SocketAddrV4> = self
            .services
            .iter()
            .filter(|(_, s)| self.maps.switch(s.index).has(switch_flags::TRACK))
            .flat_map(|(name, _)| self.named.get(name).into_iter().flatten().copied())
            .collect();
        let known: Vec<_> = self.backends.iter().map(|(address, id)| (*address, *id)).collect();
        for (address, id) in known {
            if !in_use.contains(&address) && !tracked.contains(&address) {
                self.maps.clear_in_use(id);
            }
            if !named.contains(&address) && !in_use.contains(&address) && !entries.contains(&address) {
                self.retire(address, id)?;
            }
        }
        Ok(())
    }
}

impl Datapath for KernelDatapath {
    fn adopt(&mut self) -> Result<Vec<Adopted>, DatapathError> {
        Ok(self.try_adopt()?)
    }

    fn apply(&mut self, plan: &ServicePlan) -> Result<(), DatapathError> {
        Ok(self.try_apply(plan)?)
    }

    fn remove(&mut self, name: &ServiceName) -> Result<(), DatapathError> {
        Ok(self.try_remove(name)?)
    }

    fn beat(&mut self, lease: Duration, unix_ns: u64) {
        self.maps.beat(lease, unix_ns);
    }

    fn counters(&self, name: &ServiceName) -> Result<ServiceCounters, DatapathError> {
        let index = self.index(name)?;
        Ok(self.maps.counters(index)?)
    }

    fn reasons(&self) -> Result<Vec<(PassReason, u64)>, DatapathError> {
        Ok(self.maps.reasons()?)
    }

    fn sweep(&mut self, idle: Option<Duration>) -> Result<Sweep, DatapathError> {
        let names: HashMap<u32, ServiceName> = self.services.iter().map(|(n, s)| (s.index, n.clone())).collect();
        let found = sweep::sweep(&mut self.maps, &names, idle)?;
        self.settle_backends(&found.redirected_to, &found.all_to)?;
        Ok(found.sweep)
    }

    fn cut(&mut self, name: &ServiceName, doomed: &dyn Fn(SocketAddr) -> bool) -> Result<usize, DatapathError> {
        let index = self.index(name)?;
        Ok(sweep::cut(&mut self.maps, index, doomed)?)
    }

    fn flows(&self, name: &ServiceName, limit: usize) -> Result<Vec<FlowView>, DatapathError> {
        let index = self.index(name)?;
        Ok(sweep::list(&self.maps, index, limit)?)
    }

    fn events(&mut self) -> Vec<PacketEvent> {
        let names: HashMap<u32, ServiceName> = self.services.iter().map(|(n, s)| (s.index, n.clone())).collect();
        self.maps.events(&names)
    }
}

/// The address is no frontend of this service any more; it may be another's already.
fn leave(role: &mut EndpointRole, index: u32) {
    if role.service == index {
        role.service = NONE;
    }
}

fn v4(frontend: &Frontend) -> Result<SocketAddrV4> {
    match frontend.address {
        SocketAddr::V4(address) => Ok(address),
        SocketAddr::V6(address) => Err(anyhow!("{address} is IPv6, which the programs do not know yet")),
    }
}

fn endpoint_key(address: SocketAddrV4) -> EndpointKey4 {
    EndpointKey4::new(address.ip().octets(), address.port().to_be_bytes(), PROTO_TCP)
}

fn record_of_nobody() -> ServiceRecord<u8> {
    ServiceRecord {
        name: [0; NAME_LEN],
        since_unix_ns: 0,
        override_until_unix_ns: 0,
        seed: 0,
        half_open_limit: 0,
        trips: 0,
        reason: 0,
        override_kind: 0,
        pad: 0,
    }
}

fn record(plan: &ServicePlan, index: u32) -> ServiceRecord<u8> {
    let mut name = [0; NAME_LEN];
    let bytes = plan.name.as_str().as_bytes();
    let length = bytes.len().min(NAME_LEN - 1);
    name[..length].copy_from_slice(&bytes[..length]);
    let decision = &plan.decision;
    ServiceRecord {
        name,
        since_unix_ns: decision.since_unix_ns,
        override_until_unix_ns: decision.override_.1,
        // Any number that differs between services and stays the same for one.
        seed: index.wrapping_mul(0x9e37_79b9),
        half_open_limit: plan.half_open_limit,
        trips: decision.trips,
        reason: decision.reason as u8,
        override_kind: match decision.override_.0 {
            Override::Auto => 0,
            Override::ForceOpen => 1,
            Override::ForceClosed => 2,
        },
        pad: 0,
    }
}

/// Every service's frontends, by its index.
fn frontends(maps: &Maps) -> Result<HashMap<u32, Vec<Frontend>>> {
    let mut frontends: HashMap<u32, Vec<Frontend>> = HashMap::new();
    for entry in maps.endpoints.iter() {
        let (key, role) = entry.context("read the endpoints")?;
        if role.service != NONE {
            let address = SocketAddrV4::new(key.addr.into(), u16::from_be_bytes(key.port)).into();
            frontends.entry(role.service).or_default().push(Frontend { address, protocol: Protocol::Tcp });
        }
    }
    Ok(frontends)
}

/// A record as an earlier agent left it; `None` for a free place, or one with numbers that we do not know.
fn adopt_record(record: &ServiceRecord<u8>, switch: Switch<u8>) -> Option<Adopted> {
    let name = record.name.split(|b| *b == 0).next().filter(|name| !name.is_empty())?;
    Some(Adopted {
        name: ServiceName::new(std::str::from_utf8(name).ok()?),
        frontends: Vec::new(),
        backup: BTreeSet::new(),
        state: switch.state.try_into().ok()?,
        epoch: switch.epoch,
        share: switch.share,
        reason: record.reason.try_into().ok()?,
        since_unix_ns: record.since_unix_ns,
        trips: record.trips,
        override_: (
            match record.override_kind {
                1 => Override::ForceOpen,
                2 => Override::ForceClosed,
                _ => Override::Auto,
            },
            record.override_until_unix_ns,
        ),
    })
}
