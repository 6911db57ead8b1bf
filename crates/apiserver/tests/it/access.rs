//! Who may do what, from outside.

use http::{Method, Request};
use http_body_util::Full;
use portolan_apiserver::{LocalService, User};
use serde_json::{Value, json};
use tower::Service as _;

use crate::support::{Answer, Fixture, LIMIT, answer};

const RBAC: &str = "/apis/rbac.authorization.k8s.io/v1";
const PODS: &str = "/api/v1/namespaces/default/pods";

async fn send(service: &LocalService, method: Method, path: &str, body: &Value) -> Answer {
    sent(service, method, path, body, &[]).await
}

async fn sent(service: &LocalService, method: Method, path: &str, body: &Value, headers: &[(&str, &str)]) -> Answer {
    let mut request = Request::builder().method(method).uri(path).header("content-type", "application/json");
    for (name, value) in headers {
        request = request.header(*name, *value);
    }
    let body = if body.is_null() { String::new() } else { body.to_string() };
    let request = request.body(Full::new(bytes::Bytes::from(body))).expect("a request");
    answer(service.clone().call(request).await.expect("local calls do not fail")).await
}

fn role(kind: &str, name: &str, rules: Value) -> Value {
    json!({"apiVersion": "rbac.authorization.k8s.io/v1", "kind": kind, "metadata": {"name": name}, "rules": rules})
}

fn binding(kind: &str, name: &str, role_kind: &str, role: &str, subject: Value) -> Value {
    json!({"apiVersion": "rbac.authorization.k8s.io/v1", "kind": kind, "metadata": {"name": name},
        "roleRef": {"apiGroup": "rbac.authorization.k8s.io", "kind": role_kind, "name": role}, "subjects": [subject]})
}

fn jane() -> Value {
    json!({"kind": "User", "name": "jane", "apiGroup": "rbac.authorization.k8s.io"})
}

fn message(answer: &Answer) -> &str {
    answer.body["message"].as_str().unwrap_or_default()
}

#[tokio::test]
async fn users_may_do_what_their_roles_allow() {
    let f = Fixture::start().await;
    let user = f.server.local_service(User::new("jane", &[]));
    let get = async |path: &str| send(&user, Method::GET, path, &Value::Null).await;

    let refused = get(PODS).await;
    assert_eq!((refused.code, refused.body["reason"].as_str()), (403, Some("Forbidden")));
    assert_eq!(
        message(&refused),
        "pods is forbidden: User \"jane\" cannot list resource \"pods\" in API group \"\" in the namespace \"default\""
    );
    // Every authenticated user sees what there is, and none sees objects of a kind that does not exist.
    assert_eq!(get("/apis").await.code, 200);
    assert_eq!(get("/metrics").await.code, 403);
    assert_eq!(get("/apis/example.com/v1/things").await.code, 403);

    let view = binding("RoleBinding", "view", "ClusterRole", "view", jane());
    let path = format!("{RBAC}/namespaces/default/rolebindings");
    assert_eq!(f.post(&path, &view).await.code, 201);
    assert_eq!(get(PODS).await.code, 200);
    assert_eq!(get("/api/v1/namespaces/default").await.code, 200);
    assert_eq!(get("/api/v1/namespaces/kube-system").await.code, 403);
    assert_eq!(get("/api/v1/pods").await.code, 403, "all namespaces");
    assert_eq!(get("/api/v1/namespaces/default/secrets").await.code, 403, "view has no secrets");
    let map = json!({"apiVersion": "v1", "kind": "ConfigMap", "metadata": {"name": "a"}});
    assert_eq!(send(&user, Method::POST, "/api/v1/namespaces/default/configmaps", &map).await.code, 403);

    let one = json!([{"verbs": ["get", "list", "watch"], "apiGroups": [""], "resources": ["secrets"],
        "resourceNames": ["mine"]}]);
    assert_eq!(f.post(&format!("{RBAC}/namespaces/default/roles"), &role("Role", "one", one)).await.code, 201);
    assert_eq!(f.post(&path, &binding("RoleBinding", "one", "Role", "one", jane())).await.code, 201);
    let secrets = "/api/v1/namespaces/default/secrets";
    assert_eq!(get(&format!("{secrets}/mine")).await.code, 404, "allowed, and not there");
    assert_eq!(get(&format!("{secrets}/other")).await.code, 403);
    assert_eq!(get(&format!("{secrets}?fieldSelector=metadata.name%3Dmine")).await.code, 200);

    assert_eq!(f.delete(&format!("{path}/view")).await.code, 200);
    assert_eq!(get(PODS).await.code, 403, "at once");
}

