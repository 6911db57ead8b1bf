//! Allocation of cluster IPs and node ports, and the Service fields that follow from it.
//!
//! This is the API server's own duty: a Service answers its create with the addresses and ports it will keep. All of it
//! is decided here over values. [`ServiceAllocator`] knows what is taken; [`ServiceAllocator::plan_create`] and
//! [`ServiceAllocator::plan_update`] fill a document in and say what the write takes and gives back as [`Changes`].
//! The caller, which is the only writer, validates and stores the document and then calls
//! [`ServiceAllocator::commit`]; when anything in between refuses the write there is nothing to undo.
//!
//! The order within a request is: defaulting, this plan, [`crate::strategy`], [`crate::validation`]. An error of the
//! plan is answered alone, before other faults of the document are looked for.

mod allocator;
mod families;
mod objects;
mod plan;

pub use allocator::{Changes, ServiceAllocator};
pub use objects::{
    Finding, IP_FAMILY_LABEL, MANAGED_BY, MANAGED_BY_LABEL, Rebuilt, SERVICE_CIDR_FINALIZER, deletion_blocked,
    ip_address, kubernetes_service, mark_ready, mark_terminating, rebuild, service_cidr,
};

use serde_json::{Value, json};
use std::fmt;
use std::net::IpAddr;

use crate::meta;

/// An IP family as Services name it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Family {
    /// `IPv4`.
    V4,
    /// `IPv6`.
    V6,
}

impl Family {
    /// The family of an address.
    pub fn of(ip: IpAddr) -> Family {
        if ip.is_ipv4() { Family::V4 } else { Family::V6 }
    }

    /// The family with this name.
    pub fn parse(text: &str) -> Option<Family> {
        match text {
            "IPv4" => Some(Family::V4),
            "IPv6" => Some(Family::V6),
            _ => None,
        }
    }

    /// The other one.
    pub fn other(self) -> Family {
        match self {
            Family::V4 => Family::V6,
            Family::V6 => Family::V4,
        }
    }
}

impl fmt::Display for Family {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Family::V4 => "IPv4",
            Family::V6 => "IPv6",
        })
    }
}

/// The value of a headless Service's `clusterIP`.
pub const NONE: &str = "None";

/// `spec.type`; ClusterIP when it is not set.
pub fn service_type(service: &Value) -> &str {
    match meta::text(service, &["spec", "type"]) {
        "" => "ClusterIP",
        other => other,
    }
}

/// `spec.clusterIPs` as texts.
pub fn cluster_ips(service: &Value) -> Vec<&str> {
    meta::list(service, &["spec", "clusterIPs"]).iter().filter_map(Value::as_str).collect()
}

/// Whether the Service is headless.
pub fn is_headless(service: &Value) -> bool {
    cluster_ips(service).first() == Some(&NONE) || meta::text(service, &["spec", "clusterIP"]) == NONE
}

/// Whether the Service has no selector, so that its endpoints are someone else's business.
pub fn is_selectorless(service: &Value) -> bool {
    meta::get(service, &["spec", "selector"]).as_object().is_none_or(|selector| selector.is_empty())
}

/// Whether this type has a cluster IP ("None" counts).
pub fn needs_cluster_ip(service: &Value) -> bool {
    matches!(service_type(service), "ClusterIP" | "NodePort" | "LoadBalancer")
}

/// Whether every port of this Service gets a node port.
pub fn needs_node_ports(service: &Value) -> bool {
    match service_type(service) {
        "NodePort" => true,
        "LoadBalancer" => meta::get(service, &["spec", "allocateLoadBalancerNodePorts"]).as_bool().unwrap_or(true),
        _ => false,
    }
}

/// Whether ports of this type may have a node port at all.
pub fn allows_node_ports(service: &Value) -> bool {
    matches!(service_type(service), "NodePort" | "LoadBalancer")
}

/// Whether a health check node port is needed: LoadBalancer with externalTrafficPolicy Local.
pub fn needs_health_check_node_port(service: &Value) -> bool {
    service_type(service) == "LoadBalancer" && meta::text(service, &["spec", "externalTrafficPolicy"]) == "Local"
}

/// Whether clients outside the cluster can reach the Service, so that externalTrafficPolicy applies.
pub fn is_externally_accessible(service: &Value) -> bool {
    allows_node_ports(service)
        || (service_type(service) == "ClusterIP" && !meta::list(service, &["spec", "externalIPs"]).is_empty())
}

/// `spec.healthCheckNodePort`, 0 if unset.
pub fn health_check_node_port(service: &Value) -> i64 {
    meta::get(service, &["spec", "healthCheckNodePort"]).as_i64().unwrap_or(0)
}

fn ports(service: &Value) -> &[Value] {
    meta::list(service, &["spec", "ports"])
}

fn node_port(port: &Value) -> i64 {
    port.get("nodePort").and_then(Value::as_i64).unwrap_or(0)
}

fn set_node_port(service: &mut Value, index: usize, number: i64) {
    let port = service.pointer_mut(&format!("/spec/ports/{index}"));
    if let Some(port) = port.and_then(Value::as_object_mut) {
        if number == 0 {
            port.remove("nodePort");
        } else {
            port.insert("nodePort".to_owned(), json!(number));
        }
    }
}

/// Clears fields that the new type has no use for, if the client left them as they were.
///
/// Only on update, so that a client that sets such a field itself hears of it from validation.
pub(crate) fn drop_type_dependent_fields(new: &mut Value, old: &Value) {
    let same = |new: &Value, field: &str| {
        let path = ["spec", field];
        meta::get(new, &path) == meta::get(old, &path)
    };
    if needs_cluster_ip(old) && !needs_cluster_ip(new) {
        if same(new, "clusterIPs") {
            meta::remove(new, &["spec", "clusterIP"]);
            meta::remove(new, &["spec", "clusterIPs"]);
        }
        for field in ["ipFamilies", "ipFamilyPolicy"] {
            if same(new, field) {
                meta::remove(new, &["spec", field]);
            }
        }
    }
    if allows_node_ports(old) && !allows_node_ports(new) {
        let stored: Vec<i64> = ports(old).iter().map(node_port).collect();
        let unchanged = ports(new).iter().map(node_port).all(|number| number == 0 || stored.contains(&number));
        if unchanged {
            for index in 0..ports(new).len() {
                set_node_port(new, index, 0);
            }
        }
    }
    if needs_health_check_node_port(old) && !needs_health_check_node_port(new) && same(new, "healthCheckNodePort") {
        meta::remove(new, &["spec", "healthCheckNodePort"]);
    }
    if service_type(old) == "LoadBalancer" && service_type(new) != "LoadBalancer" {
        for field in ["allocateLoadBalancerNodePorts", "loadBalancerClass"] {
            if same(new, field) {
                meta::remove(new, &["spec", field]);
            }
        }
    }
    if is_externally_accessible(old) && !is_externally_accessible(new) && same(new, "externalTrafficPolicy") {
        meta::remove(new, &["spec", "externalTrafficPolicy"]);
    }
}
