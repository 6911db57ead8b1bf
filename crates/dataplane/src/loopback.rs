//! Node ports and host ports on loopback addresses, served by sockets.
//!
//! The kernel could translate `127.0.0.1` only with `route_localnet`, which lets neighbours on the network speak to the node's
//! loopback services (CVE-2020-8558), and `::1` not at all. So a relay listens there and dials the node's own address, where
//! the rules decide as for any process of the node; a host port that names a loopback address is dialled at its pod. The
//! server sees the node as its client. A refusal reaches a TCP client as a reset just after its connection was accepted.
//! SCTP is not relayed.

use std::collections::{BTreeMap, HashMap};
use std::io;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::time::Duration;

use portolan_linux::Netns;
use portolan_plan::service::{Frontend, FrontendAddr, ServiceMap};
use portolan_plan::world::{IpFamily, L4};
use socket2::{Domain, Protocol, SockRef, Socket, Type};
use tokio::net::{TcpListener, TcpSocket, TcpStream, UdpSocket};
use tokio::runtime::Handle;
use tokio::sync::mpsc;
use tokio_util::sync::CancellationToken;
use tracing::{debug, warn};

/// A UDP client's flow ends after this much silence: the kernel's own timeout for unanswered flows.
const UDP_IDLE: Duration = Duration::from_secs(30);
/// UDP clients of one port at a time.
const UDP_CLIENTS: usize = 4096;
/// The largest UDP payload.
const DATAGRAM: usize = 65_535;

/// A port on a loopback address.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Listen {
    /// TCP or UDP.
    pub protocol: L4,
    /// Where clients connect to.
    pub at: SocketAddr,
}

/// The relays that a map asks for and where they lead. `node_ports` is whether node ports are wanted on loopback addresses;
/// host ports are there in any case.
pub fn wanted(map: &ServiceMap, node_ports: bool) -> BTreeMap<Listen, SocketAddr> {
    let loopback = |family| match family {
        IpFamily::V4 => IpAddr::from(Ipv4Addr::LOCALHOST),
        IpFamily::V6 => IpAddr::from(Ipv6Addr::LOCALHOST),
    };
    let first = |addr: FrontendAddr| Frontend { addr, protocol: L4::Tcp, port: std::num::NonZeroU16::MIN };
    // Frontends are sorted by address, so only loopback addresses, node ports and host ports are visited.
    let v4 = first(FrontendAddr::Address(Ipv4Addr::new(127, 0, 0, 0).into()))
        ..first(FrontendAddr::Address(Ipv4Addr::new(128, 0, 0, 0).into()));
    let v6 = first(FrontendAddr::Address(Ipv6Addr::LOCALHOST.into()))
        ..first(FrontendAddr::Address(Ipv6Addr::from_bits(2).into()));
    let ports = first(FrontendAddr::NodePort(IpFamily::V4))..;
    let visited = map.frontends.range(v4).chain(map.frontends.range(v6)).chain(map.frontends.range(ports));
    let relays = visited.filter_map(|(frontend, target)| {
        let backend = || map.services.get(&target.service)?.external.usable().first().copied();
        let port = frontend.port.get();
        let (at, to) = match frontend.addr {
            FrontendAddr::Address(addr) => (addr, backend().map(|b| SocketAddr::new(b.addr, b.port.get()))?),
            FrontendAddr::NodePort(family) => {
                let node = map.node_port_addresses.iter().find(|a| IpFamily::of(a) == family && !a.is_loopback())?;
                (node_ports.then(|| loopback(family))?, SocketAddr::new(*node, port))
            }
            FrontendAddr::HostPort(family) => {
                (loopback(family), backend().map(|b| SocketAddr::new(b.addr, b.port.get()))?)
            }
        };
        let listen = Listen { protocol: frontend.protocol, at: SocketAddr::new(at, port) };
        (frontend.protocol != L4::Sctp).then_some((listen, to))
    });
    // A node port before a host port of the same number, as in the kernel's rules.
    let mut all = BTreeMap::new();
    for (listen, to) in relays {
        all.entry(listen).or_insert(to);
    }
    all
}

/// The relays of one node.
#[derive(Debug)]
pub struct Relays {
    netns: Netns,
    runtime: Handle,
    running: BTreeMap<Listen, Relay>,
}

#[derive(Debug)]
struct Relay {
    to: SocketAddr,
    stop: CancellationToken,
}

impl Drop for Relay {
    fn drop(&mut self) {
        self.stop.cancel();
    }
}

impl Relays {
    /// No relays yet; they will listen in `netns` and run on `runtime`.
    pub fn new(netns: Netns, runtime: Handle) -> Relays {
        Relays { netns, runtime, running: BTreeMap::new() }
    }

    /// Opens and closes relays. Those that cannot be opened (a process of the node has the port) are logged and answered.
    pub fn set(&mut self, wanted: &BTreeMap<Listen, SocketAddr>) -> Vec<(Listen, io::Error)> {
        self.running.retain(|listen, relay| wanted.get(listen) == Some(&relay.to));
        let mut failed = Vec::new();
        for (listen, to) in wanted {
            if self.running.contains_key(listen) {
                continue;
            }
            match self.open(*listen, *to) {
                Ok(relay) => {
                    self.running.insert(*listen, relay);
                }
                Err(error) => {
                    warn!(address = %listen.at, protocol = listen.protocol.as_str(), %error, "cannot relay a port on loopback");
                    failed.push((*listen, error));
                }
            }
        }
        failed
    }

