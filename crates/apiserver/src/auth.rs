//! Who asks, and may they.

use std::collections::BTreeMap;

use http::HeaderMap;
use http::header::AUTHORIZATION;
use portolan_api::status::{Details, Status, quoted};
use serde_json::{Value, json};

use crate::rbac::{self, MASTERS};
use crate::store::Snapshot;
use crate::token::Tokens;

const AUTHENTICATED: &str = "system:authenticated";
const UNAUTHENTICATED: &str = "system:unauthenticated";
const ANONYMOUS: &str = "system:anonymous";

/// An authenticated (or the anonymous) user.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct User {
    /// Name, such as `kubernetes-admin` or `system:serviceaccount:NS:NAME`.
    pub name: String,
    /// uid, of ServiceAccounts.
    pub uid: String,
    /// Groups.
    pub groups: Vec<String>,
    /// What else the credential says.
    pub extra: BTreeMap<String, Vec<String>>,
}

impl User {
    /// A user with groups; being authenticated is added.
    pub fn new(name: impl Into<String>, groups: &[&str]) -> User {
        let mut groups: Vec<String> = groups.iter().map(|group| (*group).to_owned()).collect();
        if !groups.iter().any(|group| group == AUTHENTICATED) {
            groups.push(AUTHENTICATED.to_owned());
        }
        User { name: name.into(), groups, ..User::default() }
    }

    /// The administrator of the cluster.
    pub fn admin() -> User {
        User::new("kubernetes-admin", &[MASTERS])
    }

    /// A component of the cluster, such as `system:kube-controller-manager`, that is trusted like the server itself.
    pub fn component(name: &str) -> User {
        User::new(name, &[MASTERS])
    }

    /// A ServiceAccount.
    pub fn service_account(namespace: &str, name: &str) -> User {
        let group = format!("system:serviceaccounts:{namespace}");
        User::new(format!("system:serviceaccount:{namespace}:{name}"), &["system:serviceaccounts", &group])
    }

    fn anonymous() -> User {
        User { name: ANONYMOUS.to_owned(), groups: vec![UNAUTHENTICATED.to_owned()], ..User::default() }
    }

    /// Whether the user is a member.
    pub fn is_in(&self, group: &str) -> bool {
        self.groups.iter().any(|g| g == group)
    }

    /// The user as `authentication.k8s.io/v1` UserInfo.
    pub fn to_value(&self) -> Value {
        let mut value = json!({"username": self.name, "groups": self.groups});
        if !self.uid.is_empty() {
            value["uid"] = json!(self.uid);
        }
        if !self.extra.is_empty() {
            value["extra"] = json!(self.extra);
        }
        value
    }
}

/// Checks credentials.
pub struct Authenticator {
    /// Makes and checks ServiceAccount tokens.
    pub tokens: Tokens,
    /// A fixed token of the administrator.
    pub admin_token: Option<String>,
}

impl Authenticator {
    /// The user of a request: from the connection's client certificate, else from a bearer token, else anonymous.
    pub fn authenticate(
        &self,
        headers: &HeaderMap,
        certificate: Option<&User>,
        state: &Snapshot,
        now: i64,
    ) -> Result<User, Status> {
        let user = if let Some(user) = certificate {
            user.clone()
        } else if let Some(header) = headers.get(AUTHORIZATION) {
            let token = header
                .to_str()
                .ok()
                .and_then(|text| text.split_once(' '))
                .filter(|(scheme, _)| scheme.eq_ignore_ascii_case("bearer"))
                .map(|(_, token)| token.trim())
                .ok_or_else(Status::unauthorized)?;
            self.bearer(token, &[], state, now).map(|(user, _)| user).ok_or_else(Status::unauthorized)?
        } else {
            User::anonymous()
        };
        impersonated(headers, user, state)
    }

    /// The user behind a bearer token and the audiences it is good for.
    pub fn bearer(&self, token: &str, audiences: &[String], state: &Snapshot, now: i64) -> Option<(User, Vec<String>)> {
        if let Some(admin) = &self.admin_token
            && aws_lc_rs::constant_time::verify_slices_are_equal(admin.as_bytes(), token.as_bytes()).is_ok()
        {
            return Some((User::admin(), audiences.to_vec()));
        }
        self.tokens.authenticate(token, audiences, state, now)
    }
}

