//! Host ports, ports on loopback addresses, and SCTP, with real packets.

use std::io::Read as _;
use std::net::{IpAddr, Ipv4Addr, SocketAddr};
use std::time::{Duration, Instant};

use portolan_dataplane::loopback::{self, Relays};
use portolan_dataplane::{Change, ServiceProxy};
use portolan_plan::world::ObjectKey;
use serde_json::{Value, json};
use socket2::{Domain, Protocol, Socket, Type};
use tokio::task::JoinSet;

use crate::case;
use crate::lab::{self, Lab};
use crate::probe::{self, Seen};

const PATIENCE: Duration = Duration::from_secs(5);

fn text(name: &str) -> String {
    lab::address(name).unwrap().to_string()
}

fn pod(name: &str, ports: Value) -> Change {
    let object = json!({
        "metadata": {"namespace": case::NAMESPACE, "name": name},
        "spec": {"containers": [{"name": "c", "ports": ports}]},
        "status": {"phase": "Running", "podIPs": [{"ip": text(name)}, {"ip": text(&format!("{name}.6"))}]},
    });
    Change::pod(&serde_json::from_value(object).unwrap())
}

fn slice(service: &str, family: &str, pods: &[&str], ports: Value) -> Change {
    let endpoints: Vec<Value> = pods
        .iter()
        .map(|p| json!({"addresses": [text(&format!("{p}{family}"))], "nodeName": format!("n{}", &p[1..2])}))
        .collect();
    case::put(json!({
        "kind": "EndpointSlice",
        "metadata": {"name": format!("{service}{family}"), "labels": {"kubernetes.io/service-name": service}},
        "addressType": if family.is_empty() { "IPv4" } else { "IPv6" }, "ports": ports, "endpoints": endpoints,
    }))
}

