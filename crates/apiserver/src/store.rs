//! The object store: one global revision, transactions, snapshots, and the events that watches are made of.
//!
//! Input are transactions of the request pipeline, output are immutable [`Snapshot`]s and ordered [`Event`]s. A
//! transaction runs alone on the newest state. With a journal it is published (seen by readers and watchers, and
//! acknowledged) only after the batch it belongs to is on disk, so nobody ever sees what a crash could take back.
//! The store knows nothing about kinds beyond a name for their collection.

mod journal;
mod object;
mod watch;

use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard};
use std::time::Duration;

use arc_swap::ArcSwap;
use futures::future::BoxFuture;
use imbl::OrdMap;
use portolan_api::status::Status;
use serde_json::Value;

pub use journal::Error;
pub use object::{Key, Object, body_of};
pub use watch::{Change, Event, Expired, Watcher, line_of};

use crate::config::Durability;
use journal::{Journal, Record};
use watch::Rings;

/// Objects of one collection, ordered by namespace and name.
pub type Collection = OrdMap<Key, Arc<Object>>;

/// Everything that is stored, as of one revision. Cheap to clone.
#[derive(Clone, Debug, Default)]
pub struct Snapshot {
    /// The last revision contained.
    pub revision: u64,
    collections: OrdMap<Arc<str>, Collection>,
}

impl Snapshot {
    /// The object with this key.
    pub fn get(&self, resource: &str, key: &Key) -> Option<&Arc<Object>> {
        self.collections.get(resource)?.get(key)
    }

    /// The objects of a collection.
    pub fn collection(&self, resource: &str) -> Collection {
        self.collections.get(resource).cloned().unwrap_or_default()
    }

    /// The objects of a collection, of one namespace if one is given, in order.
    pub fn list<'a>(
        &'a self,
        resource: &str,
        namespace: Option<&'a str>,
    ) -> Box<dyn Iterator<Item = &'a Arc<Object>> + Send + 'a> {
        let Some(collection) = self.collections.get(resource) else { return Box::new(std::iter::empty()) };
        match namespace {
            None => Box::new(collection.values()),
            Some(namespace) => Box::new(
                collection
                    .range(Key::new(namespace, "")..)
                    .take_while(move |(key, _)| &*key.namespace == namespace)
                    .map(|(_, object)| object),
            ),
        }
    }

    /// How many objects each collection holds.
    pub fn sizes(&self) -> impl Iterator<Item = (&Arc<str>, usize)> {
        self.collections.iter().map(|(resource, objects)| (resource, objects.len()))
    }

    fn apply(&mut self, resource: &Arc<str>, key: Key, object: Option<Arc<Object>>) {
        let collection = self.collections.entry(resource.clone()).or_default();
        match object {
            Some(object) => {
                collection.insert(key, object);
            }
            None => {
                collection.remove(&key);
            }
        }
    }
}

/// A transaction in progress: the newest state and what has been changed in it.
pub struct Txn {
    state: Snapshot,
    events: Vec<Arc<Event>>,
    after: Vec<Box<dyn FnOnce()>>,
}

impl Txn {
    /// The state this transaction sees, its own changes included.
    pub fn state(&self) -> &Snapshot {
        &self.state
    }

    /// The object with this key.
    pub fn get(&self, resource: &str, key: &Key) -> Option<&Arc<Object>> {
        self.state.get(resource, key)
    }

    /// Stores an object under the next revision, which becomes its `metadata.resourceVersion`.
    pub fn put(&mut self, resource: &str, key: &Key, value: Value) -> Arc<Object> {
        let revision = self.state.revision + 1;
        let object = Arc::new(Object::new(value, revision));
        let previous = self.state.get(resource, key).cloned();
        let change = if previous.is_some() { Change::Modified } else { Change::Added };
        self.push(resource, key, change, object.clone(), previous);
        object
    }

