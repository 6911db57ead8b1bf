//! The Service compiler: Services and EndpointSlices to what a node's kernel looks up.
//!
//! [`compile`] is the definition. [`Planner::update`] reaches the same [`ServiceMap`] by recompiling only what a change
//! touches; a property test holds it to the definition.

use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;
use std::num::NonZeroU16;
use std::sync::Arc;

use ipnet::IpNet;
use serde::{Deserialize, Serialize};

use crate::delta::Delta;
use crate::endpoint::{self, Backend, Endpoint};
use crate::finding::{Finding, Severity};
use crate::origin::Origin;
use crate::world::{
    Affinity, HostPortPod, IpFamily, L4, NodeView, ObjectKey, ServicePort, ServiceSpec, TrafficPolicy, World,
};

/// Everything that one node does for Services.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct ServiceMap {
    /// What the kernel looks up.
    pub frontends: BTreeMap<Frontend, FrontendTarget>,
    /// What it finds.
    pub services: BTreeMap<ServicePortId, Arc<CompiledService>>,
    /// Cluster IPs of Services: other ports there are refused. Counted by Service.
    pub cluster_ips: BTreeMap<IpAddr, usize>,
    /// Service ranges: addresses there without a Service are met with silence.
    pub service_ranges: BTreeMap<IpFamily, Vec<IpNet>>,
    /// Addresses of this node that carry node ports.
    pub node_port_addresses: BTreeSet<IpAddr>,
    /// All addresses of this node, as far as known; host ports are on every one that is not a loopback address.
    pub local_addresses: BTreeSet<IpAddr>,
    /// Health-check ports by Service.
    pub health_checks: BTreeMap<ObjectKey, HealthCheck>,
}

/// A port of a Service in one family, or a host port of a pod ([`crate::world::pod_key`]).
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub struct ServicePortId {
    /// The Service.
    pub service: Arc<ObjectKey>,
    /// Name of the port; empty for the single unnamed one.
    pub port_name: Arc<str>,
    /// Protocol.
    pub protocol: L4,
    /// Family.
    pub family: IpFamily,
}

impl std::fmt::Display for ServicePortId {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{}", self.service)?;
        if !self.port_name.is_empty() {
            write!(f, ":{}", self.port_name)?;
        }
        write!(f, "/{}", self.protocol.as_str())
    }
}

/// What a packet is addressed to.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub struct Frontend {
    /// Address, or any of the node's node-port addresses.
    pub addr: FrontendAddr,
    /// Protocol.
    pub protocol: L4,
    /// Port.
    pub port: NonZeroU16,
}

impl Frontend {
    /// The family that the frontend belongs to.
    pub fn family(&self) -> IpFamily {
        match self.addr {
            FrontendAddr::Address(addr) => IpFamily::of(&addr),
            FrontendAddr::NodePort(family) | FrontendAddr::HostPort(family) => family,
        }
    }

    /// Whether it is a host port on a loopback address. The kernel does not translate those: an answer to a loopback source
    /// that comes in from a pod would be a martian, unless the node let every neighbour speak to its loopback services.
    pub fn is_loopback(&self) -> bool {
        matches!(self.addr, FrontendAddr::Address(addr) if addr.is_loopback())
    }
}

impl std::fmt::Display for Frontend {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self.addr {
            FrontendAddr::Address(addr) => write!(f, "{}", std::net::SocketAddr::new(addr, self.port.get()))?,
            FrontendAddr::NodePort(family) => write!(f, "{} node port {}", family.as_str(), self.port)?,
            FrontendAddr::HostPort(family) => write!(f, "{} host port {}", family.as_str(), self.port)?,
        }
        write!(f, "/{}", self.protocol.as_str())
    }
}

/// The address part of a [`Frontend`].
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub enum FrontendAddr {
    /// A cluster IP, external IP or load-balancer address.
    Address(IpAddr),
    /// A node port, on every address in [`ServiceMap::node_port_addresses`] of the family.
    NodePort(IpFamily),
    /// A host port of a pod, on every address of the node.
    HostPort(IpFamily),
}

/// What a frontend is to its Service; decides which policy applies.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub enum FrontendKind {
    /// `spec.clusterIPs`.
    ClusterIp,
    /// `spec.externalIPs`.
    ExternalIp,
    /// `status.loadBalancer.ingress[].ip`.
    LoadBalancer,
    /// `spec.ports[].nodePort`.
    NodePort,
    /// `spec.containers[].ports[].hostPort` of a pod of this node.
    HostPort,
}

/// The Service port behind a frontend.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
pub struct FrontendTarget {
    /// The Service port.
    pub service: ServicePortId,
    /// What the frontend is to it.
    pub kind: FrontendKind,
}

