//! Events of changes, kept for a while in one ring for each collection.
//!
//! A watcher has a place in the ring and reads from there when it is woken. It has no queue of its own, so a slow one
//! costs nothing and delays nobody; one that falls behind the ring's oldest event is told so.

use std::collections::{BTreeMap, VecDeque};
use std::sync::atomic::Ordering;
use std::sync::{Arc, Mutex, OnceLock};
use std::time::{Duration, Instant};

use super::Shared;
use super::object::{Key, Object};

/// What happened to an object.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Change {
    /// It was made.
    Added,
    /// It was overwritten.
    Modified,
    /// It was removed.
    Deleted,
}

/// One change of one object.
#[derive(Debug)]
pub struct Event {
    /// The collection.
    pub resource: Arc<str>,
    /// The object's place.
    pub key: Key,
    /// What happened.
    pub change: Change,
    /// The new state; after a removal the last state with the revision of the removal.
    pub object: Arc<Object>,
    /// The state before.
    pub previous: Option<Arc<Object>>,
    at: Instant,
    /// Lines of plain watches, made by the first watcher that needs one: `(prefix, line)`.
    lines: [OnceLock<(Arc<str>, bytes::Bytes)>; 3],
}

impl Event {
    /// An event that happens now.
    pub fn new(
        resource: Arc<str>,
        key: Key,
        change: Change,
        object: Arc<Object>,
        previous: Option<Arc<Object>>,
    ) -> Event {
        Event { resource, key, change, object, previous, at: Instant::now(), lines: Default::default() }
    }

    /// Bytes of the object, about half of what the event keeps in memory.
    fn size(&self) -> usize {
        self.object.body.len()
    }

    /// The line `{"type":...,"object":...}` of a plain watch, shared by all watchers with the same `prefix`, which is
    /// the object's beginning with `apiVersion` and `kind`.
    pub fn line(&self, shown_as: Change, prefix: &Arc<str>) -> bytes::Bytes {
        let slot = &self.lines[shown_as as usize];
        let (made_for, line) = slot.get_or_init(|| (prefix.clone(), line(shown_as, prefix, &self.object.body)));
        if made_for == prefix { line.clone() } else { line_of(shown_as, prefix, &self.object) }
    }
}

/// As [`Event::line`] for an object that is not shared.
pub fn line_of(shown_as: Change, prefix: &str, object: &Object) -> bytes::Bytes {
    line(shown_as, prefix, &object.body)
}

fn line(shown_as: Change, prefix: &str, body: &[u8]) -> bytes::Bytes {
    let word = match shown_as {
        Change::Added => "ADDED",
        Change::Modified => "MODIFIED",
        Change::Deleted => "DELETED",
    };
    let mut out = Vec::with_capacity(body.len() + prefix.len() + 40);
    out.extend_from_slice(b"{\"type\":\"");
    out.extend_from_slice(word.as_bytes());
    out.extend_from_slice(b"\",\"object\":");
    out.extend_from_slice(prefix.as_bytes());
    out.extend_from_slice(&body[1..]);
    out.extend_from_slice(b"}\n");
    bytes::Bytes::from(out)
}

/// The events after the wanted revision are no longer kept.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Expired {
    /// The oldest revision from which one may watch.
    pub floor: u64,
}

/// Most events a ring keeps.
const RING_MAX: usize = 4096;

/// Events younger than this are kept as long as [`RING_MAX`] allows: clients page through lists and reconnect within
/// it (the reference implementation compacts every five minutes).
const RING_AGE: Duration = Duration::from_secs(300);

/// Most bytes of objects that a ring keeps, whatever their number: two states of each, and lines as they are needed.
const RING_BYTES: usize = 32 << 20;

/// Most bytes of objects that one read returns, so that a slow reader holds no more of the past than that.
const READ_BYTES: usize = 1 << 20;

/// Old events that are kept all the same, for watchers of quiet collections.
const RING_MIN: usize = 64;

struct Ring {
    /// Events up to this revision may be missing.
    floor: u64,
    events: VecDeque<Arc<Event>>,
    bytes: usize,
    wake: tokio::sync::watch::Sender<u64>,
}

