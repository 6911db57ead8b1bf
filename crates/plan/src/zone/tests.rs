use super::*;
use k8s_openapi::api::networking::v1::Ingress;
use serde_json::{Value, json};

fn object<T: serde::de::DeserializeOwned>(value: Value) -> T {
    serde_json::from_value(value).unwrap()
}

fn namespace(name: &str) -> Namespace {
    object(json!({"metadata": {"name": name}}))
}

fn service(name: &str, spec: Value) -> Service {
    object(json!({"metadata": {"namespace": "shop", "name": name}, "spec": spec}))
}

fn slice(name: &str, service: &str, endpoints: Value) -> EndpointSlice {
    object(json!({"metadata": {"namespace": "shop", "name": name, "labels": {SERVICE_NAME: service}},
        "addressType": "IPv4", "ports": [{"name": "http", "port": 8080}], "endpoints": endpoints}))
}

fn ip(text: &str) -> IpAddr {
    text.parse().unwrap()
}

fn addresses(set: &ZoneSet, key: &str) -> Vec<String> {
    set.service(key).map(|e| e.endpoints().map(|(e, _)| e.address.to_string()).collect()).unwrap_or_default()
}

#[test]
fn only_ready_endpoints_are_kept_and_unknown_counts_as_ready() {
    let mut b = ZoneBuilder::new(Options::default());
    b.set_namespace(&namespace("shop"));
    b.set_service(&service("web", json!({"clusterIP": "None"})));
    let changed = b.set_slice(&slice(
        "web-1",
        "web",
        json!([
        {"addresses": ["10.0.0.1"], "conditions": {"ready": true}},
        {"addresses": ["10.0.0.2"], "conditions": {"ready": false, "serving": true, "terminating": true}},
        {"addresses": ["10.0.0.3"]}]),
    ));
    assert!(changed);
    assert_eq!(addresses(b.set(), "web.shop"), ["10.0.0.1", "10.0.0.3"]);
    assert_eq!(b.set().endpoint_owners(ip("10.0.0.2")).count(), 0);
}

#[test]
fn a_change_without_effect_is_told_apart() {
    let mut b = ZoneBuilder::new(Options::default());
    assert!(b.set_namespace(&namespace("shop")));
    assert!(!b.set_namespace(&namespace("shop")));
    let web = service("web", json!({"clusterIP": "10.96.0.1", "ports": [{"port": 80}]}));
    assert!(b.set_service(&web));
    let mut labelled = web.clone();
    labelled.metadata.labels = Some([("a".into(), "b".into())].into());
    assert!(!b.set_service(&labelled));
    assert!(!b.delete_service("shop", "other"));
    assert!(b.delete_service("shop", "web"));
    assert!(!b.delete_service("shop", "web"));
    assert_eq!(*b.set(), {
        let mut c = ZoneBuilder::new(Options::default());
        c.set_namespace(&namespace("shop"));
        c.set().clone()
    });
}

#[test]
fn an_address_in_two_slices_stays_until_both_are_gone() {
    let mut b = ZoneBuilder::new(Options::default());
    b.set_namespace(&namespace("shop"));
    b.set_slice(&slice("web-1", "web", json!([{"addresses": ["10.0.0.1"]}])));
    b.set_slice(&slice("web-2", "web", json!([{"addresses": ["10.0.0.1"]}, {"addresses": ["10.0.0.2"]}])));
    assert!(b.set().service("web.shop").unwrap().overlapping);
    b.delete_slice("shop", "web-1");
    assert!(!b.set().service("web.shop").unwrap().overlapping);
    assert_eq!(b.set().endpoint_owners(ip("10.0.0.1")).count(), 1);
    b.delete_slice("shop", "web-2");
    assert_eq!(b.set().endpoint_owners(ip("10.0.0.1")).count(), 0);
    assert!(b.set().service("web.shop").is_none());
}

#[test]
fn a_slice_that_changes_its_service_moves() {
    let mut b = ZoneBuilder::new(Options::default());
    b.set_namespace(&namespace("shop"));
    b.set_slice(&slice("s", "old", json!([{"addresses": ["10.0.0.1"]}])));
    assert!(b.set_slice(&slice("s", "new", json!([{"addresses": ["10.0.0.1"]}]))));
    assert!(b.set().service("old.shop").is_none());
    let owners: Vec<_> = b.set().endpoint_owners(ip("10.0.0.1")).map(|(k, _)| k.as_str().to_string()).collect();
    assert_eq!(owners, ["new.shop"]);
}

