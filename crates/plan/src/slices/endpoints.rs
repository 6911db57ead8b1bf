//! Compiles a Service and its Pods to the older `Endpoints` object.

use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;
use std::sync::Arc;

use k8s_openapi::api::core::v1::{
    EndpointAddress, EndpointPort, EndpointSubset, Endpoints, ObjectReference, Pod, Service,
};
use k8s_openapi::apimachinery::pkg::apis::meta::v1::ObjectMeta;

use super::{
    HEADLESS, TRIGGER_TIME, families, is_finished, is_headless, is_ready, is_terminating, pod_hostname, pod_ip,
    pod_reference, publishes_not_ready, selects, target_port,
};

/// Label on Endpoints that names their writer.
pub const MANAGED_BY: &str = "endpoints.kubernetes.io/managed-by";
/// Its value for the endpoints controller.
pub const ENDPOINT_CONTROLLER: &str = "endpoint-controller";
/// Annotation of Endpoints that lack addresses.
pub const OVER_CAPACITY: &str = "endpoints.kubernetes.io/over-capacity";
/// Addresses in one Endpoints object at most.
pub const MAX_ADDRESSES: usize = 1000;

/// The Endpoints object that a Service wants, given the one that exists: `None` when nothing needs writing. The result keeps the
/// name, resourceVersion and foreign annotations of `existing`.
pub fn reconcile(
    service: &Service,
    pods: &[Arc<Pod>],
    existing: Option<&Endpoints>,
    trigger_time: Option<&str>,
) -> Option<Endpoints> {
    let mut subsets = subsets(service, pods);
    let truncated = truncate(&mut subsets);
    let mut labels = service.metadata.labels.clone().unwrap_or_default();
    labels.remove(HEADLESS);
    if is_headless(service) {
        labels.insert(HEADLESS.into(), String::new());
    }
    labels.insert(MANAGED_BY.into(), ENDPOINT_CONTROLLER.into());
    let old = existing.and_then(|e| e.metadata.annotations.clone()).unwrap_or_default();
    let mut annotations = old.clone();
    if truncated {
        annotations.insert(OVER_CAPACITY.into(), "truncated".into());
    } else {
        annotations.remove(OVER_CAPACITY);
    }
    if let Some(current) = existing
        && current.metadata.labels.as_ref() == Some(&labels)
        && old == annotations
        && same_subsets(current.subsets.as_deref().unwrap_or_default(), &subsets)
    {
        return None;
    }
    match trigger_time {
        Some(time) => annotations.insert(TRIGGER_TIME.into(), time.into()),
        None => annotations.remove(TRIGGER_TIME),
    };
    let metadata = match existing {
        Some(current) => ObjectMeta { managed_fields: None, ..current.metadata.clone() },
        None => ObjectMeta {
            name: service.metadata.name.clone(),
            namespace: service.metadata.namespace.clone(),
            ..Default::default()
        },
    };
    Some(Endpoints {
        metadata: ObjectMeta {
            labels: Some(labels),
            annotations: Some(annotations).filter(|a| !a.is_empty()),
            ..metadata
        },
        subsets: Some(subsets).filter(|s| !s.is_empty()),
    })
}

fn same_subsets(current: &[EndpointSubset], wanted: &[EndpointSubset]) -> bool {
    let blind = |subset: &EndpointSubset| {
        let mut subset = subset.clone();
        for list in [&mut subset.addresses, &mut subset.not_ready_addresses] {
            for address in list.iter_mut().flatten() {
                if let Some(target) = address.target_ref.as_mut() {
                    target.resource_version = None;
                }
            }
            if list.as_ref().is_some_and(Vec::is_empty) {
                *list = None;
            }
        }
        subset
    };
    current.iter().map(blind).eq(wanted.iter().map(blind))
}

/// A port of a subset, ordered.
#[derive(Clone, PartialEq, Eq, PartialOrd, Ord)]
struct Port {
    name: Option<String>,
    protocol: String,
    port: i32,
    app_protocol: Option<String>,
}

/// One address of the result. Two pods may share an address (host network), so the pod's uid belongs to the identity.
#[derive(Clone, PartialEq, Eq, PartialOrd, Ord)]
struct AddressKey {
    ip: IpAddr,
    uid: Option<String>,
}

struct Address {
    value: EndpointAddress,
    ready: bool,
}

