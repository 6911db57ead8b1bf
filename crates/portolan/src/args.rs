//! What may be typed. Each command turns its arguments into the typed configuration of the component it runs.

use std::ffi::OsString;
use std::net::{IpAddr, SocketAddr};
use std::path::PathBuf;

use clap::{Args, Parser, Subcommand, ValueEnum};

use crate::exec::Place;
use crate::state::ClusterName;

/// Kubernetes service networking in one binary: Services, DNS, Ingress, load balancers, and a cluster to run them on.
#[derive(Debug, Parser)]
#[command(name = "portolan", version, disable_help_subcommand = true, arg_required_else_help = true)]
pub struct Cli {
    #[command(subcommand)]
    pub command: Command,
}

#[derive(Debug, Subcommand)]
pub enum Command {
    /// Start a standalone cluster: API server, controllers, nodes, pods, all in namespaces of their own
    Up(Up),
    /// Stop a standalone cluster and remove every process, namespace and mount that it made
    Down(Down),
    /// Say what runs, where, and whether it is ready; exit code 1 if it is not
    Status(Status),
    /// Print the path of a cluster's kubeconfig
    Kubeconfig(Named),
    /// Run a command of this machine inside a cluster's network
    Exec(Exec),
    /// Container images of a standalone cluster
    #[command(subcommand)]
    Image(Image),
    /// The service proxy of one node: programs Services into its kernel
    Proxy(Proxy),
    /// The cluster's DNS server
    Dns(Dns),
    /// The Ingress controller
    Gateway(Gateway),
    /// Controllers: EndpointSlices, workloads, scheduling, garbage collection
    Controller(Controller),
    /// The load-balancer controller
    Lb(Lb),
    /// The API server alone
    Apiserver(Apiserver),
    /// Print the rules that the service proxy would apply for manifests or for a running cluster
    Plan(Plan),
    /// An HTTP, TCP and UDP server that answers with what it sees (image portolan.dev/echo)
    Echo(Echo),
}

#[derive(Debug, Args)]
pub struct Named {
    /// Name of the cluster
    #[arg(long, default_value = "default")]
    pub name: ClusterName,
}

#[derive(Debug, Args)]
pub struct Up {
    #[command(flatten)]
    pub named: Named,
    /// Number of nodes
    #[arg(long, default_value_t = 2, value_parser = clap::value_parser!(u8).range(1..=i64::from(crate::fabric::MAX_NODES)))]
    pub nodes: u8,
    /// Number of topology zones, given to the nodes in turn
    #[arg(long, default_value_t = 2, value_parser = clap::value_parser!(u8).range(1..=26))]
    pub zones: u8,
    /// Where objects, keys and images are kept [default: /var/lib/portolan/NAME]
    #[arg(long, value_name = "DIR")]
    pub data_dir: Option<PathBuf>,
    /// Return when the cluster is ready, leaving it running
    #[arg(long)]
    pub detach: bool,
    /// Port of the API server on 127.0.0.1; 0 for any free one [default: 6443 if free]
    #[arg(long, value_name = "PORT")]
    pub api_port: Option<u16>,
    /// Port of 127.0.0.1 where the Ingress is published for HTTP; 0 for any free one [default: 8080 if free]
    #[arg(long, value_name = "PORT")]
    pub http_port: Option<u16>,
    /// Port of 127.0.0.1 where the Ingress is published for HTTPS; 0 for any free one [default: 8443 if free]
    #[arg(long, value_name = "PORT")]
    pub https_port: Option<u16>,
    /// Name server for names outside the cluster; without it they are refused and nothing leaves the machine
    #[arg(long, value_name = "ADDRESS")]
    pub dns_upstream: Vec<Upstream>,
    /// Fetch missing images from their registries
    #[arg(long)]
    pub allow_pull: bool,
    /// OCI runtime program
    #[arg(long, default_value = "crun", value_name = "PROGRAM")]
    pub runtime: PathBuf,
    /// Most seconds to wait until the cluster is ready
    #[arg(long, default_value_t = 60, value_name = "SECONDS")]
    pub wait: u64,
    /// Run as the background part of --detach
    #[arg(long, hide = true)]
    pub background: bool,
}

/// A name server: an address, with port 53 unless given.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Upstream(pub SocketAddr);

impl std::str::FromStr for Upstream {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        text.parse()
            .or_else(|_| text.parse::<IpAddr>().map(|ip| SocketAddr::new(ip, 53)))
            .map(Upstream)
            .map_err(|_| "expected an IP address, with or without a port".into())
    }
}

impl std::fmt::Display for Upstream {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        self.0.fmt(f)
    }
}

