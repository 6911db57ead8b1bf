//! Random clusters and random packets: what the kernel does with a packet is among what [`portolan_plan::eval`] says.
//!
//! `PORTOLAN_ORACLE` sets the number of clusters; `PORTOLAN_ORACLE_SEED` the first seed, to repeat a failure.

use std::collections::{BTreeMap, BTreeSet};
use std::net::SocketAddr;
use std::time::Duration;

use portolan_dataplane::{Change, ServiceProxy};
use portolan_plan::service::compile;
use portolan_plan::world::{IpFamily, LocalDetection, NodeView, ObjectKey, World};
use serde_json::{Value, json};
use tokio::task::JoinSet;

use crate::case;
use crate::evaluate::{self, Fate, Nodes};
use crate::lab::{self, Lab, NODES, PODS};
use crate::probe::{self, Seen};

const CLUSTERS: u64 = 10;
const PACKETS: usize = 140;
const SERVICES: usize = 4;
const SILENCE: Duration = Duration::from_millis(700);
const PATIENCE: Duration = Duration::from_secs(5);

struct Random(u64);

impl Random {
    fn below(&mut self, n: u64) -> u64 {
        self.0 = self.0.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (self.0 >> 33) % n
    }
    fn chance(&mut self, percent: u64) -> bool {
        self.below(100) < percent
    }
    fn pick<T: Clone>(&mut self, from: &[T]) -> T {
        from[self.below(from.len() as u64) as usize].clone()
    }
}

fn text(name: &str) -> String {
    lab::address(name).unwrap().to_string()
}

fn node_view(random: &mut Random, name: &str) -> NodeView {
    let names = random.pick(&[vec![""], vec![""], vec!["", ".gw"], vec![".gw"], vec![]]);
    let network = |n: &str| lab::network(n).unwrap().parse().unwrap();
    NodeView {
        zone: random.pick(&[None, Some("a".to_owned()), Some("b".to_owned())]),
        node_port_addresses: names
            .iter()
            .flat_map(|s| [format!("{name}{s}"), format!("{name}{s}.6")])
            .map(|n| lab::address(&n).unwrap())
            .collect(),
        local_detection: match random.below(5) {
            0 => LocalDetection::Off,
            1 => LocalDetection::Networks(vec![network("pods"), network("pods.6")]),
            2 => LocalDetection::Networks(vec![network("pods")]),
            _ => LocalDetection::InterfacePrefix("vp".into()),
        },
        masquerade_all: random.chance(15),
        ..lab::node_view(name)
    }
}

fn service(random: &mut Random, i: usize) -> Value {
    let k = i + 1;
    let families = random.pick(&[&["", ".6"][..], &[""], &[".6"], &[".6", ""]]);
    let ips: Vec<String> = families.iter().map(|f| text(&format!("C{k}{f}"))).collect();
    let mut ports = vec![json!({"name": "a", "port": 80, "protocol": "TCP", "nodePort": 30080 + 10 * i})];
    if random.chance(70) {
        ports.push(json!({"name": "b", "port": 80, "protocol": "UDP", "nodePort": 30080 + 10 * i}));
    }
    if random.chance(30) {
        ports.push(json!({"name": "c", "port": 81, "protocol": "TCP", "nodePort": 30081 + 10 * i}));
    }
    // E9 and L9 are claimed by several Services at times; the oldest has them.
    let mut addresses = |letter: &str, percent: u64| -> Vec<String> {
        let names = [format!("{letter}{k}"), format!("{letter}9")];
        let mut all = Vec::new();
        for name in names {
            for family in ["", ".6"] {
                if random.chance(percent) {
                    all.push(text(&format!("{name}{family}")));
                }
            }
        }
        all
    };
    let external = addresses("E", 40);
    let ingress: Vec<String> = addresses("L", 60);
    let ingress: Vec<Value> = ingress
        .into_iter()
        .map(|ip| json!({"ip": ip, "ipMode": random.pick(&["VIP", "VIP", "VIP", "Proxy"])}))
        .collect();
    let ranges: Vec<Value> = (0..random.below(3))
        .map(|_| {
            json!(random.pick(&[
                "192.168.50.0/24",
                "192.168.50.101/32",
                "10.244.0.0/16",
                "10.244.1.0/24",
                "192.168.50.11/32",
                "fd00:50::/64",
                "fd00:10:244::/48"
            ]))
        })
        .collect();
    json!({
        "kind": "Service",
        "metadata": {"name": format!("s{i}"), "creationTimestamp": format!("2026-01-0{}T00:00:00Z", random.below(4) + 1)},
        "spec": {
            "type": random.pick(&["ClusterIP", "NodePort", "LoadBalancer", "LoadBalancer"]),
            "clusterIP": ips[0], "clusterIPs": ips, "ports": ports, "externalIPs": external,
            "externalTrafficPolicy": random.pick(&["Cluster", "Local"]),
            "internalTrafficPolicy": random.pick(&["Cluster", "Cluster", "Local"]),
            "sessionAffinity": random.pick(&["None", "None", "None", "ClientIP"]),
            "loadBalancerSourceRanges": if random.chance(60) { json!([]) } else { json!(ranges) },
        },
        "status": {"loadBalancer": {"ingress": ingress}},
    })
}

