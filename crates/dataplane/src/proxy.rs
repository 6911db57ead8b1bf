//! The service proxy of one node as a plain object: changes in, kernel state out.
//!
//! It owns the whole chain from objects to elements and blocks while it talks to the kernel, so it lives on the applier's
//! thread. Each family is programmed on its own: trouble with one leaves the other alone.

use std::collections::{BTreeMap, BTreeSet};
use std::io;
use std::sync::Arc;
use std::time::{Duration, Instant};

use ipnet::IpNet;
use k8s_openapi::api::core::v1::{Pod, Service};
use k8s_openapi::api::discovery::v1::EndpointSlice;
use portolan_linux::Netns;
use portolan_nft::{Executor, NetlinkExecutor, Op, Transaction};
use portolan_plan::delta::Delta;
use portolan_plan::finding::Finding;
use portolan_plan::service::{Backends, FrontendAddr, HealthCheck, Planner, ServiceMap, ServicePortId, Work};
use portolan_plan::world::{
    HostPortPod, IpFamily, L4, NodeView, ObjectKey, ServiceSpec, Slice, SliceManifest, TrafficPolicy, World,
};
use tracing::{debug, info, warn};

use crate::conntrack::{Conntrack, FlowCleaner, Look};
use crate::layout::{self, SetId};
use crate::render::{Existing, Renderer};

/// Something that changed in the cluster.
#[derive(Clone, Debug)]
pub enum Change {
    /// A Service as it is now; `None` when it is gone or not this proxy's.
    Service(ObjectKey, Option<Arc<ServiceSpec>>),
    /// An EndpointSlice as it is now; `None` when it is gone or ignored.
    Slice(ObjectKey, Option<Arc<Slice>>),
    /// The ranges of a ServiceCIDR; none when it is gone.
    ServiceCidr(String, Vec<IpNet>),
    /// A pod of the node as it is now; `None` when it is gone or has no host ports.
    Pod(ObjectKey, Option<Arc<HostPortPod>>),
    /// The node as it is now.
    Node(NodeView),
}

impl Change {
    /// A Service as it is now.
    pub fn service(service: &Service) -> Change {
        Change::Service(key_of(service), ServiceSpec::parse(service).map(Arc::new))
    }

    /// A Service is gone.
    pub fn service_gone(key: ObjectKey) -> Change {
        Change::Service(key, None)
    }

    /// An EndpointSlice as it is now.
    pub fn slice(slice: &EndpointSlice) -> Change {
        Change::Slice(key_of(slice), Slice::parse(&SliceManifest::from(slice)).map(Arc::new))
    }

    /// An EndpointSlice is gone.
    pub fn slice_gone(key: ObjectKey) -> Change {
        Change::Slice(key, None)
    }

    /// A pod of the node as it is now.
    pub fn pod(pod: &Pod) -> Change {
        Change::Pod(key_of(pod), HostPortPod::parse(pod).map(Arc::new))
    }

    /// A pod of the node is gone.
    pub fn pod_gone(key: ObjectKey) -> Change {
        Change::Pod(key, None)
    }
}

pub(crate) fn key_of<K: kube::Resource>(object: &K) -> ObjectKey {
    ObjectKey::new(object.meta().namespace.clone().unwrap_or_default(), object.meta().name.clone().unwrap_or_default())
}

/// What a sync did.
#[derive(Debug, Default)]
pub struct SyncReport {
    /// Per family: how long it took, whether it was a full one, and why it failed if it did.
    pub families: Vec<FamilyReport>,
    /// Node ports or host ports are different now, see [`crate::loopback`].
    pub loopback_changed: bool,
    /// Services whose health check is different now.
    pub health_checks_changed: bool,
    /// Services that were compiled anew.
    pub services: BTreeSet<ObjectKey>,
}

/// What a sync did in one family.
#[derive(Debug)]
pub struct FamilyReport {
    /// Family.
    pub family: IpFamily,
    /// Time spent, kernel included.
    pub took: Duration,
    /// Whether the table was read back and compared.
    pub full: bool,
    /// Transactions committed.
    pub transactions: usize,
    /// Why the family is not programmed as it should be.
    pub error: Option<portolan_nft::Error>,
}

impl SyncReport {
    /// Whether every family is as it should be.
    pub fn is_ok(&self) -> bool {
        self.families.iter().all(|f| f.error.is_none())
    }
}

#[derive(Debug)]
struct FamilyState {
    renderer: Renderer,
    /// The kernel holds what the renderer gave out; otherwise the next sync reads back and compares.
    in_step: bool,
    /// Reading back and correcting was refused, so that the next sync replaces the table.
    replace: bool,
    idle: Option<Idle>,
}