#[derive(Debug, Args)]
pub struct Down {
    #[command(flatten)]
    pub named: Named,
    /// Also remove the cluster's data: objects, keys, images
    #[arg(long)]
    pub purge: bool,
}

#[derive(Debug, Args)]
pub struct Status {
    #[command(flatten)]
    pub named: Named,
    /// Output format
    #[arg(short, long, value_enum, default_value_t = Output::Text)]
    pub output: Output,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum Output {
    /// For people
    Text,
    /// For scripts
    Json,
}

#[derive(Debug, Args)]
pub struct Exec {
    #[command(flatten)]
    pub named: Named,
    /// Where to run: outside, router, node/NAME or pod/NAMESPACE/NAME
    #[arg(long = "in", default_value = "outside", value_name = "PLACE")]
    pub place: Place,
    /// The command and its arguments
    #[arg(required = true, trailing_var_arg = true, allow_hyphen_values = true)]
    pub command: Vec<OsString>,
}

#[derive(Debug, Subcommand)]
pub enum Image {
    /// Add the images of an OCI layout archive or a `docker save` archive to a cluster's store
    Import(ImageImport),
    /// List the images of a cluster's store
    List(ImageList),
    /// Remove images that no container runs from, with the layers that no other image needs
    #[command(alias = "rm")]
    Remove(ImageRemove),
}

#[derive(Debug, Args)]
pub struct ImageList {
    #[command(flatten)]
    pub named: Named,
    /// Where the cluster keeps its data [default: that of the running cluster, else /var/lib/portolan/NAME]
    #[arg(long, value_name = "DIR")]
    pub data_dir: Option<PathBuf>,
}

#[derive(Debug, Args)]
pub struct ImageRemove {
    #[command(flatten)]
    pub named: Named,
    /// Where the cluster keeps its data [default: that of the running cluster, else /var/lib/portolan/NAME]
    #[arg(long, value_name = "DIR")]
    pub data_dir: Option<PathBuf>,
    /// Remove every image that no container runs from
    #[arg(long, conflicts_with = "images")]
    pub unused: bool,
    /// References (nginx:1.27) or ids (sha256:...) as `portolan image list` shows them
    #[arg(value_name = "IMAGE", required_unless_present = "unused")]
    pub images: Vec<String>,
}

#[derive(Debug, Args)]
pub struct ImageImport {
    #[command(flatten)]
    pub named: Named,
    /// Where the cluster keeps its data [default: that of the running cluster, else /var/lib/portolan/NAME]
    #[arg(long, value_name = "DIR")]
    pub data_dir: Option<PathBuf>,
    /// The archive
    pub file: PathBuf,
}

#[derive(Debug, Args)]
pub struct Connection {
    /// Kubeconfig; without it KUBECONFIG, ~/.kube/config or the pod's service account is used
    #[arg(long, value_name = "FILE")]
    pub kubeconfig: Option<PathBuf>,
}

#[derive(Debug, Args)]
pub struct Proxy {
    #[command(flatten)]
    pub connection: Connection,
    /// Name of this node's Node object
    #[arg(long, env = "NODE_NAME")]
    pub node_name: String,
    /// Network namespace of the node, as a path; the process's own without it
    #[arg(long, value_name = "PATH")]
    pub netns: Option<PathBuf>,
    /// Interfaces of local pods begin with this
    #[arg(long, default_value = "vp")]
    pub pod_interface_prefix: String,
    /// Source networks of pods; recognises local pods when --pod-interface-prefix is empty
    #[arg(long, value_name = "CIDR", value_delimiter = ',')]
    pub cluster_cidr: Vec<ipnet::IpNet>,
    /// Masquerade everything sent to cluster IPs
    #[arg(long)]
    pub masquerade_all: bool,
    /// Addresses that carry node ports: CIDRs, or primary or all; localhost beside them adds loopback addresses
    #[arg(long, value_name = "CIDR|KEYWORD", value_delimiter = ',', default_value = "primary")]
    pub nodeport_addresses: Vec<String>,
    /// Where /healthz and /livez of the proxy are served
    #[arg(long, default_value = "0.0.0.0:10256")]
    pub healthz_address: SocketAddr,
    /// Where /metrics, /proxyMode and /readyz are served
    #[arg(long, default_value = "127.0.0.1:10249")]
    pub metrics_address: SocketAddr,
}

#[derive(Debug, Args)]
pub struct Dns {
    #[command(flatten)]
    pub connection: Connection,
    /// Addresses to answer on
    #[arg(long, default_value = "0.0.0.0:53", value_name = "ADDRESS:PORT")]
    pub listen: Vec<SocketAddr>,
    /// DNS suffix of the cluster
    #[arg(long, default_value = "cluster.local")]
    pub cluster_domain: String,
    /// Name server for other names; without it they are refused
    #[arg(long, value_name = "ADDRESS")]
    pub upstream: Vec<Upstream>,
}

#[derive(Debug, Args)]
pub struct Gateway {
    #[command(flatten)]
    pub connection: Connection,
    /// Address for HTTP
    #[arg(long, default_value = "0.0.0.0:80", value_name = "ADDRESS:PORT")]
    pub http: Vec<SocketAddr>,
    /// Address for HTTPS
    #[arg(long, default_value = "0.0.0.0:443", value_name = "ADDRESS:PORT")]
    pub https: Vec<SocketAddr>,
    /// Service whose addresses are written to the status of Ingresses, as NAMESPACE/NAME
    #[arg(long, value_name = "NAMESPACE/NAME")]
    pub publish_service: Option<String>,
    /// Where /healthz and /metrics are served
    #[arg(long, default_value = "0.0.0.0:10254")]
    pub metrics_address: SocketAddr,
    /// Threads that serve connections [default: one per core]
    #[arg(long)]
    pub workers: Option<std::num::NonZeroUsize>,
}

#[derive(Debug, Args)]
pub struct Controller {
    #[command(flatten)]
    pub connection: Connection,
    /// Take part in leader election first, so that several may run
    #[arg(long, num_args = 0..=1, require_equals = true, default_value_t = true, default_missing_value = "true",
        action = clap::ArgAction::Set)]
    pub leader_elect: bool,
    /// The controllers to run: names, * for all, -NAME for all but this one
    #[arg(long, value_name = "NAMES", value_delimiter = ',', default_value = "*", allow_hyphen_values = true)]
    pub controllers: Vec<String>,
    /// Endpoints in one EndpointSlice at most
    #[arg(long, value_name = "N", default_value_t = 100, value_parser = clap::value_parser!(u16).range(1..=1000))]
    pub max_endpoints_per_slice: u16,
    /// Where /healthz and /metrics are served
    #[arg(long, default_value = "127.0.0.1:10257")]
    pub metrics_address: SocketAddr,
}

