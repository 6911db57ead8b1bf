//! Feeds a [`ServiceProxy`] from a cluster: watches, node changes, health checks, events, metrics, drift.

use std::net::{IpAddr, SocketAddr};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use futures::TryStreamExt;
use http::{Response, StatusCode};
use ipnet::IpNet;
use k8s_openapi::api::core::v1::{Node, ObjectReference};
use k8s_openapi::api::networking::v1::ServiceCIDR;
use k8s_openapi::jiff::Timestamp;
use kube::api::Api;
use kube::runtime::{WatchStreamExt, watcher};
use kube::{Resource, ResourceExt};
use portolan_client::{EventRecorder, EventType};
use portolan_linux::{Netns, set_sysctl};
use portolan_observe::{Observer, ReadyGate};
use portolan_plan::finding::Severity;
use portolan_plan::world::{
    HEADLESS_LABEL, LocalDetection, NodeView, ObjectKey, SERVICE_NAME_LABEL, parse_ip, parse_net,
};
use tokio_util::sync::CancellationToken;
use tracing::{info, warn};

use crate::addresses::{self, NodePortAddresses};
use crate::applier::{self, Applied, Mailbox, Relist};
use crate::health::{self, HealthServers, ProxyHealth};
use crate::loopback::{self, Relays};
use crate::metrics::{Metrics, Told};
use crate::monitor;
use crate::proxy::{ServiceProxy, key_of};
use crate::watched::{SliceChange, WatchedPod, WatchedService, WatchedSlice};

/// How often the kernel's state is compared with ours even without a sign of interference.
const FULL_SYNC_PERIOD: Duration = Duration::from_secs(3600);

/// What a service-proxy agent needs to know.
#[derive(Clone, Debug)]
pub struct AgentConfig {
    /// Name of the node's Node object.
    pub node_name: String,
    /// The node's network namespace.
    pub netns: Netns,
    /// Start of the names of the interfaces that lead to this node's pods; empty when they cannot be recognised so.
    pub local_interface_prefix: String,
    /// Source networks of pods, for recognising them by address when there is no interface prefix.
    pub cluster_cidrs: Vec<IpNet>,
    /// Masquerade everything sent to cluster IPs.
    pub masquerade_all: bool,
    /// Addresses that carry node ports.
    pub node_port_addresses: NodePortAddresses,
    /// Whether node ports are on loopback addresses too, see [`crate::loopback`].
    pub localhost_node_ports: bool,
    /// Where `/healthz` and `/livez` of the proxy are served, within the namespace.
    pub healthz_address: Option<SocketAddr>,
    /// Where `/metrics`, `/proxyMode` and `/configz` are served, within the namespace.
    pub metrics_address: Option<SocketAddr>,
    /// Metrics to count into, when several agents run in one process; `None` registers new ones.
    pub metrics: Option<Metrics>,
}

impl AgentConfig {
    /// A configuration that recognises pods by interface name.
    pub fn new(node_name: impl Into<String>, netns: Netns, local_interface_prefix: impl Into<String>) -> AgentConfig {
        AgentConfig {
            node_name: node_name.into(),
            netns,
            local_interface_prefix: local_interface_prefix.into(),
            cluster_cidrs: Vec::new(),
            masquerade_all: false,
            node_port_addresses: NodePortAddresses::default(),
            localhost_node_ports: false,
            healthz_address: Some(SocketAddr::from(([0, 0, 0, 0], 10256))),
            metrics_address: Some(SocketAddr::from(([127, 0, 0, 1], 10249))),
            metrics: None,
        }
    }

    fn view(&self, node: Option<&Node>, local: &[IpAddr]) -> NodeView {
        let addresses = node.and_then(|n| n.status.as_ref()).and_then(|s| s.addresses.as_ref());
        let internal: Vec<IpAddr> = addresses
            .into_iter()
            .flatten()
            .filter(|a| a.type_ == "InternalIP")
            .filter_map(|a| parse_ip(&a.address))
            .collect();
        NodeView {
            name: self.node_name.clone(),
            zone: node.and_then(|n| n.labels().get("topology.kubernetes.io/zone").cloned()),
            node_port_addresses: self.node_port_addresses.select(&internal, local),
            local_addresses: local.to_vec(),
            local_detection: if !self.local_interface_prefix.is_empty() {
                LocalDetection::InterfacePrefix(self.local_interface_prefix.clone())
            } else if !self.cluster_cidrs.is_empty() {
                LocalDetection::Networks(self.cluster_cidrs.clone())
            } else {
                LocalDetection::Off
            },
            masquerade_all: self.masquerade_all,
        }
    }
}

