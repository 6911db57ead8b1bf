//! The roles and bindings every cluster has (plugin/pkg/auth/authorizer/rbac/bootstrappolicy of the reference
//! implementation), as far as kinds and components exist here.
//!
//! Like there, they are put right at every start: rules and subjects that are missing come back, additions stay. An
//! object whose annotation `rbac.authorization.kubernetes.io/autoupdate` is not `true` is left alone.

use portolan_api::meta;
use serde_json::{Value, json};

const AUTOUPDATE: &str = "rbac.authorization.kubernetes.io/autoupdate";
const AUTHENTICATED: &str = "system:authenticated";

const READ: &str = "get list watch";
const WRITE: &str = "create delete deletecollection patch update";
const READ_WRITE: &str = "create delete deletecollection get list patch update watch";

/// Verbs, groups (`core` for the core group) and resources, each separated by blanks.
type Rule = (&'static str, &'static str, &'static str);

/// Name and rules. Names of kinds that are not served do no harm; they are there for roles to be comparable.
const CLUSTER_ROLES: &[(&str, &[Rule])] = &[
    (
        "system:basic-user",
        &[
            ("create", "authorization.k8s.io", "selfsubjectaccessreviews selfsubjectrulesreviews"),
            ("create", "authentication.k8s.io", "selfsubjectreviews"),
        ],
    ),
    (
        "system:aggregate-to-admin",
        &[
            ("create", "authorization.k8s.io", "localsubjectaccessreviews"),
            (READ_WRITE, "rbac.authorization.k8s.io", "rolebindings roles"),
        ],
    ),
    (
        "system:aggregate-to-edit",
        &[
            (READ, "core", "pods/attach pods/exec pods/portforward pods/proxy secrets services/proxy"),
            ("impersonate", "core", "serviceaccounts"),
            (WRITE, "core", "pods pods/attach pods/exec pods/portforward pods/proxy"),
            ("create", "core", "pods/eviction"),
            (
                WRITE,
                "core",
                "configmaps events persistentvolumeclaims replicationcontrollers replicationcontrollers/scale secrets \
                 serviceaccounts services services/proxy",
            ),
            ("create", "core", "serviceaccounts/token"),
            (
                WRITE,
                "apps",
                "daemonsets deployments deployments/rollback deployments/scale replicasets replicasets/scale \
                 statefulsets statefulsets/scale",
            ),
            (WRITE, "autoscaling", "horizontalpodautoscalers"),
            (WRITE, "batch", "cronjobs jobs"),
            (WRITE, "policy", "poddisruptionbudgets"),
            (WRITE, "networking.k8s.io", "ingresses networkpolicies"),
            (READ_WRITE, "coordination.k8s.io", "leases"),
        ],
    ),
    (
        "system:aggregate-to-view",
        &[
            (
                READ,
                "core",
                "configmaps endpoints persistentvolumeclaims persistentvolumeclaims/status pods replicationcontrollers \
                 replicationcontrollers/scale serviceaccounts services services/status",
            ),
            (
                READ,
                "core",
                "bindings events limitranges namespaces/status pods/log pods/status replicationcontrollers/status \
                 resourcequotas resourcequotas/status",
            ),
            (READ, "core", "namespaces"),
            (READ, "discovery.k8s.io", "endpointslices"),
            (
                READ,
                "apps",
                "controllerrevisions daemonsets daemonsets/status deployments deployments/scale deployments/status \
                 replicasets replicasets/scale replicasets/status statefulsets statefulsets/scale statefulsets/status",
            ),
            (READ, "autoscaling", "horizontalpodautoscalers horizontalpodautoscalers/status"),
            (READ, "batch", "cronjobs cronjobs/status jobs jobs/status"),
            (READ, "policy", "poddisruptionbudgets poddisruptionbudgets/status"),
            (READ, "networking.k8s.io", "ingresses ingresses/status networkpolicies"),
        ],
    ),
    (
        "system:auth-delegator",
        &[
            ("create", "authentication.k8s.io", "tokenreviews"),
            ("create", "authorization.k8s.io", "subjectaccessreviews"),
        ],
    ),
    (
        "system:kubelet-api-admin",
        &[
            ("get list watch", "core", "nodes"),
            ("proxy", "core", "nodes"),
            (
                "*",
                "core",
                "nodes/checkpoint nodes/configz nodes/healthz nodes/log nodes/metrics nodes/pods nodes/proxy nodes/spec \
                 nodes/stats",
            ),
        ],
    ),
    (
        "system:node",
        &[
            ("create", "authentication.k8s.io", "tokenreviews"),
            ("create", "authorization.k8s.io", "localsubjectaccessreviews subjectaccessreviews"),
            (READ, "core", "services"),
            ("create get list watch", "core", "nodes"),
            ("patch update", "core", "nodes/status"),
            ("patch update", "core", "nodes"),
            ("create patch update", "core", "events"),
            (READ, "core", "pods"),
            ("create delete", "core", "pods"),
            ("patch update", "core", "pods/status"),
            ("create", "core", "pods/eviction"),
            (READ, "core", "configmaps secrets"),
            ("get", "core", "persistentvolumeclaims persistentvolumes"),
            ("get", "core", "endpoints"),
            ("create delete get patch update", "coordination.k8s.io", "leases"),
            ("create", "core", "serviceaccounts/token"),
            ("get", "core", "serviceaccounts"),
            (READ, "node.k8s.io", "runtimeclasses"),
        ],
    ),
    (
        "system:node-proxier",
        &[
            ("list watch", "core", "endpoints services"),
            (READ, "core", "nodes"),
            ("create patch update", "core", "events"),
            ("create patch update", "events.k8s.io", "events"),
            ("list watch", "discovery.k8s.io", "endpointslices"),
            ("list watch", "networking.k8s.io", "servicecidrs"),
        ],
    ),
    (
        "system:kube-controller-manager",
        &[
            ("create patch update", "core", "events"),
            ("create patch update", "events.k8s.io", "events"),
            ("create get update watch", "coordination.k8s.io", "leases"),
            ("create", "core", "secrets serviceaccounts"),
            ("delete", "core", "secrets"),
            ("get", "core", "configmaps namespaces secrets serviceaccounts"),
            ("update", "core", "secrets serviceaccounts"),
            ("create", "authentication.k8s.io", "tokenreviews"),
            ("create", "authorization.k8s.io", "subjectaccessreviews"),
            ("list watch", "*", "*"),
            ("create", "core", "serviceaccounts/token"),
        ],
    ),
    (
        "system:kube-scheduler",
        &[
            ("create patch update", "core", "events"),
            ("create patch update", "events.k8s.io", "events"),
            ("create get list update watch", "coordination.k8s.io", "leases"),
            (READ, "core", "nodes"),
            ("delete get list watch", "core", "pods"),
            ("create", "core", "bindings pods/binding"),
            ("patch update", "core", "pods/status"),
            (READ, "core", "replicationcontrollers services"),
            (READ, "apps", "replicasets statefulsets"),
            (READ, "policy", "poddisruptionbudgets"),
            (READ, "core", "namespaces persistentvolumeclaims persistentvolumes"),
            ("create", "authentication.k8s.io", "tokenreviews"),
            ("create", "authorization.k8s.io", "subjectaccessreviews"),
        ],
    ),
    (
        "system:kube-dns",
        &[("list watch", "core", "endpoints services"), ("list watch", "discovery.k8s.io", "endpointslices")],
    ),
];

/// Roles about paths: name and the paths that may be read.
const PATH_ROLES: &[(&str, &str)] = &[
    ("system:discovery", "/api /api/* /apis /apis/* /healthz /livez /openapi /openapi/* /readyz /version /version/"),
    ("system:monitoring", "/healthz /healthz/* /livez /livez/* /metrics /metrics/slis /readyz /readyz/*"),
    ("system:public-info-viewer", "/healthz /livez /readyz /version /version/"),
    (
        "system:service-account-issuer-discovery",
        "/.well-known/openid-configuration /.well-known/openid-configuration/ /openid/v1/jwks /openid/v1/jwks/",
    ),
];

/// Roles for people, made of others: name and the label that others carry.
const AGGREGATED: &[(&str, &str)] = &[("admin", "admin"), ("edit", "edit"), ("view", "view")];

/// ClusterRoleBindings: name (and role), kind and name of each subject.
const BINDINGS: &[(&str, &[(&str, &str)])] = &[
    ("cluster-admin", &[("Group", "system:masters")]),
    ("system:monitoring", &[("Group", "system:monitoring")]),
    ("system:discovery", &[("Group", AUTHENTICATED)]),
    ("system:basic-user", &[("Group", AUTHENTICATED)]),
    ("system:public-info-viewer", &[("Group", AUTHENTICATED), ("Group", "system:unauthenticated")]),
    ("system:node-proxier", &[("User", "system:kube-proxy")]),
    ("system:kube-controller-manager", &[("User", "system:kube-controller-manager")]),
    ("system:kube-scheduler", &[("User", "system:kube-scheduler")]),
    ("system:kube-dns", &[("ServiceAccount", "kube-system/kube-dns")]),
    ("system:service-account-issuer-discovery", &[("Group", "system:serviceaccounts")]),
    ("system:node", &[]),
];

fn words(text: &str) -> Vec<&str> {
    text.split_whitespace().map(|word| if word == "core" { "" } else { word }).collect()
}

fn metadata(name: &str) -> Value {
    json!({
        "name": name,
        "annotations": {AUTOUPDATE: "true"},
        "labels": {"kubernetes.io/bootstrapping": "rbac-defaults"},
    })
}

fn aggregates_to(level: &str) -> String {
    format!("rbac.authorization.k8s.io/aggregate-to-{level}")
}

fn role(name: &str, rules: &Value) -> Value {
    let mut role = json!({
        "apiVersion": "rbac.authorization.k8s.io/v1", "kind": "ClusterRole", "metadata": metadata(name), "rules": rules,
    });
    let label = match name {
        "edit" => Some("admin"),
        "view" => Some("edit"),
        other => other.strip_prefix("system:aggregate-to-"),
    };
    if let Some(level) = label {
        meta::set(&mut role, &["metadata", "labels", &aggregates_to(level)], json!("true"));
    }
    role
}

/// The ClusterRoles.
pub fn cluster_roles() -> Vec<Value> {
    let everything = json!([
        {"apiGroups": ["*"], "resources": ["*"], "verbs": ["*"]},
        {"nonResourceURLs": ["*"], "verbs": ["*"]},
    ]);
    let mut roles = vec![role("cluster-admin", &everything)];
    for (name, rules) in CLUSTER_ROLES {
        let rules: Vec<Value> = rules
            .iter()
            .map(|(verbs, groups, resources)| {
                json!({"apiGroups": words(groups), "resources": words(resources), "verbs": words(verbs)})
            })
            .collect();
        roles.push(role(name, &json!(rules)));
    }
    for (name, paths) in PATH_ROLES {
        roles.push(role(name, &json!([{"nonResourceURLs": words(paths), "verbs": ["get"]}])));
    }
    for (name, level) in AGGREGATED {
        let mut aggregated = role(name, &Value::Null);
        aggregated["aggregationRule"] =
            json!({"clusterRoleSelectors": [{"matchLabels": {aggregates_to(level): "true"}}]});
        roles.push(aggregated);
    }
    roles
}

/// The ClusterRoleBindings.
pub fn cluster_role_bindings() -> Vec<Value> {
    let group = "rbac.authorization.k8s.io";
    let subject = |(kind, name): &(&str, &str)| match name.split_once('/') {
        Some((namespace, name)) => json!({"kind": kind, "namespace": namespace, "name": name}),
        None => json!({"kind": kind, "apiGroup": group, "name": name}),
    };
    let binding = |(name, subjects): &(&str, &[(&str, &str)])| {
        let mut binding = json!({
            "apiVersion": "rbac.authorization.k8s.io/v1",
            "kind": "ClusterRoleBinding",
            "metadata": metadata(name),
            "roleRef": {"apiGroup": group, "kind": "ClusterRole", "name": name},
        });
        if !subjects.is_empty() {
            binding["subjects"] = subjects.iter().map(subject).collect();
        }
        binding
    };
    BINDINGS.iter().map(binding).collect()
}

/// What a stored role or binding must become so that nothing of `wanted` is missing; `None` if it may stay.
pub fn repaired(stored: &Value, wanted: &Value) -> Option<Value> {
    if meta::annotation(stored, AUTOUPDATE) != Some("true") {
        return None;
    }
    let mut new = stored.clone();
    for field in ["rules", "subjects"] {
        // The rules of aggregated roles follow from others.
        if field == "rules" && !meta::get(wanted, &["aggregationRule"]).is_null() {
            continue;
        }
        let mut list = meta::list(stored, &[field]).to_vec();
        let missing = meta::list(wanted, &[field]).iter().filter(|item| !list.contains(item)).cloned();
        let missing: Vec<Value> = missing.collect();
        if !missing.is_empty() {
            list.extend(missing);
            meta::set(&mut new, &[field], Value::Array(list));
        }
    }
    (new != *stored).then_some(new)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn bindings_name_roles_that_exist() {
        let roles = cluster_roles();
        for binding in cluster_role_bindings() {
            let name = meta::text(&binding, &["roleRef", "name"]);
            assert!(roles.iter().any(|role| meta::name(role) == name), "{name}");
        }
    }

    #[test]
    fn what_is_missing_comes_back_and_additions_stay() {
        let wanted = cluster_roles().into_iter().find(|role| meta::name(role) == "system:node").expect("there");
        assert_eq!(repaired(&wanted, &wanted), None);
        let extra = json!({"verbs": ["get"], "apiGroups": ["x"], "resources": ["y"]});
        let mut stored = wanted.clone();
        stored["rules"] = json!([extra]);
        let new = repaired(&stored, &wanted).expect("a repair");
        let rules = meta::list(&new, &["rules"]);
        assert!(rules.contains(&extra) && rules.len() == meta::list(&wanted, &["rules"]).len() + 1);
        meta::set(&mut stored, &["metadata", "annotations", AUTOUPDATE], json!("false"));
        assert_eq!(repaired(&stored, &wanted), None);
    }
}
