//! The objects that stand for service ranges and addresses (KEP-1880), the `default/kubernetes` Service, and the
//! reconstruction of the pools from what is stored.

use ipnet::IpNet;
use jiff::Timestamp;
use serde_json::{Value, json};
use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;
use std::ops::RangeInclusive;

use super::allocator::{Changes, DEFAULT_CIDR, ServiceAllocator};
use super::plan::held_ports;
use super::{Family, cluster_ips, is_headless, needs_cluster_ip};
use crate::meta;

/// Label with the family of an IPAddress.
pub const IP_FAMILY_LABEL: &str = "ipaddress.kubernetes.io/ip-family";
/// Label of IPAddress objects that the allocator made.
pub const MANAGED_BY_LABEL: &str = "ipaddress.kubernetes.io/managed-by";
/// Value of [`MANAGED_BY_LABEL`].
pub const MANAGED_BY: &str = "ipallocator.k8s.io";
/// Finalizer that keeps a ServiceCIDR while its addresses are in use.
pub const SERVICE_CIDR_FINALIZER: &str = "networking.k8s.io/service-cidr-finalizer";

/// The IPAddress object of a Service's address, without server-owned metadata.
pub fn ip_address(ip: IpAddr, namespace: &str, service: &str) -> Value {
    json!({
        "apiVersion": "networking.k8s.io/v1",
        "kind": "IPAddress",
        "metadata": {
            "name": ip.to_string(),
            "labels": { IP_FAMILY_LABEL: Family::of(ip).to_string(), MANAGED_BY_LABEL: MANAGED_BY },
        },
        "spec": { "parentRef": { "resource": "services", "namespace": namespace, "name": service } },
    })
}

/// The ServiceCIDR `kubernetes` of the configured ranges, ready from the start.
pub fn service_cidr(cidrs: &[IpNet], now: Timestamp) -> Value {
    let texts: Vec<String> = cidrs.iter().map(|net| net.trunc().to_string()).collect();
    let mut object = json!({
        "apiVersion": "networking.k8s.io/v1",
        "kind": "ServiceCIDR",
        "metadata": { "name": DEFAULT_CIDR },
        "spec": { "cidrs": texts },
    });
    mark_ready(&mut object, now);
    object
}

/// Adds the finalizer and the condition Ready to a ServiceCIDR. Returns whether anything changed.
pub fn mark_ready(object: &mut Value, now: Timestamp) -> bool {
    let before = object.clone();
    let mut finalizers = meta::list(object, &["metadata", "finalizers"]).to_vec();
    if !finalizers.iter().any(|f| f == SERVICE_CIDR_FINALIZER) {
        finalizers.push(json!(SERVICE_CIDR_FINALIZER));
        meta::set(object, &["metadata", "finalizers"], Value::Array(finalizers));
    }
    set_condition(object, "True", "", "Kubernetes Service CIDR is ready", now);
    *object != before
}

/// Sets the condition of a ServiceCIDR that has to wait for its addresses. Returns whether anything changed.
pub fn mark_terminating(object: &mut Value, now: Timestamp) -> bool {
    let before = object.clone();
    let message =
        "There are still IPAddresses referencing the ServiceCIDR, please remove them or create a new ServiceCIDR";
    set_condition(object, "False", "Terminating", message, now);
    *object != before
}

fn set_condition(object: &mut Value, status: &str, reason: &str, message: &str, now: Timestamp) {
    let mut conditions = meta::list(object, &["status", "conditions"]).to_vec();
    let stored = conditions.iter().position(|c| meta::text(c, &["type"]) == "Ready");
    let since = stored
        .filter(|i| meta::text(&conditions[*i], &["status"]) == status)
        .and_then(|i| conditions[i].get("lastTransitionTime").cloned())
        .unwrap_or_else(|| json!(meta::format_time(now)));
    let condition = json!({
        "type": "Ready", "status": status, "lastTransitionTime": since, "reason": reason, "message": message,
    });
    match stored {
        Some(i) => conditions[i] = condition,
        None => conditions.push(condition),
    }
    meta::set(object, &["status", "conditions"], Value::Array(conditions));
}

/// Whether a ServiceCIDR that is being deleted must wait: an allocated address lies in it and in no other one.
pub fn deletion_blocked<'a>(
    deleting: &Value,
    others: impl IntoIterator<Item = &'a Value>,
    ip_addresses: impl IntoIterator<Item = &'a Value>,
) -> bool {
    let nets = |object: &Value| -> Vec<IpNet> {
        meta::list(object, &["spec", "cidrs"]).iter().filter_map(|cidr| cidr.as_str()?.parse().ok()).collect()
    };
    let mine = nets(deleting);
    let elsewhere: Vec<IpNet> = others
        .into_iter()
        .filter(|other| meta::name(other) != meta::name(deleting) && !meta::is_deleting(other))
        .flat_map(nets)
        .collect();
    ip_addresses
        .into_iter()
        .filter(|object| meta::label(object, MANAGED_BY_LABEL) == Some(MANAGED_BY))
        .filter_map(|object| meta::name(object).parse::<IpAddr>().ok())
        .any(|ip| mine.iter().any(|net| net.contains(&ip)) && !elsewhere.iter().any(|net| net.contains(&ip)))
}

