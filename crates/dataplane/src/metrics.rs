//! Metrics under the names that dashboards for kube-proxy use, and some of our own.

use std::sync::atomic::AtomicU64;
use std::time::{SystemTime, UNIX_EPOCH};

use portolan_plan::world::IpFamily;
use prometheus_client::encoding::EncodeLabelSet;
use prometheus_client::metrics::counter::Counter;
use prometheus_client::metrics::family::Family;
use prometheus_client::metrics::gauge::Gauge;
use prometheus_client::metrics::histogram::{Histogram, exponential_buckets};
use prometheus_client::registry::Registry;

use crate::applier::Applied;
use crate::conntrack::Look;

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct FamilyLabel {
    ip_family: &'static str,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct PolicyLabel {
    ip_family: &'static str,
    traffic_policy: &'static str,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct CodeLabel {
    code: u16,
}

type Histograms = Family<FamilyLabel, Histogram, fn() -> Histogram>;
type Seconds = Gauge<f64, AtomicU64>;

/// The metrics of one service proxy. Cloning is cheap.
#[derive(Clone, Debug)]
pub struct Metrics {
    sync: Histograms,
    sync_full: Histograms,
    sync_partial: Histograms,
    programming: Histograms,
    last: Family<FamilyLabel, Seconds>,
    last_queued: Family<FamilyLabel, Seconds>,
    endpoint_changes: Family<FamilyLabel, Counter>,
    service_changes: Family<FamilyLabel, Counter>,
    no_local: Family<PolicyLabel, Gauge>,
    sync_failures: Family<FamilyLabel, Counter>,
    conntrack_duration: Histogram,
    conntrack_deleted: Counter,
    transactions: Family<FamilyLabel, Counter>,
    healed: Counter,
    healthz: Family<CodeLabel, Counter>,
    livez: Family<CodeLabel, Counter>,
}

fn sync_histogram() -> Histogram {
    Histogram::new(exponential_buckets(0.000_1, 2.0, 18)) // 0.1 ms to 13 s: our syncs and kube-proxy's.
}

/// kube-proxy's buckets for programming latency, with finer ones below, where ours lie.
fn programming_histogram() -> Histogram {
    Histogram::new(
        [0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5]
            .into_iter()
            .chain((1..=60).map(f64::from))
            .chain((65..=120).step_by(5).map(f64::from))
            .chain((150..=300).step_by(30).map(f64::from)),
    )
}

