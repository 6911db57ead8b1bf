//! The reference interpreter: says what a node does with the first packet of a flow, in the plainest code.
//!
//! It powers `portolan trace`, and tests hold the kernel's rules to it. It knows nothing of how rules are laid out.

use std::collections::BTreeSet;
use std::net::IpAddr;
use std::num::NonZeroU16;

use ipnet::IpNet;

use crate::endpoint::Backend;
use crate::service::{Backends, Frontend, FrontendAddr, FrontendKind, ServiceMap, ServicePortId, SourceClass};
use crate::world::{IpFamily, L4, LocalDetection, NodeView};

/// The first packet of a flow as it reaches a node, or leaves one of its own sockets.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Packet {
    /// Source address.
    pub source: IpAddr,
    /// Destination address.
    pub destination: IpAddr,
    /// Protocol, and destination port if it has ports; `None` for anything without (ICMP).
    pub transport: Option<(L4, NonZeroU16)>,
    /// Name of the interface that it came in on; `None` when the node itself sends it.
    pub interface: Option<String>,
}

/// What becomes of the packet.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Outcome {
    /// No Service: it takes the way that the node's routes give it.
    Untouched,
    /// Translated to a backend of a Service.
    Forwarded {
        /// The Service port.
        service: ServicePortId,
        /// The frontend that matched.
        kind: FrontendKind,
        /// Where to.
        backend: Backend,
        /// Whether the source becomes an address of the node.
        masqueraded: bool,
    },
    /// The sender is told that nobody is there.
    Rejected,
    /// Silence.
    Dropped,
}

/// Classifies the source of a packet (services.md 3.3). A packet of the node's own is [`SourceClass::Host`].
pub fn classify(node: &NodeView, packet: &Packet) -> SourceClass {
    let pod = match &node.local_detection {
        LocalDetection::Off => false,
        LocalDetection::InterfacePrefix(prefix) => packet.interface.as_deref().is_some_and(|i| i.starts_with(prefix)),
        LocalDetection::Networks(nets) => nets.iter().any(|n: &IpNet| n.contains(&packet.source)),
    };
    match (pod, &packet.interface) {
        (true, _) => SourceClass::Pod,
        (false, None) => SourceClass::Host,
        (false, Some(_)) => SourceClass::External,
    }
}

/// Interprets the map for one packet. `pick` chooses among `n` backends and answers an index below `n`; session affinity is
/// the caller's memory, since it is state and not part of the map.
pub fn packet(map: &ServiceMap, node: &NodeView, packet: &Packet, pick: impl FnOnce(&[Backend]) -> usize) -> Outcome {
    let class = classify(node, packet);
    // Loopback traffic never leaves the node's own sockets; ports there are served by sockets too.
    if packet.destination.is_loopback() {
        return Outcome::Untouched;
    }
    let found = packet.transport.and_then(|(protocol, port)| {
        let exact = Frontend { addr: FrontendAddr::Address(packet.destination), protocol, port };
        map.frontends.get(&exact).or_else(|| {
            let family = IpFamily::of(&packet.destination);
            let node_port = Frontend { addr: FrontendAddr::NodePort(family), protocol, port };
            let host_port = Frontend { addr: FrontendAddr::HostPort(family), protocol, port };
            let on = |addresses: &BTreeSet<IpAddr>, frontend| {
                addresses.contains(&packet.destination).then(|| map.frontends.get(frontend)).flatten()
            };
            on(&map.node_port_addresses, &node_port).or_else(|| on(&map.local_addresses, &host_port))
        })
    });
    let Some(target) = found else {
        return if map.cluster_ips.contains_key(&packet.destination) {
            Outcome::Rejected
        } else if map.service_ranges.values().flatten().any(|n| n.contains(&packet.destination)) {
            Outcome::Dropped
        } else {
            Outcome::Untouched
        };
    };
    let Some(service) = map.services.get(&target.service) else { return Outcome::Untouched };
    if target.kind == FrontendKind::LoadBalancer
        && service.source_ranges.as_ref().is_some_and(|nets| !nets.iter().any(|n| n.contains(&packet.source)))
    {
        return Outcome::Dropped;
    }
    let pods_known = match &node.local_detection {
        LocalDetection::Off => false,
        LocalDetection::InterfacePrefix(_) => true,
        LocalDetection::Networks(nets) => nets.iter().any(|n| IpFamily::of_net(n) == IpFamily::of(&packet.destination)),
    };
    let (backends, masquerade) = service.action(target.kind, class, pods_known, node.masquerade_all);
    match backends {
        Backends::Reject => Outcome::Rejected,
        Backends::Drop => Outcome::Dropped,
        Backends::Usable(set) => {
            let backend = set[pick(set) % set.len()];
            // A pod that reaches itself must see another source than itself, or it would answer itself directly. Only the
            // node of the pod does that: anywhere else a packet with such a source has gone astray.
            let own = || map.services.values().any(|s| s.hairpin_addrs.contains(&backend.addr));
            let masqueraded = masquerade || backend.addr == packet.source && own();
            Outcome::Forwarded { service: target.service.clone(), kind: target.kind, backend, masqueraded }
        }
    }
}
