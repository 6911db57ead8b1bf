//! Shell of the three endpoint controllers: EndpointSlices and Endpoints of Services with a selector, and the mirror of
//! hand-written Endpoints. What to write is decided in `portolan_plan::slices`.

use std::collections::{BTreeSet, HashMap, HashSet};
use std::sync::{Arc, Mutex, RwLock};

use anyhow::Context as _;
use k8s_openapi::api::core::v1::{Endpoints, Pod, Service};
use k8s_openapi::api::discovery::v1::EndpointSlice;
use kube::Api;
use kube::api::{DeleteParams, PostParams, Preconditions};
use portolan_client::{EventRecorder, EventType};
use portolan_plan::slices::{
    self, Changes, Family, NodeFacts, PodFacts, Topology, TriggerTimes, endpoints as legacy, mirror,
};

use crate::Context;
use crate::cache::Caches;
use crate::metrics::{Distribution, Hints, Operation, Outcome};
use crate::queue::{Key, Next, Queue, Waiting};
use crate::selector::SelectorIndex;
use crate::util::{already_exists, is_conflict, is_namespace_terminating, is_not_found, message, reference};

/// Syncs of different Services at a time (`--concurrent-service-endpoint-syncs`).
const WORKERS: usize = 5;

/// Which of the three run.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Which {
    pub slices: bool,
    pub legacy: bool,
    pub mirroring: bool,
    pub max_per_slice: usize,
}

struct Shared {
    context: Context,
    which: Which,
    slice_queue: Queue<Key>,
    legacy_queue: Queue<Key>,
    mirror_queue: Queue<Key>,
    topology: RwLock<Arc<Topology>>,
    /// Services by their selectors.
    selectors: RwLock<SelectorIndex>,
    /// Services that await a node.
    awaiting: Mutex<HashMap<String, HashSet<Key>>>,
    slice_triggers: Mutex<HashMap<Key, TriggerTimes>>,
    legacy_triggers: Mutex<HashMap<Key, TriggerTimes>>,
    /// Families with proportional hints, by Service.
    hinted: Mutex<HashMap<Key, Vec<Family>>>,
    /// What each Service adds to the gauges.
    tally: Mutex<HashMap<Key, Tally>>,
}

/// What a Service has.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
struct Tally {
    endpoints: usize,
    slices: usize,
    /// Slices if they were packed perfectly.
    packed: usize,
    /// What the Service asks for as trafficDistribution, empty if nothing.
    distribution: &'static str,
}

impl Tally {
    fn of<'a>(service: &Service, slices: impl Iterator<Item = &'a EndpointSlice>, max_per_slice: usize) -> Tally {
        let mut tally = Tally { distribution: distribution(service), ..Tally::default() };
        // Only slices of one family and with the same ports could be merged.
        let mut groups: Vec<(&EndpointSlice, usize)> = Vec::new();
        for slice in slices {
            let endpoints = slice.endpoints.as_ref().map_or(0, Vec::len);
            tally.slices += 1;
            tally.endpoints += endpoints;
            match groups.iter_mut().find(|(s, _)| s.address_type == slice.address_type && s.ports == slice.ports) {
                Some((_, count)) => *count += endpoints,
                None => groups.push((slice, endpoints)),
            }
        }
        tally.packed = groups.iter().map(|(_, count)| count.div_ceil(max_per_slice.max(1)).max(1)).sum();
        tally
    }
}

/// `spec.trafficDistribution` as metrics name it.
fn distribution(service: &Service) -> &'static str {
    match service.spec.as_ref().and_then(|s| s.traffic_distribution.as_deref()) {
        None => "",
        Some("PreferClose") => "PreferClose",
        Some("PreferSameZone") => "PreferSameZone",
        Some("PreferSameNode") => "PreferSameNode",
        Some(_) => "ImplementationSpecific",
    }
}

const POISONED: &str = "no endpoint controller panics while it holds a lock";

impl Shared {
    fn caches(&self) -> &Caches {
        &self.context.caches
    }

    fn enqueue(&self, key: Key) {
        if self.which.slices {
            self.slice_queue.add(key.clone());
        }
        if self.which.legacy {
            self.legacy_queue.add(key);
        }
    }

