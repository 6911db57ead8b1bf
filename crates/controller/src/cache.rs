//! One informer per kind for the whole process: the objects as the API server last told them, and who wants to know of changes.
//!
//! A cache answers with what this process itself has written: the object in the answer to a write enters the cache at once, and
//! the watch event that follows is recognised by its resourceVersion (which is comparable, KEP-5504). So controllers never act
//! on a state that is older than their own last act, and need neither expectations nor staleness guards.

use std::collections::{BTreeMap, HashMap, HashSet};
use std::fmt::Debug;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, RwLock};

use futures::StreamExt;
use k8s_openapi::api::apps::v1::{ControllerRevision, DaemonSet, Deployment, ReplicaSet, StatefulSet};
use k8s_openapi::api::batch::v1::{CronJob, Job};
use k8s_openapi::api::coordination::v1::Lease;
use k8s_openapi::api::core::v1::{
    ConfigMap, Endpoints, Namespace, Node, PersistentVolume, PersistentVolumeClaim, Pod, ReplicationController,
    Service, ServiceAccount,
};
use k8s_openapi::api::discovery::v1::EndpointSlice;
use k8s_openapi::api::storage::v1::StorageClass;
use k8s_openapi::apimachinery::pkg::apis::meta::v1::LabelSelector;
use k8s_openapi::serde::de::DeserializeOwned;
use kube::runtime::WatchStreamExt;
use kube::runtime::watcher::{self, Event, watcher};
use kube::{Api, Client, Resource};
use tokio::sync::watch;
use tokio_util::sync::CancellationToken;

use crate::util::controller_of;

/// What a cache can hold.
pub trait Cached: Resource<DynamicType = ()> + Clone + Debug + DeserializeOwned + Send + Sync + 'static {}

impl<K: Resource<DynamicType = ()> + Clone + Debug + DeserializeOwned + Send + Sync + 'static> Cached for K {}

/// Called with the object before and after a change; one of them is absent when it is new or gone.
type Handler<K> = Box<dyn Fn(Option<&Arc<K>>, Option<&Arc<K>>) + Send + Sync>;

/// Where a cache has an object from.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Source {
    /// The answer to a write of this process.
    Own,
    /// A watch event.
    Watch,
    /// A complete list.
    List,
}

struct Entry<K> {
    object: Arc<K>,
    /// Zero when the server's version is no number.
    version: u64,
    /// Set by a write of this process that the watch has not confirmed; the value counts relists.
    unconfirmed: Option<u64>,
}

/// Objects by label key, label value and name.
type ByLabel<K> = HashMap<String, HashMap<String, BTreeMap<String, Arc<K>>>>;

/// Objects of one kind by what controllers look for.
struct Index<K> {
    /// By namespace, label key and label value.
    labels: HashMap<String, ByLabel<K>>,
    /// By the uid of the controlling owner, then by namespace and name.
    owners: HashMap<String, BTreeMap<(String, String), Arc<K>>>,
}

impl<K: Resource> Index<K> {
    fn insert(&mut self, object: &Arc<K>) {
        let meta = object.meta();
        let (namespace, name) = key(&**object);
        if let Some(labels) = meta.labels.as_ref().filter(|l| !l.is_empty()) {
            let by_key = self.labels.entry(namespace.clone()).or_default();
            for (label, value) in labels {
                let by_value = by_key.entry(label.clone()).or_default();
                by_value.entry(value.clone()).or_default().insert(name.clone(), object.clone());
            }
        }
        if let Some(owner) = controller_of(&**object) {
            self.owners.entry(owner.uid.clone()).or_default().insert((namespace, name), object.clone());
        }
    }

    fn remove(&mut self, object: &K) {
        let meta = object.meta();
        let (namespace, name) = key(object);
        if let Some(by_key) = self.labels.get_mut(&namespace) {
            for (label, value) in meta.labels.iter().flatten() {
                let Some(by_value) = by_key.get_mut(label) else { continue };
                if let Some(objects) = by_value.get_mut(value) {
                    objects.remove(&name);
                    if objects.is_empty() {
                        by_value.remove(value);
                    }
                }
                if by_value.is_empty() {
                    by_key.remove(label);
                }
            }
            if by_key.is_empty() {
                self.labels.remove(&namespace);
            }
        }
        if let Some(owner) = controller_of(object)
            && let Some(objects) = self.owners.get_mut(&owner.uid)
        {
            objects.remove(&(namespace, name));
            if objects.is_empty() {
                self.owners.remove(&owner.uid);
            }
        }
    }
}

