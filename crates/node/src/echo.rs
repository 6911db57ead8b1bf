//! The server of the built-in image `portolan.dev/echo`: says who answered and what was asked.
//!
//! HTTP answers are one JSON object with the keys `pod`, `namespace`, `node`, `zone`, `peer`, `local`, `method`, `host`,
//! `path`, `query` and `headers`; TCP connections and UDP datagrams get the keys that apply. A few paths act: `/healthz`
//! answers 200 until `/fail` is called, `/delay?ms=N` waits, `/status?code=N` sets the status, `/bytes?n=N` sends N bytes,
//! `/exit?code=N` ends the process.

use std::collections::BTreeMap;
use std::convert::Infallible;
use std::io;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use bytes::Bytes;
use futures::StreamExt;
use http::header::{CONTENT_LENGTH, CONTENT_TYPE};
use http::{Request, Response, StatusCode};
use http_body_util::combinators::BoxBody;
use http_body_util::{BodyExt, Full, StreamBody};
use hyper::body::{Frame, Incoming};
use hyper::service::service_fn;
use hyper_util::rt::{TokioExecutor, TokioIo, TokioTimer};
use serde_json::{Map, Value, json};
use tokio::io::AsyncWriteExt;
use tokio::net::{TcpListener, TcpStream, UdpSocket};
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;

/// `/delay` waits at most this long, so that a mistyped number does not hold a connection for days.
const MAX_DELAY: Duration = Duration::from_secs(3600);
/// Chunk of `/bytes`: large enough that the time goes into copying, small enough to be shared by all responses.
const CHUNK: usize = 64 * 1024;

/// Who answers.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Identity {
    /// Pod name.
    pub pod: String,
    /// Namespace of the pod.
    pub namespace: String,
    /// Name of the node it runs on.
    pub node: String,
    /// Topology zone of that node.
    pub zone: String,
}

impl Identity {
    /// From POD_NAME, POD_NAMESPACE, NODE_NAME and NODE_ZONE, which the kubelet sets for this image; without POD_NAME the
    /// host name stands in.
    pub fn from_env() -> Identity {
        let get = |name: &str| std::env::var(name).unwrap_or_default();
        let mut pod = get("POD_NAME");
        if pod.is_empty() {
            pod = nix::unistd::gethostname().map(|name| name.to_string_lossy().into_owned()).unwrap_or_default();
        }
        Identity { pod, namespace: get("POD_NAMESPACE"), node: get("NODE_NAME"), zone: get("NODE_ZONE") }
    }
}

/// What to listen on and how to answer.
#[derive(Clone, Debug)]
pub struct EchoConfig {
    /// Ports that answer HTTP/1.1 and HTTP/2 (with prior knowledge).
    pub http_ports: Vec<u16>,
    /// Ports that answer each TCP connection with one object and close.
    pub tcp_ports: Vec<u16>,
    /// Ports that answer each UDP datagram with one object.
    pub udp_ports: Vec<u16>,
    /// Who answers.
    pub identity: Identity,
    /// How long new connections are still served after SIGTERM: endpoint removal reaches the proxies about a second later.
    pub drain: Duration,
}

impl Default for EchoConfig {
    fn default() -> Self {
        EchoConfig {
            http_ports: vec![8080],
            tcp_ports: Vec::new(),
            udp_ports: Vec::new(),
            identity: Identity::default(),
            drain: Duration::from_secs(1),
        }
    }
}

/// Serves until SIGTERM or SIGINT, then until the drain time is over and running answers are done.
///
/// # Errors
/// Fails when a port cannot be bound; the message names it.
pub async fn run(config: EchoConfig) -> io::Result<()> {
    let shutdown = CancellationToken::new();
    let mut terminate = tokio::signal::unix::signal(tokio::signal::unix::SignalKind::terminate())?;
    let stop = shutdown.clone();
    let drain = config.drain;
    tokio::spawn(async move {
        tokio::select! {
            _ = terminate.recv() => tokio::time::sleep(drain).await,
            _ = tokio::signal::ctrl_c() => {}
        }
        stop.cancel();
    });
    serve(config, shutdown).await
}

/// Serves until `shutdown`, then finishes the answers that are running (at most five seconds).
pub async fn serve(config: EchoConfig, shutdown: CancellationToken) -> io::Result<()> {
    let state = Arc::new(State { identity: config.identity, failing: AtomicBool::new(false) });
    let tasks = TaskTracker::new();
    for port in config.http_ports {
        let listener = listen(port)?;
        tasks.spawn(accept(listener, state.clone(), shutdown.clone(), tasks.clone(), serve_http));
    }
    for port in config.tcp_ports {
        let listener = listen(port)?;
        tasks.spawn(accept(listener, state.clone(), shutdown.clone(), tasks.clone(), serve_tcp));
    }
    for port in config.udp_ports {
        let socket = bind_udp(port)?;
        tasks.spawn(serve_udp(socket, state.clone(), shutdown.clone()));
    }
    shutdown.cancelled().await;
    tasks.close();
    let _ = tokio::time::timeout(Duration::from_secs(5), tasks.wait()).await;
    Ok(())
}

