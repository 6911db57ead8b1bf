//! ReplicaSets: keep a number of pods of one template.

use std::collections::{BTreeMap, HashSet};
use std::sync::Arc;
use std::time::Duration;

use anyhow::Context as _;
use jiff::Timestamp;
use k8s_openapi::api::apps::v1::{ReplicaSet, ReplicaSetCondition, ReplicaSetStatus};
use k8s_openapi::api::core::v1::{Pod, PodTemplateSpec};
use k8s_openapi::apimachinery::pkg::apis::meta::v1::{ObjectMeta, Time};
use kube::Api;
use kube::api::{DeleteParams, Patch, PatchParams, PostParams, Preconditions};
use portolan_client::{EventRecorder, EventType};

use crate::Context;
use crate::cache::Informer;
use crate::pods::{self, Availability, Claim};
use crate::queue::{Key, Next, Queue};
use crate::selector;
use crate::util::{
    controller_of, controller_reference, is_conflict, is_controlled_by, is_namespace_terminating, is_not_found,
    is_replaced, message, reference,
};

/// Syncs of different ReplicaSets at a time (`--concurrent-replicaset-syncs`).
const WORKERS: usize = 5;
/// Pods made or deleted in one sync at most.
const BURST: usize = 500;

/// What a ReplicaSet wants done about its pods.
#[derive(Debug, Default)]
pub struct Plan {
    /// Pods to take over.
    pub adopt: Vec<Arc<Pod>>,
    /// Pods to let go.
    pub release: Vec<Arc<Pod>>,
    /// How many pods to make.
    pub create: usize,
    /// Pods to delete.
    pub delete: Vec<Arc<Pod>>,
}

/// Decides what to do. `pods` are those of the namespace, `siblings` the uids of ReplicaSets of the same Deployment.
pub fn plan(set: &ReplicaSet, pods: &[Arc<Pod>], siblings: &[String], now: Timestamp) -> Plan {
    let Some(spec) = set.spec.as_ref() else { return Plan::default() };
    let Claim { owned, adopt, release } =
        pods::claim(&set.metadata, &spec.selector, pods.iter().cloned(), pods::is_active);
    let mut active: Vec<Arc<Pod>> =
        owned.into_iter().chain(adopt.iter().cloned()).filter(|p| pods::is_active(p)).collect();
    let mut plan = Plan { adopt, release, ..Default::default() };
    if set.metadata.deletion_timestamp.is_some() {
        return plan;
    }
    let wanted = usize::try_from(spec.replicas.unwrap_or(1)).unwrap_or(0);
    if active.len() < wanted {
        plan.create = (wanted - active.len()).min(BURST);
    } else if active.len() > wanted {
        let excess = (active.len() - wanted).min(BURST);
        let mut neighbours: BTreeMap<String, usize> = BTreeMap::new();
        let related = |pod: &Pod| {
            controller_of(pod).is_some_and(|o| Some(&o.uid) == set.metadata.uid.as_ref() || siblings.contains(&o.uid))
        };
        for pod in pods.iter().filter(|p| pods::is_active(p) && related(p)) {
            if let Some(node) = pod.spec.as_ref().and_then(|s| s.node_name.clone()) {
                *neighbours.entry(node).or_default() += 1;
            }
        }
        active.sort_by(|a, b| pods::deletion_order(a, b, &neighbours, now));
        active.truncate(excess);
        plan.delete = active;
    }
    plan
}

