//! Keeps the published names in step with the API server.
//!
//! Each watch delivers whole objects, of which only what answers need is kept. Changes that arrive together are applied
//! together and published by one pointer swap. When a watch breaks, the last known state stays until the next list is whole.

use std::collections::HashSet;
use std::sync::Arc;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use arc_swap::ArcSwap;
use futures::stream::{BoxStream, select_all};
use futures::{StreamExt, TryStreamExt};
use k8s_openapi::api::core::v1::{Namespace, Pod, Service};
use k8s_openapi::api::discovery::v1::EndpointSlice;
use k8s_openapi::api::networking::v1::Ingress;
use kube::runtime::WatchStreamExt;
use kube::runtime::watcher::{self, Event, watcher};
use kube::{Api, Client, ResourceExt};
use portolan_plan::zone::{PodMode, Published, PublishedBuilder, ServiceKind, ZoneBuilder, ZoneSet};
use tokio::sync::watch;

use crate::metrics::Metrics;

/// Changes applied before the result is published, so that a flood of them cannot hold it back.
const TOGETHER: usize = 256;
const CHANGE_TRIGGER: &str = "endpoints.kubernetes.io/last-change-trigger-time";

#[allow(clippy::large_enum_variant, reason = "short-lived: applied as soon as made")]
enum Change {
    Namespace(Event<Namespace>),
    Service(Event<Service>),
    Slice(Event<EndpointSlice>),
    Pod(Event<Pod>),
    Ingress(Event<Ingress>),
}

