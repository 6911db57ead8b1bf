//! Compiles Services and Pods to the EndpointSlices and Endpoints that describe where a Service runs.
//!
//! Input is one Service, the Pods of its namespace, what is known of the Nodes, and the objects that exist now. Output is the
//! writes that lead from those objects to the desired ones, small and in order. Writing them is the business of the `controller`
//! crate. Rules: KEP-752 (EndpointSlice), KEP-1672 (terminating endpoints), KEP-4444 (trafficDistribution), KEP-2433 (topology
//! hints), KEP-4974 (Endpoints deprecation).

pub mod endpoints;
pub mod hints;
pub mod mirror;
pub mod pack;
mod trigger;

use std::collections::BTreeMap;
use std::net::IpAddr;
use std::sync::Arc;

use k8s_openapi::api::core::v1::{Container, Node, ObjectReference, Pod, Service, ServicePort};
use k8s_openapi::api::discovery::v1::{Endpoint, EndpointConditions, EndpointPort, EndpointSlice};
use k8s_openapi::apimachinery::pkg::apis::meta::v1::{ObjectMeta, OwnerReference};
use k8s_openapi::apimachinery::pkg::util::intstr::IntOrString;

pub use trigger::TriggerTimes;

/// Label that ties a slice to its Service.
pub const SERVICE_NAME: &str = "kubernetes.io/service-name";
/// Label that names the writer of a slice.
pub const MANAGED_BY: &str = "endpointslice.kubernetes.io/managed-by";
/// Value of [`MANAGED_BY`] on slices of Services with a selector.
pub const SLICE_CONTROLLER: &str = "endpointslice-controller.k8s.io";
/// Value of [`MANAGED_BY`] on slices mirrored from Endpoints.
pub const MIRROR_CONTROLLER: &str = "endpointslicemirroring-controller.k8s.io";
/// Label on slices and Endpoints of headless Services; proxies ignore such slices.
pub const HEADLESS: &str = "service.kubernetes.io/headless";
/// Annotation with the time of the change that caused a write, for the network programming latency.
pub const TRIGGER_TIME: &str = "endpoints.kubernetes.io/last-change-trigger-time";
/// Node label with the topology zone.
pub const ZONE: &str = "topology.kubernetes.io/zone";
/// Endpoints in one slice at most (`--max-endpoints-per-slice`).
pub const MAX_ENDPOINTS_PER_SLICE: usize = 100;

/// What endpoints need to know of one Node.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct NodeFacts {
    /// Topology zone, if the node has one.
    pub zone: Option<String>,
    /// Whether the node is Ready.
    pub ready: bool,
    /// Allocatable CPU in thousandths of a core.
    pub cpu_milli: u64,
    /// Whether the node is labelled as a control-plane node, which topology hints leave out.
    pub control_plane: bool,
}

impl NodeFacts {
    /// Reads the facts from a Node.
    pub fn of(node: &Node) -> NodeFacts {
        let empty = BTreeMap::new();
        let labels = node.metadata.labels.as_ref().unwrap_or(&empty);
        let status = node.status.as_ref();
        NodeFacts {
            zone: labels.get(ZONE).filter(|z| !z.is_empty()).cloned(),
            ready: status
                .and_then(|s| s.conditions.as_ref())
                .is_some_and(|c| c.iter().any(|c| c.type_ == "Ready" && c.status == "True")),
            cpu_milli: status
                .and_then(|s| s.allocatable.as_ref())
                .and_then(|a| a.get("cpu"))
                .and_then(|q| hints::cpu_milli(&q.0))
                .unwrap_or(0),
            control_plane: labels.contains_key("node-role.kubernetes.io/control-plane")
                || labels.contains_key("node-role.kubernetes.io/master"),
        }
    }
}

/// The nodes by name.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Topology {
    /// Facts by node name.
    pub nodes: BTreeMap<String, NodeFacts>,
}

/// An address family, by the name that the API gives it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Family {
    /// IPv4.
    V4,
    /// IPv6.
    V6,
}

