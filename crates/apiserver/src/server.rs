//! The server: connections, filters around every request, and the pieces put together.

use std::io::Write as _;
use std::panic::AssertUnwindSafe;
use std::sync::Arc;
use std::task::{Context, Poll};
use std::time::{Duration, Instant};

use arc_swap::ArcSwap;
use bytes::Bytes;
use flate2::Compression;
use flate2::write::GzEncoder;
use futures::FutureExt as _;
use futures::future::BoxFuture;
use http::header::{
    ACCEPT, ACCEPT_ENCODING, CACHE_CONTROL, CONTENT_ENCODING, CONTENT_LENGTH, CONTENT_TYPE, ETAG, HeaderMap,
    HeaderValue, IF_NONE_MATCH, VARY,
};
use http::{Method, Request, Response, StatusCode};
use http_body::Body as _;
use http_body_util::BodyExt as _;
use hyper_util::rt::{TokioExecutor, TokioIo, TokioTimer};
use jiff::Timestamp;
use portolan_api::kinds::Kind;
use portolan_api::status::Status;
use portolan_observe::Observer;
use tokio_rustls::TlsAcceptor;
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;

use crate::admission::Admission;
use crate::auth::{self, Attributes, Authenticator, User};
use crate::catalog::{Catalog, Document, Entry};
use crate::config::{ClusterDialer, Error, ServerConfig};
use crate::metrics::{Metrics, RequestLabels, ResourceLabels, VerbLabels};
use crate::path::{self, Query, Route, Target};
use crate::pki::{self, Authority};
use crate::response::{Body, BoxError, JSON, TEXT, answer, failure, full, json, no_such_page};
use crate::services::Pools;
use crate::store::Store;
use crate::token::Tokens;
use crate::verbs::{self, Call};
use crate::{bootstrap, discovery, openapi, stream};

/// Largest request body, in bytes (`--max-request-body-bytes` does not exist upstream; 3 MiB is built in there too).
const BODY_MAX_BYTES: usize = 3 << 20;

/// Answers larger than this are compressed for clients that take it.
const GZIP_MIN_BYTES: u64 = 128 << 10;

/// Longest time for anything that is not a watch or a stream (`--request-timeout`).
const REQUEST_TIMEOUT: Duration = Duration::from_secs(60);

/// Longest TLS handshake.
const HANDSHAKE_TIMEOUT: Duration = Duration::from_secs(10);

/// Longest wait for the head of a request, also between requests.
const HEADER_TIMEOUT: Duration = Duration::from_secs(32);

/// How often an HTTP/2 client is asked whether it is still there, and how long it has to answer.
const PING_INTERVAL: Duration = Duration::from_secs(30);
const PING_TIMEOUT: Duration = Duration::from_secs(20);

/// Most requests at once on one HTTP/2 connection: Go clients put hundreds of watches on one.
const MAX_STREAMS: u32 = 1000;

/// How long connections get to end at shutdown.
const DRAIN: Duration = Duration::from_secs(2);

/// Where the replicas of a kind are.
#[derive(Clone, Debug)]
pub struct ScalePaths {
    /// Wanted replicas.
    pub spec: Vec<String>,
    /// Replicas there are.
    pub status: Vec<String>,
    /// Selector of the Pods.
    pub selector: Vec<String>,
}

/// Everything requests share.
pub struct Inner {
    /// Objects.
    pub store: Store,
    /// Kinds.
    pub catalog: ArcSwap<Catalog>,
    /// Credentials.
    pub authenticator: Authenticator,
    /// Admission plugins.
    pub admission: Admission,
    /// Service addresses and ports.
    pub pools: Pools,
    /// Metrics.
    pub metrics: Metrics,
    /// Metrics of the whole process.
    pub observer: Observer,
    /// Way to nodes and pods.
    pub dialer: Arc<dyn ClusterDialer>,
    /// Ends watches and connections.
    pub shutdown: CancellationToken,
    /// Address for clients, as discovery shows it.
    pub address: String,
}

impl Inner {
    /// Where the replicas of a kind are.
    pub fn scale_paths(&self, kind: &Kind) -> ScalePaths {
        let path = |text: &str| text.split('.').map(str::to_owned).collect();
        if let Some(paths) = self.catalog.load().custom_scale(kind) {
            return paths;
        }
        ScalePaths { spec: path("spec.replicas"), status: path("status.replicas"), selector: path("spec.selector") }
    }
}

