//! What the server does to an object before it is validated: status and spec split, metadata the client may not set,
//! `metadata.generation`, fields that follow from others.
//!
//! Input is a document after decoding and defaulting; for a Service also after [`crate::service`] planning. The caller
//! sets uid, creationTimestamp and resourceVersion when it stores the object.

use serde_json::{Value, json};

use crate::kinds::{Generation, Kind};
use crate::meta;
use crate::service;
use crate::validation::same;

/// Metadata that only the server sets.
const SERVER_METADATA: [&str; 5] =
    ["uid", "creationTimestamp", "deletionTimestamp", "deletionGracePeriodSeconds", "selfLink"];

/// Prepares a new object: server-owned metadata and status are reset.
pub fn prepare_create(kind: &Kind, new: &mut Value) {
    for field in SERVER_METADATA {
        meta::remove(new, &["metadata", field]);
    }
    match kind.generation {
        Generation::None => {}
        Generation::Spec | Generation::SpecAndLabels => meta::set(new, &["metadata", "generation"], json!(1)),
    }
    // A node agent registers itself with its status in one write.
    if kind.has_status() && !kind.is("", "Node") {
        match initial_status(kind, new) {
            Some(status) => meta::set(new, &["status"], status),
            None => {
                meta::remove(new, &["status"]);
            }
        }
    }
    if kind.is("", "Namespace") {
        prepare_namespace(new);
    }
    if kind.is("", "Service") {
        prepare_service(new, None);
    }
    if kind.is("", "Pod") {
        let grace = ["spec", "terminationGracePeriodSeconds"];
        if meta::get(new, &grace).as_i64().is_some_and(|seconds| seconds < 0) {
            meta::set(new, &grace, json!(1));
        }
    }
    if kind.is("apps", "DaemonSet") {
        meta::set(new, &["metadata", "annotations", TEMPLATE_GENERATION], json!("1"));
    }
    drop_topology(kind, new, None);
    empty_lists(kind, new);
}

/// Topology labels of endpoints are from an older version of the API: v1 clients may send the field, but it is not kept,
/// unless an update leaves the endpoints as they are.
fn drop_topology(kind: &Kind, new: &mut Value, old: Option<&Value>) {
    let path = ["endpoints"];
    if !kind.is("discovery.k8s.io", "EndpointSlice")
        || old.is_some_and(|old| same(meta::get(new, &path), meta::get(old, &path)))
    {
        return;
    }
    for endpoint in new.get_mut("endpoints").and_then(Value::as_array_mut).into_iter().flatten() {
        if let Some(fields) = endpoint.as_object_mut() {
            fields.remove("deprecatedTopology");
        }
    }
}

/// Annotation with the number of changes to a DaemonSet's template.
const TEMPLATE_GENERATION: &str = "deprecated.daemonset.template.generation";

/// Lists of these kinds that are always present are null when they are empty, as stored objects of the reference
/// implementation are.
fn empty_lists(kind: &Kind, object: &mut Value) {
    let fields: &[&str] = match (kind.group.as_str(), kind.kind.as_str()) {
        _ if kind.custom => &[],
        ("discovery.k8s.io", "EndpointSlice") => &["endpoints", "ports"],
        ("rbac.authorization.k8s.io", "Role" | "ClusterRole") => &["rules"],
        _ => &[],
    };
    for field in fields {
        if meta::list(object, &[field]).is_empty() {
            meta::set(object, &[field], Value::Null);
        }
    }
}

