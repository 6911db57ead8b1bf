//! One request from its head to the last byte of its answer.

use std::cell::RefCell;
use std::convert::Infallible;
use std::net::SocketAddr;
use std::rc::Rc;
use std::sync::Arc;
use std::time::{Duration, Instant};

use bytes::Bytes;
use http::header::{self, HeaderName, HeaderValue};
use http::uri::PathAndQuery;
use http::{HeaderMap, Method, Request, Response, StatusCode, Uri, Version, request};
use hyper::body::Incoming;
use portolan_plan::route::{Decision, Forward, Head, Host, Profile, Rule, UpstreamId, decide, host};

use crate::accesslog::Line;
use crate::body::{Body, Progress, Received, Relay, Upload};
use crate::engine::Worker;
use crate::guard::Conn;
use crate::head::{self, Forwarding};
use crate::metrics::Observation;
use crate::snapshot::{Endpoints, Snapshot};
use crate::upstream::{self, Lease, Remains, Sender};

/// Attempts for one request (nginx: `proxy_next_upstream_tries` as ingress-nginx sets it).
const TRIES: usize = 3;

/// A client connection as its requests see it.
pub(crate) struct Link {
    pub conn: Rc<Conn>,
    /// `conn.peer`'s address as a header value.
    pub client: HeaderValue,
    /// Set when the connection becomes a tunnel.
    pub tunnel: RefCell<Option<Tunnel>>,
}

/// The other side of a tunnel.
pub(crate) struct Tunnel {
    pub remains: Remains,
    /// A tunnel without traffic for this long is closed.
    pub idle: Duration,
}

/// What is remembered of a request until it is logged.
pub(crate) struct Exchange {
    pub worker: Rc<Worker>,
    link: Rc<Link>,
    snapshot: Arc<Snapshot>,
    begun: Instant,
    method: Method,
    uri: Uri,
    version: Version,
    referer: Option<HeaderValue>,
    agent: Option<HeaderValue>,
    id: HeaderValue,
    head_bytes: u64,
    rule: Option<usize>,
    upstream: Option<UpstreamId>,
    status: u16,
    pub progress: Rc<Progress>,
    pub body_bytes: u64,
    pub upstream_addr: String,
    upstream_status: String,
    sent: Option<Instant>,
    connect_time: Option<Duration>,
    header_time: Option<Duration>,
}

impl Exchange {
    fn begin(worker: &Rc<Worker>, link: &Rc<Link>, snapshot: &Arc<Snapshot>, parts: &request::Parts) -> Box<Exchange> {
        worker.metrics.request(true);
        link.conn.active.set(link.conn.active.get() + 1);
        let fields: usize = parts.headers.iter().map(|(n, v)| n.as_str().len() + v.len() + 4).sum();
        let line =
            parts.method.as_str().len() + parts.uri.path().len() + parts.uri.query().map_or(0, |q| q.len() + 1) + 14;
        Box::new(Exchange {
            worker: worker.clone(),
            link: link.clone(),
            snapshot: snapshot.clone(),
            begun: Instant::now(),
            method: parts.method.clone(),
            uri: parts.uri.clone(),
            version: parts.version,
            referer: parts.headers.get(header::REFERER).cloned(),
            agent: parts.headers.get(header::USER_AGENT).cloned(),
            id: head::request_id(&parts.headers).unwrap_or_else(new_id),
            head_bytes: (fields + line) as u64,
            rule: None,
            upstream: None,
            // The client went away before there was an answer (nginx).
            status: 499,
            progress: Rc::new(Progress::new(worker.timers.timer())),
            body_bytes: 0,
            upstream_addr: String::new(),
            upstream_status: String::new(),
            sent: None,
            connect_time: None,
            header_time: None,
        })
    }

    fn tried(&mut self, address: Option<SocketAddr>, status: Option<u16>) {
        use std::fmt::Write as _;
        if let Some(address) = address {
            let separator = if self.upstream_addr.is_empty() { "" } else { ", " };
            let _ = write!(self.upstream_addr, "{separator}{address}");
        }
        if let Some(status) = status {
            let separator = if self.upstream_status.is_empty() { "" } else { ", " };
            let _ = write!(self.upstream_status, "{separator}{status}");
        }
    }
}

