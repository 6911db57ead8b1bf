//! Watch: the events of a collection as a stream of JSON lines.

use std::borrow::Cow;
use std::collections::VecDeque;
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use http::Response;
use portolan_api::status::Status;
use rand::RngExt as _;
use serde_json::{Value, json};
use tokio::time::Instant;

use super::options::{ListOptions, revision};
use super::{Call, render};
use crate::metrics::{ResourceLabels, VerbLabels};
use crate::negotiate::{Representation, Shape};
use crate::response::{Body, JSON, answer, streamed};
use crate::store::{Change, Event, Expired, Object, Watcher, line_of};

/// Length of a watch that does not say, in seconds; random within it, so that clients do not all come back at once
/// (`--min-request-timeout` of the reference implementation).
const DEFAULT_SECONDS: std::ops::Range<u64> = 1800..3600;

/// How often a quiet watch gets a bookmark.
const BOOKMARK_PERIOD: Duration = Duration::from_secs(60);

/// A last bookmark comes this long before the end.
const LAST_BOOKMARK: Duration = Duration::from_secs(2);

struct Stream {
    call: Call,
    options: ListOptions,
    shape: Shape,
    include: render::Include,
    /// Lines that are ready.
    ready: VecDeque<Bytes>,
    /// What is there at the start, as far as it has not been sent.
    initial: VecDeque<Arc<Object>>,
    /// The annotated bookmark after the initial events is still to be sent.
    end_of_initial: Option<u64>,
    watcher: Watcher,
    columns_sent: bool,
    /// The stream ends after what is ready.
    closing: bool,
    deadline: Instant,
    next_bookmark: Instant,
    last_bookmark_sent: bool,
    bookmarked: u64,
    _open: OpenGauge,
}

/// Counts open watches.
struct OpenGauge {
    server: Arc<crate::server::Inner>,
    labels: VerbLabels,
}

impl OpenGauge {
    fn new(call: &Call) -> OpenGauge {
        let labels = VerbLabels { verb: "WATCH".to_owned(), resource: call.entry.kind.plural.clone() };
        call.server.metrics.longrunning.get_or_create(&labels).inc();
        OpenGauge { server: call.server.clone(), labels }
    }
}

impl Drop for OpenGauge {
    fn drop(&mut self) {
        self.server.metrics.longrunning.get_or_create(&self.labels).dec();
    }
}

/// Answers a watch.
pub async fn watch(call: Call) -> Result<Response<Body>, Status> {
    let Representation { shape, .. } = call.representation()?;
    let include = render::include(&call)?;
    let single = call.target.name.clone();
    let options = ListOptions::parse(&call.query, &call.entry.kind, call.selectable_fields(), single.as_deref())?;
    options.check(true)?;
    let given = options.resource_version.as_str();
    let from = if given.is_empty() {
        0
    } else {
        revision(given).map_err(|text| {
            Status::plain_error(format!(
                "resourceVersion: Invalid value: {}: {text}",
                portolan_api::status::quoted(given)
            ))
        })?
    };
    let wants_list = options.send_initial_events == Some(true);
    if wants_list {
        super::read::wait_for(&call, from).await?;
    }
    let store = call.server.store.clone();
    let mut initial = VecDeque::new();
    let mut start = from;
    // The snapshot is taken before the watcher: what is published in between is read by the watcher.
    if wants_list || (options.send_initial_events.is_none() && from == 0) {
        let snapshot = store.snapshot();
        start = snapshot.revision;
        initial = snapshot
            .list(&call.entry.collection, call.target.namespace.as_deref())
            .filter(|object| options.matches(&call.entry.kind, &object.value))
            .cloned()
            .collect();
    } else if from == 0 {
        start = store.snapshot().revision;
    }
    let mut ready = VecDeque::new();
    let mut closing = false;
    let watcher = match store.watch(&call.entry.collection, start) {
        Ok(watcher) => watcher,
        Err(Expired { floor }) => {
            ready.push_back(error_line(&too_old(start, floor)));
            closing = true;
            store.watch(&call.entry.collection, store.snapshot().revision).map_err(|_| Status::internal("no events"))?
        }
    };
    let now = Instant::now();
    let seconds = options.timeout_seconds.unwrap_or_else(|| rand::rng().random_range(DEFAULT_SECONDS));
    let end_of_initial = (wants_list && options.bookmarks).then_some(start);
    let open = OpenGauge::new(&call);
    let mut response = answer(200, JSON, crate::response::full(""));
    let stream = Stream {
        call,
        options,
        shape,
        include,
        ready,
        initial,
        end_of_initial,
        watcher,
        columns_sent: false,
        closing,
        deadline: now + Duration::from_secs(seconds),
        next_bookmark: now + BOOKMARK_PERIOD,
        last_bookmark_sent: false,
        bookmarked: 0,
        _open: open,
    };
    *response.body_mut() = streamed(futures::stream::unfold(stream, |mut stream| async move {
        let piece = stream.next().await?;
        Some((piece, stream))
    }));
    Ok(response)
}