/// A running API server. Dropping it does not stop it; [`Server::shutdown`] does.
pub struct Server {
    inner: Arc<Inner>,
    authority: Arc<Authority>,
    tasks: TaskTracker,
}

impl Server {
    /// Opens the store, makes or reads keys and certificates, writes the objects every cluster has, and serves on the
    /// listeners. Must run in a tokio runtime.
    ///
    /// # Errors
    /// The data directory or the listeners cannot be used; see [`Error`].
    pub async fn start(config: ServerConfig) -> Result<Server, Error> {
        let directory = config.data_dir.as_deref();
        if let Some(directory) = directory {
            std::fs::create_dir_all(directory).map_err(|source| Error::File { path: directory.to_owned(), source })?;
        }
        let authority = Arc::new(Authority::load(directory)?);
        let tokens = Tokens::new(&pki::token_key(directory)?)?;
        let store = match directory {
            None => Store::in_memory(),
            Some(directory) => {
                let (path, durability) = (directory.join("store.redb"), config.durability);
                tokio::task::spawn_blocking(move || Store::open(&path, durability))
                    .await
                    .map_err(|error| Error::Bootstrap(error.to_string()))??
            }
        };
        let ranges = &config.service_cidrs;
        if ranges.is_empty()
            || ranges.len() > 2
            || (ranges.len() == 2 && ranges[0].addr().is_ipv4() == ranges[1].addr().is_ipv4())
        {
            return Err(Error::ServiceRange("one range, or one of each IP family, is needed".to_owned()));
        }
        let (pools, repair) = Pools::rebuild(ranges, config.node_port_range, &store.snapshot());
        let address = config
            .listeners
            .first()
            .and_then(|listener| listener.local_addr().ok())
            .unwrap_or(config.advertise)
            .to_string();
        let inner = Arc::new(Inner {
            store,
            catalog: ArcSwap::from_pointee(Catalog::builtin()),
            authenticator: Authenticator { tokens, admin_token: config.admin_token.clone() },
            admission: Admission::without(&config.disable_admission_plugins),
            pools,
            metrics: Metrics::register(&config.observer),
            observer: config.observer.clone(),
            dialer: config.dialer.clone(),
            shutdown: CancellationToken::new(),
            address,
        });
        crate::crd::load(&inner);
        bootstrap::run(&inner, &config, &repair).await.map_err(|status| Error::Bootstrap(status.message))?;
        let tls = Arc::new(authority.server_config(&server_names(&config))?);
        let tasks = TaskTracker::new();
        let itself = bootstrap::Itself::new(&config);
        for listener in config.listeners {
            listener.set_nonblocking(true).map_err(Error::Listener)?;
            let listener = tokio::net::TcpListener::from_std(listener).map_err(Error::Listener)?;
            tasks.spawn(accept(inner.clone(), listener, TlsAcceptor::from(tls.clone()), tasks.clone()));
        }
        tasks.spawn(bootstrap::keep(inner.clone(), itself, inner.store.snapshot().revision));
        tasks.spawn(crate::crd::keep(inner.clone()));
        tasks.spawn(crate::rbac::aggregation::keep(inner.clone()));
        Ok(Server { inner, authority, tasks })
    }

    /// The server as a tower service for `kube::Client::new`, without sockets. Requests are made as `user`.
    pub fn local_service(&self, user: User) -> LocalService {
        LocalService { inner: self.inner.clone(), user }
    }

    /// A kubeconfig for the administrator, with a fresh client certificate.
    ///
    /// # Errors
    /// The certificate cannot be made.
    pub fn kubeconfig(&self, server_url: &str) -> Result<String, Error> {
        self.kubeconfig_for(server_url, "kubernetes-admin", "system:masters")
    }

