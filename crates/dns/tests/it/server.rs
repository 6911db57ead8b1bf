//! The running server in a network namespace, asked by dig and by hand. Needs root and dig.

use std::io::{Read, Write};
use std::net::{IpAddr, SocketAddr, TcpStream, UdpSocket};
use std::process::Command;
use std::time::{Duration, Instant};

use portolan_dns::Config;
use portolan_linux::{Netlink, Netns};
use portolan_observe::Observer;
use portolan_plan::zone::{Options, PodMode};
use serde_json::{Value, json};
use tokio_util::sync::CancellationToken;

use crate::api::Api;
use crate::decode::{Decoded, decode, name_from_text, type_code};
use crate::upstream;

const SERVICE: &str = "10.99.0.10";
const SECOND: &str = "10.99.0.11";
const UPSTREAM: &str = "10.99.0.53";

/// A namespace that goes with the test.
struct Lab {
    netns: Netns,
    dir: tempfile::TempDir,
}

impl Drop for Lab {
    fn drop(&mut self) {
        let _ = Netns::delete(self.dir.path().join("net"));
    }
}

impl Lab {
    async fn new() -> Lab {
        let dir = tempfile::tempdir().unwrap();
        let netns = Netns::create(dir.path().join("net")).expect("needs root");
        let lab = Lab { netns, dir };
        let link = Netlink::open(&lab.netns).unwrap();
        link.set_up("lo").await.unwrap();
        for address in [SERVICE, SECOND, UPSTREAM] {
            link.add_address("lo", format!("{address}/32").parse().unwrap()).await.unwrap();
        }
        link.add_address("lo", "fd00:99::10/128".parse().unwrap()).await.unwrap();
        lab
    }

    /// Runs a program inside and returns its standard output.
    fn output(&self, program: &str, args: &[&str]) -> String {
        let run = || Command::new(program).args(args).output().unwrap_or_else(|e| panic!("{program}: {e}"));
        let output = self.netns.run(run).unwrap();
        String::from_utf8_lossy(&output.stdout).into_owned()
    }

    fn dig(&self, args: &[&str]) -> String {
        self.output("dig", &[&["+time=3", "+tries=1"], args].concat())
    }

    fn udp(&self, to: &str, message: &[u8]) -> Option<Vec<u8>> {
        let socket = self.netns.run(|| UdpSocket::bind("0.0.0.0:0").unwrap()).unwrap();
        socket.connect((to, 53)).unwrap();
        socket.set_read_timeout(Some(Duration::from_secs(7))).unwrap();
        socket.send(message).unwrap();
        let mut reply = vec![0; 65535];
        let n = socket.recv(&mut reply).ok()?;
        reply.truncate(n);
        Some(reply)
    }

    fn tcp(&self) -> TcpStream {
        let stream = self.netns.run(|| TcpStream::connect((SERVICE, 53)).unwrap()).unwrap();
        stream.set_read_timeout(Some(Duration::from_secs(7))).unwrap();
        stream
    }

    /// The upstream of the recordings at `UPSTREAM`, on a thread that lives as long as the process.
    fn start_upstream(&self) {
        let socket = self.netns.run(|| UdpSocket::bind((UPSTREAM, 53)).unwrap()).unwrap();
        std::thread::spawn(move || {
            let mut query = [0; 2048];
            while let Ok((n, from)) = socket.recv_from(&mut query) {
                if let Some(reply) = upstream::reply(&query[..n], true) {
                    let _ = socket.send_to(&reply, from);
                }
            }
        });
    }
}

fn query(id: u16, name: &str, rtype: &str) -> Vec<u8> {
    let mut m = id.to_be_bytes().to_vec();
    m.extend([1, 0, 0, 1, 0, 0, 0, 0, 0, 0]);
    m.extend(name_from_text(name));
    m.extend(type_code(rtype).to_be_bytes());
    m.extend([0, 1]);
    m
}

