//! The service proxy of one node at 1 000, 10 000 and 50 000 Services with 10 endpoints each; prints Markdown tables.
//!
//! First an agent process as it is released, with an API server in this process: from its start to the first full sync, from
//! the write of an EndpointSlice to the kernel's announcement that the rules have changed, memory, and processor time.
//! Then the proxy as an object in this process, from a decoded object to committed rules, next to a peer: kube-proxy's nftables
//! layout (a chain per Service and per endpoint behind a verdict map) with the same Services, loaded with `nft` into a second
//! namespace of the same run, through which as many connections are made.
//!
//! Usage: `cargo bench -p portolan-dataplane --bench scale -- [SERVICES...]`. Needs root, `ip` and `nft`.
#![allow(clippy::unwrap_used)]

use std::fmt::Write as _;
use std::io::{Read as _, Write as _};
use std::net::{Ipv4Addr, SocketAddr, TcpListener, TcpStream};
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use k8s_openapi::api::core::v1::{Namespace, Service};
use k8s_openapi::api::discovery::v1::EndpointSlice;
use kube::api::PostParams;
use portolan_apiserver::{Server, ServerConfig, User};
use portolan_dataplane::{AgentConfig, Change, ServiceProxy};
use portolan_linux::{Netns, set_sysctl};
use portolan_observe::Observer;
use portolan_plan::world::{LocalDetection, NodeView};
use serde_json::json;
use tokio_util::sync::CancellationToken;

/// As in the released binary.
#[global_allocator]
static ALLOCATOR: mimalloc::MiMalloc = mimalloc::MiMalloc;

const SIZES: [u32; 3] = [1_000, 10_000, 50_000];
const ENDPOINTS: u32 = 10;
const SWAPS: u32 = 1_000;
/// Connections of one turn; turns of both sides alternate.
const CONNECTS: u32 = 600;
const TURNS: usize = 5;
/// Loading the peer's layout takes minutes beyond this.
const PEER_LIMIT: u32 = 10_000;

fn cluster_ip(i: u32) -> Ipv4Addr {
    Ipv4Addr::from(0x0a60_0100 + i)
}

fn endpoint(i: u32, k: u32) -> Ipv4Addr {
    Ipv4Addr::from(0x0a80_0000 + i * 16 + k)
}

fn service(i: u32) -> Vec<u8> {
    let object = json!({
        "metadata": {"namespace": format!("ns-{}", i % 100), "name": format!("service-{i}"), "uid": format!("00000000-0000-0000-0000-{i:012}"),
            "creationTimestamp": "2026-01-01T00:00:00Z", "resourceVersion": "1234567", "labels": {"app": format!("app-{i}")}},
        "spec": {"type": "ClusterIP", "clusterIP": cluster_ip(i), "clusterIPs": [cluster_ip(i)], "ipFamilies": ["IPv4"],
            "selector": {"app": format!("app-{i}")},
            "ports": [{"name": "http", "port": 80, "targetPort": 8080, "protocol": "TCP"}]},
        "status": {"loadBalancer": {}},
    });
    serde_json::to_vec(&object).unwrap()
}

/// `first` takes the place of the first endpoint.
fn slice(i: u32, first: u32) -> Vec<u8> {
    slice_of(i, &(0..ENDPOINTS).map(|k| if k == 0 { first } else { k }).collect::<Vec<_>>())
}

fn slice_of(i: u32, lasts: &[u32]) -> Vec<u8> {
    let endpoints: Vec<_> = lasts
        .iter()
        .map(|k| {
            json!({
                "addresses": [endpoint(i, *k)],
                "conditions": {"ready": true, "serving": true, "terminating": false},
                "nodeName": format!("node-{}", k % 5), "zone": "a",
                "targetRef": {"kind": "Pod", "namespace": format!("ns-{}", i % 100), "name": format!("app-{i}-{k}"), "uid": format!("00000000-0000-0001-0000-{i:012}")},
            })
        })
        .collect();
    let object = json!({
        "metadata": {"namespace": format!("ns-{}", i % 100), "name": format!("service-{i}-abcde"), "uid": format!("00000000-0000-0002-0000-{i:012}"),
            "resourceVersion": "1234567", "labels": {"kubernetes.io/service-name": format!("service-{i}"), "app": format!("app-{i}"),
            "endpointslice.kubernetes.io/managed-by": "endpointslice-controller.k8s.io"}},
        "addressType": "IPv4", "ports": [{"name": "http", "port": 8080, "protocol": "TCP"}], "endpoints": endpoints,
    });
    serde_json::to_vec(&object).unwrap()
}

