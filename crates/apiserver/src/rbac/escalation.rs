//! Nobody grants more than they have: what is checked when a role or a binding is written
//! (registry/rbac/*/policybased of the reference implementation).

use std::collections::{BTreeMap, BTreeSet};

use portolan_api::kinds::Kind;
use portolan_api::meta;
use portolan_api::status::{Status, quoted};
use serde_json::{Value, json};

use super::{MASTERS, decide, role_rules, rules_for};
use crate::auth::{Attributes, User};
use crate::store::Snapshot;

const GROUP: &str = "rbac.authorization.k8s.io";

/// Refuses a role or binding that gives away what its writer does not have, unless the writer may `escalate` or `bind`.
pub fn check_write(state: &Snapshot, user: &User, kind: &Kind, new: &Value, old: Option<&Value>) -> Result<(), Status> {
    if kind.group != GROUP || user.is_in(MASTERS) {
        return Ok(());
    }
    let namespace = meta::namespace(new);
    let name = meta::name(new);
    let may = |verb: &str, resource: &str, name: &str| {
        decide(state, user, &Attributes { verb, group: GROUP, resource, namespace, name, path: "" }).allowed
    };
    let refuse = |why: String| Status::forbidden(kind, name, why);
    match kind.kind.as_str() {
        "Role" | "ClusterRole" => {
            let unchanged = old.is_some_and(|old| {
                let aggregation = ["aggregationRule"];
                meta::list(old, &["rules"]) == meta::list(new, &["rules"])
                    && meta::get(old, &aggregation) == meta::get(new, &aggregation)
            });
            if unchanged {
                return Ok(());
            }
            if may("escalate", &kind.plural, name) {
                return Ok(());
            }
            if !meta::get(new, &["aggregationRule"]).is_null() {
                let everything = [
                    json!({"verbs": ["*"], "apiGroups": ["*"], "resources": ["*"]}),
                    json!({"verbs": ["*"], "nonResourceURLs": ["*"]}),
                ];
                if confirm(state, user, namespace, &everything).is_err() {
                    return Err(refuse("must have cluster-admin privileges to use the aggregationRule".to_owned()));
                }
            }
            confirm(state, user, namespace, meta::list(new, &["rules"])).map_err(refuse)
        }
        "RoleBinding" | "ClusterRoleBinding" => {
            if old.is_some_and(|old| only_references_change(old, new)) {
                return Ok(());
            }
            let role = meta::get(new, &["roleRef"]);
            let resource = if meta::text(role, &["kind"]) == "Role" { "roles" } else { "clusterroles" };
            if may("bind", resource, meta::text(role, &["name"])) {
                return Ok(());
            }
            let rules = role_rules(state, role, namespace).map_err(|text| Status::new(404, "NotFound", text))?;
            confirm(state, user, namespace, rules).map_err(refuse)
        }
        _ => Ok(()),
    }
}

/// The garbage collector may let go of a binding whose role it could not grant.
fn only_references_change(old: &Value, new: &Value) -> bool {
    let bare = |object: &Value| {
        let mut object = object.clone();
        for field in ["finalizers", "ownerReferences", "managedFields", "resourceVersion"] {
            meta::remove(&mut object, &["metadata", field]);
        }
        object
    };
    bare(old) == bare(new)
}

/// Whether the user has all that these rules allow; else what is missing.
fn confirm(state: &Snapshot, user: &User, namespace: &str, rules: &[Value]) -> Result<(), String> {
    let (own, unresolved) = rules_for(state, user, namespace);
    let missing: Vec<Rule> =
        rules.iter().flat_map(broken_down).filter(|wanted| !own.iter().any(|rule| covers(rule, wanted))).collect();
    if missing.is_empty() {
        return Ok(());
    }
    let descriptions: BTreeSet<String> = compacted(missing).iter().map(describe).collect();
    let descriptions: Vec<String> = descriptions.into_iter().collect();
    let groups: Vec<String> = user.groups.iter().map(|group| quoted(group)).collect();
    let mut text = format!(
        "user {} (groups=[{}]) is attempting to grant RBAC permissions not currently held:\n{}",
        quoted(&user.name),
        groups.join(" "),
        descriptions.join("\n")
    );
    if !unresolved.is_empty() {
        text.push_str(&format!("; resolution errors: [{}]", unresolved.join(" ")));
    }
    Err(text)
}

/// One verb on one thing; a path has no resource and the other way round.
#[derive(Clone, Debug, Default, PartialEq, Eq, PartialOrd, Ord)]
struct Rule {
    group: Option<String>,
    resource: Option<String>,
    name: Option<String>,
    path: Option<String>,
    verbs: Vec<String>,
}

fn broken_down(rule: &Value) -> Vec<Rule> {
    let texts = |field: &str| -> Vec<String> { super::texts(rule, field).map(str::to_owned).collect() };
    let names: Vec<Option<String>> = match texts("resourceNames") {
        names if names.is_empty() => vec![None],
        names => names.into_iter().map(Some).collect(),
    };
    let mut out = Vec::new();
    for group in texts("apiGroups") {
        for resource in texts("resources") {
            for verb in texts("verbs") {
                for name in &names {
                    let (group, resource) = (Some(group.clone()), Some(resource.clone()));
                    out.push(Rule { group, resource, name: name.clone(), path: None, verbs: vec![verb.clone()] });
                }
            }
        }
    }
    for path in texts("nonResourceURLs") {
        for verb in texts("verbs") {
            out.push(Rule { path: Some(path.clone()), verbs: vec![verb], ..Rule::default() });
        }
    }
    out
}