fn slice(random: &mut Random, i: usize, k: usize, family: &str) -> Value {
    let hinted = random.chance(30);
    let terminating_world = random.chance(25);
    let endpoints: Vec<Value> = (0..random.pick(&[0, 1, 2, 3, 4, 4, 5]))
        .map(|_| {
            let name = random.pick(&[
                "p1a", "p1b", "p2a", "p2b", "p3a", "p3b", "p1a", "p2a", "p3a", "n1", "n2", "n3", "p1dead", "p3dead",
            ]);
            let mut endpoint = json!({
                "addresses": [text(&format!("{name}{family}"))],
                "conditions": if terminating_world || random.chance(20) {
                    json!({"ready": random.chance(30), "serving": random.chance(70), "terminating": random.chance(60)})
                } else {
                    json!({})
                },
            });
            if random.chance(90) {
                endpoint["nodeName"] = json!(format!("n{}", &name[1..2]));
            }
            if hinted && random.chance(95) {
                endpoint["hints"] = json!({"forZones": [{"name": random.pick(&["a", "b"])}]});
                if random.chance(40) {
                    endpoint["hints"]["forNodes"] = json!([{"name": random.pick(&NODES)}]);
                }
            }
            endpoint
        })
        .collect();
    // 8083 is a port on which nobody listens.
    let mut port = |name: &str, protocol: &str| json!({"name": name, "protocol": protocol, "port": random.pick(&[8080, 8081, 8082, 8080, 8081, 8082, 8080, 8083])});
    json!({
        "kind": "EndpointSlice",
        "metadata": {"name": format!("s{i}-{k}{}", if family.is_empty() { "" } else { "-6" }), "labels": {"kubernetes.io/service-name": format!("s{i}")}},
        "addressType": if family.is_empty() { "IPv4" } else { "IPv6" },
        "ports": [port("a", "TCP"), port("b", "UDP"), port("c", "TCP")],
        "endpoints": endpoints,
    })
}

fn host_pod(random: &mut Random, name: &str) -> Change {
    let node = format!("n{}", &name[1..2]);
    let mut ports = Vec::new();
    for _ in 0..=random.below(2) {
        // 30080 is also the first Service's node port.
        ports.push(json!({
            "hostPort": random.pick(&[31500, 31501, 30080]), "containerPort": random.pick(&[8080, 8081]),
            "protocol": random.pick(&["TCP", "UDP"]), "hostIP": random.pick(&["", "", &text(&node), &text(&format!("{node}.gw")), "127.0.0.1"]),
        }));
    }
    let object = json!({
        "metadata": {"namespace": case::NAMESPACE, "name": name, "creationTimestamp": format!("2026-01-0{}T00:00:00Z", random.below(4) + 1)},
        "spec": {"containers": [{"name": "c", "ports": ports}]},
        "status": {"phase": "Running", "podIPs": [{"ip": text(name)}, {"ip": text(&format!("{name}.6"))}]},
    });
    Change::pod(&serde_json::from_value(object).unwrap())
}

fn packet(random: &mut Random) -> Value {
    let from = random.pick(&["p1a", "p1b", "p2a", "p2b", "p3a", "p3b", "n1", "n2", "n3", "x1", "x2"]);
    let i = random.below(SERVICES as u64);
    let family = random.pick(&["", "", ".6"]);
    let protocol = random.pick(&["tcp", "udp"]);
    let (to, port) = match random.below(12) {
        0..=3 => (format!("C{}", i + 1), random.pick(&[80, 80, 80, 80, 80, 80, 81, 82])),
        4..=6 => (
            random.pick(&["n1", "n2", "n3", "n1.gw", "n2.gw"]).to_owned(),
            30080 + 10 * i + u64::from(random.chance(15)),
        ),
        7 | 8 => (format!("L{}", random.pick(&[i + 1, 9])), 80),
        9 => (format!("E{}", random.pick(&[i + 1, 9])), random.pick(&[80, 80, 83])),
        10 => (random.pick(&["n1", "n2", "n3", "n3.gw"]).to_owned(), random.pick(&[31500, 31501, 30080])),
        _ => ("U".to_owned(), 80),
    };
    let mut probe = json!({"from": from, "to": format!("{to}{family}"), "proto": protocol, "port": port});
    if from.starts_with('x') {
        probe["via"] = json!(random.pick(&NODES));
    }
    probe
}