    /// Removes an object and returns its last state, with the revision of the removal.
    pub fn delete(&mut self, resource: &str, key: &Key) -> Option<Arc<Object>> {
        let previous = self.state.get(resource, key).cloned()?;
        let revision = self.state.revision + 1;
        let object = Arc::new(Object::new(previous.value.clone(), revision));
        self.push(resource, key, Change::Deleted, object.clone(), Some(previous));
        Some(object)
    }

    /// Does something when the transaction has been accepted, still alone; not after a refusal or a simulation.
    pub fn after_commit(&mut self, act: impl FnOnce() + 'static) {
        self.after.push(Box::new(act));
    }

    fn push(&mut self, resource: &str, key: &Key, change: Change, object: Arc<Object>, previous: Option<Arc<Object>>) {
        let resource: Arc<str> = Arc::from(resource);
        self.state.revision = object.revision;
        self.state.apply(&resource, key.clone(), (change != Change::Deleted).then(|| object.clone()));
        self.events.push(Arc::new(Event::new(resource, key.clone(), change, object, previous)));
    }
}

/// What has been published so far, or why nothing more will be.
#[derive(Clone, Debug)]
struct Progress {
    revision: u64,
    failure: Option<Arc<str>>,
}

struct Shared {
    /// What readers see.
    published: ArcSwap<Snapshot>,
    /// Newest state, published or not; its lock makes transactions run one at a time.
    writer: Mutex<Snapshot>,
    rings: Rings,
    /// Every event up to this revision is in the rings.
    fanned_out: AtomicU64,
    /// Held while a state and its events become visible, so that whoever needs both together gets them of one revision.
    publishing: Mutex<()>,
    progress: tokio::sync::watch::Sender<Progress>,
}

impl Shared {
    /// Makes changes visible: readers first, then watchers, then those who wait for an answer.
    fn publish(&self, state: Snapshot, events: &[Arc<Event>]) {
        let revision = state.revision;
        let together = self.publishing.lock().unwrap_or_else(|poisoned| poisoned.into_inner());
        self.published.store(Arc::new(state));
        self.rings.append(events);
        self.fanned_out.store(revision, Ordering::Release);
        drop(together);
        self.progress.send_modify(|progress| progress.revision = revision);
    }
}

/// The store. Clones share one.
#[derive(Clone)]
pub struct Store {
    shared: Arc<Shared>,
    journal: Option<Arc<Committer>>,
}

impl std::fmt::Debug for Store {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Store").field("revision", &self.snapshot().revision).finish_non_exhaustive()
    }
}

impl Store {
    /// An empty store without a journal.
    pub fn in_memory() -> Store {
        Store { shared: Arc::new(Shared::new(Snapshot::default(), Vec::new(), 0)), journal: None }
    }

    /// Opens or makes the store in a file. Takes time in proportion to the number of objects.
    ///
    /// # Errors
    /// The file cannot be opened (another process has it, no permission) or is not a store.
    pub fn open(path: &std::path::Path, durability: Durability) -> Result<Store, Error> {
        let (journal, loaded) = Journal::open(path)?;
        let mut state = Snapshot { revision: loaded.revision, ..Snapshot::default() };
        for (resource, key, object) in loaded.objects {
            state.apply(&resource, key, Some(Arc::new(object)));
        }
        let shared = Arc::new(Shared::new(state, loaded.events, loaded.floor));
        let committer = Committer::start(journal, shared.clone(), durability)?;
        Ok(Store { shared, journal: Some(Arc::new(committer)) })
    }

    /// The newest published state.
    pub fn snapshot(&self) -> Arc<Snapshot> {
        self.shared.published.load_full()
    }

