//! Where each port of a load balancer leads.

use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;

use ipnet::IpNet;
use k8s_openapi::api::core::v1::Service;
use k8s_openapi::api::discovery::v1::EndpointSlice;

use super::{Key, Protocol, source_ranges, wants_instances};

/// Label of an EndpointSlice that names its Service.
const SERVICE_NAME: &str = "kubernetes.io/service-name";

/// A port of an EndpointSlice.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct TargetPort {
    name: Box<str>,
    protocol: Protocol,
    number: Option<u16>,
}

/// An address of an EndpointSlice.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Target {
    address: IpAddr,
    ready: bool,
    serving: bool,
    terminating: bool,
    node: Option<Box<str>>,
}

/// What of an EndpointSlice a load balancer needs.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct SliceTargets {
    /// `namespace/name` of the Service.
    pub service: Key,
    ports: Vec<TargetPort>,
    targets: Vec<Target>,
}

/// Reads an EndpointSlice; `None` for one without a Service or of a type that is no address.
pub fn slice_targets(slice: &EndpointSlice) -> Option<SliceTargets> {
    let name = slice.metadata.labels.as_ref()?.get(SERVICE_NAME)?;
    if slice.address_type != "IPv4" && slice.address_type != "IPv6" {
        return None;
    }
    let ports = slice.ports.iter().flatten().map(|p| TargetPort {
        name: p.name.as_deref().unwrap_or_default().into(),
        protocol: Protocol::parse(p.protocol.as_deref()),
        number: p.port.and_then(|n| u16::try_from(n).ok()),
    });
    let targets = slice.endpoints.iter().flatten().filter_map(|e| {
        let conditions = e.conditions.as_ref();
        // Unknown conditions: ready and serving count as true, terminating as false (EndpointConditions).
        let ready = conditions.and_then(|c| c.ready).unwrap_or(true);
        Some(Target {
            // The first address is the one to use; more than one has no defined meaning (Endpoint.addresses).
            address: e.addresses.first()?.parse().ok()?,
            ready,
            serving: conditions.and_then(|c| c.serving).unwrap_or(ready),
            terminating: conditions.and_then(|c| c.terminating).unwrap_or(false),
            node: e.node_name.as_deref().map(Into::into),
        })
    });
    Some(SliceTargets {
        service: format!("{}/{name}", slice.metadata.namespace.as_deref().unwrap_or_default()),
        ports: ports.collect(),
        targets: targets.collect(),
    })
}

/// A node that may take connections at its node ports.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct NodeTarget {
    /// Name of the Node.
    pub name: String,
    /// Its internal addresses.
    pub addresses: Vec<IpAddr>,
}

/// An address and port of a load balancer with the places its connections go to.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Listener {
    /// The load balancer's address.
    pub address: IpAddr,
    /// Transport protocol.
    pub protocol: Protocol,
    /// Port of the Service.
    pub port: u16,
    /// Addresses and ports of the targets, sorted; without any, connections are refused.
    pub targets: Vec<(IpAddr, u16)>,
    /// Networks that may connect; `None`: everybody.
    pub allowed: Option<Vec<IpNet>>,
}

/// The listeners of a Service at its addresses.
///
/// Targets are the ready endpoints; if there is none, those that still serve while terminating, so that a rolling update does
/// not refuse connections (KEP-1669). With node ports as targets and external traffic policy Local, only nodes that have such
/// an endpoint are targets, as their health checks would have it.
pub fn listeners(
    service: &Service,
    slices: &[&SliceTargets],
    nodes: &[NodeTarget],
    addresses: &[IpAddr],
) -> Vec<Listener> {
    let Some(spec) = &service.spec else { return Vec::new() };
    let allowed = source_ranges(service);
    let local = spec.external_traffic_policy.as_deref() == Some("Local");
    let mut listeners = Vec::new();
    for address in addresses {
        for port in spec.ports.iter().flatten() {
            let Ok(number) = u16::try_from(port.port) else { continue };
            let protocol = Protocol::parse(port.protocol.as_deref());
            let usable = usable(slices, port.name.as_deref().unwrap_or_default(), protocol, address.is_ipv6());
            let node_port = port.node_port.and_then(|n| u16::try_from(n).ok()).filter(|n| *n > 0);
            let targets: BTreeSet<(IpAddr, u16)> = match node_port {
                // Without a node port there is nothing to send to on a node; pods it is.
                Some(node_port) if wants_instances(service) => {
                    let here: BTreeSet<&str> = usable.values().filter_map(|t| t.node.as_deref()).collect();
                    let nodes = nodes.iter().filter(|n| !local || here.contains(&*n.name));
                    let addresses = nodes.filter_map(|n| n.addresses.iter().find(|a| a.is_ipv6() == address.is_ipv6()));
                    addresses.map(|a| (*a, node_port)).collect()
                }
                _ => usable.into_keys().collect(),
            };
            let allowed = allowed
                .as_ref()
                .map(|nets| nets.iter().filter(|n| n.addr().is_ipv6() == address.is_ipv6()).copied().collect());
            listeners.push(Listener {
                address: *address,
                protocol,
                port: number,
                targets: targets.into_iter().collect(),
                allowed,
            });
        }
    }
    listeners.sort();
    listeners
}

fn usable<'a>(
    slices: &[&'a SliceTargets],
    port_name: &str,
    protocol: Protocol,
    ipv6: bool,
) -> BTreeMap<(IpAddr, u16), &'a Target> {
    let (mut ready, mut leaving) = (BTreeMap::new(), BTreeMap::new());
    for slice in slices {
        let port = slice.ports.iter().find(|p| *p.name == *port_name && p.protocol == protocol);
        let Some(number) = port.and_then(|p| p.number) else { continue };
        for target in slice.targets.iter().filter(|t| t.address.is_ipv6() == ipv6) {
            if target.ready {
                ready.insert((target.address, number), target);
            } else if target.serving && target.terminating {
                leaving.insert((target.address, number), target);
            }
        }
    }
    if ready.is_empty() { leaving } else { ready }
}