/// The status of an object that nobody has acted on yet. Numbers and objects that a client always finds are there.
fn initial_status(kind: &Kind, new: &Value) -> Option<Value> {
    Some(match (kind.group.as_str(), kind.kind.as_str()) {
        _ if kind.custom => return None,
        ("", "Pod") => initial_pod_status(new),
        ("", "Namespace") => json!({ "phase": "Active" }),
        ("", "Service") | ("networking.k8s.io", "Ingress") => json!({ "loadBalancer": {} }),
        ("", "PersistentVolumeClaim" | "PersistentVolume") => json!({ "phase": "Pending" }),
        ("", "ReplicationController") | ("apps", "ReplicaSet") => json!({ "replicas": 0 }),
        ("apps", "StatefulSet") => json!({ "replicas": 0, "availableReplicas": 0 }),
        ("apps", "DaemonSet") => json!({
            "currentNumberScheduled": 0, "numberMisscheduled": 0, "desiredNumberScheduled": 0, "numberReady": 0,
        }),
        ("policy", "PodDisruptionBudget") => {
            json!({ "disruptionsAllowed": 0, "currentHealthy": 0, "desiredHealthy": 0, "expectedPods": 0 })
        }
        ("autoscaling", "HorizontalPodAutoscaler") => json!({ "desiredReplicas": 0, "currentMetrics": null }),
        ("apiextensions.k8s.io", "CustomResourceDefinition") => json!({
            "conditions": null,
            "acceptedNames": { "plural": "", "kind": "" },
            "storedVersions": stored_versions(new),
        }),
        _ => json!({}),
    })
}

/// Notes a new storage version: objects may be stored in the earlier ones still.
fn add_stored_version(definition: &mut Value) {
    let Value::Array(storage) = stored_versions(definition) else { return };
    let mut stored = meta::list(definition, &["status", "storedVersions"]).to_vec();
    stored.extend(storage.into_iter().filter(|name| !stored.contains(name)).collect::<Vec<_>>());
    meta::set(definition, &["status", "storedVersions"], Value::Array(stored));
}

/// The version that objects of a definition are stored in; null if none is.
fn stored_versions(definition: &Value) -> Value {
    let storage = meta::list(definition, &["spec", "versions"])
        .iter()
        .find(|version| meta::get(version, &["storage"]) == true)
        .map(|version| meta::text(version, &["name"]));
    storage.map_or(Value::Null, |name| json!([name]))
}

fn initial_pod_status(pod: &Value) -> Value {
    let mut status = json!({ "phase": "Pending", "qosClass": qos_class(pod) });
    if !meta::list(pod, &["spec", "schedulingGates"]).is_empty() {
        status["conditions"] = json!([{
            "type": "PodScheduled", "status": "False", "reason": "SchedulingGated",
            "message": "Scheduling is blocked due to non-empty scheduling gates",
            "lastProbeTime": null, "lastTransitionTime": null,
        }]);
    }
    status
}

/// The quality of service class: Guaranteed when every container limits cpu and memory and requests just that,
/// BestEffort when none asks for anything, else Burstable.
pub fn qos_class(pod: &Value) -> &'static str {
    let containers = || ["containers", "initContainers"].into_iter().flat_map(|list| meta::list(pod, &["spec", list]));
    let amount = |container: &'_ Value, list: &str, name: &str| -> Option<String> {
        let text = match meta::get(container, &["resources", list, name]) {
            Value::String(text) => text.clone(),
            Value::Number(number) => number.to_string(),
            _ => return None,
        };
        let zero = text.trim_start_matches(['0', '.']).trim_end_matches(char::is_alphabetic).is_empty();
        (!zero).then_some(text)
    };
    let mut asks = false;
    let mut guaranteed = true;
    for container in containers() {
        for name in ["cpu", "memory"] {
            let (request, limit) = (amount(container, "requests", name), amount(container, "limits", name));
            asks |= request.is_some() || limit.is_some();
            guaranteed &= limit.is_some() && (request.is_none() || request == limit);
        }
    }
    match (asks, guaranteed) {
        (false, _) => "BestEffort",
        (true, true) => "Guaranteed",
        (true, false) => "Burstable",
    }
}

