//! Who asks, and may they.

use std::collections::BTreeMap;

use http::HeaderMap;
use http::header::AUTHORIZATION;
use portolan_api::kinds::Kind;
use portolan_api::status::Status;
use serde_json::{Value, json};

use crate::store::Snapshot;
use crate::token::Tokens;

const MASTERS: &str = "system:masters";
const AUTHENTICATED: &str = "system:authenticated";
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
        User { name: ANONYMOUS.to_owned(), groups: vec!["system:unauthenticated".to_owned()], ..User::default() }
    }

    fn is_in(&self, group: &str) -> bool {
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
        impersonated(headers, user)
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

/// Applies `Impersonate-User` and `Impersonate-Group` (`kubectl --as`), which only the administrator may send.
fn impersonated(headers: &HeaderMap, user: User) -> Result<User, Status> {
    let text = |value: &http::HeaderValue| value.to_str().unwrap_or_default().to_owned();
    let Some(name) = headers.get("impersonate-user").map(text) else { return Ok(user) };
    if !user.is_in(MASTERS) {
        let why = format!(
            "users \"{name}\" is forbidden: User \"{}\" cannot impersonate resource \"users\" in API group \"\" at the \
             cluster scope",
            user.name
        );
        return Err(Status::new(403, "Forbidden", why));
    }
    let groups: Vec<String> = headers.get_all("impersonate-group").iter().map(text).collect();
    let mut groups: Vec<&str> = groups.iter().map(String::as_str).collect();
    let account = name.strip_prefix("system:serviceaccount:").and_then(|rest| rest.split_once(':'));
    let account_groups = account.map(|(namespace, _)| format!("system:serviceaccounts:{namespace}"));
    if let Some(group) = &account_groups {
        groups.extend(["system:serviceaccounts", group.as_str()]);
    }
    if name == ANONYMOUS { Ok(User::anonymous()) } else { Ok(User::new(name, &groups)) }
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
    /// Path, if it is not about a resource.
    pub path: &'a str,
}

/// Paths everybody may read (`system:public-info-viewer`).
const PUBLIC: &[&str] = &["/healthz", "/livez", "/readyz", "/version"];

/// Whether the user may do this. See the crate's documentation for the rules that hold so far.
pub fn may(user: &User, attributes: &Attributes<'_>) -> bool {
    if user.is_in(AUTHENTICATED) || user.is_in(MASTERS) {
        return true;
    }
    let path = attributes.path.trim_end_matches('/');
    matches!(attributes.verb, "get")
        && attributes.resource.is_empty()
        && PUBLIC.iter().any(|p| path == *p || path.strip_prefix(p).is_some_and(|rest| rest.starts_with('/')))
}

/// The 403 for what [`may`] refuses.
pub fn refusal(user: &User, attributes: &Attributes<'_>, kind: Option<&Kind>, name: &str) -> Status {
    let who = &user.name;
    let Attributes { verb, group, resource, namespace, path } = attributes;
    let Some(kind) = kind else {
        return Status::new(403, "Forbidden", format!("forbidden: User \"{who}\" cannot {verb} path \"{path}\""));
    };
    let place = if namespace.is_empty() {
        "at the cluster scope".to_owned()
    } else {
        format!("in the namespace \"{namespace}\"")
    };
    let why = format!("User \"{who}\" cannot {verb} resource \"{resource}\" in API group \"{group}\" {place}");
    Status::forbidden(kind, name, why)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn anonymous_reads_health_and_version_only() {
        let path = |path| Attributes { verb: "get", group: "", resource: "", namespace: "", path };
        let anonymous = User::anonymous();
        for (text, want) in
            [("/healthz", true), ("/livez/ping", true), ("/version/", true), ("/api", false), ("/healthzz", false)]
        {
            assert_eq!(may(&anonymous, &path(text)), want, "{text}");
        }
        let pods = Attributes { verb: "list", group: "", resource: "pods", namespace: "a", path: "" };
        assert!(!may(&anonymous, &pods));
        assert!(may(&User::admin(), &pods));
        assert!(may(&User::service_account("a", "b"), &pods));
    }

    #[test]
    fn only_the_administrator_impersonates() {
        let mut headers = HeaderMap::new();
        headers.insert("impersonate-user", "system:serviceaccount:a:b".parse().expect("valid"));
        let user = impersonated(&headers, User::admin()).expect("allowed");
        assert_eq!(user, User::service_account("a", "b"));
        assert_eq!(impersonated(&headers, user).expect_err("refused").code, 403);
    }
}