impl Metrics {
    /// Registers the metrics.
    pub fn register(registry: &mut Registry) -> Metrics {
        let sync_family = || Histograms::new_with_constructor(sync_histogram as fn() -> Histogram);
        let m = Metrics {
            sync: sync_family(),
            sync_full: sync_family(),
            sync_partial: sync_family(),
            programming: Histograms::new_with_constructor(programming_histogram as fn() -> Histogram),
            last: Family::default(),
            last_queued: Family::default(),
            endpoint_changes: Family::default(),
            service_changes: Family::default(),
            no_local: Family::default(),
            sync_failures: Family::default(),
            conntrack_duration: sync_histogram(),
            conntrack_deleted: Counter::default(),
            transactions: Family::default(),
            healed: Counter::default(),
            healthz: Family::default(),
            livez: Family::default(),
        };
        let r = registry;
        r.register("kubeproxy_sync_proxy_rules_duration_seconds", "Time of a sync", m.sync.clone());
        r.register(
            "kubeproxy_sync_full_proxy_rules_duration_seconds",
            "Time of a sync that compared everything",
            m.sync_full.clone(),
        );
        r.register(
            "kubeproxy_sync_partial_proxy_rules_duration_seconds",
            "Time of a sync of changed Services",
            m.sync_partial.clone(),
        );
        r.register(
            "kubeproxy_network_programming_duration_seconds",
            "From the change of an endpoint to its rules",
            m.programming.clone(),
        );
        r.register("kubeproxy_sync_proxy_rules_last_timestamp_seconds", "Last successful sync", m.last.clone());
        r.register(
            "kubeproxy_sync_proxy_rules_last_queued_timestamp_seconds",
            "Last change that asked for a sync",
            m.last_queued.clone(),
        );
        r.register("kubeproxy_sync_proxy_rules_endpoint_changes", "EndpointSlice changes", m.endpoint_changes.clone());
        r.register("kubeproxy_sync_proxy_rules_service_changes", "Service changes", m.service_changes.clone());
        r.register(
            "kubeproxy_sync_proxy_rules_no_local_endpoints_total",
            "Service ports whose Local policy leaves this node without an endpoint",
            m.no_local.clone(),
        );
        r.register("kubeproxy_sync_proxy_rules_nftables_sync_failures", "Failed syncs", m.sync_failures.clone());
        r.register(
            "kubeproxy_conntrack_reconciler_sync_duration_seconds",
            "Time of a look at UDP flows",
            m.conntrack_duration.clone(),
        );
        r.register("kubeproxy_conntrack_reconciler_deleted_entries", "UDP flows removed", m.conntrack_deleted.clone());
        r.register("portolan_dataplane_transactions", "Transactions given to the kernel", m.transactions.clone());
        r.register(
            "portolan_dataplane_healed",
            "Times that the table was put right after interference",
            m.healed.clone(),
        );
        r.register("kubeproxy_proxy_healthz", "Answers of the proxy's /healthz", m.healthz.clone());
        r.register("kubeproxy_proxy_livez", "Answers of the proxy's /livez", m.livez.clone());
        // Zero is something to see; a series that is not there yet breaks rates and alerts.
        for family in IpFamily::ALL {
            let label = FamilyLabel { ip_family: family.as_str() };
            drop(m.programming.get_or_create(&label));
            drop(m.sync_partial.get_or_create(&label));
            drop(m.sync_failures.get_or_create(&label));
        }
        m
    }

    /// Records a look at UDP flows.
    pub(crate) fn looked(&self, look: Look) {
        self.conntrack_duration.observe(look.took.as_secs_f64());
        self.conntrack_deleted.inc_by(look.deleted as u64);
    }

    /// Records an answer of the proxy's own health check.
    pub(crate) fn health_checked(&self, live: bool, code: u16) {
        let family = if live { &self.livez } else { &self.healthz };
        family.get_or_create(&CodeLabel { code }).inc();
    }

    /// Records a sync.
    pub(crate) fn applied(&self, applied: &Applied<'_>) {
        let now = SystemTime::now().duration_since(UNIX_EPOCH).map(|d| d.as_secs_f64()).unwrap_or_default();
        for family in IpFamily::ALL {
            let label = FamilyLabel { ip_family: family.as_str() };
            self.endpoint_changes.get_or_create(&label).inc_by(applied.slices as u64);
            self.service_changes.get_or_create(&label).inc_by(applied.services as u64);
            let (internal, external) = applied.proxy.without_local_endpoints(family);
            for (traffic_policy, count) in [("internal", internal), ("external", external)] {
                let label = PolicyLabel { ip_family: family.as_str(), traffic_policy };
                self.no_local.get_or_create(&label).set(count as i64);
            }
        }
        for report in &applied.report.families {
            let label = FamilyLabel { ip_family: report.family.as_str() };
            let took = report.took.as_secs_f64();
            self.sync.get_or_create(&label).observe(took);
            if report.full { &self.sync_full } else { &self.sync_partial }.get_or_create(&label).observe(took);
            self.last_queued.get_or_create(&label).set(now);
            self.transactions.get_or_create(&label).inc_by(report.transactions as u64);
            match report.error {
                None => {
                    self.last.get_or_create(&label).set(now);
                    for latency in &applied.latencies {
                        self.programming.get_or_create(&label).observe(latency.as_secs_f64());
                    }
                }
                Some(_) => {
                    self.sync_failures.get_or_create(&label).inc();
                }
            }
        }
        if applied.healed {
            self.healed.inc();
        }
    }
}
