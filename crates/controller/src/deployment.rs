//! Deployments: roll a set of pods from one template to the next through ReplicaSets.
//!
//! [`plan`] computes on copies of the ReplicaSets: it changes their scale and annotations, and what differs afterwards is
//! written. One call is one step; the change it causes wakes the controller for the next.

use std::cmp::Reverse;
use std::collections::{BTreeMap, HashMap};
use std::sync::Arc;
use std::time::Duration;

use anyhow::Context as _;
use jiff::Timestamp;
use k8s_openapi::api::apps::v1::{Deployment, DeploymentCondition, DeploymentStatus, ReplicaSet, ReplicaSetSpec};
use k8s_openapi::api::core::v1::{Pod, PodTemplateSpec};
use k8s_openapi::apimachinery::pkg::apis::meta::v1::{LabelSelector, ObjectMeta, Time};
use k8s_openapi::apimachinery::pkg::util::intstr::IntOrString;
use kube::Api;
use kube::api::{DeleteParams, PostParams};
use portolan_client::{EventRecorder, EventType};

use crate::Context;
use crate::pods;
use crate::queue::{Key, Next, Queue};
use crate::replicaset::{adopt, may_adopt, release, remove};
use crate::selector;
use crate::util::{
    already_exists, controller_of, controller_reference, is_namespace_terminating, is_not_found, message, reference,
};

const WORKERS: usize = 5;

/// Label that tells the ReplicaSets of a Deployment, and their pods, apart.
pub const POD_TEMPLATE_HASH: &str = "pod-template-hash";
/// Annotation with the number of the rollout.
pub const REVISION: &str = "deployment.kubernetes.io/revision";
const REVISION_HISTORY: &str = "deployment.kubernetes.io/revision-history";
const DESIRED_REPLICAS: &str = "deployment.kubernetes.io/desired-replicas";
const MAX_REPLICAS: &str = "deployment.kubernetes.io/max-replicas";
const LAST_APPLIED: &str = "kubectl.kubernetes.io/last-applied-configuration";
/// Annotations of a Deployment that its ReplicaSets do not take over.
const NOT_COPIED: [&str; 6] =
    [LAST_APPLIED, REVISION, REVISION_HISTORY, DESIRED_REPLICAS, MAX_REPLICAS, "deprecated.deployment.rollback.to"];
/// A Deployment without progress deadline, in the words of the API.
const NO_DEADLINE: i32 = i32::MAX;
/// Characters of the revision history at most.
const HISTORY_LENGTH: usize = 2000;

/// The writes of one step.
#[derive(Debug, Default)]
pub struct Plan {
    /// A ReplicaSet to make. When its name is taken, the collision count has to grow.
    pub create: Option<ReplicaSet>,
    /// ReplicaSets whose annotations, scale or `minReadySeconds` change.
    pub update: Vec<ReplicaSet>,
    /// ReplicaSets beyond the history limit.
    pub delete: Vec<Arc<ReplicaSet>>,
    /// The revision annotation that the Deployment lacks.
    pub revision: Option<String>,
    /// The new status, if it differs.
    pub status: Option<DeploymentStatus>,
    /// Normal events: (reason, message).
    pub events: Vec<(&'static str, String)>,
    /// When to look again although nothing changes: the progress deadline.
    pub recheck: Option<Duration>,
}

/// How old pods give way to new ones, resolved to numbers.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Strategy {
    Recreate,
    Rolling { surge: i32, unavailable: i32 },
}

fn strategy(deployment: &Deployment) -> Strategy {
    let spec = deployment.spec.clone().unwrap_or_default();
    let replicas = spec.replicas.unwrap_or(1);
    let strategy = spec.strategy.unwrap_or_default();
    if strategy.type_.as_deref() == Some("Recreate") {
        return Strategy::Recreate;
    }
    let rolling = strategy.rolling_update.unwrap_or_default();
    let default = || IntOrString::String("25%".into());
    let resolve =
        |value: Option<IntOrString>, up| pods::resolve_int_or_percent(&value.unwrap_or_else(default), replicas, up);
    let surge = resolve(rolling.max_surge, true).unwrap_or(0);
    let mut unavailable = resolve(rolling.max_unavailable, false).unwrap_or(0);
    // Percentages may both come to nothing; then one pod may be missing, or the rollout could not move.
    if surge == 0 && unavailable == 0 {
        unavailable = 1;
    }
    Strategy::Rolling { surge, unavailable: unavailable.min(replicas.max(0)) }
}

impl Strategy {
    fn surge(self) -> i32 {
        match self {
            Strategy::Recreate => 0,
            Strategy::Rolling { surge, .. } => surge,
        }
    }

