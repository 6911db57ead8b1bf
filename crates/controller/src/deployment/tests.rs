//! Rollouts as tables: a Deployment, ReplicaSets that obey at once, and the sizes after each step.

use super::*;
use serde_json::{Value, json};

fn deployment(spec: Value) -> Deployment {
    let mut whole = json!({
        "replicas": 4, "selector": {"matchLabels": {"app": "web"}}, "progressDeadlineSeconds": 600, "revisionHistoryLimit": 10,
        "template": {"metadata": {"labels": {"app": "web"}}, "spec": {"containers": [{"name": "c", "image": "x:1"}]}},
        "strategy": {"type": "RollingUpdate", "rollingUpdate": {"maxSurge": "25%", "maxUnavailable": "25%"}}
    });
    whole.as_object_mut().unwrap().extend(spec.as_object().unwrap().clone());
    serde_json::from_value(
        json!({"metadata": {"name": "web", "namespace": "ns", "uid": "d", "generation": 1}, "spec": whole}),
    )
    .unwrap()
}

fn with_image(deployment: &Deployment, image: &str) -> Deployment {
    let mut next = deployment.clone();
    let spec = next.spec.as_mut().unwrap();
    spec.template.spec.as_mut().unwrap().containers[0].image = Some(image.into());
    next.metadata.generation = next.metadata.generation.map(|g| g + 1);
    next
}

fn at(second: i64) -> Timestamp {
    Timestamp::from_second(second).unwrap()
}

/// A cluster where ReplicaSets do what they are told; `available` decides how many pods of a set are available.
struct World {
    deployment: Deployment,
    sets: Vec<ReplicaSet>,
    clock: i64,
    events: Vec<String>,
}

impl World {
    fn new(deployment: Deployment) -> World {
        World { deployment, sets: Vec::new(), clock: 0, events: Vec::new() }
    }

    /// One sync, then the ReplicaSets follow. Says whether anything was written.
    fn step(&mut self, available: impl Fn(&str, i32) -> i32) -> bool {
        self.clock += 1;
        let sets: Vec<Arc<ReplicaSet>> = self.sets.iter().cloned().map(Arc::new).collect();
        let plan = plan(&self.deployment, &sets, &[], at(self.clock));
        let mut wrote = false;
        if let Some(mut set) = plan.create {
            set.metadata.creation_timestamp = Some(Time(at(self.clock)));
            set.metadata.uid = set.metadata.name.clone();
            self.sets.push(set);
            wrote = true;
        }
        for set in plan.update {
            let slot = self.sets.iter_mut().find(|s| s.metadata.name == set.metadata.name).unwrap();
            *slot = set;
            wrote = true;
        }
        for set in plan.delete {
            self.sets.retain(|s| s.metadata.name != set.metadata.name);
            wrote = true;
        }
        if let Some(revision) = plan.revision {
            self.deployment.metadata.annotations.get_or_insert_default().insert(REVISION.into(), revision);
            wrote = true;
        }
        if let Some(status) = plan.status {
            self.deployment.status = Some(status);
            wrote = true;
        }
        self.events.extend(plan.events.into_iter().map(|(_, text)| text));
        for set in &mut self.sets {
            let size = set.spec.as_ref().unwrap().replicas.unwrap();
            let ready = available(image(set), size);
            let status = set.status.get_or_insert_default();
            let new = k8s_openapi::api::apps::v1::ReplicaSetStatus {
                replicas: size,
                ready_replicas: Some(ready),
                available_replicas: Some(ready),
                observed_generation: set.metadata.generation,
                ..Default::default()
            };
            wrote |= *status != new;
            *status = new;
        }
        wrote
    }

    fn settle(&mut self, available: impl Fn(&str, i32) -> i32 + Copy) {
        for _ in 0..50 {
            if !self.step(available) {
                return;
            }
        }
        panic!("does not settle: {:?}", self.events);
    }

    fn sizes(&self) -> Vec<(&str, i32)> {
        self.sets.iter().map(|s| (image(s), s.spec.as_ref().unwrap().replicas.unwrap())).collect()
    }

    fn condition(&self, kind: &str) -> (String, String) {
        let conditions = self.deployment.status.as_ref().unwrap().conditions.as_ref().unwrap();
        let c = conditions.iter().find(|c| c.type_ == kind).unwrap();
        (c.status.clone(), c.reason.clone().unwrap())
    }
}

fn image(set: &ReplicaSet) -> &str {
    set.spec.as_ref().unwrap().template.as_ref().unwrap().spec.as_ref().unwrap().containers[0].image.as_deref().unwrap()
}

fn all(_: &str, size: i32) -> i32 {
    size
}

fn none(_: &str, _: i32) -> i32 {
    0
}

