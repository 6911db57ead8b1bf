//! The Ingress controller's L7 proxy.
//!
//! Input are Ingresses, IngressClasses, Services, EndpointSlices and Secrets by watch, compiled by [`portolan_plan::route`]; output
//! are answers to HTTP requests, Ingress status and events. Behaviour is that of ingress-nginx for its class, and plain Kubernetes
//! semantics for the class of Portolan's own.

use std::net::SocketAddr;

use portolan_observe::Observer;
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
}

impl Default for Config {
    fn default() -> Self {
        Config {
            http: Vec::new(),
            https: Vec::new(),
            publish_service: None,
            admin: None,
            workers: std::thread::available_parallelism().map_or(1, |n| n.get()),
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
}

/// Serves Ingresses until `shutdown`, then drains.
///
/// # Errors
/// Fails when a listener cannot be made. Trouble with the API server is no error: the last known routes are served.
pub async fn run(config: Config, client: kube::Client, observer: Observer, shutdown: CancellationToken) -> Result<(), Error> {
    todo!("{config:?} {} {observer:?} {shutdown:?}", client.default_namespace())
}