/// The status of a ReplicaSet with these pods of its namespace, and when a pod becomes available by the passing of time.
pub fn status(
    set: &ReplicaSet,
    pods: &[Arc<Pod>],
    failure: Option<(&str, String)>,
    now: Timestamp,
) -> (ReplicaSetStatus, Option<Duration>) {
    let spec = set.spec.clone().unwrap_or_default();
    let template_labels = spec.template.as_ref().and_then(|t| t.metadata.as_ref()).and_then(|m| m.labels.as_ref());
    let min_ready = spec.min_ready_seconds.unwrap_or(0);
    let mut counts = [0; 5];
    let [replicas, labeled, ready, available, terminating] = &mut counts;
    let mut recheck: Option<Duration> = None;
    for pod in pods.iter().filter(|p| is_controlled_by(&***p, set.metadata.uid.as_deref())) {
        if !selector::matches(&spec.selector, pod.metadata.labels.as_ref()) || pods::is_finished(pod) {
            continue;
        }
        if pods::is_terminating(pod) {
            *terminating += 1;
            continue;
        }
        *replicas += 1;
        let labels = pod.metadata.labels.as_ref();
        if template_labels.is_none_or(|wanted| wanted.iter().all(|(k, v)| labels.and_then(|l| l.get(k)) == Some(v))) {
            *labeled += 1;
        }
        if pods::is_ready(pod) {
            *ready += 1;
        }
        match pods::availability(pod, min_ready, now) {
            Availability::Available => *available += 1,
            Availability::In(rest) => recheck = Some(recheck.map_or(rest, |r| r.min(rest))),
            Availability::No => {}
        }
    }
    let old = set.status.as_ref();
    let mut conditions: Vec<ReplicaSetCondition> = old.and_then(|s| s.conditions.clone()).unwrap_or_default();
    let before = conditions.iter().position(|c| c.type_ == "ReplicaFailure");
    match (failure, before) {
        (Some((reason, message)), before) => {
            let same = before.is_some_and(|at| conditions[at].reason.as_deref() == Some(reason));
            if !same {
                let failed = ReplicaSetCondition {
                    type_: "ReplicaFailure".into(),
                    status: "True".into(),
                    reason: Some(reason.into()),
                    message: Some(message),
                    last_transition_time: Some(Time(now)),
                };
                match before {
                    Some(at) => conditions[at] = failed,
                    None => conditions.push(failed),
                }
            }
        }
        (None, Some(at)) => {
            conditions.remove(at);
        }
        (None, None) => {}
    }
    // Zero counts are absent, as Go's omitempty writes them.
    let some = |count: i32| Some(count).filter(|c| *c != 0);
    let status = ReplicaSetStatus {
        replicas: counts[0],
        fully_labeled_replicas: some(counts[1]),
        ready_replicas: some(counts[2]),
        available_replicas: some(counts[3]),
        terminating_replicas: Some(counts[4]),
        observed_generation: set.metadata.generation,
        conditions: Some(conditions).filter(|c| !c.is_empty()),
    };
    (status, recheck)
}

/// Registers with the caches and returns the future that works.
pub(crate) fn start(context: Context) -> impl Future<Output = ()> + Send + 'static {
    let queue: Queue<Key> = context.queue("replicaset");
    let add = queue.clone();
    context.caches.replica_sets.on_change(move |old, new| {
        if let Some(set) = new.or(old) {
            add.add(Key::of(&**set));
        }
    });
    let add = queue.clone();
    let sets = context.caches.replica_sets.clone();
    context.caches.pods.on_change(move |old, new| {
        for pod in [old, new].into_iter().flatten() {
            wake_owner(pod, "ReplicaSet", &sets, &add, |set| set.spec.as_ref().map(|s| &s.selector));
        }
    });
    async move {
        let events = context.recorder("replicaset-controller");
        let stop = context.shutdown.clone();
        queue.work(WORKERS, stop, move |key| sync(context.clone(), events.clone(), key)).await;
    }
}

/// Wakes the controller of a pod; a pod without one wakes those whose selector matches it.
pub(crate) fn wake_owner<K: crate::cache::Cached>(
    pod: &Pod,
    kind: &str,
    owners: &Informer<K>,
    queue: &Queue<Key>,
    selector: impl Fn(&K) -> Option<&k8s_openapi::apimachinery::pkg::apis::meta::v1::LabelSelector>,
) {
    let namespace = pod.metadata.namespace.as_deref().unwrap_or_default();
    match controller_of(pod) {
        Some(owner) if owner.kind == kind => queue.add(Key::new(namespace, &owner.name)),
        Some(_) => {}
        None => {
            for owner in owners.list(namespace) {
                if selector(&owner).is_some_and(|s| selector::matches(s, pod.metadata.labels.as_ref())) {
                    queue.add(Key::of(&*owner));
                }
            }
        }
    }
}

