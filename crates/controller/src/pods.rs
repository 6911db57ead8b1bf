//! What all workload controllers know about pods: making them from templates, judging them, choosing which to delete.

use std::cmp::Ordering;
use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;

use jiff::Timestamp;
use k8s_openapi::api::core::v1::{Pod, PodTemplateSpec};
use k8s_openapi::apimachinery::pkg::apis::meta::v1::{LabelSelector, ObjectMeta, OwnerReference};
use k8s_openapi::apimachinery::pkg::util::intstr::IntOrString;
use kube::Resource;

use crate::selector;
use crate::util::controller_of;

/// A pod as the template says, without a name.
pub fn from_template(template: &PodTemplateSpec, namespace: Option<&str>, owner: OwnerReference) -> Pod {
    let meta = template.metadata.clone().unwrap_or_default();
    Pod {
        metadata: ObjectMeta {
            namespace: namespace.map(str::to_string),
            labels: meta.labels,
            annotations: meta.annotations,
            finalizers: meta.finalizers,
            owner_references: Some(vec![owner]),
            ..Default::default()
        },
        spec: template.spec.clone(),
        status: None,
    }
}

/// The phase, empty when the pod has no status yet.
pub fn phase(pod: &Pod) -> &str {
    pod.status.as_ref().and_then(|s| s.phase.as_deref()).unwrap_or_default()
}

/// Whether the pod has ended for good.
pub fn is_finished(pod: &Pod) -> bool {
    matches!(phase(pod), "Succeeded" | "Failed")
}

/// Whether the pod is being deleted.
pub fn is_terminating(pod: &Pod) -> bool {
    pod.metadata.deletion_timestamp.is_some()
}

/// Neither finished nor being deleted: counts as a replica.
pub fn is_active(pod: &Pod) -> bool {
    !is_finished(pod) && !is_terminating(pod)
}

/// Since when the pod has been ready, if it is.
pub fn ready_since(pod: &Pod) -> Option<Timestamp> {
    let conditions = pod.status.as_ref()?.conditions.as_ref()?;
    let ready = conditions.iter().find(|c| c.type_ == "Ready" && c.status == "True")?;
    Some(ready.last_transition_time.as_ref().map_or(Timestamp::UNIX_EPOCH, |t| t.0))
}

/// Whether the Ready condition is True.
pub fn is_ready(pod: &Pod) -> bool {
    ready_since(pod).is_some()
}

/// Whether a pod has been ready for long enough.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Availability {
    /// Ready for `minReadySeconds`.
    Available,
    /// Ready, and available after this long.
    In(Duration),
    /// Not ready.
    No,
}

/// Judges a pod by `minReadySeconds`.
pub fn availability(pod: &Pod, min_ready_seconds: i32, now: Timestamp) -> Availability {
    let Some(since) = ready_since(pod) else { return Availability::No };
    let wanted = Duration::from_secs(u64::try_from(min_ready_seconds).unwrap_or(0));
    // Ready since nobody knows when: not for long enough, as upstream has it.
    if since == Timestamp::UNIX_EPOCH && !wanted.is_zero() {
        return Availability::No;
    }
    let for_long = Duration::try_from(now.duration_since(since)).unwrap_or_default();
    match wanted.checked_sub(for_long) {
        None | Some(Duration::ZERO) => Availability::Available,
        // The API keeps whole seconds; a little more than the difference avoids a second look.
        Some(rest) => Availability::In(rest + Duration::from_millis(5)),
    }
}

/// An object that a controller may own by selector: pods, or ReplicaSets of a Deployment.
#[derive(Debug)]
pub struct Claim<K> {
    /// Owned and matching.
    pub owned: Vec<Arc<K>>,
    /// Matching and without controller: to be adopted.
    pub adopt: Vec<Arc<K>>,
    /// Owned, but no longer matching: to be released.
    pub release: Vec<Arc<K>>,
}

