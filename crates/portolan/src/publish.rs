//! Publishes the cluster's Ingress on ports of 127.0.0.1, so that a browser on the machine reaches it.
//!
//! A connection accepted on the machine is continued from the host outside the cluster to the load-balancer address of the Ingress
//! controller's Service: it takes the same path as any user's.

use std::io;
use std::net::{IpAddr, SocketAddr};
use std::time::Duration;

use anyhow::{Context, Result};
use portolan_linux::Netns;
use tokio::net::{TcpListener, TcpSocket, TcpStream};
use tokio::sync::watch;
use tokio_util::sync::CancellationToken;

/// How long a connection may take to be established inside; the LAN answers in well under a millisecond.
const CONNECT_TIMEOUT: Duration = Duration::from_secs(5);

/// Binds `127.0.0.1:port`. A `wanted` port that is taken is an error; a `preferred` one falls back to any free port.
pub fn bind(wanted: Option<u16>, preferred: u16, flag: &str) -> Result<std::net::TcpListener> {
    let local = |port| SocketAddr::from(([127, 0, 0, 1], port));
    let listener = match wanted {
        Some(port) => std::net::TcpListener::bind(local(port)).with_context(|| {
            format!("cannot listen on 127.0.0.1:{port}; choose another port with {flag}, or 0 for any free one")
        })?,
        None => std::net::TcpListener::bind(local(preferred)).or_else(|_| std::net::TcpListener::bind(local(0)))?,
    };
    listener.set_nonblocking(true)?;
    Ok(listener)
}

/// Relays connections to `target` port `port` until `shutdown`. Without a target yet, a connection is closed at once.
pub async fn relay(
    listener: std::net::TcpListener,
    from: Netns,
    target: watch::Receiver<Option<IpAddr>>,
    port: u16,
    shutdown: CancellationToken,
) -> Result<()> {
    let listener = TcpListener::from_std(listener)?;
    loop {
        let accepted = tokio::select! {
            () = shutdown.cancelled() => return Ok(()),
            accepted = listener.accept() => accepted,
        };
        let mut client = match accepted {
            Ok((client, _)) => client,
            Err(error) => {
                tracing::warn!(%error, "cannot accept a connection");
                tokio::time::sleep(Duration::from_millis(100)).await;
                continue;
            }
        };
        let Some(address) = *target.borrow() else { continue };
        let from = from.clone();
        let shutdown = shutdown.clone();
        tokio::spawn(async move {
            let upstream = dial(&from, SocketAddr::new(address, port)).await;
            match upstream {
                Ok(mut upstream) => tokio::select! {
                    _ = tokio::io::copy_bidirectional(&mut client, &mut upstream) => {}
                    () = shutdown.cancelled() => {}
                },
                Err(error) => tracing::debug!(%error, %address, port, "cannot reach the published Service"),
            }
        });
    }
}

/// Opens a TCP connection from inside `from`.
pub async fn dial(from: &Netns, address: SocketAddr) -> io::Result<TcpStream> {
    let runtime = tokio::runtime::Handle::current();
    let socket = from.run(move || {
        let _context = runtime.enter();
        if address.is_ipv4() { TcpSocket::new_v4() } else { TcpSocket::new_v6() }
    })??;
    socket.set_nodelay(true)?;
    match tokio::time::timeout(CONNECT_TIMEOUT, socket.connect(address)).await {
        Ok(connected) => connected,
        Err(_) => Err(io::Error::new(io::ErrorKind::TimedOut, format!("no answer from {address}"))),
    }
}
