//! The gateway against the embedded API server: the test plays the controllers that make slices and load balancers.

use std::net::SocketAddr;
use std::sync::Arc;

use k8s_openapi::api::core::v1::{Event, Secret, Service};
use k8s_openapi::api::discovery::v1::EndpointSlice;
use k8s_openapi::api::networking::v1::{Ingress, IngressClass};
use kube::api::{Api, DeleteParams, ListParams, Patch, PatchParams, PostParams};
use portolan_apiserver::{Server, ServerConfig, User};
use portolan_gateway::{AccessLog, Config};
use portolan_observe::Observer;
use serde_json::{Value, json};
use tokio_util::sync::CancellationToken;

use crate::harness::{Backend, DEADLINE, Raw};

fn from<K: serde::de::DeserializeOwned>(value: Value) -> K {
    serde_json::from_value(value).unwrap()
}

async fn eventually<T>(what: &str, mut condition: impl AsyncFnMut() -> Option<T>) -> T {
    let begun = std::time::Instant::now();
    loop {
        if let Some(value) = condition().await {
            return value;
        }
        assert!(begun.elapsed() < DEADLINE, "waited in vain for {what}");
        tokio::time::sleep(std::time::Duration::from_millis(20)).await;
    }
}

async fn status(address: SocketAddr, host: &str, target: &str) -> (u16, String) {
    let request = format!("GET {target} HTTP/1.1\r\nHost: {host}\r\nConnection: close\r\n\r\n");
    tokio::task::spawn_blocking(move || {
        let mut raw = Raw::connect(address);
        raw.send(request);
        let reply = raw.reply();
        (reply.status, reply.header("x-backend").unwrap_or_default())
    })
    .await
    .unwrap()
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn manifests_become_routes_status_and_events() {
    portolan_observe::init_tracing("warn");
    let server = Arc::new(Server::start(ServerConfig::new("203.0.113.10:6443".parse().unwrap())).await.unwrap());
    let client = kube::Client::new(server.local_service(User::new("test", &["system:masters"])), "default");
    let create = PostParams::default();
    let classes: Api<IngressClass> = Api::all(client.clone());
    classes
        .create(&create, &from(json!({"metadata": {"name": "nginx"}, "spec": {"controller": "k8s.io/ingress-nginx"}})))
        .await
        .unwrap();
    classes
        .create(&create, &from(json!({"metadata": {"name": "other"}, "spec": {"controller": "acme.io/x"}})))
        .await
        .unwrap();
    let services: Api<Service> = Api::namespaced(client.clone(), "default");
    let slices: Api<EndpointSlice> = Api::namespaced(client.clone(), "default");
    let ingresses: Api<Ingress> = Api::namespaced(client.clone(), "default");
    services
        .create(
            &create,
            &from(json!({"metadata": {"name": "gateway"}, "spec": {"type": "LoadBalancer", "ports": [{"port": 80}]}})),
        )
        .await
        .unwrap();
    let address = json!({"status": {"loadBalancer": {"ingress": [{"ip": "192.0.2.80"}]}}});
    services.patch_status("gateway", &PatchParams::default(), &Patch::Merge(&address)).await.unwrap();

    // The port is found first, since run() does not tell which one it took.
    let http = std::net::TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap();
    let (observer, shutdown) = (Observer::new(), CancellationToken::new());
    let config = Config {
        http: vec![http],
        publish_service: Some(("default".into(), "gateway".into())),
        workers: 1,
        access_log: AccessLog::Off,
        ..Default::default()
    };
    let gateway = tokio::spawn(portolan_gateway::run(config, client.clone(), observer.clone(), shutdown.clone()));
    eventually("the gateway", async || {
        (!observer.not_ready().is_empty() || observer.encode().contains("build_info")).then_some(())
    })
    .await;
    tokio::time::timeout(DEADLINE, observer.wait_ready()).await.unwrap();
    assert_eq!(status(http, "shop.test", "/").await.0, 404);

    let rule = |class: &str, host: &str, service: &str| {
        json!({"metadata": {"name": format!("{class}-{}", host.replace('.', "-"))}, "spec": {"ingressClassName": class,
            "tls": [{"hosts": ["tls.test"], "secretName": "certificate"}],
            "rules": [{"host": host, "http": {"paths": [{"path": "/", "pathType": "Prefix",
                "backend": {"service": {"name": service, "port": {"name": "http"}}}}]}}]}})
    };
    for (class, host, service) in
        [("nginx", "shop.test", "web"), ("other", "foreign.test", "web"), ("nginx", "lost.test", "nothing")]
    {
        let mut object = rule(class, host, service);
        object["spec"].as_object_mut().unwrap().remove("tls");
        ingresses.create(&create, &from(object)).await.unwrap();
    }
    eventually("a route without a backend", async || (status(http, "shop.test", "/").await.0 == 503).then_some(()))
        .await;
    services
        .create(&create, &from(json!({"metadata": {"name": "web"}, "spec": {"ports": [{"name": "http", "port": 80}]}})))
        .await
        .unwrap();
    let start = |name| std::thread::spawn(move || Backend::start(name)).join().unwrap();
    let (one, two) = (start("one"), start("two"));
    let slice = |backend: &Backend| {
        json!({"metadata": {"name": "web-1", "labels": {"kubernetes.io/service-name": "web"}}, "addressType": "IPv4",
            "ports": [{"name": "http", "port": backend.address.port(), "protocol": "TCP"}],
            "endpoints": [{"addresses": ["127.0.0.1"], "conditions": {"ready": true}}]})
    };
    // The API server refuses loopback addresses in slices as the real one does; the namespace's own address will do.
    match slices.create(&create, &from(slice(&one))).await {
        Ok(_) => {
            eventually("the first backend", async || {
                (status(http, "shop.test", "/").await == (200, "one".into())).then_some(())
            })
            .await;
            let patch = Patch::Merge(slice(&two));
            slices.patch("web-1", &PatchParams::default(), &patch).await.unwrap();
            eventually("the second backend", async || {
                (status(http, "shop.test", "/").await == (200, "two".into())).then_some(())
            })
            .await;
            slices.delete("web-1", &DeleteParams::default()).await.unwrap();
            eventually("no backend", async || (status(http, "shop.test", "/").await.0 == 503).then_some(())).await;
        }
        Err(kube::Error::Api(refused)) => assert!(refused.message.contains("loopback"), "{}", refused.message),
        Err(error) => panic!("{error}"),
    }
    assert_eq!(status(http, "foreign.test", "/").await.0, 404);

    // TLS: the missing Secret is an event and the default certificate; the Secret heals it.
    ingresses.create(&create, &from(rule("nginx", "tls.test", "web"))).await.unwrap();
    eventually("the redirect to HTTPS", async || (status(http, "tls.test", "/").await.0 == 308).then_some(())).await;
    let events: Api<Event> = Api::namespaced(client.clone(), "default");
    let event = async |name: &str, reason: &str| {
        let all = events.list(&ListParams::default()).await.unwrap();
        all.items
            .into_iter()
            .find(|e| e.involved_object.name.as_deref() == Some(name) && e.reason.as_deref() == Some(reason))
    };
    let invalid =
        eventually("an event about the Secret", async || event("nginx-tls-test", "TLSSecretInvalid").await).await;
    assert_eq!(invalid.type_.as_deref(), Some("Warning"));
    assert!(invalid.message.unwrap().contains("Secret default/certificate does not exist"));
    eventually("an event about the Service", async || event("nginx-lost-test", "ServiceNotFound").await).await;
    eventually("acceptance", async || event("nginx-shop-test", "Sync").await).await;
    let key = rcgen::KeyPair::generate().unwrap();
    let certificate = rcgen::CertificateParams::new(vec!["tls.test".to_string()]).unwrap().self_signed(&key).unwrap();
    let secrets: Api<Secret> = Api::namespaced(client.clone(), "default");
    let secret = json!({"metadata": {"name": "certificate"}, "type": "kubernetes.io/tls",
        "stringData": {"tls.crt": certificate.pem(), "tls.key": key.serialize_pem()}});
    secrets.create(&create, &from(secret)).await.unwrap();
    eventually("the certificate in use", async || observer.encode().contains("ssl_expire_time_seconds{").then_some(()))
        .await;

    let published = async |name: &str| {
        let ingress = ingresses.get(name).await.unwrap();
        ingress.status.and_then(|s| s.load_balancer).and_then(|l| l.ingress).map(|i| i[0].ip.clone().unwrap())
    };
    eventually("addresses in the status", async || published("nginx-shop-test").await.filter(|ip| ip == "192.0.2.80"))
        .await;
    assert_eq!(published("other-foreign-test").await, None);
    // Another controller's class takes the routes and our address away.
    let patch = Patch::Merge(json!({"spec": {"ingressClassName": "other"}}));
    ingresses.patch("nginx-shop-test", &PatchParams::default(), &patch).await.unwrap();
    eventually("the route gone", async || (status(http, "shop.test", "/").await.0 == 404).then_some(())).await;
    eventually("the address gone", async || published("nginx-shop-test").await.is_none().then_some(())).await;
    assert!(
        observer
            .encode()
            .contains("nginx_ingress_controller_leader_election_status{controller_class=\"k8s.io/ingress-nginx\"")
    );

    shutdown.cancel();
    tokio::time::timeout(DEADLINE, gateway).await.unwrap().unwrap().unwrap();
    assert!(!observer.is_ready());
}
