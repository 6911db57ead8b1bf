//! What the server adds to or refuses of new objects because of other objects: the admission plugins of the reference
//! implementation that clients notice.

use std::collections::BTreeSet;

use jiff::Timestamp;
use portolan_api::kinds::Kind;
use portolan_api::meta;
use portolan_api::status::Status;
use serde_json::{Value, json};

use crate::store::{Key, Snapshot};

/// Plugins that can be switched off (`--disable-admission-plugins`).
pub const PLUGINS: &[&str] =
    &["DefaultIngressClass", "DefaultTolerationSeconds", "Priority", "ServiceAccount", "TaintNodesByCondition"];

/// Which plugins run.
#[derive(Clone, Debug, Default)]
pub struct Admission {
    disabled: BTreeSet<String>,
}

impl Admission {
    /// All plugins but these.
    pub fn without(disabled: &[String]) -> Admission {
        Admission { disabled: disabled.iter().cloned().collect() }
    }

    fn runs(&self, plugin: &str) -> bool {
        debug_assert!(PLUGINS.contains(&plugin), "every plugin can be named");
        !self.disabled.contains(plugin)
    }

    /// Whether Pods need a ServiceAccount.
    pub fn service_accounts(&self) -> bool {
        self.runs("ServiceAccount")
    }

    /// Changes a new object, or refuses it.
    pub fn create(&self, kind: &Kind, new: &mut Value, state: &Snapshot) -> Result<(), Status> {
        if kind.is("", "Pod") {
            if self.service_accounts() {
                service_account(kind, new, state)?;
            }
            if self.runs("Priority") {
                priority(kind, new, state)?;
            }
            if self.runs("DefaultTolerationSeconds") {
                default_tolerations(new);
            }
        } else if kind.is("networking.k8s.io", "Ingress") && self.runs("DefaultIngressClass") {
            default_ingress_class(new, state);
        } else if kind.is("", "Node") && self.runs("TaintNodesByCondition") {
            taint_new_node(new);
        }
        Ok(())
    }
}

/// Namespaces that may not be deleted.
pub const PERMANENT_NAMESPACES: &[&str] = &["default", "kube-system", "kube-public"];

/// Refuses new objects in a namespace that does not exist or is going away.
pub fn namespace(kind: &Kind, namespace: &str, name: &str, state: &Snapshot) -> Result<(), Status> {
    let Some(object) = state.get("namespaces", &Key::new("", namespace)) else {
        return Err(Status::namespace_not_found(namespace));
    };
    if meta::is_deleting(&object.value) || meta::text(&object.value, &["status", "phase"]) == "Terminating" {
        return Err(Status::namespace_terminating(kind, name, namespace));
    }
    Ok(())
}

const TOKEN_PATH: &str = "/var/run/secrets/kubernetes.io/serviceaccount";

/// Lifetime of projected tokens: an hour and seven seconds, by which they can be told from hand-made ones (upstream).
const PROJECTED_SECONDS: i64 = 3607;

/// Gives a Pod its ServiceAccount and mounts a token (plugin ServiceAccount).
fn service_account(kind: &Kind, pod: &mut Value, state: &Snapshot) -> Result<(), Status> {
    let namespace = meta::namespace(pod).to_owned();
    if meta::annotation(pod, "kubernetes.io/config.mirror").is_some() {
        return Ok(());
    }
    let mut account = meta::text(pod, &["spec", "serviceAccountName"]).to_owned();
    if account.is_empty() {
        "default".clone_into(&mut account);
    }
    meta::set(pod, &["spec", "serviceAccountName"], json!(account));
    meta::set(pod, &["spec", "serviceAccount"], json!(account));
    let Some(found) = state.get("serviceaccounts", &Key::new(&namespace, &account)) else {
        let why =
            format!("error looking up service account {namespace}/{account}: serviceaccount \"{account}\" not found");
        return Err(Status::forbidden(kind, meta::name(pod), why));
    };
    let found = &found.value;
    if meta::list(pod, &["spec", "imagePullSecrets"]).is_empty() && !meta::list(found, &["imagePullSecrets"]).is_empty()
    {
        meta::set(pod, &["spec", "imagePullSecrets"], found["imagePullSecrets"].clone());
    }
    let automount = meta::get(pod, &["spec", "automountServiceAccountToken"])
        .as_bool()
        .or_else(|| found["automountServiceAccountToken"].as_bool())
        .unwrap_or(true);
    if automount {
        mount_token(pod);
    }
    Ok(())
}