fn too_old(wanted: u64, floor: u64) -> Status {
    Status::expired(format!("too old resource version: {wanted} ({floor})"))
}

fn error_line(status: &Status) -> Bytes {
    line("ERROR", &status.to_value())
}

fn line(word: &str, object: &Value) -> Bytes {
    let mut text = json!({"type": word, "object": object}).to_string();
    text.push('\n');
    Bytes::from(text)
}

/// Most bytes of lines that are joined into one piece of the stream.
const PIECE_BYTES: usize = 64 << 10;

impl Stream {
    /// The next bytes; `None` at the end.
    async fn next(&mut self) -> Option<Bytes> {
        loop {
            if let Some(piece) = self.take_ready() {
                return Some(piece);
            }
            if self.closing {
                return None;
            }
            if !self.initial.is_empty() {
                self.prepare_initial();
                continue;
            }
            if let Some(at) = self.end_of_initial.take() {
                self.push_bookmark(at, true);
                continue;
            }
            match self.watcher.read() {
                Ok(events) => {
                    for event in events {
                        self.push_event(&event);
                    }
                }
                Err(Expired { floor }) => {
                    self.ready.push_back(error_line(&too_old(self.watcher.revision(), floor)));
                    self.closing = true;
                }
            }
            if self.ready.is_empty() && !self.watcher.is_behind() {
                self.wait().await;
            }
        }
    }

    /// Joins lines into one piece: a burst costs few frames.
    fn take_ready(&mut self) -> Option<Bytes> {
        let first = self.ready.pop_front()?;
        if self.ready.is_empty() {
            return Some(first);
        }
        let mut piece = Vec::with_capacity(PIECE_BYTES.min(first.len() * (self.ready.len() + 1)));
        piece.extend_from_slice(&first);
        while let Some(next) = self.ready.front()
            && piece.len() + next.len() <= PIECE_BYTES
        {
            piece.extend_from_slice(next);
            self.ready.pop_front();
        }
        Some(Bytes::from(piece))
    }

    fn prepare_initial(&mut self) {
        let mut bytes = 0;
        while bytes < PIECE_BYTES {
            let Some(object) = self.initial.pop_front() else { break };
            let line = self.object_line(Change::Added, &object, None);
            bytes += line.len();
            self.count(1);
            self.ready.push_back(line);
        }
    }

    fn count(&self, events: u64) {
        let labels = ResourceLabels { resource: self.call.entry.collection.to_string() };
        self.call.server.metrics.watch_events.get_or_create(&labels).inc_by(events);
    }

