//! Defaults that clients observe in stored objects.
//!
//! The rules are the versioned defaults of the Kubernetes API (`SetDefaults_*` of each group). They run on documents that
//! [`crate::strict`] has brought into typed form, so an absent field and one with the zero value of a field that is not
//! a pointer are the same thing.

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use serde_json::{Map, Value, json};

use crate::schema::{DocumentType, Type, Types};

type Object = Map<String, Value>;

/// Fills in the static defaults of a document. Idempotent; run it on create, update, patch and apply, after decoding.
///
/// Values that need the state of the cluster (cluster IPs, node ports, the default IngressClass, service accounts) are
/// not set here.
pub fn default(ty: &DocumentType, value: &mut Value) {
    if ty.is_custom() {
        custom(ty.types(), ty.root(), value);
        return;
    }
    let Value::Object(object) = value else { return };
    match (ty.group(), ty.kind()) {
        ("", "Pod") => pod(object),
        ("", "PodTemplate") => with(object, "template", pod_template),
        ("", "ReplicationController") => replication_controller(object),
        ("", "Service") => service(object),
        ("", "Endpoints") => {
            each(object, "subsets", |subset| each(subset, "ports", |port| set(port, "protocol", "TCP")));
        }
        ("", "Namespace") => namespace(object),
        ("", "Node") => with(object, "status", |status| {
            if let Some(capacity) = status.get("capacity").cloned() {
                set(status, "allocatable", capacity);
            }
        }),
        ("", "Secret") => secret(object),
        ("", "LimitRange") => with(object, "spec", |spec| each(spec, "limits", limit_range_item)),
        ("", "PersistentVolume") => {
            with(object, "status", |status| set(status, "phase", "Pending"));
            with(object, "spec", |spec| {
                set(spec, "persistentVolumeReclaimPolicy", "Retain");
                set(spec, "volumeMode", "Filesystem");
                volume_source(spec);
            });
        }
        ("", "PersistentVolumeClaim") => persistent_volume_claim(object),
        ("apps", "Deployment") => deployment(object),
        ("apps", "ReplicaSet") => with(object, "spec", |spec| {
            set_pointer(spec, "replicas", 1);
            with(spec, "template", pod_template);
        }),
        ("apps", "StatefulSet") => stateful_set(object),
        ("apps", "DaemonSet") => daemon_set(object),
        ("batch", "Job") => with(object, "spec", job_spec),
        ("batch", "CronJob") => with(object, "spec", cron_job_spec),
        ("discovery.k8s.io", "EndpointSlice") => each(object, "ports", |port| {
            set_pointer(port, "name", "");
            set(port, "protocol", "TCP");
        }),
        ("networking.k8s.io", "IngressClass") => with(object, "spec", |spec| {
            with_present(spec, "parameters", |parameters| set(parameters, "scope", "Cluster"));
        }),
        ("networking.k8s.io", "NetworkPolicy") => with(object, "spec", network_policy_spec),
        ("rbac.authorization.k8s.io", "RoleBinding" | "ClusterRoleBinding") => role_binding(object),
        ("storage.k8s.io", "StorageClass") => {
            set(object, "reclaimPolicy", "Delete");
            set(object, "volumeBindingMode", "Immediate");
        }
        ("storage.k8s.io", "CSIDriver") => with(object, "spec", |spec| {
            set_pointer(spec, "attachRequired", true);
            set_pointer(spec, "podInfoOnMount", false);
            set_pointer(spec, "storageCapacity", false);
            set_pointer(spec, "fsGroupPolicy", "ReadWriteOnceWithFSType");
            set(spec, "volumeLifecycleModes", json!(["Persistent"]));
            set_pointer(spec, "requiresRepublish", false);
            set_pointer(spec, "seLinuxMount", false);
        }),
        ("scheduling.k8s.io", "PriorityClass") => set_pointer(object, "preemptionPolicy", "PreemptLowerPriority"),
        ("authentication.k8s.io", "TokenRequest") => {
            with(object, "spec", |spec| set_pointer(spec, "expirationSeconds", 3600));
        }
        ("autoscaling", "HorizontalPodAutoscaler") => with(object, "spec", autoscaler_spec),
        ("apiextensions.k8s.io", "CustomResourceDefinition") => with(object, "spec", crd_spec),
        ("admissionregistration.k8s.io", "ValidatingWebhookConfiguration" | "MutatingWebhookConfiguration") => {
            let mutating = ty.kind() == "MutatingWebhookConfiguration";
            each(object, "webhooks", |hook| webhook(hook, mutating));
        }
        _ => {}
    }
}

