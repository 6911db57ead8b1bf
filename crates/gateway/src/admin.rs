//! The admin endpoints of ingress-nginx's port 10254: like every component's, except that `/healthz` fails while shutting down.

use std::convert::Infallible;

use bytes::Bytes;
use http::{Request, Response, StatusCode};
use http_body_util::Full;
use hyper::body::Incoming;
use hyper::service::service_fn;
use hyper_util::rt::TokioIo;
use portolan_observe::Observer;
use tokio_util::sync::CancellationToken;

/// Serves as long as the process lives: what is still draining must be observable.
pub(crate) fn serve(
    listener: std::net::TcpListener,
    observer: Observer,
    shutdown: CancellationToken,
) -> std::io::Result<()> {
    listener.set_nonblocking(true)?;
    let listener = tokio::net::TcpListener::from_std(listener)?;
    tokio::spawn(async move {
        loop {
            let stream = match listener.accept().await {
                Ok((stream, _)) => stream,
                Err(error) => {
                    tracing::warn!(%error, "cannot accept an admin connection");
                    tokio::time::sleep(std::time::Duration::from_millis(100)).await;
                    continue;
                }
            };
            let (observer, shutdown) = (observer.clone(), shutdown.clone());
            tokio::spawn(async move {
                let service = service_fn(move |request: Request<Incoming>| {
                    let response = answer(&observer, request.uri().path(), shutdown.is_cancelled());
                    async move { Ok::<_, Infallible>(response) }
                });
                let _ =
                    hyper::server::conn::http1::Builder::new().serve_connection(TokioIo::new(stream), service).await;
            });
        }
    });
    Ok(())
}

fn answer(observer: &Observer, path: &str, stopping: bool) -> Response<Full<Bytes>> {
    const TEXT: &str = "text/plain; charset=utf-8";
    let closed = observer.not_ready();
    let (status, content_type, body) = match path {
        "/healthz" | "/livez" if stopping => (StatusCode::INTERNAL_SERVER_ERROR, TEXT, "shutting down\n".to_string()),
        "/healthz" | "/livez" => (StatusCode::OK, TEXT, "ok".to_string()),
        "/readyz" if closed.is_empty() && !stopping => (StatusCode::OK, TEXT, "ok".to_string()),
        "/readyz" => {
            let lines = closed.iter().map(|(name, reason)| format!("[-]{name}: {reason}\n")).collect();
            (StatusCode::SERVICE_UNAVAILABLE, TEXT, lines)
        }
        "/metrics" => (StatusCode::OK, "application/openmetrics-text; version=1.0.0; charset=utf-8", observer.encode()),
        _ => (StatusCode::NOT_FOUND, TEXT, "404 page not found\n".to_string()),
    };
    let mut response = Response::new(Full::new(Bytes::from(body)));
    *response.status_mut() = status;
    response.headers_mut().insert(http::header::CONTENT_TYPE, http::HeaderValue::from_static(content_type));
    response
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn health_fails_while_shutting_down() {
        let observer = Observer::new();
        assert_eq!(answer(&observer, "/healthz", false).status(), 200);
        assert_eq!(answer(&observer, "/healthz", true).status(), 500);
        let gate = observer.gate("gateway");
        assert_eq!(answer(&observer, "/healthz", false).status(), 200, "not ready is not ill");
        assert_eq!(answer(&observer, "/readyz", false).status(), 503);
        gate.ready();
        assert_eq!(answer(&observer, "/readyz", false).status(), 200);
        assert_eq!(answer(&observer, "/readyz", true).status(), 503);
    }
}
