//! The applier: one plain thread that owns the [`ServiceProxy`] and takes changes from a latest-wins mailbox.
//!
//! Watches put objects into the mailbox; while the applier is busy, newer states of an object replace older ones, so a burst
//! costs one sync. Nothing is programmed before Services, EndpointSlices, the own Node and its pods have been listed.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::{Arc, Condvar, Mutex, MutexGuard};
use std::time::{Duration, Instant};

use ipnet::IpNet;
use k8s_openapi::jiff::Timestamp;
use portolan_plan::world::{HostPortPod, IpFamily, NodeView, ObjectKey, ServiceSpec};

use crate::metrics::{Kind, Metrics};
use crate::proxy::{Change, ServiceProxy, SyncReport};
use crate::watched::SliceChange;

/// A failed sync is tried again after this, doubled up to the limit.
const FIRST_RETRY: Duration = Duration::from_millis(200);
const LAST_RETRY: Duration = Duration::from_secs(30);

#[derive(Debug, Default)]
struct Pending {
    services: BTreeMap<ObjectKey, Option<Arc<ServiceSpec>>>,
    slices: BTreeMap<ObjectKey, SliceChange>,
    service_cidrs: BTreeMap<String, Vec<IpNet>>,
    pods: BTreeMap<ObjectKey, Option<Arc<HostPortPod>>>,
    node: Option<NodeView>,
    services_listed: bool,
    slices_listed: bool,
    node_listed: bool,
    pods_listed: bool,
    resync: bool,
    interfered: bool,
    closed: bool,
    /// When the oldest change came in.
    queued: Option<Instant>,
}

impl Pending {
    fn has_work(&self) -> bool {
        self.queued.is_some() || self.resync || self.interfered
    }
}

/// Where watches leave changes for the applier. Cloning is cheap.
#[derive(Clone, Debug, Default)]
pub struct Mailbox {
    shared: Arc<(Mutex<Pending>, Condvar)>,
    metrics: Option<Metrics>,
}

/// The families that a Service concerns; both when it is gone.
fn families_of_service(service: Option<&ServiceSpec>) -> Vec<IpFamily> {
    match service {
        Some(service) => service.cluster_ips.iter().map(IpFamily::of).collect(),
        None => IpFamily::ALL.to_vec(),
    }
}

/// The families that a slice concerns; both when it is gone.
fn families_of_slice(change: &SliceChange) -> Vec<IpFamily> {
    match &change.slice {
        Some(slice) => slice.family.into_iter().collect(),
        None => IpFamily::ALL.to_vec(),
    }
}

impl Mailbox {
    /// A mailbox that counts what waits in it.
    pub fn counted(metrics: Metrics) -> Mailbox {
        Mailbox { metrics: Some(metrics), ..Mailbox::default() }
    }

    fn edit(&self, change: bool, edit: impl FnOnce(&mut Pending)) {
        let mut pending = self.lock();
        edit(&mut pending);
        if change {
            pending.queued.get_or_insert_with(Instant::now);
            if let Some(metrics) = &self.metrics {
                metrics.queued();
            }
        }
        drop(pending);
        self.shared.1.notify_one();
    }