/// Defaults that a CustomResourceDefinition declares, for absent fields and for nulls of fields that are not nullable.
fn custom(types: &Types, structure: &crate::schema::Struct, value: &mut Value) {
    let Value::Object(object) = value else { return };
    for field in &structure.fields {
        let name = field.name.as_ref();
        if object.get(name).is_some_and(Value::is_null) && !field.nullable && field.default.is_some() {
            object.remove(name);
        }
        if let (false, Some(default)) = (object.contains_key(name), &field.default) {
            object.insert(name.to_owned(), default.clone());
        }
        if let Some(inner) = object.get_mut(name) {
            custom_value(types, &field.ty, inner);
        }
    }
}

fn custom_value(types: &Types, ty: &Type, value: &mut Value) {
    match (ty, value) {
        (Type::Struct(id), value) if types.get(*id).custom => custom(types, types.get(*id), value),
        (Type::List { element, .. }, Value::Array(items)) => {
            items.iter_mut().for_each(|item| custom_value(types, element, item));
        }
        (Type::Map(element), Value::Object(members)) => {
            members.values_mut().for_each(|member| custom_value(types, element, member));
        }
        _ => {}
    }
}

/// Whether a field that is not a pointer is unset.
fn blank(value: Option<&Value>) -> bool {
    match value {
        None | Some(Value::Null) => true,
        Some(Value::String(text)) => text.is_empty(),
        Some(Value::Number(number)) => number.as_f64() == Some(0.0),
        Some(Value::Array(items)) => items.is_empty(),
        Some(Value::Object(members)) => members.is_empty(),
        Some(Value::Bool(_)) => false,
    }
}

/// Sets a field that is not a pointer if it has its zero value.
fn set(object: &mut Object, name: &str, value: impl Into<Value>) {
    if blank(object.get(name)) {
        object.insert(name.to_owned(), value.into());
    }
}

/// Sets a pointer if it is nil.
fn set_pointer(object: &mut Object, name: &str, value: impl Into<Value>) {
    if object.get(name).is_none_or(Value::is_null) {
        object.insert(name.to_owned(), value.into());
    }
}

/// Works on a struct that is not behind a pointer; it is made if it is absent.
fn with(object: &mut Object, name: &str, change: impl FnOnce(&mut Object)) {
    if object.get(name).is_none_or(Value::is_null) {
        object.insert(name.to_owned(), Value::Object(Object::new()));
    }
    with_present(object, name, change);
}

/// Works on a struct if it is there.
fn with_present(object: &mut Object, name: &str, change: impl FnOnce(&mut Object)) {
    if let Some(Value::Object(inner)) = object.get_mut(name) {
        change(inner);
    }
}

/// Works on every struct of a list.
fn each(object: &mut Object, name: &str, mut change: impl FnMut(&mut Object)) {
    if let Some(Value::Array(items)) = object.get_mut(name) {
        items.iter_mut().filter_map(Value::as_object_mut).for_each(&mut change);
    }
}

fn text<'a>(object: &'a Object, name: &str) -> &'a str {
    object.get(name).and_then(Value::as_str).unwrap_or_default()
}

fn pod(object: &mut Object) {
    with(object, "spec", |spec| {
        // Limits without requests mean requests of the same amount; templates are not touched, so that a later change of
        // the limits alone takes effect.
        for list in ["initContainers", "containers"] {
            each(spec, list, |container| with(container, "resources", requests_from_limits));
        }
        set_pointer(spec, "enableServiceLinks", true);
        pod_spec(spec);
        if spec.get("hostNetwork").and_then(Value::as_bool) == Some(true) {
            for list in ["initContainers", "containers"] {
                each(spec, list, |container| {
                    each(container, "ports", |port| {
                        if let Some(number) = port.get("containerPort").cloned() {
                            set(port, "hostPort", number);
                        }
                    });
                });
            }
        }
    });
}

fn requests_from_limits(resources: &mut Object) {
    let Some(Value::Object(limits)) = resources.get("limits").cloned() else { return };
    with(resources, "requests", |requests| {
        for (name, amount) in limits {
            requests.entry(name).or_insert(amount);
        }
    });
    if blank(resources.get("requests")) {
        resources.remove("requests");
    }
}