    /// Replaces what a Service adds to the gauges; `None` when it is gone.
    fn count(&self, key: &Key, now: Option<Tally>) {
        let before = {
            let mut tally = self.tally.lock().expect(POISONED);
            match now {
                Some(now) => tally.insert(key.clone(), now),
                None => tally.remove(key),
            }
        }
        .unwrap_or_default();
        let now = now.unwrap_or_default();
        let difference =
            |a: usize, b: usize| i64::try_from(a).unwrap_or(i64::MAX) - i64::try_from(b).unwrap_or(i64::MAX);
        let metrics = &self.context.metrics;
        metrics.endpoints_desired.inc_by(difference(now.endpoints, before.endpoints));
        metrics.slices.inc_by(difference(now.slices, before.slices));
        metrics.slices_desired.inc_by(difference(now.packed, before.packed));
        if now.distribution != before.distribution {
            for (value, step) in [(before.distribution, -1), (now.distribution, 1)] {
                if !value.is_empty() {
                    let label = Distribution { traffic_distribution: value };
                    metrics.distributions.get_or_create_owned(&label).inc_by(step);
                }
            }
        }
    }

    fn pod_changed(&self, old: Option<&Arc<Pod>>, new: Option<&Arc<Pod>>) {
        if let (Some(old), Some(new)) = (old, new)
            && PodFacts::of(old) == PodFacts::of(new)
        {
            return;
        }
        let Some(namespace) = old.or(new).and_then(|p| p.metadata.namespace.clone()) else { return };
        let mut services = BTreeSet::new();
        {
            let selectors = self.selectors.read().expect(POISONED);
            for pod in [old, new].into_iter().flatten() {
                services.extend(selectors.candidates(&namespace, pod.metadata.labels.as_ref()));
            }
        }
        for name in services {
            let Some(service) = self.caches().services.get(&namespace, &name) else { continue };
            let hit =
                |pod: Option<&Arc<Pod>>| pod.is_some_and(|p| slices::selects(&service, p.metadata.labels.as_ref()));
            if hit(old) || hit(new) {
                self.enqueue(Key::new(&namespace, name));
            }
        }
    }

    fn node_changed(&self, name: &str, facts: Option<NodeFacts>) {
        let before = {
            let mut topology = self.topology.write().expect(POISONED);
            if topology.nodes.get(name) == facts.as_ref() {
                return;
            }
            let nodes = &mut Arc::make_mut(&mut topology).nodes;
            match facts.clone() {
                Some(facts) => nodes.insert(name.to_string(), facts),
                None => nodes.remove(name),
            }
        };
        let waiting = self.awaiting.lock().expect(POISONED).remove(name).unwrap_or_default();
        for key in waiting {
            self.slice_queue.add(key);
        }
        // Zones show in endpoints; nodes that leave take their endpoints along. Upstream waits for another reason to sync.
        let zone = |facts: Option<&NodeFacts>| facts.map(|f| f.zone.clone());
        if before.is_some() && zone(before.as_ref()) != zone(facts.as_ref()) {
            let on_node = |pod: &Arc<Pod>| pod.spec.as_ref().and_then(|s| s.node_name.as_deref()) == Some(name);
            for pod in self.caches().pods.all().iter().filter(|p| on_node(p)) {
                self.pod_changed(None, Some(pod));
            }
        }
        // Proportional hints depend on all nodes.
        let hinted: Vec<Key> = self.hinted.lock().expect(POISONED).keys().cloned().collect();
        for key in hinted {
            self.slice_queue.add(key);
        }
    }
}

/// Registers with the caches and returns the future that works.
pub(crate) fn start(context: Context, which: Which) -> impl Future<Output = ()> + Send + 'static {
    run(register(context, which))
}