    /// Runs `decide` alone on the newest state and waits until its changes are published.
    ///
    /// If it refuses, nothing changes; the refusal is returned when the state it was based on is published, so that a
    /// client never hears of what it cannot see.
    ///
    /// The decision is made when this is called; only the wait is left to the future.
    pub fn transact<T: Send + 'static>(
        &self,
        decide: impl FnOnce(&mut Txn) -> Result<T, Status>,
    ) -> BoxFuture<'static, Result<T, Status>> {
        let (outcome, revision) = self.stage(decide);
        let store = self.clone();
        Box::pin(async move {
            store.wait_published(revision).await?;
            outcome
        })
    }

    /// As [`Store::transact`], but nothing is kept (`dryRun=All`).
    pub fn simulate<T>(&self, decide: impl FnOnce(&mut Txn) -> Result<T, Status>) -> Result<T, Status> {
        let state = self.writer().clone();
        decide(&mut Txn { state, events: Vec::new(), after: Vec::new() })
    }

    /// Runs a transaction and hands it to the journal; returns the revision to wait for.
    fn stage<T>(&self, decide: impl FnOnce(&mut Txn) -> Result<T, Status>) -> (Result<T, Status>, u64) {
        let mut writer = self.writer();
        let mut txn = Txn { state: writer.clone(), events: Vec::new(), after: Vec::new() };
        let outcome = decide(&mut txn);
        if outcome.is_err() || txn.events.is_empty() {
            return (outcome, writer.revision);
        }
        let revision = txn.state.revision;
        *writer = txn.state.clone();
        for act in txn.after {
            act();
        }
        match &self.journal {
            // The queue is filled under the writer's lock, so that batches are in order of revision.
            Some(committer) => {
                if committer.durability == Durability::Relaxed {
                    self.shared.publish(txn.state.clone(), &txn.events);
                }
                committer.enqueue(txn.state, txn.events);
            }
            None => self.shared.publish(txn.state, &txn.events),
        }
        (outcome, revision)
    }

    fn writer(&self) -> MutexGuard<'_, Snapshot> {
        // A panic in a transaction leaves the state as it was before it.
        self.shared.writer.lock().unwrap_or_else(|poisoned| poisoned.into_inner())
    }

    async fn wait_published(&self, revision: u64) -> Result<(), Status> {
        let mut progress = self.shared.progress.subscribe();
        let reached = progress
            .wait_for(|progress| progress.revision >= revision || progress.failure.is_some())
            .await
            .map_err(|_| Status::internal("the store is closed"))?;
        match &reached.failure {
            Some(failure) if reached.revision < revision => Err(Status::internal(failure)),
            Some(_) | None => Ok(()),
        }
    }

    /// Waits until `revision` is published, at most `limit`; says whether it is.
    pub async fn reached(&self, revision: u64, limit: Duration) -> bool {
        tokio::time::timeout(limit, self.wait_published(revision)).await.is_ok_and(|outcome| outcome.is_ok())
    }

    /// Events of a collection after `revision`.
    ///
    /// # Errors
    /// The events are no longer kept.
    pub fn watch(&self, resource: &str, revision: u64) -> Result<Watcher, Expired> {
        self.shared.rings.watch(resource, revision, self.shared.clone())
    }

    /// A collection as it was at an earlier revision, if the events since then are still kept.
    ///
    /// # Errors
    /// They are not.
    pub fn collection_at(&self, resource: &str, revision: u64) -> Result<Collection, Expired> {
        let (snapshot, events) = {
            let _together = self.shared.publishing.lock().unwrap_or_else(|poisoned| poisoned.into_inner());
            let snapshot = self.snapshot();
            if revision >= snapshot.revision {
                return Ok(snapshot.collection(resource));
            }
            (snapshot, self.shared.rings.after(resource, revision)?)
        };
        let mut collection = snapshot.collection(resource);
        for event in events.into_iter().rev() {
            match &event.previous {
                Some(previous) => {
                    collection.insert(event.key.clone(), previous.clone());
                }
                None => {
                    collection.remove(&event.key);
                }
            }
        }
        Ok(collection)
    }

    /// Waits for all that has been staged and ends the journal's thread. Later writes fail.
    pub async fn close(&self) {
        if let Some(committer) = &self.journal {
            committer.stop();
            let committer = committer.clone();
            // Joining a thread blocks, which the runtime's workers must not.
            let _ = tokio::task::spawn_blocking(move || committer.join()).await;
        }
    }
}