/// A client, a node and a server that has every endpoint's address.
struct Lab {
    client: Netns,
    node: Netns,
}

fn namespace() -> Netns {
    let open = || {
        nix::sched::unshare(nix::sched::CloneFlags::CLONE_NEWNET).expect("needs root");
        Netns::open("/proc/thread-self/ns/net").unwrap()
    };
    std::thread::spawn(open).join().unwrap()
}

fn run(space: &Netns, program: &str, args: &[&str], input: &str) {
    let output = space
        .run(|| {
            let mut child = Command::new(program)
                .args(args)
                .stdin(Stdio::piped())
                .stdout(Stdio::null())
                .stderr(Stdio::piped())
                .spawn()
                .unwrap();
            child.stdin.take().unwrap().write_all(input.as_bytes()).unwrap();
            child.wait_with_output().unwrap()
        })
        .unwrap();
    assert!(output.status.success(), "{program}: {}", String::from_utf8_lossy(&output.stderr));
}

fn lab() -> Lab {
    use std::os::fd::AsRawFd as _;
    let (client, node, server) = (namespace(), namespace(), namespace());
    let fd = |space: &Netns| format!("/proc/{}/fd/{}", std::process::id(), space.as_raw_fd());
    set_sysctl(&node, "net/ipv4/ip_forward", "1").unwrap();
    run(
        &node,
        "ip",
        &["-batch", "-"],
        &format!(
            "link set lo up\nlink add vp0 type veth peer name eth0 netns {}\nlink add eth1 type veth peer name eth0 netns {}\n\
             addr add 10.1.0.1/24 dev vp0\naddr add 10.2.0.1/24 dev eth1\nlink set vp0 up\nlink set eth1 up\n",
            fd(&client),
            fd(&server)
        ),
    );
    run(
        &client,
        "ip",
        &["-batch", "-"],
        "link set lo up\naddr add 10.1.0.2/24 dev eth0\nlink set eth0 up\nroute add default via 10.1.0.1\n",
    );
    run(
        &server,
        "ip",
        &["-batch", "-"],
        "link set lo up\naddr add 10.2.0.2/24 dev eth0\nlink set eth0 up\nroute add default via 10.2.0.1\nroute add local 10.128.0.0/9 dev lo\n",
    );
    run(&node, "ip", &["-batch", "-"], "route add 10.128.0.0/9 via 10.2.0.2\n");
    let listener = server.run(|| TcpListener::bind("0.0.0.0:8080").unwrap()).unwrap();
    std::thread::spawn(move || {
        for stream in listener.incoming() {
            let mut stream = stream.unwrap();
            let mut byte = [0];
            if stream.read_exact(&mut byte).is_ok() {
                let _ = stream.write_all(&byte);
            }
        }
    });
    Lab { client, node }
}

/// Median microseconds for a connection with a byte each way, ended by a reset.
fn connect(lab: &Lab, to: impl Fn(u32) -> SocketAddr + Send + Sync) -> f64 {
    let times = lab.client.run(|| {
        (0..CONNECTS)
            .map(|i| {
                let start = Instant::now();
                let mut stream = TcpStream::connect(to(i)).unwrap();
                stream.write_all(b"x").unwrap();
                stream.read_exact(&mut [0]).unwrap();
                socket2::SockRef::from(&stream).set_linger(Some(Duration::ZERO)).unwrap();
                drop(stream);
                start.elapsed().as_secs_f64() * 1e6
            })
            .collect::<Vec<f64>>()
    });
    median(times.unwrap())
}

