//! DaemonSets: one pod on every node that the template asks for.
//!
//! The pods are pinned by node affinity and bound by the scheduler, as upstream does since 1.12.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;

use anyhow::Context as _;
use jiff::Timestamp;
use k8s_openapi::api::apps::v1::{ControllerRevision, DaemonSet, DaemonSetStatus};
use k8s_openapi::api::core::v1::{
    Node, NodeSelector, NodeSelectorRequirement, NodeSelectorTerm, Pod, PodSpec, Toleration,
};
use k8s_openapi::apimachinery::pkg::apis::meta::v1::ObjectMeta;
use k8s_openapi::apimachinery::pkg::runtime::RawExtension;
use kube::Api;
use kube::api::{DeleteParams, Patch, PatchParams, PostParams};
use portolan_client::{EventRecorder, EventType};
use serde_json::json;

use crate::Context;
use crate::pods::{self, Availability};
use crate::queue::{Key, Next, Queue};
use crate::replicaset::{adopt, delete_pod, may_adopt, release, wake_owner};
use crate::scheduler::{tolerates_node, wants_node};
use crate::statefulset::{REVISION_LABEL, revision_data, revision_template};
use crate::util::{
    already_exists, controller_of, controller_reference, is_controlled_by, is_namespace_terminating, is_not_found,
    message, reference,
};

const WORKERS: usize = 2;
/// Annotation and label from the time before revisions; `kubectl` still shows it.
const TEMPLATE_GENERATION: &str = "deprecated.daemonset.template.generation";
const POD_TEMPLATE_GENERATION: &str = "pod-template-generation";
/// Pods made or deleted in one sync at most.
const BURST: usize = 250;

/// What to do in one step.
#[derive(Debug, Default)]
pub struct Plan {
    /// Nodes that get a pod.
    pub create: Vec<String>,
    /// Pods to delete.
    pub delete: Vec<Arc<Pod>>,
    /// Pods that have failed, among those to delete.
    pub failed: Vec<Arc<Pod>>,
    /// Status.
    pub status: DaemonSetStatus,
    /// When a pod becomes available by the passing of time.
    pub recheck: Option<Duration>,
}

/// The pod for one node. `hash` names the revision of the template.
pub fn make_pod(set: &DaemonSet, node: &str, hash: &str) -> Pod {
    let template = set.spec.clone().unwrap_or_default().template;
    let mut pod = pods::from_template(&template, set.metadata.namespace.as_deref(), controller_reference(set));
    pod.metadata.generate_name = Some(format!("{}-", set.metadata.name.as_deref().unwrap_or_default()));
    let labels = pod.metadata.labels.get_or_insert_default();
    labels.insert(REVISION_LABEL.into(), hash.into());
    if let Some(generation) = set.metadata.annotations.as_ref().and_then(|a| a.get(TEMPLATE_GENERATION)) {
        labels.insert(POD_TEMPLATE_GENERATION.into(), generation.clone());
    }
    let spec = pod.spec.get_or_insert_default();
    let affinity = spec.affinity.get_or_insert_default().node_affinity.get_or_insert_default();
    affinity.required_during_scheduling_ignored_during_execution = Some(NodeSelector {
        node_selector_terms: vec![NodeSelectorTerm {
            match_expressions: None,
            match_fields: Some(vec![NodeSelectorRequirement {
                key: "metadata.name".into(),
                operator: "In".into(),
                values: Some(vec![node.into()]),
            }]),
        }],
    });
    add_tolerations(spec);
    pod
}

/// A daemon stays on nodes in trouble: those are where it is needed.
fn add_tolerations(spec: &mut PodSpec) {
    let host_network = spec.host_network.unwrap_or(false);
    let tolerations = spec.tolerations.get_or_insert_default();
    for (condition, effect) in [
        ("not-ready", "NoExecute"),
        ("unreachable", "NoExecute"),
        ("disk-pressure", "NoSchedule"),
        ("memory-pressure", "NoSchedule"),
        ("pid-pressure", "NoSchedule"),
        ("unschedulable", "NoSchedule"),
        ("network-unavailable", "NoSchedule"),
    ] {
        if condition == "network-unavailable" && !host_network {
            continue;
        }
        let toleration = Toleration {
            key: Some(format!("node.kubernetes.io/{condition}")),
            operator: Some("Exists".into()),
            effect: Some(effect.into()),
            ..Default::default()
        };
        if !tolerations.contains(&toleration) {
            tolerations.push(toleration);
        }
    }
}

