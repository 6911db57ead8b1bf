//! Metrics under ingress-nginx's names, so that its dashboards and alerts go on working.
//!
//! Each rule has one set of counters per worker; a scrape adds them up. Counters live as long as some snapshot has the rule, so
//! series of deleted Ingresses disappear.

use std::collections::{BTreeMap, HashMap};
use std::fmt;
use std::sync::atomic::{AtomicBool, AtomicI64, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, Weak};
use std::time::Duration;

use portolan_plan::route::RouteTable;
use portolan_plan::world::ObjectKey;
use prometheus_client::collector::Collector;
use prometheus_client::encoding::{DescriptorEncoder, EncodeMetric, MetricEncoder, NoLabelSet};
use prometheus_client::metrics::MetricType;

/// Upper bounds of durations, in seconds.
const TIMES: [f64; 11] = [0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0];
/// Upper bounds of sizes, in bytes.
const SIZES: [f64; 10] = [10.0, 20.0, 30.0, 40.0, 50.0, 60.0, 70.0, 80.0, 90.0, 100.0];

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(|poisoned| poisoned.into_inner())
}

/// What identifies the series of a rule.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
struct RuleKey {
    namespace: String,
    ingress: String,
    service: String,
    host: String,
    path: String,
}

/// The counters of one rule.
pub(crate) struct RuleStats {
    key: RuleKey,
    shards: Box<[Mutex<Vec<Cell>>]>,
}

/// The counters of one rule, status and method.
#[derive(Clone)]
struct Cell {
    status: u16,
    method: &'static str,
    requests: u64,
    request_time: Histogram<11>,
    response_time: Histogram<11>,
    header_time: Histogram<11>,
    connect_time: Histogram<11>,
    request_size: Histogram<10>,
    response_size: Histogram<10>,
}

#[derive(Clone)]
struct Histogram<const N: usize> {
    counts: [u64; N],
    count: u64,
    sum: f64,
}

impl<const N: usize> Default for Histogram<N> {
    fn default() -> Self {
        Histogram { counts: [0; N], count: 0, sum: 0.0 }
    }
}

impl<const N: usize> Histogram<N> {
    fn observe(&mut self, value: f64, bounds: &[f64; N]) {
        self.count += 1;
        self.sum += value;
        if let Some(bucket) = bounds.iter().position(|b| value <= *b) {
            self.counts[bucket] += 1;
        }
    }

    fn add(&mut self, other: &Self) {
        self.count += other.count;
        self.sum += other.sum;
        for (into, from) in self.counts.iter_mut().zip(other.counts) {
            *into += from;
        }
    }

    fn encode(&self, bounds: &[f64; N], encoder: &mut MetricEncoder) -> fmt::Result {
        let rest = self.count - self.counts.iter().sum::<u64>();
        let buckets: Vec<(f64, u64)> = bounds.iter().copied().zip(self.counts).chain([(f64::MAX, rest)]).collect();
        encoder.encode_histogram::<NoLabelSet>(self.sum, self.count, &buckets, None)
    }
}

/// One finished request.
pub(crate) struct Observation {
    pub status: u16,
    pub method: &'static str,
    pub request_bytes: u64,
    pub response_bytes: u64,
    pub request_time: Duration,
    pub connect_time: Option<Duration>,
    pub header_time: Option<Duration>,
    pub response_time: Option<Duration>,
}

impl RuleStats {
    /// Counts a request on one worker. The lock is never contended except by a scrape.
    pub fn record(&self, worker: usize, seen: &Observation) {
        let mut cells = lock(&self.shards[worker]);
        let found = cells.iter().position(|c| c.status == seen.status && c.method == seen.method);
        let index = found.unwrap_or_else(|| {
            cells.push(Cell::new(seen.status, seen.method));
            cells.len() - 1
        });
        let cell = &mut cells[index];
        cell.requests += 1;
        cell.request_time.observe(seen.request_time.as_secs_f64(), &TIMES);
        cell.request_size.observe(seen.request_bytes as f64, &SIZES);
        cell.response_size.observe(seen.response_bytes as f64, &SIZES);
        for (time, histogram) in [
            (seen.connect_time, &mut cell.connect_time),
            (seen.header_time, &mut cell.header_time),
            (seen.response_time, &mut cell.response_time),
        ] {
            if let Some(time) = time {
                histogram.observe(time.as_secs_f64(), &TIMES);
            }
        }
    }

