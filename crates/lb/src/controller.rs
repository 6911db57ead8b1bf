//! The service controller: follows the objects, calls the provider, writes status, finalizer and events.

use std::collections::{BTreeMap, BTreeSet, HashMap, HashSet};
use std::sync::Arc;
use std::time::Duration;

use futures::stream::{BoxStream, select_all};
use futures::{StreamExt, TryStreamExt};
use k8s_openapi::api::core::v1::{LoadBalancerIngress, Node, ObjectReference, Service};
use k8s_openapi::api::discovery::v1::EndpointSlice;
use kube::api::{Patch, PatchParams};
use kube::runtime::WatchStreamExt;
use kube::runtime::watcher::{self, Event, watcher};
use kube::{Api, Client, ResourceExt};
use portolan_client::{EventRecorder, EventType};
use portolan_observe::{Observer, ReadyGate};
use portolan_plan::announce::{Key, NodeTarget, SliceTargets, service_key, slice_targets};
use prometheus_client::metrics::counter::Counter;
use tokio::time::Instant;

use crate::decide::{self, Classes, FINALIZER, Intent, Queue};
use crate::provider::{Provider, ProviderError, TargetSet};

/// Events taken together before the queue is looked at.
const TOGETHER: usize = 64;
/// Tries of a patch that meets a change of somebody else's.
const CONFLICTS: u32 = 5;

#[allow(clippy::large_enum_variant, reason = "short-lived: applied as soon as made")]
enum Change {
    Service(Event<Service>),
    Slice(Event<EndpointSlice>),
    Node(Event<Node>),
}

fn stream<K>(client: &Client, wrap: fn(Event<K>) -> Change) -> BoxStream<'static, Change>
where
    K: kube::Resource<DynamicType = ()> + Clone + std::fmt::Debug + serde::de::DeserializeOwned + Send + 'static,
{
    let kind = K::kind(&());
    let mut failing = false;
    watcher(Api::<K>::all(client.clone()), watcher::Config::default().page_size(500))
        .default_backoff()
        .map(move |event| {
            match &event {
                Err(error) if !failing => {
                    tracing::warn!(%kind, %error, "watch broken, keeping load balancers as they are")
                }
                Ok(_) if failing => tracing::info!(%kind, "watch restored"),
                _ => {}
            }
            failing = event.is_err();
            event
        })
        .into_stream()
        .filter_map(move |event| std::future::ready(event.ok().map(wrap)))
        .boxed()
}

