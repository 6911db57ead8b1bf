//! Jobs: run pods until enough of them have succeeded.
//!
//! Each pod carries a finalizer until its end is counted. A pod that has ended is first noted by uid in the status
//! (`uncountedTerminatedPods`), then loses the finalizer, and is then counted: whatever fails in between, it is counted once
//! (KEP-2307). Finished Jobs with a `ttlSecondsAfterFinished` are deleted here too.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;
use std::time::Duration;

use anyhow::Context as _;
use jiff::Timestamp;
use k8s_openapi::api::batch::v1::{Job, JobCondition, JobSpec, JobStatus};
use k8s_openapi::api::core::v1::{EnvVar, EnvVarSource, ObjectFieldSelector, Pod};
use k8s_openapi::apimachinery::pkg::apis::meta::v1::Time;
use kube::Api;
use kube::api::{DeleteParams, Patch, PatchParams, PostParams, Preconditions};
use portolan_client::{EventRecorder, EventType};
use serde_json::json;

use crate::Context;
use crate::pods;
use crate::queue::{Key, Next, Queue};
use crate::replicaset::{delete_pod, may_adopt, release};
use crate::util::{
    controller_of, controller_reference, is_conflict, is_namespace_terminating, is_not_found, is_replaced, message,
    reference,
};

const WORKERS: usize = 5;
/// Pods made in one sync at most.
const BURST: usize = 500;
/// When to look again at a pod whose Job exists but is not in the cache yet.
const ORPHAN_RECHECK: Duration = Duration::from_secs(1);
/// Finalizer of pods whose end is not counted yet.
pub const TRACKING: &str = "batch.kubernetes.io/job-tracking";
const INDEX: &str = "batch.kubernetes.io/job-completion-index";
const INDEX_FAILURES: &str = "batch.kubernetes.io/job-index-failure-count";
/// Who runs a Job whose `managedBy` says nothing else.
const MANAGER: &str = "kubernetes.io/job-controller";
/// Pause after the first failure; doubled with each further one (API doc of `backoffLimit`).
const FIRST_BACKOFF: Duration = Duration::from_secs(10);
const LONGEST_BACKOFF: Duration = Duration::from_secs(600);

/// Completion indexes, as text `0-2,4`.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Indexes(pub BTreeSet<i32>);

impl Indexes {
    /// Reads the text; leaves out what is no index below `completions`.
    pub fn parse(text: &str, completions: i32) -> Indexes {
        let mut all = BTreeSet::new();
        for part in text.split(',') {
            let (first, last) = part.split_once('-').unwrap_or((part, part));
            if let (Ok(first), Ok(last)) = (first.trim().parse::<i32>(), last.trim().parse::<i32>()) {
                all.extend((first.max(0)..=last.min(completions - 1)).take_while(|i| *i < completions));
            }
        }
        Indexes(all)
    }

    /// The shortest text: runs of three or more as a range.
    pub fn format(&self) -> String {
        let mut runs: Vec<(i32, i32)> = Vec::new();
        for index in &self.0 {
            match runs.last_mut() {
                Some((_, last)) if *last + 1 == *index => *last = *index,
                _ => runs.push((*index, *index)),
            }
        }
        let text = |(first, last): &(i32, i32)| match last - first {
            0 => first.to_string(),
            1 => format!("{first},{last}"),
            _ => format!("{first}-{last}"),
        };
        runs.iter().map(text).collect::<Vec<_>>().join(",")
    }
}

/// What to do about a Job.
#[derive(Debug, Default)]
pub struct Plan {
    /// The status to write.
    pub status: JobStatus,
    /// Pods to make: the completion index, of an Indexed Job, with the failures of that index so far.
    pub create: Vec<Option<(i32, i32)>>,
    /// Pods to delete.
    pub delete: Vec<Arc<Pod>>,
    /// Pods that lose the finalizer once the status is written.
    pub untrack: Vec<Arc<Pod>>,
    /// When to look again by the passing of time.
    pub recheck: Option<Duration>,
    /// The time to live after the end has passed.
    pub expired: bool,
}

impl Plan {
    fn look_again(&mut self, after: Duration) {
        // The API keeps whole seconds; a little more avoids a second look.
        let after = after + Duration::from_millis(5);
        self.recheck = Some(self.recheck.map_or(after, |r| r.min(after)));
    }
}

fn is_indexed(spec: &JobSpec) -> bool {
    spec.completion_mode.as_deref() == Some("Indexed")
}

/// The completion index of a pod.
fn index_of(pod: &Pod) -> Option<i32> {
    pod.metadata.annotations.as_ref()?.get(INDEX)?.parse().ok()
}

fn is_tracked(pod: &Pod) -> bool {
    pod.metadata.finalizers.iter().flatten().any(|f| f == TRACKING)
}

