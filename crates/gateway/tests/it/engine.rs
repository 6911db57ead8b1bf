//! Routing, proxying, retries, TLS and changes under load.

use std::net::{SocketAddr, TcpListener};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use portolan_gateway::{AccessLog, ConstLabels, Engine, EngineConfig, Registry};
use serde_json::json;

use crate::harness::*;

fn dead() -> SocketAddr {
    // Bound and closed at once: nothing listens there.
    TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap()
}

#[test]
fn requests_are_routed_with_the_headers_of_ingress_nginx() {
    let backend = Backend::start("web");
    let mut gate = Gate::start();
    gate.service("web", &[backend.address]);
    assert_eq!(get(gate.http, "h", "/").status, 404, "nothing is published yet");
    assert_eq!(get(gate.http, "anything", "/healthz").status, 200);
    gate.publish(&[
        ingress("a", "nginx", "h", "/app", "web", &[]),
        ingress("r", "nginx", "rewrite", "/old", "web", &[("rewrite-target", "/new")]),
        ingress("s", "portolan", "strict", "/", "web", &[]),
        ingress("v", "nginx", "vhost", "/", "web", &[("upstream-vhost", "inner.example")]),
        ingress("d", "nginx", "denied", "/", "web", &[("denylist-source-range", "127.0.0.0/8")]),
        ingress("c", "nginx", "closed", "/", "web", &[("auth-url", "http://auth/")]),
    ]);
    let mut raw = Raw::connect(gate.http);
    raw.send("GET /app/x%20y?q=1&r HTTP/1.1\r\nHost: H:8080\r\nUser-Agent: test\r\nX-Forwarded-For: 9.9.9.9\r\nX-Request-ID: mine\r\n\r\n");
    let reply = raw.reply();
    assert_eq!((reply.status, reply.header("server")), (200, None), "ingress-nginx shows no Server");
    let seen = reply.json();
    assert_eq!(seen["target"], "/app/x%20y?q=1&r");
    let port = gate.http.port().to_string();
    for (name, value) in [
        ("host", "H:8080"),
        ("user-agent", "test"),
        ("x-real-ip", "127.0.0.1"),
        ("x-forwarded-for", "127.0.0.1"),
        ("x-original-forwarded-for", "9.9.9.9"),
        ("x-forwarded-host", "H:8080"),
        ("x-forwarded-port", port.as_str()),
        ("x-forwarded-proto", "http"),
        ("x-scheme", "http"),
        ("x-request-id", "mine"),
    ] {
        assert_eq!(seen["headers"][name], json!([value]), "{name}");
    }
    let id = get(gate.http, "h", "/app").json()["headers"]["x-request-id"][0].as_str().unwrap().to_string();
    assert!(id.len() == 32 && id.bytes().all(|b| b.is_ascii_hexdigit()), "{id}");
    let hop = get(gate.http, "strict", "/hop");
    assert_eq!((hop.header("x-hop"), hop.header("keep-alive")), (None, None));
    assert_eq!(hop.header("server").as_deref(), Some("backend/1"));
    assert_eq!(get(gate.http, "rewrite", "/old/1?a=b").json()["target"], "/new?a=b");
    assert_eq!(get(gate.http, "vhost", "/").json()["headers"]["host"], json!(["inner.example"]));
    assert_eq!(get(gate.http, "denied", "/").status, 403);
    assert_eq!(get(gate.http, "closed", "/").status, 503);
    let missing = get(gate.http, "h", "/other");
    assert_eq!(missing.status, 404);
    for name in ["content-type", "content-length", "date"] {
        assert!(missing.header(name).is_some(), "{name}");
    }
    let mut raw = Raw::connect(gate.http);
    raw.send("GET /none HTTP/1.1\r\nHost: h\r\nAccept: application/json\r\n\r\n");
    assert_eq!(raw.reply().json(), json!({"code": 404, "message": "Not Found"}));
    raw.send("HEAD /app HTTP/1.1\r\nHost: h\r\n\r\nGET /app HTTP/1.1\r\nHost: h\r\n\r\n");
    assert!(raw.head().header("content-length").is_some());
    assert_eq!(raw.reply().json()["method"], "GET", "HEAD had no body");
    raw.send("OPTIONS * HTTP/1.1\r\nHost: h\r\n\r\n");
    assert_eq!(raw.reply().status, 200);

    let lines = until("a log line", || {
        let block = gate.log.recv_timeout(Duration::from_secs(5)).ok()?;
        String::from_utf8(block).unwrap().lines().find(|l| l.contains("x%20y")).map(str::to_string)
    });
    assert!(lines.starts_with("127.0.0.1 - - ["), "{lines}");
    assert!(lines.contains("\"GET /app/x%20y?q=1&r HTTP/1.1\" 200 "), "{lines}");
    assert!(
        lines.contains(&format!("[shop-web-80] [] {} ", backend.address)) && lines.ends_with(" 200 mine"),
        "{lines}"
    );
}

