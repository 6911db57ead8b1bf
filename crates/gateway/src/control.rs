//! Watches the cluster, publishes routes and endpoints, and reports back: events, addresses in status, metrics.
//!
//! One task owns everything. Events that arrive together are compiled once; an EndpointSlice that changes only sets the endpoints
//! of its Service.

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::hash::{DefaultHasher, Hash, Hasher};
use std::net::{IpAddr, SocketAddr};
use std::pin::Pin;
use std::sync::Arc;
use std::time::{Duration, Instant};

use futures::stream::SelectAll;
use futures::{Stream, StreamExt};
use k8s_openapi::api::core::v1::{ObjectReference, Secret, Service};
use k8s_openapi::api::discovery::v1::EndpointSlice;
use k8s_openapi::api::networking::v1::{Ingress, IngressClass, IngressLoadBalancerIngress};
use kube::runtime::WatchStreamExt;
use kube::runtime::watcher::{self, Event, watcher};
use kube::{Api, Client, Resource};
use portolan_client::events::{EventRecorder, EventType};
use portolan_observe::ReadyGate;
use portolan_plan::finding::{Finding, Severity};
use portolan_plan::origin::Origin;
use portolan_plan::route::{
    Absence, BackendService, BackendSlice, Certificate, Input, Options, Upstream, UpstreamId, UpstreamKey, compile,
};
use portolan_plan::world::ObjectKey;
use rustls::sign::CertifiedKey;
use tokio::sync::{mpsc, watch};
use tokio_util::sync::CancellationToken;

use crate::engine::Engine;
use crate::metrics::Registry;
use crate::status;
use crate::tls;

/// Changes that arrive within this time are compiled together.
const GATHER: Duration = Duration::from_millis(10);
/// A finding becomes an event when it is still true after this time: objects that are applied together refer to each other before
/// all of them exist.
const SETTLE: Duration = Duration::from_secs(2);
/// Status is looked at again at least this often (ingress-nginx: `--status-update-interval`).
const STATUS_INTERVAL: Duration = Duration::from_secs(60);
/// External names are resolved again this often; the resolver of the system hides how long an answer may be kept.
const RESOLVE_INTERVAL: Duration = Duration::from_secs(30);