/// What nothing leads to any more.
#[derive(Debug)]
struct Idle {
    chains: Vec<Arc<str>>,
    /// The renderer's update as of which they are idle.
    round: u64,
    /// When they may go.
    due: Instant,
}

impl Idle {
    /// What the renderer has no use for as of now.
    fn of(renderer: &Renderer, chains: Vec<Arc<str>>) -> Option<Idle> {
        let some = !chains.is_empty() || renderer.has_stale();
        some.then(|| Idle { chains, round: renderer.round(), due: Instant::now() + IDLE })
    }
}

/// Packets that were on their way into a chain when it fell out of use are through long before this.
const IDLE: Duration = Duration::from_secs(1);

/// The service proxy of one node.
pub struct ServiceProxy {
    executor: Box<dyn Executor>,
    flows: Option<FlowCleaner>,
    world: World,
    planner: Planner,
    node: Option<NodeView>,
    dirty: BTreeSet<ObjectKey>,
    families: Vec<FamilyState>,
    udp_pending: bool,
    /// Service ports whose Local policy leaves this node without an endpoint, by family and policy.
    without_local: BTreeMap<(IpFamily, Policy), BTreeSet<ServicePortId>>,
    port_id: u32,
}

impl std::fmt::Debug for ServiceProxy {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("ServiceProxy").field("node", &self.planner.node().name).finish_non_exhaustive()
    }
}

impl ServiceProxy {
    /// A proxy for the kernel of a network namespace.
    ///
    /// # Errors
    /// Fails without the right to open netlink sockets there.
    pub fn new(netns: &Netns, node: NodeView) -> io::Result<ServiceProxy> {
        let executor = netns.run(NetlinkExecutor::new)??;
        let port_id = executor.port_id()?;
        let flows = FlowCleaner::start(Conntrack::open(netns)?)?;
        Ok(ServiceProxy { port_id, ..ServiceProxy::with_executor(Box::new(executor), Some(flows), node) })
    }

    /// A proxy that programs through the given executor.
    pub fn with_executor(executor: Box<dyn Executor>, flows: Option<FlowCleaner>, node: NodeView) -> ServiceProxy {
        let planner = Planner::new(node);
        if let Some(flows) = &flows {
            flows.update(|view, _| view.set_addresses(planner.map()));
        }
        ServiceProxy {
            executor,
            flows,
            world: World::default(),
            planner,
            node: None,
            dirty: BTreeSet::new(),
            families: IpFamily::ALL
                .iter()
                .map(|f| FamilyState { renderer: Renderer::new(*f), in_step: false, replace: false, idle: None })
                .collect(),
            udp_pending: true,
            without_local: BTreeMap::new(),
            port_id: 0,
        }
    }

    /// The number by which the kernel names this proxy when it announces changes of the table; 0 without a kernel.
    pub fn port_id(&self) -> u32 {
        self.port_id
    }

    /// Notes a change; [`ServiceProxy::sync`] puts it into force.
    pub fn change(&mut self, change: Change) {
        match change {
            Change::Service(key, service) => {
                self.world.set_service(&key, service);
                self.dirty.insert(key);
            }
            Change::Slice(key, slice) => self.dirty.extend(self.world.set_slice(&key, slice)),
            Change::ServiceCidr(name, nets) => self.world.put_service_cidr(&name, nets),
            Change::Pod(key, pod) => {
                let key = self.world.set_pod(&key, pod);
                self.dirty.insert(key);
            }
            Change::Node(node) => self.node = Some(node),
        }
    }

