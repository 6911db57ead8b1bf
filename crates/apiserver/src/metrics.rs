//! Metrics under the names that dashboards of kube-apiserver use.

use portolan_observe::Observer;
use prometheus_client::encoding::EncodeLabelSet;
use prometheus_client::metrics::counter::Counter;
use prometheus_client::metrics::family::Family;
use prometheus_client::metrics::gauge::Gauge;
use prometheus_client::metrics::histogram::Histogram;

/// What a request was about.
#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
pub struct RequestLabels {
    /// Verb in upper case, as in `LIST`.
    pub verb: String,
    /// Resource, empty for other paths.
    pub resource: String,
    /// Status code.
    pub code: u16,
}

/// What a time or a number is about.
#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
pub struct VerbLabels {
    /// Verb in upper case.
    pub verb: String,
    /// Resource, empty for other paths.
    pub resource: String,
}

/// A resource.
#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
pub struct ResourceLabels {
    /// Resource with its group.
    pub resource: String,
}

/// The metrics of the server.
#[derive(Clone)]
pub struct Metrics {
    /// Requests answered.
    pub requests: Family<RequestLabels, Counter>,
    /// Time to the answer, without that of watches and streams.
    pub duration: Family<VerbLabels, Histogram>,
    /// Watches and streams that are open.
    pub longrunning: Family<VerbLabels, Gauge>,
    /// Events sent to watchers.
    pub watch_events: Family<ResourceLabels, Counter>,
    /// Objects stored.
    pub objects: Family<ResourceLabels, Gauge>,
}

impl Metrics {
    /// Registers the metrics.
    pub fn register(observer: &Observer) -> Metrics {
        // From a cached read to a write that waits for a slow disk.
        const BUCKETS: [f64; 12] = [0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 10.0];
        let metrics = Metrics {
            requests: Family::default(),
            duration: Family::new_with_constructor(|| Histogram::new(BUCKETS)),
            longrunning: Family::default(),
            watch_events: Family::default(),
            objects: Family::default(),
        };
        let copy = metrics.clone();
        observer.register(move |registry| {
            registry.register("apiserver_request", "Requests answered", copy.requests);
            registry.register("apiserver_request_duration_seconds", "Time to the answer", copy.duration);
            registry.register("apiserver_longrunning_requests", "Open watches and streams", copy.longrunning);
            registry.register("apiserver_watch_events", "Events sent to watchers", copy.watch_events);
            registry.register("apiserver_storage_objects", "Objects stored", copy.objects);
        });
        metrics
    }
}
