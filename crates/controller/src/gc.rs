//! The garbage collector: deletes what has lost its owners, and carries out foreground and orphaning deletion.
//!
//! It watches the metadata of every kind that can be deleted and keeps a [`Graph`] of who owns whom. [`Graph::decide`] says what
//! to do about one object; the shell does it and starts over when the object has changed meanwhile. Rules: the owners-and-dependents
//! page of the Kubernetes documentation and the `deletionPropagation` API doc.

use std::collections::{BTreeMap, BTreeSet, HashMap, HashSet};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use anyhow::Context as _;
use futures::StreamExt;
use k8s_openapi::api::core::v1::ObjectReference;
use k8s_openapi::apimachinery::pkg::apis::meta::v1::{ObjectMeta, OwnerReference};
use kube::Api;
use kube::api::{DeleteParams, DynamicObject, ListParams, Patch, PatchParams, Preconditions, PropagationPolicy};
use kube::core::{ApiResource, PartialObjectMeta};
use kube::runtime::WatchStreamExt;
use kube::runtime::watcher::{self, Event, watcher};
use portolan_client::{EventRecorder, EventType};
use serde_json::json;
use tokio::sync::{Notify, watch};
use tokio_util::sync::CancellationToken;

use crate::Context;
use crate::discovery::{Kind, Kinds};
use crate::queue::{Next, Queue, Waiting};
use crate::util::{is_conflict, is_not_found};

const WORKERS: usize = 20;
/// Finalizer of foreground deletion.
pub const FOREGROUND: &str = "foregroundDeletion";
/// Objects in one answer when dependents are listed.
const PAGE: u32 = 500;

/// Finalizer of orphaning deletion.
pub const ORPHAN: &str = "orphan";

/// A kind in the graph, by group and plural.
pub type KindId = Arc<str>;

/// An object in the graph.
#[derive(Clone, Debug, PartialEq)]
pub struct Object {
    /// Its kind.
    pub kind: KindId,
    /// Namespace, empty for cluster-scoped kinds.
    pub namespace: String,
    /// Name.
    pub name: String,
    /// Store version, for optimistic writes.
    pub version: Option<String>,
    /// References to owners.
    pub owners: Vec<OwnerReference>,
    /// Finalizers.
    pub finalizers: Vec<String>,
    /// Whether it is being deleted.
    pub deleting: bool,
}

impl Object {
    fn of(kind: KindId, meta: ObjectMeta) -> Option<(String, Object)> {
        let object = Object {
            kind,
            namespace: meta.namespace.unwrap_or_default(),
            name: meta.name?,
            version: meta.resource_version,
            owners: meta.owner_references.unwrap_or_default(),
            finalizers: meta.finalizers.unwrap_or_default(),
            deleting: meta.deletion_timestamp.is_some(),
        };
        Some((meta.uid?, object))
    }

    /// Whether `other` is a newer state of the same object. Versions are comparable (KEP-5504).
    fn is_older_than(&self, other: &Object) -> bool {
        let number = |object: &Object| object.version.as_deref().and_then(|v| v.parse::<u64>().ok());
        number(self) < number(other)
    }

    fn has(&self, finalizer: &str) -> bool {
        self.finalizers.iter().any(|f| f == finalizer)
    }

    /// Being deleted in the foreground: waits until its dependents are gone.
    fn awaits_dependents(&self) -> bool {
        self.deleting && self.has(FOREGROUND)
    }
}

/// What is known of an owner that is not in the graph.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Lookup {
    /// Exists, with the uid of the reference.
    Present,
    /// Does not exist, or its name belongs to another object now.
    Absent,
}