    fn open(&self, listen: Listen, to: SocketAddr) -> io::Result<Relay> {
        let stop = CancellationToken::new();
        let (kind, protocol) = match listen.protocol {
            L4::Tcp => (Type::STREAM, Protocol::TCP),
            L4::Udp => (Type::DGRAM, Protocol::UDP),
            L4::Sctp => return Err(io::ErrorKind::Unsupported.into()),
        };
        let domain = Domain::for_address(listen.at);
        let socket = self.netns.run(|| Socket::new(domain, kind, Some(protocol)))??;
        if kind == Type::STREAM {
            // A relay that just closed leaves connections behind that would keep the port.
            socket.set_reuse_address(true)?;
        }
        socket.set_nonblocking(true)?;
        socket.bind(&listen.at.into())?;
        let netns = self.netns.clone();
        let stopped = stop.clone();
        let _runtime = self.runtime.enter();
        if kind == Type::STREAM {
            socket.listen(1024)?;
            let listener = TcpListener::from_std(socket.into())?;
            self.runtime.spawn(stopped.run_until_cancelled_owned(relay_tcp(listener, netns, to)));
        } else {
            let udp = UdpSocket::from_std(socket.into())?;
            self.runtime.spawn(stopped.run_until_cancelled_owned(relay_udp(udp, netns, to)));
        }
        Ok(Relay { to, stop })
    }
}

async fn relay_tcp(listener: TcpListener, netns: Netns, to: SocketAddr) {
    loop {
        match listener.accept().await {
            // Open connections outlive the relay, as translated ones outlive their rules.
            Ok((stream, _)) => {
                let netns = netns.clone();
                tokio::spawn(async move {
                    if let Err(error) = relay_connection(stream, &netns, to).await {
                        debug!(%to, %error, "relayed connection ended");
                    }
                });
            }
            Err(error) => {
                warn!(%error, "cannot accept on loopback");
                tokio::time::sleep(Duration::from_millis(100)).await;
            }
        }
    }
}

async fn relay_connection(mut client: TcpStream, netns: &Netns, to: SocketAddr) -> io::Result<()> {
    let dial = async {
        let socket = netns.run(|| if to.is_ipv4() { TcpSocket::new_v4() } else { TcpSocket::new_v6() })??;
        socket.connect(to).await
    };
    match dial.await {
        Ok(mut server) => {
            client.set_nodelay(true)?;
            server.set_nodelay(true)?;
            tokio::io::copy_bidirectional(&mut client, &mut server).await.map(|_| ())
        }
        Err(error) => {
            // A reset, as near to a refusal as an accepted connection can come.
            SockRef::from(&client).set_linger(Some(Duration::ZERO))?;
            Err(error)
        }
    }
}

async fn relay_udp(socket: UdpSocket, netns: Netns, to: SocketAddr) {
    let socket = std::sync::Arc::new(socket);
    let mut clients: HashMap<SocketAddr, mpsc::Sender<Vec<u8>>> = HashMap::new();
    let mut buffer = vec![0; DATAGRAM];
    loop {
        let (len, client) = match socket.recv_from(&mut buffer).await {
            Ok(received) => received,
            Err(error) => {
                // Such as an answer that its client refused.
                debug!(%error, "datagram on loopback lost");
                continue;
            }
        };
        let mut datagram = buffer[..len].to_vec();
        if let Some(sender) = clients.get(&client) {
            match sender.try_send(datagram) {
                Ok(()) | Err(mpsc::error::TrySendError::Full(_)) => continue,
                Err(mpsc::error::TrySendError::Closed(back)) => datagram = back,
            }
        }
        if clients.len() >= UDP_CLIENTS {
            clients.retain(|_, sender| !sender.is_closed());
            if clients.len() >= UDP_CLIENTS {
                continue;
            }
        }
        let (sender, receiver) = mpsc::channel(64);
        let _ = sender.try_send(datagram);
        clients.insert(client, sender);
        let (socket, netns) = (socket.clone(), netns.clone());
        tokio::spawn(async move {
            if let Err(error) = relay_flow(&socket, client, receiver, &netns, to).await {
                debug!(%to, %error, "relayed flow ended");
            }
        });
    }
}

async fn relay_flow(
    socket: &UdpSocket,
    client: SocketAddr,
    mut receiver: mpsc::Receiver<Vec<u8>>,
    netns: &Netns,
    to: SocketAddr,
) -> io::Result<()> {
    let any: IpAddr = if to.is_ipv4() { Ipv4Addr::UNSPECIFIED.into() } else { Ipv6Addr::UNSPECIFIED.into() };
    let upstream = netns.run(|| std::net::UdpSocket::bind(SocketAddr::new(any, 0)))??;
    upstream.set_nonblocking(true)?;
    upstream.connect(to)?;
    let upstream = UdpSocket::from_std(upstream)?;
    let mut buffer = vec![0; DATAGRAM];
    loop {
        tokio::select! {
            datagram = receiver.recv() => match datagram {
                Some(datagram) => upstream.send(&datagram).await.map(drop)?,
                None => return Ok(()),
            },
            answer = upstream.recv(&mut buffer) => {
                let len = answer?;
                socket.send_to(&buffer[..len], client).await?;
            }
            () = tokio::time::sleep(UDP_IDLE) => return Ok(()),
        }
    }
}
