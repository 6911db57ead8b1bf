//! Probes and lifecycle hooks: what is asked of a container, and how answers add up.
//!
//! Sources: Kubernetes documentation "Configure Liveness, Readiness and Startup Probes" and the API documentation of Probe;
//! texts are those that users see in events. Network probes start in the node's namespace, as a kubelet's do.

use std::net::{IpAddr, SocketAddr};
use std::sync::Arc;
use std::time::Duration;

use bytes::{BufMut, Bytes, BytesMut};
use http::{HeaderMap, HeaderName, HeaderValue, Request, StatusCode, Uri};
use http_body_util::{BodyExt, Empty, Full};
use hyper::body::Incoming;
use hyper_util::rt::{TokioExecutor, TokioIo};
use jiff::{SignedDuration, Timestamp};
use k8s_openapi::api::core::v1::{Container, HTTPGetAction, LifecycleHandler, Pod, Probe};
use k8s_openapi::apimachinery::pkg::util::intstr::IntOrString;
use portolan_linux::Netns;
use tokio::net::{TcpSocket, TcpStream};
use tokio::sync::watch;

use crate::api::{EventType, pod_reference};
use crate::container::{ExecOutcome, Running, exec_to_end};
use crate::kubelet::NodeContext;

/// The user agent of Kubernetes 1.36's prober.
const USER_AGENT: &str = "kube-probe/1.36";
/// How long after its start a program is given to listen before the first probe counts.
const LISTEN_GRACE: Duration = Duration::from_secs(1);
const MAX_BODY: usize = 10 * 1024;
const MAX_REDIRECTS: usize = 10;

/// Which question a probe answers.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum ProbeKind {
    Startup,
    Liveness,
    Readiness,
}

impl ProbeKind {
    fn title(self) -> &'static str {
        match self {
            ProbeKind::Startup => "Startup",
            ProbeKind::Liveness => "Liveness",
            ProbeKind::Readiness => "Readiness",
        }
    }
}

/// The answer to one probe.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Answer {
    Success,
    /// Success, but something is odd: shown as event `ProbeWarning`.
    Warning(String),
    Failure(String),
    /// The probe could not be carried out; it counts for nothing.
    Unknown(String),
}

/// Counts answers and decides when the result changes.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Tally {
    result: Option<bool>,
    last: Option<bool>,
    run: i32,
    success_threshold: i32,
    failure_threshold: i32,
}

impl Tally {
    fn new(kind: ProbeKind, probe: &Probe) -> Tally {
        let result = match kind {
            ProbeKind::Readiness => Some(false),
            ProbeKind::Liveness => Some(true),
            ProbeKind::Startup => None,
        };
        Tally {
            result,
            last: None,
            run: 0,
            success_threshold: probe.success_threshold.unwrap_or(1).max(1),
            failure_threshold: probe.failure_threshold.filter(|n| *n > 0).unwrap_or(3),
        }
    }

    /// Takes an answer; returns the new result if the answer changed or confirmed it at its threshold.
    fn add(&mut self, success: bool) -> Option<bool> {
        if self.last == Some(success) {
            self.run += 1;
        } else {
            self.last = Some(success);
            self.run = 1;
        }
        let threshold = if success { self.success_threshold } else { self.failure_threshold };
        if self.run < threshold {
            return None;
        }
        let changed = self.result != Some(success);
        self.result = Some(success);
        // A result that failed again is reported again only when it is a new one.
        changed.then_some(success)
    }
}

/// A probe of one run of a container.
pub(crate) struct ProbeTask {
    pub context: Arc<NodeContext>,
    pub pod: Arc<Pod>,
    /// `containers` or `initContainers`.
    pub field: &'static str,
    pub container: Container,
    pub run: Arc<Running>,
    pub address: IpAddr,
    pub kind: ProbeKind,
    pub probe: Probe,
    pub startup: watch::Receiver<bool>,
}

