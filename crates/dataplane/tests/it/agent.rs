//! The agent as a whole: an API server, a node's namespace, objects written through the API, rules in the kernel.

use std::time::{Duration, Instant};

use k8s_openapi::api::core::v1::{Event, Node, Pod, Service, ServiceAccount};
use k8s_openapi::api::discovery::v1::EndpointSlice;
use kube::Client;
use kube::api::{Api, DeleteParams, ListParams, Patch, PatchParams, PostParams};
use portolan_apiserver::{Server, ServerConfig, User};
use portolan_dataplane::layout::{self, SetId};
use portolan_dataplane::{AgentConfig, run};
use portolan_linux::Netns;
use portolan_nft::{Element, Executor, NetlinkExecutor, Op, Transaction};
use portolan_observe::Observer;
use portolan_plan::world::IpFamily;
use serde_json::{Value, json};
use tokio_util::sync::CancellationToken;

const DEADLINE: Duration = Duration::from_secs(20);

fn from<T: serde::de::DeserializeOwned>(value: Value) -> T {
    serde_json::from_value(value).unwrap()
}

fn elements(space: &Netns, id: SetId) -> Vec<Element> {
    let mut kernel = space.run(NetlinkExecutor::new).unwrap().unwrap();
    let sets = layout::Sets::default();
    kernel.elements(&layout::table(IpFamily::V4), sets.get(id)).unwrap().unwrap_or_default()
}

async fn until(what: &str, mut holds: impl FnMut() -> Result<(), String>) -> Duration {
    let start = Instant::now();
    loop {
        match holds() {
            Ok(()) => return start.elapsed(),
            Err(state) => assert!(start.elapsed() < DEADLINE, "{what}: {state}"),
        }
        tokio::time::sleep(Duration::from_millis(1)).await;
    }
}

fn metric(observer: &Observer, name: &str) -> f64 {
    let text = observer.encode();
    let line = text.lines().find(|l| l.strip_prefix(name).is_some_and(|rest| rest.starts_with(['{', ' '])));
    line.and_then(|l| l.rsplit(' ').next()?.parse().ok()).unwrap_or_default()
}

