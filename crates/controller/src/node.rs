//! The life cycle of nodes: a node whose heartbeat stops is marked and its pods are no longer ready; pods of nodes that are gone
//! are deleted.

use std::collections::HashMap;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use anyhow::Context as _;
use jiff::Timestamp;
use k8s_openapi::api::core::v1::{Node, NodeCondition, Pod, Taint};
use k8s_openapi::apimachinery::pkg::apis::meta::v1::Time;
use kube::Api;
use kube::api::{DeleteParams, Patch, PatchParams, PostParams};
use portolan_client::{EventRecorder, EventType};
use serde_json::json;
use tokio::time::Instant;

use crate::Context;
use crate::clock::Clock;
use crate::pods;
use crate::queue::{Key, Next, Queue};
use crate::replicaset::remove;
use crate::scheduler::tolerates;
use crate::util::{is_not_found, is_replaced, reference};

/// How long a silent node is still believed (`--node-monitor-grace-period`).
pub const GRACE: Duration = Duration::from_secs(40);
/// Namespace of the heartbeats; each node renews a Lease with its own name.
const LEASE_NAMESPACE: &str = "kube-node-lease";
const NOT_READY: &str = "node.kubernetes.io/not-ready";
const UNREACHABLE: &str = "node.kubernetes.io/unreachable";
const UNSCHEDULABLE: &str = "node.kubernetes.io/unschedulable";
/// Conditions that only the kubelet knows; they turn Unknown together when it is silent.
const KUBELET_CONDITIONS: [&str; 4] = ["Ready", "MemoryPressure", "DiskPressure", "PIDPressure"];

/// The conditions of a node that has been silent for too long; `None` when they say so already.
pub fn silence(node: &Node, now: Timestamp) -> Option<Vec<NodeCondition>> {
    let mut conditions = node.status.as_ref().and_then(|s| s.conditions.clone()).unwrap_or_default();
    let mut changed = false;
    for kind in KUBELET_CONDITIONS {
        let unknown = |heartbeat: Option<Time>, reason: &str, text: &str| NodeCondition {
            type_: kind.into(),
            status: "Unknown".into(),
            reason: Some(reason.into()),
            message: Some(text.into()),
            last_heartbeat_time: heartbeat,
            last_transition_time: Some(Time(now)),
        };
        match conditions.iter_mut().find(|c| c.type_ == kind) {
            Some(condition) if condition.status == "Unknown" => {}
            Some(condition) => {
                let heartbeat = condition.last_heartbeat_time.clone();
                *condition = unknown(heartbeat, "NodeStatusUnknown", "Kubelet stopped posting node status.");
                changed = true;
            }
            None => {
                let created = node.metadata.creation_timestamp.clone();
                conditions.push(unknown(created, "NodeStatusNeverUpdated", "Kubelet never posted node status."));
                changed = true;
            }
        }
    }
    changed.then_some(conditions)
}

/// The taints that the conditions of a node ask for; `None` when it has exactly these. Foreign taints stay.
pub fn taints(node: &Node, now: Timestamp) -> Option<Vec<Taint>> {
    let condition = |kind: &str| {
        let conditions = node.status.as_ref().and_then(|s| s.conditions.as_deref()).unwrap_or_default();
        conditions.iter().find(|c| c.type_ == kind).map(|c| c.status.as_str())
    };
    let mut wanted: Vec<(&str, &str)> = Vec::new();
    match condition("Ready") {
        Some("True") => {}
        Some("False") => wanted.extend([(NOT_READY, "NoSchedule"), (NOT_READY, "NoExecute")]),
        // A node that has not reported yet is not ready; one that has stopped reporting cannot be reached.
        None => wanted.push((NOT_READY, "NoSchedule")),
        Some(_) => wanted.extend([(UNREACHABLE, "NoSchedule"), (UNREACHABLE, "NoExecute")]),
    }
    for (kind, key) in [
        ("MemoryPressure", "node.kubernetes.io/memory-pressure"),
        ("DiskPressure", "node.kubernetes.io/disk-pressure"),
        ("PIDPressure", "node.kubernetes.io/pid-pressure"),
        ("NetworkUnavailable", "node.kubernetes.io/network-unavailable"),
    ] {
        if condition(kind) == Some("True") {
            wanted.push((key, "NoSchedule"));
        }
    }
    if node.spec.as_ref().and_then(|s| s.unschedulable) == Some(true) {
        wanted.push((UNSCHEDULABLE, "NoSchedule"));
    }
    let ours = [
        NOT_READY,
        UNREACHABLE,
        UNSCHEDULABLE,
        "node.kubernetes.io/memory-pressure",
        "node.kubernetes.io/disk-pressure",
        "node.kubernetes.io/pid-pressure",
        "node.kubernetes.io/network-unavailable",
    ];
    let current = node.spec.as_ref().and_then(|s| s.taints.clone()).unwrap_or_default();
    let mut result: Vec<Taint> = current
        .iter()
        .filter(|t| !ours.contains(&t.key.as_str()) || wanted.contains(&(t.key.as_str(), t.effect.as_str())))
        .cloned()
        .collect();
    for (key, effect) in wanted {
        if !result.iter().any(|t| t.key == key && t.effect == effect) {
            result.push(Taint { key: key.into(), effect: effect.into(), value: None, time_added: Some(Time(now)) });
        }
    }
    (result != current).then_some(result)
}