fn median(mut values: Vec<f64>) -> f64 {
    values.sort_by(f64::total_cmp);
    values[values.len() / 2]
}

fn resident_mb(process: u32, field: &str) -> f64 {
    let status = std::fs::read_to_string(format!("/proc/{process}/status")).unwrap();
    let line = status.lines().find(|l| l.starts_with(field)).unwrap();
    line.split_whitespace().nth(1).unwrap().parse::<f64>().unwrap() / 1024.0
}

/// Processor time of this thread, the kernel's work on its behalf included.
fn thread_cpu() -> Duration {
    let stat = std::fs::read_to_string("/proc/thread-self/schedstat").unwrap();
    Duration::from_nanos(stat.split_whitespace().next().unwrap().parse().unwrap())
}

/// The peer's ruleset: the shape of kube-proxy 1.36's nftables mode for cluster IPs.
fn peer_rules(services: u32) -> String {
    let mut text = "table ip peer {
  map service-ips { type ipv4_addr . inet_proto . inet_service : verdict; }
  map no-endpoint-services { type ipv4_addr . inet_proto . inet_service : verdict; }
  set cluster-ips { type ipv4_addr; }
  chain mark-for-masquerade { meta mark set meta mark or 0x4000; }
  chain cluster-ips-check { ip daddr @cluster-ips reject; }
  chain service-endpoints-check { ip daddr . meta l4proto . th dport vmap @no-endpoint-services; }
  chain services { ip daddr . meta l4proto . th dport vmap @service-ips; }
  chain filter-input { type filter hook input priority -110; ct state new jump service-endpoints-check; }
  chain filter-forward { type filter hook forward priority -110; ct state new jump service-endpoints-check; ct state new jump cluster-ips-check; }
  chain filter-output { type filter hook output priority -90; ct state new jump service-endpoints-check; ct state new jump cluster-ips-check; }
  chain nat-prerouting { type nat hook prerouting priority dstnat; jump services; }
  chain nat-output { type nat hook output priority -100; jump services; }
  chain nat-postrouting { type nat hook postrouting priority srcnat; meta mark and 0x4000 != 0 meta mark set meta mark xor 0x4000 masquerade fully-random; }
}
"
    .to_owned();
    for i in 0..services {
        for k in 0..ENDPOINTS {
            peer_endpoint(&mut text, i, k);
        }
        let _ = writeln!(text, "add chain ip peer service-{i}");
        let _ = writeln!(
            text,
            "add rule ip peer service-{i} ip daddr {} tcp dport 80 ip saddr != 10.1.0.0/16 jump mark-for-masquerade",
            cluster_ip(i)
        );
        peer_choice(&mut text, i, 0);
        let _ = writeln!(text, "add element ip peer cluster-ips {{ {} }}", cluster_ip(i));
        let _ = writeln!(text, "add element ip peer service-ips {{ {} . tcp . 80 : goto service-{i} }}", cluster_ip(i));
    }
    text
}

fn peer_endpoint(text: &mut String, i: u32, k: u32) {
    let ip = endpoint(i, k);
    let _ = writeln!(text, "add chain ip peer endpoint-{i}-{k}");
    let _ = writeln!(text, "add rule ip peer endpoint-{i}-{k} ip saddr {ip} jump mark-for-masquerade");
    let _ = writeln!(text, "add rule ip peer endpoint-{i}-{k} meta l4proto tcp dnat to {ip}:8080");
}

fn peer_choice(text: &mut String, i: u32, first: u32) {
    let arms: Vec<String> =
        (0..ENDPOINTS).map(|k| format!("{k} : goto endpoint-{i}-{}", if k == 0 { first } else { k })).collect();
    let _ = writeln!(text, "add rule ip peer service-{i} numgen random mod {ENDPOINTS} vmap {{ {} }}", arms.join(", "));
}