/// An event of one of the watches.
#[expect(clippy::large_enum_variant, reason = "moved once, from the stream to the table")]
enum Change {
    Ingress(Event<Ingress>),
    Class(Event<IngressClass>),
    Service(Event<Service>),
    Slice(Event<EndpointSlice>),
    Secret(Event<Secret>),
    Failed(Watched, watcher::Error),
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
enum Watched {
    Ingresses,
    Classes,
    Services,
    Slices,
    Secrets,
}

type Changes = SelectAll<Pin<Box<dyn Stream<Item = Change> + Send>>>;

fn watch_all<K>(
    client: &Client,
    what: Watched,
    config: watcher::Config,
    wrap: fn(Event<K>) -> Change,
) -> Pin<Box<dyn Stream<Item = Change> + Send>>
where
    K: Resource<DynamicType = ()> + Clone + serde::de::DeserializeOwned + std::fmt::Debug + Send + Sync + 'static,
{
    let stream = watcher(Api::<K>::all(client.clone()), config).default_backoff();
    Box::pin(stream.map(move |event| match event {
        Ok(event) => wrap(event),
        Err(error) => Change::Failed(what, error),
    }))
}

/// One kind of objects by key. A relist replaces it at once, so that a broken watch never empties it.
struct Table<V> {
    live: HashMap<ObjectKey, V>,
    listing: Option<HashMap<ObjectKey, V>>,
    synced: bool,
}

impl<V> Default for Table<V> {
    fn default() -> Self {
        Table { live: HashMap::new(), listing: None, synced: false }
    }
}

impl<V: PartialEq> Table<V> {
    /// Applies an event, whose objects `parse` trims; `changed` hears of the keys whose value is another one now.
    fn apply<K: Resource<DynamicType = ()>>(
        &mut self,
        event: Event<K>,
        mut parse: impl FnMut(K) -> Option<V>,
        mut changed: impl FnMut(&ObjectKey, Option<&V>, Option<&V>),
    ) {
        let key = |object: &K| {
            let meta = object.meta();
            ObjectKey::new(meta.namespace.clone().unwrap_or_default(), meta.name.clone().unwrap_or_default())
        };
        match event {
            Event::Init => self.listing = Some(HashMap::new()),
            Event::InitApply(object) => {
                let key = key(&object);
                if let Some(value) = parse(object) {
                    self.listing.get_or_insert_default().insert(key, value);
                }
            }
            Event::InitDone => {
                let fresh = self.listing.take().unwrap_or_default();
                let old = std::mem::replace(&mut self.live, fresh);
                for (key, value) in &self.live {
                    if old.get(key) != Some(value) {
                        changed(key, old.get(key), Some(value));
                    }
                }
                for (key, value) in old.iter().filter(|(key, _)| !self.live.contains_key(key)) {
                    changed(key, Some(value), None);
                }
                self.synced = true;
            }
            Event::Apply(object) => {
                let key = key(&object);
                let value = parse(object);
                if self.live.get(&key) != value.as_ref() {
                    changed(&key, self.live.get(&key), value.as_ref());
                    match value {
                        Some(value) => self.live.insert(key, value),
                        None => self.live.remove(&key),
                    };
                }
            }
            Event::Delete(object) => {
                let key = key(&object);
                if let Some(old) = self.live.remove(&key) {
                    changed(&key, Some(&old), None);
                }
            }
        }
    }
}

/// A Service as far as the gateway needs it.
#[derive(Clone, PartialEq)]
struct KnownService {
    backend: BackendService,
    /// Only of the published Service.
    addresses: Option<Vec<IngressLoadBalancerIngress>>,
}

/// The certificate of a Secret, or why there is none.
#[derive(Clone)]
struct KnownSecret {
    version: String,
    certificate: Result<(Certificate, Arc<CertifiedKey>), String>,
}

impl PartialEq for KnownSecret {
    fn eq(&self, other: &Self) -> bool {
        self.version == other.version
    }
}

/// What the loop is told at start.
pub(crate) struct Control {
    pub client: Client,
    pub engine: Engine,
    pub metrics: Registry,
    pub options: Options,
    pub publish_service: Option<ObjectKey>,
    pub leads: watch::Receiver<bool>,
    pub events: EventRecorder,
    pub gate: ReadyGate,
}

/// What is known of the cluster.
#[derive(Default)]
struct World {
    ingresses: Table<Arc<Ingress>>,
    classes: Table<Arc<IngressClass>>,
    services: Table<KnownService>,
    slices: Table<BackendSlice>,
    /// Slices by Service.
    by_service: HashMap<ObjectKey, BTreeSet<ObjectKey>>,
    secrets: Table<KnownSecret>,
    /// Secrets that Ingresses of ours name; changes of others are of no interest.
    referenced: BTreeSet<ObjectKey>,
    /// Addresses of external names.
    external: HashMap<String, Vec<IpAddr>>,
}

impl World {
    fn synced(&self) -> bool {
        self.ingresses.synced
            && self.classes.synced
            && self.services.synced
            && self.slices.synced
            && self.secrets.synced
    }

    fn resolve(&self, key: &UpstreamKey) -> Upstream {
        let service = self.services.live.get(&key.service).map(|s| &s.backend);
        let slices =
            self.by_service.get(&key.service).into_iter().flatten().filter_map(|slice| self.slices.live.get(slice));
        let upstream = portolan_plan::route::upstream::resolve(key, service, slices);
        let Upstream::External { name, port } = &upstream else { return upstream };
        match self.external.get(name) {
            Some(addresses) if !addresses.is_empty() => {
                Upstream::Endpoints(addresses.iter().map(|a| SocketAddr::new(*a, *port)).collect())
            }
            _ => Upstream::None(Absence::Unresolved(name.clone())),
        }
    }