fn pod_template(template: &mut Object) {
    with(template, "spec", pod_spec);
}

fn pod_spec(spec: &mut Object) {
    // The deprecated name of the field is kept in step.
    if blank(spec.get("serviceAccountName"))
        && let Some(name) = spec.get("serviceAccount").filter(|name| !blank(Some(name))).cloned()
    {
        spec.insert("serviceAccountName".to_owned(), name);
    }
    if let Some(name) = spec.get("serviceAccountName").cloned() {
        spec.insert("serviceAccount".to_owned(), name);
    }
    set(spec, "dnsPolicy", "ClusterFirst");
    set(spec, "restartPolicy", "Always");
    set_pointer(spec, "securityContext", json!({}));
    set_pointer(spec, "terminationGracePeriodSeconds", 30);
    set(spec, "schedulerName", "default-scheduler");
    for list in ["initContainers", "containers", "ephemeralContainers"] {
        each(spec, list, container);
    }
    each(spec, "volumes", volume);
}

fn container(container: &mut Object) {
    let pull = pull_policy(text(container, "image"));
    set(container, "imagePullPolicy", pull);
    set(container, "terminationMessagePath", "/dev/termination-log");
    set(container, "terminationMessagePolicy", "File");
    set_pointer(container, "resources", json!({}));
    each(container, "ports", |port| set(port, "protocol", "TCP"));
    each(container, "env", |env| {
        with_present(env, "valueFrom", |source| {
            with_present(source, "fieldRef", |reference| set(reference, "apiVersion", "v1"));
            with_present(source, "fileKeyRef", |reference| set_pointer(reference, "optional", false));
        });
    });
    for name in ["livenessProbe", "readinessProbe", "startupProbe"] {
        with_present(container, name, probe);
    }
    with_present(container, "lifecycle", |lifecycle| {
        for name in ["postStart", "preStop"] {
            with_present(lifecycle, name, |handler| with_present(handler, "httpGet", http_get));
        }
    });
}

fn probe(probe: &mut Object) {
    set(probe, "timeoutSeconds", 1);
    set(probe, "periodSeconds", 10);
    set(probe, "successThreshold", 1);
    set(probe, "failureThreshold", 3);
    with_present(probe, "httpGet", http_get);
    with_present(probe, "grpc", |grpc| set_pointer(grpc, "service", ""));
}

fn http_get(action: &mut Object) {
    set(action, "path", "/");
    set(action, "scheme", "HTTP");
}

/// `Always` for images whose tag is absent or `latest`, unless a digest pins them.
fn pull_policy(image: &str) -> &'static str {
    let last = image.rsplit('/').next().unwrap_or(image);
    let pinned = last.contains('@');
    let tag = last.split_once('@').map_or(last, |(name, _)| name).split_once(':').map(|(_, tag)| tag);
    match tag {
        Some("latest") => "Always",
        None if !pinned => "Always",
        _ => "IfNotPresent",
    }
}

const VOLUME_SOURCES: [&str; 30] = [
    "awsElasticBlockStore",
    "azureDisk",
    "azureFile",
    "cephfs",
    "cinder",
    "configMap",
    "csi",
    "downwardAPI",
    "emptyDir",
    "ephemeral",
    "fc",
    "flexVolume",
    "flocker",
    "gcePersistentDisk",
    "gitRepo",
    "glusterfs",
    "hostPath",
    "image",
    "iscsi",
    "nfs",
    "persistentVolumeClaim",
    "photonPersistentDisk",
    "portworxVolume",
    "projected",
    "quobyte",
    "rbd",
    "scaleIO",
    "secret",
    "storageos",
    "vsphereVolume",
];

fn volume(volume: &mut Object) {
    if !VOLUME_SOURCES.iter().any(|source| volume.get(*source).is_some_and(|value| !value.is_null())) {
        volume.insert("emptyDir".to_owned(), json!({}));
    }
    volume_source(volume);
}

/// Octal 0644, the mode of files in volumes made from objects.
const FILE_MODE: i64 = 0o644;

