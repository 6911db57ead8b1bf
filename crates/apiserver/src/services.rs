//! Service addresses and node ports: the pools beside the store, kept in step with it.
//!
//! What a Service gets is decided by `portolan_api::service`; here the decision runs inside the transaction that stores
//! the Service, which also stores or removes its IPAddress objects. So a crash leaves either all of it or nothing.

use std::net::IpAddr;
use std::sync::{Mutex, MutexGuard};

use ipnet::IpNet;
use portolan_api::meta;
use portolan_api::service::{self, Changes, ServiceAllocator};
use rand::RngExt as _;
use serde_json::Value;

use crate::store::Snapshot;

/// Collection names.
pub const SERVICES: &str = "services";
/// Collection of IPAddress objects.
pub const IP_ADDRESSES: &str = "ipaddresses.networking.k8s.io";
/// Collection of ServiceCIDR objects.
pub const SERVICE_CIDRS: &str = "servicecidrs.networking.k8s.io";

/// The pools. Used only inside transactions, which run one at a time.
pub struct Pools {
    allocator: Mutex<ServiceAllocator>,
}

/// A random number below `n`.
pub fn pick(n: u64) -> u64 {
    if n == 0 { 0 } else { rand::rng().random_range(0..n) }
}

impl Pools {
    /// The pools as the stored objects leave them, and what must be written to make the IPAddress objects agree.
    pub fn rebuild(cidrs: &[IpNet], node_ports: (u16, u16), state: &Snapshot) -> (Pools, Vec<Value>, Vec<String>) {
        let values = |resource: &str| -> Vec<std::sync::Arc<crate::store::Object>> {
            state.list(resource, None).cloned().collect()
        };
        let (services, addresses, ranges) = (values(SERVICES), values(IP_ADDRESSES), values(SERVICE_CIDRS));
        fn refs(objects: &[std::sync::Arc<crate::store::Object>]) -> Vec<&Value> {
            objects.iter().map(|object| &object.value).collect()
        }
        let rebuilt =
            service::rebuild(cidrs, node_ports.0..=node_ports.1, &refs(&services), &refs(&addresses), &refs(&ranges));
        for finding in &rebuilt.findings {
            tracing::warn!(
                namespace = finding.namespace,
                service = finding.name,
                reason = finding.reason,
                message = finding.message,
                "a stored Service has a bad address or port"
            );
        }
        (Pools { allocator: Mutex::new(rebuilt.allocator) }, rebuilt.create, rebuilt.delete)
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

/// The IPAddress object of an address, without server-owned metadata.
pub fn address_object(ip: IpAddr, namespace: &str, name: &str) -> Value {
    service::ip_address(ip, namespace, name)
}