struct Site {
    lab: Lab,
    proxies: BTreeMap<String, ServiceProxy>,
    _servers: JoinSet<()>,
}

impl Site {
    fn build() -> Site {
        let lab = Lab::build();
        let mut servers = JoinSet::new();
        crate::traffic::serve(&lab, &mut servers);
        let proxies = NODES
            .iter()
            .map(|n| ((*n).to_owned(), ServiceProxy::new(&lab.spaces[*n], lab::node_view(n)).unwrap()))
            .collect();
        Site { lab, proxies, _servers: servers }
    }

    /// Brings the nodes from the last cluster to that of `seed`, and tells what the evaluator is to expect.
    fn become_cluster(&mut self, random: &mut Random) -> Nodes {
        let mut world = World::default();
        let mut shared = vec![case::service_range()];
        for i in 0..SERVICES {
            let name = format!("s{i}");
            shared.push(Change::service_gone(ObjectKey::new(case::NAMESPACE, name.clone())));
            if random.chance(95) {
                shared.push(case::put(service(random, i)));
            }
            for k in 0..2 {
                for family in ["", ".6"] {
                    let suffix = if family.is_empty() { "" } else { "-6" };
                    shared.push(Change::slice_gone(ObjectKey::new(case::NAMESPACE, format!("{name}-{k}{suffix}"))));
                    if random.chance(if k == 0 { 90 } else { 25 }) {
                        shared.push(case::put(slice(random, i, k, family)));
                    }
                }
            }
        }
        for change in &shared {
            evaluate::apply(&mut world, change);
        }
        let mut nodes = Nodes::new();
        for node in NODES {
            let view = node_view(random, node);
            let mut own = vec![Change::Node(view.clone())];
            for pod in PODS.iter().filter(|p| p[1..2] == node[1..]) {
                own.push(Change::pod_gone(ObjectKey::new(case::NAMESPACE, *pod)));
                if random.chance(35) {
                    own.push(host_pod(random, pod));
                }
            }
            let mut world = world.clone();
            for change in &own {
                evaluate::apply(&mut world, change);
            }
            let proxy = self.proxies.get_mut(node).unwrap();
            for change in shared.iter().chain(&own) {
                proxy.change(change.clone());
            }
            let report = proxy.sync();
            assert!(report.is_ok(), "{node}: {report:?}");
            assert!(proxy.flows_settled(PATIENCE), "{node}: flows are not looked at");
            nodes.insert(node.to_owned(), (compile(&world, &view).0, view));
            assert_eq!(*proxy.map(), nodes[node].0, "{node}: grown and made from scratch");
        }
        nodes
    }
}

/// What a client sees, in the evaluator's terms.
fn fate(probe: &Value, seen: Seen) -> Result<Fate, String> {
    let to = lab::address(probe["to"].as_str().unwrap()).unwrap();
    let from = probe["from"].as_str().unwrap();
    let origin = match evaluate::owner(to) == from {
        true => to,
        false => lab::address(&if to.is_ipv6() { format!("{from}.6") } else { from.to_owned() }).unwrap(),
    };
    Ok(match seen {
        Seen::Reply { name, peer, .. } => Fate::Reply { name, source: evaluate::class(peer, origin) },
        Seen::Refused => Fate::Failure("refused"),
        Seen::Unreachable => Fate::Failure("icmp-unreachable"),
        Seen::Timeout => Fate::Failure("timeout"),
        Seen::Other(error) => return Err(error),
    })
}

async fn send(lab: &Lab, probe: &Value, fates: &BTreeSet<Fate>) -> Seen {
    let space = &lab.spaces[probe["from"].as_str().unwrap()];
    let to =
        SocketAddr::new(lab::address(probe["to"].as_str().unwrap()).unwrap(), probe["port"].as_u64().unwrap() as u16);
    let mark = probe["via"].as_str().map(|via| via[1..].parse::<u32>().unwrap());
    let patience = if fates.contains(&Fate::Failure("timeout")) { SILENCE } else { PATIENCE };
    probe::once(space, probe["proto"].as_str().unwrap(), to, mark, patience).await
}

