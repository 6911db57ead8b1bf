//! The view of the cluster that the Service compiler reads: trimmed Services, EndpointSlices and service ranges.
//!
//! Objects are parsed here, once, when a watch delivers them: addresses, ports and policies become types, and what cannot be
//! used becomes a [`Finding`] that stays with the object. A test fills a [`World`] by hand or from YAML; nothing here does I/O.

use std::collections::{BTreeMap, BTreeSet, HashSet};
use std::net::IpAddr;
use std::num::NonZeroU16;
use std::sync::Arc;
use std::time::Duration;

use ipnet::IpNet;
use k8s_openapi::api::core::v1::{Pod, Service};
use k8s_openapi::api::discovery::v1::EndpointSlice;
use k8s_openapi::apimachinery::pkg::apis::meta::v1::ObjectMeta;
use serde::{Deserialize, Serialize};

use crate::finding::{Finding, Severity};
use crate::origin::Origin;

/// Label of an EndpointSlice that names its Service (discovery.k8s.io/v1).
pub const SERVICE_NAME_LABEL: &str = "kubernetes.io/service-name";
/// Label that hands a Service to another proxy.
pub const PROXY_NAME_LABEL: &str = "service.kubernetes.io/service-proxy-name";
/// Label of slices and Services that need no proxy.
pub const HEADLESS_LABEL: &str = "service.kubernetes.io/headless";

/// An address family; both are programmed independently of each other.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub enum IpFamily {
    /// IPv4.
    V4,
    /// IPv6.
    V6,
}

impl IpFamily {
    /// Both families, in the order in which they are programmed.
    pub const ALL: [IpFamily; 2] = [IpFamily::V4, IpFamily::V6];

    /// The family of an address.
    pub fn of(addr: &IpAddr) -> IpFamily {
        match addr {
            IpAddr::V4(_) => IpFamily::V4,
            IpAddr::V6(_) => IpFamily::V6,
        }
    }

    /// The family of a network.
    pub fn of_net(net: &IpNet) -> IpFamily {
        match net {
            IpNet::V4(_) => IpFamily::V4,
            IpNet::V6(_) => IpFamily::V6,
        }
    }

    /// The name that Kubernetes objects and kube-proxy's metrics use: `IPv4` or `IPv6`.
    pub fn as_str(self) -> &'static str {
        match self {
            IpFamily::V4 => "IPv4",
            IpFamily::V6 => "IPv6",
        }
    }
}

/// A transport protocol that Services know.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub enum L4 {
    /// TCP.
    Tcp,
    /// UDP.
    Udp,
    /// SCTP.
    Sctp,
}

impl L4 {
    /// Parses `TCP`, `UDP` or `SCTP`; an absent protocol is TCP.
    pub fn parse(text: Option<&str>) -> Option<L4> {
        match text {
            None | Some("" | "TCP") => Some(L4::Tcp),
            Some("UDP") => Some(L4::Udp),
            Some("SCTP") => Some(L4::Sctp),
            Some(_) => None,
        }
    }

    /// The protocol's number in the IP header.
    pub fn number(self) -> u8 {
        match self {
            L4::Tcp => 6,
            L4::Udp => 17,
            L4::Sctp => 132,
        }
    }

    /// The name that Kubernetes objects use.
    pub fn as_str(self) -> &'static str {
        match self {
            L4::Tcp => "TCP",
            L4::Udp => "UDP",
            L4::Sctp => "SCTP",
        }
    }
}

/// Namespace and name of an object.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub struct ObjectKey {
    /// Namespace.
    pub namespace: String,
    /// Name.
    pub name: String,
}

impl ObjectKey {
    /// Makes a key.
    pub fn new(namespace: impl Into<String>, name: impl Into<String>) -> ObjectKey {
        ObjectKey { namespace: namespace.into(), name: name.into() }
    }
}

impl std::fmt::Display for ObjectKey {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{}/{}", self.namespace, self.name)
    }
}

/// Whether a policy keeps traffic on the node (`Local`) or not (`Cluster`).
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub enum TrafficPolicy {
    /// Endpoints of all nodes.
    #[default]
    Cluster,
    /// Only endpoints of the node that decides.
    Local,
}

impl TrafficPolicy {
    fn parse(text: Option<&str>) -> TrafficPolicy {
        if text == Some("Local") { TrafficPolicy::Local } else { TrafficPolicy::Cluster }
    }
}

/// Session affinity of a Service port.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub enum Affinity {
    /// Every new flow is spread.
    #[default]
    None,
    /// New flows of one client address go to one endpoint until `timeout` after its last new flow.
    ClientIp {
        /// Sliding timeout.
        timeout: Duration,
    },
}

/// What the proxy needs of one Service.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct ServiceSpec {
    /// The Service.
    pub origin: Arc<Origin>,
    /// Creation time in seconds since the epoch; the older Service wins a contested address.
    pub created: i64,
    /// Cluster IPs, at most one per family.
    pub cluster_ips: Box<[IpAddr]>,
    /// External IPs.
    pub external_ips: Box<[IpAddr]>,
    /// Load-balancer addresses that nodes answer themselves (`ipMode: VIP`).
    pub vips: Box<[IpAddr]>,
    /// `loadBalancerSourceRanges`, parsed; empty means unrestricted.
    pub source_ranges: Box<[IpNet]>,
    /// Ports.
    pub ports: Box<[ServicePort]>,
    /// Session affinity.
    pub affinity: Affinity,
    /// For ClusterIPs.
    pub internal_policy: TrafficPolicy,
    /// For node ports, external IPs and load-balancer addresses.
    pub external_policy: TrafficPolicy,
    /// Port of the per-Service health check, when the Service has one (LoadBalancer with `Local`).
    pub health_check: Option<NonZeroU16>,
    /// Parts that have no effect.
    pub findings: Box<[Finding]>,
}