impl ProbeTask {
    /// Probes until the result is final: a startup probe that has decided, or a liveness probe that has failed.
    pub(crate) async fn run(mut self, report: impl Fn(bool)) {
        let seconds = |value: Option<i32>, default: u64| {
            Duration::from_secs(value.filter(|v| *v > 0).and_then(|v| u64::try_from(v).ok()).unwrap_or(default))
        };
        let period = seconds(self.probe.period_seconds, 10);
        let timeout = seconds(self.probe.timeout_seconds, 1);
        let delay = seconds(self.probe.initial_delay_seconds, 0);
        if self.kind != ProbeKind::Startup && self.startup.wait_for(|done| *done).await.is_err() {
            return;
        }
        let begin = self.run.started_at.saturating_add(SignedDuration::try_from(delay).unwrap_or(SignedDuration::MAX));
        let wait = begin.unwrap_or(Timestamp::MAX).duration_since(Timestamp::now());
        tokio::time::sleep(Duration::try_from(wait).unwrap_or(Duration::ZERO)).await;

        self.wait_for_listener(period.min(LISTEN_GRACE)).await;
        let mut tally = Tally::new(self.kind, &self.probe);
        let mut ticks = tokio::time::interval(period);
        ticks.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
        loop {
            ticks.tick().await;
            let answer = self.ask(timeout).await;
            // An answer about a container that has ended meanwhile says nothing about its next run.
            if self.run.gone.is_cancelled() {
                return;
            }
            let Some(success) = self.tell(answer) else { continue };
            if let Some(result) = tally.add(success) {
                report(result);
                match self.kind {
                    ProbeKind::Startup => return,
                    ProbeKind::Liveness if !result => return,
                    ProbeKind::Liveness | ProbeKind::Readiness => {}
                }
            }
        }
    }

    /// Holds the first network probe back while the port of a run that has just begun refuses connections: a program needs a
    /// moment to listen, and a failed first probe would cost it a whole period. The kubelet has no such rule; it can only make a
    /// pod ready earlier, and is over after `grace` at the latest.
    async fn wait_for_listener(&self, grace: Duration) {
        let own = |host: Option<&String>| host.is_none_or(|h| h.is_empty());
        let port = if let Some(action) = self.probe.http_get.as_ref().filter(|a| own(a.host.as_ref())) {
            port_number(&action.port, &self.container).ok()
        } else if let Some(action) = self.probe.tcp_socket.as_ref().filter(|a| own(a.host.as_ref())) {
            port_number(&action.port, &self.container).ok()
        } else {
            self.probe.grpc.as_ref().and_then(|action| u16::try_from(action.port).ok())
        };
        let Some(port) = port else { return };
        let address = SocketAddr::new(self.address, port);
        let age = Timestamp::now().duration_since(self.run.started_at);
        let left = grace.saturating_sub(Duration::try_from(age).unwrap_or(Duration::ZERO));
        let listening = async {
            let mut pause = Duration::from_millis(10);
            while let Err(e) = connect(&self.context.config.netns, address).await {
                if e.kind() != std::io::ErrorKind::ConnectionRefused {
                    return;
                }
                tokio::time::sleep(pause).await;
                pause = (pause * 2).min(Duration::from_millis(80));
            }
        };
        let _ = tokio::time::timeout(left, listening).await;
    }

    async fn ask(&self, timeout: Duration) -> Answer {
        let mut answer = Answer::Unknown(String::new());
        // What cannot be carried out is tried three times before it is given up.
        for _ in 0..3 {
            answer = self.ask_once(timeout).await;
            if !matches!(answer, Answer::Unknown(_)) {
                break;
            }
        }
        answer
    }