/// Why an agent cannot run.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// The namespace's kernel state cannot be reached.
    #[error("cannot open the kernel's netfilter interface for node {node}")]
    Kernel {
        /// The node.
        node: String,
        /// Why.
        #[source]
        source: std::io::Error,
    },
    /// The applier's thread ended by a panic.
    #[error("the applier of node {node} ended unexpectedly")]
    Applier {
        /// The node.
        node: String,
    },
}

/// Runs the service proxy of one node until `shutdown`. Watches reconnect for ever; the last known state stays in force
/// meanwhile, and after the end.
///
/// # Errors
/// Fails at start when the kernel cannot be reached, and when the applier's thread dies.
pub fn run(
    config: AgentConfig,
    client: kube::Client,
    observer: Observer,
    shutdown: CancellationToken,
) -> impl Future<Output = Result<(), Error>> + Send {
    // At once, and not at the first poll: nobody shall see a process without this gate as ready.
    let gate = observer.gate(&format!("proxy/{}", config.node_name));
    gate.not_ready("Services and EndpointSlices are not programmed yet");
    follow_cluster(config, client, observer, gate, shutdown)
}

async fn follow_cluster(
    config: AgentConfig,
    client: kube::Client,
    observer: Observer,
    gate: ReadyGate,
    shutdown: CancellationToken,
) -> Result<(), Error> {
    let node_name = config.node_name.clone();
    let metrics = config.metrics.clone().unwrap_or_else(|| observer.register(Metrics::register));
    let kernel = |source| Error::Kernel { node: node_name.clone(), source };

    let proxy = ServiceProxy::new(&config.netns, config.view(None, &[])).map_err(kernel)?;
    let own = proxy.port_id();
    set_sysctls(&config.netns);
    let mailbox = Mailbox::counted(metrics.clone());
    let recorder = EventRecorder::new(client.clone(), "kube-proxy", Some(node_name.clone()));
    let runtime = tokio::runtime::Handle::current();
    let mut health = HealthServers::new(config.netns.clone(), runtime.clone());
    let mut relays = Relays::new(config.netns.clone(), runtime);
    let localhost_node_ports = config.localhost_node_ports;
    let proxy_health = ProxyHealth::default();
    proxy.report_flows({
        let metrics = metrics.clone();
        move |look| metrics.looked(look)
    });
    recorder.event(&node_reference(&node_name), EventType::Normal, "Starting", "");
    let servers = Servers {
        observer: observer.clone(),
        health: proxy_health.clone(),
        metrics: metrics.clone(),
        mailbox: mailbox.clone(),
        recorder: recorder.clone(),
        config: config.clone(),
        shutdown: shutdown.clone(),
    };

    let (done, applier_done) = tokio::sync::oneshot::channel::<()>();
    let thread = {
        let mailbox = mailbox.clone();
        let node_name = node_name.clone();
        let proxy_health = proxy_health.clone();
        std::thread::Builder::new()
            .name(format!("proxy-{node_name}"))
            .spawn(move || {
                let _done = done;
                let mut was_ready = false;
                let mut told = Told::default();
                applier::run(proxy, &mailbox, |applied| {
                    metrics.applied(&applied, &mut told);
                    for family in &applied.report.families {
                        proxy_health.synced(family.family, family.error.is_none(), Timestamp::now());
                    }
                    if applied.report.loopback_changed {
                        relays.set(&loopback::wanted(applied.proxy.map(), localhost_node_ports));
                    }
                    let ok = applied.report.is_ok();
                    health.set_healthy(ok);
                    if applied.report.health_checks_changed {
                        let failed =
                            health.set(applied.proxy.health_checks(), &applied.proxy.node().node_port_addresses);
                        for (key, port, error) in failed {
                            let message = format!(
                                "node {node_name} failed to start healthcheck \"{key}\" on port {port}: {error}"
                            );
                            recorder.event(
                                &service_reference(&key),
                                EventType::Warning,
                                "FailedToStartServiceHealthcheck",
                                message,
                            );
                        }
                    }
                    if ok && !was_ready {
                        was_ready = true;
                        gate.ready();
                    }
                    report(&applied, &recorder, &node_name);
                });
            })
            .map_err(|source| Error::Kernel { node: config.node_name.clone(), source })?
    };
    let monitor = monitor::watch(&config.netns, own, mailbox.clone())
        .map_err(|source| Error::Kernel { node: config.node_name.clone(), source })?;

    let services = watch_services(client.clone(), mailbox.clone());
    let slices = watch_slices(client.clone(), mailbox.clone());
    let sight = NodeSight::new(config.clone(), mailbox.clone());
    addresses::watch(&config.netns, shutdown.child_token(), {
        let sight = sight.clone();
        move |local| sight.addresses(local)
    })
    .map_err(|source| Error::Kernel { node: config.node_name.clone(), source })?;
    let nodes = watch_node(client.clone(), mailbox.clone(), sight, proxy_health);
    let pods = watch_pods(client.clone(), mailbox.clone(), config.node_name.clone());
    let cidrs = watch_service_cidrs(client, mailbox.clone());
    let periodic = {
        let mailbox = mailbox.clone();
        async move {
            loop {
                tokio::time::sleep(FULL_SYNC_PERIOD).await;
                mailbox.resync();
            }
        }
    };
    let ended_early = tokio::select! {
        () = shutdown.cancelled() => false,
        _ = applier_done => true,
        () = async {
            tokio::join!(services, slices, nodes, pods, cidrs, periodic, servers.healthz(), servers.metrics());
        } => false,
    };
    mailbox.close();
    drop(monitor);
    let joined = tokio::task::spawn_blocking(move || thread.join()).await;
    match (ended_early, joined) {
        (false, Ok(Ok(()))) => Ok(()),
        _ => Err(Error::Applier { node: config.node_name }),
    }
}

