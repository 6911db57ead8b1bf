//! Empties namespaces that are being deleted, then lets them go.
//!
//! What remains is watched from the version of the list that found it, so that each removal and nothing else leads to another look.

use std::collections::{BTreeMap, HashMap};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use anyhow::Context as _;
use futures::StreamExt;
use jiff::Timestamp;
use k8s_openapi::api::core::v1::{Namespace, NamespaceCondition};
use k8s_openapi::apimachinery::pkg::apis::meta::v1::Time;
use kube::Api;
use kube::api::{DeleteParams, DynamicObject, ListParams, PostParams, WatchEvent, WatchParams};
use tokio::task::JoinSet;

use crate::Context;
use crate::discovery::{Kind, Kinds};
use crate::queue::{Key, Next, Queue};
use crate::util::{is_conflict, is_not_found, message};

const WORKERS: usize = 10;
/// The finalizer in `spec.finalizers` that stands for the content.
const CONTENT: &str = "kubernetes";
/// Objects of a kind that cannot be watched are looked for again after this long.
const UNWATCHED: Duration = Duration::from_secs(5);

/// What is left in a namespace and what went wrong.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Remains {
    /// Objects left, by `resource.group`.
    pub resources: BTreeMap<String, usize>,
    /// Objects that carry a finalizer, by finalizer.
    pub finalizers: BTreeMap<String, usize>,
    /// The kinds could not be found out.
    pub discovery_error: Option<String>,
    /// Something could not be listed or deleted.
    pub content_errors: Vec<String>,
}

impl Remains {
    /// Nothing left and nothing failed.
    pub fn is_clear(&self) -> bool {
        self.resources.is_empty() && self.discovery_error.is_none() && self.content_errors.is_empty()
    }
}

/// The conditions of a namespace in deletion; the transition time changes with the status only.
pub fn conditions(remains: &Remains, old: &[NamespaceCondition], now: Timestamp) -> Vec<NamespaceCondition> {
    let counts = |map: &BTreeMap<String, usize>, text: fn(&str, usize) -> String| {
        map.iter().map(|(what, count)| text(what, *count)).collect::<Vec<_>>().join(", ")
    };
    let trouble = |at: bool, yes: (&str, String), no: (&str, &str)| {
        if at { ("True", yes.0.to_string(), yes.1) } else { ("False", no.0.to_string(), no.1.to_string()) }
    };
    let rows = [
        (
            "NamespaceDeletionDiscoveryFailure",
            trouble(
                remains.discovery_error.is_some(),
                (
                    "DiscoveryFailed",
                    format!(
                        "Discovery failed for some groups: {}",
                        remains.discovery_error.as_deref().unwrap_or_default()
                    ),
                ),
                ("ResourcesDiscovered", "All resources successfully discovered"),
            ),
        ),
        (
            "NamespaceDeletionGroupVersionParsingFailure",
            trouble(false, ("", String::new()), ("ParsedGroupVersions", "All legacy kube types successfully parsed")),
        ),
        (
            "NamespaceDeletionContentFailure",
            trouble(
                !remains.content_errors.is_empty(),
                (
                    "ContentDeletionFailed",
                    format!(
                        "Failed to delete all resource types, {} remaining: {}",
                        remains.content_errors.len(),
                        remains.content_errors.join(", ")
                    ),
                ),
                ("ContentDeleted", "All content successfully deleted, may be waiting on finalization"),
            ),
        ),
        (
            "NamespaceContentRemaining",
            trouble(
                !remains.resources.is_empty(),
                (
                    "SomeResourcesRemain",
                    format!(
                        "Some resources are remaining: {}",
                        counts(&remains.resources, |what, n| format!("{what} has {n} resource instances"))
                    ),
                ),
                ("ContentRemoved", "All content successfully removed"),
            ),
        ),
        (
            "NamespaceFinalizersRemaining",
            trouble(
                !remains.finalizers.is_empty(),
                (
                    "SomeFinalizersRemain",
                    format!(
                        "Some content in the namespace has finalizers remaining: {}",
                        counts(&remains.finalizers, |what, n| format!("{what} in {n} resource instances"))
                    ),
                ),
                ("ContentHasNoFinalizers", "All content-preserving finalizers finished"),
            ),
        ),
    ];
    let mut all: Vec<NamespaceCondition> =
        old.iter().filter(|c| rows.iter().all(|(kind, _)| *kind != c.type_)).cloned().collect();
    for (kind, (status, reason, text)) in rows {
        let before = old.iter().find(|c| c.type_ == kind).filter(|c| c.status == status);
        all.push(NamespaceCondition {
            type_: kind.into(),
            status: status.into(),
            reason: Some(reason),
            message: Some(text),
            last_transition_time: before.and_then(|c| c.last_transition_time.clone()).or(Some(Time(now))),
        });
    }
    all
}