impl Drop for Exchange {
    fn drop(&mut self) {
        let worker = &self.worker;
        worker.metrics.request(false);
        self.link.conn.active.set(self.link.conn.active.get().saturating_sub(1));
        self.link.conn.rested_ms.set(worker.timers.now_ms());
        let now = Instant::now();
        let request_time = now - self.begun;
        let response_time = self.sent.map(|sent| now - sent);
        let request_length = self.head_bytes + self.progress.bytes.get();
        if let Some(rule) = self.rule {
            self.snapshot.stats[rule].record(
                worker.index,
                &Observation {
                    status: self.status,
                    method: known(&self.method),
                    request_bytes: request_length,
                    response_bytes: self.body_bytes,
                    request_time,
                    connect_time: self.connect_time,
                    header_time: self.header_time,
                    response_time,
                },
            );
        }
        // ingress-nginx does not log what its built-in default backend answers.
        let logged = self.rule.map_or(self.status != 404, |rule| self.snapshot.table.rules[rule].policy.access_log);
        if !logged || !worker.log.is_on() {
            return;
        }
        let target = self.uri.path_and_query().map_or("/", PathAndQuery::as_str);
        let write = |name: std::fmt::Arguments<'_>| {
            worker.log.write(&Line {
                remote: self.link.conn.peer.ip().to_canonical(),
                request: format_args!("{} {} {}", self.method, Escaped(target), protocol(self.version)),
                status: self.status,
                body_bytes: self.body_bytes,
                referer: self.referer.as_ref().map_or(b"", HeaderValue::as_bytes),
                agent: self.agent.as_ref().map_or(b"", HeaderValue::as_bytes),
                request_length,
                request_time,
                upstream_name: name,
                upstream_addr: &self.upstream_addr,
                upstream_length: self.sent.map(|_| self.body_bytes),
                upstream_time: response_time,
                upstream_status: &self.upstream_status,
                id: self.id.as_bytes(),
            });
        };
        match self.upstream {
            Some(id) => write(format_args!("{}", self.snapshot.table.upstreams[id.0])),
            None => write(format_args!("upstream-default-backend")),
        }
    }
}

/// A request target for the log: the parser accepts some characters that would end the quotes.
struct Escaped<'a>(&'a str);

impl std::fmt::Display for Escaped<'_> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        if self.0.bytes().all(|b| (0x20..0x7f).contains(&b) && b != b'"' && b != b'\\') {
            return f.write_str(self.0);
        }
        for byte in self.0.bytes() {
            match byte {
                b'"' | b'\\' | 0..=0x1f | 0x7f.. => write!(f, "\\x{byte:02X}")?,
                _ => write!(f, "{}", char::from(byte))?,
            }
        }
        Ok(())
    }
}

fn protocol(version: Version) -> &'static str {
    match version {
        Version::HTTP_10 => "HTTP/1.0",
        Version::HTTP_2 => "HTTP/2.0",
        _ => "HTTP/1.1",
    }
}

/// A method as a metric's label: only known ones, so that clients cannot make series.
fn known(method: &Method) -> &'static str {
    match method.as_str() {
        "GET" => "GET",
        "HEAD" => "HEAD",
        "POST" => "POST",
        "PUT" => "PUT",
        "DELETE" => "DELETE",
        "PATCH" => "PATCH",
        "OPTIONS" => "OPTIONS",
        _ => "OTHER",
    }
}

fn new_id() -> HeaderValue {
    let id = format!("{:032x}", rand::random::<u128>());
    HeaderValue::try_from(id).expect("hexadecimal digits are a header value")
}