#[test]
fn first_rollout() {
    let mut world = World::new(deployment(json!({})));
    world.settle(all);
    assert_eq!(world.sizes(), [("x:1", 4)]);
    let set = &world.sets[0];
    let hash = &set.metadata.labels.as_ref().unwrap()[POD_TEMPLATE_HASH];
    assert_eq!(set.metadata.name.as_deref(), Some(format!("web-{hash}").as_str()));
    assert_eq!(set.spec.as_ref().unwrap().selector.match_labels.as_ref().unwrap()[POD_TEMPLATE_HASH], *hash);
    assert_eq!(world.deployment.metadata.annotations.as_ref().unwrap()[REVISION], "1");
    assert_eq!(world.condition("Available"), ("True".into(), "MinimumReplicasAvailable".into()));
    assert_eq!(world.condition("Progressing"), ("True".into(), "NewReplicaSetAvailable".into()));
    assert_eq!(world.events, [format!("Scaled up replica set web-{hash} from 0 to 4")]);
}

#[test]
fn surge_rounds_up_and_unavailable_rounds_down() {
    for (surge, unavailable, expected) in [
        (json!("30%"), json!("30%"), Strategy::Rolling { surge: 2, unavailable: 1 }),
        (json!("1%"), json!("1%"), Strategy::Rolling { surge: 1, unavailable: 0 }),
        (json!(0), json!("1%"), Strategy::Rolling { surge: 0, unavailable: 1 }),
        (json!(3), json!(9), Strategy::Rolling { surge: 3, unavailable: 4 }),
    ] {
        let rolling =
            json!({"type": "RollingUpdate", "rollingUpdate": {"maxSurge": surge, "maxUnavailable": unavailable}});
        assert_eq!(strategy(&deployment(json!({"strategy": rolling}))), expected);
    }
}

#[test]
fn a_rollout_keeps_its_bounds_at_every_step_and_ends() {
    let mut world = World::new(deployment(json!({})));
    world.settle(all);
    world.deployment = with_image(&world.deployment, "x:2");
    for _ in 0..50 {
        if !world.step(all) {
            break;
        }
        let total: i32 = world.sizes().iter().map(|(_, n)| n).sum();
        assert!((3..=5).contains(&total), "{:?}", world.sizes());
    }
    assert_eq!(world.sizes(), [("x:1", 0), ("x:2", 4)]);
    assert_eq!(world.deployment.metadata.annotations.as_ref().unwrap()[REVISION], "2");
}

#[test]
fn a_broken_image_stops_the_rollout_with_the_old_pods_serving() {
    let mut world = World::new(deployment(json!({})));
    world.settle(all);
    world.deployment = with_image(&world.deployment, "x:2");
    let broken = |image: &str, size: i32| if image == "x:2" { 0 } else { size };
    for _ in 0..20 {
        world.step(broken);
    }
    assert_eq!(world.sizes(), [("x:1", 3), ("x:2", 2)]);
    assert_eq!(world.condition("Available").0, "True");
    world.clock += 700;
    world.step(broken);
    assert_eq!(world.condition("Progressing"), ("False".into(), "ProgressDeadlineExceeded".into()));
    // Back to the first template: its ReplicaSet is used again under a new revision.
    world.deployment = with_image(&world.deployment, "x:1");
    world.settle(broken);
    assert_eq!(world.sizes(), [("x:1", 4), ("x:2", 0)]);
    assert_eq!(world.sets[0].metadata.annotations.as_ref().unwrap()[REVISION], "3");
    assert_eq!(world.sets[0].metadata.annotations.as_ref().unwrap()[REVISION_HISTORY], "1");
}

#[test]
fn old_pods_that_never_were_ready_go_at_once() {
    let strategy = json!({"type": "RollingUpdate", "rollingUpdate": {"maxSurge": 0, "maxUnavailable": 1}});
    let mut world = World::new(deployment(json!({"replicas": 3, "strategy": strategy})));
    world.settle(none);
    world.deployment = with_image(&world.deployment, "x:2");
    world.settle(|image, size| if image == "x:2" { size } else { 0 });
    assert_eq!(world.sizes(), [("x:1", 0), ("x:2", 3)]);
}

#[test]
fn recreate_waits_for_the_old_pods() {
    let mut world = World::new(deployment(json!({"strategy": {"type": "Recreate"}})));
    world.settle(all);
    world.deployment = with_image(&world.deployment, "x:2");
    world.step(all);
    assert_eq!(world.sizes(), [("x:1", 0)]);
    let pod: Pod = serde_json::from_value(json!({
        "metadata": {"name": "p", "namespace": "ns", "deletionTimestamp": "2026-01-01T00:00:00Z", "ownerReferences": [
            {"apiVersion": "apps/v1", "kind": "ReplicaSet", "name": "web", "uid": world.sets[0].metadata.uid, "controller": true}]},
        "status": {"phase": "Running"}
    }))
    .unwrap();
    let sets: Vec<_> = world.sets.iter().cloned().map(Arc::new).collect();
    let held = plan(&world.deployment, &sets, &[Arc::new(pod)], at(99));
    assert!(held.create.is_none(), "a terminating pod still holds the new ones back");
    world.settle(all);
    assert_eq!(world.sizes(), [("x:1", 0), ("x:2", 4)]);
}