fn register(context: Context, which: Which) -> Arc<Shared> {
    let shared = Arc::new(Shared {
        which,
        slice_queue: context.queue("endpoint_slice"),
        legacy_queue: context.queue("endpoint"),
        mirror_queue: context.queue("endpoint_slice_mirroring"),
        topology: RwLock::new(Arc::default()),
        selectors: RwLock::default(),
        awaiting: Mutex::default(),
        slice_triggers: Mutex::default(),
        legacy_triggers: Mutex::default(),
        hinted: Mutex::default(),
        tally: Mutex::default(),
        context,
    });
    let caches = shared.caches().clone();
    let on = shared.clone();
    caches.services.on_change(move |old, new| {
        let Some(service) = new.or(old) else { return };
        let key = Key::of(&**service);
        {
            let labels = |service: &Service| service.spec.as_ref().and_then(|s| s.selector.clone());
            let mut selectors = on.selectors.write().expect(POISONED);
            if let Some(old) = old {
                selectors.remove(&key.namespace, &key.name, labels(old).as_ref());
            }
            if let Some(new) = new {
                selectors.insert(&key.namespace, &key.name, labels(new).as_ref());
            }
        }
        on.enqueue(key.clone());
        if on.which.mirroring {
            on.mirror_queue.add(key);
        }
    });
    if which.slices || which.legacy {
        let on = shared.clone();
        caches.pods.on_change(move |old, new| on.pod_changed(old, new));
    }
    if which.slices || which.mirroring {
        let on = shared.clone();
        caches.slices.on_change(move |old, new| {
            for slice in [old, new].into_iter().flatten() {
                let labels = slice.metadata.labels.as_ref();
                let (Some(service), Some(namespace)) =
                    (labels.and_then(|l| l.get(slices::SERVICE_NAME)), slice.metadata.namespace.as_ref())
                else {
                    continue;
                };
                let key = Key::new(namespace, service);
                match labels.and_then(|l| l.get(slices::MANAGED_BY)).map(String::as_str) {
                    Some(slices::SLICE_CONTROLLER) if on.which.slices => on.slice_queue.add(key),
                    Some(slices::MIRROR_CONTROLLER) if on.which.mirroring => on.mirror_queue.add(key),
                    _ => {}
                }
            }
        });
    }
    if which.slices {
        let on = shared.clone();
        caches.nodes.on_change(move |old, new| {
            let Some(name) = new.or(old).and_then(|n| n.metadata.name.clone()) else { return };
            on.node_changed(&name, new.map(|n| NodeFacts::of(n)));
        });
    }
    if which.legacy || which.mirroring {
        let on = shared.clone();
        caches.endpoints.on_change(move |old, new| {
            let Some(endpoints) = new.or(old) else { return };
            let key = Key::of(&**endpoints);
            if on.which.mirroring {
                on.mirror_queue.add(key.clone());
            }
            // Hand edits of managed Endpoints are put back, deleted ones made again; orphans are found at start, when everything
            // is new. Endpoints that a person wrote before their Service are left alone.
            let managed = endpoints.metadata.labels.as_ref().is_some_and(|l| l.contains_key(legacy::MANAGED_BY));
            if on.which.legacy && (managed || new.is_none()) {
                on.legacy_queue.add(key);
            }
        });
    }
    shared
}

async fn run(shared: Arc<Shared>) {
    let context = &shared.context;
    let slice_events = context.recorder("endpoint-slice-controller");
    let legacy_events = context.recorder("endpoint-controller");
    let mirror_events = context.recorder("endpoint-slice-mirroring-controller");
    let stop = || context.shutdown.clone();
    let slices = {
        let (shared, events) = (shared.clone(), slice_events);
        shared.clone().slice_queue.clone().run_workers(stop(), move |key| {
            let (shared, events) = (shared.clone(), events.clone());
            async move {
                let result = sync_slices(shared.clone(), events, key).await;
                let outcome = Outcome { result: if result.is_ok() { "success" } else { "error" } };
                shared.context.metrics.syncs.get_or_create_owned(&outcome).inc();
                result
            }
        })
    };
    let legacy = {
        let (shared, events) = (shared.clone(), legacy_events);
        shared
            .clone()
            .legacy_queue
            .clone()
            .run_workers(stop(), move |key| sync_legacy(shared.clone(), events.clone(), key))
    };
    let mirror = {
        let (shared, events) = (shared.clone(), mirror_events);
        shared
            .clone()
            .mirror_queue
            .clone()
            .run_workers(stop(), move |key| sync_mirror(shared.clone(), events.clone(), key))
    };
    tokio::join!(slices, legacy, mirror);
}

impl Queue<Key> {
    async fn run_workers<F, Fut>(self, stop: tokio_util::sync::CancellationToken, sync: F)
    where
        F: Fn(Key) -> Fut + Clone + Send + 'static,
        Fut: Future<Output = anyhow::Result<Next>> + Send,
    {
        self.work(WORKERS, stop, sync).await;
    }
}

fn managed(caches: &Caches, key: &Key, by: &str) -> Vec<Arc<EndpointSlice>> {
    caches.slices.labelled(&key.namespace, [(slices::SERVICE_NAME, key.name.as_str()), (slices::MANAGED_BY, by)])
}