    async fn ask_once(&self, timeout: Duration) -> Answer {
        let netns = &self.context.config.netns;
        if let Some(exec) = &self.probe.exec {
            let args = exec.command.clone().unwrap_or_default();
            return match exec_to_end(&self.context, &self.run, &args, timeout).await {
                ExecOutcome::Exited { code: 0, .. } => Answer::Success,
                ExecOutcome::Exited { output, .. } => Answer::Failure(output),
                ExecOutcome::TimedOut => Answer::Failure(format!(
                    "command timed out: \"{}\" timed out after {}",
                    args.join(" "),
                    crate::lifecycle::go_seconds(timeout)
                )),
                ExecOutcome::NotStarted(reason) if self.run.gone.is_cancelled() => Answer::Unknown(reason),
                // A program that is not there is the container's fault, as with a shell.
                ExecOutcome::NotStarted(reason) => Answer::Failure(reason),
            };
        }
        if let Some(action) = &self.probe.http_get {
            let target = match HttpTarget::new(action, &self.container, self.address) {
                Ok(target) => target,
                Err(reason) => return Answer::Unknown(reason),
            };
            return http_get(netns, &target, timeout).await;
        }
        if let Some(action) = &self.probe.tcp_socket {
            let port = match port_number(&action.port, &self.container) {
                Ok(port) => port,
                Err(reason) => return Answer::Unknown(reason),
            };
            return match resolve(action.host.as_deref(), self.address, port).await {
                Ok(address) => tcp_connect(netns, address, timeout).await,
                Err(reason) => Answer::Failure(reason),
            };
        }
        if let Some(action) = &self.probe.grpc {
            let Ok(port) = u16::try_from(action.port) else {
                return Answer::Unknown(format!("invalid port {}", action.port));
            };
            let address = SocketAddr::new(self.address, port);
            return grpc_check(netns, address, action.service.as_deref().unwrap_or_default(), timeout).await;
        }
        Answer::Unknown("missing probe handler".to_string())
    }

    /// Makes the events of an answer and says how it counts.
    fn tell(&self, answer: Answer) -> Option<bool> {
        let title = self.kind.title();
        let (counts, reason, text) = match answer {
            Answer::Success => return Some(true),
            Answer::Warning(text) => (Some(true), "ProbeWarning", format!("{title} probe warning: {text}")),
            Answer::Failure(text) => (Some(false), "Unhealthy", format!("{title} probe failed: {text}")),
            Answer::Unknown(text) => {
                (None, "Unhealthy", format!("{title} probe errored and resulted in unknown state: {text}"))
            }
        };
        let reference = pod_reference(&self.pod, Some((self.field, &self.container.name)));
        self.context.api.event(&reference, EventType::Warning, reason, text);
        counts
    }
}

/// Runs a lifecycle hook to its end.
pub(crate) async fn run_hook(
    context: &NodeContext,
    _pod: &Pod,
    container: &Container,
    run: &Running,
    address: IpAddr,
    hook: &LifecycleHandler,
    limit: Duration,
) -> Result<(), String> {
    // A hook ends with its container at the latest.
    let limit = limit.min(Duration::from_secs(24 * 3600));
    if let Some(exec) = &hook.exec {
        let args = exec.command.clone().unwrap_or_default();
        return match exec_to_end(context, run, &args, limit).await {
            ExecOutcome::Exited { code: 0, .. } => Ok(()),
            ExecOutcome::Exited { code, output } => Err(format!("exit code {code}: {output}")),
            ExecOutcome::TimedOut => Err("timed out".to_string()),
            ExecOutcome::NotStarted(reason) => Err(reason),
        };
    }
    if let Some(action) = &hook.http_get {
        let target = HttpTarget::new(action, container, address)?;
        return match http_get(&context.config.netns, &target, limit).await {
            Answer::Success | Answer::Warning(_) => Ok(()),
            // Any answer will do for a hook: the server has been told.
            Answer::Failure(text) if text.starts_with("HTTP probe failed with statuscode") => Ok(()),
            Answer::Failure(text) | Answer::Unknown(text) => Err(text),
        };
    }
    if let Some(sleep) = &hook.sleep {
        tokio::select! {
            () = tokio::time::sleep(Duration::from_secs(u64::try_from(sleep.seconds).unwrap_or(0))) => {}
            () = run.gone.cancelled() => {}
        }
        return Ok(());
    }
    // tcpSocket hooks are kept by the API for compatibility and do nothing upstream either.
    Ok(())
}

