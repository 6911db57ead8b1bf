//! Echo servers: to a line or a datagram they answer with their name, their port and the peer address they see.

use std::net::{IpAddr, SocketAddr};

use portolan_linux::Netns;
use socket2::{Domain, Protocol, Socket, Type};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::task::JoinSet;

/// Starts the servers of one namespace. UDP sockets are bound to single addresses, so that an answer leaves from the address
/// addressed.
pub fn start(tasks: &mut JoinSet<()>, space: &Netns, name: &str, addresses: &[IpAddr], ports: &[u16]) {
    for port in ports {
        for any in ["0.0.0.0", "::"] {
            let at = SocketAddr::new(any.parse().unwrap(), *port);
            let socket = socket(space, at, Type::STREAM);
            socket.listen(1024).unwrap();
            let listener = tokio::net::TcpListener::from_std(socket.into()).unwrap();
            let name = name.to_owned();
            let port = *port;
            tasks.spawn(async move {
                let mut connections = JoinSet::new();
                loop {
                    tokio::select! {
                        accepted = listener.accept() => {
                            let Ok((mut stream, peer)) = accepted else { continue };
                            let answer = format!("{name} {port} {}\n", peer.ip());
                            connections.spawn(async move {
                                let mut buffer = [0; 64];
                                while let Ok(1..) = stream.read(&mut buffer).await {
                                    if stream.write_all(answer.as_bytes()).await.is_err() {
                                        return;
                                    }
                                }
                            });
                        }
                        Some(_) = connections.join_next() => {}
                    }
                }
            });
        }
        for addr in addresses {
            let socket = socket(space, SocketAddr::new(*addr, *port), Type::DGRAM);
            let udp = tokio::net::UdpSocket::from_std(socket.into()).unwrap();
            let name = name.to_owned();
            let port = *port;
            tasks.spawn(async move {
                let mut buffer = [0; 64];
                loop {
                    if let Ok((_, peer)) = udp.recv_from(&mut buffer).await {
                        let _ = udp.send_to(format!("{name} {port} {}\n", peer.ip()).as_bytes(), peer).await;
                    }
                }
            });
        }
    }
}

fn socket(space: &Netns, at: SocketAddr, kind: Type) -> Socket {
    let protocol = if kind == Type::STREAM { Protocol::TCP } else { Protocol::UDP };
    let socket = space.run(|| Socket::new(Domain::for_address(at), kind, Some(protocol))).unwrap().unwrap();
    if at.is_ipv6() {
        socket.set_only_v6(true).unwrap();
    }
    socket.set_reuse_address(true).unwrap();
    socket.set_nonblocking(true).unwrap();
    socket.bind(&at.into()).unwrap_or_else(|e| panic!("{at}: {e}"));
    socket
}