struct State<K> {
    index: Index<K>,
    namespaces: HashMap<String, BTreeMap<String, Entry<K>>>,
    /// uids of objects that this process has seen deleted, until the watch says so too.
    gone: HashSet<String>,
    /// Relists begun.
    epoch: u64,
    /// The newest version that the server has told of, in a list or a watch event. Events of one kind come in order.
    told: u64,
}

struct Inner<K> {
    state: RwLock<State<K>>,
    handlers: RwLock<Vec<Handler<K>>>,
    needed: AtomicBool,
    synced: watch::Sender<bool>,
    /// Keeps handler calls in the order of the changes.
    order: Mutex<()>,
    /// Objects that readers have been given to look at.
    examined: AtomicU64,
}

/// The cache of one kind. Cloning shares it.
pub struct Informer<K>(Arc<Inner<K>>);

impl<K> Clone for Informer<K> {
    fn clone(&self) -> Self {
        Informer(self.0.clone())
    }
}

impl<K: Cached> Default for Informer<K> {
    fn default() -> Self {
        Informer::new()
    }
}

const POISONED: &str = "no handler panics while it holds a cache lock";

impl<K: Cached> Informer<K> {
    /// An empty cache that nobody fills yet.
    pub fn new() -> Informer<K> {
        Informer(Arc::new(Inner {
            state: RwLock::new(State {
                index: Index { labels: HashMap::new(), owners: HashMap::new() },
                namespaces: HashMap::new(),
                gone: HashSet::new(),
                epoch: 0,
                told: 0,
            }),
            handlers: RwLock::new(Vec::new()),
            needed: AtomicBool::new(false),
            synced: watch::Sender::new(false),
            order: Mutex::new(()),
            examined: AtomicU64::new(0),
        }))
    }

    /// Says that somebody reads this cache, so that it is filled.
    pub fn need(&self) -> &Informer<K> {
        self.0.needed.store(true, Ordering::Relaxed);
        self
    }

    /// Calls `handler` for every change from now on; register before the cache is started. Handlers must be quick and must not
    /// write to this cache.
    pub fn on_change(&self, handler: impl Fn(Option<&Arc<K>>, Option<&Arc<K>>) + Send + Sync + 'static) {
        self.need();
        self.0.handlers.write().expect(POISONED).push(Box::new(handler));
    }

    /// The object with this namespace (empty for cluster-scoped kinds) and name.
    pub fn get(&self, namespace: &str, name: &str) -> Option<Arc<K>> {
        let state = self.0.state.read().expect(POISONED);
        state.namespaces.get(namespace)?.get(name).map(|e| e.object.clone())
    }

    /// The objects of a namespace, by name.
    pub fn list(&self, namespace: &str) -> Vec<Arc<K>> {
        let state = self.0.state.read().expect(POISONED);
        self.counted(state.namespaces.get(namespace).into_iter().flat_map(|n| n.values()).map(|e| &e.object))
    }

