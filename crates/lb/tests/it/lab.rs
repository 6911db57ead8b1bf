//! A router between a client network and a pod network, each a network namespace:
//! `outside` 192.168.60.100 - router - `pod-1` 10.244.1.10 and `pod-2` 10.244.2.10.

use std::io::{Read, Write};
use std::net::{IpAddr, SocketAddr, TcpListener, TcpStream, UdpSocket};
use std::time::{Duration, Instant};

use portolan_linux::{Netlink, Netns, RouteTarget, set_sysctl};

const NAMES: [&str; 4] = ["router", "outside", "pod-1", "pod-2"];

pub struct Lab {
    dir: tempfile::TempDir,
    pub router: Netns,
    pub outside: Netns,
    pub pods: [Netns; 2],
}

impl Drop for Lab {
    fn drop(&mut self) {
        for name in NAMES {
            let _ = Netns::delete(self.dir.path().join(name));
        }
    }
}

impl Lab {
    pub async fn new() -> Lab {
        let dir = tempfile::tempdir().unwrap();
        let [router, outside, pod_1, pod_2] = NAMES.map(|n| Netns::create(dir.path().join(n)).expect("needs root"));
        let lab = Lab { dir, router, outside, pods: [pod_1, pod_2] };
        set_sysctl(&lab.router, "net/ipv4/ip_forward", "1").unwrap();
        Netlink::open(&lab.router).unwrap().set_up("lo").await.unwrap();
        lab.connect("out", &lab.outside, "192.168.60.254/24", "192.168.60.100/24").await;
        lab.connect("p1", &lab.pods[0], "10.244.1.1/24", "10.244.1.10/24").await;
        lab.connect("p2", &lab.pods[1], "10.244.2.1/24", "10.244.2.10/24").await;
        serve(&lab.pods[0], "10.244.1.10", 8080);
        serve(&lab.pods[1], "10.244.2.10", 8080);
        lab
    }

    async fn connect(&self, link: &str, netns: &Netns, ours: &str, theirs: &str) {
        let router = Netlink::open(&self.router).unwrap();
        router.add_veth(link, "eth0", Some(netns)).await.unwrap();
        router.add_address(link, ours.parse().unwrap()).await.unwrap();
        router.set_up(link).await.unwrap();
        let far = Netlink::open(netns).unwrap();
        far.set_up("lo").await.unwrap();
        far.add_address("eth0", theirs.parse().unwrap()).await.unwrap();
        far.set_up("eth0").await.unwrap();
        let gateway: IpAddr = ours.split('/').next().unwrap().parse().unwrap();
        far.set_route("0.0.0.0/0".parse().unwrap(), RouteTarget::Via(gateway)).await.unwrap();
    }
}

/// Answers each TCP connection and each datagram with its own address and the peer's, on threads that live as long as the
/// process.
fn serve(netns: &Netns, own: &'static str, port: u16) {
    let listener = netns.run(|| TcpListener::bind(("0.0.0.0", port)).unwrap()).unwrap();
    std::thread::spawn(move || {
        for stream in listener.incoming().flatten() {
            std::thread::spawn(move || {
                let mut stream = stream;
                let line = format!("{} {}", stream.local_addr().unwrap().ip(), stream.peer_addr().unwrap().ip());
                let mut buffer = [0; 16];
                while stream.read(&mut buffer).is_ok_and(|n| n > 0) && stream.write_all(line.as_bytes()).is_ok() {}
            });
        }
    });
    let socket = netns.run(|| UdpSocket::bind((own, port)).unwrap()).unwrap();
    std::thread::spawn(move || {
        let mut buffer = [0; 16];
        while let Ok((_, peer)) = socket.recv_from(&mut buffer) {
            let _ = socket.send_to(format!("{own} {}", peer.ip()).as_bytes(), peer);
        }
    });
}

/// A TCP connection from inside a namespace.
pub fn connect(from: &Netns, to: &str) -> std::io::Result<TcpStream> {
    let to: SocketAddr = to.parse().unwrap();
    let stream = from.run(|| TcpStream::connect_timeout(&to, Duration::from_millis(700)))??;
    stream.set_read_timeout(Some(Duration::from_secs(2)))?;
    Ok(stream)
}

/// Asks over an open connection: `POD CLIENT`.
pub fn ask(stream: &mut TcpStream) -> std::io::Result<String> {
    stream.write_all(b"?")?;
    let mut buffer = [0; 64];
    let n = stream.read(&mut buffer)?;
    Ok(String::from_utf8_lossy(&buffer[..n]).into_owned())
}

/// Connects and asks.
pub fn tcp(from: &Netns, to: &str) -> String {
    match connect(from, to).and_then(|mut stream| ask(&mut stream)) {
        Ok(answer) => answer,
        Err(error) => format!("{:?}", error.kind()),
    }
}

/// A UDP client that keeps its port.
pub struct UdpFlow(UdpSocket);

impl UdpFlow {
    pub fn open(from: &Netns, to: &str) -> UdpFlow {
        let socket = from.run(|| UdpSocket::bind("0.0.0.0:0").unwrap()).unwrap();
        socket.set_read_timeout(Some(Duration::from_millis(700))).unwrap();
        socket.connect(to).unwrap();
        UdpFlow(socket)
    }

    /// Sends a datagram and waits for the answer: `POD CLIENT`.
    pub fn ask_who(&mut self) -> String {
        let mut buffer = [0; 64];
        match self.0.send(b"?").and_then(|_| self.0.recv(&mut buffer)) {
            Ok(n) => String::from_utf8_lossy(&buffer[..n]).into_owned(),
            Err(error) => format!("{:?}", error.kind()),
        }
    }
}

/// One datagram from a new port.
pub fn udp(from: &Netns, to: &str) -> String {
    UdpFlow::open(from, to).ask_who()
}

/// Repeats `probe` until it gives what is expected.
pub fn eventually<T: PartialEq + std::fmt::Debug>(expected: T, mut probe: impl FnMut() -> T) {
    let deadline = Instant::now() + Duration::from_secs(5);
    loop {
        let got = probe();
        if got == expected {
            return;
        }
        assert!(Instant::now() < deadline, "expected {expected:?}, last seen {got:?}");
        std::thread::sleep(Duration::from_millis(10));
    }
}