#[tokio::test]
async fn reviews_answer_from_the_same_rules() {
    let f = Fixture::start().await;
    let user = f.server.local_service(User::new("jane", &[]));
    let path = format!("{RBAC}/namespaces/default/rolebindings");
    assert_eq!(f.post(&path, &binding("RoleBinding", "v", "ClusterRole", "view", jane())).await.code, 201);

    let attributes = |namespace: &str, verb: &str, resource: &str| json!({"namespace": namespace, "verb": verb, "resource": resource});
    let reviews = "/apis/authorization.k8s.io/v1";
    for (namespace, verb, resource, want) in
        [("default", "list", "pods", true), ("default", "create", "pods", false), ("", "list", "pods", false)]
    {
        let body = json!({"apiVersion": "authorization.k8s.io/v1", "kind": "SelfSubjectAccessReview",
            "spec": {"resourceAttributes": attributes(namespace, verb, resource)}});
        let own = send(&user, Method::POST, &format!("{reviews}/selfsubjectaccessreviews"), &body).await;
        assert_eq!((own.code, own.body["status"]["allowed"].as_bool()), (201, Some(want)), "{verb} {resource}");
        let body = json!({"apiVersion": "authorization.k8s.io/v1", "kind": "SubjectAccessReview",
            "spec": {"user": "jane", "resourceAttributes": attributes(namespace, verb, resource)}});
        let of = f.post(&format!("{reviews}/subjectaccessreviews"), &body).await;
        assert_eq!(of.body["status"]["allowed"].as_bool(), Some(want));
        if want {
            let reason = "RBAC: allowed by RoleBinding \"v/default\" of ClusterRole \"view\" to User \"jane\"";
            assert_eq!(of.body["status"]["reason"], reason);
        }
        let refused = send(&user, Method::POST, &format!("{reviews}/subjectaccessreviews"), &body).await;
        assert_eq!(refused.code, 403, "about others only with permission");
    }

    let body = json!({"apiVersion": "authorization.k8s.io/v1", "kind": "SelfSubjectRulesReview",
        "spec": {"namespace": "default"}});
    let rules = send(&user, Method::POST, &format!("{reviews}/selfsubjectrulesreviews"), &body).await.body;
    assert_eq!(rules["status"]["incomplete"], false);
    let listed = rules["status"]["resourceRules"].as_array().expect("rules");
    assert!(listed.iter().any(|rule| rule["resources"].as_array().is_some_and(|r| r.contains(&json!("pods")))));
    assert!(!listed.iter().any(|rule| rule["verbs"] == json!(["*"])));
}