fn mount_token(pod: &mut Value) {
    let mounted = |container: &Value| {
        meta::list(container, &["volumeMounts"]).iter().any(|mount| meta::text(mount, &["mountPath"]) == TOKEN_PATH)
    };
    let lists = ["initContainers", "containers"];
    let needed = lists.iter().any(|list| meta::list(pod, &["spec", list]).iter().any(|c| !mounted(c)));
    if !needed {
        return;
    }
    let volume =
        meta::generate_name("kube-api-access-", |n| usize::try_from(crate::services::pick(n as u64)).unwrap_or(0));
    for list in lists {
        let Some(containers) = pod["spec"].get_mut(list).and_then(Value::as_array_mut) else { continue };
        for container in containers.iter_mut().filter(|container| !mounted(container)) {
            let mut mounts = meta::list(container, &["volumeMounts"]).to_vec();
            mounts.push(json!({"name": volume, "readOnly": true, "mountPath": TOKEN_PATH}));
            meta::set(container, &["volumeMounts"], Value::Array(mounts));
        }
    }
    let mut volumes = meta::list(pod, &["spec", "volumes"]).to_vec();
    volumes.push(json!({
        "name": volume,
        "projected": {"defaultMode": 420, "sources": [
            {"serviceAccountToken": {"expirationSeconds": PROJECTED_SECONDS, "path": "token"}},
            {"configMap": {"name": "kube-root-ca.crt", "items": [{"key": "ca.crt", "path": "ca.crt"}]}},
            {"downwardAPI": {"items": [
                {"path": "namespace", "fieldRef": {"apiVersion": "v1", "fieldPath": "metadata.namespace"}},
            ]}},
        ]},
    }));
    meta::set(pod, &["spec", "volumes"], Value::Array(volumes));
}

/// Resolves the priority class of a Pod (plugin Priority).
fn priority(kind: &Kind, pod: &mut Value, state: &Snapshot) -> Result<(), Status> {
    let class = meta::text(pod, &["spec", "priorityClassName"]).to_owned();
    let (value, policy) = match class.as_str() {
        "" => {
            let default = state
                .list("priorityclasses.scheduling.k8s.io", None)
                .find(|object| object.value["globalDefault"] == json!(true))
                .map(|object| object.value.clone());
            match default {
                Some(found) => {
                    meta::set(pod, &["spec", "priorityClassName"], json!(meta::name(&found)));
                    class_values(&found)
                }
                None => (json!(0), json!("PreemptLowerPriority")),
            }
        }
        "system-cluster-critical" => (json!(2_000_000_000), json!("PreemptLowerPriority")),
        "system-node-critical" => (json!(2_000_001_000), json!("PreemptLowerPriority")),
        name => match state.get("priorityclasses.scheduling.k8s.io", &Key::new("", name)) {
            Some(found) => class_values(&found.value),
            None => {
                return Err(Status::forbidden(
                    kind,
                    meta::name(pod),
                    format!("no PriorityClass with name {name} was found"),
                ));
            }
        },
    };
    meta::set(pod, &["spec", "priority"], value);
    if meta::get(pod, &["spec", "preemptionPolicy"]).is_null() {
        meta::set(pod, &["spec", "preemptionPolicy"], policy);
    }
    Ok(())
}

fn class_values(class: &Value) -> (Value, Value) {
    let policy = class.get("preemptionPolicy").cloned().unwrap_or_else(|| json!("PreemptLowerPriority"));
    (class["value"].clone(), policy)
}

/// Seconds a Pod stays on a node that has failed.
const TOLERATION_SECONDS: i64 = 300;

/// Lets a Pod stay a while on a node that is not ready or not reachable (plugin DefaultTolerationSeconds).
fn default_tolerations(pod: &mut Value) {
    let mut tolerations = meta::list(pod, &["spec", "tolerations"]).to_vec();
    let before = tolerations.len();
    for key in ["node.kubernetes.io/not-ready", "node.kubernetes.io/unreachable"] {
        let tolerated = tolerations[..before].iter().any(|toleration| {
            let effect = meta::text(toleration, &["effect"]);
            let own = meta::text(toleration, &["key"]);
            (own == key || own.is_empty()) && (effect == "NoExecute" || effect.is_empty())
        });
        if !tolerated {
            tolerations.push(json!({
                "key": key, "operator": "Exists", "effect": "NoExecute", "tolerationSeconds": TOLERATION_SECONDS,
            }));
        }
    }
    if tolerations.len() > before {
        meta::set(pod, &["spec", "tolerations"], Value::Array(tolerations));
    }
}

/// Gives an Ingress without a class the default one; of several the newest (plugin DefaultIngressClass).
fn default_ingress_class(ingress: &mut Value, state: &Snapshot) {
    if !meta::get(ingress, &["spec", "ingressClassName"]).is_null()
        || meta::annotation(ingress, "kubernetes.io/ingress.class").is_some()
    {
        return;
    }
    let class = state
        .list("ingressclasses.networking.k8s.io", None)
        .map(|object| &object.value)
        .filter(|class| meta::annotation(class, "ingressclass.kubernetes.io/is-default-class") == Some("true"))
        .max_by(|a, b| {
            let created = |class: &Value| meta::text(class, &["metadata", "creationTimestamp"]).to_owned();
            created(a).cmp(&created(b)).then_with(|| meta::name(b).cmp(meta::name(a)))
        });
    if let Some(class) = class {
        meta::set(ingress, &["spec", "ingressClassName"], json!(meta::name(class)));
    }
}

