//! Addresses and ports of Services are put right, and what cannot be is told.

use portolan_apiserver::ServerConfig;
use portolan_apiserver::store::Key;
use serde_json::{Value, json};

use crate::support::{Fixture, LIMIT};

const ADDRESSES: &str = "/apis/networking.k8s.io/v1/ipaddresses";

fn service(name: &str, ip: &str) -> Value {
    json!({"apiVersion": "v1", "kind": "Service", "metadata": {"name": name},
        "spec": {"clusterIP": ip, "ports": [{"port": 80}]}})
}

async fn until(what: &str, mut holds: impl AsyncFnMut() -> bool) {
    let wait = async {
        while !holds().await {
            tokio::time::sleep(std::time::Duration::from_millis(5)).await;
        }
    };
    tokio::time::timeout(LIMIT, wait).await.unwrap_or_else(|_| panic!("not in time: {what}"));
}

/// Reason and message of the warnings on a Service.
async fn warnings(f: &Fixture, name: &str) -> Vec<(String, String)> {
    let path = format!("/api/v1/namespaces/default/events?fieldSelector=involvedObject.name%3D{name}");
    let events = f.get(&path).await.body;
    let text = |event: &Value, field: &str| event[field].as_str().unwrap_or_default().to_owned();
    let items = events["items"].as_array().expect("items");
    items.iter().map(|event| (text(event, "reason"), text(event, "message"))).collect()
}

#[tokio::test]
async fn an_address_deleted_by_hand_comes_back() {
    let f = Fixture::start().await;
    assert_eq!(f.post("/api/v1/namespaces/default/services", &service("a", "10.96.7.7")).await.code, 201);
    assert_eq!(f.delete(&format!("{ADDRESSES}/10.96.7.7")).await.code, 200);
    until("the address", async || f.get(&format!("{ADDRESSES}/10.96.7.7")).await.code == 200).await;
    let message = "Cluster IP 10.96.7.7 for service default/a is not allocated; repairing".to_owned();
    assert_eq!(warnings(&f, "a").await, [("ClusterIPNotAllocated".to_owned(), message)]);
    let taken = f.post("/api/v1/namespaces/default/services", &service("b", "10.96.7.7")).await;
    assert_eq!(taken.code, 422);

    // An address goes with its Service, and nothing is said about that.
    assert_eq!(f.delete("/api/v1/namespaces/default/services/a").await.code, 200);
    assert_eq!(f.get(&format!("{ADDRESSES}/10.96.7.7")).await.code, 404);
    assert_eq!(warnings(&f, "a").await.len(), 1);
}

#[tokio::test]
async fn the_servers_own_service_comes_back() {
    let f = Fixture::start().await;
    let path = "/api/v1/namespaces/default/services/kubernetes";
    let uid = f.get(path).await.body["metadata"]["uid"].clone();
    assert_eq!(f.delete(path).await.code, 200);
    until("the Service", async || {
        let now = f.get(path).await;
        now.code == 200 && now.body["metadata"]["uid"] != uid && now.body["spec"]["clusterIP"] == "10.96.0.1"
    })
    .await;
    let endpoints = "/api/v1/namespaces/default/endpoints/kubernetes";
    until("its endpoints", async || f.get(endpoints).await.code == 200).await;

    // What clients find it by is looked after, too.
    let slice = "/apis/discovery.k8s.io/v1/namespaces/default/endpointslices/kubernetes";
    assert_eq!(f.delete(endpoints).await.code, 200);
    let edit = json!({"metadata": {"labels": {"kubernetes.io/service-name": "other"}}, "endpoints": []});
    assert_eq!(f.merge(slice, &edit).await.code, 200);
    until("its endpoints again", async || f.get(endpoints).await.code == 200).await;
    until("its slice", async || {
        let now = f.get(slice).await.body;
        now["endpoints"][0]["addresses"][0] == "192.0.2.1"
            && now["metadata"]["labels"]["kubernetes.io/service-name"] == "kubernetes"
    })
    .await;
}

/// Services keep an address as it was sent, its object has the canonical form.
#[tokio::test]
async fn an_address_written_in_another_form_comes_back() {
    let mut config = ServerConfig::new("192.0.2.1:6443".parse().expect("an address"));
    config.service_cidrs = vec!["fd00:10:96::/112".parse().expect("a range")];
    let f = Fixture::with(config).await;
    let made = f.post("/api/v1/namespaces/default/services", &service("a", "fd00:10:96:0::a")).await;
    assert_eq!(made.body["spec"]["clusterIP"], "fd00:10:96:0::a", "{}", made.body);
    let object = format!("{ADDRESSES}/fd00:10:96::a");
    assert_eq!(f.delete(&object).await.code, 200);
    until("the address", async || f.get(&object).await.code == 200).await;
}

#[tokio::test]
async fn what_two_services_claim_is_told_to_the_second() {
    let f = Fixture::start().await;
    assert_eq!(f.post("/api/v1/namespaces/default/services", &service("a", "10.96.7.8")).await.code, 201);
    // As if someone had edited the stored objects.
    let store = f.server.store();
    store
        .transact(|txn| {
            let mut second = txn.get("services", &Key::new("default", "a")).expect("stored").value.clone();
            second["metadata"]["name"] = json!("b");
            second["metadata"]["uid"] = json!("b-uid");
            txn.put("services", &Key::new("default", "b"), second);
            txn.delete("ipaddresses.networking.k8s.io", &Key::new("", "10.96.7.8"));
            Ok(())
        })
        .await
        .expect("stored");
    until("the warning", async || !warnings(&f, "b").await.is_empty()).await;
    let message = "Cluster IP 10.96.7.8 was assigned to multiple services; please recreate service".to_owned();
    assert_eq!(warnings(&f, "b").await, [("ClusterIPAlreadyAllocated".to_owned(), message)]);
    let owner = f.get(&format!("{ADDRESSES}/10.96.7.8")).await.body;
    assert_eq!(owner["spec"]["parentRef"]["name"], "a");
}
