//! Which endpoints a node may use for one Service port: conditions, topology hints, policies, duplicates.
//!
//! The rules are those of services.md 3.2 (KEP-1669 for terminating endpoints, KEP-2433 and KEP-3015 for hints). Values in,
//! values out; the tables below are the specification's sentences.

use std::collections::BTreeMap;
use std::net::IpAddr;
use std::num::NonZeroU16;
use std::sync::Arc;

use serde::{Deserialize, Serialize};

use crate::world::{Conditions, Hints, NodeView};

/// An endpoint of one Service port, duplicates merged.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Endpoint {
    /// Where to send.
    pub backend: Backend,
    /// Conditions.
    pub conditions: Conditions,
    /// Whether it runs on this node. An endpoint whose node nobody names never does (services.md 3.1).
    pub local: bool,
    /// Whether its node is unknown.
    pub unplaced: bool,
    /// Topology hints.
    pub hints: Option<Arc<Hints>>,
}

impl Endpoint {
    fn for_zones(&self) -> &[Arc<str>] {
        self.hints.as_ref().map_or(&[], |h| &h.for_zones)
    }

    fn for_nodes(&self) -> &[Arc<str>] {
        self.hints.as_ref().map_or(&[], |h| &h.for_nodes)
    }
}

/// Address and port that a flow is translated to.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub struct Backend {
    /// Address.
    pub addr: IpAddr,
    /// Port.
    pub port: NonZeroU16,
}

impl std::fmt::Display for Backend {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        std::net::SocketAddr::new(self.addr, self.port.get()).fmt(f)
    }
}

/// What may be used of the endpoints of one Service port on one node.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Selection {
    /// For the `Cluster` policies.
    pub cluster: Vec<Backend>,
    /// For the `Local` policies.
    pub local: Vec<Backend>,
    /// Whether any endpoint anywhere could take traffic; otherwise clients are refused.
    pub has_any: bool,
    /// Endpoints whose UDP flows may go on: ready or serving, on any node, whatever the policies.
    pub serving: Vec<Backend>,
    /// Endpoints of this node that are ready; what load balancers' health checks count.
    pub local_ready: Vec<IpAddr>,
}

/// Merges endpoints that several slices list: per address and port, ready beats terminating beats neither, and a
/// non-terminating one beats a terminating one with an equal claim (services.md 3.2, complaint 17).
pub fn merge_duplicates(endpoints: impl IntoIterator<Item = Endpoint>) -> Vec<Endpoint> {
    let mut merged: BTreeMap<Backend, Endpoint> = BTreeMap::new();
    for endpoint in endpoints {
        match merged.get_mut(&endpoint.backend) {
            Some(known) if rank(&endpoint.conditions) > rank(&known.conditions) => *known = endpoint,
            Some(_) => {}
            None => {
                merged.insert(endpoint.backend, endpoint);
            }
        }
    }
    merged.into_values().collect()
}

fn rank(c: &Conditions) -> (bool, bool, bool) {
    (c.ready, c.serving && c.terminating, !c.terminating)
}

/// Selects what `node` may use. `endpoints` has no duplicates; the result keeps its order.
pub fn select(endpoints: &[Endpoint], node: &NodeView) -> Selection {
    let ready = |e: &&Endpoint| e.conditions.ready;
    let fallback = |e: &&Endpoint| e.conditions.serving && e.conditions.terminating;
    let backends = |it: &mut dyn Iterator<Item = &Endpoint>| it.map(|e| e.backend).collect::<Vec<_>>();

    let mut cluster = match topology(endpoints, node) {
        Topology::Node => {
            backends(&mut endpoints.iter().filter(ready).filter(|e| e.for_nodes().iter().any(|n| **n == *node.name)))
        }
        Topology::Zone(zone) => {
            backends(&mut endpoints.iter().filter(ready).filter(|e| e.for_zones().iter().any(|z| **z == *zone)))
        }
        Topology::All => backends(&mut endpoints.iter().filter(ready)),
    };
    if cluster.is_empty() {
        cluster = backends(&mut endpoints.iter().filter(fallback));
    }
    let mut local = backends(&mut endpoints.iter().filter(|e| e.local).filter(ready));
    let mut local_ready: Vec<IpAddr> = local.iter().map(|b| b.addr).collect();
    local_ready.dedup();
    if local.is_empty() {
        local = backends(&mut endpoints.iter().filter(|e| e.local).filter(fallback));
    }
    Selection {
        has_any: !cluster.is_empty(),
        cluster,
        local,
        serving: backends(&mut endpoints.iter().filter(|e| e.conditions.ready || e.conditions.serving)),
        local_ready,
    }
}

enum Topology<'a> {
    Node,
    Zone(&'a str),
    All,
}

/// Hints are obeyed only when every ready endpoint has one and one of them is for us; a single one without hint means that
/// the controller has not finished, and then nobody is left out.
fn topology<'a>(endpoints: &[Endpoint], node: &'a NodeView) -> Topology<'a> {
    let ready = || endpoints.iter().filter(|e| e.conditions.ready);
    if ready().all(|e| !e.for_nodes().is_empty()) && ready().any(|e| e.for_nodes().iter().any(|n| **n == *node.name)) {
        return Topology::Node;
    }
    if let Some(zone) = node.zone.as_deref()
        && ready().all(|e| !e.for_zones().is_empty())
        && ready().any(|e| e.for_zones().iter().any(|z| **z == *zone))
    {
        return Topology::Zone(zone);
    }
    Topology::All
}