/// Finds the number of a port: a number, the name of one of the container's ports, or a number in a string.
fn port_number(port: &IntOrString, container: &Container) -> Result<u16, String> {
    let number = match port {
        IntOrString::Int(number) => *number,
        IntOrString::String(name) => {
            let named =
                container.ports.iter().flatten().find(|p| p.name.as_deref() == Some(name)).map(|p| p.container_port);
            match named.or_else(|| name.parse().ok()) {
                Some(number) => number,
                None => return Err(format!("couldn't find port: {name:?} in container {:?}", container.name)),
            }
        }
    };
    u16::try_from(number).ok().filter(|n| *n > 0).ok_or_else(|| format!("invalid port number: {number}"))
}

async fn resolve(host: Option<&str>, default: IpAddr, port: u16) -> Result<SocketAddr, String> {
    let Some(host) = host.filter(|h| !h.is_empty()) else { return Ok(SocketAddr::new(default, port)) };
    let bare = host.trim_start_matches('[').trim_end_matches(']');
    if let Ok(ip) = bare.parse::<IpAddr>() {
        return Ok(SocketAddr::new(ip, port));
    }
    let found =
        tokio::net::lookup_host((bare, port)).await.map_err(|_| format!("dial tcp: lookup {bare}: no such host"))?;
    found.into_iter().next().ok_or_else(|| format!("dial tcp: lookup {bare}: no such host"))
}

/// Connects from inside a namespace.
pub(crate) async fn connect(netns: &Netns, address: SocketAddr) -> std::io::Result<TcpStream> {
    let socket = netns.run(|| if address.is_ipv4() { TcpSocket::new_v4() } else { TcpSocket::new_v6() })??;
    socket.connect(address).await
}

/// The kernel's refusal in Go's words.
fn dial_error(address: SocketAddr, error: &std::io::Error) -> String {
    let reason = match error.raw_os_error() {
        Some(libc::ECONNREFUSED) => "connection refused",
        Some(libc::EHOSTUNREACH) => "no route to host",
        Some(libc::ENETUNREACH) => "network is unreachable",
        Some(libc::ECONNRESET) => "connection reset by peer",
        Some(libc::ETIMEDOUT) => "connection timed out",
        _ => return format!("dial tcp {address}: {error}"),
    };
    format!("dial tcp {address}: connect: {reason}")
}

async fn tcp_connect(netns: &Netns, address: SocketAddr, timeout: Duration) -> Answer {
    match tokio::time::timeout(timeout, connect(netns, address)).await {
        Ok(Ok(_)) => Answer::Success,
        Ok(Err(e)) => Answer::Failure(dial_error(address, &e)),
        Err(_) => Answer::Failure(format!("dial tcp {address}: i/o timeout")),
    }
}

/// Where an HTTP probe goes and what it says.
#[derive(Clone, Debug, PartialEq, Eq)]
struct HttpTarget {
    url: Url,
    headers: HeaderMap,
    host_header: Option<HeaderValue>,
}

/// The parts of a URL that a probe needs.
#[derive(Clone, Debug, PartialEq, Eq)]
struct Url {
    https: bool,
    host: String,
    port: u16,
    path: String,
}

impl Url {
    fn authority(&self) -> String {
        let host = if self.host.contains(':') { format!("[{}]", self.host) } else { self.host.clone() };
        format!("{host}:{}", self.port)
    }

    /// The target of a redirect.
    fn join(&self, location: &str) -> Option<Url> {
        if !location.contains("://") {
            let path = if location.starts_with('/') {
                location.to_string()
            } else {
                let base = self.path.split('?').next().unwrap_or("/");
                format!("{}/{location}", base.rsplit_once('/').map_or("", |(dir, _)| dir))
            };
            return Some(Url { path, ..self.clone() });
        }
        let uri: Uri = location.parse().ok()?;
        let https = uri.scheme_str()? == "https";
        let port = uri.port_u16().unwrap_or(if https { 443 } else { 80 });
        let host = uri.host()?.trim_start_matches('[').trim_end_matches(']').to_string();
        let path = uri.path_and_query().map_or("/", |p| p.as_str()).to_string();
        Some(Url { https, host, port, path })
    }
}

impl std::fmt::Display for Url {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{}://{}{}", if self.https { "https" } else { "http" }, self.authority(), self.path)
    }
}

