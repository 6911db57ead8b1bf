//! StatefulSets: pods with stable names, made, updated and removed in order.
//!
//! [`plan`] decides the next acts on pods. With `OrderedReady` that is at most one; with `Parallel` as many as needed. The
//! template of each revision is kept in a ControllerRevision, so that pods below a partition can be made again as they were.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;

use anyhow::Context as _;
use jiff::Timestamp;
use k8s_openapi::api::apps::v1::{ControllerRevision, StatefulSet, StatefulSetSpec, StatefulSetStatus};
use k8s_openapi::api::core::v1::{
    PersistentVolumeClaim, PersistentVolumeClaimVolumeSource, Pod, PodTemplateSpec, Volume,
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
use crate::replicaset::{adopt, may_adopt, release, remove, wake_owner};
use crate::util::{
    already_exists, controller_of, controller_reference, is_namespace_terminating, is_not_found, message, reference,
};

const WORKERS: usize = 5;

/// Label of pods with the name of their ControllerRevision.
pub const REVISION_LABEL: &str = "controller-revision-hash";
const POD_NAME_LABEL: &str = "statefulset.kubernetes.io/pod-name";
const POD_INDEX_LABEL: &str = "apps.kubernetes.io/pod-index";
const REVISION_HASH: &str = "controller.kubernetes.io/hash";

/// A template and the revision that keeps it.
#[derive(Clone, Debug)]
pub struct Revision {
    /// Name of the ControllerRevision.
    pub name: String,
    /// Its template.
    pub template: PodTemplateSpec,
}

/// One act on a pod.
#[derive(Clone, Debug)]
pub enum Act {
    /// Make the pod of this ordinal.
    Create(Box<Pod>),
    /// Delete a pod: beyond the replicas, of an old revision, or failed.
    Delete(Arc<Pod>, Why),
    /// Put back labels that identify the pod.
    Relabel(Arc<Pod>),
}

/// Why a pod is deleted.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Why {
    /// Fewer replicas are wanted.
    Excess,
    /// Its template is old.
    Outdated,
    /// It has failed or ended and is made again.
    Ended,
}

/// The acts of one step and the status that describes the pods before them.
#[derive(Debug, Default)]
pub struct Plan {
    /// In order; each to be done before the next.
    pub acts: Vec<Act>,
    /// Status.
    pub status: StatefulSetStatus,
    /// When a pod becomes available by the passing of time.
    pub recheck: Option<Duration>,
}

fn start_ordinal(spec: &StatefulSetSpec) -> i32 {
    spec.ordinals.as_ref().and_then(|o| o.start).unwrap_or(0)
}

fn ordinal(set: &StatefulSet, pod: &Pod) -> Option<i32> {
    let name = pod.metadata.name.as_deref()?;
    let prefix = format!("{}-", set.metadata.name.as_deref()?);
    let digits = name.strip_prefix(prefix.as_str())?;
    // Only the canonical form names a pod of this set.
    digits.parse().ok().filter(|n: &i32| *n >= 0 && n.to_string() == digits)
}

fn revision_of(pod: &Pod) -> Option<&str> {
    pod.metadata.labels.as_ref()?.get(REVISION_LABEL).map(String::as_str)
}

fn claim_name(template: &str, pod: &str) -> String {
    format!("{template}-{pod}")
}

/// The pod of an ordinal as a revision wants it.
pub fn make_pod(set: &StatefulSet, ordinal: i32, revision: &Revision) -> Pod {
    let spec = set.spec.clone().unwrap_or_default();
    let set_name = set.metadata.name.as_deref().unwrap_or_default();
    let name = format!("{set_name}-{ordinal}");
    let mut pod = pods::from_template(&revision.template, set.metadata.namespace.as_deref(), controller_reference(set));
    pod.metadata.name = Some(name.clone());
    pod.metadata.generate_name = Some(format!("{set_name}-"));
    let labels = pod.metadata.labels.get_or_insert_default();
    labels.insert(POD_NAME_LABEL.into(), name.clone());
    labels.insert(POD_INDEX_LABEL.into(), ordinal.to_string());
    labels.insert(REVISION_LABEL.into(), revision.name.clone());
    let pod_spec = pod.spec.get_or_insert_default();
    pod_spec.hostname = Some(name.clone());
    pod_spec.subdomain = spec.service_name.clone().filter(|s| !s.is_empty());
    // Claims take the place of template volumes of the same name.
    let claims: Vec<String> =
        spec.volume_claim_templates.iter().flatten().filter_map(|c| c.metadata.name.clone()).collect();
    if !claims.is_empty() {
        let volumes = pod_spec.volumes.get_or_insert_default();
        volumes.retain(|v| !claims.contains(&v.name));
        volumes.extend(claims.into_iter().map(|claim| Volume {
            persistent_volume_claim: Some(PersistentVolumeClaimVolumeSource {
                claim_name: claim_name(&claim, &name),
                read_only: None,
            }),
            name: claim,
            ..Default::default()
        }));
    }
    pod
}