/// The rings of all collections.
pub(super) struct Rings {
    /// Floor of collections that have had no event yet.
    floor: u64,
    rings: Mutex<BTreeMap<Arc<str>, Ring>>,
}

impl Rings {
    pub(super) fn new(floor: u64) -> Rings {
        Rings { floor, rings: Mutex::default() }
    }

    fn with<T>(&self, resource: &str, act: impl FnOnce(&mut Ring) -> T) -> T {
        let mut rings = self.rings.lock().unwrap_or_else(|poisoned| poisoned.into_inner());
        if !rings.contains_key(resource) {
            let ring =
                Ring { floor: self.floor, events: VecDeque::new(), bytes: 0, wake: tokio::sync::watch::Sender::new(0) };
            rings.insert(Arc::from(resource), ring);
        }
        act(rings.get_mut(resource).expect("just inserted"))
    }

    pub(super) fn append(&self, events: &[Arc<Event>]) {
        for event in events {
            self.with(&event.resource, |ring| {
                ring.bytes += event.size();
                ring.events.push_back(event.clone());
                while ring.events.len() > RING_MAX
                    || (ring.bytes > RING_BYTES && ring.events.len() > 1)
                    || (ring.events.len() > RING_MIN && ring.events[0].at.elapsed() > RING_AGE)
                {
                    if let Some(dropped) = ring.events.pop_front() {
                        ring.bytes -= dropped.size();
                        ring.floor = dropped.object.revision;
                    }
                }
                ring.wake.send_replace(event.object.revision);
            });
        }
    }

    /// The kept events after a revision.
    pub(super) fn after(&self, resource: &str, revision: u64) -> Result<Vec<Arc<Event>>, Expired> {
        self.with(resource, |ring| {
            if revision < ring.floor {
                return Err(Expired { floor: ring.floor });
            }
            let start = ring.events.partition_point(|event| event.object.revision <= revision);
            Ok(ring.events.range(start..).cloned().collect())
        })
    }

    pub(super) fn watch(&self, resource: &str, revision: u64, shared: Arc<Shared>) -> Result<Watcher, Expired> {
        let wake = self.with(resource, |ring| {
            if revision < ring.floor { Err(Expired { floor: ring.floor }) } else { Ok(ring.wake.subscribe()) }
        })?;
        Ok(Watcher { resource: Arc::from(resource), revision, wake, behind: false, shared })
    }
}

/// A reader of the events of one collection.
pub struct Watcher {
    resource: Arc<str>,
    /// All events up to this revision have been read.
    revision: u64,
    wake: tokio::sync::watch::Receiver<u64>,
    behind: bool,
    shared: Arc<Shared>,
}

impl Watcher {
    /// The events that have happened since the last call; perhaps none. If they are many, the first of them; then
    /// [`Watcher::is_behind`] is true.
    ///
    /// # Errors
    /// Some of them are no longer kept: the reader has been too slow.
    pub fn read(&mut self) -> Result<Vec<Arc<Event>>, Expired> {
        self.wake.mark_unchanged();
        // Read before the ring: all events up to here are in it.
        let complete = self.shared.fanned_out.load(Ordering::Acquire);
        let mut events = self.shared.rings.after(&self.resource, self.revision)?;
        let mut bytes = 0;
        let fits = |event: &Arc<Event>| {
            let begins_within = bytes < READ_BYTES;
            bytes += event.size();
            begins_within
        };
        let count = events.iter().map(fits).take_while(|fits| *fits).count();
        self.behind = count < events.len();
        events.truncate(count);
        let last = events.last().map_or(0, |event| event.object.revision);
        self.revision = if self.behind { last } else { self.revision.max(complete).max(last) };
        Ok(events)
    }

    /// Whether the last read has left events for the next one, which there is then no need to wait for.
    pub fn is_behind(&self) -> bool {
        self.behind
    }

    /// All events up to this revision have been returned by [`Watcher::read`].
    pub fn revision(&self) -> u64 {
        self.revision
    }

    /// Waits until there may be something to read.
    pub async fn changed(&mut self) {
        // The sender lives in the ring, which `shared` keeps alive.
        let _ = self.wake.changed().await;
    }
}
