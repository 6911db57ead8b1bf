//! The service proxy of one node as a plain object: changes in, kernel state out.
//!
//! It owns the whole chain from objects to elements and blocks while it talks to the kernel, so it lives on the applier's
//! thread. Each family is programmed on its own: trouble with one leaves the other alone.

use std::collections::{BTreeMap, BTreeSet};
use std::io;
use std::sync::Arc;
use std::time::{Duration, Instant};

use ipnet::IpNet;
use k8s_openapi::api::core::v1::Service;
use k8s_openapi::api::discovery::v1::EndpointSlice;
use portolan_linux::Netns;
use portolan_nft::{Executor, NetlinkExecutor, Op, Transaction};
use portolan_plan::delta::Delta;
use portolan_plan::finding::Finding;
use portolan_plan::service::{Backends, Frontend, HealthCheck, Planner, ServiceMap};
use portolan_plan::world::{IpFamily, L4, NodeView, ObjectKey, TrafficPolicy, World};
use tracing::{debug, info, warn};

use crate::conntrack::{self, Conntrack};
use crate::layout::{self, SetId};
use crate::render::{Existing, Renderer};

/// Something that changed in the cluster.
#[derive(Clone, Debug)]
pub enum Change {
    /// A Service as it is now.
    Service(Arc<Service>),
    /// A Service is gone.
    ServiceGone(ObjectKey),
    /// An EndpointSlice as it is now.
    Slice(Arc<EndpointSlice>),
    /// An EndpointSlice is gone.
    SliceGone(ObjectKey),
    /// The ranges of a ServiceCIDR; none when it is gone.
    ServiceCidr(String, Vec<IpNet>),
    /// The node as it is now.
    Node(NodeView),
}

/// What a sync did.
#[derive(Debug, Default)]
pub struct SyncReport {
    /// Per family: how long it took, whether it was a full one, and why it failed if it did.
    pub families: Vec<FamilyReport>,
    /// UDP flows that were removed.
    pub deleted_flows: usize,
    /// How long looking for them took, when it was done.
    pub conntrack: Option<Duration>,
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
}