    fn total(&self) -> BTreeMap<(u16, &'static str), Cell> {
        let mut total: BTreeMap<(u16, &'static str), Cell> = BTreeMap::new();
        for shard in &self.shards {
            for cell in lock(shard).iter() {
                total
                    .entry((cell.status, cell.method))
                    .or_insert_with(|| Cell::new(cell.status, cell.method))
                    .add(cell);
            }
        }
        total
    }
}

impl Cell {
    fn new(status: u16, method: &'static str) -> Cell {
        Cell {
            status,
            method,
            requests: 0,
            request_time: Histogram::default(),
            response_time: Histogram::default(),
            header_time: Histogram::default(),
            connect_time: Histogram::default(),
            request_size: Histogram::default(),
            response_size: Histogram::default(),
        }
    }

    fn add(&mut self, other: &Cell) {
        self.requests += other.requests;
        self.request_time.add(&other.request_time);
        self.response_time.add(&other.response_time);
        self.header_time.add(&other.header_time);
        self.connect_time.add(&other.connect_time);
        self.request_size.add(&other.request_size);
        self.response_size.add(&other.response_size);
    }
}

/// Labels that every series has.
#[derive(Clone, Debug, Default)]
pub struct ConstLabels {
    /// `controller_class`
    pub class: String,
    /// `controller_namespace`
    pub namespace: String,
    /// `controller_pod`
    pub pod: String,
}

/// All metrics of a gateway. Cloning is cheap.
#[derive(Clone)]
pub struct Registry {
    inner: Arc<Inner>,
}

struct Inner {
    labels: Vec<(&'static str, String)>,
    workers: usize,
    rules: Mutex<HashMap<RuleKey, Weak<RuleStats>>>,
    /// Connections by state and in total, requests in total.
    pub connections: AtomicI64,
    pub busy: AtomicI64,
    pub accepted: AtomicU64,
    pub requests: AtomicU64,
    builds: AtomicU64,
    failed_builds: AtomicU64,
    last_build: AtomicI64,
    config_hash: AtomicU64,
    leader: AtomicBool,
    certificates: Mutex<Vec<(String, ObjectKey, i64)>>,
    orphans: Mutex<Vec<(ObjectKey, &'static str)>>,
}

impl fmt::Debug for Registry {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Registry").finish_non_exhaustive()
    }
}

impl Registry {
    /// Empty metrics for so many workers.
    pub fn new(workers: usize, labels: ConstLabels) -> Registry {
        Registry {
            inner: Arc::new(Inner {
                labels: vec![
                    ("controller_class", labels.class),
                    ("controller_namespace", labels.namespace),
                    ("controller_pod", labels.pod),
                ],
                workers,
                rules: Mutex::default(),
                connections: AtomicI64::new(0),
                busy: AtomicI64::new(0),
                accepted: AtomicU64::new(0),
                requests: AtomicU64::new(0),
                builds: AtomicU64::new(0),
                failed_builds: AtomicU64::new(0),
                last_build: AtomicI64::new(0),
                config_hash: AtomicU64::new(0),
                leader: AtomicBool::new(false),
                certificates: Mutex::default(),
                orphans: Mutex::default(),
            }),
        }
    }