    /// A kubeconfig for any user in a group.
    ///
    /// # Errors
    /// The certificate cannot be made.
    pub fn kubeconfig_for(&self, server_url: &str, user: &str, group: &str) -> Result<String, Error> {
        use base64::Engine as _;
        let encode = |text: &str| base64::engine::general_purpose::STANDARD.encode(text);
        let identity = self.authority.client(user, group)?;
        Ok(format!(
            "apiVersion: v1\nkind: Config\nclusters:\n- name: portolan\n  cluster:\n    server: {server_url}\n    \
             certificate-authority-data: {ca}\nusers:\n- name: {user}\n  user:\n    client-certificate-data: {cert}\n    \
             client-key-data: {key}\ncontexts:\n- name: portolan\n  context:\n    cluster: portolan\n    user: {user}\n\
             current-context: portolan\n",
            ca = encode(self.authority.pem()),
            cert = encode(&identity.certificate_pem),
            key = encode(&identity.key_pem),
        ))
    }

    /// Certificate of the cluster's authority, in PEM.
    pub fn ca_pem(&self) -> String {
        self.authority.pem().to_owned()
    }

    /// A token for a ServiceAccount that exists, good for the API server itself.
    ///
    /// # Errors
    /// 404 if it does not exist.
    pub fn service_account_token(&self, namespace: &str, name: &str, lifetime: Duration) -> Result<String, Status> {
        let snapshot = self.inner.store.snapshot();
        let account = snapshot.get("serviceaccounts", &crate::store::Key::new(namespace, name)).ok_or_else(|| {
            let entry = self.inner.catalog.load().builtin_entry("", "v1", "serviceaccounts");
            Status::not_found(&entry.kind, name)
        })?;
        let tokens = &self.inner.authenticator.tokens;
        let seconds = i64::try_from(lifetime.as_secs()).unwrap_or(crate::token::MAX_SECONDS);
        let audiences = [tokens.audience().to_owned()];
        tokens.issue(&account.value, &audiences, None, Timestamp::now().as_second(), seconds)
    }

    /// The store behind the server, for tests and the status command.
    pub fn store(&self) -> &Store {
        &self.inner.store
    }

    /// Ends watches, lets requests finish, closes connections and the store.
    pub async fn shutdown(&self) {
        self.inner.shutdown.cancel();
        self.tasks.close();
        let _ = tokio::time::timeout(DRAIN, self.tasks.wait()).await;
        self.inner.store.close().await;
    }
}

/// Names and addresses clients use for the server.
fn server_names(config: &ServerConfig) -> Vec<String> {
    let domain = &config.cluster_domain;
    let mut names: Vec<String> =
        ["localhost", "127.0.0.1", "::1", "kubernetes", "kubernetes.default", "kubernetes.default.svc"]
            .map(str::to_owned)
            .to_vec();
    names.push(format!("kubernetes.default.svc.{domain}"));
    names.push(config.advertise.ip().to_string());
    for range in &config.service_cidrs {
        let service = portolan_api::service::kubernetes_service(std::slice::from_ref(range), 443);
        let ip = portolan_api::meta::text(&service, &["spec", "clusterIP"]).to_owned();
        if !ip.is_empty() {
            names.push(ip);
        }
    }
    for listener in &config.listeners {
        if let Ok(address) = listener.local_addr()
            && !address.ip().is_unspecified()
        {
            names.push(address.ip().to_string());
        }
    }
    names.extend(config.extra_sans.iter().cloned());
    names
}

/// Accepts connections until shutdown.
async fn accept(inner: Arc<Inner>, listener: tokio::net::TcpListener, tls: TlsAcceptor, tasks: TaskTracker) {
    loop {
        let accepted = tokio::select! {
            () = inner.shutdown.cancelled() => return,
            accepted = listener.accept() => accepted,
        };
        match accepted {
            Ok((socket, peer)) => {
                tasks.spawn(connection(inner.clone(), socket, tls.clone(), peer));
            }
            Err(error) => {
                // Out of descriptors, mostly: others must close before it makes sense to go on.
                tracing::warn!(%error, "cannot accept a connection");
                tokio::time::sleep(Duration::from_millis(100)).await;
            }
        }
    }
}