    fn addresses(&self, key: &UpstreamKey) -> Vec<SocketAddr> {
        match self.resolve(key) {
            Upstream::Endpoints(addresses) => addresses,
            Upstream::External { .. } | Upstream::None(_) => Vec::new(),
        }
    }
}

/// What must be done after some changes.
#[derive(Default)]
struct Dirty {
    routes: bool,
    /// Services whose endpoints changed.
    services: BTreeSet<ObjectKey>,
    status: bool,
}

/// Runs until `shutdown`, then stops the engine and returns when it has drained.
pub(crate) async fn run(mut control: Control, shutdown: CancellationToken) {
    let mut changes = Changes::new();
    let client = control.client.clone();
    let all = watcher::Config::default;
    changes.push(watch_all(&client, Watched::Ingresses, all(), Change::Ingress));
    changes.push(watch_all(&client, Watched::Classes, all(), Change::Class));
    changes.push(watch_all(&client, Watched::Services, all(), Change::Service));
    changes.push(watch_all(&client, Watched::Slices, all(), Change::Slice));
    // Helm keeps whole releases in Secrets; only those that hold certificates are of interest and kept.
    let no_helm = all().fields("type!=helm.sh/release.v1");
    changes.push(watch_all(&client, Watched::Secrets, no_helm, Change::Secret));

    let mut world = World::default();
    let mut reporter = Reporter::default();
    let mut failed: BTreeMap<Watched, String> = BTreeMap::new();
    let mut published = false;
    let (resolved, mut resolutions) = mpsc::channel::<(String, Vec<IpAddr>)>(64);
    let mut resolving: HashMap<String, tokio::task::JoinHandle<()>> = HashMap::new();
    let mut leads = control.leads.clone();
    let mut dirty = Dirty::default();
    loop {
        let deadline = reporter.deadline();
        tokio::select! {
            () = shutdown.cancelled() => break,
            Some(change) = changes.next() => take(change, &mut world, &control, &mut dirty, &mut failed),
            Some((name, addresses)) = resolutions.recv() => {
                world.external.insert(name.clone(), addresses);
                for endpoints in control.engine.upstreams() {
                    if matches!(plain(&world, &endpoints.key), Upstream::External { name: n, .. } if n == name) {
                        dirty.services.insert(endpoints.key.service.clone());
                    }
                }
            }
            Ok(()) = leads.changed() => dirty.status = true,
            () = tokio::time::sleep_until(deadline.into()) => dirty.status = true,
        }
        // What arrives together is handled together.
        let gather = tokio::time::sleep(GATHER);
        tokio::pin!(gather);
        loop {
            tokio::select! {
                biased;
                () = shutdown.cancelled() => break,
                () = &mut gather => break,
                Some(change) = changes.next() => take(change, &mut world, &control, &mut dirty, &mut failed),
            }
        }
        if !world.synced() {
            let missing: Vec<&str> = failed.values().map(String::as_str).collect();
            let reason = if missing.is_empty() { "waiting for the first lists".into() } else { missing.join("; ") };
            control.gate.not_ready(reason);
            continue;
        }
        let work = std::mem::take(&mut dirty);
        if work.routes || !published {
            world.referenced = control.publish(&world, &mut reporter);
            if !published {
                published = true;
                control.gate.ready();
            }
        } else if !work.services.is_empty() {
            for endpoints in control.engine.upstreams().filter(|e| work.services.contains(&e.key.service)) {
                endpoints.set(world.addresses(&endpoints.key));
            }
        }
        if work.routes || !work.services.is_empty() || reporter.fresh {
            resolve_names(&control, &world, &mut resolving, &resolved);
            reporter.upstreams(&control, &world);
        }
        reporter.report(&control, &world, *leads.borrow());
    }
    for task in resolving.into_values() {
        task.abort();
    }
    control.gate.not_ready("shutting down");
    let engine = control.engine;
    let _ = tokio::task::spawn_blocking(move || engine.stop()).await;
}

/// The upstream before external names are looked up.
fn plain(world: &World, key: &UpstreamKey) -> Upstream {
    portolan_plan::route::upstream::resolve(key, world.services.live.get(&key.service).map(|s| &s.backend), [])
}

fn take(
    change: Change,
    world: &mut World,
    control: &Control,
    dirty: &mut Dirty,
    failed: &mut BTreeMap<Watched, String>,
) {
    match change {
        Change::Ingress(event) => {
            let (mut routes, mut status) = (false, false);
            world.ingresses.apply(
                event,
                |ingress| Some(Arc::new(trim(ingress))),
                |_, old, new| {
                    // An address that somebody wrote into the status changes no route.
                    let same =
                        |i: &Arc<Ingress>| (i.spec.clone(), i.metadata.annotations.clone(), i.metadata.uid.clone());
                    routes |= old.map(same) != new.map(same);
                    status = true;
                },
            );
            dirty.routes |= routes;
            dirty.status |= status;
        }
        Change::Class(event) => {
            world.classes.apply(event, |class| Some(Arc::new(class)), |_, _, _| dirty.routes = true);
        }
        Change::Service(event) => {
            let publish = control.publish_service.as_ref();
            let parse = |service: Service| {
                let backend = BackendService::parse(&service);
                let addresses = (Some(&backend.key) == publish).then(|| status::addresses(&service));
                Some(KnownService { backend, addresses })
            };
            world.services.apply(event, parse, |key, old, new| {
                if old.map(|s| &s.backend) != new.map(|s| &s.backend) {
                    dirty.services.insert(key.clone());
                }
                dirty.status |= publish == Some(key);
            });
        }
        Change::Slice(event) => {
            let by_service = &mut world.by_service;
            world.slices.apply(
                event,
                |slice| BackendSlice::parse(&slice),
                |key, old, new| {
                    if let Some(old) = old {
                        dirty.services.insert(old.service.clone());
                        if let Some(slices) = by_service.get_mut(&old.service) {
                            slices.remove(key);
                            if slices.is_empty() {
                                by_service.remove(&old.service);
                            }
                        }
                    }
                    if let Some(new) = new {
                        dirty.services.insert(new.service.clone());
                        by_service.entry(new.service.clone()).or_default().insert(key.clone());
                    }
                },
            );
        }
        Change::Secret(event) => {
            let parse = |secret: Secret| {
                let data = secret.data.unwrap_or_default();
                let certificate = tls::read(&data);
                // Of Secrets that hold no certificate only their existence is kept.
                Some(KnownSecret { version: secret.metadata.resource_version.unwrap_or_default(), certificate })
            };
            let referenced = &world.referenced;
            world.secrets.apply(event, parse, |key, _, _| dirty.routes |= referenced.contains(key));
        }
        Change::Failed(watched, error) => {
            if watched == Watched::Classes && is_forbidden(&error) && !world.classes.synced {
                // A namespaced installation may not read cluster-scoped classes: only the annotation selects Ingresses then.
                tracing::warn!(
                    "IngressClasses cannot be read; only the annotation kubernetes.io/ingress.class selects Ingresses"
                );
                world.classes.synced = true;
                dirty.routes = true;
            }
            tracing::warn!(?watched, error = %Chain(&error), "watch failed");
            failed.insert(watched, format!("cannot watch {watched:?}"));
            return;
        }
    }
    if world.synced() {
        failed.clear();
    }
}

fn is_forbidden(error: &watcher::Error) -> bool {
    match error {
        watcher::Error::InitialListFailed(kube::Error::Api(status))
        | watcher::Error::WatchStartFailed(kube::Error::Api(status)) => status.code == 403,
        _ => false,
    }
}

/// An error with its causes, in one line.
struct Chain<'a>(&'a dyn std::error::Error);