/// A Service port as one node serves it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct CompiledService {
    /// The Service; for a host port the pod's port.
    pub origin: Arc<Origin>,
    /// Position in `spec.ports`.
    pub port_index: u16,
    /// Session affinity.
    pub affinity: Affinity,
    /// For the cluster IP (`internalTrafficPolicy`, topology applied).
    pub internal: Backends,
    /// For external frontends and traffic from outside the cluster (`externalTrafficPolicy` applied).
    pub external: Backends,
    /// For external frontends and traffic from this node and its pods, which no policy narrows (services.md 3.3).
    pub short_circuit: Backends,
    /// `internalTrafficPolicy`.
    pub internal_policy: TrafficPolicy,
    /// `externalTrafficPolicy`; `Local` keeps the client's address.
    pub external_policy: TrafficPolicy,
    /// Who may use the load-balancer addresses; `None` for everybody.
    pub source_ranges: Option<Arc<[IpNet]>>,
    /// Endpoints whose UDP flows may go on, whatever the policies (services.md 3.6).
    pub serving: Arc<[Backend]>,
    /// Usable endpoints that may be their own clients here (hairpin): those of this node, and those whose node is unknown.
    pub hairpin_addrs: Arc<[IpAddr]>,
}

/// The backends that one class of traffic may use.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Backends {
    /// One of these; never empty, sorted.
    Usable(Arc<[Backend]>),
    /// There is no endpoint anywhere: refuse at once.
    Reject,
    /// There are endpoints, but a `Local` policy leaves none here: silence, so that a balancer or client retries elsewhere.
    Drop,
}

impl Backends {
    fn of(set: &Arc<[Backend]>, has_any: bool) -> Backends {
        if !set.is_empty() {
            Backends::Usable(set.clone())
        } else if has_any {
            Backends::Drop
        } else {
            Backends::Reject
        }
    }

    /// The usable backends; empty for the other two.
    pub fn usable(&self) -> &[Backend] {
        match self {
            Backends::Usable(set) => set,
            Backends::Reject | Backends::Drop => &[],
        }
    }
}

/// What a load balancer is told about the endpoints of a Service on this node.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct HealthCheck {
    /// Port to answer on.
    pub port: NonZeroU16,
    /// Distinct addresses of ready endpoints on this node.
    pub local_endpoints: usize,
}

/// Where a packet comes from, as seen by the node that translates it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub enum SourceClass {
    /// A pod of this node.
    Pod,
    /// This node itself.
    Host,
    /// Everything else, pods of other nodes included.
    External,
}

impl CompiledService {
    /// The object's field that it was compiled from.
    pub fn port_origin(&self) -> Origin {
        let mut origin = Origin::clone(&self.origin);
        if origin.field.is_empty() {
            origin.field = format!("spec.ports[{}]", self.port_index);
        }
        origin
    }

    /// The backends for one frontend kind and source class, and whether the client's address is replaced.
    ///
    /// This is the matrix of services.md 3.3. Hairpin traffic is masqueraded in any case. `pods_known` is whether pods of
    /// this node can be recognised; without it, cluster-IP traffic keeps its source.
    pub fn action(
        &self,
        kind: FrontendKind,
        class: SourceClass,
        pods_known: bool,
        masquerade_all: bool,
    ) -> (&Backends, bool) {
        match (kind, self.external_policy, class) {
            (FrontendKind::ClusterIp, _, SourceClass::Pod) => (&self.internal, masquerade_all),
            (FrontendKind::ClusterIp, _, SourceClass::Host | SourceClass::External) => {
                (&self.internal, masquerade_all || pods_known)
            }
            // The pod is on this node, so that its answers come back here: nobody's address is replaced.
            (FrontendKind::HostPort, _, _) => (&self.external, false),
            (_, TrafficPolicy::Cluster, _) => (&self.external, true),
            (_, TrafficPolicy::Local, SourceClass::Pod) => (&self.short_circuit, false),
            (_, TrafficPolicy::Local, SourceClass::Host) => (&self.short_circuit, true),
            (_, TrafficPolicy::Local, SourceClass::External) => (&self.external, false),
        }
    }
}

/// Compiles everything from scratch: the definition that [`Planner`] is held to.
pub fn compile(world: &World, node: &NodeView) -> (ServiceMap, Vec<Finding>) {
    let mut planner = Planner::new(node.clone());
    let keys = world.service_keys();
    planner.update(world, &keys);
    let findings = planner.findings();
    (planner.map, findings)
}

/// Keeps a [`ServiceMap`] up to date at a cost that follows the changed Services, not the cluster.
#[derive(Clone, Debug)]
pub struct Planner {
    node: NodeView,
    map: ServiceMap,
    /// Who wants a frontend, oldest claim first; the first has it.
    claims: BTreeMap<Frontend, Vec<Claim>>,
    /// What each Service put into the map, to take it out again.
    placed: BTreeMap<Arc<ObjectKey>, Placed>,
    work: Work,
}

/// What a planner has looked at since it was made; a measure of work that does not depend on the machine.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Work {
    /// Services and pods that were compiled, or found to be gone.
    pub objects: u64,
    /// Endpoints that were examined.
    pub endpoints: u64,
}

#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
struct Claim {
    created: i64,
    target: FrontendTarget,
}

#[derive(Clone, Debug, Default)]
struct Placed {
    ports: Box<[ServicePortId]>,
    claims: Box<[(Frontend, Claim)]>,
    cluster_ips: Box<[IpAddr]>,
    findings: Box<[Finding]>,
}

