//! Requests in process.

use bytes::Bytes;
use http::Request;
use http_body_util::Full;
use portolan_apiserver::{ServerConfig, User};
use serde_json::{Value, json};
use tower::Service as _;

use crate::support::{Fixture, answer};

const MAPS: &str = "/api/v1/namespaces/default/configmaps";

fn map(name: &str) -> Value {
    json!({"apiVersion": "v1", "kind": "ConfigMap", "metadata": {"name": name}, "data": {"k": "v"}})
}

#[tokio::test]
async fn an_object_lives_from_create_to_delete() {
    let f = Fixture::start().await;
    let made = f.post(MAPS, &map("a")).await;
    assert_eq!(made.code, 201, "{made:?}");
    let revision = made.body["metadata"]["resourceVersion"].clone();
    assert_eq!(f.post(MAPS, &map("a")).await.body["reason"], "AlreadyExists");
    // A PUT that changes nothing makes no revision.
    let same = f.put(&format!("{MAPS}/a"), &map("a")).await;
    assert_eq!((same.code, &same.body["metadata"]["resourceVersion"]), (200, &revision));
    let mut stale = map("a");
    stale["metadata"]["resourceVersion"] = json!("1");
    let refused = f.put(&format!("{MAPS}/a"), &stale).await;
    assert_eq!((refused.code, &refused.body["reason"]), (409, &json!("Conflict")));
    assert_eq!(f.delete(&format!("{MAPS}/a")).await.body["status"], "Success");
    assert_eq!(f.get(&format!("{MAPS}/a")).await.code, 404);
}

#[tokio::test]
async fn a_watch_from_a_list_loses_and_doubles_nothing() {
    let f = Fixture::start().await;
    f.post(MAPS, &map("a")).await;
    let list = f.get(MAPS).await;
    let revision = list.body["metadata"]["resourceVersion"].as_str().expect("a revision").to_owned();
    f.post(MAPS, &map("b")).await;
    f.merge(&format!("{MAPS}/b"), &json!({"data": {"k": "w"}})).await;
    f.delete(&format!("{MAPS}/b")).await;
    let events = f.watch(&format!("{MAPS}?watch=true&resourceVersion={revision}"), 3).await;
    let told: Vec<(&str, &str)> = events
        .iter()
        .map(|e| (e["type"].as_str().expect("type"), e["object"]["metadata"]["name"].as_str().expect("name")))
        .collect();
    assert_eq!(told, [("ADDED", "b"), ("MODIFIED", "b"), ("DELETED", "b")]);
}

#[tokio::test]
async fn a_streaming_list_ends_with_its_bookmark() {
    let f = Fixture::start().await;
    f.post(MAPS, &map("a")).await;
    let query = "watch=true&sendInitialEvents=true&resourceVersionMatch=NotOlderThan&allowWatchBookmarks=true";
    let events = f.watch(&format!("{MAPS}?{query}"), 2).await;
    assert_eq!(events[0]["type"], "ADDED");
    assert_eq!(events[1]["type"], "BOOKMARK");
    assert_eq!(events[1]["object"]["metadata"]["annotations"]["k8s.io/initial-events-end"], "true");
}

#[tokio::test]
async fn many_watchers_see_the_same_order() {
    let f = std::sync::Arc::new(Fixture::start().await);
    let revision = f.get(MAPS).await.body["metadata"]["resourceVersion"].as_str().expect("a revision").to_owned();
    let watchers: Vec<_> = (0..20)
        .map(|i| {
            let (f, revision) = (f.clone(), revision.clone());
            tokio::spawn(async move {
                let selector = if i % 2 == 0 { "" } else { "&labelSelector=half%3Dyes" };
                let count = if i % 2 == 0 { 100 } else { 50 };
                f.watch(&format!("{MAPS}?watch=true&resourceVersion={revision}{selector}"), count).await
            })
        })
        .collect();
    for n in 0..100 {
        let mut object = map(&format!("o{n}"));
        object["metadata"]["labels"] = json!({"half": if n % 2 == 0 { "yes" } else { "no" }});
        assert_eq!(f.post(MAPS, &object).await.code, 201);
    }
    for (i, watcher) in watchers.into_iter().enumerate() {
        let events = watcher.await.expect("a watcher");
        let step = if i % 2 == 0 { 1 } else { 2 };
        let names: Vec<String> =
            events.iter().map(|e| e["object"]["metadata"]["name"].as_str().expect("name").to_owned()).collect();
        let want: Vec<String> = (0..100).step_by(step).map(|n| format!("o{n}")).collect();
        assert_eq!(names, want, "watcher {i}");
    }
}