/// Registers with the caches and returns the future that works.
pub(crate) fn start(context: Context, kinds: Kinds) -> impl Future<Output = ()> + Send + 'static {
    let queue: Queue<Key> = context.queue("namespace");
    let add = queue.clone();
    context.caches.namespaces.on_change(move |_, new| {
        if let Some(namespace) = new.filter(|n| has_content_finalizer(n)) {
            add.add(Key::of(&**namespace));
        }
    });
    async move {
        let stop = context.shutdown.clone();
        let watches: Watches = Arc::default();
        let add = queue.clone();
        queue
            .work(WORKERS, stop, move |key| {
                sync(context.clone(), kinds.clone(), watches.clone(), add.clone(), key.name)
            })
            .await;
    }
}

/// The watches for what remains, by namespace. They end when they are dropped.
type Watches = Arc<Mutex<HashMap<String, JoinSet<()>>>>;

const POISONED: &str = "watches are only inserted and removed";

/// Has the namespace looked at again when an object of this kind in it changes after `version`.
async fn wake_on_change(context: Context, queue: Queue<Key>, kind: Kind, namespace: String, version: String) {
    let api: Api<DynamicObject> = Api::namespaced_with(context.client.clone(), &namespace, &kind.resource);
    let key = Key::new("", namespace);
    let events = match api.watch_metadata(&WatchParams::default(), &version).await {
        Ok(events) => events,
        Err(error) => {
            tracing::debug!(namespace = key.name, kind = kind.resource.plural, %error, "cannot watch what remains");
            return queue.add_after(key, UNWATCHED);
        }
    };
    futures::pin_mut!(events);
    while let Some(Ok(event)) = events.next().await {
        if !matches!(event, WatchEvent::Bookmark(_)) {
            break;
        }
    }
    // Something has changed, or the watch has ended and cannot tell any more.
    queue.add(key);
}

fn has_content_finalizer(namespace: &Namespace) -> bool {
    let finalizers = namespace.spec.as_ref().and_then(|s| s.finalizers.as_deref()).unwrap_or_default();
    namespace.metadata.deletion_timestamp.is_some() && finalizers.iter().any(|f| f == CONTENT)
}

async fn sync(
    context: Context,
    kinds: Kinds,
    watches: Watches,
    queue: Queue<Key>,
    name: String,
) -> anyhow::Result<Next> {
    let cache = &context.caches.namespaces;
    let Some(namespace) = cache.get("", &name).filter(|n| has_content_finalizer(n)) else {
        watches.lock().expect(POISONED).remove(&name);
        return Ok(Next::Wait);
    };
    let mut remains = Remains::default();
    let mut to_watch: Vec<(Kind, Option<String>)> = Vec::new();
    match kinds.get().await {
        Ok(kinds) => {
            let emptied = kinds.iter().filter(|k| k.namespaced).map(|kind| empty(&context, kind, &name));
            for (kind, result) in kinds.iter().filter(|k| k.namespaced).zip(futures::future::join_all(emptied).await) {
                let label = format!("{}.{}", kind.resource.plural, kind.resource.group);
                match result {
                    Ok(left) => {
                        if left.count > 0 {
                            to_watch.push((kind.clone(), left.version.filter(|_| kind.watchable)));
                            remains.resources.insert(label, left.count);
                        }
                        for finalizer in left.finalizers {
                            *remains.finalizers.entry(finalizer).or_default() += 1;
                        }
                    }
                    Err(error) => {
                        remains.content_errors.push(format!("unexpected error for {label}: {}", message(&error)))
                    }
                }
            }
        }
        Err(error) => remains.discovery_error = Some(error.to_string()),
    }
    let api: Api<Namespace> = Api::all(context.client.clone());
    let status = namespace.status.clone().unwrap_or_default();
    let wanted = conditions(&remains, status.conditions.as_deref().unwrap_or_default(), context.clock.now());
    let mut current = Namespace::clone(&namespace);
    // The usual case, everything gone at the first try, needs no word about it: the namespace vanishes with the next write.
    let vanishes = remains.is_clear() && namespace.metadata.finalizers.as_ref().is_none_or(Vec::is_empty);
    if !vanishes && status.conditions.as_ref() != Some(&wanted) {
        current.status.get_or_insert_default().conditions = Some(wanted);
        match api.replace_status(&name, &PostParams::default(), &current).await {
            Ok(written) => {
                cache.wrote_quietly(written.clone());
                current = written;
            }
            Err(error) if is_not_found(&error) => return Ok(Next::Wait),
            Err(error) => return Err(error).context("cannot write the conditions"),
        }
    }
    if !remains.is_clear() {
        let mut next = Next::Wait;
        let mut set = JoinSet::new();
        for (kind, version) in to_watch {
            match version {
                Some(version) => {
                    set.spawn(wake_on_change(context.clone(), queue.clone(), kind, name.clone(), version));
                }
                None => next = Next::After(UNWATCHED),
            }
        }
        watches.lock().expect(POISONED).insert(name, set);
        // Errors do not go away by a change that could be watched.
        anyhow::ensure!(
            remains.discovery_error.is_none() && remains.content_errors.is_empty(),
            "cannot empty the namespace: {}",
            remains.discovery_error.iter().chain(&remains.content_errors).cloned().collect::<Vec<_>>().join(", ")
        );
        return Ok(next);
    }
    watches.lock().expect(POISONED).remove(&name);
    if let Some(finalizers) = current.spec.as_mut().and_then(|s| s.finalizers.as_mut()) {
        finalizers.retain(|f| f != CONTENT);
    }
    match api.replace_subresource("finalize", &name, &PostParams::default(), &current).await {
        Ok(written) => {
            if written.metadata.finalizers.as_ref().is_none_or(Vec::is_empty) {
                cache.deleted(&written);
            } else {
                cache.wrote(written);
            }
            Ok(Next::Wait)
        }
        Err(error) if is_not_found(&error) => Ok(Next::Wait),
        Err(error) if is_conflict(&error) => Err(error).context("namespace changed meanwhile"),
        Err(error) => Err(error).context("cannot finalize the namespace"),
    }
}