impl Family {
    /// `IPv4` or `IPv6`, as in `addressType` and `ipFamilies`.
    pub fn as_str(self) -> &'static str {
        match self {
            Family::V4 => "IPv4",
            Family::V6 => "IPv6",
        }
    }

    fn parse(text: &str) -> Option<Family> {
        match text {
            "IPv4" => Some(Family::V4),
            "IPv6" => Some(Family::V6),
            _ => None,
        }
    }

    /// The family of an address.
    pub fn of(addr: IpAddr) -> Family {
        if addr.is_ipv4() { Family::V4 } else { Family::V6 }
    }
}

/// Whether the endpoint controllers are responsible for this Service: it has a selector and is not an ExternalName.
pub fn has_selected_endpoints(service: &Service) -> bool {
    selector(service).is_some() && !is_external_name(service)
}

/// The selector, if it selects at all (the API treats an empty selector as none).
pub fn selector(service: &Service) -> Option<&BTreeMap<String, String>> {
    service.spec.as_ref()?.selector.as_ref().filter(|s| !s.is_empty())
}

fn is_external_name(service: &Service) -> bool {
    service.spec.as_ref().and_then(|s| s.type_.as_deref()) == Some("ExternalName")
}

/// Whether the Service selects pods with these labels.
pub fn selects(service: &Service, labels: Option<&BTreeMap<String, String>>) -> bool {
    selector(service).is_some_and(|wanted| wanted.iter().all(|(k, v)| labels.and_then(|l| l.get(k)) == Some(v)))
}

/// Headless: no cluster IP, or none yet.
pub fn is_headless(service: &Service) -> bool {
    let ip = service.spec.as_ref().and_then(|s| s.cluster_ip.as_deref()).unwrap_or_default();
    ip.is_empty() || ip == "None"
}

/// The families a Service has slices for. Objects from before dual stack have no `ipFamilies`: the cluster IP says it then, and a
/// headless one follows its first pod address.
pub fn families(service: &Service, pods: &[Arc<Pod>]) -> Vec<Family> {
    let Some(spec) = service.spec.as_ref() else { return vec![Family::V4] };
    let listed: Vec<Family> = spec.ip_families.iter().flatten().filter_map(|f| Family::parse(f)).collect();
    if !listed.is_empty() {
        return listed;
    }
    if let Some(ip) = spec.cluster_ip.as_deref().and_then(|ip| ip.parse().ok()) {
        return vec![Family::of(ip)];
    }
    let first = pods.iter().find_map(|pod| pod_ips(pod).next());
    vec![first.map_or(Family::V4, Family::of)]
}

fn pod_ips(pod: &Pod) -> impl Iterator<Item = IpAddr> + '_ {
    let status = pod.status.as_ref();
    let all = status.and_then(|s| s.pod_ips.as_deref()).unwrap_or_default();
    let single = status.and_then(|s| s.pod_ip.as_deref()).filter(|_| all.is_empty());
    all.iter().map(|ip| ip.ip.as_str()).chain(single).filter_map(|ip| ip.parse().ok())
}

fn pod_ip(pod: &Pod, family: Family) -> Option<IpAddr> {
    pod_ips(pod).find(|ip| Family::of(*ip) == family)
}

/// Whether the pod has run to its end.
fn is_finished(pod: &Pod) -> bool {
    matches!(pod.status.as_ref().and_then(|s| s.phase.as_deref()), Some("Succeeded" | "Failed"))
}

/// Whether the pod's Ready condition is True.
pub fn is_ready(pod: &Pod) -> bool {
    pod.status
        .as_ref()
        .and_then(|s| s.conditions.as_ref())
        .is_some_and(|c| c.iter().any(|c| c.type_ == "Ready" && c.status == "True"))
}

fn is_terminating(pod: &Pod) -> bool {
    pod.metadata.deletion_timestamp.is_some()
}

/// Whether pods that are not ready count as ready (`publishNotReadyAddresses`, and the annotation that came before it).
fn publishes_not_ready(service: &Service) -> bool {
    service.spec.as_ref().and_then(|s| s.publish_not_ready_addresses).unwrap_or(false)
}

