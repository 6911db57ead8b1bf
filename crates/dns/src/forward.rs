//! Asking upstream servers. Messages stay as they are but for the id, which is drawn anew for each exchange.

use std::io;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use portolan_linux::Netns;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpSocket, UdpSocket};
use tokio::time::{Instant, timeout_at};

use crate::answer::Transport;
use crate::metrics::Metrics;
use crate::wire;

/// For one client query, all attempts together. Clients give up after five seconds.
const DEADLINE: Duration = Duration::from_secs(5);
/// For one attempt.
const ATTEMPT: Duration = Duration::from_secs(2);

/// Why there is no reply.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Failure {
    /// Too many exchanges are under way.
    Busy,
    /// No upstream answered.
    NoAnswer,
}

/// The upstream servers.
pub(crate) struct Forwarder {
    upstreams: Vec<SocketAddr>,
    netns: Option<Netns>,
    max_concurrent: usize,
    in_flight: AtomicUsize,
}

impl Forwarder {
    pub(crate) fn new(upstreams: Vec<SocketAddr>, netns: Option<Netns>, max_concurrent: usize) -> Forwarder {
        Forwarder { upstreams, netns, max_concurrent, in_flight: AtomicUsize::new(0) }
    }

    /// Sends `query` to one upstream after the other, starting at random, twice around at most; returns the first reply, which
    /// may be a failure of the upstream's own.
    pub(crate) async fn exchange(
        &self,
        query: &[u8],
        transport: Transport,
        metrics: &Metrics,
    ) -> Result<Vec<u8>, Failure> {
        if self.in_flight.fetch_add(1, Ordering::Relaxed) >= self.max_concurrent && self.max_concurrent > 0 {
            self.in_flight.fetch_sub(1, Ordering::Relaxed);
            metrics.concurrent_rejects.inc();
            return Err(Failure::Busy);
        }
        let result = self.attempts(query, transport, metrics).await;
        self.in_flight.fetch_sub(1, Ordering::Relaxed);
        result
    }

    async fn attempts(&self, query: &[u8], transport: Transport, metrics: &Metrics) -> Result<Vec<u8>, Failure> {
        let deadline = Instant::now() + DEADLINE;
        let first = rand::random::<u32>() as usize;
        for i in 0..2 * self.upstreams.len() {
            let upstream = self.upstreams[(first + i) % self.upstreams.len()];
            let started = Instant::now();
            if started >= deadline {
                break;
            }
            let mut message = query.to_vec();
            let id: [u8; 2] = rand::random();
            message[..2].copy_from_slice(&id);
            let attempt = async {
                match transport {
                    Transport::Udp => self.over_udp(upstream, &message).await,
                    Transport::Tcp => self.over_tcp(upstream, &message).await,
                }
            };
            match timeout_at(deadline.min(started + ATTEMPT), attempt).await {
                Ok(Ok(reply)) => {
                    metrics.proxied(upstream, reply.get(3).map_or(0, |b| b & 0xF), started.elapsed());
                    return Ok(reply);
                }
                Ok(Err(error)) => tracing::debug!(%upstream, %error, "exchange failed"),
                Err(_) => tracing::debug!(%upstream, "no answer in time"),
            }
        }
        Err(Failure::NoAnswer)
    }

    /// A socket of its own for each exchange, so that the kernel draws a new source port (RFC 5452 section 9.2).
    async fn over_udp(&self, upstream: SocketAddr, message: &[u8]) -> io::Result<Vec<u8>> {
        let any: IpAddr = if upstream.is_ipv4() { Ipv4Addr::UNSPECIFIED.into() } else { Ipv6Addr::UNSPECIFIED.into() };
        let socket = self.within(|| {
            let socket = std::net::UdpSocket::bind((any, 0))?;
            socket.set_nonblocking(true)?;
            Ok(socket)
        })?;
        let socket = UdpSocket::from_std(socket)?;
        // A connected socket takes datagrams from this upstream only.
        socket.connect(upstream).await?;
        socket.send(message).await?;
        let mut reply = vec![0; 4096];
        loop {
            let n = socket.recv(&mut reply).await?;
            if wire::is_reply_to(&reply[..n], message) {
                reply.truncate(n);
                return Ok(reply);
            }
        }
    }

    async fn over_tcp(&self, upstream: SocketAddr, message: &[u8]) -> io::Result<Vec<u8>> {
        let socket = self.within(|| {
            use socket2::{Domain, Protocol, Socket, Type};
            let socket = Socket::new(Domain::for_address(upstream), Type::STREAM, Some(Protocol::TCP))?;
            socket.set_nonblocking(true)?;
            Ok(std::net::TcpStream::from(socket))
        })?;
        let mut stream = TcpSocket::from_std_stream(socket).connect(upstream).await?;
        stream.write_all(&[&(message.len() as u16).to_be_bytes(), message].concat()).await?;
        loop {
            let length = stream.read_u16().await?;
            let mut reply = vec![0; usize::from(length)];
            stream.read_exact(&mut reply).await?;
            if wire::is_reply_to(&reply, message) {
                return Ok(reply);
            }
        }
    }

    fn within<T: Send>(&self, make: impl FnOnce() -> io::Result<T> + Send) -> io::Result<T> {
        match &self.netns {
            Some(netns) => netns.run(make)?,
            None => make(),
        }
    }
}