async fn connection(inner: Arc<Inner>, socket: tokio::net::TcpStream, tls: TlsAcceptor, peer: std::net::SocketAddr) {
    // Small writes of watches must not wait for acknowledgements.
    let _ = socket.set_nodelay(true);
    let socket = match tokio::time::timeout(HANDSHAKE_TIMEOUT, tls.accept(socket)).await {
        Ok(Ok(socket)) => socket,
        Ok(Err(error)) => return tracing::debug!(%peer, %error, "TLS handshake failed"),
        Err(_) => return tracing::debug!(%peer, "TLS handshake took too long"),
    };
    let certificate = socket
        .get_ref()
        .1
        .peer_certificates()
        .and_then(<[_]>::first)
        .and_then(|certificate| pki::subject(certificate))
        .map(|(name, groups)| {
            let groups: Vec<&str> = groups.iter().map(String::as_str).collect();
            User::new(name, &groups)
        });
    let shutdown = inner.shutdown.clone();
    let service = hyper::service::service_fn(move |request: Request<hyper::body::Incoming>| {
        let (inner, certificate) = (inner.clone(), certificate.clone());
        async move {
            let request = request.map(|body| body.map_err(|error| Box::new(error) as BoxError).boxed_unsync());
            Ok::<_, std::convert::Infallible>(handle(inner, request, certificate).await)
        }
    });
    // The protocol is known from the handshake. Finding it out from the first bytes would wait for them without a limit.
    let is_http2 = socket.get_ref().1.alpn_protocol() == Some(b"h2");
    let builder = hyper_util::server::conn::auto::Builder::new(TokioExecutor::new());
    let mut builder = if is_http2 { builder.http2_only() } else { builder.http1_only() };
    builder.http1().timer(TokioTimer::new()).header_read_timeout(HEADER_TIMEOUT);
    builder
        .http2()
        .timer(TokioTimer::new())
        .max_concurrent_streams(MAX_STREAMS)
        .keep_alive_interval(PING_INTERVAL)
        .keep_alive_timeout(PING_TIMEOUT);
    let connection = builder.serve_connection_with_upgrades(TokioIo::new(socket), service);
    let mut connection = std::pin::pin!(connection);
    let ended = tokio::select! {
        ended = connection.as_mut() => ended,
        () = shutdown.cancelled() => {
            connection.as_mut().graceful_shutdown();
            tokio::time::timeout(DRAIN, connection).await.unwrap_or(Ok(()))
        }
    };
    if let Err(error) = ended {
        tracing::debug!(%peer, error, "connection ended");
    }
}

/// The server without a socket.
#[derive(Clone)]
pub struct LocalService {
    inner: Arc<Inner>,
    user: User,
}

impl<B> tower::Service<Request<B>> for LocalService
where
    B: http_body::Body<Data = Bytes> + Send + 'static,
    B::Error: Into<BoxError>,
{
    type Response = Response<Body>;
    type Error = BoxError;
    type Future = BoxFuture<'static, Result<Response<Body>, BoxError>>;

    fn poll_ready(&mut self, _context: &mut Context<'_>) -> Poll<Result<(), BoxError>> {
        Poll::Ready(Ok(()))
    }

    fn call(&mut self, request: Request<B>) -> Self::Future {
        let (inner, user) = (self.inner.clone(), self.user.clone());
        let request = request.map(|body| body.map_err(Into::into).boxed_unsync());
        Box::pin(async move { Ok(handle(inner, request, Some(user)).await) })
    }
}

/// Answers one request: the filters around everything.
async fn handle(inner: Arc<Inner>, request: Request<Body>, certificate: Option<User>) -> Response<Body> {
    let started = Instant::now();
    let head = request.method() == Method::HEAD;
    let gzip = request.method() == Method::GET && accepts_gzip(request.headers());
    let mut labels = VerbLabels { verb: request.method().to_string(), resource: String::new() };
    let mut long_running = false;
    let work: BoxFuture<'_, Result<Response<Body>, Status>> =
        Box::pin(route(inner.clone(), request, certificate, &mut labels, &mut long_running));
    let mut response = match AssertUnwindSafe(work).catch_unwind().await {
        Ok(Ok(response)) => response,
        Ok(Err(status)) => failure(&status),
        Err(_) => {
            // The hook has reported where; this request fails, the others go on.
            failure(&Status::internal("the server has made a mistake in handling this request; its log says where"))
        }
    };
    let headers = response.headers_mut();
    if let Ok(id) = HeaderValue::from_str(&uuid::Uuid::new_v4().to_string()) {
        headers.insert("audit-id", id);
    }
    if !headers.contains_key(CACHE_CONTROL) {
        headers.insert(CACHE_CONTROL, HeaderValue::from_static("no-cache, private"));
    }
    let code = response.status().as_u16();
    inner
        .metrics
        .requests
        .get_or_create(&RequestLabels { verb: labels.verb.clone(), resource: labels.resource.clone(), code })
        .inc();
    if !long_running {
        inner.metrics.duration.get_or_create(&labels).observe(started.elapsed().as_secs_f64());
    }
    if gzip {
        response = compressed(response).await;
    }
    if head {
        if let Some(length) = response.body().size_hint().exact() {
            response.headers_mut().insert(CONTENT_LENGTH, HeaderValue::from(length));
        }
        *response.body_mut() = full("");
    }
    response
}

