//! Records events about objects, as `kubectl describe` and `kubectl get events` show them.
//!
//! The same event about the same object raises the count of one Event object, as client-go's correlator does; a source that
//! floods one object is slowed down by a token bucket.

use std::collections::HashMap;
use std::time::{Duration, Instant};

use jiff::Timestamp;
use k8s_openapi::api::core::v1::{Event, EventSource, ObjectReference};
use k8s_openapi::apimachinery::pkg::apis::meta::v1::{ObjectMeta, Time};
use kube::api::{Api, Patch, PatchParams, PostParams};
use tokio::sync::mpsc;

/// Whether an event reports normal operation or trouble.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum EventType {
    /// Nothing to do.
    Normal,
    /// A person should know.
    Warning,
}

impl EventType {
    fn as_str(self) -> &'static str {
        match self {
            EventType::Normal => "Normal",
            EventType::Warning => "Warning",
        }
    }
}

/// Events waiting to be written; more are dropped with a log line, because the cause matters more than its report.
const QUEUE: usize = 1024;
/// Events of one object and component in a burst, and one more every five minutes (client-go's spam filter).
const BURST: f64 = 25.0;
const REFILL_PER_SECOND: f64 = 1.0 / 300.0;
/// Events remembered for counting; the least recently used go first.
const REMEMBERED: usize = 4096;

#[derive(Debug)]
struct Note {
    object: ObjectReference,
    kind: EventType,
    reason: String,
    message: String,
}

/// Writes events in the background. Cloning is cheap; recording never blocks and never fails.
#[derive(Clone, Debug)]
pub struct EventRecorder {
    queue: mpsc::Sender<Note>,
}

impl EventRecorder {
    /// Starts a recorder for `component` (as in `kubelet`), on `host` if it belongs to one node. Needs a tokio runtime; its task
    /// ends when the last clone is dropped.
    pub fn new(client: kube::Client, component: &str, host: Option<String>) -> EventRecorder {
        let (queue, notes) = mpsc::channel(QUEUE);
        let source = EventSource { component: Some(component.to_string()), host };
        tokio::spawn(write(client, source, notes));
        EventRecorder { queue }
    }

    /// Records one event about `object`. `reason` is CamelCase; `message` is a sentence for a person.
    pub fn event(&self, object: &ObjectReference, kind: EventType, reason: &str, message: impl Into<String>) {
        let note = Note { object: object.clone(), kind, reason: reason.to_string(), message: message.into() };
        if let Err(mpsc::error::TrySendError::Full(note)) = self.queue.try_send(note) {
            tracing::warn!(reason = note.reason, message = note.message, "too many events waiting, dropped one");
        }
    }
}

/// What makes two events the same one.
#[derive(Clone, PartialEq, Eq, Hash)]
struct Same {
    object: (String, String, String, String, String),
    warning: bool,
    reason: String,
    message: String,
}

struct Written {
    name: String,
    count: i32,
    used: u64,
}

struct Bucket {
    tokens: f64,
    filled: Instant,
}

async fn write(client: kube::Client, source: EventSource, mut notes: mpsc::Receiver<Note>) {
    let mut written: HashMap<Same, Written> = HashMap::new();
    let mut buckets: HashMap<String, Bucket> = HashMap::new();
    let mut clock = 0u64;
    while let Some(note) = notes.recv().await {
        clock += 1;
        if !take_token(&mut buckets, &note.object, Instant::now()) {
            tracing::debug!(reason = note.reason, name = note.object.name, "event filtered: too many for one object");
            continue;
        }
        let same = same(&note);
        let namespace = note.object.namespace.clone().filter(|n| !n.is_empty()).unwrap_or_else(|| "default".into());
        let api: Api<Event> = Api::namespaced(client.clone(), &namespace);
        if let Some(known) = written.get_mut(&same) {
            known.used = clock;
            known.count += 1;
            let patch = serde_json::json!({"count": known.count, "lastTimestamp": Time(Timestamp::now())});
            match api.patch(&known.name, &PatchParams::default(), &Patch::Merge(patch)).await {
                Ok(_) => continue,
                // Expired meanwhile: written anew below.
                Err(kube::Error::Api(status)) if status.code == 404 => {}
                Err(error) => {
                    tracing::warn!(%error, reason = note.reason, "cannot update event");
                    continue;
                }
            }
        }
        match create(&api, &source, &note, &namespace).await {
            Ok(name) => {
                if written.len() >= REMEMBERED
                    && let Some(oldest) = written.iter().min_by_key(|(_, w)| w.used).map(|(same, _)| same.clone())
                {
                    written.remove(&oldest);
                }
                written.insert(same, Written { name, count: 1, used: clock });
            }
            // The namespace is being deleted: nobody will read it there.
            Err(kube::Error::Api(status)) if matches!(status.code, 403 | 404) => {
                tracing::debug!(reason = note.reason, message = note.message, "no place for event: {}", status.message);
            }
            Err(error) => tracing::warn!(%error, reason = note.reason, message = note.message, "cannot record event"),
        }
    }
}