impl Planner {
    /// A planner for one node; nothing is planned yet.
    pub fn new(node: NodeView) -> Planner {
        let map = ServiceMap {
            node_port_addresses: node.node_port_addresses.iter().copied().collect(),
            local_addresses: node.local_addresses.iter().copied().collect(),
            service_ranges: IpFamily::ALL.iter().map(|f| (*f, Vec::new())).collect(),
            ..ServiceMap::default()
        };
        Planner { node, map, claims: BTreeMap::new(), placed: BTreeMap::new(), work: Work::default() }
    }

    /// The map as of the last update.
    pub fn map(&self) -> &ServiceMap {
        &self.map
    }

    /// How much was looked at since the start.
    pub fn work(&self) -> Work {
        self.work
    }

    /// The node that is planned for.
    pub fn node(&self) -> &NodeView {
        &self.node
    }

    /// Recompiles the Services in `dirty` and the world's ranges, and says what changed.
    pub fn update(&mut self, world: &World, dirty: &BTreeSet<ObjectKey>) -> Delta {
        let mut delta = Delta::default();
        for family in IpFamily::ALL {
            let ranges = world.service_ranges(family);
            if self.map.service_ranges.get(&family) != Some(&ranges) {
                self.map.service_ranges.insert(family, ranges);
                delta.ranges = true;
            }
        }
        for key in dirty {
            self.replace(world, key, &mut delta);
        }
        delta
    }

    /// Compiles for a node that has changed (zone, addresses); everything may be different.
    pub fn set_node(&mut self, world: &World, node: NodeView) -> Delta {
        if node == self.node {
            return Delta::default();
        }
        self.map.local_addresses = node.local_addresses.iter().copied().collect();
        // The kernel knows the node's addresses by itself.
        let known = NodeView { local_addresses: node.local_addresses.clone(), ..self.node.clone() };
        if known == node {
            self.node = node;
            return Delta::default();
        }
        let mut delta = Delta { node: true, ..Delta::default() };
        self.map.node_port_addresses = node.node_port_addresses.iter().copied().collect();
        self.node = node;
        let mut keys = world.service_keys();
        keys.extend(self.placed.keys().map(|k| ObjectKey::clone(k)));
        for key in &keys {
            self.replace(world, key, &mut delta);
        }
        delta
    }

    /// All current findings.
    pub fn findings(&self) -> Vec<Finding> {
        let mut all: Vec<Finding> = self.placed.values().flat_map(|p| p.findings.iter().cloned()).collect();
        for (frontend, claims) in &self.claims {
            let mut claims = claims.iter();
            let Some(winner) = claims.next() else { continue };
            let losers = claims.filter(|c| c.target.service.service != winner.target.service.service);
            all.extend(losers.map(|loser| self.conflict(frontend, loser, winner)));
        }
        all.sort();
        all
    }

    /// The findings about one Service.
    pub fn findings_of(&self, key: &ObjectKey) -> Vec<Finding> {
        let Some(placed) = self.placed.get(key) else { return Vec::new() };
        let mut all = placed.findings.to_vec();
        for (frontend, claim) in &placed.claims {
            let winner = self.claims.get(frontend).and_then(|c| c.first());
            if let Some(winner) = winner.filter(|w| *w.target.service.service != *key) {
                all.push(self.conflict(frontend, claim, winner));
            }
        }
        all
    }

    /// The frontends that some Services claim.
    pub fn frontends_of(&self, keys: &BTreeSet<ObjectKey>) -> BTreeSet<Frontend> {
        keys.iter().filter_map(|k| self.placed.get(k)).flat_map(|p| p.claims.iter().map(|(f, _)| *f)).collect()
    }

    fn conflict(&self, frontend: &Frontend, loser: &Claim, winner: &Claim) -> Finding {
        Finding {
            origin: self.origin_of(&loser.target.service),
            severity: Severity::Warning,
            reason: "AddressConflict".into(),
            message: format!(
                "{frontend} belongs to the older {} {}",
                if winner.target.kind == FrontendKind::HostPort { "Pod" } else { "Service" },
                winner.target.service.service.to_string().replacen("/pod/", "/", 1),
            ),
        }
    }

    fn origin_of(&self, id: &ServicePortId) -> Origin {
        self.map.services.get(id).map(|s| s.port_origin()).unwrap_or_default()
    }