/// Whether only pods that have failed are replaced, not those that are about to end.
fn waits_for_end(spec: &JobSpec) -> bool {
    spec.pod_replacement_policy.as_deref() == Some("Failed") || spec.pod_failure_policy.is_some()
}

fn has_failed(spec: &JobSpec, pod: &Pod) -> bool {
    match pods::phase(pod) {
        "Failed" => true,
        "Succeeded" => false,
        _ => pods::is_terminating(pod) && !waits_for_end(spec),
    }
}

/// When a pod ended, as well as can be told.
fn ended(pod: &Pod) -> Option<Timestamp> {
    let status = pod.status.as_ref();
    let containers = status.and_then(|s| s.container_statuses.as_deref()).unwrap_or_default();
    let finished = |c: &k8s_openapi::api::core::v1::ContainerStatus| {
        c.state.as_ref()?.terminated.as_ref()?.finished_at.as_ref().map(|t| t.0)
    };
    let ready = || {
        let conditions = status.and_then(|s| s.conditions.as_deref()).unwrap_or_default();
        conditions
            .iter()
            .find(|c| c.type_ == "Ready" && c.status == "False")?
            .last_transition_time
            .as_ref()
            .map(|t| t.0)
    };
    (containers.iter().filter_map(finished).max())
        .or_else(ready)
        .or_else(|| pod.metadata.deletion_timestamp.as_ref().map(|t| t.0))
        .or_else(|| pod.metadata.creation_timestamp.as_ref().map(|t| t.0))
}

/// What the failure policy says about a failed pod.
#[derive(Debug, PartialEq)]
enum Verdict {
    Count,
    Ignore,
    FailIndex,
    FailJob(String),
}

/// Applies the first rule of the pod failure policy that matches (KEP-3329).
fn judge(spec: &JobSpec, pod: &Pod) -> Verdict {
    let Some(policy) = spec.pod_failure_policy.as_ref().filter(|_| pods::phase(pod) == "Failed") else {
        return Verdict::Count;
    };
    let status = pod.status.clone().unwrap_or_default();
    let namespace = pod.metadata.namespace.as_deref().unwrap_or_default();
    let name = pod.metadata.name.as_deref().unwrap_or_default();
    let containers: Vec<(String, i32)> = (status.init_container_statuses.iter().flatten())
        .chain(status.container_statuses.iter().flatten())
        .filter_map(|c| Some((c.name.clone(), c.state.as_ref()?.terminated.as_ref()?.exit_code)))
        .filter(|(_, code)| *code != 0)
        .collect();
    for (at, rule) in policy.rules.iter().enumerate() {
        let by_code = rule.on_exit_codes.as_ref().and_then(|codes| {
            let named = |c: &&(String, i32)| codes.container_name.as_ref().is_none_or(|n| *n == c.0);
            let listed = |c: &&(String, i32)| codes.values.contains(&c.1) == (codes.operator == "In");
            let (container, code) = containers.iter().filter(named).find(listed)?;
            Some(format!("Container {container} for pod {namespace}/{name} failed with exit code {code}"))
        });
        let by_condition = || {
            let patterns = rule.on_pod_conditions.as_deref().unwrap_or_default();
            let conditions = status.conditions.as_deref().unwrap_or_default();
            let wanted = |p: &&k8s_openapi::api::batch::v1::PodFailurePolicyOnPodConditionsPattern| {
                let status = p.status.as_deref().unwrap_or("True");
                conditions.iter().any(|c| c.type_ == p.type_ && c.status == status)
            };
            let pattern = patterns.iter().find(wanted)?;
            Some(format!("Pod {namespace}/{name} has condition {}", pattern.type_))
        };
        let Some(why) = by_code.or_else(by_condition) else { continue };
        return match rule.action.as_str() {
            "Ignore" => Verdict::Ignore,
            "FailIndex" => Verdict::FailIndex,
            "FailJob" => Verdict::FailJob(format!("{why} matching FailJob rule at index {at}")),
            _ => Verdict::Count,
        };
    }
    Verdict::Count
}

fn condition(kind: &str, status: &str, reason: &str, message: &str, now: Timestamp) -> JobCondition {
    JobCondition {
        type_: kind.into(),
        status: status.into(),
        reason: Some(reason.into()),
        message: Some(message.into()),
        last_probe_time: Some(Time(now)),
        last_transition_time: Some(Time(now)),
    }
}

fn find<'a>(status: &'a JobStatus, kind: &str) -> Option<&'a JobCondition> {
    status.conditions.iter().flatten().find(|c| c.type_ == kind)
}

fn is_true(status: &JobStatus, kind: &str) -> bool {
    find(status, kind).is_some_and(|c| c.status == "True")
}

