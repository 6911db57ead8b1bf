//! What a rule's backend refers to, resolved to endpoints separately from the routes, because endpoints change far more often.

use std::collections::BTreeSet;
use std::net::{IpAddr, SocketAddr};

use k8s_openapi::api::core::v1::Service;
use k8s_openapi::api::discovery::v1::EndpointSlice;
use k8s_openapi::apimachinery::pkg::util::intstr::IntOrString;
use serde::{Deserialize, Serialize};

use super::Profile;
use crate::finding::{Finding, Severity};
use crate::origin::Origin;
use crate::world::{ObjectKey, SERVICE_NAME_LABEL};

/// A port of a Service as a rule names it.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(untagged)]
pub enum PortRef {
    /// By `port.number`.
    Number(u16),
    /// By `port.name`.
    Name(String),
    /// The Service's first port: default backends name none.
    First,
}

impl std::fmt::Display for PortRef {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            PortRef::Number(number) => write!(f, "{number}"),
            PortRef::Name(name) => f.write_str(name),
            PortRef::First => f.write_str("0"),
        }
    }
}

/// A Service's port that rules forward to. Equal keys share endpoints.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub struct UpstreamKey {
    /// The Service, always in the namespace of the Ingress.
    pub service: ObjectKey,
    /// Its port.
    pub port: PortRef,
    /// Whether a port may also be found by its `targetPort` (an ingress-nginx habit).
    pub profile: Profile,
}

impl std::fmt::Display for UpstreamKey {
    /// ingress-nginx's upstream name, as access logs show it.
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{}-{}-{}", self.service.namespace, self.service.name, self.port)
    }
}

/// Why an upstream has no endpoints at the moment.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Absence {
    /// No such Service.
    ServiceNotFound,
    /// The Service has no such TCP port.
    PortNotFound,
    /// Nothing is ready.
    NoEndpoints,
    /// An ExternalName whose address is not known.
    Unresolved(String),
}

/// Where requests for an upstream may go.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Upstream {
    /// These addresses, sorted, never empty.
    Endpoints(Vec<SocketAddr>),
    /// A name to be resolved (Services of type ExternalName), and the port there.
    External {
        /// The DNS name.
        name: String,
        /// The port.
        port: u16,
    },
    /// Nowhere.
    None(Absence),
}

impl Upstream {
    /// What is wrong with it, about each of the rules that refer to it.
    pub fn findings(&self, key: &UpstreamKey, origins: &[Origin]) -> Vec<Finding> {
        let (reason, message) = match self {
            Upstream::Endpoints(_) | Upstream::External { .. } => return Vec::new(),
            Upstream::None(Absence::ServiceNotFound) => {
                ("ServiceNotFound", format!("Service {} does not exist; requests are answered with 503", key.service))
            }
            Upstream::None(Absence::PortNotFound) => (
                "PortNotFound",
                format!("Service {} has no TCP port {}; requests are answered with 503", key.service, key.port),
            ),
            Upstream::None(Absence::NoEndpoints) => (
                "NoEndpoints",
                format!("Service {} has no ready endpoint; requests are answered with 503", key.service),
            ),
            Upstream::None(Absence::Unresolved(name)) => (
                "ExternalNameUnresolved",
                format!(
                    "external name {name} of Service {} has no usable address; requests are answered with 503",
                    key.service
                ),
            ),
        };
        origins
            .iter()
            .map(|origin| Finding {
                origin: origin.clone(),
                severity: Severity::Warning,
                reason: reason.into(),
                message: message.clone(),
            })
            .collect()
    }
}

/// The fields of a Service that upstreams are resolved from.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct BackendService {
    /// The Service.
    pub key: ObjectKey,
    ports: Vec<BackendPort>,
    external_name: Option<String>,
}

#[derive(Clone, Debug, PartialEq, Eq)]
struct BackendPort {
    name: String,
    port: u16,
    target: Option<IntOrString>,
    tcp: bool,
}

impl BackendService {
    /// Takes what is needed from a Service.
    pub fn parse(service: &Service) -> BackendService {
        let spec = service.spec.as_ref();
        let ports = spec.and_then(|s| s.ports.as_deref()).unwrap_or_default();
        BackendService {
            key: ObjectKey::new(
                service.metadata.namespace.clone().unwrap_or_default(),
                service.metadata.name.clone().unwrap_or_default(),
            ),
            ports: ports
                .iter()
                .map(|p| BackendPort {
                    name: p.name.clone().unwrap_or_default(),
                    port: u16::try_from(p.port).unwrap_or(0),
                    target: p.target_port.clone(),
                    tcp: p.protocol.as_deref().is_none_or(|p| p == "TCP"),
                })
                .collect(),
            external_name: spec
                .filter(|s| s.type_.as_deref() == Some("ExternalName"))
                .and_then(|s| s.external_name.clone()),
        }
    }

