//! The names of the cluster: what cluster DNS answers from.
//!
//! Input are Namespaces, Services, EndpointSlices and (in `verified` pod mode) Pods; output is a [`ZoneSet`], a value that
//! is cheap to clone and never changes, so a server publishes a new one with one pointer swap and queries take no lock.
//! The grammar of names, record types and response codes are the DNS server's business; here is only what exists.
//!
//! Changes are applied one object at a time by [`ZoneBuilder`]; applying the same objects in any order gives an equal set.

mod published;

pub use published::{Host, Published, PublishedBuilder, Target};

use std::collections::{BTreeMap, BTreeSet, HashMap, HashSet};
use std::hash::Hash;
use std::net::IpAddr;
use std::sync::Arc;

use k8s_openapi::api::core::v1::{Namespace, Pod, Service};
use k8s_openapi::api::discovery::v1::EndpointSlice;

/// Label of an EndpointSlice that names its Service.
const SERVICE_NAME: &str = "kubernetes.io/service-name";

/// Which namespaces have names. Hidden and missing namespaces cannot be told apart.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub enum Exposure {
    /// Every namespace.
    #[default]
    All,
    /// Only these.
    Named(BTreeSet<String>),
    /// Only namespaces carrying all these labels.
    Labelled(BTreeMap<String, String>),
}

/// How `<ip>.<namespace>.pod` names are answered (removed from the DNS schema in 1.1.0, still widely configured).
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum PodMode {
    /// There are no pod names.
    #[default]
    Disabled,
    /// Every address has a name in every existing namespace.
    Insecure,
    /// Only addresses of live pods of that namespace.
    Verified,
}

/// Choices that shape the set.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Options {
    /// Which namespaces have names.
    pub exposure: Exposure,
    /// Name endpoints without a hostname after their pod instead of their address.
    pub endpoint_pod_names: bool,
    /// Pod names.
    pub pods: PodMode,
}

/// A transport protocol that a port may have.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Protocol {
    /// TCP, also when the object does not say.
    Tcp,
    /// UDP.
    Udp,
    /// SCTP.
    Sctp,
}

impl Protocol {
    fn parse(text: Option<&str>) -> Protocol {
        match text {
            Some("UDP") => Protocol::Udp,
            Some("SCTP") => Protocol::Sctp,
            _ => Protocol::Tcp,
        }
    }

    /// As in a `_port._proto` name, without the underscore.
    pub fn label(self) -> &'static str {
        match self {
            Protocol::Tcp => "tcp",
            Protocol::Udp => "udp",
            Protocol::Sctp => "sctp",
        }
    }
}

/// A port of a Service or of the endpoints of one slice.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct Port {
    /// Empty when unnamed.
    pub name: Box<str>,
    /// Transport protocol.
    pub protocol: Protocol,
    /// Number; `None` when the slice leaves it open, which gives no SRV record.
    pub number: Option<u16>,
}

/// One ready address of a Service.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Endpoint {
    /// The address, of the family of its slice.
    pub address: IpAddr,
    /// The hostname (or the pod's name, if so configured). `None`: the name is the dashed address.
    pub name: Option<Box<str>>,
}

impl Endpoint {
    /// Appends the label below the Service that names this endpoint.
    pub fn write_label(&self, out: &mut String) {
        match &self.name {
            Some(name) => out.push_str(name),
            None => dashed(self.address, out),
        }
    }

    /// Whether `label` (lower case) names this endpoint.
    pub fn has_label(&self, label: &str) -> bool {
        match &self.name {
            Some(name) => **name == *label,
            None => {
                let mut own = String::new();
                dashed(self.address, &mut own);
                own == label
            }
        }
    }
}

/// Writes an address as one label: dots and colons become `-`, and a label may not end in `-`.
fn dashed(address: IpAddr, out: &mut String) {
    use std::fmt::Write;
    let start = out.len();
    // Writing to a String cannot fail.
    let _ = write!(out, "{address}");
    let text = out.split_off(start);
    out.extend(text.chars().map(|c| if c == '.' || c == ':' { '-' } else { c }));
    if out.ends_with('-') {
        out.push('0');
    }
}

