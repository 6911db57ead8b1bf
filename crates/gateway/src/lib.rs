//! The Ingress controller's L7 proxy.
//!
//! Input are Ingresses, IngressClasses, Services, EndpointSlices and Secrets by watch, compiled by [`portolan_plan::route`]; output
//! are answers to HTTP requests, Ingress status and events. Behaviour is that of ingress-nginx for its class, and plain Kubernetes
//! semantics for the class of Portolan's own.

mod accesslog;
mod admin;
mod body;
mod control;
mod engine;
mod guard;
mod head;
mod metrics;
mod proxy;
mod snapshot;
mod status;
mod timers;
mod tls;
mod tunnel;
mod upstream;

use std::net::SocketAddr;
use std::time::Duration;

pub use accesslog::Target as AccessLog;
pub use engine::{Engine, EngineConfig};
pub use metrics::{ConstLabels, Registry};
pub use snapshot::{Endpoints, Snapshot};
pub use tls::read as read_certificate;

use portolan_client::events::EventRecorder;
use portolan_client::leader::{self, Election};
use portolan_observe::Observer;
use portolan_plan::route::Options;
use portolan_plan::world::ObjectKey;
use tokio_util::sync::CancellationToken;

/// What a gateway is told at start.
#[derive(Clone, Debug)]
pub struct Config {
    /// Addresses for plain HTTP; port 0 picks a free one.
    pub http: Vec<SocketAddr>,
    /// Addresses for HTTPS; port 0 picks a free one.
    pub https: Vec<SocketAddr>,
    /// Namespace and name of the Service whose addresses are published in the status of Ingresses.
    pub publish_service: Option<(String, String)>,
    /// Where `/healthz`, `/readyz` and `/metrics` are served, if at all.
    pub admin: Option<SocketAddr>,
    /// Threads that serve connections, at least 1; the default is one per core.
    pub workers: usize,
    /// How Ingresses are selected and compiled.
    pub options: Options,
    /// Where the access log goes.
    pub access_log: AccessLog,
    /// How long connections may go on after shutdown began.
    pub drain: Duration,
    /// Namespace of the Lease by which replicas choose the one that writes; `POD_NAMESPACE` in a pod.
    pub election_namespace: String,
    /// This replica, unique among all; `POD_NAME` in a pod.
    pub identity: String,
}

impl Default for Config {
    fn default() -> Self {
        Config {
            http: Vec::new(),
            https: Vec::new(),
            publish_service: None,
            admin: None,
            workers: std::thread::available_parallelism().map_or(1, |n| n.get()),
            options: Options::default(),
            access_log: AccessLog::Stdout,
            // ingress-nginx's worker-shutdown-timeout; a pod's own grace period usually ends sooner.
            drain: Duration::from_secs(240),
            election_namespace: String::new(),
            identity: String::new(),
        }
    }
}

/// Why a gateway could not start.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// A listener could not be made.
    #[error("cannot listen on {address}")]
    Listen {
        /// The address asked for.
        address: SocketAddr,
        /// The reason.
        #[source]
        source: std::io::Error,
    },
    /// A worker thread could not be started.
    #[error("cannot start a worker")]
    Thread {
        /// The reason.
        #[source]
        source: std::io::Error,
    },
    /// TLS could not be set up.
    #[error("cannot set up TLS")]
    Tls {
        /// The reason.
        #[source]
        source: Box<dyn std::error::Error + Send + Sync>,
    },
}

/// Serves Ingresses until `shutdown`, then drains.
///
/// # Errors
/// Fails when a listener cannot be made. Trouble with the API server is no error: the last known routes are served.
pub async fn run(
    config: Config,
    client: kube::Client,
    observer: Observer,
    shutdown: CancellationToken,
) -> Result<(), Error> {
    // A process that is told nothing of itself still needs a name that no other replica has.
    let random = || format!("portolan-{:08x}", rand::random::<u32>());
    let own = |configured: &str, variable: &str| match configured {
        "" => std::env::var(variable).ok().filter(|v| !v.is_empty()),
        configured => Some(configured.to_string()),
    };
    let identity = own(&config.identity, "POD_NAME").unwrap_or_else(random);
    let namespace = own(&config.election_namespace, "POD_NAMESPACE")
        .or_else(|| config.publish_service.as_ref().map(|(namespace, _)| namespace.clone()))
        .unwrap_or_else(|| "default".into());
    let gate = observer.gate("gateway");
    let class = config.options.controllers.first().map(|c| c.controller.clone()).unwrap_or_default();
    let metrics = Registry::new(
        config.workers.max(1),
        ConstLabels { class, namespace: namespace.clone(), pod: identity.clone() },
    );
    observer.register(|registry| registry.register_collector(Box::new(metrics.clone())));
    if let Some(address) = config.admin {
        let failed = |source| Error::Listen { address, source };
        let listener = std::net::TcpListener::bind(address).map_err(failed)?;
        admin::serve(listener, observer.clone(), shutdown.clone()).map_err(failed)?;
    }
    let engine = Engine::start(
        EngineConfig {
            http: config.http.clone(),
            https: config.https.clone(),
            workers: config.workers,
            access_log: config.access_log.clone(),
            drain: config.drain,
        },
        metrics.clone(),
    )?;
    tracing::info!(http = ?engine.http, https = ?engine.https, workers = config.workers, "gateway started");
    let election = Election::new(namespace, "ingress-controller-leader", identity.clone());
    let leads = leader::campaign(client.clone(), election, shutdown.clone());
    let events = EventRecorder::new(client.clone(), "ingress-controller", None);
    let publish_service = config.publish_service.map(|(namespace, name)| ObjectKey::new(namespace, name));
    let control =
        control::Control { client, engine, metrics, options: config.options, publish_service, leads, events, gate };
    control::run(control, shutdown).await;
    Ok(())
}