/// The pods that a Service selects.
fn selected(caches: &Caches, service: &Service) -> Vec<Arc<Pod>> {
    let Some(selector) = slices::selector(service) else { return Vec::new() };
    let namespace = service.metadata.namespace.as_deref().unwrap_or_default();
    caches.pods.labelled(namespace, selector.iter().map(|(k, v)| (k.as_str(), v.as_str())))
}

fn observe(
    triggers: &Mutex<HashMap<Key, TriggerTimes>>,
    key: &Key,
    service: &Service,
    pods: &[Arc<Pod>],
) -> Option<String> {
    let selected: Vec<&Arc<Pod>> =
        pods.iter().filter(|p| slices::selects(service, p.metadata.labels.as_ref())).collect();
    let mut triggers = triggers.lock().expect(POISONED);
    triggers.entry(key.clone()).or_default().observe(service, &selected).map(|at| at.to_string())
}

async fn sync_slices(shared: Arc<Shared>, events: EventRecorder, key: Key) -> anyhow::Result<Next> {
    let caches = shared.caches();
    let existing = managed(caches, &key, slices::SLICE_CONTROLLER);
    let Some(service) = caches.services.get(&key.namespace, &key.name) else {
        // The garbage collector removes the slices with their owner.
        shared.slice_triggers.lock().expect(POISONED).remove(&key);
        shared.hinted.lock().expect(POISONED).remove(&key);
        shared.count(&key, None);
        return Ok(Next::Wait);
    };
    if !slices::has_selected_endpoints(&service) {
        shared.slice_triggers.lock().expect(POISONED).remove(&key);
        shared.hinted.lock().expect(POISONED).remove(&key);
        // Without a selector the slices stay (people freeze endpoints that way) until the mirror of the Endpoints says the same:
        // both together would keep stale endpoints alive.
        if slices::selector(&service).is_none() && !managed(caches, &key, slices::MIRROR_CONTROLLER).is_empty() {
            let changes = Changes { delete: existing, ..Default::default() };
            apply(&shared, &key, changes).await?;
        }
        return Ok(Next::Wait);
    }
    let pods = selected(caches, &service);
    let topology = shared.topology.read().expect(POISONED).clone();
    let hinted = shared.hinted.lock().expect(POISONED).get(&key).cloned().unwrap_or_default();
    let trigger_time = observe(&shared.slice_triggers, &key, &service, &pods);
    let mut changes = slices::reconcile(&slices::Input {
        service: &service,
        pods: &pods,
        topology: &topology,
        existing: &existing,
        trigger_time,
        max_per_slice: shared.which.max_per_slice,
        hinted: &hinted,
    });
    for (warning, reason, text) in changes.events.drain(..) {
        let kind = if warning { EventType::Warning } else { EventType::Normal };
        events.event(&reference(&*service), kind, reason, text);
    }
    {
        let mut hinted = shared.hinted.lock().expect(POISONED);
        // Services whose hints are asked for but withheld also wait for the nodes to change.
        match slices::hints::is_proportional(&service) {
            true => hinted.insert(key.clone(), std::mem::take(&mut changes.hinted)),
            false => hinted.remove(&key),
        };
    }
    let waiting = std::mem::take(&mut changes.waiting);
    {
        let mut awaiting = shared.awaiting.lock().expect(POISONED);
        for (_, node) in &waiting {
            awaiting.entry(node.clone()).or_default().insert(key.clone());
        }
    }
    let effect = Effect::of(&service, &changes, &existing, shared.which.max_per_slice);
    let hints = Hints {
        topology: if slices::hints::is_proportional(&service) { "Auto" } else { "Disabled" },
        traffic_distribution: distribution(&service),
    };
    if let Err(error) = apply(&shared, &key, changes).await {
        if !is_conflict(&error) && !is_not_found(&error) {
            let text = format!(
                "Error updating Endpoint Slices for Service {}/{}: {}",
                key.namespace,
                key.name,
                message(&error)
            );
            events.event(&reference(&*service), EventType::Warning, "FailedToUpdateEndpointSlices", text);
        }
        return Err(error).context("cannot write endpoint slices");
    }
    shared.count(&key, Some(effect.tally));
    let metrics = &shared.context.metrics;
    metrics.endpoints_added.observe(effect.added as f64);
    metrics.endpoints_removed.observe(effect.removed as f64);
    metrics.slices_changed.get_or_create_owned(&hints).observe(effect.writes as f64);
    match waiting.first() {
        Some((pod, node)) => Err(Waiting(format!("pod {pod} is on unknown node {node:?}")).into()),
        None => Ok(Next::Wait),
    }
}