fn volume_source(volume: &mut Object) {
    for source in ["secret", "configMap", "downwardAPI", "projected"] {
        with_present(volume, source, |source| set_pointer(source, "defaultMode", FILE_MODE));
    }
    with_present(volume, "downwardAPI", downward_items);
    with_present(volume, "hostPath", |source| set_pointer(source, "type", ""));
    with_present(volume, "projected", |projected| {
        each(projected, "sources", |source| {
            with_present(source, "downwardAPI", downward_items);
            with_present(source, "serviceAccountToken", |token| set_pointer(token, "expirationSeconds", 3600));
        });
    });
    with_present(volume, "iscsi", |source| set(source, "iscsiInterface", "default"));
    with_present(volume, "rbd", |source| {
        set(source, "pool", "rbd");
        set(source, "user", "admin");
        set(source, "keyring", "/etc/ceph/keyring");
    });
    with_present(volume, "azureDisk", |source| {
        set_pointer(source, "cachingMode", "ReadWrite");
        set_pointer(source, "kind", "Shared");
        set_pointer(source, "fsType", "ext4");
        set_pointer(source, "readOnly", false);
    });
    with_present(volume, "scaleIO", |source| {
        set(source, "storageMode", "ThinProvisioned");
        set(source, "fsType", "xfs");
    });
    with_present(volume, "image", |source| {
        let pull = pull_policy(text(source, "reference"));
        set(source, "pullPolicy", pull);
    });
    with_present(volume, "ephemeral", |source| {
        with_present(source, "volumeClaimTemplate", |template| {
            with(template, "spec", |spec| set_pointer(spec, "volumeMode", "Filesystem"));
        });
    });
}

fn downward_items(source: &mut Object) {
    each(source, "items", |item| with_present(item, "fieldRef", |reference| set(reference, "apiVersion", "v1")));
}

fn service(object: &mut Object) {
    let mut balanced = false;
    with(object, "spec", |spec| {
        set(spec, "sessionAffinity", "None");
        match text(spec, "sessionAffinity") {
            "None" => {
                spec.remove("sessionAffinityConfig");
            }
            "ClientIP" => with(spec, "sessionAffinityConfig", |config| {
                with(config, "clientIP", |client| set_pointer(client, "timeoutSeconds", 10_800));
            }),
            _ => {}
        }
        set(spec, "type", "ClusterIP");
        each(spec, "ports", |port| {
            set(port, "protocol", "TCP");
            if let Some(number) = port.get("port").cloned() {
                set(port, "targetPort", number);
            }
        });
        let kind = text(spec, "type").to_owned();
        let external = matches!(kind.as_str(), "NodePort" | "LoadBalancer")
            || (kind == "ClusterIP" && !blank(spec.get("externalIPs")));
        if external {
            set(spec, "externalTrafficPolicy", "Cluster");
        }
        if matches!(kind.as_str(), "ClusterIP" | "NodePort" | "LoadBalancer") {
            set_pointer(spec, "internalTrafficPolicy", "Cluster");
        }
        if kind == "LoadBalancer" {
            set_pointer(spec, "allocateLoadBalancerNodePorts", true);
            balanced = true;
        }
    });
    if balanced {
        with_present(object, "status", |status| {
            with_present(status, "loadBalancer", |balancer| {
                each(balancer, "ingress", |ingress| {
                    if !text(ingress, "ip").is_empty() {
                        set_pointer(ingress, "ipMode", "VIP");
                    }
                });
            });
        });
    }
}

fn namespace(object: &mut Object) {
    with(object, "status", |status| set(status, "phase", "Active"));
    with(object, "metadata", |metadata| {
        let name = text(metadata, "name").to_owned();
        if !name.is_empty() {
            with(metadata, "labels", |labels| {
                labels.insert("kubernetes.io/metadata.name".to_owned(), Value::from(name));
            });
        }
    });
}

fn secret(object: &mut Object) {
    set(object, "type", "Opaque");
    // Write-only convenience: the texts are kept as data.
    if let Some(Value::Object(texts)) = object.remove("stringData") {
        with(object, "data", |data| {
            for (key, value) in texts {
                let encoded = STANDARD.encode(value.as_str().unwrap_or_default());
                data.insert(key, Value::from(encoded));
            }
        });
        if blank(object.get("data")) {
            object.remove("data");
        }
    }
}

