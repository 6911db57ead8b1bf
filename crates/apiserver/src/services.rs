//! Service addresses and node ports: the pools beside the store, kept in step with it.
//!
//! What a Service gets is decided by `portolan_api::service`; here the decision runs inside the transaction that stores
//! the Service, which also stores or removes its IPAddress objects. So a crash leaves either all of it or nothing.

use std::net::IpAddr;
use std::sync::{Mutex, MutexGuard};

use ipnet::IpNet;
use portolan_api::meta;
use portolan_api::service::{self, Changes, Finding, ServiceAllocator};
use rand::RngExt as _;
use serde_json::Value;

use crate::store::{Key, Snapshot};

/// Collection names.
pub const SERVICES: &str = "services";
/// Collection of IPAddress objects.
pub const IP_ADDRESSES: &str = "ipaddresses.networking.k8s.io";
/// Collection of ServiceCIDR objects.
pub const SERVICE_CIDRS: &str = "servicecidrs.networking.k8s.io";

/// The pools. Used only inside transactions, which run one at a time.
pub struct Pools {
    allocator: Mutex<ServiceAllocator>,
    ranges: Vec<IpNet>,
    node_ports: (u16, u16),
}

/// What is wrong with the stored Services and IPAddress objects.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Repair {
    /// IPAddress objects that are missing.
    pub missing: Vec<Value>,
    /// Names of those that nobody needs.
    pub surplus: Vec<String>,
    /// What the Services' owners should know, as Warning events.
    pub findings: Vec<Finding>,
}

fn rebuild(cidrs: &[IpNet], node_ports: (u16, u16), state: &Snapshot) -> (ServiceAllocator, Repair) {
    fn values<'a>(state: &'a Snapshot, resource: &str) -> Vec<&'a Value> {
        state.list(resource, None).map(|object| &object.value).collect()
    }
    let (services, addresses) = (values(state, SERVICES), values(state, IP_ADDRESSES));
    let ranges = values(state, SERVICE_CIDRS);
    let rebuilt = service::rebuild(cidrs, node_ports.0..=node_ports.1, &services, &addresses, &ranges);
    let repair = Repair { missing: rebuilt.create, surplus: rebuilt.delete, findings: rebuilt.findings };
    (rebuilt.allocator, repair)
}

/// A random number below `n`.
pub fn pick(n: u64) -> u64 {
    if n == 0 { 0 } else { rand::rng().random_range(0..n) }
}

impl Pools {
    /// The pools as the stored objects leave them, and what must be written to make the IPAddress objects agree.
    pub fn rebuild(cidrs: &[IpNet], node_ports: (u16, u16), state: &Snapshot) -> (Pools, Repair) {
        let (allocator, repair) = rebuild(cidrs, node_ports, state);
        (Pools { allocator: Mutex::new(allocator), ranges: cidrs.to_vec(), node_ports }, repair)
    }

    /// Compares the stored objects with each other again. The pools are replaced by what they say; this must run in a
    /// transaction, whose writes then carry out the repair.
    pub fn repair(&self, state: &Snapshot) -> Repair {
        let (allocator, repair) = rebuild(&self.ranges, self.node_ports, state);
        *self.lock() = allocator;
        repair
    }

    /// The pools, for planning a write.
    pub fn lock(&self) -> MutexGuard<'_, ServiceAllocator> {
        self.allocator.lock().unwrap_or_else(|poisoned| poisoned.into_inner())
    }

    /// Takes note of a stored object that is about addresses or ranges.
    pub fn observe(&self, collection: &str, value: &Value) {
        match collection {
            IP_ADDRESSES => self.lock().observe_ip_address(meta::name(value)),
            SERVICE_CIDRS => self.lock().observe_service_cidr(value),
            _ => {}
        }
    }

    /// Takes note of a removed one.
    pub fn forget(&self, collection: &str, value: &Value) {
        match collection {
            IP_ADDRESSES => self.lock().forget_ip_address(meta::name(value)),
            SERVICE_CIDRS => self.lock().forget_service_cidr(meta::name(value)),
            _ => {}
        }
    }

    /// Takes and gives back what a stored write has changed.
    pub fn commit(&self, changes: &Changes) {
        self.lock().commit(changes);
    }
}

/// Whether the Service that an IPAddress object names still has that address.
pub fn is_needed(state: &Snapshot, address: &Value) -> bool {
    let parent = |field: &str| meta::text(address, &["spec", "parentRef", field]);
    parent("resource") == "services"
        && state.get(SERVICES, &Key::new(parent("namespace"), parent("name"))).is_some_and(|service| {
            // Services keep an address as it was sent; the object has the canonical form.
            let ip = meta::parse_ip_sloppy(meta::name(address));
            service::cluster_ips(&service.value).into_iter().any(|own| meta::parse_ip_sloppy(own) == ip)
        })
}

/// The IPAddress object of an address, without server-owned metadata.
pub fn address_object(ip: IpAddr, namespace: &str, name: &str) -> Value {
    service::ip_address(ip, namespace, name)
}