/// The ready endpoints of one EndpointSlice.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Slice {
    name: Box<str>,
    /// No port means addresses without ports: A, AAAA and PTR, but no SRV.
    pub ports: Box<[Port]>,
    /// In the order of the object.
    pub endpoints: Box<[Endpoint]>,
}

/// What stands behind the name of a Service.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum ServiceKind {
    /// Its cluster addresses; empty while none is allocated.
    Cluster(Box<[IpAddr]>),
    /// Its endpoints.
    Headless,
    /// An alias to a name, or an address that DNS cannot express.
    External(Box<str>),
}

/// `name.namespace` of a Service: the labels as they stand in a query.
#[derive(Clone, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct ServiceKey(Box<str>);

impl ServiceKey {
    fn new(namespace: &str, name: &str) -> Arc<ServiceKey> {
        Arc::new(ServiceKey(format!("{name}.{namespace}").into()))
    }

    /// `name.namespace`.
    pub fn as_str(&self) -> &str {
        &self.0
    }

    /// Name of the Service.
    pub fn name(&self) -> &str {
        self.0.split_once('.').map_or(&self.0, |(name, _)| name)
    }

    /// Its namespace.
    pub fn namespace(&self) -> &str {
        self.0.split_once('.').map_or("", |(_, namespace)| namespace)
    }
}

impl std::borrow::Borrow<str> for ArcKey {
    fn borrow(&self) -> &str {
        self.0.as_str()
    }
}

/// A key of the maps below that can be looked up by text.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
struct ArcKey(Arc<ServiceKey>);

impl Hash for ArcKey {
    fn hash<H: std::hash::Hasher>(&self, state: &mut H) {
        self.0.as_str().hash(state);
    }
}

/// A Service and its slices. Slices may come before their Service and stay after it.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Entry {
    /// `None` while only slices are known.
    pub kind: Option<ServiceKind>,
    /// Ports of the Service.
    pub ports: Box<[Port]>,
    /// Slices by name.
    pub slices: Box<[Slice]>,
    /// Whether some address occurs twice, as it does while the controller moves endpoints between slices.
    pub overlapping: bool,
}

impl Entry {
    /// Whether no endpoint is ready.
    pub fn is_empty(&self) -> bool {
        self.slices.iter().all(|s| s.endpoints.is_empty())
    }

    /// All ready endpoints, with the ports of their slice.
    pub fn endpoints(&self) -> impl Iterator<Item = (&Endpoint, &[Port])> {
        self.slices.iter().flat_map(|s| s.endpoints.iter().map(move |e| (e, &*s.ports)))
    }

    fn is_unknown(&self) -> bool {
        self.kind.is_none() && self.slices.is_empty()
    }

    fn holds(&self, address: IpAddr) -> bool {
        self.endpoints().any(|(e, _)| e.address == address)
    }

    fn set_overlapping(&mut self) {
        let mut seen = HashSet::with_capacity(self.slices.iter().map(|s| s.endpoints.len()).sum());
        self.overlapping = !self.slices.iter().flat_map(|s| &s.endpoints).all(|e| seen.insert(e.address));
    }
}

/// Services that own an address, sorted. Nearly always one, so one costs no allocation.
#[derive(Clone, Debug, PartialEq, Eq)]
enum Owners {
    One(ArcKey),
    Many(Box<[ArcKey]>),
}

impl Owners {
    fn as_slice(&self) -> &[ArcKey] {
        match self {
            Owners::One(key) => std::slice::from_ref(key),
            Owners::Many(keys) => keys,
        }
    }
}

/// A map split in parts that are shared between clones until written, so that a change copies one small part.
#[derive(Debug)]
struct Shards<K, V>(Box<[Arc<HashMap<K, V>>]>);

/// 256 parts: a change in a cluster of 10 000 Services copies some forty entries, and publishing a set copies 256 pointers.
const SHARDS: usize = 256;