/// Conntrack settings that Services rely on (services.md 3.6). They are per namespace; one that is refused is no reason to stop.
fn set_sysctls(netns: &Netns) {
    for (key, value) in [
        // A packet that conntrack deems out of window would otherwise not be translated back, and reset the connection.
        ("net/netfilter/nf_conntrack_tcp_be_liberal", "1"),
        ("net/netfilter/nf_conntrack_tcp_timeout_established", "86400"),
        ("net/netfilter/nf_conntrack_tcp_timeout_close_wait", "3600"),
    ] {
        if let Err(error) = set_sysctl(netns, key, value) {
            warn!(key, %error, "cannot set a kernel parameter");
        }
    }
}

fn report(applied: &Applied<'_>, recorder: &EventRecorder, node_name: &str) {
    if applied.healed {
        let (message, table) =
            ("somebody else changed the rules of Services; they are put right", crate::layout::TABLE);
        warn!(node = node_name, table, message);
        let message = format!("{message} (nftables table {table})");
        recorder.event(&node_reference(node_name), EventType::Warning, "ServiceRulesChanged", message);
    }
    for finding in applied.proxy.findings_of(&applied.report.services).filter(|f| f.severity == Severity::Warning) {
        let origin = &finding.origin;
        let group = if origin.kind == "EndpointSlice" { "discovery.k8s.io/v1" } else { "v1" };
        let object = ObjectReference {
            api_version: Some(group.into()),
            kind: Some(origin.kind.clone()),
            namespace: Some(origin.namespace.clone()),
            name: Some(origin.name.clone()),
            uid: Some(origin.uid.clone()).filter(|u| !u.is_empty()),
            ..ObjectReference::default()
        };
        recorder.event(&object, EventType::Warning, &finding.reason, format!("{}: {}", origin.field, finding.message));
    }
}

fn node_reference(name: &str) -> ObjectReference {
    ObjectReference {
        api_version: Some("v1".into()),
        kind: Some("Node".into()),
        name: Some(name.to_owned()),
        // As kubelet and kube-proxy write it: events about a Node are found by this.
        uid: Some(name.to_owned()),
        ..ObjectReference::default()
    }
}

/// The proxy's own HTTP servers.
struct Servers {
    observer: Observer,
    health: ProxyHealth,
    metrics: Metrics,
    mailbox: Mailbox,
    recorder: EventRecorder,
    config: AgentConfig,
    shutdown: CancellationToken,
}

/// A port that is taken is tried again after this, as kube-proxy does.
const BIND_AGAIN: Duration = Duration::from_secs(5);

impl Servers {
    async fn listen(&self, address: SocketAddr, reason: &str, what: &str) -> Option<std::net::TcpListener> {
        let mut told = false;
        loop {
            let bound = self.config.netns.run(|| std::net::TcpListener::bind(address)).and_then(|bound| bound);
            match bound {
                Ok(listener) => return Some(listener),
                Err(error) if !told => {
                    told = true;
                    warn!(%address, %error, what, "cannot listen; trying again");
                    let message = format!("failed to start {what} on {address}: {error}");
                    self.recorder.event(&node_reference(&self.config.node_name), EventType::Warning, reason, message);
                }
                Err(_) => {}
            }
            tokio::select! {
                () = self.shutdown.cancelled() => return None,
                () = tokio::time::sleep(BIND_AGAIN) => {}
            }
        }
    }