fn stream<K>(client: &Client, config: watcher::Config, wrap: fn(Event<K>) -> Change) -> BoxStream<'static, Change>
where
    K: kube::Resource<DynamicType = ()> + Clone + std::fmt::Debug + serde::de::DeserializeOwned + Send + 'static,
{
    let kind = K::kind(&());
    let mut failing = false;
    watcher(Api::<K>::all(client.clone()), config.page_size(500))
        .default_backoff()
        .map(move |event| {
            match &event {
                Err(error) if !failing => tracing::warn!(%kind, %error, "watch broken, serving the last known state"),
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

/// A complete list being read: keys seen so far. Objects that it does not have are deleted at its end.
#[derive(Default)]
struct Listing {
    seen: Option<HashSet<String>>,
    complete: bool,
}

/// What an event asks for.
enum Step<K> {
    Set(K),
    Delete(K),
    /// The list is whole: drop what is not among these keys.
    Retain(HashSet<String>),
    Nothing,
}

impl Listing {
    fn step<K: kube::Resource>(&mut self, event: Event<K>) -> Step<K> {
        match event {
            Event::Init => {
                self.seen = Some(HashSet::new());
                Step::Nothing
            }
            Event::InitApply(object) => {
                if let Some(seen) = &mut self.seen {
                    seen.insert(key(&object));
                }
                Step::Set(object)
            }
            Event::InitDone => {
                self.complete = true;
                self.seen.take().map_or(Step::Nothing, Step::Retain)
            }
            Event::Apply(object) => Step::Set(object),
            Event::Delete(object) => Step::Delete(object),
        }
    }
}

/// `namespace/name`, or the name of what has no namespace.
fn key<K: kube::Resource>(object: &K) -> String {
    match object.namespace() {
        Some(namespace) => format!("{namespace}/{}", object.name_any()),
        None => object.name_any(),
    }
}

fn unix_seconds() -> u32 {
    SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |d| d.as_secs() as u32)
}

/// Follows the cluster's names into `target` for good; `synced` turns true after the first whole lists.
pub(crate) async fn follow_cluster(
    client: Client,
    mut builder: ZoneBuilder,
    target: Arc<ArcSwap<ZoneSet>>,
    synced: watch::Sender<bool>,
    metrics: Arc<Metrics>,
) {
    let any = watcher::Config::default;
    let mut streams = vec![
        stream(&client, any(), Change::Namespace),
        stream(&client, any(), Change::Service),
        stream(&client, any(), Change::Slice),
    ];
    let with_pods = builder.set().pod_mode() == PodMode::Verified;
    if with_pods {
        let live = any().fields("status.phase!=Succeeded,status.phase!=Failed,status.phase!=Unknown");
        streams.push(stream(&client, live, Change::Pod));
    }
    drop(client);
    let (mut namespaces, mut services, mut slices, mut pods) =
        (Listing::default(), Listing::default(), Listing::default(), Listing::default());
    let mut changes = select_all(streams).ready_chunks(TOGETHER);
    while let Some(batch) = changes.next().await {
        let mut changed = false;
        let mut triggered = Vec::new();
        for change in batch {
            changed |= match change {
                Change::Namespace(event) => match namespaces.step(event) {
                    Step::Set(o) => builder.set_namespace(&o),
                    Step::Delete(o) => builder.delete_namespace(&o.name_any()),
                    Step::Retain(seen) => builder.retain_namespaces(&seen),
                    Step::Nothing => false,
                },
                Change::Service(event) => match services.step(event) {
                    Step::Set(o) => builder.set_service(&o),
                    Step::Delete(o) => builder.delete_service(&o.namespace().unwrap_or_default(), &o.name_any()),
                    Step::Retain(seen) => builder.retain_services(&seen),
                    Step::Nothing => false,
                },
                Change::Slice(event) => {
                    if let (Event::Apply(slice), true) = (&event, slices.complete) {
                        triggered.extend(trigger(slice));
                    }
                    match slices.step(event) {
                        Step::Set(o) => builder.set_slice(&o),
                        Step::Delete(o) => builder.delete_slice(&o.namespace().unwrap_or_default(), &o.name_any()),
                        Step::Retain(seen) => builder.retain_slices(&seen),
                        Step::Nothing => false,
                    }
                }
                Change::Pod(event) => match pods.step(event) {
                    Step::Set(o) => builder.set_pod(&o),
                    Step::Delete(o) => builder.delete_pod(&o.namespace().unwrap_or_default(), &o.name_any()),
                    Step::Retain(seen) => builder.retain_pods(&seen),
                    Step::Nothing => false,
                },
                Change::Ingress(_) => false,
            };
        }
        let all = namespaces.complete && services.complete && slices.complete && (pods.complete || !with_pods);
        let first = all && !builder.set().synced;
        if first {
            builder.set_synced();
        }
        if changed {
            builder.touch(unix_seconds());
        }
        if changed || first {
            target.store(Arc::new(builder.set().clone()));
        }
        if first {
            tracing::info!(services = builder.set().service_count(), "names complete");
            synced.send_replace(true);
        }
        for (service, by_controller, since) in triggered {
            let kind = match builder.set().entry(&service).and_then(|e| e.kind.as_ref()) {
                Some(ServiceKind::Cluster(_)) => "cluster_ip",
                Some(ServiceKind::Headless) if by_controller => "headless_with_selector",
                Some(ServiceKind::Headless) => "headless_without_selector",
                Some(ServiceKind::External(_)) | None => continue,
            };
            if let Ok(took) = SystemTime::now().duration_since(since) {
                metrics.programmed(kind, took);
            }
        }
    }
}

/// Service (`name.namespace`), whether the EndpointSlice controller made the slice, and when the change happened.
fn trigger(slice: &EndpointSlice) -> Option<(String, bool, SystemTime)> {
    let since = slice.annotations().get(CHANGE_TRIGGER)?.parse::<k8s_openapi::jiff::Timestamp>().ok()?;
    let service = slice.labels().get("kubernetes.io/service-name")?;
    let manager = slice.labels().get("endpointslice.kubernetes.io/managed-by").map(String::as_str);
    let since = UNIX_EPOCH.checked_add(Duration::from_nanos(u64::try_from(since.as_nanosecond()).ok()?))?;
    Some((format!("{service}.{}", slice.namespace()?), manager == Some("endpointslice-controller.k8s.io"), since))
}

/// Follows the published names into `target` for good; `synced` turns true after the first whole lists.
pub(crate) async fn follow_published(client: Client, target: Arc<ArcSwap<Published>>, synced: watch::Sender<bool>) {
    let any = watcher::Config::default;
    let streams = vec![stream(&client, any(), Change::Service), stream(&client, any(), Change::Ingress)];
    drop(client);
    let mut builder = PublishedBuilder::default();
    let (mut services, mut ingresses) = (Listing::default(), Listing::default());
    let mut changes = select_all(streams).ready_chunks(TOGETHER);
    while let Some(batch) = changes.next().await {
        let mut changed = false;
        for change in batch {
            changed |= match change {
                Change::Service(event) => match services.step(event) {
                    Step::Set(o) => builder.set_service(&o),
                    Step::Delete(o) => builder.delete_service(&o.namespace().unwrap_or_default(), &o.name_any()),
                    Step::Retain(seen) => builder.retain_services(&seen),
                    Step::Nothing => false,
                },
                Change::Ingress(event) => match ingresses.step(event) {
                    Step::Set(o) => builder.set_ingress(&o),
                    Step::Delete(o) => builder.delete_ingress(&o.namespace().unwrap_or_default(), &o.name_any()),
                    Step::Retain(seen) => builder.retain_ingresses(&seen),
                    Step::Nothing => false,
                },
                Change::Namespace(_) | Change::Slice(_) | Change::Pod(_) => false,
            };
        }
        let first = services.complete && ingresses.complete && !builder.current().synced;
        if first {
            builder.set_synced();
        }
        if changed {
            builder.touch(unix_seconds());
        }
        if changed || first {
            target.store(Arc::new(builder.current().clone()));
        }
        if first {
            synced.send_replace(true);
        }
    }
}
