//! Health-check ports of Services with `externalTrafficPolicy: Local`: load balancers ask there whether a node has endpoints.
//!
//! One HTTP server per Service on the node-port addresses (services.md 3.9). Only ready endpoints count, so that a balancer
//! turns away early while traffic still goes to terminating ones.

use std::collections::BTreeMap;
use std::convert::Infallible;
use std::io;
use std::net::{IpAddr, SocketAddr};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use bytes::Bytes;
use http::{Request, Response, StatusCode};
use http_body_util::Full;
use hyper::body::Incoming;
use hyper::service::service_fn;
use hyper_util::rt::TokioIo;
use portolan_linux::Netns;
use portolan_plan::service::HealthCheck;
use portolan_plan::world::ObjectKey;
use tokio::runtime::Handle;
use tokio_util::sync::CancellationToken;
use tracing::warn;

/// A closed server's task lets go of its port within this, unless the runtime is stuck.
const LET_GO: Duration = Duration::from_millis(500);

/// The health-check servers of one node.
#[derive(Debug)]
pub struct HealthServers {
    netns: Netns,
    runtime: Handle,
    addresses: Vec<IpAddr>,
    servers: BTreeMap<ObjectKey, Server>,
    healthy: Arc<AtomicBool>,
    /// When servers were last told to close; their tasks let go of the ports a moment later.
    closed: Option<Instant>,
}

#[derive(Debug)]
struct Server {
    port: u16,
    local_endpoints: Arc<AtomicUsize>,
    stop: CancellationToken,
}

impl Drop for Server {
    fn drop(&mut self) {
        self.stop.cancel();
    }
}

impl HealthServers {
    /// No servers yet; they will listen in `netns` and run on `runtime`.
    pub fn new(netns: Netns, runtime: Handle) -> HealthServers {
        HealthServers {
            netns,
            runtime,
            addresses: Vec::new(),
            servers: BTreeMap::new(),
            healthy: Arc::new(AtomicBool::new(true)),
            closed: None,
        }
    }

    /// Says whether the proxy itself is healthy; part of every answer.
    pub fn set_healthy(&self, healthy: bool) {
        self.healthy.store(healthy, Ordering::Relaxed);
    }

    /// Opens, closes and updates servers. Answers the Services whose port cannot be opened, which is no trouble for traffic.
    pub fn set(
        &mut self,
        wanted: &BTreeMap<ObjectKey, HealthCheck>,
        addresses: &[IpAddr],
    ) -> Vec<(ObjectKey, u16, io::Error)> {
        let before = self.servers.len();
        if self.addresses != addresses {
            self.addresses = addresses.to_vec();
            self.servers.clear();
        }
        self.servers.retain(|key, server| wanted.get(key).is_some_and(|w| w.port.get() == server.port));
        if self.servers.len() < before {
            self.closed = Some(Instant::now());
        }
        let mut failed = Vec::new();
        for (key, check) in wanted {
            if let Some(server) = self.servers.get(key) {
                server.local_endpoints.store(check.local_endpoints, Ordering::Relaxed);
                continue;
            }
            match self.open_patiently(key, check) {
                Ok(server) => {
                    self.servers.insert(key.clone(), server);
                }
                Err(error) => {
                    warn!(service = %key, port = check.port, %error, "cannot open health-check port");
                    failed.push((key.clone(), check.port.get(), error));
                }
            }
        }
        failed
    }

    /// Opens a server; waits for a port that one of ours may just be letting go of.
    fn open_patiently(&self, key: &ObjectKey, check: &HealthCheck) -> io::Result<Server> {
        loop {
            match self.open(key, check) {
                Err(e)
                    if e.kind() == io::ErrorKind::AddrInUse && self.closed.is_some_and(|at| at.elapsed() < LET_GO) =>
                {
                    std::thread::sleep(Duration::from_millis(2));
                }
                result => return result,
            }
        }
    }

    fn open(&self, key: &ObjectKey, check: &HealthCheck) -> io::Result<Server> {
        let local_endpoints = Arc::new(AtomicUsize::new(check.local_endpoints));
        let stop = CancellationToken::new();
        let port = check.port.get();
        let listeners = self.netns.run(|| {
            self.addresses
                .iter()
                .map(|addr| std::net::TcpListener::bind(SocketAddr::new(*addr, port)))
                .collect::<io::Result<Vec<_>>>()
        })??;
        for listener in listeners {
            listener.set_nonblocking(true)?;
            let answer = Answer {
                service: key.clone(),
                local_endpoints: local_endpoints.clone(),
                healthy: self.healthy.clone(),
            };
            let stop = stop.clone();
            self.runtime.spawn(async move {
                if let Err(error) = serve(listener, answer, stop).await {
                    warn!(%error, "health-check server ended");
                }
            });
        }
        Ok(Server { port, local_endpoints, stop })
    }
}

#[derive(Clone)]
struct Answer {
    service: ObjectKey,
    local_endpoints: Arc<AtomicUsize>,
    healthy: Arc<AtomicBool>,
}

impl Answer {
    fn response(&self) -> Response<Full<Bytes>> {
        let endpoints = self.local_endpoints.load(Ordering::Relaxed);
        let healthy = self.healthy.load(Ordering::Relaxed);
        let status = if endpoints > 0 && healthy { StatusCode::OK } else { StatusCode::SERVICE_UNAVAILABLE };
        let body = format!(
            "{{\n\t\"service\": {{\n\t\t\"namespace\": {},\n\t\t\"name\": {}\n\t}},\n\t\"localEndpoints\": {endpoints},\n\t\"serviceProxyHealthy\": {healthy}\n}}",
            serde_json::Value::from(self.service.namespace.as_str()),
            serde_json::Value::from(self.service.name.as_str()),
        );
        let mut response = Response::new(Full::new(Bytes::from(body)));
        *response.status_mut() = status;
        let headers = response.headers_mut();
        headers.insert(http::header::CONTENT_TYPE, http::HeaderValue::from_static("application/json"));
        headers.insert(http::header::X_CONTENT_TYPE_OPTIONS, http::HeaderValue::from_static("nosniff"));
        headers.insert(
            http::HeaderName::from_static("x-load-balancing-endpoint-weight"),
            http::HeaderValue::from(endpoints),
        );
        response
    }
}

async fn serve(listener: std::net::TcpListener, answer: Answer, stop: CancellationToken) -> io::Result<()> {
    let listener = tokio::net::TcpListener::from_std(listener)?;
    loop {
        let stream = tokio::select! {
            () = stop.cancelled() => return Ok(()),
            accepted = listener.accept() => match accepted {
                Ok((stream, _)) => stream,
                Err(error) => {
                    // Out of descriptors, for example: the backlog waits meanwhile.
                    warn!(%error, "cannot accept a health check");
                    tokio::time::sleep(Duration::from_millis(100)).await;
                    continue;
                }
            },
        };
        let answer = answer.clone();
        let stop = stop.clone();
        tokio::spawn(async move {
            let service = service_fn(move |_: Request<Incoming>| {
                let response = answer.response();
                async move { Ok::<_, Infallible>(response) }
            });
            let connection = hyper::server::conn::http1::Builder::new().serve_connection(TokioIo::new(stream), service);
            tokio::select! {
                _ = connection => {}
                () = stop.cancelled() => {}
            }
        });
    }
}