/// What a sync does to the endpoints of a Service, for the metrics.
#[derive(Debug, PartialEq, Eq)]
struct Effect {
    added: usize,
    removed: usize,
    writes: usize,
    tally: Tally,
}

impl Effect {
    fn of(service: &Service, changes: &Changes, existing: &[Arc<EndpointSlice>], max_per_slice: usize) -> Effect {
        let name = |slice: &EndpointSlice| slice.metadata.name.clone().unwrap_or_default();
        let touched: HashSet<String> =
            changes.update.iter().map(name).chain(changes.delete.iter().map(|s| name(s))).collect();
        let addresses = |slice: &EndpointSlice| -> Vec<String> {
            slice.endpoints.iter().flatten().flat_map(|e| e.addresses.iter().cloned()).collect()
        };
        let (old, kept): (Vec<_>, Vec<_>) = existing.iter().map(|s| &**s).partition(|s| touched.contains(&name(s)));
        let new = || changes.create.iter().chain(&changes.update);
        let before: HashSet<String> = old.iter().flat_map(|s| addresses(s)).collect();
        let after: HashSet<String> = new().flat_map(addresses).collect();
        Effect {
            added: after.difference(&before).count(),
            removed: before.difference(&after).count(),
            writes: changes.create.len() + changes.update.len() + changes.delete.len(),
            tally: Tally::of(service, kept.into_iter().chain(new()), max_per_slice),
        }
    }
}

/// Creates, updates, then deletes, so that an endpoint that moves is rather seen twice than not at all.
async fn apply(shared: &Shared, key: &Key, changes: Changes) -> Result<(), kube::Error> {
    let cache = &shared.caches().slices;
    let api: Api<EndpointSlice> = Api::namespaced(shared.context.client.clone(), &key.namespace);
    let count = |operation| shared.context.metrics.changes.get_or_create_owned(&Operation { operation }).inc();
    for slice in changes.create {
        match api.create(&PostParams::default(), &slice).await {
            Ok(written) => {
                count("create");
                cache.wrote_quietly(written);
            }
            Err(error) if is_namespace_terminating(&error) => return Ok(()),
            Err(error) => return Err(error),
        }
    }
    for slice in changes.update {
        let written =
            api.replace(slice.metadata.name.as_deref().unwrap_or_default(), &PostParams::default(), &slice).await;
        match written {
            Ok(written) => {
                count("update");
                cache.wrote_quietly(written);
            }
            Err(error) => {
                if is_not_found(&error) {
                    cache.deleted(&slice);
                }
                return Err(error);
            }
        }
    }
    for slice in changes.delete {
        let preconditions = Preconditions { uid: slice.metadata.uid.clone(), ..Default::default() };
        let params = DeleteParams::default().preconditions(preconditions);
        match api.delete(slice.metadata.name.as_deref().unwrap_or_default(), &params).await {
            Ok(_) => {
                count("delete");
                cache.deleted(&slice);
            }
            Err(error) if is_not_found(&error) => cache.deleted(&slice),
            Err(error) => return Err(error),
        }
    }
    Ok(())
}

