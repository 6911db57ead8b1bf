//! Load balancers: the service controller and its provider `local`.
//!
//! Input are Services of type LoadBalancer with their EndpointSlices, and Nodes; output are addresses in their status, Events,
//! and the data path of the provider. Decisions are pure (`portolan_plan::announce`, [`decide`]); the service controller
//! acts on them with the events, finalizer and retries of Kubernetes' own.

mod controller;
pub mod decide;
mod local;
pub mod provider;
pub mod rules;

use std::collections::BTreeSet;

use ipnet::IpNet;
use portolan_linux::Netns;
use portolan_observe::Observer;
use portolan_plan::announce::Pool;
use tokio_util::sync::CancellationToken;

pub use local::Local;

/// The class that this provider answers to besides no class at all.
pub const CLASS: &str = "lb.portolan.dev/local";

/// What the load balancers are told at start.
#[derive(Clone, Debug)]
pub struct Config {
    /// The namespace in front of the nodes that holds the addresses and forwards.
    pub netns: Netns,
    /// Where addresses come from.
    pub pools: Vec<Pool>,
    /// Values of `spec.loadBalancerClass` that are ours.
    pub classes: BTreeSet<String>,
    /// Whether Services without a class are ours.
    pub default_class: bool,
}

impl Config {
    /// Load balancers in `netns` with addresses of one pool, for Services without a class and of class [`CLASS`].
    pub fn new(netns: Netns, networks: Vec<IpNet>) -> Config {
        let pools = vec![Pool::new("default", networks)];
        Config { netns, pools, classes: [CLASS.to_string()].into(), default_class: true }
    }
}

/// Why the load balancers could not start.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The namespace cannot be used.
    #[error("cannot set up load balancers in {netns}: {source}")]
    Setup {
        /// Path of the namespace.
        netns: String,
        /// The reason.
        source: provider::ProviderError,
    },
}

/// Runs the service controller with provider `local` until `shutdown`. The data path stays as it is then, and a next run
/// takes it over.
///
/// # Errors
/// Fails when the namespace cannot be used. Later failures become events of the Services concerned and are tried again.
pub async fn run(
    config: Config,
    client: kube::Client,
    observer: Observer,
    shutdown: CancellationToken,
) -> Result<(), Error> {
    let gate = observer.gate("load-balancer");
    let netns = config.netns.path().display().to_string();
    let local = Local::new(config.netns, config.pools).map_err(|source| Error::Setup { netns, source })?;
    let classes = decide::Classes { names: config.classes, default: config.default_class };
    let controller = controller::Controller::new(Box::new(local), classes, client, &observer, gate);
    shutdown.run_until_cancelled(controller.run()).await;
    Ok(())
}