#[tokio::test]
async fn services_get_addresses_that_no_other_has_and_give_them_back() {
    let f = Fixture::start().await;
    let services = "/api/v1/namespaces/default/services";
    let service = |name: &str, ip: Option<&str>| {
        let mut value = json!({"apiVersion": "v1", "kind": "Service", "metadata": {"name": name},
            "spec": {"type": "NodePort", "selector": {"app": "x"}, "ports": [{"port": 80}]}});
        if let Some(ip) = ip {
            value["spec"]["clusterIP"] = json!(ip);
        }
        value
    };
    let made = f.post(services, &service("a", None)).await;
    assert_eq!(made.code, 201, "{made:?}");
    let ip = made.body["spec"]["clusterIP"].as_str().expect("an address").to_owned();
    let address = format!("/apis/networking.k8s.io/v1/ipaddresses/{ip}");
    assert_eq!(f.get(&address).await.body["spec"]["parentRef"]["name"], "a");
    let taken = f.post(services, &service("b", Some(&ip))).await;
    assert_eq!(taken.code, 422);
    assert!(taken.body["message"].as_str().expect("text").contains("provided IP is already allocated"), "{taken:?}");
    // A dry run takes nothing.
    let tried = f.post(&format!("{services}?dryRun=All"), &service("c", None)).await;
    assert_eq!(tried.code, 201, "{tried:?}");
    assert_eq!(f.get("/apis/networking.k8s.io/v1/ipaddresses").await.body["items"].as_array().map(Vec::len), Some(2));
    assert_eq!(f.delete(&format!("{services}/a")).await.code, 200);
    assert_eq!(f.get(&address).await.code, 404);
    assert_eq!(f.post(services, &service("b", Some(&ip))).await.code, 201);
}

#[tokio::test]
async fn tokens_of_service_accounts_are_good_until_the_account_goes() {
    let f = Fixture::start().await;
    let accounts = "/api/v1/namespaces/default/serviceaccounts";
    f.post(accounts, &json!({"apiVersion": "v1", "kind": "ServiceAccount", "metadata": {"name": "sa"}})).await;
    let made = f.post(&format!("{accounts}/sa/token"), &json!({"spec": {}})).await;
    assert_eq!(made.code, 201, "{made:?}");
    let token = made.body["status"]["token"].as_str().expect("a token").to_owned();
    let review = json!({"apiVersion": "authentication.k8s.io/v1", "kind": "TokenReview", "spec": {"token": token}});
    let path = "/apis/authentication.k8s.io/v1/tokenreviews";
    let status = f.post(path, &review).await.body["status"].clone();
    assert_eq!(status["user"]["username"], "system:serviceaccount:default:sa");
    f.delete(&format!("{accounts}/sa")).await;
    assert_eq!(f.post(path, &review).await.body["status"]["authenticated"], Value::Null);
}

#[tokio::test]
async fn hostile_requests_get_errors() {
    let f = Fixture::start().await;
    let deep = format!("{}{}", "[".repeat(100_000), "]".repeat(100_000));
    let large =
        json!({"apiVersion": "v1", "kind": "ConfigMap", "metadata": {"name": "l"}, "data": {"k": "x".repeat(4 << 20)}});
    for (what, content_type, body, code) in [
        ("deep", "application/json", deep.as_str(), 400),
        ("cut", "application/json", "{\"a\":", 400),
        ("no_utf8_look_alike", "application/json", "\u{0}\u{1}", 400),
        ("protobuf_noise", "application/vnd.kubernetes.protobuf", "k8s\u{0}\u{a}\u{7f}", 400),
        ("large", "application/json", &large.to_string(), 413),
        (
            "yaml_bomb",
            "application/yaml",
            "a: &a [x,x,x,x,x,x]\nb: &b [*a,*a,*a,*a,*a,*a]\nc: &c [*b,*b,*b,*b,*b,*b]\nd: [*c,*c,*c,*c,*c,*c]",
            400,
        ),
    ] {
        let got = f.send(http::Method::POST, MAPS, content_type, body).await;
        assert!(got.code == code || (got.code == 422 && code == 400), "{what}: {} {}", got.code, got.body);
    }
    assert_eq!(f.get("/readyz").await.code, 200);
}