/// What the NoExecute taints of a node mean for a pod: never evicted, or evicted after this long from the time of the taint.
pub fn eviction(pod: &Pod, node: &Node, now: Timestamp) -> Option<Duration> {
    let tolerations = pod.spec.as_ref().and_then(|s| s.tolerations.as_deref()).unwrap_or_default();
    let taints = node.spec.as_ref().and_then(|s| s.taints.as_deref()).unwrap_or_default();
    let mut soonest: Option<Duration> = None;
    for taint in taints.iter().filter(|t| t.effect == "NoExecute") {
        let matching: Vec<_> = tolerations.iter().filter(|t| tolerates(t, taint)).collect();
        let left = if matching.is_empty() {
            Duration::ZERO
        } else {
            // The shortest tolerance counts; without one the taint is tolerated for ever.
            let Some(seconds) = matching.iter().filter_map(|t| t.toleration_seconds).min() else { continue };
            let allowed = Duration::from_secs(u64::try_from(seconds).unwrap_or(0));
            let passed = taint
                .time_added
                .as_ref()
                .map_or(Duration::ZERO, |t| Duration::try_from(now.duration_since(t.0)).unwrap_or_default());
            allowed.saturating_sub(passed)
        };
        soonest = Some(soonest.map_or(left, |s| s.min(left)));
    }
    soonest
}

fn ready_status(node: &Node) -> Option<&str> {
    let conditions = node.status.as_ref()?.conditions.as_ref()?;
    conditions.iter().find(|c| c.type_ == "Ready").map(|c| c.status.as_str())
}

/// When a node was last heard of, by this process's clock.
struct Heartbeats {
    clock: Clock,
    heard: Mutex<HashMap<String, Instant>>,
}

const POISONED: &str = "heartbeats are only read and written";

impl Heartbeats {
    fn beat(&self, node: &str) {
        self.heard.lock().expect(POISONED).insert(node.to_string(), self.clock.instant());
    }

    fn silent_for(&self, node: &str) -> Duration {
        let mut heard = self.heard.lock().expect(POISONED);
        let since = *heard.entry(node.to_string()).or_insert_with(|| self.clock.instant());
        self.clock.since(since)
    }
}

