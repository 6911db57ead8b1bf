//! The decisions of the service controller, without any I/O.

use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;
use std::time::Duration;

use k8s_openapi::api::core::v1::{LoadBalancerIngress, Node, Service};
use portolan_plan::announce::{Key, NodeTarget};

/// The finalizer that keeps a Service until its load balancer is gone.
pub const FINALIZER: &str = "service.kubernetes.io/load-balancer-cleanup";
/// Label of nodes that are no targets.
const EXCLUDE: &str = "node.kubernetes.io/exclude-from-external-load-balancers";
/// Taint of nodes about to be removed.
const TO_BE_DELETED: &str = "ToBeDeletedByClusterAutoscaler";

/// Which Services are ours.
#[derive(Clone, Debug)]
pub struct Classes {
    /// Values of `spec.loadBalancerClass`.
    pub names: BTreeSet<String>,
    /// Whether Services without a class are.
    pub default: bool,
}

/// What to do about a Service.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Intent {
    /// Not ours, or not a load balancer and never was one.
    Ignore,
    /// Make or change its load balancer.
    Ensure,
    /// Remove its load balancer and the finalizer.
    Clean,
}

/// Whether the Service asks for a load balancer of ours.
pub fn wants(service: &Service, classes: &Classes) -> bool {
    let Some(spec) = &service.spec else { return false };
    spec.type_.as_deref() == Some("LoadBalancer")
        && match &spec.load_balancer_class {
            Some(class) => classes.names.contains(class),
            None => classes.default,
        }
}

/// Whether the finalizer is on the Service.
pub fn has_finalizer(service: &Service) -> bool {
    service.metadata.finalizers.iter().flatten().any(|f| f == FINALIZER)
}

/// What to do about a Service. A class of another controller leaves it wholly alone, its finalizer too.
pub fn intent(service: &Service, classes: &Classes) -> Intent {
    let spec = service.spec.as_ref();
    let is_balancer = spec.and_then(|s| s.type_.as_deref()) == Some("LoadBalancer");
    let deleting = service.metadata.deletion_timestamp.is_some();
    if is_balancer && !wants(service, classes) {
        return Intent::Ignore;
    }
    match (has_finalizer(service), deleting || !is_balancer) {
        (true, true) => Intent::Clean,
        (false, true) => Intent::Ignore,
        (_, false) => Intent::Ensure,
    }
}

/// Whether a change of a Service concerns its load balancer.
pub fn is_relevant(old: &Service, new: &Service) -> bool {
    let essence = |s: &Service| {
        let mut spec = s.spec.clone().unwrap_or_default();
        // Endpoints have a watch of their own; these say nothing about the balancer.
        spec.selector = None;
        spec.internal_traffic_policy = None;
        let meta = &s.metadata;
        (spec, meta.annotations.clone(), meta.labels.clone(), meta.uid.clone(), meta.deletion_timestamp.is_some())
    };
    essence(old) != essence(new)
}

/// The node as a target: not excluded, not being removed. Readiness does not count, so that connections drain (KEP-3458).
pub fn node_target(node: &Node) -> Option<NodeTarget> {
    let meta = &node.metadata;
    // A value that reads as false means included; anything else means excluded.
    let excluded = meta
        .labels
        .as_ref()
        .and_then(|l| l.get(EXCLUDE))
        .is_some_and(|v| !matches!(v.as_str(), "0" | "f" | "F" | "FALSE" | "false" | "False"));
    let tainted = node.spec.iter().flat_map(|s| s.taints.iter().flatten()).any(|t| t.key == TO_BE_DELETED);
    if excluded || tainted || meta.deletion_timestamp.is_some() {
        return None;
    }
    let listed = node.status.iter().flat_map(|s| s.addresses.iter().flatten());
    let addresses: Vec<IpAddr> =
        listed.filter(|a| a.type_ == "InternalIP").filter_map(|a| a.address.parse().ok()).collect();
    Some(NodeTarget { name: meta.name.clone()?, addresses })
}

/// Whether the status says what it should.
pub fn status_differs(service: &Service, desired: &[LoadBalancerIngress]) -> bool {
    let current = service.status.as_ref().and_then(|s| s.load_balancer.as_ref()).and_then(|l| l.ingress.as_deref());
    current.unwrap_or_default() != desired
}

/// Shortest and longest wait before a failed Service is tried again.
const BACKOFF: (Duration, Duration) = (Duration::from_secs(5), Duration::from_secs(300));

/// Keys to work on, each at most once, ordered by when they are due. Time is counted from any fixed moment.
#[derive(Debug, Default)]
pub struct Queue {
    due: BTreeMap<Key, Duration>,
    failures: BTreeMap<Key, u32>,
}

impl Queue {
    /// Asks for work at once.
    pub fn add(&mut self, key: Key, now: Duration) {
        let due = self.due.entry(key).or_insert(now);
        *due = now.min(*due);
    }

    /// Takes the key that is due first, if it is due by now.
    pub fn pop(&mut self, now: Duration) -> Option<Key> {
        let (key, _) = self.due.iter().filter(|(_, due)| **due <= now).min_by_key(|(_, due)| **due)?;
        let key = key.clone();
        self.due.remove(&key);
        Some(key)
    }

    /// When the next key is due.
    pub fn next(&self) -> Option<Duration> {
        self.due.values().min().copied()
    }