async fn sync(context: Context, events: EventRecorder, key: Key) -> anyhow::Result<Next> {
    let caches = &context.caches;
    let Some(set) = caches.replica_sets.get(&key.namespace, &key.name) else { return Ok(Next::Wait) };
    let selector = set.spec.as_ref().map(|s| s.selector.clone()).unwrap_or_default();
    let uid = set.metadata.uid.as_deref();
    let mut pods = caches.pods.claimable(&key.namespace, uid, &selector);
    let siblings: Vec<String> = match controller_of(&*set) {
        None => Vec::new(),
        Some(owner) => {
            let sets = caches.replica_sets.controlled_by(&owner.uid);
            sets.iter().filter_map(|s| s.metadata.uid.clone()).filter(|sibling| Some(sibling.as_str()) != uid).collect()
        }
    };
    // Pods of sets with another selector count as neighbours too.
    let known: HashSet<Option<String>> = pods.iter().map(|p| p.metadata.uid.clone()).collect();
    let of_siblings = siblings.iter().flat_map(|sibling| caches.pods.controlled_by(sibling));
    let more: Vec<Arc<Pod>> = of_siblings.filter(|p| !known.contains(&p.metadata.uid)).collect();
    pods.extend(more);
    let plan = plan(&set, &pods, &siblings, context.clock.now());
    let api: Api<Pod> = Api::namespaced(context.client.clone(), &key.namespace);
    // An owner that is gone or going has nothing else to do either.
    if !plan.adopt.is_empty() {
        let sets: Api<ReplicaSet> = Api::namespaced(context.client.clone(), &key.namespace);
        if !may_adopt(&sets, &set).await? {
            return Ok(Next::Wait);
        }
    }
    for pod in &plan.adopt {
        adopt(&api, &caches.pods, &*set, pod).await?;
    }
    for pod in &plan.release {
        release(&api, &caches.pods, set.metadata.uid.as_deref(), pod).await?;
    }
    let mut failure: Option<(&str, kube::Error)> = None;
    if plan.create > 0 {
        let template = set.spec.as_ref().and_then(|s| s.template.clone()).unwrap_or_default();
        let pod = replica(&*set, &template);
        failure = create(&context, &events, &*set, pod, plan.create).await.err().map(|e| ("FailedCreate", e));
    }
    if !plan.delete.is_empty() {
        let deletions = plan.delete.iter().map(|pod| delete_pod(&api, &caches.pods, &events, &*set, pod));
        failure =
            futures::future::join_all(deletions).await.into_iter().find_map(Result::err).map(|e| ("FailedDelete", e));
    }
    // The status describes the pods as they are after this sync's writes.
    let pods = uid.map(|uid| caches.pods.controlled_by(uid)).unwrap_or_default();
    let told = failure.as_ref().map(|(reason, error)| (*reason, message(error)));
    let (wanted, recheck) = status(&set, &pods, told, context.clock.now());
    if set.status.as_ref() != Some(&wanted) {
        let api: Api<ReplicaSet> = Api::namespaced(context.client.clone(), &key.namespace);
        let mut updated = ReplicaSet::clone(&set);
        updated.status = Some(wanted);
        match api.replace_status(&key.name, &PostParams::default(), &updated).await {
            Ok(written) => caches.replica_sets.wrote(written),
            Err(error) if is_not_found(&error) => return Ok(Next::Wait),
            Err(error) => return Err(error).context("cannot update the status"),
        }
    }
    match failure {
        Some((_, error)) if !is_namespace_terminating(&error) => Err(error.into()),
        _ => Ok(recheck.map_or(Next::Wait, Next::After)),
    }
}

/// A pod of a template, whose name the API server makes from the owner's.
pub(crate) fn replica<K: kube::Resource<DynamicType = ()>>(owner: &K, template: &PodTemplateSpec) -> Pod {
    let meta = owner.meta();
    let mut pod = pods::from_template(template, meta.namespace.as_deref(), controller_reference(owner));
    pod.metadata.generate_name = Some(format!("{}-", meta.name.as_deref().unwrap_or_default()));
    pod
}

/// Makes pods in batches of 1, 2, 4 and so on, so that a template that the API server refuses is refused once, not `count` times.
pub(crate) async fn create<K: kube::Resource<DynamicType = ()>>(
    context: &Context,
    events: &EventRecorder,
    owner: &K,
    pod: Pod,
    count: usize,
) -> Result<(), kube::Error> {
    let namespace = owner.meta().namespace.as_deref().unwrap_or_default();
    let api: Api<Pod> = Api::namespaced(context.client.clone(), namespace);
    let (mut left, mut batch) = (count, 1);
    while left > 0 {
        let size = batch.min(left);
        let params = PostParams::default();
        let results = futures::future::join_all((0..size).map(|_| api.create(&params, &pod))).await;
        let mut failed = None;
        for result in results {
            match result {
                Ok(made) => {
                    let text = format!("Created pod: {}", made.metadata.name.as_deref().unwrap_or_default());
                    context.caches.pods.wrote(made);
                    events.event(&reference(owner), EventType::Normal, "SuccessfulCreate", text);
                }
                Err(error) => {
                    if !is_namespace_terminating(&error) {
                        let text = format!("Error creating: {}", message(&error));
                        events.event(&reference(owner), EventType::Warning, "FailedCreate", text);
                    }
                    failed = Some(error);
                }
            }
        }
        if let Some(error) = failed {
            return Err(error);
        }
        left -= size;
        batch *= 2;
    }
    Ok(())
}