    /// The counters of each rule of a table, those of before where the rule is the same.
    pub(crate) fn stats(&self, table: &RouteTable) -> Vec<Arc<RuleStats>> {
        let mut rules = lock(&self.inner.rules);
        let stats = table
            .rules
            .iter()
            .map(|rule| {
                let key = RuleKey {
                    namespace: rule.ingress.namespace.clone(),
                    ingress: rule.ingress.name.clone(),
                    service: table.upstreams[rule.upstream.0].service.name.clone(),
                    host: if rule.host.is_empty() { "_".into() } else { rule.host.clone() },
                    path: rule.path.clone(),
                };
                if let Some(stats) = rules.get(&key).and_then(Weak::upgrade) {
                    return stats;
                }
                let stats = Arc::new(RuleStats {
                    key: key.clone(),
                    shards: (0..self.inner.workers).map(|_| Mutex::default()).collect(),
                });
                rules.insert(key, Arc::downgrade(&stats));
                stats
            })
            .collect();
        rules.retain(|_, stats| stats.strong_count() > 0);
        stats
    }

    pub(crate) fn connection(&self, opened: bool) {
        if opened {
            self.inner.accepted.fetch_add(1, Ordering::Relaxed);
        }
        self.inner.connections.fetch_add(if opened { 1 } else { -1 }, Ordering::Relaxed);
    }

    pub(crate) fn request(&self, begun: bool) {
        if begun {
            self.inner.requests.fetch_add(1, Ordering::Relaxed);
        }
        self.inner.busy.fetch_add(if begun { 1 } else { -1 }, Ordering::Relaxed);
    }

    /// A snapshot was published; `now` in seconds since 1970.
    pub(crate) fn built(&self, hash: u64, now: i64) {
        self.inner.builds.fetch_add(1, Ordering::Relaxed);
        self.inner.config_hash.store(hash, Ordering::Relaxed);
        self.inner.last_build.store(now, Ordering::Relaxed);
    }

    pub(crate) fn set_leader(&self, leads: bool) {
        self.inner.leader.store(leads, Ordering::Relaxed);
    }

    /// Hosts with their certificates and when those expire, in seconds since 1970.
    pub(crate) fn set_certificates(&self, certificates: Vec<(String, ObjectKey, i64)>) {
        *lock(&self.inner.certificates) = certificates;
    }

    /// Ingresses whose backend does not exist (`no-service`) or has no endpoint (`no-endpoint`).
    pub(crate) fn set_orphans(&self, orphans: Vec<(ObjectKey, &'static str)>) {
        *lock(&self.inner.orphans) = orphans;
    }
}

/// A number under a name without the suffix that a counter would get: ingress-nginx's names have none.
struct Number(f64);

impl EncodeMetric for Number {
    fn encode(&self, mut encoder: MetricEncoder) -> fmt::Result {
        encoder.encode_gauge(&self.0)
    }