async fn sync_legacy(shared: Arc<Shared>, events: EventRecorder, key: Key) -> anyhow::Result<Next> {
    let caches = shared.caches();
    let api: Api<Endpoints> = Api::namespaced(shared.context.client.clone(), &key.namespace);
    let existing = caches.endpoints.get(&key.namespace, &key.name);
    let Some(service) = caches.services.get(&key.namespace, &key.name) else {
        shared.legacy_triggers.lock().expect(POISONED).remove(&key);
        // Endpoints of a Service that is gone go too, whoever wrote them; leader election locks are nobody's endpoints.
        if let Some(orphan) = existing
            && orphan.metadata.annotations.as_ref().is_none_or(|a| !a.contains_key(mirror::LEADER))
        {
            match api.delete(&key.name, &DeleteParams::default()).await {
                Ok(_) => caches.endpoints.deleted(&orphan),
                Err(error) if is_not_found(&error) => caches.endpoints.deleted(&orphan),
                Err(error) => return Err(error).context("cannot delete endpoints"),
            }
        }
        return Ok(Next::Wait);
    };
    if !slices::has_selected_endpoints(&service) {
        return Ok(Next::Wait);
    }
    let pods = selected(caches, &service);
    let trigger_time = observe(&shared.legacy_triggers, &key, &service, &pods);
    let Some(wanted) = legacy::reconcile(&service, &pods, existing.as_deref(), trigger_time.as_deref()) else {
        return Ok(Next::Wait);
    };
    let written = match &existing {
        None => api.create(&PostParams::default(), &wanted).await,
        Some(_) => api.replace(&key.name, &PostParams::default(), &wanted).await,
    };
    match written {
        Ok(written) => caches.endpoints.wrote(written),
        Err(error) if is_namespace_terminating(&error) => {}
        Err(error) => {
            if is_not_found(&error)
                && let Some(existing) = &existing
            {
                caches.endpoints.deleted(existing);
            } else if !is_conflict(&error) && !already_exists(&error) {
                let (reason, verb) = match existing {
                    None => ("FailedToCreateEndpoint", "create"),
                    Some(_) => ("FailedToUpdateEndpoint", "update"),
                };
                let text = format!(
                    "Failed to {verb} endpoint for service {}/{}: {}",
                    key.namespace,
                    key.name,
                    message(&error)
                );
                events.event(&reference(&wanted), EventType::Warning, reason, text);
            }
            return Err(error).context("cannot write endpoints");
        }
    }
    Ok(Next::Wait)
}