fn limit_range_item(item: &mut Object) {
    if text(item, "type") != "Container" {
        return;
    }
    for (target, source) in [("default", "max"), ("defaultRequest", "default"), ("defaultRequest", "min")] {
        let Some(Value::Object(amounts)) = item.get(source).cloned() else { continue };
        with(item, target, |target| {
            for (name, amount) in amounts {
                target.entry(name).or_insert(amount);
            }
        });
    }
}

fn persistent_volume_claim(object: &mut Object) {
    with(object, "status", |status| set(status, "phase", "Pending"));
    with(object, "spec", |spec| set_pointer(spec, "volumeMode", "Filesystem"));
}

fn replication_controller(object: &mut Object) {
    let mut labels = None;
    with(object, "spec", |spec| {
        set_pointer(spec, "replicas", 1);
        labels = spec.get("template").and_then(|template| template.pointer("/metadata/labels")).cloned();
        if let Some(labels) = &labels {
            set(spec, "selector", labels.clone());
        }
        with_present(spec, "template", pod_template);
    });
    if let Some(labels) = labels {
        with(object, "metadata", |metadata| set(metadata, "labels", labels));
    }
}

fn deployment(object: &mut Object) {
    with(object, "spec", |spec| {
        set_pointer(spec, "replicas", 1);
        with(spec, "strategy", |strategy| {
            set(strategy, "type", "RollingUpdate");
            if text(strategy, "type") == "RollingUpdate" {
                with(strategy, "rollingUpdate", |rolling| {
                    set_pointer(rolling, "maxUnavailable", "25%");
                    set_pointer(rolling, "maxSurge", "25%");
                });
            }
        });
        set_pointer(spec, "revisionHistoryLimit", 10);
        set_pointer(spec, "progressDeadlineSeconds", 600);
        with(spec, "template", pod_template);
    });
}

fn stateful_set(object: &mut Object) {
    with(object, "spec", |spec| {
        set_pointer(spec, "replicas", 1);
        set(spec, "podManagementPolicy", "OrderedReady");
        with(spec, "updateStrategy", |strategy| {
            set(strategy, "type", "RollingUpdate");
            if text(strategy, "type") == "RollingUpdate" {
                with(strategy, "rollingUpdate", |rolling| set_pointer(rolling, "partition", 0));
            }
        });
        set_pointer(spec, "revisionHistoryLimit", 10);
        with(spec, "persistentVolumeClaimRetentionPolicy", |policy| {
            set(policy, "whenDeleted", "Retain");
            set(policy, "whenScaled", "Retain");
        });
        with(spec, "template", pod_template);
        each(spec, "volumeClaimTemplates", |claim| {
            set(claim, "apiVersion", "v1");
            set(claim, "kind", "PersistentVolumeClaim");
            persistent_volume_claim(claim);
        });
    });
}

fn daemon_set(object: &mut Object) {
    with(object, "spec", |spec| {
        with(spec, "updateStrategy", |strategy| {
            set(strategy, "type", "RollingUpdate");
            if text(strategy, "type") == "RollingUpdate" {
                with(strategy, "rollingUpdate", |rolling| {
                    set_pointer(rolling, "maxUnavailable", 1);
                    set_pointer(rolling, "maxSurge", 0);
                });
            }
        });
        set_pointer(spec, "revisionHistoryLimit", 10);
        with(spec, "template", pod_template);
    });
}

fn job_spec(spec: &mut Object) {
    if spec.get("completions").is_none_or(Value::is_null) && spec.get("parallelism").is_none_or(Value::is_null) {
        set_pointer(spec, "completions", 1);
    }
    set_pointer(spec, "parallelism", 1);
    if spec.get("backoffLimit").is_none_or(Value::is_null) {
        // With a limit for each index the total is unlimited.
        let per_index = spec.get("backoffLimitPerIndex").is_some_and(|limit| !limit.is_null());
        set_pointer(spec, "backoffLimit", if per_index { i32::MAX } else { 6 });
    }
    set_pointer(spec, "completionMode", "NonIndexed");
    set_pointer(spec, "manualSelector", false);
    set_pointer(spec, "suspend", false);
    let failed = spec.get("podFailurePolicy").is_some_and(|policy| !policy.is_null());
    set_pointer(spec, "podReplacementPolicy", if failed { "Failed" } else { "TerminatingOrFailed" });
    with_present(spec, "podFailurePolicy", |policy| {
        each(policy, "rules", |rule| {
            each(rule, "onPodConditions", |pattern| set(pattern, "status", "True"));
        });
    });
    with(spec, "template", pod_template);
}

