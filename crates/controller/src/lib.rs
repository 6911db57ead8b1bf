//! The controllers of a cluster: EndpointSlices and Endpoints, workloads, scheduling, garbage collection, namespaces, service
//! accounts and the life cycle of nodes.
//!
//! Each controller is a pure decision (objects in, writes out) and a thin shell that reads the shared [`cache::Caches`] and
//! performs the writes. They work against any API server. Allocation of cluster IPs and node ports is not here but in the API
//! server, where it is part of the write; load-balancer addresses belong to the `lb` crate.

#![cfg_attr(test, allow(clippy::unwrap_used))]

pub mod cache;
pub mod clock;
pub mod cronjob;
pub mod daemonset;
pub mod deployment;
mod discovery;
mod endpoints;
pub mod gc;
pub mod job;
mod metrics;
pub mod namespace;
pub mod node;
pub mod pods;
pub mod queue;
pub mod replicaset;
pub mod replicationcontroller;
pub mod scheduler;
pub mod selector;
pub mod serviceaccount;
pub mod statefulset;
mod util;

use std::collections::BTreeSet;

use portolan_client::EventRecorder;
use portolan_client::leader::{Election, campaign};
use portolan_observe::Observer;
use tokio::task::JoinSet;
use tokio_util::sync::CancellationToken;

use cache::Caches;
use clock::Clock;
use metrics::Metrics;

/// A controller that can be switched on, by the name it has in Kubernetes.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
#[allow(missing_docs)]
pub enum Controller {
    EndpointSlice,
    Endpoints,
    EndpointSliceMirroring,
    Deployment,
    ReplicaSet,
    StatefulSet,
    DaemonSet,
    Job,
    CronJob,
    ReplicationController,
    Scheduler,
    GarbageCollector,
    Namespace,
    ServiceAccount,
    RootCaPublisher,
    NodeLifecycle,
    PodGarbageCollector,
}

impl Controller {
    /// All of them.
    pub const ALL: [Controller; 17] = [
        Controller::EndpointSlice,
        Controller::Endpoints,
        Controller::EndpointSliceMirroring,
        Controller::Deployment,
        Controller::ReplicaSet,
        Controller::StatefulSet,
        Controller::DaemonSet,
        Controller::Job,
        Controller::CronJob,
        Controller::ReplicationController,
        Controller::Scheduler,
        Controller::GarbageCollector,
        Controller::Namespace,
        Controller::ServiceAccount,
        Controller::RootCaPublisher,
        Controller::NodeLifecycle,
        Controller::PodGarbageCollector,
    ];

    /// The name as in `kube-controller-manager --controllers`.
    pub fn name(self) -> &'static str {
        match self {
            Controller::EndpointSlice => "endpointslice-controller",
            Controller::Endpoints => "endpoints-controller",
            Controller::EndpointSliceMirroring => "endpointslice-mirroring-controller",
            Controller::Deployment => "deployment-controller",
            Controller::ReplicaSet => "replicaset-controller",
            Controller::StatefulSet => "statefulset-controller",
            Controller::DaemonSet => "daemonset-controller",
            Controller::Job => "job-controller",
            Controller::CronJob => "cronjob-controller",
            Controller::ReplicationController => "replicationcontroller-controller",
            Controller::Scheduler => "scheduler",
            Controller::GarbageCollector => "garbage-collector-controller",
            Controller::Namespace => "namespace-controller",
            Controller::ServiceAccount => "serviceaccount-controller",
            Controller::RootCaPublisher => "root-ca-certificate-publisher-controller",
            Controller::NodeLifecycle => "node-lifecycle-controller",
            Controller::PodGarbageCollector => "pod-garbage-collector-controller",
        }
    }

    /// Reads [`Controller::name`].
    pub fn parse(name: &str) -> Option<Controller> {
        Controller::ALL.into_iter().find(|c| c.name() == name)
    }
}

/// Which controllers run, and with what.
#[derive(Clone, Debug)]
pub struct Config {
    /// The controllers to run.
    pub enabled: BTreeSet<Controller>,
    /// The cluster's root certificates in PEM, published in every namespace; without it nothing is published.
    pub cluster_ca: Option<String>,
    /// Endpoints in one EndpointSlice at most, 1 to 1000.
    pub max_endpoints_per_slice: usize,
    /// Take part in this election first, and run only while leading. For controllers in a process of their own.
    pub leader_election: Option<Election>,
    /// The time that life cycles, deadlines and schedules go by.
    pub clock: Clock,
}

impl Default for Config {
    /// Everything, without an election.
    fn default() -> Config {
        Config {
            enabled: Controller::ALL.into_iter().collect(),
            cluster_ca: None,
            max_endpoints_per_slice: portolan_plan::slices::MAX_ENDPOINTS_PER_SLICE,
            leader_election: None,
            clock: Clock::default(),
        }
    }
}

/// Why the controllers ended.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// Another candidate leads now; the process should start over.
    #[error("lost the leadership of lease {namespace}/{name}")]
    LostLeadership {
        /// Namespace of the Lease.
        namespace: String,
        /// Name of the Lease.
        name: String,
    },
    /// A controller ended by a panic.
    #[error("controller ended unexpectedly")]
    Panicked(#[source] tokio::task::JoinError),
}