#[test]
fn a_published_set_does_not_change_under_its_reader() {
    let mut b = ZoneBuilder::new(Options::default());
    b.set_namespace(&namespace("shop"));
    b.set_service(&service("web", json!({"clusterIP": "10.96.0.1"})));
    let before = b.set().clone();
    b.set_service(&service("web", json!({"clusterIP": "10.96.0.2"})));
    assert_eq!(before.cluster_ip_owner(ip("10.96.0.1")).unwrap().as_str(), "web.shop");
    assert!(before.cluster_ip_owner(ip("10.96.0.2")).is_none());
    assert!(b.set().cluster_ip_owner(ip("10.96.0.1")).is_none());
}

#[test]
fn a_terminating_pod_stays_and_is_never_new() {
    let options = Options { pods: PodMode::Verified, ..Options::default() };
    let pod = |deleting: bool| -> Pod {
        let mut p: Pod = object(json!({"metadata": {"namespace": "shop", "name": "a"},
            "status": {"phase": "Running", "podIP": "10.0.0.1", "podIPs": [{"ip": "10.0.0.1"}, {"ip": "fd00:0::1"}]}}));
        if deleting {
            p.metadata.deletion_timestamp = object(json!("2026-01-01T00:00:00Z"));
        }
        p
    };
    let mut b = ZoneBuilder::new(options);
    assert!(!b.set_pod(&pod(true)));
    assert!(!b.set().has_pod("shop", ip("10.0.0.1")));
    assert!(b.set_pod(&pod(false)));
    assert!(!b.set_pod(&pod(true)));
    assert!(b.set().has_pod("shop", ip("fd00::1")), "addresses are compared as addresses");
    assert!(!b.set().has_pod("other", ip("10.0.0.1")));
    assert!(b.retain_pods(&HashSet::new()));
    assert!(!b.set().has_pod("shop", ip("10.0.0.1")));
}

#[test]
fn endpoint_labels() {
    for (address, label) in
        [("10.244.1.7", "10-244-1-7"), ("fd00::a", "fd00--a"), ("fd00::", "fd00--0"), ("::1", "--1")]
    {
        let endpoint = Endpoint { address: ip(address), name: None };
        let mut text = String::new();
        endpoint.write_label(&mut text);
        assert_eq!(text, label);
        assert!(endpoint.has_label(label));
    }
    assert!(!Endpoint { address: ip("10.0.0.1"), name: Some("a".into()) }.has_label("10-0-0-1"));
}

/// A small deterministic generator, so that a failing history can be told by its seed alone.
struct Dice(u64);

impl Dice {
    fn below(&mut self, n: u64) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        (z ^ (z >> 31)) % n
    }
}

