//! Whatever an EndpointSlice or a Service says, the kernel accepts what is made of it, and what has no effect is a finding.
//!
//! `PORTOLAN_ORACLE` and `PORTOLAN_ORACLE_SEED` as in the oracle.

use std::collections::BTreeSet;
use std::sync::Arc;

use portolan_dataplane::{Change, ServiceProxy};
use portolan_plan::service::compile;
use portolan_plan::world::{ObjectKey, Slice, SliceManifest, World};
use serde_json::{Value, json};

use crate::{evaluate, lab};

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

const GOOD_V4: [&str; 5] = ["10.244.1.2", "10.244.1.3", "10.244.2.2", "192.0.2.9", "010.244.1.9"];
const GOOD_V6: [&str; 3] = ["fd00::1", "fd00:1::2", "2001:db8::FFFF"];
const BAD: [&str; 16] = [
    "",
    " ",
    "10.244.1",
    "10.244.1.256",
    "10.244.1.2/32",
    "127.0.0.1",
    "127.8.8.8",
    "0.0.0.0",
    "255.255.255.255",
    "169.254.1.1",
    "224.0.0.1",
    "::1",
    "::",
    "fe80::1",
    "ff02::1",
    "example.com",
];

/// A slice, and the fields of which a finding must speak.
fn slice(random: &mut Random, name: &str) -> (Value, BTreeSet<String>) {
    let kind = random.pick(&[json!("IPv4"), json!("IPv4"), json!("IPv6"), json!("FQDN"), json!(""), Value::Null]);
    let mut wrong = BTreeSet::new();
    let usable = kind == "IPv4" || kind == "IPv6";
    if !usable {
        wrong.insert("addressType".to_owned());
    }
    let count = if random.chance(3) { 1000 } else { random.below(7) };
    let mut seen = BTreeSet::new();
    let endpoints: Vec<Value> = (0..count)
        .map(|i| {
            let (good, other): (&[&str], &[&str]) =
                if kind == "IPv6" { (&GOOD_V6, &GOOD_V4) } else { (&GOOD_V4, &GOOD_V6) };
            let (address, fine) = match random.below(10) {
                0 => (random.pick(&BAD).to_owned(), false),
                1 => (random.pick(other).to_owned(), false),
                2 => ("::ffff:10.244.1.2".to_owned(), kind == "IPv4"),
                _ if count == 1000 => {
                    (format!("{}{}", if kind == "IPv6" { "fd00::" } else { "10.3.0." }, i % 256), true)
                }
                _ => (random.pick(good).to_owned(), true),
            };
            let canonical = portolan_plan::world::parse_ip(&address);
            if usable && (!fine || !seen.insert(canonical)) {
                wrong.insert(format!("endpoints[{i}].addresses[0]"));
            }
            let mut endpoint = json!({"addresses": [address]});
            if random.chance(60) {
                let condition = |r: &mut Random| r.pick(&[json!(true), json!(false), Value::Null]);
                endpoint["conditions"] =
                    json!({"ready": condition(random), "serving": condition(random), "terminating": condition(random)});
            }
            if random.chance(50) {
                endpoint["nodeName"] = random.pick(&[json!("n1"), json!("n2"), json!(""), Value::Null]);
            }
            if random.chance(30) {
                endpoint["hints"] = random.pick(&[
                    Value::Null,
                    json!({}),
                    json!({"forZones": []}),
                    json!({"forZones": [{"name": "a"}], "forNodes": [{"name": "n1"}]}),
                    json!({"forZones": [{"name": ""}, {}]}),
                ]);
            }
            endpoint
        })
        .collect();
    let mut ports = Vec::new();
    for i in 0..random.below(5) {
        let number = random.pick(&[
            json!(8080),
            json!(8080),
            json!(1),
            json!(65535),
            json!(0),
            json!(-1),
            json!(65536),
            json!(i64::MAX),
            Value::Null,
        ]);
        let protocol = random.pick(&[
            json!("TCP"),
            json!("TCP"),
            json!("UDP"),
            json!("SCTP"),
            Value::Null,
            json!("tcp"),
            json!("ICMP"),
        ]);
        let known = matches!(protocol.as_str(), None | Some("TCP" | "UDP" | "SCTP"));
        if usable && !known {
            wrong.insert(format!("ports[{i}].protocol"));
        } else if usable && !number.as_i64().is_some_and(|n| (1..=65535).contains(&n)) {
            wrong.insert(format!("ports[{i}].port"));
        }
        ports.push(json!({"name": random.pick(&[json!("a"), json!("b"), json!(""), Value::Null]), "protocol": protocol, "port": number}));
    }
    let labels = match random.below(12) {
        0 => Value::Null,
        1 => json!({}),
        2 => json!({"kubernetes.io/service-name": ""}),
        3 => json!({"kubernetes.io/service-name": "s0", "service.kubernetes.io/headless": ""}),
        n => json!({"kubernetes.io/service-name": format!("s{}", n % 3)}),
    };
    let label = labels["kubernetes.io/service-name"].as_str().unwrap_or_default();
    if label.is_empty() {
        wrong = BTreeSet::from(["metadata.labels".to_owned()]);
    } else if labels.get("service.kubernetes.io/headless").is_some() {
        wrong.clear();
    }
    let object = json!({
        "metadata": {"namespace": "t", "name": name, "labels": labels},
        "addressType": kind,
        "endpoints": if random.chance(5) { wrong.retain(|w| !w.starts_with("endpoints")); Value::Null } else { json!(endpoints) },
        "ports": if random.chance(5) { wrong.retain(|w| !w.starts_with("ports")); Value::Null } else { json!(ports) },
    });
    (object, wrong)
}

