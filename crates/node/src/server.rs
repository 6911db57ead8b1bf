//! The kubelet's HTTP API on a connection that somebody else accepted and authorised.
//!
//! `/containerLogs/{namespace}/{pod}/{container}`, and over WebSocket or SPDY `/exec/…`, `/attach/…` and `/portForward/{namespace}/{pod}`,
//! as the API server of Kubernetes calls them; `/pods`, `/configz` and `/logs/` through the node's proxy subresource. Errors are Status objects, so that they can be passed on as they are.

use std::convert::Infallible;
use std::path::Path;
use std::sync::Arc;

use bytes::Bytes;
use http::header::{CONNECTION, CONTENT_TYPE, HeaderMap, UPGRADE};
use http::{Method, Request, Response, StatusCode};
use http_body_util::combinators::BoxBody;
use http_body_util::{BodyExt, Full, StreamBody};
use hyper::body::{Frame, Incoming};
use hyper::service::service_fn;
use hyper_util::rt::TokioIo;
use jiff::{SignedDuration, Timestamp};
use serde_json::json;
use tokio::io::{AsyncRead, AsyncWrite};

use crate::kubelet::Kubelet;
use crate::log::{Formatter, LogOptions, LogReader, Stream};
use crate::stream;
use crate::worker::{ContainerAccess, PodShared};

pub(crate) type Body = BoxBody<Bytes, Infallible>;

/// Serves one connection until it ends.
pub(crate) async fn serve(kubelet: Kubelet, io: impl AsyncRead + AsyncWrite + Send + Unpin + 'static) {
    let service = service_fn(move |request| {
        let kubelet = kubelet.clone();
        async move { Ok::<_, Infallible>(route(&kubelet, request).await.unwrap_or_else(Refusal::into_response)) }
    });
    let connection =
        hyper::server::conn::http1::Builder::new().serve_connection(TokioIo::new(io), service).with_upgrades();
    if let Err(error) = connection.await {
        tracing::debug!(%error, "kubelet connection ended");
    }
}

/// An error answer.
pub(crate) struct Refusal {
    code: StatusCode,
    reason: &'static str,
    message: String,
}

impl Refusal {
    pub(crate) fn bad_request(message: impl Into<String>) -> Refusal {
        Refusal { code: StatusCode::BAD_REQUEST, reason: "BadRequest", message: message.into() }
    }

    pub(crate) fn not_found(message: impl Into<String>) -> Refusal {
        Refusal { code: StatusCode::NOT_FOUND, reason: "NotFound", message: message.into() }
    }

    pub(crate) fn internal(message: impl Into<String>) -> Refusal {
        Refusal { code: StatusCode::INTERNAL_SERVER_ERROR, reason: "InternalError", message: message.into() }
    }

    fn into_response(self) -> Response<Body> {
        let status = json!({
            "kind": "Status", "apiVersion": "v1", "metadata": {}, "status": "Failure",
            "message": self.message, "reason": self.reason, "code": self.code.as_u16(),
        });
        let mut response = Response::new(Full::new(Bytes::from(status.to_string())).boxed());
        *response.status_mut() = self.code;
        response.headers_mut().insert(CONTENT_TYPE, http::HeaderValue::from_static("application/json"));
        response
    }
}

/// The query of a request, decoded.
pub(crate) struct Query(Vec<(String, String)>);

impl Query {
    fn parse(query: &str) -> Query {
        let decode = |text: &str| percent_decode(&text.replace('+', " "));
        let pairs = query.split('&').filter(|p| !p.is_empty());
        Query(pairs.map(|p| p.split_once('=').unwrap_or((p, ""))).map(|(k, v)| (decode(k), decode(v))).collect())
    }

    pub(crate) fn get(&self, name: &str) -> Option<&str> {
        self.0.iter().find(|(k, _)| k == name).map(|(_, v)| v.as_str())
    }

    pub(crate) fn all<'a>(&'a self, name: &'a str) -> impl Iterator<Item = &'a str> {
        self.0.iter().filter(move |(k, _)| k == name).map(|(_, v)| v.as_str())
    }

    /// Whether a switch is on. Both the kubelet's names and the API's are understood (`input` and `stdin`).
    pub(crate) fn on(&self, names: &[&str]) -> bool {
        names.iter().any(|name| matches!(self.get(name), Some("1" | "true" | "True" | "t" | "T" | "TRUE")))
    }

    fn number(&self, name: &str) -> Result<Option<i64>, Refusal> {
        match self.get(name).filter(|v| !v.is_empty()) {
            None => Ok(None),
            Some(text) => text.parse().map(Some).map_err(|_| Refusal::bad_request(format!("invalid {name}: {text:?}"))),
        }
    }
}