/// The Service `default/kubernetes`, before allocation: it asks for the first usable address of the first range.
pub fn kubernetes_service(cidrs: &[IpNet], secure_port: u16) -> Value {
    let first = cidrs.first().and_then(|net| match net.network() {
        IpAddr::V4(base) => u32::from(base).checked_add(1).map(|n| IpAddr::V4(n.into())),
        IpAddr::V6(base) => u128::from(base).checked_add(1).map(|n| IpAddr::V6(n.into())),
    });
    let mut service = json!({
        "apiVersion": "v1",
        "kind": "Service",
        "metadata": {
            "name": "kubernetes",
            "namespace": "default",
            "labels": { "component": "apiserver", "provider": "kubernetes" },
        },
        "spec": {
            "type": "ClusterIP",
            "ipFamilyPolicy": "SingleStack",
            "sessionAffinity": "None",
            "ports": [{ "name": "https", "port": 443, "protocol": "TCP", "targetPort": secure_port }],
        },
    });
    if let Some(ip) = first {
        meta::set(&mut service, &["spec", "clusterIP"], json!(ip.to_string()));
    }
    service
}

/// What was found wrong with what is stored; becomes a Warning event on the object.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Finding {
    /// Namespace of the Service.
    pub namespace: String,
    /// Name of the Service.
    pub name: String,
    /// CamelCase reason of the event.
    pub reason: &'static str,
    /// Text of the event.
    pub message: String,
}

/// Pools as they follow from the stored objects, and what has to be written to make the IPAddress objects right.
#[derive(Clone, Debug)]
pub struct Rebuilt {
    /// The pools.
    pub allocator: ServiceAllocator,
    /// IPAddress objects to create.
    pub create: Vec<Value>,
    /// Names of IPAddress objects to delete.
    pub delete: Vec<String>,
    /// Warning events.
    pub findings: Vec<Finding>,
}

/// Rebuilds the pools from stored Services, IPAddress and ServiceCIDR objects, at start or to repair.
///
/// Services are never changed: they are the truth, and what two of them claim stays with both. Allocation and object
/// are stored in one transaction, so after a crash this finds nothing to do; it heals stores that were edited by hand.
pub fn rebuild(
    service_cidrs: &[IpNet],
    node_ports: RangeInclusive<u16>,
    services: &[&Value],
    ip_addresses: &[&Value],
    cidr_objects: &[&Value],
) -> Rebuilt {
    let mut allocator = ServiceAllocator::new(service_cidrs, node_ports);
    for object in cidr_objects {
        allocator.observe_service_cidr(object);
    }
    let mut findings = Vec::new();
    let mut find = |service: &Value, reason: &'static str, message: String| {
        findings.push(Finding {
            namespace: meta::namespace(service).to_owned(),
            name: meta::name(service).to_owned(),
            reason,
            message,
        });
    };

    let mut owners: BTreeMap<IpAddr, &Value> = BTreeMap::new();
    let mut port_owners: BTreeSet<u16> = BTreeSet::new();
    for service in services {
        if needs_cluster_ip(service) && !is_headless(service) {
            for ip in cluster_ips(service).into_iter().filter_map(meta::parse_ip_sloppy) {
                if owners.contains_key(&ip) {
                    let message = format!("Cluster IP {ip} was assigned to multiple services; please recreate service");
                    find(service, "ClusterIPAlreadyAllocated", message);
                    continue;
                }
                if !allocator.in_some_range(ip) {
                    let message =
                        format!("Cluster IP {ip} is not within any configured Service CIDR; please recreate service");
                    find(service, "ClusterIPOutOfRange", message);
                }
                owners.insert(ip, service);
            }
        }
        // Inside one Service a number may serve several protocols.
        for port in held_ports(service).into_iter().collect::<BTreeSet<u16>>() {
            if !allocator.node_ports().contains(&port) {
                let message = format!("Port {port} is not within the port range; please recreate service");
                find(service, "PortOutOfRange", message);
            } else if !port_owners.insert(port) {
                let message = format!("Port {port} was assigned to multiple services; please recreate service");
                find(service, "PortAlreadyAllocated", message);
            }
        }
    }

    let mut create = Vec::new();
    let mut delete = Vec::new();
    let mut right: BTreeSet<IpAddr> = BTreeSet::new();
    for object in ip_addresses {
        let Ok(ip) = meta::name(object).parse::<IpAddr>() else { continue };
        let parent = |field: &str| meta::text(object, &["spec", "parentRef", field]);
        let names = |service: &Value| {
            parent("resource") == "services"
                && parent("group").is_empty()
                && parent("namespace") == meta::namespace(service)
                && parent("name") == meta::name(service)
        };
        let ours = meta::label(object, MANAGED_BY_LABEL) == Some(MANAGED_BY);
        match owners.get(&ip) {
            Some(service) if names(service) => {
                right.insert(ip);
            }
            Some(service) if ours => {
                let message = format!("Cluster IP {ip} for service {} has a wrong reference; repairing", id(service));
                find(service, "ClusterIPNotAllocated", message);
                delete.push(meta::name(object).to_owned());
            }
            None if ours => delete.push(meta::name(object).to_owned()),
            // Made by hand: it blocks the address, and is nobody's business here.
            Some(_) | None => {
                right.insert(ip);
            }
        }
    }
    for (ip, service) in &owners {
        if !right.contains(ip) {
            let replaced = delete.iter().any(|name| name == &ip.to_string());
            if !replaced {
                let message = format!("Cluster IP {ip} for service {} is not allocated; repairing", id(service));
                find(service, "ClusterIPNotAllocated", message);
            }
            create.push(ip_address(*ip, meta::namespace(service), meta::name(service)));
        }
    }
    allocator.commit(&Changes {
        take_ips: owners.keys().copied().chain(right).collect(),
        take_ports: port_owners,
        ..Changes::default()
    });
    Rebuilt { allocator, create, delete, findings }
}