impl<K, V> Clone for Shards<K, V> {
    fn clone(&self) -> Self {
        Shards(self.0.clone())
    }
}

impl<K, V> Default for Shards<K, V> {
    fn default() -> Self {
        // All parts share one empty map until first written.
        let empty = Arc::new(HashMap::new());
        Shards((0..SHARDS).map(|_| Arc::clone(&empty)).collect())
    }
}

impl<K: Hash + Eq + Clone, V: Clone> Shards<K, V> {
    fn get<Q>(&self, part: usize, key: &Q) -> Option<&V>
    where
        K: std::borrow::Borrow<Q>,
        Q: Hash + Eq + ?Sized,
    {
        self.0[part].get(key)
    }

    fn part_mut(&mut self, part: usize) -> &mut HashMap<K, V> {
        Arc::make_mut(&mut self.0[part])
    }

    fn iter(&self) -> impl Iterator<Item = (&K, &V)> {
        self.0.iter().flat_map(|m| m.iter())
    }
}

impl<K: Hash + Eq, V: PartialEq> PartialEq for Shards<K, V> {
    fn eq(&self, other: &Self) -> bool {
        self.0 == other.0
    }
}

/// FNV-1a, folded to a part number. Only spreads keys over parts; the maps inside hash with a random seed.
fn part_of(bytes: &[u8]) -> usize {
    let hash = bytes.iter().fold(0xcbf2_9ce4_8422_2325_u64, |h, b| (h ^ u64::from(*b)).wrapping_mul(0x0100_0000_01b3));
    (hash ^ (hash >> 32)) as usize % SHARDS
}

fn part_of_address(address: IpAddr) -> usize {
    match address {
        IpAddr::V4(a) => part_of(&a.octets()),
        IpAddr::V6(a) => part_of(&a.octets()),
    }
}

/// Everything that has a name, at one moment.
#[derive(Clone, Debug, Default)]
pub struct ZoneSet {
    options: Options,
    namespaces: Arc<BTreeMap<Box<str>, bool>>,
    entries: Shards<ArcKey, Arc<Entry>>,
    cluster_ips: Shards<IpAddr, Owners>,
    endpoint_ips: Shards<IpAddr, Owners>,
    pods: Shards<IpAddr, Arc<BTreeSet<PodKey>>>,
    /// Unix seconds of the latest change that can alter an answer.
    pub serial: u32,
    /// Whether all lists have been read once. Before that a missing name is not known to be missing.
    pub synced: bool,
}

/// `(namespace, name)` of a Pod.
type PodKey = (Box<str>, Box<str>);

impl PartialEq for ZoneSet {
    /// Equal when all answers are equal; how and when the set came about (serial, synced) is left out.
    fn eq(&self, other: &Self) -> bool {
        self.options == other.options
            && self.namespaces == other.namespaces
            && self.entries == other.entries
            && self.cluster_ips == other.cluster_ips
            && self.endpoint_ips == other.endpoint_ips
            && self.pods == other.pods
    }
}

impl ZoneSet {
    /// How pod names are answered.
    pub fn pod_mode(&self) -> PodMode {
        self.options.pods
    }

    /// Whether the namespace exists and is exposed.
    pub fn has_namespace(&self, namespace: &str) -> bool {
        self.namespaces.get(namespace).copied().unwrap_or(false)
    }

    /// The Service called by `name.namespace`, if its namespace is exposed.
    pub fn service(&self, key: &str) -> Option<&Entry> {
        let (_, namespace) = key.split_once('.')?;
        self.has_namespace(namespace).then(|| self.entry(key)).flatten()
    }

    /// The Service called by `name.namespace`, whether or not its namespace is exposed.
    pub fn entry(&self, key: &str) -> Option<&Entry> {
        self.entries.get(part_of(key.as_bytes()), key).map(|e| &**e)
    }

    /// The Service that has this cluster address. Should two claim it, the first by name, always.
    pub fn cluster_ip_owner(&self, address: IpAddr) -> Option<&ServiceKey> {
        let owners = self.cluster_ips.get(part_of_address(address), &address)?;
        owners.as_slice().iter().map(|k| &*k.0).find(|k| self.is_reverse_visible(k))
    }