#[tokio::test]
async fn nobody_grants_more_than_they_have() {
    let f = Fixture::start().await;
    let admin_of = binding("RoleBinding", "a", "ClusterRole", "admin", jane());
    let bindings = format!("{RBAC}/namespaces/default/rolebindings");
    let roles = format!("{RBAC}/namespaces/default/roles");
    assert_eq!(f.post(&bindings, &admin_of).await.code, 201);
    let user = f.server.local_service(User::new("jane", &[]));
    let post = async |path: &str, body: &Value| send(&user, Method::POST, path, body).await;

    let held = json!([{"verbs": ["get", "delete"], "apiGroups": [""], "resources": ["pods"]}]);
    assert_eq!(post(&roles, &role("Role", "held", held)).await.code, 201);
    let more = json!([{"verbs": ["get"], "apiGroups": [""], "resources": ["pods", "nodes"]}]);
    let refused = post(&roles, &role("Role", "more", more.clone())).await;
    assert_eq!(refused.code, 403);
    assert_eq!(
        message(&refused),
        "roles.rbac.authorization.k8s.io \"more\" is forbidden: user \"jane\" (groups=[\"system:authenticated\"]) is \
         attempting to grant RBAC permissions not currently held:\n{APIGroups:[\"\"], Resources:[\"nodes\"], Verbs:[\"get\"]}"
    );
    let mut changed = role("Role", "held", more);
    changed["metadata"]["namespace"] = json!("default");
    let refused = send(&user, Method::PUT, &format!("{roles}/held"), &changed).await;
    assert_eq!(refused.code, 403, "nor by an update");

    assert_eq!(post(&bindings, &binding("RoleBinding", "v", "ClusterRole", "view", jane())).await.code, 201);
    let refused = post(&bindings, &binding("RoleBinding", "c", "ClusterRole", "cluster-admin", jane())).await;
    assert_eq!(refused.code, 403);
    assert!(message(&refused).contains("{APIGroups:[\"*\"], Resources:[\"*\"], Verbs:[\"*\"]}"), "{refused:?}");
    let gone = post(&bindings, &binding("RoleBinding", "g", "ClusterRole", "gone", jane())).await;
    assert_eq!((gone.code, message(&gone)), (404, "clusterrole.rbac.authorization.k8s.io \"gone\" not found"));

    // The verb bind makes an exception.
    let bind = json!([{"verbs": ["bind"], "apiGroups": ["rbac.authorization.k8s.io"], "resources": ["clusterroles"],
        "resourceNames": ["cluster-admin"]}]);
    assert_eq!(f.post(&roles, &role("Role", "binder", bind)).await.code, 201);
    assert_eq!(f.post(&bindings, &binding("RoleBinding", "binder", "Role", "binder", jane())).await.code, 201);
    assert_eq!(post(&bindings, &binding("RoleBinding", "c", "ClusterRole", "cluster-admin", jane())).await.code, 201);
}

#[tokio::test]
async fn aggregated_roles_follow_their_parts() {
    let f = Fixture::start().await;
    let user = f.server.local_service(User::new("jane", &[]));
    let all = format!("{RBAC}/clusterrolebindings");
    assert_eq!(f.post(&all, &binding("ClusterRoleBinding", "v", "ClusterRole", "view", jane())).await.code, 201);
    assert_eq!(send(&user, Method::GET, "/api/v1/nodes", &Value::Null).await.code, 403);
    let mut part =
        role("ClusterRole", "nodes-too", json!([{"verbs": ["list"], "apiGroups": [""], "resources": ["nodes"]}]));
    part["metadata"]["labels"] = json!({"rbac.authorization.k8s.io/aggregate-to-view": "true"});
    assert_eq!(f.post(&format!("{RBAC}/clusterroles"), &part).await.code, 201);
    let become_code = async |want: u16| {
        while send(&user, Method::GET, "/api/v1/nodes", &Value::Null).await.code != want {
            tokio::time::sleep(std::time::Duration::from_millis(5)).await;
        }
    };
    tokio::time::timeout(LIMIT, become_code(200)).await.expect("view has it");
    assert_eq!(f.delete(&format!("{RBAC}/clusterroles/nodes-too")).await.code, 200);
    tokio::time::timeout(LIMIT, become_code(403)).await.expect("view has lost it");
}

#[tokio::test]
async fn requests_can_be_made_as_someone_else() {
    let f = Fixture::start().await;
    let admin = f.server.local_service(User::admin());
    let review = json!({"apiVersion": "authentication.k8s.io/v1", "kind": "SelfSubjectReview"});
    let path = "/apis/authentication.k8s.io/v1/selfsubjectreviews";
    let headers = [("impersonate-user", "jane"), ("impersonate-group", "devs"), ("impersonate-extra-scopes", "a")];
    let who = sent(&admin, Method::POST, path, &review, &headers).await;
    assert_eq!(
        who.body["status"]["userInfo"],
        json!({"username": "jane", "groups": ["devs", "system:authenticated"], "extra": {"scopes": ["a"]}})
    );
    assert_eq!(sent(&admin, Method::GET, PODS, &Value::Null, &headers).await.code, 403);
    let user = f.server.local_service(User::new("jane", &[]));
    let refused = sent(&user, Method::GET, PODS, &Value::Null, &[("impersonate-user", "admin")]).await;
    assert_eq!(
        message(&refused),
        "users \"admin\" is forbidden: User \"jane\" cannot impersonate resource \"users\" in API group \"\" at the cluster \
         scope"
    );
}