/// Answers one request. Never fails: every failure is an answer.
pub(crate) async fn handle(
    worker: Rc<Worker>,
    link: Rc<Link>,
    request: Request<Incoming>,
) -> Result<Response<Body>, Infallible> {
    let (parts, incoming) = request.into_parts();
    let incoming = Received::new(incoming, parts.version);
    let snapshot = worker.snapshot.load_full();
    let mut exchange = Exchange::begin(&worker, &link, &snapshot, &parts);
    let upgrading = head::upgrade(&parts);
    let response = answer(&snapshot, &mut exchange, &parts, incoming, upgrading).await;
    let mut response = match response {
        Answer::Own(response) => own(exchange, &parts, response),
        Answer::Upstream(response, lease, patience) => {
            let (head, inner) = response.into_parts();
            Response::from_parts(head, Body::Relay(Box::new(Relay { inner, lease, exchange, patience, ended: false })))
        }
    };
    link.conn.answer_upgrade(response.status() == StatusCode::SWITCHING_PROTOCOLS);
    if parts.version == Version::HTTP_2 {
        response.headers_mut().remove(header::CONNECTION);
    }
    Ok(response)
}

#[expect(clippy::large_enum_variant, reason = "made once for each request and taken apart at once")]
enum Answer {
    Own(Own),
    Upstream(Response<Incoming>, Option<Lease>, Duration),
}

/// An answer of ours.
struct Own {
    status: u16,
    location: Option<String>,
    /// The rest of the request is not read: the connection cannot be used again.
    close: bool,
    hsts: bool,
}

impl Own {
    fn status(status: u16) -> Own {
        Own { status, location: None, close: false, hsts: false }
    }

    fn closing(status: u16) -> Own {
        Own { close: true, ..Own::status(status) }
    }
}

impl From<Own> for Answer {
    fn from(own: Own) -> Answer {
        Answer::Own(own)
    }
}

fn own(mut exchange: Box<Exchange>, parts: &request::Parts, own: Own) -> Response<Body> {
    let status = StatusCode::from_u16(own.status).unwrap_or(StatusCode::INTERNAL_SERVER_ERROR);
    exchange.status = status.as_u16();
    let reason = status.canonical_reason().unwrap_or("Error");
    let json = parts.headers.get(header::ACCEPT).is_some_and(|a| a.as_bytes().starts_with(b"application/json"));
    let (content_type, text) = if json {
        ("application/json", format!("{{\"code\":{},\"message\":\"{reason}\"}}\n", status.as_u16()))
    } else {
        let title = format!("{} {reason}", status.as_u16());
        (
            "text/html",
            format!(
                "<html>\n<head><title>{title}</title></head>\n<body>\n<center><h1>{title}</h1></center>\n</body>\n</html>\n"
            ),
        )
    };
    let head_only = parts.method == Method::HEAD;
    let text = if status == StatusCode::OK { String::new() } else { text };
    let mut headers = HeaderMap::with_capacity(6);
    headers.insert(header::CONTENT_TYPE, HeaderValue::from_static(content_type));
    headers.insert(header::CONTENT_LENGTH, HeaderValue::from(text.len()));
    if let Some(location) = own.location.and_then(|l| HeaderValue::try_from(l).ok()) {
        headers.insert(header::LOCATION, location);
    }
    if own.close {
        headers.insert(header::CONNECTION, HeaderValue::from_static("close"));
    }
    if own.hsts {
        headers.insert(header::STRICT_TRANSPORT_SECURITY, HSTS);
    }
    let body = if head_only { Bytes::new() } else { Bytes::from(text) };
    exchange.body_bytes = body.len() as u64;
    let mut response = Response::new(Body::Own(Some(body), exchange));
    *response.status_mut() = status;
    *response.headers_mut() = headers;
    response
}

/// ingress-nginx's default for every response over TLS.
const HSTS: HeaderValue = HeaderValue::from_static("max-age=31536000; includeSubDomains");