/// One port of a Service.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
pub struct ServicePort {
    /// Name; empty for the single unnamed port.
    pub name: Arc<str>,
    /// Protocol.
    pub protocol: L4,
    /// Port on the cluster IP, external IPs and load-balancer addresses.
    pub port: NonZeroU16,
    /// Port on the nodes.
    pub node_port: Option<NonZeroU16>,
}

/// What the proxy needs of one EndpointSlice.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Slice {
    /// The Service named by the label.
    pub service: Arc<ObjectKey>,
    /// Family of the addresses; `None` for a slice whose addresses no proxy can use, which then has no endpoints.
    pub family: Option<IpFamily>,
    /// Ports with a number.
    pub ports: Box<[SlicePort]>,
    /// Endpoints, one per address.
    pub endpoints: Box<[SliceEndpoint]>,
    /// Parts that have no effect.
    pub findings: Box<[Finding]>,
}

/// A port of an EndpointSlice.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
pub struct SlicePort {
    /// Name, joined with the Service port's name.
    pub name: Arc<str>,
    /// Protocol.
    pub protocol: L4,
    /// Where the endpoint listens.
    pub port: NonZeroU16,
}

/// An endpoint of an EndpointSlice.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct SliceEndpoint {
    /// Address.
    pub addr: IpAddr,
    /// Conditions, defaults filled in.
    pub conditions: Conditions,
    /// Node that the endpoint runs on.
    pub node: Option<Arc<str>>,
    /// Who should use it; `None` without a hint.
    pub hints: Option<Arc<Hints>>,
}

/// Who should use an endpoint (KEP-2433, KEP-3015).
#[derive(Clone, Debug, Default, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct Hints {
    /// Zones that should use it; empty without a hint.
    pub for_zones: Box<[Arc<str>]>,
    /// Nodes that should use it; empty without a hint.
    pub for_nodes: Box<[Arc<str>]>,
}

/// A pod of this node that has ports on the node.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct HostPortPod {
    /// The pod.
    pub origin: Origin,
    /// Creation time in seconds since the epoch; the older pod keeps a contested port.
    pub created: i64,
    /// The pod's addresses, at most one per family.
    pub addresses: Vec<IpAddr>,
    /// The ports.
    pub ports: Vec<HostPort>,
    /// Parts that have no effect.
    pub findings: Vec<Finding>,
}

/// One `hostPort` of a container.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
pub struct HostPort {
    /// Where it is written, as in `spec.containers[0].ports[1]`.
    pub field: String,
    /// `hostIP`; `None` for all addresses of the node.
    pub host_ip: Option<IpAddr>,
    /// Protocol.
    pub protocol: L4,
    /// Port on the node.
    pub host_port: NonZeroU16,
    /// Port of the container.
    pub container_port: NonZeroU16,
}

/// Conditions of an endpoint. Absent ones count as: ready true, serving true, terminating false (services.md 3.2).
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub struct Conditions {
    /// Gets traffic.
    pub ready: bool,
    /// Would be ready, were it not terminating.
    pub serving: bool,
    /// Being deleted.
    pub terminating: bool,
}

/// How a packet is recognised as coming from a pod of this node.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub enum LocalDetection {
    /// It cannot be: pods are treated like any other source.
    #[default]
    Off,
    /// By the start of the name of the interface that it came in on.
    InterfacePrefix(String),
    /// By its source address.
    Networks(Vec<IpNet>),
}

/// The node for which Services are compiled.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct NodeView {
    /// Name, as in `Endpoint.nodeName`.
    pub name: String,
    /// Topology zone, when known.
    pub zone: Option<String>,
    /// Addresses that carry node ports.
    pub node_port_addresses: Vec<IpAddr>,
    /// All addresses of the node's interfaces, as far as known. The kernel looks at its own list; this one is for the
    /// evaluator and for conntrack.
    #[serde(default)]
    pub local_addresses: Vec<IpAddr>,
    /// How pods of this node are recognised.
    pub local_detection: LocalDetection,
    /// Masquerade everything that is sent to a cluster IP.
    pub masquerade_all: bool,
}

/// A slice and its key.
type NamedSlice = (Arc<ObjectKey>, Arc<Slice>);

/// One consistent view of the objects that decide about Services.
///
/// It is what an agent keeps of a cluster, so it is kept small: parsed values, strings once.
#[derive(Clone, Debug, Default)]
pub struct World {
    services: BTreeMap<Arc<ObjectKey>, Arc<ServiceSpec>>,
    /// The Service that each slice belongs to.
    service_of: BTreeMap<Arc<ObjectKey>, Arc<ObjectKey>>,
    /// The slices of each Service, in the order of their names.
    slices_of: BTreeMap<Arc<ObjectKey>, Vec<NamedSlice>>,
    service_cidrs: BTreeMap<String, Vec<IpNet>>,
    pods: BTreeMap<Arc<ObjectKey>, Arc<HostPortPod>>,
    /// Slices of no Service, with what there is to say about them.
    strays: BTreeMap<ObjectKey, Finding>,
    names: Names,
}

