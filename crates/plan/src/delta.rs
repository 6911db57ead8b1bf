//! What changed between two versions of a [`ServiceMap`].

use std::collections::BTreeSet;
use std::net::IpAddr;

use crate::service::{Frontend, ServiceMap, ServicePortId};
use crate::world::ObjectKey;

/// Names the entries of a [`ServiceMap`] that are different, new or gone. Appliers read the new value from the map itself.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Delta {
    /// Frontends that belong to another Service port now, or to none.
    pub frontends: BTreeSet<Frontend>,
    /// Service ports that are compiled differently now, or are gone.
    pub services: BTreeSet<ServicePortId>,
    /// Cluster IPs that are new or gone.
    pub cluster_ips: BTreeSet<IpAddr>,
    /// Services whose health check is different, new or gone.
    pub health_checks: BTreeSet<ObjectKey>,
    /// The service ranges are different.
    pub ranges: bool,
    /// The node is different: its addresses, zone or way to recognise pods.
    pub node: bool,
}

impl Delta {
    /// Whether nothing changed.
    pub fn is_empty(&self) -> bool {
        *self == Delta::default()
    }

    /// Adds another delta, which happened after this one.
    pub fn merge(&mut self, later: Delta) {
        self.frontends.extend(later.frontends);
        self.services.extend(later.services);
        self.cluster_ips.extend(later.cluster_ips);
        self.health_checks.extend(later.health_checks);
        self.ranges |= later.ranges;
        self.node |= later.node;
    }

    /// Compares two maps by looking at everything; [`crate::service::Planner::update`] finds the same at a lower cost.
    pub fn between(old: &ServiceMap, new: &ServiceMap) -> Delta {
        fn keys<K: Ord + Clone, V: PartialEq>(
            old: &std::collections::BTreeMap<K, V>,
            new: &std::collections::BTreeMap<K, V>,
        ) -> BTreeSet<K> {
            let gone = old.keys().filter(|k| !new.contains_key(k));
            let changed = new.iter().filter(|(k, v)| old.get(k) != Some(v)).map(|(k, _)| k);
            gone.chain(changed).cloned().collect()
        }
        let old_ips: BTreeSet<IpAddr> = old.cluster_ips.keys().copied().collect();
        let new_ips: BTreeSet<IpAddr> = new.cluster_ips.keys().copied().collect();
        Delta {
            frontends: keys(&old.frontends, &new.frontends),
            services: keys(&old.services, &new.services),
            cluster_ips: old_ips.symmetric_difference(&new_ips).copied().collect(),
            health_checks: keys(&old.health_checks, &new.health_checks),
            ranges: old.service_ranges != new.service_ranges,
            node: old.node_port_addresses != new.node_port_addresses,
        }
    }
}