/// The claims that a pod of this ordinal needs.
pub fn make_claims(set: &StatefulSet, pod: &Pod) -> Vec<PersistentVolumeClaim> {
    let spec = set.spec.clone().unwrap_or_default();
    let pod_name = pod.metadata.name.as_deref().unwrap_or_default();
    let selector = spec.selector.match_labels.clone().unwrap_or_default();
    spec.volume_claim_templates
        .into_iter()
        .flatten()
        .map(|template| {
            let name = template.metadata.name.clone().unwrap_or_default();
            let mut labels = template.metadata.labels.clone().unwrap_or_default();
            labels.extend(selector.clone());
            PersistentVolumeClaim {
                metadata: ObjectMeta {
                    name: Some(claim_name(&name, pod_name)),
                    namespace: set.metadata.namespace.clone(),
                    labels: Some(labels),
                    annotations: template.metadata.annotations.clone(),
                    ..Default::default()
                },
                spec: template.spec,
                status: None,
            }
        })
        .collect()
}

fn has_identity(set: &StatefulSet, pod: &Pod) -> bool {
    let name = pod.metadata.name.as_ref();
    let labels = pod.metadata.labels.as_ref();
    let index = ordinal(set, pod).map(|n| n.to_string());
    labels.and_then(|l| l.get(POD_NAME_LABEL)) == name && labels.and_then(|l| l.get(POD_INDEX_LABEL)) == index.as_ref()
}

/// Decides the next step. `pods` are those that the set controls, `current` and `update` its revisions (equal when no rollout
/// is under way), `collisions` the number of revision names that were taken.
pub fn plan(
    set: &StatefulSet,
    pods: &[Arc<Pod>],
    current: &Revision,
    update: &Revision,
    collisions: i32,
    now: Timestamp,
) -> Plan {
    let spec = set.spec.clone().unwrap_or_default();
    let wanted = spec.replicas.unwrap_or(1).max(0);
    let first = start_ordinal(&spec);
    let min_ready = spec.min_ready_seconds.unwrap_or(0);
    let in_order = spec.pod_management_policy.as_deref() != Some("Parallel");
    let strategy = spec.update_strategy.clone().unwrap_or_default();
    let rolling = strategy.type_.as_deref() != Some("OnDelete");
    let partition = strategy.rolling_update.as_ref().and_then(|r| r.partition).unwrap_or(0);

    let mut plan = Plan::default();
    let mut slots: BTreeMap<i32, Arc<Pod>> = BTreeMap::new();
    let mut condemned: BTreeMap<i32, Arc<Pod>> = BTreeMap::new();
    let (mut replicas, mut ready, mut available, mut at_current, mut at_update) = (0, 0, 0, 0, 0);
    for pod in pods {
        let Some(n) = ordinal(set, pod) else { continue };
        replicas += 1;
        if pods::is_ready(pod) && pods::phase(pod) == "Running" {
            ready += 1;
            match pods::availability(pod, min_ready, now) {
                Availability::Available => available += 1,
                Availability::In(rest) => plan.recheck = Some(plan.recheck.map_or(rest, |r| r.min(rest))),
                Availability::No => {}
            }
        }
        if !pods::is_terminating(pod) {
            at_current += i32::from(revision_of(pod) == Some(current.name.as_str()));
            at_update += i32::from(revision_of(pod) == Some(update.name.as_str()));
        }
        let list = if (first..first + wanted).contains(&n) { &mut slots } else { &mut condemned };
        list.insert(n, pod.clone());
    }
    let healthy = |pod: &Pod| {
        pods::phase(pod) == "Running"
            && !pods::is_terminating(pod)
            && pods::availability(pod, min_ready, now) == Availability::Available
    };

    if set.metadata.deletion_timestamp.is_none() {
        let acts = decide(&Situation {
            set,
            current,
            update,
            slots: &slots,
            condemned: &condemned,
            ordinals: first..first + wanted,
            partition: first + partition,
            in_order,
            rolling,
            max_unavailable: strategy
                .rolling_update
                .as_ref()
                .and_then(|r| r.max_unavailable.as_ref())
                .and_then(|v| pods::resolve_int_or_percent(v, wanted, true))
                .unwrap_or(1)
                .max(1),
            healthy: &healthy,
        });
        for act in &acts {
            match act {
                Act::Create(pod) => {
                    replicas += 1;
                    at_current += i32::from(revision_of(pod) == Some(current.name.as_str()));
                    at_update += i32::from(revision_of(pod) == Some(update.name.as_str()));
                }
                Act::Delete(pod, _) => {
                    at_current -= i32::from(revision_of(pod) == Some(current.name.as_str()));
                    at_update -= i32::from(revision_of(pod) == Some(update.name.as_str()));
                }
                Act::Relabel(_) => {}
            }
        }
        plan.acts = acts;
    }
    let mut status = StatefulSetStatus {
        observed_generation: set.metadata.generation,
        replicas,
        ready_replicas: Some(ready).filter(|n| *n != 0),
        available_replicas: Some(available),
        current_replicas: Some(at_current).filter(|n| *n != 0),
        updated_replicas: Some(at_update).filter(|n| *n != 0),
        current_revision: Some(current.name.clone()),
        update_revision: Some(update.name.clone()),
        collision_count: Some(collisions),
        conditions: set.status.as_ref().and_then(|s| s.conditions.clone()),
    };
    // The rollout is over: what was the update is the current state now.
    if rolling && at_update == replicas && ready == replicas && replicas == wanted && current.name != update.name {
        status.current_replicas = status.updated_replicas;
        status.current_revision = status.update_revision.clone();
    }
    plan.status = status;
    plan
}