/// Strings and hints that many endpoints have in common: names of nodes, zones, ports.
#[derive(Clone, Debug, Default)]
struct Names {
    texts: HashSet<Arc<str>>,
    hints: HashSet<Arc<Hints>>,
    /// Those that nothing uses any more are dropped at this size.
    sweep_at: usize,
}

impl Names {
    fn share(&mut self, slice: &mut Slice) {
        for port in &mut slice.ports {
            self.text(&mut port.name);
        }
        for endpoint in &mut slice.endpoints {
            if let Some(node) = &mut endpoint.node {
                self.text(node);
            }
            let Some(hints) = &mut endpoint.hints else { continue };
            match self.hints.get(hints) {
                Some(known) => *hints = known.clone(),
                None => {
                    self.hints.insert(hints.clone());
                }
            }
        }
        if self.texts.len() + self.hints.len() > self.sweep_at {
            self.texts.retain(|t| Arc::strong_count(t) > 1);
            self.hints.retain(|h| Arc::strong_count(h) > 1);
            self.sweep_at = (2 * (self.texts.len() + self.hints.len())).max(1024);
        }
    }

    fn text(&mut self, text: &mut Arc<str>) {
        match self.texts.get(text) {
            Some(known) => *text = known.clone(),
            None => {
                self.texts.insert(text.clone());
            }
        }
    }
}

impl World {
    /// Stores a Service as it is now and returns the key whose compilation may change.
    ///
    /// A Service that is not this proxy's (headless, ExternalName, another proxy's label, no address) is forgotten.
    pub fn put_service(&mut self, service: &Service) -> ObjectKey {
        let key = key_of(&service.metadata);
        self.set_service(&key, ServiceSpec::parse(service).map(Arc::new));
        key
    }

    /// Stores what a Service is now; `None` when it is gone or not this proxy's.
    pub fn set_service(&mut self, key: &ObjectKey, service: Option<Arc<ServiceSpec>>) {
        match (self.services.get_mut(key), service) {
            (Some(known), Some(service)) => *known = service,
            (None, Some(service)) => {
                let key = self.slices_of.get_key_value(key).map_or_else(|| Arc::new(key.clone()), |(k, _)| k.clone());
                self.services.insert(key, service);
            }
            (Some(_), None) => {
                self.services.remove(key);
            }
            (None, None) => {}
        }
    }

    /// Forgets a Service.
    pub fn delete_service(&mut self, key: &ObjectKey) {
        self.set_service(key, None);
    }

    /// Stores an EndpointSlice as it is now and returns the Services whose compilation may change: the one it names, and
    /// the one that it named before when the label moved.
    pub fn put_slice(&mut self, slice: &EndpointSlice) -> Vec<ObjectKey> {
        let manifest = SliceManifest::from(slice);
        let key = ObjectKey::new(&*manifest.metadata.namespace, &*manifest.metadata.name);
        let dirty = self.set_slice(&key, Slice::parse(&manifest).map(Arc::new));
        if let Some(finding) = Slice::stray(&manifest) {
            self.strays.insert(key, finding);
        }
        dirty
    }

    /// Stores what an EndpointSlice is now, `None` when it is gone or ignored, and returns the Services whose compilation may
    /// change.
    pub fn set_slice(&mut self, key: &ObjectKey, slice: Option<Arc<Slice>>) -> Vec<ObjectKey> {
        let mut dirty = Vec::new();
        self.strays.remove(key);
        let mut shared_key = None;
        if let Some((slice_key, old)) = self.service_of.remove_entry(key) {
            if let Some(of) = self.slices_of.get_mut(&old) {
                of.retain(|(k, _)| **k != *key);
                if of.is_empty() {
                    self.slices_of.remove(&old);
                }
            }
            dirty.push(ObjectKey::clone(&old));
            shared_key = Some(slice_key);
        }
        if let Some(mut slice) = slice {
            if let Some(slice) = Arc::get_mut(&mut slice) {
                self.names.share(slice);
                // The Service's own key, when there is one already.
                let known = self.services.get_key_value(&slice.service).map(|(k, _)| k);
                let known = known.or_else(|| self.slices_of.get_key_value(&slice.service).map(|(k, _)| k));
                if let Some(known) = known {
                    slice.service = known.clone();
                }
            }
            let service = slice.service.clone();
            if !dirty.contains(&service) {
                dirty.push(ObjectKey::clone(&service));
            }
            let slice_key = shared_key.unwrap_or_else(|| Arc::new(key.clone()));
            let of = self.slices_of.entry(service.clone()).or_insert_with(|| Vec::with_capacity(1));
            let at = of.partition_point(|(k, _)| *k < slice_key);
            of.insert(at, (slice_key.clone(), slice));
            self.service_of.insert(slice_key, service);
        }
        dirty
    }

    /// Forgets an EndpointSlice and returns the Service whose compilation may change.
    pub fn delete_slice(&mut self, key: &ObjectKey) -> Vec<ObjectKey> {
        self.set_slice(key, None)
    }

    /// Stores a pod of the compiled node as it is now and returns the key whose compilation may change. Pods without host
    /// ports, without addresses, at their end, or in the node's own network are forgotten.
    pub fn put_pod(&mut self, pod: &Pod) -> ObjectKey {
        let key = key_of(&pod.metadata);
        self.set_pod(&key, HostPortPod::parse(pod).map(Arc::new))
    }