    fn unavailable(self) -> i32 {
        match self {
            Strategy::Recreate => 0,
            Strategy::Rolling { unavailable, .. } => unavailable,
        }
    }
}

/// A ReplicaSet under change.
struct Draft {
    original: Arc<ReplicaSet>,
    set: ReplicaSet,
    /// Its pods that are neither finished nor being deleted.
    active: i32,
}

impl Draft {
    fn replicas(&self) -> i32 {
        self.set.spec.as_ref().and_then(|s| s.replicas).unwrap_or(1)
    }

    fn available(&self) -> i32 {
        self.set.status.as_ref().and_then(|s| s.available_replicas).unwrap_or(0)
    }

    /// The pods that it has or will have: as long as surplus ones are not deleted they take room.
    fn occupies(&self) -> i32 {
        self.replicas().max(self.active)
    }

    /// The available pods that it is certain to keep. Its status may be older than its size.
    fn keeps_available(&self) -> i32 {
        self.available().min(self.replicas())
    }

    fn annotation(&self, key: &str) -> Option<&str> {
        self.set.metadata.annotations.as_ref().and_then(|a| a.get(key)).map(String::as_str)
    }

    fn annotate(&mut self, key: &str, value: impl Into<String>) {
        self.set.metadata.annotations.get_or_insert_default().insert(key.into(), value.into());
    }

    fn revision(&self) -> i64 {
        self.annotation(REVISION).and_then(|r| r.parse().ok()).unwrap_or(0)
    }

    fn name(&self) -> &str {
        self.set.metadata.name.as_deref().unwrap_or_default()
    }
}

fn created(meta: &ObjectMeta) -> (Option<Timestamp>, Option<&str>) {
    (meta.creation_timestamp.as_ref().map(|t| t.0), meta.name.as_deref())
}

/// Whether two templates are the same but for the hash label.
fn same_template(a: Option<&PodTemplateSpec>, b: Option<&PodTemplateSpec>) -> bool {
    let bare = |template: Option<&PodTemplateSpec>| {
        let mut template = template.cloned().unwrap_or_default();
        if let Some(meta) = template.metadata.as_mut() {
            if let Some(labels) = meta.labels.as_mut() {
                labels.remove(POD_TEMPLATE_HASH);
            }
            meta.labels = meta.labels.take().filter(|l| !l.is_empty());
        }
        template.metadata = template.metadata.filter(|m| *m != ObjectMeta::default());
        template
    };
    bare(a) == bare(b)
}

struct Step<'a> {
    deployment: &'a Deployment,
    strategy: Strategy,
    /// Oldest first.
    sets: Vec<Draft>,
    /// Index of the set with the wanted template.
    new: Option<usize>,
    plan: Plan,
    now: Timestamp,
    /// A Progressing condition decided in this step before the status is computed.
    progressing: Option<DeploymentCondition>,
}

/// Decides one step. `sets` are the ReplicaSets that the Deployment controls, `pods` the pods that these control.
pub fn plan(deployment: &Deployment, sets: &[Arc<ReplicaSet>], pods: &[Arc<Pod>], now: Timestamp) -> Plan {
    let spec = deployment.spec.clone().unwrap_or_default();
    let mut active: HashMap<&str, i32> = HashMap::new();
    for owner in pods.iter().filter(|p| pods::is_active(p)).filter_map(|p| controller_of(&**p)) {
        *active.entry(&owner.uid).or_default() += 1;
    }
    let draft = |original: &Arc<ReplicaSet>| {
        let active = original.metadata.uid.as_deref().and_then(|uid| active.get(uid)).copied().unwrap_or(0);
        Draft { original: original.clone(), set: ReplicaSet::clone(original), active }
    };
    let mut sets: Vec<Draft> = sets.iter().map(draft).collect();
    sets.sort_by(|a, b| created(&a.set.metadata).cmp(&created(&b.set.metadata)));
    let new = sets
        .iter()
        .position(|d| same_template(d.set.spec.as_ref().and_then(|s| s.template.as_ref()), Some(&spec.template)));
    let mut step =
        Step { deployment, strategy: strategy(deployment), sets, new, plan: Plan::default(), now, progressing: None };
    if deployment.metadata.deletion_timestamp.is_some() {
        step.sync_status(false);
        return step.finish();
    }
    if selector::is_empty(&spec.selector) {
        return Plan { events: vec![], status: None, ..Plan::default() };
    }
    let paused = spec.paused.unwrap_or(false);
    step.note_paused(paused);
    if paused || step.is_scaling() {
        step.sync_revision(false);
        step.scale_proportionally();
        if paused {
            step.clean_up();
        }
        step.sync_status(false);
        return step.finish();
    }
    match step.strategy {
        Strategy::Recreate => step.recreate(pods),
        Strategy::Rolling { .. } => step.roll(),
    }
    step.finish()
}

