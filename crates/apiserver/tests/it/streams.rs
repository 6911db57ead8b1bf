//! Over TLS: credentials, and streams to a kubelet behind the dialer.

use std::io;
use std::net::SocketAddr;
use std::sync::Arc;

use futures::future::BoxFuture;
use http_body_util::{BodyExt as _, Full};
use hyper_util::rt::TokioIo;
use portolan_apiserver::{BoxedIo, ClusterDialer, ServerConfig};
use serde_json::json;
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio_rustls::client::TlsStream;

use crate::support::{Fixture, LIMIT};

/// A node agent in memory: logs answer with the path that was asked, exec upgrades and echoes.
#[derive(Clone, Copy)]
struct FakeKubelet;

impl ClusterDialer for FakeKubelet {
    fn kubelet(&self, node: &str) -> BoxFuture<'static, io::Result<BoxedIo>> {
        let known = node == "n1";
        Box::pin(async move {
            if !known {
                return Err(io::Error::new(io::ErrorKind::ConnectionRefused, "connection refused"));
            }
            let (ours, theirs) = tokio::io::duplex(64 << 10);
            tokio::spawn(serve(theirs));
            Ok(Box::new(ours) as BoxedIo)
        })
    }

    fn tcp(&self, address: SocketAddr) -> BoxFuture<'static, io::Result<BoxedIo>> {
        Box::pin(async move {
            assert_eq!(address, SocketAddr::from(([10, 244, 1, 5], 8080)));
            let (ours, theirs) = tokio::io::duplex(64 << 10);
            tokio::spawn(serve(theirs));
            Ok(Box::new(ours) as BoxedIo)
        })
    }
}

async fn serve(io: tokio::io::DuplexStream) {
    let service = hyper::service::service_fn(|mut request: http::Request<hyper::body::Incoming>| async move {
        if request.headers().contains_key("upgrade") {
            let upgrade = hyper::upgrade::on(&mut request);
            tokio::spawn(async move {
                let mut io = TokioIo::new(upgrade.await.expect("upgraded"));
                let mut bytes = [0; 64];
                while let Ok(n @ 1..) = io.read(&mut bytes).await {
                    io.write_all(&bytes[..n]).await.expect("echoed");
                }
            });
            let response = http::Response::builder()
                .status(101)
                .header("connection", "Upgrade")
                .header("upgrade", "websocket")
                .header("sec-websocket-protocol", "v5.channel.k8s.io");
            return response.body(Full::new(bytes::Bytes::new()));
        }
        let asked = request.uri().to_string();
        let secret = request.headers().contains_key("authorization");
        let text = request.into_body().collect().await.expect("a body").to_bytes();
        let shown = format!("{asked} {secret} {}", String::from_utf8_lossy(&text));
        http::Response::builder().body(Full::new(bytes::Bytes::from(shown)))
    });
    let _ =
        hyper::server::conn::http1::Builder::new().serve_connection(TokioIo::new(io), service).with_upgrades().await;
}

struct Secure {
    fixture: Fixture,
    address: SocketAddr,
}

impl Secure {
    async fn start() -> Secure {
        let listener = std::net::TcpListener::bind("127.0.0.1:0").expect("a port");
        let address = listener.local_addr().expect("an address");
        let mut config = ServerConfig::new("192.0.2.1:6443".parse().expect("an address"));
        config.listeners = vec![listener];
        config.admin_token = Some("secret".to_owned());
        config.dialer = Arc::new(FakeKubelet);
        config.disable_admission_plugins = vec!["ServiceAccount".to_owned()];
        let fixture = Fixture::with(config).await;
        for (name, node) in [("p", "n1"), ("lost", "n2")] {
            let pod = json!({"apiVersion": "v1", "kind": "Pod", "metadata": {"name": name},
                "spec": {"nodeName": node, "containers": [{"name": "c", "image": "i", "ports": [{"containerPort": 8080}]}]}});
            assert_eq!(fixture.post("/api/v1/namespaces/default/pods", &pod).await.code, 201);
        }
        let status = json!({"status": {"podIP": "10.244.1.5"}});
        assert_eq!(fixture.merge("/api/v1/namespaces/default/pods/p/status", &status).await.code, 200);
        Secure { fixture, address }
    }