/// The service proxy of one node.
pub struct ServiceProxy {
    executor: Box<dyn Executor>,
    conntrack: Option<Conntrack>,
    world: World,
    planner: Planner,
    node: Option<NodeView>,
    dirty: BTreeSet<ObjectKey>,
    families: Vec<FamilyState>,
    /// UDP frontends that went away since flows were last looked at.
    removed_udp: BTreeSet<Frontend>,
    udp_pending: bool,
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
        let conntrack = Conntrack::open(netns)?;
        Ok(ServiceProxy { port_id, ..ServiceProxy::with_executor(Box::new(executor), Some(conntrack), node) })
    }

    /// A proxy that programs through the given executor.
    pub fn with_executor(executor: Box<dyn Executor>, conntrack: Option<Conntrack>, node: NodeView) -> ServiceProxy {
        ServiceProxy {
            executor,
            conntrack,
            world: World::default(),
            planner: Planner::new(node),
            node: None,
            dirty: BTreeSet::new(),
            families: IpFamily::ALL
                .iter()
                .map(|f| FamilyState { renderer: Renderer::new(*f), in_step: false })
                .collect(),
            removed_udp: BTreeSet::new(),
            udp_pending: true,
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
            Change::Service(service) => {
                let key = self.world.put_service(&service);
                self.dirty.insert(key);
            }
            Change::ServiceGone(key) => {
                self.world.delete_service(&key);
                self.dirty.insert(key);
            }
            Change::Slice(slice) => self.dirty.extend(self.world.put_slice(&slice)),
            Change::SliceGone(key) => self.dirty.extend(self.world.delete_slice(&key)),
            Change::ServiceCidr(name, nets) => self.world.put_service_cidr(&name, nets),
            Change::Node(node) => self.node = Some(node),
        }
    }

    /// Compiles what changed and brings the kernel in step. Blocks for as long as the kernel takes.
    ///
    /// After a failure the family is read back and compared at the next sync, and keeps its last good rules until then.
    pub fn sync(&mut self) -> SyncReport {
        let dirty = std::mem::take(&mut self.dirty);
        let frontends_before: Vec<Frontend> = self.udp_frontends_of(&dirty);
        let mut delta = match self.node.take() {
            Some(node) => self.planner.set_node(&self.world, node),
            None => Delta::default(),
        };
        delta.merge(self.planner.update(&self.world, &dirty));
        self.removed_udp.extend(frontends_before.into_iter().filter(|f| !self.planner.map().frontends.contains_key(f)));
        self.removed_udp.retain(|f| !self.planner.map().frontends.contains_key(f));
        self.udp_pending |= delta.services.iter().any(|id| id.protocol == L4::Udp)
            || delta.frontends.iter().any(|f| f.protocol == L4::Udp);

        let mut report = SyncReport {
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
                sync_full(self.executor.as_mut(), &mut state.renderer, family, self.planner.map(), self.planner.node())
            } else {
                sync_delta(self.executor.as_mut(), &mut state.renderer, self.planner.map(), self.planner.node(), &delta)
            };
            state.in_step = result.is_ok();
            let (transactions, error) = match result {
                Ok(count) => (count, None),
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
        // Only after the new rules are in force, or the next packet would make the same flow again (services.md 3.6).
        if self.udp_pending && report.is_ok() {
            let start = Instant::now();
            match self.reconcile_flows() {
                Ok(count) => {
                    report.deleted_flows = count;
                    self.udp_pending = false;
                    self.removed_udp.clear();
                }
                Err(error) => warn!(%error, "cannot reconcile conntrack; trying again at the next change"),
            }
            report.conntrack = Some(start.elapsed());
        }
        report
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
        let services = || self.planner.map().services.iter().filter(move |(id, _)| id.family == family).map(|(_, s)| s);
        let internal =
            services().filter(|s| s.internal_policy == TrafficPolicy::Local && s.internal == Backends::Drop).count();
        let external =
            services().filter(|s| s.external_policy == TrafficPolicy::Local && s.external == Backends::Drop).count();
        (internal, external)
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

    fn udp_frontends_of(&self, keys: &BTreeSet<ObjectKey>) -> Vec<Frontend> {
        self.planner.frontends_of(keys).into_iter().filter(|f| f.protocol == L4::Udp).collect()
    }

    fn reconcile_flows(&mut self) -> io::Result<usize> {
        let Some(conntrack) = &mut self.conntrack else { return Ok(0) };
        let mut count = 0;
        let flows = conntrack.udp_flows()?;
        for flow in conntrack::stale(self.planner.map(), &self.removed_udp, &flows) {
            conntrack.delete(&flow)?;
            debug!(?flow, "stale UDP flow removed");
            count += 1;
        }
        Ok(count)
    }
}

fn error_source(error: &portolan_nft::Error) -> String {
    std::error::Error::source(error).map(ToString::to_string).unwrap_or_default()
}

fn sync_full(
    executor: &mut dyn Executor,
    renderer: &mut Renderer,
    family: IpFamily,
    map: &ServiceMap,
    node: &NodeView,
) -> Result<usize, portolan_nft::Error> {
    let table = layout::table(family);
    let mut existing = Existing { chains: executor.chains(&table)?.into_iter().collect(), ..Existing::default() };
    if existing.is_ours() {
        for id in SetId::ALL.iter().filter(|id| **id != SetId::Affinity) {
            let elements = executor.elements(&table, renderer.sets().get(*id))?.unwrap_or_default();
            existing.elements.extend(elements.into_iter().map(|e| ((*id, e.key.clone()), e)));
        }
    }
    let full = renderer.full(map, node, existing);
    for transaction in &full.transactions {
        executor.commit(transaction)?;
    }
    if !full.unused.is_empty()
        && let Err(error) = executor.commit(&full.unused)
    {
        debug!(%error, "unused chains stay for now");
    }
    Ok(full.transactions.len())
}

fn sync_delta(
    executor: &mut dyn Executor,
    renderer: &mut Renderer,
    map: &ServiceMap,
    node: &NodeView,
    delta: &Delta,
) -> Result<usize, portolan_nft::Error> {
    let transactions = renderer.update(map, node, delta);
    for transaction in &transactions {
        executor.commit(transaction)?;
    }
    if let Some(sweep) = renderer.sweep() {
        match executor.commit(&sweep) {
            Ok(()) => renderer.swept(),
            Err(error) => debug!(%error, "unused chains stay for now"),
        }
    }
    Ok(transactions.len())
}