#[derive(Debug)]
struct State {
    identity: Identity,
    failing: AtomicBool,
}

impl State {
    fn object(&self, peer: SocketAddr, local: SocketAddr) -> Map<String, Value> {
        let mut object = Map::new();
        object.insert("pod".into(), json!(self.identity.pod));
        object.insert("namespace".into(), json!(self.identity.namespace));
        object.insert("node".into(), json!(self.identity.node));
        object.insert("zone".into(), json!(self.identity.zone));
        object.insert("peer".into(), json!(canonical(peer).to_string()));
        object.insert("local".into(), json!(canonical(local).to_string()));
        object
    }
}

/// IPv4 clients of a dual-stack socket appear as IPv4.
fn canonical(address: SocketAddr) -> SocketAddr {
    SocketAddr::new(address.ip().to_canonical(), address.port())
}

/// A socket on both families, or on IPv4 where there is no IPv6.
fn any_address<T>(port: u16, bind: impl Fn(IpAddr, u16) -> io::Result<T>) -> io::Result<T> {
    bind(IpAddr::V6(Ipv6Addr::UNSPECIFIED), port).or_else(|first| match first.kind() {
        io::ErrorKind::AddrInUse | io::ErrorKind::PermissionDenied => Err(first),
        _ => bind(IpAddr::V4(Ipv4Addr::UNSPECIFIED), port),
    })
}

fn listen(port: u16) -> io::Result<TcpListener> {
    let listener = any_address(port, |ip, port| std::net::TcpListener::bind((ip, port)))
        .map_err(|e| io::Error::new(e.kind(), format!("cannot listen on TCP port {port}: {e}")))?;
    listener.set_nonblocking(true)?;
    TcpListener::from_std(listener)
}

fn bind_udp(port: u16) -> io::Result<UdpSocket> {
    let socket = any_address(port, |ip, port| std::net::UdpSocket::bind((ip, port)))
        .map_err(|e| io::Error::new(e.kind(), format!("cannot bind UDP port {port}: {e}")))?;
    socket.set_nonblocking(true)?;
    UdpSocket::from_std(socket)
}

async fn accept<F>(
    listener: TcpListener,
    state: Arc<State>,
    shutdown: CancellationToken,
    tasks: TaskTracker,
    serve: impl Fn(TcpStream, SocketAddr, Arc<State>, CancellationToken) -> F,
) where
    F: Future<Output = ()> + Send + 'static,
{
    loop {
        let accepted = tokio::select! {
            accepted = listener.accept() => accepted,
            () = shutdown.cancelled() => return,
        };
        match accepted {
            Ok((stream, peer)) => {
                tasks.spawn(serve(stream, peer, state.clone(), shutdown.clone()));
            }
            // Out of descriptors, most likely: give connections time to end.
            Err(_) => tokio::time::sleep(Duration::from_millis(50)).await,
        }
    }
}

async fn serve_tcp(mut stream: TcpStream, peer: SocketAddr, state: Arc<State>, _shutdown: CancellationToken) {
    let Ok(local) = stream.local_addr() else { return };
    let mut line = Value::Object(state.object(peer, local)).to_string();
    line.push('\n');
    if stream.write_all(line.as_bytes()).await.is_ok() {
        let _ = stream.shutdown().await;
    }
}

async fn serve_udp(socket: UdpSocket, state: Arc<State>, shutdown: CancellationToken) {
    let Ok(bound) = socket.local_addr() else { return };
    let mut buffer = vec![0; 65_536];
    loop {
        let received = tokio::select! {
            received = socket.recv_from(&mut buffer) => received,
            () = shutdown.cancelled() => return,
        };
        // An ICMP error of an earlier answer is reported here and is no reason to stop.
        let Ok((_, peer)) = received else { continue };
        let local = local_address_towards(peer).map_or(bound, |ip| SocketAddr::new(ip, bound.port()));
        let mut line = Value::Object(state.object(peer, local)).to_string();
        line.push('\n');
        let _ = socket.send_to(line.as_bytes(), peer).await;
    }
}

/// The address that datagrams to `peer` leave from: a socket bound to any address cannot tell.
fn local_address_towards(peer: SocketAddr) -> Option<IpAddr> {
    let any: IpAddr = if peer.is_ipv4() { Ipv4Addr::UNSPECIFIED.into() } else { Ipv6Addr::UNSPECIFIED.into() };
    let probe = std::net::UdpSocket::bind((any, 0)).ok()?;
    probe.connect(peer).ok()?;
    Some(probe.local_addr().ok()?.ip())
}

async fn serve_http(stream: TcpStream, peer: SocketAddr, state: Arc<State>, shutdown: CancellationToken) {
    let Ok(local) = stream.local_addr() else { return };
    let _ = stream.set_nodelay(true);
    let service = service_fn(move |request| {
        let state = state.clone();
        async move { Ok::<_, Infallible>(answer(request, peer, local, &state).await) }
    });
    let mut builder = hyper_util::server::conn::auto::Builder::new(TokioExecutor::new());
    builder.http1().timer(TokioTimer::new()).header_read_timeout(None);
    let connection = builder.serve_connection(TokioIo::new(stream), service);
    tokio::pin!(connection);
    tokio::select! {
        _ = connection.as_mut() => return,
        () = shutdown.cancelled() => connection.as_mut().graceful_shutdown(),
    }
    let _ = connection.await;
}

