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
use crate::world::{Affinity, IpFamily, L4, NodeView, ObjectKey, ServicePort, ServiceSpec, TrafficPolicy, World};

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
    /// Health-check ports by Service.
    pub health_checks: BTreeMap<ObjectKey, HealthCheck>,
}

/// A port of a Service in one family.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub struct ServicePortId {
    /// The Service.
    pub service: ObjectKey,
    /// Name of the port; empty for the single unnamed one.
    pub port_name: String,
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
            FrontendAddr::NodePort(family) => family,
        }
    }
}

impl std::fmt::Display for Frontend {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self.addr {
            FrontendAddr::Address(addr) => write!(f, "{}", std::net::SocketAddr::new(addr, self.port.get()))?,
            FrontendAddr::NodePort(family) => write!(f, "{} node port {}", family.as_str(), self.port)?,
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
    /// The Service and its port.
    pub origin: Origin,
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
    /// Usable endpoints that run on this node; the ones that could be their own clients (hairpin).
    pub local_addrs: Arc<[IpAddr]>,
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
    fn of(set: Vec<Backend>, has_any: bool) -> Backends {
        if !set.is_empty() {
            Backends::Usable(set.into())
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
    /// The backends for one frontend kind and source class, and whether the client's address is replaced.
    ///
    /// This is the matrix of services.md 3.3. Hairpin traffic is masqueraded in any case. `pods_known` is whether pods of
    /// this node can be recognised; without it, cluster-IP traffic keeps its source.
    pub fn action(&self, kind: FrontendKind, class: SourceClass, pods_known: bool, masquerade_all: bool) -> (&Backends, bool) {
        match (kind, self.external_policy, class) {
            (FrontendKind::ClusterIp, _, SourceClass::Pod) => (&self.internal, masquerade_all),
            (FrontendKind::ClusterIp, _, SourceClass::Host | SourceClass::External) => (&self.internal, masquerade_all || pods_known),
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
    claims: BTreeMap<Frontend, BTreeSet<Claim>>,
    /// What each Service put into the map, to take it out again.
    placed: BTreeMap<ObjectKey, Placed>,
}

#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
struct Claim {
    created: i64,
    target: FrontendTarget,
}

#[derive(Clone, Debug, Default)]
struct Placed {
    ports: Vec<ServicePortId>,
    claims: Vec<(Frontend, Claim)>,
    cluster_ips: Vec<IpAddr>,
    findings: Vec<Finding>,
}

impl Planner {
    /// A planner for one node; nothing is planned yet.
    pub fn new(node: NodeView) -> Planner {
        let map = ServiceMap {
            node_port_addresses: node.node_port_addresses.iter().copied().collect(),
            service_ranges: IpFamily::ALL.iter().map(|f| (*f, Vec::new())).collect(),
            ..ServiceMap::default()
        };
        Planner { node, map, claims: BTreeMap::new(), placed: BTreeMap::new() }
    }

    /// The map as of the last update.
    pub fn map(&self) -> &ServiceMap {
        &self.map
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
        let mut delta = Delta { node: true, ..Delta::default() };
        self.map.node_port_addresses = node.node_port_addresses.iter().copied().collect();
        self.node = node;
        let mut keys = world.service_keys();
        keys.extend(self.placed.keys().cloned());
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
        let mut all = placed.findings.clone();
        for (frontend, claim) in &placed.claims {
            let winner = self.claims.get(frontend).and_then(BTreeSet::first);
            if let Some(winner) = winner.filter(|w| w.target.service.service != *key) {
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
            message: format!("{frontend} belongs to the older Service {}", winner.target.service.service),
        }
    }

    fn origin_of(&self, id: &ServicePortId) -> Origin {
        self.map.services.get(id).map(|s| s.origin.clone()).unwrap_or_default()
    }

    fn replace(&mut self, world: &World, key: &ObjectKey, delta: &mut Delta) {
        let fresh = world.service(key).map(|spec| compile_service(world, &self.node, key, spec));
        let old = self.placed.remove(key).unwrap_or_default();
        let (placed, services, health) = match fresh {
            Some(c) => (c.placed, c.services, c.health),
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
                claims.remove(claim);
                if claims.is_empty() {
                    self.claims.remove(frontend);
                }
            }
            self.settle(*frontend, delta);
        }
        for (frontend, claim) in placed.claims.iter().filter(|c| !old.claims.contains(c)) {
            self.claims.entry(*frontend).or_default().insert(claim.clone());
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
        if !placed.ports.is_empty() || !placed.findings.is_empty() || !placed.cluster_ips.is_empty() {
            self.placed.insert(key.clone(), placed);
        }
    }

    fn settle(&mut self, frontend: Frontend, delta: &mut Delta) {
        let winner = self.claims.get(&frontend).and_then(BTreeSet::first).map(|c| &c.target);
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
}

fn compile_service(world: &World, node: &NodeView, key: &ObjectKey, spec: &ServiceSpec) -> Compiled {
    let mut placed = Placed { cluster_ips: spec.cluster_ips.clone(), findings: spec.findings.clone(), ..Placed::default() };
    placed.findings.extend(world.slices_of(key).flat_map(|s| s.findings.iter().cloned()));
    let mut services = Vec::new();
    let mut local_ready: BTreeSet<IpAddr> = BTreeSet::new();
    for cluster_ip in &spec.cluster_ips {
        let family = IpFamily::of(cluster_ip);
        let ranges: Vec<IpNet> = spec.source_ranges.iter().filter(|n| IpFamily::of_net(n) == family).copied().collect();
        // Without a range of the VIP's family the VIP is open, as is a /0 (services.md 3.7).
        let restricted = !ranges.is_empty() && ranges.iter().all(|n| n.prefix_len() > 0);
        for (index, port) in spec.ports.iter().enumerate() {
            let id = ServicePortId { service: key.clone(), port_name: port.name.clone(), protocol: port.protocol, family };
            if services.iter().any(|(known, _)| known == &id) {
                continue; // The API forbids two ports of one name; the first counts.
            }
            let endpoints = endpoints_of(world, node, key, port, family);
            let selection = endpoint::select(&endpoints, node);
            local_ready.extend(&selection.local_ready);
            let short_circuit = Backends::of(selection.cluster.clone(), selection.has_any);
            let by_policy = |policy: TrafficPolicy| match policy {
                TrafficPolicy::Cluster => short_circuit.clone(),
                TrafficPolicy::Local => Backends::of(selection.local.clone(), selection.has_any),
            };
            let usable: BTreeSet<Backend> = selection.cluster.iter().chain(&selection.local).copied().collect();
            let local_addrs: BTreeSet<IpAddr> =
                endpoints.iter().filter(|e| e.local && usable.contains(&e.backend)).map(|e| e.backend.addr).collect();
            let compiled = CompiledService {
                origin: Origin { field: format!("spec.ports[{index}]"), ..spec.origin.clone() },
                affinity: spec.affinity,
                internal: by_policy(spec.internal_policy),
                external: by_policy(spec.external_policy),
                short_circuit: short_circuit.clone(),
                internal_policy: spec.internal_policy,
                external_policy: spec.external_policy,
                source_ranges: restricted.then(|| source_ranges(&ranges, spec, node, family)),
                serving: selection.serving.into(),
                local_addrs: local_addrs.into_iter().collect(),
            };

            let mut claim = |addr: FrontendAddr, number: NonZeroU16, kind: FrontendKind| {
                placed.claims.push((
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
            placed.ports.push(id.clone());
            services.push((id, compiled));
        }
    }
    let health = spec.health_check.map(|port| HealthCheck { port, local_endpoints: local_ready.len() });
    Compiled { placed, services, health }
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

fn endpoints_of(world: &World, node: &NodeView, key: &ObjectKey, port: &ServicePort, family: IpFamily) -> Vec<Endpoint> {
    let listed = world.slices_of(key).filter(|s| s.family == family).flat_map(|slice| {
        slice
            .ports
            .iter()
            .filter(|p| p.name == port.name && p.protocol == port.protocol)
            .flat_map(|p| slice.endpoints.iter().map(move |e| (p.port, e)))
            .map(|(port, e)| Endpoint {
                backend: Backend { addr: e.addr, port },
                conditions: e.conditions,
                local: e.node.as_deref() == Some(&*node.name),
                for_zones: e.for_zones.clone(),
                for_nodes: e.for_nodes.clone(),
            })
    });
    endpoint::merge_duplicates(listed)
}