async fn create(api: &Api<Event>, source: &EventSource, note: &Note, namespace: &str) -> Result<String, kube::Error> {
    let now = Timestamp::now();
    let subject = note.object.name.clone().unwrap_or_default();
    let event = Event {
        metadata: ObjectMeta {
            // client-go's form: the object's name and the time in hexadecimal nanoseconds.
            name: Some(format!("{subject}.{:x}", now.as_nanosecond())),
            namespace: Some(namespace.to_string()),
            ..Default::default()
        },
        involved_object: note.object.clone(),
        type_: Some(note.kind.as_str().to_string()),
        reason: Some(note.reason.clone()),
        message: Some(note.message.clone()),
        source: Some(source.clone()),
        reporting_component: source.component.clone(),
        reporting_instance: source.host.clone(),
        count: Some(1),
        first_timestamp: Some(Time(now)),
        last_timestamp: Some(Time(now)),
        ..Default::default()
    };
    let mut pause = Duration::from_millis(100);
    for attempt in 0.. {
        match api.create(&PostParams::default(), &event).await {
            Ok(created) => return Ok(created.metadata.name.unwrap_or_default()),
            // The API server answered: trying again would not change its mind.
            Err(error @ kube::Error::Api(_)) => return Err(error),
            Err(error) if attempt == 4 => return Err(error),
            Err(_) => {
                tokio::time::sleep(pause).await;
                pause *= 3;
            }
        }
    }
    unreachable!("the loop returns at its last attempt")
}

fn same(note: &Note) -> Same {
    let of = |field: &Option<String>| field.clone().unwrap_or_default();
    Same {
        object: (
            of(&note.object.kind),
            of(&note.object.namespace),
            of(&note.object.name),
            of(&note.object.uid),
            of(&note.object.field_path),
        ),
        warning: note.kind == EventType::Warning,
        reason: note.reason.clone(),
        message: note.message.clone(),
    }
}

/// A token bucket per object, full at first.
fn take_token(buckets: &mut HashMap<String, Bucket>, object: &ObjectReference, now: Instant) -> bool {
    let key = object.uid.clone().or_else(|| object.name.clone()).unwrap_or_default();
    if buckets.len() > REMEMBERED {
        buckets.retain(|_, b| b.tokens + now.duration_since(b.filled).as_secs_f64() * REFILL_PER_SECOND < BURST);
    }
    let bucket = buckets.entry(key).or_insert(Bucket { tokens: BURST, filled: now });
    let refill = now.duration_since(bucket.filled).as_secs_f64() * REFILL_PER_SECOND;
    bucket.tokens = (bucket.tokens + refill).min(BURST);
    bucket.filled = now;
    if bucket.tokens < 1.0 {
        return false;
    }
    bucket.tokens -= 1.0;
    true
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn one_object_cannot_flood() {
        let mut buckets = HashMap::new();
        let object = ObjectReference { uid: Some("u".into()), ..Default::default() };
        let other = ObjectReference { uid: Some("v".into()), ..Default::default() };
        let start = Instant::now();
        let passed = (0..100).filter(|_| take_token(&mut buckets, &object, start)).count();
        assert_eq!(passed, 25);
        assert!(take_token(&mut buckets, &other, start), "other objects are not affected");
        assert!(take_token(&mut buckets, &object, start + Duration::from_secs(301)), "one more after five minutes");
    }
}
