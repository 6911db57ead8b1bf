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

/// What waits in the applier's mailbox.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Kind {
    /// Services.
    Service,
    /// EndpointSlices.
    Slice,
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
    endpoints_pending: Family<FamilyLabel, Gauge>,
    services_pending: Family<FamilyLabel, Gauge>,
    no_local: Family<PolicyLabel, Gauge>,
    sync_failures: Family<FamilyLabel, Counter>,
    cleanup_failures: Family<FamilyLabel, Counter>,
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
            endpoints_pending: Family::default(),
            services_pending: Family::default(),
            no_local: Family::default(),
            sync_failures: Family::default(),
            cleanup_failures: Family::default(),
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
        r.register(
            "kubeproxy_sync_proxy_rules_endpoint_changes_pending",
            "EndpointSlice changes that wait for a sync",
            m.endpoints_pending.clone(),
        );
        r.register(
            "kubeproxy_sync_proxy_rules_service_changes_pending",
            "Service changes that wait for a sync",
            m.services_pending.clone(),
        );
        r.register("kubeproxy_sync_proxy_rules_nftables_sync_failures", "Failed syncs", m.sync_failures.clone());
        r.register(
            "kubeproxy_sync_proxy_rules_nftables_cleanup_failures",
            "Times that chains which are not used any more could not be removed at once",
            m.cleanup_failures.clone(),
        );
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
            drop(m.cleanup_failures.get_or_create(&label));
            for gauge in [&m.endpoints_pending, &m.services_pending] {
                drop(gauge.get_or_create(&label));
            }
            for counter in [&m.endpoint_changes, &m.service_changes] {
                drop(counter.get_or_create(&label));
            }
        }
        m
    }

    /// Records that a change asks for a sync.
    pub(crate) fn queued(&self) {
        for family in IpFamily::ALL {
            self.last_queued.get_or_create(&FamilyLabel { ip_family: family.as_str() }).set(now());
        }
    }

    /// Records that more or fewer changes wait for a sync.
    pub(crate) fn waits(&self, kind: Kind, families: &[IpFamily], by: i64) {
        let gauge = match kind {
            Kind::Service => &self.services_pending,
            Kind::Slice => &self.endpoints_pending,
        };
        for family in families {
            gauge.get_or_create(&FamilyLabel { ip_family: family.as_str() }).inc_by(by);
        }
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

    /// Records a sync. `told` is what this agent has told so far, because several may count into one set of metrics.
    pub(crate) fn applied(&self, applied: &Applied<'_>, told: &mut Told) {
        for (families, counter) in
            [(&applied.slices, &self.endpoint_changes), (&applied.services, &self.service_changes)]
        {
            for family in families {
                counter.get_or_create(&FamilyLabel { ip_family: family.as_str() }).inc();
            }
        }
        for (index, family) in IpFamily::ALL.into_iter().enumerate() {
            let (internal, external) = applied.proxy.without_local_endpoints(family);
            let counts = [("internal", internal as i64), ("external", external as i64)];
            for ((traffic_policy, count), told) in counts.into_iter().zip(&mut told.without_local[index]) {
                let label = PolicyLabel { ip_family: family.as_str(), traffic_policy };
                self.no_local.get_or_create(&label).inc_by(count - *told);
                *told = count;
            }
        }
        for report in &applied.report.families {
            let label = FamilyLabel { ip_family: report.family.as_str() };
            let took = report.took.as_secs_f64();
            self.sync.get_or_create(&label).observe(took);
            if report.full { &self.sync_full } else { &self.sync_partial }.get_or_create(&label).observe(took);
            self.transactions.get_or_create(&label).inc_by(report.transactions as u64);
            match report.error {
                None => {
                    for (_, latency) in applied.latencies.iter().filter(|(f, _)| *f == report.family) {
                        self.programming.get_or_create(&label).observe(latency.as_secs_f64());
                    }
                }
                Some(_) => {
                    self.sync_failures.get_or_create(&label).inc();
                }
            }
        }
        for family in &applied.cleanup_failed {
            self.cleanup_failures.get_or_create(&FamilyLabel { ip_family: family.as_str() }).inc();
        }
        for family in IpFamily::ALL.into_iter().filter(|f| applied.proxy.in_step(*f)) {
            self.last.get_or_create(&FamilyLabel { ip_family: family.as_str() }).set(now());
        }
        if applied.healed {
            self.healed.inc();
        }
    }
}

/// What one agent has put into gauges that others count into as well.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Told {
    /// By family: internal and external.
    without_local: [[i64; 2]; 2],
}

