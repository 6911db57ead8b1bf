//! Cluster DNS: answers for the cluster's names, forwarding of the others, and the sockets in between.
//!
//! Input are queries over UDP and TCP and, by watch, the objects that [`portolan_plan::zone`] compiles. [`answer`] decides as
//! a pure function from request bytes to response bytes; the other modules carry bytes. Behaviour is that of CoreDNS with the
//! kubernetes plugin except where ARCHITECTURE.md names a difference.

pub mod answer;
pub mod wire;

use std::net::SocketAddr;
use std::time::Duration;

use portolan_linux::Netns;
use portolan_observe::Observer;
use portolan_plan::zone::Options;
use tokio_util::sync::CancellationToken;

/// What a DNS server is told at start.
#[derive(Clone, Debug)]
pub struct Config {
    /// Addresses for UDP and TCP; port 0 picks a free one. A wildcard address answers from the address that was asked.
    pub listen: Vec<SocketAddr>,
    /// Namespace to make the sockets in; `None`: where the process runs.
    pub netns: Option<Netns>,
    /// The cluster's domain without the final dot, as in `cluster.local`.
    pub cluster_domain: String,
    /// Where names outside the served zones go, in turn. Empty: they are refused at once and nothing is sent anywhere.
    pub upstreams: Vec<SocketAddr>,
    /// Which names exist (pod names, namespaces, endpoint names).
    pub options: Options,
    /// Seconds that answers may be kept by clients, 0 to 3600.
    pub ttl: u32,
    /// Serve published names (hosts of Ingresses, annotated Services) instead of the cluster's own.
    pub published: bool,
    /// Addresses of this server itself, which the NS record of a zone names; found in an EndpointSlice if it is one of a
    /// Service's.
    pub own_addresses: Vec<std::net::IpAddr>,
    /// How long to wait for the first lists before answering regardless.
    pub startup_timeout: Duration,
    /// How long to go on answering after shutdown began, so that the data plane can move clients away.
    pub lame_duck: Duration,
    /// Where to serve `/health`, if at all (CoreDNS: port 8080).
    pub health: Option<SocketAddr>,
    /// Where to serve `/ready`, if at all (CoreDNS: port 8181).
    pub ready: Option<SocketAddr>,
    /// Where to serve `/metrics`, if at all (CoreDNS: port 9153).
    pub metrics: Option<SocketAddr>,
    /// UDP sockets per address, each served on its own.
    pub workers: usize,
}

impl Default for Config {
    fn default() -> Self {
        Config {
            listen: Vec::new(),
            netns: None,
            cluster_domain: "cluster.local".into(),
            upstreams: Vec::new(),
            options: Options::default(),
            ttl: 5,
            published: false,
            own_addresses: Vec::new(),
            startup_timeout: Duration::from_secs(5),
            lame_duck: Duration::ZERO,
            health: None,
            ready: None,
            metrics: None,
            workers: 1,
        }
    }
}

/// Why a DNS server could not start.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// A socket could not be made.
    #[error("cannot listen on {address} ({transport})")]
    Listen {
        /// The address asked for.
        address: SocketAddr,
        /// `udp`, `tcp` or `http`.
        transport: &'static str,
        /// The reason.
        #[source]
        source: std::io::Error,
    },
}

/// Serves DNS until `shutdown`.
///
/// # Errors
/// Fails when a socket cannot be made. Trouble with the API server is no error: the last known names are served.
pub async fn run(
    config: Config,
    client: kube::Client,
    observer: Observer,
    shutdown: CancellationToken,
) -> Result<(), Error> {
    todo!("{config:?} {} {observer:?} {shutdown:?}", client.default_namespace())
}