fn measure(services: u32) {
    let ours = lab();
    let view = NodeView {
        name: "node-0".into(),
        node_port_addresses: vec!["10.2.0.1".parse().unwrap()],
        local_detection: LocalDetection::InterfacePrefix("vp".into()),
        ..NodeView::default()
    };
    let mut proxy = ServiceProxy::new(&ours.node, view).unwrap();
    proxy.change(Change::ServiceCidr("kubernetes".into(), vec!["10.96.0.0/12".parse().unwrap()]));
    let mut decode = Duration::ZERO;
    for i in 0..services {
        let (a, b) = (service(i), slice(i, 0));
        let start = Instant::now();
        proxy.change(Change::service(&serde_json::from_slice(&a).unwrap()));
        proxy.change(Change::slice(&serde_json::from_slice(&b).unwrap()));
        decode += start.elapsed();
    }
    let start = Instant::now();
    assert!(proxy.sync().is_ok());
    let first = start.elapsed();

    let cpu = thread_cpu();
    let mut swaps: Vec<f64> = (0..SWAPS)
        .map(|n| {
            let i = n.wrapping_mul(7919) % services;
            let bytes = slice(i, 11 + n % 2);
            let start = Instant::now();
            proxy.change(Change::slice(&serde_json::from_slice(&bytes).unwrap()));
            assert!(proxy.sync().is_ok());
            start.elapsed().as_secs_f64() * 1e3
        })
        .collect();
    let cpu = (thread_cpu() - cpu).as_secs_f64() * 1e6 / f64::from(SWAPS);
    swaps.sort_by(f64::total_cmp);
    let at = |q: f64| swaps[((swaps.len() as f64 * q) as usize).min(swaps.len() - 1)];
    // One endpoint more, then one less: the frontend leads to another chain.
    let mut scalings: Vec<f64> = (0..SWAPS / 4)
        .flat_map(|n| {
            let i = n.wrapping_mul(7919) % services;
            let (more, same) = (slice_of(i, &(1..=11).collect::<Vec<_>>()), slice(i, 0));
            [more, same].map(|bytes| {
                let start = Instant::now();
                proxy.change(Change::slice(&serde_json::from_slice(&bytes).unwrap()));
                assert!(proxy.sync().is_ok());
                start.elapsed().as_secs_f64() * 1e3
            })
        })
        .collect();
    scalings.sort_by(f64::total_cmp);
    let scaling = |q: f64| scalings[((scalings.len() as f64 * q) as usize).min(scalings.len() - 1)];

    let start = Instant::now();
    proxy.distrust_kernel();
    assert!(proxy.sync().is_ok());
    let again = start.elapsed();

    let mut peer_load = None;
    let mut peer_swap = None;
    let peer = (services <= PEER_LIMIT).then(|| {
        let peer = lab();
        let rules = peer_rules(services);
        let start = Instant::now();
        run(&peer.node, "nft", &["-f", "-"], &rules);
        peer_load = Some(start.elapsed());
        let times = (0..5).map(|i| {
            let mut text = String::new();
            peer_endpoint(&mut text, i, 11);
            let _ = writeln!(text, "flush chain ip peer service-{i}");
            peer_choice(&mut text, i, 11);
            let start = Instant::now();
            run(&peer.node, "nft", &["-f", "-"], &text);
            start.elapsed().as_secs_f64() * 1e3
        });
        peer_swap = Some(median(times.collect()));
        peer
    });

    let to = |i: u32| SocketAddr::from((cluster_ip(i.wrapping_mul(7919) % services), 80));
    let direct = |i: u32| SocketAddr::from((endpoint(i.wrapping_mul(7919) % services, 1), 8080));
    let mut turns: [Vec<f64>; 3] = Default::default();
    for _ in 0..TURNS {
        turns[0].push(connect(&ours, direct));
        turns[1].push(connect(&ours, to));
        if let Some(peer) = &peer {
            turns[2].push(connect(peer, to));
        }
    }
    let [direct, ours, peer] = turns.map(|t| if t.is_empty() { None } else { Some(median(t)) });
    let shown = |value: Option<f64>, digits: usize| value.map_or("–".to_owned(), |v| format!("{v:.digits$}"));
    println!(
        "| {services} | {:.0} + {:.0} | {:.0} | {} | {:.2} / {:.2} / {:.2} | {:.2} / {:.2} | {} | {cpu:.0} | {} | {} | {} | {} |",
        decode.as_secs_f64() * 1e3,
        first.as_secs_f64() * 1e3,
        again.as_secs_f64() * 1e3,
        shown(peer_load.map(|t| t.as_secs_f64() * 1e3), 0),
        at(0.5),
        at(0.99),
        at(1.0),
        scaling(0.5),
        scaling(0.99),
        shown(peer_swap, 0),
        shown(direct, 1),
        shown(ours, 1),
        shown(peer, 1),
        shown(ours.zip(peer).map(|(a, b)| a / b), 2),
    );
}

