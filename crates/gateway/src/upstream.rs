//! Connections to backends, kept per worker.

use std::cell::{Cell, RefCell};
use std::collections::HashMap;
use std::io::{ErrorKind, IoSlice};
use std::net::SocketAddr;
use std::pin::Pin;
use std::rc::Rc;
use std::task::{Context, Poll};
use std::time::Duration;

use hyper::client::conn::http1::{self, Parts, SendRequest};
use hyper_util::rt::TokioIo;
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::net::TcpStream;
use tokio::sync::{Notify, oneshot};
use tokio::task::AbortHandle;

use crate::body::Upload;
use crate::proxy::Exchange;
use crate::timers::Timers;

/// How long an idle connection is kept, and how many per worker (nginx: `upstream-keepalive-timeout` and
/// `upstream-keepalive-connections`).
const KEEP: Duration = Duration::from_secs(60);
const MOST_IDLE: usize = 320;
/// Largest head of a response; larger ones are answered with 502.
const MAX_RESPONSE_HEAD: usize = 64 << 10;

/// Idle connections by backend.
pub(crate) struct Pool {
    timers: Timers,
    idle: RefCell<HashMap<SocketAddr, Vec<Idle>>>,
    count: Cell<usize>,
    filled: Notify,
}

struct Idle {
    sender: Sender,
    since_ms: u64,
}

/// Sends requests on a connection. Dropping it closes the connection: what is unsent may never be read.
pub(crate) struct Sender {
    pub requests: SendRequest<Upload>,
    /// Absent when the connection outlives its requests because it may become a tunnel.
    task: Option<AbortHandle>,
}

impl Drop for Sender {
    fn drop(&mut self) {
        if let Some(task) = &self.task {
            task.abort();
        }
    }
}

/// A connection in use, to be given back after its response was read to the end.
pub(crate) struct Lease {
    pub sender: Sender,
    pub address: SocketAddr,
    /// Whether the whole request had been taken from the client when the response began. What comes after an early response the
    /// backend may never read, nor a request behind it.
    pub reusable: bool,
}

impl Lease {
    pub fn give_back(self, exchange: &Exchange) {
        if self.reusable {
            exchange.worker.pool.put(self);
        }
    }
}

/// A connection that will stop speaking HTTP, and where its remains arrive.
pub(crate) type Remains = oneshot::Receiver<Parts<TokioIo<TcpStream>>>;

impl Pool {
    pub fn new(timers: Timers) -> Pool {
        Pool { timers, idle: RefCell::default(), count: Cell::new(0), filled: Notify::new() }
    }

    /// An idle connection that seems to be alive.
    pub async fn take(&self, address: SocketAddr) -> Option<Sender> {
        match self.pop_ready(address) {
            Ok(sender) => Some(sender),
            Err(0) => None,
            Err(_) => {
                // Their tasks may have yet to notice that the last response has ended. One that stays busy is still sending a request
                // that was answered early.
                tokio::task::yield_now().await;
                self.pop_ready(address).ok()
            }
        }
    }

    /// The last one of the idle connections that can take a request, or how many there are that cannot.
    fn pop_ready(&self, address: SocketAddr) -> Result<Sender, usize> {
        let mut all = self.idle.borrow_mut();
        let Some(list) = all.get_mut(&address) else { return Err(0) };
        let before = list.len();
        list.retain(|idle| !idle.sender.requests.is_closed());
        let found = list.iter().rposition(|idle| idle.sender.requests.is_ready()).map(|at| list.remove(at));
        self.count.set(self.count.get() - (before - list.len()));
        found.map(|idle| idle.sender).ok_or(list.len())
    }

    fn put(&self, lease: Lease) {
        if self.count.get() >= MOST_IDLE || lease.sender.requests.is_closed() {
            return;
        }
        let idle = Idle { sender: lease.sender, since_ms: self.timers.now_ms() };
        self.idle.borrow_mut().entry(lease.address).or_default().push(idle);
        if self.count.replace(self.count.get() + 1) == 0 {
            self.filled.notify_one();
        }
    }

