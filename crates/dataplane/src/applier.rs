//! The applier: one plain thread that owns the [`ServiceProxy`] and takes changes from a latest-wins mailbox.
//!
//! Watches put objects into the mailbox; while the applier is busy, newer states of an object replace older ones, so a burst
//! costs one sync. Nothing is programmed before Services, EndpointSlices, the own Node and its pods have been listed.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::{Arc, Condvar, Mutex, MutexGuard};
use std::time::{Duration, Instant};

use ipnet::IpNet;
use k8s_openapi::api::core::v1::{Pod, Service};
use k8s_openapi::api::discovery::v1::EndpointSlice;
use k8s_openapi::jiff::Timestamp;
use portolan_plan::world::{NodeView, ObjectKey};

use crate::proxy::{Change, ServiceProxy, SyncReport};

/// Annotation with the time of the change that made an EndpointSlice as it is (KEP of network programming latency).
const TRIGGER_TIME: &str = "endpoints.kubernetes.io/last-change-trigger-time";
/// A failed sync is tried again after this, doubled up to the limit.
const FIRST_RETRY: Duration = Duration::from_millis(200);
const LAST_RETRY: Duration = Duration::from_secs(30);

#[derive(Debug, Default)]
struct Pending {
    services: BTreeMap<ObjectKey, Option<Arc<Service>>>,
    slices: BTreeMap<ObjectKey, Option<Arc<EndpointSlice>>>,
    service_cidrs: BTreeMap<String, Vec<IpNet>>,
    pods: BTreeMap<ObjectKey, Option<Arc<Pod>>>,
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
}

impl Mailbox {
    fn edit(&self, change: bool, edit: impl FnOnce(&mut Pending)) {
        let mut pending = self.lock();
        edit(&mut pending);
        if change {
            pending.queued.get_or_insert_with(Instant::now);
        }
        drop(pending);
        self.shared.1.notify_one();
    }

    fn lock(&self) -> MutexGuard<'_, Pending> {
        self.shared.0.lock().unwrap_or_else(|poisoned| poisoned.into_inner())
    }

    /// A Service as it is now; `None` when it is gone.
    pub fn service(&self, key: ObjectKey, service: Option<Arc<Service>>) {
        self.edit(true, |p| {
            p.services.insert(key, service);
        });
    }

    /// An EndpointSlice as it is now; `None` when it is gone.
    pub fn slice(&self, key: ObjectKey, slice: Option<Arc<EndpointSlice>>) {
        self.edit(true, |p| {
            p.slices.insert(key, slice);
        });
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
    pub fn pod(&self, key: ObjectKey, pod: Option<Arc<Pod>>) {
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
                return Some(std::mem::replace(&mut *pending, fresh));
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
    /// Objects that changed.
    pub services: usize,
    /// Slices that changed.
    pub slices: usize,
    /// From the changes of the world that the slices were made for to now; see `network_programming_duration_seconds`.
    pub latencies: Vec<Duration>,
    /// Someone else changed the table, and it was put right.
    pub healed: bool,
}

/// Runs the applier on the calling thread until the mailbox is closed. `after` is called after each sync.
pub fn run(mut proxy: ServiceProxy, mailbox: &Mailbox, mut after: impl FnMut(Applied<'_>)) {
    let mut retry: Option<(Instant, Duration)> = None;
    let mut first = true;
    while let Some(pending) = mailbox.take(retry.map(|(at, _)| at)) {
        let services = pending.services.len();
        let slices = pending.slices.len();
        let triggers: Vec<Timestamp> = if first {
            Vec::new() // What happened before the start is not this proxy's latency.
        } else {
            pending.slices.values().flatten().filter_map(|s| trigger_time(s)).collect()
        };
        if let Some(node) = pending.node {
            proxy.change(Change::Node(node));
        }
        for (name, nets) in pending.service_cidrs {
            proxy.change(Change::ServiceCidr(name, nets));
        }
        for (key, service) in pending.services {
            proxy.change(service.map_or(Change::ServiceGone(key), Change::Service));
        }
        for (key, slice) in pending.slices {
            proxy.change(slice.map_or(Change::SliceGone(key), Change::Slice));
        }
        for (key, pod) in pending.pods {
            proxy.change(pod.map_or(Change::PodGone(key), Change::Pod));
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
        let latencies = triggers.iter().filter_map(|t| now.duration_since(*t).try_into().ok()).collect();
        after(Applied { proxy: &proxy, report: &report, services, slices, latencies, healed });
    }
}

fn trigger_time(slice: &EndpointSlice) -> Option<Timestamp> {
    slice.metadata.annotations.as_ref()?.get(TRIGGER_TIME)?.parse().ok()
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
