//! Logging, metrics and readiness shared by all components, and the admin endpoints that show them.
//!
//! Each component registers its metrics and its readiness gates with an [`Observer`]; [`serve_admin`] publishes them. Nothing here
//! decides anything.

use std::collections::BTreeMap;
use std::convert::Infallible;
use std::sync::{Arc, Mutex, MutexGuard};

use bytes::Bytes;
use http::{Method, Request, Response, StatusCode};
use http_body_util::Full;
use hyper::service::service_fn;
use hyper_util::rt::TokioIo;
use prometheus_client::registry::Registry;
use tokio::sync::watch;
use tokio_util::sync::CancellationToken;

/// Starts logging to standard error at `default` (as in `info` or `warn,portolan_dns=debug`), overridden by `PORTOLAN_LOG`.
///
/// A second call in one process does nothing, so tests may call it freely.
pub fn init_tracing(default: &str) {
    let filter = tracing_subscriber::EnvFilter::try_from_env("PORTOLAN_LOG")
        .unwrap_or_else(|_| tracing_subscriber::EnvFilter::new(default));
    let _ = tracing_subscriber::fmt()
        .with_env_filter(filter)
        .with_writer(std::io::stderr)
        .with_ansi(std::io::IsTerminal::is_terminal(&std::io::stderr()))
        .try_init();
}

/// The place where a process's components register metrics and readiness. Clones share one registry.
#[derive(Clone, Debug)]
pub struct Observer {
    inner: Arc<Inner>,
}

#[derive(Debug)]
struct Inner {
    registry: Mutex<Registry>,
    gates: watch::Sender<BTreeMap<String, Result<(), String>>>,
}

impl Default for Observer {
    fn default() -> Self {
        Observer::new()
    }
}

impl Observer {
    /// An empty registry without gates: ready at once.
    pub fn new() -> Observer {
        Observer {
            inner: Arc::new(Inner { registry: Mutex::new(Registry::default()), gates: watch::Sender::default() }),
        }
    }

    /// Registers metrics. Called once per component at start.
    pub fn register<T>(&self, register: impl FnOnce(&mut Registry) -> T) -> T {
        register(&mut self.registry())
    }

    /// Adds a readiness gate, closed at first. The process is ready when all its gates are open.
    pub fn gate(&self, name: &str) -> ReadyGate {
        let gate = ReadyGate { observer: self.clone(), name: name.to_string() };
        gate.not_ready("starting");
        gate
    }

    /// Whether every gate is open.
    pub fn is_ready(&self) -> bool {
        self.inner.gates.borrow().values().all(Result::is_ok)
    }

    /// Waits until every gate is open.
    pub async fn wait_ready(&self) {
        let mut gates = self.inner.gates.subscribe();
        // The sender lives as long as self, so waiting cannot fail.
        let _ = gates.wait_for(|gates| gates.values().all(Result::is_ok)).await;
    }

    /// The gates that are closed, with their reasons, by name.
    pub fn not_ready(&self) -> Vec<(String, String)> {
        self.inner
            .gates
            .borrow()
            .iter()
            .filter_map(|(name, state)| Some((name.clone(), state.clone().err()?)))
            .collect()
    }

    /// The metrics in the OpenMetrics text format.
    pub fn encode(&self) -> String {
        let mut text = String::new();
        // Writing to a String cannot fail.
        let _ = prometheus_client::encoding::text::encode(&mut text, &self.registry());
        text
    }

    fn registry(&self) -> MutexGuard<'_, Registry> {
        self.inner.registry.lock().unwrap_or_else(|poisoned| poisoned.into_inner())
    }
}

/// One condition of readiness, held by the component that knows.
#[derive(Clone, Debug)]
pub struct ReadyGate {
    observer: Observer,
    name: String,
}

impl ReadyGate {
    /// Opens the gate: the first full sync has reached the world.
    pub fn ready(&self) {
        self.set(Ok(()));
    }

    /// Closes the gate and says why.
    pub fn not_ready(&self, reason: impl Into<String>) {
        self.set(Err(reason.into()));
    }

    fn set(&self, state: Result<(), String>) {
        self.observer
            .inner
            .gates
            .send_if_modified(|gates| gates.insert(self.name.clone(), state.clone()).as_ref() != Some(&state));
    }
}