/// Whether an owner's rule includes one permission.
fn covers(rule: &Value, wanted: &Rule) -> bool {
    let has = |field: &str, text: &str| super::has(rule, field, text);
    let verbs = wanted.verbs.iter().all(|verb| has("verbs", verb));
    if let Some(path) = &wanted.path {
        let covered = |pattern: &str| {
            pattern == "*" || pattern == path || pattern.strip_suffix('*').is_some_and(|start| path.starts_with(start))
        };
        return verbs && super::texts(rule, "nonResourceURLs").any(covered);
    }
    let (group, resource) =
        (wanted.group.as_deref().unwrap_or_default(), wanted.resource.as_deref().unwrap_or_default());
    let names = meta::list(rule, &["resourceNames"]);
    let named = match &wanted.name {
        None => names.is_empty(),
        Some(name) => names.is_empty() || names.iter().any(|own| own == name.as_str()),
    };
    verbs
        && has("apiGroups", group)
        && super::texts(rule, "resources").any(|pattern| super::resource_matches(pattern, resource))
        && named
}

/// Joins the verbs of permissions on one thing.
fn compacted(rules: Vec<Rule>) -> Vec<Rule> {
    let mut joined: BTreeMap<Rule, Vec<String>> = BTreeMap::new();
    let mut order = Vec::new();
    for mut rule in rules {
        let verbs = std::mem::take(&mut rule.verbs);
        if rule.path.is_some() {
            rule.verbs = verbs;
            order.push(rule);
            continue;
        }
        if !joined.contains_key(&rule) {
            order.push(rule.clone());
        }
        joined.entry(rule).or_default().extend(verbs);
    }
    for rule in &mut order {
        if let Some(verbs) = joined.remove(rule) {
            rule.verbs = verbs;
        }
    }
    order
}

fn describe(rule: &Rule) -> String {
    let mut parts = Vec::new();
    for (label, value) in [
        ("APIGroups", &rule.group),
        ("Resources", &rule.resource),
        ("NonResourceURLs", &rule.path),
        ("ResourceNames", &rule.name),
    ] {
        if let Some(value) = value {
            parts.push(format!("{label}:[{}]", quoted(value)));
        }
    }
    let verbs: Vec<String> = rule.verbs.iter().map(|verb| quoted(verb)).collect();
    parts.push(format!("Verbs:[{}]", verbs.join(" ")));
    format!("{{{}}}", parts.join(", "))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_rule_covers_what_it_includes() {
        let rows = [
            (
                "wildcards",
                json!({"verbs": ["*"], "apiGroups": ["*"], "resources": ["*"]}),
                json!({"verbs": ["get"], "apiGroups": ["a"], "resources": ["b/c"]}),
                true,
            ),
            (
                "a_wildcard_is_more_than_any_list",
                json!({"verbs": ["get", "list"], "apiGroups": [""], "resources": ["pods"]}),
                json!({"verbs": ["*"], "apiGroups": [""], "resources": ["pods"]}),
                false,
            ),
            (
                "all_names_are_more_than_one",
                json!({"verbs": ["get"], "apiGroups": [""], "resources": ["pods"], "resourceNames": ["a"]}),
                json!({"verbs": ["get"], "apiGroups": [""], "resources": ["pods"]}),
                false,
            ),
            (
                "one_name_of_all",
                json!({"verbs": ["get"], "apiGroups": [""], "resources": ["pods"]}),
                json!({"verbs": ["get"], "apiGroups": [""], "resources": ["pods"], "resourceNames": ["a"]}),
                true,
            ),
            (
                "a_path_below_a_pattern",
                json!({"verbs": ["get"], "nonResourceURLs": ["/healthz/*"]}),
                json!({"verbs": ["get"], "nonResourceURLs": ["/healthz/ping"]}),
                true,
            ),
        ];
        for (name, own, wanted, want) in rows {
            assert_eq!(broken_down(&wanted).iter().all(|wanted| covers(&own, wanted)), want, "{name}");
        }
    }

    #[test]
    fn missing_permissions_are_listed_compactly() {
        let rule = json!({"verbs": ["get", "list"], "apiGroups": [""], "resources": ["pods", "secrets"]});
        let text = confirm(&Snapshot::default(), &User::new("u", &["g"]), "n", &[rule]).expect_err("refused");
        assert_eq!(
            text,
            "user \"u\" (groups=[\"g\" \"system:authenticated\"]) is attempting to grant RBAC permissions not currently \
             held:\n{APIGroups:[\"\"], Resources:[\"pods\"], Verbs:[\"get\" \"list\"]}\n\
             {APIGroups:[\"\"], Resources:[\"secrets\"], Verbs:[\"get\" \"list\"]}"
        );
    }
}