struct Left {
    /// The version of the list.
    version: Option<String>,
    count: usize,
    finalizers: Vec<String>,
}

/// Deletes all objects of one kind in the namespace and says what is left of them.
async fn empty(context: &Context, kind: &Kind, namespace: &str) -> Result<Left, kube::Error> {
    let api: Api<DynamicObject> = Api::namespaced_with(context.client.clone(), namespace, &kind.resource);
    let list = || async {
        match api.list_metadata(&ListParams::default()).await {
            Ok(list) => Ok((list.metadata.resource_version, list.items)),
            // The kind went away, or cannot be listed after all: nothing of it can be here.
            Err(error) if is_not_found(&error) => Ok((None, Vec::new())),
            Err(kube::Error::Api(status)) if status.code == 405 => Ok((None, Vec::new())),
            Err(error) => Err(error),
        }
    };
    let (mut version, mut objects) = list().await?;
    if objects.iter().any(|o| o.metadata.deletion_timestamp.is_none()) {
        if kind.delete_collection {
            api.delete_collection(&DeleteParams::background(), &ListParams::default()).await?;
        } else {
            for object in objects.iter().filter(|o| o.metadata.deletion_timestamp.is_none()) {
                match api.delete(object.metadata.name.as_deref().unwrap_or_default(), &DeleteParams::background()).await
                {
                    Ok(_) => {}
                    Err(error) if is_not_found(&error) => {}
                    Err(error) => return Err(error),
                }
            }
        }
        (version, objects) = list().await?;
    }
    let finalizers = objects.iter().flat_map(|o| o.metadata.finalizers.iter().flatten().cloned()).collect();
    Ok(Left { version, count: objects.len(), finalizers })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn conditions_say_what_holds_the_namespace() {
        let remains = Remains {
            resources: BTreeMap::from([("configmaps.".to_string(), 1)]),
            finalizers: BTreeMap::from([("example.com/hold".to_string(), 1)]),
            ..Default::default()
        };
        let first = Timestamp::from_second(100).unwrap();
        let held = conditions(&remains, &[], first);
        let of = |all: &[NamespaceCondition], kind: &str| all.iter().find(|c| c.type_ == kind).unwrap().clone();
        let remaining = of(&held, "NamespaceContentRemaining");
        assert_eq!(remaining.status, "True");
        assert_eq!(
            remaining.message.as_deref(),
            Some("Some resources are remaining: configmaps. has 1 resource instances")
        );
        assert_eq!(
            of(&held, "NamespaceFinalizersRemaining").message.as_deref(),
            Some("Some content in the namespace has finalizers remaining: example.com/hold in 1 resource instances")
        );
        let clear = conditions(&Remains::default(), &held, Timestamp::from_second(200).unwrap());
        assert_eq!(of(&clear, "NamespaceContentRemaining").reason.as_deref(), Some("ContentRemoved"));
        let unchanged = of(&clear, "NamespaceDeletionDiscoveryFailure");
        assert_eq!(unchanged.last_transition_time.unwrap().0, first, "its status did not change");
        assert_eq!(clear.len(), 5);
    }
}