    fn metric_type(&self) -> MetricType {
        MetricType::Gauge
    }
}

type Labels<'a> = Vec<(&'a str, &'a str)>;

impl Collector for Registry {
    fn encode(&self, mut encoder: DescriptorEncoder) -> fmt::Result {
        let inner = &*self.inner;
        let common: Labels = inner.labels.iter().map(|(k, v)| (*k, v.as_str())).collect();
        let numbers =
            |encoder: &mut DescriptorEncoder, name: &str, help: &str, series: &[(Labels, f64)]| -> fmt::Result {
                if series.is_empty() {
                    return Ok(());
                }
                let name = format!("nginx_ingress_controller_{name}");
                let mut family = encoder.encode_descriptor(&name, help, None, MetricType::Gauge)?;
                for (labels, value) in series {
                    let labels: Labels = common.iter().chain(labels).copied().collect();
                    Number(*value).encode(family.encode_family(&labels)?)?;
                }
                Ok(())
            };
        let get = |value: &AtomicU64| value.load(Ordering::Relaxed) as f64;
        let rules: Vec<Arc<RuleStats>> = lock(&inner.rules).values().filter_map(Weak::upgrade).collect();
        let mut series: Vec<(&RuleKey, u16, &'static str, Cell)> = Vec::new();
        for rule in &rules {
            series.extend(rule.total().into_iter().map(|((status, method), cell)| (&rule.key, status, method, cell)));
        }
        series.sort_by(|a, b| (a.0, a.1, a.2).cmp(&(b.0, b.1, b.2)));
        let statuses: Vec<String> = series.iter().map(|s| s.1.to_string()).collect();
        let labels: Vec<Labels> = series
            .iter()
            .zip(&statuses)
            .map(|((key, _, method, _), status)| {
                vec![
                    ("namespace", key.namespace.as_str()),
                    ("ingress", &key.ingress),
                    ("service", &key.service),
                    ("host", &key.host),
                    ("path", &key.path),
                    ("method", method),
                    ("status", status),
                    ("canary", ""),
                ]
            })
            .collect();
        let requests: Vec<(Labels, f64)> =
            labels.iter().cloned().zip(series.iter().map(|s| s.3.requests as f64)).collect();
        numbers(&mut encoder, "requests", "Requests", &requests)?;

        let histograms = |encoder: &mut DescriptorEncoder,
                          name: &str,
                          help: &str,
                          one: &dyn Fn(&Cell, &mut MetricEncoder) -> fmt::Result|
         -> fmt::Result {
            if series.is_empty() {
                return Ok(());
            }
            let name = format!("nginx_ingress_controller_{name}");
            let mut family = encoder.encode_descriptor(&name, help, None, MetricType::Histogram)?;
            for ((_, _, _, cell), labels) in series.iter().zip(&labels) {
                let labels: Labels = common.iter().chain(labels).copied().collect();
                one(cell, &mut family.encode_family(&labels)?)?;
            }
            Ok(())
        };
        let times = "Seconds";
        histograms(&mut encoder, "request_duration_seconds", times, &|c, e| c.request_time.encode(&TIMES, e))?;
        histograms(&mut encoder, "response_duration_seconds", times, &|c, e| c.response_time.encode(&TIMES, e))?;
        histograms(&mut encoder, "header_duration_seconds", times, &|c, e| c.header_time.encode(&TIMES, e))?;
        histograms(&mut encoder, "connect_duration_seconds", times, &|c, e| c.connect_time.encode(&TIMES, e))?;
        histograms(&mut encoder, "request_size", "Bytes", &|c, e| c.request_size.encode(&SIZES, e))?;
        histograms(&mut encoder, "response_size", "Bytes", &|c, e| c.response_size.encode(&SIZES, e))?;

        let connections = inner.connections.load(Ordering::Relaxed).max(0) as f64;
        let busy = (inner.busy.load(Ordering::Relaxed).max(0) as f64).min(connections);
        numbers(
            &mut encoder,
            "nginx_process_connections",
            "Client connections by state",
            &[
                (vec![("state", "active")], connections),
                (vec![("state", "reading")], 0.0),
                (vec![("state", "writing")], busy),
                (vec![("state", "waiting")], connections - busy),
            ],
        )?;
        numbers(
            &mut encoder,
            "nginx_process_connections_total",
            "Client connections",
            &[(vec![("state", "accepted")], get(&inner.accepted)), (vec![("state", "handled")], get(&inner.accepted))],
        )?;
        numbers(&mut encoder, "nginx_process_requests_total", "Client requests", &[(vec![], get(&inner.requests))])?;
        if let Some(bytes) = resident_bytes() {
            numbers(&mut encoder, "nginx_process_resident_memory_bytes", "Resident memory", &[(vec![], bytes)])?;
        }
        numbers(&mut encoder, "config_hash", "Hash of the routes", &[(vec![], get(&inner.config_hash))])?;
        let built = inner.last_build.load(Ordering::Relaxed);
        numbers(
            &mut encoder,
            "config_last_reload_successful",
            "Whether the last routes were applied",
            &[(vec![], f64::from(u8::from(built != 0)))],
        )?;
        numbers(
            &mut encoder,
            "config_last_reload_successful_timestamp_seconds",
            "When routes were last applied",
            &[(vec![], built as f64)],
        )?;
        numbers(&mut encoder, "success", "Routes applied", &[(vec![], get(&inner.builds))])?;
        numbers(&mut encoder, "errors", "Routes not applied", &[(vec![], get(&inner.failed_builds))])?;
        let leads = f64::from(u8::from(inner.leader.load(Ordering::Relaxed)));
        numbers(
            &mut encoder,
            "leader_election_status",
            "Whether this replica leads",
            &[(vec![("name", "ingress-controller-leader")], leads)],
        )?;
        let certificates = lock(&inner.certificates);
        let expiry: Vec<(Labels, f64)> = certificates
            .iter()
            .map(|(host, secret, at)| {
                (
                    vec![
                        ("host", host.as_str()),
                        ("namespace", secret.namespace.as_str()),
                        ("secret_name", secret.name.as_str()),
                    ],
                    *at as f64,
                )
            })
            .collect();
        numbers(&mut encoder, "ssl_expire_time_seconds", "When a certificate expires", &expiry)?;
        let orphans = lock(&inner.orphans);
        let orphans: Vec<(Labels, f64)> = orphans
            .iter()
            .map(|(key, kind)| {
                (vec![("namespace", key.namespace.as_str()), ("ingress", key.name.as_str()), ("type", *kind)], 1.0)
            })
            .collect();
        numbers(&mut encoder, "orphan_ingress", "Ingresses without a usable backend", &orphans)?;
        numbers(
            &mut encoder,
            "build_info",
            "Version",
            &[(
                vec![
                    ("release", env!("CARGO_PKG_VERSION")),
                    ("build", "portolan"),
                    ("repository", env!("CARGO_PKG_REPOSITORY")),
                ],
                1.0,
            )],
        )
    }
}

fn resident_bytes() -> Option<f64> {
    let text = std::fs::read_to_string("/proc/self/status").ok()?;
    let line = text.lines().find(|l| l.starts_with("VmRSS:"))?;
    let kibibytes: f64 = line.split_ascii_whitespace().nth(1)?.parse().ok()?;
    Some(kibibytes * 1024.0)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn histograms_count_up_to_their_bounds() {
        let mut histogram = Histogram::<11>::default();
        for value in [0.005, 0.0051, 20.0] {
            histogram.observe(value, &TIMES);
        }
        assert_eq!((histogram.counts[0], histogram.counts[1], histogram.count), (1, 1, 3));
        let mut sum = histogram.clone();
        sum.add(&histogram);
        assert_eq!((sum.counts[0], sum.count), (2, 6));
    }

    #[test]
    fn names_are_those_of_ingress_nginx() {
        let registry = Registry::new(1, ConstLabels { class: "k8s.io/ingress-nginx".into(), ..Default::default() });
        let observer = portolan_observe::Observer::new();
        observer.register(|r| r.register_collector(Box::new(registry.clone())));
        let stats = RuleStats {
            key: RuleKey {
                namespace: "ns".into(),
                ingress: "i".into(),
                service: "s".into(),
                host: "h".into(),
                path: "/".into(),
            },
            shards: Box::new([Mutex::default()]),
        };
        let stats = Arc::new(stats);
        lock(&registry.inner.rules).insert(stats.key.clone(), Arc::downgrade(&stats));
        stats.record(
            0,
            &Observation {
                status: 200,
                method: "GET",
                request_bytes: 15,
                response_bytes: 1000,
                request_time: Duration::from_millis(7),
                connect_time: None,
                header_time: Some(Duration::from_millis(6)),
                response_time: Some(Duration::from_millis(6)),
            },
        );
        let text = observer.encode();
        for line in [
            "nginx_ingress_controller_requests{controller_class=\"k8s.io/ingress-nginx\",controller_namespace=\"\",controller_pod=\"\",namespace=\"ns\",ingress=\"i\",service=\"s\",host=\"h\",path=\"/\",method=\"GET\",status=\"200\",canary=\"\"} 1",
            "nginx_ingress_controller_nginx_process_requests_total{",
            "nginx_ingress_controller_config_last_reload_successful{",
            "nginx_ingress_controller_request_duration_seconds_bucket{le=\"0.01\",controller_class=",
            "nginx_ingress_controller_leader_election_status{",
        ] {
            assert!(text.contains(line), "{line}\n{text}");
        }
        drop(stats);
        assert!(!observer.encode().contains("nginx_ingress_controller_requests{"), "series end with their rule");
    }
}