/// What every controller gets.
#[derive(Clone)]
pub(crate) struct Context {
    client: kube::Client,
    caches: Caches,
    shutdown: CancellationToken,
    clock: Clock,
    metrics: Metrics,
}

impl Context {
    fn queue<K: Clone + Eq + std::hash::Hash + std::fmt::Debug + Send + Sync + 'static>(
        &self,
        name: &'static str,
    ) -> queue::Queue<K> {
        queue::Queue::measured(name, self.clock.clone(), &self.metrics)
    }

    fn recorder(&self, component: &str) -> EventRecorder {
        EventRecorder::new(self.client.clone(), component, None)
    }
}

/// Runs the controllers until `shutdown`, or until leadership is lost. Opens the readiness gate `controllers` when all caches
/// are filled and all controllers work.
pub async fn run(
    config: Config,
    client: kube::Client,
    observer: Observer,
    shutdown: CancellationToken,
) -> Result<(), Error> {
    let gate = observer.gate("controllers");
    let stop = shutdown.child_token();
    let mut leadership = None;
    if let Some(election) = &config.leader_election {
        gate.not_ready("waiting for leadership");
        let mut leads = campaign(client.clone(), election.clone(), shutdown.clone());
        tokio::select! {
            () = shutdown.cancelled() => return Ok(()),
            // The campaign ends only at shutdown.
            _ = leads.wait_for(|leads| *leads) => {}
        }
        leadership = Some((leads, election.clone()));
    }
    let metrics = Metrics::default();
    metrics.register(&observer);
    let context = Context {
        client: client.clone(),
        caches: Caches::default(),
        shutdown: stop.clone(),
        clock: config.clock.clone(),
        metrics,
    };
    let kinds = discovery::Kinds::new(client.clone());
    let mut tasks = JoinSet::new();
    let on = |controller| config.enabled.contains(&controller);
    // Handlers are registered here, before any cache is filled; the futures begin after that.
    let mut controllers: Vec<futures::future::BoxFuture<'static, ()>> = Vec::new();
    let slices = on(Controller::EndpointSlice);
    let legacy = on(Controller::Endpoints);
    let mirroring = on(Controller::EndpointSliceMirroring);
    if slices || legacy || mirroring {
        let which = endpoints::Which { slices, legacy, mirroring, max_per_slice: config.max_endpoints_per_slice };
        controllers.push(Box::pin(endpoints::start(context.clone(), which)));
    }
    if on(Controller::Deployment) {
        controllers.push(Box::pin(deployment::start(context.clone())));
    }
    if on(Controller::ReplicaSet) {
        controllers.push(Box::pin(replicaset::start(context.clone())));
    }
    if on(Controller::StatefulSet) {
        controllers.push(Box::pin(statefulset::start(context.clone())));
    }
    if on(Controller::DaemonSet) {
        controllers.push(Box::pin(daemonset::start(context.clone())));
    }
    if on(Controller::Job) {
        controllers.push(Box::pin(job::start(context.clone())));
    }
    if on(Controller::CronJob) {
        controllers.push(Box::pin(cronjob::start(context.clone())));
    }
    if on(Controller::ReplicationController) {
        controllers.push(Box::pin(replicationcontroller::start(context.clone())));
    }
    if on(Controller::Scheduler) {
        controllers.push(Box::pin(scheduler::start(context.clone())));
    }
    if on(Controller::Namespace) {
        controllers.push(Box::pin(namespace::start(context.clone(), kinds.clone())));
    }
    let root_ca = config.cluster_ca.clone().filter(|_| on(Controller::RootCaPublisher));
    if on(Controller::ServiceAccount) || root_ca.is_some() {
        controllers.push(Box::pin(serviceaccount::start(context.clone(), on(Controller::ServiceAccount), root_ca)));
    }
    if on(Controller::NodeLifecycle) {
        controllers.push(Box::pin(node::start_lifecycle(context.clone())));
    }
    if on(Controller::PodGarbageCollector) {
        controllers.push(Box::pin(node::start_pod_gc(context.clone())));
    }
    if on(Controller::GarbageCollector) {
        controllers.push(Box::pin(gc::start(context.clone(), kinds.clone())));
    }
    context.caches.start(&client, &stop).await;
    for controller in controllers {
        tasks.spawn(controller);
    }
    gate.ready();
    let lost = async {
        match &mut leadership {
            Some((leads, _)) => {
                let _ = leads.wait_for(|leads| !*leads).await;
            }
            None => std::future::pending().await,
        }
    };
    let mut result = Ok(());
    tokio::select! {
        () = shutdown.cancelled() => {}
        () = lost => {
            // At shutdown the lease is given back, which is no loss.
            if let Some((_, election)) = leadership.as_ref().filter(|_| !shutdown.is_cancelled()) {
                result = Err(Error::LostLeadership { namespace: election.namespace.clone(), name: election.name.clone() });
            }
        }
        Some(ended) = tasks.join_next() => {
            if let Err(error) = ended {
                result = Err(Error::Panicked(error));
            }
        }
    }
    gate.not_ready("stopping");
    stop.cancel();
    while let Some(ended) = tasks.join_next().await {
        if let Err(error) = ended
            && result.is_ok()
        {
            result = Err(Error::Panicked(error));
        }
    }
    result
}
