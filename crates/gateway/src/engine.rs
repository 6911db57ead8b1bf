//! Listeners and workers: threads that share nothing but the snapshot.

use std::cell::Cell;
use std::convert::Infallible;
use std::future::Future;
use std::net::SocketAddr;
use std::pin::{Pin, pin};
use std::rc::Rc;
use std::sync::Arc;
use std::task::{Context, Poll};
use std::time::Duration;

use arc_swap::ArcSwap;
use http::header::HeaderValue;
use http::{Request, Response};
use hyper::body::Incoming;
use hyper::server::conn::{http1, http2};
use hyper_util::rt::TokioTimer;
use portolan_plan::route::{RouteTable, UpstreamKey};
use portolan_plan::world::ObjectKey;
use rustls::ServerConfig;
use rustls::sign::CertifiedKey;
use socket2::{Domain, Protocol as SocketProtocol, Socket, Type};
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::Notify;
use tokio_rustls::TlsAcceptor;
use tokio_util::sync::CancellationToken;

use crate::Error;
use crate::accesslog::{AccessLog, Sink, Target};
use crate::body::Body;
use crate::guard::{Conn, Guard, Protocol, Upgrade};
use crate::metrics::Registry;
use crate::proxy::{Link, handle};
use crate::snapshot::{Publisher, Snapshot};
use crate::timers::{Timer, Timers};
use crate::tls;
use crate::tunnel::tunnel;
use crate::upstream::Pool;

/// A connection without a request is closed after this long (nginx: `keepalive_timeout`).
const KEEP_ALIVE: Duration = Duration::from_secs(75);
/// A TLS handshake must end within this time.
const HANDSHAKE: Duration = Duration::from_secs(10);
/// What a client still sends after the last response is read and dropped for this long, because closing at once would reset the
/// connection and lose the response (nginx: `lingering_timeout`).
const LINGER: Duration = Duration::from_secs(5);
/// Connections waiting to be accepted; the kernel caps it at `net.core.somaxconn`.
const BACKLOG: i32 = 4096;
/// Largest header list of an HTTP/2 request, decoded.
const MAX_HEADER_LIST: u32 = 64 << 10;
/// Concurrent streams of one HTTP/2 connection (nginx: `http2_max_concurrent_streams`).
const MAX_STREAMS: u32 = 128;
/// Fields that a response or a request passed by the guard may have; the guard allows 200.
const MAX_FIELDS: usize = 256;

/// What an engine is told at start.
#[derive(Clone, Debug)]
pub struct EngineConfig {
    /// Addresses for plain HTTP; port 0 picks a free one.
    pub http: Vec<SocketAddr>,
    /// Addresses for HTTPS; port 0 picks a free one.
    pub https: Vec<SocketAddr>,
    /// Threads, at least one.
    pub workers: usize,
    /// Where the access log goes.
    pub access_log: Target,
    /// How long connections may go on after the end was asked for.
    pub drain: Duration,
}

/// A running proxy. Serves 404 until routes are published.
pub struct Engine {
    /// Bound addresses for plain HTTP.
    pub http: Vec<SocketAddr>,
    /// Bound addresses for HTTPS.
    pub https: Vec<SocketAddr>,
    snapshot: Arc<ArcSwap<Snapshot>>,
    publisher: Publisher,
    metrics: Registry,
    stop: CancellationToken,
    threads: Vec<std::thread::JoinHandle<()>>,
}

/// What a worker thread owns.
pub(crate) struct Worker {
    pub index: usize,
    pub snapshot: Arc<ArcSwap<Snapshot>>,
    pub pool: Rc<Pool>,
    pub timers: Timers,
    pub log: Rc<AccessLog>,
    pub metrics: Registry,
    stop: CancellationToken,
    open: Cell<usize>,
    idle: Notify,
}