    /// The Services that have this address as a ready endpoint, sorted.
    pub fn endpoint_owners(&self, address: IpAddr) -> impl Iterator<Item = (&ServiceKey, &Entry)> {
        let owners = self.endpoint_ips.get(part_of_address(address), &address);
        let keys = owners.map(Owners::as_slice).unwrap_or_default();
        keys.iter()
            .map(|k| &*k.0)
            .filter(|k| self.is_reverse_visible(k))
            .filter_map(|k| Some((k, self.entry(k.as_str())?)))
    }

    /// A list of namespaces hides reverse names, a label selector does not; both as CoreDNS does.
    fn is_reverse_visible(&self, key: &ServiceKey) -> bool {
        match &self.options.exposure {
            Exposure::All | Exposure::Labelled(_) => true,
            Exposure::Named(names) => names.contains(key.namespace()) && self.has_namespace(key.namespace()),
        }
    }

    /// Whether a live pod of that namespace has the address.
    pub fn has_pod(&self, namespace: &str, address: IpAddr) -> bool {
        let pods = self.pods.get(part_of_address(address), &address);
        pods.is_some_and(|p| p.iter().any(|(ns, _)| **ns == *namespace))
    }

    /// Number of Services known.
    pub fn service_count(&self) -> usize {
        self.entries.iter().filter(|(_, e)| e.kind.is_some()).count()
    }
}

/// Applies objects to a [`ZoneSet`]. Each method tells whether some answer may have changed.
#[derive(Clone, Debug, Default)]
pub struct ZoneBuilder {
    set: ZoneSet,
    /// Which Service each slice was filed under, because a label may change and a relist may miss a deletion.
    slices: HashMap<(Box<str>, Box<str>), ArcKey>,
    pods: HashMap<PodKey, Box<[IpAddr]>>,
}

impl ZoneBuilder {
    /// An empty set.
    pub fn new(options: Options) -> ZoneBuilder {
        ZoneBuilder { set: ZoneSet { options, ..ZoneSet::default() }, ..ZoneBuilder::default() }
    }

    /// The set as it stands; clone it to publish it.
    pub fn set(&self) -> &ZoneSet {
        &self.set
    }

    /// Records that a change was made at `now` (Unix seconds): the serial of the zones.
    pub fn touch(&mut self, now: u32) {
        self.set.serial = now;
    }

    /// Records that all lists have been read.
    pub fn set_synced(&mut self) {
        self.set.synced = true;
    }

    /// Adds or updates a Namespace.
    pub fn set_namespace(&mut self, namespace: &Namespace) -> bool {
        let Some(name) = namespace.metadata.name.as_deref() else { return false };
        let exposed = match &self.set.options.exposure {
            Exposure::All => true,
            Exposure::Named(names) => names.contains(name),
            Exposure::Labelled(wanted) => {
                let labels = namespace.metadata.labels.as_ref();
                wanted.iter().all(|(k, v)| labels.and_then(|l| l.get(k)) == Some(v))
            }
        };
        if self.set.namespaces.get(name) == Some(&exposed) {
            return false;
        }
        Arc::make_mut(&mut self.set.namespaces).insert(name.into(), exposed);
        true
    }

    /// Removes a Namespace; its Services have no names until it comes back.
    pub fn delete_namespace(&mut self, name: &str) -> bool {
        self.set.namespaces.contains_key(name) && Arc::make_mut(&mut self.set.namespaces).remove(name).is_some()
    }

    /// Adds or updates a Service.
    pub fn set_service(&mut self, service: &Service) -> bool {
        let (Some(namespace), Some(name)) = (&service.metadata.namespace, &service.metadata.name) else { return false };
        let spec = service.spec.as_ref();
        let kind = service_kind(service);
        let ports = spec.and_then(|s| s.ports.as_deref()).unwrap_or_default();
        let ports: Box<[Port]> = ports
            .iter()
            .map(|p| Port {
                name: p.name.as_deref().unwrap_or_default().into(),
                protocol: Protocol::parse(p.protocol.as_deref()),
                number: u16::try_from(p.port).ok(),
            })
            .collect();
        self.replace_service(ServiceKey::new(namespace, name), Some(kind), ports)
    }