fn frame(message: &[u8]) -> Vec<u8> {
    [&(message.len() as u16).to_be_bytes(), message].concat()
}

fn read_frame(stream: &mut TcpStream) -> (u16, Decoded) {
    let mut length = [0; 2];
    stream.read_exact(&mut length).unwrap();
    let mut message = vec![0; usize::from(u16::from_be_bytes(length))];
    stream.read_exact(&mut message).unwrap();
    (u16::from_be_bytes([message[0], message[1]]), decode(&message))
}

/// Repeats `check` until it returns true; prints the last state seen when five seconds were not enough.
fn eventually(what: &str, mut check: impl FnMut() -> Result<(), String>) {
    let deadline = Instant::now() + Duration::from_secs(5);
    loop {
        match check() {
            Ok(()) => return,
            Err(last) if Instant::now() > deadline => panic!("{what}: {last}"),
            Err(_) => std::thread::sleep(Duration::from_millis(5)),
        }
    }
}

fn cluster() -> Api {
    let api = Api::new();
    for name in ["shop", "kube-system"] {
        api.apply(json!({"kind": "Namespace", "metadata": {"name": name}}));
    }
    api.apply(service(
        "web",
        json!({"clusterIP": "10.96.20.11", "clusterIPs": ["10.96.20.11"],
        "ports": [{"name": "http", "port": 80}]}),
    ));
    api.apply(service("out", json!({"type": "ExternalName", "externalName": "db.corp.example"})));
    api.apply(service("wide", json!({"clusterIP": "None", "ports": [{"port": 1}]})));
    api.apply(slice("wide-1", "wide", (1..=200).map(|i| format!("10.245.0.{i}")).collect()));
    api
}

fn service(name: &str, spec: Value) -> Value {
    json!({"kind": "Service", "metadata": {"namespace": "shop", "name": name}, "spec": spec})
}

fn slice(name: &str, service: &str, addresses: Vec<String>) -> Value {
    let endpoints: Vec<Value> = addresses.iter().map(|a| json!({"addresses": [a]})).collect();
    json!({"kind": "EndpointSlice", "metadata": {"namespace": "shop", "name": name,
        "labels": {"kubernetes.io/service-name": service}}, "addressType": "IPv4", "endpoints": endpoints,
        "ports": [{"name": "", "port": 1}]})
}

struct Running {
    shutdown: CancellationToken,
    task: tokio::task::JoinHandle<Result<(), portolan_dns::Error>>,
    observer: Observer,
}

impl Running {
    async fn start(lab: &Lab, api: &Api, change: impl FnOnce(&mut Config)) -> Running {
        let any = |port| SocketAddr::from(([0, 0, 0, 0], port));
        let mut config = Config {
            listen: vec![any(53), "[::]:53".parse().unwrap()],
            netns: Some(lab.netns.clone()),
            options: Options { pods: PodMode::Insecure, ..Options::default() },
            health: Some(any(8080)),
            ready: Some(any(8181)),
            metrics: Some(any(9153)),
            workers: 2,
            ..Config::default()
        };
        change(&mut config);
        let (observer, shutdown) = (Observer::new(), CancellationToken::new());
        // Registered by the server only once it runs; without a gate the observer would count as ready at once.
        let gate = observer.gate("dns");
        let task = tokio::spawn(portolan_dns::run(config, api.client(), observer.clone(), shutdown.clone()));
        tokio::time::timeout(Duration::from_secs(5), observer.wait_ready()).await.expect("ready");
        drop(gate);
        Running { shutdown, task, observer }
    }