/// The node that a pod runs on or is pinned to.
fn node_of(pod: &Pod) -> Option<&str> {
    let spec = pod.spec.as_ref()?;
    if let Some(node) = spec.node_name.as_deref().filter(|n| !n.is_empty()) {
        return Some(node);
    }
    let required =
        spec.affinity.as_ref()?.node_affinity.as_ref()?.required_during_scheduling_ignored_during_execution.as_ref()?;
    let fields = required.node_selector_terms.iter().flat_map(|t| t.match_fields.iter().flatten());
    fields.filter(|f| f.key == "metadata.name").find_map(|f| f.values.as_ref()?.first().map(String::as_str))
}

/// Decides one step. `pods` are those that the set controls; `hash` names the revision of the present template.
pub fn plan(set: &DaemonSet, pods: &[Arc<Pod>], nodes: &[Arc<Node>], hash: &str, now: Timestamp) -> Plan {
    let spec = set.spec.clone().unwrap_or_default();
    let min_ready = spec.min_ready_seconds.unwrap_or(0);
    let mut pod_spec = spec.template.spec.clone().unwrap_or_default();
    add_tolerations(&mut pod_spec);
    let mut by_node: BTreeMap<&str, Vec<&Arc<Pod>>> = BTreeMap::new();
    for pod in pods {
        if let Some(node) = node_of(pod) {
            by_node.entry(node).or_default().push(pod);
        }
    }
    for pods in by_node.values_mut() {
        pods.sort_by_key(|p| (p.metadata.creation_timestamp.as_ref().map(|t| t.0), p.metadata.name.clone()));
    }
    let mut plan = Plan::default();
    let available = |pod: &Pod| pods::availability(pod, min_ready, now) == Availability::Available;
    let is_new =
        |pod: &Pod| pod.metadata.labels.as_ref().and_then(|l| l.get(REVISION_LABEL)).is_some_and(|h| h == hash);
    let mut nodes: Vec<&Arc<Node>> = nodes.iter().collect();
    nodes.sort_by(|a, b| a.metadata.name.cmp(&b.metadata.name));
    let (mut desired, mut current, mut misplaced, mut ready, mut ok, mut updated) = (0, 0, 0, 0, 0, 0);
    // Nodes where a rolling update may act.
    let mut settled: Vec<(&str, Vec<&Arc<Pod>>)> = Vec::new();
    let mut away = 0;
    for node in nodes {
        let name = node.metadata.name.as_deref().unwrap_or_default();
        let here = by_node.remove(name).unwrap_or_default();
        let may_stay = wants_node(&pod_spec, node) && tolerates_node(&pod_spec, node, "NoExecute");
        let should_run = may_stay && tolerates_node(&pod_spec, node, "NoSchedule");
        if should_run {
            desired += 1;
            if let Some(oldest) = here.first() {
                current += 1;
                if pods::is_ready(oldest) {
                    ready += 1;
                    match pods::availability(oldest, min_ready, now) {
                        Availability::Available => ok += 1,
                        Availability::In(rest) => plan.recheck = Some(plan.recheck.map_or(rest, |r| r.min(rest))),
                        Availability::No => {}
                    }
                }
                updated += i32::from(is_new(oldest));
            }
        } else if !here.is_empty() {
            misplaced += 1;
        }
        let staying: Vec<&Arc<Pod>> = here.iter().filter(|p| !pods::is_terminating(p)).copied().collect();
        if !may_stay {
            plan.delete.extend(staying.into_iter().cloned());
            continue;
        }
        let (dead, mut living): (Vec<&Arc<Pod>>, Vec<&Arc<Pod>>) =
            staying.into_iter().partition(|p| pods::is_finished(p));
        plan.failed.extend(dead.iter().map(|p| Arc::clone(p)));
        plan.delete.extend(dead.iter().map(|p| Arc::clone(p)));
        // Of several pods of one revision the oldest stays.
        for revision in [true, false] {
            let extra: Vec<&Arc<Pod>> = living.iter().filter(|p| is_new(p) == revision).skip(1).copied().collect();
            living.retain(|p| !extra.iter().any(|e| Arc::ptr_eq(e, p)));
            plan.delete.extend(extra.into_iter().cloned());
        }
        if should_run && here.is_empty() {
            plan.create.push(name.to_string());
        }
        if should_run {
            away += i32::from(!living.iter().any(|p| available(p)));
            settled.push((name, living));
        }
    }
    // Pods pinned to nodes that are gone can never run.
    plan.delete.extend(by_node.into_values().flatten().filter(|p| !pods::is_terminating(p)).cloned());

    let strategy = spec.update_strategy.clone().unwrap_or_default();
    if strategy.type_.as_deref() != Some("OnDelete") {
        let rolling = strategy.rolling_update.unwrap_or_default();
        let resolve = |value: Option<&_>| value.and_then(|v| pods::resolve_int_or_percent(v, desired, true));
        let surge = resolve(rolling.max_surge.as_ref()).unwrap_or(0);
        let unavailable = resolve(rolling.max_unavailable.as_ref()).unwrap_or(1);
        let mut budget = unavailable - away;
        let both = |living: &[&Arc<Pod>]| living.iter().any(|p| is_new(p)) && living.iter().any(|p| !is_new(p));
        let mut surging = i32::try_from(settled.iter().filter(|(_, l)| both(l)).count()).unwrap_or(i32::MAX);
        for (node, living) in &settled {
            let Some(old) = living.iter().find(|p| !is_new(p)) else { continue };
            let new = living.iter().find(|p| is_new(p));
            if new.is_some_and(|p| available(p)) || new.is_none() && !available(old) {
                // Replaced already, or of no use anyway.
                plan.delete.push(Arc::clone(old));
            } else if surge > 0 {
                if new.is_none() && surging < surge {
                    surging += 1;
                    plan.create.push((*node).to_string());
                }
            } else if new.is_none() && budget > 0 {
                budget -= 1;
                plan.delete.push(Arc::clone(old));
            }
        }
    }
    plan.create.truncate(BURST);
    plan.delete.truncate(BURST);
    if set.metadata.deletion_timestamp.is_some() {
        plan.create.clear();
        plan.delete.clear();
        plan.failed.clear();
    }
    let some = |count: i32| Some(count).filter(|c| *c != 0);
    plan.status = DaemonSetStatus {
        desired_number_scheduled: desired,
        current_number_scheduled: current,
        number_misscheduled: misplaced,
        number_ready: ready,
        number_available: some(ok),
        number_unavailable: some(desired - ok),
        updated_number_scheduled: some(updated),
        observed_generation: set.metadata.generation,
        collision_count: set.status.as_ref().and_then(|s| s.collision_count),
        conditions: set.status.as_ref().and_then(|s| s.conditions.clone()),
    };
    plan
}