    /// Removes a Service. Its slices stay until they are removed themselves.
    pub fn delete_service(&mut self, namespace: &str, name: &str) -> bool {
        self.replace_service(ServiceKey::new(namespace, name), None, Box::default())
    }

    /// Adds or updates an EndpointSlice. Slices of a type that DNS cannot express (FQDN) and those without a Service count as
    /// absent.
    pub fn set_slice(&mut self, slice: &EndpointSlice) -> bool {
        let (Some(namespace), Some(name)) = (&slice.metadata.namespace, &slice.metadata.name) else { return false };
        let service = slice.metadata.labels.as_ref().and_then(|l| l.get(SERVICE_NAME)).filter(|s| !s.is_empty());
        let Some(service) = service.filter(|_| matches!(slice.address_type.as_str(), "IPv4" | "IPv6")) else {
            return self.delete_slice(namespace, name);
        };
        let id: (Box<str>, Box<str>) = (namespace.as_str().into(), name.as_str().into());
        let key = match self.slices.get(&id) {
            Some(key) if key.0.name() == service => key.clone(),
            _ => ArcKey(ServiceKey::new(namespace, service)),
        };
        let moved = match self.slices.insert(id, key.clone()) {
            Some(old) if old != key => self.replace_slice(old, name, None),
            _ => false,
        };
        let compiled = self.compile_slice(slice, name);
        self.replace_slice(key, name, Some(compiled)) || moved
    }

    /// Removes an EndpointSlice.
    pub fn delete_slice(&mut self, namespace: &str, name: &str) -> bool {
        match self.slices.remove(&(Box::from(namespace), Box::from(name))) {
            Some(key) => self.replace_slice(key, name, None),
            None => false,
        }
    }

    /// Adds or updates a Pod. A terminating pod that is known stays until its object is gone; one that is not known is not
    /// added. Finished pods have no name.
    pub fn set_pod(&mut self, pod: &Pod) -> bool {
        let (Some(namespace), Some(name)) = (&pod.metadata.namespace, &pod.metadata.name) else { return false };
        let status = pod.status.as_ref();
        let phase = status.and_then(|s| s.phase.as_deref());
        if matches!(phase, Some("Succeeded" | "Failed" | "Unknown")) {
            return self.delete_pod(namespace, name);
        }
        if pod.metadata.deletion_timestamp.is_some() {
            return false;
        }
        let listed = status.and_then(|s| s.pod_ips.as_deref()).unwrap_or_default().iter().map(|ip| ip.ip.as_str());
        let primary = status.and_then(|s| s.pod_ip.as_deref());
        let mut addresses: Vec<IpAddr> = listed.chain(primary).filter_map(|ip| ip.parse().ok()).collect();
        addresses.sort_unstable();
        addresses.dedup();
        self.replace_pod(namespace, name, addresses)
    }

    /// Removes a Pod.
    pub fn delete_pod(&mut self, namespace: &str, name: &str) -> bool {
        self.replace_pod(namespace, name, Vec::new())
    }

    /// Removes the Namespaces that a complete list did not have.
    pub fn retain_namespaces(&mut self, listed: &HashSet<String>) -> bool {
        let gone: Vec<_> = self.set.namespaces.keys().filter(|n| !listed.contains(&***n)).cloned().collect();
        gone.iter().fold(false, |changed, name| self.delete_namespace(name) | changed)
    }

    /// Removes the Services that a complete list (`namespace/name`) did not have.
    pub fn retain_services(&mut self, listed: &HashSet<String>) -> bool {
        let known = self.set.entries.iter().filter(|(_, e)| e.kind.is_some()).map(|(k, _)| Arc::clone(&k.0));
        let gone: Vec<_> = known.filter(|k| !listed.contains(&format!("{}/{}", k.namespace(), k.name()))).collect();
        gone.into_iter().fold(false, |changed, key| self.replace_service(key, None, Box::default()) | changed)
    }

