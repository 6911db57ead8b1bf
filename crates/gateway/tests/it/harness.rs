//! Backends, routes and clients for the tests.

use std::collections::HashMap;
use std::io::{Read, Write};
use std::net::{SocketAddr, TcpStream};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, mpsc};
use std::time::{Duration, Instant};

use bytes::Bytes;
use http_body_util::{BodyExt, Full, StreamBody};
use hyper::body::{Frame, Incoming};
use hyper::service::service_fn;
use hyper::{Request, Response};
use hyper_util::rt::TokioIo;
use k8s_openapi::ByteString;
use k8s_openapi::api::networking::v1::{Ingress, IngressClass};
use portolan_gateway::{AccessLog, ConstLabels, Engine, EngineConfig, Registry, read_certificate};
use portolan_plan::route::{Input, Options, compile};
use portolan_plan::world::ObjectKey;
use serde_json::{Value, json};

/// How long anything may take before a test gives up.
pub const DEADLINE: Duration = Duration::from_secs(20);

/// A backend that answers with JSON about the request.
pub struct Backend {
    pub address: SocketAddr,
    pub requests: Arc<AtomicUsize>,
    pub connections: Arc<AtomicUsize>,
    runtime: Option<tokio::runtime::Runtime>,
}

impl Drop for Backend {
    fn drop(&mut self) {
        // Also where a runtime must not be waited for.
        if let Some(runtime) = self.runtime.take() {
            runtime.shutdown_background();
        }
    }
}

impl Backend {
    pub fn start(name: &'static str) -> Backend {
        let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(1).enable_all().build().unwrap();
        let listener = runtime.block_on(tokio::net::TcpListener::bind("127.0.0.1:0")).unwrap();
        let address = listener.local_addr().unwrap();
        let (requests, connections) = (Arc::new(AtomicUsize::new(0)), Arc::new(AtomicUsize::new(0)));
        let (counted, opened) = (requests.clone(), connections.clone());
        runtime.spawn(async move {
            loop {
                let (stream, _) = listener.accept().await.unwrap();
                opened.fetch_add(1, Ordering::SeqCst);
                let counted = counted.clone();
                tokio::spawn(async move {
                    let service = service_fn(move |request| {
                        counted.fetch_add(1, Ordering::SeqCst);
                        answer(name, request)
                    });
                    let connection =
                        hyper::server::conn::http1::Builder::new().serve_connection(TokioIo::new(stream), service);
                    let _ = connection.with_upgrades().await;
                });
            }
        });
        Backend { address, requests, connections, runtime: Some(runtime) }
    }

    pub fn seen(&self) -> usize {
        self.requests.load(Ordering::SeqCst)
    }
}

type Sent = http_body_util::combinators::UnsyncBoxBody<Bytes, std::convert::Infallible>;

async fn answer(name: &'static str, mut request: Request<Incoming>) -> Result<Response<Sent>, hyper::Error> {
    let path = request.uri().path().to_string();
    if path == "/socket" {
        let upgrade = hyper::upgrade::on(&mut request);
        tokio::spawn(async move {
            let io = TokioIo::new(upgrade.await.unwrap());
            let (mut read, mut write) = tokio::io::split(io);
            let _ = tokio::io::copy(&mut read, &mut write).await;
            let _ = tokio::io::AsyncWriteExt::shutdown(&mut write).await;
        });
        let response = Response::builder().status(101).header("connection", "upgrade").header("upgrade", "echo");
        return Ok(response.body(Full::new(Bytes::new()).boxed_unsync()).unwrap());
    }
    let (parts, body) = request.into_parts();
    let headers: HashMap<String, Vec<String>> = parts
        .headers
        .keys()
        .map(|k| {
            (k.to_string(), parts.headers.get_all(k).iter().map(|v| v.to_str().unwrap_or("?").to_string()).collect())
        })
        .collect();
    let (mut length, mut trailers) = (0, HashMap::new());
    let mut body = body;
    while let Some(frame) = body.frame().await {
        match frame?.into_data() {
            Ok(data) => length += data.len(),
            Err(frame) => {
                for (name, value) in frame.into_trailers().unwrap().iter() {
                    trailers.insert(name.to_string(), value.to_str().unwrap_or("?").to_string());
                }
            }
        }
    }
    if path == "/slow" {
        tokio::time::sleep(Duration::from_millis(700)).await;
    }
    if path == "/never" {
        std::future::pending::<()>().await;
    }
    if path == "/trailers" {
        let mut fields = http::HeaderMap::new();
        fields.insert("x-sum", "42".parse().unwrap());
        fields.insert("set-cookie", "no=1".parse().unwrap());
        let frames = [Ok(Frame::data(Bytes::from_static(b"data"))), Ok(Frame::trailers(fields))];
        let body = StreamBody::new(futures::stream::iter(frames));
        return Ok(Response::builder()
            .header("trailer", "x-sum, set-cookie")
            .body(BodyExt::boxed_unsync(body))
            .unwrap());
    }
    let text = json!({"name": name, "method": parts.method.as_str(), "target": parts.uri.to_string(), "headers": headers,
        "length": length, "trailers": trailers});
    let mut response = Response::builder().header("x-backend", name).header("server", "backend/1");
    if path == "/hop" {
        response = response.header("connection", "x-hop").header("x-hop", "1").header("keep-alive", "timeout=1");
    }
    Ok(response.body(Full::new(Bytes::from(text.to_string())).boxed_unsync()).unwrap())
}