impl std::fmt::Display for Chain<'_> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{}", self.0)?;
        let mut cause = self.0.source();
        while let Some(error) = cause {
            write!(f, ": {error}")?;
            cause = error.source();
        }
        Ok(())
    }
}

/// What nobody reads is not kept: managed fields and the last applied configuration are most of a small object.
fn trim(mut ingress: Ingress) -> Ingress {
    ingress.metadata.managed_fields = None;
    ingress.metadata.labels = None;
    if let Some(annotations) = &mut ingress.metadata.annotations {
        annotations.remove("kubectl.kubernetes.io/last-applied-configuration");
    }
    ingress
}

impl Control {
    /// Compiles and publishes; returns the Secrets that were looked for.
    fn publish(&mut self, world: &World, reporter: &mut Reporter) -> BTreeSet<ObjectKey> {
        let begun = Instant::now();
        let now = jiff::Timestamp::now().as_second();
        let options = Options { now, ..self.options.clone() };
        let certificates = world
            .secrets
            .live
            .iter()
            .map(|(key, secret)| {
                (key.clone(), secret.certificate.as_ref().map(|(c, _)| c.clone()).map_err(Clone::clone))
            })
            .collect();
        let input = Input {
            ingresses: world.ingresses.live.values().cloned().collect(),
            classes: world.classes.live.values().cloned().collect(),
            certificates,
        };
        let compiled = compile(&input, &options);
        let table = compiled.table;
        let used: Vec<(String, ObjectKey)> =
            table.hosts.iter().filter_map(|h| Some((h.name.clone(), h.tls.as_ref()?.secret.clone()?))).collect();
        let certified = |key: &ObjectKey| world.secrets.live.get(key).and_then(|s| s.certificate.as_ref().ok());
        let keys: HashMap<ObjectKey, Arc<CertifiedKey>> =
            used.iter().filter_map(|(_, key)| Some((key.clone(), certified(key)?.1.clone()))).collect();
        let expiry =
            used.into_iter().filter_map(|(host, key)| certified(&key).map(|(c, _)| (host, key.clone(), c.not_after)));
        self.metrics.set_certificates(expiry.collect());
        let hash = {
            let mut hasher = DefaultHasher::new();
            serde_json::to_string(&(&table.hosts, &table.rules)).unwrap_or_default().hash(&mut hasher);
            hasher.finish()
        };
        let (hosts, rules) = (table.hosts.len(), table.rules.len());
        self.engine.publish(table, keys, |key| world.addresses(key));
        self.metrics.built(hash, now);
        let took_ms = u64::try_from(begun.elapsed().as_millis()).unwrap_or(u64::MAX);
        tracing::info!(hosts, rules, took_ms, "routes applied");
        reporter.routes = compiled.findings;
        reporter.accepted = compiled.accepted;
        reporter.fresh = true;
        compiled.secrets.into_iter().collect()
    }
}