    /// Stores what a pod is now, `None` when it is gone or has no host ports, and returns the key whose compilation may change.
    pub fn set_pod(&mut self, pod: &ObjectKey, parsed: Option<Arc<HostPortPod>>) -> ObjectKey {
        let key = pod_key(&pod.namespace, &pod.name);
        match parsed {
            Some(parsed) => self.pods.insert(Arc::new(key.clone()), parsed),
            None => self.pods.remove(&key),
        };
        key
    }

    /// Forgets a pod and returns the key whose compilation may change.
    pub fn delete_pod(&mut self, namespace: &str, name: &str) -> ObjectKey {
        self.set_pod(&ObjectKey::new(namespace, name), None)
    }

    /// The pod with host ports behind a key.
    pub fn pod(&self, key: &ObjectKey) -> Option<(&Arc<ObjectKey>, &Arc<HostPortPod>)> {
        self.pods.get_key_value(key)
    }

    /// What there is to say about slices that belong to no Service.
    pub fn strays(&self) -> impl Iterator<Item = &Finding> {
        self.strays.values()
    }

    /// Sets the ranges of one ServiceCIDR object; an empty list forgets it.
    pub fn put_service_cidr(&mut self, name: &str, cidrs: Vec<IpNet>) {
        if cidrs.is_empty() {
            self.service_cidrs.remove(name);
        } else {
            self.service_cidrs.insert(name.to_owned(), cidrs);
        }
    }

    /// All service ranges of a family, overlaps removed, sorted.
    pub fn service_ranges(&self, family: IpFamily) -> Vec<IpNet> {
        let nets = self
            .service_cidrs
            .values()
            .flatten()
            .filter(|n| IpFamily::of_net(n) == family)
            .map(IpNet::trunc)
            .collect::<Vec<_>>();
        IpNet::aggregate(&nets)
    }

    /// One Service, if it is this proxy's.
    pub fn service(&self, key: &ObjectKey) -> Option<(&Arc<ObjectKey>, &Arc<ServiceSpec>)> {
        self.services.get_key_value(key)
    }

    /// All Services of this proxy.
    pub fn services(&self) -> impl Iterator<Item = (&Arc<ObjectKey>, &Arc<ServiceSpec>)> {
        self.services.iter()
    }

    /// The slices of one Service, in the order of their names.
    pub fn slices_of(&self, service: &ObjectKey) -> impl Iterator<Item = &Arc<Slice>> {
        self.slices_of.get(service).into_iter().flatten().map(|(_, slice)| slice)
    }

    /// Keys of everything that can be compiled: Services, and pods with host ports.
    pub fn service_keys(&self) -> BTreeSet<ObjectKey> {
        self.services.keys().chain(self.pods.keys()).map(|k| ObjectKey::clone(k)).collect()
    }
}