    /// Removes the EndpointSlices that a complete list (`namespace/name`) did not have.
    pub fn retain_slices(&mut self, listed: &HashSet<String>) -> bool {
        let gone: Vec<_> =
            self.slices.keys().filter(|(ns, n)| !listed.contains(&format!("{ns}/{n}"))).cloned().collect();
        gone.iter().fold(false, |changed, (ns, name)| self.delete_slice(ns, name) | changed)
    }

    /// Removes the Pods that a complete list (`namespace/name`) did not have.
    pub fn retain_pods(&mut self, listed: &HashSet<String>) -> bool {
        let gone: Vec<_> = self.pods.keys().filter(|(ns, n)| !listed.contains(&format!("{ns}/{n}"))).cloned().collect();
        gone.iter().fold(false, |changed, (ns, name)| self.delete_pod(ns, name) | changed)
    }

    fn compile_slice(&self, slice: &EndpointSlice, name: &str) -> Slice {
        let ports = slice.ports.as_deref().unwrap_or_default().iter().map(|p| Port {
            name: p.name.as_deref().unwrap_or_default().into(),
            protocol: Protocol::parse(p.protocol.as_deref()),
            number: p.port.and_then(|n| u16::try_from(n).ok()),
        });
        // An unknown condition counts as ready (EndpointConditions.ready); serving and terminating do not matter to DNS.
        let ready =
            slice.endpoints.iter().flatten().filter(|e| e.conditions.as_ref().and_then(|c| c.ready).unwrap_or(true));
        let endpoints = ready.flat_map(|e| {
            let hostname = e.hostname.as_deref().filter(|h| !h.is_empty());
            // A label has at most 63 octets (RFC 1035 section 2.3.4).
            let pod = e.target_ref.as_ref().and_then(|t| t.name.as_deref()).filter(|n| !n.is_empty() && n.len() <= 63);
            let pod = pod.filter(|_| self.set.options.endpoint_pod_names);
            let name: Option<Box<str>> = hostname.or(pod).map(Into::into);
            let addresses = e.addresses.iter().filter_map(|a| a.parse::<IpAddr>().ok());
            addresses.map(move |address| Endpoint { address, name: name.clone() })
        });
        Slice { name: name.into(), ports: ports.collect(), endpoints: endpoints.collect() }
    }

    fn replace_service(&mut self, key: Arc<ServiceKey>, kind: Option<ServiceKind>, ports: Box<[Port]>) -> bool {
        let key = ArcKey(key);
        let old = self.set.entry(key.0.as_str());
        if old.map_or(kind.is_none(), |e| e.kind == kind && e.ports == ports) {
            return false;
        }
        let mut entry = old.cloned().unwrap_or_default();
        let cluster_ips = |kind: &Option<ServiceKind>| match kind {
            Some(ServiceKind::Cluster(ips)) => ips.to_vec(),
            _ => Vec::new(),
        };
        let (before, after) = (cluster_ips(&entry.kind), cluster_ips(&kind));
        entry.kind = kind;
        entry.ports = ports;
        self.put_entry(key.clone(), entry);
        for address in before.iter().filter(|a| !after.contains(a)) {
            disown(&mut self.set.cluster_ips, *address, &key);
        }
        for address in after.iter().filter(|a| !before.contains(a)) {
            own(&mut self.set.cluster_ips, *address, &key);
        }
        true
    }

