//! Distributes endpoints over slices so that a change touches few of them.
//!
//! Endpoints stay in the slice they are in. New ones go to slices that are written anyway, fullest first; what is left goes to one
//! untouched slice when it can take all, else to new slices. Slices are never merged because they are sparse: every write is
//! sent to all nodes, so writing less is worth more than packing tightly (KEP-752).

use std::collections::BTreeMap;
use std::sync::Arc;

use k8s_openapi::api::discovery::v1::{Endpoint, EndpointSlice};
use k8s_openapi::apimachinery::pkg::apis::meta::v1::ObjectMeta;

use super::{Changes, Family, PortSet, slice_port_set};

/// What slices of one owner have in common.
pub(crate) trait Template {
    /// Labels of every slice.
    fn labels(&self) -> BTreeMap<String, String>;
    /// Changes the annotations of a slice that is about to be written.
    fn annotate(&self, annotations: &mut BTreeMap<String, String>);
    /// Whether annotations alone are a reason to write.
    fn annotations_differ(&self, current: Option<&BTreeMap<String, String>>) -> bool;
    /// Address family.
    fn family(&self) -> Family;
    /// Name or name prefix, namespace and owner of a new slice.
    fn metadata(&self) -> ObjectMeta;
}

/// What makes an endpoint the same one: address, host name and the object behind it, but not that object's uid, so that a
/// StatefulSet's pod that comes back is an update in place.
#[derive(PartialEq, Eq, PartialOrd, Ord)]
struct Identity {
    addresses: Vec<String>,
    hostname: Option<String>,
    target: Option<(Option<String>, Option<String>)>,
}

impl Identity {
    fn of(endpoint: &Endpoint) -> Identity {
        Identity {
            addresses: endpoint.addresses.clone(),
            hostname: endpoint.hostname.clone(),
            target: endpoint.target_ref.as_ref().map(|t| (t.namespace.clone(), t.name.clone())),
        }
    }
}

/// Equality that forgives what does not matter to a reader.
fn same(left: &Endpoint, right: &Endpoint) -> bool {
    let blind = |endpoint: &Endpoint| {
        let mut endpoint = endpoint.clone();
        endpoint.deprecated_topology = None;
        if let Some(target) = endpoint.target_ref.as_mut() {
            target.resource_version = None;
        }
        endpoint
    };
    blind(left) == blind(right)
}

struct Draft {
    current: Arc<EndpointSlice>,
    endpoints: Vec<Endpoint>,
}

/// Plans one family of one owner. `groups` are the desired endpoints by port set; `placeholder` keeps one empty slice when there
/// are none.
pub(crate) fn pack(
    template: &impl Template,
    groups: BTreeMap<PortSet, Vec<Endpoint>>,
    existing: Vec<Arc<EndpointSlice>>,
    max: usize,
    placeholder: bool,
    changes: &mut Changes,
) {
    let mut by_ports: BTreeMap<PortSet, Vec<Arc<EndpointSlice>>> = BTreeMap::new();
    let total = existing.len();
    for slice in existing {
        by_ports.entry(slice_port_set(&slice)).or_default().push(slice);
    }
    let mut create = Vec::new();
    let mut update = Vec::new();
    let mut delete = Vec::new();
    for (ports, endpoints) in groups {
        let slices = by_ports.remove(&ports).unwrap_or_default();
        group(template, &ports, endpoints, slices, max, &mut create, &mut update, &mut delete);
    }
    delete.extend(by_ports.into_values().flatten());
    if placeholder && delete.len() == total && create.is_empty() {
        match delete.as_slice() {
            [only] if is_placeholder(template, only) => delete.clear(),
            _ => create.push(new_slice(template, &Vec::new(), Vec::new())),
        }
    }
    // A slice that would be deleted takes the contents of one that would be created: one write instead of two, and readers
    // never see a moment without the endpoints.
    while let (Some(_), Some(_)) = (create.last(), delete.last()) {
        let Some(at) = delete.iter().rposition(|s| s.metadata.deletion_timestamp.is_none()) else { break };
        let Some(new) = create.pop() else { break };
        let old = delete.remove(at);
        update.push(recycle(template, &old, new));
    }
    delete.retain(|s| s.metadata.deletion_timestamp.is_none());
    changes.create.extend(create);
    changes.update.extend(update);
    changes.delete.extend(delete);
}