impl ServiceSpec {
    /// Parses what the proxy needs; `None` for a Service that the proxy has nothing to do with (services.md 3.1).
    pub fn parse(service: &Service) -> Option<ServiceSpec> {
        let meta = &service.metadata;
        let spec = service.spec.as_ref()?;
        let service_type = spec.type_.as_deref().unwrap_or("ClusterIP");
        if service_type == "ExternalName"
            || spec.cluster_ip.as_deref() == Some("None")
            // Kube-proxy leaves out whatever bears either label, Services as well as slices.
            || meta.labels.as_ref().is_some_and(|l| l.contains_key(PROXY_NAME_LABEL) || l.contains_key(HEADLESS_LABEL))
        {
            return None;
        }
        let origin = Origin {
            kind: "Service".into(),
            namespace: meta.namespace.clone().unwrap_or_default(),
            name: meta.name.clone().unwrap_or_default(),
            uid: meta.uid.clone().unwrap_or_default(),
            generation: meta.generation.unwrap_or_default(),
            field: String::new(),
        };
        let mut findings = Vec::new();
        let mut finding = |field: String, message: String| {
            findings.push(Finding {
                origin: Origin { field, ..origin.clone() },
                severity: Severity::Warning,
                reason: "InvalidValue".into(),
                message,
            });
        };

        let listed = spec.cluster_ips.clone().unwrap_or_default();
        let cluster_ip_texts = if listed.is_empty() { spec.cluster_ip.iter().cloned().collect() } else { listed };
        let mut cluster_ips: Vec<IpAddr> = Vec::new();
        for (i, text) in cluster_ip_texts.iter().enumerate().filter(|(_, t)| !t.is_empty()) {
            match parse_ip(text) {
                Some(ip) if cluster_ips.iter().all(|c| IpFamily::of(c) != IpFamily::of(&ip)) => cluster_ips.push(ip),
                Some(_) => finding(format!("spec.clusterIPs[{i}]"), format!("a second address of one family: {text}")),
                None => finding(format!("spec.clusterIPs[{i}]"), format!("not an IP address: {text:?}")),
            }
        }
        if cluster_ips.is_empty() {
            return None;
        }
        let families: Vec<IpFamily> = cluster_ips.iter().map(IpFamily::of).collect();

        let mut external_ips = Vec::new();
        for (i, text) in spec.external_ips.iter().flatten().enumerate() {
            match parse_ip(text) {
                Some(ip) if families.contains(&IpFamily::of(&ip)) => external_ips.push(ip),
                Some(_) => finding(
                    format!("spec.externalIPs[{i}]"),
                    format!("{text} is of a family that the Service does not have, and is ignored"),
                ),
                None => finding(format!("spec.externalIPs[{i}]"), format!("not an IP address: {text:?}")),
            }
        }

        let mut vips = Vec::new();
        if service_type == "LoadBalancer" {
            let ingress =
                service.status.iter().filter_map(|s| s.load_balancer.as_ref()).flat_map(|l| l.ingress.iter().flatten());
            for (i, entry) in ingress.enumerate() {
                // ipMode Proxy: the balancer must see the traffic, so nodes do not capture it (KEP-1860).
                if entry.ip_mode.as_deref().is_some_and(|m| m != "VIP") {
                    continue;
                }
                match entry.ip.as_deref().map(|text| (text, parse_ip(text))) {
                    Some((_, Some(ip))) if families.contains(&IpFamily::of(&ip)) => vips.push(ip),
                    Some((text, Some(_))) => finding(
                        format!("status.loadBalancer.ingress[{i}].ip"),
                        format!("{text} is of a family that the Service does not have, and is ignored"),
                    ),
                    Some((text, None)) => {
                        finding(format!("status.loadBalancer.ingress[{i}].ip"), format!("not an IP address: {text:?}"));
                    }
                    None => {}
                }
            }
        }
        external_ips.sort();
        external_ips.dedup();
        vips.sort();
        vips.dedup();

        let mut source_ranges = Vec::new();
        if service_type == "LoadBalancer" {
            for (i, text) in spec.load_balancer_source_ranges.iter().flatten().enumerate() {
                match parse_net(text) {
                    Some(net) => source_ranges.push(net),
                    None => finding(format!("spec.loadBalancerSourceRanges[{i}]"), format!("not a CIDR: {text:?}")),
                }
            }
        }

        let mut ports: Vec<ServicePort> = Vec::new();
        for (i, port) in spec.ports.iter().flatten().enumerate() {
            let Some(protocol) = L4::parse(port.protocol.as_deref()) else {
                finding(format!("spec.ports[{i}].protocol"), format!("unknown protocol {:?}", port.protocol));
                continue;
            };
            let Some(number) = port_number(port.port) else {
                finding(format!("spec.ports[{i}].port"), format!("{} is not a port", port.port));
                continue;
            };
            let node_port = match service_type {
                "NodePort" | "LoadBalancer" => port.node_port.and_then(port_number),
                _ => None,
            };
            let name = port.name.as_deref().unwrap_or_default().into();
            ports.push(ServicePort { name, protocol, port: number, node_port });
        }

        let affinity = if spec.session_affinity.as_deref() == Some("ClientIP") {
            let seconds = spec
                .session_affinity_config
                .as_ref()
                .and_then(|c| c.client_ip.as_ref())
                .and_then(|c| c.timeout_seconds)
                .filter(|s| *s > 0)
                .unwrap_or(10_800); // The Service API's default: three hours.
            Affinity::ClientIp { timeout: Duration::from_secs(u64::try_from(seconds).unwrap_or(10_800)) }
        } else {
            Affinity::None
        };
        let external_policy = TrafficPolicy::parse(spec.external_traffic_policy.as_deref());
        let health_check = (service_type == "LoadBalancer" && external_policy == TrafficPolicy::Local)
            .then(|| spec.health_check_node_port.and_then(port_number))
            .flatten();
        Some(ServiceSpec {
            created: meta.creation_timestamp.as_ref().map(|t| t.0.as_second()).unwrap_or_default(),
            cluster_ips: cluster_ips.into(),
            external_ips: external_ips.into(),
            vips: vips.into(),
            source_ranges: source_ranges.into(),
            ports: ports.into(),
            affinity,
            internal_policy: TrafficPolicy::parse(spec.internal_traffic_policy.as_deref()),
            external_policy,
            health_check,
            findings: findings.into(),
            origin: Arc::new(origin),
        })
    }
}

/// The key under which a pod's host ports are compiled. No Service's name has a slash.
pub fn pod_key(namespace: &str, name: &str) -> ObjectKey {
    ObjectKey::new(namespace, format!("pod/{name}"))
}

impl HostPortPod {
    /// Parses what the proxy needs; `None` for a pod without a host port that could be served now.
    pub fn parse(pod: &Pod) -> Option<HostPortPod> {
        let spec = pod.spec.as_ref()?;
        let status = pod.status.as_ref()?;
        // In the node's own network the container itself listens on the port.
        if spec.host_network == Some(true) || matches!(status.phase.as_deref(), Some("Succeeded" | "Failed")) {
            return None;
        }
        let meta = &pod.metadata;
        let origin = Origin {
            kind: "Pod".into(),
            namespace: meta.namespace.clone().unwrap_or_default(),
            name: meta.name.clone().unwrap_or_default(),
            uid: meta.uid.clone().unwrap_or_default(),
            generation: meta.generation.unwrap_or_default(),
            field: String::new(),
        };
        let mut addresses: Vec<IpAddr> = Vec::new();
        let listed = status.pod_ips.iter().flatten().map(|ip| ip.ip.as_str());
        for ip in listed.chain(status.pod_ip.as_deref()).filter_map(parse_ip) {
            if addresses.iter().all(|known| IpFamily::of(known) != IpFamily::of(&ip)) {
                addresses.push(ip);
            }
        }
        let mut findings = Vec::new();
        let mut ports = Vec::new();
        // Init containers that go on running (sidecars, KEP-753) have ports too.
        let lists =
            [("spec.containers", Some(&spec.containers)), ("spec.initContainers", spec.init_containers.as_ref())];
        for (list, containers) in lists {
            for (i, container) in containers.into_iter().flatten().enumerate() {
                if list == "spec.initContainers" && container.restart_policy.as_deref() != Some("Always") {
                    continue;
                }
                for (k, port) in container.ports.iter().flatten().enumerate() {
                    let Some(host_port) = port.host_port.and_then(port_number) else { continue };
                    let field = format!("{list}[{i}].ports[{k}]");
                    let mut finding = |part: &str, message: String| {
                        findings.push(Finding {
                            origin: Origin { field: format!("{field}.{part}"), ..origin.clone() },
                            severity: Severity::Warning,
                            reason: "InvalidValue".into(),
                            message,
                        });
                    };
                    let Some(protocol) = L4::parse(port.protocol.as_deref()) else {
                        finding("protocol", format!("unknown protocol {:?}", port.protocol));
                        continue;
                    };
                    let Some(container_port) = port_number(port.container_port) else {
                        finding("containerPort", format!("{} is not a port", port.container_port));
                        continue;
                    };
                    let host_ip = match port.host_ip.as_deref().filter(|t| !t.is_empty()) {
                        None => None,
                        Some(text) => match parse_ip(text) {
                            Some(ip) if ip.is_unspecified() => None,
                            Some(ip) => Some(ip),
                            None => {
                                finding("hostIP", format!("not an IP address: {text:?}"));
                                continue;
                            }
                        },
                    };
                    ports.push(HostPort { field, host_ip, protocol, host_port, container_port });
                }
            }
        }
        let created = meta.creation_timestamp.as_ref().map(|t| t.0.as_second()).unwrap_or_default();
        let wanted = !ports.is_empty() || !findings.is_empty();
        (wanted && !addresses.is_empty()).then_some(HostPortPod { origin, created, addresses, ports, findings })
    }
}