impl Step<'_> {
    fn wanted(&self) -> i32 {
        self.deployment.spec.as_ref().and_then(|s| s.replicas).unwrap_or(1)
    }

    fn min_available(&self) -> i32 {
        self.wanted() - self.strategy.unavailable()
    }

    fn olds(&self) -> Vec<usize> {
        (0..self.sets.len()).filter(|i| Some(*i) != self.new).collect()
    }

    fn total(&self) -> i32 {
        self.sets.iter().map(Draft::replicas).sum()
    }

    /// Writes the size that the ReplicaSets should know about into one of them.
    fn annotate_size(&mut self, at: usize) {
        let (wanted, surge) = (self.wanted(), self.strategy.surge());
        self.sets[at].annotate(DESIRED_REPLICAS, wanted.to_string());
        self.sets[at].annotate(MAX_REPLICAS, (wanted + surge).to_string());
    }

    /// Scales one ReplicaSet and tells so. Says whether the size changed.
    fn scale(&mut self, at: usize, size: i32) -> bool {
        let before = self.sets[at].replicas();
        self.annotate_size(at);
        if before == size {
            return false;
        }
        self.sets[at].set.spec.get_or_insert_default().replicas = Some(size);
        let verb = if size > before { "up" } else { "down" };
        let text = format!("Scaled {verb} replica set {} from {before} to {size}", self.sets[at].name());
        self.plan.events.push(("ScalingReplicaSet", text));
        true
    }

    fn current_progressing(&self) -> Option<DeploymentCondition> {
        self.progressing.clone().or_else(|| {
            let conditions = self.deployment.status.as_ref()?.conditions.as_ref()?;
            conditions.iter().find(|c| c.type_ == "Progressing").cloned()
        })
    }

    fn deadline(&self) -> Option<Duration> {
        let seconds = self.deployment.spec.as_ref()?.progress_deadline_seconds.filter(|s| *s != NO_DEADLINE)?;
        u64::try_from(seconds).ok().map(Duration::from_secs)
    }

    fn condition(&self, kind: &str, status: &str, reason: &str, message: String) -> DeploymentCondition {
        DeploymentCondition {
            type_: kind.into(),
            status: status.into(),
            reason: Some(reason.into()),
            message: Some(message),
            last_update_time: Some(Time(self.now)),
            last_transition_time: Some(Time(self.now)),
        }
    }

    fn note_paused(&mut self, paused: bool) {
        let Some(_) = self.deadline() else { return };
        let current = self.current_progressing();
        let reason = current.as_ref().and_then(|c| c.reason.as_deref());
        if reason == Some("ProgressDeadlineExceeded") {
            return;
        }
        let was = reason == Some("DeploymentPaused");
        if paused && !was {
            let text = "Deployment is paused".to_string();
            self.progressing = Some(self.condition("Progressing", "Unknown", "DeploymentPaused", text));
        } else if !paused && was {
            let text = "Deployment is resumed".to_string();
            self.progressing = Some(self.condition("Progressing", "Unknown", "DeploymentResumed", text));
        }
    }

    /// Whether `spec.replicas` has changed since the ReplicaSets were last sized.
    fn is_scaling(&self) -> bool {
        let wanted = self.wanted();
        self.sets.iter().filter(|d| d.replicas() > 0).any(|d| {
            d.annotation(DESIRED_REPLICAS).and_then(|n| n.parse::<i32>().ok()).is_some_and(|desired| desired != wanted)
        })
    }

    /// Numbers the ReplicaSets and makes the missing one if `create` is set.
    fn sync_revision(&mut self, create: bool) {
        let oldest: i64 = self.olds().into_iter().map(|i| self.sets[i].revision()).max().unwrap_or(0);
        let revision = (oldest + 1).to_string();
        let spec = self.deployment.spec.clone().unwrap_or_default();
        match self.new {
            Some(at) => {
                let draft = &mut self.sets[at];
                let before = draft.revision();
                if before < oldest + 1 {
                    if before > 0 {
                        let history = draft.annotation(REVISION_HISTORY).unwrap_or_default();
                        let mut numbers: Vec<String> =
                            history.split(',').filter(|n| !n.is_empty()).map(str::to_string).collect();
                        numbers.push(before.to_string());
                        while numbers.join(",").len() > HISTORY_LENGTH {
                            numbers.remove(0);
                        }
                        draft.annotate(REVISION_HISTORY, numbers.join(","));
                    }
                    draft.annotate(REVISION, revision.clone());
                }
                for (key, value) in copied_annotations(self.deployment) {
                    draft.annotate(&key, value);
                }
                draft.set.spec.get_or_insert_default().min_ready_seconds = spec.min_ready_seconds;
                let revision = draft.annotation(REVISION).map(str::to_string);
                let name = draft.name().to_string();
                self.set_deployment_revision(revision);
                if self.deadline().is_some() && self.current_progressing().is_none() {
                    let text = format!("Found new replica set \"{name}\"");
                    self.progressing = Some(self.condition("Progressing", "True", "FoundNewReplicaSet", text));
                }
            }
            None if create => {
                let collisions = self.deployment.status.as_ref().and_then(|s| s.collision_count);
                let hash = pods::template_hash(&spec.template, collisions);
                let mut template = spec.template.clone();
                let labels = template.metadata.get_or_insert_default().labels.get_or_insert_default();
                labels.insert(POD_TEMPLATE_HASH.into(), hash.clone());
                let labels = labels.clone();
                let mut selector: LabelSelector = spec.selector.clone();
                selector.match_labels.get_or_insert_default().insert(POD_TEMPLATE_HASH.into(), hash.clone());
                let size = self.new_set_size(0);
                let mut annotations: BTreeMap<String, String> = copied_annotations(self.deployment).collect();
                annotations.insert(REVISION.into(), revision.clone());
                annotations.insert(DESIRED_REPLICAS.into(), self.wanted().to_string());
                annotations.insert(MAX_REPLICAS.into(), (self.wanted() + self.strategy.surge()).to_string());
                let name = format!("{}-{hash}", self.deployment.metadata.name.as_deref().unwrap_or_default());
                self.plan.create = Some(ReplicaSet {
                    metadata: ObjectMeta {
                        name: Some(name.clone()),
                        namespace: self.deployment.metadata.namespace.clone(),
                        labels: Some(labels),
                        annotations: Some(annotations),
                        owner_references: Some(vec![controller_reference(self.deployment)]),
                        ..Default::default()
                    },
                    spec: Some(ReplicaSetSpec {
                        replicas: Some(size),
                        min_ready_seconds: spec.min_ready_seconds,
                        selector,
                        template: Some(template),
                    }),
                    status: None,
                });
                if size > 0 {
                    let text = format!("Scaled up replica set {name} from 0 to {size}");
                    self.plan.events.push(("ScalingReplicaSet", text));
                }
                self.set_deployment_revision(Some(revision));
                if self.deadline().is_some() {
                    let text = format!("Created new replica set \"{name}\"");
                    self.progressing = Some(self.condition("Progressing", "True", "NewReplicaSetCreated", text));
                }
            }
            None => {}
        }
    }

    fn set_deployment_revision(&mut self, revision: Option<String>) {
        let current = self.deployment.metadata.annotations.as_ref().and_then(|a| a.get(REVISION));
        if revision.is_some() && current != revision.as_ref() {
            self.plan.revision = revision;
        }
    }

    /// The size that the new ReplicaSet may have now, given its present size.
    fn new_set_size(&self, present: i32) -> i32 {
        let wanted = self.wanted();
        match self.strategy {
            Strategy::Recreate => wanted,
            Strategy::Rolling { surge, .. } => {
                let room = wanted + surge - self.sets.iter().map(Draft::occupies).sum::<i32>();
                if room <= 0 { present } else { present + room.min(wanted - present) }
            }
        }
    }

    fn roll(&mut self) {
        self.sync_revision(true);
        if self.plan.create.is_some() {
            return self.sync_status(true);
        }
        let Some(new) = self.new else { return self.sync_status(true) };
        let (wanted, present) = (self.wanted(), self.sets[new].replicas());
        let size = if present > wanted { wanted } else { self.new_set_size(present) };
        if present != wanted && self.scale(new, size) {
            return self.sync_status(true);
        }
        if self.shrink_old(new) {
            return self.sync_status(true);
        }
        if self.is_complete() {
            self.clean_up();
        }
        self.sync_status(true);
    }

    /// Takes pods from old ReplicaSets as far as availability allows: first those that are of no use anyway.
    fn shrink_old(&mut self, new: usize) -> bool {
        let olds = self.olds();
        if olds.iter().all(|i| self.sets[*i].replicas() == 0) {
            return false;
        }
        let new_unavailable = self.sets[new].replicas() - self.sets[new].keeps_available();
        let mut budget = self.total() - self.min_available() - new_unavailable;
        if budget <= 0 {
            return false;
        }
        let mut changed = false;
        for at in &olds {
            let (replicas, available) = (self.sets[*at].replicas(), self.sets[*at].keeps_available());
            let unhealthy = (replicas - available).min(budget).max(0);
            if replicas > 0 && unhealthy > 0 {
                changed |= self.scale(*at, replicas - unhealthy);
                budget -= unhealthy;
            }
        }
        let available: i32 = self.sets.iter().map(Draft::keeps_available).sum();
        let mut surplus = available - self.min_available();
        for at in &olds {
            let replicas = self.sets[*at].replicas();
            let down = replicas.min(surplus).max(0);
            if down > 0 {
                changed |= self.scale(*at, replicas - down);
                surplus -= down;
            }
        }
        changed
    }

    fn recreate(&mut self, pods: &[Arc<Pod>]) {
        self.sync_revision(false);
        let mut changed = false;
        for at in self.olds() {
            if self.sets[at].replicas() > 0 {
                changed |= self.scale(at, 0);
            }
        }
        if changed {
            return self.sync_status(true);
        }
        let old_uids: Vec<&str> =
            self.olds().into_iter().filter_map(|i| self.sets[i].original.metadata.uid.as_deref()).collect();
        let counted = self.olds().into_iter().any(|i| self.sets[i].set.status.as_ref().is_some_and(|s| s.replicas > 0));
        // Old pods that are still terminating hold the new ones back.
        let running = pods
            .iter()
            .any(|p| !pods::is_finished(p) && controller_of(&**p).is_some_and(|o| old_uids.contains(&o.uid.as_str())));
        if counted || running {
            return self.sync_status(true);
        }
        if self.new.is_none() {
            self.sync_revision(true);
        } else if let Some(new) = self.new {
            let wanted = self.wanted();
            self.scale(new, wanted);
        }
        if self.is_complete() {
            self.clean_up();
        }
        self.sync_status(true);
    }

    /// Follows a change of `spec.replicas`: one active ReplicaSet takes it all, several share it in proportion to their size.
    fn scale_proportionally(&mut self) {
        let wanted = self.wanted();
        let active: Vec<usize> = (0..self.sets.len()).filter(|i| self.sets[*i].replicas() > 0).collect();
        let single = match active.as_slice() {
            [] => self.new.or_else(|| self.olds().last().copied()),
            [only] => Some(*only),
            _ => None,
        };
        if let Some(at) = single {
            self.scale(at, wanted);
            return;
        }
        // The rollout has ended: nothing is left to share with the old sets.
        if let Some(new) = self.new {
            let draft = &self.sets[new];
            let told = draft.annotation(DESIRED_REPLICAS).and_then(|n| n.parse::<i32>().ok());
            if told == Some(wanted) && draft.replicas() == wanted && draft.available() == wanted {
                for at in self.olds() {
                    self.scale(at, 0);
                }
                return;
            }
        }
        let Strategy::Rolling { surge, .. } = self.strategy else { return };
        let allowed = if wanted > 0 { wanted + surge } else { 0 };
        let to_add = allowed - self.total();
        let mut order = active;
        if to_add > 0 {
            // Biggest first, newer before older.
            order.sort_by_key(|i| (Reverse(self.sets[*i].replicas()), Reverse(*i)));
        } else {
            order.sort_by_key(|i| (Reverse(self.sets[*i].replicas()), *i));
        }
        let mut added = 0;
        let mut sizes: Vec<(usize, i32)> = Vec::new();
        for at in &order {
            let replicas = self.sets[*at].replicas();
            let mut share = 0;
            if to_add != 0 && to_add != added {
                let fraction = self.fraction(*at, surge);
                let rest = to_add - added;
                share = if to_add > 0 { fraction.min(rest) } else { fraction.max(rest) };
            }
            added += share;
            sizes.push((*at, replicas + share));
        }
        if let Some((_, first)) = sizes.first_mut() {
            *first = (*first + to_add - added).max(0);
        }
        for (at, size) in sizes {
            self.scale(at, size);
        }
    }

    /// What one ReplicaSet's size should change by when the Deployment's size changes.
    fn fraction(&self, at: usize, surge: i32) -> i32 {
        let draft = &self.sets[at];
        let wanted = self.wanted();
        if wanted == 0 {
            return -draft.replicas();
        }
        let before = draft
            .annotation(MAX_REPLICAS)
            .and_then(|n| n.parse::<i32>().ok())
            .or_else(|| self.deployment.status.as_ref().and_then(|s| s.replicas))
            .filter(|n| *n > 0)
            .unwrap_or(draft.replicas().max(1));
        let scaled = f64::from(draft.replicas()) * f64::from(wanted + surge) / f64::from(before);
        scaled.round() as i32 - draft.replicas()
    }

    fn is_complete(&self) -> bool {
        self.deployment.status.as_ref().is_some_and(|status| complete(self.deployment, status))
    }

    /// Deletes empty old ReplicaSets beyond the history limit, oldest revisions first.
    fn clean_up(&mut self) {
        let Some(limit) = self.deployment.spec.as_ref().and_then(|s| s.revision_history_limit) else { return };
        let Ok(limit) = usize::try_from(limit) else { return };
        let mut olds: Vec<usize> =
            self.olds().into_iter().filter(|i| self.sets[*i].set.metadata.deletion_timestamp.is_none()).collect();
        let Some(excess) = olds.len().checked_sub(limit).filter(|n| *n > 0) else { return };
        olds.sort_by_key(|i| self.sets[*i].revision());
        for at in olds.into_iter().take(excess) {
            let draft = &self.sets[at];
            let status = draft.set.status.clone().unwrap_or_default();
            let unsettled = status.replicas != 0
                || draft.replicas() != 0
                || draft.set.metadata.generation > status.observed_generation;
            if !unsettled {
                self.plan.delete.push(draft.original.clone());
            }
        }
    }

    /// Computes the status. `rollout` also judges progress.
    fn sync_status(&mut self, rollout: bool) {
        let old = self.deployment.status.clone().unwrap_or_default();
        let sum = |field: &dyn Fn(&ReplicaSet) -> i32| -> i32 { self.sets.iter().map(|d| field(&d.set)).sum() };
        let status = |set: &ReplicaSet| set.status.clone().unwrap_or_default();
        let available = sum(&|s| status(s).available_replicas.unwrap_or(0));
        // A set made in this step counts with what it will have.
        let created = self.plan.create.as_ref().and_then(|s| s.spec.as_ref()).and_then(|s| s.replicas).unwrap_or(0);
        let unavailable = (self.total() + created - available).max(0);
        let some = |count: i32| Some(count).filter(|c| *c != 0);
        let mut new = DeploymentStatus {
            observed_generation: self.deployment.metadata.generation,
            replicas: some(sum(&|s| status(s).replicas)),
            updated_replicas: some(self.new.map_or(0, |at| status(&self.sets[at].set).replicas)),
            ready_replicas: some(sum(&|s| status(s).ready_replicas.unwrap_or(0))),
            available_replicas: some(available),
            unavailable_replicas: some(unavailable),
            terminating_replicas: Some(sum(&|s| status(s).terminating_replicas.unwrap_or(0))),
            collision_count: old.collision_count,
            conditions: old.conditions.clone(),
        };
        let mut conditions = new.conditions.take().unwrap_or_default();
        let availability = if available >= self.min_available() {
            self.condition(
                "Available",
                "True",
                "MinimumReplicasAvailable",
                "Deployment has minimum availability.".into(),
            )
        } else {
            self.condition(
                "Available",
                "False",
                "MinimumReplicasUnavailable",
                "Deployment does not have minimum availability.".into(),
            )
        };
        set_condition(&mut conditions, availability);
        if let Some(progressing) = self.progressing.take() {
            set_condition(&mut conditions, progressing);
        }
        if rollout {
            self.judge_progress(&old, &new, &mut conditions);
            // A ReplicaSet that cannot make pods is the Deployment's trouble too.
            let failure = self
                .sets
                .iter()
                .flat_map(|d| d.set.status.iter().flat_map(|s| s.conditions.iter().flatten()))
                .find(|c| c.type_ == "ReplicaFailure");
            match failure {
                Some(failure) => {
                    let (reason, text) = (failure.reason.as_deref().unwrap_or_default(), failure.message.clone());
                    let condition = self.condition("ReplicaFailure", &failure.status, reason, text.unwrap_or_default());
                    set_condition(&mut conditions, condition);
                }
                None => conditions.retain(|c| c.type_ != "ReplicaFailure"),
            }
        }
        new.conditions = Some(conditions).filter(|c| !c.is_empty());
        if self.deployment.status.as_ref() != Some(&new) {
            self.plan.status = Some(new);
        }
    }

    fn judge_progress(
        &mut self,
        old: &DeploymentStatus,
        new: &DeploymentStatus,
        conditions: &mut Vec<DeploymentCondition>,
    ) {
        let Some(deadline) = self.deadline() else {
            conditions.retain(|c| c.type_ != "Progressing");
            return;
        };
        let current = conditions.iter().find(|c| c.type_ == "Progressing").cloned();
        let reason = current.as_ref().and_then(|c| c.reason.as_deref());
        let settled = new.replicas == new.updated_replicas && reason == Some("NewReplicaSetAvailable");
        let subject = match self.new {
            Some(at) => format!("ReplicaSet \"{}\"", self.sets[at].name()),
            None => format!("Deployment \"{}\"", self.deployment.metadata.name.as_deref().unwrap_or_default()),
        };
        if settled {
            return;
        }
        let count = |n: Option<i32>| n.unwrap_or(0);
        let olds = |s: &DeploymentStatus| count(s.replicas) - count(s.updated_replicas);
        let progressed = count(new.updated_replicas) > count(old.updated_replicas)
            || olds(new) < olds(old)
            || count(new.ready_replicas) > count(old.ready_replicas)
            || count(new.available_replicas) > count(old.available_replicas);
        if complete(self.deployment, new) {
            let text = format!("{subject} has successfully progressed.");
            let condition = self.condition("Progressing", "True", "NewReplicaSetAvailable", text);
            set_condition(conditions, condition);
        } else if progressed {
            let text = format!("{subject} is progressing.");
            let mut condition = self.condition("Progressing", "True", "ReplicaSetUpdated", text);
            // Each piece of progress starts the deadline again.
            if let Some(current) = current.filter(|c| c.status == "True") {
                condition.last_transition_time = current.last_transition_time;
            }
            conditions.retain(|c| c.type_ != "Progressing");
            conditions.push(condition);
            self.plan.recheck = Some(deadline + Duration::from_secs(1));
        } else if let Some(current) = current
            && current.reason.as_deref() != Some("ProgressDeadlineExceeded")
            && current.reason.as_deref() != Some("DeploymentPaused")
        {
            let since = current.last_update_time.as_ref().map_or(self.now, |t| t.0);
            let passed = Duration::try_from(self.now.duration_since(since)).unwrap_or_default();
            // Timestamps in the API are whole seconds.
            if passed > deadline {
                let text = format!("{subject} has timed out progressing.");
                let condition = self.condition("Progressing", "False", "ProgressDeadlineExceeded", text);
                set_condition(conditions, condition);
            } else {
                self.plan.recheck = Some(deadline - passed + Duration::from_secs(1));
            }
        }
    }

    fn finish(mut self) -> Plan {
        self.plan.update =
            self.sets.into_iter().filter(|draft| draft.set != *draft.original).map(|draft| draft.set).collect();
        self.plan
    }
}

