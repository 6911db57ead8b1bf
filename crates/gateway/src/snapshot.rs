//! What the workers see: one immutable value, swapped whole, and the endpoints behind it, each swapped alone.

use std::collections::HashMap;
use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use arc_swap::ArcSwap;
use portolan_plan::route::{RouteTable, UpstreamId, UpstreamKey};
use portolan_plan::world::ObjectKey;
use rustls::sign::CertifiedKey;

use crate::metrics::{Registry, RuleStats};

/// Routes, certificates and the places where endpoints are found. A request uses one from its head to its end.
pub struct Snapshot {
    /// Hosts and rules.
    pub table: RouteTable,
    /// Endpoints by [`UpstreamId`].
    upstreams: Vec<Arc<Endpoints>>,
    /// Certificates by Secret.
    pub certificates: HashMap<ObjectKey, Arc<CertifiedKey>>,
    /// Counters of each rule.
    pub(crate) stats: Vec<Arc<RuleStats>>,
}

impl Snapshot {
    /// The endpoints of an upstream.
    pub fn endpoints(&self, id: UpstreamId) -> &Arc<Endpoints> {
        &self.upstreams[id.0]
    }
}

/// The endpoints of one upstream. Changing them touches no route and no other upstream.
pub struct Endpoints {
    /// The upstream.
    pub key: UpstreamKey,
    addresses: ArcSwap<Vec<SocketAddr>>,
    next: AtomicUsize,
}

impl Endpoints {
    fn new(key: UpstreamKey) -> Endpoints {
        // A start at random, so that many gateways that start at once do not all begin with the first endpoint.
        let next = AtomicUsize::new(usize::from(rand::random::<u16>()));
        Endpoints { key, addresses: ArcSwap::default(), next }
    }

    /// Where requests go from now on.
    pub fn set(&self, addresses: Vec<SocketAddr>) {
        if **self.addresses.load() != addresses {
            self.addresses.store(Arc::new(addresses));
        }
    }

    /// Whether there is nowhere to go at this moment.
    pub fn is_empty(&self) -> bool {
        self.addresses.load().is_empty()
    }

    /// The endpoints of this moment, and where in the round this request begins.
    pub fn pick(&self) -> (arc_swap::Guard<Arc<Vec<SocketAddr>>>, usize) {
        (self.addresses.load(), self.next.fetch_add(1, Ordering::Relaxed))
    }
}

/// Builds snapshots, keeping endpoints and counters of what did not change.
#[derive(Default)]
pub struct Publisher {
    endpoints: HashMap<UpstreamKey, Arc<Endpoints>>,
}

impl Publisher {
    /// The snapshot for new routes. Endpoints are those of before; new upstreams have none until `resolve` names them.
    pub fn snapshot(
        &mut self,
        table: RouteTable,
        certificates: HashMap<ObjectKey, Arc<CertifiedKey>>,
        registry: &Registry,
        mut resolve: impl FnMut(&UpstreamKey) -> Vec<SocketAddr>,
    ) -> Arc<Snapshot> {
        let mut used = HashMap::with_capacity(table.upstreams.len());
        let upstreams = table
            .upstreams
            .iter()
            .map(|key| {
                let endpoints = self.endpoints.remove(key).unwrap_or_else(|| Arc::new(Endpoints::new(key.clone())));
                endpoints.set(resolve(key));
                used.insert(key.clone(), endpoints.clone());
                endpoints
            })
            .collect();
        self.endpoints = used;
        let stats = registry.stats(&table);
        Arc::new(Snapshot { table, upstreams, certificates, stats })
    }

    /// The upstreams in use.
    pub fn upstreams(&self) -> impl Iterator<Item = &Arc<Endpoints>> {
        self.endpoints.values()
    }
}