    async fn healthz(&self) {
        let Some(address) = self.config.healthz_address else { return std::future::pending().await };
        let Some(listener) = self.listen(address, "FailedToStartProxierHealthcheck", "proxier healthz").await else {
            return;
        };
        let (health, mailbox, metrics) = (self.health.clone(), self.mailbox.clone(), self.metrics.clone());
        let answer = move |request: &http::Request<hyper::body::Incoming>| {
            let live = match request.uri().path() {
                "/healthz" => false,
                "/livez" => true,
                _ => return text(StatusCode::NOT_FOUND, "404 page not found\n".into()),
            };
            let (status, body) = health.answer(live, mailbox.waiting(), Timestamp::now());
            metrics.health_checked(live, status.as_u16());
            let mut response = text(status, body);
            let json = http::HeaderValue::from_static("application/json");
            response.headers_mut().insert(http::header::CONTENT_TYPE, json);
            response
        };
        if let Err(error) = health::serve_http(listener, answer, self.shutdown.clone()).await {
            warn!(%error, "proxy health server ended");
        }
    }

    async fn metrics(&self) {
        let Some(address) = self.config.metrics_address else { return std::future::pending().await };
        let Some(listener) = self.listen(address, "FailedToStartMetricServer", "metrics server").await else {
            return;
        };
        let observer = self.observer.clone();
        let configuration = serde_json::json!({"kubeproxy.config.k8s.io": {
            "mode": "nftables",
            "hostnameOverride": self.config.node_name,
            "healthzBindAddress": self.config.healthz_address,
            "metricsBindAddress": address,
            "clusterCIDR": self.config.cluster_cidrs,
            "detectLocal": {"interfaceNamePrefix": self.config.local_interface_prefix},
            "nftables": {"masqueradeAll": self.config.masquerade_all},
        }})
        .to_string();
        let answer = move |request: &http::Request<hyper::body::Incoming>| match request.uri().path() {
            "/proxyMode" => text(StatusCode::OK, "nftables".into()),
            "/configz" => text(StatusCode::OK, configuration.clone()),
            _ => portolan_observe::answer(&observer, request),
        };
        if let Err(error) = health::serve_http(listener, answer, self.shutdown.clone()).await {
            warn!(%error, "metrics server ended");
        }
    }
}

fn text(status: StatusCode, body: String) -> Response<http_body_util::Full<bytes::Bytes>> {
    let mut response = Response::new(http_body_util::Full::new(body.into()));
    *response.status_mut() = status;
    let headers = response.headers_mut();
    headers.insert(http::header::CONTENT_TYPE, http::HeaderValue::from_static("text/plain; charset=utf-8"));
    headers.insert(http::header::X_CONTENT_TYPE_OPTIONS, http::HeaderValue::from_static("nosniff"));
    response
}

/// Puts together what the Node object and the kernel say about the node.
#[derive(Clone)]
struct NodeSight(Arc<Sight>);

struct Sight {
    config: AgentConfig,
    mailbox: Mailbox,
    seen: Mutex<(Option<Node>, Vec<IpAddr>, Option<NodeView>)>,
}

impl NodeSight {
    fn new(config: AgentConfig, mailbox: Mailbox) -> NodeSight {
        NodeSight(Arc::new(Sight { config, mailbox, seen: Mutex::default() }))
    }

    fn node(&self, node: Node) {
        self.tell(|seen| seen.0 = Some(node));
    }

    fn addresses(&self, local: Vec<IpAddr>) {
        self.tell(|seen| seen.1 = local);
    }

    fn tell(&self, edit: impl FnOnce(&mut (Option<Node>, Vec<IpAddr>, Option<NodeView>))) {
        let mut seen = self.0.seen.lock().unwrap_or_else(|poisoned| poisoned.into_inner());
        edit(&mut seen);
        let view = self.0.config.view(seen.0.as_ref(), &seen.1);
        if seen.2.as_ref() != Some(&view) {
            info!(node = view.name, zone = view.zone, addresses = ?view.node_port_addresses, "node known");
            self.0.mailbox.node(view.clone());
            seen.2 = Some(view);
        }
    }
}

fn service_reference(key: &ObjectKey) -> ObjectReference {
    ObjectReference {
        api_version: Some("v1".into()),
        kind: Some("Service".into()),
        namespace: Some(key.namespace.clone()),
        name: Some(key.name.clone()),
        ..ObjectReference::default()
    }
}

