//! Routes and their selection tables, staged before the switch puts them in force.

use anyhow::{Context as _, Result};
use breaker_common::{
    Route, SINGLE_BACKEND, SLOT_PASSTHROUGH, SLOT_REJECT, TABLE_LEN, TABLE_SIZES, Table, TableRef, route_flags,
};
use breaker_core::{
    model::Protocol,
    plan::{RoutePlan, ServicePlan, Slot, SlotTable},
};

use super::InstalledRoute;
use crate::datapath::KernelDatapath;

impl KernelDatapath {
    /// Writes a selection table. Returns the value for [`Route::tables`]: the table's reference or, without a table,
    /// its only content.
    pub(crate) fn write_table(&mut self, protocol: Protocol, table: &SlotTable) -> Result<u32> {
        let value = |slot: &Slot, datapath: &mut Self| match slot {
            Slot::PassThrough => Ok(SLOT_PASSTHROUGH),
            Slot::Reject => Ok(SLOT_REJECT),
            Slot::Backend(address) => datapath.backend_id((*address, protocol)),
        };
        let slots = match table {
            SlotTable::All(slot @ Slot::Backend(_)) => return Ok(SINGLE_BACKEND | value(slot, self)?),
            SlotTable::All(slot) => return value(slot, self),
            SlotTable::Balanced(_) => table.slots(),
        };
        let values = slots.iter().map(|slot| value(slot, self)).collect::<Result<Vec<u32>>>()?;
        let size = TABLE_SIZES.iter().position(|size| *size as usize == values.len()).unwrap_or(0);
        let number = self.table_indices.allocate()?;
        let table = TableRef { number, size: u32::try_from(size).unwrap_or(0) };
        for (part, values) in (0..).zip(values.chunks(TABLE_LEN as usize)) {
            let mut content = Table { slots: [0; TABLE_LEN as usize] };
            content.slots[..values.len()].copy_from_slice(values);
            if let Err(error) = self.maps.slots.insert(table.key(part), content, 0) {
                self.remove_table(number);
                self.table_indices.release(number);
                return Err(error).with_context(|| format!("write selection table {number}"));
            }
        }
        Ok(table.to_word())
    }

    /// Removes all parts of a selection table from the map. No route may name it.
    pub(in crate::datapath) fn remove_table(&mut self, number: u32) {
        let table = TableRef { number, size: 0 };
        let mut parts = 0..;
        while parts.next().is_some_and(|part| self.maps.slots.remove(&table.key(part)).is_ok()) {}
    }

    /// Releases the number of a table, if it has one, after a grace period: packets that have already read the route
    /// may still read the table.
    pub(crate) fn release_table(&mut self, table: u32) {
        if table & SINGLE_BACKEND == 0 {
            self.table_indices.release_later(TableRef::from_word(table).number);
        }
    }

    /// Gives each route of a plan an index and writes its changed tables. A route takes over the index of an
    /// earlier route that has a frontend in common with it; otherwise it gets a new one.
    pub(crate) fn stage_routes(&mut self, plan: &ServicePlan, old: &[InstalledRoute]) -> Result<Vec<InstalledRoute>> {
        let mut left: Vec<&InstalledRoute> = old.iter().collect();
        let mut staged = Vec::new();
        let outcome = plan.routes.iter().try_for_each(|route| {
            let same = left.iter().position(|o| o.frontends.iter().any(|f| route.frontends.contains(f)));
            let known = same.map(|at| left.swap_remove(at));
            staged.push(self.stage_route(route, known)?);
            Ok(())
        });
        if let Err(error) = outcome {
            // No packet can see the new entries yet.
            for route in &staged {
                self.unstage_route(route, old);
            }
            return Err(error);
        }
        Ok(staged)
    }

    pub(crate) fn stage_route(&mut self, route: &RoutePlan, known: Option<&InstalledRoute>) -> Result<InstalledRoute> {
        let mut tables = [SLOT_PASSTHROUGH; 2];
        for (tier, table) in route.slots.iter().enumerate() {
            let same = known.filter(|k| k.slots.as_ref().is_some_and(|slots| slots[tier] == *table));
            let written = match same {
                Some(known) => Ok(known.tables[tier]),
                None => self.write_table(route.protocol, table),
            };
            match written {
                Ok(start) => tables[tier] = start,
                Err(error) => {
                    if tier > 0 && known.is_none_or(|k| k.tables[0] != tables[0]) {
                        self.release_table(tables[0]);
                    }
                    return Err(error);
                }
            }
        }
        let index = match known {
            Some(known) => known.index,
            None => self.route_indices.allocate()?,
        };
        let frontends = route.frontends.clone();
        Ok(InstalledRoute { index, frontends, flags: flags_of(route), slots: Some(route.slots.clone()), tables })
    }

    /// Releases the indices of a route that never came into force, except those that the routes in `old` use.
    pub(crate) fn unstage_route(&mut self, route: &InstalledRoute, old: &[InstalledRoute]) {
        let known = old.iter().find(|o| o.index == route.index);
        for (tier, start) in route.tables.into_iter().enumerate() {
            if known.is_none_or(|k| k.tables[tier] != start) {
                self.release_table(start);
            }
        }
        if known.is_none() {
            self.route_indices.release(route.index);
        }
    }

    pub(crate) fn write_route(&mut self, index: u32, tables: [[u32; 2]; 2], flags: u32) -> Result<()> {
        self.maps.routes.set(index, Route { tables, flags }, 0).with_context(|| format!("write route {index}"))
    }
}

/// Returns a route's bits of [`route_flags`].
pub(crate) const fn flags_of(route: &RoutePlan) -> u32 {
    if route.keep_client { route_flags::KEEP_CLIENT } else { 0 }
}