/// A new Node gets no Pods before it is ready (plugin TaintNodesByCondition); the node controller takes the taint away.
fn taint_new_node(node: &mut Value) {
    let key = "node.kubernetes.io/not-ready";
    let mut taints = meta::list(node, &["spec", "taints"]).to_vec();
    if taints.iter().any(|taint| meta::text(taint, &["key"]) == key && meta::text(taint, &["effect"]) == "NoSchedule") {
        return;
    }
    taints.push(json!({"key": key, "effect": "NoSchedule"}));
    meta::set(node, &["spec", "taints"], Value::Array(taints));
}

/// Gives a new Job the selector and labels that tell its Pods from all others (batch/job strategy, generateSelector).
pub fn job_selector(job: &mut Value, uid: &str) {
    if meta::get(job, &["spec", "manualSelector"]) == &json!(true) {
        return;
    }
    let name = meta::name(job).to_owned();
    let no_labels = meta::get(job, &["metadata", "labels"]).is_null();
    let labels = [
        ("batch.kubernetes.io/controller-uid", uid),
        ("batch.kubernetes.io/job-name", name.as_str()),
        ("controller-uid", uid),
        ("job-name", name.as_str()),
    ];
    for (key, value) in labels {
        meta::set(job, &["spec", "template", "metadata", "labels", key], json!(value));
    }
    meta::set(job, &["spec", "selector", "matchLabels", "batch.kubernetes.io/controller-uid"], json!(uid));
    if no_labels {
        let labels = meta::get(job, &["spec", "template", "metadata", "labels"]).clone();
        meta::set(job, &["metadata", "labels"], labels);
    }
}

/// Metadata only the server sets on a new object.
pub fn stamp(new: &mut Value, uid: &str, now: Timestamp) {
    meta::set(new, &["metadata", "uid"], json!(uid));
    meta::set(new, &["metadata", "creationTimestamp"], json!(meta::format_time(now)));
    for field in ["deletionTimestamp", "deletionGracePeriodSeconds", "selfLink", "resourceVersion"] {
        meta::remove(new, &["metadata", field]);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use portolan_api::kinds::Registry;

    #[test]
    fn pods_get_an_account_tolerations_and_a_priority() {
        let registry = Registry::builtin();
        let kind = registry.by_type_meta("v1", "Pod").expect("built in");
        let store = crate::store::Store::in_memory();
        let pod = json!({"metadata": {"namespace": "a", "name": "p"}, "spec": {"containers": [{"name": "c"}]}});
        let admission = Admission::default();
        let refused = admission.create(kind, &mut pod.clone(), &store.snapshot()).expect_err("no account");
        assert_eq!(
            refused.message,
            "pods \"p\" is forbidden: error looking up service account a/default: serviceaccount \"default\" not found"
        );
        let state = store
            .simulate(|txn| {
                txn.put("serviceaccounts", &Key::new("a", "default"), json!({"metadata": {"name": "default"}}));
                Ok(txn.state().clone())
            })
            .expect("state");
        let mut new = pod;
        admission.create(kind, &mut new, &state).expect("admitted");
        assert_eq!(new["spec"]["serviceAccountName"], "default");
        assert_eq!(new["spec"]["containers"][0]["volumeMounts"][0]["mountPath"], TOKEN_PATH);
        assert_eq!(new["spec"]["tolerations"].as_array().map(Vec::len), Some(2));
        assert_eq!(new["spec"]["priority"], 0);
    }

    #[test]
    fn an_ingress_without_a_class_gets_the_newest_default() {
        let registry = Registry::builtin();
        let kind = registry.by_gvr("networking.k8s.io", "v1", "ingresses").expect("built in");
        let class = |name: &str, created: &str| {
            json!({"metadata": {"name": name, "creationTimestamp": created,
                "annotations": {"ingressclass.kubernetes.io/is-default-class": "true"}}})
        };
        let state = crate::store::Store::in_memory()
            .simulate(|txn| {
                for (name, created) in [("old", "2020-01-01T00:00:00Z"), ("new", "2021-01-01T00:00:00Z")] {
                    txn.put("ingressclasses.networking.k8s.io", &Key::new("", name), class(name, created));
                }
                Ok(txn.state().clone())
            })
            .expect("state");
        let mut ingress = json!({"spec": {}});
        Admission::default().create(kind, &mut ingress, &state).expect("admitted");
        assert_eq!(ingress["spec"]["ingressClassName"], "new");
    }
}