#[test]
fn a_paused_deployment_scales_but_does_not_roll() {
    let mut world = World::new(deployment(json!({})));
    world.settle(all);
    world.deployment = with_image(&world.deployment, "x:2");
    world.deployment.spec.as_mut().unwrap().paused = Some(true);
    world.deployment.spec.as_mut().unwrap().replicas = Some(6);
    world.settle(all);
    assert_eq!(world.sizes(), [("x:1", 6)]);
    assert_eq!(world.condition("Progressing"), ("Unknown".into(), "DeploymentPaused".into()));
    world.deployment.spec.as_mut().unwrap().paused = None;
    world.settle(all);
    assert_eq!(world.sizes(), [("x:1", 0), ("x:2", 6)]);
}

#[test]
fn scaling_in_the_middle_of_a_rollout_is_proportional() {
    let strategy = json!({"type": "RollingUpdate", "rollingUpdate": {"maxSurge": 3, "maxUnavailable": 2}});
    let mut world = World::new(deployment(json!({"replicas": 10, "strategy": strategy})));
    world.settle(all);
    world.deployment = with_image(&world.deployment, "x:2");
    let broken = |image: &str, size: i32| if image == "x:2" { 0 } else { size };
    for _ in 0..20 {
        world.step(broken);
    }
    assert_eq!(world.sizes(), [("x:1", 8), ("x:2", 5)]);
    // The example in the Kubernetes documentation of Deployments: 5 more pods are shared 3 to 2.
    world.deployment.spec.as_mut().unwrap().replicas = Some(15);
    world.step(broken);
    assert_eq!(world.sizes(), [("x:1", 11), ("x:2", 7)]);
}

#[test]
fn history_beyond_the_limit_goes_oldest_first() {
    let mut world = World::new(deployment(json!({"revisionHistoryLimit": 1})));
    world.settle(all);
    for image in ["x:2", "x:3", "x:4"] {
        world.deployment = with_image(&world.deployment, image);
        world.settle(all);
    }
    assert_eq!(world.sizes(), [("x:3", 0), ("x:4", 4)]);
}

#[test]
fn a_deleted_deployment_does_not_roll() {
    let mut world = World::new(deployment(json!({})));
    world.deployment.metadata.deletion_timestamp = Some(Time(at(1)));
    world.settle(all);
    assert!(world.sets.is_empty());
}

/// A ReplicaSet's pod.
fn pod(owner: &ReplicaSet, name: &str, leaving: bool) -> Arc<Pod> {
    let controller = controller_reference(owner);
    let deleted = leaving.then_some("2026-01-01T00:00:00Z");
    Arc::new(
        serde_json::from_value(json!({
            "metadata": {"name": name, "uid": name, "ownerReferences": [controller], "deletionTimestamp": deleted},
            "status": {"phase": "Running"}
        }))
        .unwrap(),
    )
}

/// In the middle of a rollout: sizes and available pods (as the status tells) of the old set and of the new one.
fn halfway(old: (i32, i32), new: (i32, i32)) -> World {
    let mut world = World::new(deployment(json!({})));
    world.settle(all);
    world.deployment = with_image(&world.deployment, "x:2");
    while world.sets.len() < 2 {
        assert!(world.step(all));
    }
    for (set, (size, available)) in world.sets.iter_mut().zip([old, new]) {
        set.spec.as_mut().unwrap().replicas = Some(size);
        set.status.as_mut().unwrap().available_replicas = Some(available);
    }
    world
}

impl World {
    /// The sizes that one step would give the sets with these pods.
    fn would_be(&self, pods: &[Arc<Pod>]) -> [i32; 2] {
        let sets: Vec<Arc<ReplicaSet>> = self.sets.iter().cloned().map(Arc::new).collect();
        let plan = plan(&self.deployment, &sets, pods, at(self.clock));
        let size = |set: &ReplicaSet| {
            let written = plan.update.iter().find(|s| s.metadata.name == set.metadata.name).unwrap_or(set);
            written.spec.as_ref().unwrap().replicas.unwrap()
        };
        [size(&self.sets[0]), size(&self.sets[1])]
    }
}

#[test]
fn surplus_pods_take_room_until_they_are_deleted() {
    // Nothing but the new set can change: no old pod may be missed.
    let world = halfway((3, 3), (1, 0));
    let [old, new] = [&world.sets[0], &world.sets[1]];
    let pods = |leaving| {
        let stay = ["a", "b", "c"].map(|name| pod(old, name, false));
        stay.into_iter().chain([pod(old, "d", leaving), pod(new, "e", false)]).collect::<Vec<_>>()
    };
    assert_eq!(world.would_be(&pods(false)), [3, 1], "four old pods and a new one are all that may be");
    assert_eq!(world.would_be(&pods(true)), [3, 2]);
}

#[test]
fn a_status_older_than_the_size_does_not_count_pods_twice() {
    assert_eq!(
        halfway((3, 3), (2, 1)).would_be(&[]),
        [2, 2],
        "three must stay available: two old ones and the new one"
    );
    assert_eq!(halfway((3, 4), (2, 1)).would_be(&[]), [2, 2], "the fourth is about to be deleted");
}