/// Swaps of one endpoint through the API that are timed, and how long the stream of changes lasts.
const API_SWAPS: u32 = 500;
const STREAM: Duration = Duration::from_secs(10);
const CHANGES_A_SECOND: u32 = 1_000;
/// Nothing here takes longer on any machine that is worth measuring.
const PATIENCE: Duration = Duration::from_secs(300);

/// The agent process: says when it is ready and lives until it is killed.
fn agent(kubeconfig: &str, netns: &str) {
    let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build().unwrap();
    runtime.block_on(async {
        let client = portolan_client::connect(Some(kubeconfig.as_ref())).await.unwrap();
        let mut config = AgentConfig::new("node-0", Netns::open(netns).unwrap(), "vp");
        config.healthz_address = None;
        config.metrics_address = None;
        let observer = Observer::new();
        let running = portolan_dataplane::run(config, client, observer.clone(), CancellationToken::new());
        let ready = async {
            observer.wait_ready().await;
            println!("ready");
            std::future::pending::<()>().await
        };
        tokio::select! { ended = running => ended.unwrap(), () = ready => {} }
    });
}

struct AgentProcess(std::process::Child, std::path::PathBuf);

impl Drop for AgentProcess {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
        let _ = std::fs::remove_file(&self.1);
    }
}

impl AgentProcess {
    fn memory_mb(&self, field: &str) -> f64 {
        resident_mb(self.0.id(), field)
    }

    /// Processor time, the kernel's work on its behalf included.
    fn cpu(&self) -> Duration {
        let stat = std::fs::read_to_string(format!("/proc/{}/stat", self.0.id())).unwrap();
        let fields: Vec<&str> = stat.rsplit_once(") ").unwrap().1.split_whitespace().collect();
        let ticks: u64 = fields[11].parse::<u64>().unwrap() + fields[12].parse::<u64>().unwrap();
        Duration::from_millis(ticks * 10) // 100 ticks a second, on every Linux that Rust runs on
    }
}

/// The announcements of nf_tables in a namespace.
struct Announcements(portolan_nft::netlink::socket::Socket);

impl Announcements {
    fn open(space: &Netns) -> Announcements {
        let socket =
            space.run(|| portolan_nft::netlink::socket::Socket::open(libc::NETLINK_NETFILTER).unwrap()).unwrap();
        socket.join(7).unwrap(); // NFNLGRP_NFTABLES
        Announcements(socket)
    }

    /// Waits until something is announced that has these bytes in it.
    fn wait_for(&self, bytes: &[u8]) {
        let deadline = Instant::now() + PATIENCE;
        while Instant::now() < deadline {
            match self.0.receive() {
                Ok(datagram) if datagram.windows(bytes.len()).any(|w| w == bytes) => return,
                _ => {}
            }
        }
        panic!("not announced");
    }
}