/// Sorts objects by their relation to the owner (ControllerRef, KEP-3, and its rules of adoption). Nothing is adopted or
/// released while the owner or the object is being deleted.
pub fn claim<K: Resource<DynamicType = ()>>(
    owner: &ObjectMeta,
    selector: &LabelSelector,
    objects: impl IntoIterator<Item = Arc<K>>,
    adoptable: impl Fn(&K) -> bool,
) -> Claim<K> {
    let mut claim = Claim { owned: Vec::new(), adopt: Vec::new(), release: Vec::new() };
    for object in objects {
        let matches = selector::matches(selector, object.meta().labels.as_ref());
        match controller_of(&*object) {
            Some(controller) if Some(&controller.uid) == owner.uid.as_ref() => {
                if matches {
                    claim.owned.push(object);
                } else if owner.deletion_timestamp.is_none() {
                    claim.release.push(object);
                }
            }
            Some(_) => {}
            None => {
                let free = owner.deletion_timestamp.is_none() && object.meta().deletion_timestamp.is_none();
                if matches && free && adoptable(&object) {
                    claim.adopt.push(object);
                }
            }
        }
    }
    claim
}

/// The annotation by which users say which pod is cheap to lose (KEP-2255).
const DELETION_COST: &str = "controller.kubernetes.io/pod-deletion-cost";

/// Which of two pods goes first when there are too many: the one that is `Less`. `neighbours` counts, by node, the pods of the
/// same workload, so that a crowded node loses one first. Order of the criteria as in Kubernetes' ReplicaSet controller.
pub fn deletion_order(a: &Pod, b: &Pod, neighbours: &BTreeMap<String, usize>, now: Timestamp) -> Ordering {
    let node = |p: &Pod| p.spec.as_ref().and_then(|s| s.node_name.clone()).filter(|n| !n.is_empty());
    let stage = |p: &Pod| match phase(p) {
        "Pending" | "" => 0,
        "Unknown" => 1,
        _ => 2,
    };
    let cost = |p: &Pod| -> i64 {
        p.metadata
            .annotations
            .as_ref()
            .and_then(|a| a.get(DELETION_COST))
            .and_then(|c| c.parse::<i32>().ok())
            .unwrap_or(0)
            .into()
    };
    let crowd = |p: &Pod| node(p).and_then(|n| neighbours.get(&n)).copied().unwrap_or(0);
    // Ages compare by order of magnitude, so that choice is spread over pods of about the same age (KEP-2185).
    let magnitude = |at: Option<Timestamp>| match at {
        Some(at) => u64::try_from(now.duration_since(at).as_secs()).unwrap_or(0).checked_ilog2().map_or(0, |l| l + 1),
        None => 0,
    };
    let restarts = |p: &Pod| {
        let statuses = p.status.as_ref().and_then(|s| s.container_statuses.as_deref()).unwrap_or_default();
        statuses.iter().map(|s| s.restart_count).max().unwrap_or(0)
    };
    let created = |p: &Pod| p.metadata.creation_timestamp.as_ref().map(|t| t.0);
    node(a)
        .is_some()
        .cmp(&node(b).is_some())
        .then_with(|| stage(a).cmp(&stage(b)))
        .then_with(|| is_ready(a).cmp(&is_ready(b)))
        .then_with(|| cost(a).cmp(&cost(b)))
        .then_with(|| crowd(b).cmp(&crowd(a)))
        .then_with(|| magnitude(ready_since(a)).cmp(&magnitude(ready_since(b))))
        .then_with(|| restarts(b).cmp(&restarts(a)))
        .then_with(|| magnitude(created(a)).cmp(&magnitude(created(b))))
        .then_with(|| a.metadata.uid.cmp(&b.metadata.uid))
}

/// Resolves a count or a percentage of `total`. `None` for what is neither; validation keeps such values out.
pub fn resolve_int_or_percent(value: &IntOrString, total: i32, round_up: bool) -> Option<i32> {
    match value {
        IntOrString::Int(count) => Some(*count),
        IntOrString::String(text) => {
            let percent: i64 = text.strip_suffix('%')?.parse().ok()?;
            let product = percent * i64::from(total);
            let resolved = if round_up { (product + 99).div_euclid(100) } else { product.div_euclid(100) };
            i32::try_from(resolved).ok()
        }
    }
}

/// The alphabet of generated names: no vowels, so no words.
const SAFE: &[u8; 27] = b"bcdfghjklmnpqrstvwxz2456789";

