//! Health-check ports of Services with `externalTrafficPolicy: Local`: load balancers ask there whether a node has endpoints.
//!
//! One HTTP server per Service on the node-port addresses (services.md 3.9). Only ready endpoints count, so that a balancer
//! turns away early while traffic still goes to terminating ones.
//!
//! Balancers for policy `Cluster` ask the proxy itself, at `/healthz` (KEP-3836); [`ProxyHealth`] is what it answers from.

use std::collections::BTreeMap;
use std::convert::Infallible;
use std::io;
use std::net::{IpAddr, SocketAddr};
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, MutexGuard};
use std::time::{Duration, Instant};

use bytes::Bytes;
use http::{Request, Response, StatusCode};
use http_body_util::Full;
use hyper::body::Incoming;
use hyper::service::service_fn;
use hyper_util::rt::TokioIo;
use k8s_openapi::api::core::v1::Node;
use k8s_openapi::jiff::Timestamp;
use portolan_linux::Netns;
use portolan_plan::service::HealthCheck;
use portolan_plan::world::{IpFamily, ObjectKey};
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
                if let Err(error) = serve_http(listener, move |_| answer.response(), stop).await {
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

/// A change that waits longer than this means that the proxy is stuck: twice kube-proxy's sync period.
const STUCK: Duration = Duration::from_secs(60);
/// The autoscaler taints nodes that it is about to remove.
const LEAVING_TAINT: &str = "ToBeDeletedByClusterAutoscaler";

/// Whether the proxy of a node works, and whether the node should get traffic. Cloning is cheap.
#[derive(Clone, Debug, Default)]
pub struct ProxyHealth(Arc<Mutex<HealthState>>);

#[derive(Debug, Default)]
struct HealthState {
    families: BTreeMap<IpFamily, FamilyHealth>,
    node_ineligible: bool,
}

#[derive(Clone, Copy, Debug, Default)]
struct FamilyHealth {
    last_updated: Option<Timestamp>,
    failing_since: Option<Instant>,
}

impl ProxyHealth {
    fn lock(&self) -> MutexGuard<'_, HealthState> {
        self.0.lock().unwrap_or_else(|poisoned| poisoned.into_inner())
    }

    /// Notes what a sync came to in one family.
    pub fn synced(&self, family: IpFamily, ok: bool, now: Timestamp) {
        let mut state = self.lock();
        let health = state.families.entry(family).or_default();
        if ok {
            *health = FamilyHealth { last_updated: Some(now), failing_since: None };
        } else {
            health.failing_since.get_or_insert_with(Instant::now);
        }
    }

    /// Notes the node as it is now; `None` when it is gone.
    pub fn node(&self, node: Option<&Node>) {
        let leaving = |node: &Node| {
            let taints = node.spec.as_ref().and_then(|s| s.taints.as_ref());
            node.metadata.deletion_timestamp.is_some()
                || taints.into_iter().flatten().any(|taint| taint.key == LEAVING_TAINT)
        };
        self.lock().node_ineligible = node.is_none_or(leaving);
    }

    /// The answer to `/healthz`, or to `/livez` when `live`: a status code and a JSON body. `waiting` is how long the oldest
    /// change has waited for a sync to take it up.
    pub fn answer(&self, live: bool, waiting: Option<Duration>, now: Timestamp) -> (StatusCode, String) {
        let state = self.lock();
        let stuck = waiting.is_some_and(|w| w > STUCK);
        let well = |h: &FamilyHealth| !stuck && h.failing_since.is_none_or(|since| since.elapsed() <= STUCK);
        let updated = |h: &FamilyHealth| h.last_updated.unwrap_or(Timestamp::UNIX_EPOCH);
        let healthy = !stuck && state.families.values().all(well);
        // The balancer is told the present as long as all is well, else since when it is not.
        let last_updated = match state.families.values().map(updated).min() {
            Some(oldest) if !healthy => oldest,
            _ => now,
        };
        let status: serde_json::Map<String, serde_json::Value> = state
            .families
            .iter()
            .map(|(family, h)| {
                let last = if well(h) { now } else { updated(h) };
                let entry = serde_json::json!({"lastUpdated": last.to_string(), "healthy": well(h)});
                (family.as_str().to_owned(), entry)
            })
            .collect();
        let eligible = !state.node_ineligible;
        let mut body = serde_json::json!({
            "lastUpdated": last_updated.to_string(), "currentTime": now.to_string(), "healthy": healthy, "status": status,
        });
        if !live {
            body["nodeEligible"] = eligible.into();
        }
        let ok = healthy && (live || eligible);
        (if ok { StatusCode::OK } else { StatusCode::SERVICE_UNAVAILABLE }, body.to_string())
    }
}

/// Accepts HTTP connections until `stop` and answers every request with `answer`.
pub(crate) async fn serve_http<F>(listener: std::net::TcpListener, answer: F, stop: CancellationToken) -> io::Result<()>
where
    F: Fn(&Request<Incoming>) -> Response<Full<Bytes>> + Clone + Send + 'static,
{
    listener.set_nonblocking(true)?;
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
            let service = service_fn(move |request: Request<Incoming>| {
                let response = answer(&request);
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_proxy_says_whether_it_works_and_whether_the_node_stays() {
        let node = |taints: serde_json::Value, deleted: bool| -> Node {
            let mut object = serde_json::json!({"metadata": {"name": "n1"}, "spec": {"taints": taints}});
            if deleted {
                object["metadata"]["deletionTimestamp"] = "2026-01-01T00:00:00Z".into();
            }
            serde_json::from_value(object).unwrap()
        };
        let leaving = serde_json::json!([{"key": LEAVING_TAINT, "effect": "NoSchedule"}]);
        let other = serde_json::json!([{"key": "other", "effect": "NoSchedule"}]);
        let long = Some(STUCK * 2);
        let short = Some(Duration::from_secs(1));
        let now = Timestamp::UNIX_EPOCH;
        for (name, node, waiting, healthz, livez) in [
            ("all_is_well", Some(node(other.clone(), false)), None, 200, 200),
            ("a_change_just_came_in", Some(node(other.clone(), false)), short, 200, 200),
            ("a_change_waits_for_ever", Some(node(other.clone(), false)), long, 503, 503),
            ("the_autoscaler_removes_the_node", Some(node(leaving, false)), None, 503, 200),
            ("the_node_is_being_deleted", Some(node(other, true)), None, 503, 200),
            ("the_node_is_gone", None, None, 503, 200),
        ] {
            let health = ProxyHealth::default();
            health.node(node.as_ref());
            health.synced(IpFamily::V4, true, now);
            health.synced(IpFamily::V6, false, now);
            for (live, expected) in [(false, healthz), (true, livez)] {
                let (status, body) = health.answer(live, waiting, now);
                let body: serde_json::Value = serde_json::from_str(&body).unwrap();
                assert_eq!(status.as_u16(), expected, "{name} live={live}");
                assert_eq!(body["healthy"], waiting != long, "{name}");
                assert_eq!(body["status"]["IPv6"]["healthy"], waiting != long, "{name}");
                assert_eq!(body.get("nodeEligible").is_none(), live, "{name}");
            }
        }
    }
}