fn id(service: &Value) -> String {
    format!("{}/{}", meta::namespace(service), meta::name(service))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn service(name: &str, ip: &str, node_port: u16) -> Value {
        json!({
            "metadata": {"name": name, "namespace": "ns"},
            "spec": {"type": "NodePort", "clusterIP": ip, "clusterIPs": [ip], "ports": [{"port": 80, "nodePort": node_port}]},
        })
    }

    fn rebuilt(services: &[Value], addresses: &[Value]) -> Rebuilt {
        let net: IpNet = "10.96.0.0/12".parse().expect("a network");
        let services: Vec<&Value> = services.iter().collect();
        let addresses: Vec<&Value> = addresses.iter().collect();
        rebuild(&[net], 30000..=32767, &services, &addresses, &[])
    }

    fn ip(text: &str) -> IpAddr {
        text.parse().expect("an address")
    }

    #[test]
    fn a_consistent_store_needs_no_repair() {
        let got = rebuilt(&[service("a", "10.96.0.5", 30001)], &[ip_address(ip("10.96.0.5"), "ns", "a")]);
        assert_eq!((got.create.len(), got.delete.len(), got.findings.len()), (0, 0, 0));
        assert!(got.allocator.has_ip(ip("10.96.0.5")) && got.allocator.has_port(30001));
    }

    #[test]
    fn each_inconsistency_is_found_and_only_address_objects_change() {
        let services = [
            service("missing", "10.96.0.5", 30001),
            service("twice", "10.96.0.5", 30001),
            service("outside", "192.0.2.9", 80),
            service("wrong", "10.96.0.6", 30002),
        ];
        let mut by_hand = ip_address(ip("10.96.0.9"), "ns", "x");
        by_hand["metadata"]["labels"] = json!({});
        let addresses =
            [ip_address(ip("10.96.0.6"), "ns", "other"), ip_address(ip("10.96.0.8"), "ns", "gone"), by_hand];
        let got = rebuilt(&services, &addresses);
        let mut reasons: Vec<(&str, &str)> = got.findings.iter().map(|f| (f.name.as_str(), f.reason)).collect();
        reasons.sort_unstable();
        assert_eq!(
            reasons,
            [
                ("missing", "ClusterIPNotAllocated"),
                ("outside", "ClusterIPNotAllocated"),
                ("outside", "ClusterIPOutOfRange"),
                ("outside", "PortOutOfRange"),
                ("twice", "ClusterIPAlreadyAllocated"),
                ("twice", "PortAlreadyAllocated"),
                ("wrong", "ClusterIPNotAllocated"),
            ]
        );
        assert_eq!(got.delete, ["10.96.0.6", "10.96.0.8"]);
        let created: Vec<&str> = got.create.iter().map(meta::name).collect();
        assert_eq!(created, ["10.96.0.5", "10.96.0.6", "192.0.2.9"]);
        assert!(got.allocator.has_ip(ip("10.96.0.9")) && !got.allocator.has_ip(ip("10.96.0.8")));
    }

    #[test]
    fn a_service_cidr_goes_when_another_one_holds_its_addresses() {
        let now = Timestamp::UNIX_EPOCH;
        let net = |text: &str| text.parse::<IpNet>().expect("a network");
        let deleting = service_cidr(&[net("10.1.0.0/24")], now);
        let mut other = service_cidr(&[net("10.1.0.0/16")], now);
        other["metadata"]["name"] = json!("other");
        let address = ip_address(ip("10.1.0.9"), "ns", "a");
        assert!(deletion_blocked(&deleting, [&deleting], [&address]));
        assert!(!deletion_blocked(&deleting, [&deleting, &other], [&address]));
        assert!(!deletion_blocked(&deleting, [&deleting], []));
        assert_eq!(deleting["metadata"]["finalizers"], json!([SERVICE_CIDR_FINALIZER]));
    }
}
