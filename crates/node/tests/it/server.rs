//! The agent against the embedded API server: registration, a pod's life through the API, streams through the server's proxy.

use std::io;
use std::net::SocketAddr;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use futures::future::BoxFuture;
use k8s_openapi::api::core::v1::{ConfigMap, Event, Node as NodeObject, Pod};
use kube::Client;
use kube::api::{Api, DeleteParams, ListParams, LogParams, PostParams};
use portolan_apiserver::{BoxedIo, ClusterDialer, Server, ServerConfig, User};
use portolan_node::Kubelet;
use serde_json::json;
use tokio_util::sync::CancellationToken;

use crate::cluster::{Node, shell_with_trap};

#[derive(Default)]
struct Dialer(Mutex<Option<Kubelet>>);

impl ClusterDialer for Dialer {
    fn kubelet(&self, _node: &str) -> BoxFuture<'static, io::Result<BoxedIo>> {
        let kubelet = self.0.lock().unwrap().clone();
        Box::pin(async move {
            let kubelet = kubelet.ok_or_else(|| io::Error::other("no kubelet yet"))?;
            let (client, server) = tokio::io::duplex(64 * 1024);
            tokio::spawn(async move { kubelet.serve_connection(server).await });
            Ok(Box::new(client) as BoxedIo)
        })
    }

    fn tcp(&self, _address: SocketAddr) -> BoxFuture<'static, io::Result<BoxedIo>> {
        Box::pin(async { Err(io::Error::other("not used here")) })
    }
}

async fn eventually<T>(what: &str, mut check: impl AsyncFnMut() -> Option<T>) -> T {
    let deadline = tokio::time::Instant::now() + Duration::from_secs(20);
    loop {
        if let Some(found) = check().await {
            return found;
        }
        assert!(tokio::time::Instant::now() < deadline, "not so after twenty seconds: {what}");
        tokio::time::sleep(Duration::from_millis(25)).await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_pod_lives_and_dies_through_the_api() {
    // Namespaces and images as in the other tests; its own agent stays without pods.
    let node = Node::start("server").await;
    let dialer = Arc::new(Dialer::default());
    let mut config = ServerConfig::new("192.168.50.254:6443".parse().unwrap());
    config.dialer = dialer.clone();
    config.disable_admission_plugins.push("ServiceAccount".to_string());
    let server = Server::start(config).await.unwrap();
    let admin = User::new("system:admin", &["system:masters"]);
    let client = Client::new(server.local_service(admin), "default");

    let shutdown = CancellationToken::new();
    let mut agent = node.config.clone();
    agent.run_dir = node.dir.join("served/run");
    agent.state_dir = node.dir.join("served/state");
    let (run_dir, state_dir) = (agent.run_dir.clone(), agent.state_dir.clone());
    let kubelet =
        Kubelet::start(agent, client.clone(), portolan_observe::Observer::new(), shutdown.clone()).await.unwrap();
    *dialer.0.lock().unwrap() = Some(kubelet.clone());

    let registered: NodeObject = Api::all(client.clone()).get("node-1").await.unwrap();
    let status = registered.status.unwrap();
    assert!(status.conditions.iter().flatten().any(|c| c.type_ == "Ready" && c.status == "True"));
    assert_eq!(registered.metadata.labels.unwrap()["topology.kubernetes.io/zone"], "zone-a");
    assert_eq!(registered.spec.unwrap().pod_cidr.as_deref(), Some("10.244.1.0/24"));

    let maps: Api<ConfigMap> = Api::namespaced(client.clone(), "default");
    let map = serde_json::from_value(json!({"metadata": {"name": "m"}, "data": {"k": "from the API"}})).unwrap();
    maps.create(&PostParams::default(), &map).await.unwrap();

    let pods: Api<Pod> = Api::namespaced(client.clone(), "default");
    let mut spec = shell_with_trap("trap 'exit 0' TERM; echo \"$M\"; touch /tmp/up; while :; do sleep 0.05; done");
    spec["nodeName"] = json!("node-1");
    spec["containers"][0]["env"] = json!([{"name": "M", "valueFrom": {"configMapKeyRef": {"name": "m", "key": "k"}}}]);
    let pod: Pod = serde_json::from_value(json!({"metadata": {"name": "p"}, "spec": spec})).unwrap();
    pods.create(&PostParams::default(), &pod).await.unwrap();

    let ready = eventually("the pod is ready", async || {
        let pod = pods.get("p").await.ok()?;
        let conditions = pod.status.as_ref()?.conditions.as_ref()?;
        conditions.iter().any(|c| c.type_ == "Ready" && c.status == "True").then_some(pod)
    })
    .await;
    assert_eq!(ready.status.unwrap().pod_ip.as_deref(), Some("10.244.1.2"));
    assert_eq!(pods.logs("p", &LogParams::default()).await.unwrap(), "from the API\n");
    let events: Api<Event> = Api::namespaced(client.clone(), "default");
    eventually("the usual events are there", async || {
        let list = events.list(&ListParams::default()).await.ok()?.items;
        let have = |reason: &str| list.iter().any(|e| e.reason.as_deref() == Some(reason));
        ["Pulled", "Created", "Started"].iter().all(|r| have(r)).then_some(())
    })
    .await;

    pods.delete("p", &DeleteParams::default()).await.unwrap();
    eventually("the object is gone", async || pods.get_opt("p").await.ok()?.is_none().then_some(())).await;

    shutdown.cancel();
    tokio::time::timeout(Duration::from_secs(10), kubelet.stopped()).await.unwrap();
    portolan_node::cleanup(&run_dir, &state_dir).unwrap();
    server.shutdown().await;
}