/// How a Job ended and when: `Complete` or `Failed`.
pub fn finished(status: &JobStatus) -> Option<(&JobCondition, Option<Timestamp>)> {
    let ended = status
        .conditions
        .iter()
        .flatten()
        .find(|c| matches!(c.type_.as_str(), "Complete" | "Failed") && c.status == "True");
    ended.map(|c| (c, c.last_transition_time.as_ref().map(|t| t.0)))
}

/// Decides one step. `pods` are those that the Job controls; `now` has whole seconds in what is written.
pub fn plan(job: &Job, pods: &[Arc<Pod>], now: Timestamp) -> Plan {
    let spec = job.spec.clone().unwrap_or_default();
    let mut plan = Plan { status: job.status.clone().unwrap_or_default(), ..Default::default() };
    let second = Timestamp::from_second(now.as_second()).unwrap_or(now);
    let tracked = || pods.iter().filter(|p| is_tracked(p)).cloned();
    let since = |at: Timestamp| Duration::try_from(now.duration_since(at)).unwrap_or_default();
    if job.metadata.deletion_timestamp.is_some() {
        plan.untrack = tracked().collect();
        return plan;
    }
    if let Some((_, at)) = finished(&plan.status) {
        plan.untrack = tracked().collect();
        if let (Some(ttl), Some(at)) = (spec.ttl_seconds_after_finished, at) {
            let ttl = Duration::from_secs(u64::try_from(ttl).unwrap_or(0));
            match ttl.checked_sub(since(at)).filter(|left| !left.is_zero()) {
                Some(left) => plan.look_again(left),
                None => plan.expired = true,
            }
        }
        return plan;
    }
    let suspended = spec.suspend == Some(true);
    let indexed = is_indexed(&spec);
    let completions = spec.completions;
    let most = completions.unwrap_or(i32::MAX);
    if plan.status.start_time.is_none() && !suspended {
        plan.status.start_time = Some(Time(second));
    }
    // Count what has been noted and is free of the finalizer, or gone.
    let mut uncounted = plan.status.uncounted_terminated_pods.take().unwrap_or_default();
    let held: BTreeSet<&str> =
        pods.iter().filter(|p| is_tracked(p)).filter_map(|p| p.metadata.uid.as_deref()).collect();
    let settle = |noted: &mut Option<Vec<String>>, count: &mut Option<i32>| {
        let noted = noted.get_or_insert_default();
        let before = noted.len();
        noted.retain(|uid| held.contains(uid.as_str()));
        let counted = i32::try_from(before - noted.len()).unwrap_or(i32::MAX);
        if counted > 0 {
            *count = Some(count.unwrap_or(0) + counted);
        }
    };
    settle(&mut uncounted.succeeded, &mut plan.status.succeeded);
    settle(&mut uncounted.failed, &mut plan.status.failed);
    // Note what has ended since.
    let mut completed = Indexes::parse(plan.status.completed_indexes.as_deref().unwrap_or_default(), most);
    let mut lost = Indexes::parse(plan.status.failed_indexes.as_deref().unwrap_or_default(), most);
    let mut verdict: Option<String> = None;
    for pod in pods.iter().filter(|p| is_tracked(p)) {
        let Some(uid) = pod.metadata.uid.clone() else { continue };
        let noted = |list: &Option<Vec<String>>| list.iter().flatten().any(|u| *u == uid);
        if pods::phase(pod) == "Succeeded" && !noted(&uncounted.failed) {
            if !indexed {
                if !noted(&uncounted.succeeded) {
                    uncounted.succeeded.get_or_insert_default().push(uid);
                }
            } else if let Some(index) = index_of(pod).filter(|i| (0..most).contains(i)) {
                // The index itself keeps it from being counted twice.
                completed.0.insert(index);
            }
            plan.untrack.push(pod.clone());
        } else if has_failed(&spec, pod) {
            let judged = judge(&spec, pod);
            if judged != Verdict::Ignore && !noted(&uncounted.failed) {
                uncounted.failed.get_or_insert_default().push(uid);
            }
            if let (Some(limit), Some(index)) = (spec.backoff_limit_per_index, index_of(pod))
                && judged != Verdict::Ignore
                && (judged == Verdict::FailIndex || failures_of(pod) >= limit)
            {
                lost.0.insert(index);
            }
            if let Verdict::FailJob(why) = judged {
                verdict = verdict.or(Some(why));
            }
            plan.untrack.push(pod.clone());
        }
    }
    lost.0.retain(|i| !completed.0.contains(i));
    let length = |list: &Option<Vec<String>>| i32::try_from(list.as_ref().map_or(0, Vec::len)).unwrap_or(i32::MAX);
    if indexed {
        plan.status.succeeded = Some(i32::try_from(completed.0.len()).unwrap_or(i32::MAX)).filter(|n| *n != 0);
    }
    let succeeded = plan.status.succeeded.unwrap_or(0) + if indexed { 0 } else { length(&uncounted.succeeded) };
    let failed = plan.status.failed.unwrap_or(0) + length(&uncounted.failed);
    let mut active: Vec<Arc<Pod>> = pods.iter().filter(|p| pods::is_active(p)).cloned().collect();
    let ending = pods.iter().filter(|p| pods::is_terminating(p) && !pods::is_finished(p)).count();

    let conditions = plan.status.conditions.get_or_insert_default();
    let has =
        |conditions: &[JobCondition], kind: &str| conditions.iter().any(|c| c.type_ == kind && c.status == "True");
    if !has(conditions, "FailureTarget") && !has(conditions, "SuccessCriteriaMet") {
        let limit = spec.backoff_limit.unwrap_or(if spec.backoff_limit_per_index.is_some() { i32::MAX } else { 6 });
        let restarts = || -> i32 {
            let statuses = active
                .iter()
                .filter_map(|p| p.status.as_ref())
                .flat_map(|s| s.init_container_statuses.iter().flatten().chain(s.container_statuses.iter().flatten()));
            statuses.map(|c| c.restart_count).sum()
        };
        let restarting = spec.template.spec.as_ref().and_then(|s| s.restart_policy.as_deref()) == Some("OnFailure");
        let too_often = restarting && if limit == 0 { restarts() > 0 } else { restarts() >= limit };
        let deadline = spec.active_deadline_seconds.filter(|_| !suspended).and_then(|allowed| {
            let started = plan.status.start_time.as_ref()?.0;
            Some(Duration::from_secs(u64::try_from(allowed).unwrap_or(0)).saturating_sub(since(started)))
        });
        let in_all = i32::try_from(lost.0.len()).unwrap_or(i32::MAX);
        let failure = if let Some(why) = verdict {
            Some(("PodFailurePolicy", why))
        } else if failed > limit || too_often {
            Some(("BackoffLimitExceeded", "Job has reached the specified backoff limit".to_string()))
        } else if deadline.is_some_and(|left| left.is_zero()) {
            Some(("DeadlineExceeded", "Job was active longer than specified deadline".to_string()))
        } else if spec.max_failed_indexes.is_some_and(|most| in_all > most) {
            let text = "Job has exceeded the specified maximal number of failed indexes";
            Some(("MaxFailedIndexesExceeded", text.to_string()))
        } else if in_all > 0 && completions.is_some_and(|c| succeeded + in_all >= c) {
            Some(("FailedIndexes", "Job has failed indexes".to_string()))
        } else {
            None
        };
        let success = || {
            if let Some(at) = spec.success_policy.as_ref().and_then(|policy| {
                policy.rules.iter().position(|rule| {
                    let wanted = rule.succeeded_indexes.as_deref().map(|text| Indexes::parse(text, most));
                    let reached = match &wanted {
                        Some(wanted) => completed.0.intersection(&wanted.0).count(),
                        None => completed.0.len(),
                    };
                    let needed = rule.succeeded_count.and_then(|n| usize::try_from(n).ok());
                    reached >= needed.or(wanted.map(|w| w.0.len())).unwrap_or(usize::MAX)
                })
            }) {
                return Some(("SuccessPolicy", format!("Matched rules at index {at}")));
            }
            let enough = match completions {
                Some(wanted) => succeeded >= wanted,
                None => succeeded > 0 && active.is_empty(),
            };
            enough.then(|| ("CompletionsReached", "Reached expected number of succeeded pods".to_string()))
        };
        if let Some((reason, text)) = failure {
            conditions.push(condition("FailureTarget", "True", reason, &text, second));
        } else if let Some((reason, text)) = success().filter(|_| !suspended) {
            conditions.push(condition("SuccessCriteriaMet", "True", reason, &text, second));
        } else {
            if let Some(left) = deadline {
                plan.look_again(left);
            }
        }
    }
    let conditions = plan.status.conditions.get_or_insert_default();
    let ending_job = has(conditions, "FailureTarget") || has(conditions, "SuccessCriteriaMet");
    if !ending_job {
        let before = conditions.iter().position(|c| c.type_ == "Suspended");
        let was = before.is_some_and(|at| conditions[at].status == "True");
        let wanted = match (suspended, was) {
            (true, false) => Some(condition("Suspended", "True", "JobSuspended", "Job suspended", second)),
            (false, true) => Some(condition("Suspended", "False", "JobResumed", "Job resumed", second)),
            _ => None,
        };
        if let Some(wanted) = wanted {
            match before {
                Some(at) => conditions[at] = wanted,
                None => conditions.push(wanted),
            }
            if !suspended {
                plan.status.start_time = Some(Time(second));
            }
        }
    }
    if ending_job || suspended {
        plan.delete = std::mem::take(&mut active);
    } else {
        manage(&mut plan, &spec, pods, &active, ending, succeeded, &completed, &lost, now);
        active.retain(|p| !plan.delete.iter().any(|d| Arc::ptr_eq(d, p)));
    }
    // The end is told when nothing of the Job is left to be counted or to stop.
    let quiet = plan.delete.is_empty() && plan.untrack.is_empty() && active.is_empty() && ending == 0;
    let conditions = plan.status.conditions.get_or_insert_default();
    if ending_job && quiet && length(&uncounted.succeeded) + length(&uncounted.failed) == 0 {
        let interim = conditions.iter().find(|c| matches!(c.type_.as_str(), "FailureTarget" | "SuccessCriteriaMet"));
        if let Some(interim) = interim.cloned() {
            let kind = if interim.type_ == "FailureTarget" { "Failed" } else { "Complete" };
            let (reason, text) = (interim.reason.unwrap_or_default(), interim.message.unwrap_or_default());
            conditions.push(condition(kind, "True", &reason, &text, second));
            if kind == "Complete" {
                plan.status.completion_time = Some(Time(second));
            }
        }
    }
    if plan.status.conditions.as_ref().is_some_and(Vec::is_empty) {
        plan.status.conditions = None;
    }
    let count = |n: usize| i32::try_from(n).unwrap_or(i32::MAX);
    plan.status.active = Some(count(active.len())).filter(|n| *n != 0);
    plan.status.ready = Some(count(active.iter().filter(|p| pods::is_ready(p)).count()));
    plan.status.terminating = Some(count(ending));
    if indexed {
        plan.status.completed_indexes = Some(completed.format()).filter(|t| !t.is_empty());
        if spec.backoff_limit_per_index.is_some() {
            plan.status.failed_indexes = Some(lost.format());
        }
    }
    uncounted.succeeded = uncounted.succeeded.filter(|l| !l.is_empty());
    uncounted.failed = uncounted.failed.filter(|l| !l.is_empty());
    plan.status.uncounted_terminated_pods = Some(uncounted);
    plan
}