    fn lock(&self) -> MutexGuard<'_, Pending> {
        self.shared.0.lock().unwrap_or_else(|poisoned| poisoned.into_inner())
    }

    /// A Service as it is now; `None` when it is gone or not this proxy's.
    pub fn service(&self, key: ObjectKey, service: Option<Arc<ServiceSpec>>) {
        self.edit(true, |p| {
            self.waits(Kind::Service, &families_of_service(service.as_deref()), 1);
            if let Some(old) = p.services.insert(key, service) {
                self.waits(Kind::Service, &families_of_service(old.as_deref()), -1);
            }
        });
    }

    /// An EndpointSlice as it is now.
    pub fn slice(&self, key: ObjectKey, mut slice: SliceChange) {
        self.edit(true, |p| {
            self.waits(Kind::Slice, &families_of_slice(&slice), 1);
            if let Some(old) = p.slices.get(&key) {
                self.waits(Kind::Slice, &families_of_slice(old), -1);
                // What has waited longest counts.
                slice.triggered = old.triggered.or(slice.triggered);
            }
            p.slices.insert(key, slice);
        });
    }

    fn waits(&self, kind: Kind, families: &[IpFamily], by: i64) {
        if let Some(metrics) = &self.metrics {
            metrics.waits(kind, families, by);
        }
    }

    /// The ranges of a ServiceCIDR; none when it is gone.
    pub fn service_cidr(&self, name: String, nets: Vec<IpNet>) {
        self.edit(true, |p| {
            p.service_cidrs.insert(name, nets);
        });
    }

    /// The node as it is now.
    pub fn node(&self, node: NodeView) {
        self.edit(true, |p| p.node = Some(node));
    }

    /// All Services have been delivered once.
    pub fn services_listed(&self) {
        self.edit(true, |p| p.services_listed = true);
    }

    /// All EndpointSlices have been delivered once.
    pub fn slices_listed(&self) {
        self.edit(true, |p| p.slices_listed = true);
    }

    /// The Node has been asked for once, and delivered if it exists. Without its addresses a restart would close node ports.
    pub fn node_listed(&self) {
        self.edit(true, |p| p.node_listed = true);
    }

    /// A pod of the node with host ports as it is now; `None` when it is gone.
    pub fn pod(&self, key: ObjectKey, pod: Option<Arc<HostPortPod>>) {
        self.edit(true, |p| {
            p.pods.insert(key, pod);
        });
    }

    /// The node's pods have been delivered once. Without them a restart would close host ports.
    pub fn pods_listed(&self) {
        self.edit(true, |p| p.pods_listed = true);
    }

    /// Reads the kernel back and compares, whatever is pending.
    pub fn resync(&self) {
        self.edit(false, |p| p.resync = true);
    }

    /// Somebody else changed our table: reads it back and puts it right.
    pub fn interfered(&self) {
        self.edit(false, |p| p.interfered = true);
    }

    /// Ends the applier after what it is doing; the kernel's state stays.
    pub fn close(&self) {
        self.edit(false, |p| p.closed = true);
    }

    /// How long the oldest pending change has waited, if there is one.
    pub fn waiting(&self) -> Option<Duration> {
        self.lock().queued.map(|q| q.elapsed())
    }

    /// Waits for work, or until `deadline`; `None` when closed.
    fn take(&self, deadline: Option<Instant>) -> Option<Pending> {
        let mut pending = self.lock();
        loop {
            if pending.closed {
                return None;
            }
            let listed = pending.services_listed && pending.slices_listed && pending.node_listed && pending.pods_listed;
            let due = deadline.is_some_and(|d| Instant::now() >= d);
            if listed && (pending.has_work() || due) {
                let fresh = Pending {
                    services_listed: true,
                    slices_listed: true,
                    node_listed: true,
                    pods_listed: true,
                    ..Pending::default()
                };
                let taken = std::mem::replace(&mut *pending, fresh);
                drop(pending);
                for service in taken.services.values() {
                    self.waits(Kind::Service, &families_of_service(service.as_deref()), -1);
                }
                for slice in taken.slices.values() {
                    self.waits(Kind::Slice, &families_of_slice(slice), -1);
                }
                return Some(taken);
            }
            pending = match deadline.filter(|_| listed) {
                Some(deadline) => {
                    let wait = deadline.saturating_duration_since(Instant::now());
                    self.shared.1.wait_timeout(pending, wait).unwrap_or_else(|p| p.into_inner()).0
                }
                None => self.shared.1.wait(pending).unwrap_or_else(|p| p.into_inner()),
            };
        }
    }
}