fn frontend_of<'a>(all: &'a [Element], comment: &str) -> Option<&'a Element> {
    all.iter().find(|e| e.comment.as_deref() == Some(comment))
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn objects_written_through_the_api_reach_the_kernel() {
    let server = Server::start(ServerConfig::new("203.0.113.10:6443".parse().unwrap())).await.unwrap();
    let client = |user: &str| Client::new(server.local_service(User::new(user, &["system:masters"])), "default");
    let admin = client("test");
    let space = crate::lab::unnamed_namespace();
    let up = space.run(|| std::process::Command::new("ip").args(["link", "set", "lo", "up"]).status());
    assert!(up.unwrap().unwrap().success());
    let nodes: Api<Node> = Api::all(admin.clone());
    let services: Api<Service> = Api::namespaced(admin.clone(), "default");
    let slices: Api<EndpointSlice> = Api::namespaced(admin.clone(), "default");
    let create = PostParams::default();

    let node: Node = from(json!({
        "metadata": {"name": "node-1", "labels": {"topology.kubernetes.io/zone": "zone-a"}},
        "status": {"addresses": [{"type": "InternalIP", "address": "192.168.50.11"}]},
    }));
    nodes.create(&create, &node).await.unwrap();
    nodes.patch_status("node-1", &PatchParams::default(), &Patch::Merge(json!({"status": node.status}))).await.unwrap();
    let service: Service = from(json!({
        "metadata": {"name": "web"},
        "spec": {"type": "NodePort", "ports": [{"name": "http", "port": 80, "nodePort": 30080}], "externalIPs": ["198.51.100.7"]},
    }));
    services.create(&create, &service).await.unwrap();
    let slice = |addresses: &[&str]| -> EndpointSlice {
        from(json!({
            "metadata": {"name": "web-1", "labels": {"kubernetes.io/service-name": "web"}},
            "addressType": "IPv4", "ports": [{"name": "http", "port": 8080, "protocol": "TCP"}],
            "endpoints": addresses.iter().map(|a| json!({"addresses": [a], "conditions": {"ready": true}})).collect::<Vec<_>>(),
        }))
    };
    slices.create(&create, &slice(&["10.244.1.2"])).await.unwrap();

    let start = |shutdown: &CancellationToken| {
        let observer = Observer::new();
        let agent = run(
            AgentConfig::new("node-1", space.clone(), "vp"),
            client("system:kube-proxy"),
            observer.clone(),
            shutdown.clone(),
        );
        (observer, tokio::spawn(agent))
    };
    let shutdown = CancellationToken::new();
    let (observer, agent) = start(&shutdown);
    tokio::time::timeout(DEADLINE, observer.wait_ready()).await.expect("ready in time");
    let frontends = elements(&space, SetId::Frontends);
    assert!(frontend_of(&frontends, "default/web:http/TCP").is_some(), "ready means programmed: {frontends:?}");
    assert_eq!(elements(&space, SetId::NodePorts).len(), 1);
    assert_eq!(elements(&space, SetId::NodePortAddresses).len(), 1);

    // Three frontends with a slot for each endpoint: cluster IP and external IP, and the node port.
    let sets = layout::Sets::default();
    let mut kernel = space.run(NetlinkExecutor::new).unwrap().unwrap();
    let mut count = |id: SetId| {
        let all = kernel.elements(&layout::table(IpFamily::V4), sets.get(id)).unwrap().unwrap_or_default();
        // The API server's own Service default/kubernetes is at port 443.
        all.iter().filter(|e| !e.key.contains(&portolan_nft::Value::Port(443))).count()
    };
    let mut slots = |wanted: usize| {
        let seen = (count(SetId::Slots), count(SetId::NodePortSlots));
        if seen == (2 * wanted, wanted) { Ok(()) } else { Err(format!("{seen:?}")) }
    };
    let mut times = Vec::new();
    for addresses in [&["10.244.1.2", "10.244.1.3"][..], &["10.244.1.3"], &["10.244.1.4", "10.244.1.5", "10.244.1.6"]] {
        let mut new = slice(addresses);
        new.metadata.resource_version = slices.get("web-1").await.unwrap().metadata.resource_version;
        slices.replace("web-1", &create, &new).await.unwrap();
        times.push(until("slots follow the endpoints", || slots(addresses.len())).await);
    }
    println!("from the answer to a write to its effect in the kernel: {times:?}");

    // A pod's host port, from the pods of this node.
    let accounts: Api<ServiceAccount> = Api::namespaced(admin.clone(), "default");
    accounts.create(&create, &from(json!({"metadata": {"name": "default"}}))).await.unwrap();
    let pods: Api<Pod> = Api::namespaced(admin.clone(), "default");
    let pod: Pod = from(json!({
        "metadata": {"name": "hosted"},
        "spec": {"nodeName": "node-1", "containers": [{"name": "c", "image": "x", "ports": [{"containerPort": 8080, "hostPort": 31500}]}]},
    }));
    pods.create(&create, &pod).await.unwrap();
    let status = json!({"status": {"phase": "Running", "podIP": "10.244.1.9", "podIPs": [{"ip": "10.244.1.9"}]}});
    pods.patch_status("hosted", &PatchParams::default(), &Patch::Merge(status)).await.unwrap();
    let host_ports = |wanted: usize| {
        let seen = elements(&space, SetId::HostPorts);
        if seen.len() == wanted { Ok(()) } else { Err(format!("{seen:?}")) }
    };
    until("the host port is there", || host_ports(1)).await;
    pods.delete("hosted", &DeleteParams { grace_period_seconds: Some(0), ..DeleteParams::default() }).await.unwrap();
    until("the host port is gone", || host_ports(0)).await;

    // What balancers, people and the end-to-end suite ask the proxy itself.
    let ask = async |port: u16, path: &str| {
        let at = std::net::SocketAddr::from(([127, 0, 0, 1], port));
        let deadline = Instant::now() + DEADLINE;
        loop {
            match crate::probe::http(&space, at, None, "GET", path, DEADLINE).await {
                Ok(answer) => return answer,
                Err(seen) => assert!(Instant::now() < deadline, "{path}: {seen:?}"),
            }
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    };
    assert_eq!(ask(10249, "/proxyMode").await.body, "nftables");
    assert!(ask(10249, "/metrics").await.body.contains("kubeproxy_sync_proxy_rules_duration_seconds"));
    let body: Value = serde_json::from_str(&ask(10256, "/healthz").await.body).unwrap();
    assert_eq!((&body["healthy"], &body["nodeEligible"]), (&json!(true), &json!(true)), "{body}");
    assert_eq!(body["status"]["IPv4"]["healthy"], true, "{body}");
    let taint = |list: Value| Patch::Merge(json!({"spec": {"taints": list}}));
    let leaving = json!([{"key": "ToBeDeletedByClusterAutoscaler", "effect": "NoSchedule"}]);
    nodes.patch("node-1", &PatchParams::default(), &taint(leaving)).await.unwrap();
    let deadline = Instant::now() + DEADLINE;
    while ask(10256, "/healthz").await.status != 503 {
        assert!(Instant::now() < deadline, "a node that leaves is still eligible");
    }
    assert_eq!(ask(10256, "/livez").await.status, 200);

    // A Service that takes an address of an older one gets an event, and the older one goes on.
    let thief: Service = from(json!({
        "metadata": {"name": "z-thief"},
        "spec": {"ports": [{"port": 80}], "externalIPs": ["198.51.100.7"]},
    }));
    services.create(&create, &thief).await.unwrap();
    let events: Api<Event> = Api::namespaced(admin.clone(), "default");
    let deadline = Instant::now() + DEADLINE;
    loop {
        let all = events.list(&ListParams::default()).await.unwrap().items;
        let conflict = all.iter().find(|e| e.reason.as_deref() == Some("AddressConflict"));
        if let Some(event) = conflict {
            assert_eq!(event.involved_object.name.as_deref(), Some("z-thief"));
            break;
        }
        assert!(Instant::now() < deadline, "{all:?}");
        tokio::time::sleep(Duration::from_millis(20)).await;
    }

    // Somebody removes the table: it comes back, and the Node's events and the metrics say so.
    let healed = || metric(&observer, "portolan_dataplane_healed_total");
    assert_eq!(healed(), 0.0, "our own changes are no interference");
    let mut vandal = space.run(NetlinkExecutor::new).unwrap().unwrap();
    vandal.commit(&Transaction { table: layout::table(IpFamily::V4), ops: vec![Op::DeleteTable] }).unwrap();
    until("the table is back", || {
        let seen = elements(&space, SetId::NodePortSlots);
        if seen.len() == 3 { Ok(()) } else { Err(format!("{seen:?}")) }
    })
    .await;
    until("it is counted", || if healed() >= 1.0 { Ok(()) } else { Err(observer.encode()) }).await;
    let deadline = Instant::now() + DEADLINE;
    loop {
        let all = events.list(&ListParams::default()).await.unwrap().items;
        if let Some(event) = all.iter().find(|e| e.reason.as_deref() == Some("ServiceRulesChanged")) {
            assert_eq!(event.involved_object.kind.as_deref(), Some("Node"));
            assert_eq!(event.involved_object.name.as_deref(), Some("node-1"));
            break;
        }
        assert!(Instant::now() < deadline, "{all:?}");
        tokio::time::sleep(Duration::from_millis(20)).await;
    }

    // The agent's end changes nothing; what was deleted meanwhile goes at the next start.
    shutdown.cancel();
    agent.await.unwrap().unwrap();
    assert_eq!(elements(&space, SetId::NodePortSlots).len(), 3);
    services.delete("web", &DeleteParams::default()).await.unwrap();
    let shutdown = CancellationToken::new();
    let (observer, agent) = start(&shutdown);
    tokio::time::timeout(DEADLINE, observer.wait_ready()).await.expect("ready in time");
    assert!(elements(&space, SetId::NodePorts).is_empty());
    let frontends = elements(&space, SetId::Frontends);
    assert!(frontend_of(&frontends, "default/web:http/TCP").is_none(), "{frontends:?}");
    let metrics = observer.encode();
    for name in [
        "kubeproxy_sync_proxy_rules_duration_seconds",
        "kubeproxy_sync_full_proxy_rules_duration_seconds",
        "kubeproxy_network_programming_duration_seconds",
        "kubeproxy_sync_proxy_rules_last_timestamp_seconds",
        "kubeproxy_sync_proxy_rules_service_changes_total",
        "kubeproxy_sync_proxy_rules_endpoint_changes_total",
        "kubeproxy_sync_proxy_rules_no_local_endpoints_total",
        "kubeproxy_sync_proxy_rules_nftables_sync_failures_total",
        "kubeproxy_conntrack_reconciler_deleted_entries_total",
    ] {
        assert!(metrics.contains(name), "{name} is missing in\n{metrics}");
    }
    shutdown.cancel();
    agent.await.unwrap().unwrap();
}