/// Failures of a pod's index before it.
fn failures_of(pod: &Pod) -> i32 {
    pod.metadata.annotations.as_ref().and_then(|a| a.get(INDEX_FAILURES)).and_then(|n| n.parse().ok()).unwrap_or(0)
}

/// What is left to wait after the failures among `pods` since the last success.
fn backoff<'a>(spec: &JobSpec, pods: impl Iterator<Item = &'a Arc<Pod>> + Clone, now: Timestamp) -> Option<Duration> {
    let success = pods.clone().filter(|p| pods::phase(p) == "Succeeded").filter_map(|p| ended(p)).max();
    let failures: Vec<Timestamp> = pods
        .filter(|p| pods::phase(p) == "Failed" && judge(spec, p) != Verdict::Ignore)
        .filter_map(|p| ended(p))
        .filter(|at| success.is_none_or(|s| *at > s))
        .collect();
    let last = failures.iter().max()?;
    let doublings = u32::try_from(failures.len() - 1).unwrap_or(u32::MAX);
    let pause = FIRST_BACKOFF.saturating_mul(2u32.checked_pow(doublings).unwrap_or(u32::MAX)).min(LONGEST_BACKOFF);
    let passed = Duration::try_from(now.duration_since(*last)).unwrap_or_default();
    pause.checked_sub(passed).filter(|left| !left.is_zero())
}