#[test]
fn requests_spread_over_all_endpoints() {
    let backends: Vec<Backend> = (0..10).map(|_| Backend::start("web")).collect();
    let mut gate = Gate::start();
    gate.service("web", &backends.iter().map(|b| b.address).collect::<Vec<_>>());
    gate.publish(&[ingress("a", "nginx", "h", "/", "web", &[])]);
    for _ in 0..100 {
        assert_eq!(get(gate.http, "h", "/").status, 200);
    }
    assert!(backends.iter().all(|b| b.seen() == 10), "{:?}", backends.iter().map(Backend::seen).collect::<Vec<_>>());
}

#[test]
fn failures_have_their_own_answers() {
    let backend = Backend::start("web");
    let pages = Backend::start("pages");
    let mut gate = Gate::start();
    gate.service("web", &[backend.address]);
    gate.service("pages", &[pages.address]);
    gate.service("dead", &[dead()]);
    gate.publish(&[
        ingress("none", "nginx", "none", "/", "nothing", &[]),
        ingress("pages", "nginx", "pages", "/", "nothing", &[("default-backend", "pages")]),
        ingress("dead", "nginx", "dead", "/", "dead", &[]),
        ingress("slow", "nginx", "slow", "/", "web", &[("proxy-read-timeout", "1")]),
    ]);
    assert_eq!(get(gate.http, "none", "/").status, 503);
    assert_eq!(get(gate.http, "dead", "/").status, 502);
    let page = get(gate.http, "pages", "/a?b").json();
    assert_eq!((page["name"].as_str(), page["target"].as_str()), (Some("pages"), Some("/")));
    for (name, value) in
        [("x-code", "503"), ("x-original-uri", "/a?b"), ("x-ingress-name", "pages"), ("x-service-port", "80")]
    {
        assert_eq!(page["headers"][name], json!([value]), "{name}");
    }
    let begun = Instant::now();
    let mut raw = Raw::connect(gate.http);
    raw.send("POST /never HTTP/1.1\r\nHost: slow\r\nContent-Length: 0\r\n\r\n");
    assert_eq!(raw.reply().status, 504);
    assert!((1..4).contains(&begun.elapsed().as_secs()), "{:?}", begun.elapsed());
    assert_eq!(get(gate.http, "slow", "/").status, 200);
}