    /// The objects of a namespace with all these labels, by name. Costs as much as the rarest of the labels has objects; without
    /// labels it is [`Informer::list`].
    pub fn labelled<'a>(&self, namespace: &str, labels: impl IntoIterator<Item = (&'a str, &'a str)>) -> Vec<Arc<K>> {
        let labels: Vec<(&str, &str)> = labels.into_iter().collect();
        self.labelled_in(&self.0.state.read().expect(POISONED), namespace, &labels)
    }

    fn labelled_in(&self, state: &State<K>, namespace: &str, labels: &[(&str, &str)]) -> Vec<Arc<K>> {
        if labels.is_empty() {
            let objects = state.namespaces.get(namespace).into_iter().flat_map(|n| n.values());
            return self.counted(objects.map(|e| &e.object));
        }
        let Some(by_key) = state.index.labels.get(namespace) else { return Vec::new() };
        let mut rarest: Option<&BTreeMap<String, Arc<K>>> = None;
        for (label, value) in labels {
            let Some(objects) = by_key.get(*label).and_then(|by_value| by_value.get(*value)) else { return Vec::new() };
            if rarest.is_none_or(|r| objects.len() < r.len()) {
                rarest = Some(objects);
            }
        }
        let mut found = self.counted(rarest.into_iter().flat_map(|objects| objects.values()));
        found.retain(|object| {
            let own = object.meta().labels.as_ref();
            labels.iter().all(|(label, value)| own.and_then(|l| l.get(*label)).is_some_and(|v| v == value))
        });
        found
    }

    /// The objects that the object with this uid controls, by namespace and name.
    pub fn controlled_by(&self, uid: &str) -> Vec<Arc<K>> {
        self.controlled_in(&self.0.state.read().expect(POISONED), uid)
    }

    fn controlled_in(&self, state: &State<K>, uid: &str) -> Vec<Arc<K>> {
        self.counted(state.index.owners.get(uid).into_iter().flat_map(|objects| objects.values()))
    }

    /// The objects that the object with this uid controls, and those of its namespace that have the labels that its selector
    /// asks for: all that it may have to adopt or to release. Each is there once, all as of one moment.
    pub fn claimable(&self, namespace: &str, uid: Option<&str>, selector: &LabelSelector) -> Vec<Arc<K>> {
        let labels: Vec<(&str, &str)> =
            selector.match_labels.iter().flatten().map(|(k, v)| (k.as_str(), v.as_str())).collect();
        // Under one lock: an object that changes between two reads would be found in two states, and count as two.
        let state = self.0.state.read().expect(POISONED);
        let mut objects = self.labelled_in(&state, namespace, &labels);
        let owned = uid.map(|uid| self.controlled_in(&state, uid)).unwrap_or_default();
        let known: HashSet<*const K> = objects.iter().map(Arc::as_ptr).collect();
        let more: Vec<Arc<K>> = owned.into_iter().filter(|o| !known.contains(&Arc::as_ptr(o))).collect();
        objects.extend(more);
        objects
    }

    /// How many objects readers have been given to look at since the start: the work that changes have caused.
    pub fn examined(&self) -> u64 {
        self.0.examined.load(Ordering::Relaxed)
    }

    fn counted<'a>(&self, objects: impl Iterator<Item = &'a Arc<K>>) -> Vec<Arc<K>> {
        let objects: Vec<Arc<K>> = objects.cloned().collect();
        self.0.examined.fetch_add(objects.len() as u64, Ordering::Relaxed);
        objects
    }

    /// All objects, in no particular order of namespaces.
    pub fn all(&self) -> Vec<Arc<K>> {
        let state = self.0.state.read().expect(POISONED);
        self.counted(state.namespaces.values().flat_map(|n| n.values()).map(|e| &e.object))
    }

    /// Enters the answer to a write of this process. Readers and handlers see it at once.
    pub fn wrote(&self, object: K) {
        self.enter(object, Source::Own, true);
    }

    /// As [`Informer::wrote`], but without telling handlers: for kinds whose only interested controller is the writer.
    pub fn wrote_quietly(&self, object: K) {
        self.enter(object, Source::Own, false);
    }

    /// Notes that this process has seen the object deleted.
    pub fn deleted(&self, object: &K) {
        let meta = object.meta();
        let (namespace, name) = key(object);
        let _order = self.0.order.lock().expect(POISONED);
        let old = {
            let mut state = self.0.state.write().expect(POISONED);
            let old = take(&mut state, &namespace, &name, meta.uid.as_deref());
            // What is not here the watch has removed already, or has yet to bring and to remove.
            if let (Some(_), Some(uid)) = (&old, &meta.uid) {
                state.gone.insert(uid.clone());
            }
            old
        };
        if let Some(old) = old {
            self.notify(Some(&old), None);
        }
    }

    fn notify(&self, old: Option<&Arc<K>>, new: Option<&Arc<K>>) {
        for handler in self.0.handlers.read().expect(POISONED).iter() {
            handler(old, new);
        }
    }

    fn enter(&self, mut object: K, source: Source, tell: bool) {
        object.meta_mut().managed_fields = None;
        let (namespace, name) = key(&object);
        let version = version(&object);
        let object = Arc::new(object);
        let _order = self.0.order.lock().expect(POISONED);
        let old = {
            let mut state = self.0.state.write().expect(POISONED);
            if object.meta().uid.as_ref().is_some_and(|uid| state.gone.contains(uid)) {
                return;
            }
            if source == Source::Watch {
                state.told = state.told.max(version);
            }
            let epoch = state.epoch;
            let unconfirmed = (source == Source::Own).then_some(epoch);
            // The answer to a write may come later than the watch event of the object's end.
            let ended = source == Source::Own && version != 0 && version <= state.told;
            let entry = Entry { object: object.clone(), version, unconfirmed };
            let State { namespaces, index, .. } = &mut *state;
            let known = namespaces.get(&namespace).and_then(|objects| objects.get(&name));
            if ended && known.is_none_or(|known| known.object.meta().uid != object.meta().uid) {
                return;
            }
            let objects = namespaces.entry(namespace).or_default();
            match objects.get_mut(&name) {
                Some(known) if version != 0 && version == known.version => {
                    if source != Source::Own {
                        known.unconfirmed = None;
                    }
                    return;
                }
                // Older than what is here. A list may go back in time (a store restored from a backup), but not behind what this
                // process has written since the list was asked for.
                Some(known)
                    if version != 0
                        && version < known.version
                        && (source != Source::List || known.unconfirmed == Some(epoch)) =>
                {
                    return;
                }
                Some(known) => {
                    let before = std::mem::replace(known, entry).object;
                    index.remove(&before);
                    index.insert(&object);
                    Some(before)
                }
                None => {
                    objects.insert(name, entry);
                    index.insert(&object);
                    None
                }
            }
        };
        if !tell {
            return;
        }
        // A recreated object is two changes.
        match &old {
            Some(before) if before.meta().uid != object.meta().uid => {
                self.notify(Some(before), None);
                self.notify(None, Some(&object));
            }
            _ => self.notify(old.as_ref(), Some(&object)),
        }
    }

    fn remove(&self, object: &K) {
        let (namespace, name) = key(object);
        let _order = self.0.order.lock().expect(POISONED);
        let old = {
            let mut state = self.0.state.write().expect(POISONED);
            state.told = state.told.max(version(object));
            if let Some(uid) = &object.meta().uid {
                state.gone.remove(uid);
            }
            take(&mut state, &namespace, &name, object.meta().uid.as_deref())
        };
        if let Some(old) = old {
            self.notify(Some(&old), None);
        }
    }

    /// Makes the cache equal to a complete list, except for writes of this process that the list may be too old to have.
    fn replace(&self, objects: Vec<K>) {
        let listed: HashSet<(String, String)> = objects.iter().map(key).collect();
        let missing: Vec<Arc<K>> = {
            let mut state = self.0.state.write().expect(POISONED);
            state.gone.clear();
            let epoch = state.epoch;
            let missing = state.namespaces.iter().flat_map(|(namespace, objects)| {
                let listed = &listed;
                objects.iter().filter_map(move |(name, entry)| {
                    let kept = listed.contains(&(namespace.clone(), name.clone())) || entry.unconfirmed == Some(epoch);
                    (!kept).then(|| entry.object.clone())
                })
            });
            missing.collect()
        };
        for object in missing {
            self.remove(&object);
        }
        // A list may go back in time.
        self.0.state.write().expect(POISONED).told = objects.iter().map(version).max().unwrap_or(0);
        for object in objects {
            self.enter(object, Source::List, true);
        }
        self.0.synced.send_replace(true);
    }

    /// Waits until the first complete list has arrived.
    pub async fn synced(&self) {
        // The sender lives as long as self.
        let _ = self.0.synced.subscribe().wait_for(|synced| *synced).await;
    }

    fn is_needed(&self) -> bool {
        self.0.needed.load(Ordering::Relaxed)
    }

    /// Fills the cache until `shutdown`. Errors are retried with the watcher's backoff.
    async fn run(self, api: Api<K>, config: watcher::Config, shutdown: CancellationToken) {
        let stream = watcher(api, config).default_backoff();
        futures::pin_mut!(stream);
        let mut listing: Vec<K> = Vec::new();
        loop {
            let event = tokio::select! {
                () = shutdown.cancelled() => return,
                event = stream.next() => event,
            };
            match event {
                None => return,
                Some(Ok(Event::Init)) => {
                    listing.clear();
                    self.0.state.write().expect(POISONED).epoch += 1;
                }
                Some(Ok(Event::InitApply(mut object))) => {
                    object.meta_mut().managed_fields = None;
                    listing.push(object);
                }
                Some(Ok(Event::InitDone)) => self.replace(std::mem::take(&mut listing)),
                Some(Ok(Event::Apply(object))) => self.enter(object, Source::Watch, true),
                Some(Ok(Event::Delete(object))) => self.remove(&object),
                Some(Err(error)) => {
                    tracing::warn!(
                        kind = K::kind(&()).as_ref(),
                        error = &error as &dyn std::error::Error,
                        "watch interrupted"
                    );
                }
            }
        }
    }
}