/// Deletes a pod of a workload and enters the result into the cache.
pub(crate) async fn delete_pod<K: kube::Resource<DynamicType = ()>>(
    api: &Api<Pod>,
    cache: &Informer<Pod>,
    events: &EventRecorder,
    owner: &K,
    pod: &Pod,
) -> Result<(), kube::Error> {
    let name = pod.metadata.name.as_deref().unwrap_or_default();
    match remove(api, cache, pod, &DeleteParams::default()).await {
        Ok(()) => {
            events.event(&reference(owner), EventType::Normal, "SuccessfulDelete", format!("Deleted pod: {name}"));
            Ok(())
        }
        Err(error) => {
            let text = format!("Error deleting: {}", message(&error));
            events.event(&reference(owner), EventType::Warning, "FailedDelete", text);
            Err(error)
        }
    }
}

/// Deletes exactly this object (by uid) and enters what is left of it into the cache.
pub(crate) async fn remove<K: crate::cache::Cached>(
    api: &Api<K>,
    cache: &Informer<K>,
    object: &K,
    params: &DeleteParams,
) -> Result<(), kube::Error> {
    let meta = object.meta();
    let preconditions = Preconditions { uid: meta.uid.clone(), ..Default::default() };
    let params = params.clone().preconditions(preconditions);
    match api.delete(meta.name.as_deref().unwrap_or_default(), &params).await {
        Ok(answer) => {
            let waits = |meta: &ObjectMeta| {
                meta.deletion_timestamp.is_some()
                    && (meta.deletion_grace_period_seconds.is_some_and(|grace| grace != 0)
                        || meta.finalizers.as_ref().is_some_and(|f| !f.is_empty()))
            };
            match answer.left() {
                // Still there for a grace period or a finalizer.
                Some(rest) if waits(rest.meta()) => cache.wrote(rest),
                _ => cache.deleted(object),
            }
            Ok(())
        }
        Err(error) if is_not_found(&error) || is_conflict(&error) => {
            // Gone already, or another object has its name now.
            cache.deleted(object);
            Ok(())
        }
        Err(error) => Err(error),
    }
}

/// Whether the owner still exists and is not being deleted, by a live read: the cache may not have the deletion yet, and what an
/// orphaning deletion has just released must not be taken back (upstream's `RecheckDeletionTimestamp`).
pub(crate) async fn may_adopt<K: crate::cache::Cached>(api: &Api<K>, owner: &K) -> anyhow::Result<bool> {
    let meta = owner.meta();
    let name = meta.name.as_deref().unwrap_or_default();
    let live = api.get_metadata_opt(name).await.with_context(|| format!("cannot look at {name} before it adopts"))?;
    Ok(live.is_some_and(|live| live.metadata.uid == meta.uid && live.metadata.deletion_timestamp.is_none()))
}

/// Makes `owner` the controller of a pod, if [`may_adopt`] has agreed.
pub(crate) async fn adopt<O, K>(api: &Api<K>, cache: &Informer<K>, owner: &O, object: &K) -> anyhow::Result<()>
where
    O: kube::Resource<DynamicType = ()>,
    K: crate::cache::Cached,
{
    let meta = object.meta();
    let patch = serde_json::json!({"metadata": {"uid": meta.uid, "ownerReferences": [controller_reference(owner)]}});
    let name = meta.name.as_deref().unwrap_or_default();
    match api.patch(name, &PatchParams::default(), &Patch::Strategic(patch)).await {
        Ok(written) => cache.wrote(written),
        Err(error) if is_not_found(&error) || is_replaced(&error) => cache.deleted(object),
        Err(error) => return Err(error).with_context(|| format!("cannot adopt {name}")),
    }
    Ok(())
}