#[allow(clippy::too_many_arguments)]
fn group(
    template: &impl Template,
    ports: &PortSet,
    endpoints: Vec<Endpoint>,
    mut slices: Vec<Arc<EndpointSlice>>,
    max: usize,
    create: &mut Vec<EndpointSlice>,
    update: &mut Vec<EndpointSlice>,
    delete: &mut Vec<Arc<EndpointSlice>>,
) {
    slices.sort_by(|a, b| a.metadata.name.cmp(&b.metadata.name));
    let mut wanted: BTreeMap<Identity, Endpoint> = endpoints.into_iter().map(|e| (Identity::of(&e), e)).collect();
    let labels = template.labels();
    let mut changed: Vec<Draft> = Vec::new();
    let mut unchanged: Vec<Draft> = Vec::new();
    for current in slices {
        let old = current.endpoints.as_deref().unwrap_or_default();
        let mut differs = current.metadata.labels.as_ref() != Some(&labels)
            || template.annotations_differ(current.metadata.annotations.as_ref());
        let mut kept = Vec::with_capacity(old.len());
        for endpoint in old {
            match wanted.remove(&Identity::of(endpoint)) {
                Some(new) => {
                    differs |= !same(&new, endpoint);
                    kept.push(new);
                }
                None => differs = true,
            }
        }
        if kept.is_empty() {
            delete.push(current);
        } else if kept.len() > max {
            // The limit was lowered: what is over it is placed like new endpoints.
            for extra in kept.split_off(max) {
                wanted.insert(Identity::of(&extra), extra);
            }
            changed.push(Draft { current, endpoints: kept });
        } else if differs {
            changed.push(Draft { current, endpoints: kept });
        } else {
            unchanged.push(Draft { current, endpoints: kept });
        }
    }
    let mut rest: Vec<Endpoint> = wanted.into_values().collect();
    rest.reverse();
    changed.sort_by_key(|d| std::cmp::Reverse(d.endpoints.len()));
    for draft in &mut changed {
        fill(&mut draft.endpoints, &mut rest, max);
    }
    if !rest.is_empty()
        && rest.len() < max
        && let Some(at) = unchanged
            .iter()
            .enumerate()
            .filter(|(_, d)| d.endpoints.len() + rest.len() <= max)
            .max_by_key(|(_, d)| d.endpoints.len())
            .map(|(at, _)| at)
    {
        let mut draft = unchanged.swap_remove(at);
        fill(&mut draft.endpoints, &mut rest, max);
        changed.push(draft);
    }
    while !rest.is_empty() {
        let mut endpoints = Vec::new();
        fill(&mut endpoints, &mut rest, max);
        create.push(new_slice(template, ports, endpoints));
    }
    update.extend(changed.into_iter().map(|draft| {
        let mut slice = EndpointSlice::clone(&draft.current);
        slice.endpoints = Some(draft.endpoints);
        refresh(template, &mut slice);
        slice
    }));
}

/// Moves endpoints from the end of `rest` until `endpoints` has `max`.
fn fill(endpoints: &mut Vec<Endpoint>, rest: &mut Vec<Endpoint>, max: usize) {
    while endpoints.len() < max
        && let Some(next) = rest.pop()
    {
        endpoints.push(next);
    }
}

fn new_slice(template: &impl Template, ports: &PortSet, endpoints: Vec<Endpoint>) -> EndpointSlice {
    let mut slice = EndpointSlice {
        metadata: template.metadata(),
        address_type: template.family().as_str().into(),
        endpoints: Some(endpoints),
        ports: Some(ports.iter().map(super::PortKey::endpoint_port).collect()),
    };
    refresh(template, &mut slice);
    slice
}

/// Sets labels and annotations of a slice about to be written.
fn refresh(template: &impl Template, slice: &mut EndpointSlice) {
    slice.metadata.labels = Some(template.labels());
    let mut annotations = slice.metadata.annotations.take().unwrap_or_default();
    template.annotate(&mut annotations);
    slice.metadata.annotations = Some(annotations).filter(|a| !a.is_empty());
}

fn recycle(template: &impl Template, old: &EndpointSlice, new: EndpointSlice) -> EndpointSlice {
    let mut slice = old.clone();
    slice.endpoints = new.endpoints;
    slice.ports = new.ports;
    slice.metadata.owner_references = new.metadata.owner_references;
    refresh(template, &mut slice);
    slice
}

fn is_placeholder(template: &impl Template, slice: &EndpointSlice) -> bool {
    let empty = slice.endpoints.as_ref().is_none_or(Vec::is_empty) && slice.ports.as_ref().is_none_or(Vec::is_empty);
    empty
        && slice.metadata.labels.as_ref() == Some(&template.labels())
        && !template.annotations_differ(slice.metadata.annotations.as_ref())
        && slice.metadata.deletion_timestamp.is_none()
}
