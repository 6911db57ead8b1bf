//! What the server is given at start.

use std::io;
use std::net::{IpAddr, SocketAddr};
use std::path::PathBuf;
use std::sync::Arc;

use futures::future::BoxFuture;
use ipnet::IpNet;
use portolan_observe::Observer;
use tokio::io::{AsyncRead, AsyncWrite};

/// A byte stream.
pub trait Io: AsyncRead + AsyncWrite + Send + Unpin + 'static {}
impl<T: AsyncRead + AsyncWrite + Send + Unpin + 'static> Io for T {}

/// A byte stream of any kind.
pub type BoxedIo = Box<dyn Io>;

/// How the server reaches into the cluster: it lives in another network namespace than nodes and pods.
pub trait ClusterDialer: Send + Sync + 'static {
    /// A stream to the kubelet of a node, on which HTTP/1.1 is spoken.
    fn kubelet(&self, node: &str) -> BoxFuture<'static, io::Result<BoxedIo>>;
    /// A TCP connection to an address of the cluster (a pod, for the proxy subresources).
    fn tcp(&self, address: SocketAddr) -> BoxFuture<'static, io::Result<BoxedIo>>;
}

/// A dialer for a server without nodes: everything is unreachable.
#[derive(Clone, Copy, Debug, Default)]
pub struct NoDialer;

impl ClusterDialer for NoDialer {
    fn kubelet(&self, node: &str) -> BoxFuture<'static, io::Result<BoxedIo>> {
        let message = format!("no kubelet can be reached on node {node}");
        Box::pin(async move { Err(io::Error::new(io::ErrorKind::HostUnreachable, message)) })
    }

    fn tcp(&self, address: SocketAddr) -> BoxFuture<'static, io::Result<BoxedIo>> {
        let message = format!("no route to {address}");
        Box::pin(async move { Err(io::Error::new(io::ErrorKind::HostUnreachable, message)) })
    }
}

/// When a write counts as done.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Default)]
pub enum Durability {
    /// After the batch of writes it belongs to has been synced to the disk; an acknowledged write survives `kill -9`
    /// and a power failure.
    #[default]
    Synced,
    /// At once; the journal is synced a few times a second. A crash loses the last moments. For tests and benches.
    Relaxed,
}

/// Configuration of [`crate::Server::start`].
pub struct ServerConfig {
    /// Where objects, keys and certificates are kept. `None`: memory only, all is lost at the end.
    pub data_dir: Option<PathBuf>,
    /// When a write is acknowledged; without meaning in memory.
    pub durability: Durability,
    /// Service address ranges, at most one of each family; the first one is the primary family.
    pub service_cidrs: Vec<IpNet>,
    /// Node ports, first and last.
    pub node_port_range: (u16, u16),
    /// Address that pods reach the API server at: the endpoint of Service default/kubernetes.
    pub advertise: SocketAddr,
    /// Further names and addresses for the serving certificate.
    pub extra_sans: Vec<String>,
    /// Domain of the cluster, `cluster.local`.
    pub cluster_domain: String,
    /// Where to serve, already bound; non-blocking mode is set here. Several are fine, in any network namespace.
    pub listeners: Vec<std::net::TcpListener>,
    /// Way to nodes and pods.
    pub dialer: Arc<dyn ClusterDialer>,
    /// A bearer token that stands for a member of `system:masters`, besides certificates.
    pub admin_token: Option<String>,
    /// Admission plugins that do not run, by their upstream names; for tests that play the controllers themselves.
    pub disable_admission_plugins: Vec<String>,
    /// Metrics and readiness of the process.
    pub observer: Observer,
}

impl ServerConfig {
    /// The defaults of a standalone cluster, in memory, without nodes.
    pub fn new(advertise: SocketAddr) -> ServerConfig {
        ServerConfig {
            data_dir: None,
            durability: Durability::Synced,
            service_cidrs: vec![
                IpNet::new(IpAddr::from([10, 96, 0, 0]), 12).expect("12 is a length of an IPv4 prefix"),
            ],
            node_port_range: (30000, 32767),
            advertise,
            extra_sans: Vec::new(),
            cluster_domain: "cluster.local".to_owned(),
            listeners: Vec::new(),
            dialer: Arc::new(NoDialer),
            admin_token: None,
            // Nothing takes the taint of new Nodes away before there is a node life cycle controller.
            disable_admission_plugins: vec!["TaintNodesByCondition".to_owned()],
            observer: Observer::new(),
        }
    }
}

/// Why the server cannot start.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The data directory or a file in it cannot be used.
    #[error("cannot use {path}")]
    File {
        /// The file or directory.
        path: PathBuf,
        /// What the system says.
        #[source]
        source: io::Error,
    },
    /// The store cannot be opened or read.
    #[error("cannot open the object store")]
    Store(#[from] crate::store::Error),
    /// Keys or certificates cannot be made or read.
    #[error("cannot set up certificates: {0}")]
    Certificates(String),
    /// A listener cannot be used.
    #[error("cannot use a listener")]
    Listener(#[source] io::Error),
    /// The service address ranges are not usable.
    #[error("service ranges: {0}")]
    ServiceRange(String),
    /// The first objects cannot be written.
    #[error("cannot write the initial objects: {0}")]
    Bootstrap(String),
}