    fn replace(&mut self, world: &World, key: &ObjectKey, delta: &mut Delta) {
        self.work.objects += 1;
        let fresh = match (world.service(key), world.pod(key)) {
            (Some((key, spec)), _) => {
                let compiled = compile_service(world, &self.node, key, spec);
                self.work.endpoints += compiled.examined;
                Some((key.clone(), compiled))
            }
            (None, Some((key, pod))) => Some((key.clone(), compile_pod(key, pod))),
            (None, None) => None,
        };
        let old = self.placed.remove(key).unwrap_or_default();
        let (shared_key, placed, services, health) = match fresh {
            Some((key, c)) => (Some(key), c.placed, c.services, c.health),
            None => Default::default(),
        };

        let kept: BTreeSet<&ServicePortId> = services.iter().map(|(id, _)| id).collect();
        for id in old.ports.iter().filter(|id| !kept.contains(id)) {
            self.map.services.remove(id);
            delta.services.insert(id.clone());
        }
        for (id, compiled) in services {
            if self.map.services.get(&id).is_none_or(|known| **known != compiled) {
                self.map.services.insert(id.clone(), Arc::new(compiled));
                delta.services.insert(id);
            }
        }

        for (frontend, claim) in old.claims.iter().filter(|c| !placed.claims.contains(c)) {
            if let Some(claims) = self.claims.get_mut(frontend) {
                claims.retain(|known| known != claim);
                if claims.is_empty() {
                    self.claims.remove(frontend);
                }
            }
            self.settle(*frontend, delta);
        }
        for (frontend, claim) in placed.claims.iter().filter(|c| !old.claims.contains(c)) {
            let claims = self.claims.entry(*frontend).or_insert_with(|| Vec::with_capacity(1));
            if let Err(at) = claims.binary_search(claim) {
                claims.insert(at, claim.clone());
            }
            self.settle(*frontend, delta);
        }

        for ip in old.cluster_ips.iter().filter(|ip| !placed.cluster_ips.contains(ip)) {
            if let Some(count) = self.map.cluster_ips.get_mut(ip) {
                *count -= 1;
                if *count == 0 {
                    self.map.cluster_ips.remove(ip);
                    delta.cluster_ips.insert(*ip);
                }
            }
        }
        for ip in placed.cluster_ips.iter().filter(|ip| !old.cluster_ips.contains(ip)) {
            *self.map.cluster_ips.entry(*ip).or_insert_with(|| {
                delta.cluster_ips.insert(*ip);
                0
            }) += 1;
        }

        if self.map.health_checks.get(key) != health.as_ref() {
            delta.health_checks.insert(key.clone());
            match health {
                Some(health) => self.map.health_checks.insert(key.clone(), health),
                None => self.map.health_checks.remove(key),
            };
        }
        if let Some(key) = shared_key
            && (!placed.ports.is_empty() || !placed.findings.is_empty() || !placed.cluster_ips.is_empty())
        {
            self.placed.insert(key, placed);
        }
    }

    fn settle(&mut self, frontend: Frontend, delta: &mut Delta) {
        let winner = self.claims.get(&frontend).and_then(|c| c.first()).map(|c| &c.target);
        if self.map.frontends.get(&frontend) == winner {
            return;
        }
        delta.frontends.insert(frontend);
        match winner {
            Some(target) => self.map.frontends.insert(frontend, target.clone()),
            None => self.map.frontends.remove(&frontend),
        };
    }
}

struct Compiled {
    placed: Placed,
    services: Vec<(ServicePortId, CompiledService)>,
    health: Option<HealthCheck>,
    /// How many endpoints were looked at.
    examined: u64,
}

fn compile_service(world: &World, node: &NodeView, key: &Arc<ObjectKey>, spec: &ServiceSpec) -> Compiled {
    let findings = spec.findings.iter().chain(world.slices_of(key).flat_map(|s| &s.findings)).cloned().collect();
    let mut claims: Vec<(Frontend, Claim)> = Vec::new();
    let mut services = Vec::new();
    let mut examined = 0;
    let mut local_ready: BTreeSet<IpAddr> = BTreeSet::new();
    for cluster_ip in &spec.cluster_ips {
        let family = IpFamily::of(cluster_ip);
        let ranges: Vec<IpNet> = spec.source_ranges.iter().filter(|n| IpFamily::of_net(n) == family).copied().collect();
        // Without a range of the VIP's family the VIP is open, as is a /0 (services.md 3.7).
        let restricted = !ranges.is_empty() && ranges.iter().all(|n| n.prefix_len() > 0);
        for (index, port) in spec.ports.iter().enumerate() {
            let id =
                ServicePortId { service: key.clone(), port_name: port.name.clone(), protocol: port.protocol, family };
            if services.iter().any(|(known, _)| known == &id) {
                continue; // The API forbids two ports of one name; the first counts.
            }
            let endpoints = endpoints_of(world, node, key, port, family);
            examined += endpoints.len() as u64;
            let selection = endpoint::select(&endpoints, node);
            local_ready.extend(&selection.local_ready);
            // Most Services use all their endpoints in the same way: the same list serves for all of it.
            let cluster: Arc<[Backend]> = selection.cluster.into();
            let share = |list: Vec<Backend>| if *list == *cluster { cluster.clone() } else { list.into() };
            let (local, serving) = (share(selection.local), share(selection.serving));
            let short_circuit = Backends::of(&cluster, selection.has_any);
            let by_policy = |policy: TrafficPolicy| match policy {
                TrafficPolicy::Cluster => short_circuit.clone(),
                TrafficPolicy::Local => Backends::of(&local, selection.has_any),
            };
            // Both lists are sorted as the endpoints are.
            let usable = |b: &Backend| cluster.binary_search(b).is_ok() || local.binary_search(b).is_ok();
            let hairpin_addrs: BTreeSet<IpAddr> = endpoints
                .iter()
                .filter(|e| (e.local || e.unplaced) && usable(&e.backend))
                .map(|e| e.backend.addr)
                .collect();
            let compiled = CompiledService {
                origin: spec.origin.clone(),
                port_index: u16::try_from(index).unwrap_or(u16::MAX),
                affinity: spec.affinity,
                internal: by_policy(spec.internal_policy),
                external: by_policy(spec.external_policy),
                short_circuit: short_circuit.clone(),
                internal_policy: spec.internal_policy,
                external_policy: spec.external_policy,
                source_ranges: restricted.then(|| source_ranges(&ranges, spec, node, family)),
                serving,
                hairpin_addrs: hairpin_addrs.into_iter().collect(),
            };

            let mut claim = |addr: FrontendAddr, number: NonZeroU16, kind: FrontendKind| {
                claims.push((
                    Frontend { addr, protocol: port.protocol, port: number },
                    Claim { created: spec.created, target: FrontendTarget { service: id.clone(), kind } },
                ));
            };
            claim(FrontendAddr::Address(*cluster_ip), port.port, FrontendKind::ClusterIp);
            for ip in spec.external_ips.iter().filter(|ip| IpFamily::of(ip) == family) {
                claim(FrontendAddr::Address(*ip), port.port, FrontendKind::ExternalIp);
            }
            for ip in spec.vips.iter().filter(|ip| IpFamily::of(ip) == family) {
                claim(FrontendAddr::Address(*ip), port.port, FrontendKind::LoadBalancer);
            }
            if let Some(number) = port.node_port {
                claim(FrontendAddr::NodePort(family), number, FrontendKind::NodePort);
            }
            services.push((id, compiled));
        }
    }
    let placed = Placed {
        ports: services.iter().map(|(id, _)| id.clone()).collect(),
        claims: claims.into(),
        cluster_ips: spec.cluster_ips.clone(),
        findings,
    };
    let health = spec.health_check.map(|port| HealthCheck { port, local_endpoints: local_ready.len() });
    Compiled { placed, services, health, examined }
}