fn percent_decode(text: &str) -> String {
    let bytes = text.as_bytes();
    let mut out = Vec::with_capacity(bytes.len());
    let mut i = 0;
    while i < bytes.len() {
        let decoded = (bytes[i] == b'%')
            .then(|| text.get(i + 1..i + 3).and_then(|hex| u8::from_str_radix(hex, 16).ok()))
            .flatten();
        match decoded {
            Some(byte) => {
                out.push(byte);
                i += 3;
            }
            None => {
                out.push(bytes[i]);
                i += 1;
            }
        }
    }
    String::from_utf8_lossy(&out).into_owned()
}

async fn route(kubelet: &Kubelet, request: Request<Incoming>) -> Result<Response<Body>, Refusal> {
    let path = request.uri().path().to_string();
    let segments: Vec<String> = path.trim_matches('/').split('/').map(percent_decode).collect();
    let segments: Vec<&str> = segments.iter().map(String::as_str).collect();
    let query = Query::parse(request.uri().query().unwrap_or_default());
    match segments.as_slice() {
        ["healthz"] if request.method() == Method::GET => Ok(Response::new(Full::new(Bytes::from("ok")).boxed())),
        ["containerLogs", namespace, pod, container] => {
            let shared = find_pod(kubelet, namespace, pod)?;
            logs(&shared, pod, container, &query)
        }
        [verb @ ("exec" | "attach"), namespace, pod, container]
        | [verb @ ("exec" | "attach"), namespace, pod, _, container] => {
            let shared = find_pod(kubelet, namespace, pod)?;
            let access = find_container(&shared, pod, container)?;
            let run = access
                .running
                .clone()
                .filter(|_| access.alive)
                .ok_or_else(|| Refusal::bad_request(format!("container not found (\"{container}\")")))?;
            let options = stream::StreamOptions::from_query(&query);
            if *verb == "exec" {
                let command: Vec<String> = query.all("command").map(str::to_string).collect();
                if command.is_empty() {
                    return Err(Refusal::bad_request("you must specify at least 1 command for the container"));
                }
                let context = kubelet.inner.context.clone();
                stream::connect(request, options, move |client| stream::exec(context, run, command, options, client))
            } else {
                stream::connect(request, options, move |client| stream::attach(run, access.stdin_once, options, client))
            }
        }
        ["portForward", namespace, pod] | ["portForward", namespace, pod, _] => {
            let shared = find_pod(kubelet, namespace, pod)?;
            let sandbox = shared.sandbox().ok_or_else(|| Refusal::bad_request(format!("pod {pod} is not running")))?;
            stream::port_forward(request, sandbox, format!("{namespace}/{pod}"), &query)
        }
        ["pods"] => Ok(reply("application/json", kubelet.pod_list().to_string())),
        ["configz"] => Ok(reply("application/json", kubelet.configuration().to_string())),
        ["logs", place @ ..] => {
            let place = place.iter().map(|s| s.to_string()).collect();
            files(kubelet, place, path.ends_with('/')).await
        }
        _ => Err(Refusal::not_found("the kubelet serves no such path")),
    }
}

fn reply(content_type: &'static str, body: impl Into<Bytes>) -> Response<Body> {
    let mut response = Response::new(Full::new(body.into()).boxed());
    response.headers_mut().insert(CONTENT_TYPE, http::HeaderValue::from_static(content_type));
    response
}