fn accepts_gzip(headers: &HeaderMap) -> bool {
    headers
        .get(ACCEPT_ENCODING)
        .and_then(|value| value.to_str().ok())
        .is_some_and(|text| text.split(',').any(|part| part.split(';').next().unwrap_or_default().trim() == "gzip"))
}

/// Compresses quickly; for documents that are sent once.
pub fn gzip(bytes: &[u8]) -> Vec<u8> {
    let mut encoder = GzEncoder::new(Vec::with_capacity(bytes.len() / 4), Compression::fast());
    // Writing to a vector cannot fail.
    let _ = encoder.write_all(bytes);
    encoder.finish().unwrap_or_default()
}

async fn compressed(response: Response<Body>) -> Response<Body> {
    let large = response.body().size_hint().exact().is_some_and(|size| size > GZIP_MIN_BYTES);
    if !large || response.headers().contains_key(CONTENT_ENCODING) || response.status() != StatusCode::OK {
        return response;
    }
    let (mut parts, body) = response.into_parts();
    match body.collect().await {
        Ok(collected) => {
            parts.headers.insert(CONTENT_ENCODING, HeaderValue::from_static("gzip"));
            parts.headers.append(VARY, HeaderValue::from_static("Accept-Encoding"));
            Response::from_parts(parts, full(gzip(&collected.to_bytes())))
        }
        Err(error) => failure(&Status::internal(error)),
    }
}

/// Answers with a document that clients keep: ETag, 304, compressed once.
pub fn cached_answer(document: &Document, headers: &HeaderMap, content_type: &str, etag: &str) -> Response<Body> {
    let known = headers
        .get_all(IF_NONE_MATCH)
        .iter()
        .filter_map(|value| value.to_str().ok())
        .any(|text| text.split(',').any(|tag| tag.trim().trim_start_matches("W/") == etag));
    let mut response = if known {
        let mut response = Response::new(full(""));
        *response.status_mut() = StatusCode::NOT_MODIFIED;
        response
    } else {
        let (body, encoded) =
            if accepts_gzip(headers) { (document.gzip.clone(), true) } else { (document.bytes.clone(), false) };
        let mut response = answer(200, JSON, full(body));
        if let Ok(value) = HeaderValue::from_str(content_type) {
            response.headers_mut().insert(CONTENT_TYPE, value);
        }
        if encoded {
            response.headers_mut().insert(CONTENT_ENCODING, HeaderValue::from_static("gzip"));
        }
        response
    };
    if let Ok(etag) = HeaderValue::from_str(etag) {
        response.headers_mut().insert(ETAG, etag);
    }
    response.headers_mut().insert(VARY, HeaderValue::from_static("Accept, Accept-Encoding"));
    response
}

fn text_header(headers: &HeaderMap, name: http::HeaderName) -> String {
    // Several lines of one list header count as one.
    let values: Vec<&str> = headers.get_all(name).iter().filter_map(|value| value.to_str().ok()).collect();
    values.join(",")
}