    async fn connect(&self) -> TlsStream<tokio::net::TcpStream> {
        use rustls::pki_types::CertificateDer;
        use rustls::pki_types::pem::PemObject as _;
        let mut roots = rustls::RootCertStore::empty();
        let ca = CertificateDer::from_pem_slice(self.fixture.server.ca_pem().as_bytes()).expect("pem");
        roots.add(ca).expect("a certificate");
        let provider = Arc::new(rustls::crypto::aws_lc_rs::default_provider());
        let config = rustls::ClientConfig::builder_with_provider(provider)
            .with_safe_default_protocol_versions()
            .expect("versions")
            .with_root_certificates(roots)
            .with_no_client_auth();
        let socket = tokio::net::TcpStream::connect(self.address).await.expect("connected");
        let name = "127.0.0.1".try_into().expect("a name");
        tokio_rustls::TlsConnector::from(Arc::new(config))
            .connect(name, socket)
            .await
            .expect("the server's certificate is good")
    }

    /// Sends a request by hand and returns the head of the answer and the stream.
    async fn ask(&self, request: &str, token: Option<&str>) -> (String, TlsStream<tokio::net::TcpStream>) {
        let mut stream = self.connect().await;
        let token = token.map(|token| format!("Authorization: Bearer {token}\r\n")).unwrap_or_default();
        let text = format!("{request}\r\nHost: x\r\n{token}\r\n");
        stream.write_all(text.as_bytes()).await.expect("sent");
        let mut head = Vec::new();
        let read = async {
            while !head.ends_with(b"\r\n\r\n") {
                head.push(stream.read_u8().await.expect("a head"));
            }
        };
        tokio::time::timeout(LIMIT, read).await.expect("an answer in time");
        (String::from_utf8(head).expect("text"), stream)
    }

    async fn body(&self, path: &str) -> (String, String) {
        let request = format!("GET {path} HTTP/1.1\r\nConnection: close");
        let (head, mut stream) = self.ask(&request, Some("secret")).await;
        let mut rest = Vec::new();
        // Without close_notify the end is an error, the bytes are there all the same.
        let _ = tokio::time::timeout(LIMIT, stream.read_to_end(&mut rest)).await.expect("an end in time");
        (head, String::from_utf8_lossy(&rest).into_owned())
    }
}

#[tokio::test]
async fn credentials_decide_over_tls() {
    let secure = Secure::start().await;
    for (path, token, code) in [
        ("/version", None, "200"),
        ("/api/v1/pods", None, "403"),
        ("/api/v1/pods", Some("wrong"), "401"),
        ("/version", Some("a.b.c"), "401"),
        ("/api/v1/pods", Some("secret"), "200"),
    ] {
        let (head, _) = secure.ask(&format!("GET {path} HTTP/1.1"), token).await;
        assert!(head.starts_with(&format!("HTTP/1.1 {code} ")), "{path} {token:?}: {head}");
    }
    secure.fixture.server.shutdown().await;
}

#[tokio::test]
async fn exec_is_upgraded_through_to_the_kubelet() {
    let secure = Secure::start().await;
    let request = "GET /api/v1/namespaces/default/pods/p/exec?command=sh&stdin=true HTTP/1.1\r\nConnection: Upgrade\r\n\
                   Upgrade: websocket\r\nSec-WebSocket-Protocol: v5.channel.k8s.io";
    let (head, mut stream) = secure.ask(request, Some("secret")).await;
    assert!(head.starts_with("HTTP/1.1 101 "), "{head}");
    assert!(head.to_lowercase().contains("sec-websocket-protocol: v5.channel.k8s.io"), "{head}");
    stream.write_all(b"hello").await.expect("sent");
    let mut back = [0; 5];
    tokio::time::timeout(LIMIT, stream.read_exact(&mut back)).await.expect("in time").expect("echoed");
    assert_eq!(&back, b"hello");
}