/// What is read of an EndpointSlice, as the API writes it. Numbers are wider than the API's, so that one out of range is a
/// finding about its slice instead of an error of the whole list.
#[derive(Clone, Debug, Default, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub struct SliceManifest {
    /// `metadata`.
    pub metadata: ManifestMeta,
    /// `addressType`.
    pub address_type: Option<String>,
    /// `ports`.
    pub ports: Option<Vec<ManifestPort>>,
    /// `endpoints`.
    pub endpoints: Option<Vec<ManifestEndpoint>>,
}

/// What is read of an object's metadata.
#[derive(Clone, Debug, Default, Deserialize)]
#[serde(rename_all = "camelCase", default)]
#[allow(missing_docs)] // Named as in the API.
pub struct ManifestMeta {
    #[serde(deserialize_with = "or_default")]
    pub namespace: String,
    #[serde(deserialize_with = "or_default")]
    pub name: String,
    #[serde(deserialize_with = "or_default")]
    pub uid: String,
    pub resource_version: Option<String>,
    #[serde(deserialize_with = "or_default")]
    pub generation: i64,
    #[serde(deserialize_with = "or_default")]
    pub labels: BTreeMap<String, String>,
    #[serde(deserialize_with = "or_default")]
    pub annotations: BTreeMap<String, String>,
}

/// `ports[]` of an EndpointSlice.
#[derive(Clone, Debug, Default, Deserialize)]
#[serde(default)]
#[allow(missing_docs)] // Named as in the API.
pub struct ManifestPort {
    pub name: Option<String>,
    pub protocol: Option<String>,
    pub port: Option<i64>,
}

/// `endpoints[]` of an EndpointSlice.
#[derive(Clone, Debug, Default, Deserialize)]
#[serde(rename_all = "camelCase", default)]
#[allow(missing_docs)] // Named as in the API.
pub struct ManifestEndpoint {
    pub addresses: Option<Vec<String>>,
    pub conditions: Option<ManifestConditions>,
    pub node_name: Option<String>,
    pub hints: Option<ManifestHints>,
}

/// `endpoints[].conditions` of an EndpointSlice.
#[derive(Clone, Debug, Default, Deserialize)]
#[serde(default)]
#[allow(missing_docs)] // Named as in the API.
pub struct ManifestConditions {
    pub ready: Option<bool>,
    pub serving: Option<bool>,
    pub terminating: Option<bool>,
}

/// `endpoints[].hints` of an EndpointSlice.
#[derive(Clone, Debug, Default, Deserialize)]
#[serde(rename_all = "camelCase", default)]
#[allow(missing_docs)] // Named as in the API.
pub struct ManifestHints {
    pub for_zones: Option<Vec<ManifestName>>,
    pub for_nodes: Option<Vec<ManifestName>>,
}

/// A zone or node of a hint.
#[derive(Clone, Debug, Default, Deserialize)]
#[serde(default)]
#[allow(missing_docs)] // Named as in the API.
pub struct ManifestName {
    #[serde(deserialize_with = "or_default")]
    pub name: String,
}

/// The API treats `null` as absent.
fn or_default<'de, D: serde::Deserializer<'de>, T: Default + Deserialize<'de>>(from: D) -> Result<T, D::Error> {
    Ok(Option::deserialize(from)?.unwrap_or_default())
}