#[test]
fn host_ports_and_loopback_ports_reach_their_pods() {
    let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build().unwrap();
    runtime.block_on(async {
        let lab = Lab::build();
        let mut servers = JoinSet::new();
        crate::traffic::serve(&lab, &mut servers);
        let mut proxy = ServiceProxy::new(&lab.spaces["n1"], lab::node_view("n1")).unwrap();
        proxy.change(case::service_range());
        proxy.change(case::put(json!({
            "kind": "Service", "metadata": {"name": "web"},
            "spec": {"type": "NodePort", "clusterIP": text("C1"), "clusterIPs": [text("C1"), text("C1.6")], "ports": [
                {"name": "t", "port": 80, "nodePort": 30080}, {"name": "u", "port": 80, "nodePort": 30080, "protocol": "UDP"}]},
        })));
        for family in ["", ".6"] {
            let ports = json!([{"name": "t", "port": 8080}, {"name": "u", "port": 8080, "protocol": "UDP"}]);
            proxy.change(slice("web", family, &["p2a"], ports));
        }
        proxy.change(pod("p1a", json!([
            {"containerPort": 8080, "hostPort": 31500}, {"containerPort": 8081, "hostPort": 31500, "protocol": "UDP"}])));
        proxy.change(pod("p1b", json!([
            {"containerPort": 8080, "hostPort": 31501, "hostIP": "127.0.0.1"},
            {"containerPort": 8080, "hostPort": 31502, "hostIP": text("n1")}])));
        let mut relays = Relays::new(lab.spaces["n1"].clone(), tokio::runtime::Handle::current());
        let mut apply = |proxy: &mut ServiceProxy| {
            let report = tokio::task::block_in_place(|| proxy.sync());
            assert!(report.is_ok() && report.loopback_changed, "{report:?}");
            let failed = relays.set(&loopback::wanted(proxy.map(), true));
            assert!(failed.is_empty(), "{failed:?}");
        };
        apply(&mut proxy);

        // From, to, port, protocol; who answers and as whom it sees the client; nobody: refused.
        type Row = (&'static str, &'static str, u16, &'static str, Option<(&'static str, &'static str)>);
        let rows: [Row; 17] = [
            ("x1", "n1", 31500, "tcp", Some(("p1a", "x1"))),
            ("x1", "n1.6", 31500, "tcp", Some(("p1a", "x1.6"))),
            ("x1", "n1.gw", 31500, "udp", Some(("p1a", "x1"))),
            ("p1b", "n1", 31500, "tcp", Some(("p1a", "p1b"))),
            ("p2b", "n1", 31500, "tcp", Some(("p1a", "p2b"))),
            ("p1a", "n1", 31500, "tcp", Some(("p1a", "n1.gw"))),
            ("n1", "n1", 31500, "tcp", Some(("p1a", "n1"))),
            ("n1", "localhost", 31500, "tcp", Some(("p1a", "n1.gw"))),
            ("n1", "localhost", 31500, "udp", Some(("p1a", "n1.gw"))),
            ("n1", "localhost.6", 31500, "tcp", Some(("p1a", "n1.gw.6"))),
            ("n1", "localhost", 31501, "tcp", Some(("p1b", "n1.gw"))),
            ("x1", "n1", 31501, "tcp", None),
            ("x1", "n1", 31502, "tcp", Some(("p1b", "x1"))),
            ("x1", "n1.gw", 31502, "tcp", None),
            ("n1", "localhost", 30080, "tcp", Some(("p2a", "n1"))),
            ("n1", "localhost", 30080, "udp", Some(("p2a", "n1"))),
            ("n1", "localhost.6", 30080, "udp", Some(("p2a", "n1.6"))),
        ];
        for (from, to, port, protocol, expected) in rows {
            let at = SocketAddr::new(lab::address(to).unwrap(), port);
            let seen = probe::once(&lab.spaces[from], protocol, at, None, PATIENCE).await;
            let matches = match (&seen, expected) {
                (Seen::Refused, None) => true,
                (Seen::Reply { name, peer, .. }, Some((who, client))) => name == who && lab::address(client) == Some(*peer),
                _ => false,
            };
            assert!(matches, "{from} -> {to}:{port}/{protocol}: expected {expected:?}, saw {seen:?}");
        }
        let route_localnet = lab.run("n1", "cat", &["/proc/sys/net/ipv4/conf/all/route_localnet"], "");
        assert_eq!(route_localnet.trim(), "0");

        proxy.change(Change::pod_gone(ObjectKey::new(case::NAMESPACE, "p1a")));
        proxy.change(Change::service_gone(ObjectKey::new(case::NAMESPACE, "web")));
        apply(&mut proxy);
        for (from, to, port) in [("x1", "n1", 31500), ("n1", "localhost", 31500), ("n1", "localhost", 30080)] {
            let at = SocketAddr::new(lab::address(to).unwrap(), port);
            let deadline = Instant::now() + PATIENCE;
            // A relay's task lets go of its port a moment after it was told.
            while probe::once(&lab.spaces[from], "tcp", at, None, PATIENCE).await != Seen::Refused {
                assert!(Instant::now() < deadline, "{from} -> {to}:{port} is still answered");
            }
        }
    });
}

/// CRC32c (RFC 9260 appendix A), bit by bit.
fn crc32c(bytes: &[u8]) -> u32 {
    !bytes.iter().fold(u32::MAX, |crc, byte| {
        (0..8).fold(crc ^ u32::from(*byte), |crc, _| (crc >> 1) ^ (0x82f6_3b78 & 0u32.wrapping_sub(crc & 1)))
    })
}

/// An SCTP packet with one INIT (1) or INIT ACK (2) chunk (RFC 9260 section 3.3.2).
fn sctp(source: u16, destination: u16, tag: u32, chunk: u8) -> Vec<u8> {
    let mut packet = Vec::new();
    packet.extend_from_slice(&source.to_be_bytes());
    packet.extend_from_slice(&destination.to_be_bytes());
    packet.extend_from_slice(&tag.to_be_bytes());
    packet.extend_from_slice(&[0; 4]);
    packet.extend_from_slice(&[chunk, 0, 0, 20]);
    packet.extend_from_slice(&0x1234_5678u32.to_be_bytes());
    packet.extend_from_slice(&65_536u32.to_be_bytes());
    packet.extend_from_slice(&[0, 1, 0, 1]);
    packet.extend_from_slice(&1u32.to_be_bytes());
    let sum = crc32c(&packet).to_le_bytes();
    packet[8..12].copy_from_slice(&sum);
    packet
}

/// The next SCTP packet at a raw socket: its source, and its bytes after the IP header.
fn receive(socket: &Socket) -> (IpAddr, Vec<u8>) {
    let mut buffer = [0; 2048];
    let len = (&*socket).read(&mut buffer).expect("a packet in time");
    let bytes = &buffer[..len];
    let from = Ipv4Addr::new(bytes[12], bytes[13], bytes[14], bytes[15]);
    let header = usize::from(bytes[0] & 15) * 4;
    let packet = bytes[header..].to_vec();
    let mut unsummed = packet.clone();
    unsummed[8..12].fill(0);
    assert_eq!(packet[8..12], crc32c(&unsummed).to_le_bytes(), "the checksum covers what was translated");
    (from.into(), packet)
}

/// The kernel here may lack SCTP sockets, so the packets of an association's start are made by hand.
#[test]
fn sctp_is_translated_there_and_back() {
    let lab = Lab::build();
    let mut proxy = ServiceProxy::new(&lab.spaces["n1"], lab::node_view("n1")).unwrap();
    proxy.change(case::service_range());
    proxy.change(case::put(json!({
        "kind": "Service", "metadata": {"name": "assoc"},
        "spec": {"clusterIP": text("C1"), "ports": [{"port": 90, "protocol": "SCTP"}]},
    })));
    proxy.change(slice("assoc", "", &["p2a"], json!([{"name": "", "port": 9090, "protocol": "SCTP"}])));
    assert!(proxy.sync().is_ok());
    let raw = |space: &str| {
        let socket =
            lab.spaces[space].run(|| Socket::new(Domain::IPV4, Type::RAW, Some(Protocol::from(132)))).unwrap().unwrap();
        socket.set_read_timeout(Some(PATIENCE)).unwrap();
        socket
    };
    let (client, server) = (raw("p1a"), raw("p2a"));
    let to = |name: &str| SocketAddr::new(lab::address(name).unwrap(), 0).into();
    client.send_to(&sctp(40_000, 90, 0, 1), &to("C1")).unwrap();
    let (from, init) = receive(&server);
    assert_eq!(Some(from), lab::address("p1a"));
    assert_eq!((&init[0..2], &init[2..4]), (&40_000u16.to_be_bytes()[..], &9090u16.to_be_bytes()[..]));
    server.send_to(&sctp(9090, 40_000, 0x1234_5678, 2), &to("p1a")).unwrap();
    let (from, answer) = receive(&client);
    assert_eq!(Some(from), lab::address("C1"), "the answer comes from the Service");
    assert_eq!((&answer[0..2], answer[12]), (&90u16.to_be_bytes()[..], 2));
}