/// Chooses the pods to make and to delete of a Job that runs.
#[allow(clippy::too_many_arguments)]
fn manage(
    plan: &mut Plan,
    spec: &JobSpec,
    pods: &[Arc<Pod>],
    active: &[Arc<Pod>],
    ending: usize,
    succeeded: i32,
    completed: &Indexes,
    lost: &Indexes,
    now: Timestamp,
) {
    let parallelism = usize::try_from(spec.parallelism.unwrap_or(1)).unwrap_or(0);
    let indexed = is_indexed(spec);
    let per_index = spec.backoff_limit_per_index.is_some();
    let mut keep: Vec<Arc<Pod>> = active.to_vec();
    if indexed {
        // The oldest pod of an index stays; those of indexes that are done, or beyond the end, go.
        keep.sort_by_key(|p| (p.metadata.creation_timestamp.as_ref().map(|t| t.0), p.metadata.name.clone()));
        let mut seen = BTreeSet::new();
        let most = spec.completions.unwrap_or(i32::MAX);
        let (stay, go) = keep.into_iter().partition(|p| {
            index_of(p).is_some_and(|i| i < most && !completed.0.contains(&i) && !lost.0.contains(&i) && seen.insert(i))
        });
        keep = stay;
        plan.delete = go;
    }
    let wanted = match spec.completions {
        None if succeeded > 0 => keep.len(),
        None => parallelism,
        Some(all) => {
            let done = usize::try_from(succeeded).unwrap_or(0) + lost.0.len();
            parallelism.min(usize::try_from(all).unwrap_or(0).saturating_sub(done))
        }
    };
    if keep.len() > wanted {
        keep.sort_by(|a, b| pods::deletion_order(a, b, &BTreeMap::new(), now));
        plan.delete.extend(keep.drain(..keep.len() - wanted));
        return;
    }
    let mut missing = wanted - keep.len();
    if waits_for_end(spec) {
        missing = missing.saturating_sub(ending);
    }
    missing = missing.min(BURST);
    if missing == 0 {
        return;
    }
    if !per_index && let Some(left) = backoff(spec, pods.iter(), now) {
        plan.look_again(left);
        return;
    }
    if !indexed {
        plan.create = vec![None; missing];
        return;
    }
    let occupied: BTreeSet<i32> = (keep.iter())
        .chain(pods.iter().filter(|p| waits_for_end(spec) && pods::is_terminating(p) && !pods::is_finished(p)))
        .filter_map(|p| index_of(p))
        .collect();
    for index in 0..spec.completions.unwrap_or(0) {
        if plan.create.len() == missing {
            break;
        }
        if completed.0.contains(&index) || lost.0.contains(&index) || occupied.contains(&index) {
            continue;
        }
        let of_index = pods.iter().filter(|p| index_of(p) == Some(index));
        if per_index && let Some(left) = backoff(spec, of_index.clone(), now) {
            plan.look_again(left);
            continue;
        }
        let failed = of_index.filter(|p| has_failed(spec, p));
        let failures = failed.map(|p| failures_of(p) + i32::from(judge(spec, p) != Verdict::Ignore)).max().unwrap_or(0);
        plan.create.push(Some((index, failures)));
    }
}