fn prepare_namespace(new: &mut Value) {
    let name = meta::name(new).to_owned();
    meta::set(new, &["metadata", "labels", "kubernetes.io/metadata.name"], json!(name));
    let mut finalizers = meta::list(new, &["spec", "finalizers"]).to_vec();
    if !finalizers.iter().any(|f| f == "kubernetes") {
        finalizers.push(json!("kubernetes"));
    }
    meta::set(new, &["spec", "finalizers"], Value::Array(finalizers));
}

fn prepare_service(new: &mut Value, old: Option<&Value>) {
    if let Some(old) = old {
        service::drop_type_dependent_fields(new, old);
    }
    // A value that is none is left for validation to refuse.
    let policy = ["spec", "internalTrafficPolicy"];
    if service::service_type(new) == "ExternalName" && matches!(meta::text(new, &policy), "Cluster" | "Local") {
        meta::remove(new, &policy);
    }
}

/// Prepares a changed object from what is stored; `subresource` is the one written through, if any.
///
/// The caller has already made sure that `new` is about the same object (name, namespace, uid precondition).
pub fn prepare_update(kind: &Kind, new: &mut Value, old: &Value, subresource: Option<&str>) {
    keep_metadata(new, old);
    match subresource {
        Some("status") => keep_all_but_status(kind, new, old),
        Some("finalize") => {
            let finalizers = meta::get(new, &["spec", "finalizers"]).clone();
            keep_fields(new, old, &["spec", "status"]);
            meta::put(new, &["spec", "finalizers"], finalizers);
        }
        Some("ephemeralcontainers") => {
            let mut whole = old.clone();
            let path = ["spec", "ephemeralContainers"];
            meta::put(&mut whole, &path, meta::get(new, &path).clone());
            for path in [["metadata", "resourceVersion"], ["metadata", "managedFields"]] {
                meta::put(&mut whole, &path, meta::get(new, &path).clone());
            }
            *new = whole;
        }
        // The other subresources hand a whole object over that they have changed themselves.
        Some(_) | None => {
            if kind.has_status() {
                meta::put(new, &["status"], meta::get(old, &["status"]).clone());
            }
            if kind.is("", "Service") {
                prepare_service(new, Some(old));
                if service::service_type(new) != "LoadBalancer" && service::service_type(old) == "LoadBalancer" {
                    meta::set(new, &["status", "loadBalancer"], json!({}));
                }
            }
            if kind.is("", "Namespace") {
                // Only /finalize changes these.
                meta::put(new, &["spec"], meta::get(old, &["spec"]).clone());
                let name = meta::name(new).to_owned();
                meta::set(new, &["metadata", "labels", "kubernetes.io/metadata.name"], json!(name));
            }
            if kind.is("apiextensions.k8s.io", "CustomResourceDefinition") {
                add_stored_version(new);
            }
            if kind.is("apps", "DaemonSet") {
                let template = ["spec", "template"];
                let stored =
                    meta::annotation(old, TEMPLATE_GENERATION).and_then(|n| n.parse::<i64>().ok()).unwrap_or(1);
                let changed = !same(meta::get(new, &template), meta::get(old, &template));
                let now = (stored + i64::from(changed)).to_string();
                meta::set(new, &["metadata", "annotations", TEMPLATE_GENERATION], json!(now));
            }
            if kind.is("", "Secret") && meta::text(new, &["type"]).is_empty() {
                meta::put(new, &["type"], meta::get(old, &["type"]).clone());
            }
        }
    }
    drop_topology(kind, new, Some(old));
    empty_lists(kind, new);
    let changed = match kind.generation {
        Generation::None => return,
        Generation::Spec => {
            // Annotations steer how a Deployment rolls out, so they count as content there.
            let annotations = ["metadata", "annotations"];
            content_changed(kind, new, old)
                || (kind.is("apps", "Deployment")
                    && subresource.is_none()
                    && !same(meta::get(new, &annotations), meta::get(old, &annotations)))
        }
        Generation::SpecAndLabels => {
            content_changed(kind, new, old)
                || !same(meta::get(new, &["metadata", "labels"]), meta::get(old, &["metadata", "labels"]))
        }
    };
    let stored = meta::get(old, &["metadata", "generation"]).as_i64().unwrap_or(0);
    meta::set(new, &["metadata", "generation"], json!(stored + i64::from(changed)));
}

