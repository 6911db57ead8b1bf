//! Mirrors Endpoints that a person wrote for a Service without selector into EndpointSlices (KEP-752, "EndpointSliceMirroring").

use std::collections::BTreeMap;
use std::net::IpAddr;
use std::sync::Arc;

use k8s_openapi::api::core::v1::{EndpointAddress, EndpointSubset, Endpoints, Service};
use k8s_openapi::api::discovery::v1::{Endpoint, EndpointConditions, EndpointSlice};
use k8s_openapi::apimachinery::pkg::apis::meta::v1::{ObjectMeta, OwnerReference};

use super::{
    Changes, Family, MANAGED_BY, MIRROR_CONTROLLER, PortKey, PortSet, SERVICE_NAME, TRIGGER_TIME, pack, port_set,
    slice_port_set,
};

/// Label on Endpoints that must not be mirrored.
pub const SKIP_MIRROR: &str = "endpointslice.kubernetes.io/skip-mirror";
/// Annotation on Endpoints that are a leader election lock.
pub const LEADER: &str = "control-plane.alpha.kubernetes.io/leader";
/// Addresses of one subset that are mirrored at most, and endpoints of one mirrored slice: what the API takes. So a subset
/// becomes one slice a family.
pub const MAX_PER_SUBSET: usize = 1000;
const LAST_APPLIED: &str = "kubectl.kubernetes.io/last-applied-configuration";

/// Whether these Endpoints are to be mirrored, given the Service of the same name.
pub fn wanted(endpoints: &Endpoints, service: Option<&Service>) -> bool {
    let labels = endpoints.metadata.labels.as_ref();
    let annotations = endpoints.metadata.annotations.as_ref();
    service.is_some_and(|s| super::selector(s).is_none())
        && endpoints.metadata.deletion_timestamp.is_none()
        && labels.and_then(|l| l.get(SKIP_MIRROR)).is_none_or(|v| v != "true")
        && annotations.is_none_or(|a| !a.contains_key(LEADER))
}

/// Decides the writes that make `existing` (slices of this Service that carry [`MIRROR_CONTROLLER`]) mirror the Endpoints.
pub fn reconcile(endpoints: &Endpoints, existing: &[Arc<EndpointSlice>]) -> Changes {
    let mut changes = Changes::default();
    let mut groups: BTreeMap<Family, BTreeMap<PortSet, BTreeMap<String, Endpoint>>> = BTreeMap::new();
    let mut invalid = 0;
    let mut skipped = 0;
    for subset in endpoints.subsets.iter().flatten() {
        let ports = subset_ports(subset);
        let ready = subset.addresses.iter().flatten().map(|a| (a, true));
        let unready = subset.not_ready_addresses.iter().flatten().map(|a| (a, false));
        let mut taken = 0;
        for (address, ready) in ready.chain(unready) {
            if taken == MAX_PER_SUBSET {
                skipped += 1;
                continue;
            }
            let Ok(ip) = address.ip.parse::<IpAddr>() else {
                invalid += 1;
                continue;
            };
            taken += 1;
            let endpoint = mirrored(address, ip, ready);
            let key = format!(
                "{ip} {:?} {:?}",
                endpoint.hostname,
                endpoint.target_ref.as_ref().map(|t| (&t.namespace, &t.name))
            );
            // An address that is not ready anywhere is not ready.
            let members = groups.entry(Family::of(ip)).or_default().entry(ports.clone()).or_default();
            match members.get_mut(&key) {
                Some(_) if ready => {}
                Some(known) => *known = endpoint,
                None => {
                    members.insert(key, endpoint);
                }
            }
        }
    }
    if invalid > 0 {
        let message = format!("Skipped {invalid} invalid IP addresses when mirroring to EndpointSlices");
        changes.events.push((true, "InvalidIPAddress", message));
    }
    if skipped > 0 {
        let skipped = skipped + invalid;
        let message = format!(
            "A max of {MAX_PER_SUBSET} addresses can be mirrored to EndpointSlices per Endpoints subset. {skipped} addresses were skipped"
        );
        changes.events.push((true, "TooManyAddressesToMirror", message));
    }
    let uid = endpoints.metadata.uid.as_deref();
    let (ours, foreign): (Vec<_>, Vec<_>) = existing
        .iter()
        .cloned()
        .partition(|s| s.metadata.owner_references.iter().flatten().any(|o| Some(o.uid.as_str()) == uid));
    changes.delete.extend(foreign);
    for family in [Family::V4, Family::V6] {
        let wanted = groups.remove(&family).unwrap_or_default();
        let wanted: BTreeMap<PortSet, Vec<Endpoint>> =
            wanted.into_iter().map(|(ports, members)| (ports, members.into_values().collect())).collect();
        let mut slices: Vec<_> = ours.iter().filter(|s| s.address_type == family.as_str()).cloned().collect();
        // No more slices than are needed: the first ones take what the others have had.
        slices.sort_by(|a, b| a.metadata.name.cmp(&b.metadata.name));
        let mut kept: BTreeMap<PortSet, usize> = BTreeMap::new();
        slices.retain(|slice| {
            let ports = slice_port_set(slice);
            let needed = wanted.get(&ports).map_or(1, |members| members.len().div_ceil(MAX_PER_SUBSET));
            let have = kept.entry(ports).or_default();
            *have += 1;
            if *have > needed && slice.metadata.deletion_timestamp.is_none() {
                changes.delete.push(slice.clone());
            }
            *have <= needed
        });
        pack::pack(&Shape { endpoints, family }, wanted, slices, MAX_PER_SUBSET, false, &mut changes);
    }
    changes
}

