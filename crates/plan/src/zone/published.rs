//! Names published to the network around the cluster: hosts of Ingresses and annotated Services.
//!
//! Input are Ingresses and Services with the addresses in their status, output a table from host names to targets. The
//! annotations are those of external-dns, so that manifests written for it work unchanged.

use std::collections::{BTreeMap, BTreeSet, HashSet};
use std::net::IpAddr;
use std::sync::Arc;

use k8s_openapi::api::core::v1::Service;
use k8s_openapi::api::networking::v1::Ingress;

const HOSTNAME: &str = "external-dns.alpha.kubernetes.io/hostname";
const TARGET: &str = "external-dns.alpha.kubernetes.io/target";
const TTL: &str = "external-dns.alpha.kubernetes.io/ttl";

/// Where a published name leads.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Target {
    /// An address.
    Address(IpAddr),
    /// Another name, lower case, without the final dot.
    Name(Box<str>),
}

/// What one object publishes under one host.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Host {
    /// Sorted, never empty.
    pub targets: Vec<Target>,
    /// Seconds, if an object asks for a certain TTL; the smallest wins.
    pub ttl: Option<u32>,
}

/// Published names at one moment. Clones share the table.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Published {
    hosts: Arc<BTreeMap<Box<str>, Host>>,
    /// Unix seconds of the latest change.
    pub serial: u32,
    /// Whether all lists have been read once.
    pub synced: bool,
}

impl Published {
    /// The host that answers for `name` (lower case, no final dot): itself, or the wildcard at its closest encloser
    /// (RFC 4592 section 3.3.1: a name that exists keeps wildcards above it from what is below it).
    pub fn find(&self, name: &str) -> Option<&Host> {
        if let Some(host) = self.hosts.get(name) {
            return Some(host);
        }
        let mut rest = name;
        while let Some((_, parent)) = rest.split_once('.') {
            if let Some(host) = self.hosts.get(&*format!("*.{parent}")) {
                return Some(host);
            }
            if self.hosts.contains_key(parent) {
                return None;
            }
            rest = parent;
        }
        None
    }

    /// All hosts, sorted.
    pub fn hosts(&self) -> impl Iterator<Item = (&str, &Host)> {
        self.hosts.iter().map(|(name, host)| (&**name, host))
    }
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
enum Kind {
    Ingress,
    Service,
}

type Id = (Kind, Box<str>, Box<str>);
type Claims = BTreeMap<Box<str>, Host>;

/// Applies Ingresses and Services to a [`Published`] table. Each method tells whether some answer may have changed.
#[derive(Clone, Debug, Default)]
pub struct PublishedBuilder {
    claims: BTreeMap<Id, Claims>,
    current: Published,
}

impl PublishedBuilder {
    /// The table as it stands.
    pub fn current(&self) -> &Published {
        &self.current
    }

    /// Records that a change was made at `now` (Unix seconds).
    pub fn touch(&mut self, now: u32) {
        self.current.serial = now;
    }

    /// Records that all lists have been read.
    pub fn set_synced(&mut self) {
        self.current.synced = true;
    }

    /// Adds or updates an Ingress: the hosts of its rules and of the hostname annotation.
    pub fn set_ingress(&mut self, ingress: &Ingress) -> bool {
        let meta = &ingress.metadata;
        let id = (Kind::Ingress, text(&meta.namespace), text(&meta.name));
        let rules = ingress.spec.as_ref().and_then(|s| s.rules.as_deref()).unwrap_or_default();
        let hosts = rules.iter().filter_map(|r| r.host.as_deref());
        let status = ingress.status.as_ref().and_then(|s| s.load_balancer.as_ref()).and_then(|l| l.ingress.as_deref());
        let from_status =
            status.unwrap_or_default().iter().filter_map(|i| target(i.ip.as_deref(), i.hostname.as_deref()));
        self.replace(id, claims(hosts, meta.annotations.as_ref(), from_status))
    }

    /// Adds or updates a Service: the hosts of its hostname annotation, if it is of type LoadBalancer.
    pub fn set_service(&mut self, service: &Service) -> bool {
        let meta = &service.metadata;
        let id = (Kind::Service, text(&meta.namespace), text(&meta.name));
        if service.spec.as_ref().and_then(|s| s.type_.as_deref()) != Some("LoadBalancer") {
            return self.replace(id, Claims::new());
        }
        let status = service.status.as_ref().and_then(|s| s.load_balancer.as_ref()).and_then(|l| l.ingress.as_deref());
        let from_status =
            status.unwrap_or_default().iter().filter_map(|i| target(i.ip.as_deref(), i.hostname.as_deref()));
        self.replace(id, claims(std::iter::empty(), meta.annotations.as_ref(), from_status))
    }