impl Shared {
    fn new(state: Snapshot, events: Vec<Arc<Event>>, floor: u64) -> Shared {
        let revision = state.revision;
        let rings = Rings::new(floor);
        rings.append(&events);
        Shared {
            published: ArcSwap::from_pointee(state.clone()),
            writer: Mutex::new(state),
            rings,
            fanned_out: AtomicU64::new(revision),
            publishing: Mutex::default(),
            progress: tokio::sync::watch::Sender::new(Progress { revision, failure: None }),
        }
    }
}

/// Transactions that wait for the disk.
#[derive(Default)]
struct Queue {
    /// State after the last of the events.
    state: Option<Snapshot>,
    events: Vec<Arc<Event>>,
    stop: bool,
}

/// The thread that writes batches of transactions to the journal and publishes them.
struct Committer {
    durability: Durability,
    queue: Arc<(Mutex<Queue>, std::sync::Condvar)>,
    thread: Mutex<Option<std::thread::JoinHandle<()>>>,
}

/// How often a relaxed journal is synced.
const RELAXED_SYNC: Duration = Duration::from_millis(200);

impl Committer {
    fn start(mut journal: Journal, shared: Arc<Shared>, durability: Durability) -> Result<Committer, Error> {
        let queue: Arc<(Mutex<Queue>, std::sync::Condvar)> = Arc::default();
        let taken = queue.clone();
        let run = move || {
            loop {
                let (state, events, stop) = {
                    let (lock, wake) = &*taken;
                    let mut queue = lock.lock().unwrap_or_else(|poisoned| poisoned.into_inner());
                    while queue.state.is_none() && !queue.stop {
                        queue = wake.wait(queue).unwrap_or_else(|poisoned| poisoned.into_inner());
                    }
                    (queue.state.take(), std::mem::take(&mut queue.events), queue.stop)
                };
                if let Some(state) = state {
                    let records = events.iter().map(|event| Record::of(event));
                    if let Err(error) = journal.append(state.revision, records) {
                        // The disk has failed: writers are told, readers keep the last good state.
                        tracing::error!(%error, "cannot write the journal; the API server refuses further writes");
                        let failure: Arc<str> = Arc::from(format!("the object store cannot be written: {error}"));
                        shared.progress.send_modify(|progress| progress.failure = Some(failure));
                        return;
                    }
                    if durability == Durability::Synced {
                        shared.publish(state, &events);
                    } else if !stop {
                        std::thread::sleep(RELAXED_SYNC);
                    }
                } else if stop {
                    return;
                }
            }
        };
        let thread =
            std::thread::Builder::new().name("apiserver-store".to_owned()).spawn(run).map_err(Error::Thread)?;
        Ok(Committer { durability, queue, thread: Mutex::new(Some(thread)) })
    }

    fn enqueue(&self, state: Snapshot, mut events: Vec<Arc<Event>>) {
        let (lock, wake) = &*self.queue;
        let mut queue = lock.lock().unwrap_or_else(|poisoned| poisoned.into_inner());
        queue.state = Some(state);
        queue.events.append(&mut events);
        wake.notify_one();
    }

    fn stop(&self) {
        let (lock, wake) = &*self.queue;
        lock.lock().unwrap_or_else(|poisoned| poisoned.into_inner()).stop = true;
        wake.notify_one();
    }

    fn join(&self) {
        let thread = self.thread.lock().unwrap_or_else(|poisoned| poisoned.into_inner()).take();
        if let Some(thread) = thread {
            // A panic there has been reported by the panic hook.
            let _ = thread.join();
        }
    }
}

impl Drop for Committer {
    fn drop(&mut self) {
        self.stop();
        self.join();
    }
}

#[cfg(test)]
mod tests;