/// A short name for a pod template: an FNV-1a hash of its JSON and of the number of collisions seen, in safe letters.
pub fn template_hash(template: &PodTemplateSpec, collisions: Option<i32>) -> String {
    let json = serde_json::to_vec(template).expect("a pod template is plain data");
    let mut hash: u32 = 0x811c_9dc5;
    let salt = collisions.map(i32::to_le_bytes);
    for byte in json.iter().chain(salt.iter().flatten()) {
        hash = (hash ^ u32::from(*byte)).wrapping_mul(0x0100_0193);
    }
    hash.to_string().bytes().map(|digit| char::from(SAFE[usize::from(digit) % SAFE.len()])).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use k8s_openapi::api::core::v1::{PodCondition, PodSpec, PodStatus};
    use k8s_openapi::apimachinery::pkg::apis::meta::v1::Time;

    fn pod(name: &str, node: Option<&str>, phase: &str, ready: Option<i64>) -> Pod {
        Pod {
            metadata: ObjectMeta { name: Some(name.into()), uid: Some(name.into()), ..Default::default() },
            spec: Some(PodSpec { node_name: node.map(str::to_string), ..Default::default() }),
            status: Some(PodStatus {
                phase: Some(phase.into()),
                conditions: ready.map(|at| {
                    vec![PodCondition {
                        type_: "Ready".into(),
                        status: "True".into(),
                        last_transition_time: Some(Time(Timestamp::from_second(at).unwrap())),
                        ..Default::default()
                    }]
                }),
                ..Default::default()
            }),
        }
    }

    #[test]
    fn excess_pods_go_in_upstream_order() {
        let mut cheap = pod("cheap", Some("n1"), "Running", Some(100));
        cheap.metadata.annotations = Some(BTreeMap::from([(DELETION_COST.to_string(), "-1".to_string())]));
        let mut pods = [
            pod("old", Some("n1"), "Running", Some(100)),
            pod("crowded", Some("n2"), "Running", Some(100)),
            pod("young", Some("n1"), "Running", Some(90_000)),
            cheap,
            pod("unready", Some("n1"), "Running", None),
            pod("pending", Some("n1"), "Pending", None),
            pod("unassigned", None, "Pending", None),
        ];
        let neighbours = BTreeMap::from([("n1".to_string(), 1), ("n2".to_string(), 3)]);
        let now = Timestamp::from_second(100_000).unwrap();
        pods.sort_by(|a, b| deletion_order(a, b, &neighbours, now));
        let names: Vec<_> = pods.iter().filter_map(|p| p.metadata.name.as_deref()).collect();
        assert_eq!(names, ["unassigned", "pending", "unready", "cheap", "crowded", "young", "old"]);
    }

    #[test]
    fn percentages_round_as_asked() {
        let percent = |text: &str| IntOrString::String(text.into());
        assert_eq!(resolve_int_or_percent(&percent("30%"), 4, true), Some(2));
        assert_eq!(resolve_int_or_percent(&percent("30%"), 4, false), Some(1));
        assert_eq!(resolve_int_or_percent(&percent("100%"), 7, false), Some(7));
        assert_eq!(resolve_int_or_percent(&IntOrString::Int(3), 7, false), Some(3));
        assert_eq!(resolve_int_or_percent(&percent("many"), 7, false), None);
    }

    #[test]
    fn availability_waits_for_min_ready_seconds() {
        let now = Timestamp::from_second(100).unwrap();
        let ready = pod("p", None, "Running", Some(95));
        assert_eq!(availability(&ready, 0, now), Availability::Available);
        assert_eq!(availability(&ready, 5, now), Availability::Available);
        assert!(matches!(availability(&ready, 8, now), Availability::In(rest) if rest >= Duration::from_secs(3)));
        assert_eq!(availability(&pod("p", None, "Running", None), 0, now), Availability::No);
    }

    #[test]
    fn the_hash_depends_on_template_and_collisions() {
        let template = PodTemplateSpec::default();
        let other = PodTemplateSpec {
            spec: Some(PodSpec { hostname: Some("h".into()), ..Default::default() }),
            ..Default::default()
        };
        assert_eq!(template_hash(&template, None), template_hash(&template, None));
        assert_ne!(template_hash(&template, None), template_hash(&other, None));
        assert_ne!(template_hash(&template, None), template_hash(&template, Some(1)));
    }
}