struct Situation<'a> {
    set: &'a StatefulSet,
    current: &'a Revision,
    update: &'a Revision,
    slots: &'a BTreeMap<i32, Arc<Pod>>,
    condemned: &'a BTreeMap<i32, Arc<Pod>>,
    ordinals: std::ops::Range<i32>,
    /// The first ordinal that gets the new template.
    partition: i32,
    in_order: bool,
    rolling: bool,
    max_unavailable: i32,
    healthy: &'a dyn Fn(&Pod) -> bool,
}

fn decide(s: &Situation<'_>) -> Vec<Act> {
    let mut acts = Vec::new();
    for n in s.ordinals.clone() {
        match s.slots.get(&n) {
            None => {
                let revision = if s.rolling && n < s.partition { s.current } else { s.update };
                acts.push(Act::Create(Box::new(make_pod(s.set, n, revision))));
                if s.in_order {
                    return acts;
                }
            }
            Some(pod) if pods::is_finished(pod) => {
                if !pods::is_terminating(pod) {
                    acts.push(Act::Delete(pod.clone(), Why::Ended));
                }
                if s.in_order {
                    return acts;
                }
            }
            Some(pod) => {
                if !has_identity(s.set, pod) && !pods::is_terminating(pod) {
                    acts.push(Act::Relabel(pod.clone()));
                }
                if s.in_order && !(s.healthy)(pod) {
                    return acts;
                }
            }
        }
    }
    for pod in s.condemned.values().rev() {
        if !pods::is_terminating(pod) {
            // In order also means that a pod goes only when its predecessors are well; all slots are, or we would not be here.
            // A sick condemned pod may always go if it is the last one, which it is.
            acts.push(Act::Delete(pod.clone(), Why::Excess));
        }
        if s.in_order {
            return acts;
        }
    }
    if !s.rolling || !acts.is_empty() {
        return acts;
    }
    // From the highest ordinal down: whatever is not well counts against the pods that may be away at a time.
    let mut away = 0;
    for n in s.ordinals.clone().rev().take_while(|n| *n >= s.partition) {
        let Some(pod) = s.slots.get(&n) else {
            away += 1;
            continue;
        };
        let outdated = revision_of(pod) != Some(s.update.name.as_str());
        if outdated && !pods::is_terminating(pod) {
            if away >= s.max_unavailable {
                break;
            }
            acts.push(Act::Delete(pod.clone(), Why::Outdated));
            away += 1;
        } else if !(s.healthy)(pod) {
            away += 1;
        }
        if away >= s.max_unavailable {
            break;
        }
    }
    acts
}

