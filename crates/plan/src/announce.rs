//! Load balancers: which address a Service gets and where its ports lead.
//!
//! Input are Services of type LoadBalancer, their EndpointSlices, Nodes and the address pools; output are addresses
//! ([`Allocator`]), findings about annotations and the [`Listener`]s that a provider puts into effect. Nothing here talks to
//! a kernel or an API server.

use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;

use ipnet::IpNet;
use k8s_openapi::api::core::v1::Service;

mod annotation;
mod listener;

pub use annotation::{Ignored, ignored_annotations, source_ranges, wants_instances};
pub use listener::{Listener, NodeTarget, SliceTargets, Target, TargetPort, listeners, slice_targets};

/// `namespace/name` of a Service.
pub type Key = String;

/// A transport protocol, as in a Service's port.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Protocol {
    /// TCP.
    Tcp,
    /// UDP.
    Udp,
    /// SCTP.
    Sctp,
}

impl Protocol {
    /// Reads the API's spelling; absent means TCP.
    pub fn parse(text: Option<&str>) -> Protocol {
        match text {
            Some("UDP") => Protocol::Udp,
            Some("SCTP") => Protocol::Sctp,
            _ => Protocol::Tcp,
        }
    }

    /// The API's spelling.
    pub fn as_str(self) -> &'static str {
        match self {
            Protocol::Tcp => "TCP",
            Protocol::Udp => "UDP",
            Protocol::Sctp => "SCTP",
        }
    }

    /// The number in an IP header.
    pub fn number(self) -> u8 {
        match self {
            Protocol::Tcp => 6,
            Protocol::Udp => 17,
            Protocol::Sctp => 132,
        }
    }
}

/// A pool of addresses.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Pool {
    /// Name, for Services that ask for a pool.
    pub name: String,
    /// Networks whose addresses are given out in order.
    pub networks: Vec<IpNet>,
    /// Whether Services that ask for nothing get addresses from here.
    pub auto_assign: bool,
    /// Leave out IPv4 addresses that end in 0 or 255, which some devices take for network or broadcast addresses.
    pub avoid_buggy_ips: bool,
}

impl Pool {
    /// A pool that everybody gets addresses from.
    pub fn new(name: &str, networks: Vec<IpNet>) -> Pool {
        Pool { name: name.into(), networks, auto_assign: true, avoid_buggy_ips: true }
    }

    fn contains(&self, address: IpAddr) -> bool {
        self.networks.iter().any(|n| n.contains(&address)) && !self.is_avoided(address)
    }

    fn is_avoided(&self, address: IpAddr) -> bool {
        match address {
            IpAddr::V4(a) => self.avoid_buggy_ips && matches!(a.octets()[3], 0 | 255),
            IpAddr::V6(_) => false,
        }
    }

    /// All addresses of a family, in order.
    fn addresses(&self, ipv6: bool) -> impl Iterator<Item = IpAddr> {
        let networks = self.networks.iter().filter(move |n| n.addr().is_ipv6() == ipv6);
        networks.flat_map(|n| Addresses::of(*n)).filter(|a| !self.is_avoided(*a))
    }
}

/// Every address of a network, the first and the last included.
struct Addresses(Option<(IpAddr, IpAddr)>);

impl Addresses {
    fn of(net: IpNet) -> Addresses {
        Addresses(Some((net.network(), net.broadcast())))
    }
}

impl Iterator for Addresses {
    type Item = IpAddr;

    fn next(&mut self) -> Option<IpAddr> {
        let (now, last) = self.0?;
        let next = match now {
            IpAddr::V4(a) => IpAddr::from(u32::from(a).wrapping_add(1).to_be_bytes()),
            IpAddr::V6(a) => IpAddr::from(u128::from(a).wrapping_add(1).to_be_bytes()),
        };
        self.0 = (now != last).then_some((next, last));
        Some(now)
    }
}