/// Registers with the caches and returns the future that works.
pub(crate) fn start_lifecycle(context: Context) -> impl Future<Output = ()> + Send + 'static {
    let queue: Queue<Key> = context.queue("node_lifecycle_controller");
    let heartbeats = Arc::new(Heartbeats { clock: context.clock.clone(), heard: Mutex::default() });
    let (add, beats) = (queue.clone(), heartbeats.clone());
    context.caches.nodes.on_change(move |old, new| {
        let Some(node) = new.or(old) else { return };
        let name = node.metadata.name.clone().unwrap_or_default();
        let reported = |n: &Node| {
            let conditions = n.status.as_ref().and_then(|s| s.conditions.clone()).unwrap_or_default();
            conditions.into_iter().filter_map(|c| c.last_heartbeat_time).max()
        };
        if new.is_none() {
            beats.heard.lock().expect(POISONED).remove(&name);
        } else if old.is_none_or(|o| reported(o) != reported(node)) {
            beats.beat(&name);
        }
        add.add(Key::new("", name));
    });
    let (add, beats) = (queue.clone(), heartbeats.clone());
    let nodes = context.caches.nodes.clone();
    context.caches.node_leases.on_change(move |old, new| {
        let Some(name) = new.and_then(|l| l.metadata.name.clone()) else { return };
        beats.beat(&name);
        // The first heartbeat starts the watch over a node; of the others only a node that is not ready needs to know.
        if old.is_none() || nodes.get("", &name).is_some_and(|n| ready_status(&n) == Some("Unknown")) {
            add.add(Key::new("", name));
        }
    });
    // A pod bound to a tainted node is judged when it comes.
    let add = queue.clone();
    let nodes = context.caches.nodes.clone();
    context.caches.pods.on_change(move |old, new| {
        let node = |p: Option<&Arc<Pod>>| p.and_then(|p| p.spec.as_ref()?.node_name.clone());
        if let Some(name) = node(new).filter(|n| !n.is_empty())
            && node(old).as_ref() != Some(&name)
            && let Some(target) = nodes.get("", &name)
            && target.spec.as_ref().is_some_and(|s| s.taints.iter().flatten().any(|t| t.effect == "NoExecute"))
        {
            add.add(Key::new("", name));
        }
    });
    async move {
        let events = context.recorder("node-controller");
        let stop = context.shutdown.clone();
        queue.work(4, stop, move |key| watch_over(context.clone(), events.clone(), heartbeats.clone(), key.name)).await;
    }
}

async fn watch_over(
    context: Context,
    events: EventRecorder,
    heartbeats: Arc<Heartbeats>,
    name: String,
) -> anyhow::Result<Next> {
    let cache = &context.caches.nodes;
    let Some(mut node) = cache.get("", &name) else { return Ok(Next::Wait) };
    let api: Api<Node> = Api::all(context.client.clone());
    let mut next = Next::Wait;
    // Only nodes with a kubelet that sends heartbeats are watched over: a Node object that a person made stays as it is.
    let has_kubelet = context.caches.node_leases.get(LEASE_NAMESPACE, &name).is_some();
    if has_kubelet {
        let silent = heartbeats.silent_for(&name);
        if silent >= GRACE {
            if let Some(conditions) = silence(&node, context.clock.now()) {
                let was_ready = ready_status(&node) == Some("True");
                let mut updated = Node::clone(&node);
                updated.status.get_or_insert_default().conditions = Some(conditions);
                let written = api
                    .replace_status(&name, &PostParams::default(), &updated)
                    .await
                    .context("cannot mark the node")?;
                cache.wrote(written.clone());
                node = Arc::new(written);
                if was_ready {
                    let text = format!("Node {name} status is now: NodeNotReady");
                    events.event(&reference(&*node), EventType::Normal, "NodeNotReady", text);
                }
            }
        } else {
            next = Next::After(GRACE - silent + Duration::from_millis(10));
        }
    }
    if let Some(taints) = taints(&node, context.clock.now()).filter(|_| has_kubelet || ready_status(&node).is_some()) {
        let version = node.metadata.resource_version.clone();
        let patch = json!({"metadata": {"resourceVersion": version}, "spec": {"taints": taints}});
        let written =
            api.patch(&name, &PatchParams::default(), &Patch::Merge(patch)).await.context("cannot taint the node")?;
        cache.wrote(written.clone());
        node = Arc::new(written);
    }
    let on_node = |p: &Arc<Pod>| p.spec.as_ref().and_then(|s| s.node_name.as_deref()) == Some(name.as_str());
    let node_pods: Vec<Arc<Pod>> = context.caches.pods.all().into_iter().filter(on_node).collect();
    // Pods on a bare Node object have no kubelet that could have been lost.
    if has_kubelet && ready_status(&node).is_some_and(|s| s != "True") {
        for pod in node_pods.iter().filter(|p| pods::is_ready(p)) {
            mark_not_ready(&context, &events, pod).await?;
        }
    }
    let now = context.clock.now();
    for pod in node_pods.iter().filter(|p| pods::is_active(p)) {
        match eviction(pod, &node, now) {
            None => {}
            Some(Duration::ZERO) => {
                let text = format!(
                    "Marking for deletion Pod {}/{}",
                    pod.metadata.namespace.as_deref().unwrap_or_default(),
                    pod.metadata.name.as_deref().unwrap_or_default()
                );
                events.event(&reference(&**pod), EventType::Normal, "TaintManagerEviction", text);
                let api =
                    Api::namespaced(context.client.clone(), pod.metadata.namespace.as_deref().unwrap_or_default());
                remove(&api, &context.caches.pods, pod, &DeleteParams::default()).await.context("cannot evict")?;
            }
            Some(left) => {
                let left = left + Duration::from_millis(50);
                next = Next::After(match next {
                    Next::Wait => left,
                    Next::After(other) => other.min(left),
                });
            }
        }
    }
    Ok(next)
}