fn measure_agent(services: u32) {
    use std::os::fd::AsRawFd as _;
    let node = namespace();
    run(&node, "ip", &["-batch", "-"], "link set lo up\n");
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let url = format!("https://{}", listener.local_addr().unwrap());
    let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build().unwrap();
    let (server, client) = runtime.block_on(async {
        let mut config = ServerConfig::new("203.0.113.10:6443".parse().unwrap());
        config.listeners = vec![listener];
        let server = Server::start(config).await.unwrap();
        let client = kube::Client::new(server.local_service(User::new("bench", &["system:masters"])), "default");
        let namespaces = kube::Api::<Namespace>::all(client.clone());
        for k in 0..services.min(100) {
            let object = json!({"metadata": {"name": format!("ns-{k}")}});
            namespaces.create(&PostParams::default(), &serde_json::from_value(object).unwrap()).await.unwrap();
        }
        for i in 0..services {
            let ns = format!("ns-{}", i % 100);
            let mut service: Service = serde_json::from_slice(&service(i)).unwrap();
            let mut slice: EndpointSlice = serde_json::from_slice(&slice(i, 0)).unwrap();
            for meta in [&mut service.metadata, &mut slice.metadata] {
                (meta.uid, meta.resource_version, meta.creation_timestamp) = (None, None, None);
            }
            let post = PostParams::default();
            kube::Api::<Service>::namespaced(client.clone(), &ns).create(&post, &service).await.unwrap();
            kube::Api::<EndpointSlice>::namespaced(client.clone(), &ns).create(&post, &slice).await.unwrap();
        }
        (server, client)
    });
    let path = std::env::temp_dir().join(format!("portolan-bench-{}.yaml", std::process::id()));
    std::fs::write(&path, server.kubeconfig(&url).unwrap()).unwrap();

    let start = Instant::now();
    let mut child = Command::new(std::env::current_exe().unwrap())
        .args(["agent", path.to_str().unwrap(), &format!("/proc/{}/fd/{}", std::process::id(), node.as_raw_fd())])
        .stdout(Stdio::piped())
        .spawn()
        .unwrap();
    let output = child.stdout.take().unwrap();
    let process = AgentProcess(child, path);
    let mut line = String::new();
    std::io::BufRead::read_line(&mut std::io::BufReader::new(output), &mut line).unwrap();
    assert_eq!(line.trim(), "ready");
    let (first, first_cpu) = (start.elapsed(), process.cpu());
    let after_first = process.memory_mb("VmRSS");

    let swap = |n: u32, last: u32| {
        let i = n.wrapping_mul(7919) % services;
        let slices = kube::Api::<EndpointSlice>::namespaced(client.clone(), &format!("ns-{}", i % 100));
        let mut object: EndpointSlice = serde_json::from_slice(&slice(i, last)).unwrap();
        let meta = &mut object.metadata;
        (meta.uid, meta.resource_version, meta.creation_timestamp) = (None, None, None);
        async move {
            slices.replace(&format!("service-{i}-abcde"), &PostParams::default(), &object).await.unwrap();
            endpoint(i, last)
        }
    };
    let announcements = Announcements::open(&node);
    let mut swaps: Vec<f64> = (0..API_SWAPS)
        .map(|n| {
            let start = Instant::now();
            let new = runtime.block_on(swap(n, 11 + n % 2));
            announcements.wait_for(&new.octets());
            start.elapsed().as_secs_f64() * 1e3
        })
        .collect();
    swaps.sort_by(f64::total_cmp);
    let at = |q: f64| swaps[((swaps.len() as f64 * q) as usize).min(swaps.len() - 1)];
    drop(announcements);

    // A stream of changes at a steady rate, all over the cluster.
    let (before, start) = (process.cpu(), Instant::now());
    let total = CHANGES_A_SECOND * STREAM.as_secs() as u32;
    runtime.block_on(async {
        let mut ticks = tokio::time::interval(Duration::from_millis(10));
        for tick in 0..total / 10 {
            ticks.tick().await;
            // Another address each time that a Service has its turn again.
            let changes = (0..10).map(|k| tick * 10 + k).map(|n| swap(n, 13 + n / services % 2));
            futures::future::join_all(changes).await;
        }
    });
    let took = start.elapsed();
    let cpu = (process.cpu() - before).as_secs_f64() / f64::from(total) * 1e6;
    println!(
        "| {services} | {:.2} ({:.2}) | {:.2} / {:.2} / {:.2} | {after_first:.0} | {:.0} | {:.0} | {:.0} at {:.0}/s |",
        first.as_secs_f64(),
        first_cpu.as_secs_f64(),
        at(0.5),
        at(0.99),
        at(1.0),
        process.memory_mb("VmRSS"),
        process.memory_mb("VmHWM"),
        cpu,
        f64::from(total) / took.as_secs_f64(),
    );
    drop(process);
    runtime.block_on(server.shutdown());
}