/// An engine with routes; classes `nginx` and `portolan` exist.
pub struct Gate {
    pub engine: Option<Engine>,
    pub http: SocketAddr,
    pub https: SocketAddr,
    pub services: Arc<Mutex<HashMap<String, Vec<SocketAddr>>>>,
    pub secrets: HashMap<String, (String, String)>,
    pub log: mpsc::Receiver<Vec<u8>>,
}

impl Gate {
    pub fn start() -> Gate {
        portolan_observe::init_tracing("warn");
        let (blocks, log) = mpsc::sync_channel(1024);
        let local: SocketAddr = "127.0.0.1:0".parse().unwrap();
        let config = EngineConfig {
            http: vec![local],
            https: vec![local],
            workers: 2,
            access_log: AccessLog::Channel(blocks),
            drain: Duration::from_secs(10),
        };
        let engine = Engine::start(config, Registry::new(2, ConstLabels::default())).unwrap();
        let (http, https) = (engine.http[0], engine.https[0]);
        Gate { engine: Some(engine), http, https, services: Arc::default(), secrets: HashMap::new(), log }
    }

    pub fn service(&self, name: &str, addresses: &[SocketAddr]) {
        self.services.lock().unwrap().insert(name.into(), addresses.to_vec());
        for endpoints in self.engine.as_ref().unwrap().upstreams().filter(|e| e.key.service.name == name) {
            endpoints.set(addresses.to_vec());
        }
    }

    /// Publishes Ingresses.
    pub fn publish(&mut self, ingresses: &[Value]) {
        let class = |name: &str, controller: &str| -> Arc<IngressClass> {
            Arc::new(
                serde_json::from_value(json!({"metadata": {"name": name}, "spec": {"controller": controller}}))
                    .unwrap(),
            )
        };
        let read: HashMap<ObjectKey, _> = self
            .secrets
            .iter()
            .map(|(name, (certificate, key))| {
                let data = [("tls.crt", certificate), ("tls.key", key)];
                let data = data.map(|(k, v)| (k.to_string(), ByteString(v.as_bytes().to_vec()))).into();
                (ObjectKey::new("shop", name), read_certificate(&data).unwrap())
            })
            .collect();
        let input = Input {
            ingresses: ingresses
                .iter()
                .map(|i| Arc::new(serde_json::from_value::<Ingress>(i.clone()).unwrap()))
                .collect(),
            classes: vec![class("nginx", "k8s.io/ingress-nginx"), class("portolan", "portolan.dev/ingress")],
            certificates: read.iter().map(|(k, (c, _))| (k.clone(), Ok(c.clone()))).collect(),
        };
        let table = compile(&input, &Options::default()).table;
        let keys = read.into_iter().map(|(k, (_, key))| (k, key)).collect();
        let services = self.services.lock().unwrap();
        self.engine
            .as_mut()
            .unwrap()
            .publish(table, keys, |key| services.get(&key.service.name).cloned().unwrap_or_default());
    }
}

impl Drop for Gate {
    fn drop(&mut self) {
        if let Some(engine) = self.engine.take() {
            engine.stop();
        }
    }
}

/// An Ingress `shop/NAME` with one path.
pub fn ingress(name: &str, class: &str, host: &str, path: &str, service: &str, annotations: &[(&str, &str)]) -> Value {
    let annotations: HashMap<String, &str> =
        annotations.iter().map(|(k, v)| (format!("nginx.ingress.kubernetes.io/{k}"), *v)).collect();
    json!({"metadata": {"namespace": "shop", "name": name, "annotations": annotations},
        "spec": {"ingressClassName": class, "rules": [{"host": host, "http": {"paths": [{"path": path,
            "pathType": "Prefix", "backend": {"service": {"name": service, "port": {"number": 80}}}}]}}]}})
}

/// A gate whose host `h` leads to one backend named `web`.
pub fn simple(annotations: &[(&str, &str)]) -> (Gate, Backend) {
    let backend = Backend::start("web");
    let mut gate = Gate::start();
    gate.service("web", &[backend.address]);
    gate.publish(&[ingress("a", "nginx", "h", "/", "web", annotations)]);
    (gate, backend)
}