impl HttpTarget {
    fn new(action: &HTTPGetAction, container: &Container, address: IpAddr) -> Result<HttpTarget, String> {
        let port = port_number(&action.port, container)?;
        let host = action.host.as_deref().filter(|h| !h.is_empty()).map_or_else(|| address.to_string(), str::to_string);
        let path = action.path.as_deref().unwrap_or("/");
        let path = if path.starts_with('/') { path.to_string() } else { format!("/{path}") };
        let https = action.scheme.as_deref().is_some_and(|s| s.eq_ignore_ascii_case("https"));
        let mut headers = HeaderMap::new();
        let mut host_header = None;
        let mut accept_given = false;
        for header in action.http_headers.iter().flatten() {
            let name: HeaderName = header.name.parse().map_err(|_| format!("invalid header name {:?}", header.name))?;
            let value: HeaderValue =
                header.value.parse().map_err(|_| format!("invalid value of header {:?}", header.name))?;
            accept_given |= name == http::header::ACCEPT;
            if name == http::header::HOST {
                host_header = Some(value);
            } else if !(name == http::header::ACCEPT && value.is_empty()) {
                headers.append(name, value);
            }
        }
        if !headers.contains_key(http::header::USER_AGENT) {
            headers.insert(http::header::USER_AGENT, HeaderValue::from_static(USER_AGENT));
        }
        if !accept_given {
            headers.insert(http::header::ACCEPT, HeaderValue::from_static("*/*"));
        }
        headers.insert(http::header::CONNECTION, HeaderValue::from_static("close"));
        Ok(HttpTarget { url: Url { https, host, port, path }, headers, host_header })
    }
}

async fn http_get(netns: &Netns, target: &HttpTarget, timeout: Duration) -> Answer {
    match tokio::time::timeout(timeout, follow(netns, target)).await {
        Ok(answer) => answer,
        Err(_) => Answer::Failure(format!(
            "Get \"{}\": context deadline exceeded (Client.Timeout exceeded while awaiting headers)",
            target.url
        )),
    }
}

async fn follow(netns: &Netns, target: &HttpTarget) -> Answer {
    let mut url = target.url.clone();
    for _ in 0..=MAX_REDIRECTS {
        let (status, location, body) = match request(netns, &url, target).await {
            Ok(response) => response,
            Err(reason) => return Answer::Failure(format!("Get \"{url}\": {reason}")),
        };
        if status.is_redirection()
            && let Some(next) = location.as_deref().and_then(|l| url.join(l))
        {
            if next.host != target.url.host {
                return Answer::Warning(format!("Probe terminated redirects, Response body: {body}"));
            }
            url = next;
            continue;
        }
        return if (200..400).contains(&status.as_u16()) {
            Answer::Success
        } else {
            Answer::Failure(format!("HTTP probe failed with statuscode: {}", status.as_u16()))
        };
    }
    Answer::Failure(format!("Get \"{url}\": stopped after {MAX_REDIRECTS} redirects"))
}

async fn request(
    netns: &Netns,
    url: &Url,
    target: &HttpTarget,
) -> Result<(StatusCode, Option<String>, String), String> {
    let address = resolve(Some(&url.host), IpAddr::from([0, 0, 0, 0]), url.port).await?;
    let stream = connect(netns, address).await.map_err(|e| dial_error(address, &e))?;
    let mut request = Request::get(url.path.as_str()).body(Empty::<Bytes>::new()).map_err(|e| e.to_string())?;
    *request.headers_mut() = target.headers.clone();
    let host = match &target.host_header {
        Some(host) => host.clone(),
        None => HeaderValue::from_str(&url.authority()).map_err(|e| e.to_string())?,
    };
    request.headers_mut().insert(http::header::HOST, host);
    if url.https {
        let tls = tls::connect(stream, &url.host).await.map_err(|e| e.to_string())?;
        send(TokioIo::new(tls), request).await
    } else {
        send(TokioIo::new(stream), request).await
    }
}