    /// The port that a reference means, and whether only its `targetPort` matched.
    fn find(&self, reference: &PortRef, profile: Profile) -> Option<(&BackendPort, bool)> {
        let mut tcp = self.ports.iter().filter(|p| p.tcp);
        let by_port = match reference {
            PortRef::First => tcp.next(),
            PortRef::Number(number) => tcp.find(|p| p.port == *number),
            PortRef::Name(name) => tcp.find(|p| p.name == *name),
        };
        if let Some(port) = by_port {
            return Some((port, false));
        }
        if profile != Profile::NginxCompat {
            return None;
        }
        let target = |p: &&BackendPort| match (&p.target, reference) {
            (Some(IntOrString::Int(target)), PortRef::Number(number)) => *target == i32::from(*number),
            (Some(IntOrString::String(target)), PortRef::Name(name)) => target == name,
            _ => false,
        };
        self.ports.iter().filter(|p| p.tcp).find(target).map(|p| (p, true))
    }

    /// Whether a reference only works because it equals a `targetPort`, which plain Kubernetes would not accept.
    pub fn matches_target_port_only(&self, key: &UpstreamKey) -> bool {
        matches!(self.find(&key.port, key.profile), Some((_, true)))
    }
}

/// The fields of an EndpointSlice that upstreams are resolved from.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct BackendSlice {
    /// The Service that the slice belongs to.
    pub service: ObjectKey,
    ports: Vec<(String, Option<u16>)>,
    endpoints: Vec<(IpAddr, State)>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum State {
    Ready,
    /// Still serving while terminating: used only when nothing is ready (KEP-1669).
    Draining,
}

impl BackendSlice {
    /// Takes what is needed from an EndpointSlice; `None` when it belongs to no Service or holds no addresses.
    pub fn parse(slice: &EndpointSlice) -> Option<BackendSlice> {
        let service = slice.metadata.labels.as_ref()?.get(SERVICE_NAME_LABEL)?;
        if slice.address_type == "FQDN" {
            return None;
        }
        let ports = slice.ports.as_deref().unwrap_or_default();
        let mut endpoints = Vec::new();
        for endpoint in slice.endpoints.iter().flatten() {
            let conditions = endpoint.conditions.as_ref();
            let ready = conditions.and_then(|c| c.ready).unwrap_or(true);
            let serving = conditions.and_then(|c| c.serving).unwrap_or(ready);
            let terminating = conditions.and_then(|c| c.terminating).unwrap_or(false);
            let state = match (ready, serving && terminating) {
                (true, _) => State::Ready,
                (false, true) => State::Draining,
                (false, false) => continue,
            };
            // Only the first address counts: consumers must use any one of them (discovery.k8s.io/v1).
            if let Some(address) = endpoint.addresses.first().and_then(|a| a.parse().ok()) {
                endpoints.push((address, state));
            }
        }
        Some(BackendSlice {
            service: ObjectKey::new(slice.metadata.namespace.clone().unwrap_or_default(), service.clone()),
            ports: ports
                .iter()
                .filter(|p| p.protocol.as_deref().is_none_or(|p| p == "TCP"))
                .map(|p| (p.name.clone().unwrap_or_default(), p.port.and_then(|p| u16::try_from(p).ok())))
                .collect(),
            endpoints,
        })
    }
}

/// Resolves a rule's backend to endpoints. `slices` are those of the Service.
pub fn resolve<'a>(
    key: &UpstreamKey,
    service: Option<&BackendService>,
    slices: impl IntoIterator<Item = &'a BackendSlice>,
) -> Upstream {
    let Some(service) = service else { return Upstream::None(Absence::ServiceNotFound) };
    if let Some(name) = &service.external_name {
        // An ExternalName need not list its port.
        let port = match (service.find(&key.port, key.profile), &key.port) {
            (Some((BackendPort { target: Some(IntOrString::Int(target)), .. }, _)), PortRef::Name(_)) => {
                u16::try_from(*target).ok()
            }
            (Some((port, _)), _) => Some(port.port),
            (None, PortRef::Number(number)) => Some(*number),
            (None, _) => None,
        };
        return match port {
            Some(port) => Upstream::External { name: name.trim_end_matches('.').to_string(), port },
            None => Upstream::None(Absence::PortNotFound),
        };
    }
    let Some((port, _)) = service.find(&key.port, key.profile) else {
        return Upstream::None(Absence::PortNotFound);
    };
    let mut ready = BTreeSet::new();
    let mut draining = BTreeSet::new();
    for slice in slices {
        let number = if slice.ports.is_empty() {
            // A slice without ports allows all: the Service's numeric target port is meant.
            match &port.target {
                Some(IntOrString::Int(target)) => u16::try_from(*target).ok(),
                Some(IntOrString::String(_)) => None,
                None => Some(port.port),
            }
        } else {
            slice.ports.iter().find(|(name, _)| *name == port.name).and_then(|(_, number)| *number)
        };
        let Some(number) = number.filter(|n| *n != 0) else { continue };
        for (address, state) in &slice.endpoints {
            let set = if *state == State::Ready { &mut ready } else { &mut draining };
            set.insert(SocketAddr::new(*address, number));
        }
    }
    let usable = if ready.is_empty() { draining } else { ready };
    if usable.is_empty() {
        Upstream::None(Absence::NoEndpoints)
    } else {
        Upstream::Endpoints(usable.into_iter().collect())
    }
}