pub(crate) fn revision_data(template: &PodTemplateSpec) -> serde_json::Value {
    let mut template = serde_json::to_value(template).expect("a pod template is plain data");
    // A patch that restores the whole template, as `kubectl rollout undo` applies it.
    template["$patch"] = json!("replace");
    json!({"spec": {"template": template}})
}

pub(crate) fn revision_template(revision: &ControllerRevision) -> Option<PodTemplateSpec> {
    let mut template = revision.data.as_ref()?.0.pointer("/spec/template")?.clone();
    template.as_object_mut()?.remove("$patch");
    serde_json::from_value(template).ok()
}

/// The revisions of a set: which exist, which to make or renumber, which to delete.
#[derive(Debug)]
pub struct Revisions {
    /// The one that pods below a partition have.
    pub current: Revision,
    /// The one of the present template.
    pub update: Revision,
    /// To be made: the present template was never seen before.
    pub create: Option<ControllerRevision>,
    /// To be renumbered: an earlier template is wanted again.
    pub renumber: Option<(Arc<ControllerRevision>, i64)>,
    /// Beyond the history limit.
    pub delete: Vec<Arc<ControllerRevision>>,
}

/// Decides about the revisions. `existing` are those that the set controls.
pub fn revisions(
    set: &StatefulSet,
    existing: &[Arc<ControllerRevision>],
    pods: &[Arc<Pod>],
    collisions: i32,
) -> Revisions {
    let spec = set.spec.clone().unwrap_or_default();
    let set_name = set.metadata.name.as_deref().unwrap_or_default();
    let mut existing = existing.to_vec();
    existing.sort_by(|a, b| (a.revision, &a.metadata.name).cmp(&(b.revision, &b.metadata.name)));
    let newest = existing.last().map_or(0, |r| r.revision);
    let found = existing.iter().rev().find(|r| revision_template(r).as_ref() == Some(&spec.template)).cloned();
    let mut create = None;
    let mut renumber = None;
    let name_of = |r: &ControllerRevision| r.metadata.name.clone().unwrap_or_default();
    let update_name = match &found {
        Some(revision) => {
            if revision.revision < newest {
                renumber = Some((revision.clone(), newest + 1));
            }
            name_of(revision)
        }
        None => {
            let hash = pods::template_hash(&spec.template, Some(collisions));
            let name = format!("{set_name}-{hash}");
            let mut labels = spec.template.metadata.as_ref().and_then(|m| m.labels.clone()).unwrap_or_default();
            labels.insert(REVISION_HASH.into(), hash);
            create = Some(ControllerRevision {
                metadata: ObjectMeta {
                    name: Some(name.clone()),
                    namespace: set.metadata.namespace.clone(),
                    labels: Some(labels),
                    annotations: set.metadata.annotations.clone(),
                    owner_references: Some(vec![controller_reference(set)]),
                    ..Default::default()
                },
                data: Some(RawExtension(revision_data(&spec.template))),
                revision: newest + 1,
            });
            name
        }
    };
    let update = Revision { name: update_name.clone(), template: spec.template.clone() };
    let status_current = set.status.as_ref().and_then(|s| s.current_revision.clone());
    let current = status_current
        .and_then(|name| existing.iter().find(|r| name_of(r) == name))
        .and_then(|r| Some(Revision { name: name_of(r), template: revision_template(r)? }))
        .unwrap_or_else(|| update.clone());
    // Live are those that status or pods refer to; of the others the newest ones are kept.
    let live =
        |name: &str| name == current.name || name == update.name || pods.iter().any(|p| revision_of(p) == Some(name));
    let dead: Vec<&Arc<ControllerRevision>> = existing.iter().filter(|r| !live(&name_of(r))).collect();
    let limit = usize::try_from(spec.revision_history_limit.unwrap_or(10)).unwrap_or(0);
    let delete = dead.iter().take(dead.len().saturating_sub(limit)).map(|r| (*r).clone()).collect();
    Revisions { current, update, create, renumber, delete }
}

