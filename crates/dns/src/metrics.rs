//! Metrics under the names that CoreDNS dashboards and alerts use.

use std::collections::HashMap;
use std::net::{IpAddr, SocketAddr};
use std::sync::Arc;
use std::time::Duration;

use prometheus_client::encoding::EncodeLabelSet;
use prometheus_client::metrics::counter::Counter;
use prometheus_client::metrics::family::{Family, MetricConstructor};
use prometheus_client::metrics::gauge::Gauge;
use prometheus_client::metrics::histogram::{Histogram, exponential_buckets};
use prometheus_client::registry::Registry;

use crate::answer::{InZone, Summary, Transport};

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct Place {
    server: String,
    zone: String,
    view: String,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct Request {
    server: String,
    zone: String,
    view: String,
    proto: &'static str,
    family: &'static str,
    r#type: &'static str,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct Sized {
    server: String,
    zone: String,
    view: String,
    proto: &'static str,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct Response {
    server: String,
    zone: String,
    view: String,
    rcode: &'static str,
    plugin: &'static str,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct Proxied {
    proxy_name: &'static str,
    to: String,
    rcode: String,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct Build {
    version: &'static str,
    revision: &'static str,
    goversion: &'static str,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct Kind {
    service_kind: &'static str,
}

/// A histogram of fixed buckets.
#[derive(Clone)]
struct Buckets(fn() -> Vec<f64>);

impl MetricConstructor<Histogram> for Buckets {
    fn new_metric(&self) -> Histogram {
        Histogram::new((self.0)())
    }
}

type Histograms<L> = Family<L, Histogram, Buckets>;

fn seconds() -> Vec<f64> {
    exponential_buckets(0.00025, 2.0, 16).collect()
}

fn octets() -> Vec<f64> {
    vec![0., 100., 200., 300., 400., 511., 1023., 2047., 4095., 8291., 16e3, 32e3, 48e3, 64e3]
}

fn programming() -> Vec<f64> {
    exponential_buckets(0.001, 2.0, 20).collect()
}

/// All metrics of one server.
pub(crate) struct Metrics {
    server: String,
    requests: Family<Request, Counter>,
    responses: Family<Response, Counter>,
    durations: Histograms<Place>,
    request_sizes: Histograms<Sized>,
    response_sizes: Histograms<Sized>,
    do_requests: Family<Place, Counter>,
    proxied: Histograms<Proxied>,
    programming: Histograms<Kind>,
    pub(crate) concurrent_rejects: Counter,
}

/// The mnemonic of a common record type, else `other`: labels stay few whatever clients ask for.
fn type_label(rtype: u16) -> &'static str {
    match rtype {
        1 => "A",
        2 => "NS",
        5 => "CNAME",
        6 => "SOA",
        12 => "PTR",
        15 => "MX",
        16 => "TXT",
        28 => "AAAA",
        33 => "SRV",
        35 => "NAPTR",
        43 => "DS",
        46 => "RRSIG",
        47 => "NSEC",
        48 => "DNSKEY",
        64 => "SVCB",
        65 => "HTTPS",
        251 => "IXFR",
        252 => "AXFR",
        255 => "ANY",
        _ => "other",
    }
}

impl Metrics {
    /// Metrics of the server at `port`, registered.
    pub(crate) fn new(port: u16, registry: &mut Registry) -> Metrics {
        let m = Metrics {
            server: format!("dns://:{port}"),
            requests: Family::default(),
            responses: Family::default(),
            durations: Family::new_with_constructor(Buckets(seconds)),
            request_sizes: Family::new_with_constructor(Buckets(octets)),
            response_sizes: Family::new_with_constructor(Buckets(octets)),
            do_requests: Family::default(),
            proxied: Family::new_with_constructor(Buckets(seconds)),
            programming: Family::new_with_constructor(Buckets(programming)),
            concurrent_rejects: Counter::default(),
        };
        let build: Family<Build, Gauge> = Family::default();
        let labels = Build {
            version: env!("CARGO_PKG_VERSION"),
            revision: "",
            goversion: concat!("rust", env!("CARGO_PKG_RUST_VERSION")),
        };
        build.get_or_create(&labels).set(1);
        registry.register("coredns_build_info", "Version of the program.", build);
        registry.register("coredns_dns_requests", "Queries.", m.requests.clone());
        registry.register("coredns_dns_responses", "Replies by response code.", m.responses.clone());
        registry.register("coredns_dns_request_duration_seconds", "Time to answer.", m.durations.clone());
        registry.register("coredns_dns_request_size_bytes", "Size of queries.", m.request_sizes.clone());
        registry.register("coredns_dns_response_size_bytes", "Size of replies.", m.response_sizes.clone());
        registry.register("coredns_dns_do_requests", "Queries with DNSSEC OK.", m.do_requests.clone());
        registry.register("coredns_panics", "Panics while answering.", Counter::<u64>::default());
        registry.register("coredns_proxy_request_duration_seconds", "Time of exchanges upstream.", m.proxied.clone());
        registry.register(
            "coredns_forward_max_concurrent_rejects",
            "Queries refused because too many were being forwarded.",
            m.concurrent_rejects.clone(),
        );
        registry.register(
            "coredns_kubernetes_dns_programming_duration_seconds",
            "From the change of a pod or Service to its answer.",
            m.programming.clone(),
        );
        m
    }

    pub(crate) fn proxied(&self, upstream: SocketAddr, rcode: u8, took: Duration) {
        let rcode = match rcode {
            0 => "NOERROR".into(),
            2 => "SERVFAIL".into(),
            3 => "NXDOMAIN".into(),
            5 => "REFUSED".into(),
            other => other.to_string(),
        };
        let labels = Proxied { proxy_name: "forward", to: upstream.to_string(), rcode };
        self.proxied.get_or_create(&labels).observe(took.as_secs_f64());
    }

    /// Records how long a change of endpoints took to reach the answers.
    pub(crate) fn programmed(&self, service_kind: &'static str, took: Duration) {
        self.programming.get_or_create(&Kind { service_kind }).observe(took.as_secs_f64());
    }
}

#[derive(Clone, Copy, PartialEq, Eq, Hash)]
struct Key {
    summary: Summary,
    rtype: &'static str,
    transport: Transport,
    ipv6: bool,
    plugin: &'static str,
}

struct Handles {
    requests: Counter,
    responses: Counter,
    durations: Histogram,
    request_sizes: Histogram,
    response_sizes: Histogram,
    do_requests: Counter,
}

/// One worker's way to the metrics: label sets are looked up once and then kept.
pub(crate) struct Recorder {
    metrics: Arc<Metrics>,
    handles: HashMap<Key, Handles>,
}

impl Recorder {
    pub(crate) fn new(metrics: Arc<Metrics>) -> Recorder {
        Recorder { metrics, handles: HashMap::new() }
    }

    /// Records one answered query. `zone_text` names its zone; `sizes` are the octets of query and reply.
    pub(crate) fn record(
        &mut self,
        summary: Summary,
        zone_text: &str,
        (peer, transport): (IpAddr, Transport),
        sizes: (usize, usize),
        took: Duration,
    ) {
        let key = Key {
            summary,
            rtype: summary.rtype.map_or("other", type_label),
            transport,
            ipv6: peer.is_ipv6(),
            plugin: match summary.zone {
                InZone::Dropped => "",
                InZone::Outside => "forward",
                InZone::Zone(_) => "kubernetes",
            },
        };
        let metrics = &self.metrics;
        let handles = self.handles.entry(key).or_insert_with(|| {
            let (server, zone, view) = (metrics.server.clone(), zone_text.to_string(), String::new());
            let proto = match transport {
                Transport::Udp => "udp",
                Transport::Tcp => "tcp",
            };
            let place = Place { server: server.clone(), zone: zone.clone(), view: view.clone() };
            let sized = Sized { server: server.clone(), zone: zone.clone(), view: view.clone(), proto };
            let family = if key.ipv6 { "2" } else { "1" };
            let request = Request {
                server: server.clone(),
                zone: zone.clone(),
                view: view.clone(),
                proto,
                family,
                r#type: key.rtype,
            };
            let response = Response { server, zone, view, rcode: summary.rcode.name(), plugin: key.plugin };
            Handles {
                requests: metrics.requests.get_or_create_owned(&request),
                responses: metrics.responses.get_or_create_owned(&response),
                durations: metrics.durations.get_or_create_owned(&place),
                request_sizes: metrics.request_sizes.get_or_create_owned(&sized),
                response_sizes: metrics.response_sizes.get_or_create_owned(&sized),
                do_requests: metrics.do_requests.get_or_create_owned(&place),
            }
        });
        handles.requests.inc();
        handles.responses.inc();
        handles.durations.observe(took.as_secs_f64());
        handles.request_sizes.observe(sizes.0 as f64);
        handles.response_sizes.observe(sizes.1 as f64);
        if summary.dnssec_ok {
            handles.do_requests.inc();
        }
    }
}