async fn send<T>(io: T, request: Request<Empty<Bytes>>) -> Result<(StatusCode, Option<String>, String), String>
where
    T: hyper::rt::Read + hyper::rt::Write + Unpin + Send + 'static,
{
    let (mut sender, connection) = hyper::client::conn::http1::handshake(io).await.map_err(|e| e.to_string())?;
    let driver = tokio::spawn(connection);
    let answer = async {
        let response = sender
            .send_request(request)
            .await
            .map_err(|e| if e.is_incomplete_message() { "EOF".to_string() } else { e.to_string() })?;
        let status = response.status();
        let location =
            response.headers().get(http::header::LOCATION).map(|l| String::from_utf8_lossy(l.as_bytes()).into_owned());
        Ok((status, location, beginning(response.into_body()).await?))
    }
    .await;
    driver.abort();
    answer
}

/// The first bytes of a body; the rest is not read.
async fn beginning(mut body: Incoming) -> Result<String, String> {
    let mut kept = Vec::new();
    while kept.len() < MAX_BODY {
        let Some(frame) = body.frame().await else { break };
        let frame = frame.map_err(|e| e.to_string())?;
        if let Some(data) = frame.data_ref() {
            kept.extend_from_slice(&data[..data.len().min(MAX_BODY - kept.len())]);
        }
    }
    Ok(String::from_utf8_lossy(&kept).into_owned())
}

/// The standard health check, without a protobuf library: one string in, one enum out.
async fn grpc_check(netns: &Netns, address: SocketAddr, service: &str, timeout: Duration) -> Answer {
    let within = crate::lifecycle::go_seconds(timeout);
    let checked = tokio::time::timeout(timeout, async {
        let stream = connect(netns, address)
            .await
            .map_err(|e| format!("error: failed to connect service at \"{address}\": {}", dial_error(address, &e)))?;
        grpc_request(stream, address, service).await
    });
    match checked.await {
        Err(_) => Answer::Failure(format!(
            "timeout: failed to connect service \"{address}\" within {within}: context deadline exceeded"
        )),
        Ok(Err(text)) => Answer::Failure(text),
        Ok(Ok(1)) => Answer::Success,
        Ok(Ok(status)) => {
            let name = match status {
                0 => "UNKNOWN",
                2 => "NOT_SERVING",
                3 => "SERVICE_UNKNOWN",
                _ => "UNRECOGNIZED",
            };
            Answer::Failure(format!("service unhealthy (responded with \"{name}\")"))
        }
    }
}

async fn grpc_request(stream: TcpStream, address: SocketAddr, service: &str) -> Result<u64, String> {
    let failed = |e: hyper::Error| format!("error: health rpc probe failed: {e}");
    let (mut sender, connection) =
        hyper::client::conn::http2::handshake(TokioExecutor::new(), TokioIo::new(stream)).await.map_err(failed)?;
    let driver = tokio::spawn(connection);
    let result = async {
        let request = Request::post(format!("http://{address}/grpc.health.v1.Health/Check"))
            .header(http::header::CONTENT_TYPE, "application/grpc")
            .header(http::header::TE, "trailers")
            .header(http::header::USER_AGENT, USER_AGENT)
            .body(Full::new(grpc_message(service)))
            .map_err(|e| format!("error: health rpc probe failed: {e}"))?;
        let response = sender.send_request(request).await.map_err(failed)?;
        let head = response.headers().clone();
        let collected = response.into_body().collect().await.map_err(failed)?;
        let trailers = collected.trailers().cloned().unwrap_or_default();
        let get = |name: &str| trailers.get(name).or_else(|| head.get(name)).and_then(|v| v.to_str().ok());
        let message = get("grpc-message").unwrap_or_default().to_string();
        match get("grpc-status") {
            Some("0") => Ok(grpc_status(&collected.to_bytes())),
            Some("12") => Err(format!(
                "error: this server does not implement the grpc health protocol (grpc.health.v1.Health): {message}"
            )),
            Some(code) => Err(format!("error: health rpc probe failed: rpc error: code = {code} desc = {message}")),
            None => Err("error: health rpc probe failed: the answer has no grpc-status".to_string()),
        }
    }
    .await;
    driver.abort();
    result
}

