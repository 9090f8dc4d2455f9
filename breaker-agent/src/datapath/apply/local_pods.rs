//! Writes the interface of each local backend to the maps.

use std::net::SocketAddr;

use crate::datapath::{KernelDatapath, neighbors::LocalPods};

impl KernelDatapath {
    /// Sets the pods of this node, and updates the interface of every backend in the maps. `pods` contains, by pod
    /// address, the index of the host-side interface; only interfaces with breaker's programs may be in it.
    pub fn set_local_pods(&mut self, pods: LocalPods) {
        self.local_pods = pods;
        for ((address, _), id) in &self.backends {
            let ifindex = self.local_ifindex(*address);
            if self.interface(*address, *id) != ifindex {
                match address {
                    SocketAddr::V4(_) => self.maps.v4.set_interface(*id, ifindex),
                    SocketAddr::V6(_) => self.maps.v6.set_interface(*id, ifindex),
                }
            }
        }
    }

    /// Returns the interface index of the local pod with this address; 0 = no local pod with this address is known.
    pub(crate) fn local_ifindex(&self, address: SocketAddr) -> u32 {
        self.local_pods.get(&address.ip()).copied().unwrap_or(0)
    }

    /// Returns the interface index of a backend as the programs see it; 0 = not a known pod on this node.
    pub(crate) fn interface(&self, address: SocketAddr, id: u32) -> u32 {
        match address {
            SocketAddr::V4(_) => self.maps.v4.interface(id),
            SocketAddr::V6(_) => self.maps.v6.interface(id),
        }
    }
}