/// A pod's host ports are Services with the pod as their only endpoint.
fn compile_pod(key: &Arc<ObjectKey>, pod: &HostPortPod) -> Compiled {
    let mut claims: Vec<(Frontend, Claim)> = Vec::new();
    let mut services: Vec<(ServicePortId, CompiledService)> = Vec::new();
    for port in &pod.ports {
        for addr in pod.addresses.iter().filter(|a| port.host_ip.is_none_or(|h| IpFamily::of(&h) == IpFamily::of(a))) {
            let family = IpFamily::of(addr);
            let port_name = match port.host_ip {
                Some(ip) => std::net::SocketAddr::new(ip, port.host_port.get()).to_string(),
                None => port.host_port.to_string(),
            };
            let id =
                ServicePortId { service: key.clone(), port_name: port_name.into(), protocol: port.protocol, family };
            if services.iter().any(|(known, _)| known == &id) {
                continue; // Two containers of one pod want the same port: the first has it.
            }
            let backend: Arc<[Backend]> = Arc::new([Backend { addr: *addr, port: port.container_port }]);
            let only = Backends::Usable(backend.clone());
            let compiled = CompiledService {
                origin: Arc::new(Origin { field: format!("{}.hostPort", port.field), ..pod.origin.clone() }),
                port_index: 0,
                affinity: Affinity::None,
                internal: only.clone(),
                external: only.clone(),
                short_circuit: only,
                internal_policy: TrafficPolicy::Cluster,
                external_policy: TrafficPolicy::Cluster,
                source_ranges: None,
                serving: backend,
                hairpin_addrs: Arc::new([*addr]),
            };
            claims.push((
                Frontend {
                    addr: port.host_ip.map_or(FrontendAddr::HostPort(family), FrontendAddr::Address),
                    protocol: port.protocol,
                    port: port.host_port,
                },
                Claim {
                    created: pod.created,
                    target: FrontendTarget { service: id.clone(), kind: FrontendKind::HostPort },
                },
            ));
            services.push((id, compiled));
        }
    }
    let placed = Placed {
        ports: services.iter().map(|(id, _)| id.clone()).collect(),
        claims: claims.into(),
        cluster_ips: [].into(),
        findings: pod.findings.clone().into(),
    };
    Compiled { placed, services, health: None, examined: 0 }
}

/// A node that reaches a VIP through itself uses the VIP as source, so the VIP is allowed when the node is (services.md 3.7).
fn source_ranges(ranges: &[IpNet], spec: &ServiceSpec, node: &NodeView, family: IpFamily) -> Arc<[IpNet]> {
    let mut nets = ranges.to_vec();
    if node.node_port_addresses.iter().any(|addr| ranges.iter().any(|n| n.contains(addr))) {
        nets.extend(spec.vips.iter().filter(|ip| IpFamily::of(ip) == family).map(|ip| IpNet::from(*ip)));
    }
    // Overlapping intervals are refused by the kernel's interval sets.
    IpNet::aggregate(&nets).into()
}