/// A pod of a Job; `index` with the failures of that index so far, of an Indexed Job.
pub fn make_pod(job: &Job, index: Option<(i32, i32)>) -> Pod {
    let spec = job.spec.clone().unwrap_or_default();
    let mut pod = pods::from_template(&spec.template, job.metadata.namespace.as_deref(), controller_reference(job));
    pod.metadata.finalizers.get_or_insert_default().push(TRACKING.into());
    let name = job.metadata.name.clone().unwrap_or_default();
    let Some((index, failures)) = index else {
        pod.metadata.generate_name = Some(format!("{name}-"));
        return pod;
    };
    // Room for the five letters that the API server adds to 58 octets.
    let suffix = format!("-{index}-");
    let base: String = name.chars().take(58 - suffix.len()).collect();
    pod.metadata.generate_name = Some(base + &suffix);
    let annotations = pod.metadata.annotations.get_or_insert_default();
    annotations.insert(INDEX.into(), index.to_string());
    if spec.backoff_limit_per_index.is_some() {
        annotations.insert(INDEX_FAILURES.into(), failures.to_string());
    }
    pod.metadata.labels.get_or_insert_default().insert(INDEX.into(), index.to_string());
    let pod_spec = pod.spec.get_or_insert_default();
    pod_spec.hostname = Some(format!("{name}-{index}"));
    const VARIABLE: &str = "JOB_COMPLETION_INDEX";
    for container in pod_spec.init_containers.iter_mut().flatten().chain(&mut pod_spec.containers) {
        let env = container.env.get_or_insert_default();
        if env.iter().all(|e| e.name != VARIABLE) {
            env.push(EnvVar {
                name: VARIABLE.into(),
                value: None,
                value_from: Some(EnvVarSource {
                    field_ref: Some(ObjectFieldSelector {
                        api_version: None,
                        field_path: format!("metadata.labels['{INDEX}']"),
                    }),
                    ..Default::default()
                }),
            });
        }
    }
    pod
}