    fn replace_slice(&mut self, key: ArcKey, name: &str, new: Option<Slice>) -> bool {
        let old_entry = self.set.entry(key.0.as_str());
        let old = old_entry.and_then(|e| e.slices.iter().find(|s| *s.name == *name));
        if old == new.as_ref() {
            return false;
        }
        let addresses = |s: Option<&Slice>| -> HashSet<IpAddr> {
            s.map(|s| s.endpoints.iter().map(|e| e.address).collect()).unwrap_or_default()
        };
        let (before, after) = (addresses(old), addresses(new.as_ref()));
        let mut entry = old_entry.cloned().unwrap_or_default();
        let mut slices = std::mem::take(&mut entry.slices).into_vec();
        slices.retain(|s| *s.name != *name);
        if let Some(slice) = new {
            let at = slices.partition_point(|s| s.name < slice.name);
            slices.insert(at, slice);
        }
        entry.slices = slices.into();
        entry.set_overlapping();
        let gone: Vec<IpAddr> = before.difference(&after).copied().filter(|a| !entry.holds(*a)).collect();
        self.put_entry(key.clone(), entry);
        for address in gone {
            disown(&mut self.set.endpoint_ips, address, &key);
        }
        for address in after.difference(&before) {
            own(&mut self.set.endpoint_ips, *address, &key);
        }
        true
    }

    fn put_entry(&mut self, key: ArcKey, entry: Entry) {
        let part = self.set.entries.part_mut(part_of(key.0.as_str().as_bytes()));
        if entry.is_unknown() {
            part.remove(&key);
        } else {
            part.insert(key, Arc::new(entry));
        }
    }

    fn replace_pod(&mut self, namespace: &str, name: &str, addresses: Vec<IpAddr>) -> bool {
        let key: PodKey = (namespace.into(), name.into());
        let before = self.pods.get(&key).cloned().unwrap_or_default();
        if *before == *addresses {
            return false;
        }
        for address in before.iter().filter(|a| !addresses.contains(a)) {
            let part = self.set.pods.part_mut(part_of_address(*address));
            if let Some(pods) = part.get_mut(address) {
                Arc::make_mut(pods).remove(&key);
                if pods.is_empty() {
                    part.remove(address);
                }
            }
        }
        for address in addresses.iter().filter(|a| !before.contains(a)) {
            let part = self.set.pods.part_mut(part_of_address(*address));
            Arc::make_mut(part.entry(*address).or_default()).insert(key.clone());
        }
        if addresses.is_empty() {
            self.pods.remove(&key);
        } else {
            self.pods.insert(key, addresses.into());
        }
        true
    }
}

fn service_kind(service: &Service) -> ServiceKind {
    let Some(spec) = &service.spec else { return ServiceKind::Cluster(Box::default()) };
    if spec.type_.as_deref() == Some("ExternalName") {
        return ServiceKind::External(spec.external_name.as_deref().unwrap_or_default().into());
    }
    let listed = spec.cluster_ips.as_deref().unwrap_or_default().iter().map(String::as_str);
    let mut addresses: Vec<&str> = listed.collect();
    if addresses.is_empty() {
        addresses.extend(spec.cluster_ip.as_deref());
    }
    if addresses.contains(&"None") {
        return ServiceKind::Headless;
    }
    ServiceKind::Cluster(addresses.iter().filter_map(|a| a.parse().ok()).collect())
}

fn own(map: &mut Shards<IpAddr, Owners>, address: IpAddr, key: &ArcKey) {
    let part = map.part_mut(part_of_address(address));
    match part.get_mut(&address) {
        None => {
            part.insert(address, Owners::One(key.clone()));
        }
        Some(owners) => {
            let mut keys = owners.as_slice().to_vec();
            if let Err(at) = keys.binary_search(key) {
                keys.insert(at, key.clone());
                *owners = Owners::Many(keys.into());
            }
        }
    }
}

fn disown(map: &mut Shards<IpAddr, Owners>, address: IpAddr, key: &ArcKey) {
    let part = map.part_mut(part_of_address(address));
    let Some(owners) = part.get_mut(&address) else { return };
    let mut keys = owners.as_slice().to_vec();
    keys.retain(|k| k != key);
    match keys.len() {
        0 => {
            part.remove(&address);
        }
        1 => *owners = Owners::One(keys.remove(0)),
        _ => *owners = Owners::Many(keys.into()),
    }
}

#[cfg(test)]
mod tests;