#[tokio::test]
async fn anonymous_requests_reach_health_and_version_only() {
    // Through the same code as connections: a service for a user who is nobody.
    let mut config = ServerConfig::new("192.0.2.1:6443".parse().expect("an address"));
    config.admin_token = Some("secret".to_owned());
    let f = Fixture::with(config).await;
    let nobody = User {
        name: "system:anonymous".to_owned(),
        groups: vec!["system:unauthenticated".to_owned()],
        ..User::default()
    };
    let mut service = f.server.local_service(nobody);
    for (path, code) in [("/version", 200), ("/readyz", 200), ("/api/v1/pods", 403), ("/apis", 403)] {
        let request = Request::get(path).body(Full::new(Bytes::new())).expect("a request");
        let got = answer(service.call(request).await.expect("local")).await;
        assert_eq!(got.code, code, "{path}");
    }
    let request = Request::get("/api/v1/pods").body(Full::new(Bytes::new())).expect("a request");
    let got = answer(service.call(request).await.expect("local")).await;
    assert_eq!(
        got.body["message"],
        "pods is forbidden: User \"system:anonymous\" cannot list resource \"pods\" in API group \"\" at the cluster scope"
    );
}

#[tokio::test]
async fn pages_of_a_list_show_one_moment() {
    let f = Fixture::start().await;
    for name in ["a", "b", "c", "d"] {
        f.post(MAPS, &map(name)).await;
    }
    let first = f.get(&format!("{MAPS}?limit=2")).await.body;
    assert_eq!(first["metadata"]["remainingItemCount"], 2);
    f.delete(&format!("{MAPS}/c")).await;
    f.post(MAPS, &map("bb")).await;
    let token = first["metadata"]["continue"].as_str().expect("a token");
    let second = f.get(&format!("{MAPS}?limit=2&continue={token}")).await.body;
    let names: Vec<&str> = second["items"]
        .as_array()
        .expect("items")
        .iter()
        .map(|i| i["metadata"]["name"].as_str().expect("name"))
        .collect();
    assert_eq!(names, ["c", "d"]);
    assert_eq!(second["metadata"]["resourceVersion"], first["metadata"]["resourceVersion"]);
}

#[tokio::test]
async fn unknown_fields_warn_or_are_refused() {
    let f = Fixture::start().await;
    let mut odd = map("a");
    odd["dta"] = json!({});
    let warned = f.post(MAPS, &odd).await;
    assert_eq!(warned.code, 201);
    assert_eq!(warned.warnings, ["299 - \"unknown field \\\"dta\\\"\""]);
    odd["metadata"]["name"] = json!("b");
    let refused = f.post(&format!("{MAPS}?fieldValidation=Strict"), &odd).await;
    assert_eq!(refused.code, 400);
    assert!(refused.body["message"].as_str().expect("text").contains("strict decoding error: unknown field \"dta\""));
}

#[tokio::test]
async fn a_binding_puts_a_pod_on_a_node_once() {
    let f = Fixture::start().await;
    let pods = "/api/v1/namespaces/default/pods";
    let pod = json!({"apiVersion": "v1", "kind": "Pod", "metadata": {"name": "p"},
        "spec": {"containers": [{"name": "c", "image": "i"}]}});
    assert_eq!(f.post(pods, &pod).await.code, 201);
    let binding = json!({"apiVersion": "v1", "kind": "Binding", "metadata": {"name": "p", "annotations": {"a": "b"}},
        "target": {"kind": "Node", "name": "n1"}});
    assert_eq!(f.post(&format!("{pods}/p/binding"), &binding).await.code, 201);
    let bound = f.get(&format!("{pods}/p")).await.body;
    assert_eq!(bound["spec"]["nodeName"], "n1");
    assert_eq!(bound["metadata"]["annotations"]["a"], "b");
    assert_eq!(bound["status"]["conditions"][0]["type"], "PodScheduled");
    assert_eq!(bound["status"]["conditions"][0]["status"], "True");
    let again = f.post(&format!("{pods}/p/binding"), &binding).await;
    assert_eq!(again.code, 409);
    assert!(
        again.body["message"].as_str().expect("text").ends_with("pod p is already assigned to node \"n1\""),
        "{again:?}"
    );
}

#[tokio::test]
async fn a_namespace_ends_when_it_is_finalized() {
    let f = Fixture::start().await;
    f.post("/api/v1/namespaces", &json!({"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": "n"}})).await;
    let path = "/api/v1/namespaces/n";
    assert_eq!(f.delete(path).await.body["status"]["phase"], "Terminating");
    let refused = f.post("/api/v1/namespaces/n/configmaps", &map("a")).await;
    assert_eq!((refused.code, &refused.body["details"]["causes"][0]["reason"]), (403, &json!("NamespaceTerminating")));
    let done = json!({"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": "n"}, "spec": {"finalizers": []}});
    assert_eq!(f.put(&format!("{path}/finalize"), &done).await.code, 200);
    assert_eq!(f.get(path).await.code, 404);
}