async fn mark_not_ready(context: &Context, events: &EventRecorder, pod: &Pod) -> anyhow::Result<()> {
    let api: Api<Pod> = Api::namespaced(context.client.clone(), pod.metadata.namespace.as_deref().unwrap_or_default());
    let now = context.clock.now();
    let now = Timestamp::from_second(now.as_second()).unwrap_or(now);
    let patch = json!({"metadata": {"uid": pod.metadata.uid}, "status": {"conditions": [{
        "type": "Ready", "status": "False", "lastTransitionTime": now,
    }]}});
    let name = pod.metadata.name.as_deref().unwrap_or_default();
    match api.patch_status(name, &PatchParams::default(), &Patch::Strategic(patch)).await {
        Ok(written) => {
            context.caches.pods.wrote(written);
            events.event(&reference(pod), EventType::Warning, "NodeNotReady", "Node is not ready");
            Ok(())
        }
        Err(error) if is_not_found(&error) || is_replaced(&error) => Ok(()),
        Err(error) => Err(error).context("cannot mark the pod not ready"),
    }
}

/// Pods of a node that is gone are deleted after this long without the node (a node may be made again under its name).
const QUARANTINE: Duration = Duration::from_secs(40);

/// Registers with the caches and returns the future that works: it deletes pods bound to nodes that do not exist.
pub(crate) fn start_pod_gc(context: Context) -> impl Future<Output = ()> + Send + 'static {
    let queue: Queue<Key> = context.queue("pod_garbage_collector");
    let missing: Arc<Mutex<HashMap<String, Instant>>> = Arc::default();
    let add = queue.clone();
    context.caches.nodes.on_change(move |old, new| {
        if let Some(name) = new.or(old).and_then(|n| n.metadata.name.clone()).filter(|_| old.is_none() || new.is_none())
        {
            add.add(Key::new("", name));
        }
    });
    let add = queue.clone();
    let nodes = context.caches.nodes.clone();
    context.caches.pods.on_change(move |_, new| {
        if let Some(name) = new.and_then(|p| p.spec.as_ref()?.node_name.clone()).filter(|n| !n.is_empty())
            && nodes.get("", &name).is_none()
        {
            add.add(Key::new("", name));
        }
    });
    async move {
        let stop = context.shutdown.clone();
        queue.work(1, stop, move |key| collect(context.clone(), missing.clone(), key.name)).await;
    }
}