/// Why a Service gets no address. The texts are those of MetalLB, which users search for.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum AllocationError {
    /// Every pool that could serve is exhausted.
    #[error("no available IPs")]
    Exhausted,
    /// The pool asked for is exhausted.
    #[error("no available IPs in pool {0:?}")]
    PoolExhausted(String),
    /// There is no such pool.
    #[error("unknown pool {0:?}")]
    UnknownPool(String),
    /// The address asked for is in no pool.
    #[error("[{0:?}] is not allowed in config")]
    NotAllowed(String),
    /// The address asked for is not in the pool asked for.
    #[error("requested loadBalancer IP(s) {addresses:?} is not compatible with requested address pool {pool}")]
    WrongPool {
        /// The addresses asked for.
        addresses: String,
        /// The pool asked for.
        pool: String,
    },
    /// The address asked for has a family that the Service has not.
    #[error("requested loadBalancer IP(s) {0:?} does not match the ipFamily of the service")]
    WrongFamily(String),
    /// What is asked for is no address.
    #[error("invalid requested loadbalancer IPs: {0:?} is not an IP address")]
    Invalid(String),
    /// Annotation and field are both set.
    #[error("service can not have both {0} and svc.Spec.LoadBalancerIP")]
    AskedTwice(&'static str),
    /// Another Service has the address and shares it with nobody.
    #[error("existing service does not allow sharing")]
    ExistingDoesNotShare,
    /// Another Service has the address and this one does not share.
    #[error("new service does not allow sharing")]
    NewDoesNotShare,
    /// Both share, but not with each other.
    #[error("sharing key {new:?} does not match existing sharing key {existing:?}")]
    SharingKey {
        /// This Service's key.
        new: String,
        /// The key of the address.
        existing: String,
    },
    /// A port is taken by a Service that shares the address.
    #[error("port {} is already in use on {address:?}", lower(*protocol, *port))]
    PortInUse {
        /// Its protocol.
        protocol: Protocol,
        /// Its number.
        port: u16,
        /// The shared address.
        address: String,
    },
    /// A dual-stack Service without an address in one of its families.
    #[error("Service requires dual stack but no available IPs of family {0}")]
    DualStack(&'static str),
}

fn lower(protocol: Protocol, port: u16) -> String {
    format!("{}/{port}", protocol.as_str().to_ascii_lowercase())
}

impl AllocationError {
    /// Whether only an edit of the Service can help; otherwise a freed address may.
    pub fn needs_edit(&self) -> bool {
        match self {
            AllocationError::Invalid(_) | AllocationError::AskedTwice(_) | AllocationError::WrongFamily(_) => true,
            AllocationError::NotAllowed(_) | AllocationError::UnknownPool(_) | AllocationError::WrongPool { .. } => {
                true
            }
            AllocationError::Exhausted
            | AllocationError::PoolExhausted(_)
            | AllocationError::ExistingDoesNotShare
            | AllocationError::NewDoesNotShare
            | AllocationError::SharingKey { .. }
            | AllocationError::PortInUse { .. }
            | AllocationError::DualStack(_) => false,
        }
    }
}

const REQUESTED_IPS: [&str; 6] = [
    "metallb.io/loadBalancerIPs",
    "metallb.universe.tf/loadBalancerIPs",
    "lbipam.cilium.io/ips",
    "io.cilium/lb-ipam-ips",
    "kube-vip.io/loadbalancerIPs",
    "purelb.io/addresses",
];
const REQUESTED_POOL: [&str; 3] =
    ["metallb.io/address-pool", "metallb.universe.tf/address-pool", "purelb.io/service-group"];
const SHARING_KEY: [&str; 4] = [
    "metallb.io/allow-shared-ip",
    "metallb.universe.tf/allow-shared-ip",
    "lbipam.cilium.io/sharing-key",
    "purelb.io/allow-shared-ip",
];

/// What a Service asks of the pools.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Request {
    /// Whose request.
    pub key: Key,
    /// Whether each address wanted is IPv6, primary family first.
    pub families: Vec<bool>,
    /// Whether an address of every family is needed; otherwise the first suffices.
    pub all_families: bool,
    /// Addresses asked for; empty: any.
    pub addresses: Vec<IpAddr>,
    /// Pool asked for.
    pub pool: Option<String>,
    /// Services with one key may share an address.
    pub sharing_key: Option<String>,
    /// Ports that it listens on.
    pub ports: BTreeSet<(Protocol, u16)>,
    /// Addresses in its status, kept if they still fit.
    pub current: Vec<IpAddr>,
}