/// Starts a task for each external name in use and stops those that are not.
fn resolve_names(
    control: &Control,
    world: &World,
    resolving: &mut HashMap<String, tokio::task::JoinHandle<()>>,
    resolved: &mpsc::Sender<(String, Vec<IpAddr>)>,
) {
    let wanted: BTreeSet<String> = control
        .engine
        .upstreams()
        .filter_map(|e| match plain(world, &e.key) {
            Upstream::External { name, .. } => Some(name),
            Upstream::Endpoints(_) | Upstream::None(_) => None,
        })
        .collect();
    resolving.retain(|name, task| {
        let keep = wanted.contains(name);
        if !keep {
            task.abort();
        }
        keep
    });
    for name in wanted {
        let resolved = resolved.clone();
        resolving.entry(name.clone()).or_insert_with(|| {
            tokio::spawn(async move {
                let mut known: Option<Vec<IpAddr>> = None;
                loop {
                    match tokio::net::lookup_host((name.as_str(), 0)).await {
                        Ok(found) => {
                            let mut addresses: Vec<IpAddr> = found.map(|a| a.ip()).filter(is_allowed).collect();
                            addresses.sort();
                            addresses.dedup();
                            if known.as_ref() != Some(&addresses) {
                                known = Some(addresses.clone());
                                if resolved.send((name.clone(), addresses)).await.is_err() {
                                    return;
                                }
                            }
                        }
                        // The last known addresses stay in use.
                        Err(error) => tracing::debug!(name, %error, "cannot resolve an external name"),
                    }
                    tokio::time::sleep(RESOLVE_INTERVAL).await;
                }
            })
        });
    }
}

/// Whether an external name may lead there: not to this machine, nor to a link's own services such as a cloud's metadata.
fn is_allowed(address: &IpAddr) -> bool {
    match address.to_canonical() {
        IpAddr::V4(v4) => {
            !(v4.is_loopback() || v4.is_link_local() || v4.is_unspecified() || v4.is_broadcast() || v4.is_multicast())
        }
        IpAddr::V6(v6) => !(v6.is_loopback() || v6.is_unicast_link_local() || v6.is_unspecified() || v6.is_multicast()),
    }
}

/// What identifies a finding: the same one about the same state of an object is reported once.
type Reported = (Origin, String, String);

/// Tells users what happens with their Ingresses. Only the leader writes.
struct Reporter {
    routes: Vec<Finding>,
    backends: Vec<Finding>,
    accepted: Vec<ObjectKey>,
    fresh: bool,
    /// Findings that are true, since when, and whether they were reported.
    seen: HashMap<Reported, (Instant, bool)>,
    /// Ingresses whose acceptance was reported, by what was accepted.
    synced: HashMap<ObjectKey, u64>,
    /// Ingresses whose addresses are ours.
    published: BTreeSet<ObjectKey>,
    due: Instant,
}

impl Default for Reporter {
    fn default() -> Self {
        let now = Instant::now();
        Reporter {
            routes: Vec::new(),
            backends: Vec::new(),
            accepted: Vec::new(),
            fresh: false,
            seen: HashMap::new(),
            synced: HashMap::new(),
            published: BTreeSet::new(),
            due: now + STATUS_INTERVAL,
        }
    }
}

impl Reporter {
    fn deadline(&self) -> Instant {
        self.due
    }