/// Metadata that a client cannot change or clear. A different uid is left for validation to refuse.
fn keep_metadata(new: &mut Value, old: &Value) {
    for field in ["deletionTimestamp", "deletionGracePeriodSeconds", "creationTimestamp", "selfLink"] {
        meta::put(new, &["metadata", field], meta::get(old, &["metadata", field]).clone());
    }
    for field in ["uid", "namespace"] {
        if meta::text(new, &["metadata", field]).is_empty() {
            meta::put(new, &["metadata", field], meta::get(old, &["metadata", field]).clone());
        }
    }
    if meta::get(new, &["metadata", "generation"]).is_null() {
        meta::put(new, &["metadata", "generation"], meta::get(old, &["metadata", "generation"]).clone());
    }
}

/// Puts the stored values of top-level fields back.
fn keep_fields(new: &mut Value, old: &Value, fields: &[&str]) {
    for field in fields {
        meta::put(new, &[field], meta::get(old, &[field]).clone());
    }
}

/// A write to /status: everything else is as it is stored, except that built-in kinds take labels, annotations and
/// finalizers through it, too.
fn keep_all_but_status(kind: &Kind, new: &mut Value, old: &Value) {
    let status = meta::get(new, &["status"]).clone();
    let metadata = meta::get(new, &["metadata"]).clone();
    let resource_version = meta::get(new, &["metadata", "resourceVersion"]).clone();
    let type_meta = [meta::get(new, &["apiVersion"]).clone(), meta::get(new, &["kind"]).clone()];
    *new = old.clone();
    let [api_version, kind_name] = type_meta;
    meta::put(new, &["apiVersion"], api_version);
    meta::put(new, &["kind"], kind_name);
    meta::put(new, &["status"], status);
    if kind.custom {
        meta::put(new, &["metadata", "managedFields"], meta::get(&metadata, &["managedFields"]).clone());
    } else {
        meta::set(new, &["metadata"], metadata);
        if kind.is("apps", "Deployment") {
            meta::put(new, &["metadata", "labels"], meta::get(old, &["metadata", "labels"]).clone());
        }
        if kind.is("", "Pod") {
            for field in ["ownerReferences", "deletionTimestamp"] {
                meta::put(new, &["metadata", field], meta::get(old, &["metadata", field]).clone());
            }
            for field in ["qosClass", "observedGeneration"] {
                if meta::get(new, &["status", field]).is_null() {
                    meta::put(new, &["status", field], meta::get(old, &["status", field]).clone());
                }
            }
        }
    }
    meta::put(new, &["metadata", "resourceVersion"], resource_version);
}

