//! ReplicationControllers: the ReplicaSets of before, with a selector of plain labels.
//!
//! A ReplicationController is read as a ReplicaSet and decided on as one; only the writes differ. Upstream does the same.

use std::sync::Arc;

use anyhow::Context as _;
use k8s_openapi::api::apps::v1::{ReplicaSet, ReplicaSetCondition, ReplicaSetSpec, ReplicaSetStatus};
use k8s_openapi::api::core::v1::{
    Pod, ReplicationController, ReplicationControllerCondition, ReplicationControllerStatus,
};
use k8s_openapi::apimachinery::pkg::apis::meta::v1::LabelSelector;
use kube::Api;
use kube::api::PostParams;
use portolan_client::EventRecorder;

use crate::Context;
use crate::queue::{Key, Next, Queue};
use crate::replicaset::{adopt, create, delete_pod, may_adopt, plan, release, replica, status};
use crate::selector;
use crate::util::{controller_of, is_namespace_terminating, is_not_found, message};

const WORKERS: usize = 5;

/// The ReplicaSet that would behave alike.
pub fn as_replica_set(controller: &ReplicationController) -> ReplicaSet {
    let spec = controller.spec.clone().unwrap_or_default();
    let status = controller.status.clone();
    ReplicaSet {
        metadata: controller.metadata.clone(),
        spec: Some(ReplicaSetSpec {
            min_ready_seconds: spec.min_ready_seconds,
            replicas: spec.replicas,
            selector: LabelSelector { match_labels: spec.selector, match_expressions: None },
            template: spec.template,
        }),
        status: status.map(|s| ReplicaSetStatus {
            replicas: s.replicas,
            fully_labeled_replicas: s.fully_labeled_replicas,
            ready_replicas: s.ready_replicas,
            available_replicas: s.available_replicas,
            terminating_replicas: None,
            observed_generation: s.observed_generation,
            conditions: s.conditions.map(|all| {
                let read = |c: ReplicationControllerCondition| ReplicaSetCondition {
                    type_: c.type_,
                    status: c.status,
                    reason: c.reason,
                    message: c.message,
                    last_transition_time: c.last_transition_time,
                };
                all.into_iter().map(read).collect()
            }),
        }),
    }
}

/// The status in the words of a ReplicationController.
pub fn from_replica_set(status: ReplicaSetStatus) -> ReplicationControllerStatus {
    ReplicationControllerStatus {
        replicas: status.replicas,
        fully_labeled_replicas: status.fully_labeled_replicas,
        ready_replicas: status.ready_replicas,
        available_replicas: status.available_replicas,
        observed_generation: status.observed_generation,
        conditions: status.conditions.map(|all| {
            let write = |c: ReplicaSetCondition| ReplicationControllerCondition {
                type_: c.type_,
                status: c.status,
                reason: c.reason,
                message: c.message,
                last_transition_time: c.last_transition_time,
            };
            all.into_iter().map(write).collect()
        }),
    }
}

/// Registers with the caches and returns the future that works.
pub(crate) fn start(context: Context) -> impl Future<Output = ()> + Send + 'static {
    let queue: Queue<Key> = context.queue("replicationmanager");
    let add = queue.clone();
    context.caches.replication_controllers.on_change(move |old, new| {
        if let Some(controller) = new.or(old) {
            add.add(Key::of(&**controller));
        }
    });
    let add = queue.clone();
    let all = context.caches.replication_controllers.clone();
    context.caches.pods.on_change(move |old, new| {
        for pod in [old, new].into_iter().flatten() {
            let namespace = pod.metadata.namespace.as_deref().unwrap_or_default();
            match controller_of(&**pod) {
                Some(owner) if owner.kind == "ReplicationController" => add.add(Key::new(namespace, &owner.name)),
                Some(_) => {}
                None => {
                    for controller in all.list(namespace) {
                        let spec = as_replica_set(&controller).spec.unwrap_or_default();
                        if selector::matches(&spec.selector, pod.metadata.labels.as_ref()) {
                            add.add(Key::of(&*controller));
                        }
                    }
                }
            }
        }
    });
    async move {
        let events = context.recorder("replication-controller");
        let stop = context.shutdown.clone();
        queue.work(WORKERS, stop, move |key| sync(context.clone(), events.clone(), key)).await;
    }
}