/// Serves `/healthz`, `/livez`, `/readyz` and `/metrics` until `shutdown`.
///
/// # Errors
/// Fails only when the listener cannot be used by the runtime; errors of single connections are ignored.
pub async fn serve_admin(
    listener: std::net::TcpListener,
    observer: Observer,
    shutdown: CancellationToken,
) -> std::io::Result<()> {
    listener.set_nonblocking(true)?;
    let listener = tokio::net::TcpListener::from_std(listener)?;
    loop {
        let stream = tokio::select! {
            () = shutdown.cancelled() => return Ok(()),
            accepted = listener.accept() => match accepted {
                Ok((stream, _)) => stream,
                Err(error) => {
                    tracing::warn!(%error, "cannot accept an admin connection");
                    tokio::time::sleep(std::time::Duration::from_millis(100)).await;
                    continue;
                }
            },
        };
        let observer = observer.clone();
        let shutdown = shutdown.clone();
        tokio::spawn(async move {
            let service = service_fn(move |request| {
                let response = answer(&observer, &request);
                async move { Ok::<_, Infallible>(response) }
            });
            let connection = hyper::server::conn::http1::Builder::new().serve_connection(TokioIo::new(stream), service);
            tokio::select! {
                _ = connection => {}
                () = shutdown.cancelled() => {}
            }
        });
    }
}

/// The answer of [`serve_admin`] to one request, for servers that have more paths than these.
pub fn answer<B>(observer: &Observer, request: &Request<B>) -> Response<Full<Bytes>> {
    let (status, content_type, body) = route(observer, request.method(), request.uri().path());
    let mut response = Response::new(Full::new(Bytes::from(body)));
    *response.status_mut() = status;
    response.headers_mut().insert(http::header::CONTENT_TYPE, http::HeaderValue::from_static(content_type));
    response
}

fn route(observer: &Observer, method: &Method, path: &str) -> (StatusCode, &'static str, String) {
    const TEXT: &str = "text/plain; charset=utf-8";
    if method != Method::GET && method != Method::HEAD {
        return (StatusCode::METHOD_NOT_ALLOWED, TEXT, "method not allowed\n".into());
    }
    match path {
        "/healthz" | "/livez" => (StatusCode::OK, TEXT, "ok".into()),
        "/readyz" => {
            let closed = observer.not_ready();
            if closed.is_empty() {
                (StatusCode::OK, TEXT, "ok".into())
            } else {
                let lines = closed.iter().map(|(name, reason)| format!("[-]{name}: {reason}\n")).collect();
                (StatusCode::SERVICE_UNAVAILABLE, TEXT, lines)
            }
        }
        "/metrics" => (StatusCode::OK, "application/openmetrics-text; version=1.0.0; charset=utf-8", observer.encode()),
        _ => (StatusCode::NOT_FOUND, TEXT, "404 page not found\n".into()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn readiness_follows_the_gates() {
        let observer = Observer::new();
        assert_eq!(route(&observer, &Method::GET, "/readyz").0, StatusCode::OK);
        let gate = observer.gate("services");
        let (status, _, body) = route(&observer, &Method::GET, "/readyz");
        assert_eq!((status, body.as_str()), (StatusCode::SERVICE_UNAVAILABLE, "[-]services: starting\n"));
        gate.ready();
        assert_eq!(route(&observer, &Method::GET, "/readyz").0, StatusCode::OK);
        gate.not_ready("table lost");
        assert_eq!(observer.not_ready(), vec![("services".to_string(), "table lost".to_string())]);
    }

    #[test]
    fn metrics_are_encoded_by_name() {
        let observer = Observer::new();
        let counter: prometheus_client::metrics::counter::Counter = Default::default();
        observer.register(|r| r.register("portolan_test_things", "Things.", counter.clone()));
        counter.inc();
        assert!(observer.encode().contains("portolan_test_things_total 1"));
        assert_eq!(route(&observer, &Method::POST, "/metrics").0, StatusCode::METHOD_NOT_ALLOWED);
        assert_eq!(route(&observer, &Method::GET, "/nothing").0, StatusCode::NOT_FOUND);
    }
}