#[cfg(test)]
mod tests {
    use super::*;

    const READY: Conditions = Conditions { ready: true, serving: true, terminating: false };
    const NOT_READY: Conditions = Conditions { ready: false, serving: false, terminating: false };
    const LEAVING: Conditions = Conditions { ready: false, serving: true, terminating: true };
    const GONE: Conditions = Conditions { ready: false, serving: false, terminating: true };

    fn node() -> NodeView {
        NodeView { name: "n1".into(), zone: Some("a".into()), ..NodeView::default() }
    }

    /// `last` is the last octet; odd ones are on this node.
    fn endpoint(last: u8, conditions: Conditions) -> Endpoint {
        Endpoint {
            backend: Backend { addr: IpAddr::from([10, 244, 0, last]), port: NonZeroU16::new(80).unwrap() },
            conditions,
            local: last % 2 == 1,
            unplaced: false,
            hints: None,
        }
    }

    fn zoned(last: u8, conditions: Conditions, zones: &[&str]) -> Endpoint {
        noded(last, conditions, &[], zones)
    }

    fn noded(last: u8, conditions: Conditions, nodes: &[&str], zones: &[&str]) -> Endpoint {
        let list = |names: &[&str]| names.iter().map(|n| Arc::from(*n)).collect();
        let hints = Hints { for_zones: list(zones), for_nodes: list(nodes) };
        Endpoint { hints: Some(Arc::new(hints)), ..endpoint(last, conditions) }
    }

    fn lasts(backends: &[Backend]) -> Vec<u8> {
        backends.iter().map(|b| if let IpAddr::V4(v4) = b.addr { v4.octets()[3] } else { 0 }).collect()
    }

    #[test]
    fn usable_endpoints() {
        let e = endpoint;
        type Row = (&'static str, Vec<Endpoint>, Vec<u8>, Vec<u8>, bool);
        let rows: Vec<Row> = vec![
            ("nothing", vec![], vec![], vec![], false),
            ("ready_ones_everywhere", vec![e(1, READY), e(2, READY)], vec![1, 2], vec![1], true),
            ("not_ready_is_left_out", vec![e(1, NOT_READY), e(2, READY)], vec![2], vec![], true),
            ("only_not_ready", vec![e(1, NOT_READY)], vec![], vec![], false),
            ("no_ready_endpoint_falls_back_to_serving", vec![e(1, LEAVING), e(2, LEAVING)], vec![1, 2], vec![1], true),
            ("local_falls_back_alone", vec![e(1, LEAVING), e(2, READY)], vec![2], vec![1], true),
            ("terminating_without_serving_is_dead", vec![e(1, GONE)], vec![], vec![], false),
            ("zone_hints", vec![zoned(1, READY, &["a"]), zoned(2, READY, &["b"])], vec![1], vec![1], true),
            ("no_hint_for_our_zone", vec![zoned(1, READY, &["b"]), zoned(2, READY, &["c"])], vec![1, 2], vec![1], true),
            ("one_hint_missing", vec![zoned(1, READY, &["a"]), e(2, READY)], vec![1, 2], vec![1], true),
            (
                "hint_missing_on_not_ready_does_not_count",
                vec![zoned(2, READY, &["a"]), zoned(4, READY, &["b"]), e(1, NOT_READY)],
                vec![2],
                vec![],
                true,
            ),
            (
                "fallback_ignores_topology",
                vec![zoned(1, LEAVING, &["a"]), zoned(2, LEAVING, &["b"])],
                vec![1, 2],
                vec![1],
                true,
            ),
            ("local_ignores_topology", vec![zoned(1, READY, &["b"]), zoned(2, READY, &["a"])], vec![2], vec![1], true),
            (
                "node_hints_before_zone_hints",
                vec![noded(1, READY, &["n1"], &["a"]), noded(3, READY, &["n2"], &["a"])],
                vec![1],
                vec![1, 3],
                true,
            ),
            (
                "node_hint_missing_zone_decides",
                vec![noded(1, READY, &["n1"], &["a"]), noded(3, READY, &[], &["a"]), noded(2, READY, &["n2"], &["b"])],
                vec![1, 3],
                vec![1, 3],
                true,
            ),
        ];
        for (name, endpoints, cluster, local, has_any) in rows {
            let s = select(&endpoints, &node());
            assert_eq!((lasts(&s.cluster), lasts(&s.local), s.has_any), (cluster, local, has_any), "{name}");
        }
    }

    #[test]
    fn duplicates() {
        for (name, first, second, expected) in [
            ("ready_and_terminating", READY, GONE, READY),
            ("ready_and_not_ready", NOT_READY, READY, READY),
            ("leaving_and_not_ready", NOT_READY, LEAVING, LEAVING),
            ("not_ready_and_gone", GONE, NOT_READY, NOT_READY),
        ] {
            for pair in [[first, second], [second, first]] {
                let merged = merge_duplicates(pair.map(|c| endpoint(1, c)));
                assert_eq!(merged.iter().map(|e| e.conditions).collect::<Vec<_>>(), [expected], "{name}");
            }
        }
    }

    #[test]
    fn udp_flows_may_stay_where_traffic_may_go_or_is_served() {
        let publish_not_ready = Conditions { ready: true, serving: false, terminating: false };
        let s = select(&[endpoint(1, publish_not_ready), endpoint(2, LEAVING), endpoint(4, GONE)], &node());
        assert_eq!(lasts(&s.serving), [1, 2]);
    }
}