#[derive(Debug, Args)]
pub struct Lb {
    #[command(flatten)]
    pub connection: Connection,
    /// Network namespace that holds the addresses, as a path; the process's own without it
    #[arg(long, value_name = "PATH")]
    pub netns: Option<PathBuf>,
    /// Addresses to hand out
    #[arg(long, value_name = "CIDR", required = true)]
    pub pool: Vec<ipnet::IpNet>,
    /// Where /healthz and /metrics are served
    #[arg(long, default_value = "127.0.0.1:10258")]
    pub metrics_address: SocketAddr,
}

#[derive(Debug, Args)]
pub struct Apiserver {
    /// Where objects and keys are kept; in memory only without it
    #[arg(long, value_name = "DIR")]
    pub data_dir: Option<PathBuf>,
    /// Address to listen on
    #[arg(long, default_value = "127.0.0.1:6443", value_name = "ADDRESS:PORT")]
    pub listen: SocketAddr,
    /// Folder to write ca.crt, an administrator's token and a kubeconfig to
    #[arg(long, value_name = "DIR")]
    pub credentials_out: Option<PathBuf>,
    /// Ranges of cluster IPs: one, or one of each family
    #[arg(long, default_value = "10.96.0.0/12", value_name = "CIDR", value_delimiter = ',')]
    pub service_cluster_ip_range: Vec<ipnet::IpNet>,
    /// Address at which pods reach the server: the endpoint of Service default/kubernetes [default: the one it listens on]
    #[arg(long, value_name = "ADDRESS:PORT")]
    pub advertise_address: Option<SocketAddr>,
    /// Admission plugins that do not run
    #[arg(long, value_name = "NAMES", value_delimiter = ',')]
    pub disable_admission_plugins: Vec<String>,
    /// Also run these controllers: names, * for all, -NAME for all but this one
    #[arg(long, value_name = "NAMES", value_delimiter = ',', allow_hyphen_values = true)]
    pub controllers: Vec<String>,
}

#[derive(Debug, Args)]
pub struct Plan {
    #[command(flatten)]
    pub connection: Connection,
    /// Read manifests from this file or folder instead of a cluster
    #[arg(short, long, value_name = "PATH")]
    pub filename: Option<PathBuf>,
    /// The node to plan for
    #[arg(long, default_value = "node-1")]
    pub node_name: String,
}

#[derive(Debug, Args)]
pub struct Echo {
    /// Ports for HTTP [default: 8080, if no other port is given]
    #[arg(long)]
    pub port: Vec<u16>,
    /// Ports that answer each TCP connection
    #[arg(long)]
    pub tcp_port: Vec<u16>,
    /// Ports that answer each UDP datagram
    #[arg(long)]
    pub udp_port: Vec<u16>,
}