impl Engine {
    /// Binds the listeners and starts the workers.
    ///
    /// # Errors
    /// When an address cannot be bound, another process serving it included, or a thread or certificate cannot be made.
    pub fn start(config: EngineConfig, metrics: Registry) -> Result<Engine, Error> {
        let mut publisher = Publisher::default();
        let snapshot =
            Arc::new(ArcSwap::new(
                publisher.snapshot(RouteTable::default(), Default::default(), &metrics, |_| Vec::new()),
            ));
        let default = tls::fake().map_err(|source| Error::Tls { source })?;
        let tls = tls::server_config(snapshot.clone(), default).map_err(|e| Error::Tls { source: e.into() })?;
        let workers = config.workers.max(1);
        let mut listeners: Vec<Vec<(std::net::TcpListener, bool)>> = (0..workers).map(|_| Vec::new()).collect();
        let mut bind_all = |addresses: &[SocketAddr], https: bool| -> Result<Vec<SocketAddr>, Error> {
            let mut bound = Vec::new();
            for &address in addresses {
                let failed = |source| Error::Listen { address, source };
                let sockets = bind(address, workers).map_err(failed)?;
                bound.push(sockets[0].local_addr().map_err(failed)?);
                for (list, socket) in listeners.iter_mut().zip(sockets) {
                    list.push((socket, https));
                }
            }
            Ok(bound)
        };
        let http = bind_all(&config.http, false)?;
        let https = bind_all(&config.https, true)?;
        let sink = Sink::open(config.access_log);
        let stop = CancellationToken::new();
        let mut threads = Vec::new();
        for (index, listeners) in listeners.into_iter().enumerate() {
            let (snapshot, metrics, stop, sink, tls) =
                (snapshot.clone(), metrics.clone(), stop.clone(), sink.clone(), tls.clone());
            let drain = config.drain;
            let thread = std::thread::Builder::new()
                .name(format!("gateway-{index}"))
                .spawn(move || {
                    if let Err(error) = work(index, listeners, snapshot, metrics, stop, sink, tls, drain) {
                        tracing::error!(%error, worker = index, "gateway worker failed");
                    }
                })
                .map_err(|source| Error::Thread { source })?;
            threads.push(thread);
        }
        Ok(Engine { http, https, snapshot, publisher, metrics, stop, threads })
    }

    /// Publishes new routes. Connections and requests in flight are not touched; `resolve` gives the endpoints of each upstream.
    pub fn publish(
        &mut self,
        table: RouteTable,
        certificates: std::collections::HashMap<ObjectKey, Arc<CertifiedKey>>,
        resolve: impl FnMut(&UpstreamKey) -> Vec<SocketAddr>,
    ) {
        let snapshot = self.publisher.snapshot(table, certificates, &self.metrics, resolve);
        self.snapshot.store(snapshot);
    }

    /// The routes in use.
    pub fn snapshot(&self) -> Arc<Snapshot> {
        self.snapshot.load_full()
    }

    /// The upstreams in use, whose endpoints may be set at any time.
    pub fn upstreams(&self) -> impl Iterator<Item = &Arc<crate::snapshot::Endpoints>> {
        self.publisher.upstreams()
    }

    /// Stops accepting, lets requests finish, and waits for it up to the drain limit. Blocks.
    pub fn stop(self) {
        self.stop.cancel();
        for thread in self.threads {
            let _ = thread.join();
        }
    }
}

/// One socket per worker for an address. The first bind is exclusive: `SO_REUSEPORT` alone would silently share the port with any
/// other process of the same user.
fn bind(address: SocketAddr, workers: usize) -> std::io::Result<Vec<std::net::TcpListener>> {
    let open = |address: SocketAddr, share: bool| -> std::io::Result<Socket> {
        let socket = Socket::new(Domain::for_address(address), Type::STREAM, Some(SocketProtocol::TCP))?;
        socket.set_reuse_address(true)?;
        socket.set_reuse_port(share)?;
        socket.bind(&address.into())?;
        Ok(socket)
    };
    let probe = open(address, false)?;
    // SO_REUSEADDR lets two sockets bind one port; only one of them may listen.
    probe.listen(1)?;
    let bound = probe.local_addr()?.as_socket().unwrap_or(address);
    drop(probe);
    (0..workers)
        .map(|_| {
            let socket = open(bound, true)?;
            socket.listen(BACKLOG)?;
            socket.set_nonblocking(true)?;
            Ok(socket.into())
        })
        .collect()
}