    /// Looks for backends that do not exist or have no endpoint.
    fn upstreams(&mut self, control: &Control, world: &World) {
        self.fresh = false;
        self.backends.clear();
        let mut orphans = BTreeSet::new();
        let snapshot = control.engine.snapshot();
        for (index, key) in snapshot.table.upstreams.iter().enumerate() {
            let upstream = world.resolve(key);
            let habit = world.services.live.get(&key.service).is_some_and(|s| s.backend.matches_target_port_only(key));
            if matches!(upstream, Upstream::Endpoints(_)) && !habit {
                continue;
            }
            let origins = snapshot.table.origins(UpstreamId(index));
            self.backends.extend(upstream.findings(key, &origins));
            if habit {
                self.backends.extend(origins.iter().map(|origin| Finding {
                    origin: origin.clone(),
                    severity: Severity::Warning,
                    reason: "PortMatchedTargetPort".into(),
                    message: format!(
                        "port {} of Service {} was found as a targetPort; name its port instead",
                        key.port, key.service
                    ),
                }));
            }
            let kind = match upstream {
                Upstream::None(Absence::ServiceNotFound) => "no-service",
                Upstream::None(_) => "no-endpoint",
                Upstream::Endpoints(_) | Upstream::External { .. } => continue,
            };
            orphans.extend(origins.iter().map(|o| (ObjectKey::new(&o.namespace, &o.name), kind)));
        }
        control.metrics.set_orphans(orphans.into_iter().collect());
    }

    fn report(&mut self, control: &Control, world: &World, leads: bool) {
        let now = Instant::now();
        control.metrics.set_leader(leads);
        let current: BTreeMap<Reported, &Finding> = self
            .routes
            .iter()
            .chain(&self.backends)
            .map(|f| ((f.origin.clone(), f.reason.clone(), f.message.clone()), f))
            .collect();
        self.seen.retain(|key, _| current.contains_key(key));
        self.due = now + STATUS_INTERVAL;
        for (key, finding) in current {
            let (since, reported) = self.seen.entry(key).or_insert((now, false));
            if *reported || !leads {
                continue;
            }
            if now.duration_since(*since) < SETTLE {
                self.due = self.due.min(*since + SETTLE);
                continue;
            }
            *reported = true;
            let kind = match finding.severity {
                Severity::Normal => EventType::Normal,
                Severity::Warning => EventType::Warning,
            };
            control.events.event(&reference(&finding.origin), kind, &finding.reason, finding.message.clone());
        }
        if !leads {
            return;
        }
        let accepted: BTreeSet<&ObjectKey> = self.accepted.iter().collect();
        self.synced.retain(|key, _| accepted.contains(key));
        for key in &self.accepted {
            let Some(ingress) = world.ingresses.live.get(key) else { continue };
            let mut hasher = DefaultHasher::new();
            serde_json::to_string(&(&ingress.spec, &ingress.metadata.annotations, &ingress.metadata.uid))
                .unwrap_or_default()
                .hash(&mut hasher);
            let state = hasher.finish();
            if self.synced.insert(key.clone(), state) != Some(state) {
                control.events.event(&status::reference(ingress), EventType::Normal, "Sync", "Scheduled for sync");
            }
        }
        self.status(control, world);
    }

    fn status(&mut self, control: &Control, world: &World) {
        let Some(addresses) = control
            .publish_service
            .as_ref()
            .and_then(|key| world.services.live.get(key))
            .and_then(|service| service.addresses.as_ref())
        else {
            return;
        };
        let accepted: BTreeSet<&ObjectKey> = self.accepted.iter().collect();
        let mut writes = Vec::new();
        for key in &self.accepted {
            if let Some(ingress) = world.ingresses.live.get(key)
                && status::current(ingress) != *addresses
            {
                writes.push((key.clone(), addresses.clone()));
            }
            self.published.insert(key.clone());
        }
        // Only what this process wrote is taken back, when an Ingress changes to another controller's class.
        self.published.retain(|key| {
            if accepted.contains(key) {
                return true;
            }
            if let Some(ingress) = world.ingresses.live.get(key)
                && !addresses.is_empty()
                && status::current(ingress) == *addresses
                && !self.routes.iter().any(|f| f.origin.namespace == key.namespace && f.origin.name == key.name)
            {
                writes.push((key.clone(), Vec::new()));
            }
            false
        });
        if !writes.is_empty() {
            tokio::spawn(status::write(control.client.clone(), writes));
        }
    }
}

fn reference(origin: &Origin) -> ObjectReference {
    ObjectReference {
        api_version: Some("networking.k8s.io/v1".into()),
        kind: Some(origin.kind.clone()),
        namespace: Some(origin.namespace.clone()).filter(|n| !n.is_empty()),
        name: Some(origin.name.clone()),
        uid: Some(origin.uid.clone()).filter(|u| !u.is_empty()),
        ..Default::default()
    }
}
