//! The two small HTTP endpoints that probes of a DNS pod ask: `/health` and `/ready`.

use std::sync::Arc;
use std::time::Duration;

use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream};
use tokio_util::sync::CancellationToken;

/// What an endpoint says: 200 with `OK`, or 503 with a reason.
pub(crate) type State = Arc<dyn Fn() -> Result<(), String> + Send + Sync>;

/// Serves one path until `stop`.
pub(crate) async fn serve(listener: TcpListener, path: &'static str, state: State, stop: CancellationToken) {
    loop {
        let stream = tokio::select! {
            () = stop.cancelled() => return,
            accepted = listener.accept() => match accepted {
                Ok((stream, _)) => stream,
                Err(_) => {
                    // Out of descriptors, most likely: let others finish first.
                    tokio::time::sleep(Duration::from_millis(100)).await;
                    continue;
                }
            },
        };
        let state = Arc::clone(&state);
        tokio::spawn(async move {
            // A probe gives up after seconds; so does this.
            let _ = tokio::time::timeout(Duration::from_secs(5), answer(stream, path, state)).await;
        });
    }
}

async fn answer(mut stream: TcpStream, path: &'static str, state: State) -> std::io::Result<()> {
    let mut head = Vec::new();
    while !head.windows(4).any(|w| w == b"\r\n\r\n") {
        let mut chunk = [0; 1024];
        let n = stream.read(&mut chunk).await?;
        if n == 0 || head.len() > 8192 {
            return Ok(());
        }
        head.extend_from_slice(&chunk[..n]);
    }
    let response = respond(&head, path, &state);
    stream.write_all(response.as_bytes()).await?;
    stream.shutdown().await
}

fn respond(head: &[u8], path: &str, state: &State) -> String {
    let line = head.split(|b| *b == b'\r').next().unwrap_or_default();
    let mut words = line.split(|b| *b == b' ');
    let (method, target) = (words.next().unwrap_or_default(), words.next().unwrap_or_default());
    let target = target.split(|b| *b == b'?').next().unwrap_or_default();
    let (status, body) = if target != path.as_bytes() {
        ("404 Not Found", "404 page not found\n".to_string())
    } else {
        match state() {
            Ok(()) => ("200 OK", "OK".to_string()),
            Err(reason) => ("503 Service Unavailable", reason),
        }
    };
    let shown = if method == b"HEAD" { "" } else { &body };
    let length = body.len();
    format!(
        "HTTP/1.1 {status}\r\nContent-Type: text/plain; charset=utf-8\r\nContent-Length: {length}\r\nConnection: close\r\n\r\n{shown}"
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_probe_gets_its_state() {
        let ok: State = Arc::new(|| Ok(()));
        let not: State = Arc::new(|| Err("kubernetes".into()));
        assert!(respond(b"GET /health HTTP/1.1\r\nHost: x\r\n\r\n", "/health", &ok).ends_with("\r\n\r\nOK"));
        assert!(respond(b"GET /ready?a HTTP/1.1\r\n\r\n", "/ready", &not).starts_with("HTTP/1.1 503 "));
        assert!(respond(b"GET / HTTP/1.1\r\n\r\n", "/ready", &ok).starts_with("HTTP/1.1 404 "));
        assert!(respond(b"\r\n\r\n", "/ready", &ok).starts_with("HTTP/1.1 404 "));
    }
}