async fn answer(
    snapshot: &Arc<Snapshot>,
    exchange: &mut Exchange,
    parts: &request::Parts,
    incoming: Received,
    upgrading: Option<HeaderValue>,
) -> Answer {
    let link = exchange.link.clone();
    if let Some((path, status)) = &*link.conn.refused.borrow()
        && parts.uri.path() == path
    {
        exchange.uri = Uri::from_static("/");
        return Own::closing(*status).into();
    }
    if matches!(parts.method, Method::CONNECT | Method::TRACE) {
        return Own::closing(405).into();
    }
    let Ok(authority) = head::authority(parts) else { return Own::closing(400).into() };
    if let Some(expect) = parts.headers.get(header::EXPECT)
        && !expect.as_bytes().eq_ignore_ascii_case(b"100-continue")
    {
        return Own::closing(417).into();
    }
    let target = parts.uri.path_and_query().map_or("/", PathAndQuery::as_str);
    if target == "*" && parts.method == Method::OPTIONS {
        return Own::status(200).into();
    }
    let table = &snapshot.table;
    let found = authority.and_then(host::normalize).map_or_else(|| table.catch_all_host(), |name| table.host(&name));
    let hsts = link.conn.https && found.is_none_or(|h| !h.strict);
    let decision = decide(table, &Head { https: link.conn.https, port: link.conn.port, authority, target });
    let forward = match decision {
        Decision::Refuse { rule: None, .. } if is_health_check(parts, found) => return Own::status(200).into(),
        Decision::Refuse { refusal, rule } => {
            exchange.rule = rule;
            return Own { hsts, ..Own::status(refusal.status()) }.into();
        }
        Decision::Redirect { status, location, rule } => {
            exchange.rule = rule;
            return Own { location: Some(location), hsts, ..Own::status(status) }.into();
        }
        Decision::Forward(forward) => forward,
    };
    if found.is_some_and(|h| h.default == Some(forward.index)) && is_health_check(parts, found) {
        return Own::status(200).into();
    }
    exchange.rule = Some(forward.index);
    match proxy(snapshot, exchange, parts, incoming, upgrading, &forward, authority).await {
        Ok((mut response, lease)) => {
            let switching = response.status() == StatusCode::SWITCHING_PROTOCOLS;
            exchange.status = response.status().as_u16();
            *response.version_mut() = Version::HTTP_11;
            let headers = response.headers_mut();
            head::response(headers, switching);
            if hsts {
                headers.insert(header::STRICT_TRANSPORT_SECURITY, HSTS);
            }
            match forward.rule.profile {
                Profile::NginxCompat => {
                    headers.remove(header::SERVER);
                }
                Profile::Strict => {
                    headers.entry(header::SERVER).or_insert(HeaderValue::from_static("portolan"));
                }
            }
            Answer::Upstream(response, lease, forward.rule.policy.read_timeout)
        }
        Err(own) => Own { hsts, ..own }.into(),
    }
}

/// `/healthz` of hosts that no rule names, which load balancers ask for.
fn is_health_check(parts: &request::Parts, host: Option<&Host>) -> bool {
    parts.uri.path() == "/healthz" && host.is_none_or(|h| h.name.is_empty())
}

