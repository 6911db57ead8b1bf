//! Role-based access control: whether the Roles bound to a user allow a request (`rbac.authorization.k8s.io/v1`).
//!
//! Decisions are made over a snapshot of the store and nothing else, so a change of a role or binding counts from the
//! next request on. What is stored has been validated; what is missing (a role that a binding names) is reported with
//! the refusal, as the reference implementation does.

pub mod aggregation;
pub mod bootstrap;
mod escalation;

use portolan_api::meta;
use portolan_api::status::quoted;
use serde_json::{Value, json};

use crate::auth::{Attributes, User};
use crate::store::{Key, Snapshot};

pub use escalation::check_write;

/// Collection names.
pub const ROLES: &str = "roles.rbac.authorization.k8s.io";
/// Collection of ClusterRoles.
pub const CLUSTER_ROLES: &str = "clusterroles.rbac.authorization.k8s.io";
/// Collection of RoleBindings.
pub const ROLE_BINDINGS: &str = "rolebindings.rbac.authorization.k8s.io";
/// Collection of ClusterRoleBindings.
pub const CLUSTER_ROLE_BINDINGS: &str = "clusterrolebindings.rbac.authorization.k8s.io";

/// Members of this group may do everything, whatever roles say.
pub const MASTERS: &str = "system:masters";

/// The answer to whether something is allowed, with its reason as reviews show it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Decision {
    /// Whether it is.
    pub allowed: bool,
    /// Why; may be empty.
    pub reason: String,
}

/// Whether the user may do this.
pub fn decide(state: &Snapshot, user: &User, attributes: &Attributes<'_>) -> Decision {
    if user.is_in(MASTERS) {
        return Decision { allowed: true, reason: String::new() };
    }
    let mut missing = Vec::new();
    for grant in grants(state, user, attributes.namespace) {
        match grant.rules(state) {
            Ok(rules) if rules.iter().any(|rule| allows(rule, attributes)) => {
                return Decision { allowed: true, reason: format!("RBAC: allowed by {}", grant.describe()) };
            }
            Ok(_) => {}
            Err(error) => missing.push(error),
        }
    }
    let reason = match missing.as_slice() {
        [] => String::new(),
        [one] => format!("RBAC: {one}"),
        several => format!("RBAC: [{}]", several.join(", ")),
    };
    Decision { allowed: false, reason }
}

/// All rules that hold for a user in a namespace (and cluster-wide), and what could not be resolved.
pub fn rules_for(state: &Snapshot, user: &User, namespace: &str) -> (Vec<Value>, Vec<String>) {
    let mut rules = Vec::new();
    let mut missing = Vec::new();
    for grant in grants(state, user, namespace) {
        match grant.rules(state) {
            Ok(found) => rules.extend(found.iter().cloned()),
            Err(error) => missing.push(error),
        }
    }
    (rules, missing)
}

/// The status of a SelfSubjectRulesReview.
pub fn rules_review(state: &Snapshot, user: &User, namespace: &str) -> Value {
    let (rules, missing) = rules_for(state, user, namespace);
    let part = |rule: &Value, fields: &[&str]| {
        let mut out = json!({});
        for field in fields {
            meta::put(&mut out, &[field], meta::get(rule, &[field]).clone());
        }
        out
    };
    let has = |rule: &Value, field: &str| !meta::list(rule, &[field]).is_empty();
    let resources: Vec<Value> = rules
        .iter()
        .filter(|rule| has(rule, "resources"))
        .map(|rule| part(rule, &["verbs", "apiGroups", "resources", "resourceNames"]))
        .collect();
    let paths: Vec<Value> = rules
        .iter()
        .filter(|rule| has(rule, "nonResourceURLs"))
        .map(|rule| part(rule, &["verbs", "nonResourceURLs"]))
        .collect();
    let mut status = json!({
        "resourceRules": resources, "nonResourceRules": paths, "incomplete": !missing.is_empty(),
    });
    if !missing.is_empty() {
        status["evaluationError"] = json!(missing.join(", "));
    }
    status
}