    async fn stop(self) {
        self.shutdown.cancel();
        tokio::time::timeout(Duration::from_secs(8), self.task).await.expect("stops").unwrap().unwrap();
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn dig_gets_answers_over_udp_and_tcp() {
    let lab = Lab::new().await;
    let api = cluster();
    let server = Running::start(&lab, &api, |_| {}).await;
    tokio::task::block_in_place(|| {
        let at = format!("@{SERVICE}");
        assert_eq!(lab.dig(&[&at, "web.shop.svc.cluster.local", "+short"]), "10.96.20.11\n");
        assert_eq!(lab.dig(&[&at, "web.shop.svc.cluster.local", "+short", "+tcp"]), "10.96.20.11\n");
        // dig complains when an answer comes from another address than it asked.
        for address in [SECOND, "fd00:99::10", "127.0.0.1"] {
            let text = lab.dig(&[&format!("@{address}"), "web.shop.svc.cluster.local"]);
            assert!(text.contains("status: NOERROR") && !text.contains("unexpected source"), "{address}: {text}");
        }
        assert_eq!(lab.dig(&[&at, "-x", "10.96.20.11", "+short"]), "web.shop.svc.cluster.local.\n");
        assert_eq!(
            lab.dig(&[&at, "_http._tcp.web.shop.svc.cluster.local", "SRV", "+short"]),
            "0 100 80 web.shop.svc.cluster.local.\n"
        );
        // Too long for a datagram: dig follows TC to TCP by itself.
        assert_eq!(lab.dig(&[&at, "wide.shop.svc.cluster.local", "+short"]).lines().count(), 200);
        let cut = lab.dig(&[&at, "wide.shop.svc.cluster.local", "+ignore"]);
        assert!(cut.contains("flags: qr aa tc rd"), "{cut}");
        // Nothing leaves the machine: other names are refused at once.
        let started = Instant::now();
        let refused = lab.dig(&[&at, "www.example.org"]);
        assert!(refused.contains("status: REFUSED"), "{refused}");
        assert!(started.elapsed() < Duration::from_secs(1));
        let alias = lab.dig(&[&at, "out.shop.svc.cluster.local", "+short"]);
        assert_eq!(alias, "db.corp.example.\n");
        let get = |port: u16, path: &str| lab.output("curl", &["-s", "-i", &format!("http://{SERVICE}:{port}{path}")]);
        assert!(get(8080, "/health").starts_with("HTTP/1.1 200 OK"));
        assert!(get(8181, "/ready").ends_with("OK"));
        let metrics = get(9153, "/metrics");
        let line = "coredns_dns_responses_total{server=\"dns://:53\",zone=\"cluster.local.\",view=\"\",rcode=\"NOERROR\",plugin=\"kubernetes\"}";
        assert!(metrics.contains(line), "{metrics}");
        assert!(metrics.contains("type=\"SRV\""), "{metrics}");
    });
    server.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn answers_follow_the_objects() {
    let lab = Lab::new().await;
    let api = cluster();
    let server = Running::start(&lab, &api, |_| {}).await;
    let ask = |name: &str| {
        let got = decode(&lab.udp(SERVICE, &query(1, name, "A")).expect("a reply"));
        (got.rcode, got.sections[0].iter().map(|l| l.rsplit(' ').next().unwrap().to_string()).collect::<Vec<_>>())
    };
    let expect = |name: &str, rcode: &str, addresses: &[&str]| {
        eventually(name, || {
            let got = ask(name);
            let same = got.0 == rcode && got.1 == addresses;
            if same { Ok(()) } else { Err(format!("{got:?}")) }
        });
    };
    tokio::task::block_in_place(|| {
        expect("new.shop.svc.cluster.local.", "NXDOMAIN", &[]);
        let new = service("new", json!({"clusterIP": "None"}));
        api.apply(new.clone());
        api.apply(slice("new-1", "new", vec!["10.0.0.1".into()]));
        expect("new.shop.svc.cluster.local.", "NOERROR", &["10.0.0.1"]);
        api.apply(slice("new-1", "new", vec!["10.0.0.2".into()]));
        expect("new.shop.svc.cluster.local.", "NOERROR", &["10.0.0.2"]);
        api.apply(service("new", json!({"clusterIPs": ["10.96.0.77"], "clusterIP": "10.96.0.77"})));
        expect("new.shop.svc.cluster.local.", "NOERROR", &["10.96.0.77"]);
        api.delete(&new);
        expect("new.shop.svc.cluster.local.", "NXDOMAIN", &[]);
    });
    server.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn other_names_go_to_the_upstream() {
    let lab = Lab::new().await;
    lab.start_upstream();
    let api = cluster();
    let upstream: SocketAddr = format!("{UPSTREAM}:53").parse().unwrap();
    let server = Running::start(&lab, &api, |c| {
        c.listen = [SERVICE, SECOND].iter().map(|a| SocketAddr::new(a.parse::<IpAddr>().unwrap(), 53)).collect();
        c.upstreams = vec![upstream];
        c.max_concurrent = 1;
    })
    .await;
    tokio::task::block_in_place(|| {
        let ask = |name: &str, rtype: &str| decode(&lab.udp(SERVICE, &query(7, name, rtype)).expect("a reply"));
        assert_eq!(ask("www.example.org.", "A").sections[0], ["www.example.org. 300 IN A 192.0.2.80"]);
        assert_eq!(
            ask("out.shop.svc.cluster.local.", "A").sections[0],
            ["out.shop.svc.cluster.local. 5 IN CNAME db.corp.example.", "db.corp.example. 120 IN A 192.0.2.53"]
        );
        assert_eq!(ask("9.1.244.10.in-addr.arpa.", "PTR").sections[0].len(), 1);
        assert_eq!(ask("nosuch.shop.svc.cluster.local.", "A").flags, ["QR", "AA", "RD"], "cluster names stay here");
        // One query waits for an upstream that never answers it; meanwhile the next is refused at once, and cluster names
        // are answered as ever.
        std::thread::scope(|scope| {
            let waiting = scope.spawn(|| {
                loop {
                    let started = Instant::now();
                    let rcode = ask("dead.example.", "A").rcode;
                    // The other query may have been first by chance; then this one is the one refused.
                    if rcode != "REFUSED" {
                        return (rcode, started.elapsed());
                    }
                }
            });
            eventually("the limit", || {
                let rcode = ask("www.example.org.", "A").rcode;
                if rcode == "REFUSED" { Ok(()) } else { Err(rcode) }
            });
            assert_eq!(ask("web.shop.svc.cluster.local.", "A").rcode, "NOERROR");
            let (rcode, took) = waiting.join().unwrap();
            assert_eq!(rcode, "SERVFAIL");
            assert!(took < Duration::from_secs(6), "{took:?}");
        });
        assert!(server.observer.encode().contains("coredns_forward_max_concurrent_rejects_total"));
    });
    server.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn streams_are_pipelined_and_survive_nonsense() {
    let lab = Lab::new().await;
    let api = cluster();
    let server = Running::start(&lab, &api, |_| {}).await;
    tokio::task::block_in_place(|| {
        let mut stream = lab.tcp();
        let all: Vec<u8> = (0..150).flat_map(|i| frame(&query(i, "web.shop.svc.cluster.local.", "A"))).collect();
        // In odd pieces, so that frames straddle reads.
        for piece in all.chunks(37) {
            stream.write_all(piece).unwrap();
        }
        let mut ids: Vec<u16> = (0..150).map(|_| read_frame(&mut stream).0).collect();
        ids.sort_unstable();
        assert_eq!(ids, (0..150).collect::<Vec<_>>());
        // A message that is no query gets its error; the connection goes on.
        stream.write_all(&frame(&[&query(9, "a.", "A")[..14], &[0xFF; 9]].concat())).unwrap();
        assert_eq!(read_frame(&mut stream).1.rcode, "FORMERR");
        stream.write_all(&frame(&query(3, "wide.shop.svc.cluster.local.", "A"))).unwrap();
        assert_eq!(read_frame(&mut stream).1.sections[0].len(), 200);
        // Noise of every length, over UDP: no reply or some reply, and the server lives.
        let mut state = 1u64;
        let noise = lab.netns.run(|| UdpSocket::bind("0.0.0.0:0").unwrap()).unwrap();
        for length in 0..600 {
            let mut message = query(1, "web.shop.svc.cluster.local.", "A");
            message.resize(length, 0);
            for byte in message.iter_mut() {
                state = state.wrapping_mul(6364136223846793005).wrapping_add(1);
                if state >> 60 == 0 {
                    *byte = (state >> 32) as u8;
                }
            }
            let _ = noise.send_to(&message, (SERVICE, 53));
        }
        assert_eq!(decode(&lab.udp(SERVICE, &query(1, "web.shop.svc.cluster.local.", "A")).unwrap()).rcode, "NOERROR");
    });
    server.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn published_names_are_answered() {
    let lab = Lab::new().await;
    let api = Api::new();
    api.apply(json!({"kind": "Ingress", "metadata": {"namespace": "shop", "name": "web"},
        "spec": {"rules": [{"host": "api.example.com"}, {"host": "*.apps.example.com"}]},
        "status": {"loadBalancer": {"ingress": [{"ip": "192.0.2.1"}]}}}));
    let server = Running::start(&lab, &api, |c| c.published = true).await;
    tokio::task::block_in_place(|| {
        let ask = |name: &str, rtype: &str| decode(&lab.udp(SERVICE, &query(7, name, rtype)).expect("a reply"));
        assert_eq!(ask("API.example.com.", "A").sections[0], ["API.example.com. 5 IN A 192.0.2.1"]);
        assert_eq!(ask("a.apps.example.com.", "A").sections[0].len(), 1);
        let nodata = ask("api.example.com.", "AAAA");
        assert_eq!((nodata.rcode.as_str(), nodata.sections[1].len()), ("NOERROR", 1));
        assert_eq!(ask("other.example.com.", "A").rcode, "REFUSED");
        api.apply(json!({"kind": "Service", "metadata": {"namespace": "shop", "name": "db",
            "annotations": {"external-dns.alpha.kubernetes.io/hostname": "db.example.com"}},
            "spec": {"type": "LoadBalancer"}, "status": {"loadBalancer": {"ingress": [{"ip": "192.0.2.2"}]}}}));
        eventually("an annotated Service", || {
            let got = ask("db.example.com.", "A");
            if got.sections[0] == ["db.example.com. 5 IN A 192.0.2.2"] { Ok(()) } else { Err(format!("{got:?}")) }
        });
    });
    server.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_lame_duck_answers_and_is_not_ready() {
    let lab = Lab::new().await;
    let api = cluster();
    let server = Running::start(&lab, &api, |c| c.lame_duck = Duration::from_secs(1)).await;
    server.shutdown.cancel();
    tokio::task::block_in_place(|| {
        let get = |port: u16, path: &str| lab.output("curl", &["-s", "-i", &format!("http://{SERVICE}:{port}{path}")]);
        eventually("not ready", || {
            let ready = get(8181, "/ready");
            if ready.ends_with("Shutting down") { Ok(()) } else { Err(ready) }
        });
        assert!(get(8080, "/health").ends_with("OK"));
        assert_eq!(decode(&lab.udp(SERVICE, &query(1, "web.shop.svc.cluster.local.", "A")).unwrap()).rcode, "NOERROR");
    });
    server.stop().await;
}

#[tokio::test]
async fn an_upstream_that_leads_back_is_refused() {
    let listen: Vec<SocketAddr> = vec!["127.0.0.1:0".parse().unwrap()];
    for upstream in ["127.0.0.53:53", "0.0.0.0:53"] {
        let config = Config { listen: listen.clone(), upstreams: vec![upstream.parse().unwrap()], ..Config::default() };
        let result = portolan_dns::run(config, cluster().client(), Observer::new(), CancellationToken::new()).await;
        assert!(matches!(result, Err(portolan_dns::Error::Loop(_))), "{upstream}: {result:?}");
    }
}
