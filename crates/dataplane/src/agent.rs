//! Feeds a [`ServiceProxy`] from a cluster: watches, node changes, health checks, events, metrics, drift.

use std::net::IpAddr;
use std::sync::Arc;
use std::time::Duration;

use futures::TryStreamExt;
use ipnet::IpNet;
use k8s_openapi::api::core::v1::{Node, ObjectReference, Service};
use k8s_openapi::api::discovery::v1::EndpointSlice;
use k8s_openapi::api::networking::v1::ServiceCIDR;
use kube::api::Api;
use kube::runtime::{WatchStreamExt, watcher};
use kube::{Resource, ResourceExt};
use portolan_client::{EventRecorder, EventType};
use portolan_linux::{Netns, set_sysctl};
use portolan_observe::{Observer, ReadyGate};
use portolan_plan::finding::Severity;
use portolan_plan::world::{IpFamily, LocalDetection, NodeView, ObjectKey, parse_ip, parse_net};
use tokio_util::sync::CancellationToken;
use tracing::{info, warn};

use crate::applier::{self, Applied, Mailbox, Relist};
use crate::health::HealthServers;
use crate::metrics::Metrics;
use crate::monitor;
use crate::proxy::ServiceProxy;

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
            metrics: None,
        }
    }

    fn view(&self, node: Option<&Node>) -> NodeView {
        let addresses = node.and_then(|n| n.status.as_ref()).and_then(|s| s.addresses.as_ref());
        let mut node_port_addresses: Vec<IpAddr> = Vec::new();
        for address in addresses.into_iter().flatten().filter(|a| a.type_ == "InternalIP") {
            // The first of each family: what kube-proxy's nftables mode calls `primary`.
            if let Some(ip) = parse_ip(&address.address)
                && node_port_addresses.iter().all(|known| IpFamily::of(known) != IpFamily::of(&ip))
            {
                node_port_addresses.push(ip);
            }
        }
        NodeView {
            name: self.node_name.clone(),
            zone: node.and_then(|n| n.labels().get("topology.kubernetes.io/zone").cloned()),
            node_port_addresses,
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

    let proxy = ServiceProxy::new(&config.netns, config.view(None)).map_err(kernel)?;
    let own = proxy.port_id();
    set_sysctls(&config.netns);
    let mailbox = Mailbox::default();
    let recorder = EventRecorder::new(client.clone(), "kube-proxy", Some(node_name.clone()));
    let mut health = HealthServers::new(config.netns.clone(), tokio::runtime::Handle::current());

    let (done, applier_done) = tokio::sync::oneshot::channel::<()>();
    let thread = {
        let mailbox = mailbox.clone();
        let node_name = node_name.clone();
        std::thread::Builder::new()
            .name(format!("proxy-{node_name}"))
            .spawn(move || {
                let _done = done;
                let mut was_ready = false;
                applier::run(proxy, &mailbox, |applied| {
                    metrics.applied(&applied);
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
                    report(&applied, &recorder);
                });
            })
            .map_err(|source| Error::Kernel { node: config.node_name.clone(), source })?
    };
    let monitor = monitor::watch(&config.netns, own, mailbox.clone())
        .map_err(|source| Error::Kernel { node: config.node_name.clone(), source })?;

    let services = watch_services(client.clone(), mailbox.clone());
    let slices = watch_slices(client.clone(), mailbox.clone());
    let nodes = watch_node(client.clone(), mailbox.clone(), config.clone());
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
        () = async { tokio::join!(services, slices, nodes, cidrs, periodic); } => false,
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

fn report(applied: &Applied<'_>, recorder: &EventRecorder) {
    if applied.healed {
        warn!("someone else changed the table; it is put right");
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

fn service_reference(key: &ObjectKey) -> ObjectReference {
    ObjectReference {
        api_version: Some("v1".into()),
        kind: Some("Service".into()),
        namespace: Some(key.namespace.clone()),
        name: Some(key.name.clone()),
        ..ObjectReference::default()
    }
}

fn key_of<K: Resource>(object: &K) -> ObjectKey {
    ObjectKey::new(object.meta().namespace.clone().unwrap_or_default(), object.meta().name.clone().unwrap_or_default())
}

/// Follows one kind for ever. `each` is given every change; `listed` is called after each complete list.
async fn follow<K>(
    api: Api<K>,
    config: watcher::Config,
    mut each: impl FnMut(ObjectKey, Option<K>),
    mut listed: impl FnMut(),
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
            }
        }
    }
}

async fn watch_services(client: kube::Client, mailbox: Mailbox) {
    // Headless Services need no proxy; the field selector keeps them off the wire. Those of other proxies are filtered later,
    // because a label may come and go.
    let config = watcher::Config::default().fields("spec.clusterIP!=None");
    let changes = mailbox.clone();
    follow::<Service>(
        Api::all(client),
        config,
        |key, service| changes.service(key, service.map(Arc::new)),
        || mailbox.services_listed(),
    )
    .await;
}

async fn watch_slices(client: kube::Client, mailbox: Mailbox) {
    let config = watcher::Config::default().labels("!service.kubernetes.io/headless");
    let changes = mailbox.clone();
    follow::<EndpointSlice>(
        Api::all(client),
        config,
        |key, slice| changes.slice(key, slice.map(Arc::new)),
        || mailbox.slices_listed(),
    )
    .await;
}

async fn watch_node(client: kube::Client, mailbox: Mailbox, config: AgentConfig) {
    let fields = watcher::Config::default().fields(&format!("metadata.name={}", config.node_name));
    let mut last = None;
    follow::<Node>(
        Api::all(client),
        fields,
        |_, node| {
            // A Node that is gone for a moment leaves the last known addresses in force.
            let Some(node) = node else { return };
            let view = config.view(Some(&node));
            if last.as_ref() != Some(&view) {
                info!(node = view.name, zone = view.zone, addresses = ?view.node_port_addresses, "node known");
                mailbox.node(view.clone());
                last = Some(view);
            }
        },
        || mailbox.node_listed(),
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
    )
    .await;
}