/// Applies the impersonation headers (`kubectl --as`). Each user, group, uid and extra value that is taken on must be
/// allowed by a rule with the verb `impersonate` (apiserver/pkg/endpoints/filters/impersonation).
fn impersonated(headers: &HeaderMap, user: User, state: &Snapshot) -> Result<User, Status> {
    let text = |value: &http::HeaderValue| value.to_str().unwrap_or_default().to_owned();
    let name = headers.get("impersonate-user").map(text).unwrap_or_default();
    let mut groups: Vec<String> = headers.get_all("impersonate-group").iter().map(text).collect();
    let uid = headers.get("impersonate-uid").map(text).unwrap_or_default();
    let mut extra: BTreeMap<String, Vec<String>> = BTreeMap::new();
    for (header, value) in headers {
        if let Some(key) = header.as_str().strip_prefix("impersonate-extra-") {
            extra.entry(crate::path::decode_path(key)).or_default().push(text(value));
        }
    }
    if name.is_empty() {
        if groups.is_empty() && uid.is_empty() && extra.is_empty() {
            return Ok(user);
        }
        return Err(Status::internal("requested impersonation of groups, a uid or extra values without a user"));
    }
    let check = |group: &str, resource: &str, namespace: &str, name: &str| {
        let attributes = Attributes { verb: "impersonate", group, resource, namespace, name, path: "" };
        authorize(state, &user, &attributes)
    };
    let account = name.strip_prefix("system:serviceaccount:").and_then(|rest| rest.split_once(':'));
    match account {
        Some((namespace, account)) => check("", "serviceaccounts", namespace, account)?,
        None => check("", "users", "", &name)?,
    }
    for group in &groups {
        check("", "groups", "", group)?;
    }
    for (key, values) in &extra {
        for value in values {
            check("authentication.k8s.io", &format!("userextras/{key}"), "", value)?;
        }
    }
    if !uid.is_empty() {
        check("authentication.k8s.io", "uids", "", &uid)?;
    }
    if let (Some((namespace, _)), true) = (account, groups.is_empty()) {
        groups = vec!["system:serviceaccounts".to_owned(), format!("system:serviceaccounts:{namespace}")];
    }
    let known = groups.iter().any(|group| group == AUTHENTICATED || group == UNAUTHENTICATED);
    if !known {
        groups.push(if name == ANONYMOUS { UNAUTHENTICATED } else { AUTHENTICATED }.to_owned());
    }
    Ok(User { name, uid, groups, extra })
}

/// What a request is about, for authorization.
#[derive(Clone, Copy, Debug)]
pub struct Attributes<'a> {
    /// Verb.
    pub verb: &'a str,
    /// Group.
    pub group: &'a str,
    /// Resource, with `/subresource` if there is one; empty for other paths.
    pub resource: &'a str,
    /// Namespace; empty for the cluster scope.
    pub namespace: &'a str,
    /// Name of the object; empty if it is about several or a new one.
    pub name: &'a str,
    /// Path, if it is not about a resource.
    pub path: &'a str,
}

/// Lets a request pass, or answers it with the 403 that clients know.
pub fn authorize(state: &Snapshot, user: &User, attributes: &Attributes<'_>) -> Result<(), Status> {
    let decision = rbac::decide(state, user, attributes);
    if decision.allowed { Ok(()) } else { Err(refusal(user, attributes, &decision.reason)) }
}

