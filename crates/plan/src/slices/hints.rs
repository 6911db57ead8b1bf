//! Topology hints of endpoints: `trafficDistribution` (KEP-4444, KEP-3015) and the older proportional mode (KEP-2433).

use std::collections::BTreeMap;

use k8s_openapi::api::core::v1::Service;
use k8s_openapi::api::discovery::v1::{Endpoint, EndpointHints, ForNode, ForZone};

use super::{Family, PortSet, Topology};

/// Annotation that asks for the proportional mode.
const TOPOLOGY_MODE: &str = "service.kubernetes.io/topology-mode";
/// Its deprecated name, which wins when both are there.
const TOPOLOGY_AWARE_HINTS: &str = "service.kubernetes.io/topology-aware-hints";
/// How much busier than its share of CPU a zone may get before hints are withheld.
const OVERLOAD: f64 = 0.2;

/// How hints are chosen.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Mode {
    None,
    SameZone,
    SameNode,
    Proportional,
}

fn mode(service: &Service) -> Mode {
    let annotations = service.metadata.annotations.as_ref();
    let annotation = annotations.and_then(|a| a.get(TOPOLOGY_AWARE_HINTS).or_else(|| a.get(TOPOLOGY_MODE)));
    if annotation.is_some_and(|v| v == "Auto" || v == "auto") {
        return Mode::Proportional;
    }
    match service.spec.as_ref().and_then(|s| s.traffic_distribution.as_deref()) {
        Some("PreferClose" | "PreferSameZone") => Mode::SameZone,
        Some("PreferSameNode") => Mode::SameNode,
        _ => Mode::None,
    }
}

/// Whether the Service asks for hints in proportion to the CPU of zones, so that it depends on all nodes.
pub fn is_proportional(service: &Service) -> bool {
    mode(service) == Mode::Proportional
}