/// What to do about an object.
#[derive(Clone, Debug, PartialEq)]
pub enum Decision {
    /// Nothing.
    Keep,
    /// First find out whether these owners exist, then decide again.
    LookUp(Vec<OwnerReference>),
    /// Remove the references to the owners with these uids.
    Unreference(BTreeSet<String>),
    /// Delete it this way.
    Delete(PropagationPolicy),
    /// First stop blocking the deletion of its owners (a cycle of foreground deletions), then delete it in the foreground.
    UnblockAndDelete,
    /// Have these dependents looked at: they hold its foreground deletion.
    Visit(Vec<String>),
    /// Drop a finalizer: what it stands for is done.
    DropFinalizer(&'static str),
    /// Take the reference to it from these dependents, then drop the finalizer `orphan`.
    OrphanDependents,
}

/// Who owns whom.
#[derive(Debug, Default)]
pub struct Graph {
    objects: HashMap<String, Object>,
    dependents: HashMap<String, HashSet<String>>,
}

impl Graph {
    /// Enters or replaces an object. Answers the uids to look at because of it.
    pub fn put(&mut self, uid: String, object: Object) -> Vec<String> {
        let mut visit = Vec::new();
        let old = self.objects.insert(uid.clone(), object.clone());
        let before: HashSet<&str> = old.iter().flat_map(|o| o.owners.iter().map(|r| r.uid.as_str())).collect();
        let after: HashSet<&str> = object.owners.iter().map(|r| r.uid.as_str()).collect();
        for gone in before.difference(&after) {
            self.unlink(gone, &uid);
            // An owner deleted in the foreground may have waited for this reference.
            visit.push((*gone).to_string());
        }
        for owner in &after {
            self.dependents.entry((*owner).to_string()).or_default().insert(uid.clone());
        }
        let owners_changed = old.as_ref().is_none_or(|o| o.owners != object.owners);
        let doubtful = object.owners.iter().any(|r| self.objects.get(&r.uid).is_none_or(Object::awaits_dependents));
        let newly_deleting =
            object.deleting && old.as_ref().is_none_or(|o| !o.deleting || o.finalizers != object.finalizers);
        if owners_changed && !object.owners.is_empty() && doubtful || newly_deleting {
            visit.push(uid.clone());
        }
        if newly_deleting && object.has(FOREGROUND) {
            visit.extend(self.dependents_of(&uid));
        }
        if owners_changed {
            // blockOwnerDeletion may have been withdrawn.
            visit.extend(
                object
                    .owners
                    .iter()
                    .map(|r| r.uid.clone())
                    .filter(|o| self.objects.get(o).is_some_and(Object::awaits_dependents)),
            );
        }
        visit
    }

    /// Enters what a watch event says, unless something newer is known from an answer already.
    pub fn follow(&mut self, uid: String, object: Object) -> Vec<String> {
        match self.objects.get(&uid) {
            Some(known) if object.is_older_than(known) => Vec::new(),
            _ => self.put(uid, object),
        }
    }

    /// Enters the answer to a request. The watch may have been faster: an object that it has removed does not come back, and
    /// a newer state stays.
    pub fn answer(&mut self, uid: String, object: Object) -> Vec<String> {
        if self.objects.contains_key(&uid) { self.follow(uid, object) } else { Vec::new() }
    }

    /// Removes an object. Answers the uids to look at because of it.
    pub fn remove(&mut self, uid: &str) -> Vec<String> {
        let Some(object) = self.objects.remove(uid) else { return Vec::new() };
        let mut visit = self.dependents_of(uid);
        for owner in &object.owners {
            self.unlink(&owner.uid, uid);
            if self.objects.get(&owner.uid).is_some_and(Object::awaits_dependents) {
                visit.push(owner.uid.clone());
            }
        }
        visit
    }

    fn unlink(&mut self, owner: &str, dependent: &str) {
        if let Some(set) = self.dependents.get_mut(owner) {
            set.remove(dependent);
            if set.is_empty() {
                self.dependents.remove(owner);
            }
        }
    }

    /// The uids of the dependents of an object, in order.
    pub fn dependents_of(&self, uid: &str) -> Vec<String> {
        let mut dependents: Vec<String> = self.dependents.get(uid).into_iter().flatten().cloned().collect();
        dependents.sort();
        dependents
    }

    /// The object with this uid.
    pub fn get(&self, uid: &str) -> Option<&Object> {
        self.objects.get(uid)
    }

    /// Objects whose owners are not all in the graph.
    pub fn doubtful(&self) -> Vec<String> {
        let doubtful = |o: &Object| {
            o.deleting && (o.has(FOREGROUND) || o.has(ORPHAN))
                || o.owners.iter().any(|r| !self.objects.contains_key(&r.uid))
        };
        self.objects.iter().filter(|(_, o)| doubtful(o)).map(|(uid, _)| uid.clone()).collect()
    }

    /// uids of the objects of one kind.
    fn of_kind(&self, kind: &str) -> Vec<String> {
        self.objects.iter().filter(|(_, o)| &*o.kind == kind).map(|(uid, _)| uid.clone()).collect()
    }