impl From<&EndpointSlice> for SliceManifest {
    fn from(slice: &EndpointSlice) -> SliceManifest {
        let meta = &slice.metadata;
        let names = |list: Vec<String>| list.into_iter().map(|name| ManifestName { name }).collect();
        let ports = slice.ports.as_ref().map(|ports| {
            ports
                .iter()
                .map(|p| ManifestPort {
                    name: p.name.clone(),
                    protocol: p.protocol.clone(),
                    port: p.port.map(i64::from),
                })
                .collect()
        });
        let endpoints = slice.endpoints.iter().flatten().map(|e| ManifestEndpoint {
            addresses: Some(e.addresses.clone()),
            conditions: e.conditions.as_ref().map(|c| ManifestConditions {
                ready: c.ready,
                serving: c.serving,
                terminating: c.terminating,
            }),
            node_name: e.node_name.clone(),
            hints: e.hints.as_ref().map(|h| ManifestHints {
                for_zones: h.for_zones.as_ref().map(|z| names(z.iter().map(|z| z.name.clone()).collect())),
                for_nodes: h.for_nodes.as_ref().map(|n| names(n.iter().map(|n| n.name.clone()).collect())),
            }),
        });
        SliceManifest {
            metadata: ManifestMeta {
                namespace: meta.namespace.clone().unwrap_or_default(),
                name: meta.name.clone().unwrap_or_default(),
                uid: meta.uid.clone().unwrap_or_default(),
                resource_version: meta.resource_version.clone(),
                generation: meta.generation.unwrap_or_default(),
                labels: meta.labels.clone().unwrap_or_default(),
                annotations: meta.annotations.clone().unwrap_or_default(),
            },
            address_type: Some(slice.address_type.clone()),
            ports,
            endpoints: Some(endpoints.collect()),
        }
    }
}

impl ManifestMeta {
    fn origin(&self, kind: &str, field: String) -> Origin {
        Origin {
            kind: kind.into(),
            namespace: self.namespace.clone(),
            name: self.name.clone(),
            uid: self.uid.clone(),
            generation: self.generation,
            field,
        }
    }
}

impl Slice {
    /// Parses what the proxy needs; `None` for a slice that it ignores (services.md 3.1).
    pub fn parse(slice: &SliceManifest) -> Option<Slice> {
        let meta = &slice.metadata;
        let service = meta.labels.get(SERVICE_NAME_LABEL).filter(|s| !s.is_empty())?;
        if meta.labels.contains_key(HEADLESS_LABEL) {
            return None;
        }
        let mut findings = Vec::new();
        let mut finding = |field: String, message: String| {
            findings.push(Finding {
                origin: meta.origin("EndpointSlice", field),
                severity: Severity::Warning,
                reason: "InvalidValue".into(),
                message,
            });
        };
        let service = Arc::new(ObjectKey::new(&*meta.namespace, &**service));
        let family = match slice.address_type.as_deref() {
            Some("IPv4") => Some(IpFamily::V4),
            Some("IPv6") => Some(IpFamily::V6),
            other => {
                let other = other.unwrap_or_default();
                finding("addressType".into(), format!("addresses of type {other:?} are not used by the proxy"));
                None
            }
        };
        let Some(family) = family else {
            let findings = findings.into();
            return Some(Slice { service, family, ports: [].into(), endpoints: [].into(), findings });
        };
        let mut ports: Vec<SlicePort> = Vec::new();
        for (i, port) in slice.ports.iter().flatten().enumerate() {
            let Some(protocol) = L4::parse(port.protocol.as_deref()) else {
                finding(format!("ports[{i}].protocol"), format!("unknown protocol {:?}", port.protocol));
                continue;
            };
            let number = match port.port {
                Some(number) => u16::try_from(number).ok().and_then(NonZeroU16::new),
                None => {
                    finding(format!("ports[{i}].port"), "a port without a number is not used by the proxy".into());
                    continue;
                }
            };
            let Some(number) = number else {
                finding(format!("ports[{i}].port"), format!("{} is not a port", port.port.unwrap_or_default()));
                continue;
            };
            // The API fills an empty name in; one that is absent joins with no Service port.
            let Some(name) = &port.name else { continue };
            ports.push(SlicePort { name: name.as_str().into(), protocol, port: number });
        }
        let mut endpoints: Vec<SliceEndpoint> = Vec::new();
        let mut seen = HashSet::new();
        let mut last_hints: Option<Arc<Hints>> = None;
        for (i, endpoint) in slice.endpoints.iter().flatten().enumerate() {
            // All addresses of one endpoint are the same thing; consumers use the first (discovery.k8s.io/v1).
            let Some(text) = endpoint.addresses.iter().flatten().next() else { continue };
            let field = || format!("endpoints[{i}].addresses[0]");
            let addr = match parse_ip(text) {
                Some(ip) if IpFamily::of(&ip) != family => {
                    finding(field(), format!("{text} is not an {} address", family.as_str()));
                    continue;
                }
                // A loopback or unspecified destination would send clients' packets to the node itself; the others cannot be
                // reached by translation.
                Some(ip) if !can_be_endpoint(&ip) => {
                    finding(field(), format!("{text} cannot be an endpoint"));
                    continue;
                }
                Some(ip) => ip,
                None => {
                    finding(field(), format!("not an IP address: {text:?}"));
                    continue;
                }
            };
            if !seen.insert(addr) {
                finding(field(), format!("{text} is listed more than once; the entry in the best condition counts"));
            }
            let conditions = endpoint.conditions.as_ref();
            let list = |names: Option<&Vec<ManifestName>>| {
                names.into_iter().flatten().map(|z| Arc::from(z.name.as_str())).collect::<Box<[Arc<str>]>>()
            };
            let hints = endpoint
                .hints
                .as_ref()
                .map(|h| Hints { for_zones: list(h.for_zones.as_ref()), for_nodes: list(h.for_nodes.as_ref()) });
            let hints = hints.filter(|h| *h != Hints::default()).map(|hints| {
                last_hints.take_if(|last| **last != hints);
                last_hints.get_or_insert_with(|| Arc::new(hints)).clone()
            });
            endpoints.push(SliceEndpoint {
                addr,
                conditions: Conditions {
                    ready: conditions.and_then(|c| c.ready).unwrap_or(true),
                    serving: conditions.and_then(|c| c.serving).unwrap_or(true),
                    terminating: conditions.and_then(|c| c.terminating).unwrap_or(false),
                },
                node: endpoint.node_name.as_deref().map(Arc::from),
                hints,
            });
        }
        Some(Slice {
            service,
            family: Some(family),
            ports: ports.into(),
            endpoints: endpoints.into(),
            findings: findings.into(),
        })
    }