/// The pod's host name for this Service: only when its subdomain is the Service.
fn pod_hostname<'a>(pod: &'a Pod, service: &Service) -> Option<&'a str> {
    let spec = pod.spec.as_ref()?;
    let hostname = spec.hostname.as_deref().filter(|h| !h.is_empty())?;
    (spec.subdomain.is_some() && spec.subdomain == service.metadata.name).then_some(hostname)
}

/// The pod parts that endpoints depend on; a change of anything else need not wake the endpoint controllers.
#[derive(PartialEq)]
pub struct PodFacts<'a> {
    ips: Vec<IpAddr>,
    ready: bool,
    terminating: bool,
    hostname: Option<&'a str>,
    subdomain: Option<&'a str>,
    node: Option<&'a str>,
    labels: Option<&'a BTreeMap<String, String>>,
    uid: Option<&'a str>,
    finished: bool,
}

impl<'a> PodFacts<'a> {
    /// Reads them.
    pub fn of(pod: &'a Pod) -> PodFacts<'a> {
        let spec = pod.spec.as_ref();
        PodFacts {
            ips: pod_ips(pod).collect(),
            ready: is_ready(pod),
            terminating: is_terminating(pod),
            hostname: spec.and_then(|s| s.hostname.as_deref()),
            subdomain: spec.and_then(|s| s.subdomain.as_deref()),
            node: spec.and_then(|s| s.node_name.as_deref()),
            labels: pod.metadata.labels.as_ref(),
            uid: pod.metadata.uid.as_deref(),
            finished: is_finished(pod),
        }
    }
}

/// Resolves a Service port in one pod: a number is itself; a name is looked up among the containers, then among sidecars, with
/// the same protocol. `None` when the pod has no such port.
pub fn target_port(port: &ServicePort, pod: &Pod) -> Option<i32> {
    let protocol = port.protocol.as_deref().unwrap_or("TCP");
    let name = match &port.target_port {
        None => return Some(port.port),
        Some(IntOrString::Int(0)) => return Some(port.port),
        Some(IntOrString::Int(number)) => return Some(*number),
        Some(IntOrString::String(name)) if name.is_empty() => return Some(port.port),
        Some(IntOrString::String(name)) => name,
    };
    let spec = pod.spec.as_ref()?;
    let sidecars = spec.init_containers.iter().flatten().filter(|c| c.restart_policy.as_deref() == Some("Always"));
    spec.containers.iter().chain(sidecars).flat_map(|c: &Container| c.ports.iter().flatten()).find_map(|p| {
        let same = p.name.as_deref() == Some(name.as_str()) && p.protocol.as_deref().unwrap_or("TCP") == protocol;
        same.then_some(p.container_port)
    })
}

/// A port of a slice, ordered so that sets of ports compare.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct PortKey {
    name: String,
    protocol: String,
    port: Option<i32>,
    app_protocol: Option<String>,
}

impl PortKey {
    fn of(port: &EndpointPort) -> PortKey {
        PortKey {
            name: port.name.clone().unwrap_or_default(),
            protocol: port.protocol.clone().unwrap_or_else(|| "TCP".into()),
            port: port.port,
            app_protocol: port.app_protocol.clone(),
        }
    }

    fn endpoint_port(&self) -> EndpointPort {
        EndpointPort {
            name: Some(self.name.clone()),
            protocol: Some(self.protocol.clone()),
            port: self.port,
            app_protocol: self.app_protocol.clone(),
        }
    }
}

/// A set of ports, in order: what makes two endpoints share a slice.
pub type PortSet = Vec<PortKey>;

fn port_set(ports: impl IntoIterator<Item = PortKey>) -> PortSet {
    let mut set: PortSet = ports.into_iter().collect();
    set.sort();
    set.dedup();
    set
}

fn slice_port_set(slice: &EndpointSlice) -> PortSet {
    port_set(slice.ports.iter().flatten().map(PortKey::of))
}