    /// Decides about one object. `lookups` holds what live reads have told about owners outside the graph.
    pub fn decide(&self, uid: &str, lookups: &HashMap<String, Lookup>) -> Decision {
        let Some(object) = self.objects.get(uid) else { return Decision::Keep };
        if object.deleting {
            if object.has(ORPHAN) {
                return Decision::OrphanDependents;
            }
            if object.has(FOREGROUND) {
                let blocking: Vec<String> =
                    self.dependents_of(uid).into_iter().filter(|d| self.blocks(d, uid)).collect();
                return match blocking.is_empty() {
                    true => Decision::DropFinalizer(FOREGROUND),
                    false => Decision::Visit(blocking),
                };
            }
            return Decision::Keep;
        }
        if object.owners.is_empty() {
            return Decision::Keep;
        }
        let (mut solid, mut dangling, mut waiting, mut unknown) = (0, BTreeSet::new(), BTreeSet::new(), Vec::new());
        for reference in &object.owners {
            match (self.objects.get(&reference.uid), lookups.get(&reference.uid)) {
                (Some(owner), _) if !owner.namespace.is_empty() && owner.namespace != object.namespace => {
                    dangling.insert(reference.uid.clone());
                }
                (Some(owner), _) if owner.awaits_dependents() => {
                    waiting.insert(reference.uid.clone());
                }
                (Some(_), _) | (None, Some(Lookup::Present)) => solid += 1,
                (None, Some(Lookup::Absent)) => {
                    dangling.insert(reference.uid.clone());
                }
                (None, None) => unknown.push(reference.clone()),
            }
        }
        if !unknown.is_empty() {
            return Decision::LookUp(unknown);
        }
        if solid > 0 {
            dangling.extend(waiting);
            return if dangling.is_empty() { Decision::Keep } else { Decision::Unreference(dangling) };
        }
        if !waiting.is_empty() && !self.dependents_of(uid).is_empty() {
            let cycle =
                self.dependents_of(uid).iter().any(|d| self.objects.get(d).is_some_and(Object::awaits_dependents));
            return if cycle { Decision::UnblockAndDelete } else { Decision::Delete(PropagationPolicy::Foreground) };
        }
        // The object's own finalizers remember how its deletion was to go.
        Decision::Delete(if object.has(ORPHAN) {
            PropagationPolicy::Orphan
        } else if object.has(FOREGROUND) {
            PropagationPolicy::Foreground
        } else {
            PropagationPolicy::Background
        })
    }