fn subset_ports(subset: &EndpointSubset) -> PortSet {
    port_set(subset.ports.iter().flatten().map(|port| PortKey {
        name: port.name.clone().unwrap_or_default(),
        protocol: port.protocol.clone().unwrap_or_else(|| "TCP".into()),
        port: Some(port.port),
        app_protocol: port.app_protocol.clone(),
    }))
}

fn mirrored(address: &EndpointAddress, ip: IpAddr, ready: bool) -> Endpoint {
    Endpoint {
        addresses: vec![ip.to_string()],
        conditions: Some(EndpointConditions { ready: Some(ready), serving: None, terminating: None }),
        hostname: address.hostname.clone().filter(|h| !h.is_empty()),
        node_name: address.node_name.clone(),
        target_ref: address.target_ref.clone(),
        ..Default::default()
    }
}

struct Shape<'a> {
    endpoints: &'a Endpoints,
    family: Family,
}

impl Shape<'_> {
    fn annotations(&self) -> BTreeMap<String, String> {
        let mut annotations = self.endpoints.metadata.annotations.clone().unwrap_or_default();
        annotations.remove(TRIGGER_TIME);
        annotations.remove(LAST_APPLIED);
        annotations
    }
}

impl pack::Template for Shape<'_> {
    fn labels(&self) -> BTreeMap<String, String> {
        let mut labels = self.endpoints.metadata.labels.clone().unwrap_or_default();
        labels.insert(SERVICE_NAME.into(), self.endpoints.metadata.name.clone().unwrap_or_default());
        labels.insert(MANAGED_BY.into(), MIRROR_CONTROLLER.into());
        labels
    }

    fn annotate(&self, annotations: &mut BTreeMap<String, String>) {
        *annotations = self.annotations();
    }

    fn annotations_differ(&self, current: Option<&BTreeMap<String, String>>) -> bool {
        let wanted = self.annotations();
        current.map_or(!wanted.is_empty(), |current| *current != wanted)
    }

    fn family(&self) -> Family {
        self.family
    }

    fn metadata(&self) -> ObjectMeta {
        let meta = &self.endpoints.metadata;
        ObjectMeta {
            generate_name: Some(super::generate_name(meta.name.as_deref().unwrap_or_default())),
            namespace: meta.namespace.clone(),
            owner_references: Some(vec![OwnerReference {
                api_version: "v1".into(),
                kind: "Endpoints".into(),
                name: meta.name.clone().unwrap_or_default(),
                uid: meta.uid.clone().unwrap_or_default(),
                controller: Some(true),
                block_owner_deletion: Some(true),
            }]),
            ..Default::default()
        }
    }
}