    /// Compiles what changed and brings the kernel in step. Blocks for as long as the kernel takes.
    ///
    /// After a failure the family is read back and compared at the next sync, and keeps its last good rules until then.
    pub fn sync(&mut self) -> SyncReport {
        let dirty = std::mem::take(&mut self.dirty);
        let node = self.node.take();
        let node_told = node.is_some();
        let mut delta = match node {
            Some(node) => self.planner.set_node(&self.world, node),
            None => Delta::default(),
        };
        delta.merge(self.planner.update(&self.world, &dirty));
        self.see_flows(&delta, node_told);
        self.count_without_local(&delta);

        let mut report = SyncReport {
            loopback_changed: delta.node
                || delta.services.iter().any(|id| id.service.name.starts_with("pod/"))
                || delta.frontends.iter().any(|f| !matches!(f.addr, FrontendAddr::Address(_)) || f.is_loopback()),
            health_checks_changed: !delta.health_checks.is_empty() || delta.node,
            services: dirty,
            ..SyncReport::default()
        };
        for index in 0..self.families.len() {
            let state = &mut self.families[index];
            if state.in_step && delta.is_empty() {
                continue;
            }
            let family = IpFamily::ALL[index];
            let start = Instant::now();
            let full = !state.in_step || delta.node;
            let result = if full {
                sync_full(
                    self.executor.as_mut(),
                    &mut state.renderer,
                    family,
                    self.planner.map(),
                    self.planner.node(),
                    state.replace,
                )
            } else {
                sync_delta(self.executor.as_mut(), &mut state.renderer, self.planner.map(), self.planner.node(), &delta)
            };
            state.in_step = result.is_ok();
            // What refuses to be corrected (a set of ours that somebody declared otherwise) is replaced as a whole.
            state.replace =
                full && matches!(result, Err(portolan_nft::Error::Refused { .. } | portolan_nft::Error::Text { .. }));
            let (transactions, error) = match result {
                Ok((transactions, chains)) => {
                    // A list that waits already is not put off, unless it is of a table that was read back since.
                    if full || state.idle.is_none() {
                        state.idle = Idle::of(&state.renderer, chains);
                    }
                    (transactions, None)
                }
                Err(error) => {
                    warn!(family = family.as_str(), %error, source = error_source(&error), "cannot program services");
                    (0, Some(error))
                }
            };
            if full && error.is_none() {
                let (elements, chains) = state.renderer.size();
                info!(
                    family = family.as_str(),
                    elements,
                    chains,
                    took_ms = start.elapsed().as_millis() as u64,
                    "services programmed"
                );
            }
            report.families.push(FamilyReport { family, took: start.elapsed(), full, transactions, error });
        }
        if self.udp_pending
            && report.is_ok()
            && let Some(flows) = &self.flows
        {
            self.udp_pending = false;
            flows.look();
        }
        report
    }

    /// When what is not used any more may be removed by [`ServiceProxy::sweep`].
    pub fn sweep_due(&self) -> Option<Instant> {
        self.families.iter().filter_map(|f| f.idle.as_ref().map(|idle| idle.due)).min()
    }

    /// Removes what is not used any more, and answers the families where that failed and is to be tried again.
    pub fn sweep(&mut self) -> Vec<IpFamily> {
        let mut failed = Vec::new();
        for (state, family) in self.families.iter_mut().zip(IpFamily::ALL) {
            let Some(idle) = state.idle.take() else { continue };
            let sweep = state.renderer.sweep(&idle.chains, idle.round);
            match self.executor.commit(&sweep) {
                Ok(()) => {
                    state.renderer.swept(&idle.chains, idle.round);
                    // What fell out of use meanwhile has to wait as well.
                    state.idle = Idle::of(&state.renderer, state.renderer.spare());
                }
                Err(error) => {
                    debug!(family = family.as_str(), %error, "unused chains stay for now");
                    failed.push(family);
                    state.idle = Some(Idle { due: Instant::now() + IDLE, ..idle });
                }
            }
        }
        failed
    }

    /// Makes the next sync read back and compare everything, as after interference from outside.
    pub fn distrust_kernel(&mut self) {
        for state in &mut self.families {
            state.in_step = false;
        }
    }

    /// Whether the kernel is known to be in step.
    pub fn in_step(&self, family: IpFamily) -> bool {
        self.families.iter().zip(IpFamily::ALL).any(|(s, f)| f == family && s.in_step)
    }

    /// What is in force, or will be after the next sync.
    pub fn map(&self) -> &ServiceMap {
        self.planner.map()
    }

    /// How much was looked at since the start.
    pub fn work(&self) -> Work {
        self.planner.work()
    }

    /// The node that is programmed for.
    pub fn node(&self) -> &NodeView {
        self.planner.node()
    }

    /// Health checks of all Services.
    pub fn health_checks(&self) -> &BTreeMap<ObjectKey, HealthCheck> {
        &self.planner.map().health_checks
    }

    /// Findings about some Services.
    pub fn findings_of<'a>(&'a self, keys: &'a BTreeSet<ObjectKey>) -> impl Iterator<Item = Finding> + 'a {
        keys.iter().flat_map(|key| self.planner.findings_of(key))
    }

    /// Service ports whose Local policy leaves this node without an endpoint: internal and external, for metrics.
    pub fn without_local_endpoints(&self, family: IpFamily) -> (usize, usize) {
        let count = |policy| self.without_local.get(&(family, policy)).map_or(0, BTreeSet::len);
        (count(Policy::Internal), count(Policy::External))
    }

    /// Calls `report` after each look at the UDP flows, on another thread.
    pub fn report_flows(&self, report: impl Fn(Look) + Send + 'static) {
        if let Some(flows) = &self.flows {
            flows.report_to(report);
        }
    }