/// Registers with the caches and returns the future that works.
pub(crate) fn start(context: Context) -> impl Future<Output = ()> + Send + 'static {
    let queue: Queue<Key> = context.queue("statefulset");
    let add = queue.clone();
    context.caches.stateful_sets.on_change(move |old, new| {
        if let Some(set) = new.or(old) {
            add.add(Key::of(&**set));
        }
    });
    let add = queue.clone();
    let sets = context.caches.stateful_sets.clone();
    context.caches.pods.on_change(move |old, new| {
        for pod in [old, new].into_iter().flatten() {
            wake_owner(pod, "StatefulSet", &sets, &add, |set| set.spec.as_ref().map(|s| &s.selector));
        }
    });
    let add = queue.clone();
    context.caches.revisions.on_change(move |old, new| {
        for revision in [old, new].into_iter().flatten() {
            if let Some(owner) = controller_of(&**revision).filter(|o| o.kind == "StatefulSet") {
                add.add(Key::new(revision.metadata.namespace.clone().unwrap_or_default(), &owner.name));
            }
        }
    });
    async move {
        let events = context.recorder("statefulset-controller");
        let stop = context.shutdown.clone();
        queue.work(WORKERS, stop, move |key| sync(context.clone(), events.clone(), key)).await;
    }
}