#[tokio::test]
async fn logs_and_proxies_reach_their_place_without_credentials() {
    let secure = Secure::start().await;
    let pods = "/api/v1/namespaces/default/pods";
    let (head, body) = secure.body(&format!("{pods}/p/log?tailLines=3")).await;
    assert!(head.starts_with("HTTP/1.1 200 "), "{head}");
    assert!(body.contains("/containerLogs/default/p/c?tailLines=3 false"), "{body}");
    let (_, body) = secure.body(&format!("{pods}/p/proxy/a/b?c=d")).await;
    assert!(body.contains("/a/b?c=d false"), "{body}");
    let (head, body) = secure.body(&format!("{pods}/lost/log")).await;
    assert!(head.starts_with("HTTP/1.1 500 "), "{head}");
    assert!(body.contains("error dialing backend: connection refused"), "{body}");
    let (head, _) = secure.body(&format!("{pods}/nope/log")).await;
    assert!(head.starts_with("HTTP/1.1 404 "), "{head}");
    let (head, body) = secure.body(&format!("{pods}/p/log?container=x")).await;
    assert!(head.starts_with("HTTP/1.1 400 ") && body.contains("container x is not valid for pod p"), "{head} {body}");
}

#[tokio::test]
async fn proxies_take_every_method_and_keep_clients_below_them() {
    let secure = Secure::start().await;
    // A namespace that is named like the subresource must not be taken for it.
    let pods = "/api/v1/namespaces/proxy-1/pods";
    let namespace = json!({"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": "proxy-1"}});
    assert_eq!(secure.fixture.post("/api/v1/namespaces", &namespace).await.code, 201);
    let pod = json!({"apiVersion": "v1", "kind": "Pod", "metadata": {"name": "q"},
        "spec": {"nodeName": "n1", "containers": [{"name": "c", "image": "i", "ports": [{"containerPort": 8080}]}]}});
    assert_eq!(secure.fixture.post(pods, &pod).await.code, 201);
    let status = json!({"status": {"podIP": "10.244.1.5"}});
    assert_eq!(secure.fixture.merge(&format!("{pods}/q/status"), &status).await.code, 200);
    for method in ["GET", "POST", "PUT", "PATCH", "DELETE", "OPTIONS", "HEAD"] {
        let (head, _) =
            secure.ask(&format!("{method} {pods}/q/proxy/a HTTP/1.1\r\nContent-Length: 0"), Some("secret")).await;
        assert!(head.starts_with("HTTP/1.1 200 "), "{method}: {head}");
    }
    let (head, _) = secure.ask(&format!("OPTIONS {pods}/q HTTP/1.1"), Some("secret")).await;
    assert!(head.starts_with("HTTP/1.1 405 "), "{head}");
    let (_, body) = secure.body(&format!("{pods}/q/proxy/x?y=z")).await;
    assert!(body.contains("/x?y=z false"), "{body}");
    let (head, _) = secure.body(&format!("{pods}/q/proxy?y=z")).await;
    assert!(head.starts_with("HTTP/1.1 301 "), "{head}");
    assert!(head.to_lowercase().contains(&format!("location: {pods}/q/proxy/?y=z\r\n")), "{head}");
}

#[tokio::test]
async fn the_kubelet_is_reached_through_its_node() {
    let secure = Secure::start().await;
    let node = json!({"apiVersion": "v1", "kind": "Node", "metadata": {"name": "n1"}});
    assert_eq!(secure.fixture.post("/api/v1/nodes", &node).await.code, 201);
    for name in ["n1", "n1:10250", "https:n1:10250"] {
        let (head, body) = secure.body(&format!("/api/v1/nodes/{name}/proxy/logs/?a=b")).await;
        assert!(head.starts_with("HTTP/1.1 200 ") && body.contains("/logs/?a=b false"), "{name}: {head}{body}");
    }
    let (head, _) = secure.body("/api/v1/nodes/n9/proxy/logs/").await;
    assert!(head.starts_with("HTTP/1.1 404 "), "{head}");
}