    /// What there is to say about a slice that names no Service: legitimate, but easily a mistake.
    pub fn stray(slice: &SliceManifest) -> Option<Finding> {
        let named = slice.metadata.labels.get(SERVICE_NAME_LABEL).is_some_and(|s| !s.is_empty());
        (!named).then(|| Finding {
            origin: slice.metadata.origin("EndpointSlice", "metadata.labels".into()),
            severity: Severity::Normal,
            reason: "NoService".into(),
            message: format!("without the label {SERVICE_NAME_LABEL} the slice belongs to no Service"),
        })
    }
}

/// Whether packets may be translated to an address; the API server refuses the same ones for new slices.
fn can_be_endpoint(ip: &IpAddr) -> bool {
    let special = match ip {
        IpAddr::V4(v4) => v4.is_link_local() || v4.is_broadcast(),
        IpAddr::V6(v6) => v6.is_unicast_link_local(),
    };
    !(special || ip.is_loopback() || ip.is_unspecified() || ip.is_multicast())
}

fn key_of(meta: &ObjectMeta) -> ObjectKey {
    ObjectKey::new(meta.namespace.clone().unwrap_or_default(), meta.name.clone().unwrap_or_default())
}

fn port_number(port: i32) -> Option<NonZeroU16> {
    u16::try_from(port).ok().and_then(NonZeroU16::new)
}

/// Parses an address, tolerating what old API servers stored: leading zeros and IPv4-mapped IPv6 (services.md 1.4).
pub fn parse_ip(text: &str) -> Option<IpAddr> {
    if let Ok(ip) = text.parse::<IpAddr>() {
        return Some(ip.to_canonical());
    }
    let octets = text.split('.').map(|part| match part {
        "" => None,
        digits if digits.bytes().all(|b| b.is_ascii_digit()) => digits.trim_start_matches('0').parse().ok().or(
            // A part of zeros only has nothing left after trimming.
            digits.bytes().all(|b| b == b'0').then_some(0u8),
        ),
        _ => None,
    });
    let octets = octets.collect::<Option<Vec<u8>>>()?;
    <[u8; 4]>::try_from(octets).ok().map(IpAddr::from)
}

/// Parses a network with the same tolerance as [`parse_ip`]; host bits are cleared, surrounding blanks ignored.
pub fn parse_net(text: &str) -> Option<IpNet> {
    let (addr, len) = text.trim().split_once('/')?;
    let addr_parsed = parse_ip(addr)?;
    let mut len: u8 = len.parse().ok()?;
    if addr.contains(':') && addr_parsed.is_ipv4() {
        len = len.checked_sub(96)?; // ::ffff:0:0/96 holds the mapped addresses, RFC 4291 section 2.5.5.2
    }
    IpNet::new(addr_parsed, len).ok().map(|n| n.trunc())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn services_of_others_are_left_out() {
        let service = |labels: serde_json::Value, spec: serde_json::Value| -> Service {
            serde_json::from_value(serde_json::json!({"metadata": {"name": "s", "labels": labels}, "spec": spec}))
                .unwrap()
        };
        let ours = serde_json::json!({"clusterIP": "10.96.0.7", "ports": [{"port": 80}]});
        for (labels, spec, expected) in [
            (serde_json::json!({"app": "x"}), ours.clone(), true),
            (serde_json::json!({PROXY_NAME_LABEL: "other"}), ours.clone(), false),
            (serde_json::json!({PROXY_NAME_LABEL: ""}), ours.clone(), false),
            (serde_json::json!({HEADLESS_LABEL: ""}), ours, false),
            (serde_json::json!({}), serde_json::json!({"clusterIP": "None"}), false),
            (serde_json::json!({}), serde_json::json!({"type": "ExternalName", "externalName": "x"}), false),
        ] {
            assert_eq!(ServiceSpec::parse(&service(labels.clone(), spec)).is_some(), expected, "{labels}");
        }
    }

    #[test]
    fn sloppy_addresses_have_one_canonical_form() {
        for (text, expected) in [
            ("10.0.0.1", Some("10.0.0.1")),
            ("010.000.00.1", Some("10.0.0.1")),
            ("::ffff:10.0.0.1", Some("10.0.0.1")),
            ("fd00::1", Some("fd00::1")),
            ("10.0.0", None),
            ("10.0.0.256", None),
            ("a.b.c.d", None),
            ("", None),
        ] {
            assert_eq!(parse_ip(text), expected.map(|e| e.parse().unwrap()), "{text:?}");
        }
        assert_eq!(parse_net(" 10.9.8.7/8 "), Some("10.0.0.0/8".parse().unwrap()));
        assert_eq!(parse_net("::ffff:10.0.0.0/104"), Some("10.0.0.0/8".parse().unwrap()));
        assert_eq!(parse_net("10.0.0.0/33"), None);
        assert_eq!(parse_net("10.0.0.0"), None);
    }
}