/// Registers with the caches and returns the future that works.
pub(crate) fn start(context: Context) -> impl Future<Output = ()> + Send + 'static {
    let queue: Queue<Key> = context.queue("daemonset");
    let add = queue.clone();
    context.caches.daemon_sets.on_change(move |old, new| {
        if let Some(set) = new.or(old) {
            add.add(Key::of(&**set));
        }
    });
    let add = queue.clone();
    let sets = context.caches.daemon_sets.clone();
    context.caches.pods.on_change(move |old, new| {
        for pod in [old, new].into_iter().flatten() {
            wake_owner(pod, "DaemonSet", &sets, &add, |set| set.spec.as_ref().map(|s| &s.selector));
        }
    });
    let add = queue.clone();
    let sets = context.caches.daemon_sets.clone();
    context.caches.nodes.on_change(move |old, new| {
        let matter = |n: &Arc<Node>| (n.metadata.labels.clone(), n.spec.as_ref().and_then(|s| s.taints.clone()));
        if old.map(matter) != new.map(matter) {
            for set in sets.all() {
                add.add(Key::of(&*set));
            }
        }
    });
    let add = queue.clone();
    context.caches.revisions.on_change(move |old, new| {
        for revision in [old, new].into_iter().flatten() {
            if let Some(owner) = controller_of(&**revision).filter(|o| o.kind == "DaemonSet") {
                add.add(Key::new(revision.metadata.namespace.clone().unwrap_or_default(), &owner.name));
            }
        }
    });
    async move {
        let events = context.recorder("daemonset-controller");
        let stop = context.shutdown.clone();
        queue.work(WORKERS, stop, move |key| sync(context.clone(), events.clone(), key)).await;
    }
}