fn main() {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    match arguments.iter().map(String::as_str).collect::<Vec<_>>()[..] {
        ["agent", kubeconfig, netns] => return agent(kubeconfig, netns),
        ["measure-agent", size] => return measure_agent(size.parse().unwrap()),
        ["measure", size] => {
            // Everything on one core, so that time is processor time.
            let mut set = nix::sched::CpuSet::new();
            set.set(0).unwrap();
            nix::sched::sched_setaffinity(nix::unistd::Pid::from_raw(0), &set).unwrap();
            return measure(size.parse().unwrap());
        }
        _ => {}
    }
    let sizes: Vec<u32> = arguments.iter().filter_map(|a| a.parse().ok()).collect();
    let sizes = if sizes.is_empty() { SIZES.to_vec() } else { sizes };
    let cpu = std::fs::read_to_string("/proc/cpuinfo").unwrap_or_default();
    let model = cpu
        .lines()
        .find_map(|l| l.strip_prefix("model name"))
        .map_or("unknown", |l| l.trim_start_matches([' ', '\t', ':']));
    let kernel = std::fs::read_to_string("/proc/sys/kernel/osrelease").unwrap_or_default();
    println!(
        "# Service proxy of one node\n\nMade by `cargo bench -p portolan-dataplane --bench scale` on {model}, Linux {}, {} build, {ENDPOINTS} endpoints a Service.\n",
        kernel.trim(),
        if cfg!(debug_assertions) { "development" } else { "release" },
    );
    println!(
        "## An agent process with an API server\n\n\
         First sync: seconds from the start of the process to ready, which includes connecting and listing over TLS; in brackets its processor time.\n\
         Swap: milliseconds from before the write of an EndpointSlice with one other endpoint to the kernel's announcement of the change, {API_SWAPS} swaps.\n\
         Memory: resident, MB. Stream: processor time of the agent for one change, in microseconds, at about {CHANGES_A_SECOND} changes a second for {} s.\n\n\
         | Services | first sync | swap p50 / p99 / max | memory after the first sync | after all | peak | stream |\n|---|---|---|---|---|---|---|",
        STREAM.as_secs()
    );
    let program = std::env::current_exe().unwrap();
    // A process each, so that memory is that size's own.
    let each = |what: &str| {
        for size in &sizes {
            let status = Command::new(&program).args([what, &size.to_string()]).status().unwrap();
            assert!(status.success(), "{what} {size}: {status}");
        }
    };
    each("measure-agent");
    println!(
        "\nReal kube-proxy 1.36 in nftables mode with the real API server, measured once on such a machine at 10 000 Services: first sync 18.6 s, swap 4.8 s (p50) to 5.3 s,\n\
         278 MB after the first sync and 505 MB later, about 4.5 s of processor time a swap.\n\n\
         ## The proxy in one process, next to kube-proxy's rules\n\n\
         Everything on one core. Times in milliseconds unless said; `peer` is kube-proxy's nftables layout with the same Services, given to `nft`\n\
         as text by the benchmark (without kube-proxy's own work, listing included). A connection is connect, a byte each way, reset: median µs of {TURNS} alternating turns of {CONNECTS}.\n\n\
         | Services | first sync: decode + compile and commit | read back and compare | peer: load | swap p50 / p99 / max | one endpoint more or less p50 / p99 | peer: swap | CPU µs a swap | connection to the endpoint itself | through the cluster IP | through the peer's | ratio |\n\
         |---|---|---|---|---|---|---|---|---|---|---|---|"
    );
    each("measure");
}