/// HealthCheckRequest with its length prefix (gRPC over HTTP2; field 1 is the service's name).
fn grpc_message(service: &str) -> Bytes {
    let mut message = BytesMut::new();
    if !service.is_empty() {
        message.put_u8(0x0a);
        put_varint(&mut message, service.len() as u64);
        message.extend_from_slice(service.as_bytes());
    }
    let mut framed = BytesMut::new();
    framed.put_u8(0);
    framed.put_u32(message.len() as u32);
    framed.extend_from_slice(&message);
    framed.freeze()
}

fn put_varint(out: &mut BytesMut, mut value: u64) {
    while value >= 0x80 {
        out.put_u8((value as u8) | 0x80);
        value >>= 7;
    }
    out.put_u8(value as u8);
}

/// The status in a framed HealthCheckResponse: field 1 as a varint, zero when absent.
fn grpc_status(framed: &[u8]) -> u64 {
    let Some(message) = framed.get(5..) else { return 0 };
    let Some((&0x08, rest)) = message.split_first() else { return 0 };
    let mut value = 0u64;
    for (i, byte) in rest.iter().take(10).enumerate() {
        value |= u64::from(byte & 0x7f) << (7 * i as u32).min(63);
        if byte & 0x80 == 0 {
            break;
        }
    }
    value
}

/// TLS without verification, for probes only: a probe asks whether a server answers, not who it is.
mod tls {
    use std::io;
    use std::sync::{Arc, LazyLock};

    use rustls::client::danger::{HandshakeSignatureValid, ServerCertVerified, ServerCertVerifier};
    use rustls::crypto::{CryptoProvider, verify_tls12_signature, verify_tls13_signature};
    use rustls::pki_types::{CertificateDer, ServerName, UnixTime};
    use rustls::{ClientConfig, DigitallySignedStruct, SignatureScheme};
    use tokio::net::TcpStream;
    use tokio_rustls::TlsConnector;
    use tokio_rustls::client::TlsStream;

    #[derive(Debug)]
    struct AnyServer(Arc<CryptoProvider>);

    impl ServerCertVerifier for AnyServer {
        fn verify_server_cert(
            &self,
            _: &CertificateDer<'_>,
            _: &[CertificateDer<'_>],
            _: &ServerName<'_>,
            _: &[u8],
            _: UnixTime,
        ) -> Result<ServerCertVerified, rustls::Error> {
            Ok(ServerCertVerified::assertion())
        }

        fn verify_tls12_signature(
            &self,
            message: &[u8],
            cert: &CertificateDer<'_>,
            signature: &DigitallySignedStruct,
        ) -> Result<HandshakeSignatureValid, rustls::Error> {
            verify_tls12_signature(message, cert, signature, &self.0.signature_verification_algorithms)
        }

        fn verify_tls13_signature(
            &self,
            message: &[u8],
            cert: &CertificateDer<'_>,
            signature: &DigitallySignedStruct,
        ) -> Result<HandshakeSignatureValid, rustls::Error> {
            verify_tls13_signature(message, cert, signature, &self.0.signature_verification_algorithms)
        }

        fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
            self.0.signature_verification_algorithms.supported_schemes()
        }
    }

    static CONFIG: LazyLock<Arc<ClientConfig>> = LazyLock::new(|| {
        let provider = Arc::new(rustls::crypto::aws_lc_rs::default_provider());
        let config = ClientConfig::builder_with_provider(provider.clone())
            .with_safe_default_protocol_versions()
            .expect("the provider supports the default versions")
            .dangerous()
            .with_custom_certificate_verifier(Arc::new(AnyServer(provider)))
            .with_no_client_auth();
        Arc::new(config)
    });