fn pod_port_set(service: &Service, pod: &Pod) -> PortSet {
    let ports = service.spec.as_ref().and_then(|s| s.ports.as_deref()).unwrap_or_default();
    port_set(ports.iter().filter_map(|port| {
        Some(PortKey {
            name: port.name.clone().unwrap_or_default(),
            protocol: port.protocol.clone().unwrap_or_else(|| "TCP".into()),
            port: Some(target_port(port, pod)?),
            app_protocol: port.app_protocol.clone(),
        })
    }))
}

fn pod_reference(pod: &Pod) -> ObjectReference {
    ObjectReference {
        kind: Some("Pod".into()),
        namespace: pod.metadata.namespace.clone(),
        name: pod.metadata.name.clone(),
        uid: pod.metadata.uid.clone(),
        ..Default::default()
    }
}

/// Why a pod is left out for now.
enum Omitted {
    NoAddress,
    UnknownNode(String),
}

fn endpoint(service: &Service, pod: &Pod, family: Family, topology: &Topology) -> Result<Endpoint, Omitted> {
    let address = pod_ip(pod, family).ok_or(Omitted::NoAddress)?;
    let publish = publishes_not_ready(service);
    let node_name = pod.spec.as_ref().and_then(|s| s.node_name.clone()).filter(|n| !n.is_empty());
    let facts = node_name.as_ref().and_then(|n| topology.nodes.get(n));
    if facts.is_none() && !publish {
        return Err(Omitted::UnknownNode(node_name.unwrap_or_default()));
    }
    let serving = is_ready(pod);
    let terminating = is_terminating(pod);
    Ok(Endpoint {
        addresses: vec![address.to_string()],
        conditions: Some(EndpointConditions {
            ready: Some(publish || serving && !terminating),
            serving: Some(serving),
            terminating: Some(terminating),
        }),
        hostname: pod_hostname(pod, service).map(str::to_string),
        zone: facts.and_then(|f| f.zone.clone()),
        node_name,
        target_ref: Some(pod_reference(pod)),
        ..Default::default()
    })
}

/// What [`reconcile`] reads.
#[derive(Debug)]
pub struct Input<'a> {
    /// The Service, with a selector and not of type ExternalName.
    pub service: &'a Service,
    /// Pods of the namespace; those that the selector does not match are ignored.
    pub pods: &'a [Arc<Pod>],
    /// The nodes.
    pub topology: &'a Topology,
    /// Slices of this Service that carry [`SLICE_CONTROLLER`].
    pub existing: &'a [Arc<EndpointSlice>],
    /// The change that caused this sync (section "trigger time"), as RFC 3339 text.
    pub trigger_time: Option<String>,
    /// Endpoints in a slice at most.
    pub max_per_slice: usize,
    /// Families that had topology hints in the last sync, so that becoming enabled is told once.
    pub hinted: &'a [Family],
}