async fn sync(context: Context, events: EventRecorder, key: Key) -> anyhow::Result<Next> {
    let caches = &context.caches;
    let Some(set) = caches.daemon_sets.get(&key.namespace, &key.name) else { return Ok(Next::Wait) };
    let spec = set.spec.clone().unwrap_or_default();
    let uid = set.metadata.uid.as_deref();
    let pod_api: Api<Pod> = Api::namespaced(context.client.clone(), &key.namespace);
    let claim =
        pods::claim(&set.metadata, &spec.selector, caches.pods.claimable(&key.namespace, uid, &spec.selector), |_| {
            true
        });
    if !claim.adopt.is_empty() {
        let sets: Api<DaemonSet> = Api::namespaced(context.client.clone(), &key.namespace);
        if !may_adopt(&sets, &set).await? {
            return Ok(Next::Wait);
        }
    }
    for pod in &claim.adopt {
        adopt(&pod_api, &caches.pods, &*set, pod).await?;
    }
    for pod in &claim.release {
        release(&pod_api, &caches.pods, uid, pod).await?;
    }
    let pods = uid.map(|uid| caches.pods.controlled_by(uid)).unwrap_or_default();
    let Some(hash) = ensure_revision(&context, &set, &pods).await? else { return Ok(Next::Wait) };
    let first = plan(&set, &pods, &caches.nodes.all(), &hash, context.clock.now());
    for pod in &first.failed {
        let name = pod.metadata.name.as_deref().unwrap_or_default();
        let node = node_of(pod).unwrap_or_default();
        let text = format!("Found failed daemon pod {}/{name} on node {node}, will try to kill it", key.namespace);
        events.event(&reference(&*set), EventType::Warning, "FailedDaemonPod", text);
    }
    let mut failure = None;
    let params = PostParams::default();
    let made: Vec<Pod> = first.create.iter().map(|node| make_pod(&set, node, &hash)).collect();
    for result in futures::future::join_all(made.iter().map(|pod| pod_api.create(&params, pod))).await {
        match result {
            Ok(pod) => {
                let text = format!("Created pod: {}", pod.metadata.name.as_deref().unwrap_or_default());
                caches.pods.wrote(pod);
                events.event(&reference(&*set), EventType::Normal, "SuccessfulCreate", text);
            }
            Err(error) if is_namespace_terminating(&error) => return Ok(Next::Wait),
            Err(error) => {
                let text = format!("Error creating: {}", message(&error));
                events.event(&reference(&*set), EventType::Warning, "FailedCreate", text);
                failure = Some(error);
            }
        }
    }
    for pod in &first.delete {
        if let Err(error) = delete_pod(&pod_api, &caches.pods, &events, &*set, pod).await {
            failure = Some(error);
        }
    }
    // The status describes the pods as they are after this sync's writes.
    let pods = uid.map(|uid| caches.pods.controlled_by(uid)).unwrap_or_default();
    let after = plan(&set, &pods, &caches.nodes.all(), &hash, context.clock.now());
    if set.status.as_ref() != Some(&after.status) {
        let api: Api<DaemonSet> = Api::namespaced(context.client.clone(), &key.namespace);
        let mut updated = DaemonSet::clone(&set);
        updated.status = Some(after.status);
        match api.replace_status(&key.name, &PostParams::default(), &updated).await {
            Ok(written) => caches.daemon_sets.wrote(written),
            Err(error) if is_not_found(&error) => return Ok(Next::Wait),
            Err(error) => return Err(error).context("cannot update the status"),
        }
    }
    match failure {
        Some(error) => Err(error.into()),
        None => Ok(after.recheck.map_or(Next::Wait, Next::After)),
    }
}