fn endpoints_of(
    world: &World,
    node: &NodeView,
    key: &ObjectKey,
    port: &ServicePort,
    family: IpFamily,
) -> Vec<Endpoint> {
    let listed = world.slices_of(key).filter(|s| s.family == Some(family)).flat_map(|slice| {
        slice
            .ports
            .iter()
            .filter(|p| p.name == port.name && p.protocol == port.protocol)
            .flat_map(|p| slice.endpoints.iter().map(move |e| (p.port, e)))
            .map(|(port, e)| Endpoint {
                backend: Backend { addr: e.addr, port },
                conditions: e.conditions,
                local: e.node.as_deref() == Some(&*node.name),
                unplaced: e.node.is_none(),
                hints: e.hints.clone(),
            })
    });
    endpoint::merge_duplicates(listed)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::eval::{self, Outcome, Packet};
    use crate::world::LocalDetection;
    use k8s_openapi::api::core::v1::{Pod, Service};
    use k8s_openapi::api::discovery::v1::EndpointSlice;
    use serde_json::{Value, json};

    /// A small deterministic generator: the seed of a failure is in its message.
    struct Random(u64);

    impl Random {
        fn below(&mut self, n: u64) -> u64 {
            self.0 = self.0.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
            (self.0 >> 33) % n
        }

        fn chance(&mut self, percent: u64) -> bool {
            self.below(100) < percent
        }

        fn pick<T: Clone>(&mut self, from: &[T]) -> T {
            from[self.below(from.len() as u64) as usize].clone()
        }
    }

    fn node(random: &mut Random) -> NodeView {
        NodeView {
            name: random.pick(&["n1", "n2"]).into(),
            zone: random.pick(&[None, Some("a".to_owned()), Some("b".to_owned())]),
            node_port_addresses: vec![
                "192.168.50.11".parse().unwrap(),
                random.pick(&["fd00:50::11", "fd00:50::12"]).parse().unwrap(),
            ],
            local_addresses: vec![random.pick(&["192.168.50.11", "192.168.50.12"]).parse().unwrap()],
            local_detection: LocalDetection::InterfacePrefix("vp".into()),
            masquerade_all: false,
        }
    }

    fn pod(random: &mut Random, name: &str) -> Pod {
        let ports: Vec<Value> = (0..random.below(3))
            .map(|_| {
                json!({
                    "containerPort": 8080 + random.below(2), "hostPort": 8000 + random.below(3),
                    "hostIP": random.pick(&["", "0.0.0.0", "192.168.50.11", "127.0.0.1", "nonsense"]),
                    "protocol": random.pick(&["TCP", "UDP"]),
                })
            })
            .collect();
        serde_json::from_value(json!({
            "metadata": {"namespace": "ns", "name": name, "creationTimestamp": format!("2026-01-0{}T00:00:00Z", random.below(3) + 1)},
            "spec": {"hostNetwork": random.chance(10), "containers": [{"name": "c", "ports": ports}]},
            "status": {"phase": random.pick(&["Running", "Succeeded"]), "podIP": format!("10.244.0.{}", random.below(6))},
        }))
        .unwrap()
    }

    fn service(random: &mut Random, name: &str) -> Service {
        let n = random.below(4) + 1;
        let v6 = random.chance(40);
        let kind = random.pick(&["ClusterIP", "NodePort", "LoadBalancer", "ExternalName"]);
        let mut ports: Vec<Value> = Vec::new();
        for i in 0..=random.below(2) {
            ports.push(json!({
                "name": format!("p{i}"), "port": 80 + random.below(3), "protocol": random.pick(&["TCP", "UDP"]),
                "nodePort": 30000 + random.below(4),
            }));
        }
        let ips = if v6 {
            json!([format!("10.96.0.{n}"), format!("fd00:10:96::{n}")])
        } else {
            json!([format!("10.96.0.{n}")])
        };
        let object = json!({
            "metadata": {
                "namespace": "ns", "name": name, "creationTimestamp": format!("2026-01-0{}T00:00:00Z", random.below(3) + 1),
                "labels": if random.chance(5) { json!({"service.kubernetes.io/service-proxy-name": "x"}) } else { json!({}) },
            },
            "spec": {
                "type": kind, "clusterIP": if random.chance(5) { json!("None") } else { ips[0].clone() }, "clusterIPs": ips, "ports": ports,
                "externalTrafficPolicy": random.pick(&["Cluster", "Local"]), "internalTrafficPolicy": random.pick(&["Cluster", "Local"]),
                "externalIPs": if random.chance(30) { json!([format!("198.51.100.{n}"), "garbage"]) } else { json!([]) },
                "loadBalancerSourceRanges": if random.chance(30) { json!(["192.168.50.0/24", "10.1.0.0/16"]) } else { json!([]) },
                "sessionAffinity": random.pick(&["None", "ClientIP"]),
                "healthCheckNodePort": 32000 + random.below(3),
            },
            "status": {"loadBalancer": {"ingress": if random.chance(70) { json!([{"ip": format!("203.0.113.{n}"), "ipMode": random.pick(&["VIP", "Proxy"])}]) } else { json!([]) }}},
        });
        serde_json::from_value(object).unwrap()
    }

    fn slice(random: &mut Random, name: &str) -> EndpointSlice {
        let v6 = random.chance(30);
        let endpoints: Vec<Value> = (0..random.below(5))
            .map(|_| {
                let n = random.below(6);
                let mut endpoint = json!({
                    "addresses": [if random.chance(4) { "nonsense".to_owned() } else if v6 { format!("fd00:1::{n}") } else { format!("10.244.0.{n}") }],
                    "nodeName": random.pick(&["n1", "n2"]),
                    "conditions": {"ready": random.chance(60), "serving": random.chance(70), "terminating": random.chance(30)},
                });
                if random.chance(40) {
                    endpoint["hints"] = json!({"forZones": [{"name": random.pick(&["a", "b"])}], "forNodes": [{"name": random.pick(&["n1", "n2"])}]});
                }
                endpoint
            })
            .collect();
        let ports: Vec<Value> = (0..2).map(|i| json!({"name": format!("p{i}"), "port": 8080 + random.below(2), "protocol": random.pick(&["TCP", "UDP"])})).collect();
        serde_json::from_value(json!({
            "metadata": {"namespace": "ns", "name": name, "labels": {"kubernetes.io/service-name": random.pick(&["s0", "s1", "s2", "s3"])}},
            "addressType": if v6 { "IPv6" } else { "IPv4" }, "endpoints": endpoints, "ports": ports,
        }))
        .unwrap()
    }

    #[test]
    fn incremental_planning_equals_planning_from_scratch() {
        for seed in 0..60 {
            let mut random = Random(seed);
            let mut world = World::default();
            let mut planner = Planner::new(node(&mut random));
            for step in 0..60 {
                let mut dirty = BTreeSet::new();
                let before = planner.map().clone();
                let mut delta = Delta::default();
                for _ in 0..=random.below(2) {
                    let name = random.pick(&["s0", "s1", "s2", "s3"]);
                    match random.below(14) {
                        0..=4 => {
                            let service = service(&mut random, name);
                            dirty.insert(world.put_service(&service));
                        }
                        5 => {
                            let key = ObjectKey::new("ns", name);
                            world.delete_service(&key);
                            dirty.insert(key);
                        }
                        6..=8 => {
                            let slice = slice(&mut random, name);
                            dirty.extend(world.put_slice(&slice));
                        }
                        12 => {
                            let pod = pod(&mut random, name);
                            dirty.insert(world.put_pod(&pod));
                        }
                        13 => {
                            dirty.insert(world.delete_pod("ns", name));
                        }
                        9 => dirty.extend(world.delete_slice(&ObjectKey::new("ns", name))),
                        10 => world.put_service_cidr(
                            "kubernetes",
                            if random.chance(50) { vec!["10.96.0.0/12".parse().unwrap()] } else { vec![] },
                        ),
                        _ => {
                            let node = node(&mut random);
                            delta.merge(planner.set_node(&world, node));
                        }
                    }
                }
                delta.merge(planner.update(&world, &dirty));
                let (scratch, findings) = compile(&world, planner.node());
                assert_eq!(*planner.map(), scratch, "seed {seed} step {step}");
                assert_eq!(planner.findings(), findings, "seed {seed} step {step}");
                let mut seen = Delta::between(&before, planner.map());
                seen.node = delta.node; // A zone changes the node without changing its addresses.
                let named = |d: &Delta| {
                    (d.frontends.clone(), d.services.clone(), d.health_checks.clone(), d.cluster_ips.clone())
                };
                let (all, told) = (named(&seen), named(&delta));
                // The delta may name what changed and changed back, but must not miss anything.
                assert!(
                    all.0.is_subset(&told.0)
                        && all.1.is_subset(&told.1)
                        && all.2.is_subset(&told.2)
                        && all.3.is_subset(&told.3),
                    "seed {seed} step {step}: {seen:?} {delta:?}"
                );
            }
        }
    }

    #[test]
    fn host_ports_lead_to_their_pod_on_the_addresses_they_name() {
        let pod = |name: &str, created: &str, ip: &str, ports: Value| -> Pod {
            serde_json::from_value(json!({
                "metadata": {"namespace": "ns", "name": name, "creationTimestamp": created},
                "spec": {"containers": [{"name": "c", "ports": ports}]},
                "status": {"phase": "Running", "podIP": ip},
            }))
            .unwrap()
        };
        let mut world = World::default();
        let on = |ip: &str, protocol: &str| json!([{"containerPort": 8080, "hostPort": 8000, "hostIP": ip, "protocol": protocol}]);
        world.put_pod(&pod("one", "2026-01-01T00:00:00Z", "10.244.1.2", on("192.168.50.11", "TCP")));
        world.put_pod(&pod("all", "2026-01-01T00:00:00Z", "10.244.1.3", on("", "UDP")));
        world.put_pod(&pod("loop", "2026-01-01T00:00:00Z", "10.244.1.4", on("127.0.0.1", "TCP")));
        world.put_pod(&pod("late", "2026-01-02T00:00:00Z", "10.244.1.5", on("0.0.0.0", "UDP")));
        let addresses = ["192.168.50.11", "10.0.0.1", "127.0.0.1"].map(|a| a.parse().unwrap());
        let node = NodeView { name: "n1".into(), local_addresses: addresses.to_vec(), ..NodeView::default() };
        let (map, findings) = compile(&world, &node);
        let rows = [
            ("192.168.50.11", L4::Tcp, Some("10.244.1.2")),
            ("10.0.0.1", L4::Tcp, None),
            ("192.168.50.11", L4::Udp, Some("10.244.1.3")),
            ("10.0.0.1", L4::Udp, Some("10.244.1.3")),
            ("10.0.0.2", L4::Udp, None),
            // Loopback is not translated.
            ("127.0.0.1", L4::Tcp, None),
            ("127.0.0.1", L4::Udp, None),
        ];
        for (destination, protocol, expected) in rows {
            let packet = Packet {
                source: "192.0.2.1".parse().unwrap(),
                destination: destination.parse().unwrap(),
                transport: Some((protocol, 8000.try_into().unwrap())),
                interface: Some("eth0".into()),
            };
            let reached = match eval::packet(&map, &node, &packet, |_| 0) {
                Outcome::Forwarded { backend, masqueraded: false, .. } => Some(backend.addr.to_string()),
                Outcome::Untouched => None,
                other => panic!("{destination}: {other:?}"),
            };
            assert_eq!(reached.as_deref(), expected, "{destination} {protocol:?}");
        }
        assert_eq!(findings.len(), 1);
        assert_eq!((findings[0].origin.name.as_str(), findings[0].reason.as_str()), ("late", "AddressConflict"));
    }

    #[test]
    fn the_older_service_keeps_a_contested_address() {
        let service = |name: &str, created: &str, ip: &str| -> Service {
            serde_json::from_value(json!({
                "metadata": {"namespace": "ns", "name": name, "creationTimestamp": created},
                "spec": {"clusterIP": ip, "ports": [{"port": 80}], "externalIPs": ["198.51.100.1"]},
            }))
            .unwrap()
        };
        let mut world = World::default();
        world.put_service(&service("younger", "2026-01-02T00:00:00Z", "10.96.0.1"));
        world.put_service(&service("older", "2026-01-01T00:00:00Z", "10.96.0.2"));
        let (map, findings) = compile(&world, &NodeView::default());
        let frontend = Frontend {
            addr: FrontendAddr::Address("198.51.100.1".parse().unwrap()),
            protocol: L4::Tcp,
            port: 80.try_into().unwrap(),
        };
        assert_eq!(map.frontends[&frontend].service.service.name, "older");
        assert_eq!(findings.len(), 1);
        assert_eq!((findings[0].origin.name.as_str(), findings[0].reason.as_str()), ("younger", "AddressConflict"));
    }

    #[test]
    fn verdicts_by_policy_and_source() {
        // Columns: externalTrafficPolicy, endpoints (local, remote), source, outcome and masquerading of a node port.
        let rows: Vec<(&str, bool, bool, SourceClass, &str)> = vec![
            ("Cluster", false, false, SourceClass::External, "reject"),
            ("Cluster", false, true, SourceClass::External, "snat"),
            ("Cluster", true, true, SourceClass::Pod, "snat"),
            ("Local", false, false, SourceClass::External, "reject"),
            ("Local", false, true, SourceClass::External, "drop"),
            ("Local", true, true, SourceClass::External, "keep"),
            ("Local", false, true, SourceClass::Pod, "keep"),
            ("Local", false, true, SourceClass::Host, "snat"),
        ];
        for (policy, local, remote, class, expected) in rows {
            let mut world = World::default();
            let service: Service = serde_json::from_value(json!({
                "metadata": {"namespace": "ns", "name": "s"},
                "spec": {"type": "NodePort", "clusterIP": "10.96.0.1", "externalTrafficPolicy": policy, "ports": [{"port": 80, "nodePort": 30080}]},
            }))
            .unwrap();
            world.put_service(&service);
            let mut endpoints = Vec::new();
            if local {
                endpoints.push(json!({"addresses": ["10.244.1.1"], "nodeName": "n1"}));
            }
            if remote {
                endpoints.push(json!({"addresses": ["10.244.2.1"], "nodeName": "n2"}));
            }
            let slice: EndpointSlice = serde_json::from_value(json!({
                "metadata": {"namespace": "ns", "name": "s-1", "labels": {"kubernetes.io/service-name": "s"}},
                "addressType": "IPv4", "ports": [{"name": "", "port": 8080}], "endpoints": endpoints,
            }))
            .unwrap();
            world.put_slice(&slice);
            let node = NodeView {
                name: "n1".into(),
                node_port_addresses: vec!["192.168.50.11".parse().unwrap()],
                local_detection: LocalDetection::InterfacePrefix("vp".into()),
                ..NodeView::default()
            };
            let (map, _) = compile(&world, &node);
            let packet = Packet {
                source: "192.0.2.1".parse().unwrap(),
                destination: "192.168.50.11".parse().unwrap(),
                transport: Some((L4::Tcp, 30080.try_into().unwrap())),
                interface: match class {
                    SourceClass::Pod => Some("vp1".into()),
                    SourceClass::Host => None,
                    SourceClass::External => Some("eth0".into()),
                },
            };
            let outcome = match eval::packet(&map, &node, &packet, |_| 0) {
                Outcome::Rejected => "reject",
                Outcome::Dropped => "drop",
                Outcome::Forwarded { masqueraded: true, .. } => "snat",
                Outcome::Forwarded { masqueraded: false, .. } => "keep",
                Outcome::Untouched => "untouched",
            };
            assert_eq!(outcome, expected, "{policy} local={local} remote={remote} {class:?}");
        }
    }
}