/// Authenticates, finds out what is asked for, authorizes, and carries it out.
async fn route(
    inner: Arc<Inner>,
    request: Request<Body>,
    certificate: Option<User>,
    labels: &mut VerbLabels,
    long_running: &mut bool,
) -> Result<Response<Body>, Status> {
    let now = Timestamp::now();
    let state = inner.store.snapshot();
    let user = inner.authenticator.authenticate(request.headers(), certificate.as_ref(), &state, now.as_second())?;
    let path = request.uri().path().to_owned();
    let query = Query::parse(request.uri().query().unwrap_or_default());
    let accept = text_header(request.headers(), ACCEPT);
    let catalog = inner.catalog.load_full();
    let target = match Route::parse(&path) {
        Route::Resource(target) => target,
        other => {
            let verb = match request.method().as_str() {
                "GET" | "HEAD" => "get",
                "POST" => "post",
                "PUT" => "put",
                "DELETE" => "delete",
                _ => "patch",
            };
            let attributes = Attributes { verb, group: "", resource: "", namespace: "", name: "", path: &path };
            auth::authorize(&state, &user, &attributes)?;
            if verb != "get" {
                return Ok(answer(405, TEXT, full("405 method not allowed\n")));
            }
            let headers = request.headers();
            return Ok(match other {
                Route::Groups { core } => discovery::groups(&catalog, core, &accept, headers, &inner.address),
                Route::Group(group) => discovery::group(&catalog, &group),
                Route::Version { group, version } => discovery::version(&catalog, &group, &version),
                Route::Other(segments) => other_path(&inner, &catalog, &segments, &query, &accept, headers),
                Route::Resource(_) => no_such_page(),
            });
        }
    };
    let watch = (target.watch_prefix || query.flag("watch"))
        && target.subresource.is_none()
        && (target.watch_prefix || target.name.is_none());
    let entry = find(&catalog, &target);
    let no_entry = |missing: Option<Status>| missing.map_or_else(|| Ok(no_such_page()), Err);
    let verb = match path::verb(request.method(), target.name.is_some(), watch) {
        Some(verb) => verb,
        // What is proxied may answer to other methods than objects do. OPTIONS has no verb, so only rules for all verbs allow it.
        None if target.subresource.as_deref() == Some("proxy") && *request.method() == http::Method::OPTIONS => "",
        None => return entry.map_or_else(no_entry, |_| Err(Status::method_not_allowed())),
    };
    labels.verb = if verb.is_empty() { request.method().to_string() } else { verb.to_uppercase() };
    if let Ok(entry) = &entry {
        labels.resource.clone_from(&entry.kind.plural);
    }
    let resource = match &target.subresource {
        Some(subresource) => format!("{}/{subresource}", target.resource),
        None => target.resource.clone(),
    };
    let selected = selected_name(&query, verb);
    let name = target.name.as_deref().or(selected.as_deref()).unwrap_or_default();
    // A Namespace is itself in the namespace that it is, so that a Role in it can allow reading it.
    let namespace = match (&target.namespace, &target.name) {
        (Some(namespace), _) => namespace.as_str(),
        (None, Some(name)) if target.group.is_empty() && target.resource == "namespaces" => name.as_str(),
        (None, _) => "",
    };
    let attributes = Attributes { verb, group: &target.group, resource: &resource, namespace, name, path: "" };
    auth::authorize(&state, &user, &attributes)?;
    let entry = match entry {
        Ok(entry) => entry,
        Err(missing) => return no_entry(missing),
    };
    allowed(&entry, &target, verb)?;
    if let Some(subresource @ ("log" | "exec" | "attach" | "portforward" | "proxy")) = target.subresource.as_deref() {
        *long_running = true;
        let subresource = subresource.to_owned();
        return stream::run(inner, entry, target, &subresource, query, request).await;
    }
    *long_running = watch;
    let (parts, body) = request.into_parts();
    let body = read_body(&parts.headers, body).await?;
    let call = Call { server: inner, catalog, entry, target, verb, query, headers: parts.headers, user, body, now };
    let deprecated = deprecation(&call.entry);
    match tokio::time::timeout(REQUEST_TIMEOUT, verbs::run(call)).await {
        Ok(Ok(mut answer)) => {
            if let Some(text) = deprecated {
                crate::headers::add_warning_once(answer.headers_mut(), &text);
            }
            Ok(answer)
        }
        Ok(Err(status)) => {
            let mut answer = failure(&status);
            if let Some(text) = deprecated {
                crate::headers::add_warning_once(answer.headers_mut(), &text);
            }
            Ok(answer)
        }
        Err(_) => {
            let text = "Timeout: request did not complete within the allotted timeout";
            Err(Status::new(504, "Timeout", text))
        }
    }
}