    /// Whether `dependent` keeps the foreground deletion of `owner` waiting.
    fn blocks(&self, dependent: &str, owner: &str) -> bool {
        self.objects
            .get(dependent)
            .is_some_and(|o| o.owners.iter().any(|r| r.uid == owner && r.block_owner_deletion == Some(true)))
    }
}

struct Watched {
    kind: Kind,
    stop: CancellationToken,
    synced: watch::Receiver<bool>,
}

struct Shared {
    context: Context,
    kinds: Kinds,
    graph: Mutex<Graph>,
    queue: Queue<String>,
    watched: Mutex<BTreeMap<KindId, Watched>>,
    /// Asks for the kinds to be read again.
    rediscover: Notify,
    events: EventRecorder,
}

const POISONED: &str = "the garbage collector does not panic while it holds a lock";

fn id(resource: &ApiResource) -> KindId {
    format!("{}/{}", resource.group, resource.plural).into()
}

/// Kinds that nobody owns or is owned by in a way that matters, and that come in masses.
fn is_ignored(resource: &ApiResource) -> bool {
    resource.kind == "Event" && matches!(resource.group.as_str(), "" | "events.k8s.io")
}

/// Works until the process stops.
pub(crate) async fn start(context: Context, kinds: Kinds) {
    let events = context.recorder("garbage-collector-controller");
    let shared = Arc::new(Shared {
        context: context.clone(),
        kinds,
        graph: Mutex::default(),
        queue: context.queue("garbage_collector"),
        watched: Mutex::default(),
        rediscover: Notify::new(),
        events,
    });
    // Nothing is judged before everything has been seen once: an owner must not be missed because its kind came late.
    let mut pause = Duration::from_millis(50);
    while let Err(error) = refresh(&shared).await {
        tracing::warn!("cannot find out the kinds to collect: {error:#}");
        tokio::select! {
            () = context.shutdown.cancelled() => return,
            () = tokio::time::sleep(pause) => pause = (pause * 2).min(Duration::from_secs(10)),
        }
    }
    let queue = shared.queue.clone();
    let doubtful = shared.graph.lock().expect(POISONED).doubtful();
    for uid in doubtful {
        queue.add(uid);
    }
    let follow = follow_discovery(shared.clone());
    let work = queue.work(WORKERS, context.shutdown.clone(), move |uid| process(shared.clone(), uid));
    tokio::join!(follow, work);
}

/// Reads the kinds again whenever a CustomResourceDefinition changes. Their kinds appear a moment after the object does, so it is
/// looked for a few times.
async fn follow_discovery(shared: Arc<Shared>) {
    loop {
        tokio::select! {
            () = shared.context.shutdown.cancelled() => return,
            () = shared.rediscover.notified() => {}
        }
        for pause in [100, 1000, 5000] {
            tokio::select! {
                () = shared.context.shutdown.cancelled() => return,
                () = tokio::time::sleep(Duration::from_millis(pause)) => {}
            }
            if let Err(error) = refresh(&shared).await {
                tracing::warn!("cannot find out the kinds to collect: {error:#}");
            }
        }
    }
}

/// Starts watches for new kinds, stops those of kinds that are gone, and waits for the first lists of new ones.
async fn refresh(shared: &Arc<Shared>) -> anyhow::Result<()> {
    let kinds = shared.kinds.get().await?;
    let wanted: BTreeMap<KindId, &Kind> =
        kinds.iter().filter(|k| k.watchable && !is_ignored(&k.resource)).map(|k| (id(&k.resource), k)).collect();
    let mut syncs = Vec::new();
    let mut gone = Vec::new();
    {
        let mut watched = shared.watched.lock().expect(POISONED);
        watched.retain(|id, entry| {
            let keep = wanted.contains_key(id);
            if !keep {
                entry.stop.cancel();
                gone.push(id.clone());
            }
            keep
        });
        for (id, kind) in wanted {
            let entry = watched.entry(id.clone()).or_insert_with(|| {
                let stop = shared.context.shutdown.child_token();
                let (tell, synced) = watch::channel(false);
                tokio::spawn(observe(shared.clone(), id.clone(), kind.clone(), stop.clone(), tell));
                Watched { kind: kind.clone(), stop, synced }
            });
            syncs.push(entry.synced.clone());
        }
    }
    // The objects of a kind that is gone are gone, and so are those that they own.
    for id in gone {
        let mut graph = shared.graph.lock().expect(POISONED);
        for uid in graph.of_kind(&id) {
            for visit in graph.remove(&uid) {
                shared.queue.add(visit);
            }
        }
    }
    for mut synced in syncs {
        // An error means that the kind went away again.
        tokio::select! {
            _ = synced.wait_for(|s| *s) => {}
            () = shared.context.shutdown.cancelled() => {}
            () = tokio::time::sleep(Duration::from_secs(30)) => anyhow::bail!("a kind could not be listed in 30 s"),
        }
    }
    Ok(())
}

async fn observe(shared: Arc<Shared>, id: KindId, kind: Kind, stop: CancellationToken, synced: watch::Sender<bool>) {
    let api: Api<PartialObjectMeta<DynamicObject>> = Api::all_with(shared.context.client.clone(), &kind.resource);
    let stream = watcher(api, watcher::Config::default()).default_backoff();
    futures::pin_mut!(stream);
    let is_definitions = kind.resource.plural == "customresourcedefinitions";
    let mut listed: HashSet<String> = HashSet::new();
    let put = |object: PartialObjectMeta<DynamicObject>, listed: bool| {
        let entry = Object::of(id.clone(), object.metadata)?;
        let uid = entry.0.clone();
        let visits = {
            let mut graph = shared.graph.lock().expect(POISONED);
            // A list may go back in time (a store restored from a backup).
            if listed { graph.put(entry.0, entry.1) } else { graph.follow(entry.0, entry.1) }
        };
        for visit in visits {
            shared.queue.add(visit);
        }
        Some(uid)
    };
    let remove = |uid: &str| {
        let visits = shared.graph.lock().expect(POISONED).remove(uid);
        for visit in visits {
            shared.queue.add(visit);
        }
    };
    loop {
        let event = tokio::select! {
            () = stop.cancelled() => return,
            event = stream.next() => event,
        };
        match event {
            None => return,
            Some(Ok(Event::Init)) => listed.clear(),
            Some(Ok(Event::InitApply(object))) => listed.extend(put(object, true)),
            Some(Ok(Event::InitDone)) => {
                let known = shared.graph.lock().expect(POISONED).of_kind(&id);
                for uid in known.iter().filter(|uid| !listed.contains(*uid)) {
                    remove(uid);
                }
                listed = HashSet::new();
                synced.send_replace(true);
            }
            Some(Ok(Event::Apply(object))) => {
                put(object, false);
                if is_definitions {
                    shared.rediscover.notify_one();
                }
            }
            Some(Ok(Event::Delete(object))) => {
                if let Some(uid) = &object.metadata.uid {
                    remove(uid);
                }
                if is_definitions {
                    shared.rediscover.notify_one();
                }
            }
            Some(Err(error)) => {
                tracing::debug!(kind = &*id, %error, "watch interrupted");
                // A kind that cannot be listed must not hold up the others for ever.
                if let watcher::Error::InitialListFailed(kube::Error::Api(status)) = &error
                    && matches!(status.code, 403..=405)
                {
                    synced.send_replace(true);
                }
            }
        }
    }
}

impl Shared {
    fn api(&self, kind: &Kind, namespace: &str) -> Api<DynamicObject> {
        if kind.namespaced {
            Api::namespaced_with(self.context.client.clone(), namespace, &kind.resource)
        } else {
            Api::all_with(self.context.client.clone(), &kind.resource)
        }
    }