fn service(random: &mut Random, k: u64) -> Value {
    let port = |r: &mut Random, name: &str| {
        json!({
            "name": name, "port": r.pick(&[80, 80, 81, 0, 70000, -1]), "nodePort": r.pick(&[30080, 30081, 0, -5, 99999]),
            "protocol": r.pick(&["TCP", "UDP", "SCTP", "tcp", ""]),
        })
    };
    let odd = random.chance(50);
    let ip = |r: &mut Random| {
        r.pick(&[
            json!(format!("10.96.0.{}", k + 1)),
            json!("10.96.0.1"),
            json!("None"),
            json!(""),
            json!("x"),
            json!("127.0.0.1"),
            json!("192.168.50.11"),
        ])
    };
    json!({
        "metadata": {"namespace": "t", "name": format!("s{k}")},
        "spec": {
            "type": random.pick(&["ClusterIP", "NodePort", "LoadBalancer", "ExternalName", "Odd"]),
            "clusterIP": ip(random), "clusterIPs": [ip(random), "fd00:10:96::1"],
            "ports": [port(random, "a"), port(random, "b"), port(random, if odd { "a" } else { "" })],
            "externalIPs": random.pick(&[json!([]), json!(["127.0.0.1", "0.0.0.0", "x", "198.51.100.1", "198.51.100.1", "::1"])]),
            "externalTrafficPolicy": random.pick(&["Cluster", "Local", "Odd", ""]),
            "internalTrafficPolicy": random.pick(&["Cluster", "Local", "Odd"]),
            "sessionAffinity": random.pick(&["None", "ClientIP", "Odd"]),
            "sessionAffinityConfig": {"clientIP": {"timeoutSeconds": random.pick(&[json!(1), json!(0), json!(-7), json!(i32::MAX), Value::Null])}},
            "loadBalancerSourceRanges": random.pick(&[
                json!([]), json!(["10.0.0.0/8", "10.1.0.0/16", "10.0.0.0/8", "0.0.0.0/33", "x", "fd00::/8", " 192.168.50.7/24 "]), json!(["0.0.0.0/0", "10.0.0.0/8"]),
            ]),
            "healthCheckNodePort": random.pick(&[0, -1, 32000, 70000]),
        },
        "status": {"loadBalancer": {"ingress": [{"ip": random.pick(&["203.0.113.1", "x", "", "::1", "10.96.0.1"])}, {"hostname": "x"}]}},
    })
}

#[test]
fn no_input_breaks_the_rules() {
    let space = lab::unnamed_namespace();
    let mut proxy = ServiceProxy::new(&space, lab::node_view("n1")).unwrap();
    let mut world = World::default();
    let number = |name: &str| std::env::var(name).ok().and_then(|s| s.parse::<u64>().ok());
    let first = number("PORTOLAN_ORACLE_SEED").unwrap_or(0);
    for seed in first..first + number("PORTOLAN_ORACLE").unwrap_or(60) {
        let mut random = Random(seed);
        let mut changes = Vec::new();
        let mut wrong = BTreeSet::new();
        for k in 0..3 {
            // A Service that is no Service of the proxy's has no findings about its slices either, so that they all have one.
            let fine = json!({"metadata": {"namespace": "t", "name": format!("s{k}")}, "spec": {"clusterIP": format!("10.96.0.{}", k + 1), "ports": [{"name": "a", "port": 80}]}});
            let object = if seed % 2 == 0 { fine } else { service(&mut random, k) };
            changes.push(Change::service(&serde_json::from_value(object).unwrap()));
        }
        for name in ["x", "y", "z", "w"] {
            let (object, fields) = slice(&mut random, name);
            wrong.extend(fields.into_iter().map(|f| (name.to_owned(), f)));
            // As the agent's watch does it.
            let manifest: SliceManifest =
                serde_json::from_value(object.clone()).unwrap_or_else(|e| panic!("{e}: {object}"));
            let parsed = Slice::parse(&manifest).map(Arc::new);
            changes.push(Change::Slice(ObjectKey::new("t", name), parsed));
            if Slice::stray(&manifest).is_some() {
                assert!(wrong.remove(&(name.to_owned(), "metadata.labels".to_owned())), "seed {seed}: {object}");
            }
        }
        for change in &changes {
            evaluate::apply(&mut world, change);
            proxy.change(change.clone());
        }
        let report = proxy.sync();
        assert!(report.is_ok(), "seed {seed}: {report:?}");
        let (map, findings) = compile(&world, proxy.node());
        assert_eq!(*proxy.map(), map, "seed {seed}");
        for backend in map.services.values().flat_map(|s| s.serving.iter()) {
            assert!(
                !backend.addr.is_loopback() && !backend.addr.is_unspecified() && !backend.addr.is_multicast(),
                "{backend}"
            );
        }
        if seed % 2 == 0 {
            let of_slices = findings.into_iter().filter(|f| f.origin.kind == "EndpointSlice");
            let found: BTreeSet<(String, String)> = of_slices.map(|f| (f.origin.name, f.origin.field)).collect();
            assert_eq!(found, wrong, "seed {seed}");
        }
        // What was grown is what a start would make.
        if seed % 10 == 9 {
            proxy.distrust_kernel();
            let report = proxy.sync();
            assert!(report.is_ok(), "seed {seed}: {report:?}");
        }
    }
}