fn subsets(service: &Service, pods: &[Arc<Pod>]) -> Vec<EndpointSubset> {
    let Some(family) = families(service, pods).first().copied() else { return Vec::new() };
    let publish = publishes_not_ready(service);
    let ports = service.spec.as_ref().and_then(|s| s.ports.as_deref()).unwrap_or_default();
    let mut addresses: BTreeMap<AddressKey, Address> = BTreeMap::new();
    let mut by_port: BTreeMap<Option<Port>, BTreeSet<AddressKey>> = BTreeMap::new();
    for pod in pods {
        if !selects(service, pod.metadata.labels.as_ref()) || is_finished(pod) || is_terminating(pod) && !publish {
            continue;
        }
        let Some(ip) = pod_ip(pod, family) else { continue };
        let key = AddressKey { ip, uid: pod.metadata.uid.clone() };
        let value = EndpointAddress {
            ip: ip.to_string(),
            hostname: pod_hostname(pod, service).map(str::to_string),
            node_name: pod.spec.as_ref().and_then(|s| s.node_name.clone()).filter(|n| !n.is_empty()),
            target_ref: Some(ObjectReference { ..pod_reference(pod) }),
        };
        let ready = publish || is_ready(pod);
        let mut place = |port: Option<Port>| {
            by_port.entry(port).or_default().insert(key.clone());
        };
        if ports.is_empty() {
            // Only headless Services may have no ports.
            if is_headless(service) {
                place(None);
            }
        }
        for port in ports {
            if let Some(number) = target_port(port, pod) {
                place(Some(Port {
                    name: port.name.clone().filter(|n| !n.is_empty()),
                    protocol: port.protocol.clone().unwrap_or_else(|| "TCP".into()),
                    port: number,
                    app_protocol: port.app_protocol.clone(),
                }));
            }
        }
        addresses.insert(key, Address { value, ready });
    }
    // Ports with the same addresses share a subset.
    let mut by_addresses: BTreeMap<BTreeSet<AddressKey>, Vec<Port>> = BTreeMap::new();
    for (port, keys) in by_port {
        by_addresses.entry(keys).or_default().extend(port);
    }
    by_addresses
        .into_iter()
        .map(|(keys, ports)| {
            let list = |ready: bool| {
                let list: Vec<EndpointAddress> = keys
                    .iter()
                    .filter_map(|k| addresses.get(k))
                    .filter(|a| a.ready == ready)
                    .map(|a| a.value.clone())
                    .collect();
                Some(list).filter(|l| !l.is_empty())
            };
            let ports: Vec<EndpointPort> = ports
                .into_iter()
                .map(|p| EndpointPort {
                    name: p.name,
                    protocol: Some(p.protocol),
                    port: p.port,
                    app_protocol: p.app_protocol,
                })
                .collect();
            EndpointSubset {
                addresses: list(true),
                not_ready_addresses: list(false),
                ports: Some(ports).filter(|p| !p.is_empty()),
            }
        })
        .collect()
}

/// Cuts to [`MAX_ADDRESSES`], ready ones first, in proportion to the size of the subsets. Says whether anything was cut.
fn truncate(subsets: &mut Vec<EndpointSubset>) -> bool {
    let count = |list: &Option<Vec<EndpointAddress>>| list.as_ref().map_or(0, Vec::len);
    let ready: usize = subsets.iter().map(|s| count(&s.addresses)).sum();
    let unready: usize = subsets.iter().map(|s| count(&s.not_ready_addresses)).sum();
    if ready + unready <= MAX_ADDRESSES {
        return false;
    }
    let ready_quota = ready.min(MAX_ADDRESSES);
    cut(subsets, ready, ready_quota, |s| &mut s.addresses);
    cut(subsets, unready, MAX_ADDRESSES - ready_quota, |s| &mut s.not_ready_addresses);
    subsets.retain(|s| s.addresses.is_some() || s.not_ready_addresses.is_some());
    true
}

fn cut(
    subsets: &mut [EndpointSubset],
    total: usize,
    quota: usize,
    list: impl Fn(&mut EndpointSubset) -> &mut Option<Vec<EndpointAddress>>,
) {
    if total <= quota {
        return;
    }
    let mut left = quota;
    for subset in subsets {
        let slot = list(subset);
        let have = slot.as_ref().map_or(0, Vec::len);
        // Rounded up, so that small subsets keep an address as long as the quota lasts.
        let keep = (have * quota).div_ceil(total).min(left);
        left -= keep;
        if let Some(addresses) = slot.as_mut() {
            addresses.truncate(keep);
        }
        if keep == 0 {
            *slot = None;
        }
    }
}