/// Registers with the caches and returns the future that works.
pub(crate) fn start(context: Context) -> impl Future<Output = ()> + Send + 'static {
    let queue: Queue<Key> = context.queue("job");
    let orphans: Queue<Key> = context.queue("job_orphan_pod");
    let (add, add_orphan) = (queue.clone(), orphans.clone());
    let pods = context.caches.pods.clone();
    context.caches.jobs.on_change(move |old, new| {
        if let Some(job) = new.or(old) {
            add.add(Key::of(&**job));
        }
        if let (Some(uid), None) = (old.and_then(|j| j.metadata.uid.as_deref()), new) {
            for pod in pods.controlled_by(uid).iter().filter(|p| is_tracked(p)) {
                add_orphan.add(Key::of(&**pod));
            }
        }
    });
    let (add, add_orphan) = (queue.clone(), orphans.clone());
    let jobs = context.caches.jobs.clone();
    context.caches.pods.on_change(move |old, new| {
        for pod in [old, new].into_iter().flatten() {
            crate::replicaset::wake_owner(pod, "Job", &jobs, &add, |job| job.spec.as_ref()?.selector.as_ref());
        }
        if let Some(pod) = new.filter(|p| is_tracked(p))
            && job_of(&jobs, pod).is_none()
        {
            add_orphan.add(Key::of(&**pod));
        }
    });
    async move {
        let events = context.recorder("job-controller");
        let stop = context.shutdown.clone();
        let free = {
            let context = context.clone();
            move |key| free_orphan(context.clone(), key)
        };
        let syncs = queue.work(WORKERS, stop.clone(), move |key| sync(context.clone(), events.clone(), key));
        tokio::join!(syncs, orphans.work(1, stop, free));
    }
}

/// The Job that controls a pod, if it exists.
fn job_of(jobs: &crate::cache::Informer<Job>, pod: &Pod) -> Option<Arc<Job>> {
    let owner = controller_of(pod).filter(|o| o.kind == "Job")?;
    let job = jobs.get(pod.metadata.namespace.as_deref().unwrap_or_default(), &owner.name)?;
    (job.metadata.uid.as_deref() == Some(owner.uid.as_str())).then_some(job)
}

/// Takes the finalizer from a pod that no Job counts any more.
async fn free_orphan(context: Context, key: Key) -> anyhow::Result<Next> {
    let Some(pod) = context.caches.pods.get(&key.namespace, &key.name).filter(|p| is_tracked(p)) else {
        return Ok(Next::Wait);
    };
    if job_of(&context.caches.jobs, &pod).is_some() {
        return Ok(Next::Wait);
    }
    if let Some(owner) = controller_of(&*pod).filter(|o| o.kind == "Job") {
        // The caches of two kinds are not in step: another process may have made the Job and the pod a moment ago.
        let jobs: Api<Job> = Api::namespaced(context.client.clone(), &key.namespace);
        let live = jobs.get_metadata_opt(&owner.name).await.context("cannot look for the job of a pod")?;
        if live.is_some_and(|job| job.metadata.uid.as_deref() == Some(owner.uid.as_str())) {
            return Ok(Next::After(ORPHAN_RECHECK));
        }
    }
    let api: Api<Pod> = Api::namespaced(context.client.clone(), &key.namespace);
    untrack(&context, &api, &pod).await?;
    Ok(Next::Wait)
}

async fn untrack(context: &Context, api: &Api<Pod>, pod: &Pod) -> anyhow::Result<()> {
    let patch = json!({"metadata": {"uid": pod.metadata.uid, "$deleteFromPrimitiveList/finalizers": [TRACKING]}});
    let name = pod.metadata.name.as_deref().unwrap_or_default();
    match api.patch(name, &PatchParams::default(), &Patch::Strategic(patch)).await {
        Ok(written) => {
            let last = written.metadata.finalizers.as_ref().is_none_or(Vec::is_empty);
            let gone = written.metadata.deletion_timestamp.is_some()
                && written.metadata.deletion_grace_period_seconds == Some(0)
                && last;
            if gone {
                context.caches.pods.deleted(pod)
            } else {
                context.caches.pods.wrote(written)
            }
            Ok(())
        }
        Err(error) if is_not_found(&error) || is_replaced(&error) => {
            context.caches.pods.deleted(pod);
            Ok(())
        }
        Err(error) => Err(error).with_context(|| format!("cannot take the finalizer from pod {name}")),
    }
}