    /// Waits until UDP flows have been looked at since the last sync; false when that takes longer than `limit`.
    pub fn flows_settled(&self, limit: Duration) -> bool {
        self.flows.as_ref().is_none_or(|flows| flows.settled(limit))
    }

    /// Removes everything that was programmed; for an explicit clean-up, never at exit.
    pub fn wipe(&mut self) -> Result<(), portolan_nft::Error> {
        for family in IpFamily::ALL {
            let table = layout::table(family);
            let transaction = Transaction { table, ops: vec![Op::AddTable, Op::DeleteTable] };
            self.executor.commit(&transaction)?;
        }
        self.distrust_kernel();
        Ok(())
    }

    fn see_flows(&mut self, delta: &Delta, node_told: bool) {
        let udp: BTreeSet<ObjectKey> =
            delta.services.iter().filter(|id| id.protocol == L4::Udp).map(|id| ObjectKey::clone(&id.service)).collect();
        self.udp_pending |= !udp.is_empty() || delta.frontends.iter().any(|f| f.protocol == L4::Udp);
        let Some(flows) = &self.flows else { return };
        let frontends = self.planner.frontends_of(&udp);
        let map = self.planner.map();
        flows.update(|view, look| {
            view.update(map, frontends.into_iter().chain(delta.frontends.iter().copied()), look);
            if node_told || delta.node {
                view.set_addresses(map);
            }
        });
    }

    fn count_without_local(&mut self, delta: &Delta) {
        for id in &delta.services {
            let service = self.planner.map().services.get(id);
            let internal =
                service.is_some_and(|s| s.internal_policy == TrafficPolicy::Local && s.internal == Backends::Drop);
            let external =
                service.is_some_and(|s| s.external_policy == TrafficPolicy::Local && s.external == Backends::Drop);
            for (policy, without) in [(Policy::Internal, internal), (Policy::External, external)] {
                let set = self.without_local.entry((id.family, policy)).or_default();
                if without {
                    set.insert(id.clone());
                } else {
                    set.remove(id);
                }
            }
        }
    }
}

/// Which of the two traffic policies of a Service.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
enum Policy {
    Internal,
    External,
}

fn error_source(error: &portolan_nft::Error) -> String {
    std::error::Error::source(error).map(ToString::to_string).unwrap_or_default()
}

/// Answers how many transactions it took, and the chains that are not used any more.
type Synced = Result<(usize, Vec<Arc<str>>), portolan_nft::Error>;

fn sync_full(
    executor: &mut dyn Executor,
    renderer: &mut Renderer,
    family: IpFamily,
    map: &ServiceMap,
    node: &NodeView,
    replace: bool,
) -> Synced {
    let table = layout::table(family);
    let mut existing = Existing { chains: executor.chains(&table)?.into_iter().collect(), ..Existing::default() };
    if replace {
        existing.chains.remove(layout::MARKER);
        existing.chains.insert(String::new()); // There is a table, whatever it holds.
    }
    if existing.is_ours() {
        for id in SetId::ALL.iter().filter(|id| **id != SetId::Affinity) {
            // A set of another shape cannot be read as ours; it is found out when it cannot be used.
            match executor.elements(&table, renderer.sets().get(*id)) {
                Ok(elements) => {
                    let elements = elements.unwrap_or_default();
                    existing.elements.extend(elements.into_iter().map(|e| ((*id, e.key.clone()), e)));
                }
                Err(portolan_nft::Error::Protocol { what }) => warn!(set = id.name(), what, "cannot be read back"),
                Err(error) => return Err(error),
            }
        }
    }
    let mut transactions = 0;
    let unused = renderer.full(map, node, existing, &mut |transaction| {
        transactions += 1;
        executor.commit(&transaction)
    })?;
    // Chains that were never ours go at once; only into ours a packet may be about to go.
    let (mut ours, foreign): (Vec<_>, Vec<_>) = unused.into_iter().partition(|c| layout::is_pick_chain(c));
    if !foreign.is_empty()
        && let Err(error) = executor.commit(&renderer.sweep(&foreign, renderer.round()))
    {
        debug!(%error, "foreign chains stay for now");
        ours.extend(foreign);
    }
    Ok((transactions, ours))
}

fn sync_delta(
    executor: &mut dyn Executor,
    renderer: &mut Renderer,
    map: &ServiceMap,
    node: &NodeView,
    delta: &Delta,
) -> Synced {
    let transactions = renderer.update(map, node, delta);
    for transaction in &transactions {
        executor.commit(transaction)?;
    }
    Ok((transactions.len(), renderer.spare()))
}