fn now() -> f64 {
    SystemTime::now().duration_since(UNIX_EPOCH).map(|d| d.as_secs_f64()).unwrap_or_default()
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::{AtomicBool, Ordering};
    use std::sync::{Arc, mpsc};
    use std::time::Duration;

    use portolan_nft::{Element, Error, Executor, Fake, Op, Set, Table, Transaction};
    use portolan_observe::Observer;
    use portolan_plan::world::{NodeView, ObjectKey, SliceManifest};
    use serde_json::{Value, json};

    use super::*;
    use crate::applier::{self, Mailbox};
    use crate::proxy::{Change, ServiceProxy};
    use crate::watched::SliceChange;

    const DEADLINE: Duration = Duration::from_secs(20);

    /// Refuses on demand what it is given to do.
    struct Moody {
        fake: Fake,
        refuse: Arc<AtomicBool>,
        refuse_cleanup: Arc<AtomicBool>,
    }

    impl Executor for Moody {
        fn commit(&mut self, transaction: &Transaction) -> Result<(), Error> {
            let cleanup = transaction.ops.iter().any(|op| matches!(op, Op::DeleteChain { .. }));
            if self.refuse.load(Ordering::Relaxed) || cleanup && self.refuse_cleanup.load(Ordering::Relaxed) {
                return Err(Error::Text { message: "busy".into() });
            }
            self.fake.commit(transaction)
        }
        fn elements(&mut self, table: &Table, set: &Set) -> Result<Option<Vec<Element>>, Error> {
            self.fake.elements(table, set)
        }
        fn chains(&mut self, table: &Table) -> Result<Vec<String>, Error> {
            self.fake.chains(table)
        }
    }

    /// The sum of the series of a name whose labels contain `label`; `None` when there is none.
    fn value(observer: &Observer, name: &str, label: &str) -> Option<f64> {
        let text = observer.encode();
        let lines = text.lines().filter(|l| l.strip_prefix(name).is_some_and(|rest| rest.starts_with(['{', ' '])));
        let values: Vec<f64> =
            lines.filter(|l| l.contains(label)).filter_map(|l| l.rsplit(' ').next()?.parse().ok()).collect();
        (!values.is_empty()).then(|| values.iter().sum())
    }

    fn service(policy: &str) -> Change {
        let object = json!({
            "metadata": {"namespace": "ns", "name": "s"},
            "spec": {"clusterIP": "10.96.0.1", "internalTrafficPolicy": policy, "ports": [{"port": 80}]},
        });
        Change::service(&serde_json::from_value(object).unwrap())
    }

    fn slice(endpoints: usize, annotations: Value) -> SliceChange {
        let endpoints: Vec<Value> =
            (0..endpoints).map(|i| json!({"addresses": [format!("10.244.0.{}", i + 1)]})).collect();
        let manifest: SliceManifest = serde_json::from_value(json!({
            "metadata": {"namespace": "ns", "name": "s-1", "labels": {"kubernetes.io/service-name": "s"}, "annotations": annotations},
            "addressType": "IPv4", "ports": [{"name": "", "port": 8080}], "endpoints": endpoints,
        }))
        .unwrap();
        SliceChange::from(&manifest)
    }

    #[test]
    fn each_metric_is_moved_by_what_it_says() {
        let observer = Observer::new();
        let metrics = observer.register(Metrics::register);
        let mailbox = Mailbox::counted(metrics.clone());
        let (refuse, refuse_cleanup) = (Arc::new(AtomicBool::new(false)), Arc::new(AtomicBool::new(false)));
        let moody = Moody { fake: Fake::default(), refuse: refuse.clone(), refuse_cleanup: refuse_cleanup.clone() };
        let proxy =
            ServiceProxy::with_executor(Box::new(moody), None, NodeView { name: "n1".into(), ..NodeView::default() });
        let (sender, synced) = mpsc::channel();
        let applier = std::thread::spawn({
            let (mailbox, metrics) = (mailbox.clone(), metrics.clone());
            move || {
                let mut told = Told::default();
                applier::run(proxy, &mailbox, |applied| {
                    metrics.applied(&applied, &mut told);
                    let _ = sender.send(applied.report.is_ok());
                });
            }
        });
        let v4 = |name: &str| value(&observer, &format!("kubeproxy_{name}"), "IPv4");
        let put_service = |policy: &str| match service(policy) {
            Change::Service(key, service) => mailbox.service(key, service),
            other => panic!("{other:?}"),
        };
        let key = ObjectKey::new("ns", "s-1");
        let next = || synced.recv_timeout(DEADLINE).unwrap();

        // Pending until the lists are complete; another state of the same object is no second change.
        put_service("Cluster");
        put_service("Cluster");
        mailbox.slice(key.clone(), slice(1, Value::Null));
        assert_eq!(v4("sync_proxy_rules_service_changes_pending"), Some(1.0));
        assert_eq!(v4("sync_proxy_rules_endpoint_changes_pending"), Some(1.0));
        assert_eq!(value(&observer, "kubeproxy_sync_proxy_rules_endpoint_changes_pending", "IPv6"), Some(0.0));
        assert!(v4("sync_proxy_rules_last_queued_timestamp_seconds").unwrap() > 1e9);
        assert_eq!(v4("sync_proxy_rules_last_timestamp_seconds"), None);
        mailbox.services_listed();
        mailbox.slices_listed();
        mailbox.node_listed();
        mailbox.pods_listed();
        assert!(next());
        assert_eq!(v4("sync_proxy_rules_service_changes_pending"), Some(0.0));
        assert_eq!(v4("sync_proxy_rules_endpoint_changes_pending"), Some(0.0));
        assert_eq!(v4("sync_proxy_rules_service_changes_total"), Some(1.0));
        assert_eq!(v4("sync_proxy_rules_endpoint_changes_total"), Some(1.0));
        assert!(v4("sync_proxy_rules_last_timestamp_seconds").unwrap() > 1e9);
        assert_eq!(v4("sync_full_proxy_rules_duration_seconds_count"), Some(1.0));
        assert_eq!(v4("sync_partial_proxy_rules_duration_seconds_count"), Some(0.0));
        assert_eq!(v4("sync_proxy_rules_duration_seconds_count"), Some(1.0));
        assert_eq!(v4("network_programming_duration_seconds_count"), Some(0.0));

        // A change with the time of its cause, incrementally.
        let trigger = json!({"endpoints.kubernetes.io/last-change-trigger-time": "2026-01-01T00:00:00Z"});
        mailbox.slice(key.clone(), slice(2, trigger));
        assert!(next());
        assert_eq!(v4("sync_partial_proxy_rules_duration_seconds_count"), Some(1.0));
        assert_eq!(v4("sync_full_proxy_rules_duration_seconds_count"), Some(1.0));
        assert_eq!(v4("network_programming_duration_seconds_count"), Some(1.0));
        assert!(v4("network_programming_duration_seconds_sum").unwrap() > 0.0);

        // No endpoint of the Service is on this node.
        let no_local = |policy: &str| {
            value(
                &observer,
                "kubeproxy_sync_proxy_rules_no_local_endpoints_total",
                &format!("\"IPv4\",traffic_policy=\"{policy}\""),
            )
        };
        assert_eq!((no_local("internal"), no_local("external")), (Some(0.0), Some(0.0)));
        put_service("Local");
        assert!(next());
        assert_eq!((no_local("internal"), no_local("external")), (Some(1.0), Some(0.0)));

        // A kernel that refuses: a failure is counted and the last success stays.
        refuse.store(true, Ordering::Relaxed);
        let before = v4("sync_proxy_rules_last_timestamp_seconds");
        assert_eq!(v4("sync_proxy_rules_nftables_sync_failures_total"), Some(0.0));
        put_service("Cluster");
        assert!(!next());
        assert_eq!(v4("sync_proxy_rules_nftables_sync_failures_total"), Some(1.0));
        assert_eq!(v4("sync_proxy_rules_last_timestamp_seconds"), before);
        refuse.store(false, Ordering::Relaxed);
        while !next() {}

        // Chains that are not used any more and cannot be removed.
        assert_eq!(v4("sync_proxy_rules_nftables_cleanup_failures_total"), Some(0.0));
        mailbox.slice(key, slice(3, Value::Null));
        assert!(next());
        refuse_cleanup.store(true, Ordering::Relaxed);
        mailbox.interfered();
        let start = std::time::Instant::now();
        while v4("sync_proxy_rules_nftables_cleanup_failures_total") == Some(0.0) {
            assert!(next() && start.elapsed() < DEADLINE);
        }
        assert_eq!(value(&observer, "portolan_dataplane_healed_total", ""), Some(1.0));

        metrics.looked(Look { deleted: 3, took: Duration::from_millis(1) });
        assert_eq!(value(&observer, "kubeproxy_conntrack_reconciler_deleted_entries_total", ""), Some(3.0));
        assert_eq!(value(&observer, "kubeproxy_conntrack_reconciler_sync_duration_seconds_count", ""), Some(1.0));
        metrics.health_checked(false, 503);
        metrics.health_checked(true, 200);
        assert_eq!(value(&observer, "kubeproxy_proxy_healthz_total", "503"), Some(1.0));
        assert_eq!(value(&observer, "kubeproxy_proxy_livez_total", "200"), Some(1.0));
        mailbox.close();
        applier.join().unwrap();
    }
}