/// What kubelets show of `/var/log`: here `pods/{namespace}_{name}_{uid}/{container}/{attempt}.log`. Folders are pages of links.
async fn files(kubelet: &Kubelet, place: Vec<String>, slash: bool) -> Result<Response<Body>, Refusal> {
    let gone = || Refusal::not_found("404 page not found");
    let page = |names: Vec<String>| {
        let links: String = names.iter().map(|name| format!("<a href=\"{name}\">{name}</a>\n")).collect();
        reply("text/html; charset=utf-8", format!("<pre>\n{links}</pre>\n"))
    };
    let list = |dir: &Path, suffix: &str| -> Vec<String> {
        let mut names: Vec<String> = std::fs::read_dir(dir)
            .into_iter()
            .flatten()
            .filter_map(|entry| Some(format!("{}{suffix}", entry.ok()?.file_name().to_str()?)))
            .collect();
        names.sort();
        names
    };
    let place: Vec<&str> = place.iter().map(String::as_str).filter(|s| !s.is_empty()).collect();
    let folders = kubelet.log_folders();
    let find = |pod: &str| folders.get(pod).ok_or_else(gone);
    // Only names that are there lead on, so that no path leads out.
    let inside = |dir: &Path, name: &str| {
        if list(dir, "").iter().any(|there| there == name) { Ok(dir.join(name)) } else { Err(gone()) }
    };
    if place.len() < 4 && !slash {
        let mut moved = Response::new(Full::new(Bytes::new()).boxed());
        *moved.status_mut() = StatusCode::MOVED_PERMANENTLY;
        let last = place.last().copied().unwrap_or("logs");
        if let Ok(to) = http::HeaderValue::from_str(&format!("{last}/")) {
            moved.headers_mut().insert(http::header::LOCATION, to);
        }
        return Ok(moved);
    }
    match place.as_slice() {
        [] => Ok(page(vec!["pods/".to_string()])),
        ["pods"] => Ok(page(folders.keys().map(|pod| format!("{pod}/")).collect())),
        ["pods", pod] => Ok(page(list(find(pod)?, "/"))),
        ["pods", pod, container] => Ok(page(list(&inside(find(pod)?, container)?, ""))),
        ["pods", pod, container, file] => {
            let path = inside(&inside(find(pod)?, container)?, file)?;
            let bytes =
                tokio::fs::read(&path).await.map_err(|e| Refusal::internal(format!("cannot read {file}: {e}")))?;
            Ok(reply("text/plain; charset=utf-8", bytes))
        }
        _ => Err(gone()),
    }
}

fn find_pod(kubelet: &Kubelet, namespace: &str, pod: &str) -> Result<Arc<PodShared>, Refusal> {
    kubelet.pod(namespace, pod).ok_or_else(|| Refusal::not_found(format!("pod \"{pod}\" does not run on this node")))
}

fn find_container(shared: &PodShared, pod: &str, container: &str) -> Result<ContainerAccess, Refusal> {
    shared.container(container).ok_or_else(|| {
        Refusal::bad_request(format!(
            "container {container} is not valid for pod {pod}, it has [{}]",
            shared.names().join(" ")
        ))
    })
}

fn log_options(query: &Query, now: Timestamp) -> Result<LogOptions, Refusal> {
    let since_time = match query.get("sinceTime").filter(|t| !t.is_empty()) {
        Some(text) => {
            Some(text.parse::<Timestamp>().map_err(|_| Refusal::bad_request(format!("invalid sinceTime: {text:?}")))?)
        }
        None => None,
    };
    let since_seconds = query.number("sinceSeconds")?;
    if since_seconds.is_some_and(|s| s < 1) {
        return Err(Refusal::bad_request("sinceSeconds must be greater than 0"));
    }
    let positive = |name: &str, least: i64| -> Result<Option<usize>, Refusal> {
        match query.number(name)? {
            None => Ok(None),
            Some(n) if n >= least => Ok(usize::try_from(n).ok()),
            Some(_) => Err(Refusal::bad_request(format!("{name} must be at least {least}"))),
        }
    };
    Ok(LogOptions {
        follow: query.on(&["follow"]),
        timestamps: query.on(&["timestamps"]),
        tail_lines: positive("tailLines", 0)?,
        limit_bytes: positive("limitBytes", 1)?,
        since: since_time.or(since_seconds.and_then(|s| now.saturating_sub(SignedDuration::from_secs(s)).ok())),
        stream: match query.get("stream") {
            Some("Stdout") => Some(Stream::Stdout),
            Some("Stderr") => Some(Stream::Stderr),
            None | Some("" | "All") => None,
            Some(other) => return Err(Refusal::bad_request(format!("unknown stream {other:?}"))),
        },
    })
}

fn logs(shared: &PodShared, pod: &str, container: &str, query: &Query) -> Result<Response<Body>, Refusal> {
    let options = log_options(query, Timestamp::now())?;
    let access = find_container(shared, pod, container)?;
    let previous = query.on(&["previous"]);
    // A container that waits to be restarted is itself the previous one.
    let path = if previous && access.alive { access.previous_log } else { access.log };
    let Some(path) = path else {
        return Err(Refusal::bad_request(if previous {
            format!("previous terminated container \"{container}\" in pod \"{pod}\" not found")
        } else {
            let reason = access.waiting.unwrap_or_else(|| "ContainerCreating".to_string());
            format!("container \"{container}\" in pod \"{pod}\" is waiting to start: {reason}")
        }));
    };
    let reader = LogReader::open(&path, &options).map_err(|e| match e.kind() {
        std::io::ErrorKind::NotFound => Refusal::not_found(format!("the log of container \"{container}\" is gone")),
        _ => Refusal::internal(format!("cannot read the log of container \"{container}\": {e}")),
    })?;
    let growth =
        access.running.as_ref().filter(|run| options.follow && run.sink.path() == path).map(|run| run.sink.progress());
    let (sender, receiver) = tokio::sync::mpsc::channel::<Bytes>(4);
    tokio::spawn(send_log(reader, options, growth, sender));
    let frames = futures::stream::unfold(receiver, |mut receiver| async move {
        receiver.recv().await.map(|chunk| (Ok::<_, Infallible>(Frame::data(chunk)), receiver))
    });
    let mut response = Response::new(BodyExt::boxed(StreamBody::new(SyncStream(Box::pin(frames)))));
    response.headers_mut().insert(CONTENT_TYPE, http::HeaderValue::from_static("text/plain"));
    Ok(response)
}