    fn push_event(&mut self, event: &Event) {
        if self.call.target.namespace.as_deref().is_some_and(|namespace| &*event.key.namespace != namespace) {
            return;
        }
        let kind = &self.call.entry.kind;
        let is = |object: &Arc<Object>| self.options.matches(kind, &object.value);
        let now = event.change != Change::Deleted && is(&event.object);
        let before = event.previous.as_ref().is_some_and(is);
        let line = match (before, now) {
            (false, false) => return,
            (false, true) => self.object_line(Change::Added, &event.object, Some(event)),
            (true, true) => self.object_line(Change::Modified, &event.object, Some(event)),
            (true, false) if event.change == Change::Deleted => {
                self.object_line(Change::Deleted, &event.object, Some(event))
            }
            (true, false) => {
                // It has left the selection: shown as it last was inside, with the revision of the change.
                let Some(previous) = &event.previous else { return };
                let left = Object::new(previous.value.clone(), event.object.revision);
                self.object_line(Change::Deleted, &left, None)
            }
        };
        self.count(1);
        self.ready.push_back(line);
    }

    fn object_line(&mut self, shown_as: Change, object: &Object, event: Option<&Event>) -> Bytes {
        let entry = &self.call.entry;
        let word = match shown_as {
            Change::Added => "ADDED",
            Change::Modified => "MODIFIED",
            Change::Deleted => "DELETED",
        };
        match self.shape {
            Shape::Object if entry.converts => line(word, &render::value_in(entry, object)),
            Shape::Object => match event {
                Some(event) => event.line(shown_as, &entry.prefix),
                None => line_of(shown_as, &entry.prefix, object),
            },
            Shape::Partial { beta } | Shape::PartialList { beta } => line(word, &render::partial(&object.value, beta)),
            Shape::Table { beta } => {
                let metadata = json!({"resourceVersion": object.revision.to_string()});
                let columns = !std::mem::replace(&mut self.columns_sent, true);
                let value: Cow<'_, Value> = render::value_in(entry, object);
                let now = jiff::Timestamp::now();
                let table = render::table(entry, std::iter::once(value), metadata, beta, self.include, columns, now);
                line(word, &table)
            }
        }
    }

    fn push_bookmark(&mut self, revision: u64, end_of_initial: bool) {
        let mut metadata = json!({"resourceVersion": revision.to_string(), "creationTimestamp": null});
        if end_of_initial {
            metadata["annotations"] = json!({"k8s.io/initial-events-end": "true"});
        }
        let kind = &self.call.entry.kind;
        let bare = json!({"kind": kind.kind, "apiVersion": kind.api_version(), "metadata": metadata});
        let object = match self.shape {
            Shape::Object => bare,
            Shape::Partial { beta } | Shape::PartialList { beta } => render::partial(&bare, beta),
            Shape::Table { beta } => {
                let list = json!({"resourceVersion": revision.to_string()});
                // The row's object carries the annotation that ends the initial events.
                let now = jiff::Timestamp::now();
                render::table(&self.call.entry, std::iter::once(Cow::Owned(bare)), list, beta, self.include, false, now)
            }
        };
        self.bookmarked = revision;
        self.ready.push_back(line("BOOKMARK", &object));
    }

    /// Waits for an event, a bookmark's time, the end of the watch or of the server.
    async fn wait(&mut self) {
        let until_bookmark = if self.options.bookmarks && !self.last_bookmark_sent {
            let last = self.deadline.checked_sub(LAST_BOOKMARK).unwrap_or(self.deadline);
            self.next_bookmark.min(last)
        } else {
            self.deadline
        };
        let shutdown = self.call.server.shutdown.clone();
        tokio::select! {
            () = self.watcher.changed() => {}
            () = tokio::time::sleep_until(self.deadline) => self.closing = true,
            () = tokio::time::sleep_until(until_bookmark), if self.options.bookmarks && !self.last_bookmark_sent => {
                let now = Instant::now();
                self.last_bookmark_sent = now + LAST_BOOKMARK >= self.deadline;
                self.next_bookmark = now + BOOKMARK_PERIOD;
                // Events may have come meanwhile; the bookmark must not overtake them.
                match self.watcher.read() {
                    Ok(events) => events.iter().for_each(|event| self.push_event(event)),
                    Err(_) => return,
                }
                let revision = self.watcher.revision();
                if revision > self.bookmarked {
                    self.push_bookmark(revision, false);
                }
            }
            () = shutdown.cancelled() => self.closing = true,
        }
    }
}