/// A raw HTTP/1 connection.
pub struct Raw {
    pub stream: TcpStream,
    buffer: Vec<u8>,
}

/// A response as it came.
#[derive(Debug)]
pub struct Reply {
    pub status: u16,
    pub head: String,
    pub body: Vec<u8>,
}

impl Reply {
    pub fn json(&self) -> Value {
        serde_json::from_slice(&self.body).unwrap_or_else(|_| panic!("not JSON: {self:?}"))
    }

    pub fn header(&self, name: &str) -> Option<String> {
        self.head.lines().find_map(|line| {
            let (n, value) = line.split_once(':')?;
            n.eq_ignore_ascii_case(name).then(|| value.trim().to_string())
        })
    }
}

impl Raw {
    pub fn connect(address: SocketAddr) -> Raw {
        let stream = TcpStream::connect_timeout(&address, DEADLINE).unwrap();
        stream.set_read_timeout(Some(DEADLINE)).unwrap();
        stream.set_nodelay(true).unwrap();
        Raw { stream, buffer: Vec::new() }
    }

    pub fn send(&mut self, bytes: impl AsRef<[u8]>) {
        self.stream.write_all(bytes.as_ref()).unwrap();
    }

    fn more(&mut self) -> bool {
        let mut piece = [0; 16384];
        match self.stream.read(&mut piece) {
            Ok(0) => false,
            Ok(n) => {
                self.buffer.extend_from_slice(&piece[..n]);
                true
            }
            Err(error) if error.kind() == std::io::ErrorKind::ConnectionReset => false,
            Err(error) => panic!("no answer: {error}; have {:?}", String::from_utf8_lossy(&self.buffer)),
        }
    }

    pub fn take(&mut self, count: usize) -> Vec<u8> {
        while self.buffer.len() < count {
            assert!(self.more(), "ended early: {:?}", String::from_utf8_lossy(&self.buffer));
        }
        self.buffer.drain(..count).collect()
    }

    fn line(&mut self) -> String {
        loop {
            if let Some(end) = self.buffer.windows(2).position(|w| w == b"\r\n") {
                let line: Vec<u8> = self.buffer.drain(..end + 2).collect();
                return String::from_utf8(line[..end].to_vec()).unwrap();
            }
            assert!(self.more(), "ended early: {:?}", String::from_utf8_lossy(&self.buffer));
        }
    }

    /// Reads the head of a response.
    pub fn head(&mut self) -> Reply {
        let mut head = String::new();
        loop {
            let line = self.line();
            if line.is_empty() {
                break;
            }
            head.push_str(&line);
            head.push('\n');
        }
        let status = head.split(' ').nth(1).unwrap().parse().unwrap();
        Reply { status, head, body: Vec::new() }
    }

    /// Reads a whole response; trailers are appended to its head.
    pub fn reply(&mut self) -> Reply {
        let mut reply = self.head();
        if let Some(length) = reply.header("content-length") {
            reply.body = self.take(length.parse().unwrap());
        } else if reply.header("transfer-encoding").as_deref() == Some("chunked") {
            loop {
                let size = usize::from_str_radix(&self.line(), 16).unwrap();
                if size == 0 {
                    break;
                }
                let data = self.take(size + 2);
                reply.body.extend_from_slice(&data[..size]);
            }
            loop {
                let line = self.line();
                if line.is_empty() {
                    break;
                }
                reply.head.push_str(&format!("{line}\n"));
            }
        }
        reply
    }

    pub fn get(&mut self, target: &str) -> Reply {
        self.send(format!("GET {target} HTTP/1.1\r\nHost: h\r\n\r\n"));
        self.reply()
    }

    /// Whether the other side closed the connection and nothing more came.
    pub fn closed(&mut self) -> bool {
        while self.more() {}
        self.buffer.is_empty()
    }
}

pub fn get(address: SocketAddr, host: &str, target: &str) -> Reply {
    let mut raw = Raw::connect(address);
    raw.send(format!("GET {target} HTTP/1.1\r\nHost: {host}\r\nConnection: close\r\n\r\n"));
    raw.reply()
}

/// Runs curl; its standard output.
pub fn curl(arguments: &[&str]) -> String {
    let output = std::process::Command::new("curl").args(["-sS", "--max-time", "20"]).args(arguments).output().unwrap();
    assert!(output.status.success(), "curl {arguments:?}: {}", String::from_utf8_lossy(&output.stderr));
    String::from_utf8(output.stdout).unwrap()
}

/// Waits for a condition.
pub fn until<T>(what: &str, mut condition: impl FnMut() -> Option<T>) -> T {
    let begun = Instant::now();
    loop {
        if let Some(value) = condition() {
            return value;
        }
        assert!(begun.elapsed() < DEADLINE, "waited in vain for {what}");
        std::thread::sleep(Duration::from_millis(20));
    }
}