async fn sync(context: Context, events: EventRecorder, key: Key) -> anyhow::Result<Next> {
    let caches = &context.caches;
    let Some(controller) = caches.replication_controllers.get(&key.namespace, &key.name) else {
        return Ok(Next::Wait);
    };
    let set = as_replica_set(&controller);
    let spec = set.spec.clone().unwrap_or_default();
    let uid = set.metadata.uid.as_deref();
    let pods: Vec<Arc<Pod>> = caches.pods.claimable(&key.namespace, uid, &spec.selector);
    let plan = plan(&set, &pods, &[], context.clock.now());
    let api: Api<Pod> = Api::namespaced(context.client.clone(), &key.namespace);
    if !plan.adopt.is_empty() {
        let controllers: Api<ReplicationController> = Api::namespaced(context.client.clone(), &key.namespace);
        if !may_adopt(&controllers, &controller).await? {
            return Ok(Next::Wait);
        }
    }
    for pod in &plan.adopt {
        adopt(&api, &caches.pods, &*controller, pod).await?;
    }
    for pod in &plan.release {
        release(&api, &caches.pods, uid, pod).await?;
    }
    let mut failure: Option<(&str, kube::Error)> = None;
    if plan.create > 0 {
        let pod = replica(&*controller, &spec.template.unwrap_or_default());
        let made = create(&context, &events, &*controller, pod, plan.create).await;
        failure = made.err().map(|e| ("FailedCreate", e));
    }
    for pod in &plan.delete {
        if let Err(error) = delete_pod(&api, &caches.pods, &events, &*controller, pod).await {
            failure = Some(("FailedDelete", error));
        }
    }
    let pods = uid.map(|uid| caches.pods.controlled_by(uid)).unwrap_or_default();
    let told = failure.as_ref().map(|(reason, error)| (*reason, message(error)));
    let (wanted, recheck) = status(&set, &pods, told, context.clock.now());
    let wanted = from_replica_set(wanted);
    if controller.status.as_ref() != Some(&wanted) {
        let api: Api<ReplicationController> = Api::namespaced(context.client.clone(), &key.namespace);
        let mut updated = ReplicationController::clone(&controller);
        updated.status = Some(wanted);
        match api.replace_status(&key.name, &PostParams::default(), &updated).await {
            Ok(written) => caches.replication_controllers.wrote(written),
            Err(error) if is_not_found(&error) => return Ok(Next::Wait),
            Err(error) => return Err(error).context("cannot update the status"),
        }
    }
    match failure {
        Some((_, error)) if !is_namespace_terminating(&error) => Err(error.into()),
        _ => Ok(recheck.map_or(Next::Wait, Next::After)),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_controller_is_decided_on_as_a_replica_set() {
        let controller: ReplicationController = serde_json::from_value(serde_json::json!({
            "metadata": {"name": "c", "namespace": "ns", "uid": "c"},
            "spec": {"replicas": 2, "minReadySeconds": 3, "selector": {"app": "c"}, "template": {"metadata": {"labels": {"app": "c"}}}},
            "status": {"replicas": 1, "readyReplicas": 1, "conditions": [{"type": "ReplicaFailure", "status": "True"}]}
        }))
        .unwrap();
        let set = as_replica_set(&controller);
        assert_eq!(plan(&set, &[], &[], jiff::Timestamp::UNIX_EPOCH).create, 2);
        assert_eq!(set.spec.as_ref().unwrap().min_ready_seconds, Some(3));
        assert_eq!(Some(from_replica_set(set.status.unwrap())), controller.status, "nothing is lost both ways");
        let pod = replica(&controller, &set.spec.unwrap().template.unwrap());
        assert_eq!(pod.metadata.generate_name.as_deref(), Some("c-"));
        assert_eq!(controller_of(&pod).unwrap().kind, "ReplicationController");
    }
}