    fn object(&self, uid: &str) -> Option<(Object, Kind)> {
        let object = self.graph.lock().expect(POISONED).get(uid)?.clone();
        let kind = self.watched.lock().expect(POISONED).get(&object.kind)?.kind.clone();
        Some((object, kind))
    }

    /// Whether an owner exists, by a live read.
    async fn look_up(&self, dependent: &Object, reference: &OwnerReference) -> anyhow::Result<Lookup> {
        let kind = {
            let watched = self.watched.lock().expect(POISONED);
            watched.values().map(|w| &w.kind).find(|k| k.is(&reference.api_version, &reference.kind)).cloned()
        };
        let Some(kind) = kind else {
            // Perhaps a kind that is yet to be defined: nothing is deleted on a guess.
            self.rediscover.notify_one();
            return Err(Waiting(format!("kind {} of {} is unknown", reference.kind, reference.api_version)).into());
        };
        if kind.namespaced && dependent.namespace.is_empty() {
            // A cluster-scoped object cannot have an owner in a namespace.
            return Ok(Lookup::Absent);
        }
        let found = self.api(&kind, &dependent.namespace).get_metadata_opt(&reference.name).await?;
        let same = found.is_some_and(|o| o.metadata.uid.as_deref() == Some(&reference.uid));
        Ok(if same { Lookup::Present } else { Lookup::Absent })
    }

    async fn patch(&self, uid: &str, object: &Object, kind: &Kind, mut patch: serde_json::Value) -> anyhow::Result<()> {
        patch["metadata"]["uid"] = json!(uid);
        patch["metadata"]["resourceVersion"] = json!(object.version);
        let api = self.api(kind, &object.namespace);
        match api.patch_metadata(&object.name, &PatchParams::default(), &Patch::Merge(patch)).await {
            Ok(written) => {
                // Removed when it was the last finalizer of a deleted object; the watch tells.
                if let Some((uid, object)) = Object::of(object.kind.clone(), written.metadata)
                    && !(object.deleting && object.finalizers.is_empty())
                {
                    let visits = self.graph.lock().expect(POISONED).answer(uid, object);
                    for visit in visits {
                        self.queue.add(visit);
                    }
                }
                Ok(())
            }
            Err(error) if is_not_found(&error) => Ok(()),
            Err(error) => Err(error).with_context(|| format!("cannot patch {} {}", object.kind, object.name)),
        }
    }

