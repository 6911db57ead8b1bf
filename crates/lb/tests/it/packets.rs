use std::collections::BTreeSet;

use portolan_lb::Config;
use portolan_observe::Observer;
use serde_json::{Value, json};
use tokio::task::block_in_place;
use tokio_util::sync::CancellationToken;

use crate::api::Api;
use crate::lab::{Lab, ask, connect, eventually, tcp, udp};

const OUTSIDE: &str = "192.168.60.100";

struct Running {
    shutdown: CancellationToken,
    task: tokio::task::JoinHandle<Result<(), portolan_lb::Error>>,
}

impl Running {
    async fn start(lab: &Lab, api: &Api) -> Running {
        let shutdown = CancellationToken::new();
        let config = Config::new(lab.router.clone(), vec!["192.168.70.0/30".parse().unwrap()]);
        let observer = Observer::new();
        let task = tokio::spawn(portolan_lb::run(config, api.client(), observer, shutdown.clone()));
        Running { shutdown, task }
    }

    async fn stop(self) {
        self.shutdown.cancel();
        self.task.await.unwrap().unwrap();
    }
}

fn cluster() -> Api {
    let api = Api::new();
    api.apply(json!({"kind": "Node", "metadata": {"name": "node-1"},
        "status": {"addresses": [{"type": "InternalIP", "address": "192.168.50.11"}]}}));
    api
}

fn service(name: &str, spec: Value) -> Value {
    let mut spec = spec;
    spec["type"] = json!("LoadBalancer");
    if spec["ports"].is_null() {
        spec["ports"] =
            json!([{"port": 80, "protocol": "TCP", "name": "t"}, {"port": 80, "protocol": "UDP", "name": "u"}]);
    }
    json!({"kind": "Service", "metadata": {"namespace": "shop", "name": name, "uid": name}, "spec": spec})
}

fn slice(service: &str, addresses: &[&str]) -> Value {
    let endpoints: Vec<Value> = addresses.iter().map(|a| json!({"addresses": [a]})).collect();
    json!({"kind": "EndpointSlice", "metadata": {"namespace": "shop", "name": format!("{service}-1"),
        "labels": {"kubernetes.io/service-name": service}}, "addressType": "IPv4", "endpoints": endpoints,
        "ports": [{"name": "t", "port": 8080, "protocol": "TCP"}, {"name": "u", "port": 8080, "protocol": "UDP"}]})
}

fn address(api: &Api, name: &str) -> Value {
    api.get("Service", &format!("shop/{name}"))
        .map(|s| s["status"]["loadBalancer"]["ingress"][0]["ip"].clone())
        .unwrap_or_default()
}

