//! What a kubelet needs to know, and the errors of starting one.

use std::net::IpAddr;
use std::path::PathBuf;

use ipnet::IpNet;
use portolan_linux::Netns;

use crate::ImageStore;

/// Everything one kubelet needs. Directories are the cluster's: each node keeps to its own part of them.
#[derive(Clone, Debug)]
pub struct NodeConfig {
    /// Name of the Node object.
    pub name: String,
    /// Value of the label `topology.kubernetes.io/zone`; empty means no label.
    pub zone: String,
    /// The node's network namespace. Its addresses, forwarding and routes to other nodes are the caller's work.
    pub netns: Netns,
    /// Addresses for pods. The first host address is the pods' gateway.
    pub pod_cidr: IpNet,
    /// The node's own address, reported as InternalIP.
    pub node_ip: IpAddr,
    /// Name servers for pods with a cluster DNS policy; empty makes them fall back to the host's with a Warning event.
    pub cluster_dns: Vec<IpAddr>,
    /// DNS suffix of the cluster, without dots at the ends.
    pub cluster_domain: String,
    /// Logs, writable layers and emptyDir volumes live below `{state_dir}/node/{name}`.
    pub state_dir: PathBuf,
    /// Namespaces, bundles and runtime state live below `{run_dir}/node/{name}`. Nothing there survives [`crate::cleanup`].
    pub run_dir: PathBuf,
    /// Where images are looked up.
    pub images: ImageStore,
    /// Whether a missing image may be fetched from its registry.
    pub allow_pull: bool,
    /// The OCI runtime program.
    pub runtime: RuntimeConfig,
    /// The file that dnsPolicy Default copies from; `/etc/resolv.conf` on a real host. `None` gives pods no name server there.
    pub host_resolv_conf: Option<PathBuf>,
    /// How many pods the node says it takes.
    pub max_pods: u32,
}

/// How containers are run.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct RuntimeConfig {
    /// The runtime program; found through PATH when it has no slash.
    pub program: PathBuf,
}

impl Default for RuntimeConfig {
    fn default() -> Self {
        RuntimeConfig { program: PathBuf::from("crun") }
    }
}

/// Why a kubelet did not start or had to stop.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// The runtime program is not usable.
    #[error("cannot run {program}: install the Debian package crun, or name another OCI runtime")]
    Runtime {
        /// The program that was tried.
        program: PathBuf,
        /// The reason.
        #[source]
        source: std::io::Error,
    },
    /// A directory could not be made or read.
    #[error("cannot {action} {path}")]
    File {
        /// What was attempted.
        action: &'static str,
        /// The file or directory.
        path: PathBuf,
        /// The reason.
        #[source]
        source: std::io::Error,
    },
    /// What a dead agent left could not be removed.
    #[error("cannot remove what an earlier run left in {path}")]
    Leftovers {
        /// The directory.
        path: PathBuf,
        /// The reason.
        #[source]
        source: std::io::Error,
    },
    /// The Node object could not be written.
    #[error("cannot register node {node}")]
    Register {
        /// The node.
        node: String,
        /// The reason.
        #[source]
        source: Box<kube::Error>,
    },
    /// The pod range has no room for a gateway and a pod.
    #[error("pod range {0} is too small: it needs at least four addresses")]
    PodCidr(IpNet),
}