async fn sync(context: Context, events: EventRecorder, key: Key) -> anyhow::Result<Next> {
    let caches = &context.caches;
    let Some(job) = caches.jobs.get(&key.namespace, &key.name) else { return Ok(Next::Wait) };
    let spec = job.spec.clone().unwrap_or_default();
    if spec.managed_by.as_deref().is_some_and(|by| by != MANAGER) {
        return Ok(Next::Wait);
    }
    let uid = job.metadata.uid.as_deref();
    let pod_api: Api<Pod> = Api::namespaced(context.client.clone(), &key.namespace);
    let job_api: Api<Job> = Api::namespaced(context.client.clone(), &key.namespace);
    if let Some(selector) = &spec.selector {
        let candidates = caches.pods.claimable(&key.namespace, uid, selector);
        let claim = pods::claim(&job.metadata, selector, candidates, |_| {
            finished(&job.status.clone().unwrap_or_default()).is_none()
        });
        if !claim.adopt.is_empty() && !may_adopt(&job_api, &job).await? {
            return Ok(Next::Wait);
        }
        for pod in &claim.adopt {
            let patch = json!({"metadata": {"uid": pod.metadata.uid, "finalizers": [TRACKING],
                "ownerReferences": [controller_reference(&*job)]}});
            let name = pod.metadata.name.as_deref().unwrap_or_default();
            match pod_api.patch(name, &PatchParams::default(), &Patch::Strategic(patch)).await {
                Ok(written) => caches.pods.wrote(written),
                Err(error) if is_not_found(&error) || is_replaced(&error) => caches.pods.deleted(pod),
                Err(error) => return Err(error).with_context(|| format!("cannot adopt {name}")),
            }
        }
        for pod in &claim.release {
            release(&pod_api, &caches.pods, uid, pod).await?;
        }
    }
    let own = || uid.map(|uid| caches.pods.controlled_by(uid)).unwrap_or_default();
    // One time for both plans: what is due in the second and not in the first would be forgotten.
    let now = context.clock.now();
    let first = plan(&job, &own(), now);
    if first.expired {
        let preconditions = Preconditions { uid: job.metadata.uid.clone(), ..Default::default() };
        return match job_api.delete(&key.name, &DeleteParams::foreground().preconditions(preconditions)).await {
            Ok(_) => Ok(Next::Wait),
            Err(error) if is_not_found(&error) || is_conflict(&error) => Ok(Next::Wait),
            Err(error) => Err(error).context("cannot delete the finished job"),
        };
    }
    let mut failure = None;
    let params = PostParams::default();
    // Batches of 1, 2, 4: a template that the API server refuses is refused once.
    let (mut rest, mut batch) = (first.create.as_slice(), 1);
    while !rest.is_empty() && failure.is_none() {
        let (now, later) = rest.split_at(batch.min(rest.len()));
        let made: Vec<Pod> = now.iter().map(|index| make_pod(&job, *index)).collect();
        for result in futures::future::join_all(made.iter().map(|pod| pod_api.create(&params, pod))).await {
            match result {
                Ok(pod) => {
                    let text = format!("Created pod: {}", pod.metadata.name.as_deref().unwrap_or_default());
                    caches.pods.wrote(pod);
                    events.event(&reference(&*job), EventType::Normal, "SuccessfulCreate", text);
                }
                Err(error) if is_namespace_terminating(&error) => return Ok(Next::Wait),
                Err(error) => {
                    let text = format!("Error creating: {}", message(&error));
                    events.event(&reference(&*job), EventType::Warning, "FailedCreate", text);
                    failure = Some(error);
                }
            }
        }
        rest = later;
        batch *= 2;
    }
    for pod in &first.delete {
        if let Err(error) = delete_pod(&pod_api, &caches.pods, &events, &*job, pod).await {
            failure = Some(error);
        }
    }
    // The status describes the pods as they are after this sync's writes.
    let after = plan(&job, &own(), now);
    let before = job.status.clone().unwrap_or_default();
    if job.metadata.deletion_timestamp.is_none() && before != after.status {
        let mut updated = Job::clone(&job);
        updated.status = Some(after.status.clone());
        match job_api.replace_status(&key.name, &params, &updated).await {
            Ok(written) => {
                caches.jobs.wrote(written);
                tell(&events, &job, &before, &after.status);
            }
            Err(error) if is_not_found(&error) => return Ok(Next::Wait),
            Err(error) => return Err(error).context("cannot update the status"),
        }
    }
    for pod in &after.untrack {
        untrack(&context, &pod_api, pod).await?;
    }
    match failure {
        Some(error) => Err(error.into()),
        None => Ok(after.recheck.map_or(Next::Wait, Next::After)),
    }
}

/// Events about conditions that have changed.
fn tell(events: &EventRecorder, job: &Job, before: &JobStatus, after: &JobStatus) {
    let about = reference(job);
    if is_true(before, "Suspended") != is_true(after, "Suspended") {
        let (reason, text) =
            if is_true(after, "Suspended") { ("Suspended", "Job suspended") } else { ("Resumed", "Job resumed") };
        events.event(&about, EventType::Normal, reason, text);
    }
    if let (None, Some((ended, _))) = (finished(before), finished(after)) {
        if ended.type_ == "Complete" {
            events.event(&about, EventType::Normal, "Completed", "Job completed");
        } else {
            let reason = ended.reason.clone().unwrap_or_default();
            events.event(&about, EventType::Warning, &reason, ended.message.clone().unwrap_or_default());
        }
    }
}

#[cfg(test)]
mod tests;
