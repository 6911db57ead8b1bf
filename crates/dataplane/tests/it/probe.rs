//! Sends one packet flow from somewhere in the lab and says what came back.

use std::io;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::sync::atomic::{AtomicU16, Ordering};
use std::time::Duration;

use portolan_linux::Netns;
use socket2::{Domain, Protocol, Socket, Type};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpSocket, TcpStream, UdpSocket};
use tokio::time::timeout;

/// What a client sees.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Seen {
    Reply { name: String, port: u16, peer: IpAddr },
    Refused,
    Unreachable,
    Timeout,
    Other(String),
}

impl Seen {
    fn of_error(error: &io::Error) -> Seen {
        match error.raw_os_error() {
            Some(libc::ECONNREFUSED | libc::ECONNRESET) => Seen::Refused,
            Some(libc::EHOSTUNREACH | libc::ENETUNREACH) => Seen::Unreachable,
            // The node's own packet was dropped on its way out.
            Some(libc::EPERM) => Seen::Timeout,
            _ => Seen::Other(error.to_string()),
        }
    }

    fn of_answer(text: &[u8]) -> Seen {
        let text = String::from_utf8_lossy(text).into_owned();
        let mut parts = text.split_whitespace();
        let parsed = (|| {
            let name = parts.next()?.to_owned();
            let port = parts.next()?.parse().ok()?;
            Some(Seen::Reply { name, port, peer: parts.next()?.parse().ok()? })
        })();
        parsed.unwrap_or(Seen::Other(text))
    }
}

/// An open connection or UDP socket.
pub enum Flow {
    Tcp(TcpStream),
    Udp(UdpSocket),
}

static NEXT_PORT: AtomicU16 = AtomicU16::new(0);

fn socket(space: &Netns, to: SocketAddr, kind: Type, mark: Option<u32>) -> Socket {
    let protocol = if kind == Type::STREAM { Protocol::TCP } else { Protocol::UDP };
    let socket = space.run(|| Socket::new(Domain::for_address(to), kind, Some(protocol))).unwrap().unwrap();
    socket.set_nonblocking(true).unwrap();
    if let Some(mark) = mark {
        socket.set_mark(mark).unwrap();
    }
    if kind == Type::DGRAM {
        // A port that no earlier flow had, so that none that conntrack still knows is met again.
        let any: IpAddr = if to.is_ipv4() { Ipv4Addr::UNSPECIFIED.into() } else { Ipv6Addr::UNSPECIFIED.into() };
        let port = 40_000 + NEXT_PORT.fetch_add(1, Ordering::Relaxed) % 20_000;
        socket.bind(&SocketAddr::new(any, port).into()).unwrap();
    }
    socket
}

/// Opens a flow; for TCP that is a connection.
pub async fn open(
    space: &Netns,
    proto: &str,
    to: SocketAddr,
    mark: Option<u32>,
    patience: Duration,
) -> Result<Flow, Seen> {
    if proto == "udp" {
        let socket = socket(space, to, Type::DGRAM, mark);
        socket.connect(&to.into()).map_err(|e| Seen::of_error(&e))?;
        return Ok(Flow::Udp(UdpSocket::from_std(socket.into()).unwrap()));
    }
    let socket = TcpSocket::from_std_stream(socket(space, to, Type::STREAM, mark).into());
    match timeout(patience, socket.connect(to)).await {
        Err(_) => Err(Seen::Timeout),
        Ok(Err(error)) => Err(Seen::of_error(&error)),
        Ok(Ok(stream)) => Ok(Flow::Tcp(stream)),
    }
}

/// Sends on a flow and waits for the answer.
pub async fn exchange(flow: &mut Flow, patience: Duration) -> Seen {
    let mut buffer = [0; 256];
    let answer = async {
        match flow {
            Flow::Udp(socket) => {
                // An error of an earlier datagram is reported at the next call; it says nothing about this one.
                let _ = socket.take_error();
                // A node's own packet that is dropped on its way out gives EPERM; whether it was refused, an error tells later.
                match socket.send(b"?\n").await {
                    Err(e) if e.raw_os_error() == Some(libc::EPERM) => {}
                    sent => {
                        sent?;
                    }
                }
                socket.recv(&mut buffer).await
            }
            Flow::Tcp(stream) => {
                stream.write_all(b"?\n").await?;
                stream.read(&mut buffer).await
            }
        }
    };
    match timeout(patience, answer).await {
        Err(_) => Seen::Timeout,
        Ok(Err(error)) => Seen::of_error(&error),
        Ok(Ok(0)) => Seen::Refused,
        Ok(Ok(len)) => Seen::of_answer(&buffer[..len]),
    }
}

/// A fresh flow, one exchange.
pub async fn once(space: &Netns, proto: &str, to: SocketAddr, mark: Option<u32>, patience: Duration) -> Seen {
    match open(space, proto, to, mark, patience).await {
        Ok(mut flow) => exchange(&mut flow, patience).await,
        Err(seen) => seen,
    }
}

/// Status, headers with lower-case names, body.
pub struct HttpAnswer {
    pub status: u16,
    pub headers: Vec<(String, String)>,
    pub body: String,
}

/// One HTTP request.
pub async fn http(
    space: &Netns,
    to: SocketAddr,
    mark: Option<u32>,
    method: &str,
    path: &str,
    patience: Duration,
) -> Result<HttpAnswer, Seen> {
    let mut flow = open(space, "tcp", to, mark, patience).await?;
    let Flow::Tcp(stream) = &mut flow else { unreachable!("asked for TCP") };
    let work = async {
        stream
            .write_all(format!("{method} {path} HTTP/1.1\r\nhost: {to}\r\nconnection: close\r\n\r\n").as_bytes())
            .await?;
        let mut answer = String::new();
        stream.read_to_string(&mut answer).await?;
        io::Result::Ok(answer)
    };
    let answer = match timeout(patience, work).await {
        Err(_) => return Err(Seen::Timeout),
        Ok(Err(error)) => return Err(Seen::of_error(&error)),
        Ok(Ok(answer)) => answer,
    };
    let (head, body) = answer.split_once("\r\n\r\n").ok_or_else(|| Seen::Other(answer.clone()))?;
    let mut lines = head.lines();
    let status = lines
        .next()
        .and_then(|l| l.split(' ').nth(1))
        .and_then(|s| s.parse().ok())
        .ok_or_else(|| Seen::Other(head.into()))?;
    let headers =
        lines.filter_map(|l| l.split_once(": ")).map(|(k, v)| (k.to_ascii_lowercase(), v.to_owned())).collect();
    Ok(HttpAnswer { status, headers, body: body.to_owned() })
}