fn key<K: Resource>(object: &K) -> (String, String) {
    let meta = object.meta();
    (meta.namespace.clone().unwrap_or_default(), meta.name.clone().unwrap_or_default())
}

fn version<K: Resource>(object: &K) -> u64 {
    object.meta().resource_version.as_deref().and_then(|v| v.parse().ok()).unwrap_or(0)
}

fn take<K: Resource>(state: &mut State<K>, namespace: &str, name: &str, uid: Option<&str>) -> Option<Arc<K>> {
    let objects = state.namespaces.get_mut(namespace)?;
    if uid.is_some() && objects.get(name)?.object.meta().uid.as_deref() != uid {
        return None;
    }
    let entry = objects.remove(name)?;
    state.index.remove(&entry.object);
    if objects.is_empty() {
        state.namespaces.remove(namespace);
    }
    Some(entry.object)
}

/// The caches that the controllers of one process share. Only those that a controller has asked for are filled.
#[derive(Clone, Default)]
#[allow(missing_docs)]
pub struct Caches {
    pub pods: Informer<Pod>,
    pub services: Informer<Service>,
    pub slices: Informer<EndpointSlice>,
    pub endpoints: Informer<Endpoints>,
    pub nodes: Informer<Node>,
    pub namespaces: Informer<Namespace>,
    pub service_accounts: Informer<ServiceAccount>,
    /// Only the ConfigMaps with the cluster's root certificate.
    pub root_cas: Informer<ConfigMap>,
    pub deployments: Informer<Deployment>,
    pub replica_sets: Informer<ReplicaSet>,
    pub stateful_sets: Informer<StatefulSet>,
    pub daemon_sets: Informer<DaemonSet>,
    pub jobs: Informer<Job>,
    pub cron_jobs: Informer<CronJob>,
    pub replication_controllers: Informer<ReplicationController>,
    pub claims: Informer<PersistentVolumeClaim>,
    pub volumes: Informer<PersistentVolume>,
    pub storage_classes: Informer<StorageClass>,
    pub revisions: Informer<ControllerRevision>,
    /// Only the heartbeats of nodes, in namespace kube-node-lease.
    pub node_leases: Informer<Lease>,
}