fn copied_annotations(deployment: &Deployment) -> impl Iterator<Item = (String, String)> + '_ {
    let annotations = deployment.metadata.annotations.iter().flatten();
    annotations.filter(|(k, _)| !NOT_COPIED.contains(&k.as_str())).map(|(k, v)| (k.clone(), v.clone()))
}

fn complete(deployment: &Deployment, status: &DeploymentStatus) -> bool {
    let wanted = deployment.spec.as_ref().and_then(|s| s.replicas).unwrap_or(1);
    status.updated_replicas.unwrap_or(0) == wanted
        && status.replicas.unwrap_or(0) == wanted
        && status.available_replicas.unwrap_or(0) == wanted
        && status.observed_generation >= deployment.metadata.generation
}

/// Replaces a condition; unchanged status and reason keep the old one, an unchanged status keeps its transition time.
fn set_condition(conditions: &mut Vec<DeploymentCondition>, mut new: DeploymentCondition) {
    if let Some(at) = conditions.iter().position(|c| c.type_ == new.type_) {
        let old = conditions.remove(at);
        if old.status == new.status && old.reason == new.reason {
            conditions.insert(at, old);
            return;
        }
        if old.status == new.status {
            new.last_transition_time = old.last_transition_time;
        }
    }
    conditions.push(new);
}