    pub(super) async fn connect(stream: TcpStream, host: &str) -> io::Result<TlsStream<TcpStream>> {
        let name = ServerName::try_from(host.to_string()).map_err(io::Error::other)?;
        TlsConnector::from(CONFIG.clone()).connect(name, stream).await
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use k8s_openapi::api::core::v1::{ContainerPort, HTTPHeader};

    #[test]
    fn results_change_at_their_thresholds() {
        let probe = |success, failure| Probe {
            success_threshold: Some(success),
            failure_threshold: Some(failure),
            ..Probe::default()
        };
        type Row<'a> = (&'a str, ProbeKind, (i32, i32), &'a [bool], &'a [Option<bool>]);
        let rows: &[Row<'_>] = &[
            ("ready at once", ProbeKind::Readiness, (1, 3), &[true], &[Some(true)]),
            ("ready after three", ProbeKind::Readiness, (3, 3), &[true, true, true], &[None, None, Some(true)]),
            (
                "two failures and a success reset the count",
                ProbeKind::Liveness,
                (1, 3),
                &[false, false, true, false, false],
                &[None, None, None, None, None],
            ),
            (
                "the third failure counts",
                ProbeKind::Liveness,
                (1, 3),
                &[false, false, false],
                &[None, None, Some(false)],
            ),
            (
                "unready at first says nothing new",
                ProbeKind::Readiness,
                (1, 1),
                &[false, true, false],
                &[None, Some(true), Some(false)],
            ),
            ("startup decides either way", ProbeKind::Startup, (1, 1), &[false], &[Some(false)]),
        ];
        for (name, kind, (success, failure), answers, expected) in rows {
            let mut tally = Tally::new(*kind, &probe(*success, *failure));
            let got: Vec<_> = answers.iter().map(|a| tally.add(*a)).collect();
            assert_eq!(&got, expected, "{name}");
        }
    }

    #[test]
    fn ports_may_be_names() {
        let container = Container {
            name: "web".into(),
            ports: Some(vec![ContainerPort { name: Some("http".into()), container_port: 8080, ..Default::default() }]),
            ..Default::default()
        };
        let port = |p| port_number(&p, &container);
        assert_eq!(port(IntOrString::Int(80)), Ok(80));
        assert_eq!(port(IntOrString::String("http".into())), Ok(8080));
        assert_eq!(port(IntOrString::String("9090".into())), Ok(9090));
        assert!(port(IntOrString::String("admin".into())).is_err());
        assert!(port(IntOrString::Int(0)).is_err());
    }

    #[test]
    fn requests_carry_the_usual_headers() {
        let action = HTTPGetAction {
            port: IntOrString::Int(80),
            path: Some("healthz?full=1".into()),
            http_headers: Some(vec![
                HTTPHeader { name: "Host".into(), value: "example.test".into() },
                HTTPHeader { name: "Accept".into(), value: String::new() },
                HTTPHeader { name: "X-A".into(), value: "1".into() },
                HTTPHeader { name: "X-A".into(), value: "2".into() },
            ]),
            ..Default::default()
        };
        let target = HttpTarget::new(&action, &Container::default(), "10.1.1.11".parse().unwrap()).unwrap();
        assert_eq!(target.url.to_string(), "http://10.1.1.11:80/healthz?full=1");
        assert_eq!(target.host_header.unwrap(), "example.test");
        assert!(!target.headers.contains_key("accept"), "an empty Accept removes it");
        assert_eq!(target.headers["user-agent"], USER_AGENT);
        assert_eq!(target.headers.get_all("x-a").iter().count(), 2);
    }

    #[test]
    fn redirects_are_resolved() {
        let base = Url { https: false, host: "10.0.0.1".into(), port: 8080, path: "/a/b?x=1".into() };
        for (location, expected) in [
            ("/c", "http://10.0.0.1:8080/c"),
            ("c", "http://10.0.0.1:8080/a/c"),
            ("http://10.0.0.1:9090/d?y", "http://10.0.0.1:9090/d?y"),
            ("https://other/", "https://other:443/"),
        ] {
            assert_eq!(base.join(location).unwrap().to_string(), expected);
        }
    }

    #[test]
    fn health_messages_are_framed() {
        assert_eq!(&grpc_message("")[..], [0, 0, 0, 0, 0]);
        assert_eq!(&grpc_message("ab")[..], [0, 0, 0, 0, 4, 0x0a, 2, b'a', b'b']);
        assert_eq!(grpc_status(&[0, 0, 0, 0, 2, 0x08, 1]), 1);
        assert_eq!(grpc_status(&[0, 0, 0, 0, 0]), 0);
        assert_eq!(grpc_status(&[]), 0);
    }
}
