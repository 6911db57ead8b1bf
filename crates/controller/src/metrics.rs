//! What the controllers measure, under the names that kube-controller-manager and kube-scheduler use.

use portolan_observe::Observer;
use prometheus_client::encoding::EncodeLabelSet;
use prometheus_client::metrics::counter::Counter;
use prometheus_client::metrics::family::{Family, MetricConstructor};
use prometheus_client::metrics::gauge::Gauge;
use prometheus_client::metrics::histogram::{Histogram, exponential_buckets};

/// Which work queue.
#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
pub(crate) struct QueueName {
    pub name: &'static str,
}

/// What a write to EndpointSlices did: `create`, `update` or `delete`.
#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
pub(crate) struct Operation {
    pub operation: &'static str,
}

/// How a sync or an attempt ended.
#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
pub(crate) struct Outcome {
    pub result: &'static str,
}

/// Whether a Service asks for topology hints (`Auto` or `Disabled`), and its trafficDistribution, empty without one.
#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
pub(crate) struct Hints {
    pub topology: &'static str,
    pub traffic_distribution: &'static str,
}

/// A trafficDistribution that Services have.
#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
pub(crate) struct Distribution {
    pub traffic_distribution: &'static str,
}

#[derive(Clone)]
pub(crate) struct Buckets(fn() -> Histogram);

impl MetricConstructor<Histogram> for Buckets {
    fn new_metric(&self) -> Histogram {
        (self.0)()
    }
}

/// 10 ns to 1000 s in powers of ten, as client-go's work queues measure.
fn queue_seconds() -> Histogram {
    Histogram::new(exponential_buckets(1e-8, 10.0, 12))
}

/// Counts of endpoints and slices in one sync.
fn counts() -> Histogram {
    Histogram::new(exponential_buckets(2.0, 2.0, 15))
}

/// All metrics of the controllers. Cloning shares them.
#[derive(Clone)]
pub(crate) struct Metrics {
    pub depth: Family<QueueName, Gauge>,
    pub adds: Family<QueueName, Counter>,
    pub retries: Family<QueueName, Counter>,
    pub queue_duration: Family<QueueName, Histogram, Buckets>,
    pub work_duration: Family<QueueName, Histogram, Buckets>,
    pub endpoints_added: Histogram,
    pub endpoints_removed: Histogram,
    pub endpoints_desired: Gauge,
    pub slices: Gauge,
    pub slices_desired: Gauge,
    pub slices_changed: Family<Hints, Histogram, Buckets>,
    pub distributions: Family<Distribution, Gauge>,
    // Upstream counters without the suffix `_total`; only a gauge keeps a name as it is.
    pub changes: Family<Operation, Gauge>,
    pub syncs: Family<Outcome, Gauge>,
    pub schedule_attempts: Family<Outcome, Counter>,
}

impl Default for Metrics {
    fn default() -> Metrics {
        Metrics {
            depth: Family::default(),
            adds: Family::default(),
            retries: Family::default(),
            queue_duration: Family::new_with_constructor(Buckets(queue_seconds)),
            work_duration: Family::new_with_constructor(Buckets(queue_seconds)),
            endpoints_added: counts(),
            endpoints_removed: counts(),
            endpoints_desired: Gauge::default(),
            slices: Gauge::default(),
            slices_desired: Gauge::default(),
            slices_changed: Family::new_with_constructor(Buckets(counts)),
            distributions: Family::default(),
            changes: Family::default(),
            syncs: Family::default(),
            schedule_attempts: Family::default(),
        }
    }
}