/// Writes that make the existing slices the desired ones. To be done in this order: create, update, delete.
#[derive(Debug, Default)]
pub struct Changes {
    /// New slices, with `generateName`.
    pub create: Vec<EndpointSlice>,
    /// Whole objects with the resourceVersion that they replace.
    pub update: Vec<EndpointSlice>,
    /// Slices to delete.
    pub delete: Vec<Arc<EndpointSlice>>,
    /// Pods left out because their node is unknown: (pod, node). The sync has to be repeated.
    pub waiting: Vec<(String, String)>,
    /// Families that have topology hints now.
    pub hinted: Vec<Family>,
    /// Events about the Service: (warning, reason, message).
    pub events: Vec<(bool, &'static str, String)>,
}

impl Changes {
    /// Nothing to write.
    pub fn is_empty(&self) -> bool {
        self.create.is_empty() && self.update.is_empty() && self.delete.is_empty()
    }
}

/// Decides the writes for one Service. Cost: the pods of the namespace plus the slices of the Service.
pub fn reconcile(input: &Input<'_>) -> Changes {
    let mut changes = Changes::default();
    let service = input.service;
    let families = families(service, input.pods);
    // Slices of an earlier Service of the same name, and of families that the Service has left.
    let (ours, foreign): (Vec<_>, Vec<_>) = input.existing.iter().cloned().partition(|slice| {
        let owned =
            slice.metadata.owner_references.iter().flatten().any(|o| Some(&o.uid) == service.metadata.uid.as_ref());
        owned && families.iter().any(|f| f.as_str() == slice.address_type)
    });
    changes.delete.extend(foreign);
    let selected: Vec<&Arc<Pod>> =
        input.pods.iter().filter(|p| selects(service, p.metadata.labels.as_ref()) && !is_finished(p)).collect();
    for family in families {
        let mut groups: BTreeMap<PortSet, Vec<Endpoint>> = BTreeMap::new();
        for pod in &selected {
            match endpoint(service, pod, family, input.topology) {
                Ok(endpoint) => groups.entry(pod_port_set(service, pod)).or_default().push(endpoint),
                Err(Omitted::NoAddress) => {}
                Err(Omitted::UnknownNode(node)) => {
                    changes.waiting.push((pod.metadata.name.clone().unwrap_or_default(), node));
                }
            }
        }
        let outcome = hints::assign(service, family, &mut groups, input.topology, input.hinted.contains(&family));
        changes.events.extend(outcome.event);
        if outcome.proportional {
            changes.hinted.push(family);
        }
        let existing: Vec<Arc<EndpointSlice>> =
            ours.iter().filter(|s| s.address_type == family.as_str()).cloned().collect();
        let shape = Shape { service, family, trigger_time: input.trigger_time.as_deref() };
        pack::pack(&shape, groups, existing, input.max_per_slice, true, &mut changes);
    }
    if service.metadata.deletion_timestamp.is_some() {
        changes.create.clear();
    }
    changes.waiting.sort();
    changes.waiting.dedup();
    changes
}

/// How the slices of one owner and family look, apart from endpoints and ports.
pub(crate) struct Shape<'a> {
    service: &'a Service,
    family: Family,
    trigger_time: Option<&'a str>,
}

/// Longest name of an object that is a DNS subdomain.
const MAX_NAME: usize = 253;

/// `generateName` for slices: the name and a dash, without the dash where it would make the prefix too long. The API server cuts it
/// to leave room for the suffix.
pub(crate) fn generate_name(name: &str) -> String {
    if name.len() < MAX_NAME { format!("{name}-") } else { name.to_string() }
}

impl pack::Template for Shape<'_> {
    fn labels(&self) -> BTreeMap<String, String> {
        let mut labels = self.service.metadata.labels.clone().unwrap_or_default();
        for reserved in [SERVICE_NAME, MANAGED_BY, HEADLESS] {
            labels.remove(reserved);
        }
        labels.insert(SERVICE_NAME.into(), self.service.metadata.name.clone().unwrap_or_default());
        labels.insert(MANAGED_BY.into(), SLICE_CONTROLLER.into());
        if is_headless(self.service) {
            labels.insert(HEADLESS.into(), String::new());
        }
        labels
    }

    fn annotate(&self, annotations: &mut BTreeMap<String, String>) {
        match self.trigger_time {
            Some(time) => {
                annotations.insert(TRIGGER_TIME.into(), time.into());
            }
            None => {
                annotations.remove(TRIGGER_TIME);
            }
        }
    }

    fn annotations_differ(&self, _: Option<&BTreeMap<String, String>>) -> bool {
        // The trigger time is a remark on a write, never its cause.
        false
    }

    fn family(&self) -> Family {
        self.family
    }

    fn metadata(&self) -> ObjectMeta {
        let meta = &self.service.metadata;
        ObjectMeta {
            generate_name: Some(generate_name(meta.name.as_deref().unwrap_or_default())),
            namespace: meta.namespace.clone(),
            owner_references: Some(vec![OwnerReference {
                api_version: "v1".into(),
                kind: "Service".into(),
                name: meta.name.clone().unwrap_or_default(),
                uid: meta.uid.clone().unwrap_or_default(),
                controller: Some(true),
                block_owner_deletion: Some(true),
            }]),
            ..Default::default()
        }
    }
}

#[cfg(test)]
mod tests;