async fn collect(
    context: Context,
    missing: Arc<Mutex<HashMap<String, Instant>>>,
    node: String,
) -> anyhow::Result<Next> {
    let on_node = |p: &Arc<Pod>| p.spec.as_ref().and_then(|s| s.node_name.as_deref()) == Some(node.as_str());
    let pods: Vec<Arc<Pod>> = context.caches.pods.all().into_iter().filter(on_node).collect();
    if pods.is_empty() || context.caches.nodes.get("", &node).is_some() {
        missing.lock().expect(POISONED).remove(&node);
        return Ok(Next::Wait);
    }
    let since = *missing.lock().expect(POISONED).entry(node.clone()).or_insert_with(|| context.clock.instant());
    if let Some(left) = QUARANTINE.checked_sub(context.clock.since(since)).filter(|left| !left.is_zero()) {
        return Ok(Next::After(left));
    }
    // The cache might lag behind; the server knows.
    let api: Api<Node> = Api::all(context.client.clone());
    if api.get_metadata_opt(&node).await?.is_some() {
        return Ok(Next::Wait);
    }
    for pod in pods {
        let api: Api<Pod> =
            Api::namespaced(context.client.clone(), pod.metadata.namespace.as_deref().unwrap_or_default());
        let name = pod.metadata.name.as_deref().unwrap_or_default();
        if !pods::is_finished(&pod) {
            let patch = json!({"metadata": {"uid": pod.metadata.uid}, "status": {"phase": "Failed", "conditions": [{
                "type": "DisruptionTarget", "status": "True", "reason": "DeletionByPodGC",
                "message": "PodGC: node no longer exists", "lastTransitionTime": context.clock.now(),
            }]}});
            match api.patch_status(name, &PatchParams::default(), &Patch::Strategic(patch)).await {
                Ok(_) => {}
                Err(error) if is_not_found(&error) || is_replaced(&error) => continue,
                Err(error) => return Err(error).context("cannot mark an orphaned pod as failed"),
            }
        }
        let params = DeleteParams { grace_period_seconds: Some(0), ..Default::default() };
        remove(&api, &context.caches.pods, &pod, &params).await.context("cannot delete an orphaned pod")?;
    }
    Ok(Next::Wait)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn node(ready: Option<&str>, taints: serde_json::Value) -> Node {
        let conditions = ready.map(|status| json!([{"type": "Ready", "status": status}]));
        serde_json::from_value(json!({
            "metadata": {"name": "n"}, "spec": {"taints": taints}, "status": {"conditions": conditions}
        }))
        .unwrap()
    }

    fn keys(taints: &[Taint]) -> Vec<(&str, &str)> {
        taints.iter().map(|t| (t.key.as_str(), t.effect.as_str())).collect()
    }

    #[test]
    fn taints_follow_the_ready_condition_and_leave_others_alone() {
        let now = Timestamp::UNIX_EPOCH;
        let mine = json!([{"key": "mine", "effect": "NoSchedule"}]);
        let silent = taints(&node(Some("Unknown"), mine.clone()), now).unwrap();
        assert_eq!(keys(&silent), [("mine", "NoSchedule"), (UNREACHABLE, "NoSchedule"), (UNREACHABLE, "NoExecute")]);
        let sick = taints(&node(Some("False"), json!(silent)), now).unwrap();
        assert_eq!(keys(&sick), [("mine", "NoSchedule"), (NOT_READY, "NoSchedule"), (NOT_READY, "NoExecute")]);
        assert_eq!(keys(&taints(&node(Some("True"), json!(sick)), now).unwrap()), [("mine", "NoSchedule")]);
        assert_eq!(taints(&node(Some("True"), mine), now), None);
    }

    #[test]
    fn silence_is_told_once() {
        let silent = silence(&node(Some("True"), json!(null)), Timestamp::UNIX_EPOCH).unwrap();
        let ready = silent.iter().find(|c| c.type_ == "Ready").unwrap();
        assert_eq!((ready.status.as_str(), ready.reason.as_deref()), ("Unknown", Some("NodeStatusUnknown")));
        let mut again = node(None, json!(null));
        again.status.get_or_insert_default().conditions = Some(silent);
        assert_eq!(silence(&again, Timestamp::UNIX_EPOCH), None);
    }

    #[test]
    fn eviction_waits_for_the_shortest_tolerance() {
        let now = Timestamp::from_second(1000).unwrap();
        let tainted = node(
            Some("Unknown"),
            json!([{"key": UNREACHABLE, "effect": "NoExecute", "timeAdded": Timestamp::from_second(900).unwrap()}]),
        );
        let pod = |tolerations: serde_json::Value| -> Pod {
            serde_json::from_value(json!({"spec": {"containers": [], "tolerations": tolerations}})).unwrap()
        };
        let with = |seconds: Option<i64>| json!([{"key": UNREACHABLE, "operator": "Exists", "effect": "NoExecute", "tolerationSeconds": seconds}]);
        assert_eq!(eviction(&pod(json!([])), &tainted, now), Some(Duration::ZERO));
        assert_eq!(eviction(&pod(with(Some(300))), &tainted, now), Some(Duration::from_secs(200)));
        assert_eq!(eviction(&pod(with(Some(60))), &tainted, now), Some(Duration::ZERO));
        assert_eq!(eviction(&pod(with(None)), &tainted, now), None);
        assert_eq!(eviction(&pod(json!([])), &node(Some("True"), json!(null)), now), None);
    }
}