    /// Closes connections that were idle for too long, for ever. Sleeps while there are none.
    pub async fn expire(self: Rc<Self>) {
        loop {
            if self.count.get() == 0 {
                self.filled.notified().await;
            }
            tokio::time::sleep(KEEP / 2).await;
            let now = self.timers.now_ms();
            let keep = u64::try_from(KEEP.as_millis()).unwrap_or(u64::MAX);
            let mut left = 0;
            self.idle.borrow_mut().retain(|_, list| {
                list.retain(|idle| now - idle.since_ms < keep && !idle.sender.requests.is_closed());
                left += list.len();
                !list.is_empty()
            });
            self.count.set(left);
        }
    }

    /// Forgets all idle connections.
    pub fn clear(&self) {
        self.idle.borrow_mut().clear();
        self.count.set(0);
    }
}

/// A connection whose end is told by reading alone.
///
/// A backend may answer before a request has ended and close. The answer can then be read although writing fails, while hyper gives
/// up at the first failed write. So such a write waits instead; a connection that refuses writes has nothing more to read after
/// what has come, which ends it.
struct Heard(TcpStream);

impl AsyncRead for Heard {
    fn poll_read(mut self: Pin<&mut Self>, cx: &mut Context<'_>, into: &mut ReadBuf<'_>) -> Poll<std::io::Result<()>> {
        Pin::new(&mut self.0).poll_read(cx, into)
    }
}

impl AsyncWrite for Heard {
    fn poll_write(mut self: Pin<&mut Self>, cx: &mut Context<'_>, from: &[u8]) -> Poll<std::io::Result<usize>> {
        unless_closed(Pin::new(&mut self.0).poll_write(cx, from))
    }

    fn poll_write_vectored(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        from: &[IoSlice<'_>],
    ) -> Poll<std::io::Result<usize>> {
        unless_closed(Pin::new(&mut self.0).poll_write_vectored(cx, from))
    }

    fn is_write_vectored(&self) -> bool {
        self.0.is_write_vectored()
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<std::io::Result<()>> {
        Pin::new(&mut self.0).poll_flush(cx)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<std::io::Result<()>> {
        Pin::new(&mut self.0).poll_shutdown(cx)
    }
}

fn unless_closed(written: Poll<std::io::Result<usize>>) -> Poll<std::io::Result<usize>> {
    match written {
        Poll::Ready(Err(error)) if matches!(error.kind(), ErrorKind::BrokenPipe | ErrorKind::ConnectionReset) => {
            Poll::Pending
        }
        written => written,
    }
}

fn builder() -> http1::Builder {
    let mut builder = http1::Builder::new();
    builder.title_case_headers(true).max_header_size(MAX_RESPONSE_HEAD);
    builder
}

/// Opens a connection.
pub(crate) async fn connect(address: SocketAddr) -> std::io::Result<TcpStream> {
    let stream = TcpStream::connect(address).await?;
    stream.set_nodelay(true)?;
    Ok(stream)
}

/// Begins HTTP on a connection that is to be used again.
pub(crate) async fn begin(stream: TcpStream) -> hyper::Result<Sender> {
    let (requests, connection) = builder().handshake(TokioIo::new(Heard(stream))).await?;
    let task = tokio::task::spawn_local(async move {
        if let Err(error) = connection.await {
            tracing::trace!(%error, "upstream connection ended");
        }
    });
    Ok(Sender { requests, task: Some(task.abort_handle()) })
}

/// Begins HTTP on a connection that may switch to another protocol.
pub(crate) async fn begin_upgrade(stream: TcpStream) -> hyper::Result<(Sender, Remains)> {
    let (requests, connection) = builder().handshake(TokioIo::new(stream)).await?;
    let (give, take) = oneshot::channel();
    tokio::task::spawn_local(async move {
        if let Ok(parts) = connection.without_shutdown().await {
            // Nobody waits when the backend did not switch.
            let _ = give.send(parts);
        }
    });
    Ok((Sender { requests, task: None }, take))
}