impl Metrics {
    /// Registers all of them.
    pub fn register(&self, observer: &Observer) {
        observer.register(|registry| {
            let queue = registry.sub_registry_with_prefix("workqueue");
            queue.register("depth", "Keys waiting in the work queue", self.depth.clone());
            queue.register("adds", "Keys added to the work queue", self.adds.clone());
            queue.register("retries", "Keys added again after a failure", self.retries.clone());
            queue.register(
                "queue_duration_seconds",
                "Seconds that a key waits before it is worked on",
                self.queue_duration.clone(),
            );
            queue.register("work_duration_seconds", "Seconds that working on a key takes", self.work_duration.clone());
            let slices = registry.sub_registry_with_prefix("endpoint_slice_controller");
            slices.register(
                "endpoints_added_per_sync",
                "Endpoints added by one sync of a Service",
                self.endpoints_added.clone(),
            );
            slices.register(
                "endpoints_removed_per_sync",
                "Endpoints removed by one sync of a Service",
                self.endpoints_removed.clone(),
            );
            slices.register("endpoints_desired", "Endpoints that should exist", self.endpoints_desired.clone());
            slices.register("num_endpoint_slices", "EndpointSlices that exist", self.slices.clone());
            slices.register(
                "desired_endpoint_slices",
                "EndpointSlices that would exist if they were packed perfectly",
                self.slices_desired.clone(),
            );
            slices.register(
                "endpointslices_changed_per_sync",
                "EndpointSlices written by one sync of a Service",
                self.slices_changed.clone(),
            );
            slices.register(
                "services_count_by_traffic_distribution",
                "Services with a selector by their trafficDistribution",
                self.distributions.clone(),
            );
            slices.register("changes", "Writes of EndpointSlices", self.changes.clone());
            slices.register("syncs", "Syncs of Services", self.syncs.clone());
            let scheduler = registry.sub_registry_with_prefix("scheduler");
            scheduler.register(
                "schedule_attempts",
                "Attempts to give a pod a node, by result",
                self.schedule_attempts.clone(),
            );
        });
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_are_those_of_upstream() {
        let observer = Observer::new();
        let metrics = Metrics::default();
        metrics.register(&observer);
        let name = QueueName { name: "endpoint_slice" };
        metrics.depth.get_or_create(&name).set(3);
        metrics.adds.get_or_create(&name).inc();
        metrics.retries.get_or_create(&name).inc();
        metrics.queue_duration.get_or_create(&name).observe(0.5);
        metrics.work_duration.get_or_create(&name).observe(0.5);
        metrics.changes.get_or_create(&Operation { operation: "create" }).inc();
        metrics.syncs.get_or_create(&Outcome { result: "success" }).inc();
        metrics.slices_changed.get_or_create(&Hints { topology: "Disabled", traffic_distribution: "" }).observe(1.0);
        metrics.distributions.get_or_create(&Distribution { traffic_distribution: "PreferSameZone" }).inc();
        metrics.schedule_attempts.get_or_create(&Outcome { result: "scheduled" }).inc();
        let text = observer.encode();
        for line in [
            "workqueue_depth{name=\"endpoint_slice\"} 3",
            "workqueue_adds_total{name=\"endpoint_slice\"} 1",
            "workqueue_retries_total{name=\"endpoint_slice\"} 1",
            "workqueue_queue_duration_seconds_count{name=\"endpoint_slice\"} 1",
            "workqueue_work_duration_seconds_sum{name=\"endpoint_slice\"} 0.5",
            "endpoint_slice_controller_endpoints_added_per_sync_count 0",
            "endpoint_slice_controller_endpoints_removed_per_sync_count 0",
            "endpoint_slice_controller_endpoints_desired 0",
            "endpoint_slice_controller_num_endpoint_slices 0",
            "endpoint_slice_controller_desired_endpoint_slices 0",
            "endpoint_slice_controller_endpointslices_changed_per_sync_count{topology=\"Disabled\",traffic_distribution=\"\"} 1",
            "endpoint_slice_controller_services_count_by_traffic_distribution{traffic_distribution=\"PreferSameZone\"} 1",
            "endpoint_slice_controller_changes{operation=\"create\"} 1",
            "endpoint_slice_controller_syncs{result=\"success\"} 1",
            "scheduler_schedule_attempts_total{result=\"scheduled\"} 1",
        ] {
            assert!(text.lines().any(|l| l == line), "{line} is not in\n{text}");
        }
    }
}