/// Whether anything outside metadata and status differs.
fn content_changed(kind: &Kind, new: &Value, old: &Value) -> bool {
    let fields = |object: &'_ Value| -> Vec<String> {
        object.as_object().map(|map| map.keys().cloned().collect()).unwrap_or_default()
    };
    fields(new)
        .into_iter()
        .chain(fields(old))
        .filter(|field| !matches!(field.as_str(), "metadata" | "apiVersion" | "kind"))
        .filter(|field| !(field == "status" && (kind.has_status() || !kind.custom)))
        .any(|field| !same(meta::get(new, &[&field]), meta::get(old, &[&field])))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::kinds::Registry;
    use std::sync::Arc;

    fn kind(group: &str, plural: &str) -> Arc<Kind> {
        Registry::builtin().by_gvr(group, "v1", plural).expect("built in").clone()
    }

    #[test]
    fn a_new_object_loses_what_only_the_server_sets() {
        let mut object = json!({"metadata": {"name": "a", "uid": "x", "generation": 7, "deletionTimestamp": "y"},
            "status": {"replicas": 3}});
        prepare_create(&kind("apps", "replicasets"), &mut object);
        assert_eq!(object, json!({"metadata": {"name": "a", "generation": 1}, "status": {"replicas": 0}}));
    }

    #[test]
    fn a_node_keeps_the_status_it_registers_with() {
        let mut object = json!({"metadata": {"name": "n"}, "status": {"phase": "x"}});
        prepare_create(&kind("", "nodes"), &mut object);
        assert_eq!(object["status"], json!({"phase": "x"}));
    }

    #[test]
    fn generation_grows_with_the_spec_only() {
        let deployments = kind("apps", "deployments");
        let slices = kind("discovery.k8s.io", "endpointslices");
        let old = json!({"metadata": {"name": "a", "generation": 4}, "spec": {"replicas": 1}, "status": {"x": 1}});
        let rows = [
            ("a_label", &deployments, json!({"metadata": {"labels": {"a": "b"}}, "spec": {"replicas": 1}}), 4),
            ("the_spec", &deployments, json!({"metadata": {}, "spec": {"replicas": 2}}), 5),
            ("status_is_not_taken", &deployments, json!({"metadata": {}, "spec": {"replicas": 1}, "status": {}}), 4),
            (
                "an_annotation_of_a_deployment",
                &deployments,
                json!({"metadata": {"annotations": {"a": "b"}}, "spec": {"replicas": 1}}),
                5,
            ),
            ("a_label_of_a_slice", &slices, json!({"metadata": {"labels": {"a": "b"}}, "spec": {"replicas": 1}}), 5),
            (
                "an_annotation_of_a_slice",
                &slices,
                json!({"metadata": {"annotations": {"a": "b"}}, "spec": {"replicas": 1}}),
                4,
            ),
        ];
        for (name, kind, mut new, want) in rows {
            prepare_update(kind, &mut new, &old, None);
            assert_eq!(new["metadata"]["generation"], json!(want), "{name}");
        }
    }

    #[test]
    fn a_status_write_changes_status_and_some_metadata() {
        let old = json!({"metadata": {"name": "a", "generation": 4, "labels": {"k": "1"}}, "spec": {"replicas": 1}, "status": {}});
        let write = json!({"metadata": {"name": "a", "labels": {"k": "2"}, "resourceVersion": "7"}, "spec": {"replicas": 9}, "status": {"replicas": 3}});
        let mut new = write.clone();
        prepare_update(&kind("apps", "replicasets"), &mut new, &old, Some("status"));
        assert_eq!((&new["spec"], &new["status"]), (&json!({"replicas": 1}), &json!({"replicas": 3})));
        assert_eq!((&new["metadata"]["labels"]["k"], &new["metadata"]["resourceVersion"]), (&json!("2"), &json!("7")));
        let mut new = write;
        prepare_update(&kind("apps", "deployments"), &mut new, &old, Some("status"));
        assert_eq!(new["metadata"]["labels"]["k"], json!("1"));
    }

    #[test]
    fn quality_of_service_follows_requests_and_limits() {
        let pod = |resources: Value| json!({"spec": {"containers": [{"resources": resources}]}});
        let rows = [
            ("nothing", json!({}), "BestEffort"),
            ("a_request", json!({"requests": {"cpu": "1"}}), "Burstable"),
            ("limits_alone", json!({"limits": {"cpu": "1", "memory": "1Gi"}}), "Guaranteed"),
            ("one_limit", json!({"limits": {"cpu": "1"}}), "Burstable"),
            (
                "lower_request",
                json!({"limits": {"cpu": "1", "memory": "1Gi"}, "requests": {"cpu": "500m"}}),
                "Burstable",
            ),
            ("zero_is_nothing", json!({"requests": {"cpu": "0"}}), "BestEffort"),
        ];
        for (name, resources, want) in rows {
            assert_eq!(qos_class(&pod(resources)), want, "{name}");
        }
    }
}
