//! DNS over TCP (RFC 7766): pipelined queries, answered as they are ready.

use std::io;
use std::net::{IpAddr, SocketAddr};
use std::sync::Arc;
use std::time::{Duration, Instant};

use tokio::io::{AsyncReadExt, AsyncWriteExt, BufReader};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::{Semaphore, mpsc};
use tokio::time::timeout;
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;

use crate::answer::{Outcome, Transport};
use crate::metrics::Recorder;
use crate::{Seeds, Server};

/// How long a connection may rest, a message may take to arrive, or an answer to be taken (RFC 7766 section 6.2.3).
const IDLE: Duration = Duration::from_secs(10);
/// Connections at once; more wait in the backlog.
const CONNECTIONS: usize = 1024;
/// Answers of one connection that wait to be taken; a client that does not read is not read from.
const UNREAD: usize = 32;

/// Makes a non-blocking listener.
pub(crate) fn bind(address: SocketAddr) -> io::Result<std::net::TcpListener> {
    use socket2::{Domain, Protocol, Socket, Type};
    let socket = Socket::new(Domain::for_address(address), Type::STREAM, Some(Protocol::TCP))?;
    socket.set_reuse_address(true)?;
    if address.is_ipv6() {
        socket.set_only_v6(true)?;
    }
    socket.set_nonblocking(true)?;
    socket.bind(&address.into())?;
    socket.listen(1024)?;
    Ok(socket.into())
}

/// Accepts connections until `stop`.
pub(crate) async fn serve(
    server: Arc<Server>,
    listener: std::net::TcpListener,
    stop: CancellationToken,
    tasks: TaskTracker,
) {
    let listener = match TcpListener::from_std(listener) {
        Ok(listener) => listener,
        Err(error) => {
            tracing::error!(%error, "cannot wait for connections");
            return;
        }
    };
    let permits = Arc::new(Semaphore::new(CONNECTIONS));
    loop {
        let accept = async {
            // The semaphore is never closed.
            let permit = Arc::clone(&permits).acquire_owned().await.ok();
            (listener.accept().await, permit)
        };
        let (accepted, permit) = tokio::select! {
            () = stop.cancelled() => return,
            accepted = accept => accepted,
        };
        match accepted {
            Ok((stream, peer)) => {
                let (server, stop, inner) = (Arc::clone(&server), stop.clone(), tasks.clone());
                tasks.spawn(async move {
                    connection(server, stream, peer.ip(), stop, inner).await;
                    drop(permit);
                });
            }
            Err(error) => {
                tracing::warn!(%error, "cannot accept a connection");
                tokio::time::sleep(Duration::from_millis(100)).await;
            }
        }
    }
}

async fn connection(server: Arc<Server>, stream: TcpStream, peer: IpAddr, stop: CancellationToken, tasks: TaskTracker) {
    let _ = stream.set_nodelay(true);
    let (read, mut write) = stream.into_split();
    let mut read = BufReader::with_capacity(4096, read);
    let (answers, mut ready) = mpsc::channel::<Vec<u8>>(UNREAD);
    let mut recorder = Recorder::new(Arc::clone(&server.metrics));
    let mut seeds = Seeds::new();
    let gone = CancellationToken::new();
    let reader = async {
        loop {
            let message = tokio::select! {
                () = stop.cancelled() => break,
                () = gone.cancelled() => break,
                message = read_frame(&mut read) => message,
            };
            let Some(request) = message else { break };
            let started = Instant::now();
            let mut out = Vec::new();
            match server.answer(&request, Transport::Tcp, seeds.next(), &mut out) {
                Outcome::Reply(summary) => {
                    let sizes = (request.len(), out.len());
                    server.record(&mut recorder, summary, (peer, Transport::Tcp), sizes, started.elapsed());
                    if answers.send(out).await.is_err() {
                        break;
                    }
                }
                // What is no query ends the connection: the stream may be out of step.
                Outcome::Ignore => break,
                outcome @ (Outcome::Forward | Outcome::Chase(_)) => {
                    let Ok(slot) = answers.clone().reserve_owned().await else { break };
                    let server = Arc::clone(&server);
                    tasks.spawn(async move {
                        if let Outcome::Reply(summary) =
                            server.resolve(outcome, &request, Transport::Tcp, &mut out).await
                        {
                            let mut recorder = Recorder::new(Arc::clone(&server.metrics));
                            let sizes = (request.len(), out.len());
                            server.record(&mut recorder, summary, (peer, Transport::Tcp), sizes, started.elapsed());
                            slot.send(out);
                        }
                    });
                }
            }
        }
        drop(answers);
    };
    let writer = async {
        let mut frame = Vec::new();
        while let Some(answer) = ready.recv().await {
            frame.clear();
            // An answer is at most 65 535 octets by its limit.
            frame.extend_from_slice(&(answer.len() as u16).to_be_bytes());
            frame.extend_from_slice(&answer);
            // What is ready goes along, up to what one segment train takes.
            while frame.len() < 16_384 {
                let Ok(answer) = ready.try_recv() else { break };
                frame.extend_from_slice(&(answer.len() as u16).to_be_bytes());
                frame.extend_from_slice(&answer);
            }
            if !matches!(timeout(IDLE, write.write_all(&frame)).await, Ok(Ok(()))) {
                ready.close();
                gone.cancel();
                return;
            }
        }
    };
    tokio::join!(reader, writer);
}

/// Reads one length-prefixed message; `None` at the end of the stream or when the client takes too long.
async fn read_frame(stream: &mut (impl AsyncReadExt + Unpin)) -> Option<Vec<u8>> {
    let read = async {
        let length = stream.read_u16().await.ok()?;
        // Grows as octets come: a client that announces much and sends little costs little.
        let mut message = Vec::with_capacity(usize::from(length).min(512));
        let got = stream.take(u64::from(length)).read_to_end(&mut message).await.ok()?;
        (got == usize::from(length)).then_some(message)
    };
    timeout(IDLE, read).await.ok().flatten()
}