/// Reads a log to its end, and on while it grows if that is asked for.
async fn send_log(
    mut reader: LogReader,
    options: LogOptions,
    mut growth: Option<tokio::sync::watch::Receiver<crate::log::Progress>>,
    sender: tokio::sync::mpsc::Sender<Bytes>,
) {
    let mut formatter = Formatter::new(&options);
    loop {
        // Seen before the file is read: what is written after that wakes us again.
        let closed = growth.as_mut().is_none_or(|g| g.borrow_and_update().closed);
        loop {
            let mut chunk = Vec::new();
            let mut more = true;
            while chunk.len() < 32 * 1024 && !formatter.is_full() {
                match reader.next() {
                    Ok(Some(record)) => formatter.push(&record, &mut chunk),
                    Ok(None) | Err(_) => {
                        more = false;
                        break;
                    }
                }
            }
            if !chunk.is_empty() && sender.send(Bytes::from(chunk)).await.is_err() {
                return;
            }
            if formatter.is_full() {
                return;
            }
            if !more {
                break;
            }
        }
        let Some(growth) = growth.as_mut().filter(|_| !closed) else { return };
        tokio::select! {
            changed = growth.changed() => if changed.is_err() { return },
            () = sender.closed() => return,
        }
    }
}

/// A stream that is only ever used by one task, for a body type that wants `Sync`.
struct SyncStream<S>(S);

// SAFETY: the only access is through `poll_next`, which needs `&mut self`; a shared reference gives nothing.
unsafe impl<S> Sync for SyncStream<S> {}

impl<S: futures::Stream + Unpin> futures::Stream for SyncStream<S> {
    type Item = S::Item;

    fn poll_next(
        mut self: std::pin::Pin<&mut Self>,
        context: &mut std::task::Context<'_>,
    ) -> std::task::Poll<Option<Self::Item>> {
        std::pin::Pin::new(&mut self.0).poll_next(context)
    }
}

/// Whether the client asks for a WebSocket.
pub(crate) fn wants_websocket(headers: &HeaderMap) -> bool {
    wants(headers, "websocket")
}

/// Whether the client asks for SPDY.
pub(crate) fn wants_spdy(headers: &HeaderMap) -> bool {
    wants(headers, "SPDY/3.1")
}

fn wants(headers: &HeaderMap, protocol: &str) -> bool {
    let has = |name, token: &str| {
        headers.get_all(name).iter().any(|value: &http::HeaderValue| {
            value.to_str().is_ok_and(|v| v.split(',').any(|part| part.trim().eq_ignore_ascii_case(token)))
        })
    };
    has(CONNECTION, "upgrade") && has(UPGRADE, protocol)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn queries_are_decoded() {
        let query = Query::parse("command=sh&command=-c&command=echo%20a%2Bb+c&stdin=1&tty=false");
        assert_eq!(query.all("command").collect::<Vec<_>>(), ["sh", "-c", "echo a+b c"]);
        assert!(query.on(&["input", "stdin"]) && !query.on(&["tty"]) && !query.on(&["output"]));
        assert_eq!(percent_decode("%zz%4"), "%zz%4");
    }

    #[test]
    fn log_options_are_checked() {
        let now = Timestamp::from_second(100).unwrap();
        let options = |q: &str| log_options(&Query::parse(q), now);
        let ok = options("follow=true&tailLines=5&sinceSeconds=10&limitBytes=9&timestamps=1").unwrap_or_default();
        assert_eq!(
            ok,
            LogOptions {
                follow: true,
                timestamps: true,
                tail_lines: Some(5),
                since: Timestamp::from_second(90).ok(),
                limit_bytes: Some(9),
                stream: None
            }
        );
        for bad in
            ["tailLines=-1", "limitBytes=0", "sinceSeconds=0", "sinceTime=yesterday", "tailLines=x", "stream=Both"]
        {
            assert!(options(bad).is_err(), "{bad}");
        }
    }
}