/// Follows one kind for ever. `each` is given every change; `listed` is called after each complete list.
async fn follow<K>(
    api: Api<K>,
    config: watcher::Config,
    mut each: impl FnMut(ObjectKey, Option<K>),
    mut listed: impl FnMut(),
    mut failed: impl FnMut(&watcher::Error),
) where
    K: Resource + Clone + std::fmt::Debug + serde::de::DeserializeOwned + Send + 'static,
    K::DynamicType: Default,
{
    let mut stream = std::pin::pin!(watcher(api, config).default_backoff());
    let mut relist = Relist::default();
    loop {
        match stream.try_next().await {
            Ok(Some(watcher::Event::Init)) => relist.begin(),
            Ok(Some(watcher::Event::InitApply(object) | watcher::Event::Apply(object))) => {
                let key = key_of(&object);
                relist.applied(&key);
                each(key, Some(object));
            }
            Ok(Some(watcher::Event::Delete(object))) => {
                let key = key_of(&object);
                relist.deleted(&key);
                each(key, None);
            }
            Ok(Some(watcher::Event::InitDone)) => {
                for gone in relist.end() {
                    each(gone, None);
                }
                listed();
            }
            Ok(None) => return,
            Err(error) => {
                warn!(kind = %K::kind(&K::DynamicType::default()), %error, "watch interrupted");
                failed(&error);
            }
        }
    }
}

async fn watch_services(client: kube::Client, mailbox: Mailbox) {
    // Headless Services need no proxy; the field selector keeps them off the wire. Those of other proxies are filtered later,
    // because a label may come and go.
    let config = watcher::Config::default().fields("spec.clusterIP!=None");
    let changes = mailbox.clone();
    follow::<WatchedService>(
        Api::all(client),
        config,
        |key, service| changes.service(key, service.and_then(|s| s.parsed)),
        || mailbox.services_listed(),
        |_| {},
    )
    .await;
}

async fn watch_slices(client: kube::Client, mailbox: Mailbox) {
    // A slice that loses one of these labels or gets the other is reported as deleted.
    let config = watcher::Config::default().labels(&format!("{SERVICE_NAME_LABEL},!{HEADLESS_LABEL}"));
    let changes = mailbox.clone();
    follow::<WatchedSlice>(
        Api::all(client),
        config,
        |key, slice| changes.slice(key, slice.map_or_else(SliceChange::default, |s| s.parsed)),
        || mailbox.slices_listed(),
        |_| {},
    )
    .await;
}

async fn watch_node(client: kube::Client, mailbox: Mailbox, sight: NodeSight, health: ProxyHealth) {
    let fields = watcher::Config::default().fields(&format!("metadata.name={}", sight.0.config.node_name));
    let there = AtomicBool::new(false);
    follow::<Node>(
        Api::all(client),
        fields,
        |_, node| {
            there.store(node.is_some(), Ordering::Relaxed);
            health.node(node.as_ref());
            // A Node that is gone for a moment leaves the last known addresses in force.
            if let Some(node) = node {
                sight.node(node);
            }
        },
        || {
            if !there.load(Ordering::Relaxed) {
                health.node(None);
            }
            mailbox.node_listed();
        },
        |_| {},
    )
    .await;
}

async fn watch_pods(client: kube::Client, mailbox: Mailbox, node_name: String) {
    let config = watcher::Config::default().fields(&format!("spec.nodeName={node_name}"));
    let changes = mailbox.clone();
    // Few pods have host ports; the others change all the time and are nobody's business here.
    let mut known = std::collections::BTreeSet::new();
    follow::<WatchedPod>(
        Api::all(client),
        config,
        |key, pod| match pod.and_then(|p| p.parsed) {
            Some(pod) => {
                known.insert(key.clone());
                changes.pod(key, Some(pod));
            }
            None => {
                if known.remove(&key) {
                    changes.pod(key, None);
                }
            }
        },
        || mailbox.pods_listed(),
        |error| {
            // Roles made for kube-proxy do not allow to see pods; then there are no host ports, and all else works.
            if let watcher::Error::InitialListFailed(kube::Error::Api(status)) = error
                && status.code == 403
            {
                mailbox.pods_listed();
            }
        },
    )
    .await;
}

async fn watch_service_cidrs(client: kube::Client, mailbox: Mailbox) {
    follow::<ServiceCIDR>(
        Api::all(client),
        watcher::Config::default(),
        |key, cidr| {
            let texts = cidr.and_then(|c| c.spec).and_then(|s| s.cidrs).unwrap_or_default();
            mailbox.service_cidr(key.name, texts.iter().filter_map(|t| parse_net(t)).collect());
        },
        || {},
        |_| {},
    )
    .await;
}