fn cron_job_spec(spec: &mut Object) {
    set(spec, "concurrencyPolicy", "Allow");
    set_pointer(spec, "suspend", false);
    set_pointer(spec, "successfulJobsHistoryLimit", 3);
    set_pointer(spec, "failedJobsHistoryLimit", 1);
    with(spec, "jobTemplate", |template| with(template, "spec", |job| with(job, "template", pod_template)));
}

fn network_policy_spec(spec: &mut Object) {
    for list in ["ingress", "egress"] {
        each(spec, list, |rule| each(rule, "ports", |port| set_pointer(port, "protocol", "TCP")));
    }
    if blank(spec.get("policyTypes")) {
        let types = if blank(spec.get("egress")) { json!(["Ingress"]) } else { json!(["Ingress", "Egress"]) };
        spec.insert("policyTypes".to_owned(), types);
    }
}

const RBAC: &str = "rbac.authorization.k8s.io";

fn role_binding(object: &mut Object) {
    with(object, "roleRef", |reference| set(reference, "apiGroup", RBAC));
    each(object, "subjects", |subject| {
        if matches!(text(subject, "kind"), "User" | "Group") {
            set(subject, "apiGroup", RBAC);
        }
    });
}

fn autoscaler_spec(spec: &mut Object) {
    set_pointer(spec, "minReplicas", 1);
    set(
        spec,
        "metrics",
        json!([{"type": "Resource",
            "resource": {"name": "cpu", "target": {"type": "Utilization", "averageUtilization": 80}}}]),
    );
    with_present(spec, "behavior", |behavior| {
        with(behavior, "scaleUp", |rules| {
            set_pointer(rules, "stabilizationWindowSeconds", 0);
            set_pointer(rules, "selectPolicy", "Max");
            set(
                rules,
                "policies",
                json!([{"type": "Pods", "value": 4, "periodSeconds": 15},
                    {"type": "Percent", "value": 100, "periodSeconds": 15}]),
            );
        });
        with(behavior, "scaleDown", |rules| {
            set_pointer(rules, "selectPolicy", "Max");
            set(rules, "policies", json!([{"type": "Percent", "value": 100, "periodSeconds": 15}]));
        });
    });
}

fn crd_spec(spec: &mut Object) {
    with(spec, "names", |names| {
        let kind = text(names, "kind").to_owned();
        if !kind.is_empty() {
            set(names, "singular", kind.to_lowercase());
            set(names, "listKind", format!("{kind}List"));
        }
    });
    with(spec, "conversion", |conversion| {
        set(conversion, "strategy", "None");
        with_present(conversion, "webhook", |webhook| {
            with_present(webhook, "clientConfig", |config| {
                with_present(config, "service", |service| set_pointer(service, "port", 443));
            });
        });
    });
}