/// Registers with the caches and returns the future that works.
pub(crate) fn start(context: Context) -> impl Future<Output = ()> + Send + 'static {
    let queue: Queue<Key> = context.queue("deployment");
    let add = queue.clone();
    context.caches.deployments.on_change(move |old, new| {
        if let Some(deployment) = new.or(old) {
            add.add(Key::of(&**deployment));
        }
    });
    let add = queue.clone();
    let deployments = context.caches.deployments.clone();
    context.caches.replica_sets.on_change(move |old, new| {
        for set in [old, new].into_iter().flatten() {
            let namespace = set.metadata.namespace.as_deref().unwrap_or_default();
            match controller_of(&**set) {
                Some(owner) if owner.kind == "Deployment" => add.add(Key::new(namespace, &owner.name)),
                Some(_) => {}
                None => {
                    for deployment in deployments.list(namespace) {
                        let selector = deployment.spec.as_ref().map(|s| &s.selector);
                        if selector.is_some_and(|s| selector::matches(s, set.metadata.labels.as_ref())) {
                            add.add(Key::of(&*deployment));
                        }
                    }
                }
            }
        }
    });
    // Recreate waits for the last old pod to be gone.
    let add = queue.clone();
    let sets = context.caches.replica_sets.clone();
    context.caches.pods.on_change(move |old, new| {
        let (Some(pod), None) = (old, new) else { return };
        let namespace = pod.metadata.namespace.as_deref().unwrap_or_default();
        if let Some(owner) = controller_of(&**pod).filter(|o| o.kind == "ReplicaSet")
            && let Some(set) = sets.get(namespace, &owner.name)
            && let Some(deployment) = controller_of(&*set).filter(|o| o.kind == "Deployment")
        {
            add.add(Key::new(namespace, &deployment.name));
        }
    });
    async move {
        let events = context.recorder("deployment-controller");
        let stop = context.shutdown.clone();
        queue.work(WORKERS, stop, move |key| sync(context.clone(), events.clone(), key)).await;
    }
}