#[expect(clippy::too_many_arguments, reason = "a thread's entry point takes what the thread owns")]
fn work(
    index: usize,
    listeners: Vec<(std::net::TcpListener, bool)>,
    snapshot: Arc<ArcSwap<Snapshot>>,
    metrics: Registry,
    stop: CancellationToken,
    sink: Sink,
    tls: Arc<ServerConfig>,
    drain: Duration,
) -> std::io::Result<()> {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    let local = tokio::task::LocalSet::new();
    local.block_on(&runtime, async move {
        let timers = Timers::new();
        let worker = Rc::new(Worker {
            index,
            snapshot,
            pool: Rc::new(Pool::new(timers.clone())),
            timers: timers.clone(),
            log: Rc::new(AccessLog::new(sink)),
            metrics,
            stop: stop.clone(),
            open: Cell::new(0),
            idle: Notify::new(),
        });
        tokio::task::spawn_local(timers.sweep());
        tokio::task::spawn_local(worker.pool.clone().expire());
        let acceptor = TlsAcceptor::from(tls);
        for (listener, https) in listeners {
            let listener = TcpListener::from_std(listener)?;
            tokio::task::spawn_local(accept(worker.clone(), listener, https.then(|| acceptor.clone())));
        }
        stop.cancelled().await;
        let finished = async {
            while worker.open.get() > 0 {
                worker.idle.notified().await;
            }
        };
        if tokio::time::timeout(drain, finished).await.is_err() {
            tracing::warn!(
                worker = index,
                connections = worker.open.get(),
                "closing connections that did not end in time"
            );
        }
        worker.pool.clear();
        worker.log.flush();
        Ok(())
    })
}

async fn accept(worker: Rc<Worker>, listener: TcpListener, acceptor: Option<TlsAcceptor>) {
    loop {
        let accepted = tokio::select! {
            () = worker.stop.cancelled() => return,
            accepted = listener.accept() => accepted,
        };
        match accepted {
            Ok((stream, peer)) => {
                let (worker, acceptor) = (worker.clone(), acceptor.clone());
                tokio::task::spawn_local(async move {
                    let open = Open::new(worker);
                    serve(&open.worker, stream, peer, acceptor).await;
                });
            }
            Err(error) => {
                // Out of descriptors: connections must end before others can begin.
                tracing::warn!(%error, "cannot accept a connection");
                tokio::time::sleep(Duration::from_millis(50)).await;
            }
        }
    }
}

/// Counts a connection while it is open.
struct Open {
    worker: Rc<Worker>,
}

impl Open {
    fn new(worker: Rc<Worker>) -> Open {
        worker.open.set(worker.open.get() + 1);
        worker.metrics.connection(true);
        Open { worker }
    }
}

impl Drop for Open {
    fn drop(&mut self) {
        self.worker.metrics.connection(false);
        self.worker.open.set(self.worker.open.get() - 1);
        if self.worker.open.get() == 0 {
            self.worker.idle.notify_one();
        }
    }
}

async fn serve(worker: &Rc<Worker>, stream: TcpStream, peer: SocketAddr, acceptor: Option<TlsAcceptor>) {
    let _ = stream.set_nodelay(true);
    let port = stream.local_addr().map_or(0, |a| a.port());
    let client = HeaderValue::try_from(peer.ip().to_canonical().to_string()).expect("an address is a header value");
    let link = |https: bool| {
        Rc::new(Link {
            conn: Rc::new(Conn::new(peer, port, https)),
            client: client.clone(),
            tunnel: Default::default(),
        })
    };
    match acceptor {
        None => {
            let link = link(false);
            let mut guard = Guard::http1(stream, link.conn.clone(), &worker.timers);
            let timer = worker.timers.after(KEEP_ALIVE);
            let protocol = tokio::select! {
                () = worker.stop.cancelled() => return,
                sniffed = timer.limit(guard.sniff()) => sniffed,
            };
            match protocol {
                Some(Ok(Protocol::Http1)) => serve_http1(worker, link, guard).await,
                Some(Ok(Protocol::Http2)) => serve_http2(worker, link, guard).await,
                Some(Err(_)) | None => {}
            }
        }
        Some(acceptor) => {
            let timer = worker.timers.after(HANDSHAKE);
            let stream = match timer.limit(acceptor.accept(stream)).await {
                Some(Ok(stream)) => stream,
                Some(Err(error)) => return tracing::debug!(%peer, %error, "TLS handshake failed"),
                None => return,
            };
            drop(timer);
            let link = link(true);
            if stream.get_ref().1.alpn_protocol() == Some(b"h2") {
                let guard = Guard::http2(stream, link.conn.clone(), &worker.timers);
                serve_http2(worker, link, guard).await;
            } else {
                let guard = Guard::http1(stream, link.conn.clone(), &worker.timers);
                serve_http1(worker, link, guard).await;
            }
        }
    }
}

/// Hands requests of one connection to [`handle`].
struct Handler {
    worker: Rc<Worker>,
    link: Rc<Link>,
}

impl hyper::service::Service<Request<Incoming>> for Handler {
    type Response = Response<Body>;
    type Error = Infallible;
    type Future = Pin<Box<dyn Future<Output = Result<Response<Body>, Infallible>>>>;