    /// Removes an Ingress.
    pub fn delete_ingress(&mut self, namespace: &str, name: &str) -> bool {
        self.replace((Kind::Ingress, namespace.into(), name.into()), Claims::new())
    }

    /// Removes a Service.
    pub fn delete_service(&mut self, namespace: &str, name: &str) -> bool {
        self.replace((Kind::Service, namespace.into(), name.into()), Claims::new())
    }

    /// Removes the Ingresses that a complete list (`namespace/name`) did not have.
    pub fn retain_ingresses(&mut self, listed: &HashSet<String>) -> bool {
        self.retain(Kind::Ingress, listed)
    }

    /// Removes the Services that a complete list (`namespace/name`) did not have.
    pub fn retain_services(&mut self, listed: &HashSet<String>) -> bool {
        self.retain(Kind::Service, listed)
    }

    fn retain(&mut self, kind: Kind, listed: &HashSet<String>) -> bool {
        let known = self.claims.keys().filter(|(k, ..)| *k == kind);
        let gone: Vec<Id> = known.filter(|(_, ns, n)| !listed.contains(&format!("{ns}/{n}"))).cloned().collect();
        gone.into_iter().fold(false, |changed, id| self.replace(id, Claims::new()) | changed)
    }

    fn replace(&mut self, id: Id, new: Claims) -> bool {
        let old = self.claims.remove(&id).unwrap_or_default();
        if old == new {
            if !new.is_empty() {
                self.claims.insert(id, new);
            }
            return false;
        }
        let touched: BTreeSet<Box<str>> = old.keys().chain(new.keys()).cloned().collect();
        if !new.is_empty() {
            self.claims.insert(id, new);
        }
        let hosts = Arc::make_mut(&mut self.current.hosts);
        let mut changed = false;
        for name in touched {
            // Several objects may share a host; the answer is the union of their targets.
            let mut merged = Host::default();
            for host in self.claims.values().filter_map(|c| c.get(&name)) {
                merged.targets.extend(host.targets.iter().cloned());
                merged.ttl = merged.ttl.into_iter().chain(host.ttl).min();
            }
            merged.targets.sort();
            merged.targets.dedup();
            changed |= if merged.targets.is_empty() {
                hosts.remove(&name).is_some()
            } else {
                hosts.insert(name, merged.clone()).as_ref() != Some(&merged)
            };
        }
        changed
    }
}

fn text(value: &Option<String>) -> Box<str> {
    value.as_deref().unwrap_or_default().into()
}

fn target(ip: Option<&str>, hostname: Option<&str>) -> Option<Target> {
    match ip.and_then(|ip| ip.parse().ok()) {
        Some(address) => Some(Target::Address(address)),
        None => hostname.and_then(host_name).map(Target::Name),
    }
}

/// A host as a key: lower case, no final dot. `None` for what cannot be a name.
fn host_name(host: &str) -> Option<Box<str>> {
    let host = host.trim().trim_end_matches('.').to_ascii_lowercase();
    let valid = !host.is_empty() && host.len() <= 253 && host.split('.').all(|l| !l.is_empty() && l.len() <= 63);
    valid.then(|| host.into())
}

fn claims<'a>(
    hosts: impl Iterator<Item = &'a str>,
    annotations: Option<&'a BTreeMap<String, String>>,
    from_status: impl Iterator<Item = Target>,
) -> Claims {
    let annotation = |key| annotations.and_then(|a| a.get(key)).map(String::as_str);
    let listed = |key| annotation(key).unwrap_or_default().split(',');
    let overridden = listed(TARGET).filter(|t| !t.trim().is_empty());
    let mut targets: Vec<Target> = overridden.filter_map(|t| target(Some(t.trim()), Some(t))).collect();
    if targets.is_empty() {
        targets.extend(from_status);
    }
    targets.sort();
    targets.dedup();
    if targets.is_empty() {
        return Claims::new();
    }
    let ttl = annotation(TTL).and_then(seconds);
    let host = Host { targets, ttl };
    hosts.chain(listed(HOSTNAME)).filter_map(host_name).map(|name| (name, host.clone())).collect()
}

/// Seconds as a number or as a simple duration (`90`, `90s`, `5m`, `1h`).
fn seconds(text: &str) -> Option<u32> {
    let text = text.trim();
    let (digits, unit) = text.split_at(text.find(|c: char| !c.is_ascii_digit()).unwrap_or(text.len()));
    let factor = match unit {
        "" | "s" => 1,
        "m" => 60,
        "h" => 3600,
        _ => return None,
    };
    digits.parse::<u32>().ok()?.checked_mul(factor)
}