    /// Takes the owner off all that refer to it, by live lists: watches of different kinds are not ordered among each other, and
    /// a dependent that shows up only after its owner is gone would be collected.
    async fn orphan_dependents(&self, owner: &str) -> anyhow::Result<()> {
        let Some((object, _)) = self.object(owner) else { return Ok(()) };
        let kinds: Vec<(KindId, Kind)> =
            self.watched.lock().expect(POISONED).iter().map(|(id, w)| (id.clone(), w.kind.clone())).collect();
        let owners = BTreeSet::from([owner.to_string()]);
        for (id, kind) in kinds {
            if !kind.namespaced && !object.namespace.is_empty() {
                continue;
            }
            let api: Api<DynamicObject> = match object.namespace.as_str() {
                "" => Api::all_with(self.context.client.clone(), &kind.resource),
                namespace => Api::namespaced_with(self.context.client.clone(), namespace, &kind.resource),
            };
            let mut params = ListParams::default().limit(PAGE);
            loop {
                let page = match api.list_metadata(&params).await {
                    Ok(page) => page,
                    Err(error) if is_not_found(&error) => break,
                    Err(error) => return Err(error).with_context(|| format!("cannot list {id} to orphan dependents")),
                };
                for (uid, dependent) in page.items.into_iter().filter_map(|o| Object::of(id.clone(), o.metadata)) {
                    self.take_off(&uid, &dependent, &kind, &owners).await?;
                }
                match page.metadata.continue_.filter(|token| !token.is_empty()) {
                    Some(token) => params = params.continue_token(&token),
                    None => break,
                }
            }
        }
        Ok(())
    }

    async fn unreference(&self, uid: &str, owners: &BTreeSet<String>) -> anyhow::Result<()> {
        let Some((object, kind)) = self.object(uid) else { return Ok(()) };
        self.take_off(uid, &object, &kind, owners).await
    }

    async fn take_off(&self, uid: &str, object: &Object, kind: &Kind, owners: &BTreeSet<String>) -> anyhow::Result<()> {
        let left: Vec<&OwnerReference> = object.owners.iter().filter(|r| !owners.contains(&r.uid)).collect();
        if left.len() == object.owners.len() {
            return Ok(());
        }
        let left = if left.is_empty() { json!(null) } else { json!(left) };
        self.patch(uid, object, kind, json!({"metadata": {"ownerReferences": left}})).await
    }

    async fn drop_finalizer(&self, uid: &str, finalizer: &str) -> anyhow::Result<()> {
        let Some((object, kind)) = self.object(uid) else { return Ok(()) };
        let left: Vec<&String> = object.finalizers.iter().filter(|f| *f != finalizer).collect();
        let left = if left.is_empty() { json!(null) } else { json!(left) };
        self.patch(uid, &object, &kind, json!({"metadata": {"finalizers": left}})).await
    }

    async fn delete(&self, uid: &str, policy: PropagationPolicy) -> anyhow::Result<()> {
        let Some((object, kind)) = self.object(uid) else { return Ok(()) };
        let params = DeleteParams {
            propagation_policy: Some(policy),
            // Both, so that an owner added a moment ago saves the object.
            preconditions: Some(Preconditions { uid: Some(uid.to_string()), resource_version: object.version.clone() }),
            ..Default::default()
        };
        match self.api(&kind, &object.namespace).delete(&object.name, &params).await {
            Ok(_) => {
                tracing::debug!(kind = &*object.kind, namespace = object.namespace, name = object.name, "collected");
                Ok(())
            }
            Err(error) if is_not_found(&error) => {
                // Whatever the watch has yet to say: an object that is gone stays gone.
                let visits = self.graph.lock().expect(POISONED).remove(uid);
                for visit in visits {
                    self.queue.add(visit);
                }
                Ok(())
            }
            Err(error) if is_conflict(&error) => {
                // It has changed; what is in the graph is old, or another object has its name.
                let live = self.api(&kind, &object.namespace).get_metadata_opt(&object.name).await?;
                let fresh =
                    live.and_then(|o| Object::of(object.kind.clone(), o.metadata)).filter(|(live, _)| live == uid);
                let mut graph = self.graph.lock().expect(POISONED);
                let visits = match fresh {
                    Some((uid, object)) => graph.answer(uid, object),
                    None => graph.remove(uid),
                };
                drop(graph);
                for visit in visits {
                    self.queue.add(visit);
                }
                Err(Waiting(format!("{} {} has changed", object.kind, object.name)).into())
            }
            Err(error) => Err(error).with_context(|| format!("cannot delete {} {}", object.kind, object.name)),
        }
    }