type Body = BoxBody<Bytes, Infallible>;

async fn answer(request: Request<Incoming>, peer: SocketAddr, local: SocketAddr, state: &State) -> Response<Body> {
    let (request, mut body) = request.into_parts();
    // Read to its end: an answer given before would cut the upload off, which clients and proxies take for a broken server.
    while let Some(Ok(_)) = body.frame().await {}
    let query = parse_query(request.uri.query().unwrap_or_default());
    let mut status = StatusCode::OK;
    match request.uri.path() {
        "/healthz" => {
            return if state.failing.load(Ordering::Relaxed) {
                text(StatusCode::INTERNAL_SERVER_ERROR, "failing\n")
            } else {
                text(StatusCode::OK, "ok\n")
            };
        }
        "/fail" => state.failing.store(true, Ordering::Relaxed),
        "/delay" => match number(&query, "ms") {
            Ok(ms) => tokio::time::sleep(Duration::from_millis(ms).min(MAX_DELAY)).await,
            Err(message) => return text(StatusCode::BAD_REQUEST, message),
        },
        "/status" => match number(&query, "code").map(|code| u16::try_from(code).map(StatusCode::from_u16)) {
            // An informational status is no answer, so it cannot be sent as one.
            Ok(Ok(Ok(code))) if code.as_u16() >= 200 => status = code,
            Ok(_) => return text(StatusCode::BAD_REQUEST, "code must be between 200 and 999\n"),
            Err(message) => return text(StatusCode::BAD_REQUEST, message),
        },
        "/bytes" => {
            return match number(&query, "n") {
                Ok(n) => bytes(n),
                Err(message) => text(StatusCode::BAD_REQUEST, message),
            };
        }
        "/exit" => {
            let code = number(&query, "code").unwrap_or(0);
            // After the answer has left, or the client could not tell it from a crash.
            tokio::spawn(async move {
                tokio::time::sleep(Duration::from_millis(20)).await;
                std::process::exit(i32::try_from(code & 0xff).unwrap_or(1));
            });
        }
        _ => {}
    }
    let mut object = state.object(peer, local);
    let host = request.uri.authority().map(|a| a.to_string()).or_else(|| {
        request.headers.get(http::header::HOST).map(|host| String::from_utf8_lossy(host.as_bytes()).into_owned())
    });
    object.insert("method".into(), json!(request.method.as_str()));
    object.insert("host".into(), json!(host.unwrap_or_default()));
    object.insert("path".into(), json!(request.uri.path()));
    object.insert("query".into(), json!(request.uri.query().unwrap_or_default()));
    let mut headers: BTreeMap<String, String> = BTreeMap::new();
    for (name, value) in &request.headers {
        let value = String::from_utf8_lossy(value.as_bytes());
        headers
            .entry(name.to_string())
            .and_modify(|all| {
                all.push_str(", ");
                all.push_str(&value);
            })
            .or_insert_with(|| value.into_owned());
    }
    object.insert("headers".into(), json!(headers));
    let mut body = Value::Object(object).to_string();
    body.push('\n');
    let mut response = Response::new(full(body));
    *response.status_mut() = status;
    response.headers_mut().insert(CONTENT_TYPE, http::HeaderValue::from_static("application/json"));
    response
}

fn parse_query(query: &str) -> BTreeMap<&str, &str> {
    query.split('&').filter_map(|pair| pair.split_once('=')).collect()
}

fn number(query: &BTreeMap<&str, &str>, name: &str) -> Result<u64, String> {
    let value = query.get(name).ok_or_else(|| format!("query parameter {name} is missing\n"))?;
    value.parse().map_err(|_| format!("query parameter {name} must be a number, not {value:?}\n"))
}

fn bytes(n: u64) -> Response<Body> {
    let chunk = Bytes::from(vec![b'x'; CHUNK]);
    let chunks = n.div_ceil(CHUNK as u64);
    let stream = futures::stream::iter(0..chunks).map(move |i| {
        let left = n - i * CHUNK as u64;
        let size = usize::try_from(left.min(CHUNK as u64)).unwrap_or(CHUNK);
        Ok(Frame::data(chunk.slice(..size)))
    });
    let mut response = Response::new(BodyExt::boxed(StreamBody::new(stream)));
    response.headers_mut().insert(CONTENT_LENGTH, http::HeaderValue::from(n));
    response.headers_mut().insert(CONTENT_TYPE, http::HeaderValue::from_static("application/octet-stream"));
    response
}

fn text(status: StatusCode, body: impl Into<String>) -> Response<Body> {
    let mut response = Response::new(full(body.into()));
    *response.status_mut() = status;
    response.headers_mut().insert(CONTENT_TYPE, http::HeaderValue::from_static("text/plain; charset=utf-8"));
    response
}

fn full(body: String) -> Body {
    Full::new(Bytes::from(body)).boxed()
}