/// A binding that names the user.
struct Grant<'a> {
    binding: &'a Value,
    subject: &'a Value,
    /// Namespace of a RoleBinding; empty for a ClusterRoleBinding.
    namespace: &'a str,
}

impl<'a> Grant<'a> {
    fn rules(&self, state: &'a Snapshot) -> Result<&'a [Value], String> {
        role_rules(state, meta::get(self.binding, &["roleRef"]), self.namespace)
    }

    fn describe(&self) -> String {
        let name = meta::name(self.binding);
        let (kind, name) = if self.namespace.is_empty() {
            ("ClusterRoleBinding", name.to_owned())
        } else {
            ("RoleBinding", format!("{name}/{}", self.namespace))
        };
        let subject_name = match meta::text(self.subject, &["kind"]) {
            "ServiceAccount" => {
                format!("{}/{}", meta::text(self.subject, &["name"]), subject_namespace(self.subject, self.namespace))
            }
            _ => meta::text(self.subject, &["name"]).to_owned(),
        };
        format!(
            "{kind} {} of {} {} to {} {}",
            quoted(&name),
            meta::text(self.binding, &["roleRef", "kind"]),
            quoted(meta::text(self.binding, &["roleRef", "name"])),
            meta::text(self.subject, &["kind"]),
            quoted(&subject_name),
        )
    }
}

fn grants<'a>(state: &'a Snapshot, user: &'a User, namespace: &'a str) -> impl Iterator<Item = Grant<'a>> {
    let cluster = state.list(CLUSTER_ROLE_BINDINGS, None).map(|object| (object, ""));
    let scoped: Box<dyn Iterator<Item = _> + Send> =
        if namespace.is_empty() { Box::new(std::iter::empty()) } else { state.list(ROLE_BINDINGS, Some(namespace)) };
    cluster.chain(scoped.map(move |object| (object, namespace))).filter_map(move |(object, namespace)| {
        let subject = meta::list(&object.value, &["subjects"]).iter().find(|s| names(s, user, namespace))?;
        Some(Grant { binding: &object.value, subject, namespace })
    })
}

fn subject_namespace<'a>(subject: &'a Value, binding_namespace: &'a str) -> &'a str {
    match meta::text(subject, &["namespace"]) {
        "" => binding_namespace,
        namespace => namespace,
    }
}

/// Whether a subject of a binding is this user.
fn names(subject: &Value, user: &User, binding_namespace: &str) -> bool {
    let name = meta::text(subject, &["name"]);
    match meta::text(subject, &["kind"]) {
        "User" => user.name == name,
        "Group" => user.is_in(name),
        "ServiceAccount" => {
            let namespace = subject_namespace(subject, binding_namespace);
            let account = user.name.strip_prefix("system:serviceaccount:").and_then(|rest| rest.split_once(':'));
            !namespace.is_empty() && account == Some((namespace, name))
        }
        _ => false,
    }
}

/// The rules of the role that a binding in `namespace` refers to.
///
/// # Errors
/// The text of the 404, if there is no such role.
pub fn role_rules<'a>(state: &'a Snapshot, role_ref: &Value, namespace: &str) -> Result<&'a [Value], String> {
    let name = meta::text(role_ref, &["name"]);
    let (collection, key, resource) = match meta::text(role_ref, &["kind"]) {
        "Role" => (ROLES, Key::new(namespace, name), "role"),
        _ => (CLUSTER_ROLES, Key::new("", name), "clusterrole"),
    };
    match state.get(collection, &key) {
        Some(role) => Ok(meta::list(&role.value, &["rules"])),
        None => Err(format!("{resource}.rbac.authorization.k8s.io {} not found", quoted(name))),
    }
}

fn texts<'a>(rule: &'a Value, field: &str) -> impl Iterator<Item = &'a str> {
    meta::list(rule, &[field]).iter().filter_map(Value::as_str)
}