async fn proxy(
    snapshot: &Arc<Snapshot>,
    exchange: &mut Exchange,
    parts: &request::Parts,
    incoming: Received,
    upgrading: Option<HeaderValue>,
    forward: &Forward<'_, '_>,
    authority: Option<&str>,
) -> Result<(Response<Incoming>, Option<Lease>), Own> {
    let rule = forward.rule;
    let policy = &rule.policy;
    let mut id = rule.upstream;
    let mut target: &str = &forward.target;
    let mut errors = Vec::new();
    exchange.upstream = Some(id);
    if snapshot.endpoints(id).is_empty() {
        match rule.default_backend.filter(|id| !snapshot.endpoints(*id).is_empty()) {
            Some(default) => {
                errors = error_headers(snapshot, rule, parts, exchange);
                id = default;
                target = "/";
                exchange.upstream = Some(id);
            }
            None => return Err(Own::status(503)),
        }
    }
    if !policy.admits(exchange.link.conn.peer.ip()) {
        return Err(Own::status(403));
    }
    let limit = policy.body_limit_bytes.unwrap_or(u64::MAX);
    let announced =
        parts.headers.get(header::CONTENT_LENGTH).and_then(|v| v.to_str().ok()).and_then(|v| v.parse::<u64>().ok());
    if announced.is_some_and(|length| length > limit) {
        return Err(Own::closing(413));
    }
    let progress = exchange.progress.clone();
    progress.patience.set(policy.read_timeout);
    let mut body = if incoming.is_end_stream() {
        progress.complete.set(true);
        Upload::Empty
    } else {
        Upload::Stream { inner: incoming, progress: progress.clone(), limit }
    };
    let repeatable = matches!(body, Upload::Empty) && head::is_idempotent(&parts.method);
    let forwarding = forwarding(exchange, rule, forward, authority, upgrading.clone(), errors)?;
    let uri = uri(parts, target).ok_or_else(|| Own::status(400))?;
    let endpoints = snapshot.endpoints(id).clone();
    let worker = exchange.worker.clone();
    let mut tried: Vec<SocketAddr> = Vec::new();
    let mut failure = Own::status(502);
    for _ in 0..TRIES {
        let Some(address) = next(&endpoints, &tried) else { break };
        tried.push(address);
        exchange.tried(Some(address), None);
        let mut fresh = false;
        loop {
            let connected =
                connection(&worker, exchange, address, fresh, upgrading.is_some(), policy.connect_timeout).await;
            let (mut sender, reused, remains) = match connected {
                Ok(connected) => connected,
                Err(status) => {
                    exchange.tried(None, Some(status));
                    failure = Own::status(status);
                    break;
                }
            };
            let mut request = Request::new(std::mem::replace(&mut body, Upload::Empty));
            *request.method_mut() = parts.method.clone();
            *request.uri_mut() = uri.clone();
            *request.headers_mut() = head::request(&parts.headers, &forwarding);
            let sent = Instant::now();
            exchange.sent = Some(sent);
            progress.timer.set(policy.read_timeout);
            let outcome = progress.timer.limit(sender.requests.try_send_request(request)).await;
            progress.timer.clear();
            match outcome {
                Some(Ok(response)) => {
                    exchange.header_time = Some(sent.elapsed());
                    exchange.tried(None, Some(response.status().as_u16()));
                    if response.status() == StatusCode::SWITCHING_PROTOCOLS {
                        let Some(remains) = remains else { return Err(Own::status(502)) };
                        let idle = policy.read_timeout.max(policy.send_timeout);
                        *exchange.link.tunnel.borrow_mut() = Some(Tunnel { remains, idle });
                        return Ok((response, None));
                    }
                    let lease =
                        remains.is_none().then_some(Lease { sender, address, reusable: progress.complete.get() });
                    return Ok((response, lease));
                }
                Some(Err(mut error)) => {
                    if progress.too_large.get() {
                        return Err(Own::closing(413));
                    }
                    if progress.failed.get() {
                        return Err(Own::closing(400));
                    }
                    let unsent = error.take_message().map(Request::into_body);
                    tracing::debug!(%address, error = %error.error(), reused, unsent = unsent.is_some(), "upstream failed");
                    let again = unsent.is_some() || repeatable;
                    body = unsent.unwrap_or(Upload::Empty);
                    // An idle connection that the backend closed at the same moment says nothing about the backend.
                    if reused && again {
                        fresh = true;
                        continue;
                    }
                    exchange.tried(None, Some(502));
                    failure = Own { close: !progress.complete.get(), ..Own::status(502) };
                    if !again {
                        return Err(failure);
                    }
                }
                None => {
                    exchange.tried(None, Some(504));
                    failure = Own { close: !progress.complete.get(), ..Own::status(504) };
                    if !repeatable {
                        return Err(failure);
                    }
                }
            }
            break;
        }
    }
    failure.close |= !progress.complete.get();
    Err(failure)
}

/// The next endpoint in turn that was not tried. The endpoints are looked at anew each time: a rolling update may have replaced
/// the one that just failed.
fn next(endpoints: &Endpoints, tried: &[SocketAddr]) -> Option<SocketAddr> {
    let (addresses, start) = endpoints.pick();
    let count = addresses.len();
    (0..count).map(|n| addresses[start.wrapping_add(n) % count]).find(|a| !tried.contains(a))
}