    fn tell_foreign_owners(&self, uid: &str) {
        let graph = self.graph.lock().expect(POISONED);
        let Some(object) = graph.get(uid) else { return };
        for reference in &object.owners {
            if let Some(owner) = graph.get(&reference.uid)
                && !owner.namespace.is_empty()
                && owner.namespace != object.namespace
            {
                let about = ObjectReference {
                    kind: object.kind.rsplit('/').next().map(str::to_string),
                    namespace: Some(object.namespace.clone()),
                    name: Some(object.name.clone()),
                    uid: Some(uid.to_string()),
                    ..Default::default()
                };
                let text = format!(
                    "ownerRef [{}/{}, namespace: {}, name: {}, uid: {}] does not exist in namespace \"{}\"",
                    reference.api_version,
                    reference.kind,
                    object.namespace,
                    reference.name,
                    reference.uid,
                    object.namespace
                );
                self.events.event(&about, EventType::Warning, "OwnerRefInvalidNamespace", text);
            }
        }
    }
}

async fn process(shared: Arc<Shared>, uid: String) -> anyhow::Result<Next> {
    let mut lookups = HashMap::new();
    loop {
        let decision = shared.graph.lock().expect(POISONED).decide(&uid, &lookups);
        match decision {
            Decision::Keep => return Ok(Next::Wait),
            Decision::LookUp(owners) => {
                let Some((object, _)) = shared.object(&uid) else { return Ok(Next::Wait) };
                for owner in owners {
                    let found = shared.look_up(&object, &owner).await?;
                    lookups.insert(owner.uid, found);
                }
                continue;
            }
            Decision::Unreference(owners) => {
                shared.tell_foreign_owners(&uid);
                shared.unreference(&uid, &owners).await?;
            }
            Decision::Delete(policy) => {
                shared.tell_foreign_owners(&uid);
                shared.delete(&uid, policy).await?;
            }
            Decision::UnblockAndDelete => {
                if let Some((object, kind)) = shared.object(&uid) {
                    let mut owners = object.owners.clone();
                    for owner in &mut owners {
                        owner.block_owner_deletion = Some(false);
                    }
                    shared.patch(&uid, &object, &kind, json!({"metadata": {"ownerReferences": owners}})).await?;
                    shared.delete(&uid, PropagationPolicy::Foreground).await?;
                }
            }
            Decision::Visit(dependents) => {
                for dependent in dependents {
                    shared.queue.add(dependent);
                }
            }
            Decision::DropFinalizer(finalizer) => shared.drop_finalizer(&uid, finalizer).await?,
            Decision::OrphanDependents => {
                shared.orphan_dependents(&uid).await?;
                shared.drop_finalizer(&uid, ORPHAN).await?;
            }
        }
        return Ok(Next::Wait);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn owner(uid: &str, block: bool) -> OwnerReference {
        OwnerReference {
            api_version: "v1".into(),
            kind: "ConfigMap".into(),
            name: uid.into(),
            uid: uid.into(),
            block_owner_deletion: Some(block),
            controller: None,
        }
    }

    fn object(namespace: &str, owners: &[OwnerReference], finalizers: &[&str], deleting: bool) -> Object {
        Object {
            kind: "/configmaps".into(),
            namespace: namespace.into(),
            name: "x".into(),
            version: Some("1".into()),
            owners: owners.to_vec(),
            finalizers: finalizers.iter().map(|f| f.to_string()).collect(),
            deleting,
        }
    }

    fn graph(objects: &[(&str, Object)]) -> Graph {
        let mut graph = Graph::default();
        for (uid, object) in objects {
            graph.put(uid.to_string(), object.clone());
        }
        graph
    }

    fn absent(uids: &[&str]) -> HashMap<String, Lookup> {
        uids.iter().map(|uid| (uid.to_string(), Lookup::Absent)).collect()
    }

    #[test]
    fn an_unknown_owner_is_looked_up_before_anything_is_deleted() {
        let graph = graph(&[("d", object("ns", &[owner("o", false)], &[], false))]);
        assert_eq!(graph.decide("d", &HashMap::new()), Decision::LookUp(vec![owner("o", false)]));
        assert_eq!(graph.decide("d", &absent(&["o"])), Decision::Delete(PropagationPolicy::Background));
        let present = HashMap::from([("o".to_string(), Lookup::Present)]);
        assert_eq!(graph.decide("d", &present), Decision::Keep);
    }

    #[test]
    fn one_remaining_owner_keeps_the_object_and_drops_the_other_reference() {
        let graph = graph(&[
            ("q", object("ns", &[], &[], false)),
            ("d", object("ns", &[owner("o", false), owner("q", false)], &[], false)),
        ]);
        assert_eq!(graph.decide("d", &absent(&["o"])), Decision::Unreference(BTreeSet::from(["o".to_string()])));
    }

    #[test]
    fn foreground_waits_for_blocking_dependents_only() {
        let mut graph = graph(&[
            ("o", object("ns", &[], &[FOREGROUND], true)),
            ("b", object("ns", &[owner("o", true)], &[], false)),
            ("n", object("ns", &[owner("o", false)], &[], false)),
        ]);
        assert_eq!(graph.decide("o", &HashMap::new()), Decision::Visit(vec!["b".into()]));
        assert_eq!(graph.decide("b", &HashMap::new()), Decision::Delete(PropagationPolicy::Background));
        assert_eq!(graph.remove("b"), ["o"], "the owner is looked at when a dependent has gone");
        assert_eq!(graph.decide("o", &HashMap::new()), Decision::DropFinalizer(FOREGROUND));
    }

    #[test]
    fn foreground_goes_down_a_chain_and_breaks_cycles() {
        let chain = graph(&[
            ("a", object("ns", &[], &[FOREGROUND], true)),
            ("b", object("ns", &[owner("a", true)], &[], false)),
            ("c", object("ns", &[owner("b", true)], &[], false)),
        ]);
        assert_eq!(chain.decide("b", &HashMap::new()), Decision::Delete(PropagationPolicy::Foreground));
        let cycle = graph(&[
            ("a", object("ns", &[owner("b", true)], &[FOREGROUND], true)),
            ("b", object("ns", &[owner("a", true)], &[], false)),
        ]);
        assert_eq!(cycle.decide("b", &HashMap::new()), Decision::UnblockAndDelete);
    }

    #[test]
    fn orphaning_takes_the_reference_from_dependents() {
        let graph =
            graph(&[("o", object("ns", &[], &[ORPHAN], true)), ("d", object("ns", &[owner("o", false)], &[], false))]);
        assert_eq!(graph.decide("o", &HashMap::new()), Decision::OrphanDependents);
    }

    #[test]
    fn an_owner_in_another_namespace_counts_as_absent() {
        let graph =
            graph(&[("o", object("other", &[], &[], false)), ("d", object("ns", &[owner("o", false)], &[], false))]);
        assert_eq!(graph.decide("d", &HashMap::new()), Decision::Delete(PropagationPolicy::Background));
        let cluster = graph_with_cluster_owner();
        assert_eq!(cluster.decide("d", &HashMap::new()), Decision::Keep);
    }

    fn graph_with_cluster_owner() -> Graph {
        graph(&[("o", object("", &[], &[], false)), ("d", object("ns", &[owner("o", false)], &[], false))])
    }

    #[test]
    fn late_answers_neither_revive_nor_age_an_object() {
        let at = |version: &str, finalizers: &[&str]| Object {
            version: Some(version.into()),
            ..object("ns", &[owner("o", true)], finalizers, true)
        };
        let mut graph = graph(&[("o", object("ns", &[], &[FOREGROUND], true))]);
        graph.follow("d".into(), at("9", &["a/b"]));
        assert_eq!(graph.answer("d".into(), at("10", &[])), ["d"]);
        assert!(graph.follow("d".into(), at("9", &["a/b"])).is_empty(), "a watch event behind an answer");
        assert!(graph.answer("d".into(), at("8", &["a/b"])).is_empty(), "an answer behind a newer one");
        assert_eq!(graph.get("d").unwrap().version.as_deref(), Some("10"));
        assert_eq!(graph.remove("d"), ["o"]);
        assert!(graph.answer("d".into(), at("11", &[])).is_empty());
        assert_eq!(graph.decide("o", &HashMap::new()), Decision::DropFinalizer(FOREGROUND), "nothing blocks the owner");
        graph.put("o".into(), Object { version: Some("1".into()), ..object("ns", &[], &[], true) });
        assert_eq!(graph.get("o").unwrap().version.as_deref(), Some("1"), "a list may go back in time");
    }

    #[test]
    fn a_vanished_owner_wakes_its_dependents() {
        let mut graph = graph_with_cluster_owner();
        assert_eq!(graph.remove("o"), ["d"]);
    }
}