impl Request {
    /// Reads a Service.
    ///
    /// # Errors
    /// When addresses asked for cannot be read or are asked for in two ways.
    pub fn parse(service: &Service) -> Result<Request, AllocationError> {
        let spec = service.spec.clone().unwrap_or_default();
        let annotations = service.metadata.annotations.as_ref();
        let first = |names: &[&'static str]| {
            names
                .iter()
                .find_map(|name| Some((*name, annotations?.get(*name)?.trim())))
                .filter(|(_, value)| !value.is_empty())
        };
        let field = spec.load_balancer_ip.as_deref().filter(|ip| !ip.is_empty());
        let asked = match (first(&REQUESTED_IPS), field) {
            (Some((name, _)), Some(_)) => return Err(AllocationError::AskedTwice(name)),
            (Some((_, value)), None) => value,
            (None, field) => field.unwrap_or_default(),
        };
        let mut addresses = Vec::new();
        for text in asked.split(',').map(str::trim).filter(|t| !t.is_empty()) {
            addresses.push(text.parse().map_err(|_| AllocationError::Invalid(text.into()))?);
        }
        let listed = spec.ip_families.unwrap_or_default();
        let cluster_ips = spec.cluster_ips.unwrap_or_default();
        let mut families: Vec<bool> = listed.iter().map(|f| f == "IPv6").collect();
        if families.is_empty() {
            families.extend(
                cluster_ips.iter().chain(&spec.cluster_ip).filter_map(|ip| Some(ip.parse::<IpAddr>().ok()?.is_ipv6())),
            );
            families.dedup();
            families.truncate(2);
        }
        if families.is_empty() {
            families.push(false);
        }
        if addresses.iter().any(|a: &IpAddr| !families.contains(&a.is_ipv6())) {
            return Err(AllocationError::WrongFamily(asked.into()));
        }
        let status = service.status.as_ref().and_then(|s| s.load_balancer.as_ref()).and_then(|l| l.ingress.as_ref());
        let ports = spec.ports.unwrap_or_default();
        let ports =
            ports.iter().filter_map(|p| Some((Protocol::parse(p.protocol.as_deref()), u16::try_from(p.port).ok()?)));
        Ok(Request {
            key: service_key(service),
            families,
            all_families: spec.ip_family_policy.as_deref() == Some("RequireDualStack"),
            addresses,
            pool: first(&REQUESTED_POOL).map(|(_, value)| value.to_string()),
            sharing_key: first(&SHARING_KEY).map(|(_, value)| value.to_string()),
            ports: ports.collect(),
            current: status.into_iter().flatten().filter_map(|i| i.ip.as_deref()?.parse().ok()).collect(),
        })
    }
}

/// `namespace/name`.
pub fn service_key(service: &Service) -> Key {
    let meta = &service.metadata;
    format!("{}/{}", meta.namespace.as_deref().unwrap_or_default(), meta.name.as_deref().unwrap_or_default())
}

#[derive(Clone, Debug, PartialEq, Eq)]
struct Assignment {
    addresses: Vec<IpAddr>,
    sharing_key: Option<String>,
    ports: BTreeSet<(Protocol, u16)>,
}

/// Who has which address.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Allocator {
    pools: Vec<Pool>,
    assignments: BTreeMap<Key, Assignment>,
    holders: BTreeMap<IpAddr, BTreeSet<Key>>,
}

impl Allocator {
    /// Nothing given out yet.
    pub fn new(pools: Vec<Pool>) -> Allocator {
        Allocator { pools, ..Allocator::default() }
    }

    /// The addresses of a Service.
    pub fn addresses(&self, key: &str) -> &[IpAddr] {
        self.assignments.get(key).map_or(&[], |a| &a.addresses)
    }

    /// Every address given out, with the Services that hold it.
    pub fn holders(&self) -> &BTreeMap<IpAddr, BTreeSet<Key>> {
        &self.holders
    }

    /// Whether some pool has the address.
    pub fn covers(&self, address: IpAddr) -> bool {
        self.pools.iter().any(|p| p.contains(address))
    }

    /// Takes the addresses back; tells whether there were any.
    pub fn release(&mut self, key: &str) -> bool {
        let Some(assignment) = self.assignments.remove(key) else { return false };
        for address in &assignment.addresses {
            if let Some(holders) = self.holders.get_mut(address) {
                holders.remove(key);
                if holders.is_empty() {
                    self.holders.remove(address);
                }
            }
        }
        true
    }

    /// Gives addresses to a Service: those it asks for, those it has, or the first free ones, in that order.
    ///
    /// # Errors
    /// The most specific reason. What the Service had before, it keeps: an edit that cannot be met does not cut it off.
    pub fn allocate(&mut self, request: &Request) -> Result<Vec<IpAddr>, AllocationError> {
        let mut current = self.addresses(&request.key).to_vec();
        if current.is_empty() {
            current.clone_from(&request.current);
        }
        // Its own addresses never stand in a Service's way, so choosing does not need them released.
        let addresses = self.choose(request, &current)?;
        self.release(&request.key);
        for address in &addresses {
            self.holders.entry(*address).or_default().insert(request.key.clone());
        }
        let assignment = Assignment {
            addresses: addresses.clone(),
            sharing_key: request.sharing_key.clone(),
            ports: request.ports.clone(),
        };
        self.assignments.insert(request.key.clone(), assignment);
        Ok(addresses)
    }