type Connected = (Sender, bool, Option<Remains>);

async fn connection(
    worker: &Worker,
    exchange: &mut Exchange,
    address: SocketAddr,
    fresh: bool,
    upgrading: bool,
    timeout: Duration,
) -> Result<Connected, u16> {
    if !fresh
        && !upgrading
        && let Some(sender) = worker.pool.take(address).await
    {
        return Ok((sender, true, None));
    }
    let begun = Instant::now();
    let timer = &exchange.progress.timer;
    timer.set(timeout);
    let stream = timer.limit(upstream::connect(address)).await;
    timer.clear();
    exchange.connect_time = Some(begun.elapsed());
    let stream = match stream {
        Some(Ok(stream)) => stream,
        Some(Err(error)) => {
            tracing::debug!(%address, %error, "cannot connect upstream");
            return Err(502);
        }
        None => return Err(504),
    };
    if upgrading {
        let (sender, remains) = upstream::begin_upgrade(stream).await.map_err(|_| 502u16)?;
        return Ok((sender, false, Some(remains)));
    }
    Ok((upstream::begin(stream).await.map_err(|_| 502u16)?, false, None))
}

fn forwarding(
    exchange: &Exchange,
    rule: &Rule,
    forward: &Forward<'_, '_>,
    authority: Option<&str>,
    upgrade: Option<HeaderValue>,
    errors: Vec<(HeaderName, HeaderValue)>,
) -> Result<Forwarding, Own> {
    let invalid = |_| Own::status(400);
    let https = exchange.link.conn.https;
    let forwarded_host = HeaderValue::try_from(authority.unwrap_or_default()).map_err(invalid)?;
    let host = match &rule.policy.upstream_vhost {
        Some(name) => HeaderValue::try_from(name.as_str()).map_err(invalid)?,
        None => forwarded_host.clone(),
    };
    Ok(Forwarding {
        host,
        forwarded_host,
        client: exchange.link.client.clone(),
        scheme: HeaderValue::from_static(if https { "https" } else { "http" }),
        // Whatever port HTTPS is served on inside, clients used 443.
        port: if https { HeaderValue::from_static("443") } else { HeaderValue::from(exchange.link.conn.port) },
        id: exchange.id.clone(),
        prefix: forward.forwarded_prefix.as_ref().and_then(|p| HeaderValue::try_from(p.as_str()).ok()),
        upgrade,
        errors,
    })
}

/// What ingress-nginx tells a default backend about the request that it stands in for.
fn error_headers(
    snapshot: &Snapshot,
    rule: &Rule,
    parts: &request::Parts,
    exchange: &Exchange,
) -> Vec<(HeaderName, HeaderValue)> {
    let upstream = &snapshot.table.upstreams[rule.upstream.0];
    let format = parts.headers.get(header::ACCEPT).cloned();
    let text = |value: &str| HeaderValue::try_from(value).ok();
    [
        ("x-code", Some(HeaderValue::from_static("503"))),
        ("x-format", format),
        ("x-original-uri", exchange.uri.path_and_query().and_then(|p| text(p.as_str()))),
        ("x-namespace", text(&rule.ingress.namespace)),
        ("x-ingress-name", text(&rule.ingress.name)),
        ("x-service-name", text(&upstream.service.name)),
        ("x-service-port", text(&upstream.port.to_string())),
    ]
    .into_iter()
    .filter_map(|(name, value)| Some((HeaderName::from_static(name), value?)))
    .collect()
}

/// The target in origin form; the client's own bytes when nothing was rewritten.
fn uri(parts: &request::Parts, target: &str) -> Option<Uri> {
    let path = match parts.uri.path_and_query() {
        Some(path) if path.as_str() == target => path.clone(),
        _ => PathAndQuery::try_from(target).ok()?,
    };
    let mut uri = http::uri::Parts::default();
    uri.path_and_query = Some(path);
    Uri::from_parts(uri).ok()
}