fn has(rule: &Value, field: &str, wanted: &str) -> bool {
    texts(rule, field).any(|text| text == "*" || text == wanted)
}

/// Whether a rule allows a request.
fn allows(rule: &Value, attributes: &Attributes<'_>) -> bool {
    if !has(rule, "verbs", attributes.verb) {
        return false;
    }
    if attributes.resource.is_empty() {
        return texts(rule, "nonResourceURLs").any(|pattern| path_matches(pattern, attributes.path));
    }
    has(rule, "apiGroups", attributes.group)
        && texts(rule, "resources").any(|pattern| resource_matches(pattern, attributes.resource))
        && (meta::list(rule, &["resourceNames"]).is_empty()
            || texts(rule, "resourceNames").any(|name| !name.is_empty() && name == attributes.name))
}

/// `*` is everything with all subresources, `*/scale` that subresource of everything.
fn resource_matches(pattern: &str, resource: &str) -> bool {
    if pattern == "*" || pattern == resource {
        return true;
    }
    match (pattern.strip_prefix("*/"), resource.split_once('/')) {
        (Some(wanted), Some((_, subresource))) => wanted == subresource,
        _ => false,
    }
}

/// A pattern may end in `*`.
fn path_matches(pattern: &str, path: &str) -> bool {
    pattern == "*" || pattern == path || pattern.strip_suffix('*').is_some_and(|prefix| path.starts_with(prefix))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::store::Store;

    fn state(objects: &[(&str, &str, Value)]) -> Snapshot {
        Store::in_memory()
            .simulate(|txn| {
                for (collection, namespace, value) in objects {
                    txn.put(collection, &Key::new(namespace, meta::name(value)), value.clone());
                }
                Ok(txn.state().clone())
            })
            .expect("a state")
    }

    fn role(name: &str, rules: Value) -> Value {
        json!({"metadata": {"name": name}, "rules": rules})
    }

    fn binding(name: &str, kind: &str, role: &str, subject: Value) -> Value {
        json!({"metadata": {"name": name}, "roleRef": {"kind": kind, "name": role}, "subjects": [subject]})
    }

    fn pods<'a>(verb: &'a str, namespace: &'a str) -> Attributes<'a> {
        Attributes { verb, group: "", resource: "pods", namespace, name: "", path: "" }
    }

    #[test]
    fn rules_match_as_documented() {
        let rule = |text: &str| serde_json::from_str::<Value>(text).expect("json");
        let request =
            |verb, group, resource, name| Attributes { verb, group, resource, namespace: "n", name, path: "" };
        let path = |path| Attributes { verb: "get", group: "", resource: "", namespace: "", name: "", path };
        let get_pods = r#"{"verbs":["get"],"apiGroups":[""],"resources":["pods"]}"#;
        let scale = r#"{"verbs":["*"],"apiGroups":["*"],"resources":["*/scale"]}"#;
        let named = r#"{"verbs":["get","list"],"apiGroups":[""],"resources":["secrets"],"resourceNames":["a"]}"#;
        let everything = r#"{"verbs":["*"],"apiGroups":["*"],"resources":["*"]}"#;
        let urls = r#"{"verbs":["get"],"nonResourceURLs":["/api","/openapi/*"]}"#;
        let rows = [
            ("the_resource", get_pods, request("get", "", "pods", "x"), true),
            ("another_verb", get_pods, request("list", "", "pods", ""), false),
            ("another_group", get_pods, request("get", "metrics.k8s.io", "pods", "x"), false),
            ("a_subresource_is_its_own_resource", get_pods, request("get", "", "pods/log", "x"), false),
            ("any_scale", scale, request("update", "apps", "deployments/scale", "x"), true),
            ("not_the_resource_itself", scale, request("update", "apps", "deployments", "x"), false),
            ("not_another_subresource", scale, request("update", "apps", "deployments/status", "x"), false),
            ("the_name", named, request("get", "", "secrets", "a"), true),
            ("another_name", named, request("get", "", "secrets", "b"), false),
            ("a_list_of_all_names", named, request("list", "", "secrets", ""), false),
            ("all_with_subresources", everything, request("create", "", "pods/exec", "x"), true),
            ("resources_are_no_paths", everything, path("/metrics"), false),
            ("a_path", urls, path("/api"), true),
            ("no_prefix", urls, path("/api/v1"), false),
            ("a_pattern", urls, path("/openapi/v3"), true),
        ];
        for (name, rule_text, attributes, want) in rows {
            assert_eq!(allows(&rule(rule_text), &attributes), want, "{name}");
        }
    }

    #[test]
    fn bindings_reach_users_groups_and_accounts_in_their_scope() {
        let rules = json!([{"verbs": ["list"], "apiGroups": [""], "resources": ["pods"]}]);
        let role_objects = |bindings: Vec<(&'static str, &'static str, Value)>| {
            let mut all = vec![(ROLES, "n", role("r", rules.clone())), (CLUSTER_ROLES, "", role("c", rules.clone()))];
            all.extend(bindings);
            state(&all)
        };
        let user = User::new("jane", &["devs"]);
        let account = User::service_account("n", "sa");
        let on_user = json!({"kind": "User", "name": "jane"});
        let on_group = json!({"kind": "Group", "name": "devs"});
        let on_account = json!({"kind": "ServiceAccount", "name": "sa"});
        let on_account_of_n = json!({"kind": "ServiceAccount", "name": "sa", "namespace": "n"});
        let scoped = |role_kind, role, subject| vec![(ROLE_BINDINGS, "n", binding("b", role_kind, role, subject))];
        let wide = |subject| vec![(CLUSTER_ROLE_BINDINGS, "", binding("b", "ClusterRole", "c", subject))];
        let rows = [
            ("a_role", scoped("Role", "r", on_user.clone()), &user, "n", true),
            ("elsewhere", scoped("Role", "r", on_user.clone()), &user, "m", false),
            ("not_all_namespaces", scoped("Role", "r", on_user.clone()), &user, "", false),
            ("a_cluster_role_in_a_namespace", scoped("ClusterRole", "c", on_group.clone()), &user, "n", true),
            ("account_of_the_binding_s_namespace", scoped("Role", "r", on_account.clone()), &account, "n", true),
            ("cluster_wide", wide(on_group), &user, "", true),
            ("cluster_wide_reaches_namespaces", wide(on_user), &user, "m", true),
            ("cluster_wide_account", wide(on_account_of_n), &account, "m", true),
            ("an_account_without_namespace_is_nobody", wide(on_account), &account, "m", false),
        ];
        for (name, bindings, user, namespace, want) in rows {
            let decision = decide(&role_objects(bindings), user, &pods("list", namespace));
            assert_eq!(decision.allowed, want, "{name}: {}", decision.reason);
        }
    }

    #[test]
    fn reasons_name_the_binding_or_what_is_missing() {
        let rules = json!([{"verbs": ["list"], "apiGroups": [""], "resources": ["pods"]}]);
        let account = User::service_account("n", "sa");
        let subject = json!({"kind": "ServiceAccount", "name": "sa"});
        let with =
            state(&[(ROLES, "n", role("r", rules)), (ROLE_BINDINGS, "n", binding("b", "Role", "r", subject.clone()))]);
        let got = decide(&with, &account, &pods("list", "n"));
        assert_eq!(got.reason, "RBAC: allowed by RoleBinding \"b/n\" of Role \"r\" to ServiceAccount \"sa/n\"");
        let without = state(&[(ROLE_BINDINGS, "n", binding("b", "ClusterRole", "gone", subject))]);
        let got = decide(&without, &account, &pods("list", "n"));
        assert_eq!(got.reason, "RBAC: clusterrole.rbac.authorization.k8s.io \"gone\" not found");
        assert!(decide(&Snapshot::default(), &User::admin(), &pods("list", "n")).allowed);
    }
}