/// Name of the ConfigMap with the cluster's root certificate.
pub const ROOT_CA: &str = "kube-root-ca.crt";

impl Caches {
    /// Starts filling what is needed and waits until everything has been listed once.
    pub async fn start(&self, client: &Client, shutdown: &CancellationToken) {
        let mut syncs: Vec<futures::future::BoxFuture<'_, ()>> = Vec::new();
        macro_rules! start {
            ($field:ident, $api:expr, $config:expr) => {
                if self.$field.is_needed() {
                    tokio::spawn(self.$field.clone().run($api, $config, shutdown.clone()));
                    syncs.push(Box::pin(self.$field.synced()));
                }
            };
            ($($field:ident),*) => { $(start!($field, Api::all(client.clone()), watcher::Config::default());)* };
        }
        start!(
            pods,
            services,
            slices,
            endpoints,
            nodes,
            namespaces,
            service_accounts,
            deployments,
            replica_sets,
            stateful_sets,
            daemon_sets,
            jobs,
            cron_jobs,
            replication_controllers,
            claims,
            volumes,
            storage_classes,
            revisions
        );
        let only_root_cas = watcher::Config::default().fields(&format!("metadata.name={ROOT_CA}"));
        start!(root_cas, Api::all(client.clone()), only_root_cas);
        start!(node_leases, Api::namespaced(client.clone(), "kube-node-lease"), watcher::Config::default());
        tokio::select! {
            () = shutdown.cancelled() => {}
            _ = futures::future::join_all(syncs) => {}
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use k8s_openapi::apimachinery::pkg::apis::meta::v1::{ObjectMeta, OwnerReference};

    fn map(name: &str, uid: &str, version: &str) -> ConfigMap {
        ConfigMap {
            metadata: ObjectMeta {
                name: Some(name.into()),
                namespace: Some("ns".into()),
                uid: Some(uid.into()),
                resource_version: Some(version.into()),
                ..Default::default()
            },
            ..Default::default()
        }
    }

    fn seen(cache: &Informer<ConfigMap>) -> Vec<String> {
        cache.list("ns").iter().filter_map(|o| o.metadata.resource_version.clone()).collect()
    }

    #[test]
    fn an_old_event_does_not_undo_a_write() {
        let cache = Informer::<ConfigMap>::new();
        cache.enter(map("a", "u", "5"), Source::Watch, true);
        cache.wrote(map("a", "u", "9"));
        cache.enter(map("a", "u", "7"), Source::Watch, true);
        assert_eq!(seen(&cache), ["9"]);
        cache.enter(map("a", "u", "10"), Source::Watch, true);
        assert_eq!(seen(&cache), ["10"], "versions compare as numbers");
    }

    #[test]
    fn a_deleted_object_does_not_come_back_with_a_late_event() {
        let cache = Informer::<ConfigMap>::new();
        cache.enter(map("a", "u", "5"), Source::Watch, true);
        cache.deleted(&map("a", "u", "5"));
        cache.enter(map("a", "u", "6"), Source::Watch, true);
        assert!(seen(&cache).is_empty());
        cache.remove(&map("a", "u", "7"));
        cache.enter(map("a", "v", "8"), Source::Watch, true);
        assert_eq!(seen(&cache), ["8"], "another object of the same name may come");
    }

    #[test]
    fn a_late_answer_to_a_write_does_not_bring_back_what_has_gone_since() {
        let cache = Informer::<ConfigMap>::new();
        cache.enter(map("a", "u", "5"), Source::Watch, true);
        cache.remove(&map("a", "u", "7"));
        cache.wrote(map("a", "u", "6"));
        assert!(seen(&cache).is_empty());
        cache.enter(map("a", "v", "8"), Source::Watch, true);
        cache.wrote(map("a", "u", "6"));
        assert_eq!(seen(&cache), ["8"], "nor in the place of its successor");
        cache.wrote(map("b", "w", "9"));
        assert_eq!(seen(&cache), ["8", "9"], "what is newer than all events is new");
        cache.deleted(&map("c", "x", "1"));
        assert!(cache.0.state.read().unwrap().gone.is_empty(), "nothing is remembered for ever");
    }

    #[test]
    fn a_relist_keeps_writes_made_since_it_began() {
        let cache = Informer::<ConfigMap>::new();
        cache.wrote(map("old", "u", "5"));
        cache.0.state.write().unwrap().epoch += 1;
        cache.wrote(map("new", "v", "6"));
        cache.replace(vec![map("listed", "w", "4")]);
        assert_eq!(seen(&cache), ["4", "6"]);
    }

    #[test]
    fn a_list_may_go_back_in_time() {
        let cache = Informer::<ConfigMap>::new();
        cache.enter(map("a", "u", "90"), Source::Watch, true);
        cache.0.state.write().unwrap().epoch += 1;
        cache.replace(vec![map("a", "u", "7")]);
        assert_eq!(seen(&cache), ["7"]);
    }

    #[test]
    fn the_index_follows_labels_and_owners() {
        let cache = Informer::<ConfigMap>::new();
        let with = |name: &str, version: &str, app: &str, owner: &str| {
            let mut map = map(name, name, version);
            map.metadata.labels = Some(BTreeMap::from([("app".into(), app.into()), ("all".into(), "y".into())]));
            map.metadata.owner_references = serde_json::from_value(
                serde_json::json!([{"apiVersion": "v1", "kind": "K", "name": "o", "uid": owner, "controller": true}]),
            )
            .unwrap();
            map
        };
        let names = |found: Vec<Arc<ConfigMap>>| -> Vec<String> {
            found.iter().filter_map(|o| o.metadata.name.clone()).collect()
        };
        let select = |app: &str| names(cache.labelled("ns", [("all", "y"), ("app", app)]));
        for (n, app) in ["x", "x", "y"].into_iter().enumerate() {
            cache.enter(with(&format!("m{n}"), "1", app, "u1"), Source::Watch, true);
        }
        let before = cache.examined();
        assert_eq!(select("y"), ["m2"]);
        assert_eq!(cache.examined() - before, 1, "the rarest label leads");
        assert_eq!(select("x"), ["m0", "m1"]);
        cache.enter(with("m0", "2", "y", "u2"), Source::Watch, true);
        assert_eq!(select("x"), ["m1"]);
        assert_eq!(select("y"), ["m0", "m2"]);
        assert_eq!(names(cache.controlled_by("u1")), ["m1", "m2"]);
        let selector =
            LabelSelector { match_labels: Some(BTreeMap::from([("app".into(), "y".into())])), ..Default::default() };
        assert_eq!(names(cache.claimable("ns", Some("u1"), &selector)), ["m0", "m2", "m1"]);
        for name in ["m0", "m1", "m2"] {
            cache.remove(&map(name, name, "3"));
        }
        let state = cache.0.state.read().unwrap();
        assert!(state.index.labels.is_empty() && state.index.owners.is_empty());
    }

    /// A pod that became ready between two reads was once counted twice, and a healthy one deleted for it.
    #[test]
    fn an_object_that_changes_meanwhile_is_claimable_once() {
        let cache = Informer::<ConfigMap>::new();
        let labels = BTreeMap::from([("app".to_string(), "x".to_string())]);
        let owned = |name: &str, version: usize| {
            let mut map = map(name, name, &version.to_string());
            map.metadata.labels = Some(labels.clone());
            map.metadata.owner_references =
                Some(vec![OwnerReference { uid: "owner".into(), controller: Some(true), ..Default::default() }]);
            map
        };
        for name in ["a", "b", "c"] {
            cache.wrote(owned(name, 1));
        }
        let selector = LabelSelector { match_labels: Some(labels.clone()), ..Default::default() };
        let done = AtomicBool::new(false);
        std::thread::scope(|scope| {
            scope.spawn(|| {
                for version in 2.. {
                    if done.load(Ordering::Relaxed) {
                        return;
                    }
                    cache.enter(owned("b", version), Source::Watch, true);
                }
            });
            for _ in 0..20_000 {
                let found = cache.claimable("ns", Some("owner"), &selector);
                let names: Vec<_> = found.iter().filter_map(|o| o.metadata.name.as_deref()).collect();
                if names != ["a", "b", "c"] {
                    done.store(true, Ordering::Relaxed);
                    panic!("{names:?}");
                }
            }
            done.store(true, Ordering::Relaxed);
        });
    }

    #[test]
    fn handlers_see_a_recreated_object_as_two_changes() {
        let cache = Informer::<ConfigMap>::new();
        let changes = Arc::new(Mutex::new(Vec::new()));
        let log = changes.clone();
        cache.on_change(move |old, new| log.lock().unwrap().push((old.is_some(), new.is_some())));
        cache.enter(map("a", "u", "1"), Source::Watch, true);
        cache.enter(map("a", "v", "2"), Source::Watch, true);
        cache.enter(map("a", "v", "2"), Source::Watch, true);
        assert_eq!(*changes.lock().unwrap(), [(false, true), (true, false), (false, true)]);
    }
}