async fn sync(context: Context, events: EventRecorder, key: Key) -> anyhow::Result<Next> {
    let caches = &context.caches;
    let Some(set) = caches.stateful_sets.get(&key.namespace, &key.name) else { return Ok(Next::Wait) };
    let spec = set.spec.clone().unwrap_or_default();
    let uid = set.metadata.uid.as_deref();
    let pod_api: Api<Pod> = Api::namespaced(context.client.clone(), &key.namespace);
    let revision_api: Api<ControllerRevision> = Api::namespaced(context.client.clone(), &key.namespace);

    let member = |pod: &Pod| ordinal(&set, pod).is_some();
    let claim =
        pods::claim(&set.metadata, &spec.selector, caches.pods.claimable(&key.namespace, uid, &spec.selector), member);
    if !claim.adopt.is_empty() {
        let sets: Api<StatefulSet> = Api::namespaced(context.client.clone(), &key.namespace);
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
    let mut pods = uid.map(|uid| caches.pods.controlled_by(uid)).unwrap_or_default();
    pods.retain(|p| crate::selector::matches(&spec.selector, p.metadata.labels.as_ref()));
    let existing = uid.map(|uid| caches.revisions.controlled_by(uid)).unwrap_or_default();

    let mut collisions = set.status.as_ref().and_then(|s| s.collision_count).unwrap_or(0);
    let revisions = loop {
        let revisions = revisions(&set, &existing, &pods, collisions);
        let Some(wanted) = &revisions.create else { break revisions };
        if set.metadata.deletion_timestamp.is_some() {
            break revisions;
        }
        match revision_api.create(&PostParams::default(), wanted).await {
            Ok(made) => {
                caches.revisions.wrote_quietly(made);
                break revisions;
            }
            Err(error) if already_exists(&error) => collisions += 1,
            Err(error) if is_namespace_terminating(&error) => return Ok(Next::Wait),
            Err(error) => return Err(error).context("cannot create the controller revision"),
        }
    };
    if let Some((revision, number)) = &revisions.renumber {
        let name = revision.metadata.name.as_deref().unwrap_or_default();
        let patch = Patch::Merge(json!({"revision": number}));
        let written = revision_api.patch(name, &PatchParams::default(), &patch).await;
        caches.revisions.wrote_quietly(written.context("cannot renumber the controller revision")?);
    }

    let plan = plan(&set, &pods, &revisions.current, &revisions.update, collisions, context.clock.now());
    let mut failure = None;
    for act in &plan.acts {
        if let Err(error) = perform(&context, &events, &set, &pod_api, act).await {
            failure = Some(error);
            break;
        }
    }
    // After a failure the counts of the plan are not true; they come with the next sync.
    if failure.is_none() && set.status.as_ref() != Some(&plan.status) {
        let api: Api<StatefulSet> = Api::namespaced(context.client.clone(), &key.namespace);
        let mut updated = StatefulSet::clone(&set);
        updated.status = Some(plan.status);
        match api.replace_status(&key.name, &PostParams::default(), &updated).await {
            Ok(written) => caches.stateful_sets.wrote(written),
            Err(error) if is_not_found(&error) => return Ok(Next::Wait),
            Err(error) => return Err(error).context("cannot update the status"),
        }
    }
    for revision in &revisions.delete {
        let name = revision.metadata.name.as_deref().unwrap_or_default();
        match revision_api.delete(name, &DeleteParams::default()).await {
            Ok(_) => caches.revisions.deleted(revision),
            Err(error) if is_not_found(&error) => caches.revisions.deleted(revision),
            Err(error) => return Err(error).context("cannot delete an old controller revision"),
        }
    }
    match failure {
        Some(error) if !is_namespace_terminating(&error) => Err(error.into()),
        _ => Ok(plan.recheck.map_or(Next::Wait, Next::After)),
    }
}

async fn perform(
    context: &Context,
    events: &EventRecorder,
    set: &StatefulSet,
    api: &Api<Pod>,
    act: &Act,
) -> Result<(), kube::Error> {
    let about = reference(set);
    let set_name = set.metadata.name.as_deref().unwrap_or_default();
    let cache = &context.caches.pods;
    let outcome = |verb: &str, reason: &str, pod: &str, result: Result<(), kube::Error>| {
        match &result {
            Ok(()) => {
                let text = format!("{} Pod {pod} in StatefulSet {set_name} successful", verb.to_lowercase());
                events.event(&about, EventType::Normal, &format!("Successful{reason}"), text);
            }
            Err(error) if is_namespace_terminating(error) => {}
            Err(error) => {
                let text = format!(
                    "{} Pod {pod} in StatefulSet {set_name} failed error: {}",
                    verb.to_lowercase(),
                    message(error)
                );
                events.event(&about, EventType::Warning, &format!("Failed{reason}"), text);
            }
        }
        result
    };
    match act {
        Act::Create(pod) => {
            let name = pod.metadata.name.as_deref().unwrap_or_default();
            create_claims(context, events, set, pod).await?;
            let made = match api.create(&PostParams::default(), pod).await {
                Ok(made) => {
                    cache.wrote(made);
                    Ok(())
                }
                Err(error) => Err(error),
            };
            outcome("create", "Create", name, made)
        }
        Act::Delete(pod, why) => {
            let name = pod.metadata.name.as_deref().unwrap_or_default();
            if *why == Why::Ended {
                let namespace = set.metadata.namespace.as_deref().unwrap_or_default();
                let text = format!("StatefulSet {namespace}/{set_name} is recreating failed Pod {name}");
                events.event(&about, EventType::Warning, "RecreatingFailedPod", text);
            }
            let gone = remove(api, cache, pod, &DeleteParams::default()).await;
            outcome("delete", "Delete", name, gone)
        }
        Act::Relabel(pod) => {
            let name = pod.metadata.name.as_deref().unwrap_or_default();
            let index = ordinal(set, pod).unwrap_or_default().to_string();
            let patch = json!({"metadata": {"labels": {POD_NAME_LABEL: name, POD_INDEX_LABEL: index}}});
            let written = api.patch(name, &PatchParams::default(), &Patch::Merge(patch)).await;
            outcome("update", "Update", name, written.map(|pod| cache.wrote(pod)))
        }
    }
}

async fn create_claims(
    context: &Context,
    events: &EventRecorder,
    set: &StatefulSet,
    pod: &Pod,
) -> Result<(), kube::Error> {
    let claims = make_claims(set, pod);
    if claims.is_empty() {
        return Ok(());
    }
    let about = reference(set);
    let set_name = set.metadata.name.as_deref().unwrap_or_default();
    let pod_name = pod.metadata.name.as_deref().unwrap_or_default();
    let namespace = set.metadata.namespace.as_deref().unwrap_or_default();
    let api: Api<PersistentVolumeClaim> = Api::namespaced(context.client.clone(), namespace);
    for claim in claims {
        let name = claim.metadata.name.as_deref().unwrap_or_default();
        let told =
            |verb: &str, rest: &str| format!("{verb} Claim {name} Pod {pod_name} in StatefulSet {set_name} {rest}");
        match api.create(&PostParams::default(), &claim).await {
            Ok(_) => events.event(&about, EventType::Normal, "SuccessfulCreate", told("create", "success")),
            Err(error) if already_exists(&error) => {}
            Err(error) => {
                let text = told("create", &format!("failed error: {}", message(&error)));
                events.event(&about, EventType::Warning, "FailedCreate", text);
                return Err(error);
            }
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests;