async fn sync(context: Context, events: EventRecorder, key: Key) -> anyhow::Result<Next> {
    let caches = &context.caches;
    let Some(deployment) = caches.deployments.get(&key.namespace, &key.name) else { return Ok(Next::Wait) };
    let about = reference(&*deployment);
    let spec = deployment.spec.clone().unwrap_or_default();
    let set_api: Api<ReplicaSet> = Api::namespaced(context.client.clone(), &key.namespace);
    let api: Api<Deployment> = Api::namespaced(context.client.clone(), &key.namespace);
    if selector::is_empty(&spec.selector) {
        let text = "This deployment is selecting all pods. A non-empty selector is required.";
        events.event(&about, EventType::Warning, "SelectingAll", text);
        return Ok(Next::Wait);
    }
    let uid = deployment.metadata.uid.as_deref();
    let candidates = caches.replica_sets.claimable(&key.namespace, uid, &spec.selector);
    let claim = pods::claim(&deployment.metadata, &spec.selector, candidates, |_| true);
    if !claim.adopt.is_empty() && !may_adopt(&api, &deployment).await? {
        return Ok(Next::Wait);
    }
    for set in &claim.adopt {
        adopt(&set_api, &caches.replica_sets, &*deployment, set).await?;
    }
    for set in &claim.release {
        release(&set_api, &caches.replica_sets, uid, set).await?;
    }
    let mut sets = uid.map(|uid| caches.replica_sets.controlled_by(uid)).unwrap_or_default();
    sets.retain(|s| selector::matches(&spec.selector, s.metadata.labels.as_ref()));
    let of_sets = sets.iter().filter_map(|s| s.metadata.uid.as_deref()).flat_map(|uid| caches.pods.controlled_by(uid));
    let pods: Vec<Arc<Pod>> = of_sets.collect();
    let plan = plan(&deployment, &sets, &pods, context.clock.now());

    let mut status = plan.status;
    let mut retry = None;
    if let Some(set) = &plan.create {
        match set_api.create(&PostParams::default(), set).await {
            Ok(made) => caches.replica_sets.wrote(made),
            Err(error) if is_namespace_terminating(&error) => return Ok(Next::Wait),
            Err(error) if already_exists(&error) => {
                // The hash of another template has the same letters (or the cache has not seen the set): count and hash anew.
                let mut counted = status.take().or_else(|| deployment.status.clone()).unwrap_or_default();
                counted.collision_count = Some(counted.collision_count.unwrap_or(0) + 1);
                status = Some(counted);
                retry = Some(error);
            }
            Err(error) => {
                let name = set.metadata.name.as_deref().unwrap_or_default();
                let text = format!("Failed to create new replica set \"{name}\": {}", message(&error));
                events.event(&about, EventType::Warning, "ReplicaSetCreateError", text);
                return Err(error).context("cannot create the replica set");
            }
        }
    }
    for set in &plan.update {
        let name = set.metadata.name.as_deref().unwrap_or_default();
        match set_api.replace(name, &PostParams::default(), set).await {
            Ok(written) => caches.replica_sets.wrote(written),
            Err(error) => return Err(error).with_context(|| format!("cannot update replica set {name}")),
        }
    }
    if retry.is_none() {
        for (reason, text) in plan.events {
            events.event(&about, EventType::Normal, reason, text);
        }
    }
    for set in &plan.delete {
        remove(&set_api, &caches.replica_sets, set, &DeleteParams::background())
            .await
            .context("cannot delete an old replica set")?;
    }
    if status.is_some() || plan.revision.is_some() {
        // Both through the status: there the annotation does not count as a change of the Deployment (a new generation).
        let mut updated = Deployment::clone(&deployment);
        if let Some(revision) = plan.revision {
            updated.metadata.annotations.get_or_insert_default().insert(REVISION.into(), revision);
        }
        if let Some(status) = status {
            updated.status = Some(status);
        }
        match api.replace_status(&key.name, &PostParams::default(), &updated).await {
            Ok(written) => caches.deployments.wrote(written),
            Err(error) if is_not_found(&error) => return Ok(Next::Wait),
            Err(error) => return Err(error).context("cannot update the status"),
        }
    }
    match retry {
        Some(error) => Err(error).context("the name of the new replica set is taken"),
        None => Ok(plan.recheck.map_or(Next::Wait, Next::After)),
    }
}

#[cfg(test)]
mod tests;