#[test]
fn other_endpoints_take_over_and_stale_connections_are_replaced() {
    let backend = Backend::start("web");
    let mut gate = Gate::start();
    gate.service("web", &[dead(), backend.address, dead()]);
    gate.publish(&[ingress("a", "nginx", "h", "/", "web", &[])]);
    let mut raw = Raw::connect(gate.http);
    for n in 0..12 {
        assert_eq!(raw.get(&format!("/{n}")).status, 200);
        raw.send("POST /p HTTP/1.1\r\nHost: h\r\nContent-Length: 3\r\n\r\nabc");
        assert_eq!(raw.reply().json()["length"], 3, "a body not yet sent goes to the next endpoint");
    }
    // A backend that answers once and then closes without having said so, as it restarts.
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let address = listener.local_addr().unwrap();
    std::thread::spawn(move || {
        for stream in listener.incoming() {
            use std::io::{Read, Write};
            let mut stream = stream.unwrap();
            let mut buffer = [0; 4096];
            let _ = stream.read(&mut buffer);
            let _ = stream.write_all(b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok");
        }
    });
    gate.service("web", &[address]);
    for _ in 0..200 {
        assert_eq!(raw.get("/").body, b"ok");
    }
}

#[test]
fn bodies_stream_within_their_limit() {
    let backend = Backend::start("web");
    let mut gate = Gate::start();
    gate.service("web", &[backend.address]);
    gate.publish(&[
        ingress("a", "nginx", "h", "/", "web", &[]),
        ingress("b", "nginx", "big", "/", "web", &[("proxy-body-size", "0")]),
    ]);
    let mut raw = Raw::connect(gate.http);
    raw.send("POST / HTTP/1.1\r\nHost: h\r\nContent-Length: 1048577\r\n\r\n");
    assert_eq!(raw.reply().status, 413);
    let mut raw = Raw::connect(gate.http);
    raw.send("POST / HTTP/1.1\r\nHost: h\r\nTransfer-Encoding: chunked\r\n\r\n");
    let chunk = [b"10000\r\n".as_slice(), &[b'a'; 65536], b"\r\n"].concat();
    for _ in 0..17 {
        use std::io::Write;
        let _ = raw.stream.write_all(&chunk);
    }
    assert_eq!(raw.reply().status, 413, "counted, not only announced");
    let mut raw = Raw::connect(gate.http);
    raw.send("POST /up HTTP/1.1\r\nHost: big\r\nTransfer-Encoding: chunked\r\n\r\n");
    for _ in 0..80 {
        raw.send(&chunk);
    }
    raw.send("0\r\n\r\n");
    assert_eq!(raw.reply().json()["length"], 80 * 65536);
}

fn certificate(names: &[&str]) -> (String, String) {
    let key = rcgen::KeyPair::generate().unwrap();
    let mut parameters =
        rcgen::CertificateParams::new(names.iter().map(|n| n.to_string()).collect::<Vec<_>>()).unwrap();
    parameters.distinguished_name.push(rcgen::DnType::CommonName, names[0]);
    (parameters.self_signed(&key).unwrap().pem(), key.serialize_pem())
}

#[test]
fn certificates_follow_the_server_name_and_change_without_a_restart() {
    let backend = Backend::start("web");
    let mut gate = Gate::start();
    gate.service("web", &[backend.address]);
    let directory = tempfile::tempdir().unwrap();
    let trust = directory.path().join("ca.pem");
    let tls = |name: &str, host: &str, class: &str| {
        let mut object = ingress(name, class, host, "/", "web", &[]);
        object["spec"]["tls"] = json!([{"hosts": [host], "secretName": name}]);
        object
    };
    let routes = [
        tls("one", "one.test", "nginx"),
        tls("wild", "*.wild.test", "portolan"),
        tls("missing", "missing.test", "nginx"),
    ];
    gate.secrets.insert("one".into(), certificate(&["one.test"]));
    gate.secrets.insert("wild".into(), certificate(&["*.wild.test"]));
    gate.publish(&routes);
    let url = |host: &str| format!("https://{host}:{}/x", gate.https.port());
    let resolve = |host: &str| format!("{host}:{}:127.0.0.1", gate.https.port());
    let fetch = |host: &str, extra: &[&str]| {
        let (url, resolve) = (url(host), resolve(host));
        curl(&[&["--resolve", &resolve, &url, "-D", "-"], extra].concat())
    };
    for (secret, host) in [("one", "one.test"), ("wild", "a.wild.test")] {
        std::fs::write(&trust, &gate.secrets[secret].0).unwrap();
        for version in ["--http1.1", "--http2"] {
            let answer = fetch(host, &["--cacert", trust.to_str().unwrap(), version]);
            assert!(answer.starts_with(if version == "--http2" { "HTTP/2 200" } else { "HTTP/1.1 200" }), "{answer}");
            assert!(
                answer.contains("\"x-forwarded-proto\":[\"https\"]")
                    && answer.contains("\"x-forwarded-port\":[\"443\"]")
            );
            let hsts =
                answer.to_ascii_lowercase().contains("strict-transport-security: max-age=31536000; includesubdomains");
            assert_eq!(hsts, secret == "one", "only for ingress-nginx's class");
        }
    }
    let fake = curl(&["-k", "-v", "--stderr", "-", "--resolve", &resolve("missing.test"), &url("missing.test")]);
    assert!(
        fake.contains("Kubernetes Ingress Controller Fake Certificate") && fake.contains("\"name\":\"web\""),
        "{fake}"
    );
    let plain = curl(&[
        "-D",
        "-",
        "--resolve",
        &format!("one.test:{}:127.0.0.1", gate.http.port()),
        &format!("http://one.test:{}/a?b", gate.http.port()),
    ]);
    assert!(plain.starts_with("HTTP/1.1 308") && plain.contains("Location: https://one.test/a?b"), "{plain}");

    // A connection that is open goes on while the certificate changes; the next one sees the new certificate.
    let provider = Arc::new(rustls::crypto::aws_lc_rs::default_provider());
    let client = rustls::ClientConfig::builder_with_provider(provider.clone())
        .with_safe_default_protocol_versions()
        .unwrap()
        .dangerous()
        .with_custom_certificate_verifier(Arc::new(AnyCertificate(provider)))
        .with_no_client_auth();
    let client = Arc::new(client);
    let connect = || {
        let name = rustls_pki_types::ServerName::try_from("one.test").unwrap();
        let connection = rustls::ClientConnection::new(client.clone(), name).unwrap();
        let stream = std::net::TcpStream::connect(gate.https).unwrap();
        stream.set_read_timeout(Some(DEADLINE)).unwrap();
        rustls::StreamOwned::new(connection, stream)
    };
    let ask = |stream: &mut rustls::StreamOwned<rustls::ClientConnection, std::net::TcpStream>| {
        use std::io::{Read, Write};
        stream.write_all(b"GET / HTTP/1.1\r\nHost: one.test\r\n\r\n").unwrap();
        let mut answer = Vec::new();
        while !answer.ends_with(b"}") {
            let mut piece = [0; 4096];
            let length = stream.read(&mut piece).unwrap();
            assert!(length > 0, "connection closed");
            answer.extend_from_slice(&piece[..length]);
        }
        stream.conn.peer_certificates().unwrap()[0].to_vec()
    };
    let mut before = connect();
    let old = ask(&mut before);
    let renewed = certificate(&["one.test"]);
    let mut secrets = gate.secrets.clone();
    secrets.insert("one".into(), renewed);
    gate.secrets = secrets;
    gate.publish(&routes);
    assert_eq!(ask(&mut before), old);
    let mut after = connect_again(&client, gate.https);
    assert_ne!(ask(&mut after), old);
}

fn connect_again(
    client: &Arc<rustls::ClientConfig>,
    address: SocketAddr,
) -> rustls::StreamOwned<rustls::ClientConnection, std::net::TcpStream> {
    // Without the memory of earlier sessions, so that the certificate is sent.
    let mut fresh = (**client).clone();
    fresh.resumption = rustls::client::Resumption::disabled();
    let name = rustls_pki_types::ServerName::try_from("one.test").unwrap();
    let connection = rustls::ClientConnection::new(Arc::new(fresh), name).unwrap();
    let stream = std::net::TcpStream::connect(address).unwrap();
    stream.set_read_timeout(Some(DEADLINE)).unwrap();
    rustls::StreamOwned::new(connection, stream)
}

#[derive(Debug)]
struct AnyCertificate(Arc<rustls::crypto::CryptoProvider>);

impl rustls::client::danger::ServerCertVerifier for AnyCertificate {
    fn verify_server_cert(
        &self,
        _: &rustls_pki_types::CertificateDer<'_>,
        _: &[rustls_pki_types::CertificateDer<'_>],
        _: &rustls_pki_types::ServerName<'_>,
        _: &[u8],
        _: rustls_pki_types::UnixTime,
    ) -> Result<rustls::client::danger::ServerCertVerified, rustls::Error> {
        Ok(rustls::client::danger::ServerCertVerified::assertion())
    }

    fn verify_tls12_signature(
        &self,
        message: &[u8],
        certificate: &rustls_pki_types::CertificateDer<'_>,
        signature: &rustls::DigitallySignedStruct,
    ) -> Result<rustls::client::danger::HandshakeSignatureValid, rustls::Error> {
        rustls::crypto::verify_tls12_signature(
            message,
            certificate,
            signature,
            &self.0.signature_verification_algorithms,
        )
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        certificate: &rustls_pki_types::CertificateDer<'_>,
        signature: &rustls::DigitallySignedStruct,
    ) -> Result<rustls::client::danger::HandshakeSignatureValid, rustls::Error> {
        rustls::crypto::verify_tls13_signature(
            message,
            certificate,
            signature,
            &self.0.signature_verification_algorithms,
        )
    }

    fn supported_verify_schemes(&self) -> Vec<rustls::SignatureScheme> {
        self.0.signature_verification_algorithms.supported_schemes()
    }
}

#[test]
fn http2_with_prior_knowledge_is_served_on_the_plain_port() {
    let (gate, _backend) = simple(&[]);
    let url = format!("http://h:{}/a?b", gate.http.port());
    let resolve = format!("h:{}:127.0.0.1", gate.http.port());
    let answer =
        curl(&["--http2-prior-knowledge", "-D", "-", "--resolve", &resolve, &url, "-d", "hello", "-H", "Cookie: a=1"]);
    assert!(answer.starts_with("HTTP/2 200"), "{answer}");
    assert!(
        answer.contains("\"target\":\"/a?b\"")
            && answer.contains("\"length\":5")
            && answer.contains("\"cookie\":[\"a=1\"]")
    );
}

#[test]
fn routes_and_endpoints_change_under_load_without_a_failure() {
    let backends = [Backend::start("web"), Backend::start("web")];
    let mut gate = Gate::start();
    gate.service("web", &[backends[0].address]);
    let routes = |n: usize| {
        let mut routes = vec![ingress("a", "nginx", "h", "/", "web", &[])];
        routes.extend((0..n % 7).map(|i| ingress(&format!("extra-{i}"), "nginx", &format!("x{i}"), "/", "web", &[])));
        routes
    };
    gate.publish(&routes(0));
    let stop = Arc::new(AtomicBool::new(false));
    let done = Arc::new(AtomicUsize::new(0));
    let clients: Vec<_> = (0..4)
        .map(|_| {
            let (stop, done, address) = (stop.clone(), done.clone(), gate.http);
            std::thread::spawn(move || {
                // One connection for all: a closed one fails the test.
                let mut raw = Raw::connect(address);
                while !stop.load(Ordering::SeqCst) {
                    assert_eq!(raw.get("/load").status, 200);
                    done.fetch_add(1, Ordering::SeqCst);
                }
            })
        })
        .collect();
    let begun = Instant::now();
    let mut changes = 0;
    while begun.elapsed() < Duration::from_millis(1500) {
        changes += 1;
        gate.publish(&routes(changes));
        gate.service("web", &[backends[changes % 2].address]);
        std::thread::sleep(Duration::from_millis(3));
    }
    stop.store(true, Ordering::SeqCst);
    for client in clients {
        client.join().unwrap();
    }
    assert!(changes > 50 && done.load(Ordering::SeqCst) > 100, "{changes} changes, {done:?} requests");
    assert!(backends.iter().all(|b| b.seen() > 0), "both endpoints were used");
}

#[test]
fn stopping_lets_requests_finish() {
    let (mut gate, _backend) = simple(&[]);
    let (http, idle) = (gate.http, Raw::connect(gate.http));
    let mut keep = Raw::connect(http);
    assert_eq!(keep.get("/").status, 200);
    let mut busy = Raw::connect(http);
    busy.send("GET /slow HTTP/1.1\r\nHost: h\r\n\r\n");
    std::thread::sleep(Duration::from_millis(100));
    let engine = gate.engine.take().unwrap();
    let begun = Instant::now();
    let stopping = std::thread::spawn(move || engine.stop());
    assert!(keep.closed(), "idle connections end at once");
    let reply = busy.reply();
    assert_eq!((reply.status, reply.header("connection").as_deref()), (200, Some("close")));
    assert!(busy.closed());
    drop((keep, busy, idle));
    stopping.join().unwrap();
    assert!(begun.elapsed() < Duration::from_secs(8), "{:?}", begun.elapsed());
    assert!(std::net::TcpStream::connect(http).is_err());
}

#[test]
fn a_port_in_use_is_refused() {
    let gate = Gate::start();
    let config = EngineConfig {
        http: vec![gate.http],
        https: vec![],
        workers: 1,
        access_log: AccessLog::Off,
        drain: Duration::ZERO,
    };
    let error = Engine::start(config, Registry::new(1, ConstLabels::default())).err().expect("two engines on one port");
    assert_eq!(error.to_string(), format!("cannot listen on {}", gate.http));
}