async fn sync_mirror(shared: Arc<Shared>, events: EventRecorder, key: Key) -> anyhow::Result<Next> {
    let caches = shared.caches();
    let existing = managed(caches, &key, slices::MIRROR_CONTROLLER);
    let endpoints = caches.endpoints.get(&key.namespace, &key.name);
    let service = caches.services.get(&key.namespace, &key.name);
    let mut changes = match &endpoints {
        Some(endpoints) if mirror::wanted(endpoints, service.as_deref()) => mirror::reconcile(endpoints, &existing),
        _ => Changes { delete: existing, ..Default::default() },
    };
    if let Some(endpoints) = &endpoints {
        for (warning, reason, text) in changes.events.drain(..) {
            let kind = if warning { EventType::Warning } else { EventType::Normal };
            events.event(&reference(&**endpoints), kind, reason, text);
        }
    }
    apply(&shared, &key, changes).await.context("cannot write mirrored endpoint slices")?;
    // Slices left by a removed selector may go now.
    if shared.which.slices && service.is_some_and(|s| slices::selector(&s).is_none()) {
        shared.slice_queue.add(key);
    }
    Ok(Next::Wait)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::clock::Clock;
    use crate::metrics::Metrics;
    use http_body_util::BodyExt;
    use serde_json::{Value, json};
    use std::collections::BTreeSet;
    use std::sync::atomic::{AtomicU64, Ordering};
    use tokio_util::sync::CancellationToken;

    fn from<K: serde::de::DeserializeOwned>(value: Value) -> K {
        serde_json::from_value(value).unwrap()
    }

    /// An API server that agrees to every write.
    fn agreeable() -> kube::Client {
        let versions = Arc::new(AtomicU64::new(1_000_000));
        let service = tower::service_fn(move |request: http::Request<kube::client::Body>| {
            let version = versions.fetch_add(1, Ordering::Relaxed);
            async move {
                let body = request.into_body().collect().await?.to_bytes();
                let mut object: Value = serde_json::from_slice(&body).unwrap_or_else(|_| json!({}));
                if object["metadata"]["name"].is_null() {
                    object["metadata"]["name"] = json!(format!("made-{version}"));
                }
                object["metadata"]["resourceVersion"] = json!(version.to_string());
                let answer = http::Response::new(kube::client::Body::from(serde_json::to_vec(&object).unwrap()));
                Ok::<_, kube::Error>(answer)
            }
        });
        kube::Client::new(service, "default")
    }

    fn pod(n: usize, version: usize, ready: bool) -> Pod {
        let status = if ready { "True" } else { "False" };
        from(json!({
            "metadata": {"name": format!("p{n}"), "namespace": "ns", "uid": format!("p{n}"), "resourceVersion": version.to_string(),
                "labels": {"app": format!("a{}", n / 10), "team": "all"}},
            "spec": {"nodeName": "n1", "containers": []},
            "status": {"phase": "Running", "podIP": format!("10.{}.{}.{}", n >> 16, n >> 8 & 255, n & 255),
                "podIPs": [{"ip": format!("10.{}.{}.{}", n >> 16, n >> 8 & 255, n & 255)}],
                "conditions": [{"type": "Ready", "status": status}]}
        }))
    }

    /// One pod of 10 000 changes; its Service has 10 of them, and there are 1 000 Services, all in one namespace.
    #[tokio::test]
    async fn a_change_of_one_pod_costs_what_its_service_has() {
        let context = Context {
            client: agreeable(),
            caches: Caches::default(),
            shutdown: CancellationToken::new(),
            clock: Clock::default(),
            metrics: Metrics::default(),
        };
        let which = Which { slices: true, legacy: true, mirroring: false, max_per_slice: 100 };
        let shared = register(context.clone(), which);
        let caches = &context.caches;
        caches.nodes.wrote(from(json!({"metadata": {"name": "n1", "uid": "n1"}})));
        for n in 0..1_000 {
            caches.services.wrote(from(json!({
                "metadata": {"name": format!("s{n}"), "namespace": "ns", "uid": format!("s{n}")},
                "spec": {"clusterIP": "10.96.0.1", "clusterIPs": ["10.96.0.1"], "ipFamilies": ["IPv4"],
                    "selector": {"app": format!("a{n}"), "team": "all"}, "ports": [{"port": 80}]}
            })));
        }
        for n in 0..10_000 {
            caches.pods.wrote(pod(n, n + 1, true));
        }
        let events = context.recorder("test");
        // All Services once, as at start.
        for key in shared.slice_queue.drain() {
            sync_slices(shared.clone(), events.clone(), key).await.unwrap();
        }
        // Endpoints that have been written are looked at once more.
        for _ in 0..2 {
            for key in shared.legacy_queue.drain() {
                sync_legacy(shared.clone(), events.clone(), key).await.unwrap();
            }
        }
        assert_eq!(context.metrics.endpoints_desired.get(), 10_000);
        assert_eq!((context.metrics.slices.get(), context.metrics.slices_desired.get()), (1_000, 1_000));
        let work = || {
            let lists =
                [caches.pods.examined(), caches.services.examined(), caches.slices.examined(), caches.nodes.examined()];
            lists.into_iter().sum::<u64>()
        };
        let before = work();
        caches.pods.wrote(pod(4_321, 20_000, false));
        let woken = shared.slice_queue.drain();
        assert_eq!(woken, [Key::new("ns", "s432")]);
        for key in woken {
            sync_slices(shared.clone(), events.clone(), key).await.unwrap();
        }
        for key in shared.legacy_queue.drain() {
            sync_legacy(shared.clone(), events.clone(), key).await.unwrap();
        }
        // Ten pods for each of the two controllers, and one slice.
        assert_eq!(work() - before, 21);
        let ready: BTreeSet<Option<bool>> = managed(caches, &Key::new("ns", "s432"), slices::SLICE_CONTROLLER)
            .iter()
            .flat_map(|s| s.endpoints.clone().unwrap_or_default())
            .map(|e| e.conditions.unwrap().ready)
            .collect();
        assert_eq!(ready, BTreeSet::from([Some(false), Some(true)]), "the change has been written");
    }

    #[test]
    fn effects_are_counted() {
        let slice = |name: &str, addresses: &[&str]| -> EndpointSlice {
            let endpoints: Vec<Value> = addresses.iter().map(|a| json!({"addresses": [a]})).collect();
            from(json!({"metadata": {"name": name}, "addressType": "IPv4", "endpoints": endpoints}))
        };
        let existing = [Arc::new(slice("a", &["1", "2"])), Arc::new(slice("b", &["3"])), Arc::new(slice("c", &["4"]))];
        let changes = Changes {
            create: vec![slice("", &["7"])],
            update: vec![slice("a", &["2", "3", "5"])],
            delete: vec![existing[1].clone()],
            ..Default::default()
        };
        let service: Service = from(json!({"spec": {"trafficDistribution": "PreferSameZone"}}));
        let tally = Tally { endpoints: 5, slices: 3, packed: 2, distribution: "PreferSameZone" };
        assert_eq!(Effect::of(&service, &changes, &existing, 3), Effect { added: 2, removed: 1, writes: 3, tally });
    }
}