fn webhook(hook: &mut Object, mutating: bool) {
    set_pointer(hook, "failurePolicy", "Fail");
    set_pointer(hook, "matchPolicy", "Equivalent");
    set_pointer(hook, "namespaceSelector", json!({}));
    set_pointer(hook, "objectSelector", json!({}));
    set_pointer(hook, "timeoutSeconds", 10);
    if mutating {
        set_pointer(hook, "reinvocationPolicy", "Never");
    }
    each(hook, "rules", |rule| set_pointer(rule, "scope", "*"));
    with_present(hook, "clientConfig", |config| {
        with_present(config, "service", |service| set_pointer(service, "port", 443));
    });
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::strict::{FieldValidation, admit};

    fn defaulted(group: &str, kind: &str, value: Value) -> Value {
        let ty = DocumentType::builtin(group, "v1", kind).unwrap();
        let mut value = admit(&ty, value, FieldValidation::Strict).unwrap().value;
        default(&ty, &mut value);
        let once = value.clone();
        default(&ty, &mut value);
        assert_eq!(value, once, "defaults are idempotent");
        let again = admit(&ty, value.clone(), FieldValidation::Strict).unwrap().value;
        assert_eq!(again, value, "defaults have the typed form");
        value
    }

    #[test]
    fn deployment_and_its_pods() {
        let value = defaulted(
            "apps",
            "Deployment",
            json!({"metadata": {"name": "a"}, "spec": {"selector": {"matchLabels": {"a": "b"}},
                "template": {"spec": {"containers": [{"name": "c", "image": "app:1",
                    "readinessProbe": {"httpGet": {"port": 80}}, "ports": [{"containerPort": 80}]}]}}}}),
        );
        assert_eq!(
            value["spec"],
            json!({"replicas": 1, "revisionHistoryLimit": 10, "progressDeadlineSeconds": 600,
                "selector": {"matchLabels": {"a": "b"}},
                "strategy": {"type": "RollingUpdate", "rollingUpdate": {"maxUnavailable": "25%", "maxSurge": "25%"}},
                "template": {"metadata": {}, "spec": {"restartPolicy": "Always", "dnsPolicy": "ClusterFirst",
                    "schedulerName": "default-scheduler", "terminationGracePeriodSeconds": 30, "securityContext": {},
                    "containers": [{"name": "c", "image": "app:1", "imagePullPolicy": "IfNotPresent", "resources": {},
                        "terminationMessagePath": "/dev/termination-log", "terminationMessagePolicy": "File",
                        "ports": [{"containerPort": 80, "protocol": "TCP"}],
                        "readinessProbe": {"httpGet": {"path": "/", "port": 80, "scheme": "HTTP"}, "timeoutSeconds": 1,
                            "periodSeconds": 10, "successThreshold": 1, "failureThreshold": 3}}]}}}),
        );
    }

    #[test]
    fn services() {
        let spec =
            |spec: Value| defaulted("", "Service", json!({"metadata": {"name": "a"}, "spec": spec}))["spec"].clone();
        assert_eq!(
            spec(json!({"ports": [{"port": 80}]})),
            json!({"type": "ClusterIP", "sessionAffinity": "None", "internalTrafficPolicy": "Cluster",
                "ports": [{"port": 80, "protocol": "TCP", "targetPort": 80}]}),
        );
        assert_eq!(
            spec(
                json!({"type": "LoadBalancer", "sessionAffinity": "ClientIP", "ports": [{"port": 1, "targetPort": "x"}]})
            ),
            json!({"type": "LoadBalancer", "sessionAffinity": "ClientIP", "internalTrafficPolicy": "Cluster",
                "externalTrafficPolicy": "Cluster", "allocateLoadBalancerNodePorts": true,
                "sessionAffinityConfig": {"clientIP": {"timeoutSeconds": 10800}},
                "ports": [{"port": 1, "protocol": "TCP", "targetPort": "x"}]}),
        );
        assert_eq!(
            spec(json!({"type": "ExternalName", "externalName": "x.example"})),
            json!({"type": "ExternalName", "externalName": "x.example", "sessionAffinity": "None"}),
        );
    }

    #[test]
    fn pull_policy_follows_the_tag() {
        for (image, policy) in [
            ("app", "Always"),
            ("app:latest", "Always"),
            ("app:1", "IfNotPresent"),
            ("app@sha256:00", "IfNotPresent"),
            ("reg.example.com:5000/app", "Always"),
            ("reg.example.com:5000/app:2", "IfNotPresent"),
        ] {
            assert_eq!(pull_policy(image), policy, "{image}");
        }
    }

    #[test]
    fn secrets_keep_texts_as_data() {
        let value = defaulted("", "Secret", json!({"metadata": {"name": "a"}, "stringData": {"k": "v"}}));
        assert_eq!(value["data"], json!({"k": "dg=="}));
        assert_eq!(value.get("stringData"), None);
    }

    #[test]
    fn custom_defaults_apply_at_every_level() {
        let schema = json!({"type": "object", "properties": {"spec": {"type": "object", "default": {}, "properties": {
            "size": {"type": "integer", "default": 3},
            "parts": {"type": "array", "items": {"type": "object", "properties": {"on": {"type": "boolean", "default": true}}}}
        }}}});
        let ty = DocumentType::custom("example.com", "v1", "Widget", &schema).unwrap();
        let mut value = json!({"spec": {"size": null, "parts": [{}, {"on": false}]}});
        default(&ty, &mut value);
        assert_eq!(value, json!({"spec": {"size": 3, "parts": [{"on": true}, {"on": false}]}}));
        let mut value = json!({});
        default(&ty, &mut value);
        assert_eq!(value, json!({"spec": {"size": 3}}));
    }
}