/// Makes sure that the present template has the newest ControllerRevision and answers its hash; old ones beyond the history
/// limit are deleted. `None` when the namespace is going away.
async fn ensure_revision(context: &Context, set: &DaemonSet, pods: &[Arc<Pod>]) -> anyhow::Result<Option<String>> {
    let cache = &context.caches.revisions;
    let namespace = set.metadata.namespace.as_deref().unwrap_or_default();
    let set_name = set.metadata.name.as_deref().unwrap_or_default();
    let spec = set.spec.clone().unwrap_or_default();
    let api: Api<ControllerRevision> = Api::namespaced(context.client.clone(), namespace);
    let mut existing = cache.list(namespace);
    existing.retain(|r| is_controlled_by(&**r, set.metadata.uid.as_deref()));
    existing.sort_by_key(|r| r.revision);
    let newest = existing.last().map_or(0, |r| r.revision);
    let hash_of = |r: &ControllerRevision| r.metadata.labels.as_ref().and_then(|l| l.get(REVISION_LABEL)).cloned();
    if let Some(found) = existing.iter().rev().find(|r| revision_template(r).as_ref() == Some(&spec.template)) {
        if found.revision < newest {
            let name = found.metadata.name.as_deref().unwrap_or_default();
            let patch = Patch::Merge(json!({"revision": newest + 1}));
            let written = api.patch(name, &PatchParams::default(), &patch).await;
            cache.wrote_quietly(written.context("cannot renumber the controller revision")?);
        }
        let hash = hash_of(found).unwrap_or_default();
        let used = |r: &ControllerRevision| {
            let label = |p: &Pod| p.metadata.labels.as_ref().and_then(|l| l.get(REVISION_LABEL)).cloned();
            hash_of(r).as_ref() == Some(&hash) || pods.iter().any(|p| label(p) == hash_of(r))
        };
        let unused: Vec<&Arc<ControllerRevision>> = existing.iter().filter(|r| !used(r)).collect();
        let limit = usize::try_from(spec.revision_history_limit.unwrap_or(10)).unwrap_or(0);
        for revision in unused.iter().take(unused.len().saturating_sub(limit)) {
            let name = revision.metadata.name.as_deref().unwrap_or_default();
            match api.delete(name, &DeleteParams::default()).await {
                Ok(_) => cache.deleted(revision),
                Err(error) if is_not_found(&error) => cache.deleted(revision),
                Err(error) => return Err(error).context("cannot delete an old controller revision"),
            }
        }
        return Ok(Some(hash));
    }
    for collisions in set.status.as_ref().and_then(|s| s.collision_count).unwrap_or(0).. {
        let hash = pods::template_hash(&spec.template, Some(collisions));
        let mut labels = spec.template.metadata.as_ref().and_then(|m| m.labels.clone()).unwrap_or_default();
        labels.insert(REVISION_LABEL.into(), hash.clone());
        let revision = ControllerRevision {
            metadata: ObjectMeta {
                name: Some(format!("{set_name}-{hash}")),
                namespace: Some(namespace.into()),
                labels: Some(labels),
                annotations: set.metadata.annotations.clone(),
                owner_references: Some(vec![controller_reference(set)]),
                ..Default::default()
            },
            data: Some(RawExtension(revision_data(&spec.template))),
            revision: newest + 1,
        };
        match api.create(&PostParams::default(), &revision).await {
            Ok(made) => {
                cache.wrote_quietly(made);
                return Ok(Some(hash));
            }
            Err(error) if already_exists(&error) => {}
            Err(error) if is_namespace_terminating(&error) => return Ok(None),
            Err(error) => return Err(error).context("cannot create the controller revision"),
        }
    }
    Ok(None)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn set(spec: serde_json::Value) -> DaemonSet {
        let mut whole = json!({
            "selector": {"matchLabels": {"app": "d"}},
            "template": {"metadata": {"labels": {"app": "d"}}, "spec": {"nodeSelector": {"disk": "ssd"}, "containers": []}}
        });
        whole.as_object_mut().unwrap().extend(spec.as_object().unwrap().clone());
        serde_json::from_value(json!({"metadata": {"name": "d", "namespace": "ns", "uid": "d"}, "spec": whole}))
            .unwrap()
    }

    fn node(name: &str, disk: &str, taint: Option<&str>) -> Arc<Node> {
        let taints = taint.map(|effect| json!([{"key": "k", "effect": effect}]));
        let node = json!({"metadata": {"name": name, "labels": {"disk": disk}}, "spec": {"taints": taints}});
        Arc::new(serde_json::from_value(node).unwrap())
    }

    fn pod(name: &str, node: &str, hash: &str, ready: bool) -> Arc<Pod> {
        let mut pod = make_pod(&set(json!({})), node, hash);
        pod.metadata.name = Some(name.into());
        let status = json!({"phase": "Running", "conditions": [{"type": "Ready", "status": if ready { "True" } else { "False" }}]});
        pod.status = serde_json::from_value(status).unwrap();
        Arc::new(pod)
    }

    fn step(set: &DaemonSet, pods: &[Arc<Pod>], nodes: &[Arc<Node>]) -> (Vec<String>, Vec<String>) {
        let plan = plan(set, pods, nodes, "new", Timestamp::UNIX_EPOCH);
        (plan.create, plan.delete.iter().filter_map(|p| p.metadata.name.clone()).collect())
    }

    #[test]
    fn nodes_that_get_a_pod() {
        let nodes = [
            node("fits", "ssd", None),
            node("other", "hdd", None),
            node("tainted", "ssd", Some("NoSchedule")),
            node("taken", "ssd", None),
        ];
        let pods =
            [pod("here", "taken", "new", true), pod("stray", "other", "new", true), pod("lost", "gone", "new", true)];
        assert_eq!(step(&set(json!({})), &pods, &nodes), (vec!["fits".into()], vec!["stray".into(), "lost".into()]));
        let tainted = [pod("stays", "tainted", "new", true)];
        assert_eq!(
            step(&set(json!({})), &tainted, &nodes[2..3]).1,
            Vec::<String>::new(),
            "NoSchedule does not drive away"
        );
        assert_eq!(step(&set(json!({})), &tainted, &[node("tainted", "ssd", Some("NoExecute"))]).1, ["stays"]);
    }

    #[test]
    fn updates() {
        let nodes = [node("a", "ssd", None), node("b", "ssd", None)];
        let old = [pod("a1", "a", "old", true), pod("b1", "b", "old", true)];
        assert_eq!(step(&set(json!({})), &old, &nodes).1, ["a1"], "one at a time");
        let sick = [pod("a1", "a", "old", true), pod("b1", "b", "old", false)];
        assert_eq!(step(&set(json!({})), &sick, &nodes).1, ["b1"], "what does not work goes first");
        let manual = set(json!({"updateStrategy": {"type": "OnDelete"}}));
        assert_eq!(step(&manual, &old, &nodes).1, Vec::<String>::new());
        let surge = set(json!({"updateStrategy": {"rollingUpdate": {"maxSurge": 1, "maxUnavailable": 0}}}));
        assert_eq!(step(&surge, &old, &nodes), (vec!["a".into()], vec![]));
        let growing = [pod("a1", "a", "old", true), pod("a2", "a", "new", false), pod("b1", "b", "old", true)];
        assert_eq!(step(&surge, &growing, &nodes), (vec![], vec![]), "waits for the new pod");
        let grown = [pod("a1", "a", "old", true), pod("a2", "a", "new", true), pod("b1", "b", "old", true)];
        assert_eq!(step(&surge, &grown, &nodes).1, ["a1"]);
    }
}