/// The one object that a list or watch is about by its field selector; a rule about that name allows it.
fn selected_name(query: &Query, verb: &str) -> Option<String> {
    if !matches!(verb, "list" | "watch") {
        return None;
    }
    let selector = query.get("fieldSelector");
    let name = selector.split(',').find_map(|term| term.trim().strip_prefix("metadata.name="))?;
    let name = name.strip_prefix('=').unwrap_or(name);
    (!name.is_empty() && !name.contains(['/', '%'])).then(|| name.to_owned())
}

/// What clients are told about a deprecated kind with every answer.
fn deprecation(entry: &Entry) -> Option<String> {
    if entry.kind.is("", "Endpoints") {
        return Some(portolan_api::validation::ENDPOINTS_DEPRECATED.to_owned());
    }
    entry.custom.as_ref()?.deprecation.clone()
}

/// The kind a target names, or how to say that there is none (`None` for the plain page).
fn find(catalog: &Catalog, target: &Target) -> Result<Arc<Entry>, Option<Status>> {
    let registry = &catalog.registry;
    let custom_group = registry.iter().any(|kind| kind.group == target.group && kind.custom);
    let missing = || {
        if !registry.has_group(&target.group) || custom_group { None } else { Some(Status::unknown_resource()) }
    };
    let entry = catalog.entry(&target.group, &target.version, &target.resource).ok_or_else(missing)?;
    let kind = &entry.kind;
    // An object of a namespaced kind has a namespace; one of a cluster-scoped kind has none.
    let misplaced =
        if kind.namespaced { target.namespace.is_none() && target.name.is_some() } else { target.namespace.is_some() };
    if misplaced {
        return Err(missing());
    }
    match &target.subresource {
        None => Ok(entry.clone()),
        Some(name) => {
            let known = kind.subresource(name).is_some();
            let deeper = !target.rest.is_empty() && name != "proxy";
            if known && !deeper {
                Ok(entry.clone())
            } else if kind.custom && matches!(name.as_str(), "status" | "scale") && !deeper {
                // The definition could turn it on: the object is what is missing.
                Err(Some(Status::not_found(kind, target.name.as_deref().unwrap_or_default())))
            } else {
                Err(missing())
            }
        }
    }
}

/// Whether the kind or the subresource takes this verb.
fn allowed(entry: &Entry, target: &Target, verb: &str) -> Result<(), Status> {
    let kind = &entry.kind;
    let ok = match target.subresource.as_deref() {
        Some(name) => kind.subresource(name).is_some_and(|sub| verb.is_empty() || sub.verbs.iter().any(|v| v == verb)),
        None => {
            let everywhere = kind.namespaced && target.namespace.is_none() && !matches!(verb, "list" | "watch");
            let named_create = verb == "create" && target.name.is_some();
            kind.allows(verb) && !everywhere && !named_create
        }
    };
    if ok { Ok(()) } else { Err(Status::method_not_allowed()) }
}

async fn read_body(headers: &HeaderMap, body: Body) -> Result<Bytes, Status> {
    let declared =
        headers.get(CONTENT_LENGTH).and_then(|v| v.to_str().ok()).and_then(|text| text.parse::<usize>().ok());
    if declared.is_some_and(|length| length > BODY_MAX_BYTES) {
        return Err(Status::too_large(BODY_MAX_BYTES));
    }
    match tokio::time::timeout(REQUEST_TIMEOUT, gather(body)).await {
        Ok(gathered) => gathered,
        Err(_) => Err(Status::new(408, "Timeout", "the request body did not arrive in time")),
    }
}

async fn gather(mut body: Body) -> Result<Bytes, Status> {
    let mut gathered = Vec::new();
    while let Some(frame) = body.frame().await {
        let frame = frame.map_err(|error| Status::bad_request(format!("the request body cannot be read: {error}")))?;
        let Ok(data) = frame.into_data() else { continue };
        if gathered.len() + data.len() > BODY_MAX_BYTES {
            return Err(Status::too_large(BODY_MAX_BYTES));
        }
        gathered.extend_from_slice(&data);
    }
    Ok(Bytes::from(gathered))
}