    /// Work succeeded: the next failure waits the shortest time again.
    pub fn forget(&mut self, key: &str) {
        self.failures.remove(key);
    }

    /// Work failed: tries again after 5, 10, 20 seconds and so on up to five minutes.
    pub fn retry(&mut self, key: Key, now: Duration) {
        let failures = self.failures.entry(key.clone()).or_insert(0);
        let wait = BACKOFF.0.saturating_mul(2u32.saturating_pow(*failures)).min(BACKOFF.1);
        *failures += 1;
        self.due.entry(key).or_insert(now + wait);
    }

    /// Work cannot succeed without an edit; looks again after the longest time all the same.
    pub fn park(&mut self, key: Key, now: Duration) {
        self.due.entry(key).or_insert(now + BACKOFF.1);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::{Value, json};

    fn service(value: Value) -> Service {
        serde_json::from_value(value).unwrap()
    }

    fn classes() -> Classes {
        Classes { names: ["lb.portolan.dev/local".to_string()].into(), default: true }
    }

    #[test]
    fn what_to_do_follows_type_class_and_finalizer() {
        let f = json!([FINALIZER]);
        let rows = [
            ("a load balancer", json!({"spec": {"type": "LoadBalancer"}}), Intent::Ensure),
            (
                "our class",
                json!({"spec": {"type": "LoadBalancer", "loadBalancerClass": "lb.portolan.dev/local"}}),
                Intent::Ensure,
            ),
            ("another class", json!({"spec": {"type": "LoadBalancer", "loadBalancerClass": "x/y"}}), Intent::Ignore),
            ("never one", json!({"spec": {"type": "ClusterIP"}}), Intent::Ignore),
            ("no longer one", json!({"metadata": {"finalizers": f}, "spec": {"type": "ClusterIP"}}), Intent::Clean),
            (
                "being deleted",
                json!({"metadata": {"finalizers": f, "deletionTimestamp": "2026-01-01T00:00:00Z"}, "spec": {"type": "LoadBalancer"}}),
                Intent::Clean,
            ),
            (
                "deleted, cleaned already",
                json!({"metadata": {"deletionTimestamp": "2026-01-01T00:00:00Z"}, "spec": {"type": "LoadBalancer"}}),
                Intent::Ignore,
            ),
        ];
        for (name, value, expected) in rows {
            assert_eq!(intent(&service(value), &classes()), expected, "{name}");
        }
    }

    #[test]
    fn only_changes_of_the_balancer_matter() {
        let old = service(json!({"metadata": {"uid": "1"}, "spec": {"type": "LoadBalancer", "ports": [{"port": 80}]}}));
        let with = |change: fn(&mut Service)| {
            let mut new = old.clone();
            change(&mut new);
            is_relevant(&old, &new)
        };
        assert!(!with(|s| s.metadata.resource_version = Some("7".into())));
        assert!(!with(|s| s.status = Some(Default::default())));
        assert!(!with(|s| s.metadata.finalizers = Some(vec![FINALIZER.into()])), "our own doing");
        assert!(!with(|s| s.spec.as_mut().unwrap().selector = Some([("a".into(), "b".into())].into())));
        assert!(with(|s| s.spec.as_mut().unwrap().ports = None));
        assert!(with(|s| s.metadata.annotations = Some([("a".into(), "b".into())].into())));
        assert!(with(|s| s.metadata.uid = Some("2".into())));
        assert!(with(|s| s.spec.as_mut().unwrap().load_balancer_source_ranges = Some(vec!["10.0.0.0/8".into()])));
    }

    #[test]
    fn nodes_are_excluded_by_label_taint_and_deletion_only() {
        let node = |value: Value| node_target(&serde_json::from_value(value).unwrap()).is_some();
        assert!(node(json!({"metadata": {"name": "a"}, "status": {"conditions": [
            {"type": "Ready", "status": "False"}]}})));
        assert!(!node(json!({"metadata": {"name": "a", "labels": {EXCLUDE: ""}}})));
        assert!(node(json!({"metadata": {"name": "a", "labels": {EXCLUDE: "false"}}})));
        assert!(!node(
            json!({"metadata": {"name": "a"}, "spec": {"taints": [{"key": TO_BE_DELETED, "effect": "NoSchedule"}]}})
        ));
        assert!(!node(json!({"metadata": {"name": "a", "deletionTimestamp": "2026-01-01T00:00:00Z"}})));
    }

    #[test]
    fn failures_wait_longer_each_time() {
        let s = Duration::from_secs;
        let mut q = Queue::default();
        q.add("a".into(), s(0));
        q.add("a".into(), s(1));
        assert_eq!(q.pop(s(0)).as_deref(), Some("a"));
        assert_eq!(q.pop(s(0)), None);
        let mut waits = Vec::new();
        for _ in 0..8 {
            q.retry("a".into(), s(0));
            waits.push(q.next().unwrap().as_secs());
            q.pop(s(1000));
        }
        assert_eq!(waits, [5, 10, 20, 40, 80, 160, 300, 300]);
        q.retry("a".into(), s(0));
        q.add("a".into(), s(1));
        assert_eq!(q.pop(s(1)).as_deref(), Some("a"), "an edit does not wait");
        q.forget("a");
        q.retry("a".into(), s(0));
        assert_eq!(q.next(), Some(s(5)));
    }
}