fn has_event(api: &Api, name: &str, text: &str) {
    eventually(true, || {
        let events = api.events_of(&format!("shop/{name}"));
        let found = events.iter().any(|e| e == text);
        if !found {
            eprintln!("waiting for {text:?}, have {events:?}");
        }
        found
    });
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn traffic_reaches_the_pods_and_follows_their_changes() {
    let lab = Lab::new().await;
    let api = cluster();
    api.apply(service("web", json!({})));
    api.apply(slice("web", &["10.244.1.10", "10.244.2.10"]));
    let server = Running::start(&lab, &api).await;
    block_in_place(|| {
        eventually(json!("192.168.70.1"), || address(&api, "web"));
        let stored = api.get("Service", "shop/web").unwrap();
        assert_eq!(stored["metadata"]["finalizers"], json!(["service.kubernetes.io/load-balancer-cleanup"]));
        assert_eq!(
            stored["status"]["loadBalancer"]["ingress"][0],
            json!({"ip": "192.168.70.1", "ipMode": "VIP",
            "ports": [{"port": 80, "protocol": "TCP"}, {"port": 80, "protocol": "UDP"}]})
        );
        has_event(&api, "web", "Normal EnsuringLoadBalancer: Ensuring load balancer");
        has_event(&api, "web", "Normal IPAllocated: Assigned IP [\"192.168.70.1\"]");
        has_event(&api, "web", "Normal EnsuredLoadBalancer: Ensured load balancer");

        // Both pods answer and see the client's own address.
        let seen: BTreeSet<String> = (0..40).map(|_| tcp(&lab.outside, "192.168.70.1:80")).collect();
        assert_eq!(seen, [format!("10.244.1.10 {OUTSIDE}"), format!("10.244.2.10 {OUTSIDE}")].into());
        assert!(udp(&lab.outside, "192.168.70.1:80").ends_with(OUTSIDE));
        // From the router itself.
        assert!(tcp(&lab.router, "192.168.70.1:80").starts_with("10.244."));
        // A port that no Service has is refused, not swallowed.
        assert_eq!(tcp(&lab.outside, "192.168.70.1:81"), "ConnectionRefused");

        // A target that goes takes no new connections and keeps those it has.
        let mut kept = connect(&lab.outside, "192.168.70.1:80").unwrap();
        let before = ask(&mut kept).unwrap();
        let other = if before.starts_with("10.244.1.") { "10.244.2.10" } else { "10.244.1.10" };
        api.apply(slice("web", &[other]));
        eventually(BTreeSet::from([format!("{other} {OUTSIDE}")]), || {
            (0..10).map(|_| tcp(&lab.outside, "192.168.70.1:80")).collect()
        });
        assert_eq!(ask(&mut kept).unwrap(), before);

        // A UDP client that keeps its port moves along.
        let mut flow = crate::lab::UdpFlow::open(&lab.outside, "192.168.70.1:80");
        eventually(format!("{other} {OUTSIDE}"), || flow.ask_who());
        let away = if other == "10.244.1.10" { "10.244.2.10" } else { "10.244.1.10" };
        api.apply(slice("web", &[away]));
        eventually(format!("{away} {OUTSIDE}"), || tcp(&lab.outside, "192.168.70.1:80"));
        eventually(format!("{away} {OUTSIDE}"), || flow.ask_who());
        api.apply(slice("web", &[other]));
        eventually(format!("{other} {OUTSIDE}"), || flow.ask_who());

        // A pod reaches itself through the load balancer.
        let own = usize::from(other == "10.244.2.10");
        assert!(
            tcp(&lab.pods[own], "192.168.70.1:80").starts_with(other),
            "{}",
            tcp(&lab.pods[own], "192.168.70.1:80")
        );

        // Without targets connections are refused, over both protocols.
        api.apply(slice("web", &[]));
        eventually("ConnectionRefused".to_string(), || tcp(&lab.outside, "192.168.70.1:80"));
        assert_eq!(udp(&lab.outside, "192.168.70.1:80"), "ConnectionRefused");
        api.apply(slice("web", &["10.244.1.10"]));
        eventually(format!("10.244.1.10 {OUTSIDE}"), || tcp(&lab.outside, "192.168.70.1:80"));

        // Only the clients that are allowed.
        api.edit("Service", "shop/web", |s| s["spec"]["loadBalancerSourceRanges"] = json!(["10.244.0.0/16"]));
        eventually(true, || tcp(&lab.outside, "192.168.70.1:80") != format!("10.244.1.10 {OUTSIDE}"));
        assert_eq!(tcp(&lab.outside, "192.168.70.1:80"), "TimedOut", "dropped in silence");
        assert!(tcp(&lab.pods[1], "192.168.70.1:80").starts_with("10.244.1.10"));
        api.edit("Service", "shop/web", |s| s["spec"]["loadBalancerSourceRanges"] = json!([]));
        eventually(format!("10.244.1.10 {OUTSIDE}"), || tcp(&lab.outside, "192.168.70.1:80"));

        api.delete("Service", "shop/web");
        eventually(None, || api.get("Service", "shop/web"));
        has_event(&api, "web", "Normal DeletingLoadBalancer: Deleting load balancer");
        has_event(&api, "web", "Normal DeletedLoadBalancer: Deleted load balancer");
        // The address is gone from the router: nobody answers for it.
        assert_ne!(tcp(&lab.outside, "192.168.70.1:80"), format!("10.244.1.10 {OUTSIDE}"));
    });
    server.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_empty_pool_leaves_a_service_pending_until_an_address_is_free() {
    let lab = Lab::new().await;
    let api = cluster();
    for name in ["a", "b", "c"] {
        api.apply(service(name, json!({})));
    }
    let server = Running::start(&lab, &api).await;
    block_in_place(|| {
        eventually(BTreeSet::from([1, 2, 3].map(|i| format!("192.168.70.{i}"))), || {
            ["a", "b", "c"].iter().map(|n| address(&api, n).as_str().unwrap_or_default().to_string()).collect()
        });
        api.apply(service("d", json!({})));
        has_event(&api, "d", "Warning AllocationFailed: Failed to allocate IP for \"shop/d\": no available IPs");
        has_event(
            &api,
            "d",
            "Warning SyncLoadBalancerFailed: Error syncing load balancer: failed to ensure load balancer: no available IPs",
        );
        assert_eq!(address(&api, "d"), Value::Null);
        // The type changes: its address is free at once, and the one that waited gets it.
        let freed = address(&api, "b");
        api.edit("Service", "shop/b", |s| {
            s["spec"]["type"] = json!("ClusterIP");
            s["status"] = json!({"loadBalancer": {}});
        });
        eventually(freed, || address(&api, "d"));
        eventually(json!([]), || api.get("Service", "shop/b").unwrap()["metadata"]["finalizers"].clone());
        // An address outside of the pools: told so, and the old one stays.
        let kept = address(&api, "a");
        api.edit("Service", "shop/a", |s| s["spec"]["loadBalancerIP"] = json!("203.0.113.1"));
        has_event(
            &api,
            "a",
            "Warning AllocationFailed: Failed to allocate IP for \"shop/a\": [\"203.0.113.1\"] is not allowed in config",
        );
        assert_eq!(address(&api, "a"), kept);
    });
    server.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_restart_keeps_addresses_and_connections() {
    let lab = Lab::new().await;
    let api = cluster();
    api.apply(service("web", json!({"loadBalancerIP": "192.168.70.3"})));
    api.apply(slice("web", &["10.244.1.10"]));
    let first = Running::start(&lab, &api).await;
    block_in_place(|| eventually(format!("10.244.1.10 {OUTSIDE}"), || tcp(&lab.outside, "192.168.70.3:80")));
    block_in_place(|| eventually(json!("192.168.70.3"), || address(&api, "web")));
    let mut kept = block_in_place(|| connect(&lab.outside, "192.168.70.3:80").unwrap());
    first.stop().await;
    block_in_place(|| {
        assert_eq!(tcp(&lab.outside, "192.168.70.3:80"), format!("10.244.1.10 {OUTSIDE}"), "the data path stays");
        // While nobody watches, the request goes and another Service comes; the first keeps what it has.
        api.edit("Service", "shop/web", |s| s["spec"]["loadBalancerIP"] = json!(""));
        api.apply(service("aaa", json!({})));
        api.apply(service("gone", json!({})));
        api.delete("Service", "shop/gone");
    });
    let second = Running::start(&lab, &api).await;
    block_in_place(|| {
        eventually(json!("192.168.70.1"), || address(&api, "aaa"));
        assert_eq!(address(&api, "web"), json!("192.168.70.3"));
        assert_eq!(tcp(&lab.outside, "192.168.70.3:80"), format!("10.244.1.10 {OUTSIDE}"));
        assert_eq!(ask(&mut kept).unwrap(), format!("10.244.1.10 {OUTSIDE}"));
    });
    second.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn services_of_others_are_left_alone_and_annotations_without_effect_are_told() {
    let lab = Lab::new().await;
    let api = cluster();
    api.apply(service("other", json!({"loadBalancerClass": "example.com/other"})));
    let mut web = service("web", json!({}));
    web["metadata"]["annotations"] = json!({
        "service.beta.kubernetes.io/aws-load-balancer-type": "nlb",
        "service.beta.kubernetes.io/aws-load-balancer-ssl-cert": "arn:aws:acm:x"});
    api.apply(web);
    let server = Running::start(&lab, &api).await;
    block_in_place(|| {
        eventually(json!("192.168.70.1"), || address(&api, "web"));
        eventually(1, || {
            api.events_of("shop/web").iter().filter(|e| e.starts_with("Warning AnnotationIgnored")).count()
        });
        let other = api.get("Service", "shop/other").unwrap();
        assert_eq!((&other["metadata"]["finalizers"], &other["status"]), (&Value::Null, &Value::Null));
        assert!(api.events_of("shop/other").is_empty());
    });
    server.stop().await;
}