#[test]
fn the_kernel_and_the_evaluator_agree() {
    let number = |name: &str| std::env::var(name).ok().and_then(|s| s.parse::<u64>().ok());
    let clusters = number("PORTOLAN_ORACLE").unwrap_or(CLUSTERS);
    let first = number("PORTOLAN_ORACLE_SEED").unwrap_or(1);
    let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build().unwrap();
    runtime.block_on(async {
        let mut site = Site::build();
        let mut kinds: BTreeMap<&str, usize> = BTreeMap::new();
        for seed in first..first + clusters {
            let mut random = Random(seed);
            let nodes = tokio::task::block_in_place(|| site.become_cluster(&mut random));
            let probes: Vec<(Value, BTreeSet<Fate>)> = (0..PACKETS)
                .map(|_| packet(&mut random))
                .map(|p| {
                    let mut fates = evaluate::fates(&nodes, &p);
                    // A node whose own packet finds no route after translation hears of it at once or never.
                    if p["from"].as_str().unwrap().starts_with('n')
                        && fates.contains(&Fate::Failure("icmp-unreachable"))
                    {
                        fates.insert(Fate::Failure("timeout"));
                    }
                    (p, fates)
                })
                .collect();
            let lab = &site.lab;
            let seen = futures::future::join_all(probes.iter().map(|(p, fates)| send(lab, p, fates))).await;
            let mut wrong = Vec::new();
            for ((probe, fates), seen) in probes.iter().zip(seen) {
                match fate(probe, seen) {
                    Ok(fate) if fates.contains(&fate) => {
                        let kind = match fate {
                            Fate::Reply { name, .. } if name == "gw" => "not captured",
                            Fate::Reply { .. } => "reply",
                            Fate::Failure(kind) => kind,
                        };
                        *kinds.entry(kind).or_default() += 1;
                    }
                    other => wrong.push(format!("{probe}\n    evaluated {fates:?}\n    seen {other:?}")),
                }
            }
            assert!(wrong.is_empty(), "seed {seed}: {} of {PACKETS} differ\n{}", wrong.len(), wrong.join("\n"));
        }
        println!("{clusters} clusters from seed {first}: {kinds:?}");
        for kind in ["reply", "refused", "timeout", "not captured"] {
            assert!(kinds.get(kind).is_some_and(|n| *n > 0), "{kind} never happened: {kinds:?}");
        }
    });
}

/// Upper quantile of the chi-squared distribution with 11 degrees of freedom: exceeded by chance once in a million times.
const CHI_SQUARED_11: f64 = 48.866;
const FLOWS: usize = 3000;

#[test]
fn flows_are_spread_evenly() {
    let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build().unwrap();
    runtime.block_on(async {
        let mut site = Site::build();
        let object = json!({
            "kind": "Service", "metadata": {"name": "spread"},
            "spec": {"clusterIP": text("C9"), "ports": [{"port": 80, "protocol": "UDP"}]},
        });
        let proxy = site.proxies.get_mut("n1").unwrap();
        proxy.change(case::put(object));
        // Twelve endpoints: six pods with two ports each.
        for port in [8080, 8081] {
            let endpoints: Vec<Value> = PODS.iter().map(|p| json!({"addresses": [text(p)]})).collect();
            proxy.change(case::put(json!({
                "kind": "EndpointSlice",
                "metadata": {"name": format!("spread-{port}"), "labels": {"kubernetes.io/service-name": "spread"}},
                "addressType": "IPv4", "ports": [{"name": "", "port": port, "protocol": "UDP"}], "endpoints": endpoints,
            })));
        }
        assert!(tokio::task::block_in_place(|| proxy.sync()).is_ok());
        let service = proxy.map().services.values().find(|s| s.origin.name == "spread").unwrap();
        assert_eq!(service.internal.usable().len(), 12);
        assert!(proxy.map().services.keys().all(|id| id.family == IpFamily::V4));

        let to = SocketAddr::new(lab::address("C9").unwrap(), 80);
        let mut counts: BTreeMap<(String, u16), usize> = BTreeMap::new();
        for _ in 0..FLOWS {
            match probe::once(&site.lab.spaces["p1b"], "udp", to, None, PATIENCE).await {
                Seen::Reply { name, port, .. } => *counts.entry((name, port)).or_default() += 1,
                other => panic!("{other:?}"),
            }
        }
        let expected = FLOWS as f64 / 12.0;
        let missing = (12 - counts.len()) as f64;
        let statistic =
            counts.values().map(|c| (*c as f64 - expected).powi(2) / expected).sum::<f64>() + missing * expected;
        println!("chi-squared {statistic:.1} of {CHI_SQUARED_11} with {FLOWS} flows");
        assert!(statistic < CHI_SQUARED_11, "chi-squared {statistic:.1}: {counts:?}");
    });
}