    fn call(&self, request: Request<Incoming>) -> Self::Future {
        Box::pin(handle(self.worker.clone(), self.link.clone(), request))
    }
}

/// Spawns the tasks of an HTTP/2 connection on its worker.
#[derive(Clone)]
struct Local;

impl<F: Future + 'static> hyper::rt::Executor<F> for Local
where
    F::Output: 'static,
{
    fn execute(&self, future: F) {
        tokio::task::spawn_local(future);
    }
}

async fn serve_http1<T>(worker: &Rc<Worker>, link: Rc<Link>, guard: Guard<T>)
where
    T: AsyncRead + AsyncWrite + Unpin + 'static,
{
    let handler = Handler { worker: worker.clone(), link: link.clone() };
    let mut connection = http1::Builder::new()
        .title_case_headers(true)
        .max_headers(MAX_FIELDS)
        .half_close(false)
        .serve_connection(guard, handler);
    let idle = worker.timers.after(KEEP_ALIVE);
    let mut stopping = pin!(worker.stop.cancelled());
    let mut closing = false;
    let ended = std::future::poll_fn(|cx| {
        if !closing && stopping.as_mut().poll(cx).is_ready() {
            closing = true;
            Pin::new(&mut connection).graceful_shutdown();
        }
        if let Poll::Ready(result) = connection.poll_without_shutdown(cx) {
            return Poll::Ready(result);
        }
        if !closing && is_idle(worker, &link, &idle, cx) {
            closing = true;
            Pin::new(&mut connection).graceful_shutdown();
            return connection.poll_without_shutdown(cx);
        }
        Poll::Pending
    })
    .await;
    if let Err(error) = ended {
        tracing::trace!(peer = %link.conn.peer, %error, "connection ended");
    }
    let parts = connection.into_parts();
    let (mut io, left) = parts.io.into_parts();
    if link.conn.upgrade.get() == Upgrade::Accepted
        && let Some(to) = link.tunnel.take()
    {
        let mut first = parts.read_buf.to_vec();
        first.extend_from_slice(&left);
        return tunnel(&worker.timers, io, first, to).await;
    }
    let timer = worker.timers.after(LINGER);
    let linger = async {
        io.shutdown().await?;
        let mut rest = [0u8; 4096];
        while io.read(&mut rest).await? > 0 {}
        std::io::Result::Ok(())
    };
    let _ = timer.limit(linger).await;
}

/// Whether a connection had no request for too long. The timer runs on under traffic and is only moved when it expires, so that a
/// request does not pay for it.
fn is_idle(worker: &Worker, link: &Link, timer: &Timer, cx: &mut Context<'_>) -> bool {
    while timer.poll_expired(cx).is_ready() {
        let rested = Duration::from_millis(worker.timers.now_ms().saturating_sub(link.conn.rested_ms.get()));
        match (link.conn.active.get(), KEEP_ALIVE.checked_sub(rested)) {
            (1.., _) => timer.set(KEEP_ALIVE),
            (0, Some(left)) if !left.is_zero() => timer.set(left),
            (0, _) => return true,
        }
    }
    false
}

async fn serve_http2<T>(worker: &Rc<Worker>, link: Rc<Link>, guard: Guard<T>)
where
    T: AsyncRead + AsyncWrite + Unpin + 'static,
{
    let handler = Handler { worker: worker.clone(), link: link.clone() };
    let connection = http2::Builder::new(Local)
        .timer(TokioTimer::new())
        .max_concurrent_streams(MAX_STREAMS)
        .max_header_list_size(MAX_HEADER_LIST)
        .serve_connection(guard, handler);
    let mut connection = pin!(connection);
    let idle = worker.timers.after(KEEP_ALIVE);
    let mut stopping = pin!(worker.stop.cancelled());
    let mut closing = false;
    let ended = std::future::poll_fn(|cx| {
        if !closing && stopping.as_mut().poll(cx).is_ready() {
            closing = true;
            connection.as_mut().graceful_shutdown();
        }
        if let Poll::Ready(result) = connection.as_mut().poll(cx) {
            return Poll::Ready(result);
        }
        if !closing && is_idle(worker, &link, &idle, cx) {
            closing = true;
            connection.as_mut().graceful_shutdown();
            return connection.as_mut().poll(cx);
        }
        Poll::Pending
    })
    .await;
    if let Err(error) = ended {
        tracing::trace!(peer = %link.conn.peer, %error, "connection ended");
    }
}