fn refusal(user: &User, attributes: &Attributes<'_>, reason: &str) -> Status {
    let who = quoted(&user.name);
    let Attributes { verb, group, resource, namespace, name, path } = *attributes;
    let reason = if reason.is_empty() { String::new() } else { format!(": {reason}") };
    if resource.is_empty() {
        let mut status =
            Status::new(403, "Forbidden", format!("forbidden: User {who} cannot {verb} path {}{reason}", quoted(path)));
        status.details = Some(Box::default());
        return status;
    }
    let place = if namespace.is_empty() {
        "at the cluster scope".to_owned()
    } else {
        format!("in the namespace {}", quoted(namespace))
    };
    let plural = resource.split('/').next().unwrap_or_default();
    let qualified = if group.is_empty() { plural.to_owned() } else { format!("{plural}.{group}") };
    let object = if name.is_empty() { String::new() } else { format!(" {}", quoted(name)) };
    let message = format!(
        "{qualified}{object} is forbidden: User {who} cannot {verb} resource {} in API group {} {place}{reason}",
        quoted(resource),
        quoted(group),
    );
    let mut status = Status::new(403, "Forbidden", message);
    let details =
        Details { name: name.to_owned(), group: group.to_owned(), kind: plural.to_owned(), ..Details::default() };
    status.details = Some(Box::new(details));
    status
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::store::{Key, Store};

    #[test]
    fn refusals_have_the_known_texts() {
        let user = User::new("jane", &[]);
        let rows = [
            (
                Attributes { verb: "list", group: "", resource: "pods", namespace: "y", name: "", path: "" },
                "pods is forbidden: User \"jane\" cannot list resource \"pods\" in API group \"\" in the namespace \"y\"",
            ),
            (
                Attributes {
                    verb: "update",
                    group: "apps",
                    resource: "deployments/scale",
                    namespace: "y",
                    name: "web",
                    path: "",
                },
                "deployments.apps \"web\" is forbidden: User \"jane\" cannot update resource \"deployments/scale\" in \
                 API group \"apps\" in the namespace \"y\"",
            ),
            (
                Attributes { verb: "get", group: "", resource: "nodes", namespace: "", name: "n", path: "" },
                "nodes \"n\" is forbidden: User \"jane\" cannot get resource \"nodes\" in API group \"\" at the cluster \
                 scope",
            ),
            (
                Attributes { verb: "get", group: "", resource: "", namespace: "", name: "", path: "/metrics" },
                "forbidden: User \"jane\" cannot get path \"/metrics\"",
            ),
        ];
        for (attributes, want) in rows {
            let got = authorize(&Snapshot::default(), &user, &attributes).expect_err("refused");
            assert_eq!((got.code, got.message.as_str()), (403, want));
        }
    }

    fn headers(pairs: &[(&'static str, &str)]) -> HeaderMap {
        let mut headers = HeaderMap::new();
        for (name, value) in pairs {
            headers.append(*name, value.parse().expect("valid"));
        }
        headers
    }

    #[test]
    fn the_administrator_impersonates_anybody() {
        let none = Snapshot::default();
        let as_user =
            |pairs: &[(&'static str, &str)]| impersonated(&headers(pairs), User::admin(), &none).expect("allowed");
        let account = as_user(&[("impersonate-user", "system:serviceaccount:a:b")]);
        assert_eq!(account, User::service_account("a", "b"));
        let jane =
            as_user(&[("impersonate-user", "jane"), ("impersonate-group", "devs"), ("impersonate-group", "ops")]);
        assert_eq!(jane, User::new("jane", &["devs", "ops"]));
        assert_eq!(as_user(&[("impersonate-user", "system:anonymous")]), User::anonymous());
        let odd = impersonated(&headers(&[("impersonate-group", "devs")]), User::admin(), &none).expect_err("no user");
        assert_eq!(odd.code, 500);
    }

    #[test]
    fn others_impersonate_what_a_rule_names() {
        let state = Store::in_memory()
            .simulate(|txn| {
                let role = json!({"metadata": {"name": "r"}, "rules": [
                    {"verbs": ["impersonate"], "apiGroups": [""], "resources": ["users"], "resourceNames": ["jane"]}]});
                let binding = json!({"metadata": {"name": "b"}, "roleRef": {"kind": "ClusterRole", "name": "r"},
                    "subjects": [{"kind": "User", "name": "boss"}]});
                txn.put(rbac::CLUSTER_ROLES, &Key::new("", "r"), role);
                txn.put(rbac::CLUSTER_ROLE_BINDINGS, &Key::new("", "b"), binding);
                Ok(txn.state().clone())
            })
            .expect("a state");
        let boss = || User::new("boss", &[]);
        let jane = headers(&[("impersonate-user", "jane")]);
        assert_eq!(impersonated(&jane, boss(), &state).expect("allowed"), User::new("jane", &[]));
        let joe = impersonated(&headers(&[("impersonate-user", "joe")]), boss(), &state).expect_err("refused");
        assert_eq!(
            joe.message,
            "users \"joe\" is forbidden: User \"boss\" cannot impersonate resource \"users\" in API group \"\" at the \
             cluster scope"
        );
        let group = headers(&[("impersonate-user", "jane"), ("impersonate-group", "system:masters")]);
        assert_eq!(impersonated(&group, boss(), &state).expect_err("refused").code, 403);
    }
}