/// Paths that are not about API objects.
fn other_path(
    inner: &Arc<Inner>,
    catalog: &Catalog,
    segments: &[String],
    query: &Query,
    accept: &str,
    headers: &HeaderMap,
) -> Response<Body> {
    let words: Vec<&str> = segments.iter().map(String::as_str).collect();
    match words.as_slice() {
        [] => {
            let mut paths: Vec<String> = ["/api", "/api/v1", "/apis"].map(str::to_owned).to_vec();
            for (group, versions) in catalog.registry.groups() {
                if !group.is_empty() {
                    paths.push(format!("/apis/{group}"));
                    paths.extend(versions.iter().map(|version| format!("/apis/{group}/{version}")));
                }
            }
            let more = ["/healthz", "/livez", "/metrics", "/openapi/v2", "/openapi/v3", "/readyz", "/version"];
            paths.extend(more.map(str::to_owned));
            json(200, &serde_json::json!({"paths": paths}))
        }
        ["version"] => json(200, &version()),
        [check @ ("healthz" | "livez" | "readyz"), rest @ ..] => health(inner, check, rest, query),
        ["metrics"] => metrics(inner),
        ["openapi", "v2"] => openapi::v2(catalog, accept, headers),
        ["openapi", "v3", ..] => openapi::v3(catalog, &segments[2..], query, headers),
        _ => no_such_page(),
    }
}

/// What `kubectl version` shows. Clients decide by major and minor what they may use.
fn version() -> serde_json::Value {
    serde_json::json!({
        "major": "1",
        "minor": "36",
        "emulationMajor": "1",
        "emulationMinor": "36",
        "minCompatibilityMajor": "1",
        "minCompatibilityMinor": "35",
        "gitVersion": concat!("v1.36.0+portolan-", env!("CARGO_PKG_VERSION")),
        "gitCommit": "",
        "gitTreeState": "clean",
        "buildDate": "",
        "goVersion": "",
        "compiler": "rustc",
        "platform": format!("{}/{}", std::env::consts::OS, go_architecture()),
    })
}

fn go_architecture() -> &'static str {
    match std::env::consts::ARCH {
        "x86_64" => "amd64",
        "aarch64" => "arm64",
        other => other,
    }
}

/// `/healthz`, `/livez`, `/readyz` and their single checks.
fn health(inner: &Inner, endpoint: &str, rest: &[&str], query: &Query) -> Response<Body> {
    let stopping = inner.shutdown.is_cancelled();
    let mut checks = vec![("ping", true), ("etcd", true)];
    if endpoint == "readyz" {
        checks.push(("shutdown", !stopping));
    }
    let ok = |healthy: bool, text: String| answer(if healthy { 200 } else { 500 }, TEXT, full(text));
    match rest {
        [] => {
            let excluded: Vec<&str> = query.all("exclude").collect();
            checks.retain(|(name, _)| !excluded.contains(name));
            let healthy = checks.iter().all(|(_, ok)| *ok);
            if healthy && !query.has("verbose") {
                return ok(true, "ok".to_owned());
            }
            let mut text: String = checks
                .iter()
                .map(
                    |(name, ok)| {
                        if *ok { format!("[+]{name} ok\n") } else { format!("[-]{name} failed: reason withheld\n") }
                    },
                )
                .collect();
            text.push_str(&format!("{endpoint} check {}\n", if healthy { "passed" } else { "failed" }));
            ok(healthy, text)
        }
        [name] => match checks.iter().find(|(check, _)| check == name) {
            Some((_, true)) => ok(true, "ok".to_owned()),
            Some((_, false)) => ok(false, "internal server error: reason withheld\n".to_owned()),
            None => no_such_page(),
        },
        _ => no_such_page(),
    }
}

fn metrics(inner: &Inner) -> Response<Body> {
    for (resource, count) in inner.store.snapshot().sizes() {
        let labels = ResourceLabels { resource: resource.to_string() };
        inner.metrics.objects.get_or_create(&labels).set(i64::try_from(count).unwrap_or(i64::MAX));
    }
    let content_type = HeaderValue::from_static("application/openmetrics-text; version=1.0.0; charset=utf-8");
    answer(200, content_type, full(inner.observer.encode()))
}