    fn choose(&self, request: &Request, current: &[IpAddr]) -> Result<Vec<IpAddr>, AllocationError> {
        if let Some(pool) = &request.pool
            && !self.pools.iter().any(|p| p.name == *pool)
        {
            return Err(AllocationError::UnknownPool(pool.clone()));
        }
        let mut chosen = Vec::new();
        for (i, ipv6) in request.families.iter().enumerate() {
            let asked = request.addresses.iter().find(|a| a.is_ipv6() == *ipv6);
            let kept = || current.iter().find(|a| a.is_ipv6() == *ipv6 && self.may_keep(request, **a));
            let found = match asked {
                Some(address) => self.requested(request, *address),
                None => match kept() {
                    Some(address) => Ok(*address),
                    None => self.any(request, *ipv6),
                },
            };
            match found {
                Ok(address) => chosen.push(address),
                // The second family is a bonus unless it is required.
                Err(_) if i > 0 && !request.all_families && asked.is_none() => {}
                Err(AllocationError::Exhausted) if request.all_families => {
                    return Err(AllocationError::DualStack(if *ipv6 { "IPv6" } else { "IPv4" }));
                }
                Err(error) => return Err(error),
            }
        }
        Ok(chosen)
    }

    fn candidates<'a>(&'a self, request: &'a Request) -> impl Iterator<Item = &'a Pool> {
        self.pools.iter().filter(|p| match &request.pool {
            Some(name) => p.name == *name,
            None => p.auto_assign,
        })
    }

    /// An address stays with its Service as long as it could have asked for it.
    fn may_keep(&self, request: &Request, address: IpAddr) -> bool {
        let in_pool = match &request.pool {
            Some(name) => self.pools.iter().any(|p| p.name == *name && p.contains(address)),
            None => self.covers(address),
        };
        in_pool && self.is_free(request, address).is_ok()
    }

    fn requested(&self, request: &Request, address: IpAddr) -> Result<IpAddr, AllocationError> {
        if !self.covers(address) {
            return Err(AllocationError::NotAllowed(address.to_string()));
        }
        if let Some(pool) = &request.pool
            && !self.pools.iter().any(|p| p.name == *pool && p.contains(address))
        {
            return Err(AllocationError::WrongPool { addresses: address.to_string(), pool: pool.clone() });
        }
        self.is_free(request, address).map(|()| address)
    }

    fn any(&self, request: &Request, ipv6: bool) -> Result<IpAddr, AllocationError> {
        // Services that share want to be together.
        if let Some(key) = &request.sharing_key {
            let together = self.holders.iter().find(|(address, holders)| {
                address.is_ipv6() == ipv6
                    && holders.iter().any(|h| self.assignments.get(h).and_then(|a| a.sharing_key.as_ref()) == Some(key))
                    && self.candidates(request).any(|p| p.contains(**address))
                    && self.is_free(request, **address).is_ok()
            });
            if let Some((address, _)) = together {
                return Ok(*address);
            }
        }
        let mut free =
            self.candidates(request).flat_map(|p| p.addresses(ipv6)).filter(|a| !self.holders.contains_key(a));
        free.next().ok_or_else(|| match &request.pool {
            Some(pool) => AllocationError::PoolExhausted(pool.clone()),
            None => AllocationError::Exhausted,
        })
    }

    fn is_free(&self, request: &Request, address: IpAddr) -> Result<(), AllocationError> {
        let holders = self.holders.get(&address).into_iter().flatten();
        for holder in holders.filter(|h| **h != request.key).filter_map(|h| self.assignments.get(h)) {
            match (&holder.sharing_key, &request.sharing_key) {
                (None, _) => return Err(AllocationError::ExistingDoesNotShare),
                (Some(_), None) => return Err(AllocationError::NewDoesNotShare),
                (Some(existing), Some(new)) if existing != new => {
                    return Err(AllocationError::SharingKey { new: new.clone(), existing: existing.clone() });
                }
                (Some(_), Some(_)) => {
                    if let Some((protocol, port)) = holder.ports.intersection(&request.ports).next() {
                        let (protocol, port) = (*protocol, *port);
                        return Err(AllocationError::PortInUse { protocol, port, address: address.to_string() });
                    }
                }
            }
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests;