/// What the applier tells after each sync.
#[derive(Debug)]
pub struct Applied<'a> {
    /// The proxy, to look at.
    pub proxy: &'a ServiceProxy,
    /// What the sync did.
    pub report: &'a SyncReport,
    /// Families of the Services that changed.
    pub services: Vec<IpFamily>,
    /// Families of the slices that changed.
    pub slices: Vec<IpFamily>,
    /// From the changes of the world that the slices were made for to now; see `network_programming_duration_seconds`.
    pub latencies: Vec<(IpFamily, Duration)>,
    /// Families where chains that are not used any more could not be removed, which is tried again.
    pub cleanup_failed: Vec<IpFamily>,
    /// Someone else changed the table, and it was put right.
    pub healed: bool,
}

/// Runs the applier on the calling thread until the mailbox is closed. `after` is called after each sync.
pub fn run(mut proxy: ServiceProxy, mailbox: &Mailbox, mut after: impl FnMut(Applied<'_>)) {
    let mut retry: Option<(Instant, Duration)> = None;
    let mut first = true;
    while let Some(pending) = mailbox.take(retry.map(|(at, _)| at).into_iter().chain(proxy.sweep_due()).min()) {
        let due = proxy.sweep_due().is_some_and(|due| due <= Instant::now());
        let cleanup_failed = if due { proxy.sweep() } else { Vec::new() };
        let services = pending.services.values().flat_map(|s| families_of_service(s.as_deref())).collect();
        let slices = pending.slices.values().flat_map(families_of_slice).collect();
        let triggers: Vec<(IpFamily, Timestamp)> = if first {
            Vec::new() // What happened before the start is not this proxy's latency.
        } else {
            let all = pending.slices.values();
            all.filter_map(|s| Some((s.slice.as_ref()?.family?, s.triggered?))).collect()
        };
        if let Some(node) = pending.node {
            proxy.change(Change::Node(node));
        }
        for (name, nets) in pending.service_cidrs {
            proxy.change(Change::ServiceCidr(name, nets));
        }
        for (key, service) in pending.services {
            proxy.change(Change::Service(key, service));
        }
        for (key, change) in pending.slices {
            proxy.change(Change::Slice(key, change.slice));
        }
        for (key, pod) in pending.pods {
            proxy.change(Change::Pod(key, pod));
        }
        let healed = pending.interfered && !first;
        if pending.resync || healed {
            proxy.distrust_kernel();
        }
        let report = proxy.sync();
        first = false;
        retry = if report.is_ok() {
            None
        } else {
            let wait = retry.map_or(FIRST_RETRY, |(_, wait)| (wait * 2).min(LAST_RETRY));
            Some((Instant::now() + wait, wait))
        };
        let now = Timestamp::now();
        let since = |(family, t): (IpFamily, Timestamp)| Some((family, now.duration_since(t).try_into().ok()?));
        let latencies = triggers.into_iter().filter_map(since).collect();
        after(Applied { proxy: &proxy, report: &report, services, slices, latencies, cleanup_failed, healed });
    }
}

/// Names of objects delivered since a watch began to list anew; what was known before and is not among them is gone.
#[derive(Debug)]
pub struct Relist<K> {
    known: BTreeSet<K>,
    seen: Option<BTreeSet<K>>,
}

impl<K> Default for Relist<K> {
    fn default() -> Relist<K> {
        Relist { known: BTreeSet::new(), seen: None }
    }
}

impl<K: Ord + Clone> Relist<K> {
    /// A list begins.
    pub fn begin(&mut self) {
        self.seen = Some(BTreeSet::new());
    }

    /// An object was delivered.
    pub fn applied(&mut self, key: &K) {
        if let Some(seen) = &mut self.seen {
            seen.insert(key.clone());
        }
        self.known.insert(key.clone());
    }

    /// An object is gone.
    pub fn deleted(&mut self, key: &K) {
        self.known.remove(key);
        if let Some(seen) = &mut self.seen {
            seen.remove(key);
        }
    }

    /// The list is complete: answers what is gone.
    pub fn end(&mut self) -> Vec<K> {
        let Some(seen) = self.seen.take() else { return Vec::new() };
        let gone = self.known.difference(&seen).cloned().collect();
        self.known = seen;
        gone
    }
}