/// Removes the reference to the owner with this uid.
pub(crate) async fn release<K: crate::cache::Cached>(
    api: &Api<K>,
    cache: &Informer<K>,
    owner_uid: Option<&str>,
    object: &K,
) -> anyhow::Result<()> {
    let meta = object.meta();
    let patch = serde_json::json!({
        "metadata": {"uid": meta.uid, "ownerReferences": [{"$patch": "delete", "uid": owner_uid}]}
    });
    let name = meta.name.as_deref().unwrap_or_default();
    match api.patch(name, &PatchParams::default(), &Patch::Strategic(patch)).await {
        Ok(written) => cache.wrote(written),
        Err(error) if is_not_found(&error) || is_replaced(&error) => cache.deleted(object),
        Err(error) => return Err(error).with_context(|| format!("cannot release {name}")),
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn set(replicas: i32) -> ReplicaSet {
        serde_json::from_value(serde_json::json!({
            "metadata": {"name": "r", "namespace": "ns", "uid": "set", "generation": 3},
            "spec": {"replicas": replicas, "selector": {"matchLabels": {"app": "r"}},
                     "template": {"metadata": {"labels": {"app": "r", "extra": "x"}}}}
        }))
        .unwrap()
    }

    fn pod(name: &str, label: &str, owner: Option<&str>, phase: &str) -> Arc<Pod> {
        let owners = owner.map(|uid| serde_json::json!([{"apiVersion": "apps/v1", "kind": "ReplicaSet", "name": "r", "uid": uid, "controller": true}]));
        Arc::new(
            serde_json::from_value(serde_json::json!({
                "metadata": {"name": name, "namespace": "ns", "uid": name, "labels": {"app": label}, "ownerReferences": owners},
                "status": {"phase": phase}
            }))
            .unwrap(),
        )
    }

    fn names(pods: &[Arc<Pod>]) -> Vec<&str> {
        pods.iter().filter_map(|p| p.metadata.name.as_deref()).collect()
    }

    #[test]
    fn orphans_are_adopted_before_pods_are_made() {
        let pods = [pod("free", "r", None, "Running"), pod("mine", "r", Some("set"), "Running")];
        let plan = plan(&set(3), &pods, &[], Timestamp::UNIX_EPOCH);
        assert_eq!(names(&plan.adopt), ["free"]);
        assert_eq!(plan.create, 1);
    }

    #[test]
    fn a_pod_that_stopped_matching_is_released_and_replaced() {
        let pods = [pod("strayed", "other", Some("set"), "Running")];
        let plan = plan(&set(1), &pods, &[], Timestamp::UNIX_EPOCH);
        assert_eq!(names(&plan.release), ["strayed"]);
        assert_eq!(plan.create, 1);
    }

    #[test]
    fn finished_and_foreign_pods_do_not_count() {
        let pods = [pod("failed", "r", Some("set"), "Failed"), pod("foreign", "r", Some("other"), "Running")];
        let plan = plan(&set(1), &pods, &[], Timestamp::UNIX_EPOCH);
        assert_eq!((plan.create, plan.adopt.len(), plan.delete.len()), (1, 0, 0));
    }

    #[test]
    fn a_set_that_is_being_deleted_touches_nothing() {
        let mut set = set(3);
        set.metadata.deletion_timestamp = Some(Time(Timestamp::UNIX_EPOCH));
        let pods = [pod("free", "r", None, "Running"), pod("strayed", "other", Some("set"), "Running")];
        let plan = plan(&set, &pods, &[], Timestamp::UNIX_EPOCH);
        assert_eq!((plan.create, plan.adopt.len(), plan.release.len(), plan.delete.len()), (0, 0, 0, 0));
    }

    #[test]
    fn status_counts() {
        let mut terminating = Pod::clone(&pod("t", "r", Some("set"), "Running"));
        terminating.metadata.deletion_timestamp = Some(Time(Timestamp::UNIX_EPOCH));
        let pods = [pod("a", "r", Some("set"), "Running"), Arc::new(terminating), pod("f", "r", Some("set"), "Failed")];
        let failure = Some(("FailedCreate", "no".to_string()));
        let (status, _) = status(&set(1), &pods, failure, Timestamp::UNIX_EPOCH);
        assert_eq!((status.replicas, status.terminating_replicas), (1, Some(1)));
        assert_eq!(status.fully_labeled_replicas, None, "the template has a label more");
        assert_eq!(status.observed_generation, Some(3));
        assert_eq!(status.conditions.unwrap()[0].type_, "ReplicaFailure");
    }
}