/// Why a reconcile failed, in the words of Kubernetes' service controller.
#[derive(Debug, thiserror::Error)]
enum SyncError {
    #[error("failed to ensure load balancer: {0}")]
    Ensure(#[source] ProviderError),
    #[error("failed to delete load balancer: {0}")]
    Delete(#[source] ProviderError),
    #[error("failed to add load balancer cleanup finalizer: {0}")]
    AddFinalizer(#[source] kube::Error),
    #[error("failed to remove load balancer cleanup finalizer: {0}")]
    RemoveFinalizer(#[source] kube::Error),
    #[error("failed to update load balancer status: {0}")]
    Status(#[source] kube::Error),
}

/// Objects of one kind seen since a list began; the others are gone at its end.
#[derive(Default)]
struct Listing {
    seen: Option<HashSet<String>>,
    complete: bool,
}

impl Listing {
    /// Splits an event into the object to set and the keys to remove; `known` are all keys at the end of a list.
    fn step<K: kube::Resource>(
        &mut self,
        event: Event<K>,
        known: impl FnOnce() -> Vec<String>,
    ) -> (Option<K>, Vec<String>) {
        match event {
            Event::Init => {
                self.seen = Some(HashSet::new());
                (None, Vec::new())
            }
            Event::InitApply(object) => {
                if let Some(seen) = &mut self.seen {
                    seen.insert(object_key(&object));
                }
                (Some(object), Vec::new())
            }
            Event::InitDone => {
                self.complete = true;
                let seen = self.seen.take().unwrap_or_default();
                (None, known().into_iter().filter(|k| !seen.contains(k)).collect())
            }
            Event::Apply(object) => (Some(object), Vec::new()),
            Event::Delete(object) => (None, vec![object_key(&object)]),
        }
    }
}

fn object_key<K: kube::Resource>(object: &K) -> String {
    format!("{}/{}", object.namespace().unwrap_or_default(), object.name_any())
}

pub(crate) struct Controller {
    provider: Box<dyn Provider>,
    classes: Classes,
    client: Client,
    /// Events of the service controller, and of address allocation, which users know from MetalLB.
    events: EventRecorder,
    allocation_events: EventRecorder,
    syncs: Counter,
    gate: ReadyGate,
    started: Instant,

    /// Services that are or were load balancers, as last seen.
    services: HashMap<Key, Arc<Service>>,
    /// What was last worked on: tells a new Service of the same name apart, and survives the object.
    remembered: HashMap<Key, Arc<Service>>,
    /// By name of the slice.
    slices: HashMap<String, SliceTargets>,
    slices_of: HashMap<Key, BTreeSet<String>>,
    nodes: BTreeMap<String, NodeTarget>,

    queue: Queue,
    /// Services that wait for an address.
    waiting: BTreeSet<Key>,
    /// Warned about already: uid, annotation, value.
    warned: HashSet<(String, String, String)>,
}

impl Controller {
    pub(crate) fn new(
        provider: Box<dyn Provider>,
        classes: Classes,
        client: Client,
        observer: &Observer,
        gate: ReadyGate,
    ) -> Controller {
        let syncs = Counter::default();
        observer.register(|r| {
            let help = "Reconciles of load balancers.";
            r.register("service_controller_loadbalancer_sync", help, syncs.clone());
        });
        Controller {
            provider,
            classes,
            events: EventRecorder::new(client.clone(), "service-controller", None),
            allocation_events: EventRecorder::new(client.clone(), "metallb-controller", None),
            client,
            syncs,
            gate,
            started: Instant::now(),
            services: HashMap::new(),
            remembered: HashMap::new(),
            slices: HashMap::new(),
            slices_of: HashMap::new(),
            nodes: BTreeMap::new(),
            queue: Queue::default(),
            waiting: BTreeSet::new(),
            warned: HashSet::new(),
        }
    }

    fn now(&self) -> Duration {
        self.started.elapsed()
    }

    pub(crate) async fn run(mut self) {
        let client = self.client.clone();
        let streams =
            vec![stream(&client, Change::Service), stream(&client, Change::Slice), stream(&client, Change::Node)];
        drop(client);
        let mut changes = select_all(streams).ready_chunks(TOGETHER);
        let (mut services, mut slices, mut nodes) = (Listing::default(), Listing::default(), Listing::default());
        let mut synced = false;
        loop {
            let due = self.queue.next().filter(|_| synced).map(|due| self.started + due);
            let batch = tokio::select! {
                batch = changes.next() => match batch {
                    Some(batch) => batch,
                    None => return,
                },
                () = async { match due {
                    Some(due) => tokio::time::sleep_until(due).await,
                    None => std::future::pending().await,
                } } => Vec::new(),
            };
            let mut targets_changed = BTreeSet::new();
            let mut nodes_changed = false;
            for change in batch {
                match change {
                    Change::Service(event) => {
                        let (set, gone) = services.step(event, || self.services.keys().cloned().collect());
                        if let Some(service) = set {
                            self.set_service(service, synced);
                        }
                        gone.into_iter().for_each(|key| self.forget_service(key));
                    }
                    Change::Slice(event) => {
                        let (set, gone) = slices.step(event, || self.slices.keys().cloned().collect());
                        if let Some(slice) = set {
                            targets_changed.extend(self.set_slice(object_key(&slice), slice_targets(&slice)));
                        }
                        for key in gone {
                            targets_changed.extend(self.set_slice(key, None));
                        }
                    }
                    Change::Node(event) => {
                        let (set, gone) = nodes.step(event, || self.nodes.keys().map(|n| format!("/{n}")).collect());
                        nodes_changed |= self.set_nodes(set, gone);
                    }
                }
            }
            if !synced {
                if !(services.complete && slices.complete && nodes.complete) {
                    continue;
                }
                synced = true;
                self.take_over();
            }
            if nodes_changed {
                self.update_nodes().await;
            }
            self.update_targets(targets_changed).await;
            // One Service at a time, so that changes of endpoints never wait for more than one of them.
            if let Some(key) = self.queue.pop(self.now()) {
                self.work(key).await;
            }
            if self.queue.next().is_none_or(|due| due > self.now()) {
                self.gate.ready();
            }
        }
    }

    /// Takes over what an earlier process made: those with an address first and the oldest first, so that nobody loses one.
    fn take_over(&mut self) {
        let mut all: Vec<Arc<Service>> = self.services.values().cloned().collect();
        let has_address = |s: &Service| {
            s.status
                .as_ref()
                .and_then(|s| s.load_balancer.as_ref())
                .is_some_and(|l| l.ingress.iter().flatten().count() > 0)
        };
        all.sort_by_key(|s| (!has_address(s), s.metadata.creation_timestamp.clone(), service_key(s)));
        for service in &all {
            if decide::intent(service, &self.classes) == Intent::Ensure {
                let slices = self.slices_for(&service_key(service));
                let nodes: Vec<NodeTarget> = self.nodes.values().cloned().collect();
                let slices: Vec<&SliceTargets> = slices.iter().collect();
                self.provider.adopt(service, TargetSet { nodes: &nodes, slices: &slices });
            }
        }
        for (i, service) in all.iter().enumerate() {
            if decide::intent(service, &self.classes) != Intent::Ignore {
                // Nanoseconds apart: the queue keeps the order.
                self.queue.add(service_key(service), Duration::from_nanos(i as u64));
            }
        }
    }

    fn set_service(&mut self, mut service: Service, synced: bool) {
        service.metadata.managed_fields = None;
        let key = service_key(&service);
        let intent = decide::intent(&service, &self.classes);
        let old = self.services.get(&key).cloned();
        if intent == Intent::Ignore && old.is_none() {
            return;
        }
        let relevant = match &old {
            Some(old) => intent == Intent::Clean || decide::is_relevant(old, &service),
            None => true,
        };
        self.services.insert(key.clone(), Arc::new(service));
        if relevant && synced {
            self.queue.add(key, self.now());
        }
    }

    fn forget_service(&mut self, key: Key) {
        if self.services.remove(&key).is_some() {
            self.queue.add(key, self.now());
        }
    }

    /// Returns the Services whose targets may have changed.
    fn set_slice(&mut self, name: String, new: Option<SliceTargets>) -> BTreeSet<Key> {
        let old = match &new {
            Some(new) => self.slices.insert(name.clone(), new.clone()),
            None => self.slices.remove(&name),
        };
        if old == new {
            return BTreeSet::new();
        }
        if let Some(old) = &old
            && let Some(names) = self.slices_of.get_mut(&old.service)
        {
            names.remove(&name);
            if names.is_empty() {
                self.slices_of.remove(&old.service);
            }
        }
        if let Some(new) = &new {
            self.slices_of.entry(new.service.clone()).or_default().insert(name);
        }
        old.into_iter().chain(new).map(|s| s.service).collect()
    }

    fn slices_for(&self, key: &str) -> Vec<SliceTargets> {
        self.slices_of.get(key).into_iter().flatten().filter_map(|name| self.slices.get(name)).cloned().collect()
    }

    fn set_nodes(&mut self, set: Option<Node>, gone: Vec<String>) -> bool {
        let mut changed = false;
        if let Some(node) = set {
            changed |= match decide::node_target(&node) {
                Some(target) => {
                    let old = self.nodes.insert(target.name.clone(), target.clone());
                    old.as_ref() != Some(&target)
                }
                None => self.nodes.remove(&node.name_any()).is_some(),
            };
        }
        for key in gone {
            changed |= self.nodes.remove(key.trim_start_matches('/')).is_some();
        }
        changed
    }

    async fn update_nodes(&mut self) {
        let mut keys: Vec<Key> = self.remembered.keys().cloned().collect();
        keys.sort();
        for key in keys {
            let Some(service) = self.remembered.get(&key).cloned() else { continue };
            let reference = reference(&service);
            if self.nodes.is_empty() {
                let message = "There are no available nodes for LoadBalancer";
                self.events.event(&reference, EventType::Warning, "UnAvailableLoadBalancer", message);
            }
            match self.update(&key, &service).await {
                Ok(()) => {
                    let message = "Updated load balancer with new hosts";
                    self.events.event(&reference, EventType::Normal, "UpdatedLoadBalancer", message);
                }
                Err(error) => {
                    let names: Vec<&str> = self.nodes.keys().map(String::as_str).collect();
                    let message = update_failed(&names, &error.to_string());
                    self.events.event(&reference, EventType::Warning, "UpdateLoadBalancerFailed", message);
                    self.queue.retry(key, self.now());
                }
            }
        }
    }

    async fn update_targets(&mut self, keys: BTreeSet<Key>) {
        for key in keys {
            let Some(service) = self.remembered.get(&key).cloned() else { continue };
            if let Err(error) = self.update(&key, &service).await {
                tracing::warn!(service = key, %error, "cannot change targets");
                self.queue.retry(key, self.now());
            }
        }
    }

    async fn update(&mut self, key: &str, service: &Service) -> Result<(), ProviderError> {
        let slices = self.slices_for(key);
        let slices: Vec<&SliceTargets> = slices.iter().collect();
        let nodes: Vec<NodeTarget> = self.nodes.values().cloned().collect();
        self.provider.update(service, TargetSet { nodes: &nodes, slices: &slices }).await
    }

    async fn work(&mut self, key: Key) {
        self.syncs.inc();
        match self.sync(&key).await {
            Ok(()) => self.queue.forget(&key),
            Err((service, error)) => {
                let message = format!("Error syncing load balancer: {error}");
                tracing::warn!(service = key, %error, "cannot sync load balancer");
                self.events.event(&reference(&service), EventType::Warning, "SyncLoadBalancerFailed", message);
                let needs_edit = match &error {
                    SyncError::Ensure(ProviderError::Address(cause)) => {
                        let message = format!("Failed to allocate IP for {key:?}: {cause}");
                        self.allocation_events.event(
                            &reference(&service),
                            EventType::Warning,
                            "AllocationFailed",
                            message,
                        );
                        if !cause.needs_edit() {
                            self.waiting.insert(key.clone());
                        }
                        cause.needs_edit()
                    }
                    _ => false,
                };
                if needs_edit {
                    self.queue.park(key, self.now());
                } else {
                    self.queue.retry(key, self.now());
                }
            }
        }
    }

    /// Something was given back: those that wait for an address try again at once.
    fn wake_waiting(&mut self) {
        let now = self.now();
        for key in std::mem::take(&mut self.waiting) {
            self.queue.add(key, now);
        }
    }

    async fn sync(&mut self, key: &str) -> Result<(), (Arc<Service>, SyncError)> {
        self.waiting.remove(key);
        let service = self.services.get(key).cloned();
        let last = self.remembered.get(key).cloned();
        let replaced = |last: &Service| service.as_ref().is_none_or(|s| s.metadata.uid != last.metadata.uid);
        if let Some(last) = last.filter(|last| replaced(last)) {
            // The object went without us removing the finalizer, maybe by hand.
            let freed = match self.provider.ensure_deleted(&last).await {
                Ok(freed) => freed,
                Err(error) => {
                    let message = format!("Error deleting load balancer: {error}");
                    self.events.event(&reference(&last), EventType::Warning, "DeleteLoadBalancerFailed", message);
                    return Err((last, SyncError::Delete(error)));
                }
            };
            self.remembered.remove(key);
            self.warned.retain(|(uid, ..)| Some(uid) != last.metadata.uid.as_ref());
            if freed {
                self.wake_waiting();
            }
        }
        let Some(service) = service else { return Ok(()) };
        match decide::intent(&service, &self.classes) {
            Intent::Ignore => {
                if !self.remembered.contains_key(key) {
                    self.services.remove(key);
                }
                Ok(())
            }
            Intent::Clean => self.clean(key, &service).await.map_err(|e| (service, e)),
            Intent::Ensure => {
                self.remembered.insert(key.to_string(), Arc::clone(&service));
                self.ensure(key, &service).await.map_err(|e| (service, e))
            }
        }
    }

    async fn clean(&mut self, key: &str, service: &Service) -> Result<(), SyncError> {
        let reference = reference(service);
        if self.provider.exists(service) {
            self.events.event(&reference, EventType::Normal, "DeletingLoadBalancer", "Deleting load balancer");
        }
        // Also when none is known: leftovers go too.
        let freed = self.provider.ensure_deleted(service).await.map_err(SyncError::Delete)?;
        if freed {
            self.wake_waiting();
        }
        self.change_finalizer(service, false).await.map_err(SyncError::RemoveFinalizer)?;
        self.events.event(&reference, EventType::Normal, "DeletedLoadBalancer", "Deleted load balancer");
        self.remembered.remove(key);
        self.services.remove(key);
        self.warned.retain(|(uid, ..)| Some(uid) != service.metadata.uid.as_ref());
        if service.metadata.deletion_timestamp.is_none() {
            self.patch_status(service, &[]).await?;
        }
        Ok(())
    }

    async fn ensure(&mut self, key: &str, service: &Service) -> Result<(), SyncError> {
        let reference = reference(service);
        self.events.event(&reference, EventType::Normal, "EnsuringLoadBalancer", "Ensuring load balancer");
        if !decide::has_finalizer(service) {
            self.change_finalizer(service, true).await.map_err(SyncError::AddFinalizer)?;
        }
        let uid = service.metadata.uid.clone().unwrap_or_default();
        for ignored in self.provider.ignored(service) {
            if self.warned.insert((uid.clone(), ignored.name.clone(), ignored.value.clone())) {
                self.events.event(&reference, EventType::Warning, "AnnotationIgnored", ignored.message());
            }
        }
        if self.nodes.is_empty() {
            let message = "There are no available nodes for LoadBalancer";
            self.events.event(&reference, EventType::Warning, "UnAvailableLoadBalancer", message);
        }
        let slices = self.slices_for(key);
        let slices: Vec<&SliceTargets> = slices.iter().collect();
        let nodes: Vec<NodeTarget> = self.nodes.values().cloned().collect();
        let desired = self.provider.ensure(service, TargetSet { nodes: &nodes, slices: &slices }).await;
        let desired = desired.map_err(SyncError::Ensure)?;
        let addresses =
            |ingress: &[LoadBalancerIngress]| -> Vec<String> { ingress.iter().filter_map(|i| i.ip.clone()).collect() };
        let before = service.status.as_ref().and_then(|s| s.load_balancer.as_ref()).and_then(|l| l.ingress.clone());
        if addresses(&before.unwrap_or_default()) != addresses(&desired) {
            let message = format!("Assigned IP {:?}", addresses(&desired));
            self.allocation_events.event(&reference, EventType::Normal, "IPAllocated", message);
            // A changed request may have freed the address it had.
            self.wake_waiting();
        }
        self.events.event(&reference, EventType::Normal, "EnsuredLoadBalancer", "Ensured load balancer");
        self.patch_status(service, &desired).await
    }

    fn api(&self, service: &Service) -> Api<Service> {
        Api::namespaced(self.client.clone(), service.metadata.namespace.as_deref().unwrap_or("default"))
    }

    /// Adds or removes the finalizer. The patch carries the resourceVersion, so that finalizers of others are not lost.
    async fn change_finalizer(&mut self, service: &Service, add: bool) -> Result<(), kube::Error> {
        let api = self.api(service);
        let mut current = service.clone();
        for tries in 0.. {
            let mut finalizers = current.metadata.finalizers.clone().unwrap_or_default();
            if finalizers.iter().any(|f| f == FINALIZER) == add {
                return Ok(());
            }
            if add {
                finalizers.push(FINALIZER.into())
            } else {
                finalizers.retain(|f| f != FINALIZER)
            }
            let patch = serde_json::json!({"metadata": {
                "resourceVersion": current.metadata.resource_version, "finalizers": finalizers}});
            match api.patch(&service.name_any(), &PatchParams::default(), &Patch::Merge(patch)).await {
                Ok(_) => return Ok(()),
                Err(kube::Error::Api(status)) if status.code == 404 && !add => return Ok(()),
                Err(kube::Error::Api(status)) if status.code == 409 && tries < CONFLICTS => {
                    match api.get_opt(&service.name_any()).await? {
                        Some(newer) if newer.metadata.uid == service.metadata.uid => current = newer,
                        _ => return Ok(()),
                    }
                }
                Err(error) => return Err(error),
            }
        }
        Ok(())
    }

    async fn patch_status(&self, service: &Service, desired: &[LoadBalancerIngress]) -> Result<(), SyncError> {
        if !decide::status_differs(service, desired) {
            return Ok(());
        }
        let ingress = if desired.is_empty() { serde_json::Value::Null } else { serde_json::json!(desired) };
        let patch = serde_json::json!({"status": {"loadBalancer": {"ingress": ingress}}});
        match self.api(service).patch_status(&service.name_any(), &PatchParams::default(), &Patch::Merge(patch)).await {
            Ok(_) => Ok(()),
            // Gone meanwhile: its deletion is on its way here.
            Err(kube::Error::Api(status)) if status.code == 404 => Ok(()),
            Err(error) => Err(SyncError::Status(error)),
        }
    }
}

fn reference(service: &Service) -> ObjectReference {
    ObjectReference {
        api_version: Some("v1".into()),
        kind: Some("Service".into()),
        namespace: service.metadata.namespace.clone(),
        name: service.metadata.name.clone(),
        uid: service.metadata.uid.clone(),
        resource_version: service.metadata.resource_version.clone(),
        ..ObjectReference::default()
    }
}

/// The message of a failed change of nodes: twenty names at most.
fn update_failed(names: &[&str], error: &str) -> String {
    let shown = names[..names.len().min(20)].join(" ");
    let more = if names.len() > 20 { format!(" <{} more>", names.len() - 20) } else { String::new() };
    format!(
        "Error updating load balancer with new hosts [{shown}{more}] [node names limited, total number of nodes: {}], error: {error}",
        names.len()
    )
}