/// What [`assign`] reports.
pub(crate) struct Outcome {
    /// An event about the Service: (warning, reason, message).
    pub event: Option<(bool, &'static str, String)>,
    /// Whether proportional hints are in force.
    pub proportional: bool,
}

/// Sets the hints of all endpoints of one family. `was_proportional`: the last sync had proportional hints.
pub(crate) fn assign(
    service: &Service,
    family: Family,
    groups: &mut BTreeMap<PortSet, Vec<Endpoint>>,
    topology: &Topology,
    was_proportional: bool,
) -> Outcome {
    let mode = mode(service);
    let mut outcome = Outcome { event: None, proportional: false };
    match mode {
        Mode::None => {}
        Mode::SameZone | Mode::SameNode => {
            for endpoint in groups.values_mut().flatten().filter(|e| is_ready(e)) {
                let for_zones = endpoint.zone.clone().map(|name| vec![ForZone { name }]);
                let for_nodes =
                    endpoint.node_name.clone().filter(|_| mode == Mode::SameNode).map(|name| vec![ForNode { name }]);
                endpoint.hints =
                    (for_zones.is_some() || for_nodes.is_some()).then_some(EndpointHints { for_nodes, for_zones });
            }
        }
        Mode::Proportional => match proportional(groups, topology) {
            Ok(()) => {
                outcome.proportional = true;
                if !was_proportional {
                    let message = format!("Topology Aware Hints has been enabled, addressType: {}", family.as_str());
                    outcome.event = Some((false, "TopologyAwareHintsEnabled", message));
                }
            }
            Err(reason) => {
                let message = format!("{reason}, addressType: {}", family.as_str());
                outcome.event = Some((true, "TopologyAwareHintsDisabled", message));
            }
        },
    }
    outcome
}

fn is_ready(endpoint: &Endpoint) -> bool {
    endpoint.conditions.as_ref().and_then(|c| c.ready) != Some(false)
}

/// Each zone's part of the allocatable CPU of the ready nodes.
fn cpu_shares(topology: &Topology) -> Result<BTreeMap<&str, f64>, String> {
    const INCOMPLETE: &str =
        "Insufficient Node information: allocatable CPU or zone not specified on one or more nodes";
    let mut zones: BTreeMap<&str, u64> = BTreeMap::new();
    for node in topology.nodes.values().filter(|n| n.ready && !n.control_plane) {
        match node.zone.as_deref() {
            Some(zone) if node.cpu_milli > 0 => *zones.entry(zone).or_default() += node.cpu_milli,
            _ => return Err(INCOMPLETE.into()),
        }
    }
    match zones.len() {
        0 => return Err(INCOMPLETE.into()),
        1 => return Err("Nodes only ready in one zone".into()),
        _ => {}
    }
    let total: u64 = zones.values().sum();
    Ok(zones.into_iter().map(|(zone, cpu)| (zone, cpu as f64 / total as f64)).collect())
}

/// Gives every ready endpoint a zone so that zones get endpoints in proportion to their CPU. Leaves all without hints on failure.
fn proportional(groups: &mut BTreeMap<PortSet, Vec<Endpoint>>, topology: &Topology) -> Result<(), String> {
    let shares = cpu_shares(topology)?;
    let mut ready: Vec<&mut Endpoint> = groups.values_mut().flatten().filter(|e| is_ready(e)).collect();
    ready.sort_by(|a, b| a.addresses.cmp(&b.addresses));
    let total = ready.len();
    if total < shares.len() {
        return Err(format!("Insufficient number of endpoints ({total} endpoints, {} zones)", shares.len()));
    }
    let desired: BTreeMap<&str, f64> = shares.iter().map(|(zone, share)| (*zone, share * total as f64)).collect();
    let minimum: BTreeMap<&str, usize> =
        desired.iter().map(|(zone, wanted)| (*zone, (wanted / (1.0 + OVERLOAD)).ceil() as usize)).collect();
    let needed: usize = minimum.values().sum();
    if needed > total {
        return Err(format!(
            "Unable to allocate minimum required endpoints to each zone without exceeding overload threshold \
             ({total} endpoints, {} zones)",
            shares.len()
        ));
    }
    let mut by_zone: BTreeMap<&str, Vec<usize>> = shares.keys().map(|zone| (*zone, Vec::new())).collect();
    for (index, endpoint) in ready.iter().enumerate() {
        let Some(zone) = endpoint.zone.as_deref().filter(|z| !z.is_empty()) else {
            return Err("One or more endpoints do not have a zone specified".into());
        };
        // An endpoint in a zone without ready nodes can only be given away.
        match shares.get_key_value(zone) {
            Some((zone, _)) => by_zone.entry(zone).or_default().push(index),
            None => by_zone.entry("").or_default().push(index),
        }
    }
    // Own zone first; then zones with more than they want give to those that lack their minimum.
    let mut zone_of: Vec<&str> = vec![""; total];
    let mut count: BTreeMap<&str, usize> = BTreeMap::new();
    for (zone, members) in &by_zone {
        for index in members {
            zone_of[*index] = zone;
        }
        count.insert(zone, members.len());
    }
    loop {
        let homeless = zone_of.iter().position(|z| z.is_empty());
        let poorest = shares
            .keys()
            .filter(|z| homeless.is_some() || count[**z] < minimum[**z])
            .max_by(|a, b| {
                let lack = |z: &str| desired[z] - count[z] as f64;
                lack(a).total_cmp(&lack(b)).then_with(|| b.cmp(a))
            })
            .copied();
        let Some(receiver) = poorest else { break };
        let donor = homeless.or_else(|| {
            let richest = shares
                .keys()
                .filter(|z| count[**z] > minimum[**z])
                .max_by(|a, b| {
                    let surplus = |z: &str| count[z] as f64 - desired[z];
                    surplus(a).total_cmp(&surplus(b)).then_with(|| b.cmp(a))
                })
                .copied()?;
            zone_of.iter().rposition(|z| *z == richest)
        });
        let Some(index) = donor else { break };
        *count.entry(zone_of[index]).or_default() -= 1;
        *count.entry(receiver).or_default() += 1;
        zone_of[index] = receiver;
    }
    for (endpoint, zone) in ready.into_iter().zip(zone_of) {
        endpoint.hints =
            Some(EndpointHints { for_zones: Some(vec![ForZone { name: zone.to_string() }]), for_nodes: None });
    }
    Ok(())
}

/// A CPU quantity in thousandths of a core, for the forms that nodes use: `4`, `3920m`, `1.5`.
pub(crate) fn cpu_milli(text: &str) -> Option<u64> {
    if let Some(milli) = text.strip_suffix('m') {
        return milli.parse().ok();
    }
    let cores: f64 = text.parse().ok()?;
    (cores.is_finite() && cores >= 0.0).then_some((cores * 1000.0).round() as u64)
}