/// Any history of changes gives the same set as its outcome applied to an empty one.
#[test]
fn incremental_equals_from_scratch() {
    for seed in 0..60 {
        let mut dice = Dice(seed);
        let options = Options {
            exposure: if seed % 3 == 0 { Exposure::Named(["shop".to_string()].into()) } else { Exposure::All },
            endpoint_pod_names: seed % 2 == 0,
            pods: PodMode::Verified,
        };
        let mut incremental = ZoneBuilder::new(options.clone());
        let (mut spaces, mut services, mut slices, mut pods) =
            (BTreeMap::new(), BTreeMap::new(), BTreeMap::new(), BTreeMap::new());
        for _ in 0..200 {
            let ns = ["shop", "data"][dice.below(2) as usize];
            let name = format!("n{}", dice.below(4));
            let key = (ns.to_string(), name.clone());
            match dice.below(10) {
                0 => {
                    spaces.insert(ns, namespace(ns));
                    incremental.set_namespace(&spaces[ns]);
                }
                1 if dice.below(3) == 0 => {
                    spaces.remove(ns);
                    incremental.delete_namespace(ns);
                }
                2 | 3 => {
                    let spec = match dice.below(3) {
                        0 => json!({"clusterIP": "None"}),
                        1 => json!({"type": "ExternalName", "externalName": "a.example"}),
                        _ => json!({"clusterIPs": [format!("10.96.0.{}", dice.below(3))], "ports": [{"port": 80}]}),
                    };
                    let mut s = service(&name, spec);
                    s.metadata.namespace = Some(ns.into());
                    incremental.set_service(&s);
                    services.insert(key, s);
                }
                4 => {
                    incremental.delete_service(ns, &name);
                    services.remove(&key);
                }
                5 | 6 => {
                    let endpoints: Vec<Value> = (0..dice.below(4))
                        .map(|_| {
                            json!({"addresses": [format!("10.0.0.{}", dice.below(5))],
                            "conditions": {"ready": dice.below(4) > 0}, "targetRef": {"name": "p"}})
                        })
                        .collect();
                    let mut s = slice(&name, &format!("n{}", dice.below(3)), endpoints.into());
                    s.metadata.namespace = Some(ns.into());
                    if dice.below(8) == 0 {
                        s.address_type = "FQDN".into();
                    }
                    incremental.set_slice(&s);
                    slices.insert(key, s);
                }
                7 => {
                    incremental.delete_slice(ns, &name);
                    slices.remove(&key);
                }
                8 => {
                    let p: Pod = object(json!({"metadata": {"namespace": ns, "name": name},
                        "status": {"phase": "Running", "podIP": format!("10.0.1.{}", dice.below(3))}}));
                    incremental.set_pod(&p);
                    pods.insert(key, p);
                }
                _ => {
                    incremental.delete_pod(ns, &name);
                    pods.remove(&key);
                }
            }
        }
        let mut scratch = ZoneBuilder::new(options);
        slices.values().rev().for_each(|s| _ = scratch.set_slice(s));
        pods.values().for_each(|p| _ = scratch.set_pod(p));
        services.values().for_each(|s| _ = scratch.set_service(s));
        spaces.values().for_each(|n| _ = scratch.set_namespace(n));
        assert!(incremental.set() == scratch.set(), "seed {seed}");

        let none = HashSet::new();
        incremental.retain_namespaces(&none);
        incremental.retain_services(&none);
        incremental.retain_slices(&none);
        incremental.retain_pods(&none);
        assert_eq!(incremental.set().entries.iter().count(), 0, "seed {seed}");
        assert_eq!(incremental.set().cluster_ips.iter().count(), 0, "seed {seed}");
        assert_eq!(incremental.set().endpoint_ips.iter().count(), 0, "seed {seed}");
        assert_eq!(incremental.set().pods.iter().count(), 0, "seed {seed}");
    }
}

#[test]
fn published_names_follow_status_and_annotations() {
    let ingress = |name: &str, hosts: &[&str], ip: Option<&str>| -> Ingress {
        let rules: Vec<Value> = hosts.iter().map(|h| json!({"host": h})).collect();
        let status = ip.map(|ip| json!([{"ip": ip}])).unwrap_or(json!([]));
        object(json!({"metadata": {"namespace": "shop", "name": name}, "spec": {"rules": rules},
            "status": {"loadBalancer": {"ingress": status}}}))
    };
    let found = |b: &PublishedBuilder, name: &str| -> String {
        b.current().find(name).map(|h| format!("{:?} {:?}", h.targets, h.ttl)).unwrap_or_default()
    };
    let mut b = PublishedBuilder::default();
    assert!(!b.set_ingress(&ingress("i", &["api.example.com"], None)), "no address yet");
    assert_eq!(found(&b, "api.example.com"), "");
    assert!(b.set_ingress(&ingress("i", &["API.example.com", "*.apps.example.com"], Some("192.0.2.1"))));
    assert_eq!(found(&b, "api.example.com"), "[Address(192.0.2.1)] None");
    assert_eq!(found(&b, "x.apps.example.com"), "[Address(192.0.2.1)] None");
    assert_eq!(found(&b, "apps.example.com"), "");
    assert_eq!(found(&b, "x.api.example.com"), "");
    let lb: Service = object(json!({"metadata": {"namespace": "shop", "name": "db", "annotations":
        {HOST: "db.example.com, api.example.com", "external-dns.alpha.kubernetes.io/ttl": "1m"}},
        "spec": {"type": "LoadBalancer"}, "status": {"loadBalancer": {"ingress": [{"hostname": "lb.example.net."}]}}}));
    assert!(b.set_service(&lb));
    assert_eq!(found(&b, "db.example.com"), "[Name(\"lb.example.net\")] Some(60)");
    assert_eq!(found(&b, "api.example.com"), "[Address(192.0.2.1), Name(\"lb.example.net\")] Some(60)");
    assert!(b.delete_ingress("shop", "i"));
    assert_eq!(found(&b, "api.example.com"), "[Name(\"lb.example.net\")] Some(60)");
    assert!(b.retain_services(&HashSet::new()));
    assert_eq!(*b.current(), Published::default());

    const HOST: &str = "external-dns.alpha.kubernetes.io/hostname";
}
